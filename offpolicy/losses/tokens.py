"""What a policy-gradient objective sees: the tokens of a micro-batch of rollouts, and facts about the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpolicy.errors import UsageError

LARGEST_LOG_RATIO = 20.0


class Tokens(NamedTuple):
    """One micro-batch of B answers, right-padded to T tokens, on the device; float32 (float64 in tests).

    Log-probabilities are in nats, all at the temperature of sampling. What stands outside of the mask has no influence.

    Attributes:
        logp: (B, T) under the policy being trained, with gradient.
        mask: (B, T), 1 on tokens that the policy emitted up to and with the first EOS, and on tokens of demonstrations;
            else 0. A row of zeros is padding.
        advantage: (B,) or (B, T), without gradient.
        behavior_logp: (B, T) under the policy that sampled the token, by the trainer's forward pass at that time; on
            external tokens the demonstrator's, where a component asks for it.
        previous_logp: (B, T) under the policy at the start of the iteration, π_k.
        base_logp: (B, T) under the base of the divergence.
        sampler_logp: (B, T) as the engine reported it, where that differs from the trainer's forward pass.
        external: (B, T) bool, tokens of demonstrations; None for none.
        entropy: (B, T) of the policy at each place, with gradient where ``Objective.entropy_gradient``.
        lag: (B,) int64, iterations since the rollout was made; None for 0.
        value: (B, T) of the critic, with gradient.
        old_value: (B, T) of the critic at the start of the iteration.
        returns: (B, T), what the critic should say.
        base_kl: (B, T), KL(π_θ ‖ base) over the whole vocabulary at each place, with gradient.
        previous_kl: (B, T), the same to π_k.
        top_logp: (B, T), log-probability of the likeliest token at each place, without gradient.
        mean_log_ratio: (B, T), mean over the vocabulary of log π_θ − log π_k at each place, without gradient.
        nucleus_entropy: (B, T) of the policy on the likeliest tokens that reach a share of its mass, renormalised, with
            gradient; the component says the share in an attribute ``nucleus``.
        shift: (B, T), change of ℓ to first order by the move of the output layer that the optimiser would make with all
            tokens of this step, without gradient; NaN while that move is not known.
        shift_variance: (B, T), the same of twice KL(before ‖ after) at each place, to second order; likewise.
        uniform: (B, T), numbers in [0, 1) that are a function of the seed, the step, the answer and the place.
        columns: further columns of the store, by name, (B,) or (B, T), that a component lists in ``columns``: ``turn``,
            ``segment`` and ``stage`` (int64, −1 outside), ``group``, ``prompt``, ``reward``, ``length``, ``ended``.
        whole_mask: (B, T), 1 on all tokens of answers that are finished, where the mask has those of the newest window
            alone: what a critic learns from; None for the mask.
        step: what the component's ``step_facts`` said of the whole step: name → (B, T), (B,) or 0-d.
    """

    logp: Tensor
    mask: Tensor
    advantage: Tensor
    behavior_logp: Tensor
    previous_logp: Tensor
    base_logp: Tensor | None = None
    sampler_logp: Tensor | None = None
    external: Tensor | None = None
    entropy: Tensor | None = None
    lag: Tensor | None = None
    value: Tensor | None = None
    old_value: Tensor | None = None
    returns: Tensor | None = None
    base_kl: Tensor | None = None
    previous_kl: Tensor | None = None
    top_logp: Tensor | None = None
    mean_log_ratio: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    shift: Tensor | None = None
    shift_variance: Tensor | None = None
    uniform: Tensor | None = None
    columns: Mapping[str, Tensor] | None = None
    whole_mask: Tensor | None = None
    step: Mapping[str, Tensor] | None = None

    @property
    def outside(self) -> Tensor:
        """(B, T) bool: tokens of demonstrations."""
        return torch.zeros_like(self.mask, dtype=torch.bool) if self.external is None else self.external & self.kept

    @property
    def own(self) -> Tensor:
        """(B, T) bool: tokens that a policy of this run emitted."""
        return self.kept if self.external is None else self.kept & ~self.external

    @property
    def judged(self) -> Tensor:
        """(B, T) bool: tokens that a policy of this run emitted, of answers that are finished."""
        return self.own if self.whole_mask is None else self.whole_mask > 0

    @property
    def kept(self) -> Tensor:
        """(B, T) bool: the mask."""
        return self.mask > 0


class Totals(NamedTuple):
    """Facts about one optimiser step, over all of its micro-batches and processes.

    Attributes:
        rows: answers, without padding.
        tokens: sum of the masks.
        max_length: the longest answer that may be generated, as configured.
        padded_length: tokens of the longest answer of the step.
        whole_tokens: sum of the whole masks, where there are some.
    """

    rows: int
    tokens: int
    max_length: int
    padded_length: int
    whole_tokens: int = 0


class Ratio(NamedTuple):
    """What the slot ``ratio`` gives.

    Attributes:
        value: ρ (B, T), with gradient.
        center: (B, T), ρ at the start of the iteration, around which ``centred`` clips; None for 1.
        factor: (B, T), multiplies the clipped term, without gradient; None for 1.
    """

    value: Tensor
    center: Tensor | None = None
    factor: Tensor | None = None


class Surrogate(NamedTuple):
    """What the slot ``trust`` gives.

    Attributes:
        value: (B, T), to be maximised.
        clipped: (B, T) bool, where it has no gradient.
    """

    value: Tensor
    clipped: Tensor


def detached(tokens: Tokens) -> Tokens:
    """The same tokens without gradients."""
    values: list[Any] = [value.detach() if isinstance(value, Tensor) else value for value in tokens]
    return Tokens(*values)


def of_critic(tokens: Tokens, totals: Totals) -> tuple[Tokens, Totals]:
    """Tokens and totals as the part of the loss sees them that trains a critic."""
    if tokens.whole_mask is None:
        return tokens, totals
    return tokens._replace(mask=tokens.whole_mask), totals._replace(tokens=totals.whole_tokens)


def difference(first: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """first − second on the kept tokens, clamped; 0 elsewhere, whatever stands there."""
    return torch.where(kept, first - second, 0.0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def field(tokens: Tokens, name: str) -> Tensor:
    """An optional field of the tokens that a component reads.

    Raises:
        UsageError: it was not given.
    """
    found = getattr(tokens, name)
    if found is None:
        raise UsageError(f"the objective reads `{name}`, which this batch does not have; expected (B, T) numbers.")
    return found


def column(tokens: Tokens, name: str) -> Tensor:
    """A column of the store that a component lists in ``columns``.

    Raises:
        UsageError: it was not given.
    """
    found = (tokens.columns or {}).get(name)
    if found is None:
        raise UsageError(f"the objective reads the column `{name}`, which this batch does not have.")
    return found


def per_token(advantage: Tensor) -> Tensor:
    """(B, 1) of (B,); (B, T) as it is."""
    return advantage[:, None] if advantage.ndim == 1 else advantage
