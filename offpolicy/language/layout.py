"""How prompts and answers lie in the rows of one forward pass.

Plain: a row per answer, ``prompt answer pad``. Shared prompt: a row per pair, ``prompt chosen rejected pad``; the
rejected answer does not see the chosen one, and its positions go on from the prompt. Both give the same numbers; the
second computes the prompt once. Padding stands on the right, where causal attention never looks from an answer.

Packed: the rows of either kind behind each other in a single row, without padding; attention is told where each lies
(:mod:`offpolicy.language.attention`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpolicy.compute.devices import send
from offpolicy.data.texts.rollouts import Rollouts
from offpolicy.data.texts.sequences import Pairs, Ragged, Singles, spread
from offpolicy.moved import names_of

WASTE = 0.1  # share of padding above which rows are packed where that is left open


class Layout(NamedTuple):
    """The input of one forward pass of R rows of T tokens, and which of its positions are scored.

    Packed rows are one row of T tokens; ``attention_mask`` is of the R rows of W places that attention sees.

    Scored tokens (n of them) are ordered by answer, then by place. Answers of a batch of B pairs: 0…B−1 chosen,
    B…2B−1 rejected, then the prompts of the chosen where they are scored too; of B singles: 0…B−1, then the prompts.

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64.
        attention_mask: (R, T) int64, 1 = no padding; or (R, 1, T, T) bool, True = may look, where a prompt is shared.
        predict: (n,) int64, position in R·T whose hidden state predicts the token.
        target: (n,) int64, the token.
        answer: (n,) int64, the answer it belongs to.
        length: (A,) int64, scored tokens of each answer.
        num_answers: A.
        real_tokens: tokens in the rows that are no padding.
        place: of packed rows, row · W + column of each token, (T,) int64; else None.
        starts: of packed rows, where each one begins in T, and T, (R + 1,) int32; else None.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    target: Tensor
    answer: Tensor
    length: Tensor
    num_answers: int
    real_tokens: int
    place: Tensor | None = None
    starts: Tensor | None = None

    def to(self, device: torch.device | str) -> Layout:
        """The same on a device."""
        device = torch.device(device)
        tensors: dict[str, Any] = {k: send(v, device) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**tensors)

    @property
    def shared(self) -> bool:
        """Whether any row has two answers."""
        return self.attention_mask.ndim == 4

    @property
    def packed(self) -> bool:
        """Whether the rows stand behind each other, without padding."""
        return self.place is not None


def pair_layout(
    pairs: Pairs,
    pad_id: int,
    *,
    shared_prompt: bool,
    prompt_too: bool = False,
    pad_to_multiple_of: int = 1,
    padding_free: bool | None = False,
) -> Layout:
    """Rows for a batch of B pairs: chosen and rejected in one forward pass.

    Args:
        pairs: the batch.
        pad_id: any token id; what stands in the padding has no influence.
        shared_prompt: put both answers of a pair behind one prompt, for models where `shares_prompt` holds. Pairs whose
            two prompts differ keep two rows.
        prompt_too: score the prompts of the chosen as well, as answers 2B…3B−1.
        pad_to_multiple_of: round T up to a multiple of this.
        padding_free: pack the rows, for models where `packs_rows` holds; None where much of them would be padding.

    Returns:
        The layout. The first token of a row is never scored, as nothing predicts it.
    """
    size = len(pairs.row)
    prompt, other, chosen = (x.length for x in (pairs.prompt_chosen, pairs.prompt_rejected, pairs.chosen))
    never = torch.zeros(size, dtype=torch.bool, device=prompt.device)
    same = _equal(pairs.prompt_chosen, pairs.prompt_rejected) if shared_prompt else never
    first = torch.arange(size, device=prompt.device)
    # a rejected answer with a prompt of its own has a row of its own, behind the rows of the chosen
    second = torch.where(same, first, size + torch.cumsum(~same, 0) - 1)
    own = ~same
    rows = size + int(own.sum())
    builder = _Rows(rows, pad_id, pad_to_multiple_of)
    builder.put(pairs.prompt_chosen, first, torch.zeros_like(prompt), torch.zeros_like(prompt), segment=0)
    own_prompt = own[spread(other)[0]]
    nothing = torch.zeros_like(other)
    builder.put(pairs.prompt_rejected, second, nothing, nothing, segment=0, keep=own_prompt)
    builder.answer(pairs.chosen, first, prompt, prompt, segment=1)
    builder.answer(pairs.rejected, second, other + torch.where(same, chosen, 0), other, segment=2)
    if prompt_too:
        builder.score_prompt(pairs.prompt_chosen, first)
    return builder.layout(shared=bool(same.any()), padding_free=padding_free)


def single_layout(
    singles: Singles,
    pad_id: int,
    *,
    prompt_too: bool = False,
    pad_to_multiple_of: int = 1,
    padding_free: bool | None = False,
) -> Layout:
    """Rows for a batch of B prompts with one answer each; arguments and result as in `pair_layout`."""
    size = len(singles.row)
    length = singles.prompt.length
    first = torch.arange(size, device=length.device)
    builder = _Rows(size, pad_id, pad_to_multiple_of)
    builder.put(singles.prompt, first, torch.zeros_like(length), torch.zeros_like(length), segment=0)
    builder.answer(singles.answer, first, length, length, segment=1)
    if prompt_too:
        builder.score_prompt(singles.prompt, first)
    return builder.layout(shared=False, padding_free=padding_free)


def group_layout(rollouts: Rollouts, pad_id: int, *, padding_free: bool | None = False) -> Layout:
    """Rows for B answers, 0…B−1 in their order; the answers of a lane stand behind one prompt.

    The last token of an answer is scored and not laid into its row, since nothing follows from it.

    Args:
        rollouts: the batch; lanes with more than one answer are for models where `shares_prompt` holds.
        pad_id: as in `pair_layout`.
        padding_free: as in `pair_layout`.
    """
    lane, lanes = rollouts.lane, int(rollouts.lane.max()) + 1
    length, tokens = rollouts.prompt.length[:lanes], int(rollouts.prompt.length[:lanes].sum())
    first = torch.arange(lanes, device=length.device)
    # in a lane an answer stands behind those of earlier turns, each without its last token
    laid = (rollouts.answer.length - 1).clamp(min=0)
    order = torch.argsort(lane, stable=True)  # by lane, and by turn within it
    before = torch.empty_like(laid)
    before[order] = torch.cumsum(laid[order], 0) - laid[order]
    column = length[lane] + before - before[:lanes][lane]  # the first answers of all lanes come first
    builder = _Rows(lanes, pad_id, 1)
    builder.put(Ragged(rollouts.prompt.token[:tokens], length), first, 0 * first, 0 * first, segment=0)
    builder.answer(rollouts.answer, lane, column, length[lane], segment=rollouts.turn + 1, last=False)
    return builder.layout(shared=bool((rollouts.turn > 0).any()), padding_free=padding_free)


class _Rows:
    """Fills the rows of a layout, piece by piece; works on flat positions row · T + column once T is known."""

    def __init__(self, rows: int, pad_id: int, multiple: int) -> None:
        self.rows, self.pad_id, self.multiple = rows, pad_id, max(1, multiple)
        self.pieces: list[tuple[Tensor, ...]] = []  # row, column, position, token, segment
        self.scored: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # row, column that predicts, token, answer
        self.answers = 0

    def put(
        self,
        text: Ragged,
        row: Tensor,
        column: Tensor,
        position: Tensor,
        segment: int | Tensor,
        keep: Tensor | None = None,
    ) -> None:
        """Lay the tokens of text i that are to ``keep``, (Σ length,) bool, into its row from a column on; positions
        count from ``position``."""
        owner, place = spread(text.length)
        segments = segment[owner] if isinstance(segment, Tensor) else torch.full_like(owner, segment)
        piece = (row[owner], column[owner] + place, position[owner] + place, text.token, segments)
        self.pieces.append(piece if keep is None else tuple(x[keep] for x in piece))

    def answer(
        self, text: Ragged, row: Tensor, column: Tensor, prompt: Tensor, segment: int | Tensor, *, last: bool = True
    ) -> None:
        """Lay an answer and score what the model writes of it; the last of the ``prompt`` tokens predicts the first.

        Its own ``last`` token is needed in the row only by who wants to look at it there.
        """
        owner, place = spread(text.length)
        self.put(text, row, column, prompt, segment, keep=None if last else place + 1 < text.length[owner])
        before = torch.where(place == 0, prompt[owner], column[owner] + place) - 1
        self._score(row[owner], before, text, owner)

    def score_prompt(self, prompt: Ragged, row: Tensor) -> None:
        """Score a prompt that was laid at the start of its row."""
        owner, place = spread(prompt.length)
        self._score(row[owner], place - 1, prompt._replace(scored=None), owner)

    def _score(self, row: Tensor, before: Tensor, text: Ragged, owner: Tensor) -> None:
        counts = before >= 0 if text.scored is None else (before >= 0) & text.scored
        self.scored.append((row[counts], before[counts], text.token[counts], self.answers + owner[counts]))
        self.answers += len(text.length)

    def layout(self, *, shared: bool, padding_free: bool | None) -> Layout:
        row, column, position, token, piece = (torch.cat([p[i] for p in self.pieces]) for i in range(5))
        longest, device = int(column.max()) + 1 if len(column) else 1, row.device
        width = -(-longest // self.multiple) * self.multiple
        flat = row * width + column
        input_ids = torch.full((self.rows, width), self.pad_id, dtype=torch.int64, device=device)
        input_ids.view(-1)[flat] = token
        position_ids = torch.arange(width, device=device).repeat(self.rows, 1)
        position_ids.view(-1)[flat] = position
        segment = torch.full((self.rows, width), -1, device=device)
        segment.view(-1)[flat] = piece
        if shared:
            position_ids[segment < 0] = 0  # a position inside the model's range, whatever the sum of both answers
            visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
            mask = (visible & torch.ones(width, width, dtype=torch.bool, device=device).tril())[:, None]
        else:
            mask = (segment >= 0).long()
        scored_row, before, target, answer = (torch.cat([s[i] for s in self.scored]) for i in range(4))
        length = torch.bincount(answer, minlength=self.answers)
        predict = scored_row * width + before
        filled = (segment >= 0).view(-1)
        real = int(filled.sum())
        layout = Layout(input_ids, position_ids, mask, predict, target, answer, length, self.answers, real)
        wasted = 1 - real / max(1, len(filled)) > WASTE if padding_free is None else padding_free
        return _packed(layout, filled) if wasted else layout


def _packed(layout: Layout, filled: Tensor) -> Layout:
    """The rows of a layout behind each other, without the places that are not ``filled``, (R · T,) bool."""
    place = filled.nonzero()[:, 0]
    lengths = filled.view(layout.input_ids.shape).sum(1)
    return layout._replace(
        input_ids=layout.input_ids.view(-1)[place][None],
        position_ids=layout.position_ids.view(-1)[place][None],
        predict=(torch.cumsum(filled, 0) - 1)[layout.predict],
        place=place,
        starts=torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0)).int(),
    )


def _equal(a: Ragged, b: Ragged) -> Tensor:
    """Which texts are equal in both, (B,) bool."""
    same = a.length == b.length
    owner_a, place = spread(a.length)
    start_b = torch.cumsum(b.length, 0) - b.length
    comparable = same[owner_a]
    differs = torch.zeros(len(a.token), dtype=torch.bool, device=same.device)
    differs[comparable] = a.token[comparable] != b.token[(start_b[owner_a] + place)[comparable]]
    return same & (torch.bincount(owner_a[differs], minlength=len(same)) == 0)


__getattr__ = names_of("offpolicy.language.layout")  # the names that stood here in version 0.1
