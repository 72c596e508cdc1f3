"""Writing beside training: a copy of what is to be written, and a thread that writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from copy import copy as shallow
from typing import Any

import torch
from torch import Tensor

LEAST = 64 << 20  # bytes from which on a checkpoint is written beside training without being asked: about 0.1 s
ROOM = 2  # times its size has to be free for the copy
BESIDE = ("auto", True, False)


class Writing:
    """At most one call at a time in a thread; its error is raised where the caller asks next."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def pending(self) -> bool:
        """Whether a call is still running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, call: Callable[[], object]) -> None:
        """Begin a call, once the former one has ended.

        Raises:
            whatever the former one did.
        """
        self.wait()

        def run() -> None:
            try:
                call()
            except BaseException as error:
                self._error = error

        # a daemon, so that a second Ctrl-C ends at once; the half-written file has a name of its own
        self._thread = threading.Thread(target=run, name="offpolicy-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the call that runs, if any. Raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what a call that has ended raised."""
        if self.pending:
            return
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def is_beside(choice: bool | str, tree: Any, free: Callable[[], int]) -> bool:
    """Whether a checkpoint is written beside training.

    Args:
        choice: one of :data:`BESIDE`; "auto" is for checkpoints that take time to write, and fit into memory twice.
        tree: plain values and tensors.
        free: asked for the bytes that can be had.
    """
    if isinstance(choice, bool):
        return choice
    size = bytes_of(tree)
    return size >= LEAST and free() >= ROOM * size


def bytes_of(tree: Any) -> int:
    """Bytes of the tensors of a tree; what several of them share counts once."""
    here = [x.to_local() if hasattr(x, "to_local") else x for x in tensors_in(tree)]  # this process's part
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in here}
    return sum(storages.values())


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)


@torch.no_grad()
def copied(tree: Any) -> Any:
    """A tree of plain values as it is now, in memory of its own on the host: what training changes later is not in it.

    Tensors that share memory share their copy, so that a file of it is no larger.
    """
    storages: dict[tuple[torch.device, int], Any] = {}

    def copy(x: Tensor) -> Tensor:
        if type(x) not in (Tensor, torch.nn.Parameter):  # it may keep its numbers elsewhere
            return x.detach().clone().cpu()
        own = x.untyped_storage()
        key = (x.device, own.data_ptr())
        if key not in storages:
            storages[key] = own.clone() if x.device.type == "cpu" else own.cpu()
        made = torch.empty(0, dtype=x.dtype, device="cpu")
        return made.set_(storages[key], x.storage_offset(), x.size(), x.stride())

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copy(value)
        if isinstance(value, Mapping):
            made: Any = shallow(value)  # with the notes of torch
            for key, item in value.items():
                made[key] = walk(item)
            return made
        return type(value)(map(walk, value)) if isinstance(value, (list, tuple)) else value

    return walk(tree)


__all__ = ["BESIDE", "Writing", "bytes_of", "copied", "is_beside"]
