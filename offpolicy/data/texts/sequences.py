"""Views of language data: an episode is a text, its steps are tokens, and index tables say which texts belong together.

A replay of language data has the step column ``token`` (the smallest integer type that fits) and one episode per
distinct text; prompts are episodes too, so a prompt that many answers share is stored once. Tables over the episodes:

======================  ============  ==================================================================================
``pairs``               (P, 4) int64  prompt of chosen, chosen, prompt of rejected, rejected; the prompts usually equal
``pairs/<column>``      (P, …)        facts of a pair: ``weight``, ``score_chosen``, ``score_rejected``, ``agreement``
                                      (share of judges who prefer the chosen answer), ``row`` (where it stood in the
                                      source), …
``singles``             (S, 2) int64  prompt, answer
``singles/<column>``    (S, …)        facts of a single: ``label`` bool, ``score``, ``group`` int64 (singles with equal
                                      numbers answer one prompt together), ``row``, ``ref_logps``, …
======================  ============  ==================================================================================

A second step column, ``scored`` bool, is there where answers hold turns of tools: it is false at the tokens that the
model reads and does not write.

A replay has pairs, singles or both. Singles are derived from pairs where a method wants them and there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError

SCORED = "scored"  # the step column that says which tokens of an answer the model writes


class Ragged(NamedTuple):
    """B token sequences of different lengths, laid end to end: ``token (Σ length,)`` int64, ``length (B,)`` int64,
    ``scored (Σ length,)`` bool, which tokens count where these are answers; None for all."""

    token: Tensor
    length: Tensor
    scored: Tensor | None = None


class Pairs(NamedTuple):
    """A batch of preference pairs.

    ``facts``: the columns ``pairs/<name>`` of these pairs by name, each (B, …). ``row (B,)``: number of the pair.
    """

    prompt_chosen: Ragged
    chosen: Ragged
    prompt_rejected: Ragged
    rejected: Ragged
    facts: dict[str, Tensor]
    row: Tensor


class Singles(NamedTuple):
    """A batch of prompts with one answer each; ``facts`` and ``row`` as in :class:`Pairs`."""

    prompt: Ragged
    answer: Ragged
    facts: dict[str, Tensor]
    row: Tensor


def spread(length: Tensor) -> tuple[Tensor, Tensor]:
    """For texts laid end to end: which text each token belongs to, and its place in it."""
    owner = torch.repeat_interleave(torch.arange(len(length), device=length.device), length)
    return owner, torch.arange(len(owner), device=length.device) - (torch.cumsum(length, 0) - length)[owner]


def runs(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, …`` (``length[i]`` numbers) for every i, end to end."""
    return np.arange(length.sum()) - np.repeat(np.cumsum(length) - length - start, length)


def spans(replay: Replay, episodes: np.ndarray) -> np.ndarray:
    """The rows of the steps of these episodes, end to end."""
    return runs(replay.start[episodes], replay.length[episodes])


def texts(replay: Replay, episodes: np.ndarray) -> Ragged:
    """The tokens of these episodes (B,)."""
    rows = spans(replay, episodes)
    token = to_numpy(replay.steps["token"])[rows].astype(np.int64)
    scored = torch.from_numpy(to_numpy(replay.steps[SCORED])[rows]) if SCORED in replay.steps else None
    return Ragged(torch.from_numpy(token), torch.from_numpy(replay.length[episodes]), scored)


def scored_lengths(replay: Replay) -> np.ndarray:
    """How many tokens of each text count where it is an answer, (E,) int64."""
    if SCORED not in replay.steps:
        return replay.length
    before = np.append(0, np.cumsum(to_numpy(replay.steps[SCORED]), dtype=np.int64))
    return before[replay.start + replay.length] - before[replay.start]


def token_ids(replay: Replay, episode: int) -> np.ndarray:
    """The tokens of one text, int64."""
    start = replay.start[episode]
    return to_numpy(replay.steps["token"])[start : start + replay.length[episode]].astype(np.int64)


def is_scored(replay: Replay, episode: int) -> np.ndarray:
    """Which tokens of one answer the model writes, bool."""
    start, length = replay.start[episode], replay.length[episode]
    return to_numpy(replay.steps[SCORED])[start : start + length] if SCORED in replay.steps else np.ones(length, bool)


class BoundTexts:
    """A view of texts bound to a replay: gathers any rows of its index table at once.

    Attributes:
        index: (n, k) int64, episode numbers; k is 4 for pairs and 2 for singles.
        lengths: (n, k) int64, tokens of each.
        scored: (n, k) int64, tokens of each that the model writes.
        facts: columns by name, (n, …).
    """

    def __init__(self, replay: Replay, index: np.ndarray, facts: dict[str, np.ndarray], kind: Any) -> None:
        if not len(index):
            raise DataError("the data have no row to train on; expected at least one pair or prompt with an answer.")
        self.replay, self.kind = replay, kind
        self.index, self.facts = np.asarray(index, dtype=np.int64), facts
        self.lengths = replay.length[self.index]
        self.scored = scored_lengths(replay)[self.index]
        if "weight" in facts:
            check_weights(facts["weight"], replay.meta.get("name", "the data"))

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, rows: np.ndarray | Tensor) -> Any:
        """The batch of these rows (B,) of the table, on the CPU."""
        rows = np.asarray(rows, dtype=np.int64)
        parts = [texts(self.replay, column) for column in self.index[rows].T]
        facts = {name: torch.from_numpy(np.asarray(column[rows])) for name, column in self.facts.items()}
        return self.kind(*parts, facts=facts, row=torch.from_numpy(rows))


@dataclass(frozen=True)
class PairView:
    """Preference pairs: batches of :class:`Pairs`."""

    def bind(self, replay: Replay) -> BoundTexts:
        _check_texts(replay)
        if "pairs" not in replay.tables:
            raise DataError(
                "the data have single answers and no pairs; expected a chosen and a rejected answer per row. Pass "
                "preference pairs, or choose a method for singles (KTO, SFT)."
            )
        return BoundTexts(replay, replay.tables["pairs"], facts_of(replay, "pairs"), Pairs)


@dataclass(frozen=True)
class SingleView:
    """Single answers: batches of :class:`Singles`.

    Args:
        rejected: where the data are pairs, also take the rejected answers, with ``label`` false; else only the chosen.
    """

    rejected: bool = False

    def bind(self, replay: Replay) -> BoundTexts:
        _check_texts(replay)
        if "singles" in replay.tables:
            return BoundTexts(replay, replay.tables["singles"], facts_of(replay, "singles"), Singles)
        pairs = replay.tables["pairs"]
        sides = 2 if self.rejected else 1
        facts = {"label": np.tile(np.arange(sides) == 0, len(pairs))}
        if "pairs/weight" in replay.tables:  # both answers of a pair have its weight
            facts["weight"] = np.repeat(to_numpy(replay.tables["pairs/weight"]), sides)
        return BoundTexts(replay, pairs[:, : 2 * sides].reshape(-1, 2), facts, Singles)


def row_weights(bound: BoundTexts, rows: np.ndarray) -> np.ndarray:
    """Weights of rows in the loss: their column ``weight``, else 1; (B,) float64."""
    weight = bound.facts.get("weight")
    return np.ones(len(rows)) if weight is None else np.asarray(weight[rows], dtype=np.float64)


def check_weights(weight: np.ndarray, where: str) -> None:
    """Raise :class:`DataError` unless all weights are finite and ≥ 0 and some are above 0."""
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise DataError(
            f"{where}: {len(bad)} weights are negative or not finite (first at row {bad[0]}: {weight[bad[0]]}); "
            "expected ≥ 0. For an answer to be unlearned pass it as the rejected one of a pair, or with a label to KTO."
        )
    if not np.any(weight):
        raise DataError(f"{where}: all weights are 0, which leaves nothing to train on; expected some above 0.")


def _check_texts(replay: Replay) -> None:
    if not {"pairs", "singles"} & replay.tables.keys():
        raise DataError(
            f"{replay.meta.get('name', 'the replay')} holds no texts; expected pairs or single answers. Pass "
            "preference data (a .jsonl file), or choose a method for control."
        )


def facts_of(replay: Replay, table: str) -> dict[str, np.ndarray]:
    """The columns of an index table that can be made tensors, by name."""
    prefix = table + "/"
    columns = {k.removeprefix(prefix): v for k, v in replay.tables.items() if k.startswith(prefix)}
    return {k: v for k, v in columns.items() if v.dtype.kind in "biuf"}
