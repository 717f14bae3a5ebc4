"""Class probabilities of a whole volume: a sliding window, flips, and ensembles (Appendix F).

A volume is larger than what a network takes at once. Windows of the size of the training's crops
are cut from it so that they overlap. Each voxel gets the mean of what the windows over it say. A
window counts most at its centre, where its context is best.

The probabilities are classes times as large as the volume: 4.4 GB of float32 for 14 classes on
512 x 512 x 300 voxels. They never exist at once. Windows move along the first axis of the grid, and
planes that no later window can reach leave as finished slabs. What is held is as thick as a window,
whatever the volume's length.

Images are (c, d, h, w) in RAS order. Predictions have k classes in place of the c channels, or k
regions, which overlap: then each has a sigmoid of its own, where classes share a softmax. b windows
go through the network at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, pairwise, product
from math import ceil
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dae.config.command_line import Size3
from dae.config.evaluate import Ensemble
from dae.data.augment import crop
from dae.data.regions import Region, write_regions
from dae.errors import InputError

Predict = Callable[[Tensor], Tensor]  # windows (b, c, *window) -> logits (b, k, *window)
Decide = Callable[[Tensor], Tensor]  # probabilities (k, *grid) -> indices of classes (*grid)
Swap = Sequence[tuple[int, int]]  # pairs of classes, left and right, by their index

SLAB = 8  # planes of a slab, at most


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
    swap: Swap = (),
    swap_axes: Sequence[int] = (0,),
    combine: Ensemble = "softmax",
    are_regions: bool = False,
) -> Iterator[Tensor]:
    """Class probabilities of an image (c, d, h, w): slabs (k, planes, h, w), in order along d.

    Windows overlap by a share of `overlap` or more. An image smaller than the window is centred in
    it, as in training, with the values `background` (c,) around it.

    Several predictors are averaged, and each is averaged over all combinations of flips along the
    axes `flips` (0, 1, 2; 0 is left-right, for a network that was trained with such flips). `swap`
    and `swap_axes` are those of `mean_prediction`. `combine` says whether windows, flips and
    predictors are averaged as softmax or as logits. `are_regions` says that the `classes` are
    regions, with a sigmoid in place of the softmax.

    Raises ValueError on arguments that do not fit together, before the first slab is asked for.
    """
    pixels: NDArray[Any] = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    predictors = [predict] if callable(predict) else list(predict)
    check_window(pixels, predictors, overlap=overlap, batch=batch, background=background)
    check_averaging(classes, flips=flips, swap=swap, combine=combine)

    d, h, w = pixels.shape[1:]
    grid = (max(d, window[0]), max(h, window[1]), max(w, window[2]))
    margin = [
        (n - size) // 2 for n, size in zip(grid, (d, h, w))
    ]  # of background, before the image

    predict_windows = partial(
        mean_prediction,
        predictors=predictors,
        flips=combinations_of(flips),
        classes=classes,
        swap=swap,
        swap_axes=swap_axes,
        combine=combine,
        are_regions=are_regions,
    )
    predict_at = partial(
        predict_corners,
        pixels,
        predict_windows,
        window=window,
        margin=margin,
        background=[float(value) for value in background],
        device=device,
    )
    weights = gaussian(window).to(device)
    slabs = blend(predict_at, grid, weights, classes=classes, overlap=overlap, batch=batch)

    if combine == "logits":
        slabs = (probabilities(slab, 0, are_regions=are_regions) for slab in slabs)
    return crop_slabs(slabs, margin, (d, h, w))


def check_window(
    image: NDArray[Any],
    predictors: Sequence[Predict],
    *,
    overlap: float,
    batch: int,
    background: Sequence[float] | NDArray[np.float32],
) -> None:
    """Raises ValueError where the image and its windows cannot be predicted."""
    if image.ndim != 4:
        raise ValueError(f"an image must be (c, d, h, w), got {image.shape}")
    if len(background) != len(image):
        raise ValueError(f"{len(image)} channels need as many background values, got {background}")
    if not predictors or batch < 1:
        raise ValueError("there must be a predictor and a window a batch")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")


def check_averaging(classes: int, *, flips: Sequence[int], swap: Swap, combine: Ensemble) -> None:
    """Raises ValueError where flips, or classes that change places, are not there."""
    if combine not in get_args(Ensemble):
        raise ValueError(f"combine must be softmax or logits, got {combine}")
    if not set(flips) <= {0, 1, 2}:
        raise ValueError(f"flips must be axes 0, 1, 2, got {flips}")

    swapped: list[int] = []
    for pair in swap:
        swapped += pair
    if len(set(swapped)) < len(swapped):
        raise ValueError(f"swap must name each class once, got {swap}")
    if not set(swapped) <= set(range(classes)):
        raise ValueError(f"swap must name places among {classes} classes, got {swap}")


# --- windows and their weights


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: the first at 0, the last flush with the end, the others
    evenly between them.

    No step is longer than the share of the window that does not overlap, or than one voxel where
    that share is less. Raises ValueError where the axis is shorter than the window.
    """
    if size < window:
        raise ValueError(f"an axis of {size} voxels has no room for a window of {window}")

    # An overlap of .9 leaves one of ten voxels, though 10 * (1 - .9) is .9999999 in floats.
    longest_step = max(1, int(window * (1 - overlap) + 1e-6))
    last = size - window
    steps = ceil(last / longest_step)
    if steps == 0:
        return [0]
    return [round(n * last / steps) for n in range(steps + 1)]


def gaussian(window: Size3) -> Tensor:
    """How much a window counts at each of its voxels: (*window), float32, from 1e-3 to 1.

    A Gaussian around the exact centre, whose standard deviation is an eighth of the window. Far
    corners get at least 1e-3: with less, a voxel that no other window covers would be lost to
    rounding.
    """
    d, h, w = (gaussian_line(n) for n in window)
    weights = torch.einsum("d,h,w->dhw", d, h, w)
    return (weights / weights.max()).clamp(min=1e-3).float()


def gaussian_line(size: int) -> Tensor:
    """`gaussian` along one axis: (size,), float64, without the floor."""
    from_centre = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.exp(-0.5 * (from_centre / (size / 8)) ** 2)


def predict_corners(
    image: NDArray[Any],
    predict: Predict,
    corners: Sequence[Size3],
    *,
    window: Size3,
    margin: Sequence[int],
    background: Sequence[float],
    device: torch.device | str,
) -> Tensor:
    """Predictions (b, k, *window) of the windows that begin at these corners of the grid.

    In the grid a `margin` of background comes before the image (c, d, h, w).
    """
    windows = []
    for corner in corners:
        in_image = [at - before for at, before in zip(corner, margin)]
        windows.append(crop(image, in_image, window, background))
    return predict(torch.from_numpy(np.stack(windows)).to(device))


# --- blending


def blend(
    predict_at: Callable[[Sequence[Size3]], Tensor],
    grid: Size3,
    weights: Tensor,
    *,
    classes: int,
    overlap: float,
    batch: int,
) -> Iterator[Tensor]:
    """Weighted means of overlapping windows over a grid (d, h, w): slabs (k, planes, h, w).

    `predict_at` maps up to `batch` corners of windows to their predictions (b, k, *window), and
    `weights` (*window) are the same for every window.
    """
    starts_d, starts_h, starts_w = (
        window_starts(size, n, overlap) for size, n in zip(grid, weights.shape)
    )
    open_planes = OpenPlanes(classes, grid, weights)

    for front, next_front in pairwise([*starts_d, grid[0]]):
        corners = [(front, h, w) for h, w in product(starts_h, starts_w)]
        for n in range(0, len(corners), batch):
            some_corners = corners[n : n + batch]
            predictions = predict_at(some_corners)
            for (_, h, w), prediction in zip(some_corners, predictions):
                open_planes.add(prediction, h, w)

        # Later windows begin at the next front, so the planes before it are finished.
        yield from open_planes.finish(next_front - front)


class OpenPlanes:
    """Weighted sums over the planes that later windows may reach: as many as a window is thick."""

    def __init__(self, classes: int, grid: Size3, weights: Tensor) -> None:
        """`grid` is (d, h, w). `weights` (*window) are those of every window."""
        open_grid = (len(weights), grid[1], grid[2])
        self.weights = weights
        # float32, whatever the network computes in.
        self.weighted_sum = torch.zeros(classes, *open_grid, device=weights.device)
        self.weight_sum = torch.zeros(open_grid, device=weights.device)

    def add(self, prediction: Tensor, h: int, w: int) -> None:
        """Add the prediction (k, *window) of a window that begins at row h and column w."""
        rows = slice(h, h + self.weights.shape[1])
        columns = slice(w, w + self.weights.shape[2])
        self.weighted_sum[:, :, rows, columns] += prediction * self.weights
        self.weight_sum[:, rows, columns] += self.weights

    def finish(self, planes: int) -> Iterator[Tensor]:
        """Means (k, up to SLAB, h, w) over the first `planes` planes. Then the others move up."""
        for first in range(0, planes, SLAB):
            slab = slice(first, min(first + SLAB, planes))
            weight = self.weight_sum[slab]
            assert weight.min() > 0, "a voxel that no window has covered"
            yield self.weighted_sum[:, slab] / weight

        # Class by class: a copy of all classes at once would double what is held.
        for sums in (*self.weighted_sum, self.weight_sum):
            sums[:-planes] = sums[planes:].clone()
            sums[-planes:] = 0


def crop_slabs(
    slabs: Iterable[Tensor], corner: Sequence[int], size: Sequence[int]
) -> Iterator[Tensor]:
    """The slabs of the box of `size` (d, h, w) that begins at `corner`.

    Raises InputError where the box holds NaN or infinity.
    """
    d, h, w = corner
    first = 0  # plane of the slab
    for slab in slabs:
        planes = slice(max(d - first, 0), max(d + size[0] - first, 0))
        inside = slab[:, planes, h : h + size[1], w : w + size[2]]
        first += slab.shape[1]

        if not inside.isfinite().all():
            raise InputError(
                "the network's output is NaN or infinite; with --amp off it may be in range"
            )
        if inside.shape[1] > 0:
            yield inside


# --- flips and ensembles


def combinations_of(flips: Sequence[int]) -> list[tuple[int, ...]]:
    """Every set of the axes, from none to all: (0, 2) gives (), (0,), (2,), (0, 2)."""
    axes = sorted(set(flips))
    sets: list[tuple[int, ...]] = []
    for n in range(len(axes) + 1):
        sets += combinations(axes, n)
    return sets


@torch.inference_mode()
def mean_prediction(
    windows: Tensor,
    *,
    predictors: Sequence[Predict],
    flips: Sequence[tuple[int, ...]],
    classes: int,
    swap: Swap,
    swap_axes: Sequence[int],
    combine: Ensemble,
    are_regions: bool = False,
) -> Tensor:
    """The mean over predictors and flips: windows (b, c, *window) -> (b, k, *window), float32.

    It is the mean of softmax, for regions of sigmoids, or of logits. Members that are equally sure
    of themselves are better averaged as logits. Where one is too sure, logits let it outvote the
    others.

    A network that was trained with `swap` calls a right kidney in a mirrored window a left one. The
    channels of such pairs change places wherever a window was flipped along an odd number of the
    axes `swap_axes`. Raises ValueError where a predictor's output has another shape.
    """
    shape = (len(windows), classes, *windows.shape[2:])
    swapped = list(range(classes))
    for a, b in swap:
        swapped[a], swapped[b] = b, a

    total = torch.zeros(shape, device=windows.device)
    for axes, predict in product(flips, predictors):
        dims = [axis + 2 for axis in axes]

        # `flip` makes a copy, even along no axis: a predictor may write into what it gets.
        # What it returns is only read, since a predictor may use that memory again.
        logits = predict(windows.flip(dims)).float()
        if logits.shape != shape:
            raise ValueError(f"predicted {tuple(logits.shape)} for windows that need {shape}")

        scores = logits
        if combine == "softmax":
            scores = probabilities(logits, 1, are_regions=are_regions)
        scores = scores.flip(dims)
        mirrorings = set(axes) & set(swap_axes)
        if swap and len(mirrorings) % 2 == 1:
            scores = scores[:, swapped]
        total += scores

    return total.div_(len(flips) * len(predictors))


# --- what a network says of a voxel


def probabilities(logits: Tensor, dim: int, *, are_regions: bool) -> Tensor:
    """Of classes, which share a softmax along `dim`, or of regions, each by itself."""
    if not are_regions:
        return logits.softmax(dim)
    return logits.sigmoid() + 0 * logits  # NaN for infinity, which softmax also gives


def decide_by(labels: Sequence[int], regions: Sequence[Region]) -> Decide:
    """How probabilities become labels: the likeliest class, or all regions above a half.

    The labels of a network, ascending; what comes out are indices among them.
    """
    if not regions:
        return likeliest
    return partial(above_half, written=[list(labels).index(region.written) for region in regions])


def likeliest(probability: Tensor) -> Tensor:
    """(k, *grid) -> (*grid), int64."""
    # On a CPU `max` is three times as fast as `argmax`.
    return probability.max(0).indices


def above_half(probability: Tensor, written: Sequence[int]) -> Tensor:
    """(k, *grid) -> (*grid), uint8: what is `written` for each region, later ones over earlier."""
    return write_regions(probability > 0.5, written)
