"""Counts as people write them."""

from __future__ import annotations


def counted(n: int, what: str) -> str:
    """``"1 image"``, ``"2 images"``.

    Args:
        n: how many.
        what: of what, in the singular; words that follow the noun are the caller's.
    """
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
