"""The interfaces a defence implements, and what an attacker who knows it gets to attack."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor, nn

from clipdefense.checks import check_batch, check_images
from clipdefense.errors import UsageError, check_options, check_whole


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


class Numbers:
    """Ids for images that came without: negative, so as never to meet a caller's own; each image has its own."""

    def __init__(self) -> None:
        self.seen = 0

    def next(self, x: Tensor) -> Tensor:
        """(N,) ids for the images of x, in the order in which images were ever seen."""
        first = -1 - self.seen
        self.seen += len(x)
        return torch.arange(first, first - len(x), -1, device=x.device)

    def keys(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """(N,) the caller's ids for the images of x, or for None the next numbers.

        Raises:
            UsageError: ids that are not one integer an image.
        """
        if ids is None:
            return self.next(x)
        if ids.shape != x.shape[:1] or ids.is_floating_point():
            raise UsageError(f"ids has shape {tuple(ids.shape)}, {ids.dtype}; one integer an image is expected.")
        return ids


@dataclass(frozen=True)
class AttackView:
    """One way an attacker who knows the defence can attack it.

    Attributes:
        name: short and unique within the defence, such as ``"bpda"``.
        forward: ``(x, ids, seed) -> (N, C)`` logits, differentiable in x; random draws are keyed by (seed, id), so
            that an image's draws do not depend on its neighbours. ids is (N,) int64.
        extra_loss: ``(x, y) -> (N,)``, added to what the attacker maximises (gate evasion), or None.
        eot: draws over which the attacker averages gradients; 1 for a deterministic view.
    """

    name: str
    forward: Callable[[Tensor, Tensor, int], Tensor]
    extra_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    eot: int = 1


class ViewModule(nn.Module):
    """An :class:`AttackView` as a module with logits, so that every attack runs on it unchanged.

    An attack that knows image ids passes them, a fresh one for every draw it wants; for one that does not, each
    forward takes the next numbers of a counter: repeated passes over the same image are the EOT draws, and two
    modules of the same seed give the same sequence.
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
        self.seed = seed
        self.numbers = Numbers()

    def forward(self, x: Tensor, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        """
        Args:
            x: (N, C, H, W) in [0, 1].
            ids: (N,) integers that key the view's draws; None takes the next numbers.
            seed: of the draws; None is the module's own.
        """
        ids = self.numbers.next(x) if ids is None else ids
        return self.view.forward(x, ids, self.seed if seed is None else seed)

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


def module_of(model: Any) -> Any:
    """The module that a caller means: what was given, or, where that is no module (an ART classifier), the one inside.

    What has neither comes back as it is, for the caller's own check to name.
    """
    return model if isinstance(model, nn.Module) else getattr(model, "model", model)


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
        check_whole("batch_size", batch_size, 1)
        check_whole("seed", seed)
        super().__init__(device_type="gpu", is_fitted=True, apply_fit=False, apply_predict=True)
        self.seed = seed
        self.batch_size = batch_size
        self._numbers = Numbers()

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
        if ids is not None or noise is None:  # noise that is passed in takes no number
            ids = self._numbers.keys(x, ids)
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
        self._numbers = Numbers()

    def defend(self, x: Tensor, *, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Defended images; the gradient in x is the identity (BPDA), which ART needs inside ``forward``."""
        return x + self._perturbation(x, None, ids, seed)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The defended classifier, gradients by BPDA; its ``forward`` also takes ``ids`` and ``seed``."""
        return DefendedModel(self, model)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """ART's face: (defended images, labels as they came)."""
        return self.defend(x), y

    def bpda(self, model: nn.Module, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """A view's forward: logits of the defended model, straight-through gradient, draws keyed by (seed, id)."""
        return model(self.defend(x, ids=ids, seed=seed))
