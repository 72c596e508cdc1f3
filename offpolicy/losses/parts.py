"""What is asked of a user's own parts of an objective: to see answers one by one, and to keep what they remember.

The parts of this library give each answer a value that depends on that answer alone, or on what they were told of the
whole step, and keep what they remember. A part of a user may be anything that can be
called, so both are tried out before and during training.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, Totals, detached

ROWS, LENGTH = 4, 5  # of the made batch that parts are tried on
SEE_ALL = ("advantage", "lr")  # slots whose parts are given all answers at once
CALLS = 2  # the second shows what a part remembers of the first


def told(part: Any, attribute: str) -> Any:
    """What a part says of itself; a function with parameters is a partial, which hides what the function says."""
    return getattr(getattr(part, "func", part), attribute, None)


class OwnParts:
    """The parts of an objective that come from outside of this library, by slot; and what all parts remember.

    Args:
        parts: ``slot`` or ``slot/number`` → component, those of the library included.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        own = {name: part for name, part in parts.items() if not _of_library(part)}
        self.parts = own
        self.keepers = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self._before = {name: _memory(part) for name, part in own.items() if name not in self.keepers}

    # -- what a part remembers -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Slot → what its part's ``state_dict`` gives."""
        return {name: dict(part.state_dict()) for name, part in self.keepers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Hand each part its state; returns the slots whose part has found none."""
        for name, part in self.keepers.items():
            if name in state:
                part.load_state_dict(state[name])
        return sorted(self.keepers.keys() - state.keys())

    def check_memory(self) -> None:
        """Raise :class:`UsageError` when a part has changed that could not be put back after an interruption."""
        for name, before in self._before.items():
            now = _memory(self.parts[name])
            changed = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
            if changed:
                raise UsageError(
                    f"the part {_title(self.parts[name])} of `objective` ({name}) changes while it is used "
                    f"(`{changed[0]}`), and a resumed run would begin it anew; expected methods `state_dict()` and "
                    "`load_state_dict(state)` that keep what it remembers ({} if that may be forgotten)."
                )

    # -- what a part sees ----------------------------------------------------------------------------------------------

    def check_split(self, reason: str) -> None:
        """Raise :class:`UsageError` when a part gives other values once a step is cut into micro-batches.

        Args:
            reason: why the steps of this run are cut, for the message.
        """
        for name, part in self.parts.items():
            if name not in SEE_ALL and _depends_on_split(name, part):
                raise UsageError(
                    f"the part {_title(part)} of `objective` ({name}) depends on which answers it sees at once, and "
                    f"{reason}; expected values that each answer has by itself. Pass a --model.micro_batch_size and "
                    "--model.batch_size that make a step one forward pass of one process, or change the part."
                )


def _of_library(part: Any) -> bool:
    kind = part if hasattr(part, "__module__") and not hasattr(part, "func") else getattr(part, "func", part)
    return str(getattr(kind, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _title(part: Any) -> str:
    found = getattr(part, "func", part)
    return getattr(found, "__name__", type(found).__name__)


def _memory(part: Any) -> dict[str, bytes]:
    """The attributes of an object as bytes; those that cannot be written are left out."""
    found = {}
    for name, value in getattr(part, "__dict__", {}).items():
        try:
            found[name] = pickle.dumps(value)
        except Exception:  # an open file, a lambda: whatever it is, nobody could keep it
            continue
    return found


def _depends_on_split(name: str, part: Any) -> bool:
    """Whether a part values an answer by the others of its micro-batch; False where it cannot be tried."""
    call = _caller(name)
    tokens, totals = _made_tokens()
    halves = [_rows(tokens, slice(0, 1)), _rows(tokens, slice(1, ROWS))]
    try:
        whole, cut = copy.deepcopy(part), copy.deepcopy(part)
        for _ in range(CALLS):
            expected = list(call(whole, _informed(whole, tokens, [tokens])[0], totals))
            found = [list(call(cut, half, totals)) for half in _informed(cut, tokens, halves)]
            joined = [sum(pair) if pair[0].dim() == 0 else torch.cat(pair) for pair in zip(*found)]
            if not all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(expected, joined)):
                return True
    except Exception:  # it needs what the made batch does not have: the run itself will tell
        return False
    return False


def _informed(part: Any, tokens: Tokens, pieces: list[Tokens]) -> list[Tokens]:
    """Pieces of a step, one after the other, with what a part wants to know of the whole."""
    find = told(part, "step_facts")
    if not find:
        return pieces
    facts, start, found = find(detached(tokens)), 0, []
    for piece in pieces:
        rows = slice(start, start := start + len(piece.mask))
        found.append(piece._replace(step=_cut(facts, rows)))
    return found


def _caller(name: str) -> Callable[..., Iterator[Tensor]]:
    """How the part of a slot is called, and the tensors that it gives: (B, T) each, or a share of a mean."""
    slot, _, rest = name.partition("/")

    def tensors(part: Any, tokens: Tokens, totals: Totals) -> Iterator[Tensor]:
        if "aggregation" in (slot, rest.rpartition("/")[2]):
            found = part(tokens.logp.exp(), tokens.mask, totals)
        elif slot == "trust":
            found = part(Ratio((tokens.logp - tokens.behavior_logp).exp()), tokens.advantage[:, None], tokens)
        elif slot in ("ratio", "weight"):
            found = part(tokens)
        elif slot == "terms":
            found = part(tokens, totals, iteration=1)
        else:
            found = part(tokens, iteration=1)
        for value in found if isinstance(found, Ratio | Surrogate) else (found,):
            if value is not None:
                yield value.detach().double()

    return tensors


def _made_tokens() -> tuple[Tokens, Totals]:
    """A batch with every field on the host, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")

    grid = (ROWS, LENGTH)
    row, place = torch.arange(ROWS, device="cpu"), torch.arange(LENGTH, device="cpu")
    mask = (place < torch.tensor([5, 3, 4, 2], device="cpu")[:, None]).double()
    fields: dict[str, Any] = {name: -numbers(*grid) for name in Tokens._fields if name.endswith("logp")}
    fields |= {name: numbers(*grid) for name in Tokens._fields if name not in fields}
    fields |= {
        "mask": mask,
        "advantage": numbers(ROWS) - 0.5,
        "external": (row == 3)[:, None].expand(grid),
    }
    turn = torch.where(mask > 0, place // 2, -1)
    columns = dict.fromkeys(("prompt", "iteration", "policy_version", "source", "given"), row // 2)
    columns |= {"group": (row > 0).long(), "reward": numbers(ROWS), "length": mask.sum(-1).long(), "ended": row != 2}
    columns |= {"turn": turn, "segment": turn, "stage": turn.clamp(max=0)}
    fields |= {"lag": row, "logp": fields["logp"].requires_grad_(), "columns": columns, "step": None}
    return Tokens(**fields), Totals(ROWS, int(mask.sum()), 2 * LENGTH, LENGTH)


def _rows(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(*(_cut(value, rows) for value in tokens))


def _cut(value: Any, rows: slice) -> Any:
    if isinstance(value, Mapping):
        return {name: _cut(one, rows) for name, one in value.items()}
    return value if value is None or value.dim() == 0 else value[rows]
