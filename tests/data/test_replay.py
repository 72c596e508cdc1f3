"""The store: index, successors, filters, files, and the ring that grows."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offpolicy.data import replay as replay_module
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.errors import DataError, UsageError

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=8)


def told(lengths: list[int], *, gap: int = 0, first: int = 0, successor: str = "tail", **extra: Any) -> Replay:
    """A replay whose observations tell where they come from: (episode, time step).

    Args:
        gap: rows between episodes that belong to none.
        first: number of the first episode.
        successor: "tail", "next_obs" or "none".
    """
    starts, obs, after, end = [], [], [], []
    for episode, length in enumerate(lengths, first):
        starts.append(len(obs))
        states = [(episode, t) for t in range(length + 1)]
        obs += states[:-1] + [(-1, -1)] * gap
        after += states[1:] + [(-2, -2)] * gap
        end.append(states[-1])
    n = len(obs)
    steps: dict[str, Any] = {
        "obs": np.array(obs, dtype=np.float32),
        "action": np.arange(n, dtype=np.float32)[:, None],
        "reward": np.arange(n, dtype=np.float32),
        "terminated": np.zeros(n, dtype=bool),
    }
    if successor == "next_obs":
        steps["next_obs"] = np.array(after, dtype=np.float32)
    tail = {"obs": np.array(end, dtype=np.float32)} if successor == "tail" else None
    return Replay(steps | extra, start=np.array(starts), length=np.array(lengths), tail=tail)


# -- index -----------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(0, 2))
def test_rows_episodes_and_times(lengths: list[int], gap: int) -> None:
    replay = told(lengths, gap=gap)
    expected = [(e, t) for e, length in enumerate(lengths) for t in range(length)]
    assert list(zip(replay.episode_of.tolist(), replay.t.tolist())) == expected
    assert replay.steps["obs"][replay.rows].tolist() == [[e, t] for e, t in expected]
    assert replay.num_steps == len(expected) and replay.num_episodes == len(lengths)
    assert replay.episode_at(replay.rows).tolist() == [e for e, _ in expected]
    assert replay.is_whole == (gap == 0)


def test_index_from_flags() -> None:
    """Ends at rows 1 and 2; rows 3 and 4 are an unfinished episode, which is kept."""
    flags = np.array([False, True, True, False, False])
    replay = Replay({"obs": np.zeros((5, 1))}, episode_end=flags)
    assert replay.start.tolist() == [0, 2, 3] and replay.length.tolist() == [2, 1, 2]
    assert Replay({"obs": np.zeros((5, 1))}, episode_end=flags[::-1]).length.tolist() == [3, 1, 1]
    assert Replay({"obs": np.zeros((5, 1))}, episode_end=np.zeros(5, bool)).length.tolist() == [5]
    assert Replay({"obs": np.zeros((5, 1))}).length.tolist() == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": np.array([0, 2]), "length": np.array([3, 1])}, "overlap or leave the 4 rows"),
        ({"start": np.array([0, 2]), "length": np.array([2, 3])}, "overlap or leave the 4 rows"),
        ({"start": np.array([-1]), "length": np.array([2])}, "overlap or leave the 4 rows"),
        ({"start": np.array([0, 2]), "length": np.array([2, 0])}, "an episode without steps"),
        ({"start": np.array([0, 2]), "length": np.array([2])}, r"expected two \(E,\)"),
        ({"tail": {"obs": np.zeros((2, 1))}}, r"'obs' has 2 rows; expected one per episode \(1\)"),
        ({"episodes": {"goal": np.zeros(3)}}, r"'goal' has 3 rows; expected one per episode \(1\)"),
    ],
)
def test_impossible_indices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Replay({"obs": np.zeros((4, 1))}, **options)


@pytest.mark.parametrize("steps", [{}, {"obs": np.zeros((4, 1)), "reward": np.zeros(3)}])
def test_unequal_columns(steps: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError, match="expected one common length"):
        Replay(steps)


def test_no_rows() -> None:
    with pytest.raises(DataError, match="an episode without steps"):
        Replay({"obs": np.zeros((0, 1))})


# -- successors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("successor", ["tail", "next_obs"])
@given(lengths=LENGTHS, gap=st.integers(0, 2), order=st.randoms(use_true_random=False))
def test_next_obs_never_crosses_an_episode(successor: str, lengths: list[int], gap: int, order: Any) -> None:
    replay = told(lengths, gap=gap, successor=successor)
    shuffled = list(range(len(lengths)))
    order.shuffle(shuffled)
    for chosen in (replay, replay.filter(shuffled), replay.filter(shuffled[:1])):
        rows = chosen.usable_rows()
        assert sorted(rows) == sorted(chosen.rows)
        expected = chosen.steps["obs"][rows] + [0, 1]
        np.testing.assert_array_equal(chosen.next_obs(rows).numpy(), expected)
        np.testing.assert_array_equal(chosen.next_obs(torch.from_numpy(rows)[None]).numpy(), expected[None])


@given(lengths=LENGTHS)
def test_rows_without_a_successor_are_not_usable(lengths: list[int]) -> None:
    end = np.cumsum(lengths) - 1
    without = told(lengths, successor="none")
    assert set(without.usable_rows()) == set(without.rows) - set(end)
    assert without.all_usable is False and without.unusable.tolist() == end.tolist()

    terminated = np.zeros(sum(lengths), dtype=bool)
    terminated[end[0]] = True  # nothing to bootstrap from, so its successor is not needed
    assert set(told(lengths, successor="none", terminated=terminated).usable_rows()) == set(without.rows) - set(end[1:])

    valid = np.ones(sum(lengths), dtype=bool)
    valid[0] = False
    assert set(told(lengths, valid_td=valid).usable_rows()) == set(without.rows) - {0}

    some = told(lengths)
    some.tail["valid"] = np.arange(len(lengths)) > 0
    assert set(some.usable_rows()) == set(some.rows) - {end[0]}
    assert some.next_obs(end[:1]).tolist() == [[0, lengths[0] - 1]]  # its own, never a neighbour's


def test_all_rows_usable() -> None:
    assert told([2, 3]).all_usable and not told([2, 3], gap=1).all_usable
    assert not told([2, 3]).filter([1, 0]).all_usable and not told([2, 3]).filter([1]).all_usable


# -- other indices over the same columns -----------------------------------------------------------------------------


@given(LENGTHS, st.integers(0, 1))
def test_returns_equal_a_loop(lengths: list[int], gap: int) -> None:
    replay = told(lengths, gap=gap)
    loop = [replay.steps["reward"][s : s + n].sum(dtype=np.float64) for s, n in zip(replay.start, lengths)]
    np.testing.assert_allclose(replay.returns(), loop)
    backwards = replay.filter(np.arange(len(lengths))[::-1])
    np.testing.assert_allclose(backwards.returns(), loop[::-1])


def test_filter() -> None:
    replay = told([2, 1, 3])
    kept = replay.filter([2, 0])
    assert kept.rows.tolist() == [3, 4, 5, 0, 1] and kept.t.tolist() == [0, 1, 2, 0, 1]
    assert kept.tail["obs"].tolist() == [[2, 3], [0, 2]] and kept.steps["obs"] is replay.steps["obs"]
    assert replay.filter(np.array([True, False, True])).rows.tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(DataError, match="the filter keeps no episode"):
        replay.filter(np.zeros(3, dtype=bool))


def test_top_keeps_the_best_tenth() -> None:
    """Ten episodes of two steps, returns 1, 5, 9, …, 37: the last is the best."""
    replay = told([2] * 10)
    assert replay.top(0.1).start.tolist() == [18]
    assert replay.top(0.29).start.tolist() == [16, 18] and replay.top(0.01).num_episodes == 1
    assert replay.top(1.0).num_episodes == 10


def test_top_by_discounted_return() -> None:
    """(0, 3) beats (2, 0) by the plain sum; with γ = 0.5 it is 1.5 against 2."""
    reward = np.array([0.0, 3.0, 2.0, 0.0], dtype=np.float32)
    replay = told([2, 2], reward=reward)
    assert replay.top(0.5).start.tolist() == [0] and replay.top(0.5, discount=0.5).start.tolist() == [2]


def test_top_breaks_ties_to_the_earlier_episode() -> None:
    replay = told([1, 1, 1], reward=np.array([1.0, 2.0, 2.0], dtype=np.float32))
    assert replay.top(0.34).start.tolist() == [1]


@pytest.mark.parametrize("fraction", [0.0, 1.5, -0.1])
def test_impossible_shares(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"expected a value in \(0, 1\]"):
        told([1, 1]).top(fraction)


def test_split_is_by_episode_and_repeatable() -> None:
    replay = told([3] * 20)
    train, held_out = replay.split(0.25)
    assert train.num_episodes == 15 and held_out.num_episodes == 5
    assert not set(train.rows) & set(held_out.rows) and len(set(train.rows) | set(held_out.rows)) == 60
    assert replay.split(0.25)[1].start.tolist() == held_out.start.tolist() != replay.split(0.25, 1)[1].start.tolist()
    with pytest.raises(DataError, match="leaves one side empty"):
        told([3]).split(0.5)


# -- identity and disk -----------------------------------------------------------------------------------------------


def test_fingerprint_sees_content_index_and_names() -> None:
    base = told([2, 3])
    others = [
        told([3, 2]),
        told([2, 3], successor="next_obs"),
        told([2, 3], reward=np.arange(1.0, 6.0, dtype=np.float32)),
        told([2, 3], reward=np.arange(5.0)),
        told([2, 3], extra=np.zeros(5)),
        base.filter([0]),
    ]
    assert base.fingerprint() == told([2, 3]).fingerprint() == base.to("cpu").fingerprint()
    assert len({replay.fingerprint() for replay in [base, *others]}) == 7


@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(tmp_path: Path, mmap: bool) -> None:
    replay = told([2, 3], gap=1, **{"obs/goal": np.ones((7, 2), np.float16), "pixels": np.ones((7, 2, 2), np.uint8)})
    replay.episodes["seed"] = np.array([5, 6])
    replay.tail["valid"] = np.array([True, False])
    replay.meta["action_low"] = [-1.0]
    loaded = Replay.load(replay.save(tmp_path / "new" / "data"), mmap=mmap)
    for kind in ("steps", "tail", "episodes"):
        ours, theirs = getattr(replay, kind), getattr(loaded, kind)
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert loaded.meta == replay.meta and loaded.is_mapped == mmap
    assert loaded.fingerprint() == replay.fingerprint()
    del loaded.__dict__["_fingerprint"]
    assert loaded.fingerprint() == replay.fingerprint()  # computed from the files
    assert torch.equal(loaded.next_obs(loaded.rows), replay.next_obs(replay.rows))
    assert os.listdir(tmp_path / "new") == ["data"]


def test_save_does_not_replace_unasked(tmp_path: Path) -> None:
    told([2]).save(tmp_path / "data")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        told([3]).save(tmp_path / "data")
    assert Replay.load(tmp_path / "data").num_steps == 2
    assert Replay.load(told([3]).save(tmp_path / "data", overwrite=True)).num_steps == 3
    assert os.listdir(tmp_path) == ["data"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told([2]).save(tmp_path / "data")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replay_module.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        told([3]).save(tmp_path / "data", overwrite=True)
    assert os.listdir(tmp_path) == ["data"] and Replay.load(tmp_path / "data").num_steps == 2


def test_folders_that_are_no_replay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no meta\.json"):
        Replay.load(tmp_path)
    folder = told([2]).save(tmp_path / "data")
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(DataError, match="has format 99; this version reads 1"):
        Replay.load(folder)
    (folder / "meta.json").write_text(json.dumps(record))
    column = folder / "steps" / record["columns"]["reward"]
    column.write_bytes(column.read_bytes()[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        Replay.load(folder)


@pytest.mark.parametrize("kind", ["numpy", "tensor", "map"])
def test_take_from_every_backing(kind: str, tmp_path: Path) -> None:
    replay = told([2, 3])
    if kind == "tensor":
        replay = replay.to("cpu")
    elif kind == "map":
        replay = Replay.load(replay.save(tmp_path / "data"))
    index = torch.tensor([[4, 0], [1, 1]])
    for indices in (index, index.numpy()):
        taken = replay.take(indices, ("obs", "reward"))
        assert list(taken) == ["obs", "reward"] and taken["obs"].shape == (2, 2, 2)
        assert taken["reward"].tolist() == [[4, 0], [1, 1]]
    assert set(replay.take(index)) == set(replay.steps)
    assert replay.next_obs(index)[0].tolist() == [[1, 3], [0, 1]]


# -- the ring --------------------------------------------------------------------------------------------------------


def contents(replay: Replay) -> list[list[list[float]]]:
    """The observations of every episode, and its last one, in the order of the index."""
    rows = [np.arange(s, s + n) for s, n in zip(replay.start, replay.length)]
    return [[*replay.steps["obs"][r].tolist(), replay.tail["obs"][e].tolist()] for e, r in enumerate(rows)]


def episode(number: int, length: int) -> list[list[float]]:
    return [[number, t] for t in range(length + 1)]


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 10), st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), max_size=8))
def test_ring_holds_the_newest_whole_episodes(lengths: list[int], room: int, appended: list[list[int]]) -> None:
    ring = Ring(told(lengths), sum(lengths) + room)
    everything = [episode(i, n) for i, n in enumerate(lengths)]
    for version, group in enumerate(appended, 1):
        new = told(group, first=len(everything))
        if max(group) > ring.capacity:
            before = contents(ring)
            with pytest.raises(DataError, match=r"expected at most \d+ \(the ring\)"):
                ring.append(new)
            assert contents(ring) == before
            return
        ring.append(new)
        everything += [episode(len(everything) + i, n) for i, n in enumerate(group)]
        held = contents(ring)
        assert held == everything[len(everything) - len(held) :]  # a suffix: the oldest left, whole
        assert ring.version == version
        spans = sorted(zip(ring.start, ring.end))
        assert spans[0][0] >= 0 and spans[-1][1] < ring.capacity  # no window can span the write head:
        assert all(a[1] < b[0] for a, b in pairwise(spans))  # episodes are disjoint and each in one piece
        np.testing.assert_array_equal(ring.next_obs(ring.rows), ring.steps["obs"][ring.rows] + [0, 1])
        longest = max(len(e) - 1 for e in everything)
        assert ring.num_steps > ring.capacity - 2 * longest or len(held) == len(everything)


@pytest.mark.parametrize(("length", "held"), [(2, [0, 1, 2]), (3, [0, 1, 2]), (4, [1, 2])])
def test_ring_at_exactly_full_and_one_step_around(length: int, held: list[int]) -> None:
    """Capacity 10 with episodes of 4 and 3 steps: three rows are free, a fourth needs the oldest episode's place."""
    ring = Ring(told([4, 3]), 10)
    ring.append(told([length], first=2))
    assert contents(ring) == [episode(i, [4, 3, length][i]) for i in held]
    assert ring.head == (4 if length == 4 else 7 + length)
    ring.append(told([1], first=3))  # after an exactly full ring the next one starts at row 0
    assert ring.steps["obs"][0 if length == 3 else ring.head - 1].tolist() == [3, 0]


def test_ring_of_one_episode_as_long_as_itself() -> None:
    ring = Ring(told([2, 1]), 5)
    for number in (2, 3):
        ring.append(told([5], first=number))
        assert contents(ring) == [episode(number, 5)]


def test_ring_grows_without_touching_its_source() -> None:
    source = told([2, 1])
    ring = Ring(source.filter([1]), 4)
    assert contents(ring) == [episode(1, 1)] and ring.start.tolist() == [0]
    before = ring.fingerprint()
    ring.append(told([3], first=2))
    assert contents(source) == [episode(0, 2), episode(1, 1)] and ring.fingerprint() != before


def test_ring_reopened_goes_on_the_same(tmp_path: Path) -> None:
    ring = Ring(told([4, 3]), 10)
    ring.append(told([2, 5], first=2))
    again = Ring.reopen(Replay.load(ring.save(tmp_path / "ring")), ring.head)
    for each in (ring, again):
        each.append(told([2, 2], first=4))
    assert contents(ring) == contents(again) and ring.fingerprint() == again.fingerprint()
    assert again.capacity == 10 and again.head == ring.head


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (told([2], successor="next_obs"), "the new episodes have columns"),
        (told([2], extra=np.zeros(2)), "the new episodes have columns"),
        (told([2], obs=np.zeros((2, 5), np.float32)), "the new steps have shapes"),
    ],
)
def test_ring_refuses_other_columns_and_stays_as_it_was(new: Replay, message: str) -> None:
    ring = Ring(told([2]), 5)
    with pytest.raises(DataError, match=message):
        ring.append(new)
    assert contents(ring) == [episode(0, 2)] and ring.version == 0


def test_ring_smaller_than_its_start() -> None:
    with pytest.raises(UsageError, match="expected at least the 3 rows"):
        Ring(told([2, 1]), 2)
