"""Rules of replay: what stays, what is drawn how often, what new groups get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offpolicy.data.replay import Replay
from offpolicy.data.texts import replaying
from offpolicy.data.texts import rollouts as r
from offpolicy.data.texts.replaying import RULES, ByAdvantage, BySuccess, Successes


def answers(reward: list[list[float]], iteration: int, prompts: list[int] | None = None, **columns: Any) -> Replay:
    """Groups of answers with these rewards; every answer has two tokens of its own."""
    flat = np.concatenate([np.asarray(one, float) for one in reward])
    owner = np.repeat(np.arange(len(reward)), [len(one) for one in reward])
    tokens = [np.array([iteration, i % 9]) for i in range(len(flat))]
    episodes: dict[str, Any] = {
        "iteration": np.full(len(flat), iteration),
        "policy_version": np.full(len(flat), iteration),
        "group": owner + (iteration << 32),
        "prompt": np.asarray(prompts or range(len(reward)))[owner],
        "source": np.zeros(len(flat), np.uint8),
        "reward": flat,
    }
    logp = [np.array([-0.5, -0.1 * (i + 1)], np.float32) for i in range(len(flat))]
    return r.make_store(tokens, {"logp": logp}, {**episodes, **columns}, np.uint8)


def test_groups_are_drawn_in_proportion_to_their_advantages() -> None:
    """Three groups with mean |A| 3/4, 1/4 and 0: the first comes first in three of four iterations, the last never."""
    advantage = np.array([1.5, 0.0, 0.5, 0.0, 0.0, 0.0])
    store = answers([[1, 0], [1, 0], [0, 0]], 1, advantage=advantage)
    rule = ByAdvantage()
    assert rule.used(store).tolist() == [True, False, True, False, False, False]
    first = [rule.drawn(store, 3, 1, 0, k)[0] for k in range(2, 2002)]
    assert {len(one) for one in first} == {2}
    assert np.mean([one[0] == (1 << 32) for one in first]) == pytest.approx(0.75, abs=0.03)
    assert (rule.drawn(store, 1, 2, 0, 5)[1] == rule.drawn(store, 1, 2, 0, 5)[1]).all()
    assert not len(rule.drawn(None, 2, 1, 0, 2)[0])


def test_groups_by_their_success_rate() -> None:
    """Rates 0, ½, ¼ and 1 with σ = ¼: e^0 to e^−½, and of each group the likeliest right answer."""
    store = answers([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], 1)
    rule, names = BySuccess(sigma=0.25), np.unique(store.episodes["group"])
    np.testing.assert_allclose(rule.weights(store, names), [0, 1, np.exp(-0.5), 0])
    assert np.flatnonzero(rule.used(store)).tolist() == [5, 11, 12]  # the last group is never drawn


def test_a_group_without_success_gets_a_stored_one() -> None:
    old = r.merged_answers(answers([[1, 1, 0], [1, 0, 0]], 1), answers([[0, 1]], 2, prompts=[0]))
    rule = Successes(per_problem=2)
    kept = rule.stays(old, 99)
    assert kept is not None and kept.episodes["reward"].tolist() == [1, 1, 1]
    assert sorted(zip(kept.episodes["prompt"], kept.episodes["policy_version"])) == [(0, 1), (0, 2), (1, 1)]
    kept.steps["base_logp"] = np.zeros(kept.num_steps)
    new = answers([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0]], 3, prompts=[0, 1, 2, 0])
    found, number = rule.completed(new, kept)
    assert number == 2
    assert (np.diff(found.episodes["group"]) >= 0).all() and found.num_episodes == new.num_episodes
    assert found.episodes["reward"].tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1]
    assert found.episodes["policy_version"].tolist() == [3, 3, 2, 3, 3, 3, 3, 3, 3, 3, 2]  # the newest success, twice
    assert set(found.episodes["iteration"]) == {3} and "base_logp" not in found.steps
    row = 2
    assert found.steps["token"][found.start[row] :][:2].tolist() == [2, 1]
    assert rule.completed(new, None) == (new, 0)
    both, _ = Successes(inject=5).completed(new, kept)
    assert both.episodes["reward"][:3].tolist() == [0, 1, 1]  # one of its own stays


def test_places_and_names() -> None:
    assert replaying.place_among_equals(np.array([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]
    assert replaying.place_among_equals(np.array([], int)).tolist() == []
    assert list(RULES) == ["recent", "ssb", "exgrpo", "r3"]
