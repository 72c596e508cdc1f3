"""Advantages: known answers by hand in float64, identities between them, and generalised advantages against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.advantages import GAE, GRPO, RLOO, BatchStd, DrGRPO, gae, group_statistics, last_token


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARD = f64(1.0, 5.0, 0.0, 2.0, 3.0, 5.0, 0.0)
GROUP = torch.tensor([7, 3, 7, 7, 3, 3, 7])  # rewards 1, 0, 2, 0 of prompt 7 and 5, 3, 5 of prompt 3, interleaved
OWN = torch.ones(7, dtype=torch.bool)


def test_statistics_of_interleaved_groups() -> None:
    """Group 7: mean 3/4, Σ(R − μ)² = 11/4 over n − 1 = 3. Group 3: mean 13/3, Σ = 8/3 over 2."""
    found = group_statistics(REWARD, GROUP)
    in_seven = GROUP == 7
    torch.testing.assert_close(found.mean, torch.where(in_seven, 0.75, 13 / 3).double())
    torch.testing.assert_close(found.std, torch.where(in_seven, math.sqrt(11 / 12), math.sqrt(4 / 3)).double())
    assert found.size.tolist() == [4, 3, 4, 4, 3, 3, 4]


def test_known_answers() -> None:
    """One group of 1, 0, 2, 0: R − μ = ¼, −¾, 5/4, −¾."""
    reward, group, own = f64(1.0, 0.0, 2.0, 0.0), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    centred = f64(0.25, -0.75, 1.25, -0.75)
    torch.testing.assert_close(DrGRPO()(reward, group, own), centred)
    torch.testing.assert_close(RLOO()(reward, group, own), f64(1 / 3, -1.0, 5 / 3, -1.0))  # 1 − (0 + 2 + 0)/3 …
    torch.testing.assert_close(GRPO()(reward, group, own), centred / (math.sqrt(11 / 12) + 1e-4))
    torch.testing.assert_close(GRPO(eps=1e-6)(reward, group, own), centred / (math.sqrt(11 / 12) + 1e-6))


def test_the_deviation_is_that_of_a_sample() -> None:
    """Rewards 0, 0, 0, 1: sample deviation ½, so the winner has ¾/(½ + 1e-4); the population's √3/4 would give 1.73."""
    found = GRPO()(f64(0, 0, 0, 1), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(found[3], f64(0.75 / 0.5001)[0])


def test_batch_std() -> None:
    """Mean of the group, deviation of all 7 rewards: mean 16/7, Σ(R − 16/7)² = 64 − 256/7 over 6."""
    std = math.sqrt((64 - 256 / 7) / 6)
    torch.testing.assert_close(BatchStd()(REWARD, GROUP, OWN), DrGRPO()(REWARD, GROUP, OWN) / (std + 1e-4))


def test_a_lone_correct_demonstration() -> None:
    """Group of 8: without division 7/8 and −1/8; with the sample deviation √(1/8) = 0.354 they are 2.475 and −0.354."""
    reward, group = f64(1, 0, 0, 0, 0, 0, 0, 0), torch.zeros(8, dtype=torch.int64)
    own = torch.arange(8) > 0
    assert DrGRPO()(reward, group, own).tolist() == [0.875] + 7 * [-0.125]
    found = GRPO()(reward, group, own)
    torch.testing.assert_close(found[:2], f64(0.875, -0.125) / (math.sqrt(1 / 8) + 1e-4))
    torch.testing.assert_close(found[:2], f64(2.475, -0.354), atol=1e-3, rtol=0)
    assert DrGRPO(statistics="own")(reward, group, own).tolist() == [1.0] + 7 * [0.0]


@pytest.mark.parametrize("component", [GRPO(), DrGRPO(), RLOO(), BatchStd(), GRPO(statistics="own")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(component, dtype: torch.dtype) -> None:
    """Eight times 0.1 do not sum to 0.8, which must not leave 1e-17/1e-4 behind."""
    reward, group = torch.full((16,), 0.1, dtype=dtype), torch.arange(16) // 8
    reward[8:] = 0.7
    own = torch.ones(16, dtype=torch.bool)
    found = component(reward, group, own)
    assert found.dtype == dtype and found.tolist() == 16 * [0.0]


@pytest.mark.parametrize("component", [GRPO(), DrGRPO(), RLOO(), BatchStd()])
def test_properties(component) -> None:
    """Sum 0 in every group, the same in any order of rows, unmoved by a constant per group."""
    found = component(REWARD, GROUP, OWN)
    for g in (3, 7):
        assert abs(found[g == GROUP].sum().item()) < 1e-12
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    torch.testing.assert_close(component(REWARD[order], GROUP[order], OWN), found[order])
    if not isinstance(component, BatchStd):
        torch.testing.assert_close(component(REWARD + 10.0 * GROUP, GROUP, OWN), found)


@pytest.mark.parametrize("component", [GRPO(), DrGRPO(), RLOO(), BatchStd(), BatchStd(statistics="own")])
def test_groups_of_one_and_groups_of_demonstrations(component) -> None:
    found = component(f64(3.0, 1.0), torch.tensor([0, 1]), torch.tensor([True, False]))
    assert found.tolist() == [0.0, 0.0]


def test_bad_parameters() -> None:
    with pytest.raises(UsageError, match="`statistics` is 'mine'; expected one of all, own"):
        GRPO(statistics="mine")
    with pytest.raises(UsageError, match="`eps`"):
        BatchStd(eps=0.0)
    with pytest.raises(UsageError, match="`lambda_`"):
        GAE(lambda_=1.5)


# -- generalised advantages --------------------------------------------------------------------------------------------


def test_gae_known_answer() -> None:
    """γ = 0.5, λ = 0.5, r = (0, 0, 1), V = (1, 2, 4): δ₃ = 1 − 4 = −3, δ₂ = 0.5·4 − 2 = 0, δ₁ = 0.5·2 − 1 = 0; so
    A₃ = −3, A₂ = −3/4, A₁ = −3/16."""
    reward, value, mask = f64([0, 0, 1]), f64([1, 2, 4]), torch.ones(1, 3, dtype=torch.float64)
    found = gae(reward, value, mask, discount=0.5, lambda_=0.5)
    torch.testing.assert_close(found, f64([-3 / 16, -3 / 4, -3]))


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_gae_against_the_sum(lambda_: float) -> None:
    """A_t = Σ_k (γλ)^k δ_{t+k} over the kept tokens of each row, whatever stands in the padding and in gaps."""
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = f64([1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0])
    found = gae(reward, value, mask, discount=0.9, lambda_=lambda_)
    for row in range(4):
        places = mask[row].nonzero().flatten().tolist()
        r, v = reward[row, places], torch.cat([value[row, places], f64(0.0)])
        delta = r + 0.9 * v[1:] - v[:-1]
        for i, t in enumerate(places):
            expected = sum((0.9 * lambda_) ** k * delta[i + k].item() for k in range(len(places) - i))
            assert found[row, t].item() == pytest.approx(expected, abs=1e-12)
    assert (found[mask == 0] == 0).all()


def test_gae_component() -> None:
    """λ = γ = 1: A_t = R − V_t and every return is R; normalised over tokens without touching the returns."""
    rewards, value = f64(1.0, -1.0), f64([0.5, 0.2, 9.0], [0.1, 0.3, 0.4])
    mask = f64([1, 1, 0], [1, 1, 1])
    assert last_token(rewards, mask).tolist() == [[0, 1, 0], [0, 0, -1]]
    plain, returns = GAE(normalize=False)(rewards, value, mask)
    torch.testing.assert_close(plain, (rewards[:, None] - value) * mask)
    torch.testing.assert_close(returns, rewards[:, None] * mask)
    found, same = GAE()(rewards, value, mask)
    torch.testing.assert_close(same, returns)
    kept = found[mask > 0]
    torch.testing.assert_close(torch.stack([kept.mean(), kept.std()]), f64(0.0, 1.0), atol=1e-7, rtol=1e-6)
    assert found[0, 2] == 0
