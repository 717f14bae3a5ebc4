"""What people read of the scores: summary.json, figures, one HTML page, and tables of a comparison.

Every file appears whole or not at all. JSON has null where there is no number. The page is filled
into page.html, beside this file, and needs nothing beside itself.
"""

import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import combinations
from math import isclose, isfinite, isnan
from pathlib import Path
from string import Template
from typing import Any

from dae.data.listfile import read_json
from dae.data.nifti import LabelMap, difference_in_words, read_image, read_labels
from dae.data.regions import Region, names_of_labels
from dae.errors import InputError
from dae.evaluation.cases import Pair, write_csv
from dae.evaluation.metrics import DISTANCES, OK, Row
from dae.evaluation.statistics import (
    OVERALL_NAME,
    P_VALUES,
    case_means,
    worst_cases,
)
from dae.figures import colours_of, distribution, overlay
from dae.files import write_bytes

# Where people read. Dice, HD and MSD are the columns of Table 2.
SHOWN = {"dice": "Dice", "hd": "HD, mm", "msd": "MSD, mm", "hd95": "HD95, mm", "nsd": "NSD"}

# What the scores of two runs must share, by its name in summary.json, and the flag that decides it.
TERMS = {"definition": "--definition", "ignore": "--ignore", "tolerance_mm": "--tolerance"}
SAME_LENGTH = 1e-3  # of two diagonals: smaller differences are rounding of the header's float32

PAGE = Path(__file__).with_name("page.html")
NO_NUMBER = "–"


# --- summary.json


def strict_json(value: Any, **options: Any) -> str:
    """JSON with null for nan and infinity, which JSON does not have."""
    # Python writes NaN and Infinity, which other readers refuse; they are read back as None.
    with_null = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(with_null, allow_nan=False, **options)


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """summary.json: what `statistics.summarise` gives."""
    write_bytes(path, strict_json(summary, indent=1).encode())


# --- may two runs be compared?


def terms_of(scores: Path) -> dict[str, Any]:
    """The summary.json beside a scores.csv, which says how it was made; empty without one."""
    try:
        summary = read_json(scores.parent / "summary.json")
    except InputError:
        return {}

    # Not every summary.json is ours, nor whole.
    if isinstance(summary, dict) and TERMS.keys() <= summary.keys() and are_terms(summary):
        return summary
    return {}


def are_terms(summary: Mapping[str, Any]) -> bool:
    """Whether what is compared has the kinds of values that eval.py score writes."""
    for key in ("classes", "labels", "diagonals_mm", "regions"):
        if not isinstance(summary.get(key, {}), dict):
            return False
    for scores in summary.get("classes", {}).values():
        if not isinstance(scores, dict) or not isinstance(scores.get("name", ""), str):
            return False
    if not all(isinstance(labels, list) for labels in summary.get("regions", {}).values()):
        return False
    lengths = summary.get("diagonals_mm", {}).values()
    return all(isinstance(mm, int | float | None) for mm in lengths)


def check_terms(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Raises InputError where runs were scored by other definitions, tolerances or label maps.

    `runs` are names with their `terms_of`. Returns a warning that names the runs without any.
    """
    for (a, terms_a), (b, terms_b) in combinations(runs, 2):
        if terms_a and terms_b:
            check_regions(a, b, terms_a.get("regions"), terms_b.get("regions"))
            check_flags(a, b, terms_a, terms_b)
        check_label_maps(a, b, terms_a, terms_b)

    silent = [name for name, terms in runs if "labels" not in terms]
    if len(runs) < 2 or not silent:
        return ""
    return (
        f"warning: {', '.join(silent)}: no summary.json that tells the definition, the tolerance "
        "and the label maps of the scores; whether they can be compared is not known"
    )


def about_policy(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A warning, where the summaries of some runs count a distance that their tables do not."""
    names = [name for name, terms in runs if terms.get("policy") == "diagonal"]
    if not names:
        return ""
    return (
        f"warning: {', '.join(names)}: scored with --policy diagonal, which is for the summary; "
        "here what is missed or spurious has no distance, and is left out"
    )


def check_classes(runs: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """Raises InputError where one label has two names in the scores of two runs."""
    classes = []
    for name, rows in runs:
        classes.append((name, {str(row["class"]): row for row in rows}))
    for (a, classes_a), (b, classes_b) in combinations(classes, 2):
        check_names(a, b, classes_a, classes_b)


def check_regions(a: str, b: str, regions_a: Any, regions_b: Any) -> None:
    """Raises InputError where one was scored by regions, and the other by others or by classes."""
    if regions_a != regions_b:
        by_a = scored_by(regions_a)
        by_b = scored_by(regions_b)
        raise InputError(f"{a} was scored by {by_a}, {b} by {by_b}; score one of them again")


def scored_by(regions: Mapping[str, Sequence[int]] | None) -> str:
    """Like "the regions whole (1, 2), core (1)", or "classes"."""
    if not regions:
        return "classes"
    named = [f"{name} ({', '.join(map(str, labels))})" for name, labels in regions.items()]
    return f"the regions {', '.join(named)}"


def check_flags(a: str, b: str, terms_a: Mapping[str, Any], terms_b: Mapping[str, Any]) -> None:
    """Raises InputError where a flag of eval.py score was another."""
    for term, flag in TERMS.items():
        if term == "tolerance_mm":
            differing = differing_tolerance(terms_a, terms_b)
        elif terms_a[term] != terms_b[term]:
            differing = f"{terms_a[term]} and {terms_b[term]}"
        else:
            differing = ""
        if differing:
            raise InputError(
                f"{a} and {b} were scored with different {flag}: {differing}; "
                "score one of them again"
            )


def differing_tolerance(terms_a: Mapping[str, Any], terms_b: Mapping[str, Any]) -> str:
    """The first class of both that has two tolerances, in words; empty where none has."""
    classes_a = terms_a.get("classes", {})
    classes_b = terms_b.get("classes", {})
    for label in sorted(classes_a.keys() & classes_b.keys()):
        a = tolerance_of_label(terms_a["tolerance_mm"], label)
        b = tolerance_of_label(terms_b["tolerance_mm"], label)
        if a != b:
            return f"{a} and {b} mm for {classes_a[label].get('name', label)}"
    return ""


def tolerance_of_label(tolerance: Any, label: str) -> Any:
    """A class's tolerance in mm, from one number or one for each class."""
    return tolerance.get(label) if isinstance(tolerance, dict) else tolerance


def check_names(a: str, b: str, classes_a: Mapping[str, Any], classes_b: Mapping[str, Any]) -> None:
    """Raises InputError where one label has two names. The number alone is no name."""
    for label in sorted(classes_a.keys() & classes_b.keys()):
        # Labels scored without a list have their number for a name, which says nothing.
        names = {str(classes[label].get("name", label)) for classes in (classes_a, classes_b)}
        names.discard(str(label))
        if len({name.casefold() for name in names}) > 1:
            first, second = sorted(names)
            raise InputError(
                f"{a} and {b}: label {label} is {first} in one and {second} in the other"
            )


def check_label_maps(
    a: str, b: str, terms_a: Mapping[str, Any], terms_b: Mapping[str, Any]
) -> None:
    """Raises InputError where a case has other labels, or the same in voxels of another size."""
    cases = terms_a.get("labels", {}).keys() & terms_b.get("labels", {}).keys()
    for case in sorted(cases):
        if is_another_label_map(case, terms_a, terms_b):
            raise InputError(
                f"{a} and {b} were scored against different label maps of case {case}; "
                "score one of them again"
            )


def is_another_label_map(case: str, terms_a: Mapping[str, Any], terms_b: Mapping[str, Any]) -> bool:
    """Whether the label maps of a case differ, in labels or in the size of voxels. Both have it."""
    if terms_a["labels"][case] != terms_b["labels"][case]:
        return True

    # Equal voxels of another size are other labels.
    mm_a = terms_a.get("diagonals_mm", {}).get(case)
    mm_b = terms_b.get("diagonals_mm", {}).get(case)
    known = mm_a is not None and mm_b is not None
    return known and not isclose(mm_a, mm_b, rel_tol=SAME_LENGTH)


# --- figures


def figures(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    *,
    images: Mapping[str, Path] = {},
    ignore: int | None = None,
    drawn: Sequence[int] = (),
) -> dict[str, bytes]:
    """PNGs by name: `distribution`, and `worst-<case>`, an overlay for each of the lowest cases.

    An overlay is drawn over the case's image, where `images` has it. What is labelled `ignore` is
    drawn as background, in the prediction as well. `drawn` are the labels, where rows are of
    regions.
    """
    files = {pair.case: pair for pair in pairs}
    classes = list(drawn) or list(dict.fromkeys(row["class"] for row in rows))

    pictures = {"distribution": distribution(rows)}
    for case in worst_cases(rows):
        true = read_labels(files[case].label)
        predicted = read_labels(files[case].prediction, like=true.affine)
        image = image_under(images[case], true) if case in images else None

        # Also in the prediction: what was not annotated is neither right nor wrong.
        annotated = true.labels != ignore
        pictures[f"worst-{case}"] = overlay(
            predicted.labels * annotated, true.labels * annotated, true.spacing, classes, image
        )
    return pictures


def image_under(path: Path, true: LabelMap) -> Any:
    """An image's first channel (d, h, w); None if it cannot be read or is on another grid.

    Scores need no image, so this is no error.
    """
    try:
        image = read_image(path, like=true.affine)
    except InputError:
        return None
    return None if difference_in_words(image.grid, true.grid) else image.data[0]


# --- numbers as text


def number(value: float, metric: str) -> str:
    """Three decimals of a share, two of mm."""
    if isnan(value):
        return NO_NUMBER
    decimals = 2 if metric in DISTANCES else 3
    return f"{value:z.{decimals}f}"


def interval(scores: Mapping[str, Any], metric: str) -> str:
    """Like "0.912 to 0.934"."""
    if isnan(scores["low"]):
        return NO_NUMBER
    return f"{number(scores['low'], metric)} to {number(scores['high'], metric)}"


def p_value(p: float) -> str:
    """Three decimals."""
    if isnan(p):
        return NO_NUMBER
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def dice_or_status(row: Row) -> str:
    """The Dice of a class, or that it is missed, spurious or absent."""
    return number(row["dice"], "dice") if row["status"] == OK else row["status"]


def tolerances(tolerance: float | Mapping[int, float], names: Mapping[int, str]) -> str:
    """One tolerance, or each with the classes that have it: "1.5 (liver, spleen), 3 (aorta)"."""
    if not isinstance(tolerance, Mapping):
        return f"{tolerance:g}"

    names_by_mm = defaultdict(list)
    for label, name in names.items():
        names_by_mm[tolerance[label]].append(name)
    parts = [f"{mm:g} ({', '.join(names_by_mm[mm])})" for mm in sorted(names_by_mm)]
    return ", ".join(parts)


def count_in_words(n: int, singular: str, plural: str) -> str:
    """Like "1 case" and "2 cases"."""
    return f"{n} {singular if n == 1 else plural}"


# --- the page


def write_page(
    rows: Sequence[Row], summary: Mapping[str, Any], pictures: Mapping[str, bytes], path: Path
) -> None:
    """report.html from what `statistics.summarise` and `figures` give."""
    names = {row["class"]: row["name"] for row in rows}
    worst = [case_figure(case, rows, pictures[f"worst-{case}"]) for case in worst_cases(rows)]
    scored = count_in_words(len(names), "class", "classes")
    if summary.get("regions"):
        scored = count_in_words(len(names), "region", "regions")
    ignored = ""
    if summary["ignore"] is not None:
        ignored = f"What is labelled {summary['ignore']} counts for nothing."

    template = Template(PAGE.read_text(encoding="utf-8"))
    page = template.substitute(
        cases=count_in_words(summary["cases"], "case", "cases"),
        classes=scored,
        definition=escape(summary["definition"]),
        policy=escape(summary["policy"]),
        tiles=tiles(summary["mean_of_cases"]),
        class_table=class_table(summary),
        distribution=image_tag(pictures["distribution"], "Dice, HD and MSD by class"),
        lowest_cases="\n".join(worst),
        legend=legend(names_drawn(summary, names)),
        case_table=case_table(rows, names),
        ignored=ignored,
        surfaces=escape(summary["surfaces"]),
        tolerance=escape(tolerances(summary["tolerance_mm"], names)),
        empty=escape(summary["empty"]),
    )
    write_bytes(path, page.encode())


def tiles(means: Mapping[str, Any]) -> str:
    """The mean over cases of each metric that is shown."""
    items = []
    for metric, title in SHOWN.items():
        mean = number(means[metric]["mean"], metric)
        range_ = interval(means[metric], metric)
        items.append(f"<li>{title}<b>{mean}</b><small>{range_}</small></li>")
    return "\n".join(items)


def class_table(summary: Mapping[str, Any]) -> str:
    """A line for each class, and one of the means over cases."""
    groups = "".join(f'<th colspan="3" class="group">{title}</th>' for title in SHOWN.values())
    columns = "<th>mean</th><th>median</th><th>n</th>" * len(SHOWN)
    head = (
        f"<tr><th></th><th></th>{groups}</tr>"
        f'<tr><th>class</th><th class="text">cases</th>{columns}</tr>'
    )
    overall = {"name": OVERALL_NAME, "status": {}, **summary["mean_of_cases"]}
    lines = [class_line(scores) for scores in (*summary["classes"].values(), overall)]
    return table(head, lines)


def class_line(scores: Mapping[str, Any]) -> str:
    """Name, how many cases have which status, and mean, median and n of each metric."""
    statuses = [f"{n} {status}" for status, n in scores["status"].items() if n]

    cells = [f"<th>{escape(scores['name'])}</th>", f'<td class="text">{", ".join(statuses)}</td>']
    for metric in SHOWN:
        of_metric = scores[metric]
        mean = number(of_metric["mean"], metric)
        median = number(of_metric["median"], metric)
        cells.append(f"<td>{mean}<small>{interval(of_metric, metric)}</small></td>")
        cells.append(f"<td>{median}</td><td>{of_metric['n']}</td>")
    return "".join(cells)


def case_table(rows: Sequence[Row], names: Mapping[int, str]) -> str:
    """A line for each case with the Dice of every class, or its status, and their mean."""
    classes = "".join(f"<th>{escape(name)}</th>" for name in names.values())
    text = {(row["case"], row["class"]): dice_or_status(row) for row in rows}

    lines = []
    for case, mean in case_means(rows, "dice").items():
        cells = "".join(f"<td>{text.get((case, label), '')}</td>" for label in names)
        lines.append(f"<th>{escape(case)}</th>{cells}<td>{number(mean, 'dice')}</td>")
    return table(f"<tr><th>case</th>{classes}<th>mean</th></tr>", lines)


def table(head: str, lines: Iterable[str]) -> str:
    """An HTML table that scrolls where it is wider than the screen; each line is HTML cells."""
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def case_figure(case: str, rows: Sequence[Row], picture: bytes) -> str:
    """A case's overlay with its mean Dice and its three lowest classes."""
    scored = [row for row in rows if row["case"] == case and isfinite(row["dice"])]
    lowest = sorted(scored, key=lambda row: row["dice"])[:3]
    in_words = ", ".join(f"{row['name']} {dice_or_status(row)}" for row in lowest)
    mean = number(case_means(rows, "dice")[case], "dice")
    return (
        f'<figure class="case"><div class="wide">{image_tag(picture, case)}</div>\n'
        f"<figcaption><b>{escape(case)}</b>, mean Dice {mean}; lowest {escape(in_words)}"
        "</figcaption></figure>"
    )


def names_drawn(summary: Mapping[str, Any], names: Mapping[int, str]) -> Mapping[int, str]:
    """The names of the labels in the pictures: those of the classes, or by the regions."""
    regions = summary.get("regions")
    if not regions:
        return names
    return names_of_labels([Region(name, tuple(labels)) for name, labels in regions.items()])


def legend(names: Mapping[int, str]) -> str:
    """The colour of each class in the overlays."""
    items = []
    for name, colour in zip(names.values(), colours_of(list(names))):
        items.append(f'<li><i style="background:{colour}"></i>{escape(name)}</li>')
    return "\n".join(items)


def image_tag(picture: bytes, text: str) -> str:
    """A PNG within the page."""
    data = b64encode(picture).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">'


# --- tables of a comparison


def comparison_text(lines: Sequence[Row], *, a: str = "A", b: str = "B") -> str:
    """What `statistics.compare` gives, as Markdown that is also easy to read as it is."""
    head = ["n", "A", "B", "B - A", "95 %", "t-test p", "Holm", "Wilcoxon p", "Holm"]
    head += ["sign-flip p", "Holm", "left out"]
    body = defaultdict(list)
    for line in lines:
        metric = line["metric"]
        cells = [line["name"], str(line["n"])]
        cells += [number(line[key], metric) for key in ("mean_a", "mean_b", "difference")]
        cells.append(interval(line, metric))
        for p in P_VALUES:
            cells += [p_value(line[p]), p_value(line[f"{p}_holm"])]
        cells.append(", ".join(f"{n} {reason}" for reason, n in line["left_out"].items()))
        body[metric].append(cells)
    return f"A is {a}, B is {b}.\n\n{markdown_tables(head, body)}"


def fold_text(lines: Sequence[Row]) -> str:
    """What `statistics.fold_table` gives, in the same way."""
    head = [*lines[0]["folds"], "mean of folds", "std", "mean of cases", "95 %", "n"]
    body = defaultdict(list)
    for line in lines:
        metric = line["metric"]
        means = [fold["mean"] for fold in line["folds"].values()]
        means += [line["mean_of_folds"], line["std_of_folds"], line["mean"]]
        cells = [line["name"]]
        cells += [number(mean, metric) for mean in means]
        cells += [interval(line, metric), str(line["n"])]
        body[metric].append(cells)
    return markdown_tables(head, body)


def markdown_tables(head: Sequence[str], body: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A Markdown table for each metric that is shown, which is its first column's title."""
    tables = [aligned([[title, *head], *body[metric]]) for metric, title in SHOWN.items()]
    return "\n\n".join(tables) + "\n"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a head and other lines: the first column to the left, others right."""
    # At least 2: of one character the rule would be a colon alone, which is no rule in Markdown.
    widths = [max(2, *map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0]]
    rule += ["-" * (width - 1) + ":" for width in widths[1:]]

    padded = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:])]
        padded.append(cells)

    head, *body = padded
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def write_table(lines: Sequence[Row], path: Path) -> None:
    """The rows of `compare` or of `fold_table` as .csv; what is no text or number in it is JSON."""
    flat = []
    for line in lines:
        row = dict(line)
        for key, value in line.items():
            if isinstance(value, Mapping):
                row[key] = strict_json(value)
        flat.append(row)
    write_csv(flat, path, list(flat[0]))


def write_lines(lines: Sequence[Row], path: Path) -> None:
    """The same as .json."""
    write_bytes(path, strict_json(lines, indent=1).encode())
