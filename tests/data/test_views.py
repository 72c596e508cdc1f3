"""Views against naive loops: every path gives the same batch, and none crosses an episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy import toy_replay

from offpolicy.data import sampling
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.views import (
    ColumnTransitions,
    PackedTransitions,
    Transitions,
    TransitionView,
    WindowView,
    return_to_go,
)
from offpolicy.errors import DataError, UsageError

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
CPU = torch.device("cpu")


def normalizer(replay: Replay, reward_transform: str = "2r-1") -> Normalizer:
    made = Normalizer(replay.steps["obs"].shape[1:], 1)
    made.fit(replay, None, normalize_obs=True, reward_transform=reward_transform, eps=1e-3)
    return made


def every_item(bound: Any) -> Any:
    return bound.gather(torch.arange(len(bound)))


def words(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return sampling.bits(sampling.keys(seed, "index", torch.arange(1, k + 1)), torch.arange(n))


def naive_transition(replay: Replay, view: TransitionView, row: int, affine: Normalizer) -> dict[str, np.ndarray]:
    """One transition, step by step, in float64."""
    end = int(replay.episode_end(np.array([row]))[0])
    unusable = set(replay.unusable.tolist())
    total, weight, last = 0.0, 1.0, row
    for at in range(row, row + view.n_step):
        if at > end or at in unusable:
            break
        total += weight * (2.0 * float(replay.steps["reward"][at]) - 1.0)
        weight *= view.discount
        last = at
    center, scale = affine.obs_center.double().numpy(), affine.obs_scale.double().numpy()
    following = replay.tail["obs"][int(replay.episode_at(np.array([row]))[0])] if last == end else None
    successor = replay.steps["obs"][last + 1] if following is None else following
    return {
        "obs": (replay.steps["obs"][row] - center) * scale,
        "action": replay.steps["action"][row] / 2.0,
        "reward": np.array(total),
        "next_obs": (successor - center) * scale,
        "terminated": replay.steps["terminated"][last],
        "next_action": replay.steps["action"][min(last + 1, end)] / 2.0,
        "discount": np.array(weight),
        "row": np.array(row),
    }


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    n_step=st.integers(1, 5),
    seed=st.integers(0, 5),
    holes=st.booleans(),
    keep=st.booleans(),
)
def test_packed_equals_columns_equals_a_loop(
    lengths: list[int], n_step: int, seed: int, holes: bool, keep: bool
) -> None:
    replay = toy_replay(lengths, seed=seed)
    if holes:
        replay.steps["valid_td"] = np.random.default_rng(seed).random(sum(lengths)) < 0.8
    if keep and len(lengths) > 1:
        replay = replay.filter(np.arange(len(lengths))[:0:-1])
    view = TransitionView(n_step=n_step, discount=0.9, next_action=True)
    if not len(replay.usable_rows()):
        with pytest.raises(DataError, match="no row can be drawn"):
            view.bind(replay, normalizer(replay), CPU)
        return
    affine = normalizer(replay)
    packed, columns = PackedTransitions(view, replay, affine, CPU), ColumnTransitions(view, replay, affine, CPU)
    fast, slow = every_item(packed), every_item(columns)
    for name, value in fast._asdict().items():
        other = getattr(slow, name)
        assert (value is None) == (other is None)
        assert value is None or (value.dtype == other.dtype and torch.equal(value, other)), name
    rows = replay.usable_rows()
    assert fast.row.tolist() == rows.tolist()
    for item, row in enumerate(rows.tolist()):
        for name, value in naive_transition(replay, view, row, affine).items():
            if name != "discount" or n_step > 1:
                found = getattr(fast, name)[item].double().numpy()
                np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_n_step_known_answer() -> None:
    """γ = 0.5, n = 3, rewards 1, 2, 4 | 8 with 10r − 1, i.e. 9, 19, 39 | 79.

    From row 0: 9 + 9.5 + 9.75 = 28.25 and γ³; from row 1: 19 + 19.5 = 38.5 and γ²; the next episode's 8 is never used.
    """
    steps = {
        "obs": np.arange(4, dtype=np.float32)[:, None],
        "action": np.zeros((4, 1), np.float32),
        "reward": np.array([1, 2, 4, 8], np.float32),
        "terminated": np.array([False, False, True, False]),
    }
    replay = Replay(steps, start=np.array([0, 3]), length=np.array([3, 1]), tail={"obs": np.array([[7.0], [9.0]])})
    affine = Normalizer((1,), 1)
    affine.fit(replay, None, normalize_obs=False, reward_transform="10r-1", eps=0.0)
    batch = every_item(TransitionView(n_step=3, discount=0.5).bind(replay, affine, CPU))
    torch.testing.assert_close(batch.reward, torch.tensor([28.25, 38.5, 39.0, 79.0]))
    assert batch.discount.tolist() == [0.125, 0.25, 0.5, 0.5]
    assert batch.terminated.tolist() == [True, True, True, False]
    assert batch.next_obs.flatten().tolist() == [7.0, 7.0, 7.0, 9.0]


def test_batches_have_the_shape_of_the_items() -> None:
    replay = toy_replay([5, 3])
    for bound in (
        TransitionView(next_action=True).bind(replay, normalizer(replay), CPU),
        ColumnTransitions(TransitionView(next_action=True), replay, normalizer(replay), CPU),
    ):
        items = bound.pick(words(4, 6).reshape(2, 2, 6))
        batch = bound.gather(items)
        assert batch.obs.shape == batch.next_obs.shape == (2, 2, 6, 3)
        assert batch.action.shape == batch.next_action.shape == (2, 2, 6, 1)
        assert batch.reward.shape == batch.terminated.shape == batch.row.shape == (2, 2, 6)
        assert batch.terminated.dtype == torch.bool and batch.reward.dtype == torch.float32


@pytest.mark.parametrize("bits", [32, 64])
def test_batches_follow_the_precision_of_the_normaliser(bits: int) -> None:
    replay = toy_replay([5, 3])
    replay.steps["obs"] = replay.steps["obs"].astype(np.float64)  # as a user's own arrays may be
    replay.steps["terminated"] = replay.steps["terminated"].astype(np.uint8)
    affine = normalizer(replay).to(getattr(torch, f"float{bits}"))
    view = TransitionView(n_step=2, next_action=True)
    for bound in (PackedTransitions(view, replay, affine, CPU), ColumnTransitions(view, replay, affine, CPU)):
        batch = every_item(bound)
        numbers = [x for k, x in batch._asdict().items() if k not in ("row", "terminated", "noise", "extra")]
        assert {x.dtype for x in numbers} == {affine.obs_scale.dtype} and batch.terminated.dtype == torch.bool
    windows = every_item(WindowView(3).bind(replay, affine, CPU))
    assert {getattr(windows, k).dtype for k in ("obs", "action", "reward", "return_to_go")} == {affine.obs_scale.dtype}


def test_the_path_follows_the_backing(tmp_path: Path) -> None:
    replay = toy_replay([5, 3])
    mapped = Replay.load(replay.save(tmp_path / "data"))
    images = toy_replay([5, 3])
    images.steps["obs"] = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 3), dtype=np.uint8)
    images.tail["obs"] = np.zeros((2, 4, 4, 3), np.uint8)
    affine = normalizer(replay)
    assert type(TransitionView().bind(replay, affine, CPU)) is PackedTransitions
    assert type(TransitionView().bind(replay.to("cpu"), affine, CPU)) is PackedTransitions
    assert type(TransitionView().bind(mapped, affine, CPU)) is ColumnTransitions
    pictures = every_item(TransitionView().bind(images, affine, CPU))
    assert pictures.obs.dtype == torch.uint8 and pictures.next_obs.shape == (8, 4, 4, 3)


@pytest.mark.parametrize("view", [TransitionView(), TransitionView(n_step=3), WindowView(4)])
def test_every_backing_gives_the_same_batch(view: Any, tmp_path: Path) -> None:
    replay = toy_replay([5, 1, 9])
    affine = normalizer(replay)
    picked = words(3, 8)
    batches = []
    for each in (replay, replay.to("cpu"), Replay.load(replay.save(tmp_path / "data"))):
        bound = view.bind(each, affine, CPU)
        batches.append(bound.gather(bound.pick(picked)))
    for other in batches[1:]:
        for name, value in batches[0]._asdict().items():
            assert value is None or torch.equal(value, getattr(other, name)), name


def test_one_draw_for_a_block_equals_many() -> None:
    """K updates at once, one by one, and a process's slice of the rows are parts of one draw."""
    replay = toy_replay([5, 1, 9])
    bound = TransitionView().bind(replay, normalizer(replay), CPU)
    whole = bound.gather(bound.pick(words(5, 8)))
    keys = sampling.keys(0, "index", torch.arange(1, 6))
    for k in range(5):
        for rows in (torch.arange(0, 4), torch.arange(4, 8)):
            part = bound.gather(bound.pick(sampling.bits(keys[k : k + 1], rows)))
            assert torch.equal(part.obs[0], whole.obs[k, rows]) and torch.equal(part.row[0], whole.row[k, rows])


def test_transitions_are_drawn_uniformly() -> None:
    replay = toy_replay([1, 2, 30, 4])
    replay.steps["valid_td"] = np.arange(37) % 5 > 0
    for bind in (PackedTransitions, ColumnTransitions):
        bound = bind(TransitionView(), replay, normalizer(replay), CPU)
        rows = bound.row(bound.pick(words(200, 256))).flatten().numpy()
        counts = np.bincount(rows, minlength=37)
        assert set(np.flatnonzero(counts)) == set(replay.usable_rows())
        assert stats.chisquare(counts[counts > 0]).pvalue > 0.01


def test_transitions_are_drawn_by_weight() -> None:
    replay = toy_replay([2, 3])
    replay.steps["priority"] = np.array([0.0, 1.0, 3.0, 0.0, 4.0])
    bound = TransitionView(weight="priority").bind(replay, normalizer(replay), CPU)
    counts = np.bincount(every_item(bound).row[bound.pick(words(100, 256)).flatten()].numpy(), minlength=5)
    assert counts[0] == counts[3] == 0
    assert stats.chisquare(counts[[1, 2, 4]], counts.sum() * np.array([1, 3, 4]) / 8).pvalue > 0.01
    assert (bound.pick(torch.tensor([-1, 0])) == torch.tensor([4, 1])).all()  # u just below 1, and 0


@pytest.mark.parametrize("weight", [[1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0]])
def test_impossible_weights(weight: list[float]) -> None:
    replay = toy_replay([3])
    replay.steps["priority"] = np.array(weight)
    with pytest.raises(DataError, match="finite, ≥ 0 and not all zero"):
        TransitionView(weight="priority").bind(replay, normalizer(replay), CPU)


def test_missing_columns() -> None:
    replay = Replay({"obs": np.zeros((2, 3), np.float32), "action": np.zeros((2, 1), np.float32)})
    for view in (TransitionView(), WindowView(2)):
        with pytest.raises(DataError, match=r"needs \['reward', 'terminated'\] too"):
            view.rows(replay)
    with pytest.raises(DataError, match=r"needs \['priority'\] too"):
        TransitionView(weight="priority").rows(toy_replay([3]))


@pytest.mark.parametrize("make", [lambda: TransitionView(n_step=0), lambda: TransitionView(discount=1.5)])
def test_impossible_transition_views(make: Any) -> None:
    with pytest.raises(UsageError):
        make()


# -- windows ---------------------------------------------------------------------------------------------------------


def naive_window(replay: Replay, view: WindowView, row: int, affine: Normalizer) -> dict[str, Any]:
    """One window as lists over its H places."""
    episode = int(replay.episode_at(np.array([row]))[0])
    start, end = int(replay.start[episode]), int(replay.end[episode])
    begin = row - view.horizon + 1 if view.pad == "left" else row
    places = range(begin, begin + view.horizon)
    real = [start <= at <= end for at in places]
    reward = replay.steps["reward"].astype(np.float64)

    def column(of: Any, empty: Any) -> list[Any]:
        return [of(at) if is_real else empty for at, is_real in zip(places, real)]

    obs = (replay.steps["obs"] - affine.obs_center.double().numpy()) * affine.obs_scale.double().numpy()
    return {
        "obs": column(lambda at: obs[at], np.zeros(3)),
        "action": column(lambda at: replay.steps["action"][at] / 2.0, np.zeros(1)),
        "reward": column(lambda at: 2.0 * reward[at] - 1.0, 0.0),
        "terminated": column(lambda at: replay.steps["terminated"][at], False),
        "mask": real,
        "t": [max(at - start, 0) for at in places],
        "return_to_go": column(lambda at: reward[at : end + 1].sum(), 0.0),
    }


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    horizon=st.integers(1, 9),
    pad=st.sampled_from(["right", "left", "none"]),
    seed=st.integers(0, 3),
    keep=st.booleans(),
)
def test_windows_equal_a_loop(lengths: list[int], horizon: int, pad: str, seed: int, keep: bool) -> None:
    replay = toy_replay(lengths, seed=seed)
    if keep and len(lengths) > 1:
        replay = replay.filter(np.arange(len(lengths))[:0:-1])
    view, affine = WindowView(horizon, pad), normalizer(replay)
    if pad == "none" and horizon > replay.length.max():
        with pytest.raises(DataError, match=f"no episode has {horizon} steps"):
            view.bind(replay, affine, CPU)
        return
    bound = view.bind(replay, affine, CPU)
    batch = every_item(bound)
    rows = replay.rows if view.rows(replay) is None else view.rows(replay)
    assert rows is not None and len(bound) == len(rows)
    assert pad == "none" or len(bound) == replay.num_steps
    for item, row in enumerate(rows.tolist()):
        expected = naive_window(replay, view, row, affine)
        assert pad != "none" or all(expected["mask"])
        for name, value in expected.items():
            np.testing.assert_allclose(
                getattr(batch, name)[item].double().numpy(), np.array(value, float), rtol=1e-4, atol=1e-4, err_msg=name
            )


@pytest.mark.parametrize("pad", ["right", "left", "none"])
def test_window_starts_are_uniform(pad: str) -> None:
    """Over all valid starts, with episodes of very different lengths."""
    replay = toy_replay([1, 3, 40, 5, 12])
    bound = WindowView(3, pad).bind(replay, normalizer(replay), CPU)
    starts = bound.row(bound.pick(words(200, 256))).flatten().numpy()
    counts = np.bincount(starts)
    assert np.count_nonzero(counts) == len(bound) == (61 if pad != "none" else 1 + 38 + 3 + 10)
    assert stats.chisquare(counts[counts > 0]).pvalue > 0.01


@given(LENGTHS)
def test_return_to_go_equals_a_loop(lengths: list[int]) -> None:
    reward = np.random.default_rng(0).normal(size=sum(lengths))
    loop, at = [], 0
    for length in lengths:
        loop += [sum(reward[at + t : at + length]) for t in range(length)]
        at += length
    np.testing.assert_allclose(return_to_go(reward, np.array(lengths)), loop, atol=1e-12)


@pytest.mark.parametrize("options", [{"horizon": 0}, {"horizon": 2, "pad": "middle"}])
def test_impossible_windows(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"horizon|'middle'; expected 'right', 'left' or 'none'"):
        WindowView(**options)


def test_a_batch_by_hand() -> None:
    """Transitions can be made from plain tensors, as evaluating a loss from outside needs."""
    batch = Transitions(*(torch.zeros(2, n) for n in (3, 1)), torch.zeros(2), torch.zeros(2, 3), torch.zeros(2).bool())
    assert batch.noise is None and batch.row is None and batch.discount is None
