"""A report in a folder: the page, its figures and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from offpolicy.errors import UsageError, check_choice
from offpolicy.files import atomic_write
from offpolicy.report import language_section, offline_section, runs_section, scores_section, switch_section
from offpolicy.report.curves import AXES, check_axis
from offpolicy.report.figures import looks_of
from offpolicy.report.page import Section, notes, page
from offpolicy.report.records import RunRecord, read_record
from offpolicy.report.runs import find_runs
from offpolicy.report.tables import Comparison, compare_runs, variants
from offpolicy.report.writing import csv_text

PAGE = "index.html"


def write_report(
    places: Iterable[str | Path], out: str | Path, *, x: str = "updates", title: str = "Report of runs"
) -> Path:
    """Write the report of all runs in these folders.

    Args:
        places: as of :func:`offpolicy.report.runs.find_runs`.
        out: folder of the report; files of an earlier one are replaced, others stay.
        x: axis of curves: "updates", "samples", "steps" of an environment, or "hours".
        title: of the page.

    Returns:
        The page: ``index.html``, which needs nothing else. Beside it lie ``figures/`` (PNG, PDF) and ``tables/`` (CSV,
        LaTeX).

    Raises:
        UsageError: a place without runs, an axis that no run counts, or ``out`` is a file.
        WriteError: the folder cannot be written.
    """
    check_choice("x", x, AXES)
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise UsageError(f"`out` is {out}, which is a file; expected a folder for the report. Pass another.")
    folders = list(places)
    records = [read_record(run) for run in find_runs(folders)]
    check_axis(records, x)
    labels = variants([one.run for one in records])
    methods = [one for one in records if not one.run.estimates]
    looks = looks_of(sorted({labels[one.run.folder] for one in methods}))
    files: dict[str, str] = {}
    material = scores_section.Material(methods, labels, looks, x, out / "figures", files)
    runs = [one.run for one in records]
    last, best = compare_runs(runs), {one.column: one for one in compare_runs(runs, "best")}
    judged = [one for one in last if one.column]
    sections = [runs_section.overview(records, labels)]
    for found in judged:
        sections += scores_section.score_sections(found, best[found.column], found.column, material, len(judged) == 1)
    sections += [switch_section.switches(records, labels, files)]
    sections += [language_section.goals(material), language_section.preference(material)]
    sections += [language_section.rollouts(material)]
    sections += [offline_section.offline(records, offline_section.find_files(folders, runs), material)]
    fast, speeds = runs_section.speed(records, labels)
    sections += [fast, runs_section.settings_section(records, labels), not_known(last, records)]
    sections += [runs_section.provenance(records, labels)]
    files["tables/runs.csv"] = csv_text(runs_section.run_rows(records, labels))
    files["tables/speed.csv"] = csv_text(speeds)
    for name, text in files.items():
        atomic_write(out / name, text)
    atomic_write(out / PAGE, page(title, sections))
    return out / PAGE


def not_known(tables: Sequence[Comparison], records: Sequence[RunRecord]) -> Section:
    """What these runs leave open."""
    told = []
    for found in tables:
        absent = [(t, m) for t in found.tasks for m in found.methods if (t, m) not in found.cells]
        if absent:
            names = "; ".join(f"{method} on {task}" for task, method in absent[:10])
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            told.append(f"Not run, or not to the end: {names}{more}.")
        few = [cell for cell in found.cells.values() if len(cell.values) < 5]
        if few:
            told.append(f"{len(few)} of {len(found.cells)} cells have fewer than five seeds: their intervals are wide.")
        if not found.column:
            told += found.notes
    if not all(one.versions for one in records):
        told.append(f"{sum(not one.versions for one in records)} runs do not say with which versions they were made.")
    told.append("Whether settings were chosen on the seeds shown here: the files of runs do not say.")
    return Section("unknown", "What is not known", notes(told))
