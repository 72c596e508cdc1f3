"""INPO — Zhang et al. 2024, Iterative Nash Policy Optimization (arXiv:2407.00617).

A round is a step of mirror descent against oneself under a general preference, with the policy π_t that it starts from
and a fixed reference π_ref, on pairs of answers drawn from π_t:
L = (Δ_θ − (τ/η)·Δ_ref − (1 − τ/η)·Δ_t − 1/(2η))², Δ the summed log-probability of y_w less that of y_l.
The minimiser is π_ref^{τ/η}·π_t^{1 − τ/η}·exp(P(y ≻ π_t)/η), normalised, where the two answers of a pair were drawn
independently from π_t; pairs of the best and the worst of K answers, as experiments often take, shift it. So does a
``temperature`` other than 1: answers are then not drawn from the π_t that is scored.

``rounds`` draws, judges and trains by turns; without it the pairs are given, and a further round starts from the policy
of the last one: ``--model.policy RUN/hf --model.reference FIRST_POLICY``. η = 0.0075, τ = η/3 and the rate are those of
a public trainer that cites the paper; the paper's own table was not checked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import BoundTexts
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.preference import inpo_loss, preference_metrics
from offpolicy.losses.scores import PairScores, Scores
from offpolicy.training.meter import Metrics


class INPO(RoundModule):
    """Iterative Nash policy optimisation: two references, the policy at the start of a round and ``reference``.

    Args:
        eta: η > 0, the step is 1/η; the summed margin aimed at is 1/(2η), 67 nats at 0.0075. Small models and short
            answers want 0.1 to 0.5.
        tau: τ, weight of ``reference`` against the policy at its start, in [0, η]; None for η/3. At η the start has no
            part, at 0 the reference has none.
        soft_labels: take the column ``agreement``, the probability that a judge prefers the chosen answer, for the
            label: the same minimiser with less variance.
        lr: peak learning rate of AdamW.
    """

    uses_previous = True

    def __init__(
        self,
        *,
        eta: float = 0.0075,
        tau: float | None = None,
        soft_labels: bool = False,
        lr: float = 1e-6,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("eta", eta, 0.0, lower_open=True)
        if tau is not None:
            check_range("tau", tau, 0.0, eta)
        if soft_labels and self.in_rounds and not self.hparams.judge:
            raise UsageError(
                "`soft_labels` is true, and rewards say which answer of a pair is better, not how probably; expected "
                "a judge of two answers. Pass --model.judge package.module.function, or leave `soft_labels` out."
            )
        self.save_hyperparameters()

    @property
    def tau(self) -> float:
        """τ, given or by its default."""
        return self.hparams.eta / 3.0 if self.hparams.tau is None else self.hparams.tau

    def texts_of(self, replay: Replay) -> BoundTexts:
        texts = super().texts_of(replay)
        if self.hparams.soft_labels and "agreement" not in texts.facts:
            raise DataError(
                "`soft_labels` is true and the pairs have no column `agreement`; expected the probability that the "
                "chosen answer is preferred. Name it with `--data.columns`, or leave `soft_labels` out."
            )
        return texts

    def loss(self, scores: PairScores) -> tuple[Tensor, Metrics]:
        h, w, x = self.hparams, scores.chosen, scores.rejected
        probability = scores.facts["agreement"].to(w.sum_logps.dtype) if h.soft_labels else 1.0
        share = self.tau / h.eta
        mixed = [start + share * (ref - start) for ref, start in map(_references, (w, x))]
        loss = inpo_loss(
            w.sum_logps - x.sum_logps,
            _references(w)[0] - _references(x)[0],
            _references(w)[1] - _references(x)[1],
            eta=h.eta,
            tau=self.tau,
            probability=probability,
        )
        rewards = (h.eta * (w.sum_logps - mixed[0]), h.eta * (x.sum_logps - mixed[1]))  # their margin is drawn to ½
        return loss, preference_metrics(scores, *rewards)


def _references(scores: Scores) -> tuple[Tensor, Tensor]:
    """Log-probabilities of an answer under the reference and under the policy at its start, (B,) each."""
    assert scores.ref_logps is not None and scores.previous_logps is not None  # `uses_reference`, `uses_previous`
    return scores.ref_logps, scores.previous_logps
