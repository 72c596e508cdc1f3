"""Supervised tokens as one-token draws of the policy (one-token roll-out, arXiv:2509.26313)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from offpolicy.data.sampling import bits, unit
from offpolicy.language.layout import Layout


def token_keys(layout: Layout, rows: Tensor, key: Tensor) -> Tensor:
    """A number to draw by for every scored token, int64 (n,): a hash of a key, its row and its place in the answer.

    Args:
        layout: rows of one answer each.
        rows: numbers of these rows in their table, (B,) int64 on the layout's device.
        key: of seed and update, 0-d int64.
    """
    begin = torch.cumsum(layout.length, 0) - layout.length
    place = torch.arange(len(layout.answer), device=key.device) - begin[layout.answer]
    return bits(key, rows[layout.answer]) + place


def drawn_value(
    head: Any,
    hidden: Tensor,
    target: Tensor,
    keys: Tensor,
    *,
    draws: int,
    miss: float,
    temperature: float,
    chunk: int = 256,
) -> Tensor:
    """(1/K)·Σ_k r_k·log p(a_k) at each place: K tokens a_k drawn there, r_k = 1 where it is the target, else ``miss``.

    Differentiable in the states and the head. The draws are a function of the keys.

    Args:
        head: weight (V, D), bias, soft-cap and scale, as of :class:`offpolicy.language.head.Head`.
        hidden: states that predict the targets, (n, D).
        target: token ids, (n,).
        keys: of :func:`token_keys`, (n,).
        draws: K ≥ 1.
        miss: reward of a token that is not the target.
        temperature: > 0, of the draws; log p is that of the policy as it is.
        chunk: at most about ``chunk · V`` logits exist at a time.

    Returns:
        Nats, (n,) float32 (float64 for float64 input).
    """

    def value(h: Tensor, label: Tensor, key: Tensor) -> Tensor:
        z = head.logits(h)
        with torch.no_grad():
            summed = (z.double() / temperature).softmax(-1).cumsum(-1)
            uniform = unit(bits(key, torch.arange(draws, device=key.device)))
            drawn = torch.searchsorted(summed, uniform * summed[:, -1:], right=True).clamp(max=z.shape[1] - 1)
            hit = (drawn == label[:, None]).to(z.dtype)
            reward = hit + miss * (1.0 - hit)
        return (reward * z.log_softmax(-1).gather(1, drawn)).mean(1)

    parts = [x.split(max(1, chunk // 4)) for x in (hidden, target, keys)]
    return torch.cat(
        [checkpoint(value, *some, use_reentrant=False, preserve_rng_state=False) for some in zip(*parts, strict=True)]
    )
