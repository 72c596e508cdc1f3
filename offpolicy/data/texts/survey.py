"""What a page on texts shows: lengths, bias of labels, repetitions, overlap of splits, what truncation cuts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from offpolicy.data.names import Target, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.texts.formats import Faults, Format, Record, Source, detect, records
from offpolicy.data.texts.formats.values import typed_column
from offpolicy.data.texts.hub import read
from offpolicy.data.texts.parts import table_of
from offpolicy.data.texts.problem_rows import Problem, problem_columns, read_problems
from offpolicy.data.texts.rendering import Row, Text
from offpolicy.data.texts.tokens import Limits, encode, load_tokenizer
from offpolicy.errors import DataError, UsageError

MEASURED = 20_000  # rows whose tokens are counted
SPLITS = 4  # other parts that are compared with this one
MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512  # the defaults of texts and of problems
Z = 1.959963984540054  # of 95 %


class Item(NamedTuple):
    """What a row is compared by: its prompt and its answers, as text or as the numbers of stored texts."""

    prompt: Hashable
    answers: tuple[Hashable, ...]


@dataclass
class TextSurvey:
    """Measures of texts.

    Attributes:
        kind: "pairs", "singles" or "problems".
        form: what the columns were taken for.
        rows: of the source; ``kept`` can be trained on.
        unit: of lengths, "tokens" or "characters".
        lengths: by role ("prompt", "chosen", …), (n,) each, of ``measured`` rows.
        limit: tokens that fit: of prompt with answer, of problems of the prompt; ``beyond`` counts the measured rows
            that do not fit, None where tokens are not known.
        longer: of the pairs whose answers differ in length, how many prefer the longer one, and how many there are.
        first: by place in its list, how often the best answer stood there; None where nothing is known of places.
        wanted: singles with a label: how many are wanted; None without labels.
        unanswered: problems without a right answer; None of others.
        counts: further numbers, by what they count.
        overlap: by the name of another part, how many rows have a prompt of it, or why that is not known.
        notes, doubts: what a person should know, and look at.
    """

    kind: str
    form: str
    rows: int
    kept: int
    unit: str
    lengths: dict[str, np.ndarray]
    measured: int
    limit: int
    beyond: int | None = None
    longer: tuple[int, int] | None = None
    first: np.ndarray | None = None
    wanted: int | None = None
    unanswered: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def survey_texts(
    target: Target,
    *,
    tokenizer: Any = None,
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    download: bool = True,
    separator: str = "",
    max_length: int = MAX_LENGTH,
    pair_strategy: str = "best_vs_worst",
    eval_data: str | None = None,
) -> TextSurvey:
    """Measure texts: pairs, single answers, or prompts with answers that can be checked.

    Args:
        target: texts, of any kind of source.
        tokenizer: of ``transformers``, its folder or name; without one lengths are in characters.
        columns, split, download, separator, max_length, pair_strategy: as of
            :class:`offpolicy.data.texts.module.TextData`.
        eval_data: held-out data whose prompts are looked for here; "NAME@SPLIT" takes another part.

    Raises:
        DataError: texts that are absent, damaged, or without columns that are understood.
    """
    source = read(target, split, download=download)
    tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    if holds_problems(target, source, columns):
        found, items = _of_problems(source, dict(columns or {}), tokenizer)
    else:
        found, items = _of_records(source, columns, tokenizer, separator, max_length, pair_strategy)
    found.notes += source.notes
    found.doubts += source.doubts
    others: dict[str, tuple[Target, str | None]] = {name: (target, name) for name in source.others[:SPLITS]}
    if len(source.others) > SPLITS:
        found.notes.append(f"parts that were not compared: {', '.join(source.others[SPLITS:])}")
    if eval_data is not None:
        name, _, part = eval_data.partition("@")
        others[eval_data] = (resolve(name, language=True), part or None)
    prompts = [item.prompt for item in items]
    for name, (where, split) in others.items():
        try:
            known = set(_prompts(read(where, split, download=download), where, columns))
            found.overlap[name] = sum(prompt in known for prompt in prompts)
        except (DataError, UsageError) as error:
            if name == eval_data:
                raise
            found.overlap[name] = str(error)
    _add_doubts(found, items)
    return found


def survey_stored(replay: Replay, max_length: int = MAX_LENGTH) -> TextSurvey:
    """Measure texts that are stored as tokens, where equal texts have one number."""
    table = table_of(replay)
    index = replay.tables[table]
    roles = {"prompt": 0, "chosen": 1, "rejected": 3} if table == "pairs" else {"prompt": 0, "answer": 1}
    lengths = {role: replay.length[index[:, column]] for role, column in roles.items()}
    found = _survey(table, str(replay.meta.get("format")), int(replay.meta.get("rows", len(index))), lengths, "tokens")
    found.limit = int(replay.meta.get("limits", {}).get("max_length", max_length))
    found.notes = [*replay.meta.get("notes", [])]
    found.doubts = [*replay.meta.get("warnings", [])]
    if "singles/label" in replay.tables:
        found.wanted = int(replay.tables["singles/label"].sum())
    answers = [column for role, column in roles.items() if role != "prompt"]
    _add_doubts(found, [Item(int(row[0]), tuple(row[answers].tolist())) for row in index])
    return found


def holds_problems(target: Target, source: Source, columns: Mapping[str, str | None] | None) -> bool:
    """Whether rows are prompts with right answers, rather than texts to imitate."""
    if "hub" in target.info:
        return True
    try:
        detect(source, columns)
    except DataError:
        try:
            named = problem_columns(source, dict(columns or {}))
        except (DataError, UsageError):
            return False
        return bool({"answer", "solution"} & named.keys())
    return False


# -- pairs and single answers ------------------------------------------------------------------------------------------


def _read(
    source: Source, form: Format, separator: str, pair_strategy: str = "best_vs_worst"
) -> tuple[list[Record], Faults, Counter[str]]:
    faults, counts = Faults(source.where, source.rows, "drop", max_bad=1.0), Counter[str]()
    made = list(records(source, form, faults, counts, pair_strategy=pair_strategy, separator=separator))
    return made, faults, counts


def _of_records(
    source: Source,
    columns: Mapping[str, str | None] | None,
    tokenizer: Any,
    separator: str,
    max_length: int,
    pair_strategy: str,
) -> tuple[TextSurvey, list[Item]]:
    form = detect(source, columns)
    made, faults, counts = _read(source, form, separator, pair_strategy)
    if not made:
        raise DataError(f"{source.where} gives nothing to train on: {faults.table()}. Check it.")
    kind = "singles" if len(made[0].answers) == 1 else "pairs"
    roles = ("chosen", "rejected") if kind == "pairs" else ("answer",)
    lengths = _token_lengths(made, roles, tokenizer) if tokenizer is not None else _characters(made, roles)
    found = _survey(kind, str(form), source.rows, lengths, "characters" if tokenizer is None else "tokens")
    found.kept, found.limit = len(made), max_length
    found.notes = [f"{what}: {count:,}" for what, count in counts.items() if count]
    if faults.bad:
        found.doubts.append(f"{faults.bad:,} of {source.rows:,} rows would be dropped: {faults.table()}")
    if "label" in made[0].facts:
        found.wanted = sum(bool(one.facts["label"]) for one in made)
    if form.kind.name == "lists":
        found.first = _places(source, form)
    return found, [Item(compared_text(one.prompt), tuple(map(compared_text, one.answers))) for one in made]


def compared_text(text: Text) -> str:
    """What is said, without white space at the ends."""
    return text.strip() if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def _said(text: Text) -> int:
    """Characters of a text, or of all turns."""
    return len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)


def _characters(made: Sequence[Record], roles: Sequence[str]) -> dict[str, np.ndarray]:
    found = {"prompt": [_said(one.prompt) for one in made]}
    found |= {role: [_said(one.answers[i]) for one in made] for i, role in enumerate(roles)}
    return {role: np.asarray(values) for role, values in found.items()}


def _token_lengths(made: Sequence[Record], roles: Sequence[str], tokenizer: Any) -> dict[str, np.ndarray]:
    """Tokens of at most :data:`MEASURED` rows, before anything is cut; rows that cannot be rendered are left out."""
    some = [made[i] for i in _sample(len(made))]
    rows = (Row(one.prompt, one.answers, one.template) for one in some)
    encoded = encode(rows, tokenizer, Limits(1 << 30, truncation="keep_end"))
    found = [[len(one.prompt), *map(len, one.answers)] for one in encoded if not one.fault]
    if not found:
        raise DataError(
            "no row could be tokenised; expected texts that the tokenizer renders. Check its chat template."
        )
    return dict(zip(("prompt", *roles), np.asarray(found).T))


def _sample(rows: int) -> np.ndarray:
    """The rows that are measured: all, or some chosen at random, the same ones every time."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:MEASURED])


def _places(source: Source, form: Format) -> np.ndarray | None:
    """How often the best answer of a list stands at each place, (K,), of lists of the most frequent length."""
    lists = [
        scores
        for scores in typed_column(source, "scores", form.columns["scores"])
        if isinstance(scores, list) and len(scores) > 1 and all(isinstance(one, (int, float)) for one in scores)
        if scores.count(max(scores)) == 1
    ]
    if not lists:
        return None
    size = Counter(map(len, lists)).most_common(1)[0][0]
    return np.bincount([int(np.argmax(one)) for one in lists if len(one) == size], minlength=size)


def _survey(kind: str, form: str, rows: int, lengths: dict[str, np.ndarray], unit: str) -> TextSurvey:
    measured = len(lengths["prompt"])
    found = TextSurvey(kind, form, rows, measured, unit, lengths, measured, MAX_LENGTH)
    if kind == "pairs":
        more = lengths["chosen"] - lengths["rejected"]
        found.longer = int((more > 0).sum()), int((more != 0).sum())
    return found


# -- prompts with right answers ----------------------------------------------------------------------------------------


def _of_problems(source: Source, columns: dict[str, str | None], tokenizer: Any) -> tuple[TextSurvey, list[Item]]:
    named = problem_columns(source, columns)
    problems = list(read_problems(source, named))
    faults = Faults(source.where, source.rows, "drop", max_bad=1.0)
    for i, problem in enumerate(problems):
        if problem.fault is not None:
            faults.add(i, *problem.fault.args)
    good = [problem for problem in problems if problem.fault is None]
    if not good:
        raise DataError(
            f"{source.where} holds no problem that can be learned from: {faults.table()}. Correct the rows."
        )
    answered = [problem for problem in good if problem.answers]
    lengths, unit = _problem_lengths(good, answered, tokenizer)
    told = ", ".join(ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in named.items())
    found = _survey("problems", f"prompts with answers that can be checked; columns {told}", source.rows, lengths, unit)
    found.kept, found.limit = len(good), MAX_PROMPT_LENGTH
    found.unanswered = source.rows - len(answered)
    found.counts["with a demonstration"] = sum(problem.solution is not None for problem in good)
    found.counts["with several right answers, of which each is right"] = sum(len(p.answers) > 1 for p in good)
    if faults.bad:
        found.doubts.append(f"{faults.bad:,} of {source.rows:,} rows would be dropped: {faults.table()}")
    return found, [Item(problem.text.strip(), tuple(sorted(problem.answers))) for problem in good]


def _problem_lengths(
    good: Sequence[Problem], answered: Sequence[Problem], tokenizer: Any
) -> tuple[dict[str, np.ndarray], str]:
    if tokenizer is None:
        found = {"prompt": np.asarray([len(problem.text) for problem in good])}
    else:
        rows = (Row(good[i].asked("{prompt}", chat=False), (), good[i].options) for i in _sample(len(good)))
        encoded = encode(rows, tokenizer, Limits(1 << 30, truncation="keep_end"))
        found = {"prompt": np.asarray([len(one.prompt) for one in encoded if not one.fault])}
    characters = {
        "right answer, characters": [len(problem.answers[0]) for problem in answered],
        "demonstration, characters": [len(p.solution) for p in good if p.solution is not None],
    }
    found |= {role: np.asarray(values) for role, values in characters.items() if values}
    return found, "characters" if tokenizer is None else "tokens"


# -- what holds for all ------------------------------------------------------------------------------------------------


def _prompts(source: Source, target: Target, columns: Mapping[str, str | None] | None) -> Iterator[Hashable]:
    """The prompts of another part, as :class:`Item` has them."""
    if holds_problems(target, source, columns):
        rows = read_problems(source, problem_columns(source, dict(columns or {})))
        yield from (problem.text.strip() for problem in rows if problem.fault is None)
    else:
        yield from (compared_text(one.prompt) for one in _read(source, detect(source, columns), "")[0])


def _add_doubts(found: TextSurvey, items: Sequence[Item]) -> None:
    """Repetitions and limits as counts, and in plain words what deserves a look."""
    if found.unit == "tokens":
        sides = [values for role, values in found.lengths.items() if role in ("chosen", "rejected", "answer")]
        whole = found.lengths["prompt"] + (np.maximum.reduce(sides) if sides else 0)
        found.beyond = int((whole > found.limit).sum())
    distinct, prompts = Counter(items), Counter(item.prompt for item in items)
    repeated = len(items) - len(distinct)
    found.counts |= {"distinct prompts": len(prompts), "rows that repeat an earlier one": repeated}
    told = found.doubts
    if repeated:
        told.append(f"{repeated:,} of {len(items):,} rows repeat an earlier one: they count several times.")
    if found.kind == "pairs":
        turned = sum(Item(one.prompt, one.answers[::-1]) in distinct for one in distinct) // 2
        found.counts["pairs that another one contradicts"] = turned
        if turned:
            told.append(f"{turned:,} pairs prefer what another pair with the same prompt rejects.")
    _add_biases(found, items)
    for name, seen in found.overlap.items():
        if isinstance(seen, int) and seen:
            told.append(
                f"{seen:,} of {len(items):,} rows have a prompt that is in {name} too: what is measured there "
                "is partly memory."
            )
    if found.beyond:
        what = "prompt" if found.kind == "problems" else "prompt with answer"
        does = "are faulty rows" if found.kind == "problems" else "would be cut"
        told.append(
            f"{found.beyond:,} of {found.measured:,} rows have more than {found.limit:,} tokens of {what} and {does}."
        )
    if found.unanswered:
        told.append(f"{found.unanswered:,} of {found.rows:,} rows have no right answer to compare with.")


def _add_biases(found: TextSurvey, items: Sequence[Item]) -> None:
    """What a model could learn instead of what is meant."""
    told = found.doubts
    if found.longer is not None and unlike(*found.longer, 0.5):
        share = found.longer[0] / found.longer[1]
        which = "longer" if share > 0.5 else "shorter"
        told.append(
            f"The {which} answer is preferred in {max(share, 1 - share):.0%} of the {found.longer[1]:,} pairs whose "
            "answers differ in length: a model can learn length instead of quality."
        )
    if found.first is not None:
        count, chance, last = int(found.first.sum()), 1.0 / len(found.first), len(found.first)
        place = int(np.abs(found.first / count - chance).argmax())
        if unlike(int(found.first[place]), count, chance):
            told.append(
                f"The best answer stands at place {place + 1} of {last} in {found.first[place] / count:.0%} "
                f"of the lists; by chance it would be {chance:.0%}. Who judged may prefer a place."
            )
    if found.wanted is not None and not 0.2 <= found.wanted / len(items) <= 0.8:
        told.append(f"{found.wanted:,} of {len(items):,} answers are wanted: weigh the two sides of KTO to suit.")
    answers = Counter(item.answers[0] for item in items) if found.kind != "problems" else Counter()
    most = answers.most_common(1)[0][1] if answers else 0
    if most > max(10, 0.05 * len(items)):
        told.append(f"One answer is given {most:,} times among {len(items):,}: a model learns to give it always.")


def unlike(successes: int, trials: int, chance: float) -> bool:
    """Whether a share is more than a tenth away from chance, which its 95 % interval (Wilson) leaves out as well."""
    error = math.sqrt(chance * (1.0 - chance) / max(trials, 1))
    return trials >= 30 and abs(successes / trials - chance) > max(0.1, Z * error)
