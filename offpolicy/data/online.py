"""Options of data that are collected in an environment while a method trains, and what they must fit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from offpolicy.data.replay import Replay
from offpolicy.environments.collecting import Simulator
from offpolicy.errors import UsageError, check_range
from offpolicy.given import whole_fields

ENDS = ("cut", "whole", "keep")
RANDOM_STEPS = 10_000  # of a run from scratch, where nobody says; a tenth of all where that is less


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


def check_fit(options: OnlineOptions, simulator: Simulator, random_steps: int, offline: Replay | None) -> None:
    """Refuse options that do not fit the environment that is played, or the data that are there before.

    Args:
        options: asked for.
        simulator: of the environment.
        random_steps: environment steps with uniform actions first.
        offline: the data; None for a run from scratch.

    Raises:
        UsageError: says which, and what to do.
    """
    o, lead = options, random_steps + options.warmup_steps
    longest = simulator.limit * o.envs
    _check_rounds(o, simulator, longest)
    if o.env_steps <= lead:
        raise UsageError(
            f"`data.online.env_steps` is {o.env_steps:,}, and {lead:,} of them are random ones or a warm-up "
            "(`data.online.random_steps`, `warmup_steps`); expected more, as updates begin after them. Lower these."
        )
    # rows beyond rounds: an episode that is played to its end; one that goes on stays whole until it has ended
    spare = {"cut": 0, "whole": longest, "keep": 2 * longest + (o.envs > 1) * o.round_steps}[o.episodes]
    if offline is None:
        _check_alone(o, lead, random_steps, longest, max(spare, simulator.limit))
    else:
        _check_beside(o, simulator, lead, spare, offline)


def _check_rounds(o: OnlineOptions, sim: Simulator, longest: int) -> None:
    """Whether episodes of up to so many steps in all environments fit into rounds."""
    beside = f" in each of {o.envs} environments (`data.online.envs`)" if o.envs > 1 else ""
    if o.episodes != "keep" and longest > o.round_steps:
        raise UsageError(
            f"an episode of {sim.env_id} has up to {sim.limit:,} steps{beside} and `data.online.round_steps` is "
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
            f"`data.online.episodes` is 'whole', and {sim.env_id} has no known limit of steps; expected one. Pass "
            "--data.max_episode_steps N, or --data.online.episodes cut."
        )


def _check_alone(o: OnlineOptions, lead: int, random_steps: int, longest: int, spare: int) -> None:
    """Options of a run from scratch."""
    if o.episodes == "whole" and o.env_steps < lead + longest:
        raise UsageError(
            f"`data.online.env_steps` is {o.env_steps:,}, and the first {lead:,} are played to the end of "
            f"an episode (`data.online.episodes` 'whole'); expected at least {lead + longest:,}. Raise "
            "it, or lower `data.online.random_steps`."
        )
    if o.mix != "union":
        raise UsageError(
            f"`data.online.mix` is {o.mix!r}, and there are no offline data to mix; expected them. Pass --data."
        )
    if random_steps < 1:
        raise UsageError("`data.online.random_steps` is 0, and there are no other data; expected at least 1.")
    least = lead + o.round_steps + spare
    if o.capacity is not None and o.capacity < least:
        raise UsageError(
            f"`data.online.capacity` is {o.capacity:,} rows; expected at least {least:,}, the first steps, a "
            "round and an episode. Raise it, or leave it out."
        )


def _check_beside(o: OnlineOptions, sim: Simulator, lead: int, spare: int, offline: Replay) -> None:
    """Options of a run beside data or after them."""
    for what, found, column in (("observations", sim.obs_dim, "obs"), ("actions", sim.action_dim, "action")):
        width = offline.steps[column].shape[1:]
        if tuple(width) != (found,):
            raise UsageError(
                f"{sim.env_id} has {what} of width {found}, and the data of shape {tuple(width)}; expected the "
                "same. Choose the environment of the data."
            )
    known = offline.meta.get("env_id")
    if known and str(known).rpartition(":")[2] != sim.env_id.rpartition(":")[2]:
        raise UsageError(
            f"`data.online.env` is {sim.env_id}, and the data are of {known}, in which they are evaluated and scored; "
            "expected the same. Leave `data.online.env` out, or choose data of that environment."
        )
    kept = 0 if o.mix == "none" else offline.num_steps
    least = kept + lead + o.round_steps + spare  # the first round has the lead too
    if o.capacity is not None and o.capacity < least:
        raise UsageError(
            f"`data.online.capacity` is {o.capacity:,} rows, and {kept:,} offline rows stay beside rounds of "
            f"{o.round_steps:,}; expected at least {least:,} with the first steps and an episode. Raise it, or "
            "leave it out."
        )
