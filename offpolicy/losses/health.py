"""Health of off-policy training, from sums that add up over micro-batches, processes and steps.

:func:`measure` gives vectors of float64 by name, the same names and sizes whatever the data; added together,
:func:`summarise` turns them into the metrics. Quantiles come from histograms of the log-ratio whose bins are about 5 %
wide, and 5e-5 near 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from offpolicy.losses.tokens import LARGEST_LOG_RATIO, Ratio, Surrogate, Tokens, difference, per_token

LAGS = (0, 1, 2, 4, 8, 16)  # first lag of each class
CLASSES = (*(f"lag{lag}" for lag in LAGS), "external", "engine")
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}

SCALE, WIDTH = 1e-3, 0.05  # bins are even in asinh(x / SCALE)
HALF = math.ceil(math.asinh(LARGEST_LOG_RATIO / SCALE) / WIDTH)
BINS = 2 * HALF + 1


@torch.no_grad()
def measure(tokens: Tokens, ratio: Ratio, surrogate: Surrogate, losses: Tensor) -> dict[str, Tensor]:
    """Sums over a micro-batch.

    Args:
        tokens: the micro-batch.
        ratio: of the objective; looked at on demonstrations only, own tokens are always compared with their sampler.
        surrogate: of the objective, for what it clipped.
        losses: (B, T) of the policy term.
    """
    own, outside = tokens.own, tokens.outside
    log_ratio = difference(tokens.logp, tokens.behavior_logp, own)

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return torch.stack([torch.where(where, values, 0.0).double().sum(), where.double().sum()])

    sums = {
        "ratio/clipped": mean(surrogate.clipped.double(), own),
        "ratio/clipping_term": mean(*clipping_term(tokens, ratio, surrogate)),
        "ratio/ess": ess_sums(log_ratio.sum(-1), own.any(-1)),
        "ratio/table": table(tokens, log_ratio, ratio, surrogate),
        "kl/behavior": mean(torch.expm1(log_ratio) - log_ratio, own),
        "kl/previous": mean(low_variance_kl(tokens.previous_logp, tokens.logp, own), own),
        "loss/own": mean(losses, own),
        "loss/external": mean(losses, outside),
    }
    if tokens.base_logp is not None:
        sums["kl/base"] = mean(low_variance_kl(tokens.base_logp, tokens.logp, own), own)
    if tokens.entropy is not None:
        sums["entropy"] = mean(tokens.entropy, own)
    if tokens.value is not None and tokens.returns is not None:
        error = torch.where(tokens.judged, tokens.value - tokens.returns, 0.0)
        sums["critic/error"] = mean(error.square(), tokens.judged)
    return sums


def clipping_term(tokens: Tokens, ratio: Ratio, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """(1/|y|)·Σ ρA over the clipped own tokens of an answer, (B,), and which rows are answers, (B,) bool.

    Their mean is the clipping-bias term of ST-PPO (arXiv:2511.20718): what the clipped tokens would have added.
    """
    own = tokens.own
    lost = torch.where(own & surrogate.clipped, ratio.value * per_token(tokens.advantage), 0.0)
    return lost.double().sum(-1) / own.sum(-1).clamp(min=1), own.any(-1)


def low_variance_kl(reference: Tensor, logp: Tensor, kept: Tensor) -> Tensor:
    """e^δ − δ − 1 with δ = reference − logp: KL(π ‖ reference) on tokens of π."""
    delta = difference(reference, logp, kept)
    return torch.expm1(delta) - delta


def table(tokens: Tokens, log_ratio: Tensor, ratio: Ratio, surrogate: Surrogate) -> Tensor:
    """A row per class of tokens: histogram of the log-ratio, Σ ratio, clipped tokens, answers, Σ length."""
    own, outside = tokens.own, tokens.outside
    lag = torch.zeros_like(own[:, 0], dtype=torch.int64) if tokens.lag is None else tokens.lag
    # compared with Python numbers, which need no copy to a GPU
    by_row = torch.stack([lag >= least for least in LAGS]).sum(0) - 1
    external, engine = len(LAGS), len(LAGS) + 1
    found = torch.zeros(len(CLASSES), BINS + 4, dtype=torch.float64, device=own.device)
    flat = found.view(-1)

    def add(kind: Tensor, column: Tensor | int, value: Tensor) -> None:
        index = kind * (BINS + 4) + column
        flat.index_add_(0, index.flatten(), value.double().expand_as(index).flatten())

    def histogram(kind: Tensor, x: Tensor, value: Tensor, kept: Tensor) -> None:
        add(kind, torch.round(torch.asinh(x.double() / SCALE) / WIDTH).long() + HALF, kept)
        add(kind, BINS, torch.where(kept, value.double(), 0.0))

    kind = torch.where(outside, external, by_row[:, None])
    value = torch.where(outside, ratio.value, torch.where(own, log_ratio, 0.0).exp())
    x = torch.where(tokens.kept, value, 1.0).clamp(min=math.exp(-LARGEST_LOG_RATIO)).log()
    x = torch.where(own, log_ratio, x.clamp(max=LARGEST_LOG_RATIO))
    histogram(kind, x, value, tokens.kept)
    add(kind, BINS + 1, surrogate.clipped & own)
    written = tokens.judged
    whole = written.any(-1) & ~outside.any(-1)  # what goes on from a demonstration has no length of its own
    add(by_row, BINS + 2, whole)
    add(by_row, BINS + 3, torch.where(whole, written.sum(-1), 0))
    if tokens.sampler_logp is not None:
        gap = difference(tokens.behavior_logp, tokens.sampler_logp, own).abs()
        histogram(torch.full_like(kind, engine), gap, gap, own)
    return found


def ess_sums(log_weight: Tensor, counted: Tensor) -> Tensor:
    """(Σw, Σw², n) of log-weights (B,)."""
    weight = torch.where(counted, log_weight.double().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp(), 0.0)
    return torch.stack([weight.sum(), weight.square().sum(), counted.double().sum()])


def effective_sample_size(log_weight: Tensor) -> float:
    """(Σw)²/(n·Σw²) of importance weights w = exp(log_weight) (n,), in (0, 1]; 1 for none.

    For answers, ``log_weight`` is the sum over tokens of ℓ_k − ℓ_b, unclipped.
    """
    shifted = log_weight.double() - log_weight.max() if len(log_weight) else log_weight.double()
    total, squares, n = ess_sums(shifted, torch.ones_like(shifted, dtype=torch.bool)).tolist()
    return total**2 / (n * squares) if n else 1.0


def summarise(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics of sums from :func:`measure`; what has no token is left out.

    Returns:
        ``ratio/ess`` (effective sample size of whole answers over their number, in (0, 1]), ``ratio/clipped``,
        ``ratio/clipping_term`` (:func:`clipping_term`), means such as ``kl/base`` and ``entropy``; of each class
        (``lag0``, …, ``replay`` for all lags above 0, ``external``) quantiles ``ratio/q05_<class>``,
        ``ratio/mean_<class>``, ``ratio/clipped_<class>``, ``length/<class>``;
        ``engine/gap_mean`` and ``engine/gap_max``, of |ℓ_b − ℓ_sampler|.
    """
    metrics: dict[str, float] = {}
    for name, vector in sums.items():
        if name == "ratio/table":
            metrics |= _of_table(vector.cpu())
        elif name == "ratio/ess":
            total, squares, n = vector.tolist()
            metrics |= {name: total**2 / (n * squares)} if squares else {}
        else:
            total, weight = vector.tolist()
            metrics |= {name: total / weight} if weight else {}
    return metrics


def _of_table(found: Tensor) -> dict[str, float]:
    rows = dict(zip(CLASSES, found))
    rows["replay"] = found[1 : len(LAGS)].sum(0)
    engine = rows.pop("engine")
    metrics: dict[str, float] = {}
    for name, row in rows.items():
        histogram, (ratio, clipped, answers, length) = row[:BINS], row[BINS:].tolist()
        count = histogram.sum().item()
        if not count:
            continue
        for label, q in QUANTILES.items():
            metrics[f"ratio/{label}_{name}"] = math.exp(_value(_place(histogram, q)))
        metrics[f"ratio/mean_{name}"] = ratio / count
        if name != "external":
            metrics[f"ratio/clipped_{name}"] = clipped / count
        if answers:
            metrics[f"length/{name}"] = length / answers
    if count := engine[:BINS].sum().item():
        metrics["engine/gap_mean"] = engine[BINS].item() / count
        metrics["engine/gap_max"] = _value(int(engine[:BINS].nonzero().max()))
    return metrics


def _place(histogram: Tensor, q: float) -> int:
    """The bin of a quantile."""
    cumulative = histogram.cumsum(0)
    return int(torch.searchsorted(cumulative, q * cumulative[-1:]).clamp(max=BINS - 1))


def _value(index: int) -> float:
    """The middle of a bin."""
    return SCALE * math.sinh((index - HALF) * WIDTH)


def group_metrics(rewards: Tensor, group: Tensor, own: Tensor) -> dict[str, float]:
    """What rewards say about a rollout batch.

    Args:
        rewards: (B,).
        group: (B,) int64.
        own: (B,) bool, false for demonstrations.

    Returns:
        ``reward/own``, ``reward/external`` (where there are demonstrations), and ``groups/zero_signal``, the share of
        groups whose rewards are all equal.
    """
    metrics = {}
    for name, kept in (("reward/own", own), ("reward/external", ~own)):
        if bool(kept.any()):
            metrics[name] = rewards[kept].double().mean().item()
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1
    lowest = rewards.new_full((groups,), torch.inf).scatter_reduce_(0, index, rewards, "amin")
    highest = rewards.new_full((groups,), -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    metrics["groups/zero_signal"] = (lowest == highest).double().mean().item()
    return metrics
