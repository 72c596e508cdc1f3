"""What several seeds collect that are trained at once: each in environments and a store of its own, as if alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offpolicy.compute.processes import is_first_process
from offpolicy.compute.room import size
from offpolicy.data.collection import Collection
from offpolicy.data.replay import Replay


def place_of(folder: Path, seed: int) -> Path:
    """Where the rounds of a seed lie in the folder of rounds of a joint run."""
    return folder / f"seed{seed}"


class SeedCollections:
    """The collections of several seeds, one after the other in every round; as :class:`Collection` to a run.

    Args:
        make: the collection of a seed.
        seeds: of the run.

    Attributes:
        each: the collection of each seed.
    """

    def __init__(self, make: Callable[[int], Collection], seeds: Sequence[int]) -> None:
        self.each = {seed: make(seed) for seed in seeds}
        self.seeds, self.one = tuple(seeds), self.each[seeds[0]]  # the first says what is the same of all

    @property
    def rounds(self) -> int:
        """So far, of the seed that has the most: whole episodes may bring one to its last steps a round earlier."""
        return max(one.rounds for one in self.each.values())

    @property
    def switch(self) -> int:
        """The update at which collecting begins."""
        return self.one.switch

    @property
    def updates(self) -> int:
        """Updates of the run when everything has been collected."""
        return self.one.updates

    @property
    def offline(self) -> Replay | None:
        """The data that all seeds started with."""
        return self.one.offline

    @property
    def store(self) -> Replay:
        """What the first seed is trained on now."""
        return self.one.store

    @property
    def stores(self) -> list[Replay]:
        """What each seed is trained on now."""
        return [one.store for one in self.each.values()]

    def first(self) -> Replay:
        """What a run begins with; returns that of the first seed."""
        for one in self.each.values():
            one.first()
        return self.store

    def begin_at(self, updates: int, state: Mapping[str, Any] | None, seed: int) -> Replay:
        """As :meth:`Collection.begin_at`; seeds are known, so ``seed`` is not used."""
        states = (state or {}).get("of_seeds", {})
        for own, one in self.each.items():
            one.begin_at(updates, states.get(own), own)
        return self.store

    # -- numbers and words ---------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, dict[int, Any]]:
        """Numbers for the row of an evaluation, of each seed."""
        return _by_name({seed: one.counts() for seed, one in self.each.items()})

    def row(self, updates: int, training: float) -> dict[str, Any]:
        """As :meth:`Collection.row`, with the numbers of each seed; the share of the time is that of all."""
        found: dict[str, Any] = _by_name({seed: one.numbers(updates) for seed, one in self.each.items()})
        collecting = sum(one.seconds for one in self.each.values())
        for one in self.each.values():
            one.seconds = 0.0
        return found | {"perf/collecting_share": collecting / max(collecting + training, 1e-9)}

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen."""
        full = f"together about {size(self.room())} when they are full"
        each = f"by each of {len(self.each)} seeds, in environments and with a store of its own, {full}"
        return [*self.one.facts(), ("", each)]

    def room(self) -> int:
        """Bytes of all stores when they are full: rows as they were collected, and as batches are drawn from them."""
        o, sim, offline = self.one.options, self.one.simulator, self.one.offline
        kept = 0 if offline is None or o.mix == "none" else offline.num_steps
        numbers = (sim.obs_dim + sim.action_dim + 2) + (2 * sim.obs_dim + sim.action_dim + 2)
        return 4 * len(self.each) * numbers * (o.capacity or kept + o.env_steps)

    # -- collecting and checkpoints ------------------------------------------------------------------------------------

    def collect(self, policy: Any, folder: Path) -> Replay:
        """The round that is due of every seed, by its own policy, into a folder of its own."""
        for seed, one in self.each.items():
            acts = policy.take_seed(seed) if is_first_process() else None
            one.collect(acts, place_of(folder, seed))
        return self.store

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, of each seed."""
        return {"version": self.rounds, "of_seeds": {seed: one.state() for seed, one in self.each.items()}}

    def restore(self, state: Mapping[str, Any], folders: list[Path]) -> Replay:
        """As :meth:`Collection.restore`."""
        for seed, one in self.each.items():
            one.restore(state["of_seeds"][seed], [place_of(folder, seed) for folder in folders])
        return self.store

    def save(self, folder: Path) -> None:
        """Write what each seed collected beside its rounds."""
        for seed, one in self.each.items():
            one.save(place_of(folder, seed))

    def save_late(self, state: Mapping[str, Any], folder: Path) -> None:
        """The same for a run that was stopped before it had."""
        for seed, one in self.each.items():
            one.save_late(state["of_seeds"][seed], place_of(folder, seed))


def _by_name(rows: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """Numbers by name and then by seed; a seed that has none of a name is left out there."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {name: {seed: row[name] for seed, row in rows.items() if name in row} for name in names}
