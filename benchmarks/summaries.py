"""Tables for the results that have one of their own: one function a benchmark, from its JSON to Markdown."""

from __future__ import annotations

from typing import Any


def accuracy(entry: dict[str, Any]) -> str:
    low, high = entry["interval_95"]
    return f"{100 * entry['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def machine_line(content: dict[str, Any]) -> str:
    machine = content["machine"]
    place = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread(s)"
    return f"`{content['command']}`, {content['date']}, commit {content['commit']}, {place}."


def evaluations_table(content: dict[str, Any]) -> str:
    """One block an evaluation: clean, every attack with what was attacked, the worst case."""
    lines = ["| judged | attack | what the attacker had | n | accuracy, % [95 % Wilson] |", "|---|---|---|---:|---:|"]
    for evaluation in content["evaluations"]:
        rows = [("clean", evaluation["clean"])]
        rows += [(row["attack"], row) for row in evaluation["attacks"]]
        rows.append((f"**{evaluation['worst_case']['attack']}**", evaluation["worst_case"]))
        for index, (attack, row) in enumerate(rows):
            seeds = row["verdict_seeds"]
            n = f"{row['n']}" + (f" x {seeds} draws" if seeds > 1 else "")
            title = f"**{evaluation['name']}**" if index == 0 else ""
            lines.append(f"| {title} | {attack} | {row['attacked']} | {n} | {accuracy(row)} |")
    return "\n".join([*lines, "", machine_line(content)])


def robustness_table(content: dict[str, Any]) -> str:
    """A row a method and data set; p of McNemar's test against TeCoA, and which of the two keeps more images."""
    cells = [cell for row in content["methods"].values() for by_eps in row.values() for cell in by_eps.values()]
    eps = list(next(iter(content["methods"]["none"].values())))
    head = ["fine-tuned by", "judged on", "clean, % [95 % Wilson]", *(f"standing at {e}, %" for e in eps)]
    lines = [f"| {' | '.join([*head, f'against TeCoA at {eps[0]}'])} |", "|---|---|---:|---:|---:|---|"]

    def share(cell: dict[str, Any], name: str) -> str:
        low, high = cell[f"{name}_interval_95"]
        return f"{100 * cell[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    for method, row in content["methods"].items():
        for index, (name, by_eps) in enumerate(row.items()):
            against = by_eps[eps[0]]["against tecoa"]
            verdict = f"+{against['only this']} -{against['only tecoa']}, p = {against['p']:.2g}"
            robust = [share(by_eps[e], "robust") for e in eps]
            title = f"**{method}**" if index == 0 else ""
            comparison = "" if method == "tecoa" else verdict
            lines.append(
                f"| {title} | {name} | {share(by_eps[eps[0]], 'clean')} | {' | '.join(robust)} | {comparison} |"
            )
    under = f"After {' and '.join(cells[0]['attacks'])}, n = {cells[0]['n']} a row, one seed. {_rates(content)}"
    return "\n".join([*lines, "", under + machine_line(content)])


def _rates(content: dict[str, Any]) -> str:
    """The learning rate of each method, the first of those that keep most held-out training images."""
    tried = content.get("learning rates, on held-out training images", {})
    chosen = (f"{name} {max(rates, key=lambda lr: rates[lr]['robust'])}" for name, rates in tried.items() if rates)
    listed = "; ".join(chosen)
    return f"Learning rates: {listed}. " if listed else ""


def attacks_table(content: dict[str, Any]) -> str:
    """Verdicts and time beside torchattacks, attack by attack."""
    figures = content["figures"]
    lines = [
        "| model | attack | standing here, by seed | standing in torchattacks | times faster |",
        "|---|---|---|---|---:|",
    ]
    subjects = {name: rows for name, rows in figures.items() if isinstance(rows, dict) and "suite" in rows}
    for name, rows in subjects.items():
        title = f"**{name}**, eps {round(255 * rows['eps'])}/255, n = {rows['images']}"
        for attack, row in ((key, value) for key, value in rows.items() if isinstance(value, dict)):
            ours, theirs = (
                ", ".join(map(str, row[f"robust images, {who}"])) for who in ("clipdefense", "torchattacks")
            )
            lines.append(f"| {title} | {attack} | {ours} | {theirs} | {row['times faster']:.1f} |")
            title = ""
    return "\n".join([*lines, "", machine_line(content)])


def audit_table(content: dict[str, Any]) -> str:
    """How many of the clean models pass, and what was flagged on those that do not."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in content["counts"].items())
    recipes = sorted({model["recipe"] for model in content["models"]})
    flagged = [
        f"- {m['recipe']}, seed {m['seed']}: {', '.join(m['flagged'])}" for m in content["models"] if m["flagged"]
    ]
    lines = [
        f"{counts} of {len(content['models'])} models ({', '.join(recipes)}), {content['images']} images each, "
        f"eps {content['eps']}.",
        *flagged,
    ]
    return "\n".join(lines)


def reverse_attention_table(content: dict[str, Any]) -> str:
    """Network by network, what each attack on each head leaves of the deployed decision."""
    lines = ["| trained by | attacked | attack | accuracy, % [95 % Wilson] |", "|---|---|---|---:|"]
    for name, network in content["networks"].items():
        rows = [("-", "clean", network["clean"])]
        heads = {head: found for head, found in network.items() if head not in ("clean", "cpu_seconds")}
        worst = heads.pop("worst case per image")
        rows += [(head, attack, entry) for head, found in heads.items() for attack, entry in found.items()]
        rows.append(("all of them", "**worst case per image**", worst))
        for index, (head, attack, entry) in enumerate(rows):
            lines.append(f"| {f'**{name}**' if index == 0 else ''} | {head} | {attack} | {accuracy(entry)} |")
    return "\n".join([*lines, "", f"n = {content['n']}, eps {content['eps']}, seed {content['seed']}."])


def kills_table(content: dict[str, Any]) -> str:
    """What was killed, how often, and in how many of the cases the rows came out identical."""
    lines = ["| what happened | times | result identical | nothing done twice |", "|---|---:|---:|---:|"]
    kinds = {
        "random_kills": "an evaluation killed at a random moment",
        "worst_kills": "an evaluation killed at a worst moment",
        "fine_tune_kills": "a fine-tune killed at a random moment (its weights)",
    }
    for key, what in kinds.items():
        cases = content.get(key, [])
        once = [case["nothing_twice"] for case in cases if "nothing_twice" in case]
        twice = str(sum(once)) if once else "-"
        lines.append(f"| {what} | {len(cases)} | {sum(case['identical'] for case in cases)} | {twice} |")
    for key, what in (("shards", "done in shards, then merged"), ("full_disk", "disk full")):
        if key in content:
            once = str(int(content[key]["nothing_twice"])) if "nothing_twice" in content[key] else "-"
            lines.append(f"| {what} | 1 | {int(content[key]['identical'])} | {once} |")
    return "\n".join(lines)


ATTACKERS = {  # column -> what a defence's attackers of that kind are called
    "transfer": ("transfer",),
    "BPDA or its own gradient": ("bpda", "own gradient"),
    "the same with EOT": ("bpda-eot", "eot"),
    "gate evasion": ("gate-evasion",),
}


def _share(row: dict[str, Any], key: str = "accuracy", interval: str = "interval_95") -> str:
    return accuracy({"accuracy": row[key], "interval_95": row[interval]}) if row[key] is not None else "-"


def _adaptive_parts(content: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(model, defence, eps, part), in order."""
    return [(*name.split(":"), eps, part) for name, by_eps in content["parts"].items() for eps, part in by_eps.items()]


def adaptive_table(content: dict[str, Any]) -> str:
    """A row a model, defence and eps: transfer beside adaptive, and what is left of every draw under everything."""
    head = [
        "model",
        "defence",
        "eps",
        "n",
        "undefended, same attack",
        "clean",
        *ATTACKERS,
        "clean, every draw",
        "**worst case**",
    ]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|" + "---:|" * (len(head) - 4)]
    for model, defence, eps, part in _adaptive_parts(content):
        rows = {row["attacker"]: row for row in part["rows"]}
        found = [next((rows[name] for name in names if name in rows), None) for names in ATTACKERS.values()]
        cells = [_share(part["undefended"]["transfer"]), _share(rows["clean"])]
        cells += ["-" if row is None else _share(row) for row in found]
        cells.append(_share(rows["clean"], "standing", "standing_interval_95"))
        worst = _share(part["rows"][-1], "standing", "standing_interval_95")
        lines.append(f"| {model} | {defence} | {eps} | {part['n']} | {' | '.join(cells)} | **{worst}** |")
    return "\n".join([*lines, "", _adaptive_budget(content) + machine_line(content)])


def _adaptive_budget(content: dict[str, Any]) -> str:
    """What the attackers had, in words."""
    budgets = {model: part["budget"] for model, _, _, part in _adaptive_parts(content)}
    spent = "; ".join(
        f"{model}: APGD-CE with {b['steps']} steps, EOT of {b['eot']} draws ({b['dear_eot']} for the dear views), "
        f"Square with {b['queries']} queries, {b['seeds']} draws of the defence"
        for model, b in budgets.items()
    )
    return f"{spent}. "


def adaptive_rows(content: dict[str, Any]) -> str:
    """Every attacker of every part, with what each left standing of those before it."""
    lines = [
        "| model, defence, eps | attacker | attack | EOT draws | ran on | accuracy, % [95 % Wilson] | left standing |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    parts = [(f"{m}, {d}, {eps}, n = {part['n']}", part) for m, d, eps, part in _adaptive_parts(content)]
    if rand := content["autoattack_rand_through_ttc"]:
        parts.append((f"demo, ttc, {255 * rand['eps']:.0f}/255, n = {rand['n']}", rand))
    for title, part in parts:
        for index, row in enumerate(part["rows"]):
            cells = [row["attacker"], row["attack"], str(row["eot_draws"]), row["ran_on"], _share(row)]
            cells.append(_share(row, "standing", "standing_interval_95"))
            lines.append(f"| {f'**{title}**' if index == 0 else ''} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _adaptive_budget(content)])
