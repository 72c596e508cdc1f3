"""SFT — supervised fine-tuning: maximum likelihood of answers, L = −log π(y|x).

Preference methods start from such a policy, and take it for their reference. Of pairs, the chosen answers are used,
of answers marked desirable or not, the desirable ones. Prompts are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import BoundTexts, SingleView
from offpolicy.errors import check_choice
from offpolicy.language.preference import PreferenceModule
from offpolicy.losses.preference import NLL_FORMS, nll
from offpolicy.losses.scores import SingleScores, TokenMean
from offpolicy.training.meter import Metrics

STATS = {"logits/answer": "logits", "entropy": "entropy", "mean_token_accuracy": "hits"}


@dataclass(frozen=True)
class WantedView(SingleView):
    """Single answers without those that are marked undesirable."""

    def bind(self, replay: Replay) -> BoundTexts:
        bound = super().bind(replay)
        wanted = bound.facts.get("label", np.ones(len(bound), dtype=bool)).astype(bool)
        facts = {name: column[wanted] for name, column in bound.facts.items()}
        return BoundTexts(replay, bound.index[wanted], facts, bound.kind)


class SFT(PreferenceModule):
    """Supervised fine-tuning on answers.

    Args:
        reduction: "token_mean", one mean over the tokens of the whole optimiser step; "sequence_mean", every answer
            alike; "sum", the mean over answers of the sum over their tokens (the DPO authors' code).
        lr: peak learning rate of AdamW.
    """

    view = WantedView()
    uses_reference = False

    def __init__(self, *, reduction: str = "token_mean", lr: float = 2e-5, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_choice("reduction", reduction, NLL_FORMS)
        self.save_hyperparameters()

    def loss(self, scores: SingleScores) -> tuple[Tensor, Metrics]:
        answer = scores.answer
        loss = nll(answer.sum_logps, answer.length, scores.mean_length, self.hparams.reduction)
        pooled = {name: TokenMean(answer.stats[key], answer.length) for name, key in STATS.items() if answer.stats}
        return loss, {"logps/answer": answer.sum_logps.detach(), "lengths/answer": answer.length, **pooled}
