"""The disruptions of section 2: noise (eq. 1), downsampling (eq. 2), local masking, and MAE's token masking.

Drawn comes first and apart: `draw_noise`, `draw_channels` and `draw_cubes` take one generator per
sample, so that a sample meets the same noise and the same mask on any number of ranks and in any
batch. The disruptions themselves are pure functions of tensors, which torch.compile takes whole.

Axis letters: b batch, c channels, d h w grid.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Generator, Tensor
from torch.nn import functional as F


def generators(seeds: Sequence[int], device: torch.device) -> list[Generator]:
    """One generator per sample, from that sample's seed, on the device of the tensors."""
    return [Generator(device).manual_seed(seed) for seed in seeds]


# --- what is drawn


def draw_noise(shape: Sequence[int], draw: Sequence[Generator]) -> Tensor:
    """Standard normal noise, fresh for every voxel: (b, *shape), float32."""
    return torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in draw])


def draw_channels(
    channels: int,
    grid: Sequence[int],
    draw: Sequence[Generator],
    *,
    ratio: Sequence[float],
    scope: str = "sample",
    along: str = "channels",
) -> Tensor:
    """What local masking zeroes: round(r c) of the c embedding channels ("X channels out of C", section 2).

    -> bool, of a shape that broadcasts to tokens (b, c, d, h, w).

    scope: one set of channels per `sample`, one per `token`, or one for the `batch`: each rank's own
    micro-batch, so that it alone depends on the number of ranks.
    along: `channels`, or `planes` of the first grid axis, which is what the authors' layout bug masks.
    """
    if along == "planes":
        shape, dim = (1, grid[0], 1, 1), 1
    elif scope == "token":
        shape, dim = (channels, grid[0], grid[1], grid[2]), 0
    else:
        shape, dim = (channels, 1, 1, 1), 0
    if scope == "batch":
        draw = draw[:1]
    return torch.stack([masked_share(shape, dim, ratio, g) for g in draw])


def draw_cubes(
    grid: Sequence[int], draw: Sequence[Generator], *, ratio: Sequence[float], block: int
) -> Tensor:
    """What masked image modelling hides: a share of the cubes of block^3 tokens. -> (b, 1, d, h, w), bool."""
    d, h, w = (-(-n // block) for n in grid)
    masked = torch.stack([masked_share((d * h * w,), 0, ratio, g) for g in draw])
    cubes = "b (d h w) -> b 1 (d bd) (h bh) (w bw)"
    masked = repeat(masked, cubes, d=d, h=h, bd=block, bh=block, bw=block)
    return masked[..., : grid[0], : grid[1], : grid[2]]


def masked_share(shape: Sequence[int], dim: int, ratio: Sequence[float], g: Generator) -> Tensor:
    """True for a random share of the places along `dim`, drawn for every place of the other axes: bool.

    ratio: the share, or the two ends of a range from which it is drawn evenly.
    """
    share = torch.full((), ratio[0], dtype=torch.float64, device=g.device)
    if len(ratio) > 1:
        share = share + torch.rand((), generator=g, device=g.device).double() * (
            ratio[1] - ratio[0]
        )

    # The nearest number of places; never all, for there would be nothing to reconstruct from.
    count = (share * shape[dim]).round().clamp(max=shape[dim] - 1)

    order = torch.rand(*shape, generator=g, device=g.device).argsort(dim).argsort(dim)
    return order < count


# --- what is done with it


def add_noise(x: Tensor, noise: Tensor, *, std: float, mean: float = 0.0) -> Tensor:
    """x_hat = x + N(mu, sigma), eq. 1. `std` is sigma as a standard deviation, in units of x.

    noise: standard normal, of the shape of x.
    """
    return x + mean + std * noise.to(x.dtype)


def downsample(x: Tensor, factor: float, mode: str = "trilinear") -> Tensor:
    """x_hat = D(x, epsilon), eq. 2: down by `factor` and up again to the grid of x. (b, c, d, h, w) -> the same."""
    small = [max(1, round(n / factor)) for n in x.shape[-3:]]
    aligned = False if mode == "trilinear" else None
    low = F.interpolate(x, small, mode=mode, align_corners=aligned)
    back = "nearest" if mode == "area" else mode
    return F.interpolate(low, x.shape[-3:], mode=back, align_corners=aligned)


def local_mask(tokens: Tensor, masked: Tensor) -> Tensor:
    """Zero the masked channels (section 2, "Local Masking"). (b, c, d, h, w), mask -> (b, c, d, h, w)."""
    return tokens.masked_fill(masked, 0.0)


def token_mask(tokens: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
    """Masked image modelling: `mask_token` (c,) in place of the masked tokens, all c channels of them."""
    return torch.where(masked, rearrange(mask_token, "c -> 1 c 1 1 1").to(tokens.dtype), tokens)
