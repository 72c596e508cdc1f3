"""Obvious float64 counterparts of our networks: `torch.nn` layers in a row, one network per ensemble member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offpolicy.data.goals import GoalTransitions, GoalView
from offpolicy.data.views import Noise, Transitions
from offpolicy.nn.stacked import MLP
from offpolicy.training.offline import Draw, OfflineModule, Sizes


def plain_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Our (in, out) weight and (1, out) bias as `nn.Linear`."""
    layer = nn.Linear(*weight.shape, dtype=weight.dtype)
    layer.weight.data.copy_(weight.T)
    layer.bias.data.copy_(bias[0])
    return layer


def plain_mlp(mlp: MLP, member: int | None = None) -> nn.Sequential:
    """A copy of a network with ReLU or GELU, or of one member of a stack, with layer norm on its side of it, if any."""
    pick = (lambda p: p.detach()) if member is None else (lambda p: p.detach()[member])
    parts: list[nn.Module] = []
    for i, layer in enumerate(mlp.layers):
        if i:
            hidden: list[nn.Module] = [nn.GELU("tanh") if mlp.activation == "gelu_tanh" else nn.ReLU()]
            if len(mlp.norms):
                norm = nn.LayerNorm(layer.weight.shape[-2], mlp.norms[i - 1].eps, dtype=layer.weight.dtype)
                norm.weight.data.copy_(pick(mlp.norms[i - 1].weight)[0])
                norm.bias.data.copy_(pick(mlp.norms[i - 1].bias)[0])
                hidden.insert(0 if mlp.layer_norm == "before" else 1, norm)
            parts += hidden
        parts.append(plain_linear(pick(layer.weight), pick(layer.bias)))
    return nn.Sequential(*parts)


def assert_same(ours: MLP, plain: Sequence[nn.Module], rtol: float = 1e-9) -> None:
    """Our network equals these plain ones, one per member (one in all for a network without members)."""
    for i, network in enumerate(plain):
        copy = plain_mlp(ours, i if ours.layers[0].weight.dim() == 3 else None)
        for a, b in zip(copy.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


def ready(method: OfflineModule, obs_dim: int = 3, action_dim: int = 2, seed: int = 0) -> OfflineModule:
    """Built in float64, with optimisers, without data or Trainer."""
    method.initialize(Sizes(obs_dim, action_dim), seed)
    method.double()
    method.configure_optimizers()
    return method


def made_batch(method: OfflineModule, size: int = 16, seed: int = 0, terminated: float = 0.2) -> Any:
    """A random float64 batch with the noise that the method asks for, or with the goals."""
    if isinstance(method.view, GoalView):
        return made_goal_batch(method, size, seed)
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def noise(draw: Draw) -> Tensor:
        shape = (size if draw.per_row else 1, *draw.shape)
        return normal(*shape) if draw.law == "normal" else torch.rand(shape, generator=g, dtype=torch.float64)

    o, a = method.sizes.obs_dim, method.sizes.action_dim
    return Transitions(
        obs=normal(size, o),
        action=normal(size, a).tanh(),
        reward=normal(size),
        next_obs=normal(size, o),
        terminated=torch.rand(size, generator=g) < terminated,
        noise=Noise(**{name: noise(draw) for name, draw in method.draws().items()}),
        next_action=normal(size, a).tanh() if method.view.next_action else None,
    )


def made_goal_batch(method: OfflineModule, size: int, seed: int) -> GoalTransitions:
    """Random states, actions and goals; a fifth of the goals are reached."""
    g = torch.Generator().manual_seed(seed)
    fields: dict[str, Tensor] = {}
    for name in GoalTransitions._fields[: GoalTransitions._fields.index("row")]:
        if name.endswith(("mask", "full")):
            fields[name] = (torch.rand(size, generator=g) > 0.2).double()
        elif name.endswith("reward"):
            continue
        else:
            width = method.sizes.action_dim if name == "action" else method.sizes.obs_dim
            fields[name] = torch.randn(size, width, generator=g, dtype=torch.float64)
    rewards = {name.replace("mask", "reward"): -mask for name, mask in fields.items() if name.endswith("mask")}
    return GoalTransitions(**(fields | rewards | {"action": fields["action"].tanh()}), noise=Noise())


def stack_batches(batches: Sequence[Any]) -> Any:
    """One batch per seed, with the seed axis in front."""
    names = [k for k, v in batches[0]._asdict().items() if isinstance(v, Tensor)]
    fields = {k: torch.stack([getattr(b, k) for b in batches]) for k in names}
    noise = {k: torch.stack([getattr(b.noise, k) for b in batches]) for k in vars(batches[0].noise)}
    return type(batches[0])(**fields, noise=Noise(**noise))


def assert_seeds_equal(make: type, seeds: Sequence[int], updates: int = 4, **options: object) -> None:
    """Several seeds in one module take the same updates as each by itself, weights and metrics."""
    together = make(**options)
    together.seeds = tuple(seeds)
    ready(together)
    alone = [ready(make(**options), seed=seed) for seed in seeds]
    for step in range(1, updates + 1):
        batches = [made_batch(alone[0], seed=10 * step + i) for i in range(len(seeds))]
        metrics = [m.update(b, step) for m, b in zip(alone, batches, strict=True)]
        joint = together.update(stack_batches(batches), step)
        for name, value in joint.items():
            torch.testing.assert_close(value, torch.stack([m[name] for m in metrics]), rtol=1e-9, atol=1e-11)
    for i, method in enumerate(alone):
        for (name, p), q in zip(together.named_parameters(), method.parameters(), strict=True):
            torch.testing.assert_close(p[i], q, rtol=1e-8, atol=1e-11, msg=name)
