"""Each volume is prepared once and kept as a plain array on disk, for all ranks, workers and runs.

A prepared volume has a folder named after what it was made from: the file's path, size and times,
and the recipe. Change any of them and it is made again. The time that a file claims can be set
(`cp -p`, `touch`), so the file system's own time of the last change counts as well. A folder is
atomic: it is written under another name, then renamed. Hashes of the voxels are kept in it, so that
two runs can compare what was in their files without reading them again.

A process that prepares a volume holds a lock on it, and the others go on to the next volume. The
system drops the lock of a killed process. On a file system without locks, a volume may be prepared
more than once, and is still whole.

Ten thousand volumes do not hold ten thousand open files: a crop opens its file, copies its voxels,
and closes it.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from tqdm import tqdm

from dae.data.datalist import Content, Item
from dae.data.nifti import read_grid
from dae.data.preprocess import Prepared, Recipe, prepare
from dae.errors import InputError

CACHE_FORMAT = 5  # of the folders below; counts up when what they hold changes

# Three digits of z-scores and of [0, 1]: far below the noise of eq. 1, in half the room.
DTYPE = np.float16

FOREGROUND = 4096 * 3 * 4  # bytes of the voxels that crops are centred on, at most
PATIENCE = 600.0  # seconds that a volume may take another process, before it is prepared here too
DAY = 86_400  # seconds, after which a lock or a half-made folder is that of a killed process


class Cached(NamedTuple):
    """A prepared volume on disk, without an open file."""

    path: Path
    shape: tuple[int, ...]  # (c, d, h, w)
    background: tuple[float, ...]  # per channel
    spacing: tuple[float, ...]  # mm
    labels: tuple[int, ...] = ()  # values of the label map, if there is one
    content: Content = Content((), "", ())  # hashes of what was in the files

    def array(self) -> NDArray[np.float16]:
        """(c, d, h, w), memory-mapped, read-only; the file is closed when the array is deleted."""
        return np.load(self.path / "image.npy", mmap_mode="r")

    def label(self) -> NDArray[np.uint8]:
        """(d, h, w), memory-mapped. Raises OSError where the item has no label."""
        return np.load(self.path / "label.npy", mmap_mode="r")

    def foreground(self) -> NDArray[np.int32]:
        """(n, 3), voxels to centre crops on, memory-mapped."""
        return np.load(self.path / "foreground.npy", mmap_mode="r")


# --- one volume -----------------------------------------------------------------------------------


def default_folder() -> Path:
    """Where prepared volumes are kept without --cache-dir."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dae"


def folder_of(item: Item, recipe: Recipe, root: Path) -> Path:
    """Where an item's prepared volume belongs. Raises InputError if a file is missing."""
    made_from: list[object] = [CACHE_FORMAT, asdict(recipe), item.intensity, item.channel]
    files = list(item.image)
    if item.label:
        files.append(item.label)

    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        stat = path.stat()
        made_from.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])

    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:20]
    name = item.image[0].name.split(".")[0]
    return root / f"{name[:40]}-{key}"  # so that no name is too long; the key tells all apart


def cached(item: Item, recipe: Recipe, root: Path) -> Cached:
    """The item's prepared volume, made now unless it is there."""
    folder = folder_of(item, recipe, root)
    if not is_complete(folder):
        make(item, recipe, folder)
    return read(folder)


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a prepared volume: facts.json is the last file to be written.

    A power failure may leave an empty one.
    """
    facts = folder / "facts.json"
    return facts.is_file() and facts.read_bytes().endswith(b"}")


def read(folder: Path) -> Cached:
    """A prepared volume, by its facts.json."""
    metadata: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    content = metadata["content"]
    return Cached(
        folder,
        tuple(metadata["shape"]),
        tuple(metadata["background"]),
        tuple(metadata["spacing"]),
        tuple(metadata["labels"]),
        Content(tuple(content["image"]), content["label"], tuple(content["spacing"])),
    )


def make(item: Item, recipe: Recipe, folder: Path) -> None:
    """Prepare a volume and write its folder. Raises InputError where it cannot be written."""
    volume = prepare(item, recipe)

    # A name that no other process has, on this machine or another one.
    aside = folder.with_name(f".making-{folder.name}-{uuid.uuid4().hex[:12]}")
    try:
        aside.mkdir(parents=True)
        write(volume, item, aside)
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)  # what an interrupted deletion left
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_complete(folder):  # else another process was faster
            raise InputError(
                f"--cache-dir {folder.parent}: cannot write there ({error})"
            ) from error


def write(volume: Prepared, item: Item, folder: Path) -> None:
    """The files of a prepared volume, into a folder that is there."""
    assert volume.content is not None  # `prepare` has read the files

    np.save(folder / "image.npy", volume.data.astype(DTYPE))
    np.save(folder / "foreground.npy", volume.foreground)
    labels = []
    if volume.label is not None:
        np.save(folder / "label.npy", volume.label)
        labels = np.unique(volume.label).tolist()

    metadata = {
        "labels": labels,
        "shape": volume.data.shape,
        "background": volume.background.tolist(),
        "spacing": volume.spacing,
        "image": [str(path) for path in item.image],
        "content": volume.content._asdict(),
    }
    (folder / "facts.json").write_text(json.dumps(metadata))


# --- the right to prepare a volume ----------------------------------------------------------------


@contextmanager
def claimed(folder: Path, *, patience: float) -> Iterator[bool]:
    """Whether the volume of `folder` is this thread's to prepare; False while another one does it.

    Waits for the other one up to `patience` seconds, then goes on without the lock: a machine that
    is gone may hold it. True, without a lock, where the file system has none.
    """
    path = folder.with_name(f".lock-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield True  # what is wrong with the folder is said when the volume is written
        return

    with file:
        locked = lock(file, patience)
        try:
            yield locked or patience > 0
        finally:
            if locked:
                path.unlink(missing_ok=True)


def lock(file: IO[str], patience: float) -> bool:
    """Whether the lock was got within `patience` seconds; True where there are no locks."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        except OSError:  # a file system without locks
            return True
        time.sleep(0.2)


def remove_if_old(path: Path) -> None:
    """Remove a lock or a half-made folder of a killed process."""
    try:
        if time.time() - path.stat().st_mtime < DAY:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        pass  # another process has just removed it


# --- the room on the disk -------------------------------------------------------------------------


def room_for(item: Item, recipe: Recipe) -> int:
    """Bytes that a prepared volume takes, by its header; cut to its foreground, at most that many.

    0 where the header cannot be read: what is wrong with the file is said when it is prepared.
    """
    voxels = 0
    channels = 0
    for path in item.image:
        try:
            grid = read_grid(path)
            shape = nib.load(path).shape
        except InputError:
            return 0

        voxels = math.prod(grid.shape)
        if recipe.spacing:
            voxels = 1
            for n, old, new in zip(grid.shape, voxel_sizes(grid.affine), recipe.spacing):
                voxels *= round(n * old / new)

        has_channels = len(shape) > 3 and item.channel is None
        channels += shape[3] if has_channels else 1

    image = voxels * channels * np.dtype(DTYPE).itemsize
    label = voxels if item.label else 0
    return image + label + FOREGROUND


def check_room(
    items: Sequence[Item], recipe: Recipe, root: Path, *, free: int, quiet: bool
) -> None:
    """Say how much of `free` bytes the volumes to be prepared take.

    Raises InputError where they do not fit.
    """
    with ThreadPoolExecutor(8) as pool:
        needed = sum(pool.map(lambda item: room_for(item, recipe), items))

    # What is cut to its foreground, by half along each axis, still takes an eighth.
    least = needed // 8 if recipe.foreground_crop else needed
    bound = "up to" if recipe.foreground_crop else "about"
    text = (
        f"{len(items)} of them take {bound} {in_bytes(needed)} in {root}, "
        f"where {in_bytes(free)} are free"
    )
    if free < least:
        raise InputError(f"--cache-dir: volumes to prepare: {text}; name a folder on a larger disk")
    if not quiet:
        print(f"preparing volumes: {text}", file=sys.stderr, flush=True)


def in_bytes(number: int) -> str:
    """1234567 -> 1.2 MB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1000:.1f} kB"


def free_in(root: Path) -> int:
    """Bytes free on the disk where `root` is, or will be made."""
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- all volumes of a run -------------------------------------------------------------------------


def prepare_all(
    items: Sequence[Item],
    recipe: Recipe,
    root: Path,
    *,
    rank: int = 0,
    world: int = 1,
    threads: int = 1,
    quiet: bool = True,
) -> list[Cached]:
    """Every item's prepared volume, in order; what is not there yet is made by all ranks together.

    Each rank makes its share, then what the others have not made, from the end. Ranks meet at no
    barrier, which would time out where ten thousand volumes take hours. At the end a rank may wait
    for the last volumes of others.

    Raises InputError where the disk has too little room, where volumes cannot be used (naming the
    first, with their number), and where one has not as many channels as the first.
    """
    # A missing file is said before any work is done.
    folders = [folder_of(item, recipe, root) for item in items]

    for pattern in (".making-*", ".lock-*"):
        for path in root.glob(pattern):
            remove_if_old(path)

    # Free bytes first, folders second: what other ranks write between the two must not count twice.
    free = free_in(root)
    absent: dict[Path, int] = {}  # folder -> number of an item that it is made from
    for n, folder in enumerate(folders):
        if not is_complete(folder):
            absent[folder] = n

    if absent:
        numbers = list(absent.values())
        check_room([items[n] for n in numbers], recipe, root, free=free, quiet=quiet)

        errors = make_all(
            {n: (items[n], folders[n]) for n in numbers},
            recipe,
            in_turn(sorted(numbers), rank=rank, world=world),
            threads=threads,
            quiet=quiet,
        )
        if errors:
            more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
            raise InputError(f"{errors[min(errors)]}{more}")

    volumes = [read(folder) for folder in folders]
    check_channels(items, volumes)
    return volumes


def make_all(
    absent: Mapping[int, tuple[Item, Path]],
    recipe: Recipe,
    order: Sequence[int],
    *,
    threads: int,
    quiet: bool,
) -> dict[int, str]:
    """Make the absent volumes, number -> (item, folder), in this order; what is wrong with any."""
    errors: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, threads)) as pool:
        reasons = pool.map(try_to_make, [absent[n] for n in order], repeat(recipe), repeat(0.0))
        bar = tqdm(
            zip(order, reasons),
            "preparing volumes",
            len(order),
            disable=quiet or not sys.stderr.isatty(),
            leave=False,
        )
        for n, reason in bar:
            if reason:
                errors[n] = reason

        # Some are being made by other ranks: wait for those, and make them here if that fails.
        late = []
        for n, (_, folder) in absent.items():
            if n not in errors and not is_complete(folder):
                late.append(n)
        reasons = pool.map(try_to_make, [absent[n] for n in late], repeat(recipe), repeat(PATIENCE))
        for n, reason in zip(late, reasons):
            if reason:
                errors[n] = reason

    return errors


def try_to_make(volume: tuple[Item, Path], recipe: Recipe, patience: float) -> str:
    """Make a volume unless another process does, for `patience` seconds; what is wrong with it."""
    item, folder = volume
    try:
        if not is_complete(folder):
            with claimed(folder, patience=patience) as mine:
                if mine and not is_complete(folder):
                    make(item, recipe, folder)
    except InputError as error:
        return str(error)
    return ""


def in_turn(numbers: Sequence[int], *, rank: int, world: int) -> list[int]:
    """A rank's own share of the numbers, then those of the ranks after it, each from its end."""
    order = [n for n in numbers if n % world == rank]
    for k in range(1, world):
        share = [n for n in numbers if n % world == (rank + k) % world]
        order += reversed(share)
    return order


def check_channels(items: Sequence[Item], volumes: Sequence[Cached]) -> None:
    """Raises InputError where a volume has not as many channels as the first."""
    for item, volume in zip(items, volumes):
        channels = volume.shape[0]
        first = volumes[0].shape[0]
        if channels != first:
            raise InputError(
                f"{item.image[0]}: {channels} channels, the first volume has {first}; "
                "one run takes one number of channels"
            )
