"""Loggers by short name, which write beside the files of a run and never end it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from offpolicy.errors import UsageError, nearest

log = logging.getLogger(__name__)


def _mlflow(folder: Path) -> Logger:
    """Where its environment variable says, else in a data base in the folder: folders of files it takes no longer."""
    name = "/".join(folder.parts[-3:])
    if place := os.environ.get("MLFLOW_TRACKING_URI"):
        return MLFlowLogger("offpolicy", name, tracking_uri=place)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.absolute()
    files = (beside / "mlruns").as_uri()
    return MLFlowLogger("offpolicy", name, tracking_uri=f"sqlite:///{beside / 'mlflow.db'}", artifact_location=files)


LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda folder: CSVLogger(folder, name="csv"),
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="", version="tensorboard"),
    "wandb": lambda folder: WandbLogger(name="/".join(folder.parts[-3:]), save_dir=folder, project="offpolicy"),
    "mlflow": _mlflow,
}


class CarefulLogger(Logger):
    """A logger whose first failure is a warning, after which the run goes on without it.

    Args:
        name: of the logger, for the warning.
        made: the logger itself.
    """

    def __init__(self, name: str, made: Logger) -> None:
        super().__init__()
        self.short_name, self.made, self.failed = name, made, False

    def _asked(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """What the logger answers, None once it has failed."""
        if self.failed:
            return None
        try:
            found = getattr(self.made, what)
            return found(*args, **kwargs) if callable(found) and what not in ("experiment",) else found
        except Exception as error:
            self.failed = True
            log.warning("Logger %s failed, and the run goes on without it: %s", self.short_name, told_error(error))
            return None

    @property
    def name(self) -> str | None:
        return self._asked("name")

    @property
    def version(self) -> int | str | None:
        return self._asked("version")

    @property
    def save_dir(self) -> str | None:
        return self._asked("save_dir")

    @property
    def experiment(self) -> Any:
        """That of the logger, for a method that writes pictures or texts."""
        return self._asked("experiment") if hasattr(type(self.made), "experiment") else None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._asked("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._asked("log_hyperparams", params, *args, **kwargs)

    def save(self) -> None:
        self._asked("save")

    def finalize(self, status: str) -> None:
        self._asked("finalize", status)


def short_names(given: Any) -> list[str] | None:
    """The short names in ``csv``, ``csv,wandb`` or a list of them; None for everything else that a Trainer takes."""
    parts = given.strip("[] ").split(",") if isinstance(given, str) else given
    if isinstance(parts, (list, tuple)) and parts and all(isinstance(one, str) for one in parts):
        return [one.strip().lower() for one in parts]
    return None


def told_error(error: Exception) -> str:
    """An error of a logger in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def made_loggers(names: Iterable[str], folder: Path) -> list[Logger]:
    """Loggers that write into the folder of a run: ``csv/version_0``, ``tensorboard/``, ``wandb/``, ``mlflow.db``.

    One that cannot be made is a warning and left out.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    made: list[Logger] = []
    for name in names:
        if name not in LOGGERS:
            raise UsageError(
                f"`trainer.logger` is '{name}'; expected {', '.join(LOGGERS)}, or a class with its arguments."
                f"{nearest(name, LOGGERS)}"
            )
        try:
            made.append(CarefulLogger(name, LOGGERS[name](folder)))
        except ModuleNotFoundError as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"`trainer.logger` is '{name}', which needs a package that is not installed ({reason}); install the "
                "extra: pip install -e '.[logging]'."
            ) from None
        except Exception as error:  # of a server, or of a version that wants something else
            log.warning("Logger %s failed, and the run goes on without it: %s", name, told_error(error))
    return made
