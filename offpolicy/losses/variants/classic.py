"""The variants that GRPO began with."""

from __future__ import annotations

from offpolicy.losses.variants.row import Variant

ROWS = (
    Variant("grpo", "GRPO", "2402.03300", "A = (R − μ)/(s + ε), mean over answers of their token means"),
    Variant(
        "dr_grpo",
        "Dr. GRPO",
        "2503.20783",
        "A = R − μ, sum over tokens divided by a constant length",
        {"advantage": "dr_grpo", "aggregation": "dr_grpo"},
    ),
    Variant(
        "dapo",
        "DAPO",
        "2503.14476",
        "mean over all tokens, clipped at 1 − 0.2 and 1 + 0.28",
        {"aggregation": "token_mean", "trust": {"name": "ppo", "low": 0.2, "high": 0.28}},
    ),
    Variant(
        "gspo",
        "GSPO",
        "2507.18071",
        "one ratio per answer, exp of its mean log-ratio",
        {"ratio": "sequence", "trust": {"name": "ppo", "low": 3e-4, "high": 4e-4}},
    ),
    Variant(
        "rloo",
        "RLOO",
        "2402.14740",
        "A = R − mean of the others, sums over tokens, no clipping",
        {"advantage": "rloo", "aggregation": "seq_sum", "trust": "none"},
    ),
)
