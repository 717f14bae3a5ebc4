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


class Volume(NamedTuple):
    """One image: values, and where they lie."""

    data: Array  # (c, d, h, w), scl_slope and scl_inter applied
    affine: NDArray[np.float64]  # (4, 4), voxel of the RAS grid -> mm

    @property
    def spacing(self) -> tuple[float, float, float]:
        d, h, w = voxel_sizes(self.affine)
        return float(d), float(h), float(w)


def read(path: Path) -> Volume:
    """One .nii or .nii.gz file, 3D or 4D (channels last in the file). Raises InputError on anything else."""
    image = _open(path)
    shape = image.shape
    if len(shape) not in (3, 4) or min(shape) < 1 or min(shape[:3]) < 2:
        raise InputError(f"{path}: an image of size {_by(shape)}; a volume has three axes of two voxels and more")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels of type {image.get_data_dtype()}; only integers and floats are read")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine is singular; set the header's qform or sform")
    image = _canonical(path, image)
    values = _values(path, image)
    data = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
    _check_values(path, data)
    return Volume(data, np.asarray(image.affine, dtype=np.float64))


def read_labels(path: Path, image: Volume | None = None) -> NDArray[np.uint8]:
    """An integer label map (d, h, w) in RAS order, on the grid of `image`. Raises InputError on anything else."""
    opened = _open(path)
    if len(opened.shape) != 3:
        raise InputError(f"{path}: labels of size {_by(opened.shape)}; a label map has three axes")
    opened = _canonical(path, opened)
    values, affine = _values(path, opened), opened.affine
    labels = np.clip(values, 0, 255).astype(np.uint8)
    if not np.array_equal(labels, values):
        raise InputError(f"{path}: holds other values than the whole numbers 0 to 255")
    if image is not None and (labels.shape != image.data.shape[1:] or not np.allclose(affine, image.affine, atol=1e-2)):
        raise InputError(f"{path}: not on the grid of its image: {_by(labels.shape)}, {_by(image.data.shape[1:])}")
    return labels


def read_channels(paths: Sequence[Path]) -> Volume:
    """Several files of one grid as the channels of one volume. Raises InputError where the grids differ."""
    volumes = [read(path) for path in paths]
    for path, volume in zip(paths, volumes):
        same_grid = volume.data.shape[1:] == volumes[0].data.shape[1:]
        if not same_grid or not np.allclose(volume.affine, volumes[0].affine, atol=1e-2):
            raise InputError(f"{path}: not on the grid of {paths[0]}; channels must be registered and resampled first")
    return Volume(np.concatenate([v.data for v in volumes]), volumes[0].affine)


def write(path: Path, data: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """A (d, h, w) array and its affine as a .nii or .nii.gz file, in the array's own type."""
    nib.save(nib.Nifti1Image(data, affine), path)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_short(error)})") from error
    if not isinstance(image, nib.Nifti1Image):
        raise InputError(f"{path}: a {type(image).__name__}; only NIfTI volumes (.nii, .nii.gz) are read")
    return image


def _canonical(path: Path, image: Any) -> Any:
    """The image with its axes turned to RAS."""
    with _readable(path):
        return nib.as_closest_canonical(image)


def _values(path: Path, image: Any) -> Array:
    with _readable(path):
        return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))


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


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
