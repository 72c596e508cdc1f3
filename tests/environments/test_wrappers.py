"""A Minari set recorded through wrappers is played through them, or not at all, and says so."""

import json
import shutil
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from scripts import FIXTURES

import offpolicy as op
from offpolicy.data.sources import open_source
from offpolicy.environments.make import close_environment, make_environment
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import DataError, UsageError

FIXTURE = FIXTURES / "minari" / "pendulum" / "mixed-v0"
OWN = """
import gymnasium
open("was_imported", "w").close()


class Half(gymnasium.RewardWrapper, gymnasium.utils.RecordConstructorArgs):
    def __init__(self, env, factor=0.5):
        gymnasium.utils.RecordConstructorArgs.__init__(self, factor=factor)
        super().__init__(env)
        self.factor = factor

    def reward(self, reward):
        return self.factor * reward


def wrap(env):
    return env
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_wrappers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Path(shutil.copytree(FIXTURE, tmp_path / "mixed-v0"))
    sys.modules.pop("own_wrappers", None)


def recorded(folder, env=None, spec=None):
    """The set, with the specification that gymnasium writes for an environment."""
    path = folder / "data" / "metadata.json"
    written = json.loads(env.spec.to_json()) if env is not None else spec
    path.write_text(json.dumps({**json.loads(path.read_text()), "env_spec": json.dumps(written)}))
    return open_source(folder)


def pendulum():
    return gymnasium.make("Pendulum-v1")


def named(*points):
    spec = json.loads(pendulum().spec.to_json())
    return {**spec, "additional_wrappers": [{"name": p, "entry_point": p, "kwargs": {}} for p in points]}


def rewards(meta, steps=20):
    env = make_environment(meta)
    env.reset(seed=1)
    found = [env.step(env.action_space.low)[1] for _ in range(steps)]
    close_environment(env)
    return np.array(found)


def test_gymnasiums_wrappers_are_applied(folder):
    plain = rewards(recorded(folder, pendulum()).meta)
    assert plain.min() < -1.0
    replay = recorded(folder, wrappers.ClipReward(pendulum(), -1.0, 1.0))
    np.testing.assert_array_equal(rewards(replay.meta), np.clip(plain, -1.0, 1.0))
    assert "recorded through ClipReward, in which evaluations play too" in replay.meta["notes"]
    both = recorded(folder, wrappers.RescaleAction(wrappers.ClipReward(pendulum(), -1.0, 1.0), -1.0, 1.0))
    env = make_environment(both.meta)
    assert env.action_space.high == 1.0 and isinstance(env.env, wrappers.ClipReward)


def test_training_and_evaluation_play_through_them(folder):
    recorded(folder, wrappers.ClipReward(pendulum(), -0.5, 0.5))
    options = {"eval_every": 2, "eval_episodes": 2, "verbose": False}
    result = op.fit(op.BC(hidden_dims=(4,), batch_size=8), str(folder), max_steps=2, **options)
    assert -100.0 <= result.scores["return_mean"] < 0.0
    assert op.evaluate(result.folder, episodes=2)["return_mean"] == result.scores["return_mean"]


def test_what_only_shows_or_records_is_left_out(folder, tmp_path):
    env = wrappers.RecordEpisodeStatistics(pendulum())
    replay = recorded(folder, env)
    assert "env_wrappers" not in replay.meta and type(make_environment(replay.meta)) is type(pendulum())
    spec = named("gymnasium.wrappers.rendering:RecordVideo")
    spec["additional_wrappers"][0]["kwargs"] = {"video_folder": str(tmp_path / "videos")}
    make_environment(recorded(folder, spec=spec).meta)
    assert not (tmp_path / "videos").exists()


def test_wrappers_of_others_run_only_where_they_are_trusted(folder):
    spec = named("own_wrappers:Half")
    replay = recorded(folder, spec=spec)
    assert any("own_wrappers:Half" in text and "--trust own_wrappers" in text for text in replay.meta["warnings"])
    with pytest.raises(NoEnvironment, match="--trust own_wrappers"):
        make_environment(replay.meta)
    options = {"eval_every": 2, "eval_episodes": 1, "verbose": False}
    method = op.BC(hidden_dims=(4,), batch_size=8)
    without = op.fit(method, str(folder), max_steps=2, **options)
    assert without.scores == {} and not Path("was_imported").exists()
    with pytest.raises(UsageError, match="own_wrappers"):
        op.evaluate(without.folder, episodes=1)
    assert not Path("was_imported").exists()

    trusted = op.evaluate(without.folder, episodes=1, trust="own_wrappers")["return_mean"]
    recorded(folder, pendulum())
    plain = op.fit(op.BC(hidden_dims=(4,), batch_size=8), str(folder), max_steps=2, **options)
    assert trusted == pytest.approx(0.5 * plain.scores["return_mean"])


@pytest.mark.parametrize("kind", [wrappers.NormalizeReward, wrappers.NormalizeObservation])
def test_statistics_that_the_data_do_not_hold_refuse_a_score(folder, kind):
    replay = recorded(folder, kind(pendulum()))
    assert any("running statistics" in text for text in replay.meta["warnings"])
    with pytest.raises(NoEnvironment, match="running statistics"):
        make_environment(replay.meta)


@pytest.mark.parametrize(
    "point",
    [
        "gymnasium.wrappers:Absent",
        "gymnasium.wrappers.no_such_module:ClipReward",
        "gymnasium.wrappers.common:deepcopy",
        "gymnasium.wrappers.vector:ClipReward",
        "gymnasium.wrappers.utils:np",
        "gymnasium.wrappers.common:gym.make",
        "gymnasium.wrappersx:ClipReward",
        "os:system",
        "os.system",
        "gymnasium:make",
        "",
    ],
)
def test_other_names_make_nothing(folder, point):
    with pytest.raises(NoEnvironment):
        make_environment(recorded(folder, spec=named(point)).meta)


@pytest.mark.parametrize(
    "listed", ["own_wrappers:Half", [1], [{"kwargs": {}}], [{"entry_point": "a:b", "kwargs": [1]}]]
)
def test_other_forms_are_faults_of_the_data(folder, listed):
    with pytest.raises(DataError, match="additional_wrappers"):
        recorded(folder, spec={**named(), "additional_wrappers": listed})


def test_an_environment_that_the_user_names_has_no_wrappers(folder, tmp_path):
    recorded(folder, wrappers.ClipReward(pendulum(), -0.5, 0.5)).save(tmp_path / "own")
    assert open_source(tmp_path / "own").meta["env_wrappers"]
    assert "env_wrappers" not in open_source(tmp_path / "own", env_id="Pendulum-v1").meta
