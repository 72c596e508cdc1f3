"""Whole updates as compiled code equal those made operation by operation, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import METHODS, fit, method, toy_replay, weights

from offpolicy.compute.optim import FusedAdam, traceable_adam
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.training import compiled
from offpolicy.training.options import RunOptions

EAGER = {"IQL-dropout", "DecisionTransformer-dropout"}  # say so
QUICK = ("BC", "TD3BC", "IQL", "PRDC", "IQL-dropout")
IN_PART = {"PRDC", "PRDC-cached"}  # say so at their first search


@pytest.fixture(scope="module")
def replay() -> Replay:
    return toy_replay()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Updates are repeated from the noted operations, without the code generator, which takes half a minute."""
    calls: list[int] = []

    def repeat(graph: Any, tensors: Any) -> Callable[..., Any]:
        return lambda *given: calls.append(len(calls)) or graph(*given)

    monkeypatch.setattr(compiled, "compile_operations", repeat)
    return calls


def trained(name: str, replay: Replay, how: Any, seeds: tuple[int, ...] = (), graph: Any = "auto") -> Any:
    module = method(name)
    module.run.compile, module.seeds, module.run.graph = how, seeds, graph
    module.prepare(replay, max_steps=41)
    for t in range(0, 12, 4):
        module.run_block(t, 4)
    return module


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_compiled_updates_equal_eager_ones(
    name: str, replay: Replay, noted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    eager = trained(name, replay, False)
    caplog.clear()
    found = trained(name, replay, "update")
    for key, value in weights(eager).items():
        torch.testing.assert_close(weights(found)[key], value, rtol=1e-4, atol=1e-5)
    metrics = [module.meter.read(lambda x: x) for module in (eager, found)]
    assert metrics[0].keys() == metrics[1].keys()
    for key, number in metrics[0].items():
        assert metrics[1][key] == pytest.approx(number, rel=1e-3, abs=1e-4), key
    said = [r.getMessage() for r in caplog.records if "not compiled" in r.getMessage()]
    assert len(said) == (name in EAGER or name in IN_PART)
    assert len(noted) == (0 if name in EAGER else 1 if name in IN_PART else 12)


@pytest.mark.parametrize("name", ["TD3BC"])
def test_seeds_at_once_are_compiled_too(name: str, replay: Replay, noted: list[int]) -> None:
    runs = [trained(name, replay, how, seeds=(0, 3)) for how in (False, "update")]
    for key, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[key], value, rtol=1e-4, atol=1e-5)
    assert len(noted) == 12


def test_compiled_updates_can_be_tried_as_blocks_of_a_graph(replay: Replay, noted: list[int]) -> None:
    runs = [trained("TD3BC", replay, "update", graph=graph) for graph in ("auto", "dry")]
    assert len(noted) == 24
    for key, value in weights(runs[0]).items():
        assert torch.equal(weights(runs[1])[key], value), key


def test_resuming_and_precision(replay: Replay, noted: list[int], tmp_path: Path) -> None:
    """A run that was stopped goes on bit for bit; in bf16-mixed the casts are part of what was noted."""
    for precision in ("32-true", "bf16-mixed"):
        whole, eager, first, second = (method("TD3BC") for _ in range(4))
        for module, how in ((whole, "update"), (eager, False), (first, "update"), (second, "update")):
            module.run.compile, module.run.eval_episodes = how, 0
        fit(whole, replay, 12, precision=precision)
        fit(eager, replay, 12, precision=precision)
        path = tmp_path / f"{precision}.ckpt"
        fit(first, replay, 6, precision=precision).trainer.save_checkpoint(path)
        fit(second, replay, 12, precision=precision, ckpt_path=path)
        for key, value in weights(whole).items():
            assert torch.equal(weights(second)[key], value)
            torch.testing.assert_close(weights(eager)[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_by_parts_is_the_fused_kernel_up_to_rounding(decoupled: bool, decay: float) -> None:
    start = torch.randn(40, generator=torch.Generator().manual_seed(0))
    both = []
    for parts in (False, True):
        p = start.clone()
        optimizer = FusedAdam([p], weight_decay=decay, decoupled=decoupled)
        for step in range(5):
            lr = torch.tensor(0.01 * (step + 1), dtype=torch.float64) if step % 2 else 0.02
            if parts:
                with traceable_adam():
                    optimizer.apply([p], [(p + step).sin()], lr)
            else:
                optimizer.apply([p], [(p + step).sin()], lr)
        both.append(p)
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_code_is_made_anew_when_moments_are_replaced_or_options_change(replay: Replay, noted: list[int]) -> None:
    runs = []
    for how in (False, "update"):
        module = trained("TD3BC", replay, how)
        module._optimizers["critic"].load_state_dict(module._optimizers["critic"].state_dict())
        module.run_block(12, 8)
        module.hparams.tau = 0.5
        module.run_block(20, 8)
        runs.append(weights(module))
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-4, atol=1e-5)


def test_an_update_that_cannot_be_compiled_is_told_and_made(
    replay: Replay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: Any, tensors: Any) -> Any:
        raise RuntimeError("no C++ compiler was found.\nand more")

    monkeypatch.setattr(compiled, "compile_operations", fail)
    found, eager = trained("TD3BC", replay, "update"), trained("TD3BC", replay, False)
    for key, value in weights(eager).items():
        assert torch.equal(weights(found)[key], value)
    assert "compiling them failed with RuntimeError (no C++ compiler was found)" in caplog.text
    assert caplog.text.count("Updates are not compiled") == 1 and not FusedAdam.traceable


def test_what_run_compile_may_be() -> None:
    assert RunOptions(compile="true").compile is True and RunOptions(compile="update").compile == "update"
    with pytest.raises(UsageError, match=r"`run.compile` is 'loss'; expected true, false or 'update'"):
        RunOptions(compile="loss")


@pytest.mark.slow
def test_the_code_generator_gives_the_same_run(replay: Replay) -> None:
    runs = []
    for how in (False, "update"):
        module = method("BC")
        module.run.compile, module.run.eval_episodes = how, 0
        fit(module, replay, 8)
        runs.append(weights(module))
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "updates", "how", "told"),
    [("TD3BC", 100_000, False, True), ("TD3BC", 5_000, False, False), ("TD3BC", 100_000, "update", False),
     ("IQL-dropout", 100_000, False, False)],
)  # fmt: skip
def test_long_runs_on_a_cpu_are_told_of_it(name: str, updates: int, how: Any, told: bool) -> None:
    module = method(name)
    module.run.compile, module.has_dropout = how, "dropout" in name
    found = compiled.compile_advice(module, updates)
    assert bool(found) is told and all("--run.compile update" in note for note in found)
