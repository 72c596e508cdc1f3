"""The tables of runs that collect: which numbers they take, and that a run that is complete is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT / "examples" / "control")
    yield import_module("online")
    del sys.modules["online"]  # another example has the name


def test_tables_of_runs_that_collect(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores 10 at 500 steps and 30 at 2,000: those up to each quarter of 2,000 are 10, 10, 10 and 30."""
    begun: list[tuple[str, ...]] = []

    def fit(*words: str) -> float:
        begun.append(words)
        folder = Path(words[words.index("--folder" if "--folder" in words else "--ckpt_path") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        name = "eval/score" if "SAC" in words and "--data" in words else "eval/return_mean"
        (folder / "evals.csv").write_text(f"env/steps,{name}\n500,10.0\n2000,30.0\n")
        measures = {"at_switch": 50.0, "dip": 20.0, "mean": 40.0, "last": 60.0}
        (folder / "online.json").write_text(json.dumps(measures))
        return 1.5

    monkeypatch.setattr(example, "fit", fit)
    given = ["online.py", "curves", "--envs", "Pendulum-v1", "--steps", "2000", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*given, "--root", str(tmp_path), "--out", str(tmp_path / "c.png")])
    for _ in range(2):
        example.main()
    assert len(begun) == 2 and (tmp_path / "c.png").stat().st_size > 1000
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[3].split()[0] for row in rows[2:6]] == ["10.0", "10.0", "10.0", "30.0"]

    given = ["online.py", "switch", "--methods", "IQL", "RLPD", "--seeds", "1", "--utd", "3"]
    monkeypatch.setattr(sys, "argv", [*given, "--root", str(tmp_path)])
    example.main()
    rows = [[cell.strip() for cell in row.split("|")][1:6] for row in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["IQL", "50.0", "20.0", "40.0", "60.0"], ["RLPD", "-", "-", "20.0", "30.0"]]
    assert [words[1] for words in begun[2:]] == ["IQL", "IQL", "SAC"]
    assert begun[-1][begun[-1].index("--model.policy_freq") + 1] == "3"


def test_what_must_be_learnt_is_compared_seed_by_seed(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SAC ends at -150 and -130, above -200; IQL at 70 from 50; RLPD, at -140, equals SAC after 2,000 steps."""

    def fit(*words: str) -> float:
        folder = Path(words[words.index("--folder" if "--folder" in words else "--ckpt_path") + 1])
        for seed in range(2):
            (folder / f"seed{seed}").mkdir(parents=True, exist_ok=True)
            rows = f"env/steps,eval/return_mean\n2000,{-150 + 20 * seed}\n"
            (folder / f"seed{seed}" / "evals.csv").write_text(rows)
            (folder / f"seed{seed}" / "online.json").write_text(json.dumps({"at_switch": 50.0, "last": given["end"]}))
        return 1.5

    made: list[Any] = []
    monkeypatch.setattr(example, "fit", fit)
    monkeypatch.setattr(example, "command", made.append)
    monkeypatch.setattr(sys, "argv", ["online.py", "learns", "--seeds", "2", "--root", str(tmp_path)])
    given = {"end": 70.0}
    example.main()
    rows = [[cell.strip() for cell in row.split("|")][2:6] for row in capsys.readouterr().out.splitlines()[2:]]
    scores = [["-150.0, -130.0", "-140.0", "-200.0", "yes"], ["70.0, 70.0", "70.0", "50.0", "yes"]]
    assert rows == [*scores, ["-150.0, -130.0", "-140.0", "-140.0", "yes"]]
    assert made[0][-2:] == ["make", "pendulum-medium-made-v0"]
    given = {"end": 40.0}
    with pytest.raises(SystemExit, match="One of them does not hold"):
        example.main()
