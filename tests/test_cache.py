"""dae/data/cache.py: a volume is prepared once and whole, made again when it changes, and holds no file open."""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dae.config import InputError
from dae.data import cache
from dae.data.augment import random_crop
from dae.data.cache import Cached, cached, folder_of, prepare_all
from dae.data.datalist import Content, Item
from dae.data.preprocess import Prepared, Recipe, prepare

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


def test_a_second_call_does_not_read_the_file(item: Item, tmp_path: Path, prepared: list[Item]) -> None:
    first, second = (prepare_all([item], RECIPE, tmp_path / "cache") for _ in range(2))
    assert first == second and prepared == [item]


@pytest.mark.parametrize("change", ["content", "time", "size", "recipe", "intensity"])
def test_a_change_of_the_file_or_the_recipe_makes_it_again(
    change: str, item: Item, tmp_path: Path, prepared: list[Item]
) -> None:
    (path,), recipe = item.image, RECIPE
    before, times = cached(item, RECIPE, tmp_path / "cache"), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
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


def test_the_default_folder_follows_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "dae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "dae"


# --- whole or not at all


@pytest.mark.parametrize("owner, call", [(np, "save"), (Path, "write_text"), (Path, "rename")])
def test_what_a_killed_process_left_is_not_taken(
    owner: Any, call: str, item: Item, tmp_path: Path, prepared: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    with monkeypatch.context() as patch:  # it dies before it writes the voxels, the facts, or the folder's name
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
    assert [path.name[0] for path in (tmp_path / "cache").iterdir()] == ["a"]  # one, and nothing half-made beside it
    assert cached(item, RECIPE, tmp_path / "cache").array().shape == (1, *SIZE)


def test_ranks_share_the_work_and_all_get_every_volume(tmp_path: Path, prepared: list[Item]) -> None:
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(5)]

    def rank(number: int) -> list[Cached]:
        return prepare_all(items, RECIPE, tmp_path / "cache", rank=number, world=2)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(rank, range(2))
    assert one == two and len(one) == 5
    assert {item.subject for item in prepared} == {"v0", "v1", "v2", "v3", "v4"}


def test_a_rank_starts_with_its_share_and_waits_for_nobody(tmp_path: Path, prepared: list[Item]) -> None:
    items = [make_item(tmp_path, f"v{n}", seed=n) for n in range(5)]
    assert len(prepare_all(items, RECIPE, tmp_path / "cache", rank=1, world=2)) == 5
    assert [item.subject for item in prepared] == ["v1", "v3", "v4", "v2", "v0"]


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
    with pytest.raises(InputError, match=r"v4\.nii(?!.*more like it)"):  # alone, it has no others to count
        prepare_all(items[3:], RECIPE, tmp_path / "cache")

    def first_is_slow(item: Item, recipe: Recipe) -> Prepared:
        time.sleep(0.2 * (item is items[1]))
        return prepare(item, recipe)

    monkeypatch.setattr(cache, "prepare", first_is_slow)
    for threads in (1, 3):
        with pytest.raises(InputError, match=r"v1\.nii: .*\(and 2 more like it\)") as caught:
            prepare_all(items, RECIPE, tmp_path / "cache", threads=threads)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_said_before_any_work_is_done(tmp_path: Path, prepared: list[Item]) -> None:
    items = [make_item(tmp_path, "here"), make_item(tmp_path, "gone")]
    items[1].image[0].unlink()
    with pytest.raises(InputError, match=r"gone\.nii: no such file"):
        prepare_all(items, RECIPE, tmp_path / "cache")
    assert prepared == []


@pytest.mark.parametrize("folder", ["file", "file/cache"])
def test_a_cache_that_cannot_be_written_is_refused_by_its_flag(folder: str, item: Item, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="--cache-dir") as caught:
        prepare_all([item], RECIPE, tmp_path / folder)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_refused_and_leaves_nothing(item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"--cache-dir.*No space left"):
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
    assert after.content.label != before.content.label and after.content.image == before.content.image


def test_what_was_in_a_file_is_known_by_its_voxels_and_spacing(tmp_path: Path) -> None:
    """Not by its name, its compression or its type; a label map by its own."""
    x = np.random.default_rng(0).integers(1, 99, SIZE).astype(np.int16)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])

    def content(name: str, values: np.ndarray, affine: np.ndarray = affine) -> Content:
        nib.save(nib.Nifti1Image(values, affine), tmp_path / name)
        item = Item((tmp_path / name,), ("t1",), ("mr",), name)
        made = cached(item, RECIPE, tmp_path / "cache")
        assert made.content == cached(item, RECIPE, tmp_path / "cache").content  # as it was written and read
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


def test_a_cache_of_before_is_made_again(item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of an older format hold no hashes."""
    now = cache.FORMAT
    monkeypatch.setattr(cache, "FORMAT", now - 1)
    old = cached(item, RECIPE, tmp_path / "cache").path
    monkeypatch.setattr(cache, "FORMAT", now)
    assert cached(item, RECIPE, tmp_path / "cache").path != old
