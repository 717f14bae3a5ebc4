"""Crops: a numpy Generator and a prepared volume in, an array out. Pre-training augments no further (sec. 3.2)."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from dae.config import Size3
from dae.data.cache import Cached
from dae.data.nifti import Array


def random_corner(grid: Sequence[int], size: Size3, rng: Generator) -> list[int]:
    """First voxel of a crop anywhere inside; where the grid is smaller than the crop, it is centred in it."""
    return [int(rng.integers(0, n - s + 1)) if n >= s else -((s - n) // 2) for n, s in zip(grid, size)]


def corner_around(place: Sequence[int], grid: Sequence[int], size: Size3) -> list[int]:
    """First voxel of the crop that has `place` nearest to its centre and does not leave the grid where it need not."""
    return [
        int(np.clip(p - s // 2, 0, n - s)) if n >= s else -((s - n) // 2) for p, n, s in zip(place, grid, size)
    ]  # fmt: skip


def crop(volume: NDArray[np.float16], corner: Sequence[int], size: Size3, background: Sequence[float]) -> Array:
    """Copy of (c, *size) voxels from `corner` on, in float32; beyond the volume its background."""
    out = np.empty((len(volume), *size), dtype=np.float32)
    out[:] = np.asarray(background, dtype=np.float32)[:, None, None, None]
    inside = [slice(max(0, at), min(n, at + s)) for at, n, s in zip(corner, volume.shape[1:], size)]
    target = [slice(part.start - at, part.stop - at) for part, at in zip(inside, corner)]
    out[:, target[0], target[1], target[2]] = volume[:, inside[0], inside[1], inside[2]]
    return out


def random_crop(volume: Cached, size: Size3, rng: Generator, *, foreground: float = 0.0) -> Array:
    """One crop of a prepared volume: (c, *size). With probability `foreground` it is centred on a bright voxel."""
    grid = volume.shape[1:]
    if rng.random() < foreground:
        corner = corner_around(rng.choice(volume.foreground()), grid, size)
    else:
        corner = random_corner(grid, size, rng)
    return crop(volume.array(), corner, size, volume.background)
