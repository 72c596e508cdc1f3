"""Every tensor says where it lies: bookkeeping stays on the host, whatever torch's default device is.

Lightning calls ``configure_model`` with the device of training as the default, and people set one for a whole script.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rl
import torch
import toy
from lightning.pytorch.strategies import SingleDeviceStrategy
from scripts import ROOT

from lightning_modules import METHODS
from offpolicy.compute.matmul import onednn_error
from offpolicy.data import sampling
from offpolicy.data.texts.problems import ProblemData
from offpolicy.data.texts.rollouts import BoundRollouts, make_store, steps_of
from offpolicy.data.texts.sequences import PairView, SingleView
from offpolicy.diffusion.sampler import GuidanceOptions, SamplerOptions, guidance_schedule, noise_levels
from offpolicy.language.layout import group_layout, pair_layout, single_layout
from offpolicy.language.plan import RowPlan
from offpolicy.language.rl.engine import Request, Sampling
from offpolicy.language.rl.engines import answer_uniforms
from offpolicy.registry import find_method

# what takes torch's default device unless it is told another
MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    "zeros",
}
OF_NETWORKS = {"Parameter", "register_buffer", "register_parameter"}  # lie where their network is made
SOURCES = [*sorted(ROOT.glob("offpolicy/**/*.py")), *sorted(ROOT.glob("lightning_modules/**/*.py"))]
TUNED = [name for name in METHODS if find_method(name).trains_on_texts]


def calls(tree: ast.AST, of: str = "") -> Iterator[tuple[ast.Call, str]]:
    """Every call, with the name of the function whose argument it is part of, if that is one for networks."""
    for node in ast.iter_child_nodes(tree):
        inside = of
        if isinstance(node, ast.Call):
            yield node, of
            name = getattr(node.func, "attr", "")
            inside = name if name in OF_NETWORKS else of
        yield from calls(node, inside)


def without_device(source: str) -> list[str]:
    """Calls in this source that make a tensor and name no device."""
    found = []
    for call, of in calls(ast.parse(source)):
        function = call.func
        makes = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch"
        if makes and function.attr in MAKERS and not of and "device" not in [k.arg for k in call.keywords]:
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_tensors_without_a_device_are_found() -> None:
    assert without_device("x = f(torch.zeros(3), torch.ones(2, device=y.device))") == ["line 1: torch.zeros(3)"]
    assert not without_device("self.w = nn.Parameter(torch.empty(2, 3)); torch.zeros_like(x)")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_names_its_device(path: Path) -> None:
    found = without_device(path.read_text())
    assert not found, f"{path.name}: say device=…: that of another tensor, or 'cpu' for bookkeeping\n" + "\n".join(
        found
    )


def tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict):
        yield from (one for value in found.values() for one in tensors(value))
    elif isinstance(found, (list, tuple)):
        yield from (one for value in found for one in tensors(value))


def pairs(view: Any = None) -> Any:
    return (view or PairView()).bind(tiny.toy_pairs()).gather(np.arange(4))


def rollouts() -> Any:
    texts = [np.arange(4, 8), np.arange(5, 7), np.arange(9, 12), np.arange(4, 6)]
    episodes = {
        "policy_version": np.ones(4, np.int64),
        "group": np.array([7, 7, 8, 8]),
        "prompt": np.array([0, 0, 1, 1]),
        "source": np.zeros(4, np.uint8),
        "given": np.zeros(4, np.int64),
        "advantage": np.zeros(4),
    }
    columns = {"logp": [np.zeros(len(text), np.float32) for text in texts]}
    store = make_store(texts, columns, episodes, np.uint8)
    return BoundRollouts(tiny_rl.toy_problems(), store), store


HOST: dict[str, Callable[[], Any]] = {
    "permutation": lambda: sampling.permutation(0, 1, 9),
    "order of training": lambda: torch.from_numpy(RowPlan(np.arange(1, 9), batch_size=3, slots=1, seed=0).order(2)),
    "split": lambda: torch.from_numpy(toy.toy_replay().split(0.2, 0)[1].start),
    "noise levels": lambda: noise_levels(SamplerOptions()),
    "guidance": lambda: guidance_schedule(4, GuidanceOptions()),
    "random numbers of answers": lambda: answer_uniforms(
        [Request(np.arange(3), 0, 2)], Sampling((2,), max_new_tokens=4)
    ),
    "pairs": lambda: pair_layout(pairs(), 0, shared_prompt=False, prompt_too=True),
    "pairs with one prompt": lambda: pair_layout(pairs(), 0, shared_prompt=True),
    "singles": lambda: single_layout(pairs(SingleView()), 0, prompt_too=True),
    "groups": lambda: group_layout(rollouts()[0].gather(np.arange(4), 64), 0),
    "steps of an iteration": lambda: [
        torch.from_numpy(rows)
        for rows in steps_of(rollouts()[1], [np.empty(0, np.int64)], minibatches=1, seed=0, iteration=1)
    ],
    "products": lambda: [torch.from_numpy(np.array(onednn_error.__wrapped__()))],
}


@pytest.mark.parametrize("name", HOST)
def test_bookkeeping_stays_on_the_host(name: str) -> None:
    expected = HOST[name]()
    with torch.device("meta"):
        found = HOST[name]()
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert one.device.type == "cpu"
        torch.testing.assert_close(one, other, equal_nan=True)


class MetaFirst(SingleDeviceStrategy):
    """Trains on the CPU, but the default device is none when the model is configured."""

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return torch.device("meta")


@pytest.mark.parametrize("name", TUNED)
def test_models_are_configured_under_any_default_device(name: str, policy: Path) -> None:
    kit: Any = tiny_rl if issubclass(find_method(name).data_class(), ProblemData) else tiny
    method = kit.method(name, policy)
    kit.fit(method, max_steps=1, strategy=MetaFirst(device=torch.device("cpu")), accelerator="cpu")
    assert method.global_step == 1
