"""Checkpoints of sharded models: a folder in place of a file, into which every process writes its own parts.

``step=00000100.ckpt/`` holds a file of each process, ``__<rank>_0.distcp``, in the format of
``torch.distributed.checkpoint``, and ``checkpoint.pt``: everything else, as in a checkpoint that is a file, and where
each tensor lies. Torch's own table, ``.metadata``, is left beside them for its tools; as it is pickled, it is never
read here. The folder gets its name once all of it is on the disk. :func:`read_sharded` gives what a file would hold, so
that whatever opens a checkpoint opens these, on any number of processes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offpolicy.files import WriteError, sync_folder
from offpolicy.training.archives import check_archive, checksums, load_plain, save_plain

PLAIN = "checkpoint.pt"
TABLE = "sharded"  # in the plain part: where the tensors lie
PART = re.compile(r"__\d+_\d+\.distcp")
Parts = dict[str, Tensor]


def is_sharded(path: Path) -> bool:
    """Whether a path is a checkpoint that is a folder; one that is being written, or was not finished, is none."""
    return (path / PLAIN).is_file()


# -- what a checkpoint consists of -------------------------------------------------------------------------------------


def take_apart(checkpoint: dict[str, Any], same: Mapping[str, str]) -> tuple[Parts, dict[str, Any]]:
    """The tensors that processes share out, and the rest.

    Args:
        checkpoint: as Lightning gives it under FSDP2: optimisers by the names of their weights.
        same: name → name of the weight that it is one with (tied weights), which alone is written.
    """
    parts = {f"model/{name}": x for name, x in checkpoint["state_dict"].items() if name not in same}
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    rest[TABLE] = {"same": {k: v for k, v in same.items() if k in checkpoint["state_dict"]}}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = []
        for i, state in enumerate(checkpoint["optimizer_states"]):
            numbers: dict[str, dict[str, Any]] = {}  # that are no tensors
            for name, of_weight in state["state"].items():
                for key, value in of_weight.items():
                    if isinstance(value, Tensor):
                        parts[f"optimizer{i}/{name}/{key}"] = value
                    else:
                        numbers.setdefault(name, {})[key] = value
            rest["optimizer_states"].append({"param_groups": state["param_groups"], "numbers": numbers})
    return parts, set_aside(rest, parts)


def set_aside(rest: Any, parts: Parts, at: str = "other") -> Any:
    """A tree with names in place of its tensors that are cut over the processes; those go to the parts."""
    if isinstance(rest, Mapping):
        return {key: set_aside(value, parts, f"{at}/{key}") for key, value in rest.items()}
    if isinstance(rest, (list, tuple)):
        return type(rest)(set_aside(value, parts, f"{at}/{i}") for i, value in enumerate(rest))
    if hasattr(rest, "placements"):
        parts[at] = rest
        return {TABLE: at}
    return rest


def set_back(rest: Any, parts: Mapping[str, Tensor]) -> Any:
    """The tree with the tensors that :func:`set_aside` has taken out."""
    if isinstance(rest, Mapping):
        if set(rest) == {TABLE} and rest[TABLE] in parts:
            return parts[rest[TABLE]]
        return {key: set_back(value, parts) for key, value in rest.items()}
    return type(rest)(set_back(value, parts) for value in rest) if isinstance(rest, (list, tuple)) else rest


def put_together(parts: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint as a file holds it: optimisers by the numbers of their weights."""
    whole: dict[str, Any] = {key: set_back(value, parts) for key, value in rest.items() if key != TABLE}
    whole["state_dict"] = {k.removeprefix("model/"): x for k, x in parts.items() if k.startswith("model/")}
    for name, other in rest[TABLE]["same"].items():
        whole["state_dict"][name] = whole["state_dict"][other]
    if "optimizer_states" in rest:
        whole["optimizer_states"] = [numbered(by_name(parts, i, one)) for i, one in enumerate(rest["optimizer_states"])]
    return whole


def by_name(parts: Mapping[str, Any], number: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimiser by the names of its weights.

    Args:
        parts: all of a checkpoint.
        number: of the optimiser.
        kept: what of it is no tensor.
    """
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in kept["numbers"].items()}
    start = f"optimizer{number}/"
    for name, value in parts.items():
        if name.startswith(start):
            weight, _, key = name.removeprefix(start).rpartition("/")
            state.setdefault(weight, {})[key] = value
    return {"state": state, "param_groups": kept["param_groups"]}


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimiser as torch's own ``state_dict``: weights by their number over all groups."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: i for i, name in enumerate(names)}
    return {
        "state": {numbers[name]: state["state"][name] for name in names if name in state["state"]},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


# -- writing -----------------------------------------------------------------------------------------------------------


def half_written(path: Path, pid: int) -> Path:
    """The name of a folder until it is whole."""
    return path.with_name(f".{path.name}.{pid}.tmp")


def writer_of(parts: Parts, folder: Path, group: Any, *, copy: bool) -> Callable[[], Any]:
    """What writes this process's parts; all processes ask, and then all call it.

    Args:
        parts: tensors, cut over the processes or the same on each.
        folder: in which they are to lie; it is made.
        group: a group of the processes in which tensors on the host can be sent.
        copy: whether the parts are copied to the host now, so that they may change before they are written.

    Returns:
        A function that waits until all processes have written, and gives torch's table.
    """
    from torch.distributed import checkpoint as dcp

    writer = dcp.FileSystemWriter(folder)
    taken = writer.stage(dict(parts)) if copy else dict(parts)

    def write() -> Any:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with checksums():
                return dcp.save(taken, storage_writer=writer, process_group=group)
        except dcp.CheckpointException as error:
            for cause, *_ in error.failures.values():
                if isinstance(cause, OSError):
                    raise WriteError.of(cause, folder) from error
            raise

    return write


def finish_writing(folder: Path, path: Path, rest: Mapping[str, Any], table: Any) -> None:
    """Write the plain part and give the folder its name, on one process, once all have written.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    save_plain({**rest, TABLE: {**rest[TABLE], "tensors": plain_table(table)}}, folder / PLAIN)
    try:
        if path.exists() or path.is_symlink():
            remove(path)
        os.replace(folder, path)
    except OSError as error:
        raise WriteError.of(error, path) from error
    sync_folder(path.parent)


def plain_table(table: Any) -> dict[str, Any]:
    """Torch's table of a checkpoint as plain values: type and size of each tensor, and where its pieces lie."""
    found: dict[str, Any] = {}
    for name, kept in table.state_dict_metadata.items():
        found[name] = {"dtype": kept.properties.dtype, "size": tuple(kept.size), "pieces": []}
        sizes = {tuple(piece.offsets): tuple(piece.sizes) for piece in kept.chunks}
        for index, place in table.storage_data.items():
            if index.fqn == name:
                start = tuple(index.offset if index.offset is not None else (0,) * len(kept.size))
                piece = (start, sizes[start], place.relative_path, place.offset, place.length)
                found[name]["pieces"].append(piece)
    return found


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, if it is there; what is half removed has another name."""
    if path.is_dir() and not path.is_symlink():
        gone = half_written(path, os.getpid())
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- reading -----------------------------------------------------------------------------------------------------------


def check_sharded(folder: Path, rest: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a checkpoint, once it is sure that all of it lies there, with the right checksums.

    Args:
        folder: the checkpoint.
        rest: what lies beside the tensors.

    Raises:
        ValueError: a file is missing or cut short, a tensor is larger than its pieces, or a piece differs.
    """
    tensors = rest[TABLE]["tensors"]
    pieces = [piece for one in tensors.values() for piece in one["pieces"]]
    for name in sorted({str(piece[2]) for piece in pieces}):
        if not PART.fullmatch(name):
            raise ValueError(f"its table names the file {name[:80]!r}, which is none of a checkpoint.")
        if not (folder / name).is_file():
            raise ValueError(f"its file {name} is missing; every process of the run has written one.")
    for name, one in tensors.items():
        count = sum(torch.Size(piece[1]).numel() for piece in one["pieces"])
        if count != torch.Size(one["size"]).numel():
            raise ValueError(f"its tensor {name[:80]} of {tuple(one['size'])} has {count:,} numbers.")
        stored = sum(piece[4] for piece in one["pieces"])
        if count * one["dtype"].itemsize > stored:
            raise ValueError(f"its tensor {name[:80]} of {count:,} numbers has {stored:,} bytes on the disk.")
    for name in {piece[2] for piece in pieces}:
        size = (folder / name).stat().st_size
        with open(folder / name, "rb") as file:
            for *_, start, length in (piece for piece in pieces if piece[2] == name):
                if not 0 <= start <= start + length <= size:
                    raise ValueError(f"its file {name} is cut short at {size:,} bytes.")
                check_archive(Piece(file, start, length))
    return dict(tensors)


def read_rest(folder: Path) -> dict[str, Any]:
    """What a checkpoint that is a folder holds beside the tensors of its weights and optimisers."""
    with open(folder / PLAIN, "rb") as file:
        check_archive(file)
    rest = load_plain(folder / PLAIN)
    if not isinstance(rest.get(TABLE), dict):
        raise ValueError("it has no table of its tensors.")
    return rest


def read_sharded(folder: Path) -> dict[str, Any]:
    """What a file would hold, out of a checkpoint that is a folder; on one process, without the others.

    Raises:
        ValueError: something in it is missing or damaged.
    """
    rest = read_rest(folder)
    tensors = check_sharded(folder, rest)
    parts = {name: torch.empty(one["size"], dtype=one["dtype"], device="cpu") for name, one in tensors.items()}
    fill(parts, folder, tensors, no_dist=True)
    return put_together(parts, rest)


def fill(parts: Parts, folder: Path, tensors: Mapping[str, Any], *, group: Any = None, no_dist: bool = False) -> None:
    """Read tensors in place; of those that are cut over processes each process reads what it holds.

    Args:
        parts: name → tensor of the size in the checkpoint.
        folder: the checkpoint.
        tensors: its table, checked.
        group: of the processes, all of which ask.
        no_dist: this process asks alone.
    """
    from torch.distributed import checkpoint as dcp

    dcp.load(dict(parts), storage_reader=reader_of(folder, tensors), process_group=group, no_dist=no_dist)


def take_back(path: Path, model: Any, optimizers: Any, group: Any, *, strict: bool) -> dict[str, Any]:
    """Read weights and optimisers into a sharded model in place; all processes ask.

    Args:
        path: the checkpoint.
        model: sharded by FSDP2.
        optimizers: of the model.
        group: as of :func:`writer_of`.
        strict: whether all weights have to be there.

    Returns:
        What else the checkpoint holds.

    Raises:
        RuntimeError: it has other weights than the model.
    """
    from torch.distributed.checkpoint import state_dict as of

    rest = read_rest(path)
    tensors = rest[TABLE]["tensors"]
    weights = of.get_model_state_dict(model)
    wanted: dict[str, Any] = {f"model/{name}": x for name, x in weights.items() if f"model/{name}" in tensors}
    absent = [name for name in weights if f"model/{name}" not in tensors and name not in rest[TABLE]["same"]]
    states: list[Any] = [of.get_optimizer_state_dict(model, optimizer) for optimizer in optimizers]
    for i, state in enumerate(states):
        for name, of_weight in state["state"].items():
            wanted |= {f"optimizer{i}/{name}/{key}": x for key, x in of_weight.items() if isinstance(x, Tensor)}
    other = [name for name, x in wanted.items() if name not in tensors or tuple(x.size()) != tensors[name]["size"]]
    if other or (strict and absent):
        raise RuntimeError(f"Error(s) in loading state_dict: {', '.join([*other, *absent][:3])} are not as in {path}")
    fill(wanted, path, tensors, group=group)
    of.set_model_state_dict(model, weights, options=of.StateDictOptions(strict=strict))
    for i, (optimizer, kept) in enumerate(zip(optimizers, rest["optimizer_states"], strict=True)):
        of.set_optimizer_state_dict(model, optimizer, by_name(wanted, i, kept))
    own = {name: tensors[name] for name in tensors if name.startswith("other/")}  # whoever keeps them cuts them again
    others = {name: torch.empty(one["size"], dtype=one["dtype"], device="cpu") for name, one in own.items()}
    fill(others, path, tensors, no_dist=True)
    return {key: set_back(value, others) for key, value in rest.items() if key not in (TABLE, "optimizer_states")}


def take_back_whole(checkpoint: Mapping[str, Any], model: Any, optimizers: Any, *, strict: bool) -> None:
    """Give a sharded model the weights and optimisers of a checkpoint that is a file; every process has read it.

    Args:
        checkpoint: of a file.
        model: sharded by FSDP2.
        optimizers: of the model, with the groups they had.
        strict: whether all weights have to be there.
    """
    from torch.distributed.checkpoint import state_dict as of

    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    options = of.StateDictOptions(full_state_dict=True, strict=strict)
    of.set_model_state_dict(model, dict(checkpoint["state_dict"]), options=options)
    for optimizer, kept in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        state: dict[str, Any] = {}
        groups: list[dict[str, Any]] = []
        for own, group in zip(optimizer.param_groups, kept["param_groups"], strict=True):
            here = [names[id(p)] for p in own["params"]]  # as torch does: by their places in the groups
            groups.append({**group, "params": here})
            state |= {name: kept["state"][k] for name, k in zip(here, group["params"], strict=True)}
        of.set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def reader_of(folder: Path, tensors: Mapping[str, Any]) -> Any:
    """What torch reads a checkpoint by, with our table in place of the pickled one."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import metadata as of

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            from torch.distributed.checkpoint.filesystem import _StorageInfo

            found: dict[str, Any] = {}
            places: dict[Any, Any] = {}
            for name, one in tensors.items():
                pieces = [
                    of.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                    for offsets, sizes, *_ in one["pieces"]
                ]
                properties = of.TensorProperties(dtype=one["dtype"])
                found[name] = of.TensorStorageMetadata(properties, torch.Size(one["size"]), pieces)
                for i, (offsets, _, file, start, length) in enumerate(one["pieces"]):
                    places[of.MetadataIndex(name, offsets, i)] = _StorageInfo(file, start, length)
            return of.Metadata(found, storage_data=places, storage_meta=of.StorageMeta())

    return Reader(folder)


class Piece:
    """A part of an open file, as a file of its own."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        count = left if count is None or count < 0 else min(count, left)
        self.file.seek(self.start + self.at)
        found: bytes = self.file.read(count)
        self.at += len(found)
        return found
