"""Memory of this process: the most it has held, and freed memory kept, so that the next update finds it mapped.

The C library of Linux gives large blocks back to the system as soon as they are freed, and an update of batch 256 or
more frees megabytes many times. Every page must then be mapped again at its next use, which can cost as much as a fifth
of an update. No effect on results.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch

# parameters of mallopt, from <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # bytes of one block; glibc accepts no more
TOTAL_KEPT = 512 * 2**20  # bytes, beyond which free memory is returned


def keep_freed_memory() -> bool:
    """From now on hold up to 512 MiB of freed memory instead of returning it to the system.

    Holds for the whole process and cannot be undone. Call it once before training on a CPU.

    Returns:
        Whether the C library took it: True with glibc, False elsewhere, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(
        mallopt(name, size) == 1 for name, size in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, TOTAL_KEPT))
    )


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held so far, MiB: on the GPU, else in all; NaN where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource  # Unix alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
