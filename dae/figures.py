"""Every picture of the project: reconstructions, curves, overlays, distributions of scores.

matplotlib is imported where it is used, because that takes half a second. `Figure` without pyplot
needs no display. Volumes are (d, h, w), from the patient's right to left, back to front, feet to
head.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from math import ceil, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dae.boxes import bounding_box

Picture = NDArray[np.float32]
Labels = NDArray[np.integer[Any]]

INK = "#737d8a"  # text and lines that are legible on white and on black
DOT = "#3f8efc"
MEDIAN = "#e4572e"

# A colour for each class, bright enough for a black ground; after the last comes the first again.
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

CONTEXT = 15  # mm of image around the labels of an overlay
PANELS = {"dice": "Dice", "hd": "HD, mm", "msd": "MSD, mm"}  # of the distribution: Table 2
TICKS_MM = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Triple(NamedTuple):
    """One crop before, disrupted and reconstructed; each (c, d, h, w)."""

    title: str
    x: Picture
    x_hat: Picture
    x_rec: Picture


class Views(NamedTuple):
    """One crop, its views, and what a network made of them, by name; each (c, d, h, w)."""

    title: str
    panels: Sequence[tuple[str, Picture]]


class Segmented(NamedTuple):
    """One volume with its true and its predicted labels; each (d, h, w)."""

    title: str
    image: Picture
    label: NDArray[Any]
    prediction: NDArray[Any]


# --- what all pictures share


def new_figure(width: float, height: float, **options: Any) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **options)


def png(figure: Any, **options: Any) -> bytes:
    """The figure as the content of a PNG file, the same bytes each time."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None}, **options)
    return stream.getvalue()


def plane(volume: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """One plane of a volume, as radiologists see it where row 0 is drawn at the bottom.

    The patient's right is on the left of an axial (axis 2) and of a coronal plane (axis 1); in a
    sagittal plane (axis 0) the patient looks to the left.
    """
    return volume.take(index, axis)[::-1].T


# --- reconstructions


def reconstruction_sheet(path: Path, rows: Sequence[Triple]) -> None:
    """figures/reconstruction.png: a row for each modality, x, x_hat, x_rec and |x - x_rec|."""
    figure = new_figure(11, 2.9 * len(rows))
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for axes_of_row, triple in zip(axes, rows):
        draw_triple(axes_of_row, triple)
    figure.savefig(path, dpi=110)


def draw_triple(axes: Sequence[Any], triple: Triple) -> None:
    """All but the last picture share one grey scale; the error is shown four times as bright."""
    title, x, x_hat, x_rec = triple
    error = np.abs(x - x_rec)
    low = float(x.min())
    high = float(x.max())

    draw_middle(axes[0], x, f"{title}   x", low, high)
    draw_middle(axes[1], x_hat, f"x_hat   L1 {np.abs(x - x_hat).mean():.4f}", low, high)
    draw_middle(axes[2], x_rec, f"x_rec   L1 {error.mean():.4f}", low, high)
    draw_middle(axes[3], error, "|x - x_rec|", 0.0, (high - low) / 4)


def views_sheet(path: Path, rows: Sequence[Views]) -> None:
    """figures/reconstruction.png of a baseline: a row for each modality, x and its views."""
    columns = len(rows[0].panels)
    figure = new_figure(2.75 * columns, 2.9 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, (title, panels) in zip(axes, rows):
        _, x = panels[0]
        low, high = float(x.min()), float(x.max())
        for ax, (name, volume) in zip(axes_of_row, panels):
            draw_middle(ax, volume, f"{title}   {name}", low, high)
    figure.savefig(path, dpi=110)


def draw_middle(ax: Any, x: Picture, title: str, low: float, high: float) -> None:
    """The axial plane through the middle of the first channel; `low` is black and `high` white."""
    grey = plane(x[0], axis=2, index=x.shape[-1] // 2)
    ax.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


# --- curves


def loss_curve(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """figures/loss.png of pre-training: L1 in training and validation, and of doing nothing."""
    figure = new_figure(7, 4)
    ax = figure.subplots()
    doing_nothing = "validation, doing nothing: L1(x_hat, x)"
    draw_curve(ax, events, "train", "l1_raw", label="training", marker="")
    draw_curve(ax, events, "validation", "l1", label="validation", marker=".")
    draw_curve(ax, events, "validation", "l1_input", label=doing_nothing, marker=".")

    ax.set(xlabel="step", ylabel="L1, intensities as normalised", yscale="log")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def terms_curve(path: Path, events: Sequence[Mapping[str, Any]], terms: Sequence[str]) -> None:
    """figures/loss.png of a baseline: each term of its loss in training and in validation."""
    figure = new_figure(7, 4)
    ax = figure.subplots()
    for n, term in enumerate(terms):
        colour = f"C{n}"
        draw_curve(ax, events, "train", term, label=f"{term}, training", color=colour)
        draw_curve(
            ax, events, "validation", term, label=f"{term}, validation", color=colour, marker="."
        )

    ax.set(xlabel="step", ylabel="terms of the loss")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def seg_curve(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """figures/loss.png of fine-tuning: training loss, and validation Dice on its own axis."""
    figure = new_figure(7, 4)
    ax = figure.subplots()
    ax_of_dice = ax.twinx()
    draw_curve(ax, events, "train", "loss", color="C0")
    draw_curve(ax_of_dice, events, "validation", "dice", color="C1", marker=".")

    ax.set(xlabel="step", ylabel="training loss")
    ax_of_dice.set(ylabel="validation Dice", ylim=(0, 1))
    figure.savefig(path, dpi=110)


def draw_curve(
    ax: Any, events: Sequence[Mapping[str, Any]], kind: str, key: str, **style: Any
) -> None:
    """`key` over steps, from the events of this kind that have it."""
    steps = []
    values = []
    for event in events:
        if event["event"] == kind and event.get(key) is not None:
            steps.append(event["step"])
            values.append(event[key])
    ax.plot(steps, values, **style)


# --- overlays of labels


def draw_overlay(
    ax: Any,
    grey: NDArray[Any],
    filled: NDArray[Any],
    *,
    colours: Any,
    largest: int,
    alpha: float,
    outlined: NDArray[Any] | None = None,
    **frame: Any,
) -> None:
    """A plane of an image with labels over it: some filled with colour, some as outlines.

    `colours` is a colormap for the labels 1 to `largest`; `frame` are options of the grey image.
    """
    ax.imshow(grey, cmap="gray", origin="lower", **frame)

    extent = frame.get("extent")
    ax.imshow(
        np.ma.masked_equal(filled, 0),
        cmap=colours,
        alpha=alpha,
        vmin=1,
        vmax=largest,
        origin="lower",
        interpolation="nearest",
        extent=extent,
    )
    if outlined is not None:
        for label in np.unique(outlined[outlined > 0]):
            ax.contour(
                outlined == label,
                levels=[0.5],
                colors=[colours(label - 1)],
                linewidths=1.4,
                origin="lower",
                extent=extent,
            )
    ax.set_axis_off()


def overlay_sheet(path: Path, cases: Sequence[Segmented]) -> None:
    """figures/overlay.png: a row for each case, truth and prediction beside each other."""
    figure = new_figure(12, 2.3 * len(cases))
    axes = figure.subplots(len(cases), 6, squeeze=False)
    for axes_of_row, case in zip(axes, cases):
        draw_segmented(axes_of_row, case)
    figure.savefig(path, dpi=110)


def draw_segmented(axes: Sequence[Any], case: Segmented) -> None:
    """Truth and prediction on the three planes through the centre of the true labels."""
    centre = np.array(case.label.shape) // 2
    inside = np.argwhere(case.label > 0)
    if len(inside):
        centre = inside.mean(0).round().astype(int)
    largest = max(int(case.label.max()), int(case.prediction.max()), 1)

    for axis in range(3):
        grey = plane(case.image, axis, centre[axis])
        for ax, labels, title in (
            (axes[2 * axis], case.label, "truth"),
            (axes[2 * axis + 1], case.prediction, "prediction"),
        ):
            filled = plane(labels, axis, centre[axis])
            draw_overlay(ax, grey, filled, colours="turbo", largest=largest, alpha=0.5)
            ax.set_title(f"  {title}", fontsize=8)
    axes[0].set_title(f"{case.title[:24]}  truth", fontsize=8)


def overlay(
    prediction: Labels,
    truth: Labels,
    spacing: Sequence[float],
    classes: Iterable[int],
    image: NDArray[Any] | None = None,
) -> bytes:
    """A PNG of three planes, each where most voxels are wrong: truth filled, prediction as a line.

    All maps are (d, h, w), `spacing` is in mm. Without an image all organs are grey on black.
    """
    from matplotlib.colors import ListedColormap

    occupied = (prediction > 0) | (truth > 0)
    if image is None:
        image = occupied
        black_white = (0.0, 4.0)  # so that 1, an organ, is a dark grey
    else:
        black_white = contrast_of(image, truth)

    margin = [ceil(CONTEXT / mm) for mm in spacing]
    box = bounding_box(occupied, margin)
    if box:
        image = image[box]
        prediction = prediction[box]
        truth = truth[box]

    labels = list(classes)
    prediction = renumbered(prediction, labels)
    truth = renumbered(truth, labels)
    wrong = prediction != truth
    if not wrong.any():
        wrong = truth > 0

    depth, height, width = (voxels * mm for voxels, mm in zip(truth.shape, spacing))
    planes = (
        (2, (depth, height)),  # axial
        (1, (depth, width)),  # coronal
        (0, (height, width)),  # sagittal
    )
    figure_height = 12 * max(height, width) / (depth + depth + height)
    figure = new_figure(12, figure_height, facecolor="black")
    axes = figure.subplots(1, 3, width_ratios=(depth, depth, height))
    for ax, (axis, (across, up)) in zip(axes, planes):
        wrong_in_plane = np.moveaxis(wrong, axis, 0).sum(axis=(1, 2))
        index = int(wrong_in_plane.argmax())
        draw_overlay(
            ax,
            plane(image, axis, index),
            plane(truth, axis, index),
            outlined=plane(prediction, axis, index),
            colours=ListedColormap(colours_of(labels)),
            largest=len(labels),
            alpha=0.35,
            extent=(0, across, 0, up),
            vmin=black_white[0],
            vmax=black_white[1],
        )
    return png(figure)


def contrast_of(image: NDArray[Any], truth: Labels) -> tuple[float, float]:
    """Black and white: the range of intensities within the organs, and as much again around it."""
    inside = image[truth > 0]
    low, high = np.percentile(inside if len(inside) else image, (2, 98))
    half = (high - low) / 2
    return float(low - half), float(high + half)


def renumbered(labels: Labels, classes: Sequence[int]) -> Labels:
    """1 for the first of the classes, 2 for the second, and so on; 0 elsewhere."""
    numbers = np.zeros(labels.shape, np.int64)
    for number, label in enumerate(classes, start=1):
        numbers[labels == label] = number
    return numbers


def colours_of(classes: Sequence[int]) -> list[str]:
    """The colour of each class, here and in the legend of the page."""
    return list(islice(cycle(COLOURS), len(classes)))


# --- distributions of scores


def distribution(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of Dice, HD and MSD by class: a dot for each case, and a box around the middle half."""
    names = {row["class"]: row["name"] for row in rows}
    rng = np.random.default_rng(0)  # scatters the dots, so that equal scores are all seen

    figure = new_figure(13, 1.1 + 0.36 * len(names))
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (metric, title) in zip(axes, PANELS.items()):
        for position, label in enumerate(names):
            values = np.array([row[metric] for row in rows if row["class"] == label])
            draw_values(ax, position, values, rng)
        ax.set_title(title, color=INK, loc="left", fontsize=11, fontweight="bold")
        ax.tick_params(colors=INK, length=0)
        ax.grid(axis="x", color=INK, alpha=0.25)
        ax.spines[:].set_visible(False)
        if metric == "dice":
            ax.set_xlim(-0.03, 1.03)
        else:
            scale_in_mm(ax, [row[metric] for row in rows])

    axes[0].set(yticks=range(len(names)), yticklabels=names.values())
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first class on top
    return png(figure, transparent=True)


def draw_values(
    ax: Any, position: int, values: NDArray[np.float64], rng: np.random.Generator
) -> None:
    """The values of one class at this height, and in words how many are finite and infinite."""
    finite = values[np.isfinite(values)]
    infinite = int(np.isinf(values).sum())
    line = {"color": INK}
    ax.boxplot(
        finite,
        positions=[position],
        orientation="horizontal",
        widths=0.5,
        showfliers=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": MEDIAN, "linewidth": 1.6},
    )
    heights = position + rng.uniform(-0.16, 0.16, len(finite))
    ax.plot(finite, heights, "o", ms=4, alpha=0.6, color=DOT)

    text = f"n {len(finite)}"
    if infinite:
        text += f", {infinite} ∞"
    at_the_right = ("axes fraction", "data")
    ax.annotate(text, (1.02, position), color=INK, fontsize=8, xycoords=at_the_right, va="center")


def scale_in_mm(ax: Any, values: Iterable[float]) -> None:
    """A logarithmic scale that begins at 0: on a linear one the farthest would hide the others."""
    farthest = max([1.0, *filter(isfinite, values)])
    ax.set_xscale("symlog")
    ticks = [mm for mm in TICKS_MM if mm <= 1.3 * farthest]
    ax.set(xticks=ticks, xticklabels=ticks, xlim=(-0.1, 1.3 * farthest))
    ax.minorticks_off()
