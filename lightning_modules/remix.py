"""ReMix — Liang et al. 2025, Squeeze the Soaked Sponge: Efficient Off-policy Reinforcement Finetuning for LLM
(arXiv:2507.06892).

Up to iteration T a batch is mixed: a share 1 − p of it are fresh answers of π_k, a share p was drawn by the N policies
before, and training goes m times over the whole. Each token's ratio is to the policy that drew it, r = π_θ/π_{k−i}, and
the clip's interval moves with c = π_k/π_{k−i}: min(rA, clip(r, c − ε, c + ε)A), so that it bounds the distance to the
current policy and no token starts clipped, whatever its age. With i = 0 this is PPO's or GRPO's loss.

KL-Convex: β·[λ(k)·KL(π_θ ‖ π_base) + (1 − λ(k))·KL(π_θ ‖ π_k)], λ(k) = max(1 − 0.1·⌈max(k − 50, 0)/10⌉, 0.5).
Reincarnation: after iteration T the base becomes the policy of that time, the store is emptied, and training goes on
with fresh answers alone, once over each. λ(k) goes on counting, optimiser and critic stay.

``base="grpo"``: groups, stale answers keep the advantage of their own group. ``base="ppo"``: one answer per problem, a
critic, advantages (GAE) anew from the critic of now, also for stale answers.

The authors' training code is not public. The paper gives p, N, m, T and λ(k). The values of ε, β and the
entropy coefficient and the estimator of the divergence are ours; for π_{k−1} of the second divergence we take π_k, the
policy that the iteration starts from.
"""

from __future__ import annotations

from typing import Any

from offpolicy.data.replay import Replay
from offpolicy.errors import check_choice, check_range
from offpolicy.language.rl.rollouts import RolloutModule
from offpolicy.losses.policy.anchors import ESTIMATORS

BASES = ("grpo", "ppo")
CENTERS = {"proximal-additive": "additive", "proximal-multiplicative": "multiplicative", "behaviour": "behavior"}


class ReMix(RolloutModule):
    """Reincarnating mix-policy proximal policy gradient: answers of recent policies are used again.

    Args:
        base: "grpo" or "ppo", the method underneath.
        reincarnation: T, the last iteration with replayed answers, ≥ 1; 50 or 100 in the paper. None for never.
        replay_fraction: p in [0, 1), the share of replayed answers.
        replay_window: N ≥ 1, how many iterations back they may come from.
        sweeps: m ≥ 1, times an iteration goes over its answers up to T; replayed ones are drawn anew each time.
        clip: ε ≥ 0.
        eps_scale: factor > 0 on ε.
        clip_center: "proximal-additive", the paper's c ± ε; "proximal-multiplicative", c·(1 ± ε); or "behaviour",
            1 ± ε, which clips stale tokens before any update.
        beta: β ≥ 0 of KL-Convex.
        kl: what estimates both divergences per token: "k3", "k1", "k2"; or "full", exact over the vocabulary, which
            costs a forward pass of each of them and the whole vocabulary at every token.
        kl_start: the last iteration with λ = 1, ≥ 0.
        kl_every: iterations between drops of λ by 0.1, ≥ 1.
        kl_correction: multiply the estimates of the divergence by r, without gradient; "full" is none.
        entropy: coefficient ≥ 0 of the entropy bonus.
        gae_lambda: λ of GAE in [0, 1], for "ppo".
        group_size: answers per problem; None is 8, and 1 for "ppo".
    """

    def __init__(
        self,
        *,
        base: str = "grpo",
        reincarnation: int | None = 50,
        replay_fraction: float = 0.4,
        replay_window: int = 2,
        sweeps: int = 2,
        clip: float = 0.2,
        eps_scale: float = 1.0,
        clip_center: str = "proximal-additive",
        beta: float = 1e-3,
        kl: str = "k3",
        kl_start: int = 50,
        kl_every: int = 10,
        kl_correction: bool = False,
        entropy: float = 1e-3,
        gae_lambda: float = 1.0,
        group_size: int | None = None,
        **rollouts: Any,
    ) -> None:
        size = (1 if base == "ppo" else 8) if group_size is None else group_size
        super().__init__(
            replay_fraction=replay_fraction, replay_window=replay_window, sweeps=sweeps, group_size=size, **rollouts
        )
        check_choice("base", base, BASES)
        check_choice("clip_center", clip_center, CENTERS)
        check_choice("kl", kl, ESTIMATORS)
        check_range("reincarnation", 1 if reincarnation is None else reincarnation, 1)
        check_range("clip", clip, 0.0)
        check_range("eps_scale", eps_scale, 0.0, lower_open=True)
        check_range("beta", beta, 0.0)
        check_range("kl_start", kl_start, 0)
        check_range("kl_every", kl_every, 1)
        check_range("entropy", entropy, 0.0)
        check_range("gae_lambda", gae_lambda, 0.0, 1.0)
        self.save_hyperparameters()
        self.hparams.group_size = size
        self.objective = self.compose()

    def parts(self) -> dict[str, Any]:
        h = self.hparams
        convex = {
            "name": "convex",
            "coef": h.beta,
            "estimator": h.kl,
            "start": h.kl_start,
            "every": h.kl_every,
            "correction": h.kl_correction,
        }
        shared = {
            "ratio": "mix",
            "trust": {"name": "centred", "low": h.clip, "scale": h.eps_scale, "center": CENTERS[h.clip_center]},
            "anchors": (convex,) if h.beta else (),
            "entropy": {"name": "bonus", "coef": h.entropy} if h.entropy else "none",
        }
        if h.base == "ppo":
            gae = {"name": "gae", "lambda_": h.gae_lambda}
            return shared | {"advantage": gae, "aggregation": "token_mean", "value": "squared"}
        return shared | {"advantage": "grpo", "aggregation": "seq_mean_token_mean"}

    def mixes(self, iteration: int) -> bool:
        """Whether an iteration may use answers of earlier ones."""
        return self.hparams.reincarnation is None or iteration <= self.hparams.reincarnation

    def mixture(self, iteration: int) -> tuple[float, int]:
        return (self.hparams.replay_fraction, self.hparams.sweeps) if self.mixes(iteration) else (0.0, 1)

    def before_iteration(self, iteration: int, store: Replay | None) -> Replay | None:
        if self.mixes(iteration):
            return super().before_iteration(iteration, store)
        if iteration == self.hparams.reincarnation + 1:
            self.scoring.move_base()
        return None
