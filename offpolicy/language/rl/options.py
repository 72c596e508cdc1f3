"""Which options and data a method that learns from its own answers can be trained with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from offpolicy.data.replay import Replay
from offpolicy.data.texts.replaying import Recent
from offpolicy.errors import DataError, UsageError, check_choice, check_range
from offpolicy.language.rl.critic import CRITICS
from offpolicy.language.rl.engine import engine_name
from offpolicy.losses.policy_gradient import Objective

LEAST = {  # option → its least value
    "group_size": 1,
    "minibatches": 1,
    "sweeps": 1,
    "iterations": 1,
    "max_new_tokens": 1,
    "window": 1,
    "generation_batch": 1,
    "replay_window": 0,
    "lag": 0,
    "eval_samples": 0,
    "eval_top_k": 0,
    "save_seconds": 0,
    "reward_seconds": 0,
    "critic_lr": 0,
}


def check_rollout_options(given: Mapping[str, Any], batch_size: int, reference: str) -> None:
    """Raise :class:`UsageError` for an option that is out of its range, or does not go with the others.

    Args:
        given: arguments of :class:`RolloutModule` by name.
        batch_size, reference: of all language methods.
    """
    for name, least in LEAST.items():
        if given[name] is not None:
            check_range(name, given[name], least)
    check_range("temperature", given["temperature"], 0.0, lower_open=True)
    check_range("eval_top_p", given["eval_top_p"], 0.0, 1.0, lower_open=True)
    check_range("replay_fraction", given["replay_fraction"], 0.0, 1.0, upper_open=True)
    check_range("min_ess", given["min_ess"], 0.0, 1.0)
    check_choice("critic", given["critic"], CRITICS)
    check_range("demonstrations", given["demonstrations"], 0, 1)
    check_share(given["demonstration_share"], given["demonstrations"])
    check_groups(
        batch_size,
        given["group_size"],
        given["minibatches"],
        given["replay_fraction"],
        given["replay_window"],
        given["demonstrations"],
    )
    check_lag(given["lag"], given["replay_fraction"], given["replay_window"])
    check_filter(given["filter"], given["group_size"] - given["demonstrations"], given["engine"])
    if reference != "auto":
        raise UsageError(
            "`reference` is for preference methods; here the base is the policy as it was at its start. Leave it out."
        )


def check_share(share: float, demonstrations: int) -> None:
    """Raise :class:`UsageError` for a share of demonstrations that is out of range, or of none."""
    check_range("demonstration_share", share, 0.0, 1.0, lower_open=True)
    if share < 1 and not demonstrations:
        raise UsageError(
            f"`demonstration_share` is {share} and `demonstrations` 0, so there is none to give a part of; expected 1. "
            "Pass --model.demonstrations 1."
        )


def check_lag(lag: int, replay_fraction: float, replay_window: int) -> None:
    """Raise :class:`UsageError` where new answers would be older than any that may be replayed."""
    if replay_fraction and lag > replay_window:
        raise UsageError(
            f"`lag` is {lag}, so new answers are {lag} iterations old, and `replay_window` is {replay_window}, after "
            f"which they are forgotten; expected ≥ `lag`. Pass --model.replay_window {lag}, or a smaller --model.lag."
        )


def check_filter(spec: Any, own: int, engine: Any) -> None:
    """Raise :class:`UsageError` where groups can have no signal, or others cannot be drawn in their place."""
    listed = spec if isinstance(spec, list | tuple) else [spec]
    if not any((one.get("name") if isinstance(one, Mapping) else one) == "signal" for one in listed):
        return
    if own < 2:
        raise UsageError(
            f"`filter` is 'signal' and groups have {own} answer(s) of the policy, which never differ; expected ≥ 2. "
            "Pass --model.group_size 8."
        )
    if engine_name(engine) == "replay":
        raise UsageError(
            "`filter` is 'signal' and the engine 'replay' reads recorded answers, which has none for problems that are "
            "asked again; expected an engine that draws, or no filter: records hold what it kept."
        )


def check_replay(rule: Any, options: Any, *, critic: bool) -> None:
    """Raise :class:`UsageError` for a rule of replay that does not go with the other options."""
    fraction, name = options.replay_fraction, getattr(rule, "name", type(rule).__name__)
    if not isinstance(rule, Recent):
        raise UsageError(f"`replay` is {name!r}; expected a class that extends offpolicy.data.texts.replaying.Recent.")
    if type(rule) is Recent:
        return
    if critic:
        raise UsageError(
            f"`replay` is '{name}', which compares the answers of a group, and the objective has a critic, whose "
            "answers stand alone; expected an advantage from groups, or 'recent'."
        )
    if rule.draws and not fraction:
        raise UsageError(
            f"`replay` is '{name}' and `replay_fraction` 0, so nothing would be used again; expected a share. Pass "
            "--model.replay_fraction 0.25 --model.replay_window 4."
        )
    if not rule.draws and fraction:
        raise UsageError(
            f"`replay` is '{name}', which puts single answers into new groups, and `replay_fraction` {fraction} asks "
            "for whole groups, which it does not keep; expected 0."
        )
    signal = options.filter if isinstance(options.filter, list | tuple) else [options.filter]
    if not rule.draws and any((f.get("name") if isinstance(f, Mapping) else f) == "signal" for f in signal):
        raise UsageError(
            f"`replay` is '{name}', which completes groups without success, and `filter` 'signal' drops them first; "
            "expected one of both."
        )


def check_right_answers(problems: Replay, verifiers: Collection[str]) -> None:
    """Raise :class:`DataError` where a reward compares with right answers and there are none."""
    if not verifiers or problems.tables["problems/answer"].astype(bool).any():
        return
    meta = problems.meta
    raise DataError(
        f"{meta.get('name', 'the data')} has the columns {', '.join(meta.get('source_columns', ()))} and no right "
        f"answers, with which the reward {next(iter(verifiers))} compares; expected a column of answers, as in "
        '--data.columns \'{"answer": "…"}\', or rewards that need none, as in --model.rewards '
        "'[package.module.function]'."
    )


def check_masks(masks: Collection[str], *, critic: bool) -> None:
    """Raise :class:`UsageError` for filters of answers beside a critic."""
    if masks and critic:
        raise UsageError(
            f"`filter` has {', '.join(masks)}, which look at advantages of whole answers, and those of the objective "
            "come from a critic; expected an advantage from groups, or no filter but 'signal'."
        )


def check_engine_lag(lag: int, engine: Any) -> None:
    """Raise :class:`UsageError` where an engine that works on the trainer's device should draw beside it."""
    if lag and getattr(engine, "shares_card", False):
        raise UsageError(
            f"`lag` is {lag}, and the engine draws on the device that trains, where one waits for the other; expected "
            "an engine with devices of its own, as in --model.engine '{name: vllm, devices: [1]}', or --model.lag 0."
        )


def check_reads_of_answers(objective: Objective, lag: int, engine: Any) -> None:
    """Raise :class:`UsageError` where the advantage asks for the entropy of a policy that is gone."""
    if "mean_entropy" not in objective.reads_of_answers:
        return
    if lag or not getattr(engine, "on_policy", True):
        found = f"`lag` is {lag}" if lag else "the engine reads answers that another policy drew"
        raise UsageError(
            f"{found}, and the advantage asks for the entropy of the policy that drew the answers, which only their "
            "probabilities are left of; expected answers of the policy of now. Pass --model.lag 0 and an engine that "
            "draws, or another --model.objective."
        )


def check_demonstrations(objective: Objective, demonstrations: int, problems: Any) -> None:
    """Raise an error where a part of an objective says nothing but of demonstrations, and has none to speak of."""
    needed = objective.of_demonstrations
    if needed and not demonstrations:
        raise UsageError(
            "a part of `objective` is about demonstrations alone, and `demonstrations` is 0, so it "
            "would pay nothing; expected 1, or no such part. Pass --model.demonstrations 1."
        )
    if "logp" in needed and "logp" not in problems.steps:
        raise DataError(
            "a part of `objective` compares demonstrations with who wrote them (reference 'behavior'), and "
            f"{problems.meta.get('name', 'the data')} does not say how likely its solutions were, so it would pay "
            "nothing; expected a column `solution_logps`, or the reference 'base'. Name it with --data.columns."
        )


def check_problems(problems: Any, method: str, *, demonstrations: bool) -> None:
    """Raise :class:`DataError` unless a replay holds problems, with demonstrations where the method needs some."""
    name = problems.meta.get("name", "the data")
    if "problems" not in problems.tables:
        raise DataError(
            f"{name} holds no problems; expected prompts with answers that can be checked. Pass --data gsm8k, --data "
            "addition or a file."
        )
    if demonstrations and not (problems.tables["problems"][:, 1] >= 0).any():
        raise DataError(
            f"{method} learns from demonstrations, and {name} has none; expected a column `solution`. Name it with "
            "--data.columns, or choose GRPO."
        )


def check_groups(
    batch_size: int,
    group_size: int,
    minibatches: int,
    replay_fraction: float,
    replay_window: int,
    demonstrations: int,
) -> None:
    """Raise :class:`UsageError` unless steps hold whole groups, and an iteration has the groups that it should."""
    if demonstrations >= group_size:
        raise UsageError(
            f"`group_size` is {group_size}, which leaves no answer of the policy beside the demonstration; "
            "expected ≥ 2. Pass --model.group_size 8."
        )
    if batch_size % group_size:
        raise UsageError(
            f"`batch_size` is {batch_size} and `group_size` {group_size}; expected a multiple, as groups stay whole. "
            f"Pass --model.batch_size {max(1, batch_size // group_size) * group_size}."
        )
    if replay_fraction and not replay_window:
        raise UsageError("`replay_fraction` is above 0 and `replay_window` is 0; expected ≥ 1 iterations to draw from.")
    groups = batch_size // group_size * minibatches
    if replay_fraction and not 0 < round(replay_fraction * groups) < groups:
        raise UsageError(
            f"`replay_fraction` is {replay_fraction}, which of the {groups} groups of an iteration makes "
            f"{round(replay_fraction * groups)}; expected one replayed group and a fresh one at least. Pass a "
            "larger --model.batch_size, or another share."
        )
