"""Two turns: the policy answers, is told to look at its answer, and answers once more (option ``correction``).

An answer in the store is then the first answer, the instruction and the second answer, end to end behind the prompt of
the problem, and what the policy is asked for the second is what stands before it there. The column ``turn`` of the
tokens is 0 in the first answer, 1 in the second, and −1 in the instruction, which counts in no part of the loss; their
column ``stage`` is 0 in the first stage of the rule and 1 afterwards. The rewards and ``reward`` are of the second
answer, ``first_reward`` is of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offpolicy.data.replay import Replay
from offpolicy.data.texts.replaying import place_among_equals
from offpolicy.errors import UsageError, check_range, check_whole_number
from offpolicy.language.rl.engine import Completion, FurtherAnswers, Request, Stop, engine_name
from offpolicy.losses.advantages import group_statistics
from offpolicy.registry import Spec, make

AGAIN = 1 << 24  # added to the number of a request for a second answer; hints and demonstrations have none
FIRST, SECOND, NOBODY = 0, 1, -1  # turns


@dataclass(frozen=True)
class Score:
    """Learns to correct itself in two stages (SCoRe, arXiv:2409.12917).

    With the rewards r₁ and r₂ of the two answers, in the first stage the tokens of the first answer have no reward, and
    those of the second r₂; a divergence holds the first answer to the base (anchor ``turn_kl``). Afterwards each answer
    has its own reward, and the second α(r₂ − r₁) beside it. The advantage of a turn is its reward less the mean of that
    turn in the group.

    Args:
        bonus: α ≥ 0.
        first_stage: iterations of the first stage, ≥ 0; the anchor ``turn_kl`` ends with it.
        instruction: what stands between the two answers, in the form that the policy reads, turns of a chat included.
    """

    bonus: float = 10.0
    first_stage: int = 100
    instruction: str = "\nLook at this solution again, correct what is wrong in it, and write it down once more.\n"

    def __post_init__(self) -> None:
        check_range("bonus", self.bonus, 0.0, upper_open=True)
        check_whole_number("first_stage", self.first_stage, 0)
        if not isinstance(self.instruction, str) or not self.instruction:
            raise UsageError(f"`instruction` is {self.instruction!r}; expected a text that stands between two answers.")

    def fact(self) -> str:
        """For the first screen."""
        words = "two answers to each question; advantages by turn, whatever the objective says; evaluations have one"
        return f"{words}; the first {self.first_stage} iterations reward the second alone"

    def stage(self, iteration: int) -> int:
        """The stage of an iteration, 0 or 1."""
        return int(iteration > self.first_stage)

    def rewards(self, first: torch.Tensor, second: torch.Tensor, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tokens of the first and of the second answers get, (B,) each."""
        if not self.stage(iteration):
            return torch.zeros_like(first), second
        return first, second + self.bonus * (second - first)

    def advantages(self, fresh: Replay, iteration: int) -> np.ndarray:
        """The advantage of each token of new answers, float64 (tokens of the store,)."""
        group, own = (
            torch.from_numpy(fresh.episodes["group"]),
            torch.ones(fresh.num_episodes, dtype=torch.bool, device="cpu"),
        )
        first, second = (torch.from_numpy(fresh.episodes[name]).double() for name in ("first_reward", "reward"))
        turns = [r - group_statistics(r, group, own).mean for r in self.rewards(first, second, iteration)]
        turn = np.repeat(np.arange(fresh.num_episodes), fresh.length)
        of = fresh.steps["turn"]
        return np.where(of == FIRST, turns[0].numpy()[turn], np.where(of == SECOND, turns[1].numpy()[turn], 0.0))


def requests_again(
    rows: Sequence[dict[str, Any]], prompts: Sequence[np.ndarray], instruction: np.ndarray, size: int
) -> list[Request]:
    """What is asked for the second answers, behind the first ones.

    Args:
        rows: first answers, group by group.
        prompts: of the rows.
        instruction: tokens.
        size: answers of a group.
    """
    place = place_among_equals(np.asarray([row["slot"] for row in rows], np.int64)).tolist()
    return [
        Request(np.concatenate([prompt, row["token"], instruction]), AGAIN + row["slot"] * size + i, 1)
        for row, prompt, i in zip(rows, prompts, place)
    ]


def corrected(
    answering: FurtherAnswers, made: list[dict[str, Any]], instruction: np.ndarray, k: int, seed: int, stop: Stop
) -> list[dict[str, Any]]:
    """What this process has drawn, with second answers."""
    assert answering.correction is not None
    prompts = [answering.prompt(row["problem"], row["asked"]) for row in made]
    requests = requests_again(made, prompts, instruction, answering.options.group_size)
    answers = answering.generated(requests, k, seed, stop)
    stage = answering.correction.stage(k)
    return [in_two_turns(row, instruction, some[0], stage) for row, some in zip(made, answers)]


def in_two_turns(row: dict[str, Any], instruction: np.ndarray, second: Completion, stage: int) -> dict[str, Any]:
    """The row of a first answer, drawn in a stage, with the instruction and the second answer behind it."""
    parts = {
        "token": (row["token"], instruction, second.token),
        "logp": (row["logp"], np.zeros(len(instruction)), second.logp),
    }
    said = second.logp if second.sampler_logp is None else second.sampler_logp
    parts["sampler_logp"] = (row["sampler_logp"], np.zeros(len(instruction)), said)
    length = [len(part) for part in parts["token"]]
    return {
        **row,
        **{name: np.concatenate(some) for name, some in parts.items()},
        "turn": np.repeat([FIRST, NOBODY, SECOND], length),
        "stage": np.full(sum(length), stage),
        "first": length[0],
        "behind": length[0] + length[1],
        "first_ended": row["ended"],
        "ended": second.ended,
    }


def correction_facts(fresh: Replay) -> dict[str, float]:
    """For the metrics: the mean reward of first answers, and how much more second answers have."""
    first, second = fresh.episodes["first_reward"], fresh.episodes["reward"]
    return {"answers/first_reward": float(first.mean()), "answers/gain": float((second - first).mean())}


def check_correction(options: Any, *, mixes: bool, critic: bool) -> None:
    """Raise :class:`UsageError` where answers cannot have two turns.

    Args:
        options: of the method.
        mixes: whether the method makes up the answers of an iteration by itself.
        critic: whether advantages come from a critic.
    """
    if options.correction is None:
        return
    others = {
        "demonstrations": bool(options.demonstrations),
        "hints": options.hints is not None,
        "lag": bool(options.lag),
        "replay_fraction": bool(options.replay_fraction),
        "replay": options.replay != "recent",
        "min_ess": bool(options.min_ess),
        "record": bool(options.record),
        "engine": engine_name(options.engine) == "replay",
        "objective.value": critic,
    }
    found = [name for name, given in others.items() if given]
    if found:
        raise UsageError(
            f"`correction` gives answers a second turn, and `{found[0]}` is for answers of one turn of the policy as "
            "it is, whose advantage is one number; expected it to be left out."
        )
    if mixes:
        raise UsageError(
            "`correction` gives answers a second turn, and this method mixes answers of its own; expected --model GRPO."
        )


def make_correction(spec: Spec | None) -> Score | None:
    """The rule of the option ``correction``.

    Raises:
        UsageError: it is none.
    """
    rule = None if spec is None else make("correction", spec, {"score": Score})
    if rule is not None and not isinstance(rule, Score):
        raise UsageError(
            f"`correction` is {spec!r}; expected 'score', or a class that extends "
            "offpolicy.language.rl.correcting.Score."
        )
    return rule
