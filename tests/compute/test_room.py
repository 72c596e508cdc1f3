"""How much memory there is: the least of what the machine, a container and a device tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offpolicy.compute import room


@pytest.mark.parametrize(
    ("limit", "use", "found"), [("5000", "2000", 3000), ("5000", "9000", 0), ("max", "2000", room.NO_LIMIT)]
)
def test_the_limit_of_a_container_counts(
    limit: str, use: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text(f"{limit}\n")
    (tmp_path / "current").write_text(f"{use}\n")
    monkeypatch.setattr(room, "CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    monkeypatch.setattr(room, "_of_machine", lambda: 1 << 50)
    assert room.available_memory() == min(found, 1 << 50) == room.free_memory(torch.device("cpu"))


def test_a_device_that_does_not_tell_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < room.available_memory() < room.NO_LIMIT
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert room.free_memory(torch.device("cuda", 0)) == 7
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert room.free_memory(torch.device("cuda", 0)) == room.NO_LIMIT
