"""Where a run comes from: the settings, versions and command that its folder keeps, so that it can be repeated."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer

from offpolicy.data.module import DataModule
from offpolicy.errors import UsageError
from offpolicy.given import seeds_text
from offpolicy.training import screen
from offpolicy.training.checkpoints import plain_hparams, to_plain
from offpolicy.training.module import Module
from offpolicy.training.run_folder import RunFolder
from offpolicy.trust import ENVIRONMENT, names_in, names_of_method, packages_to_trust


@dataclass
class Origin:
    """Where a run comes from: what its folder keeps so that it can be repeated, and lines for the first screen.

    ``trust`` are packages of others that its settings name, known when training begins.
    """

    config: str | None = None
    command: str = ""
    lines: list[str] = field(default_factory=list)
    trust: tuple[str, ...] = ()


class Start(Callback):
    """When training begins: put the settings of the run into its folder and show the first screen."""

    def __init__(self, files: RunFolder, origin: Origin, data: DataModule, options: Mapping[str, Any], verbose: bool):
        self.files, self.origin, self.data, self.options, self.verbose = files, origin, data, options, verbose
        self.look = ""  # the command that looks at the trained method

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        folder = self.files.folder
        config = self.origin.config or python_config(pl_module, self.data, trainer.max_steps, self.options)
        called = self.origin.command or "offpolicy.fit(...) from Python"
        versions = to_plain(screen.versions(pl_module)) | {
            "device": str(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "planned_updates": trainer.max_steps,  # which epochs may stand for in the settings
        }
        self.files.keep_settings(config, versions, f"{called}  # from update {trainer.global_step}")
        pl_module.keep_files(folder)
        self.origin.trust = packages_to_trust(names_of_run(pl_module, self.data))
        if self.verbose:
            described = pl_module.describe()
            self.look = described.look
            print(screen.first_screen(trainer, pl_module, folder, self.origin.lines, described), flush=True)


def python_config(method: Module, data: DataModule, max_steps: int, options: Mapping[str, Any]) -> str:
    """The settings of a run started from Python, in the form of the command line's ``config.yaml``."""
    plain, left_out = {}, []
    for name, value in options.items():
        if value is None:  # the Trainer's own
            continue
        try:
            plain[name] = as_settings(value)
        except UsageError:  # an object
            left_out.append(name)
    path = f"{type(method).__module__}.{type(method).__qualname__}"
    hparams = as_settings(plain_hparams(method.hparams))
    settings = {
        "seed_everything": None if method.seeds else method.seed,
        "seeds": seeds_text(method.seeds) if method.seeds else None,
        "model": {"class_path": path, "init_args": hparams},
        "data": data.settings(),
        "run": asdict(method.run),
        "trainer": {**plain, "max_steps": max_steps},
        "recipe": "none",
    }
    note = f"# Objects cannot stand here; the run also had trainer.{', trainer.'.join(left_out)}.\n" if left_out else ""
    return note + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def as_settings(value: Any) -> Any:
    """Plain values as YAML has them: numbers, text, lists and dicts.

    Raises:
        UsageError: it is or holds something else.
    """
    plain = to_plain(value)
    if isinstance(plain, Mapping):
        return {key: as_settings(item) for key, item in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [as_settings(item) for item in plain]
    if plain is None or isinstance(plain, (bool, int, float, str)):
        return plain
    raise UsageError(f"{value!r} is no plain value; expected numbers, text, lists or dicts of them.")


def names_of_run(method: Module, data: DataModule) -> frozenset[str]:
    """Names of classes, functions and environments in the settings of a run."""
    environments = {name for name in names_in(data.settings()) if ENVIRONMENT.fullmatch(name)}
    return names_of_method(method) | environments | names_in(method.data_meta.get("env_id"))


def folder_words(folder: Path, origin: Origin) -> str:
    """The folder as an argument of a command, with the packages that have to be trusted to open it."""
    return shlex.quote(str(folder)) + (f" --trust {','.join(origin.trust)}" if origin.trust else "")


def resume_words(folder: Path, origin: Origin) -> str:
    """The command, or the call in Python, that continues a run."""
    if origin.command:
        return f"python -m offpolicy.fit --ckpt_path {folder_words(folder, origin)}"
    return f'offpolicy.fit(..., ckpt_path="{folder}")'
