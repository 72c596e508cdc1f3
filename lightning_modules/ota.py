"""OTA — Ahn, Choi, Han & Moon 2025, Option-aware Temporally Abstracted Value for Offline Goal-Conditioned RL
(arXiv:2505.12737), as the authors' code has it.

HIQL with a second value V^h for the high policy alone. It is learnt on options: from s_t the next state is s_Ω, n steps
ahead or where the goal or the end of the episode comes first; an option costs 1 and is discounted once, so a goal that
is d steps away is only about d/n away for V^h, and its differences do not drown in the noise of regression.

  L_{V^h}: the value loss of HIQL for (s_t, s_Ω, g, r, m), r = m = 0 where s_Ω is the goal, else -1 and 1;
  high advantage A = V^h(w, g) - V^h(s, g). The low policy follows V^l, which is HIQL's value. Both share one φ.

V^h with n = 1 is HIQL's value as a loss, not by the goals it sees: an option ends *at* its goal with value 0, where
HIQL's value is 0 for the state that *is* the goal. At the end of an episode an option may have no step at all and still
costs 1, as in the authors' code; ``drop_short_options`` leaves out every option that was cut short of its goal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_modules.hiql import HIQL
from offpolicy.data.goals import GoalTransitions
from offpolicy.nn.goals import Values
from offpolicy.training.offline import Metrics, Sizes


class OTA(HIQL):
    """Option-aware temporally abstracted value. Further arguments as of HIQL.

    Args:
        abstraction_factor: n, environment steps of an option, ≥ 1.
        drop_short_options: leave out options that end before n steps without having reached their goal.
    """

    losses = compiled = ("value_loss", "high_value_loss", "low_actor_loss", "high_actor_loss")
    targets = ("value", "high_value")

    def __init__(self, *, abstraction_factor: int = 5, drop_short_options: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.view = replace(self.view, option_steps=abstraction_factor)

    def build(self, sizes: Sizes) -> None:
        super().build(sizes)
        self.high_value = Values(sizes.obs_dim + self.hparams.rep_dim, self.hparams.hidden_dims)
        self.target_high_value = self.target_of(self.high_value)

    def high_values(self) -> Values:
        return self.high_value

    def high_value_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        loss, v = self.regression(
            self.high_value,
            self.target_high_value,
            batch.obs,
            batch.high_value_option_obs,
            batch.high_value_goal,
            batch.high_value_reward,
            batch.high_value_mask,
            batch.high_value_full if self.hparams.drop_short_options else None,
        )
        return loss, {"high_value_loss": loss.detach(), "high_v_mean": v.mean((-2, -1))}

    def values(self, obs: Tensor, goal: Tensor) -> dict[str, Tensor]:
        return {"low": self.v(self.value, obs, goal).mean(-2), "high": self.v(self.high_value, obs, goal).mean(-2)}
