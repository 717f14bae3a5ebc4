"""dae/data/augment.py: a crop is a slice of its volume; image and label are moved as one."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from dae.config.segment import AugmentConfig
from dae.data.augment import (
    Augmentation,
    augment,
    corner_around,
    crop,
    draw_augmentation,
    exact_crop,
    labelled_crop,
    moved,
    random_corner,
    random_crop,
    with_contrast,
    zoomed_image,
    zoomed_label,
)
from dae.data.cache import Cached
from dae.data.sides import choose_flips

Voxel = tuple[int, int, int]

VOLUME = np.random.default_rng(0).normal(size=(2, 6, 7, 8)).astype(np.float16)
BACKGROUND = (-1.0, -2.0)


def on_disk(folder: Path, data: np.ndarray, *foreground: Voxel) -> Cached:
    np.save(folder / "image.npy", data.astype(np.float16))
    np.save(folder / "foreground.npy", np.array(foreground, dtype=np.int32))
    return Cached(folder, data.shape, (-1.0,) * len(data), (1.0, 1.0, 1.0))


def deviations(share: float, n: int) -> float:
    """Four standard deviations of a share that is counted in `n` draws."""
    return 4 * (share * (1 - share) / n) ** 0.5


# --- crops ----------------------------------------------------------------------------------------


def test_a_crop_inside_the_volume_is_its_slice() -> None:
    x = crop(VOLUME, (1, 2, 3), (4, 5, 3), BACKGROUND)
    assert x.dtype == np.float32
    assert np.array_equal(x, VOLUME[:, 1:5, 2:7, 3:6])


def test_a_crop_of_labels_is_in_their_own_type() -> None:
    label = np.random.default_rng(0).integers(0, 256, (1, 6, 7, 8)).astype(np.uint8)
    cropped = crop(label, (-1, 2, 3), (4, 5, 9), [0], dtype=np.uint8)
    assert cropped.dtype == np.uint8
    assert np.array_equal(cropped, np.pad(label[0], 9)[None, 8:12, 11:16, 12:21])


def test_a_crop_is_a_copy() -> None:
    before = VOLUME.copy()
    crop(VOLUME, (0, 0, 0), (6, 7, 8), BACKGROUND)[:] = 9
    assert np.array_equal(VOLUME, before)


@pytest.mark.parametrize(
    "corner, size",
    [
        ((-2, -1, -3), (9, 5, 12)),
        ((3, 4, 5), (9, 5, 12)),
        ((-1, 3, 0), (9, 5, 12)),
        ((-9, 0, 0), (3, 7, 8)),  # wholly outside
    ],
    ids=str,
)
def test_beyond_the_volume_a_crop_shows_the_background_of_each_channel(
    corner: Voxel, size: Voxel
) -> None:
    padded = np.stack([np.pad(x, 20, constant_values=b) for x, b in zip(VOLUME, BACKGROUND)])
    d, h, w = (slice(first + 20, first + 20 + s) for first, s in zip(corner, size))
    assert np.array_equal(crop(VOLUME, corner, size, BACKGROUND), padded[:, d, h, w])


@pytest.mark.parametrize(
    "corner, background, dtype",
    [
        ((1, 2, 3), (-0.1, 0.0), np.float16),  # all inside
        ((-1, 2, 3), (-1.0, 0.5), np.float16),
        ((-1, 2, 3), (-1.0, -0.1), np.float32),
        ((1, 2, 6), (-0.1, 0.0), np.float32),
        ((1, 2, 6), (0.0, 1e-8), np.float32),  # which float16 would round to 0
    ],
    ids=str,
)
def test_a_crop_is_exact_and_in_float16_unless_it_shows_a_background_that_is_not(
    corner: Voxel, background: tuple[float, float], dtype: type, tmp_path: Path
) -> None:
    """-0.1 is no float16, and what it is in float32 is what training has seen so far."""
    volume = on_disk(tmp_path, VOLUME)._replace(background=background)
    size = (4, 5, 4)
    x = exact_crop(volume, corner, size)
    assert x.dtype == dtype
    in_float32 = crop(VOLUME, corner, size, background)
    assert x.astype(np.float32).tobytes() == in_float32.tobytes()


def test_every_float16_becomes_the_same_float32_in_torch_as_in_numpy() -> None:
    """All 65536 of them. Those of NaN are bits that no prepared volume holds."""
    values = np.arange(2**16).astype(np.uint16).view(np.float16)
    values = values[~np.isnan(values)]
    in_torch = torch.from_numpy(values).float().numpy()
    assert in_torch.tobytes() == values.astype(np.float32).tobytes()


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_a_volume_smaller_than_the_crop_is_in_its_middle(foreground: float, tmp_path: Path) -> None:
    """6 of 10 voxels: 2 before, 2 after. 7 of 10: 1 before, 2 after. 8 of 8: all."""
    volume = on_disk(tmp_path, VOLUME[:1], (5, 6, 7))
    x = random_crop(volume, (10, 10, 8), np.random.default_rng(1), foreground=foreground)
    assert np.array_equal(x[:, 2:8, 1:8], VOLUME[:1])

    outside = np.ones(x.shape, dtype=bool)
    outside[:, 2:8, 1:8] = False
    assert np.all(x[outside] == -1)


def test_random_corners_reach_all_of_the_grid_and_never_leave_it() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([random_corner((6, 7, 8), (4, 7, 2), rng) for _ in range(500)])
    assert set(corners[:, 0]) == {0, 1, 2}
    assert set(corners[:, 1]) == {0}
    assert set(corners[:, 2]) == {0, 1, 2, 3, 4, 5, 6}

    evenly = np.bincount(corners[:, 0]) / 500
    assert np.abs(evenly - 1 / 3).max() < deviations(1 / 3, 500)


@pytest.mark.parametrize("n, size", list(product((5, 8), (1, 2, 3, 5))))
def test_a_crop_around_a_voxel_has_it_as_near_to_the_centre_as_the_grid_allows(
    n: int, size: int
) -> None:
    for voxel in range(n):
        by_search = min(range(n - size + 1), key=lambda first: abs(first + size // 2 - voxel))
        first = corner_around((voxel, 0, 0), (n, 1, 1), (size, 1, 1))[0]
        assert first == by_search
        assert first <= voxel < first + size


def test_a_crop_on_foreground_holds_a_foreground_voxel(tmp_path: Path) -> None:
    data = np.zeros((1, 20, 20, 20))
    data[0, 0, 0, 0] = 1
    data[0, 19, 3, 7] = 2
    data[0, 10, 19, 19] = 3
    volume = on_disk(tmp_path, data, (0, 0, 0), (19, 3, 7), (10, 19, 19))

    rng = np.random.default_rng(0)
    held = {random_crop(volume, (5, 5, 5), rng, foreground=1.0).max() for _ in range(40)}
    assert held == {1, 2, 3}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_crops_on_foreground_is_the_one_asked_for(
    share: float, tmp_path: Path
) -> None:
    data = np.zeros((1, 30, 30, 30))
    data[0, 29, 29, 29] = 1  # another crop has it once in 28^3
    volume = on_disk(tmp_path, data, (29, 29, 29))

    rng = np.random.default_rng(0)
    held = [random_crop(volume, (3, 3, 3), rng, foreground=share).max() for _ in range(300)]
    assert abs(np.mean(held) - share) <= deviations(share, 300)


@pytest.mark.parametrize("ignore, centres", [(None, {1, 2, 9}), (9, {1, 2})])
def test_no_crop_is_centred_on_what_was_not_annotated(
    ignore: int | None, centres: set[int], tmp_path: Path
) -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[5, 5, 5] = 1
    label[10, 10, 10] = 9
    label[15, 15, 15] = 2
    volume = on_disk(tmp_path, label[None], (5, 5, 5), (10, 10, 10), (15, 15, 15))
    np.save(tmp_path / "label.npy", label)

    rng = np.random.default_rng(0)
    met = set()
    for _ in range(40):
        _, cropped = labelled_crop(volume, (3, 3, 3), rng, positive=1.0, ignore=ignore)
        met.add(int(cropped[1, 1, 1]))
    assert met == centres


def test_the_generator_decides_the_crop(tmp_path: Path) -> None:
    volume = on_disk(tmp_path, VOLUME, (3, 3, 3))

    def crop_of(seed: int) -> bytes:
        return random_crop(volume, (3, 3, 3), np.random.default_rng(seed)).tobytes()

    crops = [crop_of(seed) for seed in range(20)]
    assert crops == [crop_of(seed) for seed in range(20)]
    assert len(set(crops)) > 10


# --- augmentations: every voxel carries its own coordinates ---------------------------------------

# So large that a zoom moves labels. A square axial plane can be turned by 90 degrees.
SHAPE = (21, 21, 19)
COORDINATES = np.indices(SHAPE).astype(np.float32)  # (3, d, h, w)
LABEL = np.random.default_rng(1).integers(0, 5, SHAPE).astype(np.uint8)
LABEL[0, 0, 0] = 255  # what was not annotated

AUGMENTATIONS = ("flip", "rotate", "zoom", "brightness", "contrast", "noise")
Augmented = Iterator[tuple[np.ndarray, np.ndarray]]


def only(**chances: float) -> AugmentConfig:
    """No augmentation but the named ones."""
    return AugmentConfig(**{**dict.fromkeys(AUGMENTATIONS, 0.0), **chances})


def on_device(
    x: np.ndarray, label: np.ndarray, drawn: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """What `augment` makes of a batch of one."""
    new_x, new_label = augment(torch.tensor(x)[None], torch.tensor(label)[None], [drawn])
    return new_x[0].numpy(), new_label[0].numpy()


def augmented(
    chances: AugmentConfig,
    n: int,
    *,
    x: np.ndarray = COORDINATES,
    label: np.ndarray = LABEL,
    flip_axes: Sequence[int] = (0, 1, 2),
    **swap: Any,
) -> Augmented:
    """`n` augmentations of one crop, which stays as it is, in arrays that training can use."""
    x_before = x.copy()
    label_before = label.copy()
    d, h, w = label.shape
    for seed in range(n):
        rng = np.random.default_rng(seed)
        drawn = draw_augmentation((d, h, w), rng, chances, flip_axes=flip_axes)
        new_x, new_label = on_device(*moved(x, label, drawn, **swap), drawn)
        assert np.array_equal(x, x_before)
        assert np.array_equal(label, label_before)

        assert new_x.dtype == np.float32
        assert new_label.dtype == np.uint8
        assert new_x.flags.c_contiguous
        assert new_label.flags.c_contiguous
        assert new_x.shape[1:] == new_label.shape == label.shape
        yield new_x, new_label


def origins(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each voxel, where in the crop it was: an index into it."""
    return tuple(np.rint(x).astype(int))


def test_nothing_changes_where_every_chance_is_0() -> None:
    for x, label in augmented(only(), 5, swap=[(1, 2)]):
        assert np.array_equal(x, COORDINATES)
        assert np.array_equal(label, LABEL)


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
    for x, label in augmented(only(**chances), 100):
        assert np.array_equal(label, LABEL[origins(x)])
        seen.add(x.tobytes())
    assert len(seen) == positions


@pytest.mark.parametrize("axes", [(), (0,), (2,), (1, 2)], ids=str)
def test_flips_are_those_of_numpy_along_each_axis_that_is_named_and_no_other(
    axes: tuple[int, ...],
) -> None:
    for x, label in augmented(only(flip=1.0), 1, flip_axes=axes):
        assert np.array_equal(x, np.flip(COORDINATES, [axis + 1 for axis in axes]))
        assert np.array_equal(label, np.flip(LABEL, axes))


def test_rotations_are_by_90_180_and_270_degrees_in_the_axial_plane() -> None:
    turned = [np.rot90(COORDINATES, quarters, (1, 2)).tobytes() for quarters in (1, 2, 3)]
    seen = [x.tobytes() for x, _ in augmented(only(rotate=1.0), 90)]
    counts = [seen.count(x) for x in turned]
    assert sum(counts) == 90
    assert min(counts) > 15


def test_a_crop_whose_axial_plane_is_no_square_is_not_rotated() -> None:
    oblong = COORDINATES[:, :, :19]
    for x, _ in augmented(only(rotate=1.0), 5, x=oblong, label=LABEL[:, :19]):
        assert np.array_equal(x, oblong)


@pytest.mark.parametrize("factor", [0.9, 0.93, 1.04, 1.1])
def test_image_and_label_are_enlarged_together_about_the_centre(factor: float) -> None:
    """A ramp is interpolated exactly: voxel o shows c + (o - c) / factor, or the edge beyond."""
    last = (np.array(SHAPE) - 1)[:, None, None, None]
    expected = np.clip(last / 2 + (COORDINATES - last / 2) / factor, 0, last)
    x, label = on_device(COORDINATES, LABEL, Augmentation(zoom=factor))
    assert np.abs(x - expected).max() < 1e-5
    assert np.array_equal(label, LABEL[origins(expected)])


def zoomed_by_scipy(volume: np.ndarray, factor: float, order: int) -> np.ndarray:
    """(d, h, w) about its centre."""
    first = [(n - 1) / 2 * (1 - 1 / factor) for n in volume.shape]
    return ndimage.affine_transform(volume, [1 / factor] * 3, first, order=order, mode="nearest")


@pytest.mark.parametrize("factor", [0.913, 0.987, 1.0001, 1.03, 1.087])
@pytest.mark.parametrize("shape", [(21, 16, 13), (1, 2, 30)], ids=str)
def test_a_zoom_is_that_of_scipy(shape: Voxel, factor: float) -> None:
    """In float64, where eight products of values below 5 differ by some 1e-15.

    By these factors no position is half-way between two voxels, where rounding decides which of
    them is the nearest.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape))
    label = rng.integers(0, 256, shape).astype(np.uint8)

    by_scipy = np.stack([zoomed_by_scipy(channel, factor, order=1) for channel in x])
    zoomed = zoomed_image(torch.from_numpy(x), factor).numpy()
    assert np.abs(zoomed - by_scipy).max() < 1e-13

    nearest = zoomed_label(torch.from_numpy(label), factor).numpy()
    assert nearest.dtype == np.uint8
    assert np.array_equal(nearest, zoomed_by_scipy(label, factor, order=0))


def test_a_zoom_leaves_a_constant_as_it_is_and_gives_no_label_that_was_not_there() -> None:
    constant = torch.full((1, 9, 10, 11), -0.1)
    label = torch.from_numpy(np.random.default_rng(0).choice([3, 250], (9, 10, 11)))
    for factor in (0.9, 0.95, 1.05, 1.1):
        assert torch.equal(zoomed_image(constant, factor), constant)
        assert set(zoomed_label(label.byte(), factor).unique().tolist()) == {3, 250}


def test_zooms_are_by_nine_to_eleven_tenths_and_take_the_label_along() -> None:
    factors = []
    for x, label in augmented(only(zoom=1.0), 60):
        assert np.array_equal(label, LABEL[origins(x)])
        factors.append(1 / (x[0, 11, 9, 9] - x[0, 10, 9, 9]))
    assert 0.9 <= min(factors) < 0.92
    assert 1.08 < max(factors) <= 1.1


def test_brightness_scales_and_shifts_all_channels_alike_and_no_label() -> None:
    scales = []
    shifts = []
    for x, label in augmented(only(brightness=1.0), 100):
        scale, shift = np.polyfit(COORDINATES.ravel(), x.ravel(), 1)
        assert np.abs(x - (scale * COORDINATES + shift)).max() < 1e-5
        assert np.array_equal(label, LABEL)
        scales.append(scale)
        shifts.append(shift)

    assert 0.9 <= min(scales) < 0.91
    assert 1.09 < max(scales) <= 1.1
    assert -0.1 <= min(shifts) < -0.09
    assert 0.09 < max(shifts) <= 0.1
    assert abs(np.corrcoef(scales, shifts)[0, 1]) < 0.4


def test_contrast_is_a_gamma_between_each_channels_own_ends() -> None:
    slope = np.array([1.0, -2.0, 0.1])[:, None, None, None]
    offset = np.array([5.0, 0.0, -3.0])[:, None, None, None]
    before = COORDINATES * slope + offset
    low = before.min((1, 2, 3), keepdims=True)
    span = np.ptp(before, (1, 2, 3), keepdims=True)
    share = (before - low) / span

    gammas = []
    for x, label in augmented(only(contrast=1.0), 100, x=before.astype(np.float32)):
        new_share = (x - low) / span
        gamma = np.log(new_share[0, 3, 0, 0]) / np.log(share[0, 3, 0, 0])
        assert np.abs(x - (low + span * share**gamma)).max() < 1e-4
        assert np.array_equal(label, LABEL)
        gammas.append(gamma)
    assert 0.7 <= min(gammas) < 0.72
    assert 1.47 < max(gammas) <= 1.5


def test_contrast_of_a_constant_channel_is_that_channel() -> None:
    constant = torch.full((1, 3, 3, 3), 2.0)
    assert torch.equal(with_contrast(constant, 0.8), constant)


def test_noise_has_mean_0_a_std_of_up_to_a_tenth_and_spares_the_label() -> None:
    flat = np.zeros((2, 20, 20, 20), np.float32)
    ones = np.ones((20, 20, 20), np.uint8)
    stds = []
    for x, label in augmented(only(noise=1.0), 60, x=flat, label=ones):
        assert np.array_equal(label, ones)
        assert abs(x.mean()) < 5 * x.std() / x.size**0.5
        # The noise of one channel is not that of the other.
        assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.06
        stds.append(x.std())
    assert min(stds) < 0.01
    assert 0.09 < max(stds) < 0.102


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_comes_as_often_as_its_own_chance_says(name: str) -> None:
    changed = []
    for x, _ in augmented(only(**{name: 0.3}), 400, flip_axes=(1,)):
        changed.append(not np.array_equal(x, COORDINATES))
    assert abs(np.mean(changed) - 0.3) < deviations(0.3, 400)


def by_numpy_and_scipy(
    x: np.ndarray, label: np.ndarray, drawn: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """All augmentations but the noise, in float64, by these random numbers."""
    x = x.astype(np.float64)
    for axis in drawn.flips:
        x = np.flip(x, axis + 1)
        label = np.flip(label, axis)
    x = np.rot90(x, drawn.turns, (1, 2))
    label = np.rot90(label, drawn.turns, (0, 1))

    x = np.stack([zoomed_by_scipy(channel, drawn.zoom, order=1) for channel in x])
    label = zoomed_by_scipy(label, drawn.zoom, order=0)

    x = x * drawn.scale + drawn.shift
    low = x.min((1, 2, 3), keepdims=True)
    span = np.ptp(x, (1, 2, 3), keepdims=True)
    return low + span * ((x - low) / span) ** drawn.gamma, label


def test_all_augmentations_after_each_other_are_those_of_numpy_and_scipy() -> None:
    """In float32, where values up to 3 are some 1e-7 apart, and a gamma of 0.7 is steep near 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 12, 9)).astype(np.float16)
    label = rng.integers(0, 256, (12, 12, 9)).astype(np.uint8)
    chances = only(flip=0.5, rotate=0.7, zoom=0.8, brightness=0.8, contrast=0.8)
    for seed in range(30):
        drawn = draw_augmentation(
            (12, 12, 9), np.random.default_rng(seed), chances, flip_axes=(0, 1, 2)
        )
        moved_x, moved_label = moved(x, label, drawn)
        assert moved_x.dtype == np.float16
        new_x, new_label = on_device(moved_x.astype(np.float32), moved_label, drawn)

        expected_x, expected_label = by_numpy_and_scipy(x, label, drawn)
        assert np.abs(new_x - expected_x).max() < 2e-5
        assert np.array_equal(new_label, expected_label)


# --- a sample of a batch --------------------------------------------------------------------------

ALL = Augmentation(zoom=0.93, scale=1.1, shift=0.05, gamma=0.8, noise=0.1, seed=2**62 + 3)


def random_batch(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, 2, 17, 6, 9, generator=generator)
    label = torch.randint(0, 256, (b, 17, 6, 9), generator=generator, dtype=torch.uint8)
    return x, label


def test_a_sample_is_the_same_in_any_batch_and_its_noise_by_its_own_seed_alone() -> None:
    x, label = random_batch(4)
    drawn = [ALL, Augmentation(), ALL._replace(seed=5), Augmentation(noise=0.1, seed=7)]
    together = augment(x, label, drawn)
    for n in (3, 1, 0, 2):
        alone = augment(x[n : n + 1], label[n : n + 1], drawn[n : n + 1])
        assert torch.equal(together[0][n], alone[0][0])
        assert torch.equal(together[1][n], alone[1][0])

    again = augment(x[:1].repeat(2, 1, 1, 1, 1), label[:1].repeat(2, 1, 1, 1), [ALL, drawn[2]])
    assert torch.equal(again[0][0], together[0][0])
    assert not torch.equal(again[0][1], again[0][0])


def test_a_sample_for_which_nothing_was_drawn_passes_bit_for_bit_and_none_is_changed() -> None:
    x, label = random_batch(3)
    before = x.clone(), label.clone()
    new_x, new_label = augment(x, label, [ALL, Augmentation(), ALL])
    assert torch.equal(new_x[1], x[1])
    assert torch.equal(new_label[1], label[1])
    for n in (0, 2):
        assert not torch.equal(new_x[n], x[n])
        assert not torch.equal(new_label[n], label[n])
    assert torch.equal(x, before[0])
    assert torch.equal(label, before[1])


def test_augmentation_does_not_move_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    augment(*random_batch(1), [ALL])
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_are_drawn_in_an_order_that_is_part_of_every_run() -> None:
    """For each augmentation whether it comes, then by how much."""
    every = only(**dict.fromkeys(AUGMENTATIONS, 1.0))
    drawn = draw_augmentation((5, 5, 7), np.random.default_rng(4), every, flip_axes=(0, 2))

    rng = np.random.default_rng(4)
    rng.random(3)  # two flips and a turn come
    turns = rng.integers(1, 4)
    rng.random()
    zoom = rng.uniform(0.9, 1.1)
    rng.random()
    scale = rng.uniform(0.9, 1.1)
    shift = rng.uniform(-0.1, 0.1)
    rng.random()
    gamma = rng.uniform(0.7, 1.5)
    rng.random()
    noise = rng.uniform(0, 0.1)
    seed = rng.integers(2**63)
    assert drawn == ((0, 2), turns, zoom, scale, shift, gamma, noise, seed)


# --- sides ----------------------------------------------------------------------------------------


def test_a_left_right_flip_exchanges_the_labels_of_each_pair_and_no_others() -> None:
    exchanged = LABEL.copy()
    exchanged[LABEL == 1] = 2
    exchanged[LABEL == 2] = 1

    flipped = 0
    for x, label in augmented(only(flip=0.5), 40, swap=[(1, 2)]):
        left_is_right = x[0, 0, 0, 0] > x[0, -1, 0, 0]
        expected = exchanged if left_is_right else LABEL
        assert np.array_equal(label, expected[origins(x)])
        flipped += left_is_right
    assert 0 < flipped < 40


def symmetric_body() -> tuple[np.ndarray, np.ndarray]:
    """Two like organs, 1 on the left and 2 on the right, and a spine: its own mirror image."""
    label = np.zeros((8, 8, 4), np.uint8)
    label[1:3, 3:5, 1:3] = 1
    label[5:7, 3:5, 1:3] = 2

    image = np.zeros((1, 8, 8, 4), np.float32)
    image[0][label > 0] = 1.0
    image[0, 3:5, 0] = 2.0  # the spine
    image[0, :, :, 3] += 0.5  # the head
    assert np.array_equal(image, image[:, ::-1])
    return image, label


@pytest.mark.parametrize("swap", [None, ((1, 2),)], ids=["without swap", "with swap"])
@pytest.mark.parametrize("rotate, positions", [(0.0, 4), (0.5, 8)])
def test_no_two_augmentations_show_one_image_with_other_labels(
    swap: tuple[tuple[int, int], ...] | None, rotate: float, positions: int
) -> None:
    """A front-back flip that is turned by 180 degrees is a left-right flip."""
    image, label = symmetric_body()
    names = {0: "background", 1: "kidney_left", 2: "kidney_right"}
    flips = choose_flips(names, swap, turned=rotate > 0)

    label_of: dict[bytes, bytes] = {}
    for x, new_label in augmented(
        only(flip=0.5, rotate=rotate),
        300,
        x=image,
        label=label,
        flip_axes=flips.axes,
        swap=flips.swap,
        swap_axes=flips.swap_axes,
    ):
        first = label_of.setdefault(x.tobytes(), new_label.tobytes())
        assert new_label.tobytes() == first
    assert len(label_of) == positions
