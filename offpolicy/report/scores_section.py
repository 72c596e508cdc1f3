"""Sections on what runs are judged by: tables, aggregates, profiles, comparisons, curves, published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.evaluation.aggregates import bootstrap_interval, performance_profile, probability_of_improvement
from offpolicy.evaluation.scores import FEWEST, interval
from offpolicy.report.curves import MeanCurve, line_of, mean_curve, suite_curve, switch_place
from offpolicy.report.figures import Drawn, Look, draw_aggregates, draw_improvement, draw_panels, draw_profiles
from offpolicy.report.page import Section, notes, shown_figure, unknown
from offpolicy.report.published import published_for, published_seed_scores
from offpolicy.report.records import RunRecord
from offpolicy.report.runs import Run
from offpolicy.report.runs_section import Labels, by_cell
from offpolicy.report.tables import (
    Cell,
    Comparison,
    Estimate,
    aggregates_of,
    as_rows,
    score_matrix,
)
from offpolicy.report.writing import Markup, csv_text, html_table, latex_table, tag
from offpolicy.training.selection import selection_of

FEW = f"Fewer than {FEWEST} seeds have no band: their points are shown, as {FEWEST - 1} say nothing of their spread."


@dataclass
class Material:
    """What sections are made of.

    Attributes:
        records: all runs.
        labels: of the method of each run, by its folder.
        looks: of all methods.
        axis: of curves.
        figures: folder of their files.
        files: text files by their path under the report.
    """

    records: Sequence[RunRecord]
    labels: Labels
    looks: Mapping[str, Look]
    axis: str
    figures: Path
    files: dict[str, str]


def score_sections(found: Comparison, best: Comparison, column: str, material: Material, one: bool) -> list[Section]:
    """The sections of one measure.

    Args:
        found, best: comparisons of the last and of the best evaluations.
        column: of the measure.
        material: of the report.
        one: whether this is the only measure, which then needs no name.
    """
    name, ending = found.measure.replace("@", "-"), "" if one else f": {found.measure}"
    table = Section(f"table-{name}", f"Table{ending}", main_table(found, name, material))
    three = Section(f"evaluations-{name}", f"Last, best, selected offline{ending}", three_scores(found, best))
    suite = Section(f"aggregates-{name}", f"Aggregates{ending}", suite_parts(found, name, material))
    curves = Section(f"curves-{name}", f"Learning curves{ending}", curve_parts(column, found.measure, name, material))
    beside = Section(f"published-{name}", f"Beside published numbers{ending}", published_parts(found))
    return [table, three, suite, beside, curves]


def main_table(found: Comparison, name: str, material: Material) -> list[Markup]:
    """Methods by tasks, as a table of the page, CSV and LaTeX."""
    rows, plain = [], []
    for task in found.tasks:
        cells = [found.cells.get((task, method), Cell()) for method in found.methods]
        texts = [found.told(cell) for cell in cells]
        plain.append([task, *texts])
        rows.append([task, *(_cell(text, cell) for text, cell in zip(texts, cells))])
    lines = aggregates_of(found)
    for title, estimates in lines.items():
        texts = ["–" if one is None else one.told() for one in estimates]
        plain.append([title, *texts])
        rows.append([tag("em", title), *texts])
    caption = (
        f"{found.measure}, last evaluation of each run: mean ± half of Student's 95 % interval (number of seeds). "
        "Bold: the best mean of a row, and those that Welch's test at 5 % does not tell from it."
    )
    material.files[f"tables/{name}.csv"] = csv_text(as_rows(found))
    material.files[f"tables/{name}.tex"] = latex_table(["task", *found.methods], plain, caption, found.notes)
    comparisons = sum(max(0, sum((task, m) in found.cells for m in found.methods) - 1) for task in found.tasks)
    told = [f"{comparisons} tests were made, without a correction for their number."] if comparisons > 1 else []
    links = tag("p", *_links(f"tables/{name}.csv", f"tables/{name}.tex"), class_="soft")
    if not found.cells:
        return notes(found.notes)
    return [html_table(["task", *found.methods], rows, caption), links, *notes([*found.notes, *told])]


def _cell(text: str, cell: Cell) -> Any:
    shown = tag("strong", text.removesuffix("*")) if cell.among_the_best else text
    if not cell.values:
        return unknown("not run"), ""
    return shown, cell.mean


def _links(*paths: str) -> list[Markup]:
    return [Markup(f"{tag('a', path, href=path)} ") for path in paths]


def three_scores(found: Comparison, best: Comparison) -> list[Markup]:
    """Last, best and offline-selected scores side by side."""
    rows = []
    for (task, method), cell in sorted(found.cells.items()):
        at_best = best.cells.get((task, method), Cell())
        chosen = [selected(run, best_column(run)) for run in cell.runs]
        known = [value for value in chosen if value is not None]
        third: Any = (unknown("nothing selected"), "")
        if known and len(known) == len(chosen):
            third = _told(known, found), float(np.mean(known))
        rows.append(
            [task, method, (_told(cell.values, found), cell.mean), (_told(at_best.values, found), at_best.mean), third]
        )
    words = (
        "“Best” is chosen by the evaluations themselves and so looks better than it is. “Selected offline” is the "
        "evaluation at the checkpoint that --run.select or else the held-out loss chooses, which needs no environment."
    )
    head = ["task", "method", "last", "best", "selected offline"]
    return [tag("p", words), html_table(head, rows)] if rows else []


def best_column(run: Run) -> str:
    return run.judged_by() or ""


def selected(run: Run, column: str) -> float | None:
    """The number of a run at the checkpoint that `run.select` chose, or else the one with the lowest held-out loss.

    None where nothing was chosen, or was not evaluated.
    """
    if column == "eval/loss":
        return None
    if chosen := selection_of(run.folder):
        at = [row[column] for row in run.rows if row.get("step") == chosen["step"] and column in row]
        return float(at[0]) if at else None
    rows = [row for row in run.rows if isinstance(row.get("eval/loss"), float) and column in row]
    return float(min(rows, key=lambda row: row["eval/loss"])[column]) if rows else None


def _told(values: Sequence[float], found: Comparison) -> str:
    return found.told(Cell(values=list(values))) if values else "–"


# -- over all tasks ----------------------------------------------------------------------------------------------------


def suite_parts(found: Comparison, name: str, material: Material) -> list[Markup]:
    """Aggregates, profiles and probabilities of improvement."""
    if found.measure != "score" or not found.cells:
        return []
    parts: list[Markup] = []
    looks = {method: material.looks[method] for method in found.methods}
    lines = aggregates_of(found)
    matrices = {m: x for m in found.methods if (x := score_matrix(found, m, FEWEST)) is not None}
    if lines:
        words = (
            "Over tasks and seeds with 95 % intervals of the stratified bootstrap (20,000 replicates, "
            "arXiv:2108.13264). Of the optimality gap less is better."
        )
        parts += [tag("p", words), shown_figure(draw_aggregates(f"aggregates-{name}", lines, looks, material.figures))]
    if matrices:
        drawn = profiles(matrices, f"profiles-{name}", looks, material)
        words = "Performance profiles: the share of runs above a score, over all tasks, with 95 % bands."
        parts += [shown_figure(one, words) for one in drawn]
        parts += improvement(found, matrices, name, material)
    else:
        parts.append(
            tag("p", f"No method has {FEWEST} seeds on every task, so there are no profiles and no tests here.")
        )
    return parts


def profiles(
    matrices: Mapping[str, np.ndarray], name: str, looks: Mapping[str, Look], material: Material
) -> list[Drawn]:
    """Profiles of methods with their bands."""
    every = np.concatenate([x.ravel() for x in matrices.values()])
    thresholds = np.linspace(min(0.0, float(every.min())), max(1.0, float(every.max())), 61)
    found = {}
    for method, x in matrices.items():
        low, high = bootstrap_interval(lambda y: performance_profile(y, thresholds), x, replicates=2000)
        at = 100.0 * thresholds
        found[method] = MeanCurve(at, performance_profile(x, thresholds), low, high, ())
    return draw_profiles(name, 100.0 * thresholds, found, looks, material.figures)


def improvement(found: Comparison, matrices: Mapping[str, np.ndarray], name: str, material: Material) -> list[Markup]:
    """How likely a run of one method beats one of another: all pairs as a table, the best against all as a figure."""
    if len(matrices) < 2:
        return []
    pairs: dict[tuple[str, str], Estimate] = {}
    for x in matrices:
        for y in matrices:
            if x != y:
                low, high = bootstrap_interval(probability_of_improvement, matrices[x], matrices[y], replicates=2000)
                value = float(probability_of_improvement(matrices[x], matrices[y]))
                pairs[x, y] = Estimate(value, float(low), float(high))
    best = max(matrices, key=lambda method: float(matrices[method].mean()))
    others = {y: one for (x, y), one in pairs.items() if x == best}
    drawn = draw_improvement(f"improvement-{name}", best, others, material.looks[best], material.figures)
    rows = [[x, *("–" if x == y else (pairs[x, y].told(2), pairs[x, y].value) for y in matrices)] for x in matrices]
    words = "P(row > column): how likely a run of the row beats one of the column on a task, ties as one half."
    return [shown_figure(drawn), html_table(["", *matrices], rows, words)]


# -- curves ------------------------------------------------------------------------------------------------------------


def mean_curves(column: str, material: Material, *, of_metrics: bool = False) -> dict[str, dict[str, MeanCurve]]:
    """Curves of a column by task and method."""
    found: dict[str, dict[str, MeanCurve]] = {}
    for (task, method), some in by_cell(material.records, material.labels).items():
        runs = newest(some)
        curve = mean_curve([line_of(one, column, material.axis, of_metrics=of_metrics) for one in runs])
        if curve is not None:
            found.setdefault(task, {})[method] = replace(curve, switch=switch_place(runs, material.axis))
    return found


def newest(records: Sequence[RunRecord]) -> list[RunRecord]:
    """One run of each seed: a finished one if there is, else the one with most updates."""
    found: dict[int, RunRecord] = {}
    for one in sorted(records, key=lambda one: (one.run.finished, one.run.updates, str(one.run.folder))):
        found[one.run.seed] = one
    return [found[seed] for seed in sorted(found)]


def curve_parts(column: str, measure: str, name: str, material: Material) -> list[Markup]:
    """Learning curves of every task, and over all tasks."""
    curves = mean_curves(column, material)
    if not curves:
        return []
    words = "Mean over seeds with Student's 95 % interval, single seeds faint, up to the end of the shortest run."
    few = any(curve.low is None for methods in curves.values() for curve in methods.values())
    parts = [tag("p", words + (f" {FEW}" if few else ""))]
    if len(curves) > 1 and measure == "score":
        parts += _over_tasks(column, name, list(curves), material)
    for drawn in draw_panels(
        f"curves-{name}", list(curves.items()), material.looks, material.axis, measure, material.figures
    ):
        parts.append(shown_figure(drawn))
    rows = [
        {
            "data": task,
            "method": method,
            material.axis: float(curve.x[i]),
            "seeds": len(curve.lines),
            "mean": float(curve.y[i]),
            "low": None if curve.low is None else float(curve.low[i]),
            "high": None if curve.high is None else float(curve.high[i]),
        }
        for task, methods in curves.items()
        for method, curve in methods.items()
        for i in range(len(curve.x))
    ]
    material.files[f"tables/curves-{name}.csv"] = csv_text(rows)
    return [*parts, tag("p", "Numbers: ", *_links(f"tables/curves-{name}.csv"), class_="soft")]


def _over_tasks(column: str, name: str, tasks: Sequence[str], material: Material) -> list[Markup]:
    """The IQM over all tasks of methods that have them all."""
    found = {}
    cells = by_cell(material.records, material.labels)
    for method in material.looks:
        runs = {task: newest(cells.get((task, method), [])) for task in tasks}
        if all(runs.values()):
            lines = {task: [line_of(one, column) for one in some] for task, some in runs.items()}
            curve = suite_curve(lines)
            if curve is not None:
                found[method] = curve
    if not found:
        return []
    panels = [(f"{len(tasks)} tasks", found)]
    drawn = draw_panels(f"suite-{name}", panels, material.looks, "share of training", "IQM of scores", material.figures)
    words = "IQM over runs and tasks with the 95 % band of the stratified bootstrap (2,000 replicates)."
    return [shown_figure(one, words) for one in drawn]


# -- beside others -----------------------------------------------------------------------------------------------------


def published_parts(found: Comparison) -> list[Markup]:
    """Our columns beside those that others published for the same tasks."""
    if found.measure != "score" or not found.cells:
        return []
    rows = published_for(found.tasks)
    without = [task for task in found.tasks if task not in {one.task for one in rows}]
    told = [f"No published numbers are known here for {', '.join(without)}."] if without else []
    if not rows:
        return notes(told)
    sources = list(dict.fromkeys((one.source, one.spread_kind, one.statistic) for one in rows))
    columns = list(
        dict.fromkeys((one.method, sources.index((one.source, one.spread_kind, one.statistic))) for one in rows)
    )
    cells = {(one.task, one.method, sources.index((one.source, one.spread_kind, one.statistic))): one for one in rows}
    head = ["task", *found.methods, *(f"{method} [{i + 1}]" for method, i in columns)]
    body = []
    for task in found.tasks:
        if task in without:
            continue
        ours = [found.cells.get((task, method), Cell()) for method in found.methods]
        line: list[Any] = [
            task,
            *((found.told(cell).removesuffix("*"), cell.mean) if cell.values else "–" for cell in ours),
        ]
        for method, i in columns:
            one = cells.get((task, method, i))
            line.append("–" if one is None else (one.told(), one.mean))
        body.append(line)
    words = "Ours: mean ± half of Student's 95 % interval (seeds). Published: with the spread that its source gives."
    listed = [
        f"[{i + 1}] {source}: {statistic} evaluation, spread: {kind}, {_seeds(rows, source)}."
        for i, (source, kind, statistic) in enumerate(sources)
    ]
    seeds = [
        f"{method} on {task}: the ten published seeds have {np.mean(values):.1f} ± {interval(values):.1f} (Student)."
        for (method, task), values in sorted(published_seed_scores().items())
        if task in found.tasks
    ]
    if any(one.second_hand for one in rows):
        listed.append("† read in a quotation alone.")
    kinds = {str(run.rows[-1].get("score_kind")) for cell in found.cells.values() for run in cell.runs if run.rows}
    if any("d4rl" in kind for kind in kinds):
        listed.append(f"Ours are approximate beside them, as the simulator is another one: {'; '.join(sorted(kinds))}.")
    return [html_table(head, body, words), *notes([*listed, *seeds, *told])]


def _seeds(rows: Sequence[Any], source: str) -> str:
    counts = sorted({one.seeds for one in rows if one.source == source and one.seeds})
    return f"{' or '.join(map(str, counts))} seeds" if counts else "seeds not given"
