"""Small real models and images that the tests share."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

import clipdefense
from clipdefense.classifier import ZeroShotClassifier

if "PYTEST_XDIST_WORKER" in os.environ:
    # threads of workers that run side by side spin against each other: the tests then take ten times as long
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

CLASSES = tuple(f"thing {i}" for i in range(10))


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def make_tiny_model(
    classes: int = 10, *, quick_gelu: bool = True, dtype: torch.dtype = torch.float32
) -> ZeroShotClassifier:
    """A real open_clip ViT image tower (2 layers, width 64, 32 px, patch 8) with random but fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        clip = open_clip.model.CLIP(
            embed_dim=32,
            vision_cfg={"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
            text_cfg={"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
            quick_gelu=quick_gelu,
        )
        names = [f"thing {i}" for i in range(classes)]
        anchors = torch.randn(classes, 32)
        # without the direction that all its embeddings share, a random tower's predictions spread over the classes
        with torch.no_grad():
            common = torch.nn.functional.normalize(clip.visual(torch.randn(64, 3, 32, 32)).mean(dim=0), dim=0)
        anchors = anchors - anchors @ common[:, None] * common
    model = ZeroShotClassifier(clip.visual, anchors, class_names=names, image_size=32, logit_scale=100.0)
    return model.to(dtype).eval()


@pytest.fixture
def tiny_model() -> ZeroShotClassifier:
    return make_tiny_model()


@pytest.fixture
def images() -> Tensor:
    """(12, 3, 32, 32) in [0, 1], smooth, with some pixels at the ends of the range."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(12, 3, 8, 8, generator=generator) * 1.4 - 0.2
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").clamp(0, 1)


@pytest.fixture
def labels(tiny_model: ZeroShotClassifier, images: Tensor) -> Tensor:
    """The model's own predictions, so that every image starts out right."""
    with torch.no_grad():
        return tiny_model(images).argmax(dim=1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images and weights named by CLIPDEFENSE_DATA; skips where it is not there."""
    folder = os.environ.get("CLIPDEFENSE_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: set CLIPDEFENSE_DATA to the folder that holds caltech101_64.npz and the others")
    return Path(folder)


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the digits model in it, trained once (half a minute) for all workers of a test run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "digits-cache"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("CLIPDEFENSE_CACHE", str(folder))
        clipdefense.load_model("demo:digits", progress=False)
    return folder


@pytest.fixture
def make_model() -> Callable[..., ZeroShotClassifier]:
    """``make_tiny_model(classes=10, quick_gelu=True, dtype=torch.float32)`` for tests that need another shape of it."""
    return make_tiny_model


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    model.train()
    next(iter(model.children())).eval()
    weights = list(model.parameters())
    weights[0].requires_grad_(False)
    weights[1].grad = torch.ones_like(weights[1])
    random.seed(987)
    np.random.seed(987)  # noqa: NPY002 - the generator that other libraries draw from
    torch.manual_seed(987)

    def state() -> tuple[object, ...]:
        return (
            [part.training for part in model.modules()],
            [weight.requires_grad for weight in weights],
            [None if weight.grad is None else weight.grad.tolist() for weight in weights],
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_rng_state().tolist(),
        )

    before = state()
    yield
    assert state() == before


@pytest.fixture
def untouched() -> Callable[[torch.nn.Module], AbstractContextManager[None]]:
    """``with untouched(model)``: the block may change no mode, ``requires_grad``, ``.grad`` or global generator.

    The model enters in train mode but for its first child, with its first weight frozen and a gradient on its second,
    so that a blanket ``train()``, ``requires_grad_()`` or ``zero_grad()`` shows.
    """
    return _untouched
