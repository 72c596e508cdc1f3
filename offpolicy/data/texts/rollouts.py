"""Answers of the policy in the shared store: an answer is an episode whose steps are tokens.

Step columns: ``token``; ``logp``, of the policy that drew it, by the trainer's forward pass; ``sampler_logp``, the same
as the engine reported it; ``previous_logp`` and ``base_logp``, under the policy at the start of the current iteration
and under the base of the divergence (NaN where nobody asked); with a critic also ``old_value``, ``advantage`` and
``returns``. Episode columns: ``iteration`` (which asked for it, and learned from it first), ``policy_version`` (whose
weights drew it: those at the start of that iteration), ``group`` (answers to one prompt drawn together), ``prompt``
(row of the problems), ``asked`` (in which words of :mod:`offpolicy.data.texts.retelling`, 0 for its own; only where
there are others), ``source`` (0 own, 1 demonstration, 2 the beginning of one that the policy went on from), ``given``
(how many of its first tokens are a demonstration's), ``reward``, ``reward/<part>``, ``advantage``, ``ended``,
``digest`` (of prompt and tokens; equal for equal answers), ``left_out`` (by the advantage, from every step). Answers
that are drawn a window at a time have the step column ``window`` and the episode columns ``windows`` and ``unfinished``
(:mod:`offpolicy.language.rl.window`); their version is that of the newest window.

Groups are whole, always: they are drawn, kept and evicted together. Which answers a step takes is a pure function of
(seed, iteration) and the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.data import sampling
from offpolicy.data.columns import Column, to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import Ragged, runs, spans, texts
from offpolicy.errors import DataError

OWN, DEMONSTRATION, CONTINUED = 0, 1, 2
DERIVED = ("previous_logp", "previous_mean_logp", "old_value", "advantage", "returns")  # of the current iteration alone


def asked_texts(problems: Replay, prompt: np.ndarray, asked: np.ndarray | None) -> np.ndarray:
    """The texts that rows (E,) of problems were asked with; ``asked`` numbers their words, None for their own."""
    if asked is None or "problems/asked" not in problems.tables:
        return problems.tables["problems"][prompt, 0]
    return problems.tables["problems/asked"][prompt, asked]


def prompt_lengths(problems: Replay) -> np.ndarray:
    """Tokens of every problem in all its words, (P, words)."""
    return problems.length[problems.tables.get("problems/asked", problems.tables["problems"][:, :1])]


class Rollouts(NamedTuple):
    """A batch of B answers.

    Attributes:
        prompt: their prompts.
        answer: their tokens.
        steps: float columns of the tokens by name, (Σ length,) each.
        facts: columns of the answers by name, (B,) each.
        row: number in the store, (B,).
        lane: answers with equal numbers may stand behind one prompt, (B,) from 0.
        turn: place of an answer in its lane, (B,), ascending.
    """

    prompt: Ragged
    answer: Ragged
    steps: dict[str, Tensor]
    facts: dict[str, Tensor]
    row: Tensor
    lane: Tensor
    turn: Tensor


class BoundRollouts:
    """A store of answers with the problems they answer: gathers any rows at once.

    Attributes:
        lengths: tokens of prompt and answer, (E, 2) int64.
    """

    def __init__(self, problems: Replay, store: Replay) -> None:
        self.problems, self.store = problems, store
        self.prompts = asked_texts(problems, store.episodes["prompt"], store.episodes.get("asked"))
        self.lengths = np.stack([problems.length[self.prompts], store.length], axis=1)

    def gather(self, rows: np.ndarray, longest: int = 0) -> Rollouts:
        """The batch of these rows (B,), on the CPU, in an order that its ``row`` tells.

        Args:
            rows: numbers in the store.
            longest: answers of a group behind one prompt share a lane as long as it has no more tokens than this, its
                prompt included.
        """
        lane, turn = self._lanes(rows, longest)
        order = np.lexsort((lane, turn))
        rows, lane, turn = rows[order], lane[order], turn[order]
        index = spans(self.store, rows)
        prompt, answer = texts(self.problems, self.prompts[rows]), texts(self.store, rows)
        steps = {k: torch.from_numpy(to_numpy(v)[index]) for k, v in self.store.steps.items() if k != "token"}
        facts = {k: torch.from_numpy(v[rows]) for k, v in self.store.episodes.items()}
        return Rollouts(prompt, answer, steps, facts, *map(torch.from_numpy, (rows, lane, turn)))

    def _lanes(self, rows: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        lane, turn = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        lengths, last = self.lengths[rows], -1
        filled: dict[tuple[int, int], tuple[int, int, int]] = {}  # group, prompt → newest lane, answers, tokens in it
        asked = zip(self.store.episodes["group"][rows].tolist(), self.prompts[rows].tolist())
        for i, (group, (prompt, answer)) in enumerate(zip(asked, lengths.tolist())):
            mine, count, tokens = filled.get(group, (-1, 0, 0))
            if mine < 0 or tokens + answer > longest:
                last += 1
                mine, count, tokens = last, 0, prompt
            lane[i], turn[i] = mine, count
            filled[group] = mine, count + 1, tokens + answer
        return lane, turn


def make_store(
    tokens: Sequence[np.ndarray],
    steps: Mapping[str, Sequence[np.ndarray]],
    episodes: Mapping[str, Any],
    dtype: Any,
    floats: Any = np.float32,
) -> Replay:
    """A store of answers.

    Args:
        tokens: ids of each answer, n ≥ 1 of them.
        steps: float columns by name, an array per answer.
        episodes: columns by name, (E,) each.
        dtype: of the ids.
        floats: type of the float columns.

    Raises:
        DataError: an answer without a token.
    """
    length = np.asarray([len(one) for one in tokens], dtype=np.int64)
    if not len(length) or length.min() < 1:
        raise DataError("an engine returned an answer without a token; expected at least the one that ends it.")
    columns: dict[str, Column] = {"token": np.concatenate(tokens).astype(dtype)}
    columns |= {name: np.concatenate(parts).astype(floats) for name, parts in steps.items()}
    episodes = {name: np.asarray(values) for name, values in episodes.items()}
    pairs = zip(episodes["prompt"].tolist(), tokens)
    episodes["digest"] = np.asarray([_digest(prompt, one.astype(dtype)) for prompt, one in pairs], dtype=np.int64)
    return Replay(columns, start=np.cumsum(length) - length, length=length, episodes=episodes)


def _digest(prompt: int, token: np.ndarray) -> int:
    found = blake2b(token.tobytes(), digest_size=8, salt=prompt.to_bytes(8, "little"))
    return int.from_bytes(found.digest(), "little", signed=True)


def select_answers(store: Replay, keep: np.ndarray) -> Replay | None:
    """The answers that a mask (E,) keeps, laid end to end without the columns of their iteration; None for none."""
    rows = np.flatnonzero(keep)
    if not len(rows):
        return None
    index, length = spans(store, rows), store.length[rows]
    return Replay(
        {k: to_numpy(v)[index] for k, v in store.steps.items() if k not in DERIVED},
        start=np.cumsum(length) - length,
        length=length,
        episodes={k: v[rows] for k, v in store.episodes.items()},
    )


def merged_answers(first: Replay | None, second: Replay | None) -> Replay:
    """The answers of both, one after the other; columns that one of them lacks are NaN there (0 for facts)."""
    parts = [one for one in (first, second) if one is not None]
    if len(parts) == 1:
        return parts[0]
    length = np.concatenate([one.length for one in parts])

    def column(name: str, kind: str) -> np.ndarray:
        known = next(getattr(one, kind)[name] for one in parts if name in getattr(one, kind))
        fill = np.nan if kind == "steps" else 0
        size = {"steps": lambda one: one.num_steps, "episodes": lambda one: one.num_episodes}[kind]
        return np.concatenate(
            [getattr(o, kind)[name] if name in getattr(o, kind) else np.full(size(o), fill, known.dtype) for o in parts]
        )

    names = [list(dict.fromkeys(n for one in parts for n in getattr(one, kind))) for kind in ("steps", "episodes")]
    return Replay(
        {name: column(name, "steps") for name in names[0]},
        start=np.cumsum(length) - length,
        length=length,
        episodes={name: column(name, "episodes") for name in names[1]},
    )


def iteration_of(store: Replay) -> np.ndarray:
    """The iteration that asked for each answer, (E,); where a store does not say, the one whose weights drew it."""
    return store.episodes.get("iteration", store.episodes["policy_version"])


def told_columns(store: Replay) -> Replay:
    """The store with the columns ``iteration`` and ``given``, which stores of version 0.1 do not have."""
    lacking = {"iteration", "given"} - store.episodes.keys()
    if not lacking:
        return store
    shown = np.where(store.episodes["source"] == DEMONSTRATION, store.length, 0)
    known = {"iteration": iteration_of(store), "given": shown}
    episodes = {**store.episodes, **{name: known[name] for name in lacking}}
    told = Replay(store.steps, start=store.start, length=store.length, episodes=episodes)
    told.version = store.version
    return told


def recent(store: Replay | None, oldest: int) -> Replay | None:
    """Own answers that iterations ≥ ``oldest`` asked for; what has tokens of a demonstration never stays."""
    if store is None:
        return None
    return select_answers(store, (iteration_of(store) >= oldest) & (store.episodes["source"] == OWN))


def external_tokens(store: Replay) -> np.ndarray:
    """Which tokens are a demonstration's, (tokens of the store,) bool."""
    place = runs(np.zeros_like(store.length), store.length)
    return place < np.repeat(store.episodes["given"], store.length)


def newest_tokens(store: Replay) -> np.ndarray:
    """Tokens of the newest window of their answer, (tokens of the store,) bool; all where there are no windows."""
    if "window" not in store.steps:
        return np.ones(store.num_steps, bool)
    return np.asarray(to_numpy(store.steps["window"]) == np.repeat(store.episodes["windows"] - 1, store.length))


def group_rows(store: Replay, column: str = "group") -> dict[int, np.ndarray]:
    """The rows of each group, or of each value of another column."""
    group = store.episodes[column]
    order = np.argsort(group, kind="stable")
    names, first = np.unique(group[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, first[1:])))


def ordered(names: np.ndarray, seed: int, stream: str, iteration: int) -> np.ndarray:
    """Group numbers in a random order that depends on (seed, stream, iteration) and the numbers alone."""
    key = sampling.keys(seed, stream, torch.tensor([iteration], device="cpu"))[0]
    names = np.sort(names)
    return names[sampling.bits(key, torch.from_numpy(names)).argsort().numpy()]


def drawn(store: Replay | None, count: int, sweeps: int, seed: int, iteration: int) -> list[np.ndarray]:
    """For every sweep the replayed groups, without replacement: ``count`` of them, or all that there are."""
    names = np.empty(0, np.int64) if store is None else np.unique(store.episodes["group"])
    return [ordered(names, seed, f"replay {sweep}", iteration)[:count] for sweep in range(sweeps)]


def first_of_equal(store: Replay, rows: np.ndarray) -> np.ndarray:
    """These rows without every row whose answer an earlier row has."""
    _, first = np.unique(store.episodes["digest"][rows], return_index=True)
    return rows[np.sort(first)]


def steps_of(
    store: Replay,
    replayed: Sequence[np.ndarray],
    *,
    minibatches: int,
    seed: int,
    iteration: int,
    drop_duplicates: bool = False,
    used: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The rows of every optimiser step of an iteration, group by group, the longest group first; none that is left out.

    Args:
        store: with the fresh groups of this iteration.
        replayed: groups of earlier iterations by sweep.
        minibatches: steps per sweep, ≥ 1; each takes whole groups.
        drop_duplicates: leave out answers of a replayed group that repeat another one of it.
        used: (E,) bool, the answers that a replayed group brings; None for all.
    """
    by_group = group_rows(store)
    kept = ~store.episodes.get("left_out", np.zeros(store.num_episodes, bool))
    asked = iteration_of(store)
    kept &= True if used is None else used | (asked == iteration)
    fresh = np.unique(store.episodes["group"][asked == iteration])
    steps = []
    for sweep, old in enumerate(replayed):
        names = ordered(np.concatenate([fresh, old]), seed, f"minibatch {sweep}", iteration)
        for part in np.array_split(names, minibatches):
            rows = [by_group[name][kept[by_group[name]]] for name in part.tolist()]
            if drop_duplicates:
                rows = [first_of_equal(store, r) if (asked[r] < iteration).all() else r for r in rows]
            rows.sort(key=lambda r: -int(store.length[r].sum()))
            steps.append(np.concatenate([np.empty(0, np.int64), *rows]))
    return steps


def duplicates(store: Replay, rows: np.ndarray) -> float:
    """Share of these answers that repeat another one to the same prompt."""
    return 1.0 - len(np.unique(store.episodes["digest"][rows])) / max(1, len(rows))
