"""From a prepared volume to a label map in the patient's own file: windows, flips, ensembles, and the way back.

The probabilities of a scan are classes times as large as the scan: 4.4 GB of float32 for 14 classes on 512 x 512 x 300
voxels. They never exist at once. Windows move along the first axis of the grid, and planes that no later window can
reach leave as finished slabs; the label map takes slabs in and keeps two planes at a time. What is held is as thick as
a window, whatever the volume's length.

Images are (c, d, h, w) in RAS order; k classes take the place of c in what is predicted; b windows go through at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise, product
from math import ceil
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dae.config.command_line import Size3
from dae.data.augment import crop
from dae.errors import InputError
from dae.evaluation.metrics import refuse

Predict = Callable[[Tensor], Tensor]  # windows (b, c, *window) -> logits (b, k, *window)

Combine = Literal["softmax", "logits"]


SLAB = 8  # planes handed over at once


# --- one axis, one window --------------------------------------------------------------------------------------------


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: the first at 0, the last flush with the end, the others evenly between them.

    No step is longer than the share of the window that does not overlap (but one voxel at the least).
    """
    refuse(size < window, f"an axis of {size} voxels has no room for a window of {window}")
    spare = size - window
    longest = max(
        1, int(window * (1 - overlap) + 1e-6)
    )  # .9 of ten voxels leave one, though floats say .9999999
    steps = ceil(spare / longest)
    return [round(n * spare / max(steps, 1)) for n in range(steps + 1)]


def gaussian(window: Size3) -> Tensor:
    """How much a window's word counts at each of its voxels, where its context is best the most: (*window), float32.

    A bell around the exact centre with an eighth of the window as its standard deviation, at most 1. Far corners
    have at least 1e-3: less, and rounding would speak where no other window does.
    """
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in window]
    d, h, w = (torch.exp(-0.5 * (x / (n / 8)) ** 2) for x, n in zip(axes, window))
    bell = torch.einsum("d,h,w->dhw", d, h, w)
    return (bell / bell.max()).clamp(min=1e-3).float()


def ensemble(
    predictors: Sequence[Predict],
    flips: Sequence[int],
    combine: Combine,
    classes: int,
    *,
    swap: Sequence[tuple[int, int]] = (),
    swap_axes: Sequence[int] = (0,),
) -> Predict:
    """One predictor that averages several, each over every combination of flips along the axes `flips` of the grid.

    In a flipped window a right kidney is called a left one by a network that was trained so. `swap` names such pairs
    by their place among the classes. What is said of them changes places wherever a window was flipped along one of
    `swap_axes` (or along any odd number of them).

    It gives the mean of softmax or of logits, in float32. Members that are equally sure of themselves are better
    averaged as logits; where one is too sure, logits let it outvote the others.
    """
    turns = [turn for n in range(len(flips) + 1) for turn in combinations(flips, n)]
    mirrored = list(range(classes))
    for a, b in swap:
        mirrored[a], mirrored[b] = b, a

    @torch.inference_mode()
    def mean(windows: Tensor) -> Tensor:
        shape = (len(windows), classes, *windows.shape[2:])
        total = torch.zeros(shape, device=windows.device)
        for turn, predict in product(turns, predictors):
            # `flip` copies, along no axis as well: a predictor may write into what it gets. What it gives is only read.
            dims = [axis + 2 for axis in turn]
            logits = predict(windows.flip(dims)).float()
            refuse(
                logits.shape != shape,
                f"predicted {tuple(logits.shape)} for windows that need {shape}",
            )
            answer = (logits.softmax(1) if combine == "softmax" else logits).flip(dims)
            exchanged = bool(swap) and len(set(turn) & set(swap_axes)) % 2 == 1
            total += answer[:, mirrored] if exchanged else answer
        return total.div_(len(turns) * len(predictors))

    return mean


# --- a volume --------------------------------------------------------------------------------------------------------


class OpenPlanes:
    """Weighted sums over the planes that windows still to come may reach: as many as a window is thick."""

    def __init__(self, classes: int, grid: Size3, bell: Tensor) -> None:
        """`grid` is (planes, H, W), `bell` the weights of a window, of as many planes."""
        self.bell = bell
        self.total = torch.zeros(
            classes, *grid, device=bell.device
        )  # float32, whatever the network computes in
        self.weight = torch.zeros(grid, device=bell.device)

    def add(self, prediction: Tensor, h: int, w: int) -> None:
        """A window (k, planes, *) whose corner is (h, w)."""
        rows, columns = slice(h, h + self.bell.shape[1]), slice(w, w + self.bell.shape[2])
        self.total[:, :, rows, columns] += prediction * self.bell
        self.weight[:, rows, columns] += self.bell

    def finish(self, planes: int) -> Iterator[Tensor]:
        """Means over the first planes, as copies (k, up to SLAB, H, W); then the others move up."""
        for total, weight in zip(
            self.total[:, :planes].split(SLAB, dim=1), self.weight[:planes].split(SLAB)
        ):
            assert weight.min() > 0, "a voxel that no window has covered"
            yield total / weight
        for sums in (
            *self.total,
            self.weight,
        ):  # class by class: a copy of all at once would double what is held
            sums[:-planes] = sums[planes:].clone()
            sums[-planes:] = 0


def sliding_window(
    image: NDArray[Any] | Tensor,
    predict: Predict | Sequence[Predict],
    *,
    window: Size3,
    classes: int,
    overlap: float = 0.5,
    batch: int = 4,
    device: torch.device | str,
    background: Sequence[float] | NDArray[np.float32],
    flips: Sequence[int] = (),
    swap: Sequence[tuple[int, int]] = (),
    swap_axes: Sequence[int] = (0,),
    combine: Combine = "softmax",
) -> Iterator[Tensor]:
    """Class probabilities of a whole image (c, d, h, w), as slabs (k, planes, h, w) in order along its first axis.

    Windows overlap by a share of `overlap` or more, and their predictions are averaged with the weights of `gaussian`.
    An image smaller than the window is centred in it, as in training, with `background` (c,) around. Several predictors
    are an ensemble, as is one over `flips` (axes 0, 1, 2; 0 swaps left and right, for a network that was trained so).
    `swap` are pairs of classes, by their place, that change places in a flip along one of `swap_axes`.
    `combine` says whether windows, flips and predictors are averaged as softmax or as logits. Raises ValueError.
    """
    pixels: NDArray[Any] = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    predictors = [predict] if callable(predict) else list(predict)
    refuse(pixels.ndim != 4, f"an image must be (c, d, h, w), got {pixels.shape}")
    refuse(
        len(background) != len(pixels),
        f"{len(pixels)} channels need as many background values, got {background}",
    )
    refuse(not predictors or batch < 1, "there must be a predictor and a window a batch")
    refuse(not 0 <= overlap < 1, f"overlap must lie in [0, 1), got {overlap}")
    refuse(
        combine not in ("softmax", "logits"), f"combine must be softmax or logits, got {combine}"
    )
    refuse(not set(flips) <= {0, 1, 2}, f"flips must be axes 0, 1, 2, got {flips}")
    paired = [each for pair in swap for each in pair]
    refuse(len(set(paired)) < len(paired), f"swap must name each class once, got {swap}")
    refuse(
        not set(paired) <= set(range(classes)),
        f"swap must name places among {classes} classes, got {swap}",
    )
    predict_all = ensemble(
        predictors, sorted(set(flips)), combine, classes, swap=swap, swap_axes=swap_axes
    )
    size, around = pixels.shape[1:], [float(value) for value in background]
    margin = [max(s - n, 0) // 2 for n, s in zip(size, window)]

    def predict_at(corners: Sequence[Size3]) -> Tensor:
        firsts = [[at - m for at, m in zip(corner, margin)] for corner in corners]
        windows = np.stack([crop(pixels, first, window, around) for first in firsts])
        return predict_all(torch.from_numpy(windows).to(device))

    grid = (max(size[0], window[0]), max(size[1], window[1]), max(size[2], window[2]))
    slabs = blend(
        predict_at, grid, gaussian(window).to(device), classes=classes, overlap=overlap, batch=batch
    )
    if combine == "logits":
        slabs = (slab.softmax(0) for slab in slabs)
    return cropped(slabs, margin, size)


def blend(
    predict_at: Callable[[Sequence[Size3]], Tensor],
    grid: Size3,
    bell: Tensor,
    *,
    classes: int,
    overlap: float,
    batch: int,
) -> Iterator[Tensor]:
    """Means of overlapping windows, each weighted by `bell`, as slabs (k, planes, *grid[1:]).

    `predict_at` maps up to `batch` corners to what is said of their windows, (b, k, *bell.shape). They go row by row:
    when all windows that start on one plane are in, the planes before the next start are finished.
    """
    fronts, *starts = (window_starts(n, s, overlap) for n, s in zip(grid, bell.shape))
    planes = OpenPlanes(classes, (len(bell), grid[1], grid[2]), bell)
    for front, next_front in pairwise([*fronts, grid[0]]):
        row = [(front, h, w) for h, w in product(*starts)]
        for some in (row[n : n + batch] for n in range(0, len(row), batch)):
            for (_, h, w), prediction in zip(some, predict_at(some)):
                planes.add(prediction, h, w)
        yield from planes.finish(next_front - front)


def cropped(
    slabs: Iterable[Tensor], corner: Sequence[int], size: Sequence[int]
) -> Iterator[Tensor]:
    """What lies in the box of `size` from `corner` on. Raises InputError on what is no number."""
    (first, h, w), at = corner, 0
    for slab in slabs:
        begin, at = at, at + slab.shape[1]
        planes = slice(max(first - begin, 0), max(first + size[0] - begin, 0))
        inside = slab[:, planes, h : h + size[1], w : w + size[2]]
        if not inside.isfinite().all():
            raise InputError(
                "the network's output is NaN or infinite; with --amp off it may be in range"
            )
        if inside.shape[1]:
            yield inside
