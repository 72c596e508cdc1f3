"""How a causal language model reads prompts and goes on token by token, in the quickest way that gives right numbers.

Most models keep keys and values of what they have read, and texts of different lengths may be padded on the left. Some
recurrent models, and some with positions of their own, keep states that cannot be chosen from, or count padding; a few
give wrong probabilities once they are told of their states. So a model is tried on a few tokens before it writes: the
first way is taken that gives the same probabilities as to read each text alone and anew.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.errors import UsageError
from offpolicy.language.kv_cache import ROOM, make_room
from offpolicy.language.policy import base_of, vocabulary_of

log = logging.getLogger(__name__)
STATES = ("past_key_values", "cache", "cache_params", "state")  # names under which models give and take what they keep
TRIAL, STEPS = (
    (5, 2, 9),
    3,
)  # tokens of the trial texts: read at once, and then one by one
EXACT, ROUNDED = 3e-4, 0.1  # total variation between right numbers: in float32, and in low precision
CLOSE = 0.03  # the same of two ways to read, in low precision: four roundings of bfloat16; wrong ways were above 0.1


class Way(NamedTuple):
    """How to read: ``keeps`` "shared" (a prompt once for all answers to it), "rows" (each answer for itself) or ""
    (nothing: every text anew for each token); ``padded``: whether texts of different lengths may go together."""

    keeps: str
    padded: bool


KEPT = (Way("shared", True), Way("shared", False), Way("rows", True), Way("rows", False))
ANEW = (Way("", True), Way("", False))
_known: WeakKeyDictionary[nn.Module, dict[bool, Way]] = WeakKeyDictionary()


def way_of(model: nn.Module, *, keeps: bool = True) -> Way:
    """The quickest way that is right for a model; tried once, and said where it is not the usual one.

    Args:
        model: causal language model of ``transformers``, or one wrapped by ``peft``.
        keeps: whether the model may keep what it has read.

    Raises:
        UsageError: the model looks at tokens that follow, so that it cannot write.
    """
    known = _known.setdefault(model, {})
    if keeps not in known:
        with torch.no_grad(), in_eval(model):
            known[keeps] = _tried(model, (*KEPT, *ANEW) if keeps else ANEW)
        if keeps and known[keeps].keeps != "shared":
            how = "a prompt once for each answer" if known[keeps].keeps else "every text anew for each token"
            name = type(base_of(model)).__name__
            log.warning("%s reads %s, since what it keeps gives no right answers otherwise.", name, how)
    return known[keeps]


def _tried(model: nn.Module, ways: Sequence[Way]) -> Way:
    rng, size = np.random.default_rng(0), vocabulary_of(model)
    texts = [rng.integers(min(3, size - 1), size, first + STEPS) for first in TRIAL]
    right, itself = _alone(model, texts)
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    exact = exact and not torch.is_autocast_enabled(right.device.type)
    if sorted(itself)[len(itself) // 2] > (EXACT if exact else ROUNDED):
        raise UsageError(
            f"{type(base_of(model)).__name__} gives a token other probabilities once other tokens follow it; expected "
            "a model that looks back only. Use a decoder, or set is_decoder in its config.json."
        )
    for way in ways[:-1]:
        try:
            found = _one_by_one(model, texts, way)
        except Exception:  # a state that cannot be taken, given or chosen from: any error of the model
            continue
        if _apart(found, right) <= max(EXACT if exact else CLOSE, 5 * max(itself)):
            return way
    return ways[-1]  # it is how the right numbers were made


def _alone(model: nn.Module, texts: list[np.ndarray]) -> tuple[Tensor, list[float]]:
    """Probabilities after the first tokens of each text and after each of the others, (steps + 1, texts, V), and how
    far the tokens that follow change them: for a causal model, by rounding alone."""
    rows, itself = [], []
    for text, first in zip(texts, TRIAL):
        whole, part = (call(model, torch.from_numpy(ids)[None], use_cache=False)[0][0] for ids in (text, text[:first]))
        rows.append(whole[first - 1 :].float().softmax(-1))
        itself.append(_apart(part[-1].float().softmax(-1), rows[-1][0]))
    return torch.stack(rows, 1), itself


def _one_by_one(model: nn.Module, texts: list[np.ndarray], way: Way) -> Tensor:
    """The same in a way to read: two answers to each text, of which the first one ends after a token."""
    parts = []
    for some in [texts] if way.padded else [[text] for text in texts]:
        token = torch.from_numpy(np.stack([text[len(text) - STEPS :] for text in some]))
        token = token.to(next(model.parameters()).device)
        reader, second = Reader(model, way), torch.arange(1, 2 * len(some), 2, device=token.device)
        found = [reader.read([text[: len(text) - STEPS] for text in some], [2] * len(some))[second]]
        found.append(reader.next(token[:, 0].repeat_interleave(2))[second])
        for t in range(1, STEPS):
            found.append(reader.next(token[:, t], second if t == 1 else None))
        parts.append(torch.stack(found).float().softmax(-1))
    return torch.cat(parts, 1)


def _apart(p: Tensor, q: Tensor) -> float:
    """The largest total variation between distributions along the last axis; infinite where one is no number."""
    apart = (p - q).abs().sum(-1).max().item() / 2
    return apart if apart == apart else float("inf")


class Reader:
    """Reads a batch of texts and goes on with them, a token for each row at a time.

    Args:
        model: as of :func:`way_of`.
        way: how; texts of one batch are equally long unless it is ``padded``.
        room: tokens that will be taken for each row, at most.
    """

    def __init__(self, model: nn.Module, way: Way, room: int = ROOM) -> None:
        self.model, self.way, self.room = model, way, room
        self.device = next(model.parameters()).device

    def read(self, texts: Sequence[np.ndarray], answers: Sequence[int]) -> Tensor:
        """Read each text; logits of the next token for as many rows as answers are wanted to each, (rows, V)."""
        wanted = torch.tensor(answers, dtype=torch.int64, device="cpu")
        owner = torch.repeat_interleave(torch.arange(len(texts), device="cpu"), wanted)
        if not self.way.keeps:
            self.texts = [list(map(int, texts[i])) for i in owner.tolist()]
            return self._anew()
        if self.way.keeps == "rows":
            texts = [texts[i] for i in owner.tolist()]
            owner = torch.arange(len(texts), device="cpu")
        ids, mask = padded(texts, self.device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        self.tells = self.way.padded  # texts of one length begin where the model thinks they do
        logits, name, state = call(
            self.model, ids, _needed(mask), position if self.tells else None, last=True, use_cache=True
        )
        if state is None:
            raise LookupError("the model keeps nothing")
        self.name, self.state = name, state
        owner = owner.to(self.device)
        logits, self.mask, self.last, self.hides = logits[:, -1], mask, position[:, -1:], not bool(mask.all())
        self.rows = torch.arange(len(owner), device=self.device)  # of the state, that are still asked for
        if self.way.keeps == "shared":
            make_room(self.state, self.room)
            _choose(self.state, owner)
            logits, self.mask, self.last = logits[owner], mask[owner], self.last[owner]
        return logits

    def next(self, token: Tensor, keep: Tensor | None = None) -> Tensor:
        """Leave out all rows but ``keep``, take a token for each, (rows,), and give logits of the next, (rows, V)."""
        if not self.way.keeps:
            if keep is not None:
                self.texts = [self.texts[i] for i in keep.tolist()]
            self.texts = [[*text, one] for text, one in zip(self.texts, token.tolist())]
            return self._anew()
        if keep is not None:
            self.rows = self.rows[keep]
            # to leave rows out copies all that is kept of the others, so it waits until an eighth of them is done
            if self.way.keeps == "shared" and 8 * len(self.rows) <= 7 * len(self.last):
                _choose(self.state, self.rows)
                self.mask, self.last = self.mask[self.rows], self.last[self.rows]
                self.rows = torch.arange(len(keep), device=self.device)
        self.last = self.last + 1
        if self.hides:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        ids = token[:, None]
        if len(self.rows) < len(self.last):
            ids = token.new_zeros(len(self.last)).index_copy(0, self.rows, token)[:, None]
        logits, _, state = call(
            self.model,
            ids,
            self.mask if self.hides else None,
            self.last if self.tells else None,
            last=True,
            use_cache=True,
            **{self.name: self.state},
        )
        self.state = self.state if state is None else state
        return logits[:, -1] if len(self.rows) == len(ids) else logits[:, -1].index_select(0, self.rows)

    def _anew(self) -> Tensor:
        return read_anew(self.model, [np.asarray(text) for text in self.texts], self.way)


@torch.no_grad()
def read_anew(model: nn.Module, texts: Sequence[np.ndarray], way: Way) -> Tensor:
    """Logits of the token after each text, (B, V), without anything kept."""
    device = next(model.parameters()).device
    found: Tensor | None = None
    for part in together([len(text) for text in texts], way):
        ids, mask = padded([texts[i] for i in part], device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        told = position if way.padded else None
        logits = call(model, ids, _needed(mask), told, last=True, use_cache=False)[0][:, -1]
        if len(part) == len(texts):
            return logits
        found = logits.new_empty(len(texts), logits.shape[-1]) if found is None else found
        found[torch.tensor(part, device=device)] = logits
    assert found is not None
    return found


def together(lengths: Sequence[int], way: Way) -> Iterator[list[int]]:
    """The texts that may go into one forward pass: all of them, or all of one length."""
    if way.padded:
        yield list(range(len(lengths)))
        return
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    yield from by_length.values()


def call(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None = None,
    position: Tensor | None = None,
    *,
    last: bool = False,
    use_cache: bool,
    **state: Any,
) -> tuple[Tensor, str, Any]:
    """A forward pass with the arguments that the model knows.

    Returns:
        Logits (B, T, V), with ``last`` at least of the last place; the name of what the model keeps; and what it keeps.
    """
    device = next(model.parameters()).device
    wanted = {"attention_mask": mask, "position_ids": position, "use_cache": use_cache, **state}
    if last:
        wanted["logits_to_keep"] = 1
    out = model(input_ids=ids.to(device), **taken(model, wanted))
    name = next((name for name in out if name in STATES), "")  # attributes have former names too
    return out.logits, name, getattr(out, name) if name else None


def taken(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not None and that a model's forward pass takes."""
    known = inspect.signature(base_of(model).forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {k: v for k, v in arguments.items() if v is not None and (open_ended or k in known)}


def padded(texts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each, with padding on the left, so that the last column ends every text."""
    width = max(map(len, texts))
    ids, mask = np.zeros((len(texts), width), np.int64), np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _needed(mask: Tensor) -> Tensor | None:
    """A mask that hides something; without one, attention takes its fast path."""
    return None if bool(mask.all()) else mask


def _choose(state: Any, rows: Tensor) -> None:
    """Keep these rows of what a model keeps, in this order."""
    if isinstance(state, list):
        state[:] = [part[rows] for part in state]
    elif any(not hasattr(layer, "batch_select_indices") or hasattr(layer, "conv_states") for layer in state.layers):
        state.reorder_cache(rows)  # layers with states of their own can do this alone
    else:
        state.batch_select_indices(rows)


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Within it, no part of a model is in training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
