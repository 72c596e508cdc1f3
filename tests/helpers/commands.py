"""Run commands one after the other, each in a copy of one process that has imported everything: ``commands.py FILE``.

The file holds a list of argument lists as JSON: ``["-m", module, …]``, ``["-c", code]`` or ``[script, …]``. Starting
Python anew for each of them would cost more than the commands themselves. Stops at the first that fails.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import shlex
import sys
import traceback
from pathlib import Path

import gymnasium  # noqa: F401
import lightning.pytorch  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

import offpolicy.api
import offpolicy.cli.parser  # noqa: F401


def run(command: list[str]) -> int:
    """Do what ``python …`` does with these arguments; gives its exit code."""
    try:
        start(command)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def start(command: list[str]) -> None:
    kind, *rest = command
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = command, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def main() -> int:
    gc.collect()
    gc.freeze()  # copies share the pages of what is there now
    for command in json.loads(Path(sys.argv[1]).read_text()):
        print(f"$ python {shlex.join(command)}", flush=True)
        child = os.fork()
        if not child:
            os._exit(run(command))  # without taking all these modules apart, which takes seconds
        _, status, used = os.wait4(child, 0)
        print(f"{used.ru_utime + used.ru_stime:.1f} s", flush=True)
        if status:
            print(f"ended with {os.waitstatus_to_exitcode(status)}: python {shlex.join(command)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
