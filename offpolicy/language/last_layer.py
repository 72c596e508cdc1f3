"""What the last layer of a language model says of answers beside their log-probabilities, without gradient.

Logits are z = W·h of a state h, with cap and scale as of :func:`offpolicy.language.logprobs.token_logps`, divided by
the temperature; p is their softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from offpolicy.language.logprobs import plain_logits


@torch.no_grad()
def gradient_norms(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    length: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """‖∂ log p(answer)/∂W‖ = ‖Σ_t (e_y − p_t)·h_tᵀ‖ of each answer, its states taken as given; a token of a capped
    logit has the cap's slope in front of h.

    The vocabulary is passed over twice, part by part: once for the normaliser, once for the products.

    Args:
        hidden: states that predict the tokens, answer by answer, (n, D).
        weight: W, (V, D).
        target: the tokens, (n,) int64.
        length: tokens of each answer, (A,) int64, Σ = n.
        bias: as of ``token_logps``, likewise ``softcap``, ``scale`` and ``temperature``.
        chunk: at most about ``chunk * V`` numbers exist at a time, ≥ 1.

    Returns:
        (A,) float32 (float64 for float64 input); 0 for an answer without tokens.
    """
    answers, width = len(length), max(1, int(length.max()) if len(length) else 1)
    owner = torch.repeat_interleave(length, output_size=len(hidden))
    first = torch.cumsum(length, 0) - length
    place = owner * width + torch.arange(len(hidden), device=hidden.device) - first[owner]
    tables = answers * max(width, hidden.shape[1])  # the largest of a part, for each entry of the vocabulary
    parts = list(_parts(len(weight), max(1, chunk * len(weight) // max(1, tables))))

    def logits(part: slice) -> Tensor:
        biased = None if bias is None else bias[part]
        return plain_logits(hidden, weight[part], biased, softcap=softcap, scale=scale) / temperature

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(answers * width, x.shape[1]).index_copy(0, place, x).view(answers, width, -1)

    normaliser = torch.stack([logits(part).logsumexp(-1) for part in parts]).logsumexp(0)
    with torch.autocast(hidden.device.type, enabled=False):
        states, squares = padded(hidden.to(normaliser.dtype)), normaliser.new_zeros(answers)
        for part in parts:
            z = logits(part)
            index = target - part.start
            inside = (index >= 0) & (index < z.shape[1])
            off = -(z - normaliser[:, None]).exp()
            off.scatter_add_(1, index.clamp(0, z.shape[1] - 1)[:, None], inside.to(off.dtype)[:, None])
            off *= _slope(z, softcap, scale, temperature)
            squares += (padded(off).mT @ states).square().sum((1, 2))
    return squares.sqrt()


def _parts(vocabulary: int, width: int) -> Iterator[slice]:
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary))


def _slope(z: Tensor, softcap: float | None, scale: float, temperature: float) -> Any:
    """How logits z, divided by the temperature, move with W·h."""
    if softcap is None:
        return scale / temperature
    return (1 - (z * (temperature / softcap)).square()) * (scale / temperature)


@torch.no_grad()
def policy_shift(
    hidden: Tensor,
    weight: Tensor,
    move: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """What a move ΔW of the last layer does to log-probabilities, to first and to second order: with u = ∂z/∂W·ΔW the
    numbers u_y − ū, the slope of log p(y), and Σ_v p(v)(u_v − ū)², ū = Σ_v p(v)·u_v, the curvature of −log p(y) where
    no logit is capped.

    Args:
        hidden: states that predict the tokens, (n, D); n may be 0.
        weight: W, (V, D).
        move: ΔW, (V, D).
        target: the tokens y, (n,) int64.
        bias: as of ``token_logps``, likewise ``softcap``, ``scale`` and ``temperature``.
        chunk: at most about ``chunk * V`` numbers exist at a time, ≥ 1.

    Returns:
        Both (n,) float32 (float64 for float64 input).
    """
    size, parts = max(1, chunk // 4), []  # about four tables of this many places exist at once
    for h, y in zip(hidden.split(size), target.split(size), strict=True):
        z = plain_logits(h, weight, bias, softcap=softcap, scale=scale) / temperature
        u = plain_logits(h, move, None) * _slope(z, softcap, scale, temperature)
        p = z.softmax(-1)
        mean = (p * u).sum(-1, keepdim=True)
        parts.append((u.gather(1, y[:, None])[:, 0] - mean[:, 0], (p * (u - mean).square()).sum(-1)))
    shift, variance = (torch.cat(found) for found in zip(*parts, strict=True))
    return shift, variance
