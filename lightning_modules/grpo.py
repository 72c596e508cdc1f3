"""GRPO — Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), section 4.1, and its near relatives.

Every problem gets a group of answers; the advantage of an answer is its reward among those of its group,
(R − μ)/(s + ε), with the sample deviation s. J = mean over answers of the mean over their tokens of
min(ρA, clip(ρ, 1 − ε, 1 + ε)A) − β·KL(π_θ ‖ π_base), the divergence estimated per token by e^δ − δ − 1 with
δ = log π_base − log π_θ (Eq. 3 and 4), or as ``kl`` says.

``variant`` names what others change, and nothing else: :mod:`offpolicy.losses.variants` has them with their papers. One
that needs other values of other options, as for drawing answers, sets those that are left at their defaults.

With ``replay_fraction`` old answers are reused with the ratio to the policy that drew them ("gspo": to π_k, the policy
at the start of the iteration), as ReMix does, which adds what keeps that stable.

With ``lag`` all answers are of an earlier policy π_b. Then the ratio to π_k is clipped and multiplied by the importance
weight π_k/π_b of the token, at most 3 (the decoupled objective of arXiv:2110.00641 with a truncated weight); "gspo"
multiplies by that of the whole answer.
"""

from __future__ import annotations

import inspect
from typing import Any

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.language.module import LanguageModule
from offpolicy.language.rl.rollouts import RolloutModule
from offpolicy.losses.policy.anchors import ESTIMATORS
from offpolicy.losses.variants.choosing import chosen, variant_of, variant_words


class GRPO(RolloutModule):
    """Group-relative policy optimisation, on-policy unless ``replay_fraction`` says otherwise.

    Args:
        variant: "grpo", "dr_grpo", "dapo", "gspo", "rloo", or another of :mod:`offpolicy.losses.variants`:
            ``python -m offpolicy.fit --model.help variants`` tells what each is.
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
        published = variant_of(variant)
        variant = published.name  # in the one spelling
        given = {"clip": clip, "clip_high": clip_high, "beta": beta, "kl": kl, "entropy": entropy, **rollouts}
        self.of_variant = {
            name: value
            for name, value in published.options.items()
            if given.get(name, DEFAULTS[name]) in (DEFAULTS[name], value)
        }
        rollouts |= {name: value for name, value in self.of_variant.items() if name not in OWN}
        super().__init__(**rollouts)
        check_range("clip", clip or 0.0, 0.0, 1.0)
        for name, value in (("clip_high", clip_high), ("beta", beta), ("entropy", entropy)):
            check_range(name, value or 0.0, 0.0)
        check_choice("kl", kl, ESTIMATORS)
        self.save_hyperparameters()
        self.hparams.update(self.of_variant)
        self.objective = self.compose()

    def parts(self) -> dict[str, Any]:
        h = self.hparams
        for option, slot in (("clip", "trust"), ("clip_high", "trust"), ("beta", "anchors"), ("entropy", "entropy")):
            if h[option] != DEFAULTS[option] and slot in (h.objective or {}):
                raise UsageError(
                    f"`{option}` is {h[option]}, and `objective` names the `{slot}` that it would be for; expected "
                    f"one of the two. Leave `{option}` out, or give the part its own number in --model.objective."
                )
        return chosen(
            variant_of(h.variant),
            clip=h.clip,
            clip_high=h.clip_high,
            anchor={"name": h.kl, "coef": h.beta} if h.beta else None,
            bonus={"name": "bonus", "coef": h.entropy} if h.entropy else None,
            lag=h.lag,
        )

    def objective_facts(self) -> list[tuple[str, str]]:
        variant = variant_of(self.hparams.variant)
        lines = [] if variant.name == "grpo" else [("variant", variant_words(variant, self.of_variant))]
        yours = [f"--model.{name} {self.hparams[name]}" for name in variant.options if name not in self.of_variant]
        lines += [("not the variant's", ", ".join(yours))] if yours else []
        stale = bool(self.hparams.lag or self.hparams.replay_fraction) and variant.off_policy != "yes"
        return [*lines, *([("old answers", variant.off_policy)] if stale else []), *super().objective_facts()]


OWN = tuple(name for name in inspect.signature(GRPO.__init__).parameters if name not in ("self", "variant", "rollouts"))
DEFAULTS = {
    name: one.default
    for kind in (LanguageModule, RolloutModule, GRPO)
    for name, one in inspect.signature(kind.__init__).parameters.items()
}
