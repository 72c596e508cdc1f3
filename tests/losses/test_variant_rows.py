"""Published variants are choices of parts that go together, and each is another objective than GRPO."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from made_tokens import full_tokens, totals_of
from torch import Tensor

from offpolicy.language.rl.rollouts import RolloutModule
from offpolicy.losses.policy_gradient import Objective, Tokens
from offpolicy.losses.variants import ROWS, VARIANTS, Variant

FACTS = {
    "base": {"base_logp", "base_kl"},
    "vocabulary": {"entropy", "top_logp", "mean_log_ratio", "nucleus_entropy"},
}


def slope(objective: Objective, given: Tokens, iteration: int) -> Tensor:
    loss = objective.loss(given, totals_of(given), iteration=iteration)[0]
    assert torch.isfinite(loss)
    fields = [field for field in (given.logp, given.entropy, given.nucleus_entropy) if field is not None]
    found = torch.autograd.grad(loss, fields, allow_unused=True)
    return torch.stack([torch.zeros_like(field) if one is None else one for field, one in zip(fields, found)])


def test_names_are_given_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) and all(VARIANTS[row.name] is row for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.method], ids=lambda row: row.name)
def test_a_variant_is_an_objective_of_its_own(row: Variant) -> None:
    """Its parts go together, what they read is said, and its slope is finite and not that of GRPO, unless it changes
    advantages alone, which are given here."""
    given = full_tokens(5)
    if "demonstrations" not in row.needs:
        assert given.uniform is not None
        given = given._replace(external=None, behavior_logp=given.previous_logp + 2 * (given.uniform - 0.4))
    objective = Objective(**row.parts)
    for need, fields in FACTS.items():
        assert (need in row.needs) == bool(objective.reads & fields)
    assert ("critic" in row.needs) == objective.uses_critic
    assert given.columns is not None
    extra = {name: given.mask.clone() for name in objective.columns - given.columns.keys()}
    extra |= {"weight": given.mask[:, 0].clone()} if "weight" in extra else {}  # of answers
    given = given._replace(columns={**given.columns, **extra}, value=given.mask.clone(), returns=2 * given.mask)
    slope(objective, given, 1)  # some parts compare a step with the first
    assert given.nucleus_entropy is not None
    given = given._replace(nucleus_entropy=given.nucleus_entropy * 2)
    same = torch.equal(slope(objective, given, 2), slope(Objective(), given, 2))
    if row.name != "ngrpo":  # no ratio of these tokens lies between its bounds and those of GRPO
        assert same == (row.parts.keys() <= {"advantage", "value"})


@pytest.mark.parametrize("row", [row for row in ROWS if not row.method], ids=lambda row: row.name)
def test_what_a_row_says(row: Variant) -> None:
    known = inspect.signature(RolloutModule.__init__).parameters
    assert row.options.keys() <= known.keys() | {"batch_size"}
    assert re.fullmatch(r"[a-z0-9_]+", row.name) and row.title and row.formula and row.paper and row.off_policy
    assert not row.formula.endswith(".") and row.tested in ("hand", "code")
    if "demonstrations" in row.needs:  # else it would be another method, and nobody would be told
        assert row.options["demonstrations"] == 1


def test_a_demonstration_of_unknown_probability_pays_nothing() -> None:
    given = full_tokens(5)
    unknown = given._replace(behavior_logp=given.behavior_logp.masked_fill(given.outside, torch.nan))
    objective = Objective(ratio="none", anchors=({"name": "dph", "reference": "behavior"},))
    assert bool(given.outside.any())
    assert torch.equal(slope(objective, unknown, 1), slope(Objective(ratio="none"), given, 1))
