"""What goal-conditioned methods inherit: acting towards goals, and asking for values and sub-goals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.training.offline import Metrics, OfflineModule, Rate

Perturb = Callable[[Tensor], Tensor]


class GoalModule(OfflineModule):
    """Base of goal-conditioned methods. A goal is an observation: the full state to be reached.

    A method defines ``view``, ``build``, ``goal_policy``, and the names of its ``losses``, each ``(batch) -> (loss,
    metrics)``, and of the networks that have ``targets``; ``values`` when it learns some; ``subgoals`` and
    ``representation`` when it is hierarchical. One Adam at the rate ``lr`` trains everything on the sum of the losses,
    all taken before the step. Targets too move by ``tau`` towards the weights before the step, as they do in OGBench's
    reference agents (arXiv:2410.20092, code).

    Observations and goals are given raw, NumPy or tensor, (O,) or (n, O), and answers are of the same kind; one goal
    serves any number of observations. With S seeds every answer has one more axis in front, of length S: what each seed
    says to the same observations and goals.
    """

    losses: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]] = ()
    run_defaults: ClassVar[dict[str, Any]] = {"block": 16}  # batches are large: four goals and more per row

    # -- training ------------------------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, Rate]:
        return {"networks": self.hparams.lr}

    def params(self, name: str) -> list[Tensor]:
        if name == "networks" and name not in self._params:
            self._params[name] = [p for p in self.parameters() if p.requires_grad]
        return super().params(name)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        meta, own = self.data_meta, getattr(self.agent, "__func__", None) is not GoalModule.agent
        if self.run.eval_episodes and meta.get("env_id") and not meta.get("tasks") and not own:
            raise no_goal(self)  # now, not at the first evaluation

    def update(self, batch: Any, step: int) -> Metrics:
        total: Any = 0.0
        metrics: Metrics = {}
        for name in self.losses:
            loss, found = getattr(self, name)(batch)
            total = total + loss
            metrics |= found
        for name in self.targets:
            self.track(name, self.hparams.tau)
        self.step("networks", total)
        return metrics

    # -- to be written by a method -------------------------------------------------------------------------------------

    def goal_policy(self, obs: Tensor, goal: Tensor, perturb: Perturb) -> Tensor:
        """Action (…, B, A) for normalised obs and goal (…, B, O); ``perturb`` adds the noise of the temperature to the
        mean of every Gaussian on the way and may return it as it is."""
        raise UsageError(f"{type(self).__name__} must define goal_policy(obs, goal, perturb).")

    def values(self, obs: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """Values (…, B) of normalised obs and goal (…, B, O) by name: "value", or "low" and "high"."""
        return {}

    def subgoals(self, obs: Tensor, goal: Tensor) -> Tensor | None:
        """What a high level aims at next, as a representation (…, B, Z); None without a high level."""
        return None

    def representation(self, obs: Tensor, goal: Tensor) -> Tensor | None:
        """φ([obs; goal]) (…, B, Z), to compare with :meth:`subgoals`; None without a high level."""
        return None

    @property
    def order_steps(self) -> int:
        """Steps between the states of an episode whose values are compared: those of a subgoal, where there are any."""
        return self.hparams.get("subgoal_steps", 25)

    # -- acting --------------------------------------------------------------------------------------------------------

    def act_goal(
        self, obs: Any, goal: Any, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Any:
        """Action in environment units towards a goal.

        Args:
            obs: (O,) or (n, O).
            goal: (O,) or (n, O).
            temperature: factor of the standard normal noise added to the mean of every policy, ≥ 0; 0 acts by means.
            generator: source of that noise; None takes torch's global one.

        Returns:
            (A,) or (n, A), of the kind of ``obs``; with S seeds (S, A) or (S, n, A).
        """
        check_range("temperature", temperature, 0.0)

        def perturb(mean: Tensor) -> Tensor:
            if not temperature:
                return mean
            noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device="cpu")
            return mean + temperature * noise.to(mean)

        def action(x: Tensor, g: Tensor) -> Tensor:
            return self.normalizer.environment_action(self.goal_policy(x, g, perturb).clamp(-1.0, 1.0))

        return self._answer(action, obs, goal)

    def act(self, obs: Any) -> Any:
        raise UsageError(
            f"{type(self).__name__} acts towards a goal; expected one. Call `act_goal(obs, goal)`, or `agent()` and "
            "`set_goals(goals)` for episodes."
        )

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        raise UsageError(
            f"{type(self).__name__} acts towards a goal, so actions have no probability without one; expected a policy "
            "of one observation. Choose another method, such as TD3BC."
        )

    def agent(self, temperature: float = 0.0) -> GoalAgent:
        """What evaluation plays with: give it goals by ``set_goals`` after every ``reset``."""
        return GoalAgent(self, temperature)

    # -- questions -----------------------------------------------------------------------------------------------------

    def value_of(self, obs: Any, goal: Any) -> dict[str, Any]:
        """Learnt values of states for goals, mean over the ensemble: name → () or (n,).

        Names are "value", or "low" and "high" where two levels have their own; empty for cloning.
        """
        return self._answer(self.values, obs, goal)

    def subgoal(self, obs: Any, goal: Any) -> Any:
        """Representation that the high level aims at next, (Z,) or (n, Z).

        The state that it stands for is the one whose :meth:`represent` is nearest.

        Raises:
            UsageError: the method has no high level.
        """
        return self._answer(self.subgoals, obs, goal)

    def represent(self, obs: Any, goal: Any) -> Any:
        """Representation of ``goal`` as seen from ``obs``, (Z,) or (n, Z).

        Raises:
            UsageError: the method has no high level.
        """
        return self._answer(self.representation, obs, goal)

    @torch.no_grad()
    def _answer(self, question: Callable[[Tensor, Tensor], Any], obs: Any, goal: Any) -> Any:
        """Ask about normalised observations and goals in evaluation mode; the answer is of the kind of ``obs``."""
        x, g = self.normalized(obs), self.normalized(goal, "goal")
        if len(x) != len(g) and 1 not in (len(x), len(g)):
            raise UsageError(f"there are {len(x)} observations and {len(g)} goals; expected one goal, or one for each.")
        single = np.ndim(obs) == 1 and np.ndim(goal) == 1
        x, g = torch.broadcast_tensors(x, g)
        answer = self.ask(lambda: question(x, g))
        if answer is None:
            raise UsageError(
                f"{type(self).__name__} has no high level; expected a hierarchical method, such as HIQL or OTA."
            )

        def of_kind(value: Tensor, batch_axis: int) -> Any:
            value = value.select(batch_axis, 0) if single else value
            return value if isinstance(obs, Tensor) else value.float().cpu().numpy()

        if isinstance(answer, dict):
            return {name: of_kind(value, -1) for name, value in answer.items()}
        return of_kind(answer, -2)


class GoalAgent:
    """Plays a goal-conditioned method: ``reset(n)``, ``set_goals(goals (n, O))``, then ``act(obs (n, O))`` each step.

    See :class:`offpolicy.evaluation.rollout.Agent`.

    Args:
        method: a trained method.
        temperature: as of :meth:`GoalModule.act_goal`.
    """

    def __init__(self, method: GoalModule, temperature: float = 0.0) -> None:
        check_range("temperature", temperature, 0.0)
        self.method, self.temperature = method, temperature
        self.goals: Any = None

    def reset(self, num_envs: int) -> None:
        """Start ``num_envs`` episodes, whose goals come next."""
        self.goals = None

    def set_goals(self, goals: Any) -> None:
        """Goals (n, O) of the episodes, as raw observations; (O,) for one goal of all."""
        self.goals = goals

    def act(self, obs: Any) -> Any:
        """Actions (n, A) in environment units for raw observations (n, O)."""
        if self.goals is None:
            raise no_goal(self.method)
        return self.method.act_goal(obs, self.goals, temperature=self.temperature)


def no_goal(method: GoalModule) -> UsageError:
    """The error of an episode without a goal."""
    return UsageError(
        f"{type(method).__name__} acts towards goals and was given none; expected an environment that names a goal "
        "when it is reset (`info['goal']`), as OGBench's do. Choose one of its data sets, or train without evaluation: "
        "`--run.eval_episodes=0`."
    )
