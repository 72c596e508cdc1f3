"""Updates without a Trainer: the calls that are missing are named, rates follow the update, shapes are checked."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import method, toy_replay, weights

import offpolicy as op
from offpolicy.api import python_config
from offpolicy.data.replay import Replay
from offpolicy.data.views import Transitions
from offpolicy.errors import DataError, UsageError


@pytest.fixture(scope="module")
def replay() -> Replay:
    return toy_replay()


def bare_batch() -> Transitions:
    g = torch.Generator().manual_seed(0)
    return Transitions(
        torch.randn(8, 3, generator=g),
        torch.rand(8, 1, generator=g),
        torch.randn(8, generator=g),
        torch.randn(8, 3, generator=g),
        torch.zeros(8, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", ["TD3BC", "IQL", "HIQL", "DecisionTransformer", "TrajectoryDiffusion"])
def test_drawn_batches_and_single_updates_equal_a_block(name: str, replay: Replay) -> None:
    block, single = (method(name).prepare(replay, max_steps=30) for _ in range(2))
    block.run_block(0, 5)
    for t in range(5):
        (batch,) = single.draw(t, 1)
        single.update(batch, t + 1)
    assert single.updates == block.updates == 5
    assert all(torch.equal(value, weights(single)[key]) for key, value in weights(block).items())


def test_an_update_has_the_rate_of_its_number(replay: Replay) -> None:
    """Adam's first step is the rate itself: ½(1 + cos(π·49/100))·lr at update 50 of 100."""
    moved = {}
    for step in (1, 50):
        module: Any = method("IQL", actor_lr=1e-3).prepare(replay, max_steps=100)
        before = module.actor.log_std.detach().clone()
        module.update(module.draw(0, 1)[0], step)
        moved[step] = float((module.actor.log_std - before).abs())
    assert moved[1] == pytest.approx(1e-3, rel=1e-4)
    assert moved[50] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 0.49)), rel=1e-4)


def test_a_rate_without_a_horizon_is_told(replay: Replay, caplog: pytest.LogCaptureFixture) -> None:
    assert method("IQL").prepare(replay, max_steps=40).decay_steps == 40  # type: ignore[attr-defined]
    assert method("TrajectoryDiffusion").prepare(replay, max_steps=40).decay_steps == 40  # type: ignore[attr-defined]
    assert method("IQL", lr_decay_steps=7).prepare(replay).decay_steps == 7  # type: ignore[attr-defined]
    assert not [r for r in caplog.records if "lr_decay_steps" in r.getMessage()]
    module: Any = method("IQL").prepare(replay)
    (record,) = [r for r in caplog.records if "lr_decay_steps" in r.getMessage()]
    assert "the rate stays constant. Pass `max_steps` to `prepare`" in record.getMessage()
    assert module.decayed_actor_lr(10**6) == module.hparams.actor_lr
    with pytest.raises(UsageError, match="`max_steps` is 0; expected a value in"):
        method("IQL").prepare(replay, max_steps=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.act(np.zeros(3)),
        lambda m: m.update(bare_batch(), 1),
        lambda m: m.log_prob(torch.zeros(3), torch.zeros(1)),
        lambda m: m.configure_optimizers(),
        lambda m: m.step("actor", torch.zeros(())),
        lambda m: m.save("unwritten.ckpt"),
    ],
)
def test_before_there_are_networks_the_call_is_named(call: Any) -> None:
    with pytest.raises(UsageError, match=r"TD3BC has no networks yet; expected a trained .*`prepare\(replay\)`"):
        call(method("TD3BC"))


def test_other_calls_that_are_missing_are_named(replay: Replay) -> None:
    for call in (lambda m: m.run_block(0, 1), lambda m: m.draw(0, 1)):
        with pytest.raises(UsageError, match=r"no data to draw batches from; .*Call `prepare\(replay\)` first"):
            call(method("TD3BC"))
    with pytest.raises(UsageError, match="HIQL has no networks yet"):
        method("HIQL").act_goal(np.zeros(3), np.zeros(3))  # type: ignore[attr-defined]
    built: Any = method("TD3BC").initialize(op.Sizes(3, 1))
    loss = sum(p.sum() for p in built.critic.parameters())
    for call in (lambda: built.update(bare_batch(), 1), lambda: built.step("critic", loss)):
        with pytest.raises(UsageError, match=r"no optimisers yet, .*`configure_optimizers\(\)` after"):
            call()
    ready = method("TD3BC").prepare(replay)
    with pytest.raises(UsageError, match=r"the batch has no noise `target`; TD3BC needs target. Take batches of `draw"):
        ready.update(bare_batch(), 1)
    with pytest.raises(UsageError, match="`nobody` is no network or parameter of TD3BC; expected a name"):
        ready.step("nobody", torch.zeros(()))
    with pytest.raises(UsageError, match="`target_actor` has no learning rate; expected one of critic, actor"):
        ready.step("target_actor", grads=[torch.zeros_like(p) for p in ready.params("actor")])
    for wrong in (None, {"obs": np.zeros((3, 2))}):
        with pytest.raises(UsageError, match=r"`replay` is a \w+; expected a Replay or a DataModule"):
            method("BC").prepare(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["BC", "TD3BC", "IQL", "PRDC", "ODICE", "HIQL", "OTA-clipped", "DecisionTransformer"])
def test_a_column_beside_the_rows_is_refused(name: str, replay: Replay) -> None:
    """(B, 1) beside (B,) would become (B, B) in a loss."""
    module = method(name).prepare(replay)
    (batch,) = module.draw(0, 1)
    endings = ("reward", "terminated", "mask", "full", "return_to_go")
    fields = [k for k, v in batch._asdict().items() if isinstance(v, torch.Tensor) and k.endswith(endings)]
    assert fields
    for field in fields:
        with pytest.raises(UsageError, match=rf"`{field}` of the batch has shape .*one number per row. Pass `{field}"):
            module.update(batch._replace(**{field: getattr(batch, field).unsqueeze(-1)}), 1)
    with pytest.raises(UsageError, match=r"`obs` of the batch has shape \(3, .*the same rows"):
        module.update(batch._replace(obs=batch.obs[:3]), 1)
    with pytest.raises(UsageError, match=r"`action` of the batch has shape \(\d+,\); expected \(B, A\)"):
        module.update(batch._replace(action=batch.action.flatten()), 1)


@pytest.mark.parametrize("name", ["reward", "terminated"])
def test_a_replay_refuses_such_columns(name: str, replay: Replay) -> None:
    steps = {**replay.steps, name: np.asarray(replay.steps[name])[:, None]}
    with pytest.raises(DataError, match=rf"`{name}` has shape \(300, 1\); expected \(300,\), one number per step"):
        Replay(steps, start=replay.start, length=replay.length)


def test_everything_can_be_imported_at_once() -> None:
    names: dict[str, Any] = {}
    exec("from offpolicy import *", names)
    assert names["TD3BC"] is op.TD3BC and names["DPO"] is op.DPO and names["Replay"] is Replay
    assert callable(names["fit"]) and {"load", "load_data", "evaluate", "UsageError"} <= names.keys()
    light = "import sys, offpolicy; assert not {'lightning', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_a_method_and_texts_show_themselves(replay: Replay, tmp_path: Path) -> None:
    module = method("TD3BC")
    assert repr(module).startswith("TD3BC: no networks yet\n  alpha=2.5, discount=0.99")
    module.seeds = (0, 3)
    module.prepare(replay).run_block(0, 2)
    first, *rest = repr(module).splitlines()
    assert first == "TD3BC: observation 3, action 1, seeds (0, 3), data toy, update 2, 710 trained parameters"
    assert len(rest) < 6 and "hidden_dims=(8, 8)" in "".join(rest)
    assert repr(op.DPO(policy="some/model")).startswith("DPO: no networks yet\n  policy='some/model', lr=")


def test_settings_of_a_run_keep_lists_and_dicts(replay: Replay) -> None:
    options = {"devices": [0, 1], "limit": np.int64(3), "inner": {"a": (1, 2.5)}, "folder": Path("there"), "none": None}
    module = method("BC").prepare(replay)
    text = python_config(module, op.load_data(replay), 10, options | {"strategy": object(), "callbacks": [object()]})
    assert text.startswith("# Objects cannot stand here; the run also had trainer.strategy, trainer.callbacks.\n")
    import yaml

    kept = yaml.safe_load(text)
    wanted = {"devices": [0, 1], "limit": 3, "inner": {"a": [1, 2.5]}, "folder": "there", "max_steps": 10}
    assert kept["trainer"] == wanted and kept["model"]["init_args"]["hidden_dims"] == [8, 8]
    assert not python_config(module, op.load_data(replay), 10, {"devices": 1}).startswith("#")
