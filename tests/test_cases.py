"""dae/evaluation/cases.py: a prediction meets its label on one grid, or one line says why not."""

import struct
from collections.abc import Callable
from math import inf, isnan, sqrt
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dae.data.regions import Region
from dae.errors import InputError
from dae.evaluation import cases
from dae.evaluation.cases import (
    COLUMNS,
    Pair,
    case_name,
    case_names,
    classes_in,
    content_of,
    diagonals,
    pair,
    read_scores,
    score,
    score_case,
    volumes_in,
    write_csv,
    write_scores,
)
from dae.evaluation.metrics import Labels, Row, score_labels

AFFINE = np.diag([3.0, 1.0, 2.0, 1.0])
MM = (3.0, 1.0, 2.0)  # of its voxels
DIAGONAL = sqrt(48**2 + 12**2 + 20**2)  # of `two_boxes` in mm
CLASSES = {0: "background", 1: "liver", 2: "spleen"}
ORGANS = {1: "liver", 2: "spleen"}


def saved(path: Path, labels: Labels, affine: Any = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine, dtype=labels.dtype), path)
    return path


def two_boxes(shift: int = 0) -> Labels:
    """Class 1 a box of 6 x 6 x 6, moved along axis 0, and class 2 another."""
    labels = np.zeros((16, 12, 10), np.uint8)
    labels[2 + shift : 8 + shift, 1:7, 2:8] = 1
    labels[12:15, 8:11, 2:8] = 2
    return labels


def refusal(call: Callable[[], object], *named: object) -> None:
    """One line, which names all that it is about."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert all(str(name) in line for name in named), line


# --- which file belongs to which


@pytest.mark.parametrize(
    "name, case",
    [
        ("s1.nii.gz", "s1"),
        ("s1.nii", "s1"),
        ("s1.v2.nii.gz", "s1.v2"),
        ("S1.NII.GZ", "S1"),
        ("s1.mgz", "s1.mgz"),
    ],
)
def test_a_case_is_the_file_name_without_its_endings(name: str, case: str) -> None:
    assert case_name(Path("somewhere") / name) == case


def test_names_that_repeat_are_told_apart_by_their_folders_and_others_stay() -> None:
    images = [Path("/d/s1/t1.nii.gz"), Path("/d/s2/t1.nii.gz"), Path("/d/s2/t2.nii")]
    assert case_names(images) == ["s1_t1", "s2_t1", "t2"]
    assert case_names([Path("/a/s1/t1.nii"), Path("/b/s1/t1.nii"), Path("/b/s2/t1.nii")]) == [
        "a_s1_t1",
        "b_s1_t1",
        "s2_t1",
    ]


def test_a_case_has_the_same_name_in_every_part_of_a_list() -> None:
    """In another fold another patient has the same file name: folds would mix the two up."""
    images = [Path("/d/zurich/001.nii"), Path("/d/vienna/001.nii"), Path("/d/zurich/002.nii")]
    whole = case_names(images)
    assert whole == ["zurich_001", "vienna_001", "002"]
    for n, image in enumerate(images):
        assert case_names([image], among=images) == [whole[n]]
    assert case_names(images[:1], among=[images[0], images[0]]) == ["001"]  # an item in two splits
    # What cannot be told apart elsewhere in a list stands in the way of no case.
    alike = [Path("/s/a.nii"), Path("/s/a.nii.gz"), Path("/a/x.nii"), Path("/b/x.nii")]
    alike += [Path("/a_x.nii"), Path("/z.nii")]
    assert case_names(alike[-1:], among=alike) == ["z"]
    assert case_names(alike[:1], among=alike) == ["s_a"]
    refusal(lambda: case_names(alike[:2], among=alike), "/s/a.nii", "twice")
    other = Path("/d/a/B.nii"), Path("/d/b/b.nii")
    assert case_names(other[:1], among=other) == ["B"]  # only one of them is written


def test_a_made_up_name_does_not_hide_a_true_one() -> None:
    names = case_names([Path("/d/s1/t1.nii"), Path("/d/s2/t1.nii"), Path("/d/s3/s1_t1.nii")])
    assert len(set(names)) == 3


def test_one_image_named_twice_is_refused() -> None:
    refusal(lambda: case_names([Path("/d/t1.nii"), Path("/d/t1.nii")]), "/d/t1.nii", "twice")


def test_two_folders_pair_by_case_whatever_the_ending(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii"):
        saved(tmp_path / "predictions" / name, two_boxes())
    for name in ("a.nii.gz", "b.nii.gz"):
        saved(tmp_path / "labels" / name, two_boxes())
    (tmp_path / "labels" / "notes.txt").write_text("not a case")
    found = pair(tmp_path / "predictions", tmp_path / "labels")
    assert [(each.case, each.prediction.name, each.label.name) for each in found] == [
        ("a", "a.nii", "a.nii.gz"),
        ("b", "b.nii.gz", "b.nii.gz"),
    ]


def test_a_list_pairs_by_its_own_names(tmp_path: Path) -> None:
    saved(tmp_path / "p" / "s1_t1.nii.gz", two_boxes())
    label = saved(tmp_path / "s1" / "truth.nii.gz", two_boxes())
    assert pair(tmp_path / "p", [("s1_t1", label)]) == [
        Pair("s1_t1", tmp_path / "p" / "s1_t1.nii.gz", label)
    ]


def test_what_cannot_be_paired_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    refusal(lambda: pair(predictions, labels), predictions, "no such folder")
    predictions.mkdir()
    refusal(lambda: pair(predictions, labels), predictions, "holds no .nii or .nii.gz file")
    for name in "abc":
        saved(predictions / f"{name}.nii.gz", two_boxes())
    saved(labels / "a.nii.gz", two_boxes())
    refusal(lambda: pair(predictions, labels), labels, "no label for case b and 1 more")
    for name in "bcdefg":
        saved(labels / f"{name}.nii.gz", two_boxes())
    refusal(lambda: pair(predictions, labels), predictions, "no prediction for case d and 3 more")
    saved(predictions / "a.nii", two_boxes())
    refusal(
        lambda: pair(predictions, labels),
        predictions,
        "case a is there both as .nii and as .nii.gz",
    )


def test_a_list_that_does_not_fit_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "a.nii.gz", two_boxes())
    lost = tmp_path / "labels" / "a.nii.gz"
    refusal(lambda: pair(tmp_path, [("a", lost)]), lost, "no such file")
    refusal(lambda: pair(tmp_path, [("a", None)]), "the list: no label for case a")
    refusal(lambda: pair(tmp_path, [("b", lost)]), "the list: no label for case a")
    refusal(
        lambda: pair(tmp_path, [("a", lost), ("b", lost)]), tmp_path, "no prediction for case b"
    )
    refusal(lambda: pair(tmp_path, [("a", lost), ("a", lost)]), "case a more than once")


def test_hidden_files_are_no_cases(tmp_path: Path) -> None:
    """macOS leaves a ._name beside each name; it is no volume."""
    for folder in ("predictions", "labels"):
        saved(tmp_path / folder / "a.nii.gz", two_boxes())
        (tmp_path / folder / "._a.nii.gz").write_bytes(b"\0\5\26\7 Mac OS X")
    assert [each.case for each in pair(tmp_path / "predictions", tmp_path / "labels")] == ["a"]
    saved(tmp_path / "labels" / ".b.nii", two_boxes())
    assert volumes_in(tmp_path / "labels") == [tmp_path / "labels" / "a.nii.gz"]


def test_nothing_is_scored_against_itself(tmp_path: Path) -> None:
    label = saved(tmp_path / "labels" / "a.nii.gz", two_boxes())
    refusal(
        lambda: pair(tmp_path / "labels", tmp_path / "labels"), label, "is the prediction as well"
    )
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "a.nii.gz").symlink_to(label)
    refusal(
        lambda: pair(tmp_path / "predictions", [("a", label)]), label, "is the prediction as well"
    )


def test_classes_are_what_the_files_hold_where_no_list_names_them(tmp_path: Path) -> None:
    a, b = two_boxes(), two_boxes()
    b[0, 0, 0] = 7
    files = saved(tmp_path / "a.nii", a), saved(tmp_path / "b.nii", b)
    assert classes_in(files) == {1: "1", 2: "2", 7: "7"}


# --- scores


def test_distances_are_in_mm_of_the_header(tmp_path: Path) -> None:
    prediction = saved(tmp_path / "s1.nii.gz", two_boxes(shift=2))
    label = saved(tmp_path / "label.nii.gz", two_boxes())
    liver, spleen = score_case(prediction, label, CLASSES)
    assert (liver["case"], liver["class"], liver["name"]) == ("s1", 1, "liver")
    assert liver["status"] == "ok"
    assert liver["hd"] == liver["hd95"] == 6  # two voxels of 3 mm
    assert liver["dice"] == pytest.approx(2 / 3)
    assert liver["volume_truth_ml"] == pytest.approx(6**3 * 6 / 1000)
    assert (spleen["dice"], spleen["hd"]) == (1, 0)


def test_rows_are_those_of_score_labels_with_all_its_choices(tmp_path: Path) -> None:
    files = saved(tmp_path / "a.nii", two_boxes(1)), saved(tmp_path / "b.nii", two_boxes())
    choices: dict[str, Any] = {"tolerance": {1: 3.0, 2: 0.0}, "definition": "medpy"}
    expected = score_labels(two_boxes(1), two_boxes(), MM, ORGANS, **choices)
    assert score_case(*files, CLASSES, **choices) == [{"case": "a", **row} for row in expected]
    assert score_case(*files, CLASSES) != score_case(*files, CLASSES, **choices)
    assert [row["name"] for row in score_case(*files, [0, 1, 2])] == ["1", "2"]


def test_a_prediction_stored_along_other_axes_is_on_the_same_grid(tmp_path: Path) -> None:
    turned = nib.Nifti1Image(two_boxes(), AFFINE).as_reoriented([[2, -1], [0, 1], [1, -1]])
    nib.save(turned, tmp_path / "a.nii.gz")
    rows = score_case(tmp_path / "a.nii.gz", saved(tmp_path / "b.nii.gz", two_boxes()), CLASSES)
    assert [row["dice"] for row in rows] == [1, 1]


def test_other_grids_are_refused_by_both_names_and_their_distance(tmp_path: Path) -> None:
    """Voxels of 3 x 1 x 2 mm: a tenth of one is another length along each axis."""
    label = saved(tmp_path / "label.nii", two_boxes())
    path = saved(tmp_path / "a.nii", two_boxes()[:-1])
    sizes = "15 x 12 x 10 and 16 x 12 x 10 voxels"
    refusal(lambda: score_case(path, label, CLASSES), path, label, sizes)
    for element, off, words in (
        ((0, 3), 0.29, ""),
        ((0, 3), 0.31, "up to 0.31 mm (0.103 voxels) apart"),
        ((1, 3), 0.11, "up to 0.11 mm (0.11 voxels) apart"),
        ((2, 2), 0.018, ""),  # ten voxels of 2.018 mm end .18 mm farther
        ((2, 2), 0.03, "up to 0.285 mm (0.14"),  # the outer face of the last voxel: 9.5 x .03
    ):
        affine = AFFINE.copy()
        affine[element] += off
        saved(path, two_boxes(), affine)
        if words:
            refusal(lambda: score_case(path, label, CLASSES), path, label, words)
        else:
            assert score_case(path, label, CLASSES)[0]["dice"] == 1


def rotated(degrees: float) -> Any:
    a = np.radians(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return affine @ AFFINE


@pytest.mark.parametrize("degrees", [30, 45])
def test_headers_that_differ_in_the_seventh_digit_are_one_grid_at_45_degrees_too(
    degrees: int, tmp_path: Path
) -> None:
    """There the axes of one are ordered apart from those of the other."""
    square = np.diag([1 / 3, 1, 1, 1])  # 1 x 1 x 2 mm, so that the order hangs on the angle
    one = saved(tmp_path / "0.nii", two_boxes(0), rotated(degrees - 1e-5) @ square)
    other = saved(tmp_path / "1.nii", two_boxes(1), rotated(degrees + 1e-5) @ square)
    for prediction, label in ((one, other), (other, one)):
        liver, spleen = score_case(prediction, label, CLASSES)
        assert liver["dice"] == pytest.approx(5 / 6)
        assert liver["hd"] == pytest.approx(1)
        assert spleen["dice"] == 1


def test_a_sheared_grid_has_no_distances_in_mm_and_is_refused(tmp_path: Path) -> None:
    """Scores have no room for a warning. A gantry tilt of 15 degrees costs lengths up to 16 %."""
    tilted = AFFINE.copy()
    tilted[:3, 2] = 0, 2 * np.sin(np.radians(15)), 2 * np.cos(np.radians(15))
    path = saved(tmp_path / "a.nii", two_boxes(), tilted)
    label = saved(tmp_path / "b.nii", two_boxes(), tilted)
    refusal(lambda: score_case(path, label, CLASSES), label, "not perpendicular", "16% wrong")


@pytest.mark.parametrize("unit, mm", [("micron", 0.001), ("meter", 1000)])
def test_distances_volumes_and_diagonals_are_in_mm_whatever_the_unit(
    unit: str, mm: float, tmp_path: Path
) -> None:
    expected = score_labels(two_boxes(2), two_boxes(), MM, ORGANS)
    for name, labels in (("a", two_boxes(2)), ("b", two_boxes())):
        image = nib.Nifti1Image(labels, AFFINE / [mm, mm, mm, 1])
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / f"{name}.nii")
    rows = score_case(tmp_path / "a.nii", tmp_path / "b.nii", CLASSES)
    for row, by_hand in zip(rows, expected):
        assert {key: row[key] for key in by_hand} == pytest.approx(by_hand)
    (length,) = diagonals([Pair("a", tmp_path / "a.nii", tmp_path / "b.nii")]).values()
    assert length == pytest.approx(DIAGONAL)


def test_labels_with_an_axis_of_one_are_scored_as_others(tmp_path: Path) -> None:
    """Files of (x, y, z, 1), against labels stored along other axes."""
    turned = nib.Nifti1Image(two_boxes(), AFFINE).as_reoriented([[2, -1], [0, 1], [1, -1]])
    nib.save(turned, tmp_path / "b.nii")
    prediction = saved(tmp_path / "a.nii", two_boxes(2)[..., None])
    liver, _ = score_case(prediction, tmp_path / "b.nii", CLASSES)
    assert (liver["dice"], liver["hd"]) == pytest.approx((2 / 3, 6))
    for truth in (tmp_path / "b.nii", prediction):
        (length,) = diagonals([Pair("a", prediction, truth)]).values()
        assert length == pytest.approx(DIAGONAL)


def test_labels_beyond_the_classes_are_refused_by_file_and_value(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.nii", two_boxes())
    with_nine = two_boxes().astype(np.int16)
    with_nine[0, 0, 0] = 9
    bad = saved(tmp_path / "bad.nii", with_nine)
    refusal(lambda: score_case(bad, good, CLASSES), bad, "label 9", "[0, 1, 2]")
    refusal(lambda: score_case(good, bad, CLASSES), bad, "label 9", "[0, 1, 2]")
    saved(bad, -with_nine)
    refusal(lambda: score_case(bad, good, CLASSES), bad, "label -9")


def test_what_was_not_annotated_counts_for_nothing(tmp_path: Path) -> None:
    truth = two_boxes()
    truth[:, :, 5:] = 3
    prediction = two_boxes(1)
    prediction[:, :, 5:] = np.random.default_rng(0).integers(0, 3, prediction[:, :, 5:].shape)
    files = saved(tmp_path / "a.nii", prediction), saved(tmp_path / "b.nii", truth)
    refusal(lambda: score_case(*files, CLASSES), files[1], "label 3")
    rows = score_case(*files, {**CLASSES, 3: "ignore"}, ignore=3)
    truth[truth == 3] = 0
    not_annotated = np.zeros(truth.shape, bool)
    not_annotated[:, :, 5:] = True
    expected = score_labels(prediction, truth, MM, ORGANS, ignore=not_annotated)
    assert rows == [{"case": "a", **row} for row in expected]
    assert [row["dice"] for row in rows] == pytest.approx([5 / 6, 1])


def test_what_was_not_annotated_is_nothing_to_predict(tmp_path: Path) -> None:
    files = saved(tmp_path / "a.nii", two_boxes()), saved(tmp_path / "b.nii", two_boxes())
    refusal(lambda: score_case(*files, CLASSES, ignore=2), files[0], "label 2")


# --- regions

BRATS = (
    Region("whole", (1, 2, 3), 2),
    Region("core", (1, 3), 1),
    Region("enhancing", (3,), 3),
)
TUMOUR = {0: "background", 1: "core", 2: "whole", 3: "enhancing"}


def nested(shift: int = 0) -> Labels:
    """Boxes within each other: 2 all around 1, and 1 all around 3."""
    labels = np.zeros((16, 12, 10), np.uint8)
    labels[2 + shift : 12 + shift, 1:11, 1:9] = 2
    labels[4 + shift : 9 + shift, 3:9, 2:8] = 1
    labels[5 + shift : 8 + shift, 4:8, 3:7] = 3
    return labels


def distances(one: Any, other: Any) -> Any:
    """From each border voxel of a mask to the nearest border voxel of another, in mm, by SciPy."""
    border = one & ~ndimage.binary_erosion(one)
    to_other = other & ~ndimage.binary_erosion(other)
    return ndimage.distance_transform_edt(~to_other, MM)[border]


def test_a_region_is_scored_as_the_union_of_its_labels(tmp_path: Path) -> None:
    files = saved(tmp_path / "a.nii", nested(2)), saved(tmp_path / "b.nii", nested())
    rows = score_case(*files, TUMOUR, regions=BRATS, tolerance=3.0)
    assert [(row["class"], row["name"]) for row in rows] == [
        (1, "whole"),
        (2, "core"),
        (3, "enhancing"),
    ]
    for row, region in zip(rows, BRATS):
        prediction, truth = (np.isin(labels, region.labels) for labels in (nested(2), nested()))
        both = [*distances(prediction, truth), *distances(truth, prediction)]
        dice = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
        assert row["dice"] == pytest.approx(dice)
        assert row["hd"] == pytest.approx(max(both))
        assert row["msd"] == pytest.approx(np.mean(both))
        assert row["nsd"] == pytest.approx(np.mean(np.array(both) <= 3 + 1e-6))
        assert row["volume_truth_ml"] == pytest.approx(truth.sum() * 6 / 1000)


def test_a_label_within_a_region_may_be_another_one_of_that_region(tmp_path: Path) -> None:
    """A map of any program: core and enhancing exchanged leave the whole as it is."""
    prediction = nested()
    prediction[nested() == 1] = 3
    prediction[nested() == 3] = 1
    files = saved(tmp_path / "a.nii", prediction), saved(tmp_path / "b.nii", nested())
    dice = [row["dice"] for row in score_case(*files, TUMOUR, regions=BRATS)]
    assert dice == [1, 1, 0]


def test_a_region_is_missed_spurious_or_absent_as_a_class_is(tmp_path: Path) -> None:
    """BraTS gives a Dice of 1 where both are empty; here that is no number."""
    prediction, truth = nested(), nested()
    truth[truth == 3] = 1
    empty = np.zeros_like(truth)
    for a, b, statuses in (
        (prediction, truth, ["ok", "ok", "spurious"]),
        (truth, prediction, ["ok", "ok", "missed"]),
        (truth, truth, ["ok", "ok", "absent"]),
        (empty, truth, ["missed", "missed", "absent"]),
        (empty, empty, ["absent", "absent", "absent"]),
    ):
        files = saved(tmp_path / "a.nii", a), saved(tmp_path / "b.nii", b)
        rows = score_case(*files, TUMOUR, regions=BRATS)
        assert [row["status"] for row in rows] == statuses
        for row in rows:
            if row["status"] == "absent":
                assert isnan(row["dice"]) and isnan(row["hd"])
            elif row["status"] != "ok":
                assert (row["dice"], row["hd"]) == (0, inf)


def test_a_region_has_its_own_tolerance_and_ignores_what_was_not_annotated(tmp_path: Path) -> None:
    truth = nested()
    truth[:, :, 5:] = 9
    files = saved(tmp_path / "a.nii", nested(1)), saved(tmp_path / "b.nii", truth)
    tolerance = {1: 3.0, 2: 0.0, 3: 3.0}
    rows = score_case(*files, TUMOUR, regions=BRATS, ignore=9, tolerance=tolerance)
    unknown = truth == 9
    for row, region in zip(rows, BRATS):
        masks = [np.isin(m, region.labels).astype(np.uint8) for m in (nested(1), truth)]
        mm = tolerance[row["class"]]
        (expected,) = score_labels(*masks, MM, [1], tolerance=mm, ignore=unknown)
        for key in ("dice", "hd", "nsd", "status"):
            assert row[key] == expected[key]


def test_a_list_of_regions_still_refuses_labels_of_none(tmp_path: Path) -> None:
    odd = nested()
    odd[0, 0, 0] = 7
    files = saved(tmp_path / "a.nii", odd), saved(tmp_path / "b.nii", nested())
    refusal(lambda: score_case(*files, TUMOUR, regions=BRATS), files[0], "label 7")


def test_a_wrong_choice_is_one_line(tmp_path: Path) -> None:
    files = saved(tmp_path / "a.nii", two_boxes()), saved(tmp_path / "b.nii", two_boxes())
    refusal(lambda: score_case(*files, CLASSES, tolerance=-1.0), "tolerance of 0 mm or more")
    other: Any = "other"
    refusal(lambda: score_case(*files, CLASSES, definition=other), "definition must be one of")


def test_an_affine_that_is_none_is_one_line(tmp_path: Path) -> None:
    flat = saved(tmp_path / "c.nii", two_boxes())
    content = bytearray(flat.read_bytes())
    struct.pack_into("<4f", content, 312, 0, 0, 0, 0)  # srow_z
    flat.write_bytes(content)
    refusal(lambda: score_case(flat, flat, CLASSES), flat)


def test_all_cases_are_scored_in_order_and_each_has_a_diagonal(tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 2)):
        saved(tmp_path / "p" / f"{name}.nii.gz", two_boxes(shift))
        saved(tmp_path / "l" / f"{name}.nii.gz", two_boxes())
    pairs = pair(tmp_path / "p", tmp_path / "l")
    rows, lengths, contents = score(pairs, CLASSES, tolerance=6.0)
    assert [(row["case"], row["class"]) for row in rows] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert rows[2]["nsd"] == 1
    assert score(pairs, CLASSES).rows[2]["nsd"] < 1
    assert contents["a"] == contents["b"]  # the label maps are alike, the predictions are not
    assert lengths == diagonals(pairs) == pytest.approx({"a": DIAGONAL, "b": DIAGONAL})


def test_the_content_of_a_label_map_is_its_voxels_however_they_are_stored(tmp_path: Path) -> None:
    labels = two_boxes()
    path = saved(tmp_path / "a.nii", labels)
    content = score([Pair("a", path, path)], CLASSES).labels["a"]
    turned = nib.Nifti1Image(labels.astype(np.int32), AFFINE).as_reoriented(
        [[2, -1], [0, 1], [1, -1]]
    )
    nib.save(turned, tmp_path / "b.nii.gz")
    saved(tmp_path / "c.nii", labels.astype(np.float32))
    for name in ("b.nii.gz", "c.nii"):
        assert score([Pair("x", path, tmp_path / name)], CLASSES).labels["x"] == content

    labels[0, 0, 0] = 1
    changed = saved(tmp_path / "d.nii", labels)
    assert score([Pair("x", path, changed)], CLASSES).labels["x"] != content
    assert content_of(np.zeros((2, 3, 4), np.uint8)) != content_of(np.zeros((4, 3, 2), np.uint8))


# --- scores.csv


def some_rows(tmp_path: Path) -> list[Row]:
    """Good, missed, spurious and absent classes, with numbers that need all their digits."""
    truth = two_boxes()
    truth[0, 0, 0] = 3
    prediction = two_boxes(1)
    prediction[0, 5, 0] = 4
    files = saved(tmp_path / "a,b.nii", prediction), saved(tmp_path / "t.nii", truth)
    names = {1: "liver", 2: "spleen, left", 3: 'a "name"', 4: "vena cava", 5: "é"}
    return score_case(*files, names)


def in_columns(row: Row) -> Row:
    return {name: row[name] for name in COLUMNS}


def test_scores_come_back_exactly(tmp_path: Path) -> None:
    rows = some_rows(tmp_path)
    assert {row["status"] for row in rows} == {"ok", "missed", "spurious", "absent"}
    write_scores(rows, tmp_path / "out.csv")
    found = read_scores(tmp_path / "out.csv")
    assert [list(row) for row in found] == [list(COLUMNS)] * len(rows)
    assert repr(found) == repr([in_columns(row) for row in rows])
    assert found[0]["dice"] == 5 / 6
    assert found[2]["hd95"] == inf
    assert isnan(found[4]["dice"])


def test_the_columns_are_the_promised_ones_and_infinity_is_spelled_out(tmp_path: Path) -> None:
    write_scores(some_rows(tmp_path), tmp_path / "scores.csv")
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == (
        "case,class,name,status,dice,hd,msd,hd95,assd,masd,msd_prediction_to_truth,"
        "msd_truth_to_prediction,nsd,volume_truth_ml,volume_prediction_ml"
    )
    assert lines[3].startswith('"a,b",3,"a ""name""",missed,0.0,inf,inf,')
    assert ",absent,nan,nan," in lines[5]


def test_a_file_without_the_column_msd_takes_it_from_assd(tmp_path: Path) -> None:
    rows = some_rows(tmp_path)
    without = [name for name in COLUMNS if name != "msd"]
    write_csv(rows, tmp_path / "scores.csv", without)
    assert "hd,hd95" in (tmp_path / "scores.csv").read_text()
    expected = [in_columns(row) for row in rows]
    assert repr(read_scores(tmp_path / "scores.csv")) == repr(expected)


def test_what_else_a_row_holds_stays_out_of_the_file(tmp_path: Path) -> None:
    rows = [{**row, "diagonal_mm": 3.0} for row in some_rows(tmp_path)]
    write_scores(rows, tmp_path / "scores.csv")
    assert "diagonal" not in (tmp_path / "scores.csv").read_text()


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows(tmp_path)
    write_scores(rows, tmp_path / "scores.csv")
    before = (tmp_path / "scores.csv").read_bytes()

    def stopped(self: Path, target: Path) -> None:
        raise OSError("stopped here")

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(OSError, match="stopped here"):
        write_scores(rows[:1], tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_bytes() == before


HEAD = ",".join(COLUMNS) + "\n"
GOOD = "a,1,n,ok" + ",0.5" * 11 + "\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("a,b\n1,2\n", "KeyError after 0 rows: 'dice'"),
        (HEAD, "holds no scores"),
        ("", "holds no scores"),
        (HEAD + GOOD + "a,1,n,ok,x" + ",0" * 10, "1 rows: could not convert string to float: 'x'"),
        (HEAD + "a,1,n,ok,0.5\n", "TypeError"),
        (HEAD + "a,one,n,ok" + ",0" * 11 + "\n", "invalid literal for int"),
    ],
)
def test_what_is_not_a_scores_csv_is_refused_by_name(
    content: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.csv"
    refusal(lambda: read_scores(path), path)
    path.write_text(content)
    refusal(lambda: read_scores(path), path, reason)


def test_nothing_is_left_beside_what_was_written(tmp_path: Path) -> None:
    write_scores(some_rows(tmp_path / "in"), tmp_path / "scores.csv")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "scores.csv"]


def test_scoring_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, object] = {}

    def progress(pairs: list[Pair], **shown: object) -> list[Pair]:
        options.update(shown)
        return pairs

    monkeypatch.setattr(cases, "tqdm", progress)
    path = saved(tmp_path / "a.nii", two_boxes())
    score([Pair("a", path, path)], CLASSES)
    assert options["unit"] == "case"
    assert options["disable"] is None
