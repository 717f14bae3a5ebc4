"""dae/data/augment.py: a crop is a slice where there is a volume, and background where there is none."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dae.data.augment import corner_around, crop, labelled_crop, random_corner, random_crop
from dae.data.cache import Cached

VOLUME = np.random.default_rng(0).normal(size=(2, 6, 7, 8)).astype(np.float16)
BACKGROUND = (-1.0, -2.0)


def on_disk(folder: Path, data: np.ndarray, *foreground: tuple[int, int, int]) -> Cached:
    np.save(folder / "image.npy", data.astype(np.float16))
    np.save(folder / "foreground.npy", np.array(foreground, dtype=np.int32))
    return Cached(folder, data.shape, (-1.0,) * len(data), (1.0, 1.0, 1.0))


def test_a_crop_inside_the_volume_is_its_slice() -> None:
    found = crop(VOLUME, (1, 2, 3), (4, 5, 3), BACKGROUND)
    assert found.dtype == np.float32
    assert np.array_equal(found, VOLUME[:, 1:5, 2:7, 3:6])


def test_a_crop_is_a_copy() -> None:
    before = VOLUME.copy()
    crop(VOLUME, (0, 0, 0), (6, 7, 8), BACKGROUND)[:] = 9
    assert np.array_equal(VOLUME, before)


@pytest.mark.parametrize("corner", [(-2, -1, -3), (3, 4, 5), (-1, 3, 0), (-9, 0, 0)], ids=str)
def test_beyond_the_volume_a_crop_shows_the_background_of_each_channel(corner: tuple[int, int, int]) -> None:
    size = (9, 5, 12) if corner != (-9, 0, 0) else (3, 7, 8)  # the last lies wholly outside
    padded = np.stack([np.pad(x, 20, constant_values=value) for x, value in zip(VOLUME, BACKGROUND)])
    d, h, w = (slice(at + 20, at + 20 + s) for at, s in zip(corner, size))
    assert np.array_equal(crop(VOLUME, corner, size, BACKGROUND), padded[:, d, h, w])


def test_a_volume_smaller_than_the_crop_lies_in_its_middle(tmp_path: Path) -> None:
    """6 of 10 voxels: 2 before, 2 after. 7 of 10: 1 before, 2 after. 8 of 8: all."""
    for foreground in (0.0, 1.0):
        volume = on_disk(tmp_path, VOLUME[:1], (5, 6, 7))
        found = random_crop(volume, (10, 10, 8), np.random.default_rng(1), foreground=foreground)
        assert np.array_equal(found[:, 2:8, 1:8], VOLUME[:1])
        outside = np.ones(found.shape, dtype=bool)
        outside[:, 2:8, 1:8] = False
        assert np.all(found[outside] == -1)


def test_random_corners_reach_all_of_the_grid_and_never_leave_it() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([random_corner((6, 7, 8), (4, 7, 2), rng) for _ in range(500)])
    assert [sorted(set(along)) for along in corners.T.tolist()] == [[0, 1, 2], [0], [0, 1, 2, 3, 4, 5, 6]]
    middle_counts = np.bincount(corners[:, 0])
    assert middle_counts.min() > 500 / 3 - 4 * (500 * 2 / 9) ** 0.5  # evenly: four standard deviations


@pytest.mark.parametrize("n, size", list(product((5, 8), (1, 2, 3, 5))))
def test_a_crop_around_a_place_has_it_as_near_to_the_centre_as_the_grid_allows(n: int, size: int) -> None:
    for place in range(n):
        by_force = min(range(n - size + 1), key=lambda at: abs(at + size // 2 - place))
        (found, *_) = corner_around((place, 0, 0), (n, 1, 1), (size, 1, 1))
        assert found == by_force
        assert found <= place < found + size


def test_a_crop_on_foreground_holds_a_foreground_voxel(tmp_path: Path) -> None:
    data, places = np.zeros((1, 20, 20, 20)), [(0, 0, 0), (19, 3, 7), (10, 19, 19)]
    for value, place in enumerate(places, start=1):
        data[0, *place] = value
    volume, rng = on_disk(tmp_path, data, *places), np.random.default_rng(0)
    found = [random_crop(volume, (5, 5, 5), rng, foreground=1.0).max() for _ in range(40)]
    assert set(found) == {1, 2, 3}  # each of the three comes, and nothing but them


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_crops_on_foreground_is_the_one_asked_for(share: float, tmp_path: Path) -> None:
    data = np.zeros((1, 30, 30, 30))
    data[0, 29, 29, 29] = 1  # a crop elsewhere has it once in 28^3
    volume, rng = on_disk(tmp_path, data, (29, 29, 29)), np.random.default_rng(0)
    held = np.mean([random_crop(volume, (3, 3, 3), rng, foreground=share).max() for _ in range(300)])
    assert abs(held - share) <= 4 * (share * (1 - share) / 300) ** 0.5


def test_no_crop_is_centred_on_what_was_not_annotated(tmp_path: Path) -> None:
    label, places = np.zeros((20, 20, 20), np.uint8), [(5, 5, 5), (10, 10, 10), (15, 15, 15)]
    for value, place in zip((1, 9, 2), places):
        label[place] = value
    volume, rng = on_disk(tmp_path, label[None], *places), np.random.default_rng(0)
    np.save(tmp_path / "label.npy", label)
    for ignore, met in ((None, {1, 2, 9}), (9, {1, 2})):
        crops = [labelled_crop(volume, (3, 3, 3), rng, positive=1.0, ignore=ignore)[1] for _ in range(40)]
        assert {int(crop[1, 1, 1]) for crop in crops} == met


def test_the_generator_decides_the_crop(tmp_path: Path) -> None:
    volume = on_disk(tmp_path, VOLUME, (3, 3, 3))

    def crops() -> list[bytes]:
        return [random_crop(volume, (3, 3, 3), np.random.default_rng(seed)).tobytes() for seed in range(20)]

    assert crops() == crops() and len(set(crops())) > 10
