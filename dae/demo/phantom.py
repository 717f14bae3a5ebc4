"""Synthetic bodies: a torso in CT and a head in four MR contrasts, with labels, made from the tables of anatomy.py.

They stand in for real scans in the demo and in the tests. An anatomy is data: rows of `Shape`, painted one over the
other into a map of tissues; a tissue is a row of numbers, its label and its brightness in each contrast. Nobody would
diagnose from them, but they have what a network must learn to restore: nested layers, sharp edges, a left and a right.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
from dae.files import write_bytes

Size = tuple[int, int, int]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Case = dict[str, Any]

VERSION = 1  # to be raised whenever the same seed gives other volumes
SPACING = 1.5  # mm

# --- what chance adds ------------------------------------------------------------------------------------------------


def grid(size: Size) -> Floats:
    """The coordinates (3, d, h, w) of the voxels' centres, in (-1, 1)."""
    axes = [((2 * np.arange(n) + 1) / n - 1).astype(np.float32) for n in size]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def smooth_field(rng: Generator, size: Size, modes: int) -> Floats:
    """A random smooth field (d, h, w) in [-1, 1]: the lowest `modes` cosines of each axis with random amplitudes."""
    spectrum = rng.standard_normal((modes, modes, modes), dtype=np.float32)
    spectrum[0, 0, 0] = 0  # no constant part
    field = idctn(spectrum, s=size)
    return np.asarray(field / np.abs(field).max(), dtype=np.float32)


def pose(rng: Generator, size: Size) -> Floats:
    """The places (3, d, h, w) of one subject's voxels in the atlas: turned a little, scaled, gently warped."""
    turn = Rotation.from_euler("xyz", rng.uniform(-4, 4, 3), degrees=True).as_matrix()
    to_atlas = (turn / rng.uniform(0.94, 1.03, 3)).astype(np.float32)
    warp = np.stack([smooth_field(rng, size, 4) for _ in range(3)])
    return np.asarray(
        np.einsum("ij,j...->i...", to_atlas, grid(size)) + 0.03 * warp, dtype=np.float32
    )


def furrowed(rng: Generator, xyz: Floats) -> Floats:
    """The places (3, d, h, w), moved outwards along a winding net of lines, so that what is painted there has furrows.

    The lines are the zeros of a sum of waves over the *direction* from the origin: a furrow runs straight inwards,
    where one that wandered could cut a slice off the brain.
    """
    direction = xyz / np.linalg.norm(xyz, axis=0)
    waves = rng.standard_normal((12, 3), dtype=np.float32)
    waves *= 6.5 / np.linalg.norm(waves, axis=1, keepdims=True)
    height = sum(
        np.cos(np.einsum("i,i...->...", wave, direction) + rng.uniform(0, 2 * np.pi))
        for wave in waves
    )
    return np.asarray(
        xyz / (1 - 0.22 * np.clip(1.5 - 0.75 * np.abs(height), 0, 1)), dtype=np.float32
    )


def vary(rng: Generator, shapes: Iterable[Shape]) -> list[Shape]:
    """The same shapes, each moved by up to 0.03 units and made up to a tenth larger or smaller along each axis."""
    varied = []
    for shape in shapes:
        x, y, z = np.add(shape.centre, rng.uniform(-0.03, 0.03, 3)).tolist()
        a, b, c = np.multiply(shape.radii, rng.uniform(0.9, 1.1, 3)).tolist()
        varied.append(shape._replace(centre=(x, y, z), radii=(a, b, c)))
    return varied


def bowel(rng: Generator, loops: int = 18) -> list[Shape]:
    """Loops of bowel all over the lower abdomen, filled with gas, with a bright meal or with what is left of it."""
    shapes = []
    for content in rng.choice(["gas", "meal", "bowel"], loops):
        x, y, z = rng.uniform((-0.5, 0.05, -0.85), (0.5, 0.42, -0.15)).tolist()
        shapes += [
            Shape("bowel", (x, y, z), (0.17, 0.17, 0.17)),
            Shape(str(content), (x, y, z), (0.11, 0.11, 0.11)),
        ]
    return vary(rng, shapes)


def tumour(rng: Generator) -> list[Shape]:
    """In one half of the brain a dead core, in a rim that takes up contrast agent, in white matter that has swollen."""
    x, y, z = rng.uniform((0.22, -0.30, 0.08), (0.32, 0.30, 0.28)).tolist()
    centre = (x * float(rng.choice(SIDES)), y, z)
    swelling = Shape("oedema", centre, (0.34, 0.34, 0.34), over="white")
    return [
        swelling,
        Shape("rim", centre, (0.21, 0.21, 0.21)),
        Shape("core", centre, (0.10, 0.10, 0.10)),
    ]


# --- from tables to images -------------------------------------------------------------------------------------------


def inside(shape: Shape, xyz: Floats) -> NDArray[np.bool_]:
    """Whether each place of `xyz` (3, d, h, w) lies in the shape: (d, h, w)."""
    x, y, z = xyz
    axes = zip((x, y, z + shape.slope * y if shape.slope else z), shape.centre, shape.radii)
    terms = [
        np.abs((along - centre) / radius) ** shape.power
        for along, centre, radius in axes
        if radius < INF
    ]
    return np.asarray(sum(terms, start=np.zeros_like(x)) < 1)


def paint(canvas: Bytes, shapes: Iterable[Shape], xyz: Floats, names: Sequence[str]) -> Bytes:
    """The canvas (d, h, w), indices into `names` of the voxels at `xyz`, with the shapes painted over it in turn."""
    canvas = canvas.copy()
    for shape in shapes:
        where = inside(shape, xyz)
        if shape.over is not None:
            under = canvas == names.index(shape.over)
            sampling = [2 / n for n in under.shape]
            where &= distance_transform_edt(under, sampling) > shape.depth if shape.depth else under
        canvas[where] = names.index(shape.tissue)
    return canvas


def render(
    rng: Generator, canvas: Bytes, brightness: NDArray[np.float64], texture: Floats
) -> Floats:
    """The brightness of each voxel's tissue (d, h, w), up to 1.5 % off in this subject; edges are half a voxel soft."""
    own = (brightness * rng.uniform(0.985, 1.015, len(brightness))).astype(np.float32)
    return np.asarray(gaussian_filter(own[canvas] * (1 + texture), sigma=0.4, truncate=3))


def scan(rng: Generator, signal: Floats, scale: float) -> Floats:
    """What a coil receives of a signal (d, h, w) in [0, 1]: uneven by up to 15 %, with Rician noise of 1 %."""
    d, h, w = signal.shape
    received = scale * signal * np.exp(0.15 * smooth_field(rng, (d, h, w), 3))
    real, imaginary = 0.01 * scale * rng.standard_normal((2, d, h, w), dtype=np.float32)
    return np.asarray(np.hypot(received + real, imaginary), dtype=np.float32)


def body_ct(rng: Generator, *, size: Size = (96, 96, 96)) -> tuple[NDArray[np.int16], Bytes]:
    """A torso on a table, from the chest to the pelvis: HU (d, h, w) from -1024 to about 900, and its `CT_LABELS`."""
    names, (label, hu) = list(CT_TISSUES), np.array(list(CT_TISSUES.values())).T
    xyz = pose(rng, size)
    room = paint(np.zeros(size, dtype=np.uint8), TABLE, grid(size), names)
    body = paint(room, TORSO, xyz, names)
    filled = paint(body, bowel(rng) + vary(rng, ORGANS), xyz, names)
    canvas = np.where(
        body == names.index("cavity"), filled, body
    )  # an organ too large for the body is cut to fit
    image = render(rng, canvas, hu + 1000, 0.01 * smooth_field(rng, size, 12)) - 1000
    image += 15 * rng.standard_normal(size, dtype=np.float32)
    return np.rint(image).clip(-1024).astype(np.int16), label.astype(np.uint8)[canvas]


def head_mr(rng: Generator, *, size: Size = (96, 96, 96)) -> tuple[dict[str, Floats], Bytes]:
    """A head with a tumour in the contrasts t1, t1ce, t2 and flair, which share its anatomy, and its `MR_LABELS`.

    The images (d, h, w) hold whole numbers, as scanners write them: 0 outside the head, from 1 to about 1000 within.
    """
    names, (label, *shares) = list(MR_TISSUES), np.array(list(MR_TISSUES.values())).T
    xyz = pose(rng, size)
    head = paint(np.zeros(size, dtype=np.uint8), HEAD, xyz, names)
    cortex = paint(head, CORTEX, furrowed(rng, xyz), names)
    brain = paint(cortex, BRAIN + tumour(rng) + vary(rng, NUCLEI), xyz, names)
    canvas = np.where(
        head == names.index("fluid"), brain, head
    )  # the skull's inside is all the room there is
    texture, images = 0.015 * smooth_field(rng, size, 12), {}
    for (contrast, scale), share in zip(MR_SCALE.items(), shares):
        image = scan(rng, render(rng, canvas, share, texture), scale * rng.uniform(0.9, 1.1))
        images[contrast] = np.where(canvas > 0, np.rint(image).clip(1), 0).astype(np.float32)
    return images, label.astype(np.uint8)[canvas]


# --- files -----------------------------------------------------------------------------------------------------------


def write_phantoms(
    folder: Path,
    *,
    subjects: int = 3,
    validation: int = 1,
    test: int = 1,
    size: Size = (96, 96, 96),
    seed: int = 0,
) -> tuple[Path, Path, Path]:
    """Writes torsos and heads as `.nii.gz`, unless this very set is there already; returns the lists that name them.

    The lists are pretrain.json with each image by itself, ct_seg.json and mr_seg.json. `subjects` (to train on),
    `validation` and `test` count the torsos, and as many heads. A subject depends on the seed, its kind and its number
    alone: asking for more leaves the first ones as they were, byte for byte.
    """
    lists = folder / "pretrain.json", folder / "ct_seg.json", folder / "mr_seg.json"
    name = f"phantoms {VERSION}: {subjects} + {validation} + {test} of size {size}, seed {seed}"
    if all(file.is_file() and json.loads(file.read_text()).get("name") == name for file in lists):
        return lists
    folder.mkdir(parents=True, exist_ok=True)
    for file in lists:  # if this run is cut short, no list shall name what it has not written
        file.unlink(missing_ok=True)
    total = subjects + validation + test
    torsos = [write_torso(folder, number, size=size, seed=seed) for number in range(total)]
    heads = [write_head(folder, number, size=size, seed=seed) for number in range(total)]
    parts = slice(subjects), slice(subjects, total - test), slice(total - test, None)
    splits = dict(zip(("training", "validation", "test"), parts))
    for file, content in zip(lists, contents(torsos, heads, splits)):
        write_bytes(file, json.dumps({"name": name} | content, indent=1).encode())
    return lists


def write_torso(folder: Path, number: int, *, size: Size, seed: int) -> Case:
    """Writes one torso, its axes in RAS order, and returns its entry for a data list."""
    subject = f"ct_{number:03d}"
    image, label = body_ct(np.random.default_rng([seed, 0, number]), size=size)
    case = {
        "image": f"{subject}.nii.gz",
        "label": f"{subject}_label.nii.gz",
        "modality": "ct",
        "subject": subject,
    }
    write_bytes(folder / case["image"], nifti(image, "RAS"))
    write_bytes(folder / case["label"], nifti(label, "RAS"))
    return case


def write_head(folder: Path, number: int, *, size: Size, seed: int) -> Case:
    """Writes one head in all contrasts, in LPS order lest a reader count on RAS, and returns its entry."""
    subject = f"mr_{number:03d}"
    images, label = head_mr(np.random.default_rng([seed, 1, number]), size=size)
    files = {contrast: f"{subject}_{contrast}.nii.gz" for contrast in images}
    for contrast, image in images.items():
        write_bytes(folder / files[contrast], nifti(image, "LPS"))
    write_bytes(folder / f"{subject}_label.nii.gz", nifti(label, "LPS"))
    shown = {"image": list(files.values()), "modality": list(files)}
    return {**shown, "label": f"{subject}_label.nii.gz", "subject": subject}


def contents(
    torsos: list[Case], heads: list[Case], splits: dict[str, slice]
) -> list[dict[str, Any]]:
    """What the lists say: every image by itself, to pre-train on; torsos, to segment; heads, to segment."""
    ct, mr = ({split: cases[part] for split, part in splits.items()} for cases in (torsos, heads))
    alone = {
        split: ct[split] + [one for head in mr[split] for one in each_image(head)]
        for split in splits
    }
    del alone[
        "test"
    ]  # pre-training is not tested, and has no labels: 1 is one thing in CT and another in MR
    labels = {0: "background"}, CT_LABELS, MR_LABELS
    return [cases | {"labels": names} for cases, names in zip((alone, ct, mr), labels)]


def each_image(case: Case) -> list[Case]:
    """The entry of a subject of several images taken apart into one entry for each."""
    return [
        case | {"image": image, "modality": shown}
        for image, shown in zip(case["image"], case["modality"])
    ]


def nifti(volume: NDArray[Any], axes: str) -> bytes:
    """The volume (d, h, w) as a `.nii.gz` stored along other axes, such as "LPS", with the affine that says so."""
    affine = np.diag([SPACING, SPACING, SPACING, 1])
    affine[:3, 3] = -SPACING * (np.array(volume.shape) - 1) / 2  # the origin is in the middle
    image = nib.Nifti1Image(volume, affine).as_reoriented(axcodes2ornt(axes))
    image.header.set_xyzt_units("mm")
    return gzip.compress(
        image.to_bytes(), compresslevel=1, mtime=0
    )  # noise hardly shrinks, however long one tries
