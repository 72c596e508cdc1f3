"""From a read command to a run: Lightning's parser for types and objects, then :func:`offpolicy.api.fit`."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from offpolicy import api
from offpolicy.cli.arguments import EPOCHS, LEAST_STEPS, MAX_STEPS, Command, check_options, nested, whole_text
from offpolicy.data.module import DataModule
from offpolicy.data.names import TABLES, file_type
from offpolicy.data.raw import IN_A_TABLE
from offpolicy.errors import DataError, UsageError, check_choice
from offpolicy.given import is_whole_type, seed_number
from offpolicy.registry import import_class
from offpolicy.training import screen
from offpolicy.training.common import CommonOptions
from offpolicy.training.loggers import LOGGERS, short_names
from offpolicy.training.module import Module
from offpolicy.training.offline import OfflineModule
from offpolicy.training.options import RunOptions
from offpolicy.training.origin import Origin
from offpolicy.training.trainer import TRAINER_DEFAULTS, quiet
from offpolicy.trust import ALL, NAME, OWN, check_class, speaking, words

LOGGER = "trainer.logger"


class FitCLI(LightningCLI):
    """LightningCLI that makes the method and the data, and leaves the Trainer to :func:`offpolicy.api.fit`."""

    loggers = ""  # short names of the Trainer's loggers

    def __init__(
        self,
        args: list[str],
        method: type[Module] = OfflineModule,
        seed: int | None = 0,
        data_class: type[DataModule] | None = None,
    ) -> None:
        self.method, self.seed = method, seed
        max_steps = MAX_STEPS if issubclass(method, OfflineModule) else -1  # -1: as the method plans
        super().__init__(
            Module,
            data_class or method.data_class(),
            save_config_callback=None,
            trainer_defaults={"max_steps": max_steps, **TRAINER_DEFAULTS},
            seed_everything_default=seed,  # type: ignore[arg-type]  # None where there are several
            subclass_mode_model=True,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "python -m offpolicy.fit", "allow_abbrev": False, "exit_on_error": False},
            args=args,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.set_defaults({f"run.{name}": value for name, value in self.method.run_defaults.items()})
        parser.add_argument("--seeds", type=str | None, default=None, help="several, trained at once: 0..7 or 0,3,5")
        parser.add_argument("--recipe", type=str, default="auto", help="auto, none, or a recipe of the method by name")
        parser.add_argument("--root", type=str, default="runs", help="where run folders are made")
        parser.add_argument("--folder", type=str | None, default=None, help="the run folder, instead of one under root")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="last, a run folder or a checkpoint")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = parser.parse_args(args)
        seed = self.config.seed_everything
        if isinstance(seed, bool):
            raise UsageError(f"--seed_everything is {str(seed).lower()}; expected a whole number.")
        if self.config.seeds is None:
            self.config.seed_everything = seed_number(seed, "seed_everything")
        check_classes(self.config.as_dict())

    def instantiate_classes(self) -> None:
        """Make data, run options and the Trainer's parts; the method directly, so that its own errors arrive whole."""
        config = self.config.clone()
        model = config.pop("model")
        try:
            self.config_init = self.parser.instantiate_classes(config)
        except (ModuleNotFoundError, ValueError) as error:
            if isinstance(error, (UsageError, DataError)):
                raise
            raise UsageError(unmade(error)) from error
        self.model = import_class(model.class_path)(**model.get("init_args", {}))
        self.datamodule = self.config_init.data

    def _set_seed(self) -> None:
        """Lightning's parser would seed the process here, and takes no seed above 2³²; ``fit`` does it."""

    def settings_file(self) -> str:
        """What ``--config`` takes to repeat this run, all values written out."""
        config = self.config.clone()
        config.recipe, config.folder, config.ckpt_path = "none", None, None
        text = self.parser.dump(config, skip_none=False)
        if self.loggers:  # which the parser does not know by their short names
            text = re.sub(r"(?m)^  logger: .*$", f"  logger: {self.loggers}", text, count=1)
        return text


def run_command(command: Command) -> int:
    """Train as asked; returns the exit code: 0, or 128 + signal after an interruption."""
    with speaking(command.words):
        return _run(command)


def _run(command: Command) -> int:
    cli = parse(command)
    chosen = updates_for_own_data(command, cli)
    collects = cli.datamodule.online.env_steps
    if collects:
        if "trainer.max_steps" in {name for name, _ in command.flags}:
            raise UsageError(
                "--trainer.max_steps and --data.online.env_steps were given; expected one of the two, as environment "
                "steps say how many updates there are. Leave --trainer.max_steps out."
            )
        cli.config.trainer.max_steps = -1  # as the data plan
    options = dict(cli.config_init.trainer)
    origin = Origin(
        config=cli.settings_file(),
        command=shlex.join(["python", "-m", "offpolicy.fit", *sys.argv[1:]]),
        lines=recipe_notes(command, cli.config) + ([screen.line("note", chosen)] if chosen else []),
    )
    options.pop("max_steps")
    options |= {"logger": cli.loggers} if cli.loggers else {}
    max_steps = cli.config.trainer.max_steps
    seed_given = "seed_everything" in {*command.settings, *(name for name, _ in command.flags)}
    result = api.fit(
        cli.model,
        cli.datamodule,
        max_steps=None if max_steps == -1 else max_steps,
        seed=cli.config.seed_everything if seed_given else None,
        seeds=cli.config.seeds,
        folder=cli.config.folder,
        root=cli.config.root,
        ckpt_path=cli.config.ckpt_path,
        origin=origin,
        **options,
        **asdict(cli.config_init.run),
    )
    return 128 + result.interrupted if result.interrupted else 0


def updates_for_own_data(command: Command, cli: FitCLI) -> str:
    """Choose the number of updates by the size of data that no recipe is for, unless the user said it.

    About 100 epochs, but at least 10,000 updates and at most the 1,000,000 of known tasks.

    Returns:
        A sentence for the first screen; empty where nothing was chosen.
    """
    said = "trainer.max_steps" in {*command.settings, *(name for name, _ in command.flags)}
    if said or not command.own_data or not isinstance(cli.model, OfflineModule):
        return ""
    with quiet():
        rows = cli.datamodule.load().num_steps
    wanted = math.ceil(EPOCHS * rows / CommonOptions.of(cli.model.hparams).batch_size)
    cli.config.trainer.max_steps = min(max(wanted, LEAST_STEPS), MAX_STEPS)
    return (
        f"{EPOCHS} epochs of {rows:,} steps, within {LEAST_STEPS:,} and {MAX_STEPS:,} updates, as no recipe is for "
        "these data; --trainer.max_steps says otherwise."
    )


def with_own_updates(command: Command, args: list[str], method: type[Module]) -> list[str]:
    """The arguments of ``--print_config`` with the number of updates that the run would make of data of the user's own,
    after a comment on it; other arguments as they are."""
    rest = [arg for arg in args if not arg.startswith("--print_config")]
    if rest == args or not command.own_data:
        return args
    cli = FitCLI(rest, method)
    if chosen := updates_for_own_data(command, cli):
        print(f"# trainer.max_steps: {chosen}")
        return [*args, f"--trainer.max_steps={cli.config.trainer.max_steps}"]
    return args


def parse(command: Command) -> FitCLI:
    """Check the options against the method's signature, then types, then build method and data.

    Raises:
        UsageError: one sentence naming the option, what was found and what is expected.
        SystemExit: after printed help or settings.
    """
    with speaking(command.words):
        return _parse(command)


def _parse(command: Command) -> FitCLI:
    method = import_class(command.method)
    if not (isinstance(method, type) and issubclass(method, Module)):
        raise UsageError(
            f"`model` is {command.method}; expected a subclass of offpolicy.OfflineModule or LanguageModule."
        )
    data_class = method.data_class_for(options_of_method(command))
    if command.texts is not None:
        check_kind(command, method)
    helping = any(name in ("help", "model.help") for name, _ in command.flags)
    loggers = ""
    if helping:
        args = command.parser_args
    else:
        known = {"model": method_options(method), "data": option_types(data_class), "trainer": option_types(Trainer)}
        known["run"] = {f.name: str(f.type) for f in fields(RunOptions)}
        if None in known["model"].values():  # **kwargs: the parser knows more
            del known["model"]
        check_options([*command.settings, *(name for name, _ in command.flags)], known, method.__name__)
        take_whole_numbers(command, known)
        loggers = take_loggers(command)
        args = ["--config", json.dumps(nested(command.settings)), *command.parser_args]
    signal_handler = signal.getsignal(signal.SIGTERM)
    try:
        with quiet(), only_allowed_names():
            args = with_own_updates(command, args, method)
            made = FitCLI(args, method, None if "seeds" in command.settings else 0, data_class)
    except ArgumentError as error:
        raise UsageError(one_sentence(str(error), known)) from None
    finally:
        signal.signal(signal.SIGTERM, signal_handler)
    check_replaced(command, made)
    made.loggers = loggers
    for name in ("folder", "ckpt_path"):  # the parser takes a folder that is called null for none
        given = [value for flag, value in command.flags if flag == name] or [command.settings.get(name)]
        made.config[name] = given[-1]
    return made


def take_whole_numbers(command: Command, known: Mapping[str, Mapping[str, str | None]]) -> None:
    """Let options of whole numbers take 1e6 and 4.0; other options keep what they were given, as names may look so."""

    def taken(name: str, value: Any) -> Any:
        group, _, option = name.partition(".")
        kind = "int" if group not in known and option else known.get(group, {}).get(option)
        return whole_text(value) if name == "seed_everything" or is_whole_type(kind) else value

    command.flags = [(name, taken(name, value)) for name, value in command.flags]
    command.settings = {name: taken(name, value) for name, value in command.settings.items()}


def take_loggers(command: Command) -> str:
    """Take the short names of loggers out of a command, which the parser does not know; empty where there are none.

    Raises:
        UsageError: a name that is none and no class either.
    """
    given = [value for name, value in command.flags if name == LOGGER] or [command.settings.get(LOGGER)]
    names = short_names(given[-1])
    if names is None or not all(name in LOGGERS or resembles_logger(name) for name in names):
        return ""
    for name in names:
        check_choice(LOGGER, name, LOGGERS)
    command.flags = [pair for pair in command.flags if pair[0] != LOGGER]
    command.settings.pop(LOGGER, None)
    return ",".join(names)


def check_replaced(command: Command, cli: FitCLI) -> None:
    """Raise :class:`UsageError` for an option that was typed with its default and that a variant has set otherwise."""
    for name, value in getattr(cli.model, "of_variant", {}).items():
        typed = f"model.{name}" in {flag for flag, _ in command.flags}
        given = cli.config.model.init_args.as_dict().get(name)
        if typed and given != value:
            raise UsageError(
                f"--model.{name} is {given}, the default, in whose place the variant '{cli.model.hparams.variant}' has "
                f"{value}; expected another value, or none. Leave it out, or name the variant's parts in "
                "--model.objective without it."
            )


def resembles_logger(name: str) -> bool:
    """Whether a word is the short name of a logger, misspelt."""
    return name.isidentifier() and not name.endswith("logger") and name not in ("true", "false", "null", "none")


def check_classes(config: Mapping[str, Any]) -> None:
    """Every class that the parser would make and that a file names.

    Raises:
        UsageError: one that is not trusted.
    """
    for key, value in config.items():
        rest = value.get("init_args") if key == "model" and isinstance(value, Mapping) else value
        for path in class_paths(rest):
            check_class(path, key, of_trainer=key == "trainer")


def class_paths(value: Any) -> Iterator[Any]:
    """The ``class_path`` of every class in nested settings."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from class_paths(part)


@contextlib.contextmanager
def only_allowed_names() -> Iterator[None]:
    """Let the parser import nothing that a file may not name.

    With versions of the parser that cannot promise it, :func:`offpolicy.trust.check_settings` and
    :func:`check_classes` check alone.
    """
    settings, now = getattr(jsonargparse._common, "parsing_settings", {}), words()
    before, known = dict(settings), inspect.signature(jsonargparse.set_parsing_settings).parameters
    rules: dict[str, Any] = {"instantiate_subclass_spec_in_any": False}
    if ALL not in now.packages:
        names = {name for name in now.names if NAME.fullmatch(name) and ":" not in name}
        allowed = {*OWN, "lightning", *now.packages, *names} - {"jsonargparse"}
        rules |= {"import_path_denylist": ["*"], "import_path_allowlist": sorted(allowed)}
    try:
        if rules := {name: rule for name, rule in rules.items() if name in known}:
            jsonargparse.set_parsing_settings(**rules)
        yield
    finally:
        settings.update(before)


def check_kind(command: Command, method: type[Module]) -> None:
    """Refuse data of the other world: texts for a control method, or steps for a language model."""
    if (method.data_class() is DataModule) == (not command.texts):
        return
    name, data = method.__name__, command.settings["data.name"]
    if command.texts:
        table = file_type(Path(data)).removesuffix(".gz") in TABLES
        raise UsageError(
            f"{name} is a control method and {data} is read as texts; expected steps. "
            + (f"{IN_A_TABLE} " if table else "")
            + "For texts choose a method of language models, such as DPO."
        )
    raise UsageError(
        f"{name} tunes a language model on texts"
        + (f", which {data} does not hold" if command.data_given else " and needs --data")
        + "; expected a .jsonl, .json, .parquet or .arrow file, a folder written by `datasets`, or a hub id org/name."
    )


def options_of_method(command: Command) -> dict[str, Any]:
    """What a command says of the options of the method, as text where it was typed."""
    given = {**command.settings, **dict(command.flags)}
    return {name.removeprefix("model."): value for name, value in given.items() if name.startswith("model.")}


def method_options(method: type) -> dict[str, str | None]:
    """The options of a method by name, with the options of its base class that ``**kwargs`` stand for."""
    found: dict[str, str | None] = {}
    for cls in method.__mro__:
        if "__init__" in vars(cls):
            found = option_types(cls) | {k: v for k, v in found.items() if v is not None}
            if None not in found.values():
                break
    return found


def option_types(cls: type) -> dict[str, str | None]:
    """Option → its type as written, of a class; None for ``**kwargs``. Fields of a dataclass as ``option.field``."""
    found: dict[str, str | None] = {}
    for name, p in inspect.signature(cls).parameters.items():
        found[name] = None if p.kind is p.VAR_KEYWORD else inspect.formatannotation(p.annotation).strip("'")
        if is_dataclass(p.default):
            found |= {f"{name}.{f.name}": str(f.type) for f in fields(p.default)}
    return found


def one_sentence(message: str, known: Mapping[str, Mapping[str, str | None]]) -> str:
    """The parser's nested report as one sentence: option, found, expected."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    found = re.findall(r"Got value: (.*)|Given value: (?!NestedArg|Namespace)(.*)", message)
    if not keys:
        return " ".join(message.split())
    key = f"model.{keys[-1]}" if keys[0] == "model" and len(keys) > 1 else keys[-1]
    group, _, option = key.partition(".")
    types = known.get(group, {})
    expected = (
        types.get(option, types.get(option.split(".")[0])) if option else {"seed_everything": "int"}.get(key, "str")
    )
    if not (found and expected):
        plain = re.compile(r"Expected a <class|Subtypes|Errors:|Given value|Parser key|Does not validate")
        details = [text.strip(" -") for text in message.splitlines() if text.strip() and not plain.search(text)]
        return f"--{key} cannot be used: {' '.join(details)}"
    value = next((text for text in found[0] if text), "")
    one = re.match(r"(list|tuple)\[", expected) and not value.startswith(("[", "("))
    listed = f" A list is written in brackets: --{key} '[{value}]'." if one else ""
    expected = PLAINLY.get(key, expected)
    help_ = "model.help" if group == "model" else "help=all"
    return f"--{key} is '{value}'; expected {expected}.{listed} See --{help_}."


def unmade(error: Exception) -> str:
    """Why a part of the Trainer, such as a logger, could not be made, from the parser's report."""
    text = str(error)
    named = re.search(r"class_path '([^']+)'", text)
    part = named[1].rpartition(".")[2] if named else "a part of the Trainer"
    absent = re.search(r"Requirement '([\w.-]+)|No module named '([\w-]+)|pip install (?:-U )?'?([\w.-]+)", text)
    if absent:
        package = next(name for name in absent.groups() if name)
        return (
            f"{part} needs {package}, which is not installed. Install it: pip install {package}; or leave {part} out."
        )
    lines = [line.strip(" -") for line in text.splitlines()]
    reasons = [after for before, after in pairwise(lines) if "class_path" in before] or lines
    return f"{part} cannot be made: {' '.join(reasons[0].split())[:300]} Correct its options, or leave it out."


PLAINLY = {  # option → what it takes, where its type would fill the screen
    "trainer.logger": "false, or the import path of a logger, such as lightning.pytorch.loggers.CSVLogger with "
    "--trainer.logger.save_dir DIR",
    "trainer.precision": "one of '32-true', 'bf16-mixed', 'bf16-true' and '64-true'",
    "trainer.callbacks": "the import path of a callback, such as lightning.pytorch.callbacks.LearningRateMonitor",
}


def recipe_notes(command: Command, config: Any) -> list[str]:
    """Recipe and notes for the first screen."""
    if command.recipe is None:
        name = command.method.rpartition(".")[2]
        shown = [screen.line("recipe", f"none for {name} on these data: the defaults of the class and of --run")]
        shown = shown if command.settings["recipe"] == "auto" else []
    else:
        used = {f"model.{k}": v for k, v in config.model.init_args.items()}
        used |= {f"{group}.{k}": v for group in ("run", "data", "trainer") for k, v in config[group].items()}
        shown = screen.recipe_lines(command.recipe, used)
    return shown + [screen.line("note", note) for note in command.notes]
