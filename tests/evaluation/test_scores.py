import gymnasium
import numpy as np
import pytest
from scipy.stats import t as student

from offpolicy.errors import UsageError
from offpolicy.evaluation.rollout import EvalResult
from offpolicy.evaluation.scores import (
    interval,
    normalized_score,
    score_kind,
    simulator_note,
    simulator_version,
    summarize,
)

RESULT = EvalResult(np.array([10.0, 20.0, 60.0]), np.array([5, 7, 9]), np.array([True, False, True]))
GYMNASIUM = f"gymnasium {gymnasium.__version__}"


def test_normalized_score_is_on_the_100_scale():
    """100 · (10 - 0)/40 = 25, 100 · (20 - 0)/40 = 50, 100 · 60/40 = 150."""
    np.testing.assert_allclose(normalized_score(RESULT.returns, 0.0, 40.0), [25.0, 50.0, 150.0])
    # hopper: random -20.272305, expert 3234.3
    np.testing.assert_allclose(normalized_score(3234.3, -20.272305, 3234.3), 100.0)


@pytest.mark.parametrize("refs", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_impossible_reference_scores(refs):
    with pytest.raises(UsageError, match="expected the smaller first"):
        normalized_score(1.0, *refs)


def test_summarize():
    """Mean 30; deviations -20, -10, 30: variance 1400/3."""
    numbers = summarize(RESULT, {"ref_min_score": 0.0, "ref_max_score": 40.0})
    std = np.sqrt(1400 / 3)
    assert numbers == pytest.approx(
        {
            "return_mean": 30.0,
            "return_std": std,
            "length_mean": 7.0,
            "score": 75.0,
            "score_std": std * 2.5,
            "success_rate": 2 / 3,
        }
    )
    assert all(type(v) is float for v in numbers.values())


@pytest.mark.parametrize("meta", [{}, {"ref_min_score": 0.0}, {"ref_min_score": None, "ref_max_score": None}])
def test_no_score_without_references(meta):
    assert set(summarize(RESULT._replace(success=None), meta)) == {"return_mean", "return_std", "length_mean"}


def test_interval_is_students_t():
    """n = 3: 4.302653 · s/√3 with s = √700."""
    assert interval(RESULT.returns) == pytest.approx(4.3026527 * np.sqrt(700) / np.sqrt(3), rel=1e-6)
    low, high = student.interval(0.9, 2, 30.0, np.sqrt(700 / 3))
    assert 2 * interval(RESULT.returns, level=0.9) == pytest.approx(high - low)
    assert np.isnan(interval(np.array([1.0])))


def test_simulator_version():
    assert simulator_version("Pendulum-v1") == f"Pendulum-v1 on {GYMNASIUM}"
    assert simulator_version("Nothing-v0") == "Nothing-v0 (not installed)"


def test_simulator_version_names_mujoco():
    mujoco = pytest.importorskip("mujoco")
    assert simulator_version("Hopper-v4") == f"Hopper-v4 on mujoco {mujoco.__version__}"


def test_simulator_version_of_another_package(monkeypatch):
    spec = type("Spec", (), {"entry_point": "gymnasium_robotics.envs.maze:Maze"})
    monkeypatch.setattr(gymnasium, "spec", lambda env_id: spec)
    versions = {"gymnasium-robotics": "1.4.2", "mujoco": "3.11.0"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    assert simulator_version("Maze-v3") == "Maze-v3 on gymnasium-robotics 1.4.2, mujoco 3.11.0"


def test_score_kind():
    refs = {"ref_min_score": 0.0, "ref_max_score": 1.0, "score_kind": "d4rl-normalised"}
    assert score_kind({**refs, "env_id": "Pendulum-v1"}) == f"d4rl-normalised, Pendulum-v1 on {GYMNASIUM}"
    assert score_kind(refs) == "d4rl-normalised"
    assert (
        score_kind({"score_kind": "d4rl-normalised", "env_id": "Pendulum-v1"}) == f"return, Pendulum-v1 on {GYMNASIUM}"
    )
    assert score_kind({}) == "return"


def test_d4rl_scores_are_called_approximate():
    note = simulator_note({"source": "d4rl", "env_id": "Pendulum-v1"})
    assert note is not None and "approximate" in note and GYMNASIUM in note
    assert simulator_note({"source": "made", "env_id": "Pendulum-v1"}) is None
    assert simulator_note({"source": "d4rl"}) is None
