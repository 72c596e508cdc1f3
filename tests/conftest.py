from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_replay

from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.training import curves, run_folder

os.fsync = lambda handle: None  # a test loses no power, and its short run would wait for the disk a dozen times
run_folder.plot_curves = lambda *_: None  # the picture of a run takes longer than most runs here; `drawn` has it


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Several workers begin with the slow tests, so that none is left with a long one at the end, and with
    ``--dist loadgroup`` what the tests of a file share is made by one of them."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        for item in items:
            made = [found[-1].scope for found in item._fixtureinfo.name2fixturedefs.values()]
            if "module" in made and not item.get_closest_marker("xdist_group"):
                item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One sentence where tests with vLLM were left out, as skipped tests say nothing."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any("OFFPOLICY_VLLM_PYTHON" in str(report.longrepr) for report in skipped):
        terminalreporter.write_line("vLLM was not tried: OFFPOLICY_VLLM_PYTHON names no interpreter that has it.")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads, and tests share the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with the picture of their curves."""
    monkeypatch.setattr(run_folder, "plot_curves", curves.plot_curves)


@pytest.fixture(scope="session")
def replay() -> Replay:
    """30 episodes of 10 random steps with the sizes of Pendulum; see `toy.toy_replay`."""
    return toy_replay()


@pytest.fixture
def data(replay: Replay) -> DataModule:
    return DataModule.of(replay)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model; see `tiny.make_policy`."""
    from tiny import make_policy

    return make_policy(tmp_path_factory.mktemp("tiny") / "policy")
