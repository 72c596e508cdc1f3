import errno
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import environment

from offpolicy import files
from offpolicy.files import Table, WriteError, atomic_file, atomic_write, is_stray, plot_curves, unique_run_folder


@contextmanager
def file_size_limit(limit):
    """Files of this process cannot grow beyond `limit` bytes: the kernel itself cuts a write short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# Atomic writes


def test_write_and_replace(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    atomic_write(path, "one – é")
    assert path.read_text(encoding="utf-8") == "one – é"
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.txt"]


def test_permissions_are_the_usual_ones(tmp_path):
    atomic_write(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_nothing_is_visible_before_the_end(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        (temporary,) = [p for p in tmp_path.iterdir() if p != path]
        assert is_stray(temporary) and temporary.stat().st_dev == path.stat().st_dev
    assert path.read_bytes() == b"new"


def test_the_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    atomic_write(tmp_path / "a", b"x")
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_any_error_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_full_disk(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    with file_size_limit(5000), pytest.raises(WriteError) as caught:
        atomic_write(path, b"x" * 100_000)
    message = str(caught.value)
    assert str(path) in message and "after 5,000 bytes" in message and "bytes free" in message
    assert "earlier are unchanged" in message and "\n" not in message
    assert caught.value.errno == errno.EFBIG and isinstance(caught.value, OSError)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_full_device():
    """The same through a device that is really full; the rename is never reached."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    clear = WriteError.of(caught.value, Path("/dev/full"))
    assert clear.errno == errno.ENOSPC and "No space left on device" in str(clear) and "Free some space" in str(clear)


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(WriteError, match=r"a: Permission denied\. Choose a folder you may write to"):
        atomic_write(tmp_path / "a", b"x")
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path):
    atomic_write(tmp_path / "a", b"x")
    with pytest.raises(WriteError, match=r"Could not write .*a/b: "):
        atomic_write(tmp_path / "a" / "b", b"x")


def test_kill_in_the_middle_of_a_write(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    code = f"""
import time
from offpolicy.files import atomic_file
with atomic_file({str(path)!r}) as file:
    while True:
        file.write(b"x" * 1000); file.flush(); time.sleep(0.001)
"""
    child = subprocess.Popen([sys.executable, "-c", code], env=environment())
    wait_for(lambda: any(is_stray(p) and p.stat().st_size > 2000 for p in tmp_path.iterdir()))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_bytes() == b"old"
    assert [is_stray(p) for p in tmp_path.iterdir() if p != path] == [True]


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# Tables


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "metrics.csv")


def test_rows_come_back_bit_equal(table):
    values = [0.1 + 0.2, 1e-310, -0.0, 1e300, float("inf"), 2.0]
    for step, value in enumerate(values):
        table.append({"loss": value, "step": step})
    assert table.path.read_text().splitlines()[:2] == ["step,loss", "0,0.30000000000000004"]
    assert [r["step"] for r in table.rows()] == list(range(6))
    assert np.array([r["loss"] for r in table.rows()]).tobytes() == np.array(values).tobytes()


def test_kinds_of_values(table):
    table.append({"step": torch.tensor(5), "a": np.float32(0.5), "b": torch.tensor(1.5), "c": None, "d": True})
    table.append({"step": 6, "a": float("nan"), "d": 'a "b", c\nd'})
    first, second = table.rows()
    assert first == {"step": 5, "a": 0.5, "b": 1.5, "d": 1}
    assert np.isnan(second["a"]) and second["d"] == 'a "b", c d'


def test_numbers_of_damaged_rows_are_floats(table):
    table.append({"step": 1, "a": 10**400, "b": 7})
    assert table.rows()[0] == {"step": 1, "a": float("inf"), "b": 7}


def test_every_row_is_there_at_once(table):
    for step in range(3):
        table.append({"step": step, "a": 1.0})
        assert len(Table(table.path).rows()) == step + 1


def test_new_columns_later(table):
    table.append({"step": 1, "a": 1.0})
    table.append({"step": 2, "b": 2.0})
    table.append({"b": 3.0, "c": 4.0, "a": 5.0, "step": 3})
    assert table.path.read_text() == "step,a,b,c\n1,1.0,,\n2,,2.0,\n3,5.0,3.0,4.0\n"
    assert table.rows()[1] == {"step": 2, "b": 2.0}


def test_a_new_process_goes_on_where_the_last_one_ended(table):
    table.append({"step": 1, "a": 1.0, "b": 2.0})
    again = Table(table.path)
    again.append({"step": 2, "b": 3.0})
    again.append({"step": 3, "z": 3.0})
    assert table.path.read_text() == "step,a,b,z\n1,1.0,2.0,\n2,,3.0,\n3,,,3.0\n"


def test_a_table_needs_the_step(table):
    with pytest.raises(ValueError, match=r"expected `step`, the update count"):
        table.append({"a": 1.0})
    assert not table.path.exists()


def test_a_removed_file_is_begun_again(table):
    table.append({"step": 1, "a": 1.0})
    table.path.unlink()
    table.append({"step": 2, "b": 1.0})
    assert table.path.read_text() == "step,b\n2,1.0\n"


def test_cut_keeps_every_earlier_row_byte_by_byte(table):
    content = 'step,a,"b, c"\n100,1.50,x\n200,,"y, z"\n300,3.0,w\n'
    table.path.write_text(content)
    assert table.cut(300) == 0 and table.path.read_text() == content
    assert table.cut(250) == 1
    assert table.path.read_text() == 'step,a,"b, c"\n100,1.50,x\n200,,"y, z"\n'
    table.append({"step": 250, "a": 2.0})
    assert table.cut(100) == 2
    assert table.cut(0) == 1 and table.rows() == []
    table.append({"step": 1, "a": 1.0})
    assert table.path.read_text() == 'step,a,"b, c"\n1,1.0,\n'


def test_cut_without_a_file(table):
    assert table.cut(5) == 0 and table.rows() == [] and not table.path.exists()


def test_cut_is_atomic(table, monkeypatch):
    for step in range(4):
        table.append({"step": step})
    before = table.path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(WriteError, match="Input/output error"):
        table.cut(1)
    assert table.path.read_bytes() == before and names(table.path.parent) == ["metrics.csv"]


WHOLE = "step,a,b\n1,1.0,x\n2,2.0,é\n"


@pytest.mark.parametrize("cut", range(len(WHOLE.encode()) + 1))
def test_torn_anywhere(table, cut):
    """Wherever the last write stopped, whole lines stay and only the torn one goes."""
    table.path.write_bytes(WHOLE.encode()[:cut])
    whole_lines = WHOLE.encode()[:cut].decode(errors="ignore").count("\n")
    rows = table.rows()
    assert [r["step"] for r in rows] == [1, 2][: max(whole_lines - 1, 0)]
    assert table.path.stat().st_size == cut  # reading changes nothing
    table.append({"step": 3, "a": 3.0})
    assert table.rows() == [*rows, {"step": 3, "a": 3.0}]
    assert table.path.read_bytes().endswith(b"\n")


def test_cut_after_a_torn_line(table):
    table.path.write_text("step,a\n1,1.0\n2,2.0\n3,3.")
    assert table.cut(1) == 1
    assert table.path.read_text() == "step,a\n1,1.0\n"


def test_a_disk_that_fills_up_in_the_middle_of_a_row(table):
    table.append({"step": 1, "text": "a"})
    before = table.path.read_bytes()
    with file_size_limit(len(before) + 10), pytest.raises(WriteError, match=r"metrics\.csv: .* Free some space"):
        table.append({"step": 2, "text": "b" * 100})
    assert table.path.read_bytes() == before
    table.append({"step": 2, "text": "b"})
    assert len(table.rows()) == 2


def test_kill_while_appending(table):
    code = f"""
from offpolicy.files import Table
table = Table({str(table.path)!r})
step = 0
while True:
    step += 1
    table.append({{"step": step, "a": step / 3, **({{f"new{{step}}": 1}} if step % 50 == 0 else {{}})}})
"""
    child = subprocess.Popen([sys.executable, "-c", code], env=environment())
    wait_for(lambda: len(table.rows()) > 300)
    child.send_signal(signal.SIGKILL)
    child.wait()
    rows = table.rows()
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    assert all(r["a"] == r["step"] / 3 for r in rows)
    table.append({"step": len(rows) + 1, "a": 0.0})
    assert len(table.rows()) == len(rows) + 1


# Curves


def fill(folder, score=True, losses=True):
    if score:
        evals = Table(folder / "evals.csv")
        for step, value in ((1000, 20.0), (2000, 94.25), (3000, 91.5)):
            evals.append({"step": step, "eval/score": value, "eval/score_std": 4.0, "eval/return_mean": -value})
    if losses:
        metrics = Table(folder / "metrics.csv")
        for step in range(500, 3001, 500):
            metrics.append(
                {"step": step, "train/critic_loss": 100 / step, "train/actor_loss": 0.5, "train/q_mean": step / 100}
            )


def headings(monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    suptitle = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, t, **k: (seen.append((t, self)), suptitle(self, t, **k))[1])
    return seen


def test_curves(tmp_path, monkeypatch):
    seen = headings(monkeypatch)
    run = tmp_path / "pendulum" / "TD3BC" / "seed0-1"
    fill(run)
    assert plot_curves(run) == run / "curves.png"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    heading, figure = seen[0]
    assert heading == "pendulum · TD3BC · seed0-1\nscore: last 91.5, best 94.25"
    assert [a.get_title() for a in figure.axes] == ["evaluation score", "training losses", "training values"]
    assert {a.get_xlabel() for a in figure.axes} == {"updates"}
    assert names(run) == ["curves.png", "evals.csv", "metrics.csv"]


def test_curves_of_synthetic_data(tmp_path, monkeypatch):
    """Measured where a pool was drawn, and counts are no curves."""
    seen = headings(monkeypatch)
    table = Table(tmp_path / "metrics.csv")
    table.append({"step": 1, "train/loss": 1.0, "synthetic/version": 1, "synthetic/log_prob": -1.0})
    table.append({"step": 2, "train/loss": 1.0, "synthetic/version": 2, "synthetic/log_prob": -0.5})
    assert plot_curves(tmp_path)
    axes = seen[0][1].axes[-1]
    assert axes.get_title() == "synthetic data"
    assert [line.get_label() for line in axes.lines] == ["log_prob"] and list(axes.lines[0].get_ydata()) == [-1.0, -0.5]


@pytest.mark.parametrize(("score", "losses", "panels"), [(True, False, 1), (False, True, 2)])
def test_curves_of_what_there_is(tmp_path, monkeypatch, score, losses, panels):
    seen = headings(monkeypatch)
    fill(tmp_path, score, losses)
    assert plot_curves(tmp_path, title="Mine")
    assert len(seen[0][1].axes) == panels and seen[0][0].startswith("Mine")


def test_no_curves_without_numbers(tmp_path):
    assert plot_curves(tmp_path) is None and names(tmp_path) == []


def test_curves_survive_nan(tmp_path):
    evals = Table(tmp_path / "evals.csv")
    evals.append({"step": 1, "return_mean": float("nan"), "return_std": float("nan")})
    assert plot_curves(tmp_path)


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone(tmp_path):
    fill(tmp_path)
    code = f"""
import sys
from offpolicy.files import plot_curves
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
plot_curves({str(tmp_path)!r})
print("matplotlib.pyplot" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert out.stdout.strip() == "False", out.stderr


# Run folders


def test_run_folders_count_up(tmp_path):
    first = unique_run_folder(tmp_path, "D4RL/pen/human-v2", "TD3BC", 0)
    assert first == tmp_path / "D4RL-pen-human-v2" / "TD3BC" / "seed0-1" and first.is_dir()
    assert unique_run_folder(tmp_path, "D4RL/pen/human-v2", "TD3BC", 0).name == "seed0-2"
    assert unique_run_folder(tmp_path, "D4RL/pen/human-v2", "TD3BC", 7).name == "seed7-1"
    (first.parent / "seed0-9").mkdir()
    assert unique_run_folder(tmp_path, "D4RL/pen/human-v2", "TD3BC", 0).name == "seed0-10"


def test_run_folders_are_never_shared(tmp_path, monkeypatch):
    """Another process takes the number between the look and the making."""
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    folders = {unique_run_folder(tmp_path, "d", "m", 0) for _ in range(3)}
    assert {f.name for f in folders} == {"seed0-1", "seed0-2", "seed0-3"}


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b\\c", "a-b-c"),
        ("../..", "unnamed"),
        (".hidden", "hidden"),
        ("hopper-medium-v2", "hopper-medium-v2"),
        ("", "unnamed"),
    ],
)
def test_names_are_safe(tmp_path, name, safe):
    assert unique_run_folder(tmp_path, name, "m", 0) == tmp_path / safe / "m" / "seed0-1"


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(WriteError, match="Could not write"):
        unique_run_folder(tmp_path / "runs", "d", "m", 0)
