"""Answers that are drawn before the iteration that they are for (``lag``).

Answers of iteration k are asked of the policy π_v with v = max(1, k − L). At the start of iteration k, what was asked
is collected, the engine gets the weights of π_k, and iteration k + L is asked for; then the steps of iteration k are
made. Which problems an iteration gets, how many, by which weights and with which random numbers is thus a function of
the seed, the iteration and the store. Where an iteration turns out to need more groups than were asked for, as
``min_ess`` forgets answers, the rest is drawn from π_k at once.

An engine that can (:class:`offpolicy.language.rl.engine.ConcurrentEngine`) draws while the trainer makes its steps. Any
other draws when it is asked: the same answers, one after the other.

Weights never move under answers that are being drawn: they are collected before the engine gets others, for the next
iteration or an evaluation. They are collected for a checkpoint too, and travel in it, so that a run goes on from there
without the weights that drew them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from offpolicy.compute import processes
from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import OWN, iteration_of
from offpolicy.errors import UsageError
from offpolicy.language.rl.answering import Answering, Answers
from offpolicy.language.rl.asking import Asked
from offpolicy.language.rl.engine import Completion, ConcurrentEngine, Request, Stop, engine_name
from offpolicy.language.rl.iteration import Shape

log = logging.getLogger(__name__)


class Ahead:
    """What is asked for iterations to come.

    Args:
        answering: who is asked.
        seed: tells that of the run, which a checkpoint may bring.
        wants_to_stop: whether the user wants this process to stop.

    Attributes:
        asked: what is asked, by iteration.
    """

    def __init__(self, answering: Answering, seed: Callable[[], int], wants_to_stop: Callable[[], bool]) -> None:
        self.answering, self.seed, self.wants_to_stop = answering, seed, wants_to_stop
        self.asked: dict[int, Asked] = {}
        self._answers: dict[int, Answers] = {}  # of what is asked, once it is drawn
        self._said = False
        self._waited = self._drew = 0.0  # seconds since the last look at the clocks
        self._since = time.perf_counter()
        self._drawn_before: float | None = None
        self._mark: float | None = None  # seconds that the engine had drawn before it was asked for what is open

    @property
    def concurrent(self) -> bool:
        """Whether the engine draws beside the trainer."""
        return isinstance(self.answering.engine, ConcurrentEngine)

    @property
    def reads(self) -> bool:
        """Whether the engine only looks answers up, whatever the weights, so that nothing is drawn before its time."""
        return not self.concurrent and not getattr(self.answering.engine, "on_policy", True)

    @property
    def groups(self) -> int:
        """Groups that are asked for, of all iterations."""
        return sum(one.groups for one in self.asked.values())

    def groups_of(self, k: int) -> int:
        """Groups that are asked for iteration k."""
        return self.asked[k].groups if k in self.asked else 0

    def plan(self, k: int, lag: int, groups: int, seen: int, store: Replay | None, shape: Shape) -> list[Asked]:
        """What is to be asked at the start of iteration k for those after it, up to ``lag`` of them.

        An iteration is asked for as many groups as it needs if no answer is forgotten before its time.

        Args:
            k: the iteration that begins.
            lag: L ≥ 0.
            groups: fresh ones of iteration k.
            seen: problems that iterations before k have answered.
            store: answers of earlier iterations that are left.
            shape: of iterations.
        """
        fresh = fresh_groups(store) | {k: groups} | {j: one.groups for j, one in self.asked.items() if j > k}
        seen += groups + sum(one.groups for j, one in self.asked.items() if j > k)
        found = []
        for j in range(k + 1, k + 1 + lag):
            if j not in self.asked:
                old = sum(fresh.get(i, 0) for i in range(j - shape.window, j))
                fresh[j] = shape.groups - min(shape.replayed(shape.mixture(j)[0]), old)
                found.append(Asked(j, k, seen, fresh[j]))
                seen += fresh[j]
        return found

    def ask(self, asked: Sequence[Asked], stop: Stop) -> None:
        """Ask for iterations to come; the engine has the weights.

        Raises:
            Stopped: the user wants to stop; nothing of it is asked.
        """
        if self.concurrent:
            self._mark = self._drawing_seconds()
            for one in asked:
                how = self.answering.sampling(one.iteration, self.seed())
                self.answering.engine.submit(one.iteration, self.answering.requests(one, self.seed()), how)
        elif not self.reads:
            began = time.perf_counter()
            self._answers |= {one.iteration: self.answering.draw(one, self.seed(), stop) for one in asked}
            self._drew += time.perf_counter() - began
        self.asked |= {one.iteration: one for one in asked}

    def collect(self) -> None:
        """Wait until everything that was asked is drawn."""
        if self.reads:
            return
        began, drawn = time.perf_counter(), sorted(self.asked.keys() - self._answers.keys())
        for k in drawn:
            self._answers[k] = self.answering.engine.collect(k, self._patient)
        self._waited += time.perf_counter() - began
        if drawn and self._mark is not None:
            seconds = self._drawing_seconds() - self._mark
            self.answering.note_drawn([some for k in drawn for some in self._answers[k]], seconds)

    def _drawing_seconds(self) -> Any:
        """How long an engine that draws beside the trainer has drawn so far; None where it does not count that."""
        return getattr(self.answering.engine, "drawing_seconds", None)

    def _patient(self) -> bool:
        """Never stops drawing: the checkpoint of a run that is stopped needs the answers. Says so once."""
        if self.wants_to_stop() and not self._said:
            self._said = True
            log.warning("Waiting for the answers that are being drawn, which the checkpoint keeps.")
        return False

    def answers(self, k: int, stop: Stop) -> list[tuple[Asked, Answers]]:
        """What was asked for iteration k with its answers, once they are collected; empty where nothing was."""
        if k not in self.asked:
            return []
        if k not in self._answers:
            self._answers[k] = self.answering.draw(self.asked[k], self.seed(), stop)
        return [(self.asked[k], self._answers[k])]

    def drop(self, k: int) -> None:
        """Forget what was asked for iteration k, which has it now."""
        self.asked.pop(k, None)
        self._answers.pop(k, None)

    def fact(self, lag: int) -> str:
        """How answers are drawn, for the first screen."""
        old = f"answers are {lag} iteration{'s' if lag > 1 else ''} old"
        if self.concurrent:
            return f"{old}, drawn while the policy trains"
        name = engine_name(self.answering.options.engine)
        return f"{old}; engine '{name}' draws them when they are asked for, so nothing overlaps"

    # -- clocks --------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, float]:
        """Facts of the time since the last call: how long the trainer waited, and how long the engine had no work.

        The second is known of an engine that draws beside the trainer if it counts the seconds that it draws in an
        attribute ``drawing_seconds``.
        """
        now = time.perf_counter()
        drew: float | None = self._drew
        if self.concurrent:
            total = self._drawing_seconds()
            drew = None if total is None or self._drawn_before is None else total - self._drawn_before
            self._drawn_before = total
        found = {
            "perf/engine_wait_seconds": self._waited + self._drew,
            "engine/queue": float(self.groups * self.answering.options.group_size),
        }
        if drew is not None and now > self._since:
            found["perf/engine_idle_share"] = min(1.0, max(0.0, 1.0 - drew / (now - self._since)))
        self._since, self._waited, self._drew = now, 0.0, 0.0
        return found

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """What is asked, with the answers of all processes, which are waited for."""
        self.collect()
        mine = {
            k: packed_answers(self.answering.requests(self.asked[k], self.seed()), some)
            for k, some in self._answers.items()
        }
        parts = processes.gathered(mine)
        return [
            {**asdict(one), "answers": [part[k] for part in parts if k in part]}
            for k, one in sorted(self.asked.items())
        ]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take what a checkpoint has, written by any number of processes."""
        self.asked, self._answers = {}, {}
        for state in states:
            one = Asked(**{name: value for name, value in state.items() if name != "answers"})
            known = {number: some for part in state["answers"] for number, some in unpacked_answers(part).items()}
            self.asked[one.iteration] = one
            if state["answers"]:
                requests = self.answering.requests(one, self.seed())
                asked = processes.gathered([(r.number, (r.samples, len(r.prompt))) for r in requests])
                if not _were_asked(dict(pair for part in asked for pair in part), state["answers"]):
                    raise UsageError(
                        f"the checkpoint holds answers for iteration {one.iteration} that were asked for with another "
                        "`group_size`, `demonstrations`, `demonstration_share` or `max_new_tokens`; expected the same "
                        "while `lag` is above 0. Go on with those of the run."
                    )
                self._answers[one.iteration] = [known[r.number] for r in requests]


def _were_asked(asked: Mapping[int, tuple[int, int]], parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether packed answers are those to requests: number → (samples, tokens of the prompt)."""
    known: dict[int, tuple[int, int]] = {}
    for part in parts:
        number, samples = np.asarray(part["number"]).tolist(), np.asarray(part["samples"]).tolist()
        prompt = np.asarray(part["prompt"]).tolist() if "prompt" in part else [asked.get(n, (0, 0))[1] for n in number]
        known |= dict(zip(number, zip(samples, prompt)))
    return known == dict(asked)


def fresh_groups(store: Replay | None) -> dict[int, int]:
    """How many groups of each iteration are in a store."""
    if store is None:
        return {}
    _, first = np.unique(store.episodes["group"], return_index=True)
    names, counts = np.unique(iteration_of(store)[first], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist()))


def mean_age(store: Replay) -> float:
    """Iterations between the weights that drew own answers and the iteration that learns from them first, the mean."""
    own = store.episodes["source"] == OWN
    return float((iteration_of(store) - store.episodes["policy_version"])[own].mean())


def packed_answers(requests: Sequence[Request], answers: Answers) -> dict[str, np.ndarray]:
    """Answers laid end to end, for a checkpoint."""
    flat = [one for some in answers for one in some]
    ends = [np.full(len(one[0]), -1) if len(one) < 4 or one[3] is None else one[3] for one in flat]

    def joined(parts: Sequence[Any], dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)

    return {
        "number": np.asarray([r.number for r in requests], np.int64),
        "samples": np.asarray([len(some) for some in answers], np.int64),
        "prompt": np.asarray([len(r.prompt) for r in requests], np.int64),
        "length": np.asarray([len(one[0]) for one in flat], np.int64),
        "ended": np.asarray([one[2] for one in flat], bool),
        "token": joined([one[0] for one in flat], np.int64),
        "logp": joined([one[1] for one in flat], np.float64),
        "version": joined(ends, np.int64),  # −1 where an engine does not say
    }


def unpacked_answers(parts: Mapping[str, Any]) -> dict[int, list[Completion]]:
    """The answers of :func:`packed_answers`, by the number of their request."""
    columns = {name: np.asarray(part) for name, part in parts.items()}
    last = np.cumsum(columns["length"])
    cut = {name: np.split(columns[name], last[:-1]) for name in ("token", "logp", "version")}
    flat = iter(
        Completion(token, logp, bool(ended), None if (version < 0).any() else version)
        for token, logp, version, ended in zip(cut["token"], cut["logp"], cut["version"], columns["ended"])
    )
    sizes = zip(columns["number"].tolist(), columns["samples"].tolist())
    return {number: [next(flat) for _ in range(count)] for number, count in sizes}
