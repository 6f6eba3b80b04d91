"""The native attacks as a torchattacks attack."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import foreign
from clipdefense.attacks.context import frozen
from clipdefense.checks import check_labels
from clipdefense.errors import MissingPackageError, UsageError
from clipdefense.threat import ThreatModel

try:
    from torchattacks.attack import Attack
except ModuleNotFoundError as error:
    raise MissingPackageError(
        "clipdefense_torchattacks.NativeAttack needs torchattacks, which is not installed: "
        "pip install 'clipdefense[torchattacks]'"
    ) from error


class NativeAttack(Attack):
    """Any attack registered here, called as torchattacks' own: ``NativeAttack(model, "pgd")(images, labels)``.

    Attributes may be changed between calls, as in torchattacks. The model's modes are restored submodule by
    submodule, and the weights get no gradients.

    Attributes:
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius, in [0, 1] pixel units.
        alpha: step size of an attack with a fixed one; None is :attr:`clipdefense.ThreatModel.alpha`'s rule.
        steps: iterations; None is the attack's own number (10 where it has none).
        restarts: random restarts.
        seed: of the draws: the same at every call; None takes a new one from torch's global generator each time.
        batch_size: images a forward.
        options: further keyword arguments of the attack.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: str = "pgd",
        *,
        norm: str = "Linf",
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int | None = None,
        restarts: int = 1,
        seed: int | None = 0,
        batch_size: int = 128,
        **options: Any,
    ) -> None:
        """
        Args:
            model: images in [0, 1] -> logits.
            attack: as `clipdefense plugins` lists it: ``"pgd"``, ``"apgd-ce"``, ...
            norm, eps, alpha, steps, restarts, seed, batch_size: see the class.
            options: of the attack, such as ``objective="margin"``.

        Raises:
            UsageError: an unknown attack or option, or a value out of its range.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # torchattacks prints when a model has no parameters
            super().__init__(attack, model)
        self.norm, self.eps, self.alpha, self.steps, self.restarts = norm, eps, alpha, steps, restarts
        self.seed, self.batch_size = seed, batch_size
        # torchattacks compares what is set with ==, which a tensor among the options does not survive
        object.__setattr__(self, "options", options)
        self._resolve()

    def _resolve(self) -> tuple[Any, ThreatModel, dict[str, Any]]:
        """The attack function, the budget, and the options, from the attributes as they are now."""
        attack, known = foreign.native_attack(self.attack, self.options)
        options = {"batch_size": self.batch_size, **self.options}
        steps = 10 if self.steps is None else self.steps
        if "steps" in known:
            if self.alpha is not None:
                raise UsageError(
                    f"alpha is {self.alpha}, but {self.attack!r} chooses its step sizes itself; leave it out."
                )
            options |= {} if self.steps is None else {"steps": self.steps}
        threat = ThreatModel(str(self.norm).lower(), self.eps, self.alpha, steps, self.restarts)  # type: ignore[arg-type]
        return attack, threat, options

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] and (N,) integer labels -> adversarial images, detached."""
        attack, threat, options = self._resolve()
        device = images.device if self.device is None else self.device
        model = self.model if self.normalization_used is None else _OnPixels(self)
        check_labels(labels, len(images))
        images, labels = images.to(device), labels.to(device, torch.int64)
        seed = int(torch.randint(2**62, (1,))) if self.seed is None else self.seed
        return attack(model, images, labels, threat, seed=seed, **options)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        normalised = self._normalization_applied
        try:
            return super().__call__(inputs, labels, *args, **kwargs)
        finally:
            self._set_normalization_applied(normalised)  # torchattacks forgets it when the attack raises

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """As torchattacks' (data_loader, save_path, ...), with the model's modes restored submodule by submodule."""
        with frozen(self.model):
            return super().save(*args, **kwargs)

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Eval mode is the only one.

        Raises:
            UsageError: any of them is True.
        """
        if model_training or batchnorm_training or dropout_training:
            raise UsageError(f"{self.attack!r} attacks the model in eval mode; training modes cannot be set.")

    def _set_mode_targeted(self, mode: str, quiet: bool) -> None:
        raise UsageError(f"{self.attack!r} has no targeted mode; torchattacks' own PGD has one.")

    def _change_model_mode(self, given_training: bool) -> None:
        """Left to the attack, which restores each submodule's own mode."""

    def _recover_model_mode(self, given_training: bool) -> None:
        """See :meth:`_change_model_mode`."""


class _OnPixels(nn.Module):
    """A model on normalised images, as one on pixels."""

    def __init__(self, attack: NativeAttack) -> None:
        super().__init__()
        self.model = attack.model
        self.attack = attack

    def forward(self, x: Tensor) -> Tensor:
        return self.attack.get_logits(x)
