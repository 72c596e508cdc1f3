"""Which problems an iteration asks, by what is known of them (option ``curriculum``)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from offpolicy.compute import processes
from offpolicy.data import sampling
from offpolicy.data.texts.replaying import weighted
from offpolicy.errors import check_range
from offpolicy.language.policy import base_of


@runtime_checkable
class Curriculum(Protocol):
    """What orders the problems of an iteration; every process has one, and all of them must say the same.

    It may have ``look(model, prompts)``, called on all processes whenever the engine gets the weights of the policy,
    with the policy, in evaluation, and an iterator over the tokens of all problems.
    """

    def begin(self, problems: int) -> None:
        """Start with so many problems, of which nothing is known."""

    def order(self, seed: int, iteration: int) -> np.ndarray:
        """The problems, those to be asked first in front, (n ≥ 1,) int64; after the last comes the first again.

        It is asked several times in an iteration, and must say the same each time.
        """

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        """Take own answers of an iteration, group by group: problems (B,), and whether each is right, (B,) bool."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Vade:
    """Asks the problems whose success rate, drawn from what is known of it, is nearest to ½ (VADE).

    Every problem has Beta(α, β) of its success rate p, at first Beta(1, 1). An iteration draws p of each and takes the
    largest p(1 − p), the variance of a reward of 0 or 1. Then α and β of every problem go back to 1 by ``slow``, those
    of problems that were asked by ``fast``, and the right and wrong answers are added: as the policy changes, what is
    old counts less. The two factors are our reading of the paper's decay at two scales; it was not checked.

    Args:
        slow: what is left of α − 1 and β − 1 after an iteration, in [0, 1].
        fast: the same, for problems that were asked, in [0, 1].
    """

    slow: float = 0.99
    fast: float = 0.8

    def __post_init__(self) -> None:
        check_range("slow", self.slow, 0.0, 1.0)
        check_range("fast", self.fast, 0.0, 1.0)

    def begin(self, problems: int) -> None:
        self.counts = np.ones((2, problems))  # α and β

    def order(self, seed: int, iteration: int) -> np.ndarray:
        key = sampling.keys(seed, "vade", torch.tensor([iteration], device="cpu"))
        drawn = np.random.Generator(np.random.Philox(key=int(key) & (2**64 - 1))).beta(*self.counts)
        return np.argsort(-drawn * (1 - drawn), kind="stable")

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        size = self.counts.shape[1]
        new = np.stack([np.bincount(problem[right], minlength=size), np.bincount(problem[~right], minlength=size)])
        self.counts = 1 + np.where(new.sum(0) > 0, self.fast, self.slow) * (self.counts - 1) + new

    def state_dict(self) -> dict[str, Any]:
        return {"counts": torch.from_numpy(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = np.asarray(state["counts"], np.float64)


@dataclass
class Gain:
    """Asks the problems whose tokens the policy sees in like directions first, and others as it gets better (GAIN-RL).

    arXiv:2506.02281. Before the first iteration the policy reads every prompt once. The concentration C of a problem is
    the mean cosine of its last states over all pairs of tokens, ‖mean of xᵢ/‖xᵢ‖‖². Problems are ranked by C, the
    largest first. An iteration draws them without replacement in proportion to exp(−(rank − μ)²/2σ²), with μ = 0 at
    first, and then μ grows by step/2·(tanh(2(accuracy − ½)) + tanh(2·mean C of the problems asked)), at least 0 and at
    most ``step``. The numbers are those of the authors' code, for some ten thousand problems.

    The code takes C of what goes into the last layer's MLP, as the mean over pairs of tokens of the question plus eight
    times that over pairs of question and template; it takes the C of a problem anew when it is asked, with its
    answers; its μ moves an iteration later, and beyond the last problem.

    Args:
        deviation: σ in ranks, > 0.
        step: largest growth of μ in an iteration, in ranks, ≥ 0.
    """

    deviation: float = 1000.0
    step: float = 1000.0

    def __post_init__(self) -> None:
        check_range("deviation", self.deviation, 0.0, lower_open=True)
        check_range("step", self.step, 0.0)

    def begin(self, problems: int) -> None:
        self.concentration, self.mean, self.known = np.zeros(problems), 0.0, False

    def look(self, model: nn.Module, prompts: Iterable[np.ndarray]) -> None:
        if not self.known:
            self.concentration, self.known = concentrations(model, prompts), True

    def order(self, seed: int, iteration: int) -> np.ndarray:
        rank = np.arange(len(self.concentration))
        weights = np.exp(-0.5 * ((rank - self.mean) / self.deviation) ** 2)
        return np.argsort(-self.concentration, kind="stable")[weighted(rank, weights, seed, "gain", iteration)]

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        accuracy, angle = float(right.mean()), float(self.concentration[problem].mean())
        growth = self.step / 2 * (np.tanh(2 * (accuracy - 0.5)) + np.tanh(2 * angle))
        self.mean = float(min(self.mean + np.clip(growth, 0, self.step), len(self.concentration) - 1))

    def state_dict(self) -> dict[str, Any]:
        return {"concentration": torch.from_numpy(self.concentration), "mean": self.mean, "known": self.known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.concentration = np.array(state["concentration"], np.float64)
        self.mean, self.known = float(state["mean"]), bool(state["known"])


@torch.no_grad()
def concentrations(model: nn.Module, prompts: Iterable[np.ndarray]) -> np.ndarray:
    """The mean cosine of a model's last states over all pairs of tokens of each prompt, (P,) float64.

    Processes share the prompts, which are read one by one, so that nothing depends on who reads what; all of them make
    the same number of passes, as weights may be cut over them.
    """
    texts, world, device, found = list(prompts), processes.world_size(), next(model.parameters()).device, []
    shorter = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    rest = {"use_cache": False, "output_hidden_states": True, **({"logits_to_keep": 1} if shorter else {})}
    for first in range(0, len(texts), world):
        prompt = texts[min(first + processes.rank(), len(texts) - 1)]
        ids = torch.from_numpy(prompt.astype(np.int64)).to(device)
        states = model(input_ids=ids[None], **rest).hidden_states[-1][0].double()
        found.append(nn.functional.normalize(states, dim=-1).mean(0).square().sum())
    parts = processes.gathered(torch.stack(found).cpu().numpy())
    return np.stack(parts, axis=1).reshape(-1)[: len(texts)]


CURRICULA = {"vade": Vade, "gain": Gain}
