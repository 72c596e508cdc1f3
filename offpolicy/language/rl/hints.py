"""Hints beside problems that the policy fails (option ``hints``).

A hint is the beginning of the solution, a column of the data, or what the policy itself writes of the solution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from offpolicy.compute import processes
from offpolicy.data.texts.numbers import number_of, numbers_in
from offpolicy.data.texts.retelling import OtherWords, filled
from offpolicy.data.texts.rollouts import OWN
from offpolicy.errors import UsageError, check_range, check_whole_number
from offpolicy.language.rl.engine import FurtherAnswers, Request, Stop
from offpolicy.language.rl.rows import answer_row

WRITES = 255 << 24  # added to the number of a problem for the request that writes a hint to it; odd times 2²⁴
BEHIND_HINT = 1 << 24  # times the tier: added to the number of a group for a single answer behind a hint


@dataclass
class Hints:
    """What is known of the failures at each problem, and the words in which hints are shown.

    Args:
        tiers: of hints, the least first: shares of the words of the solution, ascending, each in (0, 1), of which the
            answer behind "####" or in \\boxed is never shown; or names of columns of the data that hold hints.
        patience: iterations in a row in which no answer to a problem was right, ≥ 1.
        text: what the problem is put into before the template of the data, with {prompt} and {hint}.
    """

    tiers: Sequence[float | str] = (0.25, 0.5, 0.75)
    patience: int = 1
    text: str = "{prompt}\nHint: {hint}"

    what: ClassVar[str] = ""  # for the first screen
    needs: ClassVar[str] = (
        "a column `solution` with words before the answer, or names of columns with hints as `tiers`"  # of the data
    )

    def __post_init__(self) -> None:
        check_whole_number("patience", self.patience, 1)
        if isinstance(self.tiers, str) or not isinstance(self.tiers, Sequence):
            raise UsageError(
                f"`tiers` is {self.tiers!r}; expected a list of shares, as [0.25, 0.5, 0.75], or of columns, as [idea]."
            )
        shares = [tier for tier in self.tiers if not isinstance(tier, str)]
        for tier in shares:
            check_range("tiers", tier, 0.0, 1.0, lower_open=True, upper_open=True)
        if not self.tiers or len(set(self.tiers)) < len(self.tiers) or shares != sorted(shares):
            raise UsageError(
                f"`tiers` is {list(self.tiers)}; expected ascending shares, as [0.25, 0.5, 0.75], or columns."
            )
        if not isinstance(self.text, str) or "{prompt}" not in self.text or "{hint}" not in self.text:
            raise UsageError(f"`text` is '{self.text}'; expected {{prompt}} and {{hint}} in it. Add them.")

    def fact(self) -> str:
        """What is shown, and to whom, for the first screen."""
        tiers = [tier if isinstance(tier, str) else f"{100 * tier:g} % of the solution" for tier in self.tiers]
        return f"{', '.join(tiers)}, {self.what}"

    def words(self) -> list[OtherWords]:
        return [OtherWords(self.text, tier, "hints") for tier in self.tiers]

    def begin(self, problems: int) -> None:
        """Start with so many problems, of which nothing is known."""
        self.failures = np.zeros(problems, np.int64)

    def tier_of(self, problem: np.ndarray) -> np.ndarray:
        """The words that groups of these problems are asked in, (G,), which are those of a tier; 0 for no hint."""
        return np.zeros_like(problem)

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        """Take own answers of an iteration: their problems (B,), and whether each is right, (B,) bool."""
        asked, solved = self._asked(problem), self._asked(problem[right])
        self.failures = np.where(asked, np.where(solved, 0, self.failures + 1), self.failures)

    def _asked(self, problem: np.ndarray) -> np.ndarray:
        return np.bincount(problem, minlength=len(self.failures)) > 0

    def state_dict(self) -> dict[str, Any]:
        return {"failures": torch.from_numpy(self.failures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.failures = np.array(state["failures"], np.int64)


@dataclass
class Tiers(Hints):
    """Asks whole groups behind a hint.

    After ``patience`` iterations of failures the next group of a problem is asked with one tier more, up to the last;
    an iteration with a right answer takes a tier back. All answers of a group are drawn behind the same words, and
    their log-probabilities are those behind these words.
    """

    what: ClassVar[str] = "to whole groups"

    def begin(self, problems: int) -> None:
        super().begin(problems)
        self.tier = np.zeros(problems, np.int64)

    def tier_of(self, problem: np.ndarray) -> np.ndarray:
        return self.tier[problem]

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        super().learn(problem, right)
        more = self.failures >= self.patience
        self.tier = np.clip(self.tier + more - self._asked(problem[right]), 0, len(self.tiers))
        self.failures[more] = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tier": torch.from_numpy(self.tier)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.tier = np.array(state["tier"], np.int64)


class WrittenHint(NamedTuple):
    """What became of a hint.

    Attributes:
        prompt: tokens of the problem with the hint; none where it is not shown.
        kind: SHOWN, GIVES_AWAY, or UNFIT: without a word, or too long with its problem.
    """

    prompt: np.ndarray
    kind: int


SHOWN, GIVES_AWAY, UNFIT = 0, 1, 2


@dataclass
class Written(Tiers):
    """Asks whole groups behind a hint that the policy has written (SAGE, arXiv:2602.03143).

    Tiers change as those of :class:`Tiers`. Whenever a problem above tier 0 is asked, the policy is first shown the
    problem and its solution, and told to write a hint: once per problem and iteration, by the random numbers of (seed,
    iteration, problem). It does not learn from the hint. A hint in which a right answer stands is not shown, nor one
    that is too long; then the group is asked without, and the next time another one is written.

    Args:
        tiers: how much a hint is to say, the least first; each stands for {tier} in the instruction.
        instruction: what the policy is told, with {prompt}, {solution} and {tier} in it, outside the template of the
            data.
        tokens: of the longest hint, ≥ 1; never more than an answer has.
    """

    tiers: Sequence[float | str] = (
        "Name the idea alone, in one sentence.",
        "Say how to begin and what to look for, in two sentences.",
        "Go through the steps of the solution, without their results.",
    )
    instruction: str = (
        "Problem:\n{prompt}\n\nSolution:\n{solution}\n\nWrite a hint for somebody who has to solve the problem without "
        "this solution. {tier} Leave the final answer out.\nHint:"
    )
    tokens: int = 128

    what: ClassVar[str] = "to whole groups"
    needs: ClassVar[str] = "a column `solution`, from which the policy writes"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("tokens", self.tokens, 1)
        if not all(isinstance(tier, str) for tier in self.tiers):
            raise UsageError(
                f"`tiers` is {list(self.tiers)}; expected texts that say how much a written hint tells. Pass texts, or "
                "--model.hints tiers for shares of the solution."
            )
        lacks = [name for name in ("{prompt}", "{solution}", "{tier}") if name not in str(self.instruction)]
        if lacks:
            raise UsageError(f"`instruction` is '{self.instruction}'; expected {lacks[0]} in it. Add it.")

    def fact(self) -> str:
        return f"written by the policy from the solution, {self.tokens} tokens or less, {self.what}"

    def words(self) -> list[OtherWords]:
        """What the policy is told to write a hint, by tier."""
        texts = [filled(self.instruction, tier=str(tier), solution="{hint}") for tier in self.tiers]
        return [OtherWords(text, 1.0, "hints") for text in texts]

    def begin(self, problems: int) -> None:
        super().begin(problems)
        self.iteration = 0  # that the hints are of
        self.hints: dict[int, WrittenHint] = {}  # by problem

    def tier_of(self, problem: np.ndarray) -> np.ndarray:
        """The words behind those of all requests, with the hint of the iteration, where a problem has a tier."""
        return np.where(self.tier[problem] > 0, len(self.tiers) + 1, 0)

    def wanted(self, problem: np.ndarray, iteration: int) -> list[int]:
        """The problems among these (G,) to which hints are to be written now, in ascending order."""
        if iteration != self.iteration:
            self.iteration, self.hints = iteration, {}
        return [i for i in np.unique(problem[self.tier[problem] > 0]).tolist() if i not in self.hints]

    def metrics(self) -> dict[str, float]:
        """How many hints were written in the iteration, and of these not shown."""
        kinds = [hint.kind for hint in self.hints.values()]
        names = {"hints/gave_away": GIVES_AWAY, "hints/unfit": UNFIT}
        return {"hints/written": float(len(kinds))} | {name: float(kinds.count(kind)) for name, kind in names.items()}

    def state_dict(self) -> dict[str, Any]:
        prompts = [hint.prompt for hint in self.hints.values()]
        columns = {
            "problem": list(self.hints),
            "kind": [hint.kind for hint in self.hints.values()],
            "length": [len(prompt) for prompt in prompts],
            "token": np.concatenate([np.zeros(0, np.int64), *prompts]),
        }
        written = {name: torch.from_numpy(np.asarray(column, np.int64)) for name, column in columns.items()}
        return {**super().state_dict(), "iteration": self.iteration, "written": written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        columns = {name: np.array(column, np.int64) for name, column in state["written"].items()}
        prompts = np.split(columns["token"], np.cumsum(columns["length"])[:-1])
        rows = zip(columns["problem"].tolist(), prompts, columns["kind"].tolist())
        self.iteration, self.hints = int(state["iteration"]), {i: WrittenHint(*hint) for i, *hint in rows}


def gives_away(hint: str, answers: Sequence[str]) -> bool:
    """Whether a right answer stands in a hint: a number of its value, whatever the sign, or its words."""
    said, numbers = " ".join(hint.casefold().split()), numbers_in(hint)
    for answer in filter(str.strip, answers):
        words, number = " ".join(answer.casefold().split()), number_of(answer)
        if number is not None and abs(number) in numbers:
            return True
        if re.search(rf"(?<!\w){re.escape(words)}(?!\w)", said):
            return True
    return False


@dataclass
class Scaffold(Hints):
    """Puts a right answer that was drawn behind a hint in the place of a failed one (Scaf-GRPO, arXiv:2510.19807).

    A group is drawn without a hint. Where none of its answers is right, and the problem has failed ``patience``
    iterations with this one, an answer is drawn behind each tier in turn until one is right, which takes the place of
    the last failed answer of the group. Its log-probabilities are those behind the hint; its reward counts in the
    group. What is known of a problem is of the answers without a hint alone.
    """

    patience: int = 2
    what: ClassVar[str] = "to one answer of a failed group, until it is right"

    def wanted(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """Number and problem of the groups of judged rows that want help, in ascending order."""
        groups = {row["slot"]: row["problem"] for row in rows if row["source"] == OWN}
        helped = {row["slot"] for row in rows if row["source"] == OWN and row["right"]}
        waits = self.failures + 1 >= self.patience
        return sorted((slot, problem) for slot, problem in groups.items() if slot not in helped and waits[problem])


def with_help(rows: Sequence[dict[str, Any]], hinted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judged rows in which right hinted answers stand in the place of the last answer of their groups."""
    found, last = list(rows), {row["slot"]: i for i, row in enumerate(rows) if row["source"] == OWN}
    for row in hinted:
        if row["right"]:
            found[last[row["slot"]]] = row
    return found


def helped(
    answering: FurtherAnswers, rows: list[dict[str, Any]], hinted: list[dict[str, Any]], k: int, seed: int, stop: Stop
) -> list[dict[str, Any]]:
    """Judged rows, in failed groups with an answer behind a hint; all that are drawn so are added to ``hinted``."""
    for tier in range(1, answering.asking.scaffolds + 1):
        wanted = answering.asking.wanted_help(rows, tier)
        if not wanted:
            continue
        mine = wanted[processes.rank() :: processes.world_size()]
        requests = [Request(answering.prompt(problem, tier), slot + tier * BEHIND_HINT, 1) for slot, problem in mine]
        drawn = zip(mine, answering.generated(requests, k, seed, stop))
        made = [answer_row(slot, problem, OWN, some[0], k, asked=tier) for (slot, problem), some in drawn]
        judged = answering.judged(made)
        rows = with_help(rows, judged)
        hinted += judged
    return rows


def write_hints(answering: FurtherAnswers, problem: np.ndarray, k: int, seed: int, stop: Stop) -> None:
    """Let the policy write the hints that groups of an iteration want, and put them behind their problems.

    Args:
        answering: of this process.
        problem: of the groups of all processes, (G,).
        k: the iteration.
        seed: of the run.
        stop: whether the user wants this process to stop, and whether a flag is set on any process.
    """
    asking, hints = answering.asking, answering.asking.hints
    if not isinstance(hints, Written):
        return
    wanted = [i for i in hints.wanted(problem, k) if asking.has_hint(i)]
    if wanted:
        mine = wanted[processes.rank() :: processes.world_size()]
        prompts = [answering.prompt(i, int(hints.tier[i])) for i in mine]
        requests = [Request(prompt, WRITES + i, 1, hints.tokens) for prompt, i in zip(prompts, mine)]
        drawn = [some[0] for some in answering.generated(requests, k, seed, stop)]
        told = zip(mine, asking.behind(mine, answering.finals(prompts, drawn)))
        hints.hints.update(sorted(one for part in processes.gathered(list(told)) for one in part))
    asking.show_hints()


def check_hinted_rewards(hints: Hints | None, comparing: Sequence[str]) -> None:
    """Raise :class:`UsageError` where rewards compare the answers of a group and single answers are hinted."""
    if isinstance(hints, Scaffold) and comparing:
        raise UsageError(
            f"`hints` is 'scaffold', which judges an answer by itself, and the reward {comparing[0]} compares the "
            "answers of a group; expected a reward of single answers, or other hints. Pass --model.hints tiers."
        )


HINTS = {"tiers": Tiers, "scaffold": Scaffold, "written": Written}
