"""How much memory there is to be had. Nothing heavy is imported before a device is asked for."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

NO_LIMIT = 1 << 62
CGROUPS = (  # limit and use of the container that this process runs in, of version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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


def _of_machine() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return NO_LIMIT


def _of_container() -> int:
    for limit, use in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            return max(int(Path(limit).read_text()) - int(Path(use).read_text()), 0)
    return NO_LIMIT
