"""What Lightning does not document and the library uses: each part is there and does what it is used for."""

from __future__ import annotations

import inspect

from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import method, quiet

from offpolicy.training import lightning_private as private


def test_updates_are_counted() -> None:
    trainer = quiet(10)
    trainer.strategy.connect(method("BC"))
    private.count_updates(trainer, 3)
    private.count_updates(trainer, 4)
    assert trainer.global_step == 7


def test_the_interval_of_a_checkpoint_callback() -> None:
    assert private.save_interval(ModelCheckpoint(every_n_train_steps=30)) == 30
    assert private.save_interval(object()) == 0


def test_the_trainer_of_a_module() -> None:
    module = LightningModule()
    assert private.trainer_of(module) is None
    module.trainer = trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert private.trainer_of(module) is trainer


def test_the_watcher_of_child_processes_is_stopped() -> None:
    """Its name and the attribute are those of Lightning's source; a child that failed ends nobody any more."""
    source = inspect.getsource(subprocess_script._ChildProcessObserver)
    assert 'name="child-process-observer"' in source and "self._child_processes" in source

    class Failed:
        pid, returncode = 0, 1

        def send_signal(self, number: int) -> None: ...

        def poll(self) -> int:
            return 1

    killed: list[bool] = []
    watcher = subprocess_script._ChildProcessObserver(0, [Failed()], sleep_period=0)  # type: ignore[list-item]
    watcher._terminate_all = lambda: killed.append(True)  # type: ignore[method-assign]
    watcher._run()
    assert killed == [True]
    watcher.run = lambda: __import__("time").sleep(0.5)  # type: ignore[method-assign]
    watcher.start()
    private.stop_watching()
    watcher._run()
    watcher.join()
    assert killed == [True]
