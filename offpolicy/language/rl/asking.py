"""Which problems an iteration asks, and in which words (options ``curriculum``, ``templates`` and ``hints``).

Both are functions of the seed, the iteration, the number of a group, and, with ``curriculum`` or ``hints``, of what
earlier answers have taught; this is learned once per iteration from the answers of all processes, and saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offpolicy.data import sampling
from offpolicy.data.texts.answers import alternatives
from offpolicy.data.texts.replaying import Recent
from offpolicy.data.texts.retelling import OtherWords, retold, with_prompts
from offpolicy.data.texts.rollouts import OWN, prompt_lengths
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.curricula import CURRICULA, Curriculum
from offpolicy.language.rl.engine import engine_name
from offpolicy.language.rl.hints import (
    GIVES_AWAY,
    HINTS,
    SHOWN,
    UNFIT,
    Hints,
    Scaffold,
    Written,
    WrittenHint,
    gives_away,
)
from offpolicy.registry import make


@dataclass(frozen=True)
class Asked:
    """Problems that the policy is asked for an iteration, one per group.

    Args:
        iteration: that the answers are for.
        version: the iteration whose weights answer.
        seen: place of the first problem in the endless stream of problems.
        groups: problems, ≥ 0.
        first: number of the first group in its iteration.
    """

    iteration: int
    version: int
    seen: int
    groups: int
    first: int = 0


class AskedProblems:
    """Which problems an iteration asks, and in which words.

    Args:
        problems: of the run.
        options: of the method: ``curriculum``, ``templates`` and ``hints``.

    Attributes:
        problems: with the texts of all words.
        curriculum: what orders the problems; None for the stream.
        hints: after failures; None for none.
    """

    def __init__(self, problems: Any, options: Any) -> None:
        count = len(problems.tables["problems"])
        self.templates = list(getattr(options, "templates", None) or ())
        curriculum, hints = getattr(options, "curriculum", None), getattr(options, "hints", None)
        self.curriculum: Curriculum | None = None if curriculum is None else make("curriculum", curriculum, CURRICULA)
        self.hints: Hints | None = None if hints is None else make("hints", hints, HINTS)
        if self.curriculum is not None and not isinstance(self.curriculum, Curriculum):
            raise UsageError(
                f"`curriculum` is {curriculum!r}; expected a class with begin, order, learn, state_dict and "
                "load_state_dict, as offpolicy.language.rl.curricula.Curriculum has them."
            )
        if self.hints is not None:
            check_hints(self.hints, options)
        for one in self._learners().values():
            one.begin(count)
        words = self.hints.words() if self.hints else [OtherWords(text, None, "templates") for text in self.templates]
        self.problems = retold(problems, words) if words else problems
        if self.hints:
            asked = self.problems.tables["problems/asked"]
            lacks = asked[:, 1:] == asked[:, :1]
            self.without = int(lacks.any(1).sum())
            if lacks.all():
                raise DataError(
                    f"`hints` has nothing to show of {problems.meta.get('name', 'the data')}; expected "
                    f"{self.hints.needs}. Name it with --data.columns, or leave the option out."
                )
        self._told = self.problems  # without written hints
        if isinstance(self.hints, Written):
            self.show_hints()

    @property
    def scaffolds(self) -> int:
        """Tiers of hints behind which single answers are drawn, 0 for none."""
        return len(self.hints.tiers) if isinstance(self.hints, Scaffold) else 0

    def _learners(self) -> dict[str, Any]:
        known = {"curriculum": self.curriculum, "hints": self.hints}
        return {name: one for name, one in known.items() if one is not None}

    def of(self, asked: Asked, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The problems of groups, and in which words each is asked, (G,) both; 0 for those of the data."""
        slot = asked.first + np.arange(asked.groups)
        if self.curriculum is None:
            problem = problems_in_turn(len(self.problems.tables["problems"]), asked.groups, asked.seen, seed)
        else:
            problem = self._by_curriculum(asked, seed, slot)
        return problem, self._words(seed, asked.iteration, slot, problem)

    def _by_curriculum(self, asked: Asked, seed: int, slot: np.ndarray) -> np.ndarray:
        assert self.curriculum is not None
        order, n = np.asarray(self.curriculum.order(seed, asked.iteration)), len(self.problems.tables["problems"])
        if order.ndim != 1 or not len(order) or order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= n:
            raise UsageError(
                f"`curriculum` orders the problems as {order.dtype} {order.shape}, {order.ravel()[:5].tolist()} …; "
                f"expected one row of whole numbers from 0 to {n - 1}. Correct its `order`."
            )
        return order[slot % len(order)]

    def _words(self, seed: int, iteration: int, slot: np.ndarray, problem: np.ndarray) -> np.ndarray:
        if self.templates:
            key = sampling.keys(seed, "templates", torch.tensor([iteration], device="cpu"))[0]
            return 1 + (sampling.bits(key, torch.from_numpy(slot)) % len(self.templates)).numpy()
        if self.hints is not None:
            return self.hints.tier_of(problem)
        asked = self.problems.tables.get("problems/asked")  # of the method: other words in each iteration
        return np.full_like(problem, 0 if asked is None else min(iteration, asked.shape[1]) - 1)

    def look(self, model: Any) -> None:
        """Show the curriculum the policy, if it wants to see it; called on all processes with new weights."""
        look = getattr(self.curriculum, "look", None)
        if look is not None:
            look(model, (token_ids(self.problems, row) for row in self.problems.tables["problems"][:, 0]))

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the judged answers of an iteration, of all processes, group by group."""
        own = [row for row in rows if row["source"] == OWN]
        problem = np.asarray([row["problem"] for row in own], np.int64)
        right = np.asarray([row["right"] for row in own], bool)
        for one in self._learners().values():
            one.learn(problem, right)

    def wanted_help(self, rows: Sequence[Mapping[str, Any]], tier: int) -> list[tuple[int, int]]:
        """Number and problem of the groups of judged rows to which an answer is drawn behind the hint of a tier."""
        assert isinstance(self.hints, Scaffold)
        asked = self.problems.tables["problems/asked"]
        return [(slot, i) for slot, i in self.hints.wanted(rows) if asked[i, tier] != asked[i, 0]]

    def has_hint(self, problem: int) -> bool:
        """Whether the data have something to write a hint to a problem from."""
        asked = self._told.tables["problems/asked"][problem]
        return bool(asked[1] != asked[0])

    def behind(self, problem: Sequence[int], hints: Sequence[str]) -> list[WrittenHint]:
        """What becomes of hints that were written to these problems."""
        assert self.hints is not None
        told, empty = self._told, np.zeros(0, np.int64)
        rows, answers = told.tables["problems/row"][problem].tolist(), told.tables["problems/answer"]
        longest, found = int(prompt_lengths(told).max()), []
        for i, hint, prompt in zip(problem, hints, told.telling.behind(rows, hints, self.hints.text)):
            if hint and gives_away(hint, alternatives(str(answers[i]))):
                found.append(WrittenHint(empty, GIVES_AWAY))
            elif not hint or prompt is None or len(prompt) > longest:
                found.append(WrittenHint(empty, UNFIT))
            else:
                found.append(WrittenHint(prompt, SHOWN))
        return found

    def show_hints(self) -> None:
        """Put the hints that the policy has written behind their problems, as the last words of each."""
        assert isinstance(self.hints, Written)
        shown = {i: hint.prompt for i, hint in self.hints.hints.items() if hint.kind == SHOWN}
        asked = self._told.tables["problems/asked"]
        asked = np.column_stack([asked, asked[:, 0]])
        asked[list(shown), -1] = len(self._told.start) + np.arange(len(shown))
        self.problems = with_prompts(self._told, list(shown.values()), asked)

    def metrics(self, rows: Sequence[Mapping[str, Any]], hinted: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The share of answers that were drawn behind a hint, and how many were drawn to replace another."""
        if self.hints is None:
            return {}
        problem, words = (np.asarray([row[name] for row in rows]) for name in ("problem", "asked"))
        asked = self.problems.tables["problems/asked"]
        facts = {"answers/hinted": float((asked[problem, words] != asked[problem, 0]).mean())}
        facts |= self.hints.metrics() if isinstance(self.hints, Written) else {}
        return facts | ({"hints/drawn": float(len(hinted))} if self.scaffolds else {})

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen."""
        lines = []
        if self.curriculum is not None:
            name = type(self.curriculum).__doc__ or type(self.curriculum).__name__
            lines.append(("order", name.strip().partition("\n")[0]))
        if self.templates:
            lines.append(("templates", f"{len(self.templates)}, one per group; evaluations have that of the data"))
        if self.hints is not None:
            patience = f"{self.hints.patience} iteration{'s' if self.hints.patience > 1 else ''}"
            text = f"{self.hints.fact()}, after {patience} of failures; none in evaluations"
            if self.without:
                text += f"; {self.without:,} problems lack the hint of a tier and stay as they are there"
            lines.append(("hints", text))
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What was learned, and the words, by whose number answers are stored."""
        words = [list(one) for one in self.hints.words()] if self.hints else self.templates
        kinds = {name: type(one).__name__ for name, one in self._learners().items()}
        return {"words": words, "kinds": kinds, **{name: one.state_dict() for name, one in self._learners().items()}}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: it was written with other words, or another curriculum.
        """
        mine = self.state_dict()
        state = {"words": [], "kinds": mine["kinds"], **(state or {})}  # the kinds are not in older checkpoints
        if mine.keys() != state.keys() or any(mine[name] != state[name] for name in ("words", "kinds")):
            raise UsageError(
                "the checkpoint was written with other `templates`, `hints` or `curriculum`, by which its answers are "
                "kept; expected the same. Go on with those of the run, or start a new one."
            )
        for name, one in self._learners().items():
            one.load_state_dict(state[name])
        if isinstance(self.hints, Written):
            self.show_hints()


def problems_in_turn(n: int, count: int, seen: int, seed: int) -> np.ndarray:
    """The next of n problems in an endless stream in which every one comes once per pass, (count,)."""
    if not count:
        return np.zeros(0, np.int64)
    passes = range(seen // n, (seen + count - 1) // n + 1)
    stream = np.concatenate([sampling.permutation(seed, p, n).numpy() for p in passes])
    return stream[seen - n * passes[0] :][:count]


def check_hints(hints: Any, options: Any) -> None:
    """Raise :class:`UsageError` where a rule of hints is none, or cannot be followed."""
    if not isinstance(hints, Hints):
        raise UsageError(
            f"`hints` is {options.hints!r}; expected 'tiers', 'scaffold', 'written', or a class that extends "
            "offpolicy.language.rl.hints.Hints."
        )
    if isinstance(hints, Written) and options.replay_window:
        raise UsageError(
            f"`hints` is 'written', whose hints are of one iteration, and `replay_window` is {options.replay_window}, "
            "which brings answers of earlier ones back; expected 0. Pass --model.replay_window 0, or --model.hints "
            "tiers."
        )
    if isinstance(hints, Scaffold) and options.group_size < 2:
        raise UsageError(
            f"`hints` is 'scaffold', which replaces one answer of a group, and `group_size` is {options.group_size}; "
            "expected ≥ 2. Pass --model.group_size 8."
        )
    if isinstance(hints, Scaffold | Written) and engine_name(options.engine) == "replay":
        missing = "the replaced ones" if isinstance(hints, Scaffold) else "the hints"
        raise UsageError(
            f"`hints` is '{'scaffold' if isinstance(hints, Scaffold) else 'written'}' and the engine 'replay' reads "
            f"recorded answers, among which {missing} are not; expected an engine that draws, or no hints: records "
            "hold what was kept."
        )


def check_kept_hints(hints: Hints | None, *, mixes: bool) -> None:
    """Raise :class:`UsageError` where a method keeps answers longer than the hints that they were drawn behind.

    Args:
        hints: of the run.
        mixes: whether the method makes up the answers of an iteration by itself.
    """
    if isinstance(hints, Written) and mixes:
        raise UsageError(
            "`hints` is 'written', whose hints are of one iteration, and this method brings answers of earlier ones "
            "back; expected --model GRPO, or --model.hints tiers."
        )


def check_asking(options: Any, rule: Recent) -> None:
    """Raise :class:`UsageError` where problems cannot be chosen or put into other words."""
    templates = options.templates
    if templates is not None and (isinstance(templates, str) or not templates):
        raise UsageError(f"`templates` is {templates!r}; expected a list of texts with {{prompt}} in each.")
    for text in templates or ():
        if "{prompt}" not in str(text):
            raise UsageError(f"`templates` has '{text}'; expected a text with {{prompt}} in it. Add it.")
    words = [name for name in ("templates", "hints") if options[name] is not None]
    if len(words) == 2:
        raise UsageError("`templates` and `hints` are both given, and a group has one prompt; expected one of them.")
    for name in words:
        if options.demonstrations:
            raise UsageError(
                f"`{name}` changes the prompt, and `demonstrations` are answers to the prompt of the data; expected "
                "one of them. Pass --model.demonstrations 0, or leave it out."
            )
        if not rule.draws:
            raise UsageError(
                f"`{name}` asks a problem in several words, and `replay` '{getattr(rule, 'name', type(rule).__name__)}'"
                " puts stored answers into other groups of the problem; expected one of them."
            )
    for name in ("hints", "curriculum"):
        if options[name] is not None and options.lag:
            raise UsageError(
                f"`{name}` follows from the answers of the iteration before, and `lag` is {options.lag}, which asks "
                "before they are there; expected 0. Pass --model.lag 0."
            )
