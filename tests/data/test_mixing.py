"""Several replays as one, and the share of a batch that comes from the synthetic one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import METHODS, fit, method, toy_replay

import offpolicy as op
from offpolicy.data import sampling
from offpolicy.data.goals import BoundGoals, GoalMix, GoalView
from offpolicy.data.mixing import SHARE, joined, mixed, mixture_weights
from offpolicy.data.module import DataModule
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.views import TransitionView, WindowView
from offpolicy.errors import DataError, UsageError

REAL, DRAWN = [4, 3, 6], [5, 2, 2, 7]


def both(**real: Any) -> tuple[Replay, Replay]:
    return toy_replay(REAL, **real), toy_replay(DRAWN, seed=9)


def test_joined_keeps_rows_successors_and_ends() -> None:
    parts = both()
    whole = joined(parts)
    assert whole.length.tolist() == REAL + DRAWN and whole.is_whole and whole.meta == parts[0].meta
    for name in parts[0].steps:
        assert np.array_equal(whole.steps[name], np.concatenate([part.steps[name] for part in parts]))
    successors = torch.cat([part.next_obs(part.rows) for part in parts])
    assert torch.equal(whole.next_obs(whole.rows), successors)
    assert whole.returns() == pytest.approx(np.concatenate([part.returns() for part in parts]))


def test_joined_on_disk_is_the_same(tmp_path: Path) -> None:
    whole, mapped = joined(both()), joined(both(), tmp_path / "new")
    assert mapped.is_mapped and mapped.fingerprint() == whole.fingerprint()


def test_joined_of_chosen_episodes_in_another_order() -> None:
    real, drawn = both()
    whole = joined([real.filter([2, 0]), drawn])
    reward = np.asarray(real.steps["reward"])
    assert np.array_equal(whole.steps["reward"][:10], np.concatenate([reward[7:], reward[:4]]))
    assert np.array_equal(whole.tail["obs"][:2], np.asarray(real.tail["obs"])[[2, 0]])


def test_stored_successors_and_unknown_ones() -> None:
    real, drawn = both()
    stored = Replay({**real.steps, "next_obs": real.steps["obs"] + 1}, start=real.start, length=real.length)
    whole = joined([stored, drawn])
    assert np.array_equal(whole.steps["next_obs"][:13], real.steps["obs"] + 1)
    assert torch.equal(torch.from_numpy(whole.steps["next_obs"][13:]), drawn.next_obs(drawn.rows))

    cut = Replay(real.steps, start=real.start, length=real.length)  # no last observations
    whole = joined([cut, drawn])
    assert whole.tail["valid"].tolist() == [False] * 3 + [True] * 4
    assert whole.unusable.tolist() == cut.unusable.tolist()

    steps = {**real.steps, "valid_td": np.arange(13) % 5 > 0}
    flagged = Replay(steps, start=real.start, length=real.length, tail=real.tail)
    assert joined([flagged, drawn]).unusable.tolist() == [0, 5, 10]


def test_rows_of_other_shapes_are_named() -> None:
    with pytest.raises(DataError, match=r"`obs` has rows of \(2,\); expected \(3,\)"):
        joined([toy_replay(REAL), toy_replay(DRAWN, obs_dim=2)])


@pytest.mark.parametrize("share", [0.1, 0.9375])
def test_weights_give_each_kind_its_share(share: float) -> None:
    """13 real rows share 1 - s, 16 drawn ones s; inside a kind rows are alike, or as their own weights say."""
    replay = mixed(*both(), share)
    weight = mixture_weights(replay)
    assert weight == pytest.approx(np.repeat([(1 - share) / 13, share / 16], [13, 16]))
    inside = np.arange(29.0)
    weight = mixture_weights(replay, None, inside)
    expected = np.concatenate([(1 - share) * inside[:13] / inside[:13].sum(), share * inside[13:] / inside[13:].sum()])
    assert weight == pytest.approx(expected)
    assert inside[3] == 3.0  # the given weights are not touched


def test_weights_after_filters() -> None:
    replay = mixed(*both(), 0.75)
    few = replay.filter([5, 1])  # an episode of two drawn steps, one of three real ones
    assert mixture_weights(few, few.rows) == pytest.approx([0.375] * 2 + [0.25 / 3] * 3)
    real = replay.filter([0, 1, 2])
    assert np.ptp(mixture_weights(real, real.rows)) == 0.0
    plain = toy_replay(REAL)
    assert mixture_weights(plain) is None


def test_share_one_leaves_the_real_data_out() -> None:
    real, drawn = both(name="the data")
    only = mixed(real, drawn, 1.0)
    assert only.num_steps == drawn.num_steps and only.meta == real.meta and SHARE not in only.meta


@pytest.mark.parametrize(
    "view",
    [
        TransitionView(),
        TransitionView(n_step=3),
        WindowView(3),
        WindowView(3, pad="none"),
        GoalView(value=GoalMix(0.2, 0.5, 0.3), actor=GoalMix()),
    ],
    ids=str,
)
def test_every_view_keeps_the_share(view: Any) -> None:
    """20,000 rows: the share lies within 5 standard deviations, 5·√(0.8·0.2 / 20,000) = 0.014, of 0.8."""
    replay = mixed(*both(), 0.8)
    normalizer = Normalizer((3,), 1)
    normalizer.fit(replay, None, normalize_obs=True, reward_transform="r", eps=1e-3)
    bound = view.bind(replay, normalizer, torch.device("cpu"))
    words = sampling.bits(sampling.keys(0, "test", torch.zeros(1, dtype=torch.int64))[0], torch.arange(20_000))
    rows = bound.row(bound.pick(words))
    assert float((rows >= 13).double().mean()) == pytest.approx(0.8, abs=0.014)
    if isinstance(bound, BoundGoals):  # any state as a goal
        assert float((bound.any(sampling.unit(words)) >= 13 + 3).double().mean()) == pytest.approx(0.8, abs=0.014)
    assert set(rows.tolist()) == set(range(29) if bound.rows is None else bound.rows.tolist())


def test_a_mixture_can_be_kept(tmp_path: Path) -> None:
    folder = op.mixed(toy_replay(), toy_replay(seed=5), 0.75).save(tmp_path / "both")
    seen, module = [], method("BC")
    update = module.update
    module.update = lambda batch, step: (seen.append(batch.row), update(batch, step))[1]  # type: ignore[method-assign]
    fit(module, op.load_data(folder, env_id="Pendulum-v1"), 200)
    share = (torch.cat(seen) >= 300).double().mean().item()
    assert share == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 3200) ** 0.5)


class Mixed(DataModule):
    """Real data until update 10, a mixture from then on."""

    change_every = 10

    def on_block_start(self, policy: Any) -> None:
        if policy.global_step == 10:
            self.replay = mixed(toy_replay(), toy_replay(seed=5), 0.5)
            self.replay.version = 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_a_mixture(name: str) -> None:
    module, data = method(name), Mixed("mixed")
    data.replay = toy_replay()
    module.run.eval_episodes = 0
    try:
        fit(module, data, 14)
    except UsageError as error:
        assert "expected a view that keeps the synthetic share" in str(error)
        assert "Trajectory" in name
    else:
        assert module.metric_row["step"] == 14


def test_statistics_stay_those_of_the_real_data() -> None:
    data, module, alone = Mixed("mixed"), method("TD3BC"), method("TD3BC")
    data.replay = toy_replay()
    fit(module, data, 14)
    fit(alone, toy_replay(), 2)
    assert torch.equal(module.normalizer.obs_center, alone.normalizer.obs_center)
    assert module.data_fingerprint == alone.data_fingerprint


class Blind(TransitionView):
    """A user's view that knows nothing of shares."""

    def weights(self, replay: Replay) -> None:
        return None


def test_a_view_that_ignores_the_share_is_refused() -> None:
    module = method("TD3BC")
    module.view = Blind()
    data = Mixed("mixed")
    data.replay = toy_replay()
    with pytest.raises(UsageError, match="Blind draws all rows alike; expected a view that keeps the synthetic share"):
        fit(module, data, 14)
