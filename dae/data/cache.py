"""Each volume prepared once, kept as a plain array on disk, memory-mapped, and shared by all ranks, workers and runs.

A prepared volume lives in a folder named after what it was made from: the file's path, size and times, and the recipe.
Change any of them and it is made again. The time that a file claims can be set (`cp -p`, `touch`), so the file system's
own time of the last change counts as well. A folder appears whole or not at all (written aside, then renamed).

Hashes of the voxels are kept with the volume: what was in the files can be compared without reading them again.

Who prepares a volume holds a lock on it, and the others go on to the next one. The system drops the
lock of a killed process. Where a file system has no locks, a volume may be prepared more than once,
and is still whole.

Ten thousand volumes do not hold ten thousand open files: a crop opens its file, copies its voxels, and lets go.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from tqdm import tqdm

from dae.data.datalist import Content, Item
from dae.data.nifti import read_grid
from dae.data.preprocess import Recipe, prepare
from dae.errors import InputError

FORMAT = 4  # of the folders below; counts up when what they hold changes
DTYPE = (
    np.float16
)  # z-scores and [0, 1] to 3 digits, far below the noise of eq. 1, at half the room
PATIENCE = 600.0  # seconds that a volume may take another process, before it is prepared here too


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
    if not is_made(folder):
        _make(item, recipe, folder)
    return _read(folder)


def is_made(folder: Path) -> bool:
    return (folder / "facts.json").is_file()


def _read(folder: Path) -> Cached:
    facts = json.loads((folder / "facts.json").read_text())
    return Cached(
        folder,
        tuple(facts["shape"]),
        tuple(facts["background"]),
        tuple(facts["spacing"]),
        tuple(facts["labels"]),
        _content(facts["content"]),
    )


def _content(facts: dict[str, Any]) -> Content:
    return Content(tuple(facts["image"]), facts["label"], tuple(facts["spacing"]))


def _make(item: Item, recipe: Recipe, folder: Path) -> None:
    volume = prepare(item, recipe)
    assert volume.content is not None
    # A name that no other process has, on this machine or another one.
    aside = folder.with_name(f".making-{folder.name}-{uuid.uuid4().hex[:12]}")
    try:
        aside.mkdir(parents=True)
        np.save(aside / "image.npy", volume.data.astype(DTYPE))
        np.save(aside / "foreground.npy", volume.foreground)
        if volume.label is not None:
            np.save(aside / "label.npy", volume.label)
        facts = {
            "labels": [] if volume.label is None else np.unique(volume.label).tolist(),
            "shape": volume.data.shape,
            "background": volume.background.tolist(),
            "spacing": volume.spacing,
            "image": [str(path) for path in item.image],
            "content": volume.content._asdict(),
        }
        (aside / "facts.json").write_text(json.dumps(facts))
        if folder.exists() and not is_made(folder):
            shutil.rmtree(folder)  # what an interrupted deletion left
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_made(folder):  # else somebody was faster
            raise InputError(
                f"--cache-dir {folder.parent}: cannot write there ({error})"
            ) from error


@contextmanager
def claimed(folder: Path, *, patience: float) -> Iterator[bool]:
    """Whether the volume of `folder` is this thread's to prepare; False where another one is at it.

    Waits for the other one up to `patience` seconds, then goes on without the lock: a machine that is
    gone may hold it. True, without a lock, where the file system has none.
    """
    path = folder.with_name(f".lock-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError:
        yield True  # what is wrong with the folder is said by who writes there
        return
    with lock:
        free = _lock(lock, patience)
        try:
            yield free or patience > 0
        finally:
            if free:
                path.unlink(missing_ok=True)


def _lock(file: IO[str], patience: float) -> bool:
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


def room_for(item: Item, recipe: Recipe) -> int:
    """Bytes that a prepared volume takes, by its header; cut to its foreground, at most that many.

    0 where the header cannot be read: what is wrong with the file is said when it is prepared.
    """
    voxels, channels = 0, 0
    for path in item.image:
        try:
            grid, shape = read_grid(path), nib.load(path).shape
        except InputError:
            return 0
        mm = voxel_sizes(grid.affine)
        if recipe.spacing:
            voxels = math.prod(
                round(n * old / new) for n, old, new in zip(grid.shape, mm, recipe.spacing)
            )
        else:
            voxels = math.prod(grid.shape)
        channels += shape[3] if len(shape) > 3 and item.channel is None else 1
    places = 4096 * 3 * 4  # of some foreground
    return voxels * (channels * np.dtype(DTYPE).itemsize + (item.label is not None)) + places


def check_room(
    items: Sequence[Item], recipe: Recipe, root: Path, *, free: int, quiet: bool
) -> None:
    """Say how much of `free` bytes the volumes to be prepared take.

    Raises InputError where they do not fit.
    """
    with ThreadPoolExecutor(8) as pool:
        needed = sum(pool.map(lambda item: room_for(item, recipe), items))
    bound = "up to" if recipe.foreground_crop else "about"
    text = f"{len(items)} of them take {bound} {in_bytes(needed)} in {root}, where {in_bytes(free)} are free"
    # What is cut to its foreground, by half along each axis, still takes an eighth.
    if free < (needed // 8 if recipe.foreground_crop else needed):
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
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


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
    """Every item's prepared volume, in order. Each rank makes its share, then what others have not made, from the end.

    Ranks meet at no barrier, which would time out where ten thousand volumes take hours. At the end one
    may wait for the last volumes of others.

    Raises InputError where the disk has too little room, where volumes cannot be used (naming the first,
    with their number), and where one has not as many channels as the first.
    """
    # A missing file is said before any work is done.
    folders = [folder_of(item, recipe, root) for item in items]
    for name in (".making-*", ".lock-*"):  # of processes that were killed
        for left in root.glob(name):
            _remove_if_old(left)
    free = free_in(root)  # before the look at what is there: what others write must not count twice
    absent = {folder: n for n, folder in enumerate(folders) if not is_made(folder)}
    if absent:
        check_room([items[n] for n in absent.values()], recipe, root, free=free, quiet=quiet)

    def make(n: int, patience: float = 0) -> tuple[int, str] | None:
        """Make item n, unless somebody else is at it and patience is at an end; n and what is wrong, if anything."""
        try:
            if not is_made(folders[n]):
                with claimed(folders[n], patience=patience) as mine:
                    if mine and not is_made(folders[n]):
                        _make(items[n], recipe, folders[n])
        except InputError as error:
            return n, str(error)
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        made = pool.map(make, in_turn(sorted(absent.values()), rank=rank, world=world))
        bar = tqdm(
            made,
            "preparing volumes",
            len(absent),
            disable=quiet or not sys.stderr.isatty(),
            leave=False,
        )
        errors = [error for error in bar if error is not None]
        failed = {n for n, _ in errors}
        # What others were at: wait for it, and do it if they do not.
        late = [n for folder, n in absent.items() if n not in failed and not is_made(folder)]
        errors += [
            error for error in pool.map(lambda n: make(n, PATIENCE), late) if error is not None
        ]
    if errors:
        more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise InputError(f"{min(errors)[1]}{more}")
    volumes = [_read(folder) for folder in folders]
    for item, volume in zip(items, volumes):
        if volume.shape[0] != volumes[0].shape[0]:
            raise InputError(
                f"{item.image[0]}: {volume.shape[0]} channels, the first volume has {volumes[0].shape[0]}; "
                "one run takes one number of channels"
            )
    return volumes


def in_turn(numbers: Sequence[int], *, rank: int, world: int) -> list[int]:
    """A rank's own share of the numbers, then those of the ranks after it, each from its end."""
    shares = [[n for n in numbers if n % world == (rank + k) % world] for k in range(world)]
    return shares[0] + [n for share in shares[1:] for n in reversed(share)]


def _remove_if_old(path: Path) -> None:
    """Another process may be at the same."""
    try:
        if time.time() - path.stat().st_mtime < 86_400:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        pass
