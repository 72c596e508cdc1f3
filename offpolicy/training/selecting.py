"""Which checkpoint of a run to take where there is no environment: ``run.select``.

Once training has ended, every checkpoint that lies in the run folder is judged on episodes that no update has seen.
The choice stands in ``selected.json`` of the run folder: ``checkpoint`` (the file's name), ``step``, ``by`` ("fqe" or
"loss"), ``value``, ``doubt`` (empty where nothing speaks against it), ``updates`` of the run when it was made,
``held_out`` (how many episodes), and ``candidates``: a list of ``checkpoint step value spread doubt``.
``checkpoints/selected`` is a link to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offpolicy.compute.processes import by_itself
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.evaluation.verdicts import Scored, close_call, needed_updates
from offpolicy.files import atomic_write
from offpolicy.training.acting import ActingModule
from offpolicy.training.checkpoints import checkpoint_name, opens
from offpolicy.training.estimating import estimate_policies
from offpolicy.training.fitted_values import Fitting
from offpolicy.training.keeping import Keeping
from offpolicy.training.measurement import Evaluation
from offpolicy.training.opening import load
from offpolicy.training.run_folder import RunFolder
from offpolicy.training.selection import SELECTED, selection_of

CRITICS, TAU = 2, 0.01  # of fitted Q evaluation: less sure than the command's, and done in a fifth of its time


class Candidate(NamedTuple):
    """A checkpoint, and what speaks for it.

    Attributes:
        checkpoint: name of its file.
        step: its updates.
        value: the mean discounted return by fitted Q evaluation, or the error on held-out actions.
        spread: over critics; NaN of an error.
        doubt: why the value is not to be trusted; empty where nothing speaks against it.
    """

    checkpoint: str
    step: int
    value: float
    spread: float = math.nan
    doubt: str = ""


def check_select(method: Any, data: DataModule) -> bool:
    """Whether a checkpoint is to be selected, and can be as ``run.select`` asks; known before any data are open.

    Raises:
        UsageError: they cannot.
    """
    how, name = method.run.select, type(method).__name__
    if how == "none":
        return False
    asked = f"`run.select` is {how!r}"
    if not (isinstance(method, ActingModule) and isinstance(method.measurement(), Evaluation)):
        raise UsageError(
            f"{asked}, and {name} is judged by held-out numbers already; expected 'none'. `checkpoints/best` is the "
            "one with the best of them."
        )
    if type(method).agent is not ActingModule.agent:
        raise UsageError(
            f"{asked}, and {name} acts by more than the observation (a goal, or the history of an episode); expected "
            "'none', or a policy of one observation."
        )
    if method.seeds:
        raise UsageError(
            f"{asked} with several seeds, each with checkpoints of its own; expected one seed. Train one seed per "
            "process, or compare them afterwards: python -m offpolicy.ope RUN --which all."
        )
    if data.change_every:
        raise UsageError(f"{asked}, and the data change in training; expected data that stay. Leave `run.select` out.")
    if how == "loss" and getattr(method.view, "reward", True):
        raise UsageError(
            f"{asked}, and {name} does not copy the actions of the data, so that its error to them does not judge it; "
            "expected 'fqe'."
        )
    return True


def hold_out_for(method: Any, data: DataModule) -> None:
    """Have episodes held out of training where ``run.select`` asks for some and the user has not said how many."""
    if method.run.select != "none" and data.holdout == 0.0:
        data.holdout = None


def check_held_out(method: Any, data: DataModule, checkpoint_meta: dict[str, Any] | None) -> None:
    """What of the open data a selection needs, and whether a run that goes on holds out what it did.

    Args:
        method: with its options of the run.
        data: open.
        checkpoint_meta: facts about the data of the checkpoint that the run goes on from; None for a new run.

    Raises:
        UsageError: no episodes to judge by, or others than before.
    """
    replay = data.load()
    if method.run.select == "loss" and data.held_out is None:
        raise UsageError(
            f"`run.select` is 'loss', and of {replay.num_episodes} episodes none are held out; expected some. Pass "
            "--data.holdout 0.2."
        )
    if method.run.select == "fqe" and "reward" not in replay.steps:
        raise UsageError("`run.select` is 'fqe', and the data have no `reward`; expected 'loss', or data with rewards.")
    if checkpoint_meta is not None and not data.change_every:
        before, now = ((meta.get("held_out") or {}).get("share", 0.0) for meta in (checkpoint_meta, replay.meta))
        if before != now:
            other = "Leave `run.select` out, and compare its checkpoints: python -m offpolicy.ope RUN --which all."
            raise UsageError(
                f"the run held out {before:g} of the episodes, and it is {now:g} now; expected the same. "
                + (f"Pass --data.holdout {before:g}." if before else other)
            )


def held_out_words(data: DataModule) -> str:
    """How many episodes are held out, for the first screen."""
    assert data.held_out is not None and data.whole is not None
    return f"{data.held_out.num_episodes:,} of {data.whole.num_episodes:,} episodes, which training does not see"


def selection_words(method: Any, data: DataModule) -> str:
    """How a checkpoint will be selected, for the first screen."""
    episodes = "all episodes, which training sees too" if data.held_out is None else "those held out"
    if method.run.select == "loss":
        return f"after the last update by the error of every checkpoint on {episodes}"
    return (
        f"after the last update by fitted Q evaluation of every checkpoint: {fitting_of(method, data).updates:,} "
        f"updates of {CRITICS} critics on the CPU, values of {episodes}"
    )


def fitting_of(method: Any, data: DataModule) -> Fitting:
    """How fitted Q evaluation judges checkpoints of a method."""
    discount = float(getattr(method.hparams, "discount", 0.99))
    discount = discount if 0.0 <= discount < 1.0 else 0.99
    updates = method.run.select_updates or max(needed_updates(discount, TAU), 5)
    return Fitting(updates=updates, discount=discount, critics=CRITICS, tau=TAU, holdout=data.holdout or 0.0)


def select_checkpoint(method: Any, data: DataModule, files: RunFolder, updates: int) -> str:
    """Judge the checkpoints of a run, keep the choice in its folder, and remove what nobody needs any more.

    Args:
        method: as trained.
        data: its data, open.
        files: of the run.
        updates: that the run has made.

    Returns:
        The choice in words.
    """
    paths = [path for path in sorted(files.folder.glob("checkpoints/step=*.ckpt")) if opens(path)]
    with by_itself():
        judge = by_error if method.run.select == "loss" else by_fitted_q
        found = judge([load(path, method=type(method)) for path in paths], paths, data, method)
    sign = 1.0 if method.run.select == "loss" else -1.0
    finite = [one for one in found if math.isfinite(one.value)] or found[-1:]
    chosen = min(finite, key=lambda one: (sign * one.value, one.step))
    doubt = chosen.doubt or close(found, method.run.select)
    kept = {
        "checkpoint": chosen.checkpoint,
        "step": chosen.step,
        "by": method.run.select,
        "value": chosen.value,
        "doubt": doubt,
        "updates": updates,
        "held_out": 0 if data.held_out is None else data.held_out.num_episodes,
        "candidates": [one._asdict() for one in found],
    }
    text = json.dumps(_null_for_nan(kept), indent=1, allow_nan=False)
    atomic_write(files.folder / SELECTED, text + "\n")
    files.keeping = Keeping.of(method.run.keep)
    files.prune()
    files.link("selected", chosen.checkpoint)
    name = "error" if method.run.select == "loss" else "fitted Q"
    words = f"update {chosen.step:,} ({name} {chosen.value:.4g}, of {len(found)}), checkpoints/{chosen.checkpoint}"
    return f"{words}; do not trust: {doubt}" if doubt else words


def is_selected(folder: Path, updates: int) -> bool:
    """Whether the checkpoint of a run was selected when it had made so many updates."""
    return selection_of(folder).get("updates") == updates


def selected_path(folder: Path) -> Path | None:
    """The checkpoint that was selected in a run folder; None where none was."""
    found = selection_of(folder)
    return folder / "checkpoints" / checkpoint_name(found["step"]) if found else None


def by_fitted_q(policies: Sequence[Any], paths: Sequence[Path], data: DataModule, method: Any) -> list[Candidate]:
    """The values of policies by one fit, from the first states of held-out episodes."""
    whole = data.whole or data.load()
    found = estimate_policies(policies, whole, fitting=fitting_of(method, data), paths=paths)
    return [
        Candidate(one.path.name, one.step, one.value, one.spread, doubt)
        for one, doubt in zip(found.values["fqe"], found.doubts["fqe"], strict=True)
    ]


def by_error(policies: Sequence[Any], paths: Sequence[Path], data: DataModule, method: Any) -> list[Candidate]:
    """The mean squared difference to the actions of held-out episodes, in actions of [-1, 1]."""
    assert data.held_out is not None
    return [
        Candidate(path.name, policy.updates, action_error(policy, data.held_out))
        for policy, path in zip(policies, paths, strict=True)
    ]


def action_error(policy: Any, replay: Replay) -> float:
    """Mean over steps and dimensions of (π(s) - a)², actions in [-1, 1]."""
    rows = replay.take(replay.rows, ("obs", "action"))
    scale = policy.normalizer.action_scale.cpu().numpy()
    action = rows["action"].cpu().numpy().reshape(len(rows["obs"]), -1)
    return float(np.square((policy.act(rows["obs"].cpu().numpy()) - action) * scale).mean())


def close(found: Sequence[Candidate], how: str) -> str:
    """What makes the choice doubtful although its value is none; empty for nothing."""
    if len(found) < 2:
        return "it is the only checkpoint"
    if how == "loss":
        return ""
    scored = [Scored(Path(one.checkpoint), one.step, one.value, one.spread) for one in found]
    return "the two best differ by less than their uncertainty" if close_call(scored) else ""


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_null_for_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
