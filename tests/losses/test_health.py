"""Health metrics: numbers by hand, sums over any split, quantiles against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offpolicy.losses.health import effective_sample_size, group_metrics, summarise
from offpolicy.losses.policy_gradient import Objective, Tokens, Totals


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def health(given: Tokens, objective: Objective | None = None) -> dict[str, float]:
    totals = Totals(len(given.mask), int(given.mask.sum()), 8, given.mask.shape[1])
    return summarise((objective or Objective()).loss(given, totals, iteration=1)[1])


def rows(log_ratio: Tensor, mask: Tensor, **fields: Tensor) -> Tokens:
    """Tokens whose log-ratio to their sampler is given."""
    zero = torch.zeros_like(mask)
    return Tokens(log_ratio, mask, torch.ones(len(mask), dtype=mask.dtype), zero, zero, **fields)


def test_effective_sample_size() -> None:
    """Weights 1, 1, 4: (6)²/(3·18) = 2/3. Of answers the sums of log-ratios count, not the means."""
    assert effective_sample_size(f64(0.0, 0.0, math.log(4))) == pytest.approx(2 / 3)
    assert effective_sample_size(f64(5.0, 5.0)) == 1.0 and effective_sample_size(f64()) == 1.0
    assert effective_sample_size(f64(1000.0, 0.0)) == pytest.approx(0.5)  # no overflow
    log_ratio = f64([math.log(2), math.log(2)], [0.0, math.nan], [0.3, -0.3])
    found = health(rows(log_ratio, f64([1, 1], [1, 0], [1, 1])))
    assert found["ratio/ess"] == pytest.approx(2 / 3)


def test_only_the_sampler_and_own_tokens_count() -> None:
    """A demonstration changes neither the effective sample size nor the length of own answers nor the divergences."""
    log_ratio = f64([0.1, -0.2], [9.0, 9.0])
    mask = torch.ones(2, 2, dtype=torch.float64)
    external = torch.tensor([[False, False], [True, True]])
    found = health(rows(log_ratio, mask, external=external, entropy=f64([1.0, 3.0], [50.0, 50.0])))
    alone = health(rows(log_ratio[:1], mask[:1], entropy=f64([1.0, 3.0])))
    for name in ("ratio/ess", "kl/behavior", "entropy", "length/lag0", "ratio/mean_lag0", "ratio/clipped"):
        assert found[name] == pytest.approx(alone[name])
    assert found["entropy"] == 2.0 and found["length/lag0"] == 2.0
    assert "ratio/q50_external" in found and "ratio/q50_external" not in alone


def test_clipped_share_by_lag() -> None:
    """Ratios e^0.3 with A = 1 are clipped at 1.2, e^0.1 are not; lags 0, 1 and 3, which belongs to the class from 2."""
    log_ratio = f64([0.3, 0.1], [0.3, 0.3], [0.1, 0.1])
    found = health(rows(log_ratio, torch.ones_like(log_ratio), lag=torch.tensor([0, 1, 3])))
    shares = [found[f"ratio/clipped{of}"] for of in ("", "_lag0", "_lag1", "_lag2", "_replay")]
    assert shares == pytest.approx([0.5, 0.5, 1.0, 0.0, 0.5])
    assert "ratio/clipped_lag4" not in found
    means = [found[f"ratio/mean_{of}"] for of in ("lag1", "replay")]
    assert means == pytest.approx([math.exp(0.3), (math.exp(0.3) + math.exp(0.1)) / 2])


def test_clipping_term() -> None:
    """C = mean over answers of (1/|y|)·Σ over clipped tokens of ρA. A = 2 with ρ = 1.3, 1.1 and 1.5: (1.3 + 1.5)·2/3;
    A = −1 with ρ = .5 and .9: −.5/2; an answer of padding and a demonstration are none. Any split adds up."""
    log_ratio = f64([1.3, 1.1, 1.5], [0.5, 0.9, 1], [1.4, 1, 1], [9, 9, 9]).log()
    mask = f64([1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1])
    external = (torch.arange(4) == 3)[:, None].expand(4, 3)
    given = rows(log_ratio, mask, external=external)._replace(advantage=f64(2, -1, 3, 1))
    assert health(given)["ratio/clipping_term"] == pytest.approx((2.8 * 2 / 3 - 0.25) / 2)
    assert health(given, Objective(trust="none"))["ratio/clipping_term"] == 0.0
    by_answer = health(given, Objective(ratio={"name": "sequence", "denominator": "behavior"}))
    ratio = (1.3 * 1.1 * 1.5) ** (1 / 3), math.sqrt(0.45)  # of whole answers
    assert by_answer["ratio/clipping_term"] == pytest.approx((2 * ratio[0] - ratio[1]) / 2)


def test_divergences() -> None:
    """k3 of the sampler's tokens: ρ − ln ρ − 1 to behaviour; e^δ − δ − 1 with δ = ℓ_ref − ℓ to base and previous."""
    x = 0.2
    found = health(rows(f64([x]), f64([1.0]), base_logp=f64([0.5])))
    assert found["kl/behavior"] == pytest.approx(math.exp(x) - 1 - x)
    assert found["kl/previous"] == pytest.approx(math.exp(-x) - 1 + x)
    assert found["kl/base"] == pytest.approx(math.exp(0.3) - 1 - 0.3)
    assert "entropy" not in found


def test_quantiles_against_sorting() -> None:
    """Ratios from 1e-6 to 1e6 and at 1: within half a bin of the quantile of the numbers; exactly 1 where all are."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(40, 50, generator=generator, dtype=torch.float64) ** 3
    mask = torch.ones_like(log_ratio)
    found = health(rows(log_ratio, mask))
    for name, q in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        exact = log_ratio.flatten().sort().values[math.ceil(q * log_ratio.numel()) - 1].item()
        assert math.log(found[f"ratio/{name}_lag0"]) == pytest.approx(exact, rel=0.026, abs=3e-5)
    same = health(rows(torch.zeros(2, 3), torch.ones(2, 3)))
    assert [same[f"ratio/{name}_lag0"] for name in ("q05", "q50", "q95")] == [1.0, 1.0, 1.0]
    assert same["ratio/ess"] == 1.0 and same["kl/behavior"] == 0.0


def test_engine_gap() -> None:
    """|ℓ_b − ℓ_sampler| of 0.01, 0.02 and 0.3: the mean exact, the largest within a bin."""
    zero = torch.zeros(1, 3, dtype=torch.float64)
    found = health(rows(zero, zero + 1, sampler_logp=f64([0.01, -0.02, 0.3])))
    assert found["engine/gap_mean"] == pytest.approx(0.11)
    assert found["engine/gap_max"] == pytest.approx(0.3, rel=0.03)
    assert "engine/gap_max" not in health(rows(zero, zero + 1))


def test_external_ratio_is_that_of_the_objective() -> None:
    """π_θ = π_k = ½ with U = 1: 2·½/(¾ + ½) = 0.8; the loss of demonstrations is −A times that, apart from own."""
    logp, external = f64([math.log(0.5), math.log(0.5)]), torch.tensor([[True, False]])
    given = Tokens(logp, f64([1, 1]), f64(2.0), f64([math.nan, math.log(0.4)]), logp, external=external)
    found = health(given, Objective(ratio={"name": "mis", "uniform": "one"}, trust="none"))
    assert found["ratio/mean_external"] == pytest.approx(0.8)
    assert found["ratio/q50_external"] == pytest.approx(0.8, rel=0.03)
    assert found["loss/external"] == pytest.approx(-1.6) and found["loss/own"] == pytest.approx(-2.5)
    assert "length/lag0" not in found  # one own token behind a beginning is no answer of that length


def test_sums_of_nothing_and_without_health() -> None:
    """A padding row has sums of 0 and no metric; the names never depend on the data."""
    full, empty = (rows(torch.zeros(1, 2), torch.full((1, 2), m)) for m in (1.0, 0.0))
    totals = Totals(1, 2, 2, 2)
    first, second = (Objective().loss(x, totals, iteration=1)[1] for x in (full, empty))
    assert first.keys() == second.keys()
    assert all(float(v.abs().sum()) == 0 for v in second.values()) and summarise(second) == {}
    assert Objective().loss(full, totals, iteration=1, health=False)[1] == {}


def test_groups() -> None:
    """Two of three groups have equal rewards; demonstrations do not enter the reward of own answers."""
    reward, group = f64(1, 0, 0, 0, 1, 1), torch.tensor([5, 5, 6, 6, 9, 9])
    own = torch.tensor([False, True, True, True, True, True])
    found = group_metrics(reward, group, own)
    assert found == {"reward/own": 0.4, "reward/external": 1.0, "groups/zero_signal": pytest.approx(2 / 3)}
    assert "reward/external" not in group_metrics(reward, group, torch.ones(6, dtype=torch.bool))
