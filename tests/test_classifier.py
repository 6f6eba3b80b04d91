"""The classifier: logits by hand, preprocessing, dtypes, class lists, saving and copying."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.classifier import (
    CLIP_MEAN,
    CLIP_STD,
    ClassHead,
    EmbeddingTable,
    TokenEmbeddings,
    ZeroShotClassifier,
)
from clipdefense.defenses import InputDefense
from clipdefense.errors import UsageError


class Mean(nn.Module):
    """Channel means times a weight: an embedding that is known by hand."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) * self.weight


class Tokens(Mean):
    """The same, and each pixel as a token."""

    def embed_tokens(self, x: Tensor) -> TokenEmbeddings:
        return TokenEmbeddings(self(x), x.flatten(2).transpose(1, 2) * self.weight)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Nothing(InputDefense):
    """Adds nothing."""

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return torch.zeros_like(x)


def plain(tower: nn.Module, anchors: Tensor, **options: object) -> ZeroShotClassifier:
    """No resize, no normalisation."""
    settings = {"image_size": 2, "mean": (0, 0, 0), "std": (1, 1, 1), **options}
    return ZeroShotClassifier(tower, anchors, **settings)  # type: ignore[arg-type]


def fixed(*colour: float) -> Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone()


def test_logits_are_scaled_cosines() -> None:
    """Embedding (0.6, 0.8, 0), |e| = 1; anchors (3, 0, 0), (0, 0, 5), (1, 1, 0): cosines 0.6, 0 and 1.4 / sqrt 2."""
    anchors = torch.tensor([[3.0, 0, 0], [0, 0, 5.0], [1.0, 1.0, 0]])
    model = plain(Mean(), anchors, logit_scale=10.0)
    expected = torch.tensor([[6.0, 0.0, 14 / math.sqrt(2)]])
    torch.testing.assert_close(model(fixed(0.6, 0.8, 0)), expected)
    torch.testing.assert_close(model(fixed(0.3, 0.4, 0)), expected)  # the length of an embedding does not matter
    torch.testing.assert_close(model.embed(fixed(0.3, 0.4, 0)), torch.tensor([[0.3, 0.4, 0]]))  # nor is it taken away
    assert model.class_names == ("class 0", "class 1", "class 2")


def test_pixels_are_normalised_with_the_channel_statistics() -> None:
    x = torch.rand(3, 3, 2, 2)
    model = ZeroShotClassifier(Identity(), torch.randn(4, 12), image_size=2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(model.preprocess(x), (x - mean) / std)
    other = ZeroShotClassifier(Identity(), torch.randn(4, 12), image_size=2, mean=(0, 0.5, 1), std=(1, 2, 4))
    torch.testing.assert_close(other.preprocess(x)[:, 2], (x[:, 2] - 1) / 4)
    torch.testing.assert_close(other.preprocess(x)[:, 1], (x[:, 1] - 0.5) / 2)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (9, 16), (1, 1)])
def test_another_size_is_resized_bicubically_to_a_square(shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape)
    model = plain(Identity(), torch.randn(2, 108), image_size=6)
    expected = F.interpolate(x, size=(6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.preprocess(x), expected, atol=0, rtol=0)


def test_an_image_of_the_right_size_is_not_touched_and_overshoot_is_not_clipped() -> None:
    model = plain(Identity(), torch.randn(2, 108), image_size=6)
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(model.preprocess(x), x)
    edge = torch.zeros(1, 3, 12, 12)
    edge[..., 6:] = 1
    assert model.preprocess(edge).max() > 1  # bicubic's own; a clamp would kill gradients there


def test_gradients_reach_the_pixels_through_the_resize(tiny_model: ZeroShotClassifier) -> None:
    model = tiny_model.double()
    x = torch.rand(1, 3, 20, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, 1], x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        difference = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction))[0, 1] / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "given", "logits"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_input_is_cast_to_the_tower_and_output_is_float32_or_float64(
    make_model: Callable[..., ZeroShotClassifier],
    tower: torch.dtype,
    given: torch.dtype,
    logits: torch.dtype,
    whole: bool,
) -> None:
    model = make_model()
    if whole:
        model.to(tower)
    else:
        model.tower.to(tower)
    seen: list[torch.dtype] = []
    model.tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    smooth = torch.rand(2, 3, 32, 32)
    assert model(smooth.to(given)).dtype == logits
    assert model.embed(smooth.to(given)).dtype == logits
    assert seen == [tower, tower] and model.dtype == tower


def test_half_precision_is_the_towers_business(make_model: Callable[..., ZeroShotClassifier]) -> None:
    whole, tower = make_model().to(torch.bfloat16), make_model()
    tower.tower.to(torch.bfloat16)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(whole.preprocess(x), tower.preprocess(x))  # the statistics are not rounded
    assert torch.equal(whole.embed(x), tower.embed(x))
    assert whole.head.anchors.dtype == torch.float32
    torch.testing.assert_close(whole.head.anchors.norm(dim=1), torch.ones(10))


def test_a_float64_model_has_float64_anchors(make_model: Callable[..., ZeroShotClassifier]) -> None:
    head = make_model(dtype=torch.float64).head
    torch.testing.assert_close(head.anchors.norm(dim=1), torch.ones(10, dtype=torch.float64), atol=1e-15, rtol=0)


def test_tokens_come_with_the_pooled_embedding() -> None:
    model = plain(Tokens(2.0), torch.randn(4, 3))
    x = torch.rand(2, 3, 2, 2)
    found = model.embed_tokens(x)
    assert found.tokens.shape == (2, 4, 3)
    torch.testing.assert_close(found.pooled, model.embed(x))
    torch.testing.assert_close(found.tokens.mean(dim=1), found.pooled)
    half = plain(Tokens(2.0).bfloat16(), torch.randn(4, 3)).embed_tokens(x)
    assert half.pooled.dtype == half.tokens.dtype == torch.float32
    with pytest.raises(UsageError, match=r"the tower Mean has no patch tokens; .*embed_tokens"):
        plain(Mean(), torch.randn(4, 3)).embed_tokens(x)


class Stretch(nn.Module):
    """A head transform with a weight."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings * self.factors


def test_the_transform_acts_on_class_embeddings_before_they_are_normalised() -> None:
    head = ClassHead(["a", "b"], torch.tensor([[1.0, 1.0], [1.0, 0.0]]), Stretch(3.0, 4.0), scale=5.0)
    torch.testing.assert_close(head.anchors, torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    torch.testing.assert_close(head(torch.tensor([[0.0, 2.0]])), torch.tensor([[4.0, 0.0]]))
    assert not head.anchors.requires_grad


def encoder(names: Sequence[str]) -> Tensor:
    """A text tower of sorts: name -> (length, first letter, 1)."""
    return torch.tensor([[float(len(name)), ord(name[0]) - 96.0, 1.0] for name in names])


def test_with_classes_shares_the_tower_and_goes_through_the_transform() -> None:
    transform = Stretch(1.0, 0.0, 2.0)
    names = ["ant", "bee"]
    model = plain(
        Mean(), encoder(names), class_names=names, transform=transform, class_encoder=encoder, logit_scale=7, source="s"
    )
    other = model.with_classes(["crab", "dragonfly", "bee"])
    assert other.tower is model.tower and other.head.transform is transform
    assert other.class_names == ("crab", "dragonfly", "bee") and other.source == "s"
    x = torch.rand(4, 3, 2, 2)
    expected = (
        7
        * F.normalize(x.mean(dim=(2, 3)), dim=1)
        @ F.normalize(torch.tensor([[4.0, 0, 2], [9.0, 0, 2], [3.0, 0, 2]]), dim=1).T
    )
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(other(x)[:, 2], model(x)[:, 1])
    assert model.class_names == ("ant", "bee")
    assert other.with_classes(["ant", "bee"]).class_encoder is encoder
    for settings in ("image_size", "mean", "std"):
        torch.testing.assert_close(getattr(other, settings), getattr(model, settings))


def test_with_classes_changes_no_mode() -> None:
    tower = nn.Sequential(Mean(), nn.Dropout(), nn.BatchNorm1d(3))
    model = plain(tower, torch.randn(3, 3))
    model.train()
    tower[2].eval()  # as one who freezes the statistics does
    other = model.with_classes(["class 2", "class 0"])
    assert other.training and other.head.training
    assert [part.training for part in tower.modules()] == [True, True, True, False]
    assert not model.eval().with_classes(["class 2", "class 0"]).training


def test_without_an_encoder_other_classes_come_from_the_models_own() -> None:
    model = plain(Mean(), torch.randn(3, 3), class_names=["cat", "dog", "fish"])
    x = torch.rand(5, 3, 2, 2)
    torch.testing.assert_close(model.with_classes(["fish", "cat"])(x), model(x)[:, [2, 0]])
    with pytest.raises(UsageError, match="1 of 2 names have no stored embedding, the first is 'doge'; near it: dog"):
        model.with_classes(["cat", "doge"])
    with pytest.raises(UsageError, match="classes has the one class 'cat'"):
        model.with_classes(["cat"])


def test_an_embedding_table_looks_names_up() -> None:
    embeddings = torch.arange(6.0).view(3, 2)
    table = EmbeddingTable(["a", "b", "c"], embeddings)
    assert torch.equal(table(["c", "a", "c"]), torch.tensor([[4.0, 5], [0, 1], [4, 5]]))
    embeddings.zero_()
    assert table(["c"]).sum() == 9  # its own copy
    assert torch.equal(pickle.loads(pickle.dumps(table))(["b"]), table(["b"]))
    with pytest.raises(UsageError, match=r"2 of 3 names have no stored embedding, the first is 'xyz'[.]$"):
        table(["xyz", "a", "d"])
    with pytest.raises(UsageError, match="embeddings has 3 rows for 2 names; one row a name"):
        EmbeddingTable(["a", "b"], torch.zeros(3, 2))
    with pytest.raises(UsageError, match="names contains 'a' more than once"):
        EmbeddingTable(["a", "a"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_embeddings": torch.randn(3)},
            r"class_embeddings has shape \(3,\); \(3, D\) is expected, a row a class",
        ),
        (
            {"class_embeddings": torch.randn(3, 3), "class_names": ["a", "b"]},
            r"class_embeddings .*\(2, D\) is expected",
        ),
        ({"class_embeddings": torch.zeros(3, 3)}, "class_embeddings contains NaN, infinite or zero rows"),
        ({"class_embeddings": torch.full((3, 3), math.nan)}, "class_embeddings contains NaN"),
        ({"class_embeddings": torch.randn(3, 3).numpy()}, "class_embeddings is a ndarray; a torch tensor is expected"),
        ({"class_embeddings": torch.randn(0, 3)}, "classes is empty"),
        ({"class_embeddings": torch.randn(1, 3)}, "classes has the one class"),
        ({"class_names": ["a", "b", "a"]}, "classes contains 'a' more than once"),
        ({"class_names": "abc"}, "classes is the string 'abc'; a list of names"),
        ({"logit_scale": 0}, "logit_scale is 0; a positive number is expected"),
        ({"logit_scale": -100.0}, "logit_scale is -100.0"),
        ({"logit_scale": math.inf}, "logit_scale is inf"),
        ({"logit_scale": math.nan}, "logit_scale is nan"),
        ({"image_size": 0}, "image_size is 0; a positive whole number of pixels"),
        ({"image_size": 2.0}, "image_size is 2.0"),
        ({"image_size": (2, 2)}, r"image_size is \(2, 2\)"),
        ({"std": (1, 1)}, r"mean \(0, 0, 0\) and std \(1, 1\) must have one value a channel, std above 0"),
        ({"std": (1, 1, 0)}, r"std above 0"),
    ],
)
def test_what_makes_no_classifier_is_named(options: dict[str, object], message: str) -> None:
    settings = {"class_embeddings": torch.randn(3, 3), **options}
    with pytest.raises(UsageError, match=message):
        plain(Mean(), settings.pop("class_embeddings"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"x has dtype torch.uint8; .* divide by 255"),
        (torch.rand(3, 4, 4), r"x has shape \(3, 4, 4\); .* add the batch dimension"),
        (torch.rand(2, 1, 4, 4), r"x has 1 channels, shape \(2, 1, 4, 4\); 3 are expected"),
        (torch.rand(2, 4, 4, 3), r"x has 4 channels, .* it looks like NHWC"),
        (torch.rand(0, 3, 4, 4), r"x is an empty batch"),
        (torch.rand(2, 3, 4, 4).numpy(), r"x is a ndarray; a torch tensor is expected"),
    ],
)
def test_what_is_no_batch_of_images_is_named_instead_of_classified(images: Tensor, message: str) -> None:
    model = plain(Mean(), torch.randn(3, 3))
    for call in (model, model.embed, Nothing().wrap(model)):
        with pytest.raises(UsageError, match=message):
            call(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_dict_round_trip_gives_the_same_logits(
    make_model: Callable[..., ZeroShotClassifier], images: Tensor, dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    state = copy.deepcopy(model.state_dict())
    assert not any("anchors" in name or "mean" in name for name in state)  # what can be computed is not stored
    assert {"head.embeddings", "head.scale"} <= set(state)
    other = make_model(dtype=dtype)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.mul_(0.5).add_(0.1)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(state)
    assert torch.equal(other(images), model(images))


def test_loading_renews_the_anchors_from_the_loaded_transform() -> None:
    embeddings = torch.randn(3, 3)
    saved = plain(Mean(), embeddings, transform=Stretch(1.0, 2.0, 3.0), logit_scale=7.0)
    other = plain(Mean(), torch.randn(3, 3), transform=Stretch(3.0, -1.0, 0.5), logit_scale=9.0)
    other.load_state_dict(saved.state_dict())
    torch.testing.assert_close(other.head.anchors, F.normalize(embeddings * torch.tensor([1.0, 2.0, 3.0]), dim=1))
    assert torch.equal(other(fixed(0.1, 0.2, 0.9)), saved(fixed(0.1, 0.2, 0.9)))
    with pytest.raises(RuntimeError, match=r"head\.embeddings"):
        plain(Mean(), torch.randn(4, 3), transform=Stretch(1.0, 1.0, 1.0)).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_independent(
    tiny_model: ZeroShotClassifier, images: Tensor, duplicate: Callable[[ZeroShotClassifier], ZeroShotClassifier]
) -> None:
    before = tiny_model(images).detach()
    other = duplicate(tiny_model)
    assert torch.equal(other(images), before)
    assert other.class_names == tiny_model.class_names
    state = {name: value + 1 for name, value in other.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(tiny_model(images), before)
    anchors = F.normalize(state["head.embeddings"], dim=1)
    torch.testing.assert_close(other.head.anchors, anchors)  # a copy renews its own anchors, not the original's


def test_moving_it_moves_everything(tiny_model: ZeroShotClassifier) -> None:
    moved = tiny_model.to("meta")
    tensors = [*moved.parameters(), *moved.buffers()]
    assert {str(tensor.device) for tensor in tensors} == {"meta"} and str(moved.device) == "meta"
    assert moved(torch.rand(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_it_describes_itself(tiny_model: ZeroShotClassifier) -> None:
    assert "ClassHead(classes=10, dim=32, scale=100)" in repr(tiny_model)
