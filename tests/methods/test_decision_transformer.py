"""Decision Transformer against torch's attention, AdamW and a rollout that keeps the whole history."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_modules.decision_transformer import DecisionTransformer, Transformer
from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.data.views import Windows
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"context_length": 4, "embed_dim": 8, "num_layers": 2, "dropout": 0.0, "batch_size": 6}


def small(**options: Any) -> Any:
    method = DecisionTransformer(**(SMALL | options))
    method.initialize(Sizes(3, 2, max_steps=9), 0)
    method.double()
    method.configure_optimizers()
    return method


def made_windows(size: int = 6, length: int = 4, seed: int = 0) -> Windows:
    """Random windows of which the first half ends early; padding is zero but for the time steps."""
    g = torch.Generator().manual_seed(seed)
    real = torch.full((size,), length)
    real[: size // 2] = torch.randint(1, length, (size // 2,), generator=g)
    mask = torch.arange(length) < real[:, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, length, *shape, generator=g, dtype=torch.float64) * mask.view(
            size, length, *[1] * len(shape)
        )

    return Windows(
        obs=normal(3),
        action=normal(2).tanh(),
        reward=normal(),
        terminated=torch.zeros(size, length, dtype=torch.bool),
        mask=mask,
        t=torch.randint(0, 6, (size, 1), generator=g) + torch.arange(length),
        return_to_go=normal(),
    )


class PlainBlock(nn.Module):
    def __init__(self, ours: Any, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, ours.num_heads, batch_first=True)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.double()
        self.attention.in_proj_weight.data.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        self.attention.in_proj_bias.data.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        pairs = [(self.norm1, ours.norm_attention), (self.norm2, ours.norm_mlp), (self.attention.out_proj, ours.out)]
        for theirs, source in [*pairs, (self.up, ours.mlp[0]), (self.down, ours.mlp[2])]:
            theirs.load_state_dict(source.state_dict())

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        n = x.shape[1]
        future = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=future, key_padding_mask=padding)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class PlainTransformer(nn.Module):
    """All 3H tokens through torch's own attention, with the padding masked."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        names = ("embed_return", "embed_obs", "embed_action", "embed_time", "norm_in", "norm_out", "head")
        for name in names:
            setattr(self, name, copy.deepcopy(getattr(ours, name)))
        self.blocks = nn.ModuleList(PlainBlock(block, ours.embed_obs.out_features) for block in ours.blocks)

    def forward(self, batch: Windows, scale: float) -> Tensor:
        time = self.embed_time(batch.t)
        tokens = []
        for i in range(batch.obs.shape[1]):
            tokens.append(self.embed_return(batch.return_to_go[:, i : i + 1] * scale) + time[:, i])
            tokens.append(self.embed_obs(batch.obs[:, i]) + time[:, i])
            tokens.append(self.embed_action(batch.action[:, i]) + time[:, i])
        x = self.norm_in(torch.stack(tokens, 1))
        for block in self.blocks:
            x = block(x, ~batch.mask.repeat_interleave(3, 1))
        return torch.tanh(self.head(self.norm_out(x)))[:, 1::3]


@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "num_layers": 1}, {"max_grad_norm": None, "warmup_steps": 0}])
def test_updates_equal_an_obvious_implementation(options: dict[str, Any]) -> None:
    settings = {"warmup_steps": 3, "lr": 1e-2, "weight_decay": 0.1, "reward_scale": 0.5, "max_grad_norm": 0.05}
    method = small(**(settings | options))
    h = method.hparams
    plain = PlainTransformer(method.transformer)
    adam = torch.optim.AdamW(plain.parameters(), lr=h.lr, weight_decay=h.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: min((done + 1) / max(h.warmup_steps, 1), 1))
    for step in range(1, 6):
        batch = made_windows(seed=step)
        method.updates = step
        ours = method.update(batch, step)["actor_loss"]
        error = (plain(batch, 0.5) - batch.action) ** 2 * batch.mask[..., None]
        loss = error.sum() / error.numel()
        adam.zero_grad()
        loss.backward()
        if h.max_grad_norm:
            assert nn.utils.clip_grad_norm_(plain.parameters(), h.max_grad_norm) > h.max_grad_norm
        adam.step()
        schedule.step()
        torch.testing.assert_close(ours, loss.detach())
    batch = made_windows(seed=9)
    ours = method.transformer(batch.obs, batch.action, batch.return_to_go * 0.5, batch.t)
    torch.testing.assert_close(ours * batch.mask[..., None], plain(batch, 0.5) * batch.mask[..., None])
    for name in ("embed_time", "embed_return", "head", "norm_in"):
        torch.testing.assert_close(getattr(method.transformer, name).weight, getattr(plain, name).weight)
    torch.testing.assert_close(method.transformer.blocks[-1].mlp[0].weight, plain.blocks[-1].up.weight)


def actions(method: Any, batch: Windows) -> Tensor:
    return method.transformer(batch.obs, batch.action, batch.return_to_go, batch.t)


def test_an_action_depends_on_its_past_only() -> None:
    """Other returns and states after step i, and actions from step i on, leave â_i as it is; earlier ones do not."""
    method, batch, other = small(), made_windows(), made_windows(seed=1)
    generator = torch.Generator().manual_seed(0)
    for p in method.parameters():
        p.data.normal_(std=0.3, generator=generator)
    expected = actions(method, batch)
    for i in range(4):

        def mixed(name: str, first: int) -> Tensor:
            x = getattr(batch, name).clone()
            x[:, first:] = getattr(other, name)[:, first:]
            return x

        later = {"obs": mixed("obs", i + 1), "return_to_go": mixed("return_to_go", i + 1), "action": mixed("action", i)}
        torch.testing.assert_close(actions(method, batch._replace(**later))[:, : i + 1], expected[:, : i + 1])
        for name in ("obs", "return_to_go"):
            changed = actions(method, batch._replace(**{name: mixed(name, i)}))
            assert (changed[3:, i] - expected[3:, i]).abs().amax(-1).gt(1e-6).all()
    changed = actions(method, batch._replace(action=mixed("action", 2)))
    assert (changed[3:, 3] - expected[3:, 3]).abs().amax(-1).gt(1e-6).all()


def test_padding_and_other_rows_change_nothing() -> None:
    method, batch = small(), made_windows()
    expected = actions(method, batch)
    for row in range(6):
        real = int(batch.mask[row].sum())
        alone = {k: getattr(batch, k)[row : row + 1, :real] for k in ("obs", "action", "return_to_go", "t")}
        torch.testing.assert_close(actions(method, batch._replace(**alone))[0], expected[row, :real])


def test_padding_counts_in_the_mean() -> None:
    """Two windows of two steps, one of them with one real step, A = 2, predictions 0. Squares of the real actions:
    4·0.25 + 2·0.25 = 1.5, over 2·2·2 entries: 0.1875."""
    method = small()
    method.transformer.head.weight.data.zero_()
    batch = made_windows(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    batch = batch._replace(action=torch.full_like(batch.action, 0.5) * mask[..., None], mask=mask)
    assert method.actor_loss(batch)[0].item() == pytest.approx(0.1875, rel=1e-12)


def episodes(lengths: tuple[int, ...], seed: int = 0) -> Replay:
    rng, rows = np.random.default_rng(seed), sum(lengths)
    end = np.zeros(rows, dtype=bool)
    end[np.cumsum(lengths) - 1] = True
    columns = {
        "obs": rng.normal(3.0, 2.0, (rows, 3)),
        "action": rng.uniform(-2, 2, (rows, 2)),
        "reward": rng.normal(size=rows),
    }
    steps: dict[str, Any] = {k: v.astype(np.float32) for k, v in columns.items()} | {"terminated": end}
    return Replay(steps, episode_end=end, meta={"action_low": [-2.0] * 2, "action_high": [2.0] * 2})


def test_windows_of_the_data() -> None:
    """Return to go falls by the reward from step to step; states are (s - mean) / (std + 1e-6)."""
    replay = episodes((9, 2, 5))
    method: Any = DecisionTransformer(**SMALL).prepare(replay)
    batch = method.draw(0, 1)[0]
    inside = batch.mask[:, 1:]
    torch.testing.assert_close(
        (batch.return_to_go[:, :-1] - batch.return_to_go[:, 1:])[inside], batch.reward[:, :-1][inside]
    )
    assert (batch.obs[~batch.mask] == 0).all() and (batch.t[:, 1:] - batch.t[:, :-1] == 1).all()
    std = torch.from_numpy(replay.steps["obs"]).double().std(0, correction=0)
    torch.testing.assert_close(method.normalizer.obs_scale.double(), 1 / (std + 1e-6), rtol=1e-6, atol=0)
    assert method.best_return.item() == pytest.approx(replay.returns().max(), rel=1e-6)
    assert method.transformer.embed_time.num_embeddings == 9 + 4


def test_warm_up() -> None:
    method = small(lr=0.5, warmup_steps=10)
    assert [method.warmed_up_lr(t) for t in (1, 5, 10, 1000)] == pytest.approx([0.05, 0.25, 0.5, 0.5])


def test_start_of_the_network() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Transformer(17, 6, 1020)
    xavier = math.sqrt(6 / (3 * 128 + 128))
    for name, p in network.named_parameters():
        if "query.weight" in name or "key_value.weight" in name:
            assert 0.99 * xavier < p.abs().max() <= xavier
        elif "norm" in name:
            assert (p == float(name.endswith("weight"))).all()
        elif name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.2)
        else:
            assert (p == 0).all()


@pytest.mark.parametrize("target", [None, 7.0])
def test_agent_equals_the_whole_history(target: float | None) -> None:
    """Two episodes of ten steps: every action is that of the transformer on the last four steps, with the actions
    taken, the return left over and a zero in place of the action to come."""
    replay = episodes((9, 2, 5))
    method: Any = DecisionTransformer(**(SMALL | {"reward_scale": 0.1, "dropout": 0.5})).prepare(replay)
    rng = np.random.default_rng(0)
    obs, reward = rng.normal(size=(10, 2, 3)).astype(np.float32), rng.normal(size=(10, 2))
    agent = method.agent(target)
    taken = torch.zeros(2, 10, 2)
    for _ in range(2):  # a second round of episodes starts afresh
        agent.reset(2)
        for i in range(10):
            action = agent.act(obs[i])
            first = max(0, i - 3)
            states = (torch.from_numpy(obs[first : i + 1]) - method.normalizer.obs_center) * method.normalizer.obs_scale
            earned = torch.from_numpy(np.cumsum(np.concatenate([np.zeros((1, 2)), reward]), 0)[first : i + 1])
            left = ((method.best_return if target is None else target) - earned.float().T) * 0.1
            taken[:, i] = 0
            method.eval()
            with torch.no_grad():
                out = method.transformer(
                    states.transpose(0, 1), taken[:, first : i + 1], left, torch.arange(first, i + 1)
                )
            method.train()
            taken[:, i] = out[:, -1]
            np.testing.assert_allclose(action, 2 * out[:, -1].numpy(), rtol=1e-5, atol=1e-6)
            if i == 0:  # `act` takes an observation for the first of an episode
                np.testing.assert_allclose(method.agent(method.best_return).act(obs[0]), method.act(obs[0]), rtol=1e-6)
            agent.observe(reward[i], np.zeros(2, dtype=bool))


def test_blocks_do_not_matter_with_dropout() -> None:
    replay, results = episodes((9, 2, 5)), []
    for blocks in ([4], [1, 3]):
        method: Any = DecisionTransformer(**(SMALL | {"dropout": 0.2, "lr": 1e-2, "warmup_steps": 0})).prepare(replay)
        t = 0
        for k in blocks:
            method.run_block(t, k)
            t += k
        results.append([p.clone() for p in method.parameters()])
    assert all(map(torch.equal, *results))


def test_reaches_the_return_asked_for() -> None:
    """Episodes of five steps with one action a throughout and reward a: the return asked for tells which a to take."""
    rng = np.random.default_rng(0)
    a = np.repeat(rng.uniform(-1, 1, 200), 5).astype(np.float32)
    end = np.tile(np.arange(5) == 4, 200)
    steps = {"obs": rng.normal(size=(1000, 1)).astype(np.float32), "action": a[:, None], "reward": a, "terminated": end}
    replay = Replay(steps, episode_end=end, meta={"action_low": [-1.0], "action_high": [1.0]})
    options: dict[str, Any] = {"context_length": 5, "embed_dim": 16, "num_layers": 1, "lr": 1e-2, "warmup_steps": 20}
    method: Any = DecisionTransformer(**options, dropout=0.0, batch_size=32).prepare(replay)
    for t in range(0, 192, 64):
        method.run_block(t, 64)
    for target in (4.0, -3.0):
        agent = method.agent(target)
        agent.reset(1)
        total = 0.0
        for _ in range(5):
            action = float(agent.act(np.zeros((1, 1), np.float32))[0, 0])
            agent.observe(np.array([action]), np.zeros(1, bool))
            total += action
        assert total == pytest.approx(target, abs=0.6)


def test_one_seed_per_process() -> None:
    method = DecisionTransformer(**SMALL)
    with pytest.raises(UsageError, match="one seed per process"):
        method.seeds = (0, 1)


@pytest.mark.parametrize(
    "bad",
    [{"context_length": 0}, {"embed_dim": 9, "num_heads": 2}, {"dropout": 1.0}, {"reward_scale": 0.0}, {"lr": -1.0}],
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        DecisionTransformer(**bad)
