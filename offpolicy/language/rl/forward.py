"""Forward passes of the policy over answers in a store, at the temperature that answers are drawn at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.texts.rollouts import BoundRollouts, Rollouts
from offpolicy.language.answer_scores import TokenScores, final_states, score_tokens
from offpolicy.language.head import FinalStates
from offpolicy.language.layout import Layout, group_layout
from offpolicy.language.meters import Pace

LANE = 1024  # tokens of a prompt with several answers behind it: attention to more costs what the prompt saves


@dataclass
class Forward:
    """How answers go through the policy.

    Attributes:
        model: the policy.
        device: of the policy.
        pad_id: token that fills up rows.
        shares: whether answers of a group stand behind one prompt, which is exact for most models.
        padding_free: whether rows are packed without padding; None for those of which much would be padding.
        rows: answers of a forward pass, at most.
        chunk: tokens whose logits exist at once.
        temperature: τ > 0, by which logits are divided.
        critic: values of states, where the objective has a critic.
        pace: counts the passes that are learned from.
    """

    model: Any
    device: torch.device
    pad_id: int
    shares: bool
    padding_free: bool | None
    rows: int
    chunk: int
    temperature: float
    critic: Any
    pace: Pace

    def gather(self, bound: BoundRollouts, rows: np.ndarray) -> Rollouts:
        """The batch of these rows of the store."""
        return bound.gather(rows, LANE if self.shares else 0)

    def layout(self, batch: Rollouts) -> Layout:
        """The rows of one forward pass over a batch, on the device."""
        return group_layout(batch, self.pad_id, padding_free=self.padding_free).to(self.device)

    def scores(self, batch: Rollouts, **options: Any) -> TokenScores:
        """Scores of the tokens of a batch; ``options`` as of :func:`offpolicy.language.answer_scores.score_tokens`."""
        layout = self.layout(batch)
        if torch.is_grad_enabled():
            self.pace.add_pass(layout.real_tokens, layout.input_ids.numel())
        return score_tokens(self.model, layout, chunk=self.chunk, temperature=self.temperature, **options)

    def states(self, batch: Rollouts) -> FinalStates:
        """The states that predict the tokens of a batch, without gradient."""
        return final_states(self.model, self.layout(batch))

    def values(self, batch: Rollouts, scores: TokenScores) -> Tensor:
        """What the critic says before each token of a batch, (n,)."""
        return self.critic(scores.hidden, self.layout(batch))
