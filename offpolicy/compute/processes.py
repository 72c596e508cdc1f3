"""Processes of one run: only one run trains in a folder, and those of a run notice when one of them is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from offpolicy.errors import UsageError

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


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    import torch

    if rank_and_world()[1] == 1:
        return False
    text = str(error).lower()
    return isinstance(error, getattr(torch.distributed, "DistError", ())) or any(words in text for words in GONE)


def rank_and_world() -> tuple[int, int]:
    """Number of this process, and how many work together."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Go on once all processes that work together have come here."""
    from torch import distributed

    if rank_and_world()[1] > 1:
        distributed.barrier()


def stop_watching() -> None:
    """Keep Lightning's launcher from killing this process because another one of the run has ended.

    Its watcher does so within five seconds whenever a child ends with a code other than 0; an interrupted child does.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []


def end_together() -> None:
    """Wait for the other processes of a run, so that none is gone while the first still writes."""
    with contextlib.suppress(RuntimeError):
        wait_for_all()
