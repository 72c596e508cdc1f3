"""GCBC — goal-conditioned behaviour cloning (Lynch et al. 2019, arXiv:1903.01973; Ghosh et al. 2019, arXiv:1912.06088),
as OGBench's reference agent has it (arXiv:2410.20092, code): -mean log π(a | s, g), g a later state of the episode.
"""

from __future__ import annotations

from torch import Tensor

from offpolicy.data.goals import GoalMix, GoalTransitions, GoalView
from offpolicy.errors import check_widths
from offpolicy.nn.goals import UnitGaussian, unit_log_prob
from offpolicy.training.goals import GoalModule, Perturb
from offpolicy.training.offline import Metrics, Sizes


class GCBC(GoalModule):
    """Goal-conditioned behaviour cloning.

    Args:
        discount: γ of the geometric law of goals, in [0, 1); unused without ``actor_geometric``.
        actor_p_current: probability that a goal is the state itself.
        actor_p_trajectory: probability that it is a later state of the episode.
        actor_p_random: probability that it is any state; the three sum to 1.
        actor_geometric: later states are Geometric(1 - γ) steps ahead, else uniform over the rest of the episode.
        hidden_dims: widths of the hidden layers.
        lr: Adam's learning rate.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations; off in published results.
        max_grad_norm: limit on the gradient norm, > 0; None for no limit.
    """

    losses = compiled = ("actor_loss",)

    def __init__(
        self,
        *,
        discount: float = 0.99,
        actor_p_current: float = 0.0,
        actor_p_trajectory: float = 1.0,
        actor_p_random: float = 0.0,
        actor_geometric: bool = False,
        hidden_dims: tuple[int, ...] = (512, 512, 512),
        lr: float = 3e-4,
        batch_size: int = 1024,
        normalize_obs: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()
        self.view = GoalView(
            discount=discount, actor=GoalMix(actor_p_current, actor_p_trajectory, actor_p_random, actor_geometric)
        )

    def build(self, sizes: Sizes) -> None:
        self.actor = UnitGaussian(2 * sizes.obs_dim, sizes.action_dim, self.hparams.hidden_dims)

    def actor_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        loss = -unit_log_prob(self.actor(batch.obs, batch.actor_goal), batch.action).mean(-1)
        return loss, {"actor_loss": loss.detach()}

    def goal_policy(self, obs: Tensor, goal: Tensor, perturb: Perturb) -> Tensor:
        return perturb(self.actor(obs, goal))
