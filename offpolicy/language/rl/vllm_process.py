"""The process of an engine and the folder it takes weights from: neither outlives the trainer.

The two talk over inherited pipes, so nothing listens on a port, and no object is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.language.rl.vllm_worker import FRAME, message_bytes, message_of

PATIENCE = 10.0  # seconds that a process has to end by itself
MEMORY = Path("/dev/shm")  # a file system in memory
FOLDER = "offpolicy-engine-"
OWNER = "owner"  # a locked file: as long as the lock is held, the folder is in use


class WorkerFault(Exception):
    """The process of an engine has ended, hangs, or says that it cannot go on."""


class WorkerProcess:
    """A process of our own at the other end of two pipes.

    Args:
        command: to start; the numbers of the pipes are added.
        environment: of the process.
        log: file that takes what it prints.
        timeout: seconds after which a process that reads nothing counts as hanging.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float) -> None:
        self.timeout = timeout
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [*command, str(read), str(write)],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(read, write),
                start_new_session=True,  # Ctrl-C is for the trainer, which tells the engine
            )
        os.close(read)
        os.close(write)
        os.set_blocking(self._write, False)

    def send(self, kind: str, arrays: Mapping[str, np.ndarray] | None = None, **facts: Any) -> None:
        """Send a message.

        Raises:
            WorkerFault: the process has ended, or does not read.
        """
        rest, last = memoryview(message_bytes(kind, dict(arrays or {}), **facts)), time.monotonic()
        while rest:
            _, ready, _ = select.select([], [self._write], [], 0.5)
            if ready:
                try:
                    rest, last = rest[os.write(self._write, rest[: 1 << 16]) :], time.monotonic()
                except BrokenPipeError:
                    raise WorkerFault(self._end_of()) from None
            elif time.monotonic() - last > self.timeout:
                raise WorkerFault(f"it has read nothing for {self.timeout:g} seconds")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None if none begins within so many seconds.

        Raises:
            WorkerFault: the process has ended, or stops in the middle of a message.
        """
        ready, _, _ = select.select([self._read], [], [], seconds)
        if not ready:
            return None
        head, body = FRAME.unpack(self._bytes(FRAME.size))
        return message_of(self._bytes(head), self._bytes(body))

    def _bytes(self, number: int) -> bytes:
        found = bytearray()
        while len(found) < number:
            ready, _, _ = select.select([self._read], [], [], self.timeout)
            if not ready:
                raise WorkerFault(f"it stopped in the middle of a message for {self.timeout:g} seconds")
            part = os.read(self._read, min(number - len(found), 1 << 20))
            if not part:
                raise WorkerFault(self._end_of())
            found += part
        return bytes(found)

    def _end_of(self) -> str:
        """How the process ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(PATIENCE)
            return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended (code {code})"
        return "it closed its pipe"

    def end(self) -> None:
        """End the process and those that it has started; a second call does nothing."""
        for pipe in (self._write, self._read):
            with contextlib.suppress(OSError):
                os.close(pipe)
        self._write = self._read = -1
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE if self.process.poll() is None else 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind, or itself
        self.process.wait()


class PrivateFolder:
    """A folder that only this user may open, in memory where there is room, for as long as this process lives.

    Args:
        needed: bytes that will lie in it.
        otherwise: folder to make it in where memory has no room.
    """

    def __init__(self, needed: int, otherwise: Path) -> None:
        where = next((place for place in (MEMORY, otherwise) if place.is_dir() and _free(place) > needed), otherwise)
        where.mkdir(parents=True, exist_ok=True)
        remove_forsaken(where)
        self.in_memory = where == MEMORY
        made = Path(tempfile.mkdtemp(prefix=f".{FOLDER}", dir=where))  # for this user alone
        self._lock = _locked(made / OWNER)
        self.path = made.with_name(f"{FOLDER}{os.getpid()}-{made.name.rpartition('-')[2]}")
        made.rename(self.path)
        self.maker = os.getpid()

    def remove(self) -> None:
        """Remove it with all it holds; a second call does nothing, nor does a copy of the process."""
        if os.getpid() != self.maker or self._lock is None:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def end_all(folder: PrivateFolder, held: list[WorkerProcess]) -> None:
    """End an engine's process and remove its folder; nothing in a copy of the process that made them."""
    if os.getpid() == folder.maker:
        while held:
            held.pop().end()
        folder.remove()


def remove_forsaken(where: Path) -> None:
    """Remove the private folders of processes of this user that are no more, however they ended."""
    for folder in where.glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):
            mine = folder.lstat().st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            if not mine or folder.name.startswith(f"{FOLDER}{os.getpid()}-"):
                continue
            lock = _locked(folder / OWNER)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """A file that this process has locked, which the system undoes at its end; None if another one has."""
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _free(place: Path) -> int:
    try:
        return shutil.disk_usage(place).free if os.access(place, os.W_OK) else 0
    except OSError:
        return 0


def end_of_log(log: Path, number: int = 20) -> str:
    """The end of a log, for errors."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line[:500] for line in lines[-number:])
