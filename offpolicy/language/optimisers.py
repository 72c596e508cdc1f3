"""Optimisers of language methods: AdamW, AdamW with 8-bit moments, Adafactor, and float32 masters on the host.

===========  ==========================================================  ===========================================
name         bytes per trained number, beside weight and gradient        made by
===========  ==========================================================  ===========================================
adamw        two moments in the type of the weight: 8, or 4 in bfloat16  torch, fused
adamw_8bit   two moments of one byte and their scales: 2.03              bitsandbytes (the extra ``quantized``)
adafactor    a row and a column per matrix: about 0                      here, as ``transformers`` computes it
===========  ==========================================================  ===========================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from offpolicy.errors import UsageError, check_choice
from offpolicy.training.lightning_private import FullySharded

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
USUAL_BETAS = (0.9, 0.999)
# bitsandbytes: moments of fewer numbers stay in float32, others have a float32 scale per block
LEAST_8BIT, BLOCK_8BIT, QMAPS_8BIT = 4096, 256, 2 * 256 * 4


def check_optimizer(name: str, betas: Any) -> None:
    """Refuse an optimiser that is not known or not installed, or moments that it has not.

    Raises:
        UsageError: saying what to do.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if name == "adafactor" and tuple(betas) != USUAL_BETAS:
        raise UsageError(
            f"`adam_betas` is {tuple(betas)} and `optimizer` 'adafactor', which has no such moments; expected one of "
            "the two. Leave `adam_betas` out."
        )
    if name == "adamw_8bit":
        import_bitsandbytes("`optimizer` is 'adamw_8bit'", "'adafactor' or 'adamw'")


def check_sharding(name: str, offload: bool, strategy: Any) -> None:
    """Raise :class:`UsageError` for an optimiser that does not work on parts of weights, where they are cut."""
    if isinstance(strategy, FullySharded) and (name != "adamw" or offload):
        found = "`offload_optimizer` is true" if offload else f"`optimizer` is {name!r}"
        raise UsageError(
            f"{found}, which does not work on weights cut by 'fsdp2'; expected 'adamw' on the device, whose moments "
            "are cut as the weights are. Leave it out, or pass --trainer.strategy ddp."
        )


def import_bitsandbytes(found: str, instead: str) -> Any:
    """The package bitsandbytes.

    Args:
        found: what needs it, as the user gave it.
        instead: what does not need it.

    Raises:
        UsageError: it is not installed, or does not work here.
    """
    try:
        import bitsandbytes
    except Exception as error:  # its compiled part can fail in many ways
        absent = isinstance(error, ImportError) and getattr(error, "name", "") == "bitsandbytes"
        why = "is not installed" if absent else f"does not work here ({str(error).splitlines()[0][:200]})"
        raise UsageError(
            f"{found}, which needs the package bitsandbytes, and that {why}. Run: pip install 'offpolicy[quantized]', "
            f"or choose {instead}."
        ) from None
    return bitsandbytes


def make_optimizer(
    name: str, params: Iterable[Tensor], *, lr: float, weight_decay: float, betas: Any, fused: bool, offload: bool
) -> Optimizer:
    """An optimiser of the trained ones among some parameters; its decay leaves out biases and norms.

    Args:
        name: one of ``OPTIMIZERS``.
        params: tensors, of which those that require a gradient are trained.
        lr: learning rate.
        weight_decay: λ of decoupled decay, ≥ 0.
        betas: decay of the moments of AdamW.
        fused: let AdamW run as one kernel.
        offload: keep float32 masters and moments on the host, see :class:`HostMasters`.
    """
    groups = decay_groups(params, lr=lr, weight_decay=weight_decay)

    def make(groups: list[dict[str, Any]]) -> Optimizer:
        if name == "adafactor":
            return Adafactor(groups)
        if name == "adamw_8bit":
            bits = import_bitsandbytes("`optimizer` is 'adamw_8bit'", "'adafactor' or 'adamw'")
            return bits.optim.AdamW8bit(groups, betas=tuple(betas))
        return torch.optim.AdamW(groups, betas=tuple(betas), fused=fused or offload)  # masters are on the CPU

    return HostMasters(groups, make) if offload else make(groups)


def forget_moments(optimizer: Optimizer) -> None:
    """Let an optimiser go on as a new one would, from the weights as they are."""
    getattr(optimizer, "inner", optimizer).state.clear()


def decay_groups(params: Iterable[Tensor], *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trained ones of some parameters in groups: matrices with decay, biases and norms without."""
    trained = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def trial_move(optimizer: Optimizer, weight: Tensor, gradient: Tensor) -> Tensor:
    """How an optimiser would move a weight by a gradient, of the weight's shape; nothing of the optimiser changes.

    Args:
        optimizer: AdamW of torch, or Adafactor; its learning rates are those of the step.
        weight: one of its parameters.
        gradient: of the weight.
    """
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    moved = weight.detach().clone().requires_grad_(True)
    kind: Any = type(optimizer)
    trial = kind([{**group, "params": [moved]}])
    trial.state[moved] = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in optimizer.state.get(weight, {}).items()
    }
    moved.grad = gradient.to(moved.dtype)
    trial.step()
    return moved.detach() - weight


def moment_bytes(name: str, p: Tensor) -> int:
    """Bytes that an optimiser keeps for a trained tensor, beside weight and gradient, without its count of steps."""
    if name == "adamw":
        return 2 * p.numel() * p.element_size()
    if name == "adamw_8bit":
        if p.numel() < LEAST_8BIT:
            return 2 * p.numel() * 4
        return 2 * p.numel() + 2 * 4 * math.ceil(p.numel() / BLOCK_8BIT) + QMAPS_8BIT
    rows = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() >= 2 else p.numel()
    return 4 * rows


class Adafactor(Optimizer):
    """Adafactor without momentum (arXiv:1804.04235, Alg. 4 with the update clipping of Alg. 5), at a given rate.

    As that of ``transformers`` with ``scale_parameter=False, relative_step=False``, so that a learning rate means
    what it means to AdamW. The second moment of a matrix is the product of a row and a column, which are float32
    whatever the weights are.

    Args:
        params: tensors or groups.
        lr: step size, ≥ 0.
        weight_decay: λ: weights are multiplied by 1 − lr·λ.
    """

    TINY, CLIP, DECAY = 1e-30, 1.0, -0.8  # ε₁, d and the exponent of β₂ₜ = 1 − tᵞ, of the paper

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return loss

    def _move(self, p: Tensor, group: Mapping[str, Any]) -> None:
        grad, state = p.grad.float(), self.state[p]  # type: ignore[union-attr]
        if not state:
            state["step"] = 0
            shapes = {"row": grad.shape[:-1], "column": grad.shape[:-2] + grad.shape[-1:]}
            for name, shape in (shapes if grad.dim() >= 2 else {"square": grad.shape}).items():
                state[name] = grad.new_zeros(shape)
        state["step"] += 1
        keep = 1.0 - state["step"] ** self.DECAY
        square = grad.square().add_(self.TINY)
        if grad.dim() >= 2:
            row, column = state["row"], state["column"]
            row.mul_(keep).add_(square.mean(-1), alpha=1 - keep)
            column.mul_(keep).add_(square.mean(-2), alpha=1 - keep)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = torch.mul(scale, column.rsqrt().unsqueeze(-2), out=square).mul_(grad)
        else:
            update = state["square"].mul_(keep).add_(square, alpha=1 - keep).rsqrt().mul_(grad)
        size = torch.linalg.vector_norm(update) / update.numel() ** 0.5
        update.div_((size / self.CLIP).clamp_(min=1.0)).mul_(group["lr"])
        weight = p.float() if p.dtype != torch.float32 else p
        weight.mul_(1.0 - group["weight_decay"] * group["lr"]).sub_(update)
        if weight is not p:
            p.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        _as_kept(self, state_dict)


class HostMasters(Optimizer):
    """An optimiser that works on float32 copies of the weights (masters) on the host, and keeps its moments there.

    The device holds the weights, in whatever type they are, and their gradients. A step copies gradients to the host,
    lets the inner optimiser move the masters, and writes them back, rounded once. With float32 weights on a CPU the
    numbers are those of the inner optimiser alone.

    Args:
        groups: of parameters, each with ``lr`` and ``weight_decay``.
        make: groups of masters → their optimiser.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        super().__init__([dict(group) for group in groups], {})
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of weight and master
        self.inner = make([{**group, "params": self._masters(group["params"])} for group in groups])

    def _masters(self, params: Iterable[Tensor]) -> list[Tensor]:
        made = []
        for p in params:
            master = torch.empty(p.shape, dtype=torch.float32, device="cpu", pin_memory=p.is_cuda).copy_(p.detach())
            made.append(master.requires_grad_(True))
            self.pairs.append((p, master))
        return made

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "inner"):
            self.inner.add_param_group({**param_group, "params": self._masters(self.param_groups[-1]["params"])})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, master in self.pairs:
            if p.grad is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master, pin_memory=p.is_cuda)
            master.grad.copy_(p.grad, non_blocking=True)
        self._wait()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"], inner["weight_decay"] = group["lr"], group["weight_decay"]
        self.inner.step()
        for p, master in self.pairs:
            if p.grad is not None:
                p.copy_(master, non_blocking=True)
        self._wait()  # the next step writes into these masters
        return loss

    def _wait(self) -> None:
        if any(p.is_cuda for p, _ in self.pairs[:1]):
            torch.cuda.synchronize(self.pairs[0][0].device)

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimiser, with the ``master`` of each weight."""
        kept = self.inner.state_dict()
        masters = [p for group in self.inner.param_groups for p in group["params"]]
        state = {i: {**kept["state"].get(i, {}), "master": master.detach()} for i, master in enumerate(masters)}
        return {"state": state, "param_groups": kept["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        masters = [p for group in self.inner.param_groups for p in group["params"]]
        state = {i: dict(entry) for i, entry in state_dict["state"].items()}
        for i, master in enumerate(masters):
            found = state.get(i, {}).pop("master", None)
            if found is None:
                raise UsageError(
                    "the checkpoint has no float32 masters; expected one of a run with `offload_optimizer`. Pass "
                    "--model.offload_optimizer false, or begin a new run."
                )
            master.copy_(found)
        self.inner.load_state_dict(
            {"state": {i: entry for i, entry in state.items() if entry}, "param_groups": state_dict["param_groups"]}
        )
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group |= {name: value for name, value in inner.items() if name != "params"}


def _as_kept(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Take state back in its own type, which torch would make that of the weight."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in state_dict["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                optimizer.state[params[i]][name] = value.to(params[i].device, copy=True)
