"""Whole episodes of a stored policy as data, the same ones whatever the number of processes.

Episode k is reset with a hash of the seed and k, and its step t takes its noise from a hash of the seed, k and t, so an
episode depends on nothing that was played before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.compute.generators import isolated_rng
from offpolicy.compute.progress import counting
from offpolicy.data import sampling
from offpolicy.data.mixing import joined
from offpolicy.data.replay import Replay
from offpolicy.data.rounds import StepNoise, Steps
from offpolicy.environments.collecting import Simulator
from offpolicy.training.opening import load

CHUNK = 4  # episodes that a process plays at a time


@dataclass(frozen=True)
class Play:
    """What is played.

    Attributes:
        meta: of the data: ``env_id``, ``max_episode_steps`` and what else the environment needs.
        stream: a name; another one gives other episodes.
        seed: of resets and actions.
        checkpoint: of the policy, whose actions are sampled; None for uniform actions.
        updates: of the policy, for the column ``updates`` of its episodes.
    """

    meta: Mapping[str, Any]
    stream: str
    seed: int
    checkpoint: Path | None = None
    updates: int = 0


class Player:
    """Plays episodes by their number."""

    def __init__(self, play: Play) -> None:
        self.play, self.simulator = play, Simulator(play.meta)
        self.policy = None if play.checkpoint is None else load(play.checkpoint)
        law = sampling.uniforms if self.policy is None else sampling.normals
        self.noise = StepNoise(play.stream, play.seed, self.simulator.action_dim, law)
        self.obs = np.zeros(self.simulator.obs_dim, np.float32)

    def __call__(self, first: int) -> Replay:
        """The chunk of episodes from number ``first`` on."""
        steps = Steps()
        with torch.no_grad():
            for number in range(first, first + CHUNK):
                self._episode(number, steps)
        found = steps.replay(self.play.meta)
        found.episodes["updates"] = np.full(CHUNK, self.play.updates, np.int64)
        return found

    def _episode(self, number: int, steps: Steps) -> None:
        sim, word = self.simulator, torch.tensor([number], device="cpu")
        seed = int(sampling.keys(self.play.seed, f"{self.play.stream}-reset", word)[0]) & 0x7FFFFFFF
        with isolated_rng(seed):
            episode, over, at = sim.begin(number, seed, self.obs), False, number * sim.limit
            while not over:
                obs = self.obs.copy()
                action = sim.playable(self._action(obs, at))
                reward, over, _ = episode.step(action, self.obs)
                steps.add(obs, action, reward, episode.terminated)
                at += 1
            episode.check_finite(self.obs)
            steps.end(self.obs, number, seed)

    def _action(self, obs: np.ndarray, at: int) -> np.ndarray:
        noise = self.noise.of(at)
        if self.policy is not None:
            return self.policy.exploratory_action(obs, noise, 0.0)
        return self.simulator.low + noise.numpy().astype(np.float32) * (self.simulator.high - self.simulator.low)


def played_rows(play: Play, rows: int, *, jobs: int = 1) -> Replay:
    """The first episodes that have this many rows together.

    Args:
        play: what is played.
        rows: least number of rows, ≥ 1; the last episode is whole.
        jobs: processes, ≥ 1; any number gives the same data.
    """
    parts: list[Replay] = []
    found = 0
    with counting(10, f"tenths of {rows:,} steps, {play.stream}") as tell, _players(play, jobs) as chunks:
        assert tell is not None
        for part in chunks:
            parts.append(part)
            found += part.num_steps
            tell(10 * found // rows)
            if found >= rows:
                break
    ends = np.cumsum(np.concatenate([part.length for part in parts]))
    surplus = len(ends) - 1 - int(np.searchsorted(ends, rows))  # whole episodes of the last chunk
    parts[-1] = parts[-1].filter(np.arange(CHUNK - surplus))
    return joined(parts, meta=play.meta)


@contextmanager
def _players(play: Play, jobs: int) -> Iterator[Iterator[Replay]]:
    """Chunks in order, without an end, each played on one thread."""
    threads = torch.get_num_threads()
    if jobs == 1:
        torch.set_num_threads(1)  # as in processes of their own
        try:
            yield map(Player(play), _firsts())
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _open_player, (play,)) as pool:
        yield _ahead(pool, 2 * jobs)


def _firsts() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += CHUNK


def _ahead(pool: ProcessPoolExecutor, count: int) -> Iterator[Replay]:
    """Results in order, with so many chunks asked for ahead."""
    firsts = _firsts()
    waiting = [pool.submit(_played, next(firsts)) for _ in range(count)]
    try:
        while True:
            yield waiting.pop(0).result()
            waiting.append(pool.submit(_played, next(firsts)))
    finally:
        for one in waiting:
            one.cancel()


_here: list[Player] = []  # of a playing process


def _open_player(play: Play) -> None:
    torch.set_num_threads(1)
    _here.append(Player(play))


def _played(first: int) -> Replay:
    return _here[0](first)
