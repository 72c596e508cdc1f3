"""The benchmark of CUDA graphs runs without a GPU, where its forms are the same updates."""

from __future__ import annotations

import pytest
from toy import toy_replay

from examples.benchmarks import graphs
from offpolicy.data.replay import Replay


def test_forms_of_updates_are_compared() -> None:
    replay: Replay = toy_replay()
    options = {"hidden_dims": (8, 8), "batch_size": 8}
    (row,) = graphs.measured(["TD3BC"], replay, ["eager", "dry"], 2, 64, **options)
    assert list(row["updates_per_s"]) == ["eager", "dry", "dry, 2 seeds"]
    assert min(row["updates_per_s"].values()) > 0
    assert row["difference"] == {"eager": 0.0, "dry": 0.0} and not row["reason"]
    assert "| TD3BC |" in graphs.table([row])


@pytest.mark.parametrize("form", graphs.FORMS)
def test_forms_are_values_of_the_option(form: str) -> None:
    from offpolicy.training.options import RunOptions

    assert RunOptions(graph=graphs.FORMS[form]).graph == graphs.FORMS[form]
