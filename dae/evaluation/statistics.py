"""What a table of scores tells: averages, intervals, paired tests of two runs, a table over folds.

The unit is the case. Classes of one case are not independent, so what is said over all classes is
said of each case's mean over them. Two runs are compared case by case, and only where both have a
finite score; how many pairs that leaves out, and why, is part of every result.

A missed organ has an infinite HD and so leaves the mean of it. To have it count, put a distance in
its place first (`penalised`). Rows are those of `metrics.score_labels`, with a `case`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from math import inf, isfinite, nan, sqrt
from statistics import fmean, median, stdev
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dae.config.evaluate import DefinitionName, Policy
from dae.errors import InputError
from dae.evaluation.metrics import DISTANCES, METRICS, MISSED, SPURIOUS, STATUSES, Row

OVERALL = "overall"  # in place of a class
OVERALL_NAME = "mean of classes"

RESAMPLES = 10_000  # of the bootstrap, and of the signs where there are too many to try all
FEW = 20  # below so many values Student's t interval stands in for the bootstrap
EXACT = 16  # up to so many differences all of their 2^n signs are tried
HIGHER_IS_BETTER = ("dice", "nsd")
P_VALUES = ("t_p", "wilcoxon_p", "sign_flip_p")
DECIMALS = 12  # of a difference: rounding beyond them would turn zeros and ties into differences

SURFACES = {
    "default": "the centres of border voxels (6 neighbours), "
    "HD95 is the larger of both directed percentiles",
    "monai": "those of definition default, and empty masks are answered as MONAI 1.6.1 does",
    "medpy": "the centres of border voxels, HD95 is the percentile of both directions pooled",
}
EMPTY = {
    "exclude": "what is missed or spurious has Dice and NSD 0 and no distance: "
    "n is how many have one",
    "diagonal": "what is missed or spurious has Dice and NSD 0 and, for a distance, "
    "its volume's diagonal",
}

Key = tuple[str, int]  # case and class
Scores = tuple[float, float]  # in run A and in run B


# --- averages


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, sample standard deviation and number of the finite values; how many are not."""
    finite = [value for value in values if isfinite(value)]
    return {
        "mean": fmean(finite) if finite else nan,
        "median": median(finite) if finite else nan,
        "std": stdev(finite) if len(finite) > 1 else nan,
        "n": len(finite),
        "left_out": len(values) - len(finite),
    }


def aggregate(
    rows: Iterable[Row],
    *,
    policy: Policy = "exclude",
    diagonal_mm: float | Sequence[float] | None = None,
) -> dict[str, Any]:
    """Averages over the rows of any number of cases.

    Keys: policy, classes, overall, mean_of_classes, mean_of_cases. Each class, and `overall`, which
    takes all rows alike, has the number of rows by `status`, and `spread` of every metric.
    `mean_of_classes` and `mean_of_cases` average the means of classes and of cases.

    Policy `exclude` averages what is finite: a missed class counts with its Dice of 0, and in no
    distance. `diagonal` replaces the distances of what is missed or spurious by `diagonal_mm`, one
    length or one for each row. Raises ValueError on another policy or a missing length.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be exclude or diagonal, got {policy}")

    rows = list(rows)
    if policy == "diagonal":
        rows = penalised(rows, diagonal_mm)

    names = {row["class"]: row["name"] for row in rows}
    by_class = summaries(rows, "class")
    by_case = summaries(rows, "case")
    classes = {label: {"name": names[label], **by_class[label]} for label in by_class}
    return {
        "policy": policy,
        "classes": classes,
        "overall": summary(rows),
        "mean_of_classes": spread_of_means(by_class.values()),
        "mean_of_cases": spread_of_means(by_case.values()),
    }


def penalised(rows: Sequence[Row], diagonal_mm: float | Sequence[float] | None) -> list[Row]:
    """The rows, with `diagonal_mm` for every distance of what is missed or spurious.

    It is one length in mm, or one for each row. Raises ValueError where there is none.
    """
    if not isinstance(diagonal_mm, Iterable):
        diagonal_mm = [nan if diagonal_mm is None else diagonal_mm] * len(rows)
    lengths = list(diagonal_mm)
    if len(lengths) != len(rows) or not all(0 < mm < inf for mm in lengths):
        raise ValueError(
            "policy diagonal needs diagonal_mm: one positive length in mm, or one for each row"
        )

    result = []
    for row, mm in zip(rows, lengths):
        if row["status"] in (MISSED, SPURIOUS):
            row = row | dict.fromkeys(DISTANCES, mm)
        result.append(row)
    return result


def summaries(rows: Sequence[Row], key: str) -> dict[Any, dict[str, Any]]:
    """`summary` of the rows of each value of `key`, over the rows that have it."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if key in row:
            groups.setdefault(row[key], []).append(row)
    return {value: summary(group) for value, group in groups.items()}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows have which status, and the spread of every metric."""
    statuses = Counter(row["status"] for row in rows)
    result: dict[str, Any] = {"status": {status: statuses[status] for status in STATUSES}}
    for metric in METRICS:
        result[metric] = spread([row[metric] for row in rows])
    return result


def spread_of_means(groups: Collection[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The spread of every metric's means in some summaries."""
    result = {}
    for metric in METRICS:
        result[metric] = spread([scores[metric]["mean"] for scores in groups])
    return result


def case_means(rows: Iterable[Row], metric: str) -> dict[str, float]:
    """Each case's mean over its classes that have a finite score; nan for a case without one."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["case"], []).append(row[metric])
    return {case: spread(scores)["mean"] for case, scores in values.items()}


def means_over_runs(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each case's mean over the runs that have a finite score of it: seeds do not make cases."""
    values: dict[str, list[float]] = {}
    for scores in runs:
        for case, score in scores.items():
            values.setdefault(case, []).append(score)
    return {case: spread(scores)["mean"] for case, scores in values.items()}


def worst_cases(rows: Iterable[Row], n: int = 3) -> list[str]:
    """The cases of the lowest mean Dice, the lowest first."""
    means = case_means(rows, "dice")
    scored = [case for case in means if isfinite(means[case])]
    return sorted(scored, key=lambda case: means[case])[:n]


# --- intervals


class Interval(NamedTuple):
    """A mean, its 95 % interval, and the number of values that it was taken over."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Iterable[float], *, seed: int = 0) -> Interval:
    """Mean of the finite values with its 95 % interval.

    It is the percentile bootstrap's (Efron, 1979), and below FEW values Student's t: of few values
    the bootstrap's is too narrow (tests/test_statistics.py has both coverages). The t interval of a
    mean Dice may reach beyond 1. Below two values there is no interval (nan).
    """
    finite = np.array([value for value in values if isfinite(value)], np.float64)
    n = len(finite)
    if n < 2:
        mean = float(finite[0]) if n else nan
        return Interval(mean, nan, nan, n)

    mean = float(finite.mean())
    if not np.ptp(finite):
        value = float(finite[0])  # the mean of equal values may differ from them by rounding
        return Interval(mean, value, value, n)

    if n < FEW:
        half = float(stats.t.ppf(0.975, n - 1) * finite.std(ddof=1) / sqrt(n))
        return Interval(mean, mean - half, mean + half, n)

    means = bootstrap_shares(n, seed) @ finite
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(mean, float(low), float(high), n)


@lru_cache(maxsize=4)
def bootstrap_shares(n: int, seed: int) -> NDArray[np.float64]:
    """The share of each of n values in samples of n drawn with replacement: (RESAMPLES, n)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def summarise(
    rows: Sequence[Row],
    *,
    policy: Policy = "exclude",
    diagonals: Mapping[str, float] | None = None,
    definition: DefinitionName = "default",
    tolerance: float | Mapping[int, float] = 1.0,
    ignore: int | None = None,
) -> dict[str, Any]:
    """`aggregate` of all cases, with the intervals of each class's mean and of the mean of cases.

    `diagonals`, mm by case, are the distances of missed and spurious classes under policy
    `diagonal`. They, the definition, the tolerance and the ignored label are noted in the result:
    only scores that share them can be compared.
    """
    # A case without a length is an error only where the policy asks for one.
    lengths = [(diagonals or {}).get(row["case"], nan) for row in rows]
    counted = penalised(rows, lengths) if policy == "diagonal" else rows
    averages = aggregate(rows, policy=policy, diagonal_mm=lengths)

    for metric in METRICS:
        for label, scores in averages["classes"].items():
            values = [row[metric] for row in counted if row["class"] == label]
            add_interval(scores[metric], values)
        add_interval(averages["mean_of_cases"][metric], case_means(counted, metric).values())

    return {
        "cases": len({row["case"] for row in rows}),
        "definition": definition,
        "surfaces": SURFACES[definition],
        "empty": EMPTY[policy],
        **averages,
        "tolerance_mm": tolerance,
        "ignore": ignore,
        "diagonals_mm": dict(diagonals or {}),
    }


def add_interval(scores: dict[str, float], values: Iterable[float]) -> None:
    """Put the interval of the values' mean beside that mean."""
    interval = mean_interval(values)
    scores["low"] = interval.low
    scores["high"] = interval.high


# --- two runs


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, metrics: Sequence[str] = METRICS, seed: int = 0
) -> list[Row]:
    """B against A: for each metric a row per class, and one over all, of the cases' means.

    Rows: metric, class, name, n, left_out, mean_a, mean_b, difference (B minus A) with its interval
    low and high, better, t_p, wilcoxon_p and sign_flip_p, and each with _holm, corrected over the
    classes of the metric. Raises InputError where the runs have no case in common, or one
    holds a class of a case twice.
    """
    a = by_case_and_class(rows_a, "A")
    b = by_case_and_class(rows_b, "B")
    cases_of_a = {case for case, _ in a}
    cases_of_b = {case for case, _ in b}
    if not cases_of_a & cases_of_b:
        raise InputError(
            "A and B have no case in common, so that nothing can be paired; "
            "are they of one test set?"
        )

    names = {row["class"]: row["name"] for row in (*rows_a, *rows_b)}
    table = []
    for metric in metrics:
        table += compare_by_metric(a, b, metric, names, seed)
    return table


def by_case_and_class(rows: Sequence[Row], run: str) -> dict[Key, Row]:
    """The rows by their case and class. Raises InputError where two have the same."""
    keys = [(row["case"], row["class"]) for row in rows]
    result = dict(zip(keys, rows))
    if len(result) < len(rows):
        (case, label), _ = Counter(keys).most_common(1)[0]
        raise InputError(f"{run}: case {case} has more than one row of class {label}")
    return result


def compare_by_metric(
    a: Mapping[Key, Row], b: Mapping[Key, Row], metric: str, names: Mapping[int, str], seed: int
) -> list[Row]:
    """The rows of `compare` of one metric."""
    pairs, left_out = paired_scores(a, b, metric)

    table = []
    for label, name in names.items():
        of_class = [scores for (_, cls), scores in pairs.items() if cls == label]
        result = compare_pairs(of_class, left_out[label], metric, seed)
        table.append({"metric": metric, "class": label, "name": name, **result})

    # Each class is a test of its own, and one in twenty shows a difference by chance.
    for p in P_VALUES:
        corrected = holm([row[p] for row in table])
        for row, value in zip(table, corrected):
            row[f"{p}_holm"] = value

    # Over all classes, a case is one pair: the means over the classes that both runs have in it.
    left_out_in_all = sum(left_out.values(), Counter[str]())
    means = list(paired_case_means(pairs).values())
    result = compare_pairs(means, left_out_in_all, metric, seed)
    for p in P_VALUES:
        result[f"{p}_holm"] = nan  # one test needs no correction
    table.append({"metric": metric, "class": OVERALL, "name": OVERALL_NAME, **result})
    return table


def paired_scores(
    a: Mapping[Key, Row], b: Mapping[Key, Row], metric: str
) -> tuple[dict[Key, Scores], dict[int, Counter[str]]]:
    """The scores where both runs have a finite one; by class, how often not and why."""
    pairs: dict[Key, Scores] = {}
    left_out: dict[int, Counter[str]] = {}
    for key in dict.fromkeys([*a, *b]):
        _, label = key
        reasons = left_out.setdefault(label, Counter())
        if key not in b:
            reasons["only in A"] += 1
        elif key not in a:
            reasons["only in B"] += 1
        elif isfinite(a[key][metric]) and isfinite(b[key][metric]):
            pairs[key] = (a[key][metric], b[key][metric])
        else:
            reasons[why_not_finite(a[key], b[key], metric)] += 1
    return pairs, left_out


def why_not_finite(a: Row, b: Row, metric: str) -> str:
    """Like "missed in A", "missed in A and B", "missed or spurious in A and B"."""
    statuses = {}
    if not isfinite(a[metric]):
        statuses["A"] = a["status"]
    if not isfinite(b[metric]):
        statuses["B"] = b["status"]
    different = dict.fromkeys(statuses.values())
    return f"{' or '.join(different)} in {' and '.join(statuses)}"


def paired_case_means(pairs: Mapping[Key, Scores]) -> dict[str, Scores]:
    """For each case both means over the classes that are paired in it, the same in both runs."""
    cases: dict[str, list[Scores]] = {}
    for (case, _), scores in pairs.items():
        cases.setdefault(case, []).append(scores)
    return {case: mean_of_pairs(scores) for case, scores in cases.items()}


def mean_of_pairs(scores: Sequence[Scores]) -> Scores:
    mean_a, mean_b = np.mean(scores, axis=0).tolist()
    return mean_a, mean_b


def compare_pairs(
    pairs: Sequence[Scores], left_out: Mapping[str, int], metric: str, seed: int
) -> Row:
    """Both means, their difference with its interval, the better run and p-values."""
    a, b = np.array(pairs, np.float64).reshape(-1, 2).T
    differences = np.round(b - a, DECIMALS)
    interval = mean_interval(differences.tolist(), seed=seed)
    return {
        "n": interval.n,
        "left_out": dict(left_out),
        "mean_a": spread(a.tolist())["mean"],
        "mean_b": spread(b.tolist())["mean"],
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "better": better_run(interval.mean, metric),
        **dict(zip(P_VALUES, p_values(differences, seed))),
    }


def share_better(pairs: Sequence[Scores], metric: str, *, seed: int = 0) -> float:
    """In which share of the bootstrap's samples of these pairs B has the better mean.

    Samples in which both means are equal do not count for B. Below two pairs it is nan.
    """
    if len(pairs) < 2:
        return nan
    a, b = np.array(pairs, np.float64).T
    gains = b - a if metric in HIGHER_IS_BETTER else a - b
    means = bootstrap_shares(len(gains), seed) @ np.round(gains, DECIMALS)
    return float((np.round(means, DECIMALS) > 0).mean())


def better_run(difference: float, metric: str) -> str:
    """A, B or neither, by the sign of B minus A."""
    gain = difference if metric in HIGHER_IS_BETTER else -difference
    if gain > 0:
        return "B"
    if gain < 0:
        return "A"
    return "neither"


def p_values(differences: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Two-sided p of the paired t-test, Wilcoxon's signed-rank test (zeros dropped), sign flips.

    Below two pairs all are nan; where no pair differs all are 1. Where all differ by the same
    amount a t-test has no variance to divide by, and its p is nan.
    """
    if len(differences) < 2:
        return nan, nan, nan
    if not differences.any():
        return 1.0, 1.0, 1.0

    t_p = nan
    if np.ptp(differences):
        t_p = float(stats.ttest_1samp(differences, 0).pvalue)
    wilcoxon_p = float(stats.wilcoxon(differences).pvalue)
    return t_p, wilcoxon_p, sign_flip_p(differences, seed)


def sign_flip_p(differences: NDArray[np.float64], seed: int = 0) -> float:
    """How often random signs of the differences give a sum at least as far from 0 (Fisher, 1935).

    It is exact up to EXACT differences, and says nothing of their distribution but that it would be
    symmetric about 0 if both runs were alike.
    """
    n = len(differences)
    sums = np.abs(sign_flips(n, seed) @ differences)
    rounding = 1e-12 * np.abs(differences).sum()  # by which equal sums may differ
    as_far = sums >= abs(differences.sum()) - rounding
    if n <= EXACT:
        return float(as_far.mean())
    return float((1 + as_far.sum()) / (1 + len(sums)))  # the signs as they are count as well


@lru_cache(maxsize=4)
def sign_flips(n: int, seed: int) -> NDArray[np.float64]:
    """Signs of n numbers, all 2^n or RESAMPLES that are drawn: rows of 1 and -1."""
    if n <= EXACT:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, n))
    return np.where(bits, -1.0, 1.0)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm, 1979), in their order; nan is no test.

    The smallest is multiplied by their number, the next by one less, and so on; none becomes less
    than the one before it.
    """
    tested = [index for index, value in enumerate(p) if isfinite(value)]
    ascending = sorted(tested, key=lambda index: p[index])

    corrected = [nan] * len(p)
    least = 0.0
    for rank, index in enumerate(ascending):
        multiplied = min(1.0, (len(tested) - rank) * p[index])
        least = max(least, multiplied)
        corrected[index] = least
    return corrected


# --- folds, or seeds


def fold_table(
    runs: Sequence[tuple[str, Sequence[Row]]], *, metrics: Sequence[str] = METRICS, seed: int = 0
) -> list[Row]:
    """Over folds, or over seeds: for each metric a row per class, and one over all.

    Rows: metric, class, name, folds {name of the run: {mean, n}}, mean_of_folds and std_of_folds
    over the runs' means, n_folds, and mean, low, high, n over cases. A case that several runs have
    counts once there, with its mean over them: seeds do not make cases. Raises InputError where two
    runs have one name.
    """
    if len({name for name, _ in runs}) < len(runs):
        raise InputError("two folds have one name, which would make one row of both")

    names: dict[Any, str] = {}
    for _, rows in runs:
        names |= {row["class"]: row["name"] for row in rows}
    names[OVERALL] = OVERALL_NAME

    table = []
    for metric in metrics:
        for label, name in names.items():
            scores = {run: case_means(rows_of_class(rows, label), metric) for run, rows in runs}
            result = average_folds(scores, seed)
            table.append({"metric": metric, "class": label, "name": name, **result})
    return table


def rows_of_class(rows: Iterable[Row], label: Any) -> list[Row]:
    """The rows of one class; all of them for OVERALL."""
    return [row for row in rows if label in (row["class"], OVERALL)]


def average_folds(scores: Mapping[str, Mapping[str, float]], seed: int) -> Row:
    """From one score for each fold and case to means over folds and over cases."""
    folds = {}
    for run, cases in scores.items():
        fold = spread(list(cases.values()))
        folds[run] = {"mean": fold["mean"], "n": fold["n"]}
    over_folds = spread([fold["mean"] for fold in folds.values()])

    # Seeds score the same cases again: each case counts once, with its mean.
    over_cases = mean_interval(means_over_runs(scores.values()).values(), seed=seed)

    return {
        "folds": folds,
        "mean_of_folds": over_folds["mean"],
        "std_of_folds": over_folds["std"],
        "n_folds": over_folds["n"],
        "mean": over_cases.mean,
        "low": over_cases.low,
        "high": over_cases.high,
        "n": over_cases.n,
    }
