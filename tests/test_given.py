"""Options in whatever clothes they come: NumPy numbers, whole floats, seeds, tildes, empty values, odd names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import run_python
from toy import differences, toy_replay, weights

import offpolicy as op
from offpolicy import evaluate, export, fit, sample
from offpolicy.cli.arguments import read_command, read_settings
from offpolicy.cli.parser import parse
from offpolicy.data import __main__ as data_command
from offpolicy.data.names import resolve
from offpolicy.errors import DataError, UsageError
from offpolicy.files import Table

SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 16}
SHORT: dict[str, Any] = {"max_steps": 4, "eval_every": 0, "eval_episodes": 0, "verbose": False}
QUICK = ["--model", "BC", "--model.hidden_dims", "[8,8]", "--model.batch_size", "16", "--trainer.max_steps", "4"]
QUICK += ["--run.eval_every", "2", "--run.eval_episodes", "0", "--run.log_every", "1"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    yield home
    assert not Path("~").exists()


def arrays(seed: int = 0, n: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = {"obs": rng.normal(size=(n, 3)), "action": rng.uniform(-1, 1, (n, 1)), "reward": rng.normal(size=n)}
    return {**columns, "terminated": np.zeros(n, bool), "episode_end": np.arange(n) % 20 == 19}


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_whole_floats_are_taken() -> None:
    plain = op.fit(op.TD3BC(alpha=2.5, policy_freq=2, **SMALL), toy_replay(), seed=3, **SHORT)
    method = op.TD3BC(
        alpha=np.float32(2.5), policy_freq=2.0, batch_size=np.int64(16), hidden_dims=[np.int64(8), np.int32(8)]
    )
    options = {"max_steps": np.int64(4), "eval_every": 0.0, "eval_episodes": np.uint8(0), "verbose": False}
    dressed = op.fit(method, toy_replay(), seed=np.int64(3), log_every=1e3, devices=np.int64(1), **options)
    assert not differences(weights(plain.method), weights(dressed.method))
    kinds = {name: type(method.hparams[name]) for name in ("alpha", "policy_freq", "batch_size")}
    assert kinds == {"alpha": float, "policy_freq": int, "batch_size": int}
    assert [type(width) for width in method.hparams.hidden_dims] == [int, int]
    assert type(method.run.log_every) is int and dressed.folder.name == "seed3-2"
    assert op.fit(op.BC(**SMALL), toy_replay(), seed=torch.tensor(3), **SHORT | {"max_steps": 4.0}).updates == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 4.5}, "`trainer.max_steps` is 4.5; expected a whole number"),
        ({"max_steps": "4"}, "expected a whole number"),
        ({"max_steps": 0}, "at least 1"),
        ({"seed": -1}, "`seed` is -1; expected a whole number in"),
        ({"seed": 2**63}, "`seed` is 9223372036854775808"),
        ({"seed": 1.5}, "expected a whole number"),
        ({"seed": [1, 2]}, "Did you mean `seeds`"),
        ({"seed": True}, "expected a whole number"),
        ({"eval_every": 2.5}, "`run.eval_every` is 2.5; expected a whole number"),
        ({"block": np.float64(0.5)}, "expected a whole number"),
        ({"log_every": "often"}, "expected a whole number"),
    ],
)
def test_what_is_no_whole_number_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        op.fit(op.BC(**SMALL), toy_replay(), **SHORT | options)
    assert not Path("runs").exists()


@pytest.mark.parametrize("seed", [2**32, 2**32 + 1, 2**63 - 1])
def test_large_seeds_are_seeds_of_their_own(seed: int) -> None:
    result = op.fit(op.BC(**SMALL), toy_replay(), seed=seed, **SHORT)
    assert result.folder.name == f"seed{seed}-1"
    small = op.fit(op.BC(**SMALL), toy_replay(), seed=seed % 2**32, **SHORT)
    assert differences(weights(result.method), weights(small.method))
    toy_replay().save("toy")
    made = parse(read_command(["--data", "toy", "--seed", str(seed)]))
    assert made.config.seed_everything == seed


def test_seeds_on_the_command_line() -> None:
    for text in ("-1", "1.5", "true", str(2**63)):
        with pytest.raises(UsageError, match="seed_everything"):
            parse(read_command(["--seed", text]))
    assert parse(read_command(["--seed", "1e3"])).config.seed_everything == 1000


def test_seeds_of_evaluations() -> None:
    folder = op.fit(op.BC(**SMALL), toy_replay(), **SHORT).folder
    for options in ({"seed": -5}, {"seed": 1.5}, {"episodes": 0}, {"episodes": 1.5}, {"num_envs": 0}):
        with pytest.raises(UsageError):
            op.evaluate(folder, **{"episodes": 1, **options})
    found = op.evaluate(folder, episodes=np.int64(1), seed=np.int64(2**32), num_envs=1.0)
    assert len(found["returns"]) == 1


def test_whole_numbers_on_the_command_line() -> None:
    made = parse(read_command(["--trainer.max_steps", "4.0", "--run.eval_every=1e3", "--model.batch_size", "1.6e1"]))
    assert made.config.trainer.max_steps == 4 and made.config_init.run.eval_every == 1000
    assert made.model.hparams.batch_size == 16
    with pytest.raises(UsageError, match=r"max_steps is '4\.5'; expected int"):
        parse(read_command(["--trainer.max_steps", "4.5"]))


# -- names that look like something else -------------------------------------------------------------------------------

NAMES = ["1e3", "null", "true", "1_000", "007", "2024-01-01", "4.0", "#x", "[a]", "a: b", "Null", "1e400"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(name: str) -> None:
    made = parse(read_command([f"--folder={name}", f"--root={name}", f"--ckpt_path={name}"]))
    assert (made.config.folder, made.config.root, made.config.ckpt_path) == (name,) * 3


@pytest.mark.parametrize("name", ["1e3", "true", "1_000", "007", "2024-01-01", "4.0"])
def test_a_file_of_settings_may_name_any_folder(name: str) -> None:
    toy_replay().save(name)
    Path("mine.yaml").write_text(f"data: {name}\nroot: {name}\nfolder: {name}\n")
    made = parse(read_command(["--config", "mine.yaml"]))
    assert made.datamodule.name == name and made.config.root == name
    assert made.config.folder == name
    Path("nested.yaml").write_text(f"data:\n  name: {name}\n")
    assert parse(read_command(["--config", "nested.yaml"])).datamodule.name == name


def test_a_run_in_a_folder_like_a_number() -> None:
    toy_replay().save("1e3")
    assert fit.main(["--data", "1e3", *QUICK, "--folder", "2e3"]) == 0
    assert Path("2e3", "evals.csv").parent.is_dir() and not Path("2000").exists()
    assert fit.main(["--ckpt_path", "2e3", "--trainer.max_steps", "6"]) == 0
    assert [row["step"] for row in Table("2e3/metrics.csv").rows()] == [1, 2, 3, 4, 5, 6]


def test_dates_in_settings_do_not_crash() -> None:
    Path("dates.yaml").write_text("trainer: {max_steps: 2024-01-01}\n")
    with pytest.raises(UsageError, match="max_steps is '2024-01-01'; expected int"):
        parse(read_command(["--config", "dates.yaml"]))
    assert read_settings("dates.yaml") == {"trainer.max_steps": "2024-01-01"}


# -- empty values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data", "folder", "model", "ckpt_path", "config", "root", "recipe", "model.alpha"])
@pytest.mark.parametrize("form", ["equals", "word", "blank"])
def test_empty_options_are_refused(name: str, form: str) -> None:
    argv = {"equals": [f"--{name}="], "word": [f"--{name}", ""], "blank": [f"--{name}=  "]}[form]
    with pytest.raises(UsageError, match=f"--{name} has no value"):
        fit.main([*QUICK, *argv])
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (evaluate.main, [""]),
        (evaluate.main, ["run", "--seed="]),
        (sample.main, ["run", ""]),
        (sample.main, ["run", "out", "--policy="]),
        (export.main, ["run", ""]),
        (op.generate.main if hasattr(op, "generate") else evaluate.main, ["run", "--data="]),
    ],
)
def test_empty_words_are_refused_by_every_command(main: Any, argv: list[str]) -> None:
    with pytest.raises(UsageError, match=r"has no value|is empty"):
        main(argv)


@pytest.mark.parametrize("argv", [["show", ""], ["convert", "toy", ""], ["make", "pendulum-stitch-v0", "--out="]])
def test_empty_words_are_refused_by_the_data_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command.main(argv) == 2
    assert "expected a value" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"folder": ""}, {"root": " "}, {"ckpt_path": ""}])
def test_empty_paths_are_refused_in_python(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is empty; expected a path"):
        op.fit(op.BC(**SMALL), toy_replay(), **SHORT, **options)
    for call in (lambda: op.load(""), lambda: op.load_data(""), lambda: op.evaluate("")):
        with pytest.raises(UsageError, match="is empty"):
            call()
    Path("empty.yaml").write_text("data: ''\n")
    with pytest.raises(UsageError, match="empty text"):
        read_command(["--config", "empty.yaml"])


# -- tildes ------------------------------------------------------------------------------------------------------------


def test_tildes_are_the_home_folder(in_folder: Path) -> None:
    np.savez(in_folder / "x.npz", **arrays())
    (in_folder / "my.yaml").write_text("data: ~/x.npz\nroot: ~/roots\n")
    assert fit.main(["--data=~/x.npz", *QUICK, "--folder=~/r"]) == 0
    assert (in_folder / "r" / "checkpoints").is_dir()
    assert fit.main(["--data=~/x.npz", *QUICK, "--ckpt_path=~/r", "--trainer.max_steps", "6"]) == 0
    assert fit.main([*QUICK, "--config", "~/my.yaml"]) == 0
    assert len(list(in_folder.glob("roots/x/BC/seed0-1"))) == 1
    result = op.fit(op.BC(**SMALL), "~/x.npz", root="~/roots", **SHORT)
    assert result.folder == in_folder / "roots/x/BC/seed0-2"
    again = op.fit(op.BC(**SMALL), "~/x.npz", root="~/roots", ckpt_path="last", **SHORT | {"max_steps": 6})
    assert again.folder == result.folder and op.load("~/r").sizes is not None
    assert data_command.main(["convert", "~/x.npz", "~/out"]) == 0
    assert (in_folder / "out" / "meta.json").is_file()
    method = op.DPO(policy="~/model", ref_cache="~/cache")
    assert method.hparams.policy == str(in_folder / "model") and method.hparams.ref_cache == str(in_folder / "cache")


def test_the_home_of_nobody_is_a_name() -> None:
    with pytest.raises(UsageError, match="~nobody-of-that-name"):
        resolve("~nobody-of-that-name/x.npz")


def test_tildes_in_variables_of_data_folders(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", "~/sets")
    toy_replay().save(in_folder / "sets" / "mine")
    assert resolve("mine").path == in_folder / "sets" / "mine"


# -- continuing --------------------------------------------------------------------------------------------------------


def test_last_is_the_last_run_on_these_data() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        np.savez(f"{name}/x.npz", **arrays(seed=ord(name)))
    first = op.fit(op.BC(**SMALL), "a/x.npz", **SHORT)
    second = op.fit(op.BC(**SMALL), "b/x.npz", **SHORT)
    assert first.folder.parent == second.folder.parent
    more = {**SHORT, "max_steps": 6}
    assert op.fit(op.BC(**SMALL), "a/x.npz", ckpt_path="last", **more).folder == first.folder
    assert op.fit(op.BC(**SMALL), "b/x.npz", ckpt_path="last", **more).folder == second.folder
    np.savez("x.npz", **arrays(seed=5))
    with pytest.raises(DataError, match="trained on other data"):
        op.fit(op.BC(**SMALL), "x.npz", ckpt_path="last", **{**SHORT, "max_steps": 8})


@pytest.mark.parametrize("way", ["python", "command"])
def test_a_checkpoint_goes_on_in_a_new_folder(way: str) -> None:
    toy_replay().save("toy")
    assert fit.main(["--data", "toy", *QUICK, "--folder", "old"]) == 0
    if way == "python":
        options = {**SHORT, "max_steps": 6, "log_every": 1}
        op.fit(op.BC(**SMALL), "toy", ckpt_path="old/checkpoints/step=00000002.ckpt", folder="deep/new", **options)
        folder = Path("deep/new")
    else:
        argv = ["--ckpt_path", "old/checkpoints/step=00000002.ckpt", "--folder", "new", "--trainer.max_steps", "6"]
        assert fit.main(argv) == 0
        folder = Path("new")
    assert [row["step"] for row in Table(folder / "metrics.csv").rows()] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in Table("old/metrics.csv").rows()] == [1, 2, 3, 4]
    whole = op.fit(op.BC(**SMALL), "toy", folder="whole", **{**SHORT, "max_steps": 6})
    assert not differences(weights(whole.method), weights(op.load(folder)))
    with pytest.raises(UsageError, match="holds another run than"):
        fit.main(["--ckpt_path", "old", "--folder", "whole", "--trainer.max_steps", "8"])


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["16-true", "16-mixed", 16, "16", torch.float16, np.int64(16)])
def test_float16_is_refused(precision: Any) -> None:
    with pytest.raises(UsageError, match="bf16-mixed"):
        op.fit(op.BC(**SMALL), toy_replay(), precision=precision, **SHORT)
    assert not list(Path().glob("runs/*"))


def test_float16_by_a_plugin_is_refused() -> None:
    from lightning.pytorch.plugins import HalfPrecision

    with pytest.raises(UsageError, match="bf16-mixed"):
        op.fit(op.BC(**SMALL), toy_replay(), plugins=[HalfPrecision("16-true")], **SHORT)


def test_a_logger_without_its_package_is_one_sentence() -> None:
    toy_replay().save("toy")
    wrong = [["--trainer.logger", "tensorboard"], ["--trainer.logger", "MLFlowLogger"]]
    for argv, part in zip(wrong, ("needs a package that is not installed", "mlflow")):
        if part == "mlflow" and __import__("importlib.util").util.find_spec("mlflow"):
            continue
        with pytest.raises(UsageError, match=part) as caught:
            fit.main(["--data", "toy", *QUICK, *argv])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_read_only_run_is_evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the user may write anywhere, as root may: the folder's place is taken by a failing write."""
    from offpolicy import files

    folder = op.fit(op.BC(**SMALL), toy_replay(), **SHORT).folder

    def refuse(path: Path, content: Any) -> None:
        raise files.WriteError.of(OSError(30, "Read-only file system"), Path(path))

    monkeypatch.setattr(files, "atomic_write", refuse)
    assert evaluate.main([str(folder), "--episodes", "1"]) == 0
    shown = capsys.readouterr()
    assert "return" in shown.out and "Read-only file system" in shown.err and "file" not in shown.out.split("return")[1]


def test_options_are_read_without_numpy() -> None:
    code = "import sys, offpolicy.given; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0
