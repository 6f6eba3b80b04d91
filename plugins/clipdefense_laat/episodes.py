"""Few-shot episodes, as LAAT is evaluated (CVPR 2024, arXiv 2301.13096): a few novel classes at a time.

An episode draws ``ways`` classes and of each ``shots`` support and ``queries`` query images. Its head has those classes
alone: their anchors, through the training classes' expansion, where there are no shots; else prototypes, the means of
the clean support images' embeddings. Everything sees only these classes, the attack too, so that AutoAttack aims at
``ways - 1`` targets (the released code leaves nine, with which the original implementation breaks off). The figure is
the mean over episodes with Student's t interval. It is of these images: episodes share them.

Two departures from the released code. A query counts as robust where it is classified correctly before and after the
attack; queries that are wrong to begin with are not attacked. The text mix is ``w t + k n(mean f)``, the text counting
as w more shots, with both unit vectors; the code adds the unit text vector to the un-normalised mean, where its weight
depends on the length of the features. Without text (w = 0, the published setting) the heads are the same.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor

from clipdefense import attacks, randomness
from clipdefense.attacks.context import full_fp32, predict
from clipdefense.attacks.forward import Embedder
from clipdefense.checks import check_images, check_labels
from clipdefense.classifier import ClassHead, EmbeddingTable, ZeroShotClassifier
from clipdefense.errors import UsageError, check_options, check_whole
from clipdefense.evaluation.statistics import Interval
from clipdefense.plugins import get_attack
from clipdefense.threat import ThreatModel
from clipdefense_laat.expansion import check_dimension

PGD_20 = ThreatModel("linf", eps=8 / 255, step_size=2 / 255, steps=20)


class Episode(NamedTuple):
    """One draw, as numbers of classes and of images; W ways, k shots, q queries."""

    classes: Tensor  # (W,)
    support: Tensor  # (W, k)
    query: Tensor  # (W, q)


@dataclass(frozen=True)
class MeanAccuracy:
    """Mean over episodes, in [0, 1].

    Attributes:
        mean: of the values.
        interval: Student's t, 95 %, of the mean over episodes; not clipped to [0, 1].
        values: an accuracy an episode.
    """

    mean: float
    interval: Interval
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanAccuracy:
        return cls(math.fsum(values) / len(values), student_t(values), tuple(values))

    def __str__(self) -> str:
        half = (self.interval.high - self.interval.low) / 2
        return f"{100 * self.mean:.2f} ± {100 * half:.2f} %"


@dataclass(frozen=True)
class EpisodeResult:
    """What an evaluation found.

    Attributes:
        clean: accuracy on the queries.
        robust: accuracy under the attack; None without one.
        attack, threat: as given.
    """

    clean: MeanAccuracy
    robust: MeanAccuracy | None
    attack: str | None
    threat: ThreatModel


def student_t(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """``mean ± t_{n-1} s / sqrt(n)``, s with n - 1 in the denominator.

    Raises:
        UsageError: fewer than two values, or a confidence outside (0, 1).
    """
    n = len(values)
    if n < 2 or not 0 < confidence < 1:
        raise UsageError(
            f"an interval of {n} values at confidence {confidence} is undefined; at least 2 episodes and a confidence "
            "between 0 and 1 are expected."
        )
    mean = math.fsum(values) / n
    s = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(student.ppf(0.5 + confidence / 2, n - 1)) * s / math.sqrt(n)
    return Interval(mean - half, mean + half)


def sample_episodes(
    y: Tensor,
    *,
    ways: int = 5,
    shots: int = 0,
    queries: int = 20,
    count: int = 2000,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[Episode]:
    """Draw episodes: classes without replacement, and images of a class without replacement.

    Episode number e depends on (seed, e) and the labels alone, so fewer episodes are the first of more.

    Args:
        y: (N,) integer labels of the images; classes without an image take no part.
        ways, shots, queries: classes an episode; support and query images a class.
        count: episodes.
        seed: of the draws.
        names: of the classes, for messages.

    Raises:
        UsageError: fewer classes than ways, a class with fewer images than an episode takes, a value out of range.
    """
    for name, value, least in (("ways", ways, 2), ("shots", shots, 0), ("queries", queries, 1), ("episodes", count, 2)):
        check_whole(name, value, least)
    check_labels(y, len(y))
    y = y.cpu().long()
    labels, sizes = y.unique(return_counts=True)
    if len(labels) < ways:
        raise UsageError(
            f"ways is {ways}, but the images are of {len(labels)} classes; give images of more classes, or lower it."
        )
    taken, least = shots + queries, int(sizes.min())
    if least < taken:
        number = int(labels[sizes.argmin()])
        raise UsageError(
            f"class {str(number) if names is None else repr(names[number])} has {least} images, fewer than the {taken} "
            f"of an episode ({shots} shots and {queries} queries); lower them, or leave the class out."
        )
    rows = {int(label): (y == label).nonzero()[:, 0] for label in labels}
    drawn = []
    for number in range(count):
        classes = labels[randomness.uniform((), labels, seed=seed, stream=2 * number).argsort(stable=True)[:ways]]
        own = [rows[label] for label in classes.tolist()]
        keys = randomness.uniform((), torch.cat(own), seed=seed, stream=2 * number + 1).split(
            [len(part) for part in own]
        )
        chosen = torch.stack([part[key.argsort(stable=True)[:taken]] for part, key in zip(own, keys)])
        drawn.append(Episode(classes, chosen[:, :shots], chosen[:, shots:]))
    return drawn


def episode_model(
    model: ZeroShotClassifier, classes: Tensor, support: Tensor | None = None, *, text_weight: float = 0.0
) -> ZeroShotClassifier:
    """The model with an episode's classes alone; the tower is shared.

    Args:
        model: with the novel classes; its head's transform applies to them.
        classes: (W,) their numbers.
        support: (W, k, D) embeddings of clean support images; None is zero-shot.
        text_weight: w, how many shots the text counts as.
    """
    head = model.head
    names = [head.names[number] for number in classes.tolist()]
    other = model.with_classes(names)
    if support is not None:  # prototypes lie where the tower's embeddings do: no map for texts applies
        text = head.anchors[classes.to(head.anchors.device)].to(support.dtype)
        prototypes = text_weight * text + support.shape[1] * F.normalize(support.mean(dim=1), dim=1)
        other.head = ClassHead(names, prototypes, scale=float(head.scale)).train(head.training)
    return other


def evaluate_episodes(
    model: ZeroShotClassifier,
    x: Tensor,
    y: Tensor,
    *,
    ways: int = 5,
    shots: int = 0,
    queries: int = 20,
    episodes: int | Sequence[Episode] = 2000,
    attack: str | None = "pgd",
    threat: ThreatModel = PGD_20,
    text_weight: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> EpisodeResult:
    """Clean and robust accuracy over episodes of novel classes.

    Clean images are embedded once, however many the episodes; one seed gives all attacks and models the same ones.
    Published are the default, ``objective="margin"`` in 30 steps of 0.8/255, and ``"autoattack"`` on 100 episodes.

    Args:
        model: with the novel classes, ``trained.with_classes(names)``.
        x, y: (N, 3, H, W) images in [0, 1], and (N,) labels, numbers of the model's classes.
        ways, shots, queries: see :func:`sample_episodes`; 0 shots is zero-shot.
        episodes: how many, or episodes drawn before (``ways``, ``shots`` and ``queries`` are then theirs).
        attack: by name, see :func:`clipdefense.attacks.run`; None for clean accuracy alone.
        threat: its budget; the default is the published PGD-20 at 8/255.
        text_weight: w in the prototypes ``w t + k n(mean f)``, with t the anchor.
        seed, batch_size: of episodes and attack; images a forward.
        progress: told (episodes done, of how many).
        options: of the attack.

    Raises:
        UsageError: images or labels that do not fit, fewer classes than ways, fewer images of a class than an episode
            takes, anchors of another dimension than the tower's, an unknown attack or option.
    """
    check_images(x, channels=model.mean.numel())
    check_labels(y, len(x), len(model.class_names))
    drawn = episodes
    if isinstance(drawn, int):
        names = model.class_names
        drawn = sample_episodes(y, ways=ways, shots=shots, queries=queries, count=drawn, seed=seed, names=names)
    _check_mix(text_weight, drawn)
    attacker = None if attack is None else _Attacker(attack, threat, seed, batch_size, options)
    check_dimension(model)
    features = _features(model, x, drawn, batch_size)
    pool = _from_stored_embeddings(model)
    clean, robust = [], []
    for number, episode in enumerate(drawn):
        support = features[episode.support.to(features.device)] if episode.support.numel() else None
        classifier = episode_model(pool, episode.classes, support, text_weight=text_weight)
        right = _right(classifier, features[episode.query.flatten().to(features.device)], len(episode.classes))
        clean.append(float(right.double().mean()))
        if attacker is not None:
            robust.append(attacker.standing(classifier, x, episode, right.cpu(), number))
        if progress is not None:
            progress(number + 1, len(drawn))
    return EpisodeResult(MeanAccuracy.of(clean), MeanAccuracy.of(robust) if robust else None, attack, threat)


def _from_stored_embeddings(model: ZeroShotClassifier) -> ZeroShotClassifier:
    """The same model, whose ``with_classes`` takes the embeddings in its head, and asks no text tower."""
    pool = copy.copy(model)
    pool.class_encoder = EmbeddingTable(model.class_names, model.head.embeddings)
    return pool


def _check_mix(text_weight: float, drawn: Sequence[Episode]) -> None:
    if len(drawn) < 2:
        raise UsageError(f"episodes has {len(drawn)}; at least 2 are expected, for an interval.")
    if isinstance(text_weight, bool) or not 0 <= text_weight < math.inf:
        raise UsageError(f"text_weight is {text_weight!r}; a number of at least 0 is expected.")
    if text_weight and not all(episode.support.numel() for episode in drawn):
        raise UsageError(f"text_weight is {text_weight} without shots; a zero-shot head is the text alone already.")


def _features(model: ZeroShotClassifier, x: Tensor, drawn: Sequence[Episode], batch_size: int) -> Tensor:
    """(N, D) embeddings of the clean images that an episode takes, on the model's device; the others' rows are 0."""
    used = torch.cat([part.flatten() for episode in drawn for part in episode[1:]]).unique()
    embedder = Embedder(model)
    parts = [predict(embedder, x[rows].to(model.device), batch_size=batch_size) for rows in used.split(batch_size)]
    found = torch.cat(parts)
    return found.new_zeros(len(x), found.shape[1]).index_copy_(0, used.to(found.device), found)


@torch.no_grad()
def _right(classifier: ZeroShotClassifier, features: Tensor, ways: int) -> Tensor:
    """(W q,) whether the head classifies these embeddings, a class after the other, correctly."""
    with full_fp32():
        predicted = classifier.head(features).argmax(dim=1)
    return predicted == _labels(ways, len(features)).to(features.device)


def _labels(ways: int, n: int) -> Tensor:
    return torch.arange(ways).repeat_interleave(n // ways)


class _Attacker:
    """An attack by name, checked before any work."""

    def __init__(self, name: str, threat: ThreatModel, seed: int, batch_size: int, options: dict[str, Any]) -> None:
        function = get_attack(name)
        check_options(function, options, f"option of attack {name!r}", given=4)
        takes_size = "batch_size" in inspect.signature(function).parameters
        size = {"batch_size": batch_size} if takes_size else {}
        self.name, self.threat, self.batch_size = name, threat, batch_size
        self.options = {"seed": seed, **size, **options}

    def standing(
        self, classifier: ZeroShotClassifier, x: Tensor, episode: Episode, right: Tensor, number: int
    ) -> float:
        """Share of an episode's queries that are right, as ``right`` (W q,) says, and stay so."""
        rows, device = episode.query.flatten(), classifier.device
        if not bool(right.any()):
            return 0.0
        images, y = x[rows[right]].to(device), _labels(len(episode.classes), len(rows))[right].to(device)
        ids = (rows[right] + number * len(x)).to(device)  # an image that comes again meets fresh draws
        x_adv = attacks.run(self.name, classifier, images, y, self.threat, ids=ids, **self.options)
        stays = predict(classifier, x_adv, batch_size=self.batch_size).argmax(dim=1) == y
        return float(stays.sum()) / len(rows)
