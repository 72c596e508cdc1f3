"""What one seed has of several that are trained at once: columns of rows, and parts of checkpoints.

In a joint row the name of a number stands for the mean over seeds, ``<name>_seed_std`` for their standard deviation,
and ``<name>_seed<seed>`` for the number of one seed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from offpolicy.training.checkpoints import KEY

OF_SEEDS = re.compile(r"_seed(\d+|_std)$")


def over(name: str, values: Mapping[int, float]) -> dict[str, float]:
    """The columns of one number: mean, standard deviation (divisor n - 1, from two seeds on), and that of each seed."""
    numbers = np.array(list(values.values()), dtype=np.float64)
    with np.errstate(invalid="ignore"):  # of seeds that diverged
        columns = {name: float(numbers.mean())}
        if len(numbers) > 1:
            columns[f"{name}_seed_std"] = float(numbers.std(ddof=1))
    return columns | {f"{name}_seed{seed}": value for seed, value in values.items()}


def wide_row(row: Mapping[str, Any], seeds: tuple[int, ...]) -> dict[str, Any]:
    """A row of metrics whose lists, one number per seed, and mappings, from seeds to numbers, are columns."""
    wide: dict[str, Any] = {}
    for name, value in row.items():
        each = dict(zip(seeds, value, strict=True)) if isinstance(value, list) else value
        wide |= over(name, each) if isinstance(each, Mapping) else {name: value}
    return wide


def row_of_seed(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The row of one seed, as its single run has it, out of a joint row."""
    several = {name[: match.start()] for name in row if (match := OF_SEEDS.search(name))}
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name in several:
            if f"{name}_seed{seed}" in row:
                found[name] = row[f"{name}_seed{seed}"]
        elif not OF_SEEDS.search(name):
            found[name] = value
    return found


def checkpoint_of_seed(checkpoint: Mapping[str, Any], seed: int, stacked: Collection[str]) -> dict[str, Any]:
    """The checkpoint of one seed, as its single run has it, out of a joint one.

    Args:
        checkpoint: of several seeds.
        seed: one of them.
        stacked: the names in its ``state_dict`` that have an axis of seeds in front: those of parameters.
    """
    own = checkpoint[KEY]
    index, count = own["seeds"].index(seed), len(own["seeds"])

    def part(value: Any) -> Any:
        """The numbers of the seed: of every tensor with the axis in front, all the way down."""
        if isinstance(value, torch.Tensor):
            return value[index].clone() if value.dim() and value.shape[0] == count else value
        if isinstance(value, Mapping):
            return {key: part(item) for key, item in value.items()}
        return type(value)(map(part, value)) if isinstance(value, (list, tuple)) else value

    state = copy.copy(checkpoint["state_dict"])  # with the notes of torch
    state |= {name: state[name][index].clone() for name in stacked if name in state}
    data = {name: of_seed(found, seed) for name, found in checkpoint.items()}
    held = [name for name in ("optimizer_states",) if name in checkpoint]  # not where it holds weights alone
    optimizers = {name: [{**one, "state": part(one["state"])} for one in checkpoint[name]] for name in held}
    callbacks = {name: of_seed(found, seed) for name, found in checkpoint.get("callbacks", {}).items()}
    return {
        **data,
        "state_dict": state,
        **optimizers,
        "callbacks": callbacks,
        KEY: {**own, "seeds": (), "seed": seed, "data": of_seed(own["data"], seed), "meters": part(own["meters"])},
    }


def of_seed(state: Any, seed: int) -> Any:
    """A state in the single run of a seed: where there is one for each, that one."""
    each = state.get("of_seeds") if isinstance(state, Mapping) else None
    if each is None:
        return state
    return {key: value for key, value in state.items() if key != "of_seeds"} | each[seed]
