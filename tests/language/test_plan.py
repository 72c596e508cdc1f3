"""Which rows a step takes: every row once per epoch, however steps are cut, and nothing but (seed, step) decides."""

import numpy as np
import pytest

from offpolicy.language.plan import RowPlan, previous_of_other_prompt


def plan(rows: int = 23, **options: int) -> RowPlan:
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    return RowPlan(lengths, **{"batch_size": 5, "slots": 1, "seed": 3} | options)


def test_every_row_comes_once_per_epoch() -> None:
    p = plan()
    assert p.steps_per_epoch == 5
    for epoch in range(3):
        steps = [p.rows(epoch * 5 + k) for k in range(5)]
        assert [len(s) for s in steps] == [5, 5, 5, 5, 3]
        assert sorted(np.concatenate(steps)) == list(range(23))
    assert not np.array_equal(p.order(0), p.order(1))


def test_nothing_but_seed_and_step_decides() -> None:
    first, second = plan(), plan()
    later = [first.rows(t) for t in (7, 2, 11)]
    assert all(np.array_equal(a, second.rows(t)) for a, t in zip(reversed(later), (11, 2, 7)))
    assert not np.array_equal(plan(seed=4).order(0), first.order(0))


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_slots_share_the_rows_of_a_step(slots: int) -> None:
    whole, cut = plan(), plan(slots=slots)
    for t in range(11):
        parts = [cut.slot(t, i) for i in range(slots)]
        assert np.array_equal(np.concatenate(parts), whole.rows(t))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= -(-5 // slots)
        lengths = cut.lengths[np.concatenate(parts)]
        assert (np.diff(lengths) <= 0).all()  # similar lengths together, the longest first


def test_order_by_length_keeps_the_rows_of_a_step() -> None:
    assert sorted(plan().rows(2)) == sorted(plan(by_length=False).rows(2))


def test_the_row_before() -> None:
    p = plan()
    order, before = p.order(1), p.before(1, np.arange(23))
    assert all(before[order[i]] == order[i - 1] for i in range(23))


@pytest.mark.parametrize("prompts", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0]])
def test_the_row_before_has_another_prompt(prompts: list[int]) -> None:
    own = np.array(prompts)
    for order in (np.arange(6), np.array([3, 0, 5, 1, 4, 2]), np.array([2, 1, 0, 5, 4, 3])):
        before = previous_of_other_prompt(order, own)
        place = np.argsort(order)
        for row in range(6):  # the slow way: step back until the prompt is another
            back = next(order[place[row] - k] for k in range(1, 7) if own[order[place[row] - k]] != own[row])
            assert before[row] == back


def test_rows_of_a_short_run() -> None:
    p = plan()
    assert np.array_equal(p.rows_until(2), np.sort(np.concatenate([p.rows(0), p.rows(1)])))
    assert np.array_equal(p.rows_until(9), np.arange(23))
