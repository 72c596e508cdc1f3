"""The contract of `OfflineModule`, point by point."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import METHODS, Rows, differences, fit, method, quiet, toy_replay, weights

from lightning_modules.iql import IQL
from lightning_modules.td3bc import TD3BC
from offpolicy.compute.optim import clip_per_seed
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError
from offpolicy.nn.stacked import Linear
from offpolicy.training.checkpoints import read_checkpoint
from offpolicy.training.meter import Meter
from offpolicy.training.offline import OfflineModule, Sizes
from offpolicy.training.options import RunOptions


class Tiny(OfflineModule):
    """Fits two numbers: `left` to 0 and `right` to 1, the second at a rate that changes with the update."""

    def __init__(self, right_lr: Any = None, max_grad_norm: float | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="right_lr")
        self.right_lr = right_lr or (lambda step: 0.1 / step)
        self.seed = 0
        self.run.eval_episodes = 0
        self.steps: list[int] = []

    def build(self, sizes: Sizes) -> None:
        self.left, self.right = Linear(sizes.obs_dim, 1), nn.Parameter(torch.zeros(1, 1))

    def learning_rates(self) -> dict[str, Any]:
        return {"left": 0.01, "right": self.right_lr}

    def update(self, batch: Any, step: int) -> dict[str, Tensor]:
        self.steps.append(step)
        loss = self.left(batch.obs).square().mean() + (self.right - 1.0).square().mean()
        self.step("left", loss)
        self.step("right", (self.right - 1.0).square().mean())
        return {"loss": loss.detach()}

    def policy(self, obs: Tensor) -> Tensor:
        return self.left(obs).tanh()


# -- one update = one batch = one global_step ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_block_length_never_matters(name: str, replay: Replay) -> None:
    results = []
    for block in (1, 3, 64):
        module, rows = method(name), Rows()
        module.run.block, module.run.log_every, module.run.eval_every = block, 8, 14
        fit(module, replay, 20, callbacks=[rows])
        results.append({"weights": weights(module), "rows": rows.rows})
    assert [row["step"] for row in results[0]["rows"]] == [8, 16, 20]
    assert not differences(results[0], results[1]) and not differences(results[0], results[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BC", "TD3BC", "IQL"])  # one, two and three optimisers
def test_global_step_counts_updates(name: str, replay: Replay, tmp_path: Any) -> None:
    module = method(name)
    module.run.eval_every, module.run.log_every = 0, 1000
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(trainer.global_step)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=150, save_top_k=-1, filename="{step}")
    trainer = quiet(400, [saving, Watch()], enable_checkpointing=True)
    trainer.fit(module, DataModule.of(replay))
    assert trainer.global_step == 400
    assert seen == [64, 128, 150, 214, 278, 300, 364, 400]
    assert sorted(os.listdir(tmp_path)) == ["step=150.ckpt", "step=300.ckpt"]
    assert read_checkpoint(tmp_path / "step=150.ckpt")["offpolicy"]["updates"] == 150


def test_updates_are_numbered_from_one_without_a_gap(replay: Replay) -> None:
    module = Tiny()
    module.run.block = 7
    fit(module, replay, 30)
    assert module.steps == list(range(1, 31))


def test_fast_dev_run_is_one_update(replay: Replay) -> None:
    module = Tiny()
    fit(module, replay, 30, fast_dev_run=True)
    assert module.steps == [1]


@pytest.mark.slow
def test_no_value_is_read_inside_a_block(replay: Replay) -> None:
    """Reading a number back would make a GPU wait; every such read goes through one of two operators."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    for name in METHODS:
        module = method(name).prepare(replay)
        module.run_block(0, 2)
        # dropout reads its seed from a tensor on the CPU; on the CPU the lists of PRDC are compared by their length
        if not module.has_dropout and not name.startswith("PRDC"):
            with NoReading():
                module.run_block(2, 4)


def test_evaluation_never_changes_training(replay: Replay) -> None:
    results = []
    for episodes in (0, 2):
        module, rows = method("IQL-dropout"), Rows()
        module.run.eval_episodes = episodes
        fit(module, replay, 90, callbacks=[rows])
        assert bool(module.eval_row) == bool(episodes)
        results.append({"weights": weights(module), "rows": rows.rows})
    assert not differences(*results)


def test_learning_curves_reach_the_trainer(replay: Replay) -> None:
    module = fit(method("TD3BC"), replay, 45)
    assert {"train/critic_loss", "train/q_mean", "eval/return_mean"} <= module.trainer.callback_metrics.keys()
    assert module.metric_row["step"] == module.eval_row["step"] == 45 and module.metric_row["perf/updates_per_s"] > 0
    assert module.metric_row["perf/peak_memory_mb"] > 10


def test_metrics_are_means_over_their_own_updates_and_keep_no_graph() -> None:
    """`actor_loss` comes every second time: (1 + 2 + 3)/3 = 2 and (5 + 7)/2 = 6."""
    meter, x = Meter(), torch.ones((), requires_grad=True)
    for critic, actor in ((1.0, 5.0), (2.0, None), (3.0, 7.0)):
        meter.add({"critic_loss": x * critic} | ({} if actor is None else {"actor_loss": x * actor}))
    assert not any(total.requires_grad for total in meter.sums.values())
    assert meter.read(lambda means: means) == {"critic_loss": 2.0, "actor_loss": 6.0}
    assert meter.read(lambda means: means) == {}


def test_metrics_of_several_processes_are_resumed_by_rank() -> None:
    """Each of two processes takes its own sums; one process takes their mean, (1 + 3)/2."""
    states = [{"sums": {"loss": torch.tensor(v)}, "counts": {"loss": 2}} for v in (1.0, 3.0)]
    found = []
    for rank, world_size in ((0, 2), (1, 2), (0, 1)):
        meter = Meter()
        meter.load_state_dict(states, rank, world_size)
        found.append(meter.read(lambda means: means)["loss"])
    assert found == [0.5, 1.5, 1.0]


# -- steps of an update ----------------------------------------------------------------------------------------------


def ready(module: OfflineModule) -> OfflineModule:
    module.initialize(Sizes(3, 1), seed=0)
    module.double().configure_optimizers()
    module.updates = 1
    return module


def test_a_step_touches_its_network_only() -> None:
    module = ready(Tiny())
    before = weights(module)
    loss = module.left(torch.ones(4, 3).double()).square().mean() + module.right.square().mean()
    module.step("left", loss)
    after = weights(module)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"left.weight", "left.bias"}
    assert all(p.grad is None for p in module.parameters())


def test_step_by_gradients_equals_step_by_loss() -> None:
    one, two = ready(Tiny()), ready(Tiny())
    obs = torch.randn(4, 3, dtype=torch.float64)
    one.step("left", one.left(obs).square().mean())
    loss = two.left(obs).square().mean()
    two.step("left", grads=list(torch.autograd.grad(loss, two.params("left"))))
    assert not differences(weights(one), weights(two))


def test_learning_rate_is_a_function_of_the_update(replay: Replay) -> None:
    """The gradient of `right` keeps its sign, so Adam moves it by about its rate: 0.1/t at update t.

    Σ 0.1/t over t = 1 … 5 is 0.2283; with g₁ = −2 and later ones a little smaller, Adam's step is within 2 % of that.
    """
    for block in (1, 64):
        module = Tiny()
        module.run.block = block
        fit(module, replay, 5)
        assert float(module.right.detach()) == pytest.approx(0.2283, rel=0.02)


def test_track_moves_targets_by_tau() -> None:
    """θ̄ ← 0.75·θ̄ + 0.25·θ: from 2 towards 6 gives 3."""
    module = method("TD3BC")
    module.initialize(Sizes(3, 1), seed=0)
    with torch.no_grad():
        for target, online in zip(module.params("target_critic"), module.params("critic")):
            target.fill_(2.0)
            online.fill_(6.0)
    module.track("critic", 0.25)
    assert all(bool((p == 3.0).all()) for p in module.params("target_critic"))
    assert all(bool((p == 6.0).all()) for p in module.params("critic"))


def test_batch_mean_is_over_the_last_axis_and_detached() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, 9.0]], requires_grad=True)
    mean = Tiny().batch_mean(x)
    assert mean.tolist() == [2.0, 7.0] and not mean.requires_grad


def test_clipping_known_answer() -> None:
    """Norm of (3, 4) is 5; a limit of 1 scales by 1/5 and a limit of 10 changes nothing."""
    grads = [torch.tensor([[3.0]]), torch.tensor([[4.0]])]
    clipped = clip_per_seed(grads, 1.0, seeds=False)
    torch.testing.assert_close(torch.cat(clipped), torch.tensor([[0.6], [0.8]]), rtol=1e-5, atol=0)
    assert [g.item() for g in clip_per_seed(grads, 10.0, seeds=False)] == [3.0, 4.0]


def test_clipping_is_per_seed() -> None:
    """Seed 0 has (3, 4), norm 5, and is scaled by 1/5; seed 1 has (0.3, 0.4), norm 0.5, and stays."""
    grads = [torch.tensor([[3.0], [0.3]]), torch.tensor([[[4.0]], [[0.4]]])]
    first, second = clip_per_seed(grads, 1.0, seeds=True)
    torch.testing.assert_close(first, torch.tensor([[0.6], [0.3]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(second, torch.tensor([[[0.8]], [[0.4]]]), rtol=1e-5, atol=0)


# -- many seeds ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.3])
def test_two_seeds_in_one_run_equal_two_runs(clip: float | None, replay: Replay) -> None:
    def train(seed: int, seeds: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
        module = method("TD3BC", max_grad_norm=clip)
        module.seed, module.seeds, module.run.eval_episodes = seed, seeds, 0
        fit(module, replay, 100, precision="64-true")
        return weights(module), module.metric_row

    together, row = train(7, seeds=(0, 1))
    for seed in (0, 1):
        alone, single = train(seed)
        for name, value in alone.items():
            stacked = together[name] if name.startswith("normalizer") else together[name][seed]
            torch.testing.assert_close(stacked, value, rtol=1e-10, atol=1e-12)
        assert row["train/critic_loss"][seed] == pytest.approx(single["train/critic_loss"], rel=1e-6)


# -- precision, compilation, settings of the process -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_bf16_mixed(name: str, replay: Replay) -> None:
    """Weights stay float32, products are rounded, and the length of a block does not matter here either."""
    modules = []
    for precision, block in (("bf16-mixed", 64), ("bf16-mixed", 3), ("32-true", 64)):
        module = method(name)
        module.run.block, module.run.eval_episodes = block, 0
        modules.append(fit(module, replay, 8, precision=precision))
    half, pieces, full = modules
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert not differences(weights(half), weights(pieces)) and differences(weights(half), weights(full))
    for key, value in full.metric_row.items():
        if key.endswith("_loss"):
            assert half.metric_row[key] == pytest.approx(value, rel=0.1, abs=0.05), key


def test_float16_with_loss_scaling_is_refused(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "precision", "16-mixed")  # Lightning itself turns it into bf16-mixed on CPUs
    with pytest.raises(UsageError, match="use 'bf16-mixed'"):
        fit(method("BC"), replay, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if "-" not in name])
def test_compiled_losses_equal_eager_ones(name: str, replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and where a loss holds gradients of its own differentiated too, as `torch.compile` does it.

    In float64, since rounding differs by processor. Its code generator would take half a minute.
    """
    backend = "aot_eager" if name in ("TD3BC", "EDAC", "ODICE", "HIQL") else "eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = method(name), method(name)
    compiled.run.compile = True
    for module in (eager, compiled):
        module.run.eval_episodes = 0
        fit(module, replay, 3, precision="64-true")
    assert "actor_loss" not in vars(compiled)  # put back
    for name, value in weights(eager).items():
        assert value.dtype != torch.float32
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-9, atol=1e-10)


class Inside(Callback):
    """Notes the thread count and the setting of products during training, and may fail there."""

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.seen = fail, ()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen = (torch.get_num_threads(), fp32_products())
        if self.fail:
            raise ZeroDivisionError


def fp32_products() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fail", [False, True])
def test_threads_and_products_are_put_back(replay: Replay, fail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpolicy.compute.matmul.choose_matmul", lambda setting: setting)
    before = (torch.get_num_threads(), fp32_products())
    module, inside = method("BC"), Inside(fail)
    module.run.threads, module.run.matmul = 2, "onednn"
    if fail:
        with pytest.raises(ZeroDivisionError):
            fit(module, replay, 10, callbacks=[inside])
    else:
        fit(module, replay, 10, callbacks=[inside])
    assert inside.seen == (2, "bf16")  # what permits oneDNN's kernel, see offpolicy/matmul.py
    assert (torch.get_num_threads(), fp32_products()) == before


def test_a_resumed_run_keeps_threads_and_products(replay: Replay, tmp_path: Any) -> None:
    module = method("BC")
    module.run.threads, module.run.matmul = 2, "mkl"
    fit(module, replay, 45, tmp_path)
    resumed, inside = method("BC"), Inside()
    resumed.run.threads, resumed.run.matmul = 1, "auto"
    fit(resumed, replay, 90, ckpt_path=tmp_path / "checkpoints" / "step=00000045.ckpt", callbacks=[inside])
    assert inside.seen == (2, "ieee") and resumed.run.matmul == "mkl"


# -- sizes, checkpoints, acting --------------------------------------------------------------------------------------


def test_checkpoint_opens_without_data(replay: Replay, tmp_path: Any) -> None:
    module = fit(method("TD3BC"), replay, 45, tmp_path)
    path = tmp_path / "checkpoints" / "step=00000045.ckpt"
    loaded = TD3BC.load_from_checkpoint(path, map_location="cpu")
    assert not differences(weights(module), weights(loaded))
    assert loaded.hparams.hidden_dims == (8, 8) and loaded.data_meta["env_id"] == "Pendulum-v1"
    obs = replay.steps["obs"][:5]
    assert (loaded.act(obs) == module.act(obs)).all()


def test_act_takes_one_or_many_observations_of_either_kind() -> None:
    module = method("TD3BC")
    module.initialize(Sizes(3, 1), seed=0)
    module.normalizer.action_scale.fill_(0.5)  # environment actions within ±2
    obs = torch.randn(4, 3)
    many = module.act(obs)
    assert isinstance(many, Tensor) and many.shape == (4, 1) and many.abs().max() <= 2.0
    array = module.act(obs.double().numpy())
    assert array.dtype == "float32" and array.shape == (4, 1)
    assert module.act(obs[0].numpy()).shape == (1,)
    assert module.act(obs[0].tolist()).shape == (1,)
    torch.testing.assert_close(module.act(obs[0]), many[0])
    with pytest.raises(UsageError, match=r"shape \(4, 2\); expected \(3,\) or \(n, 3\)"):
        module.act(obs[:, :2])
    with pytest.raises(UsageError, match="no networks yet"):
        method("TD3BC").act(obs)


def test_same_seed_same_start_whatever_was_drawn_before() -> None:
    first, second = method("IQL"), method("IQL")
    first.initialize(Sizes(3, 1), seed=5)
    torch.randn(100)
    state = torch.get_rng_state()
    second.initialize(Sizes(3, 1), seed=5)
    assert not differences(weights(first), weights(second)) and torch.equal(torch.get_rng_state(), state)
    third = method("IQL")
    third.initialize(Sizes(3, 1), seed=6)
    assert differences(weights(first), weights(third))


def test_horizon_of_the_learning_rate_is_stored(replay: Replay, tmp_path: Any) -> None:
    """The cosine falls to 0 over the 45 updates of the run that started; going on to 90 does not stretch it."""
    fit(method("IQL"), replay, 45, tmp_path)
    longer = method("IQL")
    fit(longer, replay, 90, ckpt_path=tmp_path / "checkpoints" / "step=00000045.ckpt")
    assert isinstance(longer, IQL) and longer.decay_steps == 45
    assert longer.decayed_actor_lr(1) == 3e-4 and longer.decayed_actor_lr(46) == 0.0 == longer.decayed_actor_lr(90)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_missing_max_steps(replay: Replay) -> None:
    with pytest.raises(UsageError, match=r"no `max_steps`; expected the number of updates"):
        fit(method("BC"), replay, -1)


def test_missing_data() -> None:
    with pytest.raises(UsageError, match="fit was given no replay"):
        quiet(10).fit(method("BC"), torch.utils.data.DataLoader([0]))


def test_other_data(tmp_path: Any) -> None:
    fit(method("BC"), toy_replay(seed=1), 45, tmp_path)
    path = tmp_path / "checkpoints" / "step=00000045.ckpt"
    with pytest.raises(DataError, match="trained on other data"):
        fit(method("BC"), toy_replay(seed=2), 90, ckpt_path=path)
    module = method("BC")
    module.run.allow_other_data = True
    assert fit(module, toy_replay(seed=2), 90, ckpt_path=path).metric_row["step"] == 90


def test_other_sizes(replay: Replay) -> None:
    module = method("BC")
    module.initialize(Sizes(4, 1), seed=0)
    with pytest.raises(UsageError, match=r"built for .*obs_dim=4.* but the data have .*obs_dim=3"):
        fit(module, replay, 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("BC", {"batch_size": 0}, "`batch_size` is 0"),
        ("BC", {"max_grad_norm": 0.0}, "`max_grad_norm` is 0.0"),
        ("BC", {"reward_transform": "log r"}, "`reward_transform` is 'log r'"),
        ("BC", {"actor_lr": -1.0}, "`actor learning rate` is -1.0.*--model.actor_lr"),
    ],
)
def test_impossible_settings(name: str, options: dict[str, Any], message: str, replay: Replay) -> None:
    with pytest.raises(UsageError, match=message):
        fit(method(name, **options), replay, 10)


@pytest.mark.parametrize(
    "options",
    [{"block": 0}, {"eval_every": -1}, {"eval_episodes": -1}, {"log_every": 0}, {"threads": 0}, {"matmul": "x"}],
)
def test_impossible_run_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        RunOptions(**options)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [({"gradient_clip_val": 1.0}, "max_grad_norm"), ({"accumulate_grad_batches": 2}, "batch_size")],
)
def test_what_the_trainer_cannot_do_is_refused(option: dict[str, Any], remedy: str, replay: Replay) -> None:
    with pytest.raises(UsageError, match=remedy):
        fit(method("BC"), replay, 10, **option)
