"""SRPO — Choi, Ahmadian, Geist, Pietquin, Azar 2024, Self-Improving Robust Preference Optimization (arXiv:2406.01660).

One network is a generator π(y|x) and a reviser π(y₂|y₁, x), told apart by the prompt. At the solution of
min_π max_π† E[P(y₂ ≻ y₁) − β·KL(π†‖π_ref|y₁, x) + β·KL(π‖π_ref|x)] these are exact for any preference P, with g(y) the
log-ratio of an answer to π_ref, and f(a|b) that of a as the revision of b:
P(a ≻ b) = ½ + β·[f(a|b) − f(b|b)] = ½ + (β/2)·[g(a) − g(b) + f(a|b) − f(b|a)].
L = (1 − α)·joint + α·(over_l + over_w), their squares for the labels of a pair (:func:`srpo_terms`).

Which term α weighs in the paper, a factor ½ on the last sum, and the defaults of α and β were not checked; log-ratios
are sums over the answer, ``length_average`` takes means per token. The wording of the request is ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.data.texts.conditioning import REQUEST, Numbered, Revisions, is_chat, with_texts
from offpolicy.data.texts.sequences import BoundGroups, BoundTexts, PairView, ScoredGroupView, token_ids
from offpolicy.errors import DataError, check_range
from offpolicy.language.preference import PreferenceModule
from offpolicy.losses.groups import srpo_terms
from offpolicy.losses.scores import GroupScores, TokenMean
from offpolicy.training.meter import Metrics


class SRPO(PreferenceModule):
    """Self-improving robust preference optimisation: learns to answer and to revise an answer, from pairs.

    Six texts for each pair, four of them with an answer in the prompt: about six times the tokens of DPO where prompts
    are short. ``offpolicy.generate RUN --revisions 3`` lets the policy revise its answers.

    Args:
        beta: β > 0; at 0.1 the log-ratios of a pair are drawn 10 nats apart.
        alpha: α in [0, 1], weight of the reviser's own terms against the joint one.
        template: the request for a revision, a turn of the user after the answer, or a line of plain text.
        length_average: divide log-ratios by the length of their answer.
        lr: peak learning rate of AdamW.
    """

    view = ScoredGroupView()  # as to the kind of batches; the texts are made of pairs

    def __init__(
        self,
        *,
        beta: float = 0.1,
        alpha: float = 0.25,
        template: str = REQUEST,
        length_average: bool = False,
        lr: float = 1e-6,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("beta", beta, 0.0, lower_open=True)
        check_range("alpha", alpha, 0.0, 1.0)
        self.save_hyperparameters()
        self._tokenizer: Any = None  # of the data

    def bind_data(self, data: Any) -> None:
        super().bind_data(data)
        self._tokenizer = data.tokenizer

    def texts_of(self, replay: Replay) -> BoundTexts:
        """Six texts a pair: w, l, w after l, l after w, w after w, l after l."""
        pairs = PairView().bind(replay)
        if (pairs.index[:, 0] != pairs.index[:, 2]).any():
            raise DataError(
                "pairs have two prompts, and SRPO revises answers to one; expected one prompt for both answers. Pass "
                "such pairs, or choose MAPL."
            )
        revise, made = Revisions(self._tokenizer, self.hparams.template, chat=is_chat(replay)), Numbered(replay)

        def after(prompt: int, answer: int) -> int:
            return made.number(revise.prompt(token_ids(replay, prompt), token_ids(replay, answer)))

        prompt, good, bad = pairs.index[:, 0], pairs.index[:, 1], pairs.index[:, 3]
        after_good, after_bad = (
            np.array([after(x, y) for x, y in zip(prompt.tolist(), side.tolist())]) for side in (good, bad)
        )
        texts = (prompt, good, prompt, bad, after_bad, good, after_good, bad, after_good, good, after_bad, bad)
        return BoundGroups(with_texts(replay, made.texts), np.stack(texts, axis=1), pairs.facts)

    def loss(self, scores: GroupScores) -> tuple[Tensor, Metrics]:
        h, ratio = self.hparams, scores.log_ratio
        ratio = ratio / scores.length if h.length_average else ratio
        joint, over_bad, over_good = srpo_terms(*ratio.unbind(1), beta=h.beta)
        loss = (1.0 - h.alpha) * joint + h.alpha * (over_bad + over_good)
        good, bad, good_after, _, _, bad_again = (h.beta * ratio.detach()).unbind(1)
        metrics: dict[str, Any] = {
            "joint_loss": joint.detach(),
            "revision_loss": (over_bad + over_good).detach(),
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/accuracies": (good > bad).to(good.dtype),
            "rewards/margins": good - bad,
            "revision/accuracies": (good_after > bad_again).to(good.dtype),  # the better answer after the worse one
            "revision/margins": good_after - bad_again,
            "logps/chosen": scores.sum_logps[:, 0].detach(),
            "logps/rejected": scores.sum_logps[:, 1].detach(),
            "lengths/chosen": scores.length[:, 0],
            "lengths/rejected": scores.length[:, 1],
        }
        if scores.stats:
            metrics["entropy"] = TokenMean(scores.stats["entropy"][:, :2].sum(1), scores.length[:, :2].sum(1))
        return loss, metrics
