"""Crops and augmentations, each sample by its own random numbers.

A worker cuts a crop of a prepared volume, draws what happens to it, flips it and turns it: copies
of what the cache holds, in NumPy and in half of the bytes of float32. The zoom and the intensities
are changed in torch, on the device that trains. Pre-training takes crops alone (sec. 3.2).

Images are (c, d, h, w), labels (d, h, w); d runs to the patient's right.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from dae.config.command_line import Size3
from dae.config.segment import AugmentConfig
from dae.data.cache import Cached

Labels = NDArray[np.uint8]
Image = NDArray[Any]  # float16 or float32

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
    volume: NDArray[Any],
    corner: Sequence[int],
    size: Size3,
    background: Sequence[float],
    *,
    dtype: type[np.generic] = np.float32,
) -> NDArray[Any]:
    """Copy of (c, *size) voxels from `corner` on, in `dtype`; beyond the volume its background."""
    out = np.empty((len(volume), *size), dtype)
    out[:] = np.asarray(background, dtype)[:, None, None, None]

    source = []
    target = []
    for first, n, s in zip(corner, volume.shape[1:], size):
        start = max(first, 0)
        stop = min(first + s, n)
        source.append(slice(start, stop))
        target.append(slice(start - first, stop - first))

    out[:, *target] = volume[:, *source]
    return out


def exact_crop(volume: Cached, corner: Sequence[int], size: Size3) -> Image:
    """(c, *size) voxels of a prepared volume in as few bytes as hold them exactly.

    That is float16, as in the cache, but float32 where the crop shows a background that float16
    does not have. A background is a normalised value in float32, and z-scores have many digits.
    """
    inside = True
    for first, n, s in zip(corner, volume.shape[1:], size):
        inside = inside and 0 <= first <= n - s

    in_half = np.asarray(volume.background, np.float16)
    is_exact = np.array_equal(in_half, np.asarray(volume.background, np.float32))

    dtype = np.float16 if inside or is_exact else np.float32
    return crop(volume.array(), corner, size, volume.background, dtype=dtype)


def random_crop(volume: Cached, size: Size3, rng: Generator, *, foreground: float = 0.0) -> Image:
    """One crop of a prepared volume, (c, *size), as `exact_crop` gives it.

    With probability `foreground` it is centred on a labelled or bright voxel.
    """
    grid = volume.shape[1:]
    if rng.random() < foreground:
        corner = corner_around(rng.choice(volume.foreground()), grid, size)
    else:
        corner = random_corner(grid, size, rng)

    return exact_crop(volume, corner, size)


def labelled_crop(
    volume: Cached, size: Size3, rng: Generator, *, positive: float, ignore: int | None = None
) -> tuple[Image, Labels]:
    """A crop (c, *size), as `exact_crop` gives it, and its labels (*size).

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

    x = exact_crop(volume, corner, size)
    label = crop(volume.label()[None], corner, size, [0], dtype=np.uint8)[0]
    return x, label


# --- what is drawn at random ----------------------------------------------------------------------


class Augmentation(NamedTuple):
    """The random numbers of one sample. As they are here, they leave it as it is."""

    flips: tuple[int, ...] = ()  # axes
    turns: int = 0  # by 90 degrees, in the axial plane
    zoom: float = 1.0  # above 1: larger
    scale: float = 1.0
    shift: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0  # standard deviation
    seed: int = 0  # of the noise


def draw_augmentation(
    size: Size3, rng: Generator, chances: AugmentConfig, *, flip_axes: Sequence[int]
) -> Augmentation:
    """Flips, rotation, zoom, brightness, contrast and noise, each by its own chance (sec. 3.2).

    A flip of axis 0 makes a left kidney look like a right one: `flip_axes` leaves it out, or labels
    change places in `moved`. Which of the two is safe is for `sides.choose_flips`. A crop of `size`
    is turned where its axial plane is a square.
    """
    # The order and number of draws decide every sample of a run.
    flips = tuple(axis for axis in flip_axes if rng.random() < chances.flip)
    drawn = Augmentation(flips)

    axial_is_square = size[0] == size[1]
    if rng.random() < chances.rotate and axial_is_square:
        drawn = drawn._replace(turns=int(rng.integers(1, 4)))

    if rng.random() < chances.zoom:
        drawn = drawn._replace(zoom=rng.uniform(0.9, 1.1))

    if rng.random() < chances.brightness:
        scale = rng.uniform(0.9, 1.1)
        shift = rng.uniform(-0.1, 0.1)
        drawn = drawn._replace(scale=scale, shift=shift)

    if rng.random() < chances.contrast:
        drawn = drawn._replace(gamma=rng.uniform(0.7, 1.5))

    if rng.random() < chances.noise:
        noise = rng.uniform(0, 0.1)
        drawn = drawn._replace(noise=noise, seed=int(rng.integers(2**63)))

    return drawn


# --- in a worker: flips and turns -----------------------------------------------------------------


def moved(
    x: Image,
    label: Labels,
    drawn: Augmentation,
    *,
    swap: Sequence[tuple[int, int]] = (),
    swap_axes: Sequence[int] = (0,),
) -> tuple[Image, Labels]:
    """Image and label flipped and turned: the same voxels in another order.

    The labels of each pair in `swap` change places in a flip along one of `swap_axes`.
    """
    for axis in drawn.flips:
        x = np.flip(x, axis + 1)
        label = np.flip(label, axis)
        if axis in swap_axes and swap:
            label = swapped(label, swap)

    x = np.rot90(x, drawn.turns, (1, 2))
    label = np.rot90(label, drawn.turns, (0, 1))
    return np.ascontiguousarray(x), np.ascontiguousarray(label)


def swapped(label: Labels, pairs: Sequence[tuple[int, int]]) -> Labels:
    """Labels with both of each pair exchanged."""
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a] = b
        table[b] = a
    return table[label]


# --- on the device: zoom and intensities ----------------------------------------------------------


def augment(x: Tensor, label: Tensor, drawn: Sequence[Augmentation]) -> tuple[Tensor, Tensor]:
    """Zoom, brightness, contrast and noise of a batch, each sample by its own random numbers.

    x (b, c, d, h, w) float32, label (b, d, h, w) uint8 -> the same. Flips and turns are done: see
    `moved`. A sample is computed by itself, so it is the same in a batch of any size. Its random
    numbers are plain numbers, so that nothing waits for a GPU. The noise of a GPU is other noise
    than that of a CPU, from the same seed.
    """
    images = []
    labels = []
    for image, label_map, numbers in zip(x, label, drawn, strict=True):
        if numbers.zoom != 1:
            image = zoomed_image(image, numbers.zoom)
            label_map = zoomed_label(label_map, numbers.zoom)

        images.append(with_other_intensities(image, numbers))
        labels.append(label_map)

    return torch.stack(images), torch.stack(labels)


def with_other_intensities(x: Tensor, drawn: Augmentation) -> Tensor:
    """One image (c, d, h, w) after brightness, contrast and noise, or itself without any."""
    if (drawn.scale, drawn.shift) != (1, 0):
        x = x * drawn.scale + drawn.shift

    if drawn.gamma != 1:
        x = with_contrast(x, drawn.gamma)

    if drawn.noise > 0:
        generator = torch.Generator(x.device).manual_seed(drawn.seed)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x = x + drawn.noise * noise

    return x


def zoomed_image(x: Tensor, factor: float) -> Tensor:
    """(c, d, h, w) enlarged about its centre, trilinear, on the same grid.

    What comes in from outside, where the factor is below 1, repeats the edge. A zoom has no
    rotation, so it is linear along one axis after the other: on a CPU a fifth of the time of
    `F.grid_sample`, and without the rounding of its coordinates.
    """
    for _ in range(3):
        x = zoomed_along_d(x, factor)
        x = rearrange(x, "c d h w -> c h w d").contiguous()  # after three times as it was
    return x


def zoomed_along_d(x: Tensor, factor: float) -> Tensor:
    """(c, d, h, w) enlarged along d alone, linear between two planes."""
    last = x.shape[1] - 1
    old = old_positions(x.shape[1], factor, x.device)
    before = old.floor()
    share = rearrange(old - before, "d -> d 1 1").to(x.dtype)

    index = before.long()
    below = x.index_select(1, index)
    above = x.index_select(1, (index + 1).clamp(max=last))
    return torch.lerp(below, above, share)


def zoomed_label(label: Tensor, factor: float) -> Tensor:
    """(d, h, w) enlarged as its image: each voxel takes the label of the nearest old one."""
    for axis, n in enumerate(label.shape):
        nearest = (old_positions(n, factor, label.device) + 0.5).floor()
        label = label.index_select(axis, nearest.long())
    return label


def old_positions(n: int, factor: float, device: torch.device) -> Tensor:
    """Along an axis of n voxels new voxel o shows position c + (o - c) / factor: (n,), float64.

    c is the centre. Positions beyond the first and the last voxel are those voxels.
    """
    new = torch.arange(n, dtype=torch.float64, device=device)
    centre = (n - 1) / 2
    return (centre * (1 - 1 / factor) + new / factor).clamp(0, n - 1)


def with_contrast(x: Tensor, gamma: float) -> Tensor:
    """Gamma on each channel of (c, d, h, w), between its own least and largest value."""
    low = reduce(x, "c d h w -> c 1 1 1", "min")
    high = reduce(x, "c d h w -> c 1 1 1", "max")
    span = (high - low).clamp(min=1e-6)
    return low + span * ((x - low) / span) ** gamma
