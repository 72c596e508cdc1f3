"""Sizes in heads, names that lead elsewhere, bombs: refused before anything is made of them."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from scripts import FIXTURES
from toy import toy_replay

from offpolicy.data import guard
from offpolicy.data.replay import Replay
from offpolicy.data.sources import open_source
from offpolicy.data.sources.d4rl import write
from offpolicy.errors import DataError, UsageError
from offpolicy.files import WriteError


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with little memory, so that a test of a bomb needs none."""
    monkeypatch.setattr(guard, "SMALL", 1 << 10)
    monkeypatch.setattr(guard, "available_memory", lambda: 1 << 16)


def head(shape: Any, descr: str = "<f4", version: int = 1) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text


# -- NumPy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        head((1 << 40,)), head((1 << 20, 1 << 20)), head((3,)) + bytes(8), head((-1,)), head("(1e3,)"), head("'x'"),
        head((1,), "|O") + bytes(8), head((2,), "V99999999999"), head((1 << 62, 4)), head((0,) * 40), b"", b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", b"\x93NUMPY\x09\x00\x04\x00(1,)",
        head("(" * 3000 + ")" * 3000, version=2),
    ],
    ids=range(16),
)  # fmt: skip
def test_heads_of_arrays(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for mapped in (False, True):
        with pytest.raises(DataError):
            guard.open_npy(tmp_path / "a.npy", mapped=mapped)
    with pytest.raises(DataError):
        guard.read_archive(tmp_path / "a.npz")


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3)), np.array(5), np.zeros(0),
                                   np.array(["ab", "c"]), np.array([True])], ids=range(6))  # fmt: skip
def test_arrays_come_back(array: np.ndarray, version: int, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(version, 0))
    (tmp_path / "a.npy").write_bytes(file.getvalue())
    np.savez_compressed(tmp_path / "a.npz", x=array, y=array)
    for found in (guard.open_npy(tmp_path / "a.npy"), guard.open_npy(tmp_path / "a.npy", mapped=True),
                  guard.read_archive(tmp_path / "a.npz", skip=["y"])["x"]):  # fmt: skip
        assert found.dtype == array.dtype and found.flags.f_contiguous == array.flags.f_contiguous
        np.testing.assert_array_equal(found, array)


def test_an_archive_that_would_fill_the_memory(no_room: None, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1 << 20))
    with pytest.raises(DataError, match=r"`all arrays` needs 8,388,\d+ bytes, and 65,536 bytes of memory are free"):
        guard.read_archive(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", head((1 << 40,)))
    with pytest.raises(DataError):
        open_source(tmp_path / "b.npz")


def test_the_same_array_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("x.npy", head((0,)))
    with pytest.raises(DataError, match="twice"):
        guard.read_archive(tmp_path / "a.npz")


# -- gzip --------------------------------------------------------------------------------------------------------------


def test_unpacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for parts in ([b"abc"], [b"abc", b"de"], [b"x" * 10_000_000]):
        packed = b"".join(map(gzip.compress, parts))
        assert guard.gunzipped(packed, tmp_path) == gzip.decompress(packed) == b"".join(parts)
    assert guard.gunzipped(gzip.compress(b"abc") + bytes(20), tmp_path) == b"abc"
    for wrong in (b"", b"\x1f\x8b", gzip.compress(b"abc")[:-6], b"abc", zlib.compress(b"abc")):
        with pytest.raises(DataError):
            guard.gunzipped(wrong, tmp_path)
    monkeypatch.setattr(guard, "SMALL", 1 << 10)
    with pytest.raises(DataError, match="expected texts, which do not shrink that much"):
        guard.gunzipped(gzip.compress(bytes(1 << 24)), tmp_path)


# -- HDF5 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def walks(tmp_path: Path) -> Path:
    return write(toy_replay(), tmp_path / "walks.hdf5")


def refused(path: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_source(path)


def test_numbers_in_another_file_are_not_read(walks: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.zeros((300, 3), np.float32).tobytes())
    with h5py.File(walks, "r+") as file:
        del file["observations"]
        file.create_dataset("observations", (300, 3), np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    refused(walks, "`observations` lie in another file")


def test_virtual_data_sets_are_not_read(walks: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.zeros((300, 3), np.float32)
    with h5py.File(walks, "r+") as file:
        layout = h5py.VirtualLayout((300, 3), np.float32)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (300, 3))
        del file["observations"]
        file.create_virtual_dataset("observations", layout)
    refused(walks, "`observations` lie in another file")


def test_links_out_of_a_file_are_not_followed(walks: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.zeros((300, 3), np.float32)
    with h5py.File(walks, "r+") as file:
        file["infos/deep"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
    refused(walks, r"`infos/deep` is a link to another file \(.*other.h5\)")


def test_shapes_that_the_file_does_not_hold(walks: Path) -> None:
    with h5py.File(walks, "r+") as file:
        del file["observations"]
        file.create_dataset("observations", (1 << 40, 3), np.float32, chunks=(1024, 3))  # nothing is stored
    refused(walks, r"`observations` says it has 13,194,139,533,312 bytes, of which the file holds 0")


def test_a_heap_that_does_not_end(walks: Path) -> None:
    """The library of HDF5 would look through it for ever."""
    content = bytearray(walks.read_bytes())
    at = content.index(b"GCOL")
    first = 16 + (int.from_bytes(content[at + 24 : at + 32], "little") + 7) // 8 * 8
    content[at + 16 + first : at + 32 + first] = bytes(16)  # the free space behind the text says it has no length
    walks.write_bytes(content)
    refused(walks, "a heap of texts does not end")


def test_a_minari_shape_that_the_file_does_not_hold(tmp_path: Path) -> None:
    import shutil

    source = next((FIXTURES / "minari").rglob("mixed-v0"))
    shutil.copytree(source, tmp_path / "set-v0")
    file = tmp_path / "set-v0" / "data" / "metadata.json"
    record = json.loads(file.read_text())
    space = json.loads(record["observation_space"])
    record["observation_space"] = json.dumps(space | {"shape": [1 << 33]})
    file.write_text(json.dumps(record))
    refused(tmp_path / "set-v0", "`observations` says it has")


# -- Arrow -------------------------------------------------------------------------------------------------------------


def test_offsets_of_texts_are_checked() -> None:
    good = pa.table({"x": ["ab", "cde"]})
    assert guard.checked_table(good) is good
    offsets = pa.py_buffer(np.array([0, 2, 1 << 30], np.int32).tobytes())
    with pytest.raises(pa.ArrowInvalid):
        wrong = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abcde")])
        guard.checked_table(pa.table({"x": wrong}))


def test_rows_of_parquet(no_room: None, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"x": pa.array(["a"] * 3_000_000)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="bytes"):
        guard.check_parquet(tmp_path / "a.parquet")


# -- folders of our format ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy_replay().save(tmp_path / "set")


def change(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(record | fields))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../secret.npy", "..", ".", "", "a/b.npy", "a\\b.npy", 3, None, "\0"]
)
def test_names_that_lead_out_of_a_folder(name: Any, folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", np.zeros((300, 3), np.float32))
    columns = json.loads((folder / "meta.json").read_text())["columns"]
    change(folder, columns=columns | {"obs": name})
    refused(folder, "expected a plain file name")


@pytest.mark.parametrize("place", ["steps/00-obs.npy", "steps", "index.npz", "meta.json"])
def test_links_out_of_a_folder(place: str, folder: Path, tmp_path: Path) -> None:
    (folder / place).rename(tmp_path / "elsewhere")
    (folder / place).symlink_to(tmp_path / "elsewhere")
    refused(folder, "leads out of its folder")


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2}, {"format": None}, {"columns": None}, {"columns": {}}, {"columns": ["obs"]}, {"meta": None},
        {"meta": [1]}, {"fingerprint": None}, {"fingerprint": "0" * 64}, {"fingerprint": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_records_of_a_folder(fields: dict[str, Any], folder: Path) -> None:
    change(folder, **fields)
    refused(folder, "set")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ud800", "[" * 100_000])
def test_damaged_records_of_a_folder(text: str, folder: Path) -> None:
    (folder / "meta.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, "meta.json")


def test_a_changed_column_is_noticed_by_the_fingerprint(folder: Path) -> None:
    path = folder / "steps" / "02-reward.npy"
    reward = np.load(path)
    reward[7] += 1
    np.save(path, reward)
    refused(folder, "has the fingerprint [0-9a-f]{64}, and [0-9a-f]{64} when it was written")


def index(folder: Path, **arrays: np.ndarray) -> None:
    with np.load(folder / "index.npz") as found:
        kept = dict(found)
    np.savez(folder / "index.npz", **kept | arrays)


@pytest.mark.parametrize("start", [np.zeros(30), np.full(30, 1 << 62), np.full(30, -1), np.arange(30)[:, None],
                                   np.zeros(30, int), np.arange(29) * 10, np.array(["a"] * 30), np.arange(30) * 10 + 1],
                         ids=range(8))  # fmt: skip
def test_the_index_of_a_folder(start: np.ndarray, folder: Path) -> None:
    index(folder, start=start)
    refused(folder, "set")


def saved(tmp_path: Path, **changed: np.ndarray) -> Path:
    """A folder whose fingerprint is right and whose content is not."""
    replay = toy_replay()
    tail = {k: changed.pop("tail") for k in ["obs"] if "tail" in changed} or replay.tail
    made = Replay({**replay.steps, **changed}, start=replay.start, length=replay.length, tail=tail, meta=replay.meta)
    return made.save(tmp_path / "made", overwrite=True)


def test_the_content_of_a_folder(tmp_path: Path) -> None:
    obs, action, reward = (np.array(toy_replay().steps[k]) for k in ("obs", "action", "reward"))
    obs[25, 1], action[3], reward[299] = np.nan, 2.5, np.inf
    refused(saved(tmp_path, obs=obs), r"`obs` has NaN or infinite values in 1 row \(first: row 25, episode 2\)")
    refused(saved(tmp_path, reward=reward), r"`reward` has NaN or infinite values")
    refused(saved(tmp_path, action=action), r"`action` has values outside")
    refused(saved(tmp_path, action=np.array(["a"] * 300)), "`action` has type <U1")
    refused(saved(tmp_path, terminated=np.full(300, 7)), "values other than 0 and 1")
    refused(saved(tmp_path, tail=np.full((30, 3), np.nan, np.float32)), "after the last step")
    refused(saved(tmp_path, tail=np.zeros((30, 4), np.float32)), "last observations have shape")
    kept = open_source(saved(tmp_path, obs=obs), on_bad="drop_episode")
    assert kept.num_episodes == 29 and any("dropped 1 of 30 episodes" in text for text in kept.meta["warnings"])
    clipped = open_source(saved(tmp_path, action=action), clip_actions=True)
    assert float(np.max(clipped.steps["action"])) == 2.0


def test_a_sound_folder_opens_as_it_was_written(folder: Path) -> None:
    found, before = open_source(folder), toy_replay()
    assert found.fingerprint() == before.fingerprint() and found.meta["name"] == before.meta["name"]
    assert Replay.load(folder, mmap=True).is_mapped


def test_large_folders_are_looked_at_in_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offpolicy.data import recheck, store

    monkeypatch.setattr(store, "READ_THROUGH", 100)
    monkeypatch.setattr(recheck, "READ_THROUGH", 100)
    obs = np.full((300, 3), np.nan, np.float32)
    refused(saved(tmp_path, obs=obs), "`obs` has NaN or infinite values near row 0")
    folder = toy_replay().save(tmp_path / "set")
    change(folder, fingerprint="0" * 64)
    assert open_source(folder).fingerprint() == "0" * 64  # believed: comparing would read it all


def test_tables_of_texts(tmp_path: Path) -> None:
    def texts(token: Any = (1, 2, 3), pairs: Any = ((0, 1),), **tables: np.ndarray) -> Path:
        meta = {"tokenizer": {"vocabulary": 5}}
        made = {"pairs": np.array(pairs), **{f"pairs/{k}": v for k, v in tables.items()}}
        replay = Replay(
            {"token": np.array(token)}, start=np.array([0, 1]), length=np.array([1, 2]), tables=made, meta=meta
        )
        return replay.save(tmp_path / "texts", overwrite=True)

    Replay.load(texts())
    with pytest.raises(DataError, match="and the tokenizer 5 tokens"):
        Replay.load(texts(token=(1, 2, 5)))
    for arguments in ({"pairs": ((0, 2),)}, {"pairs": ((-1, 0),)}, {"pairs": (0, 1)}, {"pairs": ((0.0, 1.0),)},
                      {"weight": np.ones(2)}, {"token": (1.0, 2.0, 3.0)}):  # fmt: skip
        with pytest.raises(DataError):
            Replay.load(texts(**arguments))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_of_readers_become_one_kind(tmp_path: Path) -> None:
    for error in (KeyError("x"), RecursionError("deep"), MemoryError(), ZeroDivisionError("0")):
        with pytest.raises(DataError, match=f"{type(error).__name__}.*truncated, damaged"), guard.faults(tmp_path):
            raise error
    for ours in (DataError("a"), UsageError("b"), WriteError(28, "full")):
        with pytest.raises(type(ours)), guard.faults(tmp_path):
            raise ours
    with pytest.raises(KeyboardInterrupt), guard.faults(tmp_path):
        raise KeyboardInterrupt
