"""Counter-hash sampling: known numbers, laws, and independence of how the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offpolicy.data import sampling

MASK = (1 << 64) - 1
ROWS = torch.arange(16)


def splitmix_finaliser(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_mix_equals_unsigned_arithmetic(values: list[int]) -> None:
    mixed = sampling.mix(torch.tensor(values)).tolist()
    assert [m & MASK for m in mixed] == [splitmix_finaliser(v & MASK) for v in values]


def test_splitmix64_stream() -> None:
    """The first two outputs of splitmix64 from state 0, as published: 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4."""
    word = sampling.mix((torch.arange(2) + 1) * sampling._GOLDEN)
    assert [w & MASK for w in word.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**62), st.integers(1, 40), st.integers(1, 39), st.integers(1, 4))
def test_any_cut_of_updates_and_rows_gives_the_same(seed: int, updates: int, cut: int, ranks: int) -> None:
    """Blocks of updates and slices of rows are slices of one table of numbers."""
    steps, rows = torch.arange(1, updates + 1), torch.arange(4 * ranks)
    whole = sampling.normals(sampling.keys(seed, "noise", steps), rows, (3,))
    parts = [
        torch.cat([sampling.normals(sampling.keys(seed, "noise", s), r, (3,)) for r in rows.split(4)], dim=1)
        for s in steps.split(cut)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_seeds_are_one_more_axis() -> None:
    steps = torch.arange(1, 6)
    together = sampling.bits(sampling.keys([3, 7], "index", steps), ROWS)
    assert together.shape == (5, 2, 16)
    for i, seed in enumerate((3, 7)):
        assert torch.equal(together[:, i], sampling.bits(sampling.keys(seed, "index", steps), ROWS))


def test_streams_updates_and_seeds_differ() -> None:
    steps = torch.arange(1, 4)
    words = [
        sampling.bits(sampling.keys(seed, stream, steps), ROWS).flatten()
        for seed in (0, 1, 2**63 - 1, 2**64 - 1)
        for stream in ("index", "target", 5)
    ]
    assert len(torch.cat(words).unique()) == 4 * 3 * 3 * 16


def test_indices_are_uniform_and_in_range() -> None:
    """Chi-square over 100 cells of 100,000 indices; n is no power of two."""
    keys = sampling.keys(0, "index", torch.arange(1, 101))
    index = sampling.uniform_indices(keys, torch.arange(1000), 700).flatten()
    assert index.min() == 0 and index.max() == 699 and index.dtype == torch.int64
    assert stats.chisquare(np.bincount(index.numpy() // 7, minlength=100)).pvalue > 0.01
    huge = sampling.uniform_indices(keys, torch.arange(1000), 2**50)
    assert huge.min() >= 0 and 2**49 < huge.max() < 2**50


def test_normals_are_standard_and_uncorrelated() -> None:
    x = sampling.normals(sampling.keys(0, "target", torch.arange(1, 201)), torch.arange(256), (3,))
    assert x.shape == (200, 256, 3) and x.dtype == torch.float32
    assert stats.kstest(x.double().flatten().numpy(), "norm").pvalue > 0.01
    flat = x.double()
    for shifted in (flat[1:] * flat[:-1], flat[:, 1:] * flat[:, :-1], flat[..., 1:] * flat[..., :-1]):
        assert abs(shifted.mean()) < 4 / shifted.numel() ** 0.5


def test_uniforms() -> None:
    x = sampling.uniforms(sampling.keys(1, "u", torch.arange(1, 101)), torch.arange(256), (2, 2))
    assert x.shape == (100, 256, 2, 2) and x.min() >= 0.0 and x.max() < 1.0
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 0.01


def test_extreme_bits_stay_finite_and_inside() -> None:
    words = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert (sampling.unit(words) < 1.0).all() and (sampling.unit(words) >= 0.0).all()


@pytest.mark.parametrize("n", [1, 2, 97])
def test_permutation_covers_every_row_once(n: int) -> None:
    epochs = [sampling.permutation(3, epoch, n).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in epochs)
    assert n < 97 or len({tuple(order) for order in epochs}) == 3
