"""The picture of a run: what its tables hold, drawn by update number."""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path
from typing import Any

from offpolicy.evaluation.scores import FEWEST, interval
from offpolicy.files import Table, Value, atomic_write
from offpolicy.training.headlines import HEADLINES

Columns = dict[str, tuple[list[float], list[float]]]  # name -> (steps, values)
STD = "_seed_std"  # ends the name of a standard deviation over seeds
COUNTS = ("version", "steps")  # of synthetic data: no curves
VALUES = ("q_mean", "v_mean", "accuracies", "margins")
JUDGES = (*(one.name.removeprefix("eval/") for one in HEADLINES), "loss")


def plot_curves(folder: str | os.PathLike[str], title: str | None = None) -> Path | None:
    """Draw `curves.png` of a run folder from its `metrics.csv` and `evals.csv`.

    Panels, each only when there is something in it: the number by which evaluations are judged (the score, the return
    when there are no reference scores, …) with one standard deviation over episodes, the losses, a health number (mean
    Q, accuracy, margin), and what was measured on synthetic data. Of several seeds the means: evaluations with the 95 %
    interval (from three seeds on) and each seed by itself, metrics with one standard deviation over seeds.

    Args:
        folder: a run folder; its last two or three names become the title unless `title` is given.

    Returns:
        The path of the picture, or None when there is nothing to draw yet.
    """
    folder = Path(folder)
    evals, metrics = (Table(folder / name).rows() for name in ("evals.csv", "metrics.csv"))
    (judged, seeds), (curves, _) = map(_by_seed, (_columns(evals), _columns(metrics)))
    name = next((name for judge in JUDGES for name in judged if name.removeprefix("eval/") == judge), None)
    groups = {
        "training losses": {k: v for k, v in curves.items() if "loss" in k},
        "training values": {k: v for k, v in curves.items() if k.removesuffix(STD).endswith(VALUES)},
        "synthetic data": {k: v for k, v in curves.items() if k.startswith("synthetic/") and not k.endswith(COUNTS)},
    }
    panels = [kind for kind, shown in (("eval", name), *groups.items()) if shown]
    if not panels:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would keep global state and ask for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    heading = title or " · ".join(folder.resolve().parts[-3:])
    for i, kind in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1, xlabel="updates")
        axes.grid(alpha=0.3)
        if kind == "eval" and name is not None:
            heading += "\n" + _draw_evaluation(axes, judged, name, seeds.get(name, {}))
        else:
            _draw_metrics(axes, groups[kind], kind)
    figure.suptitle(heading, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(folder / "curves.png", picture.getvalue())
    return folder / "curves.png"


def _draw_evaluation(axes: Any, columns: Columns, name: str, seeds: Columns) -> str:
    """One curve with its spread. Returns the words for the title: last and best."""
    steps, values = columns[name]
    axes.plot(steps, values, marker="o", markersize=3, label=f"mean of {len(seeds)} seeds" if seeds else None)
    spread = columns.get(name.removesuffix("_mean") + "_std")
    if seeds:
        _draw_seeds(axes, steps, values, seeds)
    elif spread is not None and spread[0] == steps:
        low, high = ([v + sign * s for v, s in zip(values, spread[1])] for sign in (-1, 1))
        axes.fill_between(steps, low, high, alpha=0.2, linewidth=0, label="± 1 std over episodes")
        axes.legend(fontsize=7)
    label = name.rpartition("/")[2].removesuffix("_mean")
    axes.set_title(f"evaluation {label}", fontsize=9)
    best = (min if "loss" in label else max)((v for v in values if not math.isnan(v)), default=math.nan)
    return f"{label}: last {values[-1]:.4g}, best {best:.4g}"


def _draw_seeds(axes: Any, steps: list[float], values: list[float], seeds: Columns) -> None:
    """Each seed as a faint line, and the interval of their mean as a band."""
    for i, (own_steps, own) in enumerate(seeds.values()):
        axes.plot(own_steps, own, linewidth=0.7, alpha=0.35, color="0.3", label=None if i else "each seed")
    if len(seeds) >= FEWEST and all(own_steps == steps for own_steps, _ in seeds.values()):
        half = [interval(each) for each in zip(*(own for _, own in seeds.values()))]
        low, high = ([v + sign * h for v, h in zip(values, half)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, alpha=0.25, linewidth=0, label="95 % interval of the mean")
    axes.legend(fontsize=7)


def _draw_metrics(axes: Any, columns: Columns, title: str) -> None:
    """Up to five curves of metrics, of several seeds with their spread."""
    shown = {name: curve for name, curve in columns.items() if not name.endswith(STD)}
    shown = dict(list(shown.items())[:5])
    for name, (steps, values) in shown.items():
        rare = "." if name.startswith("synthetic/") else None
        label = name.removeprefix("train/").removeprefix("synthetic/")
        (line,) = axes.plot(steps, values, linewidth=1, marker=rare, label=label)
        std_steps, std = columns.get(name + STD, ([], []))
        if std_steps == steps:
            low, high = ([v + sign * s for v, s in zip(values, std)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, alpha=0.2, linewidth=0, color=line.get_color())
            title += " (± 1 std over seeds)" * ("std" not in title)
    if "losses" in title and all(v > 0 for _, values in shown.values() for v in values):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)


def _by_seed(columns: Columns) -> tuple[Columns, dict[str, Columns]]:
    """The columns that are not of one seed, and those of each seed by the name of the number and the seed."""
    rest: Columns = {}
    seeds: dict[str, Columns] = {}
    for name, curve in columns.items():
        match = re.fullmatch(r"(.+)_seed(\d+)", name)
        if match:
            seeds.setdefault(match[1], {})[match[2]] = curve
        else:
            rest[name] = curve
    return rest, seeds


def _columns(rows: list[dict[str, Value]]) -> Columns:
    """The non-empty numeric cells of every column."""
    columns: Columns = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str) and not isinstance(row.get("step", ""), str):
                shown = name.encode(errors="replace").decode().replace("$", "S")  # what a picture can write
                steps, values = columns.setdefault(shown, ([], []))
                steps.append(float(row["step"]))
                values.append(value)
    return columns
