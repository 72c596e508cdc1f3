"""Files of plain values as torch writes them: archives of parts that are not packed, each with a checksum."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from offpolicy.files import atomic_file


def save_plain(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write plain values atomically and to the disk. Raises WriteError."""
    with atomic_file(path) as file, checksums():
        torch.save(content, file)


def load_plain(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read plain values to the CPU, and nothing else.

    Raises:
        ValueError: the file holds no dict, or whatever a damaged pickle raises.
    """
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a dict.")
    return loaded


def check_archive(file: Any) -> None:
    """Compare the parts of an open archive with their checksums (CRC-32).

    Files that are no archive, as torch wrote them long ago, have none and are left to torch. The parts are not packed,
    so that nothing in the file becomes larger than the file.

    Raises:
        ValueError: a part differs, or is packed.  OSError: the file cannot be read.
    """
    if file.read(4) != b"PK\3\4":
        return
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise ValueError(f"its part {part.filename} is packed, which torch does not do.")
            with archive.open(part) as content:
                while content.read(1 << 20):  # compares the checksum at the end
                    pass


@contextlib.contextmanager
def checksums() -> Iterator[None]:
    """Within it, torch writes checksums, whatever the process has chosen for its own files."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
