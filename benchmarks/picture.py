"""The README's picture: what stands of the demo's three models, as an SVG of a few lines that no library decides."""

from __future__ import annotations

from typing import Any

BARS = (
    ("clean", "#4c72b0", "clean images"),
    ("transfer", "#dd8452", "attacker does not know the defence"),
    ("adaptive", "#c44e52", "attacker knows it"),
)
LEFT, TOP, BAR, GAP, FULL = 150, 44, 16, 14, 400


def shares(evaluation: dict[str, Any]) -> dict[str, float]:
    """Accuracy on clean images, and the least over the attacks of each kind; a bare model has one kind of attacker."""
    found = {"clean": evaluation["clean"]["accuracy"]}
    for row in evaluation["attacks"]:
        kind = "transfer" if row["attacked"].startswith("transfer") else "adaptive"
        found[kind] = min(found.get(kind, 1.0), row["accuracy"])
    return found


def picture(content: dict[str, Any]) -> str:
    """The SVG of a result with ``evaluations``."""
    lines, y = [], TOP
    for evaluation in content["evaluations"]:
        kept = shares(evaluation)
        middle = y + (BAR * len(kept)) / 2 + 5
        lines.append(f'<text x="{LEFT - 10}" y="{middle:g}" text-anchor="end">{evaluation["name"]}</text>')
        for kind, colour, _ in BARS:
            if kind in kept:
                width = max(FULL * kept[kind], 1)
                lines.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{colour}"/>')
                lines.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 12}">{100 * kept[kind]:.0f} %</text>')
                y += BAR
        y += GAP
    x = LEFT
    for _, colour, label in BARS:
        lines.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="23">{label}</text>')
        x += 45 + 6 * len(label)
    eps = round(255 * content["evaluations"][0]["eps"])
    n = content["evaluations"][0]["clean"]["n"]
    below = f"share of {n} handwritten digits classified right; every pixel may change by {eps}/255"
    lines.append(f'<text x="{LEFT}" y="{y + 8}" fill="#666">{below}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="660" height="{y + 20}" viewBox="0 0 660 {y + 20}"'
    style = 'font-family="sans-serif" font-size="13" fill="#333"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f"{head} {style}>", ground, *lines, "</svg>"]) + "\n"
