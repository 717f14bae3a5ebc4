"""dae/data/nifti.py: however a volume is stored it comes back the same, and a bad file is refused by its name."""

import struct
from collections.abc import Callable
from itertools import permutations, product
from math import inf, nan
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dae.config import InputError
from dae.data.nifti import read, read_channels, read_labels, read_labels_of, write

SIZE = (4, 5, 6)
SPACING = (1.5, 2.0, 3.0)
RAS = np.diag([*SPACING, 1.0])
LPS = np.diag([-1.5, -2.0, 3.0, 1.0])
LABELS = np.arange(120, dtype=np.uint8).reshape(SIZE)
READERS = pytest.mark.parametrize("read", [read, read_labels])
Reader = Callable[[Path], object]
NOISE = np.random.default_rng(0).normal(size=(12, 13, 14)).astype(np.float32)  # does not compress


def saved(path: Path, data: np.ndarray, affine: np.ndarray = RAS) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def refusal(call: Callable[[], object], path: Path) -> str:
    """The one line that names the file."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line


def patched(path: Path, offset: int, form: str, *values: float) -> Path:
    """The file with some bytes of its NIfTI-1 header replaced."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


# --- what comes back


@pytest.mark.parametrize("flips", list(product((1, -1), repeat=3)), ids=str)
@pytest.mark.parametrize("axes", list(permutations(range(3))), ids=str)
def test_every_axis_order_and_flip_comes_back_as_the_same_ras_volume(
    axes: tuple[int, ...], flips: tuple[int, ...], tmp_path: Path
) -> None:
    x = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE)
    origin = np.array([-10.0, 20.0, 30.0])
    stored, affine = x.transpose(axes), np.eye(4)
    affine[:3, 3] = origin
    for stored_axis, (axis, flip) in enumerate(zip(axes, flips)):
        affine[:3, stored_axis] = flip * SPACING[axis] * np.eye(3)[axis]
        if flip < 0:  # the first voxel is now the one that was last
            stored = np.flip(stored, stored_axis)
            affine[axis, 3] += SPACING[axis] * (SIZE[axis] - 1)
    volume = read(saved(tmp_path / "a.nii", stored, affine))
    assert np.array_equal(volume.data[0], x)
    assert volume.spacing == SPACING
    assert np.allclose(volume.affine[:3, 3], origin) and np.allclose(volume.affine[:3, :3], RAS[:3, :3])


@pytest.mark.parametrize("kind", ["int16", "uint8", "int32", "float32", "float64"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_stored_types_all_come_back_in_float32(kind: str, name: str, tmp_path: Path) -> None:
    x = np.arange(120).reshape(SIZE).astype(kind)
    volume = read(saved(tmp_path / name, x))
    assert volume.data.dtype == np.float32 and volume.data.shape == (1, *SIZE)
    assert np.array_equal(volume.data[0], x)


def test_slope_and_intercept_of_the_header_are_applied(tmp_path: Path) -> None:
    x = np.arange(120, dtype=np.int16).reshape(SIZE)
    path = patched(saved(tmp_path / "a.nii", x), 112, "<2f", 0.5, -1024)  # scl_slope, scl_inter
    assert np.array_equal(read(path).data[0], 0.5 * x - 1024)


def test_the_fourth_axis_of_a_file_holds_channels(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(*SIZE, 3)).astype(np.float32)
    volume = read(saved(tmp_path / "a.nii.gz", x, LPS))
    assert volume.data.shape == (3, *SIZE)
    for channel in range(3):
        assert np.array_equal(volume.data[channel], x[::-1, ::-1, :, channel])


def test_spacing_of_an_oblique_volume_is_the_length_of_its_steps(tmp_path: Path) -> None:
    a, b = np.radians(20), np.radians(-10)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (about_z @ about_x @ np.diag(SPACING))[:, [2, 0, 1]]  # stored as superior, right, anterior
    volume = read(saved(tmp_path / "a.nii", np.arange(120.0).reshape(SIZE), affine))
    assert volume.spacing == pytest.approx(SPACING, abs=1e-5)
    assert volume.data.shape == (1, 5, 6, 4)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    x = np.arange(120, dtype=np.int16).reshape(SIZE)
    write(tmp_path / "a.nii.gz", x, RAS)
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.int16
    volume = read(tmp_path / "a.nii.gz")
    assert np.array_equal(volume.data[0], x) and np.array_equal(volume.affine, RAS)


# --- what is refused


@READERS
def test_a_missing_file_is_refused_in_one_line(read: Reader, tmp_path: Path) -> None:
    assert "no such file" in refusal(lambda: read(tmp_path / "a.nii.gz"), tmp_path / "a.nii.gz")


@READERS
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.txt"])
def test_a_text_file_is_refused_in_one_line(read: Reader, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("This is not a volume.\n" * 100)
    refusal(lambda: read(tmp_path / name), tmp_path / name)


@READERS
@pytest.mark.parametrize("affine", [RAS, LPS], ids=["ras", "lps"])
@pytest.mark.parametrize("name, keep", [("a.nii.gz", k) for k in (0, 1, 15, 200, 0.5, -100)] + [("a.nii", -1)])
def test_a_truncated_file_is_refused_in_one_line(
    read: Reader, name: str, keep: float, affine: np.ndarray, tmp_path: Path
) -> None:
    path = saved(tmp_path / name, NOISE, affine)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    refusal(lambda: read(path), path)


@READERS
@pytest.mark.parametrize("offset, form, value", [(70, "<h", 4096), (108, "<f", 207)], ids=["type", "start of voxels"])
def test_a_damaged_header_is_refused_in_one_line(
    read: Reader, offset: int, form: str, value: int, tmp_path: Path
) -> None:
    path = patched(saved(tmp_path / "a.nii", NOISE), offset, form, value)
    refusal(lambda: read(path), path)


@READERS
@pytest.mark.parametrize("name", ["a.mgz", "a.gii"])
def test_another_format_is_refused_in_one_line(read: Reader, name: str, tmp_path: Path) -> None:
    mesh = nib.gifti.GiftiImage()
    nib.save(mesh if name == "a.gii" else nib.freesurfer.MGHImage(NOISE, RAS), tmp_path / name)
    refusal(lambda: read(tmp_path / name), tmp_path / name)


def test_nan_and_infinity_are_counted_and_refused(tmp_path: Path) -> None:
    x = NOISE.copy()
    x[0, 0, :2], x[1, 1, 1] = np.nan, np.inf
    path = saved(tmp_path / "a.nii.gz", x)
    assert "3 voxels" in refusal(lambda: read(path), path)


@pytest.mark.parametrize("of", ["volume", "channel"])
def test_a_constant_is_refused_and_its_value_said(of: str, tmp_path: Path) -> None:
    x = np.full((*SIZE, 2), 7, dtype=np.int16)
    x[..., 0] = np.arange(6)  # so only the second channel has nothing in it
    path = saved(tmp_path / "a.nii", x if of == "channel" else x[..., 1])
    assert "every voxel is 7" in refusal(lambda: read(path), path)


@pytest.mark.parametrize("shape", [(20, 22), (20, 22, 1), (1, 20, 22), (20, 22, 1, 3), (4, 5, 6, 1, 3)], ids=str)
def test_what_has_not_three_axes_is_refused_with_its_size(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    assert " x ".join(map(str, shape)) in refusal(lambda: read(path), path)


@READERS
def test_colours_are_refused(read: Reader, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", np.zeros(SIZE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert "only integers and floats" in refusal(lambda: read(path), path)


@READERS
@pytest.mark.parametrize("row", [(1.5, 0, 0, 0), (0, 0, 0, 0), (0, nan, 0, 0)], ids=["as srow_x", "zeros", "nan"])
def test_a_singular_affine_is_refused(read: Reader, row: tuple[float, ...], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", LABELS)
    refusal(lambda: read(patched(path, 296, "<4f", *row)), path)  # srow_y


# --- channels in files of their own


def test_files_of_one_grid_become_channels_in_their_order(tmp_path: Path) -> None:
    nearly = RAS + 1e-3 * np.eye(4)  # as registration tools round
    paths = [saved(tmp_path / "a.nii", NOISE), saved(tmp_path / "b.nii", 2 * NOISE, nearly)]
    assert np.array_equal(read_channels(paths).data, np.stack([NOISE, 2 * NOISE]))


@pytest.mark.parametrize("other", ["shape", "shift", "spacing"])
def test_channels_on_different_grids_are_refused(other: str, tmp_path: Path) -> None:
    affine = RAS.copy()
    affine[0, 3] += 5 * (other == "shift")
    affine[2, 2] += 0.5 * (other == "spacing")
    b = saved(tmp_path / "b.nii", NOISE[:-1] if other == "shape" else NOISE, affine)
    paths = [saved(tmp_path / "a.nii", NOISE), b]
    assert "not on the grid" in refusal(lambda: read_channels(paths), b)


# --- labels


@pytest.mark.parametrize("axes", list(permutations(range(3))), ids=str)
def test_labels_come_back_in_ras_order_with_their_own_spacing(axes: tuple[int, ...], tmp_path: Path) -> None:
    for signs in product((1, -1), repeat=3):
        turned = nib.Nifti1Image(LABELS, RAS).as_reoriented([[axis, sign] for axis, sign in zip(axes, signs)])
        nib.save(turned, tmp_path / "a.nii")
        found = read_labels(tmp_path / "a.nii")
        assert np.array_equal(found.labels, LABELS)
        assert found.spacing == SPACING and np.allclose(found.affine, RAS)


@pytest.mark.parametrize("kind", ["uint8", "int16", ">i2", "int32", "int64", "float32", "float64"])
def test_whole_numbers_are_labels_however_they_are_stored(kind: str, tmp_path: Path) -> None:
    image = nib.Nifti1Image(LABELS.astype(kind), RAS, dtype=np.dtype(kind))
    nib.save(image, tmp_path / "a.nii.gz")
    found = read_labels(tmp_path / "a.nii.gz")
    assert np.array_equal(found.labels, LABELS) and found.labels.dtype == np.uint8


def test_an_empty_map_is_a_label_map(tmp_path: Path) -> None:
    assert not read_labels(saved(tmp_path / "a.nii.gz", np.zeros(SIZE, np.uint8))).labels.any()


def test_large_and_negative_labels_survive_to_the_last_digit(tmp_path: Path) -> None:
    """float32, in which images are read, has 16,777,216 and 16,777,218."""
    labels = np.array([-1, 0, 40_000, 16_777_217], np.int32).reshape(1, 1, 4)
    assert read_labels(saved(tmp_path / "a.nii", labels)).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("content, reason", [
    (np.full(SIZE, 0.5, np.float32), "holds 0.5, but labels are whole numbers"),
    (np.full(SIZE, nan, np.float32), "holds nan, but labels are whole numbers"),
    (np.full(SIZE, -inf, np.float32), "holds -inf, but labels are whole numbers"),
    (np.full(SIZE, 1e30, np.float32), "holds 1e+30, but labels are whole numbers"),
    (np.ones((3, 3, 3, 2), np.uint8), "labels of size 3 x 3 x 3 x 2; a label map has three axes"),
    (np.ones((3, 3), np.uint8), "labels of size 3 x 3; a label map has three axes"),
    (np.ones(SIZE, np.complex64), "voxels of type complex64"),
])  # fmt: skip
def test_what_is_not_a_label_map_is_refused_by_name(content: np.ndarray, reason: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", content)
    assert reason in refusal(lambda: read_labels(path), path)


def test_labels_of_an_image_lie_on_its_grid_and_in_0_to_255(tmp_path: Path) -> None:
    image, path = read(saved(tmp_path / "image.nii", NOISE)), tmp_path / "a.nii"
    whole = np.full(NOISE.shape, 255, np.int16)
    for off in (0, 0.005):
        assert read_labels_of(saved(path, whole, RAS + off * np.eye(4)), image).dtype == np.uint8
    for labels, affine in ((whole[1:], RAS), (whole, RAS + 0.02 * np.eye(4))):
        assert "not on the grid" in refusal(lambda: read_labels_of(saved(path, labels, affine), image), path)  # noqa: B023
    for strange in (-1, 256):
        whole[0] = strange
        assert f"{strange}" in refusal(lambda: read_labels_of(saved(path, whole), image), path)
