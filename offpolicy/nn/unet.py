"""The trajectory U-Net of Policy-Guided Diffusion (Jackson et al. 2024, arXiv:2404.06356, authors' code).

Sequences are (B, T, C) throughout: convolutions over time are products with the channels innermost, which CPUs and GPUs
compute fastest, and normalisation per time step needs no rearrangement.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from offpolicy.errors import UsageError, check_range


class TrajectoryUNet(nn.Module):
    """A U-Net over time: (B, T, C) and a noise level per sequence → (B, T, C).

    Encoder block i has width F·2^i: twice (convolution of 3 steps, group norm, ReLU), then pooling by 2; the lowest is
    the bottleneck. Decoder block i: to the length of the encoder's, convolution of 2 steps, its output beside the
    encoder's, twice convolution of 3 steps; each followed by group norm and ReLU. A projection of the noise level's
    embedding is added to the first convolution of every block.

    Args:
        channels: C.
        num_features: F, a multiple of 8, ≥ 16.
        num_blocks: widths F, 2F, 4F, …, ≥ 1.
        groupnorm_over_time: let the statistics of a group run over time too. The authors' are those of one time step.
        groups: of the group norm.
    """

    def __init__(
        self,
        channels: int,
        num_features: int = 128,
        num_blocks: int = 3,
        *,
        groupnorm_over_time: bool = False,
        groups: int = 8,
    ) -> None:
        super().__init__()
        check_range("num_features", num_features, 16)
        check_range("num_blocks", num_blocks, 1)
        if num_features % groups:
            raise UsageError(
                f"`num_features` is {num_features}; expected a multiple of the {groups} groups, such as 64."
            )
        widths = [num_features * 2**i for i in range(num_blocks)]
        conv = partial(ConvNorm, groups=groups, over_time=groupnorm_over_time)
        self.shortest = 2 ** (num_blocks - 1)  # steps that leave one at the bottleneck
        self.embed = NoiseEmbedding(num_features)
        self.encoder: Any = nn.ModuleList(
            nn.ModuleList((conv(before, w, 3), conv(w, w, 3))) for before, w in zip([channels, *widths], widths)
        )
        self.decoder: Any = nn.ModuleList(
            nn.ModuleList((conv(2 * w, w, 2), conv(2 * w, w, 3), conv(w, w, 3))) for w in reversed(widths[:-1])
        )
        self.blocks = [*widths, *reversed(widths[:-1])]
        self.shift = lecun(nn.Linear(num_features, sum(self.blocks)))  # the projections of all blocks as one
        self.head = lecun(nn.Linear(widths[0], channels))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Output of F(x; noise), of the shape of x.

        Args:
            x: (B, T, C), T ≥ 2^(num_blocks - 1).
            noise: c_noise of each sequence (B,), or one for all, ().
        """
        shifts = iter(self.shift(self.embed(noise.reshape(-1)))[:, None].split(self.blocks, -1))
        skips: list[Tensor] = []
        for first, second in self.encoder:
            x = second(first(pooled(x) if skips else x, next(shifts)))
            skips.append(x)
        for (up, first, second), skip in zip(self.decoder, reversed(skips[:-1])):
            x = up(stretched(x, skip.shape[1]), next(shifts))
            x = second(first(torch.cat([x, skip], -1)))
        return self.head(x)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of F // 8 frequencies of a number, through two layers and a SiLU: (B,) → (B, F)."""

    frequency: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        half = num_features // 8
        step = -math.log(10_000.0) / (half - 1)
        self.register_buffer("frequency", torch.exp(torch.arange(half) * step), persistent=False)
        self.first = lecun(nn.Linear(2 * half, num_features))
        self.second = lecun(nn.Linear(num_features, num_features))

    def forward(self, noise: Tensor) -> Tensor:
        angle = noise[:, None] * self.frequency
        return F.silu(self.second(F.silu(self.first(torch.cat([angle.sin(), angle.cos()], -1)))))


class ConvNorm(nn.Module):
    """Convolution over time, group norm and ReLU: (B, T, in) → (B, T, out).

    Args:
        inputs: channels in.
        outputs: channels out.
        size: steps of the kernel, 2 or 3; zeros are added so that T stays, on the right for an even one.
        groups: of the group norm.
        over_time: whether its statistics run over time.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, groups: int, over_time: bool) -> None:
        super().__init__()
        # the order in which convolutions with innermost channels want it: no copy in any call
        self.weight = nn.Parameter(lecun_normal(torch.empty(outputs, size, inputs), size * inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = nn.Parameter(torch.ones(outputs))
        self.offset = nn.Parameter(torch.zeros(outputs))
        self.groups, self.over_time = groups, over_time

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``shift (B, 1, out)`` is added before the norm."""
        y = convolution(x, self.weight, self.bias)
        if shift is not None:
            y = y + shift
        y = group_norm(y, self.groups, self.scale, self.offset, over_time=self.over_time)
        return F.relu(y, inplace=True)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution over time: x (B, T, in), weight (out, size, in) → (B, T, out), with zeros around x."""
    size = weight.shape[1]
    if size % 2 == 0:
        x = F.pad(x, (0, 0, 0, 1))  # of an even kernel the extra step lies on the right
    return steps(F.conv2d(image(x), image(weight), bias, padding=(0, (size - 1) // 2)))


def image(x: Tensor) -> Tensor:
    """(B, T, C) as an image (B, C, 1, T) with the channels innermost in memory, without a copy."""
    return x.transpose(1, 2).unsqueeze(2)


def steps(x: Tensor) -> Tensor:
    """The reverse of :func:`image`."""
    return x.squeeze(2).transpose(1, 2)


def group_norm(x: Tensor, groups: int, scale: Tensor, offset: Tensor, *, over_time: bool, eps: float = 1e-6) -> Tensor:
    """Group norm of x (B, T, C): over the C / groups channels of a group at one step, or over all steps as well."""
    if over_time:
        return F.group_norm(x.transpose(1, 2), groups, scale, offset, eps).transpose(1, 2)
    grouped = x.unflatten(-1, (groups, -1))
    if x.is_cpu and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        normed = NormOfRows.apply(grouped, eps)
    else:
        normed = F.layer_norm(grouped, grouped.shape[-1:], eps=eps)
    return torch.addcmul(offset, normed.flatten(-2), scale)


class NormOfRows(torch.autograd.Function):
    """(x - mean) / √(variance + eps) of the last axis. torch's layer norm takes twice as long for rows of 8 to 32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        inverse = centred.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, mean, inverse)
        return centred.mul_(inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x, mean, inverse = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(gradient, x, x.shape[-1:], mean, inverse, None, None, [True, False, False])[0], None


def pooled(x: Tensor) -> Tensor:
    """The larger of every two steps: (B, T, C) → (B, T // 2, C); an odd last step is dropped."""
    return steps(F.max_pool2d(image(x), (1, 2)))


def stretched(x: Tensor, length: int) -> Tensor:
    """The nearest step of x (B, T, C) for each of ``length`` steps, by their centres (`nearest-exact` in torch)."""
    if length == 2 * x.shape[1]:
        return x.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1, 2)
    centre = (torch.arange(length, device=x.device) + 0.5) * (x.shape[1] / length)
    return x.index_select(1, centre.long())


def lecun(layer: nn.Linear) -> nn.Linear:
    """A linear layer with the start of flax's: LeCun's normal law and no bias."""
    lecun_normal(layer.weight, layer.in_features)
    nn.init.zeros_(layer.bias)
    return layer


def lecun_normal(weight: Tensor, fan_in: int) -> Tensor:
    """In place, a normal law cut at two deviations and widened so that the deviation is 1 / √fan_in."""
    std = fan_in**-0.5 / 0.87962566103423978  # deviation of a standard normal cut at ±2
    return nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)
