"""A user's own parts of an objective: refused where a cut step would change them, kept over a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses.parts import OwnParts
from offpolicy.losses.policy_gradient import COMPONENTS, Objective
from offpolicy.losses.tokens import Ratio, Tokens, Totals


def by_itself(tokens: Tokens) -> Tensor:
    return torch.where(tokens.kept, tokens.logp.detach().exp(), 1.0)


def of_the_batch(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.mask) * tokens.advantage.mean()


def leave_one_out(tokens: Tokens, *, iteration: int) -> Tensor:
    return tokens.logp - tokens.logp.detach().mean(0, keepdim=True)


def wide_ratio(tokens: Tokens) -> Ratio:
    return Ratio((tokens.logp - tokens.behavior_logp).exp() / tokens.mask.sum())


def local_mean(values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    return (values * mask).sum() / mask.sum()


def shared_mean(values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    return (values * mask).sum() / totals.tokens


class Later:
    """Its first call shows nothing; the second depends on all that the first has seen."""

    def __init__(self) -> None:
        self.mean: Any = 0.0

    def __call__(self, tokens: Tokens) -> Tensor:
        found = torch.ones_like(tokens.mask) + self.mean
        self.mean = float(tokens.advantage.mean())
        return found


class Remembers(Later):
    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


@pytest.mark.parametrize(
    "slot, part, alone",
    [
        ("weight/0", by_itself, True),
        ("weight/0", of_the_batch, False),
        ("weight/0", Later(), False),
        ("anchors/1", leave_one_out, False),
        ("ratio", wide_ratio, False),
        ("aggregation", local_mean, False),
        ("aggregation", shared_mean, True),
        ("entropy/aggregation", local_mean, False),
        ("advantage", of_the_batch, True),  # sees all answers of an iteration at once
    ],
)
def test_parts_that_depend_on_the_cut_of_a_step_are_refused(slot: str, part: Any, alone: bool) -> None:
    own = OwnParts({slot: part})
    if alone:
        own.check_split("a step is cut into 2")
        return
    with pytest.raises(UsageError, match=r"depends on which answers it sees at once, and a step is cut into 2"):
        own.check_split("a step is cut into 2")


def test_the_trial_leaves_a_part_as_it_was() -> None:
    part = Remembers()
    with pytest.raises(UsageError):
        OwnParts({"weight/0": part}).check_split("a step is cut")
    assert part.mean == 0.0


def test_parts_of_the_library_are_not_asked() -> None:
    """All but "token_mean_local", which says of itself that it depends on the cut, would pass."""
    parts = dict.fromkeys(("entropy", "value"), "none")
    assert not Objective(**parts, weight=("engine", "focal"), anchors=({"name": "k3", "coef": 0.1},)).own.parts
    made: dict[str, Any] = {
        "weight/engine": COMPONENTS["weight"]["engine"](),
        "weight/focal": COMPONENTS["weight"]["focal"](),
        "anchors/k3": COMPONENTS["anchors"]["k3"](coef=0.1),
        "ratio": COMPONENTS["ratio"]["sequence"](),
        "trust": COMPONENTS["trust"]["ppo"](),
        "aggregation": COMPONENTS["aggregation"]["dr_grpo"](),
    }
    own = OwnParts({})
    own.parts = made
    own.check_split("a step is cut")
    own.parts = {"aggregation": COMPONENTS["aggregation"]["token_mean_local"]()}
    with pytest.raises(UsageError, match="TokenMeanLocal"):
        own.check_split("a step is cut")


def test_a_part_that_remembers_keeps_its_state() -> None:
    objective = Objective(weight=({"name": f"{__name__}.Remembers"},))
    part = objective.own.parts["weight/0"]
    part.mean = 0.25
    state = objective.own.state_dict()
    other = Objective(weight=({"name": f"{__name__}.Remembers"},))
    assert other.own.load_state_dict(state) == [] and other.own.parts["weight/0"].mean == 0.25
    assert other.own.load_state_dict({}) == ["weight/0"]
    objective.own.check_memory()


def test_a_part_that_changes_without_a_state_is_refused() -> None:
    objective = Objective(weight=({"name": f"{__name__}.Later"},))
    objective.own.check_memory()
    objective.own.parts["weight/0"].mean = 0.5
    with pytest.raises(UsageError, match=r"Later.*weight/0.*`mean`.*state_dict"):
        objective.own.check_memory()
