"""dae/evaluation/postprocess.py: steps against slower ones over the whole volume, and a choice that
does no harm.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from dae.errors import InputError
from dae.evaluation import postprocess
from dae.evaluation.cases import Case
from dae.evaluation.metrics import Labels, score_labels
from dae.evaluation.postprocess import (
    CANDIDATES,
    Step,
    Steps,
    apply,
    apply_step,
    as_text,
    choose,
    fill_holes,
    largest_components,
    load_steps,
    save_steps,
    smooth_boundary,
)

ISO = (1.0, 1.0, 1.0)
SPACING = (1.0, 2.0, 1.5)
EACH_STEP: Sequence[Step] = (
    {"do": "largest_components"},
    {"do": "fill_holes"},
    {"do": "smooth_boundary", "sigma_mm": 1.0},
)


def blobs(seed: int, classes: int = 3, shape: tuple[int, int, int] = (20, 18, 22)) -> Labels:
    """Random clumps of several classes, with islands. Class 2 has a hole."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 1.2) for _ in range(classes + 1)]
    labels = np.argmax(fields, axis=0).astype(np.uint8)
    if classes > 1:
        paint(labels, 2, (8, 8, 8), (11, 11, 11))
        paint(labels, 0, (9, 9, 9), (10, 10, 10))
    return labels


def paint(labels: Labels, cls: int, low: Sequence[int], high: Sequence[int]) -> Labels:
    """Paint a box of a class into the map, and return the map."""
    box = tuple(slice(first, last) for first, last in zip(low, high))
    labels[box] = cls
    return labels


def empty(*shape: int) -> Labels:
    return np.zeros(shape or (24, 24, 24), np.uint8)


def kidneys() -> Labels:
    """Class 1 twice, 6 x 6 x 6 and 5 x 5 x 5, and class 2 once, far from each other."""
    labels = paint(empty(), 1, (2, 2, 2), (8, 8, 8))
    paint(labels, 1, (15, 2, 2), (20, 7, 7))
    return paint(labels, 2, (4, 14, 14), (12, 22, 22))


def body() -> Labels:
    return paint(empty(), 1, (4, 4, 4), (16, 16, 16))


def dice(prediction: Labels, truth: Labels, cls: int) -> float:
    value: float = score_labels(prediction, truth, ISO, [cls])[0]["dice"]
    return value


# --- every step


@pytest.mark.parametrize("step", EACH_STEP, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_leaves_its_input_as_it_was_and_keeps_its_type(step: Step, seed: int) -> None:
    for dtype in (np.uint8, np.int16, np.int32):
        labels = blobs(seed).astype(dtype)
        before = labels.copy()
        result = apply_step(step, labels, 2, SPACING)
        assert np.array_equal(labels, before)
        assert result.dtype == dtype
        assert result.shape == labels.shape
        assert not np.array_equal(result, before)


@pytest.mark.parametrize("step", EACH_STEP, ids=str)
def test_a_class_that_is_not_there_changes_nothing(step: Step) -> None:
    labels = kidneys()
    assert np.array_equal(apply_step(step, labels, 7, SPACING), labels)
    assert not apply_step(step, empty(), 1, SPACING).any()


def test_every_candidate_is_a_step() -> None:
    assert {step["do"] for step in CANDIDATES} == {step["do"] for step in EACH_STEP}
    for step in CANDIDATES:
        apply_step(step, kidneys(), 1, ISO)


# --- components


def test_two_kidneys_stay_two_where_two_are_kept() -> None:
    labels = paint(kidneys(), 1, (20, 20, 2), (23, 23, 5))  # and an island
    assert np.array_equal(largest_components(labels, 1, keep=2), kidneys())
    assert np.array_equal(largest_components(labels, 1, keep=9), labels)

    larger = paint(empty(), 1, (2, 2, 2), (8, 8, 8))
    assert np.array_equal(largest_components(labels, 1, keep=1) == 1, larger == 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_what_is_kept_are_the_largest_of_the_whole_volume(seed: int, keep: int) -> None:
    labels = blobs(seed, classes=6)
    parts, n = ndimage.label(labels == 3, np.ones((3, 3, 3)))
    sizes = sorted((int((parts == k).sum()) for k in range(1, n + 1)), reverse=True)
    assert n > keep

    kept = largest_components(labels, 3, keep)
    assert not ((kept == 3) & (labels != 3)).any()
    parts, _ = ndimage.label(kept == 3, np.ones((3, 3, 3)))
    assert sorted(np.bincount(parts.ravel())[1:].tolist(), reverse=True) == sizes[:keep]

    assert np.array_equal(kept[labels != 3], labels[labels != 3])
    assert not kept[(labels == 3) & (kept != 3)].any()  # what goes becomes background


def test_voxels_that_touch_by_a_corner_are_one_component() -> None:
    labels = empty(4, 4, 4)
    labels[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = 1
    assert np.array_equal(largest_components(labels, 1), labels)


# --- holes


def test_a_cavity_is_filled_and_a_bay_is_not() -> None:
    hollow = paint(body(), 0, (8, 8, 8), (11, 11, 11))
    assert np.array_equal(fill_holes(hollow, 1), body())

    bay = paint(hollow.copy(), 0, (8, 8, 11), (9, 9, 16))  # a channel of one voxel to the outside
    assert np.array_equal(fill_holes(bay, 1), bay)


def test_what_is_open_at_the_volumes_face_is_no_hole() -> None:
    labels = paint(empty(), 1, (0, 4, 4), (10, 14, 14))
    paint(labels, 0, (0, 7, 7), (5, 10, 10))
    assert np.array_equal(fill_holes(labels, 1), labels)


def test_an_organ_in_the_hole_stays_and_the_gap_around_it_is_filled() -> None:
    labels = paint(body(), 0, (7, 7, 7), (13, 13, 13))
    paint(labels, 2, (9, 9, 9), (11, 11, 11))
    filled = fill_holes(labels, 1)
    assert np.array_equal(filled == 2, labels == 2)
    assert np.array_equal(filled > 0, body() > 0)


def test_a_wall_that_touches_by_edges_holds() -> None:
    labels = empty(5, 5, 5)
    # The six neighbours of the middle.
    labels[[1, 3, 2, 2, 2, 2], [2, 2, 1, 3, 2, 2], [2, 2, 2, 2, 1, 3]] = 1
    assert fill_holes(labels, 1)[2, 2, 2] == 1


@pytest.mark.parametrize("seed", range(8))
def test_holes_are_those_of_scipy(seed: int) -> None:
    labels = blobs(seed, classes=1)
    assert np.array_equal(fill_holes(labels, 1) == 1, ndimage.binary_fill_holes(labels == 1))


# --- smoothing


def half_space() -> Labels:
    return paint(empty(), 1, (0, 0, 0), (24, 24, 12))


def staircase() -> Labels:
    """The half-space with a ridge on every fourth row."""
    stairs = half_space()
    stairs[1::4, :, 12] = 1
    return stairs


def test_smoothing_removes_a_staircase() -> None:
    smooth = smooth_boundary(staircase(), 1, ISO, 1.5)
    assert np.array_equal(smooth[2:-2], half_space()[2:-2])
    assert np.array_equal(smooth_boundary(half_space(), 1, ISO, 1.5), half_space())


def test_the_blur_is_in_mm() -> None:
    coarse = (10.0, 10.0, 10.0)
    assert np.array_equal(smooth_boundary(staircase(), 1, coarse, 1.5), staircase())
    ten_times = smooth_boundary(staircase(), 1, coarse, 15.0)
    assert np.array_equal(ten_times, smooth_boundary(staircase(), 1, ISO, 1.5))


def test_an_organ_of_one_voxel_is_kept_alone_and_within_another() -> None:
    labels = paint(empty(), 2, (5, 5, 5), (6, 6, 6))
    assert np.array_equal(smooth_boundary(labels, 2, ISO, 2.0), labels)

    within = paint(body(), 2, (9, 9, 9), (10, 10, 10))
    assert (smooth_boundary(within, 1, ISO, 2.0) == 2).sum() == 1


def test_what_a_class_loses_goes_to_its_strongest_neighbour() -> None:
    labels = paint(half_space(), 2, (0, 0, 12), (24, 24, 24))
    spur = paint(labels.copy(), 1, (12, 12, 12), (13, 13, 14))
    assert np.array_equal(smooth_boundary(spur, 1, ISO, 1.5), labels)


@pytest.mark.parametrize("seed", range(6))
def test_smoothing_in_a_box_is_smoothing_in_the_whole_volume(seed: int) -> None:
    labels = blobs(seed, classes=6, shape=(30, 26, 28))
    middle = np.zeros(labels.shape, bool)
    middle[9:21, 8:18, 8:20] = True
    labels[(labels == 2) & ~middle] = 3

    sigma = [0.9 / mm for mm in SPACING]
    fields = {}
    for value in np.unique(labels).tolist():
        mask = (labels == value).astype(float)
        fields[value] = ndimage.gaussian_filter(mask, sigma, mode="nearest", truncate=3)
    own = fields.pop(2)
    others = list(fields.values())
    rival = np.max(others, axis=0)
    rival_label = np.array(list(fields))[np.argmax(others, axis=0)]
    expected = np.where(own > rival, 2, np.where(labels == 2, rival_label, labels))

    smooth = smooth_boundary(labels, 2, SPACING, 0.9)
    unsure = np.abs(own - rival) < 1e-6
    assert not unsure[middle].any()
    assert np.array_equal(smooth[~unsure], expected[~unsure])
    assert (smooth != labels).sum() > 5


def test_no_blur_is_no_change_and_settings_that_mean_nothing_are_refused() -> None:
    assert np.array_equal(smooth_boundary(blobs(0), 1, ISO, 0.0), blobs(0))
    with pytest.raises(ValueError, match="not -1"):
        smooth_boundary(blobs(0), 1, ISO, -1.0)
    with pytest.raises(ValueError, match="not 0"):
        largest_components(blobs(0), 1, 0)


# --- steps as JSON

STEPS: Steps = {
    1: [{"do": "largest_components", "keep": 2}, {"do": "fill_holes"}],
    2: [{"do": "smooth_boundary", "sigma_mm": 1.0}],
}


def test_steps_are_done_in_order() -> None:
    labels = blobs(1)
    by_hand = fill_holes(largest_components(labels, 1, 2), 1)
    by_hand = smooth_boundary(by_hand, 2, SPACING, 1.0)
    assert np.array_equal(apply(labels, STEPS, SPACING), by_hand)
    assert np.array_equal(apply(labels, {}, ISO), labels)


def test_steps_are_json_and_come_back(tmp_path: Path) -> None:
    save_steps(STEPS, tmp_path / "steps.json")
    assert load_steps(tmp_path / "steps.json") == STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["steps.json"]

    written = json.loads((tmp_path / "steps.json").read_text())
    assert written == {"1": STEPS[1], "2": STEPS[2]}


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
def test_what_is_no_plan_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        load_steps(path)
    assert str(error.value).startswith(f"{path}: not a post-processing plan")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: not a post-processing plan"):
        load_steps(tmp_path / "none.json")


# --- the choice

NAMES = {0: "background", 1: "kidney", 2: "liver", 3: "spleen"}


def noisy(seed: int) -> Case:
    """Kidneys with islands, a liver with a cavity, a perfect spleen."""
    truth = paint(kidneys(), 3, (16, 14, 14), (20, 18, 18))
    prediction = paint(truth.copy(), 1, (20, 20, 2 + seed), (23, 23, 5 + seed))
    paint(prediction, 0, (6, 16, 16), (9, 19, 19))
    return Case(f"s{seed}", prediction, truth, ISO)


def test_what_helps_is_kept_and_nothing_else() -> None:
    cases = [noisy(0), noisy(3)]
    steps, table = choose(cases, NAMES)
    assert steps == {1: [{"do": "largest_components", "keep": 2}], 2: [{"do": "fill_holes"}]}
    for case in cases:
        assert np.array_equal(apply(case.prediction, steps, ISO), case.truth)

    kept = [(line["class"], line["step"]["do"]) for line in table if line["kept"]]
    assert kept == [(1, "largest_components"), (2, "fill_holes")]
    assert len(table) == 3 * len(CANDIDATES)
    assert {line["name"] for line in table} == {"kidney", "liver", "spleen"}


def test_steps_are_chosen_on_what_was_annotated() -> None:
    """The cavity of the liver was not annotated, so that filling it is no gain."""
    case = noisy(0)
    truth = paint(case.truth.copy(), 9, (6, 16, 16), (9, 19, 19))
    steps, table = choose([case._replace(truth=truth, ignore=9)], NAMES)
    assert steps == {1: [{"do": "largest_components", "keep": 2}]}
    assert {line["dice_before"] for line in table if line["name"] == "liver"} == {1}


def test_the_table_says_by_how_much_dice_changed() -> None:
    cases = [noisy(0), noisy(3)]
    _, table = choose(cases, NAMES)
    line = table[0]  # before anything else was changed
    assert line["class"] == 1
    assert line["step"] == {"do": "largest_components", "keep": 2}

    before = []
    after = []
    for case in cases:
        before.append(dice(case.prediction, case.truth, 1))
        after.append(dice(largest_components(case.prediction, 1, 2), case.truth, 1))
    assert line["dice_before"] == pytest.approx(np.mean(before))
    assert line["dice_after"] == pytest.approx(np.mean(after))
    assert line["change"] == pytest.approx(np.mean(after) - np.mean(before))
    assert line["change"] > 0.03


def test_a_step_is_tried_on_what_the_steps_before_it_left() -> None:
    case = noisy(0)
    # A hole in a kidney, beside its islands.
    prediction = paint(case.prediction.copy(), 0, (4, 4, 4), (5, 5, 5))
    steps, table = choose([case._replace(prediction=prediction)], NAMES)
    assert [step["do"] for step in steps[1]] == ["largest_components", "fill_holes"]
    assert table[1]["dice_before"] == table[0]["dice_after"]
    assert table[1]["dice_after"] == 1


def test_a_component_count_is_that_of_the_case_that_truly_has_most() -> None:
    one_kidney = largest_components(kidneys(), 1)
    one = Case("one", kidneys(), one_kidney, ISO)
    two = Case("two", kidneys(), kidneys(), ISO)

    steps, _ = choose([one], NAMES)
    assert steps[1] == [{"do": "largest_components", "keep": 1}]

    steps, table = choose([one, two], NAMES)
    assert 1 not in steps
    assert table[0]["step"]["keep"] == 2


def test_a_slip_of_the_annotator_is_no_second_organ() -> None:
    slip = paint(empty(), 1, (2, 2, 2), (10, 10, 10))
    paint(slip, 1, (20, 20, 20), (21, 21, 21))
    _, table = choose([Case("s", slip, slip, ISO)], NAMES)
    assert table[0]["step"]["keep"] == 1


def test_an_organ_that_was_found_is_not_given_up_for_a_better_mean() -> None:
    truth = kidneys()
    # Of the second kidney one side is found, and there are larger islands.
    prediction = paint(truth.copy(), 0, (15, 2, 2), (20, 7, 6))
    for n, w in enumerate((2, 8, 14)):
        paint(prediction, 1, (20, 18, w), (23 + n % 2, 22, w + 4))

    without = largest_components(prediction, 1, keep=2)
    assert dice(without, truth, 1) > dice(prediction, truth, 1)
    assert not (without[15:] * truth[15:]).any()

    case = Case("s", prediction, truth, ISO)
    steps, table = choose([case], NAMES, [{"do": "largest_components"}])
    assert steps == {}
    assert table[0]["why"] == "loses 1 true components"
    assert not table[0]["kept"]


def test_what_lowers_another_class_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy(0)

    def steal(step: Step, labels: Labels, cls: int, spacing: Any) -> Labels:
        """Mends one class and takes a voxel of another."""
        result = np.where(labels == cls, 0, labels)
        result[case.truth == cls] = cls
        result[16, 14, 14] = 0
        return result

    monkeypatch.setattr(postprocess, "apply_step", steal)
    steps, table = choose([case], NAMES, [{"do": "steal"}])
    assert steps == {}
    assert {line["why"] for line in table} == {"lowers the Dice of spleen"}
    assert table[0]["change"] > 0


def test_of_several_settings_the_best_is_kept() -> None:
    truth = paint(empty(), 1, (6, 6, 6), (18, 18, 18))
    fringe = np.random.default_rng(0).random(truth.shape) < 0.3
    rough = truth.copy()
    rough[ndimage.binary_dilation(truth > 0) & fringe] = 1
    settings = [{"do": "smooth_boundary", "sigma_mm": mm} for mm in (0.8, 1.0, 4.0)]

    steps, table = choose([Case("s", rough, truth, ISO)], {1: "a"}, settings)
    by_hand = [dice(apply_step(step, rough, 1, ISO), truth, 1) for step in settings]
    best = int(np.argmax(by_hand))
    assert best > 0  # it is not the first that is kept
    assert steps == {1: [settings[best]]}
    assert [line["kept"] for line in table] == [n == best for n in range(3)]
    assert table[0]["why"] == "another setting is better"


def test_a_class_no_case_has_is_left_alone_and_no_cases_are_refused() -> None:
    steps, table = choose([noisy(0)], {4: "absent"})
    assert steps == {}
    assert all(np.isnan(line["dice_before"]) for line in table)
    with pytest.raises(ValueError, match="there are none"):
        choose([], NAMES)


def test_chosen_steps_are_json() -> None:
    steps, table = choose([noisy(0)], NAMES)
    read = json.loads(json.dumps(steps))
    assert {int(cls): steps_of_class for cls, steps_of_class in read.items()} == steps
    json.dumps(table)


def test_the_table_is_text_with_a_line_for_each_step() -> None:
    _, table = choose([noisy(0)], NAMES)
    lines = as_text(table).splitlines()
    assert [line.startswith("+") for line in lines] == [line["kept"] for line in table]
    assert lines[0].split()[:4] == ["+", "kidney", "largest_components", "2"]
    assert lines[0].endswith("raises Dice")
