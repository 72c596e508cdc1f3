"""Files of data sets: facts about them, opening with clear faults, downloads, and a record of their hashes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import json
import os
import re
import threading
import urllib.request
from collections.abc import Sequence
from functools import lru_cache
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.error import HTTPError

import yaml

from offpolicy.compute.progress import terminal_bar
from offpolicy.data.guard import check_links, faults, read_json
from offpolicy.errors import DataError
from offpolicy.files import atomic_file, atomic_write

if TYPE_CHECKING:
    import h5py

CONNECT_SECONDS = 8.0  # until the server answers
STALL_SECONDS = 60.0
BLOCK = 1 << 20


def facts(name: str) -> dict[str, Any]:
    """A YAML file of ``datasets_cfg``, for example ``facts("d4rl.yaml")``."""
    return copy.deepcopy(_parsed(name))


@lru_cache
def _parsed(name: str) -> dict[str, Any]:
    return yaml.safe_load(files("datasets_cfg").joinpath(name).read_text())


# -- faults of files -----------------------------------------------------------------------------------------------


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises:
        DataError: it is not one (with the likely cause), it is truncated, or links lead out of it.
    """
    import h5py

    if importlib.util.find_spec("hdf5plugin") is not None:  # more filters of compression, where they are installed
        with contextlib.suppress(Exception):
            importlib.import_module("hdf5plugin")
    try:
        file = h5py.File(path, "r", locking="best-effort")  # some network file systems cannot lock
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise file_fault(path, error, "HDF5") from None
    try:
        with faults(path):
            check_links(file, path)
    except BaseException:
        file.close()
        raise
    return file


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in a NumPy archive.

    Raises:
        DataError: it is none (with the likely cause), or it is truncated.
    """
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise DataError(
                    f"{path} holds a single array; expected an .npz archive of named arrays. Use numpy.savez."
                ) from None
        raise file_fault(path, error, ".npz") from None


def file_fault(path: Path, error: Exception, kind: str) -> DataError:
    """What is wrong with a file that does not open, and what to do about it."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip()
    size = os.path.getsize(path)
    if size == 0:
        return DataError(f"{path} is empty; expected an {kind} file. Delete it and fetch it again.")
    if head.startswith(b"<"):
        return DataError(
            f"{path} is not {kind}: it looks like a web page, so the download failed. Delete it and fetch it again."
        )
    sizes = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", str(error))
    if sizes:
        return DataError(
            f"{path} is truncated: {int(sizes[1]):,} bytes of the {int(sizes[2]):,} expected. Delete it and fetch "
            "it again."
        )
    if kind == ".npz" and head.startswith(b"PK"):
        return DataError(
            f"{path} is truncated or damaged ({size:,} bytes, no archive index at its end). Delete it and fetch it "
            "again."
        )
    return DataError(f"{path} is not a readable {kind} file ({error}). Check the file or fetch it again.")


def corrupt(path: Path | str, key: str, error: Exception) -> DataError:
    """A part of a file that opens cannot be read."""
    if re.search(r"filter .*not registered|can't open directory|plugin", str(error)):
        return DataError(
            f"{path}: `{key}` is compressed with a filter that this HDF5 library does not have ({error}); the file "
            "itself may be sound. Install the usual filters (pip install hdf5plugin), or write the file anew without "
            "(`h5repack -f NONE`, where it was made)."
        )
    return DataError(f"{path}: `{key}` cannot be read ({error}); the file is damaged. Delete it and fetch it again.")


# -- record of hashes ------------------------------------------------------------------------------------------------


class Lock:
    """The record beside a data file (``<file>.lock.json``): SHA-256, size and rows at the first successful load.

    Neither D4RL nor the other sources publish checksums, and files have been replaced under the same name; the record
    notices. It is compared by size and time stamp, and by hash when these have changed.

    Args:
        paths: the files of the data set, in a fixed order (one for most kinds).
        sidecar: where the record lies; beside the file if None.
    """

    def __init__(self, paths: Sequence[Path], sidecar: Path | None = None) -> None:
        self.paths = list(paths)
        self.path = sidecar or paths[0].with_name(paths[0].name + ".lock.json")
        self.record: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self.record = read_json(self.path)
            except DataError as error:
                raise DataError(f"{error} Without it, the data are taken as they are.") from None
            kinds = {"sha256": str, "size": int, "mtime_ns": int}
            if any(name in self.record and not isinstance(self.record[name], kind) for name, kind in kinds.items()):
                raise DataError(f"{self.path} is damaged; expected a hash, a size and a time. Delete it.")

    def check(self, expected: str | None = None) -> None:
        """Compare the files with the record, and with an expected SHA-256 when there is one.

        Raises:
            DataError: they differ.
        """
        stamp = self._stamp()
        if expected is not None:
            found = self.sha256()
            if found != expected.lower().removeprefix("sha256:"):
                raise DataError(
                    f"{self.paths[0]} has SHA-256 {found}; expected {expected}. Fetch the right file or correct "
                    "`sha256`."
                )
        if "sha256" in self.record and any(self.record.get(k) != v for k, v in stamp.items()):
            found = self.sha256()
            if found != self.record["sha256"]:
                raise DataError(
                    f"{self.paths[0]} has changed since its first load: SHA-256 {found}, {stamp['size']:,} bytes; "
                    "expected "
                    f"{self.record['sha256']}, {self.record.get('size', 0):,} bytes. If the new content is wanted, "
                    f"delete {self.path}; otherwise restore the file."
                )
            self._write({**self.record, **stamp})

    def keep(self, rows: int) -> str:
        """Record the files after their first successful load, where the folder can be written; returns the SHA-256."""
        if "sha256" not in self.record:
            self._write({"sha256": self.sha256(), **self._stamp(), "rows": rows})
        return self.record["sha256"]

    def sha256(self) -> str:
        """SHA-256 over the bytes of the files, one after the other."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(BLOCK))
        for path in self.paths:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
        return digest.hexdigest()

    def _stamp(self) -> dict[str, int]:
        stats = [path.stat() for path in self.paths]
        return {"size": sum(s.st_size for s in stats), "mtime_ns": max(s.st_mtime_ns for s in stats)}

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record
        with contextlib.suppress(OSError):  # a read-only folder: the hash is then computed at each load
            atomic_write(self.path, json.dumps(record, indent=1) + "\n")


# -- downloads -------------------------------------------------------------------------------------------------------


def locate(path: Path, url: str, download: bool) -> Path:
    """The file itself, fetched first when it is not there.

    Raises:
        DataError: it is not there and may not or cannot be downloaded; says where to put it.
    """
    if path.is_file():
        return path
    if not download:
        raise DataError(
            f"{path} does not exist and downloading is off. Put the file of {url} there, pass `--data FILE`, or leave "
            "out `--data.download=false`."
        )
    fetch(url, path)
    return path


def fetch(url: str, path: Path) -> None:
    """Download a file with a progress bar; it appears under its name only when it is complete.

    Raises:
        DataError: no network (within seconds), an answer other than the file, or a transfer that broke off.
    """
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    response = _connect(url, path)
    total = int(response.headers.get("Content-Length") or 0) or None  # type: ignore[attr-defined]
    size = f"{total / 1e6:,.1f} MB" if total else "size unknown"
    bar = terminal_bar(
        "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
    bar.console.print(f"Downloading {url} ({size}) to {path}", highlight=False)
    received = 0
    with response, atomic_file(path) as file, bar:
        task = bar.add_task(path.name, total=total)
        while block := _receive(response, url, path, received):
            if not received and block.lstrip().startswith(b"<"):
                raise DataError(_remedy(url, path, "the server answered with a web page instead of the file"))
            file.write(block)
            received += len(block)
            bar.update(task, completed=received)
        if total is not None and received != total:
            raise DataError(_remedy(url, path, f"it broke off after {received:,} of {total:,} bytes"))


def _receive(response: IO[bytes], url: str, path: Path, received: int) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, HTTPException) as error:
        raise DataError(_remedy(url, path, f"it broke off after {received:,} bytes ({error})")) from None


def _connect(url: str, path: Path) -> IO[bytes]:
    """The open response, or a DataError within :data:`CONNECT_SECONDS`."""
    answer = _ask(url)
    if answer is None:
        raise DataError(_remedy(url, path, f"no answer within {CONNECT_SECONDS:.0f} seconds (is there a network?)"))
    if isinstance(answer, HTTPError):
        raise DataError(_remedy(url, path, f"the server answered {answer.code} {answer.reason}"))
    if isinstance(answer, Exception):
        raise DataError(_remedy(url, path, f"{getattr(answer, 'reason', answer)} (is there a network?)"))
    return answer


def check_network(url: str, what: str, remedy: str) -> None:
    """Raise a DataError within :data:`CONNECT_SECONDS` when a server cannot be reached (any answer will do)."""
    answer = _ask(url, method="HEAD")
    if answer is None or (isinstance(answer, Exception) and not isinstance(answer, HTTPError)):
        cause = "no answer in time; is there a network?" if answer is None else getattr(answer, "reason", answer)
        raise DataError(f"{what}: {url} cannot be reached ({cause}). {remedy}")


def _ask(url: str, method: str = "GET") -> Any:
    """The response, the exception, or None when neither came in time; a thread, as name resolution knows no limit."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "offpolicy"}, method=method)
            answer.append(urllib.request.urlopen(request, timeout=STALL_SECONDS))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answer[0] if answer else None


def _remedy(url: str, path: Path, cause: str) -> str:
    return (
        f"{url} could not be downloaded: {cause}. Put the file at {path} by hand, or pass a file of your own with "
        "`--data FILE`."
    )
