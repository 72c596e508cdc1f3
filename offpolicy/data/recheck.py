"""The content of a folder of our format, checked like that of any other file when it is opened."""

from __future__ import annotations

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.raw import Raw, as_flag, check_structure
from offpolicy.data.replay import Replay
from offpolicy.data.scan import Scan, drop_or_raise
from offpolicy.data.store import READ_THROUGH
from offpolicy.errors import DataError

KNOWN = ("obs", "action", "reward", "terminated", "next_obs", "valid_td")
SAMPLES, SAMPLE = 64, 1024  # parts of a large set that are looked at, and rows of each


def recheck(replay: Replay, where: str, *, on_bad: str = "error", clip_actions: bool = False) -> Replay:
    """A replay of control data once its content is known to be sound; texts are passed on.

    Args:
        replay: as it was opened; its meta, notes and warnings stay as they were written.
        where: the folder, for messages.
        on_bad, clip_actions: as in :func:`offpolicy.data.validate.finish`.

    Raises:
        DataError: shapes that do not fit each other, or faulty content.
    """
    steps = {name: to_numpy(column) for name, column in replay.steps.items()}
    if "token" in steps:
        return replay
    shapes = {name: tuple(column.shape) for name, column in steps.items()}
    check_structure(where, shapes, {k: k for k in KNOWN if k in steps}, {}, ("obs", "action", "terminated"))
    for name in ("terminated", "valid_td"):
        if name in steps and replay.nbytes <= READ_THROUGH:
            as_flag(where, name, steps[name])
    tail = {name: to_numpy(column) for name, column in replay.tail.items()}
    if "obs" in tail and tail["obs"].shape[1:] != steps["obs"].shape[1:]:
        raise DataError(f"{where}: the last observations have shape {tail['obs'].shape[1:]}; expected that of `obs`.")
    if replay.nbytes > READ_THROUGH:
        _look_at_samples(steps, where)
        return replay
    order = np.argsort(replay.start, kind="stable")
    raw = Raw(
        steps,
        replay.start[order],
        replay.length[order],
        where,
        tail={name: column[order] for name, column in tail.items()},
        meta=dict(replay.meta),
        owned=False,
    )
    scan = Scan(raw, clip_actions, measure=False)
    scan.run()
    if clip_actions and scan.clipped:
        replay = replay.derive({**replay.steps, "action": raw.steps["action"]}, replay.tail)
    if scan.faults:
        drop_or_raise(raw, scan, on_bad)
        replay = replay.filter(np.sort(order[np.isin(replay.start[order], raw.start)]))
        replay.meta = {**replay.meta, "warnings": [*replay.meta.get("warnings", []), *raw.warnings]}
    return replay


def _look_at_samples(steps: dict[str, np.ndarray], where: str) -> None:
    for name in ("obs", "action", "reward", "next_obs"):
        column = steps.get(name)
        if column is None or column.dtype.kind != "f":
            continue
        for low in np.linspace(0, max(0, len(column) - SAMPLE), SAMPLES).astype(int).tolist():
            if not np.isfinite(column[low : low + SAMPLE]).all():
                raise DataError(
                    f"{where}: `{name}` has NaN or infinite values near row {low}; expected finite numbers. Repair the "
                    "data."
                )
