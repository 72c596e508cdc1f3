"""Fitted Q evaluation: against exact values on a small chain, and as a method among others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_episodes import EPISODES, S2, A, R, S
from toy import differences, fit, method, toy_replay, weights

import offpolicy as op
from lightning_modules.fqe import FQE
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.evaluation.estimators import tabular_fitted_q
from offpolicy.training.asking import asked_actions, is_stochastic

GAMMA = 0.9
SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 16, "num_critics": 2}


def chain(terminated: np.ndarray = S2 == 2) -> Replay:
    """The chain as continuous data: states as one-hot vectors, actions 0 and 1 as -1 and 1."""
    states = np.eye(3, dtype=np.float32)
    length = np.array([len(episode) for episode in EPISODES])
    steps = {
        "obs": states[S],
        "next_obs": states[S2],
        "action": (2.0 * A - 1.0).astype(np.float32)[:, None],
        "reward": R.astype(np.float32),
        "terminated": terminated,
    }
    return Replay(steps, start=np.cumsum(length) - length, length=length, meta={"action_low": [-1], "action_high": [1]})


def policy_of(probability: tuple[float, float], samples: int = 1) -> Any:
    """A method that takes action 1 with these probabilities in the two states, by the sign of a shifted normal."""

    class Fixed(op.OfflineModule):
        def build(self, sizes: op.Sizes) -> None:
            self.register_parameter("p", torch.nn.Parameter(torch.tensor([*probability, 0.5])))

        def policy(self, obs: torch.Tensor) -> torch.Tensor:
            return torch.where((obs @ self.p)[:, None] >= 0.5, 1.0, -1.0)

        def sample_action(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            uniform = 0.5 * (1.0 + torch.erf(noise / 2**0.5))
            return torch.where(uniform < (obs @ self.p)[:, None], 1.0, -1.0)

    return Fixed().initialize(op.Sizes(3, 1), 0)


def fitted(policies: list[Any], replay: Replay, updates: int = 1500, **options: Any) -> FQE:
    given = {"discount": GAMMA, "hidden_dims": (64,), "layer_norm": False, "critic_lr": 2e-3, "tau": 0.05}
    given |= {"num_critics": 3, "batch_size": 64}
    made = FQE.of(policies, normalize_obs=False, **given | options).prepare(replay)
    made.run_block(0, updates)
    return made


def exact(policy: np.ndarray, terminated: np.ndarray = S2 == 2) -> np.ndarray:
    return tabular_fitted_q(S, A, R, np.minimum(S2, 1), terminated, policy, GAMMA)


@pytest.mark.slow
def test_values_of_several_policies_are_exact_ones() -> None:
    """Cut rows bootstrap, terminated ones do not; each policy by its own actions at s'."""
    tables = {(1.0, 1.0): [[0, 1], [0, 1]], (0.0, 1.0): [[1, 0], [0, 1]]}
    found = fitted([policy_of(p) for p in tables], chain())
    obs, action = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]], np.array([[-1.0], [1.0], [-1.0], [1.0]])
    values = found.values(obs, action)
    assert values.shape == (2, 3, 4)
    for k, table in enumerate(tables.values()):
        q = exact(np.array(table, float))
        np.testing.assert_allclose(values[k].mean(0).numpy(), q.ravel(), atol=0.4)
        starts = [episode[0][0] for episode in EPISODES]
        value = (np.array(table) * q).sum(1)[starts].mean()
        assert float(found.start_values()[k].mean()) == pytest.approx(value, abs=0.15)
    assert abs(float(found.start_values()[0].mean() - found.start_values()[1].mean())) > 0.2


@pytest.mark.slow
def test_samples_of_a_stochastic_policy_and_what_ends_an_episode() -> None:
    """The known answer 0.963 of π(1|s) = 0.8, 0.6; with every cut taken for an end it is another one."""
    policy = np.array([[0.2, 0.8], [0.4, 0.6]])
    found = fitted([policy_of((0.8, 0.6))], chain(), policy="sample", samples=200)
    assert float(found.start_values().mean()) == pytest.approx(0.963114754098, abs=0.1)
    ends = np.zeros(len(S), bool)
    ends[chain().end] = True
    other = fitted([policy_of((0.8, 0.6))], chain(ends), policy="sample", samples=200)
    q = exact(policy, ends)
    starts = [episode[0][0] for episode in EPISODES]
    assert float(other.start_values().mean()) == pytest.approx((policy * q).sum(1)[starts].mean(), abs=0.1)
    assert abs(float(other.start_values().mean()) - 0.963) > 0.1


def test_without_a_run_it_is_the_policy_of_the_data() -> None:
    """Targets take the next actions of the data: one update's target by hand."""
    replay = toy_replay()
    module = FQE(**SMALL, clip=False).prepare(replay)
    (batch,) = module.draw(0, 1)
    target = module.scaled_target(batch)
    next_q = module.scaled_q(module.target_critic, batch.next_obs, batch.next_action[None])
    unit = float(np.abs(replay.steps["reward"]).max())
    by_hand = batch.reward * 0.01 / unit + 0.99 * torch.where(batch.terminated, 0.0, next_q)
    torch.testing.assert_close(target, by_hand)


def test_targets_stay_inside_what_rewards_make_possible() -> None:
    replay = toy_replay()
    module = FQE(**SMALL).prepare(replay)
    with torch.no_grad():
        for p in module.target_critic.parameters():
            p.mul_(100.0)
    (batch,) = module.draw(0, 1)
    reward = replay.steps["reward"] / np.abs(replay.steps["reward"]).max()
    target = module.scaled_target(batch)
    assert float(target.min()) >= min(reward.min(), 0) - 1e-6 and float(target.max()) <= max(reward.max(), 0) + 1e-6
    assert float(FQE(**SMALL, clip=False).prepare(replay).reward_low) == pytest.approx(replay.steps["reward"].min())


def trained(name: str = "TD3BC") -> Any:
    made = method(name).prepare(toy_replay())
    made.run_block(0, 3)
    return made


def test_a_run_is_evaluated_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "policy.ckpt"
    trained().save(path)
    replay = toy_replay((6,) * 60)

    def evaluation(**options: Any) -> FQE:
        made = FQE(runs=(str(path),), **SMALL, **options)
        made.seed, made.run.log_every, made.run.eval_every = 0, 20, 20
        return made

    whole = fit(evaluation(), replay, 40, folder=tmp_path / "whole")
    fit(evaluation(), replay, 20, folder=tmp_path / "part")
    middle = tmp_path / "part" / "checkpoints" / "step=00000020.ckpt"
    assert not differences(weights(whole), weights(fit(evaluation(), replay, 40, ckpt_path=middle)))
    assert {"eval/value", "eval/value_spread", "eval/loss"} <= set(whole.eval_row)
    assert whole.eval_row["eval/value"] == pytest.approx(float(whole.start_values().mean()))
    assert 0 < whole._starts.held_out.sum() == 6  # a tenth of the episodes
    trained("BC").save(path)
    with pytest.raises(UsageError, match="evaluates other policies"):
        fit(evaluation(), replay, 40, ckpt_path=middle)
    opened: Any = op.load(tmp_path / "whole")
    assert torch.equal(
        opened.values(replay.steps["obs"][:3], replay.steps["action"][:3]).isfinite().all(), torch.tensor(True)
    )


def test_seeds_and_drawn_episodes() -> None:
    replay = toy_replay((6,) * 20)
    policy = trained()
    joint = FQE.of([policy, policy], **SMALL)
    joint.seeds = (0, 3)
    joint.prepare(replay).run_block(0, 6)
    single = FQE.of([policy, policy], **SMALL).prepare(replay, 3)
    single.run_block(0, 6)
    assert joint.start_values().shape == (2, 2, 2)
    torch.testing.assert_close(joint.start_values()[1], single.start_values(), rtol=1e-4, atol=1e-4)
    assert {"value_0", "value_1", "value_0_seed_std", "value_1_seed3"} <= set(joint.held_out())

    drawn = FQE.of([policy], **SMALL, resample=True)
    drawn.seeds = (0, 3)
    drawn.prepare(replay).run_block(0, 6)
    times = drawn._starts.times  # type: ignore[union-attr]
    assert times.shape == (20, 2) and (times.sum(0) == 20).all() and not np.array_equal(times[:, 0], times[:, 1])
    each = drawn.values(replay.steps["obs"][replay.start], asked_actions([policy], replay.steps["obs"][replay.start]))
    by_hand = (each[1, 0].numpy() * times[:, 1]).sum(-1) / 20
    np.testing.assert_allclose(drawn.start_values()[1, 0].numpy(), by_hand, rtol=1e-5)
    with pytest.raises(UsageError, match="expected `seeds`"):
        FQE.of([policy], **SMALL, resample=True).prepare(replay)


def test_which_policies_are_asked() -> None:
    obs = np.asarray(toy_replay().steps["obs"][:5])
    for name, stochastic in (("TD3BC", False), ("BC", False), ("IQL", True), ("IQL-dropout", False), ("CQL", True)):
        assert is_stochastic(trained(name)) == stochastic, name
    for name in ("AWAC", "ODICE", "EDAC"):
        made = trained(name)
        first, again = (asked_actions([made], obs, "sample", 4) for _ in range(2))
        assert first.shape == (5, 1, 4, 1) and np.array_equal(first, again) and np.ptp(first) > 0
        assert np.abs(first).max() <= 2.0
    made = trained("IQL")
    np.testing.assert_allclose(asked_actions([made], obs)[:, 0, 0], made.act(obs))


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        (lambda: trained("HIQL"), {}, "HIQL acts by more than the observation"),
        (lambda: trained("DecisionTransformer"), {}, "DecisionTransformer acts by more"),
        (lambda: trained(), {"policy": "sample"}, "TD3BC is deterministic, so there is nothing to draw"),
        (lambda: method("TD3BC").prepare(toy_replay(obs_dim=4)), {}, r"widths \(4, 1\), the data have \(3, 1\)"),
        (lambda: method("TD3BC"), {}, "no networks yet"),
        (lambda: torch.nn.Linear(3, 1), {}, "Linear is no policy of states and actions"),
    ],
)
def test_policies_that_cannot_be_evaluated(policy: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FQE.of([policy()], **SMALL, **options).prepare(toy_replay())
