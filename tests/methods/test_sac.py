"""SAC against its formulas, and whole updates in each order against an obvious implementation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_modules.edac import SACN
from lightning_modules.sac import SAC
from offpolicy.data.sizes import Sizes
from offpolicy.data.views import Noise, Transitions
from offpolicy.errors import UsageError
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.training.drawing import Draw, draw_noise

SMALL: dict[str, Any] = {"hidden_dims": (8, 8)}
RLPD = {
    "num_critics": 5,
    "num_min_critics": 2,
    "layer_norm": True,
    "init": "xavier",
    "actor_q": "mean",
    "policy_freq": 3,
    "update_order": "critic_first",
    "target_entropy": -1.0,
}


def small(**options: Any) -> Any:
    return ready(SAC(**(SMALL | options)))


def constant(method: Any, *values: float) -> None:
    """Critics and targets that give these numbers everywhere, an actor of mean 0 and log σ 0."""
    for network in (method.critic, method.target_critic, method.actor):
        for p in network.parameters():
            p.data.zero_()
    for network in (method.critic, method.target_critic):
        network.net.layers[-1].bias.data[:, 0, 0] = torch.tensor(values, dtype=torch.float64)


def one_row(method: Any, *, terminated: bool, noise: float, reward: float = 1.0) -> Transitions:
    def numbers(width: int, value: float) -> Tensor:
        return torch.full((1, width), value, dtype=torch.float64)

    o, a = method.sizes.obs_dim, method.sizes.action_dim
    return Transitions(
        obs=numbers(o, 0.3),
        action=numbers(a, 0.0),
        reward=torch.tensor([reward]).double(),
        next_obs=numbers(o, 0.1),
        terminated=torch.tensor([terminated]),
        noise=Noise(policy=numbers(a, noise), target=numbers(a, noise)),
    )


def made(**options: Any) -> Any:
    return ready(SAC(**(SMALL | options)), action_dim=1)


def test_density_known_answer() -> None:
    """A = 1, μ = 0, log σ = 0. Noise 0: a = 0, log π = -½·log 2π. Noise 1: a = tanh 1 and, with
    log(1 - tanh² 1) = -0.867562, log π = -0.918939 - 0.5 + 0.867562 = -0.551377.
    """
    method = made()
    constant(method, 0.0, 0.0)
    for noise, action, logp in ((0.0, 0.0, -0.918939), (1.0, 0.761594, -0.551377)):
        batch = one_row(method, terminated=False, noise=noise)
        a, found = method.actor.sample(batch.obs, batch.noise.policy)
        assert a.item() == pytest.approx(action, abs=1e-6) and found.item() == pytest.approx(logp, abs=1e-6)
        assert -method.entropy_loss(batch)[1]["entropy"].item() == pytest.approx(logp, abs=1e-6)


def test_target_known_answer() -> None:
    """r = 1, γ = 0.99, Q̄ = (2, 3), log π(a'|s') = -0.551377, α = 0.2:
    y = 1 + 0.99·(2 + 0.2·0.551377) = 3.089173; without the entropy 2.98; terminated 1.
    """
    for options, terminated, expected in (
        ({}, False, 3.089173),
        ({"backup_entropy": False}, False, 2.98),
        ({}, True, 1.0),
    ):
        method = made(init_alpha=0.2, **options)
        constant(method, 2.0, 3.0)
        batch = one_row(method, terminated=terminated, noise=1.0)
        assert method.target_q(batch).item() == pytest.approx(expected, abs=1e-6)
        loss, metrics = method.critic_loss(batch)
        assert loss.item() == pytest.approx((2.0 - expected) ** 2 + (3.0 - expected) ** 2, abs=1e-5)
        assert metrics["q_mean"].item() == 2.5 and metrics["q_std"].item() == 0.5


def test_entropy_weight_falls_while_the_policy_is_more_random_than_asked_for() -> None:
    """log α = 0, log π = -0.551377, H̄ = -1: the derivative in log α is -(log π + H̄) = 1.551377."""
    method = made()
    constant(method, 0.0, 0.0)
    batch = one_row(method, terminated=False, noise=1.0)
    loss, _ = method.entropy_loss(batch)
    assert torch.autograd.grad(loss, method.log_alpha)[0].item() == pytest.approx(1.551377, abs=1e-6)
    method.update(batch, 1)
    assert method.log_alpha.item() == pytest.approx(-3e-4, rel=1e-4)  # Adam's first step is the learning rate


def test_actor_loss_known_answer() -> None:
    """α = 0.2, log π = -0.551377, Q = (2, 3): 0.2·(-0.551377) - 2, or with the mean of the critics - 2.5."""
    for which, q in (("min", 2.0), ("mean", 2.5)):
        method = made(init_alpha=0.2, actor_q=which)
        constant(method, 2.0, 3.0)
        loss, _ = method.actor_loss(one_row(method, terminated=False, noise=1.0))
        assert loss.item() == pytest.approx(0.2 * -0.551377 - q, abs=1e-6)


def test_value_of_a_uniform_policy_without_rewards() -> None:
    """V = α·A·log 2/(1 - γ): with γ = 0.99, α = 0.1, A = 1 V = 6.931 and Q = γ·V = 6.862, a fixed point of the target.

    tanh(atanh x) of a uniform x is uniform on [-1, 1], of density ½; only the noise that gives it matters here, so
    the density is put in by hand.
    """
    method = made(init_alpha=0.1, learn_alpha=False)
    q = 0.99 * 0.1 * math.log(2.0) / 0.01
    constant(method, q, q)
    method.actor.sample = lambda obs, noise: (noise, torch.full_like(obs[..., 0], -math.log(2.0)))
    batch = one_row(method, terminated=False, noise=0.5, reward=0.0)
    assert q == pytest.approx(6.862, abs=1e-3)
    assert method.target_q(batch).item() == pytest.approx(q, rel=1e-8)


@pytest.mark.parametrize(("loss", "network"), [("critic_loss", "critic"), ("actor_loss", "actor")])
@pytest.mark.parametrize("options", [{}, {**RLPD, "num_critics": 3}])
def test_gradients_by_finite_differences(loss: str, network: str, options: dict[str, Any]) -> None:
    method = small(**(options | {"hidden_dims": (4,)}))
    batch = made_batch(method, size=6)
    parameters = list(getattr(method, network).parameters())
    gradients = torch.autograd.grad(getattr(method, loss)(batch)[0], parameters)
    for p, g in zip(parameters, gradients, strict=True):
        for i in range(0, p.numel(), 3):
            value = p.data.view(-1)[i].item()
            around = []
            for h in (1e-6, -1e-6):
                p.data.view(-1)[i] = value + h
                around.append(getattr(method, loss)(batch)[0].item())
            p.data.view(-1)[i] = value
            assert g.reshape(-1)[i].item() == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-4, abs=1e-7)


class Reference:
    """The update written down step by step, critic by critic, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: Any) -> None:
        self.h = method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.q = nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(self.h.num_critics)])
        self.target = copy.deepcopy(self.q)
        self.log_alpha = nn.Parameter(method.log_alpha.detach()[0].clone())
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=self.h.actor_lr)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=self.h.critic_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.h.entropy_lr)

    def sample(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.pi(s).chunk(2, 1)
        law = Normal(mean, log_std.clamp(-20, 2).exp())
        u = mean + law.scale * noise
        return torch.tanh(u), (law.log_prob(u) - torch.log1p(-(torch.tanh(u) ** 2))).sum(1)

    def values(self, networks: Any, s: Tensor, a: Tensor) -> Tensor:
        return torch.stack([q(torch.cat([s, a], 1))[:, 0] for q in networks])

    def actor_and_alpha(self, batch: Any) -> tuple[Tensor, Tensor]:
        h = self.h
        action, logp = self.sample(batch.obs, batch.noise.policy)
        q = self.values(self.q, batch.obs, action)
        q = q.min(0).values if h.actor_q == "min" else q.mean(0)
        actor_loss = (self.log_alpha.exp().item() * logp - q).mean()
        target_entropy = -action.shape[1] if h.target_entropy is None else h.target_entropy
        return actor_loss, -(self.log_alpha * (logp.detach() + target_entropy)).mean()

    def critics(self, batch: Any) -> Tensor:
        h, s2 = self.h, batch.next_obs
        with torch.no_grad():
            a2, logp2 = self.sample(s2, batch.noise.target)
            networks = list(self.target)
            if h.num_min_critics:
                order = sorted(range(h.num_critics), key=lambda i: batch.noise.subset[0, i].item())
                networks = [networks[i] for i in order[: h.num_min_critics]]
            next_q = self.values(networks, s2, a2).min(0).values - self.log_alpha.exp().item() * logp2
            y = batch.reward + h.discount * (1 - batch.terminated.double()) * next_q
        return ((self.values(self.q, batch.obs, batch.action) - y) ** 2).mean(1).sum()

    def step(self, adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward(retain_graph=True, inputs=[p for group in adam.param_groups for p in group["params"]])
        adam.step()

    def update(self, batch: Any, step: int) -> None:
        moves = step % self.h.policy_freq == 0
        if self.h.update_order == "together":
            losses = self.critics(batch), *self.actor_and_alpha(batch)
            for p, grad in [
                (p, g)
                for parameters, loss in zip(
                    (list(self.q.parameters()), list(self.pi.parameters()), [self.log_alpha]), losses, strict=True
                )
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True)
            ]:
                p.grad = grad
            for adam in (self.q_adam, *((self.pi_adam, self.alpha_adam) if moves else ())):
                adam.step()
        else:
            self.step(self.q_adam, self.critics(batch))
            if moves:
                actor_loss, alpha_loss = self.actor_and_alpha(batch)
                self.step(self.pi_adam, actor_loss)
                self.step(self.alpha_adam, alpha_loss)
        for old, new in zip(self.target.parameters(), self.q.parameters(), strict=True):
            old.data.copy_(0.995 * old.data + 0.005 * new.data)


@pytest.mark.parametrize("options", [{}, {"policy_freq": 2, "num_critics": 3, "init_alpha": 0.3}, RLPD])
def test_updates_equal_an_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(critic_lr=1e-2, **options)
    plain = Reference(method)
    for step in range(1, 7):
        batch = made_batch(method, seed=step)
        method.update(batch, step)
        plain.update(batch, step)
    assert_same(method.actor.net, [plain.pi])
    assert_same(method.critic.net, plain.q)
    assert_same(method.target_critic.net, plain.target)
    assert method.log_alpha.item() == pytest.approx(plain.log_alpha.item(), rel=1e-9)
    assert method.log_alpha.item() != pytest.approx(math.log(method.hparams.init_alpha), abs=1e-5)


def test_sac_n_is_sac_with_n_critics_bit_for_bit() -> None:
    start = {"init": "edac", "log_std_min": -5.0, "log_det_eps": 1e-6, "update_order": "actor_first"}
    ours, theirs = SAC(num_critics=5, **SMALL, **start), SACN(num_critics=5, **SMALL)
    assert isinstance(theirs, SAC)
    ready(ours), ready(theirs)
    for step in (1, 2, 3):
        batch = made_batch(ours, seed=step)
        assert ours.update(batch, step) == theirs.update(batch, step)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_a_subset_of_critics_is_drawn_anew_for_each_update_without_repetition() -> None:
    """Critics that give 0 … 9 everywhere: the minimum of 2 of them without replacement is 8/3 in the mean,
    (10 + 1)/(2 + 1) - 1; with replacement it would be 2.85. Its standard error over 4,000 updates is 0.035.
    """
    updates = torch.arange(1, 4001)
    draws = {"subset": Draw((10,), "uniform", False)}
    rows = torch.arange(256, 260)  # of a second process: the same numbers as of the first
    noise = draw_noise(draws, 3, updates, rows, torch.float64)["subset"]
    assert torch.equal(noise, draw_noise(draws, 3, updates, torch.arange(4), torch.float64)["subset"])
    method = made(num_critics=10, num_min_critics=2, discount=0.5, backup_entropy=False)
    constant(method, *range(10))
    batch = one_row(method, terminated=False, noise=0.0, reward=0.0)
    found = []
    for own in noise:
        batch.noise.subset = own
        found.append(2.0 * method.target_q(batch).item())
    assert sum(found) / len(found) == pytest.approx(8 / 3, abs=0.12)


def test_some_members_equal_those_of_all() -> None:
    torch.manual_seed(0)
    critic = EnsembleCritic(3, 2, 6, (8, 8), layer_norm="before").double()
    obs, action = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    members = torch.tensor([4, 1])
    torch.testing.assert_close(critic(obs, action, members), critic(obs, action)[members], rtol=1e-12, atol=1e-12)
    seeds = torch.tensor([[0, 5], [3, 2]])
    for p in critic.parameters():
        p.data = torch.stack([p.data, 2.0 * p.data])
    every = critic(obs.expand(2, 5, 3), action.expand(2, 5, 2))
    some = critic(obs.expand(2, 5, 3), action.expand(2, 5, 2), seeds)
    expected = torch.stack([every[i, seeds[i]] for i in range(2)])
    torch.testing.assert_close(some, expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_bounds_values_far_from_the_data() -> None:
    """|Q| ≤ ‖w‖·√width + |b| of the last layer, as normalised features have a norm of at most √width."""
    method = small(**RLPD)
    batch = made_batch(method)
    q = method.critic(1e6 * batch.obs, batch.action)
    last = method.critic.net.layers[-1]
    bound = last.weight.norm(dim=(-2, -1)) * 8**0.5 + last.bias.abs().flatten()
    assert (q.abs().amax(-1) <= bound * (1 + 1e-9)).all()


def test_start_of_the_networks() -> None:
    method: Any = SAC().initialize(Sizes(17, 6), 0)
    for network, last in ((method.actor, 1e-3), (method.critic, 3e-3)):
        for layer in list(network.net.layers)[:-1]:
            assert 0.99 / 16 < layer.weight.abs().max() <= 1 / 16 and (layer.bias == 0).all()
        assert 0.9 * last < network.net.layers[-1].weight.abs().max() <= last
    method = SAC(init="xavier").initialize(Sizes(17, 6), 0)
    assert method.actor.net.layers[-1].weight.abs().max() > 0.1 and (method.critic.net.layers[-1].bias == 0).all()


def test_a_fixed_entropy_weight_stays() -> None:
    method = small(learn_alpha=False, init_alpha=0.2)
    for step in (1, 2):
        metrics = method.update(made_batch(method, seed=step), step)
    assert metrics["entropy_weight"].item() == pytest.approx(0.2) and "log_alpha" not in method.learning_rates()


@pytest.mark.parametrize("options", [{}, RLPD, {"update_order": "actor_first"}])
def test_seeds_are_one_more_axis(options: dict[str, Any]) -> None:
    assert_seeds_equal(SAC, (3, 4), **SMALL, **options)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_critics": 0},
        {"num_min_critics": 3},
        {"policy_freq": 0},
        {"init_alpha": 0.0},
        {"update_order": "togehter"},
        {"actor_q": "max"},
        {"init": "torch"},
        {"log_std_min": 3.0},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SAC(**bad)
