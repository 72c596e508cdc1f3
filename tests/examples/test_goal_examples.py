"""The goal-conditioned examples: the table's arithmetic, and pictures of a run of a few updates."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import ROOT

import offpolicy

ogbench = pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="needs ogbench")
NAME = "pointmaze-medium-navigate-v0"


def example(name: str) -> ModuleType:
    path = ROOT / "examples" / "goals" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"goals_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_averages_the_last_three_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds with success (0.2, 0.4, 0.6) and (0.4, 0.6, 0.8) after a first row that does not count: 40 and 60 %.

    Mean 50; Student's t for two seeds: 12.7062 · 14.1421 / √2 = 127.1.
    """
    table = example("table")

    def call(*command: str) -> None:
        if command[0] != "offpolicy.fit":
            return
        options = dict(zip(command[1::2], command[2::2]))
        seed, folder = int(options["--seed_everything"]), Path(options["--folder"])
        assert options["--recipe"] == "small" and options["--run.eval_episodes"] == "10"
        folder.mkdir(parents=True)
        with open(folder / "evals.csv", "w") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "eval/success_mean", "eval/success_task1", "eval/order_consistency/low", "env"])
            rows.writerows([k, (k + seed) / 5 if k else 9.0, 1.0, 0.5, "maze"] for k in range(4))

    monkeypatch.setattr(table, "call", call)
    monkeypatch.setattr(sys, "argv", ["table.py", "--methods", "OTA", "--seeds", "2", "--root", str(tmp_path)])
    table.main()
    header, line, row = capsys.readouterr().out.splitlines()
    assert header.count("|") == line.count("|") == row.count("|")
    assert row.startswith("| OTA | 50.0 ± 127.1 | 100 | low 50.0 ± 0.0 | 40.0, 60.0 |")
    monkeypatch.setattr(table, "call", lambda *command: None)  # complete runs are read, not repeated
    table.main()
    assert capsys.readouterr().out.splitlines()[-1] == row


@ogbench
def test_pictures_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from offpolicy.data.sources.ogbench_make import make, recipe_of

    make({**recipe_of(NAME, "pointmaze-medium-v0"), "episodes": 2, "rows": 41}, tmp_path / f"{NAME}.npz")
    data = offpolicy.load_data(tmp_path / f"{NAME}.npz")
    data.load().meta["max_episode_steps"] = 40  # so that episodes are short
    sizes: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 8}
    for method in (offpolicy.OTA(**sizes), offpolicy.GCBC(**sizes)):
        folder = tmp_path / type(method).__name__
        offpolicy.fit(method, data, max_steps=2, folder=folder, eval_episodes=0, verbose=False)
    runs = [str(tmp_path / name) for name in ("OTA", "GCBC")]
    monkeypatch.setattr(sys, "argv", ["plot.py", *runs, "--out", str(tmp_path / "out")])
    example("plot").main()
    printed = capsys.readouterr().out.splitlines()
    names = {"order.png", "maze-OTA.png", "maze-GCBC.png"}
    assert {Path(line).name for line in printed} == names
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)
