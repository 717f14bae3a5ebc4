"""What the finished cells of a study say, as numbers.

An entry of the table is one method, fine-tuned in one way, on one number of labels. Its cells are
runs that differ by seeds and folds. A case is averaged over the runs that have it before anything
is compared: seeds do not make cases. Entries are compared with the baseline case by case.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import Any

from dae.evaluation.cases import read_scores
from dae.evaluation.metrics import ABSENT, Row
from dae.evaluation.statistics import (
    P_VALUES,
    Interval,
    by_case_and_class,
    case_means,
    compare_pairs,
    holm,
    mean_interval,
    paired_case_means,
    paired_scores,
    share_better,
    spread,
)
from dae.study.cells import KEPT, Cell, Folders, in_order
from dae.study.plan import Labels, Plan
from dae.study.runner import Batches, is_done, made_of, other_batch, other_versions

METRICS = ("dice", "nsd", "hd95")
CHOSEN = 0.0  # in place of a factor: each label count and fold has the one that was chosen for it


@dataclass(frozen=True)
class Finished:
    """What a finished cell has left."""

    cell: Cell
    rows: list[Row]
    validation: Mapping[str, Any]  # last and best Dice of the cases that fine-tuning validated on
    batches: Batches  # of its training runs


@dataclass
class Entry:
    """One method on one number of labels. `against` is filled once all entries are there."""

    method: str
    tuning: str
    factor: float  # of the learning rate, or CHOSEN
    labels: Labels
    planned: int  # how many runs
    runs: list[Finished]
    rows: list[Row]  # of each case and class, averaged over the runs
    means: dict[str, Interval]  # of each metric over cases
    left_out: dict[str, int]  # metric -> how many cases have an organ that is not in the mean
    against: dict[str, Row] = field(default_factory=dict)  # metric -> difference to the baseline

    @property
    def name(self) -> str:
        parts = [self.method, self.tuning]
        if self.factor not in (CHOSEN, 1):
            parts.append(f"lr x{self.factor:g}")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Results:
    """All entries, and what a reader must know beside them."""

    entries: list[Entry]
    notes: list[str]


def results_of(plan: Plan, folders: Folders, cells: Sequence[Cell]) -> Results:
    """Everything that the finished cells of this plan say so far."""
    others = other_versions(plan, folders, cells)
    finished: dict[str, Finished] = {}
    for cell in cells:
        if is_done(folders, cell) and cell.name not in others:
            content = made_of(folders, cell)
            rows = read_scores(folders.kept(cell) / KEPT[0])
            batches = content.get("batches", {})
            finished[cell.name] = Finished(cell, rows, content["validation"], batches)

    notes = []
    for name, how in others.items():
        notes.append(f"{name} is left out: another version of the plan made it ({how}).")
    notes += launched_otherwise(list(finished.values()))
    entries: list[Entry] = []
    for method, tuning in in_order(cells, lambda cell: (cell.method, cell.tuning)):
        for labels in plan.labels_of(method):
            group = []
            for cell in cells:
                if (cell.method, cell.tuning, cell.labels) == (method, tuning, labels):
                    group.append(cell)
            made, note = entries_of(plan, group, finished)
            entries += made
            if any(entry.runs for entry in made):
                notes += note
    for labels in plan.labels:
        for tuning in plan.tunings:
            column = [e for e in entries if (e.labels, e.tuning) == (labels, tuning)]
            compare_with_baseline(plan, column)
    notes += (
        without_baseline(plan, entries)
        + unpaired(plan, entries)
        + distances_left_out(plan, entries)
    )
    return Results(entries, notes)


def launched_otherwise(finished: Sequence[Finished]) -> list[str]:
    """A note on each cell that was trained on another number of ranks than one before it."""
    notes = []
    for number, run in enumerate(finished):
        for before in finished[:number]:
            how = other_batch(run.batches, before.batches)
            if how:
                notes.append(
                    f"{run.cell.name} is of another recipe than {before.cell.name} ({how})."
                )
                break
    return notes


# --- entries, and the learning rate of scratch


def entries_of(
    plan: Plan, group: Sequence[Cell], finished: Mapping[str, Finished]
) -> tuple[list[Entry], list[str]]:
    """The entry of a method on one number of labels; one for each learning rate where none of them
    could be chosen. With notes on that.
    """
    factors = in_order(group, lambda cell: cell.factor)
    if len(factors) == 1:
        return [entry_of(group, finished, factors[0])], []

    chosen, how = choose_factors(plan, group, finished)
    name = f"{group[0].method} on {labels_in_words(group[0].labels)}"
    if chosen:
        best = [cell for cell in group if cell.factor == chosen[cell.fold]]
        return [entry_of(best, finished, CHOSEN)], [f"{name}: {how}"]

    entries = []
    for factor in factors:
        of_factor = [cell for cell in group if cell.factor == factor]
        entries.append(entry_of(of_factor, finished, factor))
    return entries, [f"{name}: {how}"]


def choose_factors(
    plan: Plan, group: Sequence[Cell], finished: Mapping[str, Finished]
) -> tuple[dict[int | None, float], str]:
    """For each fold the factor of the learning rate that is better on cases that are not reported
    there; nothing where there are no such cases yet. And how, in words.
    """
    if any(cell.name not in finished for cell in group):
        return {}, "its learning rate is chosen once all of its runs are there."

    runs = [finished[cell.name] for cell in group]
    factors = in_order(group, lambda cell: cell.factor)
    folds = in_order(group, lambda cell: cell.fold)
    if plan.split == "test" or "test" in plan.data:
        key = "dice" if plan.checkpoint == "last.pt" else "best_dice"
        if all(run.validation.get(key) is None for run in runs):
            return {}, (
                "no learning rate is chosen, as no case was validated on; every rate has its row, "
                "and the first is the baseline."
            )
        by_factor = {}
        for factor in factors:
            of_factor = [run for run in runs if run.cell.factor == factor]
            by_factor[factor] = fmean(run.validation.get(key) or 0.0 for run in of_factor)
        best = max(factors, key=lambda factor: by_factor[factor])
        dice = ", ".join(f"x{factor:g} {by_factor[factor]:.4f}" for factor in factors)
        how = f"learning rate x{best:g}, chosen by the Dice of the validation cases ({dice})."
        return dict.fromkeys(folds, best), how

    if len(folds) < 2:
        return {}, (
            "no learning rate is chosen, as there are no other cases than those that are reported; "
            "every rate has its row, and the first is the baseline."
        )
    chosen = {}
    for fold in folds:
        by_factor = {}
        for factor in factors:
            elsewhere = [r for r in runs if r.cell.factor == factor and r.cell.fold != fold]
            by_factor[factor] = fmean(mean_dice(run.rows) for run in elsewhere)
        chosen[fold] = max(factors, key=lambda factor: by_factor[factor])
    rates = ", ".join(f"fold {fold} x{factor:g}" for fold, factor in chosen.items())
    return chosen, f"learning rate of each fold chosen by the Dice of the other folds ({rates})."


def entry_of(cells: Sequence[Cell], finished: Mapping[str, Finished], factor: float) -> Entry:
    runs = [finished[cell.name] for cell in cells if cell.name in finished]
    rows = averaged([run.rows for run in runs])
    first = cells[0]
    return Entry(
        method=first.method,
        tuning=first.tuning,
        factor=factor,
        labels=first.labels,
        planned=len(cells),
        runs=runs,
        rows=rows,
        means={metric: mean_interval(case_means(rows, metric).values()) for metric in METRICS},
        left_out={metric: cases_left_out(runs, metric) for metric in METRICS},
    )


def cases_left_out(runs: Sequence[Finished], metric: str) -> int:
    """How many cases have an organ without a finite score in a run: one that is missed or spurious
    has no distance.

    The mean of such a case is over its other organs, or over its other runs.
    """
    cases = set[str]()
    for run in runs:
        for row in run.rows:
            if row["status"] != ABSENT and not isfinite(row[metric]):
                cases.add(row["case"])
    return len(cases)


def averaged(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each case and class one row: the mean over the runs that have a finite score."""
    alike: dict[tuple[str, int], list[Row]] = {}
    for rows in runs:
        for row in rows:
            alike.setdefault((row["case"], row["class"]), []).append(row)

    result = []
    for rows_of_class in alike.values():
        mean = dict(rows_of_class[0])
        for metric in METRICS:
            finite = [row[metric] for row in rows_of_class if isfinite(row[metric])]
            if finite:
                mean[metric] = fmean(finite)
        result.append(mean)
    return result


def mean_dice(rows: Sequence[Row]) -> float:
    return spread(list(case_means(rows, "dice").values()))["mean"]


# --- differences


def compare_with_baseline(plan: Plan, column: Sequence[Entry]) -> None:
    """Fill `against` of the entries of one number of labels, with p corrected over them (Holm)."""
    baselines = [entry for entry in column if entry.method == plan.baseline and entry.runs]
    if not baselines:
        return

    compared = [entry for entry in column if entry is not baselines[0] and entry.runs]
    for metric in METRICS:
        for entry in compared:
            entry.against[metric] = difference_of(baselines[0], entry, metric)
        for p in P_VALUES:
            corrected = holm([entry.against[metric][p] for entry in compared])
            for entry, value in zip(compared, corrected):
                entry.against[metric][f"{p}_holm"] = value


def difference_of(a: Entry, b: Entry, metric: str) -> Row:
    """B minus A over the cases that both have, as `statistics.compare` says it of all classes.

    With `share_better`, the share of resamples of the cases in which B is the better one.
    """
    rows_of_a, rows_of_b = rows_of_shared_seeds(a, b)
    pairs, left_out = paired_scores(
        by_case_and_class(rows_of_a, a.name), by_case_and_class(rows_of_b, b.name), metric
    )
    in_all = sum(left_out.values(), Counter[str]())
    means = paired_case_means(pairs)
    share = share_better(means, metric, seed=0)
    return {**compare_pairs(means, in_all, metric, seed=0), "share_better": share}


def rows_of_shared_seeds(a: Entry, b: Entry) -> tuple[list[Row], list[Row]]:
    """The rows of both, averaged over the runs whose fold and tuning seed both have; all if they
    share none.

    While a study is under way one has more runs than the other. Runs of one tuning seed see the
    same crops in the same order, and a seed can matter more than a method. A case is scored in one
    fold, so it needs the seeds of that fold.
    """
    shared = {fold_and_seed(run) for run in a.runs} & {fold_and_seed(run) for run in b.runs}
    if not shared:
        return a.rows, b.rows

    of_a = [run.rows for run in a.runs if fold_and_seed(run) in shared]
    of_b = [run.rows for run in b.runs if fold_and_seed(run) in shared]
    return averaged(of_a), averaged(of_b)


def fold_and_seed(run: Finished) -> tuple[int | None, int]:
    return run.cell.fold, run.cell.seed


def without_baseline(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    """A note for each number of labels on which nothing can be compared yet."""
    with_runs = {entry.labels for entry in entries if entry.runs}
    compared = {e.labels for e in entries if e.runs and e.method == plan.baseline}
    notes = []
    for labels in plan.labels:
        if labels in with_runs - compared:
            notes.append(
                f"Nothing is compared on {labels_in_words(labels)}: {plan.baseline} has no run "
                "there yet."
            )
    return notes


def unpaired(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    """Notes on the scores that a mean holds and its difference to the baseline does not."""
    notes = []
    for entry in entries:
        left_out = entry.against["dice"]["left_out"] if entry.against else {}
        number = sum(n for reason, n in left_out.items() if not reason.endswith("in A and B"))
        if number:
            notes.append(
                f"{entry.name} on {labels_in_words(entry.labels)}: {number} Dice of a class in a "
                f"case are there for it or for {plan.baseline} alone, and left out of the "
                "difference."
            )
    return notes


def distances_left_out(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    """For each number of labels a note on the cases whose HD95 lacks an organ."""
    notes = []
    for labels in plan.labels:
        counts = []
        for entry in entries:
            if entry.labels == labels and entry.left_out["hd95"]:
                cases = len({row["case"] for row in entry.rows})
                counts.append(f"{entry.name} {entry.left_out['hd95']} of {cases}")
        if counts:
            notes.append(
                f"HD95 in table.csv, on {labels_in_words(labels)}: an organ that is missed or "
                "spurious has no distance and is left out, which favours whoever misses more. "
                f"Cases with such an organ in a run: {', '.join(counts)}."
            )
    return notes


# --- the noise between seeds


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a method's mean Dice; nan where there are not two runs."""

    runs: float  # between all runs, each a pre-training seed with a tuning seed
    pretraining: float  # between pre-training seeds of the same tuning seeds, averaged over these
    tuning: float  # between tuning seeds of one pre-training seed


def noise_of(plan: Plan, entry: Entry) -> Noise:
    """Of the seeds that have all folds."""
    folds = len(plan.folds or (None,))
    by_seeds: dict[tuple[int, int], list[float]] = {}
    for run in entry.runs:
        seeds = (run.cell.pretraining.seed, run.cell.seed)
        by_seeds.setdefault(seeds, []).append(mean_dice(run.rows))

    by_pretraining: dict[int, list[float]] = {}
    for (pretraining, _), dice in by_seeds.items():
        if len(dice) == folds:
            by_pretraining.setdefault(pretraining, []).append(fmean(dice))

    groups = list(by_pretraining.values())
    # Where each pre-training seed has a tuning seed of its own, their effects cannot be told apart.
    crossed = plan.seeds.get("crossed", True) or plan.seeds_of("finetune", entry.method) == 1
    runs = [dice for group in groups for dice in group]
    squares = sum(stdev(group) ** 2 * (len(group) - 1) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups)
    return Noise(
        runs=stdev(runs) if len(runs) > 1 else nan,
        pretraining=stdev(map(fmean, groups)) if len(groups) > 1 and crossed else nan,
        tuning=sqrt(squares / freedom) if freedom else nan,
    )


def verdict(plan: Plan, a: Entry, b: Entry) -> str:
    """In a plain sentence whether the data can tell B from A."""
    difference = difference_of(a, b, "dice")
    noises = [noise_of(plan, a).runs, noise_of(plan, b).runs]
    noise = sqrt(fmean([sd**2 for sd in noises])) if all(map(isfinite, noises)) else nan

    text = (
        f"{b.name} against {a.name} on {labels_in_words(a.labels)}: difference "
        f"{signed(difference['difference'])} over {difference['n']} cases"
    )
    if any(map(isfinite, noises)):
        text += f"; SD between seeds {noise_in_words(plan, b)} and {noise_in_words(plan, a)}"
    text += ". "
    if not difference["n"]:
        return text + "No case has scores of both."
    if not isfinite(difference["low"]):
        return text + "One case cannot tell them apart."
    if difference["low"] <= 0 <= difference["high"]:
        return text + "The data cannot tell them apart: the interval over cases holds 0."
    if abs(difference["difference"]) < noise:
        return text + "The data cannot tell them apart: seeds of one method differ as much."
    if not isfinite(noise):
        return text + "The interval leaves out 0; how much seeds differ is not known from one run."
    return text + "The interval leaves out 0, and the difference is larger than that of seeds."


def noise_in_words(plan: Plan, entry: Entry) -> str:
    """The standard deviation between runs, and what it does not hold."""
    noise = noise_of(plan, entry).runs
    pretrainings = {run.cell.pretraining.seed for run in entry.runs}
    shared = isfinite(noise) and len(pretrainings) == 1 and not plan.is_scratch(entry.method)
    return f"{decimal(noise)} (of one pre-training)" if shared else decimal(noise)


# --- in words


def labels_in_words(labels: Labels) -> str:
    """5 -> "5 labels", 0.2 -> "20 % of the labels"."""
    if labels == "all":
        return "all labels"
    if labels < 1:
        return f"{100 * labels:g} % of the labels"
    return "1 label" if labels == 1 else f"{labels:g} labels"


def decimal(value: float) -> str:
    return f"{value:.4f}" if isfinite(value) else "–"


def percent(share: float) -> str:
    """0.031 -> "3 %". Only what is 0 or 1 is rounded to 0 or 100 %."""
    if not isfinite(share):
        return "–"
    if 0 < share < 0.01:
        return "<1 %"
    if 0.99 < share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def signed(value: float) -> str:
    return f"{value:+.4f}" if isfinite(value) else "–"
