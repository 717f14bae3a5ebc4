"""dae/data/nifti.py: a volume is read alike however it is stored; bad files are refused by name."""

import gzip
import struct
from collections.abc import Callable, Iterator
from itertools import permutations, product
from math import cos, inf, nan, radians, sin, sqrt
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import refusal

from dae.data import nifti
from dae.data.nifti import (
    Grid,
    difference_in_words,
    read_channels,
    read_grid,
    read_image,
    read_labels,
    read_labels_of,
)

SIZE = (4, 5, 6)
SPACING = (1.5, 2.0, 3.0)
RAS = np.diag([*SPACING, 1.0])
LPS = np.diag([-1.5, -2.0, 3.0, 1.0])
LABELS = np.arange(120, dtype=np.uint8).reshape(SIZE)
NOISE = np.random.default_rng(0).normal(size=(12, 13, 14)).astype(np.float32)  # does not compress
ORDERS = list(product(permutations(range(3)), product((1, -1), repeat=3)))


def saved(path: Path, data: np.ndarray, affine: np.ndarray | None = RAS) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def refused(reader: Callable[..., object], path: Path, *more: object) -> str:
    """The line of a reader that refuses the file: it begins with the file's path."""
    line = refusal(reader, path, *more)
    assert line.startswith(f"{path}: ")
    return line


def refusals(path: Path) -> list[str]:
    """Of an image and of labels."""
    return [refused(read_image, path), refused(read_labels, path)]


def patched(path: Path, offset: int, form: str, *values: float) -> Path:
    """The file with some bytes of its NIfTI-1 header replaced."""
    packed = path.name.endswith(".gz")
    content = path.read_bytes()
    header = bytearray(gzip.decompress(content) if packed else content)
    struct.pack_into(form, header, offset, *values)
    path.write_bytes(gzip.compress(bytes(header)) if packed else header)
    return path


def turned(degrees: float, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """A grid rotated about the axis from foot to head."""
    affine = np.eye(4)
    a = radians(degrees)
    affine[:3, :3] = np.array([[cos(a), -sin(a), 0], [sin(a), cos(a), 0], [0, 0, 1]]) * spacing
    return affine


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each warning is said once in a process; here, once in a test."""
    monkeypatch.setattr(nifti, "said", set())
    yield


# --- what comes back


def test_every_axis_order_and_flip_comes_back_as_the_same_ras_volume(tmp_path: Path) -> None:
    x = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE)
    for axes, flips in ORDERS:
        origin = np.array([-10.0, 20.0, 30.0])
        stored = x.transpose(axes)
        affine = np.eye(4)
        affine[:3, 3] = origin
        for stored_axis, (axis, flip) in enumerate(zip(axes, flips)):
            affine[:3, stored_axis] = flip * SPACING[axis] * np.eye(3)[axis]
            if flip < 0:  # the first voxel is now the one that was last
                stored = np.flip(stored, stored_axis)
                affine[axis, 3] += SPACING[axis] * (SIZE[axis] - 1)
        volume = read_image(saved(tmp_path / "a.nii", stored, affine))
        assert np.array_equal(volume.data[0], x)
        assert volume.spacing == SPACING
        assert np.allclose(volume.affine[:3, 3], origin)
        assert np.allclose(volume.affine[:3, :3], RAS[:3, :3])


def test_stored_types_all_come_back_in_float32(tmp_path: Path) -> None:
    for kind, name in product(
        ("int16", "uint8", "int32", "float32", "float64"), ("a.nii", "a.nii.gz")
    ):
        x = np.arange(120).reshape(SIZE).astype(kind)
        volume = read_image(saved(tmp_path / name, x))
        assert volume.data.dtype == np.float32 and volume.data.shape == (1, *SIZE)
        assert np.array_equal(volume.data[0], x)


def test_slope_and_intercept_of_the_header_are_applied(tmp_path: Path) -> None:
    x = np.arange(120, dtype=np.int16).reshape(SIZE)
    path = patched(saved(tmp_path / "a.nii", x), 112, "<2f", 0.5, -1024)  # scl_slope, scl_inter
    assert np.array_equal(read_image(path).data[0], 0.5 * x - 1024)


def test_the_fourth_axis_of_a_file_holds_channels(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(*SIZE, 3)).astype(np.float32)
    volume = read_image(saved(tmp_path / "a.nii.gz", x, LPS))
    assert volume.data.shape == (3, *SIZE)
    for channel in range(3):
        assert np.array_equal(volume.data[channel], x[::-1, ::-1, :, channel])


def test_spacing_of_an_oblique_volume_is_the_length_of_its_steps(tmp_path: Path) -> None:
    a = np.radians(20)
    b = np.radians(-10)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    rotated = about_z @ about_x @ np.diag(SPACING)
    affine[:3, :3] = rotated[:, [2, 0, 1]]  # stored as superior, right, anterior
    volume = read_image(saved(tmp_path / "a.nii", np.arange(120.0).reshape(SIZE), affine))
    assert volume.spacing == pytest.approx(SPACING, abs=1e-5)
    assert volume.data.shape == (1, 5, 6, 4)


# --- what is refused


def test_what_is_no_nifti_file_is_refused_in_one_line(tmp_path: Path) -> None:
    """A missing file, a text, other formats, colours."""
    assert all("no such file" in line for line in refusals(tmp_path / "missing.nii.gz"))
    for name in ("a.nii", "a.nii.gz", "a.txt"):
        (tmp_path / name).write_text("This is not a volume.\n" * 100)
        refusals(tmp_path / name)
    nib.save(nib.freesurfer.MGHImage(NOISE, RAS), tmp_path / "a.mgz")
    nib.save(nib.gifti.GiftiImage(), tmp_path / "a.gii")
    colours = np.zeros(SIZE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    saved(tmp_path / "colours.nii", colours)
    for name, reason in (
        ("a.mgz", "only NIfTI volumes"),
        ("a.gii", "only NIfTI volumes"),
        ("colours.nii", "only integers and floats"),
    ):
        assert all(reason in line for line in refusals(tmp_path / name))


def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = {
        name: saved(tmp_path / name, NOISE, LPS).read_bytes() for name in ("a.nii", "a.nii.gz")
    }
    size = len(whole["a.nii.gz"])
    for keep in (0, 1, 15, 200, size // 2, size - 100, size - 8, size - 1):
        (tmp_path / "a.nii.gz").write_bytes(whole["a.nii.gz"][:keep])
        refusals(tmp_path / "a.nii.gz")
    for keep in (200, 352, len(whole["a.nii"]) - 1):
        (tmp_path / "a.nii").write_bytes(whole["a.nii"][:keep])
        refusals(tmp_path / "a.nii")


def test_a_damaged_header_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its data type, the place of its voxels."""
    for offset, form, value in ((70, "<h", 4096), (108, "<f", 207)):
        refusals(patched(saved(tmp_path / "a.nii", NOISE), offset, form, value))
    assert capfd.readouterr().err == ""  # nibabel says nothing beside it


def test_one_wrong_bit_of_a_gzip_stream_is_never_read_as_voxels(tmp_path: Path) -> None:
    """Its checksum comes after the last voxel, where no reader of voxels looks. Judged by gzip."""
    path = tmp_path / "a.nii.gz"
    rng = np.random.default_rng(0)
    smooth = (100 * np.cumsum(NOISE, axis=0)).astype(np.int16)
    whole = saved(path, smooth).read_bytes()
    unpacked = gzip.decompress(whole)
    for position in [*rng.integers(10, len(whole), 150), *range(len(whole) - 8, len(whole))]:
        content = bytearray(whole)
        content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            sound = gzip.decompress(bytes(content)) == unpacked
        except Exception:
            sound = False
        if sound:  # the name of the file in the stream's own header
            assert np.array_equal(read_image(path).data[0], smooth)
        else:
            refused(read_image, path)


def test_what_follows_a_gzip_stream_is_judged_as_by_gzip_t(tmp_path: Path) -> None:
    """A second stream and zeros (tapes pad with them) belong to the format, other bytes do not."""
    path = tmp_path / "a.nii.gz"
    content = saved(tmp_path / "a.nii", LABELS).read_bytes()
    for good in (
        gzip.compress(content[:500]) + gzip.compress(content[500:]),
        gzip.compress(content) + bytes(512),
        gzip.compress(content + b"more"),
    ):
        path.write_bytes(good)
        assert np.array_equal(read_image(path).data[0], LABELS)
        assert np.array_equal(read_labels(path).labels, LABELS)
    for garbage in (b"x", b"<html>" * 9, gzip.compress(b"more")[:-3]):
        path.write_bytes(gzip.compress(content) + garbage)
        refusals(path)


def test_a_header_that_claims_more_than_the_file_or_the_memory_can_hold_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = patched(saved(tmp_path / name, LABELS), 42, "<3h", 32000, 32000, 32000)
        assert all("32000 x 32000 x 32000 voxels (29.8 TiB)" in line for line in refusals(path))

    content = saved(tmp_path / "empty.nii", np.zeros((200, 200, 200), np.uint8)).read_bytes()
    empty = tmp_path / "empty.nii.gz"
    empty.write_bytes(gzip.compress(content, 9))
    assert empty.stat().st_size * 900 < 200**3  # as tight as gzip packs: no lie
    assert not read_labels(empty).labels.any()
    monkeypatch.setattr(nifti, "memory", lambda: 2**20)
    assert "30.5 MiB, this machine has 1 MiB" in refused(read_labels, empty)


def test_nan_and_infinity_are_counted_and_refused(tmp_path: Path) -> None:
    x = NOISE.copy()
    x[0, 0, :2] = np.nan
    x[1, 1, 1] = np.inf
    path = saved(tmp_path / "a.nii.gz", x)
    assert "3 voxels" in refused(read_image, path)


@pytest.mark.parametrize("of", ["volume", "channel"])
def test_a_constant_is_refused_and_its_value_said(of: str, tmp_path: Path) -> None:
    x = np.full((*SIZE, 2), 7, dtype=np.int16)
    x[..., 0] = np.arange(6)  # so only the second channel has nothing in it
    path = saved(tmp_path / "a.nii", x if of == "channel" else x[..., 1])
    assert "every voxel is 7" in refused(read_image, path)


@pytest.mark.parametrize(
    "shape", [(20, 22), (20, 22, 1), (1, 20, 22), (20, 22, 1, 3), (4, 5, 6, 1, 3)], ids=str
)
def test_what_has_not_three_axes_is_refused_with_its_size(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.nii", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    assert " x ".join(map(str, shape)) in refused(read_image, path)


@pytest.mark.parametrize(
    "row", [(1.5, 0, 0, 0), (0, 0, 0, 0), (0, nan, 0, 0)], ids=["as srow_x", "zeros", "nan"]
)
def test_a_singular_affine_is_refused(row: tuple[float, ...], tmp_path: Path) -> None:
    refusals(patched(saved(tmp_path / "a.nii", LABELS), 296, "<4f", *row))  # srow_y


def test_a_flat_image_has_no_grid(tmp_path: Path) -> None:
    """The cache asks for the grid first, and takes this error for one that reading explains."""
    path = saved(tmp_path / "a.nii", np.ones((20, 22), dtype=np.float32))
    assert "an image of size 20 x 22" in refused(read_grid, path)


# --- lengths, and what a header leaves open


@pytest.mark.parametrize(
    "unit, mm", [("unknown", 1), ("mm", 1), ("meter", 1000), ("micron", 0.001)]
)
def test_lengths_are_in_mm_whatever_the_unit_of_the_header(
    unit: str, mm: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    affine = turned(20, tuple(size / mm for size in SPACING))
    affine[:3, 3] = np.array([10, -20, 30]) / mm
    image = nib.Nifti1Image(LABELS, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    expected = turned(20, SPACING)
    expected[:3, 3] = 10, -20, 30
    for reader in (read_image, read_labels, read_grid):
        result = reader(tmp_path / "a.nii")
        assert np.allclose(result.affine, expected, rtol=1e-6, atol=1e-5)
        assert result.spacing == pytest.approx(SPACING, rel=1e-6)

    said = capsys.readouterr().err
    if mm == 1:
        assert not said
    else:
        assert said.count("\n") == 1 and f"in {unit}s; read as voxels of 1.5 x 2 x 3 mm" in said


def test_a_unit_that_is_none_and_voxels_no_scanner_has_are_refused(tmp_path: Path) -> None:
    path = patched(saved(tmp_path / "a.nii", LABELS), 123, "<B", 5)
    assert all("unit 5, which does not exist" in line for line in refusals(path))

    # Micrometres without a unit, and millimetres called metres.
    for unit, size, words in (
        ("unknown", 500, "500 x 500 x 500"),
        ("meter", 1, "1000 x 1000 x 1000"),
    ):
        image = nib.Nifti1Image(LABELS, np.diag([size, size, size, 1.0]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "b.nii")
        expected = f"a voxel of {words} mm (unit in the header: {unit})"
        assert all(expected in line for line in refusals(tmp_path / "b.nii"))

    # Half a micrometre is a size.
    tiny = saved(tmp_path / "c.nii", LABELS, np.diag([5e-4, 5e-4, 5e-4, 1]))
    assert read_image(tiny).spacing == pytest.approx((5e-4,) * 3)


def test_a_sheared_grid_is_said_once_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gantry tilted by 20 degrees.

    Along one diagonal 1 mm is sqrt(1 + sin 20), along the other sqrt(1 - sin 20).
    """
    a = radians(20)
    tilted = np.array([[1, 0, 0, 0], [0, 1, 3 * sin(a), 0], [0, 0, 3 * cos(a), 0], [0, 0, 0, 1]])
    expected = max(1 - 1 / sqrt(1 + sin(a)), 1 / sqrt(1 - sin(a)) - 1)
    for rotation in (np.eye(4), turned(33)):
        grid = Grid((9, 9, 9), rotation @ tilted)
        assert grid.shear == pytest.approx(expected)
        assert grid.spacing == pytest.approx((1, 1, 3))
        assert Grid((9, 9, 9), rotation @ RAS).shear == pytest.approx(0, abs=1e-12)
    for name in ("a.nii", "b.nii"):
        read_image(saved(tmp_path / name, LABELS, tilted))

    said = capsys.readouterr().err
    assert said.count("not perpendicular") == said.count("\n") == 1
    assert "a.nii" in said and "23% off" in said


def test_voxel_sizes_that_differ_between_affine_and_pixdim_are_said_and_the_affine_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = patched(saved(tmp_path / "a.nii", LABELS), 80, "<3f", 0.7, 0.7, 3.0)
    assert read_image(path).spacing == SPACING
    expected = "1.5 x 2 x 3 mm by its affine, which counts, but 0.7 x 0.7 x 3 mm by its pixdim"
    assert expected in capsys.readouterr().err


def test_a_file_without_an_affine_is_read_by_convention_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "a.nii", LABELS, None)
    convention = LABELS[::-1]  # the first axis runs to the left
    assert np.array_equal(read_image(path).data[0], convention)
    assert np.array_equal(read_labels_of(path, read_image(path)), convention)
    warning = "neither qform nor sform; left and right are by convention only"
    assert capsys.readouterr().err.count(warning) == 1


def test_labels_without_an_affine_do_not_lie_on_an_image_that_has_one(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "image.nii", LABELS))
    path = saved(tmp_path / "a.nii", LABELS, None)
    line = refused(read_labels_of, path, image)
    assert "not on the grid of its image" in line and "was it saved without an affine?" in line


def test_sound_files_are_read_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, affine in enumerate((RAS, LPS, turned(12, SPACING), turned(45))):
        path = saved(tmp_path / f"{number}.nii.gz", LABELS, affine)
        read_labels_of(path, read_image(path))
    assert capsys.readouterr().err == ""


# --- two grids


def shifted(affine: np.ndarray, *mm: float) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += mm
    return moved


COARSE = np.round(turned(18.35), 4) * [0.9, 0.9, 1.5, 1]  # direction cosines of four digits


@pytest.mark.parametrize(
    "shape, a, b, one",
    [
        ((512, 40, 40), np.diag([0.7, 0.7, 0.7, 1]), np.diag([0.709, 0.709, 0.709, 1]), False),
        ((40, 40, 40), np.diag([0.005, 0.005, 0.005, 1]), np.diag([0.01, 0.01, 0.01, 1]), False),
        ((400, 60, 40), turned(0), turned(0.5), False),
        ((256, 256, 60), turned(18.35, (0.9, 0.9, 1.5)), COARSE, True),
        ((9, 9, 9), RAS, shifted(RAS, 0, 0, 0.29), True),  # of 3 mm
        ((9, 9, 9), RAS, shifted(RAS, 0, 0, 0.31), False),
        ((9, 9, 9), RAS, shifted(RAS, 0.16, 0, 0), False),  # of 1.5 mm
        ((1, 1, 1), RAS, np.diag([1.8, 2.0, 3.0, 1.0]), True),
        ((1, 1, 1), RAS, np.diag([1.9, 2.0, 3.0, 1.0]), False),
    ],
)
def test_grids_are_one_where_all_corners_lie_within_a_tenth_of_a_voxel(
    shape: tuple[int, ...], a: np.ndarray, b: np.ndarray, one: bool
) -> None:
    """And what is said is the largest distance, by a loop over the eight corners."""
    words = difference_in_words(Grid(shape, a), Grid(shape, b))
    assert (words == "") == one

    voxels = mm = 0.0
    for corner in product(*((-0.5, n - 0.5) for n in shape)):
        in_a = a @ [*corner, 1]
        in_b = b @ [*corner, 1]
        mm = max(mm, float(np.linalg.norm(in_a - in_b)))
        voxels = max(voxels, float(np.linalg.norm(np.linalg.solve(b, in_a)[:3] - corner)))
    assert (voxels <= 0.1) == one
    assert one or f"up to {mm:.3g} mm ({voxels:.3g} voxels) apart" in words


def test_grids_of_different_sizes_are_named_by_both() -> None:
    words = difference_in_words(Grid((4, 5, 6), RAS), Grid((4, 5, 7), RAS))
    assert words == "4 x 5 x 6 and 4 x 5 x 7 voxels"


@pytest.mark.parametrize("degrees", [45, -45, 135])
def test_two_headers_of_one_grid_at_45_degrees_are_one_though_their_axes_are_ordered_apart(
    degrees: float, tmp_path: Path
) -> None:
    below = saved(tmp_path / "below.nii", LABELS, turned(degrees - 1e-5))
    above = saved(tmp_path / "above.nii", LABELS, turned(degrees + 1e-5))
    assert read_labels(below).labels.shape != read_labels(above).labels.shape
    for one, other in ((below, above), (above, below)):
        image = read_image(one)
        assert np.array_equal(read_labels_of(other, image), image.data[0])
        assert np.array_equal(*read_channels([one, other]).data)
    assert read_grid(below).shape == read_labels(below).labels.shape


def test_a_file_read_along_another_grid_takes_its_axes_from_every_order(tmp_path: Path) -> None:
    image = nib.Nifti1Image(LABELS, turned(30, SPACING))
    for axes, flips in ORDERS:
        nib.save(image.as_reoriented(list(zip(axes, flips))), tmp_path / "a.nii")
        label_map = read_labels(tmp_path / "a.nii", like=turned(30, SPACING))
        assert np.array_equal(label_map.labels, LABELS)
        assert not difference_in_words(label_map.grid, Grid(SIZE, image.affine))


# --- channels in files of their own


def test_files_of_one_grid_become_channels_in_their_order(tmp_path: Path) -> None:
    nearly = RAS + 5e-3 * np.eye(4)  # as registration tools round
    paths = [saved(tmp_path / "a.nii", NOISE), saved(tmp_path / "b.nii", 2 * NOISE, nearly)]
    assert np.array_equal(read_channels(paths).data, np.stack([NOISE, 2 * NOISE]))


@pytest.mark.parametrize("other", ["shape", "shift", "spacing"])
def test_channels_on_different_grids_are_refused(other: str, tmp_path: Path) -> None:
    affine = RAS.copy()
    if other == "shift":
        affine[0, 3] += 5
    if other == "spacing":
        affine[2, 2] += 0.5
    noise = NOISE[:-1] if other == "shape" else NOISE

    a = saved(tmp_path / "a.nii", NOISE)
    b = saved(tmp_path / "b.nii", noise, affine)
    assert refusal(read_channels, [a, b]).startswith(f"{b}: not on the grid of {a}")


# --- labels


def test_labels_come_back_in_ras_order_with_their_own_spacing(tmp_path: Path) -> None:
    for axes, signs in ORDERS:
        image = nib.Nifti1Image(LABELS, RAS).as_reoriented(list(zip(axes, signs)))
        nib.save(image, tmp_path / "a.nii")
        label_map = read_labels(tmp_path / "a.nii")
        assert np.array_equal(label_map.labels, LABELS)
        assert label_map.spacing == SPACING and np.allclose(label_map.affine, RAS)


def test_whole_numbers_are_labels_however_they_are_stored(tmp_path: Path) -> None:
    for kind in ("uint8", "int16", ">i2", "int32", "int64", "float32", "float64"):
        image = nib.Nifti1Image(LABELS.astype(kind), RAS, dtype=np.dtype(kind))
        nib.save(image, tmp_path / "a.nii.gz")
        labels = read_labels(tmp_path / "a.nii.gz").labels
        assert np.array_equal(labels, LABELS) and labels.dtype == np.uint8


def test_what_a_slope_leaves_within_a_thousandth_of_whole_numbers_is_rounded(
    tmp_path: Path,
) -> None:
    """nibabel's int16 scaling leaves 1.0000153, a resampler 0.9999; and 255 times 1/255."""
    levels = (LABELS % 3).astype(np.float64)
    scaled = nib.Nifti1Image(levels, RAS)
    scaled.header.set_data_dtype(np.int16)
    nib.save(scaled, tmp_path / "a.nii")
    stored = np.asarray(nib.load(tmp_path / "a.nii").dataobj)
    assert (stored != levels).any()
    assert np.array_equal(read_labels(tmp_path / "a.nii").labels, levels)
    for data in (levels * 0.9999, levels + 9e-4, levels - 9e-4):
        assert np.array_equal(read_labels(saved(tmp_path / "b.nii", data)).labels, levels)

    mask = saved(tmp_path / "c.nii", 255 * (LABELS > 9).astype(np.uint8))
    of_255 = patched(mask, 112, "<2f", 1 / 255, 0)
    assert np.array_equal(read_labels(of_255).labels, LABELS > 9)


@pytest.mark.parametrize("tail", [(1,), (1, 1)], ids=str)
def test_further_axes_of_one_are_no_axes(tail: tuple[int, ...], tmp_path: Path) -> None:
    """As ANTs, MRtrix and FSL write them; images of that size are read as well."""
    for name, affine, expected in (("a.nii", RAS, LABELS), ("a.nii.gz", LPS, LABELS[::-1, ::-1])):
        path = saved(tmp_path / name, LABELS.reshape(*SIZE, *tail), affine)
        assert np.array_equal(read_labels(path).labels, expected)
        if len(tail) == 1:
            assert np.array_equal(read_labels_of(path, read_image(path)), expected)


def test_an_empty_map_is_a_label_map(tmp_path: Path) -> None:
    assert not read_labels(saved(tmp_path / "a.nii.gz", np.zeros(SIZE, np.uint8))).labels.any()


def test_large_and_negative_labels_survive_to_the_last_digit(tmp_path: Path) -> None:
    """float32, in which images are read, has 16,777,216 and 16,777,218."""
    labels = np.array([-1, 0, 40_000, 16_777_217], np.int32).reshape(1, 1, 4)
    assert read_labels(saved(tmp_path / "a.nii", labels)).labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "content, reason",
    [
        (np.full(SIZE, 0.5, np.float32), "holds 0.5, but labels are whole numbers"),
        (np.full(SIZE, 2.002, np.float32), "holds 2.002, but labels are whole numbers"),
        (np.full(SIZE, nan, np.float32), "holds nan, but labels are whole numbers"),
        (np.full(SIZE, -inf, np.float32), "holds -inf, but labels are whole numbers"),
        (np.full(SIZE, 1e30, np.float32), "holds 1e+30, but labels are whole numbers"),
        (
            np.ones((3, 3, 3, 2), np.uint8),
            "labels of size 3 x 3 x 3 x 2; a label map has three axes",
        ),
        (np.ones((3, 3), np.uint8), "labels of size 3 x 3; a label map has three axes"),
        (np.ones(SIZE, np.complex64), "voxels of type complex64"),
    ],
)
def test_what_is_not_a_label_map_is_refused_by_name(
    content: np.ndarray, reason: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.nii", content)
    assert reason in refused(read_labels, path)


def test_labels_of_an_image_lie_on_its_grid_and_in_0_to_255(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "image.nii", NOISE))
    path = tmp_path / "a.nii"
    whole = np.full(NOISE.shape, 255, np.int16)
    for rounding in (0, 0.005):
        saved(path, whole, RAS + rounding * np.eye(4))
        assert read_labels_of(path, image).dtype == np.uint8

    for labels, affine, words in (
        (whole[1:], RAS, "11 x 13 x 14 and 12 x 13 x 14 voxels"),
        (whole, shifted(RAS, 0, 1, 0), "up to 1 mm (0.5 voxels) apart"),
    ):
        saved(path, labels, affine)
        line = refused(read_labels_of, path, image)
        assert "not on the grid of its image: " in line and words in line

    for label in (-1, 256):
        whole[0] = label
        assert f"{label}" in refused(read_labels_of, saved(path, whole), image)
