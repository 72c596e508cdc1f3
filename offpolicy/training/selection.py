"""The file in which a run folder says which checkpoint was selected without an environment.

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offpolicy.files import read_file

SELECTED = "selected.json"


def selection_of(folder: Path) -> dict[str, Any]:
    """What :mod:`offpolicy.training.selecting` has left in a run folder; empty where there is nothing of that kind."""
    try:
        found = json.loads(read_file(folder / SELECTED))
    except (OSError, ValueError, RecursionError):
        return {}
    usable = isinstance(found, dict) and isinstance(found.get("step"), int) and isinstance(found.get("updates"), int)
    return found if usable else {}
