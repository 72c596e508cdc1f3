"""Sections on runs with more than one number: preference tuning, reinforcement tuning, goals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from offpolicy.report.curves import Line, MeanCurve, line_of, mean_curve
from offpolicy.report.figures import draw_histograms, draw_panels
from offpolicy.report.page import Section, shown_figure
from offpolicy.report.records import RunRecord, read_margins
from offpolicy.report.runs_section import by_cell
from offpolicy.report.scores_section import FEW, Material, newest
from offpolicy.report.writing import Markup, html_table, tag

PER_TOKEN = ("SimPO", "ORPO")  # report log-probabilities per token; all others the sum over an answer
Reader = Callable[[RunRecord, str], Line]


def value_of(record: RunRecord, name: str, axis: str) -> Line:
    """A number of a language run: of its evaluations where they have it, else of training."""
    line = line_of(record, f"eval/{name}", axis)
    return line if len(line.x) else line_of(record, f"train/{name}", axis, of_metrics=True)


def per_answer(record: RunRecord, side: str, axis: str, *, per_token: bool) -> Line:
    """Mean log-probability of the chosen or the rejected answers, summed over an answer or per token.

    What the run does not report itself follows from its mean length: a ratio of means.
    """
    logps, length = value_of(record, f"logps/{side}", axis), value_of(record, f"lengths/{side}", axis)
    has = record.run.method in PER_TOKEN
    if has == per_token or not len(logps.x):
        return logps
    if len(length.y) != len(logps.y):
        return Line(np.empty(0), np.empty(0))
    return Line(logps.x, logps.y / length.y if per_token else logps.y * length.y)


PREFERENCE: dict[str, Reader] = {
    "accuracy of implicit rewards": lambda one, axis: value_of(one, "rewards/accuracies", axis),
    "margin of implicit rewards": lambda one, axis: value_of(one, "rewards/margins", axis),
    "log p of chosen, sum": lambda one, axis: per_answer(one, "chosen", axis, per_token=False),
    "log p of rejected, sum": lambda one, axis: per_answer(one, "rejected", axis, per_token=False),
    "log p of chosen, per token": lambda one, axis: per_answer(one, "chosen", axis, per_token=True),
    "log p of rejected, per token": lambda one, axis: per_answer(one, "rejected", axis, per_token=True),
    "length of chosen, tokens": lambda one, axis: value_of(one, "lengths/chosen", axis),
    "length of rejected, tokens": lambda one, axis: value_of(one, "lengths/rejected", axis),
}


def preference(material: Material) -> Section:
    """Accuracy, margins, log-probabilities and lengths of runs on pairs."""
    found = Section("preference", "Preference tuning")
    records = [one for one in material.records if _has(one, r"(eval|train)/rewards/margins")]
    if not records:
        return found
    words = (
        "On held-out pairs where a run measures them, else in training. Margins compare within a method alone, as "
        "their unit is that of its own reward. Log-probabilities that a method does not report "
        f"({' and '.join(PER_TOKEN)} report those per token, others the sum) follow from the mean length."
    )
    found.parts.append(tag("p", f"{words} {FEW}"))
    found.parts += panels_by_task(records, PREFERENCE, "preference", material)
    found.parts += pair_margins(records, material) or margins(records, material)
    found.parts += losses_to_rank(records, material)
    return found


def pair_margins(records: Sequence[RunRecord], material: Material) -> list[Markup]:
    """Histograms of the margins of single pairs at the last evaluation, over the seeds of each method."""
    words = (
        "Margins of single held-out pairs at the last evaluation of each run, all seeds of a method together. Above 0 "
        "the chosen answer has the larger reward."
    )
    return _of_pairs(records, material, 0, ("pair-margins", "margin of a pair", words))


def losses_to_rank(records: Sequence[RunRecord], material: Material) -> list[Markup]:
    """Histograms of the loss below which single pairs are ranked right, of methods with such a loss."""
    words = (
        "Loss below which the policy prefers the chosen answer of a held-out pair (arXiv:2405.19534). Small where the "
        "reference prefers the other one by far: such pairs are hardly ever turned. At ln 2 the reference is undecided."
    )
    return _of_pairs(records, material, 1, ("loss-to-rank", "loss below which a pair is ranked right", words))


def _of_pairs(
    records: Sequence[RunRecord], material: Material, column: int, names: tuple[str, str, str]
) -> list[Markup]:
    """Histograms of a number of single pairs; ``names`` are of the file, the axis, and what is said below."""
    panels: dict[str, dict[str, np.ndarray]] = {}
    for (task, method), some in by_cell(records, material.labels).items():
        every = np.concatenate([read_margins(one.run.folder, column) for one in newest(some)])
        if len(every):
            panels.setdefault(task, {})[method] = every
    if not panels:
        return []
    looks = {name: look for name, look in material.looks.items() if any(name in methods for methods in panels.values())}
    return [shown_figure(draw_histograms(names[0], panels, looks, names[1], material.figures), names[2])]


def margins(records: Sequence[RunRecord], material: Material) -> list[Markup]:
    """Histograms of what each run measured at its last evaluation, where runs keep nothing of single pairs."""
    panels: dict[str, dict[str, np.ndarray]] = {}
    for title, reader in list(PREFERENCE.items())[:2]:
        for method in material.looks:
            own = [reader(one, "updates") for one in records if material.labels[one.run.folder] == method]
            ends = np.array([line.y[-1] for line in own if len(line.y) and np.isfinite(line.y[-1])])
            if len(ends):
                panels.setdefault(title, {})[method] = ends
    if not panels or all(len(values) < 3 for methods in panels.values() for values in methods.values()):
        return [tag("p", "These runs keep means over pairs, so there are histograms over runs alone, from three on.")]
    drawn = draw_histograms("preference-histograms", panels, material.looks, "last value of a run", material.figures)
    return [shown_figure(drawn, "Accuracy and margin at the end, over runs: of pairs these keep means alone.")]


def rollouts(material: Material) -> Section:
    """Reward, solved problems, entropy and effective sample sizes of runs that learn from their own answers."""
    found = Section("rollouts", "Reinforcement tuning")
    records = [one for one in material.records if _has(one, r"train/reward/own")]
    if not records:
        return found
    names = sorted({name for one in records for name in (*one.curves, *(key for row in one.run.rows for key in row))})
    wanted = {
        r"train/reward/own": "reward of own answers",
        r"eval/accuracy": "accuracy of the most likely answer",
        r"eval/(mean|pass)@\d+": "",
        r"train/entropy": "entropy, nats per token",
        r"train/ratio/ess(_\w+)?": "",
        r"train/ratio/mean_(lag\d+|replay|external)": "",
        r"train/length/(lag\d+|replay)": "",
        r"train/answers/length": "length of answers, tokens",
    }
    readers: dict[str, Reader] = {}
    for pattern, title in wanted.items():
        for name in names:
            if re.fullmatch(pattern, name):
                readers[title or spoken(name)] = _reader(name)
    found.parts.append(
        tag(
            "p",
            f"Effective sample sizes are shares of the answers; by lag, in iterations, where runs report them. {FEW}",
        )
    )
    found.parts += panels_by_task(records, readers, "rollouts", material)
    return found


def spoken(name: str) -> str:
    """A column in words: train/ratio/ess_lag2 as "effective sample size, lag 2"."""
    _, _, rest = name.partition("/")
    words = {"ratio/ess": "effective sample size", "ratio/mean": "mean ratio", "length": "length, tokens"}
    for start, told in words.items():
        if rest.startswith(start):
            kind = rest.removeprefix(start).strip("_/").replace("lag", "lag ")
            return f"{told}, {kind}" if kind else told
    return rest


def _reader(name: str) -> Reader:
    if name.startswith("train/"):
        return lambda one, axis: line_of(one, name, axis, of_metrics=True)
    return lambda one, axis: line_of(one, name, axis)


def panels_by_task(
    records: Sequence[RunRecord], readers: Mapping[str, Reader], name: str, material: Material
) -> list[Markup]:
    """A figure per task with a panel per number."""
    parts: list[Markup] = []
    cells = by_cell(records, material.labels)
    for i, task in enumerate(dict.fromkeys(task for task, _ in cells)):
        panels: list[tuple[str, dict[str, MeanCurve]]] = []
        for title, reader in readers.items():
            curves = {}
            for (where, method), some in cells.items():
                curve = mean_curve([reader(one, material.axis) for one in newest(some)]) if where == task else None
                if curve is not None:
                    curves[method] = curve
            if curves:
                panels.append((title, curves))
        for drawn in draw_panels(f"{name}-{i + 1}", panels, material.looks, material.axis, "", material.figures):
            parts.append(shown_figure(drawn, f"{task}: {drawn.words}"))
    return parts


def goals(material: Material) -> Section:
    """Success by goal at the last evaluation, of goal-conditioned runs."""
    found, rows = Section("goals", "Success by goal"), []
    names = sorted(
        {key for one in material.records for row in one.run.rows for key in row if _of_goal(key)}, key=_number
    )
    for (task, method), some in by_cell(material.records, material.labels).items():
        last = [one.run.rows[-1] for one in newest(some) if one.run.rows and any(map(_of_goal, one.run.rows[-1]))]
        if last:
            cells: list[Any] = []
            for key in [*names, "eval/order_consistency"]:
                values = [row[key] for row in last if isinstance(row.get(key), float)]
                cells.append((f"{100 * np.mean(values):.1f}", float(np.mean(values))) if values else "–")
            rows.append([task, method, len(last), *cells])
    if rows:
        words = "Per cent, mean over seeds of the last evaluation. Order: of the values along ways of the data."
        head = ["task", "method", "seeds", *(f"goal {_number(key)}" for key in names), "order"]
        found.parts += [html_table(head, rows, words)]
    return found


def _of_goal(key: str) -> bool:
    return re.fullmatch(r"eval/success_task\d+", key) is not None


def _number(key: str) -> int:
    return int(key.rpartition("task")[2])


def _has(one: RunRecord, pattern: str) -> bool:
    return any(
        re.fullmatch(pattern, name) for name in (*one.curves, *(key for row in one.run.rows[-1:] for key in row))
    )
