"""The store of answers: whole groups, versions, what steps take, batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as r
from offpolicy.errors import DataError


def problems(count: int = 6) -> Replay:
    length = np.arange(count) % 3 + 1
    table = np.stack([np.arange(count), np.full(count, -1)], 1)
    token = np.arange(int(length.sum())) + 100
    return Replay({"token": token}, start=np.cumsum(length) - length, length=length, tables={"problems": table})


def answers(version: int, groups: int = 4, size: int = 3, seed: int = 0, **columns: Any) -> Replay:
    rng = np.random.default_rng([seed, version])
    tokens = [rng.integers(0, 9, rng.integers(1, 6)) for _ in range(groups * size)]
    group = np.repeat(np.arange(groups), size) + (version << 32)
    episodes = {
        "policy_version": np.full(len(tokens), version),
        "group": group,
        "prompt": np.repeat(np.arange(groups), size),
        "source": np.zeros(len(tokens), np.uint8),
        "reward": rng.random(len(tokens)).astype(np.float32),
    }
    logp = [-rng.random(len(t)).astype(np.float32) for t in tokens]
    return r.make_store(tokens, {"logp": logp}, {**episodes, **columns}, np.uint8)


def test_old_versions_and_demonstrations_leave_by_whole_groups() -> None:
    source = np.zeros(12, np.uint8)
    source[::3] = r.DEMONSTRATION
    store = r.merged_answers(r.merged_answers(answers(1), answers(2)), answers(3, source=source))
    left = r.recent(store, 2)
    assert left is not None and left.episodes["policy_version"].tolist() == [2] * 12 + [3] * 8
    rows = np.flatnonzero((store.episodes["policy_version"] >= 2) & (store.episodes["source"] == 0))
    for new, old in enumerate(rows):
        for name in ("token", "logp"):
            ours, theirs = (s.steps[name][s.start[i] :][: s.length[i]] for s, i in ((left, new), (store, old)))
            np.testing.assert_array_equal(ours, theirs)
    assert r.recent(store, 4) is None and r.recent(None, 0) is None


def test_columns_of_an_iteration_do_not_outlive_it() -> None:
    first = answers(1)
    first.steps["previous_logp"] = np.ones(first.num_steps, np.float32)
    kept = r.select_answers(first, np.ones(12, bool))
    assert kept is not None and set(kept.steps) == {"token", "logp"}
    whole = r.merged_answers(first, answers(2))
    assert np.isnan(whole.steps["previous_logp"][first.num_steps :]).all()
    assert (whole.steps["previous_logp"][: first.num_steps] == 1).all()


def test_replayed_groups_depend_on_their_numbers_alone() -> None:
    store = r.merged_answers(answers(1), answers(2))
    some = r.drawn(store, 3, 2, seed=5, iteration=3)
    again = r.drawn(r.merged_answers(answers(2), answers(1)), 3, 2, seed=5, iteration=3)
    assert [a.tolist() for a in some] == [b.tolist() for b in again] and len(set(some[0])) == 3
    assert some[0].tolist() != some[1].tolist()  # drawn anew in every sweep
    longer = r.drawn(store, 5, 2, seed=5, iteration=3)
    assert longer[0][:3].tolist() == some[0].tolist()
    assert len(r.drawn(store, 99, 1, 0, 1)[0]) == 8 and len(r.drawn(None, 3, 1, 0, 1)[0]) == 0
    counts = np.zeros(8)
    for iteration in range(400):
        chosen = r.drawn(store, 2, 1, seed=0, iteration=iteration)[0]
        counts[np.searchsorted(np.unique(store.episodes["group"]), chosen)] += 1
    assert abs(counts - 100).max() < 45  # uniform: a standard deviation is 8.7


def test_steps_take_every_chosen_group_once_per_sweep_and_whole() -> None:
    store = r.merged_answers(answers(1), answers(2))
    old = r.drawn(r.select_answers(store, store.episodes["policy_version"] < 2), 2, 3, seed=1, iteration=2)
    steps = r.steps_of(store, old, minibatches=2, seed=1, iteration=2)
    assert len(steps) == 6
    for sweep in range(3):
        rows = np.concatenate(steps[2 * sweep : 2 * sweep + 2])
        taken = store.episodes["group"][rows]
        fresh = np.unique(store.episodes["group"][store.episodes["policy_version"] == 2])
        assert len(rows) == 18 == len(np.unique(rows)) and set(taken) == set(fresh) | set(old[sweep])
        for part in steps[2 * sweep : 2 * sweep + 2]:
            groups = store.episodes["group"][part]
            assert (np.unique(groups, return_counts=True)[1] == 3).all()
            assert (np.flatnonzero(np.diff(groups)) % 3 == 2).all()  # side by side


def test_repeated_answers_of_replayed_groups_may_be_left_out() -> None:
    old = answers(1, groups=1, size=4)
    token = old.steps["token"]
    store = r.make_store([token[:2], token[:3], token[:2], token[:2]], {"logp": [np.zeros(n) for n in (2, 3, 2, 2)]},
                         {k: v for k, v in old.episodes.items() if k != "digest"}, np.uint8)  # fmt: skip
    store = r.merged_answers(store, answers(2, groups=1, size=4))
    chosen = [np.array([1 << 32])]
    all_rows = r.steps_of(store, chosen, minibatches=1, seed=0, iteration=2)[0]
    fewer = r.steps_of(store, chosen, minibatches=1, seed=0, iteration=2, drop_duplicates=True)[0]
    assert sorted(all_rows) == list(range(8)) and sorted(fewer) == [0, 1, 4, 5, 6, 7]
    assert r.duplicates(store, np.arange(4)) == 0.5


@pytest.mark.parametrize("longest", [0, 8, 1000])
def test_batches_hold_what_the_store_holds(longest: int) -> None:
    known, store = problems(), r.merged_answers(answers(1), answers(2))
    rows = np.random.default_rng(0).permutation(24)[:17]
    batch = r.BoundRollouts(known, store).gather(rows, longest)
    assert sorted(batch.row.tolist()) == sorted(rows.tolist())
    parts = batch.answer.token.split(batch.answer.length.tolist())
    logps = batch.steps["logp"].split(batch.answer.length.tolist())
    prompts = batch.prompt.token.split(batch.prompt.length.tolist())
    for i, row in enumerate(batch.row.tolist()):
        span = slice(store.start[row], store.start[row] + store.length[row])
        assert parts[i].tolist() == store.steps["token"][span].tolist()
        assert logps[i].tolist() == store.steps["logp"][span].tolist()
        asked = known.tables["problems"][store.episodes["prompt"][row], 0]
        assert prompts[i].tolist() == known.steps["token"][known.start[asked] :][: known.length[asked]].tolist()
    assert (batch.turn.diff() >= 0).all()
    for lane in range(int(batch.lane.max()) + 1):
        mine = batch.lane == lane
        assert len(set(batch.facts["group"][mine].tolist())) == 1
        assert sorted(batch.turn[mine].tolist()) == list(range(int(mine.sum())))
        width = int(batch.prompt.length[mine][0] + batch.answer.length[mine].sum())
        assert width <= longest or int(mine.sum()) == 1
    assert (int(batch.lane.max()) + 1 == 17) == (longest == 0)


def test_an_answer_needs_a_token() -> None:
    with pytest.raises(DataError, match="an answer without a token"):
        r.make_store([np.empty(0, np.int64)], {}, {"prompt": [0]}, np.uint8)
    assert torch.equal(torch.tensor(r.spans(answers(1), np.array([1, 0]))),
                       torch.cat([torch.arange(*b) for b in zip(*_bounds(answers(1), [1, 0]))]))  # fmt: skip


def _bounds(store: Replay, rows: list[int]) -> tuple[list[int], list[int]]:
    first = [int(store.start[i]) for i in rows]
    return first, [a + int(store.length[i]) for a, i in zip(first, rows)]


def test_answers_belong_to_the_iteration_that_asked_for_them() -> None:
    """Drawn by π_1 and asked for by iteration 2: kept, taken and forgotten as those of iteration 2."""
    store = r.merged_answers(answers(1, iteration=np.full(12, 1)), answers(2, iteration=np.full(12, 2)))
    store.episodes["policy_version"][:] = 1
    left = r.recent(store, 2)
    assert left is not None and (left.episodes["iteration"] == 2).all() and left.num_episodes == 12
    (step,) = r.steps_of(store, [np.empty(0, np.int64)], minibatches=1, seed=0, iteration=2)
    assert sorted(step) == list(range(12, 24))


def test_stores_of_version_0_1_are_told_what_they_lack() -> None:
    old = r.merged_answers(answers(1), answers(2))
    old.version, old.episodes["source"][3] = 2, r.DEMONSTRATION
    told = r.told_columns(old)
    assert told.version == 2 and (told.episodes["iteration"] == old.episodes["policy_version"]).all()
    assert r.external_tokens(told).sum() == told.length[3] == told.episodes["given"].sum()
    assert r.told_columns(told) is told and (r.iteration_of(old) == r.iteration_of(told)).all()
