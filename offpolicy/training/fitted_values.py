"""Fitted Q evaluation of policies in one go: the fit, the values it gives, and how far they moved at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

from offpolicy.data.replay import Replay
from offpolicy.errors import check_range
from offpolicy.registry import find_method

FEW = 50  # episodes: of fewer none are held out unless asked for


@dataclass(frozen=True)
class Fitting:
    """How fitted Q evaluation is carried out.

    Args:
        updates: of the critics, ≥ 5.
        discount: γ per environment step, in [0, 1).
        critics: of each policy, ≥ 1.
        hidden_dims: widths of their hidden layers.
        tau: Polyak rate of the target critics, in (0, 1].
        holdout: share of the episodes that are kept from the fit and that values come from, in [0, 1); 0 takes the
            values from all.
        refits: further fits on episodes drawn with replacement, for an interval of each value; 0 for none, else ≥ 2.
        seed: of weights, batches and which episodes are drawn.
    """

    updates: int = 100_000
    discount: float = 0.99
    critics: int = 4
    hidden_dims: tuple[int, ...] = (256, 256)
    tau: float = 0.005
    holdout: float = 0.0
    refits: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("updates", self.updates, 5)
        check_range("refits", self.refits, 0)
        check_range("tau", self.tau, 0.0, 1.0, lower_open=True)
        if self.refits == 1:
            check_range("refits", self.refits, 2)


class FittedValue(NamedTuple):
    """What fitted Q evaluation says of one policy.

    Attributes:
        value: the mean discounted return from first states, mean over critics.
        spread: standard deviation over critics.
        drift: change of the value over the last fifth of the updates.
        low, high: 95 % interval from refits; NaN without.
    """

    value: float
    spread: float
    drift: float
    low: float
    high: float


def share_held_out(replay: Replay, share: float | None) -> float:
    """The share of episodes that is held out: as asked for; None is 0.2, and 0 of fewer than 50 episodes."""
    if share is None:
        return 0.2 if replay.num_episodes >= FEW else 0.0
    check_range("holdout", share, 0.0, 1.0, upper_open=True)
    return share


def fitted_values(
    policies: Sequence[Any], replay: Replay, fitting: Fitting, how: Literal["mean", "sample"] = "mean"
) -> tuple[Any, list[FittedValue]]:
    """Evaluate P policies on the same batches.

    Args:
        policies: trained methods.
        replay: all episodes; which are held out is a function of the share alone.
        fitting: of the critics.
        how: "mean" evaluates the action that evaluation plays, "sample" those drawn from stochastic policies.

    Returns:
        The fitted method, whose ``values(obs, action)`` are those of every policy, and the values.
    """
    early = fitting.updates - fitting.updates // 5
    method = _begun(policies, replay, fitting, how)
    held_out = method.held_out_episodes is not None
    method.run_block(0, early)
    before = method.start_values(held_out=held_out).mean(-1)
    method.run_block(early, fitting.updates - early)
    after = method.start_values(held_out=held_out).double()
    value, half = after.mean(-1), np.full(len(policies), np.nan)
    if fitting.refits:
        again = _begun(policies, replay, fitting, how, refits=fitting.refits)
        again.run_block(0, fitting.updates)
        refitted = again.start_values(held_out=held_out).double().mean(-1).numpy()  # (refits, P)
        half = stdtrit(fitting.refits - 1, 0.975) * np.nanstd(refitted, 0, ddof=1)
    return method, [
        FittedValue(float(v), float(s), abs(float(v - b)), float(v) - h, float(v) + h)
        for v, s, b, h in zip(value, after.std(-1, correction=0), before, half.tolist(), strict=True)
    ]


def _begun(policies: Sequence[Any], replay: Replay, fitting: Fitting, how: str, refits: int = 0) -> Any:
    method = find_method("FQE").of(
        policies,
        discount=fitting.discount,
        num_critics=fitting.critics,
        hidden_dims=fitting.hidden_dims,
        tau=fitting.tau,
        holdout=fitting.holdout,
        policy=how,
        resample=bool(refits),
    )
    method.seeds = tuple(fitting.seed + 1 + k for k in range(refits)) if refits else ()
    return method.prepare(replay, fitting.seed)
