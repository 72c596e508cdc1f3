"""Ensembles against single critics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from offpolicy.nn.critics import EnsembleCritic, ValueNetwork
from offpolicy.nn.stacked import Init

OBS, ACT, B = 5, 3, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_critics", [1, 2, 10])
def test_ensemble_equals_its_members(num_critics) -> None:
    critic = EnsembleCritic(OBS, ACT, num_critics, (8, 8)).double()
    obs, action = torch.randn(B, OBS, dtype=torch.float64), torch.randn(B, ACT, dtype=torch.float64)
    q = critic(obs, action)
    assert q.shape == (num_critics, B)
    for e in range(num_critics):
        h = torch.cat((obs, action), -1)
        for i, layer in enumerate(critic.net.layers):
            h = F.linear(h, layer.weight[e].t(), layer.bias[e][0])
            h = h.relu() if i < 2 else h
        torch.testing.assert_close(q[e], h[:, 0])
        torch.testing.assert_close(critic.member(obs, action, e), h[:, 0])


def test_seed_axis() -> None:
    singles = [EnsembleCritic(OBS, ACT, 2, (8, 8)).double() for _ in range(3)]
    many = EnsembleCritic(OBS, ACT, 2, (8, 8)).double()
    for layer, *parts in zip(many.net.layers, *(s.net.layers for s in singles)):
        layer.weight = torch.nn.Parameter(torch.stack([p.weight for p in parts]))
        layer.bias = torch.nn.Parameter(torch.stack([p.bias for p in parts]))
    obs, action = torch.randn(3, B, OBS, dtype=torch.float64), torch.randn(3, B, ACT, dtype=torch.float64)
    expected = torch.stack([s(o, a) for s, o, a in zip(singles, obs, action)])
    assert expected.shape == (3, 2, B)
    torch.testing.assert_close(many(obs, action), expected)
    torch.testing.assert_close(many.member(obs, action), expected[:, 0])


def test_several_actions_per_state() -> None:
    critic = EnsembleCritic(OBS, ACT, 2, (8,))
    obs, actions = torch.randn(B, OBS), torch.randn(10, B, ACT)
    q = critic(obs, actions)
    assert q.shape == (10, 2, B)
    torch.testing.assert_close(q[3], critic(obs, actions[3]))
    torch.testing.assert_close(critic.member(obs, actions, 1), q[:, 1])
    torch.testing.assert_close(critic(obs[None], actions), q)  # an axis of length 1 is repeated too


def test_value_network() -> None:
    value = ValueNetwork(OBS, (8, 8), final_init=Init("uniform", 1e-3))
    assert value(torch.randn(B, OBS)).shape == (B,)
    assert value(torch.randn(2, B, OBS)).shape == (2, B)
