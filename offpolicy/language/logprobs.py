"""Log-probabilities of chosen tokens under a language model, without the logits of all positions in memory.

With hidden state h and head W, z = scale · (W h + b), soft-capped to c · tanh(z / c) where the model does so, divided
by the temperature, and log p(t) = z_t − logsumexp(z). Logits exist only as tiles of some tokens by some part of the
vocabulary: the forward pass keeps one number per token (the logsumexp) and a bounded number of tiles, the backward pass
makes the others again (the idea of Cut Cross-Entropy, arXiv:2411.09009, in plain tensor operations). The vocabulary is
the outer loop, so each part of the weight's gradient is finished while it lies in the cache and is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# logits of one tile on a CPU: 4 MB in float32, which the processor's cache still holds
CPU_TILE = 2**20
# tokens of one tile; more only make the tile narrower
TILE_TOKENS = 1024


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 256,
    stats: bool = False,
    entropy: bool = False,
) -> Any:
    """Log-probability of each target token.

    Differentiable in `hidden`, `weight` and `bias`. Under bfloat16 or float16 the products run in that type and
    everything after them in float32, float64 stays float64. Under autocast the products run in autocast's type.

    Args:
        hidden: the states that predict the targets, (n, D); n may be 0.
        weight: the head, (V, D).
        target: token ids in [0, V), (n,) int64.
        bias: added to the logits, (V,).
        softcap: c of the final soft-cap, > 0; None for none.
        scale: factor on the logits before the cap.
        temperature: τ > 0 by which the logits are divided after the cap, as where tokens are sampled at τ.
        chunk: at most about ``chunk * V`` logits exist at a time, ≥ 1. As many are kept for the backward pass, which
            saves making them again; with a chunk of n or more, none is made twice.
        stats: also return facts per token, without gradient.
        entropy: also return the entropy, with gradient; `stats` alone gives it without.

    Returns:
        log p(target), nats, (n,) float32 (float64 for float64 input). With `stats` or `entropy` a pair: log p(target)
        and a dict of (n,) tensors: ``entropy`` (nats) and, with `stats`, ``logits`` (mean logit over the vocabulary),
        ``hits`` (1 where the target is the most probable token), ``top_logp`` (log-probability of that token) and
        ``mean_logp`` (mean log-probability over the vocabulary).
    """
    device = hidden.device.type
    hidden = hidden.to(_product_type(hidden, weight))
    if softcap is None:
        scale, temperature = scale / temperature, 1.0
    if scale != 1.0:
        hidden = hidden * scale
        bias = None if bias is None else bias * scale
    with torch.autocast(device, enabled=False):
        cap = None if softcap is None else (softcap, temperature)
        logps, *facts = _TokenLogps.apply(hidden, weight, bias, target, cap, chunk, stats, entropy)
    return (logps, dict(zip(("entropy", "logits", "hits", "top_logp", "mean_logp"), facts))) if facts else logps


def token_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """KL(p ‖ q) = Σ_v p(v)·(log p(v) − log q(v)) at each place, exact, over the whole vocabulary.

    Differentiable in what p is made of. The logits of some places at a time are made in the forward and made again in
    the backward pass; nothing of the size of the vocabulary is kept between the two.

    Args:
        hidden: states of p, (n, D); n may be 0.
        weight: the head of p, (V, D).
        other_hidden: states of q at the same places, (n, D), without gradient.
        other_weight: the head of q, (V, D).
        bias: of p, (V,).
        other_bias: of q, (V,), without gradient.
        softcap: as in `token_logps`, of both heads.
        scale: as in `token_logps`, of both heads.
        temperature: as in `token_logps`, of both heads.
        chunk: at most about ``chunk * V`` logits of each exist at a time, ≥ 1.

    Returns:
        Nats, ≥ 0, (n,) float32 (float64 for float64 input).
    """
    how: dict[str, Any] = {"softcap": softcap, "scale": scale}

    def divergence(h: Tensor, other: Tensor) -> Tensor:
        logp = (plain_logits(h, weight, bias, **how) / temperature).log_softmax(-1)
        with torch.no_grad():
            logq = (plain_logits(other, other_weight, other_bias, **how) / temperature).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    size = max(1, chunk // 4)  # about four tables of this many places exist at once
    parts = zip(hidden.split(size), other_hidden.split(size), strict=True)
    return torch.cat([checkpoint(divergence, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def plain_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """All logits of n places at once, (n, V), for few places; arguments as of `token_logps`."""
    dtype = _product_type(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        z = (hidden.to(dtype) @ weight.to(dtype).T).to(_accumulator(dtype))
        z = z * scale if bias is None else (z + bias) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)


def _product_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What products of states and a head are computed in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _TokenLogps(torch.autograd.Function):
    """The forward and backward pass over tiles. Sums are kept in float32, or float64 where the input has it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        cap: tuple[float, float] | None,
        chunk: int,
        stats: bool,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        n, vocabulary = len(hidden), len(weight)
        exact = _accumulator(hidden.dtype)
        # running maximum and Σ exp(z - maximum), and the target's logit
        top = hidden.new_full((n,), -torch.inf, dtype=exact)
        total, chosen = torch.zeros_like(top), torch.zeros_like(top)
        sums = torch.zeros_like(top) if stats else None
        spread = torch.zeros_like(top) if stats or entropy else None  # Σ z exp(z - maximum)
        tiles = _Tiles(hidden, weight, bias, cap, chunk)
        room = chunk * vocabulary if any(ctx.needs_input_grad) and cap is None else 0
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # exp(z - maximum so far), that maximum
        for part in tiles.parts():
            for rows in tiles.blocks():
                z = tiles.logits(rows, part)
                index = target[rows] - part.start
                inside = (index >= 0) & (index < z.shape[1])
                here = z.gather(1, index.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
                chosen[rows] = torch.where(inside, here, chosen[rows])
                new = torch.maximum(top[rows], z.amax(1))
                shrink = torch.exp(top[rows] - new)
                if sums is not None:
                    sums[rows] += z.sum(1)
                if spread is None:
                    z.sub_(new[:, None]).exp_()
                else:
                    raw, z = z, torch.exp(z - new[:, None])
                    spread[rows] = spread[rows] * shrink + raw.mul_(z).sum(1)
                total[rows] = total[rows] * shrink + z.sum(1)
                top[rows] = new
                if 0 < z.numel() <= room:
                    room -= z.numel()
                    kept[rows.start, part.start] = z, new
        log_total = total.log()
        facts = [] if spread is None else [top + log_total - spread / total]
        if sums is not None:
            mean = sums / vocabulary
            facts += [mean, (chosen >= top).to(exact), -log_total, (mean - top) - log_total]
        ctx.mark_non_differentiable(*facts[1 if entropy else 0 :])
        ctx.save_for_backward(hidden, weight, bias, target, top + log_total, facts[0] if entropy else None)
        ctx.cap, ctx.chunk, ctx.kept = cap, chunk, kept
        return ((chosen - top) - log_total, *facts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, logsumexp, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        exact = logsumexp.dtype
        grad = grads[0].to(exact)
        tiles = _Tiles(hidden, weight, bias, ctx.cap, ctx.chunk)
        if entropy is not None:
            # d H / d z = -p (log p + H): two factors per token, which the wide side has to take
            wide, of_entropy = grad, grads[1].to(exact)
            grad = torch.ones_like(wide)
        # d log p / d z = onehot - p; the factor `grad` per token goes to the narrow side of each product
        weighted = (hidden * -grad[:, None]).to(hidden.dtype)
        d_hidden = torch.zeros_like(hidden, dtype=exact) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=exact) if need_bias and bias is not None else None
        for part in tiles.parts():
            d_part = None
            for rows in tiles.blocks():
                slope = None
                if found := ctx.kept.pop((rows.start, part.start), None):  # a second backward pass makes it again
                    p = found[0].mul_(torch.exp(found[1] - logsumexp[rows])[:, None])
                else:
                    z = tiles.logits(rows, part)
                    if ctx.cap is not None:
                        softcap, temperature = ctx.cap
                        slope = (1 - (z * (temperature / softcap)).square_()).div_(temperature)
                    p = z.sub_(logsumexp[rows, None]).exp_()
                index = target[rows] - part.start
                inside = (index >= 0) & (index < p.shape[1])
                onehot = inside.to(p.dtype)
                if entropy is not None:
                    onehot = onehot * wide[rows]
                    spread = torch.xlogy(p, p).mul_(of_entropy[rows, None])
                    p = p.mul_((wide + of_entropy * entropy)[rows, None]).add_(spread)
                p.scatter_add_(1, index.clamp(0, p.shape[1] - 1)[:, None], -onehot[:, None])
                if slope is not None:
                    p.mul_(slope)
                if d_bias is not None:
                    d_bias[part] -= grad[rows] @ p
                p = p.to(hidden.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[rows], p, tiles.weight(part))
                if d_weight is not None:
                    if len(tiles.blocks()) == 1 and d_weight.dtype == p.dtype:
                        torch.mm(p.T, weighted[rows], out=d_weight[part])
                        continue
                    if d_part is None:
                        d_part = torch.zeros_like(weight[part], dtype=exact)
                    _add_product(d_part, p.T, weighted[rows])
            if d_weight is not None and d_part is not None:
                d_weight[part] = d_part
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(-grad[:, None]).to(hidden.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None, None, None


class _Tiles:
    """Which tokens and which part of the vocabulary a tile has, and its logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: tuple[float, float] | None, chunk: int
    ) -> None:
        self.hidden, self.whole, self.bias, self.cap = hidden, weight, bias, cap
        self.exact = _accumulator(hidden.dtype)
        n, vocabulary = len(hidden), len(weight)
        budget = max(1, chunk) * vocabulary
        if hidden.device.type == "cpu":
            budget = min(budget, CPU_TILE)
        # blocks of nearly equal size, so that none is a thin rest
        count = -(-n // min(TILE_TOKENS, budget)) or 1
        self.tokens = -(-n // count)
        count = -(-vocabulary // max(1, budget // max(1, self.tokens)))
        self.width = -(-vocabulary // count)
        self._blocks = [slice(i, min(i + self.tokens, n)) for i in range(0, n, self.tokens)] if n else [slice(0, 0)]
        self._part: tuple[int, Tensor] | None = None

    def parts(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        for start in range(0, len(self.whole), self.width):
            yield slice(start, min(start + self.width, len(self.whole)))

    def blocks(self) -> list[slice]:
        """Slices of the tokens."""
        return self._blocks

    def weight(self, part: slice) -> Tensor:
        """Rows of the head in the type of the products."""
        if self._part is None or self._part[0] != part.start:
            self._part = (part.start, self.whole[part].to(self.hidden.dtype))
        return self._part[1]

    def logits(self, rows: slice, part: slice) -> Tensor:
        """One tile (tokens, width), own memory."""
        hidden, weight = self.hidden[rows], self.weight(part)
        if hidden.dtype != self.exact and _widens(hidden.device.type, hidden.dtype):
            z = torch.mm(hidden, weight.T, out_dtype=self.exact)  # type: ignore[call-overload]
        else:
            z = (hidden @ weight.T).to(self.exact)
        if self.bias is not None:
            z += self.bias[part]
        return z if self.cap is None else z.div_(self.cap[0]).tanh_().mul_(self.cap[0] / self.cap[1])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in the precision of `out`: the sum over many tiles must not be rounded at every tile."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif _widens(a.device.type, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload]
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


@cache
def _widens(device: str, dtype: torch.dtype) -> bool:
    """Whether products of this type can be written in float32 there; on a GPU they can."""
    a, out = torch.ones(8, 8, device=device, dtype=dtype), torch.ones(8, 8, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32)  # type: ignore[call-overload]
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False
    return bool((out == 9).all())
