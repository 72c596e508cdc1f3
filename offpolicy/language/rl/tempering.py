"""Hot and cold answers, which lead the entropy of the policy to a target (option ``tempering``).

Some problems of an iteration are asked once more, at a temperature above that of sampling where the entropy is not
above its target, and below it otherwise. The right ones among these answers stand in the store beside the group of
their problem, with the column ``tempered``; their advantage is 0, no statistic of the group has seen them, and the part
``aepo`` of the slot ``entropy`` learns from them. The wrong ones are dropped. Their log-probabilities are those of
training, at the temperature of sampling.

The entropy is that of the policy of now: the mean of −log π of the tokens that it has just drawn without help, whose
expectation is the mean entropy of its tokens. So nothing needs to be kept from one iteration to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offpolicy.compute import processes
from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import OWN, merged_answers, ordered
from offpolicy.errors import UsageError, check_range
from offpolicy.language.rl.engine import Completion, FurtherAnswers, Request, Stop, engine_name
from offpolicy.language.rl.hints import Scaffold
from offpolicy.language.rl.rows import answer_row
from offpolicy.language.rl.vllm_checks import check_temperature
from offpolicy.losses.policy_gradient import Objective
from offpolicy.registry import Spec, make

TEMPERED = 15 << 24  # added to the number of a group for its tempered answers; above all tiers and second answers


@dataclass(frozen=True)
class Tempering:
    """Which problems are asked once more, and how hot (AEPO, arXiv:2510.08141).

    Target and temperatures are those of the authors' code, whose script has ``target`` 0.5 and 60 answers in a step.
    That the share is 1/64 is known at second hand.

    Args:
        target: of the mean entropy of a token, nats, ≥ 0.
        high: times the temperature of sampling, where the entropy is at the target or below, ≥ 1.
        low: the same where it is above, in (0, 1].
        share: of the groups of an iteration, in (0, 1], at least one; each is answered ``group_size`` times more.
    """

    target: float = 0.5
    high: float = 1.2
    low: float = 0.8
    share: float = 1 / 64

    def __post_init__(self) -> None:
        check_range("target", self.target, 0.0, upper_open=True)
        check_range("high", self.high, 1.0, upper_open=True)
        check_range("low", self.low, 0.0, 1.0, lower_open=True)
        check_range("share", self.share, 0.0, 1.0, lower_open=True)

    def fact(self) -> str:
        """For the first screen."""
        words = f"temperature times {self.high:g} up to an entropy of {self.target:g} nats, {self.low:g} above"
        return f"{100 * self.share:.3g} % of the groups, at least one, answered once more; {words}; right ones count"

    def heat(self, entropy: float) -> float:
        """What the temperature is multiplied by."""
        return self.high if entropy <= self.target else self.low

    def chosen(self, store: Replay, k: int, seed: int) -> list[tuple[int, int, int]]:
        """Number, problem and words of the groups of an iteration that are answered once more, in ascending order."""
        groups, first = np.unique(store.episodes["group"], return_index=True)
        found = ordered(groups, seed, "tempered", k)[: max(1, round(self.share * len(groups)))]
        rows = first[np.isin(groups, found)]
        words = store.episodes.get("asked", np.zeros_like(store.length))
        columns = store.episodes["group"] - (k << 32), store.episodes["prompt"], words
        return list(zip(*(column[rows].tolist() for column in columns)))


def drawn_entropy(rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean of −log π over the tokens of own answers, nats, at the temperature they were drawn at."""
    logp = np.concatenate([np.asarray(row["logp"], np.float64) for row in rows if row["source"] == OWN])
    if not np.isfinite(logp).all():
        raise UsageError(
            "`tempering` takes the entropy from the log-probabilities of answers, and the engine gave none for some "
            "tokens; expected a number for each. Pass --model.engine transformers, or leave the option out."
        )
    return float(-logp.mean())


def draw_tempered(
    answering: FurtherAnswers, store: Replay, entropy: float, k: int, seed: int, stop: Stop
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The right ones of the hot or cold answers of an iteration, group by group, and facts for the metrics.

    Args:
        answering: with a rule of tempering.
        store: of the new answers, whole groups of all processes.
        entropy: of the policy, nats.
        k: the iteration.
        seed: of the run.
        stop: as of :meth:`offpolicy.language.rl.answering.Answering.fresh`, which raises the same.
    """
    rule, size = answering.tempering, answering.options.group_size
    heat, mine = rule.heat(entropy), rule.chosen(store, k, seed)[processes.rank() :: processes.world_size()]
    requests = [Request(answering.prompt(problem, words), slot + TEMPERED, size) for slot, problem, words in mine]
    drawn = zip(mine, answering.generated(requests, k, seed, stop, heat))
    judged = answering.judged(
        [answer_row(slot, i, OWN, unscored(one), k, asked=words) for (slot, i, words), some in drawn for one in some]
    )
    right = sorted((row for row in judged if row["right"] and row["reward"] > 0), key=lambda row: row["slot"])
    return right, {
        "tempered/entropy": entropy,
        "tempered/temperature": heat * answering.options.temperature,
        "tempered/drawn": float(len(judged)),
        "tempered/left_out": float(len(judged) - len(right)),
    }


def unscored(answer: Completion) -> Completion:
    """An answer whose log-probabilities are left to training, at its temperature."""
    return Completion(answer[0], np.full(len(answer[0]), np.nan), answer[2])


def with_tempered(fresh: Replay, tempered: Replay | None) -> Replay:
    """New answers, with the tempered ones behind them; the column ``tempered`` tells them apart."""
    for store, told in ((fresh, False), (tempered, True)):
        if store is not None:
            store.episodes["tempered"] = np.full(store.num_episodes, told)
    return merged_answers(fresh, tempered)


def make_tempering(spec: Spec | None) -> Tempering | None:
    """The rule of the option ``tempering``.

    Raises:
        UsageError: it is none.
    """
    rule = None if spec is None else make("tempering", spec, {"aepo": Tempering})
    if rule is not None and not isinstance(rule, Tempering):
        raise UsageError(
            f"`tempering` is {spec!r}; expected 'aepo', or a class that extends "
            "offpolicy.language.rl.tempering.Tempering."
        )
    return rule


def check_tempering(options: Any, objective: Objective, answering: Any, *, mixes: bool) -> None:
    """Raise :class:`UsageError` where answers cannot be tempered, or nothing learns from those that are.

    Args:
        options: of the method.
        objective: of the run.
        answering: who answers.
        mixes: whether the method makes up the answers of an iteration by itself.
    """
    rule, learns = answering.tempering, "tempered" in objective.columns
    if rule is None and (mixes or not learns):
        return
    if rule is None or not learns:
        found = "nothing draws hot and cold answers" if learns else "no part of `objective` learns from `tempered` ones"
        raise UsageError(
            f"{found}; expected both the option and the part, as --model.variant aepo has them. Pass --model.tempering "
            "aepo --model.objective '{entropy: aepo}', or leave both out."
        )
    if mixes:
        raise UsageError(
            "`tempering` adds answers to an iteration, and this method mixes answers of its own; expected --model GRPO."
        )
    others = {
        "lag": bool(options.lag),
        "window": bool(getattr(options, "window", None)),
        "correction": options.correction is not None,
        "demonstrations": bool(options.demonstrations),
        "replay_fraction": bool(options.replay_fraction),
        "replay": options.replay != "recent",
        "record": bool(options.record),
        "engine": engine_name(options.engine) == "replay",
        "hints": isinstance(answering.asking.hints, Scaffold),
        "rewards": bool(answering.rewards.comparing),
        "objective.value": objective.uses_critic,
        "objective": objective.whole_groups or "group" in objective.columns,
    }
    for name in (name for name, given in others.items() if given):
        raise UsageError(
            f"`tempering` puts single answers of another temperature beside new groups, and `{name}` is for groups of "
            "the policy as it is; expected it to be left out."
        )
    if engine_name(options.engine) == "vllm":
        for factor in (rule.low, rule.high):
            check_temperature(factor * options.temperature)
