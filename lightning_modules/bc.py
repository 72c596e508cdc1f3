"""Behaviour cloning, on all episodes or on the best share of them (BC-10%).

Actor: mean over batch and action dimensions of (π(s) − a)². The share is that of the episodes ranked by return, as in
Chen et al. 2021 (Decision Transformer, arXiv:2106.01345), and statistics for normalisation come from the kept episodes.
Differs from CORL's code: episodes are the recorded ones, not spans of 1000 rows, and an unfinished last one is kept.
"""

from __future__ import annotations

from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.data.views import Transitions, TransitionView
from offpolicy.errors import check_range, check_widths
from offpolicy.losses.td import mean_squared_action
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes


class BC(OfflineModule):
    """Behaviour cloning.

    Args:
        top: share of the episodes kept, the best by return, in (0, 1]; 0.1 is BC-10%.
        top_discount: weight γ^t of rewards in the ranking, in [0, 1].
        hidden_dims: widths of the actor's hidden layers.
        actor_lr: Adam's learning rate.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations.
        reward_transform: see the README; changes nothing here.
        max_grad_norm: limit on the gradient norm, > 0; None for no limit.
    """

    compiled = ("actor_loss",)
    view = TransitionView(reward=False)

    def __init__(
        self,
        *,
        top: float = 1.0,
        top_discount: float = 1.0,
        hidden_dims: tuple[int, ...] = (256, 256),
        actor_lr: float = 3e-4,
        batch_size: int = 256,
        normalize_obs: bool = True,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("top", top, 0.0, 1.0, lower_open=True)
        check_range("top_discount", top_discount, 0.0, 1.0)
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, self.hparams.hidden_dims)

    def select(self, replay: Replay) -> Replay:
        return replay if self.hparams.top == 1.0 else replay.top(self.hparams.top, self.hparams.top_discount)

    def learning_rates(self) -> dict[str, Rate]:
        return {"actor": self.hparams.actor_lr}

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        loss = mean_squared_action(self.actor(batch.obs), batch.action)
        return loss, {"actor_loss": loss.detach()}

    def update(self, batch: Transitions, step: int) -> Metrics:
        loss, metrics = self.actor_loss(batch)
        self.step("actor", loss)
        return metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)
