"""The other rows of Table 4: what DAE is compared with. (`mae` is a row of METHODS.)

Read each `forward` beside the figure of its work: Contrastive beside Chen et al. 2020, Rotation
beside Taleb et al. 2020 and Tang et al. 2022, SwinUNETRPretext beside Tang et al. 2022. SMIT,
beside Jiang et al. 2022, is in no table of the paper: later and stronger than the rows that are.

All share the loop with `Pretext`. None has CMCL, which is DAE's own. What they learn on top of the
bottleneck (a projection, a classifier) belongs to the method and is thrown away after pre-training,
as in their works. Contrast and rotation alone never use the decoder, which stays as it was drawn.

Axis letters: b batch, v the two views of a sample, c channels, d h w grid.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from einops import reduce
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from dae.config.pretrain import PretextConfig
from dae.model import Backbone
from dae.pretext.contrast import embed, gather_one, nt_xent
from dae.pretext.disrupt import check_cubes, draw_cubes, sample_generators, token_mask
from dae.pretext.distil import (
    Heads,
    Teacher,
    cross_entropy_with,
    deepest_within,
    entropy,
    mask_of_cells,
    mask_of_voxels,
    mean_where,
    teacher_momentum,
)
from dae.pretext.methods import (
    METHODS,
    RECON,
    Method,
    Pretext,
    block_of,
    check_blocks,
    check_options,
    draw_cube_mask,
    is_in_crop_units,
    l1_of,
    start_from_x_hat,
    std,
)
from dae.pretext.views import (
    TURNS,
    Augmentation,
    augment,
    both,
    check_turns,
    cut_out,
    draw_augmentation,
    draw_turns,
    pairs,
    stack_views,
    turn,
)

AnyPretext = Any  # a Method with `draw` and `forward`: Pretext, or one of BASELINES

PROJECTION = 128  # values that NT-Xent compares; Chen et al. 2020
PROJECTION_OF_TANG = 512  # in Tang et al. 2022


class ViewsOutput(NamedTuple):
    """The result of one forward pass of a baseline."""

    loss: Tensor  # the sum of the method's losses; float32
    terms: dict[str, Tensor]  # losses, and shares that were right, by name
    views: Tensor  # what the network saw: (b, c, d, h, w), or (2b, c, d, h, w) for two views
    x_rec: Tensor | None  # what the network made of the views
    h: Tensor | None  # (b, 2, e), the projections of both views of the samples of this rank
    z: Tensor  # (b, c), the features of the first views, as eq. 3 has them


class Baseline(Method):
    """What the rows below have in common."""

    losses: tuple[str, ...] = ()  # the terms whose sum is the loss
    trains_decoder = False
    uses: tuple[str, ...] = ()  # options of PretextConfig that change something

    def __init__(self, backbone: Backbone, options: PretextConfig) -> None:
        super().__init__(backbone, options)
        if not self.trains_decoder:
            freeze_all_but_encoder(self.backbone)

    def contrast(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """NT-Xent of projections (n, 2, e), and the share of views that found the other one."""
        return nt_xent(h, self.options.nt_xent_temperature)

    def contrast_of_all_ranks(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """In validation each crop is a batch of its own; dae/training/reconstruction.py joins."""
        return self.contrast(gather_one(h) if self.training else h)

    def chance(self, samples: int) -> dict[str, float]:
        """What shares of right answers are by guessing, with so many samples compared."""
        by_guessing = {
            "rotation_accuracy": 1 / len(TURNS[self.options.rotations]),
            "contrast_accuracy": 1 / (2 * samples - 1),
        }
        return {name: by_guessing[name] for name in self.terms if name in by_guessing}


class Scratch(Baseline):
    """No pre-training: the row that all others are compared with. There is nothing to run."""


class Contrastive(Baseline):
    """Contrastive coding, Chen et al. 2020 (SimCLR): two views of a sample have one feature."""

    losses = ("contrast",)
    terms = ("contrast", "contrast_accuracy")
    uses = ("nt_xent_temperature",)

    def __init__(self, backbone: Backbone, options: PretextConfig) -> None:
        super().__init__(backbone, options)
        c = bottleneck_channels(backbone)
        self.project = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, PROJECTION))

    def draw(self, x: Tensor, seeds: Sequence[int]) -> tuple[Augmentation, Augmentation]:
        generators = sample_generators(seeds, x.device)
        first = draw_augmentation(x.shape[1:], generators)
        second = draw_augmentation(x.shape[1:], generators)
        return first, second

    def forward(
        self, x: Tensor, modality: Tensor, drawn: tuple[Augmentation, Augmentation]
    ) -> ViewsOutput:
        """Chen et al. 2020, Fig. 2. x (b, c, d, h, w): clean crops."""
        first, second = drawn
        views = stack_views(augment(x, first), augment(x, second))

        state = bottleneck(self.backbone, views)  # the encoder f
        h = pairs(apply_head(self.project, state))  # the projection g
        contrast, accuracy = self.contrast_of_all_ranks(h)

        terms = {"contrast": contrast.detach(), "contrast_accuracy": accuracy}
        return ViewsOutput(contrast, terms, views, None, h.detach(), z_of(state, x))


class Rotation(Baseline):
    """Rotation prediction: by how many times 90 degrees was the crop turned?"""

    losses = ("rotation",)
    terms = ("rotation", "rotation_accuracy")
    uses = ("rotations",)

    def __init__(self, backbone: Backbone, options: PretextConfig) -> None:
        super().__init__(backbone, options)
        self.turns = TURNS[options.rotations]
        self.classify = nn.Linear(bottleneck_channels(backbone), len(self.turns))

    def check_crop(self, crop: Sequence[int]) -> None:
        check_turns(crop, self.turns)

    def draw(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return draw_turns(len(self.turns), sample_generators(seeds, x.device))

    def forward(self, x: Tensor, modality: Tensor, drawn: Tensor) -> ViewsOutput:
        """Tang et al. 2022, "Rotation Prediction". drawn (b,): the class of each sample."""
        turned = turn(x, drawn, self.turns)

        state = bottleneck(self.backbone, turned)
        logits = apply_head(self.classify, state)
        rotation, accuracy = cross_entropy(logits, drawn)

        terms = {"rotation": rotation.detach(), "rotation_accuracy": accuracy}
        return ViewsOutput(rotation, terms, turned, None, None, z_of(state, x))


class Cut(NamedTuple):
    """The random numbers of one view of SwinUNETRPretext."""

    target: Tensor  # (b,), the class of the turn
    mask: Tensor  # (b, 1, d, h, w), bool, True where cut out


class SwinUNETRPretext(Baseline):
    """Swin UNETR, Tang et al. 2022: inpainting, contrast and rotation together, weights 1, 1, 1."""

    losses = ("l1", "contrast", "rotation")
    terms = ("l1", "l1_input", "contrast", "contrast_accuracy", "rotation", "rotation_accuracy")
    trains_decoder = True
    uses = ("nt_xent_temperature", "rotations", "cutout_ratio", "mask_block", "recon", "l1_units")

    def __init__(self, backbone: Backbone, options: PretextConfig) -> None:
        super().__init__(backbone, options)
        c = bottleneck_channels(backbone)
        self.turns = TURNS[options.rotations]
        self.classify = nn.Linear(c, len(self.turns))
        self.project = nn.Linear(c, PROJECTION_OF_TANG)

        self.normalise, self.restore = RECON[options.recon]
        self.l1_in_crop_units = is_in_crop_units(options)
        if options.recon == "residual":
            start_from_x_hat(backbone)

    def check_crop(self, crop: Sequence[int]) -> None:
        check_turns(crop, self.turns)
        check_cubes(crop, ratio=(self.options.cutout_ratio,), block=self.options.mask_block)

    def draw(self, x: Tensor, seeds: Sequence[int]) -> tuple[Cut, Cut]:
        generators = sample_generators(seeds, x.device)
        return self.draw_view(x, generators), self.draw_view(x, generators)

    def draw_view(self, x: Tensor, generators: Sequence[torch.Generator]) -> Cut:
        target = draw_turns(len(self.turns), generators)
        ratio = (self.options.cutout_ratio,)
        block = self.options.mask_block
        return Cut(target, draw_cubes(x.shape[2:], generators, ratio=ratio, block=block))

    def forward(self, x: Tensor, modality: Tensor, drawn: tuple[Cut, Cut]) -> ViewsOutput:
        """Tang et al. 2022, Fig. 1, with the decoder of the backbone for the inpainting."""
        first, second = drawn
        target = stack_views(first.target, second.target)
        mask = stack_views(first.mask, second.mask)

        turned = turn(both(x), target, self.turns)
        x_hat = cut_out(turned, mask)
        image = self.normalise(x_hat)  # x_hat itself, except for --recon scaled

        states = self.backbone.encode(self.backbone.tokenize(image))
        x_rec = self.restore(self.backbone.decode(states, image).float(), x_hat)

        unit = std(x_hat) if self.l1_in_crop_units else None
        l1 = l1_of(x_rec, turned, unit).mean()  # L_inpaint
        h = pairs(apply_head(self.project, states[-1]))
        contrast, found = self.contrast_of_all_ranks(h)  # L_contrast
        rotation, right = cross_entropy(apply_head(self.classify, states[-1]), target)  # L_rot

        loss = l1 + contrast + rotation  # L_tot, with the weights of Tang et al.
        terms = {
            "l1": l1.detach(),
            "l1_input": l1_of(x_hat, turned, unit).mean(),  # of doing nothing
            "contrast": contrast.detach(),
            "contrast_accuracy": found,
            "rotation": rotation.detach(),
            "rotation_accuracy": right,
        }
        return ViewsOutput(loss, terms, x_hat, x_rec.detach(), h.detach(), z_of(states[-1], x))


class SMIT(Baseline):
    """Jiang et al. 2022: masked image modelling, and what a teacher says of the whole crop.

    Masked tokens and the skip are those of `mae`, so the two differ in the loss alone. `backbone`
    is the student, whose encoder and decoder are transferred; the teacher has no decoder.
    """

    losses = ("mip", "mpd", "itd")
    terms = ("mip", "mpd", "mpd_floor", "itd", "itd_floor")
    trains_decoder = True
    uses = ("mask_ratio", "mask_block", "distil_weight", "distil_momentum", "distil_temperature")

    def __init__(self, backbone: Backbone, options: PretextConfig) -> None:
        check_options(options)
        super().__init__(backbone, options)

        states = rehearse(backbone)
        cells = [2 * backbone.divisor // state.shape[-1] for state in states]
        self.level = deepest_within(cells, block_of(self) * backbone.stride)

        self.heads = Heads(states[self.level].shape[1], states[-1].shape[1])
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        trunc_normal_(self.mask_token, std=0.02)
        self.teacher = Teacher(self.backbone, self.heads)

    def check_crop(self, crop: Sequence[int]) -> None:
        check_blocks(self, crop)

    def draw(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return draw_cube_mask(self, x, sample_generators(seeds, x.device))

    def forward(self, x: Tensor, modality: Tensor, drawn: Tensor) -> ViewsOutput:
        """Jiang et al. 2022, Fig. 1, on one view of each crop. drawn: bool, of tokens."""
        cells_told, image_told = self.teacher(x, self.level, self.options.distil_temperature)

        tokens = token_mask(self.backbone.tokenize(x), drawn, self.mask_token)
        states = self.backbone.encode(tokens)
        x_rec = self.backbone.decode(states, torch.zeros_like(x)).float()
        cells, image = self.heads(states[self.level], states[-1])

        masked = mask_of_voxels(drawn, self.backbone.stride)
        error = reduce((x_rec - x.float()).abs(), "b c d h w -> b d h w", "mean")
        mip = mean_where(error, masked[:, 0]).mean()  # L1 of masked voxels alone

        masked_cells = mask_of_cells(drawn, cells.shape[1:4])
        mpd = mean_where(cross_entropy_with(cells_told, cells), masked_cells).mean()
        mpd_floor = mean_where(entropy(cells_told), masked_cells).mean()
        itd = cross_entropy_with(image_told, image).mean()

        # The floor of a cross-entropy is the entropy of the teacher, where student and teacher
        # agree. A floor that goes to 0, or to the logarithm of the classes, is a collapse.
        weight = self.options.distil_weight
        loss = mip + weight * mpd + weight * itd
        terms = {
            "mip": mip.detach(),
            "mpd": weight * mpd.detach(),
            "mpd_floor": weight * mpd_floor,
            "itd": weight * itd.detach(),
            "itd_floor": weight * entropy(image_told).mean(),
        }
        seen = cut_out(x, masked)
        return ViewsOutput(loss, terms, seen, x_rec.detach(), None, z_of(states[-1], x))

    def to_optimise(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All but the teacher, which follows."""
        for name, parameter in self.named_parameters():
            if not name.startswith("teacher."):
                yield name, parameter

    def after_init(self) -> None:
        self.teacher.follow(self, momentum=0.0)

    def after_step(self, progress: float) -> None:
        self.teacher.follow(self, teacher_momentum(progress, self.options.distil_momentum))
        self.teacher.recentre()


BASELINES: dict[str, type[Baseline]] = {
    "scratch": Scratch,
    "contrastive": Contrastive,
    "rotation": Rotation,
    "swin_unetr": SwinUNETRPretext,
    "smit": SMIT,
}


def pretext_of(backbone: Backbone, options: PretextConfig) -> AnyPretext:
    """The backbone with the method that --method names, of METHODS or of BASELINES.

    Raises ValueError where the options contradict each other.
    """
    if options.method in METHODS:
        return Pretext(backbone, options.method, options)
    return BASELINES[options.method](backbone, options)


# --- the steps of `forward`


def bottleneck(backbone: Any, image: Tensor) -> Tensor:
    """(b, in_channels, D, H, W) -> the deepest state, (b, c, d, h, w)."""
    state: Tensor = backbone.encode(backbone.tokenize(image))[-1]
    return state


def apply_head(head: nn.Module, state: Tensor) -> Tensor:
    """A head on the mean over space: (b, c, d, h, w) -> (b, e), float32, also under autocast."""
    with torch.autocast(state.device.type, enabled=False):
        y: Tensor = head(reduce(state.to(dtype_of(head)), "b c d h w -> b c", "mean"))
    return y


def dtype_of(head: nn.Module) -> torch.dtype:
    return next(head.parameters()).dtype


def z_of(state: Tensor, x: Tensor) -> Tensor:
    """The feature of each sample of x, from the states of all views: those of the first one."""
    return embed(state[: len(x)].detach())


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, and the share of right answers."""
    right = logits.argmax(dim=1) == target
    return F.cross_entropy(logits, target), right.float().mean()


# --- the network below


def freeze_all_but_encoder(backbone: nn.Module) -> None:
    """What no loss reaches needs no gradient; DDP would wait for it."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))


def bottleneck_channels(backbone: Any) -> int:
    """Channels of the deepest state."""
    return int(rehearse(backbone)[-1].shape[1])


def rehearse(backbone: Any) -> list[Tensor]:
    """The states of a crop of 2 * divisor voxels a side, without values, on the device meta."""
    rehearsal = deepcopy(backbone).to("meta")
    side = 2 * backbone.divisor // backbone.stride  # tokens; two voxels of the bottleneck
    tokens = torch.zeros(1, backbone.embed_dim, side, side, side, device="meta")
    with torch.no_grad():
        return list(rehearsal.encode(tokens))
