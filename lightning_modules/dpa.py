"""DPA — Wang, Lin, Xiong et al. 2024, Directional Preference Alignment (arXiv:2402.18571).

Answers have a score r in each of k objectives, such as helpfulness and verbosity. A direction v is drawn for a prompt,
a unit vector at most ``max_angle`` from the first objective; the prompt is told round(100·v); of the answers the one
with the largest vᵀr is learned from by maximum likelihood. Afterwards any direction can be asked for.

The paper draws many answers (80 is what is recalled of it) under every prompt and direction from the policy itself,
at temperature 0.7, and repeats that from the new policy: ``rounds``, with a reward for each objective. Without rounds
the answers are given: scored lists with several columns. The wording of the message is ours.
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
from offpolicy.data.texts.problems import Problems
from offpolicy.data.texts.sequences import BoundTexts, ScoredGroupView, Singles, SingleView, token_ids
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.language.generation import prompt_text
from offpolicy.language.rl.pairing import groups_in_order, rows_of_round, texts_of_answers
from offpolicy.language.rl.rounds import RoundModule
from offpolicy.losses.directions import cone, percent, winner


class DPA(RoundModule, SFT):
    """Directional preference alignment: cloning of the best answer for a direction that the prompt states.

    Data are lists of answers whose scores are lists of k ≥ 2 numbers, read with ``--data.pair_strategy none``. In
    rounds they are problems, ``rewards`` has one for each objective, times its weight, and a prompt with a direction
    counts as one of ``prompts``; its directions are drawn anew in every round. Held-out problems keep those of the
    first. Bring the objectives to one scale, as the paper's 0 to 100.

    Args:
        max_angle: largest angle between a direction and the first objective, in degrees, in [0, 180].
        directions: for each prompt, ≥ 1.
        objectives: their names in the message, in the order of the scores.
        message: what the prompt is told; ``{weights}`` becomes "helpfulness 92, verbosity -38".
        lr: peak learning rate of AdamW.
    """

    view = ScoredGroupView(objectives=True)
    makes = "winners"

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
        if self.in_rounds:  # such rows already
            return SingleView().bind(replay)
        groups, h = self.view.bind(replay), self.hparams
        scores = torch.from_numpy(groups.facts["score"]).double()
        if scores.shape[2] != len(h.objectives):
            raise DataError(
                f"answers have scores in {scores.shape[2]} objectives and `objectives` has {len(h.objectives)} names; "
                "expected one for each. Pass --model.objectives with the names in the order of the scores."
            )
        asked, answers = groups.index[:, 0], groups.index[:, 1::2]
        v = self.drawn(replay, asked)
        best = winner(scores, v, torch.from_numpy(answers >= 0)).numpy()  # (P, D)
        told, prompts = self._told(replay, asked, v)
        index = np.stack([prompts, np.take_along_axis(answers, best, 1)], axis=2)
        facts = {"direction": v.reshape(-1, v.shape[2]).numpy()}
        if "weight" in groups.facts:
            facts["weight"] = np.repeat(groups.facts["weight"], v.shape[1])
        found = BoundTexts(told, index.reshape(-1, 2), facts, Singles)
        found.notes = groups.notes
        return found

    def problems_of(self, problems: Replay) -> Replay:
        """A problem for each prompt and direction: the words and the column ``direction`` of each round.

        The texts of a round stand behind those of the rounds before it, so that further rounds change none.
        """
        asked, rounds, count = problems.tables["problems"][:, 0], self.hparams.rounds, self.hparams.directions
        v = torch.stack([self.drawn(problems, asked, self.seed or 0, k) for k in range(1, rounds + 1)])  # (R, P, D, k)
        told, prompts = self._told(problems, np.tile(asked, rounds), v.flatten(0, 1))
        tables = {name: np.repeat(column, count, axis=0) for name, column in problems.tables.items()}
        tables["problems/asked"] = prompts.reshape(rounds, -1).T  # (P·D, R)
        tables["problems/direction"] = v.flatten(1, 2).transpose(0, 1).numpy()  # (P·D, R, k)
        tables["problems"][:, 0] = tables["problems/asked"][:, 0]
        found = type(problems)(told.steps, start=told.start, length=told.length, tables=tables, meta=problems.meta)
        if isinstance(problems, Problems) and isinstance(found, Problems):
            found.reopen = problems.reopen
        return found

    def take_data(self, data: Any) -> None:
        super().take_data(data)
        if self.in_rounds and len(self.answering.rewards.names) != len(self.hparams.objectives):
            raise UsageError(
                f"`rewards` has {len(self.answering.rewards.names)} and `objectives` {len(self.hparams.objectives)}; "
                "expected a reward for each objective, in their order. Pass --model.rewards."
            )

    def texts_of_round(self, store: Replay, iteration: int) -> tuple[Replay | None, list[dict[str, Any]]]:
        rewards, rows = self.answering.rewards, groups_in_order(store)
        parts = [store.episodes[f"reward/{name}"] * weight for name, weight in zip(rewards.names, rewards.weights)]
        scores = np.stack(parts, axis=1).astype(np.float64)  # (E, k)
        v = self.problems.tables["problems/direction"][store.episodes["prompt"][rows[:, 0]], iteration - 1]
        best = winner(*map(torch.from_numpy, (scores[rows], v[:, None])))[:, 0].numpy()
        texts, index = texts_of_answers(self.problems, store)
        texts.tables = {"singles": index[rows[np.arange(len(rows)), best]]}
        written = rows_of_round(self.problems, store, self.tokenizer, self.answering.stops, scores)
        return texts, [row | {"direction": one} for row, one in zip(written, v.tolist())]

    def _told(self, replay: Replay, asked: np.ndarray, v: torch.Tensor) -> tuple[Replay, np.ndarray]:
        """The texts with every prompt that states a direction behind them, and their numbers, (P, D)."""
        made, put = Numbered(replay), SystemMessages(self._tokenizer, chat=is_chat(replay))
        prompts = [token_ids(replay, number) for number in asked]
        self._check_untold(prompts[0])
        numbers = [
            [made.number(put.put(prompt, self.message_of(one))) for one in weights]
            for prompt, weights in zip(prompts, percent(v).tolist())
        ]
        return with_texts(replay, made.texts), np.array(numbers)

    def _check_untold(self, prompt: np.ndarray) -> None:
        """Raise :class:`DataError` where a prompt states a direction already, as in the files of a round."""
        says = "".join(str(self.hparams.message).partition("{weights}")[0].split())
        if says and says in "".join(prompt_text(self._tokenizer, prompt).split()):
            raise DataError(
                f"a prompt has '{self.hparams.message}' in it already, as the files of DPA's rounds have, and would "
                "get a second direction; expected prompts without one. Pass the prompts that the rounds began with."
            )

    def drawn(self, replay: Replay, prompts: np.ndarray, seed: int = 0, iteration: int = 0) -> torch.Tensor:
        """The directions of every prompt, (P, D, k) float64, by the hash of its tokens.

        They are the same in every run where answers are given; else they are those of a seed and of a round.
        """
        h, others = self.hparams, len(self.hparams.objectives) - 1
        digests = [blake2b(token_ids(replay, i).tobytes(), digest_size=5) for i in prompts]
        rows = torch.tensor([int.from_bytes(one.digest(), "big") for one in digests], device="cpu")
        at = torch.tensor([iteration], device="cpu")
        angles, sides = (keys(seed, name, at)[0] for name in ("directions: angles", "directions: sides"))
        angle = uniforms(angles, rows, (h.directions,)) * math.radians(h.max_angle)
        return cone(angle, normals(sides, rows, (h.directions, others)).double())

    def message_of(self, weights: Sequence[int]) -> str:
        """What a prompt is told of a direction, by its whole numbers."""
        told = ", ".join(f"{name} {weight}" for name, weight in zip(self.hparams.objectives, weights))
        return str(self.hparams.message).replace("{weights}", told)
