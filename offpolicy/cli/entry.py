"""What the commands of this library share: exit codes, and modules that can be called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from offpolicy.cli.pages import page_for
from offpolicy.compute.processes import ProcessLost, is_first_process
from offpolicy.errors import DataError, DivergenceError, UsageError
from offpolicy.files import WriteError

USAGE, DATA, DIVERGED, MACHINE, CTRL_C = 2, 3, 4, 1, 130  # exit codes; 128 + signal number after an interruption


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on ``sys.argv`` and leave with its exit code.

    0: done. 1: a disk or folder that cannot be written, or another process of the run has ended. 2: a misspelt or
    impossible option. 3: data that cannot be used. 4: training has diverged. 130 and 143: after Ctrl-C and SIGTERM.
    A user's mistake is one message without a traceback.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own class lies beside the command
    try:
        code = main(sys.argv[1:])
    except UsageError as error:
        code = say(error, DIVERGED if isinstance(error, DivergenceError) else USAGE)
        if error.together and not is_first_process():
            code = 0  # the first process leaves with the error; another code here would have it killed before it can
    except DataError as error:
        code = say(error, DATA)
    except (WriteError, ProcessLost) as error:
        code = say(error, MACHINE)
    except KeyboardInterrupt:
        code = say("Interrupted.", CTRL_C)
    sys.exit(code)


def say(message: object, code: int) -> int:
    """Tell the user why a command ends, and where the documentation explains it; returns the exit code."""
    print(f"Error: {message}" if code != CTRL_C else message, file=sys.stderr)
    if more := page_for(str(message)):
        print(f"More: {more}", file=sys.stderr)
    return code


class CallableModule(ModuleType):
    """A module behind ``python -m offpolicy.NAME`` that is also the function ``offpolicy.NAME(...)`` of the API."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module("offpolicy.api"), self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)
