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

from offpolicy.compute.devices import send
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


class TextGroups(NamedTuple):
    """A batch of B rows with up to K prompts and answers each, A in all, ordered by place in the row, then by row.

    ``place (A,)`` is k·B + row of each; ``facts`` and ``row`` as in :class:`Pairs`.
    """

    prompt: Ragged
    answer: Ragged
    place: Tensor
    facts: dict[str, Tensor]
    row: Tensor

    def singles(self) -> Singles:
        """The A prompts and answers as rows of their own."""
        return Singles(self.prompt, self.answer, {}, self.place)


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
        index: (n, k) int64, episode numbers, −1 for none; k is 4 for pairs and 2 for singles.
        lengths: (n, k) int64, tokens of each.
        scored: (n, k) int64, tokens of each that the model writes.
        facts: columns by name, (n, …).
        notes: sentences on what was left out of the replay.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, replay: Replay, index: np.ndarray, facts: dict[str, np.ndarray], kind: Any) -> None:
        if not len(index):
            raise DataError("the data have no row to train on; expected at least one pair or prompt with an answer.")
        self.replay, self.kind = replay, kind
        self.index, self.facts = np.asarray(index, dtype=np.int64), facts
        there = self.index >= 0
        self.lengths = np.where(there, replay.length[self.index], 0)
        self.scored = np.where(there, scored_lengths(replay)[self.index], 0)
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

    def per_answer(self, values: Tensor, rows: np.ndarray) -> list[Tensor]:
        """Numbers of all answers of a batch of these rows (B,), apart by their place in the row: (B,) each."""
        return [values[i * len(rows) : (i + 1) * len(rows)] for i in range(self.index.shape[1] // 2)]


class BoundGroups(BoundTexts):
    """Rows of up to K prompts with an answer each: ``index (n, 2K)``, −1 where a row has fewer."""

    def __init__(self, replay: Replay, index: np.ndarray, facts: dict[str, np.ndarray]) -> None:
        super().__init__(replay, index, facts, TextGroups)

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Which of the K·B places of these rows (B,) have an answer, ascending."""
        return np.flatnonzero(self.index[rows, 1::2].T.reshape(-1) >= 0)

    def gather(self, rows: np.ndarray | Tensor) -> TextGroups:
        rows = np.asarray(rows, dtype=np.int64)
        place = self._places(rows)
        prompt, answer = (self.index[rows, i::2].T.reshape(-1)[place] for i in (0, 1))
        facts = {name: torch.from_numpy(np.asarray(column[rows])) for name, column in self.facts.items()}
        found = (texts(self.replay, prompt), texts(self.replay, answer), torch.from_numpy(place))
        return TextGroups(*found, facts=facts, row=torch.from_numpy(rows))

    def per_answer(self, values: Tensor, rows: np.ndarray) -> list[Tensor]:
        """As of its parent; 0 where a row has no answer."""
        place = send(torch.from_numpy(self._places(rows)), values.device)
        places = values.new_zeros(self.index.shape[1] // 2 * len(rows))
        return list(places.index_copy(0, place, values[: len(place)]).view(-1, len(rows)))


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


@dataclass(frozen=True)
class ScoredGroupView:
    """All scored answers to a prompt as one row: batches of :class:`TextGroups` with the fact ``score (B, K)``.

    Lists of scored answers read with ``pair_strategy="none"``, or pairs with the scores of both sides.

    Args:
        objectives: every score is a list of k numbers, ``score (B, K, k)``; else it is one number.
    """

    objectives: bool = False

    def bind(self, replay: Replay) -> BoundGroups:
        _check_texts(replay)
        if "singles" in replay.tables:
            found = _groups_of_singles(replay)
            if (found.facts["score"].ndim > 2) != self.objectives:
                kinds = ("one number", "a list of numbers, one for each objective")
                raise DataError(
                    f"the score of an answer is {kinds[not self.objectives]}; expected {kinds[self.objectives]}. Pass "
                    f"other data, or choose {'CoPG' if self.objectives else 'DPA'}."
                )
            return found
        facts = facts_of(replay, "pairs")
        if str(replay.meta.get("format", "")).startswith("lists"):
            raise DataError(
                "the lists of scored answers were made pairs; expected all answers of a list. Pass "
                "--data.pair_strategy none."
            )
        if self.objectives or not {"score_chosen", "score_rejected"} <= facts.keys():
            raise DataError(
                "the pairs have no such scores; expected columns `score_chosen` and `score_rejected`, or lists of "
                "scored answers (`completions`, `scores`) with --data.pair_strategy none. Name them with "
                "`--data.columns`."
            )
        index = replay.tables["pairs"]
        if (index[:, 0] != index[:, 2]).any():
            raise DataError(
                "pairs have two prompts, and scores compare the answers to one; expected one prompt for both answers. "
                "Pass such pairs, or choose MAPL."
            )
        scores = np.stack([facts["score_chosen"], facts["score_rejected"]], axis=1)
        weight = {"weight": facts["weight"]} if "weight" in facts else {}
        return BoundGroups(replay, index, {"score": scores, **weight})


@dataclass(frozen=True)
class TwoPromptView:
    """Pairs that differ in answers, prompts or both: batches of :class:`TextGroups` with the fact ``kind (B,)``.

    Kind 0 is two answers to one prompt, 1 one answer to two prompts, 2 two answers under two prompts. The texts of a
    row are the chosen and the rejected with their own prompts; of kind 2 also the rejected answer under the prompt of
    the chosen, then the chosen answer under the prompt of the rejected.
    """

    def bind(self, replay: Replay) -> BoundGroups:
        bound = PairView().bind(replay)
        index = bound.index
        prompts, answers = (index[:, i] != index[:, i + 2] for i in (0, 1))
        if not (prompts | answers).all():
            raise DataError(
                f"{int((~(prompts | answers)).sum())} pairs have equal prompts and equal answers; expected sides that "
                "differ. Leave these rows out."
            )
        kind = np.where(prompts & answers, 2, np.where(prompts, 1, 0))
        if (kind == 2).any():
            crossed = np.where((kind == 2)[:, None], index[:, [0, 3, 2, 1]], -1)
            index = np.concatenate([index, crossed], axis=1)
        return BoundGroups(replay, index, {**bound.facts, "kind": kind})


def _groups_of_singles(replay: Replay) -> BoundGroups:
    """Singles with equal numbers in their column ``group`` as one row each, in the order of these numbers."""
    facts = facts_of(replay, "singles")
    if not {"group", "score"} <= facts.keys():
        raise DataError(
            "the single answers have no scores by which those to one prompt compare; expected lists of scored answers "
            "(`completions`, `scores`) with --data.pair_strategy none. Pass such data, or choose SFT or KTO."
        )
    order = np.argsort(facts["group"], kind="stable")
    _, begin, size = np.unique(facts["group"][order], return_index=True, return_counts=True)
    alone = int((size < 2).sum())
    begin, size = begin[size > 1], size[size > 1]  # one answer alone compares with nothing
    if not len(size):
        raise DataError("no prompt has two scored answers; expected at least two, as they are compared. Pass others.")
    place = np.arange(size.max())
    there = place < size[:, None]
    row = order[np.where(there, begin[:, None] + place, 0)]  # (n, K)
    index = np.where(there[:, :, None], replay.tables["singles"][row], -1).reshape(len(size), -1)
    score = np.where(there[..., None] if facts["score"].ndim > 1 else there, facts["score"][row], 0.0)
    found = {"score": score.astype(facts["score"].dtype)}
    if "weight" in facts:  # of a list, on each of its answers
        found["weight"] = facts["weight"][row[:, 0]]
    bound = BoundGroups(replay, index, found)
    if alone:
        bound.notes = (
            f"{alone:,} prompts have one scored answer left, which compares with nothing, and are left out.",
        )
    return bound


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
