"""What a table of scores can bear: intervals of means, paired tests of two runs, a table over folds or seeds.

The unit is the case. Classes of one case are not independent, so what is said over all classes is said of each case's
mean over them. Two runs are compared case by case, and only where both have a finite score; how many pairs that leaves
out, and why, stands beside every number. A missed organ has an infinite HD95 and so leaves the mean of it: to have it
count, put a distance in its place first (`metrics.penalised`). Rows are those of `metrics.score_labels` with a `case`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import isfinite, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dae.errors import InputError
from dae.evaluation.metrics import (
    METRICS,
    DefinitionName,
    Policy,
    Row,
    aggregate,
    penalised,
    spread,
)

OVERALL, OVERALL_NAME = "overall", "mean of classes"
RESAMPLES = 10_000
HIGHER_IS_BETTER = ("dice", "nsd")
P_VALUES = ("t_p", "wilcoxon_p")
UNCORRECTED = {"t_p_holm": nan, "wilcoxon_p_holm": nan}  # the test over all classes is one
SURFACES = {
    "default": "the centres of border voxels (6 neighbours), HD95 is the larger of both directed percentiles",
    "monai": "those of definition default, and empty masks are answered as MONAI 1.6.1 does",
    "medpy": "the centres of border voxels, HD95 is the percentile of both directions pooled",
    "surface-distance": "elements weighted by area, HD95 is the larger of both directed percentiles",
}
EMPTY = {
    "exclude": "what is missed or spurious has Dice and NSD 0 and no distance: n is how many have one",
    "diagonal": "what is missed or spurious has Dice and NSD 0 and, for a distance, its volume's diagonal",
}
DECIMALS = 12  # of a difference; beyond it is rounding, which would make ties and zeros into small differences

Key = tuple[str, int]  # case, class


class Interval(NamedTuple):
    """A mean, where it might as well lie (95 %), and over how many values it was taken."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Iterable[float], *, seed: int = 0) -> Interval:
    """Mean of the finite values with its 95 % percentile bootstrap interval (Efron, 1979); nan below two values.

    The values are drawn again with replacement. With fewer than about ten such an interval is too narrow.
    """
    finite = np.array([value for value in values if isfinite(value)], np.float64)
    n = len(finite)
    if n < 2:
        return Interval(float(finite[0]) if n else nan, nan, nan, n)
    means = shares_drawn(n, seed) @ finite
    low, high = np.clip(np.percentile(means, (2.5, 97.5)), finite.min(), finite.max())
    return Interval(float(finite.mean()), float(low), float(high), n)


@lru_cache(maxsize=4)
def shares_drawn(n: int, seed: int) -> NDArray[np.float64]:
    """What share of each of RESAMPLES draws of n out of n falls to which value: (RESAMPLES, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def case_means(rows: Iterable[Row], metric: str) -> dict[str, float]:
    """Each case's mean over its classes that have a finite score; nan for a case without one."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["case"], []).append(row[metric])
    return {case: spread(scores)["mean"] for case, scores in values.items()}


def worst_cases(rows: Iterable[Row], n: int = 3) -> list[str]:
    """The cases of the lowest mean Dice, the lowest first."""
    means = {case: mean for case, mean in case_means(rows, "dice").items() if isfinite(mean)}
    return sorted(means, key=lambda case: means[case])[:n]


def summarise(
    rows: Sequence[Row],
    *,
    policy: Policy = "exclude",
    diagonals: Mapping[str, float] | None = None,
    definition: DefinitionName = "default",
    tolerance: float | Mapping[int, float] = 1.0,
    ignore: int | None = None,
) -> dict[str, Any]:
    """`metrics.aggregate` of all cases, with the interval of each class's means and of the means over cases.

    `diagonals`, mm by case, stand for the distances of missed and spurious classes if the policy is "diagonal". They,
    the definition, the tolerance and the ignored label that the rows were scored by are noted, so that the numbers can
    be told apart.
    """
    lengths = [(diagonals or {}).get(row["case"], nan) for row in rows]
    counted = penalised(rows, lengths) if policy == "diagonal" else rows
    summary = aggregate(rows, policy=policy, diagonal_mm=lengths)
    for metric in METRICS:
        for cls, scores in summary["classes"].items():
            its = mean_interval(row[metric] for row in counted if row["class"] == cls)
            scores[metric] |= {"low": its.low, "high": its.high}
        its = mean_interval(case_means(counted, metric).values())
        summary["mean_of_cases"][metric] |= {"low": its.low, "high": its.high}
    words = {"definition": definition, "surfaces": SURFACES[definition], "empty": EMPTY[policy]}
    facts = {"tolerance_mm": tolerance, "ignore": ignore, "diagonals_mm": dict(diagonals or {})}
    return {"cases": len({row["case"] for row in rows}), **words, **summary, **facts}


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, metrics: Sequence[str] = METRICS, seed: int = 0
) -> list[Row]:
    """B against A: for each metric a row per class, and one over all of them that pairs the cases' means.

    Rows: metric, class, name, n, left_out, mean_a, mean_b, difference (B minus A) with its interval low and high,
    better, t_p and wilcoxon_p, and both as t_p_holm and wilcoxon_p_holm, corrected over the classes of the metric.
    Raises InputError where the runs have no case in common, or one holds a case's class twice.
    """
    a, b = by_case_and_class(rows_a, "A"), by_case_and_class(rows_b, "B")
    if not {case for case, _ in a} & {case for case, _ in b}:
        raise InputError(
            "A and B have no case in common, so that nothing can be paired; are they of one test set?"
        )
    names = {row["class"]: row["name"] for row in (*rows_a, *rows_b)}
    table = []
    for metric in metrics:
        pairs, left_out = pair_up(a, b, metric)
        lines = []
        for cls, name in names.items():
            scores = contrast(
                [pair for (_, its), pair in pairs.items() if its == cls],
                left_out[cls],
                metric,
                seed,
            )
            lines.append({"metric": metric, "class": cls, "name": name, **scores})
        for p in P_VALUES:
            for line, corrected in zip(lines, holm([line[p] for line in lines])):
                line[f"{p}_holm"] = corrected
        scores = contrast(of_cases(pairs), sum(left_out.values(), Counter[str]()), metric, seed)
        lines.append(
            {"metric": metric, "class": OVERALL, "name": OVERALL_NAME, **scores, **UNCORRECTED}
        )
        table += lines
    return table


def by_case_and_class(rows: Sequence[Row], run: str) -> dict[Key, Row]:
    """The rows by what makes a pair."""
    found = {(row["case"], row["class"]): row for row in rows}
    if len(found) < len(rows):
        (case, cls), _ = Counter((row["case"], row["class"]) for row in rows).most_common(1)[0]
        raise InputError(f"{run}: case {case} has more than one row of class {cls}")
    return found


def pair_up(
    a: Mapping[Key, Row], b: Mapping[Key, Row], metric: str
) -> tuple[dict[Key, tuple[float, float]], dict[int, Counter[str]]]:
    """The scores in A and in B where both are finite; for each class why, and how often, there is no such pair."""
    pairs, left_out = dict[Key, tuple[float, float]](), dict[int, Counter[str]]()
    for key in dict.fromkeys([*a, *b]):
        reasons = left_out.setdefault(key[1], Counter())
        if key not in a or key not in b:
            reasons["only in A" if key in a else "only in B"] += 1
        elif isfinite(a[key][metric]) and isfinite(b[key][metric]):
            pairs[key] = a[key][metric], b[key][metric]
        else:
            bad = {
                run: rows[key]["status"]
                for run, rows in (("A", a), ("B", b))
                if not isfinite(rows[key][metric])
            }
            reasons[f"{' or '.join(dict.fromkeys(bad.values()))} in {' and '.join(bad)}"] += 1
    return pairs, left_out


def of_cases(pairs: Mapping[Key, tuple[float, float]]) -> list[tuple[float, float]]:
    """For each case both means over the classes that are paired in it: the same classes on both sides."""
    cases: dict[str, list[tuple[float, float]]] = {}
    for (case, _), pair in pairs.items():
        cases.setdefault(case, []).append(pair)
    return [tuple(np.mean(each, axis=0).tolist()) for each in cases.values()]


def contrast(
    pairs: Sequence[tuple[float, float]], left_out: Mapping[str, int], metric: str, seed: int
) -> Row:
    """Means, difference, interval and p of pairs of one metric."""
    a, b = np.array(pairs, np.float64).reshape(-1, 2).T
    difference = np.round(b - a, DECIMALS)
    mean, low, high, n = mean_interval(difference.tolist(), seed=seed)
    gain = mean if metric in HIGHER_IS_BETTER else -mean
    return {
        "n": n,
        "left_out": dict(left_out),
        "mean_a": spread(a.tolist())["mean"],
        "mean_b": spread(b.tolist())["mean"],
        "difference": mean,
        "low": low,
        "high": high,
        "better": "B" if gain > 0 else "A" if gain < 0 else "neither",
        **dict(zip(P_VALUES, p_values(difference))),
    }


def p_values(difference: NDArray[np.float64]) -> tuple[float, float]:
    """Of the paired t-test (two-sided) and of Wilcoxon's signed-rank test (zeros dropped, exact where it can be).

    Below two pairs both are nan; where no pair differs both are 1. Where all differ by the same there is no spread for
    a t-test to measure by, and its p is nan.
    """
    if len(difference) < 2:
        return nan, nan
    if not difference.any():
        return 1.0, 1.0
    t = float(stats.ttest_1samp(difference, 0).pvalue) if np.ptp(difference) else nan
    return t, float(stats.wilcoxon(difference).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm, 1979), in their order; nan is no test and stays nan.

    The smallest is multiplied by their number, the next by one less, and none ends up below one smaller than itself.
    """
    tests = sorted((value, place) for place, value in enumerate(p) if isfinite(value))
    corrected, least = [nan] * len(p), 0.0
    for rank, (value, place) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - rank) * value))
        corrected[place] = least
    return corrected


def fold_table(
    runs: Sequence[tuple[str, Sequence[Row]]], *, metrics: Sequence[str] = METRICS, seed: int = 0
) -> list[Row]:
    """Over folds, or over seeds: for each metric a row per class, and one of the cases' means over classes.

    Rows: metric, class, name, folds {name of the run: {mean, n}}, mean_of_folds and std_of_folds over the runs' means,
    n_folds, and mean, low, high, n pooled over cases. A case that several runs have counts once there, with its mean
    over them: seeds do not make cases. Raises InputError where two runs have one name.
    """
    if len({name for name, _ in runs}) < len(runs):
        raise InputError("two folds have one name, which would make one row of both")
    names = {row["class"]: row["name"] for _, rows in runs for row in rows}
    table = []
    for metric in metrics:
        for cls, name in {**names, OVERALL: OVERALL_NAME}.items():
            scores = {run: case_means(select(rows, cls), metric) for run, rows in runs}
            table.append({"metric": metric, "class": cls, "name": name, **over_folds(scores, seed)})
    return table


def select(rows: Iterable[Row], cls: Any) -> list[Row]:
    """The rows of one class, or all."""
    return [row for row in rows if cls in (row["class"], OVERALL)]


def over_folds(scores: Mapping[str, Mapping[str, float]], seed: int) -> Row:
    """From one score per fold and case to means over folds and over cases."""
    folds = {run: spread(list(cases.values())) for run, cases in scores.items()}
    means = spread([fold["mean"] for fold in folds.values()])
    pooled: dict[str, list[float]] = {}
    for cases in scores.values():
        for case, value in cases.items():
            pooled.setdefault(case, []).append(value)
    interval = mean_interval([spread(values)["mean"] for values in pooled.values()], seed=seed)
    return {
        "folds": {run: {"mean": fold["mean"], "n": fold["n"]} for run, fold in folds.items()},
        "mean_of_folds": means["mean"],
        "std_of_folds": means["std"],
        "n_folds": means["n"],
        **interval._asdict(),
    }
