"""Files that anybody may have made: sizes are compared with the file and the memory before anything is made of them,
nothing leaves its folder or file, nothing is unpickled, and whatever a reader trips over is a :class:`DataError`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from offpolicy.compute.room import available_memory
from offpolicy.errors import DataError, UsageError
from offpolicy.files import WriteError

if TYPE_CHECKING:
    import h5py

LONGEST_HEADER = 1 << 16  # bytes of the head of a .npy file
SMALL = 64 << 20  # bytes: what may be made of a file of any size
RATIO = 1100  # bytes that a stored byte may become: a little more than deflate can do
TEXT_RATIO = 200  # the same of texts, which compress less


@contextlib.contextmanager
def faults(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong within, as a :class:`DataError` about the file.

    Raises:
        DataError: any error but our own.
    """
    try:
        yield
    except (UsageError, DataError, WriteError):
        raise
    except Exception as error:  # readers of damaged files raise almost anything
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); it is truncated, damaged or of another "
            "format. Check it, or make or fetch it again."
        ) from error


# -- sizes -------------------------------------------------------------------------------------------------------------


def check_size(where: Path | str, key: str, size: int, stored: int | None = None, ratio: int = RATIO) -> None:
    """Before room for something in a file is made.

    Args:
        where: the file.
        key: what it is, for the message.
        size: bytes it says it has.
        stored: bytes it takes in the file; None when that is not known.
        ratio: how many bytes one of those may become.

    Raises:
        DataError: the memory has no room for it, or the file cannot hold it.
    """
    if size < 0 or (stored is not None and size > max(SMALL, stored * ratio)):
        raise DataError(
            f"{where}: `{key}` says it has {size:,} bytes, of which the file holds {stored or 0:,}; it is damaged or "
            "was never filled. Make or fetch it again."
        )
    if size > SMALL and size > (room := available_memory()):
        raise DataError(
            f"{where}: `{key}` needs {size:,} bytes, and {room:,} bytes of memory are free. Take a smaller part of the "
            "data, or a machine with more memory."
        )


def gunzipped(raw: bytes, path: Path) -> bytes:
    """What gzip has packed, up to a size that texts can have.

    Raises:
        DataError: it is damaged, or would not end.
    """
    unpack, parts, size = zlib.decompressobj(wbits=31), [], 0
    limit = min(max(SMALL * 4, TEXT_RATIO * len(raw)), available_memory() // 2)
    try:
        while raw:
            part = unpack.decompress(raw, 1 << 22)
            parts.append(part)
            size += len(part)
            if size > limit:
                raise DataError(
                    f"{path} holds {len(unpack.unconsumed_tail):,} packed bytes more after {size:,} unpacked ones; "
                    "expected texts, which do not shrink that much. Unpack it yourself if it is right."
                )
            raw = unpack.unconsumed_tail
            if unpack.eof:  # a file may consist of several
                raw = unpack.unused_data
                if raw and not raw.strip(b"\0"):
                    break
                unpack = zlib.decompressobj(wbits=31) if raw else unpack
    except zlib.error as error:
        raise DataError(f"{path} cannot be read: {error}. Make or download it again.") from None
    if not unpack.eof:
        raise DataError(f"{path} cannot be read: it ends before its end is reached. Make or download it again.")
    return b"".join(parts)


# -- names and JSON ----------------------------------------------------------------------------------------------------


def inside(folder: Path, name: Any) -> Path:
    """The file of this name in a folder.

    Raises:
        DataError: the name is no plain file name, or what lies there leads out of the folder.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
    if not plain:
        raise DataError(f"{folder} names the file {name!r}; expected a plain file name in it. Make it again.")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{path} leads out of its folder, to {path.resolve()}; expected the file itself. Copy it there."
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}). Make or fetch it again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds {type(found).__name__}; expected an object of names and values. Correct it.")
    return found


# -- NumPy -------------------------------------------------------------------------------------------------------------


def npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, type, whether in the order of Fortran, and the bytes before the numbers of a .npy file.

    Raises:
        DataError: it is none, or holds pickled objects.
    """
    try:
        magic = file.read(8)
        if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
            raise ValueError("it does not begin as a .npy file")
        width = 2 if magic[6] == 1 else 4
        length = int.from_bytes(file.read(width), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"its head has {length:,} bytes")
        head = file.read(length)
        if len(head) != length:
            raise ValueError("it ends within its head")
        found = ast.literal_eval(head.decode("latin1" if magic[6] < 3 else "utf-8").strip())
        shape, dtype = found["shape"], np.lib.format.descr_to_dtype(found["descr"])
        if not (isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)):
            raise ValueError(f"its shape is {shape!r}")
        if len(shape) > 32 or prod(shape) >= 1 << 48:
            raise ValueError(f"its shape is {shape!r}")
    except Exception as error:  # a header is a Python literal, which can be wrong in many ways
        raise DataError(
            f"{where} cannot be read ({str(error)[:200]}); it is damaged. Make or fetch it again."
        ) from None
    if dtype.hasobject:
        raise DataError(
            f"{where} is not a plain array (it has type object). Pickled objects are never read, as opening them runs "
            "code; save numbers only."
        )
    return shape, dtype, bool(found.get("fortran_order")), 8 + width + length


def open_npy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """A .npy file, in memory or mapped, once its head fits its size.

    Raises:
        DataError: it is damaged, cut short, or holds pickled objects.
    """
    with faults(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        shape, dtype, _, before = npy_header(file, str(path))
        expected = before + prod(shape) * dtype.itemsize
        if size != expected:
            raise DataError(
                f"{path} cannot be read: it has {size:,} bytes; expected {expected:,} by its shape {shape}. Make or "
                "fetch it again."
            )
        if not mapped:
            check_size(path, path.name, expected)
        return np.load(path, mmap_mode="r" if mapped and 0 not in shape else None, allow_pickle=False)


def read_archive(path: Path, *, skip: Collection[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of an archive but those to skip, by name, once their heads fit their sizes.

    Raises:
        DataError: it is damaged, cut short, or holds pickled objects.
    """
    found = {}
    with faults(path), zipfile.ZipFile(path) as archive:
        members = [one for one in archive.infolist() if one.filename.removesuffix(".npy") not in skip]
        total = sum(one.file_size for one in members)
        check_size(path, "all arrays", total, max(path.stat().st_size, sum(one.compress_size for one in members)))
        for one in members:
            key = one.filename.removesuffix(".npy")
            if key in found:
                raise DataError(f"{path} holds `{key}` twice; expected each array once. Make it again.")
            with faults(f"{path}: `{key}`"), archive.open(one) as file:
                shape, dtype, fortran, before = npy_header(file, f"{path}: `{key}`")
                if before + prod(shape) * dtype.itemsize != one.file_size:
                    raise DataError(
                        f"{path}: `{key}` has {one.file_size - before:,} bytes, which its shape {shape} of {dtype} "
                        "does not fit; the file is damaged. Make or fetch it again."
                    )
                array = np.empty(prod(shape), dtype)
                whole: Any = array.view(np.uint8) if array.nbytes else b""
                view = memoryview(whole).cast("B")
                at = 0
                while at < len(view):
                    count = file.readinto(view[at : at + (1 << 24)])  # type: ignore[attr-defined]
                    if not count:
                        raise EOFError(f"`{key}` ends after {at:,} bytes")
                    at += count
                if file.read(1):  # reads to the end, where the checksum is compared
                    raise ValueError(f"`{key}` has more bytes than its shape")
            found[key] = array.reshape(shape, order="F" if fortran else "C")
    return found


# -- HDF5 --------------------------------------------------------------------------------------------------------------


def check_links(file: h5py.File, path: Path) -> None:
    """Refuse an HDF5 file whose links lead into other files.

    Raises:
        DataError: one of them does.
    """
    from h5py import h5l

    def look(name: bytes, info: Any) -> str | None:
        return name.decode(errors="replace") if info.type not in (h5l.TYPE_HARD, h5l.TYPE_SOFT) else None

    out = file.id.links.visit(look, info=True)
    if out is not None:
        target = getattr(file.get(out, getlink=True), "filename", "of a kind that is not known")
        raise DataError(
            f"{path}: `{out}` is a link to another file ({target}), which is not followed; expected the data in this "
            "one. Copy the column into it (`h5repack` or h5py's `copy` with `expand_external=True`)."
        )


def check_dataset(dataset: Any, path: Path, key: str, *, size: bool = True) -> None:
    """Refuse a data set whose numbers lie in another file, or that says it has more than the file holds.

    Args:
        dataset: of the low level of h5py, ``h5py.h5d.DatasetID``.
        size: compare sizes too, which takes most of the time; for where they are known otherwise.

    Raises:
        DataError: it is such a one.
    """
    if dataset.get_offset() is None:  # not in one piece of this file
        from h5py import h5d

        plist = dataset.get_create_plist()
        if plist.get_external_count() or plist.get_layout() == h5d.VIRTUAL:
            raise DataError(
                f"{path}: the numbers of `{key}` lie in another file (external storage or a virtual data set), which "
                "is not followed; expected them in the file. Copy them there (h5repack, or h5py)."
            )
    if size:
        found = prod(dataset.shape or (1,)) * dataset.dtype.itemsize
        check_size(path, key, found, dataset.get_storage_size())


def unwritten(dataset: Any) -> float:
    """The share of a data set (``h5py.h5d.DatasetID``) that was never written, in [0, 1]: it reads as zeros."""
    from h5py import h5d

    plist = dataset.get_create_plist()
    if plist.get_layout() != h5d.CHUNKED:
        return float(prod(dataset.shape or ()) > 0 and dataset.get_storage_size() == 0)
    whole = prod(-(-rows // chunk) for rows, chunk in zip(dataset.shape, plist.get_chunk()))
    return 1 - dataset.get_num_chunks() / whole if whole else 0.0


def check_heaps(path: Path) -> None:
    """Refuse an HDF5 file with a broken heap of texts of any length, on which its library would loop without an end.

    Only needed before such a text is read. Heaps are found by their mark; layout: HDF5 file format, III.E.

    Raises:
        DataError: the objects of a heap do not fill it.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(b"GCOL\1\0\0\0")
        while at >= 0:
            size = int.from_bytes(content[at + 8 : at + 16], "little")
            place, end = at + 16, at + size
            while 16 <= size <= len(content) - at and place + 16 <= end:
                number = int.from_bytes(content[place : place + 2], "little")
                length = int.from_bytes(content[place + 8 : place + 16], "little")
                step = 16 + (length + 7) // 8 * 8 if number else length  # 0 is what is free, its head included
                if step < 16:
                    raise DataError(f"{path} is damaged: a heap of texts does not end. Make or fetch it again.")
                place += step
            at = content.find(b"GCOL\1\0\0\0", at + 8)


# -- Arrow -------------------------------------------------------------------------------------------------------------


def checked_table(table: Any) -> Any:
    """An Arrow table whose offsets and texts are right; reading one that is damaged would crash."""
    table.validate(full=True)
    return table


def check_parquet(path: Path) -> int:
    """Rows of a Parquet file, once their number fits the file and the memory.

    Raises:
        DataError: it is damaged, or says it has more than there can be.
    """
    import pyarrow.parquet as parquet

    with faults(path):
        size, metadata = path.stat().st_size, parquet.read_metadata(path)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        if metadata.num_rows < 0 or metadata.num_rows != sum(group.num_rows for group in groups):
            raise DataError(f"{path} says it has {metadata.num_rows:,} rows; its parts have others. It is damaged.")
        check_size(path, "rows", metadata.num_rows * max(1, metadata.num_columns), size, ratio=10_000)
        check_size(path, "columns", sum(group.total_byte_size for group in groups), size, ratio=10_000)
        return metadata.num_rows
