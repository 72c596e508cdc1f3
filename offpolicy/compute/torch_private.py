"""Everything that torch does not document and this library uses, each with the reason.

A test asks for every one of them, so that a version of torch without it is noticed before a run is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

# Arithmetic on lists of tensors in one call: a loop in Python over the weights takes longer than the work itself.
foreach_add_ = torch._foreach_add_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_norm = torch._foreach_norm
foreach_zero_ = torch._foreach_zero_
# The kernels below torch.optim.Adam(fused=True), which takes no gradients as arguments and no rate per call.
fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_


def run_backward(loss: Tensor, params: Sequence[Tensor], *, keep_graph: bool) -> Sequence[Tensor]:
    """``torch.autograd.grad`` without its checks of every argument in Python, which take as long as a small layer."""
    engine: Any = Variable._execution_engine
    start = (torch.ones_like(loss),)
    return engine.run_backward((loss,), start, keep_graph, False, tuple(params), False, accumulate_grad=False)


def parameters_here(layer: nn.Module) -> dict[str, Tensor | None]:
    """The parameters of a layer itself by name; ``named_parameters(recurse=False)`` is slow for a forward pass."""
    return layer._parameters  # type: ignore[return-value]


def is_dropout(layer: nn.Module) -> bool:
    """Whether it is one of torch's dropout layers, whose only common base is private."""
    return isinstance(layer, nn.modules.dropout._DropoutNd)


def cpu_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The fused attention of CPUs with the sums that its backward pass needs, which the public function keeps."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


def cpu_attention_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of :func:`cpu_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, **kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Within it tensors have shapes, types and places, and no memory; operations on them compute nothing else.

    Operations that cannot be done so raise, and torch does not write its own pages about them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here, as it takes a while to import

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            yield
    finally:
        log.setLevel(level)


def state_notes(state: Any) -> Any:
    """The versions of layers that a ``state_dict`` carries as an attribute; None where it has none."""
    return getattr(state, "_metadata", None)


def set_state_notes(state: Any, notes: Any) -> None:
    """Give a ``state_dict`` the notes of :func:`state_notes`."""
    state._metadata = notes


def operations_of(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """The operations of a function, which are done once, on these tensors, with gradients and changes in place.

    Raises:
        RuntimeError: it reads another tensor than these that holds more than a number.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="real")(*tensors)
    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(graph, node.target).dim():
            shape = tuple(getattr(graph, node.target).shape)
            raise RuntimeError(f"an update reads a tensor {shape} that is no parameter, buffer or part of the batch")
    return graph


def compile_operations(graph: Any, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """What :func:`operations_of` gave as machine code, for tensors of these shapes."""
    from torch._inductor.compile_fx import compile_fx

    code: Any = compile_fx(graph, list(tensors))
    return code
