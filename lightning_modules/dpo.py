"""DPO — Rafailov et al. 2023, Direct Preference Optimization (arXiv:2305.18290).

L = −log σ(β·[log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)]), with log-probabilities summed over the answer
(Eq. 7). The paper trains with RMSprop and a constant rate after a warm-up; here it is AdamW with ``lr_schedule``.

DPO^γ (Chen et al. 2024, arXiv:2405.19534, Eq. 4) weighs the reference: log-ratios are log π(y|x) − γ·log π_ref(y|x).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import dpo_loss, preference_metrics
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class DPO(RoundModule):
    """Direct preference optimisation: the reward of an answer is its log-ratio to the reference.

    Args:
        beta: inverse temperature β, > 0; larger stays closer to the reference. Paper 0.1, and 0.5 for summaries.
        reference_weight: γ ≥ 0, weight of the reference in the log-ratios; 1 is DPO, and at 0 there is no reference.
            Below 1 pairs that the reference orders wrongly are easier to turn.
        lr: peak learning rate of AdamW; 5e-7 is usual for 7B models, ten to fifty times that for LoRA.
    """

    def __init__(self, *, beta: float = 0.1, reference_weight: float = 1.0, lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("reference_weight", reference_weight, 0.0)
        self.save_hyperparameters()

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        return self.hparams.reference_weight > 0

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        beta, weight = self.hparams.beta, self.hparams.reference_weight
        chosen, rejected = (
            one.sum_logps if one.ref_logps is None or not weight else one.sum_logps - weight * one.ref_logps
            for one in (scores.chosen, scores.rejected)
        )
        loss = dpo_loss(chosen, rejected, beta=beta)
        return loss, preference_metrics(scores, beta * chosen, beta * rejected)
