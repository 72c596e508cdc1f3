"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_copy
from lightning.pytorch import Callback
from toy import differences, method, toy_replay

import offpolicy as op
from offpolicy.compute.torch_private import set_state_notes, state_notes
from offpolicy.errors import UsageError
from offpolicy.files import WriteError
from offpolicy.training import background, checkpoint_io
from offpolicy.training.background import Writing, bytes_of, copied, is_beside
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint, write_checkpoint


def train(folder: Path, updates: int = 40, **options: Any) -> Any:
    start = {"ckpt_path": folder} if (folder / "checkpoints").exists() else {"folder": folder}
    settings = {"log_every": 20, "eval_every": 10, "eval_episodes": 0, "block": 5, "verbose": False} | options
    return op.fit(method("TD3BC"), toy_replay(), max_steps=updates, **start, **settings)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("checkpoints/step=*.ckpt"))


class Slow:
    """Writes a checkpoint once it may; knows whether a second one was begun meanwhile."""

    def __init__(self) -> None:
        self.may, self.running, self.most = threading.Event(), 0, 0

    def __call__(self, content: Any, path: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.may.wait(20)
        write_checkpoint(content, path)
        self.running -= 1


class At(Callback):
    """Calls something once after an update."""

    def __init__(self, **calls: Any) -> None:
        self.calls = {int(name[1:]): call for name, call in calls.items()}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.calls.pop(trainer.global_step, lambda: None)()


def test_files_are_those_of_a_run_that_waits(tmp_path: Path) -> None:
    train(tmp_path / "waits", async_save=False, keep="all")
    train(tmp_path / "beside", async_save=True, keep="all")
    assert kept(tmp_path / "beside") == kept(tmp_path / "waits") == [10, 20, 30, 40]
    for step in (10, 40):
        first, second = (tmp_path / name / "checkpoints" / f"step={step:08d}.ckpt" for name in ("waits", "beside"))
        assert first.stat().st_size == second.stat().st_size
        assert not [d for d in differences(read_checkpoint(first), read_checkpoint(second)) if "perf" not in d]


def test_training_goes_on_and_nothing_is_removed_before_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, seen = Slow(), {}
    monkeypatch.setattr(checkpoint_io, "write_checkpoint", slow)

    def begun() -> None:
        seen[15] = kept(tmp_path / "run")
        slow.may.set()

    train(tmp_path / "run", callbacks=[At(_15=begun)], async_save=True, keep="last")
    assert seen == {15: []}  # update 15 was made while the file of update 10 was not there
    assert slow.most == 1 and kept(tmp_path / "run") == [40]


def test_an_error_in_writing_ends_the_run_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def fails(content: Any, path: Any) -> None:
        begun.append(content["global_step"])
        if content["global_step"] == 20:
            raise WriteError(28, f"Could not write {path}: No space left on device.")
        write_checkpoint(content, path)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", fails)
    with pytest.raises(WriteError, match="No space left"):
        train(tmp_path / "run", async_save=True)
    assert begun == [10, 20] and kept(tmp_path / "run") == [10]
    monkeypatch.undo()
    assert train(tmp_path / "run", async_save=True).updates == 40


def test_an_error_at_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(content: Any, path: Any) -> None:
        raise WriteError(28, "Could not write it: No space left on device.")

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", fails)
    with pytest.raises(WriteError, match="No space left"):
        train(tmp_path / "run", async_save=True, eval_every=0)


def test_a_kill_while_writing_leaves_a_whole_older_one(tmp_path: Path) -> None:
    def play() -> None:
        halves = {"left": 1}

        def half(content: Any, path: Any) -> None:
            if content["global_step"] == 20 and halves.pop("left", 0):
                Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp").write_bytes(b"PK")
                threading.Event().wait(20)
            write_checkpoint(content, path)

        checkpoint_io.write_checkpoint = half  # type: ignore[attr-defined]
        kill = At(_25=lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(tmp_path / "run", callbacks=[kill], async_save=True, keep="last")

    assert run_copy(play).returncode == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step=00000010.ckpt"
    train(tmp_path / "run", async_save=True, keep="last")
    train(tmp_path / "whole", keep="last")
    ours, theirs = (read_checkpoint(tmp_path / n / "checkpoints" / "step=00000040.ckpt") for n in ("run", "whole"))
    for part in ("state_dict", "optimizer_states"):
        assert not differences(ours[part], theirs[part])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_copies_are_of_their_own() -> None:
    x = torch.arange(6.0)
    state = OrderedDict(a=x, tied=x, part=x[2:4], left=[(1, x[::2])], text="t")
    set_state_notes(state, {"": {"version": 1}})
    made = copied({"state": state})["state"]
    x.zero_()
    assert made["a"].tolist() == [0, 1, 2, 3, 4, 5] and made["part"].tolist() == [2, 3]
    assert made["left"][0][1].tolist() == [0, 2, 4] and made["text"] == "t"
    assert made["tied"].data_ptr() == made["a"].data_ptr() and bytes_of(made) == bytes_of(state) == 24
    assert state_notes(made) == {"": {"version": 1}}


@pytest.mark.parametrize(("choice", "free", "beside"), [("auto", 10**12, True), ("auto", 3, False), (False, 9, False)])
def test_large_ones_that_fit_are_written_beside_training(choice, free: int, beside: bool) -> None:
    large = {"w": torch.empty(background.LEAST, dtype=torch.uint8)}
    assert is_beside(choice, large, lambda: free) == beside
    assert not is_beside("auto", {"w": torch.zeros(3)}, lambda: 10**12)


def test_one_call_at_a_time_and_its_error_once() -> None:
    writing, done = Writing(), []
    writing.start(lambda: done.append(1))
    writing.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writing.wait()
    writing.wait()
    assert done == [1] and not writing.pending


def test_several_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`run.async_save` is true, and several seeds"):
        op.fit(method("TD3BC"), toy_replay(), seeds=(0, 1), max_steps=4, root=tmp_path, verbose=False, async_save=True)
    with pytest.raises(UsageError, match=r"`run.async_save` is 'yes'; expected 'auto', true or false"):
        op.RunOptions(async_save="yes")


def test_the_copy_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", 10, async_save=True, verbose=True, enable_progress_bar=False)
    assert "written while training goes on, out of a copy of about " in capsys.readouterr().out
