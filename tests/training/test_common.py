"""What the base of control methods acts on: common arguments, the list of what is compiled, and falling rates."""

from __future__ import annotations

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import fit, method, toy_replay

import offpolicy as op
from lightning_modules import METHODS
from offpolicy.errors import UsageError
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.nn.stacked import MLP
from offpolicy.registry import find_method
from offpolicy.training.common import CommonOptions
from offpolicy.training.module import Module
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes

CONTROL = [name for name in METHODS if issubclass(find_method(name), OfflineModule)]


class Cloning(OfflineModule):
    """A method as a user writes it; its rate falls to half over the run."""

    def __init__(self, *, lr: float = 1e-3, lr_decay_steps: int | None = None, max_grad_norm: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen: list[bool] = []

    def build(self, sizes: Sizes) -> None:
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, (8,))

    def learning_rates(self) -> dict[str, Rate]:
        return {"actor": lambda step: self.hparams.lr * (1.0 - 0.5 * step / (self.decay_steps or 1e9))}

    def cloning_loss(self, batch: op.Transitions) -> torch.Tensor:
        self.seen.append(torch.compiler.is_compiling())
        return (self.actor(batch.obs) - batch.action).square().mean((-2, -1))

    def update(self, batch: op.Transitions, step: int) -> Metrics:
        loss = self.cloning_loss(batch)
        self.step("actor", loss)
        return {"actor_loss": loss.detach()}

    def policy(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor(obs)


class Uncompiled(Cloning):
    compiled = ()


def test_common_options_are_those_of_the_method_or_usual_ones() -> None:
    found = CommonOptions.of(Cloning().hparams)
    assert found == CommonOptions(256, True, 1e-3, "r", 0.5)
    assert CommonOptions.of(op.ReBRAC(reward_transform="0.1r").hparams) == CommonOptions(
        1024, False, 1e-3, "0.1r", None
    )
    assert CommonOptions.of(op.DecisionTransformer().hparams).obs_eps == 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"obs_eps": -1.0}, "`obs_eps` is -1.0"),
        ({"reward_transform": "log r"}, "`reward_transform` is 'log r'"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` is 0.0"),
        ({"obs_eps": math.inf}, r"`obs_eps` is inf; expected a value in \[0.0, inf\)"),
    ],
)
def test_common_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CommonOptions(**options)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_infinity_is_no_number_of_an_option(name: str) -> None:
    """Only bounds that are never reached may be infinite; rates are refused where the optimisers are made."""
    cls: Any = find_method(name)
    needs = {} if name in CONTROL else {"policy": "x"}
    kinds = [inspect.signature(kind).parameters.values() for kind in cls.__mro__ if issubclass(kind, Module)]
    options = {one.name for some in kinds for one in some if "float" in str(one.annotation)}
    for option in sorted(options - {"adam_betas", "draws", "noise_clip", "weight_max"}):
        with pytest.raises(UsageError, match=r"\binf\b|was given|off"):
            cls(**needs, **{option: math.inf}).initialize(Sizes(3, 1)).configure_optimizers()
    for option in {"noise_clip", "weight_max"} & options:
        cls(**{option: math.inf})


@pytest.mark.parametrize("name", CONTROL)
def test_every_loss_of_a_method_is_listed_for_compilation(name: str) -> None:
    cls: Any = find_method(name)
    losses = {n for n in dir(cls) if n.endswith("_loss") and callable(getattr(cls, n))}
    assert losses and losses <= set(cls.compiled) and all(callable(getattr(cls, n)) for n in cls.compiled)


@pytest.mark.parametrize(("cls", "expected"), [(Cloning, True), (Uncompiled, False)])
def test_losses_of_a_users_method_are_compiled_unless_it_says_otherwise(
    cls: type[Cloning], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    module = cls()
    module.run.compile, module.run.eval_episodes = True, 0
    fit(module, toy_replay(), 2)
    assert module.seen[0] is expected and "cloning_loss" not in vars(module)


@pytest.mark.parametrize("name", CONTROL)
def test_hidden_layers_have_a_width(name: str) -> None:
    cls: Any = find_method(name)
    options = [n for n in cls().hparams if n.endswith("hidden_dims")]
    for option in options:
        with pytest.raises(UsageError, match=f"`{option}` is 0; expected a value in .* Change `--model.{option}`"):
            cls(**{option: (8, 0)})


def test_a_users_network_has_widths_too() -> None:
    with pytest.raises(UsageError, match="`hidden_dims` is 0"):
        MLP(3, (8, 0), 1)


def test_a_rate_over_the_run_is_kept_by_the_base(tmp_path: Path) -> None:
    """45 updates when the run starts; going on to 90 does not stretch them, and a number of one's own is kept."""
    module: Any = Cloning()
    module.seed, module.run.eval_episodes = 0, 0
    fit(module, toy_replay(), 45, tmp_path)
    assert module.decay_steps == 45
    longer: Any = Cloning()
    longer.run.eval_episodes = 0
    fit(longer, toy_replay(), 60, ckpt_path=tmp_path / "checkpoints" / "step=00000045.ckpt")
    assert longer.decay_steps == 45 and longer.updates == 60
    assert Cloning(lr_decay_steps=7).prepare(toy_replay(), max_steps=20).decay_steps == 7
    assert method("BC").prepare(toy_replay(), max_steps=20).decay_steps is None


def test_a_run_that_goes_on_after_its_rate_fell_to_0_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the network, the updates and what to do; and what it says to do helps."""

    def longer(**options: Any) -> tuple[Any, list[str]]:
        module: Any = method("IQL", **options)
        module.run.eval_episodes = 0
        caplog.clear()
        fit(module, toy_replay(), 30, ckpt_path=tmp_path / "checkpoints" / "step=00000020.ckpt")
        return module, [r.getMessage() for r in caplog.records if "learning rate" in r.getMessage()]

    first = method("IQL")
    first.run.eval_episodes = 0
    fit(first, toy_replay(), 20, tmp_path)
    assert not [r for r in caplog.records if "learning rate" in r.getMessage()]
    module, (told,) = longer()
    assert module.decayed_actor_lr(30) == 0.0
    assert told.startswith("The learning rate of actor falls to 0 over 20 updates, and the run has 30: after update 20")
    assert "Pass --model.lr_decay_steps 30" in told
    for steps, rate in ((30, None), (0, module.hparams.actor_lr)):
        again, none = longer(lr_decay_steps=steps)
        assert again.decayed_actor_lr(30) == rate if rate else again.decayed_actor_lr(30) > 0.0
        assert not none


def test_a_second_fit_counts_from_the_start() -> None:
    module: Any = Cloning()
    module.run.eval_episodes = 0
    fit(module, toy_replay(), 20)
    assert module.updates == 20
    module.run.log_every = 5
    fit(module, toy_replay(), 5)
    assert module.updates == module.global_step == 5


def test_the_rows_that_are_drawn_can_be_asked_for() -> None:
    replay = toy_replay()
    module = method("BC-half")
    assert module.bound is None
    module.prepare(replay)
    assert module.bound_rows.tolist() == module.select(replay).usable_rows().tolist() != replay.usable_rows().tolist()
