"""Variants that change what an answer costs: its length, its budget, its format."""

from __future__ import annotations

from offpolicy.losses.variants.row import Variant

ROWS = (
    Variant(
        "dler",
        "DLER",
        "2510.15110",
        "cut answers have reward 0, s of the whole batch, clipped at 1 + .28, groups without signal drawn again",
        {"advantage": "dler", "trust": {"name": "ppo", "low": 0.2, "high": 0.28}, "aggregation": "token_mean"},
        {"filter": "signal"},
    ),
    Variant(
        "hbpo",
        "HBPO",
        "2507.15844",
        "rewards by the budget of a subgroup, f(b) = β·cos(πb/2L), less α per token beyond it",
        {"advantage": "hbpo"},
        unverified="budgets; the paper says them to the model in the prompt, which nothing here does",
    ),
    Variant(
        "ada_grpo",
        "ARM, Ada-GRPO",
        "2505.20258",
        "R times n over the answers of the same format, falling to 1",
        {"advantage": "ada"},
        unverified="over how many iterations it falls (100 here); needs a reward `format`",
    ),
    Variant(
        "t1",
        "T1",
        "2501.11651",
        "answers drawn at a high temperature, with an entropy bonus and a divergence",
        {"entropy": {"name": "bonus", "coef": 1e-3}, "anchors": ({"name": "k3", "coef": 1e-3},)},
        {"temperature": 1.2, "group_size": 16},
        differs="the divergence is from the base, not from a moving average of the policy",
        unverified="temperature, coefficients and penalties",
        needs="base, vocabulary",
    ),
)
