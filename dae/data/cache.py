"""Each volume prepared once, kept as a plain array on disk, memory-mapped, and shared by all ranks, workers and runs.

A prepared volume lives in a folder named after what it was made from: the file's path, size and times, and the recipe.
Change any of them and it is made again. The time that a file claims can be set (`cp -p`, `touch`), so the file system's
own time of the last change counts as well.

Hashes of the voxels are kept with the volume: what was in the files can be compared without reading them again.

A folder appears whole or not at all (written aside, then renamed), so whoever comes first makes it, and nobody waits
for a lock that a killed process holds.

Ten thousand volumes do not hold ten thousand open files: a crop opens its file, copies its voxels, and lets go.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dae.config import InputError
from dae.data.datalist import Content, Item
from dae.data.preprocess import Recipe, prepare

FORMAT = 4  # of the folders below; counts up when what they hold changes
DTYPE = np.float16  # z-scores and [0, 1] to 3 digits, far below the noise of eq. 1, at half the room


class Cached(NamedTuple):
    """A prepared volume on disk, without an open file."""

    path: Path
    shape: tuple[int, ...]  # (c, d, h, w)
    background: tuple[float, ...]  # per channel
    spacing: tuple[float, ...]  # mm
    labels: tuple[int, ...] = ()  # values of the label map, if there is one
    content: Content = Content((), "", ())  # hashes of what was in the files

    def array(self) -> NDArray[np.float16]:
        """Memory-mapped, read-only; closed when the array goes."""
        return np.load(self.path / "image.npy", mmap_mode="r")

    def label(self) -> NDArray[np.uint8]:
        """(d, h, w), memory-mapped; of an item without a label an error."""
        return np.load(self.path / "label.npy", mmap_mode="r")

    def foreground(self) -> NDArray[np.int32]:
        return np.load(self.path / "foreground.npy", mmap_mode="r")


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dae"


def folder_of(item: Item, recipe: Recipe, root: Path) -> Path:
    """Where an item's prepared volume belongs. Raises InputError if a file is missing."""
    facts: list[object] = [FORMAT, asdict(recipe), item.intensity, item.channel]
    for path in (*item.image, *([item.label] if item.label else [])):
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        stat = path.stat()
        facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    return root / f"{item.image[0].name.split('.')[0]}-{key}"


def cached(item: Item, recipe: Recipe, root: Path) -> Cached:
    """The item's prepared volume, made now if nobody has made it yet."""
    folder = folder_of(item, recipe, root)
    if not (folder / "facts.json").is_file():
        _make(item, recipe, folder)
    facts = json.loads((folder / "facts.json").read_text())
    return Cached(folder, tuple(facts["shape"]), tuple(facts["background"]), tuple(facts["spacing"]),
                  tuple(facts["labels"]), _content(facts["content"]))  # fmt: skip


def _content(facts: dict[str, Any]) -> Content:
    return Content(tuple(facts["image"]), facts["label"], tuple(facts["spacing"]))


def _make(item: Item, recipe: Recipe, folder: Path) -> None:
    volume = prepare(item, recipe)
    assert volume.content is not None
    aside = folder.with_name(f".making-{folder.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        aside.mkdir(parents=True)
        np.save(aside / "image.npy", volume.data.astype(DTYPE))
        np.save(aside / "foreground.npy", volume.foreground)
        if volume.label is not None:
            np.save(aside / "label.npy", volume.label)
        facts = {
            "labels": [] if volume.label is None else np.unique(volume.label).tolist(),
            "shape": volume.data.shape, "background": volume.background.tolist(), "spacing": volume.spacing,
            "image": [str(path) for path in item.image], "content": volume.content._asdict(),
        }  # fmt: skip
        (aside / "facts.json").write_text(json.dumps(facts))
        if folder.exists() and not (folder / "facts.json").is_file():
            shutil.rmtree(folder)  # what an interrupted deletion left
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not (folder / "facts.json").is_file():  # else somebody was faster
            raise InputError(f"--cache-dir {folder.parent}: cannot write there ({error})") from error


def prepare_all(
    items: Sequence[Item], recipe: Recipe, root: Path, *, rank: int = 0, world: int = 1, threads: int = 1,
    quiet: bool = True,
) -> list[Cached]:  # fmt: skip
    """Every item's prepared volume, in order. Each rank makes its share, then what others have not made, from the end.

    No rank waits for another: a barrier would time out after minutes, and ten thousand volumes take hours. Raises
    InputError that names the first volume that cannot be used and says how many there are, or one whose number of
    channels is not that of the first.
    """
    for item in items:
        folder_of(item, recipe, root)  # a missing file is said before any work is done
    for left in root.glob(".making-*"):  # by processes that were killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    mine = list(range(rank, len(items), world))
    others = sorted(set(range(len(items))) - set(mine), reverse=True)

    def make(n: int) -> tuple[int, str] | None:
        try:
            cached(items[n], recipe, root)
        except InputError as error:
            return n, str(error)
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        made = pool.map(make, mine + others)
        bar = tqdm(made, "preparing volumes", len(items), disable=quiet or not sys.stderr.isatty(), leave=False)
        errors = sorted(error for error in bar if error is not None)
    if errors:
        more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0][1]}{more}")
    volumes = [cached(item, recipe, root) for item in items]
    for item, volume in zip(items, volumes):
        if volume.shape[0] != volumes[0].shape[0]:
            raise InputError(
                f"{item.image[0]}: {volume.shape[0]} channels, the first volume has {volumes[0].shape[0]}; "
                "one run takes one number of channels"
            )
    return volumes
