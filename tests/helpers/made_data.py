"""Small data made on the spot: columns of walks, rows of problems, and what a hostile file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data.texts.problems import ProblemData


def walks(rows: int, **columns: Any) -> dict[str, Any]:
    """Columns of random steps with observations (N, 3) and actions (N, 2), none terminated, and others.

    Args:
        rows: N.
        columns: more of them, or others in place of these; None leaves a column out.
    """
    rng = np.random.default_rng(0)
    data = {
        "obs": rng.normal(size=(rows, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "reward": rng.normal(size=rows).astype(np.float32),
        "terminated": np.zeros(rows, bool),
        **columns,
    }
    return {name: column for name, column in data.items() if column is not None}


def problem_data(folder: Path, rows: list[dict[str, Any]], tokenizer: str, **options: Any) -> ProblemData:
    """These problems, written into the folder and opened, all of them for training."""
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ProblemData(str(path), tokenizer=tokenizer, **{"eval_fraction": 0.0, **options})
    data.load()
    return data


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)
