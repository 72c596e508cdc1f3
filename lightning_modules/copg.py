"""CoPG — Flet-Berliac et al. 2024, Contrastive Policy Gradient (arXiv:2406.19185).

For answers to one prompt with rewards R, drawn from any law: L = mean over pairs of (R_β(y) − R_β(y'))²/(2β), with
R_β(y) = R(y) − β·log π(y|x)/π_ref(y|x), log-probabilities summed over the answer. The only minimiser is π_ref·exp(R/β),
normalised, whatever the law, and no importance weight is needed. With rewards ±¼ it is IPO on sums up to scale. The
gradient is that of REINFORCE with a leave-one-out baseline on the regularised reward, where the answers are the
policy's own. The paper's form for k answers, Σ_{i>j} (…)²/(k − 1), is β·k times the mean over pairs
(``normalise="k_minus_1"``); the mean is the default, so that a rate fits every k and β. That form was read in a later
report of the same group, and not checked against the paper; no code of the authors is known.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.data.texts.sequences import ScoredGroupView
from offpolicy.errors import check_choice, check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.groups import PAIR_NORMS, candidate_entropy, concordance, copg_group_loss
from offpolicy.losses.scores import GroupScores, TokenMean
from offpolicy.training.meter import Metrics


class CoPG(RoundModule):
    """Contrastive policy gradient: learns from scored lists of answers that anybody wrote.

    A row is a prompt with all of its answers, which share a forward pass; ``batch_size`` and ``micro_batch_size`` count
    prompts. Lists are read with ``--data.pair_strategy none``; pairs with scores of both sides are lists of two.

    Args:
        beta: β > 0, in units of the score; the optimum is π_ref·exp(R/β).
        normalise: "pair_mean", the mean over pairs of a prompt, or "k_minus_1", the paper's sum over pairs divided by
            k − 1.
        lr: peak learning rate of AdamW.
    """

    view = ScoredGroupView()
    makes = "lists"

    def __init__(self, *, beta: float = 0.1, normalise: str = "pair_mean", lr: float = 1e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_choice("normalise", normalise, PAIR_NORMS)
        self.save_hyperparameters()

    def loss(self, scores: GroupScores) -> tuple[Tensor, Metrics]:
        h, ratio, present, reward = self.hparams, scores.log_ratio, scores.present, scores.facts["score"]
        loss = copg_group_loss(ratio, reward, present, beta=h.beta, normalise=h.normalise)
        count, drift = present.sum(1), ratio.detach()
        metrics: dict[str, Any] = {
            "scores": reward.sum(1).to(drift) / count,
            "rewards/accuracies": concordance(drift, reward, present),
            "ranking_accuracy": concordance(scores.sum_logps.detach() / scores.length.clamp(min=1), reward, present),
            "candidate_entropy": candidate_entropy(drift, present),
            "logps/answer": scores.sum_logps.detach().sum(1) / count,
            "logps/drift": drift.sum(1) / count,
            "lengths/answer": scores.length.sum(1) / count,
        }
        if scores.stats:
            metrics["entropy"] = TokenMean(scores.stats["entropy"].sum(1), scores.length.sum(1))
        return loss, metrics
