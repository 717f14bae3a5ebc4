"""From a file's values to what the network sees: spacing, then intensity. One recipe per run, as data.

Arrays are (c, d, h, w) in RAS order; spacing in mm in that order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dae.config import DataConfig, InputError
from dae.data.datalist import Content, Item
from dae.data.leaks import hash_of, hashes_of
from dae.data.nifti import Array, Volume, read_channels, read_labels_of


@dataclass(frozen=True)
class Recipe:
    """All that decides a prepared volume, beside its file."""

    spacing: tuple[float, ...] = ()  # mm along d h w; empty: as it is
    ct_window: tuple[float, ...] = (-1000.0, 1000.0)  # HU
    mr_intensity: str = "zscore"
    foreground_crop: bool = False  # cut to the box of what is brighter than the background

    @classmethod
    def of(cls, config: DataConfig, *, foreground_crop: bool = False) -> "Recipe":
        """Raises InputError on a spacing or a window that is not one."""
        if config.spacing and (len(config.spacing) != 3 or min(config.spacing) <= 0):
            raise InputError("--spacing: give three sizes in mm, along d h w")
        if len(config.ct_window) != 2 or config.ct_window[0] >= config.ct_window[1]:
            raise InputError("--ct-window: give the lower and the upper HU")
        return cls(config.spacing, config.ct_window, config.mr_intensity, foreground_crop)


class Prepared(NamedTuple):
    data: Array  # (c, d, h, w), normalised
    background: NDArray[np.float32]  # (c,), what surrounds the volume: the normalised value of its darkest voxel
    foreground: NDArray[np.int32]  # (n, 3), some voxels of the labels, or brighter than the mean, to centre crops on
    spacing: tuple[float, float, float]  # mm
    label: NDArray[np.uint8] | None = None  # (d, h, w), on the grid of data
    box: tuple[slice, slice, slice] | None = None  # where data lies in the grid it was cut from, if it was
    grid: tuple[int, ...] = ()  # (d, h, w) of that grid
    content: Content | None = None  # hashes of what the files held, where they were read by `prepare`


def prepare(item: Item, recipe: Recipe) -> Prepared:
    """Read an item and its label, and `normalise` them. Raises InputError naming the file."""
    volume = channel_of(read_channels(item.image), item)
    label = read_labels_of(item.label, volume) if item.label else None
    content = Content(hashes_of(volume.data), "" if label is None else hash_of(label), volume.spacing)
    try:
        return normalise(volume, item, recipe, label)._replace(content=content)
    except InputError as error:
        raise InputError(f"{item.image[0]}: {error}") from error


def channel_of(volume: Volume, item: Item) -> Volume:
    """The one channel that the item is, or all of them. Raises InputError where the file has not as many as named."""
    if item.channel is None:
        return volume
    place, named = item.channel
    if named != len(volume.data):
        raise InputError(f"{item.image[0]}: {len(volume.data)} channels, {named} modalities; the list must name each")
    return Volume(volume.data[place : place + 1], volume.affine)


def normalise(volume: Volume, item: Item, recipe: Recipe, label: NDArray[np.uint8] | None = None) -> Prepared:
    """Resample a volume if asked, normalise every channel, cut it if asked; its label with it, nearest neighbour."""
    raw = resample(volume, recipe.spacing) if recipe.spacing else volume.data
    normalised = np.empty_like(raw)
    background = np.empty(len(raw), dtype=np.float32)
    for n, (channel, how) in enumerate(zip(raw, _per_channel(item, len(raw)))):
        normalised[n] = _normaliser(how, recipe)(channel)
        background[n] = normalised[n].flat[channel.argmin()]
    spacing = volume.spacing if not recipe.spacing else recipe.spacing
    if label is not None and recipe.spacing:
        label = ndimage.zoom(label, zoom_factors(volume, recipe.spacing), order=0, mode="nearest", grid_mode=True)
    box, grid = None, raw.shape[1:]
    if recipe.foreground_crop:
        box = bounding_box(normalised > background[:, None, None, None])
        normalised, raw, label = normalised[:, *box], raw[:, *box], label if label is None else label[box]
    places = some_foreground(raw[0]) if label is None else some_labelled(label)
    return Prepared(normalised, background, places, (spacing[0], spacing[1], spacing[2]), label, box, grid)


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box of (d, h, w) that holds what is true in any channel of (c, d, h, w)."""
    along = [np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2, 3), (0, 1, 3), (0, 1, 2))]
    d, h, w = (slice(int(a[0]), int(a[-1]) + 1) if len(a) else slice(0, n) for a, n in zip(along, mask.shape[1:]))
    return d, h, w


def _per_channel(item: Item, channels: int) -> Sequence[str]:
    if len(item.intensity) == 1:
        return item.intensity * channels
    if len(item.intensity) != channels:
        raise InputError(f"{channels} channels, but the list names {len(item.intensity)} modalities")
    return item.intensity


def _normaliser(how: str, recipe: Recipe) -> Callable[[Array], Array]:
    if how == "window":
        return lambda x: window(x, recipe.ct_window[0], recipe.ct_window[1])
    return {
        "zscore": zscore, "nonzero": zscore_of_nonzero, "percentile": percentile,
        "zscore_all": zscore_of_all, "minmax": minmax, "none": as_it_is,
    }[recipe.mr_intensity if how == "mr" else how]  # fmt: skip


def window(x: Array, low: float, high: float) -> Array:
    """HU to [0, 1]: `low` and less become 0, `high` and more 1."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def zscore(x: Array) -> Array:
    """(x - mean) / std by the nonzero voxels: background counts for nothing in either, and stays the darkest."""
    values = x[x != 0].astype(np.float64)
    if values.std() == 0:
        raise InputError(f"every voxel that is not 0 is {values[0]:g}: a mask or a label map? leave it out of the list")
    return ((x - values.mean()) / values.std()).astype(np.float32)


def zscore_of_nonzero(x: Array) -> Array:
    """As `zscore`, but zeros stay 0, as in the authors' code: the background turns into the mean, a middle grey, and
    the zeros among the dark voxels of an unmasked image into speckles of it.
    """
    return np.where(x != 0, zscore(x), np.float32(0))


def zscore_of_all(x: Array) -> Array:
    """(x - mean) / std by every voxel, as nnU-Net's channel `zscore`."""
    values = x.astype(np.float64)
    return ((values - values.mean()) / max(values.std(), 1e-8)).astype(np.float32)


def minmax(x: Array) -> Array:
    """The smallest value to 0, the largest to 1, as nnU-Net's channel `rescale_to_0_1`."""
    low, high = float(x.min()), float(x.max())
    return window(x, low, max(high, low + 1e-8))


def as_it_is(x: Array) -> Array:
    """Values as they stand in the file, as nnU-Net's channel `noNorm`."""
    return x


def percentile(x: Array) -> Array:
    """The 0.05th percentile to 0, the 99.95th to 1, and nothing beyond."""
    low, high = np.percentile(x, (0.05, 99.95))
    return window(x, float(low), float(high) if high > low else float(low) + 1e-8)


def resample(volume: Volume, spacing: Sequence[float]) -> Array:
    """Trilinear, voxel centres aligned with the volume's outer faces. (c, d, h, w) -> (c, d', h', w')."""
    factors = zoom_factors(volume, spacing)
    if min(round(n * f) for n, f in zip(volume.data.shape[1:], factors)) < 1:
        raise InputError(f"--spacing: a volume of {volume.spacing} mm would have no voxel left along an axis")
    return np.stack([ndimage.zoom(x, factors, order=1, mode="nearest", grid_mode=True) for x in volume.data])


def zoom_factors(volume: Volume, spacing: Sequence[float]) -> list[float]:
    return [old / new for old, new in zip(volume.spacing, spacing)]


def some_labelled(label: NDArray[np.uint8], each: int = 512) -> NDArray[np.int32]:
    """Up to `each` evenly drawn voxels of every class, so that small organs are met as often as large ones: (n, 3)."""
    rng = np.random.default_rng(0)
    found = [np.flatnonzero(label == k) for k in np.unique(label[label > 0])]
    drawn = [rng.choice(places, min(each, len(places)), replace=False) for places in found]
    places = np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)
    return np.stack(np.unravel_index(places, label.shape), axis=-1).astype(np.int32)


def some_foreground(x: Array, count: int = 4096) -> NDArray[np.int32]:
    """Up to `count` evenly drawn voxels of (d, h, w) that are brighter than the mean: (n, 3)."""
    places = np.flatnonzero(x > x.mean())
    if len(places) > count:
        places = np.random.default_rng(0).choice(places, count, replace=False)
    return np.stack(np.unravel_index(np.sort(places), x.shape), axis=-1).astype(np.int32)
