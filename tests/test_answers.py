"""What a model says, and that the image it was asked about is the clean one plus a perturbation that can be stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.evaluation import Row
from clipdefense.evaluation.answers import ask

THREAT = cd.ThreatModel("linf", 2 / 255, steps=4)
pixels = st.one_of(
    st.floats(0, 1, width=32),
    st.floats(0, 2**-20, width=32),
    st.integers(0, 255).map(lambda v: float(np.float32(v / 255))),
)


class Table(nn.Module):
    """Logits that are written down."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0, 0, 0].long()] + 0 * x.sum()


def test_predictions_and_margins_by_hand() -> None:
    x = torch.arange(3.0)[:, None, None, None]
    model = Table([[1.0, 4.0, 2.0], [0.5, 0.25, 0.0], [-1.0, -3.0, -1.5]])
    answers = ask(model, x, torch.tensor([1, 1, 2], dtype=torch.int32), torch.arange(3), range(7, 8), batch_size=2)
    assert answers.predicted.tolist() == [[1, 0, 0]]
    assert answers.margin.tolist() == [[2.0, -0.25, -0.5]]
    with pytest.raises(cd.UsageError, match=r"y has labels in \[0, 3\]; \[0, 2\] is expected"):
        ask(model, x, torch.tensor([0, 1, 3]), torch.arange(3), range(1), batch_size=8)


@given(st.lists(st.tuples(pixels, pixels), min_size=1, max_size=50))
def test_a_stored_perturbation_gives_the_judged_image_back(pairs: list[tuple[float, float]]) -> None:
    x, wanted = torch.tensor(pairs).unbind(dim=1)
    judged = x + (wanted - x)
    assert torch.equal(x + (judged - x), judged)
    assert judged.min() >= 0 and judged.max() <= 1
    # next to what the attack asked for
    torch.testing.assert_close(judged, wanted, atol=1e-7, rtol=2e-7)


def test_each_row_is_told_with_the_images_that_were_judged(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    told: list[tuple[Row, Tensor]] = []
    attacks = ["pgd,steps=1", "apgd-ce,steps=3"]
    result = cd.evaluate(
        tiny_model,
        images,
        labels,
        THREAT,
        attacks=attacks,
        cumulative=True,
        keep_adversarial=True,
        on_row=lambda row, x_adv: told.append((row, x_adv)),
    )
    assert tuple(row for row, _ in told) == result.rows
    assert result.clean.answers is not None and result.worst_case().answers is None
    for row, x_adv in [(result.clean, images), *told]:
        assert row.answers is not None
        assert torch.equal(images + (x_adv - images), x_adv)
        with torch.no_grad():
            logits = tiny_model(x_adv)
        right = logits.gather(1, labels[:, None])[:, 0]
        other = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        assert row.answers.predicted.tolist() == [logits.argmax(dim=1).tolist()]
        np.testing.assert_allclose(row.answers.margin[0], (right - other).numpy(), atol=1e-4)
        if row is not result.clean:
            assert row.adversarial is not None and torch.equal(row.adversarial, x_adv)
    # of a cumulative row the answers are those to its own images, `correct` counts those before it
    assert (told[1][0].correct <= told[0][0].correct).all()


def test_parts_join_with_all_that_was_said(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    ids = torch.arange(12)
    whole = cd.evaluate(tiny_model, images, labels, THREAT, attacks=["pgd"], ids=ids)
    parts = [
        cd.evaluate(tiny_model, images[part], labels[part], THREAT, attacks=["pgd"], ids=ids[part])
        for part in (slice(0, 5), slice(5, 12))
    ]
    joined = cd.evaluation.Evaluation.joined(parts)
    for ours, theirs in zip((joined.clean, *joined.rows), (whole.clean, *whole.rows)):
        assert ours.answers is not None and theirs.answers is not None
        assert ours.answers.predicted.tolist() == theirs.answers.predicted.tolist()
        np.testing.assert_allclose(ours.answers.margin, theirs.answers.margin, atol=1e-4)
    assert joined.rows[0].steps is not None and whole.rows[0].steps is not None
    assert joined.rows[0].steps.tolist() == whole.rows[0].steps.tolist()
