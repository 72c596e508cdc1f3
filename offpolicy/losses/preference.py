"""Losses of preference optimisation: pure functions of log-probabilities, one value per pair or answer.

Nothing is reduced: the caller weights and averages. In all of them ``chosen`` and ``rejected`` are (B,) numbers of the
preferred answer y_w and of the other, y_l, in nats: log-probabilities summed over the answer's tokens, their mean per
token, or log-ratios log π(y|x) − log π_ref(y|x), as each function says. ℓ(u) = −log σ(u).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offpolicy.errors import check_range
from offpolicy.losses.groups import candidate_entropy
from offpolicy.losses.scores import PairScores, TokenMean

NllForm = Literal["sum", "sequence_mean", "token_mean"]
NLL_FORMS: tuple[NllForm, ...] = ("sum", "sequence_mean", "token_mean")


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """ℓ(β·[chosen − rejected]), direct preference optimisation (arXiv:2305.18290, Eq. 7).

    Args:
        chosen: log-ratio of y_w, summed over its tokens, (B,); the log-probability alone when there is no reference.
        rejected: the same of y_l, (B,).
        beta: inverse temperature, > 0. Larger stays closer to the reference.

    Returns:
        Loss per pair, (B,), ≥ 0; ln 2 where the policy is the reference.

    Raises:
        ValueError: the shapes differ, or β is out of range.
    """
    return -F.logsigmoid(beta * _difference(chosen, rejected, beta))


def cdpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """(1 − ε)·ℓ(u) + ε·ℓ(−u) = ℓ(u) + ε·u with u = β·[chosen − rejected]: conservative DPO (Mitchell 2023, a note).

    Draws u to log((1 − ε)/ε) instead of to infinity.

    Args:
        chosen: as in :func:`dpo_loss`, (B,).
        rejected: likewise.
        beta: > 0.
        label_smoothing: ε, the share of labels believed to be wrong, in [0, 0.5).
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, upper_open=True)
    margin = beta * _difference(chosen, rejected, beta)
    return label_smoothing * margin - F.logsigmoid(margin)


def rdpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """[(1 − ε)·ℓ(u) − ε·ℓ(−u)] / (1 − 2ε) = ℓ(u) − ε/(1 − 2ε)·u: provably robust DPO (arXiv:2403.00409).

    Its mean over labels flipped with probability ε is the DPO loss of the true labels. Not bounded below: negative
    values are right. The gradient grows as 1/(1 − 2ε).

    Args:
        chosen: as in :func:`dpo_loss`, (B,).
        rejected: likewise.
        beta: > 0.
        label_smoothing: ε, the rate of flipped labels, in [0, 0.5).
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, upper_open=True)
    margin = beta * _difference(chosen, rejected, beta)
    return -F.logsigmoid(margin) - label_smoothing / (1.0 - 2.0 * label_smoothing) * margin


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    """ℓ(β·[chosen − rejected − ρ]): simple preference optimisation (arXiv:2405.14734), without a reference.

    Args:
        chosen: mean log-probability per token of y_w, (B,).
        rejected: the same of y_l, (B,).
        beta: scale of the reward, > 0; 2 to 10 here, since means are small.
        gamma_beta_ratio: ρ = γ/β, the margin aimed at in units of mean log-probability, ≥ 0.
    """
    check_range("gamma_beta_ratio", gamma_beta_ratio, 0.0)
    return -F.logsigmoid(beta * (_difference(chosen, rejected, beta) - gamma_beta_ratio))


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(chosen − rejected − 1/(2β))²: identity preference optimisation (arXiv:2310.12036, Eq. 17, with τ = β).

    Args:
        chosen: log-ratio of y_w, (B,): summed as in the paper, or its mean per token.
        rejected: the same of y_l, (B,).
        beta: > 0; the margin aimed at is 1/(2β).

    Returns:
        (B,), ≥ 0; 1/(4β²) where the policy is the reference.
    """
    return (_difference(chosen, rejected, beta) - 0.5 / beta).square()


def inpo_loss(
    policy_margin: Tensor,
    ref_margin: Tensor,
    previous_margin: Tensor,
    *,
    eta: float,
    tau: float,
    probability: Tensor | float = 1.0,
) -> Tensor:
    """(h − (p − ½)/η)², h = Δ − (τ/η)·Δ_ref − (1 − τ/η)·Δ_t: iterative Nash policy optimisation (arXiv:2407.00617).

    Δ is the summed log-probability of the chosen answer less that of the rejected one. The minimiser is
    π_ref^{τ/η}·π_t^{1 − τ/η}·exp(P(y ≻ π_t)/η), normalised.

    Args:
        policy_margin: Δ of the policy, (B,).
        ref_margin: Δ_ref of the first reference, (B,).
        previous_margin: Δ_t of the policy of the last iteration, (B,).
        eta: η, step of the mirror descent, > 0.
        tau: τ, weight of the first reference, in [0, η].
        probability: p, that a judge prefers the chosen answer, (B,) in [0, 1]; 1 is a plain label, with the target
            1/(2η). The minimiser is the same for both.
    """
    check_range("eta", eta, 0.0, lower_open=True)
    check_range("tau", tau, 0.0, eta)
    share = tau / eta
    margin = policy_margin - share * ref_margin - (1.0 - share) * previous_margin
    return (margin - (probability - 0.5) / eta).square()


def copg_loss(first: Tensor, second: Tensor, first_reward: Tensor, second_reward: Tensor, *, beta: float) -> Tensor:
    """(R_β − R'_β)²/(2β), R_β = R − β·log-ratio: contrastive policy gradient (arXiv:2406.19185).

    For answers to one prompt drawn from any law that gives weight to all, the minimiser is π_ref·exp(R/β), normalised.

    Args:
        first: summed log-ratio of one answer, (B,).
        second: the same of another answer to the same prompt, (B,).
        first_reward: R of the one, (B,).
        second_reward: R of the other, (B,).
        beta: weight of the divergence from the reference, > 0.
    """
    return (first_reward - second_reward - beta * _difference(first, second, beta)).square() / (2.0 * beta)


def kto_loss(
    log_ratio: Tensor,
    label: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """λ_D·σ(β·[z₀ − r]) for desirable answers, λ_U·σ(β·[r − z₀]) for others: KTO (arXiv:2402.01306, section 4.1).

    The paper's λ − λ·σ(·) in a form that loses no digits.

    Args:
        log_ratio: r, summed log-ratio of the answer, (B,).
        label: bool, (B,): true for desirable answers.
        kl: mean log-ratio over mismatched prompts and answers of the whole step, 0-d; z₀ = max(0, kl), no gradient.
        beta: > 0.
        desirable_weight: λ_D, ≥ 0.
        undesirable_weight: λ_U, ≥ 0. Keep λ_D·n_D / (λ_U·n_U) in [1, 4/3].
    """
    check_range("beta", beta, 0.0, lower_open=True)
    difference = beta * (log_ratio - kl.detach().clamp(min=0.0))
    desirable = desirable_weight * torch.sigmoid(-difference)
    return torch.where(label, desirable, undesirable_weight * torch.sigmoid(difference))


def log_odds(mean_logps: Tensor) -> Tensor:
    """A − log(1 − e^A), the log-odds of an answer from its mean log-probability per token A ≤ 0; any shape.

    A is clamped at −1e-7, where float32 can still tell e^A from 1.
    """
    a = mean_logps.clamp(max=-1e-7)
    near_zero = a > -0.6931
    # log(1 − e^a): expm1 keeps the digits near 0, log1p those far from it
    complement = torch.where(near_zero, torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))
    return a - complement


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ℓ(log-odds(y_w) − log-odds(y_l)), the preference term of ORPO (arXiv:2403.07691, Eq. 7), without its weight λ.

    Args:
        chosen: mean log-probability per token of y_w, (B,).
        rejected: the same of y_l, (B,).
    """
    _check_shapes(chosen, rejected)
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def nll(sum_logps: Tensor, length: Tensor, mean_length: Tensor | float, form: NllForm) -> Tensor:
    """Negative log-likelihood of an answer per row, in three normalisations, (B,).

    Args:
        sum_logps: log π(y|x) summed over the answer, (B,).
        length: scored tokens of the answer, (B,).
        mean_length: mean of ``length`` over the whole optimiser step, all micro-batches and processes.
        form: "sum", −S; "sequence_mean", −S/n, every answer alike; "token_mean", −S divided by ``mean_length``, whose
            mean over the step is Σ −S / Σ n, every token alike.
    """
    if form == "sum":
        return -sum_logps
    return -sum_logps / (length if form == "sequence_mean" else mean_length)


def ranking_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the policy prefers y_w, with no reference (arXiv:2405.19534); a tie is wrong.

    Args:
        chosen: mean log-probability per token of y_w (the paper's main setting) or its sum, (B,).
        rejected: the same of y_l, (B,).
    """
    return (chosen > rejected).to(chosen.dtype)


def idealised_ranking_accuracy(
    ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float, agreement: float | Tensor = 0.75
) -> Tensor:
    """1 where a policy that optimised DPO perfectly would prefer y_w (arXiv:2405.19534, section 3); a tie is wrong.

    That is where Δ_ref + (1/β)·log(α/(1 − α)) > 0. With log-probabilities per token it is the paper's length-normalised
    ideal. The authors' script divides the two log-probabilities in its other branch, and takes quotients within 5 % of
    1 for ties; here it is the formula.

    Args:
        ref_chosen: log-probability of y_w under the reference, summed or per token, (B,).
        ref_rejected: the same of y_l, (B,).
        beta: of the objective, > 0.
        agreement: α, share of people who prefer y_w: one number in [0.5, 1), 0.75 when it is not known, or (B,) in
            [0, 1], where a share of 0 counts as 1e-3 on either side, as in the authors' script.
    """
    check_range("beta", beta, 0.0, lower_open=True)
    if not isinstance(agreement, Tensor):
        check_range("agreement", agreement, 0.5, 1.0, upper_open=True)
        bonus: float | Tensor = math.log(agreement / (1.0 - agreement)) / beta
    else:
        for_chosen, other = (torch.where(share > 0, share, 1e-3) for share in (agreement, 1.0 - agreement))
        bonus = (for_chosen / other).log() / beta
    return (ref_chosen - ref_rejected + bonus > 0).to(ref_chosen.dtype)


def loss_to_rank(ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """The DPO loss below which the policy ranks a pair correctly, −log σ(−β·Δ_ref): how hard a pair is, (B,).

    Small where the reference gets the pair very wrong. Arguments as in :func:`idealised_ranking_accuracy`.
    """
    return -F.logsigmoid(beta * _difference(ref_rejected, ref_chosen, beta))


def preference_metrics(
    scores: PairScores, chosen_reward: Tensor, rejected_reward: Tensor, *, mean_logps: bool = False
) -> dict[str, Any]:
    """What is reported of a batch of pairs, under the usual names: (B,) each, no gradient.

    Logits, entropy and token accuracy are :class:`TokenMean`, which pool the tokens of all rows.

    Args:
        scores: of the batch.
        chosen_reward: implicit reward of y_w, (B,).
        rejected_reward: the same of y_l, (B,).
        mean_logps: report log-probabilities per token and not summed, for methods whose reward is a mean.
    """
    chosen, rejected = scores.chosen, scores.rejected
    logps = (chosen.mean_logps, rejected.mean_logps) if mean_logps else (chosen.sum_logps, rejected.sum_logps)
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/accuracies": (chosen_reward > rejected_reward).to(chosen_reward.dtype),
        "rewards/margins": chosen_reward - rejected_reward,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
        "lengths/chosen": chosen.length,
        "lengths/rejected": rejected.length,
        "ranking_accuracy": ranking_accuracy(chosen.mean_logps, rejected.mean_logps),
    }
    if chosen.ref_logps is not None and rejected.ref_logps is not None:
        metrics["logps/chosen_drift"] = chosen.log_ratio
        metrics["logps/rejected_drift"] = rejected.log_ratio
        before = ranking_accuracy(chosen.ref_logps / chosen.length, rejected.ref_logps / rejected.length)
        metrics["ref_ranking_accuracy"] = before
        metrics["ranking_mended"] = metrics["ranking_accuracy"] * (1 - before)  # wrong under the reference, right now
        metrics["ranking_broken"] = before * (1 - metrics["ranking_accuracy"])
        both = torch.stack([chosen.log_ratio, rejected.log_ratio], 1)
        metrics["candidate_entropy"] = candidate_entropy(both, torch.ones_like(both, dtype=torch.bool))
    pooled = {}
    if chosen.stats:
        entropy = chosen.stats["entropy"] + rejected.stats["entropy"]
        pooled = {
            "logits/chosen": TokenMean(chosen.stats["logits"], chosen.length),
            "logits/rejected": TokenMean(rejected.stats["logits"], rejected.length),
            "entropy": TokenMean(entropy, chosen.length + rejected.length),
            "mean_token_accuracy": TokenMean(chosen.stats["hits"], chosen.length),
        }
    return {name: value.detach() for name, value in metrics.items()} | pooled


def _difference(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """chosen − rejected, after the checks that most losses make."""
    check_range("beta", beta, 0.0, lower_open=True)
    _check_shapes(chosen, rejected)
    return chosen - rejected


def _check_shapes(chosen: Tensor, rejected: Tensor) -> None:
    """Equal shapes: (B,) and (B, 1) would silently give (B, B)."""
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"`chosen` has shape {tuple(chosen.shape)} and `rejected` {tuple(rejected.shape)}; expected the same, (B,)."
        )
