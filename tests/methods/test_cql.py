"""CQL against its formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from toy import toy_replay

from lightning_modules.cql import CQL
from offpolicy.data.extras import Extra
from offpolicy.data.returns import with_returns_to_go
from offpolicy.data.ring import Ring
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"actor_hidden_dims": (8, 8), "critic_hidden_dims": (8, 8), "num_actions": 3}


def small(**options: Any) -> CQL:
    return ready(CQL(**(SMALL | options)))  # type: ignore[return-value]


class Reference:
    """The update written down step by step, action by action, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: CQL) -> None:
        self.h = method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.offset = nn.Parameter(-torch.ones((), dtype=torch.float64))
        if hasattr(method.critic, "members"):
            self.q = nn.ModuleList([plain_mlp(member.net, 0) for member in method.critic.members])
        else:
            self.q = nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(2)])
        self.target = copy.deepcopy(self.q)
        self.log_w = nn.Parameter(method.log_entropy_weight.detach()[0].clone())
        self.log_m = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.pi_adam = torch.optim.Adam([*self.pi.parameters(), self.scale, self.offset], lr=self.h.actor_lr)
        self.q_adams = [torch.optim.Adam(q.parameters(), lr=self.h.critic_lr) for q in self.q]
        self.w_adam = torch.optim.Adam([self.log_w], lr=self.h.actor_lr)
        self.m_adam = torch.optim.Adam([self.log_m], lr=self.h.critic_lr)

    def law(self, s: Tensor) -> TransformedDistribution:
        mean, raw = self.pi(s).chunk(2, 1)
        log_std = (self.scale * raw + self.offset).clamp(-20, 2)
        return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))

    def sample(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        law = self.law(s)
        action = torch.tanh(law.base_dist.loc + law.base_dist.scale * noise)
        return action, law.log_prob(action).sum(1)

    def value(self, network: nn.Module, s: Tensor, a: Tensor) -> Tensor:
        return network(torch.cat([s, a], 1))[:, 0]

    def update(self, batch: Any, step: int) -> dict[str, float]:
        h, s, a, s2, noise = self.h, batch.obs, batch.action, batch.next_obs, batch.noise
        w = self.log_w.exp().item()
        m = min(self.log_m.exp().item(), 1e6)

        action, logp = self.sample(s, noise.policy)
        if step <= h.bc_steps:
            gain = self.law(s).log_prob(a).sum(1)
        else:
            gain = torch.min(self.value(self.q[0], s, action), self.value(self.q[1], s, action))
        actor_loss = (w * logp - gain).mean()
        target_entropy = -a.shape[1] if h.target_entropy is None else h.target_entropy
        w_loss = -(self.log_w * (logp + target_entropy).detach()).mean()

        with torch.no_grad():
            candidates = []
            draws = noise.backup.unbind(1) if h.max_backup else [noise.backup]
            for draw in draws:
                a2, logp2 = self.sample(s2, draw)
                candidates.append((torch.min(*(self.value(q, s2, a2) for q in self.target)), logp2))
            values, logps = (torch.stack(x) for x in zip(*candidates, strict=True))
            best = values.argmax(0)
            rows = torch.arange(len(s))
            next_q = values[best, rows] - (w * logps[best, rows] if h.backup_entropy else 0.0)
            y = batch.reward + h.discount * (1 - batch.terminated.double()) * next_q
        losses, gaps = [], []
        for q in self.q:
            data = self.value(q, s, a)
            entries = []
            for k in range(h.num_actions):
                with torch.no_grad():
                    drawn = [(2 * noise.uniform[:, k] - 1, torch.full_like(y, math.log(0.5 ** a.shape[1])))]
                    drawn += [self.sample(s, noise.current[:, k]), self.sample(s2, noise.next[:, k])]
                for b, log_density in drawn:
                    entries.append(self.value(q, s, b) - (log_density if h.importance_sampling else 0.0))
            if not h.importance_sampling:
                entries.append(data)
            gap = h.temperature * torch.logsumexp(torch.stack(entries, 1) / h.temperature, 1) - data
            gap = gap.clamp(
                -math.inf if h.penalty_min is None else h.penalty_min,
                math.inf if h.penalty_max is None else h.penalty_max,
            ).mean()
            penalty = h.alpha * gap if h.lagrange_gap is None else m * h.alpha * (gap - h.lagrange_gap)
            losses.append(((data - y) ** 2).mean() + penalty)
            gaps.append(gap)

        if h.auto_entropy:
            self.w_adam.zero_grad()
            w_loss.backward()
            self.w_adam.step()
        self.pi_adam.zero_grad()
        actor_loss.backward(retain_graph=True)
        self.pi_adam.step()
        if h.lagrange_gap is not None:
            penalties = [self.log_m.exp().clamp(0, 1e6) * h.alpha * (g.detach() - h.lagrange_gap) for g in gaps]
            self.m_adam.zero_grad()
            (-0.5 * sum(penalties)).backward()
            self.m_adam.step()
        for q, adam, loss in zip(self.q, self.q_adams, losses, strict=True):
            grads = torch.autograd.grad(loss, list(q.parameters()))
            for p, g in zip(q.parameters(), grads, strict=True):
                p.grad = g
            adam.step()
        for target, network in zip(self.target, self.q, strict=True):
            for old, new in zip(target.parameters(), network.parameters(), strict=True):
                old.data.copy_(0.995 * old.data + 0.005 * new.data)
        return {"actor_loss": actor_loss.item(), "critic_loss": sum(losses).item(), "penalty_gap": sum(gaps).item() / 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.0, "lagrange_gap": 0.8, "max_backup": True, "penalty_min": 2.5, "discount": 0.9},
        {"critic_hidden_dims": (8, 8, 8), "second_critic_hidden_dims": (8,), "backup_entropy": True, "bc_steps": 2},
        {
            "importance_sampling": False,
            "temperature": 0.5,
            "penalty_max": 1.4,
            "max_backup": True,
            "backup_entropy": True,
        },
        {"auto_entropy": False, "entropy_weight": 0.2, "target_entropy": 1.0, "lagrange_gap": 50.0},
    ],
)
def test_updates_equal_an_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(actor_lr=1e-3, critic_lr=1e-2, **options)
    plain = Reference(method)
    for step in range(1, 6):
        batch = made_batch(method, seed=step)
        metrics = {k: v.item() for k, v in method.update(batch, step).items()}
        expected = plain.update(batch, step)
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-8)
    assert_same(method.actor.net, [plain.pi])
    for ours, theirs in ((method.critic, plain.q), (method.target_critic, plain.target)):
        if hasattr(ours, "members"):
            for member, network in zip(ours.members, theirs, strict=True):
                assert_same(member.net, [network])
        else:
            assert_same(ours.net, theirs)
    pairs = [(method.log_entropy_weight, plain.log_w), (method.log_multiplier, plain.log_m)]
    pairs += [(method.actor.log_std_multiplier, plain.scale), (method.actor.log_std_offset, plain.offset)]
    for ours, theirs in pairs:
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)


def constant_critics(method: CQL, value: float) -> None:
    for p in method.critic.parameters():
        p.data.zero_()
    method.critic.net.layers[-1].bias.data.fill_(value)


def test_penalty_of_constant_critics() -> None:
    """Q = c: a uniform entry is c + A·log 2, an action of the policy c - log π.

    With σ = e⁻²⁰ the policy's log-densities are near 40 for A = 2, so their entries vanish beside the K uniform ones:
    Δ = log(K·e^{c + A·log 2}) - c = log K + A·log 2.
    """
    method = small()
    constant_critics(method, 7.0)
    method.actor.log_std_offset.data.fill_(-100.0)
    _, metrics = method.critic_loss(made_batch(method))
    assert metrics["penalty_gap"].item() == pytest.approx(math.log(3) + 2 * math.log(2), rel=1e-12)


def one_row(**options: Any) -> tuple[Any, Any]:
    """Q = a (A = 1, K = 1), π = tanh(0 + 1·ε), a uniform action of 0.5, the data's action 0.2, and no other noise."""
    sizes: Any = {"actor_hidden_dims": (), "critic_hidden_dims": (), "num_actions": 1}
    method: Any = ready(CQL(**sizes, **options), obs_dim=1, action_dim=1)
    for p in [*method.actor.parameters(), *method.critic.parameters()]:
        p.data.zero_()
    method.critic.net.layers[0].weight.data[:, 1] = 1.0
    batch = made_batch(method, size=1)
    for value in vars(batch.noise).values():
        value.zero_()
    batch.noise.uniform.fill_(0.75)
    batch.action.fill_(0.2)
    return method, batch


def test_penalty_of_one_row_by_hand() -> None:
    """Q = a (A = 1, K = 1), π = tanh(0 + 1·ε), ε = 0 for all draws: actions 0 with π(0) = 1/√(2π); the uniform one is
    2·0.75 - 1 = 0.5. Without densities, with the data's action 0.2:
    Δ = log(e^0.5 + e^0 + e^0 + e^0.2) - 0.2;  with them: log(e^0.5·2 + 2·√(2π)) - 0.2."""
    for importance, expected in (
        (False, math.log(math.exp(0.5) + 2 + math.exp(0.2)) - 0.2),
        (True, math.log(2 * math.exp(0.5) + 2 * math.sqrt(2 * math.pi)) - 0.2),
    ):
        method, batch = one_row(importance_sampling=importance)
        assert method.critic_loss(batch)[1]["penalty_gap"].item() == pytest.approx(expected, rel=1e-12)


def test_calibrated_penalty_of_one_row_by_hand() -> None:
    """As above without densities, and G = 0.4: only the two actions of the policy, of value 0, are bounded by it:
    Δ = log(e^0.5 + 2·e^0.4 + e^0.2) - 0.2; with G = -∞ it is CQL's."""
    method, batch = one_row(importance_sampling=False, calibrated=True)
    for bound, policy in ((0.4, 0.4), (-math.inf, 0.0)):
        given = batch._replace(extra=Extra(return_to_go=torch.tensor([bound], dtype=torch.float64)))
        expected = math.log(math.exp(0.5) + 2 * math.exp(policy) + math.exp(0.2)) - 0.2
        assert method.critic_loss(given)[1]["penalty_gap"].item() == pytest.approx(expected, rel=1e-12)


def test_returns_to_go_of_sparse_rewards() -> None:
    """10r - 5 at γ 0.99: success at the third step gives -5 + 0.99·(-5 + 0.99·5) and so on; without it, for ever -5."""
    replay = toy_replay((3, 2))
    replay.steps["reward"][:] = [0, 0, 1, 0, 0]
    method = CQL(**SMALL, calibrated=True, failure_reward=-5.0, reward_transform="10r-5", batch_size=4).prepare(replay)
    method.run_block(0, 2)
    found = with_returns_to_go(replay, 0.99, center=0.5, scale=10.0, failure_reward=-5.0).steps["return_to_go"]
    assert found.tolist() == pytest.approx([-5.0495, -0.05, 5.0, -500.0, -500.0])
    ring = Ring(replay, 12)  # also of what is collected later, beside rows that hold nothing yet
    ring.append(toy_replay((2,), seed=1))
    ring.steps["reward"][5:7] = [0, 1]
    later = with_returns_to_go(ring, 0.99, center=0.5, scale=10.0, failure_reward=-5.0).steps["return_to_go"]
    assert later[:7].tolist() == pytest.approx([*found.tolist(), -0.05, 5.0]) and not later[7:].any()
    drawn = method.draw(2, 1)[0].extra.return_to_go
    assert torch.isin(drawn, torch.from_numpy(found)).all()
    with pytest.raises(UsageError, match="failure_reward"):
        CQL(failure_reward=0.0)


def critic_gradient(method: CQL, batch: Any) -> list[Tensor]:
    return list(torch.autograd.grad(method.critic_loss(batch)[0], list(method.critic.parameters())))


def test_clipped_penalty_has_no_gradient() -> None:
    clipped, none = small(penalty_min=1e3), small(alpha=0.0)
    batch = made_batch(clipped)
    assert clipped.critic_loss(batch)[1]["penalty_gap"].item() == 1e3
    torch.testing.assert_close(critic_gradient(clipped, batch), critic_gradient(none, batch))


def test_alpha_zero_is_soft_actor_critic_without_entropy_in_the_target() -> None:
    method = small(alpha=0.0)
    batch = made_batch(method)
    with torch.no_grad():
        action, _ = method.actor.sample(batch.next_obs, batch.noise.backup)
        next_q = method.target_critic(batch.next_obs, action).amin(-2)
        y = batch.reward + 0.99 * (1 - batch.terminated.double()) * next_q
    q = method.critic(batch.obs, batch.action)
    expected = torch.autograd.grad(((q - y) ** 2).mean(1).sum(), list(method.critic.parameters()))
    torch.testing.assert_close(critic_gradient(method, batch), list(expected))


@pytest.mark.parametrize("seed", range(5))
def test_penalty_without_densities_is_not_negative(seed: int) -> None:
    method = small(importance_sampling=False)
    for p in method.critic.parameters():
        p.data.normal_()
    assert method.critic_loss(made_batch(method, seed=seed))[1]["penalty_gap"].item() >= 0


def test_lagrange_multiplier_by_hand() -> None:
    """m = e¹, α = 5, Δ = 3, gap 0.8: the loss is -e·5·2.2 = -11e, and so is its derivative in log m."""
    method = small(alpha=5.0, lagrange_gap=0.8)
    loss = method.multiplier_loss(torch.tensor(3.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(-11 * math.e, rel=1e-12)
    assert torch.autograd.grad(loss, method.log_multiplier)[0].item() == pytest.approx(-11 * math.e, rel=1e-12)
    method.log_multiplier.data.fill_(20.0)  # e²⁰ is above the limit of 10⁶, where the gradient ends
    assert method.multiplier().item() == 1e6


def test_entropy_weight_by_hand() -> None:
    """log w·(H - target) with H = 1.5 and target -2: derivative 3.5 in log w, so the first Adam step lowers w."""
    method = small()
    loss = method.entropy_loss(torch.tensor(1.5, dtype=torch.float64))
    assert torch.autograd.grad(loss, method.log_entropy_weight)[0].item() == 3.5


def test_losses_alone_equal_those_of_an_update() -> None:
    method = small(max_backup=True, lagrange_gap=1.0)
    batch = made_batch(method)
    alone = method.actor_loss(batch)[0].item(), method.critic_loss(batch)[0].item()
    metrics = method.update(batch, 1)
    assert alone == pytest.approx((metrics["actor_loss"].item(), metrics["critic_loss"].item()), rel=1e-12)


def test_start_of_the_networks() -> None:
    method: Any = CQL().initialize(Sizes(17, 6), 0)
    *hidden, last = method.critic.net.layers
    for layer in hidden:
        short = min(layer.weight.shape[-2:])
        for member in layer.weight:
            gram = member @ member.T if member.shape[0] == short else member.T @ member
            torch.testing.assert_close(gram, 2 * torch.eye(short), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.weight.square().sum((-2, -1)).sqrt(), torch.full((2,), 0.01))
    assert all((layer.bias == 0).all() for layer in method.critic.net.layers)
    head = method.actor.net.layers[-1]
    bound = 0.01 * (6 / (256 + 12)) ** 0.5
    assert 0.98 * bound < head.weight.abs().max() <= bound and (head.bias == 0).all()
    assert len(method.actor.net.layers) == 4 and len(hidden) == 3
    assert (method.actor.log_std_multiplier.item(), method.actor.log_std_offset.item()) == (1.0, -1.0)
    assert (method.log_entropy_weight.item(), method.log_multiplier.item()) == (0.0, 1.0)


def test_critics_of_unlike_depth() -> None:
    method = small(critic_hidden_dims=(8,) * 5, second_critic_hidden_dims=(8,) * 3)
    assert [len(member.net.layers) for member in method.critic.members] == [6, 4]
    batch = made_batch(method)
    assert method.critic(batch.obs, batch.action).shape == (2, 16)
    alike = small(critic_hidden_dims=(8, 8), second_critic_hidden_dims=(8, 8))
    assert alike.critic.net.layers[0].weight.shape[0] == 2


@pytest.mark.parametrize(
    "options",
    [{"lagrange_gap": 1.0, "max_backup": True, "backup_entropy": True}, {"second_critic_hidden_dims": (4,)}],
)
def test_seeds_are_one_more_axis(options: dict[str, Any]) -> None:
    assert_seeds_equal(CQL, (3, 4), **SMALL, **options)


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": -1.0},
        {"num_actions": 0},
        {"temperature": 0.0},
        {"entropy_weight": 0.0},
        {"discount": 1.0},
        {"bc_steps": -1},
        {"penalty_max": 1.0, "penalty_min": 2.0},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        CQL(**bad)
