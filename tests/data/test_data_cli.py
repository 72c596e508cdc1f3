"""``python -m offpolicy.data``: what it prints, its exit codes, and that nothing is left half-written."""

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import FIXTURES, run_python

from offpolicy.data.__main__ import main
from offpolicy.data.sources import make, open_source


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own, where the made set has four episodes."""
    for variable in ("OFFPOLICY_DATA_DIR", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH", "OGBENCH_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    full = make.facts
    monkeypatch.setattr(make, "facts", lambda name: {**full(name), "recipe": {**full(name)["recipe"], "episodes": 4}})
    shutil.copy(FIXTURES / "d4rl_pendulum_mixed.hdf5", tmp_path / "walks.hdf5")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_make(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "make", "Pendulum_Stitch-v0")
    assert code == 0 and "800 in 4 episodes" in out and str(folder / "data" / "pendulum-stitch-v0-") in out


def test_make_into_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "make", "pendulum-stitch-v0", "--out", "here")
    assert code == 0 and "here" in out
    assert open_source(folder / "here").num_steps == 800 and not (folder / "data").exists()
    code, _, err = run(capsys, "make", "pendulum-stitch-v0", "--out", "here")
    assert code == 2 and "here exists; expected a new folder" in err


def test_make_check(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "make", "pendulum-stitch-v0", "--check")
    assert code == 0 and "random       return -1180.1 ±" in out and "competent" in out


def test_show_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", "walks.hdf5")
    assert code == 0
    for words in ("walks: detected format: a file in the layout of D4RL", "8,000 in 40 episodes",
                  "0 terminated, 40 truncated", "fingerprint", "obs float32 (8000, 3)"):  # fmt: skip
        assert words in out


def test_show_without_a_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show")
    assert code == 0 and "hopper-medium-v2\n" in out and out.startswith("pendulum-stitch-v0\n")


@pytest.mark.parametrize(
    "source", ["walks.hdf5", str(FIXTURES / "ogbench_pointmaze_small-v0.npz"), "pendulum-stitch-v0"]
)
def test_convert_to_a_folder_is_bit_equal(folder: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    if source.endswith(".npz"):
        source = str(shutil.copy(source, folder / "maze.npz"))
    code, out, _ = run(capsys, "convert", source, "copy")
    assert code == 0 and "wrote" in out and "to copy" in out
    assert open_source("copy").fingerprint() == open_source(source).fingerprint()
    assert run(capsys, "show", "copy")[0] == 0


def test_convert_to_d4rl_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", "pendulum-stitch-v0", "out/a.hdf5")[0] == 0
    assert run(capsys, "convert", "out/a.hdf5", "back")[0] == 0
    first, back = open_source("pendulum-stitch-v0"), open_source("back")
    for name in ("obs", "action", "reward", "terminated"):
        np.testing.assert_array_equal(back.steps[name], first.steps[name])
    np.testing.assert_array_equal(back.next_obs(back.rows), first.next_obs(first.rows))
    for key in ("name", "env_id", "ref_min_score", "recipe", "action_low"):
        assert back.meta[key] == first.meta[key]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "required: make|show|convert"),
        (["mak", "x"], 2, "'mak' is no command; expected make, show, convert, compare. Did you mean 'make'?"),
        (["show", "hoper-medium-v2"], 2, "Did you mean 'hopper-medium-v2'?"),
        (["show", "walks.hdf5", "--fast"], 2, "unrecognized arguments: --fast"),
        (["make", "hopper-medium-v2"], 2, "Only made sets can be made: pendulum-stitch-v0"),
        (["convert", "walks.hdf5", "walks.hdf5"], 2, "walks.hdf5 exists; expected a new name"),
        (["convert", "walks.hdf5", "out.csv"], 2, "has the type '.csv'; expected a folder"),
        (["convert", "walks.hdf5", "out", "--timeout-step", "x"], 2, "expected one of drop, keep, self"),
        (["show", "hopper-medium-v2", "--no-download"], 3, "does not exist and downloading is off"),
        (["show", "broken.hdf5"], 3, "looks like a web page"),
        (["convert", "walks.hdf5", "walks.hdf5/inside"], 3, "nothing was left half-written"),
        (["convert", "walks.hdf5", "/proc/none/inside"], 3, "Choose a folder you may read and write"),
    ],
)
def test_mistakes_are_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    (folder / "broken.hdf5").write_text("<html>")
    before = sorted(p.name for p in folder.iterdir())
    found, _, err = run(capsys, *arguments)
    assert found == code and words in err and err.count("\n") == 1 and "Traceback" not in err
    after = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock.json"))
    assert after == before


def test_content_faults_at_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "observations": rng.random((20, 2)),
        "actions": rng.random((20, 1)),
        "rewards": rng.random(20),
    }
    columns["rewards"][7] = np.nan
    np.savez(folder / "a.npz", terminals=np.arange(20) % 5 == 4, **columns)
    code, _, err = run(capsys, "convert", "a.npz", "b")
    assert code == 3 and "first: row 7, episode 1" in err and not (folder / "b").exists()
    assert run(capsys, "convert", "a.npz", "b", "--on-bad", "drop_episode")[0] == 0
    assert open_source("b").num_episodes == 3


@pytest.mark.parametrize("out", ["copy", "copy.hdf5"])
def test_a_full_disk_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle with an OSError."""
    open_source("walks.hdf5")  # the record of the hash is written before the limit
    before = sorted(p.name for p in folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        code, _, err = run(capsys, "convert", "walks.hdf5", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 3 and "Free some space" in err and "nothing was left half-written" in err and err.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_module_runs(folder: Path) -> None:
    result = run_python("-m", "offpolicy.data", "show", "hoper-medium-v2")
    assert result.returncode == 2 and result.stderr.startswith("Error: no data set is called")
