"""What rows of texts mean: which columns are prompts and answers, how they are written, and which rows are faulty.

The format is decided from the columns and a scan of all rows, never from the first one, and a person is told what was
decided. A missing column or a wrong type stops the load; a row that carries no signal, or a wrong one, is a fault that
stops it too or, on request, is dropped and counted.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations, pairwise
from typing import Any, cast

from offpolicy.data.texts.messages import (
    Fault,
    WrongType,
    blank,
    check_characters,
    differing_keys,
    kind_of,
    read_prompt,
    read_text,
    said,
    same,
    shorten,
    turn_key,
    unpack_lists,
)
from offpolicy.data.texts.tokens import Message, Text
from offpolicy.errors import DataError, UsageError, nearest

NAMES = (
    *("prompt", "chosen", "rejected", "completion", "label", "messages", "completions", "scores"),
    *("score_chosen", "score_rejected", "weight", "system", "tools", "chat_template_kwargs"),
    *("prompt_chosen", "prompt_rejected"),
)
NUMBERS = ("score_chosen", "score_rejected", "weight")
STRATEGIES = ("best_vs_worst", "best_vs_random", "all_pairs", "adjacent", "none")
TURN = "\n\nAssistant:"  # where answers begin in written-out dialogues
EXPECTED = "chosen and rejected (pairs), completions and scores (lists), completion (single answers) or messages"


@dataclass
class Source:
    """Rows as a reader found them.

    Attributes:
        where: file, folder or name, for messages.
        rows: how many there are.
        names: of the columns.
        column: ``column(name)`` gives the values of one, None where a row has none; conversations are messages.
        meta: facts for the data report.
        notes: what a person should know, filled while columns are read.
        doubts: likewise, what may be a mistake.
        text_only: whether all values are text, numbers too, as in CSV files.
    """

    where: str
    rows: int
    names: list[str]
    column: Callable[[str], list[Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    text_only: bool = False


@dataclass(slots=True)
class Record:
    """A prompt with its answers.

    ``answers`` holds chosen and rejected, or one answer. ``rejected_prompt`` is set where the sides have different
    prompts. ``facts`` are numbers by name.
    """

    row: int
    prompt: Text
    answers: tuple[Text, ...]
    rejected_prompt: Text | None = None
    facts: dict[str, float] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)


# -- faults ------------------------------------------------------------------------------------------------------------

FAULTS = {  # kind → what is wrong, what was expected
    "none": ("nothing (None)", "text"),
    "empty": ("no text", "an answer with more than white space"),
    "no_prompt": ("no text or turn", "a prompt"),
    "no_beginning": (
        "no common prefix with the rejected side, from which a prompt could be inferred,",
        'a prompt in both, or the name of the prompt column (--data.columns \'{"prompt": "…"}\')',
    ),
    "other_keys": (
        "a turn that differs between the sides, and not in what is said,",
        "the same turn before the answers; remove the keys that differ",
    ),
    "last_prompt_role": ("a prompt that ends with a turn of the assistant", "a turn of the user at its end"),
    "identical": ("two equal answers (white space at their ends aside)", "chosen and rejected that differ"),
    "repeated": (
        "the prompt repeated in the answer",
        "the answer alone; where every row repeats it, pass --data.columns '{\"prompt\": null}'",
    ),
    "other_question": (
        "a conversation with a turn that is not in the prompt",
        "the turns of the prompt and then the assistant's, or these alone",
    ),
    "answer_kind": (
        "a right answer of a kind that no answer can be compared with",
        "text, a number, a list of these (each is right) or an object with `ground_truth`; an own reward gets the "
        "column by its name, with --data.columns '{\"answer\": null}'",
    ),
    "no_mark": (
        "a solution without a marked answer ('####' or \\boxed{…})",
        'the right answer so marked, or a column that holds it (--data.columns \'{"answer": "…"}\')',
    ),
    "last_role": ("a last turn that is not the assistant's", "a turn with the role 'assistant'"),
    "other_turn": ("an answer that holds a turn of the user or system", "turns of the assistant after the prompt"),
    "prompt_mismatch": (
        "a text that does not occur in the conversations",
        "the same question in both; pass --data.columns '{\"prompt\": null}' to take the conversations",
    ),
    "no_turn": ("sides without a common '\\n\\nAssistant:'", "dialogues that share everything up to an answer"),
    "scores": ("scores that do not fit the answers", "one number for each of at least two answers"),
    "nan": ("a score or weight that is not a finite number", "a number"),
    "negative": ("a negative weight", "a number ≥ 0; an answer to be unlearned is the rejected one of a pair"),
    "label": ("no label", "true or false"),
    "surrogate": ("half of a surrogate pair, which is no character", "whole characters; write the text again"),
    "template": ("turns that the chat template refuses", "roles in the order it wants"),
    "long_prompt": ("a prompt longer than there is room", "a shorter one; raise --data.max_prompt_length"),
    "logps": ("log-probabilities that do not fit the demonstration", "one ≤ 0 for each of its tokens and for EOS"),
    "known_test": ("a question of the test set", "questions of the training set alone"),
    "no_prompt_token": ("a prompt without a token of its own", "a prompt that ends before the answer begins"),
    "truncated": ("an answer of which truncation leaves nothing", "room for it; raise --data.max_length"),
    "identical_cut": ("answers that are equal after truncation", "room for both; raise --data.max_length"),
}


class Faults:
    """Collects faulty rows, and stops or counts them.

    Args:
        where: the source, for messages.
        rows: how many there are.
        on_bad: "error" or "drop".
        max_bad: largest share of the rows that may be dropped.
    """

    def __init__(self, where: str, rows: int, on_bad: str = "error", max_bad: float = 0.1) -> None:
        if on_bad not in ("error", "drop"):
            raise UsageError(f"`on_bad` is '{on_bad}'; expected 'error' or 'drop'. Pass one of them.")
        self.where, self.rows, self.on_bad, self.max_bad = where, rows, on_bad, max_bad
        self.unread: list[str] = []  # columns that may be what is missing
        self.found: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def add(self, row: int, column: str, kind: str, found: Any = "") -> None:
        self.found.setdefault((column, kind), []).append((row, shorten(found)))

    @property
    def bad(self) -> int:
        return len({row for rows in self.found.values() for row, _ in rows})

    def counts(self) -> dict[str, int]:
        """Number of faulty rows by what is wrong with them."""
        return {f"`{column}` has {FAULTS[kind][0]}": len(rows) for (column, kind), rows in self.found.items()}

    def table(self) -> str:
        """Each reason with its count and first rows."""
        lines = []
        for (column, kind), rows in sorted(self.found.items(), key=lambda item: -len(item[1])):
            what, expected = FAULTS[kind]
            expected += f" from {_listing(self.unread)}" if kind == "no_beginning" and self.unread else ""
            first = f"row {rows[0][0]}" + (f": {rows[0][1]}" if rows[0][1] else "")
            first += ", then " + ", ".join(str(row) for row, _ in rows[1:3]) if rows[1:] else ""
            count = f"{len(rows)} row{'s' if rows[1:] else ''}"
            lines.append(f"`{column}` has {what} in {count} (first: {first}), expected {expected}")
        return "; ".join(lines)

    def check(self) -> None:
        """Stop unless there are no faults, or few and ``on_bad`` is "drop".

        Raises:
            DataError: every reason with its count, its first rows and what to do.
        """
        bad = self.bad
        if bad and self.on_bad == "error":
            raise DataError(
                f"{self.where}: {bad} of {self.rows} rows cannot be trained on: {self.table()}. Correct the rows, or "
                "pass `--data.on_bad drop` to leave them out and count them."
            )
        if bad and bad == self.rows:
            raise DataError(f"{self.where}: no row is left, as all {bad} are faulty: {self.table()}. Correct them.")
        if bad > self.max_bad * self.rows:
            raise DataError(
                f"{self.where}: {bad} of {self.rows} rows are faulty, more than the share of {self.max_bad:g} that may "
                f"be dropped: {self.table()}. Correct the rows or raise `--data.max_bad`."
            )


# -- the format --------------------------------------------------------------------------------------------------------


@dataclass
class Format:
    """What was decided about a source.

    Attributes:
        kind: "pairs", "lists" or "singles".
        style: "text" or "chat".
        prompt: "explicit" (a column), "implicit" (the common beginning), "dialogue" (written-out turns), "mixed" (a
            column and whole conversations), "messages" (all but the last turn), or "two" (one per side).
        columns: our name → the source's.
        unused: columns that are not read.
    """

    kind: str
    style: str
    prompt: str
    columns: dict[str, str]
    unused: list[str]

    def __str__(self) -> str:
        prompt = {
            "explicit": "prompt in a column of its own",
            "implicit": "prompt is the common beginning of both sides",
            "dialogue": "written-out dialogues, split at the last common '\\n\\nAssistant:'",
            "mixed": "prompt in a column and again in the conversations",
            "messages": "prompt is all but the last turn",
            "two": "a prompt for each side",
        }[self.prompt]
        style = {"text": "plain text", "chat": "messages"}[self.style]
        kind = {"pairs": "preference pairs", "lists": "lists of scored answers", "singles": "single answers"}[self.kind]
        columns = ", ".join(ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in self.columns.items())
        unused = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{kind}, {style}, {prompt}; columns {columns}{unused}"


def detect(source: Source, columns: Mapping[str, str | None] | None = None) -> Format:
    """Decide the format from the columns and the types in all rows.

    Args:
        source: the rows.
        columns: our name → the source's name where they differ, None for a column to leave out.

    Raises:
        UsageError: ``columns`` names something unknown.
        DataError: a column is missing, or holds values of a wrong or of different types.
    """
    found = _mapping(source, dict(columns or {}))
    kinds: dict[str, str] = {}
    for ours in ("prompt", "prompt_chosen", "prompt_rejected", "chosen", "rejected", "completion", "messages"):
        if ours in found:
            kinds[ours] = scan(source, found[ours])
    if "chosen" in found or "rejected" in found:
        kind, answers = "pairs", ["chosen", "rejected"]
    elif "completions" in found:
        kind, answers = "lists", ["completions", "scores"]
    elif "completion" in found or "label" in found:
        kind, answers = "singles", ["completion"]
    elif "messages" in found:
        kind, answers = "singles", ["messages"]
    else:
        raise DataError(
            f"{source.where} has the columns {_listing(source.names)}; expected {EXPECTED}.{_close(source, EXPECTED)} "
            'Rename the columns, or say which they are, as in --data.columns \'{"chosen": "better"}\'.'
        )
    for name in answers:
        if name not in found:
            raise DataError(_missing(source, name))
    if kind == "lists":
        kinds["completions"] = _scan_lists(source, found["completions"])
    styles = {name: kinds[name] for name in answers if name in kinds}
    if len(set(styles.values())) > 1:
        raise DataError(
            f"{source.where}: `{found[answers[0]]}` holds {_WORDS[styles[answers[0]]]} and `{found[answers[1]]}` "
            f"{_WORDS[styles[answers[1]]]}; expected the same in both. Write both the same way."
        )
    style = next(iter(styles.values()))
    two = kind == "pairs" and "prompt_chosen" in found and "prompt_rejected" in found
    if answers == ["messages"]:
        prompt = "messages"
        if style == "text":
            raise DataError(f"{source.where}: `{found['messages']}` holds text; expected a list of messages.")
    elif two:
        prompt = "two"
    elif "prompt" in found:
        prompt = "explicit"
        if kind == "pairs" and style == "chat" and kinds["prompt"] == "text":
            prompt = "mixed"
    elif kind == "singles" and style == "chat":
        prompt = "messages"
    elif kind == "pairs":
        prompt = "implicit"
        if style == "text" and _is_dialogue(source.column(found["chosen"]), source.column(found["rejected"])):
            prompt = "dialogue"
    else:
        raise DataError(_missing(source, "prompt"))
    if style == "text" and any(kinds.get(name) == "chat" for name in _PROMPTS[prompt]):
        style = "chat"  # answers in plain text become turns of the assistant
    if "system" in found:
        if prompt not in ("explicit", "two", "mixed"):
            raise UsageError("`columns` names a system message, but there is no prompt column it could go before.")
        style = "chat"
    used = {*_PROMPTS[prompt], *answers} & found.keys()
    used |= {"system", "tools", "chat_template_kwargs"} & found.keys() if style == "chat" else set()  # of the template
    used |= {n for n in ({"pairs": NUMBERS, "singles": ("label", "weight")}.get(kind, ())) if n in found}
    taken = {ours: found[ours] for ours in NAMES if ours in used}
    return Format(kind, style, prompt, taken, [name for name in source.names if name not in taken.values()])


_PROMPTS = {  # where the prompt is → the columns it is read from
    **{"explicit": ("prompt",), "mixed": ("prompt",), "two": ("prompt_chosen", "prompt_rejected")},
    **{"implicit": (), "dialogue": (), "messages": ()},
}
_WORDS = {"text": "text", "chat": "messages"}


def _mapping(source: Source, columns: dict[str, str | None]) -> dict[str, str]:
    """Our name → the source's, of the columns that are there."""
    for ours, theirs in columns.items():
        if ours not in NAMES:
            turned = f' The other way round: \'{{"{theirs}": "{ours}"}}\'.' if theirs in NAMES else ""
            raise UsageError(
                f"`columns` names '{ours}'; expected our names as keys: {', '.join(NAMES)}."
                f"{turned or nearest(ours, NAMES)}"
            )
        if theirs is not None and theirs not in source.names:
            raise DataError(
                f"{source.where} has no column '{theirs}', which `columns` gives as {ours}; it has "
                f"{_listing(source.names)}.{nearest(theirs, source.names)}"
            )
    plain = {n: n for n in NAMES if n in source.names and n != "system" and n not in columns.values()}
    if "scores" not in source.names and "ratings" in source.names:
        plain["scores"] = "ratings"
    return {ours: theirs for ours, theirs in {**plain, **columns}.items() if theirs is not None}


def _missing(source: Source, name: str) -> str:
    close = _close(source, name) or f' Say which column it is: --data.columns \'{{"{name}": "…"}}\'.'
    return f"{source.where} has no column '{name}'; found {_listing(source.names)}.{close}"


def _close(source: Source, name: str) -> str:
    """A suggestion for the column that is probably meant."""
    free = [n for n in source.names if n not in NAMES]
    part = [n for n in free if name in n.lower()]
    guess = part[0] if part else nearest(name, free).partition("'")[2].partition("'")[0]
    return f" If it is '{guess}', pass --data.columns '{{\"{name}\": \"{guess}\"}}'." if guess in free else ""


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names) or "no column"


def scan(source: Source, name: str) -> str:
    """The one type of a column, "text" or "chat".

    Raises:
        DataError: it holds another type, or both.
    """
    first: dict[str, int] = {}
    for row, value in enumerate(source.column(name)):
        first.setdefault(kind_of(value), row)
    return _one_kind(source, name, first)


def _scan_lists(source: Source, name: str) -> str:
    first: dict[str, int] = {}
    for row, values in enumerate(unpack_lists(source.column(name))):
        if values is not None and not isinstance(values, list):
            raise DataError(
                f"{source.where}: `{name}` holds {shorten(values)} in row {row}; expected a list of answers there."
            )
        for value in values or []:
            first.setdefault(kind_of(value), row)
    return _one_kind(source, name, first)


def _one_kind(source: Source, name: str, first: dict[str, int]) -> str:
    kinds = {kind: row for kind, row in first.items() if kind != "none"}
    for kind, row in kinds.items():
        if kind not in _WORDS:
            raise DataError(
                f"{source.where}: `{name}` holds {kind} in row {row}; expected text, or messages such as "
                '{"role": "user", "content": "…"}. Convert the column.'
            )
    if len(kinds) > 1:
        raise DataError(
            f"{source.where}: `{name}` holds text in row {kinds['text']} and messages in row {kinds['chat']}; expected "
            "one of them in all rows. Convert the column."
        )
    return next(iter(kinds), "text")


def _is_dialogue(chosen: list[Any], rejected: list[Any]) -> bool:
    """Whether most rows are written-out dialogues."""
    marked = sum(bool(c and r) and TURN in c and TURN in r for c, r in zip(chosen, rejected))
    return 2 * marked > len(chosen)


# -- rows --------------------------------------------------------------------------------------------------------------


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
    columns = {ours: _typed(source, ours, theirs) for ours, theirs in form.columns.items()}
    make = {"pairs": _pair, "lists": _list, "singles": _single}[form.kind]
    for row in range(source.rows):
        values = {ours: column[row] for ours, column in columns.items()}
        try:
            made = list(make(row, values, form, counts))
            for record in made:
                _check_characters(record, form)
        except Fault as fault:
            ours, kind, found = fault.args
            faults.add(row, form.columns.get(ours, ours), kind, found)
            continue
        except WrongType as error:
            raise DataError(f"{source.where}, row {row}: {error}") from None
        if form.kind == "lists":
            made = _expand(made, row, pair_strategy, min_score_gap, counts)
        for record in made:
            if form.style == "chat" and _holds_null(record):
                counts["rows with null in tools or arguments of calls, kept as it is written"] += 1
            gap = record.facts.get("score_chosen", math.inf) - record.facts.get("score_rejected", -math.inf)
            if form.kind == "pairs" and gap < min_score_gap and min_score_gap > 0:
                counts["pairs left out, as their scores differ by less than min_score_gap"] += 1
                continue
            if form.style == "text":
                _count_joints(record, separator, counts)
                record.answers = tuple(separator + cast(str, answer) for answer in record.answers)
            yield record


def _check_characters(record: Record, form: Format) -> None:
    """A fault where a prompt or an answer holds half of a surrogate pair, which no tokenizer takes."""
    names = {"pairs": ("chosen", "rejected"), "lists": ("completions",), "singles": ("completion",)}[form.kind]
    names = ("messages",) if "messages" in form.columns else names
    prompts = {"messages": "messages", "implicit": "chosen", "dialogue": "chosen", "two": "prompt_chosen"}
    texts = [(prompts.get(form.prompt, "prompt"), record.prompt), *zip(names, record.answers)]
    texts += [("prompt_rejected", record.rejected_prompt)] if record.rejected_prompt is not None else []
    for name, text in texts:
        check_characters(text, name)


def _pair(row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
    chosen, rejected = read_text(values["chosen"], "chosen"), read_text(values["rejected"], "rejected")
    if same(chosen, rejected):
        raise Fault(*(("chosen", "empty") if blank(chosen) else ("rejected", "identical")), chosen)
    other: Text | None = None
    if form.prompt == "two":
        prompt, other = _prompt(values, "prompt_chosen", form), _prompt(values, "prompt_rejected", form)
    elif form.prompt == "dialogue":
        prompt, chosen, rejected = _split_dialogue(cast(str, chosen), cast(str, rejected), counts)
    elif form.prompt == "implicit" and isinstance(chosen, str):
        prompt, chosen, rejected = _split_text(chosen, cast(str, rejected), counts)
    elif form.prompt in ("implicit", "mixed"):
        prompt, chosen, rejected = _split_messages(values, form, cast(list, chosen), cast(list, rejected))
    else:
        prompt = _prompt(values, "prompt", form)
    chosen, rejected = _answer(prompt, chosen, "chosen", form), _answer(other or prompt, rejected, "rejected", form)
    if isinstance(prompt, str) and form.prompt == "explicit" and prompt.strip():
        start = prompt.strip()
        repeats = [cast(str, answer).lstrip().startswith(start) for answer in (chosen, rejected)]
        if all(repeats):
            raise Fault("chosen", "repeated", chosen)
        counts["answers begin with their prompt, on one side only"] += any(repeats)
    facts = _facts(values, ("score_chosen", "score_rejected", "weight"))
    if facts.get("score_chosen", math.inf) < facts.get("score_rejected", -math.inf):
        counts["chosen answers have a lower score than the rejected"] += 1
    yield Record(row, prompt, (chosen, rejected), other, facts, template_options(values, row))


def _single(row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
    name = "messages" if "messages" in values else "completion"
    answer = read_text(values[name], name)
    if form.prompt == "messages":
        turns = cast(list[Message], answer)
        if not turns or turns[-1]["role"] != "assistant":
            raise Fault(name, "last_role" if turns else "empty", answer)
        prompt: Text = turns[:-1]
        answer = turns[-1:]
        if not prompt:
            raise Fault(name, "no_prompt", turns)
    else:
        prompt = _prompt(values, "prompt", form)
    answer = _answer(prompt, answer, name, form)
    if isinstance(prompt, str) and len(prompt.strip()) >= 16 and cast(str, answer).lstrip().startswith(prompt.strip()):
        raise Fault(name, "repeated", answer)
    facts = _facts(values, ("weight",))
    if "label" in values:
        facts["label"] = _label(values["label"], form)
    yield Record(row, prompt, (answer,), None, facts, template_options(values, row))


def _list(row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
    """One record per scored answer of a list."""
    prompt, answers, scores = _prompt(values, "prompt", form), values["completions"], values["scores"]
    if answers is None or scores is None:
        raise Fault("completions" if answers is None else "scores", "none", None)
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise Fault("scores", "scores", scores)
    template = template_options(values, row)
    made: list[Record] = []
    for answer, score in zip(answers, scores):
        if score is None or not isinstance(score, int | float) or not math.isfinite(score):
            counts["answers in lists left out, as they have no score"] += 1
            continue
        one = _answer(prompt, read_text(answer, "completions"), "completions", form)
        made.append(Record(row, prompt, (one,), None, {"score": float(score)}, template))
    if len(made) < 2:
        raise Fault("scores", "scores", scores)
    yield from made


def _expand(made: list[Record], row: int, strategy: str, gap: float, counts: Counter[str]) -> list[Record]:
    """Pairs from the scored answers of one list; equal scores never make one."""
    if strategy == "none":
        for one in made:
            one.facts["group"] = row
        return made
    order = sorted(made, key=lambda one: -one.facts["score"])  # stable: equal scores stay in the order of the list
    if strategy == "best_vs_worst":
        chosen = [(order[0], order[-1])]
    elif strategy == "best_vs_random":
        digest = sha256(json.dumps([row, order[0].prompt], sort_keys=True).encode()).digest()
        chosen = [(order[0], order[1 + int.from_bytes(digest[:8], "big") % (len(order) - 1)])]
    else:
        chosen = list(combinations(order, 2) if strategy == "all_pairs" else pairwise(order))
    pairs = []
    for better, worse in chosen:
        difference = better.facts["score"] - worse.facts["score"]
        if difference == 0:
            counts["pairs of lists left out, as their scores are equal"] += 1
        elif difference < gap:
            counts["pairs of lists left out, as their scores differ by less than min_score_gap"] += 1
        elif same(better.answers[0], worse.answers[0]):
            counts["pairs of lists left out, as their answers are equal"] += 1
        else:
            facts = {"score_chosen": better.facts["score"], "score_rejected": worse.facts["score"]}
            answers = (better.answers[0], worse.answers[0])
            pairs.append(Record(row, better.prompt, answers, None, facts, better.template))
    return pairs


# -- values ------------------------------------------------------------------------------------------------------------


def _typed(source: Source, ours: str, theirs: str) -> list[Any]:
    """A column, with lists that stand as text read, and numbers too where all values are text."""
    values = source.column(theirs)
    if ours in ("completions", "scores"):
        return unpack_lists(values)
    if source.text_only and ours in (*NUMBERS, "label"):
        return [_number(value) for value in values]
    return values


def _number(text: Any) -> Any:
    """The number or truth value that a text is; None for no text, and other text as it is."""
    words = {"true": True, "false": False, "": None}
    plain = str(text).strip().lower()
    if plain in words:
        return words[plain]
    try:
        return float(plain)
    except ValueError:
        return text


def _prompt(values: Mapping[str, Any], name: str, form: Format) -> Text:
    return read_prompt(values[name], name, chat=form.style == "chat", system=values.get("system"))


def _answer(prompt: Text, answer: Text, name: str, form: Format) -> Text:
    """An answer that is one: text, or turns that the assistant ends."""
    if form.style == "text":
        if blank(answer):
            raise Fault(name, "empty", answer)
        return answer
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not turns or blank(turns[-1:]):
        raise Fault(name, "empty", turns)
    asked = cast(list[Message], prompt)
    if form.prompt in ("explicit", "two") and [*map(turn_key, turns[: len(asked)])] == [*map(turn_key, asked)]:
        raise Fault(name, "repeated", turns[0])
    if turns[-1]["role"] != "assistant":
        raise Fault(name, "last_role", turns[-1])
    if any(m["role"] in ("user", "system") for m in turns):
        raise Fault(name, "other_turn", turns)
    return turns


def _facts(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    facts = {}
    for name in names:
        if name not in values:
            continue
        value = values[name]
        if value is None or not isinstance(value, int | float) or not math.isfinite(value):
            raise Fault(name, "nan", "None" if value is None else value)
        if name == "weight" and value < 0:
            raise Fault(name, "negative", value)
        facts[name] = float(value)
    return facts


def _label(value: Any, form: Format) -> float:
    if value is None:
        raise Fault("label", "label", "None")
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(
            f"`{form.columns['label']}` holds {shorten(value)}; expected true for a wanted and false for an unwanted "
            "answer. Convert the column."
        )
    return float(value)


def template_options(values: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What a row says to the chat template: tools, and arguments of its own."""
    options = _object(values.get("chat_template_kwargs"), "chat_template_kwargs", row)
    if options and not isinstance(options, Mapping):
        raise WrongType(f"`chat_template_kwargs` is {shorten(options)}; expected an object. Correct it.")
    result = {k: v for k, v in (options or {}).items() if v is not None}
    tools = _object(values.get("tools"), "tools", row)
    tools = [tools] if isinstance(tools, Mapping) else tools
    if tools and not isinstance(tools, list):
        raise WrongType(f"`tools` is {shorten(tools)}; expected a list of objects. Correct it.")
    if tools:
        result["tools"] = [_object(tool, "tools", row) for tool in tools]
    return result


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


def _object(value: Any, name: str, row: int) -> Any:
    """A value that may stand as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise DataError(f"`{name}` of row {row} is {shorten(value)}; expected JSON. Correct it.") from None


# -- prompts that stand in both sides ----------------------------------------------------------------------------------


def _split_dialogue(chosen: str, rejected: str, counts: Counter[str]) -> tuple[str, str, str]:
    """At the last ``\\n\\nAssistant:`` that both dialogues share with everything before it."""
    at = chosen.rfind(TURN, 0, _common(chosen, rejected))
    if at < 0:
        raise Fault("chosen", "no_turn", chosen)
    at += len(TURN)
    counts["dialogues part before their last turn, so their answers hold several turns"] += (
        TURN in chosen[at:] or TURN in rejected[at:]
    )
    return chosen[:at], chosen[at:], rejected[at:]


def _split_text(chosen: str, rejected: str, counts: Counter[str]) -> tuple[str, str, str]:
    """Before the word in which the sides part, so that no answer begins inside a word or is empty."""
    at = _common(chosen, rejected)
    sides = (chosen, rejected)
    inside = any(at == len(side) or not side[at].isspace() for side in sides)
    if inside:  # back to the beginning of this word
        counts["common beginnings of the sides were cut back to a word"] += at > 0 and not chosen[at - 1].isspace()
        while at and not chosen[at - 1].isspace():
            at -= 1
    while at and chosen[at - 1].isspace():  # the space belongs to the answer
        at -= 1
    if not at:
        raise Fault("chosen", "no_beginning", chosen)
    return chosen[:at], chosen[at:], rejected[at:]


def _split_messages(
    values: Mapping[str, Any], form: Format, chosen: list[Message], rejected: list[Message]
) -> tuple[Text, Text, Text]:
    """The leading turns that both conversations share."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise Fault(name, "empty", turns)
        if turns[-1]["role"] != "assistant":
            raise Fault(name, "last_role", turns[-1])
    shared = min(len(chosen), len(rejected)) - 1
    at = next((i for i in range(shared) if turn_key(chosen[i]) != turn_key(rejected[i])), shared)
    prompt, first = chosen[:at], chosen[at:]
    if at < shared and chosen[at]["role"] in ("user", "system") and said(chosen[at]) == said(rejected[at]):
        raise Fault("rejected", "other_keys", differing_keys(chosen[at], rejected[at]))
    if form.prompt == "mixed":
        question = read_text(values["prompt"], "prompt")
        if not prompt and chosen[0]["role"] == "assistant":
            return _prompt(values, "prompt", form), first, rejected  # the conversations hold the answers alone
        if not any(str(question).strip() in m["content"] for m in prompt):
            raise Fault("prompt", "prompt_mismatch", question)
    if not prompt:
        raise Fault("chosen", "no_beginning", chosen[0])
    if values.get("system") and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": str(values["system"])}, *prompt]
    return prompt, first, rejected[at:]


def _common(a: str, b: str) -> int:
    """Length of the common beginning, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _count_joints(record: Record, separator: str, counts: Counter[str]) -> None:
    prompt, answer = cast(str, record.prompt), cast(str, record.answers[0])
    if not separator and not prompt[-1:].isspace() and not answer[:1].isspace():
        counts["prompts run into their answers without white space (--data.separator puts some there)"] += 1
