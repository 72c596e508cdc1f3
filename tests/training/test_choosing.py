"""The last checkpoint of a run, the best, or that of an update."""

from __future__ import annotations

from pathlib import Path

import pytest

import offpolicy
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.evaluate import main as evaluate
from offpolicy.files import Table
from offpolicy.training.choosing import chosen_checkpoint


@pytest.fixture(scope="module")
def run(replay: Replay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates 2, 4 and 6 keep their checkpoints, and update 4 has the best score."""
    folder = tmp_path_factory.mktemp("run") / "bc"
    method = offpolicy.BC(hidden_dims=(4,))
    for updates in (2, 4, 6):
        kept = {path: path.read_bytes() for path in folder.glob("checkpoints/*.ckpt")}
        go_on = {"ckpt_path": folder} if kept else {"folder": folder}
        offpolicy.fit(method, replay, max_steps=updates, eval_episodes=0, verbose=False, **go_on)
        for path, content in kept.items():
            path.write_bytes(content)
    Table(folder / "evals.csv").replace(
        {"step": step, "eval/score": score} for step, score in ((2, 10.0), (4, 30.0), (6, 20.0))
    )
    return folder


@pytest.mark.parametrize(("which", "updates"), [("last", 6), ("best", 4), ("2", 2), (4, 4), ("1", None)])
def test_which(run: Path, which, updates) -> None:
    if updates is None:
        with pytest.raises(UsageError, match="keeps no checkpoint of update 1; expected one of 2, 4, 6"):
            chosen_checkpoint(run, which)
        return
    assert chosen_checkpoint(run, which).name == f"step={updates:08d}.ckpt"
    assert offpolicy.load(run, which=which).updates == updates


def test_the_command_and_the_function_take_it(run: Path, monkeypatch, capsys) -> None:
    from offpolicy import api

    seen = []

    def played(path, **options):
        seen.append(Path(path).name)
        return {"score_kind": "made", "return_mean": 1.0, "return": 1.0}

    monkeypatch.setattr(api, "evaluate", played)
    assert evaluate([str(run), "--which", "best"]) == 0
    assert seen == ["step=00000004.ckpt"] and "4 updates" in capsys.readouterr().out


def test_the_lowest_held_out_loss_where_nothing_else_judges(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    Table(folder / "evals.csv").replace({"step": n, "eval/loss": loss} for n, loss in ((2, 0.2), (4, 0.1), (6, 0.3)))
    assert chosen_checkpoint(folder, "best").name == "step=00000004.ckpt"


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a run folder"):
        chosen_checkpoint(run / "checkpoints" / "step=00000002.ckpt", "best")
    with pytest.raises(UsageError, match="expected last, best, or an update"):
        chosen_checkpoint(run, "first")
    folder = tmp_path / "none"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(UsageError, match="no evaluation to choose the best"):
        chosen_checkpoint(folder, "best")
