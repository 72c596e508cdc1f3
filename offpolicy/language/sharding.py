"""FSDP2 (``strategy="fsdp2"``): every process keeps a part of each weight, and gathers a layer while it computes.

A forward pass therefore takes all processes at once. Where they go through the model differently often, as they do
while each draws its own answers, the whole model is gathered first (:func:`gathered_model`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from offpolicy.moved import names_of

__getattr__ = names_of("offpolicy.language.sharding")  # what else stood here in version 0.1


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a language model in place: every layer is a unit, and what is around them (embeddings, head) one more."""
    from torch.distributed.fsdp import fully_shard

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def units(model: nn.Module) -> list[Any]:
    """The units that a model is sharded in, the model itself first; none where it is not sharded."""
    return [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]


@contextlib.contextmanager
def gathered_model(model: nn.Module | None) -> Iterator[None]:
    """Within it, every process holds all weights of a sharded model, if there is one, and goes through it by itself.

    That takes the memory of the whole model on each. A ``state_dict`` cuts the weights again: :func:`gather`.
    """
    parts = [] if model is None else units(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not parts[0], recurse=False)  # as torch chooses


def gather(model: nn.Module) -> None:
    """Gather all weights of a sharded model on every process, all of which ask; no effect on those that are whole."""
    for part in units(model):
        part.unshard()


@contextlib.contextmanager
def cut(model: nn.Module) -> Iterator[None]:
    """Within it, each process holds its parts alone, also inside of :func:`gathered_model`."""
    parts = units(model)
    whole = bool(parts) and not any(hasattr(p, "placements") for p in model.parameters())
    for part in parts:  # the outermost stays gathered after a forward pass
        part.reshard()
    try:
        yield
    finally:
        if whole:
            gather(model)


@torch.no_grad()
def exchange(weight: Tensor, other: Tensor) -> Tensor:
    """Give a weight the numbers of another tensor; returns a tensor with those it had.

    The numbers of a sharded weight are exchanged in place, as FSDP2 gathers from the memory it knows.
    """
    if not hasattr(weight, "to_local"):
        weight.data, other = other, weight.data
        return other
    own, its = weight.to_local(), other.to_local()  # type: ignore[operator, attr-defined]
    before = own.clone()
    own.copy_(its)
    its.copy_(before)
    return other


def cut_as(tensor: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut over the processes as a weight is."""
    if not hasattr(weight, "placements") or hasattr(tensor, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)  # type: ignore[attr-defined]
