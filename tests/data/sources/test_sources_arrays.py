"""Flat columns from memory and from .npz."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offpolicy.data.sources import from_arrays, open_source
from offpolicy.errors import DataError, UsageError


def walks(n: int = 12, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    data = {
        "observations": rng.normal(size=(n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, dtype=bool),
    }
    return {**data, **changes}


def flags(n: int, *rows: int) -> np.ndarray:
    column = np.zeros(n, dtype=bool)
    column[list(rows)] = True
    return column


def test_both_sets_of_names_give_the_same_replay() -> None:
    data = walks(timeouts=flags(12, 5), next_observations=np.zeros((12, 3), np.float32))
    ours = dict(zip(("obs", "action", "reward", "terminated", "episode_end", "next_obs"), data.values()))
    assert from_arrays(data).fingerprint() == from_arrays(ours).fingerprint()
    assert from_arrays(**ours).fingerprint() == from_arrays(data).fingerprint()


def test_float32_columns_are_shared_and_others_cast() -> None:
    data = walks()
    assert from_arrays(data).steps["obs"] is data["observations"]
    wide = from_arrays({k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in data.items()})
    assert wide.steps["obs"].dtype == np.float32
    assert wide.meta["source_dtypes"] == {"obs": "float64", "action": "float64", "reward": "float64"}


def test_lists_and_tensors_are_taken() -> None:
    import torch

    data = {k: v.tolist() for k, v in walks().items()}
    data["observations"] = torch.tensor(data["observations"])
    assert from_arrays(data).num_steps == 12


def test_columns_of_one_and_flags_of_any_type() -> None:
    data = walks(rewards=walks()["rewards"][:, None], terminals=flags(12, 3).astype(np.float64)[:, None])
    replay = from_arrays(data)
    assert replay.steps["reward"].shape == (12,)
    assert replay.steps["terminated"].dtype == bool and replay.length.tolist() == [4, 8]


def test_masks_are_the_inverse_of_terminals() -> None:
    data = walks()
    del data["terminals"]
    replay = from_arrays(data, masks=(~flags(12, 3)).astype(np.float32))
    assert np.flatnonzero(replay.steps["terminated"]).tolist() == [3]


def test_user_columns_are_kept() -> None:
    replay = from_arrays(walks(), weights=np.arange(12.0), note=np.array(["x"] * 12))
    assert replay.steps["weights"].tolist() == list(range(12))
    assert "note" not in replay.steps and any("`note`" in n for n in replay.meta["notes"])


def test_images_stay_bytes() -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    replay = from_arrays(walks(observations=images))
    assert replay.steps["obs"].dtype == np.uint8 and replay.steps["obs"].shape == (12, 8, 8, 3)


@pytest.mark.parametrize("seed", range(20))
def test_episodes_against_the_obvious_loop(seed: int) -> None:
    """Random end marks; an episode ends where a row is terminal or cut, and the rest is one more episode."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    terminals, timeouts = rng.random(n) < 0.2, rng.random(n) < 0.2
    timeouts[1], terminals[1] = True, False  # something can be learned from row 0
    start, length, first = [], [], 0
    for i in range(n):
        if terminals[i] or timeouts[i] or i == n - 1:
            start.append(first)
            length.append(i + 1 - first)
            first = i + 1
    replay = from_arrays(walks(n, terminals=terminals, timeouts=timeouts))
    assert replay.start.tolist() == start and replay.length.tolist() == length


@pytest.mark.parametrize("seed", range(10))
def test_cutting_at_the_step_limit_against_the_obvious_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, limit = 50, int(rng.integers(2, 9))
    terminals = rng.random(n) < 0.1
    ends, t = [], 0
    for i in range(n):
        t += 1
        if terminals[i] or t == limit or i == n - 1:
            ends.append(i)
            t = 0
    replay = from_arrays(walks(n, terminals=terminals), max_episode_steps=limit)
    assert replay.end.tolist() == ends
    assert any(f"cut after {limit} steps" in note for note in replay.meta["notes"])


def test_one_long_episode_is_doubted() -> None:
    assert any("taken as one episode" in w for w in from_arrays(walks()).meta["warnings"])


# -- the last step before a cut ----------------------------------------------------------------------------------------


def test_without_next_observations_the_last_step_of_a_cut_episode_is_not_drawn() -> None:
    data = walks(timeouts=flags(12, 3), terminals=flags(12, 7))
    assert from_arrays(data).usable_rows().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert from_arrays(data, timeout_step="drop").usable_rows().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_with_next_observations_it_is_kept_unless_dropped() -> None:
    following = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    data = walks(timeouts=flags(12, 3), terminals=flags(12, 7), next_observations=following)
    assert len(from_arrays(data).usable_rows()) == 12
    assert len(from_arrays(data, timeout_step="keep").usable_rows()) == 12
    assert from_arrays(data, timeout_step="drop").usable_rows().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("stored", [False, True])
def test_a_state_may_follow_itself(stored: bool) -> None:
    following = np.full((12, 3), 9.0, dtype=np.float32)
    data = walks(timeouts=flags(12, 3)) | ({"next_observations": following} if stored else {})
    replay = from_arrays(data, timeout_step="self")
    assert len(replay.usable_rows()) == 12
    for row in (3, 11):
        np.testing.assert_array_equal(replay.next_obs(np.array([row]))[0], data["observations"][row])
    assert (following == 9.0).all()  # the caller's array is untouched


def test_keeping_needs_next_observations() -> None:
    with pytest.raises(UsageError, match="no successor to keep"):
        from_arrays(walks(timeouts=flags(12, 3)), timeout_step="keep")
    with pytest.raises(UsageError, match="expected one of drop, keep, self"):
        from_arrays(walks(), timeout_step="throw")


# -- environment -------------------------------------------------------------------------------------------------------


def test_an_environment_gives_bounds_and_step_limit() -> None:
    data = walks(actions=np.random.default_rng(0).uniform(-2, 2, (12, 1)))
    replay = from_arrays(data, env_id="Pendulum-v1")
    assert replay.meta["action_low"] == [-2.0] and replay.meta["action_bounds"] == "environment"
    assert replay.meta["env_id"] == "Pendulum-v1" and replay.meta["max_episode_steps"] == 200


def test_an_unknown_environment_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'Pendulum-v1'\?"):
        from_arrays(walks(), env_id="Pendulm-v1")


def test_given_bounds() -> None:
    replay = from_arrays(walks(), action_low=-3.0, action_high=[2.0, 4.0])
    assert replay.meta["action_low"] == [-3.0, -3.0] and replay.meta["action_high"] == [2.0, 4.0]
    with pytest.raises(UsageError, match="expected both or none"):
        from_arrays(walks(), action_low=-3.0)


# -- .npz --------------------------------------------------------------------------------------------------------------


def test_npz(tmp_path: Path) -> None:
    data = walks(timeouts=flags(12, 5))
    np.savez(tmp_path / "walks.npz", **data)
    replay = open_source(tmp_path / "walks.npz")
    assert replay.fingerprint() == from_arrays(data).fingerprint()
    assert replay.meta["name"] == "walks" and len(replay.meta["sha256"]) == 64


def test_pickled_content_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **walks(), infos=np.array([{}] * 12, dtype=object))
    with pytest.raises(DataError, match=r"`infos` is not a plain array .* Pickled objects are never read"):
        open_source(tmp_path / "a.npz")


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **walks(4000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated or damaged"):
        open_source(path)
    middle = len(whole) // 4
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(DataError, match="`observations` cannot be read"):
        open_source(path)
    path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(DataError, match="looks like a web page"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        open_source(path)
