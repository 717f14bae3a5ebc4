"""Pictures of a pre-training run: the reconstruction sheet and the loss curve.

matplotlib is imported where it is used: it takes half a second, and `Figure` without pyplot needs no display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]


class Triple(NamedTuple):
    """One crop before, disrupted and reconstructed; each (c, d, h, w)."""

    title: str
    x: Picture
    x_hat: Picture
    x_rec: Picture


def reconstruction_sheet(path: Path, rows: Sequence[Triple]) -> None:
    """figures/reconstruction.png: a row for each modality with x, x_hat, x_rec and |x - x_rec|, the middle slice.

    All but the last column share the row's grey scale; the error is shown four times as bright.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9 * len(rows)), layout="constrained")
    axes = np.atleast_2d(np.asarray(figure.subplots(len(rows), 4)))
    for line, (title, x, x_hat, x_rec) in zip(axes, rows):
        low, high = float(x.min()), float(x.max())
        error = np.abs(x - x_rec)
        names = (
            f"{title}   x",
            f"x_hat   L1 {np.abs(x - x_hat).mean():.4f}",
            f"x_rec   L1 {error.mean():.4f}",
            "|x - x_rec|",
        )
        limits = ((low, high),) * 3 + ((0.0, (high - low) / 4),)
        for place, picture, name, (bottom, top) in zip(
            line, (x, x_hat, x_rec, error), names, limits
        ):
            place.imshow(
                middle_slice(picture),
                cmap="gray",
                vmin=bottom,
                vmax=top,
                origin="lower",
                interpolation="nearest",
            )
            place.set_title(name, fontsize=9)
            place.set_axis_off()
    figure.savefig(path, dpi=110)


def middle_slice(x: Picture) -> Picture:
    """The axial slice through the middle, right side of the patient on the left as radiologists read it."""
    return x[0, ::-1, :, x.shape[-1] // 2].T


def loss_curve(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """figures/loss.png: training L1 and, where it was taken, validation L1 against the loss of doing nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, key, label in (
        ("train", "l1_raw", "training"),
        ("validation", "l1", "validation"),
        ("validation", "l1_input", "validation, doing nothing: L1(x_hat, x)"),
    ):
        points = [
            (e["step"], e[key]) for e in events if e["event"] == kind and e.get(key) is not None
        ]
        axes.plot(
            *zip(*points) if points else ([], []),
            label=label,
            marker="" if kind == "train" else ".",
        )
    axes.set(xlabel="step", ylabel="L1, intensities as normalised", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


class Segmented(NamedTuple):
    """One volume with its true and its predicted labels; each (d, h, w)."""

    title: str
    image: Picture
    label: NDArray[Any]
    prediction: NDArray[Any]


def overlay_sheet(path: Path, cases: Sequence[Segmented]) -> None:
    """figures/overlay.png: a row per case, truth and prediction on the planes through the labels' centre."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.3 * len(cases)), layout="constrained")
    axes = np.atleast_2d(np.asarray(figure.subplots(len(cases), 6)))
    for line, case in zip(axes, cases):
        inside = np.argwhere(case.label > 0)
        centre = (
            inside.mean(0).round().astype(int) if len(inside) else np.array(case.label.shape) // 2
        )
        top = max(int(case.label.max()), int(case.prediction.max()), 1)
        for n, place in enumerate(line):
            axis, labels = n // 2, (case.label, case.prediction)[n % 2]
            # Turned as in `middle_slice`; a sagittal plane has the patient look to the left.
            grey, plane = (each.take(centre[axis], axis)[::-1].T for each in (case.image, labels))
            place.imshow(grey, cmap="gray", origin="lower")
            coloured = np.ma.masked_equal(plane, 0)
            place.imshow(
                coloured,
                cmap="turbo",
                alpha=0.5,
                vmin=1,
                vmax=top,
                origin="lower",
                interpolation="nearest",
            )
            place.set_title(
                f"{case.title[:24] if n == 0 else ''}  {('truth', 'prediction')[n % 2]}", fontsize=8
            )
            place.set_axis_off()
    figure.savefig(path, dpi=110)


def seg_curve(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """figures/loss.png of a fine-tuning run: training loss, and validation Dice on its own axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    right = axes.twinx()
    for place, kind, key, style in (
        (axes, "train", "loss", "C0-"),
        (right, "validation", "dice", "C1.-"),
    ):
        points = [
            (e["step"], e[key]) for e in events if e["event"] == kind and e.get(key) is not None
        ]
        place.plot(*zip(*points) if points else ([], []), style)
    axes.set(xlabel="step", ylabel="training loss")
    right.set(ylabel="validation Dice", ylim=(0, 1))
    figure.savefig(path, dpi=110)
