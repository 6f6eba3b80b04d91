"""Adaptive evaluation: everything that knows the defence is tried, and no transfer number stands alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks import AttackWarning, Status
from clipdefense.attacks.adaptive import Adaptive, EmbeddingTarget, passes
from clipdefense.attacks.context import predict
from clipdefense.cli import main
from clipdefense.evaluation import report
from clipdefense.evaluation.cost import spell
from clipdefense.evaluation.results import Evaluation
from clipdefense.randomness import uniform

THREAT = cd.ThreatModel("linf", 2 / 255, steps=3)
SUITE = Adaptive(eot_draws=(1, 3), black_box="square,queries=6", black_box_draws=2)


class Shuffle(cd.InputDefense):
    """Noise, with a view of it."""

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return (x + noise).clamp(0, 1) - x

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed) - 0.5) * 0.1

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("eot", lambda x, ids, seed: self.bpda(model, x, ids, seed), eot=2),)


class Blind(Shuffle):
    """The same, keeping its views to itself."""

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return ()


class Steps(nn.Module):
    """A model that rounds its input: no gradient in its forward, and a view that says where it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 255).round() / 255)

    def adaptive(self) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("unrounded", lambda x, ids, seed: self.model(x)),)


class Nothing(cd.TestTimeDefense):
    """What it deploys is chosen by a test."""

    deployed: Callable[[nn.Module], nn.Module] = staticmethod(lambda model: model)

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.deployed(model)

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("plain", lambda x, ids, seed: model(x)),)


@pytest.fixture
def run(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> Callable[..., Evaluation]:
    """``run(defense=..., **options)``: a small adaptive evaluation of six images."""

    def evaluate(model: nn.Module = tiny_model, **options: Any) -> Evaluation:
        settings: dict[str, Any] = {"attacks": ["pgd"], "adaptive": SUITE, **options}
        return cd.evaluate(model, images[:6], labels[:6], settings.pop("threat", THREAT), **settings)

    return evaluate


def page_of(result: Evaluation, tmp_path: Path) -> str:
    report.write_html(tmp_path / "page.html", report.Page("title", [], [result]))
    return (tmp_path / "page.html").read_text()


def table_of(result: Evaluation) -> list[list[str]]:
    """The cells of the table, and what stands under it as one last row."""
    console = Console(width=200, file=io.StringIO(), no_color=True)
    console.print(report.table([result]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    return [*rows, [" ".join(line.strip() for line in lines if line[:1] not in "│┏┃┡└├" and line.strip())]]


def test_everything_that_knows_the_defence_is_tried(run: Callable[..., Evaluation]) -> None:
    result = run(defense=Shuffle())
    assert [(row.attack, row.attacked, row.kind, row.draws) for row in result.rows] == [
        ("pgd", "transfer from the undefended model", "transfer", 1),
        ("pgd", "adaptive view eot, 2 EOT draws", "view", 2),
        ("pgd", "defended model, straight-through gradient (BPDA)", "own gradient", 1),
        ("pgd", "defended model, straight-through gradient (BPDA), 3 EOT draws", "own gradient", 3),
        ("pgd,objective=drift", "transfer from the undefended model", "transfer", 1),
        ("pgd,objective=drift", "embedding through view eot, 2 EOT draws", "embedding", 2),
        ("square,queries=6", "defended model, outputs alone, 2 EOT draws", "black box", 2),
    ]
    assert all(row.correct.shape == (5, 6) for row in (result.clean, *result.rows))
    assert result.adaptive and not result.left_out and not result.caveat
    survived = np.concatenate([row.correct for row in (result.clean, *result.rows)]).all(axis=0)
    assert result.worst_case().correct[0].tolist() == survived.tolist()
    transfer, adaptive = result.compared()
    parts = (0, 4), (1, 2, 3, 5, 6)
    for row, indices in zip((transfer, adaptive), parts):
        those = [result.clean.correct, *(result.rows[i].correct for i in indices)]
        assert row.correct[0].tolist() == np.concatenate(those).all(axis=0).tolist()
    assert [draws for draws, _ in result.convergence()] == [1, 3]


def test_transfer_and_adaptive_stand_side_by_side(run: Callable[..., Evaluation], tmp_path: Path) -> None:
    result = run(defense=Shuffle())
    names = ["worst case, transfer", "worst case, adaptive", "worst case per image"]
    *rows, _ = table_of(result)
    assert [row[1] for row in rows[-3:]] == names
    read = json.loads(json.dumps(result.to_dict()))
    assert [read["transfer_worst_case"]["attack"], read["adaptive_worst_case"]["attack"]] == names[:2]
    keys = list(read)
    assert keys.index("adaptive_worst_case") == keys.index("transfer_worst_case") + 1
    assert [entry["draws"] for entry in read["eot_convergence"]] == [1, 3]
    for entry, (_, row) in zip(read["eot_convergence"], result.convergence()):
        assert entry["accuracy"] == row.accuracy and entry["interval_95"] == list(row.interval)
    page = page_of(result, tmp_path)
    assert page.index(names[0]) < page.index(names[1]) < page.index(names[2])


def test_without_views_every_number_says_transfer_only(run: Callable[..., Evaluation], tmp_path: Path) -> None:
    for adaptive in (SUITE, False):
        result = run(defense=Blind(), adaptive=adaptive)
        assert not result.adaptive and {row.kind for row in result.rows} == {"transfer"} and not result.compared()
        read = result.to_dict()
        robust = [*read["attacks"], read["transfer_worst_case"], read["worst_case"]]
        assert [entry["caveat"] for entry in robust] == ["transfer only"] * len(robust)
        assert read["caveat"] == "transfer only" and read["clean"]["caveat"] == ""
        assert read["adaptive_worst_case"] is None
        _, *rows, under = table_of(result)
        assert rows and all("(transfer only)" in row[1] + row[2] for row in rows)
        assert "no attacker who knows the defence" in under[0]
        page = page_of(result, tmp_path)
        assert page.count("(transfer only)") == len(rows) and "no attacker who knows the defence" in page
    assert run(defense=Blind()).left_out == ("every adaptive attack: the defence has no views",)


def test_each_number_of_eot_draws_costs_so_many_passes(
    run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counted(self: Shuffle, x: Tensor, *, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        counts.append(len(x) if torch.is_grad_enabled() else 0)
        return original(self, x, ids=ids, seed=seed)

    original = cd.InputDefense.defend
    monkeypatch.setattr(Shuffle, "defend", counted)
    few = run(defense=Shuffle(), adaptive=Adaptive(eot_draws=(1,), black_box="square,queries=1"))
    spent = sum(counts)
    counts.clear()
    run(defense=Shuffle(), adaptive=Adaptive(eot_draws=(1, 4), black_box="square,queries=1"))
    attacked = int(few.clean.correct.any(axis=0).sum())
    assert sum(counts) - spent == 4 * THREAT.steps * attacked


def test_the_label_free_attack_goes_for_embeddings(
    run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    result = run(defense=Nothing(), keep_adversarial=True)
    transferred, through = (row for row in result.rows if "drift" in row.attack)
    expected = cd.attacks.pgd(tiny_model, images[:6], labels[:6], THREAT, objective="drift", early_stop=False)
    for row in (transferred, through):  # the view is the model, and so is its embedding
        assert row.adversarial is not None and torch.equal(row.adversarial, expected)

    class Dimmed(Shuffle):
        def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
            return (cd.AttackView("dim", lambda x, ids, seed: model(x * 0.7)),)

    (row,) = (row for row in run(defense=Dimmed(), keep_adversarial=True).rows if row.kind == "embedding")

    class Dim(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tiny_model.embed(x * 0.7)

    kept = torch.from_numpy(row.correct.any(axis=0))
    expected = cd.attacks.pgd(EmbeddingTarget(Dim()), images[:6], labels[:6], THREAT, objective="drift")
    assert row.adversarial is not None and torch.equal(row.adversarial[kept], expected[kept])


def test_a_defence_that_takes_no_bare_encoder_says_so(run: Callable[..., Evaluation]) -> None:
    class Picky(Shuffle):
        def adaptive(self, model: Any) -> tuple[cd.AttackView, ...]:
            scale = float(model.head.scale)
            return (cd.AttackView("eot", lambda x, ids, seed: scale / 100 * self.bpda(model, x, ids, seed)),)

    result = run(defense=Picky())
    assert result.adaptive and not any(row.kind == "embedding" for row in result.rows)
    (reason,) = result.left_out
    assert "it takes no bare encoder" in reason and "'Embedder' object has no attribute 'head'" in reason
    assert reason in table_of(result)[-1][0] and result.to_dict()["left_out"] == [reason]


class TestModelsThatKnowHowTheyAreAttacked:
    def test_views_of_the_model_itself(self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier) -> None:
        with pytest.warns(AttackWarning, match="exactly zero on"):
            result = run(Steps(tiny_model), adaptive=False, threat=cd.ThreatModel("linf", 8 / 255, steps=8))
        itself, view = result.rows
        assert (itself.attacked, view.attacked) == ("the model itself", "adaptive view unrounded")
        assert (itself.kind, view.kind) == ("itself", "view") and result.adaptive
        assert itself.accuracy > 0.5 and view.accuracy == 0.0
        assert [row.attack for row in result.compared()] == ["worst case, the model itself", "worst case, adaptive"]
        assert result.worst_case().accuracy == 0.0

    def test_all_of_the_suite(self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier) -> None:
        with pytest.warns(AttackWarning):
            result = run(Steps(tiny_model))
        assert [row.kind for row in result.rows] == ["itself", "view", "black box"]
        assert result.left_out == ("the label-free attack: Steps has no embed(images)",)

    def test_leaving_its_views_out_is_said(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        with pytest.warns(AttackWarning):
            result = run(Steps(tiny_model), adaptive=False, views=[])
        assert result.caveat == "no adaptive views" and "(no adaptive views)" in result.worst_case().attack
        with pytest.raises(cd.UsageError, match="view 'rounded' is unknown; did you mean 'unrounded'"):
            run(Steps(tiny_model), views=["rounded"])

    def test_a_model_without_any(self, run: Callable[..., Evaluation]) -> None:
        result = run()
        assert [row.kind for row in result.rows] == ["itself", "itself", "black box"]
        assert result.adaptive and not result.caveat

    def test_reverse_attention(self, images: Tensor) -> None:
        from clipdefense_ancra.resnet import RAClassifier

        network = RAClassifier([f"thing {i}" for i in range(4)], width=4).eval()
        y = predict(network, images[:3]).argmax(dim=1)
        heads = ["final", "aux0", "aux1", "sum", "soft", "straight-through"]
        for defense in (None, cd.get_defense("reverse-attention")(network)):
            result = cd.evaluate(network, images[:3], y, THREAT, attacks=["pgd,steps=1"], defense=defense)
            assert [row.attacked for row in result.rows] == [
                "the model itself",
                *(f"adaptive view {head}" for head in heads),
            ]
            assert result.adaptive and [row.kind for row in result.rows][:2] == ["itself", "view"]


class TestWhatIsDeployed:
    def test_the_model_itself_is_not_called_transfer(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        same = run(defense=Nothing(), adaptive=False)
        assert same.rows[0].attacked == "the model itself" and same.rows[0].kind == "itself"

    def test_nor_is_a_module_that_says_the_same(
        self, run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Nothing, "deployed", staticmethod(lambda model: nn.Sequential(model)))
        assert run(defense=Nothing(), adaptive=False).rows[0].attacked == "the model itself"

    def test_one_that_acts_on_attacked_images_alone_is_a_defence(
        self, run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch, images: Tensor
    ) -> None:
        class Detector(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                known = torch.stack([(x == clean).flatten(1).all(dim=1) for clean in images]).any(dim=0)
                logits: Tensor = self.model(x)
                return torch.where(known[:, None], logits, -logits)

        monkeypatch.setattr(Nothing, "deployed", staticmethod(Detector))
        row = run(defense=Nothing(), adaptive=False).rows[0]
        assert row.attacked == "transfer from the undefended model" and row.kind == "transfer"


class TestAutoAttackThroughViews:
    def test_rand_completes(self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier) -> None:
        short = {name: {"steps": 1} for name in ("apgd-ce", "apgd-dlr")}
        spec = cd.evaluation.AttackSpec("autoattack", (("version", "rand"), ("stages", short)))
        ttc = cd.get_defense("ttc")(tiny_model)
        result = run(attacks=[spec], defense=ttc, eot=2, adaptive=False)
        names = [view.name for view in ttc.adaptive(tiny_model)]
        assert [row.attacked for row in result.rows[1:]] == [f"adaptive view {name}, 2 EOT draws" for name in names]
        assert all(row.correct.shape == (5, 6) for row in result.rows)

    def test_the_deployed_model_says_what_is_broken(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        """A view that calls every image wrong would have the ensemble attack none, or hand each back as it came."""

        class Pessimist(Nothing):
            def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
                return (cd.AttackView("wrong", lambda x, ids, seed: shifted(model(x))),)

        def shifted(logits: Tensor) -> Tensor:
            """Another class on top, whatever the image: the gradient leads towards the second of the real ones."""
            constant = logits.detach().amax(dim=1, keepdim=True) + 1
            return torch.cat([logits, constant], dim=1)

        stages = {"square": {"queries": 1}, "fab-t": {"steps": 1}, "apgd-t": {"steps": 1}, "apgd-ce": {"steps": 20}}
        spec = cd.evaluation.AttackSpec("autoattack", (("stages", stages),))
        big = cd.ThreatModel("linf", 16 / 255)
        result = run(attacks=[spec], defense=Pessimist(), adaptive=False, threat=big, keep_adversarial=True)
        view = result.rows[1]
        assert view.kind == "view" and view.accuracy == 0.0

    def test_standard_on_a_randomised_defence_stops_at_once(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        with pytest.raises(cd.UsageError, match=r"declared randomised; write autoattack,version=rand"):
            run(attacks=["autoattack"], defense=Shuffle())
        run(attacks=["autoattack,version=rand", "pgd"], defense=Blind(), adaptive=False, views=[])


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attacks": ["pgd,steps=0"]}, r"'pgd,steps=0' has steps = 0: it would change no image"),
            ({"attacks": ["apgd-ce,steps=0"]}, r"'apgd-ce,steps=0' has steps = 0"),
            ({"attacks": ["square,queries=0"]}, r"'square,queries=0' has queries = 0"),
            ({"threat": cd.ThreatModel("linf", 2 / 255, steps=0)}, r"'pgd' has steps = 0"),
            ({"defense": Shuffle(), "verdict_seeds": 4}, r"verdict_seeds is 4; .* over at least 5"),
            ({"defense": Shuffle(), "attacks": ["square,queries=3"]}, "none of which follows a view's gradient"),
            ({"adaptive": Adaptive(black_box="sqare")}, "attack 'sqare' is unknown; did you mean 'square'"),
        ],
    )
    def test_stop_before_any_attack(self, change: dict[str, Any], message: str, run: Callable[..., Evaluation]) -> None:
        with pytest.raises(cd.UsageError, match=message):
            run(**change)

    def test_an_attack_with_steps_of_its_own_needs_none_of_the_threat_model(
        self, run: Callable[..., Evaluation]
    ) -> None:
        none = cd.ThreatModel("linf", 2 / 255, steps=0)
        assert run(attacks=["apgd-ce,steps=2", "square,queries=2"], threat=none, adaptive=False).rows[0].accuracy < 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eot_draws": ()}, r"eot_draws is \(\); rising whole numbers from 1 on"),
            ({"eot_draws": (4, 1)}, "rising whole numbers"),
            ({"eot_draws": (0, 1)}, "rising whole numbers"),
            ({"black_box_draws": 0}, "black_box_draws is 0; a whole number of at least 1"),
            ({"verdict_seeds": 2.5}, r"verdict_seeds is 2\.5"),
        ],
    )
    def test_of_the_suite(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(cd.UsageError, match=message):
            Adaptive(**options)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.arange(6).float(), r"ids has dtype torch.float32; a tensor of whole numbers, one an image"),
            (torch.tensor([0, 1, 2, 7, 4, 7]), "ids contains 7 more than once; ids name the images"),
            (torch.arange(5), r"ids has shape \(5,\); one whole number an image, \(6,\)"),
            (torch.arange(6) - 2, "ids contains -2; whole numbers of at least 0"),
            ([0, 1, 2, 3, 4, 5], "ids has type list"),
        ],
    )
    def test_of_ids(self, ids: Any, message: str, tiny_model: nn.Module, images: Tensor, labels: Tensor) -> None:
        with pytest.raises(cd.UsageError, match=message):
            cd.evaluate(tiny_model, images[:6], labels[:6], THREAT, ids=ids)
        with pytest.raises(cd.UsageError, match=message):
            cd.attacks.pgd(tiny_model, images[:6], labels[:6], THREAT, ids=ids)


def test_the_fingerprint_holds_the_whole_budget(run: Callable[..., Evaluation]) -> None:
    facts = run(defense=Shuffle()).fingerprint
    assert json.loads(json.dumps(facts))["threat"] == {
        "norm": "linf",
        "eps": 2 / 255,
        "step_size": None,
        "steps": 3,
        "restarts": 1,
        "alpha": THREAT.alpha,
    }
    assert facts["adaptive"]["eot_draws"] == (1, 3) and facts["adaptive"]["black_box"] == "square,queries=6"
    assert run(adaptive=False).fingerprint["adaptive"] is None


class TestTime:
    def test_every_attack_is_told_from_its_start_to_its_end(self, run: Callable[..., Evaluation]) -> None:
        told: list[Status] = []
        text: list[str] = []
        result = run(defense=Shuffle(), watch=told.append, progress=text.append, name="noise")
        estimate, *begun = text
        assert estimate.startswith("noise: about ") and "for 7 attacks on 6 images; slowest: " in estimate
        assert begun == [f"noise: {row.attack} on {row.attacked}" for row in result.rows]
        for row in result.rows:
            steps = [status for status in told if status.stage == f"{row.attack} on {row.attacked}"]
            done = [status.done for status in steps]
            assert done[0] == 0 and done[-1] == steps[-1].total and done == sorted(done), row.attacked
            assert all(0 <= status.done <= status.total for status in steps)
            if row.kind in ("view", "own gradient"):  # no image leaves before the end, and still it moves
                assert any(0 < value < steps[-1].total for value in done), row.attacked
                assert all(status.seconds_left >= 0 for status in steps)

    def test_what_cannot_be_counted_is_named(self, run: Callable[..., Evaluation]) -> None:
        text: list[str] = []
        run(
            attacks=["art:FastGradientMethod", "pgd,steps=1"],
            defense=Shuffle(),
            adaptive=False,
            watch=lambda status: None,
            progress=text.append,
        )
        assert text[0].endswith("not counted: art:FastGradientMethod")

    def test_passes_of_an_attack(self) -> None:
        twice = cd.ThreatModel("linf", 1 / 255, steps=7, restarts=2)
        counted = {
            ("pgd", ()): 14,
            ("apgd-ce", ()): 101,
            ("apgd-t", (("steps", 5), ("targets", 2))): 12,
            ("apgd-t", ()): 303,
            ("square", (("queries", 9),)): 9,
            ("autoattack", (("version", "rand"),)): 202,
            ("art:DeepFool", ()): None,
        }
        for (name, options), count in counted.items():
            assert passes(name, twice, dict(options), classes=4) == count, name
        assert [spell(seconds) for seconds in (0.2, 42, 130, 5399, 9000)] == ["1 s", "42 s", "2 min", "90 min", "2.5 h"]


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    save_file(open_clip.model.CLIP(**config).state_dict(), tmp_path / "tiny.safetensors")
    x = np.random.default_rng(0).random((4, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "few.npz", x=x, y=np.arange(4) % 2, classes=np.array(["cat", "dog"]))
    model = f"open_clip:{tmp_path / 'tiny.json'}@{tmp_path / 'tiny.safetensors'}"
    command = ["evaluate", "-m", model, "-d", f"arrays:{tmp_path / 'few.npz'}", "--device", "cpu", "--defense", "tte"]
    command += ["--adaptive", "-a", "pgd,steps=1", "-a", "square,queries=2", "--eot", "1", "-o", "crops=1"]

    def call(*extra: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipdefense", *command, *extra])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as leave:
            main()
        return int(str(leave.value.code)), *capsys.readouterr()

    code, out, err = call("--out", str(tmp_path / "result.json"))
    assert code == 0, err
    assert "worst case, transfer" in out and "worst case, adaptive" in out
    assert "tte: about " in err and "on defended model, its own gradient, 16 EOT draws" in err
    result = json.loads((tmp_path / "result.json").read_text())
    assert [entry["draws"] for entry in result["eot_convergence"]] == [1, 4, 16]
    assert {row["attack"] for row in result["attacks"]} == {"pgd,steps=1", "square,queries=2", "pgd,objective=drift"}
    assert call("--quiet")[2] == ""
    code, out, err = call("--verdict-seeds", "2")
    assert code == 2 and out == "" and err.startswith("error: ") and "at least 5" in err
