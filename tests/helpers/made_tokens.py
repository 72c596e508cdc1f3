"""Made tokens for tests of components, and a component's call with the facts that it asks of its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offpolicy.losses.policy_gradient import Totals
from offpolicy.losses.tokens import Tokens, detached


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def singles(ratio: list[float], advantage: list[float], behavior: float | list[float] = 0.5, **fields: Any) -> Tokens:
    """Answers of one token each, with ratios to the policy that drew them; π_k is that policy."""
    before = torch.full((len(ratio),), 1.0, dtype=torch.float64) * torch.as_tensor(behavior, dtype=torch.float64)
    before = before.log()[:, None]
    logp = (before + f64(*ratio).log()[:, None]).requires_grad_()
    return Tokens(logp, torch.ones_like(logp.detach()), f64(*advantage), before, before, **fields)


def informed(part: Any, tokens: Tokens) -> Tokens:
    """The tokens as the part sees them when they are the whole step."""
    return tokens._replace(step=part.step_facts(detached(tokens))) if hasattr(part, "step_facts") else tokens


def rows_of(tokens: Tokens, rows: slice) -> Tokens:
    """Some answers of a step, with their rows of columns and facts."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: one if one.dim() == 0 else one[rows] for name, one in value.items()}
        return value[rows] if isinstance(value, Tensor) else value

    return Tokens(*(cut(value) for value in tokens))


def full_tokens(seed: int = 0) -> Tokens:
    """Six answers in groups of 2 and 4, up to 5 tokens, NaN in the padding, one of them a demonstration; with every
    field and column that components of this library read."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length = torch.tensor([5, 3, 4, 1, 5, 2])
    inside = torch.arange(5) < length[:, None]

    def padded(values: Tensor) -> Tensor:
        return torch.where(inside, values, torch.nan)

    logp = padded(-1.5 * draw(6, 5).abs() - 0.05)
    near = [padded((logp + 0.6 * draw(6, 5)).clamp(max=-1e-3)) for _ in range(3)]
    outside = torch.zeros(6, 5, dtype=torch.bool)
    outside[4] = True
    near[0] = torch.where(outside, torch.nan, near[0])
    columns = {
        "turn": torch.tensor([0, 0, 1, 1, 1]).expand(6, 5),
        "token": torch.randint(0, 2, (6, 5), generator=generator),
        "group": torch.tensor([3, 3, 8, 8, 8, 8]),
        "reward": f64(1, 0, 0, 1, 1, 0),
        "ended": torch.tensor([True, True, False, True, True, True]),
        "mastered": torch.tensor([False, False, True, True, True, True]),
        "weight": f64(0, 0, 0, 0, 1, 0),
        "tempered": torch.tensor([True, False, False, True, False, True]),
    }
    return Tokens(
        logp.requires_grad_(),
        inside.double(),
        f64(1.2, -1.2, -0.7, 0.9, 0.6, -0.8),
        near[0],
        near[1],
        base_logp=near[2],
        external=outside,
        entropy=padded(0.1 + draw(6, 5).abs()).requires_grad_(),
        nucleus_entropy=padded(0.1 + draw(6, 5).abs()).requires_grad_(),
        top_logp=padded(-0.1 * draw(6, 5).abs()),
        mean_log_ratio=padded(0.1 * draw(6, 5)),
        uniform=torch.rand(6, 5, generator=generator, dtype=torch.float64),
        shift=padded(0.3 * draw(6, 5)),
        shift_variance=padded(0.2 * draw(6, 5).abs()),
        columns=columns,
    )


def totals_of(tokens: Tokens) -> Totals:
    return Totals(int((tokens.mask.sum(1) > 0).sum()), int(tokens.mask.sum()), 8, tokens.mask.shape[1])
