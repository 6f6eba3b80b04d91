"""The interfaces a defence implements, and what an attacker who knows it gets to attack."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.defences.trainer import Trainer
from torch import Tensor, nn

from clipdefense.checks import check_batch, check_images
from clipdefense.errors import UsageError, check_options
from clipdefense.randomness import draw_seed
from clipdefense.threat import ThreatModel

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier
    from clipdefense.estimator import CLIPClassifier
    from clipdefense.training.config import TrainingConfig
    from clipdefense.training.state import History


@dataclass(frozen=True)
class Traits:
    """What a defence says of itself; it chooses the protocol. An undeclared trait that the audit finds is INVALID.

    Attributes:
        randomized: two calls on the same input may differ (-> EOT, verdicts over several seeds).
        optimizes_in_forward: gradients are taken inside the forward pass (-> adaptive views).
        stateful: a call changes what later calls return.
    """

    randomized: bool = False
    optimizes_in_forward: bool = False
    stateful: bool = False


@dataclass(frozen=True)
class AttackView:
    """One way an attacker who knows the defence can attack it.

    Attributes:
        name: short and unique within the defence, such as ``"bpda"``.
        forward: ``(x, generator) -> (N, C)`` logits, differentiable in x; random draws come from the generator.
        extra_loss: ``(x, y) -> (N,)``, added to what the attacker maximises (gate evasion), or None.
        eot: draws over which the attacker averages gradients; 1 for a deterministic view.
    """

    name: str
    forward: Callable[[Tensor, torch.Generator], Tensor]
    extra_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    eot: int = 1


class ViewModule(nn.Module):
    """An :class:`AttackView` as a module with logits, so that every attack runs on it unchanged.

    Each forward draws afresh from a generator seeded at construction: repeated passes over the same image are the
    EOT draws, and two modules of the same seed give the same sequence.
    """

    def __init__(self, view: AttackView, model: nn.Module, seed: int = 0) -> None:
        """
        Args:
            view: what to attack.
            model: the undefended model inside the view; registered so that modes and devices follow.
            seed: of the draws.
        """
        super().__init__()
        self.view = view
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.view.forward(x, self.generator)

    def extra_loss(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The view's own term of the attacker's objective, (N,), or None."""
        return None if self.view.extra_loss is None else self.view.extra_loss(x, y)


class TestTimeDefense(abc.ABC):
    """A defence that acts when an image is classified and leaves the weights alone."""

    __test__ = False  # the name is not a pytest class
    traits: ClassVar[Traits] = Traits()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        check_options(cls.__init__, options, f"option of {cls.__name__}", given=1 + len(args))
        return super().__new__(cls)

    @abc.abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The defended classifier: a module from images in [0, 1] to logits, for torchattacks and everything else.

        Where :attr:`traits` say ``randomized``, its ``forward`` also takes ``ids`` (N,) and ``seed``.
        """

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """Views for an attacker who knows the defence; none means "transfer only" wherever a number appears."""
        return ()


class DefendedModel(nn.Module):
    """``model(x + perturbation(x))`` with the straight-through (BPDA) gradient, from :meth:`InputDefense.wrap`."""

    def __init__(self, defense: InputDefense, model: nn.Module) -> None:
        super().__init__()
        self.defense = defense
        self.model = model

    def forward(self, x: Tensor, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        """
        Args:
            x: (N, C, H, W) in [0, 1].
            ids: (N,) image ids that key the defence's draws; None uses its counter.
            seed: of the draws; None is the defence's own.
        """
        return self.model(self.defense.defend(x, ids=ids, seed=seed))


class InputDefense(TestTimeDefense, PreprocessorPyTorch):
    """A test-time defence that changes the input: it also has the face ART calls ``preprocessing_defences``.

    A subclass implements :meth:`perturb` (and :meth:`draw`, if it is random); the rest (chunks, numbering of draws,
    the straight-through gradient, ART's calls under ``no_grad`` and under ``loss_gradient``) is here. Nothing in it
    changes modes, ``requires_grad`` or ``.grad``.

    Attributes:
        seed: keys the random draws, together with image ids or with the count of images seen so far.
        batch_size: images handled at a time, so that memory stays bounded when ART passes a whole data set.
    """

    def __init__(self, *, seed: int = 0, batch_size: int = 128) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; a whole number of at least 1 is expected.")
        if not isinstance(seed, int):
            raise UsageError(f"seed is {seed!r}; a whole number is expected.")
        super().__init__(device_type="gpu", is_fitted=True, apply_fit=False, apply_predict=True)
        self.seed = seed
        self.batch_size = batch_size
        self._seen = 0

    @abc.abstractmethod
    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """What the method adds to one chunk of images.

        Args:
            x: (N, C, H, W) in [0, 1], detached, N <= :attr:`batch_size`; called under ``no_grad``.
            noise: what :meth:`draw` gave, or what the caller passed in.

        Returns:
            (N, C, H, W), detached, with x + perturbation in [0, 1].
        """

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor | None:
        """The random draw for these images, a function of (seed, id) alone; None for a deterministic defence."""
        return None

    def perturbation(
        self, x: Tensor, *, noise: Tensor | None = None, ids: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """What the defence adds to the images, :attr:`batch_size` at a time.

        Args:
            x: (N, C, H, W) in [0, 1].
            noise: the random draw, (N, C, H, W), instead of a fresh one.
            ids: (N,) image ids that key the draws. Without them each image takes the next number of a counter, so
                the result does not depend on the chunk size, and :meth:`reset` repeats it.
            seed: of the draws; None is the defence's own.

        Returns:
            (N, C, H, W), detached, in x's dtype, with x + perturbation in [0, 1].
        """
        check_images(x)
        if noise is not None and noise.shape != x.shape:
            raise UsageError(f"noise has shape {tuple(noise.shape)}; x's shape {tuple(x.shape)} is expected.")
        return self._perturbation(x, noise, ids, seed)

    def _perturbation(self, x: Tensor, noise: Tensor | None, ids: Tensor | None, seed: int | None) -> Tensor:
        """Any values: attacks of other libraries step outside [0, 1] by rounding, and must not fail inside."""
        check_batch(x)
        if ids is None and noise is None:
            ids = self._number(x)
        if ids is not None and (ids.shape != x.shape[:1] or ids.is_floating_point()):
            raise UsageError(f"ids has shape {tuple(ids.shape)}, {ids.dtype}; one integer an image is expected.")
        parts = []
        # an inference tensor cannot enter autograd, and the defence may need gradients of its own
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(x), self.batch_size):
                rows = slice(start, start + self.batch_size)
                part = x[rows].detach().clone()
                if noise is not None:
                    given: Tensor | None = noise[rows].detach().to(part)
                else:
                    assert ids is not None
                    given = self.draw(part, ids[rows].to(part.device), self.seed if seed is None else seed)
                parts.append(self.perturb(part, given))
            return torch.cat(parts)

    def reset(self) -> None:
        """Begin the sequence of un-numbered draws again: the same calls then give the same results."""
        self._seen = 0

    def _number(self, x: Tensor) -> Tensor:
        """Ids for images that came without: negative, so as never to meet a caller's own."""
        first = -1 - self._seen
        self._seen += len(x)
        return torch.arange(first, first - len(x), -1, device=x.device)

    def defend(self, x: Tensor, *, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Defended images; the gradient in x is the identity (BPDA), which ART needs inside ``forward``."""
        return x + self._perturbation(x, None, ids, seed)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The defended classifier, gradients by BPDA; its ``forward`` also takes ``ids`` and ``seed``."""
        return DefendedModel(self, model)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """ART's face: (defended images, labels as they came)."""
        return self.defend(x), y

    def bpda(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        """A view's forward: logits of the defended model, straight-through gradient, draws from the generator."""
        return model(self.defend(x, ids=torch.arange(len(x), device=x.device), seed=draw_seed(generator)))


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
        provenance: of the last finished fit: ``training`` (its config) and ``base_weights_sha256``.
    """

    name: ClassVar[str] = ""
    variants: ClassVar[tuple[str, ...]] = ("default",)
    needs_labels: ClassVar[bool] = True
    history: History | None = None
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
            UsageError: an unknown variant, a field the config does not have, or a classifier without a tower.
        """
        from clipdefense.classifier import ZeroShotClassifier
        from clipdefense.errors import unknown_name
        from clipdefense.estimator import CLIPClassifier

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
            x: images (N, C, H, W) in [0, 1], array or tensor; or, without y, a dataset of (image, label) items.
            y: integer or one-hot labels; None where the method needs none.
            validation_data: held-out (x, y) of the training distribution, or a dataset, for :attr:`history`.
            overrides: config fields for this fit; ART's ``nb_epochs`` and ``verbose`` are understood.

        Raises:
            UsageError: images, labels or options that cannot be used, before any work; a fit that diverged (the
                weights are the last good ones) or ran out of memory.
        """
        from clipdefense.training.loop import fit_arrays

        fit_arrays(self, x, y, self.config.override(**_our_names(overrides)), validation_data)

    def fit_generator(self, generator: Any, validation_data: Any = None, **overrides: Any) -> None:
        """Train on an ART ``DataGenerator``; the rest as in :meth:`fit`."""
        from clipdefense.training.loop import fit_generator

        fit_generator(self, generator, self.config.override(**_our_names(overrides)), validation_data)

    def fit_loader(self, loader: Any, validation_data: Any = None, **overrides: Any) -> None:
        """Train on any iterable of (images, labels) batches, such as a ``DataLoader``; the rest as in :meth:`fit`."""
        from clipdefense.training.loop import fit_loader

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


def _our_names(overrides: dict[str, Any]) -> dict[str, Any]:
    """ART's names for two config fields; the rest has the same name."""
    ours = {"nb_epochs": "epochs", "verbose": "show_progress"}
    return {ours.get(name, name): value for name, value in overrides.items()}
