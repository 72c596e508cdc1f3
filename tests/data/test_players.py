"""Environments side by side: whose steps are whose, what a round counts, and episodes that go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from counting import ENV, Counting

from offpolicy.data.players import Players
from offpolicy.data.ring import Ring


def players(count: int, kind: str) -> Players:
    return Players({"env_id": ENV}, count, keep=kind == "keep", whole=kind == "whole")


def steps_of(asked: list[Any]) -> Callable[[np.ndarray, range], np.ndarray]:
    def choose(obs: np.ndarray, steps: range) -> np.ndarray:
        asked.append((obs.copy(), steps))
        return np.array([[0.01 * n] for n in steps], np.float32)

    return choose


@pytest.mark.parametrize("kind", ["cut", "keep", "whole"])
def test_every_step_of_three_environments_is_right(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Two rounds of 20: six times all three and then the first two, each time."""
    monkeypatch.setattr(Counting, "starts", {})
    many, asked = players(3, kind), []
    rounds = [many.play(steps_of(asked), until) for until in (20, 40)]
    assert [len(steps) for _, steps in asked[:7]] == ([3] * 7 if kind == "whole" else [3] * 6 + [2])
    numbers = [n for _, steps in asked for n in steps]
    assert numbers == list(range(many.steps)) and (many.steps == 40 or kind == "whole")
    assert sum(part.num_steps for part in rounds) == many.steps
    for part in rounds:
        obs, following = part.steps["obs"], part.next_obs(part.rows).numpy()
        assert (following[:, 0] == obs[:, 0]).all() and (following[:, 1] == obs[:, 1] + 1).all()
        assert (part.steps["terminated"] == (following[:, 1] == 3 + 2 * (obs[:, 0] % 3))).all()
        assert (part.episodes["episode"] == obs[part.start, 0]).all()  # numbered as they begin
        at = {tuple(o): n for seen, steps in asked for o, n in zip(seen.tolist(), steps)}  # what was asked of whom
        assert part.steps["action"][:, 0] == pytest.approx([0.01 * at[tuple(o)] for o in obs.tolist()])
    facts = rounds[-1].meta["online"]
    assert (facts["steps"], facts["begun"]) == (many.steps, len(Counting.starts))
    opened = [number for number in facts["open"] if number is not None]
    assert facts["begun"] - facts["episodes"] == len(opened) and (kind == "keep" or not opened)


def test_three_environments_go_on_where_they_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 23 steps episodes run in all of them; brought back by their actions they go on as if nothing had been."""
    monkeypatch.setattr(Counting, "starts", {})
    whole, again = players(3, "keep"), players(3, "keep")
    first = whole.play(steps_of([]), 23)
    ring = Ring(first, 100)
    facts = first.meta["online"]
    assert len([number for number in facts["open"] if number is not None]) == 3
    again.count_from(facts)
    assert again.revive(facts, ring)
    second = [one.play(steps_of([]), 36) for one in (whole, again)]
    assert second[0].fingerprint() == second[1].fingerprint() and second[0].meta == second[1].meta
    assert second[0].meta["online"]["return_mean"] is not None

    monkeypatch.setattr(Counting, "starts", {})  # what does not repeat itself is cut, and another begins
    other = players(3, "keep")
    other.count_from(facts)
    assert not other.revive(facts, ring)
    assert other.play(steps_of([]), 33).num_steps == 10 and other.begun > facts["begun"]
