"""Runs that collect their data: what is stored, that they go on bit for bit, and what is refused before anything is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from counting import ENV, Counting, collect, online, scratch
from forks import run_copy
from lightning.pytorch import Callback
from toy import Crash, differences, run_files, toy_replay

import offpolicy as op
from offpolicy.data import sampling
from offpolicy.data.module import DataModule
from offpolicy.data.online import OnlineOptions
from offpolicy.data.players import Players
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.views import BoundView
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.training.switching import online_measures, switch_words

KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"episodes": kind} for kind in ("cut", "keep", "whole")},
    "three": {"episodes": "keep", "envs": 3},
}


class Kill(Callback):
    """Ends the process before the first block that starts at or after an update, without a word."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.update:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, op.FitResult]:
    """A run of each kind of rounds."""
    root = tmp_path_factory.mktemp("runs")
    Counting.starts.clear()  # other files play it too
    return {kind: collect(root / kind, scratch(**options)) for kind, options in KINDS.items()}


def collected(result: op.FitResult | Path) -> Replay:
    folder = result if isinstance(result, Path) else result.folder
    return Replay.load(folder / "replay" / "collected")


@pytest.mark.parametrize("episodes", KINDS)
def test_every_transition_is_right(runs: dict[str, op.FitResult], episodes: str) -> None:
    """s' is (episode, t + 1) always; only an end by itself is terminated, a limit and a cut are not."""
    result = runs[episodes]
    found = collected(result)
    assert result.updates == 40
    assert found.num_steps == 60 if episodes != "whole" else 60 <= found.num_steps <= 66
    obs, following = found.steps["obs"], found.next_obs(np.arange(found.num_steps)).numpy()
    assert (following[:, 0] == obs[:, 0]).all() and (following[:, 1] == obs[:, 1] + 1).all()
    assert (found.steps["reward"] == following[:, 1]).all()
    assert (found.steps["terminated"] == (following[:, 1] == 3 + 2 * (obs[:, 0] % 3))).all()
    assert (obs[found.start, 1] == 0).all()
    assert found.episodes["episode"].tolist() == list(range(found.num_episodes))
    if episodes not in ("cut", "three"):
        lengths = found.length if episodes == "whole" else found.length[:-1]
        number = obs[found.start, 0].astype(int) % 3
        assert [(3, 5, 6)[i] for i in number[: len(lengths)]] == lengths.tolist()
    assert len(np.unique(found.episodes["seed"])) == found.num_episodes
    rows = Table(result.folder / "metrics.csv").rows()
    assert [row["env/steps"] for row in rows] == [30, 40, 50, 60] or episodes == "whole"
    assert all(0.0 < row["perf/collecting_share"] < 1.0 for row in rows)
    assert rows[-1]["env/updates_per_step"] == 1.0 or episodes == "whole"
    assert Table(result.folder / "evals.csv").rows()[0]["env/steps"] == 40 or episodes == "whole"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "rounds of 10 steps and 10 updates; "),
        ({"env_steps": 21}, "a round of 1 step and 1 update; "),
        ({"env_steps": 25, "utd": 2, "envs": 3, "episodes": "keep"}, "a round of 5 steps in 3 environments side by "),
    ],
)
def test_the_first_screen_has_rounds_as_they_are_made(options: dict[str, Any], said: str) -> None:
    data = scratch(**options)
    data.load()
    data.begin_at(0, None, 0)
    assert data.collection.facts()[1][1].startswith(said)


def test_a_run_that_was_killed_goes_on_bit_for_bit(runs: dict[str, op.FitResult], tmp_path: Path) -> None:
    """In the middle of a round, with an episode that runs on; then at the boundary of one. It evaluates less often."""
    folder, whole = tmp_path / "parts", runs["keep"]
    options: dict[str, Any] = {"eval_every": 0, "save_every": 5}
    first = run_copy(lambda: collect(folder, scratch(episodes="keep"), callbacks=[Kill(15)], **options))
    assert first.returncode == -signal.SIGKILL, first.output
    with pytest.raises(ZeroDivisionError):
        collect(None, scratch(episodes="keep"), ckpt_path=folder, callbacks=[Crash(20)], **options)
    collect(None, scratch(episodes="keep"), ckpt_path=folder, **options)
    ours, theirs = (run_files(f, whole.updates) for f in (folder, whole.folder))
    for part in ("evals", "offpolicy"):
        del ours[part], theirs[part]
    assert not differences(ours, theirs)
    assert collected(folder).fingerprint() == collected(whole).fingerprint()
    shutil.rmtree(folder / "replay" / "collected")  # as if it was stopped before its last files
    collect(None, scratch(episodes="keep"), ckpt_path=folder, **options)
    assert collected(folder).fingerprint() == collected(whole).fingerprint()
    rounds = sorted(p.name for p in (folder / "replay").iterdir())
    assert rounds == ["collected", *(f"round-{i:06d}" for i in range(5))]
    (folder / "replay" / "round-000002" / "meta.json").unlink()
    with pytest.raises(op.DataError, match="round-000002"):
        collect(None, scratch(episodes="keep", env_steps=80), ckpt_path=folder, **options)


def test_three_environments_go_on_bit_for_bit(runs: dict[str, op.FitResult], tmp_path: Path) -> None:
    """In the middle of a round, with an episode in each."""
    with pytest.raises(ZeroDivisionError):
        collect(tmp_path, scratch(**KINDS["three"]), callbacks=[Crash(15)], save_every=5)
    collect(None, scratch(**KINDS["three"]), ckpt_path=tmp_path, save_every=5)
    ours, theirs = (run_files(folder, 40) for folder in (tmp_path, runs["three"].folder))
    assert not differences(ours["state_dict"], theirs["state_dict"]) and ours["metrics"] == theirs["metrics"]
    assert collected(tmp_path).fingerprint() == collected(runs["three"]).fingerprint()
    with pytest.raises(UsageError, match=r"`data.online.envs` is 2, and was 3"):
        collect(None, scratch(episodes="keep", envs=2), ckpt_path=tmp_path)


def test_an_environment_that_does_not_repeat_itself_is_cut(
    runs: dict[str, op.FitResult], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and says that it does not bit for bit; more steps than before are allowed."""
    monkeypatch.setattr(Counting, "starts", {})
    with pytest.raises(ZeroDivisionError):
        collect(tmp_path / "run", scratch(episodes="keep", random_steps=None), callbacks=[Crash(20)])
    monkeypatch.setattr(Counting, "starts", {})
    collect(None, scratch(episodes="keep", random_steps=None, env_steps=75), ckpt_path=tmp_path / "run")
    assert "does not repeat an episode" in caplog.text
    found = collected(tmp_path / "run")
    assert found.num_steps == 75 and (found.next_obs(found.rows).numpy()[:, 1] == found.steps["obs"][:, 1] + 1).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": "CartPole-v1"}, "Discrete"),
        ({"env": "CountingUnbounded-v0"}, "actions without bounds"),
        ({"round_steps": 5}, "round_steps"),
        ({"round_steps": 5, "episodes": "whole"}, "round_steps"),
        ({"random_steps": 60}, "random_steps"),
        ({"random_steps": 0}, "random_steps"),
        ({"random_steps": 55, "episodes": "whole"}, "played to the end of an episode .* at least 61"),
        ({"env": "CountingOnlineEndless-v0", "episodes": "whole"}, "no known limit.*max_episode_steps"),
        ({"capacity": 8}, "capacity"),
        ({"capacity": 41, "episodes": "keep"}, "at least 42"),
        ({"capacity": 30}, "capacity"),
        ({"mix": "half"}, "offline"),
        ({"mix": "third"}, "mix"),
        ({"episodes": "all"}, "episodes"),
        ({"utd": 0}, "utd"),
        ({"envs": 0}, "envs"),
        ({"envs": 2}, r"up to 6 steps in each of 2 environments .* at least 12 steps"),
        ({"envs": 11, "episodes": "keep"}, "at least a step of each"),
    ],
)
def test_bad_options_are_refused_before_anything_is_collected(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        collect(tmp_path / "run", scratch(**options))
    assert not (tmp_path / "run" / "replay").exists()


class Grabbing(Counting):
    """Writes over the action that it is given."""

    def step(self, action: Any) -> Any:
        action.fill(7.0)
        return super().step(action)


class Blind(Counting):
    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return np.where(obs[1] == 2, np.nan, obs), *rest


gymnasium.register("Grabbing-v0", Grabbing, max_episode_steps=6)
gymnasium.register("Blind-v0", Blind, max_episode_steps=6)


def test_an_environment_cannot_change_the_actions_that_are_stored(tmp_path: Path) -> None:
    players = Players({"env_id": "Grabbing-v0"}, 1, keep=False, whole=False)
    found = players.play(lambda obs, steps: np.full((len(obs), 1), 0.5), 9)
    assert (found.steps["action"] == 0.5).all()


def test_an_observation_of_nan_is_told_with_its_place() -> None:
    players = Players({"env_id": "Blind-v0"}, 1, keep=False, whole=False)
    with pytest.raises(UsageError, match=r"not finite, before action 3 of .* episode 1 \(seed \d+\)"):
        players.play(lambda obs, steps: np.zeros((len(obs), 1)), 9)


def test_options_of_collecting_without_steps_to_collect_are_refused() -> None:
    for options in ({"env": ENV}, {"mix": "half"}, {"envs": 2}):
        with pytest.raises(UsageError, match="env_steps` is 0; expected the number"):
            OnlineOptions(**options)  # type: ignore[arg-type]


def test_data_that_are_open_already_take_the_seed_of_the_run() -> None:
    opened, late = scratch(), scratch()
    opened.load()
    for data in (opened, late):
        data.seed = 3
        data.begin_at(0, None, 3)
    assert opened.load().fingerprint() == late.load().fingerprint()


def with_next_obs(data: Replay) -> DataModule:
    """Data that store successors, and so have no tail, beside which three rounds are collected."""
    steps = {**data.steps, "next_obs": data.next_obs(data.rows).numpy()}
    replay = Replay(steps, start=data.start, length=data.length, meta=data.meta)
    found = DataModule.of(replay)
    found.online = online(None, env_steps=30, episodes="keep", warmup_steps=5)
    found.change_every = 10
    return found


def test_data_with_successors_are_gone_on_beside(runs: dict[str, op.FitResult], tmp_path: Path) -> None:
    """Also by a run that was stopped while an episode ran."""
    data, whole = collected(runs["cut"]), tmp_path / "whole"
    collect(whole, with_next_obs(data))
    with pytest.raises(ZeroDivisionError):
        collect(tmp_path / "parts", with_next_obs(data), callbacks=[Crash(15)], save_every=5)
    collect(None, with_next_obs(data), ckpt_path=tmp_path / "parts", save_every=5)
    found = collected(whole)
    assert "next_obs" not in found.steps and found.num_steps == 30
    assert (found.next_obs(found.rows).numpy()[:, 1] == found.steps["obs"][:, 1] + 1).all()
    assert found.fingerprint() == collected(tmp_path / "parts").fingerprint()


def test_a_run_that_held_episodes_out_says_so_before_it_goes_on_online(
    runs: dict[str, op.FitResult], tmp_path: Path
) -> None:
    data, small = str(runs["cut"].folder / "replay" / "collected"), {"hidden_dims": (8, 8), "batch_size": 10}
    collect(tmp_path / "run", DataModule(data, holdout=0.3), op.IQL(**small), max_steps=20)
    given: dict[str, Any] = {"ckpt_path": tmp_path / "run"}
    with pytest.raises(op.DataError, match=r"of which it held out 0.3 of the episodes .*--run.allow_other_data"):
        collect(None, DataModule(data, online=online(None, env_steps=10)), op.IQL(**small), **given)
    given["allow_other_data"] = True
    found = collect(None, DataModule(data, online=online(None, env_steps=10)), op.IQL(**small), **given)
    assert found.updates == 30


def test_random_steps_beside_data_take_the_seed_of_the_run(runs: dict[str, op.FitResult]) -> None:
    data = with_next_obs(collected(runs["cut"]))
    data.load()
    data.begin_at(0, None, 3)
    assert data.collection is not None and data.collection._uniform.seed == data.collection.seed == 3


def test_what_cannot_collect_is_refused(runs: dict[str, op.FitResult], tmp_path: Path) -> None:
    data = str(runs["cut"].folder / "replay" / "collected")
    with pytest.raises(UsageError, match="Pendulum-v1 has observations of width 3, and the data of shape"):
        collect(tmp_path / "run", DataModule(data, online=online("Pendulum-v1", round_steps=200)))
    scored = Replay.load(data)
    scored.meta = {**scored.meta, "env_id": "Hopper-v4", "score_kind": "d4rl-normalised"}
    beside = DataModule.of(scored)  # D4RL's reference scores are not those of a newer version
    beside.online = online("Drifting-v0")
    with pytest.raises(UsageError, match="is Drifting-v0, and the data are of Hopper-v4, in which they are evaluated"):
        collect(tmp_path / "run", beside)
    for rows, options in ((69, {}), (74, {"warmup_steps": 5}), (75, {"episodes": "whole"}), (81, {"episodes": "keep"})):
        with pytest.raises(UsageError, match=f"60 offline rows stay beside rounds of 10; expected at least {rows + 1}"):
            collect(tmp_path / "run", DataModule(data, online=online(None, capacity=rows, **options)))
    for method, options, said in (
        (op.DecisionTransformer(), {}, "expected another method"),
        (op.SAC(), {"max_steps": 7}, "make 40 updates"),
    ):
        with pytest.raises(UsageError, match=said):
            collect(tmp_path / "run", method=method, **options)


def test_data_that_name_no_environment_take_that_in_which_more_are_collected() -> None:
    """It is evaluated in, and its bounds are those of the actions; other bounds are refused."""
    rows = np.arange(40)
    arrays = {
        "obs": np.stack([rows // 4, rows % 4], 1).astype(np.float32),
        "action": np.linspace(-1.0, 1.0, 40, dtype=np.float32)[:, None],
        "reward": np.zeros(40),
        "terminated": np.zeros(40, bool),
        "episode_end": rows % 4 == 3,
    }

    def opened(**options: Any) -> Replay:
        module = DataModule("own", online=online())
        module.replay = op.load_data(dict(arrays, action=options.pop("action", arrays["action"])), **options).replay
        return module.load()

    meta = opened().meta
    assert meta["env_id"] == ENV and meta["max_episode_steps"] == 6
    assert (meta["action_low"], meta["action_high"], meta["action_bounds"]) == ([-2.0], [2.0], "environment")
    assert opened(action_low=-2.0, action_high=2.0).meta["env_id"] == ENV
    for options in ({"action_low": -1.0, "action_high": 1.0}, {"action": 3 * arrays["action"]}):
        with pytest.raises(UsageError, match=r"actions from -2 to 2 in dimension 0, and the data from -(1|3) to (1|3)"):
            opened(**options)


def test_an_offline_run_goes_on_online(
    runs: dict[str, op.FitResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its folder, with its networks; what had fallen along a cosine learns on at the rate that it began with."""
    data = runs["cut"].folder / "replay" / "collected"
    small: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 10}
    offline = collect(tmp_path / "run", DataModule(str(data)), op.IQL(**small), max_steps=20)
    before = {k: v.clone() for k, v in offline.method.actor.state_dict().items()}
    half = offline.folder / "checkpoints" / "step=00000020.ckpt"
    for mix, warmup, ring in (("union", 0, 80), ("half", 0, 80), ("none", 5, 25), ("0.3", 0, 80)):
        method = op.IQL(**small)
        options = online(None, env_steps=20 + warmup, mix=mix, capacity=ring, warmup_steps=warmup)
        data_of_both = DataModule(str(data), online=options)
        found = collect(tmp_path / mix, data_of_both, method, ckpt_path=half, verbose=mix == "union")
        assert found.updates == 40 and method.rates()["actor"] == 3e-4
        assert differences(before, dict(method.actor.state_dict())), "the actor has not moved"
        assert collected(found).num_steps == 20 + warmup
        rows = [row for row in Table(found.folder / "metrics.csv").rows() if row["step"] > 20]
        assert [row["env/steps"] for row in rows] == [10 + warmup, 20 + warmup]
        assert rows[-1]["env/updates_per_step"] == 1.0
    measures = tmp_path / "union" / "online.json"
    first = measures.read_text()
    measures.unlink()  # as if it was stopped before it wrote them
    again = DataModule(str(data), online=online(None, env_steps=20, capacity=80))
    collect(None, again, op.IQL(**small), ckpt_path=tmp_path / "union")
    assert measures.read_text() == first
    said = capsys.readouterr().out
    assert re.search(
        r"(\d+) at the switch, lowest \1 after it \(dip 0\), mean \1", said
    )  # one episode, always the same
    assert "from update 20 on: 20 steps" in said and "actor 0.0003, constant from here on" in said


def test_a_run_without_an_evaluation_at_the_switch_is_evaluated_before_it_collects(
    runs: dict[str, op.FitResult], tmp_path: Path
) -> None:
    """It was stopped between two; what it says of the switch is of that update, whether it tells it or not."""
    data = str(runs["cut"].folder / "replay" / "collected")
    small: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 10}
    with pytest.raises(ZeroDivisionError):
        stopped: dict[str, Any] = {"max_steps": 30, "save_every": 10, "eval_every": 0, "callbacks": [Crash(12)]}
        collect(tmp_path, DataModule(data), op.TD3(**small), **stopped)
    collect(None, DataModule(data, online=online(None, env_steps=20)), op.TD3(**small), ckpt_path=tmp_path)
    rows = Table(tmp_path / "evals.csv").rows()
    found = json.loads((tmp_path / "online.json").read_text())
    assert found["switch"] == found["at_switch_update"] == rows[0]["step"] < rows[1]["step"]
    assert rows[0]["env/steps"] == 0 and found["at_switch"] == rows[0]["eval/return_mean"]


def test_an_evaluation_before_the_switch_is_named(tmp_path: Path) -> None:
    table = Table(tmp_path / "evals.csv")
    for step, value in ((5, 60.0), (15, 40.0)):
        table.append({"step": step, "eval/score": value})
    assert switch_words(tmp_path, 10).startswith("60 at update 5, the last evaluation before the switch, lowest 40")
    assert switch_words(tmp_path, 5).startswith("60 at the switch, lowest 40")


def test_rlpd_and_the_refinement_of_td3bc_as_documented(runs: dict[str, op.FitResult], tmp_path: Path) -> None:
    """Four critic updates per step, the actor moves with each fourth; half of each batch, exactly, is offline."""
    data, drawn = str(runs["cut"].folder / "replay" / "collected"), []
    method = op.SAC(
        hidden_dims=(8, 8),
        batch_size=16,
        num_critics=10,
        num_min_critics=2,
        layer_norm=True,
        init="xavier",
        actor_q="mean",
        update_order="critic_first",
        policy_freq=4,
    )
    update = method.update

    def watched(batch: Any, step: int) -> Any:
        before = method.actor.net.layers[0].weight.clone()
        metrics = update(batch, step)
        drawn.append((int((batch.row < 60).sum()), not torch.equal(before, method.actor.net.layers[0].weight)))
        return metrics

    method.update = watched  # type: ignore[method-assign]
    options = online(None, env_steps=20, utd=4, mix="half")
    found = collect(tmp_path / "rlpd", DataModule(data, online=options), method, eval_every=0)
    assert found.updates == 80 and {count for count, _ in drawn} == {8}
    assert [moved for _, moved in drawn] == [step % 4 == 0 for step in range(1, 81)]
    assert Table(found.folder / "metrics.csv").rows()[-1]["env/updates_per_step"] == 4.0

    small: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 10}
    collect(tmp_path / "refined", DataModule(data), op.TD3BC(alpha=2.5, **small), max_steps=10, eval_every=0)
    options = online(None, env_steps=10)
    for module, updates in ((DataModule(data), 20), (DataModule(data, online=options), 30)):
        given = {} if module.online.env_steps else {"max_steps": updates}
        found = collect(
            None, module, op.TD3BC(alpha=10.0, **small), ckpt_path=tmp_path / "refined", eval_every=0, **given
        )
        assert found.updates == updates and found.method.hparams.alpha == 10.0
        saved = run_files(tmp_path / "refined", updates)["hyper_parameters"]
        assert saved["alpha"] == 10.0


def test_shares_of_offline_rows_are_exact_and_offline_rows_stay() -> None:
    """Seven rows at 0.3: ⌊7·0.3⌋ = 2 offline ones, the same ones whatever the random numbers."""
    view = BoundView(9, torch.device("cpu"), split=(4, 0.3))
    words = sampling.bits(sampling.keys(0, "index", torch.arange(50)), torch.arange(7))
    found = view.pick(words, torch.arange(7))
    assert ((found < 4) == torch.tensor([0, 0, 0, 1, 0, 0, 1], dtype=torch.bool)).all()
    assert set(found.unique().tolist()) == set(range(9))
    assert torch.equal(view.pick(words[:, 3:], torch.arange(3, 7)), found[:, 3:])  # as a second process draws them

    view = BoundView(200, torch.device("cpu"), split=(100, 0.53))
    words = sampling.bits(sampling.keys(0, "index", torch.arange(1)), torch.arange(100))
    assert (view.pick(words, torch.arange(100)) < 100).sum() == 53
    with pytest.raises(UsageError, match="no offline row"):
        op.SAC(batch_size=16).bind_data(DataModule("any", online=online(mix=0.06)))

    ring = Ring(toy_replay((3, 2)), 12, keep=True)
    for seed, lengths in enumerate(((4, 3), (5,), (7,))):  # 7 rows are free: full, one too many, exactly full
        ring.append(toy_replay(lengths, seed=seed + 1))
        assert ring.length[:2].tolist() == [3, 2] and ring.length[2:].tolist() == list(lengths)
        assert (ring.start[2:] >= 5).all() and (ring.steps["obs"][:5] == toy_replay((3, 2)).steps["obs"]).all()


def test_measures_of_the_switch() -> None:
    """60 at the switch, then 40, 70 and 100: lowest 20 below, mean 70, and 1 - 0.7 of regret."""
    rows = [
        {"step": t, "eval/score": s, "eval/return_mean": -s}
        for t, s in ((5, 10), (10, 60), (15, 40), (20, 70), (25, 100))
    ]
    found = online_measures(rows, 10)
    expected = {
        "at_switch": 60,
        "at_switch_update": 10,
        "last": 100,
        "mean": 70,
        "lowest": 40,
        "dip": 20,
        "regret": 0.3,
    }
    assert found == pytest.approx(expected)
    assert online_measures(rows, 25) == online_measures([], 10) == {}
