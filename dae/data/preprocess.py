"""From a file's values to what the network sees: spacing, then intensity, by one recipe a run.

Arrays are (c, d, h, w) in RAS order; spacing is in mm in that order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dae.boxes import Box, bounding_box
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

Labels = NDArray[np.uint8]

STEP = 1e-3  # one grey level of z-scores, or of a window; half precision keeps little more
FEW = 16  # grey levels; what has fewer is no picture
HALF = float(np.finfo(np.float16).max)  # the cache keeps half precision


@dataclass(frozen=True)
class Recipe:
    """All that decides a prepared volume, beside its file."""

    spacing: tuple[float, ...] = ()  # mm along d h w; empty: that of the file
    ct_window: tuple[float, ...] = (-1000.0, 1000.0)  # HU
    mr_intensity: str = "zscore"
    foreground_crop: bool = False  # cut to the box of what is not background

    @classmethod
    def of(cls, config: DataConfig, *, foreground_crop: bool = False) -> "Recipe":
        """The recipe of the flags. Raises InputError on a spacing or a window that is not one."""
        if config.spacing and (len(config.spacing) != 3 or min(config.spacing) <= 0):
            raise InputError("--spacing: give three sizes in mm, along d h w")

        if len(config.ct_window) != 2 or config.ct_window[0] >= config.ct_window[1]:
            raise InputError("--ct-window: give the lower and the upper HU")

        return cls(config.spacing, config.ct_window, config.mr_intensity, foreground_crop)


class Prepared(NamedTuple):
    """A volume as the network sees it."""

    data: Array  # (c, d, h, w), normalised
    background: NDArray[np.float32]  # (c,), normalised value of the darkest voxel
    foreground: NDArray[np.int32]  # (n, 3), labelled or bright voxels to centre crops on
    spacing: tuple[float, float, float]  # mm
    label: Labels | None = None  # (d, h, w), on the grid of data
    box: Box | None = None  # of data in the grid it was cut from, if it was cut
    grid: tuple[int, ...] = ()  # (d, h, w), size of that grid
    content: Content | None = None  # hashes of the files' voxels; only from `prepare`


def prepare(item: Item, recipe: Recipe) -> Prepared:
    """Read an item and its label, and `normalise` them. Raises InputError naming the file."""
    volume = channel_of(read_channels(item.image), item)
    label = read_labels_of(item.label, volume) if item.label else None

    label_hash = "" if label is None else hash_of(label)
    content = Content(hashes_of(volume.data), label_hash, volume.spacing)

    return normalise(volume, item, recipe, label)._replace(content=content)


def channel_of(volume: Volume, item: Item) -> Volume:
    """The one channel that the item is, or all of them.

    Raises InputError where the list names more or fewer channels than the file has.
    """
    if item.channel is None:
        return volume

    index, named = item.channel
    if named != len(volume.data):
        raise InputError(
            f"{item.image[0]}: {len(volume.data)} channels, {named} modalities; "
            "the list must name each"
        )
    return Volume(volume.data[index : index + 1], volume.affine)


def normalise(volume: Volume, item: Item, recipe: Recipe, label: Labels | None = None) -> Prepared:
    """Resample a volume if asked, normalise every channel, cut it if asked; its label with it.

    Raises InputError, naming the file, where that leaves nothing to learn from or to predict on.
    """
    try:
        return _normalise(volume, item, recipe, label)
    except InputError as error:
        raise InputError(f"{item.image[0]}: {error}") from error


def _normalise(volume: Volume, item: Item, recipe: Recipe, label: Labels | None) -> Prepared:
    spacing = recipe.spacing or volume.spacing
    raw = resample(volume, recipe.spacing) if recipe.spacing else volume.data
    data, background = normalise_channels(raw, volume, item, recipe)

    if label is not None and recipe.spacing:
        resampled = resample_labels(label, raw.shape[1:])
        say_lost_labels(label, resampled, f"{item.label}", spacing)
        label = resampled

    grid = raw.shape[1:]
    box = None
    if recipe.foreground_crop:
        # Not "brighter than": `nonzero` makes the background a middle grey.
        differs = data != background[:, None, None, None]
        box = bounding_box(np.logical_or.reduce(differs))  # in any channel
        assert box is not None  # `check_levels` has found a second grey level
        data = data[:, *box]
        raw = raw[:, *box]
        label = None if label is None else label[box]

    foreground = bright_voxels(raw[0]) if label is None else labelled_voxels(label)
    d, h, w = spacing
    return Prepared(data, background, foreground, (d, h, w), label, box, grid)


def by(sizes: Sequence[float]) -> str:
    """(1.5, 1.5, 2.0) -> "1.5 x 1.5 x 2"."""
    return " x ".join(f"{size:g}" for size in sizes)


# --- intensity ------------------------------------------------------------------------------------


def intensities(item: Item, recipe: Recipe, channels: int) -> list[str]:
    """How each channel is normalised. Raises InputError where the list names another number."""
    named = list(item.intensity)
    if len(named) == 1:
        named = named * channels
    if len(named) != channels:
        raise InputError(f"{channels} channels, but the list names {len(named)} modalities")

    return [recipe.mr_intensity if intensity == "mr" else intensity for intensity in named]


def normalise_channels(
    raw: Array, volume: Volume, item: Item, recipe: Recipe
) -> tuple[Array, NDArray[np.float32]]:
    """The resampled channels (c, d, h, w), normalised, and the background (c,) of each.

    Raises InputError where a channel has nothing to learn from, before or after.
    """
    spacing = recipe.spacing or volume.spacing
    normalised = np.empty_like(raw)
    background = np.empty(len(raw), dtype=np.float32)

    for n, intensity in enumerate(intensities(item, recipe, len(raw))):
        x = raw[n]
        if x.min() == x.max():
            raise InputError(
                f"every voxel is {x.flat[0]:g} at {by(spacing)} mm; is --spacing too coarse for it?"
            )
        y = normalise_channel(x, intensity, recipe)

        # Resampling mixes values, so grey levels and HU are judged by those of the file.
        from_file = volume.data[n]
        check_spread(x, y, intensity)
        check_levels(from_file, y, intensity, recipe)
        if intensity == "window":
            check_hu(from_file, recipe.ct_window, item)

        normalised[n] = y
        background[n] = y.flat[x.argmin()]

    return normalised, background


def normalise_channel(x: Array, intensity: str, recipe: Recipe) -> Array:
    """One channel (d, h, w) by the function below that has this name in the list."""
    if intensity == "window":
        low, high = recipe.ct_window
        return window(x, low, high)
    return NORMALISERS[intensity](x)


def window(x: Array, low: float, high: float) -> Array:
    """HU to [0, 1]: `low` and less become 0, `high` and more 1."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def zscore(x: Array) -> Array:
    """(x - mean) / std of the nonzero voxels: background does not count in either.

    The background stays the darkest. Raises InputError where the nonzero voxels are all alike.
    """
    values = x[x != 0].astype(np.float64)
    if not len(values):
        raise InputError("every voxel is 0; leave it out of the list")
    if values.std() == 0:
        raise InputError(
            f"every voxel that is not 0 is {values[0]:g}: a mask or a label map? "
            "leave it out of the list"
        )
    return ((x - values.mean()) / values.std()).astype(np.float32)


def zscore_of_nonzero(x: Array) -> Array:
    """As `zscore`, but zeros stay 0, as in the authors' code.

    The background becomes the mean, a middle grey. In an image without a mask, the zeros among the
    dark voxels become speckles of that grey.
    """
    return np.where(x != 0, zscore(x), np.float32(0))


def zscore_of_all(x: Array) -> Array:
    """(x - mean) / std of all voxels, as nnU-Net's channel `zscore`."""
    values = x.astype(np.float64)
    return ((values - values.mean()) / max(values.std(), 1e-8)).astype(np.float32)


def minmax(x: Array) -> Array:
    """The smallest value to 0, the largest to 1, as nnU-Net's channel `rescale_to_0_1`."""
    low = float(x.min())
    high = float(x.max())
    return window(x, low, max(high, low + 1e-8))


def not_normalised(x: Array) -> Array:
    """The values of the file, as nnU-Net's channel `noNorm`."""
    return x


def percentile(x: Array) -> Array:
    """The 0.05th percentile to 0, the 99.95th to 1; darker and brighter voxels are clipped."""
    low, high = np.percentile(x, (0.05, 99.95)).tolist()
    if high <= low:
        high = low + 1e-8
    return window(x, low, high)


NORMALISERS: dict[str, Callable[[Array], Array]] = {
    "zscore": zscore,
    "nonzero": zscore_of_nonzero,
    "percentile": percentile,
    "zscore_all": zscore_of_all,
    "minmax": minmax,
    "none": not_normalised,
}


# --- what normalisation leaves --------------------------------------------------------------------

# What is refused here is far from what scanners give. A CT in HU with air around it, with metal, of
# a head, or cropped to a lung or an abdomen, passes.


def check_spread(raw: Array, normalised: Array, intensity: str) -> None:
    """Raises InputError where a channel (d, h, w) becomes numbers that cannot be learned from.

    They are too large for half precision, or z-scores that are nearly all alike. 99 % of the
    z-scores of a scan lie within 3 to 6 of each other. One hot voxel is enough to make them one
    grey.
    """
    largest = np.abs(normalised).max()
    if not largest <= HALF:  # true of nan as well
        raise InputError(
            f"its normalised values reach {largest:.3g}, more than half precision holds; "
            "its voxels are nearly constant, or one is far too bright"
        )

    if intensity in ("zscore", "nonzero"):
        low, high = np.percentile(subsample(normalised[raw != 0], 10**6), (0.5, 99.5))
        if high - low < 0.5 and not has_few_levels(raw):
            raise InputError(
                f"99 % of its voxels are alike beside values from {raw.min():g} to {raw.max():g}; "
                "clip its outliers"
            )


def check_levels(file: Array, normalised: Array, intensity: str, recipe: Recipe) -> None:
    """Raises InputError where few grey levels are left of the many (d, h, w) in a `file`."""
    levels = grey_levels(normalised)
    enough = min(FEW, normalised.size // 8)  # a handful of voxels has as many levels
    too_few = levels < enough and not has_few_levels(file)
    if levels > 1 and not too_few:
        return

    option = intensity
    hint = ""
    if intensity == "window":
        low, high = recipe.ct_window
        option = f"--ct-window {low:g} {high:g}"
        hint = "; is it a CT in HU?"
    count = "one grey level" if levels == 1 else f"{levels} grey levels"
    raise InputError(
        f"{option} leaves {count} of its values from {file.min():g} to {file.max():g}{hint}"
    )


def check_hu(file: Array, window: Sequence[float], item: Item) -> None:
    """Raises InputError where a CT (d, h, w) cannot be in HU, and warns where it hardly can.

    Air is -1000, fat about -100, soft tissue 0 to 100, and edges are mixtures. So 10 to 55 % of the
    voxels of real scans and crops lie between air and fat. Where 1024 were added (the numbers as
    DICOM stores them) none do, and 15 to 60 % lie at the upper end of the widest window. Where 1024
    were subtracted once more, 99.7 % are darker than fat; of real scans and crops at most 62 %.
    """
    if has_few_levels(file):  # a phantom, or a mask
        return

    values = f"(values from {file.min():g} to {file.max():g})"
    at_the_top = np.mean(file >= window[1])
    lung_or_fat = np.mean((file > -900) & (file < -100))
    if at_the_top > 0.1 and lung_or_fat < 1e-3:
        raise InputError(
            f"not a CT in HU: {at_the_top:.0%} of its voxels lie at the upper end of the window "
            f"and none is as dark as fat or lung {values}; apply its intercept, "
            'or give the list\'s item another "intensity"'
        )

    denser_than_fat = np.mean(file > -200)
    if denser_than_fat < 5e-3:
        raise InputError(
            f"not a CT in HU: only {denser_than_fat:.2%} of its voxels are denser than fat "
            f"{values}; has it one intercept too many?"
        )

    if file.min() >= 0:
        say_once("no air", f"{item.image[0]}: a CT without air and fat {values}; is it in HU?")


def has_few_levels(file: Array) -> bool:
    """Whether so few values are in a file that nothing can be said of its intensities."""
    # The part of the voxels is quick, and most files have more than a few values in it.
    return len(np.unique(subsample(file))) < FEW and len(np.unique(file)) < FEW


def grey_levels(x: Array) -> int:
    """How many grey levels a network can tell apart: multiples of `STEP`; counted up to enough."""
    levels = len(np.unique(np.rint(subsample(x) / STEP)))
    if levels >= FEW:
        return levels
    return len(np.unique(np.rint(x / STEP)))


def subsample(x: Array, count: int = 10**5) -> Array:
    """Every n-th voxel, so that there are about `count`."""
    return x.ravel()[:: max(1, x.size // count)]


# --- spacing --------------------------------------------------------------------------------------


def resample(volume: Volume, spacing: Sequence[float]) -> Array:
    """Trilinear, voxel centres aligned with the volume's outer faces.

    (c, d, h, w) -> (c, d', h', w'). Raises InputError where that has no voxels, or too many.
    """
    channels, *old_size = volume.data.shape
    factors = [old / new for old, new in zip(volume.spacing, spacing)]
    new_size = [round(n * factor) for n, factor in zip(old_size, factors)]

    if min(new_size) < 1:
        raise InputError(
            f"--spacing: a volume of {volume.spacing} mm would have no voxel left along an axis"
        )
    needed = 4 * channels * prod(new_size)
    if needed > memory():
        raise InputError(
            f"--spacing {by(spacing)}: its {by(old_size)} voxels of {by(volume.spacing)} mm "
            f"would become {by(new_size)} ({bytes_in_words(needed)}), "
            "more than this machine's memory; are its voxel sizes in mm?"
        )

    resampled = []
    for channel in volume.data:
        resampled.append(ndimage.zoom(channel, factors, order=1, mode="nearest", grid_mode=True))
    return np.stack(resampled)


def resample_labels(label: Labels, shape: Sequence[int]) -> Labels:
    """The likeliest label (d', h', w') of each new voxel.

    The share of a label in a new voxel is found as `resample` finds intensities. Nearest neighbour
    would not match the image: from 1 mm to 2 mm it takes every second voxel, a quarter of a new
    voxel off to one side. A label is interpolated within its own box, so that the memory needed is
    that of two images, whatever the number of labels.
    """
    axes = [Axis.between(old, new) for old, new in zip(label.shape, shape)]
    likeliest = Likeliest(shape)
    background = np.ones(tuple(shape), dtype=np.float32)

    for value, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:  # no voxel has this value
            continue

        # The new voxels that the old box reaches, and how they interpolate within it.
        target = []
        axes_in_box = []
        for axis, side in zip(axes, box):
            new_voxels = axis.reached_from(side)
            target.append(new_voxels)
            axes_in_box.append(axis.within(side, new_voxels))

        share = interpolate((label[box] == value).astype(np.float32), axes_in_box)
        likeliest.offer(value, share, tuple(target))
        background[tuple(target)] -= share

    everywhere = tuple(slice(n) for n in shape)
    likeliest.offer(0, background, everywhere)
    return likeliest.labels


class Likeliest:
    """In each voxel the label with the largest share of those offered so far.

    At even ratios many voxels are half of one label and half of another. They go to one and to the
    other by turns, like the squares of a chessboard. If one of them always won, organs would grow,
    shrink or move.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.labels = np.zeros(tuple(shape), dtype=np.uint8)
        self.shares = np.zeros(self.labels.shape, dtype=np.float32)

        d, h, w = np.indices(self.labels.shape, sparse=True)
        self.black = (d + h + w) % 2 == 1

    def offer(self, value: int, share: Array, box: tuple[slice, ...]) -> None:
        """In `box`, put `value` where its `share` is larger than that of every other label."""
        ahead = share - self.shares[box]
        equal = np.abs(ahead) <= 1e-5
        wins = (ahead > 1e-5) | (equal & self.black[box])

        self.labels[box][wins] = value
        np.maximum(self.shares[box], share, out=self.shares[box])


class Axis(NamedTuple):
    """One axis of a linear interpolation: of each new voxel the two old ones around its centre."""

    first: NDArray[np.int64]  # (n,)
    second: NDArray[np.int64]  # (n,)
    share: NDArray[np.float32]  # (n,), weight of the second; 1 - share is that of the first

    @classmethod
    def between(cls, old: int, new: int) -> "Axis":
        """From `old` voxels to `new` ones with the same outer faces."""
        centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        first = np.minimum(centres.astype(np.int64), max(old - 2, 0))
        second = np.minimum(first + 1, old - 1)
        return cls(first, second, (centres - first).astype(np.float32))

    def reached_from(self, old: slice) -> slice:
        """The new voxels that lie, in part, between the old ones of this range."""
        reached = np.flatnonzero((self.second >= old.start) & (self.first < old.stop))
        if not len(reached):
            return slice(0, 0)
        return slice(int(reached[0]), int(reached[-1]) + 1)

    def within(self, old: slice, new: slice) -> "Axis":
        """The axis of some new voxels, where only this range of the old ones is kept."""
        return Axis(self.first[new] - old.start, self.second[new] - old.start, self.share[new])


def interpolate(mask: Array, axes: Sequence[Axis]) -> Array:
    """Linear along each axis in turn; outside of `mask` (d, h, w) all is 0."""
    mask = np.pad(mask, 1)  # so that every index is one higher below
    for n, axis in enumerate(axes):
        other_axes = tuple(k for k in range(3) if k != n)
        share = np.expand_dims(axis.share, other_axes)
        first = mask.take(axis.first + 1, n)
        second = mask.take(axis.second + 1, n)
        mask = first * (1 - share) + second * share
    return mask


def say_lost_labels(old: Labels, new: Labels, path: str, spacing: Sequence[float]) -> None:
    """Warn where no voxel of a label is left after resampling."""
    lost = sorted(set(np.unique(old)) - set(np.unique(new)))
    if lost:
        say_once("lost label", f"{path}: nothing is left of label {lost[0]} at {by(spacing)} mm")


# --- where crops are centred ----------------------------------------------------------------------


def labelled_voxels(label: Labels, per_class: int = 512) -> NDArray[np.int32]:
    """`per_class` evenly drawn voxels of every class but 0: (n, 3).

    Of a smaller organ each voxel comes several times, so that small organs are met as often as
    large ones.
    """
    rng = np.random.default_rng(0)
    chosen = [np.zeros(0, dtype=np.int64)]
    for value in np.unique(label[label > 0]):
        voxels = np.flatnonzero(label == value)
        chosen.append(np.resize(rng.permutation(voxels), per_class))

    return coordinates(np.concatenate(chosen), label.shape)


def bright_voxels(x: Array, count: int = 4096) -> NDArray[np.int32]:
    """Up to `count` evenly drawn voxels of (d, h, w) that are brighter than the mean: (n, 3)."""
    voxels = np.flatnonzero(x > x.mean())
    if len(voxels) > count:
        voxels = np.random.default_rng(0).choice(voxels, count, replace=False)
    return coordinates(np.sort(voxels), x.shape)


def coordinates(voxels: NDArray[np.int64], shape: Sequence[int]) -> NDArray[np.int32]:
    """Indices into a flat volume -> indices along d h w: (n, 3)."""
    along = np.unravel_index(voxels, tuple(shape))
    return np.stack(along, axis=-1).astype(np.int32)
