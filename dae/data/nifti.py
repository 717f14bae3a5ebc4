"""NIfTI volumes in and out: one orientation (RAS), spacing from the affine, and a plain word on what is wrong.

Arrays are (c, d, h, w); d h w run to the patient's right, anterior and superior side. Spacing is in mm, in that order.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from dae.config import InputError

Array = NDArray[np.float32]
Affine = NDArray[np.float64]  # (4, 4), voxel of the RAS grid -> mm
SAME_PLACE = 1e-2  # of two affines: more than headers lose by storing float32, less than anyone would see


class Volume(NamedTuple):
    """One image: values, and where they lie."""

    data: Array  # (c, d, h, w), scl_slope and scl_inter applied
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        return _spacing(self.affine)


class LabelMap(NamedTuple):
    """One label file: whole numbers, and where they lie."""

    labels: NDArray[np.integer[Any]]  # (d, h, w), in the smallest type that holds them
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        return _spacing(self.affine)


def read(path: Path) -> Volume:
    """One .nii or .nii.gz file, 3D or 4D (channels last in the file). Raises InputError on anything else."""
    image = _open(path)
    shape = image.shape
    if len(shape) not in (3, 4) or min(shape) < 1 or min(shape[:3]) < 2:
        raise InputError(f"{path}: an image of size {_by(shape)}; a volume has three axes of two voxels and more")
    with _readable(path):
        image = nib.as_closest_canonical(image)
        values = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    data = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
    _check_values(path, data)
    return Volume(data, np.asarray(image.affine, dtype=np.float64))


def read_labels(path: Path) -> LabelMap:
    """A 3D file of whole numbers, stored as integers or floats. Raises InputError on anything else."""
    image = _open(path)
    if len(image.shape) != 3:
        raise InputError(f"{path}: labels of size {_by(image.shape)}; a label map has three axes")
    with _readable(path):
        image = nib.as_closest_canonical(image)
        values = np.asanyarray(image.dataobj)  # not through float32, which has no 16,777,217
    if values.dtype.kind == "f":
        uneven = values[~(np.abs(values) < 2**53) | (values != np.rint(values))]  # nan and infinity among them
        if len(uneven):
            raise InputError(f"{path}: holds {uneven[0]:g}, but labels are whole numbers; is it an image?")
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    smallest = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
    return LabelMap(values.astype(smallest), np.asarray(image.affine, dtype=np.float64))


def read_labels_of(path: Path, image: Volume) -> NDArray[np.uint8]:
    """Labels 0 to 255 (d, h, w) on the grid of `image`. Raises InputError on anything else."""
    labels, affine = read_labels(path)
    if labels.dtype != np.uint8:
        raise InputError(f"{path}: holds labels from {labels.min()} to {labels.max()}; they must lie in 0 to 255")
    grid = image.data.shape[1:]
    if labels.shape != grid or apart(affine, image.affine) > SAME_PLACE:
        raise InputError(f"{path}: not on the grid of its image: {_by(labels.shape)}, {_by(grid)}")
    return labels.astype(np.uint8, copy=False)


def apart(a: Affine, b: Affine) -> float:
    """The largest difference between the entries of two affines."""
    return float(np.abs(a - b).max())


def read_channels(paths: Sequence[Path]) -> Volume:
    """Several files of one grid as the channels of one volume. Raises InputError where the grids differ."""
    volumes = [read(path) for path in paths]
    for path, volume in zip(paths, volumes):
        same_grid = volume.data.shape[1:] == volumes[0].data.shape[1:]
        if not same_grid or apart(volume.affine, volumes[0].affine) > SAME_PLACE:
            raise InputError(f"{path}: not on the grid of {paths[0]}; channels must be registered and resampled first")
    return Volume(np.concatenate([v.data for v in volumes]), volumes[0].affine)


def write(path: Path, data: NDArray[Any], affine: Affine) -> None:
    """A (d, h, w) array and its affine as a .nii or .nii.gz file, in the array's own type."""
    nib.save(nib.Nifti1Image(data, affine), path)


def _open(path: Path) -> Any:
    """The file with its header read and found sound, its voxels not."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_short(error)})") from error
    if not isinstance(image, nib.Nifti1Image):
        raise InputError(f"{path}: a {type(image).__name__}; only NIfTI volumes (.nii, .nii.gz) are read")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels of type {image.get_data_dtype()}; only integers and floats are read")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine is singular; set the header's qform or sform")
    return image


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cut short or damaged ({_short(error)}); copy it again") from error


def _check_values(path: Path, data: Array) -> None:
    """NaN and infinity would spread through every crop; a constant has no scale to normalise by."""
    if bad := int(data.size - np.isfinite(data).sum()):
        raise InputError(f"{path}: {bad} voxels are NaN or infinite; replace them by the background's value")
    for channel in data:
        if channel.min() == channel.max():
            raise InputError(f"{path}: every voxel is {channel.flat[0]:g}; leave it out of the list")


def _spacing(affine: Affine) -> tuple[float, float, float]:
    d, h, w = map(float, voxel_sizes(affine))
    return d, h, w


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
