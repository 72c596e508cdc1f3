"""Whether several threads help: beside other work on the same cores they wait for each other at every operation.

The threads of one operation end together. Where another program has one of their cores, each operation takes as long as
that program may keep it, some milliseconds, instead of some microseconds.
"""

from __future__ import annotations

import resource
import time

import torch

SIZE = 256  # of a product as networks of control have them
TIMES, LONGEST = 20, 0.05  # products of one measurement, and seconds after which it stops
WORSE = 1.5  # times as long as on one thread


def times_displaced() -> int:
    """How often the system has taken a core away from this process, which has to do with other work alone."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def product_seconds(threads: int) -> float:
    """Mean time of a small product on so many threads; the setting of the process is put back."""
    before, one = torch.get_num_threads(), torch.ones(SIZE, SIZE, device="cpu")
    torch.set_num_threads(threads)
    try:
        one @ one  # wakes the threads
        began, made = time.perf_counter(), 0
        while made < TIMES and time.perf_counter() - began < LONGEST:
            one @ one
            made += 1
        return (time.perf_counter() - began) / made
    finally:
        torch.set_num_threads(before)


def threads_in_the_way() -> str:
    """What a product takes on the threads of this process and on one, in words, if one is much faster; else empty."""
    threads = torch.get_num_threads()
    alone, together = product_seconds(1), product_seconds(threads)
    if threads == 1 or together < WORSE * alone:
        return ""
    return (
        f"a product of {SIZE} × {SIZE} numbers takes {together * 1e3:.2g} ms on {threads} threads and "
        f"{alone * 1e3:.2g} ms on 1"
    )
