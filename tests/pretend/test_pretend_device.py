"""Every method trains, evaluates, goes on, acts and draws on a GPU, as far as devices and reads of the host go.

There is none here: a device of the processor's own memory stands for it (`pretend.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretend
import pytest
import toy

from lightning_modules import METHODS
from offpolicy.registry import find_method

TUNED = [name for name in METHODS if find_method(name).trains_on_texts]
COVERED = {kind for kind, _ in toy.METHODS.values()}
CONTROL = [*toy.METHODS, *(name for name in METHODS if name not in {*TUNED, *COVERED})]
reason = pretend.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(bool(reason), reason=reason),
    pytest.mark.timeout(1500),
    pytest.mark.slow,
    pytest.mark.xdist_group("pretend device"),  # the device is compiled and the methods run once
]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What every check of every method said, from one process, as its imports cost more than a method."""
    lines = run("runs.py", str(tmp_path_factory.mktemp("runs")), *CONTROL, *TUNED).splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith('{"name"')]
    return {row.pop("name"): row for row in rows}


def test_the_device_refuses_mixing_and_counts_reads() -> None:
    assert run("faults.py").splitlines()[-1] == "as a GPU"


@pytest.mark.parametrize("name", [*CONTROL, *TUNED])
def test_whole_runs(name: str, found: dict[str, dict[str, str]]) -> None:
    wrong = {check: error for check, error in found[name].items() if error}
    assert not wrong
