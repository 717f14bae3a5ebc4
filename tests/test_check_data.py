"""dae/data/check.py: copies are found by their voxels, defects by name, and a run may start or not.

Also dae/data/content.py, examine.py, overlaps.py and fingerprint.py, which it is made of, and the
guard of train_seg.py against weights that were pre-trained on test cases.
"""

import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import events, refusal, smooth_volume
from nibabel.orientations import axcodes2ornt
from numpy.typing import NDArray

from dae.config.check import CheckConfig
from dae.config.evaluate import PredictConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data import content, overlaps
from dae.data.cache import FOREGROUND, cached
from dae.data.check import main, read_command
from dae.data.content import DIFFERENCE, alike, same_voxels, scaled, signature_of, turns_between
from dae.data.datalist import Item, load
from dae.data.examine import Examined
from dae.data.fingerprint import DIVISOR, regions_in
from dae.data.holdout import read_for_pretraining
from dae.data.nifti import read_image
from dae.data.overlaps import Listed, Part, Place, judge
from dae.data.preprocess import Recipe
from dae.data.regions import Region
from dae.demo.phantom import write_phantoms
from dae.model import SwinUNETR
from dae.weights import checkpoint
from eval import predict
from train_pretrain import main as pretrain
from train_seg import main as fine_tune

Voxels = NDArray[Any]
AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])
LABELS = {"0": "background", "1": "liver", "2": "spleen"}


def head(seed: int, size: tuple[int, int, int] = (18, 20, 22)) -> Voxels:
    """A smooth volume with noise, whole numbers from -1000 to 1500: a brain of its own."""
    rng = np.random.default_rng(seed)
    x = smooth_volume(rng, "ct", size) + rng.normal(0, 40, size)
    return np.rint(x.clip(-1000, 1500)).astype(np.int16)


def save(path: Path, x: Voxels, affine: Voxels = AFFINE, **scale: float) -> str:
    image = nib.Nifti1Image(x, affine)
    image.header.set_xyzt_units("mm")
    if scale:
        image.header.set_slope_inter(**scale)
    nib.save(image, path)
    return path.name


def label_of(x: Voxels) -> Voxels:
    """Two classes where it is bright."""
    return ((x > 0).astype(np.uint8) + (x > 300)).astype(np.uint8)


def entry(folder: Path, name: str, x: Voxels, **more: Any) -> dict[str, Any]:
    """A labelled CT in a folder, as an item."""
    image = save(folder / f"{name}.nii.gz", x)
    label = save(folder / f"{name}_seg.nii.gz", label_of(x))
    return {"image": image, "label": label, "modality": "ct", "subject": name} | more


def write_list(path: Path, **parts: Any) -> str:
    path.write_text(json.dumps(parts))
    return str(path)


def checked(*paths: str, out: Path, **flags: Any) -> tuple[int, dict[str, Any]]:
    """The exit code, and check.json."""
    options: dict[str, Any] = {"workers": 1, "pictures": 2, **flags}
    code = main(paths, CheckConfig(out=str(out), **options))
    report = json.loads((out / "check.json").read_text())
    for listed in report["lists"]:
        listed["cache"].pop("free_bytes", None)  # others write to the disk too
    return code, report


@pytest.fixture
def good(tmp_path: Path) -> str:
    """A list to fine-tune on that has nothing wrong with it."""
    training = [entry(tmp_path, f"a{n}", head(n)) for n in range(3)]
    validation = [entry(tmp_path, "v", head(10))]
    test = [entry(tmp_path, "t", head(20))]
    parts = {"training": training, "validation": validation, "test": test}
    return write_list(tmp_path / "seg.json", **parts, labels=LABELS)


# --- the same voxels


def plain_copy(path: Path, x: Voxels) -> None:
    save(path, x)


def other_axes(path: Path, x: Voxels) -> None:
    turned = nib.Nifti1Image(x, AFFINE).as_reoriented(axcodes2ornt("SPL"))
    nib.save(turned, path)


def as_float64(path: Path, x: Voxels) -> None:
    save(path, x.astype(np.float64))


def by_slope(path: Path, x: Voxels) -> None:
    """Stored as 2 x + 24, with the slope and the intercept that undo it."""
    whole = bytearray(nib.Nifti1Image((2 * x + 24).astype(np.int16), AFFINE).to_bytes())
    whole[112:120] = np.array([0.5, -12], dtype="<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)


def by_slope_of_minus_1(path: Path, x: Voxels) -> None:
    """Equal values; each 0 is read as -0."""
    whole = bytearray(nib.Nifti1Image(-x, AFFINE).to_bytes())
    whole[112:120] = np.array([-1, 0], dtype="<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(whole)


def other_units(path: Path, x: Voxels) -> None:
    save(path, (x * 0.37 + 1024).astype(np.float32))


def in_256_levels(path: Path, x: Voxels) -> None:
    low, high = int(x.min()), int(x.max())
    save(path, np.rint((x - low) * (255 / (high - low))).astype(np.uint8))


def wrong_header(path: Path, x: Voxels) -> None:
    save(path, np.ascontiguousarray(x.transpose(2, 0, 1)[:, ::-1]))


EQUAL = [plain_copy, other_axes, as_float64, by_slope, by_slope_of_minus_1]
OTHER = [other_units, in_256_levels, wrong_header]


@pytest.mark.parametrize("copy", EQUAL + OTHER, ids=lambda copy: copy.__name__)
def test_a_test_case_is_found_in_another_list_under_any_name_axes_type_and_scale(
    good: str, tmp_path: Path, copy: Callable[[Path, Voxels], None]
) -> None:
    ending = ".nii.gz" if copy in (by_slope, other_units) else ".nii"
    copy(tmp_path / f"stranger{ending}", head(20))
    items = [{"image": f"stranger{ending}", "modality": "mr", "subject": "x"}]
    for n in range(3):
        name = save(tmp_path / f"other{n}.nii.gz", head(30 + n))
        items.append({"image": name, "modality": "mr", "subject": f"o{n}"})
    other = write_list(tmp_path / "pre.json", training=items)

    code, report = checked(other, good, out=tmp_path / "out")
    assert code == 2 and len(report["errors"]) == 1
    line = report["errors"][0]
    assert f"stranger{ending}" in line and "t.nii.gz" in line and "a test case" in line
    assert ("equal voxels" in line) == (copy in EQUAL)
    assert ("axes turned" in line) == (copy is wrong_header)
    same = report["same_voxels"]
    assert len(same) == 1 and {Path(place["image"]).name for place in same[0]} == {
        f"stranger{ending}",
        "t.nii.gz",
    }


def test_two_different_brains_are_never_one(tmp_path: Path) -> None:
    """Heads of one anatomy in the pose of other patients, and the contrasts of one."""
    lists = write_phantoms(tmp_path, subjects=4, size=(32, 32, 32))
    paths = [str(path) for path in (lists.pretrain, lists.ct_seg, lists.mr_seg)]
    code, report = checked(*paths, out=tmp_path / "out")
    assert code == 0 and report["errors"] == []
    for group in report["same_voxels"]:  # one channel of mr_seg is an image of pretrain
        assert len({Path(place["image"]).name.split("_")[1] for place in group}) == 1


def test_channels_in_two_orders_are_found_as_training_would_refuse_them(tmp_path: Path) -> None:
    def two_channels(name: str, seed: int, *modality: str) -> dict[str, Any]:
        item = entry(tmp_path, f"{name}_label_of", head(seed))
        images = []
        for k, contrast in enumerate(modality):
            images.append(save(tmp_path / f"{name}_{contrast}.nii.gz", head(seed + k)))
        return item | {"image": images, "modality": list(modality), "subject": name}

    parts = {
        "training": [two_channels("a", 1, "t1", "t2"), two_channels("b", 5, "t1", "t2")],
        "validation": [two_channels("c", 9, "t2", "t1")],
    }
    code, report = checked(write_list(tmp_path / "seg.json", **parts, labels=LABELS), out=tmp_path)
    assert code == 2
    assert any("c_t2.nii.gz: its channels are t2, t1" in line for line in report["errors"])


@pytest.mark.skipif("DAE_REALDATA" not in os.environ, reason="needs real volumes")
def test_no_two_real_volumes_are_one_but_each_is_its_own_copy() -> None:
    folder = Path(os.environ["DAE_REALDATA"])
    images = [read_image(path).data[0] for path in sorted(folder.glob("mr_*/t*.nii.gz"))]
    assert len(images) > 5
    copies = [np.rint(x * (255 / x.max())).astype(np.float32) for x in images]
    n = len(images)
    found = []
    signatures = [signature_of(x) for x in (*images, *copies)]
    for i, j in alike(signatures):
        if turns := turns_between(signatures[i], signatures[j]):
            x = (*images, *copies)[i]
            if same_voxels(x, (*images, *copies)[j], turns):
                found.append((i, j))
    assert found == [(i, i + n) for i in range(n)]


@pytest.mark.parametrize("noise, is_same", [(0.4, True), (1.6, False)])
def test_the_bound_is_on_the_largest_difference_of_any_voxel(noise: float, is_same: bool) -> None:
    a = head(1).astype(np.float32)
    b = a.copy()
    low, high = np.percentile(a, (0.5, 99.5))
    voxel = np.unravel_index(np.abs(a - (low + high) / 2).argmin(), a.shape)
    b[voxel] += noise * DIFFERENCE * (high - low)
    assert (same_voxels(a, b, [content.AS_IT_IS]) is not None) == is_same


def test_scaled_is_the_closed_form_and_an_image_of_nearly_all_background_keeps_its_range() -> None:
    x = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    expected = ((x - 5) / 990).clip(0, 1)  # percentiles of 0 to 1000 are 5 and 995
    assert np.allclose(scaled(x), expected, atol=1e-6)

    dark = np.zeros((20, 20, 20), dtype=np.float32)
    dark[3, 4, 5], dark[1, 1, 1] = 8, 2
    assert np.array_equal(scaled(dark), dark / 8)


def test_every_one_of_the_48_turns_of_a_volume_is_found_and_named() -> None:
    a = head(2, (13, 14, 15)).astype(np.float32)
    turned = []
    for axes in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            turned.append(a.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)])
    signatures = [signature_of(x) for x in (a, *turned)]
    pairs = [j for i, j in alike(signatures) if i == 0]
    assert pairs == list(range(1, 49))
    for x, signature in zip(turned, signatures[1:]):
        turn = same_voxels(a, x, turns_between(signatures[0], signature))
        assert turn is not None and np.array_equal(turn.of(x), a)


def test_signatures_lose_no_pair_that_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    images = []
    for n in range(12):
        x = head(n // 3, (9, 12, 12)).astype(np.float32)
        images.append(x + rng.uniform(-1, 1, x.shape).astype(np.float32) * 12 * (n % 3))
    signatures = [signature_of(x) for x in images]
    near = set(alike(signatures))
    count = 0
    for i in range(12):
        for j in range(i + 1, 12):
            if np.abs(scaled(images[i]) - scaled(images[j])).max() <= DIFFERENCE:
                count += 1
                assert (i, j) in near and turns_between(signatures[i], signatures[j])
    assert count >= 3


# --- is it a leak?


def place(listed: Listed, part: Part, name: str = "a") -> Place:
    item = load_item(name)
    return Place(listed, part, item)


def load_item(name: str) -> Any:
    from dae.data.datalist import Item

    return Item((Path(name),), ("ct",), ("window",), name)


def listed_with(training: list[str], validation: list[str], unlabelled: str) -> Listed:
    from dae.data.datalist import DataList

    items = DataList(
        tuple(map(load_item, training)), tuple(map(load_item, validation)), (), labels={}
    )
    return Listed(f"{unlabelled or 'seg'}.json", items, unlabelled)


PRE = listed_with(["a", "b"], ["c"], "pre")
SEG = listed_with(["a", "b"], ["c"], "")
SEG_2 = listed_with(["a", "b"], ["c"], "")


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ((PRE, "training"), (SEG, "training"), None),
        ((PRE, "training"), (SEG, "validation"), "warning"),
        ((PRE, "training"), (SEG, "test"), "error"),
        ((PRE, "validation"), (SEG, "test"), None),
        ((PRE, "test"), (SEG, "training"), None),
        ((SEG, "training"), (SEG_2, "test"), "error"),
        ((SEG, "training"), (SEG_2, "validation"), "warning"),
        ((SEG, "training"), (SEG_2, "training"), None),
        ((SEG, "training"), (SEG, "validation"), "error"),
        ((SEG, "training"), (SEG, "test"), "error"),
        ((SEG, "validation"), (SEG, "test"), "warning"),
        ((SEG, "training"), (SEG, "training"), "warning"),
        ((PRE, "training"), (PRE, "validation"), "error"),
        ((PRE, "training"), (PRE, "test"), "warning"),
    ],
)
def test_what_follows_from_two_places_of_the_same_voxels(
    a: tuple[Listed, Part], b: tuple[Listed, Part], verdict: str | None
) -> None:
    for first, second in ((a, b), (b, a)):
        finding = judge(place(*first, name="a"), place(*second, name="b"), "hold equal voxels")
        found = None if finding is None else ("error" if finding.is_error else "warning")
        assert found == verdict


def test_a_copy_within_training_is_an_error_where_a_fold_divides_the_two(tmp_path: Path) -> None:
    x = head(0)
    entries = [entry(tmp_path, f"a{n}", head(n + 1), fold=n % 2) for n in range(4)]
    for fold, code in ((0, 0), (1, 2)):
        twins = [entry(tmp_path, "x", x, fold=0), entry(tmp_path, "y", x, fold=fold)]
        path = write_list(tmp_path / f"{fold}.json", training=entries + twins, labels=LABELS)
        found, report = checked(path, out=tmp_path / f"out{fold}")
        lines = report["errors"] if code else report["warnings"]
        assert found == code and len(lines) == 1
        assert "x.nii.gz" in lines[0] and "y.nii.gz" in lines[0]


def test_one_subject_in_two_lists_is_said_and_stops_nothing(good: str, tmp_path: Path) -> None:
    name = save(tmp_path / "t2_of_t.nii.gz", head(77))
    more = save(tmp_path / "more.nii.gz", head(78))
    items = [
        {"image": name, "modality": "t2", "subject": "t"},
        {"image": more, "modality": "t2", "subject": "m"},
    ]
    pre = write_list(tmp_path / "pre.json", training=items[:1], validation=items[1:])
    code, report = checked(pre, good, out=tmp_path / "out")
    assert code == 0 and len(report["warnings"]) == 1
    assert "1 subject of the test" in report["warnings"][0] and "as t:" in report["warnings"][0]


def test_a_subject_that_validates_in_another_list_is_said_where_it_is_named(
    good: str, tmp_path: Path
) -> None:
    name = save(tmp_path / "t2_of_v.nii.gz", head(77))
    more = save(tmp_path / "more.nii.gz", head(78))
    for n, subject in enumerate(({"subject": "v"}, {})):
        items = [{"image": name, "modality": "t2", **subject}]
        held = [{"image": more, "modality": "t2", "subject": "m"}]
        pre = write_list(tmp_path / f"{n}.json", training=items, validation=held)
        code, report = checked(pre, good, out=tmp_path / f"out{n}")
        said = [line for line in report["warnings"] if "1 subject of the validation" in line]
        assert code == 0 and len(said) == bool(subject)


def test_a_test_case_is_found_in_another_list_that_names_the_same_file(
    good: str, tmp_path: Path
) -> None:
    more = save(tmp_path / "more.nii.gz", head(78))
    items = [{"image": "t.nii.gz", "modality": "mr"}]  # without its subject, in another intensity
    items_as_ct = [{"image": "t.nii.gz", "modality": "ct"}]
    held = [{"image": more, "modality": "ct", "subject": "m"}]
    for n, training in enumerate((items, items_as_ct)):
        pre = write_list(tmp_path / f"{n}.json", training=training, validation=held)
        code, report = checked(pre, good, out=tmp_path / f"out{n}")
        assert code == 2 and len(report["errors"]) == 1
        line = report["errors"][0]
        assert line.count("t.nii.gz") == 2 and "a test case would be trained on" in line
        assert ("are one file" in line) == (training is items_as_ct)


def test_a_copy_in_a_list_to_pretrain_on_is_an_error_where_the_share_held_out_divides_the_two(
    tmp_path: Path,
) -> None:
    """Which of them validates is what a run says."""
    items = []
    for n in range(5):
        image = save(tmp_path / f"s{n}.nii.gz", head(n))
        items.append({"image": image, "modality": "mr", "subject": f"s{n}"})
    twins = []
    for n in range(5):
        copy = save(tmp_path / f"copy_of_s{n}.nii.gz", head(n))
        twins.append({"image": copy, "modality": "mr", "subject": f"s{(n + 1) % 5}"})

    verdicts = []
    for n, twin in enumerate(twins):
        path = write_list(tmp_path / f"{n}.json", training=[*items, twin])
        code, report = checked(path, out=tmp_path / f"out{n}")
        run = read_for_pretraining(PretrainConfig(data=path))
        (held,) = {item.subject for item in run.validation}
        is_divided = held in (f"s{n}", twin["subject"])
        assert code == (2 if is_divided else 0)
        line = report["errors" if is_divided else "warnings"][0]
        assert f"copy_of_s{n}" in line and ("both sides" in line) == is_divided
        verdicts.append(is_divided)
    assert sum(verdicts) == 2


def test_a_file_that_is_gone_before_it_is_compared_is_no_copy(tmp_path: Path) -> None:
    """A check of hours does not end in a traceback for one file that someone has moved."""
    items = []
    for name, x in (("a", head(1)), ("b", head(1) * 2)):
        path = tmp_path / save(tmp_path / f"{name}.nii", x)
        items.append(Item((path,), ("mr",), ("zscore",), name))
    pair = overlaps.Pair(items[0], items[1], (0, 0), [content.AS_IT_IS])
    assert overlaps.compare(pair) == content.AS_IT_IS
    (tmp_path / "b.nii").unlink()
    assert overlaps.compare(pair) is None


# --- what is wrong with a file


def with_nan(x: Voxels) -> Voxels:
    y = x.astype(np.float32)
    y[3, 3, 3] = np.nan
    return y


def constant(x: Voxels) -> Voxels:
    return np.full_like(x, 7)


def not_in_hu(x: Voxels) -> Voxels:
    """As DICOM stores it."""
    return x + 1024


@pytest.mark.parametrize(
    "change, words",
    [
        (with_nan, "1 voxels are NaN or infinite"),
        (constant, "every voxel is 7"),
        (not_in_hu, "not a CT in HU"),
    ],
)
def test_a_bad_image_is_one_error(
    good: str, tmp_path: Path, change: Callable[[Voxels], Voxels], words: str
) -> None:
    save(tmp_path / "a1.nii.gz", change(head(1)))
    code, report = checked(good, out=tmp_path / "out")
    assert code == 2 and len(report["errors"]) == 1
    assert "a1.nii.gz" in report["errors"][0] and words in report["errors"][0]


def no_label(path: Path, label: Voxels) -> None:
    save(path, np.zeros_like(label))


def unknown_label(path: Path, label: Voxels) -> None:
    save(path, label * 3)


def other_grid(path: Path, label: Voxels) -> None:
    save(path, label, np.diag([2.0, 1.5, 3.3, 1.0]))


def other_size(path: Path, label: Voxels) -> None:
    save(path, label[:-1])


def not_whole(path: Path, label: Voxels) -> None:
    save(path, label.astype(np.float32) * 0.4)


@pytest.mark.parametrize(
    "change, words, code",
    [
        (no_label, "no voxel is labelled", 0),
        (unknown_label, "label 3 is not among the classes", 2),
        (other_grid, "not on the grid of its image", 2),
        (other_size, "not on the grid of its image", 2),
        (not_whole, "labels are whole numbers", 2),
    ],
)
def test_a_bad_label_is_one_line_and_does_not_stop_pretraining(
    good: str, tmp_path: Path, change: Callable[[Path, Voxels], None], words: str, code: int
) -> None:
    change(tmp_path / "a1_seg.nii.gz", label_of(head(1)))
    found, report = checked(good, out=tmp_path / "out")
    lines = [*report["errors"], *report["warnings"]]
    assert found == code and len(lines) == 1
    assert "a1_seg.nii.gz" in lines[0] and words in lines[0]

    parts = json.loads(Path(good).read_text())
    del parts["labels"], parts["test"]
    pre = write_list(tmp_path / "pre.json", **parts)
    assert checked(pre, out=tmp_path / "pre")[0] == 0


def test_a_volume_is_described_by_what_its_file_holds(good: str, tmp_path: Path) -> None:
    x = head(1)
    turned = nib.Nifti1Image(x, AFFINE).as_reoriented(axcodes2ornt("LPS"))
    turned.header.set_xyzt_units("mm")
    nib.save(turned, tmp_path / "a1.nii.gz")
    _, report = checked(good, out=tmp_path / "out", ct_window=(-200.0, 250.0))
    volume = next(v for v in report["volumes"] if v["subject"] == "a1")

    assert volume["axes"] == "LPS" and volume["unit"] == "mm" and volume["dtype"] == "int16"
    assert volume["size"] == list(x.shape) and np.allclose(volume["spacing_mm"], (2, 1.5, 3))
    channel = volume["channels"][0]
    assert channel["percentiles"]["0"] == x.min() and channel["percentiles"]["100"] == x.max()
    assert channel["percentiles"]["99.5"] == pytest.approx(np.percentile(x, 99.5))
    ends = (np.mean(x <= -200), np.mean(x >= 250))
    assert channel["at_window_ends"] == pytest.approx(ends)
    for label in (1, 2):
        ml = (label_of(x) == label).sum() * 9 / 1000  # 2 x 1.5 x 3 mm
        assert volume["labels_ml"][str(label)] == pytest.approx(ml)


# --- what is suggested


def test_the_suggested_flags_are_the_medians_and_nnunets_window(tmp_path: Path) -> None:
    size = (40, 70, 101)
    entries = []
    hu = []
    for n, mm in enumerate((1.0, 1.5, 4.0)):
        x = head(n, size)
        item = entry(tmp_path, f"a{n}", x)
        for name, voxels in ((item["image"], x), (item["label"], label_of(x))):
            save(tmp_path / name, voxels, np.diag([1.0, 1.0, mm, 1.0]))
        entries.append(item)
        hu.append(x[label_of(x) > 0])
    path = write_list(tmp_path / "list.json", training=entries, validation=[], labels=LABELS)

    _, report = checked(path, out=tmp_path / "out")
    flags = report["lists"][0]["suggested"]
    assert flags["spacing"] == [1, 1, 1.5]
    assert flags["crop"] == [32, 64, 96]  # of 40, 70 and 101 voxels
    expected = np.percentile(np.concatenate(hu), (0.5, 99.5))
    assert np.abs(np.subtract(flags["ct_window"], expected)).max() < 30  # a sample of each volume
    low, high = flags["ct_window"]
    assert f"--crop 32 64 96 --ct-window {low:g} {high:g}" in report["lists"][0]["flags"]


def test_the_room_in_the_cache_is_what_prepared_volumes_take(good: str, tmp_path: Path) -> None:
    _, report = checked(good, out=tmp_path / "out")
    items = load(good)
    total = 0
    for item in (*items.training, *items.validation):
        volume = cached(item, Recipe(spacing=(2.0, 1.5, 3.0)), tmp_path / "cache")
        total += volume.array().nbytes + volume.label().nbytes + FOREGROUND
    assert report["lists"][0]["cache"]["bytes"] == total


def test_crops_are_multiples_of_what_the_default_network_divides_by() -> None:
    network: Any = SwinUNETR(1, 1, feature_size=12)
    assert network.divisor == DIVISOR


# --- the command


def test_thirty_volumes_take_seconds_and_a_broken_one_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry(tmp_path, f"a{n:02d}", head(n)) for n in range(30)]
    path = write_list(tmp_path / "list.json", training=entries, labels=LABELS)
    whole = (tmp_path / "a07.nii.gz").read_bytes()
    (tmp_path / "a07.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a09.nii.gz").unlink()

    begun = time.monotonic()
    code, report = checked(path, str(tmp_path / "none.json"), out=tmp_path / "out", workers=2)
    assert time.monotonic() - begun < 30
    assert code == 2 and len(report["errors"]) == 3
    assert "none.json" in report["errors"][0]
    assert "a07.nii.gz: cut short or damaged" in report["errors"][1]
    assert "a09.nii.gz: no such file" in report["errors"][2]
    assert sum(bool(volume["channels"]) for volume in report["volumes"]) == 28
    printed = capsys.readouterr().out.splitlines()
    assert sum("a07.nii.gz" in line for line in printed) == 1
    assert printed[-1] == "a run may not start: 3 errors"


def test_processes_find_what_one_process_finds(good: str, tmp_path: Path) -> None:
    alone = checked(good, out=tmp_path / "a", workers=1)
    assert checked(good, out=tmp_path / "b", workers=3) == alone and alone[0] == 0


def test_an_image_that_two_lists_share_is_read_once(good: str, tmp_path: Path) -> None:
    parts = json.loads(Path(good).read_text())
    unlabelled = [
        {"image": "a0.nii.gz", "modality": "ct"},
        {"image": "a1.nii.gz", "modality": "ct"},
    ]
    pre = write_list(tmp_path / "pre.json", training=unlabelled[:1], validation=unlabelled[1:])
    code, report = checked(pre, good, out=tmp_path / "out")
    assert code == 0 and len(report["volumes"]) == sum(
        len(parts[part]) for part in ("training", "validation", "test")
    )


def test_the_page_needs_nothing_beside_itself_and_escapes_what_lists_say(
    good: str, tmp_path: Path
) -> None:
    parts = json.loads(Path(good).read_text())
    parts["labels"]["1"] = "<script>liver"
    parts["training"][0]["label"] = "missing<b>.nii.gz"
    path = write_list(tmp_path / "odd.json", **parts)
    checked(path, out=tmp_path / "out")
    page = (tmp_path / "out/check.html").read_text()
    assert "A run may not start" in page and page.count("data:image/png;base64") == 3
    assert "<script>" not in page and "missing<b>" not in page and "http" not in page


def test_nothing_of_the_users_is_overwritten_and_its_own_report_is(
    good: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "check.json").write_text("mine")
    line = refusal(main, [good], CheckConfig(out=str(out), workers=1))
    assert "check.json is there already" in line
    assert [path.name for path in out.iterdir()] == ["check.json"]
    assert (out / "check.json").read_text() == "mine"

    again = tmp_path / "again"
    assert checked(good, out=again) == checked(good, out=again)


def test_the_command_takes_lists_first_and_flags_after_them() -> None:
    paths, config = read_command(["a.json", "b.json", "--ct-window", "-175", "250"])
    assert paths == ["a.json", "b.json"] and config.ct_window == (-175, 250)
    assert "name the lists first" in refusal(read_command, ["--workers", "2"])
    swapped = CheckConfig(ct_window=(250.0, -175.0))
    assert "--ct-window" in refusal(main, ["a.json"], swapped)


# --- weights that were pre-trained on test cases


def seg_list(pretrained: Path, path: Path, **parts: list[dict[str, Any]]) -> str:
    """The list of the labelled phantoms with other parts, its files by full paths."""
    folder = path.parent / "phantoms"
    if not folder.exists():
        folder.symlink_to(pretrained / "phantoms")  # a list does not leave its folder
    whole = json.loads((folder / "ct_seg.json").read_text()) | parts
    for part in ("training", "validation", "test"):
        for item in whole.get(part, []):
            item["image"] = str(folder / item["image"])
            item["label"] = str(folder / item["label"])
    return write_list(path, **whole)


@pytest.fixture
def leaking(pretrained: Path, tmp_path: Path) -> str:
    """A list that tests on what was pre-trained on, under another name and with other axes."""
    parts = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    seen, unseen = parts["training"][:2]
    image = nib.load(pretrained / "phantoms" / seen["image"])
    nib.save(image.as_reoriented(axcodes2ornt("PIR")), tmp_path / "renamed.nii")
    test = [
        seen | {"image": str(tmp_path / "renamed.nii"), "subject": "stranger"},
    ]
    return seg_list(pretrained, tmp_path / "leaking.json", training=[unseen], test=test)


def test_pretraining_records_what_it_trained_on_and_not_what_it_validated_on(
    tiny: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    config = tiny(steps=1)
    pretrain(config)
    plan = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    code, report = checked(config.data, out=tmp_path / "check")
    by_part = {"train": set[str](), "held": set[str]()}
    for volume in report["volumes"]:
        name = Path(volume["image"][0]).name
        by_part[name[: len("train") if name.startswith("train") else 4]].add(
            volume["channels"][0]["content"]
        )
    assert set(plan["pretrained_on"]["voxels"]) == by_part["train"]
    assert not by_part["held"] & by_part["train"]
    assert len(plan["pretrained_on"]["subjects"]) == 5 and code == 0

    # Going on from these weights adds to what they know; weights that were never trained know none.
    more = tiny(steps=1, out=str(tmp_path / "more"), init=str(Path(config.out) / "last.pt"))
    parts = json.loads(Path(config.data).read_text())
    other = Path(config.data).parent / "swapped.json"
    write_list(other, training=parts["validation"], validation=parts["training"])
    pretrain(replace(more, data=str(other)))
    plan = checkpoint.load(Path(more.out) / "last.pt")["plan"]
    assert set(plan["pretrained_on"]["voxels"]) == by_part["train"] | by_part["held"]

    scratch = tiny(method="scratch", out=str(tmp_path / "scratch"))
    pretrain(scratch)
    plan = checkpoint.load(Path(scratch.out) / "last.pt")["plan"]
    assert plan["pretrained_on"] == {"subjects": [], "voxels": []}


def test_weights_that_were_pretrained_on_a_test_case_are_refused_unless_allowed(
    leaking: str, tiny_seg: Callable[..., SegConfig]
) -> None:
    config = tiny_seg(data=leaking, steps=1)
    line = refusal(fine_tune, config)
    assert "renamed.nii" in line and "--allow-leak" in line
    assert not Path(config.out).exists()

    allowed = tiny_seg(data=leaking, steps=1, allow_leak=True)
    fine_tune(allowed)
    assert any("renamed.nii" in note for note in events(allowed, "start")[0]["notes"])
    saved = checkpoint.load(Path(allowed.out) / "last.pt")
    assert saved["config"]["allow_leak"] and "renamed.nii" in saved["plan"]["leak"][0]


def test_without_the_weights_or_with_untrained_ones_nothing_leaks(
    leaking: str,
    tiny_seg: Callable[..., SegConfig],
    tiny: Callable[..., PretrainConfig],
    tmp_path: Path,
) -> None:
    fine_tune(tiny_seg(data=leaking, steps=1, from_scratch=True))
    scratch = tiny(method="scratch", out=str(tmp_path / "scratch"))
    pretrain(scratch)
    weights = str(Path(scratch.out) / "last.pt")
    fine_tune(tiny_seg(data=leaking, steps=1, pretrained=weights, out=str(tmp_path / "b")))


def test_pretraining_may_see_what_trains_and_what_validates_and_that_is_said(
    pretrained: Path, tiny_seg: Callable[..., SegConfig], tmp_path: Path
) -> None:
    parts = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    training = parts["training"]
    data = seg_list(pretrained, tmp_path / "a.json", training=training[:2], validation=training[2:])
    config = tiny_seg(data=data, steps=1)
    fine_tune(config)
    notes = events(config, "start")[0]["notes"]
    assert sum("pre-trained on 1 of the images that validate" in note for note in notes) == 1

    # Predictions refuse what was trained on with labels, and not what was seen without them.
    plan = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    assert len(plan["seen"]["voxels"]) == 2 and len(plan["pretrained_on"]["voxels"]) > 2
    assert "leak" not in plan

    usual = tiny_seg(steps=1, out=str(tmp_path / "usual"))
    fine_tune(usual)
    assert not any("pre-trained" in note for note in events(usual, "start")[0]["notes"])


def test_weights_that_say_nothing_of_what_they_saw_go_on_with_one_line(
    leaking: str, pretrained: Path, tiny_seg: Callable[..., SegConfig], tmp_path: Path
) -> None:
    saved = checkpoint.load(pretrained / "pre/last.pt")
    plan = {key: value for key, value in saved["plan"].items() if key != "pretrained_on"}
    checkpoint.save(tmp_path / "old.pt", {**saved, "plan": plan})
    config = tiny_seg(data=leaking, steps=1, pretrained=str(tmp_path / "old.pt"))
    fine_tune(config)
    notes = events(config, "start")[0]["notes"]
    assert sum("do not say what they were trained on" in note for note in notes) == 1


def test_a_run_that_is_resumed_keeps_what_its_weights_know(
    leaking: str, tiny_seg: Callable[..., SegConfig]
) -> None:
    config = tiny_seg(data=leaking, steps=2, allow_leak=True, stop_after=1)
    fine_tune(config)
    before = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    fine_tune(replace(config, stop_after=0, resume=True))
    after = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    assert after == before and "renamed.nii" in after["leak"][0]
    line = refusal(fine_tune, replace(config, stop_after=0, resume=True, allow_leak=False))
    assert "--allow-leak" in line


def test_a_prediction_says_which_images_pretraining_has_seen(
    tiny_seg: Callable[..., SegConfig],
    pretrained: Path,
    leaking: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By any name, also where fine-tuning had another list; also when it is carried on."""
    parts = json.loads(Path(leaking).read_text())
    clean = write_list(tmp_path / "clean.json", **{**parts, "test": []})
    config = tiny_seg(data=clean, steps=1)
    fine_tune(config)
    labelled = tiny_seg(data=leaking, steps=1, out=str(tmp_path / "b"), from_scratch=True)
    fine_tune(labelled)
    capsys.readouterr()

    def told(config: SegConfig, *items: dict[str, Any]) -> str:
        data = write_list(tmp_path / "t.json", **{**parts, "test": list(items)})
        predict(
            PredictConfig(
                checkpoint=(f"{config.out}/last.pt",),
                data=data,
                data_root="/",
                split="test",
                out=str(tmp_path / f"p{Path(config.out).name}"),
                device="cpu",
                amp="off",
            )
        )
        lines = "".join(capsys.readouterr()).splitlines()
        return "".join(line for line in lines if line.startswith("warning"))

    stranger = parts["test"][0]
    line = "warning: the network was pre-trained on 1 image of these, as renamed, without their"
    for _ in range(2):
        assert told(config, stranger).startswith(line)
    assert told(labelled, stranger) == ""  # from scratch


def test_test_images_that_cannot_be_read_do_not_stop_a_run(
    leaking: str, tiny_seg: Callable[..., SegConfig]
) -> None:
    parts = json.loads(Path(leaking).read_text())
    Path(parts["test"][0]["image"]).unlink()
    config = tiny_seg(data=leaking, steps=1)
    fine_tune(config)
    notes = events(config, "start")[0]["notes"]
    assert any("1 of the 1 test cases could not be read" in note for note in notes)


def test_a_list_that_cannot_be_fine_tuned_on_is_read_as_one_to_pretrain_on(good: str) -> None:
    items = load(good)
    assert overlaps.listed(good, items).purpose == "to fine-tune on"
    first = replace(items.training[0], label=None)
    lacking = replace(items, training=(first, *items.training[1:]))
    listed = overlaps.listed(good, lacking)
    assert listed.purpose == "to pre-train on" and 'has no "label"' in listed.unlabelled


def test_the_size_of_a_region_is_the_sum_of_its_labels() -> None:
    item = Item((Path("a.nii"),), ("t1",), ("mr",), "a")
    volumes = [
        Examined(item, labels={0: 9.0, 1: 2.0, 3: 1.0}),
        Examined(item, labels={0: 9.0, 2: 4.0}),
    ]
    regions = (Region("whole", (1, 2, 3)), Region("core", (1, 3)), Region("none", (5,)))
    found = regions_in(volumes, regions)
    assert list(found) == ["1, 2, 3", "1, 3", "5"]
    assert found["1, 2, 3"]["volumes"] == 2
    assert found["1, 2, 3"]["ml"] == {"median": 3.5, "min": 3.0, "max": 4.0}
    assert found["1, 3"] == {
        "name": "core",
        "volumes": 1,
        "ml": {"median": 3.0, "min": 3.0, "max": 3.0},
    }
    assert found["5"] == {"name": "none", "volumes": 0, "ml": None}
