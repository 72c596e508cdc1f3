"""Updates as compiled code on the CPU: what ``run.compile`` "update" does.

torch.compile compiles a loss; what lies between losses, the backward pass, Adam and targets, stays one operation after
another. Here the operations of a whole update are noted once, gradients and optimisers included, and made into one
function by torch's compiler. It reads and writes the weights, moments and targets where they lie, so checkpoints,
evaluation and all else are as without it. What Python decides by the number of an update is its *phase*; each phase has
a function of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpolicy.compute.optim import traceable_adam
from offpolicy.compute.torch_private import compile_operations, operations_of
from offpolicy.errors import UsageError
from offpolicy.training.graph import plain_state, why_not_repeated

log = logging.getLogger(__name__)
LONG = 100_000  # updates, of which compiling is a small part
PHASES = 4  # compiled at most; updates of others run operation by operation


class Code(NamedTuple):
    """One compiled update: tensors in, metrics out."""

    call: Callable[..., Any]
    state: list[Tensor]
    metrics: list[str]


class CompiledUpdates:
    """The updates of a method, compiled where that is possible.

    Args:
        method: a method whose data are bound.

    Attributes:
        reason: why updates run operation by operation, to follow a colon; empty where they are compiled.

    Raises:
        UsageError: the device is no CPU.
    """

    def __init__(self, method: Any) -> None:
        self.method, self.reason = method, why_not(method)
        self.forget()
        if self.reason:
            self._fall_back(self.reason)

    def forget(self) -> None:
        """Compile anew: tensors that the code knows have been replaced."""
        self._codes: dict[Hashable, Code] = {}
        self._hparams = dict(self.method.hparams)

    def fact(self) -> str:
        """For the first screen."""
        if self.reason:
            return f"no: {self.reason}"
        return "whole updates, which takes half a minute to some minutes at the start"

    def run(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Make an update and return its metrics."""
        if self._hparams != self.method.hparams:  # they are Python's, so the code keeps those of its making
            self.forget()
        phase = self.method.phase(step)
        code = self._codes.get(phase)
        if code is None and not self.reason and len(self._codes) < PHASES:
            code = self._compile(phase, batch, step)
        if code is None:
            return self.method.update(batch, step)
        self.method._updates = step
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = code.call(*code.state, *self._rates(step), *tensors_of(batch))
        return dict(zip(code.metrics, found, strict=True))

    def _rates(self, step: int) -> list[Tensor]:
        """Learning rates of an update that follow a schedule."""
        return [rates[step - self.method._planned_from] for rates in self.method._planned.values()]

    def _compile(self, phase: Hashable, batch: Any, step: int) -> Code | None:
        method, began = self.method, time.perf_counter()
        for name, optimizer in method._optimizers.items():
            optimizer.make_moments(method.params(name))
        state = state_of(method)
        saved, plain = [x.detach().clone() for x in state], plain_state(method)
        names: list[str] = []

        def update(*_: Tensor) -> list[Tensor]:
            metrics = method.update(batch, step)
            names[:] = list(metrics)
            return [value.detach() for value in metrics.values()]

        try:
            with traceable_adam():
                graph = operations_of(update, [*state, *self._rates(step), *tensors_of(batch)])
            changed = [name for name, value in plain_state(method).items() if plain.get(name, value) != value]
            if changed:
                raise RuntimeError(f"an update changes `{changed[0]}`, a value of Python")
            given = [x.detach() for x in (*state, *self._rates(step), *tensors_of(batch))]
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                put_back(state, saved)
                call = compile_operations(graph, given)
        except Exception as error:
            self._fall_back(why_not_compiled(error))
            return None
        finally:
            put_back(state, saved)
        log.info("compiled an update of %s in %.0f s", type(method).__name__, time.perf_counter() - began)
        code = self._codes[phase] = Code(call, [x.detach() for x in state], list(names))
        return code

    def _fall_back(self, reason: str) -> None:
        self._codes, self.reason = {}, reason
        log.warning("Updates are not compiled: %s.", reason)


def compile_advice(method: Any, updates: int) -> list[str]:
    """A sentence for a run of so many updates that compiled ones would make shorter; none for others."""
    if method.run.compile or method.device.type != "cpu" or updates < LONG or why_not(method):
        return []
    return [
        "--run.compile update takes some minutes at most to compile whole updates, and then more of them are made: 1.4 "
        "times as many in TD3BC and IQL with networks of 2×256, where it was measured."
    ]


def why_not(method: Any) -> str:
    """Why the updates of a method cannot be compiled, as far as that is known beforehand; empty where they can.

    Raises:
        UsageError: the device is no CPU.
    """
    if method.device.type != "cpu":
        raise UsageError(
            f"`run.compile` is 'update', and the device is {method.device.type}; expected cpu. Leave it out: on a CUDA "
            "device blocks of updates are graphs (`run.graph`)."
        )
    return why_not_repeated(method)


def why_not_compiled(error: Exception) -> str:
    """Why updates could not be compiled."""
    if "_local_scalar_dense" in str(error):
        return "their Python looks at values of tensors, which compiled code cannot"
    first = (str(error) or "no message").splitlines()[0].rstrip(".")
    return f"compiling them failed with {type(error).__name__} ({first})"


def state_of(method: Any) -> list[Tensor]:
    """All that updates read and write: weights, targets, buffers and moments."""
    moments = [x for o in method._optimizers.values() for state in o.state.values() for x in state.values()]
    return [*method.parameters(), *method.buffers(), *moments]


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, of its noise and of its extra columns, in one order."""
    fields = [value for value in batch._asdict().values() if isinstance(value, Tensor)]
    more = [part for part in (batch.noise, getattr(batch, "extra", None)) if part is not None]
    return [*fields, *(value for part in more for value in vars(part).values())]


def put_back(state: list[Tensor], saved: list[Tensor]) -> None:
    """Give tensors the values that they had."""
    with torch.no_grad():
        for now, before in zip(state, saved, strict=True):
            now.copy_(before)
