"""What the losses of language methods are computed from: log-probabilities of answers, and what belongs to them.

Prompts are not scored unless said; the end token of an answer is scored. B is the number of pairs or singles of one
micro-batch. Sums are float32 (float64 when the model is), whatever the precision of the network.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenMean(NamedTuple):
    """A metric that is a mean over tokens: its rows are pooled, Σ total / Σ tokens, so that every token counts alike.

    Attributes:
        total: sum over the tokens of each row, (B,).
        tokens: number of those tokens, (B,).
    """

    total: Tensor
    tokens: Tensor


class Scores(NamedTuple):
    """One answer per row, as the policy and its reference see it.

    Attributes:
        sum_logps: log π(y|x) summed over the tokens of the answer, nats, (B,). Carries the gradient.
        length: number of those tokens, (B,), float.
        ref_logps: the same sum under the reference, (B,); None for methods without one. No gradient.
        prompt_logps: log π(x) summed over the tokens of the prompt that can be scored, (B,); None unless the method
            asks for it with ``scores_prompt``.
        prompt_length: number of those tokens, (B,), float; None likewise.
        stats: sums over the tokens of the answer, (B,) each, no gradient: "logits" (mean logit over the vocabulary),
            "entropy" (nats), "hits" (1 where the token is the most likely one). Empty except on steps that are logged.
        previous_logps: the same sum under the policy that training started from, (B,); None unless the method asks for
            it with ``uses_previous``. No gradient.
        sum_values: a value per token summed over the answer, (B,); None unless the method defines one.
    """

    sum_logps: Tensor
    length: Tensor
    ref_logps: Tensor | None = None
    prompt_logps: Tensor | None = None
    prompt_length: Tensor | None = None
    stats: dict[str, Tensor] = {}  # never changed in place
    previous_logps: Tensor | None = None
    sum_values: Tensor | None = None

    @property
    def mean_logps(self) -> Tensor:
        """log π(y|x) per token of the answer, nats, (B,)."""
        return self.sum_logps / self.length

    @property
    def log_ratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x), nats, (B,). Only for methods with a reference."""
        if self.ref_logps is None:
            raise ValueError("these scores have no `ref_logps`; expected them. Set `uses_reference = True`.")
        return self.sum_logps - self.ref_logps


class PairScores(NamedTuple):
    """A micro-batch of pairs.

    Attributes:
        chosen: scores of the preferred answers.
        rejected: scores of the others.
        facts: columns of the pairs by name, (B, …) each, such as ``weight`` or ``score_chosen``.
        mean_chosen_length: n̄ = Σ w·n / Σ w, the mean number n of scored tokens of the chosen answers over the whole
            optimiser step, weighted by the weights w of its pairs: over all micro-batches and processes. A weighted
            mean over the tokens of the step, Σ −w·log π / Σ w·n, is then the weighted mean over its pairs of
            ``−chosen.sum_logps / mean_chosen_length``, however the step is cut.
        mean_sequence_length: the same mean of answer and scored prompt tokens; None unless ``scores_prompt``.
    """

    chosen: Scores
    rejected: Scores
    facts: dict[str, Tensor] = {}
    mean_chosen_length: Tensor | float = 1.0
    mean_sequence_length: Tensor | float | None = None


class GroupScores(NamedTuple):
    """A micro-batch of rows with up to K answers each; numbers are 0 where a row has fewer.

    Attributes:
        sum_logps: log π(y|x) summed over the tokens of each answer, nats, (B, K). Carries the gradient.
        length: number of those tokens, (B, K), float; 0 where there is no answer.
        ref_logps: the same sums under the reference, (B, K); None for methods without one. No gradient.
        facts: columns of the rows by name, (B, …) each: ``score (B, K)``, …
        stats: as of :class:`Scores`, (B, K) each.
    """

    sum_logps: Tensor
    length: Tensor
    ref_logps: Tensor | None = None
    facts: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}

    @property
    def present(self) -> Tensor:
        """Which answers are there, (B, K) bool."""
        return self.length > 0

    @property
    def log_ratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x), nats, (B, K). Only for methods with a reference."""
        assert self.ref_logps is not None  # `uses_reference`
        return self.sum_logps - self.ref_logps


class SingleScores(NamedTuple):
    """A micro-batch of single answers.

    Attributes:
        answer: scores of the answers.
        facts: columns of the singles by name, (B, …) each: ``label`` bool (desirable or not), ``score``, …
        mean_length: mean number of scored tokens of an answer over the whole optimiser step, weighted likewise.
        mismatched_ratio: mean log-ratio of answers under other prompts than their own over the whole optimiser step,
            weighted likewise, 0-d, no gradient; None unless the method asks for it with ``uses_mismatched``.
    """

    answer: Scores
    facts: dict[str, Tensor] = {}
    mean_length: Tensor | float = 1.0
    mismatched_ratio: Tensor | None = None
