"""Searches for the nearest of all stored pairs: by a KD-tree, or by products on any device."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.matmul import matmul_setting

TIE = 1.0 + 1e-9  # two float64 distances nearer than this are looked at again


class DistinctPairs(Protocol):
    """What is searched: pairs without repetition, as :class:`offpolicy.data.neighbors.NeighborIndex` keeps them."""

    weight: Tensor
    state_dim: int
    device: torch.device

    @property
    def num_distinct(self) -> int: ...

    def columns(self, width: int) -> Tensor:
        """The first columns of the pairs."""

    def numbered(self, place: Tensor) -> Tensor:
        """The items at places in :meth:`columns`."""

    def squares(self, key: Tensor, listed: Tensor) -> Tensor:
        """d² of queries (n, C) and the items listed for each."""


def at_host(device: torch.device) -> bool:
    """Whether values there can be looked at without waiting for them."""
    return device.type == "cpu"


def where_false(mask: Tensor) -> Tensor:
    """Where a mask (n,) is false."""
    return mask.logical_not().nonzero()[:, 0]


def in_order(listed: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Items and their d², both (n, C), by distance and, where that is equal, by number."""
    listed, order = listed.sort(dim=1)
    square, order = square.gather(1, order).sort(dim=1, stable=True)
    return listed.gather(1, order), square


class Tree:
    """KD-tree over the first ``width`` columns of the distinct pairs (scipy's: float64, on the CPU).

    States and actions are each turned to their principal axes first. Distances stay what they are, up to ``slack``, and
    boxes of correlated columns become thin: trajectories like those of a robot are found 1.4 to 3 times as fast
    (``examples/benchmarks/neighbors.py``).
    """

    GROUPS = 4  # of queries that look about as far, as scipy takes one bound for all

    def __init__(self, index: DistinctPairs, width: int) -> None:
        from scipy.spatial import cKDTree

        self.index, self.weight = index, index.weight[:width]
        columns = index.columns(width)
        self.centre, self.axes = self._principal(columns, index.state_dim)
        data = torch.empty(len(columns), width, dtype=torch.float64, device="cpu")
        for i in range(0, len(columns), 1 << 16):  # no second copy of the data at any time
            data[i : i + (1 << 16)] = self._turned(columns[i : i + (1 << 16)].double())
        # rounding of a turned distance, twice over
        self.slack = 4.0 * width * torch.finfo(torch.float64).eps * float(data.square().sum(1).max().sqrt())
        self.tree = cKDTree(data.numpy())

    def nearest(self, key: Tensor, k: int, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items and distances of the k nearest, (n, k) each; -1 and infinity where there are fewer.

        ``reach (n,)`` is how far each query looks, and the last of what is returned how far it did, a little further:
        all that is nearer was found. Distances are turned ones, so right up to ``slack``.
        """
        n, scaled, reach_ = len(key), self._turned(key).numpy(), reach.numpy() * (1.0 + 1e-5) + 2.0 * self.slack
        distance, found, within = np.empty((n, k)), np.empty((n, k), dtype=np.int64), np.empty(n)
        for part in np.array_split(reach_.argsort(), min(self.GROUPS, n)):
            within[part] = bound = reach_[part[-1]]
            distance[part], found[part] = self.tree.query(
                scaled[part], range(1, k + 1), distance_upper_bound=bound, workers=torch.get_num_threads()
            )
        return self.index.numbered(torch.from_numpy(found)), torch.from_numpy(distance), torch.from_numpy(within)

    def finalists(self, key: Tensor, k: int, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """d² and items of all that are no further than the k-th nearest: (n, C) each, infinity and -1 for none.

        ``bound (n,)`` are distances within which k are known to lie.
        """
        k = min(k, self.tree.n)
        if bound is None:
            bound = torch.from_numpy(
                self.tree.query(self._turned(key).numpy(), [k], workers=torch.get_num_threads())[0][:, 0]
            )
        items, distance, _ = self.nearest(key, k + 1, self._reach(bound))
        tied = (distance[:, k] <= self._reach(distance[:, k - 1])).nonzero()[:, 0].tolist()
        if tied:
            items = self._with_ties(items, key, k, tied)
        return self.index.squares(key, items), items

    def _with_ties(self, items: Tensor, key: Tensor, k: int, tied: list[int]) -> Tensor:
        """The finalists where for some queries others are as far as the k-th."""
        scaled = self._turned(key[tied])
        kth = torch.from_numpy(self.tree.query(scaled.numpy(), [k])[0][:, 0])
        lists = self.tree.query_ball_point(scaled.numpy(), self._reach(kth).numpy())
        width = max(items.shape[1], *map(len, lists))
        items = torch.nn.functional.pad(items, (0, width - items.shape[1]), value=-1)
        for i, equal in zip(tied, lists, strict=True):
            items[i] = -1
            items[i, : len(equal)] = self.index.numbered(torch.tensor(equal, device="cpu"))
        return items

    def _reach(self, distance: Tensor) -> Tensor:
        """How far something may seem that is as far as this."""
        return distance * TIE + 2.0 * self.slack

    def _principal(self, columns: Tensor, state_dim: int) -> tuple[Tensor, Tensor]:
        """Mean and principal axes of scaled columns, of states and of actions by themselves."""
        some = columns[:: max(1, len(columns) >> 16)].double() * self.weight
        centre, width = some.mean(0), columns.shape[1]
        axes = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        for block in (slice(0, state_dim), slice(state_dim, width)):
            part = some[:, block] - centre[block]
            axes[block, block] = torch.linalg.eigh(part.T @ part).eigenvectors
        return centre, axes

    def _turned(self, key: Tensor) -> Tensor:
        return (key * self.weight - self.centre) @ self.axes


class Brute:
    """All distances by products, in pieces, on any device.

    A product ‖x‖² − 2·q·x loses the digits of a distance that is small against ‖x‖, so it only shortlists: groups of
    stored pairs, by the smallest value of each. Their members are compared by direct difference. A bound on the
    rounding error tells for which queries that proves the answer; :meth:`finalists` answers the others by direct
    differences to everything.
    """

    slack = 0.0  # distances are direct differences
    GROUP = 64
    SPARE = 32  # groups beyond the k that could hold one neighbour each

    def __init__(self, index: DistinctPairs, width: int) -> None:
        self.index, self.weight = index, index.weight[:width]
        parts = index.columns(width).split(1 << 17)
        sums = torch.stack([part.sum(0, dtype=torch.float64) for part in parts])
        self.centre = sums.sum(0) / index.num_distinct  # distances do not depend on it, digits do
        self.points = torch.cat([(part.double() - self.centre).float() for part in parts])
        parts = self.points.split(1 << 17)
        self.norm = torch.cat([(part.double() * self.weight).square().sum(1) for part in parts]).float()
        self.largest = self.norm.max().double().sqrt()

    def nearest(self, key: Tensor, k: int, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items and distances of the k nearest, and that no query ended before: a short look is no cheaper."""
        square, items = self.finalists(key, k)
        items, square = in_order(items, square)
        return items[:, :k], square[:, :k].sqrt(), torch.full_like(reach, math.inf)

    def finalists(self, key: Tensor, k: int, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """d² and items of a shortlist that holds all no further than the k-th nearest: (n, C), -1 for none."""
        k = min(k, len(self.points))
        square, items, proven = self.shortlist(key, k, 3)
        rest = where_false(proven).tolist()
        if rest:
            every = [self._everything(key[i : i + 1], k) for i in rest]
            width = max(items.shape[1], *(found.shape[1] for found in every))
            items = torch.nn.functional.pad(items, (0, width - items.shape[1]), value=-1)
            for i, found in zip(rest, every, strict=True):
                items[i] = torch.nn.functional.pad(found[0], (0, width - found.shape[1]), value=-1)
            square = self.index.squares(key, items)
        return square, items

    def shortlist(self, key: Tensor, k: int, spare: int = SPARE) -> tuple[Tensor, Tensor, Tensor]:
        """d² and items of the best groups, (n, C) each, and whether all no further than the k-th are in them, (n,)."""
        k = min(k, len(self.points))
        groups = min(k + spare, -(-len(self.points) // self.GROUP))
        fit = (1 << 24) // (groups * self.GROUP * key.shape[1])  # queries whose shortlists are held at once
        parts = [self._best_groups(part, k, groups) for part in key.split(max(1, min(fit, 1024)))]
        square, items, proven = (torch.cat(column) for column in zip(*parts))
        return square, items, proven

    def _best_groups(self, key: Tensor, k: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        lowest = self._lowest_of_groups(key)
        best = lowest.topk(min(groups + 1, lowest.shape[1]), dim=1, largest=False, sorted=True)
        place = (best.indices[:, :groups, None] * self.GROUP + torch.arange(self.GROUP, device=key.device)).flatten(1)
        items = self.index.numbered(place)
        square = self.index.squares(key, items)
        if groups == lowest.shape[1]:
            return square, items, torch.ones(len(key), dtype=torch.bool, device=key.device)
        kth = square.kthvalue(k, dim=1).values
        length = ((key - self.centre) * self.weight).norm(dim=1)
        error = (key.shape[1] + 8) * 2.0**-24 * (length + self.largest).square()
        return square, items, kth < best.values[:, -1].double() + length.square() - error

    def _lowest_of_groups(self, key: Tensor) -> Tensor:
        """Smallest ‖x‖² − 2·q·x of each group of consecutive pairs: (n, U) products → (n, U / GROUP)."""
        dtype = torch.float64 if key.is_cuda and tf32_allowed() else torch.float32
        query = ((key - self.centre) * self.weight.square()).to(dtype)
        numbers = 1 << (28 if key.is_cuda else 19)  # of products held at once; on the CPU they stay in its cache
        piece = numbers // len(key) // self.GROUP * self.GROUP or self.GROUP
        found = []
        with torch.autocast(key.device.type, enabled=False), matmul_setting("mkl"):  # plain float32 everywhere
            for points, norm in zip(self.points.split(piece), self.norm.split(piece), strict=True):
                value = torch.addmm(norm.to(dtype), query, points.to(dtype).T, alpha=-2.0)
                if short := -value.shape[1] % self.GROUP:
                    value = torch.nn.functional.pad(value, (0, short), value=math.inf)
                found.append(value.unflatten(1, (-1, self.GROUP)).amin(-1))
        return torch.cat(found, 1)

    def _everything(self, key: Tensor, k: int) -> Tensor:
        """The items no further than the k-th nearest of one query, by direct differences to all: (1, C)."""
        every = self.index.numbered(torch.arange(len(self.points), device=key.device))
        square = torch.cat([self.index.squares(key, part[None]) for part in every.split(1 << 17)], 1)
        return every[square[0] <= square.kthvalue(k, dim=1).values][None]


class Faster:
    """A KD-tree or products, whichever took less processor time per query lately; both give the same answers.

    A tree is the faster where queries are near what is stored, products where they are far from it: in many dimensions
    a tree then looks at most of its leaves. What is slower at present is asked now and then, as policies move.
    """

    WORTH = 3e-9  # seconds per query and stored pair, below which products are not even made
    EVERY = 64  # searches, of which one asks the slower

    def __init__(self, index: DistinctPairs, width: int) -> None:
        self.index, self.width, self.searches = index, width, 0
        self.ways: list[Any] = [Tree(index, width)]
        self.seconds = [0.0]  # per query, when last asked

    def finalists(self, key: Tensor, k: int, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of :class:`Tree`."""
        if len(self.ways) == 1 and self.seconds[0] > self.WORTH * self.index.num_distinct:
            self.ways.append(Brute(self.index, self.width))
            self.seconds.append(0.0)
        self.searches += 1
        faster = self.seconds.index(min(self.seconds))
        way = faster if self.searches % self.EVERY else len(self.ways) - 1 - faster
        began = time.process_time()
        found = self.ways[way].finalists(key, k, bound)
        self.seconds[way] = (time.process_time() - began) / len(key)
        return found


def tf32_allowed() -> bool:
    """Whether float32 products on a CUDA device may be rounded to 10 bits."""
    if hasattr(torch.backends, "fp32_precision"):
        return "tf32" in (torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return torch.backends.cuda.matmul.allow_tf32
