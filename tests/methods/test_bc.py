"""Behaviour cloning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain import assert_same, made_batch, plain_mlp, ready
from toy import fit, toy_replay

from lightning_modules.bc import BC
from offpolicy.errors import DataError, UsageError


def test_loss_is_zero_on_its_own_actions() -> None:
    method = ready(BC(hidden_dims=(8, 8)))
    batch = made_batch(method)
    loss, metrics = method.actor_loss(batch._replace(action=method.actor(batch.obs).detach()))
    assert loss.item() == 0.0 and metrics["actor_loss"].item() == 0.0


def test_loss_known_answer() -> None:
    """With all weights 0 the policy says 0, and the loss is the mean of the squared actions: (1 + 4 + 0 + 9)/4."""
    method = ready(BC(hidden_dims=(8,)), action_dim=2)
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
    batch = made_batch(method, size=2)._replace(action=torch.tensor([[1.0, 2.0], [0.0, 3.0]]).double())
    assert method.actor_loss(batch)[0].item() == pytest.approx(3.5)


def test_updates_equal_the_obvious_loop() -> None:
    method = ready(BC(hidden_dims=(8, 8), actor_lr=1e-3))
    pi = plain_mlp(method.actor.net)
    adam = torch.optim.Adam(pi.parameters(), lr=1e-3)
    for step in range(1, 8):
        batch = made_batch(method, seed=step)
        loss = ((torch.tanh(pi(batch.obs)) - batch.action) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        metrics = method.update(batch, step)
        torch.testing.assert_close(metrics["actor_loss"], loss.detach(), rtol=1e-10, atol=0)
    assert_same(method.actor.net, [pi])


def test_best_tenth_of_ten_episodes_is_the_best_one() -> None:
    """The normaliser measures the kept data, and no other row is drawn."""
    replay = toy_replay([10] * 10)
    best = int(replay.returns().argmax())
    method, drawn = BC(hidden_dims=(8,), batch_size=32, top=0.1), []
    method.run.eval_episodes = 0
    update = method.update
    method.update = lambda batch, step: (drawn.append(batch.row), update(batch, step))[1]  # type: ignore[method-assign]
    fit(method, replay, 10)
    assert set(torch.cat(drawn).tolist()) == set(range(10 * best, 10 * best + 10))
    kept = replay.steps["obs"][10 * best : 10 * best + 10]
    np.testing.assert_allclose(method.normalizer.obs_center.numpy(), kept.mean(0), rtol=1e-5)


def test_data_without_rewards() -> None:
    """Cloning needs none; the best share of the episodes does."""
    results = []
    for keep in (True, False):
        replay = toy_replay()
        replay.steps = {k: v for k, v in replay.steps.items() if keep or k != "reward"}
        method = BC(hidden_dims=(8,), batch_size=16)
        method.seed, method.run.eval_episodes = 0, 0
        results.append(fit(method, replay, 20).actor.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    with pytest.raises(DataError, match="no `reward`, so episodes have no returns"):
        fit(BC(top=0.5), replay, 20)


@pytest.mark.parametrize("options", [{"top": 0.0}, {"top": 1.1}, {"top_discount": 1.1}])
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        BC(**options)


def test_learns_a_linear_policy() -> None:
    """Actions are tanh of a linear function of the state, in environment units within ±2."""
    replay = toy_replay([20] * 50)
    law = np.array([[0.5], [-0.3], [0.2]], dtype=np.float32)
    replay.steps["action"] = 2.0 * np.tanh(replay.steps["obs"] @ law)
    method = BC(hidden_dims=(32,), actor_lr=3e-3, batch_size=64)
    method.seed, method.run.eval_episodes = 0, 0
    fit(method, replay, 600)
    assert np.abs(method.act(replay.steps["obs"]) - replay.steps["action"]).mean() < 0.05
