"""One training step of every trainer defence: its passes against theory, its time and memory over those passes.

Passes are counted where the tower's blocks begin, so that token passes, frozen copies and recomputed forwards are seen
too. Times and memory are those of the loop's own step; the bare tower's are measured between the steps.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from clipdefense import TrainerDefense, ZeroShotClassifier, get_defense, load_model
from clipdefense.attacks.context import frozen
from clipdefense.training.loop import Loop
from clipdefense_openclip.tower import OpenClipTower
from common import bare_step, make_images, make_model, peak_bytes, seconds_of


class Needs(NamedTuple):
    """What a method asks of a step, in passes of the whole batch."""

    attacks: int  # inner attacks: a forward and a backward to the input for each of their steps
    graphs: int  # forwards with a backward to the weights, whose graphs the loss holds together
    plain: int  # forwards without a gradient


# What they encode besides the attacked images: the original tower's target (FARE); clean images, and the attacked ones
# by the original tower (PMG-AFT); clean images, by the original tower too (TGA); clean images (LAAT); attacked
# negatives, and clean images that get no gradient while alpha is 1 (ANCRA).
NEEDS = {
    "tecoa": Needs(attacks=1, graphs=1, plain=0),
    "fare": Needs(attacks=1, graphs=1, plain=1),
    "pmg-aft": Needs(attacks=1, graphs=2, plain=1),
    "tga-zsr": Needs(attacks=1, graphs=2, plain=1),
    "comp-tga": Needs(attacks=1, graphs=2, plain=1),
    "laat": Needs(attacks=1, graphs=2, plain=0),
    "ancra": Needs(attacks=2, graphs=2, plain=1),
}


def theory(needs: Needs, attack_steps: int, *, low_memory: bool = False) -> dict[str, int]:
    """Passes of the whole batch by kind; with ``low_memory`` every forward of the loss is made twice."""
    counts = {
        "forward": needs.plain,
        "forward, to input": needs.attacks * attack_steps,
        "backward, to input": needs.attacks * attack_steps,
        "forward, to weights": needs.graphs * (2 if low_memory else 1),
        "backward, to weights": needs.graphs,
    }
    return {kind: count for kind, count in counts.items() if count}


class BlockPasses:
    """Images through the blocks of a vision transformer, counted by kind; those of its copies too."""

    def __init__(self, tower: nn.Module) -> None:
        blocks: Any = tower.visual.transformer.resblocks  # type: ignore[union-attr]
        self.images: Counter[str] = Counter()
        # before the first: a recomputed forward ends as soon as all that was saved is there again
        blocks[0].register_forward_pre_hook(self._enter)
        blocks[-1].register_forward_hook(self._leave)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPasses:
        return self  # the hooks of a frozen copy of the model

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images["forward" + self._kind(block)] += len(inputs[0])

    def _leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            kind = "backward" + self._kind(block)
            output.register_hook(lambda gradient: self.images.update({kind: len(gradient)}))

    @staticmethod
    def _kind(block: nn.Module) -> str:
        if not torch.is_grad_enabled():
            return ""
        return ", to weights" if any(weight.requires_grad for weight in block.parameters()) else ", to input"


def make_tower_model(size: str, device: str) -> ZeroShotClassifier:
    torch.manual_seed(0)
    model = make_model("tiny" if size == "smoke" else size, device)
    model.tower = OpenClipTower(model.tower)  # it has tokens
    return model


def make_defense(name: str, model: ZeroShotClassifier) -> TrainerDefense:
    """The method with its own defaults; random embeddings stand for the negated prompts, as they do for the classes."""
    options = {"negative_embeddings": torch.randn_like(model.head.embeddings)} if name == "comp-tga" else {}
    defense = get_defense(name)(model, **options)
    assert isinstance(defense, TrainerDefense)
    return defense


def train(defense: TrainerDefense, x: Tensor, updates: int, **changes: Any) -> None:
    """So many updates, every one on the whole of x."""
    y = torch.arange(len(x), device=x.device) % len(defense.model.class_names)
    quiet = {"measure_every": 0, "show_progress": False, "lr": 1e-6}
    defense.fit(x, y, batch_size=len(x), epochs=updates, max_steps=updates, **quiet, **changes)


def passes_of_a_step(name: str, size: str, device: str, **changes: Any) -> tuple[dict[str, float], int, int]:
    """(passes of the whole batch by kind, images that pass once a fit, steps of the inner attack)."""
    images, n = [], 4
    for updates in (1, 2):
        model = make_tower_model(size, device)
        counter = BlockPasses(model.tower)
        defense = make_defense(name, model)
        train(defense, make_images(model, n), updates, **changes)
        images.append(counter.images)
    per_step = {kind: (images[1][kind] - images[0][kind]) / n for kind in images[1]}
    once = 2 * sum(images[0].values()) - sum(images[1].values())
    return {kind: count for kind, count in per_step.items() if count}, once, defense.threat.steps


@contextmanager
def around_steps(visit: Callable[[Loop, Callable[[], None]], None]) -> Iterator[None]:
    """``visit(loop, step)`` in the place of every step of the loop; it has to call ``step`` once."""
    step = Loop._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", lambda loop, batch: visit(loop, lambda: step(loop, batch)))
        yield


class Bare:
    """The passes on the tower alone, with nothing around them."""

    def __init__(self, model: ZeroShotClassifier, x: Tensor) -> None:
        self.tower = copy.deepcopy(model.tower).eval()
        self.images = model.preprocess(x).detach()

    def forward(self) -> None:
        with torch.no_grad():
            self.tower(self.images)

    def to_input(self) -> None:
        with frozen(self.tower):
            bare_step(self.tower, self.images)

    def to_weights(self, graphs: int = 1) -> None:
        """So many graphs held, and one backward through them all; no gradients are left."""
        torch.stack([self.tower(self.images).sum() for _ in range(graphs)]).sum().backward()
        for weight in self.tower.parameters():
            weight.grad = None


def time_of_a_step(name: str, model: ZeroShotClassifier, x: Tensor, repeats: int, device: str) -> dict[str, float]:
    """Median ms of a step, and of the step over its passes on the bare tower, measured in turns."""
    defense, bare, needs = make_defense(name, model), Bare(model, x), NEEDS[name]
    steps, ratios = [], []

    def visit(loop: Loop, step: Callable[[], None]) -> None:
        forward, to_input, to_weights = (
            seconds_of(function, device)[1] for function in (bare.forward, bare.to_input, bare.to_weights)
        )
        attack = needs.attacks * defense.threat.steps * to_input
        steps.append(seconds_of(step, device)[1])
        ratios.append(steps[-1] / (attack + needs.graphs * to_weights + needs.plain * forward))

    with around_steps(visit):
        train(defense, x, repeats + 1)
    # the first makes the optimiser's state
    return {
        "ms": 1000 * statistics.median(steps[1:]),
        "over the same passes on the bare tower": statistics.median(ratios[1:]),
    }


def memory_of_a_step(name: str, model: ZeroShotClassifier, x: Tensor, device: str) -> dict[str, float]:
    """Peak of a step, over what holding and going back through its graphs takes on the bare tower."""
    bare, peaks = Bare(model, x), {}
    for low_memory in (False, True):
        measured: list[int] = []

        def visit(loop: Loop, step: Callable[[], None], measured: list[int] = measured) -> None:
            for weight in loop.weights:
                weight.grad = None  # as the step does: what it frees is no part of what was there before
            if loop.at.step:
                measured.append(peak_bytes(step, device))
            else:
                step()  # makes the optimiser's state

        with around_steps(visit):
            train(make_defense(name, model), x, 2, low_memory=low_memory)
        peaks[low_memory] = measured[-1]
    one, all_graphs = (peak_bytes(lambda n=n: bare.to_weights(n), device) for n in (1, NEEDS[name].graphs))
    return {
        "images MiB": x.numel() * x.element_size() / 2**20,
        "peak MiB": peaks[False] / 2**20,
        "peak over the loss's graphs": peaks[False] / all_graphs,
        "low_memory, peak MiB": peaks[True] / 2**20,
        "low_memory, peak over one graph": peaks[True] / one,
    }


def test_training_step_passes_time_and_memory(size: str, device: str, record: Callable[..., None]) -> None:
    batch, repeats = {"smoke": (32, 3), "cpu": (16, 5), "full": (128, 10)}[size]
    figures: dict[str, Any] = {"images a batch": batch, "passes": "of the whole batch"}
    for name, needs in NEEDS.items():
        counted, once, steps = passes_of_a_step(name, size, device)
        assert counted == theory(needs, steps), name
        recounted, _, _ = passes_of_a_step(name, size, device, low_memory=True)
        assert recounted == theory(needs, steps, low_memory=True), name
        model = make_tower_model(size, device)
        x = make_images(model, batch)
        figures[name] = {
            "attack steps": needs.attacks * steps,
            "passes": theory(needs, steps),  # as counted
            "images that pass once a fit": once,
            "low_memory, extra forwards": sum(recounted.values()) - sum(counted.values()),
            **time_of_a_step(name, model, x, repeats, device),
            **memory_of_a_step(name, make_tower_model(size, device), x, device),
        }
    record("training", figures)


CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "quick_gelu": True,
}


@contextmanager
def text_passes() -> Iterator[list[int]]:
    """Prompts of each pass of a text tower inside: the one part of a CLIP that looks tokens up."""
    prompts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Embedding):
            prompts.append(len(inputs[0]))

    hook = register_module_forward_pre_hook(count)
    try:
        yield prompts
    finally:
        hook.remove()


def test_the_text_tower_passes_once_a_class_list(device: str, tmp_path: Path, record: Callable[..., None]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    save_file(open_clip.CLIP(**CLIP).state_dict(), tmp_path / "tiny.safetensors")
    names, figures = [f"thing {number}" for number in range(10)], {}
    for name in NEEDS:
        with text_passes() as prompts:
            model = load_model(f"open_clip:{tmp_path / 'tiny.json'}@{tmp_path / 'tiny.safetensors'}", names)
            defense = get_defense(name)(model)
            train(defense, make_images(model, 8).to(device), 2, device=device)
            model.with_classes(names)
        lists = 2 if name == "comp-tga" else 1  # the negated prompts are a list of their own
        assert prompts == [len(names)] * lists, name
        figures[name] = {"class lists": lists, "text-tower passes": len(prompts), "prompts": sum(prompts)}
    record("training_text", figures)
