"""The parts that all backbones share: residual convolutions in 3D, and the sizes that divide.

Axis letters, the same in every module of this package:

    b batch   c channels   d h w the grid, in the order of the RAS-oriented NIfTI axes
    i j tokens of one window   heads attention heads   e channels of one head

All convolutions are without bias, because an instance norm follows and would subtract it.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2**17  # numbers of a sample that are computed together: they fit in a core's cache


class Standardise(torch.autograd.Function):
    """Each channel of each sample to mean 0 and variance 1 over its voxels.

    (b, n, c) -> the same shape and type; computed in float32, or in float64 of float64.

    What `F.instance_norm` computes, for a CPU. That one copies a map of channels_last_3d to the
    other layout, and the next convolution copies it back, as their gradients are. Its backward pass
    is also wrong (relative error 1.4, in float64 too) for a batch of one whose gradient arrives in
    channels_last_3d; seen in torch 2.11.0 and 2.14.1. A few voxels at a time, so that what lies
    between two operations stays in the cache: a map of 48 channels at 96^3 takes 0.11 s, 0.22 s in
    one piece, and 0.85 s with `F.instance_norm` and its copies.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)

        mean = mean_over_voxels(part.to(exact) for (part,) in pieces(x))
        squares = ((part.to(exact) - mean).square_() for (part,) in pieces(x))
        scale = (mean_over_voxels(squares) + eps).rsqrt()

        y = torch.empty_like(x)
        for y_part, part in pieces(y, x):
            y_part.copy_((part.to(exact) - mean).mul_(scale))

        context.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """The gradient without its mean and without its part along y, over the deviation."""
        y, scale = context.saved_tensors
        exact = scale.dtype

        mean = mean_over_voxels(part.to(exact) for (part,) in pieces(gradient))
        products = (part.to(exact) * y_part for part, y_part in pieces(gradient, y))
        along_y = mean_over_voxels(products)

        d_x = torch.empty_like(y)
        for d_part, part, y_part in pieces(d_x, gradient, y):
            centred = part.to(exact) - mean
            d_part.copy_(centred.sub_(y_part * along_y).mul_(scale))
        return d_x, None


def pieces(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few voxels of each map (b, n, c), then the next ones. One piece for a compiler.

    How many does not depend on the batch: a sample is rounded alike on any number of ranks.
    """
    _, n, c = maps[0].shape
    at_once = n if torch.compiler.is_compiling() else max(1, AT_ONCE // c)
    return zip(*(x.split(at_once, dim=1) for x in maps))


def mean_over_voxels(parts: Iterable[Tensor]) -> Tensor:
    """Of a map in pieces (b, some of n, c): (b, 1, c)."""
    voxels = 0
    sums = []
    for part in parts:
        voxels += part.shape[1]
        sums.append(part.sum(1, keepdim=True))
    return torch.stack(sums).sum(0) / voxels


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1 over the grid.

    (b, c, d, h, w) -> the same shape. Raises ValueError where the grid is one voxel.

    This is where a crop loses its intensity: no later layer can tell a bright crop from a dark one.
    (Group and batch norm of torch are the same on paper, but their CPU kernels for
    `channels_last_3d` are off by 1e-3 on 96^3 voxels, against 6e-7.)
    """

    def __init__(self, channels: int, *, affine: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-5)

        d, h, w = x.shape[2:]
        if d * h * w == 1:
            raise ValueError("the instance norm of a single voxel is 0; take larger crops")
        y = Standardise.apply(rearrange(x, "b c d h w -> b (d h w) c"), 1e-5)
        if self.weight is not None and self.bias is not None:
            y = (y * self.weight + self.bias).to(x.dtype)
        return rearrange(y, "b (d h w) c -> b c d h w", d=d, h=h)


def activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(x)`, and what a CPU needs for it to be right and fast.

    A kernel of 1x1x1 is a linear layer over the channels. torch has no fast convolution for it on a
    CPU, and that one leaves channels_last_3d.

    With two voxels along the first axis the weight gradient of torch 2.14's AVX512-BF16 kernel
    reads memory that was never written: 20 of 20 gradients were wrong, several of them NaN. Such a
    grid is small; float32 costs nothing.
    """
    if x.device.type != "cpu":
        return conv(x)
    if conv.kernel_size == (1, 1, 1) and conv.stride == (1, 1, 1):
        weight = rearrange(conv.weight, "c_out c_in 1 1 1 -> c_out c_in")
        y = F.linear(rearrange(x, "b c d h w -> b d h w c"), weight, conv.bias)
        return rearrange(y, "b d h w c -> b c d h w")
    if x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return conv(x.float())
    return conv(x)


def in_layout_of(weight: Tensor, x: Tensor) -> Tensor:
    """`x`, contiguous in memory where the kernel `weight` is.

    cuDNN computes in channels_last_3d if either of the two is, and the norm that follows makes
    its result contiguous again: two copies of a whole map for every convolution.
    """
    return x.contiguous() if weight.is_contiguous() else x


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions around a shortcut. (b, c_in, d, h, w) -> (b, c_out, d, h, w).

    The shortcut is the identity where the channels agree, else a 1x1x1 convolution with its own
    norm.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv3d(c_in, c_out, 1, bias=False) if c_in != c_out else None
        self.norm = InstanceNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = in_layout_of(self.conv1.weight, x)
        y = activation(self.norm(convolve(self.conv1, x)))
        y = self.norm(convolve(self.conv2, y))
        if self.shortcut is not None:
            x = self.norm(convolve(self.shortcut, x))
        return activation(x + y)


class UpBlock(nn.Module):
    """Twice the grid, then merge with the skip.

    x (b, c_in, d, h, w), skip (b, c_out, 2d, 2h, 2w) -> as the skip.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False)
        self.block = ResidualBlock(2 * c_out, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.up(x), skip], dim=1))


def apply_block(block: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """`block(x)`; with `recompute` its values are made again in the backward pass, not kept."""
    if recompute:
        return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]
    return block(x)


def check_size(size: Sequence[int], divisor: int) -> None:
    """Raises ValueError where `size` (d, h, w) does not fit a network, with one that would fit.

    Each axis must be a multiple of `divisor`, and the bottleneck more than one voxel: the norm of
    one voxel is 0.
    """
    divides = all(n > 0 and n % divisor == 0 for n in size)
    if divides and prod([n // divisor for n in size]) > 1:
        return

    fitting = [max(divisor, round(n / divisor) * divisor) for n in size]
    if prod([n // divisor for n in fitting]) == 1:
        fitting = [2 * divisor] * 3

    raise ValueError(
        f"size {' '.join(map(str, size))} does not fit the network: each side must be a multiple "
        f"of {divisor}, one of them at least {2 * divisor}; {' '.join(map(str, fitting))} would fit"
    )
