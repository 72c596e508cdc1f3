"""Texts to learn from, opened: rows → records → tokens → :class:`Replay`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from offpolicy.data.names import Target, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.texts.building import Builder
from offpolicy.data.texts.formats import Faults, detect, records
from offpolicy.data.texts.hub import read
from offpolicy.data.texts.parts import table_of
from offpolicy.data.texts.tokens import Limits
from offpolicy.errors import DataError


def open_texts(
    name_or_target: str | os.PathLike[str] | Target,
    *,
    tokenizer: Any,
    download: bool = True,
    on_bad: str = "error",
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "prompt_first",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    pair_strategy: str = "best_vs_worst",
    min_score_gap: float = 0.0,
    max_bad: float = 0.1,
    separator: str = "",
) -> Replay:
    """Open, check and tokenise texts.

    Args:
        name_or_target: a file, a folder or a hub name, or what :func:`offpolicy.data.names.resolve` made of it.
        tokenizer: of ``transformers``, or its folder or name.
        others: as of :class:`offpolicy.data.texts.module.TextData`.

    Returns:
        The replay with the table ``pairs`` or ``singles`` (:mod:`offpolicy.data.texts.sequences`); ``meta`` says what
        was found: ``format``, ``columns``, ``lengths``, ``dropped``, ``notes``, ``warnings``, ``tokenizer``.

    Raises:
        UsageError: an unknown name or an impossible option.
        DataError: texts that are absent, damaged or cannot be trained on.
    """
    from offpolicy.data.texts.tokens import load_tokenizer

    target = name_or_target if isinstance(name_or_target, Target) else resolve(name_or_target, language=True)
    limits = Limits(max_length, max_prompt_length, truncation)
    if target.kind == "replay":
        replay = Replay.load(target.path, mmap=True)  # type: ignore[arg-type]
        if not {"pairs", "singles"} & replay.tables.keys():
            raise DataError(_not_texts(target))
        replay.meta = {**replay.meta, "file": str(target.path)}
        return replay
    if target.kind != "language":
        raise DataError(_not_texts(target))
    source = read(target, split, download=download)
    form = detect(source, columns)
    faults, counts = Faults(source.where, source.rows, on_bad, max_bad), Counter[str]()
    faults.unread = form.unused
    made = list(
        records(
            source,
            form,
            faults,
            counts,
            pair_strategy=pair_strategy,
            min_score_gap=min_score_gap,
            separator=separator.replace("\\n", "\n").replace("\\t", "\t"),  # as shells pass them
        )
    )
    faults.check()
    if not made:
        raise DataError(f"{source.where} gives nothing to train on: {'; '.join(_notes(counts)) or 'no row'}. Check it.")
    build = Builder(load_tokenizer(tokenizer), limits, dict(chat_template_kwargs or {}), faults, counts)
    replay = build(made, "singles" if len(made[0].answers) == 1 else "pairs")
    faults.check()
    if not replay.tables:
        raise DataError(f"{source.where}: no row is left; {faults.table()}; {'; '.join(_notes(counts))}. Check it.")
    kind = table_of(replay)
    replay.meta |= {
        "name": target.name,
        "source": "text",
        **source.meta,
        "rows": source.rows,
        kind: len(replay.tables[kind]),
        "format": str(form),
        "style": form.style,
        "columns": form.columns,
        "dropped": faults.counts(),
        "notes": [*source.notes, *_notes(counts)],
    }
    replay.meta["warnings"] = [*source.doubts, *replay.meta.pop("doubts")]
    if faults.bad:
        replay.meta["warnings"].insert(0, f"{faults.bad} of {source.rows} rows were dropped: {faults.table()}")
    return replay


def sketch(
    target: Target,
    *,
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    download: bool = True,
    on_bad: str = "error",
    pair_strategy: str = "best_vs_worst",
    n: int = 2,
) -> str:
    """What can be said about texts without a tokenizer: format, counts, faults and the first ``n`` rows."""
    source = read(target, split, download=download)
    form = detect(source, columns)
    faults, counts = Faults(source.where, source.rows, on_bad, max_bad=1.0), Counter[str]()
    made = list(records(source, form, faults, counts, pair_strategy=pair_strategy))
    faults.check()
    lines = [f"{target.name}: {source.rows:,} rows give {len(made):,}: {form}"]
    lines += [f"  note      {text}" for text in [*source.notes, *_notes(counts)]]
    lines += [f"  warning   {text}" for text in source.doubts]
    lines += [f"  warning   {faults.bad} rows would be dropped: {faults.table()}"] if faults.bad else []
    for record in made[:n]:
        lines += [f"row {record.row}", *(f"  {record.prompt!r} ▶ {answer!r}" for answer in record.answers)]
    return "\n".join(lines)


def warn_of_overlap(held_out: Replay, training: Replay) -> None:
    """Note in the held-out part how many of its rows have a prompt of the training part."""
    known, asked = (replay.tables[f"{table_of(replay)}/prompt_hash"] for replay in (training, held_out))
    seen = int(np.isin(asked, known).sum())
    if seen:
        held_out.meta["warnings"] = [
            *held_out.meta["warnings"],
            f"held-out rows with a prompt that is in the training data too: {seen:,} of {len(asked):,}",
        ]


def _notes(counts: Counter[str]) -> list[str]:
    return [f"{what}: {count:,}" for what, count in counts.items() if count]


def _not_texts(target: Target) -> str:
    return (
        f"{target.name} holds {'steps' if target.kind == 'replay' else 'control data'} without pairs or answers; "
        "expected texts: .jsonl, .json, .parquet, .arrow, .csv, a folder or pattern of them, a folder written by "
        "`datasets`, or a name on the hub."
    )
