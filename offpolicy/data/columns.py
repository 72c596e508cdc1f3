"""Columns of a store: NumPy arrays in memory, memory maps, or torch tensors on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Column = np.ndarray | Tensor


def to_numpy(column: Column) -> np.ndarray:
    """The column as an array in the memory of the host, or the memory map it is."""
    return column.cpu().numpy() if isinstance(column, Tensor) else column


def gather_rows(column: Column, indices: Tensor | np.ndarray) -> Tensor:
    """Rows of a column as a tensor: on the column's device, or in memory for arrays and maps."""
    if isinstance(column, Tensor):
        index = torch.as_tensor(indices, device=column.device)
        return column.index_select(0, index.reshape(-1)).reshape(*index.shape, *column.shape[1:])
    return torch.from_numpy(np.take(column, to_numpy(indices), axis=0))


def is_mapped(column: Column) -> bool:
    """Whether the column lies on disk."""
    base: Any = column
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def smallest_type(count: int) -> type:
    """The smallest integer type that holds the numbers 0 … count - 1, such as the ids of a vocabulary."""
    for kind in (np.uint8, np.uint16):
        if count - 1 <= np.iinfo(kind).max:
            return kind
    return np.int32


def is_float(column: Column) -> bool:
    """Whether the column holds floating-point numbers."""
    return column.is_floating_point() if isinstance(column, Tensor) else column.dtype.kind == "f"


def row_width(column: Column) -> int:
    """How many numbers a row has."""
    return int(np.prod(column.shape[1:]))
