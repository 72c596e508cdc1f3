"""How long answers may be, by the iteration (option ``length_cycle``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offpolicy.errors import UsageError, check_range
from offpolicy.registry import make


@dataclass(frozen=True)
class CosineCycle:
    """L(k) = low + (high − low)·(1 + cos(2π(k − 1)/n))/2: high at the start of a cycle, low in its middle.

    SIRI (arXiv:2509.25176) compresses answers and lets them grow again in two or three such cycles.

    Args:
        low: share of the longest answer, in (0, 1].
        iterations: n ≥ 2 of a cycle.
    """

    low: float = 0.5
    iterations: int = 100

    def __post_init__(self) -> None:
        check_range("length_cycle.low", self.low, 0.0, 1.0, lower_open=True)
        check_range("length_cycle.iterations", self.iterations, 2)

    def length(self, iteration: int, high: int) -> int:
        """Tokens, ≥ 1; ``high`` for iteration 0."""
        if not iteration:
            return high
        low = self.low * high
        part = (1 + math.cos(2 * math.pi * ((iteration - 1) % self.iterations) / self.iterations)) / 2
        return max(1, round(low + (high - low) * part))

    def fact(self, high: int) -> str:
        """For the first screen."""
        return (
            f"answers up to {high} tokens, falling to {max(1, round(self.low * high))} and rising again every "
            f"{self.iterations} iterations"
        )


CYCLES = {"cosine": CosineCycle}


def make_cycle(spec: Any) -> CosineCycle | None:
    """The cycle of the option ``length_cycle``; None for none.

    Raises:
        UsageError: it is no mapping of parameters, or one of them cannot be.
    """
    if spec is None:
        return None
    if not isinstance(spec, Mapping):
        raise UsageError(f"`length_cycle` is {spec!r}; expected parameters, as {{'low': 0.5, 'iterations': 100}}.")
    return make("length_cycle", {"name": "cosine", **spec}, CYCLES)
