"""What a run collects in an environment while a method trains: K steps, then K updates or a multiple, in rounds.

Round r is collected with the weights at its start. Episode j is reset with a hash of the seed and j, and the action of
environment step n takes its noise from a hash of the seed and n, so there is no generator to keep. Each round is a
folder of its own, written before its first update: a checkpoint names the rounds and their hash, and a resumed run lays
them out again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.compute.processes import is_first_process, wait_for_all
from offpolicy.data import sampling
from offpolicy.data.columns import to_numpy
from offpolicy.data.mixing import SPLIT, joined
from offpolicy.data.online import RANDOM_STEPS, OnlineOptions, check_fit
from offpolicy.data.players import Players
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.rounds import StepNoise, fitted, in_environment, pieces_joined
from offpolicy.errors import DataError, UsageError, amount
from offpolicy.files import atomic_copy
from offpolicy.trust import REFUSED, check_environment, environment_refusal

log = logging.getLogger(__name__)
COLLECTED = "collected"  # beside the rounds: all that was collected, as a data set
FREE = ("env_steps",)  # the options that a run which goes on may have otherwise


def round_name(number: int) -> str:
    """The folder of a round, from 1 on; number 0 has the random steps of a run from scratch."""
    return f"round-{number:06d}"


class Collection:
    """What is collected in a run, and the store of it and of the data that it started with.

    Args:
        options: what to collect.
        offline: data to start with; None for a run from scratch.
        seed: of resets and actions.
        max_episode_steps, obs_keys: of the environment, for a run from scratch.

    Attributes:
        switch: the update at which collecting begins.
        rounds: so far.
        news: numbers of the newest round, for a row of metrics.
        seconds: spent on collecting since :meth:`row` was last asked.

    Raises:
        UsageError: an environment in which nothing can be collected, or options that do not fit it or the data.
    """

    seeds: tuple[int, ...] = ()  # of several; this is of one

    def __init__(
        self,
        options: OnlineOptions,
        offline: Replay | None,
        seed: int,
        *,
        max_episode_steps: int | None = None,
        obs_keys: list[str] | None = None,
    ) -> None:
        self.options, self.offline, self.seed, self.switch = options, offline, seed, 0
        meta = {} if offline is None else dict(offline.meta)
        if options.env and options.env != meta.get("env_id"):
            meta = {"env_id": options.env, "obs_keys": obs_keys, "max_episode_steps": max_episode_steps}
        if options.env_kwargs is not None:
            meta["env_kwargs"] = options.env_kwargs
        if not meta.get("env_id") and not meta.get(REFUSED):
            raise UsageError(
                "`data.online.env_steps` is given, and the data name no environment; expected one to collect in. Add "
                "--data.online.env ID."
            )
        check_environment(meta, "data.online.env")
        if meta.get(REFUSED):
            raise UsageError(f"no data can be collected: {environment_refusal(meta[REFUSED])}.")
        keep, whole = (options.episodes == kind for kind in ("keep", "whole"))
        self.players = Players(meta, options.envs, keep=keep, whole=whole)
        self.simulator, self.env_id = self.players.simulator, self.players.env_id
        random = max(1, min(RANDOM_STEPS, options.env_steps // 10)) if offline is None else 0
        self.random_steps = random if options.random_steps is None else options.random_steps
        check_fit(options, self.simulator, self.random_steps, offline)
        if offline is not None:
            self.offline = in_environment(offline, self.players.meta())
        self.reset()

    # -- where the run stands ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Back to the beginning, as nothing had been collected."""
        self.players.reset(self.seed)
        self.rounds = 0
        self.hash, self.news, self.seconds = "", dict[str, float](), 0.0
        self.ring: Ring | None = None
        self.random_part: Replay | None = None  # what a run from scratch begins with
        self._uniform = StepNoise("random", self.seed, self.simulator.action_dim, sampling.uniforms)

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return self.players.steps

    @property
    def played(self) -> int:
        """Episodes so far that ended or were cut."""
        return self.players.ended

    @property
    def updates(self) -> int:
        """Updates of the run when everything has been collected."""
        return self.switch + (self.options.env_steps - self.lead) * self.options.utd

    @property
    def lead(self) -> int:
        """Environment steps that no update answers to: random ones and those of the warm-up."""
        return self.random_steps + self.options.warmup_steps

    def first(self) -> Replay:
        """What a run begins with: the offline data, or the random steps of a run from scratch, collected now."""
        self.reset()  # also beside offline data, as the seed may be said late
        if self.offline is not None:
            return self.offline
        self.random_part = self.players.play(self._uniformly, self.random_steps)
        return self.random_part

    @property
    def store(self) -> Replay:
        """What is trained on now."""
        found = self.ring if self.ring is not None else self.random_part if self.offline is None else self.offline
        assert found is not None, "nothing was collected yet"
        return found

    @property
    def stores(self) -> list[Replay]:
        """The same as a list, of each seed that collects."""
        return [self.store]

    def begin_at(self, updates: int, state: Mapping[str, Any] | None, seed: int) -> Replay:
        """Say where a run goes on: an offline one begins to collect there, one that collects keeps its beginning.

        Args:
            updates: made before.
            state: :meth:`state` of the checkpoint, if it collected.
            seed: of the run, which is said only now where it is that of the checkpoint.
        """
        saved, random = (state or {}).get("online"), self.random_steps
        if saved is not None and self.options.random_steps is None:
            random = saved["options"]["random_steps"]
        if (seed, random) != (self.seed, self.random_steps):
            self.seed, self.random_steps = seed, random
            self.first()
        if saved is not None:
            self.check_state(saved)
        self.switch = updates if saved is None else saved["switch"]
        return self.store

    # -- numbers and words ---------------------------------------------------------------------------------------------

    def numbers(self, updates: int) -> dict[str, Any]:
        """Numbers for a row of metrics after ``updates``."""
        return self.news | {"env/updates_per_step": (updates - self.switch) / max(1, self.steps - self.lead)}

    def counts(self) -> dict[str, Any]:
        """Numbers for the row of an evaluation."""
        return {"env/steps": self.steps}

    def row(self, updates: int, training: float) -> dict[str, Any]:
        """Numbers for a row of metrics after ``updates``, with the seconds of training since the last row."""
        collecting, self.seconds = self.seconds, 0.0
        return self.numbers(updates) | {"perf/collecting_share": collecting / max(collecting + training, 1e-9)}

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen."""
        o, random = self.options, ""
        if self.random_steps:
            random = f", the first {self.random_steps:,} with uniform actions"
        random += f", {o.warmup_steps:,} by the policy before it learns" if o.warmup_steps else ""
        rest = {"cut": "an episode is cut where a round ends", "whole": "whole episodes", "keep": "episodes go on"}
        mix = {"union": "all rows alike", "half": "half of each batch offline", "none": "without the offline rows"}
        drawn = mix.get(str(o.mix), f"{o.share} of each batch offline" if o.share else "")
        began = f"from update {self.switch:,} on: " if self.switch else ""
        return [
            (
                "online",
                f"{began}{o.env_steps:,} steps of {self.env_id}{random}" + (f"; {drawn}" if self.offline else ""),
            ),
            ("", f"{self._rounds_told(' side by side', updates=True)}; {rest[o.episodes]}"),
        ]

    def _rounds_told(self, how: str = "", *, updates: bool = False) -> str:
        o = self.options
        steps = min(o.round_steps, o.env_steps - self.lead)  # the first round may be all there is
        made = f" and {amount(steps * o.utd, 'update')}" if updates else ""
        side = f" in {o.envs} environments{how}" if o.envs > 1 else ""
        kind = "rounds" if steps < o.env_steps - self.lead else "a round"
        return f"{kind} of {amount(steps, 'step')}{side}{made}"

    # -- collecting ----------------------------------------------------------------------------------------------------

    def collect(self, policy: Any, folder: Path) -> Replay:
        """Collect the round that is due into a folder of rounds; returns what is trained on.

        Args:
            policy: that acts, on the first process; its number of updates is noted.
            folder: the same on all processes.
        """
        began, o = time.perf_counter(), self.options
        if self.ring is not None and self.steps >= o.env_steps:  # a Trainer of the user's own goes on
            return self.ring
        until = min(self.lead + (self.rounds + 1) * o.round_steps, o.env_steps)
        if self.rounds == 0 and self.random_part is not None:
            random = self.random_part
            self.random_part = self._of_all(folder / round_name(0), lambda: random)
        self.take(self._of_all(folder / round_name(self.rounds + 1), lambda: self._segment(policy, until)))
        self.seconds += time.perf_counter() - began
        assert self.ring is not None
        return self.ring

    def _of_all(self, place: Path, collected: Callable[[], Replay]) -> Replay:
        """What the first process collects, on all processes by way of the folder that keeps it."""
        wait_for_all()
        if is_first_process():
            collected().save(place, overwrite=True)
        wait_for_all()
        return Replay.load(place, mmap=False)

    def _segment(self, policy: Any, until: int) -> Replay:
        noise = StepNoise("explore", self.seed, self.simulator.action_dim)
        scale = self.options.explore_noise

        def choose(obs: np.ndarray, steps: range) -> np.ndarray:
            first = min(max(self.random_steps - steps.start, 0), len(steps))  # so many of them are random
            if first == len(steps):
                return self._uniformly(obs, steps)
            drawn = torch.stack([noise.of(step) for step in steps[first:]])
            action = policy.exploratory_action(obs[first:], drawn, scale)
            if not np.isfinite(action).all():
                number = steps[first + int(np.flatnonzero(~np.isfinite(action).all(1))[0])]
                raise UsageError(f"the policy gave {action} at environment step {number:,}; expected finite numbers.")
            return np.concatenate([self._uniformly(obs[:first], steps[:first]), action]) if first else action

        training = policy.training
        policy.eval()
        try:
            with torch.no_grad(), torch.autocast(policy.device.type, enabled=False):
                found = self.players.play(choose, until)
        finally:
            policy.train(training)
        found.meta["updates"] = policy.updates
        return found

    def _uniformly(self, obs: np.ndarray, steps: range) -> np.ndarray:
        sim = self.simulator
        drawn = np.stack([self._uniform.of(step).numpy().astype(np.float32) for step in steps])
        return sim.low + drawn * (sim.high - sim.low)

    # -- the store -----------------------------------------------------------------------------------------------------

    def take(self, segment: Replay) -> None:
        """Add a round to the store, and go on counting from it."""
        if self.ring is None:
            self.hash = "" if self.random_part is None else self.random_part.fingerprint()
            self._make_ring(segment)
        else:
            self.ring.append(fitted(segment, self.ring))
        found = segment.meta["online"]
        self.players.count_from(found)
        self.rounds += 1
        self.hash = hashlib.sha256(f"{self.hash}{segment.fingerprint()}".encode()).hexdigest()
        assert self.ring is not None
        self.ring.version = self.rounds
        self.news = {"env/steps": float(self.steps), "env/episodes": float(self.played)}
        if found["ended"]:
            self.news |= {"env/return_mean": found["return_mean"], "env/length_mean": found["length_mean"]}

    def _make_ring(self, segment: Replay) -> None:
        o = self.options
        if self.offline is None or o.mix == "none":
            assert self.random_part is not None or self.offline is not None
            random = self.random_part
            start = segment if random is None else joined([random, segment], meta=random.meta)
            room = o.env_steps + (o.envs * self.simulator.limit if o.episodes == "whole" else 0)
            self.ring = Ring(start, o.capacity or room)
            return
        names = [
            n for n in ("obs", "action", "reward", "terminated", "next_obs", "valid_td") if n in self.offline.steps
        ]
        none, tail = np.full(self.offline.num_episodes, -1), self.offline.tail
        if not tail and "next_obs" not in names:  # else what is collected would lose its last observations
            last = to_numpy(self.offline.steps["obs"])[:1]
            unknown = np.zeros((len(none), *last.shape[1:]), last.dtype)
            tail = {"obs": unknown, "valid": np.zeros(len(none), bool)}
        plain = Replay(
            {name: self.offline.steps[name] for name in names},
            start=self.offline.start,
            length=self.offline.length,
            tail=tail,
            episodes={"episode": none, "seed": none},
            meta=self.offline.meta,
        )
        rows = plain.num_steps
        room = rows + o.env_steps + (o.envs * self.simulator.limit if o.episodes == "whole" else 0)
        self.ring = Ring(plain, o.capacity or room, keep=True)
        if o.share is not None:
            self.ring.meta = {**self.ring.meta, SPLIT: [rows, o.share]}
        self.ring.append(fitted(segment, self.ring))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: counts, and the hash of all rounds, whose rows lie on disk."""
        online = {"switch": self.switch, "rounds": self.rounds, "hash": self.hash, "options": self._fixed()}
        return {"version": self.rounds, "online": online}

    def _fixed(self) -> dict[str, Any]:
        options = {**asdict(self.options), "random_steps": self.random_steps, "env": self.env_id}
        return {name: value for name, value in options.items() if name not in FREE}

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Refuse options that differ from those the run was begun with, as its rounds would be others (UsageError)."""
        for name, value in self._fixed().items():
            before = saved["options"].get(name, value)
            if before != value:
                raise UsageError(
                    f"`data.online.{name}` is {value!r}, and was {before!r} when collecting began; expected the same. "
                    f"Pass --data.online.{name} {before}, or start a fresh run."
                )

    def restore(self, state: Mapping[str, Any], folders: list[Path]) -> Replay:
        """Lay out again what a checkpoint was trained on.

        Args:
            state: of :meth:`state`.
            folders: of rounds, that of the run first; rounds that lie in another are copied there.
        """
        saved, segment = state["online"], None
        self.check_state(saved)
        self.switch = saved["switch"]
        if self.random_part is not None and saved["rounds"]:
            self.random_part = Replay.load(self._found(round_name(0), folders), mmap=False)
        for number in range(1, saved["rounds"] + 1):
            segment = Replay.load(self._found(round_name(number), folders), mmap=False)
            self.take(segment)
        if self.hash != saved["hash"]:
            raise DataError(f"the rounds in {folders[0]} are not those of the checkpoint. Restore that folder.")
        if segment is None or self.ring is None:  # the episodes of the random steps go on
            return self.store
        if not self.players.revive(segment.meta["online"], self.ring):
            log.warning(
                "%s does not repeat an episode from its seed and its actions, so what ran when the checkpoint was "
                "written is cut, and a new one begins: the run goes on, but not bit for bit.",
                self.env_id,
            )
        return self.ring

    def _found(self, name: str, folders: list[Path]) -> Path:
        for folder in folders:
            if (folder / name / "meta.json").is_file():
                if folder != folders[0] and is_first_process():
                    atomic_copy(folder / name, folders[0] / name)
                return folder / name
        raise DataError(
            f"the checkpoint was trained on {folders[0] / name}, which does not exist. Resume in the folder of the "
            "run, or start a fresh one."
        )

    def save(self, folder: Path) -> None:
        """Write what was collected into the folder of rounds, as a data set of its own; pieces of one episode become
        one again."""
        ring = self.ring
        if ring is None:
            return
        own = np.flatnonzero(ring.episodes["episode"] >= 0)
        own = own[np.argsort(ring.episodes["episode"][own], kind="stable")]  # pieces of one episode behind each other
        whole = joined([ring.filter(own)], meta={**self.players.meta(), "notes": [self._told()]})
        pieces_joined(whole).save(folder / COLLECTED, overwrite=True)

    def save_late(self, state: Mapping[str, Any], folder: Path) -> None:
        """The same for a run that was stopped before it had.

        Args:
            state: of its last checkpoint.
            folder: of rounds.
        """
        newest = folder / round_name(state["online"]["rounds"]) / "meta.json"
        there = folder / COLLECTED / "meta.json"
        if not state["online"]["rounds"] or not newest.is_file():
            return
        if there.is_file() and there.stat().st_mtime >= newest.stat().st_mtime:
            return
        if self.rounds:  # as an earlier fit may have left it
            self.first()
        self.restore(state, [folder])
        self.save(folder)

    def _told(self) -> str:
        o = self.options
        return (
            f"collected in training, {self.steps:,} steps of {self.env_id}: {self.random_steps:,} with uniform "
            f"actions, then {self._rounds_told()}; episodes that ran when a round ended: {o.episodes}"
        )
