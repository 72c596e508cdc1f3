"""Decision Transformer — Chen et al. 2021, Reinforcement Learning via Sequence Modeling (arXiv:2106.01345).

A causal transformer reads (R̂₁, s₁, a₁, R̂₂, s₂, …), R̂ the return still to come, and predicts each action from the state
before it: mean (π(R̂, s, a)_t - a_t)². To act, R̂ starts at a wanted return and each reward is subtracted from it.

| detail             | paper       | authors' code; CORL's if other         | here                  |
|--------------------|-------------|----------------------------------------|-----------------------|
| padding            | -           | left, actions -10; right, zeros        | right, zeros          |
| loss is over       | -           | real steps; all, padding as zeros      | all, padding as zeros |
| activation         | ReLU        | ReLU; GELU                             | GELU                  |
| warm-up            | 10⁵ updates | 10⁴                                    | 10⁴                   |
| batch, rate        | 64, 1e-4    | the same; 4096, 8e-4, AntMaze 64, 1e-4 | as the paper; recipes |
| time in padding    | -           | 0; counts on                           | counts on             |
| padding masked     | yes         | yes                                    | no need, see below    |
| unfinished episode | -           | kept; dropped                          | kept                  |

A query never sees the padding to its right, so the causal mask is enough. In the last block only the tokens of states
are carried on, as only they are read; the result is the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offpolicy.compute.optim import FusedAdam
from offpolicy.data.replay import Replay
from offpolicy.data.views import Windows, WindowView
from offpolicy.errors import UsageError, check_range
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes

STATES = slice(1, None, 3)  # the tokens of states among (R̂, s, a, R̂, s, a, …)


class DecisionTransformer(OfflineModule):
    """Return-conditioned sequence model. One seed per process.

    ``act`` takes every observation for the first of an episode; ``agent()`` gives what plays whole episodes.

    Args:
        context_length: steps in a window, ≥ 1.
        reward_scale: factor on rewards and returns before they enter the network, > 0; 0.001 for locomotion.
        target_return: return asked for when acting, in the units of the data; None takes the best of the data.
        embed_dim: width of the transformer, a multiple of ``num_heads``.
        num_layers: blocks, ≥ 1.
        num_heads: attention heads, ≥ 1.
        dropout: probability of zeroing an embedding, attention weight or residual in training, in [0, 1).
        lr: AdamW's learning rate after the warm-up.
        warmup_steps: updates over which the rate rises linearly, ≥ 0.
        weight_decay: AdamW's decay of all parameters, ≥ 0.
        max_grad_norm: limit on the gradient norm, > 0; None for no limit.
        batch_size: windows per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + obs_eps).
        obs_eps: added to the standard deviation, ≥ 0.
    """

    compiled = ("actor_loss",)
    seed_axis = False
    view = WindowView(20)

    def __init__(
        self,
        *,
        context_length: int = 20,
        reward_scale: float = 1.0,
        target_return: float | None = None,
        embed_dim: int = 128,
        num_layers: int = 3,
        num_heads: int = 1,
        dropout: float = 0.1,
        lr: float = 1e-4,
        warmup_steps: int = 10_000,
        weight_decay: float = 1e-4,
        max_grad_norm: float | None = 0.25,
        batch_size: int = 64,
        normalize_obs: bool = True,
        obs_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_range("context_length", context_length, 1)
        check_range("reward_scale", reward_scale, 0.0, lower_open=True)
        check_range("num_layers", num_layers, 1)
        check_range("num_heads", num_heads, 1)
        check_range("dropout", dropout, 0.0, 1.0, upper_open=True)
        check_range("target_return", target_return or 0.0)
        check_range("lr", lr, 0.0)
        check_range("warmup_steps", warmup_steps, 0)
        check_range("weight_decay", weight_decay, 0.0)
        if embed_dim < 1 or embed_dim % num_heads:
            raise UsageError(f"`embed_dim` is {embed_dim}; expected a multiple of `num_heads` ({num_heads}).")
        self.save_hyperparameters()
        self.view = WindowView(context_length, pad="right")  # type: ignore[misc]  # this instance's own

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        steps = sizes.max_steps + h.context_length  # beyond the longest episode: time steps of padding
        self.transformer = Transformer(
            sizes.obs_dim, sizes.action_dim, steps, h.embed_dim, h.num_layers, h.num_heads, h.dropout
        )
        self.register_buffer("best_return", torch.zeros(()))

    def fit_normalizer(self, replay: Replay) -> None:
        super().fit_normalizer(replay)
        self.best_return.fill_(float(replay.returns().max()))

    def learning_rates(self) -> dict[str, Rate]:
        return {"transformer": self.warmed_up_lr}

    def warmed_up_lr(self, step: int) -> float:
        """Rises linearly to ``lr``, which it has from update ``warmup_steps`` on."""
        return self.hparams.lr * min(1.0, step / max(1, self.hparams.warmup_steps))

    def make_optimizer(self, name: str, params: list[Tensor]) -> FusedAdam:
        return FusedAdam(params, weight_decay=self.hparams.weight_decay, decoupled=True)

    def actor_loss(self, batch: Windows) -> tuple[Tensor, Metrics]:
        """Mean over batch, window and action dimensions; padded steps count as zeros."""
        action = self.transformer(batch.obs, batch.action, batch.return_to_go * self.hparams.reward_scale, batch.t)
        loss = ((action - batch.action) * batch.mask.unsqueeze(-1)).square().mean()
        return loss, {"actor_loss": loss.detach()}

    def update(self, batch: Windows, step: int) -> Metrics:
        loss, metrics = self.actor_loss(batch)
        self.step("transformer", loss)
        return metrics

    def policy(self, obs: Tensor) -> Tensor:
        return HistoryAgent(self).predict(obs)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        raise UsageError(
            "DecisionTransformer acts by the history of an episode; expected a policy of one observation, whose actions"
            " have a probability. Choose another method, such as TD3BC."
        )

    def agent(self, target_return: float | None = None) -> HistoryAgent:
        """Plays episodes: remembers the last steps and what is left of the return asked for.

        Args:
            target_return: instead of the hyperparameter.
        """
        return HistoryAgent(self, target_return)


class HistoryAgent:
    """Several episodes side by side, as :class:`offpolicy.evaluation.rollout.Agent` has it."""

    def __init__(self, method: DecisionTransformer, target_return: float | None = None) -> None:
        wanted = method.hparams.target_return if target_return is None else target_return
        self.method = method
        self.target = (method.best_return if wanted is None else wanted) * method.hparams.reward_scale
        self.reset(0)

    def reset(self, num_envs: int) -> None:
        self.t = -1

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Observations (n, O) → actions (n, A), both in environment units."""
        method = self.method
        x = torch.as_tensor(obs, device=method.device, dtype=method.dtype_of_weights)
        training = method.training
        method.eval()
        action = self.predict(method.normalizer.obs(x))
        method.train(training)
        return method.normalizer.environment_action(action).float().cpu().numpy()

    def predict(self, obs: Tensor) -> Tensor:
        """Normalised observations (n, O) → actions (n, A) in [-1, 1]; both join the history."""
        length, n = self.method.hparams.context_length, len(obs)
        blank = obs.new_zeros(n, 1, self.method.sizes.action_dim)  # for the action to come, which nothing reads
        self.t += 1
        if self.t == 0:
            self.left = obs.new_zeros(n, 1) + self.target  # of the return asked for
            self.obs, self.action, self.to_go = obs[:, None][:, :0], blank[:, :0], self.left[:, :0]
        self.obs = torch.cat((self.obs, obs[:, None]), 1)[:, -length:]
        self.action = torch.cat((self.action, blank), 1)[:, -length:]
        self.to_go = torch.cat((self.to_go, self.left), 1)[:, -length:]
        time = torch.arange(self.t + 1 - self.obs.shape[1], self.t + 1, device=obs.device)
        action = self.method.transformer(self.obs, self.action, self.to_go, time)[:, -1]
        self.action[:, -1] = action
        return action

    def observe(self, reward: np.ndarray, finished: np.ndarray) -> None:
        """Rewards (n,) of the last actions."""
        earned = torch.as_tensor(reward, device=self.left.device, dtype=self.left.dtype)
        self.left = self.left - (earned * self.method.hparams.reward_scale)[:, None]


class Transformer(nn.Module):
    """Actions from returns to go, states and actions.

    Args:
        obs_dim: O.
        action_dim: A.
        num_steps: time steps that have an embedding of their own; later ones share the last.
        embed_dim: width D.
        num_layers: blocks.
        num_heads: attention heads.
        dropout: probability of zeroing an embedding, attention weight or residual.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        num_steps: int,
        embed_dim: int = 128,
        num_layers: int = 3,
        num_heads: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed_return = nn.Linear(1, embed_dim)
        self.embed_obs = nn.Linear(obs_dim, embed_dim)
        self.embed_action = nn.Linear(action_dim, embed_dim)
        self.embed_time = nn.Embedding(num_steps, embed_dim)
        self.norm_in, self.drop = nn.LayerNorm(embed_dim), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, dropout) for _ in range(num_layers))
        self.norm_out, self.head = nn.LayerNorm(embed_dim), nn.Linear(embed_dim, action_dim)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # after its layers
            module.reset_attention()

    def forward(self, obs: Tensor, action: Tensor, return_to_go: Tensor, t: Tensor) -> Tensor:
        """Actions (B, H, A) in [-1, 1]; the one at step i depends on what came before it and on obs and return i.

        Args:
            obs: (B, H, O), normalised.
            action: (B, H, A) in [-1, 1].
            return_to_go: (B, H), scaled.
            t: (B, H) or (H,) int64, time step in the episode.
        """
        time = self.embed_time(t.clamp(max=self.embed_time.num_embeddings - 1))
        parts = (self.embed_return(return_to_go.unsqueeze(-1)), self.embed_obs(obs), self.embed_action(action))
        x = torch.stack([part + time for part in parts], 2).flatten(1, 2)  # (B, 3H, D): R̂, s, a, R̂, s, a, …
        x = self.drop(self.norm_in(x))
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, STATES)
        return torch.tanh(self.head(self.norm_out(x)))


class Block(nn.Module):
    """Attention and perceptron, each after a LayerNorm and added to its input."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.query, self.key_value = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, 2 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim))
        self.drop = nn.Dropout(dropout)
        self.num_heads = num_heads

    def reset_attention(self) -> None:
        """The start of torch's attention: Xavier over query, key and value as one (3D, D) matrix."""
        bound = math.sqrt(6.0 / (4 * self.query.in_features))
        for layer in (self.query, self.key_value):
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(B, L, D) → (B, rows of L, D): every token sees itself and those before it; only ``rows`` are carried on."""
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[rows]
        normed = self.norm_attention(x)
        query = self.split(self.query(normed[:, rows]))
        key, value = map(self.split, self.key_value(normed).chunk(2, -1))
        dropout = self.drop.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        x = x[:, rows] + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm_mlp(x)))

    def split(self, x: Tensor) -> Tensor:
        """(B, L, D) → (B, heads, L, D / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
