"""The same voxels, whatever the file: found by what is in it, and not by its name.

Two hashes are equal where two files hold equal values in RAS order (`leaks.hash_of`). Neither
name, format, compression, nor the order of the axes in the file changes them, nor a type and a
slope that give the same values. A copy in other units, rounded to fewer levels, or saved with a
wrong header has another hash. This file finds such copies too:

    Two volumes hold the same voxels if, for one of the 48 ways to turn and flip axes, no voxel of
    one differs by more than `DIFFERENCE` from the same voxel of the other, when each is clipped to
    its own 0.5th and 99.5th percentiles and these are scaled to 0 and 1.

The noise of one scan and of another of the same head differs by more than that, so two scans are
never one. A copy that was cropped, resampled or smoothed is not found.

All volumes are compared by signatures, a few thousand numbers each. A pair whose signatures agree
is read again and compared voxel by voxel, so that no verdict rests on a signature.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial import KDTree

from dae.data.nifti import Array

PERCENTILES = (0.5, 99.5)  # that become 0 and 1
DIFFERENCE = 0.02  # of scaled voxels; 256 grey levels of a CT are .01 apart at most
SIDE = 16  # voxels of a thumbnail along each axis
ROUNDING = 1e-3  # of half precision, in which thumbnails are kept
RANKS = 32  # of the sorted values of a thumbnail, by which pairs are looked for


class Signature(NamedTuple):
    """What is kept of one channel to compare it with all others."""

    shape: tuple[int, ...]  # (d, h, w)
    thumbnail: NDArray[np.float16]  # (16, 16, 16), scaled voxels


class Turn(NamedTuple):
    """One of the 48 ways to lay the axes of a volume."""

    axes: tuple[int, ...]  # which axis of the volume becomes d, h and w
    flipped: tuple[int, ...]  # which of d, h and w then run backwards

    def of(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """The volume (d, h, w) with its axes so."""
        return np.flip(x.transpose(self.axes), self.flipped)

    def __str__(self) -> str:
        return "" if self == AS_IT_IS else "axes turned"


AS_IT_IS = Turn((0, 1, 2), ())


# --- one volume


def scaled(x: Array) -> Array:
    """A channel (d, h, w): its 0.5th percentile at 0 and its 99.5th at 1, and nothing beyond.

    The smallest and the largest value take their place where the two are equal, as in an image
    that is nearly all background. `x` must have two values.
    """
    low, high = np.percentile(x, PERCENTILES).tolist()
    if high <= low:
        low, high = float(x.min()), float(x.max())
    return np.clip((x - low) / (high - low), 0, 1).astype(np.float32)


def signature_of(x: Array) -> Signature:
    """Of one channel (d, h, w) of two values and more."""
    whole = scaled(x)
    positions = []
    for n in x.shape:
        # Symmetric about the middle: the thumbnail of a flipped volume is the flipped thumbnail.
        centres = (np.arange(SIDE) + 0.5) * n / SIDE - 0.5
        positions.append(np.clip(centres, 0, n - 1))
    grid = np.meshgrid(*positions, indexing="ij")

    # Linear: where no voxel differs by more than a bound, no value between them does.
    thumbnail = map_coordinates(whole, grid, order=1, mode="nearest")
    return Signature(x.shape, thumbnail.astype(np.float16))


# --- two volumes


def turns_between(a: Signature, b: Signature) -> list[Turn]:
    """The ways to lay the axes of `b` for which the thumbnails agree; as it is comes first."""
    turns = []
    for turn in turns_to(a.shape, b.shape):
        difference = np.abs(a.thumbnail - turn.of(b.thumbnail)).max()
        if difference <= DIFFERENCE + ROUNDING:
            turns.append(turn)
    return turns


def turns_to(shape: Sequence[int], other: Sequence[int]) -> Iterator[Turn]:
    """The turns that make a volume of size `other` one of size `shape`."""
    for axes in permutations(range(3)):
        if tuple(other[axis] for axis in axes) != tuple(shape):
            continue
        for signs in product((False, True), repeat=3):
            yield Turn(axes, tuple(n for n in range(3) if signs[n]))


def same_voxels(a: Array, b: Array, turns: Sequence[Turn]) -> Turn | None:
    """The first of the turns for which two channels hold the same voxels, or None."""
    scaled_a = scaled(a)
    scaled_b = scaled(b)
    for turn in turns:
        if np.abs(scaled_a - turn.of(scaled_b)).max() <= DIFFERENCE:
            return turn
    return None


# --- all volumes


def alike(signatures: Sequence[Signature]) -> list[tuple[int, int]]:
    """Pairs that may hold the same voxels, every such pair among them, the smaller index first.

    Sorted values do not depend on the order of the axes. Where no voxel differs by more than a
    bound, no rank among the sorted values does either, so no pair is missed.
    """
    of_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for n, signature in enumerate(signatures):
        of_size[tuple(sorted(signature.shape))].append(n)

    pairs = []
    for members in of_size.values():
        values = [np.sort(signatures[n].thumbnail, axis=None) for n in members]
        ranks = np.stack(values).astype(np.float64)[:, :: SIDE**3 // RANKS]
        close = KDTree(ranks).query_pairs(DIFFERENCE + ROUNDING, p=np.inf)
        pairs += [(members[i], members[j]) for i, j in close]
    return sorted(pairs)
