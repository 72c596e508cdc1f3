"""What a round makes of the policy's answers: pairs by their rewards or by a judge, or lists; and the file of a round.

A judge compares two answers to one prompt: ``def judge(prompt, answer, other)`` returns the probability that ``answer``
is preferred, in [0, 1]; or, of lists, ``def judge(prompts, completions, references)``, whose references are the other
answers. It is asked once for two answers, and need not be transitive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from offpolicy.compute import processes
from offpolicy.data import sampling
from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import asked_texts
from offpolicy.data.texts.sequences import spans, token_ids
from offpolicy.errors import UsageError
from offpolicy.language.generation import answer_text, prompt_text, unended
from offpolicy.language.rl.rewards import Rewards


class Chosen(NamedTuple):
    """Pairs among the answers of a store.

    Attributes:
        better, worse: rows of the store, (n,) each.
        agreement: probability that the first is preferred, (n,); None where rewards decide.
        tied: pairs that were left out, as their rewards are equal.
        equal: pairs that were left out, as their answers are equal.
    """

    better: np.ndarray
    worse: np.ndarray
    agreement: np.ndarray | None
    tied: int
    equal: int

    def facts(self) -> dict[str, float]:
        """For the metrics."""
        return {"pairs": float(len(self.better)), "pairs/tied": float(self.tied), "pairs/equal": float(self.equal)}


class Judge(Rewards):
    """A function of the user that compares two answers; what fails for a pair counts as undecided there.

    Attributes:
        undecided: pairs that it failed for when it was last asked, on all processes.

    Raises:
        UsageError: the path is none, or the function cannot be called.
    """

    known: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    what: ClassVar[str] = "judge"
    option: ClassVar[str] = "--model.judge"
    judged: ClassVar[str] = "pairs of answers"
    otherwise: ClassVar[str] = "The pair counts as undecided"

    def __init__(self, path: str, *, seconds: float) -> None:
        if "." not in path and ":" not in path:
            raise UsageError(
                f"`judge` is '{path}'; expected the import path package.module.function of a function of yours that "
                "compares two answers. What scores one answer is for --model.rewards."
            )
        super().__init__(path, seconds=seconds)
        self.path = path
        self.undecided = 0

    def preferred(self, prompts: Sequence[str], answers: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """Probability that each answer is preferred to the other one, (n,); processes share the work.

        Raises:
            UsageError: a number that is no probability, or a judge that never gives one.
        """
        n, world, rank = len(prompts), processes.world_size(), processes.rank()
        mine = list(range(rank, n, world))
        texts = ([given[i] for i in mine] for given in (prompts, answers, others))
        scored = self(*texts)
        parts = processes.gathered((mine, np.where(scored.failed, 0.5, scored.scores), scored.problems, self.tallies))
        self.check([tallies for *_, tallies in parts])
        self.undecided = sum(problems for _, _, problems, _ in parts)
        whole = np.empty(n)
        for rows, values, *_ in parts:
            whole[rows] = values
        bad = np.flatnonzero((whole < 0) | (whole > 1))
        if len(bad):
            raise UsageError(
                f"the judge {self.path} returned {whole[bad[0]]:g}; expected the probability that the first answer is "
                "preferred, between 0 and 1. Correct it, or pass a function that scores one answer as --model.rewards."
            )
        return whole

    def preferred_rows(
        self, prompts: Sequence[str], answers: Sequence[str], first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """The same for rows of answers, each beside its prompt, against other rows, (n,) each."""
        sides = [
            [texts[row] for row in rows] for texts, rows in ((prompts, first), (answers, first), (answers, second))
        ]
        return self.preferred(*sides)


def nothing(prompt: str, answer: str, reference: Any) -> float:
    """The reward where a judge alone decides and there are no right answers."""
    return 0.0


def groups_in_order(store: Replay) -> np.ndarray:
    """The rows of each group of a round, (P, K), by the number of the group, in the order in which they were drawn."""
    order = np.argsort(store.episodes["group"], kind="stable")
    return order.reshape(len(np.unique(store.episodes["group"])), -1)


def pairs_by_reward(store: Replay, pairing: str) -> Chosen:
    """Pairs of the answers to each prompt, the one with the larger reward first; equal rewards make none.

    Args:
        store: answers of a round, K to each prompt.
        pairing: "independent" of the rewards, the first with the second and so on; or "best_worst", ties to the first.
    """
    rows = groups_in_order(store)
    reward = store.episodes["reward"]
    if pairing == "independent":
        first, second = rows[:, 0::2].reshape(-1), rows[:, 1::2].reshape(-1)
    else:
        order = np.take_along_axis(rows, np.argsort(-reward[rows], axis=1, kind="stable"), 1)
        first, second = order[:, 0], order[:, -1]
    turned = reward[first] < reward[second]
    better, worse = np.where(turned, second, first), np.where(turned, first, second)
    return _kept(store, better, worse, None, reward[better] == reward[worse])


def pairs_by_judge(store: Replay, pairing: str, preferred: Any, *, soft: bool, seed: int, iteration: int) -> Chosen:
    """Pairs of the answers to each prompt as a judge prefers them.

    Independent pairs get their label by a draw of the judge's probability, so that pairs of which it says ½ have one
    too; with ``soft`` the more probable answer comes first. Of "best_worst", the first answer wins most often against
    the others of its group.

    Args:
        store: answers of a round, K to each prompt.
        pairing: as of :func:`pairs_by_reward`.
        preferred: rows, other rows → the probability that each of the first is preferred.
        soft: whether the method learns from the probability itself.
        seed: of the run.
        iteration: the round.
    """
    rows = groups_in_order(store)
    if pairing == "best_worst":
        first, second, p = _best_and_worst(rows, preferred)
        return _kept(store, first, second, p, np.zeros(len(first), bool))
    first, second = rows[:, 0::2].reshape(-1), rows[:, 1::2].reshape(-1)
    p = preferred(first, second)
    key = sampling.keys(seed, "labels of a judge", torch.tensor([iteration], device="cpu"))[0]
    drawn = sampling.uniforms(key, torch.arange(len(p), device="cpu"), (1,))[:, 0].numpy()
    turned = p < 0.5 if soft else drawn >= p
    better, worse = np.where(turned, second, first), np.where(turned, first, second)
    return _kept(store, better, worse, np.where(turned, 1.0 - p, p), np.zeros(len(first), bool))


def _best_and_worst(rows: np.ndarray, preferred: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each group the answers that win most and least often, and the probability that the one beats the other."""
    groups, size = rows.shape
    places = np.array(list(combinations(range(size), 2)))
    one, other = rows[:, places[:, 0]], rows[:, places[:, 1]]
    p = preferred(one.reshape(-1), other.reshape(-1)).reshape(groups, -1)
    wins = np.full((groups, size, size), 0.5)
    wins[:, places[:, 0], places[:, 1]], wins[:, places[:, 1], places[:, 0]] = p, 1.0 - p
    order = np.argsort(-wins.sum(2), axis=1, kind="stable")
    best, worst, each = order[:, 0], order[:, -1], np.arange(groups)
    return rows[each, best], rows[each, worst], wins[each, best, worst]


def _kept(
    store: Replay, better: np.ndarray, worse: np.ndarray, agreement: np.ndarray | None, tied: np.ndarray
) -> Chosen:
    equal = (store.episodes["digest"][better] == store.episodes["digest"][worse]) & ~tied
    keep = ~(tied | equal)
    probability = None if agreement is None else agreement[keep]
    return Chosen(better[keep], worse[keep], probability, int(tied.sum()), int(equal.sum()))


# -- texts and files ---------------------------------------------------------------------------------------------------


def token_lists(store: Replay) -> list[np.ndarray]:
    """The tokens of each answer of a store."""
    return [token_ids(store, row) for row in range(store.num_episodes)]


def prompts_of(problems: Replay, store: Replay) -> np.ndarray:
    """The number of the text that each answer of a store was asked with, (E,)."""
    return asked_texts(problems, store.episodes["prompt"], store.episodes.get("asked"))


def prompt_texts(problems: Replay, store: Replay, tokenizer: Any) -> list[str]:
    """The text of the prompt of each answer of a store."""
    numbers = prompts_of(problems, store).tolist()
    known = {number: prompt_text(tokenizer, token_ids(problems, number)) for number in {*numbers}}
    return [known[number] for number in numbers]


def texts_of_answers(problems: Replay, store: Replay) -> tuple[Replay, np.ndarray]:
    """The answers of a round with their prompts as texts, and the numbers of both for each answer, (E, 2)."""
    prompts, number = np.unique(prompts_of(problems, store), return_inverse=True)
    asked = to_numpy(problems.steps["token"])[spans(problems, prompts)]
    length = np.concatenate([problems.length[prompts], store.length])
    token = np.concatenate([asked, to_numpy(store.steps["token"])])
    index = np.stack([number, len(prompts) + np.arange(store.num_episodes)], axis=1)
    meta: dict[str, Any] = {name: problems.meta[name] for name in ("name", "style") if name in problems.meta}
    return Replay({"token": token}, start=np.cumsum(length) - length, length=length, meta=meta), index


def texts_of_pairs(problems: Replay, store: Replay, chosen: Chosen) -> Replay:
    """The pairs of a round."""
    texts, index = texts_of_answers(problems, store)
    sides = {"chosen": chosen.better, "rejected": chosen.worse}
    texts.tables = {"pairs": np.concatenate([index[rows] for rows in sides.values()], axis=1)}
    if chosen.agreement is None:
        texts.tables |= {f"pairs/score_{side}": store.episodes["reward"][rows] for side, rows in sides.items()}
    else:
        texts.tables["pairs/agreement"] = chosen.agreement.astype(np.float32)
    return texts


def texts_of_lists(problems: Replay, store: Replay) -> Replay:
    """The answers of a round as scored lists."""
    texts, index = texts_of_answers(problems, store)
    rows = groups_in_order(store)
    order, score = rows.reshape(-1), store.episodes["reward"].astype(np.float32)
    group = np.repeat(np.arange(len(rows)), rows.shape[1])
    texts.tables = {"singles": index[order], "singles/group": group, "singles/score": score[order]}
    return texts


def rows_of_round(
    problems: Replay, store: Replay, tokenizer: Any, stops: Sequence[int], scores: np.ndarray
) -> list[dict[str, Any]]:
    """The answers of a round as scored lists, which are data to train on.

    Args:
        problems: what was asked.
        store: the answers.
        tokenizer: of the policy.
        stops: tokens that end an answer.
        scores: of the answers, (E,) or (E, k).
    """
    found, asked = [], prompts_of(problems, store)
    for rows in groups_in_order(store):
        prompt = token_ids(problems, asked[rows[0]])
        answers = [unended(token_ids(store, row), stops) for row in rows]
        found.append(
            {
                "prompt": prompt_text(tokenizer, prompt),
                "completions": [answer_text(tokenizer, prompt, answer) for answer in answers],
                "scores": scores[rows].tolist(),
                "lengths": store.length[rows].tolist(),
                "ended": store.episodes["ended"][rows].tolist(),
            }
        )
    return found


def rows_of_pairs(
    problems: Replay, store: Replay, tokenizer: Any, stops: Sequence[int], chosen: Chosen
) -> list[dict[str, Any]]:
    """The pairs of a judge as rows, which are data to train on; arguments as of :func:`rows_of_round`."""
    assert chosen.agreement is not None
    found, asked = [], prompts_of(problems, store)
    for better, worse, agreement in zip(chosen.better, chosen.worse, chosen.agreement.tolist()):
        prompt = token_ids(problems, asked[better])
        texts = [answer_text(tokenizer, prompt, unended(token_ids(store, row), stops)) for row in (better, worse)]
        sides = dict(zip(("chosen", "rejected"), texts))
        found.append({"prompt": prompt_text(tokenizer, prompt), **sides, "agreement": agreement})
    return found
