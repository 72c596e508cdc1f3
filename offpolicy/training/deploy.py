"""A policy in one file that runs without this library: ``.onnx`` for onnxruntime, ``.pt2`` for torch.

The file takes raw observations and gives actions in the units of the environment: the normaliser of the data, the
deterministic policy and the scale of actions are inside. It is compared with the method's own answers before it is
kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.errors import UsageError
from offpolicy.files import atomic_file
from offpolicy.training.acting import ActingModule
from offpolicy.training.goals import GoalModule

OPSET = 18  # of ONNX; what onnxruntime runs since 1.14
STATES = 1000  # on which the file and the method are compared
BOUND = 1e-5  # largest difference, as a share of the range of an action
FORMATS = (".onnx", ".pt2")


class DeployedPolicy(nn.Module):
    """Observations (n, O), and goals (n, O) of goal-conditioned methods, to actions (n, A), as ``act`` has them."""

    def __init__(self, method: ActingModule) -> None:
        super().__init__()
        self.method = method

    def forward(self, obs: Tensor) -> Tensor:
        method = self.method
        return method.normalizer.environment_action(method.policy(method.normalizer.obs(obs)).clamp(-1.0, 1.0))


class DeployedGoalPolicy(DeployedPolicy):
    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:  # type: ignore[override]
        method: Any = self.method
        x, g = method.normalizer.obs(obs), method.normalizer.obs(goal)
        return method.normalizer.environment_action(method.goal_policy(x, g, lambda mean: mean).clamp(-1.0, 1.0))


def deploy(method: ActingModule, out: str | os.PathLike[str]) -> float:
    """Write a trained policy as one file, whole or not at all.

    Args:
        method: a trained control method, on any device.
        out: file to write, ending in ``.onnx`` or ``.pt2``; must not exist.

    Returns:
        The largest difference between the actions of the file and those of the method over a thousand normal states,
        as a share of the range of each action.

    Raises:
        UsageError: the method is no function of one observation (or of one observation and a goal), holds several
            seeds, a package is missing, or the file would answer otherwise than the method.
    """
    path = Path(out)
    check_deployable(method, path)
    with _on_host(method), _quietly(), atomic_file(path) as file:
        policy, inputs = _wrapped(method), _states(method)
        with torch.no_grad():
            expected = policy(*inputs)
        _write(policy, inputs, path.suffix, Path(file.name))
        found = _answers(path.suffix, Path(file.name), inputs)
        worst = float(((found - expected) * method.normalizer.action_scale / 2).abs().max())
        if not worst <= BOUND:
            raise UsageError(
                f"the actions of {path.name} differ from those of {type(method).__name__} by {worst:.2g} of their "
                f"range; expected at most {BOUND:g}. Nothing was written."
            )
    return worst


def check_deployable(method: Any, path: Path) -> None:
    """Refuse what cannot be one file.

    Raises:
        UsageError: see :func:`deploy`.
    """
    name = type(method).__name__
    if path.suffix not in FORMATS:
        raise UsageError(f"`out` is {path}; expected a file ending in {' or '.join(FORMATS)}.")
    if path.exists():
        raise UsageError(f"{path} exists already; expected a new file. Remove it or choose another name.")
    if not isinstance(method, ActingModule):
        raise UsageError(f"{name} is no control method; expected one, such as TD3BC. Language models go to a folder.")
    method.check_built()
    method.check_one_seed()
    single = type(method).act is ActingModule.act and type(method).agent is ActingModule.agent
    if not (single or isinstance(method, GoalModule)):
        raise UsageError(
            f"{name} acts by more than the observation at hand (its own `agent` or `act`), which one function of it "
            "cannot be; expected a method whose policy sees one observation, such as TD3BC or IQL."
        )


@contextlib.contextmanager
def _on_host(method: ActingModule) -> Iterator[None]:
    """The method in evaluation mode with fixed float32 weights on the CPU, and afterwards as it was, bit by bit."""
    tensors = [*method.parameters(), *method.buffers()]
    kept, training = [(tensor.data, tensor.requires_grad) for tensor in tensors], method.training
    for tensor in tensors:
        tensor.requires_grad_(False)
        tensor.data = tensor.data.cpu().float() if tensor.is_floating_point() else tensor.data.cpu()
    method.eval()
    try:
        yield
    finally:
        for tensor, (data, trained) in zip(tensors, kept):
            tensor.data = data
            tensor.requires_grad_(trained)
        method.train(training)


def _wrapped(method: Any) -> DeployedPolicy:
    return (DeployedGoalPolicy if isinstance(method, GoalModule) else DeployedPolicy)(method)


def _states(method: ActingModule) -> tuple[Tensor, ...]:
    """Observations as the data have them in mean and spread; of goal-conditioned methods goals too."""
    random = np.random.default_rng(0)
    normal = torch.from_numpy(random.standard_normal((2, STATES, method.sizes.obs_dim)).astype("f4"))
    states = normal / method.normalizer.obs_scale + method.normalizer.obs_center
    return tuple(states) if isinstance(method, GoalModule) else (states[0],)


def _write(policy: nn.Module, inputs: tuple[Tensor, ...], suffix: str, file: Path) -> None:
    names = ["obs", "goal"][: len(inputs)]
    rows = torch.export.Dim("n", min=1)
    some = tuple(x[:3] for x in inputs)
    program = torch.export.export(policy, some, dynamic_shapes=tuple({0: rows} for _ in some))
    if suffix == ".pt2":
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for node in program.graph.nodes:
            if node.name in held and not node.users:  # of critics and the like, which do not act
                program.state_dict[held[node.name]].data = torch.empty(0, device="cpu")
        torch.export.save(program, file)
        return
    _need("onnxscript")
    made = torch.onnx.export(program, input_names=names, output_names=["action"], opset_version=OPSET, verbose=False)
    assert made is not None
    made.save(str(file))


def _answers(suffix: str, file: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the file itself gives, run as a user would."""
    if suffix == ".pt2":
        return torch.export.load(file).module()(*inputs)
    runtime = _need("onnxruntime")
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    named = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, named)[0])


def _need(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"an .onnx file needs the package {package}, which is not installed. Install it with "
            "`pip install 'offpolicy[deploy]'`, or write a .pt2 file."
        ) from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' remarks on their own steps."""
    levels: list[Callable[[], None]] = []
    for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
        logger = logging.getLogger(name)
        levels.append(lambda logger=logger, level=logger.level: logger.setLevel(level))  # type: ignore[misc]
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for put_back in levels:
                put_back()
