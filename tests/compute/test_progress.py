"""Bars on the terminal, and lines where there is none."""

from __future__ import annotations

import sys

import pytest

from offpolicy.compute.progress import counting, terminal_bar


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with counting(1000, "trajectories") as tell:
        assert tell is not None
        for done in (256, 256, 512, 1024):
            tell(done)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"{n}/1,000 trajectories" for n in ("256", "512", "1,000")] and not shown.out
    with counting(0, "trajectories") as tell:
        assert tell is None


def test_a_bar_goes_to_the_error_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with counting(10, "trajectories") as tell:
        assert tell is not None
        tell(20)
    with terminal_bar("{task.fields[numbers]}") as bar:
        bar.add_task("", numbers="score 3")
    shown = capsys.readouterr()
    assert "10/10" in shown.err and "trajectories" in shown.err and "score 3" in shown.err and not shown.out
