from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forks import run_pair
from tiny import make_policy


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder in which two processes of the test's file trained a tiny policy, and what each of them found."""
    root = tmp_path_factory.mktemp("pair")
    make_policy(root / "policy")
    return root, run_pair(request.module.main, root)
