"""Judged answers, a dict each while they travel between processes, as rows of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as store_of
from offpolicy.data.texts.rollouts import OWN, newest_tokens
from offpolicy.language.rl.engine import Completion
from offpolicy.losses.health import group_metrics


def answer_row(
    slot: int, problem: int, source: int, answer: Completion, version: int, given: int = 0, asked: int = 0
) -> dict[str, Any]:
    """A row of the store; ``version``: whose weights drew it, unless the engine says so; ``asked``: in which words."""
    token, logp, ended, told, said = (*answer, None, None)[:5]
    drew = version if told is None else int(np.min(told))  # the oldest weights that drew some of it
    text = {"token": token, "logp": logp, "sampler_logp": logp if said is None else said, "ended": ended}
    return {"slot": slot, "problem": problem, "source": source, "given": given, "asked": asked, "version": drew, **text}


def counted_length(store: Replay) -> np.ndarray:
    """Tokens of each answer that count in the loss, (E,): none of earlier windows, none between two turns."""
    if not {"turn", "window"} & store.steps.keys():
        return store.length
    counts = np.asarray(store.steps["turn"]) >= 0 if "turn" in store.steps else newest_tokens(store)
    before = np.append(0, np.cumsum(counts))
    return before[store.start + store.length] - before[store.start]


def whole_length(store: Replay) -> np.ndarray:
    """Tokens of each answer that a critic learns from, (E,): all of those that are finished."""
    return store.length * ~store.episodes["unfinished"] if "unfinished" in store.episodes else counted_length(store)


def rows_stored(
    made: Sequence[dict[str, Any]], k: int, length: int, problems: Replay, dtype: torch.dtype
) -> tuple[Replay, dict[str, float]]:
    """The store of the new answers of an iteration, and facts for the metrics.

    Args:
        made: judged rows of all processes, group by group.
        k: the iteration.
        length: longest answer in tokens.
        problems: what was asked.
        dtype: that the policy computes in.
    """
    column = {name: [row[name] for row in made] for name in made[0]}
    rewards = torch.tensor(column["reward"], dtype=torch.float64, device="cpu")
    source = np.asarray(column["source"], np.uint8)
    group = np.asarray(column["slot"], np.int64) + (k << 32)
    own = torch.from_numpy(source == OWN)
    episodes: dict[str, Any] = {
        "iteration": np.full(len(made), k, np.int64),
        "policy_version": np.asarray(column["version"], np.int64),
        "group": group,
        "prompt": np.asarray(column["problem"], np.int64),
        "source": source,
        "given": np.asarray(column["given"], np.int64),
        "reward": rewards.numpy(),
        "ended": np.asarray(column["ended"], bool),
    }
    finished = np.ones(len(made), bool)
    if "windows" in column:
        episodes["windows"] = np.asarray(column["windows"], np.int64)
        finished = ~np.asarray(column["unfinished"], bool)
        episodes["unfinished"] = ~finished
    if "problems/asked" in problems.tables:
        episodes["asked"] = np.asarray(column["asked"], np.int64)
    for name in made[0]["parts"]:
        episodes[f"reward/{name}"] = np.asarray([row["parts"][name] for row in made], np.float32)
    steps: dict[str, Any] = {
        name: column[name] for name in ("logp", "sampler_logp", "turn", "stage", "window") if name in column
    }
    if "turn" in steps:
        episodes["first_reward"] = np.asarray(column["first_reward"], np.float64)
    floats = np.float64 if dtype == torch.float64 else np.float32
    store = store_of.make_store(column["token"], steps, episodes, problems.steps["token"].dtype, floats)
    mine = np.flatnonzero((source == OWN) & finished)
    last = store.length[mine] - np.asarray(column.get("behind", np.zeros(len(made), np.int64)))[mine]  # of two turns
    cut_short = ~episodes["ended"][mine] & (last < length)
    if not finished.any():
        return store, {}
    done = torch.from_numpy(finished)
    facts = group_metrics(rewards[done], torch.from_numpy(group)[done], own[done]) | {
        "answers/length": float(whole_length(store)[mine].mean()),
        "answers/ended": float(episodes["ended"][mine].mean()),
        "answers/aborted": float(cut_short.mean()),
        "answers/empty": float((last == 1).mean()),
        "answers/duplicates": store_of.duplicates(store, mine),
        "reward/problems": float(sum(row["problem_with_reward"] for row in made)),
    }
    for name in made[0]["parts"]:
        facts[f"reward/{name}"] = float(episodes[f"reward/{name}"][mine].mean())
    return store, facts
