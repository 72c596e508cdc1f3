"""Answers that begin with a demonstration of the data: the whole, or a beginning from which the policy goes on.

The second is ReMix's and RL-PLUS's partial demonstration (``demonstration_share`` below 1): the given tokens are
external, as those of a whole demonstration are, and the rest is the policy's own.
"""

from __future__ import annotations

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.data.texts.problems import step_column
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError
from offpolicy.language.rl.engine import Completion
from offpolicy.language.rl.records import cut_answer


class Demonstrations:
    """What is given of the demonstrations of problems.

    Args:
        problems: with their demonstrations.
        wanted: whether groups have one.
        share: of a demonstration that is given, in (0, 1].
        length: longest answer in tokens.

    Raises:
        DataError: a part of each should be given, and of none it can be.
    """

    def __init__(self, problems: Replay, *, wanted: bool, share: float, length: int) -> None:
        self.problems, self.share, self.length = problems, share, length
        self.rows = problems.tables["problems"][:, 1]
        whole = np.where(self.rows >= 0, problems.length[self.rows], 0) if wanted else np.zeros(len(self.rows), int)
        self.given = np.minimum(whole, length) if share == 1 else self._beginnings(whole)
        self.short = int(((whole > 0) & (self.given == 0)).sum())
        if share < 1 and not self.given.any():
            raise DataError(
                f"`demonstration_share` is {share}, the longest demonstration of "
                f"{problems.meta.get('name', 'the data')} has {whole.max()} token(s) and answers have {length} at "
                "most, which leaves none to be drawn after a beginning; expected ≥ 2 of both. Pass a larger "
                "--model.max_new_tokens, or leave `--model.demonstration_share` out."
            )

    def _beginnings(self, whole: np.ndarray) -> np.ndarray:
        """The share of each, rounded down: at least one token, and never the last one of an answer."""
        begun = np.maximum(1, np.floor(self.share * whole + 1e-9).astype(np.int64))  # 0.29 · 100 is 28.99…
        return np.clip(begun, 0, np.maximum(np.minimum(whole, self.length) - 1, 0))

    @property
    def continued(self) -> bool:
        """Whether the policy goes on from them."""
        return self.share < 1

    def longest_request(self) -> int:
        """Tokens of the longest prompt with what is given behind it."""
        prompts = self.problems.length[self.problems.tables["problems"][:, 0]]
        return int((prompts + (self.given if self.continued else 0)).max())

    def request(self, problem: int) -> tuple[np.ndarray, int]:
        """The prompt of a problem with what is given behind it, and the tokens that an answer has left."""
        given, prompt = int(self.given[problem]), self.problems.tables["problems"][problem, 0]
        text = token_ids(self.problems, prompt), token_ids(self.problems, self.rows[problem])[:given]
        return np.concatenate(text), self.length - given

    def answer(self, problem: int, rest: Completion | None = None) -> Completion:
        """What is given of a problem's demonstration, with what the policy went on with, if it did.

        Args:
            problem: which.
            rest: the policy's; what is longer than an answer may be is cut.
        """
        row, given = int(self.rows[problem]), int(self.given[problem])
        token, logp = token_ids(self.problems, row)[:given], step_column(self.problems, row, "logp")[:given]
        if rest is None:
            return Completion(token, logp, bool(given == self.problems.length[row]))
        rest = cut_answer(rest, self.length - given)
        said = None if rest.sampler_logp is None else np.concatenate([logp, rest.sampler_logp])
        whole, logps = np.concatenate([token, rest.token]), np.concatenate([logp, rest.logp])
        return rest._replace(token=whole, logp=logps, sampler_logp=said)

    def facts(self) -> list[tuple[str, str]]:
        """The line of the first screen on demonstrations from which the policy goes on."""
        if not self.continued:
            return []
        text = f"the policy goes on from the first {100 * self.share:g} % of a demonstration"
        if self.short:
            text += f"; {self.short:,} are too short for that, and their problems get answers of the policy alone"
        return [("share", text)]
