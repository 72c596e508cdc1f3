"""Processes of one run: which one this is, what all of them know, and what happens when one of them is gone.

Only one run trains in a folder. Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offpolicy.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"  # in a run folder while somebody trains in it
GONE = (  # what gloo and NCCL say when the process at the other end has ended
    "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "read error",
    "timed out waiting", "remote process exited", "socket timeout", "connection was likely closed",
)  # fmt: skip


class ProcessLost(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


@contextlib.contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Within it, no other process trains in this run folder.

    A lock of the system (POSIX, also over NFS): it ends with the process that holds it, however that ends. Where the
    folder cannot be written or the file system knows no locks, there is none.

    Args:
        folder: it exists; None for no lock.

    Raises:
        UsageError: another process holds it.
    """
    file = None if folder is None else _lock(folder)
    try:
        yield
    finally:
        if file is not None and folder is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # while it is still held
            os.close(file)


def is_claimed(folder: Path) -> bool:
    """Whether another process trains in this run folder, by the lock of the system: a file alone may be left over."""
    try:
        with claimed(folder):
            return False
    except UsageError:
        return True


def _lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    path = folder / LOCK
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with contextlib.suppress(OSError):
                holder = os.read(file, 1000).decode(errors="replace")
            os.close(file)
            if not isinstance(error, (BlockingIOError, PermissionError)):
                return None  # no locks here
            raise UsageError(_taken(folder, holder)) from None
        with contextlib.suppress(OSError):
            if os.fstat(file).st_ino == os.stat(path).st_ino:  # else its former holder has just removed it
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                os.truncate(file, 0)
                os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode())
                return file
        os.close(file)


def _taken(folder: Path, holder: str) -> str:
    who = "another process"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(holder)
        who = f"process {int(found['pid'])} on {str(found['host'])[:80]} since {str(found['since'])[:40]}"
    return (
        f"{folder} is being trained by {who}; expected a run that nobody trains. Wait for it or stop it, or pass "
        "another --folder to go on from its checkpoint there."
    )


# -- the processes that train together ---------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this process speaks and writes for all, asked before a Trainer exists (launchers set these variables)."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name) or 0) == 0 for name in ranks)


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Join the group of processes that ``torchrun`` started, each with its own device; alone there is none."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo")  # nothing but waiting for one another
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


_by_itself = False


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Within it this process counts as the only one: for work of the first alone, after the run of all."""
    global _by_itself
    before, _by_itself = _by_itself, True
    try:
        yield
    finally:
        _by_itself = before


def world_size() -> int:
    """The number of processes that work together, 1 alone."""
    from torch import distributed

    if _by_itself or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """The number of this process among those that work together, 0 alone."""
    from torch import distributed

    return distributed.get_rank() if world_size() > 1 else 0


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes, all of which ask; the tensor itself is left as it is."""
    from torch import distributed

    if world_size() > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes, all of which ask; the tensor itself is left as it is."""
    world = world_size()
    return sum_over_processes(x) / world if world > 1 else x


def gathered(value: Any) -> list[Any]:
    """The value of every process, by rank; all of them ask."""
    from torch import distributed

    values = [value] * world_size()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Wait until every process is here."""
    from torch import distributed

    if world_size() > 1:
        distributed.barrier()


# -- when one of them is gone ------------------------------------------------------------------------------------------


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    from torch import distributed

    if world_size() == 1:
        return False
    text = str(error).lower()
    return isinstance(error, getattr(distributed, "DistError", ())) or any(words in text for words in GONE)


def end_together() -> None:
    """Wait for the other processes of a run, so that none is gone while the first still writes."""
    with contextlib.suppress(RuntimeError):  # one of them is gone
        wait_for_all()
