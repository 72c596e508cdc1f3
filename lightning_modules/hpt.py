"""HPT — Lv et al. 2025, Towards a Unified View of Large Language Model Post-Training (arXiv:2509.04419).

Every gradient of post-training is 1_stable·(1/π_ref)·Â·∇π. Reinforcement has the policy that drew for π_ref and R − μ
for Â, supervised fine-tuning π_θ itself and 1. HPT chooses by how many of a problem's own answers are right, s:

    s ≤ gate    the own answers are dropped, and the demonstration enters by −log π,
    else        the own answers alone, by −ρA with A = R − their mean; no clipping, no divergence.

With ``gate_off`` above ``gate`` the demonstration of a problem in between stands beside the own answers as another
answer, with p/(p + 0.1) for ρ. ``soft`` blends both instead (:class:`offpolicy.losses.policy.hybrid.HybridAdvantage`).
Problems without a demonstration keep their own answers.

Where the authors' code (Unify-Post-Training) says more than the paper:

=================  ===================================================  ==============================================
what               code                                                 here
=================  ===================================================  ==============================================
sum over answers   "sum_over_T", Σ −ρA/T without the number of answers  "dr_grpo", divided by it too; demonstrations
                                                                        of the step count as answers
demonstrations     token mean of a micro-batch, NaN where it has none   token mean of the step, 0 where it has none
entropy            0.001, a mean over tokens                            likewise
=================  ===================================================  ==============================================
"""

from __future__ import annotations

from typing import Any

from offpolicy.errors import UsageError, check_range
from offpolicy.language.rl.rollouts import RolloutModule


class HPT(RolloutModule):
    """Reinforcement where the policy can, demonstrations where it cannot.

    Args:
        gate: s up to which the demonstration takes the place of the own answers, ≥ −1; 0 in the paper for Qwen, 2 for
            Llama, of 8 own answers.
        gate_off: s up to which it stands beside them, ≥ ``gate``; None for ``gate``.
        soft: blend both by s in place of the gates.
        success: reward from which an answer is right.
        sft: coefficient ≥ 0 of the likelihood of demonstrations; 1, and 0.3 for 1.5 billion weights.
        aggregation: "dr_grpo", or "sum_over_T" as in the authors' code.
        entropy: coefficient ≥ 0 of the mean entropy of all tokens.
        group_size: answers per problem, the demonstration included; 9 are the published 8 and 1.
        batch_size: answers of an optimiser step, a multiple of ``group_size``.
    """

    def __init__(
        self,
        *,
        gate: int = 0,
        gate_off: int | None = None,
        soft: bool = False,
        success: float = 1.0,
        sft: float = 1.0,
        aggregation: str = "dr_grpo",
        entropy: float = 1e-3,
        group_size: int = 9,
        batch_size: int = 72,
        demonstrations: int = 1,
        **rollouts: Any,
    ) -> None:
        super().__init__(group_size=group_size, batch_size=batch_size, demonstrations=demonstrations, **rollouts)
        if demonstrations != 1 or self.hparams.demonstration_share != 1:
            raise UsageError(
                "HPT chooses between own answers and a whole demonstration; expected `demonstrations` 1 and "
                "`demonstration_share` 1. Leave them out, or choose RLPlus."
            )
        if self.hparams.replay_fraction:
            raise UsageError(
                "HPT's gate leaves answers out for the iteration that drew them; expected `replay_fraction` 0. Choose "
                "ReMix to use answers again."
            )
        check_range("entropy", entropy, 0.0)
        self.save_hyperparameters()
        self.objective = self.compose()

    def parts(self) -> dict[str, Any]:
        h = self.hparams
        gates = {"soft": True} if h.soft else {"gate": h.gate, "gate_off": h.gate_off}
        beside = not h.soft and h.gate_off is not None and h.gate_off > h.gate
        return {
            "advantage": {"name": "hybrid", "success": h.success, **gates},
            "ratio": "luffy" if beside else "token",
            "trust": "none",
            "aggregation": h.aggregation,
            "terms": ({"name": "hybrid_sft", "coef": h.sft},),
            "entropy": {"name": "bonus", "coef": h.entropy, "aggregation": "token_mean"} if h.entropy else "none",
        }
