"""The Python interface: ``fit``, ``load``, ``evaluate`` and ``sample``. The command line takes the same path."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shlex
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from offpolicy.compute.processes import ProcessLost, claimed, end_together, is_first_process, is_loss
from offpolicy.data.module import DataModule
from offpolicy.data.names import resolve
from offpolicy.data.replay import Replay
from offpolicy.diffusion.drawing import sample
from offpolicy.diffusion.pool import Pool
from offpolicy.environments.make import EVAL_SEED
from offpolicy.errors import DataError, UsageError, nearest
from offpolicy.evaluation.order import make_order
from offpolicy.evaluation.rollout import EvalResult, Evaluator
from offpolicy.evaluation.scores import has_score, interval, normalized_score, score_kind, summarize
from offpolicy.files import Table, atomic_write, unique_run_folder
from offpolicy.given import place, plain, refuse_half, seed_number, whole
from offpolicy.training import screen
from offpolicy.training.bar import UpdateBar
from offpolicy.training.checkpoint_io import AtomicCheckpointIO
from offpolicy.training.checkpoints import (
    KEY,
    newest_checkpoint,
    own_folder,
    plain_hparams,
    read_checkpoint,
    resolve_checkpoint,
    run_of,
    to_plain,
)
from offpolicy.training.goals import GoalModule
from offpolicy.training.headlines import scores_line
from offpolicy.training.lightning_private import stop_watching
from offpolicy.training.measurement import Evaluation, EvaluationFailed
from offpolicy.training.module import Module
from offpolicy.training.offline import OfflineModule
from offpolicy.training.opening import load, own_state
from offpolicy.training.options import RunOptions
from offpolicy.training.run_folder import RunFolder
from offpolicy.training.run_log import RunLog, scores_of
from offpolicy.training.seeds import over_seeds
from offpolicy.trust import Trust, names_in, names_of, trusting

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


Loadable = str | Path | Replay | Mapping[str, Any] | Sequence[Mapping[str, Any]] | DataModule


@dataclass
class FitResult:
    """What a fit leaves behind.

    Attributes:
        method: the trained method.
        folder: of the run.
        scores: the last evaluation by short name (``score``, ``score_std``, ``score_best``, ``return_mean``, …; "std"
            over episodes); empty without an environment.
        updates: trained in all.
        interrupted: the signal that ended the run early, 0 when none did.
    """

    method: Module
    folder: Path
    scores: dict[str, float]
    updates: int
    interrupted: int = 0


@dataclass
class Origin:
    """Where a run comes from: what its folder keeps so that it can be repeated, and lines for the first screen."""

    config: str | None = None
    command: str = ""
    lines: list[str] = field(default_factory=list)


def fit(
    method: Module,
    data: Loadable,
    *,
    max_steps: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    root: str | Path = "runs",
    ckpt_path: str | Path | None = None,
    verbose: bool = True,
    origin: Origin | None = None,
    trust: Trust = None,
    **options: Any,
) -> FitResult:
    """Train a method and keep a run folder with settings, curves and checkpoints.

    Args:
        method: e.g. ``offpolicy.TD3BC(alpha=2.5)``.
        data: a known name, a file, a :class:`Replay`, a dict of arrays, or a :class:`DataModule`.
        max_steps: updates in all, ≥ 1; counts those of the checkpoint. None only for language models: ``epochs`` says.
        seed: of weights, batches and noise.
        folder: of the run; ``<root>/<data>/<method>/seed<seed>-<n>`` when None.
        root: folder of run folders.
        ckpt_path: continue from "last" (the newest run of this method, data and seed under ``root``), a run folder or a
            checkpoint file. The newest checkpoint of a run continues in its own folder, an older one in a new folder.
        verbose: print the first screen, a bar and the result.
        origin: what the command line adds; leave it out.
        trust: packages whose code may run because a data file names it, such as an environment ``package:Id`` (a list,
            or True for all); None for those of this library alone.
        options: fields of :class:`RunOptions` (``eval_every=1000``) and arguments of Lightning's ``Trainer``
            (``accelerator="gpu"``, ``callbacks=[…]``).

    Raises:
        UsageError: options or settings that cannot work.  DataError: data that cannot be trained on.
        WriteError: the folder cannot be written.
    """
    run = {f.name: options.pop(f.name) for f in fields(RunOptions) if f.name in options}
    known = [f.name for f in fields(RunOptions)] + list(inspect.signature(Trainer).parameters)
    for name in options:
        if name not in known:
            raise UsageError(f"fit has no option `{name}`; expected a RunOptions or Trainer one.{nearest(name, known)}")
    options = {name: plain(value) for name, value in options.items()}
    max_steps = None if max_steps is None else whole("trainer.max_steps", max_steps, 1)
    seed, root = seed_number(seed), place("root", root)
    folder = None if folder is None else place("folder", folder)
    if method.trains_on_texts and options.get("max_epochs") not in (None, -1):
        raise UsageError(
            f"`trainer.max_epochs` is {options['max_epochs']}; expected none, as passes over the data are an option of "
            "the method: --model.epochs."
        )
    first, origin = is_first_process(), origin or Origin()
    kind = method.data_class()
    if isinstance(data, (str, Path)):
        module = kind(str(data))
    else:
        module = kind.of(data) if isinstance(data, Replay) else load_data(data)
    renewable(module)
    method.run, method.seed = RunOptions(**method.run_defaults | run), seed
    method.bind_data(module)

    with trusting(trust), quiet(), forget_if_empty() as made, contextlib.ExitStack() as running:
        seed_everything(seed % 2**32, workers=True, verbose=False)
        if first:
            module.load()  # before anything is written, as data may be faulty
        if max_steps is None:
            max_steps = method.planned_steps(module)
            if max_steps is None:
                raise TypeError("fit has no `max_steps`; expected the number of updates, e.g. max_steps=10000.")
        checkpoint, changed, target = None, "", folder
        if ckpt_path is not None:
            checkpoint = resolve_checkpoint(
                ckpt_path,
                root=root,
                data=data_name(module),
                method=type(method).__name__,
                seed=seed,
                fingerprint=lambda: module.load().fingerprint(),
            )
            updates, changed = check_same_method(method, checkpoint)
            origin.lines += [screen.line("changed", changed)] if changed else []
            if target is not None and newest_checkpoint(target) and not target.samefile(run_of(checkpoint)):
                raise UsageError(
                    f"`folder` is {target}, which holds another run than {checkpoint}; expected a new folder. "
                    "Pass one, or leave it out."
                )
            target = target or own_folder(checkpoint)
            if updates >= max_steps:
                with trusting(names=names_of(method) | names_in(module.settings())):
                    return already_done(method, checkpoint, updates, max_steps, verbose and first)
        elif target is not None and newest_checkpoint(target):  # never two runs in one
            raise UsageError(
                f"`folder` is {target}, which holds a run; expected a new one. Pass it as `ckpt_path` to continue it."
            )
        if first:
            if target is None:
                target = unique_run_folder(root, data_name(module), type(method).__name__, seed)
                made += [target, *target.parents[:2]]
            running.enter_context(claimed(target))
            if checkpoint is not None:
                keep_earlier_rows(checkpoint, updates, target)
        files = RunFolder(target or root)  # other processes are told the folder by the first
        start = Start(files, origin, module, options, verbose)
        shows = verbose and options.get("enable_progress_bar") in (None, True)
        method.run_log = RunLog(bar=UpdateBar() if shows else None)
        trainer = make_trainer(files.folder, max_steps, options, [start, files], bar=False)
        began = time.perf_counter()
        try:
            with clear_errors():
                trainer.fit(method, datamodule=module, ckpt_path=checkpoint, weights_only=True)  # type: ignore[arg-type]
        except EvaluationFailed as error:
            raise EvaluationFailed(f"{error} Go on with: {resume_words(files.folder, origin)}") from error.__cause__
        except RuntimeError as error:
            if is_loss(error):
                stop_watching()
                then = (
                    f"Go on with: {resume_words(files.folder, origin)}"
                    if newest_checkpoint(files.folder)
                    else ("No checkpoint was written yet, so start it again.")
                )
                raise ProcessLost(f"Another process of the run has ended, so it cannot go on. {then}") from error
            if "loading state_dict" not in str(error):
                raise
            raise UsageError(
                f"{checkpoint} has other networks than the method now ({changed or 'its code changed'}); expected the "
                "same. Pass the settings of the run it comes from."
            ) from None

    found = method.run_log
    result = FitResult(method, files.folder, found.scores(), trainer.global_step, found.interrupted_by)
    if trainer.is_global_zero and not result.interrupted:
        method.finish_files(result.folder)
    if verbose and trainer.is_global_zero:
        seconds = time.perf_counter() - began
        resume_or_none = resume_words(result.folder, origin) if result.interrupted else None
        look = start.look.format(folder=shlex.quote(str(result.folder)))
        lines = screen.last_lines(
            result.folder, result.scores, result.updates, seconds, resume_or_none, look, found.failed
        )
        print(lines, flush=True)
    if result.interrupted:
        stop_watching()
        end_together()
    return result


def load_data(data: Loadable = "pendulum-stitch-v0", **options: Any) -> DataModule:
    """Open data for training.

    Args:
        data: a known name, a file or folder, a :class:`Replay`, a dict of arrays (``obs action reward terminated`` and
            optionally ``next_obs episode_end``; D4RL's names work too), or a list of such dicts, one for each episode.
        options: as of :class:`DataModule` (``source`` and ``synthetic`` for a replay), for arrays those of
            :func:`offpolicy.data.sources.from_arrays`.

    Returns:
        A data module; ``.replay`` is the open replay.

    Raises:
        UsageError: an unknown name.  DataError: data that cannot be trained on.
    """
    if isinstance(data, DataModule):
        return data
    if isinstance(data, Replay):
        left = [name for name in options if name not in ("source", "synthetic")]
        if left:
            raise UsageError(
                f"`{left[0]}` was given for a replay, which is open and checked; expected `source` or `synthetic` "
                "alone. Pass it where the replay is opened, or set its `meta`."
            )
        module = renewable(DataModule(str(data.meta.get("name", "arrays")), **options))
        module.replay = data
        return module
    if not isinstance(data, (str, os.PathLike)):
        from offpolicy.data.sources import from_arrays

        return DataModule.of(from_arrays(data, **options))
    module = renewable(DataModule(os.fspath(data), **options))
    module.load()
    return module


def renewable(data: DataModule) -> DataModule:
    """The data module with what draws its data anew, should its ``source`` ask for that."""
    data.renewer = data.renewer or Pool
    return data


def evaluate(
    method: Module | str | Path,
    *,
    episodes: int = 10,
    seed: int = EVAL_SEED,
    num_envs: int | None = None,
    temperature: float = 0.0,
    trust: Trust = None,
) -> dict[str, Any]:
    """Play episodes in the environment of the data a method was trained on.

    Args:
        method: a trained method, a run folder or a checkpoint file.
        episodes: how many, ≥ 1; of each task where the data come with tasks (OGBench's published numbers have 50).
        seed: episode k starts from ``seed + k``; the default repeats the start states of training's evaluations.
        num_envs: environments kept open; changes the speed only.
        temperature: of goal-conditioned policies: factor of the standard normal noise on their means, ≥ 0.
        trust: as of :func:`load`.

    Returns:
        ``return_mean return_std length_mean score score_std success_rate`` as far as they exist ("std" over episodes),
        ``score_interval`` (half of the 95 % interval of the mean), ``score_kind``, and per episode ``returns lengths``.
        With tasks also ``success_mean success_interval success_task1 …`` and, where the method learns values and there
        are trajectories to measure on, ``order_consistency``. Of a method with several seeds each plays the same
        episodes by itself: the numbers are means over seeds, ``<name>_seed<seed>`` are those of each,
        ``score_interval`` is that of the mean over seeds, and ``returns lengths`` are one list per seed.

    Raises:
        UsageError: no environment is known or installed, or it does not match the data.
    """
    method = method if isinstance(method, Module) else load(method, trust=trust)
    if not isinstance(method, OfflineModule):
        raise UsageError(
            f"{type(method).__name__} tunes a language model, which plays no episodes; expected a control method. Its "
            "held-out numbers are in evals.csv of the run."
        )
    meta, given = method.data_meta, {}
    if temperature:
        if not isinstance(method, GoalModule):
            raise UsageError(
                f"`temperature` is {temperature}, but {type(method).__name__} acts by one action per observation; "
                "expected 0, or a goal-conditioned method."
            )
        given = {"temperature": temperature}
    with trusting(trust):
        evaluator = Evaluator(meta, method.sizes, episodes=episodes, seed=seed, num_envs=num_envs)
        order = make_order(meta, method.option("subgoal_steps", 25)) if isinstance(method, GoalModule) else None
    results: list[EvalResult] = []

    def play(single: OfflineModule) -> dict[str, float]:
        result = evaluator.run(single.agent(**given))
        results.append(result)
        found = summarize(result, meta) | (order(single.value_of) if isinstance(single, GoalModule) and order else {})
        if "success_interval" in found:
            found["score_interval"] = 100.0 * found["success_interval"]
        elif has_score(meta):
            scores = normalized_score(result.returns, meta["ref_min_score"], meta["ref_max_score"])
            found["score_interval"] = interval(scores)
        return found

    try:
        numbers: dict[str, Any] = over_seeds(method, play)
    finally:
        evaluator.close()
    if method.seeds and "score" in numbers:  # how far seeds differ, which says more than episodes of one
        numbers["score_interval"] = interval(np.array([numbers[f"score_seed{k}"] for k in method.seeds]))
    returns, lengths = ([getattr(r, name).tolist() for r in results] for name in ("returns", "lengths"))
    return numbers | {
        "score_kind": score_kind(meta),
        "episodes": episodes,
        "seed": seed,
        **({"seeds": list(method.seeds)} if method.seeds else {}),
        "returns": returns if method.seeds else returns[0],
        "lengths": lengths if method.seeds else lengths[0],
    }


# -- the Trainer -------------------------------------------------------------------------------------------------------


def make_trainer(
    folder: Path, max_steps: int, options: Mapping[str, Any], callbacks: list[Any], *, bar: bool = True
) -> Trainer:
    """A Trainer with the files, bar and checkpoints of this library; ``options`` that are None keep the default."""
    given = TRAINER_DEFAULTS | {k: v for k, v in options.items() if v is not None}
    if "default_root_dir" in given:
        raise UsageError("`trainer.default_root_dir` is the run folder here; use `folder`: --folder DIR.")
    refuse_half(given.get("precision"))  # on a CPU Lightning would silently take another
    own = _as_list(given.pop("callbacks", None))
    bars = [UpdateBar()] if bar and given.get("enable_progress_bar", True) else []
    given["enable_progress_bar"] = bool(bars)
    given["plugins"] = [*_as_list(given.pop("plugins", None)), AtomicCheckpointIO()]
    if given.get("strategy") == "fsdp2":
        from offpolicy.language.sharding import FullySharded

        given["strategy"] = FullySharded()
    if given.get("accelerator", "auto") == "auto":
        given["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"  # "mps" has no float64
    given |= {"max_steps": max_steps, "default_root_dir": str(folder), "callbacks": [*own, *bars, *callbacks]}
    with clear_errors(ValueError, TypeError, ModuleNotFoundError):
        return Trainer(**given)


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
        atomic_write(folder / "config.yaml", config)
        atomic_write(folder / "versions.json", json.dumps(to_plain(screen.versions(pl_module)), indent=2) + "\n")
        command = folder / "command.txt"
        earlier = command.read_text() if command.exists() else ""
        called = self.origin.command or "offpolicy.fit(...) from Python"
        atomic_write(command, f"{earlier}{called}  # from update {trainer.global_step}\n")
        pl_module.keep_files(folder)
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
        "seed_everything": method.seed,
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


# -- continuing --------------------------------------------------------------------------------------------------------


def resume_words(folder: Path, origin: Origin) -> str:
    """The command, or the call in Python, that continues a run."""
    if origin.command:
        return f"python -m offpolicy.fit --ckpt_path {shlex.quote(str(folder))}"
    return f'offpolicy.fit(..., ckpt_path="{folder}")'


def check_same_method(method: Module, checkpoint: Path) -> tuple[int, str]:
    """Updates in a checkpoint, whose seed the method takes, and which settings of the method have changed since.

    Raises:
        UsageError: it holds another method.
    """
    content = read_checkpoint(checkpoint)
    before, now = (
        str(own_state(content, checkpoint).get("class")),
        f"{type(method).__module__}.{type(method).__qualname__}",
    )
    if before.rpartition(".")[2] != now.rpartition(".")[2]:
        raise UsageError(f"{checkpoint} holds the method {before}; expected {now}. Pass the same method.")
    former, current = content["hyper_parameters"], plain_hparams(method.hparams)
    changed = [f"{k} {former[k]} → {current[k]}" for k in current if k in former and former[k] != current[k]]
    state = content[KEY]
    if "optimizer_states" not in content:
        raise UsageError(
            f"{checkpoint} holds weights alone, as `save` writes them; expected a checkpoint of a run, which training "
            "can go on from. Pass a run folder or a file of its checkpoints."
        )
    method.seed = state["seed"]  # the order of the data goes on
    seeds = tuple(state.get("seeds") or ())
    if method.seeds and method.seeds != seeds:
        held = f"the seeds {seeds}" if seeds else f"the seed {method.seed} alone"
        raise UsageError(
            f"{checkpoint} holds {held}, and `seeds` is {method.seeds}; expected the same. Set no `seeds`."
        )
    method.seeds = seeds
    return content["global_step"], ", ".join(changed)


def keep_earlier_rows(checkpoint: Path, updates: int, folder: Path) -> None:
    """Copy the rows up to a checkpoint from the tables of its run into the new folder it continues in."""
    for name in ("metrics.csv", "evals.csv"):
        table = run_of(checkpoint) / name
        if table.exists() and not (folder / name).exists():
            atomic_write(folder / name, table.read_bytes())
            Table(folder / name).cut(updates)


def already_done(method: Module, checkpoint: Path, updates: int, max_steps: int, verbose: bool) -> FitResult:
    """The result of a run that has nothing left to do but perhaps its last evaluation."""
    folder = own_folder(checkpoint) or run_of(checkpoint)
    trained = load(checkpoint, method=type(method))
    trained.run = method.run
    missing = is_first_process() and not last_evaluation(trained, checkpoint, folder, updates)
    rows = Table(folder / "evals.csv").rows()
    scores = scores_of(rows[-1] if rows else {})
    if verbose:
        print(
            f"{checkpoint} has {updates:,} updates and `max_steps` is {max_steps:,}: nothing to do. Raise "
            f"--trainer.max_steps to go on. {scores_line(scores)}"
        )
        if missing:
            print(screen.line("note", f"The evaluation at update {updates:,} failed; going on begins with it."))
    if is_first_process() and not (folder / "hf").exists():  # stopped between the last update and the end
        trained.finish_files(folder)
    return FitResult(trained, folder, scores, updates)


def last_evaluation(trained: Module, checkpoint: Path, folder: Path, updates: int) -> bool:
    """Whether the last evaluation of a finished run has its row; one in an environment is made now if it had failed."""
    measurement = trained.measurement()
    state = read_checkpoint(checkpoint).get("callbacks", {}).get(type(measurement).__name__, {})
    table = Table(folder / "evals.csv")
    if not state.get("outstanding") or any(row["step"] == updates for row in table.rows()):
        return True
    if not isinstance(measurement, Evaluation):
        return False
    measurement.load_state_dict(state)
    row = measurement.late(trained, updates)
    if row:
        table.append(row)
    return True


def data_name(data: DataModule) -> str:
    """The name of the data as a folder: the canonical one for known sets."""
    try:
        return resolve(str(data.name), language=hasattr(data, "bind_tokenizer")).name
    except UsageError:
        return str(data.name)


# -- surroundings ------------------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def forget_if_empty() -> Iterator[list[Path]]:
    """Remove the folders put into the list if an error comes before anything was written into them."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


__all__ = ["FitResult", "evaluate", "fit", "load", "load_data", "make_trainer", "sample"]
