"""Losses of several answers to one prompt: against loops over pairs, gradients, optima."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.directions import cone, direction, percent, winner
from offpolicy.losses.groups import candidate_entropy, concordance, copg_group_loss, srpo_terms
from offpolicy.losses.preference import copg_loss, ipo_loss


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


RATIO = f64([0.3, -0.7, 1.1], [0.2, 0.5, 99.0], [0.0, 0.0, 0.0])  # 99 stands where there is no answer
REWARD = f64([1.0, 0.0, 0.5], [0.25, -0.25, -99.0], [1.0, 1.0, 0.0])
PRESENT = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])


def test_copg_is_the_mean_over_pairs() -> None:
    """The first row by hand at β = 0.5: R_β = 0.85, 0.35, −0.05, differences 0.5, 0.9, 0.4: squares sum to 1.22, the
    mean over 2β is 1.22/3, the sum divided by k − 1 is 0.61. Two answers with rewards ±¼ are IPO times β/2."""
    mean = copg_group_loss(RATIO, REWARD, PRESENT, beta=0.5)
    torch.testing.assert_close(mean[0], torch.tensor(1.22 / 3).double())
    for row in range(3):
        own = [i for i in range(3) if PRESENT[row, i]]
        pairs = [
            copg_loss(*(x[row, [i]] for x, i in ((RATIO, a), (RATIO, b), (REWARD, a), (REWARD, b))), beta=0.5)
            for a, b in combinations(own, 2)
        ]
        torch.testing.assert_close(mean[row], torch.cat(pairs).mean())
    torch.testing.assert_close(mean[1], ipo_loss(RATIO[1, 0], RATIO[1, 1], beta=0.5) * 0.25)
    paper = copg_group_loss(RATIO, REWARD, PRESENT, beta=0.5, normalise="k_minus_1")
    torch.testing.assert_close(paper, mean * 0.5 * f64(3.0, 2.0, 3.0))
    assert paper[0].item() == pytest.approx(0.61)


def test_copg_is_reinforce_with_the_other_answers_as_baseline() -> None:
    """−(2/k)·(R_β − mean of the others) on every log-probability; a constant per prompt changes nothing."""
    ratio = RATIO.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(copg_group_loss(ratio, REWARD + 7.0, PRESENT, beta=0.5).sum(), ratio)
    value = REWARD - 0.5 * RATIO
    for row, k in ((0, 3), (1, 2), (2, 3)):
        for i in range(k):
            others = [value[row, j] for j in range(k) if j != i]
            torch.testing.assert_close(gradient[row, i], -2 / k * (value[row, i] - sum(others) / (k - 1)))
    assert gradient[1, 2] == 0
    assert torch.autograd.gradcheck(lambda x: copg_group_loss(x, REWARD, PRESENT, beta=0.5), (ratio,))


@pytest.mark.parametrize("law", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
def test_copg_has_one_minimiser_for_every_law(law: list[float]) -> None:
    """π_ref·exp(R/β): its gradient is 0 there over all groups of two answers, however they were drawn."""
    reward, ref, weight = f64(1.0, 0.2, -0.5, 0.4), f64(0.1, 0.2, 0.3, 0.4).log(), f64(*law)
    best = (ref + reward / 0.5).log_softmax(0).requires_grad_()
    i, j = torch.triu_indices(4, 4, 1)
    members = torch.stack([i, j], 1)
    loss = copg_group_loss((best - ref)[members], reward[members], torch.ones(6, 2, dtype=torch.bool), beta=0.5)
    (gradient,) = torch.autograd.grad((weight[i] * weight[j] * loss).sum(), best)
    assert gradient.abs().max() < 1e-12


def test_order_of_scores() -> None:
    """Row 0: of three pairs 1.0 > 0.5 > 0.0 the ratios 0.3, 1.1, −0.7 have two right; equal scores do not count."""
    found = concordance(RATIO, REWARD, PRESENT)
    torch.testing.assert_close(found, f64(2 / 3, 0.0, 0.0))
    assert concordance(RATIO, torch.zeros_like(REWARD), PRESENT).isnan().all()


def test_entropy_of_candidates() -> None:
    """1 where all log-ratios are equal, 0 where one stands far above; for (ln 3, 0) H(¾, ¼)/ln 2 = 0.811278."""
    ratio = f64([0.4, 0.4, 0.4], [1.0986122886681098, 0.0, 50.0], [900.0, 0.0, 0.0])
    torch.testing.assert_close(candidate_entropy(ratio, PRESENT), f64(1.0, 0.8112781244591328, 0.0), rtol=0, atol=1e-12)


def test_impossible_options() -> None:
    with pytest.raises(UsageError, match="pair_mean"):
        copg_group_loss(RATIO, REWARD, PRESENT, beta=0.5, normalise="mean")  # type: ignore[arg-type]


# -- self-improving robust preference optimisation ---------------------------------------------------------------------


def test_terms_of_srpo_at_the_reference() -> None:
    """¼ each where all log-ratios are 0; by hand at β = 0.2 for g = (1, −1), f(w|l) = 2, f(l|w) = 0.5, f(w|w) = 0.25,
    f(l|l) = −1: (½ − 0.1·3.5)² = 0.0225, (½ − 0.2·3)² = 0.01, (½ + 0.2·0.25)² = 0.3025."""
    zero = f64(0.0)
    assert [term.item() for term in srpo_terms(*[zero] * 6, beta=0.3)] == [0.25, 0.25, 0.25]
    found = srpo_terms(*(f64(x) for x in (1.0, -1.0, 2.0, 0.5, 0.25, -1.0)), beta=0.2)
    torch.testing.assert_close(torch.cat(found), f64(0.0225, 0.01, 0.3025))


def test_terms_of_srpo_vanish_for_the_exact_solution() -> None:
    """For any table P with P(a ≻ b) + P(b ≻ a) = 1, π†(a|b) ∝ π_ref·exp(P(a ≻ b)/β) and π(b) ∝ π_ref/Z(b): the joint
    and the reviser's margins are P − ½ exactly, so the squares are those of ½ − (P − ½) = 1 − P."""
    g, beta = torch.Generator().manual_seed(3), 0.4
    raw = torch.rand(4, 4, generator=g, dtype=torch.float64)
    wins = torch.where(torch.ones(4, 4).tril(-1) > 0, raw, 1 - raw.T)
    wins.fill_diagonal_(0.5)
    ref = torch.rand(4, generator=g, dtype=torch.float64).log_softmax(0)
    revised = (ref[:, None] + wins / beta).log_softmax(0)  # column b: the law of a
    normaliser = torch.logsumexp(ref[:, None] + wins / beta, 0)
    chosen = (ref - normaliser).log_softmax(0)
    h, f = chosen - ref, revised - ref[:, None]
    for a in range(4):
        for b in range(4):
            terms = srpo_terms(h[[a]], h[[b]], f[a, [b]], f[b, [a]], f[a, [a]], f[b, [b]], beta=beta)
            torch.testing.assert_close(torch.cat(terms), ((1 - wins[a, b]) ** 2).expand(3), rtol=0, atol=1e-14)


def test_gradients_of_srpo() -> None:
    """The reviser's own terms have no gradient to the generator; a shift of all log-ratios changes nothing."""
    ratio = f64([0.3, -0.2, 0.4, 0.1, 0.2, -0.3], [1.0, 0.5, -0.4, 0.2, 0.0, 0.1]).requires_grad_()
    joint, over_bad, over_good = srpo_terms(*ratio.unbind(1), beta=0.3)
    (gradient,) = torch.autograd.grad((over_bad + over_good).sum(), ratio, retain_graph=True)
    assert not gradient[:, :2].any() and gradient[:, 2:].all()
    assert torch.autograd.gradcheck(lambda x: torch.stack(srpo_terms(*x.unbind(1), beta=0.3)).sum(0), (ratio,))
    for ours, theirs in zip((joint, over_bad, over_good), srpo_terms(*(ratio + 5.0).unbind(1), beta=0.3)):
        torch.testing.assert_close(ours, theirs)


# -- directions --------------------------------------------------------------------------------------------------------


def test_directions_and_their_winners() -> None:
    """θ = 0 is the best by the first objective; 45° weighs both alike; the first of equal answers wins; the length of v
    and a constant for all answers have no influence."""
    v = direction(torch.deg2rad(f64([0.0, 45.0, -45.0])))  # (1, 3, 2)
    torch.testing.assert_close(v[0, 1], f64(0.5, 0.5).sqrt())
    scores = f64([[1.0, 0.0], [0.6, 0.9], [0.9, -1.0], [1.0, 0.0]])[:, :4]
    assert winner(scores, v).tolist() == [[0, 1, 2]]
    assert winner(scores, 3.0 * v).tolist() == winner(scores + 7.0, v).tolist() == [[0, 1, 2]]
    present = torch.tensor([[False, True, False, True]])
    assert winner(scores, v, present).tolist() == [[3, 1, 3]]
    assert percent(v).tolist() == [[[100, 0], [71, 71], [71, -71]]]
    found = cone(f64(torch.pi / 3, torch.pi / 3), f64([3.0, 4.0], [-1.0, 0.0]))
    torch.testing.assert_close(found, f64([0.5, 0.75**0.5 * 0.6, 0.75**0.5 * 0.8], [0.5, -(0.75**0.5), 0.0]))
    torch.testing.assert_close(cone(f64(0.5)[0], f64(1.0)), direction(f64(0.5)[0]))
