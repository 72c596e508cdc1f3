"""The trajectory U-Net against a plain one in torch's own layers and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.nn.unet import TrajectoryUNet, convolution, group_norm, pooled, stretched


def made(channels: int = 5, features: int = 16, blocks: int = 3, **options: bool) -> TrajectoryUNet:
    torch.manual_seed(0)
    net = TrajectoryUNet(channels, features, blocks, **options).double()
    for p in net.parameters():  # biases and norms that do something
        p.data += 0.1 * torch.randn_like(p)
    return net


def plain(net: TrajectoryUNet, x: Tensor, noise: Tensor, *, over_time: bool = False) -> Tensor:
    """The same network in (B, C, T) with conv1d, max_pool1d, interpolate and group_norm."""

    def block(layer: torch.nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor:
        weight = layer.weight.transpose(1, 2)
        x = F.pad(x, (0, 1)) if weight.shape[-1] == 2 else F.pad(x, (1, 1))
        x = F.conv1d(x, weight, layer.bias)
        x = x if shift is None else x + shift[:, :, None]
        if over_time:
            return F.relu(F.group_norm(x, 8, layer.scale, layer.offset, 1e-6))
        rows = x.transpose(1, 2).reshape(-1, x.shape[1])  # one row per step, as the authors' per-sample map has it
        return F.relu(F.group_norm(rows, 8, layer.scale, layer.offset, 1e-6).view(len(x), -1, x.shape[1]).mT)

    half = len(net.embed.frequency)
    frequency = torch.exp(-torch.arange(half, dtype=torch.float64) * math.log(10_000) / (half - 1))
    angle = noise[:, None] * frequency
    e = torch.cat([angle.sin(), angle.cos()], -1)
    embedded = F.silu(net.embed.second(F.silu(net.embed.first(e))))
    shifts = iter(net.shift(embedded).split(net.blocks, -1))
    x, skips = x.mT, []
    for first, second in net.encoder:
        x = block(second, block(first, x, next(shifts)))
        skips.append(x)
        x = F.max_pool1d(x, 2, 2) if x.shape[-1] > 1 else x
    x = skips.pop()
    for up, first, second in net.decoder:
        skip = skips.pop()
        x = block(up, F.interpolate(x, skip.shape[-1], mode="nearest-exact"), next(shifts))
        x = block(second, block(first, torch.cat([x, skip], 1)))
    return F.conv1d(x, net.head.weight[:, :, None], net.head.bias).mT


@pytest.mark.parametrize("length", [4, 7, 15, 32])
@pytest.mark.parametrize("over_time", [False, True])
def test_equals_the_plain_network(length: int, over_time: bool) -> None:
    net = made(groupnorm_over_time=over_time)
    net.embed.frequency = torch.exp(-torch.arange(2, dtype=torch.float64) * math.log(10_000))
    x, noise = torch.randn(3, length, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = net(x, noise)
    torch.testing.assert_close(found, plain(net, x, noise, over_time=over_time), rtol=1e-9, atol=1e-10)


def test_the_two_group_norms_differ() -> None:
    x, noise = torch.randn(2, 8, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert (made()(x, noise) - made(groupnorm_over_time=True)(x, noise)).abs().max() > 0.1


def test_group_norm_of_one_step_known_answer() -> None:
    """Two groups of two channels: (1, 3) has mean 2 and deviation 1, (0, 4) mean 2 and deviation 2; whatever the
    other step holds."""
    x = torch.tensor([[[1.0, 3.0, 0.0, 4.0], [9.0, 9.0, 5.0, 9.0]]], dtype=torch.float64)
    scale, offset = torch.tensor([1.0, 1, 2, 2]).double(), torch.tensor([0.0, 0, 0, 1]).double()
    found = group_norm(x, 2, scale, offset, over_time=False, eps=0.0 + 1e-12)
    expected = torch.tensor([-1.0, 1.0, -2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-6, atol=1e-6)


def test_convolution_pads_on_both_sides_and_an_even_kernel_on_the_right() -> None:
    """x = (1, 2, 3). Kernel (1, 10, 100): 10·1 + 100·2, 1 + 20 + 300, 2 + 30. Kernel (1, 10): 1 + 20, 2 + 30, 3."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).reshape(1, 3, 1)

    def convolved(*kernel: float) -> list[float]:
        weight = torch.tensor(kernel, dtype=torch.float64).reshape(1, -1, 1)
        return convolution(x, weight, torch.zeros(1, dtype=torch.float64)).flatten().tolist()

    assert convolved(1, 10, 100) == [210.0, 321.0, 32.0]
    assert convolved(1, 10) == [21.0, 32.0, 3.0]


def test_pooling_drops_an_odd_last_step() -> None:
    x = torch.tensor([1.0, 5.0, 4.0, 2.0, 9.0]).reshape(1, 5, 1)
    assert pooled(x).flatten().tolist() == [5.0, 4.0]


@pytest.mark.parametrize(("short", "length"), [(2, 4), (2, 5), (3, 7), (7, 15), (4, 9), (1, 3)])
def test_stretching_is_nearest_exact(short: int, length: int) -> None:
    """2 → 5: the centres 0.5 … 4.5 lie at 0.2, 0.6, 1.0, 1.4 and 1.8 of the short one: 0, 0, 1, 1, 1."""
    x = torch.randn(2, short, 3)
    expected = F.interpolate(x.mT, length, mode="nearest-exact").mT
    assert torch.equal(stretched(x, length), expected)
    if (short, length) == (2, 5):
        assert torch.equal(stretched(x, 5), x[:, [0, 0, 1, 1, 1]])


def test_one_noise_level_for_all_sequences() -> None:
    net, x = made(), torch.randn(3, 8, 5, dtype=torch.float64)
    noise = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(net(x, noise), net(x, noise.expand(3)), rtol=1e-12, atol=1e-12)


def test_sequences_do_not_mix() -> None:
    net, x = made(), torch.randn(3, 8, 5, dtype=torch.float64)
    noise = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(net(x, noise)[1:2], net(x[1:2], noise[1:2]), rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    """Of convolution and norm by differences; of the whole network by the plain one's."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(16, 2, 2, dtype=torch.float64)
    scale, offset, bias = torch.randn(3, 16, dtype=torch.float64)

    def layer(*given: Tensor) -> Tensor:
        return group_norm(convolution(x, *given[:2]), 2, *given[2:], over_time=False)

    assert torch.autograd.gradcheck(layer, [v.requires_grad_() for v in (weight, bias, scale, offset)])

    net, x, noise = made(), torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    net.embed.frequency = torch.exp(-torch.arange(2, dtype=torch.float64) * math.log(10_000))
    params = list(net.parameters())
    ours = torch.autograd.grad(net(x, noise).square().sum(), params)
    theirs = torch.autograd.grad(plain(net, x, noise).square().sum(), params)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("features", "blocks", "millions"), [(1024, 3, 177.7), (128, 3, 2.8), (64, 5, 11.0)])
def test_published_sizes(features: int, blocks: int, millions: float) -> None:
    """Parameters for 17 numbers of state and 6 of action, without allocating them."""
    with torch.device("meta"):
        net = TrajectoryUNet(17 + 6 + 2, features, blocks)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_weights_start_with_the_deviation_of_their_fan_in() -> None:
    """1/√(3·128) of a kernel of 3 steps over 128 channels, cut at two deviations before widening."""
    torch.manual_seed(0)
    weight = TrajectoryUNet(4, 128, 1).encoder[0][1].weight
    assert weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.02)
    assert weight.abs().max().item() <= 2 * (3 * 128) ** -0.5 / 0.879


@pytest.mark.parametrize(("features", "blocks"), [(8, 3), (20, 3), (16, 0)])
def test_impossible_sizes(features: int, blocks: int) -> None:
    with pytest.raises(UsageError, match=r"num_(features|blocks)"):
        TrajectoryUNet(4, features, blocks)
