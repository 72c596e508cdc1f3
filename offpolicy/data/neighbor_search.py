"""Searches for the nearest of all stored pairs: by a KD-tree, or by products on any device."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.matmul import matmul_setting

TIE = 1.0 + 1e-9  # two float64 distances nearer than this are looked at again


class DistinctPairs(Protocol):
    """What is searched: pairs without repetition, as :class:`offpolicy.data.neighbors.NeighborIndex` keeps them."""

    weight: Tensor
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
    """KD-tree over the first ``width`` columns of the distinct pairs (scipy's: float64, on the CPU)."""

    def __init__(self, index: DistinctPairs, width: int) -> None:
        from scipy.spatial import cKDTree

        self.index, self.weight = index, index.weight[:width].cpu().numpy()
        self.tree = cKDTree(index.columns(width).cpu().numpy().astype(np.float64) * self.weight)

    def levels(self, reach: Tensor) -> list[tuple[Tensor, float]]:
        """Queries grouped by how far they look, in steps of √2 beyond ``reach``: a short look is a cheap one."""
        level = (2.0 * reach.clamp(min=0.125).log2()).floor() + 1.0
        return [((level == step).nonzero()[:, 0], 2.0 ** (step / 2.0)) for step in level.unique().tolist()]

    def nearest(self, key: Tensor, k: int, within: float) -> tuple[Tensor, Tensor]:
        """Items and distances of the k nearest closer than ``within``; -1 and infinity where there are fewer."""
        distance, found = self._query(self._scale(key), k, within)
        return self._items(found), torch.from_numpy(distance).to(self.index.device)

    def finalists(self, key: Tensor, k: int, crowded: bool) -> tuple[Tensor, Tensor]:
        """d² and items of all that are no further than the k-th nearest: (n, C) each, infinity and -1 for none.

        Whether others are as far as the k-th is seen from the next one, which is cheap to find where many pairs are
        about as far (``crowded``), or from a count of all within that distance, where the next one is far away.
        """
        scaled, k = self._scale(key), min(k, self.tree.n)
        distance, found = self._query(scaled, min(k + crowded, self.tree.n), math.inf)
        radius = distance[:, k - 1] * TIE
        if crowded:
            tied = np.flatnonzero(distance[:, -1] <= radius) if k < self.tree.n else np.empty(0, dtype=np.int64)
        else:
            workers = torch.get_num_threads()
            count = self.tree.query_ball_point(scaled, radius, return_length=True, workers=workers)
            tied = np.flatnonzero(count > k)
        lists = [self.tree.query_ball_point(scaled[i], radius[i]) for i in tied]
        width = max([found.shape[1], *map(len, lists)])
        found = np.pad(found, ((0, 0), (0, width - found.shape[1])), constant_values=self.tree.n)
        for i, equal in zip(tied, lists, strict=True):
            found[i] = equal + [self.tree.n] * (width - len(equal))
        items = self._items(found)
        return self.index.squares(key, items), items

    def _scale(self, key: Tensor) -> np.ndarray:
        return key.cpu().numpy() * self.weight

    def _query(self, scaled: np.ndarray, k: int, within: float) -> tuple[np.ndarray, np.ndarray]:
        workers = torch.get_num_threads()
        distance, found = self.tree.query(scaled, range(1, k + 1), distance_upper_bound=within, workers=workers)
        return distance, found.astype(np.int64, copy=False)

    def _items(self, found: np.ndarray) -> Tensor:
        return self.index.numbered(torch.from_numpy(found).to(self.index.device))


class Brute:
    """All distances by products, in pieces, on any device.

    A product ‖x‖² − 2·q·x loses the digits of a distance that is small against ‖x‖, so it only shortlists: groups of
    stored pairs, by the smallest value of each. Their members are compared by direct difference. A bound on the
    rounding error tells for which queries that proves the answer; :meth:`finalists` answers the others by direct
    differences to everything.
    """

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

    def levels(self, reach: Tensor) -> list[tuple[Tensor, float]]:
        """One level: a short look is no cheaper than a long one."""
        return [(torch.arange(len(reach), device=reach.device), math.inf)]

    def nearest(self, key: Tensor, k: int, within: float) -> tuple[Tensor, Tensor]:
        """Items and distances of the k nearest."""
        square, items = self.finalists(key, k)
        items, square = in_order(items, square)
        return items[:, :k], square[:, :k].sqrt()

    def finalists(self, key: Tensor, k: int, crowded: bool = False) -> tuple[Tensor, Tensor]:
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
        piece = (1 << (28 if key.is_cuda else 22)) // len(key) // self.GROUP * self.GROUP or self.GROUP
        found = []
        with torch.autocast(key.device.type, enabled=False), matmul_setting("mkl"):  # plain float32 everywhere
            for points, norm in zip(self.points.split(piece), self.norm.split(piece), strict=True):
                value = torch.addmm(norm.to(dtype), query, points.to(dtype).T, alpha=-2.0)
                value = torch.nn.functional.pad(value, (0, -value.shape[1] % self.GROUP), value=math.inf)
                found.append(value.unflatten(1, (-1, self.GROUP)).amin(-1))
        return torch.cat(found, 1)

    def _everything(self, key: Tensor, k: int) -> Tensor:
        """The items no further than the k-th nearest of one query, by direct differences to all: (1, C)."""
        every = self.index.numbered(torch.arange(len(self.points), device=key.device))
        square = torch.cat([self.index.squares(key, part[None]) for part in every.split(1 << 17)], 1)
        return every[square[0] <= square.kthvalue(k, dim=1).values][None]


def tf32_allowed() -> bool:
    """Whether float32 products on a CUDA device may be rounded to 10 bits."""
    if hasattr(torch.backends, "fp32_precision"):
        return "tf32" in (torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return torch.backends.cuda.matmul.allow_tf32
