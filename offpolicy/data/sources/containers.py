"""What people hand over as data, turned into plain arrays by column: lists of episodes, tensors, frames, dicts of
observations, masked and structured arrays, arrays of any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from offpolicy.data.ends import find, has_name
from offpolicy.data.raw import match
from offpolicy.errors import DataError, listed

OBSERVATIONS = ("obs", "observation", "observations", "next_obs", "next_observations")


def plain_columns(data: Any, obs_keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Columns as plain arrays, one row per step.

    Args:
        data: a mapping or a data frame of columns, a structured array, or a list of episodes, each of which is a
            mapping of columns (a named tuple or data class does too). Episodes that hold one observation more than
            actions give next observations.
        obs_keys: parts of a dict observation to lay side by side, in this order.

    Raises:
        DataError: something else, with what it is.
    """
    keys = None if obs_keys is None else list(obs_keys)
    columns = as_mapping(data)
    if columns is not None:
        return _arrays(columns, keys)
    if isinstance(data, (list, tuple, Iterator)):
        return _joined(list(data), keys)
    raise DataError(
        f"the data are of type {type(data).__name__}; expected a dict of columns ({EXAMPLE}) or a list of such dicts, "
        "one for each episode."
    )


def _arrays(columns: Mapping[Any, Any], obs_keys: list[str] | None) -> dict[str, np.ndarray]:
    """Every column as an array; others than those that are trained on or mark ends need not be made of numbers."""
    found = {}
    for key, value in columns.items():
        name = str(key)
        if value is None:
            continue
        try:
            found[name] = as_array(name, value, obs_keys)
        except DataError:
            if match([name]) or has_name(name):
                raise
            found[name] = np.empty((), dtype=object)  # left out, with a note
    return found


EXAMPLE = "obs, action, reward, terminated and, where episodes were cut, episode_end"


def as_mapping(data: Any) -> Mapping[str, Any] | None:
    """Named parts of a value by name; None when it has none."""
    if isinstance(data, Mapping):
        return data
    if isinstance(data, np.ndarray) and data.dtype.names:
        return {name: data[name] for name in data.dtype.names}
    if hasattr(data, "_asdict"):
        return data._asdict()
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    if hasattr(data, "columns") and (hasattr(data, "iloc") or hasattr(data, "get_column")):  # a data frame
        return {str(name): data[name] for name in data.columns}
    if hasattr(data, "column_names") and hasattr(data, "__getitem__"):  # a table
        return {str(name): data[name] for name in data.column_names}
    return None


def as_array(name: str, value: Any, obs_keys: list[str] | None = None) -> np.ndarray:
    """One column as a plain array in the machine's byte order; nothing is copied that need not be.

    Raises:
        DataError: it is no array of numbers, or a dict of them and no ``obs_keys`` say what to take.
    """
    if isinstance(value, np.ndarray) and type(value) in (np.ndarray, np.memmap) and value.dtype.kind in "iub":
        return value.astype(value.dtype.newbyteorder("="), copy=False)
    parts = as_mapping(value)
    if parts is not None:
        return joined_parts(name, parts, obs_keys)
    try:
        value = _of_tensor(value)
    except Exception as error:  # tensors without numbers, quantized or of rows of several lengths
        raise DataError(
            f"`{name}` ({type(value).__name__}) cannot be made an array: {str(error)[:200].rstrip('.')}. Expected "
            "numbers in rows of one shape; pass a plain tensor or array."
        ) from None
    if isinstance(value, np.ma.MaskedArray):
        value = _unmasked(name, value)
    if isinstance(value, (set, frozenset)) or callable(value):
        raise DataError(f"`{name}` is of type {type(value).__name__}; expected an array or a list of numbers.")
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "detach"):
        value = [_of_tensor(part) for part in value]
    if isinstance(value, (list, tuple)) and value and as_mapping(value[0]) is not None:
        raise DataError(
            f"`{name}` is a list of dicts; expected an array with a row for each step, or a dict of arrays by part. "
            "Stack the parts first."
        )
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever a foreign type raises when it is asked for its numbers
        reason = "its rows differ in length" if "inhomogeneous" in str(error) else str(error)[:200]
        raise DataError(
            f"`{name}` ({type(value).__name__}) cannot be made an array: {reason}. Expected rows of one shape; for "
            "episodes of different lengths pass a list of dicts, one for each episode."
        ) from None
    if array.dtype == object:
        array = _of_objects(name, array)
    if array.dtype.kind == "V" and array.dtype.names is None:  # bfloat16 and the like, of jax
        try:
            array = array.astype(np.float32)
        except (TypeError, ValueError):
            raise DataError(f"`{name}` has type {array.dtype}; expected numbers. Cast it to float32.") from None
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # long doubles, which torch lacks
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _of_tensor(value: Any) -> Any:
    """A torch tensor as an array, without its graph; types that NumPy lacks as float32. Other values as they are."""
    if not (hasattr(value, "detach") and hasattr(value, "is_floating_point")):
        return value
    tensor = value.detach().cpu()
    if getattr(tensor, "layout", None) is not None and "strided" not in str(tensor.layout):
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and str(tensor.dtype) not in ("torch.float16", "torch.float32", "torch.float64"):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


def _unmasked(name: str, value: np.ma.MaskedArray) -> np.ndarray:
    """Masked numbers are missing ones: NaN, which the check of the content names."""
    if not np.ma.getmaskarray(value).any():
        return np.asarray(value.data)
    if value.dtype.kind == "f":
        return value.filled(np.nan)
    count = int(np.ma.getmaskarray(value).sum())
    raise DataError(
        f"`{name}` has {count} masked values of type {value.dtype}; expected none missing. Fill them in or leave out "
        "their episodes."
    )


def _of_objects(name: str, array: np.ndarray) -> np.ndarray:
    """An array of Python objects as one of numbers: rows that are arrays are stacked."""
    rows = [_of_tensor(row) for row in array.reshape(-1)] if array.ndim else []
    try:
        stacked = np.stack([np.asarray(row) for row in rows]) if rows else np.zeros(0)
        if stacked.dtype.kind in "fiubSU":
            return stacked.reshape(*array.shape, *stacked.shape[1:])
    except (TypeError, ValueError):
        pass
    kinds = sorted({type(row).__name__ for row in rows}) or [type(array.item()).__name__ if array.size == 1 else "none"]
    shapes = {np.shape(row) for row in rows if isinstance(row, (np.ndarray, list, tuple))}
    why = f"rows of {len(shapes)} shapes" if len(shapes) > 1 else f"objects ({listed(kinds)})"
    raise DataError(
        f"`{name}` holds {why}; expected numbers in rows of one shape. Cast or stack them; for episodes of different "
        "lengths pass a list of dicts, one for each episode."
    )


def joined_parts(name: str, parts: Mapping[str, Any], obs_keys: list[str] | None) -> np.ndarray:
    """A dict of observations as one array: the chosen parts, each flattened per step."""
    leaves = dict(_leaves(parts))
    if name not in OBSERVATIONS:
        raise DataError(f"`{name}` has parts ({listed(leaves)}); expected one array. Pass the part that is meant.")
    if obs_keys is None:
        example = ", ".join(repr(key) for key in list(leaves)[:3])
        raise DataError(
            f"`{name}` is a dict of {listed(leaves)}; expected one array (N, O). Say which parts to lay side by side, "
            f"in which order: `obs_keys=[{example}]`."
        )
    missing = [key for key in obs_keys if key not in leaves]
    if missing or not obs_keys:
        raise DataError(f"`{name}` has no part {listed(missing) or 'chosen'}; expected some of {listed(leaves)}.")
    arrays = [as_array(f"{name}/{key}", leaves[key]) for key in obs_keys]
    rows = {a.shape[:1] for a in arrays}
    if len(rows) != 1 or () in rows:
        shapes = listed(f"{key} {a.shape}" for key, a in zip(obs_keys, arrays))
        raise DataError(f"the parts of `{name}` have unequal lengths: {shapes}. Expected one row per step in each.")
    if len(arrays) == 1:
        return arrays[0] if arrays[0].ndim > 1 else arrays[0][:, None]
    return np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)


def _leaves(parts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in parts.items():
        inner = as_mapping(value)
        if inner is not None:
            yield from _leaves(inner, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


# -- lists of episodes -------------------------------------------------------------------------------------------------


def _joined(episodes: list[Any], obs_keys: list[str] | None) -> dict[str, np.ndarray]:
    """The columns of all episodes, one after the other, with ``episode_end`` where each ends."""
    if not episodes:
        raise DataError("the list of episodes is empty; expected at least one, a dict of columns.")
    parts: list[dict[str, np.ndarray]] = []
    for k, episode in enumerate(episodes):
        columns = as_mapping(episode)
        if columns is None and hasattr(episode, "observations") and hasattr(episode, "actions"):
            columns = {n: v for n, v in vars(episode).items() if not n.startswith("_")}  # an object of another library
        if columns is None:
            raise DataError(
                f"item {k} of the list is of type {type(episode).__name__}; expected a dict of columns ({EXAMPLE}) for "
                "each episode. For single steps pass a dict of arrays with a row for each step instead."
            )
        parts.append(_episode(k, _arrays(columns, obs_keys)))
    names = list(parts[0])
    for k, part in enumerate(parts):
        if set(part) != set(names):
            raise DataError(
                f"episode {k} has the columns {listed(sorted(part))}, episode 0 has {listed(sorted(names))}; expected "
                "the same in all."
            )
        for name in names:
            if part[name].shape[1:] != parts[0][name].shape[1:]:
                raise DataError(
                    f"`{name}` has rows of shape {part[name].shape[1:]} in episode {k} and "
                    f"{parts[0][name].shape[1:]} in episode 0; expected the same in all."
                )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in names}
    ends = np.cumsum([len(part[names[0]]) for part in parts]) - 1
    if "episode_end" not in whole:
        last = np.zeros(int(ends[-1]) + 1, dtype=bool)
        last[ends] = True
        whole["episode_end"] = last
    else:
        whole["episode_end"] = whole["episode_end"].astype(bool)
        whole["episode_end"][ends] = True
    return whole


def _episode(k: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One episode with a row per step in every column."""
    known = match(arrays)
    if "action" not in known or "obs" not in known:
        raise DataError(
            f"episode {k} has the columns {listed(arrays)}; expected {EXAMPLE}. Rename them, or leave out others."
        )
    action = arrays[known["action"]]
    single = [known[name] for name in ("obs", "action", "reward") if name in known and not arrays[known[name]].ndim]
    if single:
        raise DataError(
            f"episode {k} holds a single number in `{single[0]}`; expected an array with a row for each step. For "
            "single steps pass a dict of arrays instead of a list."
        )
    steps = len(action)
    if not steps:
        raise DataError(f"episode {k} has no steps; expected at least one. Leave it out.")
    flags = {name for names in find(arrays, None).values() for name in names}
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name == known["obs"] and len(array) == steps + 1 and "next_obs" not in known:
            found[name], found["next_obs"] = array[:-1], array[1:]
        elif array.ndim == 0 and name in flags and array.dtype.kind == "b":  # of the episode as a whole
            found[name] = np.append(np.zeros(steps - 1, dtype=bool), array)
        elif array.ndim and len(array) == steps:
            found[name] = array
        elif name in known.values() or name in flags:
            raise DataError(
                f"episode {k}: `{name}` has shape {array.shape} and `{known['action']}` {action.shape}; expected one "
                "row per step in each."
            )
    return found
