"""What a method must be like to train on data that it collects."""

from __future__ import annotations

from typing import Any

from offpolicy.data.online import OnlineOptions
from offpolicy.data.views import TransitionView
from offpolicy.errors import UsageError
from offpolicy.given import seeds_text
from offpolicy.training.acting import ActingModule
from offpolicy.training.common import CommonOptions


def check_collects(method: Any, online: OnlineOptions) -> None:
    """Refuse a method that cannot collect as it is asked to.

    Raises:
        UsageError: says why.
    """
    kind, name, size = type(method), type(method).__name__, CommonOptions.of(method.hparams).batch_size
    if kind.policy is ActingModule.policy or kind.agent is not ActingModule.agent:
        raise UsageError(
            f"{name} gives no action for one observation alone, and data are collected by such actions; expected "
            "another method. Choose SAC, TD3, IQL or the like."
        )
    if not isinstance(method.view, TransitionView):
        raise UsageError(
            f"{name} draws {type(method.view).__name__}, and collected data are drawn as single transitions; "
            "expected a method of transitions. Choose SAC, TD3, IQL or the like."
        )
    if online.capacity is not None and online.capacity < size:
        raise UsageError(
            f"`data.online.capacity` is {online.capacity:,} rows, and a batch has {size:,}; expected at least as "
            "many. Raise it, or leave it out."
        )
    if online.share is not None and size * online.share + 1e-9 < 1.0:
        raise UsageError(
            f"`data.online.mix` is {online.share:g} and `batch_size` {size:,}, so that batches have no offline "
            "row; expected at least one. Raise one of the two, or pass --data.online.mix none."
        )
    if method.seeds and method.has_index:
        raise UsageError(
            f"`seeds` is {seeds_text(method.seeds)}, each with data that it collects, and {name} keeps one index over "
            "its data (`on_bind`); expected one seed. Start one process per seed."
        )
