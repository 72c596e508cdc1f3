"""FSDP2 (``strategy="fsdp2"``): every process keeps a part of each weight, and gathers a layer while it computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from offpolicy.moved import names_of

__getattr__ = names_of("offpolicy.language.sharding")  # what else stood here in version 0.1


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a language model in place: every layer is a unit, and what is around them (embeddings, head) one more."""
    from torch.distributed.fsdp import fully_shard

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
