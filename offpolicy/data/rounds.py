"""Rounds of collected data: the noise of environment steps, steps as they come, and the replays that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import numpy as np
import torch

from offpolicy.data import sampling
from offpolicy.data.columns import Column, to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.spaces import scale_bounds
from offpolicy.errors import UsageError
from offpolicy.trust import REFUSED

CHUNK = 1024  # environment steps whose noise is drawn at once


class StepNoise:
    """Noise of environment steps, drawn for many of them at once: a function of the seed and the step alone."""

    def __init__(self, stream: str, seed: int, width: int, law: Callable[..., torch.Tensor] = sampling.normals) -> None:
        self.stream, self.seed, self.width, self.law = stream, seed, width, law
        self.chunk, self.drawn = -1, torch.zeros(0, device="cpu")

    def of(self, step: int) -> torch.Tensor:
        """The noise of a step, (A,) on the host."""
        if step // CHUNK != self.chunk:
            self.chunk = step // CHUNK
            steps = torch.arange(self.chunk * CHUNK, (self.chunk + 1) * CHUNK, device="cpu")
            row = torch.zeros(1, dtype=torch.int64, device="cpu")
            self.drawn = self.law(sampling.keys(self.seed, self.stream, steps), row, (self.width,))[:, 0]
        return self.drawn[step % CHUNK]


class Steps:
    """Steps as they come, and the episodes that they make up."""

    def __init__(self) -> None:
        self.obs: list[np.ndarray] = []
        self.action: list[np.ndarray] = []
        self.reward: list[float] = []
        self.terminated: list[bool] = []
        self.ends: list[tuple[int, np.ndarray, int, int]] = []

    def add(self, obs: np.ndarray, action: np.ndarray, reward: float, terminated: bool) -> None:
        self.obs.append(obs)
        self.action.append(action.reshape(-1))
        self.reward.append(reward)
        self.terminated.append(terminated)

    def end(self, obs: np.ndarray, number: int, seed: int) -> None:
        """The newest step was the last of its episode, or of its part in this round; ``obs`` followed it."""
        self.ends.append((len(self.obs), obs.copy(), number, seed))

    def replay(self, meta: Mapping[str, Any]) -> Replay:
        obs = np.stack(self.obs)
        bad = np.flatnonzero(~np.isfinite(obs).all(1))
        stop = np.array([end[0] for end in self.ends], np.int64)
        start = np.append(0, stop[:-1])
        if len(bad):
            which = int(np.searchsorted(stop, bad[0], side="right"))
            raise UsageError(
                f"{meta['env_id']} gave an observation that is not finite, before action {bad[0] - start[which] + 1} "
                f"of what was played of episode {self.ends[which][2] + 1} (seed {self.ends[which][3]}); expected "
                "finite numbers. Correct the environment."
            )
        return Replay(
            {
                "obs": obs,
                "action": np.stack(self.action).astype(np.float32),
                "reward": np.array(self.reward, np.float32),
                "terminated": np.array(self.terminated, bool),
            },
            start=start,
            length=stop - start,
            tail={"obs": np.stack([end[1] for end in self.ends])},
            episodes={
                "episode": np.array([end[2] for end in self.ends], np.int64),
                "seed": np.array([end[3] for end in self.ends], np.int64),
            },
            meta=meta,
        )


def in_environment(offline: Replay, facts: Mapping[str, Any]) -> Replay:
    """Data beside which an environment is played in: where they name none, that one, and its bounds of actions.

    Args:
        offline: steps with actions as wide as the environment's.
        facts: ``meta`` of what is collected.

    Raises:
        UsageError: the data have other bounds, or actions outside of them.
    """
    meta, low, high = offline.meta, np.array(facts["action_low"]), np.array(facts["action_high"])
    known = meta.get("action_low") is not None and meta.get("action_bounds") != "data"
    found = scale_bounds(meta, to_numpy(offline.steps["action"]))
    slack = 1e-5 * (high - low)
    other = (found[0] < low - slack) | (found[1] > high + slack)
    if known:  # a side without a bound takes that of the environment
        own = np.array([meta["action_low"], meta["action_high"]], np.float64).reshape(2, -1)
        other |= (np.isfinite(own) & (np.abs(own - [low, high]) > slack)).any(0)
    if other.any():
        at = int(np.argmax(other))
        raise UsageError(
            f"{facts['env_id']} has actions from {low[at]:g} to {high[at]:g} in dimension {at}, and the data from "
            f"{found[0][at]:g} to {found[1][at]:g}; expected the same bounds. Choose the environment of the data, or "
            "wrap it with gymnasium.wrappers.RescaleAction."
        )
    names = ["action_low", "action_high", "action_bounds"]
    if not meta.get("env_id"):  # it is evaluated in, too
        names += ["env_id", "env_kwargs", "obs_keys", "max_episode_steps"]
        meta = {name: value for name, value in meta.items() if name != REFUSED}
    shared = copy(offline)
    shared.meta = {**meta, **{name: facts[name] for name in names if name in facts}}
    return shared


def fitted(segment: Replay, store: Replay) -> Replay:
    """A round with the columns of the store that it is added to."""
    steps: dict[str, Column] = {k: v for k, v in segment.steps.items() if k in store.steps}
    if "next_obs" in store.steps:
        steps["next_obs"] = to_numpy(segment.next_obs(segment.rows))
    if "valid_td" in store.steps:
        steps["valid_td"] = np.ones(segment.num_steps, bool)
    tail = {"obs": segment.tail["obs"], "valid": np.ones(segment.num_episodes, bool)}
    return Replay(
        steps,
        start=segment.start,
        length=segment.length,
        tail={k: v for k, v in tail.items() if k in store.tail},
        episodes=segment.episodes,
        meta=segment.meta,
    )


def pieces_joined(replay: Replay) -> Replay:
    """The same steps with the pieces of one episode, which follow each other, as one episode again."""
    number = to_numpy(replay.episodes["episode"])
    last = np.append(number[1:] != number[:-1], True)
    group = np.cumsum(np.append(0, last[:-1]))
    length = np.bincount(group, weights=replay.length).astype(np.int64)
    return Replay(
        {k: v for k, v in replay.steps.items() if k not in ("valid_td", "next_obs")},
        start=np.cumsum(length) - length,
        length=length,
        tail={"obs": to_numpy(replay.next_obs(replay.end[last]))},  # beside data with `next_obs` there is no tail
        episodes={k: to_numpy(v)[last] for k, v in replay.episodes.items()},
        meta=replay.meta,
    )
