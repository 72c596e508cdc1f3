"""The goal view: index arithmetic by hand and against a loop, laws of the goals, layouts, memory maps, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy import toy_replay

from offpolicy.data import sampling
from offpolicy.data.goals import BoundGoals, GoalMix, GoalTransitions, GoalView
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.sources import ogbench
from offpolicy.errors import DataError, UsageError

CPU = torch.device("cpu")
MIX = GoalMix(0.2, 0.5, 0.3, geometric=True)
EVERYTHING = GoalView(discount=0.9, value=MIX, actor=GoalMix(0.0, 0.5, 0.5), subgoal_steps=3, option_steps=2)
FLAT = GoalView(discount=0.9, value=MIX, actor=GoalMix(0.1, 0.6, 0.3))


def bind(view: GoalView, replay: Replay, *, normalize: bool = False) -> BoundGoals:
    affine = Normalizer(replay.steps["obs"].shape[1:], replay.steps["action"].shape[1])
    affine.fit(replay, replay.rows, normalize_obs=normalize, reward_transform="r", eps=1e-3)
    return view.bind(replay, affine, CPU)


def numbered(lengths: Any) -> Replay:
    """Episodes whose observations are the numbers of their states: of episode e, 100·e + 0, 1, …"""
    length = np.asarray(lengths)
    obs = np.concatenate([100 * e + np.arange(n) for e, n in enumerate(length)]).astype(np.float32)[:, None]
    tail = (100 * np.arange(len(length)) + length).astype(np.float32)[:, None]
    steps = {"obs": obs, "action": np.zeros_like(obs), "terminated": np.zeros(len(obs), bool)}
    start = np.cumsum(length) - length
    return Replay(steps, start=start, length=length, tail={"obs": tail}, meta={"action_low": [-1], "action_high": [1]})


def drawn(bound: BoundGoals, n: int, seed: int = 0) -> GoalTransitions:
    rows, update = torch.arange(n), torch.ones(1, dtype=torch.int64)
    items = bound.pick(sampling.bits(sampling.keys(seed, "index", update), rows))[0]
    return bound.gather(items, sampling.uniforms(sampling.keys(seed, "view", update), rows, (bound.uniforms,))[0])


def number(*values: float) -> torch.Tensor:
    return torch.tensor(values)


# -- index arithmetic ------------------------------------------------------------------------------------------------


def test_options_known_answers() -> None:
    """One trajectory of states 0 … 12, steps 0 … 11, e(t) = 11, n = 4; γ = ½, so that u gives 1 + ⌊-log₂(1 - u)⌋ steps.

    t = 3, goal 9 (6 steps, u = 1 - 2⁻⁵·¹): Ω = 7, not reached. Goal 6 (3 steps): Ω = 6, reached. t = 10 and 11 with
    goal 5 from anywhere (u = 0.45 of 12 rows): Ω = 11, not reached, although from 11 the option has no step at all.
    """
    view = GoalView(discount=0.5, value=GoalMix(0.0, 0.5, 0.5, geometric=True), option_steps=4)
    bound = bind(view, numbered([12]))
    t, end = torch.tensor([3, 3, 10, 11]), torch.full((4,), 11)
    future, kind = number(1 - 2**-5.1, 1 - 2**-2.1, 0.0, 0.0), number(0.0, 0.0, 0.9, 0.9)
    found = bound.options(
        view.value, 4, t, end, future, number(0.45, 0.45, 0.45, 0.45), kind, number(0.5, 0.5, 0.5, 0.5)
    )
    assert found["high_value_goal"].tolist() == [9, 6, 5, 5]
    assert found["high_value_option_obs"].tolist() == [7, 6, 11, 11]
    reached = bound.reached("x", found["high_value_option_obs"], found["high_value_goal"])
    assert reached["x_reward"].tolist() == [-1, 0, -1, -1] and reached["x_mask"].tolist() == [1, 0, 1, 1]


def test_a_current_goal_of_an_option_is_its_end() -> None:
    """On the way to a later state (9, 6 steps ahead) and not: both end at t + n = 7 and are reached."""
    view = GoalView(discount=0.5, value=GoalMix(0.5, 0.25, 0.25, geometric=True), option_steps=4)
    bound = bind(view, numbered([12]))
    t, end, far = torch.tensor([3, 3]), torch.full((2,), 11), number(1 - 2**-5.1, 1 - 2**-5.1)
    found = bound.options(view.value, 4, t, end, far, number(0.45, 0.45), number(0.0, 0.9), number(0.0, 0.0))
    assert found["high_value_option_obs"].tolist() == found["high_value_goal"].tolist() == [7, 7]


def test_subgoals_known_answers() -> None:
    """k = 6. From 9 the low goal is 11. Uniform future, u = ½ between t + 1 and 11: from 3 to 7.5 → 8 (halves to even),
    so w = 8; from 9 to 10.5 → 10, so w = 10; a random goal leaves w = min(t + k, 11)."""
    view = GoalView(actor=GoalMix(0.0, 0.5, 0.5), subgoal_steps=6)
    bound = bind(view, numbered([12]))
    t, end, half = torch.tensor([3, 9, 3]), torch.full((3,), 11), number(0.5, 0.5, 0.5)
    found = bound.subgoals(view.actor, 6, t, end, half, number(0.1, 0.1, 0.1), number(0.9, 0.9, 0.0))
    assert found["low_goal"].tolist() == [9, 11, 9]
    assert found["high_goal"].tolist() == [8, 10, 1] and found["high_target"].tolist() == [8, 10, 9]


def naive(view: GoalView, length: list[int], episode: int, step: int, u: list[float]) -> dict[str, float]:
    """One row of the batch, in numbers 100·episode + step, by the text of the definitions."""
    end, here = length[episode] - 1, 100 * episode
    rows = [100 * e + i for e, n in enumerate(length) for i in range(n)]
    take = iter(u)

    def future(mix: GoalMix, v: float) -> int:
        if mix.geometric:
            ahead = 1
            while view.discount**ahead >= 1 - v:
                ahead += 1
            return min(step + ahead, end)
        return round(v * min(step + 1, end) + (1 - v) * end)

    def goal(mix: GoalMix) -> int:
        later, any_, kind = here + future(mix, next(take)), rows[int(next(take) * len(rows))], next(take)
        return here + step if kind < mix.current else later if kind < mix.current + mix.trajectory else any_

    found: dict[str, float] = {"obs": here + step, "next_obs": here + step + 1}
    assert view.value is not None and view.actor is not None
    found["value_goal"] = goal(view.value)
    found["value_mask"] = float(found["value_goal"] != here + step)
    if view.subgoal_steps is None or view.option_steps is None:
        return found | {"actor_goal": goal(view.actor)}
    later, any_, random = future(view.actor, next(take)), rows[int(next(take) * len(rows))], next(take)
    found["low_goal"] = here + min(step + view.subgoal_steps, end)
    if random < view.actor.random:
        found |= {"high_goal": any_, "high_target": found["low_goal"]}
    else:
        found |= {"high_goal": here + later, "high_target": here + min(step + view.subgoal_steps, later)}
    later, any_, kind, current = future(view.value, next(take)), rows[int(next(take) * len(rows))], *take
    on_way = kind < view.value.trajectory / (1 - view.value.current + 1e-6)
    option_end = here + min(step + view.option_steps, later if on_way else end)
    aim = option_end if current < view.value.current else here + later if on_way else any_
    found |= {"high_value_option_obs": option_end, "high_value_goal": aim, "high_value_mask": float(option_end != aim)}
    whole = option_end == here + step + view.option_steps
    return found | {"high_value_full": float(whole or option_end == aim)}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99), st.booleans(), st.booleans())
def test_every_field_equals_a_loop(lengths: list[int], seed: int, flat: bool, geometric: bool) -> None:
    view = FLAT if flat else EVERYTHING
    view = replace(view, value=replace(view.value, geometric=geometric))
    bound = bind(view, numbered(lengths))
    u = torch.rand(len(bound), bound.uniforms, generator=torch.Generator().manual_seed(seed)).double()
    batch = bound.gather(torch.arange(len(bound)), u)
    places = [(e, i) for e, n in enumerate(lengths) for i in range(n)]
    for j, (episode, step) in enumerate(places):
        expected = naive(view, lengths, episode, step, u[j].tolist())
        found = {name: float(getattr(batch, name)[j]) for name in expected}
        assert found == expected
        assert int(batch.row[j]) == j
    assert (batch.value_reward + batch.value_mask == 0).all()


def test_goals_inside_an_episode_stay_in_it() -> None:
    """Next states, sub-goals and option ends lie in the state's episode; so do goals where none is random."""
    inside = GoalView(
        discount=0.9, value=GoalMix(0.2, 0.8, 0.0, True), actor=GoalMix(), subgoal_steps=3, option_steps=4
    )
    batch = drawn(bind(inside, numbered([1, 2, 5, 30, 3])), 4000)
    for name, value in batch._asdict().items():
        if isinstance(value, torch.Tensor) and name.endswith(("obs", "goal", "target")):
            assert torch.equal(value.div(100, rounding_mode="floor"), batch.obs.div(100, rounding_mode="floor")), name
            assert (value >= batch.obs).all(), name


def test_only_what_a_view_asks_for_is_gathered() -> None:
    batch = drawn(bind(GoalView(actor=GoalMix()), numbered([5])), 8)
    assert {name for name, value in batch._asdict().items() if value is not None} == {
        "obs",
        "action",
        "actor_goal",
        "row",
    }


# -- laws ------------------------------------------------------------------------------------------------------------


def test_marginals_of_value_goals() -> None:
    """In one long trajectory a current goal is t; geometric ones of γ = 0.9 lie within 200 steps but for 7e-10; random
    ones are the rest. Expected shares 0.2, 0.5, 0.3; random goals lie in the window by chance (200/1e5)."""
    batch = drawn(bind(replace(EVERYTHING, value=MIX), numbered([100_000])), 200_000)
    ahead = (batch.value_goal - batch.obs)[:, 0]
    current, near = ahead == 0, (ahead > 0) & (ahead <= 200)
    counts = [int(current.sum()), int(near.sum()), int((~current & ~near).sum())]
    assert stats.chisquare(counts, [40_000, 100_000 + 120, 60_000 - 120]).pvalue > 1e-3


def test_marginals_of_option_goals() -> None:
    """Ω is the goal with probability 0.2 (drawn as such) + 0.8·0.625·(1 - γ^n) (met on the way), as n = 2: 0.295; the
    goal is neither near nor reached with probability 0.8·0.375 = 0.3."""
    batch = drawn(bind(EVERYTHING, numbered([100_000])), 200_000)
    far = (batch.high_value_goal - batch.obs)[:, 0].abs() > 200
    reached = batch.high_value_mask == 0
    counts = [int(reached.sum()), int(far.sum()), int((~reached & ~far).sum())]
    p = [0.2 + 0.5 * (1 - 0.9**2), 0.3 * (1 - 400 / 1e5)]
    assert stats.chisquare(counts, [200_000 * q for q in (*p, 1 - sum(p))]).pvalue > 1e-3


@pytest.mark.parametrize("geometric", [True, False])
def test_law_of_later_states(geometric: bool) -> None:
    """From t = 0 of 13 steps, e = 12: P(o) = 0.1·0.9^(o - 1) with the rest at 12. Uniform: rounding u·1 + (1 - u)·12
    gives the ends half of the weight of the others, as in the authors' code."""
    bound = bind(EVERYTHING, numbered([13]))
    u = sampling.uniforms(sampling.keys(0, "view", torch.ones(1, dtype=torch.int64)), torch.arange(50_000), (1,))[
        0, :, 0
    ]
    zero = torch.zeros(len(u), dtype=torch.int64)
    found = bound.future(GoalMix(geometric=geometric), zero, zero + 12, u)
    if geometric:
        law = [0.1 * 0.9**i for i in range(11)] + [0.9**11]
    else:
        law = [0.5 / 11, *[1 / 11] * 10, 0.5 / 11]
    counts = found.bincount(minlength=13)
    assert counts[0] == 0 and stats.chisquare(counts[1:].numpy(), np.array(law) * len(u)).pvalue > 1e-3
    at_end = bound.future(GoalMix(geometric=geometric), zero + 12, zero + 12, u)
    assert (at_end == 12).all()


def test_random_goals_are_uniform_over_all_steps() -> None:
    batch = drawn(bind(GoalView(actor=GoalMix(0.0, 0.0, 1.0)), numbered([3, 1, 6])), 50_000)
    _, counts = batch.actor_goal.unique(return_counts=True)
    assert len(counts) == 10 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_discount_zero_looks_one_step_ahead() -> None:
    view = GoalView(discount=0.0, value=GoalMix(0.0, 1.0, 0.0, geometric=True))
    batch = drawn(bind(view, numbered([50])), 500)
    assert torch.equal(batch.value_goal, (batch.obs + 1).clamp(max=49))


# -- stores ----------------------------------------------------------------------------------------------------------


def test_all_layouts_of_a_file_give_the_same_draws(tmp_path: Path) -> None:
    """A file of OGBench as it is, and saved after its own loader made it compact or regular."""
    rng = np.random.default_rng(0)
    length = [4, 7, 2]  # states
    obs, action = rng.normal(size=(13, 3)).astype("f4"), rng.uniform(-1, 1, (13, 2)).astype("f4")
    last = np.cumsum(length) - 1
    end = np.zeros(13, "f4")
    end[last] = 1
    step = np.setdiff1d(np.arange(13), last)
    double = np.maximum(end, np.append(end[1:], 0))
    files = {
        "raw": {"observations": obs, "actions": action, "terminals": end},
        "compact": {"observations": obs, "actions": action, "terminals": double, "valids": 1 - end},
        "regular": {
            "observations": obs[step],
            "actions": action[step],
            "next_observations": obs[step + 1],
            "terminals": double[step],
        },
    }
    batches = {}
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        replay = ogbench.read(tmp_path / f"{name}.npz", meta={"action_range": [-1, 1]}, facts={})
        batches[name] = drawn(bind(EVERYTHING, replay), 300)
    for name in ("compact", "regular"):
        for field, value in batches["raw"]._asdict().items():
            if isinstance(value, torch.Tensor) and field != "row":  # rows are counted with or without last states
                assert torch.equal(value, getattr(batches[name], field)), (name, field)


def test_a_memory_map_gives_the_same_batches(tmp_path: Path) -> None:
    replay = toy_replay([3, 8, 1, 5])
    mapped = Replay.load(replay.save(tmp_path / "kept"), mmap=True)
    bounds = [bind(EVERYTHING, r, normalize=True) for r in (replay, mapped)]
    assert bounds[0].states.table is not None and bounds[1].states.table is None
    one, two = (drawn(bound, 200)._asdict() for bound in bounds)
    assert all(torch.equal(one[k], two[k]) for k in one if isinstance(one[k], torch.Tensor))


def test_chosen_episodes_are_a_replay_of_their_own() -> None:
    kept = bind(EVERYTHING, numbered([4, 6, 3]).filter([2, 0]))
    batch = drawn(kept, 400)
    assert set(batch.obs.unique().tolist()) == {200, 201, 202, 0, 1, 2, 3}
    assert set(batch.value_goal.div(100, rounding_mode="floor").unique().tolist()) == {0, 2}
    assert torch.equal(torch.where(batch.obs >= 200, batch.obs - 200 + 10, batch.obs)[:, 0].long(), batch.row)


def test_a_step_without_a_successor_is_a_goal_but_never_drawn() -> None:
    """Without the observations after their ends, episodes of 3 and 2 steps have transitions from rows 0, 1 and 3."""
    replay = numbered([3, 2])
    replay.tail = {}
    replay.steps["terminated"][[2, 4]] = True
    batch = drawn(bind(EVERYTHING, replay), 300)
    assert set(batch.row.tolist()) == {0, 1, 3}
    assert set(batch.low_goal.unique().tolist()) == {2, 101}
    assert (batch.next_obs == batch.obs + 1).all()


def test_actions_and_observations_are_normalised() -> None:
    replay = toy_replay([5, 5])
    bound = bind(FLAT, replay, normalize=True)
    batch = drawn(bound, 50)
    obs, rows = replay.steps["obs"], batch.row.numpy()
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    np.testing.assert_allclose(batch.obs, (obs[rows] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.action, replay.steps["action"][rows] / 2, rtol=1e-6)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [(0.2, 0.5, 0.5), (-0.1, 0.6, 0.5), (1.2, -0.2, 0.0), (math.nan, 0.5, 0.5)])
def test_probabilities_that_are_none(mix: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="with the sum 1"):
        GoalMix(*mix)


@pytest.mark.parametrize(("option", "value"), [("discount", 1.0), ("subgoal_steps", 0), ("option_steps", 0)])
def test_impossible_views(option: str, value: float) -> None:
    with pytest.raises(UsageError, match="abstraction_factor" if option == "option_steps" else option):
        GoalView(**{option: value})  # type: ignore[arg-type]


def test_discrete_actions_and_images_are_refused() -> None:
    discrete, pixels = numbered([4]), numbered([4])
    discrete.steps["action"] = discrete.steps["action"].astype(np.int64)
    pixels.steps["obs"] = np.zeros((4, 8, 8, 3), np.float32)
    for replay in (discrete, pixels):
        with pytest.raises(DataError, match="expected vectors of state and continuous actions"):
            FLAT.rows(replay)
