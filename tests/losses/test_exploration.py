"""Anchors on samples of the reference, gates, entropy terms that remember, weights, factors on the rate and terms:
known answers by hand in float64; and every component that a step in pieces must not change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from made_tokens import f64, full_tokens, informed, rows_of, singles, totals_of
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.policy_gradient import Objective, Tokens, component

OWN_MEAN = {"aggregation": "token_mean"}


def values(slot: str, spec: Any, tokens: Tokens, iteration: int = 1) -> Tensor:
    """What the part says of tokens that are the whole step, in one line."""
    part = component(slot, spec) if isinstance(spec, str | dict) else spec
    return part(informed(part, tokens), iteration=iteration).flatten()


def apart(log_ratios: list[float], **fields: Any) -> Tokens:
    """Answers of one token with ℓ − ℓ_base = ℓ − ℓ_k = ℓ − ℓ_b."""
    base = torch.full((len(log_ratios), 1), -3.0, dtype=torch.float64)
    logp = (base + f64(*log_ratios)[:, None]).requires_grad_()
    given = Tokens(logp, torch.ones_like(base), f64(*([1.0] * len(log_ratios))), base, base, base_logp=base)
    return given._replace(**fields)


# -- divergences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "forward", "coef": 1.0}, [1 - math.log(2), -0.5 + math.log(2)]),
        ({"name": "js", "coef": 1.0}, [2 * math.log(2) - 3 * math.log(1.5), -0.5 * math.log(2) - 1.5 * math.log(0.75)]),
        ({"name": "alpha", "coef": 1.0}, [(2**0.8 - 1.8) / -0.16, (0.5**0.8 - 0.6) / -0.16]),
        ({"name": "dph", "gate": "all"}, [0.01 * (1 - math.log(2)), 0.01 * (math.log(2) - 0.5)]),
        ({"name": "dph", "gate": "all", "coef": 1.0, "divergence": "js"}, [2 * math.log(2) - 3 * math.log(1.5), None]),
        ({"name": "dph", "gate": "all", "coef": 1.0, "divergence": "alpha"}, [(2**0.8 - 1.8) / -0.16, None]),
    ],
)
def test_divergences_of_samples_of_the_reference(spec: dict[str, Any], expected: list[float | None]) -> None:
    """u = π_θ/π_ref = 2 and ½; nothing beyond 10."""
    given = apart([math.log(2), -math.log(2), 0.0, 20.0])
    found = values("anchors", spec, given).tolist()
    assert all(want is None or got == pytest.approx(want, rel=1e-12) for got, want in zip(found, expected))
    assert found[2] == pytest.approx(0.0, abs=1e-15) and found[3] == pytest.approx(10 * component("anchors", spec).coef)


def test_their_means_are_the_divergences() -> None:
    """Σ_v q(v)·f(p(v)/q(v)) over a vocabulary: KL(q ‖ p); twice Jensen–Shannon; that of α; and their slopes."""
    logits = f64(0.3, -0.5, 1.1, 0.2).requires_grad_()
    p, q = logits.softmax(-1), f64(0.4, 0.1, 0.2, 0.3)
    given = apart([0.0] * 4)._replace(logp=p.log()[:, None], base_logp=q.log()[:, None])
    m = (p + q) / 2
    expected = {
        "forward": (q * (q / p).log()).sum(),
        "js": (p * (p / m).log()).sum() + (q * (q / m).log()).sum(),
        "alpha": (1 - (p**0.8 * q**0.2).sum()) / 0.16,
    }
    for name, divergence in expected.items():
        found = (q * values("anchors", {"name": name, "coef": 1.0}, given)).sum()
        torch.testing.assert_close(found, divergence)
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, divergence)]
        torch.testing.assert_close(*slopes)


def test_gates() -> None:
    """Five answers one nat from the base: a demonstration, A < 0, A > 0, a mastered problem, and the least likely one
    of the highest entropy."""
    columns = {"mastered": torch.tensor([False, False, False, True, False])}
    given = apart([1.0] * 5, columns=columns, entropy=f64(9.0, 1.0, 1.0, 1.0, 2.0)[:, None])
    given = given._replace(
        external=torch.tensor([True, False, False, False, False])[:, None],
        advantage=f64(-1, -1, 1, 1, 1),
        logp=given.logp - f64(9.0, 0, 0, 0, 1)[:, None],
        base_logp=given.base_logp - f64(9.0, 0, 0, 0, 1)[:, None],  # type: ignore[operator]
    )
    k3 = math.exp(-1)  # e^−1 + 1 − 1
    for gate, expected in {
        "all": [1, 1, 1, 1, 1],
        "own": [0, 1, 1, 1, 1],
        "external": [1, 0, 0, 0, 0],
        "negative": [0, 1, 0, 0, 0],
        "mastered": [0, 0, 0, 1, 0],
    }.items():
        found = values("anchors", {"name": "gated", "coef": 1.0, "gate": gate}, given)
        assert found.tolist() == pytest.approx([k3 * paid for paid in expected]), gate
        forward = values("anchors", {"name": "forward", "coef": 1.0, "gate": gate}, given)
        assert forward.ne(0).tolist() == [bool(paid) for paid in expected], gate
    for gate in ("low_probability", "high_entropy"):
        found = values("anchors", {"name": "gated_tail", "coef": 1.0, "gate": gate, "share": 0.25}, given)
        assert found.tolist() == pytest.approx([0, 0, 0, 0, k3]), gate
    assert component("anchors", {"name": "gated", "coef": 1.0, "gate": "mastered"}).columns == {"mastered"}
    with pytest.raises(UsageError, match="low_probability"):
        component("anchors", {"name": "gated_tail", "coef": 1.0, "gate": "all"})


def test_kl_cov() -> None:
    """Covariances 2.9, −2.9, −2.9, 2.9 as of Clip-Cov, at ½ of the tokens and a distance of .25 from the sampler."""
    logp = f64(-0.1, -3.0, -0.1, -3.0)[:, None].requires_grad_()
    before = logp.detach() - f64(0.25, 0.25, 0.5, -0.25)[:, None]
    given = Tokens(logp, torch.ones(4, 1), f64(2, 2, -2, -2), before, before)
    found = values("anchors", {"name": "kl_cov", "share": 0.5, "coef": 2.0}, given)
    assert found.tolist() == pytest.approx([0.5, 0, 0, 0.5])
    assert torch.autograd.grad(found.sum(), logp)[0].flatten().tolist() == [2.0, 0.0, 0.0, -2.0]
    assert values("anchors", "kl_cov", given).ne(0).sum() == 1  # at least one


def test_lp_reg() -> None:
    """Of six tokens with A < 0 the third least likely are held: p = .001 with p_b = .002 and p = .002 with p_b = .001.
    The second has grown; with κ = .1 and a likeliest token of .5 the proxy drops the first too. e^δ − δ − 1 = 1 − ln
    2."""
    now = f64(0.001, 0.002, 0.5, 0.5, 0.5, 0.5, 0.0001)[:, None].log().requires_grad_()
    before = f64(0.002, 0.001, 0.5, 0.5, 0.5, 0.5, 0.1)[:, None].log()
    given = Tokens(now, torch.ones(7, 1), f64(-1, -1, -1, -1, -1, -1, 1), before, before)
    given = given._replace(top_logp=torch.full((7, 1), math.log(0.02), dtype=torch.float64))
    found = values("anchors", {"name": "lp_reg", "share": 0.34}, given)
    assert found.tolist() == pytest.approx([1 - math.log(2), 0, 0, 0, 0, 0, 0])
    assert torch.autograd.grad(found.sum(), now)[0][0].item() == pytest.approx(-1.0)  # 1 − e^δ
    likely = given._replace(top_logp=torch.full((7, 1), math.log(0.5), dtype=torch.float64))
    assert values("anchors", {"name": "lp_reg", "share": 0.34, "kappa": 0.1}, likely).eq(0).all()
    assert values("anchors", "lp_reg", given).eq(0).all()  # 1 % of six tokens is none


# -- entropy -----------------------------------------------------------------------------------------------------------


def entropies(*each: float, **fields: Any) -> Tokens:
    return singles([1.0] * len(each), [1.0] * len(each), entropy=f64(*each)[:, None].requires_grad_(), **fields)


def resumed(slot: str, spec: Any, part: Any) -> Any:
    """Another part of the same kind that goes on where this one is."""
    other = component(slot, spec)
    other.load_state_dict(part.state_dict())
    return other


def test_target_entropy() -> None:
    """Target .5, step .1: entropies .2, .3, .9, .4 after a start of 0 act with 0, .1, 0 (above the target), .1."""
    spec = {"name": "target", "target": 0.5, "step": 0.1}
    part = component("entropy", spec)
    for mean, coef in ((0.2, 0.0), (0.3, 0.1), (0.9, 0.0), (0.4, 0.1)):
        found = values("entropy", part, entropies(mean - 0.1, mean + 0.1))
        assert found.tolist() == pytest.approx([-coef * (mean - 0.1), -coef * (mean + 0.1)])
        part = resumed("entropy", spec, part)
    dual = component("entropy", {"name": "target", "target": 0.5, "step": 2.0, "rule": "dual"})
    values("entropy", dual, entropies(0.2))
    assert values("entropy", dual, entropies(0.4)).tolist() == pytest.approx([-0.6 * 0.4])
    assert dual.state_dict()["coef"].item() == pytest.approx(0.8)


def test_siren() -> None:
    """Of H = 1 … 5 the upper half (quantile .5: 3, 4, 5) is held; their nuclei .3, .4, .8 have the mean .5, which is
    H₀. Then .6, .7, .8 has .7: the loss is coef·.04 with the slope coef·2·.2/3 for each."""
    spec = {"name": "siren", "coef": 2.0, "quantile": 0.5, **OWN_MEAN}
    objective = Objective(entropy=spec, trust="none")
    losses, slopes = [], []
    for nuclei in ([9.0, 9.0, 0.3, 0.4, 0.8], [9.0, 9.0, 0.6, 0.7, 0.8]):
        nucleus = f64(*nuclei)[:, None].requires_grad_()
        given = entropies(1, 2, 3, 4, 5, nucleus_entropy=nucleus)._replace(advantage=torch.zeros(5).double())
        loss = objective.loss(given, totals_of(given), iteration=1)[0]
        losses.append(loss.item())
        slopes.append(torch.autograd.grad(loss, nucleus)[0].flatten().tolist())
    assert losses == pytest.approx([0.0, 2 * 0.04]) and objective.nucleus == 0.8
    assert slopes[0] == pytest.approx([0.0] * 5) and slopes[1] == pytest.approx([0, 0, *[2 * 2 * 0.2 / 3] * 3])
    again = Objective(entropy=spec, trust="none")
    again.own.load_state_dict(objective.own.state_dict())
    assert again.loss(given, totals_of(given), iteration=1)[0].item() == pytest.approx(2 * 0.04)


def test_epo() -> None:
    """After means of 1 and 2 the band is .5 and 1.5 times 1.5, .75 to 2.25; β_2 = 1 + e^−1 with γ/k_mid = ½. With a
    window of one step it is 1 to 3."""
    spec = {"name": "epo", "coef": 0.5, "gamma": 1.0, "middle": 2.0}
    part = component("entropy", spec)
    assert values("entropy", part, entropies(0.5, 1.5)).tolist() == pytest.approx([-0.25, -0.75])
    values("entropy", part, entropies(2.0))
    other = resumed("entropy", spec, part)
    penalty = 0.1 * (1 + math.exp(-1))
    expected = [-0.5 * (0.7 - penalty), -0.5 * 1.0, -0.5 * (2.3 - penalty)]
    given = entropies(0.7, 1.0, 2.3)
    assert values("entropy", part, given, iteration=2).tolist() == pytest.approx(expected)
    assert values("entropy", other, given, iteration=2).tolist() == pytest.approx(expected)
    last = component("entropy", {**spec, "window": 1})
    for mean in (1.0, 2.0):
        values("entropy", last, entropies(mean))
    assert values("entropy", last, entropies(0.9, 1.1), 2).tolist() == pytest.approx([-0.5 * (0.9 - penalty), -0.55])


def test_entropy_band() -> None:
    """The two highest of .1, .3, 1.0, 2.5 within .5 to 2: the last is .5 above; the band from 1.2 misses the third by
    .2."""
    given = entropies(0.1, 0.3, 1.0, 2.5)
    spec = {"name": "band", "coef": 2.0, "share": 0.5}
    assert values("entropy", spec, given).tolist() == pytest.approx([0, 0, 0, 1.0])
    assert values("entropy", {**spec, "low": 1.2}, given).tolist() == pytest.approx([0, 0, 0.4, 1.0])


def test_reinforce_of_tempered_answers() -> None:
    """−2·ln ½ on the tempered answer that is right."""
    columns = {"tempered": torch.tensor([True, True, False]), "reward": f64(1, 0, 1)}
    given = singles([1.0] * 3, [0.3, 0.3, 0.3], columns=columns)
    found = values("entropy", {"name": "aepo", "coef": 2.0}, given)
    assert found.tolist() == pytest.approx([2 * math.log(2), 0, 0])


# -- weights -----------------------------------------------------------------------------------------------------------


def test_steer() -> None:
    """p = .5, p_b = .25, A = 1, H = 1: Ω = 1/.25·.25·(ln .5 + 1) = 1 − ln 2 = .307, and half of it for A = ½. exp(−kΩ)
    with k = −ln .8/.307 is .8 and √.8; linear .8 and 1.2; below .02 the exponent is measured by .02."""
    given = singles([2.0, 2.0], [1.0, 0.5], 0.25, entropy=f64(1.0, 1.0)[:, None])
    part = component("weight", "steer")
    assert part.change(given).flatten().tolist() == pytest.approx([1 - math.log(2), (1 - math.log(2)) / 2])
    assert part(informed(part, given)).flatten().tolist() == pytest.approx([0.8, math.sqrt(0.8)])
    linear = component("weight", {"name": "steer", "mapping": "linear"})
    assert linear(informed(linear, given)).flatten().tolist() == pytest.approx([0.8, 1.2])
    same = given._replace(advantage=f64(1, -1))
    assert linear(informed(linear, same)).flatten().tolist() == pytest.approx([1.0, 1.0])
    small = given._replace(advantage=f64(0.01, 0.0))
    change = 0.01 * (1 - math.log(2))
    assert part(informed(part, small)).flatten().tolist() == pytest.approx([0.8 ** (change / 0.02), 1.0])


def test_weights_by_sign_and_of_whole_answers() -> None:
    """e^(.5 + 1) = 4.48 and e^(2 + 1) = 20.1, at most 8; half of what is lost or gained."""
    before = f64([-1.0, -1.0], [-1.0, -1.0])
    given = Tokens(before, torch.ones(2, 2), f64(1, -1), before, before + f64([0.5, 1.0], [2.0, 1.0]))
    found = component("weight", "vcpo")(given)
    torch.testing.assert_close(found, f64([math.exp(1.5)] * 2, [8.0, 8.0]))
    for name, expected in (("mask_negative", [1.0, 0.5]), ("mask_positive", [0.5, 1.0])):
        assert component("weight", {"name": name, "factor": 0.5})(given)[:, 0].tolist() == expected
        assert component("weight", name)(given)[:, 0].tolist() == [round(x) if x == 1 else 0.0 for x in expected]


# -- the learning rate -------------------------------------------------------------------------------------------------


def stale(*log_weights: float) -> Tokens:
    """Answers of two tokens whose ℓ_k − ℓ_b add up to these; and a padding row."""
    size = len(log_weights)
    behavior = torch.full((size + 1, 2), -2.0, dtype=torch.float64)
    previous = behavior + 0.5 * f64(*log_weights, 7.0)[:, None]
    mask = torch.ones(size + 1, 2)
    mask[-1] = 0
    return Tokens(previous, mask, torch.ones(size + 1), behavior, previous)


def test_the_rate_follows_the_effective_sample_size() -> None:
    """Weights 1, 1, 2: (1 + 1 + 2)²/(3·6) = 8/9; √ of it, and 1 for a base of ½. Weights far apart, e^300 and 1: ⅓."""
    factor = component("lr", "ess")
    given = stale(0.0, 0.0, math.log(2))
    assert factor(given, iteration=1).item() == pytest.approx(math.sqrt(8 / 9))
    assert component("lr", {"name": "ess", "base": 0.5})(given, iteration=1).item() == 1.0
    assert component("lr", {"name": "ess", "base": 0.95})(given, iteration=1).item() == pytest.approx(
        math.sqrt(8 / 9 / 0.95)
    )
    assert factor(stale(300.0, 0.0, 0.0), iteration=1).item() == pytest.approx(math.sqrt(1 / 3))
    assert factor(stale(), iteration=1).item() == 1.0
    mean = component("lr", "ess")(stale(5.0, 5.0), iteration=1).item()
    assert mean == pytest.approx(1.0)
    outside = given._replace(external=torch.tensor([[False], [False], [True], [False]]).expand(4, 2))
    assert factor(outside, iteration=1).item() == pytest.approx(1.0)


def test_steps_are_skipped() -> None:
    """An effective share of 8/9, and ratios 2 and ½: mean of (2 − ln 2 − 1) and (½ + ln 2 − 1) is ¼."""
    given = stale(0.0, 0.0, math.log(2))
    for least, expected in ((0.88, 1.0), (0.9, 0.0)):
        assert component("lr", {"name": "skip", "ess": least})(given, iteration=1).item() == expected
    for most, expected in ((0.3, 1.0), (0.2, 0.0)):
        found = component("lr", {"name": "skip", "kl": most, "ess": 0.1})(singles([2.0, 0.5], [1.0, 1.0]), iteration=1)
        assert found.item() == expected
    with pytest.raises(UsageError, match="never skip"):
        component("lr", "skip")


# -- terms -------------------------------------------------------------------------------------------------------------


def test_contrastive_policy_gradient() -> None:
    """β = ½, distances to the base 1, 0, −1 and rewards 1, 0, 1: R_β = .5, 0, 1.5. Squares of differences .25, 1, 2.25:
    their mean is 3.5/3, divided by 2β = 1; and Σ/(k − 1) = 1.75 = βk times that. A group of one adds nothing, and
    counts in the number of answers."""
    base = torch.full((4, 2), -1.0, dtype=torch.float64)
    logp = (base + f64([0.5, 0.5], [0.0, 0.0], [-1.0, 0.0], [3.0, 3.0])).requires_grad_()
    columns = {"group": torch.tensor([4, 4, 4, 9]), "reward": f64(1, 0, 1, 0)}
    given = Tokens(logp, torch.ones(4, 2), f64(0, 0, 0, 0), base, base, base_logp=base, columns=columns)
    term = component("terms", {"name": "copg", "beta": 0.5})
    found = term(given, totals_of(given), iteration=1)
    assert found.item() == pytest.approx(3.5 / 3 * 3 / 4)
    slope = torch.autograd.grad(found, logp)[0]
    centred = f64(0.5, 0.0, 1.5, 2 / 3) - 2 / 3
    # of Σ(R − mean)²/(β(k − 1)): −2β(R − mean)/(β(k − 1)), times k / rows
    torch.testing.assert_close(slope, (-2 * centred / 2 * 3 / 4)[:, None].expand(4, 2))
    other = component("terms", {"name": "copg", "beta": 0.5, "normalise": "k_minus_1"})
    assert other(given, totals_of(given), iteration=1).item() == pytest.approx(1.75 * 3 / 4)


def test_contrastive_policy_gradient_is_leave_one_out_reinforce() -> None:
    """The slope of Σ_{i>j}(…)²/(k − 1) is −2β·Σ_i(R_β,i − mean of the others)·∇Σℓ_i."""
    given = full_tokens(2)._replace(external=None)
    found = component("terms", {"name": "copg", "beta": 0.3, "normalise": "k_minus_1"})
    slope = torch.autograd.grad(found(given, totals_of(given), iteration=1), given.logp)[0]
    distance = torch.where(given.kept, given.logp.detach() - given.base_logp, 0.0).sum(1)  # type: ignore[operator]
    reward = given.columns["reward"] - 0.3 * distance  # type: ignore[index]
    expected = torch.zeros(6, dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 6)):
        size = rows.stop - rows.start
        others = (reward[rows].sum() - reward[rows]) / (size - 1)
        expected[rows] = -2 * 0.3 * (reward[rows] - others) * size / 6
    torch.testing.assert_close(slope, torch.where(given.kept, expected[:, None], 0.0))


def test_the_likelihood_of_demonstrations() -> None:
    """Half of the mean of −ln .5, −ln .25, whatever else is in the step; 0 without demonstrations."""
    outside = torch.tensor([[True], [True], [False]])
    given = singles([1.0, 0.5, 3.0], [1.0] * 3, 0.5)
    term = component("terms", {"name": "sft", "coef": 0.5})
    found = term(informed(term, given._replace(external=outside)), totals_of(given), iteration=1)
    assert found.item() == pytest.approx(0.5 * 1.5 * math.log(2))
    assert term(informed(term, given), totals_of(given), iteration=1).item() == 0.0


# -- a step in pieces --------------------------------------------------------------------------------------------------

NEEDED: dict[str, dict[str, Any]] = {  # parameters without a default, and what makes a component act on made tokens
    **{name: {"coef": 0.3} for name in ("k1", "k2", "k3", "forward", "js", "alpha", "bonus", "dph")},
    "gated": {"coef": 0.3, "gate": "negative"},
    "gated_tail": {"coef": 0.3, "gate": "low_probability"},
    "kl_cov": {"share": 0.3},
    "lp_reg": {"share": 0.5},
    "clip_cov": {"share": 0.3, "lb": 0.0},
    "mis": {"vocabulary": 9},
    "d3s": {"first": 0.4},
    "target": {"start": 0.2, "target": 9.0},
}
NEW = {
    "ratio": ["turn", "full_sequence", "gspo_token", "luffy"],
    "trust": [
        *("ppo", "dual", "two_sided", "centred", "cispo", "grad_preserve", "bapo", "entropy_adaptive", "clip_cov"),
        *("gtpo", "d3s", "spine", "sequence_mask", "over_length", "rover"),
    ],
    "anchors": ["forward", "js", "alpha", "dph", "gated", "gated_tail", "kl_cov", "lp_reg"],
    "entropy": ["target", "siren", "epo", "band", "aepo"],
    "weight": ["steer", "hapo", "vcpo", "mask_negative", "mask_positive"],
    "terms": ["copg", "sft"],
}


def in_slot(slot: str, name: str) -> dict[str, Any]:
    spec = {"name": name, **NEEDED.get(name, {})}
    return {slot: (spec,) if slot in ("anchors", "weight", "terms") else spec}


@pytest.mark.parametrize(("slot", "name"), [(slot, name) for slot, names in NEW.items() for name in names])
def test_a_step_in_pieces_is_the_step(slot: str, name: str) -> None:
    """Two groups in one forward pass, or one after the other with the facts of the whole: the same loss and slopes. The
    part changes the loss, and padding has no slope."""
    given = full_tokens(1)
    objective, plain = Objective(**in_slot(slot, name)), Objective()
    for _ in range(2):  # the second with what the first has left behind
        facts = objective.step_facts(given)
    step = totals_of(given)
    whole = objective.loss(given, step, iteration=3, facts=facts)[0]
    shares = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = rows_of(given, rows)
        mine = {key: {k: v if v.dim() == 0 else v[rows] for k, v in told.items()} for key, told in facts.items()}
        shares.append(objective.loss(part, step, iteration=3, facts=mine)[0])
    torch.testing.assert_close(sum(shares), whole)
    of = [field for field in (given.logp, given.entropy, given.nucleus_entropy) if field is not None]
    slopes = [torch.autograd.grad(x, of, allow_unused=True, retain_graph=True) for x in (whole, sum(shares))]
    for one, other in zip(*slopes):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
            assert torch.isfinite(one).all() and (one[~given.kept] == 0).all()
    before = torch.autograd.grad(plain.loss(given, step, iteration=3)[0], of, allow_unused=True)
    moved = any(one is not None and (two is None or not torch.equal(one, two)) for one, two in zip(slopes[0], before))
    assert moved or name in ("ppo", "two_sided", "dual", "centred")


@pytest.mark.parametrize(
    ("slot", "spec", "words"),
    [
        ("trust", {"name": "two_sided", "delta": 1.1}, "`delta`"),
        ("trust", {"name": "clip_cov", "lb": 6.0}, "`ub`"),
        ("trust", {"name": "spine", "share": 0.0}, "`share`"),
        ("trust", {"name": "bapo", "order": "papers"}, "Did you mean 'paper'"),
        ("ratio", {"name": "turn", "denominator": "old"}, "`denominator`"),
        ("ratio", {"name": "luffy", "gamma": 0.0}, "`gamma`"),
        ("anchors", {"name": "alpha", "coef": 1.0, "alpha": 1.0}, "`alpha`"),
        ("anchors", {"name": "gated", "coef": 1.0, "gate": "masterd"}, "mastered"),
        ("entropy", {"name": "band", "low": 3.0}, "`high`"),
        ("entropy", {"name": "epo", "middle": 0.0}, "`middle`"),
        ("weight", {"name": "steer", "least": 1.5}, "`least`"),
        ("lr", {"name": "ess", "base": 0.0}, "`base`"),
        ("terms", {"name": "copg", "beta": 0.0}, "`beta`"),
    ],
)
def test_impossible_parameters(slot: str, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        component(slot, spec)
