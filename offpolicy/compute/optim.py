"""Gradients and Adam in one call per network, clipping, and the update of target networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from offpolicy.compute.torch_private import (
    foreach_add_,
    foreach_lerp_,
    foreach_mul,
    foreach_norm,
    fused_adam_,
    fused_adamw_,
    run_backward,
)
from offpolicy.errors import check_range

FUSED_DEVICES = ("cpu", "cuda")
# on the CPU a Python number would be made a tensor once per parameter
ONE = torch.ones((), dtype=torch.float32, device="cpu")
FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gradients(loss: Tensor, params: Sequence[Tensor], *, keep_graph: bool = False) -> list[Tensor]:
    """The derivative of a loss by each parameter, as `torch.autograd.grad` gives it.

    Args:
        loss: ().
        params: tensors that the loss depends on.
        keep_graph: leave the graph for another call.

    Raises:
        RuntimeError: the loss does not depend on a parameter.
    """
    return list(run_backward(loss, params, keep_graph=keep_graph))


class FusedAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980), or AdamW (arXiv:1711.05101), that takes gradients as arguments.

    `apply` hands parameters, gradients and moments to torch's fused kernel at once: no ``p.grad``, no Python work per
    tensor and a learning rate per call. Where torch has no fused kernel it uses the foreach form. The numbers are those
    of `torch.optim.Adam` and `AdamW` up to rounding, and the state dict has their layout.

    Args:
        params: tensors or parameter groups.
        lr: step size for `step`, and for `apply` without its own, ≥ 0.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: λ, ≥ 0.
        decoupled: multiply the parameters by 1 − lr·λ (AdamW) instead of adding λ·θ to the gradient.
    """

    traceable = False  # see traceable_adam

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
    ) -> None:
        check_range("lr", lr, 0.0)
        check_range("betas[0]", betas[0], 0.0, 1.0, upper_open=True)
        check_range("betas[1]", betas[1], 0.0, 1.0, upper_open=True)
        check_range("eps", eps, 0.0)
        check_range("weight_decay", weight_decay, 0.0)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(params, defaults)
        self._moments: dict[tuple[int, ...], tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor]]] = {}

    @torch.no_grad()
    def apply(self, params: Sequence[Tensor], grads: Sequence[Tensor], lr: float | Tensor | None = None) -> None:
        """One Adam step.

        Args:
            params: parameters of one group of this optimiser, all on one device and of one type.
            grads: a gradient for each, of the same shape.
            lr: step size of this step; None takes the group's. A tensor () lies on the device of the parameters, and is
                float64 on the CPU, where the result is that of the number, and float32 on CUDA devices, where the rate
                has 24 bits.
        """
        group, first, second, steps = self._moments_of(params)
        beta1, beta2 = group["betas"]
        # the kernel walks the memory of each tensor in a line
        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
        if FusedAdam.traceable:
            adam_by_parts(params, grads, first, second, steps, group, group["lr"] if lr is None else lr)
            return
        fused = params[0].device.type in FUSED_DEVICES and params[0].dtype in FUSED_DTYPES
        if fused:
            foreach_add_(steps, [ONE] * len(steps) if steps[0].is_cpu else 1)
            kernel = fused_adamw_ if group["decoupled"] else fused_adam_
            kernel(
                list(params),
                grads,
                first,
                second,
                [],
                steps,
                lr=group["lr"] if lr is None else lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            return
        adam(
            list(params),
            grads,
            first,
            second,
            [],
            steps,
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] if lr is None else float(lr),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=group["decoupled"],
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step with the gradients in ``p.grad``; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.apply(params, [p.grad for p in params])
        return loss

    def make_moments(self, params: Sequence[Tensor]) -> None:
        """Make the moments of these parameters now, which the first step does else."""
        self._moments_of(params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class, or of `torch.optim.Adam` or `AdamW`."""
        decoupled = [group["decoupled"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, decoupled):
            group.setdefault("decoupled", group.get("decoupled_weight_decay", old))
            group["betas"] = tuple(group["betas"])
        self._moments.clear()  # the old tensors were replaced
        for p, state in self.state.items():
            if "step" in state:  # left at the host, which an update would have to wait for
                state["step"] = state["step"].to(_place_of_count(p))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._moments = {}

    def _moments_of(self, params: Sequence[Tensor]) -> tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor]]:
        """Group, both moments and step counts of these parameters; made once, then found by identity."""
        key = tuple(map(id, params))
        found = self._moments.get(key)
        if found is None:
            group = next(g for g in self.param_groups if any(p is params[0] for p in g["params"]))
            for p in params:
                state, on = self.state[p], _place_of_count(p)
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=on)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                state["step"] = state["step"].to(on)  # torch and Lightning leave that of a checkpoint at the host
            first, second, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
            found = self._moments[key] = (group, first, second, steps)
        return found


def adam_by_parts(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: dict[str, Any],
    lr: float | Tensor,
) -> None:
    """The step of the fused kernel in operations that a compiler can join with others."""
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    for step in steps:
        step.add_(1.0)
    count = steps[0].double()  # 1 - β₂ᵗ has no digits in float32 at the start
    rate, root = lr / (1.0 - beta1**count), (1.0 - beta2**count).sqrt()
    for p, g, m, v in zip(params, grads, first, second, strict=True):
        if decay and group["decoupled"]:
            p.mul_((1.0 - lr * decay) if isinstance(lr, float) else (1.0 - lr * decay).to(p.dtype))
        elif decay:
            g = g + decay * p
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        p.sub_(rate.to(p.dtype) * m / (v.sqrt() / root.to(p.dtype) + group["eps"]))


@contextmanager
def traceable_adam() -> Iterator[None]:
    """Within it :class:`FusedAdam` steps by ordinary operations, as compilers do not look into the fused kernel."""
    FusedAdam.traceable = True
    try:
        yield
    finally:
        FusedAdam.traceable = False


def _place_of_count(p: Tensor) -> torch.device:
    """Where the fused kernel takes the number of steps of a parameter."""
    return p.device if p.device.type == "cuda" else torch.device("cpu")


@torch.no_grad()
def polyak_(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """In place, targets ← (1 − τ) targets + τ sources.

    Args:
        targets: tensors to move.
        sources: tensors to move towards, of the same shapes in the same order.
        tau: τ in [0, 1].
    """
    foreach_lerp_(list(targets), list(sources), tau)


def clip_per_seed(grads: list[Tensor], max_norm: float, *, seeds: bool) -> list[Tensor]:
    """Scale gradients so that their joint norm is at most ``max_norm``, for each seed by itself.

    Args:
        grads: one gradient per parameter, with a seed axis in front when ``seeds``.
        max_norm: limit > 0 on the Euclidean norm over all parameters.
    """
    if not seeds:
        norm = torch.linalg.vector_norm(torch.stack(foreach_norm(grads)))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return list(foreach_mul(grads, scale))
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [g * scale.reshape(-1, *(1,) * (g.dim() - 1)) for g in grads]


def num_trained(module: nn.Module) -> int:
    """Numbers that are trained (targets and buffers are not)."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
