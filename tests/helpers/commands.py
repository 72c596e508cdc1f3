"""Runs what documents tell users to type, each command in a copy of this process, which has imported everything."""

from __future__ import annotations

import os
import runpy
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gymnasium  # noqa: F401
import lightning.pytorch  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from forks import Copy, run_copy, start_copy

import offpolicy.api
import offpolicy.cli.parser  # noqa: F401


def run_commands(commands: Sequence[Sequence[str]], folder: Path, timeout: float = 300) -> None:
    """Do what ``python …`` does with the arguments ``["-m", module, …]``, ``["-c", code]`` or ``[script, …]``.

    Args:
        commands: they run in this order, and the first that fails ends all.
        folder: where they run.
        timeout: seconds for each.
    """
    for command in commands:
        copy = run_copy(partial(start, command, folder), timeout, MPLBACKEND="Agg")
        told = f"ended with {copy.returncode}: python {shlex.join(command)}\n{copy.output[-8000:]}"
        assert copy.returncode == 0, told


def start_command(*command: str, folder: Path) -> Copy:
    """Begin such a command, to be waited for or sent a signal."""
    return start_copy(partial(start, command, folder), MPLBACKEND="Agg")


def start(command: Sequence[str], folder: Path) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    kind, *rest = command
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, str(folder))
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [*command]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
