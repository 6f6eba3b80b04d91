"""LAAT's networks: shapes and values by hand, loading by name, saved models with their expansion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import save_model
from clipdefense_laat.expansion import AnchorExpansion
from clipdefense_laat.laat import LAAT
from clipdefense_laat.towers import CIFAR_FS, MINI_IMAGENET, Conv4, ResNet12, make_tower

NAMES = [f"thing {i}" for i in range(6)]
DIM = 12
SMALL: dict[str, Any] = {"trunk_options": {"width": 6}}


def bank() -> Tensor:
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(3)) + 1


@pytest.fixture
def anchors(tmp_path: Path) -> str:
    np.savez(tmp_path / "anchors.npz", names=np.array(NAMES), embeddings=bank().numpy())
    return str(tmp_path / "anchors.npz")


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        conv4, resnet12 = Conv4(), ResNet12()
    # a convolution with bias and a BatchNorm, four times
    assert count(conv4) == (3 * 9 * 512 + 3 * 512) + 3 * (512 * 9 * 512 + 3 * 512)
    blocks = zip((3, 64, 160, 320), (64, 160, 320, 640))
    assert count(resnet12) == sum(9 * i * o + 2 * 9 * o * o + i * o + 4 * 2 * o for i, o in blocks)
    for trunk, width in ((conv4, 512), (resnet12, 640)):
        for side, cells in ((32, 2), (80, 5), (84, 5)):
            features = trunk.forward_features(torch.empty(2, 3, side, side, device="meta"))
            assert features.shape == (2, width, cells, cells)
        assert trunk(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, width)


@torch.no_grad()
def test_conv4_by_hand() -> None:
    trunk = Conv4(width=3).eval()
    for block in trunk.blocks:
        conv, norm = block[0], block[1]  # type: ignore[index]
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = torch.eye(3)  # the pixel itself
        conv.bias.fill_(0.5)
        norm.running_mean.fill_(0.25)
        norm.running_var.fill_(1 - norm.eps)
    x = torch.zeros(1, 3, 16, 16)
    x[0, :, 3, 7] = torch.tensor([1.0, -3.0, 0.0])
    # each block adds a quarter, cuts at 0 and keeps the largest of four: the rest of the map brings 0.25, 0.5, 0.75, 1
    torch.testing.assert_close(trunk(x), torch.tensor([[2.0, 1.0, 1.0]]))


@torch.no_grad()
def test_resnet12_adds_its_shortcut() -> None:
    trunk = ResNet12((4, 6, 8, 10)).eval()
    block: Any = trunk.blocks[0]
    x = torch.rand(2, 3, 32, 32)
    h = x
    for place in (0, 3, 6):
        h = block.body[place + 1](F.conv2d(h, block.body[place].weight, padding=1))
        h = h if place == 6 else F.leaky_relu(h, 0.1)
    h = F.leaky_relu(h + block.shortcut[1](F.conv2d(x, block.shortcut[0].weight)), 0.1)
    torch.testing.assert_close(block(x), F.max_pool2d(h, 2))
    with pytest.raises(UsageError, match=r"images are \(8, 8\) pixels; four halvings need at least 16"):
        trunk(torch.rand(1, 3, 8, 8))


@torch.no_grad()
def test_dropblock_drops_squares_of_the_last_two_blocks_while_training() -> None:
    widths = (4, 6, 8, 10)
    plain, trunk = ResNet12(widths).train(), ResNet12(widths, drop_rate=0.4, drop_size=2)
    trunk.load_state_dict(plain.state_dict())  # it has no weights
    x = torch.rand(16, 3, 64, 64)
    assert torch.equal(trunk.eval()(x), plain.eval()(x))
    trunk.train(), plain.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(trunk.blocks[:2](x), plain.blocks[:2](x))
        for block, last in ((2, 8), (3, 4)):
            h = trunk.blocks[:block](x)
            dropped, whole = trunk.blocks[block](h) == 0, plain.blocks[block](h)
            assert dropped.shape[-1] == last and (whole != 0).all()
            assert 0.25 < float(dropped.float().mean()) < 0.5
            # a square of 2 lies in the map, or is cut by its left or upper edge
            zeros = F.pad(dropped.float(), (1, 1, 1, 1), value=1.0)
            squares = F.max_pool2d(F.avg_pool2d(zeros, 2, 1), 2, 1) == 1
            assert bool((squares | ~dropped).all())
    assert not torch.equal(trunk(x), plain(x))
    for options, message in (({"drop_rate": 1}, "drop_rate is 1"), ({"drop_size": 0}, "drop_size is 0")):
        with pytest.raises(UsageError, match=message):
            make_tower("resnet12", DIM, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("conv4-512", {"width": 6}),
        ("resnet12", {"widths": (4, 6, 8, 10)}),
        ("mobilenetv3_small_050", {}),
        ("resnet10t", {}),
    ],
)
def test_the_map_to_the_anchors_space_has_no_bias_and_cells_average_to_the_embedding(
    name: str, options: dict[str, Any]
) -> None:
    before = torch.get_rng_state()
    tower = make_tower(name, DIM, seed=4, **options).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert tower.projection.bias is None
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(tower(x), tower.trunk(x) @ tower.projection.weight.T)
    assert tower.embed_tokens(x).pooled.shape == (2, DIM)
    if name != "mobilenetv3_small_050":  # which has a layer after its pooling
        pooled, tokens = tower.embed_tokens(x)
        torch.testing.assert_close(tokens.mean(dim=1), pooled)
    again, other = (make_tower(name, DIM, seed=seed, **options) for seed in (4, 5))
    assert torch.equal(again.projection.weight, tower.projection.weight)
    assert not torch.equal(other.projection.weight, tower.projection.weight)


def test_an_untrained_network_by_name(anchors: str) -> None:
    model = cd.load_model("laat:conv4-512", NAMES[:4], embeddings=anchors, tau=0.5, **SMALL)
    assert not model.training and model.source == "laat:conv4-512"
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        f = model.tower((x - torch.tensor(CIFAR_FS.mean).view(3, 1, 1)) / torch.tensor(CIFAR_FS.std).view(3, 1, 1))
        expected = F.normalize(f, dim=1) @ F.normalize(bank()[:4], dim=1).T / 0.5
        torch.testing.assert_close(model(x), expected)
        assert (model.tower.trunk(x) >= 0).all() and (f < 0).any()  # the linear map gives signs
    assert model.image_size == 32
    assert float(cd.load_model("laat:conv4-512", NAMES, embeddings=anchors, **SMALL).head.scale) == 1
    larger = cd.load_model("laat:conv4-512", NAMES, embeddings=anchors, **SMALL, **MINI_IMAGENET._asdict())
    assert larger.image_size == 80
    assert larger.mean.flatten().tolist() == pytest.approx([0.4721, 0.4533, 0.4099], abs=1e-4)
    known = cd.load_model("laat:resnet10t", NAMES, embeddings=anchors, device="cpu", dtype="float64")
    assert known.dtype == torch.float64 and known.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_trained_model_comes_back_with_its_map(anchors: str, tmp_path: Path) -> None:
    model = cd.load_model("laat:conv4-512", NAMES[:4], embeddings=anchors, **SMALL)
    settings: dict[str, Any] = {"batch_size": 8, "epochs": 1, "show_progress": False, "checkpoint": str(tmp_path)}
    threat = cd.ThreatModel("linf", eps=8 / 255, steps=1)
    LAAT(model, variant="released", tau=0.2, threat=threat, **settings, milestones=(1,)).fit(
        torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    )
    x, spec = torch.rand(2, 3, 32, 32), f"laat:conv4-512@{tmp_path / 'model.safetensors'}"
    again = cd.load_model(spec, **SMALL)
    assert isinstance(again.head.transform, AnchorExpansion) and again.class_names == model.class_names
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        novel = cd.load_model(spec, NAMES[4:], embeddings=anchors, **SMALL)
        expected = model.head.transform(bank()[4:])
        torch.testing.assert_close(novel.head.anchors, expected)
        torch.testing.assert_close(novel(x), 5 * F.normalize(model.embed(x), dim=1) @ expected.T)
    assert torch.equal(model.with_classes(NAMES[4:]).head.anchors, novel.head.anchors)
    with pytest.raises(UsageError, match="'thing 5'"):
        cd.load_model(spec, NAMES[4:6][::-1], **SMALL)
    with pytest.raises(
        UsageError, match=r"have dimension 7, but checkpoint .* gives 12; take embeddings of dimension 12"
    ):
        cd.load_model(spec, NAMES[:2], embeddings=lambda names: torch.ones(len(names), 7), **SMALL)
    with pytest.raises(UsageError, match="does not fit TimmTower"):
        cd.load_model(spec, trunk_options={"width": 5})

    path = save_model(model, tmp_path / "described.safetensors", **SMALL)  # with the options in the sidecar
    assert json.loads((tmp_path / "described.safetensors.json").read_text())["trunk_options"] == {"width": 6}
    assert torch.equal(cd.load_model(f"laat:conv4-512@{path}").head.anchors, model.head.anchors)


def test_what_cannot_be_loaded(anchors: str, tmp_path: Path) -> None:
    torch.save(make_tower("conv4-512", DIM, width=6).state_dict(), tmp_path / "bare.pt")
    for spec, options, message in [
        ("laat:conv4-51", {}, "network 'conv4-51' is unknown; did you mean 'conv4-512'"),
        ("laat:conv4-512", {"classes": None}, r"classes is None, but laat:conv4-512 brings no class names"),
        ("laat:conv4-512", {"embeddings": None}, "laat:conv4-512 brings no class embeddings; name the file"),
        ("laat:conv4-512", {"tau": 0}, "tau is 0; a number above 0"),
        (
            "laat:conv4-512",
            {"trunk_options": {"widht": 3}},
            r"trunk_options is \{'widht': 3\}, which conv4-512 does not",
        ),
        ("laat:conv4-512", {"classes": ["one"]}, "at least two"),
        (f"laat:conv4-512@{tmp_path}/absent.safetensors", {}, "does not exist"),
        (f"laat:conv4-512@{tmp_path}/bare.pt", {}, r"has no tower\.\* entries"),
    ]:
        with pytest.raises(UsageError, match=message):
            cd.load_model(spec, **{"classes": NAMES, "embeddings": anchors} | options)
