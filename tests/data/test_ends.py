"""Ends of episodes under any name, cuts that nobody marked, and marks that contradict each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import h5py
import made_data
import numpy as np
import pytest

from offpolicy.data.replay import Replay
from offpolicy.data.report import report
from offpolicy.data.sources import from_arrays, open_source
from offpolicy.errors import DataError

N, EPISODE = 40, 10
END = np.arange(N) % EPISODE == EPISODE - 1
TERMINATED = np.arange(N) == 9  # one real terminal, so that nothing is doubted for want of any
NUMBER = np.arange(N) // EPISODE


walks = partial(made_data.walks, N, terminated=TERMINATED)  # four episodes of ten steps, the first of which terminates


def words(replay: Replay) -> str:
    return " ".join([*replay.meta["notes"], *replay.meta["warnings"]])


LAST = (
    "episode_terminals",
    "episode_ends",
    "is_last",
    "ends",
    "isLast",
    "end_of_episode",
    "trajectory_ends",
    "Is-Final",
)
CUT = ("timeout", "truncateds", "is_truncated", "time_limit", "Truncated")
NUMBERS = ("episode_id", "traj_id", "episode_index", "trajectory_ids", "episode", "episode_indices", "EpisodeNumber")
MARKS: dict[str, np.ndarray] = {
    **dict.fromkeys(LAST, END),
    **dict.fromkeys(CUT, END & ~TERMINATED),
    **dict.fromkeys(NUMBERS, NUMBER),
    **dict.fromkeys(("is_first", "episode_starts", "first", "new_episode"), np.roll(END, 1)),
    "dones": END,
    "trajectory_id": np.array([f"walk {k}" for k in NUMBER]),
    "traj_ids": np.array([f"walk {k}" for k in NUMBER], dtype=object),
    "ends_as_floats": END.astype(np.float64)[:, None],
}


@pytest.mark.parametrize("name", MARKS)
def test_ends_are_understood_with_a_word(name: str) -> None:
    given = "is_last" if name == "ends_as_floats" else name
    replay = from_arrays(walks(**{given: MARKS[name]}))
    assert replay.length.tolist() == [EPISODE] * 4 and f"`{given}`" in words(replay)
    assert np.flatnonzero(replay.steps["terminated"]).tolist() == [9]
    assert given not in replay.steps or given in NUMBERS  # numbers of episodes stay columns


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("episode_ends", [10, 20, 30, 40]),
        ("episode_ends", [9, 19, 29, 39]),
        ("episode_starts", [0, 10, 20, 30]),
        ("episode_lengths", [10, 10, 10, 10]),
        ("traj_lengths", [10, 10, 10, 10]),
    ],
)
def test_row_numbers_and_lengths_are_understood(name: str, numbers: list[int], tmp_path: Path) -> None:
    data = walks(**{name: np.array(numbers)})
    assert from_arrays(data).length.tolist() == [EPISODE] * 4
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, column in data.items():
            file[key] = column
    assert open_source(tmp_path / "a.hdf5").length.tolist() == [EPISODE] * 4


@pytest.mark.parametrize("name", ["is_last", "episode_id", "episode_starts", "timeout", "trajectory_id"])
def test_files_are_read_alike(name: str, tmp_path: Path) -> None:
    data = walks(**{name: MARKS[name]})
    np.savez(tmp_path / "a.npz", **data)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, column in data.items():
            file[key] = column.astype("S") if column.dtype.kind == "U" else column
    for path in ("a.npz", "a.hdf5"):
        replay = open_source(tmp_path / path)
        assert replay.length.tolist() == [EPISODE] * 4 and f"`{name}`" in words(replay)


def test_is_terminal_and_done_beside_a_time_limit() -> None:
    """RLDS's three flags; and `dones` with `timeouts`: what is done and not timed out is terminated."""
    flags = {"is_first": np.roll(END, 1), "is_last": END, "is_terminal": TERMINATED}
    rlds = from_arrays(walks(terminated=None, **flags))
    gym = from_arrays(walks(terminated=None, dones=END, timeouts=END & ~TERMINATED))
    for replay in (rlds, gym):
        assert replay.length.tolist() == [EPISODE] * 4
        assert np.flatnonzero(replay.steps["terminated"]).tolist() == [9]


OTHER = np.roll(END, 3)


@pytest.mark.parametrize(
    ("marks", "text"),
    [
        ({"is_last": END, "episode_id": np.arange(N) // 8}, "`is_last` and `episode_id` tell different ends"),
        ({"is_last": END, "is_first": np.roll(END, 2)}, "`is_last` and `is_first` tell different ends"),
        ({"is_last": END, "ends": OTHER}, "`is_last` and `ends` both mark the last step"),
        ({"timeouts": OTHER, "truncated": END}, "both mark the steps after which the episode was cut"),
        ({"is_last": END, "timeouts": OTHER}, "`timeouts` is 1 at row 2, where the episode goes on by `is_last`"),
        ({"episode_id": NUMBER, "terminated": np.arange(N) == 4}, "`terminated` is 1 at row 4, where the episode"),
        ({"episode_id": np.arange(N) % 4}, "do not lie together"),
        ({"masks": ~OTHER}, "`masks` should be 0 where `terminated` is 1"),
        ({"dones": np.zeros(N, bool)}, "`dones` and the other marks of ends differ, first at row 9"),
        ({"terminated": None, "dones": END, "timeouts": END | OTHER}, "`dones` is 1 at some cuts of `timeouts`"),
        ({"terminated": None, "dones": END}, "`dones` does not say whether"),
        ({"terminated": None, "is_last": END, "done": END}, "`done` does not say whether"),
        ({"is_last": np.full(N, 2.0)}, "`is_last` has 40 values other than 0 and 1"),
        ({"episode_terminals": END[:-1]}, "`episode_terminals` has shape (39,); expected (40,)"),
    ],
)
def test_contradictions_are_refused(marks: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as error:
        from_arrays(walks(**marks))
    assert text in str(error.value)


def test_columns_of_another_meaning_are_left_alone() -> None:
    """Ordinary words are no marks where the numbers do not fit."""
    rng = np.random.default_rng(0)
    others = {
        "start": rng.normal(size=(N, 2)),
        "end": rng.normal(size=N),
        "mask": np.ones((N, 4)),
        "last": rng.random(N),
    }
    replay = from_arrays(walks(timeouts=END, **others))
    assert others.keys() <= replay.steps.keys() and replay.num_episodes == 4
    assert not replay.meta["warnings"]


def test_a_column_of_another_meaning_is_no_substitute_for_marks() -> None:
    with pytest.raises(DataError, match="has no `terminals`"):
        from_arrays(walks(terminated=None, last=np.random.default_rng(0).random(N)))


def test_numbers_that_start_again_are_fine_where_other_marks_agree() -> None:
    assert from_arrays(walks(episode_id=NUMBER % 2, episode_end=END)).num_episodes == 4


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("my_end_flag", END),
        ("episode_reset", END),
        ("traj_done_marker", END.astype(int)),
        ("endsAt", np.array([9, 19])),
    ],
)
def test_columns_that_look_like_ends_are_warned_of(name: str, column: np.ndarray) -> None:
    assert any(f"`{name}`" in w and "not used" in w for w in from_arrays(walks(**{name: column})).meta["warnings"])


def test_a_step_counter_that_restarts_is_warned_of() -> None:
    replay = from_arrays(walks(timestep=np.arange(N) % EPISODE))
    assert any("`timestep` at 2 rows (first: 19)" in w for w in replay.meta["warnings"])
    assert not from_arrays(walks(timestep=np.arange(N) % EPISODE, episode_end=END)).meta["warnings"]


# -- ends that nobody marked -------------------------------------------------------------------------------------------


def with_next(data: dict[str, Any]) -> dict[str, Any]:
    """Next observations of ten-step episodes, whose last one is nobody's observation."""
    rng = np.random.default_rng(1)
    following = np.roll(data["obs"], -1, axis=0)
    following[END] = rng.normal(size=(4, 3))
    return {**data, "next_obs": following.astype(np.float32)}


def test_next_observations_cut_what_they_contradict() -> None:
    replay = from_arrays(with_next(walks()))
    assert replay.length.tolist() == [EPISODE] * 4
    assert "cut at the 2 steps whose `next_obs` is not the next row's observation" in words(replay)
    assert len(replay.usable_rows()) == N


def test_rounding_is_no_contradiction() -> None:
    data = with_next(walks(episode_end=END))
    del data["episode_end"]
    data["next_obs"] = data["next_obs"].astype(np.float16).astype(np.float32)
    coarse = from_arrays({**data, "obs": data["obs"].astype(np.float16)})
    assert coarse.length.tolist() == [EPISODE] * 4
    data = walks(terminated=END)
    data["next_obs"] = np.roll(data["obs"], -1, axis=0) * np.float32(1 + 1e-6)
    assert from_arrays(data).length.tolist() == [EPISODE] * 4


def test_single_transitions_are_episodes_of_one_step() -> None:
    data = walks(next_obs=np.random.default_rng(2).normal(size=(N, 3)))
    replay = from_arrays(data)
    assert replay.num_episodes == N and "most rows are episodes of one step" in words(replay)


def test_invisible_time_limits_are_mentioned() -> None:
    replay = from_arrays(walks())
    assert replay.length.tolist() == [10, 30]
    assert any("the 2 episodes come from `terminated` alone" in n for n in replay.meta["notes"])


def test_data_as_the_readme_asks_load_without_a_word() -> None:
    """`episode_end` at every last step, terminated or not, is no truncation."""
    rng = np.random.default_rng(0)
    readme = {
        "obs": rng.normal(size=(5000, 3)),
        "action": rng.uniform(-2, 2, size=(5000, 1)),
        "reward": rng.normal(size=5000),
        "terminated": np.zeros(5000, bool),
        "episode_end": np.arange(5000) % 100 == 99,
    }
    for data in (readme, walks(episode_end=END), with_next(walks(episode_end=END))):
        replay = from_arrays(data)
        assert replay.meta["notes"] == [] and replay.meta["warnings"] == []
    assert "4,950 usable transitions (50 steps without a known successor)" in str(report(from_arrays(readme)))
