"""Counter-based random numbers: each draw is a pure function of (seed, stream, image id, position).

A draw therefore depends on neither the batch an image happens to sit in, nor the device, nor how often a global
generator was used before: the same image gets the same noise alone, in a batch, after a resume and on another shard.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


def _mix(h: Tensor) -> Tensor:
    """The 32-bit avalanche finaliser of MurmurHash3, in wrapping int32 arithmetic (torch has no unsigned shift).

    Overwrites h, which saves passes over memory: a batch's draws are as large as its images.
    """
    shifted = h >> 16
    h ^= shifted.bitwise_and_(0xFFFF)
    h *= _signed(0x85EBCA6B)
    torch.bitwise_right_shift(h, 13, out=shifted)
    h ^= shifted.bitwise_and_(0x7FFFF)
    h *= _signed(0xC2B2AE35)
    torch.bitwise_right_shift(h, 16, out=shifted)
    h ^= shifted.bitwise_and_(0xFFFF)
    return h


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 32-bit words of int64 values, as int32 with the same bits."""
    low, high = value & _WORD, (value >> 32) & _WORD
    return tuple((half - ((half >> 31) << 32)).to(torch.int32) for half in (low, high))  # type: ignore[return-value]


def _keys(ids: Tensor, seed: int, stream: int | Tensor) -> tuple[Tensor, Tensor]:
    """Two independent 32-bit keys an image, shape (N,) each."""
    ids = ids.to(torch.int64)
    streams = stream if isinstance(stream, Tensor) else torch.full_like(ids, stream)
    parts = [*_halves(ids), *_halves(torch.full_like(ids, seed)), *_halves(streams)]
    keys = []
    for salt in (0x243F6A88, 0x85A308D3):
        key = torch.full_like(parts[0], _signed(salt))
        for part in parts:
            key = _mix((key ^ part) + _signed(_GOLDEN))
        keys.append(key)
    return keys[0], keys[1]


def _words(shape: tuple[int, ...], ids: Tensor, seed: int, stream: int | Tensor) -> Tensor:
    """Uniform 32-bit words, shape (N, prod(shape))."""
    first, second = _keys(ids, seed, stream)
    position = torch.arange(math.prod(shape), device=ids.device, dtype=torch.int64)
    counter = position * _signed(_GOLDEN) & _WORD
    counter = (counter - ((counter >> 31) << 32)).to(torch.int32)
    words = _mix(counter[None, :] + first[:, None])
    words ^= second[:, None]
    return _mix(words)


def uniform(
    shape: tuple[int, ...], ids: Tensor, *, seed: int, stream: int | Tensor = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform draws in [0, 1), multiples of 2^-24.

    Args:
        shape: shape of one image's draw.
        ids: (N,) integer image ids; the result lies on their device.
        seed: the run's seed.
        stream: what the draw is for (a restart, a step, an EOT draw), one for all or (N,) int64; other streams are
            independent.
        dtype: of the result; the values are the same in each.

    Returns:
        Tensor of shape (N, *shape).
    """
    words = _words(shape, ids, seed, stream)
    words >>= 8
    words &= 0xFFFFFF
    return words.to(dtype).mul_(2.0**-24).view(ids.shape[0], *shape)


def normal(
    shape: tuple[int, ...], ids: Tensor, *, seed: int, stream: int | Tensor = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal draws (Box-Muller on two uniform streams), shape (N, *shape); arguments as :func:`uniform`."""
    u = uniform((2, *shape), ids, seed=seed, stream=stream, dtype=dtype)
    radius = (-2 * torch.log1p(-u[:, 0])).sqrt()
    return radius * torch.cos(2 * math.pi * u[:, 1])


def draw_seed(generator: torch.Generator) -> int:
    """One 62-bit seed from a torch generator: how a caller's generator enters the counter-based draws."""
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
