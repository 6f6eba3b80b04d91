"""Planted defects: small modules around a trained classifier, each with one thing wrong that inflates robustness.

None of the audit's code knows them. The first half was run while the checks were written; of the second half only the
names were known, and it was run afterwards, with the thresholds as they were.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.randomness import uniform

EPS = 0.1
THREAT = cd.ThreatModel("linf", EPS)


class Around(nn.Module):
    """Something around a classifier."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net


class Detached(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach())


class Quantised(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 4).round() / 4)


class HalfPrecision(Around):
    """What autocast does to a loss that is averaged over a large batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * self.net(x)).half().float()


class Saturated(Around):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(20 * self.net(x), dim=1)


class HugeScale(Around):
    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


class Noisy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


class RandomResize(Around):
    def forward(self, x: Tensor) -> Tensor:
        size = int(torch.randint(6, 12, ()))
        return self.net(F.interpolate(F.interpolate(x, size=size, mode="bilinear"), size=x.shape[-2:], mode="bilinear"))


class BatchGlobal(Around):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return (logits - logits.mean(dim=0)) / logits.std(dim=0, unbiased=False).clamp_min(1e-3)


class Cached(Around):
    """Answers what it answered to an image that looked the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.answers: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        looks = (F.avg_pool2d(x.detach(), 4) * 4).round().to(torch.uint8).flatten(1)
        rows = [self.answers.setdefault(bytes(key.tolist()), row.detach()) for key, row in zip(looks, logits)]
        return logits - logits.detach() + torch.stack(rows)


class Jpeg(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.stack([self.stored(image) for image in x.detach()]).to(x))

    @staticmethod
    def stored(image: Tensor) -> Tensor:
        buffer = io.BytesIO()
        pixels = image[0].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=75)
        return torch.from_numpy(np.array(Image.open(buffer))).float()[None] / 255


class ArgmaxHead(Around):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits)


class ClippedHook(Around):
    def forward(self, x: Tensor) -> Tensor:
        features = self.net.features(x)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient.clamp(-1e-6, 1e-6))
        return self.net.head(features)


class WrongRange(Around):
    """Expects images in [0, 255]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / 255)


class AwayAndBack(Around):
    """A loop on the embedding that ends where it began."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("turn", torch.linalg.qr(torch.randn(64, 64, generator=generator))[0])

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.net.features(x)
        for _ in range(5):
            embedding = embedding @ self.turn
        for _ in range(5):
            embedding = embedding @ self.turn.T
        return self.net.head(embedding)


class Thermometer(Around):
    """Pixels as the share of thresholds they are above."""

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.linspace(0, 0.9, 10).view(1, 10, 1, 1)
        return self.net((x > levels).float().mean(dim=1, keepdim=True))


class ReversedThrough(Around):
    """A straight-through trick with the wrong sign."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return 2 * logits.detach() - logits


class OtherWithGradients(Around):
    """Another network where somebody differentiates."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(-1) if torch.is_grad_enabled() and x.requires_grad else x)


class BySize(Around):
    """Another network in large batches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if len(x) < 40 else x.roll(1, -1))


class OffGrid(Around):
    """Images that are not of whole 16ths, as attacked ones are not, are coarsened first."""

    def forward(self, x: Tensor) -> Tensor:
        off = (x * 16 - (x * 16).round()).abs().amax(dim=(1, 2, 3)) > 1e-4
        return self.net(torch.where(off[:, None, None, None], (x * 3).round() / 3, x))


class RunningMean(Around):
    """Takes off a mean that every question moves."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.register_buffer("mean", torch.zeros(1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))
        return self.net(x - 0.2 * self.mean)


class ZerothOrder(Around):
    """A random search for a surer neighbour, and a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        generator, best = torch.Generator().manual_seed(0), x.detach().clone()
        with torch.no_grad():
            sure = self.net(best).logsumexp(dim=1)
            for _ in range(10):
                near = (x.detach() + 0.1 * torch.randn(x.shape[1:], generator=generator)).clamp(0, 1)
                now = self.net(near).logsumexp(dim=1)
                best = torch.where((now > sure)[:, None, None, None], near, best)
                sure = torch.maximum(sure, now)
        return self.net(x + (best - x).detach())


class ContentKeyed(Around):
    """Noise that is a chaotic function of the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        key = (x.detach() * 1e4).sum(dim=(1, 2, 3), keepdim=True)
        place = torch.arange(64).view(1, 1, 8, 8)
        return self.net(x + 0.3 * (torch.frac(torch.sin(key * 12.9898 + place * 78.233) * 43758.5453) - 0.5))


class WrongView(cd.InputDefense):
    """Noise, declared, whose view is of another network than the one that judges."""

    traits = cd.Traits(randomized=True)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return ((x + noise).clamp(0, 1) - x).detach()

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed) - 0.5) * 0.2

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("eot", lambda x, ids, seed: model(x.flip(-1)), eot=20),)


class DeadView(WrongView):
    """The same with a view that has no gradient."""

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("eot", lambda x, ids, seed: self.bpda(model, x.detach(), ids, seed), eot=20),)


class LoopDefense(cd.TestTimeDefense):
    """The same as a defence that says so."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return AwayAndBack(model)


def in_train_mode(nets: dict[str, nn.Module]) -> nn.Module:
    return nets["batchnorm"].train()


@dataclass(frozen=True)
class Defect:
    """A planted defect.

    Attributes:
        name: what it is called.
        build: from copies of the trained models, by recipe.
        meant: the checks that are meant for it.
        held_out: whether it was run only after the checks were written.
        threat: the budget that is stated.
    """

    name: str
    build: Callable[[dict[str, nn.Module]], nn.Module]
    meant: tuple[int, ...]
    held_out: bool = False
    threat: cd.ThreatModel = THREAT


def around(kind: type[Around]) -> Callable[[dict[str, nn.Module]], nn.Module]:
    return lambda nets: kind(nets["cnn"]).eval()


ZOO = (
    Defect("detached gradient", around(Detached), (1,)),
    Defect("round quantiser", around(Quantised), (1,)),
    Defect("fp16 underflow", around(HalfPrecision), (1, 3)),
    Defect("saturated softmax", around(Saturated), (1,)),
    Defect("huge logit scale", around(HugeScale), (1,)),
    Defect("undeclared noise", around(Noisy), (4,)),
    Defect("undeclared random resize", around(RandomResize), (4,)),
    Defect("BatchNorm in train mode", in_train_mode, (5,)),
    Defect("batch-global normalisation", around(BatchGlobal), (5,), True),
    Defect("stateful cache", around(Cached), (5,), True),
    Defect("non-differentiable JPEG", around(Jpeg), (1,), True),
    Defect("argmax head", around(ArgmaxHead), (1,), True),
    Defect("clipped gradient hook", around(ClippedHook), (2, 3), True),
    Defect("wrong input range", around(WrongRange), (19,), True),
    Defect("eps off by 255", lambda nets: nets["cnn"], (18,), True, cd.ThreatModel("linf", EPS / 255)),
    Defect("loop that rotates away and back", around(AwayAndBack), (7,), True),
)

# thought of after the audit was finished; one of them, the batch size, was missed at first
LATER = (
    Defect("thermometer", around(Thermometer), (1,)),
    Defect("reversed straight-through", around(ReversedThrough), (2,)),
    Defect("another network with gradients", around(OtherWithGradients), (4,)),
    Defect("another network in large batches", around(BySize), (5,)),
    Defect("off-grid images coarsened", around(OffGrid), (1, 8)),
    Defect("running mean", around(RunningMean), (5,)),
    Defect("zeroth-order search", around(ZerothOrder), (2,)),
    Defect("noise keyed by content", around(ContentKeyed), (2,)),
)
