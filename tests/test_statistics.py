"""dae/evaluation/statistics.py against SciPy and numbers worked out by hand, without a warning."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dae.errors import InputError
from dae.evaluation.metrics import DEFINITIONS, DISTANCES, METRICS, STATUSES, Row, score_labels
from dae.evaluation.statistics import (
    OVERALL,
    P_VALUES,
    SURFACES,
    Interval,
    aggregate,
    bootstrap_shares,
    case_means,
    compare,
    fold_table,
    holm,
    mean_interval,
    share_better,
    sign_flip_p,
    summarise,
    worst_cases,
)
from tests.test_metrics import ISO, NOTHING, box

pytestmark = pytest.mark.filterwarnings("error")

Table = Mapping[int, Sequence[float]]  # for each class a number for each case


def row(
    case: str, cls: int, dice: float, hd95: float = 1.0, status: str = "ok", **others: Any
) -> Row:
    """A row of scores; the other distances are those of hd95."""
    scores = {"dice": dice, **dict.fromkeys(DISTANCES, hd95), "nsd": dice, **others}
    return {"case": case, "class": cls, "name": f"organ {cls}", "status": status, **scores}


def rows_of(dice: Table, hd95: Table | None = None) -> list[Row]:
    """Rows of the cases s0, s1, ..."""
    rows = []
    for cls, values in dice.items():
        for n, value in enumerate(values):
            mm = hd95[cls][n] if hd95 else 1.0
            rows.append(row(f"s{n}", cls, value, mm))
    return rows


def found(lines: Sequence[Row], metric: str, cls: int | str) -> Row:
    (line,) = [line for line in lines if (line["metric"], line["class"]) == (metric, cls)]
    return line


def bounds_of(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def bounds(line: Row) -> tuple[float, float]:
    return line["low"], line["high"]


RNG = np.random.default_rng(7)
A: Table = {cls: RNG.uniform(0.5, 0.9, 12).tolist() for cls in (1, 2, 3)}
B: Table = {
    cls: (np.array(values) + RNG.normal(0.02 * cls, 0.03, 12)).tolist() for cls, values in A.items()
}


# --- averages


def case(name: str, spleen: tuple[Any, Any], liver: tuple[Any, Any]) -> list[Row]:
    """Rows of two classes in one case, each from its prediction and its truth."""
    prediction = np.where(spleen[0], 1, 2 * liver[0])
    truth = np.where(spleen[1], 1, 2 * liver[1])
    rows = score_labels(prediction, truth, ISO, {1: "spleen", 2: "liver"})
    return [{"case": name, **scores} for scores in rows]


HERE = box((1, 5, 5), (6, 15, 15))
SHIFTED = box((3, 5, 5), (8, 15, 15))
THERE = box(17, 22)
COHORT = [
    *case("a", (HERE, HERE), (THERE, THERE)),
    *case("b", (SHIFTED, HERE), (NOTHING, THERE)),
    *case("c", (HERE, NOTHING), (NOTHING, NOTHING)),
]


def test_excluding_says_what_it_left_out() -> None:
    result = aggregate(COHORT)
    spleen = result["classes"][1]
    liver = result["classes"][2]
    assert (spleen["name"], liver["name"]) == ("spleen", "liver")
    assert spleen["status"] == {"ok": 2, "missed": 0, "spurious": 1, "absent": 0}
    assert liver["status"] == {"ok": 1, "missed": 1, "spurious": 0, "absent": 1}
    assert result["overall"]["status"] == {"ok": 3, "missed": 1, "spurious": 1, "absent": 1}

    assert spleen["hd"] == pytest.approx(
        {"mean": 1, "median": 1, "std": sqrt(2), "n": 2, "left_out": 1}
    )
    assert (liver["dice"]["mean"], liver["dice"]["n"], liver["dice"]["left_out"]) == (0.5, 2, 1)
    assert (liver["hd"]["mean"], liver["hd"]["n"], liver["hd"]["left_out"]) == (0, 1, 2)
    assert isnan(liver["hd"]["std"])


def test_the_diagonal_stands_for_what_is_not_there() -> None:
    result = aggregate(COHORT, policy="diagonal", diagonal_mm=40)
    assert (result["classes"][2]["hd95"]["mean"], result["classes"][2]["hd95"]["n"]) == (20, 2)

    missed = [row for row in COHORT if row["status"] == "missed"] * 3
    alone = aggregate(missed, policy="diagonal", diagonal_mm=40)["overall"]
    assert all(alone[metric]["mean"] == 40 for metric in DISTANCES)
    assert alone["dice"]["mean"] == alone["nsd"]["mean"] == 0
    assert all(row["hd"] == inf for row in missed)


def test_every_row_may_have_its_own_diagonal() -> None:
    rows = [row for row in COHORT if row["status"] in ("missed", "spurious")]
    assert aggregate(rows, policy="diagonal", diagonal_mm=[10, 20])["overall"]["hd"]["mean"] == 15


@pytest.mark.parametrize("policy", ["exclude", "diagonal"])
def test_an_average_of_nothing_is_not_a_number(policy: Any) -> None:
    absent = [row for row in COHORT if row["status"] == "absent"]
    for rows in (absent, []):
        overall = aggregate(rows, policy=policy, diagonal_mm=9)["overall"]
        assert all(isnan(overall[metric]["mean"]) for metric in METRICS)
        assert all(overall[metric]["n"] == 0 for metric in METRICS)
    assert aggregate([])["classes"] == {}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("policy", ["exclude", "diagonal"])
def test_no_average_takes_in_what_is_not_finite(definition: Any, policy: Any) -> None:
    rows = []
    for prediction in (NOTHING, HERE, SHIFTED):
        for truth in (NOTHING, HERE, SHIFTED):
            rows += score_labels(prediction, truth, ISO, [1], definition=definition)
    overall = aggregate(rows, policy=policy, diagonal_mm=50)["overall"]
    for metric in METRICS:
        entry = overall[metric]
        assert np.isfinite([entry["mean"], entry["median"], entry["std"]]).all()
        assert entry["n"] + entry["left_out"] == len(rows)


def test_means_over_classes_and_over_cases_are_told_apart() -> None:
    result = aggregate(COHORT)
    dice = np.array([row["dice"] for row in COHORT]).reshape(3, 2)  # cases, classes
    over_classes = np.nanmean(dice, axis=0)
    over_cases = np.nanmean(dice, axis=1)
    assert result["overall"]["dice"]["mean"] == pytest.approx(np.nanmean(dice))
    assert result["mean_of_classes"]["dice"]["mean"] == pytest.approx(np.mean(over_classes))
    assert result["mean_of_cases"]["dice"]["mean"] == pytest.approx(np.mean(over_cases))
    assert result["mean_of_classes"]["dice"]["n"] == 2
    assert result["mean_of_cases"]["dice"]["n"] == 3
    assert result["mean_of_cases"]["hd"]["left_out"] == 1


@pytest.mark.parametrize("mm", [None, 0, nan, inf, [1.0], [1.0, 2.0, 3.0, 4.0, 5.0, -6.0]])
def test_the_diagonal_policy_needs_diagonals(mm: Any) -> None:
    with pytest.raises(ValueError, match="diagonal_mm"):
        aggregate(COHORT, policy="diagonal", diagonal_mm=mm)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude or diagonal"):
        aggregate(COHORT, policy="zero")  # type: ignore[arg-type]


# --- intervals


def test_an_interval_is_the_percentile_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=25)
    ours = mean_interval(values)
    scipys = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.n == 25
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.03)


def test_an_interval_is_the_same_each_time_and_another_for_another_seed() -> None:
    values = np.random.default_rng(1).normal(size=25)
    first = mean_interval(values)
    bootstrap_shares.cache_clear()
    assert mean_interval(values) == first != mean_interval(values, seed=1)


def test_ninety_five_of_a_hundred_intervals_hold_the_true_mean() -> None:
    samples = np.random.default_rng(3).normal(5, 2, (600, 40))
    intervals = [mean_interval(sample) for sample in samples]
    held = [interval.low <= 5 <= interval.high for interval in intervals]
    assert 0.91 < np.mean(held) < 0.97


def test_an_interval_narrows_with_the_number_of_cases() -> None:
    values = np.random.default_rng(1).normal(size=25)
    few = mean_interval(values)
    many = mean_interval(np.tile(values, 16))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("n", [2, 3, 6, 19])
def test_below_twenty_values_the_interval_is_students_t_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).gamma(2.0, size=n)
    scipys = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert bounds_of(mean_interval(values)) == pytest.approx((scipys.low, scipys.high))


def test_from_twenty_values_on_it_is_the_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=20)
    means = bootstrap_shares(20, 0) @ values
    assert bounds_of(mean_interval(values)) == pytest.approx(np.percentile(means, (2.5, 97.5)))


def test_of_few_skewed_gains_students_interval_holds_the_true_mean_more_often() -> None:
    """Gains of a case as anchors have them: most small, a few large (exponential), 95 % nominal."""
    shares = {}
    for n in (6, 10, 24):
        gains = np.random.default_rng(n).exponential(size=(4000, n)) - 0.5  # true mean 0.5
        half = stats.t.ppf(0.975, n - 1) * gains.std(axis=1, ddof=1) / sqrt(n)
        student = np.mean(np.abs(gains.mean(axis=1) - 0.5) <= half)
        low, high = np.percentile(gains @ bootstrap_shares(n, 0)[:2000].T, (2.5, 97.5), axis=1)
        bootstrap = np.mean((low <= 0.5) & (high >= 0.5))
        shares[n] = (student, bootstrap)

    # Both fall short of 95 % of skewed gains; the fewer they are, the more the bootstrap does.
    assert shares[6][0] > shares[6][1] + 0.05
    assert shares[10][0] > shares[10][1] + 0.02
    assert abs(shares[24][0] - shares[24][1]) < 0.02
    assert min(student for student, _ in shares.values()) > 0.87


def test_what_is_not_finite_is_not_in_the_mean() -> None:
    assert mean_interval([1.0, nan, 2.0, inf, 3.0]) == mean_interval([1.0, 2.0, 3.0])
    assert mean_interval([1.0, nan, 2.0, inf, 3.0]).n == 3


def test_too_few_values_have_no_interval_and_equal_ones_a_point() -> None:
    assert str(mean_interval([])) == "Interval(mean=nan, low=nan, high=nan, n=0)"
    assert str(mean_interval([nan, 2.0])) == "Interval(mean=2.0, low=nan, high=nan, n=1)"
    assert mean_interval([0.1] * 7)[1:] == (0.1, 0.1, 7)


# --- Holm


def test_holm_as_worked_out_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and .04 may not lie below .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_what_could_not_be_tested_does_not_count_as_a_test() -> None:
    corrected = holm([0.01, nan, 0.04])
    assert corrected[::2] == pytest.approx([0.02, 0.04])
    assert isnan(corrected[1])


def test_holm_never_lies_below_p_and_keeps_its_order() -> None:
    p = np.random.default_rng(0).uniform(size=50) ** 3
    corrected = np.array(holm(p.tolist()))
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(1, 50 * p)).all()
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()


# --- two runs


def scipys_sign_flip_p(differences: np.ndarray, resamples: float = np.inf) -> float:
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples
    )
    return float(test.pvalue)


@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_sign_flips_of_few_pairs_are_exact_as_scipys(n: int) -> None:
    differences = np.round(np.random.default_rng(n).normal(0.2, 0.3, n), 2)
    assert sign_flip_p(differences) == pytest.approx(scipys_sign_flip_p(differences))


def test_six_pairs_that_all_gain_have_the_least_p_that_six_can_have() -> None:
    assert sign_flip_p(np.array([0.1, 0.2, 0.3, 0.1, 0.4, 0.1])) == 2 / 2**6


def test_no_signs_lie_nearer_to_0_than_differences_that_cancel_out() -> None:
    """Their sum is 0 but for rounding: p is 1."""
    for n in range(30):
        a, b, c = np.random.default_rng(n).normal(size=3).round(2)
        assert sign_flip_p(np.array([a, b, c, -b, -c, -a])) == 1


def test_sign_flips_of_many_pairs_are_drawn_and_near_scipys() -> None:
    differences = np.random.default_rng(1).normal(0.1, 0.3, 40)
    drawn = sign_flip_p(differences)
    assert drawn == pytest.approx(scipys_sign_flip_p(differences, 20_000), abs=0.01)
    assert sign_flip_p(np.full(40, 0.1)) == 1 / 10_001  # never 0: the signs as they are count


def test_each_class_has_the_tests_of_scipy() -> None:
    lines = compare(rows_of(A), rows_of(B))
    for cls in A:
        line = found(lines, "dice", cls)
        difference = np.subtract(B[cls], A[cls])
        assert line["t_p"] == pytest.approx(stats.ttest_rel(B[cls], A[cls]).pvalue)
        assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(B[cls], A[cls]).pvalue)
        assert line["sign_flip_p"] == pytest.approx(scipys_sign_flip_p(difference))
        assert line["difference"] == pytest.approx(difference.mean())
        assert (line["mean_a"], line["mean_b"]) == pytest.approx((np.mean(A[cls]), np.mean(B[cls])))
        assert bounds(line) == pytest.approx(mean_interval(difference)[1:3], abs=1e-9)
        assert (line["n"], line["left_out"], line["name"]) == (12, {}, f"organ {cls}")


def test_p_is_corrected_over_the_classes_of_a_metric() -> None:
    lines = [line for line in compare(rows_of(A), rows_of(B)) if line["metric"] == "dice"]
    *of_classes, of_all = lines
    for p in P_VALUES:
        uncorrected = [line[p] for line in of_classes]
        corrected = [line[f"{p}_holm"] for line in of_classes]
        assert corrected == holm(uncorrected)
        assert corrected != uncorrected
        assert isnan(of_all[f"{p}_holm"])  # over all classes there is one test


def test_the_overall_test_pairs_the_means_of_cases() -> None:
    line = found(compare(rows_of(A), rows_of(B)), "dice", OVERALL)
    a = np.mean(list(A.values()), axis=0)
    b = np.mean(list(B.values()), axis=0)
    assert line["n"] == 12  # cases, not cases times classes
    assert line["t_p"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(b, a).pvalue)
    assert line["difference"] == pytest.approx((b - a).mean())


def test_the_overall_means_are_over_the_same_classes_on_both_sides() -> None:
    a = [row("s0", 1, 0.9), row("s0", 2, 0.1), row("s1", 1, 0.8), row("s1", 2, 0.6)]
    b = [
        row("s0", 1, 0.8),
        row("s0", 2, nan, status="absent"),
        row("s1", 1, 0.8),
        row("s1", 2, 0.8),
    ]
    line = found(compare(a, b), "dice", OVERALL)
    assert (line["mean_a"], line["mean_b"]) == pytest.approx((0.8, 0.8))
    assert (line["n"], line["left_out"]) == (2, {"absent in B": 1})


def test_exchanging_the_runs_changes_the_sign_and_nothing_else() -> None:
    forth = compare(rows_of(A), rows_of(B))
    back = compare(rows_of(B), rows_of(A))
    for line, other in zip(forth, back):
        assert line["difference"] == pytest.approx(-other["difference"])
        assert bounds(line) == pytest.approx((-other["high"], -other["low"]), abs=1e-9)
        assert line["t_p"] == pytest.approx(other["t_p"], nan_ok=True)
        assert {line["better"], other["better"]} in ({"A", "B"}, {"neither"})


def test_the_better_run_has_more_dice_or_less_distance() -> None:
    a = rows_of({1: [0.5, 0.6]}, {1: [3.0, 4.0]})
    b = rows_of({1: [0.6, 0.8]}, {1: [4.0, 6.0]})
    lines = compare(a, b)
    for metric, better in (("dice", "B"), ("nsd", "B"), ("hd", "A"), ("msd", "A"), ("hd95", "A")):
        assert found(lines, metric, 1)["better"] == better
    assert found(compare(a, a), "dice", 1)["better"] == "neither"


def test_pairs_that_are_none_are_counted_by_reason() -> None:
    a = [
        row("s0", 1, 0.9, 1.0),
        row("s1", 1, 0.0, inf, "missed"),
        row("s2", 1, 0.8, 2.0),
        row("s3", 1, 0.8, 2.0),
        row("s4", 1, nan, nan, "absent"),
        row("s5", 1, 0.0, inf, "missed"),
        row("s7", 1, 0.7, 3.0),
        row("s8", 1, 0.7, 3.0),
    ]
    b = [
        row("s0", 1, 0.8, 2.0),
        row("s1", 1, 0.7, 3.0),
        row("s2", 1, 0.0, inf, "missed"),
        row("s6", 1, 0.5, 3.0),
        row("s4", 1, nan, nan, "absent"),
        row("s5", 1, 0.0, inf, "missed"),
        row("s7", 1, 0.7, 4.0),
    ]
    lines = compare(a, b)
    hd95 = found(lines, "hd95", 1)
    assert (hd95["n"], hd95["difference"]) == (2, 1.0)
    assert hd95["left_out"] == {
        "missed in A": 1,
        "missed in B": 1,
        "only in A": 2,
        "absent in A and B": 1,
        "missed in A and B": 1,
        "only in B": 1,
    }
    assert found(lines, "hd95", OVERALL)["left_out"] == hd95["left_out"]

    dice = found(lines, "dice", 1)
    assert dice["n"] == 5
    assert dice["left_out"] == {"only in A": 2, "absent in A and B": 1, "only in B": 1}


def test_runs_that_are_equal_have_p_one() -> None:
    for line in compare(rows_of(A), rows_of(A)):
        assert line["t_p"] == line["wilcoxon_p"] == line["sign_flip_p"] == 1
        assert line["low"] == line["difference"] == line["high"] == 0


def test_a_difference_that_is_everywhere_the_same_has_no_t_test() -> None:
    shifted = {cls: (np.array(values) + 0.1).tolist() for cls, values in A.items()}
    line = found(compare(rows_of(A), rows_of(shifted)), "dice", 1)
    assert isnan(line["t_p"])
    assert isnan(line["t_p_holm"])
    assert line["wilcoxon_p"] == line["sign_flip_p"] == pytest.approx(2 / 2**12)
    assert line["low"] == line["high"] == pytest.approx(0.1)


def test_fewer_than_two_pairs_have_no_p() -> None:
    lines = compare(
        [row("s0", 1, 0.5), row("s0", 2, nan, nan, "absent")],
        [row("s0", 1, 0.6), row("s0", 2, 0.0, inf)],
    )
    one = found(lines, "dice", 1)
    none = found(lines, "dice", 2)
    assert (one["n"], none["n"]) == (1, 0)
    assert one["difference"] == pytest.approx(0.1)
    assert isnan(none["difference"])
    for line in (one, none):
        for key in (*P_VALUES, *(f"{p}_holm" for p in P_VALUES), "low", "high"):
            assert isnan(line[key])


def test_many_cases_with_ties_and_zeros_are_tested_without_a_warning() -> None:
    a = np.round(np.random.default_rng(0).uniform(0.5, 0.9, 80), 2)
    b = np.round(a + np.random.default_rng(1).choice([-0.01, 0, 0.01, 0.02], 80), 2)
    line = found(compare(rows_of({1: a.tolist()}), rows_of({1: b.tolist()})), "dice", 1)
    assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(np.round(b - a, 12)).pvalue)


def test_all_metrics_are_compared_or_those_asked_for() -> None:
    lines = compare(rows_of(A), rows_of(B))
    assert [line["metric"] for line in lines[::4]] == list(METRICS)
    assert [line["class"] for line in lines] == [1, 2, 3, OVERALL] * len(METRICS)
    assert {line["metric"] for line in compare(rows_of(A), rows_of(B), metrics=["nsd"])} == {"nsd"}


def test_runs_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(InputError, match="no case in common"):
        compare([row("s0", 1, 0.5)], [row("s1", 1, 0.5)])
    with pytest.raises(InputError, match="no case in common"):
        compare([], [])
    with pytest.raises(InputError, match="B: case s0 has more than one row of class 1"):
        compare([row("s0", 1, 0.5)], [row("s0", 1, 0.5), row("s1", 1, 0.5), row("s0", 1, 0.6)])


# --- folds and seeds


def test_folds_are_averaged_by_fold_and_by_case() -> None:
    folds = [
        ("fold0", rows_of({1: [0.9, 0.7]})),
        ("fold1", [row("s2", 1, 0.6)]),
        ("fold2", [row("s3", 1, 0.4)]),
    ]
    line = found(fold_table(folds), "dice", 1)
    assert list(line["folds"]) == ["fold0", "fold1", "fold2"]
    assert [fold["n"] for fold in line["folds"].values()] == [2, 1, 1]
    assert [fold["mean"] for fold in line["folds"].values()] == pytest.approx([0.8, 0.6, 0.4])
    assert (line["mean_of_folds"], line["std_of_folds"]) == pytest.approx((0.6, 0.2))
    assert (line["n"], line["n_folds"]) == (4, 3)
    assert line["mean"] == pytest.approx(0.65)
    assert bounds(line) == pytest.approx(mean_interval([0.9, 0.7, 0.6, 0.4])[1:3])

    line = found(fold_table([("a", rows_of(A)), ("b", [])], seed=5), "dice", 1)
    assert bounds(line) == pytest.approx(mean_interval(A[1], seed=5)[1:3])


def test_seeds_do_not_make_cases() -> None:
    seeds = [("seed0", rows_of({1: [0.9, 0.7]})), ("seed1", rows_of({1: [0.7, 0.5]}))]
    line = found(fold_table(seeds), "dice", 1)
    assert line["n"] == 2
    assert line["mean"] == pytest.approx(0.7)
    assert bounds(line) == pytest.approx(mean_interval([0.8, 0.6])[1:3])


def test_a_fold_table_has_every_class_and_the_means_of_cases() -> None:
    rows = rows_of({1: [0.9, nan], 2: [0.5, 0.3]}, {1: [1.0, inf], 2: [2.0, 3.0]})
    lines = fold_table([("a", rows)])
    assert len(lines) == 3 * len(METRICS)
    assert found(lines, "dice", OVERALL)["mean"] == pytest.approx((0.7 + 0.3) / 2)
    assert found(lines, "hd95", 1)["n"] == 1
    assert isnan(found(lines, "dice", 1)["std_of_folds"])
    assert found(lines, "hd95", OVERALL)["mean"] == pytest.approx((1.5 + 3) / 2)


def test_two_folds_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="one name"):
        fold_table([("a", rows_of(A)), ("a", rows_of(B))])


# --- one run


def test_a_case_mean_is_over_the_classes_that_have_a_score() -> None:
    rows = [
        row("s0", 1, 0.9),
        row("s0", 2, nan),
        row("s1", 1, nan),
        row("s2", 1, 0.2),
        row("s2", 2, 0.4),
    ]
    means = case_means(rows, "dice")
    assert means["s0"] == 0.9
    assert isnan(means["s1"])
    assert means["s2"] == pytest.approx(0.3)
    assert worst_cases(rows) == ["s2", "s0"]
    assert worst_cases(rows, 1) == ["s2"]


def test_a_summary_counts_every_status_and_has_intervals() -> None:
    rows = [
        row("s0", 1, 0.9, 2.0),
        row("s1", 1, 0.0, inf, "missed"),
        row("s2", 1, nan, nan, "absent"),
        row("s3", 1, 0.7, 4.0),
        row("s0", 2, 0.5, 6.0),
        row("s3", 2, 0.0, inf, "spurious"),
    ]
    summary = summarise(rows, definition="medpy", tolerance=2.0, ignore=9)
    assert summary["cases"] == 4
    assert summary["definition"] == "medpy"
    assert summary["policy"] == "exclude"
    assert summary["tolerance_mm"] == 2.0
    assert summary["ignore"] == 9
    assert summarise(rows)["ignore"] is None

    one = summary["classes"][1]
    assert list(one["status"]) == list(STATUSES)
    assert one["status"] == {"ok": 2, "missed": 1, "spurious": 0, "absent": 1}
    assert bounds(one["dice"]) == mean_interval([0.9, 0.0, 0.7])[1:3]
    assert (one["hd95"]["mean"], one["hd95"]["n"], one["hd95"]["left_out"]) == (3.0, 2, 2)

    cases = summary["mean_of_cases"]["dice"]
    expected = mean_interval([0.7, 0.0, 0.35])
    assert (cases["mean"], *bounds(cases), cases["n"]) == pytest.approx(expected)


def test_under_the_penalty_a_missed_organ_is_as_far_off_as_its_volume_is_long() -> None:
    rows = [row("s0", 1, 0.9, 2.0), row("s1", 1, 0.0, inf, "missed")]
    summary = summarise(rows, policy="diagonal", diagonals={"s0": 100.0, "s1": 300.0})
    hd95 = summary["classes"][1]["hd95"]
    assert (hd95["mean"], hd95["n"]) == (151.0, 2)
    assert bounds(hd95) == mean_interval([2.0, 300.0])[1:3]
    cases = summary["mean_of_cases"]["hd95"]
    assert (cases["mean"], *bounds(cases)) == (151.0, *bounds(hd95))
    assert summary["diagonals_mm"] == {"s0": 100.0, "s1": 300.0}
    with pytest.raises(ValueError, match="needs diagonal_mm"):
        summarise(rows, policy="diagonal", diagonals={"s0": 100.0})


def test_every_definition_has_its_words() -> None:
    assert set(SURFACES) == set(DEFINITIONS)


@pytest.mark.parametrize("metric, sign", [("dice", 1), ("hd95", -1)])
def test_the_share_of_resamples_is_that_of_all_samples_there_are(metric: str, sign: int) -> None:
    gains = np.array([0.5, -0.25, 0.125, -0.375])
    samples = np.array(list(product(gains, repeat=4)))  # 256, each as likely as any other
    share = (samples.sum(axis=1) > 0).mean()
    pairs = [(1.0, 1.0 + sign * gain) for gain in gains]
    assert share_better(pairs, metric) == pytest.approx(share, abs=0.02)


def test_equal_runs_are_better_in_no_resample_and_one_pair_has_none() -> None:
    assert share_better([(0.3, 0.3)] * 5, "dice") == 0
    assert share_better([(0.1, 0.1 + 0.2), (0.1 + 0.2, 0.3)], "dice") == pytest.approx(
        0.75, abs=0.02
    )
    assert isnan(share_better([(0.3, 0.4)], "dice"))
