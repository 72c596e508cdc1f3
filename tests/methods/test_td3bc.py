"""TD3+BC against its formulas and against an obvious loop.

Every loss is evaluated from outside in the same four lines, which is how to compare a method with a paper's own code::

    method = TD3BC(...)
    method.initialize(Sizes(obs_dim, action_dim))    # networks, without data or Trainer
    method.load_state_dict(weights)                  # any weights
    loss, metrics = method.critic_loss(Transitions(obs, action, reward, next_obs, terminated, noise=Noise(target=...)))
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn
from toy import toy_replay

import offpolicy as op
from lightning_modules.bc import BC
from lightning_modules.td3bc import TD3BC
from offpolicy.data.sizes import Sizes
from offpolicy.data.views import Noise, Transitions
from offpolicy.errors import UsageError
from offpolicy.training.graph import declares_phase

SMALL: dict[str, Any] = {"hidden_dims": (8, 8)}


def small(**options: Any) -> Any:
    return ready(TD3BC(**(SMALL | options)))


def linear_method(**options: Any) -> Any:
    """One state, one action, no hidden layer: π = tanh(w·s + b), Qᵢ = uᵢ·s + vᵢ·a + cᵢ; all targets as given."""
    method = TD3BC(**({"hidden_dims": (), "discount": 0.5} | options))
    method.initialize(Sizes(1, 1), seed=0)
    method.double()
    weights = method.state_dict()
    for net in ("actor", "target_actor"):
        weights[f"{net}.net.layers.0.weight"] = torch.tensor([[1.0]])
        weights[f"{net}.net.layers.0.bias"] = torch.tensor([[0.0]])
    for net in ("critic", "target_critic"):
        weights[f"{net}.net.layers.0.weight"] = torch.tensor([[[1.0], [2.0]], [[0.0], [1.0]]])
        weights[f"{net}.net.layers.0.bias"] = torch.tensor([[[1.0]], [[3.0]]])
    method.load_state_dict(weights)
    return method


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def by_hand(noise: Tensor) -> Transitions:
    return Transitions(
        obs=column(1.0, 2.0),
        action=column(0.5, -0.5),
        reward=torch.tensor([1.0, 3.0]).double(),
        next_obs=column(0.0, 1.0),
        terminated=torch.tensor([False, True]),
        noise=Noise(target=noise),
    )


def test_critic_loss_known_answer() -> None:
    """Row 1: π̄(0) = 0, noise clip(0.2·5, ±0.5) = 0.5, so a' = 0.5; Q̄₁ = 0 + 2·0.5 + 1 = 2 and Q̄₂ = 0.5 + 3 = 3.5;
    y = 1 + 0.5·2 = 2. Row 2 is terminated: y = 3.

    Q₁ = (1 + 1 + 1, 2 − 1 + 1) = (3, 2), Q₂ = (0.5 + 3, −0.5 + 3) = (3.5, 2.5).
    Errors (1, −1) and (1.5, −0.5): (1 + 1)/2 + (2.25 + 0.25)/2 = 2.25, and mean Q = 2.75.
    """
    loss, metrics = linear_method().critic_loss(by_hand(column(5.0, 0.0)))
    assert loss.item() == pytest.approx(2.25, rel=1e-12)
    assert metrics["q_mean"].item() == pytest.approx(2.75) and not metrics["critic_loss"].requires_grad


def test_target_action_stays_inside_the_bounds() -> None:
    """At s' = 100, π̄ is 1 and a' = clip(1 + 0.5) = 1: Q̄₁ = 100 + 2 + 1, Q̄₂ = 1 + 3 = 4, y = 1 + 0.5·4 = 3.

    Q = (3, 3.5) for the first row, and the terminated row as in the known answer: (0 + 1)/2 + (0.25 + 0.25)/2.
    """
    batch = by_hand(column(5.0, 0.0))._replace(next_obs=column(100.0, 1.0))
    assert linear_method().critic_loss(batch)[0].item() == pytest.approx(0.75, rel=1e-12)


def test_noise_never_exceeds_the_clip() -> None:
    method = linear_method()
    losses = [method.critic_loss(by_hand(column(n, 0.0)))[0].item() for n in (2.5, 3.0, 1e6)]
    assert losses[0] == losses[1] == losses[2] != method.critic_loss(by_hand(column(2.0, 0.0)))[0].item()


def test_actor_loss_known_answer() -> None:
    """π = (tanh 1, tanh 2) = (p, r), Q₁ = (1 + 2p + 1, 2 + 2r + 1), both positive, so λ·mean Q₁ = α = 2.5."""
    p, r = torch.tanh(column(1.0, 2.0)).flatten().tolist()
    loss, metrics = linear_method().actor_loss(by_hand(column(0.0, 0.0)))
    bc = ((p - 0.5) ** 2 + (r + 0.5) ** 2) / 2
    assert loss.item() == pytest.approx(bc - 2.5, rel=1e-12) and metrics["bc_loss"].item() == pytest.approx(bc)


def test_q_term_is_minus_alpha_when_q_is_positive_and_alpha_when_negative() -> None:
    method = small(alpha=1.7)
    batch = made_batch(method)
    for bias, expected in ((1e3, -1.7), (-1e3, 1.7)):
        method.critic.net.layers[-1].bias.data.fill_(bias)
        loss, metrics = method.actor_loss(batch)
        assert (loss - metrics["bc_loss"]).item() == pytest.approx(expected, rel=1e-9)


def test_alpha_goes_to_its_end_by_the_same_factor_and_counts_from_where_it_was_asked_to(tmp_path: Path) -> None:
    """From 2 to 8 in two updates: 2, 4, 8, and 8 from then on; a run with a constant α begins at its first α."""
    rising: dict[str, Any] = {"alpha": 2.0, "final_alpha": 8.0, "alpha_steps": 2, "batch_size": 16}
    method: Any = TD3BC(policy_freq=1, **SMALL, **rising).prepare(toy_replay())
    seen = []
    for t in range(4):
        seen.append(float(method.alpha(torch.zeros((), dtype=torch.float64))))
        method.run_block(t, 1)
    assert seen == [2.0, 4.0, 8.0, 8.0] and declares_phase(TD3BC)

    given: dict[str, Any] = {"verbose": False, "eval_episodes": 0, "folder": tmp_path}
    op.fit(TD3BC(batch_size=16, **SMALL), toy_replay(), max_steps=10, **given)
    for updates in (14, 16):
        given["ckpt_path"] = tmp_path
        found: Any = op.fit(TD3BC(**SMALL, **rising), toy_replay(), max_steps=updates, **given).method
        assert int(found.alpha_updates) == updates - 10
    assert not hasattr(
        op.fit(TD3BC(batch_size=16, **SMALL), toy_replay(), max_steps=18, **given).method, "alpha_updates"
    )


def test_alpha_zero_equals_cloning() -> None:
    method, bc = small(alpha=0.0), ready(BC(hidden_dims=(8, 8)))
    bc.actor.load_state_dict(method.actor.state_dict())
    batch = made_batch(method)
    ours, theirs = (torch.autograd.grad(m.actor_loss(batch)[0], list(m.actor.parameters())) for m in (method, bc))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("loss", "network"), [("critic_loss", "critic"), ("actor_loss", "actor")])
def test_gradients_by_finite_differences(loss: str, network: str) -> None:
    """Of the loss as it is differentiated: the target and λ are constants."""
    method = small(hidden_dims=(4,))
    batch = made_batch(method, size=6)
    parameters = list(getattr(method, network).parameters())
    lambda_ = method.batch_mean(method.critic.member(batch.obs, method.actor(batch.obs)).abs())
    method.batch_mean = lambda _: lambda_
    gradients = torch.autograd.grad(getattr(method, loss)(batch)[0], parameters)
    for p, g in zip(parameters, gradients, strict=True):
        for i in range(0, p.numel(), 3):
            value = p.data.view(-1)[i].item()
            around = []
            for h in (1e-6, -1e-6):
                p.data.view(-1)[i] = value + h
                around.append(getattr(method, loss)(batch)[0].item())
            p.data.view(-1)[i] = value
            assert g.reshape(-1)[i].item() == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_odd_steps_leave_actor_and_targets_alone() -> None:
    method = small()
    before = copy.deepcopy(method.state_dict())
    assert "actor_loss" not in method.update(made_batch(method), 1)
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"critic"}
    assert "actor_loss" in method.update(made_batch(method), 2)
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"critic", "actor", "target_critic", "target_actor"}


class Reference:
    """The algorithm as the paper writes it: two critics apart, `backward`, `torch.optim.Adam`."""

    def __init__(self, method: TD3BC) -> None:
        self.h = method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.q1, self.q2 = (plain_mlp(method.critic.net, i) for i in range(2))
        self.target_pi, self.target_q1, self.target_q2 = map(copy.deepcopy, (self.pi, self.q1, self.q2))
        critics = [*self.q1.parameters(), *self.q2.parameters()]
        self.critic_adam = torch.optim.Adam(critics, lr=self.h.critic_lr)
        self.actor_adam = torch.optim.Adam(self.pi.parameters(), lr=self.h.actor_lr)

    def update(self, batch: Transitions, step: int) -> dict[str, float]:
        s, a, r, s2, d = batch.obs, batch.action, batch.reward, batch.next_obs, batch.terminated.double()
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            epsilon = (self.h.policy_noise * batch.noise.target).clamp(-self.h.noise_clip, self.h.noise_clip)
            a2 = (torch.tanh(self.target_pi(s2)) + epsilon).clamp(-1, 1)
            sa2 = torch.cat([s2, a2], 1)
            y = r + self.h.discount * (1 - d) * torch.min(self.target_q1(sa2)[:, 0], self.target_q2(sa2)[:, 0])
        critic_loss = ((self.q1(sa)[:, 0] - y) ** 2).mean() + ((self.q2(sa)[:, 0] - y) ** 2).mean()
        self.descend(self.critic_adam, critic_loss)
        losses = {"critic_loss": critic_loss.item()}
        if step % 2 == 0:
            p = torch.tanh(self.pi(s))
            q = self.q1(torch.cat([s, p], 1))[:, 0]
            actor_loss = -self.h.alpha / q.abs().mean().detach() * q.mean() + ((p - a) ** 2).mean()
            self.descend(self.actor_adam, actor_loss)
            losses["actor_loss"] = actor_loss.item()
            for target, net in ((self.target_q1, self.q1), (self.target_q2, self.q2), (self.target_pi, self.pi)):
                self.follow(target, net)
        return losses

    def descend(self, adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    def follow(self, target: nn.Module, net: nn.Module) -> None:
        for old, new in zip(target.parameters(), net.parameters(), strict=True):
            old.data.copy_(self.h.tau * new.data + (1 - self.h.tau) * old.data)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.4, "discount": 0.9, "tau": 0.1, "policy_noise": 0.5}])
def test_updates_equal_the_obvious_loop(options: dict[str, Any]) -> None:
    method = small(**options)
    reference = Reference(method)
    for step in range(1, 11):
        batch = made_batch(method, seed=step)
        expected, metrics = reference.update(batch, step), method.update(batch, step)
        assert expected.keys() <= metrics.keys()
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-9)
    assert_same(method.actor.net, [reference.pi])
    assert_same(method.critic.net, [reference.q1, reference.q2])
    assert_same(method.target_actor.net, [reference.target_pi])
    assert_same(method.target_critic.net, [reference.target_q1, reference.target_q2])


@pytest.mark.parametrize("clip", [None, 0.1])
def test_seeds_side_by_side_equal_seeds_alone(clip: float | None) -> None:
    assert_seeds_equal(TD3BC, (0, 5, 9), **SMALL, max_grad_norm=clip)


def test_one_and_three_critics() -> None:
    """The target takes the minimum over all critics, whatever their number."""
    for number in (1, 3):
        method = small(num_critics=number)
        batch = made_batch(method)

        def each(net: Any, s: Tensor, a: Tensor, count: int = number) -> Tensor:
            return torch.stack([plain_mlp(net, i)(torch.cat([s, a], 1))[:, 0] for i in range(count)])

        with torch.no_grad():
            noise = (0.2 * batch.noise.target).clamp(-0.5, 0.5)
            a2 = (method.target_actor(batch.next_obs) + noise).clamp(-1, 1)
            next_q = each(method.target_critic.net, batch.next_obs, a2).min(0).values
            y = batch.reward + 0.99 * torch.where(batch.terminated, 0.0, next_q)
            q = each(method.critic.net, batch.obs, batch.action)
        assert method.critic_loss(batch)[0].item() == pytest.approx(((q - y) ** 2).mean(1).sum().item(), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -1.0},
        {"alpha": 0.0, "final_alpha": 1.0},
        {"final_alpha": 0.0},
        {"alpha_steps": 0, "final_alpha": 1.0},
        {"alpha_steps": 5},
        {"discount": 1.0},
        {"tau": 1.5},
        {"policy_noise": -0.1},
        {"noise_clip": -0.1},
        {"policy_freq": 0},
        {"num_critics": 0},
    ],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        TD3BC(**options)
