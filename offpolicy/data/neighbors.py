"""Exact nearest neighbours among all stored (state, action) pairs, for queries that start at a stored state.

A query is a stored row i and an action a. It asks for the stored pairs nearest to (s_i, a) in

    d(j)² = β²·‖s_i − s_j‖² + ‖a − a_j‖²          (point-to-set distance of PRDC, arXiv:2306.06569).

Row i itself is at distance ‖a − a_i‖, so only pairs whose *state* lies closer than that can be nearer, and which these
are does not depend on the policy. The index therefore remembers, for each row, the rows nearest by state and the radius
up to which that list is complete. If the best pair of the list is closer than the radius, it is provably the nearest of
all; otherwise the whole store is searched.

Every path ends in the same step: squared distances as direct differences in float64, the lowest row where several are
equal. So all ways to search give the same rows, whatever was searched before and on however many processes.

All this asks how many pairs are left, which costs nothing where the data lie in the memory of the processor. On other
devices the host would have to wait for the answer, so a query there is a fixed row of operations: it reads nothing, and
says of every answer whether it is proven.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.neighbor_search import Brute, Faster, Tree, at_host, in_order, where_false
from offpolicy.data.sampling import mix
from offpolicy.errors import DataError, UsageError, check_range, nearest
from offpolicy.moved import names_of

SEARCHES = ("exact", "cached", "tree", "brute")
SHRINK = 1.0 - 1e-6  # radii are stored as float32 and compared with float64: rounded so that they never overstate
AGAIN = 1.25  # of the distance that a second look at a row needs
MANY, SOME = 512, 256  # pairs per query, and queries, from which on a tree over all pairs is made
LONGEST = 1 << 14  # pairs with near states that are compared before a tree over all pairs is made
CHUNK = 1 << 17  # rows worked on at once where all are
NONE = torch.iinfo(torch.int64).max


class Neighbors(NamedTuple):
    """What a query found, nearest first.

    ``distance (…, B, k)`` float64; ``row (…, B, k)`` int64; ``action (…, B, k, A)``: their stored actions;
    ``certified (…, B)`` bool: proven to be nearest of all, by the remembered rows or, on other devices than the CPU, by
    the rows compared; None where nothing has to be proven.
    """

    distance: Tensor
    row: Tensor
    action: Tensor
    certified: Tensor | None


def side_by_side(obs: Tensor, action: Tensor) -> Tensor:
    """States and actions as one table (N, S + A): no copy where they are columns of one that follow each other."""
    stored, width = obs.untyped_storage(), obs.shape[1] + action.shape[1]
    follow = action.storage_offset() == obs.storage_offset() + obs.shape[1] and obs.stride(1) == 1
    if stored.data_ptr() == action.untyped_storage().data_ptr() and follow and obs.stride() == action.stride():
        return obs.as_strided((len(obs), width), obs.stride())
    return torch.cat([obs, action], -1)


def hashed(points: Tensor) -> Tensor:
    """64 bits for each row of numbers, the same where they are equal."""
    points = points + 0.0  # -0.0 equals 0.0 but has other bits
    code = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for column in points.view(torch.int32 if points.dtype == torch.float32 else torch.int64).unbind(1):
        code = mix(code + column)
    return code


class NeighborIndex:
    """Nearest stored pairs under ‖(β·s, a) − (β·ŝ, â)‖₂.

    Args:
        obs: states, shape (N, S), float32 or float64, in the space where distances are wanted (normalised).
        action: their actions, shape (N, A), scaled to [-1, 1].
        state_weight: β ≥ 0. 0 compares actions only.
        search: "exact": remembered rows, and the whole store where they cannot be proven right. "cached": remembered
            rows only, that is, the best among the ``candidates`` rows nearest by state; the same on every visit.
            "tree" or "brute": the whole store, always, by KD-tree or by products. Three of the four are exact. On other
            devices than the CPU these three are one, by products.
        candidates: K in 1 … 32767, rows remembered for each row besides itself.
        rows: row number of each pair, int64 (N,), by which queries and answers speak; 0 … N-1 when None.

    On the CPU the whole store is searched by a KD-tree unless it is "brute"; "exact" changes to products while these
    take less time, as they do far from the data. Lists are made when a row is first asked for, no longer than that
    query needs, and lengthened when a later one needs more; :meth:`build` makes them ahead. A list costs about one
    KD-tree query at the same distance, which is little near the data, and in many dimensions and far from the data tens
    of milliseconds (``examples/benchmarks/neighbors.py``). Where "exact" cannot prove a list right, it compares all
    pairs with a state near enough; all pairs are searched when these are too many for one query, or hundreds for most.

    Memory in bytes, at most: 4·N·(S + A) for the pairs (8 in float64; none where ``obs`` and ``action`` are columns of
    one table that follow each other), N·(4·K + 6) for the lists (touched as they are made, and only where they are not
    empty), on the CPU 8·N·(2·S + A) plus about 44·N for two KD-trees, of states and of pairs, each made when first
    needed, 4·N·(S + A + 1) for products once "exact" changes to them, and 40·N where pairs repeat or rows have numbers
    of their own. Every process keeps its own.

    On other devices "cached" makes all its lists before the first query, and the others keep none. No query reads a
    value back to the host. Products in float32 choose some thousand pairs per query, which are compared in float64; an
    answer is not ``certified`` where rounding may have hidden a nearer pair among the others, which takes many pairs
    that are as near up to 1e-6 of the largest squared distance.

    Equal pairs count as often as they are stored, but all are named by the lowest of their rows.

    Raises:
        UsageError: an option out of range.  DataError: shapes that do not fit or values that are not finite.
    """

    def __init__(
        self,
        obs: Tensor,
        action: Tensor,
        state_weight: float,
        *,
        search: str = "exact",
        candidates: int = 64,
        rows: Tensor | None = None,
    ) -> None:
        self.check(state_weight, search, candidates)
        if obs.dim() != 2 or action.dim() != 2 or len(obs) != len(action) or not len(obs):
            raise DataError(f"got obs {tuple(obs.shape)} and action {tuple(action.shape)}; expected (N, S) and (N, A).")
        self.points = side_by_side(obs, action.to(obs.dtype))
        if not all(part.isfinite().all() for part in self.points.split(CHUNK)):
            raise DataError("states or actions hold NaN or infinity; expected finite numbers. Clean the data.")
        self.state_weight, self.search, self.candidates = state_weight, search, candidates
        self.state_dim, self.device = obs.shape[1], obs.device
        self.weight = torch.ones(self.points.shape[1], dtype=torch.float64, device=self.device)
        self.weight[: self.state_dim] = state_weight
        self._set_rows(rows)
        self._merge_equal(self.points[:, self.state_dim :] if state_weight == 0.0 else self.points)
        self._at_host = at_host(self.device)
        self._backend: Any = Tree if self._at_host and search != "brute" else Brute
        self._all_pairs: Any = Faster if self._at_host and search == "exact" else self._backend
        self._whole: Any = None  # all pairs, made when first searched
        self._states: Any = None  # their states, made when a list is first wanted
        self._looked = self._compared = 0  # queries that lists did not answer, and the pairs they were compared with
        lists = ("exact", "cached") if self._at_host else ("cached",)
        self._remembers = search in lists and state_weight > 0.0
        if self._remembers:
            n, self._width = len(self.points), min(candidates, max(self.num_distinct - 1, 1))
            # Item numbers plus one, so that untouched memory is zero, means "none" and costs nothing: numpy leaves the
            # zeros to the system, torch writes them.
            self._lists: Tensor = (
                torch.from_numpy(np.zeros((n, self._width), dtype=np.int32))
                if self._at_host
                else torch.zeros(n, self._width, dtype=torch.int32, device=self.device)
            )
            self._length = torch.zeros(n, dtype=torch.int16, device=self.device)
            self._radius = torch.zeros(n, dtype=torch.float32, device=self.device)
            self._complete = False

    @staticmethod
    def check(state_weight: float, search: str, candidates: int, k: int = 1) -> None:
        """Raise :class:`UsageError` for options that are out of range or do not go together."""
        check_range("state_weight", state_weight, 0.0)
        check_range("candidates", candidates, 1, torch.iinfo(torch.int16).max)
        check_range("num_neighbors", k, 1)
        if search not in SEARCHES:
            raise UsageError(f"`search` is {search!r}; expected one of {SEARCHES}.{nearest(search, SEARCHES)}")
        if search == "cached" and state_weight == 0.0:
            raise UsageError("`search` 'cached' looks among nearest states, but `state_weight` is 0. Use 'exact'.")
        if search == "cached" and k > candidates:
            raise UsageError(f"`num_neighbors` is {k} but only {candidates} `candidates` are looked at. Raise those.")

    def _set_rows(self, rows: Tensor | None) -> None:
        n = len(self.points)
        self._rows = self._item_of = None
        if rows is None or bool((rows == torch.arange(n, device=rows.device)).all()):
            return
        self._rows = rows.to(self.device)
        self._item_of = torch.full((int(rows.max()) + 1,), -1, device=self.device)
        self._item_of[self._rows] = torch.arange(n, device=self.device)

    def _merge_equal(self, points: Tensor) -> None:
        """Find pairs that are stored more than once: how often, the lowest of each, and the distinct ones."""
        n = len(points)
        self._lowest = self._count = self._distinct = None
        code = torch.cat([hashed(part) for part in points.split(CHUNK)])
        code, order = code.sort(stable=True)
        new = torch.ones(n, dtype=torch.bool, device=self.device)
        new[1:] = code[1:] != code[:-1]
        if new.all():
            return
        first = order[new][new.cumsum(0) - 1]  # lowest item with this code, in sorted order
        same = torch.cat([(points[o] == points[f]).all(-1) for o, f in zip(order.split(CHUNK), first.split(CHUNK))])
        self._lowest = torch.arange(n, device=self.device)
        self._lowest[order] = torch.where(same, first, order)
        self._count = torch.bincount(self._lowest, minlength=n)
        self._distinct = self._count.nonzero()[:, 0]

    def columns(self, width: int) -> Tensor:
        """The first columns of the distinct pairs, (U, width), not scaled."""
        return self.points[:, :width] if self._distinct is None else self.points[self._distinct, :width]

    def numbered(self, place: Tensor) -> Tensor:
        """Items of places among the distinct pairs; -1 for places beyond the last."""
        beyond = place >= self.num_distinct
        if self._distinct is not None:
            place = self._distinct[place.clamp(max=self.num_distinct - 1)]
        return place.masked_fill(beyond, -1)

    @property
    def num_distinct(self) -> int:
        """U, pairs that differ."""
        return len(self.points if self._distinct is None else self._distinct)

    def __len__(self) -> int:
        """Number of pairs, N."""
        return len(self.points)

    # -- questions -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query(self, action: Tensor, row: Tensor | None = None, *, obs: Tensor | None = None, k: int = 1) -> Neighbors:
        """The k stored pairs nearest to (state, action).

        Args:
            action: (…, B, A).
            row: the stored row that each state is, int64 (…, B).
            obs: instead of ``row``, states that need not be stored, (…, B, S); always searches the whole store.
            k: neighbours, 1 ≤ k ≤ N.

        Raises:
            UsageError: k out of range, or not exactly one of ``row`` and ``obs``.
            DataError: a row not in the index, or states that are not finite (seen on the CPU alone).
        """
        self.check(self.state_weight, self.search, self.candidates, k)
        check_range("num_neighbors", k, 1, len(self))
        if (row is None) == (obs is None):
            raise UsageError("a query needs either `row` or `obs`; pass exactly one of them.")
        shape = action.shape[:-1]
        action = action.detach().reshape(-1, action.shape[-1]).to(self.device, torch.float64)
        action = action.nan_to_num(0.0, posinf=1e9, neginf=-1e9)  # a diverged policy: any finite answer will do
        if row is None:
            assert obs is not None
            state = obs.reshape(-1, self.state_dim).to(self.device, torch.float64)
            if self._at_host and not state.isfinite().all():
                raise DataError("a query's states hold NaN or infinity; expected finite numbers. Clean the data.")
            square, found, certified = self._search(torch.cat([state, action], 1), k)
        else:
            item, key = self._start(row.reshape(-1))
            own = (key[:, self.state_dim :] - action).square_().sum(1)
            key[:, self.state_dim :] = action
            if self._remembers:
                square, found, certified = self._recall(key, item, own, k)
            else:
                square, found, certified = self._search(key, k, own.sqrt() if k == 1 else None)
        return Neighbors(
            square.sqrt().reshape(*shape, k),
            (found if self._rows is None else self._rows[found]).reshape(*shape, k),
            self.points.index_select(0, found.reshape(-1))[:, self.state_dim :].reshape(*shape, k, -1),
            None if certified is None else certified.reshape(shape),
        )

    def own(self, row: Tensor) -> Tensor:
        """The row by which answers would name each of these rows: the lowest equal one."""
        if self._lowest is None:
            return row.to(self.device)
        item = self._start(row.reshape(-1))[0].reshape(row.shape)
        return item if self._rows is None else self._rows[item]

    def build(self, chunk: int = 4096) -> None:
        """Make all full lists now, and on other devices than the CPU what the first query would make."""
        if self._remembers:
            for place in torch.arange(self.num_distinct, device=self.device).split(chunk):
                reach = torch.full(place.shape, math.inf, dtype=torch.float64, device=self.device)
                self._fill(self.numbered(place), reach)
            self._complete = True
        elif not self._at_host:
            self._whole = self._whole or self._all_pairs(self, self.points.shape[1])

    def _start(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest items of these rows and the pairs stored there, in float64."""
        try:
            item = row.to(self.device)
            if self._item_of is not None:
                item = self._item_of.index_select(0, item)
            if self._lowest is not None:
                item = self._lowest.index_select(0, item)
            return item, self.points.index_select(0, item).double()
        except IndexError:
            found = f"{int(row.min())} to {int(row.max())}"
            raise DataError(f"asked for rows {found}; expected rows that the index was made of.") from None

    # -- remembered rows -----------------------------------------------------------------------------------------------

    def _recall(self, key: Tensor, item: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distances and items from the lists, then from the whole store where the lists prove nothing.

        ``own (n,)`` is d² of each item itself.
        """
        if not (self._at_host or self._complete):
            self.build()
        square, found = self._from_lists(key, item, own, k)
        radius = self._radius.index_select(0, item)
        certified = square[:, -1].sqrt() < radius
        if self.search == "cached" and self._complete:
            return square, found, certified
        rest = where_false(certified)
        while len(rest) and not self._complete:
            short = rest[self._length[item[rest]] < self._width]
            if not len(short):
                break
            # Look as far as the k-th best pair known, a little further again so that a third look is rare; and further
            # and further while fewer than k are known.
            reach = square[short, -1].sqrt() * torch.where(radius[short] > 0.0, AGAIN, 1.0)
            further = torch.maximum(2.0 * radius[short], square[short, 0].sqrt())
            rows, place = item[short].unique(return_inverse=True)  # one list for a row that is asked for twice
            reach = torch.where(reach.isfinite(), reach, further)
            self._fill(rows, reach.new_zeros(len(rows)).scatter_reduce_(0, place, reach, "amax"))
            square[short], found[short] = self._from_lists(key[short], item[short], own[short], k)
            radius[short] = self._radius[item[short]]
            certified = square[:, -1].sqrt() < radius
            rest = where_false(certified)
        if self.search == "exact" and len(rest) and self._whole is None:
            parts = rest.split(16)  # of queries whose candidates are held at once
            rest = torch.cat([self._look_longer(part, key, square, found, k) for part in parts])
            if self._compared > MANY * self._looked > MANY * SOME:  # a tree of all pairs finds them faster
                self._whole = self._all_pairs(self, self.points.shape[1])
        if self.search == "exact" and len(rest):
            square[rest], found[rest], _ = self._search(key[rest], k, square[rest, -1].sqrt())
        return square, found, certified

    def _look_longer(self, rest: Tensor, key: Tensor, square: Tensor, found: Tensor, k: int) -> Tensor:
        """Answer queries from all pairs with a state as near as the best known; those with too many are returned.

        It takes about as long as a search of all pairs and no second tree.
        """
        longest = min(LONGEST, self.num_distinct)
        near, *_ = self._states.nearest(key[rest, : self.state_dim], longest, square[rest, -1].sqrt())
        full = (near[:, -1] >= 0) & (longest < self.num_distinct)
        number = (near >= 0).sum(1)
        self._looked, self._compared = self._looked + len(rest), self._compared + int(number.sum())
        near = near[:, : int(number.max())]
        square[rest], found[rest] = self.rank(self.squares(key[rest], near), near, k)
        return rest[full]

    def _from_lists(self, key: Tensor, item: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest among the items themselves and their lists: d² and items, (n, k) each."""
        if k > 1 or not self._at_host:
            listed = torch.cat([item[:, None], self._lists.index_select(0, item).long() - 1], 1)
            return self.rank(self.squares(key, listed), listed, k)
        some = self._length.index_select(0, item).nonzero()[:, 0]
        if not len(some):
            return own[:, None].clone(), item[:, None].clone()  # the caller writes into them
        lists = self._lists.index_select(0, item.index_select(0, some))
        query, place = lists.nonzero(as_tuple=True)
        other, query = lists[query, place].long() - 1, some.index_select(0, query)
        square = self.square(key.index_select(0, query), other)
        best = own.scatter_reduce(0, query, square, "amin")
        other.masked_fill_(square != best.index_select(0, query), NONE)
        found = item.masked_fill(own != best, NONE).scatter_reduce_(0, query, other, "amin")
        return best[:, None], found[:, None]

    def _fill(self, item: Tensor, reach: Tensor) -> None:
        """List the rows nearest to these by state: all as near as ``reach`` (n,), or as many as a list holds."""
        if self._states is None:
            self._states = self._backend(self, self.state_dim)
        key, width = self.points[item, : self.state_dim].double(), min(self._width + 1, self.num_distinct)
        near, distance, within = self._states.nearest(key, width, reach)
        last, everything = distance[:, -1], width == self.num_distinct
        radius = torch.where(last.isfinite(), math.inf if everything else last, within) - self._states.slack
        self._radius[item] = (radius * SHRINK).clamp(min=0.0).float()
        missing = (near < 0) | (near == item[:, None])
        length = (~missing).sum(1).clamp(max=self._width).short()
        if self._at_host:  # rows of zeros are zeros already: memory that is not touched costs nothing
            some = length.nonzero()[:, 0]
            item, near, missing, length = item[some], near[some], missing[some], length[some]
        order = missing.sort(dim=1, stable=True).indices[:, : self._width]
        self._lists[item] = (near.masked_fill(missing, -1).gather(1, order) + 1).int()
        self._length[item] = length

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _search(self, key: Tensor, k: int, bound: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The k nearest of all, which lie within ``bound (n,)``, and which answers are proven where not all are."""
        if self._whole is None:
            self._whole = self._all_pairs(self, self.points.shape[1])
        if not self._at_host:
            square, listed, proven = self._whole.shortlist(key, k)
            return *self.rank(square, listed, k), proven
        square, listed = self._whole.finalists(key, k, bound)
        return *self.rank(square, listed, k), None

    def square(self, key: Tensor, item: Tensor) -> Tensor:
        """d² of keys (…, D), or (…, S) for states alone, to items (…): direct differences in float64."""
        points, weight = self.points[:, : key.shape[-1]], self.weight[: key.shape[-1]]
        stored = points.index_select(0, item.reshape(-1)).unflatten(0, item.shape)
        return stored.double().sub_(key).mul_(weight).square_().sum(-1)

    def squares(self, key: Tensor, listed: Tensor) -> Tensor:
        """d² of keys (n, D) or (n, S) to listed items (n, C), infinite where the item is -1: float64 (n, C)."""
        if not self._at_host:
            return self.square(key[:, None], listed.clamp(min=0)).masked_fill_(listed < 0, math.inf)
        query, place = (listed >= 0).nonzero(as_tuple=True)
        result = torch.full(listed.shape, math.inf, dtype=torch.float64, device=self.device)
        result[query, place] = self.square(key.index_select(0, query), listed[query, place])
        return result

    def rank(self, square: Tensor, listed: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of listed items, the lowest first among equal ones: d² and items, (n, k) each.

        An item that is stored m times takes m places. Where fewer than k are listed, d² is infinite.
        """
        if k == 1:
            best = square.amin(1, keepdim=True)
            return best, listed.masked_fill(square != best, NONE).amin(1, keepdim=True)
        listed, square = in_order(listed, square)
        if self._count is None:
            width = listed.shape[1]
            place = torch.arange(k, device=self.device).expand(len(listed), k)
        else:
            stored = torch.where(square.isfinite(), self._count[listed.clamp(min=0)], 0).cumsum(1)
            wanted = torch.arange(k, device=self.device).repeat(len(listed), 1)
            width, place = listed.shape[1], torch.searchsorted(stored, wanted, right=True)
        missing, place = place >= width, place.clamp(max=width - 1)
        return square.gather(1, place).masked_fill(missing, math.inf), listed.gather(1, place)


__getattr__ = names_of("offpolicy.data.neighbors")  # the names that stood here in version 0.1
