"""Every way to search finds what enumeration in float64 finds."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offpolicy.data import neighbors
from offpolicy.data.neighbor_search import Brute, Faster, Tree
from offpolicy.data.neighbors import NeighborIndex
from offpolicy.errors import DataError, UsageError

BETAS = (0.0, 0.25, 1.0, 2.0, 7.5)
# name → (search, options of the index, whether the data lie at the host)
WAYS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tree": ("tree", {}, True),
    "brute": ("brute", {}, True),
    "exact": ("exact", {"candidates": 16}, True),
    "short lists": ("exact", {"candidates": 3}, True),
    "as on a GPU": ("exact", {}, False),
}


def index(obs: Tensor, action: Tensor, beta: float, way: str = "exact", **options: Any) -> NeighborIndex:
    search, fixed, at_host = WAYS[way]
    with patch.object(neighbors, "at_host", lambda device: at_host):
        return NeighborIndex(obs, action, beta, **({"search": search} | fixed | options))


def enumerate_all(obs: Tensor, action: Tensor, beta: float, state: Tensor, query: Tensor, k: int) -> Tensor:
    """All β²‖s − s_i‖² + ‖a − a_i‖² in float64: the first k rows by (distance, row), and their distances."""
    states = (state.double()[:, None] - obs.double()).square().sum(-1)
    square = beta**2 * states + (query.double()[:, None] - action.double()).square().sum(-1)
    square, row = square.sort(dim=1, stable=True)
    return square[:, :k].sqrt(), row[:, :k]


def made(kind: str, n: int, seed: int = 0, s: int = 3, a: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    obs, action = torch.randn(n, s, generator=g), torch.rand(n, a, generator=g) * 2 - 1
    if kind == "lattice":  # many equal distances
        obs, action = (obs * 2).round() / 2, action.round()
    if kind == "few states":  # more equal states than a list holds
        obs = obs[torch.randint(0, n // 40 + 1, (n,), generator=g)]
    if kind == "duplicates":
        again = torch.randint(0, n, (n,), generator=g)
        obs, action = obs[again], action[again]
    if kind == "far from zero":  # the product ‖x‖² − 2·q·x has no digit of these distances in float32
        obs = 300.0 + 0.01 * obs
    return obs, action


def asked(obs: Tensor, action: Tensor, kind: str, seed: int = 1, n: int = 24) -> tuple[Tensor, Tensor]:
    """Rows and actions, from near the stored ones to far from them."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(0, len(obs), (n,), generator=g)
    step = torch.randn(n, action.shape[1], generator=g) * torch.rand(n, 1, generator=g)
    query = (action[row] + step).clamp(-1, 1)
    return row, (query * 2).round() / 2 if kind == "lattice" else query


@pytest.mark.parametrize("kind", ["plain", "lattice", "few states", "duplicates", "far from zero"])
@pytest.mark.parametrize("n", [5, 500])
def test_every_way_equals_enumeration(kind: str, n: int) -> None:
    obs, action = made(kind, n)
    row, query = asked(obs, action, kind)
    for beta, k in itertools.product(BETAS, (1, 4)):
        if k > n:
            continue
        distance, rows = enumerate_all(obs, action, beta, obs[row], query, k)
        for way in WAYS:
            search = index(obs, action, beta, way)
            found = search.query(query, row, k=k)
            where = f"{way}, β = {beta}, k = {k}"
            torch.testing.assert_close(found.distance, distance, rtol=1e-12, atol=1e-12, msg=where)
            torch.testing.assert_close(found.action, action[found.row])
            if k == 1:
                assert torch.equal(found.row, search.own(rows)), where
            elif kind in ("plain", "far from zero"):
                assert torch.equal(found.row, rows), where


@pytest.mark.parametrize("way", WAYS)
def test_known_answer_in_both_precisions(way: str) -> None:
    """Query (s₀, 0.9) with s = 0, 1, 0.2, a = 0.5, 0.9, 0.9.

    β = 0.5: 0.4, 0.5, 0.1 → row 2; its distance is 0.5·0.2.  β = 10: 0.4, 10, 2 → row 0.
    """
    for dtype in (torch.float32, torch.float64):
        obs = torch.tensor([[0.0], [1.0], [0.2]], dtype=dtype)
        action = torch.tensor([[0.5], [0.9], [0.9]], dtype=dtype)
        query, row = torch.tensor([[0.9]], dtype=dtype), torch.tensor([0])
        for beta, nearest, expected in ((0.5, 2, 0.1), (10.0, 0, 0.4)):
            found = index(obs, action, beta, way).query(query, row)
            assert found.row.tolist() == [[nearest]]
            assert float(found.distance) == pytest.approx(expected, rel=1e-6)
            assert found.action.dtype == dtype


@pytest.mark.parametrize("way", WAYS)
def test_equal_distances_go_to_the_lowest_row(way: str) -> None:
    """Actions ±0.5 around 0, in states 0 (asked), ±1: rows 1 and 2 tie, and row 3 equals row 1."""
    obs = torch.tensor([[0.0], [1.0], [-1.0], [1.0], [0.0]])
    action = torch.tensor([[1.0], [0.5], [-0.5], [0.5], [-1.0]])
    search = index(obs, action, 0.1, way)
    found = search.query(torch.zeros(1, 1), torch.tensor([4]), k=3)
    assert found.row.tolist() == [[1, 1, 2]]  # row 1 is stored twice
    assert search.query(torch.zeros(1, 1), torch.tensor([4])).row.tolist() == [[1]]
    assert search.own(torch.tensor([3, 4, 1])).tolist() == [1, 4, 1]


def test_collisions_of_the_hash_merge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "mix", lambda x: torch.zeros_like(x))
    obs, action = made("plain", 50)
    obs, action = torch.cat([obs, obs[:5]]), torch.cat([action, action[:5]])
    search = index(obs, action, 1.0)
    row, query = asked(obs, action, "plain")
    _, rows = enumerate_all(obs, action, 1.0, obs[row], query, 1)
    assert torch.equal(search.query(query, row).row, rows)


# -- remembered rows -------------------------------------------------------------------------------------------------


def listed_reference(obs: Tensor, action: Tensor, beta: float, row: Tensor, query: Tensor, width: int) -> Tensor:
    """The best among each row itself and its `width` nearest others by state."""
    states = (obs[row].double()[:, None] - obs.double()).square().sum(-1)
    states[torch.arange(len(row)), row] = -1.0
    listed = states.argsort(dim=1, stable=True)[:, : width + 1]
    square = beta**2 * states.clamp(min=0) + (query.double()[:, None] - action.double()).square().sum(-1)
    return listed.gather(1, square.gather(1, listed).argmin(1, keepdim=True))


def test_cached_is_the_best_of_the_nearest_states_whatever_came_before() -> None:
    obs, action = made("plain", 400)
    row, far = asked(obs, action, "plain", n=200)
    expected = listed_reference(obs, action, 1.0, row, far, 5)
    near = action[row] + 0.01
    once = index(obs, action, 1.0, search="cached", candidates=5).query(far, row)
    after, ahead = (index(obs, action, 1.0, search="cached", candidates=5) for _ in range(2))
    for part in torch.arange(200).split(17):  # short lists first, made one by one in another order
        after.query(near[part.flip(0)], row[part.flip(0)])
    ahead.build()
    assert torch.equal(once.row, expected)
    for search in (after, ahead):
        again = search.query(far, row)
        assert torch.equal(again.row, expected) and torch.equal(again.certified, once.certified)
    assert 0.0 < once.certified.float().mean() < 1.0


@pytest.mark.parametrize("way", ["exact", "short lists", "as on a GPU"])
@pytest.mark.parametrize("k", [1, 3])
def test_memory_changes_no_bit(way: str, k: int) -> None:
    obs, action = made("plain", 300)
    row, query = asked(obs, action, "plain", n=120)
    fresh = index(obs, action, 2.0, way)
    used, ahead = index(obs, action, 2.0, way), index(obs, action, 2.0, way)
    ahead.build(chunk=64)
    for seed in range(5):
        used.query(asked(obs, action, "plain", seed=10 + seed, n=40)[1], torch.arange(seed, 40 + seed), k=k)
    expected = fresh.query(query, row, k=k)
    for search in (used, ahead, fresh):
        for ours, theirs in zip(search.query(query, row, k=k), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_certified_answers_are_right_and_near_policies_are_certified() -> None:
    obs, action = made("plain", 2000)
    row, query = asked(obs, action, "plain", n=300)
    cached = index(obs, action, 2.0, search="cached", candidates=8).query(query, row)
    _, rows = enumerate_all(obs, action, 2.0, obs[row], query, 1)
    right = (cached.row == rows)[:, 0]
    assert right[cached.certified].all() and 0.2 < cached.certified.float().mean() < 1.0
    assert index(obs, action, 2.0).query(action[row] + 1e-3, row).certified.all()


def test_lists_are_no_longer_than_needed() -> None:
    """States 0, 1, 2, …: an action 0.4 away from the stored one asks for no other state, one 1.2 away for two."""
    obs, action = torch.arange(50.0)[:, None], torch.zeros(50, 1)
    search = NeighborIndex(obs, action, 1.0, candidates=10)
    row = torch.tensor([20])
    search.query(torch.tensor([[0.4]]), row)
    assert not search._lists.any()
    search.query(torch.tensor([[1.2]]), row)
    assert sorted(search._lists[20].tolist()) == [0] * 8 + [20, 22]  # numbers plus one
    search.build()
    assert (search._lists > 0).all() and len(search._lists[0]) == 10


def test_memory_bound() -> None:
    obs, action = made("plain", 200)
    search = NeighborIndex(obs, action, 2.0, candidates=16)
    search.build()
    search.query(action, torch.arange(200), k=20)
    held = [search.points, search._lists, search._length, search._radius]
    assert sum(x.numel() * x.element_size() for x in held) == 4 * 200 * 5 + 200 * (4 * 16 + 6)
    assert search._states.tree.data.nbytes == 8 * 200 * 3
    search.query(action, obs=obs)
    assert search._whole.ways[0].tree.data.nbytes == 8 * 200 * (3 + 2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is resident")
def test_lists_that_nobody_made_take_no_memory() -> None:
    """2 million lists of 64 numbers are 488 MiB."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

    obs, action = torch.arange(2_000_000.0)[:, None], torch.zeros(2_000_000, 1)
    before = resident()
    search = NeighborIndex(obs, action, 1.0)
    assert search._lists.shape == (2_000_000, 64) and resident() - before < 250


def test_columns_of_one_table_are_not_copied() -> None:
    table = torch.cat(made("plain", 100), 1)
    assert NeighborIndex(table[:, :3], table[:, 3:], 2.0).points.data_ptr() == table.data_ptr()
    row, query = asked(table[:, :3], table[:, 3:], "plain")
    wide = torch.cat([table, table.flip(0)], 1)  # with more columns behind them
    found = NeighborIndex(wide[:, :3], wide[:, 3:5], 2.0).query(query, row)
    for obs, action in ((table[:, :3], table[:, 3:].clone()), (wide[:, :3], wide.flip(1)[:, 5:7].flip(1))):
        again = NeighborIndex(obs, action, 2.0)
        assert again.points.data_ptr() != obs.data_ptr()
        assert torch.equal(again.query(query, row).row, found.row)


@pytest.mark.parametrize("longest", [1 << 14, 5])
def test_far_policies_are_answered_from_longer_lists_or_from_a_tree_of_all_pairs(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "LONGEST", longest)
    obs, action = made("plain", 600)
    row, query = asked(obs, action, "plain", n=100)
    search = index(obs, action, 0.25, candidates=3)
    found = search.query(query, row)
    assert not found.certified.all() and (search._whole is None) == (longest > 600)
    assert torch.equal(found.row, enumerate_all(obs, action, 0.25, obs[row], query, 1)[1])


@pytest.mark.parametrize("way", ["tree", "exact"])
def test_turning_the_axes_loses_no_neighbour(way: str) -> None:
    """States near a line, far from zero, with distances of a hundred-thousandth of their size."""
    g = torch.Generator().manual_seed(0)
    line = torch.randn(2000, 1, generator=g, dtype=torch.float64) * torch.randn(1, 12, generator=g, dtype=torch.float64)
    obs = 1000.0 + line + 1e-3 * torch.randn(2000, 12, generator=g, dtype=torch.float64)
    action = 1e-2 * torch.rand(2000, 3, generator=g, dtype=torch.float64)
    row, query = torch.arange(0, 2000, 20), action.flip(0)[::20]
    distance, rows = enumerate_all(obs, action, 1.0, obs[row], query, 3)
    found = index(obs, action, 1.0, way).query(query, row, k=3)
    assert torch.equal(found.row, rows)
    torch.testing.assert_close(found.distance, distance, rtol=1e-9, atol=0.0)


# -- on other devices ------------------------------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a device: shapes and values that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("nonzero", "_local_scalar_dense", "masked_select", "equal", "_unique2"), name
        if name in ("index", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", neighbors.SEARCHES)
@pytest.mark.parametrize("k", [1, 3])
def test_queries_on_a_device_read_nothing_and_equal_those_at_the_host(search: str, k: int) -> None:
    obs, action = made("duplicates", 5000)
    row, query = asked(obs, action, "plain", n=64)
    rows = torch.arange(5000) + 7
    options = {"search": search, "candidates": 8, "rows": rows}
    expected = NeighborIndex(obs, action, 2.0, **options).query(query, row + 7, k=k)
    there = index(obs, action, 2.0, "as on a GPU", **options)
    there.build()
    with NoReads():
        found = there.query(query, row + 7, k=k)
    assert torch.equal(found.row, expected.row) and torch.equal(found.distance, expected.distance)
    assert found.certified is not None
    if search == "cached":
        assert torch.equal(found.certified, expected.certified)
    else:
        assert found.certified.all()  # 2,200 of 5,000 pairs are compared


def test_an_answer_on_a_device_is_certified_only_where_it_is_proven() -> None:
    """More equal distances than pairs compared: the distance is right, the lowest of all rows is not known."""
    ring = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    obs = torch.cat([torch.zeros(1, 3, dtype=torch.float64), ring / ring.norm(dim=1, keepdim=True)])
    action = torch.zeros(len(obs), 1, dtype=torch.float64)
    action[0] = 5.0  # the row asked for is far from its own action
    here, there = (index(obs, action, 1.0, way) for way in ("exact", "as on a GPU"))
    query, row = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])
    found = there.query(query, row)
    assert not found.certified.any()
    torch.testing.assert_close(found.distance, here.query(query, row).distance)
    assert there.query(query + 4.9, row).certified.all()


def test_digits_survive_far_from_zero() -> None:
    """Products of numbers around 300 have no digit of distances around 0.01; those around their mean have."""
    obs, action = made("far from zero", 5000)
    row, query = asked(obs, action, "plain", n=64)
    found = index(obs, 0.01 * action, 1.0, "as on a GPU").query(0.01 * query, row)
    _, rows = enumerate_all(obs, 0.01 * action, 1.0, obs[row], 0.01 * query, 1)
    assert found.certified.all() and torch.equal(found.row, rows)


@pytest.mark.parametrize("search", neighbors.SEARCHES)
def test_the_default_type_of_numbers_does_not_matter(search: str) -> None:
    obs, action = made("plain", 300)
    row, query = asked(obs, action, "plain")
    expected = NeighborIndex(obs, action, 2.0, search=search, candidates=8).query(query, row)
    torch.set_default_dtype(torch.float64)
    try:
        found = NeighborIndex(obs, action, 2.0, search=search, candidates=8).query(query, row)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.row, expected.row) and torch.equal(found.distance, expected.distance)


# -- what a query may be ---------------------------------------------------------------------------------------------


def test_rows_have_the_numbers_they_were_given() -> None:
    obs, action = made("duplicates", 60)
    row, query = asked(obs, action, "plain")
    number = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:60]
    plain, named = index(obs, action, 1.0), index(obs, action, 1.0, rows=number)
    assert torch.equal(named.query(query, number[row]).row, number[plain.query(query, row).row])
    assert torch.equal(named.own(number), number[plain.own(torch.arange(60))])


def test_leading_axes_and_states_that_are_not_stored() -> None:
    obs, action = made("plain", 80)
    row, query = asked(obs, action, "plain", n=12)
    search = index(obs, action, 2.0)
    flat = search.query(query, row, k=2)
    shaped = search.query(query.reshape(3, 4, -1), row.reshape(3, 4), k=2)
    assert shaped.row.shape == (3, 4, 2) and shaped.action.shape == (3, 4, 2, 2) and shaped.certified.shape == (3, 4)
    assert torch.equal(shaped.row.reshape(12, 2), flat.row)
    state = obs[row] + 0.3
    _, rows = enumerate_all(obs, action, 2.0, state, query, 2)
    found = search.query(query, obs=state, k=2)
    assert torch.equal(found.row, rows) and found.certified is None


def test_queries_that_are_not_finite_still_answer() -> None:
    """A policy that diverged gives NaN losses; the search must not end the run in the middle of a block."""
    obs, action = made("plain", 50)
    for way in WAYS:
        for value in (torch.nan, torch.inf):
            found = index(obs, action, 2.0, way).query(torch.full((2, 2), value), torch.tensor([0, 1]))
            assert ((found.row >= 0) & (found.row < 50)).all()


def test_errors_name_what_is_wrong() -> None:
    obs, action = made("plain", 20)
    row = torch.arange(4)
    with pytest.raises(UsageError, match=r"`search` is 'exat'.*Did you mean 'exact'"):
        NeighborIndex(obs, action, 1.0, search="exat")
    with pytest.raises(UsageError, match="`state_weight` is -1"):
        NeighborIndex(obs, action, -1.0)
    with pytest.raises(UsageError, match="`candidates` is 0"):
        NeighborIndex(obs, action, 1.0, candidates=0)
    with pytest.raises(UsageError, match="`state_weight` is 0"):
        NeighborIndex(obs, action, 0.0, search="cached")
    with pytest.raises(UsageError, match="only 2 `candidates`"):
        NeighborIndex(obs, action, 1.0, search="cached", candidates=2).query(action[:4], row, k=3)
    with pytest.raises(UsageError, match="`num_neighbors` is 21"):
        NeighborIndex(obs, action, 1.0).query(action[:4], row, k=21)
    with pytest.raises(UsageError, match="exactly one"):
        NeighborIndex(obs, action, 1.0).query(action[:4])
    with pytest.raises(DataError, match="expected rows that the index"):
        NeighborIndex(obs, action, 1.0).query(action[:4], row + 17)
    with pytest.raises(DataError, match="expected rows that the index"):
        NeighborIndex(obs, action, 1.0, rows=torch.arange(20) * 2).query(action[:4], row + 1)
    with pytest.raises(DataError, match=r"expected \(N, S\)"):
        NeighborIndex(obs, action[:5], 1.0)
    with pytest.raises(DataError, match="NaN"):
        NeighborIndex(obs * torch.nan, action, 1.0)
    with pytest.raises(DataError, match="query's states hold NaN"):
        NeighborIndex(obs, action, 1.0).query(action[:4], obs=obs[:4] * torch.nan)


def test_backends_hold_distinct_pairs_only() -> None:
    obs, action = made("duplicates", 90)
    distinct = len(torch.unique(torch.cat([obs, action], 1), dim=0))
    search = index(obs, action, 1.0)
    assert Tree(search, 5).tree.n == len(Brute(search, 5).points) == search.num_distinct == distinct < 90


@pytest.mark.parametrize("kind", ["lattice", "duplicates"])
def test_tree_and_products_take_turns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever took less time is asked, and every second search the other; the answers stay the same."""
    obs, action = made(kind, 300)
    search, asked_of = Faster(index(obs, action, 2.0), 5), []
    for kind_of_search in (Tree, Brute):
        finalists = kind_of_search.finalists

        def noted(self: Any, *args: Any, finalists: Any = finalists) -> Any:
            asked_of.append(type(self))
            return finalists(self, *args)

        monkeypatch.setattr(kind_of_search, "finalists", noted)
    monkeypatch.setattr(Faster, "WORTH", -1.0)
    monkeypatch.setattr(Faster, "EVERY", 2)
    for seed in range(4):
        row, query = asked(obs, action, kind, seed)
        key = torch.cat([obs[row], query], 1).double()
        square, items = search.finalists(key, 3)
        found, named = search.index.rank(square, items, 3)  # type: ignore[attr-defined]
        distance, _ = enumerate_all(obs, action, 2.0, obs[row], query, 3)
        assert torch.allclose(found.sqrt(), distance, atol=1e-9)
        assert torch.equal(named, index(obs, action, 2.0, "brute").query(query, row, k=3).row)
    assert {Tree, Brute} == set(asked_of)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    obs, action = made("duplicates", 5000)
    row, query = asked(obs, action, "plain", n=256)
    expected = index(obs, action, 2.0).query(query, row, k=3)
    for search in ("exact", "brute", "tree"):
        found = NeighborIndex(obs.cuda(), action.cuda(), 2.0, search=search).query(query.cuda(), row.cuda(), k=3)
        assert torch.equal(found.row.cpu(), expected.row)
