"""Variants that are methods of their own."""

from __future__ import annotations

from offpolicy.losses.variants.row import Variant

ROWS = (
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
        method="SFT",
        differs="infinitely many draws at temperature 1 are the default, the paper's K is `draws=256`",
        unverified="K = 256, the temperature 0.7 and the miss of −0.1",
        needs="demonstrations",
    ),
)
