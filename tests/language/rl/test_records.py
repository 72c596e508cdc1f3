"""Answers that a run writes down: what a line says, and that training on them gives the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rl import fit, method, toy_problems

from offpolicy.data.texts.sequences import token_ids
from offpolicy.files import Table
from offpolicy.language.rl.records import Recorder

INEXACT = {"engine": "tiny_rl.InexactEngine", "objective": {"weight": [{"name": "engine", "mode": "token_truncate"}]}}
CASES: dict[str, dict[str, Any]] = {
    "GRPO": INEXACT,
    "ReMix": {"reincarnation": 3},
    "RLPlus": {"micro_batch_size": 3, "demonstration_share": 0.5},
}
LATE = {"GRPO-late": {"lag": 1}, "ReMix-late": {"lag": 2}}
GAPS = ("engine/gap_mean", "engine/gap_max", "answers/aborted")
SAME = (
    *GAPS,
    "loss",
    "reward/own",
    "ratio/ess",
    "ratio/clipped",
    "kl/behavior",
    "kl/base",
    "entropy",
    "answers/length",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *LATE])
def test_a_recorded_run_is_trained_again(case: str, policy: Path, tmp_path: Path) -> None:
    """GRPO takes more iterations than a pass over the problems, so that a prompt has answers of several policies. It
    does so in 64 bits, and its loss weighs by what an inexact engine said.
    """
    name, options = case.split("-")[0], (CASES | LATE)[case]
    how: dict[str, Any] = {"held_out": False, "precision": "64-true" if case == "GRPO" else "32-true"}
    first = fit(method(name, policy, record=True, **options), 8, tmp_path / "first", **how)
    records = tmp_path / "first" / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert {row["iteration"] for row in rows} == set(range(1, first.iteration + 1))
    assert sum(len(row["completions"]) for row in rows) == first.generated
    again = method(name, policy, **{**options, "engine": "replay", "records": str(records)})
    again = fit(again, 8, tmp_path / "again", **how)
    for ours, theirs in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    tables = [Table(tmp_path / folder / "metrics.csv").rows() for folder in ("first", "again")]
    first_rows, again_rows = ([[row.get(f"train/{key}") for key in SAME] for row in rows] for rows in tables)
    assert first_rows == again_rows and None not in first_rows[0]
    late = [[row.get("train/engine/version_lag") for row in rows] for rows in tables]
    assert late[0] == late[1] and (late[0][-1] == options["lag"] if case in LATE else late[0][-1] is None)


def test_what_a_record_says(policy: Path, tmp_path: Path) -> None:
    module = fit(method("GRPO", policy, record=True), 2, tmp_path, held_out=False)
    store, problems = module.course.rollouts.store, toy_problems()
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and [row["request"] for row in rows] == [0, 1, 2, 3]
    for i, row in enumerate(rows):
        mine = np.arange(4 * i, 4 * i + 4)
        asked = problems.tables["problems"][store.episodes["prompt"][mine[0]], 0]
        assert row["prompt"] == token_ids(problems, asked).tolist() and row["iteration"] == 1
        assert row["completions"] == [token_ids(store, one).tolist() for one in mine]
        assert row["versions"] == [1] * 4
        assert row["rewards"] == store.episodes["reward"][mine].tolist()
        for one, logps in zip(mine, row["logps"]):
            span = slice(store.start[one], store.start[one] + store.length[one])
            assert logps == store.steps["logp"][span].tolist() == store.steps["previous_logp"][span].tolist()
        for one, said in zip(mine, row["sampler_logps"]):
            assert said == store.steps["sampler_logp"][store.start[one] :][: len(said)].tolist()


def test_what_a_run_writes_again_is_removed_first(tmp_path: Path) -> None:
    """Lines of iterations after the checkpoint's, and one that a kill tore."""
    path = tmp_path / "records.jsonl"
    lines = [json.dumps({"iteration": k, "prompt": [k]}) + "\n" for k in (1, 1, 2, 3)]
    path.write_text("".join(lines) + '{"iteration": 2, "pro')
    Recorder(path, 2)
    assert path.read_text() == "".join(lines[:3])
