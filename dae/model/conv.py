"""The parts that all backbones share: residual convolutions in 3D, and the sizes that divide.

Axis letters, the same in every module of this package:

    b batch   c channels   d h w the grid, in the order of the RAS-oriented NIfTI axes
    i j tokens of one window   heads attention heads   e channels of one head

All convolutions are without bias, because an instance norm follows and would subtract it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ContiguousGradient(torch.autograd.Function):
    """The identity; its gradient is passed on contiguous in memory."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.contiguous()


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1 over the grid.

    (b, c, d, h, w) -> the same shape.

    This is where a crop loses its intensity: no later layer can tell a bright crop from a dark one.
    (A group norm of one channel a group is the same on paper and faster, but its CPU kernel for
    `channels_last_3d` is off by 1e-3 on 96^3 voxels, against 5e-7.)
    """

    def __init__(self, channels: int, *, affine: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-5)

        # On a CPU the backward of `F.instance_norm` is wrong (relative error 1.4, in float64 too)
        # for a batch of one whose gradient arrives in channels_last_3d, whatever the layout of x.
        # Seen in torch 2.11.0 and 2.14.1; right for larger batches and for contiguous gradients.
        # `requires_grad` is asked first: torch.export without gradients then meets no condition on
        # the batch, and does not fix it to that of its example.
        if y.requires_grad and x.device.type == "cpu" and len(x) == 1:
            y = ContiguousGradient.apply(y)
        return y


def activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(x)`, in float32 where a CPU's bf16 kernel is wrong.

    With two voxels along the first axis the weight gradient of torch 2.14's AVX512-BF16 kernel
    reads memory that was never written: 20 of 20 gradients were wrong, several of them NaN. Such a
    grid is small; float32 costs nothing.
    """
    if x.device.type == "cpu" and x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
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
            x = self.norm(self.shortcut(x))
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
