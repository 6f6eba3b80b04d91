"""Training the small CLIP: image and text tower jointly, from nothing, on the digits' training part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from clipdefense.classifier import CLIP_MEAN, CLIP_STD
from clipdefense_demo.digits import CLASSES, IMAGE_SIZE, load_digits_images

TEMPLATES = ("a photo of the digit {}.", "a handwritten {}.", "the number {}.")
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; chosen on the validation images.

    Attributes:
        epochs, batch_size, lr, warmup_epochs, weight_decay, max_grad_norm: of AdamW under a cosine schedule.
        degrees, shift, zoom: augmentation: largest rotation, shift (share of the image's side) and change of size.
        logit_scale: at the start; it is learned, up to 100.
        token_std: of the token embeddings, which stay as they are drawn.
        seed: of weights, order and augmentation.
    """

    epochs: int = 60
    batch_size: int = 64
    lr: float = 1e-3
    warmup_epochs: int = 2
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    degrees: float = 8.0
    shift: float = 0.05
    zoom: float = 0.1
    logit_scale: float = 10.0
    token_std: float = 0.3
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What a cached model must agree in, JSON-ready."""
        return {"recipe": asdict(self), "config": open_clip_config(), "templates": list(TEMPLATES)}


def open_clip_config() -> dict[str, Any]:
    """The model in the form of open_clip's ``open_clip_config.json``.

    A narrow text tower, because the vocabulary of open_clip's tokenizer (49,408 tokens) takes 0.2 MB a unit of width:
    at 64 it is 12.6 of the file's 13.5 MB.
    """
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                "layers": 2,
                "width": 64,
                "head_width": 32,
            },
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 2},
        },
        "preprocess_cfg": {
            "size": IMAGE_SIZE,
            "mode": "RGB",
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def build(recipe: Recipe) -> CLIP:
    """The open_clip model before training; draws from torch's global generator."""
    clip = CLIP(**open_clip_config()["model_cfg"], init_logit_scale=math.log(recipe.logit_scale))
    # With open_clip's 0.02, prompts that differ in one word start out nearly alike and take long to part. Frozen,
    # because training meets a few dozen of the 49,408 rows, and an optimiser step on all would double the time.
    nn.init.normal_(clip.token_embedding.weight, std=recipe.token_std)
    clip.token_embedding.weight.requires_grad_(False)
    return clip


def train(recipe: Recipe, *, progress: bool = True) -> CLIP:
    """Train on the digits' training part: cross-entropy from images to the classes' prompt ensembles.

    On one thread: the same recipe then gives the same weights on one machine, and batches this small gain next to
    nothing from a second one, but lose much where other processes keep the cores busy. The caller's random generators
    and number of threads are left as they were.

    Args:
        recipe: hyper-parameters.
        progress: show a bar on stderr.

    Returns:
        The open_clip model, in eval mode, on the CPU.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), _one_thread():
        torch.manual_seed(recipe.seed)
        clip = build(recipe).train()
        images, labels = load_digits_images("train")
        prompts = _prompts()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        optimizer = _optimizer(clip, recipe)
        updates = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
        warmup = max(1, updates * recipe.warmup_epochs // recipe.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, warmup, updates))
        with _bar(progress) as bar:
            task = bar.add_task("training the digits CLIP, once", total=updates, loss="")
            for rows in _batches(len(images), recipe):
                x = (_augment(images[rows], recipe) - mean) / std
                similarities = F.normalize(clip.encode_image(x), dim=1) @ _class_embeddings(clip, prompts).T
                loss = F.cross_entropy(clip.logit_scale.exp() * similarities, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(clip.parameters(), recipe.max_grad_norm)
                optimizer.step()
                schedule.step()
                clip.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
                bar.update(task, advance=1, loss=f"loss {loss.item():.3f}")
    return clip.eval().requires_grad_(False)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar(show: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def _prompts() -> Tensor:
    """Token numbers of every prompt, (templates * classes, context length)."""
    context: int = open_clip_config()["model_cfg"]["text_cfg"]["context_length"]
    texts = [template.format(name) for template in TEMPLATES for name in CLASSES]
    return open_clip.SimpleTokenizer(context_length=context)(texts)


def _class_embeddings(clip: CLIP, prompts: Tensor) -> Tensor:
    """(C, D) unit embeddings, each the normalised mean over the templates' normalised ones."""
    each = F.normalize(clip.encode_text(prompts), dim=1).unflatten(0, (len(TEMPLATES), len(CLASSES)))
    return F.normalize(each.mean(dim=0), dim=1)


def _optimizer(clip: CLIP, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; gains, biases and the logit scale do not decay."""
    weights = [weight for weight in clip.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _learning_rate(step: int, warmup: int, updates: int) -> float:
    """Share of the peak: linear warm-up under a cosine to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / updates))


def _batches(n: int, recipe: Recipe) -> Iterator[Tensor]:
    for _ in range(recipe.epochs):
        yield from torch.randperm(n).split(recipe.batch_size)


def _augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Each image turned, shifted and zoomed by its own random amount; black comes in at the border."""
    n = len(images)
    angle, zoom, across, down = (torch.rand(4, n) * 2 - 1) * torch.tensor(
        [[math.radians(recipe.degrees)], [recipe.zoom], [2 * recipe.shift], [2 * recipe.shift]]
    )
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    rows = [torch.stack([cos, -sin, across], dim=1), torch.stack([sin, cos, down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="zeros")
