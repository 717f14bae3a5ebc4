"""Scores against the packages whose definitions they claim to follow, where these are installed."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from dae.config.evaluate import DefinitionName
from dae.evaluation.metrics import Labels, Row, score_labels

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on each other's versions

Spacing = tuple[float, float, float]
Expected = dict[str, Sequence[float]]  # one value a class by the key of a row

CLASSES = [1, 2, 3, 4]
TOLERANCE = 1.1

any_scene = pytest.mark.parametrize("seed", range(8))


def scene(seed: int) -> tuple[Labels, Labels, Spacing]:
    """Two maps of four classes that are cut out of smooth noise, with specks, and a spacing."""
    shape = (26, 31, 23)
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    finer = ndimage.gaussian_filter(rng.normal(size=shape), 1.0)
    other = smooth + 0.4 * smooth.std() * finer / 0.2

    levels = [0.0, 0.5, 1.0, 1.5]
    truth = np.digitize(smooth / smooth.std(), levels).astype(np.int16)
    prediction = np.digitize(other / smooth.std(), levels).astype(np.int16)
    specks = rng.random(shape) < 0.002
    prediction[specks] = rng.integers(0, 5, specks.sum())
    a, b, c = rng.uniform(0.6, 3.5, 3).tolist()
    return prediction, truth, (a, b, c)


def scores(prediction: Labels, truth: Labels, mm: Spacing, definition: DefinitionName) -> list[Row]:
    rows = score_labels(prediction, truth, mm, CLASSES, tolerance=TOLERANCE, definition=definition)
    assert {row["status"] for row in rows} == {"ok"}
    return rows


def compare(rows: list[Row], expected: Expected, rel: float) -> None:
    for key, values in expected.items():
        theirs = [float(value) for value in values]
        ours = [row[key] for row in rows]
        assert ours == pytest.approx(theirs, rel=rel, abs=rel, nan_ok=True), key


def by_monai(prediction: Labels, truth: Labels, mm: Spacing) -> Expected:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")

    def one_hot(labels: Labels) -> Any:
        return torch.from_numpy(np.stack([labels == k for k in range(5)])[None]).float()

    p = one_hot(prediction)
    t = one_hot(truth)
    dice = monai.DiceMetric(include_background=False)
    hd = monai.HausdorffDistanceMetric(include_background=False)
    hd95 = monai.HausdorffDistanceMetric(include_background=False, percentile=95)
    directed = monai.SurfaceDistanceMetric(include_background=False)
    symmetric = monai.SurfaceDistanceMetric(include_background=False, symmetric=True)
    nsd = monai.SurfaceDiceMetric([TOLERANCE] * 4, include_background=False)
    return {
        "dice": dice(p, t)[0].tolist(),
        "hd": hd(p, t, spacing=mm)[0].tolist(),
        "hd95": hd95(p, t, spacing=mm)[0].tolist(),
        "msd": symmetric(p, t, spacing=mm)[0].tolist(),
        "assd": symmetric(p, t, spacing=mm)[0].tolist(),
        "msd_prediction_to_truth": directed(p, t, spacing=mm)[0].tolist(),
        "msd_truth_to_prediction": directed(t, p, spacing=mm)[0].tolist(),
        "nsd": nsd(p, t, spacing=mm)[0].tolist(),
    }


def by_medpy(prediction: Labels, truth: Labels, mm: Spacing) -> Expected:
    medpy = pytest.importorskip("medpy.metric.binary")
    pairs = [(prediction == label, truth == label) for label in CLASSES]
    return {
        "dice": [medpy.dc(p, t) for p, t in pairs],
        "hd": [medpy.hd(p, t, mm) for p, t in pairs],
        "hd95": [medpy.hd95(p, t, mm) for p, t in pairs],
        "msd": [medpy.assd(p, t, mm) for p, t in pairs],
        "assd": [medpy.assd(p, t, mm) for p, t in pairs],
        "msd_prediction_to_truth": [medpy.asd(p, t, mm) for p, t in pairs],
        "msd_truth_to_prediction": [medpy.asd(t, p, mm) for p, t in pairs],
    }


@any_scene
def test_the_default_and_monai_agree(seed: int) -> None:
    """MONAI measures in float32."""
    prediction, truth, mm = scene(seed)
    expected = by_monai(prediction, truth, mm)
    compare(scores(prediction, truth, mm, "default"), expected, rel=1e-5)
    compare(scores(prediction, truth, mm, "monai"), expected, rel=1e-5)


@any_scene
def test_the_pooled_definition_is_that_of_medpy(seed: int) -> None:
    prediction, truth, mm = scene(seed)
    compare(scores(prediction, truth, mm, "medpy"), by_medpy(prediction, truth, mm), rel=1e-12)


def test_the_monai_definition_answers_as_monai_where_a_mask_is_empty() -> None:
    prediction, truth, mm = scene(0)
    prediction[prediction == 1] = 0  # missed
    truth[truth == 2] = 0  # spurious
    prediction[prediction == 3] = 0  # absent
    truth[truth == 3] = 0
    rows = score_labels(prediction, truth, mm, CLASSES, tolerance=TOLERANCE, definition="monai")
    assert [row["status"] for row in rows] == ["missed", "spurious", "absent", "ok"]
    compare(rows, by_monai(prediction, truth, mm), rel=1e-5)


@pytest.mark.slow
def test_thirteen_organs_take_a_fiftieth_of_the_time_of_monai() -> None:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    one_hot = pytest.importorskip("monai.networks.utils").one_hot
    prediction = organs(1)
    truth = organs(0)
    mm = (1.5, 1.5, 2.0)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = perf_counter()
        p = one_hot(torch.from_numpy(prediction)[None, None], 14)
        t = one_hot(torch.from_numpy(truth)[None, None], 14)
        monai.DiceMetric(include_background=False)(p, t)
        hd95 = monai.HausdorffDistanceMetric(include_background=False, percentile=95)
        assd = monai.SurfaceDistanceMetric(include_background=False, symmetric=True)
        expected = {"hd95": hd95(p, t, spacing=mm)[0], "assd": assd(p, t, spacing=mm)[0]}
        theirs = perf_counter() - start
    finally:
        torch.set_num_threads(threads)

    times = []
    for _ in range(5):
        start = perf_counter()
        rows = score_labels(prediction, truth, mm, range(1, 14))
        times.append(perf_counter() - start)
    compare(rows, expected, rel=1e-4)
    print(f"\nMONAI {theirs:.2f} s, here {min(times):.3f} s: {theirs / min(times):.0f} times")
    assert min(times) <= theirs / 50


def organs(seed: int) -> Labels:
    """Thirteen ellipsoids at places that do not depend on the seed, with borders that do."""
    shape = (256, 256, 128)
    rng = np.random.default_rng(42)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    coarse = np.random.default_rng(seed).normal(size=[n // 8 for n in shape])
    noise = ndimage.zoom(coarse, 8, order=1)

    labels = np.zeros(shape, np.uint8)
    for label in range(1, 14):
        radii = np.exp(rng.uniform(np.log(5), np.log(40), 3))
        centre = [rng.uniform(r, n - r) for r, n in zip(radii, shape)]
        squares = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii))
        labels[squares + 0.1 * noise < 1] = label
    return labels
