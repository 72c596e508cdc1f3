"""Terms of the loss over groups, weights by the entropy of steps, and values after a cut: known answers in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.advantages import gae, last_kept
from offpolicy.losses.policy.contrast import DivergenceLimit, WrongAnswers
from offpolicy.losses.policy.segments import SegmentPPO, StateGroupPPO
from offpolicy.losses.policy.steps import ClarityBonus, StepEntropyWeight
from offpolicy.losses.policy_gradient import COMPONENTS, Objective
from offpolicy.losses.tokens import Ratio, Tokens, Totals, detached

OF_ANSWERS = ("mask", "logp", "advantage", "behavior_logp", "previous_logp", "entropy")


def f64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made_step(**more: Any) -> tuple[Tokens, Totals]:
    """Two groups of three answers of up to four tokens, and a row of padding."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(7, 4, dtype=torch.float64)
    for row, length in enumerate((4, 3, 2, 4, 1, 3)):
        mask[row, :length] = 1
    logp = -torch.rand(7, 4, generator=generator, dtype=torch.float64)
    fields: dict[str, Any] = {
        "logp": logp.clone().requires_grad_(),
        "mask": mask,
        "advantage": f64(1.0, -0.5, -0.5, 2.0, -1.0, -1.0, 0.0),
        "behavior_logp": logp + 0.1 * torch.randn(7, 4, generator=generator, dtype=torch.float64),
        "previous_logp": logp + 0.2 * torch.randn(7, 4, generator=generator, dtype=torch.float64),
        "entropy": torch.rand(7, 4, generator=generator, dtype=torch.float64),
        "columns": {
            "group": torch.tensor([3, 3, 3, 8, 8, 8, 3]),
            "reward": f64(1, 0, 0, 1, 0, 1, 1),
            "turn": torch.tensor(
                [[0, 0, 1, 1], [0, 1, 2, 2], [5, 5, 5, 5], [0, 2, 2, 2], [0, 0, 0, 0], [1, 1, 4, 4], [0] * 4]
            ),
        },
    }
    return Tokens(**(fields | more)), Totals(6, int(mask.sum()), 8, 4)


def rows(tokens: Tokens, facts: dict[str, Tensor], chosen: list[int]) -> Tokens:
    """A micro-batch with its rows of the facts of the step."""
    cut = {k: v[chosen] for k, v in tokens._asdict().items() if isinstance(v, Tensor)}
    columns = {k: v[chosen] for k, v in (tokens.columns or {}).items()}
    step = {k: v[chosen] if v.ndim else v for k, v in facts.items()}
    return tokens._replace(**cut, columns=columns, step=step)


CUTS = [[[0, 1, 2], [3, 4, 5, 6]], [[3, 4, 5], [6], [0, 1, 2]]]  # whole groups
TERMS = [
    WrongAnswers(),
    WrongAnswers(tau=0.2),
    DivergenceLimit(delta=0.0, beta=2.0),
    ClarityBonus(),
    ClarityBonus(by="answer"),
]


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("cut", CUTS)
def test_shares_of_a_cut_step_add_up(term: Any, cut: list[list[int]]) -> None:
    tokens, totals = made_step()
    facts = term.step_facts(detached(tokens))
    whole = term(tokens, totals, iteration=1)
    (expected,) = torch.autograd.grad(whole, tokens.logp)
    shares = sum(term(rows(tokens, facts, chosen), totals, iteration=1) for chosen in cut)
    (found,) = torch.autograd.grad(shares, tokens.logp)
    torch.testing.assert_close(shares, whole)
    torch.testing.assert_close(found, expected)
    assert bool((expected[tokens.mask == 0] == 0).all())


def test_weights_of_a_cut_step_are_those_of_the_whole() -> None:
    tokens, _ = made_step()
    part = StepEntropyWeight()
    facts = part.step_facts(detached(tokens))
    whole = part(tokens)
    for chosen in ([0, 3], [6, 5, 1], [2, 4]):
        assert torch.equal(part(rows(tokens, facts, chosen)), whole[chosen])


def test_wrong_answers_by_hand() -> None:
    """Group 3: wrong means −1 and −3; group 8: one wrong with −2; τ ½: ½·log((e^{−2} + e^{−6})/2) and −2, over three
    groups: the one without a right answer counts in their number alone."""
    logp = f64([-1.0], [-1.0], [-3.0], [-2.0], [-9.0], [-4.0]).requires_grad_()
    fields = {"mask": torch.ones(6, 1, dtype=torch.float64), "advantage": torch.zeros(6), "entropy": None}
    columns = {"group": torch.tensor([3, 3, 3, 8, 8, 9]), "reward": f64(1, 0, 0, 0, 1, 0)}
    tokens, totals = made_step(
        logp=logp, behavior_logp=logp.detach(), previous_logp=logp.detach(), columns=columns, **fields
    )
    found = WrongAnswers(tau=0.5)(tokens, totals, iteration=1)
    torch.testing.assert_close(found, f64((0.5 * math.log((math.exp(-2) + math.exp(-6)) / 2) - 2) / 3)[0])
    (gradient,) = torch.autograd.grad(found, logp)
    likely = 1 / (1 + math.exp(-4))
    torch.testing.assert_close(gradient[:, 0] * 3, f64(0, likely, 1 - likely, 1, 0, 0))


def test_drpo_has_the_gradient_of_its_objective() -> None:
    """Advantage and term together: mean over groups of Σ w·s − τ·log mean exp(s/τ), s the mean log-probability."""
    parts = {"advantage": "drpo", "ratio": "none", "trust": "none", "terms": [{"name": "drpo_contrast", "tau": 0.5}]}
    objective = Objective(**parts)
    tokens, totals = made_step()
    weight = f64(1, 0, 0, 0.25, 0, 0.75, 0)
    loss, _ = objective.loss(tokens._replace(advantage=3 * weight), totals, iteration=1, health=False)
    (found,) = torch.autograd.grad(loss, tokens.logp)
    logp = tokens.logp.detach().requires_grad_()
    s = (logp * tokens.mask).sum(-1) / tokens.mask.sum(-1).clamp(min=1)
    wrong = 0.5 * ((s[1:3] / 0.5).logsumexp(0) - math.log(2)) + s[4]
    (expected,) = torch.autograd.grad(-((weight * s).sum() - wrong) / 2, logp)
    torch.testing.assert_close(found, expected)


def test_the_limit_of_the_divergence() -> None:
    """K = mean of e^d − 1 − d over the tokens; the factor β·(K − δ) has no gradient, and there is none below δ."""
    tokens, totals = made_step()
    d = (tokens.logp - tokens.previous_logp).detach()[tokens.mask > 0]
    level = (d.exp() - 1 - d).mean()
    found = DivergenceLimit(delta=0.001, beta=5.0)(tokens, totals, iteration=1)
    torch.testing.assert_close(found.detach(), 5 * (level - 0.001) * level)
    (gradient,) = torch.autograd.grad(found, tokens.logp)
    torch.testing.assert_close(gradient[tokens.mask > 0], 5 * (level - 0.001) * (d.exp() - 1) / len(d))
    assert DivergenceLimit(delta=1.0)(tokens, totals, iteration=1).item() == 0


def empg_by_hand(tokens: Tokens, zeta: float) -> tuple[Tensor, Tensor]:
    """g and ζ·f − c of every token, step by step."""
    turn = tokens.columns["turn"]
    found = []  # (row, tokens, mean entropy)
    for row in range(6):
        kept = tokens.mask[row] > 0
        for number in sorted(set(turn[row][kept].tolist())):
            places = [t for t in range(4) if kept[t] and turn[row, t] == number]
            found.append((row, places, tokens.entropy[row, places].mean().item()))
    low, high = min(h for *_, h in found), max(h for *_, h in found)
    scaled = [(row, places, (h - low) / (high - low + 1e-8)) for row, places, h in found]
    g = [math.exp(-h) for *_, h in scaled]
    g = [x / (sum(g) / len(g)) for x in g]
    f = [math.exp(-b[2]) if a[0] == b[0] else 0.0 for a, b in zip(scaled, [*scaled[1:], (-1, [], 0.0)])]
    advantage = [tokens.advantage[row].item() for row, *_ in scaled]
    center = sum(a * x + zeta * y for a, x, y in zip(advantage, g, f)) / len(g)
    weight, bonus = torch.ones(7, 4, dtype=torch.float64), torch.zeros(7, 4, dtype=torch.float64)
    for (row, places, _), x, y in zip(scaled, g, f):
        weight[row, places], bonus[row, places] = x, zeta * y - center
    return weight, bonus


def test_empg_against_a_loop_over_steps() -> None:
    """At ρ = 1 weight and bonus together have the gradient of A·g + ζ·f − c per token; the steps' mean of that is 0."""
    tokens, totals = made_step()
    tokens = tokens._replace(behavior_logp=tokens.logp.detach(), previous_logp=tokens.logp.detach())
    weight, bonus = empg_by_hand(tokens, 0.05)
    kept = tokens.mask > 0
    torch.testing.assert_close(StepEntropyWeight()(tokens)[kept], weight[kept])
    share = ClarityBonus()(tokens, totals, iteration=1)
    torch.testing.assert_close(share.detach(), -(bonus * tokens.mask).sum() / totals.tokens)
    objective = Objective(aggregation="token_mean", weight=("empg",), terms=("empg_clarity",))
    loss, _ = objective.loss(tokens, totals, iteration=1, health=False)
    (found,) = torch.autograd.grad(loss, tokens.logp)
    expected = -(tokens.advantage[:, None] * weight + bonus) * tokens.mask / totals.tokens
    torch.testing.assert_close(found, expected)


def test_steps_of_whole_answers_need_no_column() -> None:
    tokens, _ = made_step(columns=None)
    part = StepEntropyWeight(by="answer")
    mean = ((tokens.entropy * tokens.mask).sum(-1) / tokens.mask.sum(-1).clamp(min=1))[:6]
    scaled = (-(mean - mean.min()) / (mean.max() - mean.min() + 1e-8)).exp()
    torch.testing.assert_close(part(tokens)[:6, 0], scaled / scaled.mean())
    assert part.columns == frozenset() and StepEntropyWeight().columns == {"turn"}
    with pytest.raises(UsageError, match="column `turn`"):
        StepEntropyWeight()(tokens)
    with pytest.raises(UsageError, match="`by`"):
        ClarityBonus(by="word")


def test_gae_after_a_cut() -> None:
    """γ ½, λ ½, V = 1, 2, 4 and 4 after the end: δ₃ = 1 + ½·4 − 4 = −1, δ₂ = 0, δ₁ = 0: A = −1/16, −1/4, −1."""
    reward, value, mask = f64([0, 0, 1]), f64([1, 2, 4]), torch.ones(1, 3, dtype=torch.float64)
    found = gae(reward, value, mask, discount=0.5, lambda_=0.5, last_value=f64(4))
    torch.testing.assert_close(found, f64([-1 / 16, -1 / 4, -1]))
    zero = gae(reward, value, mask, discount=0.5, lambda_=0.5, last_value=f64(0))
    torch.testing.assert_close(zero, gae(reward, value, mask, discount=0.5, lambda_=0.5))


def test_egae_takes_the_last_value_of_cut_answers_alone() -> None:
    """γ = λ = 1: the last advantage of a cut answer is its reward, that of an ended one R − V."""
    objective = Objective(advantage={"name": "egae", "normalize": False}, value="squared")
    value, mask = f64([1, 2, 9], [1, 2, 3]), f64([1, 1, 0], [1, 1, 1])
    assert last_kept(value, mask).tolist() == [2, 3]
    ended = torch.tensor([False, True])
    advantage, returns = objective.critic_advantages(f64(0, 1), value, mask, ended)
    torch.testing.assert_close(advantage, f64([1, 0, 0], [0, -1, -2]))
    torch.testing.assert_close(returns, f64([2, 2, 0], [1, 1, 1]))
    plain = Objective(advantage={"name": "gae", "normalize": False}, value="squared")
    torch.testing.assert_close(
        objective.critic_advantages(f64(0, 1), value, mask)[0], plain.critic_advantages(f64(0, 1), value, mask)[0]
    )


def test_the_critic_learns_from_finished_answers_alone() -> None:
    """½·[2² + 1²] of the second answer, which ended, over its two tokens; nothing of the first."""
    value = f64([5, 5], [2, 1]).requires_grad_()
    zeros, columns = torch.zeros(2, 2, dtype=torch.float64), {"ended": torch.tensor([False, True])}
    tokens = Tokens(
        zeros, zeros + 1, f64(0, 0), zeros, zeros, value=value, returns=torch.zeros_like(value), columns=columns
    )
    part = Objective(advantage="egae", value={"name": "squared", "finished": True}, aggregation="token_mean")
    assert part.columns == {"ended"}
    found, _ = part.loss(tokens, Totals(2, 4, 2, 2), iteration=1)
    torch.testing.assert_close(found, f64(0.5 * 5 / 4)[0])
    found.backward()
    torch.testing.assert_close(value.grad, f64([0, 0], [0.5, 0.25]))


def test_names() -> None:
    assert {"drpo_contrast", "kl_limit", "empg_clarity"} <= COMPONENTS["terms"].keys() and "empg" in COMPONENTS[
        "weight"
    ]
    for bad in (
        {"name": "drpo_contrast", "tau": 0.0},
        {"name": "kl_limit", "beta": -1.0},
        {"name": "empg_clarity", "k": -1.0},
    ):
        with pytest.raises(UsageError):
            Objective(terms=[bad])


# -- advantages of parts of an answer ----------------------------------------------------------------------------------


def test_segments_by_hand() -> None:
    """V at the begins ½, ¼ and reward 1: A = −¼, −¼, ¾ and 0 outside; a token of π_k .95 has none."""
    mask, segment = f64([1, 1, 1, 0]), torch.tensor([[0, 0, 3, 3]])
    old = f64([0.5, 0.95, 0.5, 0.5]).log()
    columns = {"segment": segment, "segment_value": f64([0.5, 0.5, 0.25, 0.25]), "reward": f64(1)}
    fields = {"mask": mask, "advantage": f64(9), "entropy": None, "columns": columns}
    tokens, _ = made_step(logp=old.clone(), behavior_logp=old, previous_logp=old, **fields)
    one = Ratio(torch.ones_like(mask))
    certain, all_of_it = SegmentPPO(), SegmentPPO(certain=1.0)
    torch.testing.assert_close(certain(one, f64([9]), tokens).value[0, :3], f64(-0.25, 0, 0.75))
    torch.testing.assert_close(all_of_it(one, f64([9]), tokens).value[0, :3], f64(-0.25, -0.25, 0.75))
    high = all_of_it(Ratio(torch.full_like(mask, 1.5)), f64([9]), tokens)
    torch.testing.assert_close(high.value[0, :3], f64(-0.375, -0.375, 0.9))  # clipped at 1.2 where A > 0


def test_steps_from_the_same_state_by_hand() -> None:
    """State 7 begins steps with returns 1 and 0 of two answers, 5 one with 3, and one step has no known state."""
    state = torch.tensor([[7, 7, 5], [7, -1, -1]])
    columns = {"state": state, "step_return": f64([1, 1, 3], [0, 8, 8])}
    fields = {"mask": torch.ones(2, 3, dtype=torch.float64), "advantage": f64(0.5, -0.5), "entropy": None}
    old = torch.zeros(2, 3, dtype=torch.float64)
    tokens, _ = made_step(logp=old, behavior_logp=old, previous_logp=old, columns=columns, **fields)
    part, one = StateGroupPPO(omega=2.0), Ratio(torch.ones_like(old))
    expected = f64([1.5, 1.5, 0.5], [-1.5, -0.5, -0.5])
    torch.testing.assert_close(part(one, tokens.advantage[:, None], tokens).value, expected)
    facts = part.step_facts(detached(tokens))
    for row in (0, 1):
        alone = rows(tokens, facts, [row])
        found = part(Ratio(torch.ones(1, 3, dtype=torch.float64)), alone.advantage[:, None], alone)
        torch.testing.assert_close(found.value, expected[row : row + 1])
