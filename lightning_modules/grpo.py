"""GRPO — Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), section 4.1, and its near relatives.

Every problem gets a group of answers; the advantage of an answer is its reward among those of its group,
(R − μ)/(s + ε), with the sample deviation s. J = mean over answers of the mean over their tokens of
min(ρA, clip(ρ, 1 − ε, 1 + ε)A) − β·KL(π_θ ‖ π_base), the divergence estimated per token by e^δ − δ − 1 with
δ = log π_base − log π_θ (Eq. 3 and 4), or as ``kl`` says.

``variant`` names what others change, and nothing else: :mod:`offpolicy.losses.variants` has them with their papers.

With ``replay_fraction`` old answers are reused with the ratio to the policy that drew them ("gspo": to π_k, the policy
at the start of the iteration), as ReMix does, which adds what keeps that stable.

With ``lag`` all answers are of an earlier policy π_b. Then the ratio to π_k is clipped and multiplied by the importance
weight π_k/π_b of the token, at most 3 (the decoupled objective of arXiv:2110.00641 with a truncated weight); "gspo"
multiplies by that of the whole answer.
"""

from __future__ import annotations

from typing import Any

from offpolicy.errors import check_choice, check_range
from offpolicy.language.rl.rollouts import RolloutModule
from offpolicy.losses.policy.anchors import ESTIMATORS
from offpolicy.losses.variants import VARIANTS

AGE_CAP = 3.0  # of importance weights with a lag; the bound that TRL gives weights of an engine


class GRPO(RolloutModule):
    """Group-relative policy optimisation, on-policy unless ``replay_fraction`` says otherwise.

    Args:
        variant: "grpo", "dr_grpo", "dapo", "gspo", "rloo", or another of :mod:`offpolicy.losses.variants`.
        clip: how far the ratio may go below 1, in [0, 1]; None for the variant's (0.2).
        clip_high: how far above 1, ≥ 0; None for the variant's, or ``clip``.
        beta: coefficient ≥ 0 of the divergence from the policy at the start; the paper has 0.04, later work 0.
        kl: what estimates the divergence per token: "k3", the paper's; "k1", "k2"; or "full", exact over the
            vocabulary, which costs a forward pass of the base and the whole vocabulary at every token.
        entropy: coefficient ≥ 0 of the entropy bonus.
    """

    def __init__(
        self,
        *,
        variant: str = "grpo",
        clip: float | None = None,
        clip_high: float | None = None,
        beta: float = 0.0,
        kl: str = "k3",
        entropy: float = 0.0,
        **rollouts: Any,
    ) -> None:
        super().__init__(**rollouts)
        check_choice("variant", variant, VARIANTS)
        check_range("clip", clip or 0.0, 0.0, 1.0)
        for name, value in (("clip_high", clip_high), ("beta", beta), ("entropy", entropy)):
            check_range(name, value or 0.0, 0.0)
        check_choice("kl", kl, ESTIMATORS)
        self.save_hyperparameters()
        self.objective = self.compose()

    def parts(self) -> dict[str, Any]:
        h = self.hparams
        variant = dict(VARIANTS[h.variant].parts)
        trust = variant.pop("trust", {"name": "ppo", "low": 0.2})
        if isinstance(trust, dict) and trust["name"] == "ppo":
            high = trust.get("high") if h.clip is None else h.clip
            trust = {**trust, "low": trust["low"] if h.clip is None else h.clip, "high": high}
            trust |= {} if h.clip_high is None else {"high": h.clip_high}
        late: dict[str, Any] = {}
        if h.lag and "ratio" in variant:
            late = {"weight": ({"name": "age", "cap": AGE_CAP},)}
        elif h.lag:
            late = {"ratio": {"name": "decoupled", "cap": AGE_CAP}}
        return {
            "trust": trust,
            "anchors": ({"name": h.kl, "coef": h.beta},) if h.beta else (),
            "entropy": {"name": "bonus", "coef": h.entropy} if h.entropy else "none",
            **variant,
            **late,
        }
