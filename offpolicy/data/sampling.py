"""Sampling as a pure function of (seed, update, stream, row in the global batch).

There is no generator and no state: every index and every noise value is a hash of counters, computed by tensor
operations that give the same integers on every device. So a run resumes from one integer, the number of updates drawn
at once never matters, and a process that takes a slice of the rows draws exactly what one process would have drawn.
The hash is the finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    """A 64-bit constant as the signed integer torch wants."""
    constant &= (1 << 64) - 1
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic, so the copied sign bits are masked away."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Hash int64 values to int64 values, elementwise (a bijection with good avalanche)."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def stream_id(name: str) -> int:
    """A stable number for a named stream, so that streams do not depend on the order in which they are declared."""
    return zlib.crc32(name.encode())


def seed_values(seeds: Sequence[int] | int, device: torch.device) -> Tensor:
    """Seeds as a tensor that :func:`keys` takes without a copy from the host: int64, () for one seed, (S,) for several.

    Args:
        seeds: one seed, or a sequence of S seeds.
        device: where keys are wanted.
    """
    values = [_signed(seed) for seed in ([seeds] if isinstance(seeds, int) else seeds)]
    found = torch.tensor(values, dtype=torch.int64, device=device)
    return found[0] if isinstance(seeds, int) else found


def keys(seeds: Sequence[int] | int | Tensor, stream: int | str, steps: Tensor) -> Tensor:
    """One 64-bit key per update, and per seed when several are given.

    Args:
        seeds: one seed, or a sequence of S seeds (adds an axis); or what :func:`seed_values` made of them.
        stream: number or name of what is drawn ("index", "target", …).
        steps: int64 update numbers, shape (K,).

    Returns:
        int64, shape (K,) for one seed and (K, S) for a sequence.
    """
    stream = stream_id(stream) if isinstance(stream, str) else stream
    values = seeds if isinstance(seeds, Tensor) else seed_values(seeds, steps.device)
    key = mix(mix(values.reshape(-1) * _GOLDEN + stream) + steps[:, None] * _GOLDEN)
    return key if values.dim() else key[:, 0]


def bits(key: Tensor, counter: Tensor) -> Tensor:
    """Independent 64-bit words, shape ``key.shape + counter.shape``, for counters ≥ 0."""
    key = mix(key).reshape(key.shape + (1,) * counter.dim())
    return mix(key + (counter + 1) * _GOLDEN)


def uniform_indices(key: Tensor, rows: Tensor, n: int) -> Tensor:
    """Uniform integers in [0, n), one per row; n < 2^53.  Shape ``key.shape + rows.shape``."""
    return (unit(bits(key, rows)) * n).long()


def unit(word: Tensor) -> Tensor:
    """64 random bits as a float64 in [0, 1), from the upper 53."""
    return _shift_right(word, 11).double() * 2.0**-53


def uniforms(key: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Float64 uniforms in [0, 1), shape ``key.shape + rows.shape + shape``."""
    size = math.prod(shape)
    counter = rows[:, None] * size + torch.arange(size, device=rows.device)
    return unit(bits(key, counter)).reshape(*key.shape, len(rows), *shape)


def normals(key: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Float32 standard normals by Box-Muller on the two 32-bit halves, shape as :func:`uniforms`; at most 6.66."""
    size = math.prod(shape)
    pairs = (size + 1) // 2
    counter = rows[:, None] * pairs + torch.arange(pairs, device=rows.device)
    word = bits(key, counter)
    radius_bits = _shift_right(word, 32).float() + 1.0  # in [1, 2^32], so that the logarithm is finite
    radius = radius_bits.mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = word.bitwise_and_(0xFFFFFFFF).float().mul_(2.0 * math.pi * 2.0**-32)
    both = torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)], dim=-1)[..., :size]
    return both.reshape(*key.shape, len(rows), *shape)


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A permutation of [0, n) on the host that depends on (seed, epoch) only: rows sorted by their hash."""
    key = keys(seed, "permutation", torch.tensor([epoch], device="cpu"))[0]
    return torch.argsort(bits(key, torch.arange(n, device="cpu")), stable=True)
