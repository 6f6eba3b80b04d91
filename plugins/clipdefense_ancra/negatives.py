"""Which image of the batch is each image's negative: a class that is not the image's own, then an image of it.

The class is uniform over the other classes present in the batch, the image uniform over those of that class. Both are
chosen by the smallest of random keys, one a (image, class) and one a (image, candidate): then an image's negative does
not depend on the order of the batch, and another candidate in the batch changes it only by being chosen itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipdefense.errors import UsageError
from clipdefense.randomness import uniform

CLASS_STREAM = 1
_MEMBER_STREAM = 1 << 40  # + the candidate's id


def pick_negatives(y: Tensor, class_keys: Tensor, member_keys: Tensor) -> Tensor:
    """The row of each image's negative: smallest key among the classes present, then among the class's images.

    Args:
        y: (N,) labels.
        class_keys: (N, K), K classes.
        member_keys: (N, N), of image i (row) and candidate j.

    Returns:
        (N,) rows n with ``y[n] != y``.

    Raises:
        UsageError: all images are of one class.
    """
    if not (y != y[0]).any():
        raise UsageError(
            f"y has the one class {int(y[0])} in a batch (or piece of one) of {len(y)} images; ANCRA contrasts each "
            "image with one of another class: shuffle the data, enlarge batch_size, or lower accumulate."
        )
    absent = torch.ones(class_keys.shape[1], dtype=torch.bool, device=y.device).index_fill(0, y, False)
    own = torch.zeros_like(class_keys, dtype=torch.bool).scatter(1, y[:, None], True)
    other = class_keys.masked_fill(absent | own, float("inf")).argmin(dim=1)
    return member_keys.masked_fill(other[:, None] != y[None, :], float("inf")).argmin(dim=1)


def draw_negatives(y: Tensor, ids: Tensor, classes: int, *, seed: int) -> Tensor:
    """:func:`pick_negatives` with keys of (seed, ids) alone.

    Args:
        y: (N,) labels in [0, classes).
        ids: (N,) image ids, distinct.
        classes: K.
        seed: of the draws.
    """
    n = len(y)
    class_keys = uniform((classes,), ids, seed=seed, stream=CLASS_STREAM)
    candidates = ids.to(torch.int64).repeat(n) + _MEMBER_STREAM
    member_keys = uniform((1,), ids.repeat_interleave(n), seed=seed, stream=candidates)
    return pick_negatives(y, class_keys, member_keys.view(n, n))
