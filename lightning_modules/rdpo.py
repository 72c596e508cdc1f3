"""rDPO — Ray Chowdhury, Kini, Natarajan 2024, Provably Robust DPO (arXiv:2403.00409), and
cDPO — Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO.

Both assume that a share ε of the labels is wrong, and draw opposite conclusions.

rDPO: L = [(1 − ε)·ℓ(u) − ε·ℓ(−u)] / (1 − 2ε) = ℓ(u) − ε/(1 − 2ε)·u, with ℓ(u) = −log σ(u) and u the margin of DPO: over
labels flipped with probability ε its mean is the DPO loss of the true labels. It has no lower bound, so a negative
loss is right, and its gradient grows as 1/(1 − 2ε): at ε = 0.4 use a fifth of the rate, or clip.

Not to be mixed up with R-DPO (arXiv:2403.19159), which regularises lengths.

cDPO: L = (1 − ε)·ℓ(u) + ε·ℓ(−u) = ℓ(u) + ε·u. The margin rests at log((1 − ε)/ε).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import cdpo_loss, preference_metrics, rdpo_loss
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class RDPO(RoundModule):
    """Provably robust DPO: an unbiased estimate of the DPO loss under flipped labels.

    Args:
        beta: inverse temperature β, > 0; larger stays closer to the reference.
        label_smoothing: ε, the rate at which labels are flipped, in [0, 0.5); 0 is DPO.
        lr: peak learning rate of AdamW.
    """

    pair_loss = staticmethod(rdpo_loss)

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.1, lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("label_smoothing", label_smoothing, 0.0, 0.5, upper_open=True)
        self.save_hyperparameters()

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, chosen, rejected = self.hparams, scores.chosen.log_ratio, scores.rejected.log_ratio
        loss = self.pair_loss(chosen, rejected, beta=h.beta, label_smoothing=h.label_smoothing)
        return loss, preference_metrics(scores, h.beta * chosen, h.beta * rejected)


class CDPO(RDPO):
    """Conservative DPO: labels are smoothed, so no margin grows without end. Arguments as of RDPO."""

    pair_loss = staticmethod(cdpo_loss)
