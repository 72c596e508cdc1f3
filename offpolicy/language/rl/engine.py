"""What training asks of whoever writes the answers, and what it gets.

An engine is told of new weights by ``sync`` and answers by ``generate``; it returns token ids with their
log-probability under the distribution they were drawn from. An engine that runs elsewhere (vLLM, say) takes the weights
in ``sync``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import nn


class Request(NamedTuple):
    """A prompt to be answered.

    Attributes:
        prompt: token ids, (n,), n ≥ 1.
        number: of the request among all of the iteration, over all processes; decides its random numbers.
        samples: answers wanted, ≥ 0.
    """

    prompt: np.ndarray
    number: int
    samples: int


class Completion(NamedTuple):
    """An answer as an engine returns it.

    Attributes:
        token: ids, int64 (n,), with the stop token if it ``ended`` with one.
        logp: of each token under the distribution it was drawn from, nats, float32 (n,).
        ended: whether it stopped by itself.
    """

    token: np.ndarray
    logp: np.ndarray
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        stop: ids that end an answer.
        max_new_tokens: longest answer, ≥ 1.
        temperature: divides the logits, ≥ 0; 0 takes the most likely token.
        seed: of the run.
        iteration: of training, so that every iteration draws other numbers.
    """

    stop: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    iteration: int = 0


class RolloutEngine(Protocol):
    """What training needs of an engine.

    An attribute ``on_policy = False`` says that its answers are not drawn from the weights it is given. Then its
    log-probabilities are the behaviour's. Else the trainer's are, and the engine's show how far the engine is off.
    """

    def sync(self, model: nn.Module, version: int) -> None:
        """Answer with these weights from now on.

        Args:
            model: the policy; an engine of its own copies what it needs.
            version: number of the iteration they belong to.
        """

    def generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None = None
    ) -> list[list[Completion]]:
        """The answers to each request, in order; fewer requests than given once ``stopped()`` says so."""
