"""NIfTI volumes: one orientation (RAS), lengths in mm, and one line on what is wrong with a file.

Arrays are (c, d, h, w); d h w run to the patient's right, anterior and superior side. Spacing is in
mm, in that order.

What is taken from a header, and what is not:

- The position of a voxel: by the sform where there is one, else by the qform, as the NIfTI standard
  and nibabel say.
- Units: metres and micrometres become mm. No unit means mm.
- Voxels larger than 10 cm are refused: then the unit in the header is wrong.
- No sform and no qform: left and right are a convention of the format. The file is read, with a
  warning.
- Voxel sizes (pixdim) that differ from the sform: the sform counts. The file is read, with a
  warning.
- Sheared grids (a tilted gantry): voxels are read as they are, with a warning that lengths are not
  exact. Scores in mm are refused there (evaluation/cases.py), since a table of distances does not
  carry a warning.
"""

import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.openers import ImageOpener
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from dae.errors import InputError, one_line

Array = NDArray[np.float32]
Affine = NDArray[np.float64]  # (4, 4), voxel of the RAS grid -> mm

SAME_GRID = 0.1  # voxels by which corners of two grids may differ: headers lose less by rounding
WHOLE = 1e-3  # by which a label may differ from a whole number: slopes and float32 cost less
SHEAR = 0.01  # relative error of a length that is worth a warning
LARGEST_VOXEL = 100.0  # mm
SMALLEST_VOXEL = 1e-6  # mm; smaller ones are noise in a damaged header
MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
UNITS = ("unknown", "meter", "mm", "micron", *["unknown"] * 4)  # by the header's code
DEFLATE = 1040  # bytes that one byte of a gzip stream can hold: 1032 by its format
MUCH = 2 << 30  # bytes of memory from which on a file is asked whether it is a bomb
DENSE = 200  # bytes from one byte, in which nothing but a label map of huge empty rooms is packed
AROUND = 64 << 20  # bytes that a file may have before its voxels, and after them
EXACT = 2**53  # from here on float64 does not have every whole number

# What nibabel, NumPy and zlib raise on a damaged file.
DAMAGE = (OSError, EOFError, ValueError, OverflowError, TypeError, KeyError, zlib.error)

said: set[str] = set()  # kinds of warnings that this process has printed


class Grid(NamedTuple):
    """The size of a volume and the position of its voxels."""

    shape: tuple[int, ...]  # (d, h, w)
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm from voxel to voxel along d h w."""
        d, h, w = map(float, voxel_sizes(self.affine))
        return d, h, w

    @property
    def shear(self) -> float:
        """The largest relative error of a distance that takes the axes for perpendicular.

        0.1 is 10 %; 0 where they are perpendicular, however the grid is rotated.
        """
        axes = self.affine[:3, :3] / voxel_sizes(self.affine)

        # The true lengths of what is taken for 1 mm: from the longest to the shortest direction.
        lengths = np.linalg.svd(axes, compute_uv=False)
        return float(max(1 - 1 / lengths[0], 1 / lengths[-1] - 1))


class Volume(NamedTuple):
    """One image and its grid."""

    data: Array  # (c, d, h, w), scl_slope and scl_inter applied
    affine: Affine

    @property
    def grid(self) -> Grid:
        return Grid(self.data.shape[1:], self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.grid.spacing


class LabelMap(NamedTuple):
    """One label file, whole numbers, and its grid."""

    labels: NDArray[np.integer[Any]]  # (d, h, w), in the smallest type that holds them
    affine: Affine

    @property
    def grid(self) -> Grid:
        return Grid(self.labels.shape, self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.grid.spacing


# --- images, labels, grids


def read_image(path: Path, like: Affine | None = None) -> Volume:
    """One .nii or .nii.gz file, 3D or 4D (channels last in the file). Raises InputError on others.

    Its axes are put in RAS order, or in the order of the grid `like` where that is given: at 45
    degrees two headers that differ in the seventh digit have different RAS orders.
    """
    image = open_image(path)
    shape = image.shape
    if len(shape) not in (3, 4) or min(shape) < 1 or min(shape[:3]) < 2:
        raise InputError(
            f"{path}: an image of size {size_in_words(shape)}; "
            "a volume has three axes of two voxels and more"
        )

    stored_affine = checked_affine(path, image)
    values = stored_values(path, image, np.float32)
    values, affine = reordered(values, stored_affine, like)

    # The file has its channels last, or none.
    data = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
    check_values(path, data)
    return Volume(data, affine)


def read_labels(path: Path, like: Affine | None = None) -> LabelMap:
    """A file of whole numbers, stored as integers or floats, 3D or (x, y, z, 1).

    Raises InputError on anything else. `like`: as in `read_image`.
    """
    image = open_image(path)
    shape = image.shape
    if len(shape) < 3 or min(shape) < 1 or prod(shape[3:]) != 1:
        raise InputError(
            f"{path}: labels of size {size_in_words(shape)}; a label map has three axes"
        )

    stored_affine = checked_affine(path, image)
    values = stored_values(path, image)  # not as float32, which does not have 16,777,217
    values, affine = reordered(values.reshape(shape[:3]), stored_affine, like)

    # Slopes of the header, and many tools, leave floats.
    if values.dtype.kind == "f":
        values = whole_numbers(path, values)

    # The smallest type that holds both ends: uint8 for the labels of nearly all data sets.
    low = np.min_scalar_type(int(values.min()))
    high = np.min_scalar_type(int(values.max()))
    return LabelMap(values.astype(np.result_type(low, high)), affine)


def read_labels_of(path: Path, image: Volume) -> NDArray[np.uint8]:
    """Labels 0 to 255 (d, h, w) on the grid of `image`. Raises InputError on anything else."""
    label_map = read_labels(path, like=image.affine)
    labels = label_map.labels
    if labels.dtype != np.uint8:
        raise InputError(
            f"{path}: holds labels from {labels.min()} to {labels.max()}; they must lie in 0 to 255"
        )

    if deviation := difference_in_words(label_map.grid, image.grid):
        raise InputError(
            f"{path}: not on the grid of its image: {deviation}{without_affine_in_words(path)}"
        )
    return labels.astype(np.uint8, copy=False)


def read_channels(paths: Sequence[Path]) -> Volume:
    """Several files of one grid as the channels of one volume. Raises InputError on other grids."""
    # All take the order of axes of the first, which is RAS.
    first = read_image(paths[0])
    volumes = [first]
    for path in paths[1:]:
        volumes.append(read_image(path, like=first.affine))

    for path, volume in zip(paths, volumes):
        if deviation := difference_in_words(volume.grid, first.grid):
            raise InputError(
                f"{path}: not on the grid of {paths[0]}: {deviation}{without_affine_in_words(path)}"
                "; channels must be registered and resampled first"
            )
    return Volume(np.concatenate([volume.data for volume in volumes]), first.affine)


def read_grid(path: Path) -> Grid:
    """The grid of a file, by its header alone. Raises InputError."""
    image = open_image(path)
    if len(image.shape) < 3:
        raise InputError(
            f"{path}: an image of size {size_in_words(image.shape)}; "
            "a volume has three axes of two voxels and more"
        )
    affine = checked_affine(path, image)

    # `order` has a row for each stored axis: the RAS axis that it becomes, and its direction.
    order = io_orientation(affine)
    shape = [0, 0, 0]
    for size, axis in zip(image.shape, order[:, 0].astype(int)):
        shape[axis] = size
    return Grid(tuple(shape), affine @ inv_ornt_aff(order, image.shape[:3]))


def affine_in_mm(image: Any) -> Affine:
    """The affine of a NIfTI image of nibabel, stored voxel -> mm, whatever unit its header has."""
    mm = MM[unit_of(image)]
    return np.diag([mm, mm, mm, 1.0]) @ np.asarray(image.affine, dtype=np.float64)


# --- two grids


def difference_in_words(a: Grid, b: Grid) -> str:
    """How two grids differ, in words; empty where they are one.

    They are one where all corners lie within a tenth of a voxel of each other. Entries of affines
    say little: a voxel size that is .009 mm off moves the far end of 500 voxels by 4 mm, and a
    shift of .02 mm is nothing.
    """
    if a.shape != b.shape:
        return f"{size_in_words(a.shape)} and {size_in_words(b.shape)} voxels"

    # The eight corners of the volume, in voxels: the outer faces of the outer voxels.
    ends = np.array([(-0.5, size - 0.5) for size in a.shape])
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)

    # Where a corner of `a` is among the voxels of `b`.
    a_in_b = np.linalg.inv(b.affine) @ a.affine
    voxels = np.linalg.norm(apply_affine(a_in_b, corners) - corners, axis=1).max()
    if voxels <= SAME_GRID:
        return ""

    corners_of_a = apply_affine(a.affine, corners)
    corners_of_b = apply_affine(b.affine, corners)
    mm = np.linalg.norm(corners_of_a - corners_of_b, axis=1).max()
    return f"their corners lie up to {mm:.3g} mm ({voxels:.3g} voxels) apart"


# --- sizes that no machine holds


def memory() -> int:
    """Bytes of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return sys.maxsize


def bytes_in_words(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count /= 1024
        power += 1
    return f"{count:.3g} {units[power]}"


# --- the header of one file


def open_image(path: Path) -> Any:
    """The file with its header read and found sound; its voxels are not read yet."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        check_offset(path)
        with LoggingOutputSuppressor():  # nibabel logs odd fields; one line says enough
            image = nib.load(path)
    except (*DAMAGE, ImageFileError, HeaderDataError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)})") from error

    if not isinstance(image, nib.Nifti1Image):
        raise InputError(
            f"{path}: a {type(image).__name__}; only NIfTI volumes (.nii, .nii.gz) are read"
        )
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: voxels of type {image.get_data_dtype()}; only integers and floats are read"
        )
    check_claimed_size(path, image)
    return image


def check_offset(path: Path) -> None:
    """Raises InputError where much stands before the voxels: nibabel reads all of it at once."""
    with ImageOpener(path) as stream:
        head = stream.read(176)

    # NIfTI-1 and NIfTI-2, each in two orders of bytes, are told apart by their first number.
    for order in "<>":
        size = struct.unpack(f"{order}i", head[:4])[0] if len(head) == 176 else 0
        offset = 0.0
        if size == 348:
            (offset,) = struct.unpack(f"{order}f", head[108:112])
        if size == 540:
            (offset,) = struct.unpack(f"{order}q", head[168:176])
        if not offset <= AROUND:  # nor nan
            raise InputError(
                f"{path}: damaged: its header says that its voxels begin at byte {offset:g}; "
                "copy it again"
            )


def check_claimed_size(path: Path, image: Any) -> None:
    """A header may claim any size; no memory is asked for that the file cannot fill."""
    claimed = prod(image.shape) * image.get_data_dtype().itemsize
    claim = f"its header claims {size_in_words(image.shape)} voxels ({bytes_in_words(claimed)})"

    # The most bytes of voxels that a file of this length can hold.
    length = path.stat().st_size
    suffix = path.suffix.lower()
    most = claimed
    if suffix == ".nii":
        most = length - int(image.dataobj.offset)
    if suffix == ".gz":
        most = length * DEFLATE
    if claimed > most:
        raise InputError(
            f"{path}: cut short or damaged: {claim}, the file holds {length} bytes; copy it again"
        )

    needed = 4 * prod(image.shape)  # in float32
    if claimed + needed > MUCH and claimed > DENSE * length:
        raise InputError(
            f"{path}: {claim}, {claimed // length} times as much as the file; if that is right, "
            "unpack it to .nii"
        )
    if needed > memory():
        raise InputError(
            f"{path}: {claim}; reading it takes {bytes_in_words(needed)}, "
            f"this machine has {bytes_in_words(memory())}"
        )


def checked_affine(path: Path, image: Any) -> Affine:
    """The file's affine, stored voxel -> mm, with a warning on what its header leaves open.

    Raises InputError where the header does not say the position of voxels.
    """
    code = int(image.header["xyzt_units"]) % 8
    if code > 3:
        raise InputError(
            f"{path}: its header gives lengths in unit {code}, which does not exist; "
            "set xyzt_units to mm"
        )

    affine = affine_in_mm(image)
    if is_singular(affine):
        raise InputError(f"{path}: its affine is singular; set the header's qform or sform")

    sizes = voxel_sizes(affine)
    if sizes.max() > LARGEST_VOXEL or sizes.min() < SMALLEST_VOXEL:
        raise InputError(
            f"{path}: a voxel of {mm_in_words(sizes)} (unit in the header: {unit_of(image)}); "
            "correct its sizes or its unit"
        )

    warn_of_header(path, image, affine)
    return affine


def is_singular(affine: Affine) -> bool:
    """Whether an affine is not finite, or its axes span less than a thousandth of their box."""
    if not np.isfinite(affine).all():
        return True
    volume = abs(np.linalg.det(affine[:3, :3]))
    return bool(volume <= 1e-3 * voxel_sizes(affine).prod())


def warn_of_header(path: Path, image: Any, affine: Affine) -> None:
    """Print what the header leaves open; each kind of warning once in a process."""
    unit = unit_of(image)
    sizes = voxel_sizes(affine)
    if MM[unit] != 1:
        say_once(
            unit,
            f"{path}: lengths in its header are in {unit}s; read as voxels of {mm_in_words(sizes)}",
        )

    if is_without_affine(image.header):
        say_once(
            "codes",
            f"{path}: its header has neither qform nor sform; "
            "left and right are by convention only",
        )

    by_pixdim = np.array(image.header.get_zooms()[:3], dtype=np.float64) * MM[unit]
    if np.abs(by_pixdim / sizes - 1).max() > SHEAR:
        say_once(
            "pixdim",
            f"{path}: a voxel is {mm_in_words(sizes)} by its affine, which counts, "
            f"but {mm_in_words(by_pixdim)} by its pixdim",
        )

    shear = Grid(image.shape[:3], affine).shear
    if shear > SHEAR:
        say_once(
            "shear",
            f"{path}: its axes are not perpendicular; "
            f"lengths in mm along them are up to {shear:.0%} off",
        )


def say_once(kind: str, line: str) -> None:
    """Print a warning, but only the first of its kind: files of one scanner share their flaws."""
    if kind not in said:
        said.add(kind)
        print(f"warning: {line} (other files like it are not named)", file=sys.stderr)


def unit_of(image: Any) -> str:
    # The lowest three bits; nibabel also looks up the others, which are a unit of time, or nothing.
    return UNITS[int(image.header["xyzt_units"]) % 8]


def is_without_affine(header: Any) -> bool:
    return int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0


def without_affine_in_words(path: Path) -> str:
    """The likely reason for a wrong grid, where the header has no affine; else empty."""
    if not is_without_affine(nib.load(path).header):
        return ""
    return " (its header has neither qform nor sform: was it saved without an affine?)"


# --- the voxels of one file


def stored_values(path: Path, image: Any, dtype: Any = None) -> NDArray[Any]:
    """The voxels in stored order, scl_slope and scl_inter applied. Raises InputError."""
    with damage_as_input_error(path):
        if path.suffix.lower() == ".nii":
            return np.asanyarray(image.dataobj, dtype=dtype)

        with ImageOpener(path) as stream:
            values = np.asanyarray(type(image).from_stream(stream.fobj).dataobj, dtype=dtype)
            # A gzip stream has its checksum after the last voxel: it is read to its end.
            after = 0
            while chunk := stream.read(1 << 20):
                after += len(chunk)
                if after > AROUND:
                    raise InputError(f"{path}: damaged: goes on after its voxels; copy it again")
        return values


@contextmanager
def damage_as_input_error(path: Path) -> Iterator[None]:
    """What nibabel, zlib and the system raise on a damaged file, as one InputError."""
    try:
        yield
    except MemoryError as error:
        raise InputError(
            f"{path}: too large for this machine's memory ({one_line(error)})"
        ) from error
    except DAMAGE as error:
        raise InputError(
            f"{path}: cut short or damaged ({one_line(error)}); copy it again"
        ) from error


def reordered(
    values: NDArray[Any], affine: Affine, like: Affine | None
) -> tuple[NDArray[Any], Affine]:
    """Values (x, y, z, ...) and their affine, axes in RAS order or along those of `like`."""
    towards = affine if like is None else np.linalg.inv(like) @ affine

    # nibabel gives the nearest order of axes and their directions, without interpolation.
    order = io_orientation(towards)
    return apply_orientation(values, order), affine @ inv_ornt_aff(order, values.shape[:3])


def whole_numbers(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Floats rounded to the whole numbers that they mean. Raises InputError on others, nan, inf."""
    rounded = np.rint(values)

    # `not <=` is true of nan as well. Infinity minus infinity is nan, and no cause for a warning.
    with np.errstate(invalid="ignore"):
        is_large = ~(np.abs(values) < EXACT)
        is_uneven = ~(np.abs(values - rounded) <= WHOLE)

    uneven = values[is_large | is_uneven]
    if len(uneven):
        raise InputError(
            f"{path}: holds {uneven[0]:g}, but labels are whole numbers; is it an image?"
        )
    return rounded


def check_values(path: Path, data: Array) -> None:
    """NaN and infinity would spread through every crop; a constant has no scale to normalise by."""
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise InputError(
            f"{path}: {bad} voxels are NaN or infinite; replace them by the background's value"
        )

    for channel in data:
        if channel.min() == channel.max():
            raise InputError(
                f"{path}: every voxel is {channel.flat[0]:g}; leave it out of the list"
            )


# --- numbers in words


def size_in_words(sizes: Sequence[object]) -> str:
    """(4, 5, 6) -> "4 x 5 x 6"."""
    return " x ".join(map(str, sizes))


def mm_in_words(sizes: Sequence[float] | NDArray[np.float64]) -> str:
    """(1.5, 1.5, 3.0) -> "1.5 x 1.5 x 3 mm"."""
    return f"{size_in_words([f'{size:.4g}' for size in sizes])} mm"
