"""What training asks of whoever writes the answers, and what it gets.

An engine is told of new weights by ``sync`` and answers by ``generate``; it returns token ids with their
log-probability under the distribution they were drawn from. An engine that runs elsewhere (vLLM, say) takes the weights
in ``sync``.

Three methods may be missing. ``close()`` ends what the engine has started: processes, files. ``submit(ticket, requests,
how)`` and ``collect(ticket, stopped)`` are for engines that draw beside the trainer (:class:`ConcurrentEngine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from offpolicy.registry import named_spec

Stop = tuple[Callable[[], bool], Callable[[bool], bool]]  # whether one wants to stop, and whether any process does
CONTINUES = 1 << 31  # added to the number of a group for the request that goes on from its demonstration


@dataclass(frozen=True)
class EngineContext:
    """What an engine may know when it is made; a class gets it if it takes an argument ``context``.

    Attributes:
        longest_prompt: tokens of the longest prompt, with the beginning of an answer where that is given.
        longest_answer: tokens of the longest answer.
        longest: tokens of the longest prompt with its answer; None for both added.
        answers_at_once: answers that one process draws at once.
        temperature: that answers are drawn at in training.
        device: the trainer's, of this process.
        dtype: that the policy computes in.
        model: the policy, not yet on its device, for what its configuration says; its weights come by ``sync``.
        folder: of the run; None outside of one.
        seed: of the run.
        rank: of this process, from 0.
        world: number of processes.
        local_rank: of this process on its machine.
    """

    longest_prompt: int
    longest_answer: int
    answers_at_once: int = 256
    temperature: float = 1.0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    model: Any = None
    folder: Path | None = None
    seed: int = 0
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    longest: int | None = None


class Request(NamedTuple):
    """A prompt to be answered.

    Attributes:
        prompt: token ids, (n,), n ≥ 1, with the beginning of the answer where that is given.
        number: of the request among all of the iteration, over all processes; decides its random numbers.
        samples: answers wanted, ≥ 0.
        room: tokens that these answers may have at most, ≥ 1; None for as many as others. What an engine draws beyond
            them is cut.
    """

    prompt: np.ndarray
    number: int
    samples: int
    room: int | None = None

    def most(self, how: Sampling) -> int:
        """Tokens of the longest answer."""
        return how.max_new_tokens if self.room is None else min(self.room, how.max_new_tokens)


class Completion(NamedTuple):
    """An answer as an engine returns it.

    Attributes:
        token: ids, int64 (n,), with the stop token if it ``ended`` with one.
        logp: of each token under the distribution it was drawn from, nats, float32 or float64 (n,).
        ended: whether it stopped by itself.
        version: of the weights that drew each token, int64 (n,); None for those of the last sync before the request.
        sampler_logp: what the engine that drew a recorded answer had said, where ``logp`` is what training took for it;
            None for ``logp``.
    """

    token: np.ndarray
    logp: np.ndarray
    ended: bool
    version: np.ndarray | None = None
    sampler_logp: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        stop: ids that end an answer.
        max_new_tokens: longest answer, ≥ 1.
        temperature: divides the logits, ≥ 0; 0 takes the most likely token.
        seed: of the run.
        iteration: of training, so that every iteration draws other numbers.
        top_p: the likeliest tokens that make up this share, in (0, 1]; 1 for all. In evaluations only.
        top_k: that many of the likeliest tokens, ≥ 0; 0 for all. In evaluations only.
    """

    stop: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    iteration: int = 0
    top_p: float = 1.0
    top_k: int = 0


class RolloutEngine(Protocol):
    """What training needs of an engine.

    An attribute ``on_policy = False`` says that its answers are not drawn from the weights it is given. Then its
    log-probabilities are the behaviour's. Else the trainer's are, and the engine's show how far the engine is off.
    """

    def sync(self, model: nn.Module, version: int) -> None:
        """Answer with these weights from now on.

        An engine with weights of its own copies them at every call. The number only names them: an evaluation after
        the steps of iteration k has the weights that iteration k + 1 begins with, and comes under the number k, as the
        weights at the start of iteration k did. Under several processes all of them call it.

        Args:
            model: the policy.
            version: number of the iteration they belong to.
        """

    def generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None = None
    ) -> list[list[Completion]]:
        """The answers to each request, in order; fewer requests than given once ``stopped()`` says so."""


@runtime_checkable
class ConcurrentEngine(Protocol):
    """An engine that draws beside the trainer. It has ``sync`` and ``generate`` too.

    Requests are answered by the weights of the last ``sync`` before their ``submit``: a later ``sync`` waits until they
    are drawn. Several tickets may be open, and ``generate`` may be called in between. Every answer is a function of
    (weights, seed, iteration, request), so tickets that a crash has lost are drawn again with the same result.

    An attribute ``shares_card`` that is true says that it draws on the trainer's device, where nothing would overlap;
    ``drawing_seconds`` counts the time in which it drew, for ``perf/engine_idle_share`` and the speed of what was
    submitted in ``perf/engine_tokens_per_s``. Both may be missing.
    """

    def submit(self, ticket: int, requests: Sequence[Request], how: Sampling) -> None:
        """Begin to draw, and return at once.

        Args:
            ticket: names the requests until they are collected, such as the iteration they are for.
            requests, how: as of ``generate``.
        """

    def collect(self, ticket: int, stopped: Callable[[], bool] | None = None) -> list[list[Completion]]:
        """Wait for the answers of a ticket, as ``generate`` returns them; the ticket is closed then.

        Once ``stopped()`` says so what is not drawn yet is given up, and fewer answers return.

        Raises:
            KeyError: no such ticket is open.
        """


class FurtherAnswers(Protocol):
    """What answers requests of this process beside those of an iteration: behind a hint, after a first answer, or at
    another temperature."""

    asking: Any
    correction: Any
    tempering: Any
    options: Any

    def prompt(self, problem: int, words: int) -> np.ndarray:
        """Tokens of a problem in its own words (0) or others."""

    def generated(
        self, requests: list[Request], iteration: int, seed: int, stop: Stop, heat: float = 1.0
    ) -> list[list[Completion]]:
        """Answers to the requests, drawn at ``heat`` times the temperature of sampling."""

    def finals(self, prompts: Sequence[np.ndarray], answers: Sequence[Completion]) -> list[str]:
        """What counts of answers to these prompts: what they say behind their thinking."""

    def judged(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What was drawn on all processes, with its rewards."""


def engine_name(spec: str | Mapping[str, Any]) -> str:
    """The name, or import path, in the option ``engine``."""
    return str(named_spec("engine", spec).get("name"))


def close_engine(engine: Any) -> None:
    """End what an engine has started, if it has a ``close``; a second call does nothing."""
    close = getattr(engine, "close", None)
    if close is not None:
        close()
