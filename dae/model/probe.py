"""A linear probe: what a frozen encoder knows, read by one linear layer (Alain and Bengio 2016).

Fine-tuning all of a network mixes what the encoder has learned with what a decoder adds to it. Here
the encoder is never trained, and what is trained is linear in its normed states.

Axis letters: b batch, c channels, d h w the grid of a state, D H W that of the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Probe(nn.Module):
    """A frozen encoder and a linear head: (b, in_channels, D, H, W) -> (b, out_channels, D, H, W).

    backbone: with the methods and attributes of dae/model/__init__.py. Its `encoder` is shared with
    the probe, and frozen; its decoder is left out.

    The states are layer-normed over their channels, without weights, so that none of them counts
    for more because its values are larger. (Swin UNETR's are so already, but with
    --no-normalize-hidden.) Each is then whitened, mapped by a 1x1x1 convolution, upsampled by
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
    """A 1x1x1 convolution of what is whitened first."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.whiten = Whiten(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.whiten(x))


class Whiten(nn.Module):
    """Channels to mean 0 and covariance 1 over all that it was trained on so far.

    (b, c, d, h, w) -> the same shape; unchanged before the first training step. It is a matrix and
    a constant, so a layer on top of it stays linear.

    Without it a probe measures something else: how fast gradient descent gets anywhere. A deep
    state may differ a hundred times less from place to place than its channels differ from each
    other, and after pre-training nearly all of its variance may lie along five of 64 directions.
    What is told by the other directions would need weights that no usual rate reaches. (He et al.
    2022 have a batch norm without weights there, which mends the first of the two. Sums over all
    crops do not depend on the last batches.)
    """

    sums: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Of the products of all pairs of channels and a 1. A covariance is the difference of two
        # such sums: float64 keeps its digits.
        size = channels + 1
        self.register_buffer("sums", torch.zeros(size, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.sums += over_ranks(sums_of_products(x))

        # In float64, which autocast and TF32 leave alone: a direction of little variance is the
        # difference of large values. (The sums are float32 where a user has cast the network.)
        mean, matrix = whitening(self.sums.double())
        centred = x.double() - rearrange(mean, "c -> c 1 1 1")
        return einsum(matrix, centred, "k c, b c d h w -> b k d h w").to(x.dtype)


def sums_of_products(x: Tensor) -> Tensor:
    """Over all positions of (b, c, d, h, w): of 1, of each channel, and of each pair of channels.

    (1 + c, 1 + c), float64.
    """
    positions = rearrange(x.double(), "b c d h w -> (b d h w) c")
    with_1 = F.pad(positions, (1, 0), value=1.0)
    return einsum(with_1, with_1, "n j, n k -> j k")


def whitening(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (c,), and the matrix (c, c) after which channels have a covariance of 1.

    sums: of `sums_of_products`. The matrix is the inverse of the Cholesky factor.
    """
    n = sums[0, 0].clamp(min=1)
    mean = sums[0, 1:] / n
    covariance = sums[1:, 1:] / n - mean[:, None] * mean

    # A covariance of few positions takes directions that it has not seen for ones without variance,
    # so one position more is counted, which varies alike in all of them. The second share is for
    # good: layer norm takes one direction away, and only rounding is left there.
    variance = covariance.diagonal().mean().clamp(min=1e-12)
    share = 1 / n + 1e-5

    eye = torch.eye(len(mean), dtype=sums.dtype, device=sums.device)
    factor, _ = torch.linalg.cholesky_ex(covariance + share * variance * eye)
    matrix = torch.linalg.solve_triangular(factor, eye, upper=False)
    is_trained = sums[0, 0] > 0
    return mean, torch.where(is_trained, matrix, eye)


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
