"""Threads that wait for each other beside other work: noticed, and said once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offpolicy
from offpolicy.compute import threads
from offpolicy.data.replay import Replay
from offpolicy.training import callbacks

SAID = "Several threads slow training down here"


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


def train(replay: Replay, folder: Path) -> None:
    method = offpolicy.BC(hidden_dims=(4,))
    offpolicy.fit(method, replay, max_steps=4, folder=folder, block=1, eval_episodes=0, verbose=False)


def test_said_once(monkeypatch, caplog, two_threads, replay: Replay, tmp_path: Path) -> None:
    displaced = iter(range(0, 10_000, 100))
    monkeypatch.setattr(callbacks, "times_displaced", lambda: next(displaced))
    monkeypatch.setattr(callbacks.ThreadWatch, "pause", 0.0)
    monkeypatch.setattr(threads, "product_seconds", lambda n: 0.002 * n**2)
    train(replay, tmp_path)
    said = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert len(said) == 1
    assert "8 ms on 2 threads and 2 ms on 1" in said[0] and "--run.threads 1" in said[0]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("step", "together"), [(100, 0.002), (0, 1.0)], ids=["threads help", "nothing displaces us"])
def test_not_said(monkeypatch, caplog, two_threads, replay: Replay, tmp_path: Path, step, together) -> None:
    displaced = iter(range(0, 10_000, step) if step else [0] * 100)
    monkeypatch.setattr(callbacks, "times_displaced", lambda: next(displaced))
    monkeypatch.setattr(callbacks.ThreadWatch, "pause", 0.0)
    monkeypatch.setattr(threads, "product_seconds", lambda n: 0.002 if n == 1 else together)
    train(replay, tmp_path)
    assert SAID not in caplog.text


def test_one_thread_is_never_looked_at(monkeypatch, replay: Replay, tmp_path: Path) -> None:
    monkeypatch.setattr(callbacks.ThreadWatch, "displaced", 0)
    monkeypatch.setattr(callbacks, "threads_in_the_way", lambda: pytest.fail("looked"))
    train(replay, tmp_path)


def test_a_measurement_leaves_the_threads_as_they_were(two_threads) -> None:
    assert threads.product_seconds(1) > 0 and torch.get_num_threads() == 2
