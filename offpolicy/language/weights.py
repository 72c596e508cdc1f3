"""The weights of a policy as an engine with weights of its own takes them: plain tensors under the names of the model.

Names of ``peft`` are taken off and adapters added to the weights they belong to; weights cut over processes are
gathered one tensor at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from offpolicy.errors import UsageError, check_choice
from offpolicy.language.adapters import first
from offpolicy.language.policy import base_of

ADAPTER = ("merge", "keep")  # what may become of adapters


def exported(model: Any, adapter: str = "merge", dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a language model's state, with the name that it has without adapters.

    Tied tensors come under each of their names. Where the weights are cut over processes, each process has to go
    through all of them, as gathering a tensor takes all processes; then one whole tensor exists at a time.

    Args:
        model: a causal language model, wrapped by ``peft`` where it has adapters; it stays as it is.
        adapter: "merge" adds adapters to a float32 copy of each weight, which is rounded to the weight's type once;
            "keep" gives the weights without them.
        dtype: of the floating-point tensors; None for that of each weight.

    Yields:
        Name, and tensor on the device of the model, without gradient.

    Raises:
        UsageError: adapters of this kind cannot be merged.
    """
    check_choice("adapter", adapter, ADAPTER)
    base = base_of(model)
    adapted = {name: layer for name, layer in base.named_modules() if is_adapted(layer)}
    done: set[str] = set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        owner = next((prefix for prefix in prefixes(name) if prefix in adapted), None)
        if owner is None:
            if not has_successor(base, name) and not describes_four_bits(base, name):
                yield plain_name(name), cast(whole_tensor(tensor, base, name), dtype)
        elif owner not in done:
            done.add(owner)
            layer = adapted[owner]
            for part, found in (merged_layer(layer) if adapter == "merge" else bare_layer(layer)).items():
                yield plain_name(f"{owner}.{part}"), cast(found, dtype)


def is_adapted(layer: nn.Module) -> bool:
    """Whether a layer carries adapters of ``peft``."""
    return hasattr(layer, "base_layer") and hasattr(layer, "merge") and hasattr(layer, "active_adapters")


def prefixes(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, outermost first: ``a.b.c`` → ``a``, ``a.b``."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def has_successor(base: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a layer of which ``peft`` trains a copy."""
    return "original_module" in name.split(".")


def describes_four_bits(base: nn.Module, name: str) -> bool:
    """Whether a tensor of the state is a scale or a code of a weight of four bits, which is made numbers by them."""
    layer, marked, _ = name.rpartition(".weight.")
    return bool(marked) and is_packed(base.get_submodule(layer))


def is_packed(layer: Any) -> bool:
    """Whether the weight of a layer is kept in four bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def plain_name(name: str) -> str:
    """The name of a tensor without what ``peft`` puts into it."""
    name = name.replace(".modules_to_save.default.", ".").replace(".token_adapter.", ".")
    return name.replace(".base_layer.", ".")


def gathered_tensor(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it; all processes gather it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_tensor(tensor: Tensor, base: nn.Module, name: str) -> Tensor:
    """A tensor of the state, gathered, and as numbers where it is kept in 4 bits."""
    if getattr(tensor, "quant_state", None) is None:
        return gathered_tensor(tensor)
    return dequantized(base.get_submodule(name.rpartition(".")[0]))


def dequantized(layer: nn.Module) -> Tensor:
    """The weight of a layer kept in 4 bits, as numbers."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@torch.no_grad()
def merged_layer(layer: Any) -> dict[str, Tensor]:
    """The state of a layer with its adapters added to its weights."""
    base = layer.get_base_layer()
    if is_packed(base):
        delta = sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
        return bare_layer(layer) | {"weight": (dequantized(base).float() + delta).to(base.weight.quant_state.dtype)}
    kept = {name: tensor.dtype for name, tensor in base.state_dict().items()}
    # a copy with whole weights, float32 at least, in place of the layer's own, which merging would change
    instead = {
        id(p): nn.Parameter(gathered_tensor(p).to(torch.promote_types(p.dtype, torch.float32), copy=True), False)
        for p in layer.parameters()
    }
    double = copy.deepcopy(layer, instead)
    try:
        double.merge(safe_merge=False)
    except (AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"adapters of the kind {type(layer).__name__} cannot be merged into the weights of an engine "
            f"({first(error)}) Use --model.engine transformers."
        ) from None
    return {name: tensor.detach().to(kept[name]) for name, tensor in double.get_base_layer().state_dict().items()}


def bare_layer(layer: Any) -> dict[str, Tensor]:
    """The state of a layer without its adapters."""
    base = layer.get_base_layer()
    state = base.state_dict(keep_vars=True).items()
    return {
        name: whole_tensor(tensor, base, name) for name, tensor in state if not (is_packed(base) and "weight." in name)
    }


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The tensors of the adapters alone, gathered, as ``peft`` names them in files."""
    from peft import get_peft_model_state_dict

    return {name: gathered_tensor(tensor).contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
