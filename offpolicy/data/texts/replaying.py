"""Which answers of earlier iterations are used again (option ``replay``): rules over the store of answers.

A rule says what stays in the store, how likely each group of it is drawn, which of its answers are used, and what of it
new groups get. All of it is a function of the store alone, so that a run goes on exactly from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from offpolicy.data import sampling
from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import (
    DERIVED,
    OWN,
    group_rows,
    iteration_of,
    merged_answers,
    ordered,
    recent,
    select_answers,
)
from offpolicy.data.texts.sequences import runs
from offpolicy.errors import check_range

OF_GROUPS = ("advantage", "left_out", "weight")  # columns that compare an answer with its group


@dataclass(frozen=True)
class Recent:
    """Groups of the last ``replay_window`` iterations, each as likely as any other."""

    name: ClassVar[str] = "recent"
    draws: ClassVar[bool] = True  # whether ``replay_fraction`` says how many groups are drawn

    def stays(self, store: Replay | None, oldest: int) -> Replay | None:
        """What is left of the store; ``oldest``: the first iteration of the window."""
        return recent(store, oldest)

    def weights(self, store: Replay, names: np.ndarray) -> np.ndarray | None:
        """How likely each of the groups is drawn next to the others, (G,) ≥ 0; None for equally."""
        return None

    def used(self, store: Replay) -> np.ndarray:
        """The answers that a drawn group brings, (E,) bool."""
        return np.ones(store.num_episodes, bool)

    def completed(self, fresh: Replay, store: Replay | None) -> tuple[Replay, int]:
        """The new groups with what they get of the store, before they are compared, and how many answers that is."""
        return fresh, 0

    def drawn(self, store: Replay | None, count: int, sweeps: int, seed: int, iteration: int) -> list[np.ndarray]:
        """For every sweep the replayed groups, without replacement: ``count`` of them, or all that may be drawn."""
        names = np.empty(0, np.int64) if store is None else np.unique(store.episodes["group"])
        weights = None if store is None else self.weights(store, names)
        if weights is None:
            return [ordered(names, seed, f"replay {sweep}", iteration)[:count] for sweep in range(sweeps)]
        return [weighted(names, weights, seed, f"replay {sweep}", iteration)[:count] for sweep in range(sweeps)]


@dataclass(frozen=True)
class ByAdvantage(Recent):
    """Groups are drawn with a probability in proportion to their mean |A|, and bring the answers with A ≠ 0.

    The selective sample buffer of Skywork R1V2 (arXiv:2504.16656), which draws answers; here groups stay whole. That
    the probability is in proportion to |A| itself is unverified.
    """

    name: ClassVar[str] = "ssb"

    def weights(self, store: Replay, names: np.ndarray) -> np.ndarray | None:
        return group_means(store, np.abs(store.episodes["advantage"]), names)

    def used(self, store: Replay) -> np.ndarray:
        return np.asarray(store.episodes["advantage"] != 0)


@dataclass(frozen=True)
class BySuccess(Recent):
    """Groups are drawn by their success rate p, ∝ exp(−(p − ½)²/(2σ²)), and bring their likeliest right answer.

    After ExGRPO (arXiv:2510.02245): medium problems first, of each the answer with the lowest entropy, here the largest
    mean log-probability under the policy that drew it. Groups that are all right or all wrong are never drawn. The
    answer keeps the advantage of its own group, while the authors put it among new answers; σ is unverified.

    Args:
        sigma: σ > 0.
        success: reward from which an answer is right.
    """

    sigma: float = 1.0
    success: float = 1.0

    name: ClassVar[str] = "exgrpo"

    def __post_init__(self) -> None:
        check_range("sigma", self.sigma, 0.0, lower_open=True)
        check_range("success", self.success)

    def weights(self, store: Replay, names: np.ndarray) -> np.ndarray | None:
        rate = group_means(store, store.episodes["reward"] >= self.success, names)
        return np.where((rate > 0) & (rate < 1), np.exp(-((rate - 0.5) ** 2) / (2 * self.sigma**2)), 0.0)

    def used(self, store: Replay) -> np.ndarray:
        right = store.episodes["reward"] >= self.success
        if not store.num_episodes:
            return right
        mean = np.add.reduceat(to_numpy(store.steps["logp"]).astype(np.float64), store.start) / store.length
        rank = np.where(right, np.nan_to_num(mean, nan=-np.inf), -np.inf)
        first = np.zeros(store.num_episodes, bool)
        first[[rows[np.argmax(rank[rows])] for rows in group_rows(store).values()]] = True
        return first & right


@dataclass(frozen=True)
class Successes(Recent):
    """A new group without any right answer gets a stored one of the same problem in place of its last answers.

    R³ (2026, by its summary): the advantages of the group then tell them apart. The newest successes of each problem
    stay, whatever ``replay_window`` says. The ratio of a stored answer is to the policy that drew it. The paper's
    reflection prompts and its ranking of failed answers are not here.

    Args:
        inject: answers that a group gets, ≥ 1; at least one of its own stays.
        per_problem: successes of a problem that stay, ≥ 1.
        success: reward from which an answer is right.
    """

    inject: int = 1
    per_problem: int = 8
    success: float = 1.0

    name: ClassVar[str] = "r3"
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("inject", self.inject, 1)
        check_range("per_problem", self.per_problem, 1)
        check_range("success", self.success)

    def stays(self, store: Replay | None, oldest: int) -> Replay | None:
        if store is None:
            return None
        right = (store.episodes["reward"] >= self.success) & (store.episodes["source"] == OWN)
        rows = np.flatnonzero(right)
        rows = rows[np.argsort(-store.episodes["policy_version"][rows], kind="stable")]  # the newest first
        prompt, digest = store.episodes["prompt"][rows], store.episodes["digest"][rows]
        _, first = np.unique(np.stack([prompt, digest]), axis=1, return_index=True)
        rows = rows[np.sort(first)]
        keep = np.zeros(store.num_episodes, bool)
        keep[rows[place_among_equals(store.episodes["prompt"][rows]) < self.per_problem]] = True
        return select_answers(store, keep)

    def completed(self, fresh: Replay, store: Replay | None) -> tuple[Replay, int]:
        if store is None:
            return fresh, 0
        of_prompt = group_rows(store, "prompt")
        own = fresh.episodes["source"] == OWN
        keep, taken, into = np.ones(fresh.num_episodes, bool), [], []
        for name, rows in group_rows(fresh).items():
            mine = rows[own[rows]]
            known = of_prompt.get(int(fresh.episodes["prompt"][mine[0]])) if len(mine) else None
            if known is None or (fresh.episodes["reward"][mine] >= self.success).any():
                continue
            known = known[np.argsort(-store.episodes["policy_version"][known], kind="stable")]
            count = min(self.inject, len(known), len(mine) - 1)
            keep[mine[len(mine) - count :]] = False
            taken += known[:count].tolist()
            into += [name] * count
        if not taken:
            return fresh, 0
        whole = merged_answers(select_answers(fresh, keep), _copied(store, taken, into, fresh))
        return gathered_answers(whole, np.argsort(whole.episodes["group"], kind="stable")), len(taken)


def _copied(store: Replay, rows: Sequence[int], groups: Sequence[int], fresh: Replay) -> Replay:
    """Stored answers as members of new groups."""
    part = gathered_answers(store, np.asarray(rows))
    part.episodes["group"] = np.asarray(groups, np.int64)
    part.episodes["iteration"] = np.full(len(rows), iteration_of(fresh)[0], np.int64)
    return part


def gathered_answers(store: Replay, rows: np.ndarray) -> Replay:
    """These answers in this order, a row as often as it stands there, without the columns of an earlier iteration."""
    length = store.length[rows]
    index = runs(store.start[rows], length)
    return Replay(
        {k: to_numpy(v)[index] for k, v in store.steps.items() if k not in (*DERIVED, "base_logp")},
        start=np.cumsum(length) - length,
        length=length,
        episodes={k: v[rows] for k, v in store.episodes.items() if k not in OF_GROUPS},
    )


def place_among_equals(values: np.ndarray) -> np.ndarray:
    """How often a value stood before, (n,)."""
    order = np.argsort(values, kind="stable")
    first = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0])[: len(values)])
    place = np.arange(len(values)) - np.repeat(first, np.diff(np.append(first, len(values))))
    found = np.empty(len(values), np.int64)
    found[order] = place
    return found


def group_means(store: Replay, values: np.ndarray, names: np.ndarray) -> np.ndarray:
    """The mean of numbers of answers, (E,), over each of these groups, (G,)."""
    place = np.searchsorted(names, store.episodes["group"])
    return np.bincount(place, values, len(names)) / np.maximum(np.bincount(place, minlength=len(names)), 1)


def weighted(names: np.ndarray, weights: np.ndarray, seed: int, stream: str, iteration: int) -> np.ndarray:
    """Groups in a random order, drawn one after the other in proportion to their weights; those of weight 0 never.

    By the exponential clocks −ln u/w of Efraimidis and Spirakis, of which u is a hash of seed, stream, iteration and
    the number of the group.
    """
    key = sampling.keys(seed, stream, torch.tensor([iteration], device="cpu"))[0]
    u = sampling.unit(sampling.bits(key, torch.from_numpy(names))).numpy()
    kept = np.flatnonzero(weights > 0)
    clock = -np.log1p(-u[kept]) / weights[kept]
    return names[kept[np.argsort(clock, kind="stable")]]


RULES: dict[str, type[Recent]] = {rule.name: rule for rule in (Recent, ByAdvantage, BySuccess, Successes)}
