"""Folders of runs made on the spot, as a run leaves them."""

from __future__ import annotations

from pathlib import Path

import yaml

from offpolicy.files import Table


def made_run(
    folder: Path,
    method: str = "BC",
    data: str = "maze",
    seed: int = 0,
    scores: tuple[float, ...] = (1.0, 2.0),
    column: str = "eval/score",
    planned: int | None = None,
    **options: object,
) -> Path:
    config = {
        "seed_everything": seed,
        "trainer": {"max_steps": planned or 10 * len(scores)},
        "model": {"class_path": f"lightning_modules.x.{method}", "init_args": options},
        "data": {"name": data, "source": "real"},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for i, score in enumerate(scores, 1):
        Table(folder / "evals.csv").append({"step": 10 * i, column: score, "score_kind": "made"})
    return folder


def three(root: Path, method: str, scores: list[float], data: str = "maze", **options: object) -> None:
    for seed, score in enumerate(scores):
        made_run(root / data / f"{method}{options}" / f"seed{seed}-1", method, data, seed, (90.0, score), **options)
