"""Variants that hold the entropy of the policy, or the policy itself where it would lose what it can do."""

from __future__ import annotations

from offpolicy.losses.variants.row import Variant

HIGHER = {"name": "ppo", "low": 0.2, "high": 0.28}

ROWS = (
    Variant(
        "clip_cov",
        "Clip-Cov",
        "2505.22617",
        "tokens drawn from those with (A − Ā)(ℓ − mean ℓ) in [1, 5] are left out, 2e-4 of all",
        {"ratio": "token", "trust": "clip_cov", "aggregation": "token_mean"},
    ),
    Variant(
        "kl_cov",
        "KL-Cov",
        "2505.22617",
        "|ℓ − ℓ_b| on the .2 % of the tokens with the largest (A − Ā)(ℓ − mean ℓ), no clipping",
        {"trust": "none", "anchors": ("kl_cov",), "aggregation": "token_mean"},
    ),
    Variant(
        "lp_reg",
        "Lp-Reg",
        "2510.03222",
        "e^δ − δ − 1 to the policy without its least likely tokens, on the least likely tokens with A < 0",
        {
            "trust": {"name": "ppo", "low": 1.0, "high": 10.0},
            "anchors": ("lp_reg",),
            "aggregation": "token_mean",
        },
        differs="the proxy is not renormalised, and its threshold is by the current policy",
        unverified="the upper bound of the ratio: 10 is ours",
        needs="vocabulary",
    ),
    Variant(
        "steer",
        "STEER",
        "2510.10150",
        "weight exp(−kΩ) ≥ .8, Ω the size of the change of the entropy by the token",
        {"weight": ("steer",), "aggregation": "token_mean", "trust": HIGHER},
        differs="the code's default is linear from 1.2 to .8, over the extremes of a micro-batch (mapping='linear')",
        unverified="that the paper's runs have the bounds of DAPO",
        needs="vocabulary",
    ),
    Variant(
        "siren",
        "SIREN",
        "2509.25133",
        "(mean entropy of the likeliest tokens where the entropy peaks − that of the first step)²",
        {
            "entropy": {"name": "siren", "aggregation": "token_mean"},
            "trust": {"name": "ppo", "low": 0.28},
            "advantage": "dr_grpo",
            "aggregation": "sum_over_T",
        },
        unverified="whose quantile chooses the peaks",
        needs="vocabulary",
    ),
    Variant(
        "epo",
        "EPO",
        "2509.22576",
        "entropy bonus less a constant where the entropy leaves [.5, 1.5] times its mean so far",
        {"entropy": "epo"},
        differs="the constant has no gradient, in the code too; the paper's runs have the band [0, 2]",
        unverified="the schedule of its strength; means by turn are left out",
        needs="vocabulary",
    ),
    Variant(
        "target_entropy",
        "Skywork-OR1, adaptive entropy",
        "2505.22312",
        "entropy bonus whose coefficient rises below a target of .2 and falls above it, by .005",
        {"entropy": "target", "aggregation": "token_mean"},
        needs="vocabulary",
    ),
    Variant(
        "aepo",
        "AEPO, arbitrary entropy",
        "2510.08141",
        "some problems are asked again, at 1.2 times the temperature up to an entropy of .5 and at .8 times it above; "
        "right answers have −ℓ beside the loss of the groups",
        {"entropy": "aepo"},
        {"tempering": "aepo"},
        differs="in the code up to 60 answers, 30 cold ones, of groups with wrong ones take the place of others, with "
        "the ratio clipped, and the entropy is that of the step before; here all right ones come beside them, and the "
        "entropy is the mean of −ℓ of what was just drawn",
        unverified="the share of the groups (1/64) and the coefficient (1, an answer counts as one); in version 7, "
        "SCOPE-RL, the temperature is said to be 1 + target − entropy between these two",
        off_policy="tempered answers are not kept",
    ),
    Variant(
        "dph_f",
        "DPH-RL, forward KL",
        "2509.07430",
        "u − 1 − ln u, u = π_θ/π_base, on stored answers to mastered problems; no divergence on others",
        {"advantage": "split", "anchors": ("dph",), "weight": ({"name": "source", "external": 0.0},)},
        {"demonstrations": 1},
        differs="stored answers are the demonstrations",
        unverified="which problems are mastered",
        needs="base, demonstrations",
    ),
    Variant(
        "dph_js",
        "DPH-RL, Jensen–Shannon",
        "2509.07430",
        "u ln u − (u + 1)·ln((u + 1)/2) on stored answers to mastered problems",
        {
            "advantage": "split",
            "anchors": ({"name": "dph", "divergence": "js", "coef": 0.05},),
            "weight": ({"name": "source", "external": 0.0},),
        },
        {"demonstrations": 1},
        differs="the code has one half of it on stored and one on own answers",
        unverified="which problems are mastered",
        needs="base, demonstrations",
    ),
    Variant(
        "dph_alpha",
        "DPH-RL, α-divergence",
        "2509.07430",
        "(u^(1 − α) − (1 − α)u − α)/(α(α − 1)), α = .2, on stored answers to mastered problems",
        {
            "advantage": "split",
            "anchors": ({"name": "dph", "divergence": "alpha"},),
            "weight": ({"name": "source", "external": 0.0},),
        },
        {"demonstrations": 1},
        differs="stored answers are the demonstrations",
        unverified="which problems are mastered",
        needs="base, demonstrations",
    ),
)
