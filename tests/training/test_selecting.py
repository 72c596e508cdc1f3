"""A checkpoint chosen without an environment: by values or errors on episodes that training has not seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import method, toy_replay

import offpolicy as op
from offpolicy.compute import processes
from offpolicy.errors import UsageError
from offpolicy.ope import main
from offpolicy.training import selecting
from offpolicy.training.choosing import chosen_checkpoint
from offpolicy.training.selecting import action_error, select_checkpoint

QUICK: dict[str, Any] = {"eval_episodes": 0, "save_every": 10, "select_updates": 10, "log_every": 10}


def made(name: str, folder: Path, steps: int = 30, episodes: int = 60, **options: Any) -> op.FitResult:
    return op.fit(method(name), toy_replay((6,) * episodes), max_steps=steps, folder=folder, **QUICK | options)


def steps_of(folder: Path) -> list[int]:
    return [int(path.stem[5:]) for path in sorted(folder.glob("checkpoints/step=*.ckpt"))]


def test_a_value_chooses_what_is_kept_opened_and_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    found = made("TD3BC", folder, select="fqe", keep="last")
    text, kept = capsys.readouterr().out, json.loads((folder / "selected.json").read_text())
    best = max(kept["candidates"], key=lambda one: one["value"])
    assert [one["step"] for one in kept["candidates"]] == [10, 20, 30] and kept["held_out"] == 6
    assert (kept["step"], kept["value"]) == (best["step"], best["value"])
    assert "too few updates" in kept["doubt"] and "do not trust: too few updates" in text
    assert "held out  6 of 60 episodes, which training does not see" in text and "values of those held out" in text
    assert f"selected  update {kept['step']}" in text
    path = folder / "checkpoints" / kept["checkpoint"]
    assert found.selected == path and os.readlink(folder / "checkpoints" / "selected") == kept["checkpoint"]
    assert steps_of(folder) == sorted({30, kept["step"]})  # --run.keep last, and the selected
    assert chosen_checkpoint(folder, "selected") == path and op.load(folder, which="selected").updates == kept["step"]
    # no update has seen the held-out episodes, and the command of offline evaluation takes the same ones
    toy_replay((6,) * 60).save(tmp_path / "data")
    main(
        [str(folder), "--which", "selected", "--data", str(tmp_path / "data"), "--updates", "10", "--hidden_dims", "8"]
    )
    told = capsys.readouterr().out
    assert "Training has held these episodes out too" in told and "of 6 episodes held out of the 60" in told
    main([str(folder), "--data", str(tmp_path / "data"), "--updates", "10", "--hidden_dims", "8", "--holdout", "0.5"])
    assert "were trained on these episodes" in capsys.readouterr().out  # on those that it did not hold out
    # a run that goes on keeps the choice until it has another; a finished one that owes it makes it
    again = op.fit(method("TD3BC"), toy_replay((6,) * 60), max_steps=40, ckpt_path=folder, **QUICK, select="fqe")
    assert json.loads((folder / "selected.json").read_text())["updates"] == 40 and again.selected is not None
    (folder / "selected.json").unlink()
    late = op.fit(method("TD3BC"), toy_replay((6,) * 60), max_steps=40, ckpt_path=folder, **QUICK, select="fqe")
    assert late.selected == chosen_checkpoint(folder, "selected")
    with pytest.raises(UsageError, match=r"held out 0.1 of the episodes, and it is 0 now.*--data.holdout 0.1"):
        op.fit(method("TD3BC"), toy_replay((6,) * 60), max_steps=50, ckpt_path=folder, **QUICK)
    data = op.load_data(toy_replay((6,) * 60))
    data.holdout, _ = 0.1, capsys.readouterr()
    op.fit(method("TD3BC"), data, max_steps=50, ckpt_path=folder, **QUICK)
    assert "held out  6 of 60" in capsys.readouterr().out and json.loads((folder / "selected.json").read_text())


def test_a_selection_made_late_keeps_the_best(tmp_path: Path) -> None:
    options = QUICK | {"select": "fqe", "eval_every": 10, "eval_episodes": 1, "verbose": False}
    made("TD3BC", tmp_path, 20, **options)
    best = tmp_path / "checkpoints" / "best"
    before = os.readlink(best)
    (tmp_path / "selected.json").unlink()
    op.fit(method("TD3BC"), toy_replay((6,) * 60), max_steps=20, ckpt_path=tmp_path, **options)
    assert os.readlink(best) == before and best.exists()


def test_an_error_chooses_among_copies_of_actions(tmp_path: Path) -> None:
    made("BC", tmp_path / "run", select="loss")
    kept = json.loads((tmp_path / "run" / "selected.json").read_text())
    assert kept["value"] == min(one["value"] for one in kept["candidates"]) and kept["doubt"] == ""
    _, held_out = toy_replay((6,) * 60).split(0.1)
    policy = op.load(tmp_path / "run", which="selected")
    by_hand = np.square(
        (policy.act(held_out.steps["obs"][held_out.rows]) - held_out.steps["action"][held_out.rows]) / 2
    )
    assert kept["value"] == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert action_error(policy, held_out) == pytest.approx(kept["value"], rel=1e-6)


def test_work_of_the_first_process_waits_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def judge(policies: Any, paths: Any, *_: Any) -> list[selecting.Candidate]:
        seen.append(processes.world_size())
        return [selecting.Candidate(path.name, 1, 1.0) for path in paths]

    monkeypatch.setattr(selecting, "by_fitted_q", judge)
    policy = method("TD3BC").prepare(toy_replay())
    policy.run.select = "fqe"
    policy.save(tmp_path / "checkpoints" / "step=00000001.ckpt")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    select_checkpoint(policy, op.load_data(toy_replay()), selecting.RunFolder(tmp_path), 1)
    assert seen == [1] and processes.world_size() == 2


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("TD3BC", {"select": "score"}, "run.select.*expected one of none, fqe, loss"),
        ("TD3BC", {"select": "loss"}, "TD3BC does not copy the actions"),
        ("HIQL", {"select": "fqe"}, "HIQL acts by more than the observation"),
        ("TD3BC", {"select": "fqe", "seeds": "0..1"}, "several seeds"),
        ("BC", {"select": "loss", "episodes": 20}, "of 20 episodes none are held out.*--data.holdout"),
        ("TD3BC", {"select": "fqe", "select_updates": 2}, "select_updates"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        made(name, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_held_out_numbers_need_no_other_choice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="FQE is judged by held-out numbers already"):
        op.fit(op.FQE(), toy_replay(), max_steps=10, folder=tmp_path / "run", select="fqe")
