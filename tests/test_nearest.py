"""dae/evaluation/nearest.py against a plain KD-tree, and against all pairs."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from dae.evaluation import nearest
from dae.evaluation.nearest import nearest_distances

Array = NDArray[np.int64]
Spacing = tuple[float, float, float]

# Squares of these have few binary digits, so that equal lengths are equal to the last bit.
EXACT = [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0), (0.5, 0.75, 5.0), (1.25, 1.25, 0.25)]


def by_kd_tree(points: Array, others: Array, spacing: Spacing) -> NDArray[np.float64]:
    """What `nearest_distances` could be replaced by."""
    mm = np.array(spacing)
    distances, _ = cKDTree(others * mm).query(points * mm)
    return distances


def by_all_pairs(points: Array, others: Array, spacing: Spacing) -> NDArray[np.float64]:
    steps = points[:, None] - others
    return np.linalg.norm(steps * np.array(spacing), axis=-1).min(axis=1)


def random_voxels(seed: int, shape: tuple[int, int, int], share: float) -> Array:
    voxels = np.argwhere(np.random.default_rng(seed).random(shape) < share)
    return voxels if len(voxels) else np.array([[0, 0, 0]])


def found(points: Array, others: Array, spacing: Spacing) -> NDArray[np.float64]:
    return nearest_distances(points, others, np.array(spacing))


@pytest.mark.parametrize("spacing", EXACT)
@pytest.mark.parametrize("share", [0.5, 0.05, 0.002])
def test_distances_are_exactly_those_of_a_kd_tree(share: float, spacing: Spacing) -> None:
    """From crowds, where nearly all are looked up, to a few voxels that are far from each other."""
    for seed in range(5):
        points = random_voxels(seed, (20, 17, 23), share)
        others = random_voxels(100 + seed, (20, 17, 23), share)
        assert (found(points, others, spacing) == by_kd_tree(points, others, spacing)).all()


@pytest.mark.parametrize("spacing", EXACT)
def test_thin_shapes_and_single_voxels_too(spacing: Spacing) -> None:
    sheet = random_voxels(0, (1, 30, 30), 0.5)
    line = random_voxels(1, (1, 1, 60), 0.7) + np.array([4, 2, 0])
    one = np.array([[7, 9, 11]])
    far = np.array([[0, 0, 500]])
    shapes = (sheet, line, one, far)
    for points in shapes:
        for others in shapes:
            assert (found(points, others, spacing) == by_kd_tree(points, others, spacing)).all()


@pytest.mark.parametrize("seed", range(20))
def test_any_spacing_gives_the_least_of_all_distances(seed: int) -> None:
    """To the last bits: of two ways of one length, either may be a rounding shorter."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.uniform(0.3, 6.0, 3)
    points = random_voxels(seed, (9, 12, 10), rng.uniform(0.01, 0.3))
    others = random_voxels(100 + seed, (9, 12, 10), rng.uniform(0.01, 0.3))
    expected = by_all_pairs(points, others, (a, b, c))
    assert found(points, others, (a, b, c)) == pytest.approx(expected, rel=1e-15)


def test_what_is_near_needs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = nearest.search

    def counting(points: Array, others: Array, spacing: NDArray[np.float64]) -> object:
        searched.append(len(points))
        return search(points, others, spacing)

    monkeypatch.setattr(nearest, "search", counting)
    sheet = random_voxels(0, (1, 30, 30), 1.0)
    shifted = sheet + np.array([2, 0, 0])
    assert found(sheet, shifted, (1.0, 1.0, 1.0)).tolist() == [2.0] * 900
    assert searched == []

    beside = np.concatenate([sheet, [[9, 9, 9]]])
    assert found(beside, sheet, (1.0, 1.0, 1.0))[-1] == 9.0
    assert searched == [1]


def test_a_short_step_along_a_fine_axis_is_not_overlooked() -> None:
    """Three voxels of 0.1 mm, which are not looked at, are nearer than one of 5 mm, which is."""
    others = np.array([[0, 0, 3], [1, 0, 0]])
    assert found(np.array([[0, 0, 0]]), others, (5.0, 5.0, 0.1)) == pytest.approx([0.3])


def test_voxels_below_zero_are_as_good() -> None:
    points = random_voxels(3, (9, 9, 9), 0.2)
    others = random_voxels(4, (9, 9, 9), 0.2)
    moved = found(points - 20, others - 20, (1.0, 2.0, 3.0))
    assert (moved == found(points, others, (1.0, 2.0, 3.0))).all()
