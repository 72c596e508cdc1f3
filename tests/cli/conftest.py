from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in the folder `home`, which the test's file fills with data and a user's own modules."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("OFFPOLICY_REF_CACHE", str(home / "references"))
    yield
    for module in home.glob("own_*.py"):
        sys.modules.pop(module.stem, None)
