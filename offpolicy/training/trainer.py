"""Lightning's Trainer as this library uses it: its settings, its remarks, and its errors in our words."""

from __future__ import annotations

import contextlib
import logging
import signal
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from offpolicy.errors import DataError, UsageError
from offpolicy.given import refuse_half
from offpolicy.training.bar import UpdateBar
from offpolicy.training.checkpoint_io import AtomicCheckpointIO
from offpolicy.training.lightning_private import FullySharded
from offpolicy.training.loggers import made_loggers, short_names

TRAINER_DEFAULTS: dict[str, Any] = {  # one device unless asked; rows and batches are the method's own affair
    "devices": 1,
    "logger": False,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
NOISE = (  # remarks of Lightning about what is intended here
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*pre-optimization state.*",
    ".*weights_only.*",
    ".*LightningCLI's args parameter.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)


def make_trainer(
    folder: Path, max_steps: int, options: Mapping[str, Any], callbacks: list[Any], *, bar: bool = True
) -> Trainer:
    """A Trainer with the files and checkpoints of this library; ``options`` that are None keep the default.

    Args:
        folder: of the run.
        max_steps: updates in all.
        options: arguments of Lightning's ``Trainer``.
        callbacks: those of the run, called after the user's own.
        bar: with a bar of its own; ``fit`` has one that stands among the method's callbacks instead.
    """
    given = TRAINER_DEFAULTS | {k: v for k, v in options.items() if v is not None}
    if "default_root_dir" in given:
        raise UsageError("`trainer.default_root_dir` is the run folder here; use `folder`: --folder DIR.")
    refuse_half(given.get("precision"))  # on a CPU Lightning would silently take another
    own = _as_list(given.pop("callbacks", None))
    bars = [UpdateBar()] if bar and given.get("enable_progress_bar", True) else []
    given["enable_progress_bar"] = any(isinstance(one, ProgressBar) for one in [*own, *bars])
    given["plugins"] = [*_as_list(given.pop("plugins", None)), AtomicCheckpointIO()]
    if given.get("strategy") == "fsdp2":
        given["strategy"] = FullySharded()
    if (names := short_names(given.get("logger"))) is not None:
        given["logger"] = made_loggers(names, folder)
    if given.get("accelerator", "auto") == "auto":
        given["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"  # "mps" has no float64
    given |= {"max_steps": max_steps, "default_root_dir": str(folder), "callbacks": [*own, *bars, *callbacks]}
    with clear_errors(ValueError, TypeError, ModuleNotFoundError):
        return Trainer(**given)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on what is intended here; its errors and our own warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


@contextlib.contextmanager
def clear_restoring(checkpoint: Path | None) -> Iterator[None]:
    """What fails while the Trainer takes a checkpoint back as :class:`UsageError`: anything can be wrong in a file."""
    try:
        yield
    except (UsageError, DataError, MisconfigurationException, OSError):
        raise
    except Exception as error:
        places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        restoring = any(place.endswith("checkpoint_connector.py") for place in places)
        if checkpoint is None or not restoring or "loading state_dict" in str(error):  # which the caller explains
            raise
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{checkpoint} holds a run that training cannot go on from ({type(error).__name__}: {reason}); expected a "
            "checkpoint of this version of the class. Pass another checkpoint."
        ) from error


@contextlib.contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Lightning's complaints (and errors of these kinds) as :class:`UsageError`; its exit after a Ctrl-C as that."""
    handler = signal.getsignal(signal.SIGINT)
    complaints: tuple[type[Exception], ...] = (MisconfigurationException, *kinds)
    try:
        yield
    except complaints as error:
        if isinstance(error, (UsageError, DataError)):
            raise
        raise UsageError(f"the Trainer cannot work with these settings: {' '.join(str(error).split())}") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, handler)  # Lightning left it ignored
            raise KeyboardInterrupt from None
        raise


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
