"""Everything that Lightning does not document and this library uses, each with the reason.

A test asks for every one of them, so that a version of Lightning without it is noticed before a run is. What torch
does not document stands in :mod:`offpolicy.compute.torch_private`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy

from offpolicy.compute.room import available_memory
from offpolicy.errors import UsageError
from offpolicy.training import sharded
from offpolicy.training.background import is_beside
from offpolicy.training.checkpoint_io import AtomicCheckpointIO
from offpolicy.training.checkpoints import read_checkpoint, to_plain


def count_updates(trainer: Any, k: int) -> None:
    """Let ``global_step`` count k more updates: under manual optimisation it counts calls of Lightning's optimisers,
    which methods do not use, and it has no setter."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for part in (progress.total, progress.current):
        part.ready += k
        part.completed += k


def save_interval(callback: Any) -> Any:
    """The updates between checkpoints of Lightning's ``ModelCheckpoint``, at which a block must end; else 0.

    It takes ``every_n_train_steps`` and keeps it under another name.
    """
    return getattr(callback, "_every_n_train_steps", 0)


def trainer_of(module: LightningModule) -> Any:
    """The Trainer of a module, None without one; the public ``trainer`` raises an error there."""
    return module.__dict__.get("_trainer")


def stop_watching() -> None:
    """Keep Lightning's launcher from killing this process because another one of the run has ended.

    Its watcher, a thread, does so within five seconds whenever a child ends with a code other than 0, as an
    interrupted child does, and nothing public stops it.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with all processes in one group that shares the data.

    Checkpoints are folders into which every process writes its parts (:mod:`offpolicy.training.sharded`). A run goes on
    from one, and from a file, with any number of processes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=True)
        self._group: Any = None  # in which tensors on the host can be sent

    def _setup_distributed(self) -> None:  # the only place where Lightning decides how processes are grouped
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def _host_group(self) -> Any:
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write this process's parts, at once or beside training as the plugin for files is set.

        Raises:
            WriteError: one of the processes cannot write, for this checkpoint or the one before it.
        """
        io: Any = self.checkpoint_io
        if not isinstance(io, AtomicCheckpointIO):
            raise UsageError(
                f"`trainer.plugins` has {type(io).__name__}, and the model is sharded by 'fsdp2', which writes its "
                "checkpoints itself; expected no plugin for checkpoints. Leave it out."
            )
        io.writing.wait()
        parts, rest = sharded.take_apart(checkpoint, same_weights(self.lightning_module))
        rest, group = to_plain(rest, "checkpoint"), self._host_group()
        if self.is_global_zero:
            io.sweep(Path(filepath).parent)
        choice = (str(filepath), os.getpid(), is_beside(io.beside, parts, available_memory))
        name, pid, beside = self.broadcast(choice)
        path, folder = Path(name), sharded.half_written(Path(name), pid)
        save = sharded.writer_of(parts, folder, group, copy=beside)

        def write() -> None:
            table = save()
            if self.is_global_zero:
                sharded.finish_writing(folder, path, rest, table)

        if beside:
            io.writing.start(write)
        else:
            write()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Take weights and optimisers back, each process its own parts; gives what else the checkpoint holds."""
        path, module = Path(self.broadcast(checkpoint_path)), cast(Any, self.lightning_module)
        if sharded.is_sharded(path):
            group = self._host_group()
            return sharded.take_back(path, self.model, self.optimizers, group, strict=module.strict_loading)
        content = read_checkpoint(path, weights=False)  # whose tensors stay on the disk until they are used
        sharded.take_back_whole(content, self.model, self.optimizers, strict=module.strict_loading)
        return content


def same_weights(module: Any) -> dict[str, str]:
    """The names of weights that are one with another (tied), each with the name that comes first."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: other for name, other in found.items() if name != other}
