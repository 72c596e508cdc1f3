"""The drawing of batches: which rows an update sees, and with which noise.

Every number is a function of the seed, the update and the row of the global batch alone, so blocks of any length and
any number of processes draw the same batches, and a resumed run goes on with those that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offpolicy.compute.torch_private import is_dropout
from offpolicy.data import sampling
from offpolicy.data.extras import Extra
from offpolicy.data.views import BoundView, Noise

LAWS = {"normal": sampling.normals, "uniform": sampling.uniforms}
Seeds = int | list[int] | Tensor  # several give every tensor one more axis in front


class Draw(NamedTuple):
    """Noise of one name: numbers per row of the batch, and their law ("normal" or "uniform" in [0, 1)).

    With ``per_row`` false one row of them for the whole batch, the same on every process.
    """

    shape: tuple[int, ...]
    law: str = "normal"
    per_row: bool = True


def draw_batches(
    bound: BoundView,
    draws: Mapping[str, Draw],
    seeds: Seeds,
    updates: range | Tensor,
    rows: range,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Any]:
    """One batch for each of these updates, gathered at once.

    Args:
        bound: the view of the data, where they lie.
        draws: noise by name.
        seeds: of rows and noise.
        updates: their numbers, from 1; a tensor of them (K,), and of seeds, lies where the data do.
        rows: those of the global batch that this process draws.
        device: of the noise.
        dtype: of the noise.
    """
    row = torch.arange(rows.start, rows.stop, device=bound.device)
    if isinstance(updates, range):
        updates = torch.arange(updates.start, updates.stop, device=bound.device)
    words = sampling.bits(sampling.keys(seeds, "index", updates), row)
    more = bound.uniforms
    uniforms = [sampling.uniforms(sampling.keys(seeds, "view", updates), row, (more,))] if more else []
    batch = bound.gather(bound.pick(words, row), *uniforms)
    seeds = seeds.to(device) if isinstance(seeds, Tensor) else seeds
    noise = draw_noise(draws, seeds, updates.to(device), row.to(device), dtype)
    fields = {name: value.unbind(0) for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    parts = {name: value.unbind(0) for name, value in noise.items()}
    columns = {name: value.unbind(0) for name, value in vars(getattr(batch, "extra", None) or Extra()).items()}

    def of_update(j: int) -> dict[str, Any]:
        more = {"extra": Extra(**{name: each[j] for name, each in columns.items()})} if columns else {}
        return more | {name: each[j] for name, each in fields.items()}

    return [
        type(batch)(**of_update(j), noise=Noise(**{name: each[j] for name, each in parts.items()}))
        for j in range(len(updates))
    ]


class Counters:
    """Where a run stands, as tensors on the device that batches are drawn on.

    They stay in their places, so that work which reads them can be recorded once and repeated.

    Attributes:
        given: the seeds as numbers.
        seeds: int64, () or (S,).
        updates: made before the block at hand, int64 ().
    """

    def __init__(self, seeds: int | list[int], device: torch.device) -> None:
        self.given, self.seeds = seeds, sampling.seed_values(seeds, device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    def numbers(self, k: int) -> Tensor:
        """The numbers of the next k updates, int64 (k,)."""
        return self.updates + torch.arange(1, k + 1, device=self.updates.device)


def draw_noise(
    draws: Mapping[str, Draw], seeds: Seeds, update: Tensor, row: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Noise by name, (K, B, …) for K updates and B rows of the global batch; (K, 1, …) where it is not per row."""
    return {
        name: LAWS[draw.law](
            sampling.keys(seeds, name, update), row if draw.per_row else torch.zeros_like(row[:1]), draw.shape
        ).to(dtype)
        for name, draw in draws.items()
    }


def seed_dropout(seed: int, update: int, rank: int) -> None:
    """Make torch's own generator, which dropout draws from, a function of the update and the process too."""
    number = torch.tensor([update], device="cpu")
    torch.manual_seed(int(sampling.keys(seed, f"dropout of process {rank}", number)[0]))


def has_dropout(module: nn.Module) -> bool:
    """Whether a module draws a dropout mask of its own: torch's layers, or an attribute ``dropout`` > 0."""
    rate = module.p if is_dropout(module) else getattr(module, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0.0
