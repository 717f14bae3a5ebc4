"""The page of a data check: what was found, the lists, histograms, slices, and every volume.

It is filled into check.html, beside this file, and needs nothing beside itself. Its looks are those
of the page of scores.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dae.data.cache import in_bytes
from dae.data.examine import Examined
from dae.data.overlaps import Finding
from dae.data.preprocess import by
from dae.errors import counted
from dae.evaluation.report import PAGE as PAGE_OF_SCORES
from dae.evaluation.report import image_tag, table
from dae.figures import histograms, strip_of_planes

PAGE = Path(__file__).with_name("check.html")
LINES = 200  # of errors, and of warnings; check.json has all


def page_of(
    report: Mapping[str, Any],
    findings: Sequence[Finding],
    volumes: Sequence[Examined],
    pictures: int,
) -> bytes:
    """The page, of what check.json has and of the volumes; with slices of so many of them."""
    style = re.search(r"<style>.*?</style>", PAGE_OF_SCORES.read_text(encoding="utf-8"), re.S)
    assert style is not None
    shown = pictured(volumes, pictures)
    template = Template(PAGE.read_text(encoding="utf-8"))
    page = template.substitute(
        style=style[0],
        verdict="A run may start" if report["ok"] else "A run may not start",
        counts=f"{counted(len(report['lists']), 'list')}, {counted(len(volumes), 'volume')}",
        errors=bullets([f.line for f in findings if f.is_error], "error"),
        warnings=bullets([f.line for f in findings if not f.is_error], "warning"),
        lists="\n".join(list_section(listed) for listed in report["lists"]),
        histograms=histogram_tag(volumes),
        strips="\n".join(strip(volume) for volume in shown),
        shown=f"{len(shown)} of {counted(len(volumes), 'volume')}, those with errors first.",
        volumes=volume_table(report["volumes"]),
    )
    return page.encode()


def bullets(lines: Sequence[str], kind: str) -> str:
    if not lines:
        return '<p class="soft">none</p>'
    items = [f'<li class="{kind}">{escape(line)}</li>' for line in lines[:LINES]]
    more = f"<p>and {len(lines) - LINES} more in check.json</p>" if len(lines) > LINES else ""
    return f"<ul>{''.join(items)}</ul>{more}"


# --- lists


def list_section(listed: Mapping[str, Any]) -> str:
    """What a list is for, its flags, its fingerprint and its classes."""
    parts = ", ".join(f"{n} {part}" for part, n in listed["items"].items() if n)
    head = f"<h3>{escape(listed['path'])}</h3><p>{escape(listed['purpose'])}: {parts}.</p>"
    flags = listed["flags"]
    if flags:
        needed = in_bytes(listed["cache"]["bytes"])
        free = in_bytes(listed["cache"]["free_bytes"])
        head += (
            f"<p>Suggested: <code>{escape(flags)}</code>. Prepared volumes take {needed} at that "
            f"spacing; {free} are free.</p>"
        )
    return head + modality_table(listed["fingerprint"]) + class_table(listed["classes"])


def modality_table(fingerprint: Mapping[str, Any]) -> str:
    """A line for each modality, and each of its channels."""
    head = (
        '<tr><th>modality</th><th>volumes</th><th class="group">mm</th>'
        "<th>voxels</th><th>p0.5</th><th>p50</th><th>p99.5</th></tr>"
    )
    lines = []
    for name, found in fingerprint.items():
        for channel in found["intensity"]:
            cells = [f"<th>{escape(name)}</th>", f"<td>{found['volumes']}</td>"]
            for spread in (found["spacing_mm"], found["size"], *channel.values()):
                cells.append(f"<td>{spread_cell(spread)}</td>")
            lines.append("".join(cells))
    return table(head, lines) if lines else ""


def class_table(classes: Mapping[str, Any]) -> str:
    """A line for each class with its size in ml."""
    lines = []
    for label, found in classes.items():
        size = spread_cell(found["ml"]) if found["ml"] else ""
        name = escape(f"{label} {found['name']}")
        lines.append(f"<th>{name}</th><td>{found['volumes']}</td><td>{size}</td>")
    return table("<tr><th>class</th><th>volumes</th><th>ml</th></tr>", lines) if lines else ""


def spread_cell(spread: Mapping[str, Any]) -> str:
    """The median, and the range in small print."""
    low = in_numbers(spread["min"])
    high = in_numbers(spread["max"])
    return f"{in_numbers(spread['median'])}<small>{low} to {high}</small>"


def in_numbers(value: Any) -> str:
    """A number, or one for each axis, in four digits."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return " x ".join(f"{number:.4g}" for number in values)


# --- volumes


def pictured(volumes: Sequence[Examined], count: int) -> list[Examined]:
    """The volumes that can be shown, those with errors and warnings first."""
    readable = [volume for volume in volumes if volume.channels]
    readable.sort(key=lambda v: (not (v.errors or v.label_errors), not v.warnings))
    return readable[:count]


def strip(volume: Examined) -> str:
    """The slices of a volume's first channel."""
    name = volume.item.image[0]
    picture = image_tag(strip_of_planes(volume.channels[0].planes), name.name)
    wrong = "error" if volume.errors or volume.label_errors else ""
    caption = escape(f"{name.parent.name}/{name.name}, {volume.item.modality_name}")
    return f'<figure>{picture}<figcaption class="{wrong}">{caption}</figcaption></figure>'


def histogram_tag(volumes: Iterable[Examined]) -> str:
    """The histograms of all first channels."""
    by_modality: dict[str, list[Any]] = {}
    for volume in volumes:
        for channel in volume.channels[:1]:
            line = (*channel.ends, channel.histogram)
            by_modality.setdefault(volume.item.modality_name, []).append(line)
    if not by_modality:
        return '<p class="soft">none</p>'
    return image_tag(histograms(by_modality), "a histogram for each volume")


def volume_table(volumes: Sequence[Mapping[str, Any]]) -> str:
    """A line for each volume."""
    head = (
        '<tr><th>volume</th><th class="text">what it is</th><th>size</th><th>mm</th>'
        "<th>range</th><th>p0.5 to p99.5</th><th>at the window's ends</th><th>labels, ml</th>"
        '<th class="text">content</th></tr>'
    )
    return table(head, [volume_line(volume) for volume in volumes])


def volume_line(volume: Mapping[str, Any]) -> str:
    stored = f"{volume['modality']}, {volume['dtype']}, {volume['axes']}, {volume['unit']}"
    cells = [f"<th>{escape(volume['image'][0])}</th>", f'<td class="text">{escape(stored)}</td>']
    cells.append(f"<td>{by(volume['size'])}</td><td>{in_numbers(volume['spacing_mm'])}</td>")

    ranges, middles, ends, contents = [], [], [], []
    for channel in volume["channels"]:
        p = channel["percentiles"]
        ranges.append(f"{p['0']:.4g} to {p['100']:.4g}")
        middles.append(f"{p['0.5']:.4g} to {p['99.5']:.4g}")
        if channel["at_window_ends"]:
            low, high = channel["at_window_ends"]
            ends.append(f"{low:.1%}, {high:.1%}")
        contents.append(channel["content"][:8])
    labels = ", ".join(f"{k}: {ml:.3g}" for k, ml in volume["labels_ml"].items() if k != "0")
    for texts in (ranges, middles, ends, [labels]):
        cells.append(f"<td>{'<br>'.join(texts)}</td>")
    cells.append(f'<td class="text">{" ".join(contents)}</td>')
    return "".join(cells)
