"""What language data hold, for a person to read before training."""

from __future__ import annotations

from typing import Any

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.data.texts.parts import table_of
from offpolicy.data.texts.sequences import is_scored, token_ids

BOUNDARY = " ▶ "  # what stands before it is read, what stands after it is scored
TOOL = "⟦{}⟧"  # what a tool says in an answer, which is read too
WIDTH = 10  # of the labels


def report(replay: Replay) -> str:
    """The data report: counts, lengths, what was decided about the format, notes and warnings."""
    meta, table = replay.meta, table_of(replay)
    rows = f"{len(replay.tables[table]):,} {'pairs' if table == 'pairs' else 'prompts with an answer'}"
    if table == "singles" and "singles/label" in replay.tables:
        label = replay.tables["singles/label"]
        rows += f" ({int(label.sum()):,} wanted, {int((~label).sum()):,} unwanted)"
    prompts = len(np.unique(replay.tables[table][:, 0]))
    lengths = ", ".join(f"{role} {'/'.join(map(str, q))}" for role, q in meta.get("lengths", {}).items())
    limits, tokenizer = meta.get("limits", {}), meta.get("tokenizer", {})
    lines = [
        f"{meta.get('name')} ({meta.get('file') or meta.get('source')})",
        _line("rows", f"{rows} over {prompts:,} prompts, from {meta.get('rows', 0):,} rows of the source"),
        _line("format", str(meta.get("format"))),
        _line("tokens", f"{lengths} (median/95 %/largest)"),
        _line("limits", f"{limits.get('max_length')} in all, cut by {limits.get('truncation')}"),
        _line("tokenizer", f"{tokenizer.get('name') or 'unnamed'}, {tokenizer.get('vocabulary', 0):,} tokens"),
    ]
    lines += [_line("note", text) for text in meta.get("notes", [])]
    lines += [_line("warning", text) for text in meta.get("warnings", [])]
    return "\n".join(lines)


def samples(replay: Replay, tokenizer: Any, n: int = 2) -> str:
    """The first ``n`` rows decoded: what stands before ▶ or in ⟦⟧ is read, the rest after ▶ is scored.

    Each answer comes with the ids of the last five tokens of the prompt and its own first five.
    """
    table = table_of(replay)
    names = ("chosen", "rejected") if table == "pairs" else ("answer",)
    lines = []
    for number, row in enumerate(replay.tables[table][:n].tolist()):
        source = replay.tables.get(f"{table}/row")
        lines.append(f"{table.removesuffix('s')} {number}" + (f" (row {source[number]})" if source is not None else ""))
        for side, name in enumerate(names):
            prompt, answer = (token_ids(replay, row[2 * side + i]) for i in (0, 1))
            scored = is_scored(replay, row[2 * side + 1])
            text = tokenizer.decode(prompt) + BOUNDARY + _marked(answer, scored, tokenizer)
            lines.append(_line(name, text.replace("\n", "\n" + " " * (WIDTH + 2))))
            first, last = answer[:5].tolist(), prompt[-5:].tolist()
            lines.append(_line("", f"ids … {last} ▶ {first} …, {int(scored.sum())} tokens scored"))
    return "\n".join(lines)


def _marked(answer: np.ndarray, scored: np.ndarray, tokenizer: Any) -> str:
    """An answer with what tools say in it marked."""
    cuts = np.flatnonzero(np.diff(scored)) + 1
    parts = [tokenizer.decode(part) for part in np.split(answer, cuts)]
    return "".join(part if scored[at] else TOOL.format(part) for part, at in zip(parts, [0, *cuts]))


def _line(label: str, text: str) -> str:
    return f"  {label:<{WIDTH}}{text}"
