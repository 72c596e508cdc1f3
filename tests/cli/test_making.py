"""Sets of policies that are trained in a simulator: the rule of levels, what is stored, and what is refused."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from toy import Crash

import offpolicy as op
from offpolicy.cli import making
from offpolicy.cli.making import make_simulated
from offpolicy.data.__main__ import main
from offpolicy.data.names import describe, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.sources import open_source, simulated
from offpolicy.data.sources.simulated import first_mark, mark_return, newest_mark, simulated_recipe
from offpolicy.errors import DataError
from offpolicy.recipes import recipe
from offpolicy.training import playing
from offpolicy.training.checkpoints import read_checkpoint

TINY = {
    "max_episode_steps": 20,
    "scale": [-1e6, 0.0],  # any policy is an expert
    "steps": 200,
    "rows": 90,
    "round_steps": 20,
    "random_steps": 20,
    "eval_every": 40,
    "eval_episodes": 1,
    "model": {"hidden_dims": [8, 8], "batch_size": 16},
}


@pytest.fixture(scope="module")
def family() -> Iterator[dict[str, Any]]:
    """A small Pendulum, whose facts a test may change."""
    facts, tiny = simulated.facts, dict(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "facts", lambda name: {**facts(name), **(tiny if "/" in name else {})})
        yield tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, family: dict[str, Any]) -> Iterator[Path]:
    """The data folder, where the medium set is made first, so the run goes on for the others."""
    place = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPOLICY_DATA_DIR", str(place))
        assert (
            main(["make", *(f"pendulum-{level}-made-v0" for level in ("medium", "medium-replay", "full-replay"))]) == 0
        )
        yield place


def steps_of(replay: Replay, rows: int | None = None) -> dict[str, np.ndarray]:
    return {name: np.asarray(column)[:rows] for name, column in replay.steps.items()}


def test_the_rule_of_levels() -> None:
    """Means of three: (0 + 3 + 6)/3 = 3, (3 + 6 + 0)/3 = 3, (6 + 0 + 9)/3 = 5."""
    evaluations = [(10, 0.0), (20, 3.0), (30, 6.0), (40, 0.0), (50, 9.0)]
    assert first_mark(evaluations, 3.0, 3) == (30, (0.0, 3.0, 6.0))
    assert first_mark(evaluations, 4.0, 3) == (50, (6.0, 0.0, 9.0))
    assert first_mark(evaluations, 5.1, 3) is None and first_mark(evaluations[:2], 0.0, 3) is None
    assert newest_mark(evaluations, 3).mean == 5.0 and newest_mark(evaluations[:1], 3).updates == 10
    for name, medium in (("halfcheetah", 4854.0), ("hopper", 1293.6), ("walker2d", 1836.8), ("pendulum", -759.04)):
        assert mark_return(simulated.family_facts(name), "medium") == pytest.approx(medium)


def test_a_policy_plays_whole_episodes_that_repeat(folder: Path) -> None:
    """The medium policy is that of the third evaluation, update 120, which 20 random steps came before."""
    made = open_source("pendulum-medium-made-v0")
    facts = made.meta["policies"]["medium"]
    assert (facts["updates"], facts["steps"], len(facts["returns"])) == (120, 140, 3)
    assert made.num_steps == 100 and (made.length == 20).all() and (made.episodes["updates"] == 120).all()
    assert read_checkpoint(folder / "pendulum-medium-made-v0" / facts["file"])["global_step"] == 120
    env = gymnasium.make("Pendulum-v1")
    for start, seed in zip(made.start, made.episodes["seed"]):
        obs, _ = env.reset(seed=int(seed))
        for row in range(start, start + 20):
            np.testing.assert_array_equal(obs, made.steps["obs"][row])
            obs, reward, *_ = env.step(made.steps["action"][row])
            assert made.steps["reward"][row] == np.float32(reward)
    assert "first policy of the run" in made.meta["notes"][0] and "200 steps, seed 0" in made.meta["notes"][1]
    assert made.meta["score_kind"] == "made-normalised" and made.meta["recipe"]["versions"]["gymnasium"]


def test_the_run_goes_on_and_any_number_of_processes_makes_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, full = (open_source(f"pendulum-{level}-replay-made-v0") for level in ("medium", "full"))
    assert (replay.num_steps, full.num_steps) == (140, 200)
    for name, column in steps_of(replay).items():
        np.testing.assert_array_equal(column, steps_of(full, 140)[name])
    assert full.episodes["updates"].tolist() == [0, *range(0, 180, 20)]
    medium = open_source("pendulum-medium-made-v0").fingerprint()
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(playing, "get_context", lambda _: multiprocessing.get_context("fork"))  # starts at once
    again = make_simulated(resolve("pendulum-full-replay-made-v0"))
    assert again.fingerprint() == full.fingerprint()
    assert make_simulated(resolve("pendulum-medium-made-v0"), jobs=2).fingerprint() == medium


def test_the_mark_is_at_the_same_policy_after_an_interruption(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at update 70, in the middle of a round and before the third evaluation, at which the mark is."""
    medium, whole = open_source("pendulum-medium-made-v0"), making.fit
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(making, "fit", lambda *a, callbacks, **k: whole(*a, callbacks=[*callbacks, Crash(70)], **k))
    with pytest.raises(ZeroDivisionError):
        make_simulated(resolve("pendulum-medium-made-v0"))
    monkeypatch.setattr(making, "fit", whole)
    again = make_simulated(resolve("pendulum-medium-made-v0"))
    ours, theirs = ({**replay.meta["policies"]["medium"], "checkpoint": ""} for replay in (again, medium))
    assert ours == theirs and again.fingerprint() == medium.fingerprint()


@pytest.mark.slow
def test_a_set_of_a_v5_environment_of_mujoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: uniform actions, the policy of a tiny run, and what that run collected."""
    pytest.importorskip("mujoco")
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # mujoco may write a log
    names = [f"inverteddoublependulum-{level}-made-v0" for level in ("random", "best", "full-replay")]
    assert main(["make", *names, "--steps", "300", "--rows", "60"]) == 0
    for name in names:
        made = open_source(name)
        assert made.num_steps >= 60 and made.meta["env_id"] == "InvertedDoublePendulum-v5"
        assert made.steps["obs"].shape[1] == 9 and made.steps["terminated"].any() and "mujoco" in made.meta["notes"][-1]
    assert open_source(names[-1]).num_steps == 300


def test_levels_of_several_policies_and_of_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"pendulum-{level}-made-v0" for level in ("medium-expert", "random")]
    assert main(["make", *names, "--check"]) == 0
    assert "random       return" in (shown := capsys.readouterr().out) and "expert       return" in shown
    both, random = (open_source(name) for name in names)
    assert both.episodes["updates"].tolist() == [120] * 3 + [180] * 3
    medium = open_source("pendulum-medium-made-v0")
    for name, column in steps_of(medium, 60).items():
        np.testing.assert_array_equal(column, steps_of(both, 60)[name])
    actions = random.steps["action"]
    assert "policies" not in random.meta and abs(actions.mean()) < 0.4 and 1.5 < np.abs(actions).max() <= 2.0


def test_methods_train_by_name_on_a_scale_of_its_own(folder: Path, tmp_path: Path) -> None:
    method = op.TD3BC(hidden_dims=(8, 8), batch_size=16)
    options: dict[str, Any] = {"max_steps": 4, "eval_episodes": 1, "folder": tmp_path / "run", "verbose": False}
    assert "score" in op.fit(method, "pendulum-medium-made-v0", **options).scores
    assert op.evaluate(tmp_path / "run", episodes=1)["score_kind"].startswith("made-normalised, Pendulum-v1")
    for task, method_name in (("halfcheetah-medium", "ReBRAC"), ("hopper-medium", "IQL"), ("walker2d-random", "A2PR")):
        assert recipe(method_name, f"{task}-made-v0") == recipe(method_name, f"{task}-v2") is not None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["pendulum-medium-made-v0", "--steps", "99"],
            2,
            "the rule for pendulum-medium-made-v0 compares 3 evaluations",
        ),
        (["pendulum-medium-made-v0", "--seed", "1"], 3, "`seed` 0, and 1 is asked for"),
        (["pendulum-medium-made-v0", "--jobs", "0"], 2, "jobs"),
        (["pendulum-random-made-v0", "--out", "."], 2, ". exists; expected a new folder"),
        (["pendulum-random-made-v0", "pendulum-medium-made-v0", "--out", "x"], 2, "--out was given for 2 sets"),
        (["pendulum-midium-made-v0"], 2, "Did you mean 'pendulum-medium-made-v0'?"),
        (["pendulum-stitch-v0", "--rows", "9"], 2, "the recipe of pendulum-stitch-v0 is fixed"),
        (["hopper-medium-made-v0"], 2, "made with mujoco, which is not installed. pip install 'offpolicy[mujoco]'"),
    ],
)
def test_mistakes_are_told_before_training(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    find = simulated.importlib.util.find_spec
    monkeypatch.setattr(simulated.importlib.util, "find_spec", lambda name: None if name == "mujoco" else find(name))
    before = sorted(folder.iterdir())
    assert main(["make", *arguments]) == code
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert sorted(folder.iterdir()) == before


def test_one_process_makes_a_set_and_one_that_is_interrupted_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["make", "pendulum-random-made-v0"]) == 2
    assert "made by one process, and 2 were launched" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(making, "fit", lambda *_, **__: SimpleNamespace(interrupted=True))
    assert main(["make", "pendulum-medium-made-v0"]) == 130
    shown = capsys.readouterr()
    assert "Run the same command again" in shown.err and str(tmp_path) in shown.err and "expected time" in shown.out


def test_a_run_that_does_not_get_there_and_a_set_that_is_not_made(folder: Path, family: dict[str, Any]) -> None:
    family["scale"] = [0.0, 1.0]  # Pendulum has no positive return
    try:
        with pytest.raises(DataError, match=r"ends at a return of -.*'expert' takes 0\.8.*pendulum-best-made-v0"):
            make_simulated(resolve("pendulum-expert-made-v0"))
        assert make_simulated(resolve("pendulum-best-made-v0")).meta["policies"]["best"]["updates"] == 180
    finally:
        family["scale"] = TINY["scale"]
    name = "walker2d-medium-made-v0"
    assert f"not made yet: python -m offpolicy.data make {name}" in describe(resolve(name))
    with pytest.raises(DataError, match=f"has not been made here.*python -m offpolicy.data make {name}"):
        op.load_data(name).load()
    assert simulated_recipe(resolve("pendulum-medium-made-v0"), steps=150)["rows"] == 90
