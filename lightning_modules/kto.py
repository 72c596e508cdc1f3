"""KTO — Ethayarajh et al. 2024, Model Alignment as Prospect Theoretic Optimization (arXiv:2402.01306).

For answers that are desirable or not, with r = log π(y|x)/π_ref(y|x) summed over the answer:
L = λ_D·(1 − σ(β·[r − z₀])) for desirable ones and λ_U·(1 − σ(β·[z₀ − r])) for the others. z₀ = max(0, mean of r over
prompts with another prompt's answer), without gradient, over the whole optimiser step.

Pairs are taken as two answers each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import BoundTexts, SingleView
from offpolicy.errors import DataError, check_range
from offpolicy.language.preference import PreferenceModule
from offpolicy.losses.preference import kto_loss
from offpolicy.losses.scores import SingleScores
from offpolicy.training.meter import Metrics


def no_labels() -> DataError:
    """The error of data without labels."""
    return DataError(
        "the data do not say which answers are desirable; expected a column `label` of true and false, or pairs. Name "
        "it with `--data.columns`."
    )


@dataclass(frozen=True)
class LabelledView(SingleView):
    """Single answers that are marked desirable or not."""

    def bind(self, replay: Replay) -> BoundTexts:
        bound = super().bind(replay)
        if "label" not in bound.facts:
            raise no_labels()
        return bound


class KTO(PreferenceModule):
    """Kahneman-Tversky optimisation: learns from single answers marked desirable or undesirable.

    Args:
        beta: inverse temperature β, > 0.
        desirable_weight: λ_D ≥ 0. With n_D desirable and n_U other answers keep λ_D·n_D / (λ_U·n_U) in [1, 4/3].
        undesirable_weight: λ_U ≥ 0.
        lr: peak learning rate of AdamW; 5e-7 to 5e-6.
    """

    view = LabelledView(rejected=True)
    uses_mismatched = True

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        lr: float = 1e-6,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("desirable_weight", desirable_weight, 0.0)
        check_range("undesirable_weight", undesirable_weight, 0.0)
        check_range("batch_size", self.hparams.batch_size, 2)  # one answer has no other prompt
        self.save_hyperparameters()

    def loss(self, scores: SingleScores) -> tuple[Tensor, Metrics]:
        h, ratio = self.hparams, scores.answer.log_ratio
        if "label" not in scores.facts:
            raise no_labels()
        label, kl = scores.facts["label"].bool(), scores.mismatched_ratio
        assert kl is not None  # `uses_mismatched`
        weights = {"desirable_weight": h.desirable_weight, "undesirable_weight": h.undesirable_weight}
        loss = kto_loss(ratio, label, kl, beta=h.beta, **weights)
        values = {"rewards": h.beta * ratio.detach(), "logps": scores.answer.sum_logps.detach()}
        metrics = {"kl": kl.expand(label.shape), "rewards/accuracies": (ratio > kl.clamp(min=0.0)).eq(label).to(ratio)}
        for name, value in values.items():  # NaN: not a row that this is a mean over
            metrics[f"{name}/chosen"] = value.masked_fill(~label, torch.nan)
            metrics[f"{name}/rejected"] = value.masked_fill(label, torch.nan)
        return loss, metrics
