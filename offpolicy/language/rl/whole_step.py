"""What the parts of an objective want to know of all answers of an optimiser step, however the step is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from offpolicy.compute import processes
from offpolicy.compute.devices import send
from offpolicy.errors import UsageError
from offpolicy.losses.policy_gradient import Facts, Objective, Tokens
from offpolicy.losses.tokens import detached

Seen = list[tuple[np.ndarray, Tokens]]  # rows of the store, and their tokens


def pieces(rows: np.ndarray, group: np.ndarray, number: int, *, whole: bool) -> list[np.ndarray]:
    """The rows of a step in so many pieces of nearly equal size, some of them empty where there are too few.

    Args:
        rows: of the step, group by group.
        group: of every row of the store.
        number: of pieces.
        whole: whether a group stays in one piece.
    """
    if not whole:
        return np.array_split(rows, number)
    first = np.flatnonzero(np.diff(group[rows], prepend=-1))
    ends = [int(part[-1]) if len(part) else -1 for part in np.array_split(np.append(first[1:], len(rows)), number)]
    return np.split(rows, np.maximum.accumulate(np.maximum(ends, 0))[:-1])


class WholeStep:
    """What is known of the step that is being made.

    Args:
        objective: whose parts want to know something.

    Attributes:
        facts: of its parts; None where the micro-batch is the step, or nobody asks.
        factor: on the learning rate, 0-d; None where nobody has a say.
        move: of the output layer by the optimiser, (V, D); None where nobody asks, or while it is not known.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.facts: Facts | None = None
        self.factor: Tensor | None = None
        self.move: Tensor | None = None
        self._place: dict[int, int] = {}
        self._number = 1.0

    def forget(self) -> None:
        self.facts, self.factor, self.move = None, None, None

    def look(self, seen: Seen, rows: np.ndarray, *, iteration: int, device: torch.device) -> None:
        """Note what the parts want to know.

        Args:
            seen: what this process has computed of the step.
            rows: of the step.
            iteration: from 1.
            device: that trains.
        """
        step = joined(seen, rows, device)
        self.facts = self.objective.step_facts(step)
        self.factor = self.objective.rate_factor(step, iteration=iteration)
        self._place = {row: i for i, row in enumerate(rows.tolist())}

    def of(self, rows: np.ndarray, width: int) -> Facts:
        """The facts of these rows of the store, each with so many tokens."""
        facts = self.facts
        if not facts:
            return {}
        at = [self._place.get(row, 0) for row in rows.tolist()]  # a batch that only fills up may not be of the step
        tensors = [value for named in facts.values() for value in named.values()]
        index = send(torch.tensor(at, device="cpu"), tensors[0].device)

        def cut(value: Tensor) -> Tensor:
            return value if value.dim() == 0 else value[index] if value.dim() == 1 else value[index, :width]

        return {name: {key: cut(value) for key, value in named.items()} for name, named in facts.items()}

    def take_rate(self, groups: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Multiply the learning rates of a step by the factor; returns sums for the metrics."""
        if self.factor is None:
            return {}
        factor = self._number = float(self.factor)  # the optimiser of the host wants a number
        if not factor >= 0 or factor == float("inf"):
            raise UsageError(f"the part `lr` of `objective` gave {factor}; expected a finite number ≥ 0.")
        for group in groups:
            group["lr"] *= factor
        one = torch.ones_like(self.factor, dtype=torch.float64)
        return {"lr/factor": torch.stack([one * factor, one]), "lr/skipped": torch.stack([one * (factor == 0), one])}

    @property
    def skips(self) -> bool:
        """Whether the step is not to be made; asked once its learning rates are known."""
        return self.factor is not None and self._number == 0


def joined(seen: Seen, rows: np.ndarray, device: torch.device) -> Tokens:
    """The tokens of all rows of a step in their order, of all processes, padded to the longest answer."""
    seen = [(some, detached(tokens)) for some, tokens in seen]
    if processes.world_size() > 1:
        there = torch.device("cpu")
        parts = processes.gathered([(some, _mapped(tokens, lambda v: v.to(there))) for some, tokens in seen])
        seen = [(some, _mapped(tokens, lambda v: v.to(device))) for part in parts for some, tokens in part]
    place = {row: i for i, row in enumerate(np.concatenate([some for some, _ in seen]).tolist())}
    order = send(torch.tensor([place[row] for row in rows.tolist()], device="cpu"), device)
    width = max(tokens.mask.shape[1] for _, tokens in seen)

    def whole(values: Sequence[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], Mapping):
            return {name: whole([value[name] for value in values]) for name in values[0]}
        return torch.cat([_padded(value, width) for value in values])[order]

    return Tokens(*(whole(values) for values in zip(*(tokens for _, tokens in seen))))


def _padded(value: Tensor, width: int) -> Tensor:
    if value.dim() < 2 or value.shape[1] == width:
        return value
    return pad(value, (0, width - value.shape[1]), value=-1 if value.dtype == torch.int64 else 0)


def _mapped(tokens: Tokens, change: Any) -> Tokens:
    def mapped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: change(one) for name, one in value.items()}
        return None if value is None else change(value)

    return Tokens(*(mapped(value) for value in tokens))
