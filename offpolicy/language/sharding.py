"""FSDP2 (``strategy="fsdp2"``): every process keeps a part of each weight, and gathers a layer while it computes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with all processes in one group that shares the data.

    Checkpoints are whole files, as those of every other strategy, so a run can go on with any number of processes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a language model in place: every layer is a unit, and what is around them (embeddings, head) one more."""
    from torch.distributed.fsdp import fully_shard

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
