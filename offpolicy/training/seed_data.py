"""Several seeds that are trained at once, each on data of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offpolicy.data.extras import Extra
from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.data.views import BoundView
from offpolicy.errors import UsageError
from offpolicy.given import seeds_text


class SeedViews(BoundView):
    """The views of several seeds as one: items, rows and batches have their axis, (…, S, B).

    Args:
        parts: the view of each seed, of one kind.
    """

    def __init__(self, parts: Sequence[BoundView]) -> None:
        self.parts, self.device, self.uniforms = parts, parts[0].device, parts[0].uniforms
        self.cumulative = parts[0].cumulative

    def __len__(self) -> int:
        """Number of items of all seeds that can be drawn."""
        return sum(map(len, self.parts))

    def row(self, items: Tensor) -> Tensor:
        """Refused: rows are of one replay (UsageError)."""
        raise UsageError("each seed has rows of data of its own, and those of one are asked for; expected one seed.")

    def pick(self, word: Tensor, row: Tensor | None = None) -> Tensor:
        return torch.stack([part.pick(word[..., i, :], row) for i, part in enumerate(self.parts)], -2)

    def gather(self, items: Tensor) -> Any:
        """The batch of these items; fields have the axis of seeds where the items have it."""
        found = [part.gather(items[..., i, :]) for i, part in enumerate(self.parts)]
        axis = items.dim() - 2

        def stacked(values: Sequence[Any]) -> Any:
            if isinstance(values[0], Tensor):
                return torch.stack(list(values), axis)
            if isinstance(values[0], Extra):
                names = vars(values[0])
                return Extra(**{name: stacked([getattr(value, name) for value in values]) for name in names})
            return values[0]

        return type(found[0])(*map(stacked, zip(*found, strict=True)))

    def grow_each(self, replays: Sequence[Replay]) -> bool:
        """As :meth:`BoundView.grow`, of every seed."""
        return all(part.grow(replay) for part, replay in zip(self.parts, replays, strict=True))


def data_of_seeds(method: Any, collection: Any) -> dict[int, tuple[str, dict[str, Any]]]:
    """Fingerprint and facts of the data that each seed begins with; of none where all begin with the same.

    Raises:
        UsageError: as :func:`check_seeds` and :func:`check_alike`.
    """
    check_seeds(method.seeds, collection)
    if not method.seeds:
        return {}
    stores = collection.stores
    check_alike(method, [method.select(store) for store in stores])
    if collection.offline is not None:
        return {}
    return {seed: (store.fingerprint(), dict(store.meta)) for seed, store in zip(method.seeds, stores, strict=True)}


def check_seeds(seeds: tuple[int, ...], collection: Any) -> None:
    """Refuse a data module that collects for other seeds than the method has (UsageError), under a Trainer alone."""
    if collection.seeds != seeds:
        ours, theirs = (seeds_text(numbers) if numbers else "one seed" for numbers in (seeds, collection.seeds))
        raise UsageError(
            f"`seeds` is {ours}, and the data module collects for {theirs}; expected the same. Train with "
            "offpolicy.fit, or set `data.seeds` before the data are opened."
        )


def check_alike(method: Any, replays: Sequence[Replay]) -> None:
    """Refuse data of several seeds that ask for other networks or another scale for each.

    Args:
        method: with networks, and a normaliser that was fitted to the data of the first.
        replays: what each seed begins with.

    Raises:
        UsageError: says what differs.
    """
    seeds, sizes = seeds_text(method.seeds), [Sizes.of(replay) for replay in replays]
    if any(one != sizes[0] for one in sizes):
        raise UsageError(
            f"`seeds` is {seeds}, and the longest episodes that they began with have {sizes[0].max_steps:,} and other "
            "numbers of steps; expected a limit of the environment. Pass --data.max_episode_steps N."
        )
    if any(replay is not replays[0] for replay in replays):
        first = [buffer.clone() for buffer in method.normalizer.buffers()]
        for replay in replays[1:]:
            method.fit_normalizer(replay)
            if not all(map(torch.equal, first, method.normalizer.buffers())):
                scaled, rewards = str(method.common.normalize_obs).lower(), method.common.reward_transform
                raise UsageError(
                    f"`seeds` is {seeds}, each with data of its own, whose statistics differ (`normalize_obs` is "
                    f"{scaled}, `reward_transform` is {rewards!r}); expected the same scale for all. Pass "
                    "--model.normalize_obs false (and no return_range), or start one process per seed."
                )
