"""How far a label map is from the truth: Dice, HD and MSD (Table 2), HD95 and NSD, in mm.

The border of a mask is its voxels that have a face neighbour outside. From each border voxel of
the prediction the distance to the nearest border voxel of the truth is taken, between centres, and
the same the other way. Every surface metric is a small reduction of these two lists of distances.

The paper defines neither HD nor MSD. Here HD is the largest of all distances, and MSD their mean
over the border voxels of both masks, the average symmetric surface distance (ASSD).

Programs that print "HD95" pool the two lists in different ways (Podobnik & Vrtovec, HDilemma,
MICCAI 2024; Maier-Hein et al., Metrics Reloaded, Nature Methods 2024). The choices have names:

    default  HD95 is the larger of the 95th percentiles of both lists
    monai    the same, with the answers of MONAI 1.6.1 where one of the two masks is empty
    medpy    HD95 is the 95th percentile of both lists together

The outside of the volume is background: a mask that touches the volume's face has a border there.
Maps are (d, h, w), spacing is mm in that order.
"""

from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from dae.boxes import bounding_box
from dae.config.evaluate import DefinitionName
from dae.evaluation.nearest import Floats, Voxels, nearest_distances

Mask = NDArray[np.bool_]
Labels = NDArray[np.integer[Any]]
Row = dict[str, Any]

DEFINITIONS: tuple[DefinitionName, ...] = get_args(DefinitionName)
DIRECTED = ("msd_prediction_to_truth", "msd_truth_to_prediction")
DISTANCES = ("hd", "msd", "hd95", "assd", "masd", *DIRECTED)
METRICS = ("dice", *DISTANCES, "nsd")

OK = "ok"  # the class is in both maps
MISSED = "missed"  # in the truth alone
SPURIOUS = "spurious"  # in the prediction alone
ABSENT = "absent"  # in neither
STATUSES = (OK, MISSED, SPURIOUS, ABSENT)

LARGEST_LABEL = 65534
SLACK = 1e-6  # mm: headers store spacing as float32, and 0.8 mm arrives as 0.800000012


def score_labels(
    prediction: Labels,
    truth: Labels,
    spacing: Sequence[float],
    classes: Mapping[int, str] | Sequence[int],
    *,
    tolerance: float | Mapping[int, float] = 1.0,
    definition: DefinitionName = "default",
    ignore: Mask | None = None,
) -> list[Row]:
    """One row for each of `classes` from two label maps (d, h, w) on one grid.

    Keys: class, name, status, METRICS, volume_truth_ml, volume_prediction_ml. Labels that are not
    in `classes` count as background. `tolerance`, of NSD, is one number or one for each class.

    Where the class is in both maps (status ok), Dice and NSD lie in [0, 1] and distances are in mm.
    Where it is in one of them (missed, spurious), Dice and NSD are 0 and distances inf; where it is
    in neither (absent), all are nan. Voxels where `ignore` is true count in no volume and bear no
    border; a class left without one has nan distances. Raises ValueError on input that is wrong.
    """
    names = names_by_label(classes)
    tolerances = tolerances_of(tolerance, names)
    voxel = np.asarray(spacing, np.float64)
    check(prediction, truth, ignore, voxel, tolerances)
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition}")

    prediction, truth = cut_out(prediction, truth, ignore, max(names))
    predicted_borders = border_voxels(prediction, list(names))
    true_borders = border_voxels(truth, list(names))
    counts = count_voxels(prediction, truth, list(names))
    millilitres = float(voxel.prod()) / 1000

    rows = []
    for label, (in_prediction, in_truth, in_both) in zip(names, counts):
        status = status_of(in_prediction, in_truth)
        if status == OK:
            scores = surface_scores(
                predicted_borders[label], true_borders[label], voxel, tolerances[label], definition
            )
            scores["dice"] = 2 * in_both / (in_prediction + in_truth)
        else:
            scores = scores_without_overlap(status, definition)

        row: Row = {"class": label, "name": names[label], "status": status}
        for metric in METRICS:
            row[metric] = scores[metric]
        row["volume_truth_ml"] = in_truth * millilitres
        row["volume_prediction_ml"] = in_prediction * millilitres
        rows.append(row)
    return rows


# --- borders and their distances


def border_voxels(labels: Labels, classes: Sequence[int]) -> dict[int, Voxels]:
    """By class the indices (n, 3) of its border voxels: a face neighbour has another label.

    An ignored voxel is no neighbour: where a mask runs into it, there is no border. The map has a
    margin of background all around, so that each voxel of a class has its six neighbours.
    """
    # The map is one long line of voxels: a step along an axis is a step along that line.
    line = labels.ravel()
    ignored = ignored_value(labels)
    _, height, width = labels.shape
    steps = (height * width, width, 1)

    # Only voxels of a class are looked at: most of a volume is background.
    inside = np.flatnonzero((line != 0) & (line != ignored))
    own = line[inside]
    border = np.zeros(len(inside), bool)
    for step in steps:
        for neighbour in (line[inside - step], line[inside + step]):
            border |= (neighbour != own) & (neighbour != ignored)

    # Back from the line to (d, h, w), and apart by class.
    voxels = np.stack(np.unravel_index(inside[border], labels.shape), axis=-1)
    owners = own[border]
    return {label: voxels[owners == label] for label in classes}


def surface_scores(
    predicted: Voxels, true: Voxels, spacing: Floats, tolerance: float, definition: DefinitionName
) -> dict[str, float]:
    """Distances in mm and NSD from two borders (n, 3); nan where one of them is wholly ignored."""
    if not len(predicted) or not len(true):
        return dict.fromkeys((*DISTANCES, "nsd"), nan)

    to_truth = nearest_distances(predicted, true, spacing)
    to_prediction = nearest_distances(true, predicted, spacing)
    both = np.concatenate([to_truth, to_prediction])

    # The larger of the two directions, or one percentile of both together.
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
    if definition == "medpy":
        hd95 = np.percentile(both, 95)

    # Per voxel of both borders, and per border: the two differ where one border is longer.
    assd = float(both.mean())
    msd_prediction_to_truth = float(to_truth.mean())
    msd_truth_to_prediction = float(to_prediction.mean())
    return {
        "hd": float(both.max()),  # Huttenlocher et al., 1993
        "msd": assd,  # Table 2 does not say which mean it is
        "hd95": float(hd95),
        "assd": assd,
        "masd": (msd_prediction_to_truth + msd_truth_to_prediction) / 2,
        "msd_prediction_to_truth": msd_prediction_to_truth,
        "msd_truth_to_prediction": msd_truth_to_prediction,
        # The share of both borders that the other has within the tolerance (Nikolov et al., 2018).
        "nsd": float(np.mean(both <= tolerance + SLACK)),
    }


# --- classes that are not in both maps


def status_of(in_prediction: int, in_truth: int) -> str:
    """One of STATUSES, from how many voxels of a class are in each map."""
    if in_prediction and in_truth:
        return OK
    if in_truth:
        return MISSED
    if in_prediction:
        return SPURIOUS
    return ABSENT


def scores_without_overlap(status: str, definition: DefinitionName) -> dict[str, float]:
    """Scores of a class that is missed, spurious or absent."""
    if status == ABSENT:
        return dict.fromkeys(METRICS, nan)

    scores = {"dice": 0.0, **dict.fromkeys(DISTANCES, inf), "nsd": 0.0}
    if definition == "monai":
        scores["hd95"] = nan
    if definition == "monai" and status == SPURIOUS:
        scores["dice"] = nan
    return scores


# --- label maps


def count_voxels(prediction: Labels, truth: Labels, classes: Sequence[int]) -> list[list[int]]:
    """For each class the number of voxels in the prediction, in the truth and in both."""
    foreground = (prediction | truth) != 0
    predicted = prediction[foreground]
    true = truth[foreground]
    agreed = true[predicted == true]

    counts = []
    for labels in (predicted, true, agreed):
        voxels_of_label = np.bincount(labels, minlength=max(classes) + 1)
        counts.append(voxels_of_label[classes])
    return np.stack(counts, axis=1).tolist()


def cut_out(
    prediction: Labels, truth: Labels, ignore: Mask | None, largest: int
) -> tuple[Labels, Labels]:
    """Both maps cut to what is not background in either, with a margin of one voxel.

    They are of the smallest unsigned type that has one value more than the labels need, and the
    `largest` class, which may be in neither map. That value, the type's largest, marks ignored
    voxels in both. If those became background instead, both borders would run along the cut, and
    every voxel of it would be a perfect match.
    """
    occupied = (prediction != 0) | (truth != 0)
    if ignore is not None:
        occupied |= ignore
    nothing = (slice(0), slice(0), slice(0))
    box = bounding_box(occupied) or nothing

    # What an ignored voxel holds does not matter, even if it could be no label.
    prediction = prediction[box]
    truth = truth[box]
    if ignore is not None:
        prediction = np.where(ignore[box], 0, prediction)
        truth = np.where(ignore[box], 0, truth)

    low = min(int(labels.min(initial=0)) for labels in (prediction, truth))
    high = max(int(labels.max(initial=0)) for labels in (prediction, truth))
    if low < 0 or high > LARGEST_LABEL:
        raise ValueError(f"labels must lie in 0 to {LARGEST_LABEL}, found {low} to {high}")

    smallest = np.min_scalar_type(max(high, largest) + 1)
    prediction = prediction.astype(smallest)
    truth = truth.astype(smallest)
    if ignore is not None:
        prediction[ignore[box]] = ignored_value(prediction)
        truth[ignore[box]] = ignored_value(truth)
    return np.pad(prediction, 1), np.pad(truth, 1)


def ignored_value(labels: Labels) -> int:
    """What marks an ignored voxel in a map of `cut_out`."""
    return int(np.iinfo(labels.dtype).max)


# --- what is asked


def names_by_label(classes: Mapping[int, str] | Sequence[int]) -> dict[int, str]:
    """Name by label; without names each label's is its number."""
    if isinstance(classes, Mapping):
        return {int(label): name for label, name in classes.items()}
    return {int(label): str(label) for label in classes}


def tolerances_of(
    tolerance: float | Mapping[int, float], labels: Mapping[int, str]
) -> dict[int, float]:
    """Tolerance in mm by label; nan for a label that has none."""
    if isinstance(tolerance, Mapping):
        return {label: tolerance.get(label, nan) for label in labels}
    return dict.fromkeys(labels, tolerance)


def check(
    prediction: Labels,
    truth: Labels,
    ignore: Mask | None,
    spacing: Floats,
    tolerances: Mapping[int, float],
) -> None:
    """Raises ValueError, one line, on the first thing that is wrong."""
    shapes = f"{prediction.shape} and {truth.shape}"
    if prediction.ndim != 3 or truth.ndim != 3:
        raise ValueError(f"prediction and truth must be 3D (d, h, w), got {shapes}")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth lie on different grids: {shapes}")

    if not {prediction.dtype.kind, truth.dtype.kind} <= set("biu"):
        raise ValueError(f"labels must be integers, got {prediction.dtype} and {truth.dtype}")

    if ignore is not None and (ignore.shape != truth.shape or ignore.dtype != bool):
        raise ValueError(f"ignore must be a boolean array of shape {truth.shape}")

    if spacing.shape != (3,) or not 0 < spacing.min() <= spacing.max() < inf:
        raise ValueError(f"spacing must be three positive numbers in mm, got {spacing.tolist()}")

    if not tolerances or min(tolerances) < 1 or max(tolerances) > LARGEST_LABEL:
        raise ValueError(
            f"classes must be 1 to {LARGEST_LABEL} (0 is the background), got {list(tolerances)}"
        )
    if not all(mm >= 0 for mm in tolerances.values()):
        raise ValueError(f"every class needs a tolerance of 0 mm or more: {tolerances}")
