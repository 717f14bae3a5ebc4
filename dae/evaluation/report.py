"""What people read of the scores: summary.json, figures, one HTML page, and the tables of a comparison.

Every file is whole or not there; JSON has null where it has no number; the page needs nothing beside itself.
matplotlib is imported where it is used: it takes half a second.
"""

import io
import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import combinations, cycle
from math import ceil, isclose, isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np

from dae.data.nifti import LabelMap, difference, read, read_labels
from dae.errors import InputError
from dae.evaluation.cases import Case, Pair, write_csv
from dae.evaluation.metrics import Row
from dae.evaluation.postprocess import box_of
from dae.evaluation.statistics import HIGHER_IS_BETTER, case_means, worst_cases
from dae.files import write_bytes

SHOWN = {"dice": "Dice", "hd95": "HD95, mm", "assd": "ASSD, mm", "nsd": "NSD"}  # where people read
INK = "#737d8a"  # legible on white and on black
LINE, MEDIAN = {"color": INK}, {"color": "#e4572e", "linewidth": 1.6}
COMPARED = {
    "t_p": "t-test p",
    "t_p_holm": "Holm",
    "wilcoxon_p": "Wilcoxon p",
    "wilcoxon_p_holm": "Holm",
}
MARKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # mm
COLOURS = (
    "#4cc9f0",
    "#ffd166",
    "#ef476f",
    "#06d6a0",
    "#f78c6b",
    "#b79cff",
    "#a7c957",
    "#ff99c8",
    "#5e8bff",
    "#e9c46a",
    "#90e0ef",
    "#d4a373",
    "#c8f560",
)


def strict(value: Any, **how: Any) -> str:
    """JSON with null for what it has no number for."""
    return json.dumps(
        json.loads(json.dumps(value), parse_constant=lambda _: None), allow_nan=False, **how
    )


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """summary.json: what `statistics.summarise` gives."""
    write_bytes(path, strict(summary, indent=1).encode())


# What the scores of two runs must share, by its name in summary.json, and the flag that decides it.
TERMS = {"definition": "--definition", "ignore": "--ignore", "tolerance_mm": "--tolerance"}
AS_LONG = 1e-3  # of two diagonals: less is rounding of the header's float32


def terms_of(scores: Path) -> dict[str, Any]:
    """By what a scores.csv was made: the summary.json beside it, or nothing where there is none."""
    try:
        found = json.loads((scores.parent / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and TERMS.keys() <= found.keys() else {}


def check_terms(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Raises InputError where two runs were scored by different definitions, tolerances or label maps.

    Returns a warning that names the runs whose summary.json does not tell.
    """
    for (a, one), (b, other) in combinations(runs, 2):
        for fact, flag in TERMS.items():
            if one and other and (differing := differing_terms(one, other, fact)):
                raise InputError(
                    f"{a} and {b} were scored with different {flag}: {differing}; score one of them again"
                )
        check_names(a, b, one.get("classes", {}), other.get("classes", {}))
        for case in sorted(one.get("labels", {}).keys() & other.get("labels", {}).keys()):
            if one["labels"][case] != other["labels"][case] or not as_long(one, other, case):
                raise InputError(
                    f"{a} and {b} were scored against different label maps of case {case}; "
                    "score one of them again"
                )
    silent = [name for name, terms in runs if "labels" not in terms]
    if len(runs) < 2 or not silent:
        return ""
    return (
        f"warning: {', '.join(silent)}: no summary.json that tells the definition, the tolerance and the label "
        "maps of the scores; whether they can be compared is not known"
    )


def check_names(a: str, b: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises InputError where one label has two names. A name that is the number alone is none."""
    for label in sorted(one.keys() & other.keys()):
        names = {str(run[label].get("name", label)) for run in (one, other)} - {str(label)}
        if len({name.casefold() for name in names}) > 1:
            raise InputError(
                f"{a} and {b}: label {label} is {' in one and '.join(sorted(names))} in the other"
            )


def differing_terms(one: Mapping[str, Any], other: Mapping[str, Any], fact: str) -> str:
    """Both values where they differ, in words; of a tolerance the first class that has another."""
    if fact != "tolerance_mm":
        return "" if one[fact] == other[fact] else f"{one[fact]} and {other[fact]}"
    for cls in sorted(one["classes"].keys() & other["classes"].keys()):
        a, b = (
            run[fact].get(cls) if isinstance(run[fact], dict) else run[fact] for run in (one, other)
        )
        if a != b:
            return f"{a} and {b} mm for {one['classes'][cls]['name']}"
    return ""


def as_long(one: Mapping[str, Any], other: Mapping[str, Any], case: str) -> bool:
    """Whether both label maps of a case have one diagonal in mm: equal voxels of other sizes are other labels."""
    a, b = (run.get("diagonals_mm", {}).get(case) for run in (one, other))
    return a is None or b is None or isclose(a, b, rel_tol=AS_LONG)


def figures(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    *,
    images: Mapping[str, Path] = {},
    ignore: int | None = None,
) -> dict[str, bytes]:
    """`distribution` and `worst-<case>`, as PNG; `images` lie under the latter.

    What is labelled `ignore` is drawn as background, in the prediction as well.
    """
    pictures = {"distribution": distribution(rows)}
    for case in worst_cases(rows):
        _, prediction, label = next(pair for pair in pairs if pair.case == case)
        true = read_labels(label)
        annotated = true.labels != ignore
        both = Case(
            case,
            read_labels(prediction, like=true.affine).labels * annotated,
            true.labels * annotated,
            true.spacing,
        )
        classes = dict.fromkeys(row["class"] for row in rows)
        pictures[f"worst-{case}"] = overlay(
            both, classes, beneath(images[case], true) if case in images else None
        )
    return pictures


def beneath(path: Path, true: LabelMap) -> Any:
    """An image's first channel (d, h, w), or None where it can't be read or has another grid: scores need no image."""
    try:
        image = read(path, like=true.affine)
    except InputError:
        return None
    return None if difference(image.grid, true.grid) else image.data[0]


def distribution(rows: Sequence[Row]) -> bytes:
    """Dice and HD95: for each class a box around the middle half of the cases, a dot for each, and their number."""
    from matplotlib.figure import Figure

    names, jitter = {row["class"]: row["name"] for row in rows}, np.random.default_rng(0)
    figure = Figure(figsize=(10, 1 + 0.36 * len(names)), layout="constrained")
    dice, hd95 = figure.subplots(1, 2, sharey=True)
    for axes, metric in ((dice, "dice"), (hd95, "hd95")):
        for place, cls in enumerate(names):
            values = np.array([row[metric] for row in rows if row["class"] == cls])
            finite, endless = values[np.isfinite(values)], int(np.isinf(values).sum())
            axes.boxplot(
                finite,
                positions=[place],
                orientation="horizontal",
                widths=0.5,
                showfliers=False,
                boxprops=LINE,
                whiskerprops=LINE,
                capprops=LINE,
                medianprops=MEDIAN,
            )
            axes.plot(
                finite,
                place + jitter.uniform(-0.16, 0.16, len(finite)),
                "o",
                ms=4,
                alpha=0.6,
                color="#3f8efc",
            )
            axes.annotate(
                f"n {len(finite)}" + f", {endless} ∞" * (endless > 0),
                (1.02, place),
                color=INK,
                fontsize=8,
                xycoords=("axes fraction", "data"),
                va="center",
            )
        axes.set_title(SHOWN[metric], color=INK, loc="left", fontsize=11, fontweight="bold")
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="x", color=INK, alpha=0.25)
        axes.spines[:].set_visible(False)
    dice.set(
        yticks=range(len(names)),
        yticklabels=names.values(),
        xlim=(-0.03, 1.03),
        ylim=(len(names) - 0.5, -0.5),
    )
    farthest = max(
        [1.0, *(row["hd95"] for row in rows if isfinite(row["hd95"]))]
    )  # on a line it would hide the rest
    hd95.set(xscale="symlog", xticks=MARKS, xticklabels=MARKS, xlim=(-0.1, 1.3 * farthest))
    hd95.minorticks_off()
    return png(figure, transparent=True)


def overlay(case: Case, classes: Iterable[int], image: Any = None) -> bytes:
    """Three planes as radiologists see them, each where most voxels are wrong: truth filled, prediction as a line."""
    from matplotlib.figure import Figure

    some = ((case.prediction > 0) | (case.truth > 0)).astype(np.uint8)
    box: Any = box_of(some, 1, [ceil(15 / mm) for mm in case.spacing]) or ...  # and 15 mm around it
    truth, prediction, shown = (
        each[box] for each in (case.truth, case.prediction, some if image is None else image)
    )
    wrong = prediction != truth if (prediction != truth).any() else truth > 0
    low, high = (
        (1, 3)
        if image is None
        else np.percentile(shown[truth > 0] if truth.any() else shown, (2, 98))
    )
    d, h, w = (n * mm for n, mm in zip(truth.shape, case.spacing))
    figure = Figure(
        figsize=(12, 12 * max(h, w) / (d + d + h)), facecolor="black", layout="constrained"
    )
    sizes = (d, h), (d, w), (h, w)  # mm of the axial, the coronal and the sagittal plane
    for axes, axis, (width, height) in zip(
        figure.subplots(1, 3, width_ratios=(d, d, h)), (2, 1, 0), sizes
    ):
        at = int(wrong.sum(tuple({0, 1, 2} - {axis})).argmax())
        place: dict[str, Any] = {"origin": "lower", "extent": (0, width, 0, height)}
        # turned so that the patient's right side and front lie to the left
        grey, true, predicted = (each.take(at, axis)[::-1].T for each in (shown, truth, prediction))
        axes.imshow(
            grey, cmap="gray", vmin=1.5 * low - 0.5 * high, vmax=1.5 * high - 0.5 * low, **place
        )
        for cls, colour in zip(classes, cycle(COLOURS)):
            if (true == cls).any():
                axes.contourf(true == cls, levels=[0.5, 1], colors=[colour], alpha=0.35, **place)
            if (predicted == cls).any():
                axes.contour(
                    predicted == cls, levels=[0.5], colors=[colour], linewidths=1.4, **place
                )
        axes.set_axis_off()
    return png(figure)


def png(figure: Any, **how: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None}, **how)
    return stream.getvalue()


STYLE = """
:root{color-scheme:light dark;--ink:#20242b;--soft:#69727f;--line:#e3e7ec;--back:#fff;--card:#f4f6f9}
@media(prefers-color-scheme:dark){:root{--ink:#d8dde5;--soft:#8d97a5;--line:#2a3039;--back:#14171c;--card:#1d2128}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.55 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:auto;padding:40px 28px}h1{font-size:28px;margin:0}h2{font-size:18px;margin:46px 0 12px}
p{max-width:84ch}.wide{overflow-x:auto}.tiles{display:flex;flex-wrap:wrap;gap:14px;margin:26px 0}
pre{flex:1;min-width:160px;margin:0;background:var(--card);border-radius:10px;padding:14px 18px;font-family:inherit}
pre b{display:block;font-weight:400}pre b::first-line{font-size:30px;font-weight:700}.soft,pre,td{color:var(--soft)}
table,pre{font-size:13px;font-variant-numeric:tabular-nums}table{border-collapse:collapse;width:100%}
td,th{padding:5px 8px;text-align:right;vertical-align:bottom;font-weight:400}td{vertical-align:top;white-space:pre}
tbody tr{border-top:1px solid var(--line)}tr>:first-child{text-align:left;padding:5px 0}td{font-size:11.5px}
img{width:100%}figure{margin:0 0 26px}figure img{background:#000;border-radius:8px;max-height:440px;object-fit:contain}
td::first-line{font-size:13.5px}i{display:inline-block;padding:6px;border-radius:3px;margin:0 5px -2px 14px}
td::first-line,pre b::first-line{color:var(--ink)}th[colspan]{text-align:center}thead,figcaption{color:var(--soft)}"""


def write_page(
    rows: Sequence[Row], summary: Mapping[str, Any], pictures: Mapping[str, bytes], path: Path
) -> None:
    """One HTML file of what `summarise` and `figures` gave, for light and dark, with nothing outside itself."""
    names, means = {row["class"]: row["name"] for row in rows}, summary["mean_of_cases"]
    definition, policy = (escape(str(summary[key])) for key in ("definition", "policy"))
    tolerance = escape(in_words(summary["tolerance_mm"], names))
    unknown = (
        ""
        if summary["ignore"] is None
        else f"What is labelled {summary['ignore']} counts for nothing. "
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Segmentation scores</title><style>{STYLE}
</style><meta name="viewport" content="width=device-width"><main><h1>Segmentation scores</h1><div class="soft">
{summary["cases"]} cases, {len(names)} classes; surfaces by definition {definition}, averages by policy {policy}
</div><div class="tiles">{"".join(f"<pre>{SHOWN[m]}<b>{spread_cells(means[m], m)[0]}</b></pre>" for m in SHOWN)}</div>
<h2>Classes</h2>{class_table(summary)}<h2>Distribution</h2>{image(pictures["distribution"], "Dice and HD95 by class")}
<p class="soft">A dot is a case, a box the middle half of them, its line the median; ∞ counts missed and spurious.</p>
<h2>Lowest cases</h2>{"".join(worst(case, rows, pictures[f"worst-{case}"]) for case in worst_cases(rows))}
<p class="soft">Truth filled, prediction a line; in each direction the plane with most wrong voxels.
{"".join(f'<i style="background:{c}"></i>{escape(name)}' for name, c in zip(names.values(), cycle(COLOURS)))}</p>
<h2>Dice of every case</h2>{case_table(rows, names)}<h2>What the numbers are</h2>
<p>{unknown}Surfaces are {escape(summary["surfaces"])}. The outside of a volume is background. Distances are in mm, on
the grid of the labels. ASSD is the mean over both surfaces, NSD the share of both within {tolerance} mm of the other.
A class is missed if it is in the truth alone, spurious if in the prediction alone, absent if in neither. Absent ones
count nowhere; {escape(summary["empty"])}. The numbers on top and the last line of the table are of each case's mean
over its classes. Small print under a mean is its 95 % interval, a percentile bootstrap over cases.</p></main>"""
    write_bytes(path, page.encode())


def in_words(tolerance: float | Mapping[int, float], names: Mapping[int, str]) -> str:
    """One tolerance, or each with the classes that have it: "1.5 (liver, spleen), 3 (aorta)"."""
    if not isinstance(tolerance, Mapping):
        return f"{tolerance:g}"
    classes = defaultdict(list)
    for cls, name in names.items():
        classes[tolerance[cls]].append(name)
    return ", ".join(f"{mm:g} ({', '.join(its)})" for mm, its in sorted(classes.items()))


def number(value: float, metric: str) -> str:
    return "–" if isnan(value) else f"{value:z.{3 if metric in HIGHER_IS_BETTER else 2}f}"


def span(scores: Mapping[str, Any], metric: str) -> str:
    return (
        "–"
        if isnan(scores["low"])
        else f"{number(scores['low'], metric)} to {number(scores['high'], metric)}"
    )


def spread_cells(scores: Mapping[str, Any], metric: str) -> list[str]:
    """Mean over its interval, median, n."""
    mean, median = (number(scores[key], metric) for key in ("mean", "median"))
    return [f"{mean}\n{span(scores, metric)}", median, str(scores["n"])]


def table(head: str, lines: Iterable[Sequence[str]]) -> str:
    """An HTML table of texts; the head is HTML."""
    body = "".join(f"<tr><td>{'<td>'.join(map(escape, line))}\n" for line in lines)
    return f'<div class="wide"><table><thead>{head}<tbody>{body}</table></div>'


def class_table(summary: Mapping[str, Any]) -> str:
    """A line for each class, and one of the means over cases."""
    groups = "".join(f"<th colspan=3>{head}" for head in SHOWN.values())
    lines = []
    for scores in (
        *summary["classes"].values(),
        {"name": "mean of classes", "status": {}, **summary["mean_of_cases"]},
    ):
        statuses = ", ".join(f"{n} {status}" for status, n in scores["status"].items() if n)
        lines.append(
            [
                scores["name"],
                statuses,
                *(cell for m in SHOWN for cell in spread_cells(scores[m], m)),
            ]
        )
    return table(
        f"<tr><th><th>{groups}<tr><th>class<th>cases{'<th>mean<th>median<th>n' * len(SHOWN)}", lines
    )


def case_table(rows: Sequence[Row], names: Mapping[int, str]) -> str:
    """A line for each case with the Dice of every class, or that it is missed, spurious or absent."""
    cells = {
        (r["case"], r["class"]): number(r["dice"], "dice") if r["status"] == "ok" else r["status"]
        for r in rows
    }
    means = case_means(rows, "dice")
    lines = [
        [case, *(cells.get((case, k), "") for k in names), number(mean, "dice")]
        for case, mean in means.items()
    ]
    return table(f"<tr><th>case<th>{'<th>'.join(map(escape, names.values()))}<th>mean", lines)


def image(png: bytes, text: str) -> str:
    return f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{escape(text)}">'


def worst(case: str, rows: Sequence[Row], picture: bytes) -> str:
    """A case's overlay with its mean Dice and its three lowest classes."""
    its = sorted(
        (r for r in rows if r["case"] == case and isfinite(r["dice"])), key=lambda r: r["dice"]
    )[:3]
    lowest = ", ".join(
        f"{r['name']} {number(r['dice'], 'dice') if r['status'] == 'ok' else r['status']}"
        for r in its
    )
    mean = f"<b>{escape(case)}</b>, mean Dice {number(case_means(rows, 'dice')[case], 'dice')}"
    return f"<figure>{image(picture, case)}<figcaption>{mean}; lowest {escape(lowest)}</figcaption></figure>"


def comparison_text(lines: Sequence[Row], *, a: str = "A", b: str = "B") -> str:
    """What `statistics.compare` found, as Markdown that is also easy to read as it stands."""
    head, body = ["n", "A", "B", "B - A", "95 %", *COMPARED.values(), "left out"], defaultdict(list)
    for line in lines:
        means = [number(line[k], line["metric"]) for k in ("mean_a", "mean_b", "difference")]
        p = [
            "–" if isnan(line[k]) else "<0.001" if line[k] < 0.001 else f"{line[k]:.3f}"
            for k in COMPARED
        ]
        why = ", ".join(f"{n} {reason}" for reason, n in line["left_out"].items())
        body[line["metric"]].append(
            [line["name"], str(line["n"]), *means, span(line, line["metric"]), *p, why]
        )
    return f"A is {a}, B is {b}.\n\n{aligned(head, body)}"


def fold_text(lines: Sequence[Row]) -> str:
    """What `statistics.fold_table` found, in the same way."""
    head, body = (
        [*lines[0]["folds"], "mean of folds", "std", "mean of cases", "95 %", "n"],
        defaultdict(list),
    )
    for line in lines:
        means = [fold["mean"] for fold in line["folds"].values()]
        means += [line["mean_of_folds"], line["std_of_folds"], line["mean"]]
        cells = [number(value, line["metric"]) for value in means]
        body[line["metric"]].append(
            [line["name"], *cells, span(line, line["metric"]), str(line["n"])]
        )
    return aligned(head, body)


def aligned(head: Sequence[str], body: Mapping[str, list[list[str]]]) -> str:
    """A Markdown table for each metric."""
    tables = []
    for metric, title in SHOWN.items():
        lines = [[title, *head], *body[metric]]
        widths = [max(2, *map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        lines = [
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines
        ]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables) + "\n"


def write_table(lines: Sequence[Row], path: Path) -> None:
    """The rows of `compare`, or of `fold_table`, as .csv."""
    flat = [
        {k: strict(v) if isinstance(v, Mapping) else v for k, v in line.items()} for line in lines
    ]
    write_csv(flat, path, list(flat[0]))


def write_lines(lines: Sequence[Row], path: Path) -> None:
    """The same as .json."""
    write_bytes(path, strict(lines, indent=1).encode())
