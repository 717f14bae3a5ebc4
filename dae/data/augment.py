"""Crops and augmentations: a numpy Generator and arrays in, arrays out. Pre-training takes crops alone (sec. 3.2).

Images are (c, d, h, w), labels (d, h, w); d runs to the patient's right.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from dae.config.command_line import Size3
from dae.config.segment import AugmentConfig
from dae.data.cache import Cached
from dae.data.nifti import Array


def random_corner(grid: Sequence[int], size: Size3, rng: Generator) -> list[int]:
    """First voxel of a crop anywhere inside; where the grid is smaller than the crop, it is centred in it."""
    return [
        int(rng.integers(0, n - s + 1)) if n >= s else -((s - n) // 2) for n, s in zip(grid, size)
    ]


def corner_around(place: Sequence[int], grid: Sequence[int], size: Size3) -> list[int]:
    """First voxel of the crop that has `place` nearest to its centre and does not leave the grid where it need not."""
    return [
        int(np.clip(p - s // 2, 0, n - s)) if n >= s else -((s - n) // 2)
        for p, n, s in zip(place, grid, size)
    ]


def crop(
    volume: NDArray[np.float16] | NDArray[np.uint8],
    corner: Sequence[int],
    size: Size3,
    background: Sequence[float],
) -> Array:
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


def labelled_crop(
    volume: Cached, size: Size3, rng: Generator, *, positive: float, ignore: int | None = None
) -> tuple[Array, NDArray[np.uint8]]:
    """A crop and its labels. With probability `positive` it is centred on a labelled voxel, else it lies anywhere.

    A voxel whose label is `ignore` has none.
    """
    grid, places = volume.shape[1:], volume.foreground()
    if ignore is not None:
        places = places[volume.label()[tuple(places.T)] != ignore]
    on_label = rng.random() < positive and len(places) > 0
    corner = (
        corner_around(rng.choice(places), grid, size)
        if on_label
        else random_corner(grid, size, rng)
    )
    label = crop(volume.label()[None], corner, size, [0])[0]
    return crop(volume.array(), corner, size, volume.background), label.astype(np.uint8)


def augment(
    x: Array,
    label: NDArray[np.uint8],
    rng: Generator,
    chances: AugmentConfig,
    *,
    flip_axes: Sequence[int],
    swap: Sequence[tuple[int, int]] = (),
    swap_axes: Sequence[int] = (0,),
) -> tuple[Array, NDArray[np.uint8]]:
    """Each of flips, rotation, zoom, brightness, contrast and noise with its own chance (sec. 3.2).

    A flip of axis 0 makes a left kidney look like a right one: `flip_axes` leaves it out, or `swap` names the pairs of
    labels that change places in a flip along one of `swap_axes`. Which of them are safe is for `sides.choose_flips`.
    """
    for axis in flip_axes:
        if rng.random() < chances.flip:
            x, label = np.flip(x, axis + 1), np.flip(label, axis)
            label = swapped(label, swap) if axis in swap_axes else label
    if rng.random() < chances.rotate and x.shape[1] == x.shape[2]:
        turns = int(rng.integers(1, 4))
        x, label = np.rot90(x, turns, (1, 2)), np.rot90(label, turns, (0, 1))
    if rng.random() < chances.zoom:
        x, label = zoomed(x, label, rng.uniform(0.9, 1.1))
    if rng.random() < chances.brightness:
        x = x * rng.uniform(0.9, 1.1) + rng.uniform(-0.1, 0.1)
    if rng.random() < chances.contrast:
        x = contrasted(x, rng.uniform(0.7, 1.5))
    if rng.random() < chances.noise:
        x = x + rng.normal(0, rng.uniform(0, 0.1), x.shape).astype(np.float32)
    return np.ascontiguousarray(x, dtype=np.float32), np.ascontiguousarray(label)


def swapped(label: NDArray[np.uint8], pairs: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """Labels with both of each pair exchanged."""
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a], table[b] = b, a
    return table[label]


def zoomed(x: Array, label: NDArray[np.uint8], factor: float) -> tuple[Array, NDArray[np.uint8]]:
    """Enlarged about the centre, on the same grid; what comes in from outside repeats the edge."""
    shift = [(n - 1) / 2 * (1 - 1 / factor) for n in label.shape]

    def onto_grid(values: NDArray[np.generic], order: int) -> NDArray[np.generic]:
        return np.asarray(
            ndimage.affine_transform(values, [1 / factor] * 3, shift, order=order, mode="nearest")
        )

    return np.stack([onto_grid(channel, 1) for channel in x]), onto_grid(label, 0).astype(np.uint8)


def contrasted(x: Array, gamma: float) -> Array:
    """Gamma on each channel, between its own least and largest value."""
    low, high = (f(x, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    span = np.maximum(high - low, 1e-6)
    return np.asarray(low + span * ((x - low) / span) ** gamma, dtype=np.float32)
