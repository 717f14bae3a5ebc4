"""Every picture of the project: reconstructions, curves, overlays, distributions of scores.

matplotlib is imported where it is used, because that takes half a second. `Figure` without pyplot
needs no display. Volumes are (d, h, w), from the patient's right to left, back to front, feet to
head.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from math import ceil, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dae.boxes import bounding_box
from dae.data.preprocess import by
from dae.files import write_atomic

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

# Of points on a white ground; with the markers 35 modalities are told apart.
POINT_COLOURS = ("#3f8efc", "#e4572e", "#2a9d5c", "#8e44ad", "#c99700", "#00798c", "#7f5539")
MARKERS = ("o", "s", "^", "D", "v")

PER_INCH = 12  # letters of a title
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


def entitle(figure: Any, title: str) -> None:
    """A title in as many lines as the figure is narrow: it would be cut off at both sides."""
    width = int(PER_INCH * figure.get_figwidth())
    lines = [fill(line, width) for line in title.split("\n")]
    figure.suptitle("\n".join(lines), fontsize=10)


def png(figure: Any, **options: Any) -> bytes:
    """The figure as the content of a PNG file, the same bytes each time."""
    take_dollars_as_they_are(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None}, **options)
    return stream.getvalue()


def save(figure: Any, path: Path) -> None:
    """The figure as a file, atomic. Raises OSError that names it."""
    take_dollars_as_they_are(figure)
    write_atomic(path, partial(figure.savefig, dpi=110))


def take_dollars_as_they_are(figure: Any) -> None:
    """A class may be called $x$, which is no formula. Numbers of a log axis are formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)


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
    save(figure, path)


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
    save(figure, path)


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
    save(figure, path)


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
    save(figure, path)


def seg_curve(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """figures/loss.png of fine-tuning: training loss, and validation Dice on its own axis."""
    figure = new_figure(7, 4)
    ax = figure.subplots()
    ax_of_dice = ax.twinx()
    draw_curve(ax, events, "train", "loss", color="C0")
    draw_curve(ax_of_dice, events, "validation", "dice", color="C1", marker=".")

    ax.set(xlabel="step", ylabel="training loss")
    ax_of_dice.set(ylabel="validation Dice", ylim=(0, 1))
    save(figure, path)


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
    if outlined is not None and min(outlined.shape) > 1:  # a line of voxels has no outline
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
    save(figure, path)


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


# --- the pictures of the paper: one crop, and what the method makes of it

LEFT_OUT = "#f2a65a"  # tokens and channels that are masked
GAP = 2  # pixels between the tiles of a montage
TILES = 16  # channels of Figure 3 that are shown as pictures


class Display(NamedTuple):
    """How every volume of one picture is drawn: the same plane, the same grey scale."""

    title: str
    grey: tuple[float, float]  # normalised values that are black and white
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm


class Tokens(NamedTuple):
    """Tokens of one crop (c, d, h, w) after masking, and what is masked."""

    title: str
    values: Picture
    mask: NDArray[np.bool_]  # (c, d, h, w)


class Stages(NamedTuple):
    """One crop at each step of Figure 1."""

    display: Display
    volumes: Mapping[str, Picture]  # by title, (c, d, h, w) each: x first, then what disrupts it
    tokens: Picture  # (c, d, h, w)
    masked: Tokens | None  # None where the method masks nothing
    x: Picture
    x_rec: Picture | None  # None without trained weights


class Disruption(NamedTuple):
    """One crop at one strength of one disruption."""

    title: str
    x_hat: Picture  # (c, d, h, w)


class Reconstruction(NamedTuple):
    """What one network makes of a crop."""

    name: str
    x_hat: Picture  # (c, d, h, w)
    x_rec: Picture
    hidden: NDArray[np.bool_] | None  # (d, h, w): voxels whose tokens the network is not given


def pipeline_sheet(path: Path, stages: Stages) -> None:
    """Figure 1: a crop, disrupted; its tokens, masked; and its reconstruction, where there is one.

    One row for the volumes, one for the tokens and what comes out.
    """
    panels = 1 + (stages.masked is not None) + 2 * (stages.x_rec is not None)
    columns = max(len(stages.volumes), panels, 2)
    figure = new_figure(2.9 * columns, 7)
    entitle(figure, stages.display.title)
    above, below = figure.subfigures(2, 1)

    axes = above.subplots(1, len(stages.volumes), squeeze=False)[0]
    for ax, (title, volume) in zip(axes, stages.volumes.items()):
        draw_axial(ax, volume, title, stages.display)

    # Where there is room, the tiles of the tokens lie in a wide block.
    wide = columns / panels
    axes = iter(below.subplots(1, panels, squeeze=False)[0])
    ranges = ranges_of(stages.tokens)
    channels, *grid = stages.tokens.shape
    title = f"tokens of x_hat:\n{channels} channels on a grid of {by(grid)}"
    draw_tiles(next(axes), unmasked(title, stages.tokens), ranges, wide=wide)
    if stages.masked is not None:
        draw_tiles(next(axes), stages.masked, ranges, wide=wide)
    if stages.x_rec is not None:
        error = np.abs(stages.x_rec - stages.x)
        title = f"x_rec\nL1(x_rec, x) {error.mean():.4f}"
        draw_axial(next(axes), stages.x_rec, title, stages.display)
        draw_error(next(axes), error, stages.display)
    save(figure, path)


def disruption_sheet(
    path: Path,
    *,
    display: Display,
    x: Picture,
    volumes: Mapping[str, Sequence[Disruption]],
    tokens: Picture,
    masked: Sequence[Tokens],
) -> None:
    """What sigma, epsilon and r do: a row for each, from weak to strong.

    `volumes` are rows of pictures by the name of the disruption; the tokens are the last row.
    """
    strengths = [len(row) for row in volumes.values()]
    columns = 1 + max(*strengths, len(masked))
    rows = len(volumes) + 1
    figure = new_figure(2.8 * columns, 3.1 * rows)
    entitle(figure, display.title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()

    for axes_of_row, (name, row) in zip(axes, volumes.items()):
        draw_axial(axes_of_row[0], x, f"{name}\nx", display)
        for ax, disruption in zip(axes_of_row[1:], row):
            error = np.abs(disruption.x_hat - x).mean()
            title = f"{disruption.title}\nL1(x_hat, x) {error:.4f}"
            draw_axial(ax, disruption.x_hat, title, display)

    ranges = ranges_of(tokens)
    before = unmasked("local masking\ntokens of x", tokens)
    for ax, panel in zip(axes[-1], (before, *masked)):
        draw_tiles(ax, panel, ranges)
    save(figure, path)


def masking_sheet(
    path: Path, *, display: Display, x: Picture, tokens: Picture, masked: Sequence[Tokens]
) -> None:
    """Figure 3: local masking leaves channels out, token masking leaves tokens out.

    Above are all channels of the tokens on one line through the crop, below some channels as
    pictures.
    """
    panels = (unmasked("tokens of x\nnothing masked", tokens), *masked)
    figure = new_figure(3.1 * (1 + len(panels)), 6.9)
    entitle(figure, display.title)
    grid = figure.add_gridspec(2, 1 + len(panels))

    ax = figure.add_subplot(grid[:, 0])
    draw_axial(ax, x, "x, and the line of tokens\nthat is shown on the right", display)
    draw_line_of_tokens(ax, x, tokens)

    ranges = ranges_of(tokens)
    shown = evenly(len(tokens), TILES)
    for column, panel in enumerate(panels, start=1):
        ax = figure.add_subplot(grid[0, column])
        draw_token_channels(ax, panel, ranges)

        ax = figure.add_subplot(grid[1, column])
        title = f"{len(shown)} of the {len(tokens)} channels, as pictures"
        some = Tokens(title, panel.values[shown], panel.mask[shown])
        draw_tiles(ax, some, tuple(limit[shown] for limit in ranges))
    save(figure, path)


def reconstructions_sheet(
    path: Path, *, display: Display, x: Picture, columns: Sequence[Reconstruction]
) -> None:
    """Figure 2: a column for each network: x_hat, x_rec and the error, all on the same scales."""
    figure = new_figure(2.9 * (1 + len(columns)), 9.6)
    entitle(figure, display.title)
    axes = figure.subplots(3, 1 + len(columns), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()

    draw_axial(axes[0, 0], x, "x", display)
    largest = largest_error(display)
    say(axes[1, 0], "x_rec: what each network\nmakes of its x_hat")
    say(axes[2, 0], f"the error |x_rec - x|:\nwhite is 0,\ndarkest is {largest:.2f} and more")

    for (top, middle, bottom), column in zip(axes.T[1:], columns):
        doing_nothing = np.abs(column.x_hat - x).mean()
        error = np.abs(column.x_rec - x)
        title = f"{column.name}\nx_hat   L1(x_hat, x) {doing_nothing:.4f}"
        draw_axial(top, column.x_hat, title, display)
        if column.hidden is not None:
            top.set_title(f"{column.name}\nx_hat is x, L1 0; orange: not given", fontsize=9)
            draw_hidden(top, column.hidden, display)
        draw_axial(middle, column.x_rec, f"x_rec   L1(x_rec, x) {error.mean():.4f}", display)
        draw_error(bottom, error, display)
    save(figure, path)


# --- parts of these pictures


def draw_axial(ax: Any, volume: Picture, title: str, display: Display) -> None:
    """The axial plane through the middle of the first channel (c, d, h, w), in mm."""
    low, high = display.grey
    draw_middle(ax, volume, title, low, high)
    ax.set_aspect(display.spacing[1] / display.spacing[0])


def draw_error(ax: Any, error: Picture, display: Display) -> None:
    """The same plane of an error, white where it is 0."""
    red = plane(error[0], axis=2, index=error.shape[-1] // 2)
    largest = largest_error(display)
    ax.imshow(red, cmap="Reds", vmin=0, vmax=largest, origin="lower", interpolation="nearest")
    ax.set_title(f"|x_rec - x|   0 to {largest:.2f}", fontsize=9)
    ax.set_aspect(display.spacing[1] / display.spacing[0])
    ax.set_axis_off()


def largest_error(display: Display) -> float:
    """The error that has the darkest colour: half of the grey scale."""
    low, high = display.grey
    return (high - low) / 2


def draw_hidden(ax: Any, hidden: NDArray[np.bool_], display: Display) -> None:
    """Colour over the voxels (d, h, w) that a network is not given."""
    from matplotlib.colors import ListedColormap

    covered = plane(hidden, axis=2, index=hidden.shape[-1] // 2)
    covered = np.ma.masked_equal(covered.astype(int), 0)
    ax.imshow(covered, cmap=ListedColormap([LEFT_OUT]), origin="lower", interpolation="nearest")
    ax.set_aspect(display.spacing[1] / display.spacing[0])


def say(ax: Any, text: str) -> None:
    """Words in place of a picture."""
    ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, transform=ax.transAxes)
    ax.set_axis_off()


def unmasked(title: str, tokens: Picture) -> Tokens:
    return Tokens(title, tokens, np.zeros(tokens.shape, bool))


def ranges_of(tokens: Picture) -> tuple[Picture, Picture]:
    """Percentiles 2 and 98 of each channel, which are drawn black and white: (c,) twice.

    Channels of an embedding differ in scale, so each has its own.
    """
    low, high = np.percentile(tokens, (2, 98), axis=(1, 2, 3))
    return low, high


def greys(panel: Tokens, ranges: tuple[Picture, ...]) -> np.ma.MaskedArray[Any, Any]:
    """Tokens as greys from 0 to 1, by the ranges of their channels; what is masked is left out."""
    low, high = (limit[:, None, None, None] for limit in ranges)
    span = np.maximum(high - low, np.finfo(np.float32).tiny)
    return np.ma.array((panel.values - low) / span, mask=panel.mask)


def draw_tiles(ax: Any, panel: Tokens, ranges: tuple[Picture, ...], *, wide: float = 1.0) -> None:
    """The axial plane through the middle of every channel, side by side."""
    grey = greys(panel, ranges)
    middle = grey.shape[-1] // 2
    planes = [plane(channel, axis=2, index=middle) for channel in grey]
    ax.imshow(montage(planes, wide=wide), **of_tokens())
    ax.set_title(panel.title, fontsize=9)
    ax.set_axis_off()


def montage(planes: Sequence[NDArray[Any]], *, wide: float = 1.0) -> np.ma.MaskedArray[Any, Any]:
    """Planes (h, w) as tiles of one picture, the first at the top left; white between them.

    About `wide` times as many tiles lie across as down. Row 0 of the picture is at its bottom, as
    in the planes.
    """
    across = ceil((wide * len(planes)) ** 0.5)
    down = ceil(len(planes) / across)
    height, width = (size + GAP for size in planes[0].shape)

    sheet = np.ma.ones((down * height - GAP, across * width - GAP))
    for n, tile in enumerate(planes):
        row, column = divmod(n, across)
        bottom = (down - 1 - row) * height
        left = column * width
        sheet[bottom : bottom + height - GAP, left : left + width - GAP] = tile
    return sheet


def of_tokens() -> dict[str, Any]:
    """Options of imshow for greys of tokens."""
    from matplotlib import colormaps

    colours = colormaps["gray"].with_extremes(bad=LEFT_OUT)
    return {"cmap": colours, "vmin": 0, "vmax": 1, "origin": "lower", "interpolation": "nearest"}


def draw_token_channels(ax: Any, panel: Tokens, ranges: tuple[Picture, ...]) -> None:
    """The tokens of a line from left to right, and all channels of each from bottom to top."""
    grey = greys(panel, ranges)
    _, _, height, width = grey.shape
    line = grey[:, ::-1, height // 2, width // 2]  # as `plane` turns an axial plane
    ax.imshow(line, aspect="auto", **of_tokens())
    ax.set_title(panel.title, fontsize=9)
    ax.set_xlabel(f"{line.shape[1]} tokens, from left to right on the line", fontsize=8)
    ax.set_ylabel(f"{line.shape[0]} channels of each token", fontsize=8)
    ax.set(xticks=[], yticks=[])


def draw_line_of_tokens(ax: Any, x: Picture, tokens: Picture) -> None:
    """Where in the axial plane the tokens of `draw_token_channels` lie."""
    from matplotlib.patches import Rectangle

    stride = x.shape[2] // tokens.shape[2]  # voxels of a token
    first = tokens.shape[2] // 2 * stride
    line = Rectangle((-0.5, first - 0.5), x.shape[1], stride, fill=False, color=DOT, linewidth=1.2)
    ax.add_patch(line)


def evenly(n: int, count: int) -> list[int]:
    """`count` of the numbers 0 to n - 1, evenly spread; all of them where there are fewer."""
    count = min(n, count)
    return [k * n // count for k in range(count)]


# --- segmentations of several methods


class Segmentation(NamedTuple):
    """The labels of one method, or of the truth; (d, h, w)."""

    name: str
    labels: Labels
    dice: float | None = None  # mean over the classes; None for the truth


class CaseShown(NamedTuple):
    """One case, its truth, and what each method predicts."""

    title: str
    image: NDArray[Any] | None  # (d, h, w)
    truth: Labels
    predictions: Sequence[Segmentation]
    spacing: Sequence[float]  # mm


def segmentation_sheet(path: Path, cases: Sequence[CaseShown], classes: Mapping[int, str]) -> None:
    """Figure 4: the truth, then each method, on the same axial, coronal and sagittal plane.

    Labels are filled with colour. Over a prediction the truth is drawn as a line.
    """
    columns = 1 + len(cases[0].predictions)
    figure = new_figure(max(2.7 * columns, 6), 7.4 * len(cases) + 0.6)
    for band, case in zip(figure.subfigures(len(cases), 1, squeeze=False)[:, 0], cases):
        draw_case(band, case, list(classes))

    add_legend(figure, classes)
    save(figure, path)


def draw_case(band: Any, case: CaseShown, classes: Sequence[int]) -> None:
    """Three rows of planes, a column for the truth and for each method."""
    from matplotlib.colors import ListedColormap

    case = cut_to_labels(case)
    image = case.image
    low, high = (0.0, 4.0)  # an organ, 1, is a dark grey
    if image is None:
        image = (case.truth > 0).astype(np.float32)
    else:
        low, high = contrast_of(image, case.truth)

    truth = Segmentation("truth", case.truth)
    columns = (truth, *case.predictions)
    depth, height, width = (n * mm for n, mm in zip(case.truth.shape, case.spacing))
    extents = {2: (depth, height), 1: (depth, width), 0: (height, width)}

    title = case.title
    if case.predictions:
        title += "   filled: the labels of each column; line: the truth"
    band.suptitle(title, fontsize=10)
    axes = band.subplots(
        3, len(columns), squeeze=False, height_ratios=[up for _, up in extents.values()]
    )
    for axes_of_row, (axis, (across, up)) in zip(axes, extents.items()):
        index = fullest_plane(case.truth, axis)
        true = plane(renumbered(case.truth, classes), axis, index)
        for ax, shown in zip(axes_of_row, columns):
            draw_overlay(
                ax,
                plane(image, axis, index),
                plane(renumbered(shown.labels, classes), axis, index),
                outlined=None if shown is truth else true,
                colours=ListedColormap(colours_of(classes)),
                largest=len(classes),
                alpha=0.5,
                extent=(0, across, 0, up),
                vmin=low,
                vmax=high,
            )

    for ax, shown in zip(axes[0], columns):
        dice = "" if shown.dice is None else f"\nDice {shown.dice:.3f}"
        ax.set_title(shown.name + dice, fontsize=9)


def cut_to_labels(case: CaseShown) -> CaseShown:
    """The case cut to what is labelled by anybody, with a margin of CONTEXT mm."""
    occupied = case.truth > 0
    for prediction in case.predictions:
        occupied = occupied | (prediction.labels > 0)
    box = bounding_box(occupied, [ceil(CONTEXT / mm) for mm in case.spacing])
    if box is None:
        return case

    cut = [shown._replace(labels=shown.labels[box]) for shown in case.predictions]
    image = None if case.image is None else case.image[box]
    return case._replace(image=image, truth=case.truth[box], predictions=cut)


def fullest_plane(labels: Labels, axis: int) -> int:
    """The plane with the most labelled voxels."""
    in_plane = np.moveaxis(labels > 0, axis, 0).sum(axis=(1, 2))
    return int(in_plane.argmax())


def add_legend(figure: Any, classes: Mapping[int, str]) -> None:
    """The colour of each class, below all pictures."""
    from matplotlib.patches import Patch

    patches = []
    for name, colour in zip(classes.values(), colours_of(list(classes))):
        patches.append(Patch(color=colour, label=name))
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


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


# --- features


def cka_chart(values: Sequence[float], title: str) -> bytes:
    """A PNG of CKA by stage (Table 7)."""
    stages = range(1, len(values) + 1)
    figure = new_figure(5.5, 3.6)
    ax = figure.subplots()
    ax.plot(stages, values, color=DOT, marker="o")
    for stage, value in zip(stages, values):
        label = f"{value:.3f}"
        ax.annotate(label, (stage, value), (0, 7), textcoords="offset points", ha="center")

    finite = [value for value in values if isfinite(value)]
    ax.set(xticks=stages, xlabel="stage", ylabel="CKA", ylim=(min([0, *finite]) - 0.05, 1.12))
    ax.set_title(title, fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    return png(figure)


def embedding_chart(
    points: NDArray[np.float64], shares: NDArray[np.float64], modalities: Sequence[str], title: str
) -> bytes:
    """A PNG of volumes in the plane of their first two principal components.

    points (n, 2); shares (2,) of the variance; each modality has a colour and a marker.
    """
    figure = new_figure(6, 4.8)
    ax = figure.subplots()
    names = list(dict.fromkeys(modalities))
    for name, colour, marker in zip(names, cycle(POINT_COLOURS), cycle(MARKERS)):
        own = [point for point, modality in zip(points, modalities) if modality == name]
        across, up = zip(*own)
        ax.scatter(across, up, s=34, c=colour, marker=marker, label=f"{name}, n {len(own)}")

    ax.set_xlabel(f"first component, {shares[0]:.0%} of the variance")
    ax.set_ylabel(f"second component, {shares[1]:.0%}")
    ax.set_title(title, fontsize=9)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return png(figure)


# --- what is in the volumes of a list -------------------------------------------------------------

PER_ROW = 4  # panels of histograms


def strip_of_planes(planes: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG of the middle planes across d, h and w beside each other, axial first.

    Each is as `x.take(middle, axis)` gives it, in grey levels and in square pixels.
    """
    from matplotlib.image import imsave

    upright = [x[::-1].T[::-1] for x in reversed(planes)]
    height = max(len(x) for x in upright)
    padded = [np.pad(x, ((0, height - len(x)), (0, 2))) for x in upright]

    stream = io.BytesIO()
    imsave(stream, np.hstack(padded), cmap="gray", vmin=0, vmax=255, format="png")
    return stream.getvalue()


def histograms(
    by_modality: Mapping[str, Sequence[tuple[float, float, NDArray[np.int64]]]],
) -> bytes:
    """A PNG with a panel for each modality and in it a line for each volume.

    A volume is the two ends of its histogram, and its counts. Lines are as high as their peak.
    """
    rows = ceil(len(by_modality) / PER_ROW)
    figure = new_figure(13, 2.4 * rows)
    axes = figure.subplots(rows, PER_ROW, squeeze=False).ravel()
    for ax in axes[len(by_modality) :]:
        ax.set_visible(False)

    for ax, (name, volumes) in zip(axes, by_modality.items()):
        for low, high, counts in volumes:
            width = (high - low) / len(counts)
            centres = low + (np.arange(len(counts)) + 0.5) * width
            ax.plot(centres, counts / counts.max(), color=DOT, lw=0.8, alpha=0.5)
        ax.set_title(f"{name}, n {len(volumes)}", color=INK, loc="left", fontsize=11)
        ax.tick_params(colors=INK, length=0)
        ax.set_yscale("log")
        ax.set_yticks([])
        ax.minorticks_off()
        ax.spines[:].set_visible(False)
    return png(figure, transparent=True)
