"""Advantages that see the record of an answer: known answers by hand in float64, and properties of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.advantages import GRPO, DrGRPO
from offpolicy.losses.answers import OF_POLICY, Answers, Judged
from offpolicy.losses.policy_gradient import COMPONENTS, component

COS = math.cos


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def answers(reward: list[float] | Tensor, groups: int = 1, **more: Any) -> Answers:
    """Answers in ``groups`` groups of equal size, one after the other."""
    many = len(reward)
    facts: dict[str, Any] = {
        "reward": reward if isinstance(reward, Tensor) else f64(*reward),
        "group": torch.arange(many) // (many // groups),
        "own": torch.ones(many, dtype=torch.bool),
        "length": torch.arange(1, many + 1),
        "ended": torch.ones(many, dtype=torch.bool),
        "prompt": torch.arange(many) // (many // groups),
        "parts": {},
        "iteration": 1,
    }
    return Answers(**(facts | more))


def made(name: str, *args: Any, spec: dict[str, Any] | None = None, **facts: Any) -> Any:
    """What a component says of answers; of an old one, from rewards, group and own."""
    part = component("advantage", {"name": name, **(spec or {})})
    seen = answers(*args, **facts)
    return part(seen) if getattr(part, "takes_answers", False) else part(seen.reward, seen.group, seen.own)


def close(found: Tensor, *expected: float) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, f64(*expected), rtol=1e-9, atol=1e-12)


# -- statistics of groups ----------------------------------------------------------------------------------------------


def test_median() -> None:
    """1, 4, 2, 9, 3: median 3, |R − 3| = 2, 1, 1, 6, 0 with median 1; the answer with 3 is left out."""
    found = made("median", [1, 4, 2, 9, 3])
    close(found.advantage, *(x / 1.001 for x in (-2, 1, -1, 6, 0)))
    assert found.kept.tolist() == [True, True, True, True, False]
    scaled = made("median", [1, 4, 2, 9, 3], spec={"rescale": True})
    close(scaled.advantage, *(x / 1.001 * 5 / 4 for x in (-2, 1, -1, 6, 0)))


def test_median_of_ties_and_of_even_groups() -> None:
    """Of two groups 0, 0, 1 and 1, 1, 1 one answer each is left out: the first at the median. MAD is 0."""
    found = made("median", [0, 0, 1, 1, 1, 1], 2)
    close(found.advantage, 0, 0, 1000, 0, 0, 0)
    assert found.kept.tolist() == [False, True, True, False, True, True]
    with pytest.raises(UsageError, match=r"a group has 4 answers.*odd number"):
        made("median", [0, 1, 0, 1])


def test_ngrpo() -> None:
    """Four wrong answers: mean 1/5, deviation √(4/5/4) = .4472, so −1/√5. Of 0, 1, 0 with one more 1: mean ½, squares
    4·¼ over 3."""
    close(made("ngrpo", [0, 0, 0, 0]), *[-0.2 / (math.sqrt(0.2) + 1e-6)] * 4)
    assert made("ngrpo", [0, 0, 0, 0])[0].item() == pytest.approx(-1 / math.sqrt(5), rel=1e-5)
    assert made("ngrpo", [1, 1, 1]).tolist() == [0, 0, 0]
    std = math.sqrt(1 / 3) + 1e-6
    close(made("ngrpo", [0, 1, 0]), -0.5 / std, 0.5 / std, -0.5 / std)


def test_bnpo() -> None:
    """p = ½ and ¾: m = 5/8, v = 1/32, m(1 − m)/v − 1 = 6.5, a = 4.0625, b = 2.4375, α = 1 + a/3, β = 1 + b/3."""
    alpha, beta = 1 + 4.0625 / 3, 1 + 2.4375 / 3
    law = torch.distributions.Beta(f64(alpha), f64(beta))
    half, most = (law.log_prob(f64(p)).exp().item() for p in (0.5, 0.75))
    found = made("bnpo", [0, 1, 0, 1, 1, 1, 0, 1], 2)
    close(found, *(x / half for x in (-0.5, 0.5, -0.5, 0.5)), *(x / most for x in (0.25, 0.25, -0.75, 0.25)))


def test_bnpo_of_one_group_of_rewards_of_another_range_and_of_several_rewards() -> None:
    close(made("bnpo", [0, 1, 0, 0]), -0.25, 0.75, -0.25, -0.25)
    close(made("bnpo", [-1, 1], spec={"low": -1}), -0.5, 0.5)
    parts = {"format": f64(1, 1, 0, 0), "value": f64(0, 1, 0, 0)}
    close(made("bnpo", [9, 9, 9, 9], spec={"parts": True}, parts=parts), 0.125, 0.625, -0.375, -0.375)
    with pytest.raises(UsageError, match=r"a reward is 9.*expected numbers in \[0, 1\]"):
        made("bnpo", [9, 0])


def test_canon() -> None:
    """By entropy 3, 1, 4, 2 rewards 4, 1, 2, 3 have the halves {4, 2} above and {1, 3} below, means 3 and 2; by length
    {2, 3} and {4, 1}, mean 2½ both."""
    facts = {"mean_entropy": f64(3, 1, 4, 2)}
    close(made("canon", [4, 1, 2, 3], spec={"mu": 1.0}, **facts), 2, -2, 0, 0)  # high half 4, 2; low half 1, 3
    close(made("canon", [4, 1, 2, 3], spec={"mu": 0.0}, **facts), 1, -1, -1, 1)
    close(made("canon", [4, 1, 2, 3], **facts), 1.5, -1.5, -0.5, 0.5)
    close(made("canon", [4, 1, 2, 3], spec={"metric": "length", "mu": 1.0}), 1.5, -1.5, -0.5, 0.5)
    knots = {"mu": ((1, 0.0), (3, 1.0))}
    close(made("canon", [4, 1, 2, 3], spec=knots, iteration=2, **facts), 1.5, -1.5, -0.5, 0.5)


def test_canon_with_equal_weights_is_dr_grpo() -> None:
    reward = [0.3, 1, 0, 2, 5, 1]
    found = made("canon", reward, mean_entropy=f64(3, 1, 4, 1.5, 9, 2))
    torch.testing.assert_close(found, DrGRPO()(f64(*reward), torch.zeros(6).long(), torch.ones(6).bool()))
    assert component("advantage", {"name": "canon", "metric": "length"}).reads == frozenset()


def test_copo() -> None:
    """Groups 1, 1 and 1, 0: entropies 0 and 1 bit, levels 1 and ½ with mean ¾ and deviation √2/4; w = σ(20(H − ½))."""
    low, high = (1 / (1 + math.exp(-20 * (h - 0.5))) for h in (0.0, 1.0))
    across, local = 0.25 / (math.sqrt(2) / 4 + 1e-6), 0.5 / (math.sqrt(0.5) + 1e-6)
    second = (high * local - (1 - high) * across, -high * local - (1 - high) * across)
    close(made("copo", [1, 1, 1, 0], 2), (1 - low) * across, (1 - low) * across, *second)
    named = {"said": f64(4, 7, 4, 4)}  # the first group differs in what it says, not in its rewards
    found = made("copo", [1, 1, 1, 0], 2, spec={"answer": "said"}, parts=named)
    close(found[:2], (1 - high) * across, (1 - high) * across)
    whole = made("copo", [1, 0, 0, 0], 2, spec={"consistency": True, "rho": 100.0})  # w = 0; levels ½·(1 − ½) and 0
    close(whole, *([0.125 / (0.25 / math.sqrt(2) + 1e-6)] * 2), *([-0.125 / (0.25 / math.sqrt(2) + 1e-6)] * 2))


def test_agrae() -> None:
    """p = ¼ and ¾, ω = ½: A = z/4·(1/√p + 1/√(1 − p)), times ½ where positive; p = 1 has none."""
    z = GRPO()(f64(1, 0, 0, 0, 1, 1, 1, 0), torch.arange(8) // 4, torch.ones(8).bool())
    by = z / 4 * (1 / math.sqrt(0.25) + 1 / math.sqrt(0.75))
    close(made("agrae", [1, 0, 0, 0, 1, 1, 1, 0], 2), *torch.where(by > 0, by / 2, by).tolist())
    code = z / 4 * torch.tensor([1 / 0.5 + 1 / 0.5] * 4 + [1 / math.sqrt(0.75) + 1 / (1 - math.sqrt(0.75))] * 4)
    spec = {"form": "code", "alpha": 0.5}
    torch.testing.assert_close(made("agrae", [1, 0, 0, 0, 1, 1, 1, 0], 2, spec=spec), code.double())
    assert made("agrae", [1, 1, 0, 0], 2).tolist() == [0, 0, 0, 0]


def test_split_leaves_demonstrations_out_of_the_statistics() -> None:
    """Own 0, 1, 0 beside a demonstration with 1: mean 1/3, deviation √(1/3)."""
    own = torch.tensor([False, True, True, True])
    std = math.sqrt(1 / 3) + 1e-4
    close(made("split", [1, 0, 1, 0], own=own), 2 / 3 / std, -1 / 3 / std, 2 / 3 / std, -1 / 3 / std)


# -- shaping -----------------------------------------------------------------------------------------------------------


def normal(*reward: float, eps: float = 1e-4) -> list[float]:
    x = f64(*reward)
    return ((x - x.mean()) / (x.std() + eps)).tolist()


def test_unlikeliness() -> None:
    """Rarest first −3, −2, −1, −.5: factors 1, 15/16, 14/16, 13/16 with β ¼."""
    found = made("unlikeliness", [1, 1, 0, 1], mean_logp=f64(-1, -3, -2, -0.5))
    close(found, *normal(14 / 16, 1, 0, 13 / 16))


def test_progrpo() -> None:
    """Confidences ½ and ¼, mean 3/8: shifts of .3·(∓1/8); none in a group without reward."""
    z = normal(1, 0)
    found = made("progrpo", [1, 0, 0, 0], 2, mean_logp=f64(0.5, 0.25, 0.5, 0.25).log())
    close(found, z[0] - 0.3 / 8, z[1] + 0.3 / 8, 0, 0)


def test_adora() -> None:
    """Right 5 against wrong 3 on average: 1. Right 2 against 3: λ. No right answer: 1. Cut answers do not count."""
    facts = {"length": torch.tensor([5, 2, 4, 2, 2, 4, 1, 1, 1, 2, 1, 9])}
    found = made("adora", [1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0], 4, **facts)
    z = normal(1, 0, 0)
    close(found, *z, *(0.1 * x for x in z), 0, 0, 0, *(0.1 * x for x in z))
    cut = made("adora", [1, 0, 0], length=torch.tensor([2, 1, 9]), ended=torch.tensor([True, True, False]))
    close(cut, *z)


def test_sign_gate() -> None:
    z = normal(1, 0, 0)
    spec = {"switch": 3, "positive": 0.5}
    close(made("sign_gate", [1, 0, 0], spec=spec, iteration=2), *z)
    close(made("sign_gate", [1, 0, 0], spec=spec, iteration=3), z[0] / 2, *z[1:])
    close(made("sign_gate", [1, 0, 0], iteration=100), 0, *z[1:])


def test_dler() -> None:
    """1, 1, 1, 0 with the third cut: 1, 1, 0, 0; group means 1 and 0 … of all four the deviation √(1/3)."""
    ended = torch.tensor([True, True, False, True])
    std = math.sqrt(1 / 3) + 1e-4
    close(made("dler", [1, 1, 1, 0], ended=ended), *(x / std for x in (0.5, 0.5, -0.5, -0.5)))


def test_ada() -> None:
    """Three of four have the format 0: α = 4/3 and 4 at first, 1 at the end; halfway F/n + (1 − F/n)/2 of that."""
    facts = {"parts": {"format": f64(0, 0, 0, 1)}}
    close(made("ada", [1, 0, 1, 1], **facts), *normal(4 / 3, 0, 4 / 3, 4))
    half = (4 / 3 * (0.75 + 0.125), 4 * (0.25 + 0.375))
    close(made("ada", [1, 0, 1, 1], iteration=51, **facts), *normal(half[0], 0, half[0], half[1]))
    close(made("ada", [1, 0, 1, 1], iteration=101, **facts), *normal(1, 0, 1, 1))
    with pytest.raises(UsageError, match="reads the reward 'format'; there is none by name"):
        made("ada", [1, 0])


def test_hbpo() -> None:
    """Budgets 2 and 4 of L 8: f(2) = 4cos(π/8), f(4) = 4cos(π/4). Lengths 1, 3 (one too many) | 3, 5 (one too many)."""
    spec = {"budgets": [2, 4], "limit": 8, "alpha": 0.1}
    f = {n: 4 * COS(math.pi * n / 16) for n in (2, 3, 4, 5)}
    reward = [f[2], f[3] - 0.1, 0, f[5] - 0.1]  # the third is wrong
    z = normal(*reward)
    within = [(reward[0] + reward[1]) / 2 - f[2]] * 2 + [reward[3] / 2 - f[4]] * 2
    found = made("hbpo", [1, 1, 0, 1], spec=spec, length=torch.tensor([1, 3, 3, 5]))
    close(found, *(a + b for a, b in zip(within, z)))
    long = made("hbpo", [1, 1], spec={"budgets": [2], "limit": 8}, length=torch.tensor([9, 9]))
    close(long, -f[2], -f[2])  # longer than L: no reward
    with pytest.raises(UsageError, match="`budgets` is"):
        component("advantage", {"name": "hbpo", "budgets": [4, 2]})


def test_dcpo() -> None:
    """H = .3 ≤ .5: T 1.2, |H − .5| = .2 cut to .1, half of the answers right: a = .2. w ∝ exp(−m/6)."""
    found = made("dcpo", [1, 0], mean_logp=f64(-0.6, -1.2), mean_entropy=f64(0.3, 0.3))
    tilt = [math.exp(0.1), math.exp(0.2)]
    z = normal(1, 0)
    close(found, 0.8 * z[0] + 0.2 * tilt[0] * 2 / sum(tilt), 0.8 * z[1])
    found = made("dcpo", [1, 0, 0], mean_logp=f64(0, 0, 0), mean_entropy=f64(0.4, 0.4, 0.4))
    z = normal(1, 0, 0)
    close(found, 0.7 * z[0] + 0.3, 0.7 * z[1], 0.7 * z[2])  # a third of the answers right: a = .3


def test_drpo() -> None:
    """Right answers of length 2 and 4 of L 10 with λ ½: weights ∝ e^{−.4}, e^{−.8}; a group of 3."""
    found = made("drpo", [1, 0, 1], spec={"lambda_": 0.5, "max_length": 10}, length=torch.tensor([2, 3, 4]))
    first = 1 / (1 + math.exp(-0.4))
    close(found, 3 * first, 0, 3 * (1 - first))
    assert made("drpo", [1, 1, 0, 0], 2).tolist() == [0, 0, 0, 0]  # no group has both


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_reinforce() -> None:
    """First means are their own baseline ½; then .9·½ + .1·½ = ½, then .9·½ + .1·1 = .55."""
    part = component("advantage", "reinforce")
    close(part(answers([0, 1])), -0.5, 0.5)
    close(part(answers([1, 1])), 0.5, 0.5)
    close(part(answers([1, 0])), 0.45, -0.55)


def test_p50() -> None:
    """Group means ½, 1: P50 ¾. Then 0 and 0 join: the median of 0, 0, ½, 1 is ¼. With room for two it is 0."""
    part, short = component("advantage", "p50"), component("advantage", {"name": "p50", "capacity": 2})
    found = part(answers([0, 1, 1, 1], 2))
    close(found.advantage, -0.75, 0.25, 0.25, 0.25)
    assert found.kept.tolist() == [False, True, True, True]
    short(answers([0, 1, 1, 1], 2))
    close(part(answers([0, 0, 0, 0], 2)).advantage, *[-0.25] * 4)
    close(short(answers([0, 0, 0, 0], 2)).advantage, *[0.0] * 4)
    spread = made("p50", [0, 1, 0, 1], 2, spec={"normalize": True})
    close(spread.advantage, *(x / math.sqrt(0.5) for x in (-0.5, 0.5, -0.5, 0.5)))


def test_risk() -> None:
    """Bundles of two problems: (1, 0), (0, 0), (1, 1), (0, 1) → S = 1, 0, 2, 1, whose quantiles at .2 and .8 are .6 and
    1.4. A = 1.5·min(S − .6, 0) + clip(S, .6, 1.4) − 1.4: −.4, −.9 − .8, 0, −.4."""
    part = component("advantage", {"name": "risk", "bundle": 2})
    rewards = [1, 0, 1, 0, 0, 0, 1, 1]
    close(part(answers(rewards, 2)), *[-0.4, -1.7, 0, -0.4] * 2)
    tracked = part.state_dict()["quantiles"]
    close(tracked, 0.6 + 0.1 * (0.2 - 0.25), 1.4 + 0.1 * (0.8 - 0.75))
    low, high = tracked.tolist()
    close(part(answers(rewards, 2))[:3], 1 - high, 1.5 * -low + low - high, 0)


def test_risk_as_in_the_code() -> None:
    part = component("advantage", {"name": "risk", "bundle": 2, "form": "code"})
    found = part(answers([1, 0, 1, 0, 0, 0, 1, 1], 2))
    std = math.sqrt(2 / 3) + 1e-6  # S = 1, 0, 2, 1 of the same problems
    lower, middle = -0.6 / (0.2 + 1e-6), -0.8 / (0.6 + 1e-6)
    close(found[:3], -0.4 / (0.6 + 1e-6) / 2.5 / std, (1.5 * lower + middle) / 2.5 / std, 0)


def test_risk_of_a_bundle_that_is_not_full() -> None:
    """Three problems in bundles of two: the last stands alone, and its rewards count twice."""
    part = component("advantage", {"name": "risk", "bundle": 2})
    part.load_state_dict({"quantiles": f64(0.5, 1.5)})
    close(part(answers([1, 0, 1, 0, 1, 0], 3)), *[0, -0.75 - 1] * 3)


@pytest.mark.parametrize("name", ["reinforce", "p50", "risk"])
def test_what_is_remembered_goes_on(name: str) -> None:
    """A component with the state of another goes on as it, and its next calls leave that state alone."""
    first, second = component("advantage", name), component("advantage", name)
    first(answers([1, 0, 1, 1, 0, 0], 3))
    state = first.state_dict()
    second.load_state_dict(state)
    later = answers([0, 1, 0, 0, 1, 1], 3)
    for _ in range(2):
        one, two = (x.advantage if isinstance(x, Judged) else x for x in (first(later), second(later)))
        assert torch.equal(one, two)
    third = component("advantage", name)
    third.load_state_dict(state)
    again = component("advantage", name)
    again(answers([1, 0, 1, 1, 0, 0], 3))
    assert {k: v.tolist() for k, v in third.state_dict().items()} == {
        k: v.tolist() for k, v in again.state_dict().items()
    }


def test_opob() -> None:
    """Rewards 1, 0, 1 with w 1, 2, 1 and ‖g‖ 1, 1, 3: Σw²‖g‖² = 1 + 4 + 9, Σw²‖g‖²R = 1 + 9, so b = 5/7; the second
    group has rewards 2, 4, 3 and equal w and ‖g‖, so b is their mean; its population deviation is √(2/3)."""
    facts = {"log_weight": f64(0, math.log(2), 0, 5, 5, 5), "head_norm": f64(1, 1, 3, 2, 2, 2)}
    reward = [1.0, 0, 1, 2, 4, 3]
    close(made("opob", reward, 2, **facts), 2 / 7, -5 / 7, 2 / 7, -1, 1, 0)
    scaled = made("opob", reward, 2, spec={"std": True}, **facts)
    close(scaled, *(x / math.sqrt(2 / 9) for x in (2 / 7, -5 / 7, 2 / 7)), *(x / math.sqrt(2 / 3) for x in (-1, 1, 0)))


def test_opob_where_nothing_can_be_weighed() -> None:
    """Weights as far apart as e^400 leave the heaviest answer alone; without gradients b is the mean; a demonstration
    can be left out of b."""
    far = {"log_weight": f64(-200, 200, 0), "head_norm": f64(1, 1, 1)}
    close(made("opob", [1, 0, 1], **far), 1, 0, 1)
    close(made("opob", [1, 0, 1], **(far | {"head_norm": f64(0, 0, 0)})), 1 / 3, -2 / 3, 1 / 3)
    mine = {"own": torch.tensor([True, True, False]), "head_norm": f64(1, 2, 5), "log_weight": f64(0, 0, 0)}
    close(made("opob", [1, 0, 1], spec={"statistics": "own"}, **mine), 4 / 5, -1 / 5, 4 / 5)


# -- all of them -------------------------------------------------------------------------------------------------------

OLD = ("grpo", "dr_grpo", "rloo", "batch_std", "gae", "egae", "hybrid")  # tested elsewhere
NEW = [name for name in COMPONENTS["advantage"] if name not in OLD]
COMPARE_BUNDLES = ("risk", "hbpo")  # the order of the answers says which are compared
REWARD = [1.0, 0, 1, 0, 0, 0, 1, 1, 1]


def facts(many: int) -> dict[str, Any]:
    x = torch.linspace(0.1, 0.9, many, dtype=torch.float64)
    return {
        "mean_logp": -(5 * x).sin().abs() - 0.1,
        "mean_entropy": (7 * x).cos().abs() + 0.1,
        "log_weight": (3 * x).sin(),
        "head_norm": (9 * x).cos().abs() + 0.1,
        "length": (11 * x).sin().abs().mul(20).long() + 1,
        "parts": {"format": (x > 0.4).double(), "other": (x > 0.6).double()},
    }


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_of_each(name: str, dtype: torch.dtype) -> None:
    found = made(name, torch.tensor(REWARD, dtype=dtype), 3, **facts(9))
    advantage = found.advantage if isinstance(found, Judged) else found
    assert advantage.shape == (9,) and advantage.dtype == dtype and bool(advantage.isfinite().all())


@pytest.mark.parametrize("name", [name for name in NEW if name not in COMPARE_BUNDLES])
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    order = torch.tensor([4, 8, 0, 6, 2, 1, 7, 3, 5])
    seen = answers(REWARD, 3, **facts(9))
    mixed = seen._replace(
        **{k: v[order] for k, v in seen._asdict().items() if isinstance(v, Tensor)},
        parts={k: v[order] for k, v in seen.parts.items()},
    )
    part, other = component("advantage", name), component("advantage", name)
    if not getattr(part, "takes_answers", False):
        return torch.testing.assert_close(
            part(mixed.reward, mixed.group, mixed.own), part(seen.reward, seen.group, seen.own)[order]
        )
    one, two = part(seen), other(mixed)
    if isinstance(one, Judged):
        assert int(one.kept.sum()) == int(two.kept.sum())
        one, two = one.advantage, two.advantage
    torch.testing.assert_close(two, one[order])


SILENT = ("split", "bnpo", "canon", "agrae", "adora", "sign_gate", "dler", "drpo", "median", "opob")


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rewards_of_a_group_teach_nothing(name: str, value: float) -> None:
    found = made(name, [value] * 6, 2, **facts(6))
    assert (found.advantage if isinstance(found, Judged) else found).tolist() == [0.0] * 6


@pytest.mark.parametrize("name", ["split", "median", "canon", "sign_gate", "opob"])
def test_a_constant_on_all_rewards_does_not_matter(name: str) -> None:
    one, two = made(name, REWARD, 3, **facts(9)), made(name, [r + 0.25 for r in REWARD], 3, **facts(9))
    if isinstance(one, Judged):
        assert torch.equal(one.kept, two.kept)
        one, two = one.advantage, two.advantage
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", [name for name in NEW if name not in ("median", *COMPARE_BUNDLES)])
def test_answers_that_stand_alone(name: str) -> None:
    found = made(name, [1, 0], 2, **facts(2))
    assert bool((found.advantage if isinstance(found, Judged) else found).isfinite().all())


@pytest.mark.parametrize("name", ["unlikeliness", "progrpo", "canon", "dcpo", "opob"])
def test_what_an_advantage_reads_must_be_there(name: str) -> None:
    assert component("advantage", name).reads <= OF_POLICY
    with pytest.raises(UsageError, match="these answers do not have"):
        made(name, [1, 0])


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("median", "eps", 0.0),
        ("bnpo", "high", 0.0),
        ("canon", "mu", 1.5),
        ("canon", "metric", "size"),
        ("copo", "gamma", -1.0),
        ("agrae", "alpha", 0.0),
        ("agrae", "form", "other"),
        ("unlikeliness", "beta", 2.0),
        ("progrpo", "alpha", -1.0),
        ("adora", "lambda_", -1.0),
        ("sign_gate", "switch", 0),
        ("ada", "iterations", 0),
        ("hbpo", "limit", 0),
        ("dcpo", "hot", 1.0),
        ("drpo", "lambda_", 0.0),
        ("reinforce", "decay", 1.0),
        ("p50", "capacity", 0),
        ("risk", "beta", 0.1),
        ("risk", "form", "other"),
        ("split", "statistics", "mine"),
        ("opob", "eps", 0.0),
    ],
)
def test_bad_parameters_of_each(name: str, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"`{option}`"):
        component("advantage", {"name": name, option: value})
