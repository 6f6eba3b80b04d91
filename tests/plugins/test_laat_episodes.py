"""Few-shot episodes: what is drawn, whose classes are seen, the intervals, the attack."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipdefense as cd
from clipdefense import attacks
from clipdefense.attacks.context import predict
from clipdefense.classifier import EmbeddingTable, ZeroShotClassifier
from clipdefense.data import ImageDataset
from clipdefense.errors import UsageError
from clipdefense_laat.episodes import (
    PGD_20,
    Episode,
    MeanAccuracy,
    episode_model,
    evaluate_episodes,
    sample_episodes,
    student_t,
)
from clipdefense_laat.expansion import AnchorExpansion
from clipdefense_timm.anchors import read_embedding_table

NAMES = [f"thing {i}" for i in range(10)]
WEAK = cd.ThreatModel("linf", eps=1 / 255, steps=3)


@pytest.fixture
def model(make_model: Any) -> ZeroShotClassifier:
    """The tiny tower on 8 novel classes, through an expansion that was fitted on others."""
    tiny = make_model()
    embeddings = tiny.head.embeddings
    trained = ZeroShotClassifier(
        tiny.tower, embeddings[:2], class_names=NAMES[:2], image_size=32, logit_scale=10,
        transform=AnchorExpansion.fit(embeddings[:2] + 3), class_encoder=EmbeddingTable(NAMES, embeddings),
    )  # fmt: skip
    return trained.with_classes(NAMES[2:])


@pytest.fixture
def data(model: ZeroShotClassifier) -> tuple[Tensor, Tensor]:
    """(64, 3, 32, 32) and 8 labels a class, which mean nothing: accuracies are about chance."""
    coarse = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 1.4 - 0.2
    x = F.interpolate(coarse, size=32, mode="bilinear").clamp(0, 1)
    y = torch.arange(64) % 8
    return x, y


def test_students_t_by_hand() -> None:
    # mean 0.4, s = 0.2, t_{2, 0.975} = 4.302653
    low, high = student_t([0.2, 0.4, 0.6])
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-7)
    assert student_t([0.2, 0.4, 0.6], 0.9).high == pytest.approx(0.4 + 2.919986 * 0.2 / math.sqrt(3), abs=1e-7)
    assert student_t([0.5] * 9) == (0.5, 0.5)
    found = MeanAccuracy.of([0.2, 0.4, 0.6])
    assert found.mean == pytest.approx(0.4) and str(found) == "40.00 ± 49.68 %"
    for values, confidence in (([0.5], 0.95), ([0.5, 0.6], 1.0)):
        with pytest.raises(UsageError, match=rf"interval of {len(values)} values at confidence {confidence}"):
            student_t(values, confidence)


def test_what_an_episode_draws() -> None:
    y = torch.tensor([3, 7, 3, 7, 9, 9, 3, 9, 7, 9])  # labels need not be 0, 1, ...
    drawn = sample_episodes(y, ways=2, shots=1, queries=2, count=200, seed=4)
    for classes, support, query in drawn:
        assert len(set(classes.tolist())) == 2
        assert support.shape == (2, 1) and query.shape == (2, 2)
        images = torch.cat([support, query], dim=1)
        assert (y[images] == classes[:, None]).all()
        assert len(images.unique()) == 6  # no query among the support, none twice
    seen = torch.stack([episode.classes for episode in drawn])
    assert seen.unique().tolist() == [3, 7, 9]
    for label in (3, 7, 9):  # 200 * 2 / 3 expected; five standard deviations
        assert abs(int((seen == label).sum()) - 133) < 5 * math.sqrt(200 * 2 / 9)
    assert torch.cat([e.query.flatten() for e in drawn]).unique().tolist() == list(range(10))
    few = sample_episodes(y, ways=2, shots=1, queries=2, count=3, seed=4)
    assert all(torch.equal(a, b) for e, f in zip(few, drawn) for a, b in zip(e, f))
    other = sample_episodes(y, ways=2, shots=1, queries=2, count=200, seed=5)
    assert any(not torch.equal(e.query, f.query) for e, f in zip(other, drawn))
    assert sample_episodes(y, ways=2, queries=3, count=2)[0].support.shape == (2, 0)


def test_zero_shot_is_the_model_on_the_episodes_classes(model: ZeroShotClassifier, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    threat = cd.ThreatModel("linf", eps=2 / 255, steps=4)
    drawn = sample_episodes(y, ways=5, queries=4, count=4, seed=1)
    options: dict[str, Any] = {"attack": "pgd", "threat": threat, "seed": 1, "objective": "margin"}
    found = evaluate_episodes(model, x, y, queries=4, episodes=4, **options)
    clean, robust = [], []
    for number, episode in enumerate(drawn):
        names = [model.class_names[c] for c in episode.classes]
        five = model.with_classes(names)
        assert isinstance(five.head.transform, AnchorExpansion)
        rows, labels = episode.query.flatten(), torch.arange(5).repeat_interleave(4)
        right = predict(five, x[rows]).argmax(dim=1) == labels
        ids = rows[right] + number * len(x)
        x_adv = attacks.pgd(five, x[rows[right]], labels[right], threat, objective="margin", seed=1, ids=ids)
        clean.append(float(right.double().mean()))
        robust.append(float((predict(five, x_adv).argmax(dim=1) == labels[right]).sum()) / 20)
    assert found.clean.values == pytest.approx(clean) and found.robust is not None
    assert found.robust.values == pytest.approx(robust)
    assert found.clean.interval == pytest.approx(student_t(clean))
    assert sum(robust) < sum(clean)
    assert (found.attack, found.threat) == ("pgd", threat)
    same = evaluate_episodes(model, x, y, episodes=drawn, **options)
    assert same.clean == found.clean and same.robust == found.robust


class Watched(nn.Module):
    """A tower that counts the images it is shown."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.seen = tower, 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        embedding: Tensor = self.tower(images)
        return embedding


def test_clean_images_are_embedded_once(model: ZeroShotClassifier, data: tuple[Tensor, Tensor]) -> None:
    model.tower = Watched(model.tower)
    told: list[tuple[int, int]] = []
    found = evaluate_episodes(
        model, *data, shots=2, queries=4, episodes=30, attack=None, progress=lambda *at: told.append(at)
    )
    assert found.robust is None and found.attack is None
    assert model.tower.seen <= 64 + 1  # and one to look at the tower's dimension
    assert told[0] == (1, 30) and told[-1] == (30, 30) and len(told) == 30


def test_prototypes_by_hand(model: ZeroShotClassifier, data: tuple[Tensor, Tensor]) -> None:
    x, _ = data
    with torch.no_grad():
        support = model.embed(x[:6]).view(2, 3, -1)
        classes = torch.tensor([6, 1])
        few = episode_model(model, classes, support)
        assert few.class_names == (NAMES[8], NAMES[3])
        torch.testing.assert_close(few.head.anchors, F.normalize(support.mean(dim=1), dim=1))
        mixed = episode_model(model, classes, support, text_weight=2.0)
        text = model.head.anchors[classes]
        expected = F.normalize(2 * text + 3 * F.normalize(support.mean(dim=1), dim=1), dim=1)
        torch.testing.assert_close(mixed.head.anchors, expected)
        # the text's weight does not depend on how long the features are
        longer = episode_model(model, classes, 50 * support, text_weight=2.0)
        torch.testing.assert_close(longer.head.anchors, expected)
        torch.testing.assert_close(few(x), 10 * F.normalize(model.embed(x), dim=1) @ few.head.anchors.T)
    assert float(few.head.scale) == 10 and few.tower is model.tower


def test_few_shot_accuracy_on_images_that_differ_by_class(model: ZeroShotClassifier) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 8
    kinds = F.interpolate(torch.rand(8, 3, 4, 4, generator=generator), size=32)
    x = (0.9 * kinds[y] + 0.1 * torch.rand(48, 3, 32, 32, generator=generator)).clamp(0, 1)
    few = evaluate_episodes(model, x, y, shots=3, queries=3, episodes=6, attack="pgd", threat=WEAK)
    assert few.clean.mean > 0.95  # chance is 0.2, and the names know nothing of these images
    assert few.robust is not None and few.robust.mean < few.clean.mean
    assert few.clean.mean > evaluate_episodes(model, x, y, queries=3, episodes=6, attack=None).clean.mean + 0.2
    mixed = evaluate_episodes(model, x, y, shots=3, queries=3, episodes=6, attack=None, text_weight=1e6)
    text = evaluate_episodes(
        model, x, y, attack=None,
        episodes=[Episode(c, s[:, :0], q) for c, s, q in sample_episodes(y, shots=3, queries=3, count=6)],
    )  # fmt: skip
    assert mixed.clean == text.clean  # nothing but text is left


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_autoattack_has_fewer_targets_than_classes(
    ways: int, model: ZeroShotClassifier, data: tuple[Tensor, Tensor]
) -> None:
    stages = {"apgd-ce": {"steps": 3}, "apgd-t": {"steps": 3}, "fab-t": {"steps": 3}, "square": {"queries": 5}}
    found = evaluate_episodes(
        model, *data, ways=ways, queries=4, episodes=2, attack="autoattack", threat=WEAK, stages=stages
    )
    assert found.robust is not None and found.robust.mean < found.clean.mean


def test_the_model_is_left_alone_and_no_text_tower_asked(
    model: ZeroShotClassifier, data: tuple[Tensor, Tensor], untouched: Any
) -> None:
    def encoder(names: Any) -> Tensor:
        raise AssertionError(f"asked for {names}")

    model.class_encoder = encoder
    names, head, anchors = model.class_names, model.head, model.head.anchors.clone()
    with untouched(model):
        for shots in (0, 1):
            evaluate_episodes(model, *data, shots=shots, queries=2, episodes=2, threat=WEAK)
    assert model.class_names == names and torch.equal(model.head.anchors, anchors)
    assert model.class_encoder is encoder and model.head is head


def test_the_default_attack_is_the_published_one() -> None:
    assert (PGD_20.norm, PGD_20.eps, PGD_20.alpha, PGD_20.steps) == ("linf", 8 / 255, 2 / 255, 20)


def test_bad_input(model: ZeroShotClassifier, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    for options, message in [
        ({"ways": 9}, "ways is 9, but the images are of 8 classes"),
        ({"queries": 9}, r"class 'thing 2' has 8 images, fewer than the 9 of an episode \(0 shots and 9 queries\)"),
        ({"shots": 5, "queries": 4}, r"8 images, fewer than the 9 of an episode \(5 shots and 4 queries\)"),
        ({"ways": 1}, "ways is 1; a whole number of at least 2"),
        ({"shots": -1}, "shots is -1"),
        ({"queries": 0}, "queries is 0"),
        ({"episodes": 1}, "episodes is 1; a whole number of at least 2"),
        ({"episodes": []}, "episodes has 0; at least 2"),
        ({"text_weight": -1}, "text_weight is -1; a number of at least 0"),
        ({"text_weight": 2}, "text_weight is 2 without shots"),
        ({"attack": "pdg"}, "did you mean 'pgd'"),
        ({"objectiv": "dlr"}, "option of attack 'pgd' 'objectiv' is unknown; did you mean 'objective'"),
    ]:
        with pytest.raises(UsageError, match=message):
            evaluate_episodes(model, x, y, **{"queries": 2, "episodes": 2} | options)
    with pytest.raises(UsageError, match=r"labels in \[0, 8\]"):
        evaluate_episodes(model, x, y.clone().fill_(8).index_fill_(0, torch.tensor([0]), 0))
    with pytest.raises(UsageError, match="class 3 has 1 images"):
        sample_episodes(torch.tensor([3, 4, 4]), ways=2, queries=2, count=2)
    alien = ZeroShotClassifier(model.tower, torch.randn(8, 7), image_size=32)
    with pytest.raises(UsageError, match="class embeddings have dimension 7, but the tower VisionTransformer gives 32"):
        evaluate_episodes(alien, x, y, queries=2, episodes=2)


def test_real_images_and_anchors(data_folder: Path) -> None:
    """An untrained network on real novel classes: chance, and its interval holds it."""
    dataset: ImageDataset = cd.load_dataset(f"npz:{data_folder / 'caltech101_64.npz'}", size=32)
    table = read_embedding_table(data_folder / "clip_text_anchors.npz", names="vitb32_names", embeddings="vitb32_emb")
    dataset = dataset.only([name for name in dataset.classes if name in table.names][:8])
    model = cd.load_model("laat:conv4-512", dataset.classes, embeddings=table, trunk_options={"width": 8})
    x, y = dataset.tensors()
    found = evaluate_episodes(model, x, y, queries=8, episodes=200, attack=None)
    assert found.clean.interval.low < 0.25 and found.clean.interval.high > 0.15
