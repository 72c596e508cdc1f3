"""SAC — Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications (arXiv:1812.05905).

With N critics it is SAC-N (arXiv:2110.01548), with layer norm and a random subset of them RLPD (Ball et al. 2023,
arXiv:2302.02948).

  Critic: Σᵢ mean (Qᵢ(s, a) - y)², y = r + γ·(minᵢ Q̄ᵢ(s', a') - α·log π(a'|s')), the minimum over all or M critics.
  Actor:  mean [α·log π(ã|s) - minᵢ Qᵢ(s, ã)], or with the mean of the critics.
  Entropy weight: -log α·mean (log π(ã|s) + H̄).

The defaults are rlkit's, which made D4RL's locomotion data. Where codes differ:

| detail           | paper | rlkit         | RLPD                   | EDAC and SAC-N (CORL)      | option            |
|------------------|-------|---------------|------------------------|----------------------------|-------------------|
| order            | -     | all losses of | critics; actor on the  | α; actor with the new α;   | `update_order`    |
|                  |       | old weights   | new critics, α after   | critics with the new actor |                   |
| actor's steps    | each  | each          | every UTD-th           | each                       | `policy_freq`     |
| actor's Q        | min   | min           | mean                   | min                        | `actor_q`         |
| target's critics | 2     | 2             | 2 drawn of 10          | all N                      | `num_min_critics` |
| H̄               | -A    | -A            | -A/2                   | -A                         | `target_entropy`  |
| log σ at least   | -     | -20           | -20                    | -5                         | `log_std_min`     |
| log-density      | -     | exact         | exact                  | + 1e-6 in the logarithm    | `log_det_eps`     |
| start            | -     | U(±1/√out)    | Xavier                 | the same, biases 0.1       | `init`            |
| loss of α        | in α  | in log α      | in α                   | in log α                   | here in log α     |
| loss of a critic | ½ MSE | MSE           | MSE, mean over critics | MSE                        | here MSE, summed  |

Entropies are of actions scaled to [-1, 1], not of the environment's units.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range, check_widths, nearest
from offpolicy.losses.td import squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.nn.policies import TanhGaussianPolicy
from offpolicy.nn.stacked import MLP, Init
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes

Heads = tuple[Tensor, Tensor]
CHOICES = {
    "update_order": ("together", "actor_first", "critic_first"),
    "actor_q": ("min", "mean"),
    "init": ("rlkit", "edac", "xavier"),
}


class SAC(OfflineModule):
    """Soft actor-critic with a learnt entropy weight.

    Args:
        num_critics: N, ≥ 1.
        num_min_critics: M critics, drawn anew for every update, whose minimum is the target, in [1, N]; None for all.
        actor_q: the "min" or the "mean" of the critics, which the actor climbs.
        policy_freq: critic updates per update of actor and entropy weight, ≥ 1; RLPD's update-to-data ratio.
        update_order: "together" takes all losses from the weights before the update; "critic_first" moves critics, then
            actor, then α; "actor_first" moves α, then the actor, then the critics, with actions of α's own.
        target_entropy: H̄, entropy that α steers to, nats; None takes -A.
        init_alpha: α at the start, > 0.
        learn_alpha: whether α is learnt.
        backup_entropy: whether the target has the entropy term.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the target critics, in [0, 1].
        hidden_dims: widths of the hidden layers of actor and critics.
        layer_norm: normalise the critics' hidden layers before their activation.
        init: how networks start: "rlkit" (U(±1/√out), biases 0, small last layers), "edac" (the same for critics, the
            actor's hidden layers U(±1/√in), biases 0.1) or "xavier" (all layers, biases 0).
        log_std_min: lower clamp of the log standard deviation; the upper one is 2.
        log_det_eps: ≥ 0, added to 1 - tanh² in the density's logarithm; 0 for the exact form.
        actor_lr: Adam's learning rate of the actor.
        critic_lr: Adam's learning rate of the critics.
        entropy_lr: Adam's learning rate of log α.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3).
        reward_transform: "r", an affine form such as "0.1r" or "r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("entropy_loss", "actor_loss", "critic_loss")

    def __init__(
        self,
        *,
        num_critics: int = 2,
        num_min_critics: int | None = None,
        actor_q: Literal["min", "mean"] = "min",
        policy_freq: int = 1,
        update_order: Literal["together", "actor_first", "critic_first"] = "together",
        target_entropy: float | None = None,
        init_alpha: float = 1.0,
        learn_alpha: bool = True,
        backup_entropy: bool = True,
        discount: float = 0.99,
        tau: float = 0.005,
        hidden_dims: tuple[int, ...] = (256, 256),
        layer_norm: bool = False,
        init: Literal["rlkit", "edac", "xavier"] = "rlkit",
        log_std_min: float = -20.0,
        log_det_eps: float = 0.0,
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
        if num_min_critics is not None:
            check_range("num_min_critics", num_min_critics, 1, num_critics)
        check_range("policy_freq", policy_freq, 1)
        check_range("init_alpha", init_alpha, 0.0, lower_open=True)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("target_entropy", target_entropy or 0.0)
        check_range("log_std_min", log_std_min, high=2.0)
        check_range("log_det_eps", log_det_eps, 0.0)
        check_widths("hidden_dims", hidden_dims)
        for name, given in (("update_order", update_order), ("actor_q", actor_q), ("init", init)):
            if given not in CHOICES[name]:
                known = ", ".join(CHOICES[name])
                raise UsageError(f"`{name}` is {given!r}; expected one of {known}.{nearest(str(given), CHOICES[name])}")
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        xavier = Init("xavier")
        hidden = {"rlkit": None, "edac": Init("default", bias=0.1), "xavier": xavier}[h.init]
        self.actor = TanhGaussianPolicy(
            sizes.obs_dim,
            sizes.action_dim,
            h.hidden_dims,
            log_std_min=h.log_std_min,
            log_std_max=2.0,
            log_det_eps=h.log_det_eps,
            hidden_init=hidden,
            final_init=xavier if h.init == "xavier" else Init("uniform", 1e-3),
        )
        self.critic = EnsembleCritic(
            sizes.obs_dim,
            sizes.action_dim,
            h.num_critics,
            h.hidden_dims,
            layer_norm="before" if h.layer_norm else None,
            layer_norm_eps=1e-6,  # Flax's, which RLPD's code uses
            hidden_init=xavier if h.init == "xavier" else None,
            final_init=xavier if h.init == "xavier" else Init("uniform", 3e-3),
        )
        if h.init == "rlkit":
            start_by_width(self.actor.net, bias=0.0)
        if h.init != "xavier":
            start_by_width(self.critic.net, bias=0.0 if h.init == "rlkit" else 0.1)
        self.target_critic = self.target_of(self.critic)
        # one number on the batch axis: a seed axis fits in front
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(h.init_alpha)), requires_grad=h.learn_alpha)

    def learning_rates(self) -> dict[str, Rate]:
        h = self.hparams
        rates: dict[str, Rate] = {"log_alpha": h.entropy_lr} if h.learn_alpha else {}
        return rates | {"actor": h.actor_lr, "critic": h.critic_lr}

    def draws(self) -> dict[str, Draw]:
        h = self.hparams
        names = ("alpha", "policy", "target") if h.update_order == "actor_first" else ("policy", "target")
        found = {name: Draw((self.sizes.action_dim,)) for name in names}
        return found if h.num_min_critics is None else found | {"subset": Draw((h.num_critics,), "uniform", False)}

    def alpha(self) -> Tensor:
        """α, (…, 1), without gradient."""
        return self.log_alpha.detach().exp()

    def target_q(self, batch: Transitions) -> Tensor:
        """y, (…, B), without gradient."""
        h = self.hparams
        with torch.no_grad():
            next_action, next_logp = self.actor.sample(batch.next_obs, batch.noise.target)
            members = None
            if h.num_min_critics is not None:  # the order of N uniforms is a random permutation
                members = batch.noise.subset[..., 0, :].argsort(-1)[..., : h.num_min_critics]
            next_q = self.target_critic(batch.next_obs, next_action, members).amin(-2)
            if h.backup_entropy:
                next_q = next_q - self.alpha() * next_logp
            return td_target(batch.reward, batch.terminated, next_q, h.discount)

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        target_q = self.target_q(batch)
        q = self.critic(batch.obs, batch.action)
        loss = squared_td(q, target_q)
        return loss, self.critic_metrics(loss, q)

    def critic_metrics(self, loss: Tensor, q: Tensor) -> Metrics:
        q_std = q.detach().std(-2, correction=0).mean(-1)
        return {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1)), "q_std": q_std}

    def actor_loss(self, batch: Transitions, heads: Heads | None = None) -> tuple[Tensor, Metrics]:
        """``heads`` are those of the actor at s, if they are at hand."""
        mean, log_std = self.actor.heads(batch.obs) if heads is None else heads
        action, logp = self.actor.sample_from(mean, log_std, batch.noise.policy)
        q = self.critic(batch.obs, action)
        q = q.amin(-2) if self.hparams.actor_q == "min" else q.mean(-2)
        loss = (self.alpha() * logp - q).mean(-1)
        return loss, {"actor_loss": loss.detach()}

    def entropy_loss(self, batch: Transitions, heads: Heads | None = None) -> tuple[Tensor, Metrics]:
        """``heads`` are those of the actor at s, if they are at hand."""
        h, noise = self.hparams, batch.noise
        target = -float(batch.action.shape[-1]) if h.target_entropy is None else h.target_entropy
        with torch.no_grad():
            mean, log_std = self.actor.heads(batch.obs) if heads is None else heads
            own = noise.alpha if h.update_order == "actor_first" else noise.policy
            _, logp = self.actor.sample_from(mean, log_std, own)
        loss = -(self.log_alpha * (logp + target)).mean(-1)
        return loss, {"entropy": -logp.mean(-1)}

    def phase(self, step: int) -> bool:
        """Whether actor and entropy weight move."""
        return step % self.hparams.policy_freq == 0

    def update(self, batch: Transitions, step: int) -> Metrics:
        h = self.hparams
        order = h.update_order if step % h.policy_freq == 0 else ""
        metrics: Metrics = {}
        if order == "actor_first":
            metrics |= self.move_actor(batch)
        loss, critic_metrics = self.critic_loss(batch)
        if order == "together":  # the critic's loss is that of the weights before
            metrics |= self.move_actor(batch)
        self.step("critic", loss)
        self.track("critic", h.tau)
        if order == "critic_first":
            metrics |= self.move_actor(batch)
        return metrics | critic_metrics

    def move_actor(self, batch: Transitions) -> Metrics:
        """A step of the actor, and one of the entropy weight: before it in the order "actor_first", else after it."""
        h = self.hparams
        heads = self.actor.heads(batch.obs)
        entropy_loss, metrics = self.entropy_loss(batch, heads)
        if h.learn_alpha and h.update_order == "actor_first":
            self.step("log_alpha", entropy_loss)
        loss, actor_metrics = self.actor_loss(batch, heads)
        self.step("actor", loss)
        if h.learn_alpha and h.update_order != "actor_first":
            self.step("log_alpha", entropy_loss)
        return metrics | actor_metrics | {"entropy_weight": self.alpha().squeeze(-1)}

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor.mode(obs)

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor.sample(obs, noise)[0]

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.actor.log_prob(obs, action)


def start_by_width(net: MLP, bias: float) -> None:
    """Hidden layers U(±1/√out): rlkit's helper means 1/√in, and reads the wrong axis of torch's weights."""
    layers: list[Any] = list(net.layers)
    for layer in layers[:-1]:
        layer.reset_parameters(Init("uniform", layer.weight.shape[-1] ** -0.5, bias))
