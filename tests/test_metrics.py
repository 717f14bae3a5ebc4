"""Scores against numbers that pencil and paper give, against a double loop, and against what must hold for any maps."""

from itertools import pairwise, permutations, product
from math import dist, inf, isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dae.evaluation import metrics
from dae.evaluation.metrics import (
    DEFINITIONS,
    DISTANCES,
    METRICS,
    aggregate,
    diagonal,
    score_labels,
)

MEANS = ("assd", "masd", "msd_prediction_to_truth", "msd_truth_to_prediction")
KEYS = ["class", "name", "status", *METRICS, "volume_truth_ml", "volume_prediction_ml"]
ISO = (1.0, 1.0, 1.0)


def box(low, high, shape=(24, 24, 24)):
    """Label 1 from `low` up to but without `high`, each one number or three."""
    labels = np.zeros(shape, np.uint8)
    labels[
        tuple(slice(a, b) for a, b in zip(np.broadcast_to(low, 3), np.broadcast_to(high, 3)))
    ] = 1
    return labels


def sphere(centre, radius, n=64):
    grid = np.indices((n, n, n)) - np.reshape(centre, (3, 1, 1, 1))
    return ((grid**2).sum(0) <= radius**2).astype(np.uint8)


def score(prediction, truth, spacing=ISO, **choices):
    """The row of class 1."""
    return score_labels(prediction, truth, spacing, [1], **choices)[0]


def holds(row, **expected):
    assert {key: row[key] for key in expected} == pytest.approx(
        expected, rel=1e-6, abs=1e-12, nan_ok=True
    )


# Closed forms


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("spacing", [ISO, (3.0, 1.0, 2.0)])
def test_a_perfect_prediction_has_no_distance(definition, spacing):
    holds(
        score(box(5, 15), box(5, 15), spacing, definition=definition),
        dice=1,
        nsd=1,
        **dict.fromkeys(DISTANCES, 0),
    )


@pytest.mark.parametrize("definition", ["default", "monai", "medpy"])
@pytest.mark.parametrize("spacing, length", [(ISO, 7), ((3.0, 1.0, 2.0), sqrt(189))])
def test_two_voxels_are_as_far_apart_as_their_centres(definition, spacing, length):
    voxels = box((5, 5, 5), (6, 6, 6)), box((7, 8, 11), (8, 9, 12))
    row = score(*voxels, spacing, definition=definition)
    holds(row, dice=0, nsd=0, **dict.fromkeys(DISTANCES, length))


def test_two_planes_are_as_far_apart_as_their_slices():
    planes = box((3, 0, 0), (4, 24, 24)), box((7, 0, 0), (8, 24, 24))
    holds(score(*planes, (2.5, 1.0, 1.0)), dice=0, nsd=0, **dict.fromkeys(DISTANCES, 10))


def test_a_shifted_box():
    shifted, truth = box((7, 5, 5), (17, 15, 15)), box(5, 15)
    row = score(shifted, truth, tolerance=0)
    holds(row, dice=0.8, hd=2, hd95=2, nsd=36 / 61, **dict.fromkeys(MEANS, 42 / 61))
    holds(score(shifted, truth, tolerance=1), nsd=44 / 61)
    assert len(metrics.border_voxels(np.pad(truth, metrics.MARGIN), np.ones(3)).at) == 488


def test_a_shifted_box_of_anisotropic_voxels():
    row = score(box((7, 5, 5), (17, 15, 15)), box(5, 15), (3.0, 1.0, 2.0))
    holds(row, dice=0.8, hd=6, hd95=6, nsd=38 / 61, **dict.fromkeys(MEANS, 107 / 61))


def test_a_longer_box_tells_the_means_apart():
    row = score(box((5, 5, 5), (15, 15, 17)), box(5, 15), (3.0, 1.0, 2.0))
    holds(row, dice=10 / 11, hd=4, hd95=4, assd=157 / 262, masd=1241 / 2135)
    holds(row, msd_prediction_to_truth=59 / 70, msd_truth_to_prediction=39 / 122)


def line_and_specks(specks):
    """A line of 100 voxels, and the same with `specks` more at a distance of 50."""
    truth = box((0, 0, 0), (1, 1, 100), (60, 8, 100))
    return np.maximum(truth, box((50, 0, 0), (51, 1, specks), truth.shape)), truth


def test_hd95_is_a_step_where_specks_reach_a_twentieth_of_the_surface():
    row = score(*line_and_specks(6))
    holds(row, hd=50, hd95=37.5, assd=150 / 103, masd=75 / 53)
    holds(score(*line_and_specks(5)), hd=50, hd95=0)


def test_pooling_hides_the_same_specks():
    holds(
        score(*line_and_specks(6), definition="medpy"), hd=50, hd95=0, assd=150 / 103, masd=75 / 53
    )


def test_a_percentile_by_area_does_not_interpolate():
    by_area, mm = DEFINITIONS["surface-distance"], np.repeat([0.0, 50.0], [100, 6])
    assert by_area.percentile(95, mm, np.ones(106)) == 50
    assert by_area.percentile(95, mm, np.repeat([1.0, 0.5], [100, 6])) == 0


def test_a_cube_in_a_concentric_one():
    row = score(box(7, 17), box(5, 19))
    assd = (976 + 1200 + 240 * sqrt(5) + 120 * sqrt(8) + 24 * sqrt(6) + 72 + 8 * sqrt(12)) / 1504
    holds(row, dice=2000 / 3744, hd=sqrt(12), hd95=sqrt(8), assd=assd, masd=2.099689)


def test_the_face_of_the_volume_is_a_border():
    holds(score(box(2, 22), box(0, 24)), dice=0.7331378, hd=sqrt(12), hd95=sqrt(8), assd=2.0671103)


def half_spaces():
    return box(0, (10, 20, 20), (20, 20, 20)), box(0, (8, 20, 20), (20, 20, 20))


def test_half_spaces_meet_on_the_faces_of_the_volume():
    holds(score(*half_spaces()), hd=2, assd=182 / 333, masd=0.541971)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_half_spaces_are_two_apart_where_the_outside_is_not_known(definition):
    prediction, truth = (np.pad(labels, 1) for labels in half_spaces())
    outside = np.pad(np.zeros((20, 20, 20), bool), 1, constant_values=True)
    holds(
        score(prediction, truth, ignore=outside, definition=definition),
        **dict.fromkeys(DISTANCES, 2),
    )


def test_a_hole_is_a_surface():
    solid, hollow = box(5, 16), box(5, 16)
    hollow[10, 10, 10] = 0
    holds(
        score(hollow, solid, tolerance=0),
        hd=4,
        hd95=0,
        assd=12 / 605,
        masd=3 / 152,
        nsd=1204 / 1210,
    )


def test_touching_boxes_do_not_overlap():
    row = score(box((11, 5, 5), (21, 15, 15)), box((1, 5, 5), (11, 15, 15)))
    holds(row, dice=0, hd=10, hd95=10, **dict.fromkeys(MEANS, 11 / 2))


def test_shifted_spheres_come_near_the_continuous_ones():
    radius, shift = 20, 5
    row = score(sphere((32, 32, 32 + shift), radius), sphere((32, 32, 32), radius), tolerance=1)
    assert row["dice"] == pytest.approx(
        1 - 3 * shift / (4 * radius) + shift**3 / (16 * radius**3), abs=0.005
    )
    assert [row["hd"], row["hd95"]] == pytest.approx([shift, 0.95 * shift], abs=0.6)
    assert [row[mean] for mean in MEANS] == pytest.approx([shift / 2] * 4, abs=0.3)
    assert row["nsd"] == pytest.approx(1 / shift, abs=0.1)


def test_concentric_spheres_come_near_the_continuous_ones():
    row = score(sphere((32, 32, 32), 20), sphere((32, 32, 32), 23))
    assert row["dice"] == pytest.approx(2 * 20**3 / (20**3 + 23**3), abs=0.005)
    assert [row["hd"], row["hd95"]] == pytest.approx([3, 3], abs=0.6)
    assert [row[mean] for mean in MEANS] == pytest.approx([3] * 4, abs=0.3)


def test_an_absent_class_has_no_score():
    row = score(np.zeros((8, 8, 8), int), np.zeros((8, 8, 8), int))
    assert row["status"] == "absent"
    holds(row, volume_truth_ml=0, volume_prediction_ml=0, **dict.fromkeys(METRICS, nan))


@pytest.mark.parametrize("definition", ["default", "medpy", "surface-distance"])
def test_a_missed_organ_is_infinitely_far(definition):
    missed = score(np.zeros((24, 24, 24), int), box(5, 15), (1, 2, 3), definition=definition)
    spurious = score(box(5, 15), np.zeros((24, 24, 24), int), (1, 2, 3), definition=definition)
    assert (missed["status"], spurious["status"]) == ("missed", "spurious")
    holds(
        missed,
        dice=0,
        nsd=0,
        volume_truth_ml=6,
        volume_prediction_ml=0,
        **dict.fromkeys(DISTANCES, inf),
    )
    holds(
        spurious,
        dice=0,
        nsd=0,
        volume_truth_ml=0,
        volume_prediction_ml=6,
        **dict.fromkeys(DISTANCES, inf),
    )


def test_the_monai_definition_forgets_what_is_missed():
    holds(
        score(np.zeros((24, 24, 24), int), box(5, 15), definition="monai"),
        dice=0,
        hd=inf,
        hd95=nan,
        assd=inf,
        nsd=0,
    )
    holds(
        score(box(5, 15), np.zeros((24, 24, 24), int), definition="monai"),
        dice=nan,
        hd=inf,
        hd95=nan,
        nsd=0,
    )


# Surface elements and their areas


def elements(labels, spacing=ISO):
    return metrics.surfels(np.pad(labels, metrics.MARGIN), np.array(spacing))


@pytest.mark.parametrize("spacing, area", [(ISO, sqrt(3) / 8), ((3.0, 1.0, 2.0), 7 / 8)])
def test_a_voxel_has_eight_surface_elements(spacing, area):
    assert elements(box(1, 2, (3, 3, 3)), spacing).area == pytest.approx([area] * 8)


def test_the_surface_of_a_box_is_flat_but_for_its_edges_and_corners():
    n = 7
    expected = 6 * (n - 1) ** 2 + 12 * (n - 1) * sqrt(1 / 2) + sqrt(3)
    assert elements(box(1, 1 + n)).area.sum() == pytest.approx(expected)


def test_a_slice_has_the_area_of_both_its_faces():
    sheet = elements(box((5, 1, 1), (6, 23, 23)), (5.0, 0.7, 0.9))
    flat = np.isclose(sheet.area, 0.7 * 0.9)
    assert flat.sum() == 2 * 21 * 21 and len(sheet.at) == 2 * 23 * 23


def test_areas_do_not_depend_on_the_view_nor_on_which_side_is_in():
    areas = np.linalg.norm(metrics.surfel_triangles(), axis=-1).sum(1)
    assert areas == pytest.approx(areas[::-1])
    for axes, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).reshape(-1, 2, 2, 2)
        turned = bits.transpose(0, *(1 + axis for axis in axes))[
            :, :: flips[0], :: flips[1], :: flips[2]
        ]
        assert areas == pytest.approx(areas[np.packbits(turned.reshape(256, 8), axis=1)[:, 0]])


def test_any_pattern_finds_its_area():
    noise = np.pad(np.random.default_rng(0).random((9, 9, 9)) < 0.5, 1)
    areas = np.linalg.norm(metrics.surfel_triangles(), axis=-1).sum(1)
    cells = np.lib.stride_tricks.sliding_window_view(noise, (2, 2, 2)).reshape(-1, 8)
    expected = areas[np.packbits(cells, axis=1)[:, 0]]
    assert np.sort(elements(noise.astype(np.uint8)).area) == pytest.approx(
        np.sort(expected[expected > 0])
    )


# What holds for any maps


@st.composite
def scenes(draw, side=9, classes=3):
    """Two overlapping label maps with blobs, specks and holes, and a spacing: (prediction, truth, spacing)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = rng.integers(4, side, 3)
    coarse = np.kron(rng.integers(0, classes + 1, -(-shape // 3)), np.ones((3, 3, 3), int))
    truth = coarse[tuple(slice(n) for n in shape)]
    noise = rng.random(shape)
    prediction = np.where(
        noise < 0.1,
        rng.integers(0, classes + 1, shape),
        np.roll(truth, rng.integers(0, 2, 3), (0, 1, 2)),
    )
    return prediction, truth, tuple(rng.choice([0.5, 0.7, 1.0, 1.3, 3.0], 3).tolist())


def rows_of(prediction, truth, spacing, definition="default", **choices):
    return score_labels(prediction, truth, spacing, [1, 2, 3], definition=definition, **choices)


def same(rows, others, but=()):
    for row, other in zip(rows, others, strict=True):
        assert row["status"] == other["status"]
        keys = [
            key for key in (*METRICS, "volume_truth_ml", "volume_prediction_ml") if key not in but
        ]
        holds(row, **{key: other[key] for key in keys})


def by_double_loop(prediction, truth, spacing, tolerance):
    """The default definition from its words, for two masks that are not empty."""
    borders = []
    for mask in (prediction, truth):
        inner = ndimage.binary_erosion(
            mask, ndimage.generate_binary_structure(3, 1), border_value=0
        )
        borders.append([tuple(index * np.array(spacing)) for index in np.argwhere(mask & ~inner)])
    forth, back = (
        [min(dist(a, b) for b in there) for a in here] for here, there in (borders, borders[::-1])
    )
    both = forth + back
    return {
        "dice": 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum()),
        "hd": max(both),
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
def test_scores_are_those_of_a_double_loop(scene):
    prediction, truth, spacing = scene
    tolerances = {1: 0.0, 2: 0.8, 3: 2.0}
    for row in rows_of(*scene, tolerance=tolerances):
        if row["status"] == "ok":
            label = row["class"]
            holds(
                row,
                **by_double_loop(prediction == label, truth == label, spacing, tolerances[label]),
            )


@pytest.mark.parametrize("definition", DEFINITIONS)
@given(scene=scenes(side=14))
@settings(max_examples=10, deadline=None)
def test_looking_up_and_searching_find_the_same(definition, scene):
    looked_up = rows_of(*scene, definition)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "REACH", 0)
        same(looked_up, rows_of(*scene, definition))


@pytest.mark.parametrize("definition", ["default", "medpy", "surface-distance"])
@for_any_scene
@a_few
def test_exchanging_the_maps_exchanges_the_directions(definition, scene):
    prediction, truth, spacing = scene
    forth, back = (
        rows_of(prediction, truth, spacing, definition),
        rows_of(truth, prediction, spacing, definition),
    )
    for row, other in zip(forth, back):
        holds(row, **{key: other[key] for key in ("dice", "hd", "hd95", "assd", "masd", "nsd")})
        assert row["msd_prediction_to_truth"] == pytest.approx(
            other["msd_truth_to_prediction"], nan_ok=True
        )
        assert row["volume_truth_ml"] == other["volume_prediction_ml"]


@pytest.mark.parametrize("definition", DEFINITIONS)
@for_any_scene
@a_few
def test_axes_flips_margins_and_memory_do_not_matter(definition, scene):
    prediction, truth, spacing = scene
    rows = rows_of(*scene, definition)
    for axes in permutations(range(3)):
        turned = (labels.transpose(axes) for labels in (prediction, truth))
        same(rows, rows_of(*turned, [spacing[axis] for axis in axes], definition))
    same(rows, rows_of(prediction[::-1, :, ::-1], truth[::-1, :, ::-1], spacing, definition))
    same(
        rows,
        rows_of(
            np.pad(prediction, ((2, 0), (0, 3), (1, 1))),
            np.pad(truth, ((2, 0), (0, 3), (1, 1))),
            spacing,
            definition,
        ),
    )
    same(rows, rows_of(np.asfortranarray(prediction), truth.astype(np.uint16), spacing, definition))


@pytest.mark.parametrize("definition", DEFINITIONS)
@for_any_scene
@a_few
def test_distances_scale_with_the_spacing(definition, scene):
    prediction, truth, spacing = scene
    wide = rows_of(prediction, truth, [4 * mm for mm in spacing], definition, tolerance=4.0)
    for row, other in zip(rows_of(*scene, definition, tolerance=1.0), wide):
        holds(other, dice=row["dice"], nsd=row["nsd"], **{key: 4 * row[key] for key in DISTANCES})


@pytest.mark.parametrize("definition", DEFINITIONS)
@for_any_scene
@a_few
def test_labels_are_only_names(definition, scene):
    prediction, truth, spacing = scene
    renamed = np.array([0, 700, 255, 254])
    others = score_labels(
        renamed[prediction], renamed[truth], spacing, [700, 255, 254], definition=definition
    )
    same(rows_of(*scene, definition), others)
    alone = [
        score_labels(prediction, truth, spacing, [label], definition=definition)[0]
        for label in (1, 2, 3)
    ]
    same(alone, others)


@pytest.mark.parametrize("definition", DEFINITIONS)
@for_any_scene
@a_few
def test_scores_stay_in_their_bounds(definition, scene):
    for row in rows_of(*scene, definition):
        if row["status"] == "ok":
            assert 0 <= row["dice"] <= 1 and 0 <= row["nsd"] <= 1
            assert (
                0 <= row["hd95"] <= row["hd"]
                and max(row[mean] for mean in MEANS) <= row["hd"] + 1e-12
            )
            assert (
                min(row[m] for m in MEANS[2:]) - 1e-12
                <= row["assd"]
                <= max(row[m] for m in MEANS[2:]) + 1e-12
            )


@for_any_scene
@a_few
def test_nsd_grows_with_the_tolerance(scene):
    values = [[row["nsd"] for row in rows_of(*scene, tolerance=mm)] for mm in (0, 0.5, 1, 2, 100)]
    assert all(
        a <= b or isnan(a) for before, after in pairwise(values) for a, b in zip(before, after)
    )
    assert all(row["status"] != "ok" or row["nsd"] == 1 for row in rows_of(*scene, tolerance=100))


@for_any_scene
@a_few
def test_finer_voxels_of_the_same_shape_keep_dice_and_volume(scene):
    prediction, truth, spacing = scene
    fine = (np.kron(labels, np.ones((2, 2, 2), int)) for labels in (prediction, truth))
    for row, other in zip(rows_of(*scene), rows_of(*fine, [mm / 2 for mm in spacing])):
        holds(
            row, **{key: other[key] for key in ("dice", "volume_truth_ml", "volume_prediction_ml")}
        )


@pytest.mark.parametrize("definition", DEFINITIONS)
@for_any_scene
@a_few
def test_what_an_ignored_region_holds_does_not_matter(definition, scene):
    prediction, truth, spacing = scene
    rng = np.random.default_rng(0)
    ignore = np.zeros(truth.shape, bool)
    ignore[:, 2:, : truth.shape[2] // 2] = True
    noise = [
        np.where(ignore, rng.integers(-3, 4, truth.shape), labels) for labels in (prediction, truth)
    ]
    before = [labels.copy() for labels in noise]
    same(
        rows_of(*scene, definition, ignore=ignore),
        rows_of(*noise, spacing, definition, ignore=ignore),
    )
    assert all((a == b).all() for a, b in zip(noise, before))
    same(rows_of(*scene, definition), rows_of(*scene, definition, ignore=np.zeros_like(ignore)))


def test_ignoring_half_of_two_spheres_does_not_make_them_match():
    prediction, truth, ignore = (
        sphere((30, 30, 35), 20, 60),
        sphere((30, 30, 30), 20, 60),
        np.zeros((60, 60, 60), bool),
    )
    ignore[30:] = True
    whole, half = score(prediction, truth), score(prediction, truth, ignore=ignore)
    assert half["assd"] == pytest.approx(whole["assd"], abs=0.05)
    assert half["dice"] == pytest.approx(whole["dice"], abs=0.01)
    assert half["volume_truth_ml"] == pytest.approx(whole["volume_truth_ml"] / 2, rel=0.05)
    zeroed = score(np.where(ignore, 0, prediction), np.where(ignore, 0, truth))
    assert zeroed["assd"] < 0.7 * whole["assd"]


@pytest.mark.parametrize("label", [254, 255, 256, 65534])
def test_no_label_is_mistaken_for_what_is_ignored(label):
    prediction, truth, ignore = box(5, 15), box(4, 15), box(0, (24, 24, 9)).astype(bool)
    row = score_labels(
        label * prediction.astype(int), label * truth.astype(int), ISO, [label], ignore=ignore
    )[0]
    same([row], [score(prediction, truth, ignore=ignore)])


def test_a_class_without_a_known_border_has_no_distance():
    ignore = np.ones((24, 24, 24), bool)
    ignore[8:12, 8:12, 8:12] = False
    row = score(box(5, 15), box(5, 15), ignore=ignore)
    assert row["status"] == "ok"
    holds(row, dice=1, nsd=nan, **dict.fromkeys(DISTANCES, nan))


def test_a_tolerance_read_from_a_float32_header_counts_its_own_voxel():
    spacing = tuple(float(np.float32(mm)) for mm in (0.8, 0.8, 0.8))
    holds(score(box(0, (9, 24, 24)), box(0, (8, 24, 24)), spacing, tolerance=0.8), nsd=1)


# Rows, errors


def test_a_row_has_the_agreed_keys_in_the_agreed_order():
    rows = score_labels(
        box(5, 15), box(4, 15), ISO, {2: "liver", 1: "spleen"}, tolerance={1: 2.0, 2: 3.0}
    )
    assert [(row["class"], row["name"], row["status"]) for row in rows] == [
        (2, "liver", "absent"),
        (1, "spleen", "ok"),
    ]
    assert all(list(row) == KEYS for row in rows)
    assert all(type(row[key]) is float for row in rows for key in KEYS[3:])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"truth": np.zeros((4, 4, 5), int)}, "different grids"),
        ({"truth": np.zeros((4, 4, 4))}, "integers, got int64 and float64"),
        (
            {"truth": np.zeros((4, 4, 4, 1), int), "prediction": np.zeros((4, 4, 4, 1), int)},
            "must be 3D",
        ),
        ({"truth": np.full((4, 4, 4), -1)}, "found -1"),
        ({"truth": np.full((4, 4, 4), 65535)}, "found 0 to 65535"),
        ({"spacing": (1, 1)}, "three positive"),
        ({"spacing": 1.0}, "three positive"),
        ({"spacing": (1, 0, 1)}, "three positive"),
        ({"spacing": (1, nan, 1)}, "three positive"),
        ({"spacing": (1, inf, 1)}, "three positive"),
        ({"classes": []}, "classes must be 1 to 65534"),
        ({"classes": {0: "background", 1: "spleen"}}, "0 is the background"),
        ({"tolerance": -1}, "tolerance"),
        ({"tolerance": {2: 1.0}}, "tolerance"),
        (
            {"definition": "nnunet"},
            "definition must be one of default, monai, medpy, surface-distance",
        ),
        ({"ignore": np.zeros((4, 4, 4), int)}, "ignore must be a boolean"),
        ({"ignore": np.zeros((4, 4, 5), bool)}, "ignore must be a boolean"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, message):
    maps = {
        "prediction": np.zeros((4, 4, 4), int),
        "truth": np.zeros((4, 4, 4), int),
        "spacing": ISO,
        "classes": [1],
    }
    with pytest.raises(ValueError, match=message) as caught:
        score_labels(**(maps | changes))
    assert "\n" not in str(caught.value)


# Averages


def case(name, *labels):
    """Rows of two classes in one case from (prediction, truth) of class 1 and of class 2."""
    (p1, t1), (p2, t2) = labels
    rows = score_labels(
        np.where(p1, 1, 2 * p2), np.where(t1, 1, 2 * t2), ISO, {1: "spleen", 2: "liver"}
    )
    return [{"case": name, **row} for row in rows]


NOTHING, HERE, SHIFTED, THERE = (
    box(0, 0),
    box((1, 5, 5), (6, 15, 15)),
    box((3, 5, 5), (8, 15, 15)),
    box(17, 22),
)
COHORT = [
    *case("a", (HERE, HERE), (THERE, THERE)),
    *case("b", (SHIFTED, HERE), (NOTHING, THERE)),
    *case("c", (HERE, NOTHING), (NOTHING, NOTHING)),
]


def test_excluding_says_what_it_left_out():
    result = aggregate(COHORT)
    spleen, liver = result["classes"][1], result["classes"][2]
    assert (spleen["name"], liver["name"]) == ("spleen", "liver")
    assert spleen["status"] == {"ok": 2, "missed": 0, "spurious": 1, "absent": 0}
    assert liver["status"] == {"ok": 1, "missed": 1, "spurious": 0, "absent": 1}
    assert result["overall"]["status"] == {"ok": 3, "missed": 1, "spurious": 1, "absent": 1}
    assert (spleen["hd"]["mean"], spleen["hd"]["n"], spleen["hd"]["left_out"]) == (1, 2, 1)
    assert (spleen["hd"]["median"], spleen["hd"]["std"]) == (1, pytest.approx(sqrt(2)))
    assert (liver["dice"]["mean"], liver["dice"]["n"], liver["dice"]["left_out"]) == (0.5, 2, 1)
    assert (liver["hd"]["mean"], liver["hd"]["n"], liver["hd"]["left_out"]) == (0, 1, 2)
    assert isnan(liver["hd"]["std"])


def test_the_diagonal_stands_for_what_is_not_there():
    mm = diagonal((24, 24, 24), ISO)
    result = aggregate(COHORT, policy="diagonal", diagonal_mm=mm)
    assert mm == pytest.approx(24 * sqrt(3))
    assert (result["classes"][2]["hd95"]["mean"], result["classes"][2]["hd95"]["n"]) == (mm / 2, 2)
    missed = [row for row in COHORT if row["status"] == "missed"] * 3
    alone = aggregate(missed, policy="diagonal", diagonal_mm=mm)["overall"]
    assert (
        all(alone[key]["mean"] == mm for key in DISTANCES)
        and alone["dice"]["mean"] == alone["nsd"]["mean"] == 0
    )
    assert all(row["hd"] == inf for row in missed)


def test_every_row_may_have_its_own_diagonal():
    rows = [row for row in COHORT if row["status"] in ("missed", "spurious")]
    assert aggregate(rows, policy="diagonal", diagonal_mm=[10, 20])["overall"]["hd"]["mean"] == 15


@pytest.mark.parametrize("policy", ["exclude", "diagonal"])
def test_an_average_of_nothing_is_not_a_number(policy):
    absent = [row for row in COHORT if row["status"] == "absent"]
    for summary in (
        aggregate(rows, policy=policy, diagonal_mm=9)["overall"] for rows in (absent, [])
    ):
        assert all(
            isnan(summary[metric]["mean"]) and summary[metric]["n"] == 0 for metric in METRICS
        )
    assert aggregate([])["classes"] == {}


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_no_average_takes_in_what_is_not_finite(definition):
    rows = [
        row
        for p, t in product((NOTHING, HERE, SHIFTED), repeat=2)
        for row in [score(p, t, definition=definition)]
    ]
    for policy in ("exclude", "diagonal"):
        result = aggregate(rows, policy=policy, diagonal_mm=50)
        for metric in METRICS:
            entry = result["overall"][metric]
            assert np.isfinite([entry["mean"], entry["median"], entry["std"]]).all()
            assert entry["n"] + entry["left_out"] == len(rows)


def test_means_over_classes_and_over_cases_are_told_apart():
    result = aggregate(COHORT)
    dice = {(row["case"], row["class"]): row["dice"] for row in COHORT}
    assert result["overall"]["dice"]["mean"] == pytest.approx(np.nanmean(list(dice.values())))
    over_classes = np.mean([np.nanmean([dice[c, k] for c in "abc"]) for k in (1, 2)])
    over_cases = np.mean([np.nanmean([dice[c, k] for k in (1, 2)]) for c in "abc"])
    assert (result["mean_of_classes"]["dice"]["n"], result["mean_of_cases"]["dice"]["n"]) == (2, 3)
    assert result["mean_of_classes"]["dice"]["mean"] == pytest.approx(over_classes)
    assert result["mean_of_cases"]["dice"]["mean"] == pytest.approx(over_cases)
    assert result["mean_of_cases"]["hd"]["left_out"] == 1


@pytest.mark.parametrize("mm", [None, 0, nan, inf, [1.0], [1.0, 2.0, 3.0, 4.0, 5.0, -6.0]])
def test_the_diagonal_policy_needs_diagonals(mm):
    with pytest.raises(ValueError, match="diagonal_mm"):
        aggregate(COHORT, policy="diagonal", diagonal_mm=mm)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="exclude or diagonal"):
        aggregate(COHORT, policy="zero")
