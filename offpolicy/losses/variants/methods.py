"""Variants that are methods of their own."""

from __future__ import annotations

from offpolicy.losses.variants.row import Variant

ROWS = (
    Variant(
        "remix",
        "ReMix",
        "2507.06892",
        "min(ρA, clip(ρ, c ± ε)A) with ρ and c = π_k/π_b to the policy that drew a token, old answers beside new ones, "
        "λ·KL(base) + (1 − λ)·KL(π_k)",
        method="ReMix",
        needs="base",
    ),
    Variant(
        "rl_plus",
        "RL-PLUS",
        "2508.00222",
        "ratio 2π/(1.5π_k + .5U) and weight (1 − π)^γ on demonstrations beside own answers, no clipping",
        method="RLPlus",
        differs="U is 1/V in the paper, and the default, and 1 in the authors' code",
        needs="demonstrations",
    ),
    Variant(
        "copg",
        "CoPG",
        "2406.19185",
        "Σ over pairs of answers of (R_β(i) − R_β(j))², R_β = R − β·log(π/π_ref) summed over the answer; no ratio",
        method="CoPG",
        differs="the mean over pairs is the default, the paper's Σ_{i>j}/(k − 1) is `normalise=k_minus_1`",
        unverified="the form for k answers, read in a later report of the same group",
        needs="base",
    ),
    Variant(
        "otr",
        "OTR",
        "2509.26313",
        "−(1/K)·Σ r_k·log π(a_k) over K tokens drawn at every supervised place; r = 1 for the data's, else a miss",
        options={"weighting": "otr"},
        method="SFT",
        differs="infinitely many draws at temperature 1 are the default, the paper's K is `draws=256`",
        unverified="K = 256, the temperature 0.7 and the miss of −0.1",
        needs="demonstrations",
    ),
)
