"""The Lightning plugin that writes checkpoints as `checkpoints.py` does, at once or beside training."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from offpolicy.compute.room import available_memory
from offpolicy.files import is_stray
from offpolicy.training.background import Writing, copied, is_beside
from offpolicy.training.checkpoints import read_checkpoint, to_plain, write_checkpoint
from offpolicy.training.sharded import remove


class AtomicCheckpointIO(CheckpointIO):
    """Whole files or none, plain types only, always loaded with ``weights_only=True`` to the CPU.

    Lightning's own writer goes through the system's temporary folder, and its last move is a copy when the run lies on
    another file system: a process killed there leaves a short file under the final name. Here the temporary lies
    beside the final file. Use as ``Trainer(plugins=[AtomicCheckpointIO()])``; one run per folder.

    Attributes:
        beside: whether files are written by a thread while training goes on: true, false, or "auto" (see
            :func:`offpolicy.training.background.is_beside`).
        writing: what is being written; its errors are raised at the next save, or where somebody asks.
    """

    def __init__(self) -> None:
        self._swept: set[Path] = set()
        self.beside: bool | str = False
        self.writing = Writing()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`; the first call in a folder also removes what a killed run left half-written.

        What is written beside training is copied first, once the former file is on the disk.

        Raises:
            UsageError: something in it is not plain.
            WriteError: full disk or read-only folder, for this file or the one before it.
        """
        self.writing.wait()
        self.sweep(Path(path).parent)
        plain = to_plain(checkpoint, "checkpoint")
        if is_beside(self.beside, plain, available_memory):
            own = copied(plain)
            self.writing.start(lambda: write_checkpoint(own, path))
        else:
            write_checkpoint(plain, path)

    def sweep(self, folder: Path) -> None:
        """Remove what a killed run left half-written in a folder, once."""
        if folder in self._swept:
            return
        for stray in filter(is_stray, folder.glob(".*.tmp")):
            with contextlib.suppress(OSError):  # a folder that cannot be written to is reported by the write
                shutil.rmtree(stray) if stray.is_dir() and not stray.is_symlink() else stray.unlink()
        self._swept.add(folder)

    def teardown(self) -> None:
        """Wait for what is being written."""
        self.writing.wait()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU. `map_location` and `weights_only` are accepted and ignored."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint if it is there."""
        remove(Path(path))
