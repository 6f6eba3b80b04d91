"""``demo:digits``: a small CLIP for handwritten digits, trained when it is first needed, then read from the cache."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors import SafetensorError, safe_open

from clipdefense.checks import check_class_names
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.data import CACHE_VARIABLE, cache_folder
from clipdefense.errors import UsageError, unknown_name
from clipdefense.files import write_text
from clipdefense.weights import load_strictly, read_state_dict, write_tensors
from clipdefense_demo.digits import CLASSES
from clipdefense_demo.pretraining import TEMPLATES, Recipe, build, open_clip_config, train
from clipdefense_openclip import loader
from clipdefense_openclip.text import check_templates

SOURCE = "demo:digits"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedModel:
    """The files of the trained model: a folder that open_clip reads too, as ``local-dir:<folder>``.

    Attributes:
        folder: holds the configuration and the weights, 13.5 MB together.
    """

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "open_clip_config.json"

    @property
    def weights(self) -> Path:
        return self.folder / "open_clip_model.safetensors"

    def problem(self, recipe: Recipe) -> str:
        """Why the files cannot be used for this recipe; empty when they can."""
        try:
            with safe_open(self.weights, "pt") as file:
                stored = json.loads((file.metadata() or {}).get("identity", "null"))
            if stored != recipe.identity():
                return "was not made by this recipe"
            with torch.random.fork_rng(devices=[]):
                load_strictly(build(recipe), read_state_dict(self.weights), "it")
            if json.loads(self.config.read_text(encoding="utf-8")) != open_clip_config():
                return f"lies beside a changed {self.config.name}"
        except (SafetensorError, UsageError, OSError, ValueError) as error:
            return f"cannot be read ({type(error).__name__}: {error})"
        return ""

    def write(self, clip: CLIP, recipe: Recipe) -> None:
        """Both files, each whole or not at all.

        Raises:
            OSError: the folder cannot be written to.
        """
        text = json.dumps(open_clip_config(), indent=2) + "\n"
        write_text(self.config, text)
        write_tensors(self.weights, clip.state_dict(), {"identity": json.dumps(recipe.identity())})


def cached_model() -> CachedModel:
    """Where the model is kept: ``digits-clip`` in :func:`clipdefense.data.cache_folder`."""
    return CachedModel(cache_folder("digits-clip"))


def digits_clip(
    classes: Sequence[str] | None = None,
    progress: bool = True,
    *,
    templates: Sequence[str] = TEMPLATES,
    device: str | torch.device = "cpu",
    recipe: Recipe | None = None,
) -> ZeroShotClassifier:
    """A CLIP (open_clip ViT image tower and text tower, 2 layers each, 32 px) for the handwritten digits.

    Trained on first use, about half a minute on a CPU, and kept in :func:`cached_model` (13.5 MB). A cached file that
    is damaged, or of another recipe, is replaced, saying so in the log. Where the cache cannot be written, the model
    is trained for this process alone, saying so too.

    Args:
        classes: class names; None is ``"zero"`` to ``"nine"``, the only ones it was trained on.
        progress: show a bar on stderr while training.
        templates: prompts with ``{}`` for the class name; the default is the ensemble of training.
        device: where the model goes; it is trained on the CPU.
        recipe: training hyper-parameters; None is the default.

    Returns:
        The classifier in eval mode, its ``source`` ``"demo:digits"``.

    Raises:
        UsageError: class names or templates that cannot be used.
    """
    names = check_class_names(CLASSES if classes is None else classes)
    options: dict[str, Any] = {"classes": names, "templates": check_templates(templates), "device": device}
    recipe, files = Recipe() if recipe is None else recipe, cached_model()
    if problem := files.problem(recipe):
        if files.weights.exists():
            _log.warning("cached model %s %s; it is trained afresh.", files.weights, problem)
        clip = train(recipe, progress=progress)
        try:
            files.write(clip, recipe)
        except OSError as error:
            _log.warning(
                "the trained model cannot be kept in %s (%s), so it will be trained again next time; name a folder "
                "that can be written to in %s.",
                files.folder,
                error.strerror or error,
                CACHE_VARIABLE,
            )
            with tempfile.TemporaryDirectory() as spare:
                files = CachedModel(Path(spare))
                files.write(clip, recipe)
                return _read(files, options)
    return _read(files, options)


def _read(files: CachedModel, options: dict[str, Any]) -> ZeroShotClassifier:
    model = loader.load(str(files.config), str(files.weights), **options)
    model.source = SOURCE
    return model


def load(
    name: str,
    weights: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> ZeroShotClassifier:
    """``demo:digits``; arguments as :func:`digits_clip`.

    Raises:
        UsageError: another name, or weights, of which it has its own.
    """
    if name != "digits":
        raise unknown_name("demo model", name, ["digits"])
    if weights is not None:
        raise UsageError(f"weights is {weights!r}, but demo:digits has its own; leave @{weights} away.")
    return digits_clip(classes, progress, templates=templates, device=device)
