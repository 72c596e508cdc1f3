"""EDAC and SAC-N against their formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_modules.edac import EDAC, SACN, diversity_loss
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "num_critics": 4}


def small(**options: Any) -> EDAC:
    return ready(EDAC(**(SMALL | options)))  # type: ignore[return-value]


class Reference:
    """The update written down step by step, critic by critic, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: EDAC) -> None:
        self.h = method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.q = nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(self.h.num_critics)])
        self.target = copy.deepcopy(self.q)
        self.log_alpha = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=self.h.actor_lr)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=self.h.critic_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.h.entropy_lr)

    def sample(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.pi(s).chunk(2, 1)
        law = Normal(mean, log_std.clamp(-5, 2).exp())
        u = mean + law.scale * noise
        a = torch.tanh(u)
        return a, (law.log_prob(u) - torch.log(1 - a**2 + 1e-6)).sum(1)

    def smallest(self, networks: nn.ModuleList, s: Tensor, a: Tensor) -> Tensor:
        return torch.stack([q(torch.cat([s, a], 1))[:, 0] for q in networks]).min(0).values

    def diversity(self, s: Tensor, a: Tensor) -> Tensor:
        gradients = []
        for q in self.q:
            b = a.clone().requires_grad_()
            g = torch.autograd.grad(q(torch.cat([s, b], 1)).sum(), b, create_graph=True)[0]
            gradients.append(g / (g.norm(dim=1, keepdim=True) + 1e-10))
        n = len(gradients)
        pairs = [(gradients[i] * gradients[j]).sum(1) for i in range(n) for j in range(n) if i != j]
        return sum(pairs).mean() / (n - 1)

    def update(self, batch: Any) -> dict[str, float]:
        h, s, a, s2 = self.h, batch.obs, batch.action, batch.next_obs
        with torch.no_grad():
            _, logp = self.sample(s, batch.noise.alpha)
        target_entropy = -a.shape[1] if h.target_entropy is None else h.target_entropy
        self.alpha_adam.zero_grad()
        (-self.log_alpha * (logp + target_entropy)).mean().backward()
        self.alpha_adam.step()
        alpha = self.log_alpha.exp().item()

        action, logp = self.sample(s, batch.noise.policy)
        actor_loss = (alpha * logp - self.smallest(self.q, s, action)).mean()
        self.pi_adam.zero_grad()
        actor_loss.backward()
        self.pi_adam.step()

        with torch.no_grad():
            a2, logp2 = self.sample(s2, batch.noise.target)
            next_q = self.smallest(self.target, s2, a2) - alpha * logp2
            y = batch.reward + h.discount * (1 - batch.terminated.double()) * next_q
        loss = sum(((q(torch.cat([s, a], 1))[:, 0] - y) ** 2).mean() for q in self.q)
        if h.eta:
            loss = loss + h.eta * self.diversity(s, a)
        self.q_adam.zero_grad()
        loss.backward()
        self.q_adam.step()
        for old, new in zip(self.target.parameters(), self.q.parameters(), strict=True):
            old.data.copy_(0.995 * old.data + 0.005 * new.data)
        return {"actor_loss": actor_loss.item(), "critic_loss": loss.item(), "entropy_weight": alpha}


@pytest.mark.parametrize("options", [{}, {"eta": 5.0, "num_critics": 2}, {"eta": 0.0}, {"target_entropy": 0.5}])
def test_updates_equal_an_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(critic_lr=1e-2, **options)
    plain = Reference(method)
    for step in range(1, 6):
        batch = made_batch(method, seed=step)
        metrics = {k: v.item() for k, v in method.update(batch, step).items()}
        expected = plain.update(batch)
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-8)
    assert_same(method.actor.net, [plain.pi])
    assert_same(method.critic.net, plain.q)
    assert_same(method.target_critic.net, plain.target)
    assert method.log_alpha.item() == pytest.approx(plain.log_alpha.item(), rel=1e-9)


@pytest.mark.parametrize("count", [2, 10, 50])
def test_diversity_of_known_gradients(count: int) -> None:
    """Parallel gradients: all N·(N-1) pairs are 1, so N. Orthogonal ones: 0. Two opposite ones: -2."""
    one = torch.randn(count, 7, 60, dtype=torch.float64)
    assert diversity_loss(one[:1] * torch.arange(1, count + 1)[:, None, None]).item() == pytest.approx(count)
    axes = torch.eye(60, dtype=torch.float64)[:count, None].expand(count, 7, 60)
    assert diversity_loss(axes * one[..., :1].abs()).item() == pytest.approx(0.0, abs=1e-12)
    assert diversity_loss(torch.stack([one[0], -3 * one[0]])).item() == pytest.approx(-2.0)


def test_diversity_equals_the_table_of_pairs_and_its_gradient() -> None:
    g = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True)  # two seeds' worth of axes in front
    unit = g / g.norm(dim=-1, keepdim=True)
    table = torch.einsum("sibk,sjbk->sbij", unit, unit) * (1 - torch.eye(5))
    torch.testing.assert_close(diversity_loss(g), table.sum((-2, -1)).mean(-1) / 4)
    assert torch.autograd.gradcheck(diversity_loss, g)


def test_a_dead_critic_gives_no_nan() -> None:
    """A critic whose units are all off has gradient 0: its terms are 0 and so are its derivatives."""
    method = small()
    method.critic.net.layers[0].bias.data[0] = -1e3
    loss, _ = method.critic_loss(made_batch(method))
    grads = torch.autograd.grad(loss, list(method.critic.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_ensemble_equals_separate_networks() -> None:
    method, batch = small(num_critics=6), made_batch(small())
    q, gradient = method.q_and_gradient(batch.obs, batch.action)
    torch.testing.assert_close(q, method.critic(batch.obs, batch.action))
    for i in range(6):
        network, a = plain_mlp(method.critic.net, i), batch.action.clone().requires_grad_()
        expected = network(torch.cat([batch.obs, a], 1))[:, 0]
        torch.testing.assert_close(q[i], expected)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(expected.sum(), a)[0])


def test_sac_n_is_edac_without_diversity() -> None:
    method = SACN(num_critics=5, hidden_dims=(8, 8))
    twin = EDAC(num_critics=5, hidden_dims=(8, 8), eta=0.0)
    assert method.hparams == twin.hparams
    ready(method), ready(twin)
    for step in (1, 2):
        batch = made_batch(twin, seed=step)
        assert method.update(batch, step) == twin.update(batch, step)


@pytest.mark.slow
def test_compiled_loss_keeps_the_gradient_of_the_diversity() -> None:
    """The second derivative must not be taken through a compiled graph, which has none."""
    method = small()
    batch, params = made_batch(method), list(method.critic.parameters())
    expected = torch.autograd.grad(method.critic_loss(batch)[0], params)
    compiled = torch.compile(method.critic_loss, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(batch)[0], params), expected)


def test_many_critics() -> None:
    """500 critics of SAC-N, and 50 of EDAC, in one call each."""
    for method in (SACN(num_critics=500, hidden_dims=(8, 8)), EDAC(num_critics=50, hidden_dims=(8, 8))):
        batch = made_batch(ready(method))
        metrics = method.update(batch, 1)
        assert metrics["critic_loss"].isfinite()


def test_start_of_the_networks() -> None:
    method: Any = EDAC().initialize(Sizes(17, 6), 0)
    for layer, bound in zip(method.critic.net.layers[:-1], (1 / 16, 1 / 16, 1 / 16), strict=True):
        assert 0.99 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0.1).all()
    for layer, fan_in in zip(method.actor.net.layers[:-1], (17, 256, 256), strict=True):
        assert 0.99 * fan_in**-0.5 < layer.weight.abs().max() <= fan_in**-0.5 and (layer.bias == 0.1).all()
    for network, bound in ((method.actor, 1e-3), (method.critic, 3e-3)):
        last = network.net.layers[-1]
        assert 0.9 * bound < last.weight.abs().max() <= bound and last.bias.abs().max() <= bound
    for ours, target in zip(method.critic.parameters(), method.target_critic.parameters(), strict=True):
        assert torch.equal(ours, target)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_seeds_are_one_more_axis(eta: float) -> None:
    assert_seeds_equal(EDAC, (3, 4), **SMALL, eta=eta)


@pytest.mark.parametrize("bad", [{"eta": -1.0}, {"num_critics": 0}, {"num_critics": 1}, {"discount": 1.0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        EDAC(**bad)
