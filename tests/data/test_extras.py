"""Extra columns: every view brings the same numbers as a look into the data at the batch's rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import fit, toy_replay, weights

import offpolicy as op
from examples.weighted_cloning import WeightedBC
from offpolicy.data.batches import check_rows
from offpolicy.data.extras import Extra
from offpolicy.data.goals import GoalMix, GoalView
from offpolicy.data.mixing import mixed
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.views import ColumnTransitions, TransitionView, WindowView
from offpolicy.diffusion.trajectories import TrajectoryView
from offpolicy.errors import DataError, UsageError
from offpolicy.training import compiled

CPU = torch.device("cpu")
GOALS = GoalView(value=GoalMix(0.2, 0.5, 0.3), actor=GoalMix())
VIEWS: list[Any] = [
    TransitionView(),
    TransitionView(n_step=3, next_action=True),
    WindowView(4),
    WindowView(4, "left"),
    GOALS,
    TrajectoryView(3, 2),
]


def with_extras(lengths: tuple[int, ...] = (5, 7, 4, 6), **options: Any) -> Replay:
    replay = toy_replay(lengths, **options)
    n, rng = sum(lengths), np.random.default_rng(1)
    more = {
        "weight": rng.uniform(0.5, 2.0, n),
        "kind": rng.integers(0, 9, n).astype(np.int32),
        "arm/force": rng.normal(size=(n, 2)).astype(np.float32),
        "touched": rng.random(n) < 0.5,
    }
    return replay.derive({**replay.steps, **more}, replay.tail)


def bind(view: Any, replay: Replay, dtype: torch.dtype = torch.float32) -> Any:
    normalizer = Normalizer((3,), 1).to(dtype)
    normalizer.fit(replay, None, normalize_obs=True, reward_transform="r", eps=1e-3)
    return view.bind(replay, normalizer, CPU)


def gathered(bound: Any) -> Any:
    items = torch.arange(len(bound))
    more = (torch.rand(len(bound), bound.uniforms, dtype=torch.float64),) if bound.uniforms else ()
    return bound.gather(items, *more)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("view", VIEWS, ids=lambda v: f"{type(v).__name__}-{getattr(v, 'pad', '')}")
def test_every_view_brings_the_columns_of_its_rows(view: Any, on_disk: bool, tmp_path: Path) -> None:
    replay = with_extras()
    if on_disk:
        replay = Replay.load(replay.save(tmp_path / "data"))
    replay = replay.filter([1, 3, 0])
    names = ("weight", "kind", "arm/force", "touched")
    batch = gathered(bind(replace(view, extra=names), replay))
    rows, mask = batch.row, getattr(batch, "mask", None)
    if isinstance(view, TrajectoryView):
        rows = rows[:, None] + torch.arange(3)
    for name in names:
        expected = torch.from_numpy(np.array(replay.steps[name]))[rows]
        if mask is not None:
            expected = expected * mask.reshape(*mask.shape, *[1] * (expected.dim() - 2))
        found = batch.extra[name]
        kind = torch.float32 if expected.is_floating_point() else torch.bool if name == "touched" else torch.int64
        assert found.dtype == kind and torch.equal(found, expected.to(kind)), name
    assert gathered(bind(view, replay)).extra is None


def test_floats_follow_the_precision_of_the_weights() -> None:
    batch = gathered(bind(TransitionView(extra=("weight",)), with_extras(), torch.float64))
    assert batch.extra.weight.dtype == torch.float64


def test_a_column_on_disk_is_gathered_like_one_in_memory(tmp_path: Path) -> None:
    replay = with_extras()
    mapped = bind(TransitionView(extra=("weight",)), Replay.load(replay.save(tmp_path / "data")))
    assert isinstance(mapped, ColumnTransitions)
    assert torch.equal(
        gathered(mapped).extra.weight, gathered(bind(TransitionView(extra=("weight",)), replay)).extra.weight
    )


def broken(value: float) -> Replay:
    replay = with_extras()
    replay.steps["weight"][3] = value
    return replay


@pytest.mark.parametrize(
    ("names", "replay", "words"),
    [
        (("wieght",), with_extras(), "names the column `wieght`.*Did you mean 'weight'"),
        (("weight",), broken(np.nan), "NaN or infinite in 1 of the 22 steps, first in step 3"),
        (("weight",), mixed(with_extras(), toy_replay((5, 5)), 0.5), "of mixed data to both parts"),
    ],
)
def test_columns_that_cannot_be_brought(names: tuple[str, ...], replay: Replay, words: str) -> None:
    with pytest.raises(DataError, match=words):
        bind(TransitionView(extra=names), replay)


@pytest.mark.parametrize("names", ["weight", ("weight", "weight"), (1,), None])
def test_names_are_checked(names: Any) -> None:
    for view in VIEWS:
        with pytest.raises(UsageError, match="expected names of columns"):
            replace(view, extra=names)


def test_mixed_data_keep_a_column_of_both() -> None:
    both = mixed(with_extras(), with_extras((5, 5), seed=3), 0.5)
    batch = gathered(bind(TransitionView(extra=("weight",)), both))
    np.testing.assert_allclose(batch.extra.weight, both.steps["weight"][batch.row], rtol=1e-6)


def test_batches_of_ones_own_are_checked() -> None:
    batch = op.Transitions(
        torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4, 3), torch.zeros(4).bool()
    )
    check_rows(batch._replace(extra=Extra(weight=torch.ones(4), force=torch.ones(4, 2), of_mask=torch.ones(4, 3))))
    with pytest.raises(UsageError, match=r"`extra.weight` of the batch has shape \(3,\)"):
        check_rows(batch._replace(extra=Extra(weight=torch.ones(3))))


# -- the worked example, in a run ------------------------------------------------------------------------------------


def cloning(**options: Any) -> Any:
    made = WeightedBC(batch_size=8, hidden_dims=(8, 8), **options)
    made.seed, made.run.eval_episodes, made.run.log_every = 0, 0, 20
    return made


def test_weights_of_zero_leave_steps_out() -> None:
    """Cloning with the weight 0 on one kind of action learns the other one."""
    replay = with_extras((10,) * 20)
    high = replay.steps["kind"] > 4
    steps = {
        **replay.steps,
        "action": np.where(high, 1.0, -1.0).astype(np.float32)[:, None],
        "weight": high.astype(np.float32),
    }
    trained = cloning(actor_lr=1e-2).prepare(replay.derive(steps, replay.tail), max_steps=100)
    trained.run_block(0, 100)
    assert (trained.act(replay.steps["obs"]) > 0.8).mean() > 0.95


def test_seeds_blocks_and_compiled_updates_see_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        compiled, "compile_operations", lambda graph, _: lambda *given: calls.append(0) or graph(*given)
    )
    found = []
    for how, seeds, block in ((False, (), 4), (False, (), 1), ("update", (), 4), (False, (0, 3), 4)):
        module = cloning()
        module.run.compile, module.seeds = how, seeds
        module.prepare(with_extras(), max_steps=12)
        for t in range(0, 12, block):
            module.run_block(t, block)
        found.append(weights(module.take_seed(0) if seeds else module))
    assert len(calls) == 12
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_with_them(tmp_path: Path) -> None:
    whole = fit(cloning(), with_extras(), max_steps=40)
    fit(cloning(), with_extras(), max_steps=20, folder=tmp_path)
    again = fit(cloning(), with_extras(), max_steps=40, ckpt_path=tmp_path / "checkpoints" / "step=00000020.ckpt")
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
