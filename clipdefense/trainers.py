"""The interface of a defence that trains: an ART trainer whose loop is the core's."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from art.defences.trainer import Trainer
from torch import Tensor, nn

from clipdefense.errors import UsageError
from clipdefense.threat import ThreatModel

if TYPE_CHECKING:
    from clipdefense.classifier import TokenEmbeddings, ZeroShotClassifier
    from clipdefense.estimator import CLIPClassifier
    from clipdefense.training.config import TrainingConfig
    from clipdefense.training.state import History


class TrainerDefense(Trainer):
    """A defence that fine-tunes the image tower: an ART trainer on the core's loop.

    A subclass states the inner attack's objective, the parameters that train, and :meth:`losses`. The loop takes
    care of data, attack, optimiser, schedule, checkpoints and resuming.

    Attributes:
        name: as registered, written into model files.
        threat: the inner attack's budget (``steps`` and ``alpha`` included).
        config: optimiser, schedule, batch size, epochs.
        variant: ``"released"`` computes what the released code computes; ``"default"`` is for use today.
        history: what the last fit measured, a :class:`clipdefense.training.state.History`; None before.
        low_memory: whether :meth:`embed` and its like keep no graph and compute it again in the backward pass; set by
            the loop from the config, for the length of a fit.
        provenance: of the last finished fit: ``training`` (its config) and ``base_weights_sha256``.
    """

    name: ClassVar[str] = ""
    variants: ClassVar[tuple[str, ...]] = ("default",)
    needs_labels: ClassVar[bool] = True
    history: History | None = None
    low_memory: bool = False
    provenance: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        classifier: CLIPClassifier | ZeroShotClassifier,
        *,
        threat: ThreatModel | None = None,
        config: TrainingConfig | None = None,
        variant: str = "default",
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier: the estimator (ART) or the bare model to train, in place.
            threat: budget of the inner attack; None is the method's own.
            config: training hyper-parameters; None is the method's own.
            variant: one of :attr:`variants`.
            overrides: single fields of the config, such as ``epochs=2``.

        Raises:
            UsageError: an unknown variant, a threat or config of another type, a field the config does not have, or
                a classifier without a tower.
        """
        from clipdefense.classifier import ZeroShotClassifier
        from clipdefense.errors import unknown_name
        from clipdefense.estimator import CLIPClassifier

        _check_settings(threat, config, overrides)

        if variant not in self.variants:
            raise unknown_name("variant", variant, self.variants)
        estimator = classifier if isinstance(classifier, CLIPClassifier) else CLIPClassifier(classifier)
        if not isinstance(estimator.model, ZeroShotClassifier):
            raise UsageError(
                f"classifier holds a {type(estimator.model).__name__}; a ZeroShotClassifier, whose tower trains, is "
                "expected (clipdefense.load_model makes one)."
            )
        super().__init__(estimator)
        self.variant = variant
        self.threat = threat if threat is not None else self.default_threat()
        self.config = (config if config is not None else self.default_config()).override(**overrides)

    @property
    def model(self) -> ZeroShotClassifier:
        """The module being trained."""
        return self._classifier.model

    @abc.abstractmethod
    def default_threat(self) -> ThreatModel:
        """The published inner attack for :attr:`variant`."""

    @abc.abstractmethod
    def default_config(self) -> TrainingConfig:
        """The published hyper-parameters for :attr:`variant`."""

    @abc.abstractmethod
    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named scalar loss terms; their sum is minimised.

        Args:
            batch: ``x`` clean images, ``x_adv`` the inner attack's, ``ids``, ``y`` labels where the method needs them.

        Returns:
            Scalars, each a mean over the batch (pieces of a batch and processes are averaged).
        """

    def embed(self, x: Tensor) -> Tensor:
        """The trained model's embeddings (N, D) of images, for :meth:`losses`: one pass, recomputed where asked for."""
        return self._pass(self.model.embed, x)

    def embed_tokens(self, x: Tensor) -> TokenEmbeddings:
        """Pooled embedding (N, D) and tokens (N, P, D) in one pass, otherwise as :meth:`embed`."""
        return self._pass(self.model.embed_tokens, x)

    def logits(self, x: Tensor) -> Tensor:
        """The trained model's logits (N, C), otherwise as :meth:`embed`."""
        return self.model.head(self.embed(x))

    def _pass(self, encode: Callable[[Tensor], Any], x: Tensor) -> Any:
        if not (self.low_memory and torch.is_grad_enabled()):
            return encode(x)
        from clipdefense.training.memory import recomputed

        return recomputed(self.model.tower, encode, x)

    def attack_objective(self, batch: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """What the inner attack maximises: ``(logits, y) -> (N,)``; cross-entropy unless the method says otherwise."""
        from clipdefense.attacks.objectives import cross_entropy

        return cross_entropy

    def inner_attack(self, batch: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
        """What the attack adds to the batch before :meth:`losses`; PGD on :meth:`attack_objective` unless overridden.

        Args:
            batch: ``x``, ``ids`` and, where there are labels, ``y``.
            seed: of the draws, which the ids key.

        Returns:
            ``x_adv`` (N, C, H, W) in [0, 1], and whatever else the method's losses read.
        """
        from clipdefense.attacks.pgd import pgd

        x, y = batch["x"], batch["y"]
        every: dict[str, Any] = {"early_stop": False, "batch_size": len(x), "seed": seed, "ids": batch["ids"]}
        return {"x_adv": pgd(self.model, x, y, self.threat, objective=self.attack_objective(batch), **every)}

    def begin(self) -> None:
        """Called once a fit, with the original weights on the training device; the place to copy a frozen model."""

    def frozen_copy(self) -> ZeroShotClassifier:
        """The model as it is now, in eval mode: what a term compares with; for :meth:`begin`, called in no graph.

        ``requires_grad`` flags stay: torch's attention rounds differently without them, and a comparison of equal
        weights would not start at 0. Its class encoder is shared, since it may hold a text tower.
        """
        encoder = self.model.class_encoder
        return copy.deepcopy(self.model, {id(encoder): encoder}).eval()

    def end(self) -> None:
        """Called when the fit is over, whether it succeeded or not; the place to let go of what :meth:`begin` made."""

    def hyper_parameters(self) -> Mapping[str, Any]:
        """The method's own (weights of terms, temperatures), JSON-ready: for model files, and for a resume to match."""
        return {}

    def trainable_parameters(self, train: str) -> Iterable[nn.Parameter]:
        """The parameters that train: the part of the image tower that the config's ``train`` names."""
        from clipdefense.training.parameters import select_parameters

        return select_parameters(self.model.tower, train)

    def fit(self, x: Any, y: Any = None, validation_data: Any = None, **overrides: Any) -> None:
        """Train in place.

        Args:
            x: images (N, C, H, W) in [0, 1], array or tensor; or, without y, a dataset of (image, label) items, or of
                images where the method needs no labels.
            y: integer or one-hot labels; None where the method needs none.
            validation_data: held-out (x, y) of the training distribution, a dataset or a loader, for
                :attr:`history`.
            overrides: config fields for this fit; ART's ``nb_epochs`` and ``verbose`` are understood.

        Raises:
            UsageError: images, labels or options that cannot be used, before any work; a fit that diverged (the
                weights are the last good ones) or ran out of memory.
        """
        from clipdefense.training.fit import fit_arrays

        fit_arrays(self, x, y, self.config.override(**_our_names(overrides)), validation_data)

    def fit_generator(self, generator: Any, validation_data: Any = None, **overrides: Any) -> None:
        """Train on an ART ``DataGenerator``; the rest as in :meth:`fit`."""
        from clipdefense.training.fit import fit_generator

        fit_generator(self, generator, self.config.override(**_our_names(overrides)), validation_data)

    def fit_loader(self, loader: Any, validation_data: Any = None, **overrides: Any) -> None:
        """Train on any iterable of (images, labels) batches, such as a ``DataLoader``; the rest as in :meth:`fit`."""
        from clipdefense.training.fit import fit_loader

        fit_loader(self, loader, self.config.override(**_our_names(overrides)), validation_data)

    def record(self) -> dict[str, Any]:
        """How the model was trained, for :func:`clipdefense.training.save_model`."""
        return {
            "method": self.name,
            "variant": self.variant,
            "hyper_parameters": dict(self.hyper_parameters()),
            "threat": asdict(self.threat),
            **self.provenance,
        }


def _check_settings(threat: Any, config: Any, overrides: Mapping[str, Any]) -> None:
    from clipdefense.training.config import TrainingConfig

    if threat is not None and not isinstance(threat, ThreatModel):
        raise UsageError(f"threat is {threat!r}; a ThreatModel is expected, such as ThreatModel('linf', eps=1/255).")
    if config is not None and not isinstance(config, TrainingConfig):
        raise UsageError(
            f"config is a {type(config).__name__}; a TrainingConfig is expected, or its fields by name (epochs=2)."
        )
    for field in fields(ThreatModel):
        if field.name in overrides:
            raise UsageError(
                f"{field.name} is part of the inner attack's budget; pass it as threat=ThreatModel('linf', eps=1/255, "
                "step_size=1/255, steps=2)."
            )


def _our_names(overrides: dict[str, Any]) -> dict[str, Any]:
    """ART's names for two config fields; the rest has the same name."""
    ours = {"nb_epochs": "epochs", "verbose": "show_progress"}
    return {ours.get(name, name): value for name, value in overrides.items()}
