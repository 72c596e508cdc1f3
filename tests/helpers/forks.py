"""Copies of the process that runs the tests: they have imported everything, for which a new Python takes seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass
class Copy:
    """A process that calls one function, with what it wrote and, once it has ended, its exit code (−9: killed)."""

    pid: int
    shown: BinaryIO
    returncode: int | None = None

    def ended(self) -> bool:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode is not None

    @property
    def output(self) -> str:
        """What it wrote until now; its position in the file is its own, so nothing is moved here."""
        size = os.fstat(self.shown.fileno()).st_size
        return os.pread(self.shown.fileno(), size, 0).decode(errors="replace")


def start_copy(call: Callable[[], object], **variables: str) -> Copy:
    """Call a function in a copy of this process, with more variables in its environment."""
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the copy is asked for
    pid = os.fork()
    if pid:
        return Copy(pid, file)
    code = 1
    try:
        os.environ.update(variables)
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        call()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing of pytest may run a second time


def finish(*copies: Copy, timeout: float = 200, grace: float = 20) -> None:
    """Wait until all have ended; once one fails, the others have `grace` seconds to say what became of them."""
    end = time.monotonic() + timeout
    try:
        while [copy for copy in copies if not copy.ended()] and time.monotonic() < end:
            if any(copy.returncode for copy in copies):
                end = min(end, time.monotonic() + grace)
            time.sleep(0.01)
    finally:
        for copy in copies:
            if not copy.ended():
                os.kill(copy.pid, signal.SIGKILL)
                os.waitpid(copy.pid, 0)
                copy.returncode = -signal.SIGKILL


def run_copy(call: Callable[[], object], timeout: float = 200, **variables: str) -> Copy:
    """Call a function in a copy of this process and wait for its end."""
    copy = start_copy(call, **variables)
    finish(copy, timeout=timeout)
    return copy


def pair_of(call: Callable[[], object]) -> list[Copy]:
    """Two copies that find themselves as Lightning finds the processes that a launcher has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    copies = [start_copy(call, **together, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    finish(*copies)
    return copies


def run_pair(main: Callable[[Path], object], root: Path) -> list[dict[str, Any]]:
    """Call ``main(root)`` in two processes of one run; gives what each wrote into ``rank<n>.json``."""
    copies = pair_of(lambda: main(root))
    assert [copy.returncode for copy in copies] == [0, 0], "\n".join(copy.output[-4000:] for copy in copies)
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]
