"""ORPO — Hong, Lee, Thorne 2024, Monolithic Preference Optimization without Reference Model (arXiv:2403.07691).

L = NLL(y_w) − λ·log σ(log-odds(y_w) − log-odds(y_l)), with log-odds = A − log(1 − e^A) and A the mean log-probability
per token (Eqs. 4, 6, 7). NLL is one mean over the tokens of the whole optimiser step: of prompt and chosen answer, as
in the code that is in use, or of the answer alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import log_odds, nll, odds_ratio_loss, preference_metrics
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class ORPO(RoundModule):
    """Odds-ratio preference optimisation: fine-tuning and preferences in one stage, without a reference.

    Args:
        lambda_: λ ≥ 0, weight of the odds ratio.
        nll_on_prompt: also count the tokens of the prompt in the likelihood.
        lr: peak learning rate of AdamW.
    """

    uses_reference = False

    def __init__(self, *, lambda_: float = 0.1, nll_on_prompt: bool = True, lr: float = 5e-6, **language: Any) -> None:
        super().__init__(lr=lr, **language)
        check_range("lambda_", lambda_, 0.0)
        self.scores_prompt = nll_on_prompt
        self.save_hyperparameters()

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        weight, chosen, rejected = self.hparams.lambda_, scores.chosen, scores.rejected
        if self.hparams.nll_on_prompt:
            assert chosen.prompt_logps is not None and scores.mean_sequence_length is not None  # `scores_prompt`
            imitation = -(chosen.sum_logps + chosen.prompt_logps) / scores.mean_sequence_length
        else:
            imitation = nll(chosen.sum_logps, chosen.length, scores.mean_chosen_length, "token_mean")
        preference = odds_ratio_loss(chosen.mean_logps, rejected.mean_logps)
        rewards = weight * chosen.mean_logps, weight * rejected.mean_logps
        metrics = preference_metrics(scores, *rewards, mean_logps=True)
        odds = (log_odds(chosen.mean_logps) - log_odds(rejected.mean_logps)).detach()
        metrics |= {"nll_loss": imitation.detach(), "log_odds_ratio": -preference.detach(), "log_odds_chosen": odds}
        return imitation + weight * preference, metrics
