"""Pairs of prompts made from texts: instructions that an answer does or does not satisfy (arXiv:2505.12845).

A checkable instruction is made for an answer: one that it satisfies, or one of the same kind that it breaks. Put in
front of a prompt they make pairs whose better side is known without a judge. The kinds and their wording are ours.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from offpolicy.data.names import resolve
from offpolicy.data.texts.formats import Faults, Record, detect, records
from offpolicy.data.texts.hub import read
from offpolicy.data.texts.rendering import Text
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.files import atomic_write

WORDS = ("however", "therefore", "indeed", "perhaps", "finally", "because", "although", "certainly")


@dataclass(frozen=True)
class Instruction:
    """A sentence that asks something of an answer, and whether an answer does it."""

    text: str
    check: Callable[[str], bool]


Made = Instruction | None
Maker = Callable[[str, bool, Random], Made]


def words_of(text: str) -> list[str]:
    """The words of a text, without the marks beside them."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def sentences_of(text: str) -> int:
    """How many sentences a text has: runs of marks at the end of one, and what stands behind the last."""
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()])


def at_most(answer: str, satisfied: bool, draw: Random) -> Made:
    count = len(words_of(answer))
    if count < 2:
        return None
    limit = count + draw.randint(0, count // 2) if satisfied else draw.randint(count // 2, count - 1)
    plural = "" if limit == 1 else "s"
    return Instruction(f"Use at most {limit} word{plural}.", lambda text: len(words_of(text)) <= limit)


def at_least(answer: str, satisfied: bool, draw: Random) -> Made:
    count = len(words_of(answer))
    limit = draw.randint(max(1, count // 2), max(1, count)) if satisfied else count + draw.randint(1, count + 1)
    if satisfied and count < limit:
        return None
    plural = "" if limit == 1 else "s"
    return Instruction(f"Use at least {limit} word{plural}.", lambda text: len(words_of(text)) >= limit)


def sentences(answer: str, satisfied: bool, draw: Random) -> Made:
    count = sentences_of(answer)
    wanted = count if satisfied else count + draw.choice([1, 2] if count < 3 else [-1, 1, 2])
    plural = "" if wanted == 1 else "s"
    return Instruction(f"Write exactly {wanted} sentence{plural}.", lambda text: sentences_of(text) == wanted)


def contains(answer: str, satisfied: bool, draw: Random) -> Made:
    word = _word(answer, satisfied, draw)
    if not word:
        return None
    return Instruction(f'Use the word "{word}".', lambda text: word in _lower(text))


def avoids(answer: str, satisfied: bool, draw: Random) -> Made:
    word = _word(answer, not satisfied, draw)
    if not word:
        return None
    return Instruction(f'Do not use the word "{word}".', lambda text: word not in _lower(text))


def begins(answer: str, satisfied: bool, draw: Random) -> Made:
    word = (_lower(answer) or [""])[0] if satisfied else _word(answer, False, draw)
    if not word:
        return None
    return Instruction(f'Begin with the word "{word}".', lambda text: _lower(text)[:1] == [word])


def ends(answer: str, satisfied: bool, draw: Random) -> Made:
    word = (_lower(answer) or [""])[-1] if satisfied else _word(answer, False, draw)
    if not word:
        return None
    return Instruction(f'Let the last word be "{word}".', lambda text: _lower(text)[-1:] == [word])


def case(answer: str, satisfied: bool, draw: Random) -> Made:
    small = answer == answer.lower()
    if not (small or answer == answer.upper()) and satisfied:
        return None
    lower = small == satisfied
    name, changed = ("lower", str.lower) if lower else ("capital", str.upper)
    if (answer == changed(answer)) != satisfied:
        return None
    return Instruction(f"Write in {name} letters alone.", lambda text: text == changed(text))


def digits(answer: str, satisfied: bool, draw: Random) -> Made:
    there = any(c.isdigit() for c in answer) == satisfied
    words = "Use at least one digit." if there else "Do not use any digit."
    return Instruction(words, lambda text: any(c.isdigit() for c in text) == there)


def paragraphs(answer: str, satisfied: bool, draw: Random) -> Made:
    def count(text: str) -> int:
        return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])

    wanted = count(answer) if satisfied else count(answer) + draw.randint(1, 2)
    plural = "" if wanted == 1 else "s"
    return Instruction(
        f"Write {wanted} paragraph{plural}, with a blank line between.", lambda text: count(text) == wanted
    )


def bullets(answer: str, satisfied: bool, draw: Random) -> Made:
    def has(text: str) -> bool:
        return bool(re.search(r"(?m)^\s*[-*•] ", text))

    wanted = has(answer) == satisfied
    words = "Write a list with bullets." if wanted else "Do not write a list with bullets."
    return Instruction(words, lambda text: has(text) == wanted)


MAKERS: tuple[Maker, ...] = (
    *(at_most, at_least, sentences, contains, avoids, begins, ends, case, digits, paragraphs, bullets),
)


def _lower(text: str) -> list[str]:
    return [word.lower() for word in words_of(text)]


def _word(answer: str, inside: bool, draw: Random) -> str:
    """A word that stands in an answer, or one that does not; "" for none."""
    known = sorted(set(_lower(answer)))
    if inside:
        return draw.choice(known) if known else ""
    return draw.choice([word for word in WORDS if word not in known] or [""])


# -- rows --------------------------------------------------------------------------------------------------------------


def instructed(prompt: Text, instructions: list[Instruction]) -> Text:
    """A prompt behind its instructions: in front of plain text, or of the last turn of the user, else the last turn."""
    told = " ".join(one.text for one in instructions)
    if isinstance(prompt, str):
        return f"{told}\n{prompt}"
    last = max((i for i, turn in enumerate(prompt) if turn["role"] == "user"), default=len(prompt) - 1)
    turn = {**prompt[last], "content": f"{told}\n{prompt[last]['content']}"}
    return [*prompt[:last], turn, *prompt[last + 1 :]]


def intra(record: Record, draw: Random, most: int) -> dict[str, Any] | None:
    """One answer to two prompts: it satisfies all instructions of the first, and not all of the same kinds of the
    second."""
    answer = _plain(record.answers[0])
    good: list[Instruction] = []
    other: list[Instruction] = []
    for maker in draw.sample(MAKERS, len(MAKERS)):
        satisfied, broken = maker(answer, True, draw), maker(answer, False, draw)
        if satisfied and broken and len(good) < most:
            good.append(satisfied)
            other.append(broken if not other or draw.random() < 0.5 else satisfied)
    if not good:
        return None
    prompts = {"prompt_chosen": instructed(record.prompt, good), "prompt_rejected": instructed(record.prompt, other)}
    return prompts | {"chosen": record.answers[0], "rejected": record.answers[0]}


def inter(record: Record, draw: Random, most: int) -> dict[str, Any] | None:
    """Two answers under two prompts: the first has instructions that the chosen satisfies and the rejected breaks."""
    chosen, rejected = map(_plain, record.answers)
    found = [maker(chosen, True, draw) for maker in draw.sample(MAKERS, len(MAKERS))]
    apart = [one for one in found if one and not one.check(rejected)][:most]
    if not apart:
        return None
    prompts = {"prompt_chosen": instructed(record.prompt, apart), "prompt_rejected": record.prompt}
    return prompts | {"chosen": record.answers[0], "rejected": record.answers[1]}


def rows_of_record(record: Record, seed: int, most: int) -> Iterator[dict[str, Any]]:
    """The rows that a prompt with its answers gives: the pair as it is, and pairs with instructions."""
    draw = Random(f"{seed} {record.row}")
    if len(record.answers) == 2:
        sides = {"chosen": record.answers[0], "rejected": record.answers[1]}
        yield {"prompt_chosen": record.prompt, "prompt_rejected": record.prompt, **sides}
    for make in (intra, inter)[: len(record.answers)]:
        row = make(record, draw, most)
        if row is not None:
            yield row


def make_instructions(name: str, out: str | os.PathLike[str], *, seed: int = 0, most: int = 3) -> Counter[str]:
    """Write pairs with instructions made from texts, as JSON lines for MAPL, and count them by kind.

    Args:
        name: pairs or single answers, in any form that training reads.
        out: a new file.
        seed: of what is drawn.
        most: instructions of a prompt, at most.

    Raises:
        UsageError: the file is there, or the texts are unknown.
        DataError: texts that cannot be trained on, or that have two prompts already.
    """
    check_range("most", most, 1)
    path = Path(out)
    if path.exists():
        raise UsageError(f"{path} exists; expected a new file. Remove it or choose another.")
    source = read(resolve(name, language=True))
    faults, counts = Faults(source.where, source.rows), Counter[str]()
    form, found, lines = detect(source), Counter[str](), []
    for record in records(source, form, faults, counts, pair_strategy="best_vs_worst"):
        if record.rejected_prompt is not None:
            raise DataError(f"{source.where} has two prompts in a row; expected one. Pass ordinary pairs or answers.")
        more = _further(record)
        for row in rows_of_record(record, seed, most):
            prompts, answers = row["prompt_chosen"] != row["prompt_rejected"], row["chosen"] != row["rejected"]
            found["inter" if prompts and answers else "intra" if prompts else "ordinary"] += 1
            lines.append(json.dumps(row | more, ensure_ascii=False) + "\n")
    faults.check()
    if not lines:
        raise DataError(f"{source.where} gives no pair, as no instruction can be made for it; expected other answers.")
    atomic_write(path, "".join(lines))
    return found


def _further(record: Record) -> dict[str, Any]:
    """The weight of a record and what it says to the chat template, as columns."""
    told = {name: value for name, value in record.template.items() if name != "tools"}
    found = {"weight": record.facts.get("weight"), "tools": record.template.get("tools"), "chat_template_kwargs": told}
    return {name: value for name, value in found.items() if value is not None and value != {}}


def _plain(answer: Text) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]
