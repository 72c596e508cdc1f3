"""One log for all that write down or show a run, and the numbers that judge an evaluation named once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from toy import fit, method, toy_replay

import offpolicy as op
from offpolicy.training import curves, headlines, screen
from offpolicy.training.bar import UpdateBar, short
from offpolicy.training.headlines import HEADLINES, SHOWN, headline
from offpolicy.training.run_log import RunLog


class Order(Callback):
    """Notes the callbacks as they are called in training."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.names = [type(one).__name__ for one in trainer.callbacks]  # type: ignore[attr-defined]


def test_callbacks_are_called_in_the_order_that_the_log_tells(tmp_path: Path, capsys: Any) -> None:
    """The bar shows an evaluation that was just made, and files hold what all others found."""
    order = Order()
    result = op.fit(method("BC"), toy_replay(), max_steps=4, eval_every=2, folder=tmp_path / "run", callbacks=[order])
    assert order.names[0] == "Order"
    assert order.names[-5:] == ["Divergence", "Evaluation", "Interruption", "UpdateBar", "RunFolder"]
    lines = re.findall(r"^(\d)/4 .*return_mean (\S+)", capsys.readouterr().err, re.M)
    rows = result.method.run_log.evaluation
    assert [line[0] for line in lines] == ["2", "4"] and float(lines[1][1]) == pytest.approx(
        rows["eval/return_mean"], rel=1e-3
    )


def test_the_documented_attributes_read_the_log(tmp_path: Path) -> None:
    module = method("BC")
    own = module.run_log
    fit(module, toy_replay(), 20, tmp_path)  # a plain Trainer: the method's own log
    assert module.run_log is own and module.metric_row is own.metrics and module.eval_row is own.evaluation
    assert module.metric_row["step"] == 20 and module.interrupted_by == own.interrupted_by == 0
    again = op.fit(module, toy_replay(), max_steps=4, folder=tmp_path / "run", verbose=False)
    assert again.method.run_log is not own and own.metrics["step"] == 20  # fit makes a new one
    assert again.scores == again.method.run_log.scores() and again.method.run_log.bar is None


class Crash(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise ZeroDivisionError


def test_the_files_of_a_fit_that_failed_are_not_written_by_the_next(tmp_path: Path) -> None:
    module = method("BC")
    with pytest.raises(ZeroDivisionError):
        fit(module, toy_replay(), 10, tmp_path / "first", callbacks=[Crash()])
    fit(module, toy_replay(), 10)
    assert module.run_log.files is None and not list((tmp_path / "first").rglob("*.ckpt"))


def test_a_new_headline_is_named_in_one_place() -> None:
    """Bar, best, curves and last line take it from there."""
    assert tuple(one.name for one in SHOWN) == UpdateBar.NAMES
    assert [judge for judge in curves.JUDGES if judge != "loss"] == [n.name.removeprefix("eval/") for n in HEADLINES]
    for one in HEADLINES:
        assert headline({one.name: 1.0, "eval/loss": 2.0}) == one.name
        assert screen.scores_line({one.name.removeprefix("eval/"): 1.0}).startswith(f"{one.words}: last 1")
    assert headline({"eval/loss": 1.0}) is None and headlines.scores_line({"loss": 1.0}) == "held-out loss: 1"


def test_names_on_the_bar_tell_metrics_apart() -> None:
    told = [short(name) for name in UpdateBar.NAMES]
    assert len(set(told)) == len(told) and "order_consistency (high)" in told


def test_rows_of_an_update() -> None:
    log = RunLog(metrics={"step": 3, "train/loss": 1.0}, evaluation={"step": 2, "eval/score": 5.0, "env": "x"})
    assert log.metrics_at(3) and not log.metrics_at(2) and log.evaluation_at(2) and not log.evaluation_at(3)
    assert log.scores() == {"score": 5.0} and not log.failed
    log.evaluation = {"step": 4, "error": "broken"}
    assert log.failed and log.scores() == {}
