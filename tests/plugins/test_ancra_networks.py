"""The networks with reverse attention: their sizes, their forward passes by hand, names, saved models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import save_model
from clipdefense_ancra.ancra import ANCRA
from clipdefense_ancra.networks import PreActBlock, PreActResNetRA, ResNetRA, WideResNetRA
from clipdefense_ancra.resnet import NETWORKS, RAClassifier
from clipdefense_ancra.reverse_attention import ReverseAttention, hard_mask

NAMES = ["a", "b", "c", "d"]
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 4, "image_size": 16},
    "preact-resnet18": {"width": 4, "image_size": 32},
    "wide-resnet28": {"width": 1, "image_size": 16},
}


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def settled(name: str) -> RAClassifier:
    """In eval mode, with statistics that have seen images and a last layer whose predictions differ."""
    model = cd.load_model(f"ancra:{name}", NAMES, **SMALL[name])
    assert isinstance(model, RAClassifier)
    x = images(model, 16)
    with torch.no_grad():
        model.train()
        for _ in range(20):
            model(x)
        model.eval()
        model.tower.fc.bias -= model.logits(x, "aux0").mean(dim=0)
    return model


def images(model: cd.ZeroShotClassifier, n: int) -> Tensor:
    side = model.image_size
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5))


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        assert count(ResNetRA()) == 11_173_962  # ResNet-18 for small images
        # the WideResNets of the robustness literature, without the first stage's unused second copy
        assert count(WideResNetRA()) == 46_160_474
        assert count(WideResNetRA(depth=28)) == 36_479_194
        pre = PreActResNetRA()
        blocks = [(64, 64, 0), (64, 64, 0), (64, 128, 1), (128, 128, 0), (128, 256, 1), (256, 256, 0), (256, 512, 1)]
        convolutions = sum(9 * i * o + 9 * o * o + s * i * o + 2 * i + 2 * o for i, o, s in [*blocks, (512, 512, 0)])
        assert count(pre) == 27 * 64 + convolutions + 2 * 512 + 2048 * 200 + 200
        x = torch.empty(2, 3, 64, 64, device="meta")
        assert pre.body(pre.stem(x)).shape == (2, 256, 16, 16) and pre(x).shape == (2, 200)
        wide = WideResNetRA()
        assert len(wide.body) == 13 and len(wide.reverse) == 2
        assert wide.body(wide.stem(torch.empty(2, 3, 32, 32, device="meta"))).shape == (2, 640, 8, 8)
    assert {name: (n.width, n.image_size) for name, n in NETWORKS.items()} == {
        "resnet18": (64, 32), "preact-resnet18": (64, 64), "wide-resnet28": (10, 32), "wide-resnet34": (10, 32),
    }  # fmt: skip


@torch.no_grad()
def test_a_pre_activation_block_by_hand() -> None:
    for channels, out, stride in ((3, 3, 1), (3, 5, 2)):
        block = PreActBlock(channels, out, stride).eval()
        h = torch.randn(2, channels, 8, 8)
        a = F.relu(F.batch_norm(h, torch.zeros(channels), torch.ones(channels)))
        inner = F.conv2d(a, block.conv1.weight, stride=stride, padding=1)
        inner = F.conv2d(F.relu(inner / (1 + 1e-5) ** 0.5), block.conv2.weight, padding=1)
        expected = inner + (h if stride == 1 else F.conv2d(a, block.shortcut.weight, stride=stride))
        torch.testing.assert_close(block(h), expected)


@pytest.mark.parametrize("name", list(SMALL))
@torch.no_grad()
def test_the_heads_by_hand(name: str) -> None:
    model = settled(name)
    tower: Any = model.tower
    weight, bias, x = tower.fc.weight, tower.fc.bias, images(model, 8)
    h, auxiliary, z = tower.body(tower.stem(x)), [], x
    for block in tower.reverse:
        z = block(h)
        if name != "resnet18":  # the network's last BatchNorm and ReLU, the same for both
            norm = tower.after[0]
            z = F.relu(F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias))
        assert (z >= 0).all()
        pooled = F.avg_pool2d(z, 2).flatten(1) if name == "preact-resnet18" else z.mean(dim=(2, 3))
        auxiliary.append(pooled @ weight.T + bias)
        mask = weight[auxiliary[-1].argmax(dim=1)]
        cells = 2 if name == "preact-resnet18" else 1
        h = z * F.interpolate(mask.view(8, -1, cells, cells), size=z.shape[-2:], mode="nearest")
    final, *found = model.heads(x)
    torch.testing.assert_close(found, auxiliary)
    c = auxiliary[1].argmax(dim=1)
    torch.testing.assert_close(final, torch.einsum("kj,nj,nj->nk", weight, weight[c], pooled) + bias)
    assert len(auxiliary[0].argmax(dim=1).unique()) > 1
    views = [view.name for view in ReverseAttention(model).adaptive(model)]
    assert views == ["final", "aux0", "aux1", "sum", "soft", "straight-through"]


@pytest.mark.parametrize("name", ["preact-resnet18", "wide-resnet28"])
def test_the_released_objective_trains_them(name: str) -> None:
    model = cd.load_model(f"ancra:{name}", NAMES, **SMALL[name])
    before = model.tower.fc.weight.detach().clone()
    threat = cd.ThreatModel("linf", eps=8 / 255, steps=1)
    options: dict[str, Any] = {"batch_size": 4, "max_steps": 1, "show_progress": False, "measure_every": 0}
    defense = ANCRA(model, variant="released", threat=threat, **options)
    defense.fit(images(model, 4), torch.arange(4))
    assert set(defense.history.steps[0]) > {"natural", "robust", "anc"}
    assert not torch.equal(model.tower.fc.weight, before)
    # x, x' and x^-, with the last BatchNorm once for each of the two blocks
    assert int(model.tower.after[0].num_batches_tracked) == 6


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    model = cd.load_model("ancra:preact-resnet18", NAMES, seed=3, **SMALL["preact-resnet18"])
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    path = save_model(model, tmp_path / "model.safetensors")
    again = cd.load_model(f"ancra:preact-resnet18@{path}")
    assert again.class_names == tuple(NAMES) and again.image_size == 32
    x = images(model, 2)
    assert torch.equal(again(x), model(x))
    other = cd.load_model("ancra:preact-resnet18", NAMES, seed=4, **SMALL["preact-resnet18"])
    assert not torch.equal(other(x), model(x))
    for spec, classes, message in [
        (f"ancra:preact-resnet18@{path}", ["a", "b", "c", "e"], "classes differ from those that the last layer of"),
        (f"ancra:wide-resnet28@{path}", None, "does not fit RAClassifier"),
        ("ancra:resnet18", None, "classes is None, but ancra:resnet18 brings no class names"),
        ("ancra:resnet81", NAMES, "network 'resnet81' is unknown; did you mean 'resnet18'"),
    ]:
        with pytest.raises(UsageError, match=message):
            cd.load_model(spec, classes)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "bare.pt")
    with pytest.raises(UsageError, match=r"is not a saved model of ancra:resnet18: it has no last layer"):
        cd.load_model(f"ancra:resnet18@{tmp_path / 'bare.pt'}")


def test_a_map_that_cannot_be_quartered() -> None:
    with pytest.raises(UsageError, match=r"a map of \(3, 3\), which does not divide into 2 x 2 .* a multiple of 16"):
        RAClassifier(NAMES, network="preact-resnet18", width=1, image_size=24).heads(torch.rand(1, 3, 24, 24))
    labels = torch.arange(2)
    tower = PreActResNetRA(4, width=1).eval()
    masked = tower.heads(torch.rand(2, 3, 32, 32), partial(hard_mask, y=labels))
    assert all(p.shape == (2, 4) for p in masked)
