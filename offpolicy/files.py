"""Small files that are either whole or absent: atomic writes, tables by update number, run folders."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from offpolicy.errors import DataError
from offpolicy.moved import names_of

Value = int | float | str
MARGINS = "margins.csv"  # of a run on pairs: the margin of each at the newest evaluation
LONGEST = 200  # bytes of a name made safe; file systems take 255, and some are put before and behind it
PLACES = "seeds.json"  # in a joint folder: seed → its folder, as seen from there
__getattr__ = names_of("offpolicy.files")  # what stood here in version 0.1


class WriteError(OSError):
    """A file could not be written; the message names the file, the cause and what to do. `errno` is kept."""

    @classmethod
    def of(cls, error: OSError, path: Path, written: int = 0) -> WriteError:
        """The clear form of `error`, met while writing `path` after `written` bytes."""
        cause = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            after = f" after {written:,} bytes{_free(path.parent)}"
            remedy = "Free some space or choose another folder"
        else:
            after, remedy = "", "Choose a folder you may write to"
        message = f"Could not write {path}: {cause}{after}. {remedy}; files written earlier are unchanged."
        return cls(error.errno, message)

    def __str__(self) -> str:
        return str(self.args[1]) if len(self.args) > 1 else super().__str__()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends without an error.

    The bytes go to a temporary name in the same folder (so the final rename never copies), are flushed to the disk,
    and then replace `path` in one step. Whatever happens before that step, an earlier file of that name is untouched.
    Missing folders are made. A killed process leaves at most a stray ``.<name>.<pid>.tmp`` (see :func:`is_stray`).

    Raises:
        WriteError: full disk, read-only folder, or another fault of the file system. The temporary is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file: BinaryIO | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = cast(BinaryIO, open(temporary, "wb"))  # noqa: SIM115 - closed below, before the rename
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        written = _size(temporary)
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()  # may try to flush once more
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None or isinstance(cause, WriteError):
            raise
        raise WriteError.of(cause, path, written) from error


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a whole small file, or leave what was there (text as UTF-8). Raises :class:`WriteError`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def atomic_copy(source: Path, target: Path, copy: Callable[[str, str], Any] = shutil.copy2) -> None:
    """Copy a folder, which is whole under the name of the target or not there; one of that name is replaced.

    A killed process leaves at most a stray ``.<name>.<pid>.tmp``.

    Args:
        source, target: folders.
        copy: copies a file to a path.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that had the same number
    try:
        shutil.copytree(source, temporary, copy_function=copy)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_stray(path: Path) -> bool:
    """Whether `path` is a temporary that a killed process left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


class Table:
    """A CSV file of rows by update number: `step` first, appended row by row, safe to kill at any moment.

    A row is handed to the operating system in one piece before :meth:`append` returns. New columns may appear at any
    time: the file is then rewritten atomically with a longer header and empty cells in the earlier rows. A last line
    that was torn by a kill (it has no line end) is dropped, and only that line. One process writes; any may read.
    Every row carries the column `step`, the update count.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.columns: list[str] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row at the end.

        Args:
            row: name -> number, 0-d tensor, text or None (an empty cell). `step` must be there. Numbers are written
                so that they read back bit-equal.

        Raises:
            ValueError: no `step` in the row.
            WriteError: full disk or read-only folder; the file keeps its earlier rows.
        """
        if "step" not in row:
            raise ValueError(f"a row of {self.path.name} has {sorted(row)}; expected `step`, the update count. Add it.")
        if not self.columns or not self.path.exists():
            self._open()
        new = [name for name in row if name not in self.columns and name != "step"]
        if new or not self.columns:
            self.columns = ["step", *self.columns[1:], *new]
            self._rewrite(self._read())
        cells = [_cell(row.get(name)) for name in self.columns]
        self._append_bytes(_encode([_line(cells)]))

    def rows(self) -> list[dict[str, Value]]:
        """All rows in order, numbers parsed, empty cells left out. Reads only: safe while another process writes."""
        return [{name: _parse(cell) for name, cell in row.items() if cell != ""} for row in self._read()]

    def cut(self, after_step: int) -> int:
        """Remove the rows with `step` > `after_step`, atomically, and return how many went.

        Every other row stays, byte by byte.
        """
        if not self.path.exists():
            return 0
        header, *lines = _whole_lines(self.path) or [""]
        kept = [line for line in lines if not _step(line) > after_step]
        if len(kept) < len(lines):
            atomic_write(self.path, _encode([header, *kept]))
        return len(lines) - len(kept)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put these rows in place of all there are, atomically; no file is made for no rows."""
        rows = list(rows)
        if not rows and not self.path.exists():
            return
        self.columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        lines = [_line(self.columns), *(_line([_cell(row.get(name)) for name in self.columns]) for row in rows)]
        if _whole_lines(self.path) != lines:
            atomic_write(self.path, _encode(lines))

    def _open(self) -> None:
        """Take over what is on disk, without a torn last line."""
        self.columns = []
        lines = _whole_lines(self.path)
        if lines:
            try:
                self.columns = next(csv.reader(lines[:1]))
            except csv.Error as error:
                raise DataError(f"{self.path} is damaged ({error}). Move it away to go on without it.") from None
        content = _encode(lines)
        if _size(self.path) > len(content):
            atomic_write(self.path, content)

    def _read(self) -> list[dict[str, str]]:
        try:
            return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(_whole_lines(self.path))]
        except csv.Error as error:
            raise DataError(f"{self.path} is damaged ({error}). Move it away to go on without it.") from None

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        body = [_line([row.get(name, "") for name in self.columns]) for row in rows]
        atomic_write(self.path, _encode([_line(self.columns), *body]))

    def _append_bytes(self, line: bytes) -> None:
        size = _size(self.path)
        try:
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(line)
                if written != len(line):  # a disk that fills up takes a part of the line first
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise WriteError.of(error, self.path, size) from error


def unique_run_folder(root: str | os.PathLike[str], data: str, method: str, seed: int) -> Path:
    """Make and return a new folder `<root>/<data>/<method>/seed<seed>-<n>`, n one above the largest there is.

    Characters of the names that are not letters, digits, `.`, `_`, `+` or `-` (slashes above all) become `-`.

    Raises:
        WriteError: the folder cannot be made.
    """
    return numbered_folder(method_folder(root, data, method), f"seed{seed}")


def numbered_folder(parent: Path, label: str) -> Path:
    """Make and return a new folder `<parent>/<label>-<n>`, n one above the largest there is.

    Raises:
        WriteError: the folder cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        found = (re.fullmatch(rf"{re.escape(label)}-(\d+)", p.name) for p in parent.iterdir())
        n = max((int(match[1]) for match in found if match), default=0) + 1
        while True:  # two processes may ask at the same moment: mkdir decides
            with contextlib.suppress(FileExistsError):
                folder = parent / f"{label}-{n}"
                folder.mkdir()
                return folder
            n += 1
    except OSError as error:
        raise WriteError.of(error, parent) from error


def known_folders(joint: Path) -> dict[int, Path]:
    """The folders of the seeds of a joint run, as it keeps them; those that lie neither in it nor beside it are not
    taken, as the file may be anybody's."""
    found = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for seed, place in json.loads(read_file(joint / PLACES)).items():
            if re.fullmatch(rf"(\.\./)?seed{int(seed)}(-\d+)?", str(place)):
                found[int(seed)] = joint / place if not place.startswith("../") else joint.parent / place[3:]
    return found


def method_folder(root: str | os.PathLike[str], data: str, method: str) -> Path:
    """Where the runs of one method on one data set lie: `<root>/<data>/<method>`, names made safe."""
    return Path(root) / safe_name(data) / safe_name(method)


def safe_name(name: str) -> str:
    """`name` as one folder name: 'D4RL/pen/human-v2' -> 'D4RL-pen-human-v2'."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.").encode()[:LONGEST].decode(errors="ignore") or "unnamed"


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: there is none, or a folder or a pipe in its place, which would be waited for without an end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file", str(path))
    return path.read_bytes()


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; none when there is no file."""
    if not path.is_file():
        return []
    text = read_file(path).decode(errors="surrogateescape")
    return [line + "\n" for line in text.split("\n")[:-1]]


def _encode(lines: Iterable[str]) -> bytes:
    return "".join(lines).encode(errors="surrogateescape")  # foreign bytes stay what they were


def _line(cells: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if hasattr(value, "item"):  # NumPy scalar or 0-d tensor
        value = value.item()
    if isinstance(value, bool):
        value = int(value)
    return " ".join(str(value).splitlines())  # str(float) is the shortest text that reads back bit-equal


def _parse(cell: str) -> Value:
    for kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            float(found := kind(cell))  # whole numbers may be too large for one
            return found
    return cell


def _step(line: str) -> float:
    try:
        return float(line.split(",", 1)[0])
    except ValueError:
        return -math.inf  # not a row of ours: keep it


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`; torch's archive writer hides it behind a RuntimeError of its own."""
    if isinstance(error, OSError) or error is None:
        return error
    return _os_error(error.__context__) if isinstance(error, RuntimeError) else None


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, where the system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _free(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free:,} bytes free)"
    except OSError:
        return ""
