"""NIfTI volumes in and out: one orientation (RAS), lengths in mm, and one line on what is wrong.

Arrays are (c, d, h, w); d h w run to the patient's right, anterior and superior side. Spacing is in
mm, in that order.

What is taken from a header, and what is not:

- Where a voxel lies: the sform where there is one, else the qform, as the NIfTI standard and
  nibabel say.
- Units: metres and micrometres become mm. No unit means mm.
- Voxels larger than 10 cm are refused: then the unit in the header is wrong.
- No sform and no qform: left and right are a convention of the format. It is read, and said.
- Voxel sizes (pixdim) that differ from the sform: the sform counts. It is read, and said.
- Sheared grids (a tilted gantry): voxels are read as they are, and it is said that lengths are not
  exact. Scores in mm are refused there (evaluation/scoring.py), since a table of distances does not
  carry a warning.
"""

import os
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

from dae.errors import InputError

Array = NDArray[np.float32]
Affine = NDArray[np.float64]  # (4, 4), voxel of the RAS grid -> mm

SAME_GRID = 0.1  # voxels by which corners of two grids may differ: headers lose less by rounding
WHOLE = 1e-3  # by which a label may differ from a whole number: slopes and float32 cost less
SHEAR = 0.01  # relative error of a length that is worth a word
LARGEST_VOXEL = 100.0  # mm
MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
DEFLATE = 1040  # bytes that one byte of a gzip stream can hold: 1032 by its format

said: set[str] = set()  # kinds of warnings that this process has printed


class Grid(NamedTuple):
    """Where voxels lie."""

    shape: tuple[int, ...]  # (d, h, w)
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm from voxel to voxel along d h w."""
        d, h, w = map(float, voxel_sizes(self.affine))
        return d, h, w

    @property
    def shear(self) -> float:
        """The largest relative error of a distance that takes the axes for perpendicular: .1 is 10 %.

        0 where they are perpendicular, however the grid is rotated.
        """
        axes = self.affine[:3, :3] / voxel_sizes(self.affine)
        true = np.linalg.svd(axes, compute_uv=False)  # lengths of what is taken for 1 mm, in order
        return float(max(1 - 1 / true[0], 1 / true[-1] - 1))


class Volume(NamedTuple):
    """One image: values, and where they lie."""

    data: Array  # (c, d, h, w), scl_slope and scl_inter applied
    affine: Affine

    @property
    def grid(self) -> Grid:
        return Grid(self.data.shape[1:], self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.grid.spacing


class LabelMap(NamedTuple):
    """One label file: whole numbers, and where they lie."""

    labels: NDArray[np.integer[Any]]  # (d, h, w), in the smallest type that holds them
    affine: Affine

    @property
    def grid(self) -> Grid:
        return Grid(self.labels.shape, self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.grid.spacing


def read(path: Path, like: Affine | None = None) -> Volume:
    """One .nii or .nii.gz file, 3D or 4D (channels last in the file). Raises InputError on others.

    Its axes are put in RAS order, or in the order of the grid `like` where that is given: at 45
    degrees two headers that differ in the seventh digit have different RAS orders.
    """
    image = _open(path)
    shape = image.shape
    if len(shape) not in (3, 4) or min(shape) < 1 or min(shape[:3]) < 2:
        raise InputError(
            f"{path}: an image of size {_by(shape)}; a volume has three axes of two voxels and more"
        )
    affine = _place(path, image)
    values, affine = _ordered(_values(path, image, np.float32), affine, like)
    data = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
    _check_values(path, data)
    return Volume(data, affine)


def read_labels(path: Path, like: Affine | None = None) -> LabelMap:
    """A file of whole numbers, stored as integers or floats, 3D or (x, y, z, 1).

    Raises InputError on anything else.
    `like`: as in `read`.
    """
    image = _open(path)
    shape = image.shape
    if len(shape) < 3 or min(shape) < 1 or prod(shape[3:]) != 1:
        raise InputError(f"{path}: labels of size {_by(shape)}; a label map has three axes")
    affine = _place(path, image)
    values = _values(path, image).reshape(shape[:3])  # not through float32, which has no 16,777,217
    values, affine = _ordered(values, affine, like)
    if values.dtype.kind == "f":
        values = _whole(path, values)
    low, high = int(values.min()), int(values.max())
    smallest = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
    return LabelMap(values.astype(smallest), affine)


def read_labels_of(path: Path, image: Volume) -> NDArray[np.uint8]:
    """Labels 0 to 255 (d, h, w) on the grid of `image`. Raises InputError on anything else."""
    found = read_labels(path, like=image.affine)
    labels = found.labels
    if labels.dtype != np.uint8:
        raise InputError(
            f"{path}: holds labels from {labels.min()} to {labels.max()}; they must lie in 0 to 255"
        )
    if apart := difference(found.grid, image.grid):
        raise InputError(f"{path}: not on the grid of its image: {apart}{_unplaced(path)}")
    return labels.astype(np.uint8, copy=False)


def read_channels(paths: Sequence[Path]) -> Volume:
    """Several files of one grid as the channels of one volume. Raises InputError on other grids."""
    first = read(paths[0])
    volumes = [first, *(read(path, like=first.affine) for path in paths[1:])]
    for path, volume in zip(paths, volumes):
        if apart := difference(volume.grid, first.grid):
            raise InputError(
                f"{path}: not on the grid of {paths[0]}: {apart}{_unplaced(path)}; "
                "channels must be registered and resampled first"
            )
    return Volume(np.concatenate([v.data for v in volumes]), first.affine)


def read_grid(path: Path) -> Grid:
    """Where the voxels of a file lie, by its header alone. Raises InputError."""
    image = _open(path)
    affine = _place(path, image)
    order = io_orientation(affine)
    shape = [0, 0, 0]
    for n, axis in zip(image.shape, order[:, 0].astype(int)):
        shape[axis] = n
    return Grid(tuple(shape), affine @ inv_ornt_aff(order, image.shape[:3]))


def affine_in_mm(image: Any) -> Affine:
    """The affine of a NIfTI image of nibabel, stored voxel -> mm, whatever unit its header has."""
    mm = MM[_unit(image)]
    return np.diag([mm, mm, mm, 1.0]) @ np.asarray(image.affine, dtype=np.float64)


def write(path: Path, data: NDArray[Any], affine: Affine) -> None:
    """A (d, h, w) array and its affine as a .nii or .nii.gz file, in the array's own type."""
    nib.save(nib.Nifti1Image(data, affine), path)


# --- two grids -------------------------------------------------------------------------------------------------------


def difference(a: Grid, b: Grid) -> str:
    """What tells two grids apart, in words; empty where they are one.

    They are one where all corners lie within a tenth of a voxel of each other. Entries of affines
    say little: a voxel size that is .009 mm off moves the far end of 500 voxels by 4 mm, and a shift
    of .02 mm is nothing.
    """
    if a.shape != b.shape:
        return f"{_by(a.shape)} and {_by(b.shape)} voxels"
    ends = np.array([(-0.5, n - 0.5) for n in a.shape])  # outer faces
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    a_in_b = np.linalg.inv(b.affine) @ a.affine
    voxels = np.linalg.norm(apply_affine(a_in_b, corners) - corners, axis=1).max()
    if voxels <= SAME_GRID:
        return ""
    mm = np.linalg.norm(
        apply_affine(a.affine, corners) - apply_affine(b.affine, corners), axis=1
    ).max()
    return f"their corners lie up to {mm:.3g} mm ({voxels:.3g} voxels) apart"


# --- sizes that no machine holds -------------------------------------------------------------------------------------


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
        count, power = count / 1024, power + 1
    return f"{count:.3g} {units[power]}"


def say_once(kind: str, line: str) -> None:
    """Print a warning, but only the first of its kind: files of one scanner share their flaws."""
    if kind not in said:
        said.add(kind)
        print(f"warning: {line} (other files like it are not named)", file=sys.stderr)


# --- one file --------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    """The file with its header read and found sound, its voxels not."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with LoggingOutputSuppressor():  # nibabel logs odd fields; one line says enough
            image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_short(error)})") from error
    if not isinstance(image, nib.Nifti1Image):
        raise InputError(
            f"{path}: a {type(image).__name__}; only NIfTI volumes (.nii, .nii.gz) are read"
        )
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: voxels of type {image.get_data_dtype()}; only integers and floats are read"
        )
    _check_size(path, image)
    return image


def _check_size(path: Path, image: Any) -> None:
    """A header may claim any size; what the file cannot hold is not asked for."""
    stored = prod(image.shape) * image.get_data_dtype().itemsize
    claim = f"its header claims {_by(image.shape)} voxels ({bytes_in_words(stored)})"
    there = path.stat().st_size
    holds = {".nii": there - int(image.dataobj.offset), ".gz": there * DEFLATE}.get(
        path.suffix.lower(), stored
    )
    if stored > holds:
        raise InputError(
            f"{path}: cut short or damaged: {claim}, the file holds {there} bytes; copy it again"
        )
    if (needed := 4 * prod(image.shape)) > memory():
        raise InputError(
            f"{path}: {claim}; reading it takes {bytes_in_words(needed)}, this machine has {bytes_in_words(memory())}"
        )


def _place(path: Path, image: Any) -> Affine:
    """The file's affine, stored voxel -> mm. What its header leaves open is said.

    Raises InputError where the header does not say where voxels lie.
    """
    code = int(image.header["xyzt_units"]) % 8
    if code > 3:
        raise InputError(
            f"{path}: its header gives lengths in unit {code}, which does not exist; set xyzt_units to mm"
        )
    unit, affine = _unit(image), affine_in_mm(image)
    sizes, steps = voxel_sizes(affine), affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(steps)) <= 1e-3 * sizes.prod():
        raise InputError(f"{path}: its affine is singular; set the header's qform or sform")
    if sizes.max() > LARGEST_VOXEL:
        raise InputError(
            f"{path}: a voxel of {_mm(sizes)} (unit in the header: {unit}); correct its sizes or its unit"
        )

    if MM[unit] != 1:
        say_once(
            unit, f"{path}: lengths in its header are in {unit}s; read as voxels of {_mm(sizes)}"
        )
    if _is_unplaced(image.header):
        say_once(
            "codes",
            f"{path}: its header has neither qform nor sform; left and right are by convention only",
        )
    by_pixdim = np.array(image.header.get_zooms()[:3], dtype=np.float64) * MM[unit]
    if np.abs(by_pixdim / sizes - 1).max() > SHEAR:
        say_once(
            "pixdim",
            f"{path}: a voxel is {_mm(sizes)} by its affine, which counts, but {_mm(by_pixdim)} by its pixdim",
        )
    shear = Grid(image.shape[:3], affine).shear
    if shear > SHEAR:
        say_once(
            "shear",
            f"{path}: its axes are not perpendicular; lengths in mm along them are up to {shear:.0%} off",
        )
    return affine


def _unit(image: Any) -> str:
    return str(image.header.get_xyzt_units()[0])


def _is_unplaced(header: Any) -> bool:
    return int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0


def _unplaced(path: Path) -> str:
    unplaced = _is_unplaced(nib.load(path).header)
    return (
        " (its header has neither qform nor sform: was it saved without an affine?)"
        if unplaced
        else ""
    )


def _values(path: Path, image: Any, kind: Any = None) -> NDArray[Any]:
    """The voxels in stored order, scaled.

    A compressed file is read to its end, where its checksum is.
    """
    with _readable(path):
        if path.suffix.lower() == ".nii":
            return np.asanyarray(image.dataobj, dtype=kind)
        with ImageOpener(path) as stream:
            values = np.asanyarray(type(image).from_stream(stream.fobj).dataobj, dtype=kind)
            while stream.read(1 << 20):
                pass
        return values


def _ordered(
    values: NDArray[Any], affine: Affine, like: Affine | None
) -> tuple[NDArray[Any], Affine]:
    """Values (x, y, z, ...) and their affine, axes in RAS order or along those of `like`."""
    order = io_orientation(affine if like is None else np.linalg.inv(like) @ affine)
    return apply_orientation(values, order), affine @ inv_ornt_aff(order, values.shape[:3])


def _whole(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Floats as the whole numbers they stand for. Raises InputError on others, nan and infinity."""
    near = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        uneven = values[~(np.abs(values) < 2**53) | ~(np.abs(values - near) <= WHOLE)]
    if len(uneven):
        raise InputError(
            f"{path}: holds {uneven[0]:g}, but labels are whole numbers; is it an image?"
        )
    return near


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise InputError(
            f"{path}: too large for this machine's memory ({_short(error)})"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(
            f"{path}: cut short or damaged ({_short(error)}); copy it again"
        ) from error


def _check_values(path: Path, data: Array) -> None:
    """NaN and infinity would spread through every crop; a constant has no scale to normalise by."""
    if bad := int(data.size - np.isfinite(data).sum()):
        raise InputError(
            f"{path}: {bad} voxels are NaN or infinite; replace them by the background's value"
        )
    for channel in data:
        if channel.min() == channel.max():
            raise InputError(
                f"{path}: every voxel is {channel.flat[0]:g}; leave it out of the list"
            )


def _mm(sizes: Sequence[float] | NDArray[np.float64]) -> str:
    return f"{_by([f'{size:.4g}' for size in sizes])} mm"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _by(shape: Sequence[object]) -> str:
    return " x ".join(map(str, shape))
