"""Scores against the packages whose definitions they claim to follow, where these are installed."""

from time import perf_counter

import numpy as np
import pytest
from scipy import ndimage

from dae.evaluation.metrics import score_labels, surfel_triangles

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on each other's versions

CLASSES = [1, 2, 3, 4]
TOLERANCE = 1.1


def scene(seed, shape=(26, 31, 23)):
    """Two maps of four classes that are cut out of smooth noise, with specks, and a spacing."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    other = smooth + 0.4 * smooth.std() * ndimage.gaussian_filter(rng.normal(size=shape), 1.0) / 0.2
    truth, prediction = (
        np.digitize(each / smooth.std(), [0.0, 0.5, 1.0, 1.5]).astype(np.int16)
        for each in (smooth, other)
    )
    specks = rng.random(shape) < 0.002
    prediction[specks] = rng.integers(0, 5, specks.sum())
    return prediction, truth, tuple(rng.uniform(0.6, 3.5, 3).tolist())


def scores(prediction, truth, mm, definition):
    rows = score_labels(prediction, truth, mm, CLASSES, tolerance=TOLERANCE, definition=definition)
    assert {row["status"] for row in rows} == {"ok"}
    return rows


def compare(rows, expected, rel):
    """`expected` maps a key of a row to one value a class."""
    for key, values in expected.items():
        assert [row[key] for row in rows] == pytest.approx(
            [float(v) for v in values], rel=rel, abs=rel, nan_ok=True
        ), key


def by_monai(prediction, truth, mm):
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    p, t = (
        torch.from_numpy(np.stack([labels == k for k in range(5)])[None]).float()
        for labels in (prediction, truth)
    )

    def run(metric, a=p, b=t, **spacing):
        return metric(a, b, **spacing)[0].tolist()

    directed = monai.SurfaceDistanceMetric(include_background=False)
    return {
        "dice": run(monai.DiceMetric(include_background=False)),
        "hd": run(monai.HausdorffDistanceMetric(include_background=False), spacing=mm),
        "hd95": run(
            monai.HausdorffDistanceMetric(include_background=False, percentile=95), spacing=mm
        ),
        "assd": run(
            monai.SurfaceDistanceMetric(include_background=False, symmetric=True), spacing=mm
        ),
        "msd_prediction_to_truth": run(directed, spacing=mm),
        "msd_truth_to_prediction": run(directed, t, p, spacing=mm),
        "nsd": run(monai.SurfaceDiceMetric([TOLERANCE] * 4, include_background=False), spacing=mm),
    }


def by_medpy(prediction, truth, mm):
    medpy = pytest.importorskip("medpy.metric.binary")
    pairs = [(prediction == label, truth == label) for label in CLASSES]
    return {
        "dice": [medpy.dc(p, t) for p, t in pairs],
        "hd": [medpy.hd(p, t, mm) for p, t in pairs],
        "hd95": [medpy.hd95(p, t, mm) for p, t in pairs],
        "assd": [medpy.assd(p, t, mm) for p, t in pairs],
        "msd_prediction_to_truth": [medpy.asd(p, t, mm) for p, t in pairs],
        "msd_truth_to_prediction": [medpy.asd(t, p, mm) for p, t in pairs],
    }


def by_surface_distance(prediction, truth, mm):
    package = pytest.importorskip("surface_distance")
    pairs = [(truth == label, prediction == label) for label in CLASSES]
    found = [package.compute_surface_distances(t, p, mm) for t, p in pairs]
    means = [package.compute_average_surface_distance(each) for each in found]
    return {
        "dice": [package.compute_dice_coefficient(t, p) for t, p in pairs],
        "hd": [package.compute_robust_hausdorff(each, 100) for each in found],
        "hd95": [package.compute_robust_hausdorff(each, 95) for each in found],
        "masd": [sum(both) / 2 for both in means],
        "msd_truth_to_prediction": [from_truth for from_truth, _ in means],
        "msd_prediction_to_truth": [to_truth for _, to_truth in means],
        "nsd": [package.compute_surface_dice_at_tolerance(each, TOLERANCE) for each in found],
    }


@pytest.mark.parametrize("seed", range(8))
def test_the_default_and_monai_agree(seed):
    """MONAI measures in float32."""
    prediction, truth, mm = scene(seed)
    expected = by_monai(prediction, truth, mm)
    compare(scores(prediction, truth, mm, "default"), expected, rel=1e-5)
    compare(scores(prediction, truth, mm, "monai"), expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_pooled_definition_is_that_of_medpy(seed):
    prediction, truth, mm = scene(seed)
    compare(scores(prediction, truth, mm, "medpy"), by_medpy(prediction, truth, mm), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_surface_elements_score_as_in_surface_distance(seed):
    prediction, truth, mm = scene(seed)
    compare(
        scores(prediction, truth, mm, "surface-distance"),
        by_surface_distance(prediction, truth, mm),
        rel=1e-9,
    )


@pytest.mark.parametrize("mm", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0), (0.7, 1.3, 2.9)])
def test_every_pattern_has_the_area_of_surface_distance(mm):
    tables = pytest.importorskip("surface_distance.lookup_tables")
    areas = np.linalg.norm(surfel_triangles() * (np.prod(mm) / np.array(mm)), axis=-1).sum(1)
    assert areas == pytest.approx(
        np.array(tables.create_table_neighbour_code_to_surface_area(mm)), abs=1e-12
    )


def test_the_monai_definition_answers_as_monai_where_a_mask_is_empty():
    prediction, truth, mm = scene(0)
    prediction[prediction == 1] = 0  # missed
    truth[truth == 2] = 0  # spurious
    prediction[prediction == 3], truth[truth == 3] = 0, 0  # absent
    rows = score_labels(prediction, truth, mm, CLASSES, tolerance=TOLERANCE, definition="monai")
    assert [row["status"] for row in rows] == ["missed", "spurious", "absent", "ok"]
    compare(rows, by_monai(prediction, truth, mm), rel=1e-5)


@pytest.mark.slow
def test_thirteen_organs_take_a_fiftieth_of_the_time_of_monai():
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    one_hot = pytest.importorskip("monai.networks.utils").one_hot
    prediction, truth, mm = organs(1), organs(0), (1.5, 1.5, 2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = perf_counter()
        maps = [one_hot(torch.from_numpy(labels)[None, None], 14) for labels in (prediction, truth)]
        monai.DiceMetric(include_background=False)(*maps)
        hd95 = monai.HausdorffDistanceMetric(include_background=False, percentile=95)(
            *maps, spacing=mm
        )[0]
        assd = monai.SurfaceDistanceMetric(include_background=False, symmetric=True)(
            *maps, spacing=mm
        )[0]
        theirs = perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    times = []
    for _ in range(5):
        start = perf_counter()
        rows = score_labels(prediction, truth, mm, range(1, 14))
        times.append(perf_counter() - start)
    compare(rows, {"hd95": hd95, "assd": assd}, rel=1e-4)
    print(f"\nMONAI {theirs:.2f} s, here {min(times):.3f} s: {theirs / min(times):.0f} times")
    assert min(times) <= theirs / 50


def organs(seed, shape=(256, 256, 128)):
    """Thirteen ellipsoids at places that do not depend on the seed, with borders that do."""
    rng, grid = np.random.default_rng(42), np.ogrid[tuple(slice(n) for n in shape)]
    noise = ndimage.zoom(
        np.random.default_rng(seed).normal(size=[n // 8 for n in shape]), 8, order=1
    )
    labels = np.zeros(shape, np.uint8)
    for label in range(1, 14):
        axes = np.exp(rng.uniform(np.log(5), np.log(40), 3))
        centre = [rng.uniform(r, n - r) for r, n in zip(axes, shape)]
        labels[sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, axes)) + 0.1 * noise < 1] = (
            label
        )
    return labels
