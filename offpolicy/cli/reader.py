"""How every command reads its words: one spelling, errors of one line, values that are there and written out.

``python -m offpolicy.fit`` reads its dotted options in `arguments.py`, by the same spelling.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from offpolicy.errors import UsageError, nearest
from offpolicy.given import refuse_empty, tidy


def spelled(word: str) -> str:
    """An option in the one spelling of this library: ``--max-length=8`` as ``--max_length=8``; other words as they are.

    Only the name and its group are options' names: what follows them may be a key of the user's data.
    """
    found = re.match(r"--[A-Za-z][\w-]*(\.[\w-]+)?", word)
    return word if found is None else found[0][:2] + found[0][2:].replace("-", "_") + word[found.end() :]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, that refuses empty values and expands tildes."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's; the help of an option ends with its default, which therefore is the real one."""
        if options.get("default") not in (None, "", argparse.SUPPRESS):  # --help itself has none
            options["help"] = f"{options.get('help', '')} (%(default)s)"
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # parse_args comes here too
        given = list(sys.argv[1:] if args is None else args)
        refuse_empty(given)
        found, rest = super().parse_known_args([self._by_own_name(spelled(word)) for word in given], namespace)
        tidy(found.__dict__, {})
        return found, rest

    def _by_own_name(self, word: str) -> str:
        """``--data.columns``, as `fit` and messages name it, is ``--columns`` here; other words are as they are."""
        own = re.sub(r"^--data\.", "--", word)
        return own if own.partition("=")[0] in self._option_string_actions else word

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
            name = rest[0].partition("=")[0]
            guess = nearest(name[2:], known).replace("'", "'--", 1) if name.startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}.{guess}".removesuffix("."))
        return found

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}{'' if message.endswith('?') else '.'} `{self.prog} --help` shows how.")


def at_least(low: int) -> Callable[[str], int]:
    """Reads a whole number of at least ``low``, as a ``type`` of arguments."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"'{text}' is none; expected a whole number of at least {low}")
        return int(text)

    return read


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option of all commands that open a run."""
    parser.add_argument("--trust", metavar="PACKAGES", help="run code of these packages where the run names it (none)")


def add_which(parser: argparse.ArgumentParser) -> None:
    """The option of the commands that open one checkpoint of a run."""
    parser.add_argument("--which", default="last", help="checkpoint of a run folder: last, best, selected or an update")
