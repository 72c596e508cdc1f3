"""The parts that the benchmark of DPO adds to a plain loop change its speed and not its losses; that of GRPO runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from examples.benchmarks import checkpoints, lag, preference, rlvr


@pytest.mark.slow
def test_every_part_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VOCABULARY": 50, "LAYERS": 2, "WIDTH": 32, "PROMPT": 6, "ANSWER": 5, "LR": 1e-2}.items():
        monkeypatch.setattr(preference, name, value)
    preference.prepare(tmp_path, rows=6)
    monkeypatch.setattr("offpolicy.compute.memory.keep_freed_memory", lambda: True)  # holds for the whole process
    plain, *faster = (preference.run_loop(tmp_path, 3, 2, part)["losses"] for part in range(len(preference.PARTS)))
    assert plain[0] == pytest.approx(0.693147, abs=1e-5) and abs(plain[2] - plain[0]) > 1e-3
    for losses in faster:
        assert losses == pytest.approx(plain, abs=1e-4)


def test_the_benchmark_of_grpo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of it at a small size: times of every step, and rewards that are shares."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.syspath_prepend(rlvr.HERE)  # where the reward is imported from
    monkeypatch.setattr(rlvr, "PROMPTS", 2)
    monkeypatch.setattr(rlvr, "WIDTH", 16)
    rlvr.prepare(tmp_path, 6)
    found = rlvr.run("grpo", tmp_path, 3, rlvr.LENGTH)
    assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
    assert all(0 <= reward <= 1 for reward in found["rewards"])
    assert rlvr.evenness("", "w2 w3 w4", None) == 2 / 3 and rlvr.evenness("", "", None) == 0


def test_the_benchmark_of_answers_drawn_ahead_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lag.HERE)  # where engine and reward are imported from
    rlvr.prepare(tmp_path, 6, rlvr.PROMPT + 4, hidden_size=16, num_hidden_layers=1)
    settings = Namespace(python=None, prompts=1, length=4, iterations=lag.SKIP + 3)
    found = lag.run(tmp_path, 1, settings)
    assert min(found[name] for name in ("seconds", "rollout", "wait", "drawing")) > 0 and found["idle"] <= 1


def test_the_benchmark_of_checkpoints_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "VOCABULARY", 50)
    assert checkpoints.prepare(tmp_path / "policy", layers=1, width=16) > 1000
    found = checkpoints.run(tmp_path, tmp_path / "policy", 4, {"save_every": 2, "async_save": True, "keep": "last"})
    assert set(found) == {"updates", "end"} and min(found.values()) > 0
    assert [path.name for path in tmp_path.glob("run/checkpoints/*")] == ["step=00000004.ckpt"]
