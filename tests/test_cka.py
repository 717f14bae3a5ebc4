"""dae/evaluation/cka.py: CKA by its definition, what leaves it as it is, and minibatches."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from dae.config.evaluate import CkaConfig
from dae.evaluation import cka
from dae.evaluation.cka import (
    OverCrops,
    OverPositions,
    PositionSums,
    as_markdown,
    cka_of_stages,
    gram,
    hsic,
    minibatch_sizes,
    terms_of,
)


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of features (n, 3) and (n, 5), of which the second is partly made of the first."""
    x = normal(n, 3, seed=seed)
    return x, x @ normal(3, 5, seed=seed + 1) + normal(n, 5, seed=seed + 2) + 4


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=9)).Q


def by_definition(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """HSIC as a mean over all ordered choices of four different examples (Song et al. 2012)."""
    total = 0.0
    count = 0
    for i, j, q, r in permutations(range(len(k)), 4):
        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
        count += 1
    return total / count


def over_crops(x: Tensor, y: Tensor, minibatch: int) -> float:
    result = OverCrops(len(x), minibatch)
    for crop_of_x, crop_of_y in zip(x, y):
        result.add(crop_of_x, crop_of_y)
    return result.cka()


def over_positions(x: Tensor, y: Tensor) -> float:
    result = OverPositions()
    for crop_of_x, crop_of_y in zip(x, y):
        result.add(crop_of_x, crop_of_y)
    return result.cka()


# --- against the definition


@pytest.mark.parametrize("n", [4, 5, 7])
def test_the_terms_are_means_over_all_fours_of_different_examples(n: int) -> None:
    x, y = related(n)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    wanted = (by_definition(k, l), by_definition(k, k), by_definition(l, l))
    assert terms_of(x, y) == pytest.approx(wanted)
    assert terms_of(x, y).cka() == pytest.approx(wanted[0] / math.sqrt(wanted[1] * wanted[2]))


def test_the_mean_over_all_minibatches_of_a_size_is_that_of_all_examples_at_once() -> None:
    x, y = related(8)
    for size in (4, 5, 7):
        values = []
        for chosen in combinations(range(8), size):
            rows = list(chosen)
            values.append(hsic(gram(x[rows]), gram(y[rows])))
        assert np.mean(values) == pytest.approx(hsic(gram(x), gram(y)))


@pytest.mark.parametrize("n", [4, 9, 40])
def test_sums_over_positions_give_what_gram_matrices_give(n: int) -> None:
    x, y = related(n)
    sums = PositionSums()
    sums.add(x[:3], y[:3])
    sums.add(x[3:], y[3:])
    assert sums.hsic() == pytest.approx(hsic(gram(x), gram(y)))


def test_gram_matrices_are_float64_and_do_not_depend_on_how_the_features_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = normal(5, 2, 3, 4, seed=0).float() + 1000
    rows = x.numpy().astype(np.float64).reshape(5, -1)
    np.testing.assert_allclose(gram(x), rows @ rows.T, rtol=1e-14)
    monkeypatch.setattr(cka, "CHUNK", 7)
    np.testing.assert_allclose(gram(x), rows @ rows.T, rtol=1e-14)


# --- what leaves it as it is


@pytest.mark.parametrize("minibatch", [4, 5, 12])
def test_rotated_scaled_and_shifted_features_are_the_same_features(minibatch: int) -> None:
    x = normal(12, 6, 2, 2, 2, seed=0)
    changed = 3 * torch.einsum("n c d h w, c e -> n e d h w", x, rotation(6)) + 7
    for y in (x, changed):
        assert over_crops(x, y, minibatch) == pytest.approx(1)
        assert over_positions(x, y) == pytest.approx(1)

    # Another basis that is no rotation is another set of features.
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])[:, None, None, None]
    assert over_crops(x, stretched, minibatch) < 0.97
    assert over_positions(x, stretched) < 0.97


def test_a_large_constant_costs_positions_no_digits() -> None:
    x = normal(6, 3, 2, 2, 2, seed=0)
    y = x + normal(6, 3, 2, 2, 2, seed=1)
    assert over_positions(x + 1e6, y - 1e6) == pytest.approx(over_positions(x, y), rel=1e-6)


def test_positions_that_change_places_in_all_crops_matter_to_positions_alone() -> None:
    x = normal(16, 2, 2, 2, 2, seed=1)
    assert over_crops(x, x.flip(2), 16) == pytest.approx(1)
    assert abs(over_positions(x, x.flip(2))) < 0.2


def test_the_order_of_both_sides_does_not_matter() -> None:
    x, y = related(12)
    assert terms_of(x, y).cka() == pytest.approx(terms_of(y, x).cka())


# --- minibatches


def test_minibatches_have_at_least_the_size_asked_for_and_hold_every_crop_once() -> None:
    assert minibatch_sizes(64, 32) == [32, 32]
    assert minibatch_sizes(70, 32) == [35, 35]
    assert minibatch_sizes(5, 4) == [5]
    for crops in range(4, 60):
        for at_least in (4, 7, 32):
            sizes = minibatch_sizes(crops, at_least)
            assert sum(sizes) == crops
            assert min(sizes) >= min(crops, at_least) and max(sizes) - min(sizes) <= 1


def test_the_terms_have_one_expectation_whatever_the_size_of_the_minibatch() -> None:
    """With the biased terms four examples would have a much larger one than sixteen."""
    means = {}
    errors = {}
    for size in (4, 16):
        values = []
        for n in range(400):
            x, y = related(size, seed=10 * n)
            y = x @ normal(3, 5, seed=0) + normal(size, 5, seed=10 * n + 2)  # one relation for all
            values.append(terms_of(x, y).both)
        means[size] = np.mean(values)
        errors[size] = np.std(values) / math.sqrt(len(values))
    assert abs(means[4] - means[16]) < 3 * math.hypot(errors[4], errors[16])
    assert errors[4] < 0.15 * means[4]


def test_unrelated_features_are_near_0_where_the_usual_estimate_is_near_1() -> None:
    x = normal(10, 5000, seed=0)
    y = normal(10, 5000, seed=1)
    centred_x = x - x.mean(dim=0)
    centred_y = y - y.mean(dim=0)
    both = (centred_x @ centred_x.T * (centred_y @ centred_y.T)).sum()
    usual = both / (centred_x @ centred_x.T).norm() / (centred_y @ centred_y.T).norm()
    assert usual > 0.95

    values = []
    for n in range(40):
        values.append(
            over_crops(
                normal(12, 4, 5, 5, 5, seed=2 * n), normal(12, 4, 5, 5, 5, seed=2 * n + 1), 6
            )
        )
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)


def test_more_crops_than_a_minibatch_are_summed_before_the_ratio_is_taken() -> None:
    x, y = related(9)
    first = terms_of(x[:4], y[:4])
    second = terms_of(x[4:], y[4:])
    both, of_x, of_y = (a + b for a, b in zip(first, second))
    assert over_crops(x, y, 4) == pytest.approx(both / math.sqrt(of_x * of_y))


def test_features_that_are_the_same_for_all_examples_have_none() -> None:
    x = normal(8, 3, 1, 1, 1, seed=0)
    for constant in (torch.ones_like(x), torch.zeros_like(x)):
        assert math.isnan(over_crops(x, constant, 8))
        assert math.isnan(over_positions(x, constant))


# --- the table


def test_the_table_has_a_line_for_each_stage() -> None:
    config = CkaConfig(crops=4, seed=3)
    pairs = []
    for n in range(4):
        tokens = normal(2, 4, 4, 6, seed=n)
        bottleneck = normal(4, 2, 2, 3, seed=10 + n)
        pairs.append(((tokens, bottleneck), (tokens, normal(4, 2, 2, 3, seed=20 + n))))
    rows = cka_of_stages(pairs, config)
    assert [row["stage"] for row in rows] == [1, 2]
    assert rows[0]["cka"] == pytest.approx(1) and abs(rows[1]["cka"]) < 0.9
    assert rows[1] | {"cka": 0} == {
        "stage": 2,
        "channels": 4,
        "grid": "2 2 3",
        "cka": 0,
        "examples": "crops",
        "crops": 4,
        "seed": 3,
    }
    lines = as_markdown(rows).splitlines()
    assert lines[2].split() == ["|", "1", "|", "2", "|", "4", "4", "6", "|", "1.000", "|"]
    assert lines[-1] == "Examples are crops, of 4 crops."
