"""DPA — Wang, Lin, Xiong et al. 2024, Directional Preference Alignment (arXiv:2402.18571).

Answers have a score r in each of k objectives, such as helpfulness and verbosity. A direction v is drawn for a prompt,
a unit vector at most ``max_angle`` from the first objective; the prompt is told round(100·v); of the answers the one
with the largest vᵀr is learned from by maximum likelihood. Afterwards any direction can be asked for.

The paper draws many answers (80 is what is recalled of it) under every prompt and direction from the policy itself,
and repeats that from the new policy. Here the answers are given: scored lists with several columns. A round is
``offpolicy.generate`` with a function that scores, then this method. The wording of the message is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from lightning_modules.sft import SFT
from offpolicy.data.replay import Replay
from offpolicy.data.sampling import keys, normals, uniforms
from offpolicy.data.texts.conditioning import Numbered, SystemMessages, is_chat, with_texts
from offpolicy.data.texts.sequences import BoundGroups, BoundTexts, ScoredGroupView, Singles, token_ids
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.losses.directions import cone, percent, winner


class DPA(SFT):
    """Directional preference alignment, offline: cloning of the best answer for a direction that the prompt states.

    Data are lists of answers whose scores are lists of k ≥ 2 numbers, read with ``--data.pair_strategy none``. Bring
    the objectives to one scale, as the paper's 0 to 100.

    Args:
        max_angle: largest angle between a direction and the first objective, in degrees, in [0, 180].
        directions: for each prompt, ≥ 1.
        objectives: their names in the message, in the order of the scores.
        message: what the prompt is told; ``{weights}`` becomes "helpfulness 92, verbosity -38".
        lr: peak learning rate of AdamW.
    """

    view = ScoredGroupView(objectives=True)

    def __init__(
        self,
        *,
        max_angle: float = 45.0,
        directions: int = 5,
        objectives: Sequence[str] = ("helpfulness", "verbosity"),
        message: str = "The answer is judged by {weights}.",
        lr: float = 2e-5,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, **language)
        check_range("max_angle", max_angle, 0.0, 180.0)
        check_range("directions", directions, 1)
        if len(objectives) < 2:
            raise UsageError(f"`objectives` has {len(objectives)} names; expected two or more, one for each score.")
        if "{weights}" not in message:
            raise UsageError(f"`message` is {message!r}; expected a place for the weights, '{{weights}}'.")
        self.save_hyperparameters()
        self._tokenizer: Any = None  # of the data

    def bind_data(self, data: Any) -> None:
        super().bind_data(data)
        self._tokenizer = data.tokenizer

    def texts_of(self, replay: Replay) -> BoundTexts:
        """A row for each prompt and direction: the prompt that states it, and the answer that is best by it."""
        groups, h = self.view.bind(replay), self.hparams
        scores = torch.from_numpy(groups.facts["score"]).double()
        if scores.shape[2] != len(h.objectives):
            raise DataError(
                f"answers have scores in {scores.shape[2]} objectives and `objectives` has {len(h.objectives)} names; "
                "expected one for each. Pass --model.objectives with the names in the order of the scores."
            )
        asked, answers = groups.index[:, 0], groups.index[:, 1::2]
        v = self.drawn(groups)
        best = winner(scores, v, torch.from_numpy(answers >= 0)).numpy()  # (P, D)
        made, put = Numbered(replay), SystemMessages(self._tokenizer, chat=is_chat(replay))
        index = np.empty((*best.shape, 2), dtype=np.int64)
        for row, weights in enumerate(percent(v).tolist()):
            prompt = token_ids(replay, asked[row])
            for place, one in enumerate(weights):
                index[row, place, 0] = made.number(put.put(prompt, self.message_of(one)))
                index[row, place, 1] = answers[row, best[row, place]]
        facts = {"direction": v.reshape(-1, v.shape[2]).numpy()}
        return BoundTexts(with_texts(replay, made.texts), index.reshape(-1, 2), facts, Singles)

    def drawn(self, groups: BoundGroups) -> torch.Tensor:
        """The directions of every prompt, (P, D, k) float64: by the hash of its tokens, so the same in every run."""
        h, others = self.hparams, groups.facts["score"].shape[2] - 1
        digests = [blake2b(token_ids(groups.replay, i).tobytes(), digest_size=5) for i in groups.index[:, 0]]
        rows = torch.tensor([int.from_bytes(one.digest(), "big") for one in digests], device="cpu")
        begin = torch.zeros(1, dtype=torch.int64, device="cpu")
        angles, sides = (keys(0, name, begin)[0] for name in ("directions: angles", "directions: sides"))
        angle = uniforms(angles, rows, (h.directions,)) * math.radians(h.max_angle)
        return cone(angle, normals(sides, rows, (h.directions, others)).double())

    def message_of(self, weights: Sequence[int]) -> str:
        """What a prompt is told of a direction, by its whole numbers."""
        told = ", ".join(f"{name} {weight}" for name, weight in zip(self.hparams.objectives, weights))
        return str(self.hparams.message).replace("{weights}", told)
