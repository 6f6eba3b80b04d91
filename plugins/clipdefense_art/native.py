"""The native attacks as an ART evasion attack."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from clipdefense.attacks import foreign
from clipdefense.checks import check_labels
from clipdefense.defenses import TestTimeDefense, Traits
from clipdefense.errors import UsageError, check_known
from clipdefense.threat import ThreatModel


class EstimatorModule(nn.Module):
    """What an ART estimator predicts, as a module: its preprocessing defences, then its model.

    Gradients go through each defence's ``forward`` (the straight-through one of a defence that is not
    differentiable). Postprocessing defences are left out, as ART's own gradients leave them out.
    """

    def __init__(self, estimator: PyTorchClassifier) -> None:
        super().__init__()
        self.model = estimator.model
        self.operations = [step for step in estimator.preprocessing_operations if step.apply_predict]
        for step in self.operations:
            if not isinstance(step, PreprocessorPyTorch):
                raise UsageError(
                    f"the estimator's preprocessing {type(step).__name__} works on NumPy arrays, through which no "
                    "gradient passes; use a PreprocessorPyTorch, such as a clipdefense.InputDefense."
                )
        declared = [step.traits for step in self.operations if isinstance(step, TestTimeDefense)]
        self.traits = Traits(randomized=any(traits.randomized for traits in declared))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, nb_classes) logits."""
        for step in self.operations:
            x, _ = step.forward(x, None)
        return self.model(x)


class NativeAttack(EvasionAttack):
    """Any attack registered here, for everything in ART that takes an ``EvasionAttack``.

    It attacks what the estimator predicts, preprocessing defences included, and leaves the model's modes and
    gradients as they were, so that it works inside ``AdversarialTrainer`` and among ``AutoAttack(attacks=[...])``.

    Attributes:
        attack: the registered name.
        threat: the attacker's budget.
        seed: of the draws: the same at every :meth:`generate`; None takes a new one from torch's global generator
            each time, as adversarial training wants.
        batch_size: images a forward.
        options: keyword arguments of the attack.
    """

    attack_params: ClassVar[list[str]] = [
        *EvasionAttack.attack_params,
        "attack",
        "threat",
        "seed",
        "batch_size",
        "options",
    ]
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: PyTorchClassifier,
        attack: str = "pgd",
        *,
        threat: ThreatModel,
        seed: int | None = 0,
        batch_size: int = 128,
        **options: Any,
    ) -> None:
        """
        Args:
            estimator: a ``clipdefense.CLIPClassifier`` or any PyTorchClassifier on pixels in [0, 1].
            attack: as `clipdefense plugins` lists it: ``"pgd"``, ``"apgd-ce"``, ...
            threat: norm, eps, step size, steps and restarts.
            seed, batch_size: see the class.
            options: of the attack, such as ``objective="margin"``.

        Raises:
            UsageError: an unknown attack or option, or an estimator whose pixels are not in [0, 1].
            EstimatorError: not a PyTorchClassifier.
        """
        super().__init__(estimator=estimator)
        clip = estimator.clip_values
        if clip is not None and not np.array_equal(np.broadcast_to(clip, (2,)), (0, 1)):
            raise UsageError(
                f"the estimator's clip_values are {tuple(clip)}; the attack needs pixels in [0, 1], (0, 1)."
            )
        self.attack, self.threat, self.seed, self.batch_size = attack, threat, seed, batch_size
        self.options = options
        self._check_params()

    def _check_params(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise UsageError(f"threat is {self.threat!r}; a clipdefense.ThreatModel is expected.")
        foreign.native_attack(self.attack, self.options)

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Adversarial images.

        Args:
            x: (N, C, H, W) float array in [0, 1].
            y: (N,) integer labels, or (N, nb_classes) one-hot or soft ones; None takes the estimator's predictions.
            kwargs: none is taken (ART's ``mask`` has no meaning here).

        Returns:
            (N, C, H, W) float32 array, in [0, 1] and in the threat model's ball.
        """
        check_known("argument of generate", kwargs, ("x", "y"))
        x = np.asarray(x)
        pixels = torch.tensor(x.astype(ART_NUMPY_DTYPE) if x.dtype.kind == "f" else x, device=self.estimator.device)
        if y is None:
            y = self.estimator.predict(x, batch_size=self.batch_size)
        labels = _labels(np.asarray(y), len(x), self.estimator.nb_classes).to(pixels.device)
        attack, _ = foreign.native_attack(self.attack, self.options)
        seed = int(torch.randint(2**62, (1,))) if self.seed is None else self.seed
        module, options = EstimatorModule(self.estimator), {"batch_size": self.batch_size, **self.options}
        return attack(module, pixels, labels, self.threat, seed=seed, **options).cpu().numpy()


def _labels(y: np.ndarray, n: int, classes: int) -> Tensor:
    """Integer labels from ART's formats: (N,), (N, 1), or (N, classes) with one column a class."""
    if y.ndim == 2 and y.shape[1] == classes:
        y = y.argmax(axis=1)
    labels = torch.from_numpy(np.ascontiguousarray(y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y))
    check_labels(labels, n, classes=classes)
    return labels.long()
