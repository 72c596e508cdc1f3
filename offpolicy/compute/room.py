"""How much memory there is to be had. Nothing heavy is imported before a device is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_LIMIT = 1 << 62
# where control groups of containers and of schedulers say their limits, and which this process is in
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can be had without swapping, as far as the system and the limit of a container tell."""
    return min(_of_machine(), _of_container())


def free_memory(device: Any) -> int:
    """Bytes that a device (a ``torch.device``) has free: its own of a GPU, else those of the machine.

    :data:`NO_LIMIT` where a device does not tell.
    """
    if device.type == "cpu":
        return available_memory()
    with contextlib.suppress(ImportError, RuntimeError, AssertionError, AttributeError):
        import torch

        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0])
    return NO_LIMIT


def size(count: float) -> str:
    """Bytes in words, 1 GB being 10⁹."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _of_machine() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return NO_LIMIT


def _of_container() -> int:
    """What the tightest of the groups of this process leaves; pages of files that were read can be had again."""
    least = NO_LIMIT
    for folder, limit, use, reclaimable in _groups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left = int((folder / limit).read_text()) - int((folder / use).read_text())
            least = min(least, max(left + _stat(folder / "memory.stat", reclaimable), 0))
    return least


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folder of each group from the process's own up to the root, and its names of limit, use and pages of files."""
    paths = {"": "/", "memory": "/"}  # by controller; version 2 has none
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            paths |= {name: path for name in controllers.split(",") if name in paths}
    for own in (Path(paths[""]), *Path(paths[""]).parents):
        yield CGROUPS / own.relative_to("/"), "memory.max", "memory.current", "inactive_file"
    for own in (Path(paths["memory"]), *Path(paths["memory"]).parents):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        yield CGROUPS / "memory" / own.relative_to("/"), *names


def _stat(file: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name), 0)
    return 0
