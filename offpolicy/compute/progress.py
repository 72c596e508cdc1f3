"""Bars on the terminal for work that takes a while: updates, downloads, trajectories."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def terminal_bar(*columns: Any, **options: Any) -> Any:
    """A bar of ``rich`` on the error stream, where it is in nobody's way; ``with`` or ``start()`` shows it.

    Args:
        columns: what stands in it, in order: columns of ``rich.progress``, or text with ``{task.fields[name]}``.
        options: of ``rich.progress.Progress``.
    """
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    made = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    return Progress(*made, console=Console(stderr=True, soft_wrap=True), **options)


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], Any] | None]:
    """A function that is told how many are done: it moves a bar on a terminal, and prints lines elsewhere.

    None when ``total`` is 0.
    """
    if not total:
        yield None
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        with terminal_bar(BarColumn(20), MofNCompleteColumn(), what, TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=min(done, total))
    else:
        said = 0

        def say(done: int) -> None:
            nonlocal said
            if min(done, total) > said:
                said = min(done, total)
                print(f"{said:,}/{total:,} {what}", file=sys.stderr, flush=True)

        yield say
