"""Answers that are drawn a window of tokens at a time (option ``window``), as in T-PPO (arXiv:2506.15050).

An iteration draws at most ``window`` new tokens of an answer. An answer that has not ended then, and may be longer, is
unfinished: the next iteration goes on with it under the weights of then, and asks one new problem fewer.

In the store, such an answer is a row of its iteration, with the tokens of earlier windows in front. The column
``window`` of the tokens says in which of its windows a token was drawn, from 0; ``windows`` of the answers, how many
there are; and ``unfinished``, which answers go on. The policy learns from the newest window. The critic may learn from
all tokens of finished answers; T-PPO's leaves out those that ``max_new_tokens`` has cut. An unfinished answer is not
judged, and its reward is 0. The next iteration needs to know nothing but these rows, so they travel with the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.texts.replaying import Recent
from offpolicy.data.texts.rollouts import OWN, iteration_of
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.engine import Completion, FurtherAnswers, Request, engine_name
from offpolicy.language.rl.records import cut_answer
from offpolicy.language.rl.rows import answer_row
from offpolicy.losses.policy_gradient import Objective

COLUMNS = ("logp", "sampler_logp", "window")  # of the tokens, that an answer brings along


def unfinished_rows(store: Replay | None, k: int, length: int) -> list[dict[str, Any]]:
    """The answers that iteration k goes on with: those of the iteration before that are unfinished, numbered from 0.

    Args:
        store: of the answers; None where there are none.
        k: the iteration that begins.
        length: longest answer in tokens.
    """
    if store is None or "unfinished" not in store.episodes:
        return []
    facts = store.episodes
    goes_on = facts["unfinished"] & (iteration_of(store) == k - 1) & (store.length < length)
    asked, found = facts.get("asked", np.zeros(store.num_episodes, np.int64)), []
    for slot, row in enumerate(np.flatnonzero(goes_on).tolist()):
        place = slice(int(store.start[row]), int(store.start[row] + store.length[row]))
        found.append(
            {
                "slot": slot,
                "problem": int(facts["prompt"][row]),
                "asked": int(asked[row]),
                "windows": int(facts["windows"][row]),
                "token": to_numpy(store.steps["token"])[place].astype(np.int64),
                **{name: np.array(to_numpy(store.steps[name])[place]) for name in COLUMNS},
            }
        )
    return found


def requests_on(answering: FurtherAnswers, rows: Sequence[dict[str, Any]], length: int) -> list[Request]:
    """What is asked for the next windows of these answers, which may have so many tokens in all."""
    prompts = [answering.prompt(row["problem"], row["asked"]) for row in rows]
    return [
        Request(np.concatenate([prompt, row["token"]]), row["slot"], 1, length - len(row["token"]))
        for prompt, row in zip(prompts, rows)
    ]


def gone_on(row: dict[str, Any], answer: Completion, k: int, length: int) -> dict[str, Any]:
    """The row of an answer with a window more, drawn in iteration k; what is longer than an answer may be is cut.

    Raises:
        DataError: the window has no token.
    """
    if not len(answer.token):
        raise DataError("an engine went on with an answer by no token; expected at least the one that ends it.")
    answer = cut_answer(answer, length - len(row["token"]))
    new = answer_row(row["slot"], row["problem"], OWN, answer, k, asked=row["asked"])
    new["window"] = np.full(len(answer.token), row["windows"])
    joined = {name: np.concatenate([row[name], new[name]]) for name in ("token", *COLUMNS)}
    return {**new, **joined, "windows": row["windows"] + 1}


def in_windows(rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Rows with the columns of windows; those that are new have one.

    Args:
        rows: of answers, drawn and not judged.
        length: longest answer in tokens.
    """
    first = [{"window": np.zeros(len(row["token"]), np.int64), "windows": 1} for row in rows]
    unfinished = [not row["ended"] and len(row["token"]) < length for row in rows]
    return [{**one, **row, "unfinished": goes_on} for one, row, goes_on in zip(first, rows, unfinished)]


def unjudged(rewards: Sequence[str]) -> dict[str, Any]:
    """What an unfinished answer has in place of rewards of these names."""
    return {"right": False, "reward": 0.0, "parts": dict.fromkeys(rewards, 0.0), "problem_with_reward": 0.0}


def window_facts(store: Replay, carried: int) -> dict[str, float]:
    """For the metrics: answers that were gone on with and that are finished, and the mean windows of the latter."""
    done = ~store.episodes["unfinished"]
    facts = {"answers/carried": float(carried), "answers/finished": float(done.sum())}
    return facts | ({"answers/windows": float(store.episodes["windows"][done].mean())} if done.any() else {})


def window_fact(window: int, length: int) -> str:
    """For the first screen."""
    if window >= length:
        return f"{window} tokens, so that no answer is cut"
    return f"{window} new tokens of an answer in an iteration; the next ones go on with what is unfinished"


def check_window(options: Any, rule: Recent, objective: Objective, *, mixes: bool) -> None:
    """Raise :class:`UsageError` where answers cannot be drawn a window at a time.

    Args:
        options: of the method.
        rule: of replay.
        objective: of the method.
        mixes: whether the method makes up the answers of an iteration by itself.
    """
    if options.window is None:
        return
    others = {
        "demonstrations": bool(options.demonstrations),
        "hints": options.hints is not None,
        "correction": options.correction is not None,
        "tempering": options.tempering is not None,
        "curriculum": options.curriculum is not None,
        "filter": options.filter is not None,
        "length_cycle": options.length_cycle is not None,
        "lag": bool(options.lag),
        "replay_fraction": bool(options.replay_fraction),
        "replay": type(rule) is not Recent,
        "min_ess": bool(options.min_ess),
        "record": bool(options.record),
        "engine": engine_name(options.engine) == "replay",
    }
    found = [name for name, given in others.items() if given]
    if found:
        raise UsageError(
            f"`window` leaves answers unfinished until a later iteration, and `{found[0]}` is for answers that are "
            "whole when they are drawn; expected one of the two. Leave one of them out."
        )
    if mixes:
        raise UsageError(
            "`window` leaves answers unfinished, and this method mixes answers of its own; expected --model GRPO."
        )
    if not objective.uses_critic or "ended" not in objective.reads_of_answers:
        given = _name(objective.advantage)
        raise UsageError(
            f"`window` leaves answers unfinished, without a reward, and the advantage '{given}' takes every answer for "
            "whole; expected one from a critic that knows of cuts, as 'egae'. Pass --model.variant t_ppo."
        )
    if options.group_size != 1:
        raise UsageError(
            f"`window` lets the answers to a problem end in different iterations, and `group_size` is "
            f"{options.group_size}; expected 1, as a critic compares no answers. Pass --model.group_size 1."
        )


def _name(spec: Any) -> str:
    return str(spec if isinstance(spec, str) else spec["name"])
