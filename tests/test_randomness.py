"""The counter-based draws: distribution, independence of everything they must not depend on."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clipdefense import randomness


def test_uniform_is_uniform() -> None:
    u = randomness.uniform((3, 16, 16), torch.arange(300), seed=0).flatten().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    # the low bits too
    low = (u * 2**24).astype(np.int64) & 0xFF
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-3


def test_normal_is_normal() -> None:
    z = randomness.normal((3, 16, 16), torch.arange(300), seed=0).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_images_seeds_and_streams_are_independent() -> None:
    ids = torch.arange(40)
    draws = [
        randomness.uniform((4096,), ids, seed=0),
        randomness.uniform((4096,), ids, seed=1),
        randomness.uniform((4096,), ids, seed=0, stream=1),
    ]
    rows = torch.cat(draws).double().numpy()
    correlation = np.abs(np.corrcoef(rows) - np.eye(len(rows)))
    assert correlation.max() < 5.5 / np.sqrt(4096)  # 5.5 sigma over 7,140 pairs


def test_neighbouring_pixels_are_independent() -> None:
    u = randomness.uniform((4096,), torch.arange(50), seed=3).double()
    a, b = u[:, :-1].flatten().numpy(), u[:, 1:].flatten().numpy()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


@settings(deadline=None, max_examples=25)
@given(
    ids=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**62),
    stream=st.integers(-5, 2**40),
)
def test_an_image_alone_gets_what_it_gets_in_a_batch(ids: list[int], seed: int, stream: int) -> None:
    batch = randomness.uniform((2, 3, 3), torch.tensor(ids), seed=seed, stream=stream)
    for row, name in enumerate(ids):
        alone = randomness.uniform((2, 3, 3), torch.tensor([name]), seed=seed, stream=stream)
        assert torch.equal(batch[row], alone[0])


def test_large_seeds_differ_in_the_high_word_alone() -> None:
    ids = torch.arange(2)
    assert not torch.equal(randomness.uniform((8,), ids, seed=5), randomness.uniform((8,), ids, seed=5 + 2**32))
    assert not torch.equal(randomness.uniform((8,), ids, seed=5), randomness.uniform((8,), ids + 2**32, seed=5))


def test_same_values_in_every_dtype() -> None:
    ids = torch.arange(3)
    single = randomness.uniform((5,), ids, seed=9)
    double = randomness.uniform((5,), ids, seed=9, dtype=torch.float64)
    assert torch.equal(single.double(), double)
