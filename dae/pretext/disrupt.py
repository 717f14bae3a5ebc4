"""The disruptions of section 2: noise (eq. 1), downsampling (eq. 2), local masking, token masking.

Chance comes first: `draw_noise`, `draw_channels` and `draw_cubes` take one generator per sample, so
that a sample meets the same noise and the same mask in any batch and on any number of ranks. The
disruptions themselves are pure functions of tensors, which torch.compile takes whole.

Axis letters: b batch, c channels, d h w grid.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Generator, Tensor
from torch.nn import functional as F

from dae.errors import counted


def sample_generators(seeds: Sequence[int], device: torch.device) -> list[Generator]:
    """One generator per sample, from that sample's seed, on the device of the tensors."""
    return [Generator(device).manual_seed(seed) for seed in seeds]


# --- what is drawn at random


def draw_noise(shape: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    """Standard normal noise, fresh for every voxel of every sample: (b, *shape), float32."""
    return torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in generators])


def draw_channels(
    channels: int,
    grid: Sequence[int],
    generators: Sequence[Generator],
    *,
    ratio: Sequence[float],
    scope: str = "sample",
    along: str = "channels",
) -> Tensor:
    """The mask of local masking: "X channels out of C" (section 2), with X = round(r C).

    Returns bool, True where masked, of a shape that broadcasts to tokens (b, c, d, h, w).

    scope: one set of channels per `sample`, one per `token`, or one for the `batch`. A batch is the
    micro-batch of one rank, so `batch` alone depends on the number of ranks.
    along: `channels`, or `planes` of the first grid axis, which the authors' layout bug masks.
    """
    d, h, w = grid

    shape, dim = (channels, 1, 1, 1), 0
    if scope == "token":
        shape, dim = (channels, d, h, w), 0
    if along == "planes":
        shape, dim = (1, d, 1, 1), 1

    if scope == "batch":
        generators = generators[:1]
    return torch.stack([masked_share(shape, dim, ratio, g) for g in generators])


def draw_cubes(
    grid: Sequence[int], generators: Sequence[Generator], *, ratio: Sequence[float], block: int
) -> Tensor:
    """The mask of masked image modelling: a share of the cubes of block^3 tokens.

    Returns bool, True where masked: (b, 1, d, h, w).
    """
    # Cubes along each axis; the last one may reach past the grid.
    d, h, w = (-(-n // block) for n in grid)
    cubes = torch.stack([masked_share((d * h * w,), 0, ratio, g) for g in generators])

    to_tokens = "b (d h w) -> b 1 (d bd) (h bh) (w bw)"
    tokens = repeat(cubes, to_tokens, d=d, h=h, bd=block, bh=block, bw=block)
    return tokens[..., : grid[0], : grid[1], : grid[2]]


def masked_share(
    shape: Sequence[int], dim: int, ratio: Sequence[float], generator: Generator
) -> Tensor:
    """True for a random share of the entries along `dim`, fresh for every index of the other axes.

    ratio: the share, or the two ends of a range from which it is drawn evenly. Returns bool.
    """
    device = generator.device

    # In float64: 0.6 of 1000 entries are 600. On the device: nothing waits for its value.
    share = torch.full((), ratio[0], dtype=torch.float64, device=device)
    if len(ratio) > 1:
        position = torch.rand((), generator=generator, device=device).double()
        share = share + position * (ratio[1] - ratio[0])

    # The nearest number of entries; never all, because nothing would be left to reconstruct from.
    entries = shape[dim]
    count = (share * entries).round().clamp(max=entries - 1)

    return random_order(shape, dim, generator) < count


def random_order(shape: Sequence[int], dim: int, generator: Generator) -> Tensor:
    """0, 1, ..., n - 1 along `dim`, shuffled afresh for every index of the other axes: int64."""
    scores = torch.rand(*shape, generator=generator, device=generator.device)
    order = scores.argsort(dim)

    # The inverse of that permutation: where each entry stands among the sorted scores.
    return order.argsort(dim)


def check_cubes(
    grid: Sequence[int], *, ratio: Sequence[float], block: int, voxels: int = 1
) -> None:
    """Raises ValueError where `draw_cubes` would never mask anything: no method means that.

    voxels: the side of an entry of the grid, for the words.
    """
    cubes = math.prod(-(-n // block) for n in grid)
    most = min(round(max(ratio) * cubes), cubes - 1)
    if max(ratio) > 0 and not most:
        crop = " ".join(str(n * voxels) for n in grid)
        raise ValueError(
            f"--mask-block {block * voxels}: a crop of {crop} has {counted(cubes, 'block')}, "
            f"and a share of {max(ratio):g} rounds to none; take smaller blocks or a larger crop"
        )


# --- what is done with it


def add_noise(x: Tensor, noise: Tensor, *, std: float, mean: float = 0.0) -> Tensor:
    """x_hat = x + N(mu, sigma), eq. 1.

    noise: standard normal, of the shape of x. mean is mu and std is sigma, read as a standard
    deviation; both in units of x.
    """
    return x + mean + std * noise.to(x.dtype)


def downsample(x: Tensor, factor: float, mode: str = "trilinear") -> Tensor:
    """x_hat = D(x, epsilon), eq. 2: down by `factor`, and up again to the grid of x.

    (b, c, d, h, w) -> the same shape. mode: `trilinear`, `nearest` or `area` (the mean of a block,
    which comes back by `nearest`).
    """
    coarse_grid = [max(1, round(n / factor)) for n in x.shape[-3:]]
    align_corners = False if mode == "trilinear" else None
    low = F.interpolate(x, coarse_grid, mode=mode, align_corners=align_corners)

    mode_up = "nearest" if mode == "area" else mode
    return F.interpolate(low, x.shape[-3:], mode=mode_up, align_corners=align_corners)


def local_mask(tokens: Tensor, mask: Tensor) -> Tensor:
    """Section 2, "Local Masking": masked channels become 0. (b, c, d, h, w) -> the same shape."""
    return tokens.masked_fill(mask, 0.0)


def token_mask(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Masked image modelling: `mask_token` (c,) replaces masked tokens, all c channels of them."""
    replacement = rearrange(mask_token, "c -> 1 c 1 1 1").to(tokens.dtype)
    return torch.where(mask, replacement, tokens)
