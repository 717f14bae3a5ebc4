"""dae/boxes.py: the smallest box that holds every true voxel, and a margin within the mask."""

import numpy as np
import pytest

from dae.boxes import Box, bounding_box

SIZE = (7, 8, 9)


def mask_of(*voxels: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def smallest_by_search(mask: np.ndarray) -> Box:
    """Voxel by voxel, from the coordinates of the true ones."""
    voxels = np.argwhere(mask)
    d, h, w = (slice(int(along.min()), int(along.max()) + 1) for along in voxels.T)
    return d, h, w


@pytest.mark.parametrize("seed", range(5))
def test_the_box_holds_every_true_voxel_and_none_smaller_does(seed: int) -> None:
    mask = np.random.default_rng(seed).random(SIZE) < 0.01
    assert mask.any()
    assert bounding_box(mask) == smallest_by_search(mask)


def test_an_empty_mask_has_no_box() -> None:
    assert bounding_box(mask_of()) is None
    assert bounding_box(mask_of(), margin=(1, 1, 1)) is None


def test_a_full_mask_has_the_whole_grid() -> None:
    assert bounding_box(np.ones(SIZE, dtype=bool)) == (slice(0, 7), slice(0, 8), slice(0, 9))


def test_the_margin_is_that_of_each_axis_and_ends_at_the_edge_of_the_grid() -> None:
    mask = mask_of((0, 3, 8), (2, 4, 7))
    assert bounding_box(mask, margin=(1, 2, 3)) == (slice(0, 4), slice(1, 7), slice(4, 9))
