"""Several seeds in one method: acting, evaluation, and taking one out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from toy import METHODS, differences, fit, method, toy_replay, weights

import offpolicy as op
from offpolicy.data.replay import Replay
from offpolicy.evaluation.order import OrderConsistency
from offpolicy.evaluation.rollout import Evaluator
from offpolicy.evaluation.scores import summarize
from offpolicy.files import Table

SEEDS = (4, 1)
GOALS = ("HIQL", "OTA-clipped", "GCIQL")


@pytest.fixture(scope="module")
def replay() -> Replay:
    return toy_replay()


def trained(
    name: str, replay: Replay, steps: int, *, seed: int = 0, seeds: tuple[int, ...] = (), **options: Any
) -> Any:
    module = method(name, **options)
    module.seed, module.seeds, module.run.eval_episodes = seed, seeds, 0
    return fit(module, replay, steps, precision="64-true")


def answers(module: Any) -> dict[str, Any]:
    """What a method says to three observations and to one."""
    obs = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    if not isinstance(module, op.GoalModule):
        return {"act": module.act(obs), "one": module.act(obs[0])}
    goal = obs[::-1].copy()
    found = {"act": module.act_goal(obs, goal), "one": module.act_goal(obs[0], goal[0])}
    found |= {f"value/{name}": value for name, value in module.value_of(obs, goal).items()}
    if hasattr(module, "high_actor"):
        found |= {"subgoal": module.subgoal(obs, goal), "rep": module.represent(obs[0], goal[0])}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HIQL", "IQL", "PRDC", "A2PR"])
def test_every_seed_equals_its_single_run(name: str, replay: Replay) -> None:
    together = trained(name, replay, 50, seeds=SEEDS)
    for seed in SEEDS:
        alone, taken = trained(name, replay, 50, seed=seed), together.take_seed(seed)
        assert weights(taken).keys() == weights(alone).keys()
        for key, value in weights(alone).items():
            torch.testing.assert_close(weights(taken)[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", ["BC", "TD3BC", "CQL", "EDAC", *GOALS])
def test_a_method_of_seeds_answers_for_each_as_the_one_taken_out(name: str, replay: Replay) -> None:
    together: Any = method(name)
    together.seeds = SEEDS
    together.prepare(replay, max_steps=4).run_block(0, 4)
    found = answers(together)
    assert found["act"].shape == (2, 3, 1) and found["one"].shape == (2, 1)
    for i, seed in enumerate(SEEDS):
        taken = together.take_seed(seed)
        assert taken.seeds == () and taken.seed == seed
        own = answers(taken)
        assert found.keys() == own.keys()
        for key in own:
            assert np.array_equal(found[key][i], own[key]), key
    assert together.seeds == SEEDS and all(p.shape[0] == 2 for p in together.parameters())


def test_evaluation_plays_every_seed_by_itself(replay: Replay, tmp_path: Path) -> None:
    """The numbers are means over seeds, and each seed's own are those of an evaluation of that seed alone."""
    module = method("TD3BC")
    module.seeds = SEEDS
    fit(module, replay, 45, tmp_path)
    (row,) = Table(tmp_path / "evals.csv").rows()
    evaluator = Evaluator(module.data_meta, module.sizes, episodes=1)
    for seed in SEEDS:
        alone = summarize(evaluator.run(module.take_seed(seed).act), module.data_meta)
        assert {k: row[f"eval/{k}_seed{seed}"] for k in alone} == alone
    assert row["eval/return_mean"] == np.mean([row[f"eval/return_mean_seed{seed}"] for seed in SEEDS])
    assert row["eval/return_mean_best"] == row["eval/return_mean"]

    opened: Any = op.load(tmp_path)
    assert opened.seeds == SEEDS and not differences(weights(opened), weights(module))
    numbers = op.evaluate(tmp_path, episodes=1)
    assert numbers["return_mean"] == row["eval/return_mean"] and numbers["seeds"] == list(SEEDS)
    assert np.mean(numbers["returns"]) == numbers["return_mean"] and np.shape(numbers["returns"]) == (2, 1)


class Reach(gymnasium.Env[Any, Any]):
    """Two steps towards one of two goals, the sign of the first number, which every reset names."""

    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.at = 0, self.np_random.normal(size=3).astype(np.float32)
        return self.at, {"goal": np.full(3, 2 * options["task_id"] - 3, np.float32)}

    def step(self, action: Any) -> Any:
        self.t += 1
        self.at = self.at + np.float32(action[0])
        return self.at, 0.0, False, self.t == 2, {"success": bool(self.at[0] > 0)}


def test_goal_methods_are_evaluated_on_every_task_by_every_seed(tmp_path: Path) -> None:
    gymnasium.register("Reach-v0", Reach)
    try:
        module: Any = op.OTA(hidden_dims=(8,), subgoal_steps=2, rep_dim=2, batch_size=16)
        module.seeds = SEEDS
        data = toy_replay(env_id="Reach-v0", tasks=2, max_episode_steps=None)
        op.fit(module, data, max_steps=4, eval_episodes=3, verbose=False, folder=tmp_path)
        (row,) = Table(tmp_path / "evals.csv").rows()
        for name in ("success_mean", "success_task1", "success_task2", "score"):
            own = [row[f"eval/{name}_seed{seed}"] for seed in SEEDS]
            assert row[f"eval/{name}"] == pytest.approx(np.mean(own))
        for seed in SEEDS:
            alone = op.evaluate(module.take_seed(seed), episodes=3)
            assert alone["success_mean"] == row[f"eval/success_mean_seed{seed}"]
    finally:
        gymnasium.registry.pop("Reach-v0")


def test_a_run_of_seeds_goes_on_with_them(tmp_path: Path) -> None:
    data = toy_replay(env_id=None)
    settings: dict[str, Any] = {"verbose": False, "eval_every": 10, "root": tmp_path}
    whole, half = method("TD3BC"), method("TD3BC")
    whole.seeds = half.seeds = (0, 1)
    op.fit(whole, data, max_steps=20, **settings)
    first = op.fit(half, data, max_steps=10, **settings)
    again = op.fit(method("TD3BC"), data, max_steps=20, ckpt_path=first.folder, **settings)
    assert again.method.seeds == (0, 1) and not differences(weights(again.method), weights(whole))  # type: ignore[arg-type]
    other = method("TD3BC")
    other.seeds = (0, 2)
    with pytest.raises(op.UsageError, match=r"holds the seeds \(0, 1\), and `seeds` is \(0, 2\); expected the same"):
        op.fit(other, data, max_steps=30, ckpt_path=first.folder, **settings)


def test_one_seed_is_saved_opened_and_evaluated(replay: Replay, tmp_path: Path) -> None:
    module: Any = method("IQL")
    module.seeds = (0, 3)
    module.prepare(replay, max_steps=6).run_block(0, 6)
    single = module.take_seed(3)
    before = weights(single)
    module.run_block(6, 2)
    assert not differences(weights(single), before)  # no memory is shared

    single.save(tmp_path / "policy.ckpt")
    opened: Any = op.load(tmp_path / "policy.ckpt")
    obs = torch.randn(4, 3)
    assert opened.seed == 3 and opened.updates == 6 and torch.equal(opened.act(obs), single.act(obs))
    assert torch.equal(opened.log_prob(obs, torch.zeros(4, 1)), single.log_prob(obs, torch.zeros(4, 1)))
    assert op.evaluate(opened, episodes=1) == op.evaluate(single, episodes=1)
    with pytest.raises(op.UsageError, match=r"holds weights alone, as `save` and --run.final weights_only write them"):
        op.fit(method("IQL"), replay, max_steps=9, ckpt_path=tmp_path / "policy.ckpt", verbose=False, root=tmp_path)


def test_order_consistency_of_seeds_is_their_mean() -> None:
    """Seed 0 is in order everywhere, seed 1 nowhere: a half."""
    measure = OrderConsistency([np.arange(6.0)[:, None]], distance=2, window=1)
    both = measure.curves(lambda obs, goal: {"value": np.stack([obs[:, 0], -obs[:, 0]])}, [2, 3])["value"]
    assert both.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert measure(lambda obs, goal: {"value": np.stack([obs[:, 0], -obs[:, 0]])}) == {"order_consistency": 0.5}


@pytest.mark.parametrize("seeds", [(0, 0), (-1, 2), (0.5,), "01", (True, False)])
def test_seeds_are_whole_numbers_each_once(seeds: Any) -> None:
    with pytest.raises(op.UsageError, match="expected whole numbers ≥ 0, each once"):
        method("BC").seeds = seeds


def test_seeds_that_come_too_late_or_are_not_there(replay: Replay) -> None:
    module = method("BC").prepare(replay)
    with pytest.raises(op.UsageError, match=r"`seeds` is \(0, 1\), but BC has its networks already, with `seeds` \(\)"):
        module.seeds = (0, 1)
    with pytest.raises(op.UsageError, match="there is no seed 1 to take: BC holds one seed, 0, alone"):
        module.take_seed(1)
    with pytest.raises(op.UsageError, match="BC has no networks yet"):
        method("BC").take_seed(0)
    several: Any = method("BC")
    several.seeds = np.arange(2)
    several.prepare(replay)
    with pytest.raises(op.UsageError, match="there is no seed 2 to take: BC holds the seeds 0, 1"):
        several.take_seed(2)
    with pytest.raises(op.UsageError, match="the policy holds the seeds 0, 1; expected one policy"):
        method("WorldModel").prepare(replay).rollout(np.zeros((2, 3)), several, 2)  # type: ignore[operator]


class Plain(op.OfflineModule):
    """A method with a layer of torch, which has no axis for seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()

    def build(self, sizes: op.Sizes) -> None:
        self.actor = nn.Linear(sizes.obs_dim, sizes.action_dim)

    def learning_rates(self) -> dict[str, Any]:
        return {"actor": 1e-3}


class Masked(op.BC):
    """A method with a buffer of random numbers, which has no axis for seeds."""

    def build(self, sizes: op.Sizes) -> None:
        super().build(sizes)
        self.register_buffer("empty", torch.full((2,), float("nan")))
        self.register_buffer("mask", torch.rand(3))


def test_a_buffer_that_depends_on_the_seed_is_refused(replay: Replay) -> None:
    module = Masked(hidden_dims=(8,))
    module.seeds = (0, 1)
    with pytest.raises(op.UsageError, match=r"Masked has a buffer that depends on the seed \(`mask`\)"):
        module.prepare(replay)


@pytest.mark.parametrize("name", ["DecisionTransformer", "TrajectoryDiffusion", "WorldModel", "Plain", "DPO"])
def test_methods_without_room_for_seeds_refuse_them(name: str, replay: Replay) -> None:
    refused = r"(trains one seed per process|`actor` is a torch.nn.Linear\)); expected `seeds` empty"
    with pytest.raises(op.UsageError, match=refused):
        module: Any = Plain() if name == "Plain" else method(name) if name in METHODS else op.DPO()
        module.seeds = (0, 1)
        module.prepare(replay)
