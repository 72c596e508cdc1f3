"""Where the episodes of a Minari data set lie: HDF5, or Arrow and Parquet parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from offpolicy.data.guard import check_dataset, check_parquet, check_size, checked_table
from offpolicy.data.sources.fetch import corrupt, open_hdf5
from offpolicy.errors import DataError, listed

COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")


class Storage(Protocol):
    """Where the episodes lie. ``lengths`` are the steps T of each."""

    files: list[Path]
    lengths: np.ndarray

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: object) -> None: ...

    def fill(self, episode: int, key: str, out: np.ndarray) -> None:
        """Read a column of an episode, T + 1 rows of observations and T of the others, without padding."""

    def layout(self, episode: int, key: str) -> tuple[int, tuple[int, ...], Any]:
        """Rows of a column of an episode beyond its steps (0 or 1), the shape of one row, and its type."""


class Hdf5Storage:
    """``main_data.hdf5`` with a group per episode; read at the lowest level, as there are thousands of small reads."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path} does not exist; the data set is incomplete. Delete its folder and fetch it again.")
        self.files = [path]
        self.file = open_hdf5(path)
        names = [name for name in self.file if name.startswith("episode_")]
        self.names = sorted(names, key=lambda name: int(name.removeprefix("episode_")))
        self.lengths = np.array([self._open(k, "rewards").shape[0] for k in range(len(self.names))], dtype=np.int64)

    def __enter__(self) -> Hdf5Storage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def fill(self, episode: int, key: str, out: np.ndarray) -> None:
        from h5py import h5s

        dataset = self._open(episode, key)
        shape = dataset.shape
        if shape[:1] != out.shape[:1]:
            raise DataError(
                f"{self.files[0]}: episode {episode} has {shape[0]} rows of `{key}` for {self.lengths[episode]} "
                "steps; expected "
                f"{len(out)} (observations: the one after the last step included). Record or fetch the data set again."
            )
        try:
            if shape == out.shape and (dataset.dtype.kind == "b") == (out.dtype.kind == "b"):
                dataset.read(h5s.ALL, h5s.ALL, out)  # converts floats and integers on the way
                return
            check_size(self.files[0], f"{self.names[episode]}/{key}", prod(shape) * dataset.dtype.itemsize, out.nbytes)
            values = np.empty(shape, dataset.dtype)
            dataset.read(h5s.ALL, h5s.ALL, values)
        except OSError as error:
            raise corrupt(self.files[0], f"{self.names[episode]}/{key}", error) from None
        if values.size != out.size:
            raise DataError(
                f"{self.files[0]}: `{self.names[episode]}/{key}` has shape {shape}; expected {out.shape} by the "
                "space in the metadata. Record or fetch the data set again."
            )
        out[...] = values.reshape(out.shape)

    def layout(self, episode: int, key: str) -> tuple[int, tuple[int, ...], Any]:
        from h5py import h5i

        group = self.file[self.names[episode]]
        if key in group and h5i.get_type(group[key].id) != h5i.DATASET:
            raise DataError(
                f"{self.files[0]}: `{key}` is a group of {listed(group[key])}; expected one of its columns. Name it."
            )
        found = self._open(episode, key)
        rows, *shape = found.shape or (0,)
        return rows - int(self.lengths[episode]), tuple(shape), found.dtype

    def _open(self, episode: int, key: str) -> Any:
        from h5py import h5d

        try:
            found = h5d.open(self.file.id, f"{self.names[episode]}/{key}".encode())
            check_dataset(found, self.files[0], f"{self.names[episode]}/{key}", size=False)  # `fill` knows it
            return found
        except KeyError:
            raise DataError(
                f"{self.files[0]}: `{self.names[episode]}` has no `{key}`; the data set is incomplete. Fetch it again."
            ) from None


class ArrowStorage:
    """A folder per episode with Arrow or Parquet parts; every column has T + 1 rows, the last padding but for obs."""

    def __init__(self, folder: Path, kind: str, more: tuple[str, ...] = ()) -> None:
        episodes = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
        self.kind, self.columns = kind, (*COLUMNS, *more)
        self.parts = [sorted(p.glob(f"part-*.{kind}"), key=lambda part: int(part.stem.split("-")[1])) for p in episodes]
        for episode, parts in zip(episodes, self.parts):
            if not parts:
                raise DataError(f"{episode} holds no part-*.{kind}; the data set is incomplete. Fetch it again.")
        self.files = [part for parts in self.parts for part in parts]
        self.at: tuple[int, Any] = (-1, None)  # the episode that is open
        self.lengths = np.array([self._count(k) - 1 for k in range(len(self.parts))], dtype=np.int64)
        for k, episode in enumerate(episodes):
            record = episode / "metadata.json"
            steps = json.loads(record.read_text()).get("total_steps") if record.is_file() else None
            if steps is not None and steps != self.lengths[k]:
                raise DataError(
                    f"{episode} has {self.lengths[k] + 1} rows for {steps} steps; expected {steps + 1} (the "
                    "observation after the last step included). Record or fetch the data set again."
                )

    def __enter__(self) -> ArrowStorage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.at = (-1, None)

    def fill(self, episode: int, key: str, out: np.ndarray) -> None:
        import pyarrow as pa

        try:
            values = self._values(episode, key)
            out[...] = values.reshape(int(self.lengths[episode]) + 1, *out.shape[1:])[: len(out)]
        except (pa.ArrowException, KeyError) as error:
            raise corrupt(self.parts[episode][0], key, error) from None
        except ValueError as error:
            raise DataError(
                f"{self.parts[episode][0]}: `{key}` does not have the shape {out.shape[1:]} of the space in the "
                f"metadata ({error}). Record or fetch the data set again."
            ) from None

    def layout(self, episode: int, key: str) -> tuple[int, tuple[int, ...], Any]:
        import pyarrow as pa

        try:
            values = self._values(episode, key)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{self.parts[episode][0]}: there is no column `{key}` of numbers ({error}).") from None
        width = values.size // (int(self.lengths[episode]) + 1)
        return 1, () if width == 1 else (width,), values.dtype

    def _values(self, episode: int, key: str) -> np.ndarray:
        """The numbers of a column of an episode, flat."""
        import pyarrow as pa

        name, *nested = key.split("/")
        if self.at[0] != episode:
            self.at = (episode, self._guarded(episode, lambda: pa.concat_tables(map(self._table, self.parts[episode]))))
        column = self.at[1].column(name).combine_chunks()
        for part in nested:
            column = column.field(part)
        while pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
            column = column.flatten()
        if pa.types.is_struct(column.type):
            raise KeyError(f"it holds {', '.join(field.name for field in column.type)}")
        return column.to_numpy(zero_copy_only=False)

    def _count(self, episode: int) -> int:
        if self.kind == "parquet":
            return self._guarded(episode, lambda: sum(map(check_parquet, self.parts[episode])))
        return self._guarded(episode, lambda: sum(self._table(p).num_rows for p in self.parts[episode]))

    def _table(self, part: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        names = list(self.columns)
        if self.kind == "parquet":
            return checked_table(parquet.ParquetFile(part).read(columns=names))
        with pa.memory_map(str(part)) as source:
            return checked_table(pa.ipc.open_file(source).read_all().select(names))

    def _guarded(self, episode: int, action: Callable[[], Any]) -> Any:
        import pyarrow as pa

        try:
            return action()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(
                f"{self.parts[episode][0]} cannot be read ({error}); it is truncated or damaged. Delete it and "
                "fetch the data set again."
            ) from None
