"""Which checkpoint of a run is meant: the last, the best, the one selected without an environment, or that of an
update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.given import expanded
from offpolicy.training.checkpoints import checkpoint_name, is_checkpoint, newest_checkpoint, resolve_checkpoint
from offpolicy.training.headlines import judged_by
from offpolicy.training.selection import selection_of

Which = str | int
WHICH = "last, best, or an update such as 5000 (or selected, where --run.select chose one)"


def chosen_checkpoint(run_or_checkpoint: str | Path, which: Which = "last") -> Path:
    """The checkpoint of a run that is asked for.

    Args:
        run_or_checkpoint: a run folder; or a checkpoint file, which stands for itself and takes no other choice.
        which: "last", the newest that opens; "best", that of the best evaluation of the run by the number it is judged
            by (held-out loss where there is no other, and then the lowest); "selected", the one that ``run.select``
            chose without an environment; or the number of an update.

    Raises:
        UsageError: there is no such checkpoint, or the run has no evaluation to choose by.
    """
    if which == "last":
        return resolve_checkpoint(run_or_checkpoint)
    folder = Path(expanded(str(run_or_checkpoint)))
    if is_checkpoint(folder):
        raise UsageError(
            f"`which` is {which!r} and {folder} is a checkpoint; expected a run folder. Leave `which` out."
        )
    if newest_checkpoint(folder) is None:
        resolve_checkpoint(folder)  # says what is missing
    named = {"best": best_update, "selected": selected_update}
    wanted = named[str(which)](folder) if which in named else _update(which)
    for path in (folder / "checkpoints" / checkpoint_name(wanted), folder / checkpoint_name(wanted)):
        if path.exists():
            return resolve_checkpoint(path)
    kept = sorted({int(path.stem[5:]) for path in folder.glob("**/step=*.ckpt") if path.stem[5:].isdigit()})
    raise UsageError(
        f"{folder} keeps no checkpoint of update {wanted:,}; expected one of {', '.join(f'{n:,}' for n in kept)}. "
        "--run.keep says which a run keeps, the newest two and the best by default."
    )


def selected_update(folder: Path) -> int:
    """The update of the checkpoint that ``run.select`` chose in a run folder.

    Raises:
        UsageError: none was chosen.
    """
    found = selection_of(folder)
    if not found:
        raise UsageError(
            f"{folder} has no selected checkpoint; expected a finished run with --run.select fqe or loss. Take the "
            "last, or compare its checkpoints: python -m offpolicy.ope RUN --which all."
        )
    return int(found["step"])


def best_update(folder: Path) -> int:
    """The update of the best evaluation in a run folder.

    Raises:
        UsageError: there is none.
    """
    rows = [row for row in Table(folder / "evals.csv").rows() if isinstance(row.get("step"), int)]
    column = judged_by(name for row in rows for name in row)
    judged = [(row[column], row["step"]) for row in rows if column and _number(row.get(column))]
    if not judged:
        raise UsageError(
            f"{folder} has no evaluation to choose the best checkpoint by; expected some in evals.csv. Take the last."
        )
    sign = 1 if column == "eval/loss" else -1
    return int(min(judged, key=lambda pair: (sign * pair[0], pair[1]))[1])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def _update(which: Which) -> int:
    text = str(which).replace("_", "").replace(",", "")
    if not text.isdigit():
        raise UsageError(f"`which` is {which!r}; expected {WHICH}.")
    return int(text)
