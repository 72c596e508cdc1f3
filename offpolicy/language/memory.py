"""How much memory training a language model takes, by part, known from its configuration before weights are loaded.

The model is built without memory (torch's fake tensors), with its adapters, so that weights, gradients and moments are
counted, not guessed. The activations are those of a forward and backward pass of it over a micro-batch: every tensor
that exists at a time is counted, with its real size. Deep models are passed at two small depths, whose difference is
what one more layer takes.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from offpolicy.compute.room import NO_LIMIT, size
from offpolicy.compute.torch_private import without_memory
from offpolicy.errors import UsageError
from offpolicy.language import policy as policies
from offpolicy.language.adapters import first
from offpolicy.language.optimisers import moment_bytes
from offpolicy.language.quantizing import QUANTIZED_BYTES, quantizable

DEPTHS = (2, 3)  # layers of the models whose passes are followed, where a model has more
ALL = 1 << 30  # layers
CPU_TILE = 2**20  # logits of a tile there, see `token_logps`


@dataclass(frozen=True)
class Workload:
    """What a run does with a model, as far as memory goes.

    Attributes:
        rows, length: of the largest micro-batch on one process: texts, and tokens of each.
        own_mask: whether attention gets a mask of (rows, length, length), as where prompts are shared.
        chunk: tokens whose logits exist at once.
        dtype: of the weights: "float32" or "bfloat16".
        precision: of the Trainer.
        adapter: settings of the adapters; None trains all weights.
        quantize: "4bit" for weights below the adapters, or None.
        optimizer, offload: see :mod:`offpolicy.language.optimisers`.
        checkpointing: whether layers are computed again in the backward pass.
        reference: type of the weights of a frozen copy beside the policy; None where there is none.
        critic: "model", "head" or None.
        cached_rows, cached_length: answers that are drawn at once by a cache on the device, and tokens of each.
        processes: that share the weights (``sharded``) or hold copies of them.
        sharded: whether weights are cut (FSDP2).
        device: kind of device: "cpu" or "cuda".
    """

    rows: int = 1
    length: int = 128
    own_mask: bool = False
    chunk: int = 256
    dtype: str = "float32"
    precision: str = "32-true"
    adapter: Mapping[str, Any] | None = None
    quantize: str | None = None
    optimizer: str = "adamw"
    offload: bool = False
    checkpointing: bool = False
    reference: str | None = None
    critic: str | None = None
    cached_rows: int = 0
    cached_length: int = 0
    processes: int = 1
    sharded: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of training, on one device.

    Attributes:
        parts: on the device, by name. ``answers`` exist while no activations do.
        host: kept on the host; 0 on a CPU, where the host is the device.
        fault: why the activations are not among them, where a model cannot be followed.
    """

    parts: dict[str, int]
    host: int = 0
    fault: str = ""

    @property
    def known(self) -> bool:
        """Whether the activations are among the parts."""
        return not self.fault

    @property
    def total(self) -> int:
        passing = ("activations", "logits", "answers")
        lasting = sum(count for name, count in self.parts.items() if name not in passing)
        found = self.parts
        return lasting + max(found.get("activations", 0) + found.get("logits", 0), found.get("answers", 0))

    def words(self) -> str:
        """The whole and its parts, largest first."""
        parts = sorted(self.parts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {size(count)}" for name, count in parts if count * 1000 >= self.total)
        more = f"; {size(self.host)} on the host" if self.host else ""
        unknown = "" if self.known else f", activations not known, as the model cannot be followed ({self.fault})"
        return f"about {size(self.total)}: {shown}{more}{unknown}"


def estimate_memory(config: Any, work: Workload) -> MemoryEstimate:
    """Memory that training takes on one device at its peak.

    Args:
        config: of the model, of ``transformers``; no weights are needed.
        work: what is done with it.

    Returns:
        The parts that are lasting (weights, gradients, optimiser, reference, critic), and those of a step.
    """
    text = config.to_json_string(use_diff=False)
    counts = _counts(text, _key(work.adapter), work.dtype, work.quantize, work.precision)
    share = work.processes if work.sharded else 1
    kept = counts.moments(work.optimizer, work.offload)
    kept += counts.trained * 8 if work.offload else 0  # masters, and gradients that are brought to them
    parts = {"weights": counts.weights // share, "gradients": counts.gradients // share}
    if work.sharded:
        parts["gathered"] = counts.weights if work.cached_rows else counts.gathered  # drawing takes all
    elif work.processes > 1:
        parts["buckets"] = counts.gradients  # of DDP, which adds gradients up in them
    if work.reference:
        parts["reference"] = counts.numbers * _width(work.reference)
    width = config.get_text_config().hidden_size
    if work.critic:
        decoder = counts.decoder if work.critic == "model" else width * width
        weight = 2 if work.precision == "bf16-true" else _width(work.dtype)
        kept += decoder * 16 if work.offload else 0
        parts["critic"] = decoder * weight * (2 if work.offload else 4) // share
        if work.sharded:
            parts["gathered"] += decoder * weight
    follows = _followed(text, _key(work.adapter), work.dtype, work.precision, work.rows, work.length, work.own_mask,
                        work.checkpointing)  # fmt: skip
    passes = 2 if work.critic == "model" else 1
    parts["activations"] = (follows.size or 0) * passes + counts.unpacked
    parts["logits"] = _logits(config, work, counts.head_trained)
    if work.cached_rows:
        parts["answers"] = _cache(config, work)
    on_host = work.offload and work.device != "cpu"
    parts["optimizer"] = 0 if on_host else kept // share
    host = kept if on_host else 0
    return MemoryEstimate({name: int(count) for name, count in parts.items()}, host, follows.fault)


def check_memory(
    estimate: MemoryEstimate,
    free: int,
    advice: list[tuple[str, MemoryEstimate]],
    device: str,
    host_free: int = NO_LIMIT,
) -> None:
    """Refuse training that cannot fit.

    Args:
        estimate: of the run as it is set.
        free: bytes that the device has; ``NO_LIMIT`` where it does not tell, and nothing is refused.
        advice: options that would save memory, and what is needed with each.
        device: in words.
        host_free: bytes of the machine that each of its processes may take.

    Raises:
        UsageError: it cannot fit; names the options, and what each saves.
    """
    if estimate.host > host_free:
        raise UsageError(
            f"`offload_optimizer` needs {size(estimate.host)} on the host for each process, and {size(host_free)} are "
            "free there. Pass --model.lora_rank 16 or --model.optimizer adafactor with it, or train a smaller model. "
            "--model.check_memory false tries it all the same."
        )
    if estimate.total <= free or free >= NO_LIMIT:
        return
    saving = [(words, other.total) for words, other in advice if other.total < 0.97 * estimate.total]
    lines = [
        f"{words} (needs {size(total)}{'' if total <= free else ', too much alone'})"
        for words, total in sorted(saving, key=lambda one: one[1])
    ]
    instead = f" Pass one or more of: {'; '.join(lines)}." if lines else ""
    raise UsageError(
        f"training needs {estimate.words()}; {device} has {size(free)} free.{instead} Or train a smaller model. "
        "--model.check_memory false tries it all the same."
    )


# -- what lasts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """Bytes and numbers of a model with its adapters."""

    weights: int
    gradients: int
    trained: int  # numbers
    numbers: int  # without adapters
    decoder: int  # numbers of the model without its embeddings' second use, as a critic copies it
    gathered: int  # bytes of the largest layer twice and of what is around the layers, whole under FSDP2
    unpacked: int  # bytes of the largest 4-bit layer in the type of products
    head_trained: bool
    tensors: tuple[Tensor, ...] = field(repr=False)  # trained, on the meta device

    def moments(self, optimizer: str, offload: bool) -> int:
        kept = [p.float() for p in self.tensors] if offload else self.tensors
        return sum(moment_bytes(optimizer, p) for p in kept)


@lru_cache(maxsize=32)
def _counts(config: str, adapter: str, dtype: str, quantize: str | None, precision: str) -> _Counts:
    plain = _bare_model(config, "", dtype, precision)
    numbers, decoder = (sum(p.numel() for p in m.parameters()) for m in (plain, plain.get_decoder()))
    model = _bare_model(config, adapter, dtype, precision)
    base = policies.base_of(model)
    packed = {id(layer.weight) for layer in quantizable(base)} if quantize else set()
    params = list(model.parameters())
    trained = tuple(p for p in params if p.requires_grad)
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers_of(base)]
    weights = sum(int(p.numel() * (QUANTIZED_BYTES if id(p) in packed else p.element_size())) for p in params)
    head = base.get_output_embeddings()
    head = getattr(head, "original_module", head)
    return _Counts(
        weights=weights,
        gradients=sum(p.numel() * p.element_size() for p in trained),
        trained=sum(p.numel() for p in trained),
        numbers=numbers,
        decoder=decoder,
        gathered=2 * max(layers, default=0) + weights - sum(layers),
        unpacked=max((2 * p.numel() for p in params if id(p) in packed), default=0),
        head_trained=bool(head.weight.requires_grad),
        tensors=trained,
    )


def _bare_model(config: str, adapter: str, dtype: str, precision: str, depth: int = ALL) -> Any:
    """A model with its adapters on the meta device.

    Args:
        depth: repeated layers that are kept.
    """
    settings = json.loads(adapter) if adapter else None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = policies.build_model(config, dtype=policies.dtype_of(dtype))
        del layers_of(model)[depth:]  # before adapters are added, which takes long
        if settings is not None:
            add = policies.same_adapter if "peft_type" in settings else policies.add_adapter
            model = add(model, settings)
    return model.to(torch.bfloat16) if precision == "bf16-true" else model


def _names_layers(settings: Mapping[str, Any]) -> bool:
    """Whether adapters are told by which of the repeated layers get them, which have to be there then."""
    targets = settings.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else targets
    return settings.get("layers_to_transform") is not None or any("." in name for name in names)


def _as_on_cpu(model: nn.Module) -> None:
    """Give a model of the meta device fake tensors of the CPU, whose fused operations keep what those of GPUs keep."""
    made: dict[int, Any] = {}

    def fake(p: Any) -> Any:
        if p is not None and id(p) not in made:
            empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
            trained = isinstance(p, nn.Parameter)
            made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad) if trained else empty
        return None if p is None else made[id(p)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, p in tensors.items():
                tensors[name] = fake(p)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The repeated layers of a model: the list with the most weights."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=nn.ModuleList())


def _key(adapter: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(adapter), sort_keys=True) if adapter else ""


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# -- what a step takes -------------------------------------------------------------------------------------------------


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made within it took at one time, beside those of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        lasting = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._seen = {one.untyped_storage()._cdata for one in lasting}  # views of them are results of operations too

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self._count(one.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, count)

    def _free(self, key: int, count: int) -> None:
        self._seen.discard(key)
        self.now -= count


class _Followed(NamedTuple):
    """Bytes of activations, and of their gradients, at the peak; None where the model cannot be followed, and why."""

    size: int | None
    fault: str = ""


# of a model that needs numbers, other arguments, or layers that were cut
UNFOLLOWED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)


@lru_cache(maxsize=64)
def _followed(
    config: str, adapter: str, dtype: str, precision: str, rows: int, length: int, own_mask: bool, checkpointing: bool
) -> _Followed:
    """Go through a model of a few layers without numbers."""
    depth = len(layers_of(_bare_model(config, "", dtype, precision)))
    few, all_of_them = {min(depth, d) for d in DEPTHS}, {depth}
    ways = [all_of_them] if adapter and _names_layers(json.loads(adapter)) else [few]
    if adapter and all_of_them not in ways:
        ways.append(all_of_them)  # the first layers may lack what adapters are for
    # experts in float32 cannot be passed so: numbers of twice the bytes of bfloat16
    kinds = ((dtype, 1), ("bfloat16", 2))[: 2 if dtype == "float32" else 1]
    fault = ""
    for depths, (kind, times) in product(ways, kinds):
        try:
            model = _bare_model(config, adapter, kind, precision, max(depths))
            peaks = _peaks(model, depths, rows, length, own_mask, checkpointing, precision)
        except UNFOLLOWED as error:
            fault = fault or f"{type(error).__name__}: {first(error, 120)}"
            continue
        most = max(peaks)
        step = peaks[most] - peaks[most - 1] if depth > most and most - 1 in peaks else 0
        return _Followed(times * (peaks[most] + step * (depth - most)))
    return _Followed(None, fault)


def _peaks(
    model: Any, depths: set[int], rows: int, length: int, own_mask: bool, checkpointing: bool, precision: str
) -> dict[int, int]:
    """The peak of a pass by number of layers, which are taken off the model."""
    base = policies.base_of(model)
    with without_memory(), policies.silent():
        _as_on_cpu(model)
        base.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if base is not model:
                model.enable_input_require_grads()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None  # counted apart
        ids = torch.zeros(rows, length, dtype=torch.long, device="cpu")
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="cpu") if own_mask else None
        peaks = {}
        for count in sorted(depths, reverse=True):
            del layers_of(base)[count:]
            peaks[count] = _pass(base, ids, mask, precision)
    return peaks


def _pass(model: Any, ids: Tensor, mask: Tensor | None, precision: str) -> int:
    """The peak of one forward and backward pass through the decoder."""
    mixed = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "bf16-mixed" else nullcontext()
    with _Peak(model) as peak:
        with mixed:
            out = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))
    return peak.most


def _logits(config: Any, work: Workload, head_trained: bool) -> int:
    """Bytes of logits: the tiles kept for the backward pass, some of one tile, and the gradient of the head."""
    settings = config.get_text_config()
    places, low = work.rows * work.length, work.dtype == "bfloat16" or work.precision.startswith("bf16")
    kept = min(work.chunk, places) * settings.vocab_size
    tile = min(kept, CPU_TILE) if work.device == "cpu" else kept
    head = settings.vocab_size * settings.hidden_size * _width(work.dtype) if head_trained else 0
    states = 3 * places * settings.hidden_size * 4
    return 4 * kept + (10 if low else 8) * tile + head + states


def _cache(config: Any, work: Workload) -> int:
    """Bytes of keys and values of all layers while answers are drawn."""
    settings = config.get_text_config()
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    size_of_head = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    width = 2 if work.dtype == "bfloat16" or work.precision.startswith("bf16") else 4
    return 2 * settings.num_hidden_layers * heads * size_of_head * width * work.cached_rows * work.cached_length
