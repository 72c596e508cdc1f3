"""RL-PLUS — Dong et al. 2025, Countering Capability Boundary Collapse of LLMs in Reinforcement Learning with
Hybrid-policy Optimization (arXiv:2508.00222).

J = E_own[r·A] + E_demonstrations[r^m·A^c]. Per problem one answer of the group is a demonstration. Own tokens have
r = π_θ/π_k. A token of a demonstration counts as drawn from π_k or from its unknown author, taken to be ½π_k + ½U:

    r^m = 2π_θ/(π_k + ½π_k + ½U)  (Eq. 4),     A^c = A·(1 − π_θ)^γ,  the weight without gradient.

A is R − μ over the whole group, the demonstration included; it is judged by the same reward as the others. Nothing is
clipped, and there is no divergence. The authors' runs have 7 own answers and 1 whole demonstration (``group_size`` 8);
of an answer that goes on from a part of one (``demonstration_share``) each token has the ratio of its kind.

Where the paper and the authors' code (commit eb4aa4d) differ, the options say which is meant:

==================  ===============================  =====================================  ===========================
option              paper                            code                                   default
==================  ===============================  =====================================  ===========================
``uniform``         "vocab": U = 1/V                 "one": U = 1, which all but ignores    "vocab"
                                                     tokens that π_k finds unlikely
``advantage_std``   true: divided by the deviation   false; where it divides, by that       false; true divides by the
                                                     + 1e-6                                 deviation + 1e-4
``aggregation``     mean over tokens implied         "sum_over_T", without the number of    "dr_grpo": the same divided
                                                     answers                                by it
``entropy``         not prominent                    0.001, a mean over tokens whatever     0.001, likewise
                                                     ``aggregation`` is
``demonstrator``    –                                "ratio": π_θ/(π_ω + 1e-6), known π_ω   "unknown"
==================  ===============================  =====================================  ===========================
"""

from __future__ import annotations

from typing import Any

from offpolicy.errors import DataError, check_choice, check_range
from offpolicy.language.rl.rollouts import RolloutModule

UNIFORMS = ("vocab", "one")
DEMONSTRATORS = ("unknown", "known", "ratio")


class RLPlus(RolloutModule):
    """Own answers and demonstrations in one policy gradient.

    Args:
        demonstrations: demonstrations per group, 0 or 1; problems without one get own answers alone.
        uniform: U of the estimate of the demonstrator: "vocab" (1/V) or "one" (1).
        demonstrator: "unknown"; "known", the data say the probability of every token (column ``solution_logps``); or
            "ratio", the same as the authors' code uses it.
        gamma: γ ≥ 0 of the exploration weight; 0.5 in the paper.
        advantage_std: divide advantages by the deviation of the group.
        clip: clip own ratios to 1 ± this, in [0, 1]; None for none.
        aggregation: "dr_grpo", "sum_over_T", "token_mean" or "seq_mean_token_mean".
        entropy: coefficient ≥ 0 of the mean entropy of all tokens.
        own_weight: factor ≥ 0 on the term of own answers.
        external_weight: factor ≥ 0 on the term of demonstrations.
    """

    def __init__(
        self,
        *,
        demonstrations: int = 1,
        uniform: str = "vocab",
        demonstrator: str = "unknown",
        gamma: float = 0.5,
        advantage_std: bool = False,
        clip: float | None = None,
        aggregation: str = "dr_grpo",
        entropy: float = 1e-3,
        own_weight: float = 1.0,
        external_weight: float = 1.0,
        **rollouts: Any,
    ) -> None:
        super().__init__(demonstrations=demonstrations, **rollouts)
        check_choice("uniform", uniform, UNIFORMS)
        check_choice("demonstrator", demonstrator, DEMONSTRATORS)
        for name, number in (
            ("gamma", gamma),
            ("entropy", entropy),
            ("own_weight", own_weight),
            ("external_weight", external_weight),
        ):
            check_range(name, number, 0.0)
        check_range("clip", clip or 0.0, 0.0, 1.0)
        self.save_hyperparameters()
        self.objective = self.compose()

    def parts(self) -> dict[str, Any]:
        h = self.hparams
        ratio = {"name": "mis", "uniform": h.uniform, "demonstrator": h.demonstrator}
        weights: list[dict[str, Any]] = [{"name": "focal", "gamma": h.gamma}]
        if (h.own_weight, h.external_weight) != (1.0, 1.0):
            weights.append({"name": "source", "own": h.own_weight, "external": h.external_weight})
        return {
            "advantage": "grpo" if h.advantage_std else "dr_grpo",
            "ratio": ratio | ({"vocabulary": self.vocabulary} if h.uniform == "vocab" else {}),
            "trust": "none" if h.clip is None else {"name": "ppo", "low": h.clip},
            "aggregation": h.aggregation,
            "weight": tuple(weights),
            "entropy": {"name": "bonus", "coef": h.entropy, "aggregation": "token_mean"} if h.entropy else "none",
        }

    def take_data(self, data: Any) -> None:
        super().take_data(data)
        if self.hparams.demonstrator != "unknown" and "logp" not in self.problems.steps:
            raise DataError(
                f"`demonstrator` is '{self.hparams.demonstrator}', and {self.problems.meta.get('name', 'the data')} "
                "does not say how likely its solutions were; expected a column `solution_logps`. Name it with "
                "--data.columns, or leave `--model.demonstrator` out."
            )
