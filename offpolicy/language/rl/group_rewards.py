"""Rewards without a right answer: what the answers to a prompt say about each other, and how an answer is built.

Functions of a batch; ``groups`` numbers the answers that were drawn together. The answer that counts is the one that
``####`` or ``\\boxed{}`` marks, else all of the text; equal numbers are equal answers. An answer that was cut has no
vote. Demonstrations in a group vote too.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from offpolicy.data.texts.answers import alternatives
from offpolicy.data.texts.numbers import last_mark, last_number_in, number_of, plain_number
from offpolicy.errors import check_choice, check_range
from offpolicy.language.rl.verifiers import Reference, final_part

BY = ("answer", "last_number")


def voted(prompt: str, answer: str, ended: bool, by: str = "answer") -> str | None:
    """What an answer says, in one spelling; None for nothing."""
    if not ended:
        return None
    text = final_part(answer, prompt)
    if by == "last_number":
        number = last_number_in(text)
        return None if number is None else str(number.normalize())
    mark = last_mark(text)
    if mark is not None and not mark.whole:
        return None
    said = (text if mark is None else mark.content).strip()
    number = plain_number(said) if mark is None else number_of(said)
    return (said or None) if number is None else str(number.normalize())


@dataclass(frozen=True)
class Voting:
    """What rewards by votes share.

    Args:
        by: "answer", the marked or whole one; or "last_number", the last number of the text.
    """

    by: str = "answer"

    def __post_init__(self) -> None:
        check_choice("by", self.by, BY)

    def votes(
        self, prompts: Sequence[str], completions: Sequence[str], groups: Sequence[int], ended: Sequence[bool]
    ) -> tuple[list[str | None], dict[int, list[int]]]:
        """What each answer says, and the rows of each group."""
        said = [voted(p, text, bool(end), self.by) for p, text, end in zip(prompts, completions, ended)]
        rows: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            rows[group].append(i)
        return said, rows


@dataclass(frozen=True)
class Majority(Voting):
    """1 for the answers that most of the group give, else 0 (TTRL, arXiv:2504.16084).

    Of equally many votes the answer that was drawn first wins, as in the authors' code.

    Args:
        least: share of the group that must agree, in [0, 1]; below it all get 0.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("least", self.least, 0.0, 1.0)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], groups: Sequence[int], ended: Sequence[bool]
    ) -> list[float]:
        said, of_group = self.votes(prompts, completions, groups, ended)
        found = [0.0] * len(said)
        for rows in of_group.values():
            winner = majority([said[i] for i in rows], self.least)
            for i in rows:
                found[i] = float(winner is not None and said[i] == winner)
        return found


def majority(said: Sequence[str | None], least: float = 0.0) -> str | None:
    """The answer with the most votes, the first of equal ones; None where nobody votes or too few agree."""
    count = Counter(one for one in said if one is not None)
    winner, number = count.most_common(1)[0] if count else (None, 0)
    return winner if number >= least * len(said) else None


@dataclass(frozen=True)
class Agreement(Voting):
    """The share of the group that gives the same answer (EMPO, arXiv:2504.05812, with answers for semantic clusters).

    A group whose entropy of answers, −Σ f ln f, lies outside of a band gets 0, so that it has no signal. The published
    thresholds are unverified; the default is no band.

    Args:
        low: least entropy in nats, ≥ 0.
        high: largest entropy; None for any.
    """

    low: float = 0.0
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("low", self.low, 0.0)
        check_range("high", self.low if self.high is None else self.high, self.low)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], groups: Sequence[int], ended: Sequence[bool]
    ) -> list[float]:
        said, of_group = self.votes(prompts, completions, groups, ended)
        found = [0.0] * len(said)
        for rows in of_group.values():
            count = Counter(said[i] for i in rows if said[i] is not None)
            shares = {one: number / len(rows) for one, number in count.items()}
            entropy = -sum(f * math.log(f) for f in shares.values())
            if self.low <= entropy <= (math.inf if self.high is None else self.high):
                for i in rows:
                    found[i] = shares.get(said[i], 0.0)
        return found


@dataclass(frozen=True)
class MajorityNovelty(Voting):
    """Majority and novelty: ½ to 1 for answers of the majority, −1 to −½ for others, −1 without a vote (EVOL-RL,
    arXiv:2509.15194).

    Within each of the two, the place between the bounds is the novelty, scaled from its least to its largest: 1 − (α·
    mean similarity to the answers on the same side + (1 − α)·largest similarity to any other of the group). In place
    of the authors' embedder the similarity of two texts is the share of word pairs that they have in common (Jaccard),
    which is ours.

    Args:
        alpha: α in [0, 1]; 0.5, unverified.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0, 1.0)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], groups: Sequence[int], ended: Sequence[bool]
    ) -> list[float]:
        said, of_group = self.votes(prompts, completions, groups, ended)
        found = [-1.0] * len(said)
        for rows in of_group.values():
            winner = majority([said[i] for i in rows])
            pairs = {i: word_pairs(completions[i]) for i in rows}
            for wins in (True, False):
                side = [i for i in rows if said[i] is not None and (said[i] == winner) == wins]
                new = scaled([self._novelty(i, side, rows, pairs) for i in side])
                for i, place in zip(side, new):
                    found[i] = (0.5 if wins else -1.0) + 0.5 * place
        return found

    def _novelty(self, i: int, side: Sequence[int], rows: Sequence[int], pairs: Mapping[int, set[Any]]) -> float:
        near = [jaccard(pairs[i], pairs[j]) for j in side if j != i]
        every = [jaccard(pairs[i], pairs[j]) for j in rows if j != i]
        return 1 - (self.alpha * (sum(near) / max(1, len(near))) + (1 - self.alpha) * max(every, default=0.0))


def word_pairs(text: str) -> set[tuple[str, ...]]:
    """Neighbouring words of a text; of one word that word."""
    words = text.split()
    return set(pairwise(words)) or {tuple(words)}


def jaccard(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / max(1, len(first | second))


def scaled(values: Sequence[float]) -> list[float]:
    """Values from their least, 0, to their largest, 1; 1 for equal ones."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [(value - low) / (high - low) if high > low else 1.0 for value in values]


@dataclass(frozen=True)
class Structure:
    """The weighted mean of how far an answer is the JSON object that it should be (RL-Struct).

    Four terms: the text begins and ends as an object; it can be read; the share of the wanted keys that it has; the
    share of the right answer's values that it has. Weights of terms that do not apply count no more. The terms are
    those of the paper's summary, the weights ours.

    Args:
        keys: that the object must have; none for the keys of the right answer, where that is an object.
        weights: of the terms "format", "valid", "keys" and "content", ≥ 0.
    """

    keys: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"format": 0.1, "valid": 0.3, "keys": 0.2, "content": 0.4}
    )

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            check_choice("weights", name, ("format", "valid", "keys", "content"))
            check_range(f"weights.{name}", weight, 0.0)

    def __call__(self, prompt: str, answer: str, reference: Reference, *, ended: bool = True) -> float:
        text = final_part(answer, prompt).strip()
        found, terms = _object(text), {}
        right = max((o for one in alternatives(reference) if (o := _object(one)) is not None), key=len, default={})
        wanted = self.keys or tuple(right)
        terms["format"] = float(ended and text.startswith("{") and text.endswith("}"))
        terms["valid"] = float(ended and found is not None)
        if wanted:
            terms["keys"] = sum(key in (found or {}) for key in wanted) / len(wanted)
        if right:
            terms["content"] = sum((found or {}).get(key, ...) == value for key, value in right.items()) / len(right)
        counted = {name: self.weights.get(name, 0.0) for name in terms}
        return sum(counted[name] * terms[name] for name in terms) / (sum(counted.values()) or 1.0)


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


GROUP_REWARDS: dict[str, Callable[..., Any]] = {
    "majority": Majority,
    "agreement": Agreement,
    "majority_novelty": MajorityNovelty,
    "structure": Structure,
}
