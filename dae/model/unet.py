"""A residual 3D U-Net, nnU-Net's "residual encoder": DAE on a network of convolutions alone.

Tokens are at full resolution here: the stem is one 3x3x3 convolution, so a token is a voxel and its
neighbours. Each channel that local masking leaves is still a filtered copy of the whole volume; the
task is milder than on patches.

Axis letters: b batch, c channels, d h w grid, the same as D H W for tokens of stride 1.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dae.model.conv import InstanceNorm, activation, apply_block, check_size, convolve

# Channels of the deep stages: past this width they cost memory and time and, in 3D, gain little.
WIDEST = 320


class ConvUnit(nn.Module):
    """A 3x3x3 convolution, instance norm with weights, leaky ReLU.

    (b, c_in, d, h, w) -> (b, c_out, d, h, w).
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=1, bias=False)
        self.norm = InstanceNorm(c_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return activation(self.norm(convolve(self.conv, x)))


class ResidualUnit(nn.Module):
    """Two 3x3x3 convolutions around a shortcut.

    (b, c_in, d, h, w) -> (b, c_out, d/stride, h/stride, w/stride).

    The shortcut is averaged down to the coarser grid, and mixed by a 1x1x1 convolution where the
    channels differ.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv3d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = InstanceNorm(c_out, affine=True)
        self.conv2 = nn.Conv3d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = InstanceNorm(c_out, affine=True)
        self.shortcut = nn.Sequential()
        if c_in != c_out:
            self.shortcut.append(nn.Conv3d(c_in, c_out, 1, bias=False))
            self.shortcut.append(InstanceNorm(c_out, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        y = activation(self.norm1(convolve(self.conv1, x)))
        y = self.norm2(convolve(self.conv2, y))

        if self.stride > 1:
            x = F.avg_pool3d(x, self.stride)
        return activation(y + self.shortcut(x))


class UpUnit(nn.Module):
    """Twice the grid, then one convolution with the skip.

    x (b, c_in, d, h, w), skip (b, c_out, 2d, 2h, 2w) -> as the skip.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False)
        self.merge = ConvUnit(2 * c_out, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.merge(torch.cat([self.up(x), skip], dim=1))


class UNetEncoder(nn.Module):
    """Stem and stages; every stage but the first halves the grid in its first block."""

    def __init__(
        self, c_in: int, widths: Sequence[int], depths: Sequence[int], *, checkpointing: bool
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = ConvUnit(c_in, widths[0])

        self.stages = nn.ModuleList()
        c_before = widths[0]
        for n, (c, depth) in enumerate(zip(widths, depths)):
            first = ResidualUnit(c_before, c, stride=1 if n == 0 else 2)
            others = [ResidualUnit(c, c, stride=1) for _ in range(depth - 1)]
            self.stages.append(nn.ModuleList([first, *others]))
            c_before = c

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of every stage.

        Tokens (b, c, d, h, w) -> (b, widths[n], d/2^n, h/2^n, w/2^n) for n = 0, 1, ...
        """
        states = []
        for stage in self.stages:
            for block in stage.children():
                x = apply_block(block, x, recompute=self.checkpointing and self.training)
            states.append(x)
        return states


class UNet(nn.Module):
    """Residual 3D U-Net: (b, in_channels, D, H, W) -> (b, out_channels, D, H, W).

    No activation at the end.

    feature_size: channels of a token and of the first stage; doubled by every stage up to 320.
    depths: residual blocks of each stage; their number, 2 to 7, is the number of stages.
    checkpointing: recompute the blocks in the backward pass; less memory, more time.

    The constructor's defaults are nnU-Net's larger residual encoder (ResEnc L) at six stages. The
    command line's are Swin UNETR's; there --feature-size 32 --depths 1 3 4 6 6 6 is the same.
    """

    stride = 1  # a token for every voxel

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        feature_size: int = 32,
        depths: Sequence[int] = (1, 3, 4, 6, 6, 6),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_unet(feature_size, depths)
        widths = [min(WIDEST, feature_size * 2**n) for n in range(len(depths))]
        self.embed_dim = feature_size
        self.divisor = 2 ** (len(depths) - 1)
        self.encoder = UNetEncoder(in_channels, widths, depths, checkpointing=checkpointing)

        self.up_units = nn.ModuleList()
        for fine, coarse in reversed(list(pairwise(widths))):
            self.up_units.append(UpUnit(coarse, fine))
        self.head = nn.Conv3d(feature_size, out_channels, 1)

    def tokenize(self, x: Tensor) -> Tensor:
        """(b, in_channels, D, H, W) -> (b, feature_size, D, H, W).

        Raises ValueError on a size that the stages cannot halve.
        """
        check_size(x.shape[-3:], self.divisor)
        return self.encoder.stem(x)  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> [stage 1, ..., bottleneck], each half the grid of the one before."""
        return self.encoder(tokens)  # type: ignore[no-any-return]

    def decode(self, states: Sequence[Tensor], image: Tensor) -> Tensor:
        """States from `encode` -> (b, out_channels, D, H, W). The image is not used.

        The skip at full resolution is the output of the first stage, which is made of tokens:
        masking reaches it, the clean target of --method local_mask and mae does not leak past it,
        and --skip has nothing to choose.
        """
        y = states[-1]
        for up, skip in zip(self.up_units, reversed(states[:-1])):
            y = up(y, skip)
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.tokenize(x)), x)


def check_unet(feature_size: int, depths: Sequence[int]) -> None:
    """Raises ValueError on arguments that make no network."""
    if not 2 <= len(depths) <= 7 or min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)}: give 2 to 7 stages of at least one block")
    if not 1 <= feature_size <= WIDEST:
        raise ValueError(f"feature size {feature_size}: give 1 to {WIDEST}")
