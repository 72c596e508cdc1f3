"""Casts of weights under autocast: anew at each use while weights move, once while they rest.

Autocast can keep the cast of every weight it has used until the outermost autocast ends. A block of updates inside a
user's own ``torch.autocast`` would then go on with the weights of its first update; and Lightning's mixed precision,
which keeps nothing, casts all weights again for every token of an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def fresh_casts() -> Iterator[None]:
    """Within it weights may move: casts are made at each use, and none that was kept before outlasts it."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        torch.clear_autocast_cache()


@contextlib.contextmanager
def kept_casts(model: nn.Module) -> Iterator[None]:
    """Within it the weights of a model rest and no gradients are wanted: under autocast each is cast once.

    Costs the memory of the casts. The numbers are the same.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    # autocast keeps casts of weights that are trained; those of a model with adapters count too
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    kept = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    try:
        with torch.no_grad():
            for p in frozen:
                p.requires_grad_(True)
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        torch.set_autocast_cache_enabled(kept)
        torch.clear_autocast_cache()


__all__ = ["fresh_casts", "kept_casts"]
