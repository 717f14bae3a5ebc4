"""Self-distillation: the student says of a masked crop what its teacher says of the whole one.

The teacher is the moving average of the student and gets no gradient. Both give each position, and
the crop as a whole, a distribution over classes that nobody has named. Two things keep them from
one answer for all: what the teacher says is sharpened, and the mean of what it says is taken off.

DINO is Caron et al. 2021 and iBOT is Zhou et al. 2022, which SMIT (Jiang et al. 2022) builds on.

Axis letters: b batch, c channels, d h w grid, k classes.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from dae.pretext.contrast import gather_one

CLASSES = 1024  # iBOT has 8192, for a thousand images a batch; a step here has some thousand cells
WIDTH = 256  # values of a feature that is compared with the classes; DINO, iBOT
STUDENT_TEMPERATURE = 0.1  # DINO, iBOT
CENTRE_MOMENTUM = 0.9  # DINO, iBOT


# --- what both networks have on top of the encoder


class Cosines(nn.Module):
    """The cosine of a feature with the direction of each class: (..., WIDTH) -> (..., k)."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(CLASSES, WIDTH))

    def forward(self, y: Tensor) -> Tensor:
        return F.linear(F.normalize(y, dim=-1), F.normalize(self.directions, dim=-1))


class Heads(nn.Module):
    """Logits of every cell of one state, and of the image, which is the mean of the bottleneck."""

    def __init__(self, c_cells: int, c_image: int) -> None:
        super().__init__()
        self.of_cells = projection(c_cells)
        self.of_image = projection(c_image)

    def forward(self, cells: Tensor, bottleneck: Tensor) -> tuple[Tensor, Tensor]:
        """(b, c, d, h, w) twice -> (b, d, h, w, k) and (b, k), float32, also under autocast."""
        dtype = next(self.parameters()).dtype
        with torch.autocast(cells.device.type, enabled=False):
            y = rearrange(cells.to(dtype), "b c d h w -> b d h w c")
            z = reduce(bottleneck.to(dtype), "b c d h w -> b c", "mean")
            return self.of_cells(y), self.of_image(z)


def projection(c: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.Linear(c, WIDTH), Cosines())


# --- the teacher


class Teacher(nn.Module):
    """The moving average of a student, and the centres of what it says.

    Its parameters have the names that they have in the student, and none has a gradient.
    """

    centres: Tensor  # (2, k), the moving means of the logits of cells and of images
    sums: Tensor  # (2, k), of the means of the micro-batches since the last step
    batches: Tensor  # how many micro-batches that were

    def __init__(self, backbone: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.backbone: Any = encoder_alone(backbone)
        self.heads = deepcopy(heads)
        self.requires_grad_(False)
        self.register_buffer("centres", torch.zeros(2, CLASSES))
        self.register_buffer("sums", torch.zeros(2, CLASSES))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def forward(self, x: Tensor, level: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Whole crops -> distributions of the cells of state `level`, and of the images.

        (b, c, d, h, w) -> (b, d, h, w, k) and (b, k).
        """
        states = self.backbone.encode(self.backbone.tokenize(x))
        of_cells, of_image = self.heads(states[level], states[-1])
        if self.training:
            self.remember(of_cells, of_image)

        cell_centre, image_centre = self.centres
        of_cells = sharpened(of_cells, cell_centre, temperature)
        return of_cells, sharpened(of_image, image_centre, temperature)

    def remember(self, of_cells: Tensor, of_image: Tensor) -> None:
        """Add the means of a micro-batch to those of its step.

        The centres themselves move once a step, in `recentre`, so all micro-batches of a step have
        the same ones. This is not in a block that --checkpointing runs twice. The ranks exchange
        their means here, so the sums are the same on all of them, as DDP expects of buffers.
        """
        means = [reduce(of_cells, "b d h w k -> k", "mean"), reduce(of_image, "b k -> k", "mean")]
        of_ranks = gather_one(torch.stack(means)[None])
        self.sums += reduce(of_ranks, "rank head k -> head k", "mean")
        self.batches += 1

    @torch.no_grad()
    def recentre(self) -> None:
        """The centres, by what the teacher said in the step: DINO, eq. 4."""
        self.centres.lerp_(self.sums / self.batches, 1 - CENTRE_MOMENTUM)
        self.sums.zero_()
        self.batches.zero_()

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """theta_t = m theta_t + (1 - m) theta_s. A momentum of 0 copies the student."""
        of_student = dict(student.named_parameters())
        for name, parameter in self.named_parameters():
            parameter.lerp_(of_student[name], 1 - momentum)


def encoder_alone(backbone: nn.Module) -> nn.Module:
    """A copy that can tokenize and encode: all weights of these two are in the `encoder`.

    Parts without weights, as a pooling, stay: tokenize and encode may use them.
    """
    copy = deepcopy(backbone)
    for name, child in backbone.named_children():
        has_weights = any(True for _ in child.parameters())
        if name != "encoder" and has_weights:
            delattr(copy, name)
    return copy


def teacher_momentum(progress: float, first: float) -> float:
    """From `first` at the start of a run to 1 at its end, along a cosine. DINO, sec. 3.1.

    progress: the share of the run that is done.
    """
    return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * progress))


# --- distributions


def sharpened(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """P_t, the distribution of the teacher: (..., k), (k,) -> (..., k). DINO, sec. 3.1."""
    return F.softmax((logits - centre) / temperature, dim=-1)


def cross_entropy_with(p_teacher: Tensor, logits: Tensor) -> Tensor:
    """- sum_k P_t log P_s: the teacher's distributions, the student's logits -> (...)."""
    log_p = F.log_softmax(logits / STUDENT_TEMPERATURE, dim=-1)
    return -(p_teacher * log_p).sum(dim=-1)


def entropy(p: Tensor) -> Tensor:
    """(..., k) -> (...), in nats: 0 where one class has all, log k where all classes are alike."""
    return torch.special.entr(p).sum(dim=-1)


# --- what is masked


def mask_of_voxels(mask: Tensor, stride: int) -> Tensor:
    """The mask of tokens, bool (b, 1, d, h, w), on the voxels: (b, 1, D, H, W)."""
    to_voxels = "b 1 d h w -> b 1 (d x) (h y) (w z)"
    return repeat(mask, to_voxels, x=stride, y=stride, z=stride)


def mask_of_cells(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """True for the cells of a coarser grid whose tokens are all masked: bool (b, d, h, w)."""
    d, h, w = grid
    to_cells = "b 1 (d x) (h y) (w z) -> b d h w"
    return reduce(mask.float(), to_cells, "min", d=d, h=h, w=w).bool()


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of each sample where the mask is True, 0 if it nowhere is: (b, d, h, w) -> (b,)."""
    total = reduce(values * mask, "b d h w -> b", "sum")
    count = reduce(mask.float(), "b d h w -> b", "sum")
    return total / count.clamp(min=1)


def deepest_within(cells: Sequence[int], block: int) -> int:
    """Which state is distilled: the deepest of whose cells a masked block is made.

    cells: the side of a cell of each state, block: that of a masked block, in voxels. In any deeper
    state some cells mix what is masked with what is seen. Raises ValueError on no such state.
    """
    fitting = [n for n, cell in enumerate(cells) if block % cell == 0]
    if not fitting:
        raise ValueError(
            f"--mask-block: no state of the network has cells that make up blocks of {block} "
            f"voxels; take a multiple of {min(cells)}"
        )
    return fitting[-1]
