"""HPT's gate and its term: known answers, and what a step's cut must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offpolicy.errors import UsageError
from offpolicy.losses.answers import Answers
from offpolicy.losses.policy.hybrid import HybridAdvantage, HybridLikelihood
from offpolicy.losses.policy_gradient import Objective
from offpolicy.losses.tokens import Tokens, Totals

F = torch.float64


def answers(solved: list[int], own: int, shown: list[bool]) -> Answers:
    """A group for each number of right answers, with a demonstration worth 1 where it is shown."""
    rows = [(g, float(i < s), True) for g, s in enumerate(solved) for i in range(own)]
    rows += [(g, 1.0, False) for g, there in enumerate(shown) if there]
    group, reward, mine = (list(column) for column in zip(*rows))
    n = torch.tensor(group)
    ones = torch.ones_like(n)
    return Answers(torch.tensor(reward, dtype=F), n, torch.tensor(mine), ones, ones.bool(), n, {}, 1)


def judged(found: Any, told: Answers, group: int) -> tuple[list[float], list[bool], list[float]]:
    rows = told.group == group
    return found.advantage[rows].tolist(), found.kept[rows].tolist(), found.weight[rows].tolist()


def test_gates() -> None:
    """Of four own answers 0, 1, 2 and 3 are right; the last problem shows nothing."""
    told = answers([0, 1, 2, 0], 4, [True, True, True, False])
    found = HybridAdvantage(gate=0, gate_off=1)(told)
    assert judged(found, told, 0) == ([0.0] * 5, [False] * 4 + [True], [0.0] * 4 + [1.0])
    # one right of four: own 1 − ¼ and 0 − ¼; the demonstration beside them 1 − ¼
    assert judged(found, told, 1) == ([0.75, -0.25, -0.25, -0.25, 0.75], [True] * 5, [0.0] * 5)
    assert judged(found, told, 2) == ([0.5, 0.5, -0.5, -0.5, 0.0], [True] * 4 + [False], [0.0] * 5)
    assert judged(found, told, 3) == ([0.0] * 4, [True] * 4, [0.0] * 4)


def test_gates_that_never_and_always_open() -> None:
    told = answers([0, 2, 4], 4, [True] * 3)
    never, always = HybridAdvantage(gate=-1)(told), HybridAdvantage(gate=8)(told)
    assert (never.kept == told.own).all() and not never.weight.any()
    assert (always.kept == ~told.own).all() and always.weight.tolist() == (~told.own).double().tolist()
    plain = Objective(advantage={"name": "dr_grpo", "statistics": "own"})
    assert torch.equal(never.advantage[told.own], plain.advantages(told.reward, told.group, told.own)[told.own])


def test_soft_weights() -> None:
    """Of eight, s = 1 drops the own answers, s = 3 weighs them and the demonstration ¼; of four, s = 1 stands for 2."""
    told = answers([0, 1, 3, 8], 8, [True] * 4)
    found = HybridAdvantage(soft=True)(told)
    own, shown = told.own, ~told.own
    assert found.weight[shown].tolist() == [1.0, 1.0, 0.25, 0.0]
    assert found.kept[shown].tolist() == [True, True, True, False]
    assert [bool(found.kept[own & (told.group == g)].all()) for g in range(4)] == [True, False, True, True]
    third = found.advantage[own & (told.group == 2)]
    torch.testing.assert_close(third[0], torch.tensor(0.25 * 5 / 8, dtype=F))
    assert HybridAdvantage(soft=True)(answers([1], 4, [True])).weight.tolist()[-1] == 0.5
    with pytest.raises(UsageError, match="`soft` takes the place"):
        HybridAdvantage(soft=True, gate=2)


def step() -> tuple[Tokens, Totals]:
    torch.manual_seed(0)
    logp = (-torch.rand(5, 3, dtype=F)).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=F)
    shown = torch.tensor([0, 0, 1, 1, 1]).bool()
    made = Tokens(
        logp=logp,
        mask=mask,
        advantage=torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0], dtype=F),
        behavior_logp=logp.detach() - 0.1,
        previous_logp=logp.detach(),
        external=shown[:, None].expand(5, 3),
        columns={"weight": torch.tensor([0.0, 0.0, 1.0, 0.25, 0.0], dtype=F)},
    )
    return made, Totals(5, 11, 4, 3)


def test_term_and_split() -> None:
    """−(1·ℓ of one token + ¼·ℓ of two)/3: the demonstration of weight 0 does not count."""
    tokens, totals = step()
    term = HybridLikelihood(coef=0.3)
    facts = term.step_facts(tokens)
    value = term(tokens._replace(step=facts), totals, iteration=1)
    logp = tokens.logp.detach()
    torch.testing.assert_close(value.detach(), -0.3 * (logp[2, 0] + 0.25 * (logp[3, 0] + logp[3, 1])) / 3)
    objective = Objective(
        advantage="hybrid", trust="none", aggregation="dr_grpo", terms=({"name": "hybrid_sft", "coef": 0.3},)
    )
    whole = objective.loss(tokens, totals, iteration=1)[0]
    found = torch.autograd.grad(whole, tokens.logp)[0]
    known = objective.step_facts(tokens)
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]

    def cut(rows: slice) -> Tokens:
        named = {k: v[rows] for k, v in tokens._asdict().items() if isinstance(v, torch.Tensor)}
        return tokens._replace(**named, columns={"weight": tokens.columns["weight"][rows]})  # type: ignore[index]

    shares = sum(objective.loss(cut(rows), totals, iteration=1, facts=known)[0] for rows in parts)
    torch.testing.assert_close(shares, whole)
    assert not found[4].any() and float(found[2, 0]) == pytest.approx(-0.1)  # coef·1/3
    # own rows: −ρA/(rows · longest answer)
    torch.testing.assert_close(found[0, 0], torch.tensor(-0.5 / 20, dtype=F) * torch.tensor(0.1, dtype=F).exp())
