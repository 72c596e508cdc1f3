"""A method of your own: one class, and resume, many processes, bf16, evaluation and the command line come with it.

As a script: ``python examples/own_method.py``.  By name: ``python -m offpolicy.fit --model examples.own_method.AWR``.
"""

from __future__ import annotations

import torch
from torch import Tensor

import offpolicy
from offpolicy.losses.td import exponential_weight
from offpolicy.nn.critics import ValueNetwork
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes


class AWR(OfflineModule):
    """One-step advantage-weighted regression: V by TD(0), then cloning weighed by exp(β·(r + γV(s') - V(s))).

    Args:
        beta: inverse temperature of the weights, ≥ 0; 0 is plain cloning.
        discount: γ per environment step, in [0, 1).
        lr: Adam's learning rate of both networks.
        reward_transform: "r", or an affine form such as "0.1r".
    """

    def __init__(
        self, *, beta: float = 3.0, discount: float = 0.99, lr: float = 1e-3, reward_transform: str = "0.1r"
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, (64, 64))
        self.value = ValueNetwork(sizes.obs_dim, (64, 64))

    def learning_rates(self) -> dict[str, Rate]:
        return {"value": self.hparams.lr, "actor": self.hparams.lr}

    def advantage(self, batch: offpolicy.Transitions) -> Tensor:
        with torch.no_grad():
            next_v = self.value(batch.next_obs).masked_fill(batch.terminated, 0.0)
        return batch.reward + self.hparams.discount * next_v - self.value(batch.obs)

    def update(self, batch: offpolicy.Transitions, step: int) -> Metrics:
        adv = self.advantage(batch)
        value_loss = adv.square().mean(-1)
        self.step("value", value_loss)
        error = (self.actor(batch.obs) - batch.action).square().sum(-1)
        actor_loss = (exponential_weight(adv, self.hparams.beta) * error).mean(-1)
        self.step("actor", actor_loss)
        return {"value_loss": value_loss.detach(), "actor_loss": actor_loss.detach()}

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)


if __name__ == "__main__":
    offpolicy.fit(AWR(), "pendulum-stitch-v0", max_steps=2000, eval_every=1000)
