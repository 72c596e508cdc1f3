"""What a sweep is to run: methods by data by settings by seeds, read from YAML and flags with one meaning."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from offpolicy.cli.arguments import SettingsLoader, check_options
from offpolicy.data.names import resolve
from offpolicy.errors import UsageError, check_range, check_whole_number, nearest
from offpolicy.files import method_folder
from offpolicy.given import expanded, seed_numbers, seeds_text
from offpolicy.registry import class_path

OWN = ("model", "data", "data.name", "seed_everything", "seed", "seeds", "folder", "root", "ckpt_path")  # not settings
LENGTH = "trainer.max_steps"  # not part of what a run is: raising it goes on with the runs there are
PRUNERS = ("none", "median", "asha")


@dataclass(frozen=True)
class Search:
    """A search for settings by Optuna.

    Attributes:
        space: option → ``{low, high, log}`` or a list of choices.
        trials: settings that are tried, ≥ 1, for each method and data.
        pruner: "median" or "asha", which end a trial whose first seed falls behind at an evaluation, or "none".
        seeds: of each trial, for which its score is the mean of the last evaluations. Report other seeds than these.
    """

    space: dict[str, Any]
    trials: int = 20
    pruner: str = "median"
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        check_range("search.trials", self.trials, 1)
        if self.pruner not in PRUNERS:
            raise UsageError(f"`search.pruner` is {self.pruner!r}; expected one of {', '.join(PRUNERS)}.")


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is to run, and how.

    Attributes:
        methods, data, seeds: which runs; every combination is one.
        set: settings of all runs by dotted name.
        grid: dotted name → values; every combination is tried. ``IQL.expectile`` is ``model.expectile`` of IQL alone.
        folder: where the runs lie.
        workers: processes at a time, ≥ 1.
        threads: of each; None shares out the processors.
        retries: how often a run that failed is tried again, ≥ 0.
        timeout_s: seconds after which a run is stopped, with its checkpoint, and counts as failed; None for no end.
        pack: whether seeds of one setting share a process, where the method can.
        search: in place of a grid.
    """

    methods: tuple[str, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    folder: Path = Path("runs/sweep")
    workers: int = 1
    threads: int | None = None
    retries: int = 1
    timeout_s: float | None = None
    pack: bool = True
    search: Search | None = None


@dataclass(frozen=True)
class RunCell:
    """One run of a plan: a method on data with settings and a seed.

    Attributes:
        method, data, seed: of the run.
        settings: by dotted name.
        folder: of the run.
    """

    method: str
    data: str
    seed: int
    settings: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder.parent.parent.name}/{self.folder.parent.name}/{self.folder.name}"

    @property
    def updates(self) -> int | None:
        """How many the plan asks for; None leaves that to the recipe."""
        wanted = self.settings.get(LENGTH)
        return None if wanted is None else int(float(wanted))


def read_plan(path: Path | None, given: Mapping[str, Any]) -> SweepPlan:
    """The plan of a YAML file with what was given on top.

    Args:
        path: of the file; None for none.
        given: fields of :class:`SweepPlan` as the file has them; None leaves one to the file.

    Raises:
        UsageError: an unknown field, method, option or data set, or a value that cannot be.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.load(path.read_text("utf-8"), SettingsLoader)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{path} cannot be read as a plan: {reason}. Correct the file.") from None
        if not isinstance(loaded, Mapping):
            raise UsageError(f"{path} holds {type(loaded).__name__}; expected fields such as `methods:` and `data:`.")
        raw = dict(loaded)
    raw |= {name: value for name, value in given.items() if value is not None}
    known = [one.name for one in fields(SweepPlan)]
    for name in raw:
        if name not in known:
            raise UsageError(f"a plan has no `{name}`; expected one of {', '.join(known)}.{nearest(str(name), known)}")
    for name in ("methods", "data"):
        if not raw.get(name):
            raise UsageError(f"the plan names no `{name}`; expected at least one. Pass --{name}.")
    plan = SweepPlan(
        methods=tuple(_method(str(name)) for name in _many(raw["methods"])),
        data=tuple(str(_named(str(name))) for name in _many(raw["data"])),
        seeds=seed_numbers(_seeds(raw.get("seeds", (0,)))),
        set=_settings("set", raw.get("set") or {}),
        grid={key: tuple(_many(values)) for key, values in _settings("grid", raw.get("grid") or {}).items()},
        folder=_folder(raw.get("folder", "runs/sweep")),
        workers=_whole("workers", raw.get("workers", 1), 1),
        threads=None if raw.get("threads") is None else _whole("threads", raw["threads"], 1),
        retries=_whole("retries", raw.get("retries", 1), 0),
        timeout_s=None if raw.get("timeout_s") is None else _seconds("timeout_s", raw["timeout_s"]),
        pack=_flag("pack", raw.get("pack", True)),
        search=_search(raw.get("search")),
    )
    for key, values in plan.grid.items():
        if not values:
            raise UsageError(f"`grid` has no value of {key}; expected at least one. Name some, or leave it out.")
    if LENGTH in plan.grid or (plan.search is not None and LENGTH in plan.search.space):
        raise UsageError(
            f"`{LENGTH}` is to be varied, and a run is the same run at every length; expected one length. Set it with "
            "`set`, and raise it to go on."
        )
    if plan.search is not None and plan.grid:
        raise UsageError("the plan has both `grid` and `search`; expected one of the two. Leave one out.")
    return plan


def _method(name: str) -> str:
    """A known method by its own name, one of the user's by its import path."""
    return name if "." in name else class_path(name).rpartition(".")[2]


def _many(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _seeds(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _whole(name: str, value: Any, low: int) -> int:
    check_whole_number(name, value, low)
    return int(value)


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"`{name}` is {value!r}; expected seconds > 0.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"`{name}` is {value!r}; expected true or false.")
    return value


def _folder(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise UsageError(f"`folder` is {value!r}; expected the name of a folder.")
    return Path(expanded(str(value)))


def _named(name: str) -> str | Path:
    target = resolve(name)
    return target.name if target.path is None or not Path(expanded(name)).exists() else Path(expanded(name)).resolve()


def _settings(where: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise UsageError(f"`{where}` is {found!r}; expected options and values, such as `model.alpha: 2.5`.")
    own = next((key for key in found if key in OWN), None)
    if own is not None:
        raise UsageError(
            f"`{where}` has `{own}`, which the plan decides; expected settings. Use `methods`, `data`, `seeds` and "
            "`folder`."
        )
    return {str(key): value for key, value in found.items()}


def _search(found: Any) -> Search | None:
    if found is None or isinstance(found, Search):
        return found
    if not isinstance(found, Mapping):
        raise UsageError(f"`search` is {found!r}; expected options with their ranges, trials, pruner and seeds.")
    rest = {key: value for key, value in found.items() if key not in ("trials", "pruner", "seeds")}
    named = {key: found[key] for key in ("trials", "pruner") if key in found}
    for key, space in _settings("search", rest).items():
        many = isinstance(space, (list, tuple)) and space
        if not (many or (isinstance(space, Mapping) and {"low", "high"} <= set(space) <= {"low", "high", "log"})):
            raise UsageError(
                f"`search` has {key}: {space!r}; expected a list of choices or low, high and log. For example "
                "model.alpha: {low: 0.1, high: 10, log: true}."
            )
        rest[key] = space if many else _span(key, **{"log": False, **space})
    if not rest:
        raise UsageError("`search` names no option; expected at least one, such as model.alpha: [1, 2.5].")
    return Search(dict(rest), seeds=seed_numbers(_seeds(found.get("seeds", (0,)))), **named)


def number(value: Any) -> Any:
    """A number that YAML takes for text, such as 1e-3; anything else as it is."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _span(key: str, low: Any, high: Any, log: Any) -> dict[str, Any]:
    low, high = number(low), number(high)
    numbers = not any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in (low, high))
    if not (numbers and -math.inf < low < high < math.inf and isinstance(log, bool) and (low > 0 or not log)):
        raise UsageError(
            f"`search` has {key} from {low!r} to {high!r} with log {log!r}; expected numbers, low < high, and low > 0 "
            "where log is true."
        )
    return {"low": low, "high": high, "log": log}


def settings_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that concern a method: ``IQL.beta`` is ``model.beta`` of IQL and of no other."""
    found = {}
    for key, value in settings.items():
        group, _, option = key.partition(".")
        if group in ("model", "data", "run", "trainer") or not option:
            found[key] = value
        elif class_path(group).rpartition(".")[2] == method.rpartition(".")[2]:
            found[f"model.{option}"] = value
    check_options(found, {"run": _run_options()})
    return found


def _run_options() -> list[str]:
    from offpolicy.training.options import RunOptions

    return [one.name for one in fields(RunOptions)]


def cells_of(plan: SweepPlan) -> list[RunCell]:
    """Every run of a plan, once, in the order of data, methods, settings and seeds."""
    found: dict[Path, RunCell] = {}
    for data, method in itertools.product(plan.data, plan.methods):
        for values in itertools.product(*plan.grid.values()):
            settings = settings_of(method, plan.set | dict(zip(plan.grid, values)))
            for seed in plan.seeds:
                one = cell_of(plan, method, data, settings, seed)
                found.setdefault(one.folder, one)  # a grid of another method's option makes the same run again
    return list(found.values())


def cell_of(plan: SweepPlan, method: str, data: str, settings: Mapping[str, Any], seed: int) -> RunCell:
    """One run, in the folder that its method, data and settings have, whatever else is in the plan."""
    defining = {key: value for key, value in sorted(settings.items()) if key != LENGTH}
    text = json.dumps([method, data, defining], sort_keys=True, default=str)
    mark = f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}" if defining else ""
    parent = method_folder(plan.folder, Path(data).name if Path(data).is_absolute() else data, method)
    return RunCell(method, data, seed, dict(settings), parent.with_name(parent.name + mark) / f"seed{seed}")


def plan_text(plan: SweepPlan) -> str:
    """The plan as YAML, as :func:`read_plan` reads it."""
    raw = asdict(plan) | {"folder": str(plan.folder), "seeds": seeds_text(plan.seeds)}
    raw |= {"grid": {key: list(values) for key, values in plan.grid.items()}}
    raw |= {"methods": list(plan.methods), "data": list(plan.data)}
    if plan.search is not None:
        one = plan.search
        raw["search"] = one.space | {"trials": one.trials, "pruner": one.pruner, "seeds": seeds_text(one.seeds)}
    return yaml.safe_dump({key: value for key, value in raw.items() if value is not None}, sort_keys=False)


def commands_of(cells: Sequence[RunCell]) -> list[str]:
    """Options of ``fit`` of a run that begins."""
    first = cells[0]
    options = ["--model", first.method, "--data", first.data]
    for key, value in first.settings.items():
        options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return options
