"""An evaluation that fails, or kills the process, costs no training; what it owes is made up for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from toy import differences, fit, method, run_files, toy_replay

import offpolicy as op
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.training import measurement
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint
from offpolicy.training.measurement import EvaluationFailed

EVERY, LAST = 20, 60
SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 16}
SHORT: dict[str, Any] = {"max_steps": LAST, "eval_every": EVERY, "log_every": 10, "eval_episodes": 1, "verbose": False}


class Fragile(PendulumEnv):
    """Pendulum; ``trouble`` is called at every reset with its number, counted over all of the process."""

    resets = 0
    trouble: Callable[[int], None] = staticmethod(lambda number: None)

    def reset(self, **options: Any) -> Any:
        Fragile.resets += 1
        Fragile.trouble(Fragile.resets)
        return super().reset(**options)


@pytest.fixture(autouse=True)
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fragile]]:
    gymnasium.register("Fragile-v0", Fragile, max_episode_steps=10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fragile, "resets", 0)
    monkeypatch.setattr(Fragile, "trouble", staticmethod(lambda number: None))
    yield Fragile
    del gymnasium.registry["Fragile-v0"]


@pytest.fixture
def data() -> Replay:
    return toy_replay(env_id="Fragile-v0")


def fails_at(*numbers: int) -> Any:
    def trouble(number: int) -> None:
        if number in numbers:
            raise RuntimeError("simulator exploded")

    return staticmethod(trouble)


def steps(folder: Path, table: str = "evals.csv") -> list[Any]:
    return [row["step"] for row in Table(folder / table).rows()]


@pytest.mark.parametrize("name", ["TD3BC", "WorldModel"])
def test_stopping_keeps_the_checkpoint_and_continuing_makes_up_for_it(
    name: str, data: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    made = method(name)
    made.run.eval_every = EVERY
    fit(made, data, LAST, one)
    if name == "TD3BC":
        monkeypatch.setattr(Fragile, "trouble", fails_at(Fragile.resets + 2))
    else:
        calls: list[int] = []

        def once(self: Any) -> dict[str, float]:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return usual(self)

        usual = type(made).held_out
        monkeypatch.setattr(type(made), "held_out", once)
    broken = method(name)
    broken.run.eval_every = EVERY
    with pytest.raises(
        EvaluationFailed, match=r"evaluation at update 40 failed: .*The checkpoint of this update is kept"
    ):
        fit(broken, data, LAST, two)
    path = newest_checkpoint(two)
    assert path is not None and path.name == "step=00000040.ckpt"
    assert steps(two) == [20] and steps(two, "metrics.csv") == [20, 40]
    assert "RuntimeError" in (two / "evaluation-error.txt").read_text()

    again = method(name)
    again.run.eval_every = EVERY
    fit(again, data, LAST, two, ckpt_path=path)
    assert not differences(run_files(one, LAST), run_files(two, LAST))
    states = [read_checkpoint(folder / "checkpoints" / "step=00000060.ckpt")["callbacks"] for folder in (one, two)]
    assert not differences(*states)


def test_a_process_that_dies_in_an_evaluation_loses_no_update(
    data: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fit(small(), data, LAST, one)
    child = os.fork()
    if child == 0:
        logging.disable()
        Fragile.resets, Fragile.trouble = 0, staticmethod(lambda number: os._exit(9) if number == 2 else None)
        fit(small(), data, LAST, two)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    path = newest_checkpoint(two)
    assert path is not None and path.name == "step=00000040.ckpt"
    fit(small(), data, LAST, two, ckpt_path=path)
    assert not differences(run_files(one, LAST), run_files(two, LAST))


def small() -> Any:
    made = method("BC")
    made.run.eval_every = EVERY
    return made


def test_skipping_goes_on_without_scores(
    data: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = op.fit(op.BC(**SMALL), data, folder="whole", **SHORT)
    monkeypatch.setattr(Fragile, "trouble", fails_at(Fragile.resets + 2))
    result = op.fit(op.BC(**SMALL), data, folder="skipping", eval_errors="skip", **SHORT)
    assert "goes on without it" in caplog.text and "simulator exploded" in caplog.text
    rows, expected = (Table(r.folder / "evals.csv").rows() for r in (result, whole))
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert "Fragile-v0 failed in the reset of episode 1" in str(rows[1]["error"])
    assert not [key for key in rows[1] if key.startswith("eval/")] and rows[1]["env"]
    assert rows[0] == expected[0]
    assert rows[2]["eval/return_mean"] == expected[2]["eval/return_mean"]  # in environments that were made anew
    parts = [read_checkpoint(newest_checkpoint(r.folder) or "") for r in (result, whole)]
    assert not differences(parts[0]["state_dict"], parts[1]["state_dict"])
    assert result.scores["return_mean"] == rows[2]["eval/return_mean"]

    monkeypatch.setattr(Fragile, "trouble", fails_at(*range(9999)))
    last = op.fit(op.BC(**SMALL), data, folder="never", eval_errors="skip", **SHORT | {"verbose": True})
    assert (
        last.scores == {}
        and [set(row) for row in Table(last.folder / "evals.csv").rows()]
        == [{"step", "error", "env", "score_kind"}] * 3
    )


def test_the_screen_tells_of_the_failed_evaluation(
    data: Replay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Fragile, "trouble", fails_at(3))
    op.fit(op.BC(**SMALL), data, eval_errors="skip", **SHORT | {"verbose": True})
    shown = capsys.readouterr()
    assert "the last evaluation failed, see evals.csv" in shown.out
    lines = shown.err.splitlines()
    assert any("40/60" in line and "return_mean" in line for line in lines)
    assert not any("60/60" in line and "return_mean" in line for line in lines)


def test_the_message_has_the_command_that_goes_on(data: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "trouble", fails_at(1))
    with pytest.raises(UsageError, match=r'eval_errors=skip.*offpolicy\.fit\(\.\.\., ckpt_path="here"\)') as caught:
        op.fit(op.BC(**SMALL), data, folder="here", **SHORT)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"`run\.eval_errors` is 'ignore'; expected 'stop' or 'skip'"):
        op.fit(op.BC(**SMALL), data, eval_errors="ignore", **SHORT)


def test_the_last_evaluation_is_made_when_a_finished_run_is_continued(
    data: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = op.fit(op.BC(**SMALL), data, folder="whole", **SHORT)
    monkeypatch.setattr(Fragile, "trouble", fails_at(Fragile.resets + 3))
    with pytest.raises(EvaluationFailed, match="update 60"):
        op.fit(op.BC(**SMALL), data, folder="late", **SHORT)
    done = op.fit(op.BC(**SMALL), data, ckpt_path="late", **SHORT)
    assert done.updates == LAST and done.scores == whole.scores
    assert Table(Path("late", "evals.csv")).rows() == Table(Path("whole", "evals.csv")).rows()
    again = op.fit(op.BC(**SMALL), data, ckpt_path="late", **SHORT)  # once
    assert again.scores == whole.scores and steps(Path("late")) == [20, 40, 60]


def test_the_last_evaluation_is_made_with_the_step_limit_that_is_given_now(
    data: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An episode without an end fails at the limit of the evaluator, and the run goes on with a limit."""
    np.savez("steps.npz", **data.steps, episode_end=np.arange(data.num_steps) % 10 == 9)
    monkeypatch.setattr(Fragile, "trouble", fails_at(3))
    with pytest.raises(EvaluationFailed, match="update 60"):
        op.fit(op.BC(**SMALL), op.load_data("steps.npz", env_id="Fragile-v0"), folder="late", **SHORT)
    limited = op.load_data("steps.npz", env_id="Fragile-v0", max_episode_steps=4)
    op.fit(op.BC(**SMALL), limited, ckpt_path="late", **SHORT)
    assert [row["eval/length_mean"] for row in Table(Path("late", "evals.csv")).rows()] == [10, 10, 4]


def test_a_plain_trainer_saves_when_an_evaluation_fails(
    data: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fragile, "trouble", fails_at(2))
    with pytest.raises(EvaluationFailed):
        fit(small(), data, LAST, default_root_dir=str(tmp_path))
    path = tmp_path / "checkpoints" / "step=00000040.ckpt"
    module = fit(small(), data, 40 + EVERY, ckpt_path=path)
    assert module.trainer.global_step == LAST


def test_the_best_checkpoint_stays_whatever_stopped_the_run(
    data: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluation is the first; the run stops in the evaluation of 40, and goes on far enough to prune."""
    values = iter([5.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(measurement, "summarize", lambda *_: {"return_mean": next(values)})
    monkeypatch.setattr(Fragile, "trouble", fails_at(2))
    with pytest.raises(EvaluationFailed):
        fit(small(), data, 100, tmp_path)
    fit(small(), data, 100, tmp_path, ckpt_path=newest_checkpoint(tmp_path))
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/*.ckpt"))
    assert kept == ["step=00000020.ckpt", "step=00000080.ckpt", "step=00000100.ckpt"]
    assert steps(tmp_path) == [20, 40, 60, 80, 100]
    assert [row["eval/return_mean_best"] for row in Table(tmp_path / "evals.csv").rows()] == [5.0] * 5
    states = read_checkpoint(tmp_path / "checkpoints" / "step=00000100.ckpt")["callbacks"]
    state = next(state for state in states.values() if "best_path" in state)
    assert state["best_path"] == "step=00000020.ckpt" and state["best_value"] == 5.0


def test_rewards_in_arrays_of_one_element_are_taken_in_training(data: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Fragile.step

    def in_array(self: Any, action: Any) -> Any:
        obs, reward, *rest = step(self, action)
        return (obs, np.array([reward]), *rest)

    plain = op.fit(op.BC(**SMALL), data, **SHORT).scores
    monkeypatch.setattr(Fragile, "step", in_array, raising=False)
    assert op.fit(op.BC(**SMALL), data, **SHORT).scores == plain
