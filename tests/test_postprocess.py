"""dae/evaluation/postprocess.py: steps against slower ones over the whole volume, and a choice that does no harm."""

import json

import numpy as np
import pytest
from scipy import ndimage

from dae.errors import InputError
from dae.evaluation import postprocess
from dae.evaluation.cases import Case
from dae.evaluation.metrics import score_labels
from dae.evaluation.postprocess import (
    CANDIDATES,
    STEPS,
    apply,
    as_text,
    box_of,
    choose,
    fill_holes,
    largest_components,
    load,
    save,
    smooth_boundary,
)

ISO = (1.0, 1.0, 1.0)
STEP_CALLS = {
    "largest_components": lambda labels, cls: largest_components(labels, cls),
    "fill_holes": lambda labels, cls: fill_holes(labels, cls),
    "smooth_boundary": lambda labels, cls: smooth_boundary(labels, cls, (1.0, 2.0, 1.5), 1.0),
}


def blobs(seed, classes=3, shape=(20, 18, 22)):
    """Random clumps of several classes, with islands; class 2 has a hole."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 1.2) for _ in range(classes + 1)]
    labels = np.argmax(fields, axis=0).astype(np.uint8)
    if classes > 1:
        box(box(labels, 2, (8, 8, 8), (11, 11, 11)), 0, (9, 9, 9), (10, 10, 10))
    return labels


def box(labels, cls, low, high):
    """The same with a box of a class painted in."""
    labels[tuple(slice(a, b) for a, b in zip(low, high))] = cls
    return labels


def empty(*shape):
    return np.zeros(shape or (24, 24, 24), np.uint8)


def kidneys():
    """Class 1 twice, 6 x 6 x 6 and 5 x 5 x 5, and class 2 once, far from each other."""
    return box(
        box(box(empty(), 1, (2, 2, 2), (8, 8, 8)), 1, (15, 2, 2), (20, 7, 7)),
        2,
        (4, 14, 14),
        (12, 22, 22),
    )


def dice(prediction, truth, cls):
    return score_labels(prediction, truth, ISO, [cls])[0]["dice"]


# Every step


@pytest.mark.parametrize("name", STEP_CALLS)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_leaves_its_input_as_it_was_and_keeps_its_type(name, seed):
    for kind in (np.uint8, np.int16, np.int32):
        labels = blobs(seed).astype(kind)
        before = labels.copy()
        result = STEP_CALLS[name](labels, 2)
        assert (
            np.array_equal(labels, before) and result.dtype == kind and result.shape == labels.shape
        )
        assert not np.array_equal(result, before)


@pytest.mark.parametrize("name", STEP_CALLS)
def test_a_class_that_is_not_there_changes_nothing(name):
    labels = kidneys()
    assert np.array_equal(STEP_CALLS[name](labels, 7), labels)
    assert not STEP_CALLS[name](empty(), 1).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_box_is_that_of_find_objects_and_its_margin_ends_at_the_faces(seed):
    labels = blobs(seed, classes=9)
    for cls, expected in enumerate(ndimage.find_objects(labels), start=1):
        assert box_of(labels, cls) == expected
        d, h, w = box_of(labels, cls, (2, 0, 30))
        assert (
            labels[d, h, w].shape[1:] == (labels[expected].shape[1], labels.shape[2]) or w.start > 0
        )
        assert d.start == max(0, expected[0].start - 2) and h == expected[1] and w.start == 0


# Components


def test_two_kidneys_stay_two_where_two_are_kept():
    labels = box(kidneys(), 1, (20, 20, 2), (23, 23, 5))  # and an island
    assert np.array_equal(largest_components(labels, 1, keep=2), kidneys())
    assert np.array_equal(
        largest_components(labels, 1, keep=1) == 1, box(empty(), 1, (2, 2, 2), (8, 8, 8)) == 1
    )
    assert np.array_equal(largest_components(labels, 1, keep=9), labels)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_what_is_kept_are_the_largest_of_the_whole_volume(seed, keep):
    labels = blobs(seed, classes=6)
    parts, n = ndimage.label(labels == 3, np.ones((3, 3, 3)))
    sizes = sorted((int((parts == k).sum()) for k in range(1, n + 1)), reverse=True)
    kept = largest_components(labels, 3, keep)
    assert n > keep and np.array_equal(kept == 3, (kept == 3) & (labels == 3))
    parts, n = ndimage.label(kept == 3, np.ones((3, 3, 3)))
    assert sorted(np.bincount(parts.ravel())[1:].tolist(), reverse=True) == sizes[:keep]
    assert np.array_equal(kept[labels != 3], labels[labels != 3])
    assert not kept[(labels == 3) & (kept != 3)].any()  # what goes becomes background


def test_voxels_that_touch_by_a_corner_are_one_component():
    labels = empty(4, 4, 4)
    labels[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = 1
    assert np.array_equal(largest_components(labels, 1), labels)


# Holes


def test_a_cavity_is_filled_and_a_bay_is_not():
    body = box(empty(), 1, (4, 4, 4), (16, 16, 16))
    hollow = box(body.copy(), 0, (8, 8, 8), (11, 11, 11))
    assert np.array_equal(fill_holes(hollow, 1), body)
    bay = box(hollow.copy(), 0, (8, 8, 11), (9, 9, 16))  # a channel of one voxel to the outside
    assert np.array_equal(fill_holes(bay, 1), bay)


def test_what_is_open_at_the_volumes_face_is_no_hole():
    labels = box(box(empty(), 1, (0, 4, 4), (10, 14, 14)), 0, (0, 7, 7), (5, 10, 10))
    assert np.array_equal(fill_holes(labels, 1), labels)


def test_an_organ_in_the_hole_stays_and_the_gap_around_it_is_filled():
    labels = box(
        box(box(empty(), 1, (4, 4, 4), (16, 16, 16)), 0, (7, 7, 7), (13, 13, 13)),
        2,
        (9, 9, 9),
        (11, 11, 11),
    )
    filled = fill_holes(labels, 1)
    assert np.array_equal(filled == 2, labels == 2)
    assert np.array_equal(filled > 0, box(empty(), 1, (4, 4, 4), (16, 16, 16)) > 0)


def test_a_wall_that_touches_by_edges_holds():
    labels = empty(5, 5, 5)
    labels[[1, 3, 2, 2, 2, 2], [2, 2, 1, 3, 2, 2], [2, 2, 2, 2, 1, 3]] = (
        1  # the six neighbours of the middle
    )
    assert fill_holes(labels, 1)[2, 2, 2] == 1


def test_holes_are_those_of_scipy():
    for seed in range(8):
        labels = blobs(seed, classes=1)
        assert np.array_equal(fill_holes(labels, 1) == 1, ndimage.binary_fill_holes(labels == 1))


# Smoothing


def test_smoothing_removes_a_staircase():
    plane = box(empty(), 1, (0, 0, 0), (24, 24, 12))
    stairs = plane.copy()
    stairs[1::4, :, 12] = 1  # a ridge on every fourth row
    smooth = smooth_boundary(stairs, 1, ISO, 1.5)
    assert np.array_equal(smooth[2:-2], plane[2:-2])
    assert np.array_equal(smooth_boundary(plane, 1, ISO, 1.5), plane)


def test_the_blur_is_in_mm():
    plane = box(empty(), 1, (0, 0, 0), (24, 24, 12))
    stairs = plane.copy()
    stairs[1::4, :, 12] = 1
    assert np.array_equal(smooth_boundary(stairs, 1, (10.0, 10.0, 10.0), 1.5), stairs)
    assert np.array_equal(
        smooth_boundary(stairs, 1, (10.0, 10.0, 10.0), 15.0), smooth_boundary(stairs, 1, ISO, 1.5)
    )


def test_an_organ_of_one_voxel_is_kept_alone_and_within_another():
    labels = box(empty(), 2, (5, 5, 5), (6, 6, 6))
    assert np.array_equal(smooth_boundary(labels, 2, ISO, 2.0), labels)
    within = box(box(empty(), 1, (4, 4, 4), (16, 16, 16)), 2, (9, 9, 9), (10, 10, 10))
    assert (smooth_boundary(within, 1, ISO, 2.0) == 2).sum() == 1


def test_what_a_class_loses_goes_to_its_strongest_neighbour():
    labels = box(box(empty(), 2, (0, 0, 12), (24, 24, 24)), 1, (0, 0, 0), (24, 24, 12))
    spur = box(labels.copy(), 1, (12, 12, 12), (13, 13, 14))
    assert np.array_equal(smooth_boundary(spur, 1, ISO, 1.5), labels)


@pytest.mark.parametrize("seed", range(6))
def test_smoothing_in_a_box_is_smoothing_in_the_whole_volume(seed):
    labels = blobs(seed, classes=6, shape=(30, 26, 28))
    middle = np.zeros(labels.shape, bool)
    middle[9:21, 8:18, 8:20] = True
    labels[(labels == 2) & ~middle] = 3
    cls, spacing, mm = 2, (1.0, 2.0, 1.5), 0.9
    sigma = [mm / each for each in spacing]
    fields = {
        k: ndimage.gaussian_filter((labels == k).astype(float), sigma, mode="nearest", truncate=3)
        for k in np.unique(labels)
    }
    others = {k: field for k, field in fields.items() if k != cls}
    rival = np.max(list(others.values()), axis=0)
    highest = np.array(list(others))[np.argmax(list(others.values()), axis=0)]
    expected = np.where(fields[cls] > rival, cls, np.where(labels == cls, highest, labels))
    unsure = np.abs(fields[cls] - rival) < 1e-6
    smooth = smooth_boundary(labels, cls, spacing, mm)
    assert np.array_equal(smooth[~unsure], expected[~unsure]) and not unsure[middle].any()
    assert (smooth != labels).sum() > 5


def test_no_blur_is_no_change_and_settings_that_mean_nothing_are_refused():
    assert np.array_equal(smooth_boundary(blobs(0), 1, ISO, 0.0), blobs(0))
    for call in (
        lambda: smooth_boundary(blobs(0), 1, ISO, -1.0),
        lambda: largest_components(blobs(0), 1, 0),
    ):
        with pytest.raises(ValueError, match=r"not -1|not 0"):
            call()


# Plans

PLAN = {
    1: [{"do": "largest_components", "keep": 2}, {"do": "fill_holes"}],
    2: [{"do": "smooth_boundary", "sigma_mm": 1.0}],
}


def test_a_plan_does_its_steps_in_order():
    labels = blobs(1)
    by_hand = smooth_boundary(
        fill_holes(largest_components(labels, 1, 2), 1), 2, (1.0, 2.0, 1.5), 1.0
    )
    assert np.array_equal(apply(labels, PLAN, (1.0, 2.0, 1.5)), by_hand)
    assert np.array_equal(apply(labels, {}, ISO), labels)


def test_a_plan_is_json_and_comes_back(tmp_path):
    for content in (PLAN, {"plan": PLAN, "table": []}):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        assert load(tmp_path / "plan.json") == PLAN
    save(PLAN, tmp_path / "saved.json")
    assert load(tmp_path / "saved.json") == PLAN
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "saved.json"]


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"liver": []}',
        '{"1": [{"do": "shave"}]}',
        '{"1": [{}]}',
        '{"1": ["fill_holes"]}',
        '{"1": 3}',
        '{"1": [{"do": "fill_holes", "sigma_mm": 1}]}',
        '{"1": [{"do": "smooth_boundary"}]}',
        '{"1": [{"do": "smooth_boundary", "sigma_mm": -2}]}',
        '{"1": [{"do": "largest_components", "keep": 0}]}',
        '{"1": [{"do": "largest_components", "keep": "two"}]}',
    ],
)
def test_what_is_no_plan_is_refused_by_name(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: not a post-processing plan") and "\n" not in str(
        caught.value
    )
    with pytest.raises(InputError, match="not a post-processing plan"):
        load(tmp_path / "none.json")


# The choice

NAMES = {0: "background", 1: "kidney", 2: "liver", 3: "spleen"}


def noisy(seed):
    """Kidneys with islands, a liver with a cavity, a perfect spleen."""
    truth = box(kidneys(), 3, (16, 14, 14), (20, 18, 18))
    prediction = box(
        box(truth.copy(), 1, (20, 20, 2 + seed), (23, 23, 5 + seed)), 0, (6, 16, 16), (9, 19, 19)
    )
    return Case(f"s{seed}", prediction, truth, ISO)


def test_what_helps_is_kept_and_nothing_else():
    plan, table = choose([noisy(0), noisy(3)], NAMES)
    assert plan == {1: [{"do": "largest_components", "keep": 2}], 2: [{"do": "fill_holes"}]}
    assert [(line["class"], line["step"]["do"]) for line in table if line["kept"]] == [
        (1, "largest_components"),
        (2, "fill_holes"),
    ]
    for case in (noisy(0), noisy(3)):
        assert np.array_equal(apply(case.prediction, plan, ISO), case.truth)
    assert len(table) == 3 * len(CANDIDATES)
    assert {line["name"] for line in table} == {"kidney", "liver", "spleen"}


def test_a_plan_is_chosen_on_what_was_annotated():
    """The cavity of the liver was not annotated, so that filling it is no gain; and a wrong island there no loss."""
    case = noisy(0)
    truth = box(case.truth.copy(), 9, (6, 16, 16), (9, 19, 19))
    plan, table = choose([case._replace(truth=truth, ignore=9)], NAMES)
    assert plan == {1: [{"do": "largest_components", "keep": 2}]}
    assert {line["dice_before"] for line in table if line["name"] == "liver"} == {1}


def test_the_table_says_by_how_much_dice_changed():
    cases = [noisy(0), noisy(3)]
    _, table = choose(cases, NAMES)
    for line in (
        line for line in table if line["class"] == 1
    ):  # before any other class was changed
        before = np.mean([dice(case.prediction, case.truth, 1) for case in cases])
        after = np.mean(
            [
                dice(apply(case.prediction, {1: [line["step"]]}, ISO), case.truth, 1)
                for case in cases
            ]
        )
        if line["step"]["do"] == "largest_components":
            assert (line["dice_before"], line["dice_after"]) == pytest.approx((before, after))
            assert line["change"] == pytest.approx(after - before) and line["change"] > 0.03


def test_a_step_is_tried_on_what_the_steps_before_it_left():
    case = noisy(0)
    prediction = box(
        case.prediction.copy(), 0, (4, 4, 4), (5, 5, 5)
    )  # a hole in a kidney, beside its islands
    plan, table = choose([case._replace(prediction=prediction)], NAMES)
    assert [step["do"] for step in plan[1]] == ["largest_components", "fill_holes"]
    assert table[1]["dice_before"] == table[0]["dice_after"] and table[1]["dice_after"] == 1


def test_a_component_count_is_that_of_the_case_that_truly_has_most():
    one = Case("one", kidneys(), largest_components(kidneys(), 1), ISO)  # a patient with one kidney
    plan, _ = choose([one], NAMES)
    assert plan[1] == [{"do": "largest_components", "keep": 1}]
    plan, table = choose([one, Case("two", kidneys(), kidneys(), ISO)], NAMES)
    assert 1 not in plan and table[0]["step"]["keep"] == 2


def test_a_slip_of_the_annotator_is_no_second_organ():
    slip = box(box(empty(), 1, (2, 2, 2), (10, 10, 10)), 1, (20, 20, 20), (21, 21, 21))
    _, table = choose([Case("s", slip, slip, ISO)], NAMES)
    assert table[0]["step"]["keep"] == 1


def test_an_organ_that_was_found_is_not_given_up_for_a_better_mean():
    truth = kidneys()
    prediction = box(
        truth.copy(), 0, (15, 2, 2), (20, 7, 6)
    )  # of the second kidney one side is found
    for n, far in enumerate((2, 8, 14)):  # and there are larger islands
        box(prediction, 1, (20, 18, far), (23 + n % 2, 22, far + 4))
    without = largest_components(prediction, 1, keep=2)
    assert (
        dice(without, truth, 1) > dice(prediction, truth, 1)
        and not (without[15:] * truth[15:]).any()
    )
    plan, table = choose([Case("s", prediction, truth, ISO)], NAMES, [{"do": "largest_components"}])
    assert plan == {} and table[0]["why"] == "loses 1 true components" and not table[0]["kept"]


def test_what_lowers_another_class_is_not_kept(monkeypatch):
    case = noisy(0)

    def steal(labels, cls, spacing):  # mends one class and takes a voxel of another
        result = np.where(labels == cls, 0, labels)
        result[case.truth == cls], result[16, 14, 14] = cls, 0
        return result

    monkeypatch.setitem(STEPS, "steal", steal)
    plan, table = choose([case], NAMES, [{"do": "steal"}])
    assert plan == {} and {line["why"] for line in table} == {"lowers the Dice of spleen"}
    assert table[0]["change"] > 0


def test_of_several_settings_the_best_is_kept():
    truth = box(empty(), 1, (6, 6, 6), (18, 18, 18))
    rng = np.random.default_rng(0)
    rough = np.where(
        ndimage.binary_dilation(truth > 0) & (rng.random(truth.shape) < 0.3), 1, truth
    ).astype(np.uint8)
    settings = [{"do": "smooth_boundary", "sigma_mm": mm} for mm in (0.8, 1.0, 4.0)]
    plan, table = choose([Case("s", rough, truth, ISO)], {1: "a"}, settings)
    best = max(settings, key=lambda step: dice(apply(rough, {1: [step]}, ISO), truth, 1))
    assert plan == {1: [best]} and sum(line["kept"] for line in table) == 1
    assert table[1]["dice_after"] > table[1]["dice_before"]
    best_first = sorted((line for line in table), key=lambda line: -line["dice_after"])
    assert best_first[0]["kept"] and not best_first[1]["kept"]


def test_a_class_no_case_has_is_left_alone_and_no_cases_are_refused():
    plan, table = choose([noisy(0)], {4: "absent"})
    assert plan == {} and all(np.isnan(line["dice_before"]) for line in table)
    with pytest.raises(ValueError, match="there are none"):
        choose([], NAMES)


def test_a_chosen_plan_is_json():
    plan, table = choose([noisy(0)], NAMES)
    assert {int(cls): steps for cls, steps in json.loads(json.dumps(plan)).items()} == plan
    json.dumps(table)


def test_the_table_is_text_with_a_line_for_each_step():
    _, table = choose([noisy(0)], NAMES)
    lines = as_text(table).splitlines()
    assert len(lines) == len(table)
    assert [line.startswith("+") for line in lines] == [line["kept"] for line in table]
    assert lines[0].split()[:4] == ["+", "kidney", "largest_components", "2"] and lines[0].endswith(
        "raises Dice"
    )


def test_every_candidate_is_a_step():
    assert {step["do"] for step in CANDIDATES} == set(STEPS) == set(postprocess.STEPS)
