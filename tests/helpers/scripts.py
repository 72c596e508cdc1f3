"""Where things stand, and how tests start Python again: in a process that finds the tree and these helpers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports this tree and these helpers on one thread, with more variables."""
    paths = os.pathsep.join([str(ROOT), str(HELPERS)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}


def run_python(
    *arguments: Any, timeout: float = 200, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments such as ``"-c", code`` or the path of a script, and wait for its end."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=timeout
    )
