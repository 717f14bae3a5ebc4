"""What the finished cells of a study say, as numbers.

An entry of the table is one method, fine-tuned in one way, on one number of labels. Its cells are
runs that differ by seeds and folds. A run scores each case by the mean over its organs, and a case
is averaged over the runs that have it: seeds do not make cases. Entries are compared with the
baseline case by case.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import Any

from dae.errors import InputError
from dae.evaluation.cases import read_scores
from dae.evaluation.metrics import ABSENT, Row
from dae.evaluation.report import is_another_label_map
from dae.evaluation.statistics import (
    P_VALUES,
    Interval,
    Scores,
    by_case_and_class,
    case_means,
    compare_pairs,
    holm,
    mean_interval,
    mean_of_pairs,
    means_over_runs,
    paired_case_means,
    paired_scores,
    share_better,
    spread,
)
from dae.study.cells import SCORES, Cell, Folders, in_order
from dae.study.plan import Labels, Plan
from dae.study.runner import (
    Batches,
    is_done,
    made_of,
    other_batch,
    other_versions,
    summary_of,
)

METRICS = ("dice", "nsd", "hd95")
CHOSEN = 0.0  # in place of a factor: each label count and fold has the one that was chosen for it


@dataclass(frozen=True)
class Finished:
    """What a finished cell has left."""

    cell: Cell
    rows: list[Row]
    validation: Mapping[str, Any]  # last and best Dice of the cases that fine-tuning validated on
    batches: Batches  # of its training runs
    device: str  # "cpu", "cuda:0"; "" of older versions
    terms: Mapping[str, Any]  # what its scores are of: hashes of label maps and more


@dataclass
class Entry:
    """One method on one number of labels. `against` is filled once all entries are there."""

    method: str
    tuning: str
    factor: float  # of the learning rate, or CHOSEN
    labels: Labels
    planned: int  # how many runs
    runs: list[Finished]
    scores: dict[str, dict[str, float]]  # of each metric, by case: the mean over the runs
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
            finished[cell.name] = finished_cell(folders, cell)
    check_same_truths(folders, list(finished.values()))

    notes = []
    for name, how in others.items():
        notes.append(f"{name} is left out: another version of the plan made it ({how}).")
    notes += launched_otherwise(list(finished.values()))
    notes += other_devices(list(finished.values()))
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


def finished_cell(folders: Folders, cell: Cell) -> Finished:
    """What is left of it. Raises InputError where a file of it is not as it was written."""
    made = made_of(folders, cell)
    return Finished(
        cell=cell,
        rows=read_scores(folders.kept(cell) / SCORES),
        validation=made["validation"],
        batches=made.get("batches", {}),
        device=made.get("device") or "",
        terms=summary_of(folders, cell),
    )


def check_same_truths(folders: Folders, finished: Sequence[Finished]) -> None:
    """Raises InputError where two cells were scored against different label maps of one case.

    Labels that have changed meanwhile, or two cases of one name, would be averaged as one case.
    """
    first_with: dict[str, Finished] = {}
    for run in finished:
        for case in run.terms.get("labels", {}):
            before = first_with.setdefault(case, run)
            if is_another_label_map(case, before.terms, run.terms):
                raise InputError(
                    f"{folders.kept(run.cell)}: scored against another label map of case {case} "
                    f"than {before.cell.name}; remove the one that is wrong, and it is run again"
                )


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


def other_devices(finished: Sequence[Finished]) -> list[str]:
    """A note where cells were trained on processors of several kinds."""
    kinds = Counter(run.device.split(":")[0] for run in finished if run.device)
    if len(kinds) < 2:
        return []
    numbers = ", ".join(f"{number} on {kind}" for kind, number in sorted(kinds.items()))
    return [f"Not all cells were trained on one kind of device ({numbers}): --amp auto differs."]


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
    scores = {}
    for metric in METRICS:
        scores[metric] = means_over_runs(case_means(run.rows, metric) for run in runs)
    first = cells[0]
    return Entry(
        method=first.method,
        tuning=first.tuning,
        factor=factor,
        labels=first.labels,
        planned=len(cells),
        runs=runs,
        scores=scores,
        means={metric: mean_interval(scores[metric].values()) for metric in METRICS},
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

    The pairs of a case are averaged over the pairs of runs, and `left_out` counts organs of single
    ones. With `share_better`, the share of resamples of the cases in which B is the better one, and
    `same_seeds`, whether the runs of a pair have one tuning seed.
    """
    pairs_of_case: dict[str, list[Scores]] = {}
    in_all = Counter[str]()
    runs = pairs_of_runs(a, b)
    for run_a, run_b in runs:
        of_a = by_case_and_class(run_a.rows, run_a.cell.name)
        of_b = by_case_and_class(run_b.rows, run_b.cell.name)
        pairs, left_out = paired_scores(of_a, of_b, metric)
        in_all += sum(left_out.values(), Counter[str]())
        for case, scores in paired_case_means(pairs).items():
            pairs_of_case.setdefault(case, []).append(scores)

    means = [mean_of_pairs(pairs) for pairs in pairs_of_case.values()]
    return {
        **compare_pairs(means, in_all, metric, seed=0),
        "share_better": share_better(means, metric, seed=0),
        "same_seeds": any(x.cell.seed == y.cell.seed for x, y in runs),
    }


def pairs_of_runs(a: Entry, b: Entry) -> list[tuple[Finished, Finished]]:
    """Each run of A with each run of B of its fold and tuning seed; of its fold alone, if they
    share no seed.

    While a study is under way one has more runs than the other. Runs of one tuning seed see the
    same crops in the same order, and a seed can matter more than a method.
    """
    every = product(a.runs, b.runs)
    same_fold = [(x, y) for x, y in every if x.cell.fold == y.cell.fold]
    same_seed = [(x, y) for x, y in same_fold if x.cell.seed == y.cell.seed]
    return same_seed or same_fold


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
    """Notes on the scores that a mean holds and its difference to the baseline does not, and on
    differences between other seeds.
    """
    notes = []
    for entry in entries:
        if not entry.against:
            continue
        where = f"{entry.name} on {labels_in_words(entry.labels)}"
        left_out = entry.against["dice"]["left_out"]
        number = sum(n for reason, n in left_out.items() if not reason.endswith("in A and B"))
        if number:
            notes.append(
                f"{where}: {number} Dice, of a class in a case of a run, are there for it or for "
                f"{plan.baseline} alone, and left out of the difference."
            )
        if entry.against["dice"]["n"] and not entry.against["dice"]["same_seeds"]:
            notes.append(
                f"{where}: no tuning seed is there for it and for {plan.baseline} yet; the "
                "difference is between runs of other seeds."
            )
    return notes


def distances_left_out(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    """For each number of labels a note on the cases whose HD95 lacks an organ."""
    notes = []
    for labels in plan.labels:
        counts = []
        for entry in entries:
            if entry.labels == labels and entry.left_out["hd95"]:
                cases = len(entry.scores["hd95"])
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
    known = [sd for sd in (noise_of(plan, a).runs, noise_of(plan, b).runs) if isfinite(sd)]

    text = (
        f"{b.name} against {a.name} on {labels_in_words(a.labels)}: difference "
        f"{signed(difference['difference'])} over {difference['n']} cases"
    )
    if known:
        text += f"; SD between seeds {noise_in_words(plan, b)} and {noise_in_words(plan, a)}"
    text += ". "
    if not difference["n"]:
        return text + "No case has scores of both."
    if not isfinite(difference["low"]):
        return text + "One case cannot tell them apart."
    if difference["low"] <= 0 <= difference["high"]:
        return text + "The data cannot tell them apart: the interval over cases holds 0."
    if not known:
        return text + "The interval leaves out 0; how much seeds differ is not known from one run."

    by_chance = noise_of_difference(known, pairs_of_runs(a, b))
    if abs(difference["difference"]) <= by_chance:
        return text + f"The data cannot tell them apart: seeds alone may make {by_chance:.4f}."
    return text + (
        f"The interval leaves out 0, and the difference is larger than the {by_chance:.4f} that "
        "seeds alone may make."
    )


def noise_of_difference(
    known: Sequence[float], pairs: Sequence[tuple[Finished, Finished]]
) -> float:
    """How large a difference between the means of these runs other seeds alone may make: two
    standard deviations of it.

    known: the standard deviation of single runs, of both methods or of the one that has several.
    """
    variance = fmean(sd**2 for sd in known)
    runs_of_a, runs_of_b = zip(*pairs)
    return 2 * sqrt(variance / independent_runs(runs_of_a) + variance / independent_runs(runs_of_b))


def independent_runs(runs: Sequence[Finished]) -> int:
    """As how many runs these count. Where each of three pre-trainings is fine-tuned with each of
    three seeds, either kind of seed may make all of the spread: nine runs count as three.
    """
    kinds = {len({run.cell.pretraining.seed for run in runs}), len({run.cell.seed for run in runs})}
    return min(kinds - {1}, default=1)


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
