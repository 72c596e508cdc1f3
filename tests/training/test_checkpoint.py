import argparse
import copy
import enum
import errno
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import environment

from offpolicy import files
from offpolicy.errors import UsageError
from offpolicy.files import WriteError, is_stray
from offpolicy.training.checkpoints import (
    check_proportions,
    newest_checkpoint,
    newest_run,
    opens,
    plain_hparams,
    read_checkpoint,
    resolve_checkpoint,
    to_plain,
    write_checkpoint,
)


def checkpoint(step=100):
    layer = torch.nn.BatchNorm1d(50)
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.randn(50)}}, "param_groups": [{"lr": 1e-3}]}
    return {
        "global_step": step,
        "state_dict": layer.state_dict(),
        "optimizer_states": [optimizer],
        "hyper_parameters": {"hidden_dims": (256, 256), "alpha": 2.5},
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# Plain types


class Colour(enum.Enum):
    RED = "red"
    SIZE = (1, Path("a"))


class Name(str):
    pass


Pair = namedtuple("Pair", "a b")


@dataclass
class Sizes:
    obs_dim: int
    inner: Pair


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Path("a/b"), "a/b"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (Name("a"), "a"),
        (Colour.RED, "red"),
        (Colour.SIZE, (1, "a")),
        (Pair(1, Path("c")), (1, "c")),
        (Sizes(3, Pair(1, 2)), {"obs_dim": 3, "inner": (1, 2)}),
        ([1, [Path("a")]], [1, ["a"]]),
        (torch.Size([2, 3]), (2, 3)),
        (frozenset({1}), {1}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (argparse.Namespace(a=argparse.Namespace(b=1)), {"a": {"b": 1}}),
        ({np.int64(3): 1, Colour.RED: 2, (1, 2): 3}, {3: 1, "red": 2, (1, 2): 3}),
        (None, None),
        (torch.float32, torch.float32),
        (torch.device("cpu"), torch.device("cpu")),
        (b"x", b"x"),
        (1j, 1j),
    ],
)
def test_to_plain(value, plain, tmp_path):
    result = to_plain(value)
    assert result == plain and type(result) is type(plain)
    torch.save({"v": result}, tmp_path / "a")
    assert torch.load(tmp_path / "a", weights_only=True)["v"] == plain


def test_arrays_become_tensors_of_their_own():
    array = np.arange(3.0)
    array.flags.writeable = False
    tensor = to_plain({"a": array})["a"]
    assert tensor.dtype == torch.float64 and tensor.tolist() == [0.0, 1.0, 2.0]
    tensor[0] = 5.0
    assert array[0] == 0.0


def test_tensors_and_ordered_state_stay(tmp_path):
    state = checkpoint()["state_dict"]
    plain = to_plain(state)
    assert type(plain) is OrderedDict and list(plain) == list(state)
    assert plain._metadata == state._metadata
    assert all(plain[k] is state[k] for k in state)


def test_a_value_is_not_changed():
    value = {"a": [Path("x")], "b": {"c": np.float64(1)}}
    before = copy.deepcopy(value)
    to_plain(value)
    assert value == before


def test_settings_from_a_file_equal_settings_from_python():
    from_file = {"hidden_dims": [256, [1]], "path": "a", "_class_path": "x.Y", "_instantiator": print}
    from_python = {"hidden_dims": (256, (1,)), "path": Path("a")}
    assert plain_hparams(from_file) == plain_hparams(from_python) == {"hidden_dims": (256, (1,)), "path": "a"}


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"activation": torch.relu}, r"`hparams\.activation` is .*relu"),
        ({"net": {"layers": [1, torch.nn.ReLU]}}, r"`hparams\.net\.layers\.1`"),
        ({"schedule": lambda t: t}, r"`hparams\.schedule` .*function"),
        ({"names": np.array(["a"])}, r"`hparams\.names` .*ndarray of <U1"),
        ({"when": np.datetime64("2020-01-01")}, r"`hparams\.when`"),
        ({len: 1}, r"key <built-in function len> of hparams"),
    ],
)
def test_what_a_checkpoint_cannot_hold(value, where):
    with pytest.raises(UsageError, match=where + ".*Pass a name or a number"):
        plain_hparams(value)


# Writing and reading


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoints" / "step=00000100.ckpt"
    saved = checkpoint()
    write_checkpoint({**saved, "path": tmp_path}, path)
    loaded = read_checkpoint(path)
    assert loaded["global_step"] == 100 and loaded["path"] == str(tmp_path)
    assert loaded["hyper_parameters"] == saved["hyper_parameters"]
    assert all(torch.equal(loaded["state_dict"][k], v) for k, v in saved["state_dict"].items())
    torch.nn.BatchNorm1d(50).load_state_dict(loaded["state_dict"])
    assert opens(path) and names(path.parent) == [path.name]


def test_an_impossible_value_writes_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"`checkpoint\.hyper_parameters\.f`"):
        write_checkpoint({"hyper_parameters": {"f": print}}, tmp_path / "step=1.ckpt")
    assert names(tmp_path) == []


def test_a_file_cut_anywhere_does_not_open(tmp_path):
    path = tmp_path / "step=00000100.ckpt"
    write_checkpoint(checkpoint(), path)
    content = path.read_bytes()
    short = tmp_path / "short.ckpt"
    for size in [0, 1, 100, *range(1000, len(content), 701), len(content) - 1]:
        short.write_bytes(content[:size])
        assert not opens(short), size
    with pytest.raises(UsageError, match=rf"short\.ckpt \({size:,} bytes\) is not a whole checkpoint"):
        read_checkpoint(short)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>" * 1000, b"\x00" * 5000, b"\x80\x02}q\x00."])
def test_other_files_do_not_open(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert not opens(tmp_path / "a.ckpt")


def test_missing_foreign_and_odd_files_do_not_open(tmp_path):
    assert not opens(tmp_path / "nothing.ckpt") and not opens(tmp_path)
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert not opens(tmp_path / "list.ckpt")
    torch.save({"f": argparse.Namespace()}, tmp_path / "code.ckpt")
    assert not opens(tmp_path / "code.ckpt")
    with pytest.raises(UsageError, match="not a whole checkpoint of plain types"):
        read_checkpoint(tmp_path / "code.ckpt")
    with pytest.raises(UsageError, match="Found no checkpoint"):
        read_checkpoint(tmp_path / "nothing.ckpt")


def test_looking_whether_it_opens_is_cheap(tmp_path):
    path = tmp_path / "big.ckpt"
    write_checkpoint({"state_dict": {"w": torch.zeros(20_000_000)}}, path)  # 80 MB
    assert opens(path)  # reads the file once, to compare its checksums
    start = time.process_time()
    assert opens(path)
    assert time.process_time() - start < 0.1


def test_a_flipped_bit_is_noticed_and_last_passes_it_over(tmp_path, caplog):
    """The archive of torch opens with any of its tensors changed; only the checksums tell."""
    for step in (100, 200):
        write_checkpoint(
            {"state_dict": {"w": torch.arange(5000.0)}, "global_step": step}, tmp_path / f"step={step}.ckpt"
        )
    path = tmp_path / "step=200.ckpt"
    content = bytearray(path.read_bytes())
    at = content.find(torch.arange(5000.0).numpy().tobytes()) + 4 * 2500
    content[at + 2] ^= 4
    path.write_bytes(content)
    assert torch.load(path)["state_dict"]["w"][2500] != 2500  # nobody else notices
    assert not opens(path)
    with pytest.raises(UsageError, match="is not a whole checkpoint of plain types: Bad CRC-32"):
        read_checkpoint(path)
    assert newest_checkpoint(tmp_path) == tmp_path / "step=100.ckpt"
    assert "step=200.ckpt is damaged or cut short and was passed over" in caplog.text
    with pytest.raises(UsageError, match=r"step=200.ckpt .* does not open; .* Continue from .*step=100.ckpt"):
        resolve_checkpoint(path)


def test_checkpoints_of_before_open(tmp_path):
    """Written without checksums that anybody compares, or in the form before archives."""
    torch.save(checkpoint(), tmp_path / "a.ckpt")
    torch.save(checkpoint(), tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.ckpt", "b.ckpt"):
        assert opens(tmp_path / name) and read_checkpoint(tmp_path / name)["global_step"] == 100


def test_checksums_are_written_whatever_the_process_chose(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(checkpoint(), tmp_path / "a.ckpt")
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert opens(tmp_path / "a.ckpt")


def test_a_packed_archive_is_refused(tmp_path):
    """Zeros shrink a thousandfold, so that a small file would fill the memory."""
    write_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert not opens(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("hparams", "sizes"),
    [
        ({"hidden_dims": (1_000_000, 1_000_000)}, {}),
        ({"hidden_dims": 1 << 40}, {}),
        ({"inner": {"num_critics": 1 << 40}}, {}),
        ({}, {"obs_dim": 1 << 40}),
        ({}, {"max_steps": 1 << 40}),
        ({}, {"action_dim": -3}),
    ],
)
def test_networks_larger_than_their_weights_are_not_made(hparams, sizes):
    weights = {"w": torch.zeros(500, 500)}
    sizes = {"obs_dim": 3, "action_dim": 1, "max_steps": 1000} | sizes
    with pytest.raises(UsageError, match="more than the 250,000 numbers of its weights"):
        check_proportions({"hyper_parameters": hparams, "state_dict": weights}, {"sizes": sizes}, "a.ckpt")
    fitting = {"hyper_parameters": {"hidden_dims": (400, 400), "batch_size": 10**9}, "state_dict": weights}
    check_proportions(fitting, {"sizes": {"obs_dim": 3, "action_dim": 1, "max_steps": 1000}}, "a.ckpt")


def test_a_full_disk(tmp_path):
    old, new = tmp_path / "step=00000100.ckpt", tmp_path / "step=00000200.ckpt"
    write_checkpoint(checkpoint(100), old)
    before = old.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        for path in (new, old):
            with pytest.raises(WriteError, match=rf"Could not write {path}: .* after [\d,]+ bytes .*Free some space"):
                write_checkpoint(checkpoint(200), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == [old.name] and old.read_bytes() == before
    assert newest_checkpoint(tmp_path) == old


def test_no_space_in_the_middle_of_the_archive(tmp_path, monkeypatch):
    """torch hides the cause behind an error of its own archive writer; the message names the cause."""

    def fill(plain, file):
        write, room = file.write, 3000

        class Full:
            def write(self, data):
                nonlocal room
                room -= len(bytes(data))
                if room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

            def flush(self):
                file.flush()

        save(plain, Full())

    save = torch.save
    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        write_checkpoint(checkpoint(), tmp_path / "step=1.ckpt")
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(WriteError, match=r"step=1\.ckpt: Read-only file system\. Choose a folder you may write to"):
        write_checkpoint(checkpoint(), tmp_path / "step=1.ckpt")


@pytest.mark.slow
def test_kill_in_the_middle_of_writing_a_checkpoint(tmp_path):
    """A child writes a second checkpoint slowly and is killed: the first one is what a run continues from."""
    folder = tmp_path / "checkpoints"
    write_checkpoint(checkpoint(100), folder / "step=00000100.ckpt")
    code = f"""
import io, time, torch
from offpolicy.training.checkpoints import write_checkpoint
save = torch.save
def slowly(plain, file):
    buffer = io.BytesIO()
    save(plain, buffer)
    for start in range(0, len(buffer.getvalue()), 100):
        file.write(buffer.getvalue()[start:start + 100]); file.flush(); time.sleep(0.01)
torch.save = slowly
write_checkpoint({{"global_step": 200, "w": torch.zeros(100_000)}}, {str(folder / "step=00000200.ckpt")!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code], env=environment())
    end = time.monotonic() + 60
    while not any(is_stray(p) and p.stat().st_size > 1000 for p in folder.iterdir()):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (stray,) = [p for p in folder.iterdir() if is_stray(p)]
    assert stray.stat().st_size > 1000
    assert newest_checkpoint(tmp_path) == folder / "step=00000100.ckpt"
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == 100

    from offpolicy.training.checkpoint_io import AtomicCheckpointIO

    AtomicCheckpointIO().save_checkpoint(checkpoint(200), folder / "step=00000200.ckpt")
    assert names(folder) == ["step=00000100.ckpt", "step=00000200.ckpt"]  # and the stray is gone


# The Lightning plugin


def test_the_plugin_in_a_trainer(tmp_path):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from offpolicy.training.checkpoint_io import AtomicCheckpointIO

    class Tiny(LightningModule):
        def __init__(self, where=None):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, _):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    def train(steps, ckpt=None):
        torch.manual_seed(0)
        model = Tiny(where=tmp_path)
        trainer = Trainer(
            max_steps=steps,
            plugins=[AtomicCheckpointIO()],
            callbacks=[ModelCheckpoint(tmp_path, filename="{step:08d}", every_n_train_steps=2, save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(64, 2), batch_size=4), ckpt_path=ckpt)
        return model

    train(4)
    assert names(tmp_path) == ["step=00000002.ckpt", "step=00000004.ckpt"]
    assert read_checkpoint(tmp_path / "step=00000002.ckpt")["hyper_parameters"]["where"] == str(tmp_path)
    whole, resumed = train(6), train(6, ckpt=str(newest_checkpoint(tmp_path)))
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_the_plugin_reads_and_removes(tmp_path):
    from offpolicy.training.checkpoint_io import AtomicCheckpointIO

    plugin, path = AtomicCheckpointIO(), tmp_path / "step=1.ckpt"
    plugin.save_checkpoint(checkpoint(), path)
    assert plugin.load_checkpoint(path, map_location=lambda s, _: s, weights_only=False)["global_step"] == 100
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert names(tmp_path) == []


def test_the_plugin_in_a_read_only_folder(tmp_path, monkeypatch):
    from offpolicy.training.checkpoint_io import AtomicCheckpointIO

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / ".step=1.ckpt.17.tmp").write_bytes(b"half")
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(WriteError, match=r"step=1\.ckpt: Permission denied"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "step=1.ckpt")


# Which one to continue from


def put(path, step=1, age=0):
    write_checkpoint({"global_step": step}, path)
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


def test_the_newest_by_update_number(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "nothing") is None
    put(tmp_path / "step=00000900.ckpt", age=0)
    last = put(tmp_path / "step=00010000.ckpt", age=50)  # by number, not by time
    put(tmp_path / "best.ckpt")
    (tmp_path / ".step=00020000.ckpt.17.tmp").write_bytes(last.read_bytes())
    assert newest_checkpoint(tmp_path) == last
    (tmp_path / "step=00020000.ckpt").write_bytes(last.read_bytes()[:-10])
    (tmp_path / "step=00030000.ckpt").mkdir()
    assert newest_checkpoint(tmp_path) == last
    assert newest_checkpoint(tmp_path.parent / tmp_path.name) == last
    again = put(tmp_path / "step=00010000-v1.ckpt", age=0)  # the same update, written later
    assert newest_checkpoint(tmp_path) == again


def test_the_newest_run(tmp_path):
    runs = tmp_path / "pen-human" / "TD3BC"
    assert newest_run(tmp_path, "pen/human", "TD3BC") is None
    put(runs / "seed0-1" / "checkpoints" / "step=00000900.ckpt", age=30)
    put(runs / "seed1-1" / "checkpoints" / "step=00000100.ckpt", age=20)
    put(runs / "seed0-2" / "checkpoints" / "step=00000050.ckpt", age=40)
    (runs / "seed0-3" / "checkpoints").mkdir(parents=True)  # ended before its first checkpoint
    (runs / "notes").mkdir()
    assert newest_run(tmp_path, "pen/human", "TD3BC").name == "seed1-1"
    assert newest_run(tmp_path, "pen/human", "TD3BC", seed=0).name == "seed0-1"
    assert newest_run(tmp_path, "pen/human", "TD3BC", seed=2) is None
    assert newest_run(tmp_path, "pen/human", "IQL") is None
    broken = runs / "seed0-4" / "checkpoints" / "step=00000010.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half")
    assert newest_run(tmp_path, "pen/human", "TD3BC").name == "seed1-1"


def test_resolve(tmp_path):
    run = tmp_path / "d" / "m" / "seed0-1"
    put(run / "checkpoints" / "step=00000001.ckpt")
    last = put(run / "checkpoints" / "step=00000002.ckpt")
    first = run / "checkpoints" / "step=00000001.ckpt"
    assert resolve_checkpoint("last", root=tmp_path, data="d", method="m") == last
    assert resolve_checkpoint("last", root=tmp_path, data="d", method="m", seed=0) == last
    assert resolve_checkpoint(run) == resolve_checkpoint(str(run / "checkpoints")) == last
    assert resolve_checkpoint(first) == first


def test_resolve_names_the_places_searched(tmp_path):
    with pytest.raises(UsageError, match=rf"searched {tmp_path}/a-b/m/seed\*-\*/checkpoints.*start a new run"):
        resolve_checkpoint("last", root=tmp_path, data="a/b", method="m")
    with pytest.raises(UsageError, match=rf"searched {tmp_path}/d/m/seed3-\*/checkpoints"):
        resolve_checkpoint("last", root=tmp_path, data="d", method="m", seed=3)
    with pytest.raises(UsageError, match=r"searched .*\*\.ckpt and .*checkpoints/\*\.ckpt"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=rf"searched {tmp_path}/nothing\.ckpt.*expected 'last', a checkpoint or a run"):
        resolve_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(UsageError, match="expected the data and the method too"):
        resolve_checkpoint("last")
    broken = tmp_path / "step=00000009.ckpt"
    broken.write_bytes(b"half")
    with pytest.raises(UsageError, match=r"\(4 bytes\) does not open.*No other checkpoint lies beside it"):
        resolve_checkpoint(broken)
    put(tmp_path / "step=00000008.ckpt")
    with pytest.raises(UsageError, match=r"Continue from .*step=00000008\.ckpt"):
        resolve_checkpoint(broken)
