"""Bodies in which brightness alone does not tell one organ from another.

The demo's phantoms are too easy to compare methods on. Each of their organs has a brightness of its
own, so that a threshold finds it, and a network of any weights learns that from a single body.

Here all organs of the torso, and all soft tissue around them, share one range of brightness, drawn
anew for each body. What tells them apart is what a network has to learn: the grain of the tissue
(fine, coarse, or drawn out along an axis), the shape, and the place. Loops of bowel, the pancreas,
the heart and the muscles share their grain with organs and are none. Organs have cysts that look
like nothing else. Bodies, and the scanners that see them, differ far more than in the demo, so
that a few labelled ones do not show what the others are like.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from dae.demo.anatomy import CT_TISSUES, MR_SCALE, ORGANS, TABLE, TORSO, Shape, Vector
from dae.demo.phantom import (
    Bytes,
    Entry,
    Floats,
    Size,
    bowel,
    check_lists,
    grid,
    head_mr,
    inside,
    is_of_phantoms,
    name_of_list,
    nifti,
    paint,
    pose,
    remove_lists,
    vary,
    write_ct,
)
from dae.errors import InputError
from dae.files import write_bytes

CLAIMED = ".phantoms.json"  # in the folder: the names of all files there that are phantoms
VERSION = 1  # to be raised whenever the same seed gives other volumes

# Both kidneys are one organ here. Networks learn late which side is which, and until then one of
# the kidneys has a Dice of 0: a comparison would show little more than when each run got there.
LABELS = {
    0: "background",
    1: "spleen",
    2: "kidneys",
    3: "liver",
    4: "stomach",
    5: "aorta",
    6: "inferior vena cava",
}
PARTS = {"right kidney": "kidneys", "left kidney": "kidneys", "stomach gas": "stomach"}

# --- what tells tissues apart ---------------------------------------------------------------------

# fmt: off
# The grain of a tissue: the standard deviations, in voxels along d h w, of the Gaussian that white
# noise is smoothed with. None is smooth.
GRAINS: dict[str, Vector] = {
    "fine":   (0.7, 0.7, 0.7),
    "coarse": (1.7, 1.7, 1.7),
    "d":      (2.5, 0.6, 0.6),
    "h":      (0.6, 2.5, 0.6),
    "w":      (0.6, 0.6, 2.5),
}

GRAIN_OF = {
    "liver": "fine",     "heart": "fine",
    "spleen": "coarse",  "pancreas": "coarse",
    "stomach": "d",      "bowel": "h",          "muscle": "h",
    "right kidney": "w", "left kidney": "w",
}
# fmt: on

# Tissues that share one range of brightness; the others keep that of the demo.
SOFT = (*GRAIN_OF, "aorta", "inferior vena cava", "bladder", "meal")

# Drawn anew for each body, or each scan: a few bodies do not show how far others differ.
SOFT_HU = (-20.0, 160.0)  # for each of the tissues
FAT_HU = (-140.0, -60.0)
GRAIN_HU = (25.0, 60.0)  # the standard deviation of a grain
NOISE_HU = (10.0, 60.0)
BLUR = (0.4, 1.0)  # standard deviation, in voxels
CYST_HU = (-100.0, 250.0)


def grain(rng: Generator, size: Size, sigma: Vector) -> Floats:
    """White noise (d, h, w), smoothed by `sigma` voxels, without what is slower than twice that.

    Of mean 0 and standard deviation 1.
    """
    white = rng.standard_normal(size, dtype=np.float32)
    field = gaussian_filter(white, sigma) - gaussian_filter(white, [2 * s for s in sigma])
    return np.asarray(field / field.std(), dtype=np.float32)


def cysts(rng: Generator, organs: Bytes, image: Floats) -> Floats:
    """The image (d, h, w) with up to six balls of another brightness in its organs."""
    image = image.copy()
    xyz = grid(image.shape)
    voxels = np.argwhere(organs)
    for _ in range(rng.integers(2, 7)):
        d, h, w = rng.choice(voxels)
        x, y, z = xyz[:, d, h, w].tolist()
        radius = rng.uniform(0.05, 0.11)
        ball = inside(Shape("", (x, y, z), (radius, radius, radius)), xyz) & (organs > 0)
        image[ball] = rng.uniform(*CYST_HU)
    return image


def label_of(tissue: str) -> int:
    """The label of a tissue; 0 where it is no organ."""
    organ = PARTS.get(tissue, tissue)
    for label, name in LABELS.items():
        if name == organ:
            return label
    return 0


# --- bodies ---------------------------------------------------------------------------------------


def hard_ct(rng: Generator, *, size: Size) -> tuple[NDArray[np.int16], Bytes]:
    """A torso as `body_ct` makes it, and its LABELS; (d, h, w) each, the image in HU."""
    names = list(CT_TISSUES)
    label = np.array([label_of(name) for name in names], dtype=np.uint8)
    hu = np.array([hu for _, hu in CT_TISSUES.values()], dtype=np.float64)

    xyz = pose(rng, size, turn=15, scale=(0.8, 1.08), warp=0.07)
    air = np.zeros(size, dtype=np.uint8)
    room = paint(air, TABLE, grid(size), names)
    body = paint(room, TORSO, xyz, names)
    filled = paint(body, bowel(rng) + vary(rng, ORGANS, move=0.09, grow=0.3), xyz, names)
    canvas = np.where(body == names.index("cavity"), filled, body)
    organs = label[canvas]

    brightness = hu.copy()
    for name in SOFT:
        brightness[names.index(name)] = rng.uniform(*SOFT_HU)
    for name in ("fat", "cavity", "renal fat"):
        brightness[names.index(name)] = rng.uniform(*FAT_HU)

    image = brightness.astype(np.float32)[canvas]
    strength = rng.uniform(*GRAIN_HU)
    grains = {name: grain(rng, size, sigma) for name, sigma in GRAINS.items()}
    for tissue, name in GRAIN_OF.items():
        here = canvas == names.index(tissue)
        image[here] += strength * grains[name][here]
    image = cysts(rng, organs, image)

    image = gaussian_filter(image, sigma=rng.uniform(*BLUR), truncate=3)
    image += rng.uniform(*NOISE_HU) * rng.standard_normal(size, dtype=np.float32)
    return np.rint(image).clip(-1024).astype(np.int16), organs


def hard_mr(rng: Generator, *, size: Size) -> dict[str, Floats]:
    """A head in the contrasts of `head_mr`, with grain in its tissues and more noise."""
    images, label = head_mr(rng, size=size)
    texture = np.zeros(size, dtype=np.float32)
    for tissue, sigma in enumerate(GRAINS.values(), start=2):
        here = label == tissue
        texture[here] = 0.08 * grain(rng, size, sigma)[here]

    result = {}
    for contrast, image in images.items():
        noise = 0.03 * image.max() * rng.standard_normal(size, dtype=np.float32)
        seen = image * (1 + texture) + noise
        result[contrast] = np.where(image > 0, np.rint(seen).clip(1), 0).astype(np.float32)
    return result


# --- files ----------------------------------------------------------------------------------------


def progress(numbers: range, what: str) -> Iterable[int]:
    """The numbers, with a progress bar on a terminal."""
    return tqdm(numbers, what, disable=not sys.stderr.isatty())


class HardLists(NamedTuple):
    """The data lists of the hard phantoms."""

    pretrain: Path  # every image by itself: torsos with and without labels, and heads
    ct_seg: Path  # torsos with their labels


def write_hard_phantoms(
    folder: Path,
    *,
    subjects: int,
    validation: int,
    test: int,
    unlabelled: int = 0,
    heads: int = 0,
    size: Size = (56, 56, 56),
    seed: int = 0,
) -> HardLists:
    """Write torsos and heads as `.nii.gz`, unless this very set is there, and lists that name them.

    `subjects` (to train on), `validation`, `test` and `unlabelled` count torsos; the last are for
    pre-training alone, as are all heads, of which one in ten is held out. Pre-training never sees a
    torso of the test. A subject depends on the seed, its modality and its number alone.

    Raises InputError where a file would be replaced that is not of phantoms.
    """
    lists = HardLists(folder / "pretrain.json", folder / "ct_seg.json")
    counts = f"{subjects} + {validation} + {test} + {unlabelled} torsos, {heads} heads"
    name = f"hard phantoms {VERSION}: {counts} of size {size}, seed {seed}"
    if all(name_of_list(path) == name for path in lists):
        return lists

    check_lists(lists)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, lists, file_names(subjects + validation + test + unlabelled, heads))
    remove_lists(lists)

    # Numbered from the test on, so that more subjects to train on leave the test as it was.
    parts: dict[str, list[Entry]] = {}
    number = 0
    for split, count in (
        ("test", test),
        ("validation", validation),
        ("training", subjects),
        ("unlabelled", unlabelled),
    ):
        numbers = range(number, number + count)
        parts[split] = [
            write_torso(folder, n, size=size, seed=seed) for n in progress(numbers, split)
        ]
        number += count

    images: list[Entry] = []
    for n in progress(range(heads), "heads"):
        images += write_head(folder, n, size=size, seed=seed)
    held_out = 4 * (heads // 10)

    pretrain = {
        "training": [*parts["training"], *parts["unlabelled"], *images[held_out:]],
        "validation": [*parts["validation"], *images[:held_out]],
        "labels": {0: "background"},
    }
    ct_seg = {
        "training": parts["training"],
        "validation": parts["validation"],
        "test": parts["test"],
        "labels": LABELS,
    }
    for path, content in zip(lists, (pretrain, ct_seg)):
        write_bytes(path, json.dumps({"name": name} | content, indent=1).encode())
    return lists


def file_names(torsos: int, heads: int) -> list[str]:
    """Of all volumes that so many torsos and heads have."""
    names = []
    for n in range(torsos):
        names += [f"ct_{n:03d}.nii.gz", f"ct_{n:03d}_label.nii.gz"]
    for n in range(heads):
        names += [f"mr_{n:03d}_{contrast}.nii.gz" for contrast in MR_SCALE]
    return names


def claim(folder: Path, lists: Iterable[Path], names: Sequence[str]) -> None:
    """Note in CLAIMED that files of these names are phantoms, before any of them is written.

    So a run that was cut short, which has no list yet, knows its own files, and those of earlier
    phantoms in the folder. Raises InputError, and notes nothing, where a file is there that neither
    CLAIMED nor a list of phantoms names: it is the user's.
    """
    ours = files_claimed(folder / CLAIMED)
    for path in lists:
        ours |= files_of_list(path)
    for name in names:
        if name not in ours and (folder / name).exists():
            raise InputError(
                f"{folder / name}: is there already, and no list of phantoms names it; name "
                "another folder, or move it away"
            )
    write_bytes(folder / CLAIMED, json.dumps(sorted(ours.union(names)), indent=0).encode())


def files_claimed(path: Path) -> set[str]:
    """What `claim` has noted; nothing where that cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return set()
    return set(map(str, content)) if isinstance(content, list) else set()


def files_of_list(path: Path) -> set[str]:
    """The files that a list of phantoms names; nothing where it is none."""
    if not is_of_phantoms(path):
        return set()
    content = json.loads(path.read_text(encoding="utf-8"))
    names = set[str]()
    for split in ("training", "validation", "test"):
        for entry in content.get(split, []):
            images = entry["image"]
            names.update([images] if isinstance(images, str) else images)
            if "label" in entry:
                names.add(entry["label"])
    return names


def write_torso(folder: Path, number: int, *, size: Size, seed: int) -> Entry:
    """Write one torso and return its entry for a data list."""
    image, label = hard_ct(np.random.default_rng([seed, 2, number]), size=size)
    return write_ct(folder, f"ct_{number:03d}", image, label)


def write_head(folder: Path, number: int, *, size: Size, seed: int) -> list[Entry]:
    """Write one head in all contrasts and return an entry for each, without labels."""
    subject = f"mr_{number:03d}"
    images = hard_mr(np.random.default_rng([seed, 3, number]), size=size)

    entries: list[Entry] = []
    for contrast, image in images.items():
        file = f"{subject}_{contrast}.nii.gz"
        write_bytes(folder / file, nifti(image, "LPS"))
        entries.append({"image": file, "modality": contrast, "subject": subject})
    return entries
