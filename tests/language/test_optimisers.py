"""Optimisers of language methods: known answers, what they keep, and runs that go on bit by bit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fit, make_policy, method
from torch import Tensor, nn
from toy import differences

from offpolicy.errors import UsageError
from offpolicy.language.optimisers import (
    Adafactor,
    HostMasters,
    check_sharding,
    make_optimizer,
    moment_bytes,
    trial_move,
)
from offpolicy.training.checkpoints import newest_checkpoint
from offpolicy.training.lightning_private import FullySharded

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed"
)
NAMES = ["adamw", pytest.param("adamw_8bit", marks=needs_bitsandbytes), "adafactor"]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(80, 100), nn.Tanh(), nn.Linear(100, 3)).to(dtype)


def trained(name: str, *, offload: bool = False, dtype: torch.dtype = torch.float32, steps: int = 6) -> Any:
    """A net after some steps, with its optimiser."""
    model = net(dtype)
    optimizer = make_optimizer(
        name, model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), fused=True, offload=offload
    )
    for step in range(steps):
        x = torch.randn(16, 80, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    return model, optimizer


def numbers(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_first_step_of_adafactor_by_hand() -> None:
    """G = [[1, 2], [2, 4]] has rank one, so row·column is G² and the update G/|G| = 1; then w ← w(1 − 0.1·0.5) − 0.1.

    The bias has gradients 3 and −1: 1 and −1.
    """
    weight, bias = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), nn.Parameter(torch.tensor([1.0, 1.0]))
    weight.grad, bias.grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([3.0, -1.0])
    Adafactor([{"params": [weight], "weight_decay": 0.5}, {"params": [bias]}], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.85, 1.80], [2.75, 3.70]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([0.9, 1.1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.optimization import Adafactor as Theirs

    one, two = net(dtype), net(dtype)
    ours = Adafactor(one.parameters(), lr=1e-2, weight_decay=0.1)
    theirs = Theirs(two.parameters(), lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)
    for step in range(5):
        x = torch.randn(16, 80, generator=torch.Generator().manual_seed(step)).to(dtype)
        for model, optimizer in ((one, ours), (two, theirs)):
            optimizer.zero_grad()
            (model(x) - 1).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(numbers(one), numbers(two), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_masters_on_the_host_give_the_numbers_of_the_device(name: str) -> None:
    (here, _), (there, optimizer) = trained(name), trained(name, offload=True)
    assert isinstance(optimizer, HostMasters) and torch.equal(numbers(here), numbers(there))


def test_small_steps_of_bfloat16_weights_are_kept_by_masters_alone() -> None:
    """A step of 1e-4 is below half the distance of bfloat16 numbers at 1, which is 1/256: 40 make a difference."""

    def after(offload: bool) -> float:
        weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.999), "fused": False}
        optimizer = make_optimizer("adamw", [weight], offload=offload, **settings)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight[0, 0].item()

    assert after(False) == 1.0 and after(True) == pytest.approx(1 - 40e-4, abs=1 / 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_kept_are_those_that_were_counted(name: str, dtype: torch.dtype) -> None:
    model, optimizer = trained(name, dtype=dtype, steps=1)
    kept = [
        value.numel() * value.element_size()
        for p in model.parameters()
        for key, value in optimizer.state[p].items()
        if isinstance(value, Tensor) and key != "step"
    ]
    shared = 6 * 256 * 4 if name == "adamw_8bit" else 0  # code tables that its small tensors have or share
    assert abs(sum(kept) - sum(moment_bytes(name, p) for p in model.parameters())) <= shared


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_exactly(name: str, dtype: str, offload: bool, tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy", hidden_size=64, intermediate_size=128)  # matrices of 4,096 and more
    options = {"optimizer": name, "offload_optimizer": offload, "dtype": dtype, "micro_batch_size": 2}
    whole = fit(method("DPO", policy, **options), max_steps=6, folder=tmp_path)
    path = tmp_path / "checkpoints" / "step=00000003.ckpt"
    again = fit(method("DPO", policy, **options), max_steps=6, ckpt_path=path)
    assert torch.equal(numbers(whole), numbers(again))
    states = [module.trainer.optimizers[0].state_dict() for module in (whole, again)]
    assert not differences(states[0], states[1])


@pytest.mark.slow
def test_methods_with_a_critic_keep_its_masters_too(tmp_path: Path) -> None:
    import tiny_rl

    policy = make_policy(tmp_path / "policy")
    critic = {"objective": {"advantage": "gae", "value": "squared"}, "critic": "head"}
    one, two = (tiny_rl.method("GRPO", policy, offload_optimizer=offload, **critic) for offload in (False, True))
    for module in (one, two):
        tiny_rl.fit(module, max_steps=2)
    assert torch.equal(numbers(one), numbers(two))


def test_a_checkpoint_without_masters_is_refused(policy: Path, tmp_path: Path) -> None:
    fit(method("DPO", policy), max_steps=3, folder=tmp_path)
    with pytest.raises(UsageError, match="has no float32 masters"):
        fit(method("DPO", policy, offload_optimizer=True), max_steps=6, ckpt_path=newest_checkpoint(tmp_path))


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="expected one of adamw, adamw_8bit, adafactor"):
        method("DPO", Path("x"), optimizer="lion")
    with pytest.raises(UsageError, match="which has no such moments"):
        method("DPO", Path("x"), optimizer="adafactor", adam_betas=(0.9, 0.95))
    for options in ({"name": "adafactor", "offload": False}, {"name": "adamw", "offload": True}):
        with pytest.raises(UsageError, match="weights cut by 'fsdp2'"):
            check_sharding(strategy=FullySharded(), **options)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"bitsandbytes.*offpolicy\[quantized\].*'adafactor' or 'adamw'"):
        method("DPO", Path("x"), optimizer="adamw_8bit")


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_step_that_is_tried_is_the_step(name: str, steps: int) -> None:
    """To the last bit, from the moments of earlier steps; and nothing has changed by trying."""
    model, optimizer = trained(name, steps=steps)
    (model(torch.ones(2, 80)) - 1).square().sum().backward()
    weight: Any = model[0].weight
    before, state = weight.detach().clone(), repr(optimizer.state_dict())
    move = trial_move(optimizer, weight, weight.grad)
    assert torch.equal(weight, before) and repr(optimizer.state_dict()) == state
    optimizer.step()
    assert torch.equal(move, weight.detach() - before) and move.any()
