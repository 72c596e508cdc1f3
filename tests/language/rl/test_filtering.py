"""Online filters: what is dropped, what is drawn in its place, and that runs with them stay exact."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rl import fit, make_policy, method

from offpolicy.errors import UsageError
from offpolicy.language.rl import filtering
from offpolicy.language.rl.asking import problems_in_turn
from offpolicy.language.rl.filtering import Ended, Filters, Spread, Variance, most_varied
from offpolicy.losses.answers import Answers


def answers(reward: list[float], size: int, iteration: int = 1, **columns: Any) -> Answers:
    n = len(reward)
    facts: dict[str, Any] = {
        "reward": torch.tensor(reward, dtype=torch.float64),
        "group": torch.arange(n) // size,
        "own": torch.ones(n, dtype=torch.bool),
        "length": torch.ones(n, dtype=torch.int64),
        "ended": torch.ones(n, dtype=torch.bool),
        "prompt": torch.arange(n) // size,
        "parts": {},
        "iteration": iteration,
    }
    return Answers(**{**facts, **columns})


def test_the_most_varied_subset_is_that_of_all_subsets() -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for count in range(1, 10):
        best = max(combinations(range(9), count), key=lambda rows: float(values[list(rows)].var(correction=0)))
        found = most_varied(values, count)
        assert len(found) == count
        assert float(values[found].var(correction=0)) == pytest.approx(float(values[list(best)].var(correction=0)))


def test_masks() -> None:
    """Of ended answers; of the groups by deviation 0, ½/√3…; of the share, on its way from ½ to ¼."""
    told = answers([0, 0, 1, 1, 1, 0], 2, ended=torch.tensor([1, 0, 1, 1, 1, 1]).bool())
    advantage = torch.tensor([0.0, 0.0, 3.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    assert Ended()(told, advantage).tolist() == [True, False, True, True, True, True]
    assert Spread(keep=0.5)(told, advantage).tolist() == [False] * 4 + [True] * 2
    assert Variance(keep=0.5)(told, advantage).nonzero()[:, 0].tolist() == [2, 3, 5]
    late = told._replace(iteration=11)
    assert int(Variance(keep=1.0, final=0.5, over=20)(late, advantage).sum()) == 4  # ¾ of 6, rounded down
    shown = told._replace(own=torch.tensor([1, 1, 1, 1, 1, 0]).bool())
    assert Variance(keep=0.4)(shown, advantage).nonzero()[:, 0].tolist() == [2, 3, 5]


@pytest.mark.parametrize(
    "spec, said",
    [
        ("sygnal", "Did you mean 'signal'"),
        (["ended", "ended"], "has 'ended' twice"),
        ({"name": "signal", "reward": "lenght"}, "Did you mean 'length'"),
        ({"name": "signal", "redraws": 0}, "`redraws` is 0"),
        ({"name": "variance", "keep": 0.0}, "`keep` is 0"),
        ({"name": "spread", "share": 1}, "takes no `share`"),
    ],
)
def test_bad_filters(spec: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Filters(spec, ["length"])


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filtered")
    make_policy(folder / "policy")
    return folder / "policy"


def by_prompt(prompt: str, answer: str, reference: str) -> float:
    """Worth the same within a group for problems with even numbers."""
    return len(answer) / 10 if int(reference) % 2 else 1.0


SETTINGS: dict[str, Any] = {"rewards": [f"{__name__}.by_prompt"], "filter": "signal", "batch_size": 8}


@pytest.mark.parametrize("lag", [0, 1])
def test_groups_without_signal_are_drawn_again(policy: Path, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store has its groups, all with a signal; further problems are those that come next in the stream."""
    asked: list[Any] = []
    module = method("GRPO", policy, lag=lag, **SETTINGS)
    draw = filtering.Filters.chosen

    def chosen(self: Filters, store: Any, wanted: int) -> Any:
        kept, facts = draw(self, store, wanted)
        asked.append((np.unique(store.episodes["group"], return_index=True), store.episodes["prompt"], kept, facts))
        return kept, facts

    monkeypatch.setattr(filtering.Filters, "chosen", chosen)
    fit(module, 6, held_out=False)
    assert len(asked) == 3
    used: list[int] = []
    for (names, first), prompt, kept, facts in asked:
        assert len(np.unique(kept.episodes["group"])) == 4 and (kept.episodes["prompt"] % 2 == 1).all()
        assert facts["filter/filled_up"] == 0 and facts["filter/drawn_again"] == len(names) - 4 > 0
        used += prompt[first].tolist()
    if lag == 0:
        assert used == problems_in_turn(len(module.problems.tables["problems"]), len(used), 0, 0).tolist()
    assert module.course.problems_seen == len(used) and module.generated == 4 * len(used)
    pending = module.ahead.groups
    stream = problems_in_turn(len(module.problems.tables["problems"]), len(used) + pending, 0, 0).tolist()
    late = [p for one in module.ahead.asked.values() for p in stream[one.seen : one.seen + one.groups]]
    assert sorted(used + late) == sorted(stream)


def test_what_cannot_be_drawn_again_is_filled_up(policy: Path) -> None:
    rewards = [f"{__name__}.always"]
    module = fit(method("GRPO", policy, rewards=rewards, filter={"name": "signal", "redraws": 2}), 1, held_out=False)
    assert module.course.problems_seen == 12 and len(module.course.steps) == 2  # 4 groups, and twice 4 again
    rows = module.course.rollouts.store.episodes
    assert np.unique(rows["group"] & 0xFFFF).tolist() == [0, 1, 2, 3]


def always(prompt: str, answer: str, reference: str) -> float:
    return 1.0


def test_refusals(policy: Path) -> None:
    make: Callable[..., Any] = lambda **options: method("GRPO", policy, filter="signal", **options)  # noqa: E731
    with pytest.raises(UsageError, match="never differ"):
        make(group_size=1, objective={"advantage": "batch_std"})
    with pytest.raises(UsageError, match="records hold what it kept"):
        make(engine="replay", records="x.jsonl")


def test_answers_are_left_out_of_steps_and_stay_in_the_store(policy: Path) -> None:
    """Half of the own answers by variance; the most and the least of them."""
    module = fit(method("GRPO", policy, filter=["variance"], batch_size=8), 2, held_out=False)
    store, steps = module.course.rollouts.store, module.course.steps
    kept = ~store.episodes["left_out"]
    assert store.num_episodes == 16 and kept.sum() == 8 == sum(map(len, steps))
    assert sorted(np.concatenate(steps)) == np.flatnonzero(kept).tolist()
    advantage = store.episodes["advantage"]
    assert advantage[kept].var() >= advantage.var()
    with pytest.raises(UsageError, match="come from a critic"):
        fit(method("ReMix", policy, base="ppo", filter="ended"), 1)
