"""SFT — supervised fine-tuning: maximum likelihood of answers, L = −log π(y|x).

Preference methods start from such a policy, and take it for their reference. Of pairs, the chosen answers are used,
of answers marked desirable or not, the desirable ones. Prompts are not counted.

``weighting`` makes a token count by how likely the policy finds it, π = π(y_t|x, y_<t) without gradient:
"dft" −Σ π·log π(y_t|…) (dynamic fine-tuning); "otr" takes every token for a roll-out of one token (arXiv:2509.26313):
K tokens a_k are drawn there, −(1/K)·Σ_k r_k·log π(a_k|…), r_k = 1 where a_k = y_t, else ``miss``. In the limit of
infinitely many draws at temperature 1 that is (1 − miss)·dft, as a miss only rescales: Σ_a π(a)·∇log π(a) = 0. The
limit is the default; the paper draws 256 at 0.7 and has a miss of −0.1, which was not checked against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.devices import send
from offpolicy.data.replay import Replay
from offpolicy.data.sampling import keys
from offpolicy.data.texts.sequences import BoundTexts, SingleView
from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.language.answer_scores import Answers, TokenValue, score
from offpolicy.language.layout import Layout
from offpolicy.language.one_token import drawn_value, token_keys
from offpolicy.language.preference import PreferenceModule, StepMeans
from offpolicy.language.reference import ReferenceTable
from offpolicy.losses.preference import NLL_FORMS, nll
from offpolicy.losses.scores import SingleScores, TokenMean
from offpolicy.training.meter import Metrics

WEIGHTINGS = ("none", "dft", "otr")
DRAW_TEMPERATURE = 0.7  # of the paper, not checked against it
STATS = {"logits/answer": "logits", "entropy": "entropy", "mean_token_accuracy": "hits"}


@dataclass(frozen=True)
class WantedView(SingleView):
    """Single answers without those that are marked undesirable."""

    def bind(self, replay: Replay) -> BoundTexts:
        bound = super().bind(replay)
        wanted = bound.facts.get("label", np.ones(len(bound), dtype=bool)).astype(bool)
        facts = {name: column[wanted] for name, column in bound.facts.items()}
        return BoundTexts(replay, bound.index[wanted], facts, bound.kind)


class SFT(PreferenceModule):
    """Supervised fine-tuning on answers.

    Args:
        reduction: "token_mean", one mean over the tokens of the whole optimiser step; "sequence_mean", every answer
            alike; "sum", the mean over answers of the sum over their tokens (the DPO authors' code).
        weighting: of the tokens: "none", "dft" or "otr". The loss of the others is no measure and may be below 0;
            ``nll_loss`` is reported beside it.
        draws: of "otr": tokens drawn at every place, by hash; inf is the limit, which draws none.
        miss: of "otr": reward of a drawn token that is not the data's.
        draw_temperature: of "otr" with finite ``draws``, > 0; None for the paper's 0.7. Other values than 1 leave the
            policy gradient that the limit is.
        lr: peak learning rate of AdamW.
    """

    view: ClassVar[Any] = WantedView()
    uses_reference = False

    def __init__(
        self,
        *,
        reduction: str = "token_mean",
        weighting: str = "none",
        draws: int | float | str = "inf",
        miss: float = -0.1,
        draw_temperature: float | None = None,
        lr: float = 2e-5,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_choice("reduction", reduction, NLL_FORMS)
        check_choice("weighting", weighting, WEIGHTINGS)
        draws = "inf" if draws == math.inf else draws
        if draws != "inf" and (not isinstance(draws, int) or isinstance(draws, bool) or draws < 1):
            raise UsageError(f"`draws` is {draws}; expected a whole number ≥ 1, or inf for the limit.")
        if weighting != "otr" and (draws, miss, draw_temperature) != ("inf", -0.1, None):
            raise UsageError(
                f"`draws`, `miss` or `draw_temperature` was given, and `weighting` is '{weighting}', which has none; "
                "expected 'otr'. Pass --model.weighting otr, or leave them out."
            )
        if draw_temperature is not None:
            check_range("draw_temperature", draw_temperature, 0.0, lower_open=True)
            if draws == "inf":
                raise UsageError(
                    "`draw_temperature` was given, and `draws` is inf, which draws nothing; expected a number of "
                    "draws. Pass --model.draws 256, or leave it out."
                )
        self.save_hyperparameters()
        self._rows = np.empty(0, dtype=np.int64)  # that are being scored

    def scores(self, table: ReferenceTable, rows: np.ndarray, means: StepMeans, *, stats: bool = False) -> Any:
        self._rows = rows
        return super().scores(table, rows, means, stats=stats)

    def answers(self, model: Any, layout: Layout, *, stats: bool = False) -> Answers:
        value = None if self.hparams.weighting == "none" else self._token_value(layout)
        return score(model, layout, chunk=self.hparams.chunk, stats=stats, value=value)

    def _token_value(self, layout: Layout) -> TokenValue:
        """The value of a token that is maximised, log-probabilities aside."""
        h = self.hparams
        if h.weighting == "dft" or h.draws == "inf":
            scale = 1.0 if h.weighting == "dft" else 1.0 - h.miss
            return lambda head, hidden, target, logps: scale * logps.detach().exp() * logps
        step = torch.tensor([self.global_step], device="cpu")
        key = keys(self.seed or 0, "one-token draws", step)[0]
        seeds = token_keys(layout, *(send(x, layout.answer.device) for x in (torch.from_numpy(self._rows), key)))
        how = {"draws": h.draws, "miss": h.miss, "temperature": h.draw_temperature or DRAW_TEMPERATURE}
        return lambda head, hidden, target, logps: drawn_value(head, hidden, target, seeds, chunk=h.chunk, **how)

    def loss(self, scores: SingleScores) -> tuple[Tensor, Metrics]:
        answer, form = scores.answer, self.hparams.reduction
        likelihood = nll(answer.sum_logps, answer.length, scores.mean_length, form)
        pooled = {name: TokenMean(answer.stats[key], answer.length) for name, key in STATS.items() if answer.stats}
        metrics = {"logps/answer": answer.sum_logps.detach(), "lengths/answer": answer.length, **pooled}
        if self.hparams.weighting == "none":
            return likelihood, metrics
        assert answer.sum_values is not None  # of `_token_value`
        loss = nll(answer.sum_values, answer.length, scores.mean_length, form)
        return loss, {"nll_loss": likelihood.detach(), **metrics}
