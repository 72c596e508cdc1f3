"""Preference losses: known answers in float64, identities between them, gradients, and the optima they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offpolicy.losses.preference import (
    NLL_FORMS,
    cdpo_loss,
    copg_loss,
    dpo_loss,
    idealised_ranking_accuracy,
    inpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    loss_to_rank,
    nll,
    odds_ratio_loss,
    preference_metrics,
    ranking_accuracy,
    rdpo_loss,
    simpo_loss,
)
from offpolicy.losses.scores import PairScores, Scores, TokenMean

RATES = [0.0, 0.1, 0.3, 0.45]


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ZERO = f64(0.0)
U = f64(-30.0, -2.0, 0.0, 0.5, 1.0, 40.0)  # margins; with β = 1 and rejected = 0 they are u itself


def plain(u: Tensor) -> Tensor:
    """ℓ(u) = log(1 + e^−u), written out."""
    return torch.log1p(torch.exp(-u))


def minimise(objective: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Probabilities (K,) that minimise an objective of the log-probabilities of a tabular policy."""
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(logits.log_softmax(0))
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(0)


@pytest.fixture
def table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference log-probabilities and rewards of 5 answers, and the pairs i < j."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    i, j = torch.triu_indices(5, 5, 1)
    return ref, reward, i, j


# -- known answers -----------------------------------------------------------------------------------------------------


def test_policy_equal_to_its_reference() -> None:
    """ln 2 for the logistic losses at any ε, 1/(4·0.1²) = 25 for IPO, ½ per row for KTO."""
    log2 = f64(math.log(2))
    torch.testing.assert_close(dpo_loss(ZERO, ZERO, beta=0.1), log2)
    for rate in RATES:
        torch.testing.assert_close(cdpo_loss(ZERO, ZERO, beta=0.1, label_smoothing=rate), log2)
        torch.testing.assert_close(rdpo_loss(ZERO, ZERO, beta=0.1, label_smoothing=rate), log2)
    torch.testing.assert_close(ipo_loss(ZERO, ZERO, beta=0.1), f64(25.0))
    label = torch.tensor([True, False])
    torch.testing.assert_close(kto_loss(f64(0.0, 0.0), label, ZERO[0], beta=0.1), f64(0.5, 0.5))


def test_dpo_known_answer() -> None:
    """β = 0.1: u = 0.1·(−10 + 12 − (−30 + 25)) = 0.7; ℓ(0.7) = log(1 + e^−0.7) = 0.403186."""
    chosen, rejected = f64(-10.0 + 12.0), f64(-30.0 + 25.0)
    torch.testing.assert_close(dpo_loss(chosen, rejected, beta=0.1), f64(0.4031860), rtol=1e-6, atol=0)


def test_simpo_known_answer() -> None:
    """β = 2, ρ = 0.5: v = 2·(−1 + 2 − 0.5) = 1; ℓ(1) = 0.313262."""
    loss = simpo_loss(f64(-1.0), f64(-2.0), beta=2.0, gamma_beta_ratio=0.5)
    torch.testing.assert_close(loss, f64(0.3132617), rtol=1e-6, atol=0)


def test_rdpo_known_answer_is_negative() -> None:
    """u = 1, ε = 0.3: 0.313262 − 0.3/0.4 = −0.436738."""
    loss = rdpo_loss(f64(1.0), ZERO, beta=1.0, label_smoothing=0.3)
    torch.testing.assert_close(loss, f64(-0.4367383), rtol=1e-6, atol=0)


def test_ipo_known_answer() -> None:
    """β = 0.5: (3 − 1 − 1)² = 1."""
    torch.testing.assert_close(ipo_loss(f64(3.0), f64(1.0), beta=0.5), f64(1.0))


def test_kto_known_answer() -> None:
    """β = 0.1, z₀ = 2: desirable r = 12, 2·σ(−1) = 0.537883; undesirable r = −8, 3·σ(−1) = 0.806824."""
    label = torch.tensor([True, False])
    loss = kto_loss(f64(12.0, -8.0), label, f64(2.0)[0], beta=0.1, desirable_weight=2.0, undesirable_weight=3.0)
    torch.testing.assert_close(loss, f64(0.5378828, 0.8068242), rtol=1e-6, atol=0)


def test_kto_clamps_the_divergence_and_takes_one_label_only() -> None:
    """A negative mean log-ratio counts as 0: σ(−1); rows of one label give no NaN, and z₀ takes no gradient."""
    kl = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    ratio = f64(10.0).requires_grad_()
    loss = kto_loss(ratio, torch.tensor([True]), kl, beta=0.1)
    torch.testing.assert_close(loss, torch.sigmoid(f64(-1.0)))
    loss.sum().backward()
    assert kl.grad is None and ratio.grad is not None and ratio.grad.isfinite().all()


def test_orpo_known_answer() -> None:
    """A = ln ½ is even odds, log-odds 0; A = ln ¾ is 3 to 1: ℓ(ln 3) = ln(4/3) = 0.287682."""
    torch.testing.assert_close(log_odds(f64(0.5, 0.75).log()), f64(0.0, math.log(3)))
    loss = odds_ratio_loss(f64(0.75).log(), f64(0.5).log())
    torch.testing.assert_close(loss, f64(math.log(4 / 3)))


def test_nll_known_answer() -> None:
    """Sums −6 and −2 over 3 and 1 tokens: means 2 and 2; over the mean length 2, 3 and 1, whose mean is 8/4."""
    sums, lengths = f64(-6.0, -2.0), f64(3.0, 1.0)
    expected = {"sum": f64(6.0, 2.0), "sequence_mean": f64(2.0, 2.0), "token_mean": f64(3.0, 1.0)}
    for form in NLL_FORMS:
        torch.testing.assert_close(nll(sums, lengths, 2.0, form), expected[form])
    assert nll(sums, lengths, 2.0, "token_mean").mean().item() == 8 / 4


# -- identities --------------------------------------------------------------------------------------------------------


def test_no_smoothing_is_dpo_to_the_bit() -> None:
    expected = dpo_loss(U, torch.zeros_like(U), beta=0.3)
    for loss in (cdpo_loss, rdpo_loss):
        assert torch.equal(loss(U, torch.zeros_like(U), beta=0.3, label_smoothing=0.0), expected)


@pytest.mark.parametrize("rate", RATES)
def test_rdpo_is_unbiased_under_flipped_labels(rate: float) -> None:
    """(1 − ε)·L(u) + ε·L(−u) = ℓ(u); for ε = 0.1, u = 0.5: 0.9·0.411577 + 0.1·1.036577 = 0.474077."""
    zero = torch.zeros_like(U)
    kept, flipped = (rdpo_loss(u, zero, beta=1.0, label_smoothing=rate) for u in (U, -U))
    torch.testing.assert_close((1 - rate) * kept + rate * flipped, plain(U))


@pytest.mark.parametrize("rate", RATES)
def test_logistic_losses_are_the_plain_one_and_a_line(rate: float) -> None:
    zero = torch.zeros_like(U)
    robust = rdpo_loss(U, zero, beta=1.0, label_smoothing=rate)
    smooth = cdpo_loss(U, zero, beta=1.0, label_smoothing=rate)
    torch.testing.assert_close(robust + rate / (1 - 2 * rate) * U, plain(U))
    torch.testing.assert_close(smooth - rate * U, plain(U))
    torch.testing.assert_close(smooth, (1 - rate) * plain(U) + rate * plain(-U))
    torch.testing.assert_close(robust, ((1 - rate) * plain(U) - rate * plain(-U)) / (1 - 2 * rate))


def test_swapped_answers() -> None:
    """ℓ(−u) = ℓ(u) + u."""
    zero = torch.zeros_like(U)
    torch.testing.assert_close(dpo_loss(zero, U, beta=1.0), dpo_loss(U, zero, beta=1.0) + U)


def test_extreme_margins_stay_finite_in_float32() -> None:
    """log(σ(−200)) underflows to −∞ when it is taken in two steps."""
    u = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = dpo_loss(u, torch.zeros(2), beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [1000.0, 0.0]
    assert u.grad is not None and u.grad.tolist() == [-1.0, 0.0]


def test_simpo_without_difference() -> None:
    """Equal means give ℓ(−γ), and ln 2 at γ = 0."""
    mean = f64(-1.3)
    torch.testing.assert_close(simpo_loss(mean, mean, beta=2.0, gamma_beta_ratio=0.5), plain(f64(-1.0)))
    torch.testing.assert_close(simpo_loss(mean, mean, beta=2.0, gamma_beta_ratio=0.0), f64(math.log(2)))


def test_odds_near_certainty_stay_finite_in_float32() -> None:
    mean = torch.tensor([0.0, -1e-9, -1e-7, -1e-4, -100.0], requires_grad=True)
    odds = log_odds(mean)
    odds.sum().backward()
    assert odds.isfinite().all() and mean.grad is not None and mean.grad.isfinite().all()


def test_odds_are_exact_on_both_branches() -> None:
    """Against float64 in two steps, which is exact enough for A in [−20, −1e-4]."""
    mean = -torch.logspace(-4, math.log10(20), 50)
    exact = mean.double() - torch.log1p(-torch.exp(mean.double()))
    torch.testing.assert_close(log_odds(mean).double(), exact, rtol=1e-5, atol=1e-6)


def test_special_cases_are_ipo() -> None:
    """INPO with τ = η, or with π_t = π_ref, and CoPG with rewards ±¼, are IPO on sums."""
    policy, ref, other = f64(3.0, -1.0), f64(0.5, 2.0), f64(-7.0, 4.0)
    expected = ipo_loss(policy - ref, torch.zeros_like(ref), beta=0.3)
    torch.testing.assert_close(inpo_loss(policy, ref, other, eta=0.3, tau=0.3), expected)
    torch.testing.assert_close(inpo_loss(policy, ref, ref, eta=0.3, tau=0.1), expected)
    contrast = copg_loss(policy - ref, torch.zeros_like(ref), f64(0.25, 0.25), f64(-0.25, -0.25), beta=0.3)
    torch.testing.assert_close(contrast, expected * 0.3 / 2)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
def test_weights_of_the_gradient(rate: float) -> None:
    """dL/du: DPO −σ(−u), rDPO −σ(−u) − ε/(1 − 2ε), cDPO ε − σ(−u)."""
    expected = {
        lambda u: dpo_loss(u, torch.zeros_like(u), beta=1.0): -torch.sigmoid(-U),
        lambda u: rdpo_loss(u, torch.zeros_like(u), beta=1.0, label_smoothing=rate): -torch.sigmoid(-U)
        - rate / (1 - 2 * rate),
        lambda u: cdpo_loss(u, torch.zeros_like(u), beta=1.0, label_smoothing=rate): rate - torch.sigmoid(-U),
    }
    for loss, gradient in expected.items():
        u = U.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(u).sum(), u)[0], gradient)


def test_cdpo_rests_at_the_believed_odds() -> None:
    """u* = log(0.9/0.1) = 2.19722 for ε = 0.1."""
    u = f64(math.log(9)).requires_grad_()
    (gradient,) = torch.autograd.grad(cdpo_loss(u, ZERO, beta=1.0, label_smoothing=0.1).sum(), u)
    assert abs(gradient.item()) < 1e-15


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, r: dpo_loss(w, r, beta=0.7),
        lambda w, r: cdpo_loss(w, r, beta=0.7, label_smoothing=0.2),
        lambda w, r: rdpo_loss(w, r, beta=0.7, label_smoothing=0.2),
        lambda w, r: simpo_loss(w, r, beta=2.0, gamma_beta_ratio=0.3),
        lambda w, r: ipo_loss(w, r, beta=0.4),
        lambda w, r: inpo_loss(w - r, f64(0.1, 0.2, 0.3), f64(0.3, 0.1, 0.0), eta=0.5, tau=0.2),
        lambda w, r: copg_loss(w, r, f64(0.1, 0.2, 0.3), f64(0.3, 0.1, 0.0), beta=0.5),
        lambda w, r: odds_ratio_loss(w, r),
        lambda w, r: kto_loss(w, r < -1, f64(0.3)[0], beta=0.5),
        lambda w, r: nll(w, -r, 1.5, "sequence_mean"),
    ],
)
def test_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    chosen, rejected = f64(-0.2, -1.5, -0.9).requires_grad_(), f64(-1.1, -0.4, -2.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


# -- what the losses are for: optima of tabular policies ---------------------------------------------------------------


def test_dpo_recovers_the_reward(table: tuple[Tensor, ...]) -> None:
    """With labels of a Bradley-Terry law of r, the optimum is π_ref·exp(r/β)."""
    ref, reward, i, j = table
    beta, share = 0.5, torch.sigmoid(reward[i] - reward[j])

    def objective(logps: Tensor) -> Tensor:
        ratio = logps - ref
        won, lost = dpo_loss(ratio[i], ratio[j], beta=beta), dpo_loss(ratio[j], ratio[i], beta=beta)
        return (share * won + (1 - share) * lost).sum()

    torch.testing.assert_close(minimise(objective, 5), (ref + reward / beta).softmax(0), rtol=0, atol=1e-5)


def test_rdpo_recovers_the_reward_from_flipped_labels(table: tuple[Tensor, ...]) -> None:
    """The same optimum from labels of which 30 % are flipped, where DPO finds a flatter policy."""
    ref, reward, i, j = table
    true = torch.sigmoid(reward[i] - reward[j])
    share = 0.7 * true + 0.3 * (1 - true)

    def objective(rate: float) -> Callable[[Tensor], Tensor]:
        def of(logps: Tensor) -> Tensor:
            ratio = logps - ref
            won = rdpo_loss(ratio[i], ratio[j], beta=0.5, label_smoothing=rate)
            lost = rdpo_loss(ratio[j], ratio[i], beta=0.5, label_smoothing=rate)
            return (share * won + (1 - share) * lost).sum()

        return of

    expected = (ref + reward / 0.5).softmax(0)
    torch.testing.assert_close(minimise(objective(0.3), 5), expected, rtol=0, atol=1e-5)
    assert (minimise(objective(0.0), 5) - expected).abs().max() > 0.1


def test_copg_finds_the_tilted_reference(table: tuple[Tensor, ...]) -> None:
    ref, reward, i, j = table

    def objective(logps: Tensor) -> Tensor:
        ratio = logps - ref
        return copg_loss(ratio[i], ratio[j], reward[i], reward[j], beta=0.5).sum()

    torch.testing.assert_close(minimise(objective, 5), (ref + reward / 0.5).softmax(0), rtol=0, atol=1e-7)


def test_rounds_of_inpo_end_at_the_equilibrium() -> None:
    """Rock, paper, scissors with a uniform reference: every start ends at a third each, where DPO would follow a cycle.

    A round is the optimum of its loss, π_ref^{τ/η}·π_t^{1 − τ/η}·exp(P(y ≻ π_t)/η) by the test below.
    """
    wins = f64([0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5])
    logps, ref, eta, tau = f64(0.8, 0.15, 0.05).log(), torch.full((3,), math.log(1 / 3)).double(), 0.6, 0.2
    for _ in range(100):
        logps = (tau / eta * ref + (1 - tau / eta) * logps + wins @ logps.exp() / eta).log_softmax(0)
    torch.testing.assert_close(logps.exp(), torch.full((3,), 1 / 3).double(), rtol=0, atol=1e-6)
    margins = logps[:, None] - logps
    gradient = torch.autograd.functional.jacobian(
        lambda x: (
            (logps.exp()[:, None] * logps.exp())
            * inpo_loss(x[:, None] - x, 0 * margins, margins, eta=eta, tau=tau, probability=wins)
        ).sum(),
        logps,
    )
    assert gradient.abs().max() < 1e-6  # the fixed point is a minimum of its own round, with a judge's probabilities


def test_inpo_is_a_step_of_mirror_descent(table: tuple[Tensor, ...]) -> None:
    """Pairs drawn from π_t: the optimum is π_ref^{τ/η}·π_t^{1 − τ/η}·exp(P(y ≻ π_t)/η), normalised."""
    ref, reward, _, _ = table
    previous, eta, tau = (0.3 * reward).log_softmax(0), 0.5, 0.2
    wins = torch.sigmoid(reward[:, None] - reward)  # (K, K): how often the row beats the column
    weight = previous.exp()[:, None] * previous.exp() * wins

    def margins(logps: Tensor) -> Tensor:
        return logps[:, None] - logps

    def objective(logps: Tensor) -> Tensor:
        return (weight * inpo_loss(margins(logps), margins(ref), margins(previous), eta=eta, tau=tau)).sum()

    expected = (tau / eta * ref + (1 - tau / eta) * previous + wins @ previous.exp() / eta).softmax(0)
    torch.testing.assert_close(minimise(objective, 5), expected, rtol=0, atol=1e-7)


# -- rankings ----------------------------------------------------------------------------------------------------------


def test_ranking_accuracies() -> None:
    """Ties are wrong. At β = 0.1 and α = 0.75 the bonus is 10·ln 3 = 10.99: a reference off by 10 is mended, 12 not."""
    assert ranking_accuracy(f64(-1.0, -1.0, -2.0), f64(-2.0, -1.0, -1.0)).tolist() == [1.0, 0.0, 0.0]
    ideal = idealised_ranking_accuracy(f64(-10.0, -12.0), f64(0.0, 0.0), beta=0.1)
    assert ideal.tolist() == [1.0, 0.0]


def test_idealised_accuracy_with_a_share_for_every_pair() -> None:
    """At β = 0.1 the bonus is 10·ln(α/(1 − α)): −21.97, 0, 21.97 for 0.1, 0.5, 0.9; 10·ln(1/1e-3) = 69.08 for 1, and
    its negative for 0."""
    share, low = f64(0.1, 0.5, 0.9, 1.0, 0.0), f64(21.9, 0.0, -21.9, -69.0, 69.0)
    ideal = idealised_ranking_accuracy(low, torch.zeros_like(low), beta=0.1, agreement=share)
    assert ideal.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    raised = idealised_ranking_accuracy(low + 0.2, torch.zeros_like(low), beta=0.1, agreement=share)
    assert raised.tolist() == [1.0] * 5


def test_loss_to_rank_of_the_theorem() -> None:
    """Theorem 4.1: −log σ(β·c) with c = −Δ_ref; at β = 0.1 c = 5 gives 0.474077, c = 30 gives 0.048587."""
    found = loss_to_rank(f64(-5.0, -30.0), f64(0.0, 0.0), beta=0.1)
    torch.testing.assert_close(found, f64(0.474077, 0.048587), rtol=0, atol=5e-7)


def test_a_pair_is_ranked_correctly_below_its_loss_to_rank() -> None:
    """ℓ(u) < −log σ(−β·Δ_ref) exactly where Δ_θ > 0."""
    generator = torch.Generator().manual_seed(1)
    policy, ref = 5 * torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(ref)
    loss = dpo_loss(policy - ref, zero, beta=0.1)
    assert torch.equal(loss < loss_to_rank(ref, zero, beta=0.1), policy > 0)


# -- metrics and mistakes ----------------------------------------------------------------------------------------------


def test_metrics_of_pairs() -> None:
    stats = {"logits": f64(8.0), "entropy": f64(2.0), "hits": f64(3.0)}
    chosen = Scores(f64(-6.0).requires_grad_(), f64(4.0), f64(-8.0), stats=stats)
    rejected = Scores(f64(-6.0), f64(2.0), f64(-5.0), stats={"logits": f64(2.0), "entropy": f64(4.0), "hits": f64(0.0)})
    metrics = preference_metrics(PairScores(chosen, rejected), 0.1 * chosen.log_ratio, 0.1 * rejected.log_ratio)
    values = {k: v.total / v.tokens if isinstance(v, TokenMean) else v for k, v in metrics.items()}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "rewards/rejected": -0.1,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.3,
            "logps/chosen": -6.0,
            "logps/rejected": -6.0,
            "lengths/chosen": 4.0,
            "lengths/rejected": 2.0,
            "ranking_accuracy": 1.0,  # −1.5 > −3
            "logps/chosen_drift": 2.0,
            "logps/rejected_drift": -1.0,
            "ref_ranking_accuracy": 1.0,  # −2 > −2.5
            "ranking_mended": 0.0,
            "ranking_broken": 0.0,
            "candidate_entropy": 0.27535995,  # H(σ(3), σ(−3))/ln 2 from the drifts 2 and −1
            "logits/chosen": 2.0,
            "logits/rejected": 1.0,
            "entropy": 1.0,  # (2 + 4) / (4 + 2)
            "mean_token_accuracy": 0.75,
        }
    )
    assert not any(value.requires_grad for value in values.values())


def test_metrics_without_reference() -> None:
    scores = PairScores(Scores(f64(-6.0), f64(4.0)), Scores(f64(-6.0), f64(2.0)))
    metrics = preference_metrics(scores, f64(0.0), f64(0.0), mean_logps=True)
    assert metrics["rewards/accuracies"].item() == 0.0  # a tie
    assert metrics["logps/chosen"].item() == -1.5 and "logps/chosen_drift" not in metrics


@pytest.mark.parametrize("rate", [0.5, 0.7, -0.1])
@pytest.mark.parametrize("loss", [cdpo_loss, rdpo_loss])
def test_impossible_rates_are_refused(loss: Callable[..., Tensor], rate: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        loss(ZERO, ZERO, beta=0.1, label_smoothing=rate)


def test_shapes_and_temperatures_are_checked() -> None:
    with pytest.raises(ValueError, match="shape"):
        dpo_loss(f64(1.0, 2.0), f64([1.0], [2.0]), beta=0.1)
    with pytest.raises(ValueError, match="beta"):
        dpo_loss(ZERO, ZERO, beta=0.0)
    with pytest.raises(ValueError, match="beta"):
        kto_loss(ZERO, ZERO > 0, ZERO[0], beta=-1.0)
