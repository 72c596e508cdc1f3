"""The files of a run of several seeds: its own, and beside them the run folder of each seed, as if trained alone.

The joint folder is the truth. Whatever lies in the folder of a seed follows from it: rows are columns of the joint
tables, checkpoints parts of the joint ones. So a run that was killed between two writes makes them again when it goes
on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from offpolicy.data.seed_collections import place_of
from offpolicy.errors import UsageError
from offpolicy.files import PLACES, Table, atomic_copy, atomic_write, known_folders, numbered_folder
from offpolicy.given import seeds_text
from offpolicy.training.checkpoints import newest_checkpoint, opens, read_checkpoint, write_checkpoint
from offpolicy.training.headlines import judged_by
from offpolicy.training.run_folder import RunFolder
from offpolicy.training.slices import checkpoint_of_seed, of_seed, row_of_seed

LONGEST = 40  # letters of the seeds in the name of a folder


class JointFolder(RunFolder):
    """A run folder of several seeds, and those of each seed by itself.

    Args:
        folder: of the joint run.
        folders: of each seed; none on other processes than the first.
    """

    def __init__(self, folder: str | Path, folders: Mapping[int, Path]) -> None:
        super().__init__(folder)
        self.parts = {seed: RunFolder(place) for seed, place in folders.items()}

    @property
    def state_key(self) -> str:
        return RunFolder.__qualname__

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for part in self.parts.values():
            part.keeping = self.keeping

    def beside(self, choice: bool | str) -> bool | str:
        """Never: what lies in the folders of the seeds is cut out of the file of all.

        Raises:
            UsageError: it is asked for.
        """
        if choice is True:
            raise UsageError(
                "`run.async_save` is true, and several seeds are trained, whose files are cut out of the one of all; "
                "expected false or 'auto'. Leave it out."
            )
        return False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self.complete(pl_module, trainer.global_step)

    def keep_settings(self, config: str, versions: Mapping[str, Any], command: str) -> None:
        super().keep_settings(config, versions, command)  # first: see `went_on_alone`
        places = {str(seed): _as_seen(part.folder, self.folder) for seed, part in self.parts.items()}
        atomic_write(self.folder / PLACES, json.dumps(places, indent=2) + "\n")
        for seed, part in self.parts.items():
            own = {name: of_seed(value, seed) for name, value in versions.items()}
            own["trained_with_seeds"] = list(self.parts)
            part.keep_settings(config_of_seed(config, seed), own, command)

    def complete(self, method: Any, updates: int) -> None:
        """Make the folder of each seed what it would be, had that seed been trained alone up to this update.

        Args:
            method: of all seeds.
            updates: of the joint checkpoint that training goes on from.
        """
        for seed, part in self.parts.items():
            part.go_back(updates)
            for joint, own in ((self.metrics, part.metrics), (self.evals, part.evals)):
                own.replace([row_of_seed(row, seed) for row in joint.rows()])
        share_rounds(self.folder, {seed: part.folder for seed, part in self.parts.items()})
        for path in sorted(self.folder.glob("checkpoints/step=*.ckpt"))[-self.keeping.newest :]:
            absent = [seed for seed, part in self.parts.items() if not opens(part.folder / "checkpoints" / path.name)]
            if absent and opens(path):
                self._save_parts(method, path, absent)

    def write(self, table: Table, row: Mapping[str, Any]) -> None:
        super().write(table, row)
        for seed, part in self.parts.items():
            part.write(part.metrics if table is self.metrics else part.evals, row_of_seed(row, seed))

    def judge(self, row: Mapping[str, Any], updates: int) -> bool:
        """As of one seed; also whether it is the best so far of one of the seeds, as every process can tell."""
        for seed, part in self.parts.items():
            part.judge(row_of_seed(row, seed), updates)
        key = judged_by(row)
        own = [(row.get(f"{key}_seed{seed}"), row.get(f"{key}_best_seed{seed}")) for seed in self.seeds]
        return super().judge(row, updates) or any(value is not None and value == best for value, best in own)

    def save(self, trainer: Trainer, pl_module: Any) -> None:
        super().save(trainer, pl_module)
        if trainer.is_global_zero:
            self._save_parts(pl_module, self.path_of(trainer.global_step), list(self.parts))
            self._prune(trainer)

    def _save_parts(self, method: Any, path: Path, seeds: Sequence[int]) -> None:
        """Write the parts of a joint checkpoint, as it lies on the disk, into the folders of these seeds."""
        joint = read_checkpoint(path)
        stacked = [name for name, _ in method.named_parameters(remove_duplicate=False)]
        share_rounds(self.folder, {seed: self.parts[seed].folder for seed in seeds})  # before what needs them
        for seed in seeds:
            write_checkpoint(
                checkpoint_of_seed(joint, seed, stacked), self.parts[seed].folder / "checkpoints" / path.name
            )

    def prune(self) -> None:
        super().prune()
        for part in self.parts.values():
            part.prune()

    def draw(self) -> None:
        super().draw()
        for part in self.parts.values():
            part.draw()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "of_seeds": {seed: part.state_dict() for seed, part in self.parts.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for seed, state in state_dict.get("of_seeds", {}).items():
            if seed in self.parts:
                self.parts[seed].load_state_dict(state)


def parts_of(joint: Path) -> dict[int, Path]:
    """The folders of the seeds of a joint run that follow from it: without those that went on alone."""
    return {seed: place for seed, place in known_folders(joint).items() if not went_on_alone(joint, place)}


def share_rounds(joint: Path, parts: Mapping[int, Path] | None = None) -> None:
    """Let what each seed collected, which lies in the joint folder, lie in the folder of that seed too.

    Files are links to the same content where the file system has them, else copies.

    Args:
        joint: folder of the run.
        parts: folders of seeds; None for all that follow from it.
    """
    for seed, place in (parts_of(joint) if parts is None else parts).items():
        for source in sorted(place_of(joint / "replay", seed).glob("[!.]*")):
            target = place / "replay" / source.name
            if not _is_shared(source, target):
                atomic_copy(source, target, _link)


def _is_shared(source: Path, target: Path) -> bool:
    """Whether a folder of rows is in both places, as its facts say: it is whole where it is at all."""
    try:
        ours, theirs = ((folder / "meta.json").stat() for folder in (source, target))
    except OSError:
        return False
    return os.path.samestat(ours, theirs) or (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def config_of_seed(config: str, seed: int) -> str:
    """The settings of the single run of a seed, out of those of a joint one."""
    alone = re.sub(r"(?m)^seed_everything: .*$", f"seed_everything: {seed}", config, count=1)
    return re.sub(r"(?m)^seeds: .*$", "seeds: null", alone, count=1)


# -- which folders -----------------------------------------------------------------------------------------------------


def find_folders(joint: Path, seeds: tuple[int, ...], make: Callable[[int], Path]) -> tuple[dict[int, Path], list[str]]:
    """The folder of each seed of a joint run, and sentences about those that are not what they were.

    Args:
        joint: folder of the run.
        seeds: of the run.
        make: gives a new folder for a seed that has none yet, or whose own went on alone.
    """
    known, found, notes = known_folders(joint), {}, []
    for seed in seeds:
        place = known.get(seed)
        if place is not None and went_on_alone(joint, place):
            found[seed] = make(seed)
            notes.append(f"Seed {seed} went on alone in {place}, which is left as it is; here it is in {found[seed]}.")
        else:
            found[seed] = place or make(seed)
    return found, notes


def went_on_alone(joint: Path, place: Path) -> bool:
    """Whether the folder of a seed was started more often than its joint run, which is always noted there first."""
    starts, own = (Counter(_lines(folder / "command.txt")) for folder in (joint, place))
    return bool(own - starts)


def folder_of_seed(joint: Path, seed: int, *, inside: bool) -> Path:
    """A new folder for a seed: in that of the joint run, or made beside it."""
    if not inside:
        return numbered_folder(joint.parent, f"seed{seed}")
    place = joint / f"seed{seed}"
    return numbered_folder(joint, f"seed{seed}") if newest_checkpoint(place) else place


def joint_label(seeds: tuple[int, ...]) -> str:
    """The name of the folder of a joint run, without its number: seeds0-7, seeds0+3+5."""
    text = seeds_text(seeds).replace("..", "-").replace(",", "+")
    if len(text) > LONGEST:
        text = f"{len(seeds)}-of-{min(seeds)}-{max(seeds)}-{zlib.crc32(text.encode()):08x}"
    return f"seeds{text}"


def _as_seen(place: Path, joint: Path) -> str:
    return place.name if place.parent == joint else f"../{place.name}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
