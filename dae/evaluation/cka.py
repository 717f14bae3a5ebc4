"""Table 7: how much of its features a network keeps in fine-tuning, stage by stage.

Centred kernel alignment (CKA, Kornblith et al. 2019) compares two sets of features of the same
examples. It is 1 where one is a rotated and scaled copy of the other, and 0 where they have nothing
in common. What an example is, the paper does not say; here are both readings:

    crops      an example is a crop, its features are all values of a state, (c d h w)
    positions  an example is a position of the state's grid in a crop, its features are (c)

The usual estimate of CKA is near 1 for unrelated features too, where there are many more features
than examples, as in a state. So the terms are the unbiased ones, HSIC_1 of Song et al. (2012). For
more crops than fit into memory they are averaged over minibatches before the ratio is taken, as
Nguyen et al. (2021) do.

All of it is in float64. Axis letters: n examples, c channels, d h w the grid, p q features.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from dae.config.evaluate import CkaConfig
from dae.evaluation.report import aligned

States = Sequence[Tensor]  # of one crop, stage by stage: (c, d, h, w) each

# Features that are made float64 at once: a state may have millions.
CHUNK = 2**20


class Terms(NamedTuple):
    """The three terms of CKA, each an HSIC_1 or a sum of several."""

    both: float  # of x and y
    x: float  # of x with itself
    y: float

    def cka(self) -> float:
        """Slightly below 0 now and then, as an unbiased estimate of 0 is.

        NaN where the features of one side are the same for all examples.
        """
        if self.x <= 0 or self.y <= 0:
            return math.nan
        return self.both / math.sqrt(self.x * self.y)


# --- all stages


def cka_of_stages(
    pairs: Iterable[tuple[States, States]], config: CkaConfig
) -> list[dict[str, Any]]:
    """A row for each stage, from the states of both networks on each of --crops crops.

    Stage 1 is the first state that the backbone's `encode` gives. Of Swin UNETR that is the tokens;
    stages 2 to 5 are the outputs of its four stages.
    """
    stages: list[OverCrops | OverPositions] = []
    shapes: list[Sequence[int]] = []
    for before, after in pairs:
        if not stages:
            shapes = [state.shape for state in after]
            stages = [new_stage(config) for _ in shapes]
        for stage, x, y in zip(stages, before, after):
            stage.add(x, y)

    rows = []
    for number, (stage, (channels, *grid)) in enumerate(zip(stages, shapes), start=1):
        rows.append(
            {
                "stage": number,
                "channels": channels,
                "grid": " ".join(map(str, grid)),
                "cka": stage.cka(),
                "examples": config.examples,
                "crops": config.crops,
                "seed": config.seed,
            }
        )
    return rows


def new_stage(config: CkaConfig) -> "OverCrops | OverPositions":
    """What adds up the CKA of one stage, as --examples says."""
    if config.examples == "positions":
        return OverPositions()
    return OverCrops(config.crops, config.minibatch)


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, laid out as Table 7 turned round: a line for each stage."""
    lines = [["stage", "channels", "grid", "CKA"]]
    for row in rows:
        lines.append([str(row["stage"]), str(row["channels"]), row["grid"], f"{row['cka']:.3f}"])
    note = f"Examples are {rows[0]['examples']}, of {rows[0]['crops']} crops."
    return f"{aligned(lines)}\n\n{note}\n"


# --- examples are crops


class OverCrops:
    """CKA with crops as examples, of `crops` in minibatches of at least `minibatch`, at least 4."""

    def __init__(self, crops: int, minibatch: int) -> None:
        self.sizes = minibatch_sizes(crops, minibatch)
        self.terms = Terms(0.0, 0.0, 0.0)
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """One crop's state in both networks: (c, d, h, w) each."""
        self.x.append(x)
        self.y.append(y)
        if len(self.x) < self.sizes[0]:
            return

        of_minibatch = terms_of(torch.stack(self.x), torch.stack(self.y))
        self.terms = Terms(*(a + b for a, b in zip(self.terms, of_minibatch)))
        self.sizes.pop(0)
        self.x.clear()
        self.y.clear()

    def cka(self) -> float:
        return self.terms.cka()


def minibatch_sizes(examples: int, at_least: int) -> list[int]:
    """Sizes that differ by 1 at most: (70, 32) -> [35, 35]."""
    count = max(1, examples // at_least)
    return [(examples + k) // count for k in range(count)]


def terms_of(x: Tensor, y: Tensor) -> Terms:
    """Of the features of the same n >= 4 examples: (n, ...) each."""
    k = gram(x)
    l = gram(y)  # noqa: E741 - K and L are the names in both cited works
    return Terms(hsic(k, l), hsic(k, k), hsic(l, l))


def gram(features: Tensor) -> Tensor:
    """Inner products of n examples, (n, ...) -> (n, n), in float64."""
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for part in rearrange(features, "n ... -> n (...)").split(CHUNK, dim=1):
        part = part.double()
        total += einsum(part, part, "i p, j p -> i j").cpu()
    return total


def hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """HSIC_1 of two Gram matrices (n, n), n >= 4: eq. 5 of Song et al. (2012)."""
    n = len(k)
    off_diagonal = 1 - torch.eye(n, dtype=k.dtype)
    k = k * off_diagonal
    l = l * off_diagonal  # noqa: E741

    trace = (k * l).sum()  # both are symmetric
    means = k.sum() * l.sum() / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * (k.sum(dim=0) * l.sum(dim=0)).sum()
    return float((trace + means - rows) / (n * (n - 3)))


# --- examples are positions


class OverPositions:
    """CKA with positions as examples. There are millions of them, so no Gram matrix is made.

    HSIC_1 of linear kernels can be written in sums over the examples, whose size does not depend on
    n: `PositionSums`. It is exact over all crops, however they come in.
    """

    def __init__(self) -> None:
        self.shift: tuple[Tensor, Tensor] | None = None
        self.both = PositionSums()
        self.x = PositionSums()
        self.y = PositionSums()

    def add(self, x: Tensor, y: Tensor) -> None:
        """One crop's state in both networks: (c, d, h, w) each."""
        x = rearrange(x.double(), "c d h w -> (d h w) c")
        y = rearrange(y.double(), "c d h w -> (d h w) c")

        # CKA does not change when a constant is subtracted, and the sums keep more of their digits.
        if self.shift is None:
            self.shift = (x.mean(dim=0), y.mean(dim=0))
        x = x - self.shift[0]
        y = y - self.shift[1]

        self.both.add(x, y)
        self.x.add(x, x)
        self.y.add(y, y)

    def cka(self) -> float:
        return Terms(self.both.hsic(), self.x.hsic(), self.y.hsic()).cka()


class PositionSums:
    """What HSIC_1 of features x (n, p) and y (n, q) needs, summed over the examples."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """More examples: (n, p) and (n, q), float64."""
        x_squared = einsum(x, x, "n p, n p -> n")
        y_squared = einsum(y, y, "n q, n q -> n")
        new = [
            einsum(x, y, "n p, n q -> p q"),
            x.sum(dim=0),
            y.sum(dim=0),
            einsum(x, y_squared, "n p, n -> p"),
            einsum(y, x_squared, "n q, n -> q"),
            x_squared.sum(),
            y_squared.sum(),
            x_squared @ y_squared,
        ]
        self.n += len(x)
        self.sums = [a + b for a, b in zip(self.sums, new)] if self.sums else new

    def hsic(self) -> float:
        """As `hsic` of the Gram matrices K = x x^T and L = y y^T with their diagonals left out."""
        xy, x, y, x_by_y2, y_by_x2, x2, y2, x2y2 = self.sums
        n = self.n

        # Each sum over pairs (i, j) is that over all pairs less that over i = j.
        trace = (xy * xy).sum() - x2y2
        means = (x @ x - x2) * (y @ y - y2) / ((n - 1) * (n - 2))
        rows = 2 / (n - 2) * (x @ xy @ y - x @ x_by_y2 - y @ y_by_x2 + x2y2)
        return float((trace + means - rows) / (n * (n - 3)))
