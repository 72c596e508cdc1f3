"""What answers are: one class per kind."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import combinations, pairwise
from typing import Any, cast

from offpolicy.data.texts.formats.form import AnswerKind, Format
from offpolicy.data.texts.formats.source import Record
from offpolicy.data.texts.formats.values import as_number, checked_answer, label_of, numbers_in, template_options
from offpolicy.data.texts.messages import Fault, blank, read_text, same
from offpolicy.errors import DataError

STRATEGIES = ("best_vs_worst", "best_vs_random", "all_pairs", "adjacent", "independent", "none")


class PreferencePairs(AnswerKind):
    """A preferred and another answer."""

    name, words = "pairs", "preference pairs"
    answers, numbers = ("chosen", "rejected"), ("score_chosen", "score_rejected", "weight", "agreement")

    def fits(self, columns: Mapping[str, str]) -> bool:
        return "chosen" in columns or "rejected" in columns

    def read(self, row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
        chosen, rejected = (read_text(values[name], name) for name in self.answers)
        equal = same(chosen, rejected)
        if equal and (blank(chosen) or not form.prompt.for_each_side):
            raise Fault(*(("chosen", "empty") if blank(chosen) else ("rejected", "identical")), chosen)
        prompt, other, (chosen, rejected) = form.prompt.part(values, (chosen, rejected), form.chat, counts)
        if equal and (other is None or same(prompt, other)):
            raise Fault("rejected", "identical", chosen)
        chosen = checked_answer(prompt, chosen, "chosen", form.chat, form.prompt.apart)
        rejected = checked_answer(other or prompt, rejected, "rejected", form.chat, form.prompt.apart)
        if isinstance(prompt, str) and form.prompt.columns == ("prompt",) and prompt.strip():
            start = prompt.strip()
            repeats = [cast(str, answer).lstrip().startswith(start) for answer in (chosen, rejected)]
            if all(repeats):
                raise Fault("chosen", "repeated", chosen)
            counts["answers begin with their prompt, on one side only"] += any(repeats)
        facts = numbers_in(values, self.numbers)
        if facts.get("score_chosen", math.inf) < facts.get("score_rejected", -math.inf):
            counts["chosen answers have a lower score than the rejected"] += 1
        yield Record(row, prompt, (chosen, rejected), other, facts, template_options(values, row))


class ScoredLists(AnswerKind):
    """Several answers with a score each, which become pairs."""

    name, words, answers = "lists", "lists of scored answers", ("completions", "scores")
    numbers = ("weight",)

    def fits(self, columns: Mapping[str, str]) -> bool:
        return "completions" in columns

    def read(self, row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
        """One record per scored answer."""
        answers, scores = values["completions"], values["scores"]
        prompt, _, _ = form.prompt.part(values, (), form.chat, counts)
        if answers is None or scores is None:
            raise Fault("completions" if answers is None else "scores", "none", None)
        if not isinstance(scores, list) or len(scores) != len(answers):
            raise Fault("scores", "scores", scores)
        template, shared = template_options(values, row), numbers_in(values, self.numbers)
        made: list[Record] = []
        for answer, score in zip(answers, scores):
            several = isinstance(score, list) and len(score) > 0
            numbers = [as_number(one) for one in (score if several else [score])]
            if None in numbers:
                counts["answers in lists left out, as they have no score"] += 1
                continue
            text = read_text(answer, "completions")
            one = checked_answer(prompt, text, "completions", form.chat, form.prompt.apart)
            value = numbers if several else numbers[0]
            made.append(Record(row, prompt, (one,), None, {"score": value, **shared}, template))
        if len(made) < 2:
            raise Fault("scores", "scores", scores)
        yield from made

    def arrange(self, made: list[Record], row: int, strategy: str, gap: float, counts: Counter[str]) -> list[Record]:
        """Pairs from the scored answers of one list; equal scores never make one."""
        if strategy == "none":
            for one in made:
                one.facts["group"] = row
            return made
        if any(isinstance(one.facts["score"], list) for one in made):
            raise DataError(
                "the scores of an answer are several numbers, by which it cannot be ordered; expected one for pairs. "
                "Pass --data.pair_strategy none to learn by all of them (DPA)."
            )
        order = sorted(made, key=lambda one: -one.facts["score"])  # stable: equal scores stay in the order of the list
        if strategy == "best_vs_worst":
            chosen = [(order[0], order[-1])]
        elif strategy == "best_vs_random":
            digest = sha256(json.dumps([row, order[0].prompt], sort_keys=True).encode()).digest()
            chosen = [(order[0], order[1 + int.from_bytes(digest[:8], "big") % (len(order) - 1)])]
        elif strategy == "independent":  # of their scores: the first with the second, the third with the fourth
            turned = [made[i : i + 2] for i in range(0, len(made) - 1, 2)]
            chosen = [(a, b) if a.facts["score"] >= b.facts["score"] else (b, a) for a, b in turned]
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
                facts = {name: value for name, value in better.facts.items() if name != "score"}  # of the list
                facts |= {"score_chosen": better.facts["score"], "score_rejected": worse.facts["score"]}
                answers = (better.answers[0], worse.answers[0])
                pairs.append(Record(row, better.prompt, answers, None, facts, better.template))
        return pairs


class SingleAnswers(AnswerKind):
    """One answer, labelled or not."""

    name, words, answers, numbers = "singles", "single answers", ("completion",), ("label", "weight")

    def fits(self, columns: Mapping[str, str]) -> bool:
        return "completion" in columns or "label" in columns

    def read(self, row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
        (name,) = self.answers
        answer = read_text(values[name], name)
        prompt, _, (answer,) = form.prompt.part(values, (answer,), form.chat, counts)
        answer = checked_answer(prompt, answer, name, form.chat, form.prompt.apart)
        start = prompt.strip() if isinstance(prompt, str) else ""
        if len(start) >= 16 and cast(str, answer).lstrip().startswith(start):
            raise Fault(name, "repeated", answer)
        facts = numbers_in(values, ("weight",))
        if "label" in values:
            facts["label"] = label_of(values["label"], form.columns["label"])
        yield Record(row, prompt, (answer,), None, facts, template_options(values, row))


class Conversations(SingleAnswers):
    """One answer: the last turn of a conversation."""

    answers = ("messages",)

    def fits(self, columns: Mapping[str, str]) -> bool:
        return "messages" in columns


KINDS: tuple[AnswerKind, ...] = (  # the first that fits is taken
    PreferencePairs(),
    ScoredLists(),
    SingleAnswers(),
    Conversations(),
)
