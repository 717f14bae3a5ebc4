"""A linear probe: what a frozen encoder knows, read by one linear layer (Alain and Bengio 2016).

Fine-tuning all of a network mixes what the encoder has learned with what a decoder adds to it. Here
the encoder is never trained, and what is trained is linear in its normed states.

Axis letters: b batch, c channels, d h w the grid of a state, D H W that of the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F


class Probe(nn.Module):
    """A frozen encoder and a linear head: (b, in_channels, D, H, W) -> (b, out_channels, D, H, W).

    backbone: with the methods and attributes of dae/model/__init__.py. Its `encoder` is shared with
    the probe, and frozen; its decoder is left out.

    The states are layer-normed over their channels, without weights, so that none of them counts
    for more because its values are larger. (Swin UNETR's are so already, but with
    --no-normalize-hidden.) Each is then standardised, mapped by a 1x1x1 convolution, upsampled by
    trilinear interpolation, and all are added up. That equals one linear layer on all channels of
    all states, upsampled: the weights of an interpolation sum to 1, so it may as well come after
    the layer, where it has few channels to work on.
    """

    def __init__(self, backbone: Any, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.encoder: nn.Module = backbone.encoder
        self.encoder.requires_grad_(False)
        self.encoder.eval()

        # In a tuple, so that torch takes the decoder for no part of this network.
        self.backbone = (backbone,)

        # One bias is enough for a sum.
        self.head = nn.ModuleList()
        for n, channels in enumerate(widths_of(backbone, in_channels)):
            self.head.append(Layer(channels, out_channels, bias=n == 0))

    def train(self, mode: bool = True) -> "Probe":
        """The encoder stays in eval mode: a dropout or a batch norm of it would not be frozen."""
        super().train(mode)
        self.encoder.eval()
        return self

    def states(self, x: Tensor) -> list[Tensor]:
        """The normed states of the encoder, (b, c, d, h, w) each."""
        (backbone,) = self.backbone
        return [normed(state) for state in backbone.encode(backbone.tokenize(x))]

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-3:]
        maps = [layer(state) for layer, state in zip(self.head, self.states(x))]
        return torch.stack([enlarged(y, size) for y in maps]).sum(dim=0)


class Layer(nn.Conv3d):
    """A 1x1x1 convolution of what is standardised first."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.standardise = Standardise(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.standardise(x))


class Standardise(nn.Module):
    """Each channel to mean 0 and variance 1 over all that it was trained on so far.

    (b, c, d, h, w) -> the same shape; unchanged before the first training step. It is a factor and
    a constant for each channel, so a layer on top of it stays linear. Without it no usual rate
    trains that layer: the channels of a deep state may differ a hundred times less from place to
    place than from each other, and the weights would have to be as large. (He et al. 2022 have a
    batch norm without weights there. Sums over all crops do not depend on the last batches.)
    """

    sums: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Positions, values and squares. The variance is their difference: float64 keeps its digits.
        self.register_buffer("sums", torch.zeros(3, channels, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.sums += over_ranks(sums_of(x))

        n, total, squares = self.sums
        mean = total / n.clamp(min=1)
        variance = (squares / n.clamp(min=1) - mean**2).clamp(min=0) + 1e-6
        scale = torch.where(n > 0, variance, 1.0).rsqrt()
        mean, scale = (rearrange(y, "c -> c 1 1 1").to(x.dtype) for y in (mean, scale))
        return (x - mean) * scale


def sums_of(x: Tensor) -> Tensor:
    """Of each channel the number of positions, the sum and the sum of squares: (3, c), float64."""
    x = x.double()
    total = reduce(x, "b c d h w -> c", "sum")
    squares = reduce(x**2, "b c d h w -> c", "sum")
    positions = torch.full_like(total, x[:, 0].numel())
    return torch.stack([positions, total, squares])


def over_ranks(sums: Tensor) -> Tensor:
    """The same on all ranks, as if they had one batch."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def normed(state: Tensor) -> Tensor:
    """Each token to mean 0 and variance 1 over its channels. (b, c, d, h, w) -> the same shape."""
    x = rearrange(state, "b c d h w -> b d h w c")
    return rearrange(F.layer_norm(x, x.shape[-1:]), "b d h w c -> b c d h w")


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """(b, c, d, h, w) -> (b, c, D, H, W), by trilinear interpolation."""
    return F.interpolate(x, tuple(size), mode="trilinear", align_corners=False)


def widths_of(backbone: Any, in_channels: int) -> list[int]:
    """The channels of each state, by those of the smallest crop that fits."""
    weight = next(backbone.parameters())
    n = backbone.divisor
    x = weight.new_zeros(1, in_channels, 2 * n, n, n)

    states = backbone.encode(backbone.tokenize(x))
    return [state.shape[1] for state in states]
