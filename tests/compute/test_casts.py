"""Casts of weights under autocast: once while answers are drawn, anew whenever weights have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import toy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from offpolicy.compute.casts import fresh_casts, kept_casts
from offpolicy.language import policy as policies
from offpolicy.language.rl.engine import Request, Sampling
from offpolicy.language.rl.engines import TinyEngine, TransformersEngine


class Casts(TorchDispatchMode):
    """Counts the casts of a model's weights to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("made") / "policy")


def opened(folder: Path, kind: str) -> Any:
    model = policies.open_model(str(folder))
    if kind == "adapters":
        pytest.importorskip("peft")
        model = policies.add_adapter(model, {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"})
    return model.eval()


@pytest.mark.parametrize("kind", ["all weights", "adapters"])
@pytest.mark.parametrize("engine", [TransformersEngine, TinyEngine])
def test_weights_are_cast_once_while_answers_are_drawn(kind: str, engine: Any, folder: Path) -> None:
    model = opened(folder, kind)
    trained = [p.requires_grad for p in model.parameters()]
    requests = [Request(np.array([5, 6, 7]), 0, 2), Request(np.array([8, 9]), 1, 2)]
    how = Sampling(stop=(), max_new_tokens=6)
    drawing = engine()
    drawing.sync(model, 1)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with Casts(model) as casts:
            kept = drawing.generate(requests, how)
        assert 0 < casts.count <= len(trained)
        with Casts(model) as casts, torch.no_grad():
            plain = drawing._generate(requests, how, None)
        assert casts.count > 3 * len(trained)
    for one, other in zip((a for some in kept for a in some), (a for some in plain for a in some), strict=True):
        assert np.array_equal(one.token, other.token) and np.array_equal(one.logp, other.logp)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_casts_do_not_outlast_the_weights() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)  # kept by the autocast around
        with kept_casts(layer):
            before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        with kept_casts(layer):
            assert (layer(x) - before > 2.0).all()
        layer(x)
        with fresh_casts():
            with torch.no_grad():
                layer.weight.add_(1.0)
            assert (layer(x) - before > 5.0).all()
        assert (layer(x) - before > 5.0).all()
        loss = layer(x).sum()
    loss.backward()
    assert layer.weight.grad is not None


def test_without_autocast_nothing_is_touched() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    with kept_casts(layer):
        assert not layer.weight.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["TD3BC", "IQL", "DecisionTransformer"])
def test_a_block_inside_a_users_autocast_trains_on_the_weights_of_now(name: str) -> None:
    def trained(**autocast: Any) -> dict[str, torch.Tensor]:
        module = toy.method(name).prepare(toy.toy_replay())
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            module.run_block(0, 4)
            module.run_block(4, 4)
        return toy.weights(module)

    assert not toy.differences(trained(), trained(cache_enabled=False))


@pytest.mark.parametrize("name", ["DPO", "SFT"])
def test_a_fit_inside_a_users_autocast_trains_on_the_weights_of_now(name: str, folder: Path) -> None:
    def trained(**autocast: Any) -> dict[str, torch.Tensor]:
        module = tiny.method(name, folder)
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            tiny.fit(module, max_steps=4)
            assert torch.is_autocast_cache_enabled() == autocast.get("cache_enabled", True)
        return {key: value.detach().clone() for key, value in module.state_dict().items()}

    assert not toy.differences(trained(), trained(cache_enabled=False))
