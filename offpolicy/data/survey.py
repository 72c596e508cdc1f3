"""What a page on control data shows: lengths, returns, rewards, actions on bounds, ends, coverage, repetitions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.errors import amount

ROWS, BYTES = 300_000, 1 << 28  # of the steps looked at one by one: whole episodes up to here
ASKED, AMONG = 2_000, 20_000  # states whose nearest neighbours are looked for, and the states they are looked for in
WIDEST = 1_000  # numbers of an observation up to which distances are measured
NEAR_BOUND = 1e-3  # of half the range of an action


@dataclass(frozen=True)
class StateCoverage:
    """Where the states lie.

    Attributes:
        nearest: distance of each state asked to the nearest state of another episode, (n,): the root of the mean
            square over columns, each divided by its standard deviation.
        among: states in which neighbours were looked for.
        plane: states on the two principal axes of the divided columns, (m, 2); (m, 1) of observations of one number.
        explained: share of the variance that lies in the plane.
    """

    nearest: np.ndarray
    among: int
    plane: np.ndarray
    explained: float


@dataclass(frozen=True)
class Survey:
    """Measures of control data.

    Attributes:
        length, returns: of every episode, (E,); returns are None without rewards.
        terminated: whether every episode was ended by its environment, (E,) bool; the others were cut.
        episodes, rows: how many were looked at one by one, for what follows.
        reward: (n,), or None.
        on_low, on_high: share of the actions on each bound, (A,); None where no bound is known.
        action: mean and standard deviation of each number of an action, (A, 2); of discrete ones None.
        choices: how often each discrete action was taken, (K,); None of others.
        constant: columns of the observation with a single value.
        repeated_rows: steps whose observation and action another step has as well, the first of each not counted.
        repeated_episodes: the same of whole episodes.
        coverage: of the states; None where it was not measured.
        doubts: what a person should look at, in plain words.
    """

    length: np.ndarray
    returns: np.ndarray | None
    terminated: np.ndarray
    episodes: int
    rows: int
    reward: np.ndarray | None
    on_low: np.ndarray | None
    on_high: np.ndarray | None
    action: np.ndarray | None
    choices: np.ndarray | None
    constant: list[int]
    repeated_rows: int
    repeated_episodes: int
    coverage: StateCoverage | None
    doubts: list[str] = field(default_factory=list)


def survey(replay: Replay) -> Survey:
    """Measure control data: lengths, returns and ends of all episodes, everything else on :data:`ROWS` steps at most.

    Args:
        replay: control data, checked at load.
    """
    chosen, most = chosen_episodes(replay)
    length, start = np.minimum(replay.length[chosen], most), replay.start[chosen]
    rows = np.repeat(start, length) + np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    owner = np.repeat(np.arange(len(chosen)), length)
    obs = to_numpy(replay.steps["obs"])[rows].reshape(len(rows), -1)
    action = to_numpy(replay.steps["action"])[rows].reshape(len(rows), -1)
    reward = to_numpy(replay.steps["reward"])[rows] if "reward" in replay.steps else None
    same = _same(obs, action)
    on_low, on_high = _on_bounds(replay, action)
    discrete = "action_n" in replay.meta
    found = Survey(
        length=replay.length,
        returns=replay.returns() if reward is not None else None,
        terminated=to_numpy(replay.steps["terminated"])[replay.end].astype(bool),
        episodes=len(chosen),
        rows=len(rows),
        reward=reward,
        on_low=on_low,
        on_high=on_high,
        action=None if discrete else np.stack([action.mean(0, np.float64), action.std(0, dtype=np.float64)], 1),
        choices=np.bincount(action[:, 0].astype(np.int64), minlength=int(replay.meta["action_n"]))
        if discrete
        else None,
        constant=np.flatnonzero((obs == obs[:1]).all(0)).tolist(),
        repeated_rows=len(rows) - len(np.unique(same)),
        repeated_episodes=_repeated_episodes(same, length),
        coverage=_coverage(obs, owner),
    )
    found.doubts.extend([*replay.meta.get("warnings", []), *_doubts(found, replay)])
    return found


def chosen_episodes(replay: Replay) -> tuple[np.ndarray, int]:
    """The episodes that are looked at step by step, all or some that are spread evenly over the data, and how many
    steps of each at most."""
    width = sum(int(np.prod(replay.steps[name].shape[1:])) for name in ("obs", "action"))
    most = max(1, min(ROWS, BYTES // (4 * max(1, width))))
    if replay.num_steps <= most:
        return np.arange(replay.num_episodes), most
    count = max(1, int(most / replay.length.mean()))
    return np.unique(np.linspace(0, replay.num_episodes - 1, count).astype(np.int64)), most


def _same(obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """A number per row, (n,), equal where observation and action are equal bit by bit."""
    both = [np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in (obs, action)]
    joined = np.ascontiguousarray(np.concatenate(both, 1))
    return np.unique(joined.view(f"V{joined.shape[1]}")[:, 0], return_inverse=True)[1].reshape(-1)


def _repeated_episodes(same: np.ndarray, length: np.ndarray) -> int:
    """Episodes that are equal to an earlier one, step by step."""
    parts = np.split(same, np.cumsum(length)[:-1])
    return len(parts) - len({part.tobytes() for part in parts})


def _on_bounds(replay: Replay, action: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Shares of actions on their lowest and on their highest value, by number of the action."""
    if replay.meta.get("action_low") is None or "action_n" in replay.meta:
        return None, None
    low, high = (np.asarray(replay.meta[key], np.float64).reshape(-1) for key in ("action_low", "action_high"))
    span = high - low
    slack = NEAR_BOUND * np.where(np.isfinite(span), span, 0.0) / 2
    return (action <= low + slack).mean(0), (action >= high - slack).mean(0)


def _coverage(obs: np.ndarray, owner: np.ndarray) -> StateCoverage | None:
    """How far states are from those of other episodes, and where they lie; None of images, text and single episodes."""
    if obs.dtype.kind != "f" or obs.shape[1] > WIDEST or owner[-1] == 0:
        return None
    random = np.random.default_rng(0)  # one page of the same data is like another
    rows = np.sort(random.permutation(len(obs))[:AMONG])
    spread = obs[rows].std(0, dtype=np.float64)
    moving = spread > 0
    if not moving.any():
        return None
    some = ((obs[rows][:, moving] - obs[rows][:, moving].mean(0)) / spread[moving]).astype(np.float32)
    asked = np.sort(random.permutation(len(some))[:ASKED])
    square, owners = (some**2).sum(1), owner[rows]
    nearest = np.empty(len(asked))
    for low in range(0, len(asked), 250):
        part = asked[low : low + 250]
        distance = square[part, None] + square - 2.0 * some[part] @ some.T
        distance[owners[part, None] == owners] = np.inf
        nearest[low : low + 250] = np.sqrt(np.maximum(distance.min(1), 0.0) / some.shape[1])
    values, axes = np.linalg.eigh(np.cov(some.T).reshape(some.shape[1], -1))
    plane = some @ axes[:, ::-1][:, :2].astype(np.float32)
    return StateCoverage(nearest[np.isfinite(nearest)], len(some), plane, float(values[::-1][:2].sum() / values.sum()))


def _doubts(found: Survey, replay: Replay) -> list[str]:
    """What these numbers say in plain words."""
    told = []
    if found.on_low is not None and found.on_high is not None:
        share = found.on_low + found.on_high
        if share.max() > 0.1:
            told.append(
                f"{share.max():.0%} of the values of action {int(share.argmax())} lie on a bound: likelihoods of "
                "squashed policies clip them, and a method that needs likelihoods may do badly."
            )
    if found.choices is not None and (found.choices == 0).any():
        told.append(f"{int((found.choices == 0).sum())} of {len(found.choices)} actions were never taken.")
    if found.repeated_episodes:
        told.append(
            f"{found.repeated_episodes:,} of {found.episodes:,} episodes repeat an earlier one step by step: held-out "
            "episodes may be training episodes as well. Remove them."
        )
    elif found.repeated_rows > 0.01 * found.rows:
        told.append(f"{found.repeated_rows:,} of {found.rows:,} steps repeat the observation and action of another.")
    if found.constant:
        some = ", ".join(map(str, found.constant[:10])) + ("…" if len(found.constant) > 10 else "")
        told.append(f"Columns of the observation that never change: {some}.")
    if found.reward is None:
        told.append("There are no rewards: only cloning and goal-conditioned methods can learn from these data.")
    elif np.ptp(found.reward) == 0:
        told.append(f"Every reward looked at is {found.reward[0]:g}, which tells good actions from no others.")
    if len(found.length) < 20:
        told.append(
            f"The data have {amount(len(found.length), 'episode')}: means over episodes and held-out parts say little."
        )
    if not found.terminated.any():
        told.append("No episode was ended by its environment: values are bootstrapped at every end.")
    limit, longest = replay.meta.get("max_episode_steps"), int(found.length.max())
    if limit and longest > int(limit):
        told.append(f"The longest episode has {longest:,} steps, and the environment allows {limit}.")
    if found.coverage is not None and np.median(found.coverage.nearest) > 1.0:
        told.append(
            "Half of the states are further than a standard deviation per column from every state of another episode "
            "looked at: episodes hardly meet, so there is little to join."
        )
    return told
