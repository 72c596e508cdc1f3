"""SPEAR — Qin et al. 2025, Learn the Ropes, Then Trust the Wins: Self-imitation with Progressive Exploration
(arXiv:2509.22601).

J = J_GRPO + γ(t)·J_replay. Beside the steps on new answers (advantage R − μ, clipped at 1 − 0.2 and 1 + 0.28), answers
with a positive advantage are stored. Once more than 1.5 times the capacity of them have a reward above P50, the median
of the mean rewards of recent groups, they come back: what is older than ``tolerate`` iterations is dropped, the
advantage becomes R − P50, those below 0 go, and of n that are left 2^⌊log₂ n⌋, at most the capacity, make one extra
pass with the ratio to the policy that drew them and Clip-Cov. Then the store is empty.

    γ(t) = γ·(1 − cos(πt/T))/2 up to iteration T, then γ.

As in the authors' code (7e84315) there is no division by the deviation and no divergence, and three quarters of the
groups are learned from, those whose rewards differ most. Differences: the sum over tokens is divided by the number of
answers too (``aggregation`` "sum_over_T" is the code's), the extra pass is cut into steps of ``batch_size``
answers, and at most four times the capacity is stored. The reward for calling tools and its decay are not here:
answers call none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.data.texts.replaying import gathered_answers
from offpolicy.data.texts.rollouts import OWN, iteration_of, merged_answers, ordered, select_answers
from offpolicy.errors import UsageError, check_range
from offpolicy.language.rl.rollouts import RolloutModule

ROOM = 4  # times the capacity: what is stored at most


class SPEAR(RolloutModule):
    """GRPO that imitates its own successes, more and more.

    Args:
        gamma: γ ≥ 0, the coefficient of the extra pass once the ramp is over.
        ramp: T ≥ 1, iterations until then; 100 and 200 in the authors' scripts.
        capacity: answers of an extra pass at most, ≥ 1; 2048 in the authors' scripts.
        baseline: recent groups of whose mean rewards P50 is the median, ≥ 1; 10240.
        tolerate: iterations that an answer may be older than the newest stored one when they come back, ≥ 0; 5.
        clip: how far the ratio may go below 1, in [0, 1].
        clip_high: how far above 1, ≥ 0.
        aggregation: "dr_grpo", or "sum_over_T" as in the authors' code.
        entropy: coefficient ≥ 0 of the entropy bonus.
        filter: as of all methods that learn from their own answers.
    """

    own_columns = frozenset({"weight"})

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        ramp: int = 100,
        capacity: int = 2048,
        baseline: int = 10240,
        tolerate: int = 5,
        clip: float = 0.2,
        clip_high: float = 0.28,
        aggregation: str = "dr_grpo",
        entropy: float = 0.0,
        filter: Any = ({"name": "spread", "keep": 0.75},),
        **rollouts: Any,
    ) -> None:
        super().__init__(filter=list(filter) if isinstance(filter, tuple) else filter, **rollouts)
        for name, value, least in (("gamma", gamma, 0.0), ("entropy", entropy, 0.0), ("tolerate", tolerate, 0)):
            check_range(name, value, least)
        for name, value in (("ramp", ramp), ("capacity", capacity), ("baseline", baseline)):
            check_range(name, value, 1)
        if self.hparams.replay_fraction or self.hparams.replay != "recent" or self.hparams.demonstrations:
            raise UsageError(
                "SPEAR has a store of successes of its own; expected `replay_fraction` 0, `replay` 'recent' and "
                "`demonstrations` 0. Leave them out, or choose GRPO."
            )
        self.save_hyperparameters()
        self.hparams.filter = list(filter) if isinstance(filter, tuple) else filter
        self.objective = self.compose()

    def prepare_state(self) -> None:
        super().prepare_state()
        self.means: list[float] = []  # of recent groups
        self.came_back = 0  # the iteration in which answers came back last

    def parts(self) -> dict[str, Any]:
        h = self.hparams
        return {
            "advantage": "dr_grpo",
            "trust": {"name": "replayed_clip_cov", "low": h.clip, "high": h.clip_high},
            "aggregation": h.aggregation,
            "weight": ("stored",),
            "entropy": {"name": "bonus", "coef": h.entropy} if h.entropy else "none",
        }

    def coefficient(self, iteration: int) -> float:
        """γ(t)."""
        h = self.hparams
        return h.gamma * (1 - math.cos(math.pi * min(iteration, h.ramp) / h.ramp)) / 2

    def before_iteration(self, iteration: int, store: Replay | None) -> Replay | None:
        if store is None or self.came_back == iteration - 1:
            return None
        facts = store.episodes
        keep = (facts["advantage"] > 0) & (facts["source"] == OWN) & (facts["group"] >= 0)
        keep &= ~facts.get("left_out", np.zeros_like(keep))
        rows = np.flatnonzero(keep)[-ROOM * self.hparams.capacity :]  # the newest stand last
        return select_answers(store, np.isin(np.arange(len(keep)), rows))

    def extended(self, store: Replay, iteration: int) -> tuple[Replay, dict[str, float]]:
        """The store with the answers that come back, as groups with negative numbers."""
        h, facts = self.hparams, store.episodes
        facts["weight"] = np.ones(store.num_episodes)
        now = iteration_of(store) == iteration
        _, index = np.unique(facts["group"][now], return_inverse=True)
        means = np.bincount(index, facts["reward"][now]) / np.bincount(index)
        self.means = [*self.means, *means.tolist()][-h.baseline :]
        rows = self._chosen(store, iteration, float(np.median(self.means)))
        said = {"spear/stored": float((facts["advantage"] > 0).sum()), "spear/came_back": float(len(rows))}
        if not len(rows):
            return store, said
        self.came_back = iteration
        part = gathered_answers(store, rows)
        part.episodes["advantage"] = facts["reward"][rows] - float(np.median(self.means))
        part.episodes["weight"] = np.full(len(rows), self.coefficient(iteration))
        part.episodes["group"] = -1 - np.arange(len(rows))
        part.episodes["iteration"] = np.minimum(iteration_of(store)[rows], iteration - 1)
        return merged_answers(store, part), said

    def _chosen(self, store: Replay, iteration: int, level: float) -> np.ndarray:
        """The rows that come back in this iteration, in their order; none while the store is not full enough."""
        h, facts = self.hparams, store.episodes
        stored = (facts["advantage"] > 0) & (facts["source"] == OWN)
        stored &= ~facts.get("left_out", np.zeros_like(stored))
        if (stored & (facts["reward"] > level)).sum() <= 1.5 * h.capacity:
            return np.empty(0, np.int64)
        asked = iteration_of(store)
        rows = np.flatnonzero(stored & (asked >= asked[stored].max() - h.tolerate) & (facts["reward"] >= level))
        count = min(h.capacity, 1 << (len(rows).bit_length() - 1)) if len(rows) else 0
        return rows[ordered(np.arange(len(rows)), self.seed or 0, "spear", iteration)[:count]]

    def _plan_steps(self, store: Replay, k: int, old: Sequence[np.ndarray]) -> list[np.ndarray]:
        back = np.flatnonzero(store.episodes["group"] < 0)
        size = self.hparams.batch_size
        return [*super()._plan_steps(store, k, old), *(back[i : i + size] for i in range(0, len(back), size))]

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {"spear": {"means": self.means, "came_back": self.came_back}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.means, self.came_back = list(state["spear"]["means"]), state["spear"]["came_back"]
