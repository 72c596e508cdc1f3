"""Ratios, trust regions, masks and bounds that the step decides: known answers by hand in float64, and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from made_tokens import f64, full_tokens, informed, singles, totals_of
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.policy.selection import largest, nearest_quantile, quantile, ranks
from offpolicy.losses.policy_gradient import Objective, Ratio, Surrogate, Tokens, component


def token_ratio(tokens: Tokens) -> Ratio:
    return component("ratio", "token")(tokens)


def surrogate(spec: Any, tokens: Tokens) -> tuple[Any, Surrogate]:
    """The part, and what it makes of tokens that are the whole step, with the ratio "token"."""
    part = component("trust", spec)
    advantage = tokens.advantage if tokens.advantage.ndim == 2 else tokens.advantage[:, None]
    return part, part(token_ratio(tokens), advantage, informed(part, tokens))


def slope(value: Tensor, tokens: Tokens) -> list[float]:
    return torch.autograd.grad(value.sum(), tokens.logp)[0].flatten().tolist()


# -- what is compared over a step --------------------------------------------------------------------------------------


def test_ranks_and_quantiles_are_those_of_the_chosen() -> None:
    """3, 1, −∞ and 3 chosen of 9, 3, 1, −∞, 3: places in their order; the median is 2, the nearest value 1 or 3."""
    values, chosen = f64(9.0, 3.0, 1.0, -math.inf, 3.0), torch.tensor([False, True, True, True, True])
    assert ranks(values, chosen).tolist() == [4, 0, 2, 3, 1]
    assert largest(values, chosen, 0.5).tolist() == [False, True, False, False, True]
    assert largest(values, chosen, 0.1).sum() == 0 and largest(values, chosen, 0.1, least=1).sum() == 1
    assert quantile(values, chosen & (values > 0), 0.25).item() == 2.0
    assert quantile(values, chosen & (values > 0), 1.0).item() == 3.0
    assert nearest_quantile(values, chosen & (values > 0), 0.4).item() == 3.0
    generator = torch.Generator().manual_seed(0)
    many = torch.rand(101, generator=generator, dtype=torch.float64)
    for q in (0.0, 0.3, 0.77, 1.0):
        torch.testing.assert_close(quantile(many, many > -1, q), torch.quantile(many, q))


# -- ratios ------------------------------------------------------------------------------------------------------------


def answer(log_ratios: list[float], **fields: Any) -> Tokens:
    """One answer whose ℓ − ℓ_k are these; ℓ_b is 1 below ℓ_k."""
    previous = torch.full((1, len(log_ratios)), -2.0, dtype=torch.float64)
    logp = (previous + f64(log_ratios)).requires_grad_()
    return Tokens(logp, torch.ones_like(previous), f64(1.0), previous - 1.0, previous, **fields)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([0, 0, 7, 7], [0.2, 0.2, 0.1, 0.1]),
        ([5, 2, 5, 2], [-0.05, 0.35, -0.05, 0.35]),
        ([4, 4, 4, 4], [0.15, 0.15, 0.15, 0.15]),
    ],
)
def test_turn_ratio(turns: list[int], expected: list[float]) -> None:
    """Log-ratios .1, .3, −.2, .4: the mean of each turn's; every token of a turn has 1/n of the slope of each."""
    given = answer([0.1, 0.3, -0.2, 0.4], columns={"turn": torch.tensor([turns])})
    found = component("ratio", "turn")(given).value
    torch.testing.assert_close(found, f64(expected).exp())
    assert slope(found, given) == pytest.approx(f64(expected).exp().flatten().tolist())
    behind = component("ratio", {"name": "turn", "denominator": "behavior"})(given).value
    torch.testing.assert_close(behind, (f64(expected) + 1).exp())
    short = given._replace(mask=f64([1, 1, 1, 0]), columns={"turn": torch.tensor([[0, 0, 7, 7]])})
    torch.testing.assert_close(component("ratio", "turn")(short).value[0, 2], f64(-0.2).exp()[0])


def test_the_ratio_of_a_whole_answer() -> None:
    """exp(.1 + .3 − .2) for all three tokens; a turn of one answer is GSPO's ratio."""
    given = answer([0.1, 0.3, -0.2], columns={"turn": torch.zeros(1, 3, dtype=torch.int64)})
    torch.testing.assert_close(component("ratio", "full_sequence")(given).value, f64(3 * [math.exp(0.2)]))
    turn, sequence, token = (component("ratio", name)(given).value for name in ("turn", "sequence", "gspo_token"))
    torch.testing.assert_close(turn, sequence)
    torch.testing.assert_close(token, sequence)
    weight = f64([1.0, 0.0, -2.0])
    assert slope(token * weight, given) == pytest.approx((weight * sequence).flatten().tolist())
    with pytest.raises(UsageError, match="seq_mean_token_mean"):
        Objective(ratio="full_sequence", aggregation="token_mean")


def test_the_shaped_ratio_of_demonstrations() -> None:
    """p = .3: .3/(.3 + .1) = .75, of slope pγ/(p + γ)² = .03/.16; own tokens keep theirs."""
    given = answer([0.1, 0.3])._replace(external=torch.tensor([[True, False]]))
    given = given._replace(logp=f64([math.log(0.3), -1.7]).requires_grad_())
    found = component("ratio", "luffy")(given).value
    torch.testing.assert_close(found, f64([0.75, math.exp(-1.7 + 3.0)]))
    assert slope(found[:, :1], given) == pytest.approx([0.03 / 0.16, 0.0])


# -- clipping ----------------------------------------------------------------------------------------------------------


def test_two_sided() -> None:
    """δ = 4: −1·10 becomes −4, without a slope; the rest is PPO's."""
    given = singles([10.0, 2.0, 0.5, 1.5], [-1.0, -1.0, -1.0, 1.0])
    _, found = surrogate("two_sided", given)
    assert found.value.flatten().tolist() == pytest.approx([-4.0, -2.0, -0.8, 1.2])
    assert found.clipped.flatten().tolist() == [True, False, True, True]
    assert slope(found.value, given) == pytest.approx([0.0, -2.0, 0.0, 0.0])


def test_cispo_bounds_the_weight_alone() -> None:
    """ρ = 7 is bounded by 5: 5·2·ln p with the slope 10; ρ = .5 has the slope ρA."""
    given = singles([7.0, 0.5], [2.0, -1.0], 0.1)
    _, found = surrogate("cispo", given)
    assert found.value.flatten().tolist() == pytest.approx([10 * math.log(0.7), -0.5 * math.log(0.05)])
    assert slope(found.value, given) == pytest.approx([10.0, -0.5])
    assert not found.clipped.any()


def test_gradient_preserving() -> None:
    """ρ = 1.5, A = 2: the value 2.4 of PPO with the slope 2.4; below, only where asked."""
    given = singles([1.5, 0.5, 1.1], [2.0, -1.0, 1.0])
    for below, third in ((False, 0.0), (True, -0.8)):
        _, found = surrogate({"name": "grad_preserve", "below": below}, given)
        assert found.value.flatten().tolist() == pytest.approx([2.4, -0.8, 1.1])
        assert slope(found.value, given) == pytest.approx([2.4, third, 1.1])
        assert found.clipped.flatten().tolist() == [False, not below, False]


def test_rover() -> None:
    """Q = .2, −.1; A = .5; the mean over the vocabulary at the second place is −.4 and ρ 1: targets .1 and .5."""
    given = answer([0.2, -0.1], mean_log_ratio=f64([0.3, -0.4]))._replace(advantage=f64(0.5))
    _, found = surrogate("rover", given)
    assert found.value.flatten().tolist() == pytest.approx([-0.01, -0.36])
    assert slope(found.value, given) == pytest.approx([-0.2, 1.2])
    _, half = surrogate({"name": "rover", "rho": 0.5}, given)
    assert half.value.flatten().tolist() == pytest.approx([-((0.1 - 0.3) ** 2), -(0.55**2)])
    ended = given._replace(mask=f64([1.0, 0.0]))
    assert surrogate("rover", ended)[1].value[0, 0].item() == pytest.approx(-(0.3**2))


def bounds_of(given: Tokens, **options: Any) -> tuple[float, float]:
    part = component("trust", {"name": "bapo", **options})
    facts = part.step_facts(given._replace(logp=given.logp.detach()))
    return round(facts["low"].item(), 6), round(facts["high"].item(), 6)


def test_bapo_search() -> None:
    """One gain of ratio 1.23, losses of 1 and .71, all with π_b = ½.

    Clipped tokens do not count: at .6 and 1.2 nothing is gained; at 1.25 the share is 1.23/(1.23 + 1.71) = .42. For a
    target of ½ hi goes to its end and lo to .72, where .71 is clipped: 1.23/2.23 = .55. Counted in value .71 becomes
    .72 and the share falls: nothing reaches ½. The code's quotient is 1.2/(1 + .8) = .67 at its start and at most
    1.23/1.95 = .63 later.
    """
    given = singles([1.23, 1.0, 0.71], [1.0, -1.0, -1.0])
    assert bounds_of(given) == (0.6, 1.25)
    assert bounds_of(given, target=0.5) == (0.72, 3.0)
    assert bounds_of(given, target=0.5, counted="all") == (0.9, 3.0)
    assert bounds_of(given, counted="all") == (0.6, 1.2)  # 1.2/2.91 = .41
    assert bounds_of(given, order="code") == (0.8, 1.2)
    assert bounds_of(given, order="code", target=0.7) == (0.95, 2.0)
    assert bounds_of(given, low=[0.5, 0.5, 0.1], high=[1.1, 1.3, 0.1], target=0.3) == (0.5, 1.3)
    _, found = surrogate({"name": "bapo", "target": 0.5}, given)
    assert found.value.flatten().tolist() == pytest.approx([1.23, -1.0, -0.72])
    assert found.clipped.flatten().tolist() == [False, False, True]


def test_bapo_weighs_by_the_probability_of_the_sampler() -> None:
    """π_b of .9 and .1 with the ratio 1: .9/(.9 + .1) of the step is gained, or the other way round."""
    for likely, expected in ((0.9, (0.6, 1.2)), (0.1, (0.9, 3.0))):
        assert bounds_of(singles([1.0, 1.0], [1.0, -1.0], [likely, 1 - likely])) == expected
    given = singles([10.0], [-1.0], 0.05)
    assert surrogate({"name": "bapo", "order": "code"}, given)[1].value.item() == pytest.approx(-3.0)
    assert surrogate("bapo", given)[1].value.item() == pytest.approx(-10.0)
    with pytest.raises(UsageError, match="first ≤ last"):
        component("trust", {"name": "bapo", "low": [0.9, 0.6, 0.1]})


def test_bounds_by_entropy() -> None:
    """ln H = −2, −1, 0, 1, 3 and the median as pivot: ĥ = −1, −½, 0, ⅓, 1. With ε = .2 the lower bounds are .6, .7, .8
    and the upper ones 1.2, 1.2667, 1.4; without the sign ĥ is its size, and no lower bound moves."""
    entropy = f64(-2.0, -1.0, 0.0, 1.0, 3.0).exp()[:, None]
    fall, rise = (singles([ratio] * 5, [sign] * 5, 0.1, entropy=entropy) for ratio, sign in ((0.01, -1.0), (9.0, 1.0)))
    spec = {"name": "entropy_adaptive", "pivot": 0.5}
    assert (-surrogate(spec, fall)[1].value).flatten().tolist() == pytest.approx([0.6, 0.7, 0.8, 0.8, 0.8])
    assert surrogate(spec, rise)[1].value.flatten().tolist() == pytest.approx([1.2, 1.2, 1.2, 1.2 + 0.2 / 3, 1.4])
    code = {**spec, "signed": False}
    assert (-surrogate(code, fall)[1].value).flatten().tolist() == pytest.approx([0.8] * 5)
    assert surrogate(code, rise)[1].value.flatten().tolist() == pytest.approx([1.4, 1.3, 1.2, 1.2 + 0.2 / 3, 1.4])


def test_advantages_are_redistributed_by_entropy_and_ratio() -> None:
    """ĥ = −1, −½, 0, ⅓, 1. Inside the middle half (ρ = 1) what is certain counts 0 and ½; outside (ρ = 1.5) what is
    open counts 4/3 and 2. At ρ = 1.13 the middle half of ĥ = ⅓ ends at 1.1333, that of 1 at 1.2: nothing moves."""
    entropy = f64(-2.0, -1.0, 0.0, 1.0, 3.0).exp()[:, None]
    part = component("weight", {"name": "hapo", "pivot": 0.5})
    for ratio, expected in (
        (1.0, [0.0, 0.5, 1.0, 1.0, 1.0]),
        (1.5, [1.0, 1.0, 1.0, 4 / 3, 2.0]),
        (1.13, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ):
        given = singles([ratio] * 5, [1.0] * 5, 0.1, entropy=entropy)
        assert part(informed(part, given)).flatten().tolist() == pytest.approx(expected)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_clip_cov() -> None:
    """A = ±2 about 0 and ln p = −.1, −3 about −1.55: covariances 2.9, −2.9, −2.9, 2.9. One of the two above 1 is drawn,
    the one of the smaller number; one that PPO clips is not drawn; none is within 1 to 2; all of them for a share of
    1."""
    logp = f64(-0.1, -3.0, -0.1, -3.0)[:, None].requires_grad_()
    uniform = f64(0.9, 0.1, 0.2, 0.3)[:, None]
    given = Tokens(logp, torch.ones(4, 1), f64(2, 2, -2, -2), logp.detach(), logp.detach(), uniform=uniform)

    def drawn(of: Tokens, **options: Any) -> list[bool]:
        found = surrogate({"name": "clip_cov", **options}, of)[1]
        assert (found.value[found.clipped] == 0).all()
        return found.clipped.flatten().tolist()

    assert drawn(given) == [False, False, False, True]
    assert drawn(given, share=1.0) == [True, False, False, True]
    assert drawn(given, ub=2.0) == [False] * 4
    behavior = logp.detach() + f64(0.0, 0.0, 0.0, 1.0)[:, None]  # ratio e^−1 with A < 0
    part = component("trust", "clip_cov")
    clipped = informed(part, given._replace(behavior_logp=behavior))
    assert clipped.step is not None and clipped.step["drawn"].flatten().tolist() == [True, False, False, False]


def test_the_mask_of_stale_answers() -> None:
    """Means of ℓ_b − ℓ of .3, .3, .05 with A < 0, > 0, < 0 and δ = .1: only the first is left out; what the engine said
    goes first."""
    behavior = torch.full((3, 2), -1.0, dtype=torch.float64)
    logp = (behavior - f64([0.4, 0.2], [0.4, 0.2], [0.0, 0.1])).requires_grad_()
    given = Tokens(logp, torch.ones(3, 2), f64(-1, 1, -1), behavior, behavior)
    assert surrogate("sequence_mask", given)[1].value[:, 0].eq(0).tolist() == [True, False, False]
    engine = given._replace(sampler_logp=behavior + f64([0.0], [0.0], [0.2]))
    assert surrogate("sequence_mask", engine)[1].value[:, 0].eq(0).tolist() == [True, False, True]
    assert surrogate({"name": "sequence_mask", "delta": 0.5}, given)[1].value.ne(0).all()


def test_the_mask_of_cut_answers() -> None:
    given = singles([1.0, 1.0], [1.0, -1.0], columns={"ended": torch.tensor([True, False])})
    assert surrogate("over_length", given)[1].value.flatten().tolist() == pytest.approx([1.0, 0.0])


def test_conflict_tokens() -> None:
    """Tokens 1 2 3 4 with A > 0 and 1 5 3 4 with A < 0 in a group, 1 2 3 4 with A < 0 in another: the first and the
    last two places conflict. Only from the ends: the first place, and from the back the last two."""
    token = torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4], [1, 2, 3, 4]])
    ones = torch.zeros(3, 4, dtype=torch.float64)
    columns = {"token": token, "group": torch.tensor([0, 0, 1])}
    given = Tokens(ones.clone().requires_grad_(), torch.ones(3, 4), f64(1, -1, -1), ones, ones, columns=columns)
    expected = f64([2, 1, 2, 2], [0, -1, 0, 0], [-1, -1, -1, -1])
    for ends in (False, True):
        torch.testing.assert_close(surrogate({"name": "gtpo", "ends": ends}, given)[1].value.detach(), expected)
    split = given._replace(columns={**columns, "token": torch.tensor([[9, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])})
    assert surrogate("gtpo", split)[1].value[0].tolist() == [1, 2, 2, 2]
    split = split._replace(columns={**columns, "token": torch.tensor([[9, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])})
    assert surrogate({"name": "gtpo", "ends": True}, split)[1].value[0].tolist() == [1, 1, 1, 1]
    short = given._replace(mask=f64([1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]))  # the ends 3 and 4 do not conflict
    assert surrogate({"name": "gtpo", "ends": True}, short)[1].value[0, :3].tolist() == [2, 1, 1]
    hot = given._replace(entropy=f64([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.2], [0.1, 0.1, 0.1, 3.0]))
    kept = surrogate({"name": "gtpo", "most_entropy": 0.7}, hot)[1].value.ne(0).any(1)
    assert kept.tolist() == [False, True, False]


def test_forks_and_informative_tokens() -> None:
    """H = 1, 4, 2, 3, .5 and |A| = 4, 1, 1, 2, 1: the top 40 % by entropy are the second and the fourth, by |A|·H (4,
    4, 2, 6, .5) the first and the fourth."""
    entropy = f64(1.0, 4.0, 2.0, 3.0, 0.5)[:, None]
    given = singles([1.0] * 5, [4.0, -1.0, 1.0, -2.0, 1.0], entropy=entropy)
    _, forks = surrogate({"name": "spine", "share": 0.4}, given)
    assert forks.value.flatten().tolist() == pytest.approx([0, -1, 0, -2, 0])
    part, chosen = surrogate({"name": "d3s", "first": 0.4, "last": 0.8, "steps": 2}, given)
    assert chosen.value.flatten().ne(0).tolist() == [True, False, False, True, False]
    counts = [int(informed(part, given).step["chosen"].sum()) for _ in range(3)]  # type: ignore[index]
    assert counts == [3, 4, 4]  # 60 %, 80 %, and no further
    other = component("trust", {"name": "d3s", "first": 0.4, "last": 0.8, "steps": 2})
    other.load_state_dict(part.state_dict())
    assert other == part and int(informed(other, given).step["chosen"].sum()) == 4  # type: ignore[index]


def moved(shift: list[list[float]], variance: list[list[float]], **fields: Any) -> Tokens:
    """Answers with ratio 1 and what the optimiser's step would do to their tokens."""
    before = torch.full((len(shift), len(shift[0])), -1.0, dtype=torch.float64)
    mask = f64(*shift).isnan().logical_not().double()
    advantage = f64(*fields.pop("advantage"))
    logp = before.clone().requires_grad_()
    return Tokens(logp, mask, advantage, before, before, shift=f64(*shift), shift_variance=f64(*variance), **fields)


def test_what_the_step_would_move_too_far() -> None:
    """A = 2, s = .3, v = .04: change 2·(.3 + (.09 − .04)/2) = .65 of A·ρ and 2·(.3 − .02) = .56 of A·ℓ, KL .02. A = −1,
    s = .3, v = .2: −(.3 + (.09 − .2)/2) = −.245, KL .1. Each bound rejects by itself, and as a mean of an answer."""
    given = moved([[0.3, -0.1], [0.3, math.nan]], [[0.04, 0.04], [0.2, math.nan]], advantage=[2.0, -1.0])

    def kept(**spec: Any) -> list[list[bool]]:
        bounds = {"least": None, "most": None, "kl": None} | spec
        found = surrogate({"name": "capo", **bounds}, given)[1]
        value = torch.where(given.kept, found.value, 0.0)
        assert torch.equal(value != 0, given.kept & ~found.clipped)
        return (value != 0).tolist()

    assert kept() == [[True, True], [True, False]]
    # the second token: 2·(−.1 + (.01 − .04)/2) = −.23
    assert kept(least=-0.24) == [[True, True], [False, False]] == kept(kl=0.05)
    assert kept(least=-0.22) == [[True, False], [False, False]]
    assert kept(most=0.64) == [[False, True], [True, False]] == kept(most=0.55, form="log")
    assert kept(most=0.66) == [[True, True], [True, False]] == kept(most=0.57, form="log")
    # by answer: the mean of .65 and −.23 is .21, of KL .02
    assert kept(least=-0.22, sets="answer") == [[True, True], [False, False]] == kept(kl=0.03, sets="answer")
    assert kept(most=0.2, least=-0.3, sets="answer") == [[False, False], [True, False]]
    with pytest.raises(UsageError, match="`sets`"):
        component("trust", {"name": "capo", "sets": "turn"})
    with pytest.raises(UsageError, match="`most`"):
        component("trust", {"name": "capo", "least": 0.1, "most": 0.0})


def test_nothing_is_rejected_while_the_move_is_not_known() -> None:
    unknown = torch.full((1, 2), math.nan, dtype=torch.float64)
    given = moved([[0.3, 0.3]], [[9.0, 9.0]], advantage=[2.0])
    assert not surrogate("capo", given)[1].value.any()
    kept = surrogate("capo", given._replace(shift=unknown, shift_variance=unknown))[1]
    assert kept.value.tolist() == [[2.0, 2.0]] and not kept.clipped.any()


SMOOTH = ["ppo", "two_sided", "bapo", "entropy_adaptive", "clip_cov", "gtpo", "d3s", "spine", "sequence_mask"]
SMOOTH += ["over_length", "rover", "capo"]  # functions whose slope is what it seems to be: no sg in the value


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("ratio", ["token", "turn", "decoupled"])
def test_gradients_of_trust_regions_against_differences(name: str, ratio: str) -> None:
    """Along a random way, with what is known of the step held; nothing flows into what is masked, and no NaN."""
    given = full_tokens(3)
    objective = Objective(ratio=ratio, trust=name)
    facts = objective.step_facts(given)
    way = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    way = torch.where(given.own, way, 0.0)

    def at(shift: float) -> Tensor:
        moved = given._replace(logp=given.logp.detach() + shift * way)
        return objective.loss(moved, totals_of(given), iteration=1, facts=facts)[0]

    loss = objective.loss(given, totals_of(given), iteration=1, facts=facts)[0]
    found = torch.autograd.grad(loss, given.logp)[0]
    assert torch.isfinite(found[given.kept]).all() and (found[~given.kept] == 0).all()
    expected = (at(1e-6) - at(-1e-6)).item() / 2e-6
    assert (found * way).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
