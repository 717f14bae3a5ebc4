"""Synthetic bodies: a torso in CT and a head in four MR contrasts, with labels.

They take the part of real scans in the demo and in the tests. An anatomy is data (anatomy.py): rows
of `Shape`, painted one over the other into a map of tissues. A tissue is a row of numbers: its
label, and its brightness in each contrast. Nobody would diagnose from them, but they have what a
network must learn to restore: nested layers, sharp edges, a left and a right.
"""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.fft import idctn
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.transform import Rotation

from dae.demo.anatomy import (
    BRAIN,
    CORTEX,
    CT_LABELS,
    CT_TISSUES,
    HEAD,
    INF,
    MR_LABELS,
    MR_SCALE,
    MR_TISSUES,
    NUCLEI,
    ORGANS,
    SIDES,
    TABLE,
    TORSO,
    Shape,
)
from dae.errors import InputError
from dae.files import write_bytes

Size = tuple[int, int, int]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Entry = dict[str, Any]  # an entry of a data list

VERSION = 1  # to be raised whenever the same seed gives other volumes
SPACING = 1.5  # mm

# --- what chance adds -----------------------------------------------------------------------------

# The order of draws from a generator decides every volume.


def grid(size: Size) -> Floats:
    """The coordinates (3, d, h, w) of the voxels' centres, in (-1, 1)."""
    axes = [((2 * np.arange(n) + 1) / n - 1).astype(np.float32) for n in size]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def smooth_field(rng: Generator, size: Size, modes: int) -> Floats:
    """A random smooth field (d, h, w) in [-1, 1].

    The lowest `modes` cosines of each axis, with random amplitudes.
    """
    spectrum = rng.standard_normal((modes, modes, modes), dtype=np.float32)
    spectrum[0, 0, 0] = 0  # no constant part
    field = idctn(spectrum, s=size)
    return np.asarray(field / np.abs(field).max(), dtype=np.float32)


def pose(
    rng: Generator,
    size: Size,
    *,
    turn: float = 4,
    scale: tuple[float, float] = (0.94, 1.03),
    warp: float = 0.03,
) -> Floats:
    """The coordinates (3, d, h, w) of one subject's voxels in the atlas.

    The subject is turned by up to `turn` degrees about each axis, scaled, and gently warped.
    """
    rotation = Rotation.from_euler("xyz", rng.uniform(-turn, turn, 3), degrees=True).as_matrix()
    to_atlas = (rotation / rng.uniform(*scale, 3)).astype(np.float32)
    waves = np.stack([smooth_field(rng, size, 4) for _ in range(3)])

    turned = np.einsum("ij,j...->i...", to_atlas, grid(size))
    return np.asarray(turned + warp * waves, dtype=np.float32)


def furrowed(rng: Generator, xyz: Floats) -> Floats:
    """The coordinates (3, d, h, w), moved outwards along a winding net of lines.

    So what is painted there has furrows. The lines are the zeros of a sum of waves over the
    *direction* from the origin: a furrow runs straight inwards, where one that wandered could cut a
    slice off the brain.
    """
    direction = xyz / np.linalg.norm(xyz, axis=0)
    waves = rng.standard_normal((12, 3), dtype=np.float32)
    waves *= 6.5 / np.linalg.norm(waves, axis=1, keepdims=True)

    height = np.zeros_like(direction[0])
    for wave in waves:
        phase = rng.uniform(0, 2 * np.pi)
        height += np.cos(np.einsum("i,i...->...", wave, direction) + phase)

    furrow = np.clip(1.5 - 0.75 * np.abs(height), 0, 1)  # 1 on a line, 0 away from all
    return np.asarray(xyz / (1 - 0.22 * furrow), dtype=np.float32)


def vary(
    rng: Generator, shapes: Iterable[Shape], *, move: float = 0.03, grow: float = 0.1
) -> list[Shape]:
    """The same shapes, moved by up to `move` units and larger or smaller by a share up to `grow`.

    Each shape and each axis by itself.
    """
    varied = []
    for shape in shapes:
        x, y, z = np.add(shape.centre, rng.uniform(-move, move, 3)).tolist()
        a, b, c = np.multiply(shape.radii, rng.uniform(1 - grow, 1 + grow, 3)).tolist()
        varied.append(shape._replace(centre=(x, y, z), radii=(a, b, c)))
    return varied


def bowel(rng: Generator, loops: int = 18) -> list[Shape]:
    """Loops of bowel all over the lower abdomen, filled with gas, with a bright meal or neither."""
    shapes = []
    for content in rng.choice(["gas", "meal", "bowel"], loops):
        x, y, z = rng.uniform((-0.5, 0.05, -0.85), (0.5, 0.42, -0.15)).tolist()
        shapes.append(Shape("bowel", (x, y, z), (0.17, 0.17, 0.17)))
        shapes.append(Shape(str(content), (x, y, z), (0.11, 0.11, 0.11)))
    return vary(rng, shapes)


def tumour(rng: Generator) -> list[Shape]:
    """A dead core, in a rim that takes up contrast agent, in white matter that has swollen.

    It is in one half of the brain.
    """
    x, y, z = rng.uniform((0.22, -0.30, 0.08), (0.32, 0.30, 0.28)).tolist()
    side = float(rng.choice(SIDES))
    centre = (x * side, y, z)
    return [
        Shape("oedema", centre, (0.34, 0.34, 0.34), over="white"),
        Shape("rim", centre, (0.21, 0.21, 0.21)),
        Shape("core", centre, (0.10, 0.10, 0.10)),
    ]


# --- from tables to images ------------------------------------------------------------------------


def inside(shape: Shape, xyz: Floats) -> NDArray[np.bool_]:
    """Whether each of the coordinates (3, d, h, w) is in the shape: (d, h, w)."""
    x, y, z = xyz
    sunk = z + shape.slope * y

    total = np.zeros_like(x)
    for along, centre, radius in zip((x, y, sunk), shape.centre, shape.radii):
        if radius < INF:
            total = total + np.abs((along - centre) / radius) ** shape.power
    return np.asarray(total < 1)


def paint(canvas: Bytes, shapes: Iterable[Shape], xyz: Floats, names: Sequence[str]) -> Bytes:
    """The canvas with the shapes painted over it in turn.

    canvas: (d, h, w), indices into `names` of the voxels at `xyz` (3, d, h, w).
    """
    canvas = canvas.copy()
    for shape in shapes:
        where = inside(shape, xyz)
        if shape.over is not None:
            under = canvas == names.index(shape.over)
            if shape.depth:
                voxel = [2 / n for n in under.shape]
                under = distance_transform_edt(under, sampling=voxel) > shape.depth
            where &= under
        canvas[where] = names.index(shape.tissue)
    return canvas


def render(
    rng: Generator, canvas: Bytes, brightness: NDArray[np.float64], texture: Floats
) -> Floats:
    """The brightness of each voxel's tissue (d, h, w), up to 1.5 % off in this subject.

    Edges are half a voxel soft.
    """
    own = (brightness * rng.uniform(0.985, 1.015, len(brightness))).astype(np.float32)
    return np.asarray(gaussian_filter(own[canvas] * (1 + texture), sigma=0.4, truncate=3))


def scan(rng: Generator, signal: Floats, scale: float) -> Floats:
    """What a coil receives of a signal (d, h, w) in [0, 1].

    It is uneven by up to 15 %, with Rician noise of 1 %.
    """
    d, h, w = signal.shape
    received = scale * signal * np.exp(0.15 * smooth_field(rng, (d, h, w), 3))
    real, imaginary = 0.01 * scale * rng.standard_normal((2, d, h, w), dtype=np.float32)
    return np.asarray(np.hypot(received + real, imaginary), dtype=np.float32)


def body_ct(rng: Generator, *, size: Size = (96, 96, 96)) -> tuple[NDArray[np.int16], Bytes]:
    """A torso on a table, from the chest to the pelvis, and its `CT_LABELS`, (d, h, w) each.

    HU from -1024 to about 900.
    """
    names = list(CT_TISSUES)
    label, hu = np.array(list(CT_TISSUES.values())).T

    xyz = pose(rng, size)
    air = np.zeros(size, dtype=np.uint8)
    room = paint(air, TABLE, grid(size), names)
    body = paint(room, TORSO, xyz, names)
    filled = paint(body, bowel(rng) + vary(rng, ORGANS), xyz, names)
    # An organ too large for the body is cut to fit.
    canvas = np.where(body == names.index("cavity"), filled, body)

    texture = 0.01 * smooth_field(rng, size, 12)
    image = render(rng, canvas, hu + 1000, texture) - 1000
    image += 15 * rng.standard_normal(size, dtype=np.float32)
    return np.rint(image).clip(-1024).astype(np.int16), label.astype(np.uint8)[canvas]


def head_mr(rng: Generator, *, size: Size = (96, 96, 96)) -> tuple[dict[str, Floats], Bytes]:
    """A head with a tumour in the contrasts t1, t1ce, t2 and flair, and its `MR_LABELS`.

    The contrasts share its anatomy. Images and labels are (d, h, w). Images hold whole numbers, as
    scanners write them: 0 outside the head, from 1 to about 1000 within.
    """
    names = list(MR_TISSUES)
    label, *signals = np.array(list(MR_TISSUES.values())).T

    xyz = pose(rng, size)
    air = np.zeros(size, dtype=np.uint8)
    head = paint(air, HEAD, xyz, names)
    cortex = paint(head, CORTEX, furrowed(rng, xyz), names)
    brain = paint(cortex, BRAIN + tumour(rng) + vary(rng, NUCLEI), xyz, names)
    # The skull's inside is all the room there is.
    canvas = np.where(head == names.index("fluid"), brain, head)

    texture = 0.015 * smooth_field(rng, size, 12)
    images = {}
    for (contrast, scale), signal in zip(MR_SCALE.items(), signals):
        rendered = render(rng, canvas, signal, texture)
        image = scan(rng, rendered, scale * rng.uniform(0.9, 1.1))
        images[contrast] = np.where(canvas > 0, np.rint(image).clip(1), 0).astype(np.float32)
    return images, label.astype(np.uint8)[canvas]


# --- files ----------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """The data lists of the demo."""

    pretrain: Path  # each image by itself
    ct_seg: Path  # torsos with their labels
    mr_seg: Path  # heads of four channels, with their labels


def write_phantoms(
    folder: Path,
    *,
    subjects: int = 3,
    validation: int = 1,
    test: int = 1,
    size: Size = (96, 96, 96),
    seed: int = 0,
) -> Lists:
    """Write torsos and heads as `.nii.gz`, unless this very set is there, and lists that name them.

    `subjects` (to train on), `validation` and `test` count the torsos, and as many heads. A subject
    depends on the seed, its kind and its number alone: asking for more leaves the first ones as
    they were, byte for byte.
    """
    lists = Lists(folder / "pretrain.json", folder / "ct_seg.json", folder / "mr_seg.json")
    name = f"phantoms {VERSION}: {subjects} + {validation} + {test} of size {size}, seed {seed}"
    if all(name_of_list(path) == name for path in lists):
        return lists

    folder.mkdir(parents=True, exist_ok=True)
    remove_lists(lists)

    total = subjects + validation + test
    torsos = [write_torso(folder, number, size=size, seed=seed) for number in range(total)]
    heads = [write_head(folder, number, size=size, seed=seed) for number in range(total)]

    splits = {
        "training": slice(subjects),
        "validation": slice(subjects, total - test),
        "test": slice(total - test, None),
    }
    contents = (
        pretraining_list(torsos, heads, splits),
        segmentation_list(torsos, CT_LABELS, splits),
        segmentation_list(heads, MR_LABELS, splits),
    )
    for path, content in zip(lists, contents):
        write_bytes(path, json.dumps({"name": name} | content, indent=1).encode())
    return lists


def name_of_list(path: Path) -> str | None:
    """The name that a list gives itself, "" for none; None where there is no list."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    return str(content.get("name", "")) if isinstance(content, dict) else ""


def is_of_phantoms(path: Path) -> bool:
    """Whether there is a list, and it is one of ours."""
    return (name_of_list(path) or "").startswith(("phantoms ", "hard phantoms "))


def check_lists(paths: Sequence[Path]) -> None:
    """Raises InputError where one of these files is there, and no list of phantoms."""
    for path in paths:
        if path.is_file() and not is_of_phantoms(path):
            raise InputError(
                f"{path}: is there already, and no list of phantoms; name another folder"
            )


def remove_lists(paths: Sequence[Path]) -> None:
    """If a run is cut short, no list shall name what it has not written.

    Raises InputError, and removes none, where one of them is not of phantoms.
    """
    check_lists(paths)
    for path in paths:
        path.unlink(missing_ok=True)


def write_torso(folder: Path, number: int, *, size: Size, seed: int) -> Entry:
    """Write one torso and return its entry for a data list."""
    image, label = body_ct(np.random.default_rng([seed, 0, number]), size=size)
    return write_ct(folder, f"ct_{number:03d}", image, label)


def write_ct(folder: Path, subject: str, image: NDArray[np.int16], label: Bytes) -> Entry:
    """Write a CT and its labels, their axes in RAS order, and return their entry."""
    write_bytes(folder / f"{subject}.nii.gz", nifti(image, "RAS"))
    write_bytes(folder / f"{subject}_label.nii.gz", nifti(label, "RAS"))
    return {
        "image": f"{subject}.nii.gz",
        "label": f"{subject}_label.nii.gz",
        "modality": "ct",
        "subject": subject,
    }


def write_head(folder: Path, number: int, *, size: Size, seed: int) -> Entry:
    """Write one head in all contrasts and return its entry for a data list.

    Its axes are in LPS order, so that a reader who counts on RAS is found out.
    """
    subject = f"mr_{number:03d}"
    images, label = head_mr(np.random.default_rng([seed, 1, number]), size=size)

    files = []
    for contrast, image in images.items():
        file = f"{subject}_{contrast}.nii.gz"
        write_bytes(folder / file, nifti(image, "LPS"))
        files.append(file)
    write_bytes(folder / f"{subject}_label.nii.gz", nifti(label, "LPS"))
    return {
        "image": files,
        "modality": list(images),
        "label": f"{subject}_label.nii.gz",
        "subject": subject,
    }


def pretraining_list(
    torsos: Sequence[Entry], heads: Sequence[Entry], splits: Mapping[str, slice]
) -> dict[str, Any]:
    """Every image by itself.

    Pre-training is not tested, and has no labels: 1 is one thing in CT and another in MR.
    """
    content: dict[str, Any] = {}
    for split in ("training", "validation"):
        content[split] = list(torsos[splits[split]])
        for head in heads[splits[split]]:
            content[split] += one_case_per_image(head)
    return content | {"labels": {0: "background"}}


def segmentation_list(
    cases: Sequence[Entry], labels: dict[int, str], splits: Mapping[str, slice]
) -> dict[str, Any]:
    """All images of a subject together, and the names of the labels."""
    content: dict[str, Any] = {split: cases[part] for split, part in splits.items()}
    return content | {"labels": labels}


def one_case_per_image(case: Entry) -> list[Entry]:
    """The entry of a subject of several images as one entry for each image."""
    entries = []
    for image, modality in zip(case["image"], case["modality"]):
        entries.append(case | {"image": image, "modality": modality})
    return entries


def nifti(volume: NDArray[Any], axes: str) -> bytes:
    """The volume (d, h, w) as a `.nii.gz`, stored along other axes, such as "LPS"."""
    affine = np.diag([SPACING, SPACING, SPACING, 1])
    affine[:3, 3] = -SPACING * (np.array(volume.shape) - 1) / 2  # the origin is in the middle
    image = nib.Nifti1Image(volume, affine).as_reoriented(axcodes2ornt(axes))
    image.header.set_xyzt_units("mm")

    # Noise hardly shrinks, however long one tries. Without a time the bytes are always the same.
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
