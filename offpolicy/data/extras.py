"""Extra columns: what of a step a method asks for by name, such as a weight, as ``batch.extra.<name>``."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.columns import Column, gather_rows, is_float, to_numpy
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError, listed, nearest


class Extra(SimpleNamespace):
    """Extra columns of a batch by name: ``batch.extra.weight``, or ``batch.extra["obs/arm"]``, each (B, …)."""

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


def checked_names(extra: Any) -> tuple[str, ...]:
    """The names of extra columns, each once.

    Raises:
        UsageError: they are no list or tuple of different names.
    """
    names: list[Any] = list(extra) if isinstance(extra, (tuple, list)) else [None]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise UsageError(f'`extra` is {extra!r}; expected names of columns, each once, such as ("weight",).')
    return tuple(names)


class ExtraColumns:
    """The extra columns of a replay, where batches are gathered from.

    Numbers are as the data have them: no normalisation touches them. Floats take the precision of the weights, whole
    numbers are int64, flags are bool.

    Args:
        names: of columns of its steps, of any shape (N, …).
        replay: the data.
        where: the device that rows are numbered on; columns on disk stay there.
        target: the device of the batches.
        dtype: of floats.

    Raises:
        DataError: there is no such column, or it holds no numbers, or some that are not finite.
    """

    def __init__(
        self, names: Sequence[str], replay: Replay, where: torch.device, target: torch.device, dtype: torch.dtype
    ) -> None:
        self.target, self.dtype = target, dtype
        self.columns: dict[str, Column] = {}
        for name in names:
            column = _checked(name, replay)
            on_disk = replay.is_mapped
            self.columns[name] = column if on_disk else self._cast(torch.as_tensor(column, device=where))

    def take(self, rows: Tensor, mask: Tensor | None = None) -> Extra | None:
        """The columns at replay rows (…), zero where the mask (…) is false; None where none were asked for."""
        if not self.columns:
            return None
        found = {}
        for name, column in self.columns.items():
            values = self._cast(gather_rows(column, rows)).to(self.target)
            if mask is not None:
                values = values * mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim()))
            found[name] = values
        return Extra(**found)

    def _cast(self, values: Tensor) -> Tensor:
        if values.is_floating_point():
            return values.to(self.dtype)
        return values if values.dtype == torch.bool else values.long()


def _checked(name: str, replay: Replay) -> Column:
    if name not in replay.steps:
        raise DataError(
            f"`extra` names the column `{name}`, and the steps have {listed(sorted(replay.steps))}; expected one of "
            f"these.{nearest(name, replay.steps)} Add it to the data, one row per step; of mixed data to both parts."
        )
    column = replay.steps[name]
    if not is_float(column):
        kind = to_numpy(column[:0]).dtype
        if kind.kind not in "iub":
            raise DataError(f"the extra column `{name}` has type {kind}; expected numbers or flags. Cast it.")
        return column
    values = to_numpy(column)
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not replay.is_whole:
        finite = finite[replay.rows]
    if not finite.all():
        raise DataError(
            f"the extra column `{name}` is NaN or infinite in {int((~finite).sum()):,} of the {len(finite):,} steps, "
            f"first in step {int((~finite).argmax()):,}; expected finite numbers. Fill them, or leave those episodes "
            "out."
        )
    return column
