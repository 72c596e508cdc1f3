"""What methods share that draw answers in training: an engine to be closed, and an interruption while it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from offpolicy.language.module import LanguageModule
from offpolicy.language.rl.answering import Answering
from offpolicy.language.rl.engine import engine_name


class DrawingModule(LanguageModule):
    """Base of methods whose policy answers in training.

    Attributes:
        answering: who answers and who judges, once there are data.
    """

    answering: Answering = None  # type: ignore[assignment]

    def watchers(self) -> list[Callback]:
        return [*super().watchers(), CloseEngine()]

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.close_engine()

    def open_engine(self) -> int:
        """Start what answers, on the device of training; returns the tokens of the longest prompt with its answer."""
        trainer: Any = self.trainer
        half = "bf16" in str(trainer.precision)
        return self.answering.open(
            self.model,
            device=trainer.strategy.root_device,
            dtype=torch.bfloat16 if half else next(self.model.parameters()).dtype,
            folder=Path(trainer.default_root_dir),
            seed=self.seed or 0,
            local_rank=trainer.local_rank,
        )

    def cached_rows(self) -> int:
        """Answers whose keys and values stand in this process's memory at once; an engine elsewhere has its own."""
        return self.hparams.generation_batch if engine_name(self.hparams.engine) in ("transformers", "tiny") else 0

    def close_engine(self) -> None:
        """End what the engine has started."""
        if self.answering is not None:
            self.answering.close()

    def wants_to_stop(self) -> bool:
        """Whether the user wants this process to stop."""
        return bool(self.run_log.received)

    def stop_drawing(self) -> int:
        """End the run before the steps that were to learn from what was not drawn, with its weights on disk."""
        trainer: Any = self.trainer
        self.run_log.interrupted_by = int(max(trainer.strategy.broadcast(self.run_log.received), 2))
        return self.end_here()

    def end_here(self) -> int:
        """End the run between two steps, with its weights on disk; what ``on_train_batch_start`` returns then."""
        trainer: Any = self.trainer
        trainer.should_stop = True
        if self.run_log.files is not None:
            self.run_log.files.save(trainer, self)
        return -1


class CloseEngine(Callback):
    """Ends the engine of a run that an error ends, before and in training; Lightning tears no module down then."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.close_engine()
