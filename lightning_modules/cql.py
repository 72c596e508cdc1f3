"""CQL — Kumar, Zhou, Tucker & Levine 2020, Conservative Q-Learning for Offline RL (arXiv:2006.04779), variant CQL(H).

Soft actor-critic whose critics also pay for valuing sampled actions above those of the data:

  Critic: Σᵢ mean (Qᵢ(s, a) - y)² + α·Δᵢ, y = r + γ·min Q̄(s', a'), a' ~ π(s'), without an entropy bonus,
          Δᵢ = mean [T·logsumexp_j ((Qᵢ(s, a_j) - log μ(a_j)) / T) - Qᵢ(s, a)], over K uniform actions, K from π(s) and
          K from π(s'), all valued at s and each divided by the density μ it was drawn from.
  Actor:  mean [w·log π(ã|s) - min Q(s, ã)], ã ~ π(s); w rises or falls until the entropy is -A.
  Lagrange form: α is multiplied by a learnt m ≥ 0 that grows while the mean Δ is above ``lagrange_gap``.

All losses of an update are built from the same weights; then the entropy weight, the actor, m and the critics step,
each critic loss with the m from before.

| detail            | paper                | authors' code; CORL's if other          | here                        |
|-------------------|----------------------|-----------------------------------------|-----------------------------|
| squared TD error  | halved               | whole                                   | whole                       |
| actions in Δ      | uniform, π(s); means | and π(s'); sums                         | as the code                 |
| start of log m    | -                    | 0; 1                                    | 1                           |
| Lagrange penalty  | m·(Δ - gap)          | m·(αΔ - gap); m·α·(Δ - gap)             | m·α·(Δ - gap)               |
| max-backup        | -                    | maximum inside the minimum; outside     | outside                     |
| w in the losses   | -                    | after its step; before                  | before                      |
| clip of Δ         | -                    | none; row by row                        | `penalty_min, _max`         |
| critics' start    | -                    | that of rlkit; orthogonal               | orthogonal                  |
| 5 layers, AntMaze | -                    | -; of the first critic only, by a slip  | `second_critic_hidden_dims` |
| cloning warm-up   | -                    | data's log π; a new sample's, by a slip | data's; `bc_steps` 0        |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from offpolicy.data.replay import Replay
from offpolicy.data.returns import RETURN_TO_GO, with_returns_to_go
from offpolicy.data.views import Transitions, TransitionView
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.td import squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.nn.policies import TanhGaussianPolicy
from offpolicy.nn.stacked import Init
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes

MULTIPLIER_MAX = 1e6  # of m, in the authors' code
Heads = tuple[Tensor, Tensor]


class CQL(OfflineModule):
    """Conservative Q-learning.

    Args:
        alpha: α, weight of the conservative penalty, ≥ 0; 0 is soft actor-critic. 10 for locomotion, 5 for AntMaze.
        lagrange_gap: wanted Δ of the Lagrange form; None keeps α as it is.
        num_actions: K, ≥ 1.
        temperature: T, > 0.
        importance_sampling: divide by the densities; without it the data's action joins the sum, so Δ ≥ 0.
        penalty_min: lower clip of each row's Δ, which then has no gradient; None for none, -200 for AntMaze.
        penalty_max: upper clip of each row's Δ.
        max_backup: bootstrap from the best of K actions at s' instead of one.
        backup_entropy: subtract w·log π(a'|s') in the target, as soft actor-critic does.
        auto_entropy: adapt w; otherwise it stays at ``entropy_weight``.
        entropy_weight: w at the start, > 0.
        target_entropy: entropy that w steers to, nats; None takes -A.
        calibrated: Cal-QL (Nakamoto et al. 2023, arXiv:2303.05479): in Δ the values of policy actions are not below the
            return of the data from there on, so that the policy is not unlearnt when it goes on online.
        failure_reward: with ``calibrated``: transformed reward of a step without success, whose episodes are taken to
            go on so for ever; -5 for AntMaze with "10r-5". None for dense rewards.
        bc_steps: first updates in which the actor maximises log π(a|s) instead of Q, ≥ 0.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the target critics, in [0, 1].
        actor_hidden_dims: widths of the actor's hidden layers.
        critic_hidden_dims: widths of the critics' hidden layers.
        second_critic_hidden_dims: of the second critic where it differs (CORL's AntMaze runs: 5 layers and 3); None
            for the same.
        actor_lr: Adam's learning rate of the actor and of w.
        critic_lr: Adam's learning rate of the critics and of m.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3).
        reward_transform: "r", an affine form such as "0.1r" or "10r-5", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("actor_loss", "entropy_loss", "multiplier_loss", "critic_loss")

    def __init__(
        self,
        *,
        alpha: float = 10.0,
        lagrange_gap: float | None = None,
        num_actions: int = 10,
        temperature: float = 1.0,
        importance_sampling: bool = True,
        penalty_min: float | None = None,
        penalty_max: float | None = None,
        max_backup: bool = False,
        backup_entropy: bool = False,
        auto_entropy: bool = True,
        entropy_weight: float = 1.0,
        target_entropy: float | None = None,
        calibrated: bool = False,
        failure_reward: float | None = None,
        bc_steps: int = 0,
        discount: float = 0.99,
        tau: float = 0.005,
        actor_hidden_dims: tuple[int, ...] = (256, 256, 256),
        critic_hidden_dims: tuple[int, ...] = (256, 256, 256),
        second_critic_hidden_dims: tuple[int, ...] | None = None,
        actor_lr: float = 3e-5,
        critic_lr: float = 3e-4,
        batch_size: int = 256,
        normalize_obs: bool = True,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("alpha", alpha, 0.0)
        check_range("num_actions", num_actions, 1)
        check_range("temperature", temperature, 0.0, lower_open=True)
        check_range("entropy_weight", entropy_weight, 0.0, lower_open=True)
        check_range("bc_steps", bc_steps, 0)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("lagrange_gap", lagrange_gap or 0.0)
        check_range("penalty_min", penalty_min or 0.0)
        check_range("penalty_max", penalty_max or 0.0)
        if penalty_min is not None and penalty_max is not None:
            check_range("penalty_max", penalty_max, penalty_min)
        check_range("target_entropy", target_entropy or 0.0)
        check_widths("actor_hidden_dims", actor_hidden_dims)
        check_widths("critic_hidden_dims", critic_hidden_dims)
        if second_critic_hidden_dims is not None:
            check_widths("second_critic_hidden_dims", second_critic_hidden_dims)
        if failure_reward is not None and not calibrated:
            raise UsageError("`failure_reward` is for `calibrated`, which is off. Add --model.calibrated true.")
        self.save_hyperparameters()
        if calibrated:
            self.view = TransitionView(extra=(RETURN_TO_GO,))

    def bind(self, replay: Replay) -> None:
        h, n = self.hparams, self.normalizer
        if h.calibrated:
            center, scale = float(n.reward_center), float(n.reward_scale)
            replay = with_returns_to_go(replay, h.discount, center=center, scale=scale, failure_reward=h.failure_reward)
        super().bind(replay)

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.actor = TanhGaussianPolicy(
            sizes.obs_dim,
            sizes.action_dim,
            h.actor_hidden_dims,
            log_std_multiplier=1.0,
            log_std_offset=-1.0,
            final_init=Init("xavier", 0.01),
        )
        second = h.second_critic_hidden_dims
        if second is None or tuple(second) == tuple(h.critic_hidden_dims):
            self.critic = self.make_critic(sizes, 2, h.critic_hidden_dims)
        else:
            self.critic = UnlikeCritics(self.make_critic(sizes, 1, dims) for dims in (h.critic_hidden_dims, second))
        self.target_critic = self.target_of(self.critic)
        # one number each, on the batch or ensemble axis, so that a seed axis fits in front
        self.log_entropy_weight = nn.Parameter(torch.full((1,), math.log(h.entropy_weight)))
        self.log_multiplier = nn.Parameter(torch.ones(1))

    def make_critic(self, sizes: Sizes, count: int, hidden_dims: tuple[int, ...]) -> nn.Module:
        hidden, final = Init("orthogonal", math.sqrt(2.0)), Init("orthogonal", 0.01)
        return EnsembleCritic(sizes.obs_dim, sizes.action_dim, count, hidden_dims, hidden_init=hidden, final_init=final)

    def learning_rates(self) -> dict[str, Rate]:
        h = self.hparams
        rates = {"actor": h.actor_lr, "critic": h.critic_lr}
        rates |= {"log_entropy_weight": h.actor_lr} if h.auto_entropy else {}
        return rates | ({"log_multiplier": h.critic_lr} if h.lagrange_gap is not None else {})

    def rows_per_row(self) -> dict[str, int]:
        return {"critic": 1 + 3 * self.hparams.num_actions}

    def draws(self) -> dict[str, Draw]:
        one, many = (self.sizes.action_dim,), (self.hparams.num_actions, self.sizes.action_dim)
        return {
            "policy": Draw(one),
            "backup": Draw(many if self.hparams.max_backup else one),
            "uniform": Draw(many, "uniform"),
            "current": Draw(many),
            "next": Draw(many),
        }

    def critic_loss(self, batch: Transitions, heads: Heads | None = None) -> tuple[Tensor, Metrics]:
        """``heads`` are those of the actor at s, if they are at hand."""
        h = self.hparams
        with torch.no_grad():
            mean, log_std = self.actor.heads(batch.obs) if heads is None else heads
            next_heads = self.actor.heads(batch.next_obs)
            target_q = self.target_q(batch, next_heads)
            uniform = 2.0 * batch.noise.uniform.transpose(-3, -2) - 1.0
            current, logp = self.sample_many((mean.detach(), log_std.detach()), batch.noise.current)
            following, next_logp = self.sample_many(next_heads, batch.noise.next)
            action = torch.cat((uniform, current, following, batch.action.unsqueeze(-3)), -3)
            log_uniform = torch.full_like(logp, -action.shape[-1] * math.log(2.0))
            log_density = torch.cat((log_uniform, logp, next_logp), -2)
        every_q = self.q_of_many(self.critic, batch.obs, action)
        q = every_q[..., -1, :]
        if h.calibrated:
            k = h.num_actions
            least = batch.extra[RETURN_TO_GO].unsqueeze(-2).unsqueeze(-2)
            bounded = torch.maximum(every_q[..., k : 3 * k, :], least)
            every_q = torch.cat((every_q[..., :k, :], bounded, every_q[..., 3 * k :, :]), -2)
        if h.importance_sampling:
            every_q = every_q[..., :-1, :] - log_density.unsqueeze(-3)
        gap = h.temperature * torch.logsumexp(every_q / h.temperature, -2) - q
        if h.penalty_min is not None or h.penalty_max is not None:
            gap = gap.clamp(h.penalty_min, h.penalty_max)
        gap = gap.mean(-1)
        penalty = h.alpha * gap
        if h.lagrange_gap is not None:
            penalty = self.multiplier().detach() * h.alpha * (gap - h.lagrange_gap)
        td_loss = squared_td(q, target_q)
        loss = td_loss + penalty.sum(-1)
        return loss, {
            "critic_loss": loss.detach(),
            "td_loss": td_loss.detach(),
            "penalty_gap": gap.detach().mean(-1),
            "q_mean": q.detach().mean((-2, -1)),
        }

    @torch.no_grad()
    def target_q(self, batch: Transitions, next_heads: Heads) -> Tensor:
        """r + γ·min Q̄(s', a'), (…, B); with max-backup the best of K actions."""
        h = self.hparams
        if h.max_backup:
            action, logp = self.sample_many(next_heads, batch.noise.backup)
            next_q, best = self.q_of_many(self.target_critic, batch.next_obs, action).amin(-3).max(-2)
            logp = logp.gather(-2, best.unsqueeze(-2)).squeeze(-2)
        else:
            action, logp = self.actor.sample_from(*next_heads, batch.noise.backup)
            next_q = self.target_critic(batch.next_obs, action).amin(-2)
        if h.backup_entropy:
            next_q = next_q - self.entropy_weight() * logp
        return td_target(batch.reward, batch.terminated, next_q, h.discount)

    def sample_many(self, heads: Heads, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (…, K, B, A) and log-densities (…, K, B) from noise (…, B, K, A) and heads (…, B, A)."""
        mean, log_std = heads
        return self.actor.sample_from(mean.unsqueeze(-3), log_std.unsqueeze(-3), noise.transpose(-3, -2))

    def q_of_many(self, critic: nn.Module, obs: Tensor, action: Tensor) -> Tensor:
        """q (…, E, K, B) of obs (…, B, O) and K actions for each, (…, K, B, A), as one long batch."""
        obs = obs.unsqueeze(-3).expand(*action.shape[:-1], obs.shape[-1])
        return critic(obs.flatten(-3, -2), action.flatten(-3, -2)).unflatten(-1, action.shape[-3:-1])

    def actor_loss(
        self, batch: Transitions, heads: Heads | None = None, cloning: bool = False
    ) -> tuple[Tensor, Metrics]:
        """``heads`` are those of the actor at s, if they are at hand; ``cloning`` replaces Q by log π of the data."""
        mean, log_std = self.actor.heads(batch.obs) if heads is None else heads
        action, logp = self.actor.sample_from(mean, log_std, batch.noise.policy)
        if cloning:
            value = self.actor.log_prob_from(mean, log_std, batch.action)
        else:
            value = self.critic(batch.obs, action).amin(-2)
        loss = (self.entropy_weight() * logp - value).mean(-1)
        return loss, {"actor_loss": loss.detach(), "entropy": -logp.detach().mean(-1)}

    def entropy_loss(self, entropy: Tensor) -> Tensor:
        """log w·(H - target): (…,) mean entropy of the batch → (…,)."""
        target = self.hparams.target_entropy
        target = -float(self.sizes.action_dim) if target is None else target
        return self.log_entropy_weight.squeeze(-1) * (entropy - target)

    def entropy_weight(self) -> Tensor:
        """w, (…, 1), without gradient."""
        return self.log_entropy_weight.detach().exp()

    def multiplier_loss(self, gap: Tensor) -> Tensor:
        """-m·α·(Δ - gap), with Δ (…,) the mean of the critics' penalties."""
        return -self.multiplier().squeeze(-1) * self.hparams.alpha * (gap - self.hparams.lagrange_gap)

    def multiplier(self) -> Tensor:
        """m of the Lagrange form, (…, 1)."""
        return self.log_multiplier.exp().clamp(max=MULTIPLIER_MAX)

    def phase(self, step: int) -> bool:
        """Whether the actor clones the data."""
        return step <= self.hparams.bc_steps

    def update(self, batch: Transitions, step: int) -> Metrics:
        h = self.hparams
        heads = self.actor.heads(batch.obs)
        actor_loss, metrics = self.actor_loss(batch, heads, cloning=step <= h.bc_steps)
        critic_loss, critic_metrics = self.critic_loss(batch, heads)
        if h.auto_entropy:
            metrics["entropy_weight"] = self.entropy_weight().squeeze(-1)
            self.step("log_entropy_weight", self.entropy_loss(metrics["entropy"]))
        self.step("actor", actor_loss)
        if h.lagrange_gap is not None:
            metrics["multiplier"] = self.multiplier().detach().squeeze(-1)
            self.step("log_multiplier", self.multiplier_loss(critic_metrics["penalty_gap"]))
        self.step("critic", critic_loss)
        self.track("critic", h.tau)
        return metrics | critic_metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor.mode(obs)

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor.sample(obs, noise)[0]

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.actor.log_prob(obs, action)


class UnlikeCritics(nn.Module):
    """Critics of different depth behind the interface of an ensemble."""

    def __init__(self, members: object) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)  # type: ignore[arg-type]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """q (…, E, B)."""
        return torch.cat([member(obs, action) for member in self.members], -2)
