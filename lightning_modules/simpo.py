"""SimPO — Meng, Xia, Chen 2024, Simple Preference Optimization with a Reference-Free Reward (arXiv:2405.14734).

L = −log σ(β·A(y_w) − β·A(y_l) − γ) = ℓ(β·[A(y_w) − A(y_l) − ρ]), with A the mean log-probability per token and
ρ = γ/β (Eq. 6). The authors' code takes ρ, other libraries γ: both are understood here, never both at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import nll, preference_metrics, simpo_loss
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class SimPO(RoundModule):
    """Preference optimisation on mean log-probabilities with a margin, without a reference.

    The authors tune the rate first (3e-7 to 1e-6; 1e-5 ruins a model), then γ/β from 0.5 within [0, 1], then β.

    Args:
        beta: scale of the reward, > 0; 2 to 10.
        gamma_beta_ratio: ρ = γ/β, the margin in units of mean log-probability, ≥ 0; None for 0.5, or for γ/β.
        gamma: γ ≥ 0 itself, instead of ``gamma_beta_ratio``.
        nll_weight: weight ≥ 0 of the negative log-likelihood of the chosen answers, a mean over the tokens of the
            step. 0 in the paper; above 0 it protects reasoning and costs chat quality (CPO-SimPO).
        lr: peak learning rate of AdamW.
    """

    uses_reference = False

    def __init__(
        self,
        *,
        beta: float = 2.0,
        gamma_beta_ratio: float | None = None,
        gamma: float | None = None,
        nll_weight: float = 0.0,
        lr: float = 1e-6,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        if gamma is not None and gamma_beta_ratio is not None:
            raise UsageError(
                f"`gamma` is {gamma} and `gamma_beta_ratio` {gamma_beta_ratio}; expected one of them, since "
                "gamma = beta·gamma_beta_ratio. Leave one out."
            )
        check_range("gamma", gamma or 0.0, 0.0)
        check_range("gamma_beta_ratio", gamma_beta_ratio or 0.0, 0.0)
        check_range("nll_weight", nll_weight, 0.0)
        self.save_hyperparameters()

    @property
    def margin(self) -> float:
        """ρ = γ/β."""
        h = self.hparams
        if h.gamma is not None:
            return h.gamma / h.beta
        return 0.5 if h.gamma_beta_ratio is None else h.gamma_beta_ratio

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, chosen, rejected = self.hparams, scores.chosen.mean_logps, scores.rejected.mean_logps
        loss = simpo_loss(chosen, rejected, beta=h.beta, gamma_beta_ratio=self.margin)
        metrics = preference_metrics(scores, h.beta * chosen, h.beta * rejected, mean_logps=True)
        if h.nll_weight:
            imitation = nll(scores.chosen.sum_logps, scores.chosen.length, scores.mean_chosen_length, "token_mean")
            loss = loss + h.nll_weight * imitation
            metrics["nll_loss"] = imitation.detach()
        return loss, metrics
