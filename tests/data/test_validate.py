"""Every kind of fault and doubt, with its message; the report."""

from typing import Any

import numpy as np
import pytest

from offpolicy.data.report import report
from offpolicy.data.sources import from_arrays
from offpolicy.errors import DataError, UsageError


def arrays(episodes: int = 4, steps: int = 5, **changes: Any) -> dict[str, Any]:
    """Faultless data of a walk in two dimensions, actions in [-1, 1], cut by a time limit."""
    rng = np.random.default_rng(0)
    n = episodes * steps
    end = np.zeros(n, dtype=bool)
    end[steps - 1 :: steps] = True
    data = {
        "observations": rng.normal(size=(n, 2)).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, (n, 1)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, dtype=bool),
        "timeouts": end,
    }
    return {**data, **changes}


def message(data: dict[str, np.ndarray], **options: Any) -> str:
    with pytest.raises(DataError) as error:
        from_arrays(data, name="walks", **options)
    return str(error.value)


BOUNDS: dict[str, Any] = {"action_low": -1.0, "action_high": 1.0}


# -- structure ---------------------------------------------------------------------------------------------------------


def test_missing_key() -> None:
    data = arrays()
    del data["rewards"]
    text = message(data)
    assert "walks has no `rewards`" in text and "observations (20, 2)" in text and "Rename the keys" in text


def test_unequal_lengths_list_all_shapes() -> None:
    text = message(arrays(rewards=np.zeros(19)))
    assert "unequal lengths" in text and "rewards (19,)" in text and "actions (20, 1)" in text


@pytest.mark.parametrize(
    ("key", "column", "words"),
    [
        ("observations", np.zeros(20), "`observations` has shape (20,); expected (20, width). Reshape it to (20, 1)"),
        ("rewards", np.zeros((20, 2)), "`rewards` has shape (20, 2); expected (20,), one number per step"),
        ("actions", np.zeros(20), "`actions` has shape (20,); expected (rows, A). Reshape it to (rows, 1)"),
        ("actions", np.zeros((20, 1, 1)), "expected (rows, A). Flatten it per step"),
        ("next_observations", np.zeros((20, 3)), "`next_observations` has shape (20, 3) and `observations` (20, 2)"),
        ("observations", np.array(["a"] * 40).reshape(20, 2), "`observations` has type <U1; expected numbers"),
        ("terminals", np.full(20, 0.5), "`terminals` has 20 values other than 0 and 1 (first at row 0: 0.5)"),
    ],
)
def test_wrong_rank_or_type(key: str, column: np.ndarray, words: str) -> None:
    assert words in message({**arrays(), key: column})


@pytest.mark.parametrize(("env", "words"), [("Pendulum-v1", "`observations` is 2 wide; the environment has 3")])
def test_wrong_width_against_the_environment(env: str, words: str) -> None:
    assert words in message(arrays(), env_id=env)


def test_action_width_against_the_environment() -> None:
    data = arrays(observations=np.random.default_rng(0).normal(size=(20, 3)), actions=np.zeros((20, 2)))
    assert "`actions` is 2 wide; the environment has 1" in message(data, env_id="Pendulum-v1")


def test_empty() -> None:
    text = message({k: v[:0] for k, v in arrays().items()})
    assert "holds no steps" in text


def test_no_valid_transition() -> None:
    text = message(arrays(episodes=6, steps=1))
    assert "no transition to train on" in text and "next_observations" in text


def test_ambiguous_keys() -> None:
    assert "both `obs` and `observations`" in message(arrays(obs=np.zeros((20, 2))))
    data = arrays()
    data["dones"] = data.pop("terminals")
    del data["timeouts"]
    assert "`dones` does not say whether" in message(data)


def test_structural_faults_are_never_dropped() -> None:
    assert "unequal lengths" in message(arrays(rewards=np.zeros(19)), on_bad="drop_episode")


# -- content -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_stops_or_drops_the_episode(key: str, value: float) -> None:
    data = arrays()
    data["next_observations"] = data["observations"].copy()
    data[key] = data[key].copy()
    data[key][[7, 12]] = value
    text = message(data)
    assert f"walks: `{key}` has NaN or infinite values in 2 rows (first: row 7, episode 1)" in text
    assert "on_bad=drop_episode` to leave out the 2 of 4 episodes" in text
    replay = from_arrays(data, name="walks", on_bad="drop_episode")
    assert replay.start.tolist() == [0, 15]
    assert any("dropped 2 of 4 episodes (10 rows)" in w for w in replay.meta["warnings"])
    assert np.isfinite(replay.returns()).all()


def test_not_finite_is_fine_elsewhere() -> None:
    replay = from_arrays(arrays(behaviour_logp=np.full(20, np.nan)))
    assert replay.length.sum() == 20 and np.isnan(replay.steps["behaviour_logp"]).all()


def test_all_episodes_faulty() -> None:
    data = arrays()
    data["rewards"][:] = np.nan
    text = message(data, on_bad="drop_episode")
    assert "every episode is faulty" in text and "`rewards` has NaN or infinite values in 20 rows" in text


def test_several_faults_are_reported_together() -> None:
    data = arrays()
    data["rewards"][3] = np.nan
    data["observations"][8] = np.inf
    text = message(data)
    assert "`rewards` has NaN" in text and "`observations` has NaN" in text


def test_action_outside_the_bounds() -> None:
    data = arrays()
    data["actions"][6] = 1.3
    text = message(data, **BOUNDS)
    assert "`actions` has values outside [-1, 1] in 1 row (first: row 6, episode 1)" in text
    assert "clip_actions=true" in text
    clipped = from_arrays(data, clip_actions=True, **BOUNDS)
    assert clipped.steps["action"][6] == 1.0
    assert data["actions"][6] == np.float32(1.3)  # the caller's array is untouched
    assert "clipped the actions of 1 row to [-1, 1]" in clipped.meta["notes"]
    assert from_arrays(data, on_bad="drop_episode", **BOUNDS).num_episodes == 3


def test_action_outside_by_rounding_is_clipped_and_counted() -> None:
    data = arrays()
    data["actions"][6] = 1.0001  # 1e-4 of the range of 2 is 2e-4
    replay = from_arrays(data, **BOUNDS)
    assert replay.steps["action"][6] == 1.0
    assert any("1 row outside [-1, 1] by rounding only" in n for n in replay.meta["notes"])


def test_actions_exactly_on_a_bound_are_counted_not_changed() -> None:
    data = arrays()
    data["actions"][[1, 2]] = [[1.0], [-1.0]]
    replay = from_arrays(data, **BOUNDS)
    assert replay.steps["action"][1] == 1.0 and replay.steps["action"][2] == -1.0
    assert any(n.startswith("actions exactly on a bound: 2 rows;") for n in replay.meta["notes"])


def test_bounds_of_the_data_when_no_environment_is_known() -> None:
    data = arrays()
    replay = from_arrays(data)
    assert replay.meta["action_bounds"] == "data"
    assert replay.meta["action_low"] == [float(data["actions"].min())]
    assert "(of the data, as no environment is known)" in str(report(replay))


def test_bounds_of_the_data_leave_out_dropped_episodes() -> None:
    data = arrays()
    data["actions"][6] = 50.0
    data["rewards"][6] = np.nan
    assert from_arrays(data, on_bad="drop_episode").meta["action_high"][0] < 1.0


def test_unfinished_last_episode_is_kept_as_cut() -> None:
    data = {k: v[:18] for k, v in arrays().items()}
    replay = from_arrays(data)
    assert replay.length.tolist() == [5, 5, 5, 3]
    assert any("1 unfinished episode without an end mark" in n for n in replay.meta["notes"])
    assert not replay.steps["terminated"].any()


def test_terminated_wins_over_truncated() -> None:
    data = arrays()
    data["terminals"][4] = True
    replay = from_arrays(data)
    assert replay.steps["terminated"][4] and 4 in replay.usable_rows()
    assert any("terminated and truncated at once: 1 episode, taken" in n for n in replay.meta["notes"])


def test_one_step_episodes() -> None:
    data = arrays()
    data["terminals"][5] = True
    replay = from_arrays(data)
    assert replay.length.tolist() == [5, 1, 4, 5, 5]
    assert 5 in replay.usable_rows()
    assert any("1 episode of one step" in n for n in replay.meta["notes"])


def test_position_jump() -> None:
    data = arrays(episodes=2, steps=50)
    data["observations"] = np.cumsum(np.full((100, 2), 0.1, dtype=np.float32), axis=0)
    data["observations"][30:] += 100.0
    replay = from_arrays(data)
    assert any("inside episodes: 1 step (largest" in w and "row 29" in w for w in replay.meta["warnings"])
    data["observations"][30:50] -= 100.0  # the same jump where an episode ends is no jump
    assert not any("jump" in w for w in from_arrays(data).meta["warnings"])


def test_constant_reward() -> None:
    assert any("all rewards are 0" in w for w in from_arrays(arrays(rewards=np.zeros(20))).meta["warnings"])


def test_duplicate_episodes() -> None:
    data = arrays()
    for key in ("observations", "actions", "rewards"):
        data[key][10:15] = data[key][0:5]
    assert any("as another one: 1 episode;" in w for w in from_arrays(data).meta["warnings"])
    assert not from_arrays(arrays()).meta["warnings"]


@pytest.mark.parametrize(
    ("value", "found"), [(1.5, "values outside the 2 discrete actions"), (2, "values outside the 2")]
)
def test_discrete_actions(value: float, found: str) -> None:
    rng = np.random.default_rng(0)
    data = arrays(observations=rng.normal(size=(20, 4)), actions=rng.integers(0, 2, 20).astype(np.float64))
    replay = from_arrays(data, env_id="CartPole-v1")
    assert replay.meta["action_n"] == 2 and replay.steps["action"].dtype == np.int64
    data["actions"][9] = value
    text = message(data, env_id="CartPole-v1")
    assert found in text and "first: row 9, episode 1" in text


def test_unknown_option_values() -> None:
    with pytest.raises(UsageError, match="expected 'error' or 'drop_episode'"):
        from_arrays(arrays(), on_bad="ignore")


# -- report ------------------------------------------------------------------------------------------------------------


def test_report_has_the_numbers_and_prints_them() -> None:
    data = arrays()
    data["terminals"][4] = True
    data["observations"] = data["observations"].astype(np.float64)
    replay = from_arrays(data, name="walks", ref_min_score=0.0, ref_max_score=10.0, **BOUNDS)
    shown = report(replay, fingerprint=True)
    assert (shown.rows, shown.episodes, shown.usable, shown.terminated) == (20, 4, 17, 1)
    assert shown.length == (5.0, 5.0, 5.0)
    returns = data["rewards"].astype(np.float64).reshape(4, 5).sum(1)
    assert shown.returns is not None and shown.reward is not None
    np.testing.assert_allclose(shown.returns, (returns.min(), returns.mean(), returns.max()))
    np.testing.assert_allclose(
        shown.reward, (data["rewards"].min(), data["rewards"].mean(), data["rewards"].max()), rtol=1e-6
    )
    assert shown.source_dtypes == {"obs": "float64"}
    assert shown.fingerprint == replay.fingerprint()
    text = str(shown)
    for words in ("20 in 4 episodes", "1 terminated, 3 truncated", "[-1, 1] (as given)", "obs float32 (20, 2)", "walk"):
        assert words in text
    filtered = report(replay.filter([0, 2]))
    assert (filtered.rows, filtered.terminated) == (10, 1) and filtered.returns is not None
    np.testing.assert_allclose(
        filtered.returns, (returns[[0, 2]].min(), returns[[0, 2]].mean(), returns[[0, 2]].max()), rtol=1e-6
    )
