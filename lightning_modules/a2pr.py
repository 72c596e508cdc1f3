"""A2PR — Liu et al. 2024, Adaptive Advantage-Guided Policy Regularization for Offline RL (arXiv:2405.19909).

TD3+BC whose imitation target is chosen state by state. A VAE learns the actions of the data with positive advantage;
the actor is pulled towards the better by Q₁ of the data's action and the VAE's, and only where one of the two beats
V(s). In the order of an update, with Q the critics after their own step and v = V(s) before its step:

  Critic: Σᵢ (Qᵢ(s, a) - y)², y = r + γ·min Q̄(s', a'), a' the smoothed target action.
  Value:  (V(s) - min(y, r + γ·min Q(s', a')))², with the same a'.
  VAE:    w₁·1[Q₁(s, a) > v]·(â - a)² + ½·KL, both means over batch and dimensions; gated rows count as zeros.
  Actor, every second update: -λ·Q₁(s, p) + m·(p - ã)² with p = π(s), λ = α / mean|Q₁(s, p)|,
          m = w₂·1[Q₁(s, a_v) ≥ v or Q₁(s, a) > v], a_v = VAE(s, p) and ã the better of a_v and a; then the targets.

| detail             | paper                      | authors' code                       | here                      |
|--------------------|----------------------------|-------------------------------------|---------------------------|
| threshold of gate  | ε_A on the advantage       | 0, strict                           | `advantage_threshold` 0   |
| VAE's action       | of the augmented behaviour | decodes the encoding of (s, π(s));  | `vae_action` "policy";    |
|                    |                            | unused: decodes N(0,1) cut to ±0.5  | "prior"                   |
| gradient of ã      | not stated                 | through decoder and encoder into p  | the same; `detach_target` |
| strength           | a coefficient              | w₂ times a logical or, never 2·w₂   | `bc_weight`               |
| default of w₂      | per task                   | class 1.0, command line 0.5         | 1.0; recipes per task     |
| V(s'), expectile V | -                          | computed and unused, or dead        | left out                  |
| VAE's optimiser    | -                          | Adam's default rate, 1e-3           | `vae_lr` 1e-3             |
| actions            | -                          | in ±A_max, losses in those units    | in ±1                     |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.td import smoothed_action, squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic, ValueNetwork
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.nn.vae import ActionVAE, standard_normal_kl
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes

KL_WEIGHT = 0.5  # of the authors' code


class A2PR(OfflineModule):
    """TD3 regularised towards actions of high advantage.

    Args:
        alpha: α; larger trusts Q more, 0 is plain imitation. Range ≥ 0; 2.5, and 40 on HalfCheetah.
        vae_weight: w₁, weight of the VAE's reconstruction error, ≥ 0.
        bc_weight: w₂, weight of the imitation term (the authors' `mask`), ≥ 0.
        advantage_threshold: ε_A; the VAE learns actions whose advantage is above it.
        vae_action: "policy" encodes the policy's action and decodes a draw; "prior" decodes a draw from the prior cut
            to ±0.5.
        detach_target: stop the gradient of the imitation target; off in the authors' code.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the targets, in [0, 1].
        policy_noise: standard deviation of the target action's noise, in units of the scaled action (±1), ≥ 0.
        noise_clip: bound on that noise, ≥ 0.
        policy_freq: critic updates per actor and target update, ≥ 1.
        actor_hidden_dims: widths of the actor's hidden layers.
        critic_hidden_dims: widths of the hidden layers of the critics and the state value.
        vae_hidden_dims: widths of the hidden layers of encoder and decoder.
        actor_lr: Adam's learning rate of the actor.
        critic_lr: Adam's learning rate of the critics.
        value_lr: Adam's learning rate of the state value.
        vae_lr: Adam's learning rate of the VAE.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3).
        reward_transform: "r", an affine form such as "0.1r" or "10000r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("critic_loss", "value_loss", "vae_loss", "actor_loss")

    def __init__(
        self,
        *,
        alpha: float = 2.5,
        vae_weight: float = 1.0,
        bc_weight: float = 1.0,
        advantage_threshold: float = 0.0,
        vae_action: Literal["policy", "prior"] = "policy",
        detach_target: bool = False,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        actor_hidden_dims: tuple[int, ...] = (256, 256, 256),
        critic_hidden_dims: tuple[int, ...] = (256, 256, 256, 256),
        vae_hidden_dims: tuple[int, ...] = (750, 750),
        actor_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        value_lr: float = 3e-4,
        vae_lr: float = 1e-3,
        batch_size: int = 256,
        normalize_obs: bool = True,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("alpha", alpha, 0.0)
        check_range("vae_weight", vae_weight, 0.0)
        check_range("bc_weight", bc_weight, 0.0)
        check_range("advantage_threshold", advantage_threshold)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("policy_noise", policy_noise, 0.0)
        check_range("noise_clip", noise_clip, 0.0, infinite=True)
        check_range("policy_freq", policy_freq, 1)
        if vae_action not in ("policy", "prior"):
            raise UsageError(f"`vae_action` is {vae_action!r}; expected 'policy' or 'prior'.")
        check_widths("actor_hidden_dims", actor_hidden_dims)
        check_widths("critic_hidden_dims", critic_hidden_dims)
        check_widths("vae_hidden_dims", vae_hidden_dims)
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, h.actor_hidden_dims)
        self.critic = EnsembleCritic(sizes.obs_dim, sizes.action_dim, 2, h.critic_hidden_dims)
        self.value = ValueNetwork(sizes.obs_dim, h.critic_hidden_dims)
        self.vae = ActionVAE(sizes.obs_dim, sizes.action_dim, hidden_dims=h.vae_hidden_dims)
        self.target_actor, self.target_critic = self.target_of(self.actor), self.target_of(self.critic)

    def learning_rates(self) -> dict[str, Rate]:
        h = self.hparams
        return {"critic": h.critic_lr, "value": h.value_lr, "vae": h.vae_lr, "actor": h.actor_lr}

    def draws(self) -> dict[str, Draw]:
        latent = 2 * self.sizes.action_dim
        return {"target": Draw((self.sizes.action_dim,)), "vae": Draw((latent,)), "actor": Draw((latent,))}

    @torch.no_grad()
    def next_step(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """The smoothed target action a' (…, B, A) and min Q̄(s', a') (…, B); both losses below share them."""
        h = self.hparams
        next_action = self.target_actor(batch.next_obs)
        next_action = smoothed_action(next_action, batch.noise.target, h.policy_noise, h.noise_clip)
        return next_action, self.target_critic(batch.next_obs, next_action).amin(-2)

    @torch.no_grad()
    def data_q(self, batch: Transitions) -> Tensor:
        """Q₁(s, a) of the data's actions, (…, B)."""
        return self.critic.member(batch.obs, batch.action)

    def critic_loss(self, batch: Transitions, next_q: Tensor) -> tuple[Tensor, Metrics]:
        """``next_q (…, B)`` is min Q̄(s', a') of :meth:`next_step`."""
        target_q = td_target(batch.reward, batch.terminated, next_q, self.hparams.discount)
        q = self.critic(batch.obs, batch.action)
        loss = squared_td(q, target_q)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1))}

    def value_loss(self, batch: Transitions, v: Tensor, next_action: Tensor, next_q: Tensor) -> tuple[Tensor, Metrics]:
        """Call after the critics' step, with ``v (…, B)``, V(s), and both results of :meth:`next_step`."""
        with torch.no_grad():
            online_q = self.critic(batch.next_obs, next_action).amin(-2)
            next_v = torch.minimum(next_q, online_q)
            target_v = td_target(batch.reward, batch.terminated, next_v, self.hparams.discount)
        loss = (v - target_v).square().mean(-1)
        return loss, {"value_loss": loss.detach(), "v_mean": v.detach().mean(-1)}

    def vae_loss(self, batch: Transitions, v: Tensor, data_q: Tensor) -> tuple[Tensor, Metrics]:
        """``v (…, B)``: V(s) before its step; ``data_q (…, B)``: Q₁(s, a) after the critics' step."""
        action, mean, log_std = self.vae(batch.obs, batch.action, batch.noise.vae)
        better = (data_q - v > self.hparams.advantage_threshold).to(v.dtype)
        error = (better * (action - batch.action).square().mean(-1)).mean(-1)
        kl = standard_normal_kl(mean, log_std).mean((-2, -1))
        loss = self.hparams.vae_weight * error + KL_WEIGHT * kl
        return loss, {"vae_loss": loss.detach(), "vae_kl": kl.detach(), "advantage_positive": better.mean(-1)}

    def actor_loss(self, batch: Transitions, v: Tensor, data_q: Tensor) -> tuple[Tensor, Metrics]:
        """Arguments as of :meth:`vae_loss`; call after the VAE's step."""
        h = self.hparams
        action = self.actor(batch.obs)
        q = self.critic.member(batch.obs, action)
        lambda_ = h.alpha / self.batch_mean(q.abs())
        if h.vae_action == "policy":
            vae_action = self.vae(batch.obs, action, batch.noise.actor)[0]
        else:
            vae_action = self.vae.decode(batch.obs, batch.noise.actor.clamp(-0.5, 0.5))
        with torch.no_grad():
            vae_q = self.critic.member(batch.obs, vae_action)
            chosen = vae_q >= data_q  # v cancels; ties go to the VAE
            switch = h.bc_weight * ((vae_q >= v) | (data_q > v)).to(v.dtype)
        target = torch.where(chosen.unsqueeze(-1), vae_action, batch.action)
        if h.detach_target:
            target = target.detach()
        bc_loss = (switch * (action - target).square().mean(-1)).mean(-1)
        loss = bc_loss - lambda_ * q.mean(-1)
        metrics = {"actor_loss": loss, "bc_loss": bc_loss, "vae_chosen": chosen.to(v.dtype).mean(-1)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def phase(self, step: int) -> bool:
        """Whether actor and targets move."""
        return step % self.hparams.policy_freq == 0

    def update(self, batch: Transitions, step: int) -> Metrics:
        next_action, next_q = self.next_step(batch)
        loss, metrics = self.critic_loss(batch, next_q)
        self.step("critic", loss)
        v = self.value(batch.obs)
        loss, value_metrics = self.value_loss(batch, v, next_action, next_q)
        self.step("value", loss)
        v = v.detach()  # from before its step
        data_q = self.data_q(batch)
        loss, vae_metrics = self.vae_loss(batch, v, data_q)
        self.step("vae", loss)
        metrics |= value_metrics | vae_metrics
        if step % self.hparams.policy_freq == 0:
            loss, actor_metrics = self.actor_loss(batch, v, data_q)
            self.step("actor", loss)
            self.track("critic", self.hparams.tau)
            self.track("actor", self.hparams.tau)
            metrics |= actor_metrics
        return metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)
