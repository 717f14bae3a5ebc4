"""The table of what is there so far."""

from collections.abc import Sequence

from dae.evaluation.cases import read_scores
from dae.evaluation.report import aligned
from dae.evaluation.statistics import case_means, mean_interval, spread
from dae.files import write_bytes
from dae.study.cells import KEPT, Cell, Folders, in_order, labels_in_name
from dae.study.plan import Plan


def write_tables(plan: Plan, folders: Folders, cells: Sequence[Cell]) -> None:
    """table.md: mean Dice over cases with its interval, a row for each method."""
    columns = in_order(cells, lambda cell: cell.labels)
    table = [["Dice", *map(labels_in_name, columns)]]
    for row in in_order(cells, lambda cell: (cell.method, cell.tuning, cell.factor)):
        method, tuning, factor = row
        line = [" ".join(part for part in (method, tuning, factor_in_words(factor)) if part)]
        for labels in columns:
            wanted = []
            for cell in cells:
                if (cell.method, cell.tuning, cell.factor, cell.labels) == (*row, labels):
                    wanted.append(cell)
            line.append(entry(folders, wanted))
        table.append(line)
    write_bytes(folders.out / "table.md", (aligned(table) + "\n").encode())


def entry(folders: Folders, wanted: Sequence[Cell]) -> str:
    """Mean Dice over cases, each averaged over its runs, with its interval; how many runs."""
    done = [cell for cell in wanted if (folders.kept(cell) / KEPT[-1]).is_file()]
    by_case: dict[str, list[float]] = {}
    for cell in done:
        for case, dice in case_means(
            read_scores(folders.kept(cell) / "scores.csv"), "dice"
        ).items():
            by_case.setdefault(case, []).append(dice)
    if not by_case:
        return f"- 0/{len(wanted)}"
    mean = mean_interval([spread(values)["mean"] for values in by_case.values()])
    return f"{mean.mean:.4f} [{mean.low:.4f}, {mean.high:.4f}] {len(done)}/{len(wanted)}"


def factor_in_words(factor: float) -> str:
    return "" if factor == 1 else f"lr x{factor:g}"
