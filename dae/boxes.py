"""The box of a mask: what is outside of it need not be computed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[slice, slice, slice]  # along d h w


def bounding_box(mask: NDArray[np.bool_], margin: Sequence[int] = (0, 0, 0)) -> Box | None:
    """The smallest box that holds every true voxel of (d, h, w); None where there is none.

    It is wider by `margin` voxels on both sides of each axis, as far as the mask reaches.
    """
    planes_d = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(planes_d):
        return None
    planes_h = np.flatnonzero(mask.any(axis=(0, 2)))
    planes_w = np.flatnonzero(mask.any(axis=(0, 1)))

    d, h, w = mask.shape
    return (
        widened(planes_d, margin[0], d),
        widened(planes_h, margin[1], h),
        widened(planes_w, margin[2], w),
    )


def widened(planes: NDArray[np.intp], margin: int, size: int) -> slice:
    """From the first to the last of the planes of an axis, and `margin` more on both sides."""
    start = int(planes[0]) - margin
    stop = int(planes[-1]) + 1 + margin
    return slice(max(start, 0), min(stop, size))
