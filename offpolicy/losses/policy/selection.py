"""What components that compare the tokens of a step have in common: means, ranks and quantiles over chosen tokens,
and what is remembered from step to step. Nothing is read on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Remembers:
    """A component that remembers something from step to step, in ``memory``."""

    memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.clear()
        self.memory.update(state)


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values, 0-d; 0 where nothing is chosen."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def ranks(values: Tensor, chosen: Tensor) -> Tensor:
    """The places of values among the chosen ones from the largest, from 0, in their shape; equal values keep their
    order. What is not chosen comes last."""
    order = torch.where(chosen, values, -torch.inf).flatten().argsort(descending=True, stable=True)
    # what is not chosen has −∞, as a chosen value may: it is moved behind all of those
    order = order[(~chosen).flatten()[order].to(torch.uint8).argsort(stable=True)]
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places.view(values.shape)


def largest(values: Tensor, chosen: Tensor, share: float, least: int = 0) -> Tensor:
    """Where the largest of the chosen values are: that share of them, rounded down, and at least ``least``."""
    count = (share * chosen.sum().to(values.dtype)).floor().clamp(min=least)
    return chosen & (ranks(values, chosen) < count)


def quantile(values: Tensor, chosen: Tensor, q: float) -> Tensor:
    """The q-quantile of the chosen values, 0-d, linear between neighbours; +∞ where nothing is chosen."""
    ordered = torch.where(chosen, values, torch.inf).flatten().sort().values
    place = q * (chosen.sum() - 1).clamp(min=0).to(values.dtype)
    below = place.floor()
    first, second = ordered.gather(0, torch.stack([below, place.ceil()]).long()).unbind()
    between = torch.where(second == first, 0.0, (place - below) * (second - first))
    return first + between


def nearest_quantile(values: Tensor, chosen: Tensor, q: float) -> Tensor:
    """The chosen value nearest to the q-quantile, 0-d; +∞ where nothing is chosen."""
    ordered = torch.where(chosen, values, torch.inf).flatten().sort().values
    place = (q * (chosen.sum() - 1).clamp(min=0).to(values.dtype)).round()
    return ordered.gather(0, place.long()[None]).squeeze(0)
