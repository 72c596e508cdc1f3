"""Section on policies scored without an environment: estimates, what their order is worth, and a budget of episodes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.report.curves import MeanCurve
from offpolicy.report.figures import draw_panels, looks_of
from offpolicy.report.page import Section, notes, shown_figure
from offpolicy.report.records import RunRecord
from offpolicy.report.runs import Run, printable
from offpolicy.report.scores_section import Material
from offpolicy.report.writing import Markup, html_table, tag

FILE, FORMAT, MOST_BYTES, MOST_POLICIES = "ope.json", 1, 64 << 20, 500


@dataclass(frozen=True)
class OfflineFile:
    """What ``python -m offpolicy.ope`` left.

    Attributes:
        path: of the file.
        content: as it stands there; None where it cannot be read.
    """

    path: Path
    content: Mapping[str, Any] | None


def find_files(places: Sequence[str | Path], runs: Sequence[Run]) -> list[OfflineFile]:
    """The files of offline evaluations in these folders, beside their runs, and in the folder that holds all runs."""
    folders = [Path(place).expanduser() for place in places]
    found = {path.resolve() for place in folders for path in place.rglob(FILE)}
    if runs:
        shared = Path(os.path.commonpath([run.folder.absolute() for run in runs]))
        found |= {(shared / FILE).resolve()} if (shared / FILE).is_file() else set()
    return [OfflineFile(path, _content(path)) for path in sorted(found)]


def _content(path: Path) -> Mapping[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:  # a pipe would never end
            return None
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, Mapping) and found.get("format") == FORMAT else None


def offline(records: Sequence[RunRecord], files: Iterable[OfflineFile], material: Material) -> Section:
    """Runs of fitted Q evaluation and files of the command, one after the other."""
    found = Section("offline", "Offline evaluation")
    runs = [one for one in records if one.run.estimates]
    files = list(files)
    if not runs and not files:
        return found
    words = (
        "Values are mean discounted returns from first states, estimated from data. They rank policies and are no "
        "scores. A value that should not be trusted is struck out, with the reason; no mark is no proof."
    )
    found.parts.append(tag("p", words))
    found.parts += _fitted(runs)
    for i, one in enumerate(files):
        try:
            found.parts += _of_file(one, f"budget-{i + 1}", material)
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
            found.parts += notes([f"{one.path} is not as python -m offpolicy.ope writes it, and is left out."])
    return found


def _fitted(runs: Sequence[RunRecord]) -> list[Markup]:
    """Runs of fitted Q evaluation, by their last evaluation."""
    rows = []
    for one in runs:
        last = one.run.rows[-1] if one.run.rows else {}
        policies = one.run.settings.get("model.runs") or []
        told = ", ".join(map(str, policies[:5])) if isinstance(policies, (list, tuple)) else str(policies)
        cells = [_number(last.get(name)) for name in ("eval/value", "eval/value_spread", "eval/loss")]
        rows.append([one.run.data, str(one.run.folder), told or "the policy of the data", one.state, *cells])
    head = ["data", "run", "policies", "state", "value", "over critics", "held-out error"]
    return (
        [html_table(head, rows, "Runs of fitted Q evaluation: they score policies, and are no methods.")]
        if rows
        else []
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return f"{value:.4g}", float(value)


def _told(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"


def _of_file(one: OfflineFile, name: str, material: Material) -> list[Markup]:
    content = one.content
    if content is None:
        return notes([f"{one.path} cannot be read, or is of another format than {FORMAT}: it is left out."])
    held, episodes = int(content["held_out"]), int(content["episodes"])
    which = (
        f"{held:,} held out of {episodes:,} episodes" if held else f"all {episodes:,} episodes, which the fits see too"
    )
    how = f"{which}, discount {float(content['discount']):g}, {content['policy']} actions"
    told = f"{one.path}: on {content['data']}, {how}."
    seen = ["Policies were trained on these episodes, which favours those that exploit errors in them."]
    parts = [tag("h3", str(content["data"])), tag("p", told), *notes(seen if content.get("seen") else [])]
    parts += _policies(content)
    parts += _rankings(content)
    return [*parts, *_budget(content, name, material)]


def _policies(content: Mapping[str, Any]) -> list[Markup]:
    """The policies with what each estimator says of them."""
    policies = list(content["policies"])
    names = list(dict.fromkeys(name for one in policies for name in one["estimates"]))
    rows = []
    for one in policies[:MOST_POLICIES]:
        cells = [_estimate(one["estimates"].get(name)) for name in names]
        rows.append([printable(str(one["checkpoint"])), one["method"], _number(one.get("score")), *cells])
    unit = str(content.get("unit") or "score")
    more = len(policies) - MOST_POLICIES
    told = notes([f"{more:,} more policies are in the file."]) if more > 0 else []
    return [html_table(["checkpoint", "method", f"{unit} in the environment", *names], rows), *told]


def _estimate(one: Mapping[str, Any] | None) -> Any:
    if one is None or not isinstance(one.get("value"), (int, float)):
        return "–"
    value, low, high = float(one["value"]), one.get("low"), one.get("high")
    shown = f"{value:.4g}"
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        shown += f" [{low:.4g}, {high:.4g}]"
    elif isinstance(one.get("spread"), (int, float)):
        shown += f" ± {one['spread']:.2g} over critics"
    if one.get("doubt"):
        return tag("span", tag("s", shown), f" ({one['doubt']})"), value
    return shown, value


def _rankings(content: Mapping[str, Any]) -> list[Markup]:
    """How far each order agrees with the environment, and what choosing by it costs."""
    rows, verdicts = [], []
    for name, one in dict(content["rankings"]).items():
        chosen = [
            f"k = {int(pick['k'])}: best {_told(pick['best'])}, regret {_told(pick['regret'])}"
            for pick in one.get("chosen") or []
        ]
        rank = "not known" if one.get("spearman") is None else f"{one['spearman']:.2f}"
        if one.get("low") is not None and one.get("high") is not None:
            rank += f" [{one['low']:.2f}, {one['high']:.2f}]"
        rows.append([name, int(one["policies"]), rank, "; ".join(chosen) or "–"])
        verdicts.append(f"{name}: {one.get('verdict') or 'no verdict'}")
    if not rows:
        return []
    head = ["estimator", "policies with a score", "Spearman, 95 % interval over policies", "choosing the first k by it"]
    return [html_table(head, rows), *notes(verdicts)]


def _budget(content: Mapping[str, Any], name: str, material: Material) -> list[Markup]:
    """The score of the policy chosen after so many evaluations, beside what estimates choose without any."""
    budget, unit = content.get("budget"), str(content.get("unit") or "score")
    if not budget:
        return [tag("p", "No budget curve: scores of single episodes are not known (--play 20 plays them).")]
    lines = [np.asarray(budget[key], np.float64) for key in ("pulls", "mean", "low", "high")]
    if len({len(line) for line in lines}) != 1 or not all(np.isfinite(line).all() for line in lines):
        raise ValueError("the budget is not a curve")
    x, y, low, high = lines
    curve = MeanCurve(x, y, low, high, ())
    label = "policy chosen"
    panels = [(str(content["data"]), {label: curve})]
    drawn = draw_panels(name, panels, looks_of([label]), "episodes played", unit, material.figures)
    words = (
        f"What so many episodes in the environment buy: {unit} of the policy chosen after them, by the protocol of "
        f"unifloral ({int(budget['policies'])} policies, {int(budget['episodes'])} episodes of each), with the 95 % "
        "interval of the mean over trials."
    )
    without = []
    for estimator in content["rankings"]:
        known = [
            (one["estimates"][estimator]["value"], one["score"])
            for one in content["policies"]
            if one["estimates"].get(estimator) and one.get("score") is not None
        ]
        known = [(value, score) for value, score in known if value is not None]
        if known:
            without.append(
                f"Without an episode, {estimator} chooses a policy of {max(known, key=lambda one: one[0])[1]:.4g}."
            )
    return [*(shown_figure(one, words) for one in drawn), *notes(without)]
