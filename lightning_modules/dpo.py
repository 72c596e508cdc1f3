"""DPO — Rafailov et al. 2023, Direct Preference Optimization (arXiv:2305.18290).

L = −log σ(β·[log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)]), with log-probabilities summed over the answer
(Eq. 7). The paper trains with RMSprop and a constant rate after a warm-up; here it is AdamW with ``lr_schedule``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.preference import PreferenceModule
from offpolicy.losses.preference import dpo_loss, preference_metrics
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class DPO(PreferenceModule):
    """Direct preference optimisation: the reward of an answer is its log-ratio to the reference.

    Args:
        beta: inverse temperature β, > 0; larger stays closer to the reference. Paper 0.1, and 0.5 for summaries.
        lr: peak learning rate of AdamW; 5e-7 is usual for 7B models, ten to fifty times that for LoRA.
    """

    def __init__(self, *, beta: float = 0.1, lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        self.save_hyperparameters()

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        beta, chosen, rejected = self.hparams.beta, scores.chosen.log_ratio, scores.rejected.log_ratio
        loss = dpo_loss(chosen, rejected, beta=beta)
        return loss, preference_metrics(scores, beta * chosen, beta * rejected)
