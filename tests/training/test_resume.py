"""Interrupted runs end where uninterrupted ones do, bit by bit. Copies of this process die in three ways (`SCENES`)."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Copy, run_copy
from toy import METHODS, Crash, differences, fit, method, run_files, toy_replay

from offpolicy.data.replay import Replay
from offpolicy.files import Table, is_stray
from offpolicy.training import archives as checkpoint_module
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint
from offpolicy.training.run_folder import RunFolder

HALF, LAST = 45, 90  # updates: checkpoints at both; rows of metrics at every 20
SHORT = {"log_every": 6, "eval_every": 14, "block": 16}  # of runs of 28 updates; longer ones show nothing more


@pytest.fixture(scope="module")
def whole(replay: Replay, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted TD3+BC run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    fit(method("TD3BC"), replay, LAST, folder)
    return run_files(folder, LAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_crash_and_resume_equals_an_uninterrupted_run(name: str, replay: Replay, tmp_path: Path) -> None:
    half, last = 14, 28
    one, two = tmp_path / "one", tmp_path / "two"
    fit(short(name), replay, last, one)
    with pytest.raises(ZeroDivisionError):
        fit(short(name), replay, last, two, callbacks=[Crash(18)])
    assert [row["step"] for row in Table(two / "metrics.csv").rows()] == [6, 12, 18]  # 18 lies beyond the checkpoint
    path = newest_checkpoint(two)
    assert path is not None and path.name == f"step={half:08d}.ckpt"
    loaded = torch.load(path, weights_only=True)  # plain types only, and no data needed
    assert loaded["global_step"] == loaded["offpolicy"]["updates"] == half

    resumed = short(name)
    resumed.seed = 1234  # whatever a new process starts with
    torch.manual_seed(99)
    fit(resumed, replay, last, two, ckpt_path=path)
    assert not differences(run_files(one, last), run_files(two, last))
    assert [row["step"] for row in Table(two / "metrics.csv").rows()] == [6, 12, 18, 24, last]
    assert [row["step"] for row in Table(two / "evals.csv").rows()] == [half, last]


def short(name: str) -> Any:
    module = method(name)
    module.run.log_every, module.run.eval_every, module.run.block = SHORT.values()
    return module


def test_going_on_after_the_end_equals_a_longer_run(replay: Replay, whole: dict[str, Any], tmp_path: Path) -> None:
    fit(method("TD3BC"), replay, HALF, tmp_path)
    fit(method("TD3BC"), replay, LAST, tmp_path, ckpt_path=newest_checkpoint(tmp_path))
    # at its end the short run wrote the row of updates 41 to 45, which the long one counts into its row of 41 to 60
    files = run_files(tmp_path, LAST)
    assert [row["step"] for row in files.pop("metrics")] == [20, 40, HALF, 60, 80, LAST]
    assert not differences(files, {k: v for k, v in whole.items() if k != "metrics"})


def test_going_back_sets_later_checkpoints_aside(replay: Replay, tmp_path: Path) -> None:
    """Continuing from an earlier checkpoint cuts the rows after it, so the later checkpoints must not be "last"."""
    fit(method("BC"), replay, LAST, tmp_path)
    fit(method("BC"), replay, HALF + 15, tmp_path, ckpt_path=tmp_path / "checkpoints" / f"step={HALF:08d}.ckpt")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step=00000060.ckpt"
    assert [row["step"] for row in Table(tmp_path / "metrics.csv").rows()] == [20, 40, 60]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.replaced")) == ["step=00000090.ckpt.replaced"]


def test_the_newest_two_checkpoints_and_the_best_stay(replay: Replay, drawn: None, tmp_path: Path) -> None:
    module = method("BC")
    module.run.eval_every = 10
    fit(module, replay, 60, tmp_path)
    state = read_checkpoint(tmp_path / "checkpoints" / "step=00000060.ckpt")["callbacks"]["RunFolder"]
    evals = Table(tmp_path / "evals.csv").rows()
    best = max(evals, key=lambda row: row["eval/return_mean"])
    assert state["best_path"] == f"step={best['step']:08d}.ckpt" and state["best_value"] == best["eval/return_mean"]
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"best", state["best_path"], "step=00000050.ckpt", "step=00000060.ckpt"}
    assert evals[-1]["eval/return_mean_best"] == best["eval/return_mean"]
    assert (tmp_path / "curves.png").stat().st_size > 1000


# -- death in three ways, each in a process of its own ---------------------------------------------------------------


def kill_in_training(module: Any) -> None:
    """kill -9 inside the block that ends at 80, after the row of update 60."""
    at_update(module, 77, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_in_writing(module: Any) -> None:
    """kill -9 when half of the second checkpoint is on the disk."""

    def save_half(content: Any, file: Any) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        whole = content["offpolicy"]["updates"] < LAST
        file.write(buffer.getvalue() if whole else buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        if not whole:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_module.torch = type("Torch", (), {**vars(torch), "save": staticmethod(save_half)})  # type: ignore[assignment]


def interrupt_in_a_block(module: Any) -> None:
    """Ctrl-C inside the block that ends at 80."""
    at_update(module, 77, lambda: os.kill(os.getpid(), signal.SIGINT))


SCENES = {f.__name__: f for f in (kill_in_training, kill_in_writing, interrupt_in_a_block)}


def at_update(module: Any, number: int, act: Any) -> None:
    update = type(module).update

    def updating(batch: Any, step: int) -> Any:
        if step == number:
            act()
        return update(module, batch, step)

    module.update = updating


def play(name: str, root: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    module = method("TD3BC")
    SCENES[name](module)
    fit(module, toy_replay(), LAST, root / name)
    (root / "end.json").write_text(json.dumps([module.interrupted_by, module.trainer.global_step]))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Copy]]:
    root = tmp_path_factory.mktemp("scenes")
    return root, {name: run_copy(partial(play, name, root)) for name in SCENES}


@pytest.mark.slow
@pytest.mark.xdist_group("scenes")
def test_how_the_scenes_ended(scenes: tuple[Path, dict[str, Copy]]) -> None:
    root, copies = scenes
    ends = {name: copy.returncode for name, copy in copies.items()}
    assert ends == {"kill_in_training": -9, "kill_in_writing": -9, "interrupt_in_a_block": 0}
    assert json.loads((root / "end.json").read_text()) == [signal.SIGINT, 80]
    steps = {name: [row["step"] for row in Table(root / name / "metrics.csv").rows()] for name in SCENES}
    assert steps == {
        "kill_in_training": [20, 40, 60],
        "kill_in_writing": [20, 40, 60, 80, 90],
        "interrupt_in_a_block": [20, 40, 60, 80],
    }
    strays = {name: sum(map(is_stray, (root / name / "checkpoints").iterdir())) for name in SCENES}
    assert strays == {"kill_in_training": 0, "kill_in_writing": 1, "interrupt_in_a_block": 0}


@pytest.mark.parametrize(
    ("scene", "update"), [("kill_in_training", HALF), ("kill_in_writing", HALF), ("interrupt_in_a_block", 80)]
)
@pytest.mark.slow
@pytest.mark.xdist_group("scenes")
def test_every_death_resumes_from_a_whole_checkpoint(
    scene: str, update: int, replay: Replay, whole: dict[str, Any], scenes: tuple[Path, dict[str, Copy]]
) -> None:
    folder = scenes[0] / scene
    path = newest_checkpoint(folder)
    assert path is not None and path.name == f"step={update:08d}.ckpt"
    earlier = {name: (folder / name).read_text().splitlines() for name in ("metrics.csv", "evals.csv")}
    fit(method("TD3BC"), replay, LAST, folder, ckpt_path=path)
    assert not differences(run_files(folder, LAST), whole)
    assert not any(map(is_stray, (folder / "checkpoints").iterdir()))
    for name, lines in earlier.items():
        kept = [line for line in lines[1:] if int(line.split(",")[0]) <= update]
        assert (folder / name).read_text().splitlines()[1 : 1 + len(kept)] == kept  # byte by byte


def test_interruption_without_a_run_folder_saves_too(replay: Replay, tmp_path: Path) -> None:
    module = method("BC")
    at_update(module, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    fit(module, replay, LAST, default_root_dir=str(tmp_path))
    assert module.interrupted_by == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    path = newest_checkpoint(tmp_path)
    assert path is not None and path.name == "step=00000040.ckpt"


def test_a_second_interruption_ends_at_once(replay: Replay, tmp_path: Path) -> None:
    module, before = method("BC"), signal.getsignal(signal.SIGINT)  # ignored where a shell started us in the background
    at_update(module, 30, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, replay, LAST, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))
    assert signal.getsignal(signal.SIGINT) == before


def test_a_sharded_checkpoint_is_set_aside_again(tmp_path: Path) -> None:
    """It is a folder, which the one of an earlier time must not stop."""
    for content in ("first", "second"):
        later = tmp_path / "checkpoints" / "step=00000006.ckpt"
        later.mkdir(parents=True)
        (later / "part").write_text(content)
        RunFolder(tmp_path).go_back(3)
    assert [path.name for path in later.parent.iterdir()] == ["step=00000006.ckpt.replaced"]
    assert (later.parent / "step=00000006.ckpt.replaced" / "part").read_text() == "second"
