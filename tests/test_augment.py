"""dae/data/augment.py: a crop is a slice of its volume; an augmentation moves an image and its label as one."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dae.config.segment import AugmentConfig
from dae.data.augment import (
    augment,
    contrasted,
    corner_around,
    crop,
    labelled_crop,
    random_corner,
    random_crop,
    zoomed_image,
    zoomed_label,
)
from dae.data.cache import Cached
from dae.data.sides import choose_flips

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
def test_beyond_the_volume_a_crop_shows_the_background_of_each_channel(
    corner: tuple[int, int, int],
) -> None:
    size = (9, 5, 12) if corner != (-9, 0, 0) else (3, 7, 8)  # the last lies wholly outside
    padded = np.stack(
        [np.pad(x, 20, constant_values=value) for x, value in zip(VOLUME, BACKGROUND)]
    )
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
    assert [sorted(set(along)) for along in corners.T.tolist()] == [
        [0, 1, 2],
        [0],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    middle_counts = np.bincount(corners[:, 0])
    assert (
        middle_counts.min() > 500 / 3 - 4 * (500 * 2 / 9) ** 0.5
    )  # evenly: four standard deviations


@pytest.mark.parametrize("n, size", list(product((5, 8), (1, 2, 3, 5))))
def test_a_crop_around_a_place_has_it_as_near_to_the_centre_as_the_grid_allows(
    n: int, size: int
) -> None:
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
def test_the_share_of_crops_on_foreground_is_the_one_asked_for(
    share: float, tmp_path: Path
) -> None:
    data = np.zeros((1, 30, 30, 30))
    data[0, 29, 29, 29] = 1  # a crop elsewhere has it once in 28^3
    volume, rng = on_disk(tmp_path, data, (29, 29, 29)), np.random.default_rng(0)
    held = np.mean(
        [random_crop(volume, (3, 3, 3), rng, foreground=share).max() for _ in range(300)]
    )
    assert abs(held - share) <= 4 * (share * (1 - share) / 300) ** 0.5


def test_no_crop_is_centred_on_what_was_not_annotated(tmp_path: Path) -> None:
    label, places = np.zeros((20, 20, 20), np.uint8), [(5, 5, 5), (10, 10, 10), (15, 15, 15)]
    for value, place in zip((1, 9, 2), places):
        label[place] = value
    volume, rng = on_disk(tmp_path, label[None], *places), np.random.default_rng(0)
    np.save(tmp_path / "label.npy", label)
    for ignore, met in ((None, {1, 2, 9}), (9, {1, 2})):
        crops = [
            labelled_crop(volume, (3, 3, 3), rng, positive=1.0, ignore=ignore)[1] for _ in range(40)
        ]
        assert {int(crop[1, 1, 1]) for crop in crops} == met


def test_the_generator_decides_the_crop(tmp_path: Path) -> None:
    volume = on_disk(tmp_path, VOLUME, (3, 3, 3))

    def crops() -> list[bytes]:
        return [
            random_crop(volume, (3, 3, 3), np.random.default_rng(seed)).tobytes()
            for seed in range(20)
        ]

    assert crops() == crops() and len(set(crops())) > 10


# --- augmentation: every voxel carries the place that it came from -----------------------------------

SHAPE = (
    21,
    21,
    19,
)  # so large that a zoom moves labels; a square axial plane can be turned by 90 degrees
PLACES = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(
    np.float32
)  # (3, d, h, w)
LABEL = np.random.default_rng(1).integers(0, 5, SHAPE).astype(np.uint8)
LABEL[0, 0, 0] = 255  # what was not annotated


def only(**chances: float) -> AugmentConfig:
    """No augmentation but the named ones."""
    none = dict.fromkeys(("flip", "rotate", "zoom", "brightness", "contrast", "noise"), 0.0)
    return AugmentConfig(**{**none, **chances})


def drawn(
    chances: AugmentConfig, n: int, *, x: np.ndarray = PLACES, label: np.ndarray = LABEL, **how: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`n` augmentations of one crop, whose arrays must come out as training takes them."""
    for seed in range(n):
        before = x.copy(), label.copy()
        found, its = augment(
            x, label, np.random.default_rng(seed), chances, **{"flip_axes": (0, 1, 2), **how}
        )
        assert np.array_equal(x, before[0]) and np.array_equal(label, before[1])
        assert found.dtype == np.float32 and its.dtype == np.uint8
        assert (
            found.flags.c_contiguous
            and its.flags.c_contiguous
            and found.shape[1:] == its.shape == label.shape
        )
        yield found, its


def origins(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each voxel, where in the crop it was: an index into it."""
    return tuple(np.rint(x).astype(int))


def test_nothing_changes_where_every_chance_is_0() -> None:
    for x, label in drawn(only(), 5, swap=[(1, 2)]):
        assert np.array_equal(x, PLACES) and np.array_equal(label, LABEL)


@pytest.mark.parametrize(
    "chances, positions",
    [
        ({"flip": 0.5}, 8),
        ({"rotate": 0.5}, 4),
        ({"flip": 0.5, "rotate": 0.5}, 16),
    ],
)
def test_a_label_stays_on_its_voxel_through_flips_and_rotations(
    chances: dict[str, float], positions: int
) -> None:
    seen = set()
    for x, label in drawn(only(**chances), 100):
        assert np.array_equal(label, LABEL[origins(x)])
        seen.add(x.tobytes())
    assert len(seen) == positions


def test_flips_are_those_of_numpy_along_each_axis_that_is_named_and_no_other() -> None:
    for axes in ((), (0,), (2,), (1, 2)):
        for x, label in drawn(only(flip=1.0), 1, flip_axes=axes):
            assert np.array_equal(x, np.flip(PLACES, [axis + 1 for axis in axes]))
            assert np.array_equal(label, np.flip(LABEL, axes))


def test_rotations_are_by_90_180_and_270_degrees_in_the_axial_plane() -> None:
    quarter = [np.rot90(PLACES, n, (1, 2)) for n in (1, 2, 3)]
    counts = [
        sum(np.array_equal(x, turned) for x, _ in drawn(only(rotate=1.0), 90)) for turned in quarter
    ]
    assert sum(counts) == 90 and min(counts) > 15
    oblong = PLACES[:, :, :19]
    for x, _ in drawn(only(rotate=1.0), 5, x=oblong, label=LABEL[:, :19]):
        assert np.array_equal(x, oblong)  # d and h differ: it cannot be turned


@pytest.mark.parametrize("factor", [0.9, 0.93, 1.04, 1.1])
def test_image_and_label_are_enlarged_together_about_the_centre(factor: float) -> None:
    """A ramp is interpolated exactly: output voxel o shows c + (o - c) / factor, and the edge beyond."""
    x = zoomed_image(PLACES, factor)
    label = zoomed_label(LABEL, factor)
    centre = (np.array(SHAPE) - 1)[:, None, None, None] / 2
    outer = (np.array(SHAPE) - 1)[:, None, None, None]
    expected = np.clip(centre + (PLACES - centre) / factor, 0, outer)
    assert np.abs(x - expected).max() < 1e-5
    assert np.array_equal(label, LABEL[origins(expected)])


def test_zooms_lie_between_nine_and_eleven_tenths_and_take_the_label_along() -> None:
    factors = []
    for x, label in drawn(only(zoom=1.0), 60):
        assert np.array_equal(label, LABEL[origins(x)])
        factors.append(1 / (x[0, 11, 9, 9] - x[0, 10, 9, 9]))
    assert 0.9 <= min(factors) < 0.92 and 1.08 < max(factors) <= 1.1


def test_brightness_scales_and_shifts_all_channels_alike_and_no_label() -> None:
    scales, shifts = [], []
    for x, label in drawn(only(brightness=1.0), 100):
        scale, shift = np.polyfit(PLACES.ravel(), x.ravel(), 1)
        assert np.abs(x - (scale * PLACES + shift)).max() < 1e-5 and np.array_equal(label, LABEL)
        scales.append(scale)
        shifts.append(shift)
    assert 0.9 <= min(scales) < 0.91 and 1.09 < max(scales) <= 1.1
    assert -0.1 <= min(shifts) < -0.09 and 0.09 < max(shifts) <= 0.1
    assert abs(np.corrcoef(scales, shifts)[0, 1]) < 0.4


def test_contrast_is_a_gamma_between_each_channels_own_ends() -> None:
    own = (
        PLACES * np.array([1.0, -2.0, 0.1])[:, None, None, None]
        + np.array([5.0, 0.0, -3.0])[:, None, None, None]
    )
    low, span = own.min((1, 2, 3), keepdims=True), np.ptp(own, (1, 2, 3), keepdims=True)
    share, gammas = (own - low) / span, []
    for x, label in drawn(only(contrast=1.0), 100, x=own.astype(np.float32)):
        gamma = np.log((x[0, 3, 0, 0] - low[0, 0, 0, 0]) / span[0, 0, 0, 0]) / np.log(
            share[0, 3, 0, 0]
        )
        assert np.abs(x - (low + span * share**gamma)).max() < 1e-4 and np.array_equal(label, LABEL)
        gammas.append(gamma)
    assert 0.7 <= min(gammas) < 0.72 and 1.47 < max(gammas) <= 1.5


def test_contrast_of_a_constant_channel_is_that_channel() -> None:
    assert np.array_equal(
        contrasted(np.full((1, 3, 3, 3), 2.0, np.float32), 0.8), np.full((1, 3, 3, 3), 2.0)
    )


def test_noise_has_mean_0_a_std_of_up_to_a_tenth_and_spares_the_label() -> None:
    flat, label = np.zeros((2, 20, 20, 20), np.float32), np.ones((20, 20, 20), np.uint8)
    stds = []
    for x, its in drawn(only(noise=1.0), 60, x=flat, label=label):
        assert np.array_equal(its, label)
        assert abs(x.mean()) < 5 * x.std() / x.size**0.5
        assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.06  # each voxel has its own
        stds.append(x.std())
    assert min(stds) < 0.01 and 0.09 < max(stds) < 0.102


@pytest.mark.parametrize("name", ["flip", "rotate", "zoom", "brightness", "contrast", "noise"])
def test_each_augmentation_comes_as_often_as_its_own_chance_says(name: str) -> None:
    changed = np.mean(
        [not np.array_equal(x, PLACES) for x, _ in drawn(only(**{name: 0.3}), 400, flip_axes=(1,))]
    )
    assert abs(changed - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


# --- sides -------------------------------------------------------------------------------------------


def test_a_left_right_flip_exchanges_the_labels_of_each_pair_and_no_others() -> None:
    names = {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 255: 255}
    for x, label in drawn(only(flip=0.5), 40, swap=[(1, 2)]):
        moved = LABEL[origins(x)]
        if x[0, 0, 0, 0] > x[0, -1, 0, 0]:  # the patient's right is on the left
            moved = np.vectorize(names.get)(moved)
        assert np.array_equal(label, moved)


def symmetric_body() -> tuple[np.ndarray, np.ndarray]:
    """Two like organs, 1 on the left and 2 on the right, and a spine behind: its own mirror image."""
    image, label = np.zeros((1, 8, 8, 4), np.float32), np.zeros((8, 8, 4), np.uint8)
    label[1:3, 3:5, 1:3], label[5:7, 3:5, 1:3] = 1, 2
    image[0][label > 0], image[0, 3:5, 0] = 1.0, 2.0
    image[0, :, :, 3] += 0.5  # and a head
    assert np.array_equal(image, image[:, ::-1])
    return image, label


@pytest.mark.parametrize("swap", [None, ((1, 2),)], ids=["without swap", "with swap"])
@pytest.mark.parametrize("rotate", [0.0, 0.5])
def test_no_two_augmentations_show_one_image_with_other_labels(
    swap: tuple[tuple[int, int], ...] | None, rotate: float
) -> None:
    """A front-back flip that is turned by 180 degrees is a left-right flip."""
    image, label = symmetric_body()
    flips = choose_flips(
        {0: "background", 1: "kidney_left", 2: "kidney_right"}, swap, turned=rotate > 0
    )
    how = {"flip_axes": flips.axes, "swap": flips.swap, "swap_axes": flips.swap_axes}
    seen: dict[bytes, bytes] = {}
    for x, its in drawn(only(flip=0.5, rotate=rotate), 300, x=image, label=label, **how):
        assert seen.setdefault(x.tobytes(), its.tobytes()) == its.tobytes()
    assert len(seen) == (8 if rotate else 4)
