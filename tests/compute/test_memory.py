"""Freed memory stays mapped."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from offpolicy.compute.memory import keep_freed_memory
torch.set_num_threads(1)
assert keep_freed_memory()
def work():
    kept = [torch.ones(2**18) for _ in range(8)]  # 8 MiB, freed at once on return
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="concerns glibc")
def test_pages_are_not_mapped_again() -> None:
    """20 rounds touch 40,960 pages of 4 KiB; kept memory needs next to none of them mapped again."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000
