"""What an advantage sees: the answers of an iteration, whole groups of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

OF_POLICY = frozenset({"mean_logp", "mean_entropy", "log_weight", "head_norm"})  # what a pass over them tells


class Answers(NamedTuple):
    """B answers, a row each; whole groups.

    Attributes:
        reward: (B,).
        group: (B,) int64, answers with equal numbers belong together.
        own: (B,) bool, false for demonstrations.
        length: (B,) int64, tokens.
        ended: (B,) bool, false where the answer was cut at the longest length.
        prompt: (B,) int64, number of the problem in the data.
        parts: name of a reward → (B,), before weights; demonstrations included.
        iteration: from 1.
        mean_logp: (B,), mean over the tokens of their log-probability under the policy that drew them, nats; None
            unless the component lists it in ``reads``.
        mean_entropy: (B,), mean over the tokens of the entropy of that policy, nats; None likewise.
        log_weight: (B,), Σ over the own tokens of ℓ_k − ℓ_b, π_k the policy at the start of the iteration and π_b the
            one that drew the answer, nats, not bounded; None likewise.
        head_norm: (B,), ‖Σ over the tokens of the gradient of their log-probability under π_k by the output layer‖, the
            states before that layer taken as given; None likewise.
    """

    reward: Tensor
    group: Tensor
    own: Tensor
    length: Tensor
    ended: Tensor
    prompt: Tensor
    parts: Mapping[str, Tensor]
    iteration: int
    mean_logp: Tensor | None = None
    mean_entropy: Tensor | None = None
    log_weight: Tensor | None = None
    head_norm: Tensor | None = None


class Judged(NamedTuple):
    """What an advantage gives that leaves answers out.

    Attributes:
        advantage: (B,).
        kept: (B,) bool; an answer that is not kept counts in no mean of the step.
        weight: (B,), of the answers in other parts of the objective, which read it as the column ``weight``; for
            advantages whose attribute ``gives`` lists it.
    """

    advantage: Tensor
    kept: Tensor
    weight: Tensor | None = None
