"""PRDC against its formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Rows, differences, fit, toy_replay, weights

from lightning_modules.prdc import PRDC
from lightning_modules.td3bc import TD3BC
from offpolicy.data import neighbors
from offpolicy.data.sizes import Sizes
from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 8)}


def pairs(n: int = 60, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Normalised states and scaled actions of a made data set, float64."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return normal[:, :3], normal[:, 3:].tanh()


def small(**options: Any) -> PRDC:
    """In float64, with an index over `pairs`."""
    method: Any = ready(PRDC(**(SMALL | options)))
    method.index_rows(*pairs())
    return method


def batch_of(method: PRDC, seed: int, size: int = 16) -> Transitions:
    """Rows of `pairs` with made rewards and successors."""
    obs, action = pairs()
    row = torch.randint(0, len(obs), (size,), generator=torch.Generator().manual_seed(seed))
    return made_batch(method, size, seed)._replace(obs=obs[row], action=action[row], row=row)


def nearest_by_enumeration(method: PRDC, state: Tensor, action: Tensor) -> Tensor:
    """The k stored actions nearest to each (state, action), (B, k, A)."""
    h, (obs, stored) = method.hparams, pairs()
    square = h.state_weight**2 * ((state[:, None] - obs) ** 2).sum(2) + ((action[:, None] - stored) ** 2).sum(2)
    return stored[square.argsort(dim=1, stable=True)[:, : h.num_neighbors]]


class Reference:
    """The update written down step by step, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: PRDC) -> None:
        self.method, self.h = method, method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.q = torch.nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(2)])
        self.pi_target, self.q_target = copy.deepcopy(self.pi), copy.deepcopy(self.q)
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=self.h.actor_lr)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=self.h.critic_lr)

    def update(self, batch: Any, t: int) -> dict[str, float]:
        h, s, a, s2 = self.h, batch.obs, batch.action, batch.next_obs
        with torch.no_grad():
            noise = torch.clamp(0.2 * batch.noise.target, -0.5, 0.5)
            pair = torch.cat([s2, torch.clamp(torch.tanh(self.pi_target(s2)) + noise, -1, 1)], 1)
            next_q = torch.min(self.q_target[0](pair), self.q_target[1](pair))[:, 0]
            y = batch.reward + 0.99 * (1 - batch.terminated.double()) * next_q
        loss = sum(((q(torch.cat([s, a], 1))[:, 0] - y) ** 2).mean() for q in self.q)
        self.q_adam.zero_grad()
        loss.backward()
        self.q_adam.step()
        result = {"critic_loss": loss.item()}
        if t % 2 == 0:
            p = torch.tanh(self.pi(s))
            q = self.q[0](torch.cat([s, p], 1))
            near = nearest_by_enumeration(self.method, s, p.detach())
            dc = sum(((p - near[:, j]) ** 2).mean() for j in range(h.num_neighbors)) / h.num_neighbors
            loss = dc - h.alpha / q.abs().mean().detach() * q.mean()
            self.pi_adam.zero_grad()
            loss.backward()
            self.pi_adam.step()
            for target, source in ((self.q_target, self.q), (self.pi_target, self.pi)):
                for old, new in zip(target.parameters(), source.parameters(), strict=True):
                    old.data.copy_(0.995 * old.data + 0.005 * new.data)
            result |= {"actor_loss": loss.item(), "dc_loss": float(dc)}
        return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_weight": 0.25, "alpha": 40.0, "candidates": 2},
        {"num_neighbors": 3, "state_weight": 1.0, "search": "brute"},
        {"search": "tree", "state_weight": 7.5},
    ],
)
def test_updates_equal_an_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(**options)
    plain = Reference(method)
    for step in range(1, 8):
        batch = batch_of(method, step)
        metrics = {k: v.item() for k, v in method.update(batch, step).items()}
        expected = plain.update(batch, step)
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-9)
        assert ("actor_loss" in metrics) == ("actor_loss" in expected) == (step % 2 == 0)
    assert_same(method.actor.net, [plain.pi])
    assert_same(method.critic.net, plain.q)
    assert_same(method.target_actor.net, [plain.pi_target])
    assert_same(method.target_critic.net, plain.q_target)


# -- known answers ---------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A policy or critic that returns what it was given, whatever it is asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value.double())

    def forward(self, *_: Tensor) -> Tensor:
        return self.value

    member = forward


def with_outputs(action: Tensor, q: Tensor, **options: Any) -> PRDC:
    method = ready(PRDC(**(SMALL | options)), obs_dim=1, action_dim=action.shape[-1])
    method.actor, method.critic = Fixed(action), Fixed(q)
    return method  # type: ignore[return-value]


def plain_batch(method: PRDC, obs: list[float], action: list[list[float]]) -> Transitions:
    batch = made_batch(method, len(obs))
    tensors = torch.tensor(obs, dtype=torch.float64)[:, None], torch.tensor(action, dtype=torch.float64)
    return batch._replace(obs=tensors[0], action=tensors[1], row=torch.arange(len(obs)))


def test_actor_loss_known_answer() -> None:
    """States 0, 0.1; actions 0.8, 0.2; policy 0.3, 0.1; β = 2; q = 1, 3, so λ = 2.5/2 = 1.25.

    Row 0: own d² = 0.25, the other 4·0.01 + 0.01 = 0.05 → target 0.2, error 0.01.
    Row 1: own d² = 0.01, the other 0.04 + 0.49 → target 0.2, error 0.01.  Loss 0.01 - 1.25·2 = -2.49.
    """
    method = with_outputs(torch.tensor([[0.3], [0.1]]), torch.tensor([1.0, 3.0]), state_weight=2.0)
    batch = plain_batch(method, [0.0, 0.1], [[0.8], [0.2]])
    method.index_rows(batch.obs, batch.action)
    loss, metrics = method.actor_loss(batch)
    assert loss.item() == pytest.approx(-2.49, rel=1e-6)
    assert metrics["dc_loss"].item() == pytest.approx(0.01, rel=1e-5)
    assert metrics["own_transition"].item() == 0.5 and metrics["certified"].item() == 1.0
    assert metrics["neighbor_distance"].item() == pytest.approx((0.05**0.5 + 0.1) / 2, rel=1e-6)


def test_two_neighbours_known_answer() -> None:
    """β = 0.1, policy 0 in both rows; actions 0.2, -0.4: both neighbours of both rows, (0.04 + 0.16)/2 = 0.1."""
    method = with_outputs(torch.zeros(2, 1), torch.ones(2), state_weight=0.1, num_neighbors=2, alpha=0.0)
    batch = plain_batch(method, [0.0, 1.0], [[0.2], [-0.4]])
    method.index_rows(batch.obs, batch.action)
    assert method.actor_loss(batch)[0].item() == pytest.approx(0.1, rel=1e-9)


def test_no_gradient_through_the_search() -> None:
    """∂L_DC/∂p = 2·(p - a_j)/(B·A) exactly, and by finite differences inside the region of one neighbour."""
    obs, stored = pairs()
    action = stored[:8] + 0.05
    method = with_outputs(action, torch.ones(8), alpha=0.0)
    method.sizes = Sizes(3, 2)
    batch = made_batch(method, 8)._replace(obs=obs[:8], action=stored[:8], row=torch.arange(8))
    method.index_rows(obs, stored)
    (gradient,) = torch.autograd.grad(method.actor_loss(batch)[0], [method.actor.value])
    assert method.index is not None
    target = method.index.query(action, batch.row).action[:, 0]
    torch.testing.assert_close(gradient, 2 * (action - target) / 16, rtol=1e-12, atol=0)

    def loss(value: Tensor) -> Tensor:
        method.actor.forward = lambda *_: value
        return method.actor_loss(batch)[0]

    assert torch.autograd.gradcheck(loss, action.clone().requires_grad_())


def test_a_policy_on_the_data_has_no_loss_and_no_gradient() -> None:
    obs, stored = pairs()
    method = with_outputs(stored[:6], torch.ones(6), alpha=0.0)
    method.index_rows(obs, stored)
    batch = made_batch(method, 6)._replace(obs=obs[:6], action=stored[:6], row=torch.arange(6))
    loss, metrics = method.actor_loss(batch)
    assert loss.item() == 0.0 and metrics["own_transition"].item() == 1.0
    assert not torch.autograd.grad(loss, [method.actor.value])[0].any()


def test_without_states_the_closest_action_anywhere_is_the_target() -> None:
    stored = pairs()[1]
    method = small(state_weight=0.0, alpha=0.0)
    batch = batch_of(method, 0)
    p = method.actor(batch.obs)
    closest = stored[(p[:, None] - stored).square().sum(2).argmin(1)]
    torch.testing.assert_close(method.actor_loss(batch)[0], (p - closest).square().mean(), rtol=1e-12, atol=0)


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_weight", [0.25, 2.0])
def test_never_further_from_the_target_than_cloning(state_weight: float) -> None:
    """The own pair is a candidate, so row by row the error is at most TD3+BC's."""
    method = small(state_weight=state_weight)
    batch = batch_of(method, 3, size=40)
    assert method.index is not None
    p = method.actor(batch.obs).detach()
    near = (p - method.index.query(p, batch.row).action[:, 0]).square().sum(1)
    own = (p - batch.action).square().sum(1)
    assert (near <= own).all() and (near < own).any()


def test_large_state_weight_is_td3bc_bit_by_bit() -> None:
    replay = toy_replay()
    runs = []
    for make in (TD3BC, lambda **o: PRDC(state_weight=1e6, **o)):
        module: Any = make(batch_size=16, **SMALL)
        module.seed, module.run.eval_episodes, module.run.log_every = 0, 0, 20
        rows = Rows()
        fit(module, replay, 60, callbacks=[rows])
        runs.append((weights(module), rows.rows))
    assert not differences(runs[0][0], runs[1][0])
    for ours, theirs in zip(runs[1][1], runs[0][1], strict=True):
        assert ours["train/own_transition"] == 1.0 and ours["train/dc_loss"] == theirs["train/bc_loss"]


def test_every_exact_search_trains_the_same_weights() -> None:
    """So a resumed run, which starts with empty lists, and processes that see other rows need not agree on any."""
    replay = toy_replay(seed=1)
    runs = []
    for options in ({"candidates": 3}, {"candidates": 200}, {"search": "tree"}, {"search": "brute"}):
        module = PRDC(batch_size=16, state_weight=0.5, **(SMALL | options))
        module.seed, module.run.eval_episodes, module.run.log_every = 0, 0, 60
        fit(module, replay, 60)
        runs.append((weights(module), module.metric_row))
        assert module.index is None  # let go with the data
    for other, row in runs[1:]:
        assert not differences(other, runs[0][0])
        assert row["train/own_transition"] == runs[0][1]["train/own_transition"] < 1.0
    assert runs[0][1]["train/certified"] < 1.0 == runs[1][1]["train/certified"]
    assert "train/certified" not in runs[2][1]


def test_the_index_is_in_normalised_units_and_named_by_rows_of_the_replay() -> None:
    """With a hole in the rows that can be drawn: the last step of a cut episode without a successor."""
    replay = toy_replay((7, 5, 9))
    replay.tail.clear()
    module = PRDC(batch_size=8, **SMALL).prepare(replay)
    bound, index = module.bound, module.index
    assert bound is not None and index is not None and len(bound.rows) < 21
    batch = bound.gather(torch.arange(len(bound)))
    assert torch.equal(index.points, torch.cat([batch.obs, batch.action], 1))
    assert abs(batch.action).max() <= 1.0 and abs(batch.obs.mean()) < 0.1
    assert torch.equal(index.query(batch.action, batch.row).row[:, 0], batch.row)
    module.run_block(0, 4)


def test_seeds_in_one_module_equal_single_ones() -> None:
    class OnPairs(PRDC):
        def update(self, batch: Transitions, step: int) -> dict[str, Tensor]:
            obs, action = pairs()
            if self.index is None:
                self.index_rows(obs, action)
            row = (torch.arange(16) + step) % 60
            shape = batch.reward.shape
            batch = batch._replace(obs=obs[row].expand(*shape, 3), action=action[row].expand(*shape, 2))
            return super().update(batch._replace(row=row.expand(shape)), step)

    for k in (1, 2):
        assert_seeds_equal(OnPairs, (0, 3), num_neighbors=k, **SMALL)


@pytest.mark.parametrize("search", ["exact", "cached", "tree", "brute"])
def test_on_a_device_an_update_reads_nothing_back(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number would make a GPU wait; every such read goes through one of two operators."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(neighbors, "at_host", lambda device: False)
    method = small(search=search, candidates=5, num_neighbors=2)
    assert method.index is not None
    method.index.build()
    batches = [batch_of(method, seed) for seed in (1, 2)]
    with NoReading():
        for step, batch in enumerate(batches, 1):
            method.update(batch, step)


# -- from outside ----------------------------------------------------------------------------------------------------


def test_losses_from_outside_by_index_or_by_targets() -> None:
    method = small(num_neighbors=2)
    batch = batch_of(method, 1)
    loss, _ = method.actor_loss(batch)
    p = method.actor(batch.obs).detach()
    target = nearest_by_enumeration(method, batch.obs, p).movedim(1, 0)  # (k, B, A)
    method.index = None
    torch.testing.assert_close(method.actor_loss(batch, target)[0], loss, rtol=1e-12, atol=0)
    with pytest.raises(UsageError, match=r"index_rows and batch\.row, or `target`"):
        method.actor_loss(batch)


def test_half_precision_keeps_targets_in_full() -> None:
    obs, action = pairs()
    method: Any = PRDC(**SMALL)
    method.initialize(Sizes(3, 2), 0)
    method.index_rows(obs.float(), action.float())
    batch = made_batch(method, 8)
    batch = batch._replace(obs=obs[:8].float(), action=action[:8].float(), row=torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        target, _ = method.targets(batch, method.actor(batch.obs).bfloat16())
    assert target.dtype == torch.float32
    assert torch.isin(target, action.float()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "`alpha` is -1"),
        ({"state_weight": -0.1}, "`state_weight` is -0.1"),
        ({"num_neighbors": 0}, "`num_neighbors` is 0"),
        ({"search": "kdtree"}, "`search` is 'kdtree'.*'tree'"),
        ({"search": "cached", "state_weight": 0.0}, "Use 'exact'"),
        ({"search": "cached", "num_neighbors": 3, "candidates": 2}, "only 2 `candidates`"),
        ({"candidates": 0}, "`candidates` is 0"),
        ({"discount": 1.0}, "`discount` is 1"),
        ({"policy_freq": 0}, "`policy_freq` is 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PRDC(**options)
