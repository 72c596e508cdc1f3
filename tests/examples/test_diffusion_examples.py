"""The diffusion table: which runs it starts, its arithmetic, and its measures on a tiny generator and world model."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import ROOT
from toy import fit, toy_replay

import offpolicy
from offpolicy.diffusion.measures import Comparison, Measured


@pytest.fixture
def table() -> ModuleType:
    path = ROOT / "examples" / "diffusion" / "table.py"
    spec = importlib.util.spec_from_file_location("diffusion_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_and_arithmetic(
    table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds with scores 40 and 60 on real data: 50 ± 12.7062 · 14.1421 / √2 = 127.1; ten more on synthetic ones."""
    started = []

    def train(folder: Path, model: str, data: str, seed: int, *options: str) -> Path:
        given = dict(zip(options[::2], options[1::2]))
        started.append((model, seed, given.get("--data.source"), given.get("--data.synthetic.every")))
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "evals.csv", "w") as file:
            csv.writer(file).writerows([["step", "eval/score"], [1, 99.0], [2, 40 + 20 * seed + 10 * bool(given)]])
        (folder / "seconds.txt").write_text("7.0\n")
        return folder

    def measures(*_: object) -> Comparison:
        sets = [Measured(name, 9, {"log_prob": k - 2.0, "dynamics_error": 0.1 * k}) for k, name in enumerate("abc")]
        return Comparison(Measured("any", 9, {"log_prob": -3.0}), [*sets, Measured("d", 9, {"dynamics_error": 0.15})])

    monkeypatch.setattr(table, "train", train)
    monkeypatch.setattr(table, "measures", measures)
    monkeypatch.setattr(table.offpolicy, "load_data", lambda name: None)
    arguments = ["table.py", "--methods", "TD3BC", "--seeds", "2", "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    table.main()
    out = capsys.readouterr().out
    assert "| real data | -3 | – | – | – | – | – |" in out and "| c | 0 | 0.2 | – | – | – | – |" in out
    assert "log π rises with κ: yes; dynamics error below the world model's: a, b\n" in out
    assert "| TD3BC | real | 50.0 ± 127.1 | 40.0, 60.0 | 7 |" in out
    assert "| TD3BC | policy-guided, κ = 1 | 60.0 ± 127.1 | 50.0, 70.0 | 7 |" in out
    kinds = {(model, source) for model, _, source, _ in started}
    assert kinds == {("TD3BC", None), ("TD3BC", "unguided"), ("TD3BC", "policy-guided"), ("WorldModel", None),
                     ("TrajectoryDiffusion", None)}  # fmt: skip
    assert {every for *_, source, every in started if source} == {"2500"}  # a quarter of the recipe's 10,000


def test_measures(table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = toy_replay()
    tiny = {
        "policy": offpolicy.TD3BC(hidden_dims=(8,), batch_size=16),
        "world": offpolicy.WorldModel(members=2, elites=1, hidden_dims=(8,), batch_size=16),
        "model": offpolicy.TrajectoryDiffusion(horizon=4, stride=1, num_features=16, num_blocks=2, batch_size=8),
    }
    for name, method in tiny.items():
        method.seed, method.run.eval_episodes = 0, 0
        fit(method, replay, 2, tmp_path / name)
    monkeypatch.setattr(table.offpolicy, "load_data", lambda name: argparse.Namespace(replay=replay))
    args = argparse.Namespace(
        data="toy", root=tmp_path, model=tmp_path / "model", guidance=[1.0], trajectories=4, sampling_steps=2
    )
    found = table.measures(args, "TD3BC", tmp_path / "policy", tmp_path / "world")
    assert [one.name for one in found.synthetic] == ["unguided", "guided, κ = 1", "world model"]
    rows = [one.rows for one in found.synthetic]  # 4 · 3 transitions, fewer where one was generated as terminal
    assert rows[2] == 12 and max(rows) <= 12
    assert {"log_prob", "dynamics_error", "novelty"} <= found.synthetic[-1].numbers.keys()
    assert (tmp_path / "toy" / "measures-TD3BC.png").exists() and (tmp_path / "toy" / "measures-TD3BC.json").exists()
