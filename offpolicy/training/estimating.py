"""What policies would collect, by several estimators on the same held-out episodes.

Fitted Q evaluation asks for actions alone. Importance sampling and doubly robust estimates ask for log π(a|s) of the
policy and of the behaviour: a column of the data, or a density fitted to their actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError, check_choice, listed
from offpolicy.evaluation.behaviour import Behaviour
from offpolicy.evaluation.estimators import (
    ESTIMATORS,
    LoggedEpisodes,
    PolicyValue,
    doubly_robust,
    weight_health,
    weighted_doubly_robust,
)
from offpolicy.evaluation.verdicts import Scored, doubt, doubt_of_weights
from offpolicy.training.asking import check_density, check_policy, is_stochastic
from offpolicy.training.fitted_values import FittedValue, Fitting, fitted_values
from offpolicy.training.held_episodes import Held

NAMES = ("fqe", *ESTIMATORS)
ROBUST = {"dr": doubly_robust, "wdr": weighted_doubly_robust}
INTERVALS = ("episodes", "refits", "none")
How = Literal["mean", "sample"]


@dataclass
class Estimates:
    """What was found of P policies.

    Attributes:
        values: by the name of the estimator, one for each policy that it can estimate.
        doubts: the same of why it is not to be trusted, empty where nothing speaks against it.
        without: sentences about policies that an estimator cannot estimate.
        held_out: how many episodes are held out of the fits and give the values; 0 where all do both.
        behaviour: the estimated policy of the data, where one was needed.
        notes: sentences about the data.
    """

    values: dict[str, list[Scored]] = field(default_factory=dict)
    doubts: dict[str, list[str]] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    held_out: int = 0
    behaviour: Behaviour | None = None
    notes: list[str] = field(default_factory=list)


def estimate_policies(
    policies: Sequence[Any],
    replay: Replay,
    *,
    estimators: Sequence[str] = ("fqe",),
    fitting: Fitting | None = None,
    how: How | None = None,
    intervals: str = "episodes",
    behaviour: str | None = None,
    paths: Sequence[Path] | None = None,
    true: Sequence[float | None] | None = None,
) -> Estimates:
    """What policies would collect from the first states of episodes.

    Args:
        policies: P trained methods that act by one observation.
        replay: the episodes.
        estimators: "fqe", "is", "wis", "pdis", "pdwis", "dr", "wdr"; all but the first need the density of the policy's
            actions, and are left out for deterministic policies.
        fitting: of fitted Q evaluation, whose share of held-out episodes is that of all estimators.
        how: "mean" evaluates the action that evaluation plays, "sample" those that stochastic policies draw; None is
            "sample" beside importance sampling, which weighs drawn actions, and else "mean".
        intervals: "episodes", 95 % of a bootstrap over episodes for all but "fqe"; "refits" for that too, by
            ``fitting.refits`` fits; "none".
        behaviour: column of the steps with log π_b(a|s) in nats, for the density of actions in environment units; None
            estimates it from the actions.
        paths: names of the policies.
        true: what each has collected in an environment.

    Raises:
        UsageError: a policy that cannot be asked, or none that an estimator can estimate.
        DataError: no such column of log-probabilities, or one that is not finite.
    """
    names, fitting = checked_estimators(estimators), fitting or Fitting()
    check_choice("intervals", intervals, INTERVALS)
    weighed = [name for name in names if name != "fqe"]
    if weighed and how == "mean":
        raise UsageError(
            f"`policy` is 'mean' beside {weighed[0]}, which weighs the actions that policies draw; expected 'sample'. "
            "Leave it out."
        )
    drawn = _drawn(policies, replay, how, bool(weighed))
    found, able = Estimates(), _able(policies, weighed)
    found.without = [reason for reason in able if reason]
    if weighed and len(found.without) == len(policies) and names == weighed:
        raise UsageError(found.without[0])
    paths = paths or [Path(f"policy {k}") for k in range(len(policies))]
    true = true or [None] * len(policies)

    held = Held(replay, fitting.holdout, policies[0])
    found.held_out = held.replay.num_episodes if fitting.holdout else 0
    covered = held.covered(policies)
    blanks = [
        Scored(path, policy.updates, np.nan, true=one, near=cover.near, outside=cover.outside)
        for path, policy, one, cover in zip(paths, policies, true, covered, strict=True)
    ]
    fits: dict[int, tuple[Any, int, FittedValue]] = {}
    if "fqe" in names or ROBUST.keys() & set(names):
        fits = _fits(policies, replay, fitting, drawn, intervals)
    if "fqe" in names:
        found.values["fqe"] = [blank._replace(**fits[k][2]._asdict()) for k, blank in enumerate(blanks)]
        spans = [float(fits[k][0].reward_high - fits[k][0].reward_low) for k in range(len(policies))]
        found.doubts["fqe"] = [
            doubt(one, span / (1.0 - fitting.discount), fitting.discount, fitting.updates, fitting.tau)
            for one, span in zip(found.values["fqe"], spans, strict=True)
        ]
    chosen = [k for k, reason in enumerate(able) if not reason] if weighed else []
    if chosen:
        found.notes += held.notes()
        log_behaviour = held.column(behaviour) if behaviour else None
        if log_behaviour is None:
            found.behaviour = held.estimated(fitting.seed)
            log_behaviour = held.estimated_log_prob(found.behaviour)
        tables = held.tables(fits[chosen[0]][0]) if ROBUST.keys() & set(names) else None  # one fit has all that draw
        for name in weighed:
            found.values[name], found.doubts[name] = [], []
        for k in chosen:
            logged = held.logged(policies[k], log_behaviour, tables and tables.of(fits[k][1]))
            for name in weighed:
                one = _weighed(name, logged, fitting.discount, blanks[k], intervals)
                found.values[name].append(one)
                found.doubts[name].append(doubt_of_weights(one, robust=name in ROBUST))
    return found


def checked_estimators(names: Sequence[str]) -> list[str]:
    """The names of estimators, each once.

    Raises:
        UsageError: none, or one that does not exist.
    """
    for name in names:
        check_choice("estimators", name, NAMES)
    if not names:
        raise UsageError(f"`estimators` is empty; expected some of {listed(NAMES)}.")
    return list(dict.fromkeys(names))


def _drawn(policies: Sequence[Any], replay: Replay, how: How | None, weighed: bool) -> list[bool]:
    """Of each policy whether fitted Q evaluation takes samples; deterministic ones are refused where all should."""
    obs_dim, action_dim = (int(replay.steps[name].shape[1]) for name in ("obs", "action"))
    for policy in policies:
        check_policy(policy, obs_dim, action_dim, sampled=how == "sample" and not weighed)
    return [(how == "sample" or weighed) and is_stochastic(policy) for policy in policies]


def _able(policies: Sequence[Any], weighed: Sequence[str]) -> list[str]:
    """Of each policy why it has no importance weights, empty where it has."""
    found = []
    for policy in policies if weighed else ():
        try:
            check_density(policy)
            found.append("")
        except UsageError as error:
            found.append(str(error))
    return found


def _fits(
    policies: Sequence[Any], replay: Replay, fitting: Fitting, drawn: Sequence[bool], intervals: str
) -> dict[int, tuple[Any, int, FittedValue]]:
    """Of each policy the fit, its place there, and its value: one fit for those that draw, one for the others."""
    if intervals != "refits":
        fitting = Fitting(**{**vars(fitting), "refits": 0})
    found: dict[int, tuple[Any, int, FittedValue]] = {}
    for sampled in sorted(set(drawn)):
        group = [k for k, draws in enumerate(drawn) if draws == sampled]
        method, values = fitted_values([policies[k] for k in group], replay, fitting, "sample" if sampled else "mean")
        found |= {k: (method, place, value) for place, (k, value) in enumerate(zip(group, values, strict=True))}
    return found


def _weighed(name: str, logged: LoggedEpisodes, discount: float, blank: Scored, intervals: str) -> Scored:
    """The estimate of one policy by importance weights."""
    if name in ROBUST:
        found: PolicyValue = ROBUST[name](logged, discount, bootstrap_end=logged.v_after is not None)
    else:
        found = ESTIMATORS[name](logged, discount)
    health = weight_health(logged)
    low = high = np.nan
    if intervals != "none" and health.episodes > 1:
        low, high = found.interval()
    return blank._replace(value=found.value, low=low, high=high, effective=health.effective, episodes=health.episodes)
