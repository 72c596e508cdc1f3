"""Which checkpoint a run begins from, in which folder, and what there is to do when it has made all its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offpolicy.compute.processes import claimed, is_first_process
from offpolicy.data.module import DataModule
from offpolicy.data.names import resolve
from offpolicy.errors import UsageError
from offpolicy.files import Table, atomic_write, method_folder, numbered_folder
from offpolicy.given import seeds_text
from offpolicy.training import screen
from offpolicy.training.checkpoints import (
    newest_checkpoint,
    opens,
    own_folder,
    plain_hparams,
    read_checkpoint,
    resolve_checkpoint,
    run_of,
)
from offpolicy.training.headlines import scores_line
from offpolicy.training.joint_folder import (
    JointFolder,
    find_folders,
    folder_of_seed,
    joint_label,
    known_folders,
    went_on_alone,
)
from offpolicy.training.measurement import Evaluation
from offpolicy.training.module import Module
from offpolicy.training.opening import load, own_state
from offpolicy.training.run_folder import RunFolder
from offpolicy.training.run_log import scores_of


@dataclass
class Beginning:
    """What a run begins from.

    Attributes:
        folder: of the run; None for a new one under the root.
        checkpoint: that the run goes on from; None for a new run.
        updates: made already.
        changed: the settings of the method that differ from those of the checkpoint, in words.
        folders: of each seed of several, once they are chosen.
        notes: sentences about them.
        data_meta: facts about the data of the checkpoint; None for a new run.
    """

    folder: Path | None
    checkpoint: Path | None = None
    updates: int = 0
    changed: str = ""
    folders: dict[int, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    data_meta: dict[str, Any] | None = None


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
        folders: of several seeds the run folder of each, on the first process; ``folder`` is that of the joint run.
        selected: the checkpoint that ``run.select`` chose, on the first process; None without.
    """

    method: Module
    folder: Path
    scores: dict[str, float]
    updates: int
    interrupted: int = 0
    folders: dict[int, Path] = field(default_factory=dict)
    selected: Path | None = None

    def complete(self) -> FitResult:
        """Itself, for scripts that go on with what was trained.

        Raises:
            KeyboardInterrupt: a signal ended the run early; it is kept and goes on with ``ckpt_path``.
        """
        if self.interrupted:
            raise KeyboardInterrupt(f"the run in {self.folder} was interrupted at update {self.updates:,}")
        return self


def find_beginning(
    method: Module,
    data: DataModule,
    *,
    seed: int,
    folder: Path | None,
    root: Path,
    ckpt_path: str | Path | None,
    seed_given: bool = False,
) -> Beginning:
    """What a run begins from; the method takes the seeds of the checkpoint.

    Args:
        method: what is trained.
        data: what it is trained on.
        seed: of a run of one seed, which "last" looks for.
        folder: of the run, where the user named it.
        root: folder of run folders.
        ckpt_path: as of :func:`offpolicy.fit`.
        seed_given: whether the user asked for this one seed.

    Raises:
        UsageError: no such checkpoint, one of another method, or a folder that holds another run.
    """
    if ckpt_path is None:
        places = [] if folder is None else [folder, *(folder / f"seed{k}" for k in method.seeds)]
        for place in filter(newest_checkpoint, places):  # never two runs in one
            raise UsageError(
                f"`folder` is {folder}, {'which' if place == folder else f'where {place.name}'} holds a run; expected "
                "a new one. Pass it as `ckpt_path` to continue it."
            )
        return Beginning(folder)
    checkpoint = resolve_checkpoint(
        ckpt_path,
        root=root,
        data=data_name(data),
        method=type(method).__name__,
        seed=seed,
        fingerprint=lambda: data.load().fingerprint(),
        label=joint_label(method.seeds) if method.seeds else None,
    )
    updates, changed = check_same_method(method, checkpoint)
    if method.seeds and seed_given:
        alone = known_folders(run_of(checkpoint)).get(seed)
        instead = f"Pass the folder of that seed as `ckpt_path`: {alone}." if alone else "Leave `seed` out."
        raise UsageError(
            f"{checkpoint} holds the seeds {seeds_text(method.seeds)}, and `seed` is {seed}; expected no `seed`. "
            f"{instead}"
        )
    if folder is not None and newest_checkpoint(folder) and not folder.samefile(run_of(checkpoint)):
        raise UsageError(
            f"`folder` is {folder}, which holds another run than {checkpoint}; expected a new folder. "
            "Pass one, or leave it out."
        )
    found = Beginning(folder or own_folder(checkpoint), checkpoint, updates, changed)
    found.data_meta = own_state(read_checkpoint(checkpoint, weights=False), checkpoint)["data"]["meta"]
    return found


def open_folder(
    begin: Beginning,
    method: Module,
    data: DataModule,
    root: Path,
    running: contextlib.ExitStack,
    made: list[Path],
    *,
    named: bool,
) -> RunFolder:
    """The files of a run, in folders that no other process trains in; the first process chooses them.

    Args:
        begin: what the run begins from; gets its folders.
        method: what is trained.
        data: what it is trained on.
        root: folder of run folders.
        running: holds the claims on the folders.
        made: gets every folder that was made.
        named: whether the user named the folder of the run.
    """
    if is_first_process():
        begin.folder = begin.folder or new_folder(root, data, method, method.seed or 0, made)
        running.enter_context(claimed(begin.folder))
        if method.seeds:
            choose_folders(begin, method, made, inside=named)
        for own in begin.folders.values():
            running.enter_context(claimed(own))
        if begin.checkpoint is not None:
            keep_earlier_rows(begin.checkpoint, begin.updates, begin.folder)
    where = begin.folder or root  # other processes are told the folder by the first
    return JointFolder(where, begin.folders) if method.seeds else RunFolder(where)


def new_folder(root: Path, data: DataModule, method: Module, seed: int, made: list[Path]) -> Path:
    """A new run folder under the root; ``made`` gets every folder that had to be made for it, innermost first."""
    parent = method_folder(root, data_name(data), type(method).__name__)
    absent = [place for place in (parent, *parent.parents) if not place.exists()]
    folder = numbered_folder(parent, joint_label(method.seeds) if method.seeds else f"seed{seed}")
    made += [folder, *absent]
    return folder


def choose_folders(begin: Beginning, method: Module, made: list[Path], *, inside: bool) -> None:
    """The folder of each seed of a joint run, new ones in the joint folder or beside it.

    Args:
        begin: what the run begins from, with its joint folder.
        method: with its seeds.
        made: gets every folder that was made for it.
        inside: whether the user named the joint folder.
    """
    assert begin.folder is not None
    joint = begin.folder
    inside |= any(place.parent == joint for place in known_folders(joint).values())

    def make(seed: int) -> Path:
        there = set(joint.parent.iterdir()) if joint.parent.exists() else set()
        place = folder_of_seed(joint, seed, inside=inside)
        if place not in there and place.exists():
            made.insert(0, place)
        return place

    begin.folders, begin.notes = find_folders(joint, method.seeds, make)


def check_same_method(method: Module, checkpoint: Path) -> tuple[int, str]:
    """Updates in a checkpoint, whose seed the method takes, and which settings of the method have changed since.

    Raises:
        UsageError: it holds another method.
    """
    content = read_checkpoint(checkpoint, weights=False)
    state = own_state(content, checkpoint)
    before, now = str(state.get("class")), f"{type(method).__module__}.{type(method).__qualname__}"
    if before.rpartition(".")[2] != now.rpartition(".")[2]:
        raise UsageError(f"{checkpoint} holds the method {before}; expected {now}. Pass the same method.")
    former, current = content["hyper_parameters"], plain_hparams(method.hparams)
    changed = [f"{k} {former[k]} → {current[k]}" for k in current if k in former and former[k] != current[k]]
    method.seed = state["seed"]  # the order of the data goes on
    seeds = tuple(state.get("seeds") or ())
    if method.seeds and method.seeds != seeds:
        held = f"the seeds {seeds}" if seeds else f"the seed {method.seed} alone"
        raise UsageError(
            f"{checkpoint} holds {held}, and `seeds` is {method.seeds}; expected the same. Set no `seeds`."
        )
    method.seeds = seeds
    return content["global_step"], ", ".join(changed)


def check_whole(checkpoint: Path) -> None:
    """Refuse to go on from weights alone.

    Raises:
        UsageError: the checkpoint has no state of the optimisers.
    """
    if "optimizer_states" in read_checkpoint(checkpoint, weights=False):
        return
    others = [path for path in run_of(checkpoint).glob("checkpoints/step=*.ckpt") if path.name < checkpoint.name]
    whole = next((path for path in sorted(others, reverse=True) if opens(path)), None)
    instead = f"Go on from {whole}" if whole else "Pass a run folder or a file of its checkpoints"
    raise UsageError(
        f"{checkpoint} holds weights alone, as `save` and --run.final weights_only write them; expected a checkpoint "
        f"that training can go on from. {instead}."
    )


def keep_earlier_rows(checkpoint: Path, updates: int, folder: Path) -> None:
    """Copy the rows up to a checkpoint from the tables of its run into the new folder it continues in."""
    for name in ("metrics.csv", "evals.csv"):
        table = run_of(checkpoint) / name
        if table.exists() and not (folder / name).exists():
            atomic_write(folder / name, table.read_bytes())
            Table(folder / name).cut(updates)


def already_done(
    method: Module, checkpoint: Path, updates: int, max_steps: int, verbose: bool, data: DataModule
) -> FitResult:
    """The result of a run that has nothing left to do but perhaps its last evaluation, in the environment of ``data``
    where that is named anew."""
    folder = own_folder(checkpoint) or run_of(checkpoint)
    trained = load(checkpoint, method=type(method))
    trained.run = method.run
    options = getattr(data, "options", {})
    named = {name: options.get(name) for name in ("env_id", "env_kwargs", "max_episode_steps")}
    trained.data_meta |= {name: value for name, value in named.items() if value is not None}
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
    folders = known_folders(folder) if trained.seeds and own_folder(checkpoint) else {}
    if is_first_process() and folders:  # stopped between the files of the joint run and those of its seeds
        alone = {seed: place for seed, place in folders.items() if not went_on_alone(folder, place)}
        JointFolder(folder, alone).complete(trained, updates)
    if is_first_process() and not (folder / "hf").exists():  # stopped between the last update and the end
        trained.finish_files(folder)
    return FitResult(trained, folder, scores, updates, folders=folders)


def last_evaluation(trained: Module, checkpoint: Path, folder: Path, updates: int) -> bool:
    """Whether the last evaluation of a finished run has its row; one in an environment is made now if it had failed."""
    measurement = trained.measurement()
    state = read_checkpoint(checkpoint, weights=False).get("callbacks", {}).get(type(measurement).__name__, {})
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
