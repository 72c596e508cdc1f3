"""How well a policy solves held-out problems: its most likely answer, and several drawn ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from offpolicy.compute import processes
from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import token_ids
from offpolicy.language.evaluation import eval_sample
from offpolicy.language.rl.answering import Answering
from offpolicy.language.rl.engine import Request


def solve(
    problems: Replay, answering: Answering, model: Any, iteration: int, *, samples: int, limit: int
) -> dict[str, float]:
    """Accuracies of a policy on held-out problems; the same draws every time.

    ``accuracy`` of the most likely answer, ``mean@k`` and ``pass@k`` of k drawn ones, and each again below the name of
    every kind of problem (``carry/accuracy``). What is right :meth:`Rewards.solved` says. Processes share the problems.

    Args:
        problems: held-out ones.
        answering: who answers, and who judges.
        model: the policy, in evaluation.
        iteration: whose weights it has.
        samples: k ≥ 0; 0 for the most likely answer alone.
        limit: problems looked at, a fixed sample; 0 for all.
    """
    table = problems.tables["problems"]
    rows = eval_sample(len(table), limit)
    mine = rows[processes.rank() :: processes.world_size()]
    engine = answering.evaluation_engine()
    found: dict[str, np.ndarray] = {}
    if engine is answering.engine:
        answering.sync(model, iteration)
    else:
        engine.sync(model, iteration)
    usual = answering.sampling(0)
    h = answering.options
    cut: dict[str, Any] = {"top_p": getattr(h, "eval_top_p", 1.0), "top_k": getattr(h, "eval_top_k", 0)}
    for count, temperature in ((1, 0.0), (samples, usual.temperature)):
        if not count:
            continue
        requests = [Request(token_ids(problems, table[row, 0]), int(row), count) for row in mine]
        how = replace(usual, temperature=temperature, **(cut if temperature else {}))
        answers = [one for some in engine.generate(requests, how) for one in some]
        asked = [int(row) for row in mine for _ in range(count)]
        scored = answering.judge(problems, asked, [a.token for a in answers], [a.ended for a in answers])
        found["sampled" if temperature else "likely"] = answering.rewards.solved(scored).reshape(-1, count)
    answering.rest()
    parts = processes.gathered((mine, found))
    order = np.argsort(np.concatenate([part[0] for part in parts]))
    whole = {name: np.concatenate([part[1][name] for part in parts])[order] for name in found}
    kinds = {
        name.removeprefix("problems/") + "/": column[rows]
        for name, column in problems.tables.items()
        if column.dtype == bool
    }
    numbers: dict[str, float] = {}
    for prefix, kept in {"": np.ones(len(rows), bool), **kinds}.items():
        if kept.any():
            numbers[f"{prefix}accuracy"] = float(whole["likely"][kept].mean())
            if samples:
                solved = whole["sampled"][kept]
                numbers[f"{prefix}mean@{samples}"] = float(solved.mean())
                numbers[f"{prefix}pass@{samples}"] = float(solved.any(1).mean())
    return numbers
