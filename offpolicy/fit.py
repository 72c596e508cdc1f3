"""Train a method: ``python -m offpolicy.fit``, or ``offpolicy.fit(method, data, max_steps=…)`` in Python.

Both take the same path through :func:`offpolicy.api.fit`, whose documentation lists the arguments.
"""

from __future__ import annotations

import sys

from offpolicy.cli import entry


def main(argv: list[str]) -> int:
    """Read the command, train, and return the exit code."""
    from offpolicy.cli.arguments import read_command

    command = read_command(argv)  # answers misspelt names before anything heavy is imported
    from offpolicy.cli.parser import run_command

    return run_command(command)


sys.modules[__name__].__class__ = entry.CallableModule

if __name__ == "__main__":
    entry.run(main)
