"""Which checkpoints a run writes and keeps, when it is evaluated by itself, and a last checkpoint of weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import method, toy_replay

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.language.module import LanguageModule
from offpolicy.training.checkpoints import read_checkpoint
from offpolicy.training.keeping import Keeping
from offpolicy.training.measurement import Measurement
from offpolicy.training.module import Module

NAMES = [f"step={n:08d}.ckpt" for n in (5, 10, 15, 20, 25)]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (2, (10, 20, 25)),
        ("1", (10, 25)),
        ("best", (10, 25)),
        ("last", (25,)),
        ("all", (5, 10, 15, 20, 25)),
        ("every:15", (10, 15, 25)),
        (9, (5, 10, 15, 20, 25)),
    ],
)
def test_which_stay(keep: int | str, kept: tuple[int, ...]) -> None:
    assert Keeping.of(keep).kept(NAMES, "step=00000010.ckpt") == {f"step={n:08d}.ckpt" for n in kept}
    assert Keeping.of(keep).kept(NAMES, "step=00000012.ckpt") <= set(NAMES)  # a best one that is gone


@pytest.mark.parametrize("keep", ["worst", 0, "every:0", "every:", -1, ""])
def test_what_cannot_be_kept(keep: int | str) -> None:
    with pytest.raises(UsageError, match=r"`run.keep` is .*expected 'best', 'last', 'all', 'every:N'"):
        op.RunOptions(keep=keep)


@pytest.mark.parametrize(
    ("cls", "total", "every"),
    [
        (Module, 100, 200), (Module, 3000, 600), (Module, 1_000_000, 5000), (Module, -1, 5000),
        (LanguageModule, 7, 10), (LanguageModule, 1000, 100), (LanguageModule, 90_000, 500),
    ],
)  # fmt: skip
def test_evaluations_fit_the_length_of_a_run(cls: type[Module], total: int, every: int) -> None:
    assert cls.evaluations.every(total) == every


class Scores(Measurement):
    """An evaluation with numbers that are given."""

    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores = scores

    def measure(self, pl_module: Any) -> dict[str, float]:
        return {"score": next(self.scores)}


def run(folder: Path, scores: list[float], monkeypatch: pytest.MonkeyPatch, updates: int = 40, **options: Any) -> Any:
    """A run whose evaluations have these scores."""
    module, left = method("BC"), iter(scores)
    monkeypatch.setattr(type(module), "measurement", lambda self: Scores(left))
    start = {"ckpt_path": folder} if (folder / "checkpoints").exists() else {"folder": folder}
    settings = {"verbose": False, "log_every": 1000, "eval_every": 10, "block": 7} | options
    return op.fit(module, toy_replay(), max_steps=updates, **start, **settings)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("checkpoints/step=*.ckpt"))


def test_checkpoints_apart_from_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 25 updates, at the last, and where an evaluation is the best so far (after 10 and 20 updates)."""
    folder = tmp_path / "run"
    run(folder, [1.0, 3.0, 2.0, 2.5], monkeypatch, save_every=25, keep="all")
    assert kept(folder) == [10, 20, 25, 40]
    assert op.load(folder / "checkpoints" / "best").updates == 20 == op.load(folder, which="best").updates
    assert [row["step"] for row in Table(folder / "evals.csv").rows()] == [10, 20, 30, 40]
    with pytest.raises(UsageError, match="division"), monkeypatch.context() as patch:
        patch.setattr(Scores, "measure", lambda *_: 1 / 0)
        run(tmp_path / "failed", [], patch, save_every=25)
    assert kept(tmp_path / "failed") == [10]  # as an evaluation that fails keeps its update


@pytest.mark.parametrize(("keep", "left"), [("last", [40]), ("best", [20, 40]), ("every:30", [20, 30, 40])])
def test_what_a_run_keeps(keep: str, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(folder, [1.0, 3.0, 2.0, 2.5], monkeypatch, keep=keep)
    assert kept(folder) == left
    assert (folder / "checkpoints" / "best").exists() == (keep != "last")
    if keep == "last":
        with pytest.raises(UsageError, match=r"no checkpoint of update 20; expected one of 40. --run.keep says"):
            op.load(folder, which="best")


def test_the_best_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", [1.0, 3.0, 2.0, 2.5], monkeypatch, verbose=True, enable_progress_bar=False)
    said = capsys.readouterr().out
    assert "  best      update 20 (3), checkpoints/step=00000020.ckpt" in said
    assert "  save      before each evaluation, kept: the newest 2 and the best" in said
    assert "  evaluate  every 10 updates" in said


def test_the_lowest_loss_is_the_best_where_nothing_else_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "measure", lambda self, _: {"loss": next(self.scores)})
    run(tmp_path / "run", [0.5, 0.2, 0.3, 0.4], monkeypatch, keep="best")
    assert kept(tmp_path / "run") == [20, 40] and op.load(tmp_path / "run" / "checkpoints" / "best").updates == 20


def test_a_run_that_goes_on_keeps_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(folder, [1.0, 2.0, 3.0, 4.0], monkeypatch, updates=8, eval_every=4)
    module = method("BC")
    again = op.fit(module, toy_replay(), max_steps=16, ckpt_path=folder, eval_episodes=0, verbose=False)
    assert again.method.run.eval_every is None and again.method.eval_every == 4
    assert read_checkpoint(folder / "checkpoints" / "step=00000012.ckpt")["global_step"] == 12


def test_a_last_checkpoint_of_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings: dict[str, Any] = {"verbose": True, "enable_progress_bar": False}
    result = run(folder, [1.0, 3.0, 2.0, 2.5], monkeypatch, final="weights_only", **settings)
    assert "the last holds weights alone, so that the run cannot go on from it" in capsys.readouterr().out
    run(whole, [1.0, 3.0, 2.0, 2.5], monkeypatch)
    small, large = ((place / "checkpoints" / "step=00000040.ckpt") for place in (folder, whole))
    assert small.stat().st_size < 0.7 * large.stat().st_size
    content = read_checkpoint(small)
    assert not {"optimizer_states", "lr_schedulers"} & set(content)
    for name, value in op.load(folder).state_dict().items():
        torch.testing.assert_close(value, result.method.state_dict()[name], rtol=0, atol=0)
    assert run(folder, [], monkeypatch).updates == 40  # nothing to do
    with pytest.raises(UsageError, match=r"holds weights alone.* Go on from .*step=00000030.ckpt"):
        run(folder, [], monkeypatch, updates=50)


def test_seeds_that_train_together(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings: dict[str, Any] = {"eval_every": 4, "eval_episodes": 1, "verbose": False, "folder": folder}
    made = op.TD3BC(hidden_dims=(8, 8), batch_size=16)
    op.fit(made, toy_replay(), max_steps=12, seeds=(0, 1), keep="last", final="weights_only", **settings)
    for place in (folder, folder / "seed0", folder / "seed1"):
        assert kept(place) == [12]
        assert "optimizer_states" not in read_checkpoint(place / "checkpoints" / "step=00000012.ckpt")
        assert op.load(place).updates == 12
