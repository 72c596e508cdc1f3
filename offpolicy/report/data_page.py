"""The page of a data set: its warnings in plain words first, then what was measured, as one file that needs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.data.report import report
from offpolicy.data.survey import NEAR_BOUND, Survey, survey
from offpolicy.data.texts.survey import MEASURED, TextSurvey
from offpolicy.evaluation.scores import wilson
from offpolicy.files import atomic_write
from offpolicy.report.figures import draw_histograms, draw_occupancy, looks_of
from offpolicy.report.page import Section, notes, page, shown_figure
from offpolicy.report.writing import Markup, html_table, tag

MOST_COLUMNS = 60  # rows of the table of actions
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
QUANTILE_NAMES = ("smallest", "5 %", "median", "95 %", "largest", "mean")


def write_data_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write sections as one page.

    Raises:
        WriteError: the file cannot be written.
    """
    path = Path(path).expanduser()
    atomic_write(path, page(f"Data: {title}", sections))
    return path


def data_page_sections(replay: Replay) -> list[Section]:
    """The page of control data."""
    found = survey(replay)
    told = Section("summary", "Summary", [tag("pre", str(report(replay)))])
    return [
        _warnings(found.doubts, [str(note) for note in replay.meta.get("notes", [])]),
        told,
        Section("episodes", "Episodes", _episodes(found)),
        Section("rewards", "Rewards", _rewards(found)),
        Section("actions", "Actions", _actions(found, replay.meta)),
        Section("coverage", "Coverage", _coverage(found)),
        Section("repeated", "Repetitions", _repetitions(found)),
    ]


def text_page_sections(found: TextSurvey, tokenizer: str | None) -> list[Section]:
    """The page of texts; ``tokenizer`` is the name of what their lengths were counted with, None for characters."""
    rows: list[list[Any]] = [["rows of the source", found.rows], ["rows to train on", found.kept]]
    rows += [[what, count] for what, count in found.counts.items()]
    rows += [["answers that are wanted", found.wanted]] if found.wanted is not None else []
    rows += [["without a right answer", found.unanswered]] if found.unanswered is not None else []
    body = [[what, (f"{count:,}", count)] for what, count in rows]
    words = {"pairs": "Preference pairs", "singles": "Single answers", "problems": "Prompts with right answers"}
    summary = [tag("p", f"{words[found.kind]}: {found.form}."), html_table(["", "number"], body)]
    return [
        _warnings(found.doubts, found.notes),
        Section("summary", "Summary", summary),
        Section("lengths", "Lengths", _lengths(found, tokenizer)),
        Section("bias", "Bias of labels", _bias(found)),
        Section("overlap", "Overlap with other parts", _overlap(found)),
        Section("truncation", "Truncation", [tag("p", _truncation(found))]),
    ]


def _warnings(doubts: Sequence[str], remarks: Sequence[str]) -> Section:
    parts = notes(doubts) or [tag("p", "Nothing that was looked at gives a warning.")]
    if remarks:
        parts += [tag("p", "Notes from the load:"), *notes(remarks)]
    return Section("warnings", "Warnings", parts)


def _quantiles(named: Mapping[str, np.ndarray]) -> Markup:
    """A table with a row per name."""
    rows = []
    for name, values in named.items():
        numbers = [*np.quantile(np.asarray(values, np.float64), QUANTILES), float(np.mean(values, dtype=np.float64))]
        rows.append([name, len(values), *((f"{number:,.5g}", float(number)) for number in numbers)])
    return html_table(["", "number", *QUANTILE_NAMES], rows)


def _histograms(name: str, panels: Mapping[str, Mapping[str, np.ndarray]], words: str) -> list[Markup]:
    """Histograms of what is not empty."""
    shown = {title: {one: x for one, x in values.items() if len(x)} for title, values in panels.items()}
    shown = {title: values for title, values in shown.items() if values}
    if not shown:
        return []
    looks = looks_of(one for values in shown.values() for one in values)
    return [shown_figure(draw_histograms(name, shown, looks, "", None, counts=True), words)]


# -- control -----------------------------------------------------------------------------------------------------------


def _episodes(found: Survey) -> list[Markup]:
    ended = found.terminated
    at_limit = int((~ended & (found.length == found.length.max())).sum())
    told = (
        f"{int(ended.sum()):,} episodes were ended by their environment (terminated) and {int((~ended).sum()):,} cut "
        f"by a time limit or by whoever recorded; {at_limit:,} of those are as long as any, {found.length.max():,}."
    )
    panels = {"length of episodes, steps": {"terminated": found.length[ended], "cut": found.length[~ended]}}
    named = {"length": found.length}
    if found.returns is not None:
        panels["return of episodes"] = {"terminated": found.returns[ended], "cut": found.returns[~ended]}
        named["return"] = found.returns
    words = "Lengths and undiscounted returns of all episodes, by how they ended."
    return [tag("p", told), _quantiles(named), *_histograms("episodes", panels, words)]


def _rewards(found: Survey) -> list[Markup]:
    if found.reward is None:
        return [tag("p", "There are none.")]
    zero = float((found.reward == 0).mean())
    told = (
        f"{_looked_at(found)} {zero:.1%} of the rewards are exactly 0, {len(np.unique(found.reward)):,} values differ."
    )
    drawn = _histograms("rewards", {"reward of a step": {"reward": found.reward}}, "Rewards, untransformed.")
    return [tag("p", told), _quantiles({"reward": found.reward}), *drawn]


def _looked_at(found: Survey) -> str:
    everything = found.rows == int(found.length.sum())
    which = "All" if everything else "Spread evenly over the data,"
    return f"{which} {found.rows:,} steps of {found.episodes:,} episodes were looked at one by one."


def _actions(found: Survey, meta: Mapping[str, Any]) -> list[Markup]:
    if found.choices is not None:
        total = max(1, int(found.choices.sum()))
        rows = [
            [str(i), (f"{count:,}", int(count)), (f"{count / total:.2%}", count / total)]
            for i, count in enumerate(found.choices[:MOST_COLUMNS])
        ]
        return [html_table(["action", "taken", "share"], rows), *_more(len(found.choices))]
    assert found.action is not None
    rows = []
    for i, (mean, std) in enumerate(found.action[:MOST_COLUMNS]):
        line: list[Any] = [str(i), (f"{mean:.4g}", float(mean)), (f"{std:.4g}", float(std))]
        if found.on_low is not None and found.on_high is not None:
            low, high = float(found.on_low[i]), float(found.on_high[i])
            bounds = [float(np.ravel(meta[key])[i]) for key in ("action_low", "action_high")]
            line += [f"{bounds[0]:g} to {bounds[1]:g}", (f"{low:.2%}", low), (f"{high:.2%}", high)]
        rows.append(line)
    head = ["action", "mean", "standard deviation"]
    if found.on_low is None:
        return [
            tag("p", "No bounds are known, so saturation is not either."),
            html_table(head, rows),
            *_more(len(found.action)),
        ]
    words = f"On a bound: within {NEAR_BOUND:g} of half the range of it."
    head += ["bounds", "on the lowest", "on the highest"]
    return [html_table(head, rows, words), *_more(len(found.action))]


def _more(count: int) -> list[Markup]:
    return [tag("p", f"{count - MOST_COLUMNS:,} more are not shown.")] if count > MOST_COLUMNS else []


def _coverage(found: Survey) -> list[Markup]:
    seen = found.coverage
    if seen is None or not len(seen.nearest):
        return [tag("p", "Not measured: that needs observations of real numbers and two episodes.")]
    words = (
        f"Distance of {len(seen.nearest):,} states, chosen at random, to the nearest of {seen.among:,} that belongs to "
        "another episode: root of the mean square over columns, each divided by its standard deviation. Small numbers "
        "say that episodes meet, which is what joining pieces of them needs."
    )
    drawn = _histograms("nearest", {"distance to the nearest state of another episode": {"": seen.nearest}}, words)
    parts = [tag("p", words), _quantiles({"distance": seen.nearest}), *drawn]
    if seen.plane.shape[1] == 2:
        figure = draw_occupancy("plane", seen.plane, ("first principal axis", "second principal axis"), None)
        share = f"The two axes hold {seen.explained:.0%} of the variance."
        parts.append(shown_figure(figure, f"{figure.words} {share}"))
    return parts


def _repetitions(found: Survey) -> list[Markup]:
    told = (
        f"Of {found.rows:,} steps {found.repeated_rows:,} have the observation and action of an earlier one, bit by "
        f"bit; of {found.episodes:,} episodes {found.repeated_episodes:,} are an earlier one again."
    )
    return [tag("p", told)]


# -- texts -------------------------------------------------------------------------------------------------------------


def _lengths(found: TextSurvey, tokenizer: str | None) -> list[Markup]:
    unit = f"Tokens of {tokenizer}" if tokenizer else "Tokens" if found.unit == "tokens" else "Characters"
    told = f"{unit}, before anything is cut."
    if found.measured < found.kept:
        told += f" {found.measured:,} of {found.kept:,} rows, chosen at random, were measured (at most {MEASURED:,})."
    panels = {role: {role: values} for role, values in found.lengths.items()}
    if found.kind == "pairs":
        panels = {
            "prompt": {"prompt": found.lengths["prompt"]},
            "answers": {side: found.lengths[side] for side in ("chosen", "rejected")},
            "chosen minus rejected": {"difference": found.lengths["chosen"] - found.lengths["rejected"]},
        }
    return [tag("p", told), _quantiles(found.lengths), *_histograms("lengths", panels, "Lengths.")]


def _bias(found: TextSurvey) -> list[Markup]:
    told = []
    if found.longer is not None:
        told.append(f"The longer answer is preferred in {_share(*found.longer)} of the pairs that differ in length.")
    if found.first is not None:
        count = int(found.first.sum())
        places = "; ".join(f"place {i + 1}: {_share(int(n), count)}" for i, n in enumerate(found.first[:20]))
        told.append(f"Where the best answer stands in its list ({count:,} lists): {places}.")
    elif found.kind == "pairs":
        told.append(
            "In which position the answers were shown to who judged them: the columns do not say, so a preference for "
            "a position cannot be measured."
        )
    if found.wanted is not None:
        told.append(f"Wanted answers: {_share(found.wanted, found.kept)}.")
    return notes(told)


def _share(count: int, of: int) -> str:
    """A share with its 95 % interval."""
    return f"{count / of:.1%} ± {wilson(count, of):.1%} ({count:,} of {of:,})" if of else "none"


def _overlap(found: TextSurvey) -> list[Markup]:
    if not found.overlap:
        return [tag("p", "Not known: the source has one part. Pass --eval_data NAME to compare with held-out data.")]
    rows = [
        [name, (f"{seen:,} of {found.kept:,}", seen) if isinstance(seen, int) else (f"not known: {seen}", "")]
        for name, seen in found.overlap.items()
    ]
    return [html_table(["part", "rows here with a prompt that is there too"], rows)]


def _truncation(found: TextSurvey) -> str:
    what = "a prompt" if found.kind == "problems" else "prompt with answer"
    if found.beyond is None:
        return (
            f"Not known without a tokenizer: pass --tokenizer DIR, the policy's. {found.limit:,} tokens of {what} fit."
        )
    return f"{found.beyond:,} of {found.measured:,} rows have more than the {found.limit:,} tokens of {what} that fit."
