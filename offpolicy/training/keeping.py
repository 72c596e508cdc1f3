"""Which checkpoints of a run stay on the disk, and at which updates a run is evaluated by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from offpolicy.errors import UsageError

KEEP = "'best', 'last', 'all', 'every:N', or how many of the newest"


class Keeping(NamedTuple):
    """Which checkpoints of a run stay.

    Attributes:
        newest: how many of the newest, ≥ 1: a run can always go on.
        best: whether the one with the best evaluation stays too.
        every: those whose update is a multiple of it stay too; 0 for none, 1 for all.
    """

    newest: int = 2
    best: bool = True
    every: int = 0

    @classmethod
    def of(cls, value: int | str) -> Keeping:
        """What ``run.keep`` asks for.

        Raises:
            UsageError: it is nothing of that kind.
        """
        text = str(value).strip()
        named = {"best": cls(1), "last": cls(1, best=False), "all": cls(1, every=1)}
        if text in named:
            return named[text]
        if match := re.fullmatch(r"every:(\d[\d_]*)", text):
            if int(match[1]):
                return cls(1, every=int(match[1]))
        elif re.fullmatch(r"\d+", text) and int(text):
            return cls(int(text))
        raise UsageError(f"`run.keep` is {value!r}; expected {KEEP}, ≥ 1, such as 2, which keeps the best too.")

    def kept(self, names: Iterable[str], best: str) -> set[str]:
        """Those among the names of checkpoints (``step=00005000.ckpt``) that stay.

        Args:
            names: of the checkpoints that lie there.
            best: the name of the one with the best evaluation; empty for none.
        """
        ordered = sorted(names)
        found = set(ordered[-self.newest :])
        if self.every:
            found |= {name for name in ordered if int(re.findall(r"\d+", name)[0]) % self.every == 0}
        return found | ({best} & set(ordered) if self.best else set())

    @property
    def words(self) -> str:
        """Which stay, in words."""
        if self.every == 1:
            return "all of them"
        newest = "the newest" if self.newest == 1 else f"the newest {self.newest}"
        parts = [
            *([f"every {self.every:,} updates"] if self.every else []),
            newest,
            *(["the best"] if self.best else []),
        ]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


class Spacing(NamedTuple):
    """How far apart the evaluations of a run are where the user does not say.

    Attributes:
        times: evaluations that a run has, if they are not too close or too far apart then.
        least: the least number of updates between two.
        most: the largest.
        before: what version 0.2 had, with which its runs go on.
    """

    times: int
    least: int
    most: int
    before: int

    def every(self, total: int) -> int:
        """The updates between two evaluations of a run of ``total`` updates; below 1 for a run without an end."""
        return self.most if total < 1 else max(self.least, min(self.most, -(-total // self.times)))

    @property
    def words(self) -> str:
        """The rule."""
        return f"the run in {self.times}, at least {self.least:,} and at most {self.most:,} updates"
