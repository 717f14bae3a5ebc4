"""The disruptions of section 2: noise (eq. 1), downsampling (eq. 2), local masking, and MAE's token masking.

Pure functions. Where chance is involved they take one generator per sample, so that a sample meets the same noise and
the same mask on any number of ranks and in any batch. Generators live on the device of the tensor.

Axis letters: b batch, c channels, d h w grid.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Generator, Tensor
from torch.nn import functional as F


def generators(seeds: Sequence[int], device: torch.device) -> list[Generator]:
    """One generator per sample, from that sample's seed."""
    return [Generator(device).manual_seed(seed) for seed in seeds]


def add_noise(x: Tensor, draw: Sequence[Generator], *, std: float, mean: float = 0.0) -> Tensor:
    """x_hat = x + N(mu, sigma), eq. 1, fresh for every voxel. `std` is sigma as a standard deviation, in units of x."""
    noise = torch.stack([torch.randn(x.shape[1:], generator=g, device=x.device) for g in draw])
    return x + mean + std * noise.to(x.dtype)


def downsample(x: Tensor, factor: float, mode: str = "trilinear") -> Tensor:
    """x_hat = D(x, epsilon), eq. 2: down by `factor` and up again to the grid of x. (b, c, d, h, w) -> the same."""
    small = [max(1, round(n / factor)) for n in x.shape[-3:]]
    aligned = False if mode == "trilinear" else None
    low = F.interpolate(x, small, mode=mode, align_corners=aligned)
    back = "nearest" if mode == "area" else mode
    return F.interpolate(low, x.shape[-3:], mode=back, align_corners=aligned)


def drawn_ratio(ratio: Sequence[float], g: Generator) -> float:
    """A ratio as it is, or one drawn evenly from a range (low, high)."""
    share = torch.rand((), generator=g, device=g.device).item() if len(ratio) > 1 else 0.0
    return ratio[0] + share * (ratio[-1] - ratio[0])


def masked_count(ratio: float, n: int) -> int:
    """The number of n nearest to a share of them; never all, for there would be nothing to reconstruct from."""
    return min(round(ratio * n), n - 1)


def random_ranks(shape: Sequence[int], dim: int, g: Generator) -> Tensor:
    """Along `dim` a random order of 0, 1, 2, ..., independent for every place of the other axes."""
    return torch.rand(*shape, generator=g, device=g.device).argsort(dim).argsort(dim)


def local_mask(
    tokens: Tensor, draw: Sequence[Generator], *, ratio: Sequence[float], scope: str = "sample", along: str = "channels"
) -> Tensor:
    """Zero round(r c) of the c embedding channels ("X channels out of C", section 2). (b, c, d, h, w) -> the same.

    scope: one set of channels per `sample`, one per `token`, or one for the `batch`: each rank's own micro-batch, so
    that it alone depends on the number of ranks.
    along: `channels`, or `planes` of the first grid axis, which is what the authors' layout bug masks.
    """
    c, d, h, w = tokens.shape[1:]
    dim = 0 if along == "channels" else 1
    shape = (c, d, h, w) if scope == "token" else (c, 1, 1, 1) if dim == 0 else (1, d, 1, 1)
    if scope == "batch":
        draw = [draw[0]]
    masked = [random_ranks(shape, dim, g) < masked_count(drawn_ratio(ratio, g), shape[dim]) for g in draw]
    return tokens.masked_fill(torch.stack(masked), 0.0)


def token_mask(
    tokens: Tensor, draw: Sequence[Generator], *, ratio: Sequence[float], block: int, mask_token: Tensor
) -> Tensor:
    """Masked image modelling: `mask_token` (c,) in place of a share of the cubes of block^3 tokens, all c of them."""
    sides = [-(-n // block) for n in tokens.shape[-3:]]
    cubes = sides[0] * sides[1] * sides[2]
    masked = torch.stack([random_ranks((cubes,), 0, g) < masked_count(drawn_ratio(ratio, g), cubes) for g in draw])
    grid = repeat(masked, "b (d h w) -> b 1 (d bd) (h bh) (w bw)", d=sides[0], h=sides[1], bd=block, bh=block, bw=block)
    grid = grid[..., : tokens.shape[-3], : tokens.shape[-2], : tokens.shape[-1]]
    return torch.where(grid, rearrange(mask_token, "c -> 1 c 1 1 1").to(tokens.dtype), tokens)
