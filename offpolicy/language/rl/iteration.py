"""Which iteration a run is in, the answers that the iteration learns from, and the steps it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as store_of
from offpolicy.data.texts.replaying import Recent
from offpolicy.data.texts.rollouts import BoundRollouts
from offpolicy.language.rl.rows import counted_length, whole_length

Mixture = Callable[[int], tuple[float, int]]  # iteration from 1 → share of replayed answers, sweeps


class Shape:
    """How many groups an iteration has, and into how many steps it is cut.

    Args:
        batch_size: answers of an optimiser step.
        group_size: answers of a group.
        minibatches: steps of a sweep.
        window: iterations back from which replayed answers may come.
        mixture: of each iteration.
    """

    def __init__(self, batch_size: int, group_size: int, minibatches: int, window: int, mixture: Mixture) -> None:
        self.answers, self.group_size = batch_size * minibatches, group_size
        self.minibatches, self.window, self.mixture = minibatches, window, mixture

    @property
    def groups(self) -> int:
        """Of an iteration."""
        return self.answers // self.group_size

    def replayed(self, fraction: float) -> int:
        """Groups of an iteration that are not fresh; the rest, (1 − p)·B answers, is."""
        return round(fraction * self.answers / self.group_size)

    def schedule(self) -> Iterator[tuple[int, int]]:
        """Optimiser steps, and problems answered, after every iteration, as long as no answers are forgotten early."""
        steps = 0
        fresh: list[int] = []  # groups of each iteration
        for k in count(1):
            fraction, sweeps = self.mixture(k)
            old = min(self.replayed(fraction), sum(fresh[-self.window :]))
            steps += self.minibatches * (sweeps if old or not fraction else 1)
            fresh.append(self.groups - old)
            yield steps, sum(fresh)


class Course:
    """Where a run stands.

    Attributes:
        iteration: the one whose steps are being made, from 1; 0 before the first.
        problems_seen: problems answered so far.
        generated: answers written so far.
        first_step: of the iteration.
        steps: the rows of the store that each of its steps takes.
        rollouts: the store with its problems; None before the first iteration.
        counted: tokens of each answer of the store that count in the loss.
        whole: likewise in the part of the loss that trains a critic.
    """

    def __init__(self) -> None:
        self.iteration, self.problems_seen, self.generated = 0, 0, 0
        self.first_step = 0
        self.lay_out([], None)
        self._facts: dict[str, list[float]] = {}  # of iterations since the last row: sum, count

    def lay_out(self, steps: list[np.ndarray], rollouts: BoundRollouts | None) -> None:
        """Take the steps of the iteration, and the answers that their rows stand for."""
        self.steps, self.rollouts = steps, rollouts
        none = np.zeros(0, np.int64)
        self.counted, self.whole = (
            none if rollouts is None else length(rollouts.store) for length in (counted_length, whole_length)
        )

    def begins(self, step: int) -> bool:
        """Whether this is the first step of the iteration, so that the policy is still π_k."""
        return step == self.first_step

    def is_over(self, step: int) -> bool:
        """Whether the iteration has made its steps once that many were made in all."""
        return step >= self.first_step + len(self.steps)

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step of the iteration."""
        return self.steps[step - self.first_step]

    def note(self, facts: Mapping[str, float]) -> None:
        """Keep the facts of an iteration for the next row of metrics."""
        for name, value in facts.items():
            pair = self._facts.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + value, pair[1] + 1.0

    def read(self) -> dict[str, float]:
        """The means of the facts since the last call; starts anew."""
        facts, self._facts = self._facts, {}
        return {name: total / number for name, (total, number) in facts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "first_step": self.first_step,
            "steps": len(self.steps),
            "problems_seen": self.problems_seen,
            "generated": self.generated,
            "facts": self._facts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.first_step = state["iteration"], state["first_step"]
        self.problems_seen, self.generated = state["problems_seen"], state["generated"]
        self._facts = {name: list(pair) for name, pair in state["facts"].items()}


def replayed_now(store: Replay, k: int, shape: Shape, seed: int, rule: Recent) -> list[np.ndarray]:
    """For every sweep the replayed groups of an iteration that a checkpoint stopped in the middle of."""
    asked = store_of.iteration_of(store)
    fraction, sweeps = shape.mixture(k)
    wanted = shape.groups - len(np.unique(store.episodes["group"][asked == k]))
    old = rule.drawn(store_of.select_answers(store, asked < k), wanted, sweeps, seed, k)
    return sweeps_of(old, bool(wanted), fraction)


def sweeps_of(old: Sequence[np.ndarray], mixed: bool, fraction: float) -> list[np.ndarray]:
    """The sweeps of an iteration: one where answers should be replayed and there are none yet."""
    return list(old) if mixed or not fraction else list(old[:1])
