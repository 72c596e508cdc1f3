"""The goal view: transitions with goals, sub-goals and option ends of the same replay, rewards by reaching them.

States are numbered episode by episode, each episode's last one included, so that the state after number t is t + 1.
Goals inside a trajectory end at e(t), the state of the episode's last step: the very last state of an episode is only
ever a next observation, as in OGBench (arXiv:2410.20092). A goal is reached when its *number* is met; two rows with the
same content are two states. How the environment ended an episode plays no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.columns import is_float, row_width, to_numpy
from offpolicy.data.extras import ExtraColumns, checked_names
from offpolicy.data.mixing import mixture_weights
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.views import CHUNK, PACK_LIMIT, BoundView, require_columns
from offpolicy.errors import DataError, UsageError, check_range


class GoalTransitions(NamedTuple):
    """A batch of transitions with goals; a field is None where the view does not ask for it. g, w, Ω are states.

    ``obs next_obs (B, O)``, ``action (B, A)`` in [-1, 1], ``row (B,)`` int64: the replay row, and ``extra``: its extra
    columns by name.
    For values: ``value_goal (B, O)``, ``value_reward (B,)``, 0 where the state is the goal, else -1, and
    ``value_mask (B,)``, 0 and 1 there: whether to bootstrap.
    For flat policies: ``actor_goal (B, O)``.
    For hierarchical ones: ``low_goal`` (k steps ahead, at most e(t)), ``high_goal`` and ``high_target`` (B, O): the
    state k steps ahead, or the goal where that comes first.
    For values over options: ``high_value_goal`` and ``high_value_option_obs (B, O)``, the state Ω in which the option
    ends, ``high_value_reward``, ``high_value_mask`` as above, where Ω is the goal, and ``high_value_full (B,)``, 0 for
    options cut short elsewhere than at the goal, else 1.
    """

    obs: Tensor
    action: Tensor
    next_obs: Tensor = None  # type: ignore[assignment]
    value_goal: Tensor = None  # type: ignore[assignment]
    value_reward: Tensor = None  # type: ignore[assignment]
    value_mask: Tensor = None  # type: ignore[assignment]
    actor_goal: Tensor = None  # type: ignore[assignment]
    low_goal: Tensor = None  # type: ignore[assignment]
    high_goal: Tensor = None  # type: ignore[assignment]
    high_target: Tensor = None  # type: ignore[assignment]
    high_value_goal: Tensor = None  # type: ignore[assignment]
    high_value_option_obs: Tensor = None  # type: ignore[assignment]
    high_value_reward: Tensor = None  # type: ignore[assignment]
    high_value_mask: Tensor = None  # type: ignore[assignment]
    high_value_full: Tensor = None  # type: ignore[assignment]
    row: Tensor = None  # type: ignore[assignment]
    noise: Any = None
    extra: Any = None


@dataclass(frozen=True)
class GoalMix:
    """Which goals are drawn, and how far ahead.

    Args:
        current: probability of the state itself.
        trajectory: probability of a later state of its episode.
        random: probability of any state; the three sum to 1.
        geometric: a later state is Geometric(1 - γ) steps ahead, at most e(t); otherwise uniform over (t, e(t)].

    Raises:
        UsageError: a probability outside [0, 1], or another sum.
    """

    current: float = 0.0
    trajectory: float = 1.0
    random: float = 0.0
    geometric: bool = False

    def __post_init__(self) -> None:
        found = (self.current, self.trajectory, self.random)
        if not (all(0.0 <= p <= 1.0 for p in found) and math.isclose(sum(found), 1.0, abs_tol=1e-6)):
            raise UsageError(
                f"goals are current, trajectory and random ones with probabilities {found}; expected three numbers in "
                "[0, 1] with the sum 1. Change `…p_current`, `…p_trajectory` and `…p_random` together."
            )


@dataclass(frozen=True)
class GoalView:
    """Transitions drawn uniformly over all steps, each with goals of its own.

    Args:
        discount: γ of the geometric law, in [0, 1).
        value: goals of values; None for none.
        actor: goals of a flat policy, or with ``subgoal_steps`` of a high level, for which only ``random`` and
            ``geometric`` count; None for none.
        subgoal_steps: k of a hierarchical policy, ≥ 1; None for a flat one.
        option_steps: n of values over options, ≥ 1, whose goals are drawn by ``value`` anew; None for none.
        extra: names of steps columns that come along as ``batch.extra.<name>``, as the data have them.
    """

    discount: float = 0.99
    value: GoalMix | None = None
    actor: GoalMix | None = None
    subgoal_steps: int | None = None
    option_steps: int | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_names(self.extra)
        check_range("discount", self.discount, 0.0, 1.0, upper_open=True)
        for name, steps in (("subgoal_steps", self.subgoal_steps), ("abstraction_factor", self.option_steps)):
            if steps is not None:
                check_range(name, steps, 1)

    def places(self, replay: Replay) -> np.ndarray:
        """Places in ``replay.rows`` of the rows that can be drawn: those whose successor is known, int64."""
        require_columns(replay, ("obs", "action", "terminated"))
        obs, action = replay.steps["obs"], replay.steps["action"]
        if obs.ndim != 2 or not is_float(action):
            found = f"observations of shape {tuple(obs.shape[1:])} and actions of type {action.dtype}"
            raise DataError(
                f"the data have {found}; expected vectors of state and continuous actions, all that goal-conditioned "
                "methods take here. Choose a state-based data set."
            )
        lost = np.zeros(len(obs), dtype=bool)
        lost[replay.unusable] = True
        if "next_obs" not in replay.steps:  # without a termination there is nothing else to learn from such a row
            known = to_numpy(replay.tail["valid"]).astype(bool) if "valid" in replay.tail else "obs" in replay.tail
            lost[replay.end[~np.broadcast_to(known, replay.end.shape)]] = True
        return np.flatnonzero(~lost[replay.rows])

    def rows(self, replay: Replay) -> np.ndarray:
        """The rows that can be drawn, int64."""
        return replay.rows[self.places(replay)]

    def bind(self, replay: Replay, normalizer: Normalizer, device: torch.device) -> BoundGoals:
        return BoundGoals(self, replay, normalizer, device)


class BoundGoals(BoundView):
    """All goals of any number of batches at once: integer arithmetic, then one gather of states.

    Every row takes :attr:`uniforms` further random numbers, in the order in which :meth:`gather` uses them.
    """

    def __init__(self, view: GoalView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        places = view.places(replay)
        self.states = States(replay, normalizer, device)
        rows = replay.rows[places]
        where = device if self.states.table is not None else torch.device("cpu")
        super().__init__(rows, where, mixture_weights(replay, rows))
        self.view, self.target, self.dtype = view, device, normalizer.obs_scale.dtype
        self.extra = ExtraColumns(view.extra, replay, where, device, self.dtype)
        self.uniforms = (
            3 * (view.value is not None) + 3 * (view.actor is not None) + 4 * (view.option_steps is not None)
        )
        episode = replay.episode_of[places]
        end = (np.cumsum(replay.length) - 1)[episode]
        # number of the state of each item, and of the last one that may be a goal in its trajectory
        self.state = torch.from_numpy(np.stack([places, end], -1) + episode[:, None]).to(self.device)
        self.action = normalizer.action(replay.take(rows, ("action",))["action"].to(device, self.dtype))

    def gather(self, items: Tensor, uniforms: Tensor | None = None) -> GoalTransitions:
        """The batch of these items; ``uniforms`` float64 in [0, 1), ``items.shape + (self.uniforms,)``."""
        view = self.view
        u = iter(() if uniforms is None else uniforms.to(self.device).unbind(-1))
        items = items.to(self.device)
        t, end = self.state[items].unbind(-1)
        states: dict[str, Tensor] = {"obs": t}
        numbers: dict[str, Tensor] = {}
        if view.value is not None:
            states |= {"next_obs": t + 1, "value_goal": self.goals(view.value, t, end, next(u), next(u), next(u))}
            numbers |= self.reached("value", t, states["value_goal"])
        if view.actor is not None and view.subgoal_steps is None:
            states["actor_goal"] = self.goals(view.actor, t, end, next(u), next(u), next(u))
        elif view.actor is not None and view.subgoal_steps is not None:
            states |= self.subgoals(view.actor, view.subgoal_steps, t, end, next(u), next(u), next(u))
        if view.value is not None and view.option_steps is not None:
            option = self.options(view.value, view.option_steps, t, end, next(u), next(u), next(u), next(u))
            states |= option
            option_end, goal = option["high_value_option_obs"], option["high_value_goal"]
            numbers |= self.reached("high_value", option_end, goal)
            numbers["high_value_full"] = (option_end - t == view.option_steps) | (option_end == goal)
        observations = self.states.take(torch.stack(list(states.values()))).unbind(0)
        row = self.row(items)
        return GoalTransitions(
            **dict(zip(states, observations, strict=True)),
            **{name: value.to(self.target, self.dtype) for name, value in numbers.items()},
            action=self.action[items.to(self.target)],
            row=row.to(self.target),
            extra=self.extra.take(row),
        )

    # -- numbers of states; u… are uniforms in [0, 1), of the same shape ---------------------------------------------

    def goals(self, mix: GoalMix, t: Tensor, end: Tensor, u_future: Tensor, u_any: Tensor, u_kind: Tensor) -> Tensor:
        """One goal each, with exactly the probabilities of the mix."""
        goal = torch.where(u_kind < mix.current + mix.trajectory, self.future(mix, t, end, u_future), self.any(u_any))
        return torch.where(u_kind < mix.current, t, goal)

    def subgoals(
        self, mix: GoalMix, k: int, t: Tensor, end: Tensor, u_future: Tensor, u_any: Tensor, u_kind: Tensor
    ) -> dict[str, Tensor]:
        """k steps ahead: w = min(t + k, e(t)) for the low level, and min(t + k, g) on the way to g for the high one."""
        low, goal, random = torch.minimum(t + k, end), self.future(mix, t, end, u_future), u_kind < mix.random
        return {
            "low_goal": low,
            "high_goal": torch.where(random, self.any(u_any), goal),
            "high_target": torch.where(random, low, torch.minimum(t + k, goal)),
        }

    def options(
        self,
        mix: GoalMix,
        n: int,
        t: Tensor,
        end: Tensor,
        u_future: Tensor,
        u_any: Tensor,
        u_kind: Tensor,
        u_current: Tensor,
    ) -> dict[str, Tensor]:
        """The end Ω of an option of n steps, which stops at its goal and at e(t), and the goal (OTA's authors' code).

        The goal is Ω itself with probability ``current``; whether the option was on its way to a later state of the
        trajectory is drawn apart from that.
        """
        future = self.future(mix, t, end, u_future)
        on_way = u_kind < mix.trajectory / (1.0 - mix.current + 1e-6)
        option_end = torch.minimum(t + n, torch.where(on_way, future, end))
        goal = torch.where(on_way, future, self.any(u_any))
        goal = torch.where(u_current < mix.current, option_end, goal)
        return {"high_value_option_obs": option_end, "high_value_goal": goal}

    def future(self, mix: GoalMix, t: Tensor, end: Tensor, u: Tensor) -> Tensor:
        """A later state of the trajectory, or e(t) where there is none."""
        if not mix.geometric:
            first = torch.minimum(t + 1, end)
            return (u * first + (1.0 - u) * end).round().long()  # halves to even
        # the least o ≥ 1 with γ^o < 1 - u is Geometric(1 - γ)
        log_discount = math.log(self.view.discount) if self.view.discount else -math.inf
        return torch.minimum(t + 1 + (torch.log1p(-u) / log_discount).long(), end)

    def any(self, u: Tensor) -> Tensor:
        """Any state that can be drawn."""
        return self.state[:, 0][self.items(u)]

    def reached(self, name: str, at: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """Reward and mask: 0 and 0 at the goal, -1 and 1 elsewhere."""
        success = (at == goal).to(self.dtype)
        return {f"{name}_reward": success - 1.0, f"{name}_mask": 1.0 - success}


class States:
    """The normalised observations of all states by their numbers: N steps and E last states.

    Args:
        replay: the data.
        normalizer: of observations.
        device: where the observations are wanted. They lie there as one table where that fits; otherwise each is read
            from the replay when it is asked for.
    """

    def __init__(self, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        self.replay, self.normalizer, self.device = replay, normalizer, device
        self.first = np.cumsum(replay.length) - replay.length + np.arange(replay.num_episodes)
        count, width = replay.num_steps + replay.num_episodes, row_width(replay.steps["obs"])
        dtype = normalizer.obs_scale.dtype
        self.table: Tensor | None = None
        if not replay.is_mapped and count * width * dtype.itemsize <= PACK_LIMIT:
            self.table = torch.empty(count, *replay.steps["obs"].shape[1:], dtype=dtype, device=device)
            for i in range(0, count, CHUNK):
                self.table[i : i + CHUNK] = self.read(np.arange(i, min(i + CHUNK, count)))

    def take(self, numbers: Tensor) -> Tensor:
        """Observations of these states, ``numbers.shape + (O,)``."""
        flat = numbers.reshape(-1)
        found = self.read(flat.cpu().numpy()) if self.table is None else self.table.index_select(0, flat)
        return found.reshape(*numbers.shape, *found.shape[1:])

    def read(self, numbers: np.ndarray) -> Tensor:
        """The same for a flat array, from the replay."""
        episode = np.searchsorted(self.first, numbers, side="right") - 1
        step = numbers - self.first[episode]
        final = step == self.replay.length[episode]
        row = self.replay.start[episode] + step - final
        obs = self.replay.take(row, ("obs",))["obs"]
        if final.any():
            obs[torch.from_numpy(final)] = self.replay.next_obs(row[final]).to(obs.dtype)
        return self.normalizer.obs(obs.to(self.device, self.normalizer.obs_scale.dtype))
