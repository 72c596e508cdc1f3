"""Roll-outs of a policy in a world model as data: where they start, act and end, and as a pool that training renews."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import run_copy, run_pair
from lightning.pytorch import Callback
from plain import ready
from toy import differences, fit, method, run_files, toy_replay, weights
from toy_generator import toy_model, versions

from lightning_modules.ravl import RAVL
from lightning_modules.world_model import WorldModel
from offpolicy.api import check_data_of_seeds, load_data
from offpolicy.data.module import DataModule
from offpolicy.data.renewal import SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.diffusion.rollouts import spread_of_critics
from offpolicy.environments.terminations import hopper_falls, termination_of, walker_falls
from offpolicy.errors import DataError, UsageError
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint
from offpolicy.trust import trust_always

trust_always("test_model_rollouts")  # runs of its models are opened by the name of their class
SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 16}
LAST = 90  # updates; checkpoints at 45 and 90
ROLLED = {"trajectories": 20, "batch_size": 8, "every": 40, "steps": 3, "keep": 2}


class Line(WorldModel):
    """Places on a line: an action moves by one in its direction and costs 0.1."""

    def sample(self, obs: Any, action: Any, rows: Any, t: int, seed: int) -> Any:
        return obs + torch.where(action > 0, 1.0, -1.0), obs.new_full((len(obs),), -0.1)


class EndingLine(Line):
    """The same; beyond 8 a roll-out ends."""

    def termination(self, obs: Any, action: Any, next_obs: Any) -> Any:
        return next_obs[:, 0] > 8.0


def line_replay() -> Replay:
    """Data at the places 5, 6 and 7."""
    obs = np.array([[5.0], [6.0], [7.0], [6.0]] * 4, np.float32)
    steps = {
        "obs": obs,
        "action": np.tile(np.array([[1.0], [1.0], [-1.0], [-1.0]], np.float32), (4, 1)),
        "reward": np.full(16, -0.1, np.float32),
        "terminated": np.zeros(16, bool),
    }
    start = np.arange(4) * 4
    tail = {"obs": np.full((4, 1), 5.0, np.float32)}
    meta = {"name": "line", "action_low": [-1.0], "action_high": [1.0]}
    return Replay(steps, start=start, length=np.full(4, 4), tail=tail, meta=meta)


def world(folder: Path, replay: Replay, kind: type[WorldModel] = WorldModel) -> Path:
    """The run folder of a world model after two updates."""
    module = kind(members=3, elites=2, held_out=0.0, **SMALL)
    module.seed, module.run.eval_episodes = 0, 0
    fit(module, replay, 2, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return world(tmp_path_factory.mktemp("model") / "run", toy_replay())


def rolled(model: Path, replay: Replay | None = None, **options: Any) -> DataModule:
    replay = toy_replay() if replay is None else replay
    return load_data(replay, source="model-rollouts", synthetic=SyntheticOptions(str(model), **(ROLLED | options)))


def learner(**options: Any) -> RAVL:
    made = RAVL(**(SMALL | {"num_critics": 3, "eta": 0.01} | options))
    made.seed = 0
    made.run.log_every, made.run.eval_every, made.run.eval_episodes = 20, 45, 0
    return made


def pool_of_line(tmp_path: Path, steps: int, kind: type[WorldModel] = Line, **options: Any) -> Replay:
    data = rolled(
        world(tmp_path / "line", line_replay(), kind), line_replay(), steps=steps, trajectories=256, **options
    )
    fit(learner(), data, 1)
    assert data.renewal is not None and data.renewal.replay is not None
    return data.renewal.replay


# -- the world model ---------------------------------------------------------------------------------------------------


def test_sampled_actions_and_successors() -> None:
    """Actions follow the policy's law, by another noise in every step, and each successor is the next observation."""
    replay = toy_replay()
    made = WorldModel(members=3, elites=2, held_out=0.0, **SMALL).prepare(replay)
    policy = learner().prepare(replay)
    start = torch.from_numpy(np.tile(replay.steps["obs"][:1], (4000, 1)))
    found = made.rollout(start, policy, 2, sampled=True, successors=True)
    assert torch.equal(found["next_obs"][:, 0], found["obs"][:, 1])
    mean, log_std = policy.actor.heads(policy.normalized(start[:1]))
    u = torch.atanh(found["action"][:, 0, 0].double())
    assert float(u.mean()) == pytest.approx(float(mean), abs=0.1 * float(log_std.exp()))
    assert float(u.std()) == pytest.approx(float(log_std.exp()), rel=0.1)
    again = made.rollout(start[:4], policy, 1, first=7, sampled=True)["action"]
    torch.testing.assert_close(again[:, 0], found["action"][7:11, 0])  # by the number of the trajectory
    with pytest.raises(UsageError, match="TD3BC is deterministic, so no actions can be drawn from it"):
        made.rollout(start, method("TD3BC").prepare(replay), 1, sampled=True)


def test_actions_are_translated_where_scales_differ() -> None:
    """The policy's ±1 is ±2 of the environment, the model's ±4: an action of 1 is ½ there."""
    narrow, wide = toy_replay(), toy_replay(action_low=[-4.0], action_high=[4.0])
    made = WorldModel(members=3, elites=2, held_out=0.0, **SMALL).prepare(wide)
    policy = method("BC").prepare(narrow)
    start = torch.from_numpy(narrow.steps["obs"][:5])
    found = made.rollout(start, policy, 1)["action"][:, 0]
    torch.testing.assert_close(made.normalizer.environment_action(found), policy.act(start))


def test_uncertainty_known_answer() -> None:
    """Deviations 1 and 2 of y; of s they count 2 / 0.5 = 4 times, of r 3 times: √(4² + 3²) = 5, and twice that."""
    made: Any = ready(WorldModel(members=2, elites=2, **SMALL), obs_dim=1, action_dim=1)
    with torch.no_grad():
        for p in made.model.net.parameters():
            p.zero_()
        made.model.max_log_var.fill_(20.0)
        made.model.min_log_var.fill_(-20.0)
        made.model.net.layers[-1].bias[1, 0, 2:] = float(np.log(4.0))
    made.target_scale.copy_(torch.tensor([2.0, 3.0]))
    made.normalizer.obs_scale.fill_(0.5)
    found = made.uncertainty(torch.zeros(3, 1).double(), torch.zeros(3, 1).double())
    torch.testing.assert_close(found, torch.full((3,), 10.0).double(), rtol=1e-7, atol=0)


def test_when_known_robots_fall() -> None:
    def state(width: int, height: float, angle: float, last: float = 0.0) -> torch.Tensor:
        return torch.tensor([[height, angle, *[0.0] * (width - 3), last]])

    for rule, width, cases in (
        (hopper_falls, 11, [(0.71, 0.19, 99, 0), (0.7, 0, 0, 1), (1, -0.2, 0, 1), (1, 0, -100, 1), (1, 0, np.nan, 1)]),
        (walker_falls, 17, [(0.81, 0.99, 1e3, 0), (0.8, 0, 0, 1), (2.0, 0, 0, 1), (1, -1.0, 0, 1)]),
    ):  # fmt: skip
        for height, angle, last, falls in cases:
            after = state(width, height, angle, last)
            assert rule(torch.zeros_like(after), torch.zeros(1, 1), after).item() == bool(falls), (rule, height, angle)


def test_which_rule_is_taken_is_said() -> None:
    for meta, width, rule, words in (
        ({"env_id": "Hopper-v4"}, 11, hopper_falls, "end by the rule of Hopper-v4"),
        ({"name": "walker2d-medium-v2"}, 17, walker_falls, "end by the rule of walker2d-medium-v2"),
        ({"env_id": "HalfCheetah-v5"}, 17, None, "end by no rule, as those of HalfCheetah-v5 do not"),
        (
            {"name": "mujoco/hopper/medium-v0"},
            11,
            hopper_falls,
            "rule of hopper, which the name mujoco/hopper/medium-v0",
        ),
        (
            {"name": "mujoco/reacher/expert-v0"},
            11,
            None,
            "by no rule, as those of reacher, which the name .* says do not",
        ),
        ({"name": "D4RL/pen/human-v2"}, 45, None, "no rule is known for D4RL/pen/human-v2"),
        ({"env_id": "Ant-v4"}, 27, None, "never end: no rule is known for Ant-v4"),
        ({"env_id": "Hopper-v4"}, 12, None, "never end: no rule .* its observations have 12 numbers and not 11"),
        (
            {"env_id": "Hopper-v4", "env_kwargs": {"terminate_when_unhealthy": False}},
            11,
            None,
            "never end: no rule .* it is made with `terminate_when_unhealthy`",
        ),
    ):
        found, said = termination_of(meta, width)
        assert found is rule
        assert re.search(words, said)


# -- what is rolled out ------------------------------------------------------------------------------------------------


def places(*columns: Any) -> set[int]:
    return {int(x) for column in columns for x in np.asarray(column).ravel()}


@pytest.mark.parametrize(("steps", "within", "edge"), [(1, {5, 6, 7}, {4, 8}), (2, {4, 5, 6, 7, 8}, {3, 9})])
def test_the_edge_of_reach_of_a_line(steps: int, within: set[int], edge: set[int], tmp_path: Path) -> None:
    found = pool_of_line(tmp_path, steps)
    updated = places(found.steps["obs"], line_replay().steps["obs"])
    assert updated == within
    assert places(found.next_obs(found.rows)) - updated == edge
    assert (found.length == steps).all() and found.num_episodes == 256 and not found.steps["terminated"].any()
    assert set(np.unique(found.steps["reward"])) == {np.float32(-0.1)}
    start = found.steps["obs"][found.start][:, 0]
    counts = np.unique(start, return_counts=True)[1]
    assert counts.tolist() == [64, 128, 64]  # 16 times the 16 rows of the data: 4 of 5, 8 of 6, 4 of 7


def test_a_maximum_at_the_edge_spreads_and_a_minimum_of_critics_does_not(tmp_path: Path) -> None:
    """Every step costs 0.1, so all values are -0.1 / (1 - 0.9) = -1. The edge 3 and 9 is never updated.

    One critic that says 4.921 / 0.729 there gives three steps away -0.1·(1 + 0.9 + 0.81) + 0.729·6.750 = 4.65. The
    smallest of ten critics, of which one says less than -1 there, and a critic that says -1, give -1.
    """
    found = pool_of_line(tmp_path, 2)
    obs = found.steps["obs"][:, 0].astype(int)
    right = (found.steps["action"][:, 0] > 0).astype(int)
    after = found.next_obs(found.rows).numpy()[:, 0].astype(int)
    moves = {(int(s), int(a), int(n)) for s, a, n in zip(obs, right, after)}
    assert moves == {(s, a, s + 2 * a - 1) for s in range(4, 9) for a in (0, 1)}

    def swept(edge: list[float]) -> np.ndarray:
        """Value at 6 of each critic, of which the smallest is bootstrapped from."""
        q = np.zeros((len(edge), 13, 2))
        q[:, [3, 9]] = np.array(edge)[:, None, None]
        for _ in range(400):
            target = q.min(0).max(-1)
            for s, a, n in moves:
                q[:, s, a] = -0.1 + 0.9 * target[n]
        return q[:, 6].max(-1)

    high = 4.921 / 0.729
    assert swept([high]) == pytest.approx([4.65], rel=1e-9)
    ten = [high, 3.0, 1.2, -0.4, 0.1, 2.2, -2.5, 5.0, -1.7, 0.8]
    assert swept(ten) == pytest.approx([-1.0] * 10, rel=1e-9)
    assert swept([-1.0]) == pytest.approx([-1.0], rel=1e-9)


def test_rollouts_stop_at_ends_and_keep_the_last_successor(tmp_path: Path) -> None:
    found = pool_of_line(tmp_path, 4, EndingLine)
    assert found.steps["obs"].max() == 8.0 and found.next_obs(found.rows).max() == 9.0
    ended = found.steps["terminated"][found.end]
    assert ended.any() and (found.length[~ended] == 4).all() and found.length[ended].min() == 2
    assert np.array_equal(found.steps["terminated"], found.next_obs(found.rows).numpy()[:, 0] == 9.0)
    assert len(found.rows_with_successor()) == found.num_steps


def test_the_penalty_comes_off_the_reward(model: Path) -> None:
    pools = []
    for penalty in (0.0, 2.0):
        data = rolled(model, penalty=penalty)
        fit(learner(), data, 1)
        assert data.renewal is not None and data.renewal.replay is not None
        pools.append(data.renewal.replay)
    plain, less = pools
    obs, action = (torch.from_numpy(plain.steps[name]) for name in ("obs", "action"))
    unsure = data.renewal.model.uncertainty(obs, action / 2.0).numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(plain.steps["reward"] - less.steps["reward"], 2.0 * unsure, rtol=1e-4)
    assert np.array_equal(plain.steps["obs"], less.steps["obs"]) and unsure.min() > 0


def test_spread_of_critics_known_answer() -> None:
    """(1, 3) and (0, 4): deviations 1 and 2, means less smallest 1 and 2."""
    assert spread_of_critics(torch.tensor([[1.0, 0.0], [3.0, 4.0]])) == (1.5, 1.5)


# -- in training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fit(learner(), rolled(model), LAST, folder)
    return folder


def state(folder: Path) -> Any:
    """What the last checkpoint knows of the data."""
    return read_checkpoint(folder / "checkpoints" / f"step={LAST:08d}.ckpt")["DataModule"]


def test_a_ring_of_versions_under_the_policy_of_then(model: Path, whole: Path, tmp_path: Path) -> None:
    data = rolled(model)
    seen: list[Any] = []
    renew = DataModule.on_block_start

    def watch(policy: Any) -> None:
        renew(data, policy)
        assert data.renewal is not None and data.renewal.replay is not None and data.replay is not None
        seen.append(data.renewal.replay)
        assert data.replay.num_steps == 300 + seen[-1].num_steps

    data.on_block_start = watch  # type: ignore[method-assign]
    fit(learner(), data, LAST, tmp_path)
    assert [np.unique(one.episodes["rolled"]).tolist() for one in seen] == [[1], [1, 2], [2, 3]]
    assert [one.num_episodes for one in seen] == [20, 40, 40]
    assert np.array_equal(seen[1].steps["obs"][60:], seen[2].steps["obs"][:60])
    starts = np.concatenate([seen[0].steps["obs"][::3], seen[2].steps["obs"][::3]])
    assert len(np.unique(starts, axis=0)) == 60  # of 300 states, each once before any twice
    rows = run_files(whole, LAST)["metrics"]
    assert [row.get("synthetic/version") for row in rows] == [1.0, None, 2.0, None, 3.0]
    assert rows[2]["synthetic/steps"] == 120.0 and rows[2]["synthetic/edge_q_std"] > 0
    assert rows[2]["synthetic/edge_q_gap"] > 0 and rows[2]["synthetic/dynamics_error"] > 0
    assert state(whole)["version"] == 3 and state(whole)["source"] == "model-rollouts"
    assert versions(whole) == ["v2", "v3"]  # of the two checkpoints
    said = str(data.renewal.facts(LAST)) if data.renewal is not None else ""
    assert "20 roll-outs of 3 steps, 95 % of a batch's rows" in said and "as those of Pendulum-v1 do not" in said


class Kill(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= 60:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_across_renewals(model: Path, whole: Path, tmp_path: Path) -> None:
    """Killed at 60 it goes on from the checkpoint at 45, with the version of 40 from disk, over the renewal at 80."""

    def dies() -> None:
        module = learner()
        module.run.block = 1
        fit(module, rolled(model), LAST, tmp_path, callbacks=[Kill()])

    assert run_copy(dies).returncode == -signal.SIGKILL
    path = newest_checkpoint(tmp_path)
    assert path is not None and path.name == "step=00000045.ckpt"
    fit(learner(), rolled(model), LAST, tmp_path, ckpt_path=path)
    assert not differences(run_files(whole, LAST), run_files(tmp_path, LAST))
    assert state(whole) == state(tmp_path)


def both(root: Path) -> None:
    torch.set_num_threads(1)
    module = fit(learner(), rolled(root / "model"), LAST, root / "pair", precision="64-true", devices=2, strategy="ddp")
    found = {name: value.tolist() for name, value in weights(module).items()}
    (root / f"rank{module.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_are_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    first, second = run_pair(both, tmp_path)
    assert first == second
    module = fit(learner(), rolled(tmp_path / "model"), LAST, tmp_path / "one", precision="64-true")
    for name, value in weights(module).items():  # roll-outs are float32
        torch.testing.assert_close(torch.tensor(first[name], dtype=value.dtype), value, rtol=1e-6, atol=1e-6)


def test_a_deterministic_policy_says_that_nothing_is_drawn(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, module = rolled(model, steps=1), method("TD3BC")
    fit(module, data, 1)
    assert [r.message for r in caplog.records if "without noise" in r.message] == [
        "TD3BC is deterministic: roll-outs take its actions as they are, without noise."
    ]


def test_mistakes_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no world model is given; .* --model WorldModel --data NAME"):
        load_data(toy_replay(), source="model-rollouts").load()
    generator = toy_model(tmp_path / "generator")
    with pytest.raises(UsageError, match="is a run of ToyGenerator, which rolls no policy out; expected one of World"):
        rolled(generator).load()
    with pytest.raises(UsageError, match=r"the world model .* was trained on toy, but the data are others"):
        rolled(model, toy_replay(name="others")).load()
    with pytest.raises(UsageError, match="DecisionTransformer gives no action for one observation alone"):
        fit(method("DecisionTransformer"), rolled(model), 2)
    with pytest.raises(UsageError, match="a world model does not act"):
        fit(WorldModel(members=3, elites=2, **SMALL), rolled(model), 2)
    several = learner()
    several.seeds = (0, 1)
    with pytest.raises(UsageError, match=r"the data change in training \(`data.source` is 'model-rollouts'\)"):
        check_data_of_seeds(several, rolled(model))
    for name, value in (("horizon", 4), ("guidance", 2.0), ("sampling_steps", 8)):
        with pytest.raises(UsageError, match=f"`data.synthetic.{name}` is .*; expected it with 'policy-guided' or"):
            rolled(model, **{name: value})
    for name, value in (("steps", 3), ("keep", 1), ("penalty", 1.0)):
        with pytest.raises(UsageError, match=f"`data.synthetic.{name}` is .*; expected it with 'model-rollouts' alone"):
            load_data(toy_replay(), source="unguided", synthetic=SyntheticOptions("x", **{name: value}))
    for name, value in (("steps", 0), ("keep", 0), ("penalty", -1.0)):
        with pytest.raises(UsageError, match=f"`data.synthetic.{name}` is {value}; expected a value in"):
            SyntheticOptions(**{name: value})


def test_rollouts_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    class Broken(Line):
        def sample(self, *args: Any) -> Any:
            obs, reward = super().sample(*args)
            return obs, reward / 0.0

    data = rolled(world(tmp_path, line_replay(), Line), line_replay())
    data.load()
    assert data.renewal is not None
    data.renewal.model.__class__ = Broken  # type: ignore[attr-defined]
    with pytest.raises(
        DataError, match=r"20 of 20 roll-outs have numbers that are not finite .*--data.synthetic.steps"
    ):
        fit(learner(), data, 1)


def test_numbers_of_a_source() -> None:
    rollouts, diffusion = (SyntheticOptions(every=7).of_source(one) for one in ("model-rollouts", "policy-guided"))
    names = ("trajectories", "steps", "every", "keep", "share", "penalty")
    assert [getattr(rollouts, name) for name in names] == [50_000, 5, 7, 5, 0.95, 0.0]
    assert [getattr(diffusion, name) for name in names] == [2048, None, 7, None, 0.9375, None]
    assert DataModule(source="Model_Rollouts").settings()["synthetic"]["share"] == 0.95
