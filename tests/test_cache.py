"""dae/data/cache.py: a volume is prepared once, atomically, and again when its file changes."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import numpy as np
import pytest

from dae.data import cache
from dae.data.augment import random_crop
from dae.data.cache import Cached, cached, folder_of, in_bytes, prepare_all, room_for
from dae.data.datalist import Content, Item
from dae.data.preprocess import Prepared, Recipe, prepare
from dae.errors import InputError

RECIPE = Recipe()
SIZE = (6, 7, 8)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def save(path: Path, x: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(x, affine), path)
    return path


def make_item(folder: Path, name: str = "a", seed: int = 0, intensity: str = "mr") -> Item:
    x = np.random.default_rng(seed).uniform(1, 9, SIZE).astype(np.float32)
    path = save(folder / f"{name}.nii", x)
    return Item((path,), ("t1",), (intensity,), name)


def make_items(folder: Path, count: int) -> list[Item]:
    return [make_item(folder, f"v{n}", seed=n) for n in range(count)]


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return make_item(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """The items whose files were really read, in order."""
    items: list[Item] = []

    def counting(item: Item, recipe: Recipe) -> Prepared:
        items.append(item)
        return prepare(item, recipe)

    monkeypatch.setattr(cache, "prepare", counting)
    return items


def in_another_process(work: Callable[..., object], *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def die(*_: object) -> NoReturn:
    os._exit(9)


# --- once, and again when something changes -------------------------------------------------------


def test_the_disk_holds_what_was_prepared_in_half_precision(item: Item, root: Path) -> None:
    expected = prepare(item, RECIPE)
    volume = cached(item, RECIPE, root)
    assert np.array_equal(volume.array(), expected.data.astype(np.float16))
    assert not volume.array().flags.writeable
    assert np.array_equal(volume.foreground(), expected.foreground)
    assert volume.shape == (1, *SIZE)
    assert volume.spacing == (1, 2, 3)
    assert volume.background == pytest.approx(expected.background)
    assert list(root.iterdir()) == [volume.path]  # and nothing beside it


def test_a_second_call_does_not_read_the_file(item: Item, root: Path, prepared: list[Item]) -> None:
    first = prepare_all([item], RECIPE, root)
    second = prepare_all([item], RECIPE, root)
    assert first == second
    assert prepared == [item]


def make_again(item: Item, **options: Any) -> Item:
    """The item's file with the same size and times, but other voxels or another intensity."""
    (path,) = item.image
    stat = path.stat()
    changed = make_item(path.parent, **options)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return changed


@pytest.mark.parametrize("change", ["content", "time", "size", "recipe", "intensity"])
def test_a_change_of_the_file_or_the_recipe_makes_it_again(
    change: str, item: Item, root: Path, prepared: list[Item]
) -> None:
    before = cached(item, RECIPE, root)
    recipe = RECIPE
    (path,) = item.image
    stat = path.stat()

    if change == "content":
        item = make_again(item, seed=1)
    elif change == "intensity":
        item = make_again(item, intensity="percentile")
    elif change == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        recipe = Recipe(spacing=(2.0, 2.0, 2.0))

    after = cached(item, recipe, root)
    assert len(prepared) == 2
    assert after.path != before.path
    assert np.array_equal(after.array(), prepare(item, recipe).data.astype(np.float16))


def test_files_of_one_name_do_not_share_a_folder(tmp_path: Path, root: Path) -> None:
    items = []
    for seed in (1, 2):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        item = make_item(folder, seed=seed)
        os.utime(item.image[0], ns=(0, 0))  # of one size and time, too
        items.append(item)

    one, two = prepare_all(items, RECIPE, root)
    assert one.path != two.path
    assert not np.array_equal(one.array(), two.array())


def test_a_cache_of_an_older_format_is_made_again(
    item: Item, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folders hold no hashes."""
    with monkeypatch.context() as patch:
        patch.setattr(cache, "CACHE_FORMAT", cache.CACHE_FORMAT - 1)
        old = cached(item, RECIPE, root).path
    assert cached(item, RECIPE, root).path != old


def test_the_default_folder_follows_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "dae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "dae"


# --- atomic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "owner, call",
    [(np, "save"), (Path, "write_text"), (Path, "rename")],
    ids=["before the voxels", "before the facts", "before the name"],
)
def test_what_a_killed_process_left_is_not_used(
    owner: Any,
    call: str,
    item: Item,
    root: Path,
    prepared: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, die)
        process = in_another_process(cached, item, RECIPE, root)
        process.join()
    assert process.exitcode == 9
    assert list(root.iterdir())
    assert not folder_of(item, RECIPE, root).exists()

    assert cached(item, RECIPE, root).array().shape == (1, *SIZE)
    assert prepared == [item]


def test_a_folder_that_was_half_deleted_is_made_again(item: Item, root: Path) -> None:
    folder = cached(item, RECIPE, root).path
    (folder / "facts.json").unlink()
    assert cached(item, RECIPE, root).array().shape == (1, *SIZE)


@pytest.mark.parametrize("left", [b"", b'{"labels": [', bytes(40)])
def test_a_folder_that_a_power_failure_left_is_made_again(
    item: Item, root: Path, left: bytes
) -> None:
    folder = cached(item, RECIPE, root).path
    (folder / "facts.json").write_bytes(left)
    assert cached(item, RECIPE, root).array().shape == (1, *SIZE)


def test_a_file_of_the_longest_name_is_prepared(tmp_path: Path, root: Path) -> None:
    item = make_item(tmp_path, "n" * 240)
    assert cached(item, RECIPE, root).array().shape == (1, *SIZE)


def test_two_processes_at_once_leave_one_whole_folder(
    item: Item, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_have_prepared = multiprocessing.get_context("fork").Barrier(2)

    def together(item: Item, recipe: Recipe) -> Prepared:
        volume = prepare(item, recipe)
        both_have_prepared.wait(timeout=10)
        return volume

    monkeypatch.setattr(cache, "prepare", together)
    processes = [in_another_process(cached, item, RECIPE, root) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (folder,) = root.iterdir()  # one, and nothing half-made beside it
    assert folder == folder_of(item, RECIPE, root)
    assert cached(item, RECIPE, root).array().shape == (1, *SIZE)


def test_what_killed_processes_left_is_removed_after_a_day(item: Item, root: Path) -> None:
    root.mkdir()
    old = root / ".making-old"
    old.mkdir()
    (old / "image.npy").touch()
    old_lock = root / ".lock-old"
    old_lock.touch()
    yesterday = time.time() - 90_000
    for path in (old, old_lock):
        os.utime(path, (yesterday, yesterday))
    young = root / ".making-young"
    young.mkdir()

    prepare_all([item], RECIPE, root)
    assert sorted(root.glob(".*")) == [young]


# --- ranks share the work -------------------------------------------------------------------------


def test_ranks_share_the_work_and_all_get_every_volume(
    tmp_path: Path, root: Path, prepared: list[Item]
) -> None:
    items = make_items(tmp_path, 5)

    def rank(number: int) -> list[Cached]:
        return prepare_all(items, RECIPE, root, rank=number, world=2)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(rank, range(2))
    assert one == two
    assert len(one) == 5
    assert {item.subject for item in prepared} == {"v0", "v1", "v2", "v3", "v4"}


def test_a_rank_starts_with_its_share_and_goes_on_with_what_is_left(
    tmp_path: Path, root: Path, prepared: list[Item]
) -> None:
    volumes = prepare_all(make_items(tmp_path, 5), RECIPE, root, rank=1, world=2)
    assert len(volumes) == 5
    assert [item.subject for item in prepared] == ["v1", "v3", "v4", "v2", "v0"]


class OneThread:
    """A pool of the calling thread itself, which knows its node."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "OneThread":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        return map(work, *arguments)


def test_eight_ranks_on_two_nodes_prepare_each_volume_once_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has a cache of its own, so 12 volumes are 24 preparations."""
    items = make_items(tmp_path, 12)
    thread = threading.local()
    seen: list[tuple[int, str]] = []

    def slowly(item: Item, recipe: Recipe) -> Prepared:
        seen.append((thread.node, item.subject))
        time.sleep(0.02)  # so that ranks that walk the list in step would meet at every volume
        return prepare(item, recipe)

    def rank(number: int) -> list[Cached]:
        thread.node = number // 4
        return prepare_all(items, RECIPE, tmp_path / f"node{thread.node}", rank=number, world=8)

    monkeypatch.setattr(cache, "prepare", slowly)
    with ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(cache, "ThreadPoolExecutor", OneThread)
        volumes = list(pool.map(rank, range(8)))

    assert [len(of_rank) for of_rank in volumes] == [12] * 8
    assert len(seen) == len(set(seen)) == 24
    assert Counter(node for node, _ in seen) == {0: 12, 1: 12}
    assert not list(tmp_path.glob("node*/.*"))  # no lock and nothing half-made is left


def test_a_volume_that_another_process_prepares_is_waited_for(
    item: Item, root: Path, prepared: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    may_end = threading.Event()
    counting = cache.prepare

    def held_up(item: Item, recipe: Recipe) -> Prepared:
        begun.set()
        assert may_end.wait(timeout=30)
        return counting(item, recipe)

    monkeypatch.setattr(cache, "prepare", held_up)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare_all, [item], RECIPE, root)
        assert begun.wait(timeout=30)
        second = pool.submit(prepare_all, [item], RECIPE, root)
        assert not prepared
        assert not second.done()
        may_end.set()
        assert first.result() == second.result()
    assert prepared == [item]


def test_the_claim_of_a_killed_process_is_taken_over_at_once(
    item: Item, root: Path, prepared: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "prepare", die)
        process = in_another_process(prepare_all, [item], RECIPE, root)
        process.join()
    assert process.exitcode == 9
    (lock,) = root.iterdir()
    assert lock.name.startswith(".lock-")

    monkeypatch.setattr(cache, "PATIENCE", 1e9)  # the test would not end if it waited
    (volume,) = prepare_all([item], RECIPE, root)
    assert volume.shape == (1, *SIZE)
    assert prepared == [item]


def test_the_claim_of_a_machine_that_is_gone_holds_up_for_so_long_and_no_longer(
    item: Item, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(item, RECIPE, root)
    root.mkdir()
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    with (root / f".lock-{folder.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (volume,) = prepare_all([item], RECIPE, root)
    assert volume.path == folder


def test_without_locks_every_volume_is_prepared_all_the_same(
    item: Item, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (volume,) = prepare_all([item], RECIPE, root)
    assert volume.shape == (1, *SIZE)


# --- the room that it takes -----------------------------------------------------------------------

# The file's axes i j k are along A S R.
TURNED = np.array([[0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("spacing", [(), (1.5, 1.5, 2.0), (4.0, 0.7, 1.0)])
@pytest.mark.parametrize("affine", [AFFINE, TURNED], ids=["straight", "turned"])
def test_the_room_is_known_from_the_headers(
    spacing: tuple[float, ...], affine: np.ndarray, tmp_path: Path, root: Path
) -> None:
    """Voxels of image and label, and up to 4096 voxels of foreground, of 3 x 4 bytes each."""
    rng = np.random.default_rng(0)
    one = save(tmp_path / "one.nii.gz", rng.normal(size=(9, 11, 13)).astype(np.float32), affine)
    four = save(tmp_path / "four.nii", rng.normal(size=(9, 11, 13, 4)).astype(np.float32), affine)
    labels = rng.integers(0, 3, (9, 11, 13)).astype(np.uint8)
    label = save(tmp_path / "label.nii.gz", labels, affine)

    recipe = Recipe(spacing=spacing)
    for item in (
        Item((one,), ("t1",), ("zscore",), "a"),
        Item((one, one), ("t1", "t1"), ("zscore", "zscore"), "b"),
        Item((four,), ("t1",), ("zscore",), "c"),
        Item((one,), ("t1",), ("zscore",), "d", label=label),
        Item((four,), ("t1",), ("zscore",), "e", channel=(2, 4)),
    ):
        volume = cached(item, recipe, root)
        room = 2 * volume.array().size + 49_152
        if item.label:
            room += volume.label().size
        assert room_for(item, recipe) == room, item.subject


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes the disk has free."""

    def set_free(free: int) -> None:
        usage = cache.shutil._ntuple_diskusage(10**9, 0, free)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)

    return set_free


def test_where_there_is_no_room_it_is_said_before_any_work(
    tmp_path: Path,
    root: Path,
    prepared: list[Item],
    disk: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = make_items(tmp_path, 3)
    needed = sum(room_for(item, RECIPE) for item in items)

    disk(needed - 1)
    line = rf"^--cache-dir: .*3 of them take about 149\.5 kB in {tmp_path}.*larger disk"
    with pytest.raises(InputError, match=line) as error:
        prepare_all(items, RECIPE, root)
    assert "\n" not in str(error.value)
    assert prepared == []
    assert not root.exists()

    disk(needed)
    prepare_all(items, RECIPE, root, quiet=False)
    assert "3 of them take about 149.5 kB" in capsys.readouterr().err

    disk(0)
    prepare_all(items, RECIPE, root, quiet=False)  # what is there takes no more
    assert capsys.readouterr().err == ""
    assert len(prepared) == 3


@pytest.mark.parametrize(
    "number, text", [(999, "1.0 kB"), (210_000_000, "210.0 MB"), (1_050_000_000_000, "1.1 TB")]
)
def test_numbers_of_bytes_are_said_as_people_read_them(number: int, text: str) -> None:
    assert in_bytes(number) == text


# --- open files -----------------------------------------------------------------------------------


def test_crops_of_many_volumes_leave_no_file_open(tmp_path: Path, root: Path) -> None:
    volumes = prepare_all(make_items(tmp_path, 50), RECIPE, root)
    rng = np.random.default_rng(0)

    before = open_files()
    for volume in volumes:
        random_crop(volume, (4, 4, 4), rng, foreground=0.5)
    assert open_files() == before

    arrays = [volume.array() for volume in volumes]  # what would happen if the arrays were kept
    assert open_files() == before + len(arrays)


def open_files() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208  # a Path's own iterator holds one more


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_of_several_bad_volumes_the_first_is_named_and_the_others_counted(
    threads: int, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the list, though with threads the one after it fails earlier."""
    items = make_items(tmp_path, 5)
    for n in (1, 2, 4):
        items[n].image[0].write_bytes(b"not a volume")
    another_failed = threading.Event()

    def first_is_last(item: Item, recipe: Recipe) -> Prepared:
        if item is items[1] and threads > 1:
            assert another_failed.wait(timeout=30)
        try:
            return prepare(item, recipe)
        finally:
            if item is items[2]:
                another_failed.set()

    monkeypatch.setattr(cache, "prepare", first_is_last)
    with pytest.raises(InputError, match=r"v1\.nii: .*\(and 2 more like it\)") as error:
        prepare_all(items, RECIPE, root, threads=threads)
    assert "\n" not in str(error.value)


def test_a_bad_volume_alone_has_no_others_to_count(tmp_path: Path, root: Path) -> None:
    items = make_items(tmp_path, 2)
    items[1].image[0].write_bytes(b"not a volume")
    with pytest.raises(InputError, match=r"v1\.nii") as error:
        prepare_all(items, RECIPE, root)
    assert "more like it" not in str(error.value)


def test_a_missing_file_is_said_before_any_work_is_done(
    tmp_path: Path, root: Path, prepared: list[Item]
) -> None:
    items = make_items(tmp_path, 2)
    items[1].image[0].unlink()
    with pytest.raises(InputError, match=r"v1\.nii: no such file"):
        prepare_all(items, RECIPE, root)
    assert prepared == []


@pytest.mark.parametrize("folder", ["file", "file/cache"])
def test_a_cache_that_cannot_be_written_is_refused_by_its_flag(
    folder: str, item: Item, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="--cache-dir") as error:
        prepare_all([item], RECIPE, tmp_path / folder)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_refused_and_leaves_nothing(
    item: Item, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"--cache-dir.*No space left"):
        cached(item, RECIPE, root)
    assert list(root.iterdir()) == []


def test_volumes_of_other_channels_than_the_first_are_refused(tmp_path: Path, root: Path) -> None:
    one = make_item(tmp_path)
    two = Item((*one.image, *one.image), ("t1", "t1"), ("mr", "mr"), "b")
    with pytest.raises(InputError, match=r"a\.nii: 2 channels, the first volume has 1; one run"):
        prepare_all([one, two], RECIPE, root)


# --- what was in the files ------------------------------------------------------------------------


def test_a_file_corrected_at_equal_size_and_time_is_prepared_again(
    item: Item, tmp_path: Path, root: Path
) -> None:
    """`cp -p` and `rsync -t` keep the time that a file claims; the voxels are still others."""
    label = np.zeros(SIZE, np.uint8)
    label[2:4] = 1
    path = save(tmp_path / "label.nii", label)
    item = replace(item, label=path)
    before = cached(item, RECIPE, root)
    stat = path.stat()

    label[2:4] = 2
    save(path, label)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert path.stat().st_mtime_ns == stat.st_mtime_ns

    after = cached(item, RECIPE, root)
    assert np.array_equal(after.label(), label)
    assert after.content.label != before.content.label
    assert after.content.image == before.content.image


def content_of(path: Path, root: Path) -> Content:
    """As it was written and, again, as it is read."""
    item = Item((path,), ("t1",), ("mr",), path.name)
    written = cached(item, RECIPE, root).content
    assert cached(item, RECIPE, root).content == written
    return written


def test_what_was_in_a_file_is_known_by_its_voxels_and_spacing(tmp_path: Path, root: Path) -> None:
    """Not by its name, its compression or its type."""
    x = np.random.default_rng(0).integers(1, 99, SIZE).astype(np.int16)
    first = content_of(save(tmp_path / "a.nii", x), root)
    assert first.spacing == (1, 2, 3)
    assert len(first.image) == 1
    assert first.label == ""

    same = content_of(save(tmp_path / "b.nii.gz", x.astype(np.float32)), root)
    assert same == first

    turned = nib.Nifti1Image(x, AFFINE).as_reoriented(nib.orientations.axcodes2ornt("LSP"))
    nib.save(turned, tmp_path / "turned.nii")
    assert content_of(tmp_path / "turned.nii", root).image == first.image

    one_voxel = x.copy()
    one_voxel[3, 3, 3] += 1
    assert content_of(save(tmp_path / "c.nii", one_voxel), root).image != first.image

    other_spacing = save(tmp_path / "d.nii", x, np.diag([1.0, 2.0, 4.0, 1.0]))
    assert content_of(other_spacing, root) != first
