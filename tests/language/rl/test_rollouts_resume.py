"""Runs that learn from their own answers and are interrupted, or killed while they answer, end where others do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_copy
from made_parts import MANY_PARTS
from tiny_rl import fit, make_policy, method, toy_problems
from toy import differences, run_files

from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError
from offpolicy.files import Table
from offpolicy.language.rl.answering import Answering
from offpolicy.language.rl.engines import TransformersEngine
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

REMEMBERS_STEPS = {
    "entropy": {"name": "siren", "coef": 0.5, "aggregation": "token_mean"},
    "trust": {"name": "d3s", "first": 0.3, "steps": 5},
}
# method, options, updates after which the run is cut, and in all; iterations of ReMix begin at 0, 2, 6, 10 and 12
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    "GRPO": ("GRPO", {"beta": 0.01, "micro_batch_size": 3}, (3,), 6),
    "ReMix": ("ReMix", {"reincarnation": 3, "kl_start": 1, "kl_every": 1}, (3, 9, 12), 15),
    "ReMix-PPO": (
        "ReMix",
        {"base": "ppo", "group_size": 1, "reincarnation": 3, "critic": "head", "critic_lr": 1e-2},
        (9,),
        12,
    ),
    "ReMix-exact": ("ReMix", {"kl": "full", "beta": 0.1, "kl_start": 1, "kl_every": 1, "reincarnation": 2}, (3, 4), 8),
    "RLPlus": ("RLPlus", {"temperature": 0.7, "demonstration_share": 0.5}, (3,), 6),
    "GRPO-late": ("GRPO", {"lag": 1, "demonstrations": 1, "demonstration_share": 0.5}, (2, 3), 8),
    "ReMix-late": ("ReMix", {"lag": 2, "min_ess": 0.9, "reincarnation": 3}, (3, 9), 12),
    "filtered": ("GRPO", {"filter": "signal", "rewards": ["tiny_rl.ends_early"], "lag": 1}, (3,), 6),
    "risk": ("GRPO", {"objective": {"advantage": {"name": "risk", "bundle": 1}}}, (3,), 6),
    "ssb": ("GRPO", {"replay": "ssb", "replay_fraction": 0.5, "replay_window": 2, "filter": "ended"}, (3,), 6),
    "r3": ("GRPO", {"replay": {"name": "r3", "success": 0.5}, "rewards": ["tiny_rl.ends_early"]}, (3,), 6),
    "windowed": ("GRPO", {"variant": "t_ppo", "window": 2, "group_size": 1, "critic": "head"}, (3, 4), 8),
    "HPT": ("HPT", {"success": 0.6}, (3,), 6),
    "SPEAR": ("SPEAR", {"capacity": 2, "ramp": 3, "micro_batch_size": 3}, (4,), 9),
    "own-state": ("GRPO", {"objective": {"weight": ["tiny_rl.Remembers"]}}, (3,), 6),
    "many-parts": ("GRPO", {"objective": MANY_PARTS, "micro_batch_size": 5}, (3,), 6),
    "steps": ("GRPO", {"objective": REMEMBERS_STEPS}, (3,), 6),
    "dropout": ("GRPO", {"lora_rank": 2, "lora_dropout": 0.3, "kl": "full", "beta": 0.1}, (3,), 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_crash_and_resume_equals_an_uninterrupted_run(name: str, policy: Path, tmp_path: Path) -> None:
    """From checkpoints at the start, in the middle and at the end of an iteration, before and after reincarnation."""
    kind, options, cuts, last = CASES[name]
    if "lora_rank" in options:
        pytest.importorskip("peft")
    whole = tmp_path / "whole"
    fit(method(kind, policy, **options), last, whole)
    expected = run_files(whole, last)
    cut = tmp_path / "cut"
    fit(method(kind, policy, **options), cuts[0], cut)
    for until in (*cuts[1:], last):
        resumed = method(kind, policy, **options)
        torch.manual_seed(99)
        resumed.seed = None
        fit(resumed, until, cut, ckpt_path=newest_checkpoint(cut))
    found = run_files(cut, last)
    # at its end each short run wrote a row of its own, and the next row counts from there
    steps = {row["step"] for row in expected["metrics"]}
    own = {step for first in cuts if first % 2 for step in (first, first + 1)}
    rows = [[r for r in f["metrics"] if r["step"] in steps - own] for f in (found, expected)]
    assert not differences(*rows)
    for part in ("state_dict", "optimizer_states", "offpolicy", "global_step", "hyper_parameters"):
        assert not differences(found[part], expected[part], part)


OPTIONS: dict[str, Any] = {"save_seconds": 0.0, "generation_batch": 4, "record": True}


def killed(root: Path) -> None:
    """kill -9 when half of the answers of the third iteration are drawn."""
    torch.set_num_threads(1)
    draw, batches = TransformersEngine._answers, []

    def dying(self: Any, requests: Any, how: Any) -> Any:
        batches.append(how.iteration)
        if batches.count(3) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, requests, how)

    TransformersEngine._answers = dying  # type: ignore[method-assign]
    fit(method("GRPO", root / "policy", **OPTIONS), 6, root / "killed", held_out=False)


@pytest.mark.slow
def test_a_kill_while_answers_are_drawn(tmp_path: Path) -> None:
    """The weights of the end of the second iteration are on the disk, and the run goes on from there."""
    policy = make_policy(tmp_path / "policy")
    done = run_copy(lambda: killed(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.output[-4000:]
    path = newest_checkpoint(tmp_path / "killed")
    assert path is not None and path.name == "step=00000004.ckpt"
    fit(method("GRPO", policy, **OPTIONS), 6, tmp_path / "killed", ckpt_path=path, held_out=False)
    fit(method("GRPO", policy, **OPTIONS), 6, tmp_path / "whole", held_out=False)
    assert not differences(run_files(tmp_path / "whole", 6), run_files(tmp_path / "killed", 6))
    assert len({(tmp_path / name / "records.jsonl").read_text() for name in ("whole", "killed")}) == 1


def test_ctrl_c_while_answers_are_drawn(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are thrown away, the weights kept, and the run goes on as if nothing had been."""
    fit(method("GRPO", policy), 6, tmp_path / "whole")
    draw, stopped = Answering.fresh, method("GRPO", policy)

    def fresh(self: Answering, k: int, *rest: int) -> Any:
        if k == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, k, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Answering, "fresh", fresh)
        fit(stopped, 6, tmp_path / "stopped")
    assert stopped.interrupted_by == signal.SIGINT and stopped.trainer.global_step == 2
    path = newest_checkpoint(tmp_path / "stopped")
    assert path is not None and path.name == "step=00000002.ckpt"
    fit(method("GRPO", policy), 6, tmp_path / "stopped", ckpt_path=path)
    assert not differences(run_files(tmp_path / "whole", 6), run_files(tmp_path / "stopped", 6))


def test_answers_lie_beside_the_checkpoints_that_need_them(policy: Path, tmp_path: Path) -> None:
    module = fit(method("ReMix", policy), 12, tmp_path)
    kept = sorted((tmp_path / "replay").iterdir())
    marks = {mark.stem for folder in kept for mark in folder.glob("step=*")}
    assert {path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")} <= marks
    assert len(kept) <= 4
    state = read_checkpoint(tmp_path / "checkpoints" / "step=00000012.ckpt")["offpolicy"]
    store = Replay.load(kept[-1])
    assert state["iteration"] == module.iteration == int(store.episodes["policy_version"].max())
    for folder in kept:
        for file in folder.rglob("*.npy"):
            file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        fit(method("ReMix", policy), 14, ckpt_path=tmp_path / "checkpoints" / "step=00000012.ckpt",
            default_root_dir=str(tmp_path))  # fmt: skip


def test_parts_of_an_objective_that_a_run_cannot_have_are_refused(policy: Path) -> None:
    """A state that nobody keeps, after the first step; a part that sees one micro-batch, before it."""
    with pytest.raises(UsageError, match=r"Forgets.*changes while it is used.*state_dict"):
        fit(method("GRPO", policy, objective={"weight": ["tiny_rl.Forgets"]}), 2)
    with pytest.raises(UsageError, match=r"Remembers.*depends on which answers it sees at once.*micro-batches"):
        fit(method("GRPO", policy, objective={"weight": ["tiny_rl.Remembers"]}, micro_batch_size=3), 2)


def test_other_problems_are_refused(policy: Path, tmp_path: Path) -> None:
    fit(method("GRPO", policy), 2, tmp_path)
    with pytest.raises(DataError, match="trained on other data"):
        fit(method("GRPO", policy), 4, ckpt_path=newest_checkpoint(tmp_path), problems=toy_problems(seed=9))


def test_rows_are_written_once_per_interval(policy: Path, tmp_path: Path) -> None:
    fit(method("GRPO", policy), 6, tmp_path)
    rows = Table(tmp_path / "metrics.csv").rows()
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["train/iteration"] for row in rows] == [1, 2, 3]
    assert [row["train/answers"] for row in rows] == [16, 32, 48]
