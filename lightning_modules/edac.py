"""EDAC and SAC-N — An et al. 2021, Uncertainty-Based Offline RL with Diversified Q-Ensemble (arXiv:2110.01548).

Soft actor-critic whose N critics are pessimistic by their minimum (SAC-N, η = 0); EDAC pushes the critics' gradients
with respect to the action apart, so that fewer of them do. In the order of an update:

  Entropy weight: -log α·mean (log π(ã|s) - A); the new α is used at once.
  Actor:  mean [α·log π(ã|s) - minᵢ Qᵢ(s, ã)].
  Critic: Σᵢ mean (Qᵢ(s, a) - y)² + η·L, y = r + γ·(minᵢ Q̄ᵢ(s', a') - α·log π(a'|s')),
          L = mean Σ_{i≠j} ⟨gᵢ, gⱼ⟩ / (N - 1), gᵢ the normalised gradient of Qᵢ in a, at the actions of the data.

| detail              | paper       | authors' code; CORL's if other             | here                      |
|---------------------|-------------|--------------------------------------------|---------------------------|
| pairs in L          | all         | of min(N, A) critics chosen at random; all | all                       |
| pass for L          | -           | one of its own                             | that of the TD error      |
| α in the losses     | -           | before its step; after it                  | after its step            |
| actions in α's loss | the actor's | the actor's; drawn anew                    | drawn anew, from one pass |
| critics' start      | -           | -; 1/√out, as weights are (in, out)        | 1/√out                    |
| log-density         | -           | + 1e-6 inside the logarithm                | + 1e-6                    |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.td import squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic, state_action
from offpolicy.nn.policies import TanhGaussianPolicy
from offpolicy.nn.stacked import Init
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes

Heads = tuple[Tensor, Tensor]


class EDAC(OfflineModule):
    """Soft actor-critic with an ensemble of diversified critics.

    Args:
        num_critics: N, ≥ 1, and ≥ 2 where η > 0. 10 for most tasks; SAC-N needs up to 500.
        eta: η, weight of the diversity loss, ≥ 0; 0 is SAC-N.
        target_entropy: entropy that α steers to, nats; None takes -A.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the target critics, in [0, 1].
        hidden_dims: widths of the hidden layers of actor and critics.
        actor_lr: Adam's learning rate of the actor.
        critic_lr: Adam's learning rate of the critics.
        entropy_lr: Adam's learning rate of log α.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3); off in the paper.
        reward_transform: "r", an affine form such as "0.1r" or "r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("entropy_loss", "actor_loss", "critic_loss")

    def __init__(
        self,
        *,
        num_critics: int = 10,
        eta: float = 1.0,
        target_entropy: float | None = None,
        discount: float = 0.99,
        tau: float = 0.005,
        hidden_dims: tuple[int, ...] = (256, 256, 256),
        actor_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        entropy_lr: float = 3e-4,
        batch_size: int = 256,
        normalize_obs: bool = False,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("num_critics", num_critics, 1)
        check_range("eta", eta, 0.0)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        if eta > 0 and num_critics < 2:
            raise UsageError("`eta` > 0 compares critics with each other; expected `num_critics` ≥ 2, or `eta` 0.")
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.actor = TanhGaussianPolicy(
            sizes.obs_dim,
            sizes.action_dim,
            h.hidden_dims,
            log_std_min=-5.0,
            log_std_max=2.0,
            log_det_eps=1e-6,
            hidden_init=Init("default", bias=0.1),
            final_init=Init("uniform", 1e-3),
        )
        critic: Any = EnsembleCritic(
            sizes.obs_dim, sizes.action_dim, h.num_critics, h.hidden_dims, final_init=Init("uniform", 3e-3)
        )
        for layer in critic.net.layers[:-1]:  # 1/√out, not 1/√in: see the table above
            layer.reset_parameters(Init("uniform", layer.weight.shape[-1] ** -0.5, bias=0.1))
        self.critic = critic
        self.target_critic = self.target_of(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros(1))  # one number on the batch axis: a seed axis fits in front

    def learning_rates(self) -> dict[str, Rate]:
        h = self.hparams
        return {"log_alpha": h.entropy_lr, "actor": h.actor_lr, "critic": h.critic_lr}

    def draws(self) -> dict[str, Draw]:
        return {name: Draw((self.sizes.action_dim,)) for name in ("alpha", "policy", "target")}

    def alpha(self) -> Tensor:
        """α, (…, 1), without gradient."""
        return self.log_alpha.detach().exp()

    def entropy_loss(self, batch: Transitions, heads: Heads | None = None) -> tuple[Tensor, Metrics]:
        """``heads`` are those of the actor at s, if they are at hand."""
        target = self.hparams.target_entropy
        target = -float(batch.action.shape[-1]) if target is None else target
        with torch.no_grad():
            mean, log_std = self.actor.heads(batch.obs) if heads is None else heads
            _, logp = self.actor.sample_from(mean, log_std, batch.noise.alpha)
        loss = -(self.log_alpha * (logp + target)).mean(-1)
        return loss, {"entropy": -logp.mean(-1)}

    def actor_loss(self, batch: Transitions, heads: Heads | None = None) -> tuple[Tensor, Metrics]:
        """``heads`` are those of the actor at s, if they are at hand."""
        mean, log_std = self.actor.heads(batch.obs) if heads is None else heads
        action, logp = self.actor.sample_from(mean, log_std, batch.noise.policy)
        q = self.critic(batch.obs, action).amin(-2)
        loss = (self.alpha() * logp - q).mean(-1)
        return loss, {"actor_loss": loss.detach()}

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        h = self.hparams
        with torch.no_grad():
            next_action, next_logp = self.actor.sample(batch.next_obs, batch.noise.target)
            next_q = self.target_critic(batch.next_obs, next_action).amin(-2) - self.alpha() * next_logp
            target_q = td_target(batch.reward, batch.terminated, next_q, h.discount)
        if h.eta:
            q, gradient = self.q_and_gradient(batch.obs, batch.action)
            diversity = diversity_loss(gradient)
            loss = squared_td(q, target_q) + h.eta * diversity
            metrics = {"diversity_loss": diversity.detach()}
        else:
            q = self.critic(batch.obs, batch.action)
            loss, metrics = squared_td(q, target_q), {}
        q_std = {"q_std": q.detach().std(-2, correction=0).mean(-1)}
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1)), **q_std, **metrics}

    @torch.compiler.disable  # compiled graphs have no second derivative
    def q_and_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """q (…, E, B) and each critic's gradient in the action (…, E, B, A), differentiable, from one pass."""
        each = action.unsqueeze(-3).repeat_interleave(self.hparams.num_critics, -3).requires_grad_()
        q = self.critic.net(state_action(obs.unsqueeze(-3), each)).squeeze(-1)
        return q, torch.autograd.grad(q.sum(), each, create_graph=True)[0]

    def update(self, batch: Transitions, step: int) -> Metrics:
        heads = self.actor.heads(batch.obs)
        loss, metrics = self.entropy_loss(batch, heads)
        self.step("log_alpha", loss)
        loss, actor_metrics = self.actor_loss(batch, heads)
        self.step("actor", loss)
        loss, critic_metrics = self.critic_loss(batch)
        self.step("critic", loss)
        self.track("critic", self.hparams.tau)
        return metrics | actor_metrics | critic_metrics | {"entropy_weight": self.alpha().squeeze(-1)}

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor.mode(obs)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.actor.log_prob(obs, action)


class SACN(EDAC):
    """SAC-N: EDAC without the diversity loss, hence with more critics. Arguments as of EDAC."""

    def __init__(self, *, num_critics: int = 10, eta: float = 0.0, **options: Any) -> None:
        super().__init__(num_critics=num_critics, eta=eta, **options)


def diversity_loss(gradient: Tensor) -> Tensor:
    """Mean over the batch of Σ_{i≠j} ⟨gᵢ, gⱼ⟩ / (N - 1), gᵢ the normalised gradients (EDAC, arXiv:2110.01548).

    The double sum is |Σ gᵢ|² - Σ|gᵢ|²: no N × N table.

    Args:
        gradient: ∇ₐQᵢ(s, a), (…, N, B, A), N ≥ 2.

    Returns:
        (…,), in [-N / (N - 1), N]: N for parallel gradients, 0 for orthogonal ones.
    """
    # 1e-10: the authors' guard against a zero gradient
    unit = gradient / (torch.linalg.vector_norm(gradient, dim=-1, keepdim=True) + 1e-10)
    pairs = unit.sum(-3).square().sum(-1) - unit.square().sum((-3, -1))
    return pairs.mean(-1) / (gradient.shape[-3] - 1)
