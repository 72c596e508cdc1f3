"""RPO — Liu et al. 2024, Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
Regularizer (arXiv:2405.16436).

L = ℓ(u) + η·β·(−log π(y_w|x)), with ℓ(u) = −log σ(u), u the margin of DPO, and the log-probability summed over the
chosen answer: ``nll_form="sum"``, the paper's, where η multiplies β. Two other forms of the second term are in use;
there its weight is ``nll_weight`` and β does not enter:

- "sequence_mean": −log π(y_w|x) / length, every answer alike; the authors' later code, weight 0.2 with β = 0.5.
- "token_mean": one mean over the chosen tokens of the whole optimiser step, as in Iterative Reasoning PO
  (arXiv:2404.19733). With a weight of η it agrees with the paper only for answers of about 1/β tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import NLL_FORMS, dpo_loss, nll, preference_metrics
from offpolicy.losses.scores import PairScores
from offpolicy.training.meter import Metrics


class RPO(RoundModule):
    """Regularised preference optimisation: DPO and imitation of the chosen answer, so that it does not lose likelihood.

    Args:
        beta: inverse temperature β, > 0; larger stays closer to the reference.
        eta: η ≥ 0 of the form "sum"; None for the paper's 0.005. 0 is DPO.
        nll_weight: weight ≥ 0 of the other two forms; None for 0.2.
        nll_form: "sum", "sequence_mean" or "token_mean".
        lr: peak learning rate of AdamW.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        eta: float | None = None,
        nll_weight: float | None = None,
        nll_form: str = "sum",
        lr: float = 1e-6,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_choice("nll_form", nll_form, NLL_FORMS)
        if nll_form == "sum" and nll_weight is not None:
            raise UsageError(
                f"`nll_weight` is {nll_weight} but `nll_form` is 'sum', whose weight is eta·beta. Pass "
                "`--model.eta`, or `--model.nll_form` sequence_mean or token_mean."
            )
        if nll_form != "sum" and eta is not None:
            raise UsageError(
                f"`eta` is {eta} but `nll_form` is '{nll_form}', whose weight is `nll_weight`. Pass "
                "`--model.nll_weight`, or leave `--model.nll_form` at sum."
            )
        check_range("eta", eta or 0.0, 0.0)
        check_range("nll_weight", nll_weight or 0.0, 0.0)
        self.save_hyperparameters()

    @property
    def nll_coefficient(self) -> float:
        """What the second term is multiplied by."""
        h = self.hparams
        if h.nll_form == "sum":
            return h.beta * (0.005 if h.eta is None else h.eta)
        return 0.2 if h.nll_weight is None else h.nll_weight

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, chosen, rejected = self.hparams, scores.chosen.log_ratio, scores.rejected.log_ratio
        imitation = nll(scores.chosen.sum_logps, scores.chosen.length, scores.mean_chosen_length, h.nll_form)
        loss = dpo_loss(chosen, rejected, beta=h.beta) + self.nll_coefficient * imitation
        metrics = preference_metrics(scores, h.beta * chosen, h.beta * rejected)
        return loss, metrics | {"nll_loss": imitation.detach()}
