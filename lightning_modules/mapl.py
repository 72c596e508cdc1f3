"""MAPL — Sun, Cai et al. 2025, Multi-level Aware Preference Learning (arXiv:2505.12845).

With h(y|x) = β·log π(y|x)/π_ref(y|x) summed over the answer and ℓ(u) = −log σ(u), a pair is one of three kinds:

- ordinary, two answers to one prompt: ℓ(h(y_w|x) − h(y_l|x)), which is DPO;
- within a sample, one answer to two prompts, of which it satisfies the first better: ℓ(h(y|x_w) − h(y|x_l)), DPO's form
  of a Bradley-Terry law of prompts given the answer. Z(x) does not cancel between two prompts, which the form ignores;
- between samples, two answers under two prompts, where the preference is stronger under the first, x':
  ℓ([h(y_w|x') − h(y_l|x')] − [h(y_w|x) − h(y_l|x)]).

The loss is the mean over all rows, each with the weight of its kind. The form of the first two was read in an account
of the paper, that of the third is a reconstruction, and the weights of both terms are not known; 1 is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offpolicy.data.texts.sequences import TwoPromptView
from offpolicy.errors import check_range
from offpolicy.language.preference import PreferenceModule
from offpolicy.losses.preference import dpo_loss
from offpolicy.losses.scores import GroupScores, TokenMean
from offpolicy.training.meter import Metrics

KINDS = ("ordinary", "intra", "inter")


class MAPL(PreferenceModule):
    """Multi-level aware preference learning: pairs of answers, of prompts, and of both, told apart row by row.

    Data are pairs with a prompt for each side (columns ``prompt_chosen``, ``prompt_rejected``); in a pair with two
    prompts and two answers the chosen prompt is the one under which the preference is stronger.

    Args:
        beta: inverse temperature β, > 0.
        intra_weight: of rows with one answer to two prompts, ≥ 0.
        inter_weight: of rows with two prompts and two answers, ≥ 0. They are four texts each.
        lr: peak learning rate of AdamW.
    """

    view = TwoPromptView()

    def __init__(
        self,
        *,
        beta: float = 0.1,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        lr: float = 1e-6,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("intra_weight", intra_weight, 0.0)
        check_range("inter_weight", inter_weight, 0.0)
        self.save_hyperparameters()

    def loss(self, scores: GroupScores) -> tuple[Tensor, Metrics]:
        h, ratio, kind = self.hparams, scores.log_ratio, scores.facts["kind"]
        inter = kind == 2
        better, worse = ratio[:, 0], torch.where(inter, -ratio[:, 1], ratio[:, 1])
        if ratio.shape[1] > 2:  # the other answer under each prompt, of rows with four texts
            better, worse = better - ratio[:, 2], worse + ratio[:, 3]
        weight = torch.ones_like(better).masked_fill(kind == 1, h.intra_weight).masked_fill(inter, h.inter_weight)
        margin = h.beta * (better - worse).detach()
        metrics: dict[str, Any] = {
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).to(margin.dtype),
            "logps/chosen": scores.sum_logps[:, 0].detach(),
            "logps/rejected": scores.sum_logps[:, 1].detach(),
        }
        for number, name in enumerate(KINDS):  # NaN: not a row that this is a mean over
            metrics[f"rewards/accuracies_{name}"] = metrics["rewards/accuracies"].masked_fill(kind != number, torch.nan)
        if scores.stats:
            metrics["entropy"] = TokenMean(scores.stats["entropy"].sum(1), scores.length.sum(1))
        return weight * dpo_loss(better, worse, beta=h.beta), metrics
