"""The entropy of a language model on its likeliest tokens, without the probabilities of all places in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def nucleus_entropy(
    hidden: Tensor,
    weight: Tensor,
    share: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """−Σ q·log q over the likeliest tokens whose mass reaches a share, with q their probabilities divided by that mass.

    Differentiable in ``hidden``, ``weight`` and ``bias``; which tokens are meant has no gradient. The logits of some
    places at a time are made in the forward and made again in the backward pass.

    Args:
        hidden: states that predict the places, (n, D); n may be 0.
        weight: the head, (V, D).
        share: in (0, 1]; 1 is the entropy itself. The fewest tokens that reach it, one at least.
        bias: as of :func:`offpolicy.language.logprobs.token_logps`, likewise ``softcap``, ``scale`` and
            ``temperature``.
        chunk: at most about ``chunk * V`` numbers exist at a time, ≥ 1.

    Returns:
        Nats, (n,) float32 (float64 for float64 input).
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def entropy(h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            z = (h.to(weight.dtype) @ weight.T).to(dtype)
            z = z * scale if bias is None else (z + bias) * scale
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            logp = (z / temperature).log_softmax(-1).sort(-1, descending=True).values
            before = logp.detach().exp().cumsum(-1).roll(1, -1)
            inside = torch.where(torch.arange(logp.shape[-1], device=h.device) == 0, True, before < share)
            p = torch.where(inside, logp.exp(), 0.0)
            mass = p.sum(-1)
            return mass.log() - (p * torch.where(inside, logp, 0.0)).sum(-1) / mass

    size = max(1, chunk // 6)  # about six tables of this many places exist at once
    return torch.cat(
        [checkpoint(entropy, h, use_reentrant=False, preserve_rng_state=False) for h in hidden.split(size)]
    )
