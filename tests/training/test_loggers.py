"""Loggers by short name: where they write, and that one that fails is a warning."""

from __future__ import annotations

import importlib.util
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger
from made_data import walks

import offpolicy as op
from offpolicy.cli.arguments import read_command
from offpolicy.cli.parser import parse, run_command
from offpolicy.errors import UsageError
from offpolicy.training import loggers
from offpolicy.training.loggers import made_loggers, short_names

SMALL = {"max_steps": 4, "log_every": 2, "eval_every": 4, "verbose": False, "enable_progress_bar": False}


class Broken(Logger):
    """A logger whose server is gone."""

    @property
    def name(self) -> str:
        raise ConnectionError("no network")

    @property
    def version(self) -> str:
        return "1"

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        raise ConnectionError("no network")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")


def fit(folder: Path, logger: Any) -> None:
    data = op.load_data(walks(64))
    op.fit(op.BC(hidden_dims=(4,), batch_size=4), data, folder=folder, logger=logger, **SMALL)


def test_rows_of_a_run_in_python(tmp_path: Path) -> None:
    fit(tmp_path / "run", "csv")
    lines = (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/actor_loss" in lines[0] and len(lines) == 3  # updates 2 and 4
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["logger"] == "csv"


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed here")
def test_tensorboard(tmp_path: Path) -> None:
    fit(tmp_path / "run", ["csv", "tensorboard"])
    assert list((tmp_path / "run" / "tensorboard").glob("events*")) and (tmp_path / "run" / "csv").is_dir()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed here")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fit(tmp_path / "run", "mlflow")
    rows = sqlite3.connect(tmp_path / "run" / "mlflow.db").execute("select key, step from metrics").fetchall()
    assert {("train/actor_loss", 2), ("train/actor_loss", 4)} <= set(rows)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed here")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tmp_path / "run", "wandb")
    importlib.import_module("wandb").finish()  # writes what it still holds
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"train/actor_loss" in file.read_bytes()


def test_a_logger_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path) -> Logger:
        raise ConnectionError("no network")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda folder: Broken())
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", refused)  # one that cannot even be made
    with caplog.at_level(logging.WARNING):
        fit(tmp_path / "run", "wandb,mlflow")
    for name in ("wandb", "mlflow"):
        said = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert len(said) == 1 and "goes on without it: ConnectionError: no network" in said[0]


def test_absent_packages_and_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(folder: Path) -> Logger:
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", absent)
    with pytest.raises(UsageError, match=r"No module named 'wandb'.*\.\[logging\]"):
        made_loggers(["wandb"], tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        fit(tmp_path / "run", "tensorbord")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("csv", ["csv"]),
        ("CSV, wandb", ["csv", "wandb"]),
        ("[csv]", ["csv"]),
        (["csv"], ["csv"]),
        (True, None),
        (False, None),
        ([Broken()], None),
    ],
)
def test_short_names(given: Any, names: list[str] | None) -> None:
    assert short_names(given) == names


def test_the_command_line_keeps_it_for_going_on(tmp_path: Path) -> None:
    words = ["--model", "BC", "--data", "pendulum-stitch-v0", "--trainer.max_steps", "4", "--run.eval_episodes", "0"]
    words += ["--run.log_every", "2", "--folder", str(tmp_path / "run"), "--trainer.enable_progress_bar", "false"]
    assert run_command(read_command([*words, "--trainer.logger", "csv"])) == 0
    assert (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").exists()
    again = ["--ckpt_path", str(tmp_path / "run"), "--trainer.max_steps", "8"]
    assert parse(read_command(again)).loggers == "csv" and run_command(read_command(again)) == 0
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        parse(read_command([*words, "--trainer.logger", "tensorbord"]))
