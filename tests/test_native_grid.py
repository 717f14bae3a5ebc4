"""dae/evaluation/native_grid.py: back to the file, against torch, scipy and labels set by hand."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from dae.boxes import Box
from dae.data.datalist import Item
from dae.data.nifti import Volume, read_image, read_labels_of
from dae.data.preprocess import Recipe, prepare, resample, resample_labels
from dae.data.regions import Region
from dae.errors import InputError
from dae.evaluation import native_grid
from dae.evaluation.native_grid import label_map, paste, save_like
from dae.evaluation.windows import decide_by, sliding_window


def in_slabs(probabilities: Tensor, planes: int) -> Iterator[Tensor]:
    return iter(probabilities.split(planes, dim=1))


def voxel_centres(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """In mm from the corner of the grid: (d, h, w, 3)."""
    axes = [(np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


# --- a box in its grid


@pytest.mark.parametrize(
    "box",
    [(slice(2, 15), slice(1, 6), slice(0, 7)), (slice(0, 20), slice(0, 8), slice(2, 9))],
    ids=str,
)
def test_what_was_predicted_in_a_box_lies_there_and_all_around_is_background(box: Box) -> None:
    inside = torch.rand(3, *(part.stop - part.start for part in box))
    pasted = torch.cat(list(paste(inside.split(4, dim=1), box, (20, 8, 9))), dim=1)
    assert pasted.shape == (3, 20, 8, 9)
    assert torch.equal(pasted[:, *box], inside)

    around = torch.ones(20, 8, 9, dtype=torch.bool)
    around[box] = False
    assert (pasted[0][around] == 1).all()
    assert not pasted[1:, around].any()


def test_around_a_box_there_is_no_region() -> None:
    inside = torch.rand(3, 4, 5, 6)
    box = (slice(2, 6), slice(0, 5), slice(1, 7))
    pasted = torch.cat(list(paste(iter([inside]), box, (9, 6, 8), are_regions=True)), dim=1)
    expected = torch.zeros(3, 9, 6, 8)
    expected[:, 2:6, 0:5, 1:7] = inside
    assert torch.equal(pasted, expected)


# --- probabilities to labels


def smooth_probabilities(classes: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5)) * 30
    return torch.from_numpy(smooth).float().softmax(0)


def torch_resampled(probabilities: Tensor, target: Sequence[int]) -> np.ndarray:
    batch = probabilities[None].double()
    return F.interpolate(batch, tuple(target), mode="trilinear", align_corners=False)[0].numpy()


def scipy_resampled(probabilities: Tensor, target: Sequence[int]) -> np.ndarray:
    factors = [new / old for new, old in zip(target, probabilities.shape[1:])]
    resampled = []
    for p in probabilities.double():
        resampled.append(ndimage.zoom(p, factors, order=1, mode="nearest", grid_mode=True))
    return np.stack(resampled)


SHAPES = [
    ((10, 12, 14), (23, 19, 30)),
    ((10, 12, 14), (4, 5, 6)),
    ((10, 12, 14), (25, 7, 14)),
    ((9, 8, 7), (3, 16, 11)),
    ((1, 4, 4), (5, 8, 3)),
    ((6, 5, 7), (1, 1, 1)),
    ((17, 6, 6), (18, 6, 6)),
]


@pytest.mark.parametrize("resampled", [torch_resampled, scipy_resampled], ids=["torch", "scipy"])
@pytest.mark.parametrize("source, target", SHAPES, ids=str)
def test_labels_are_those_of_the_whole_volume_resampled_linearly(
    source: tuple[int, ...],
    target: tuple[int, ...],
    resampled: Callable[[Tensor, Sequence[int]], np.ndarray],
) -> None:
    probabilities = smooth_probabilities(5, source)
    found = label_map(in_slabs(probabilities, 3), source, target)
    expected = resampled(probabilities, target)

    second, first = np.sort(expected, axis=0)[-2:]
    clear = first - second > 1e-4  # elsewhere rounding may decide
    assert clear.mean() > 0.99
    assert found.shape == target
    assert np.array_equal(found[clear], expected.argmax(0)[clear])


@pytest.mark.parametrize("source, target", SHAPES, ids=str)
def test_regions_are_resampled_as_probabilities_and_then_cut_at_a_half(
    source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    probabilities = smooth_probabilities(4, source)[:3].cumsum(0).flip(0)  # each within the last
    regions = (Region("whole", (1, 2, 3), 2), Region("core", (1, 3), 1), Region("in", (3,), 3))
    decide = decide_by([0, 1, 2, 3], regions)
    found = label_map(in_slabs(probabilities, 3), source, target, decide)

    resampled = scipy_resampled(probabilities, target)
    whole, core, inner = resampled > 0.5
    expected = np.where(inner, 3, np.where(core, 1, np.where(whole, 2, 0)))
    clear = (np.abs(resampled - 0.5) > 1e-4).all(0)
    assert clear.mean() > 0.98
    assert np.array_equal(found[clear], expected[clear])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_between_two_planes_a_voxel_takes_from_both_by_its_distance(
    source: int, target: int, seed: int
) -> None:
    """The first axis alone, which is the streamed one, on any pair of sizes. Of two classes one is
    level at 1/2.
    """
    line = np.random.default_rng(seed).random(source)
    centres = np.interp((np.arange(target) + 0.5) * source / target, np.arange(source) + 0.5, line)
    ramp = torch.from_numpy(np.stack([np.full(source, 0.5), line]))[..., None, None]
    slabs = in_slabs(ramp, 1 + seed % 5)
    found = label_map(slabs, (source, 1, 1), (target, 1, 1))[:, 0, 0]
    clear = abs(centres - 0.5) > 1e-9
    assert np.array_equal(found[clear], (centres > 0.5)[clear])


@pytest.mark.parametrize("planes", [1, 2, 7, 100])
def test_on_equal_grids_labels_are_exactly_the_argmax_and_the_first_of_equals(planes: int) -> None:
    shape = (31, 8, 9)
    noise = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    coarse = (noise * 5).round() / 5  # many voxels have several best classes
    for values in (noise, coarse):
        found = label_map(in_slabs(values, planes), shape, shape)
        assert np.array_equal(found, values.numpy().argmax(0))


@pytest.mark.parametrize(
    "old, new",
    [
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
        ((0.75, 0.75, 1.0), (1.5, 1.5, 2.0)),
        ((1.3, 0.9, 3.1), (2.0, 2.0, 2.0)),
        ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
    ],
    ids=str,
)
def test_there_and_back_organs_stay_where_they_were(
    old: tuple[float, ...], new: tuple[float, ...]
) -> None:
    """Balls in many places, of a network that makes no error. Their centres move by less than .04
    of a voxel on average, along every axis, as probabilities and as the labels that a network is
    trained on.
    """
    rng = np.random.default_rng(0)
    shape = [int(43 / mm) for mm in old]  # odd and even sizes
    centres = voxel_centres(shape, old)
    moved: dict[str, list[np.ndarray]] = {"probabilities": [], "labels": []}
    for _ in range(24):
        ball = ((centres - rng.uniform(17, 26, 3)) ** 2).sum(-1) < rng.uniform(8, 14) ** 2
        one_hot = np.stack([~ball, ball]).astype(np.float32)
        coarse = resample(Volume(one_hot, np.diag([*old, 1.0])), new)
        coarse_labels = resample_labels(ball.astype(np.uint8), coarse.shape[1:])
        one_hot_labels = np.eye(2, dtype=np.float32)[:, coarse_labels]

        for name, predicted in (("probabilities", coarse), ("labels", one_hot_labels)):
            slabs = in_slabs(torch.from_numpy(predicted), 5)
            found = label_map(slabs, predicted.shape[1:], shape)
            moved[name].append(np.argwhere(found).mean(axis=0) - np.argwhere(ball).mean(axis=0))

    for shifts in moved.values():
        assert np.abs(np.mean(shifts, axis=0)).max() < 0.04


@pytest.mark.parametrize("spacing", [(2.0, 3.0, 1.25), (0.5, 0.7, 0.9)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resampling_there_and_back_leaves_a_plane_where_it_was(
    axis: int, spacing: tuple[float, ...]
) -> None:
    """A half-space: preprocessing and the way back agree on where the outer faces are."""
    inside = np.zeros((20, 20, 20), np.float32)
    np.moveaxis(inside, axis, 0)[12:] = 1
    volume = Volume(np.stack([1 - inside, inside]), np.eye(4))
    coarse = resample(volume, spacing)
    found = label_map(in_slabs(torch.from_numpy(coarse), 4), coarse.shape[1:], (20, 20, 20))
    assert abs(int(found.sum()) / 400 - 8) <= 1
    assert set(np.unique(found.sum(axis))) <= {7, 8, 9}
    if min(spacing) < 1:
        assert np.array_equal(found, inside)


@pytest.mark.parametrize(
    "classes, dtype", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (1000, "uint16")]
)
def test_labels_take_the_smallest_type_that_holds_them(classes: int, dtype: str) -> None:
    best = torch.zeros(classes, 2, 3, 3)
    best[-1] = 1
    labels = label_map(in_slabs(best, 1), (2, 3, 3), (3, 4, 5))
    assert labels.dtype == dtype
    assert (labels == classes - 1).all()


@pytest.mark.parametrize("shape", [(9, 6, 6), (11, 6, 6), (10, 5, 6), (10, 6, 7)], ids=str)
@pytest.mark.parametrize("target", [(20, 6, 6), (3, 6, 6)], ids=str)
def test_slabs_of_another_grid_are_refused(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not make up"):
        label_map(in_slabs(torch.rand(2, 10, 6, 6), 3), shape, target)


def test_a_label_map_holds_no_more_than_a_few_slabs() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[int] = []

    def slabs() -> Iterator[Tensor]:
        for _ in range(50):
            slab = torch.rand(3, 2, 6, 6)
            alive.add(slab)
            yield slab
            del slab
            counts.append(len(alive))

    label_map(slabs(), (100, 6, 6), (160, 8, 8))
    assert len(counts) == 50
    assert max(counts) <= 2


# --- labels to the patient's file

SIGNS = list(product((1, -1), repeat=3))
# Each order of the axes twice, each combination of their directions at least once. test_nifti.py
# has all 48.
SOME_ORDERS = [
    (axes, SIGNS[(n + 4 * k) % 8], (n + k) % 2 == 1)
    for (n, axes), k in product(enumerate(permutations(range(3))), (0, 1))
]
SPACING = (0.9, 0.8, 2.2)  # mm

# Centre and axes in mm, in no symmetric places.
ORGANS = [
    ((22, 24, 32), (40, 36, 30)),
    ((48, 20, 20), (16, 24, 20)),
    ((50, 45, 46), (12, 15, 22)),
    ((50, 48, 16), (15, 10, 20)),
    ((12, 50, 14), (10, 10, 12)),
    ((34, 46, 14), (5, 12, 18)),
]
CLASSES = range(len(ORGANS) + 1)


def organs(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """The ellipsoids as labels (d, h, w)."""
    centres = voxel_centres(shape, spacing)
    labels = np.zeros(shape, np.uint8)
    for label, (centre, axes) in enumerate(ORGANS, start=1):
        labels[(((centres - centre) / (np.array(axes) / 2)) ** 2).sum(-1) < 1] = label
    return labels


def rotation(about_z: float, about_x: float) -> np.ndarray:
    """By degrees."""
    a, b = np.radians(about_z), np.radians(about_x)
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return z @ x


def stored_as(
    truth: np.ndarray, turn: np.ndarray, axes: Sequence[int], flips: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A RAS label map as a scanner might store it, and the affine that says so."""
    steps = turn @ np.diag(SPACING)
    origin = np.array([-10.0, 20.0, 30.0])
    stored = truth.transpose(axes)
    affine = np.eye(4)
    for n, (axis, flip) in enumerate(zip(axes, flips)):
        affine[:3, n] = flip * steps[:, axis]
        if flip < 0:  # the first voxel is now the one that was last
            stored = np.flip(stored, n)
            origin = origin + steps[:, axis] * (truth.shape[axis] - 1)
    affine[:3, 3] = origin
    return stored, affine


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    dice = []
    for k in CLASSES[1:]:
        both = ((a == k) & (b == k)).sum()
        dice.append(2 * both / ((a == k).sum() + (b == k).sum()))
    return float(np.mean(dice))


def oracle(x: Tensor) -> Tensor:
    """Its input holds the truth, a channel for each class. It says just that."""
    return x.clamp(min=1e-6).log()


TRUTH = organs((66, 74, 28), SPACING)


@pytest.mark.parametrize("axes, flips, oblique", SOME_ORDERS, ids=str)
def test_predictions_land_on_the_voxel_for_every_axis_order_and_flip(
    axes: tuple[int, ...], flips: tuple[int, ...], oblique: bool, tmp_path: Path
) -> None:
    """The truth goes the image's way: stored as channels, read, resampled, cut into windows, and
    back into a file.
    """
    turn = rotation(20, -10) if oblique else np.eye(3)
    truth, affine = stored_as(TRUTH, turn, axes, flips)
    source = tmp_path / "image.nii"
    channels = np.stack([truth == k for k in CLASSES], axis=-1).astype(np.uint8)
    nib.save(nib.Nifti1Image(channels, affine), source)
    item = Item((source,), ("ct",), ("window",), "s1")

    for spacing, grid in (((), TRUTH.shape), ((1.5, 1.5, 2.0), (40, 39, 31))):
        prepared = prepare(item, Recipe(spacing, ct_window=(0.0, 1.0)))
        assert prepared.data.shape == (len(CLASSES), *grid)
        slabs = sliding_window(
            prepared.data,
            oracle,
            window=(48, 48, 32),
            classes=len(CLASSES),
            overlap=0.25,
            device="cpu",
            background=prepared.background,
        )
        save_like(source, label_map(slabs, grid, TRUTH.shape), tmp_path / "labels.nii")

        found = nib.load(tmp_path / "labels.nii")
        assert found.shape == truth.shape
        assert np.array_equal(found.affine, nib.load(source).affine)
        assert nib.aff2axcodes(found.affine) == nib.aff2axcodes(affine)
        if spacing:
            assert mean_dice(np.asarray(found.dataobj), truth) >= 0.975
        else:
            assert np.array_equal(found.dataobj, truth)  # a Dice of 1 in every class


@pytest.mark.parametrize("unit, mm", [("mm", 1.0), ("micron", 0.001), ("meter", 1000.0)])
@pytest.mark.parametrize("degrees", [44.99999, 45, 45.00001, -45, 135])
def test_labels_of_a_scan_at_45_degrees_lie_on_it_in_every_unit(
    degrees: float, unit: str, mm: float, tmp_path: Path
) -> None:
    affine = np.diag([1 / mm, 1 / mm, 1 / mm, 1.0])
    affine[:3, :3] = rotation(degrees, 0) / mm
    stored = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    image = nib.Nifti1Image(stored, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")

    volume = read_image(tmp_path / "scan.nii")
    save_like(tmp_path / "scan.nii", volume.data[0].astype(np.uint8), tmp_path / "labels.nii")
    found = nib.load(tmp_path / "labels.nii")
    assert np.array_equal(found.dataobj, stored)
    assert found.header.get_xyzt_units()[0] == unit
    assert np.array_equal(read_labels_of(tmp_path / "labels.nii", volume), volume.data[0])


@pytest.mark.parametrize(
    "spacing, shape",
    [
        ((0.9, 0.8, 2.5), (66, 74, 26)),
        ((0.8, 0.9, 1.5), (76, 66, 40)),
        ((0.75, 0.75, 3.0), (80, 80, 22)),
        ((1.2, 0.8, 2.5), (50, 76, 26)),
    ],
    ids=str,
)
def test_resampling_to_the_recipe_and_back_costs_an_oracle_no_more_than_a_few_hundredths(
    spacing: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    """From other grids. Two wrong ways back, one of them SwinUNETR's nearest voxel, cost more."""
    truth = organs(shape, spacing)
    one_hot = np.stack([truth == k for k in CLASSES]).astype(np.float32)
    coarse = torch.from_numpy(resample(Volume(one_hot, np.diag([*spacing, 1.0])), (1.5, 1.5, 2.0)))
    right = mean_dice(label_map(in_slabs(coarse, 5), coarse.shape[1:], shape), truth)
    assert right >= 0.975

    by_corners = F.interpolate(coarse[None], shape, mode="trilinear", align_corners=True)[0]
    assert mean_dice(by_corners.argmax(0).numpy(), truth) < right - 0.01

    coarse_labels = coarse.argmax(0)[None, None].float()
    nearest = F.interpolate(coarse_labels, shape, mode="nearest-exact")[0, 0]
    assert mean_dice(nearest.numpy(), truth) < right - 0.02


# mm and s; of which axis which gradient was.
KEPT = {"xyzt_units": 10, "dim_info": 57, "descrip": b"a scan"}


def scan(path: Path, *, cls: type = nib.Nifti1Image, shape: Sequence[int] = (7, 5, 6)) -> Path:
    """A scaled 16-bit image in LPS-like order whose two affines differ, with a display range, an
    intent and an extension.
    """
    sform = np.array([[0, -0.8, 0.1, 30], [0.1, 0.1, 2.5, -20], [-0.9, 0, 0.2, 55], [0, 0, 0, 1.0]])
    image = cls(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), sform)
    image.set_sform(sform, 4)
    image.set_qform(np.diag([-0.9, -0.8, 2.5, 1]), 1)
    header = image.header
    for name, value in KEPT.items():
        header[name] = value
    header.set_intent("z score", name="z")
    header["cal_max"] = 400
    header["cal_min"] = -100
    header.set_slope_inter(2, -1024)
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the image"))
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    "ending, cls, shape, dtype",
    [
        (".nii", nib.Nifti1Image, (7, 5, 6), "uint16"),
        (".nii.gz", nib.Nifti1Image, (7, 5, 6, 2), "uint8"),
        (".nii.gz", nib.Nifti2Image, (7, 5, 6, 1), "uint16"),
        (".nii", nib.Nifti2Image, (7, 5, 6), "uint8"),
    ],
)
def test_the_file_has_the_images_own_grid_and_header(
    ending: str, cls: type, shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    source = scan(tmp_path / f"scan{ending}", cls=cls, shape=shape)
    grid = read_image(source).data.shape[1:]
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, grid, dtype=dtype)
    save_like(source, labels, tmp_path / f"labels{ending}")

    image = nib.load(source)
    found = nib.load(tmp_path / f"labels{ending}")
    assert type(found) is cls
    assert found.shape == image.shape[:3]
    assert found.get_data_dtype() == dtype
    assert np.array_equal(found.affine, image.affine)
    assert nib.aff2axcodes(found.affine) == ("I", "L", "A")

    for form in ("get_sform", "get_qform"):
        affine, code = getattr(image.header, form)(coded=True)
        found_affine, found_code = getattr(found.header, form)(coded=True)
        assert np.array_equal(found_affine, affine)
        assert found_code == code
    assert found.header.get_zooms() == image.header.get_zooms()[:3]
    assert found.header.get_xyzt_units() == ("mm", "sec")
    assert all(found.header[name] == image.header[name] for name in KEPT)

    assert found.header.get_intent()[0] == "none"
    assert not len(found.header.extensions)
    assert found.header["cal_max"] == found.header["cal_min"] == 0
    assert (found.dataobj.slope, found.dataobj.inter) == (1, 0)

    assert np.array_equal(nib.as_closest_canonical(found).dataobj, labels)
    by_hand = labels[::-1, :, ::-1].transpose(2, 0, 1)  # to I, L, A
    assert np.array_equal(np.asarray(found.dataobj), by_hand)


def test_labels_that_were_written_are_read_on_the_grid_of_their_image(tmp_path: Path) -> None:
    source = scan(tmp_path / "scan.nii.gz")
    volume = read_image(source)
    labels = np.random.default_rng(0).integers(0, 9, volume.data.shape[1:], dtype=np.uint8)
    save_like(source, labels, tmp_path / "labels.nii.gz")
    assert np.array_equal(read_labels_of(tmp_path / "labels.nii.gz", volume), labels)


def test_labels_of_another_grid_are_refused(tmp_path: Path) -> None:
    source = scan(tmp_path / "scan.nii")
    in_stored_order = np.zeros((7, 5, 6), np.uint8)
    with pytest.raises(InputError, match=r"scan\.nii"):
        save_like(source, in_stored_order, tmp_path / "labels.nii")
    assert list(tmp_path.iterdir()) == [source]


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scan(tmp_path / "scan.nii")
    target = tmp_path / "labels.nii.gz"
    labels = np.ones(read_image(source).data.shape[1:], np.uint8)
    save_like(source, labels, target)
    before = target.read_bytes()

    def break_off(image: Any, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(native_grid.nib, "save", break_off)
        save_like(source, 2 * labels, target)
    assert target.read_bytes() == before
    assert set(tmp_path.iterdir()) == {source, target}

    save_like(source, 2 * labels, target)
    assert (np.asarray(nib.load(target).dataobj) == 2).all()
    assert set(tmp_path.iterdir()) == {source, target}
