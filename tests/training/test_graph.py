"""Blocks of updates as graphs: recorded and repeated without Python, they are the updates made one by one.

No CUDA device is needed: :mod:`recorded` repeats the operations of a block on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import recorded
import torch
from counting import collect
from toy import METHODS, differences, fit, method, run_files, toy_replay, weights

from lightning_modules.td3bc import TD3BC
from offpolicy.compute import devices
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.training import graph
from offpolicy.training.offline import OfflineModule
from offpolicy.training.options import RunOptions

EAGER = {"IQL-dropout", "DecisionTransformer-dropout"}  # say so
AT_HOST = {"PRDC", "PRDC-cached"}  # on the CPU their search asks how many pairs are left
BLOCKS = [(0, 6), (6, 6), (12, 6), (18, 3), (21, 3), (24, 1)]  # (updates before, updates)
LONG = [(t, 6) for t in range(0, 36, 6)]


@pytest.fixture(scope="module")
def replay() -> Replay:
    return toy_replay()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[recorded.Recorder]:
    """The CPU as a device with graphs."""
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "GraphRecorder", recorded.Recorder)
    recorded.Recorder.made = recorded.Recorder.repeated = 0
    return recorded.Recorder


def state(module: OfflineModule) -> dict[str, Any]:
    optimizers = {name: optimizer.state_dict() for name, optimizer in module._optimizers.items()}
    return {"weights": weights(module), "optimizers": optimizers, "meter": module.meter.read(lambda x: x)}


def trained(
    name: str, replay: Replay, mode: Any, blocks: Any = BLOCKS, seeds: tuple[int, ...] = (), **options: Any
) -> OfflineModule:
    module = method(name, **options)
    module.run.graph, module.seeds = mode, seeds
    module.prepare(replay, max_steps=41)
    for t, k in blocks:
        module.run_block(t, k)
    assert module.updates == sum(blocks[-1])
    return module


@pytest.mark.parametrize("name", METHODS)
def test_recorded_blocks_are_the_updates_one_by_one(
    name: str, replay: Replay, graphs: type[recorded.Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    """Of three blocks of six updates the second is recorded; the two of three may have different phases."""
    one_by_one = state(trained(name, replay, False))
    caplog.clear()
    found, dry = trained(name, replay, "auto"), trained(name, replay, "dry")
    assert not differences(one_by_one, state(found)) and not differences(one_by_one, state(dry))
    told = {r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()}
    if name in EAGER:
        assert graphs.made == 0 and "dropout" in told.pop() and not told
    elif name in AT_HOST:
        assert graphs.made == 0 and "recording them failed with RuntimeError" in told.pop() and not told
    else:
        assert 1 <= graphs.made <= 2 and graphs.repeated == 1 + graphs.made and not told


@pytest.mark.parametrize("name", ["TD3BC", "IQL", "A2PR", "ODICE", "CQL", "HIQL", "EDAC"])
def test_with_two_seeds(name: str, replay: Replay, graphs: type[recorded.Recorder]) -> None:
    results = [state(trained(name, replay, mode, seeds=(0, 3))) for mode in (False, "auto", "dry")]
    assert graphs.repeated and not differences(results[0], results[1]) and not differences(results[0], results[2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TD3BC", {"policy_freq": 4}),  # phases differ from block to block
        ("ReBRAC", {"policy_freq": 6}),
        ("CQL", {"bc_steps": 9}),  # in the midst of a block
        ("IQL", {"lr_decay_steps": 20}),
        ("TrajectoryDiffusion", {"ema_every": 5}),
        ("AWAC", {"max_grad_norm": 0.1}),
    ],
)
def test_phases_and_schedules(
    name: str, options: dict[str, Any], replay: Replay, graphs: type[recorded.Recorder]
) -> None:
    one_by_one, found = (state(trained(name, replay, mode, LONG, **options)) for mode in (False, "auto"))
    assert graphs.made and not differences(one_by_one, found)


@pytest.mark.parametrize("name", ["TD3BC", "IQL"])
def test_whole_runs_and_resumed_ones(name: str, replay: Replay, graphs: type[recorded.Recorder], tmp_path: Any) -> None:
    """Files of a run, with blocks cut by rows, evaluations and the checkpoint that it goes on from."""
    for mode in (False, "auto", "dry"):
        module = method(name)
        module.run.block, module.run.graph = 8, mode
        fit(module, replay, 90, tmp_path / str(mode))
    again = method(name)
    again.run.block = 8
    fit(again, replay, 90, tmp_path / "again", tmp_path / "auto" / "checkpoints" / "step=00000045.ckpt")
    assert graphs.repeated
    expected = run_files(tmp_path / "False", 90)
    assert not differences(expected, run_files(tmp_path / "auto", 90))
    assert not differences(expected, run_files(tmp_path / "dry", 90))
    resumed = run_files(tmp_path / "again", 90)
    parts = ("state_dict", "optimizer_states")
    assert not differences({k: expected[k] for k in parts}, {k: resumed[k] for k in parts})


def test_in_mixed_precision(replay: Replay, graphs: type[recorded.Recorder]) -> None:
    results = []
    for mode in (False, "auto"):
        module = method("TD3BC")
        module.run.block, module.run.graph, module.run.eval_episodes = 5, mode, 0
        fit(module, replay, 40, precision="bf16-mixed")
        results.append(weights(module))
    assert graphs.repeated and not differences(*results)


# -- what a graph would freeze -----------------------------------------------------------------------------------------


class Own(OfflineModule):
    """A method of a user's: one number towards one, in a way of its own."""

    def __init__(self, use: Callable[[Any, int], Any] = lambda self, step: 1.0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="use")
        self.use, self.seed, self.count = use, 0, 0

    def build(self, sizes: Any) -> None:
        self.right = torch.nn.Parameter(torch.zeros(1, 1))

    def learning_rates(self) -> dict[str, Any]:
        return {"right": lambda step: 0.1 / step}

    def update(self, batch: Any, step: int) -> dict[str, torch.Tensor]:
        loss = (self.right - 1.0).square().mean() * self.use(self, step)
        self.step("right", loss)
        return {"loss": loss.detach()}


class Unnumbered(Own):
    """The same with an update that leaves its number alone."""

    def update(self, batch: Any, step: int) -> dict[str, torch.Tensor]:
        loss = (self.right - 1.0).square().mean() * self.use(self, 0)
        self.step("right", loss)
        return {"loss": loss.detach()}


def counting(self: Any, step: int) -> float:
    self.count += 1
    return 1.0 + self.count


USES: dict[str, Callable[[Any, int], Any]] = {
    "a condition": lambda self, step: 2.0 if step % 2 else 1.0,
    "a comparison": lambda self, step: 2.0 if step > 9 else 1.0,
    "a function": lambda self, step: math.cos(step),
    "a product with a tensor": lambda self, step: torch.ones(()) * step,
    "a tensor of it": lambda self, step: torch.full((), step, dtype=torch.float32),
    "a table": lambda self, step: {2: 2.0}.get(step, 1.0),
    "a factor": lambda self, step: 0.5 * step,
}


@pytest.mark.parametrize("use", USES)
def test_a_method_that_reads_its_update_without_a_phase_runs_eagerly(
    use: str, replay: Replay, graphs: type[recorded.Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for mode in (False, "auto"):
        module = Own(USES[use])
        module.run.graph = mode
        module.prepare(replay, max_steps=20)
        for t in (0, 5, 10, 15):
            module.run_block(t, 5)
        results.append(weights(module))
    assert not differences(*results) and not graphs.made
    (record,) = [r for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert "`update` of Own uses the number of the update" in record.getMessage()
    assert "Define `phase(step)`" in record.getMessage()


def test_a_loss_that_asks_for_the_update_runs_eagerly(
    replay: Replay, graphs: type[recorded.Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for mode in (False, "auto"):
        module = Unnumbered(lambda self, _: 0.5 * self.updates)
        module.run.graph = mode
        module.prepare(replay)
        for t in (0, 5, 10, 15):
            module.run_block(t, 5)
        results.append(weights(module))
    assert not differences(*results) and not graphs.made
    assert caplog.text.count("uses the number of the update") == 1
    module = Unnumbered().prepare(replay)
    for t in (0, 5, 10, 15):
        module.run_block(t, 5)
    assert graphs.repeated == 3


def test_values_of_python_that_an_update_changes_are_named(
    replay: Replay, graphs: type[recorded.Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    module = Unnumbered(counting).prepare(replay)
    for t in (0, 5, 10):
        module.run_block(t, 5)
    assert module.count == 15 and not graphs.made
    assert "an update of Unnumbered changes `count`, a value of Python" in caplog.text
    assert caplog.text.count("CUDA graphs") == 1


def test_a_phase_belongs_to_the_update_of_its_class(replay: Replay, graphs: type[recorded.Recorder]) -> None:
    class Mine(TD3BC):
        def update(self, batch: Any, step: int) -> Any:
            found = super().update(batch, step)
            return found | ({"tenth": found["q_mean"]} if step % 10 == 0 else {})

    class Declared(Mine):
        def phase(self, step: int) -> Any:
            return super().phase(step), step % 10 == 0

    for kind, made in ((Mine, 0), (Declared, 1)):
        module = kind(batch_size=16, hidden_dims=(8, 8)).prepare(replay)
        for t in range(0, 60, 20):
            module.run_block(t, 20)
        assert graphs.made == made and module.meter.counts["tenth"] == 6


@pytest.mark.parametrize("value", [[1], torch.zeros(())])
def test_a_phase_that_cannot_be_compared_is_refused(value: Any, replay: Replay) -> None:
    class Mine(Own):
        def phase(self, step: int) -> Any:
            return value

    with pytest.raises(UsageError, match=r"`phase` of Mine gives a \w+; expected a plain value"):
        Mine().prepare(replay)


def test_a_recording_that_fails_leaves_no_trace(
    replay: Replay, graphs: type[recorded.Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    """The method asks for a value once its moments are there, as some search of a user's might."""
    results = []
    for mode in (False, "auto"):
        module = Unnumbered(lambda self, step: float(self.right.detach().sum().item()) + 2.0)
        module.run.graph = mode
        module.prepare(replay, max_steps=20)
        for t in (0, 5, 10, 15):
            module.run_block(t, 5)
        results.append(state(module))
    assert not differences(*results)
    (record,) = [r for r in caplog.records if "CUDA graphs" in r.getMessage()]
    message = record.getMessage()
    assert "recording them failed with RuntimeError (operation not permitted when stream is capturing" in message
    assert "and more" not in message


# -- when graphs are recorded ------------------------------------------------------------------------------------------


def changed(module: Any, replay: Replay, how: str) -> None:
    if how == "moments":
        for optimizer in module._optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())
    elif how == "data":
        module.bind(replay)
    elif how == "hyperparameters":
        module.hparams.alpha = 0.5
    elif how == "seed":
        module.seed = 4


@pytest.mark.parametrize("how", ["moments", "data", "hyperparameters", "seed"])
def test_graphs_are_recorded_anew(how: str, replay: Replay, graphs: type[recorded.Recorder]) -> None:
    results, other = [], toy_replay(seed=1)
    for mode in (False, "auto"):
        module = method("TD3BC")
        module.run.graph = mode
        module.prepare(replay)
        for t in range(0, 48, 6):
            if t == 24:
                changed(module, other, how)
            module.run_block(t, 6)
        results.append(state(module))
    assert graphs.made == 2 and graphs.repeated == 6 and not differences(*results)


def test_the_number_of_graphs_is_bounded(
    replay: Replay,
    graphs: type[recorded.Recorder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(graph, "GRAPHS", 2)
    results = []
    for mode in (False, "auto"):
        module, t = method("TD3BC"), 0
        module.run.graph = mode
        module.prepare(replay)
        for _ in range(3):
            for k in (2, 4, 6, 8):
                module.run_block(t, k)
                t += k
        results.append(state(module))
    assert graphs.made == 2 and not differences(*results)
    assert caplog.text.count("there are more than 2 kinds of blocks") == 1


def test_several_processes_and_data_at_the_host_run_eagerly(
    replay: Replay, graphs: type[recorded.Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = method("TD3BC").prepare(replay)
    assert graph.why_eager(module) == ""
    module.bound.device = torch.device("meta")
    assert "read from the memory of the host" in graph.why_eager(module)
    monkeypatch.setattr(type(module), "world_size", 2)
    assert graph.why_eager(module) == "gradients are averaged over 2 processes"


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_are_checked_before_training(replay: Replay) -> None:
    for given, kept in ((True, True), ("true", True), ("false", False), ("dry", "dry"), ("auto", "auto")):
        assert RunOptions(graph=given).graph is kept or RunOptions(graph=given).graph == kept
    for wrong in ("yes", 1, None):
        with pytest.raises(UsageError, match=r"`run.graph` is .*; expected 'auto', true, false or 'dry'"):
            RunOptions(graph=wrong)  # type: ignore[arg-type]
    module = method("BC")
    module.run.graph = True
    with pytest.raises(UsageError, match=r"`run.graph` is true, and the device is cpu; expected a CUDA device"):
        fit(module, replay, 10)


def test_the_first_screen_says_how_updates_are_made(replay: Replay, graphs: type[recorded.Recorder]) -> None:
    module: Any = method("TD3BC").prepare(replay)
    assert module._blocks.facts() == [("blocks", "up to 64 updates, as one CUDA graph")]
    module.run.graph = False
    module.bind(replay)
    assert module._blocks.facts() == [("blocks", "updates one by one, not as CUDA graphs: `run.graph` is false")]


def test_the_clock_counts_work_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator that needs 2 s for a block, told within 1 s; between two blocks the host is busy for 5 s.

    Ten updates in blocks of five: the second block begins 6 s after the first, and is done 2 s later, so 8 s count.
    """
    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    done_at = [0.0]

    def finish(device: torch.device) -> None:
        now[0] = max(now[0], done_at[0])

    monkeypatch.setattr(devices, "finish_work", finish)
    for kind, seconds in (("cuda", 8.0), ("cpu", 2.0)):
        watch, device, now[0], done_at[0] = devices.Stopwatch(), torch.device(kind), 0.0, 0.0
        for _ in range(2):
            watch.start()
            done_at[0] = now[0] + 2.0 if kind == "cuda" else 0.0
            now[0] += 1.0
            watch.updates += 5
            watch.stop(device, wait=False)
            if watch.updates == 5:
                now[0] += 5.0
        watch.stop(device, wait=True)
        now[0] += 100.0  # an evaluation
        assert watch.read() == pytest.approx(10 / seconds)


def test_a_graph_stays_while_data_are_collected(graphs: type[recorded.Recorder], tmp_path: Any) -> None:
    """Four rounds of ten updates: the first runs by itself, the second is recorded, and three times it is repeated."""
    found = {}
    for mode in (False, True):
        result = collect(tmp_path / str(mode), eval_every=0, graph=mode)
        found[mode] = run_files(result.folder, result.updates)["state_dict"]
    assert (graphs.made, graphs.repeated) == (1, 3)
    assert not differences(found[False], found[True])
