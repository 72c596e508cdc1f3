"""Rewards that compare the answers of a group, and the reward of built answers: known answers by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from offpolicy.errors import UsageError
from offpolicy.language.rl.group_rewards import Structure, majority, voted
from offpolicy.language.rl.rewards import Rewards

TEXTS = ["so #### 4", "the sum is 4.0\n#### 4.0", "#### 5", "no mark", "#### 4"]


def scores(reward: Any, texts: list[str] = TEXTS, groups: list[int] | None = None, **facts: Any) -> list[float]:
    made = Rewards([reward])
    prompts = [f"p{group}" for group in groups or [0] * len(texts)]
    return made(prompts, texts, [None] * len(texts), groups=groups, **facts).scores.tolist()


def test_votes() -> None:
    assert [voted("", text, True) for text in (*TEXTS[:3], "yes", " ")] == ["4", "4", "5", "yes", None]
    assert voted("", "#### 4", False) is None
    assert voted("", "then 3, so 7.", True, "last_number") == "7"
    assert majority(["a", "b", "b", "a", None]) == "a" and majority(["a", "b", "b"], 0.7) is None


def test_majority() -> None:
    """Three of five say 4; of two answers that were drawn apart each is a majority; a cut answer says nothing."""
    assert scores("majority") == [1, 1, 0, 0, 1]
    assert scores("majority", ["1", "2"], [0, 1]) == [1, 1] and scores("majority", ["1", "2"], [0, 0]) == [1, 0]
    assert scores("majority", ended=[False, False, True, True, False]) == [0, 0, 1, 0, 0]
    assert scores({"name": "majority", "least": 0.7}) == [0] * 5


def test_agreement_in_a_band_of_entropy() -> None:
    """Shares .6, .2, .2 with the entropy −.6 ln .6 − .4 ln .2."""
    assert scores("agreement") == pytest.approx([0.6, 0.6, 0.2, 0.2, 0.6])
    entropy = -0.6 * math.log(0.6) - 0.4 * math.log(0.2)
    inside, outside = ({"name": "agreement", "low": 0.1, "high": entropy + e} for e in (1e-9, -1e-9))
    assert any(scores(inside)) and not any(scores(outside))


def test_majority_and_novelty() -> None:
    """On the majority's side "a b" twice and "c d": 1 − similarity to the others is least for the first two."""
    texts = ["a b #### 1", "a b #### 1", "c d #### 1", "x #### 2", ""]
    found = scores("majority_novelty", texts)
    # pairs (a b), (b ####), (#### 1): the third shares (#### 1) of five with the others
    assert found[:3] == [0.5, 0.5, 1.0]
    assert found[3] == -0.5 and found[4] == -1.0  # alone on its side; and without a vote


def test_structure() -> None:
    right = json.dumps({"a": 1, "b": 2})
    reward = Structure()
    assert reward("", '{"a": 1, "b": 2}', right) == pytest.approx(1.0)
    assert reward("", '{"a": 1, "c": 2}', right) == pytest.approx(0.1 + 0.3 + 0.2 / 2 + 0.4 / 2)
    assert reward("", '{"a": 1,', right) == 0.0 and reward("", "{a}", right) == pytest.approx(0.1)
    assert Structure(keys=("k",))("", '{"k": 0}', None) == pytest.approx(1.0)  # three terms apply
    with pytest.raises(UsageError, match="weights"):
        Structure(weights={"style": 1.0})


def of_groups(completions: list[str], groups: list[int]) -> list[float]:
    return [float(groups.count(group)) for group in groups]


def test_own_functions_see_groups() -> None:
    assert scores(f"{__name__}.of_groups", ["a", "b", "c"], [7, 7, 9]) == [2, 2, 1]
    assert Rewards([f"{__name__}.of_groups"])(["p", "q", "p"], ["a"] * 3, [None] * 3).scores.tolist() == [2, 1, 2]
