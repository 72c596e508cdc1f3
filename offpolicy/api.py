"""The Python interface: ``fit``, ``load``, ``evaluate`` and ``sample``. The command line takes the same path."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer, seed_everything

from offpolicy.compute.processes import ProcessLost, end_together, is_first_process, is_loss
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.diffusion.drawing import sample
from offpolicy.diffusion.rollouts import pool_of
from offpolicy.environments.make import EVAL_SEED
from offpolicy.errors import DivergenceError, UsageError, nearest
from offpolicy.evaluation.order import make_order
from offpolicy.evaluation.rollout import EvalResult, Evaluator
from offpolicy.evaluation.scores import has_score, interval, normalized_score, score_kind, summarize
from offpolicy.given import place, plain, seeds_text, whole
from offpolicy.moved import names_of as names_moved_from
from offpolicy.training import screen
from offpolicy.training.bar import UpdateBar
from offpolicy.training.beginning import (
    Beginning,
    FitResult,
    already_done,
    check_whole,
    find_beginning,
    forget_if_empty,
    open_folder,
)
from offpolicy.training.checkpoints import checkpoint_name, newest_checkpoint, read_checkpoint
from offpolicy.training.choosing import Which, best_update
from offpolicy.training.goals import GoalModule
from offpolicy.training.joint_folder import parts_of, share_rounds
from offpolicy.training.lightning_private import stop_watching
from offpolicy.training.measurement import EvaluationFailed
from offpolicy.training.module import Module
from offpolicy.training.offline import OfflineModule
from offpolicy.training.opening import load
from offpolicy.training.options import RunOptions
from offpolicy.training.origin import Origin, Start, folder_words, resume_words
from offpolicy.training.run_folder import RunFolder
from offpolicy.training.run_log import RunLog
from offpolicy.training.seeds import chosen_seeds, over_seeds
from offpolicy.training.selecting import (
    check_held_out,
    check_select,
    held_out_words,
    hold_out_for,
    is_selected,
    select_checkpoint,
    selected_path,
    selection_words,
)
from offpolicy.training.switching import write_switch
from offpolicy.training.trainer import clear_errors, clear_restoring, make_trainer, quiet
from offpolicy.trust import Trust, names_in, names_of_method, trusting

KEPT = (
    "those that this method has already; updates, optimisers and rates begin anew. For new weights make a new method; "
    "to go on with its run pass the folder of that as `ckpt_path`"
)
Loadable = str | Path | Replay | Mapping[str, Any] | Sequence[Mapping[str, Any]] | DataModule
__getattr__ = names_moved_from("offpolicy.api")  # what else stood here in version 0.1


def fit(
    method: Module,
    data: Loadable,
    *,
    max_steps: int | None = None,
    seed: int | None = None,
    seeds: Iterable[int] | str | None = None,
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
        method: e.g. ``offpolicy.TD3BC(alpha=2.5)``. One that has been trained or loaded begins a new run with the
            weights that it has, as the first screen says.
        data: a known name, a file, a :class:`Replay`, a dict of arrays, or a :class:`DataModule`.
        max_steps: updates in all, ≥ 1; counts those of the checkpoint. None only for language models: ``epochs`` says.
        seed: of weights, batches and noise; None is 0.
        seeds: several, trained at once, each as it would be alone: ``range(8)`` or "0..7". A joint folder
            ``seeds0-7-<n>`` holds the joint run, and each seed has a run folder of its own, as if trained alone. One
            alone is as ``seed``; None is ``method.seeds``.
        folder: of the run; ``<root>/<data>/<method>/seed<seed>-<n>`` when None. Those of several seeds lie in it.
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
    run, options = split_options(options)
    max_steps = None if max_steps is None else whole("trainer.max_steps", max_steps, 1)
    first, method.seeds = chosen_seeds(seed, seeds, method.seeds)
    root, folder = place("root", root), None if folder is None else place("folder", folder)
    check_epochs(method, options)
    origin, module = origin or Origin(), data_of(method, data)
    method.run, method.seed = RunOptions(**method.run_defaults | run), first
    check_data_of_seeds(method, module)
    selecting = check_select(method, module)
    hold_out_for(method, module)
    method.bind_data(module)

    with trusting(trust), quiet(), forget_if_empty() as made, contextlib.ExitStack() as running:
        seed_everything(first % 2**32, workers=True, verbose=False)
        if is_first_process():
            module.load()  # before anything is written, as data may be faulty
        begin = find_beginning(
            method, module, seed=first, folder=folder, root=root, ckpt_path=ckpt_path, seed_given=seed is not None
        )
        saved = {} if begin.checkpoint is None else read_checkpoint(begin.checkpoint)
        module.begin_at(begin.updates, saved.get(type(module).__qualname__), method.seed or 0, method.seeds)
        max_steps = planned(method, module, max_steps)
        origin.lines += [screen.line("changed", begin.changed)] if begin.changed else []
        origin.lines += [screen.line("weights", KEPT)] if begin.checkpoint is None and method.data_meta else []
        if is_first_process():
            check_held_out(method, module, begin.data_meta)
            origin.lines += [screen.line("held out", held_out_words(module))] if module.held_out is not None else []
            origin.lines += [screen.line("select", selection_words(method, module))] if selecting else []
        if begin.checkpoint is not None and begin.updates >= max_steps:
            with trusting(names=names_of_method(method) | names_in(module.settings())):
                told = verbose and is_first_process()
                done = already_done(method, begin.checkpoint, begin.updates, max_steps, told, module)
                if is_first_process() and begin.updates == max_steps:  # with fewer steps not all of them have room
                    collected_late(done, module, saved)
                return selected_late(done, module, verbose) if is_first_process() else done
        if begin.checkpoint is not None:
            check_whole(begin.checkpoint)
        files = open_folder(begin, method, module, root, running, made, named=folder is not None)
        origin.lines += screen.lines_of_seeds(begin.folders, begin.notes)
        start = Start(files, origin, module, options, verbose)
        shows = verbose and options.get("enable_progress_bar") in (None, True)
        method.run_log = RunLog(bar=UpdateBar() if shows else None)
        trainer = make_trainer(files.folder, max_steps, options, [start, files], bar=False)
        began = time.perf_counter()
        train(trainer, method, module, begin, files, origin)
        seconds = time.perf_counter() - began
        selects = method.run.select != "none" and trainer.is_global_zero and not method.interrupted_by
        selected = select_checkpoint(method, module, files, trainer.global_step) if selects else ""
    return finished(trainer, method, files.folder, start, seconds, selected)


def selected_late(done: FitResult, data: DataModule, verbose: bool) -> FitResult:
    """A finished run with the selection that it may still owe."""
    method = done.method
    if method.run.select != "none" and not is_selected(done.folder, done.updates):
        files = RunFolder(done.folder)
        with contextlib.suppress(UsageError):  # the best stays too, where there were evaluations
            files.best_path = checkpoint_name(best_update(done.folder))
        words = select_checkpoint(method, data, files, done.updates)
        if verbose:
            print(screen.line("selected", words))
    done.selected = selected_path(done.folder)
    return done


def collected_late(done: FitResult, data: DataModule, saved: Mapping[str, Any]) -> None:
    """What a finished run collected, as a data set of its own, and its measures of the switch, where it was stopped
    before it had written them."""
    state = saved.get(type(data).__qualname__, {})
    if data.collection is None or not state.get("version"):
        return
    data.collection.save_late(state, done.folder / "replay")
    share_rounds(done.folder)
    if data.collection.switch:
        for place in (done.folder, *parts_of(done.folder).values()):
            write_switch(place, data.collection.switch)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run, and those of Lightning's Trainer.

    Raises:
        UsageError: one that is neither.
    """
    names = [f.name for f in fields(RunOptions)]
    run = {name: options[name] for name in names if name in options}
    rest = {name: plain(value) for name, value in options.items() if name not in run}
    known = [*names, *inspect.signature(Trainer).parameters]
    for name in rest:
        if name not in known:
            raise UsageError(f"fit has no option `{name}`; expected a RunOptions or Trainer one.{nearest(name, known)}")
    return run, rest


def check_data_of_seeds(method: Module, data: DataModule) -> None:
    """Refuse data that change with the policy they are drawn for, where there are several policies."""
    if method.seeds and data.change_every and not data.online.env_steps:
        raise UsageError(
            f"`seeds` is {seeds_text(method.seeds)}, and the data change in training (`data.source` is "
            f"{data.source!r}); expected data that stay, which all seeds share. Train one seed per process."
        )


def check_epochs(method: Module, options: Mapping[str, Any]) -> None:
    """Refuse the Trainer's epochs where the method has an option for passes over the data."""
    if method.trains_on_texts and options.get("max_epochs") not in (None, -1):
        raise UsageError(
            f"`trainer.max_epochs` is {options['max_epochs']}; expected none, as passes over the data are an option of "
            "the method: --model.epochs."
        )


def data_of(method: Module, data: Loadable) -> DataModule:
    """The data as a module of the kind that the method reads."""
    kind = method.data_class_for(method.hparams)
    if isinstance(data, (str, Path)):
        return renewable(kind(str(data)))
    return renewable(kind.of(data) if isinstance(data, Replay) else load_data(data))


def planned(method: Module, data: DataModule, max_steps: int | None) -> int:
    """The updates to make: those that the user asks for, or that the method plans by itself.

    Raises:
        TypeError: the user has to say.
        UsageError: he says what the data say too.
    """
    steps = method.planned_steps(data) if max_steps is None or data.online.env_steps else max_steps
    if max_steps is not None and max_steps != steps:
        raise UsageError(
            f"`max_steps` is {max_steps:,}, and {data.online.env_steps:,} environment steps (`data.online.env_steps`) "
            f"make {steps:,} updates; expected one of the two. Leave `max_steps` out."
        )
    if steps is None:
        raise TypeError("fit has no `max_steps`; expected the number of updates, e.g. max_steps=10000.")
    return steps


def train(
    trainer: Trainer, method: Module, data: DataModule, begin: Beginning, files: RunFolder, origin: Origin
) -> None:
    """Let the Trainer train; its errors say what to do.

    Args:
        trainer: with the callbacks of the run.
        method: what is trained.
        data: what it is trained on.
        begin: what the run begins from.
        files: of the run; the first process chooses their folder when training begins.
        origin: of the run.
    """
    try:
        with clear_errors(), clear_restoring(begin.checkpoint):
            trainer.fit(method, datamodule=data, ckpt_path=begin.checkpoint, weights_only=True)  # type: ignore[arg-type]
    except EvaluationFailed as error:
        said = EvaluationFailed(f"{error} Go on with: {resume_words(files.folder, origin)}")
        said.together = leave_together(error)
        raise said from error.__cause__
    except DivergenceError as error:
        leave_together(error)
        raise
    except RuntimeError as error:
        if is_loss(error):
            stop_watching()
            then = (
                f"Go on with: {resume_words(files.folder, origin)}"
                if newest_checkpoint(files.folder)
                else "No checkpoint was written yet, so start it again."
            )
            raise ProcessLost(f"Another process of the run has ended, so it cannot go on. {then}") from error
        if "loading state_dict" not in str(error):
            raise
        raise UsageError(
            f"{begin.checkpoint} has other networks than the method now ({begin.changed or 'its code changed'}); "
            "expected the same. Pass the settings of the run it comes from."
        ) from None


def leave_together(error: UsageError) -> bool:
    """Whether all processes raise this error; if so, none is killed because another has ended first."""
    if error.together:
        stop_watching()
    return error.together


def finished(
    trainer: Trainer, method: Module, folder: Path, start: Start, seconds: float, selected: str = ""
) -> FitResult:
    """The result of a run that has ended, by itself or by a signal; tells it to the user, with what was selected."""
    found = method.run_log
    folders = {seed: part.folder for seed, part in getattr(found.files, "parts", {}).items()}
    chosen = selected_path(folder) if selected else None
    result = FitResult(method, folder, found.scores(), trainer.global_step, found.interrupted_by, folders, chosen)
    if trainer.is_global_zero and not result.interrupted:
        method.finish_files(folder)
    if start.verbose and trainer.is_global_zero:
        resume_or_none = resume_words(folder, start.origin) if result.interrupted else None
        look = start.look.format(folder=folder_words(folder, start.origin))
        best = "" if found.files is None else found.files.best_words()
        went = method.last_words(folder)
        said = screen.last_lines(
            folder, result.scores, result.updates, seconds, resume_or_none, look, found.failed, best, selected, went
        )
        print(said, flush=True)
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
    data.renewer = data.renewer or pool_of
    return data


def evaluate(
    method: Module | str | Path,
    *,
    episodes: int = 10,
    seed: int = EVAL_SEED,
    num_envs: int | None = None,
    temperature: float = 0.0,
    trust: Trust = None,
    which: Which = "last",
) -> dict[str, Any]:
    """Play episodes in the environment of the data a method was trained on.

    Args:
        method: a trained method, a run folder or a checkpoint file.
        episodes: how many, ≥ 1; of each task where the data come with tasks (OGBench's published numbers have 50).
        seed: episode k starts from ``seed + k``; the default repeats the start states of training's evaluations.
        num_envs: environments kept open; changes the speed only.
        temperature: of goal-conditioned policies: factor of the standard normal noise on their means, ≥ 0.
        trust, which: as of :func:`load`.

    Returns:
        ``return_mean return_std length_mean score score_std success_rate`` as far as they exist ("std" over episodes),
        ``score_interval`` (half of the 95 % interval of the mean), ``score_kind``, and per episode ``returns lengths``.
        With tasks also ``success_mean success_interval success_task1 …`` and, where the method learns values and there
        are trajectories to measure on, ``order_consistency``. Of a method with several seeds each plays the same
        episodes by itself: the numbers are means over seeds, ``<name>_seed<seed>`` are those of each,
        ``<name>_seed_std`` their standard deviation,
        ``score_interval`` is that of the mean over seeds, and ``returns lengths`` are one list per seed.

    Raises:
        UsageError: no environment is known or installed, or it does not match the data.
    """
    method = method if isinstance(method, Module) else load(method, trust=trust, which=which)
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
        order = make_order(meta, method.order_steps) if isinstance(method, GoalModule) else None
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


__all__ = ["FitResult", "evaluate", "fit", "load", "load_data", "make_trainer", "sample"]
