"""Crops and augmentations: a numpy Generator and arrays in, arrays out.

Pre-training takes crops alone (sec. 3.2). Images are (c, d, h, w), labels (d, h, w); d runs to the
patient's right.
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

Labels = NDArray[np.uint8]

# --- crops ----------------------------------------------------------------------------------------


def random_corner(grid: Sequence[int], size: Size3, rng: Generator) -> list[int]:
    """First voxel of a crop anywhere inside.

    Along an axis where the grid is smaller than the crop, the grid is in the middle of the crop.
    """
    corner = []
    for n, s in zip(grid, size):
        first = int(rng.integers(0, n - s + 1)) if n >= s else centred(n, s)
        corner.append(first)
    return corner


def corner_around(voxel: Sequence[int], grid: Sequence[int], size: Size3) -> list[int]:
    """First voxel of the crop with `voxel` as near to its centre as the grid allows.

    Along an axis where the grid is smaller than the crop, the grid is in the middle of the crop.
    """
    corner = []
    for v, n, s in zip(voxel, grid, size):
        first = int(np.clip(v - s // 2, 0, n - s)) if n >= s else centred(n, s)
        corner.append(first)
    return corner


def centred(n: int, size: int) -> int:
    """First voxel of a crop, of `size` voxels along an axis, that has all `n` in its middle."""
    return -((size - n) // 2)


def crop(
    volume: NDArray[np.float16] | Labels,
    corner: Sequence[int],
    size: Size3,
    background: Sequence[float],
) -> Array:
    """Copy of (c, *size) voxels from `corner` on, in float32; beyond the volume its background."""
    out = np.empty((len(volume), *size), dtype=np.float32)
    out[:] = np.asarray(background, dtype=np.float32)[:, None, None, None]

    source = []
    target = []
    for first, n, s in zip(corner, volume.shape[1:], size):
        start = max(first, 0)
        stop = min(first + s, n)
        source.append(slice(start, stop))
        target.append(slice(start - first, stop - first))

    out[:, *target] = volume[:, *source]
    return out


def random_crop(volume: Cached, size: Size3, rng: Generator, *, foreground: float = 0.0) -> Array:
    """One crop of a prepared volume: (c, *size).

    With probability `foreground` it is centred on a labelled or bright voxel.
    """
    grid = volume.shape[1:]
    if rng.random() < foreground:
        corner = corner_around(rng.choice(volume.foreground()), grid, size)
    else:
        corner = random_corner(grid, size, rng)

    return crop(volume.array(), corner, size, volume.background)


def labelled_crop(
    volume: Cached, size: Size3, rng: Generator, *, positive: float, ignore: int | None = None
) -> tuple[Array, Labels]:
    """A crop (c, *size) and its labels (*size).

    With probability `positive` it is centred on a labelled voxel. A voxel whose label is `ignore`
    counts as having none.
    """
    grid = volume.shape[1:]
    centres = volume.foreground()
    if ignore is not None:
        labels = volume.label()[tuple(centres.T)]
        centres = centres[labels != ignore]

    if rng.random() < positive and len(centres) > 0:
        corner = corner_around(rng.choice(centres), grid, size)
    else:
        corner = random_corner(grid, size, rng)

    x = crop(volume.array(), corner, size, volume.background)
    label = crop(volume.label()[None], corner, size, [0])[0]
    return x, label.astype(np.uint8)


# --- augmentations --------------------------------------------------------------------------------


def augment(
    x: Array,
    label: Labels,
    rng: Generator,
    chances: AugmentConfig,
    *,
    flip_axes: Sequence[int],
    swap: Sequence[tuple[int, int]] = (),
    swap_axes: Sequence[int] = (0,),
) -> tuple[Array, Labels]:
    """Flips, rotation, zoom, brightness, contrast and noise, each by its own chance (sec. 3.2).

    A flip of axis 0 makes a left kidney look like a right one: `flip_axes` leaves it out, or `swap`
    names the pairs of labels that change places in a flip along one of `swap_axes`. Which of them
    are safe is for `sides.choose_flips`.
    """
    # The order and number of draws decide every sample of a run.
    for axis in flip_axes:
        if rng.random() < chances.flip:
            x = np.flip(x, axis + 1)
            label = np.flip(label, axis)
            if axis in swap_axes:
                label = swapped(label, swap)

    axial_is_square = x.shape[1] == x.shape[2]
    if rng.random() < chances.rotate and axial_is_square:
        turns = int(rng.integers(1, 4))
        x = np.rot90(x, turns, (1, 2))
        label = np.rot90(label, turns, (0, 1))

    if rng.random() < chances.zoom:
        factor = rng.uniform(0.9, 1.1)
        x = zoomed_image(x, factor)
        label = zoomed_label(label, factor)

    if rng.random() < chances.brightness:
        scale = rng.uniform(0.9, 1.1)
        shift = rng.uniform(-0.1, 0.1)
        x = x * scale + shift

    if rng.random() < chances.contrast:
        x = with_contrast(x, rng.uniform(0.7, 1.5))

    if rng.random() < chances.noise:
        std = rng.uniform(0, 0.1)
        x = x + rng.normal(0, std, x.shape).astype(np.float32)

    return np.ascontiguousarray(x, dtype=np.float32), np.ascontiguousarray(label)


def swapped(label: Labels, pairs: Sequence[tuple[int, int]]) -> Labels:
    """Labels with both of each pair exchanged."""
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a] = b
        table[b] = a
    return table[label]


def zoomed_image(x: Array, factor: float) -> Array:
    """(c, d, h, w) enlarged about its centre, trilinear, on the same grid.

    What comes in from outside, where the factor is below 1, repeats the edge.
    """
    channels = [zoomed(channel, factor, order=1) for channel in x]
    return np.stack(channels)


def zoomed_label(label: Labels, factor: float) -> Labels:
    """(d, h, w) enlarged as its image, with the nearest voxel's label."""
    return zoomed(label, factor, order=0).astype(np.uint8)


def zoomed(volume: NDArray[np.generic], factor: float, *, order: int) -> NDArray[np.generic]:
    """One (d, h, w) enlarged about its centre: new voxel o shows old voxel c + (o - c) / factor."""
    first = [(n - 1) / 2 * (1 - 1 / factor) for n in volume.shape]
    return np.asarray(
        ndimage.affine_transform(volume, [1 / factor] * 3, first, order=order, mode="nearest")
    )


def with_contrast(x: Array, gamma: float) -> Array:
    """Gamma on each channel of (c, d, h, w), between its own least and largest value."""
    low = np.min(x, axis=(1, 2, 3), keepdims=True)
    high = np.max(x, axis=(1, 2, 3), keepdims=True)
    span = np.maximum(high - low, 1e-6)
    return np.asarray(low + span * ((x - low) / span) ** gamma, dtype=np.float32)
