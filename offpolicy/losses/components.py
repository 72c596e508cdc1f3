"""The components of a policy-gradient objective, by slot and name; what a slot is, tells
:mod:`offpolicy.losses.policy_gradient`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offpolicy.losses import advantages as adv
from offpolicy.losses.policy import (
    anchors,
    contrast,
    group_statistics,
    hybrid,
    means,
    ratios,
    shaping,
    steps,
    tracked,
    trust,
    weights,
)

COMPONENTS: dict[str, dict[str, Callable[..., Any]]] = {
    "advantage": {
        "grpo": adv.GRPO,
        "dr_grpo": adv.DrGRPO,
        "rloo": adv.RLOO,
        "batch_std": adv.BatchStd,
        "split": group_statistics.SplitGRPO,
        "median": group_statistics.MedianAdvantage,
        "ngrpo": group_statistics.NegativeGRPO,
        "bnpo": group_statistics.BetaAdvantage,
        "canon": group_statistics.ConditionalAdvantage,
        "copo": group_statistics.ConsistencyAdvantage,
        "agrae": group_statistics.AsymmetricGRPO,
        "unlikeliness": shaping.UnlikelinessAdvantage,
        "progrpo": shaping.ConfidenceAdvantage,
        "adora": shaping.DynamicAdvantage,
        "sign_gate": shaping.SignGate,
        "dler": shaping.TruncatedAdvantage,
        "ada": shaping.RareFormatAdvantage,
        "hbpo": shaping.BudgetAdvantage,
        "dcpo": shaping.TemperedAdvantage,
        "drpo": contrast.ShortnessAdvantage,
        "reinforce": tracked.RunningBaseline,
        "p50": tracked.MedianOfGroups,
        "risk": tracked.RiskAdvantage,
        "gae": adv.GAE,
        "egae": adv.ExtendedGAE,
        "hybrid": hybrid.HybridAdvantage,
    },
    "ratio": {
        "token": ratios.TokenRatio,
        "decoupled": ratios.DecoupledRatio,
        "mix": ratios.MixRatio,
        "sequence": ratios.SequenceRatio,
        "mis": ratios.MISRatio,
        "none": ratios.NoRatio,
    },
    "trust": {"ppo": trust.PPO, "dual": trust.DualPPO, "centred": trust.Centred, "none": trust.NoTrust},
    "aggregation": {
        "seq_mean_token_mean": means.SeqMeanTokenMean,
        "token_mean": means.StepTokenMean,
        "token_mean_local": means.TokenMeanLocal,
        "dr_grpo": means.DrGRPOSum,
        "sum_over_T": means.SumOverT,
        "seq_sum": means.SeqSum,
    },
    "anchors": {
        "k1": anchors.K1,
        "k2": anchors.K2,
        "k3": anchors.K3,
        "full": anchors.FullKL,
        "convex": anchors.ConvexKL,
    },
    "entropy": {"bonus": anchors.EntropyBonus},
    "weight": {
        "engine": weights.EngineWeight,
        "age": weights.AgeWeight,
        "focal": weights.FocalWeight,
        "source": weights.SourceWeight,
        "empg": steps.StepEntropyWeight,
    },
    "value": {"squared": anchors.SquaredValue},
    "terms": {
        "hybrid_sft": hybrid.HybridLikelihood,
        "drpo_contrast": contrast.WrongAnswers,
        "kl_limit": contrast.DivergenceLimit,
        "empg_clarity": steps.ClarityBonus,
    },
    "lr": {},
}
