"""One run, one trainer; and what the processes of a run do when one of them ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import start_command
from forks import Copy, finish, pair_of
from scripts import ROOT
from toy import method, toy_replay

import offpolicy as op
from offpolicy.compute import processes
from offpolicy.compute.processes import LOCK, claimed
from offpolicy.errors import UsageError

HOLD = """
import sys, time
from pathlib import Path
from offpolicy.compute.processes import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that trains in the folder, as far as anybody can tell."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_until_the_first_has_ended(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(2):
        with (
            pytest.raises(UsageError, match=f"is being trained by process {holder.pid} on .* since .*another --folder"),
            claimed(tmp_path),
        ):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()  # nobody could remove it, and it does not matter
    with claimed(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f'{{"pid": {os.getpid()},')
    assert not (tmp_path / LOCK).exists()


def test_fit_claims_its_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    options = {"max_steps": 4, "verbose": False, "eval_episodes": 0}
    with pytest.raises(UsageError, match="is being trained by"):
        op.fit(method("BC"), toy_replay(), folder=tmp_path, **options)
    other = op.fit(method("BC"), toy_replay(), folder=tmp_path / "other", **options).folder
    assert not (other / LOCK).exists()
    assert op.fit(method("BC"), toy_replay(), ckpt_path=other, **options | {"max_steps": 6}).updates == 6


def test_where_there_are_no_locks_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with claimed(tmp_path), claimed(tmp_path):  # nobody is refused
        assert (tmp_path / LOCK).read_text() == ""
    with claimed(tmp_path / "absent"), claimed(None):  # as in a folder that cannot be written
        assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("content", ["", "{", '{"pid": "x"}', "[]"])
def test_a_damaged_lock_file_is_no_obstacle(content: str, holder: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(UsageError, match="is being trained by another process"), claimed(tmp_path):
        pass


def start(folder: Path) -> Copy:
    """Two processes that would train for hours, once they have written a checkpoint."""
    toy_replay().save(folder / "toy")
    command = ["-m", "offpolicy.fit", "--model", "BC", "--data", "toy", "--folder", "run"]
    options = {
        "model.hidden_dims": "[8,8]", "model.batch_size": 16, "run.eval_every": 50, "run.eval_episodes": 0,
        "run.log_every": 50, "trainer.max_steps": 10**7, "trainer.devices": 2, "trainer.strategy": "ddp",
        "trainer.accelerator": "cpu",
    }  # fmt: skip
    process = start_command(*command, *(f"--{name}={value}" for name, value in options.items()), folder=folder)
    end = time.monotonic() + 150
    while not any((folder / "run").glob("checkpoints/*.ckpt")) and time.monotonic() < end and not process.ended():
        time.sleep(0.2)
    return process


def child_of(pid: int) -> int:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(one) for one in found if "offpolicy.fit" in Path(f"/proc/{one}/cmdline").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the second process in /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, 1)])
def test_the_second_process_is_told_to_end_or_is_killed(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        child = child_of(process.pid)
        os.kill(child, sent)
        finish(process, timeout=120)
        shown = process.output
        assert process.returncode == code, shown
        assert "Traceback" not in shown and "python -m offpolicy.fit --ckpt_path run" in shown, shown
        said = "Interrupted at update" if sent == signal.SIGTERM else "Another process of the run has ended"
        assert re.search(said, shown)
        end = time.monotonic() + 30
        while Path(f"/proc/{child}").exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert not Path(f"/proc/{child}").exists()
    finally:
        finish(process, timeout=0)


def test_errors_that_mean_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1")
    assert not processes.is_loss(error)  # alone
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert processes.is_loss(error) and not processes.is_loss(RuntimeError("shapes differ"))


def test_a_process_alone_asks_nobody() -> None:
    x = torch.tensor([1.0, 2.0])
    assert processes.rank() == 0 and processes.world_size() == 1 and processes.gathered("own") == ["own"]
    assert processes.sum_over_processes(x) is x and processes.mean_over_processes(x) is x
    processes.wait_for_all()


def together() -> None:
    with processes.joined_processes():
        rank, x = processes.rank(), torch.tensor([1.0 + processes.rank()])
        sums = processes.sum_over_processes(x).item(), processes.mean_over_processes(x).item()
        print(rank, processes.world_size(), *sums, x.item(), processes.gathered({"rank": rank}))
        processes.wait_for_all()


def test_two_processes_know_of_each_other() -> None:
    for rank, copy in enumerate(pair_of(together)):
        assert copy.output == f"{rank} 2 3.0 1.5 {1.0 + rank} [{{'rank': 0}}, {{'rank': 1}}]\n"
