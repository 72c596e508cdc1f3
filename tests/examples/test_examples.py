"""The examples of preference tuning: their rules and labels are what they say, and a small one runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import ROOT

FOLDER = ROOT / "examples" / "preference"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module(request.param)
    for name in ("gsm8k", "known_reward", "make_policy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", ["gsm8k"], indirect=True)
def test_rules_that_do_not_read_and_flipped_labels(example: Any, tmp_path: Path) -> None:
    assert round(100 * example.trivial()["the better writer"], 1) == 78.5
    plain = [json.loads(line) for line in example.flipped(tmp_path / "0", 0.0, 0).read_text().splitlines()]
    turned = [json.loads(line) for line in example.flipped(tmp_path / "1", 0.2, 0).read_text().splitlines()]
    changed = [a != b for a, b in zip(plain, turned)]
    assert abs(np.mean(changed) - 0.2) < 0.03
    swapped = [(b["rejected"], b["chosen"]) for b in turned]
    assert all((a["chosen"], a["rejected"]) == b for a, b, other in zip(plain, swapped, changed) if other)


@pytest.mark.parametrize("example", ["known_reward"], indirect=True)
def test_the_known_reward(example: Any) -> None:
    """The best policy against a sum over all answers of two words; labels against the reward."""
    value, example.LENGTH = np.array([[0.0, 1.0, -2.0]]), 2
    answers = [value[0, list(words)].sum() for words in product(range(3), repeat=2)]
    weight = np.exp(np.array(answers) / example.BETA)
    assert example.best_reward(value) == pytest.approx((weight * answers).sum() / weight.sum())

    def right(rows: list[dict[str, str]]) -> float:
        def reward(row: dict[str, str], side: str) -> float:
            words = [int(word[1:]) for word in row[side].split()]
            return example.values(0)[int(row["prompt"][1:]), words].sum()

        return float(np.mean([reward(row, "chosen") >= reward(row, "rejected") for row in rows]))

    assert right(example.pairs(0, 1000, 0.0, noise=False)) == 1.0
    assert right(example.pairs(0, 1000, 0.4, noise=False)) == pytest.approx(0.6, abs=0.04)
    assert 0.6 < right(example.pairs(0, 1000, 0.0, noise=True)) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("example", ["known_reward"], indirect=True)
def test_without_flips_the_methods_are_one(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole example on few pairs; a second call reads what lies there."""
    all_pairs, mean_reward = example.pairs, example.mean_reward
    monkeypatch.setattr(example, "pairs", lambda seed, count, rate, noise: all_pairs(seed, 128, rate, noise=noise))
    monkeypatch.setattr(example, "mean_reward", lambda method, value: mean_reward(method, value, 16))
    monkeypatch.setenv("OFFPOLICY_REF_CACHE", str(tmp_path / "references"))
    rows = example.one_seed(0, [0.0], tmp_path)
    assert [row["method"] for row in rows] == ["reference", "π*", "DPO", "CDPO", "RDPO"]
    assert rows[2]["accuracy"] == rows[3]["accuracy"] == rows[4]["accuracy"] > 0.5
    assert rows[2]["reward"] == pytest.approx(rows[3]["reward"]) == pytest.approx(rows[4]["reward"])
    assert example.one_seed(0, [0.0], tmp_path) == rows
