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
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{use}\n")
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "OWN_CGROUPS", tmp_path / "nothing")
    monkeypatch.setattr(room, "_of_machine", lambda: 1 << 50)
    assert room.available_memory() == min(found, 1 << 50) == room.free_memory(torch.device("cpu"))


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_of_a_scheduler_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of 900 bytes in a node's group of 5,000: 900 − 700 and 200 of pages that files can give back."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    for folder, limit, use in ((root / "job", 900, 700), (root, 5000, 1000)):
        (folder / "step").mkdir(parents=True, exist_ok=True)
        for name, count in zip(names, (limit, use), strict=True):
            (folder / f"memory.{name}").write_text(f"{count}\n")
        pages = "total_inactive_file" if version == 1 else "inactive_file"
        (folder / "memory.stat").write_text(f"anon 3\n{pages} 200\n")
    (tmp_path / "own").write_text("9:name=systemd:/\n4:cpu,memory:/job/step\n" if version == 1 else "0::/job/step\n")
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "OWN_CGROUPS", tmp_path / "own")
    assert room._of_container() == 400


def test_a_device_that_does_not_tell_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < room.available_memory() < room.NO_LIMIT
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert room.free_memory(torch.device("cuda", 0)) == 7
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert room.free_memory(torch.device("cuda", 0)) == room.NO_LIMIT
