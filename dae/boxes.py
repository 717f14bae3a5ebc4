"""The box of a mask: what lies outside of it need not be computed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[slice, slice, slice]


def bounding_box(mask: NDArray[np.bool_], margin: Sequence[int] = (0, 0, 0)) -> Box | None:
    """The smallest box (d, h, w) that holds every true voxel; None where there is none.

    It is wider by `margin` voxels on both sides of each axis, as far as the mask reaches.
    """
    occupied_d = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(occupied_d):
        return None
    occupied_h = np.flatnonzero(mask.any(axis=(0, 2)))
    occupied_w = np.flatnonzero(mask.any(axis=(0, 1)))
    return (
        widened(occupied_d, margin[0], mask.shape[0]),
        widened(occupied_h, margin[1], mask.shape[1]),
        widened(occupied_w, margin[2], mask.shape[2]),
    )


def widened(occupied: NDArray[np.intp], margin: int, size: int) -> slice:
    """From the first to the last of the occupied planes of an axis, and `margin` more on both sides."""
    first, last = int(occupied[0]), int(occupied[-1])
    return slice(max(first - margin, 0), min(last + 1 + margin, size))
