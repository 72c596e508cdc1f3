"""Prompts without answers, from files or given one by one: what a model is asked outside of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from offpolicy.data.names import resolve
from offpolicy.data.texts.formats import Faults, Source, template_options
from offpolicy.data.texts.hub import read
from offpolicy.data.texts.messages import Fault, WrongType, read_prompt
from offpolicy.data.texts.rendering import Row, Text, lone_surrogate
from offpolicy.data.texts.tokens import Limits, encode, shortened
from offpolicy.errors import DataError, UsageError, nearest

COLUMNS = ("prompt", "question", "problem", "instruction", "query", "messages")
ANSWERED = ("chosen", "rejected", "completion", "completions", "label")  # columns of data to learn from
CHECKED = ("answer", "ground_truth", "reward_model", "solution", "target")  # of problems with a right answer


@dataclass(frozen=True)
class Asking:
    """How prompts are put to a model.

    Args:
        chat: put prompts of plain text into the tokenizer's chat template, as a turn of the user.
        template: what a prompt of plain text is put into, with "{prompt}" in it.
        options: passed to the chat template.
        max_prompt_length: longest prompt in tokens, None for any; longer ones lose their beginning.
    """

    chat: bool = False
    template: str = "{prompt}"
    options: Mapping[str, Any] | None = None
    max_prompt_length: int | None = None

    def put(self, prompt: Any, name: str, system: Any = None) -> Text:
        """A prompt of text or messages as it is put; raises as :func:`offpolicy.data.texts.messages.read_prompt`."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise Fault(name, "no_prompt", prompt)
            prompt = self.template.replace("{prompt}", prompt)
        chat = self.chat or bool(system) or not isinstance(prompt, str)
        return read_prompt(prompt, name, chat=chat, system=system)


def kind_of_rows(source: Source, columns: Mapping[str, str | None]) -> Literal["texts", "problems", "prompts"]:
    """What rows are: data to learn from, problems with a right answer, or prompts alone.

    Args:
        source: the rows.
        columns: our name → the source's, as a user gave them.
    """
    names = {*source.names, *(ours for ours, theirs in columns.items() if theirs is not None)}
    names -= {ours for ours, theirs in columns.items() if theirs is None}
    if names & {*ANSWERED}:
        return "texts"
    if names & {*CHECKED} and names & {*COLUMNS}:
        return "problems"
    if "messages" in names and "prompt" not in names:
        column = source.column(columns.get("messages") or "messages")
        last = [turns[-1] for turns in column if isinstance(turns, list) and turns]
        return "prompts" if last and not any(_by_assistant(turn) for turn in last) else "texts"
    return "prompts" if names & {*COLUMNS} else "texts"


def _by_assistant(turn: Any) -> bool:
    return isinstance(turn, Mapping) and str(turn.get("role", turn.get("from"))).lower() in ("assistant", "gpt")


def rows_of(name: str, split: str | None = None, *, download: bool = True) -> Source | None:
    """The rows behind a file, folder, pattern or name; None for data that are no rows of texts."""
    target = resolve(name, language=True)
    return read(target, split, download=download) if target.kind == "language" else None


def read_prompts(
    source: Source,
    tokenizer: Any,
    asking: Asking,
    *,
    columns: Mapping[str, str | None] | None = None,
    on_bad: str = "error",
    max_bad: float = 0.1,
) -> list[np.ndarray]:
    """The tokens of the distinct prompts in rows without answers, int64 (T,) each, in their order.

    Args:
        source: the rows, with a column prompt (or question, problem, …): text, messages, or one message.
        tokenizer: of ``transformers``.
        asking: how they are put.
        columns: our name → the source's where they differ: prompt, system, tools, chat_template_kwargs.
        on_bad: "error" or "drop".
        max_bad: largest share of rows that "drop" may drop.

    Raises:
        UsageError: ``columns`` names something unknown.
        DataError: no column of prompts, or rows without a prompt.
    """
    named = _columns(source, dict(columns or {}))
    values = {ours: source.column(theirs) for ours, theirs in named.items()}
    faults = Faults(source.where, source.rows, on_bad, max_bad)
    rows, numbers = [], []
    for row in range(source.rows):
        one = {ours: column[row] for ours, column in values.items()}
        try:
            prompt = asking.put(one["prompt"], "prompt", one.get("system"))
            rows.append(Row(prompt, (), {**(asking.options or {}), **template_options(one, row)}))
            numbers.append(row)
        except Fault as fault:
            faults.add(row, named["prompt"], *fault.args[1:])
        except WrongType as error:
            raise DataError(f"{source.where}, row {row}: {error}") from None
    found = _tokens(rows, numbers, tokenizer, asking, faults, named["prompt"])
    faults.check()
    return found


def given_prompts(texts: Sequence[str], tokenizer: Any, asking: Asking) -> list[np.ndarray]:
    """The tokens of prompts given as texts.

    Raises:
        UsageError: one is empty, or holds bytes that are no text.
    """
    for text in texts:
        if not text.strip():
            raise UsageError("--prompt is empty; expected a text. Pass one, in quotes.")
        if lone_surrogate(text):
            raise UsageError(f"--prompt is {text!r}, which holds bytes that are no UTF-8; expected text.")
    faults = Faults("--prompt", len(texts))
    rows = [Row(asking.put(text, "prompt"), (), dict(asking.options or {})) for text in texts]
    found = _tokens(rows, list(range(len(rows))), tokenizer, asking, faults, "prompt")
    faults.check()
    return found


def _columns(source: Source, given: dict[str, str | None]) -> dict[str, str]:
    """Our name → the source's."""
    known = ("prompt", "system", "tools", "chat_template_kwargs")
    for ours, theirs in given.items():
        if theirs is not None and theirs not in source.names:
            raise DataError(
                f"{source.where} has no column '{theirs}', which `columns` gives as {ours}; it has "
                f"{', '.join(source.names)}.{nearest(theirs, source.names)}"
            )
    found = {"prompt": next((n for n in COLUMNS if n in source.names), None)}
    found |= {name: name for name in known[2:] if name in source.names}
    named = {k: v for k, v in (found | {k: v for k, v in given.items() if k in known}).items() if v is not None}
    if "prompt" not in named:
        raise DataError(
            f"{source.where} has the columns {', '.join(source.names)}; expected a prompt ({', '.join(COLUMNS)}). Say "
            'which it is: --data.columns \'{"prompt": "…"}\'.'
        )
    return named


def _tokens(
    rows: list[Row], numbers: list[int], tokenizer: Any, asking: Asking, faults: Faults, column: str
) -> list[np.ndarray]:
    """The tokens of each distinct prompt; faulty ones go to ``faults``."""
    found: dict[bytes, np.ndarray] = {}
    for row, one in zip(numbers, encode(rows, tokenizer, Limits(1 << 30, truncation="keep_end"))):
        if one.fault:
            faults.add(row, column, one.fault, one.found)
            continue
        ids = (
            one.prompt
            if asking.max_prompt_length is None
            else shortened(one.prompt, asking.max_prompt_length, tokenizer)
        )
        found.setdefault(ids.tobytes(), ids)
    return list(found.values())


__all__ = ["Asking", "given_prompts", "kind_of_rows", "read_prompts", "rows_of"]
