"""Rows of a source as records, with their faults and what else a person should know."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import cast

from offpolicy.data.texts.formats.faults import Faults
from offpolicy.data.texts.formats.form import Format
from offpolicy.data.texts.formats.kinds import STRATEGIES
from offpolicy.data.texts.formats.source import Record, Source
from offpolicy.data.texts.formats.values import typed_column
from offpolicy.data.texts.messages import Fault, WrongType, check_characters
from offpolicy.errors import DataError, UsageError, nearest


def records(
    source: Source,
    form: Format,
    faults: Faults,
    counts: Counter[str],
    *,
    pair_strategy: str = "best_vs_worst",
    min_score_gap: float = 0.0,
    separator: str = "",
) -> Iterator[Record]:
    """The rows of a source as prompts with answers; faulty rows go to ``faults``.

    Args:
        source, form: the rows and what :func:`detect` said about them.
        faults: collects the rows that cannot be trained on.
        counts: collects what else a person should know, by sentence.
        pair_strategy, min_score_gap, separator: as of :class:`offpolicy.data.texts.module.TextData`.
    """
    if pair_strategy not in STRATEGIES:
        raise UsageError(
            f"`pair_strategy` is '{pair_strategy}'; expected one of {', '.join(STRATEGIES)}."
            f"{nearest(pair_strategy, STRATEGIES)}"
        )
    columns = {ours: typed_column(source, ours, theirs) for ours, theirs in form.columns.items()}
    for row in range(source.rows):
        values = {ours: column[row] for ours, column in columns.items()}
        try:
            made = list(form.kind.read(row, values, form, counts))
            for record in made:
                _check_characters(record, form)
        except Fault as fault:
            ours, kind, found = fault.args
            faults.add(row, form.columns.get(ours, ours), kind, found)
            continue
        except WrongType as error:
            raise DataError(f"{source.where}, row {row}: {error}") from None
        for record in form.kind.arrange(made, row, pair_strategy, min_score_gap, counts):
            if form.chat and _holds_null(record):
                counts["rows with null in tools or arguments of calls, kept as it is written"] += 1
            gap = record.facts.get("score_chosen", math.inf) - record.facts.get("score_rejected", -math.inf)
            if form.kind.name == "pairs" and gap < min_score_gap and min_score_gap > 0:
                counts["pairs left out, as their scores differ by less than min_score_gap"] += 1
                continue
            if not form.chat:
                _count_joints(record, separator, counts)
                record.answers = tuple(separator + cast(str, answer) for answer in record.answers)
            yield record


def _check_characters(record: Record, form: Format) -> None:
    """A fault where a prompt or an answer holds half of a surrogate pair, which no tokenizer takes."""
    texts = [(form.prompt.place, record.prompt), *zip(form.kind.answers, record.answers)]
    texts += [("prompt_rejected", record.rejected_prompt)] if record.rejected_prompt is not None else []
    for name, text in texts:
        check_characters(text, name)


def _holds_null(record: Record) -> bool:
    """Whether what a row says of tools holds null, which JSON may mean, or got from a table that padded it."""
    turns = (turn for text in (record.prompt, *record.answers) if isinstance(text, list) for turn in text)
    values = [turn["tool_calls"] for turn in turns if "tool_calls" in turn]
    values += [record.template["tools"]] if "tools" in record.template else []
    while values:
        value = values.pop()
        if value is None:
            return True
        values += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return False


def _count_joints(record: Record, separator: str, counts: Counter[str]) -> None:
    prompt, answer = cast(str, record.prompt), cast(str, record.answers[0])
    if not separator and not prompt[-1:].isspace() and not answer[:1].isspace():
        counts["prompts run into their answers without white space (--data.separator puts some there)"] += 1
