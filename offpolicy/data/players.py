"""Environments side by side, and the episodes that run in them: what plays the rounds of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offpolicy.compute.generators import isolated_rng
from offpolicy.data import sampling
from offpolicy.data.columns import to_numpy
from offpolicy.data.mixing import joined
from offpolicy.data.replay import Replay
from offpolicy.data.rounds import Steps
from offpolicy.data.spaces import bounds_meta
from offpolicy.environments.collecting import CollectedEpisode, Simulator

Choose = Callable[[np.ndarray, range], np.ndarray]
Ends = list[tuple[float, int]]  # return and length of the episodes that ended in a round


@dataclass
class Seat:
    """One environment, and where its episode stands, if one runs."""

    simulator: Simulator
    obs: np.ndarray
    episode: CollectedEpisode | None = None
    gained: float = 0.0
    length: int = 0

    def begin(self, number: int, seed: int) -> None:
        self.episode = self.simulator.begin(number, seed, self.obs)
        self.gained, self.length = 0.0, 0

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Reward, and whether the episode is over."""
        assert self.episode is not None
        reward, over, _ = self.episode.step(action, self.obs)
        self.gained, self.length = self.gained + reward, self.length + 1
        return reward, over


class Players:
    """N environments of one kind, which are stepped in turn.

    All that have a step to make are asked for at once, and their steps are numbered in their order; where a round has
    fewer left, the first ones make them. An episode is reset with a hash of the seed and its number.

    Args:
        meta: of :class:`Simulator`.
        count: N.
        keep: whether episodes go on in the next round; else they are cut.
        whole: whether a round goes on until all episodes have ended.

    Attributes:
        steps: environment steps so far.
        begun, ended: episodes that were begun, and those that ended or were cut.
    """

    def __init__(self, meta: Mapping[str, Any], count: int, *, keep: bool, whole: bool) -> None:
        simulators = [Simulator(meta) for _ in range(count)]
        self.simulator, self.keep, self.whole = simulators[0], keep, whole
        self.seats = [Seat(one, np.zeros(one.obs_dim, np.float32)) for one in simulators]
        self.env_id, self.env_kwargs = self.simulator.env_id, dict(meta.get("env_kwargs") or {})
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Back to the beginning."""
        self.seed, self.steps, self.begun, self.ended = seed, 0, 0, 0
        self.forget()

    def forget(self) -> None:
        """Let no episode go on."""
        for seat in self.seats:
            seat.episode = None

    def number(self, stream: str, count: int) -> int:
        """A seed below 2³¹ that is a hash of the run's seed and a count."""
        word = sampling.keys(self.seed, stream, torch.tensor([count], device="cpu"))[0]
        return int(word) & 0x7FFFFFFF

    def meta(self) -> dict[str, Any]:
        """Facts of what is collected here."""
        sim = self.simulator
        space = sim.action_space
        return {
            "name": self.env_id,
            "source": "collected",
            "env_id": self.env_id,
            "env_kwargs": self.env_kwargs,
            **({"obs_keys": ["/".join(key) for key in sim.keys]} if sim.keys else {}),
            **({"max_episode_steps": sim.limit} if sim.limit else {}),
            **bounds_meta(space.low, space.high, "environment"),
        }

    def play(self, choose: Choose, until: int) -> Replay:
        """Play until there are this many environment steps in all; with whole episodes, until those have ended too.

        Args:
            choose: observations (n, O) and the numbers of their steps → actions (n, A) in environment units.
            until: more than there are.
        """
        parts = [Steps() for _ in self.seats]
        ends: Ends = []
        with isolated_rng(self.number("round", self.steps)):
            while due := self._due(until):
                obs = np.stack([self.seats[i].obs for i in due])
                actions = choose(obs, range(self.steps, self.steps + len(due)))
                for i, before, action in zip(due, obs, actions):
                    self._step(self.seats[i], before, action, parts[i], ends)
            for i, seat in enumerate(self.seats):
                if seat.episode is not None:
                    self._pause(seat, parts[i])
        return self._replay([part for part in parts if part.obs], ends)

    def _due(self, until: int) -> list[int]:
        """The environments that make a step, all with an episode."""
        if self.steps >= until:
            return [i for i, seat in enumerate(self.seats) if self.whole and seat.episode is not None]
        due = list(range(min(len(self.seats), until - self.steps)))
        if self.whole:  # those that go on to their end count too
            due = list(range(len(self.seats)))
        for i in due:
            if self.seats[i].episode is None:
                self.seats[i].begin(self.begun, self.number("reset", self.begun))
                self.begun += 1
        return due

    def _step(self, seat: Seat, before: np.ndarray, action: np.ndarray, steps: Steps, ends: Ends) -> None:
        assert seat.episode is not None
        action = seat.simulator.playable(action)
        reward, over = seat.step(action)
        steps.add(before, action, reward, seat.episode.terminated)
        self.steps += 1
        if over:
            ends.append((seat.gained, seat.length))
            self._end(seat, steps)

    def _end(self, seat: Seat, steps: Steps) -> None:
        assert seat.episode is not None
        seat.episode.check_finite(seat.obs)
        steps.end(seat.obs, seat.episode.number, seat.episode.seed)
        seat.episode, self.ended = None, self.ended + 1

    def _pause(self, seat: Seat, steps: Steps) -> None:
        """The round ends inside of an episode."""
        assert seat.episode is not None
        if not self.keep:
            self._end(seat, steps)
        elif steps.obs and (not steps.ends or steps.ends[-1][0] < len(steps.obs)):  # it has steps of this round
            seat.episode.check_finite(seat.obs)
            steps.end(seat.obs, seat.episode.number, seat.episode.seed)

    def _replay(self, parts: list[Steps], ends: Ends) -> Replay:
        means = np.mean(ends, 0).tolist() if ends else [None, None]
        facts = {
            "steps": self.steps,
            "episodes": self.ended,
            "begun": self.begun,
            "open": [None if seat.episode is None else seat.episode.number for seat in self.seats],
            "ended": len(ends),
            "return_mean": means[0],
            "length_mean": means[1],
        }
        meta = {**self.meta(), "online": facts}
        found = [part.replay(meta) for part in parts]
        return found[0] if len(found) == 1 else joined(found, meta=meta)

    # -- going on ------------------------------------------------------------------------------------------------------

    def count_from(self, facts: Mapping[str, Any]) -> None:
        """Go on counting after a round of these facts."""
        self.steps, self.ended = facts["steps"], facts["episodes"]
        self.begun = facts.get("begun", self.ended + bool(facts["open"]))  # one environment had no need to say

    def revive(self, facts: Mapping[str, Any], ring: Replay) -> bool:
        """Bring environments to where the episodes stand that ran when a round ended, by their seeds and actions.

        Returns:
            Whether all of them could; those that do not repeat themselves are cut.
        """
        self.forget()
        found = facts["open"]
        numbers = found if isinstance(found, list) else [facts["episodes"]] * bool(found)
        again = [self._play_again(i, number, ring) for i, number in enumerate(numbers) if number is not None]
        self.ended += again.count(False)
        return all(again)

    def _play_again(self, i: int, number: int, ring: Replay) -> bool:
        seat = self.seats[i]
        pieces = np.flatnonzero(ring.episodes["episode"] == number)
        if not len(pieces):
            return False
        rows = np.concatenate([np.arange(ring.start[e], ring.start[e] + ring.length[e]) for e in pieces])
        with isolated_rng(self.number("round", self.steps)):
            seat.begin(number, self.number("reset", number))
            same = bool((to_numpy(ring.steps["obs"])[rows[0]] == seat.obs).all())
            for row in rows if same else ():
                _, over = seat.step(seat.simulator.playable(to_numpy(ring.steps["action"])[row]))
                same = same and not over
        if not same or not (to_numpy(ring.next_obs(ring.end[pieces[-1:]]))[0] == seat.obs).all():
            seat.episode = None
            return False
        return True
