"""Rows of problems: which columns are prompts, right answers and demonstrations, and what each row says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from offpolicy.data.texts.answers import after_mark, demonstration, right_answers, without_annotations
from offpolicy.data.texts.formats import Source, scan, template_options
from offpolicy.data.texts.messages import Fault, WrongType, check_characters, read_prompt
from offpolicy.data.texts.numbers import MARK
from offpolicy.data.texts.rendering import Text
from offpolicy.errors import DataError, UsageError, nearest

PROMPTS = ("prompt", "question", "problem")
ANSWERS = ("answer", "ground_truth", "reward_model", "golden_answers")
SOLUTIONS = ("solution", "target", "completion")


@dataclass
class Problem:
    """A row: its prompt as text or turns, right answers, demonstration, options of the template; or what is wrong."""

    prompt: Text = ""
    system: str | None = None
    answers: list[str] = field(default_factory=list)
    solution: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None

    @property
    def text(self) -> str:
        """All that is asked."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(turn["content"] for turn in self.prompt)

    def hashes(self) -> set[str]:
        """Of the question, wherever it stands."""
        turns = [] if isinstance(self.prompt, str) else [turn["content"] for turn in self.prompt]
        return {question_hash(text) for text in (self.text, *turns)}

    def asked(self, template: str, chat: bool) -> Text:
        """What is put to the policy."""
        put = template.replace("{prompt}", self.prompt) if isinstance(self.prompt, str) else self.prompt
        as_turns = chat or self.system is not None or not isinstance(put, str)
        return read_prompt(put, "prompt", chat=as_turns, system=self.system)


def read_problems(source: Source, named: dict[str, str]) -> Iterator[Problem]:
    """The rows of a source; what is wrong with one stands in it.

    Raises:
        DataError: a column holds values of a wrong or of different types.
    """
    scan(source, named["prompt"])
    column = {ours: source.column(theirs) for ours, theirs in named.items()}
    values = [{ours: column[ours][row] for ours in column} for row in range(source.rows)]
    in_solutions = _marked_answers(values, named)
    for row, value in enumerate(values):
        problem = Problem()
        try:
            _read_prompt(problem, value, named, row)
            _read_answer(problem, value, named, in_solutions)
            check_characters(problem.solution, named.get("solution", named.get("answer", "solution")))
            for answer in problem.answers:
                check_characters(answer, named.get("answer", named.get("solution", "answer")))
        except Fault as fault:
            problem.fault = fault
        except WrongType as error:
            raise DataError(f"{source.where}, row {row}: {error}") from None
        yield problem


def _read_prompt(problem: Problem, value: dict[str, Any], named: dict[str, str], row: int) -> None:
    name, prompt = named["prompt"], value["prompt"]
    system = value.get("system")
    chat = not isinstance(prompt, str | None)
    if prompt is None:
        raise Fault(name, "no_prompt", None)
    problem.prompt = read_prompt(prompt, name, chat=chat)
    if not problem.text.strip():
        raise Fault(name, "no_prompt", prompt)
    problem.system = str(system) if system else None
    if chat or problem.system is not None:
        problem.options = template_options(value, row)


def _read_answer(problem: Problem, value: dict[str, Any], named: dict[str, str], in_solutions: bool) -> None:
    if "solution" in named:
        problem.solution = demonstration(value["solution"], named["solution"], problem.prompt)
    if "answer" in named:
        name = named["answer"]
        problem.answers = right_answers(value["answer"], name)
        if not any(problem.answers):
            raise Fault(name, "empty" if problem.answers or value["answer"] is not None else "none", value["answer"])
        if in_solutions and len(problem.answers) == 1:
            whole = problem.answers[0]
            problem.solution = without_annotations(whole) if problem.solution is None else problem.solution
            problem.answers = [after_hashes] if (after_hashes := _after_hashes(whole)) else []
            if not problem.answers:
                raise Fault(name, "no_mark", whole)
    elif "solution" in named:
        name = named["solution"]
        if problem.solution is None:
            raise Fault(name, "none" if value["solution"] is None else "empty", value["solution"])
        found = after_mark(problem.solution)
        if found is None:
            raise Fault(name, "no_mark", problem.solution)
        problem.answers = [found]


def _marked_answers(values: list[dict[str, Any]], named: dict[str, str]) -> bool:
    """Whether the column of answers holds solutions, which end with "####" and the answer."""
    texts = []
    for value in values if "answer" in named else ():
        with suppress(Fault):
            texts += right_answers(value["answer"], named["answer"])
    texts = [text for text in texts if text]
    return bool(texts) and sum(MARK in text for text in texts) >= 0.9 * len(texts)


def _after_hashes(text: str) -> str | None:
    return text.rpartition(MARK)[2].strip() if MARK in text else None


def problem_columns(source: Source, given: dict[str, str | None]) -> dict[str, str]:
    """Our name → the source's."""
    wanted: dict[str, tuple[str, ...]] = {"prompt": PROMPTS, "answer": ANSWERS, "solution": SOLUTIONS}
    wanted |= {"solution_logps": ("solution_logps",), "system": ()}  # a system message only where it is named
    wanted |= {"tools": ("tools",), "chat_template_kwargs": ("chat_template_kwargs",)}
    for ours, theirs in given.items():
        if ours not in wanted:
            raise UsageError(f"`columns` names '{ours}'; expected {', '.join(wanted)}.{nearest(ours, wanted)}")
        if theirs is not None and theirs not in source.names:
            raise UsageError(
                f"`columns` says that {ours} is '{theirs}', but {source.where} has {', '.join(source.names)}."
                f"{nearest(theirs, source.names)}"
            )
    found = {k: next((n for n in names if n in source.names), None) for k, names in wanted.items()} | given
    if "answer" not in given:  # the first column with any value: tables may keep an empty one
        filled = (n for n in ANSWERS if n in source.names and any(v is not None for v in source.column(n)))
        found["answer"] = next(filled, None)
    named = {k: v for k, v in found.items() if v is not None}
    if "prompt" not in named:
        raise DataError(
            f"{source.where} has the columns {', '.join(source.names)}; expected a prompt ({', '.join(PROMPTS)}) and "
            f'an answer ({", ".join(ANSWERS)}). Say which they are: --data.columns \'{{"prompt": "…"}}\'.'
        )
    return named


def question_hash(text: str) -> str:
    """12 hexadecimal digits of the SHA-256 of a question, white space aside."""
    return sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:12]
