"""How well a policy solves held-out problems: its most likely answer, and several drawn ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from offpolicy.compute import processes
from offpolicy.data.texts.sequences import token_ids
from offpolicy.language.evaluation import eval_sample
from offpolicy.language.reference import evaluating
from offpolicy.language.rl.engine import Request
from offpolicy.language.rl.engines import TransformersEngine


def solve(method: Any) -> dict[str, float]:
    """Accuracies of a method in training on its held-out problems; the same draws every time.

    ``accuracy`` of the most likely answer, ``mean@k`` and ``pass@k`` of k drawn ones, and each again below the name of
    every kind of problem (``carry/accuracy``). What is right :meth:`Rewards.solved` says. Processes share the problems.
    """
    problems, samples = method.eval_problems, method.hparams.eval_samples
    table = problems.tables["problems"]
    rows = eval_sample(len(table), method.hparams.eval_rows)
    world, rank = method.world_size, method.process_rank
    mine = rows[rank::world]
    answering, h = method.answering, method.hparams
    engine = answering.engine if h.engine != "replay" else TransformersEngine(h.generation_batch)
    found: dict[str, np.ndarray] = {}
    with evaluating(method.model), method.precision_context():
        engine.sync(method.model, method.iteration)
        for count, temperature in ((1, 0.0), (samples, h.temperature)):
            if not count:
                continue
            requests = [Request(token_ids(problems, table[row, 0]), int(row), count) for row in mine]
            how = replace(answering.sampling(0), temperature=temperature, seed=0)
            answers = [one for some in engine.generate(requests, how) for one in some]
            asked = [int(row) for row in mine for _ in range(count)]
            scored = answering.judge(problems, asked, [a.token for a in answers], [a.ended for a in answers])
            found["sampled" if temperature else "likely"] = answering.rewards.solved(scored).reshape(-1, count)
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
