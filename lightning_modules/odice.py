"""O-DICE — Mao et al. 2024, Revealing the Mystery of Distribution Correction Estimation via Orthogonal-gradient
Update (arXiv:2402.00348).

One state value by the dual of regularised RL, min over V of (1-λ)·E[V(s)] + λ·E[f*(r + γ·V(s') - V(s))], and a policy
by weighted cloning. The gradients through V(s) and V(s') fight, so the second is made orthogonal to the first:

  y_F = r + γ·V̄(s') - v(s),  y_B = r + γ·v(s') - V̄(s), with V̄ the minimum over the target heads, no gradient;
  g_F = ∇ mean λ·f*(y_F),  g_B = ∇ mean λ·η·f*(y_B),  c = g_F·g_B / max(g_F·g_F, 1e-10) over all value parameters;
  value step along ∇ mean (1-λ)·v(s) + g_F + (g_B - c·g_F), then V̄, then
  actor: -mean w(y_F)·log π(a|s), y_F as it was before the value step. Means are over heads and batch.

Imitation (`expert_episode`): the same update on one episode with rewards 0, no discriminator and no other data, so
the residual is γ·V(s') - V(s). The authors' settings for it: λ 0.4, both learning rates 1e-4, `tanh_mean`, no layer
norm, `normalize_obs` (measured on that episode), weight decay 1e-5 on Hopper and 1e-3 on Walker2d.

| detail            | paper                  | authors' code                         | here                            |
|-------------------|------------------------|---------------------------------------|---------------------------------|
| weight for χ²     | max(0, (f')⁻¹(y))      | max(y, 0)                             | the code's; `exact_weights`     |
| value heads       | one is said to suffice | two, minimum of targets (most tasks)  | `num_values` 2                  |
| linear term       | -                      | added after the projection, unscaled  | the code's                      |
| reverse KL        | exp(y - 1)             | the same, not capped in the loss      | the code's                      |
| other gradients   | ablations              | semi; true: y = r + γ·v(s') - v(s)    | `gradient`                      |
| return range      | -                      | episodes cut at terminals or every    | of the true episodes, so the    |
|                   |                        | 1000 rows of a stream with rows lost  | scale differs a little          |
| s' at a time limit| -                      | imitation: the next episode's start   | left out, or the true s' where  |
|                   |                        |                                       | the data have it                |
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.optim import FusedAdam, gradients
from offpolicy.data.replay import Replay
from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.dice import DIVERGENCES, Divergence, conjugate, policy_weight, projection
from offpolicy.losses.td import td_target
from offpolicy.nn.policies import GaussianPolicy
from offpolicy.nn.stacked import MLP
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes


class ValueTerms(NamedTuple):
    """The parts of the value loss, one number per seed each, and the residual that weighs the policy.

    ``linear (…,)``: mean (1-λ)·v(s); ``forward (…,)``: mean λ·f*(y_F); ``backward (…,)``: mean λ·η·f*(y_B), only with
    orthogonal gradients; ``residual (…, E, B)``: y_F of each head, detached.
    """

    linear: Tensor
    forward: Tensor
    backward: Tensor | None
    residual: Tensor


class ODICE(OfflineModule):
    """DICE with orthogonal-gradient update.

    Args:
        lambda_: λ; larger weighs the residual against the values themselves, in (0, 1). 0.6, imitation 0.4.
        eta: η, weight of the projected backward gradient, ≥ 0; 0 is the semi-gradient.
        divergence: f: "pearson_chi2", (w - 1)², or "reverse_kl", w·log w.
        gradient: "orthogonal"; "semi" drops the gradient of V(s'); "true" keeps both as they are, without targets.
        exact_weights: weigh the policy by the maximiser of the conjugate instead of max(y, 0) (χ² only).
        weight_max: cap on the policy's weights, > 0.
        expert_episode: imitation: train on this episode alone (its number in the data, from 0) with rewards 0; None
            for reinforcement learning on all data.
        num_values: value heads, ≥ 1; targets take their minimum. The authors use 1 for antmaze-large-* and
            antmaze-umaze-diverse.
        layer_norm: normalise the hidden layers of the value before their activation; off for AntMaze and imitation.
        tanh_mean: squash the policy's mean; on for imitation.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the target value, in [0, 1].
        value_hidden_dims: widths of the value's hidden layers.
        actor_hidden_dims: widths of the policy's hidden layers.
        value_lr: Adam's learning rate of the value.
        actor_lr: Adam's learning rate of the policy.
        weight_decay: L2 term of the policy's Adam, log standard deviations included, ≥ 0.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations; on for imitation.
        reward_transform: "return_range" (r·1000 / (largest - smallest return)), "3r-3" for AntMaze, "r" or another
            affine form. Not used in imitation.
        max_grad_norm: limit on each network's gradient norm, after the projection, > 0; None for no limit.
    """

    compiled = ("actor_loss",)

    def __init__(
        self,
        *,
        lambda_: float = 0.6,
        eta: float = 1.0,
        divergence: Divergence = "pearson_chi2",
        gradient: Literal["orthogonal", "semi", "true"] = "orthogonal",
        exact_weights: bool = False,
        weight_max: float = 100.0,
        expert_episode: int | None = None,
        num_values: int = 2,
        layer_norm: bool = True,
        tanh_mean: bool = False,
        discount: float = 0.99,
        tau: float = 0.005,
        value_hidden_dims: tuple[int, ...] = (256, 256),
        actor_hidden_dims: tuple[int, ...] = (1024, 1024),
        value_lr: float = 2e-4,
        actor_lr: float = 2e-4,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        normalize_obs: bool = False,
        reward_transform: str = "return_range",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("lambda_", lambda_, 0.0, 1.0, lower_open=True, upper_open=True)
        check_range("eta", eta, 0.0)
        check_range("weight_max", weight_max, 0.0, lower_open=True, infinite=True)
        check_range("num_values", num_values, 1)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("weight_decay", weight_decay, 0.0)
        if divergence not in DIVERGENCES:
            raise UsageError(f"`divergence` is {divergence!r}; expected one of {DIVERGENCES}.")
        if gradient not in ("orthogonal", "semi", "true"):
            raise UsageError(f"`gradient` is {gradient!r}; expected 'orthogonal', 'semi' or 'true'.")
        if expert_episode is not None:
            check_range("expert_episode", expert_episode, 0)
        check_widths("value_hidden_dims", value_hidden_dims)
        check_widths("actor_hidden_dims", actor_hidden_dims)
        self.save_hyperparameters()
        if expert_episode is not None:
            self.hparams.reward_transform = "r"  # rewards that are all 0 have no range

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        norm: Literal["before"] | None = "before" if h.layer_norm else None
        self.value = MLP(sizes.obs_dim, h.value_hidden_dims, 1, stack=(h.num_values,), layer_norm=norm)
        self.target_value = self.target_of(self.value)
        self.actor = GaussianPolicy(
            sizes.obs_dim, sizes.action_dim, h.actor_hidden_dims, log_std_min=-5.0, tanh_mean=h.tanh_mean
        )

    def select(self, replay: Replay) -> Replay:
        episode = self.hparams.expert_episode
        if episode is None:
            return replay
        if episode >= replay.num_episodes:
            raise UsageError(
                f"`expert_episode` is {episode}; expected a number from 0 to {replay.num_episodes - 1}, as the data "
                f"have {replay.num_episodes} episodes."
            )
        expert = replay.filter([episode])
        expert.steps["reward"] = np.zeros(len(replay.steps["reward"]), np.float32)
        return expert

    def learning_rates(self) -> dict[str, Rate]:
        return {"value": self.hparams.value_lr, "actor": self.hparams.actor_lr}

    def make_optimizer(self, name: str, params: list[Tensor]) -> FusedAdam:
        return FusedAdam(params, weight_decay=self.hparams.weight_decay if name == "actor" else 0.0)

    def value_terms(self, batch: Transitions) -> ValueTerms:
        """The parts of the value loss; in float32 also under mixed precision, which would break orthogonality."""
        h = self.hparams
        reward, terminated = batch.reward.unsqueeze(-2), batch.terminated.unsqueeze(-2)
        backward = None
        with torch.autocast(self.device.type, enabled=False):
            v = heads(self.value, batch.obs)
            if h.gradient == "true":
                next_v = heads(self.value, batch.next_obs)
                residual = td_target(reward, terminated, next_v, h.discount) - v
            else:
                with torch.no_grad():
                    target_next_v = heads(self.target_value, batch.next_obs).amin(-2, keepdim=True)
                residual = td_target(reward, terminated, target_next_v, h.discount) - v
            if h.gradient == "orthogonal":
                with torch.no_grad():
                    target_v = heads(self.target_value, batch.obs).amin(-2, keepdim=True)
                next_v = heads(self.value, batch.next_obs)
                back_residual = td_target(reward, terminated, next_v, h.discount) - target_v
                backward = h.lambda_ * h.eta * conjugate(back_residual, h.divergence).mean((-2, -1))
            linear = (1.0 - h.lambda_) * v.mean((-2, -1))
            forward = h.lambda_ * conjugate(residual, h.divergence).mean((-2, -1))
        return ValueTerms(linear, forward, backward, residual.detach())

    def value_gradient(self, terms: ValueTerms) -> tuple[list[Tensor], Tensor]:
        """Gradient of this process's rows with the global projection, per value parameter, and c: () or (S,)."""
        assert terms.backward is not None
        params = self.params("value")
        seed_axes = len(self.seeds) > 0

        def gradient(term: Tensor, keep_graph: bool = False) -> Tensor:
            parts = gradients(term.sum(), params, keep_graph=keep_graph)
            return torch.cat([part.flatten(int(seed_axes)) for part in parts], -1)

        linear = gradient(terms.linear, keep_graph=True)  # shares v(s) with the forward term
        forward, backward = gradient(terms.forward), gradient(terms.backward)
        # c belongs to the means over all processes; the rest is linear in the gradients, so `step` averages it later
        c = projection(*self.reduce_gradients([forward, backward]))
        flat = linear + backward + (1.0 - c).unsqueeze(-1) * forward
        sizes = [p.numel() // max(len(self.seeds), 1) for p in params]
        return [part.view_as(p) for part, p in zip(flat.split(sizes, -1), params, strict=True)], c

    def actor_loss(self, batch: Transitions, residual: Tensor) -> tuple[Tensor, Metrics]:
        """``residual (…, E, B)`` is that of :meth:`value_terms`, from before the value step."""
        h = self.hparams
        weight = policy_weight(residual, h.divergence, exact=h.exact_weights, maximum=h.weight_max).mean(-2)
        loss = -(weight * self.actor.log_prob(batch.obs, batch.action)).mean(-1)
        return loss, {"actor_loss": loss.detach(), "weight_mean": weight.mean(-1)}

    def update(self, batch: Transitions, step: int) -> Metrics:
        terms = self.value_terms(batch)
        metrics = {
            "value_loss": (terms.linear + terms.forward).detach(),
            "v_mean": terms.linear.detach() / (1.0 - self.hparams.lambda_),
            "residual_mean": terms.residual.mean((-2, -1)),
        }
        if self.hparams.gradient == "orthogonal":
            grads, metrics["projection"] = self.value_gradient(terms)
            self.step("value", grads=grads)
        else:
            self.step("value", terms.linear + terms.forward)
        self.track("value", self.hparams.tau)
        loss, actor_metrics = self.actor_loss(batch, terms.residual)
        self.step("actor", loss)
        return metrics | actor_metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor.sample(obs, noise)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.actor.log_prob(obs, action)


def heads(value: MLP, obs: Tensor) -> Tensor:
    """v (…, E, B) of every head, of obs (…, B, O)."""
    return value(obs.unsqueeze(-3)).squeeze(-1)
