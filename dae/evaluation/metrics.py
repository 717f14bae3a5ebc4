"""How far a label map is from the truth: Dice, HD, HD95, MSD (ASSD, MASD, both directed means) and NSD, in mm.

Programs that print "HD95" draw the surface and pool its distances in different ways (Podobnik & Vrtovec, HDilemma,
MICCAI 2024; Maier-Hein et al., Metrics Reloaded, Nature Methods 2024). Here the choices have a name each:

    default           centres of 6-neighbour inner border voxels; HD95 is the larger of both directed percentiles
    monai             the same, with the answers of MONAI 1.6.1 where one of the two masks is empty
    medpy             the same voxels; HD95 is the percentile of both directions pooled
    surface-distance  surface elements weighted by their area (Nikolov et al., arXiv:1809.04430)

In all of them the outside of the volume is background: a mask that touches the volume's face has its border there.
Arrays are (d, h, w), spacing is mm in that order, surface elements are flat indices, all classes are drawn at once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from math import hypot, inf, isfinite, nan
from statistics import fmean, median, stdev
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

DefinitionName = Literal["default", "monai", "medpy", "surface-distance"]
Policy = Literal["exclude", "diagonal"]
Mask = NDArray[np.bool_]
Labels = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
Row = dict[str, Any]

STATUSES = (
    "ok",
    "missed",
    "spurious",
    "absent",
)  # in both maps, not in the prediction, not in the truth, in neither
DISTANCES = ("hd", "hd95", "assd", "masd", "msd_prediction_to_truth", "msd_truth_to_prediction")
METRICS = ("dice", *DISTANCES, "nsd")
LARGEST_LABEL = 65534
REACH = 2  # voxels: nearer elements are looked up, farther ones searched for
MARGIN = (
    REACH + 1
)  # of background around the maps, so that a step by flat index never meets the other end of a row
SLACK = 1e-6  # mm: headers store spacing as float32, and 0.8 mm arrives as 0.800000012


class Surface(NamedTuple):
    """Boundary elements: flat indices, weights and labels, each (n,)."""

    at: NDArray[np.intp]
    area: Floats
    label: Labels

    def of(self, label: int) -> "Surface":
        """The elements of one class."""
        its = np.flatnonzero(self.label == label)
        return Surface(self.at[its], self.area[its], self.label[its])


def border_voxels(labels: Labels, spacing: Floats) -> Surface:
    """Voxels with a face neighbour of another label; each weighs 1.

    An ignored voxel (the type's largest value) is no element and makes none: where a mask runs into it, no border is.
    """
    flat, unknown = labels.ravel(), np.iinfo(labels.dtype).max
    at = np.flatnonzero((flat != 0) & (flat != unknown))
    own = flat[at]
    border = np.zeros(len(at), bool)
    for step in flat_steps(labels.shape):
        for neighbour in (flat[at - step], flat[at + step]):
            border |= (neighbour != own) & (neighbour != unknown)
    return Surface(at[border], np.ones(border.sum()), own[border])


def surfels(labels: Labels, spacing: Floats) -> Surface:
    """Corners of voxels, once for every class that holds some but not all of the eight voxels around; area in mm2.

    The index is that of the lowest of the eight: all lie half a voxel off, which distances do not see.
    """
    flat, unknown = labels.ravel(), np.iinfo(labels.dtype).max
    steps = np.array(list(product((0, 1), repeat=3))) @ flat_steps(labels.shape)
    lowest = flat[: -steps[-1]]
    mixed = np.zeros(len(lowest), bool)
    for step in steps:
        mixed |= flat[step : step + len(lowest)] != lowest
    at = np.flatnonzero(mixed)
    at = at[
        (flat[at + steps[:, None]] != unknown).all(0)
    ]  # beside an ignored voxel the pattern is not known
    eight = flat[at + steps[:, None]]  # (8, corners)
    areas = np.linalg.norm(surfel_triangles() * (spacing.prod() / spacing), axis=-1).sum(1)
    found = []
    for k, own in enumerate(eight):
        new = (own != 0) & ~(eight[:k] == own).any(0)
        pattern = np.packbits(eight[:, new] == own[new], axis=0)[0]
        found.append((at[new], areas[pattern], own[new]))
    return Surface(*(np.concatenate(parts) for parts in zip(*found)))


@cache
def surfel_triangles() -> Floats:
    """Area vectors of at most four triangles for each pattern of inside and outside, on unit voxels: (256, 4, 3).

    The fewer of inside and outside (either, at four each) fall into parts joined along edges, and each part is cut off
    by a patch of its own (Lorensen & Cline, 1987). Bit 7 of a pattern is voxel (0, 0, 0), bit 0 is (1, 1, 1).
    """
    table = np.zeros((256, 4, 3))
    for pattern in range(1, 255):
        inside = np.unpackbits(np.array([pattern], np.uint8)).reshape(2, 2, 2)
        parts, n = ndimage.label(inside if inside.sum() <= 4 else 1 - inside)
        triangles = np.concatenate([patch(parts == k) for k in range(1, n + 1)])
        table[pattern, : len(triangles)] = triangles
    return table


def patch(part: Mask) -> Floats:
    """Area vectors (n - 2, 3) of the surface through the middles of the n edges that leave a connected part (2, 2, 2).

    Seen from the part they are a convex loop, here cut into a fan of triangles. Where the loop is not flat, its first
    vertex decides the area; the largest is taken, as surface-distance does (all 256 areas are equal to its table).
    """
    edges = [
        (a, b)
        for a, b in combinations(np.ndindex(2, 2, 2), 2)
        if np.abs(np.subtract(a, b)).sum() == 1
    ]
    middles = np.array([np.add(a, b) / 2 for a, b in edges if part[a] != part[b]])
    across = np.linalg.svd(np.argwhere(part).mean(0, keepdims=True) - 0.5)[2][1:]
    x, y = across @ (middles - middles.mean(0)).T
    loop = middles[np.argsort(np.arctan2(y, x))]
    fans = [np.roll(loop, k, axis=0) - loop[-k] for k in range(len(loop))]
    triangles = [np.cross(fan[1:-1], fan[2:]) / 2 for fan in fans]
    return max(triangles, key=lambda vectors: float(np.linalg.norm(vectors, axis=1).sum()))


def flat_steps(shape: Sequence[int]) -> NDArray[np.intp]:
    """How far one step along each axis moves the flat index: (3,)."""
    return np.array([shape[1] * shape[2], shape[2], 1])


class Nearest:
    """Distances on one grid, exact in float64.

    Most elements have one of the other surface within two voxels, found by looking at every offset in order of length
    for a whole surface at once. The few that are left go to a KD-tree.
    """

    def __init__(self, shape: Sequence[int], spacing: Floats) -> None:
        offsets = np.array(list(product(range(-REACH, REACH + 1), repeat=3)))
        mm = np.linalg.norm(offsets * spacing, axis=1)
        # Whatever lies beyond the reach is at least this far: a look-up may not run ahead of it.
        kept = [k for k in np.argsort(mm) if mm[k] <= (REACH + 1) * spacing.min()]
        self.near = list(zip((offsets @ flat_steps(shape))[kept], mm[kept]))
        self.shape, self.spacing = shape, spacing
        self.marked = np.zeros(np.prod(shape), bool)

    def __call__(self, source: Surface, target: Surface) -> Floats:
        """From each element of `source` to the nearest of `target`, which is not empty: (n,) mm."""
        mm, left, at = np.zeros(len(source.at)), np.arange(len(source.at)), source.at
        self.marked[target.at] = True
        for step, distance in self.near:
            there = self.marked[at + step]
            mm[left[there]] = distance
            left, at = left[~there], at[~there]
        self.marked[target.at] = False
        if len(left):
            # Measured over whole voxels, not by the tree, so that lengths that are equal come out equal.
            here, there = (
                np.stack(np.unravel_index(index, self.shape), axis=-1) for index in (at, target.at)
            )
            tree = cKDTree(there * self.spacing, balanced_tree=False, compact_nodes=False)
            _, nearest = tree.query(here * self.spacing)
            mm[left] = np.linalg.norm((here - there[nearest]) * self.spacing, axis=1)
        return mm


class Definition(NamedTuple):
    """How a surface is drawn, how HD95 is taken, and what differs from `WHEN_EMPTY`."""

    surface: Callable[[Labels, Floats], Surface]
    pooled: bool = False  # one percentile of both directions, not the larger of two
    by_area: bool = False
    when_empty: Mapping[str, Mapping[str, float]] = {}

    def percentile(self, percent: float, mm: Floats, area: Floats) -> float:
        """By area the least distance that holds `percent` of it, otherwise linear between elements."""
        how: dict[str, Any] = {"weights": area, "method": "inverted_cdf"} if self.by_area else {}
        return float(np.percentile(mm, percent, **how))


ONE_EMPTY = {"dice": 0.0, **dict.fromkeys(DISTANCES, inf), "nsd": 0.0}
WHEN_EMPTY = {"missed": ONE_EMPTY, "spurious": ONE_EMPTY, "absent": dict.fromkeys(METRICS, nan)}

DEFINITIONS: dict[DefinitionName, Definition] = {
    "default": Definition(border_voxels),
    "monai": Definition(
        border_voxels, when_empty={"missed": {"hd95": nan}, "spurious": {"hd95": nan, "dice": nan}}
    ),
    "medpy": Definition(border_voxels, pooled=True),
    "surface-distance": Definition(surfels, by_area=True),
}


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
    """One row for each of `classes` from two label maps (d, h, w) on one grid; other labels count as background.

    `status` is ok, absent (in neither map), missed (in the truth alone) or spurious (in the prediction alone).
    Absent: nan. Missed, spurious: Dice and NSD 0, distances inf. Otherwise Dice and NSD lie in [0, 1], distances in mm:
    hd and hd95 are the largest and the 95th percentile (Huttenlocher et al., 1993), msd_* the directed means, assd the
    mean over the elements of both surfaces, masd the mean of the two directed means, nsd the share of both surfaces
    within `tolerance` mm of the other, one number or one for each class (Nikolov et al., arXiv:1809.04430).

    Voxels where `ignore` is true count in no volume and bear no surface; a class left without one has nan distances.
    """
    names = (
        dict(classes) if isinstance(classes, Mapping) else {label: str(label) for label in classes}
    )
    tolerances = {
        label: tolerance.get(label, nan) if isinstance(tolerance, Mapping) else tolerance
        for label in names
    }
    voxel = np.asarray(spacing, np.float64)
    check(prediction, truth, ignore, voxel, tolerances)
    refuse(
        definition not in DEFINITIONS,
        f"definition must be one of {', '.join(DEFINITIONS)}, got {definition}",
    )
    prediction, truth = cut_out(prediction, truth, ignore)
    chosen, nearest, millilitres = (
        DEFINITIONS[definition],
        Nearest(truth.shape, voxel),
        float(voxel.prod()) / 1000,
    )
    predicted, true = (chosen.surface(labels, voxel) for labels in (prediction, truth))
    rows = []
    for label, (in_prediction, in_truth, in_both) in zip(
        names, count_voxels(prediction, truth, list(names))
    ):
        status = STATUSES[2 * (not in_truth) + (not in_prediction)]
        if status == "ok":
            scores = {"dice": 2 * in_both / (in_prediction + in_truth)}
            scores |= surface_scores(
                predicted.of(label), true.of(label), nearest, chosen, tolerances[label]
            )
        else:
            scores = {**WHEN_EMPTY[status], **chosen.when_empty.get(status, {})}
        volumes = {
            "volume_truth_ml": in_truth * millilitres,
            "volume_prediction_ml": in_prediction * millilitres,
        }
        rows.append({"class": label, "name": names[label], "status": status, **scores, **volumes})
    return rows


def surface_scores(
    predicted: Surface, true: Surface, nearest: Nearest, chosen: Definition, tolerance: float
) -> Row:
    """Distances in mm and NSD of one class; nan where one of the two surfaces is wholly ignored."""
    if not len(predicted.at) or not len(true.at):
        return dict.fromkeys((*DISTANCES, "nsd"), nan)
    forth, back = (nearest(predicted, true), predicted.area), (nearest(true, predicted), true.area)
    both = mm, area = np.concatenate([forth[0], back[0]]), np.concatenate([forth[1], back[1]])
    to_truth, to_prediction, pooled = (
        float(np.average(d, weights=w)) for d, w in (forth, back, both)
    )
    return {
        "hd": float(mm.max()),
        "hd95": max(
            chosen.percentile(95, *way) for way in ([both] if chosen.pooled else [forth, back])
        ),
        "assd": pooled,
        "masd": (to_truth + to_prediction) / 2,
        "msd_prediction_to_truth": to_truth,
        "msd_truth_to_prediction": to_prediction,
        "nsd": float(area[mm <= tolerance + SLACK].sum() / area.sum()),
    }


def count_voxels(prediction: Labels, truth: Labels, classes: list[int]) -> list[list[int]]:
    """Voxels of each class in the prediction, in the truth and in both."""
    predicted, true = (labels[(prediction | truth) != 0] for labels in (prediction, truth))
    sets = (predicted, true, true[predicted == true])
    return np.stack(
        [np.bincount(each, minlength=max(classes) + 1)[classes] for each in sets], axis=1
    ).tolist()


def cut_out(prediction: Labels, truth: Labels, ignore: Mask | None) -> tuple[Labels, Labels]:
    """Both maps cut to what is not background in either, with a margin, in one small unsigned type.

    Its largest value is no label but marks what is ignored. Making that background in both maps would cut both
    surfaces along one plane, where every element then is a perfect match.
    """
    some = (prediction != 0) | (truth != 0) | (False if ignore is None else ignore)
    along = [np.flatnonzero(some.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(each[0], each[-1] + 1) if len(each) else slice(0) for each in along)
    pair = np.stack([prediction[box], truth[box]])
    hidden = slice(0) if ignore is None else ignore[box]
    pair[:, hidden] = 0
    low, high = int(pair.min(initial=0)), int(pair.max(initial=0))
    refuse(
        low < 0 or high > LARGEST_LABEL,
        f"labels must lie in 0 to {LARGEST_LABEL}, found {low} to {high}",
    )
    pair = pair.astype(np.min_scalar_type(high + 1))
    pair[:, hidden] = np.iinfo(pair.dtype).max
    return np.pad(pair[0], MARGIN), np.pad(pair[1], MARGIN)


def check(
    prediction: Labels,
    truth: Labels,
    ignore: Mask | None,
    voxel: Floats,
    tolerances: dict[int, float],
) -> None:
    """Raises one line on the first thing that is wrong."""
    shapes, types = f"{prediction.shape} and {truth.shape}", f"{prediction.dtype} and {truth.dtype}"
    refuse(
        prediction.ndim != 3 or truth.ndim != 3,
        f"prediction and truth must be 3D (d, h, w), got {shapes}",
    )
    refuse(
        prediction.shape != truth.shape, f"prediction and truth lie on different grids: {shapes}"
    )
    refuse(
        not {prediction.dtype.kind, truth.dtype.kind} <= set("biu"),
        f"labels must be integers, got {types}",
    )
    fits = ignore is None or (ignore.shape == truth.shape and ignore.dtype == bool)
    refuse(not fits, f"ignore must be a boolean array of shape {truth.shape}")
    valid = voxel.shape == (3,) and 0 < voxel.min() <= voxel.max() < inf
    refuse(not valid, f"spacing must be three positive numbers in mm, got {voxel.tolist()}")
    inside = tolerances and 1 <= min(tolerances) <= max(tolerances) <= LARGEST_LABEL
    refuse(
        not inside,
        f"classes must be 1 to {LARGEST_LABEL} (0 is the background), got {list(tolerances)}",
    )
    refuse(
        not all(t >= 0 for t in tolerances.values()),
        f"every class needs a tolerance of 0 mm or more: {tolerances}",
    )


def refuse(wrong: object, message: str) -> None:
    """Raises `message` if something is wrong."""
    if wrong:
        raise ValueError(message)


def aggregate(
    rows: Iterable[Row],
    *,
    policy: Policy = "exclude",
    diagonal_mm: float | Sequence[float] | None = None,
) -> dict[str, Any]:
    """Averages over the rows of any number of cases: policy, classes, overall, mean_of_classes and mean_of_cases.

    `exclude` takes what is finite: a missed class counts with its Dice of 0, and in no distance. `diagonal` puts
    `diagonal_mm`, one number or one a row, for the distances of what is missed or spurious. Each class and `overall`,
    which takes all rows alike, have the number of rows by `status` and for each metric mean, median, sample std, `n`
    values averaged and `left_out`; nan over nothing. `mean_of_classes` and `mean_of_cases` average those means instead.
    """
    refuse(
        policy not in ("exclude", "diagonal"), f"policy must be exclude or diagonal, got {policy}"
    )
    rows = list(rows) if policy == "exclude" else penalised(list(rows), diagonal_mm)
    names = {row["class"]: row["name"] for row in rows}
    by_class, by_case = summaries(rows, "class"), summaries(rows, "case")
    return {
        "policy": policy,
        "classes": {label: {"name": names[label], **scores} for label, scores in by_class.items()},
        "overall": summary(rows),
        "mean_of_classes": {
            m: spread([scores[m]["mean"] for scores in by_class.values()]) for m in METRICS
        },
        "mean_of_cases": {
            m: spread([scores[m]["mean"] for scores in by_case.values()]) for m in METRICS
        },
    }


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length in mm of the diagonal of a volume of `shape` voxels: no distance within it is longer."""
    return hypot(*(n * mm for n, mm in zip(shape, spacing)))


def penalised(rows: Sequence[Row], diagonal_mm: float | Sequence[float] | None) -> list[Row]:
    """The rows, with a diagonal for the distances wherever one of the two masks is empty."""
    lengths = (
        list(diagonal_mm) if isinstance(diagonal_mm, Iterable) else [diagonal_mm or nan] * len(rows)
    )
    fits = len(lengths) == len(rows) and all(0 < mm < inf for mm in lengths)
    refuse(
        not fits,
        "policy diagonal needs diagonal_mm: one positive length in mm, or one for each row",
    )
    empty = ("missed", "spurious")
    return [
        {**r, **dict.fromkeys(DISTANCES, mm)} if r["status"] in empty else r
        for r, mm in zip(rows, lengths)
    ]


def summaries(rows: Sequence[Row], key: str) -> dict[Any, dict[str, Any]]:
    """A summary for every value of `key`, over the rows that have it."""
    values = dict.fromkeys(row[key] for row in rows if key in row)
    return {value: summary([row for row in rows if row.get(key) == value]) for value in values}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows have which status, and every metric's spread."""
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    return {
        "status": counts,
        **{metric: spread([row[metric] for row in rows]) for metric in METRICS},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, sample standard deviation and number of the finite values; the number of the others."""
    finite = [value for value in values if isfinite(value)]
    mean, middle = (fmean(finite), median(finite)) if finite else (nan, nan)
    std = stdev(finite) if len(finite) > 1 else nan
    return {
        "mean": mean,
        "median": middle,
        "std": std,
        "n": len(finite),
        "left_out": len(values) - len(finite),
    }
