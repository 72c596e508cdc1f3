"""How far estimates of policies can be trusted, and their order, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DRIFT = 0.05  # of the largest possible span of values, over the last fifth of the updates
OUTSIDE = 0.25  # share of states whose action is far from the data; of the data's own actions it is 0.05
NONE = float("nan")


class Scored(NamedTuple):
    """A policy and what it was found to collect.

    Attributes:
        path: of its checkpoint.
        step: its updates.
        value: the mean discounted return.
        spread: of fitted Q evaluation the standard deviation over critics.
        drift: of fitted Q evaluation the change over the last fifth of the updates.
        true: what the run's own evaluation of this update gave, or episodes played; None where there are none.
        low, high: 95 % interval of the value; NaN where none was asked for.
        effective: of importance sampling the effective number of episodes.
        episodes: how many there are.
        near: share of the data's actions within 0.1 of the policy's, in actions of [-1, 1].
        outside: share of states in which the policy's action lies outside the support of the data.
    """

    path: Path
    step: int
    value: float
    spread: float = NONE
    drift: float = NONE
    true: float | None = None
    low: float = NONE
    high: float = NONE
    effective: float = NONE
    episodes: int = 0
    near: float = NONE
    outside: float = NONE


def doubt(one: Scored, span: float, discount: float, updates: int, tau: float) -> str:
    """Why a value of fitted Q evaluation is not to be trusted, empty where nothing speaks against it.

    Args:
        one: the policy.
        span: of possible values.
        discount, updates, tau: of the fit. A target network that moves by tau passes about tau·updates rewards back.
    """
    needed = needed_updates(discount, tau)
    reasons = []
    if not math.isfinite(one.value):
        return "not finite"
    if updates < needed:
        reasons.append(f"too few updates for this discount: {needed:,} or more")
    elif one.drift > DRIFT * span:
        reasons.append(f"did not settle: moved by {one.drift:.3g} in the last fifth")
    return "; ".join([*reasons, *_far(one)])


def needed_updates(discount: float, tau: float) -> int:
    """The updates in which rewards are passed back over three horizons 1 / (1 - γ)."""
    return round(3.0 / ((1.0 - discount) * tau)) if tau else 0


def doubt_of_weights(one: Scored, *, robust: bool = False) -> str:
    """Why an estimate with importance weights is not to be trusted, empty where nothing speaks against it.

    Args:
        one: the policy.
        robust: it is a doubly robust one, which values of actions far from the data enter too.
    """
    if not math.isfinite(one.value):
        return "not finite"
    reasons = []
    if one.effective < max(10.0, 0.01 * one.episodes):
        reasons.append(f"effective sample size {one.effective:.3g} of {one.episodes:,} episodes")
    return "; ".join([*reasons, *(_far(one) if robust else [])])


def _far(one: Scored) -> list[str]:
    """That the policy leaves the data, where it does."""
    return [f"{one.outside:.0%} of its actions lie outside the data"] if one.outside > OUTSIDE else []


def verdict(
    found: Sequence[Scored], doubts: Sequence[str], correlation: float, low: float, high: float, runs: int
) -> str:
    """Whether the order of policies by their estimates can be relied on, in one sentence or two.

    Args:
        found: the policies.
        doubts: of each estimate, empty where nothing speaks against it.
        correlation, low, high: Spearman's with scores of an environment and its interval; NaN where there is none.
        runs: how many runs the policies come from.
    """
    if len(found) < 2:
        return "One policy has no order."
    if runs == 1:
        return "Do not trust the order: checkpoints of one run are nearly the same policy, and differ mostly by noise."
    if all(doubts):
        return "Do not trust the order: no estimate is free of doubt."
    marked = sum(map(bool, doubts))
    rest = f" {marked} of {len(found)} estimates are in doubt." if marked else ""
    if not math.isnan(low):
        if high < 0.0:
            return f"Do not trust the order: scores run against it ({low:.2f} to {high:.2f}).{rest}"
        if low <= 0.0:
            return f"Do not trust the order: its correlation with scores may be none ({low:.2f} to {high:.2f}).{rest}"
        return (
            f"The order agrees with scores of the environment ({low:.2f} to {high:.2f}), not always at the top.{rest}"
        )
    if not math.isnan(correlation):
        return f"The order is not checked: fewer than four policies have a score of an environment.{rest}"
    scored = sum(one.true is not None and math.isfinite(one.value) for one in found)
    why = {0: "no policies have scores of an environment", 1: "one policy has a score of an environment"}
    unknown = why.get(scored, "scores or values are all equal")
    return f"The order is not checked, as {unknown}.{close_call(found)}{rest}"


def close_call(found: Sequence[Scored]) -> str:
    """That the two largest values differ by less than they are sure, where they do."""
    ordered = sorted((one for one in found if math.isfinite(one.value)), key=lambda one: -one.value)
    if len(ordered) < 2:
        return ""
    first, second = ordered[:2]
    if math.isfinite(first.low) and math.isfinite(second.high):
        close = first.low <= second.high
    else:
        close = math.isfinite(first.spread) and first.value - second.value <= first.spread + second.spread
    return " The two best differ by less than their uncertainty." if close else ""
