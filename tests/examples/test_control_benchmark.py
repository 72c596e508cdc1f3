"""The benchmark of control methods: rates by both clocks, and the table and chart made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.benchmarks import control


def test_rates_are_those_of_all_stretches_and_of_the_fast_ones() -> None:
    """Stretches of 10 updates in 1, 2, 1 and 4 s (8 s in all), of which the processor worked 5 s."""
    marks = [(0, 0.0, 0.0), (10, 1.0, 1.0), (20, 3.0, 2.0), (30, 4.0, 3.0), (40, 8.0, 5.0)]
    assert control.rates(marks) == {"updates_per_s": 5.0, "updates_per_cpu_s": 8.0, "undisturbed": 10.0}


def test_the_table_shows_processor_time_with_one_thread_and_time_with_more(tmp_path: Path) -> None:
    rates = {"trainer": 100.0, "plain": 50.0}
    row = {"method": "IQL", "updates_per_s": rates, "trainer_over": {"plain": 2.0}}
    one = row | {"threads": 1, "updates_per_cpu_s": {"trainer": 90.0, "plain": 60.0}, "cpu_over": {"plain": 1.5}}
    assert control.table([one, row | {"threads": 2}]).splitlines() == [
        "| updates/s | trainer | plain |",
        "|---|---|---|",
        "| IQL, 1 thread, per CPU second | 90 | 60 (1.50) |",
        "| IQL, 2 threads | 100 | 50 (2.00) |",
    ]
    pytest.importorskip("matplotlib")
    control.draw([one, row | {"threads": 2}], str(tmp_path / "rates.png"))
    assert (tmp_path / "rates.png").stat().st_size > 1000
