"""FARE, unsupervised adversarial fine-tuning of CLIP's image embedding (Schlarmann et al., ICML 2024, 2402.12336).

The image tower learns to give an adversarial image the embedding that the original tower gives the clean one:

    L = mean_i || phi(x_adv)_i - phi_org(x)_i ||_2^2,   x_adv = argmax over the ball of the same distance

with ``phi`` the tower that trains and ``phi_org`` a frozen copy of it from before; embeddings are not normalised, and
the squares are summed over the D dimensions, neither averaged nor rooted. There are no labels, no class names and, by
default, no clean term, so the class head plays no part. At the clean image itself the distance has no gradient while
``phi`` still is ``phi_org``; the attack therefore starts at a uniform point of the ball.

What the released code does and this does not:

* its first update runs at the full learning rate, because the schedule is asked only afterwards (updates 2, 3, ...
  have the rates they have here); here warm-up begins with the first update;
* its attack takes the first gradient at a point that may lie outside [0, 1], sets NaN in gradients to zero (here they
  stop the run), and keeps the sign of the last gradient where the new one is exactly zero (its momentum of 0.9 on
  signs does nothing else, under Linf); here the start is clipped to the box and a zero gradient moves nothing;
* it also offers APGD for the inner attack, as the default of its script, though not of the published command; on this
  loss that attack compares a normalised embedding with an un-normalised one. PGD is what the paper's models come from.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clipdefense.attacks.context import predict
from clipdefense.attacks.forward import Embedder
from clipdefense.attacks.pgd import pgd
from clipdefense.errors import UsageError, check_number
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier
    from clipdefense.estimator import CLIPClassifier


def squared_distance(phi_x: Tensor, target: Tensor) -> Tensor:
    """``||phi(x)_i - target_i||_2^2``, summed over the dimensions; un-normalised embeddings (N, D) -> (N,)."""
    return (phi_x - target).square().sum(dim=1)


def fare_loss(phi_x: Tensor, target: Tensor) -> Tensor:
    """``L = mean_i ||phi(x)_i - target_i||_2^2``; (N, D), (N, D) -> scalar."""
    return squared_distance(phi_x, target).mean()


class FARE(TrainerDefense):
    """FARE as an ART trainer: ``fit(x)``, no labels. Trains the whole image tower.

    Labels that are given serve the accuracies in :attr:`history` alone. ``phi_org`` is the model as it is when a fit
    begins; a second fit takes what the first one made for its original.

    Variants:
        ``"default"``: two passes over the training images, warm-up over at most 7 % of the updates, the published
            share.
        ``"released"``: the released command's length: 20,000 updates, 1,400 of them warm-up, however few the images
            (unless ``epochs`` or ``max_steps`` says less).

    On ImageNet, the published set, the first makes 20,018 updates to the second's 20,000. They share the rest: AdamW at
    learning rate 1e-5 with weight decay 1e-4, batches of 128, cosine to 0; PGD with 10 steps of 1/255 from a uniform
    point. The paper trains at eps 2/255 and at 4/255, with the same step size; 2/255 is the default here, the other
    is ``threat=ThreatModel("linf", eps=4/255, step_size=1/255, steps=10)``.

    Attributes:
        original: phi_org, a frozen copy of the model; made when a fit begins.
    """

    name: ClassVar[str] = "fare"
    variants: ClassVar[tuple[str, ...]] = ("default", "released")
    needs_labels: ClassVar[bool] = False
    original: ZeroShotClassifier

    def __init__(
        self,
        classifier: CLIPClassifier | ZeroShotClassifier,
        *,
        clean_weight: float = 0.0,
        trades: bool = False,
        threat: ThreatModel | None = None,
        config: TrainingConfig | None = None,
        variant: str = "default",
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier, threat, config, variant, overrides: as in :class:`clipdefense.TrainerDefense`.
            clean_weight: w in [0, 1) of a clean term, ``(1 - w) L + w mean_i ||phi(x)_i - phi_org(x)_i||^2``; one
                more pass with gradients an update.
            trades: the adversarial embedding is compared with the current tower's clean one, ``phi(x)``, through which
                no gradient flows, in the attack as in the loss. Only the clean term then holds ``phi`` to the
                original, and without one an embedding that is the same for every image has no loss: a warning.

        Raises:
            UsageError: a weight outside its range, restarts of the inner attack, or as in the base class.
        """
        super().__init__(classifier, threat=threat, config=config, variant=variant, **overrides)
        check_number("clean_weight", clean_weight, 0, 1, open_high=True)
        if not isinstance(trades, bool):
            raise UsageError(f"trades is {trades!r}; True or False is expected.")
        if self.threat.restarts > 1:
            # a restart goes on from the images that still stand, which no label says
            raise UsageError(
                f"threat has {self.threat.restarts} restarts; FARE's inner attack has one start, so give steps instead."
            )
        if trades and not clean_weight:
            warnings.warn(
                "trades=True with clean_weight=0: nothing holds the embeddings to the original ones, and a constant "
                "embedding has no loss; give clean_weight a value above 0.",
                stacklevel=2,
            )
        self.clean_weight, self.trades = float(clean_weight), trades

    def default_threat(self) -> ThreatModel:
        return ThreatModel("linf", eps=2 / 255, step_size=1 / 255, steps=10)

    def default_config(self) -> TrainingConfig:
        released = self.variant == "released"
        return TrainingConfig(
            optimizer="adamw",
            lr=1e-5,
            weight_decay=1e-4,
            batch_size=128,
            epochs=20_000 if released else 2,  # an epoch has an update at least: max_steps decides
            max_steps=20_000 if released else None,
            schedule="cosine",
            warmup_steps=1400,
            warmup_cap=1.0 if released else 0.07,
            train="tower",
        )

    def hyper_parameters(self) -> Mapping[str, Any]:
        return {"clean_weight": self.clean_weight, "trades": self.trades}

    def begin(self) -> None:
        self.original = self.frozen_copy()

    def inner_attack(self, batch: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
        """PGD on the distance to the target, from a uniform point.

        Args:
            batch: ``x`` and ``ids``.
            seed: of the start, which the ids key.

        Returns:
            ``x_adv`` (N, C, H, W) in [0, 1]; ``target`` (N, D), what its embedding is compared with; and with a clean
            term ``original`` (N, D), ``phi_org(x)``. Targets are computed once an update, in full float32.
        """
        x, added = batch["x"], {}
        if self.clean_weight or not self.trades:
            added["original"] = _embeddings(self.original, x)
        target = _embeddings(self.model, x) if self.trades else added["original"]
        rows = torch.arange(len(x), device=x.device)  # in the place of labels: which image's target it is
        options: dict[str, Any] = {"early_stop": False, "batch_size": len(x), "seed": seed, "ids": batch["ids"]}

        def distance(phi_x: Tensor, row: Tensor) -> Tensor:
            return squared_distance(phi_x, target[row])

        x_adv = pgd(Embedder(self.model), x, rows, self.threat, objective=distance, **options)
        return {"x_adv": x_adv, "target": target, **(added if self.clean_weight else {})}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        w = self.clean_weight
        terms = {"robust": (1 - w) * fare_loss(self.embed(batch["x_adv"]), batch["target"])}
        if w:
            terms["clean"] = w * fare_loss(self.embed(batch["x"]), batch["original"])
        return terms


def _embeddings(model: ZeroShotClassifier, x: Tensor) -> Tensor:
    """(N, D), un-normalised, in eval mode, full float32 and without a graph."""
    return predict(Embedder(model), x, batch_size=len(x))
