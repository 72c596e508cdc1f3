"""IPO — Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences
(arXiv:2310.12036).

L = (h(y_w) − h(y_l) − 1/(2β))², with h = log π(y|x)/π_ref(y|x): its mean per token, or its sum as in the paper
(Eq. 17, where β is called τ). The two differ widely in scale.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import ipo_loss, preference_metrics
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class IPO(RoundModule):
    """Identity preference optimisation: the margin is drawn to 1/(2β) and no further.

    Args:
        beta: β > 0, the paper's τ; 0.01 to 1. Larger stays closer to the reference.
        length_average: divide log-ratios by the length of their answer; false for the paper's sums.
        lr: peak learning rate of AdamW.
    """

    def __init__(self, *, beta: float = 0.1, length_average: bool = True, lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        self.save_hyperparameters()

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, chosen, rejected = self.hparams, scores.chosen.log_ratio, scores.rejected.log_ratio
        if h.length_average:
            chosen, rejected = chosen / scores.chosen.length, rejected / scores.rejected.length
        loss = ipo_loss(chosen, rejected, beta=h.beta)
        return loss, preference_metrics(scores, h.beta * chosen, h.beta * rejected)
