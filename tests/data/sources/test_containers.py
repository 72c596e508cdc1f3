"""What people hand to `load_data` and `from_arrays`: lists, tensors, frames, dicts, arrays of any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import offpolicy as op
from offpolicy.data.sources import from_arrays
from offpolicy.errors import DataError, UsageError
from offpolicy.files import method_folder

N = 12


def walks(n: int = N, seed: int = 1, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    data = {
        "obs": rng.normal(size=(n, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "reward": rng.normal(size=n).astype(np.float32),
        "terminated": np.zeros(n, dtype=bool),
        **changes,
    }
    return {name: column for name, column in data.items() if column is not None}


# -- lists of episodes -------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    obs: Any
    action: Any
    reward: Any
    terminated: Any


@dataclasses.dataclass
class Record:
    obs: Any
    action: Any
    reward: Any
    terminated: Any


class Foreign:
    """An episode of another library: attributes, one observation more than actions."""

    def __init__(self, **columns: Any) -> None:
        self.observations, self.actions, self.rewards = columns["obs"], columns["action"], columns["reward"]
        self.terminations, self._private, self.infos = columns["terminated"], object(), None


@pytest.mark.parametrize("kind", [dict, lambda **c: Named(**c), lambda **c: Record(**c), lambda **c: Foreign(**c)])
@pytest.mark.parametrize("outer", [list, tuple, iter])
def test_a_list_of_episodes(kind: Any, outer: Any) -> None:
    parts = [walks(4), walks(3, seed=2)]
    replay = op.load_data(outer([kind(**part) for part in parts])).replay
    assert replay is not None and replay.length.tolist() == [4, 3] and not replay.meta["warnings"]
    np.testing.assert_array_equal(replay.steps["obs"], np.concatenate([part["obs"] for part in parts]))


def test_the_observation_after_the_last_action_becomes_a_next_observation() -> None:
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    replay = from_arrays([walks(4, obs=obs), walks(4, obs=obs, terminated=True)])
    np.testing.assert_array_equal(replay.steps["obs"][:4], obs[:4])
    np.testing.assert_array_equal(replay.steps["next_obs"][:4], obs[1:])
    assert np.flatnonzero(replay.steps["terminated"]).tolist() == [7] and len(replay.usable_rows()) == 8


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "the list of episodes is empty"),
        ([walks(4), 3], "item 1 of the list is of type int"),
        ([(np.zeros(3), np.zeros(1), 0.0)], "item 0 of the list is of type tuple"),
        ([walks(4), walks(3, extra=np.zeros(3))], "episode 1 has the columns"),
        ([walks(4), walks(3, obs=np.zeros((3, 2)))], "`obs` has rows of shape (2,) in episode 1 and (3,) in episode 0"),
        ([walks(4, reward=np.zeros(3))], "`reward` has shape (3,) and `action` (4, 2)"),
        ([{"obs": np.zeros(3), "action": 1.0, "reward": 0.0}], "holds a single number"),
        ([walks(0)], "episode 0 has no steps"),
        ([{"state": np.zeros((3, 2))}], "episode 0 has the columns state"),
        (3, "the data are of type int"),
        (np.zeros((4, 2)), "the data are of type ndarray"),
        ({1, 2}, "the data are of type set"),
    ],
)
def test_other_things_are_refused_in_a_sentence(data: Any, text: str) -> None:
    with pytest.raises(DataError) as error:
        op.load_data(data)
    assert text in str(error.value) and len(str(error.value)) < 600


# -- one column --------------------------------------------------------------------------------------------------------


def big_endian(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder(">"))


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def objects(x: np.ndarray) -> np.ndarray:
    rows = np.empty(len(x), dtype=object)
    rows[:] = list(x)
    return rows


class Duck:
    """An array of a library that NumPy has not heard of."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype)


LAYOUTS: dict[str, Any] = {
    "fortran order": np.asfortranarray,
    "negative strides": lambda x: x[::-1].copy()[::-1],
    "columns of a wider array": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "big endian": big_endian,
    "double": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "read only": read_only,
    "nested lists": lambda x: x.tolist(),
    "a list of arrays": list,
    "a list of tensors": lambda x: [torch.tensor(row, requires_grad=True) for row in x],
    "objects": objects,
    "unmasked": np.ma.MaskedArray,
    "tensor with gradient": lambda x: torch.tensor(x, requires_grad=True),
    "a view of a tensor": lambda x: torch.tensor(x.T.copy()).T,
    "duck": Duck,
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_and_types_of_the_same_numbers(kind: str) -> None:
    plain, data = from_arrays(walks()), walks()
    replay = from_arrays({**data, "obs": LAYOUTS[kind](data["obs"])}, weight=LAYOUTS[kind](data["obs"]))
    np.testing.assert_array_equal(replay.steps["obs"], plain.steps["obs"])
    for column in replay.steps.values():
        assert column.dtype.isnative and column.flags.c_contiguous
        torch.from_numpy(np.take(column, [0], axis=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_other_precision(dtype: torch.dtype) -> None:
    obs = torch.tensor(walks()["obs"]).to(dtype)
    np.testing.assert_array_equal(from_arrays(walks(obs=obs)).steps["obs"], obs.float().numpy())


def test_memory_maps(tmp_path: Path) -> None:
    np.save(tmp_path / "obs.npy", walks()["obs"])
    mapped = np.load(tmp_path / "obs.npy", mmap_mode="r")
    np.testing.assert_array_equal(from_arrays(walks(obs=mapped)).steps["obs"], walks()["obs"])


def test_data_frames_and_structured_arrays() -> None:
    class Frame:  # as a data frame of pandas: columns by name, rows by place
        def __init__(self, columns: dict[str, Any]) -> None:
            self._data, self.columns, self.iloc = columns, list(columns), None

        def __getitem__(self, name: str) -> Any:
            return self._data[name]

    data = walks()
    structured = np.zeros(N, dtype=[(k, v.dtype, v.shape[1:]) for k, v in data.items()])
    for name, column in data.items():
        structured[name] = column
    frame = Frame({name: objects(column) if column.ndim > 1 else column for name, column in data.items()})
    for given in (structured, frame):
        assert from_arrays(given).fingerprint() == from_arrays(data).fingerprint()


def test_tables_of_arrow() -> None:
    import pyarrow as pa

    data = walks()
    table = pa.table({name: column.tolist() for name, column in data.items()})
    replay = from_arrays(table)
    for name, column in data.items():
        np.testing.assert_array_equal(replay.steps[name], column)


def test_missing_values_are_content_faults() -> None:
    obs = np.ma.MaskedArray(walks()["obs"], mask=np.arange(36).reshape(12, 3) == 7)
    with pytest.raises(DataError, match=r"`obs` has NaN or infinite values in 1 row \(first: row 2"):
        from_arrays(walks(obs=obs))
    data = walks(obs=obs, episode_end=np.arange(N) % 4 == 3)
    assert from_arrays(data, on_bad="drop_episode").num_episodes == 2
    with pytest.raises(DataError, match="`terminated` has 1 masked values of type bool"):
        from_arrays(walks(terminated=np.ma.MaskedArray(np.zeros(N, bool), mask=np.arange(N) == 3)))


@pytest.mark.parametrize(
    ("obs", "text"),
    [
        ([[1.0, 2.0], [1.0]], "its rows differ in length"),
        ([*objects(np.zeros((N, 2)))[:3].tolist(), None], "`obs`"),
        (np.array([{"a": 1}] * N, dtype=object), "`obs` holds objects (dict)"),
        (np.array([np.zeros(2)] * 11 + [np.zeros(3)], dtype=object), "`obs` holds rows of 2 shapes"),
        (["a"] * N, "`obs` has"),
        (np.zeros((N, 2), complex), "`obs` has type complex128"),
        (np.zeros(N, dtype=[("x", "f4"), ("y", "f4")]), "`obs` is a dict of x, y"),
        ([{"x": 1.0}] * N, "`obs` is a list of dicts"),
        ((x for x in range(3)), "`obs`"),
        ({1.0, 2.0}, "`obs` is of type set"),
        (len, "`obs` is of type builtin_function_or_method"),
        (np.zeros((N, 0)), "so there is no number in them"),
    ],
)
def test_what_is_no_column_is_refused_in_a_sentence(obs: Any, text: str) -> None:
    with pytest.raises(DataError) as error:
        from_arrays(walks(obs=obs))
    assert text in str(error.value) and len(str(error.value)) < 600


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ["meta", "quantized", "nested"])
def test_tensors_without_plain_numbers_are_refused_in_a_sentence(make: str) -> None:
    obs = {
        "meta": lambda: torch.zeros(N, 3, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(N, 3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(3)] * N),
    }[make]()
    with pytest.raises(DataError, match=r"`obs` .Tensor. cannot be made an array: .*pass a plain tensor"):
        from_arrays(walks(obs=obs))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_episode_steps": -3}, "at least 1"),
        ({"max_episode_steps": 2.5}, "a whole number"),
        ({"ref_min_score": 1.0, "ref_max_score": 1.0}, "the smaller first"),
        ({"ref_min_score": float("nan"), "ref_max_score": 1.0}, "the smaller first"),
        ({"ref_max_score": 1.0}, "`ref_min_score` is None"),
    ],
)
def test_numbers_of_a_task_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        from_arrays(walks(), **options)


def test_names_of_columns_and_data_may_be_anything(tmp_path: Path) -> None:
    odd = {"прев/../x": np.ones(N), "a\0b": np.zeros(N), "y" * 300: np.zeros(N)}
    from_arrays(walks(**odd)).save(tmp_path / "set")
    assert odd.keys() <= op.load_data(str(tmp_path / "set")).replay.steps.keys()
    assert len(method_folder("runs", "é" * 400, "TD3BC").parent.name.encode()) <= 200


def test_dict_observations() -> None:
    a, b = walks()["obs"], np.arange(N, dtype=np.float32)
    nested = {"arm": {"pose": a, "grip": b}, "image": np.zeros((N, 4, 4))}
    with pytest.raises(DataError, match=r"dict of arm/pose, arm/grip, image; .* `obs_keys=\['arm/pose', 'arm/grip'"):
        from_arrays(walks(obs=nested))
    for data in (walks(obs=nested, next_obs=nested), [walks(obs=nested, next_obs=nested)]):
        replay = op.load_data(data, obs_keys=["arm/grip", "arm/pose"]).replay
        assert replay is not None and replay.meta["obs_keys"] == ["arm/grip", "arm/pose"]
        np.testing.assert_array_equal(replay.steps["obs"], np.concatenate([b[:, None], a], axis=1))
        np.testing.assert_array_equal(replay.steps["next_obs"], replay.steps["obs"])
    with pytest.raises(DataError, match="`obs` has no part leg"):
        from_arrays(walks(obs=nested), obs_keys=["leg"])
    with pytest.raises(DataError, match="`action` has parts"):
        from_arrays(walks(action=nested))


def test_other_columns_need_not_be_numbers() -> None:
    others = {"infos": {"a": 1, "b": {}}, "names": objects(np.array(["x"] * N)), "log": [{"k": 1}] * N, "fn": len}
    for data in (walks(**others), [walks(**others)]):
        replay = from_arrays(data)
        assert not others.keys() & replay.steps.keys() and replay.num_steps == N
    assert any("`infos`" in n and "left out" in n for n in from_arrays(walks(**others)).meta["notes"])


def test_a_misspelt_option_is_no_column() -> None:
    with pytest.raises(UsageError, match=r"`env_ids` is 'Pendulum-v1'.* Did you mean 'env_id'\?"):
        from_arrays(walks(), env_ids="Pendulum-v1")
    with pytest.raises(UsageError, match="`env_id` was given for a replay"):
        op.load_data(from_arrays(walks()), env_id="Pendulum-v1")


def test_messages_stay_short() -> None:
    many = {f"column {i} with a name that goes on and on and on {'x' * 90}": np.zeros(3) for i in range(500)}
    with pytest.raises(DataError) as error:
        from_arrays(many)
    assert len(str(error.value)) < 2000 and "and 490 more" in str(error.value)


def test_the_data_module_shows_its_report() -> None:
    assert "12 in 1 episode;" in repr(op.load_data(walks())) and "12 in 1" in str(op.load_data(walks()))
    from offpolicy.data.module import DataModule

    assert repr(DataModule("pendulum-stitch-v0")) == "<DataModule of pendulum-stitch-v0, not open yet>"
