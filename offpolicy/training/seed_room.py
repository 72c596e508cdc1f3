"""How much memory several seeds need, and how many fit."""

from __future__ import annotations

from typing import Any

import torch

from offpolicy.compute.room import NO_LIMIT, free_memory, size
from offpolicy.errors import UsageError
from offpolicy.given import seeds_text
from offpolicy.training.lightning_private import trainer_of

KEPT = 3  # numbers per output of a layer and row: before and after the activation, and a gradient
KEPT_OF_MORE = 2  # of further rows: their gradients are there for one layer at a time
USABLE = 0.9  # of what is free


def needed(method: Any, copies: int = 1) -> int:
    """Bytes that training takes, estimated: weights and targets, gradients, moments, activations and batches.

    A network is taken to see each row of the batch once, but for what :meth:`OfflineModule.rows_per_row` says.

    Args:
        method: with its networks.
        copies: how often its networks will be there.
    """
    params = list(method.named_parameters())
    rows = method.common.batch_size
    weights = sum(p.numel() for _, p in params)
    trained = sum(p.numel() for _, p in params if p.requires_grad)
    each = {name: p.numel() // p.shape[-2] for name, p in params if p.dim() > 1 and p.shape[-2] > 1}  # not biases
    outputs, more = sum(each.values()), method.rows_per_row()
    further = sum((more.get(name.partition(".")[0], 1) - 1) * count for name, count in each.items())
    seeds = len(method.seeds) if copies == 1 else 1
    batch = seeds * method.run.block * rows * (2 * method.sizes.obs_dim + 2 * method.sizes.action_dim + 4)
    numbers = weights + 3 * trained + rows * (KEPT * outputs + KEPT_OF_MORE * further) + batch
    return copies * numbers * width(method)


def width(method: Any) -> int:
    """Bytes of a number in training."""
    trainer = trainer_of(method)
    return 8 if trainer is not None and str(trainer.precision).startswith("64") else 4


def check_room(method: Any) -> None:
    """Refuse more seeds than the device of the run has room for; asked once the networks of the first are there.

    Raises:
        UsageError: they do not fit; says how many do.
    """
    trainer = trainer_of(method)
    if trainer is None:  # opened, not trained
        return
    device = trainer.strategy.root_device
    count, free = len(method.seeds), free_memory(device)
    each = needed(method, count) // count
    if count * each <= USABLE * free:
        return
    fit = int(USABLE * free / each)
    raise UsageError(
        f"`seeds` is {seeds_text(method.seeds)[:80]}: {count:,} seeds need about {size(count * each)} "
        f"({size(each)} each), and {device} has {size(free)} free; expected at most {fit:,}. Pass fewer, and start "
        "another run for the rest."
    )


def memory_words(method: Any, device: torch.device) -> str:
    """What the seeds of a method take, and what its device has free, in a few words."""
    total, count, free = needed(method), len(method.seeds), free_memory(device)
    left = f"{size(free)} free" if free < NO_LIMIT else f"{device} does not tell how much is free"
    return f"about {size(total)} for {count} seeds ({size(total // count)} each); {left}"
