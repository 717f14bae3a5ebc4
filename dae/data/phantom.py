"""Synthetic bodies: a torso in CT and a head in four MR contrasts, with labels, made from tables of ellipsoids.

They stand in for real scans in the demo and in the tests. An anatomy is data: rows of `Shape`, painted one over the
other into a map of tissues; a tissue is a row of numbers, its label and its brightness in each contrast. Nobody would
diagnose from them, but they have what a network must learn to restore: nested layers, sharp edges, a left and a right.

Shapes live in a cube of [-1, 1] per axis, whatever its size in voxels. The axes are those of a NIfTI file in RAS order:
axis 0 points to the patient's right, axis 1 to the front, axis 2 to the head. Hardly a structure is thinner than a
tenth of a unit, five voxels of 96: a fourfold reduction erases thinner ones, and no model could be asked for them.
"""

import gzip
import json
import os
from collections.abc import Iterable, Sequence
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

Vector = tuple[float, float, float]
Size = tuple[int, int, int]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Tissues = dict[str, tuple[float, ...]]
Case = dict[str, Any]

VERSION = 1  # to be raised whenever the same seed gives other volumes
SPACING = 1.5  # mm
INF = float("inf")
SIDES = (-1, 1)  # left, right


class Shape(NamedTuple):
    """Where |x/a|^power + |y/b|^power + |z/c|^power < 1; one infinite radius makes a cylinder, two make a slab."""

    tissue: str
    centre: Vector
    radii: Vector
    power: float = 2.0  # 2 is an ellipsoid, 4 nearly a box
    slope: float = 0.0  # how far it sinks per unit towards the front
    over: str | None = None  # the one tissue it may cover; None is any
    depth: float = 0.0  # how far below the surface of that tissue it begins


# --- the torso -------------------------------------------------------------------------------------------------------

CT_LABELS = {
    0: "background", 1: "spleen", 2: "right kidney", 3: "left kidney", 4: "liver", 5: "stomach", 6: "aorta",
    7: "inferior vena cava",
}  # fmt: skip

CT_TISSUES: Tissues = {  # label, HU; vessels and kidneys are full of contrast agent, some bowel of a barium meal
    "air": (0, -1000), "table": (0, -350), "fat": (0, -110), "muscle": (0, 60), "rib": (0, 800), "bone": (0, 500),
    "disc": (0, 90), "cord": (0, 30), "cavity": (0, -90), "lung": (0, -820), "heart": (0, 200), "bowel": (0, 40),
    "gas": (0, -950), "meal": (0, 350), "bladder": (0, 5), "pancreas": (0, 100), "renal fat": (0, -80),
    "spleen": (1, 140), "right kidney": (2, 240), "left kidney": (3, 240), "liver": (4, 110), "stomach": (5, 25),
    "stomach gas": (5, -950), "aorta": (6, 300), "inferior vena cava": (7, 180),
}  # fmt: skip

TABLE = [Shape("table", (0, -0.80, 0), (0.80, 0.10, INF), power=8)]

TORSO = [
    Shape("fat", (0, 0.08, 0), (0.92, 0.76, INF), power=2.5),
    Shape("muscle", (0, 0.08, 0), (0.80, 0.64, INF), power=2.5),
    *[Shape("rib", (0, 0, z), (INF, INF, 0.065), slope=0.7, over="muscle") for z in np.arange(-0.15, 1.6, 0.27)],
    Shape("cavity", (0, 0.08, 0), (0.68, 0.52, INF), power=2.5),
    *[Shape("bone", (0.46 * side, -0.05, -0.95), (0.12, 0.42, 0.42)) for side in SIDES],
    Shape("bone", (0, -0.46, 0), (0.14, 0.13, INF)),
    Shape("disc", (0, -0.25, 0), (0.15, 0.14, INF)),
    *[Shape("bone", (0, -0.25, z), (0.17, 0.16, 0.10), power=4) for z in np.arange(-0.96, 1.1, 0.32)],
    Shape("cord", (0, -0.44, 0), (0.06, 0.06, INF)),
]

ORGANS = [
    *[Shape("lung", (0.37 * side, 0.06, 0.95), (0.32, 0.52, 0.62), power=2.5) for side in SIDES],
    Shape("heart", (-0.10, 0.25, 0.86), (0.30, 0.26, 0.28)),
    *[Shape("muscle", (0.27 * side, -0.26, -0.65), (0.11, 0.12, 0.60)) for side in SIDES],
    Shape("bladder", (0, 0.12, -0.98), (0.24, 0.24, 0.24)),
    Shape("spleen", (-0.53, -0.14, 0.30), (0.15, 0.24, 0.25)),
    Shape("liver", (0.36, 0.08, 0.30), (0.35, 0.42, 0.36)),
    Shape("liver", (0.02, 0.32, 0.30), (0.36, 0.22, 0.20)),
    Shape("stomach", (-0.33, 0.22, 0.34), (0.22, 0.26, 0.24)),
    Shape("stomach", (-0.15, 0.30, 0.10), (0.26, 0.17, 0.13)),
    Shape("stomach gas", (-0.33, 0.45, 0.34), (0.26, 0.17, 0.24), over="stomach"),
    Shape("pancreas", (-0.08, 0.06, 0.04), (0.30, 0.09, 0.09)),
    Shape("right kidney", (0.37, -0.18, -0.16), (0.15, 0.15, 0.26)),
    Shape("left kidney", (-0.38, -0.18, -0.06), (0.15, 0.15, 0.26)),
    *[Shape("renal fat", (0.30 * side, -0.13, -0.12), (0.08, 0.08, 0.11)) for side in SIDES],
    Shape("inferior vena cava", (0.12, -0.04, 0), (0.085, 0.075, INF)),
    Shape("aorta", (-0.07, -0.03, 0), (0.085, 0.085, INF)),
]

# --- the head --------------------------------------------------------------------------------------------------------

MR_LABELS = {
    0: "background", 1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter", 4: "ventricles", 5: "deep grey",
    6: "lesion", 7: "oedema",
}  # fmt: skip

MR_SCALE = {"t1": 800.0, "t1ce": 1000.0, "t2": 650.0, "flair": 450.0}  # what 1 in the table below becomes

MR_TISSUES: Tissues = {  # label, then t1, t1ce, t2, flair
    "air": (0, 0, 0, 0, 0), "fat": (0, 0.95, 0.95, 0.75, 0.75), "muscle": (0, 0.40, 0.42, 0.28, 0.35),
    "bone": (0, 0.06, 0.06, 0.06, 0.06), "eye": (0, 0.22, 0.22, 0.95, 0.20), "fluid": (1, 0.20, 0.20, 1.00, 0.14),
    "grey": (2, 0.50, 0.50, 0.62, 0.66), "white": (3, 0.78, 0.78, 0.42, 0.46), "ventricle": (4, 0.18, 0.18, 1.00, 0.12),
    "deep grey": (5, 0.60, 0.60, 0.52, 0.58), "oedema": (7, 0.55, 0.55, 0.82, 0.95), "rim": (6, 0.45, 1.00, 0.70, 0.82),
    "core": (6, 0.26, 0.28, 0.92, 0.45),
}  # fmt: skip

HEAD = [
    Shape("fat", (0, -0.25, -0.90), (0.60, 0.60, 0.70)),  # neck, nose, scalp
    Shape("fat", (0, 0.90, -0.44), (0.15, 0.14, 0.24)),
    Shape("fat", (0, -0.04, -0.02), (0.87, 0.94, 0.98)),
    Shape("muscle", (0, 0.08, -0.65), (0.56, 0.66, 0.38)),
    Shape("muscle", (0, -0.25, -0.90), (0.48, 0.48, 0.58)),
    Shape("bone", (0, -0.06, 0.10), (0.76, 0.82, 0.75)),
    Shape("bone", (0, 0.48, -0.60), (0.14, 0.30, 0.20)),  # nasal cavity and throat: air is as dark as bone
    Shape("bone", (0, 0.20, -0.80), (0.09, 0.09, 0.34)),
    *[Shape("eye", (0.32 * side, 0.60, -0.30), (0.16, 0.16, 0.16)) for side in SIDES],
    Shape("fluid", (0, -0.06, 0.10), (0.65, 0.71, 0.64)),
]

CORTEX = [
    *[Shape("grey", (0.32 * side, 0.10, -0.16), (0.22, 0.40, 0.24)) for side in SIDES],
    Shape("grey", (0, -0.06, 0.11), (0.57, 0.63, 0.55)),
]

BRAIN = [
    Shape("fluid", (0, -0.06, 0.30), (0.055, 0.80, 0.60)),  # parts the halves; the next row joins them again below
    Shape("grey", (0, -0.06, 0.04), (0.36, 0.36, 0.26)),
    Shape("white", (0, 0, 0), (INF, INF, INF), over="grey", depth=0.105),
    Shape("grey", (0, -0.38, -0.30), (0.42, 0.28, 0.22)),  # cerebellum and brain stem
    Shape("white", (0, -0.36, -0.30), (0.28, 0.15, 0.10)),
    Shape("white", (0, -0.10, -0.50), (0.13, 0.13, 0.55)),
]

NUCLEI = [
    *[Shape("deep grey", (0.22 * side, 0, 0), (0.11, 0.20, 0.12)) for side in SIDES],
    *[Shape("ventricle", (0.10 * side, -0.02, 0.15), (0.075, 0.28, 0.10)) for side in SIDES],
]

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
    return np.asarray(np.einsum("ij,j...->i...", to_atlas, grid(size)) + 0.03 * warp, dtype=np.float32)


def furrowed(rng: Generator, xyz: Floats) -> Floats:
    """The places (3, d, h, w), moved outwards along a winding net of lines, so that what is painted there has furrows.

    The lines are the zeros of a sum of waves over the *direction* from the origin: a furrow runs straight inwards,
    where one that wandered could cut a slice off the brain.
    """
    direction = xyz / np.linalg.norm(xyz, axis=0)
    waves = rng.standard_normal((12, 3), dtype=np.float32)
    waves *= 6.5 / np.linalg.norm(waves, axis=1, keepdims=True)
    height = sum(np.cos(np.einsum("i,i...->...", wave, direction) + rng.uniform(0, 2 * np.pi)) for wave in waves)
    return np.asarray(xyz / (1 - 0.22 * np.clip(1.5 - 0.75 * np.abs(height), 0, 1)), dtype=np.float32)


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
        shapes += [Shape("bowel", (x, y, z), (0.17, 0.17, 0.17)), Shape(str(content), (x, y, z), (0.11, 0.11, 0.11))]
    return vary(rng, shapes)


def tumour(rng: Generator) -> list[Shape]:
    """In one half of the brain a dead core, in a rim that takes up contrast agent, in white matter that has swollen."""
    x, y, z = rng.uniform((0.22, -0.30, 0.08), (0.32, 0.30, 0.28)).tolist()
    centre = (x * float(rng.choice(SIDES)), y, z)
    swelling = Shape("oedema", centre, (0.34, 0.34, 0.34), over="white")
    return [swelling, Shape("rim", centre, (0.21, 0.21, 0.21)), Shape("core", centre, (0.10, 0.10, 0.10))]


# --- from tables to images -------------------------------------------------------------------------------------------


def inside(shape: Shape, xyz: Floats) -> NDArray[np.bool_]:
    """Whether each place of `xyz` (3, d, h, w) lies in the shape: (d, h, w)."""
    x, y, z = xyz
    axes = zip((x, y, z + shape.slope * y if shape.slope else z), shape.centre, shape.radii)
    terms = [np.abs((along - centre) / radius) ** shape.power for along, centre, radius in axes if radius < INF]
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


def render(rng: Generator, canvas: Bytes, brightness: NDArray[np.float64], texture: Floats) -> Floats:
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
    canvas = np.where(body == names.index("cavity"), filled, body)  # an organ too large for the body is cut to fit
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
    canvas = np.where(head == names.index("fluid"), brain, head)  # the skull's inside is all the room there is
    texture, images = 0.015 * smooth_field(rng, size, 12), {}
    for (contrast, scale), share in zip(MR_SCALE.items(), shares):
        image = scan(rng, render(rng, canvas, share, texture), scale * rng.uniform(0.9, 1.1))
        images[contrast] = np.where(canvas > 0, np.rint(image).clip(1), 0).astype(np.float32)
    return images, label.astype(np.uint8)[canvas]


# --- files -----------------------------------------------------------------------------------------------------------


def write_phantoms(
    folder: Path, *, subjects: int = 3, validation: int = 1, test: int = 1, size: Size = (96, 96, 96), seed: int = 0
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
        put(file, json.dumps({"name": name} | content, indent=1).encode())
    return lists


def write_torso(folder: Path, number: int, *, size: Size, seed: int) -> Case:
    """Writes one torso, its axes in RAS order, and returns its entry for a data list."""
    subject = f"ct_{number:03d}"
    image, label = body_ct(np.random.default_rng([seed, 0, number]), size=size)
    case = {"image": f"{subject}.nii.gz", "label": f"{subject}_label.nii.gz", "modality": "ct", "subject": subject}
    put(folder / case["image"], nifti(image, "RAS"))
    put(folder / case["label"], nifti(label, "RAS"))
    return case


def write_head(folder: Path, number: int, *, size: Size, seed: int) -> Case:
    """Writes one head in all contrasts, in LPS order lest a reader count on RAS, and returns its entry."""
    subject = f"mr_{number:03d}"
    images, label = head_mr(np.random.default_rng([seed, 1, number]), size=size)
    files = {contrast: f"{subject}_{contrast}.nii.gz" for contrast in images}
    for contrast, image in images.items():
        put(folder / files[contrast], nifti(image, "LPS"))
    put(folder / f"{subject}_label.nii.gz", nifti(label, "LPS"))
    shown = {"image": list(files.values()), "modality": list(files)}
    return {**shown, "label": f"{subject}_label.nii.gz", "subject": subject}


def contents(torsos: list[Case], heads: list[Case], splits: dict[str, slice]) -> list[dict[str, Any]]:
    """What the lists say: every image by itself, to pre-train on; torsos, to segment; heads, to segment."""
    ct, mr = ({split: cases[part] for split, part in splits.items()} for cases in (torsos, heads))
    alone = {split: ct[split] + [one for head in mr[split] for one in each_image(head)] for split in splits}
    del alone["test"]  # pre-training is not tested, and has no labels: 1 is one thing in CT and another in MR
    labels = {0: "background"}, CT_LABELS, MR_LABELS
    return [cases | {"labels": names} for cases, names in zip((alone, ct, mr), labels)]


def each_image(case: Case) -> list[Case]:
    """The entry of a subject of several images taken apart into one entry for each."""
    return [case | {"image": image, "modality": shown} for image, shown in zip(case["image"], case["modality"])]


def nifti(volume: NDArray[Any], axes: str) -> bytes:
    """The volume (d, h, w) as a `.nii.gz` stored along other axes, such as "LPS", with the affine that says so."""
    affine = np.diag([SPACING, SPACING, SPACING, 1])
    affine[:3, 3] = -SPACING * (np.array(volume.shape) - 1) / 2  # the origin is in the middle
    image = nib.Nifti1Image(volume, affine).as_reoriented(axcodes2ornt(axes))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)  # noise hardly shrinks, however long one tries


def put(file: Path, content: bytes) -> None:
    """Writes a file in one stroke: if the run is cut short it is either whole or not there."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(file)
