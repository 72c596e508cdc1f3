"""A stand-in for CUDA graphs on the CPU: the operations of a piece of work, repeated without its Python.

As on a GPU, recording does nothing to the tensors that were there before, an operation whose result the host would wait
for is refused, and what is repeated are the same operations on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)


class Recording(TorchDispatchMode):
    """Carries out operations, and notes them with their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor], bool]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of what is written to, and what they were

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS or boolean_index(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nand more")
        kwargs, views = kwargs or {}, True
        for argument, value in zip(func._schema.arguments, args):
            info = argument.alias_info
            if info is not None and info.is_write:
                views = False
                for tensor in tree_leaves(value):
                    self.keep(tensor)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        views &= any(r.alias_info is not None for r in func._schema.returns)
        if not views:
            self.calls.append((func, args, kwargs, made, is_fresh(func)))
        return result

    def keep(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.before:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self.before[storage._cdata] = (whole, whole.clone())

    def undo(self) -> None:
        for whole, old in self.before.values():
            whole.copy_(old)

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, made, fresh in self.calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for place, value in zip(made, again, strict=True):
                if fresh:
                    place.copy_(value)


def is_fresh(func: Any) -> bool:
    """Whether the results are new tensors, not operands that were written to."""
    return not any(r.alias_info is not None for r in func._schema.returns)


def boolean_index(func: Any, args: Any) -> bool:
    return func.overloadpacket is aten.index and any(x is not None and x.dtype == torch.bool for x in args[1])


class Recorder:
    """In the place of :class:`offpolicy.training.graph.GraphRecorder`."""

    made: int = 0
    repeated: int = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def warm(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        try:
            with recording:
                work()
        finally:
            with torch.no_grad():
                recording.undo()
        Recorder.made += 1

        def replay() -> None:
            Recorder.repeated += 1
            recording.repeat()

        return replay
