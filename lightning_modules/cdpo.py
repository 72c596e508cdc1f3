"""cDPO — Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO.

L = (1 − ε)·ℓ(u) + ε·ℓ(−u) = ℓ(u) + ε·u, with ℓ(u) = −log σ(u) and u the margin of DPO. The margin rests at
log((1 − ε)/ε). See rDPO for a loss whose optimum noise does not move.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.module import LanguageModule
from offpolicy.language.scores import PairScores
from offpolicy.losses.preference import cdpo_loss, preference_metrics
from offpolicy.modules import Metrics


class CDPO(LanguageModule):
    """Conservative DPO: labels are smoothed, so no margin grows without end.

    Args:
        beta: inverse temperature β, > 0; larger stays closer to the reference.
        label_smoothing: ε, the share of labels believed to be wrong, in [0, 0.5); 0 is DPO.
        lr: peak learning rate of AdamW.
    """

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.1, lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("label_smoothing", label_smoothing, 0.0, 0.5, upper_open=True)
        self.save_hyperparameters()

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, chosen, rejected = self.hparams, scores.chosen.log_ratio, scores.rejected.log_ratio
        loss = cdpo_loss(chosen, rejected, beta=h.beta, label_smoothing=h.label_smoothing)
        return loss, preference_metrics(scores, h.beta * chosen, h.beta * rejected)
