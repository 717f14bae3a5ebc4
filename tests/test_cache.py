"""dae/data/cache.py: a volume is prepared once and whole, made again when it changes, and holds no file open."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def make_item(folder: Path, name: str = "a", seed: int = 0, intensity: str = "mr") -> Item:
    path = folder / f"{name}.nii"
    x = np.random.default_rng(seed).uniform(1, 9, SIZE).astype(np.float32)
    nib.save(nib.Nifti1Image(x, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return Item((path,), ("t1",), (intensity,), name)


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return make_item(tmp_path)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """The items whose files were really read, in order."""
    seen: list[Item] = []

    def counting(item: Item, recipe: Recipe) -> Prepared:
        seen.append(item)
        return prepare(item, recipe)

    monkeypatch.setattr(cache, "prepare", counting)
    return seen


def in_another_process(work: Callable[..., object], *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


# --- once, and again when something changes


def test_the_disk_holds_what_was_prepared_in_half_precision(item: Item, tmp_path: Path) -> None:
    expected, found = prepare(item, RECIPE), cached(item, RECIPE, tmp_path / "cache")
    assert np.array_equal(found.array(), expected.data.astype(np.float16))
    assert np.array_equal(found.foreground(), expected.foreground)
    assert (found.shape, found.spacing) == ((1, *SIZE), (1, 2, 3))
    assert found.background == pytest.approx(expected.background)
    assert not found.array().flags.writeable
    assert list((tmp_path / "cache").iterdir()) == [found.path]  # and nothing beside it


def test_a_second_call_does_not_read_the_file(
    item: Item, tmp_path: Path, prepared: list[Item]
) -> None:
    first, second = (prepare_all([item], RECIPE, tmp_path / "cache") for _ in range(2))
    assert first == second and prepared == [item]


@pytest.mark.parametrize("change", ["content", "time", "size", "recipe", "intensity"])
def test_a_change_of_the_file_or_the_recipe_makes_it_again(
    change: str, item: Item, tmp_path: Path, prepared: list[Item]
) -> None:
    (path,), recipe = item.image, RECIPE
    before, times = (
        cached(item, RECIPE, tmp_path / "cache"),
        (path.stat().st_atime_ns, path.stat().st_mtime_ns),
    )
    if change == "content":
        make_item(tmp_path, seed=1)
    elif change == "time":
        os.utime(path, ns=(times[0], times[1] + 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=times)
    elif change == "recipe":
        recipe = Recipe(spacing=(2.0, 2.0, 2.0))
    else:
        item = make_item(tmp_path, intensity="percentile")
        os.utime(path, ns=times)
    after = cached(item, recipe, tmp_path / "cache")
    assert len(prepared) == 2 and after.path != before.path
    expected = prepare(item, recipe).data.astype(np.float16)
    assert np.array_equal(after.array(), expected)


def test_files_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "s1").mkdir()
    (tmp_path / "s2").mkdir()
    items = [make_item(tmp_path / "s1", seed=1), make_item(tmp_path / "s2", seed=2)]
    for item in items:
        os.utime(item.image[0], ns=(0, 0))  # of one size and time, too
    one, two = prepare_all(items, RECIPE, tmp_path / "cache")
    assert one.path != two.path and not np.array_equal(one.array(), two.array())


def test_the_default_folder_follows_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "dae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "dae"


# --- whole or not at all


@pytest.mark.parametrize("owner, call", [(np, "save"), (Path, "write_text"), (Path, "rename")])
def test_what_a_killed_process_left_is_not_taken(
    owner: Any,
    call: str,
    item: Item,
    tmp_path: Path,
    prepared: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "cache"
    with (
        monkeypatch.context() as patch
    ):  # it dies before it writes the voxels, the facts, or the folder's name
        patch.setattr(owner, call, lambda *_: os._exit(9))
        process = in_another_process(cached, item, RECIPE, root)
        process.join()
    assert process.exitcode == 9 and list(root.iterdir())
    assert not folder_of(item, RECIPE, root).exists()
    assert cached(item, RECIPE, root).array().shape == (1, *SIZE) and prepared == [item]


def test_a_folder_that_was_half_deleted_is_made_again(item: Item, tmp_path: Path) -> None:
    folder = cached(item, RECIPE, tmp_path / "cache").path
    (folder / "facts.json").unlink()
    assert cached(item, RECIPE, tmp_path / "cache").array().shape == (1, *SIZE)


def test_two_processes_at_once_leave_one_whole_folder(
    item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_have_prepared = multiprocessing.get_context("fork").Barrier(2)

    def together(item: Item, recipe: Recipe) -> Prepared:
        volume = prepare(item, recipe)
        both_have_prepared.wait(timeout=10)
        return volume

    monkeypatch.setattr(cache, "prepare", together)
    processes = [in_another_process(cached, item, RECIPE, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name[0] for path in (tmp_path / "cache").iterdir()] == [
        "a"
    ]  # one, and nothing half-made beside it
    assert cached(item, RECIPE, tmp_path / "cache").array().shape == (1, *SIZE)


def test_ranks_share_the_work_and_all_get_every_volume(
    tmp_path: Path, prepared: list[Item]
) -> None:
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(5)]

    def rank(number: int) -> list[Cached]:
        return prepare_all(items, RECIPE, tmp_path / "cache", rank=number, world=2)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(rank, range(2))
    assert one == two and len(one) == 5
    assert {item.subject for item in prepared} == {"v0", "v1", "v2", "v3", "v4"}


def test_a_rank_starts_with_its_share_and_goes_on_with_what_is_left(
    tmp_path: Path, prepared: list[Item]
) -> None:
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(5)]
    assert len(prepare_all(items, RECIPE, tmp_path / "cache", rank=1, world=2)) == 5
    assert [item.subject for item in prepared] == ["v1", "v3", "v4", "v2", "v0"]


def test_eight_ranks_on_two_nodes_prepare_each_volume_once_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has a cache of its own, so 12 volumes are 24 preparations."""
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(12)]
    here, seen = threading.local(), list[tuple[int, str]]()

    def slowly(item: Item, recipe: Recipe) -> Prepared:
        seen.append((here.node, item.subject))
        time.sleep(0.02)  # so that ranks that walk the list in step would meet at every volume
        return prepare(item, recipe)

    def rank(number: int) -> list[Cached]:
        here.node = number // 4
        return prepare_all(items, RECIPE, tmp_path / f"node{here.node}", rank=number, world=8)

    class Here:  # a pool of the calling thread itself, which knows its node
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr(cache, "prepare", slowly)
    with ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(cache, "ThreadPoolExecutor", Here)
        found = list(pool.map(rank, range(8)))
    assert all(len(volumes) == 12 for volumes in found)
    assert Counter(seen) == {(node, f"v{n}"): 1 for node in range(2) for n in range(12)}
    assert not list(tmp_path.glob("node*/.*"))  # no lock and nothing half-made is left


def test_a_volume_that_another_process_is_at_is_waited_for(
    item: Item, tmp_path: Path, prepared: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, counting = threading.Event(), threading.Event(), cache.prepare

    def held_up(item: Item, recipe: Recipe) -> Prepared:
        begun.set()
        assert may_end.wait(timeout=30)
        return counting(item, recipe)

    monkeypatch.setattr(cache, "prepare", held_up)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare_all, [item], RECIPE, tmp_path / "cache")
        assert begun.wait(timeout=30)
        second = pool.submit(prepare_all, [item], RECIPE, tmp_path / "cache")
        assert not prepared and not second.done()
        may_end.set()
        assert first.result() == second.result()
    assert prepared == [item]


def test_the_claim_of_a_killed_process_is_taken_over_at_once(
    item: Item, tmp_path: Path, prepared: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "prepare", lambda *_: os._exit(9))
        process = in_another_process(prepare_all, [item], RECIPE, tmp_path / "cache")
        process.join()
    assert process.exitcode == 9 and [path.name[:5] for path in (tmp_path / "cache").iterdir()] == [
        ".lock"
    ]
    monkeypatch.setattr(cache, "PATIENCE", 1e9)  # the test would not end if it waited
    assert prepare_all([item], RECIPE, tmp_path / "cache")[0].shape == (1, *SIZE) and prepared == [
        item
    ]


def test_the_claim_of_a_machine_that_is_gone_holds_up_for_so_long_and_no_longer(
    item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(item, RECIPE, tmp_path / "cache")
    folder.parent.mkdir()
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    with (folder.parent / f".lock-{folder.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare_all([item], RECIPE, tmp_path / "cache")[0].path == folder


def test_without_locks_every_volume_is_prepared_all_the_same(
    item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert prepare_all([item], RECIPE, tmp_path / "cache")[0].shape == (1, *SIZE)


# --- the room that it takes


def save(path: Path, x: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(x, affine), path)
    return path


TURNED = np.array(
    [[0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]]
)  # file axes i j k lie along A S R


@pytest.mark.parametrize("spacing", [(), (1.5, 1.5, 2.0), (4.0, 0.7, 1.0)])
@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 2.0, 3.0, 1]), TURNED], ids=["straight", "turned"]
)
def test_the_room_is_known_from_the_headers(
    spacing: tuple[float, ...], affine: np.ndarray, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    one = save(tmp_path / "one.nii.gz", rng.normal(size=(9, 11, 13)).astype(np.float32), affine)
    four = save(tmp_path / "four.nii", rng.normal(size=(9, 11, 13, 4)).astype(np.float32), affine)
    label = save(
        tmp_path / "label.nii.gz", rng.integers(0, 3, (9, 11, 13)).astype(np.uint8), affine
    )
    recipe = Recipe(spacing=spacing)
    items = [
        Item((one,), ("t1",), ("zscore",), "a"),
        Item((one, one), ("t1", "t1"), ("zscore",) * 2, "b"),
        Item((four,), ("t1",), ("zscore",), "c"),
        Item((one,), ("t1",), ("zscore",), "d", label=label),
        Item((four,), ("t1",), ("zscore",), "e", channel=(2, 4)),
    ]
    for item in items:
        volume = cached(item, recipe, tmp_path / "cache")
        voxels = 2 * volume.array().size + (volume.label().size if item.label else 0)
        assert (
            room_for(item, recipe) == voxels + 49_152
        )  # and up to 4096 places of foreground, of 3 x 4 bytes


def test_where_there_is_no_room_it_is_said_before_any_work(
    tmp_path: Path,
    prepared: list[Item],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(3)]
    needed = sum(room_for(item, RECIPE) for item in items)

    def disk(free: int) -> None:
        monkeypatch.setattr(
            cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(10**9, 0, free)
        )

    disk(needed - 1)
    with pytest.raises(
        InputError, match=rf"^--cache-dir: .*3 of them take about 149\.5 kB in {tmp_path}"
    ) as error:
        prepare_all(items, RECIPE, tmp_path / "cache")
    assert "larger disk" in str(error.value) and "\n" not in str(error.value)
    assert prepared == [] and not (tmp_path / "cache").exists()
    disk(needed)
    prepare_all(items, RECIPE, tmp_path / "cache", quiet=False)
    assert "3 of them take about 149.5 kB" in capsys.readouterr().err
    disk(0)
    prepare_all(items, RECIPE, tmp_path / "cache", quiet=False)  # what is there takes no more
    assert capsys.readouterr().err == "" and len(prepared) == 3


def test_numbers_of_bytes_are_said_as_people_read_them() -> None:
    assert [in_bytes(n) for n in (999, 210_000_000, 1_050_000_000_000)] == [
        "1.0 kB",
        "210.0 MB",
        "1.1 TB",
    ]


# --- open files


def test_crops_of_many_volumes_leave_no_file_open(tmp_path: Path) -> None:
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(50)]
    volumes = prepare_all(items, RECIPE, tmp_path / "cache")
    rng, before = np.random.default_rng(0), open_files()
    crops = [random_crop(volume, (4, 4, 4), rng, foreground=0.5) for volume in volumes]
    assert open_files() == before and len(crops) == 50
    held = [volume.array() for volume in volumes]  # what would happen if the arrays were kept
    assert open_files() == before + len(held)


def open_files() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208  # a Path's own iterator holds one more


# --- what is refused


def test_of_several_bad_volumes_the_first_is_named_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the list, though the one after it fails earlier."""
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(5)]
    for n in (1, 2, 4):
        items[n].image[0].write_bytes(b"not a volume")
    with pytest.raises(
        InputError, match=r"v4\.nii(?!.*more like it)"
    ):  # alone, it has no others to count
        prepare_all(items[3:], RECIPE, tmp_path / "cache")

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
    for threads in (1, 3):
        with pytest.raises(InputError, match=r"v1\.nii: .*\(and 2 more like it\)") as caught:
            prepare_all(items, RECIPE, tmp_path / "cache", threads=threads)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_said_before_any_work_is_done(
    tmp_path: Path, prepared: list[Item]
) -> None:
    items = [make_item(tmp_path, "here"), make_item(tmp_path, "gone")]
    items[1].image[0].unlink()
    with pytest.raises(InputError, match=r"gone\.nii: no such file"):
        prepare_all(items, RECIPE, tmp_path / "cache")
    assert prepared == []


@pytest.mark.parametrize("folder", ["file", "file/cache"])
def test_a_cache_that_cannot_be_written_is_refused_by_its_flag(
    folder: str, item: Item, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="--cache-dir") as caught:
        prepare_all([item], RECIPE, tmp_path / folder)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_refused_and_leaves_nothing(
    item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"--cache-dir.*No space left"),
    ):
        patch.setattr(np, "save", full)
        cached(item, RECIPE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# --- what was in the files


def test_a_file_corrected_at_equal_size_and_time_is_prepared_again(tmp_path: Path) -> None:
    """`cp -p` and `rsync -t` keep the time that a file claims; the voxels are still others."""
    item = make_item(tmp_path)
    label = np.zeros(SIZE, np.uint8)
    label[2:4] = 1
    path = tmp_path / "label.nii"
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    item = replace(item, label=path)
    before, stat = cached(item, RECIPE, tmp_path / "cache"), path.stat()
    label[2:4] = 2
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = cached(item, RECIPE, tmp_path / "cache")
    assert np.array_equal(after.label(), label)
    assert (
        after.content.label != before.content.label and after.content.image == before.content.image
    )


def test_what_was_in_a_file_is_known_by_its_voxels_and_spacing(tmp_path: Path) -> None:
    """Not by its name, its compression or its type; a label map by its own."""
    x = np.random.default_rng(0).integers(1, 99, SIZE).astype(np.int16)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])

    def content(name: str, values: np.ndarray, affine: np.ndarray = affine) -> Content:
        nib.save(nib.Nifti1Image(values, affine), tmp_path / name)
        item = Item((tmp_path / name,), ("t1",), ("mr",), name)
        made = cached(item, RECIPE, tmp_path / "cache")
        assert (
            made.content == cached(item, RECIPE, tmp_path / "cache").content
        )  # as it was written and read
        return made.content

    first = content("a.nii", x)
    assert first == content("b.nii.gz", x.astype(np.float32))
    assert first.spacing == (1, 2, 3) and len(first.image) == 1 and first.label == ""
    turned = nib.Nifti1Image(x, affine).as_reoriented(nib.orientations.axcodes2ornt("LSP"))
    nib.save(turned, tmp_path / "turned.nii")
    assert first.image == content("turned.nii", np.asarray(turned.dataobj), turned.affine).image
    other = x.copy()
    other[3, 3, 3] += 1
    assert first.image != content("c.nii", other).image
    assert first != content("d.nii", x, np.diag([1.0, 2.0, 4.0, 1.0]))


def test_a_cache_of_before_is_made_again(
    item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of an older format hold no hashes."""
    now = cache.FORMAT
    monkeypatch.setattr(cache, "FORMAT", now - 1)
    old = cached(item, RECIPE, tmp_path / "cache").path
    monkeypatch.setattr(cache, "FORMAT", now)
    assert cached(item, RECIPE, tmp_path / "cache").path != old
