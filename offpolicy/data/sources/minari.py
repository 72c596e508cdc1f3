"""Minari data sets on disk: HDF5, Arrow and Parquet storage, read without the ``minari`` package.

An episode of T steps holds T + 1 observations; the last one goes into the replay's tail. (Laying the T + 1 rows end to
end beside T actions would shift every later episode.) Arrow and Parquet pad *every* column to T + 1 rows.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data import validate
from offpolicy.data.doubts import SAMPLE, precision_doubt
from offpolicy.data.guard import check_size, read_json
from offpolicy.data.names import root
from offpolicy.data.raw import Raw
from offpolicy.data.replay import Replay
from offpolicy.data.sources.fetch import Lock, check_network
from offpolicy.data.sources.minari_storage import ArrowStorage, Hdf5Storage, Storage
from offpolicy.data.spaces import bounds_meta
from offpolicy.environments.wrappers import names, obstacle, wrappers_of
from offpolicy.errors import DataError, UsageError, amount, listed
from offpolicy.trust import check_environment

PRECISION_LIMIT = 1 << 23  # numbers of one episode that are read a second time, as float64
REMOTE = "hf://farama-minari"  # Minari's default
INFOS = "infos/"


def read(
    folder: Path,
    *,
    name: str | None = None,
    obs_keys: Iterable[str] | None = None,
    on_bad: str = "error",
    clip_actions: bool = False,
    sha256: str | None = None,
    extra: tuple[str, ...] = (),
) -> Replay:
    """Read a Minari data set.

    Args:
        folder: with ``data/metadata.json``.
        name: id; the one in the metadata if None.
        obs_keys: parts of a dict observation that become ``obs``, in this order; all numeric ones if None. Every part
            is also a column ``obs/<part>``; text is left out.
        on_bad, clip_actions: as in :func:`offpolicy.data.validate.finish`.
        sha256: expected hash over the storage files in order.
        extra: columns under ``infos/`` to read too. Of T + 1 rows they are those beside the observations: row t is what
            the environment told with the observation that action t answers.

    Raises:
        DataError: an incomplete or damaged set, or one whose storage is not known.
        UsageError: ``obs_keys`` that are not there, or spaces that no method here can use.
    """
    record = _metadata(folder)
    observation, action = (_space(folder, record, key) for key in ("observation_space", "action_space"))
    storage: Storage
    kind = record.get("data_format", "hdf5")
    if kind == "hdf5":
        storage = Hdf5Storage(folder / "data" / "main_data.hdf5")
    elif kind in ("arrow", "parquet"):
        infos = ("infos",) if any(name.startswith(INFOS) for name in extra) else ()
        storage = ArrowStorage(folder / "data", kind, infos)
    else:
        raise DataError(f"{folder} is stored as '{kind}'; expected hdf5, arrow or parquet. Convert it with minari.")
    lock = Lock(storage.files, folder / "data.lock.json")
    lock.check(sha256)
    with storage:
        found = len(storage.lengths)
        if record.get("total_episodes", found) != found:
            raise DataError(
                f"{folder} has {found} episodes, its metadata say {record['total_episodes']}; the download is "
                "incomplete. Delete the folder and fetch it again."
            )
        raw = _read_episodes(folder, record, storage, observation, action, obs_keys, extra)
    known = _environment(folder, record)
    check_environment(known, str(folder))
    wrappers = known.get("env_wrappers", [])
    if hindered := obstacle(wrappers):
        raw.warnings.append(f"{known.get('env_id')} {hindered}: there are no scores")
    elif wrappers:
        raw.notes.append(f"recorded through {names(wrappers)}, in which evaluations play too")
    raw.meta = {
        **known,
        **raw.meta,
        "name": name or record.get("dataset_id", folder.name),
        "source": "minari",
    }
    raw.meta["file"] = str(folder)
    if raw.meta.get("ref_min_score") is not None:
        raw.meta["score_kind"] = "minari-normalised"
    replay = validate.finish(raw, on_bad=on_bad, clip_actions=clip_actions)
    replay.meta["sha256"] = lock.keep(replay.num_steps)
    return replay


def open_id(name: str, *, download: bool = True, **options: Any) -> Replay:
    """A Minari id from the local folder, fetched by the ``minari`` package when it is not there."""
    folder = root("minari") / name
    if not (folder / "data" / "metadata.json").is_file():
        if not download:
            raise DataError(
                f"{folder} does not exist and downloading is off. Put the Minari data set there, pass `--data "
                "FOLDER`, or leave out `--data.download=false`."
            )
        _download(name, folder)
    return read(folder, name=name, **options)


def _download(name: str, folder: Path) -> None:
    """Fetch into a temporary folder beside the target and move it there when it is complete."""
    remedy = f"Put the data set at {folder} by hand (minari download {name}), or pass `--data FOLDER`."
    if os.environ.get("MINARI_REMOTE", REMOTE).startswith("hf://"):
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        check_network(url, f"the Minari data set {name} could not be downloaded", remedy)
    import minari

    top = root("minari")
    top.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=top))
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(temporary)
    try:
        minari.download_dataset(name)
        if not (temporary / name / "data" / "metadata.json").is_file():
            raise DataError(f"the download of {name} is incomplete. {remedy}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary / name, folder)
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the Minari data set {name} could not be downloaded: {error} {remedy}") from None
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(temporary, ignore_errors=True)


# -- metadata ----------------------------------------------------------------------------------------------------------


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / "data" / "metadata.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected the folder of a Minari data set.")
    return read_json(path)


def _space(folder: Path, record: Mapping[str, Any], key: str) -> dict[str, Any]:
    text = record.get(key)
    if not text:
        raise DataError(f"{folder}: the metadata have no `{key}`; expected a serialised gymnasium space.")
    found = json.loads(text) if isinstance(text, str) else text
    if not isinstance(found, dict) or "type" not in found:
        raise DataError(f"{folder}: `{key}` is no serialised gymnasium space; the metadata are damaged.")
    return found


def _environment(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    meta = {k: float(record[k]) for k in ("ref_min_score", "ref_max_score") if record.get(k) is not None}
    text = record.get("eval_env_spec") or record.get("env_spec")
    if not text:
        return meta
    spec = json.loads(text) if isinstance(text, str) else text
    wrappers = wrappers_of(spec, str(folder))
    return {
        **meta,
        "env_id": spec["id"],
        "env_kwargs": spec.get("kwargs") or {},
        "max_episode_steps": spec.get("max_episode_steps"),
        **({"env_wrappers": wrappers} if wrappers else {}),
    }


def _leaves(
    space: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The parts of a (nested) dict space in its order."""
    if space["type"] == "Dict":
        for key, part in space["subspaces"].items():
            yield from _leaves(part, (*path, key))
    else:
        yield path, space


def _step_shape(space: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of one step of a numeric space, None for text and other kinds."""
    if space["type"] == "Box":
        return tuple(space["shape"])
    if space["type"] == "Discrete":
        return ()
    if space["type"] == "MultiDiscrete":
        return (len(space["nvec"]),)
    if space["type"] == "MultiBinary":
        return tuple(np.atleast_1d(space["n"]).tolist())
    return None


def _is_jpeg(record: Mapping[str, Any], space: Mapping[str, Any]) -> bool:
    shape = space.get("shape", ())
    small = len(shape) not in (2, 3) or min(shape[:2]) < 32
    return bool(record.get("jpeg_encoding")) and space.get("dtype") == "uint8" and not small


# -- episodes ----------------------------------------------------------------------------------------------------------


def _read_episodes(
    folder: Path,
    record: Mapping[str, Any],
    storage: Storage,
    observation: Mapping[str, Any],
    action: Mapping[str, Any],
    obs_keys: Iterable[str] | None,
    extra: tuple[str, ...],
) -> Raw:
    empty = int((storage.lengths == 0).sum())
    episodes = np.flatnonzero(storage.lengths)
    length = storage.lengths[episodes]
    if not len(length):
        raise DataError(f"{folder} holds no steps; expected at least one episode with a step.")
    start = np.cumsum(length) - length
    total, count = int(length.sum()), len(length)
    raw = Raw({}, start, length, str(folder), keys={"obs": "observations", "action": "actions", "reward": "rewards"})
    if empty:
        raw.notes.append(f"{amount(empty, 'episode')} without a step: skipped")

    filled: list[tuple[str, np.ndarray, np.ndarray | None]] = []

    stored = sum(path.stat().st_size for path in storage.files)

    def column(key: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        check_size(folder, key, total * prod(shape) * np.dtype(dtype).itemsize, stored)
        filled.append((key, np.empty((total, *shape), dtype=dtype), None))
        return filled[-1][1]

    raw.steps["reward"] = column("rewards", (), np.float32)
    raw.steps["terminated"] = column("terminations", (), bool)
    truncated = column("truncations", (), bool)
    action_column = _allocate_actions(raw, action, column)
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, space in _leaves(observation):
        shape, key = _step_shape(space), "/".join(("observations", *path))
        if shape is None:
            raw.notes.append(f"`{key}` was left out: it is {space['type']}, not numbers")
            continue
        if _is_jpeg(record, space):
            raise DataError(
                f"{folder}: `{key}` is stored as JPEG images, which are not decoded here. Record it with "
                "jpeg_encoding=False."
            )
        dtype = np.uint8 if space.get("dtype") == "uint8" and len(shape) > 1 else np.float32
        check_size(folder, key, (total + count) * prod(shape) * np.dtype(dtype).itemsize, stored)
        steps, tail = np.empty((total + 1, *shape), dtype=dtype), np.empty((count, *shape), dtype=dtype)
        filled.append((key, steps, tail))
        parts["/".join(path)] = steps[:total], tail
    infos = {}
    for name in extra:
        if name.startswith(INFOS):
            more, shape, dtype = storage.layout(int(episodes[0]), name)
            infos[name] = _allocate_info(folder, name, more, (total, count), shape, dtype, filled, stored)
    for k, episode in enumerate(episodes.tolist()):
        low, steps_here = int(start[k]), int(length[k])
        for key, out, last in filled:
            rows = steps_here + (last is not None)
            storage.fill(episode, key, out[low : low + rows])
            if last is not None:  # the extra row is overwritten by the next episode
                last[k] = out[low + rows - 1]
    raw.steps |= infos
    raw.steps["action"] = action_column.reshape(total, -1)
    raw.truncated = truncated[start + length - 1]
    _join_observations(raw, parts, obs_keys, folder)
    dtypes = {"obs": observation.get("dtype"), "action": action.get("dtype")}
    raw.meta["source_dtypes"] = {k: d for k, d in dtypes.items() if d and d != str(raw.steps[k].dtype)}
    raw.warnings += _precision_doubts(storage, filled, episodes, length)
    return raw


def _allocate_info(
    folder: Path,
    name: str,
    more: int,
    sizes: tuple[int, int],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    filled: list[tuple[str, np.ndarray, np.ndarray | None]],
    stored: int,
) -> np.ndarray:
    """Room for a column of ``infos/``, which ``filled`` gets, and the part of it that belongs to steps."""
    total, count = sizes
    if dtype.kind not in "fiub" or more not in (0, 1):
        raise DataError(
            f"{folder}: `{name}` has type {dtype} and {more:+d} rows beside the steps; expected numbers or flags, one "
            "row per step or one more. Leave it out of `extra_columns`."
        )
    kept = {"f": np.float32, "b": bool}.get(dtype.kind, np.int64)
    check_size(folder, name, (total + count) * prod(shape) * np.dtype(kept).itemsize, stored)
    steps = np.empty((total + more, *shape), dtype=kept)
    filled.append((name, steps, np.empty((count, *shape), dtype=kept) if more else None))
    return steps[:total]


def _precision_doubts(
    storage: Storage,
    filled: list[tuple[str, np.ndarray, np.ndarray | None]],
    episodes: np.ndarray,
    length: np.ndarray,
) -> list[str]:
    """Warnings about observations and actions that float32 cannot hold, by a few episodes read as float64."""
    some = np.unique(np.linspace(0, len(episodes) - 1, 4).astype(np.int64)).tolist()
    found = []
    for key, out, last in filled:
        if out.dtype != np.float32 or key == "rewards":
            continue
        shape, parts = out.shape[1:], []
        for k in some:
            if (int(length[k]) + 1) * int(np.prod(shape)) > PRECISION_LIMIT:
                continue
            whole = np.empty((int(length[k]) + (last is not None), *shape))
            storage.fill(int(episodes[k]), key, whole)
            parts.append(whole[: SAMPLE // 4])
        if parts:
            found.append(precision_doubt(key, np.concatenate(parts)))
    return [text for text in found if text]


def _allocate_actions(raw: Raw, space: Mapping[str, Any], column: Callable[..., np.ndarray]) -> np.ndarray:
    if space["type"] == "Discrete":
        raw.facts |= {"action_n": int(space["n"]), "action_start": int(space.get("start", 0))}
        return column("actions", (), np.int64)
    if space["type"] != "Box":
        raise UsageError(f"{raw.where} has {space['type']} actions; expected Box or Discrete. Choose another data set.")
    width = int(np.prod(space["shape"]))
    low, high = (np.broadcast_to(np.asarray(space[k], dtype=np.float64).ravel(), (width,)) for k in ("low", "high"))
    raw.meta |= bounds_meta(low, high, "environment")
    return column("actions", tuple(space["shape"]), np.float32)


def _join_observations(
    raw: Raw, parts: dict[str, tuple[np.ndarray, np.ndarray]], obs_keys: Iterable[str] | None, folder: Path
) -> None:
    """``obs`` is the chosen parts side by side; the parts of a dict observation are also columns of their own."""
    if not parts:
        raise UsageError(
            f"{folder} has no numeric observations; expected a Box, or a dict with one. Choose another set."
        )
    if "" in parts:
        steps, tail = parts[""]
        flat = steps.ndim == 1 or (steps.ndim > 2 and steps.dtype == np.float32)
        raw.steps["obs"] = steps.reshape(len(steps), -1) if flat else steps
        raw.tail["obs"] = tail.reshape(len(tail), -1) if flat else tail
        return
    chosen = list(obs_keys) if obs_keys is not None else list(parts)
    missing = [key for key in chosen if key not in parts]
    if missing or not chosen:
        raise UsageError(
            f"{folder} has no observation {missing[:10] or 'chosen'}; expected some of {listed(parts)}. Correct "
            "`obs_keys`."
        )
    images = [key for key in chosen if parts[key][0].ndim > 2]
    if images and len(chosen) > 1:
        raise UsageError(
            f"{folder}: {images} are images and cannot stand beside other observations. Choose one with `obs_keys`."
        )
    if len(chosen) == 1:
        raw.steps["obs"], raw.tail["obs"] = (p if p.ndim > 1 else p[:, None] for p in parts[chosen[0]])
    else:
        for i, place in enumerate((raw.steps, raw.tail)):
            place["obs"] = np.concatenate([parts[key][i].reshape(len(parts[key][i]), -1) for key in chosen], axis=1)
    raw.meta["obs_keys"] = chosen
    at = 0
    for key in chosen:  # views into the joined column cost no memory
        width = int(np.prod(parts[key][0].shape[1:]))
        whole = images or len(chosen) == 1
        raw.steps[f"obs/{key}"] = raw.steps["obs"] if whole else raw.steps["obs"][:, at : at + width]
        raw.tail[f"obs/{key}"] = raw.tail["obs"] if whole else raw.tail["obs"][:, at : at + width]
        at += width
    for key in parts.keys() - set(chosen):
        raw.steps[f"obs/{key}"], raw.tail[f"obs/{key}"] = parts[key]
