"""Blocks of updates as CUDA graphs: all kernels of a block in one launch.

A graph repeats kernels with the arguments and addresses that they had when it was recorded; no Python runs. So all that
changes between two blocks is a tensor that stays in its place: the number of updates made, learning rates that follow a
schedule, weights, moments and metrics. What Python decides by the number of an update is its *phase*; blocks with the
same row of phases share a graph. The first block of a row runs eagerly, which makes moments and whatever else is made
once; the next one is recorded, and from then on it is repeated.
"""

from __future__ import annotations

import dis
import inspect
import logging
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offpolicy.compute.devices import finish_work
from offpolicy.errors import UsageError

log = logging.getLogger(__name__)
GRAPHS = 8  # kept at most; blocks of other rows of phases run eagerly
LATELY = 32  # rows of phases that are remembered
DEVICES = ("cuda",)  # that have graphs
OWN = ("_updates", "_updates_asked", "_in_block")  # what the base class itself changes during an update
PLAIN = (bool, int, float, str, type(None))
NUMBER = (  # in words
    "uses the number of the update, which a graph would freeze. Define `phase(step)` beside it: what Python decides by "
    "the number, such as `step % 2 == 0`"
)


class GraphRecorder:
    """Records work of a CUDA device as graphs, all in one pool of memory, as one is repeated at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], None]) -> None:
        """Do work on the stream that graphs are recorded on, so that what torch keeps for each stream is there."""
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                work()
            here.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats work. Nothing is done on the device now, also where an error ends the recording."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream()),  # also put back where an error ends the recording
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            work()
        return graph.replay


@dataclass
class Repeated:
    """A recorded block: what repeats it, and how often it adds to each metric."""

    replay: Callable[[], None]
    counts: dict[str, int]


class Blocks:
    """The blocks of updates of a method, as graphs where that is possible.

    Made when data are bound, so what was recorded with others is dropped.

    Args:
        method: of which ``phase(step)`` and ``run_updates(t, k)`` are called.

    Attributes:
        reason: why blocks run eagerly, to follow a colon; empty where they are graphs, or run as one would be recorded.

    Raises:
        UsageError: ``run.graph`` asks for graphs, and the device has none.
    """

    def __init__(self, method: Any) -> None:
        self.method, self.dry = method, method.run.graph == "dry"
        self._full = False  # more kinds of blocks than are kept
        self.forget()
        check_phase(method)
        self.reason = why_eager(method)
        if self.reason and method.run.graph is not False and (self.dry or method.device.type in DEVICES):
            self._say(self.reason)

    def forget(self, *_: Any) -> None:
        """Record anew: what graphs know has been replaced."""
        if getattr(self, "_repeated", None):
            finish_work(self.method.device)  # before graphs and their memory go
        self._repeated: dict[Hashable, Repeated] = {}
        self._seen: deque[Hashable] = deque(maxlen=LATELY)
        self._recorder: GraphRecorder | None = None
        self._settings = settings(self.method)

    def facts(self) -> list[tuple[str, str]]:
        """For the first screen: how updates are made, where there is a choice."""
        if not self.dry and self.method.device.type not in DEVICES:
            return []
        if self.reason:
            return [("blocks", f"updates one by one, not as CUDA graphs: {self.reason}")]
        how = "one by one as a CUDA graph would be recorded" if self.dry else "as one CUDA graph"
        return [("blocks", f"up to {self.method.run.block} updates, {how}")]

    def run(self, t: int, k: int) -> None:
        """Updates t + 1 … t + k."""
        if self.reason:
            self.method.run_updates(t, k)
            return
        if self._settings != settings(self.method):  # they are Python's, so a graph keeps those of its recording
            self.forget()
        pattern = (k, *map(self.method.phase, range(t + 1, t + k + 1)))
        if pattern in self._repeated:
            self._repeat(self._repeated[pattern])
        elif pattern not in self._seen:
            self._seen.append(pattern)
            self._first(t, k)
        elif self.dry:
            self.method.run_updates(t, k)
        elif len(self._repeated) >= GRAPHS:
            if not self._full:
                self._full = True
                self._say(
                    f"there are more than {GRAPHS} kinds of blocks, and only so many are kept. Take a `run.block` that "
                    "divides the intervals of rows and evaluations"
                )
            self.method.run_updates(t, k)
        else:
            self._record(pattern, t, k)

    def _first(self, t: int, k: int) -> None:
        """The first block of its pattern, which must not use what a graph would freeze."""
        before, self.method._updates_asked = plain_state(self.method), False
        self._recording_stream(lambda: self.method.run_updates(t, k))
        after = plain_state(self.method)
        changed = [name for name in after if name not in before or before[name] != after[name]]
        name = type(self.method).__name__
        if self.method._updates_asked and not declares_phase(type(self.method)):
            self._fall_back(f"`update` of {name} {NUMBER}")
        elif changed:
            self._fall_back(
                f"an update of {name} changes `{changed[0]}`, a value of Python, which a graph would not do. Keep it "
                "in a buffer (`register_buffer`)"
            )

    def _recording_stream(self, work: Callable[[], None]) -> None:
        if self.dry:
            work()
            return
        if self._recorder is None:
            self._recorder = GraphRecorder(self.method.device)
        self._recorder.warm(work)

    def _record(self, pattern: Hashable, t: int, k: int) -> None:
        method, meter = self.method, self.method.meter
        assert self._recorder is not None
        before = dict(meter.counts)
        try:
            replay = self._recorder.record(lambda: method.run_updates(t, k))
        except Exception as error:
            self._fall_back(f"recording them failed with {first_error(error)}")
            meter.counts = before
            method.run_updates(t, k)
            return
        counts = {name: n - before.get(name, 0) for name, n in meter.counts.items()}
        meter.counts = before
        self._repeated[pattern] = Repeated(replay, counts)
        self._repeat(self._repeated[pattern])

    def _repeat(self, block: Repeated) -> None:
        block.replay()
        self.method.meter.count(block.counts)

    def _fall_back(self, reason: str) -> None:
        self.forget()
        self.reason = reason
        self._say(reason)

    def _say(self, reason: str) -> None:
        log.warning("Updates are not made as CUDA graphs: %s.", reason)


def why_eager(method: Any) -> str:
    """Why the updates of a method cannot be graphs as far as that is known beforehand; empty where they can.

    Raises:
        UsageError: ``run.graph`` asks for graphs, and the device has none.
    """
    option, device = method.run.graph, method.device
    if option is True and device.type not in DEVICES:
        raise UsageError(
            f"`run.graph` is true, and the device is {device.type}; expected a CUDA device. Leave it out, or take "
            "'dry' to try the same updates without graphs."
        )
    if option == "dry" and device.type not in ("cpu", *DEVICES):
        raise UsageError(f"`run.graph` is 'dry', and the device is {device.type}; expected cpu or cuda. Leave it out.")
    if option is False:
        return "`run.graph` is false"
    if option == "auto" and device.type not in DEVICES:
        return f"the device is {device.type}"
    reason = why_not_repeated(method)
    if reason:
        return reason
    if method.bound.device.type != device.type:
        return "batches are read from the memory of the host, as the data lie there"
    return ""


def why_not_repeated(method: Any) -> str:
    """Why the operations of an update cannot be noted once and repeated, on any device; empty where they can."""
    name = type(method).__name__
    if loads_number(type(method).update) and not declares_phase(type(method)):
        return f"`update` of {name} {NUMBER}"
    if method.has_dropout:
        return f"the dropout of {name} draws from a generator that is seeded at every update"
    if method.world_size > 1:
        return f"gradients are averaged over {method.world_size} processes"
    return ""


def loads_number(update: Callable[..., Any]) -> bool:
    """Whether a method's ``update(self, batch, step)`` does anything with ``step``, if only to hand it on."""
    code = getattr(inspect.unwrap(update), "__code__", None)
    if code is None or code.co_argcount < 3:
        return True  # nobody can tell
    name = code.co_varnames[2]
    loads = (i.argval for i in dis.get_instructions(code) if "LOAD_FAST" in i.opname)  # one name, or two at once
    return name in code.co_cellvars or any(name in (some if isinstance(some, tuple) else (some,)) for some in loads)


def declares_phase(method: type) -> bool:
    """Whether a method has a ``phase`` for its ``update``: of the same class, or of one that inherits it."""
    for cls in method.__mro__:
        if "phase" in vars(cls):
            return True
        if "update" in vars(cls):
            return False
    return False


def check_phase(method: Any) -> None:
    """Refuse a ``phase`` that cannot be compared (UsageError)."""
    found = method.phase(1)
    try:
        hash(found)
        plain = not isinstance(found, torch.Tensor)
    except TypeError:
        plain = False
    if not plain:
        raise UsageError(
            f"`phase` of {type(method).__name__} gives a {type(found).__name__}; expected a plain value, such as that "
            "of `step % 2 == 0`, or a tuple of some."
        )


def first_error(error: BaseException) -> str:
    """The first line of an error; of that which ended a recording, not of the end that it led to."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__} ({(str(error) or 'no message').splitlines()[0].rstrip('.')})"


# -- what a graph would freeze ---------------------------------------------------------------------------------------


def settings(method: Any) -> dict[str, Any]:
    """The hyperparameters of a method; those that are no plain values as which object they are."""
    return {name: value if isinstance(value, (*PLAIN, tuple)) else id(value) for name, value in method.hparams.items()}


def plain_state(method: nn.Module) -> dict[str, Any]:
    """The attributes of a method and its layers that are plain values, and the lengths of those that are lists."""
    found: dict[str, Any] = {}
    for place, module in method.named_modules():
        for name, value in vars(module).items():
            key = f"{place}.{name}" if place else name
            if isinstance(value, PLAIN) and key not in OWN:
                found[key] = value
            elif isinstance(value, (list, deque)):
                found[key] = len(value)
    return found


__all__ = ["Blocks", "GraphRecorder"]
