"""table.md, table.csv, cases.csv and figure.png: what a study shows, complete or not."""

from collections.abc import Sequence
from math import isfinite, nan
from typing import Any

from dae.errors import InputError
from dae.evaluation.cases import write_csv
from dae.evaluation.report import aligned, p_value
from dae.evaluation.statistics import P_VALUES, RESAMPLES, Interval
from dae.figures import new_figure, png
from dae.files import write_bytes
from dae.study.cells import Cell, Folders
from dae.study.plan import Labels, Plan
from dae.study.results import (
    METRICS,
    Entry,
    Results,
    decimal,
    labels_in_words,
    noise_of,
    percent,
    results_of,
    signed,
    verdict,
)

TABLES = ("table.md", "table.csv", "cases.csv", "figure.png")


def write_tables(plan: Plan, folders: Folders, cells: Sequence[Cell]) -> None:
    """All four files, from the cells that are finished."""
    results = results_of(plan, folders, cells)
    folders.out.mkdir(parents=True, exist_ok=True)
    write_bytes(folders.out / "table.md", page(plan, results).encode())

    lines = lines_of_csv(plan, results)
    write_csv(lines, folders.out / "table.csv", list(lines[0]))
    cases = cases_of_csv(results)
    if cases:
        write_csv(cases, folders.out / "cases.csv", list(cases[0]))
        write_bytes(folders.out / "figure.png", picture(plan, results))
    else:  # those of an older version would stand beside the new table
        (folders.out / "cases.csv").unlink(missing_ok=True)
        (folders.out / "figure.png").unlink(missing_ok=True)


def check_tables(plan: Plan, folders: Folders) -> None:
    """Raises InputError where the tables would replace files that are not of a study of this name.

    table.md is written first, and its first line says whose it is.
    """
    page = folders.out / "table.md"
    own = page.is_file() and page.read_bytes().startswith(f"{heading(plan)}\n".encode())
    for name in TABLES:
        path = folders.out / name
        if path.exists() and not own:
            raise InputError(
                f'{path}: is there already, and is not of the study "{plan.name}"; give another '
                "--out, or move it away"
            )


# --- Markdown


def heading(plan: Plan) -> str:
    return f"# {plan.name}"


def page(plan: Plan, results: Results) -> str:
    """A table as the paper's, then every comparison, the noise between seeds, and notes."""
    parts = [heading(plan), plan.description, protocol(plan)]
    parts.append(aligned(overview(plan, results.entries)))
    parts.append(not_run_yet(results.entries))
    parts.append(aligned(comparisons(plan, results.entries)))
    noise = noise_lines(plan, results.entries) or ["Nothing can be compared yet."]
    parts += ["## What the data can tell apart", "\n".join(noise)]

    notes = results.notes + small_numbers(results.entries)
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def protocol(plan: Plan) -> str:
    """What was scored, how it was averaged, and what the columns mean."""
    dice = (
        "Dice is the mean over cases, each averaged over its runs (seeds and folds). In brackets "
        f"is the difference to {plan.baseline}, case by case, over the tuning seeds that both have."
    )
    intervals = (
        "The 95 % intervals are over cases: Student's t below 20 cases, else the percentile "
        "bootstrap."
    )
    holm = "p, Holm: the sign-flip p, corrected for the number of methods on the same labels."
    above = (
        f"above {plan.baseline}: in how many of {RESAMPLES:,} resamples of the cases the method's "
        f"mean Dice is above that of {plan.baseline}. Runs are averaged first, and seeds are not "
        "resampled: it says nothing about other seeds."
    )
    deviation = (
        "SD of runs: the standard deviation of the mean Dice between runs of other seeds. What "
        "seeds alone may make of a difference is two standard deviations of it, from those of both "
        "rows, or of the one that has several runs."
    )
    lines = [*what_is_scored(plan), dice, intervals, holm, above, deviation]
    return "\n".join(f"- {line}" for line in lines)


def what_is_scored(plan: Plan) -> list[str]:
    """The lists and the checkpoint, with what a reader must know of them."""
    lists = {name: path for name, path in plan.data.items() if name != "phantoms"}
    tuned_on = lists.get("finetune", "phantoms")
    cases = f"the {plan.split} cases of {lists.get('test', tuned_on)}"
    if plan.folds:
        cases += f", in folds {', '.join(map(str, plan.folds))}"

    checkpoint = "The last checkpoint of fine-tuning is scored"
    if plan.checkpoint == "best.pt":
        checkpoint = "The checkpoint with the best validation Dice of fine-tuning is scored"
    scored = f"{checkpoint}, on {cases}."
    if plan.checkpoint == "best.pt" and plan.split == "validation" and "test" not in plan.data:
        scored += (
            " It was selected on the very cases that are reported, so the scores are too high."
        )

    pretrained_on = lists.get("pretrain", "phantoms")
    lines = [f"Pre-trained on {pretrained_on}, fine-tuned on {tuned_on}.", scored]
    if any(labels != "all" for labels in plan.labels):
        runs = "every run of one fold" if plan.folds else "every run"
        lines.append(
            f"Fewer labels are those of the same subjects in {runs}: what another choice of them "
            "would change is in no interval."
        )
    return lines


def overview(plan: Plan, entries: Sequence[Entry]) -> list[list[str]]:
    """A row for each method that has runs, a column for each number of labels."""
    columns: list[Labels] = list(plan.labels)
    table = [["Dice", *map(labels_in_words, columns)]]
    for name in dict.fromkeys(entry.name for entry in entries if entry.runs):
        line = [name]
        for labels in columns:
            found = [entry for entry in entries if (entry.name, entry.labels) == (name, labels)]
            line.append(short(found[0]) if found else "–")
        table.append(line)
    return table


def not_run_yet(entries: Sequence[Entry]) -> str:
    """A line on the methods that have no row."""
    with_runs = {entry.name for entry in entries if entry.runs}
    names = dict.fromkeys(entry.name for entry in entries if entry.name not in with_runs)
    return f"Not run yet: {'; '.join(names)}." if names else ""


def short(entry: Entry) -> str:
    """0.8123 (+0.0045), and how many runs are there where some are missing."""
    if not entry.runs:
        return "–"
    text = decimal(entry.means["dice"].mean)
    if entry.against:
        text += f" ({signed(entry.against['dice']['difference'])})"
    return text if len(entry.runs) == entry.planned else f"{text}, {runs_in_words(entry)}"


def runs_in_words(entry: Entry) -> str:
    return f"{len(entry.runs)} of {entry.planned} runs"


def comparisons(plan: Plan, entries: Sequence[Entry]) -> list[list[str]]:
    """A line for each entry that has runs, by number of labels."""
    head = ["labels", "method", "runs", "cases", "Dice", "95 %", "difference", "its 95 %"]
    head += [f"above {plan.baseline}", "t p", "Wilcoxon p", "sign-flip p", "p, Holm", "SD of runs"]
    table = [head]
    for labels in plan.labels:
        for entry in entries:
            if entry.labels == labels and entry.runs:
                table.append(comparison(plan, entry))
    return table


def comparison(plan: Plan, entry: Entry) -> list[str]:
    mean = entry.means["dice"]
    line = [labels_in_words(entry.labels), entry.name, f"{len(entry.runs)} of {entry.planned}"]
    line += [str(mean.n), decimal(mean.mean), between(mean.low, mean.high)]
    if entry.against:
        against = entry.against["dice"]
        line += [signed(against["difference"]), between(against["low"], against["high"])]
        line.append(percent(against["share_better"]))
        line += [p_value(against[p]) for p in (*P_VALUES, "sign_flip_p_holm")]
    else:
        line += ["–"] * 7
    return [*line, decimal(noise_of(plan, entry).runs)]


def between(low: float, high: float) -> str:
    return f"{low:.4f} to {high:.4f}" if isfinite(low) else "–"


def noise_lines(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    """For each number of labels the headline pair, then every other method and the baseline."""
    lines = []
    for labels in plan.labels:
        for tuning in plan.tunings:
            column: dict[str, Entry] = {}
            for entry in entries:
                if (entry.labels, entry.tuning) == (labels, tuning) and entry.runs:
                    column.setdefault(entry.method, entry)

            pairs = [plan.headline] if len(plan.headline) == 2 else []
            pairs += [(method, plan.baseline) for method in plan.methods]
            told = set[frozenset[str]]()
            for pair in pairs:
                b, a = pair
                if a == b or frozenset(pair) in told or not {a, b} <= set(column):
                    continue
                told.add(frozenset(pair))
                lines.append(f"- {verdict(plan, column[a], column[b])}")
    return lines


def small_numbers(entries: Sequence[Entry]) -> list[str]:
    """Where no exact test can reach p = .05, whatever the scores are."""
    numbers = {entry.means["dice"].n for entry in entries if entry.runs}
    few = [n for n in sorted(numbers) if n < 6]
    return [f"With {n} cases the least p of an exact test is {min(1, 2 / 2**n):g}." for n in few]


# --- CSV


def lines_of_csv(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """A line for each entry and metric."""
    lines = []
    for entry in results.entries:
        noise = noise_of(plan, entry)
        for metric in METRICS:
            mean: Interval = entry.means[metric]
            line: dict[str, Any] = {
                "metric": metric,
                "labels": entry.labels,
                "method": entry.method,
                "tuning": entry.tuning,
                "lr_factor": entry.factor or "chosen",
                "runs": len(entry.runs),
                "runs_planned": entry.planned,
                "cases": mean.n,
                "mean": mean.mean,
                "low": mean.low,
                "high": mean.high,
                "cases_lacking_an_organ": entry.left_out[metric],
            }
            against = entry.against.get(metric, {})
            for key in ("n", "difference", "low", "high"):
                line[f"against_{key}"] = against.get(key, nan)
            line["share_better"] = against.get("share_better", nan)
            for p in P_VALUES:
                line[p] = against.get(p, nan)
                line[f"{p}_holm"] = against.get(f"{p}_holm", nan)
            if metric == "dice":
                line |= {"sd_runs": noise.runs, "sd_pretraining": noise.pretraining}
                line |= {"sd_tuning": noise.tuning}
            else:
                line |= dict.fromkeys(("sd_runs", "sd_pretraining", "sd_tuning"), nan)
            lines.append(line)
    return lines


def cases_of_csv(results: Results) -> list[dict[str, Any]]:
    """A line for each entry and case: the mean over classes, averaged over runs."""
    lines = []
    for entry in results.entries:
        for case in entry.scores["dice"]:
            line = {
                "labels": entry.labels,
                "method": entry.method,
                "tuning": entry.tuning,
                "lr_factor": entry.factor or "chosen",
                "case": case,
            }
            lines.append(line | {metric: entry.scores[metric][case] for metric in METRICS})
    return lines


# --- figure


def picture(plan: Plan, results: Results) -> bytes:
    """A line for each method, a column for each number of labels; 95 % intervals.

    Above the mean Dice, with that of the baseline as a vertical line; below the difference to it.
    """
    with_runs = [entry for entry in results.entries if entry.runs]
    names = list(dict.fromkeys(entry.name for entry in with_runs))

    columns = len(plan.labels)
    figure = new_figure(3 + 3 * columns, 2 * (1 + 0.2 * len(names)))
    axes = figure.subplots(2, columns, squeeze=False, sharex="row", sharey=True)
    for column, labels in enumerate(plan.labels):
        above, below = axes[:, column]
        above.set_title(labels_in_words(labels))
        for entry in with_runs:
            if entry.labels != labels:
                continue
            line = names.index(entry.name)
            draw(above, line, entry.means["dice"])
            if entry.name == plan.baseline:
                above.axvline(entry.means["dice"].mean, color="black", linewidth=0.8)
            if entry.against:
                row = entry.against["dice"]
                draw(below, line, Interval(row["difference"], row["low"], row["high"], row["n"]))
        below.axvline(0, color="black", linewidth=0.8)
        above.set_xlabel("mean Dice over cases")
        below.set_xlabel(f"difference to {plan.baseline}")

    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)  # the first method on top
    for ax in axes.flat:
        ax.grid(axis="y", alpha=0.3)
    return png(figure)


def draw(ax: Any, line: int, interval: Interval) -> None:
    """A point with its interval."""
    below = zero_if_none(interval.mean - interval.low)
    above = zero_if_none(interval.high - interval.mean)
    ax.errorbar(
        interval.mean, line, xerr=[[below], [above]], fmt="o", color="C0", markersize=4, capsize=2
    )


def zero_if_none(width: float) -> float:
    """One case has no interval."""
    return max(0.0, width) if isfinite(width) else 0.0
