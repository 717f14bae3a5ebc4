"""From each voxel of one set to the nearest of another, in mm, exactly.

`nearest_distances` is `search` made fast. Two borders that nearly agree have most of their voxels
within two steps of each other, and those are found by looking there. Only the few that are left go
to a KD-tree.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Voxels = NDArray[np.integer]
Floats = NDArray[np.float64]

REACH = 2  # voxels along each axis: how far `look_around` looks


def nearest_distances(points: Voxels, others: Voxels, spacing: Floats) -> Floats:
    """The distance in mm from each of `points` (n, 3) to the nearest of `others` (m, 3): (n,).

    Both are indices of voxels and hold at least one; `spacing` is mm along each of their axes (3,).
    """
    distances = look_around(points, others, spacing)

    not_found = np.isnan(distances)
    if not_found.any():
        distances[not_found] = search(points[not_found], others, spacing)
    return distances


def search(points: Voxels, others: Voxels, spacing: Floats) -> Floats:
    """The same distances by a KD-tree alone."""
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(points * spacing)

    # Measured over whole voxels, not by the tree, so that equal steps have equal lengths.
    return np.linalg.norm((points - others[nearest]) * spacing, axis=1)


def look_around(points: Voxels, others: Voxels, spacing: Floats) -> Floats:
    """The same distances where one of `others` is near enough to be seen; nan elsewhere."""
    # Both sets in a box with a margin, so that no step leaves it.
    low = np.minimum(points.min(axis=0), others.min(axis=0)) - REACH
    high = np.maximum(points.max(axis=0), others.max(axis=0)) + REACH
    shape = high - low + 1

    # The box is one long row of voxels: a step in space is a step along that row.
    along_row = np.array([shape[1] * shape[2], shape[2], 1])
    occupied = np.zeros(shape.prod(), bool)
    occupied[(others - low) @ along_row] = True

    steps, lengths = steps_by_length(spacing)
    distances = np.full(len(points), np.nan)
    searching = np.arange(len(points))
    addresses = (points - low) @ along_row
    for step, length in zip(steps @ along_row, lengths):
        found = occupied[addresses + step]
        distances[searching[found]] = length

        searching = searching[~found]
        addresses = addresses[~found]
    return distances


def steps_by_length(spacing: Floats) -> tuple[Voxels, Floats]:
    """Steps of up to REACH voxels along each axis (k, 3), the shortest first, and their mm (k,)."""
    steps = np.array(list(product(range(-REACH, REACH + 1), repeat=3)))
    lengths = np.linalg.norm(steps * spacing, axis=1)

    # A step that leaves the reach is at least this long. Up to here no shorter one is overlooked.
    certain = (REACH + 1) * spacing.min()
    order = np.argsort(lengths)
    order = order[lengths[order] <= certain]
    return steps[order], lengths[order]
