"""Policies against torch.distributions, and their seed axis against single policies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributions as D
from torch import nn

from offpolicy.nn.policies import DeterministicPolicy, GaussianPolicy, TanhGaussianPolicy, tanh_log_det

OBS, ACT, B = 5, 3, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def stacked(singles: list[nn.Module]) -> nn.Module:
    many = copy.deepcopy(singles[0])
    for module, *parts in zip(many.modules(), *(s.modules() for s in singles)):
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.stack([getattr(p, name) for p in parts])))
    return many


def test_deterministic_policy_is_bounded() -> None:
    policy = DeterministicPolicy(OBS, ACT, (8, 8))
    action = policy(100 * torch.randn(B, OBS))
    assert action.shape == (B, ACT) and action.abs().max() <= 1


def test_gaussian_policy_matches_torch() -> None:
    policy = GaussianPolicy(OBS, ACT, (8,)).double()
    nn.init.normal_(policy.log_std)
    obs, action = torch.randn(B, OBS, dtype=torch.float64), torch.randn(B, ACT, dtype=torch.float64)
    mean = torch.tanh(policy.net(obs))
    expected = D.Normal(mean, policy.log_std.exp().expand(B, ACT)).log_prob(action).sum(-1)
    torch.testing.assert_close(policy.log_prob(obs, action), expected)
    torch.testing.assert_close(policy.mean(obs), mean)
    noise = torch.randn(B, ACT, dtype=torch.float64)
    torch.testing.assert_close(policy.sample(obs, noise), mean + policy.log_std.exp() * noise)


def test_gaussian_log_std_is_clamped() -> None:
    policy = GaussianPolicy(OBS, ACT, (8,), log_std_min=-1.0, log_std_max=0.5)
    nn.init.constant_(policy.log_std, 3.0)
    assert (policy.clamped_log_std() == 0.5).all()


def test_unbounded_gaussian_mean() -> None:
    policy = GaussianPolicy(OBS, ACT, (8,), tanh_mean=False)
    obs = torch.randn(B, OBS)
    torch.testing.assert_close(policy.mean(obs), policy.net(obs))


@pytest.mark.parametrize("scalars", [{}, {"log_std_multiplier": 0.7, "log_std_offset": -1.0}])
def test_tanh_gaussian_matches_torch(scalars) -> None:
    policy = TanhGaussianPolicy(OBS, ACT, (8,), log_std_min=-5.0, **scalars).double()
    obs, noise = torch.randn(B, OBS, dtype=torch.float64), torch.randn(B, ACT, dtype=torch.float64)
    mean, raw = policy.net(obs).chunk(2, -1)
    log_std = (raw * scalars.get("log_std_multiplier", 1.0) + scalars.get("log_std_offset", 0.0)).clamp(-5.0, 2.0)
    law = D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform(cache_size=1))
    action, logp = policy.sample(obs, noise)
    torch.testing.assert_close(action, torch.tanh(mean + log_std.exp() * noise))
    assert torch.equal(policy.draw(obs, noise), action)
    torch.testing.assert_close(logp, law.log_prob(action).sum(-1))
    torch.testing.assert_close(policy.log_prob(obs, action), logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(policy.mode(obs), torch.tanh(mean))


def test_several_samples_per_state() -> None:
    policy = TanhGaussianPolicy(OBS, ACT, (8,))
    action, logp = policy.sample(torch.randn(B, OBS), torch.randn(10, B, ACT))
    assert action.shape == (10, B, ACT) and logp.shape == (10, B)


def test_log_prob_stays_finite_at_the_bounds_and_far_out() -> None:
    policy = TanhGaussianPolicy(OBS, ACT, (8,))
    assert policy.log_prob(torch.randn(B, OBS), torch.ones(B, ACT)).isfinite().all()
    u = torch.tensor([[50.0], [-50.0], [0.0]], requires_grad=True)
    log_det = tanh_log_det(u)
    # log(4 e^{-2|u|}) for large |u|, 0 at the origin
    torch.testing.assert_close(log_det, torch.tensor([1.3862944 - 100.0, 1.3862944 - 100.0, 0.0]))
    (slope,) = torch.autograd.grad(log_det.sum(), u)
    torch.testing.assert_close(slope[:, 0], torch.tensor([-2.0, 2.0, 0.0]))


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "tanh"])
def test_seed_axis_equals_single_policies(kind) -> None:
    make = {
        "deterministic": lambda: DeterministicPolicy(OBS, ACT, (8, 8)),
        "gaussian": lambda: GaussianPolicy(OBS, ACT, (8, 8)),
        "tanh": lambda: TanhGaussianPolicy(OBS, ACT, (8, 8), log_std_multiplier=1.0, log_std_offset=-1.0),
    }[kind]
    singles = [make().double() for _ in range(3)]
    for single in singles:
        nn.init.normal_(getattr(single, "log_std", None) if kind == "gaussian" else single.net.layers[0].bias)
    many = stacked(singles)
    obs = torch.randn(3, B, OBS, dtype=torch.float64)
    noise = torch.randn(3, B, ACT, dtype=torch.float64)
    torch.testing.assert_close(many(obs), torch.stack([s(o) for s, o in zip(singles, obs)]))
    if kind != "deterministic":
        action = torch.tanh(noise)
        expected = torch.stack([s.log_prob(o, a) for s, o, a in zip(singles, obs, action)])
        torch.testing.assert_close(many.log_prob(obs, action), expected)
    if kind == "tanh":
        expected = torch.stack([s.sample(o, n)[1] for s, o, n in zip(singles, obs, noise)])
        torch.testing.assert_close(many.sample(obs, noise)[1], expected)
