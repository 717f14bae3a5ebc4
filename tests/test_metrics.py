"""Scores against numbers that pencil and paper give, a double loop, and what holds for any maps."""

from itertools import pairwise, permutations
from math import dist, inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from dae.evaluation.metrics import (
    DEFINITIONS,
    DISTANCES,
    METRICS,
    Labels,
    Mask,
    Row,
    border_voxels,
    score_labels,
)

Corner = int | tuple[int, int, int]
Spacing = tuple[float, float, float]
Scene = tuple[Labels, Labels, Spacing]  # prediction, truth, mm
Point = tuple[float, ...]  # in mm

MEANS = ("msd", "assd", "masd", "msd_prediction_to_truth", "msd_truth_to_prediction")
DIRECTED = ("msd_prediction_to_truth", "msd_truth_to_prediction")
VOLUMES = ("volume_truth_ml", "volume_prediction_ml")
KEYS = ["class", "name", "status", *METRICS, *VOLUMES]

ISO: Spacing = (1.0, 1.0, 1.0)
NOTHING = np.zeros((24, 24, 24), np.uint8)

any_definition = pytest.mark.parametrize("definition", DEFINITIONS)


def box(low: Corner, high: Corner, shape: tuple[int, int, int] = (24, 24, 24)) -> Labels:
    """Label 1 from `low` up to but without `high`, each one number or three."""
    labels = np.zeros(shape, np.uint8)
    corners = zip(np.broadcast_to(low, 3), np.broadcast_to(high, 3))
    labels[tuple(slice(a, b) for a, b in corners)] = 1
    return labels


def sphere(centre: tuple[int, int, int], radius: int, n: int = 64) -> Labels:
    grid = np.indices((n, n, n)) - np.reshape(centre, (3, 1, 1, 1))
    return ((grid**2).sum(0) <= radius**2).astype(np.uint8)


def score(prediction: Labels, truth: Labels, spacing: Any = ISO, **choices: Any) -> Row:
    """The row of class 1."""
    return score_labels(prediction, truth, spacing, [1], **choices)[0]


def holds(row: Row, **expected: float) -> None:
    scores = {key: row[key] for key in expected}
    assert scores == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


def distances(value: float) -> dict[str, float]:
    return dict.fromkeys(DISTANCES, value)


def means(value: float) -> dict[str, float]:
    return dict.fromkeys(MEANS, value)


# --- closed forms


@any_definition
@pytest.mark.parametrize("spacing", [ISO, (3.0, 1.0, 2.0)])
def test_a_perfect_prediction_has_no_distance(definition: str, spacing: Spacing) -> None:
    row = score(box(5, 15), box(5, 15), spacing, definition=definition)
    holds(row, dice=1, nsd=1, **distances(0))


@any_definition
@pytest.mark.parametrize("spacing, length", [(ISO, 7), ((3.0, 1.0, 2.0), sqrt(189))])
def test_two_voxels_are_as_far_apart_as_their_centres(
    definition: str, spacing: Spacing, length: float
) -> None:
    prediction = box((5, 5, 5), (6, 6, 6))
    truth = box((7, 8, 11), (8, 9, 12))
    row = score(prediction, truth, spacing, definition=definition)
    holds(row, dice=0, nsd=0, **distances(length))


def test_two_planes_are_as_far_apart_as_their_slices() -> None:
    row = score(box((3, 0, 0), (4, 24, 24)), box((7, 0, 0), (8, 24, 24)), (2.5, 1.0, 1.0))
    holds(row, dice=0, nsd=0, **distances(10))


def test_a_shifted_box() -> None:
    shifted = box((7, 5, 5), (17, 15, 15))
    truth = box(5, 15)
    row = score(shifted, truth, tolerance=0)
    holds(row, dice=0.8, hd=2, hd95=2, nsd=36 / 61, **means(42 / 61))
    holds(score(shifted, truth, tolerance=1), nsd=44 / 61)
    assert len(border_voxels(np.pad(truth, 1), [1])[1]) == 488


def test_a_shifted_box_of_anisotropic_voxels() -> None:
    row = score(box((7, 5, 5), (17, 15, 15)), box(5, 15), (3.0, 1.0, 2.0))
    holds(row, dice=0.8, hd=6, hd95=6, nsd=38 / 61, **means(107 / 61))


def test_a_longer_box_tells_the_means_apart() -> None:
    row = score(box((5, 5, 5), (15, 15, 17)), box(5, 15), (3.0, 1.0, 2.0))
    holds(row, dice=10 / 11, hd=4, hd95=4, assd=157 / 262, masd=1241 / 2135)
    holds(row, msd_prediction_to_truth=59 / 70, msd_truth_to_prediction=39 / 122)
    assert row["msd"] == row["assd"]


def line_and_specks(specks: int) -> tuple[Labels, Labels]:
    """A line of 100 voxels, and the same with `specks` more at a distance of 50."""
    truth = box((0, 0, 0), (1, 1, 100), (60, 8, 100))
    return np.maximum(truth, box((50, 0, 0), (51, 1, specks), (60, 8, 100))), truth


def test_hd95_is_a_step_where_specks_reach_a_twentieth_of_the_surface() -> None:
    row = score(*line_and_specks(6))
    holds(row, hd=50, hd95=37.5, assd=150 / 103, masd=75 / 53)
    holds(score(*line_and_specks(5)), hd=50, hd95=0)


def test_pooling_hides_the_same_specks() -> None:
    row = score(*line_and_specks(6), definition="medpy")
    holds(row, hd=50, hd95=0, assd=150 / 103, masd=75 / 53)


def test_a_cube_in_a_concentric_one() -> None:
    row = score(box(7, 17), box(5, 19))
    assd = (976 + 1200 + 240 * sqrt(5) + 120 * sqrt(8) + 24 * sqrt(6) + 72 + 8 * sqrt(12)) / 1504
    holds(row, dice=2000 / 3744, hd=sqrt(12), hd95=sqrt(8), msd=assd, assd=assd, masd=2.099689)


def test_the_face_of_the_volume_is_a_border() -> None:
    row = score(box(2, 22), box(0, 24))
    holds(row, dice=0.7331378, hd=sqrt(12), hd95=sqrt(8), assd=2.0671103)


def half_spaces() -> tuple[Labels, Labels]:
    shape = (20, 20, 20)
    return box(0, (10, 20, 20), shape), box(0, (8, 20, 20), shape)


def test_half_spaces_meet_on_the_faces_of_the_volume() -> None:
    holds(score(*half_spaces()), hd=2, assd=182 / 333, masd=0.541971)


@any_definition
def test_half_spaces_are_two_apart_where_the_outside_is_not_known(definition: str) -> None:
    prediction, truth = (np.pad(labels, 1) for labels in half_spaces())
    outside = np.pad(np.zeros((20, 20, 20), bool), 1, constant_values=True)
    row = score(prediction, truth, ignore=outside, definition=definition)
    holds(row, **distances(2))


def test_a_hole_is_a_surface() -> None:
    solid = box(5, 16)
    hollow = box(5, 16)
    hollow[10, 10, 10] = 0
    row = score(hollow, solid, tolerance=0)
    holds(row, hd=4, hd95=0, assd=12 / 605, masd=3 / 152, nsd=1204 / 1210)


def test_touching_boxes_do_not_overlap() -> None:
    row = score(box((11, 5, 5), (21, 15, 15)), box((1, 5, 5), (11, 15, 15)))
    holds(row, dice=0, hd=10, hd95=10, **means(11 / 2))


def test_shifted_spheres_come_near_the_continuous_ones() -> None:
    radius = 20
    shift = 5
    row = score(sphere((32, 32, 32 + shift), radius), sphere((32, 32, 32), radius), tolerance=1)
    dice = 1 - 3 * shift / (4 * radius) + shift**3 / (16 * radius**3)
    assert row["dice"] == pytest.approx(dice, abs=0.005)
    assert [row["hd"], row["hd95"]] == pytest.approx([shift, 0.95 * shift], abs=0.6)
    assert [row[mean] for mean in MEANS] == pytest.approx([shift / 2] * 5, abs=0.3)
    assert row["nsd"] == pytest.approx(1 / shift, abs=0.1)


def test_concentric_spheres_come_near_the_continuous_ones() -> None:
    row = score(sphere((32, 32, 32), 20), sphere((32, 32, 32), 23))
    assert row["dice"] == pytest.approx(2 * 20**3 / (20**3 + 23**3), abs=0.005)
    assert [row["hd"], row["hd95"]] == pytest.approx([3, 3], abs=0.6)
    assert [row[mean] for mean in MEANS] == pytest.approx([3] * 5, abs=0.3)


def test_an_absent_class_has_no_score() -> None:
    row = score(NOTHING, NOTHING)
    assert row["status"] == "absent"
    holds(row, volume_truth_ml=0, volume_prediction_ml=0, **dict.fromkeys(METRICS, nan))


@pytest.mark.parametrize("definition", ["default", "medpy"])
def test_a_missed_organ_is_infinitely_far(definition: str) -> None:
    missed = score(NOTHING, box(5, 15), (1, 2, 3), definition=definition)
    spurious = score(box(5, 15), NOTHING, (1, 2, 3), definition=definition)
    assert (missed["status"], spurious["status"]) == ("missed", "spurious")
    holds(missed, dice=0, nsd=0, volume_truth_ml=6, volume_prediction_ml=0, **distances(inf))
    holds(spurious, dice=0, nsd=0, volume_truth_ml=0, volume_prediction_ml=6, **distances(inf))


def test_the_monai_definition_forgets_what_is_missed() -> None:
    missed = score(NOTHING, box(5, 15), definition="monai")
    spurious = score(box(5, 15), NOTHING, definition="monai")
    holds(missed, dice=0, hd=inf, hd95=nan, assd=inf, nsd=0)
    holds(spurious, dice=nan, hd=inf, hd95=nan, nsd=0)


# --- what holds for any maps


@st.composite
def scenes(draw: st.DrawFn, side: int = 9, classes: int = 3) -> Scene:
    """Two overlapping label maps with blobs, specks and holes, and a spacing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = rng.integers(4, side, 3)
    blobs = rng.integers(0, classes + 1, -(-shape // 3))
    coarse = np.kron(blobs, np.ones((3, 3, 3), int))
    truth = coarse[tuple(slice(n) for n in shape)]

    noise = rng.random(shape) < 0.1
    shifted = np.roll(truth, rng.integers(0, 2, 3), (0, 1, 2))
    prediction = np.where(noise, rng.integers(0, classes + 1, shape), shifted)
    a, b, c = rng.choice([0.5, 0.7, 1.0, 1.3, 3.0], 3).tolist()
    return prediction, truth, (a, b, c)


def rows_of(
    prediction: Labels, truth: Labels, spacing: Any, definition: Any = "default", **choices: Any
) -> list[Row]:
    return score_labels(prediction, truth, spacing, [1, 2, 3], definition=definition, **choices)


def same(rows: list[Row], others: list[Row]) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row["status"] == other["status"]
        holds(row, **{key: other[key] for key in (*METRICS, *VOLUMES)})


def border_points(mask: Mask, spacing: Spacing) -> list[Point]:
    faces = ndimage.generate_binary_structure(3, 1)
    inner = ndimage.binary_erosion(mask, faces, border_value=0)
    return [tuple(index * np.array(spacing)) for index in np.argwhere(mask & ~inner)]


def nearest(point: Point, others: list[Point]) -> float:
    return min(dist(point, other) for other in others)


def by_double_loop(
    prediction: Mask, truth: Mask, spacing: Spacing, tolerance: float
) -> dict[str, float]:
    """The default definition from its words, for two masks that are not empty."""
    predicted = border_points(prediction, spacing)
    true = border_points(truth, spacing)
    forth = [nearest(point, true) for point in predicted]
    back = [nearest(point, predicted) for point in true]
    both = forth + back
    return {
        "dice": 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum()),
        "hd": max(both),
        "msd": sum(both) / len(both),
        "hd95": max(np.percentile(forth, 95), np.percentile(back, 95)),
        "assd": sum(both) / len(both),
        "masd": (sum(forth) / len(forth) + sum(back) / len(back)) / 2,
        "msd_prediction_to_truth": sum(forth) / len(forth),
        "msd_truth_to_prediction": sum(back) / len(back),
        "nsd": sum(d <= tolerance + 1e-6 for d in both) / len(both),
    }


for_any_scene = given(scene=scenes())
a_few = settings(max_examples=25, deadline=None)


@for_any_scene
@a_few
def test_scores_are_those_of_a_double_loop(scene: Scene) -> None:
    prediction, truth, spacing = scene
    tolerances = {1: 0.0, 2: 0.8, 3: 2.0}
    for row in rows_of(*scene, tolerance=tolerances):
        if row["status"] == "ok":
            label = row["class"]
            expected = by_double_loop(
                prediction == label, truth == label, spacing, tolerances[label]
            )
            assert set(expected) == set(METRICS)
            holds(row, **expected)


@pytest.mark.parametrize("definition", ["default", "medpy"])
@for_any_scene
@a_few
def test_exchanging_the_maps_exchanges_the_directions(definition: str, scene: Scene) -> None:
    prediction, truth, spacing = scene
    forth = rows_of(prediction, truth, spacing, definition)
    back = rows_of(truth, prediction, spacing, definition)
    symmetric = [metric for metric in METRICS if metric not in DIRECTED]
    for row, other in zip(forth, back):
        holds(row, **{metric: other[metric] for metric in symmetric})
        holds(row, msd_prediction_to_truth=other["msd_truth_to_prediction"])
        assert row["volume_truth_ml"] == other["volume_prediction_ml"]


@any_definition
@for_any_scene
@a_few
def test_axes_flips_margins_and_memory_do_not_matter(definition: str, scene: Scene) -> None:
    prediction, truth, spacing = scene
    rows = rows_of(*scene, definition)
    for axes in permutations(range(3)):
        turned = [labels.transpose(axes) for labels in (prediction, truth)]
        same(rows, rows_of(*turned, [spacing[axis] for axis in axes], definition))

    flipped = [labels[::-1, :, ::-1] for labels in (prediction, truth)]
    same(rows, rows_of(*flipped, spacing, definition))

    padded = [np.pad(labels, ((2, 0), (0, 3), (1, 1))) for labels in (prediction, truth)]
    same(rows, rows_of(*padded, spacing, definition))

    in_memory = (np.asfortranarray(prediction), truth.astype(np.uint16))
    same(rows, rows_of(*in_memory, spacing, definition))


@any_definition
@for_any_scene
@a_few
def test_distances_scale_with_the_spacing(definition: str, scene: Scene) -> None:
    prediction, truth, spacing = scene
    rows = rows_of(*scene, definition, tolerance=1.0)
    wide = rows_of(prediction, truth, [4 * mm for mm in spacing], definition, tolerance=4.0)
    for row, other in zip(rows, wide):
        holds(other, dice=row["dice"], nsd=row["nsd"], **{key: 4 * row[key] for key in DISTANCES})


@any_definition
@for_any_scene
@a_few
def test_labels_are_only_names(definition: Any, scene: Scene) -> None:
    prediction, truth, spacing = scene
    numbers = np.array([0, 700, 255, 254])
    renamed = score_labels(
        numbers[prediction], numbers[truth], spacing, [700, 255, 254], definition=definition
    )
    same(rows_of(*scene, definition), renamed)

    alone = [
        score_labels(prediction, truth, spacing, [label], definition=definition)[0]
        for label in (1, 2, 3)
    ]
    same(alone, renamed)


@any_definition
@for_any_scene
@a_few
def test_scores_stay_in_their_bounds(definition: str, scene: Scene) -> None:
    for row in rows_of(*scene, definition):
        if row["status"] != "ok":
            continue
        assert 0 <= row["dice"] <= 1
        assert 0 <= row["nsd"] <= 1
        assert 0 <= row["hd95"] <= row["hd"]
        assert max(row[mean] for mean in MEANS) <= row["hd"] + 1e-12
        directed = [row[mean] for mean in DIRECTED]
        assert min(directed) - 1e-12 <= row["assd"] <= max(directed) + 1e-12


@for_any_scene
@a_few
def test_nsd_grows_with_the_tolerance(scene: Scene) -> None:
    tables = [rows_of(*scene, tolerance=mm) for mm in (0, 0.5, 1, 2, 100)]
    for rows, others in pairwise(tables):
        for row, other in zip(rows, others):
            assert row["nsd"] <= other["nsd"] or isnan(row["nsd"])
    for row in tables[-1]:
        assert row["status"] != "ok" or row["nsd"] == 1


@for_any_scene
@a_few
def test_finer_voxels_of_the_same_shape_keep_dice_and_volume(scene: Scene) -> None:
    prediction, truth, spacing = scene
    fine = [np.kron(labels, np.ones((2, 2, 2), int)) for labels in (prediction, truth)]
    for row, other in zip(rows_of(*scene), rows_of(*fine, [mm / 2 for mm in spacing])):
        holds(row, **{key: other[key] for key in ("dice", *VOLUMES)})


# --- what was not annotated


@any_definition
@for_any_scene
@a_few
def test_what_an_ignored_region_holds_does_not_matter(definition: str, scene: Scene) -> None:
    prediction, truth, spacing = scene
    rng = np.random.default_rng(0)
    ignore = np.zeros(truth.shape, bool)
    ignore[:, 2:, : truth.shape[2] // 2] = True
    noise = [
        np.where(ignore, rng.integers(-3, 4, truth.shape), labels) for labels in (prediction, truth)
    ]
    before = [labels.copy() for labels in noise]

    expected = rows_of(*scene, definition, ignore=ignore)
    same(expected, rows_of(*noise, spacing, definition, ignore=ignore))
    assert np.array_equal(noise, before)

    nowhere = np.zeros_like(ignore)
    same(rows_of(*scene, definition), rows_of(*scene, definition, ignore=nowhere))


def test_ignoring_half_of_two_spheres_does_not_make_them_match() -> None:
    prediction = sphere((30, 30, 35), 20, 60)
    truth = sphere((30, 30, 30), 20, 60)
    ignore = np.zeros((60, 60, 60), bool)
    ignore[30:] = True

    whole = score(prediction, truth)
    half = score(prediction, truth, ignore=ignore)
    assert half["assd"] == pytest.approx(whole["assd"], abs=0.05)
    assert half["dice"] == pytest.approx(whole["dice"], abs=0.01)
    assert half["volume_truth_ml"] == pytest.approx(whole["volume_truth_ml"] / 2, rel=0.05)

    zeroed = score(np.where(ignore, 0, prediction), np.where(ignore, 0, truth))
    assert zeroed["assd"] < 0.7 * whole["assd"]


@pytest.mark.parametrize("label", [254, 255, 256, 65534])
def test_no_label_is_mistaken_for_what_is_ignored(label: int) -> None:
    prediction = box(5, 15).astype(int)
    truth = box(4, 15).astype(int)
    ignore = box(0, (24, 24, 9)).astype(bool)
    row = score_labels(label * prediction, label * truth, ISO, [label], ignore=ignore)[0]
    same([row], [score(prediction, truth, ignore=ignore)])


@pytest.mark.parametrize("absent", [255, 254])
def test_what_is_ignored_is_not_taken_for_a_class_that_is_in_neither_map(absent: int) -> None:
    ignore = box(0, (24, 24, 9)).astype(bool)
    truth = 3 * box(4, 15).astype(np.uint8)
    rows = score_labels(truth, truth, ISO, [3, absent], ignore=ignore)
    assert [row["status"] for row in rows] == ["ok", "absent"]
    assert isnan(rows[1]["dice"]) and rows[1]["volume_truth_ml"] == 0
    assert rows == score_labels(truth, truth, ISO, np.array([3, absent], np.uint8), ignore=ignore)


def test_a_class_without_a_known_border_has_no_distance() -> None:
    ignore = np.ones((24, 24, 24), bool)
    ignore[8:12, 8:12, 8:12] = False
    row = score(box(5, 15), box(5, 15), ignore=ignore)
    assert row["status"] == "ok"
    holds(row, dice=1, nsd=nan, **distances(nan))


def test_a_tolerance_read_from_a_float32_header_counts_its_own_voxel() -> None:
    mm = float(np.float32(0.8))
    row = score(box(0, (9, 24, 24)), box(0, (8, 24, 24)), (mm, mm, mm), tolerance=0.8)
    holds(row, nsd=1)


# --- rows and errors


def test_a_row_has_the_agreed_keys_in_the_agreed_order() -> None:
    classes = {2: "liver", 1: "spleen"}
    liver, spleen = score_labels(box(5, 15), box(4, 15), ISO, classes, tolerance={1: 2.0, 2: 3.0})
    assert (liver["class"], liver["name"], liver["status"]) == (2, "liver", "absent")
    assert (spleen["class"], spleen["name"], spleen["status"]) == (1, "spleen", "ok")
    for row in (liver, spleen):
        assert list(row) == KEYS
        assert all(type(row[key]) is float for key in KEYS[3:])


def test_dice_hd_and_msd_come_first_as_in_table_2() -> None:
    assert METRICS[:3] == ("dice", "hd", "msd")


def zeros(*shape: int, dtype: Any = int) -> NDArray[Any]:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"truth": zeros(4, 4, 5)}, "different grids"),
        ({"truth": zeros(4, 4, 4, dtype=float)}, "integers, got int64 and float64"),
        ({"truth": zeros(4, 4, 4, 1), "prediction": zeros(4, 4, 4, 1)}, "must be 3D"),
        ({"truth": np.full((4, 4, 4), -1)}, "found -1"),
        ({"truth": np.full((4, 4, 4), 65535)}, "found 0 to 65535"),
        ({"spacing": (1, 1)}, "three positive"),
        ({"spacing": 1.0}, "three positive"),
        ({"spacing": (1, 0, 1)}, "three positive"),
        ({"spacing": (1, nan, 1)}, "three positive"),
        ({"spacing": (1, inf, 1)}, "three positive"),
        ({"classes": []}, "classes must be 1 to 65534"),
        ({"classes": {0: "background", 1: "spleen"}}, "0 is the background"),
        ({"classes": [65535]}, "classes must be 1 to 65534"),
        ({"tolerance": -1}, "tolerance"),
        ({"tolerance": {2: 1.0}}, "tolerance"),
        ({"definition": "nnunet"}, "definition must be one of default, monai, medpy, got nnunet"),
        ({"ignore": zeros(4, 4, 4)}, "ignore must be a boolean"),
        ({"ignore": zeros(4, 4, 5, dtype=bool)}, "ignore must be a boolean"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "prediction": zeros(4, 4, 4),
        "truth": zeros(4, 4, 4),
        "spacing": ISO,
        "classes": [1],
    }
    with pytest.raises(ValueError, match=message) as caught:
        score_labels(**(arguments | changes))
    assert "\n" not in str(caught.value)
