"""Held-out episodes as estimators of policies read them: rewards, log-ratios and values side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, listed
from offpolicy.evaluation.behaviour import LIMIT, Behaviour, fit_behaviour, inside_limits
from offpolicy.evaluation.estimators import LoggedEpisodes
from offpolicy.evaluation.support import Coverage, Support
from offpolicy.training.asking import asked_actions, log_densities

SAMPLES = 10  # actions of a state over which V is the mean
CHUNK = 1 << 13


class Held:
    """The episodes that give the values, and the others, which show what the data have.

    Args:
        replay: all episodes.
        share: of those held out; 0 for all on both sides.
        policy: the scale of whose actions is that of the behaviour's density.
    """

    def __init__(self, replay: Replay, share: float, policy: Any) -> None:
        self.rest, self.replay = replay.split(share) if share else (replay, replay)
        self.scale_of = policy
        self.obs, self.action = self._pairs(self.replay)

    def _pairs(self, replay: Replay) -> tuple[np.ndarray, np.ndarray]:
        """Observations and actions in environment units, float32 (n, O) and (n, A), episode by episode."""
        rows = replay.take(replay.rows, ("obs", "action"))
        obs, action = (rows[name].cpu().numpy().astype(np.float32) for name in ("obs", "action"))
        return obs, action.reshape(len(obs), -1)

    def covered(self, policies: Sequence[Any]) -> list[Coverage]:
        """How well the data cover each policy."""
        obs, action = self._pairs(self.rest)
        own = None
        if self.rest is self.replay:  # a pair is not to be found in its own episode, least of all itself
            own = np.repeat(np.arange(self.replay.num_episodes), self.replay.length)
        support = Support(obs, _scaled(self.scale_of, action), self.obs, _scaled(self.scale_of, self.action), own)
        taken = asked_actions(policies, self.obs[support.asked])
        return [support.coverage(_scaled(self.scale_of, taken[:, k, 0])) for k in range(len(policies))]

    def notes(self) -> list[str]:
        """What of the episodes troubles importance weights."""
        found = []
        saturated = float((np.abs(_scaled(self.scale_of, self.action)) > LIMIT).any(1).mean())
        if saturated > 0.01:
            found.append(
                f"{saturated:.0%} of the actions lie on a bound, where densities of squashed and clipped actions "
                f"differ; they count as actions at {LIMIT} of it."
            )
        length = self.replay.length
        ended = to_numpy(self.replay.steps["terminated"])[self.replay.end].astype(bool)
        cut = float((~ended & (length < length.max())).mean())
        if cut > 0.01:
            found.append(
                f"{cut:.0%} of the episodes are cut before the longest ends; importance sampling takes them as they "
                "are, so that its values mix horizons."
            )
        return found

    def column(self, name: str) -> np.ndarray:
        """The log-probabilities of the behaviour that the data have, nats, (n,), of actions in environment units."""
        if name not in self.replay.steps:
            raise DataError(
                f"`behaviour` names the column `{name}`, and the steps have {listed(sorted(self.replay.steps))}; "
                "expected one of these with log-probabilities. Leave it out to have them estimated."
            )
        found = to_numpy(self.replay.steps[name])[self.replay.rows].astype(np.float64)
        if found.ndim != 1 or not np.isfinite(found).all():
            raise DataError(
                f"the column `{name}` has shape {found.shape} and {int((~np.isfinite(found)).sum()):,} values that are "
                "not finite; expected one finite log-probability per step, in nats."
            )
        return found

    def estimated(self, seed: int) -> Behaviour:
        """The policy of the data, learned from the episodes that give no values."""
        obs, action = self._pairs(self.rest)
        return fit_behaviour(
            obs, _scaled(self.scale_of, action), self.obs, _scaled(self.scale_of, self.action), seed=seed
        )

    def estimated_log_prob(self, behaviour: Behaviour) -> np.ndarray:
        """Of actions in environment units, nats, (n,)."""
        found = behaviour.log_prob(self.obs, _scaled(self.scale_of, self.action)).astype(np.float64)
        return found + _log_scale(self.scale_of)

    def logged(self, policy: Any, log_behaviour: np.ndarray, values: ValueTables | None) -> LoggedEpisodes:
        """The episodes as a policy's estimates read them, with its values where there are some."""
        own = log_densities(policy, self.obs, inside_limits(_scaled(policy, self.action)).astype(np.float32))
        reward = to_numpy(self.replay.steps["reward"])[self.replay.rows]
        given: dict[str, Any] = {"log_ratio": self.padded(own + _log_scale(policy) - log_behaviour)}
        if values is not None:
            given |= {"q": self.padded(values.q), "v": self.padded(values.v), "v_after": values.v_after}
        return LoggedEpisodes(self.padded(reward), self.replay.length, **given)

    def padded(self, values: np.ndarray) -> np.ndarray:
        """Values of steps, (n,), as those of episodes side by side, (episodes, longest)."""
        length = self.replay.length
        table = np.zeros((len(length), int(length.max())))
        table[np.arange(table.shape[1]) < length[:, None]] = values
        return table

    def tables(self, method: Any) -> ValueTables:
        """Values of the policies of a fit in these episodes."""
        end = self.replay.end
        after = None
        if not np.isin(end, self.replay.unusable).any():
            ended = to_numpy(self.replay.steps["terminated"])[end].astype(bool)
            last = self.replay.next_obs(end).cpu().numpy().astype(np.float32)
            after = np.where(ended, 0.0, _drawn_values(method, last))
        every = self.action[:, None, None].repeat(method.num_policies, 1)
        return ValueTables(_mean_values(method, self.obs, every), _drawn_values(method, self.obs), after)


class ValueTables(NamedTuple):
    """Values of P policies, or of one of them.

    Attributes:
        q: of the steps' states and actions, (P, n).
        v: of the steps' states, the mean over drawn actions, (P, n).
        v_after: of the states after the last steps, (P, episodes), 0 where the environment ended the episode; None
            where one of those states is unknown.
    """

    q: np.ndarray
    v: np.ndarray
    v_after: np.ndarray | None

    def of(self, place: int) -> ValueTables:
        """Those of one policy, (n,), (n,) and (episodes,)."""
        return ValueTables(self.q[place], self.v[place], None if self.v_after is None else self.v_after[place])


def _drawn_values(method: Any, obs: np.ndarray) -> np.ndarray:
    """V of every policy of a fit, (P, n)."""
    return _mean_values(method, obs, asked_actions(method.policies, obs, "sample", SAMPLES))


def _mean_values(method: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Q of every policy of a fit, mean over critics and over the actions (n, P, M, A) of each state: (P, n)."""
    parts = [slice(i, i + CHUNK) for i in range(0, len(obs), CHUNK)]
    found = [method.values(obs[part], action[part]).mean(1).double().cpu().numpy() for part in parts]
    return np.concatenate(found, 1)


def _scaled(policy: Any, action: np.ndarray) -> np.ndarray:
    """Actions in environment units as those in [-1, 1]."""
    with torch.no_grad():
        found = policy.normalizer.action(torch.as_tensor(action, device=policy.device, dtype=policy.dtype_of_weights))
    return found.clamp(-1.0, 1.0).float().cpu().numpy()


def _log_scale(policy: Any) -> float:
    """What turns a log-density of actions in [-1, 1] into one of actions in environment units, nats."""
    return float(policy.normalizer.action_scale.double().log().sum())
