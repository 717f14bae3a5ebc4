"""dae/evaluation/statistics.py against SciPy's tests, against numbers worked out by hand, and without a warning."""

from math import inf, isnan, nan

import numpy as np
import pytest
from scipy import stats

from dae.errors import InputError
from dae.evaluation.metrics import DEFINITIONS, DISTANCES, METRICS, STATUSES
from dae.evaluation.statistics import (
    OVERALL,
    SURFACES,
    case_means,
    compare,
    fold_table,
    holm,
    mean_interval,
    shares_drawn,
    summarise,
    worst_cases,
)

pytestmark = pytest.mark.filterwarnings("error")


def row(case, cls, dice, hd95=1.0, status="ok", **others):
    """A row of scores; the other distances are those of hd95."""
    scores = {"dice": dice, **dict.fromkeys(DISTANCES, hd95), "nsd": dice, **others}
    return {"case": case, "class": cls, "name": f"organ {cls}", "status": status, **scores}


def rows_of(table, hd95=None):
    """{class: a Dice for each case} as rows."""
    return [
        row(f"s{n}", cls, dice, *([hd95[cls][n]] if hd95 else []))
        for cls, values in table.items()
        for n, dice in enumerate(values)
    ]


def found(lines, metric, cls):
    (line,) = [line for line in lines if (line["metric"], line["class"]) == (metric, cls)]
    return line


RNG = np.random.default_rng(7)
A = {cls: RNG.uniform(0.5, 0.9, 12).tolist() for cls in (1, 2, 3)}
B = {
    cls: (np.array(values) + RNG.normal(0.02 * cls, 0.03, 12)).tolist() for cls, values in A.items()
}


# Intervals


def test_an_interval_is_the_percentile_bootstrap_of_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=25)
    ours = mean_interval(values)
    scipys = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean()) and ours.n == 25
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.03)


def test_an_interval_is_the_same_each_time_and_another_for_another_seed():
    values = np.random.default_rng(1).normal(size=25)
    first = mean_interval(values)
    shares_drawn.cache_clear()
    assert mean_interval(values) == first != mean_interval(values, seed=1)


def test_ninety_five_of_a_hundred_intervals_hold_the_true_mean():
    samples = np.random.default_rng(3).normal(5, 2, (600, 40))
    held = np.mean([low <= 5 <= high for _, low, high, _ in map(mean_interval, samples)])
    assert 0.91 < held < 0.97


def test_an_interval_narrows_with_the_number_of_cases():
    values = np.random.default_rng(1).normal(size=25)
    few, many = mean_interval(values), mean_interval(np.tile(values, 16))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.1)


def test_what_is_not_finite_is_not_in_the_mean():
    assert mean_interval([1.0, nan, 2.0, inf, 3.0]) == mean_interval([1.0, 2.0, 3.0])
    assert mean_interval([1.0, nan, 2.0, inf, 3.0]).n == 3


def test_too_few_values_have_no_interval_and_equal_ones_a_point():
    assert str(mean_interval([])) == "Interval(mean=nan, low=nan, high=nan, n=0)"
    assert str(mean_interval([nan, 2.0])) == "Interval(mean=2.0, low=nan, high=nan, n=1)"
    assert mean_interval([0.1] * 7)[1:] == (0.1, 0.1, 7)


# Holm


def test_holm_as_worked_out_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and .04 may not lie below .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_what_could_not_be_tested_does_not_count_as_a_test():
    corrected = holm([0.01, nan, 0.04])
    assert corrected[::2] == pytest.approx([0.02, 0.04]) and isnan(corrected[1])


def test_holm_never_lies_below_p_and_keeps_its_order():
    p = np.random.default_rng(0).uniform(size=50) ** 3
    corrected = np.array(holm(p.tolist()))
    assert (corrected >= p).all() and (corrected <= np.minimum(1, 50 * p)).all()
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()


# Two runs


def test_each_class_has_the_tests_of_scipy():
    lines = compare(rows_of(A), rows_of(B))
    for cls in A:
        line, difference = found(lines, "dice", cls), np.subtract(B[cls], A[cls])
        assert line["t_p"] == pytest.approx(stats.ttest_rel(B[cls], A[cls]).pvalue)
        assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(B[cls], A[cls]).pvalue)
        assert line["difference"] == pytest.approx(difference.mean())
        assert (line["mean_a"], line["mean_b"]) == pytest.approx((np.mean(A[cls]), np.mean(B[cls])))
        assert (line["low"], line["high"]) == pytest.approx(
            mean_interval(difference)[1:3], abs=1e-9
        )
        assert line["n"] == 12 and line["left_out"] == {} and line["name"] == f"organ {cls}"


def test_p_is_corrected_over_the_classes_of_a_metric():
    lines = [line for line in compare(rows_of(A), rows_of(B)) if line["metric"] == "dice"]
    for p in ("t_p", "wilcoxon_p"):
        expected = holm([line[p] for line in lines[:-1]])
        assert (
            [line[f"{p}_holm"] for line in lines[:-1]]
            == expected
            != [line[p] for line in lines[:-1]]
        )
        assert isnan(lines[-1][f"{p}_holm"])  # over all classes there is one test


def test_the_overall_test_pairs_the_means_of_cases():
    line = found(compare(rows_of(A), rows_of(B)), "dice", OVERALL)
    a, b = (np.mean(list(table.values()), axis=0) for table in (A, B))
    assert line["n"] == 12  # cases, not cases times classes
    assert line["t_p"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(b, a).pvalue)
    assert line["difference"] == pytest.approx((b - a).mean())


def test_the_overall_means_are_over_the_same_classes_on_both_sides():
    a = [row("s0", 1, 0.9), row("s0", 2, 0.1), row("s1", 1, 0.8), row("s1", 2, 0.6)]
    b = [
        row("s0", 1, 0.8),
        row("s0", 2, nan, status="absent"),
        row("s1", 1, 0.8),
        row("s1", 2, 0.8),
    ]
    line = found(compare(a, b), "dice", OVERALL)
    assert (line["mean_a"], line["mean_b"]) == pytest.approx(
        (np.mean([0.9, 0.7]), np.mean([0.8, 0.8]))
    )
    assert line["n"] == 2 and line["left_out"] == {"absent in B": 1}


def test_exchanging_the_runs_changes_the_sign_and_nothing_else():
    for there, back in zip(compare(rows_of(A), rows_of(B)), compare(rows_of(B), rows_of(A))):
        assert there["difference"] == pytest.approx(-back["difference"])
        assert (there["low"], there["high"]) == pytest.approx(
            (-back["high"], -back["low"]), abs=1e-9
        )
        assert there["t_p"] == pytest.approx(back["t_p"], nan_ok=True)
        assert {there["better"], back["better"]} in ({"A", "B"}, {"neither"})


def test_the_better_run_has_more_dice_or_less_distance():
    a, b = rows_of({1: [0.5, 0.6]}, {1: [3.0, 4.0]}), rows_of({1: [0.6, 0.8]}, {1: [4.0, 6.0]})
    lines = compare(a, b)
    assert [found(lines, m, 1)["better"] for m in ("dice", "nsd", "hd95", "assd")] == [
        "B",
        "B",
        "A",
        "A",
    ]
    assert found(compare(a, a), "dice", 1)["better"] == "neither"


def test_pairs_that_are_none_are_counted_by_reason():
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
    hd95, dice = found(lines, "hd95", 1), found(lines, "dice", 1)
    assert hd95["n"] == 2 and hd95["difference"] == 1.0
    assert hd95["left_out"] == {
        "missed in A": 1,
        "missed in B": 1,
        "only in A": 2,
        "absent in A and B": 1,
        "missed in A and B": 1,
        "only in B": 1,
    }
    assert dice["n"] == 5 and dice["left_out"] == {
        "only in A": 2,
        "absent in A and B": 1,
        "only in B": 1,
    }
    assert found(lines, "hd95", OVERALL)["left_out"] == hd95["left_out"]


def test_runs_that_are_equal_have_p_one():
    for line in compare(rows_of(A), rows_of(A)):
        assert (
            line["t_p"] == line["wilcoxon_p"] == 1
            and line["low"] == line["difference"] == line["high"] == 0
        )


def test_a_difference_that_is_everywhere_the_same_has_no_t_test():
    shifted = {
        cls: [value + 0.1 for value in values] for cls, values in A.items()
    }  # but for rounding
    line = found(compare(rows_of(A), rows_of(shifted)), "dice", 1)
    assert isnan(line["t_p"]) and isnan(line["t_p_holm"])
    assert line["wilcoxon_p"] == pytest.approx(2 / 2**12)
    assert line["low"] == line["high"] == pytest.approx(0.1)


def test_fewer_than_two_pairs_have_no_p():
    lines = compare(
        [row("s0", 1, 0.5), row("s0", 2, nan, nan, "absent")],
        [row("s0", 1, 0.6), row("s0", 2, 0.0, inf)],
    )
    one, none = found(lines, "dice", 1), found(lines, "dice", 2)
    assert (
        one["n"] == 1
        and one["difference"] == pytest.approx(0.1)
        and none["n"] == 0
        and isnan(none["difference"])
    )
    for line in (one, none):
        assert all(
            isnan(line[key])
            for key in ("t_p", "wilcoxon_p", "t_p_holm", "wilcoxon_p_holm", "low", "high")
        )


def test_many_cases_with_ties_and_zeros_are_tested_without_a_warning():
    a = np.round(np.random.default_rng(0).uniform(0.5, 0.9, 80), 2)
    b = np.round(a + np.random.default_rng(1).choice([-0.01, 0, 0.01, 0.02], 80), 2)
    line = found(compare(rows_of({1: a.tolist()}), rows_of({1: b.tolist()})), "dice", 1)
    assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(np.round(b - a, 12)).pvalue)


def test_all_metrics_are_compared_or_those_asked_for():
    lines = compare(rows_of(A), rows_of(B))
    assert [(line["metric"], line["class"]) for line in lines] == [
        (m, c) for m in METRICS for c in (1, 2, 3, OVERALL)
    ]
    assert {line["metric"] for line in compare(rows_of(A), rows_of(B), metrics=["nsd"])} == {"nsd"}


def test_runs_that_cannot_be_paired_are_refused():
    with pytest.raises(InputError, match="no case in common"):
        compare([row("s0", 1, 0.5)], [row("s1", 1, 0.5)])
    with pytest.raises(InputError, match="no case in common"):
        compare([], [])
    with pytest.raises(InputError, match="B: case s0 has more than one row of class 1"):
        compare([row("s0", 1, 0.5)], [row("s0", 1, 0.5), row("s1", 1, 0.5), row("s0", 1, 0.6)])


# Many runs


def test_folds_are_averaged_by_fold_and_by_case():
    folds = [
        ("fold0", rows_of({1: [0.9, 0.7]})),
        ("fold1", [row("s2", 1, 0.6)]),
        ("fold2", [row("s3", 1, 0.4)]),
    ]
    line = found(fold_table(folds), "dice", 1)
    assert {name: fold["n"] for name, fold in line["folds"].items()} == {
        "fold0": 2,
        "fold1": 1,
        "fold2": 1,
    }
    assert [fold["mean"] for fold in line["folds"].values()] == pytest.approx([0.8, 0.6, 0.4])
    assert line["mean_of_folds"] == pytest.approx(0.6) and line["std_of_folds"] == pytest.approx(
        0.2
    )
    assert line["mean"] == pytest.approx(0.65) and (line["n"], line["n_folds"]) == (4, 3)
    assert (line["low"], line["high"]) == pytest.approx(mean_interval([0.9, 0.7, 0.6, 0.4])[1:3])
    line = found(fold_table([("a", rows_of(A)), ("b", [])], seed=5), "dice", 1)
    assert (line["low"], line["high"]) == pytest.approx(mean_interval(A[1], seed=5)[1:3])


def test_seeds_do_not_make_cases():
    seeds = [("seed0", rows_of({1: [0.9, 0.7]})), ("seed1", rows_of({1: [0.7, 0.5]}))]
    line = found(fold_table(seeds), "dice", 1)
    assert line["n"] == 2 and line["mean"] == pytest.approx(0.7)
    assert (line["low"], line["high"]) == pytest.approx(mean_interval([0.8, 0.6])[1:3])


def test_a_fold_table_has_every_class_and_the_means_of_cases():
    lines = fold_table(
        [("a", rows_of({1: [0.9, nan], 2: [0.5, 0.3]}, {1: [1.0, inf], 2: [2.0, 3.0]}))]
    )
    assert len(lines) == 3 * len(METRICS)
    assert found(lines, "dice", OVERALL)["mean"] == pytest.approx((0.7 + 0.3) / 2)
    assert found(lines, "hd95", 1)["n"] == 1 and isnan(found(lines, "dice", 1)["std_of_folds"])
    assert found(lines, "hd95", OVERALL)["mean"] == pytest.approx((1.5 + 3) / 2)


def test_two_folds_of_one_name_are_refused():
    with pytest.raises(InputError, match="one name"):
        fold_table([("a", rows_of(A)), ("a", rows_of(B))])


# One run


def test_a_case_mean_is_over_the_classes_that_have_a_score():
    rows = [
        row("s0", 1, 0.9),
        row("s0", 2, nan),
        row("s1", 1, nan),
        row("s2", 1, 0.2),
        row("s2", 2, 0.4),
    ]
    means = case_means(rows, "dice")
    assert means["s0"] == 0.9 and isnan(means["s1"]) and means["s2"] == pytest.approx(0.3)
    assert worst_cases(rows) == ["s2", "s0"] and worst_cases(rows, 1) == ["s2"]


def test_a_summary_counts_every_status_and_has_intervals():
    rows = [
        row("s0", 1, 0.9, 2.0),
        row("s1", 1, 0.0, inf, "missed"),
        row("s2", 1, nan, nan, "absent"),
        row("s3", 1, 0.7, 4.0),
        row("s0", 2, 0.5, 6.0),
        row("s3", 2, 0.0, inf, "spurious"),
    ]
    summary = summarise(rows, definition="medpy", tolerance=2.0, ignore=9)
    assert summary["ignore"] == 9 and summarise(rows)["ignore"] is None
    one = summary["classes"][1]
    assert one["status"] == {"ok": 2, "missed": 1, "spurious": 0, "absent": 1} and set(
        one["status"]
    ) == set(STATUSES)
    assert (
        summary["cases"],
        summary["definition"],
        summary["policy"],
        summary["tolerance_mm"],
    ) == (
        4,
        "medpy",
        "exclude",
        2.0,
    )
    assert (one["dice"]["low"], one["dice"]["high"]) == mean_interval([0.9, 0.0, 0.7])[1:3]
    assert one["hd95"]["mean"] == 3.0 and (one["hd95"]["n"], one["hd95"]["left_out"]) == (2, 2)
    cases = summary["mean_of_cases"]["dice"]
    assert (cases["mean"], cases["low"], cases["high"], cases["n"]) == pytest.approx(
        mean_interval([0.7, 0.0, 0.35])
    )


def test_under_the_penalty_a_missed_organ_is_as_far_off_as_its_volume_is_long():
    rows = [row("s0", 1, 0.9, 2.0), row("s1", 1, 0.0, inf, "missed")]
    summary = summarise(rows, policy="diagonal", diagonals={"s0": 100.0, "s1": 300.0})
    hd95 = summary["classes"][1]["hd95"]
    assert hd95["mean"] == 151.0 and hd95["n"] == 2 and hd95["high"] == 300.0 and hd95["low"] == 2.0
    cases = summary["mean_of_cases"]["hd95"]
    assert (cases["mean"], cases["low"], cases["high"]) == (151.0, 2.0, 300.0)
    assert summary["diagonals_mm"] == {"s0": 100.0, "s1": 300.0}
    with pytest.raises(ValueError, match="needs diagonal_mm"):
        summarise(rows, policy="diagonal", diagonals={"s0": 100.0})


def test_every_definition_has_its_words():
    assert set(SURFACES) == set(DEFINITIONS)
