"""Data that are collected in an environment while a method trains: K steps, then K updates or a multiple, in rounds.

Round r is collected with the weights at its start. Episode j is reset with a hash of the seed and j, and the action of
environment step n takes its noise from a hash of the seed and n, so there is no generator to keep. Each round is a
folder of its own, written before its first update: a checkpoint names the rounds and their hash, and a resumed run lays
them out again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.compute.processes import is_first_process, wait_for_all
from offpolicy.data import sampling
from offpolicy.data.columns import to_numpy
from offpolicy.data.mixing import SPLIT, joined
from offpolicy.data.players import Players
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.rounds import StepNoise, fitted, in_environment, pieces_joined
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.given import whole_fields
from offpolicy.trust import REFUSED, check_environment, environment_refusal

log = logging.getLogger(__name__)
ENDS = ("cut", "whole", "keep")
RANDOM_STEPS = 10_000  # of a run from scratch, where nobody says; a tenth of all where that is less
FIXED = (
    "env",
    "env_kwargs",
    "round_steps",
    "utd",
    "random_steps",
    "warmup_steps",
    "mix",
    "episodes",
    "capacity",
    "explore_noise",
    "envs",
)


@dataclass(frozen=True)
class OnlineOptions:
    """Data collected in training (``--data.online.*``).

    Args:
        env: id of the gymnasium environment; None takes that of the data.
        env_kwargs: its arguments.
        env_steps: environment steps to collect in all, random ones included, > 0; 0 collects nothing.
        round_steps: K, environment steps of a round, ≥ 1.
        utd: updates per environment step, ≥ 1.
        random_steps: environment steps with uniform actions first; before the first update when there are no other
            data. None for 10,000 then, but at most a tenth of ``env_steps``, and 0 otherwise.
        warmup_steps: environment steps by the policy as it is, after the random ones and before the first update that
            sees collected rows. WSRL (arXiv:2412.07762) takes 5,000, with ``mix`` "none".
        mix: what batches are drawn from: "union" (all alike), "half" (offline and online rows one for one), "none" (the
            offline rows are left out), or the share of offline rows, in (0, 1). Counts are exact in every batch.
        capacity: rows that are kept, the oldest collected ones leave first; None for all.
        episodes: what becomes of an episode that runs when a round ends: "cut" (the next round starts a new one),
            "whole" (it is played to its end before) or "keep" (it goes on in the next round).
        explore_noise: standard deviation of the noise on actions of deterministic policies, of actions in [-1, 1], ≥ 0.
        envs: environments side by side, ≥ 1, which share out the steps of a round; the policy is asked for all at once.
    """

    env: str | None = None
    env_kwargs: dict[str, Any] | None = None
    env_steps: int = 0
    round_steps: int = 1000
    utd: int = 1
    random_steps: int | None = None
    warmup_steps: int = 0
    mix: str | float = "union"
    capacity: int | None = None
    episodes: str = "cut"
    explore_noise: float = 0.1
    envs: int = 1

    def __post_init__(self) -> None:
        whole_fields(self, "data.online")
        lows = {
            "env_steps": 0,
            "round_steps": 1,
            "utd": 1,
            "random_steps": 0,
            "warmup_steps": 0,
            "capacity": 1,
            "explore_noise": 0.0,
            "envs": 1,
        }
        for name, low in lows.items():
            if getattr(self, name) is not None:
                check_range(f"data.online.{name}", getattr(self, name), low)
        if self.episodes not in ENDS:
            raise UsageError(f"`data.online.episodes` is {self.episodes!r}; expected one of {', '.join(ENDS)}.")
        self.share  # noqa: B018  # refuses what is none
        given = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        if given and not self.env_steps:
            raise UsageError(
                f"`data.online.{given[0]}` is {getattr(self, given[0])}, and `data.online.env_steps` is 0; expected "
                "the number of environment steps to collect. Add --data.online.env_steps N."
            )

    @property
    def share(self) -> float | None:
        """The share of offline rows in a batch where it is fixed; None where rows are drawn alike."""
        if self.mix in ("union", "none"):
            return None
        try:
            share = 0.5 if self.mix == "half" else float(self.mix)
        except ValueError:
            share = -1.0
        if not 0.0 < share < 1.0:
            raise UsageError(f"`data.online.mix` is {self.mix!r}; expected union, half, none or a share in (0, 1).")
        return share


NOTHING = OnlineOptions()


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
        self._check()
        if offline is not None:
            self.offline = in_environment(offline, self.players.meta())
        self.reset()

    def _check(self) -> None:
        o, sim = self.options, self.simulator
        longest = sim.limit * o.envs
        beside = f" in each of {o.envs} environments (`data.online.envs`)" if o.envs > 1 else ""
        if o.episodes != "keep" and longest > o.round_steps:
            raise UsageError(
                f"an episode of {self.env_id} has up to {sim.limit:,} steps{beside} and `data.online.round_steps` is "
                f"{o.round_steps:,}, too few with `data.online.episodes` {o.episodes!r}; expected rounds of at "
                f"least {longest:,} steps, or --data.online.episodes keep."
            )
        if o.envs > o.round_steps:
            raise UsageError(
                f"`data.online.envs` is {o.envs:,}, and `data.online.round_steps` {o.round_steps:,}; expected at least "
                "a step of each environment in a round. Lower the one or raise the other."
            )
        if o.episodes == "whole" and not sim.limit:  # an episode could last for several rounds
            raise UsageError(
                f"`data.online.episodes` is 'whole', and {self.env_id} has no known limit of steps; expected one. Pass "
                "--data.max_episode_steps N, or --data.online.episodes cut."
            )
        if o.env_steps <= self.lead:
            raise UsageError(
                f"`data.online.env_steps` is {o.env_steps:,}, and {self.lead:,} of them are random ones or a warm-up "
                "(`data.online.random_steps`, `warmup_steps`); expected more, as updates begin after them. Lower these."
            )
        # rows beyond rounds: an episode that is played to its end; one that goes on stays whole until it has ended
        spare = {"cut": 0, "whole": longest, "keep": 2 * longest + (o.envs > 1) * o.round_steps}[o.episodes]
        if self.offline is None:
            if o.episodes == "whole" and o.env_steps < self.lead + longest:
                raise UsageError(
                    f"`data.online.env_steps` is {o.env_steps:,}, and the first {self.lead:,} are played to the end of "
                    f"an episode (`data.online.episodes` 'whole'); expected at least {self.lead + longest:,}. Raise "
                    "it, or lower `data.online.random_steps`."
                )
            if o.mix != "union":
                raise UsageError(
                    f"`data.online.mix` is {o.mix!r}, and there are no offline data to mix; expected them. Pass --data."
                )
            if self.random_steps < 1:
                raise UsageError("`data.online.random_steps` is 0, and there are no other data; expected at least 1.")
            least = self.lead + o.round_steps + max(spare, sim.limit)
            if o.capacity is not None and o.capacity < least:
                raise UsageError(
                    f"`data.online.capacity` is {o.capacity:,} rows; expected at least {least:,}, the first steps, a "
                    "round and an episode. Raise it, or leave it out."
                )
            return
        for what, found, column in (("observations", sim.obs_dim, "obs"), ("actions", sim.action_dim, "action")):
            width = self.offline.steps[column].shape[1:]
            if tuple(width) != (found,):
                raise UsageError(
                    f"{self.env_id} has {what} of width {found}, and the data of shape {tuple(width)}; expected the "
                    "same. Choose the environment of the data."
                )
        kept = 0 if o.mix == "none" else self.offline.num_steps
        least = kept + self.lead + o.round_steps + spare  # the first round has the lead too
        if o.capacity is not None and o.capacity < least:
            raise UsageError(
                f"`data.online.capacity` is {o.capacity:,} rows, and {kept:,} offline rows stay beside rounds of "
                f"{o.round_steps:,}; expected at least {least:,} with the first steps and an episode. Raise it, or "
                "leave it out."
            )

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

    def row(self, updates: int, training: float) -> dict[str, float]:
        """Numbers for a row of metrics after ``updates``, with the seconds of training since the last row."""
        collecting, self.seconds = self.seconds, 0.0
        made = {"env/updates_per_step": (updates - self.switch) / max(1, self.steps - self.lead)}
        return self.news | made | {"perf/collecting_share": collecting / max(collecting + training, 1e-9)}

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen."""
        o, random = self.options, ""
        if self.random_steps:
            random = f", the first {self.random_steps:,} with uniform actions"
        random += f", {o.warmup_steps:,} by the policy before it learns" if o.warmup_steps else ""
        rest = {"cut": "an episode is cut where a round ends", "whole": "whole episodes", "keep": "episodes go on"}
        side = f" in {o.envs} environments side by side" if o.envs > 1 else ""
        mix = {"union": "all rows alike", "half": "half of each batch offline", "none": "without the offline rows"}
        drawn = mix.get(str(o.mix), f"{o.share} of each batch offline" if o.share else "")
        began = f"from update {self.switch:,} on: " if self.switch else ""
        return [
            (
                "online",
                f"{began}{o.env_steps:,} steps of {self.env_id}{random}" + (f"; {drawn}" if self.offline else ""),
            ),
            ("", f"rounds of {o.round_steps:,} steps{side} and {o.round_steps * o.utd:,} updates; {rest[o.episodes]}"),
        ]

    # -- collecting ----------------------------------------------------------------------------------------------------

    def collect(self, policy: Any, folder: Path) -> Replay:
        """Collect the round that is due into a folder of rounds; returns what is trained on."""
        folder = Path(policy.trainer.strategy.broadcast(str(folder)))
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
        found.meta["updates"] = policy.global_step
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
        return {"switch": self.switch, "rounds": self.rounds, "hash": self.hash, "options": self._fixed()}

    def _fixed(self) -> dict[str, Any]:
        options = {**asdict(self.options), "random_steps": self.random_steps, "env": self.env_id}
        return {name: options[name] for name in FIXED}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse options that differ from those the run was begun with, as its rounds would be others (UsageError)."""
        for name, value in self._fixed().items():
            before = state["options"].get(name, value)
            if before != value:
                raise UsageError(
                    f"`data.online.{name}` is {value!r}, and was {before!r} when collecting began; expected the same. "
                    f"Pass --data.online.{name} {before}, or start a fresh run."
                )

    def restore(self, state: Mapping[str, Any], folders: list[Path]) -> Replay | None:
        """Lay out again what a checkpoint was trained on; None where it had collected nothing.

        Args:
            state: of :meth:`state`.
            folders: of rounds, that of the run first; rounds that lie in another are copied there.
        """
        self.check_state(state)
        self.switch = state["switch"]
        segment = None
        if self.random_part is not None and state["rounds"]:
            self.random_part = Replay.load(self._found(round_name(0), folders), mmap=False)
        for number in range(1, state["rounds"] + 1):
            segment = Replay.load(self._found(round_name(number), folders), mmap=False)
            self.take(segment)
        if self.hash != state["hash"]:
            raise DataError(f"the rounds in {folders[0]} are not those of the checkpoint. Restore that folder.")
        if segment is None or self.ring is None:  # the episodes of the random steps go on
            return self.ring
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
                    shutil.copytree(folder / name, folders[0] / name, dirs_exist_ok=True)
                return folder / name
        raise DataError(
            f"the checkpoint was trained on {folders[0] / name}, which does not exist. Resume in the folder of the "
            "run, or start a fresh one."
        )

    def save(self, folder: Path) -> Path | None:
        """Write what was collected as a data set of its own; pieces of one episode become one again."""
        ring = self.ring
        if ring is None:
            return None
        own = np.flatnonzero(ring.episodes["episode"] >= 0)
        own = own[np.argsort(ring.episodes["episode"][own], kind="stable")]  # pieces of one episode behind each other
        whole = joined([ring.filter(own)], meta={**self.players.meta(), "notes": [self._told()]})
        return pieces_joined(whole).save(folder, overwrite=True)

    def _told(self) -> str:
        o = self.options
        side = f" in {o.envs} environments" if o.envs > 1 else ""
        return (
            f"collected in training, {self.steps:,} steps of {self.env_id}: {self.random_steps:,} with uniform "
            f"actions, then rounds of {o.round_steps:,} steps{side}; episodes that ran when a round ended: {o.episodes}"
        )
