"""One volume, read once: what is in its files, and what is wrong with them.

What would stop a run is one line here, and the next volume is read. It is found by the very checks
that a run makes, and said in their words.
"""

import hashlib
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray

from dae.data import nifti
from dae.data.content import Signature, signature_of
from dae.data.datalist import Item
from dae.data.leaks import hash_of
from dae.data.nifti import Array, Volume, open_image, read_channels, read_labels, read_labels_of
from dae.data.preprocess import Recipe, channel_of, intensities, normalise_channels
from dae.errors import InputError

RANGE = (0.0, 0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5, 100.0)  # percentiles of a channel
BINS = 64  # of a histogram, from the 0.5th to the 99.5th percentile
LABELLED = 10_000  # voxels of each volume that --ct-window is suggested by
PICTURE = 64  # pixels of the longest side of a volume in a picture

NAMED_ONCE = " (other files like it are not named)"  # what `nifti.say_once` ends with


class Channel(NamedTuple):
    """One channel of a volume."""

    content: str  # hash of its values, as checkpoints keep it
    percentiles: tuple[float, ...]  # at RANGE, in HU or in the units of the file
    at_ends: tuple[float, float] | None  # share of voxels at either end of the window; of CT alone
    histogram: NDArray[np.int64]  # (64,) counts
    signature: Signature
    planes: tuple[NDArray[np.uint8], ...]  # the three middle planes, pixels of one size
    labelled: Array | None  # (n,), HU of labelled voxels, evenly drawn; of CT alone

    @property
    def ends(self) -> tuple[float, float]:
        """Of the histogram."""
        return ends_of(self.percentiles)


@dataclass
class Examined:
    """One item of a list: what could be read of it."""

    item: Item
    sha256: tuple[str, ...] = ()  # of each image file
    shape: tuple[int, ...] = ()  # of the first file, as it is stored
    axes: str = ""  # of the first file, as LPS
    unit: str = ""
    dtype: str = ""
    size: tuple[int, ...] = ()  # (d, h, w), in RAS order
    spacing: tuple[float, ...] = ()  # mm, in that order
    channels: tuple[Channel, ...] = ()
    labels: dict[int, float] = field(default_factory=dict)  # label -> ml, background included
    errors: list[str] = field(default_factory=list)
    label_errors: list[str] = field(default_factory=list)  # which stop no pre-training
    warnings: list[str] = field(default_factory=list)


def examine(item: Item, recipe: Recipe) -> Examined:
    """Everything about one item. What is wrong with its files is in `errors`."""
    result = Examined(item)
    nifti.said.clear()  # here every file is named, not only the first of its kind
    said = StringIO()
    with redirect_stderr(said):
        volume = image_of(result)
        label = label_of(result, volume)
        if volume is not None:
            look_at(result, volume, label, recipe)

    for line in said.getvalue().splitlines():
        result.warnings.append(line.removeprefix("warning: ").removesuffix(NAMED_ONCE))
    return result


def image_of(result: Examined) -> Volume | None:
    """The image, with what its header says noted; None, and an error, where it cannot be used."""
    item = result.item
    try:
        result.sha256 = tuple(sha256_of(path) for path in item.image)
        header = open_image(item.image[0])
        result.shape = header.shape
        result.unit = str(header.header.get_xyzt_units()[0])
        result.dtype = str(header.get_data_dtype())
        result.axes = "".join(code or "?" for code in aff2axcodes(header.affine))
        grid = nifti.read_grid(item.image[0])
        result.size = grid.shape
        result.spacing = grid.spacing
        return channel_of(read_channels(item.image), item)
    except (InputError, OSError) as error:
        result.errors.append(str(error))
        return None


def label_of(result: Examined, volume: Volume | None) -> NDArray[Any] | None:
    """The label map (d, h, w), its sizes in ml noted; None where there is none on the grid."""
    path = result.item.label
    if path is None:
        return None
    try:
        label_map = read_labels(path, like=None if volume is None else volume.affine)
        values, counts = np.unique(label_map.labels, return_counts=True)
        ml = float(np.prod(label_map.spacing)) / 1000
        result.labels = {int(value): int(n) * ml for value, n in zip(values, counts)}
        if not any(result.labels.keys() - {0}):
            result.warnings.append(f"{path}: no voxel is labelled")
        return None if volume is None else read_labels_of(path, volume)
    except (InputError, OSError) as error:
        result.label_errors.append(str(error))
        return None


def look_at(result: Examined, volume: Volume, label: NDArray[Any] | None, recipe: Recipe) -> None:
    """The channels of a volume, and what `preprocess` would refuse in them."""
    item = result.item
    try:
        names = intensities(item, recipe, len(volume.data))
        normalise_channels(volume.data, volume, item, recipe)
    except InputError as error:
        result.errors.append(f"{item.image[0]}: {error}")
        names = [""] * len(volume.data)

    channels = []
    for x, name in zip(volume.data, names):
        window = recipe.ct_window if name == "window" else ()
        channels.append(channel_from(x, volume.spacing, label, window))
    result.channels = tuple(channels)

    contents = [channel.content for channel in channels]
    if len(set(contents)) < len(contents):
        result.warnings.append(f"{item.image[0]}: two of its channels hold the same voxels")


def channel_from(
    x: Array, spacing: Sequence[float], label: NDArray[Any] | None, window: Sequence[float]
) -> Channel:
    """One channel (d, h, w); `window` is empty where it is no CT."""
    percentiles = tuple(np.percentile(x, RANGE).tolist())
    ends = ends_of(percentiles)
    counts, _ = np.histogram(x, BINS, ends)

    at_ends = None
    labelled = None
    if len(window):
        at_ends = (float(np.mean(x <= window[0])), float(np.mean(x >= window[1])))
        if label is not None:
            labelled = evenly(x[label > 0])
    planes = tuple(middle(x, axis, spacing, ends) for axis in range(3))
    return Channel(hash_of(x), percentiles, at_ends, counts, signature_of(x), planes, labelled)


def ends_of(percentiles: Sequence[float]) -> tuple[float, float]:
    """The 0.5th and the 99.5th of them; where these are equal, the smallest and the largest."""
    if percentiles[-2] > percentiles[1]:
        return percentiles[1], percentiles[-2]
    return percentiles[0], percentiles[-1]


def evenly(values: Array) -> Array:
    """At most `LABELLED` of the values, one in so many."""
    return values[:: -(-len(values) // LABELLED) or 1]


def middle(
    x: Array, axis: int, spacing: Sequence[float], ends: tuple[float, float]
) -> NDArray[np.uint8]:
    """The middle plane across an axis, in pixels that are as wide as high."""
    extents = [n * mm for n, mm in zip(x.shape, spacing)]
    pixel = max(extents) / PICTURE
    plane = x.take(x.shape[axis] // 2, axis)
    sides = [side for n, side in enumerate(extents) if n != axis]

    chosen = []
    for n, side in zip(plane.shape, sides):
        pixels = max(1, round(side / pixel))
        chosen.append(((np.arange(pixels) + 0.5) * n / pixels).astype(int))
    small = plane[np.ix_(*chosen)]

    low, high = ends
    return np.rint(255 * np.clip((small - low) / (high - low), 0, 1)).astype(np.uint8)


def sha256_of(path: Path) -> str:
    """Of the bytes of a file. Raises InputError where there is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
