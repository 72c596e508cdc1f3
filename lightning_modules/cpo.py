"""CPO — Xu et al. 2024, Contrastive Preference Optimization (arXiv:2401.08417).

L = ℓ(β·[log π(y_w|x) − log π(y_l|x)]) + α·NLL(y_w), with ℓ(u) = −log σ(u), log-probabilities summed over the answer,
and NLL one mean over the chosen tokens of the whole optimiser step. With sums and no reference, a pair of a long and
a short answer weighs most.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import dpo_loss, nll, preference_metrics
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class CPO(RoundModule):
    """Contrastive preference optimisation: DPO without a reference, and cloning of the chosen answer.

    Args:
        beta: inverse temperature β, > 0.
        nll_weight: α ≥ 0, weight of the negative log-likelihood of the chosen answers.
        lr: peak learning rate of AdamW; the paper's 1e-4 is for adapters.
    """

    uses_reference = False

    def __init__(self, *, beta: float = 0.1, nll_weight: float = 1.0, lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("nll_weight", nll_weight, 0.0)
        self.save_hyperparameters()

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, chosen, rejected = self.hparams, scores.chosen, scores.rejected
        imitation = nll(chosen.sum_logps, chosen.length, scores.mean_chosen_length, "token_mean")
        loss = dpo_loss(chosen.sum_logps, rejected.sum_logps, beta=h.beta) + h.nll_weight * imitation
        metrics = preference_metrics(scores, h.beta * chosen.sum_logps, h.beta * rejected.sum_logps)
        return loss, metrics | {"nll_loss": imitation.detach()}
