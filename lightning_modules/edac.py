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

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.sac import SAC
from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range
from offpolicy.losses.td import squared_td
from offpolicy.nn.critics import state_action
from offpolicy.training.offline import Metrics


class EDAC(SAC):
    """Soft actor-critic with an ensemble of diversified critics. Further arguments as of SAC.

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
        update_order, init, log_std_min, log_det_eps: as of SAC, with the values of the table above.
    """

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
        update_order: Literal["together", "actor_first", "critic_first"] = "actor_first",
        init: Literal["rlkit", "edac", "xavier"] = "edac",
        log_std_min: float = -5.0,
        log_det_eps: float = 1e-6,
        **options: Any,
    ) -> None:
        check_range("eta", eta, 0.0)
        if eta > 0 and num_critics < 2:
            check_range("num_critics", num_critics, 1)
            raise UsageError("`eta` > 0 compares critics with each other; expected `num_critics` ≥ 2, or `eta` 0.")
        super().__init__(
            num_critics=num_critics,
            target_entropy=target_entropy,
            discount=discount,
            tau=tau,
            hidden_dims=hidden_dims,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            entropy_lr=entropy_lr,
            batch_size=batch_size,
            normalize_obs=normalize_obs,
            reward_transform=reward_transform,
            max_grad_norm=max_grad_norm,
            update_order=update_order,
            init=init,
            log_std_min=log_std_min,
            log_det_eps=log_det_eps,
            **options,
        )

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        eta = self.hparams.eta
        if not eta:
            return super().critic_loss(batch)
        target_q = self.target_q(batch)
        q, gradient = self.q_and_gradient(batch.obs, batch.action)
        diversity = diversity_loss(gradient)
        loss = squared_td(q, target_q) + eta * diversity
        return loss, self.critic_metrics(loss, q) | {"diversity_loss": diversity.detach()}

    @torch.compiler.disable  # compiled graphs have no second derivative
    def q_and_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """q (…, E, B) and each critic's gradient in the action (…, E, B, A), differentiable, from one pass."""
        each = action.unsqueeze(-3).repeat_interleave(self.hparams.num_critics, -3).requires_grad_()
        q = self.critic.net(state_action(obs.unsqueeze(-3), each)).squeeze(-1)
        return q, torch.autograd.grad(q.sum(), each, create_graph=True)[0]


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
