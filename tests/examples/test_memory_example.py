"""The example on memory: its table at a small size, and a run that is measured in a copy of the process."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest

from examples import memory


@pytest.mark.slow
def test_the_table_and_the_measure_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("peft")
    shape = {"model_type": "llama", **memory.TINY, "num_key_value_heads": 2}
    monkeypatch.setattr(memory, "SHAPES", {"tiny": shape})
    names = list(memory.SETTINGS)
    monkeypatch.setattr(memory, "SETTINGS", {name: memory.SETTINGS[name] for name in (names[0], names[2])})
    found = memory.estimates()
    memory.print_estimates(found)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[0] == "| setting | tiny |" and " + " in rows[3]
    if not sys.platform.startswith("linux"):
        return
    monkeypatch.setattr(memory.room, "SMALL", 0)
    one = memory.in_copy(partial(memory.peak_of, memory.TINY, {}))
    assert one["measured"] > one["estimate"] > one["parts"]["weights"] > 0
