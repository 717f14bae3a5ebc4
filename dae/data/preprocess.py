"""From a file's values to what the network sees: spacing, then intensity. One recipe per run, as data.

Arrays are (c, d, h, w) in RAS order; spacing in mm in that order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dae.config.shared import DataConfig
from dae.data.datalist import Content, Item
from dae.data.leaks import hash_of, hashes_of
from dae.data.nifti import (
    Array,
    Volume,
    bytes_in_words,
    memory,
    read_channels,
    read_labels_of,
    say_once,
)
from dae.errors import InputError

STEP = 1e-3  # one grey level of z-scores, or of a window; half precision keeps little more
FEW = 16  # grey levels; what has fewer is no picture
HALF = float(np.finfo(np.float16).max)  # the cache keeps half precision

Axis = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]  # (n,) each: see `between`


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
    background: NDArray[
        np.float32
    ]  # (c,), what surrounds the volume: the normalised value of its darkest voxel
    foreground: NDArray[
        np.int32
    ]  # (n, 3), some voxels of the labels, or brighter than the mean, to centre crops on
    spacing: tuple[float, float, float]  # mm
    label: NDArray[np.uint8] | None = None  # (d, h, w), on the grid of data
    box: tuple[slice, slice, slice] | None = (
        None  # where data lies in the grid it was cut from, if it was
    )
    grid: tuple[int, ...] = ()  # (d, h, w) of that grid
    content: Content | None = (
        None  # hashes of what the files held, where they were read by `prepare`
    )


def prepare(item: Item, recipe: Recipe) -> Prepared:
    """Read an item and its label, and `normalise` them. Raises InputError naming the file."""
    volume = channel_of(read_channels(item.image), item)
    label = read_labels_of(item.label, volume) if item.label else None
    content = Content(
        hashes_of(volume.data), "" if label is None else hash_of(label), volume.spacing
    )
    return normalise(volume, item, recipe, label)._replace(content=content)


def channel_of(volume: Volume, item: Item) -> Volume:
    """The one channel that the item is, or all of them. Raises InputError where the file has not as many as named."""
    if item.channel is None:
        return volume
    place, named = item.channel
    if named != len(volume.data):
        raise InputError(
            f"{item.image[0]}: {len(volume.data)} channels, {named} modalities; the list must name each"
        )
    return Volume(volume.data[place : place + 1], volume.affine)


def normalise(
    volume: Volume, item: Item, recipe: Recipe, label: NDArray[np.uint8] | None = None
) -> Prepared:
    """Resample a volume if asked, normalise every channel, cut it if asked; its label with it.

    Raises InputError, naming the file, where that leaves nothing to learn from or to predict on.
    """
    try:
        return _normalise(volume, item, recipe, label)
    except InputError as error:
        raise InputError(f"{item.image[0]}: {error}") from error


def _normalise(
    volume: Volume, item: Item, recipe: Recipe, label: NDArray[np.uint8] | None
) -> Prepared:
    raw = resample(volume, recipe.spacing) if recipe.spacing else volume.data
    spacing = volume.spacing if not recipe.spacing else recipe.spacing
    normalised = np.empty_like(raw)
    background = np.empty(len(raw), dtype=np.float32)
    for n, (channel, how) in enumerate(zip(raw, _per_channel(item, len(raw)))):
        if channel.min() == channel.max():
            raise InputError(
                f"every voxel is {channel.flat[0]:g} at {_by(spacing)} mm; is --spacing too coarse for it?"
            )
        how = recipe.mr_intensity if how == "mr" else how
        normalised[n] = _normaliser(how, recipe)(channel)
        check_spread(channel, normalised[n], how)
        check_levels(volume.data[n], normalised[n], how, recipe)
        if how == "window":
            check_hu(volume.data[n], recipe.ct_window, item.image[0])
        background[n] = normalised[n].flat[channel.argmin()]
    if label is not None and recipe.spacing:
        before, label = label, resample_labels(label, raw.shape[1:])
        if lost := sorted(set(np.unique(before)) - set(np.unique(label))):
            say_once(
                "lost label",
                f"{item.label}: nothing is left of label {lost[0]} at {_by(spacing)} mm",
            )

    box, grid = None, raw.shape[1:]
    if recipe.foreground_crop:
        box = bounding_box(normalised > background[:, None, None, None])
        normalised, raw, label = (
            normalised[:, *box],
            raw[:, *box],
            label if label is None else label[box],
        )
    places = some_foreground(raw[0]) if label is None else some_labelled(label)
    return Prepared(
        normalised, background, places, (spacing[0], spacing[1], spacing[2]), label, box, grid
    )


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box of (d, h, w) that holds what is true in any channel of (c, d, h, w)."""
    along = [np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2, 3), (0, 1, 3), (0, 1, 2))]
    d, h, w = (
        slice(int(a[0]), int(a[-1]) + 1) if len(a) else slice(0, n)
        for a, n in zip(along, mask.shape[1:])
    )
    return d, h, w


def _per_channel(item: Item, channels: int) -> Sequence[str]:
    if len(item.intensity) == 1:
        return item.intensity * channels
    if len(item.intensity) != channels:
        raise InputError(
            f"{channels} channels, but the list names {len(item.intensity)} modalities"
        )
    return item.intensity


def _normaliser(how: str, recipe: Recipe) -> Callable[[Array], Array]:
    if how == "window":
        return lambda x: window(x, recipe.ct_window[0], recipe.ct_window[1])
    return {
        "zscore": zscore,
        "nonzero": zscore_of_nonzero,
        "percentile": percentile,
        "zscore_all": zscore_of_all,
        "minmax": minmax,
        "none": as_it_is,
    }[how]


def window(x: Array, low: float, high: float) -> Array:
    """HU to [0, 1]: `low` and less become 0, `high` and more 1."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def zscore(x: Array) -> Array:
    """(x - mean) / std by the nonzero voxels: background counts for nothing in either, and stays the darkest."""
    values = x[x != 0].astype(np.float64)
    if not len(values):
        raise InputError("every voxel is 0; leave it out of the list")
    if values.std() == 0:
        raise InputError(
            f"every voxel that is not 0 is {values[0]:g}: a mask or a label map? leave it out of the list"
        )
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


# --- what an intensity recipe leaves ----------------------------------------------------------------------------------


# What is refused here is far from what scanners give. A CT in HU with air around it, with metal, of a
# head, or cropped to a lung or an abdomen, passes.


def check_spread(raw: Array, found: Array, how: str) -> None:
    """Raises InputError where a channel `raw` (d, h, w) becomes numbers that half precision does not
    hold, or z-scores that are nearly all alike.

    99 % of the z-scores of a scan lie within 3 to 6 of each other. One hot voxel is enough to make
    them one grey.
    """
    if not np.abs(found).max() <= HALF:  # nan as well
        raise InputError(
            f"its normalised values reach {np.abs(found).max():.3g}, more than half precision holds; "
            "its voxels are nearly constant, or one is far too bright"
        )
    if how in ("zscore", "nonzero"):
        low, high = np.percentile(_some(found[raw != 0], 10**6), (0.5, 99.5))
        if high - low < 0.5 and not has_few_levels(raw):
            raise InputError(
                f"99 % of its voxels are alike beside values from {raw.min():g} to {raw.max():g}; clip its outliers"
            )


def check_levels(file: Array, found: Array, how: str, recipe: Recipe) -> None:
    """Raises InputError where few grey levels are left of the many (d, h, w) in a `file`."""
    left = levels(found)
    enough = min(FEW, found.size // 8)  # a handful of voxels has as many levels
    if left == 1 or (left < enough and not has_few_levels(file)):
        asked = "--ct-window {:g} {:g}".format(*recipe.ct_window) if how == "window" else how
        hint = "; is it a CT in HU?" if how == "window" else ""
        count = "one grey level" if left == 1 else f"{left} grey levels"
        raise InputError(
            f"{asked} leaves {count} of its values from {file.min():g} to {file.max():g}{hint}"
        )


def check_hu(file: Array, window: Sequence[float], path: Path) -> None:
    """Raises InputError where a CT (d, h, w) cannot be in HU, and says where it hardly can.

    Air is -1000, fat about -100, soft tissue 0 to 100, and edges are mixtures. So 10 to 55 % of the
    voxels of real scans and crops lie between air and fat. Where 1024 were added (the numbers as
    DICOM stores them) none do, and 15 to 60 % lie at the upper end of the widest window. Where 1024
    were subtracted once more, 99.7 % are darker than fat; of real scans and crops at most 62 %.
    """
    if has_few_levels(file):  # a phantom, or a mask
        return
    span = f"(values from {file.min():g} to {file.max():g})"
    at_the_top = np.mean(file >= window[1])
    if at_the_top > 0.1 and np.mean((file > -900) & (file < -100)) < 1e-3:
        raise InputError(
            f"not a CT in HU: {at_the_top:.0%} of its voxels lie at the upper end of the window and none is as dark as "
            f'fat or lung {span}; apply its intercept, or give the list\'s item another "intensity"'
        )
    if (dense := np.mean(file > -200)) < 5e-3:
        raise InputError(
            f"not a CT in HU: only {dense:.2%} of its voxels are denser than fat {span}; has it one intercept too many?"
        )
    if file.min() >= 0:
        say_once("no air", f"{path}: a CT without air and fat {span}; is it in HU?")


def has_few_levels(file: Array) -> bool:
    """Whether so few values are in a file that nothing can be said of its intensities."""
    return len(np.unique(_some(file))) < FEW and len(np.unique(file)) < FEW


def levels(x: Array) -> int:
    """How many grey levels a network can tell apart: multiples of `STEP`; counted up to enough."""
    found = len(np.unique(np.rint(_some(x) / STEP)))
    return found if found >= FEW else len(np.unique(np.rint(x / STEP)))


def _some(x: Array, count: int = 10**5) -> Array:
    """Every n-th voxel, so that there are about `count`."""
    return x.ravel()[:: max(1, x.size // count)]


# --- spacing ----------------------------------------------------------------------------------------------------------


def resample(volume: Volume, spacing: Sequence[float]) -> Array:
    """Trilinear, voxel centres aligned with the volume's outer faces. (c, d, h, w) -> (c, d', h', w')."""
    channels, *old = volume.data.shape
    factors = zoom_factors(volume, spacing)
    new = [round(n * factor) for n, factor in zip(old, factors)]
    if min(new) < 1:
        raise InputError(
            f"--spacing: a volume of {volume.spacing} mm would have no voxel left along an axis"
        )
    if (needed := 4 * channels * prod(new)) > memory():
        raise InputError(
            f"--spacing {_by(spacing)}: its {_by(old)} voxels of {_by(volume.spacing)} mm would become {_by(new)} "
            f"({bytes_in_words(needed)}), more than this machine's memory; are its voxel sizes in mm?"
        )
    return np.stack(
        [ndimage.zoom(x, factors, order=1, mode="nearest", grid_mode=True) for x in volume.data]
    )


def zoom_factors(volume: Volume, spacing: Sequence[float]) -> list[float]:
    return [old / new for old, new in zip(volume.spacing, spacing)]


def resample_labels(label: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.uint8]:
    """The likeliest label (d', h', w') of each new voxel: each is resampled as `resample` does images.

    Nearest neighbour would lie beside the image: from 1 mm to 2 mm it takes every second voxel, a
    quarter of a new voxel off to one side. A label is interpolated within its own box, so that the
    memory needed is that of two images, whatever the number of labels.

    At even ratios many voxels are half of one label and half of another. They go to one and to the
    other by turns, like the squares of a chessboard. If one of them always won, organs would grow,
    shrink or move.
    """
    axes = [between(n, m) for n, m in zip(label.shape, shape)]
    new = np.zeros(tuple(shape), dtype=np.uint8)
    best = np.zeros(new.shape, dtype=np.float32)  # the share of the label in `new`
    rest = np.ones(new.shape, dtype=np.float32)  # the share of the background
    odd = np.indices(new.shape, sparse=True)
    odd = (odd[0] + odd[1] + odd[2]) % 2 == 1

    def compare(box: tuple[slice, ...], share: Array, value: int) -> None:
        closer = share - best[box]
        wins = (closer > 1e-5) | ((np.abs(closer) <= 1e-5) & odd[box])
        new[box][wins] = value
        np.maximum(best[box], share, out=best[box])

    for value, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        target, parts = zip(*(part_of(axis, side) for axis, side in zip(axes, box)))
        share = interpolated((label[box] == value).astype(np.float32), parts)
        compare(target, share, value)
        rest[target] -= share
    compare(tuple(slice(n) for n in new.shape), rest, 0)
    return new


def between(old: int, new: int) -> Axis:
    """For each voxel of a new axis the two old ones around its centre, and the second one's share."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.minimum(places.astype(np.int64), max(old - 2, 0))
    return first, np.minimum(first + 1, old - 1), (places - first).astype(np.float32)


def part_of(axis: Axis, box: slice) -> tuple[slice, Axis]:
    """The new voxels that an old box reaches, and where they lie in that box."""
    first, second, share = axis
    reached = np.flatnonzero((second >= box.start) & (first < box.stop))
    target = slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 0)
    return target, (first[target] - box.start, second[target] - box.start, share[target])


def interpolated(mask: Array, axes: Sequence[Axis]) -> Array:
    """Linear along each axis in turn; what lies outside of `mask` is 0."""
    mask = np.pad(mask, 1)
    for n, (first, second, share) in enumerate(axes):
        share = np.expand_dims(share, tuple(k for k in range(3) if k != n))
        mask = mask.take(first + 1, n) * (1 - share) + mask.take(second + 1, n) * share
    return mask


def _by(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


# --- where crops are centred ------------------------------------------------------------------------------------------


def some_labelled(label: NDArray[np.uint8], each: int = 512) -> NDArray[np.int32]:
    """`each` evenly drawn voxels of every class but 0: (n, 3).

    An organ of fewer voxels has each of them several times, so that small organs are met as often as
    large ones.
    """
    rng = np.random.default_rng(0)
    found = [np.flatnonzero(label == k) for k in np.unique(label[label > 0])]
    drawn = [np.resize(rng.permutation(places), each) for places in found]
    places = np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)
    return np.stack(np.unravel_index(places, label.shape), axis=-1).astype(np.int32)


def some_foreground(x: Array, count: int = 4096) -> NDArray[np.int32]:
    """Up to `count` evenly drawn voxels of (d, h, w) that are brighter than the mean: (n, 3)."""
    places = np.flatnonzero(x > x.mean())
    if len(places) > count:
        places = np.random.default_rng(0).choice(places, count, replace=False)
    return np.stack(np.unravel_index(np.sort(places), x.shape), axis=-1).astype(np.int32)
