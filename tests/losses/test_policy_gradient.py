"""The policy-gradient objective: every component by hand in float64, closed-form gradients, identities between methods,
sums over any split of a step, and components from outside."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.language.logprobs import token_divergence
from offpolicy.losses.policy import anchors, ratios, trust, weights
from offpolicy.losses.policy_gradient import (
    COMPONENTS,
    Answers,
    Judged,
    Objective,
    Ratio,
    Surrogate,
    Tokens,
    Totals,
    component,
)

ROWS, LENGTH = 5, 4


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(seed: int = 0, *, external: bool = False, **fields: Any) -> Tokens:
    """Random tokens of rows of 4, 3, 1, 2 and 4 tokens, NaN in the padding; one row and one prefix external."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for row, length in enumerate((4, 3, 1, 2, 4)):
        mask[row, :length] = 1
    outside = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    outside[1], outside[4, :2] = True, True
    logp = -draw(ROWS, LENGTH).abs()
    logp = torch.where(mask > 0, logp, torch.nan)
    near = [torch.where(mask > 0, logp + 0.3 * draw(ROWS, LENGTH), torch.nan) for _ in range(4)]
    if external:
        near[0] = torch.where(outside, torch.nan, near[0])  # nobody knows the author's probabilities
        fields["external"] = outside
    made = Tokens(
        logp.clone().requires_grad_(),
        mask,
        draw(ROWS),
        behavior_logp=near[0],
        previous_logp=near[1],
        base_logp=near[2],
        sampler_logp=near[3],
        lag=torch.tensor([0, 1, 2, 5, 0]),
    )
    return made._replace(**fields)


def totals(of: Tokens, **fields: int) -> Totals:
    rows, count = int((of.mask.sum(1) > 0).sum()), int(of.mask.sum())
    return Totals(rows, count, max_length=8, padded_length=LENGTH)._replace(**fields)


def one(logp: float, behavior: float = 0.0, previous: float = 0.0, advantage: float = 1.0, **fields: Any) -> Tokens:
    """A single token with these probabilities' logarithms."""
    return Tokens(f64([logp]).requires_grad_(), f64([1.0]), f64(advantage), f64([behavior]), f64([previous]), **fields)


def probability(p: float) -> float:
    return math.log(p)


ONE_TOKEN = Totals(1, 1, 1, 1)


def loss_of(objective: Objective, given: Tokens, iteration: int = 1, **fields: int) -> Tensor:
    return objective.loss(given, totals(given, **fields), iteration=iteration)[0]


def gradient(objective: Objective, given: Tokens, iteration: int = 1, **fields: int) -> Tensor:
    return torch.autograd.grad(loss_of(objective, given, iteration, **fields), given.logp)[0]


# -- ratio -------------------------------------------------------------------------------------------------------------


def test_ratios_known_answers() -> None:
    """π_θ = 0.6, π_k = 0.5, π_b = 0.4: ρ is 1.5 by token and mix (center 1.25), 1.2·1.25 decoupled, 1.2 for a sequence
    of one, 1 without."""
    given = one(probability(0.6), probability(0.4), probability(0.5))
    assert ratios.TokenRatio()(given).value.item() == pytest.approx(1.5)
    mix = ratios.MixRatio()(given)
    assert (mix.value.item(), mix.center.item()) == (pytest.approx(1.5), pytest.approx(1.25))  # type: ignore[union-attr]
    decoupled = ratios.DecoupledRatio()(given)
    assert (decoupled.value.item(), decoupled.factor.item()) == (pytest.approx(1.2), pytest.approx(1.25))  # type: ignore[union-attr]
    assert ratios.DecoupledRatio(cap=1.1)(given).factor.item() == pytest.approx(1.1)  # type: ignore[union-attr]
    assert ratios.SequenceRatio()(given).value.item() == pytest.approx(1.2)
    assert ratios.SequenceRatio(denominator="behavior")(given).value.item() == pytest.approx(1.5)
    assert ratios.NoRatio()(given).value.item() == 1.0


@pytest.mark.parametrize("per_token", [False, True])
def test_sequence_ratio(per_token: bool) -> None:
    """exp of the mean of ℓ − ℓ_k: (0.1 + 0.3 − 0.1)/3 = 0.1 for a row with padding. The gradient of the row's term is
    −A·ρ/|y| per token, and of GSPO-token too when advantages are equal."""
    logp = f64([-1.0, -2.0, -3.0, 5.0]).requires_grad_()
    previous = f64([-1.1, -2.3, -2.9, -9.0])
    given = Tokens(logp, f64([1, 1, 1, 0]), f64(2.0), previous, previous)
    found = ratios.SequenceRatio(per_token=per_token)(given).value
    torch.testing.assert_close(found[:, :3], f64(3 * [math.exp(0.1)]))
    objective = Objective(ratio={"name": "sequence", "per_token": per_token}, trust="none")
    expected = f64(3 * [-2.0 * math.exp(0.1) / 3] + [0.0])
    torch.testing.assert_close(gradient(objective, given), expected)


def test_no_ratio_is_reinforce() -> None:
    """−Σ A·∇ℓ / N, whatever the behaviour policy was."""
    given = tokens()
    found = gradient(Objective(ratio="none", trust="none", aggregation="seq_sum"), given)
    torch.testing.assert_close(found, -given.advantage[:, None] * given.mask / ROWS)


def test_log_ratios_are_clamped() -> None:
    """Probabilities e^90 apart: e^20, finite, not e^90."""
    given = one(0.0, -90.0, -90.0)
    for name in ("token", "mix", "decoupled", "sequence"):
        assert component("ratio", name)(given).value.item() == pytest.approx(math.exp(20))


@pytest.mark.parametrize(
    ("p", "one_", "one_focal", "vocab", "vocab_focal"),
    [
        (1e-4, 0.0004, 0.0004, 1.250, 1.250),
        (0.01, 0.039, 0.039, 1.332, 1.326),
        (0.1, 0.308, 0.292, 1.333, 1.265),
        (0.5, 0.800, 0.566, 1.333, 0.943),
        (0.95, 0.987, 0.221, 1.333, 0.298),
    ],
)
def test_mis_table(p: float, one_: float, one_focal: float, vocab: float, vocab_focal: float) -> None:
    """2p/(1.5p + 0.5U) and its product with √(1 − p) at θ = θ_k, for U = 1 and U = 1/50000."""
    outside = torch.ones(1, 1, dtype=torch.bool)
    given = one(probability(p), math.nan, probability(p), external=outside)
    focal = weights.FocalWeight()(given).item()
    for ratio, weighted, options in (
        (one_, one_focal, {"uniform": "one"}),
        (vocab, vocab_focal, {"uniform": "vocab", "vocabulary": 50_000}),
    ):
        found = ratios.MISRatio(**options)(given).value.item()
        u = 1.0 if options["uniform"] == "one" else 1 / 50_000
        assert found == pytest.approx(2 * p / (1.5 * p + 0.5 * u), rel=1e-12)
        assert found == pytest.approx(ratio, abs=6e-4)
        assert found * focal == pytest.approx(weighted, abs=6e-4)


def test_mis_with_a_known_author() -> None:
    """π_θ = 0.3, π_k = 0.2, π_ω = 0.6: 2·0.3/0.8 = 0.75; as in the code 0.3/(0.6 + 1e-6). NaN falls back to the
    estimate: 0.6/(0.3 + 0.5/10)."""
    outside = torch.ones(1, 1, dtype=torch.bool)
    given = one(probability(0.3), probability(0.6), probability(0.2), external=outside)
    options: dict[str, Any] = {"vocabulary": 10}
    unknown = given._replace(behavior_logp=f64([math.nan]))
    assert ratios.MISRatio(demonstrator="known", **options)(given).value.item() == pytest.approx(0.75)
    assert ratios.MISRatio(demonstrator="ratio", **options)(given).value.item() == pytest.approx(0.3 / (0.6 + 1e-6))
    for demonstrator in ("known", "unknown", "ratio"):
        found = ratios.MISRatio(demonstrator=demonstrator, **options)(unknown).value.item()
        assert found == pytest.approx(0.6 / 0.35)
    assert ratios.MISRatio(high=0.5, **options)(given).value.item() == 0.5


@pytest.mark.parametrize("uniform", ["vocab", "one"])
def test_gradient_of_the_external_term(uniform: str) -> None:
    """d loss/dℓ = −A·(1 − p)^γ·r^m on demonstrations, nothing through weight or denominator; −A·ρ on own tokens. One
    row is a prefix of a demonstration that the policy went on from."""
    given = tokens(external=True)
    objective = Objective(
        ratio={"name": "mis", "uniform": uniform, "vocabulary": 30},
        trust="none",
        aggregation="seq_sum",
        weight=({"name": "focal", "gamma": 0.7},),
    )
    p, old = given.logp.detach().exp(), given.previous_logp.exp()
    u = 1.0 if uniform == "one" else 1 / 30
    outside = (1 - p) ** 0.7 * 2 * p / (1.5 * old + 0.5 * u)
    inside = (given.logp.detach() - given.behavior_logp).exp()
    expected = -given.advantage[:, None] * torch.where(given.outside, outside, inside) / ROWS
    found = gradient(objective, given)
    torch.testing.assert_close(found, torch.where(given.kept, expected, 0.0))
    assert (found[4, :2] != 0).all() and (found[1, :3] != 0).all()


def test_the_loss_of_an_answer_that_goes_on_from_a_beginning() -> None:
    """Two tokens given and two own, A = 2, probabilities .5, .2 | .4, .9 now, .4, .1 | .5, .6 before, V = 10.

    RL-PLUS, γ = ½: 2p/(1.5p_k + .05)·√(1 − p) is 1/.65·√.5 = 1.08786 and .4/.2·√.8 = 1.78885; own .4/.5 = .8 and
    .9/.6 = 1.5. GRPO: 1 and 1 for what is given; own .8 and, clipped, 1.2. Means over all four tokens, times −A.
    """
    now, before = f64([0.5, 0.2, 0.4, 0.9]).log(), f64([math.nan, math.nan, 0.5, 0.6]).log()
    start = f64([0.4, 0.1, 0.5, 0.6]).log()
    external = torch.tensor([[True, True, False, False]])
    given = Tokens(now.requires_grad_(), f64([1, 1, 1, 1]), f64(2.0), before, start, external=external)
    plus = Objective(ratio={"name": "mis", "vocabulary": 10}, trust="none", weight=("focal",))
    assert loss_of(plus, given).item() == pytest.approx(
        -2 * (math.sqrt(0.5) / 0.65 + 2 * math.sqrt(0.8) + 0.8 + 1.5) / 4
    )
    assert loss_of(Objective(), given).item() == pytest.approx(-2 * (1 + 1 + 0.8 + 1.2) / 4)
    slopes = gradient(Objective(), given)
    torch.testing.assert_close(slopes, f64([-0.5, -0.5, -0.4, 0.0]))  # −A/4·ρ, 0 where it is clipped


def test_without_demonstrations_rl_plus_is_grpo_without_clipping() -> None:
    plus = Objective(ratio={"name": "mis", "uniform": "one"}, trust="none", weight=("focal",))
    plain = Objective(trust="none")
    nobody = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for given in (tokens(), tokens()._replace(external=nobody)):
        assert torch.equal(loss_of(plus, given), loss_of(plain, given))
        assert torch.equal(gradient(plus, given), gradient(plain, given))


def test_demonstrations_are_never_clipped() -> None:
    """π_θ/π_k = 3 is far outside of the interval; with A > 0 an own token has no gradient, a demonstration has."""
    options: dict[str, Any] = {"ratio": {"name": "mis", "uniform": "one"}, "trust": "ppo"}
    own = one(probability(0.6), probability(0.2), probability(0.2))
    outside = own._replace(external=torch.ones(1, 1, dtype=torch.bool))
    assert gradient(Objective(**options), own).item() == 0.0
    expected = -1.2 / (1.5 * 0.2 + 0.5)
    assert gradient(Objective(**options), outside).item() == pytest.approx(expected)


# -- trust region ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [
        (1.1, 1.0, 1.1, False),
        (1.5, 1.0, 1.3, True),  # 1 + high
        (0.5, 1.0, 0.5, False),
        (1.5, -1.0, -1.5, False),
        (0.5, -1.0, -0.8, True),  # 1 − low
        (4.0, -1.0, -4.0, False),
        (4.0, 0.0, 0.0, False),
    ],
)
def test_ppo_and_dual(ratio: float, advantage: float, value: float, clipped: bool) -> None:
    given = one(probability(ratio) - 3, -3.0, -3.0, advantage=advantage)
    rho, adv = ratios.TokenRatio()(given), f64([advantage])
    found = trust.PPO(0.2, 0.3)(rho, adv, given)
    assert (found.value.item(), found.clipped.item()) == (pytest.approx(value), clipped)
    dual = trust.DualPPO(0.2, 0.3, c=3.0)(rho, adv, given)
    beyond = ratio > 3 and advantage < 0
    assert dual.value.item() == pytest.approx(-3.0 if beyond else value)
    assert dual.clipped.item() is (clipped or beyond)
    slope = torch.autograd.grad(dual.value.sum(), given.logp)[0].item()
    assert slope == pytest.approx(0.0 if clipped or beyond else ratio * advantage)


def test_centred_interval() -> None:
    """π_k/π_b = 2, ε = 0.2: the interval is 1.8 to 2.2, and 1.6 to 2.4 when it scales; around 1 for "behavior"."""

    def bounds(center: str, scale: float = 1.0) -> tuple[float, float]:
        part = trust.Centred(0.2, center=center, scale=scale)
        ends = []
        for advantage, ratio in ((-1.0, 0.01), (1.0, 100.0)):
            found = part(Ratio(f64([ratio]), f64([2.0])), f64([advantage]), one(0.0))
            ends.append(found.value.item() / advantage)
        return ends[0], ends[1]

    assert bounds("additive") == (pytest.approx(1.8), pytest.approx(2.2))
    assert bounds("additive", 0.5) == (pytest.approx(1.9), pytest.approx(2.1))
    assert bounds("multiplicative") == (pytest.approx(1.6), pytest.approx(2.4))
    assert bounds("behavior") == (pytest.approx(0.8), pytest.approx(1.2))


def test_the_lower_bound_is_not_negative() -> None:
    """π_k/π_b = 0.1, ε = 0.2: with A < 0 and ρ = 0.001 nothing is clipped, as ρ is above max(−0.1, 0)."""
    found = trust.Centred()(Ratio(f64([0.001]), f64([0.1])), f64([-1.0]), one(0.0))
    assert (found.value.item(), found.clipped.item()) == (pytest.approx(-0.001), False)


def test_centred_at_the_start_of_an_iteration() -> None:
    """θ = θ_k at any lag: nothing is clipped and the loss is −mean(c·A); clipping around 1 would reject tokens."""
    given = tokens()
    given = given._replace(logp=given.previous_logp.clone().requires_grad_())
    objective = Objective(ratio="mix", trust="centred", aggregation="token_mean")
    ratio = ratios.MixRatio()(given)
    advantage = given.advantage[:, None]
    surrogate = trust.Centred()(ratio, advantage, given)
    assert not surrogate.clipped[given.kept].any()
    assert trust.Centred(center="behavior")(ratio, advantage, given).clipped[given.kept].any()
    center = (given.previous_logp - given.behavior_logp).exp()
    expected = -(center * advantage)[given.kept].mean()
    torch.testing.assert_close(loss_of(objective, given).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(0.2, None), (0.1, 0.28), (3e-4, 4e-4)])
def test_remix_without_lag_is_grpo_to_the_last_bit(dtype: torch.dtype, low: float, high: float | None) -> None:
    for seed in range(20):
        given = tokens(seed)
        given = given._replace(previous_logp=given.behavior_logp, lag=None)
        given = Tokens(*(x.to(dtype) if x is not None else None for x in given))  # type: ignore[arg-type]
        given = given._replace(logp=given.logp.detach().requires_grad_())
        grpo = Objective(trust={"name": "ppo", "low": low, "high": high})
        remix = Objective(ratio="mix", trust={"name": "centred", "low": low, "high": high})
        assert torch.equal(loss_of(grpo, given), loss_of(remix, given))
        assert torch.equal(gradient(grpo, given), gradient(remix, given))


@pytest.mark.parametrize("trust", ["ppo", "dual", "centred", "none"])
@pytest.mark.parametrize("ratio", ["token", "mix", "decoupled", "none", {"name": "mis", "vocabulary": 9}])
def test_gradients_against_differences(ratio: Any, trust: str) -> None:
    """The whole objective of a few tokens in float64; without a ratio the loss is no function of ℓ: REINFORCE."""
    given = tokens(3, external=True, entropy=-tokens(4).logp.detach())
    objective = Objective(
        ratio=ratio,
        trust=trust,
        anchors=({"name": "k3", "coef": 0.3}, {"name": "k2", "coef": 0.2, "target": "previous"}),
        entropy={"name": "bonus", "coef": 0.1},
    )
    if ratio == "none":
        plain = Objective(ratio="none", trust=trust)
        expected = -given.advantage[:, None] * given.mask / given.mask.sum(1, keepdim=True) / ROWS
        torch.testing.assert_close(gradient(plain, given), expected)
        return
    generator = torch.Generator().manual_seed(1)
    own = given.own if ratio != {"name": "mis", "vocabulary": 9} else given.kept  # elsewhere ℓ − sg[ℓ]
    way = torch.where(own, torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64), 0.0)

    def at(shift: float) -> float:
        return loss_of(objective, given._replace(logp=given.logp.detach() + shift * way)).item()

    slope = (gradient(objective, given)[own] * way[own]).sum().item()
    assert slope == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-6, abs=1e-9)


# -- aggregation -------------------------------------------------------------------------------------------------------


def test_aggregations_known_answers() -> None:
    """Rows (1, 2, 3), (4) with the longest allowed 8 and padding to 3; a step of just these."""
    values, mask = f64([1, 2, 3], [4, math.nan, math.nan]), f64([1, 1, 1], [1, 0, 0])
    step = Totals(2, 4, 8, 3)
    expected = {
        "seq_mean_token_mean": (2 + 4) / 2,
        "token_mean": 10 / 4,
        "token_mean_local": 10 / 4,
        "dr_grpo": 10 / (2 * 8),
        "sum_over_T": 10 / 8,
        "seq_sum": (6 + 4) / 2,
    }
    assert expected.keys() == COMPONENTS["aggregation"].keys()
    for name, value in expected.items():
        assert component("aggregation", name)(values, mask, step).item() == pytest.approx(value)
    padded = component("aggregation", {"name": "sum_over_T", "length": "padded"})
    assert padded(values, mask, step).item() == pytest.approx(10 / 3)


def part(given: Tokens, rows: slice) -> Tokens:
    return Tokens(*(None if x is None else x[rows] for x in given))  # type: ignore[arg-type]


def test_a_share_of_a_step_is_as_exact_as_its_values() -> None:
    """One answer of three, whose only token has the loss 1."""
    mean = COMPONENTS["aggregation"]["token_mean_local"]()
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(mean(one, one, Totals(3, 3, 1, 1))) == 1 / 3


@pytest.mark.parametrize("aggregation", [n for n in COMPONENTS["aggregation"] if n != "token_mean_local"])
def test_shares_add_up(aggregation: str) -> None:
    """Micro-batches of 2, 3 and a padding row give the loss and gradient of the whole step; so do the health sums."""
    given = tokens(external=True)
    given = given._replace(entropy=(-given.logp).clone())
    objective = Objective(
        ratio={"name": "mis", "vocabulary": 40},
        aggregation=aggregation,
        anchors=({"name": "k3", "coef": 0.1},),
        entropy={"name": "bonus", "coef": 0.01, "aggregation": "token_mean"},
        weight=("focal", "engine"),
    )
    step = totals(given)
    whole, sums = objective.loss(given, step, iteration=1)
    nothing = part(given, slice(0, 1))
    nothing = nothing._replace(mask=torch.zeros_like(nothing.mask))
    parts = [part(given, slice(0, 2)), part(given, slice(2, 5)), nothing]
    found = [objective.loss(p, step, iteration=1) for p in parts]
    total = torch.stack([share for share, _ in found]).sum()
    torch.testing.assert_close(total, whole)
    expected, alike = (torch.autograd.grad(x, given.logp, retain_graph=True)[0] for x in (whole, total))
    torch.testing.assert_close(alike, expected)
    assert found[2][0].item() == 0.0
    for name, vector in sums.items():
        assert all(share.keys() == sums.keys() for _, share in found)
        torch.testing.assert_close(sum(share[name] for _, share in found), vector, equal_nan=True)  # type: ignore[arg-type]


def test_local_means_depend_on_the_split_and_global_ones_do_not() -> None:
    values, mask = f64([1, 1, 1], [4, 0, 0]), f64([1, 1, 1], [1, 0, 0])
    step = Totals(2, 4, 8, 3)
    for name, differs in (("token_mean", False), ("token_mean_local", True)):
        mean = component("aggregation", name)
        split = mean(values[:1], mask[:1], step) + mean(values[1:], mask[1:], step)
        assert (abs(split - mean(values, mask, step)).item() > 0.1) is differs


def test_the_padded_width_does_not_matter() -> None:
    """More padding changes nothing, unless ``sum_over_T`` is told to divide by it."""
    given = tokens()
    wide = Tokens(
        *(torch.nn.functional.pad(x, (0, 3)) if x is not None and x.ndim == 2 else x for x in given)  # type: ignore[arg-type]
    )
    for name in COMPONENTS["aggregation"]:
        objective = Objective(aggregation=name, anchors=({"name": "k3", "coef": 1.0},))
        torch.testing.assert_close(loss_of(objective, wide), loss_of(objective, given))


def test_equal_rewards_still_pay_for_divergence() -> None:
    """A = 0 everywhere: the policy term is 0, its tokens still count, and the anchor is paid in full."""
    given = tokens()._replace(advantage=torch.zeros(ROWS, dtype=torch.float64))
    assert loss_of(Objective(), given).item() == 0.0
    alone = loss_of(Objective(aggregation="token_mean", anchors=({"name": "k3", "coef": 1.0},)), given)
    delta = (given.base_logp - given.logp.detach())[given.kept]  # type: ignore[operator]
    torch.testing.assert_close(alone.detach(), (delta.exp() - delta - 1).mean())


# -- anchors -----------------------------------------------------------------------------------------------------------


def test_estimators_known_answers() -> None:
    """π_θ = 0.5, π_ref = 0.25: δ = −ln 2; k1 ln 2, k2 ½ln²2, k3 ½ + ln 2 − 1."""
    log2 = math.log(2)
    given = one(probability(0.5), base_logp=f64([probability(0.25)]))
    for name, value, slope in (
        ("k1", log2, 1.0),
        ("k2", 0.5 * log2**2, log2),
        ("k3", 0.5 + log2 - 1, 1 - 0.5),  # 1 − e^δ
    ):
        penalty = component("anchors", {"name": name, "coef": 2.0})(given, iteration=1)
        assert penalty.item() == pytest.approx(2 * value)
        assert torch.autograd.grad(penalty.sum(), given.logp)[0].item() == pytest.approx(2 * slope)


def test_expected_gradients_of_estimators() -> None:
    """Over the whole vocabulary with weights π_θ: k1 gives none, k2 that of the reverse KL, k3 that of the forward KL;
    all three estimate the reverse KL or half its square in value, and `full` is exact in both."""
    logits, other = torch.tensor([0.3, -1.0, 0.7, 0.1]).double(), torch.tensor([0.0, 0.5, -0.4, 0.2]).double()
    logits.requires_grad_()
    reference = other.log_softmax(0)

    def penalty(name: str) -> Tensor:
        logp = logits.log_softmax(0)
        given = Tokens(logp[None], torch.ones(1, 4).double(), f64(0.0), f64(4 * [0.0]), f64(4 * [0.0]))
        given = given._replace(base_logp=reference[None])
        if name == "full":
            nothing = torch.zeros(4, 1).double()  # logits are the bias alone
            apart = token_divergence(nothing, nothing, nothing, nothing, bias=logits, other_bias=other)
            given = given._replace(base_kl=apart[None])
        return component("anchors", {"name": name, "coef": 1.0})(given, iteration=1)[0]

    p = logits.detach().softmax(0)
    logp = logits.log_softmax(0)
    reverse, forward = (logp.exp() * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()
    exact = torch.autograd.grad(reverse, logits, retain_graph=True)[0]
    for name, expected in (("k2", exact), ("k3", torch.autograd.grad(forward, logits)[0]), ("k1", 0 * exact)):
        found = torch.autograd.grad((p * penalty(name)).sum(), logits)[0]
        torch.testing.assert_close(found, expected)
    for name in ("k1", "k3", "full"):
        torch.testing.assert_close((p * penalty(name)).sum(), reverse)
    torch.testing.assert_close(torch.autograd.grad(penalty("full")[0], logits)[0], exact)


def test_correction_makes_stale_estimates_unbiased() -> None:
    """k3 on tokens of another policy, times π_θ/π_b, has the mean of k3 on own tokens; the factor has no gradient."""
    p, b, ref = f64(0.5, 0.3, 0.2), f64(0.2, 0.2, 0.6), f64(0.3, 0.4, 0.3)
    given = Tokens(
        p.log()[None].requires_grad_(),
        f64(3 * [1.0]),
        f64(0.0),
        b.log()[None],
        p.log()[None],
        base_logp=ref.log()[None],
    )
    plain = anchors.K3(1.0)(given, iteration=1)[0]
    corrected = anchors.K3(1.0, correction=True)(given, iteration=1)[0]
    torch.testing.assert_close((b * corrected).sum(), (p * plain).sum())
    slope = torch.autograd.grad(corrected.sum(), given.logp)[0][0]
    torch.testing.assert_close(slope, p / b * (1 - ref / p))


def test_convex_schedule() -> None:
    """λ: 1 to iteration 50, then a tenth less every 10, ½ from 91 on."""
    share = anchors.ConvexKL(1e-3).share
    expected = {1: 1.0, 50: 1.0, 51: 0.9, 60: 0.9, 61: 0.8, 80: 0.7, 90: 0.6, 91: 0.5, 10**6: 0.5}
    for iteration, value in expected.items():
        assert share(iteration) == pytest.approx(value, abs=1e-12)


def test_convex_is_the_convex_combination() -> None:
    given = tokens()
    for iteration, weight in ((50, 1.0), (61, 0.8), (200, 0.5)):
        convex = loss_of(Objective(anchors=({"name": "convex", "coef": 0.3},)), given, iteration)
        pair = Objective(
            anchors=(
                {"name": "k3", "coef": 0.3 * weight},
                {"name": "k3", "coef": 0.3 * (1 - weight), "target": "previous"},
            )
        )
        torch.testing.assert_close(convex, loss_of(pair, given, iteration))


def test_after_reincarnation_the_divergence_is_zero() -> None:
    """Base and previous are the policy itself: no penalty, no gradient, whatever λ."""
    given = tokens()
    now = given.logp.detach()
    given = given._replace(base_logp=now, previous_logp=now)
    penalty = anchors.ConvexKL(1.0)(given, iteration=60)
    assert (penalty[given.kept] == 0).all()
    assert (torch.autograd.grad(penalty.sum(), given.logp)[0][given.kept] == 0).all()


def test_coefficients_follow_knots() -> None:
    knots = [[10, 1.0], [20, 0.0]]
    values = [anchors.coefficient(knots, t) for t in (1, 10, 15, 20, 99)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]
    for bad in ([], [[1]], [[2, 0.1], [1, 0.2]], "much", [[1, -1.0]]):
        with pytest.raises(UsageError, match="`coef`"):
            anchors.K3(bad)  # type: ignore[arg-type]


# -- entropy, weight, value --------------------------------------------------------------------------------------------


def test_entropy_lowers_the_loss() -> None:
    """−0.01 · mean entropy over tokens, here of two tokens of 2 and 4 nats, whatever the aggregation of the rest."""
    entropy = f64([2.0, 4.0]).requires_grad_()
    given = Tokens(f64([0.0, 0.0]), f64([1, 1]), f64(0.0), f64([0, 0]), f64([0, 0]), entropy=entropy)
    objective = Objective(aggregation="dr_grpo", entropy={"name": "bonus", "coef": 0.01, "aggregation": "token_mean"})
    loss = loss_of(objective, given)
    assert loss.item() == pytest.approx(-0.03)
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], f64([-0.005, -0.005]))
    assert objective.reads == {"entropy"} and objective.entropy_gradient
    silent = Objective(entropy={"name": "bonus", "coef": 0.0})
    assert not silent.reads and not silent.entropy_gradient
    assert loss_of(silent, given._replace(entropy=None)).item() == 0.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [2.0, 3.0, 0.5, 1.0]),
        ("token_mask", [2.0, 0.0, 0.5, 1.0]),
        ("sequence_truncate", [3.0, 3.0, 0.5, 1.0]),
        ("sequence_mask", [0.0, 0.0, 0.5, 1.0]),
    ],
)
def test_engine_weights(mode: str, expected: list[float]) -> None:
    """π_b/π_engine of an answer of two tokens: 2 and 4, 8 together; one of a single token: ½; a demonstration: 1."""
    gap = f64([math.log(2), math.log(4)], [math.log(0.5), math.nan], [math.nan, 7.0])
    external = torch.tensor([[False, False], [False, False], [True, False]])
    mask = f64([1, 1], [1, 0], [1, 0])
    zero = torch.zeros(3, 2, dtype=torch.float64)
    given = Tokens(zero, mask, zero[:, 0], gap, zero, sampler_logp=zero, external=external)
    found = weights.EngineWeight(mode)(given)
    torch.testing.assert_close(found[mask > 0], f64(*expected))
    agreeing = weights.EngineWeight(mode)(given._replace(sampler_logp=None))
    assert (agreeing == 1).all()
    aged = weights.AgeWeight(mode)(given._replace(previous_logp=gap, behavior_logp=zero, sampler_logp=None))
    assert torch.equal(aged, found)  # the same of π_k/π_b


def test_weights_multiply() -> None:
    """Engine and source weights together, after clipping, and no gradient of their own."""
    given = tokens(external=True)
    both = Objective(weight=("engine", {"name": "source", "own": 0.5, "external": 3.0}))
    alone = Objective(weight=("engine",))
    half = torch.where(given.outside, 3.0, 0.5)
    torch.testing.assert_close(gradient(both, given), gradient(alone, given) * half)


def test_value_loss() -> None:
    """(V − R)²/2 = ½·9; clipped to within 1 of the old value 0: V = 1, ½·(1 − 5)² = 8, the larger of both."""
    given = one(0.0, advantage=0.0, value=f64([2.0]).requires_grad_(), old_value=f64([0.0]), returns=f64([5.0]))
    plain = Objective(advantage="gae", value="squared")
    assert plain.uses_critic and plain.reads == {"value", "returns"}
    loss = loss_of(plain, given)
    assert loss.item() == pytest.approx(4.5)
    assert torch.autograd.grad(loss, given.value)[0].item() == pytest.approx(-3.0)  # type: ignore[arg-type]
    clipped = loss_of(Objective(advantage="gae", value={"name": "squared", "clip": 1.0}), given)
    assert clipped.item() == pytest.approx(8.0)
    assert torch.autograd.grad(clipped, given.value)[0].item() == 0.0  # type: ignore[arg-type]


def test_token_advantages() -> None:
    """(B, T) advantages: each token has its own."""
    given = tokens()
    per_token = torch.arange(ROWS * LENGTH, dtype=torch.float64).view(ROWS, LENGTH)
    found = gradient(Objective(ratio="none", trust="none", aggregation="seq_sum"), given._replace(advantage=per_token))
    torch.testing.assert_close(found, -per_token * given.mask / ROWS)


# -- components and their names ----------------------------------------------------------------------------------------

OWN_COMPONENTS = """
from dataclasses import dataclass
import torch
from offpolicy.losses.policy_gradient import Ratio, Surrogate

def sign(rewards, group, own, *, scale=1.0):
    return scale * rewards.sign()

def square(tokens):
    return Ratio((2 * (tokens.logp - tokens.behavior_logp)).exp())

@dataclass(frozen=True)
class Cautious:
    cap: float = 1.0
    def __call__(self, ratio, advantage, tokens):
        value = ratio.value * advantage
        return Surrogate(value.clamp(max=self.cap), value > self.cap)

def total(values, mask, totals):
    return (values * mask).sum()

def drift(tokens, *, iteration, coef):
    return coef * iteration * (tokens.logp - tokens.base_logp).square()
drift.reads = ("base_logp",)

def decided(tokens, *, iteration):
    return tokens.entropy
decided.reads = ("entropy",)

def half(tokens):
    return 0.5 * torch.ones_like(tokens.mask)

def nearly(tokens, *, iteration):
    return (tokens.value - 1.0).abs()
nearly.reads = ("value",)
"""


def test_a_component_of_ones_own_in_every_slot(tmp_path, monkeypatch) -> None:
    """Functions and a class of a file outside of the package, each named by its import path."""
    (tmp_path / "own_objective.py").write_text(OWN_COMPONENTS)
    monkeypatch.syspath_prepend(tmp_path)
    objective = Objective(
        advantage={"name": "own_objective.sign", "scale": 2.0},
        ratio="own_objective.square",
        trust={"name": "own_objective.Cautious", "cap": 0.5},
        aggregation="own_objective.total",
        anchors=({"name": "own_objective.drift", "coef": 0.1},),
        entropy="own_objective.decided",
        weight=("own_objective.half",),
        value="own_objective.nearly",
    )
    assert objective.reads == {"base_logp", "entropy", "value"}
    rewards = f64(3.0, -0.1)
    assert objective.advantages(rewards, torch.zeros(2).long(), torch.ones(2).bool()).tolist() == [2.0, -2.0]
    given = one(
        probability(0.6), probability(0.5), advantage=0.3, base_logp=f64([0.0]), entropy=f64([7.0]), value=f64([4.0])
    )
    loss, _ = objective.loss(given, ONE_TOKEN, iteration=3)
    # ½·min(1.44·0.3, 0.5) gained; 0.1·3·ln²0.6, 7 and 3 paid
    assert loss.item() == pytest.approx(-0.5 * 0.432 + 0.3 * math.log(0.6) ** 2 + 7 + 3)


@pytest.mark.parametrize(
    "slot", ["advantage", "ratio", "trust", "aggregation", "anchors", "entropy", "weight", "value"]
)
def test_unknown_names(slot: str) -> None:
    with pytest.raises(UsageError, match=f"`{slot}` is 'nothing like it'; expected one of"):
        Objective(**{slot: "nothing like it"})
    with pytest.raises(UsageError, match="no module 'no_such_module'"):
        Objective(**{slot: "no_such_module.part"})


def test_bad_components() -> None:
    for given, message in (
        ({"trust": "centered"}, "Did you mean 'centred'"),
        ({"trust": {"name": "ppo", "hihg": 0.3}}, "takes no `hihg`; expected low, high. Did you mean 'high'"),
        ({"anchors": "k3"}, "`anchors` is 'k3' without `coef`"),
        ({"trust": {"low": 0.1}}, "`trust` is None"),
        ({"trust": {"name": "ppo", "low": 2.0}}, "`low`"),
        ({"ratio": "mis"}, "no `vocabulary` was given"),
        ({"ratio": {"name": "mis", "uniform": "all"}}, "expected one of vocab, one"),
        ({"ratio": {"name": "mis", "uniform": "one", "low": -1.0}}, "`low` is -1.0"),
        ({"ratio": {"name": "mis", "uniform": "one", "low": 2.0, "high": 1.0}}, "`high` is 1.0; expected a value"),
        ({"ratio": "sequence", "aggregation": "token_mean"}, "expected 'seq_mean_token_mean'"),
        ({"advantage": "gae"}, "`value` is 'none'"),
        ({"anchors": {"name": "k3", "coef": 0.1, "target": "bass"}}, "`target` is 'bass'"),
    ):
        with pytest.raises(UsageError, match=message):
            Objective(**given)
    with pytest.raises(UsageError, match="reads `base_logp`"):
        loss_of(Objective(anchors=({"name": "k3", "coef": 0.1},)), tokens()._replace(base_logp=None))
    with pytest.raises(UsageError, match="critic_advantages"):
        Objective(advantage="gae", value="squared").advantages(f64(1.0), torch.zeros(1).long(), torch.ones(1).bool())
    with pytest.raises(UsageError, match="Use `advantages`"):
        Objective().critic_advantages(f64(1.0), f64([1.0]), f64([1.0]))


def test_objectives_are_data() -> None:
    """Lists, single specs and tuples say the same; what is read follows from the parts."""
    anchor = {"name": "convex", "coef": 1e-3}
    assert Objective(anchors=[anchor]) == Objective(anchors=(anchor,)) == Objective(anchors=anchor)  # type: ignore[arg-type]
    assert Objective(anchors=(anchor,)).reads == {"base_logp", "previous_logp"}
    exact = Objective(anchors=({"name": "full", "coef": 0.1, "target": "previous"},))
    assert exact.reads == {"previous_kl"}
    assert Objective().reads == frozenset()
    assert Objective(anchors="none", weight="none") == Objective()  # type: ignore[arg-type]


def test_surrogate_of_trust_none_is_linear() -> None:
    found: Surrogate = trust.NoTrust()(Ratio(f64([3.0])), f64([-2.0]), one(0.0))
    assert found.value.item() == -6.0 and not found.clipped.any()


# -- what a component may ask for --------------------------------------------------------------------------------------


class AboveMean:
    """A weight that compares each answer's mean ratio with the mean of the step, and remembers how often it looked."""

    reads_values = frozenset({"entropy"})
    columns = frozenset({"reward"})

    def __init__(self) -> None:
        self.looks = 0

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        self.looks += 1
        assert not step.logp.requires_grad
        ratio = torch.where(step.kept, step.logp - step.behavior_logp, 0.0).sum(-1)
        return {"mean": ratio.mean(), "above": ratio > ratio.mean(), "grid": step.mask * ratio[:, None]}

    def __call__(self, tokens: Tokens) -> Tensor:
        assert tokens.step is not None and tokens.entropy is not None and not tokens.entropy.requires_grad
        return tokens.mask * (1.0 + tokens.step["above"].double()[:, None] + tokens.step["grid"])

    def state_dict(self) -> dict[str, int]:
        return {"looks": self.looks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.looks = state["looks"]


class PairTerm:
    """Half the mean square of differences within pairs of rows; counts what it sees."""

    whole_groups = True

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        whole = torch.where(tokens.kept, tokens.logp, 0.0).sum(-1)
        return iteration * (whole[::2] - whole[1::2]).square().sum() / totals.rows


def square_of_deviation(step: Tokens, *, iteration: int) -> Tensor:
    return 1.0 / (1.0 + iteration + step.advantage.square().mean())


def test_facts_of_the_step_do_not_depend_on_its_cut() -> None:
    """A step in one piece asks for its own facts; cut in two, the halves get their rows of the same facts."""
    whole = tokens(entropy=torch.rand(ROWS, LENGTH, dtype=torch.float64).requires_grad_())
    objective = Objective(weight=({"name": f"{__name__}.AboveMean"},))
    assert objective.sees_step and objective.reads == {"entropy"} and objective.columns == {"reward"}
    assert not objective.entropy_gradient
    found = loss_of(objective, whole)
    facts = objective.step_facts(whole)
    shares = []
    for rows in (slice(0, 2), slice(2, ROWS)):
        cut = {k: None if v is None else v[rows] for k, v in whole._asdict().items()}
        mine = {name: {k: v if v.dim() == 0 else v[rows] for k, v in f.items()} for name, f in facts.items()}
        shares.append(objective.loss(Tokens(**cut), totals(whole), iteration=1, facts=mine)[0])
    torch.testing.assert_close(sum(shares), found)
    assert objective.own.state_dict() == {"weight/0": {"looks": 2}}


def test_terms_and_the_factor_on_the_rate() -> None:
    """A term is added as it is; the factor is 1/(1 + 2 + mean A²)."""
    given = tokens()._replace(logp=torch.zeros(ROWS, LENGTH, dtype=torch.float64).requires_grad_())
    even = Tokens(*(v[:4] if isinstance(v, Tensor) else v for v in given))
    plain, term = (
        Objective(),
        Objective(terms=({"name": f"{__name__}.PairTerm"},), lr=f"{__name__}.square_of_deviation"),
    )
    assert term.whole_groups and term.sees_step and not plain.sees_step and not plain.whole_groups
    slope = gradient(term, even, iteration=2) - gradient(plain, even, iteration=2)
    torch.testing.assert_close(slope, torch.zeros_like(slope))  # equal sums: the square has no slope
    moved = even._replace(logp=(even.mask * f64([1.0], [0.0], [0.0], [0.0])).requires_grad_())
    difference = loss_of(term, moved, iteration=2) - loss_of(plain, moved, iteration=2)
    torch.testing.assert_close(difference, f64(2 * 4.0**2 / 4)[0])  # one pair: 4 tokens of 1 against 0
    factor = term.rate_factor(given, iteration=2)
    torch.testing.assert_close(factor, 1.0 / (3.0 + given.advantage.square().mean()))
    assert plain.rate_factor(given, iteration=2) is None


class Record:
    takes_answers = True
    reads = frozenset({"mean_logp"})

    def __call__(self, answers: Any) -> Any:
        return Judged(answers.reward - answers.mean_logp, answers.ended)


def test_an_advantage_that_sees_the_record_of_the_answers() -> None:
    objective = Objective(advantage=f"{__name__}.Record")
    assert objective.takes_answers and objective.reads_of_answers == {"mean_logp"} and not objective.reads
    number = torch.arange(3)
    answers = Answers(f64(1.0, 2.0, 3.0), number, number > -1, number, number > 0, number, {}, 1, f64(-1.0, 0.0, 1.0))
    found = objective.judged(answers)
    assert found.advantage.tolist() == [2.0, 2.0, 2.0] and found.kept.tolist() == [False, True, True]
    with pytest.raises(UsageError, match="sees more of the answers"):
        objective.advantages(answers.reward, answers.group, answers.own)
    plain = Objective(advantage="dr_grpo").judged(answers._replace(group=number // 3))
    assert plain.advantage.tolist() == [-1.0, 0.0, 1.0] and plain.kept.all()


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"trust": ["ppo", "dual"]}, r"`trust` is \['ppo', 'dual'\], several at once"),
        ({"aggregation": f"{__name__}.AboveMean"}, "aggregation has `step_facts`"),
        (
            {"advantage": "gae", "value": "squared", "terms": [f"{__name__}.PairTerm"]},
            "comes from a critic, whose answers stand alone",
        ),
    ],
)
def test_parts_that_exclude_each_other_are_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Objective(**parts)
