"""Figure 1 is `Pretext.forward`; Table 5 is METHODS.

Read `forward` beside section 2 of the paper: its lines are the method, in the order of Figure 1 and
in the paper's symbols. DDP and torch.compile wrap `forward` as a whole. Calling the methods of the
backbone outside of it would leave every rank with gradients of its own, without an error.

To add a method, write what happens to the volume and to its tokens, and give METHODS a row; if that
needs random numbers, DRAWS says which. A loss or a head of its own is one more line of `forward`.

Axis letters: b batch, c channels, d h w grid.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import reduce
from timm.layers import trunc_normal_
from torch import Generator, Tensor, nn

from dae.config.pretrain import PretextConfig
from dae.model import Backbone
from dae.pretext.contrast import cmcl, embed, gather
from dae.pretext.disrupt import (
    add_noise,
    check_cubes,
    downsample,
    draw_channels,
    draw_cubes,
    draw_noise,
    local_mask,
    sample_generators,
    token_mask,
)

Transform = Callable[..., Tensor]  # of a volume or of its tokens; the shape stays


class Drawn(NamedTuple):
    """The random numbers of one forward pass; None where the method does not need them."""

    noise: Tensor | None = None  # (b, c, d, h, w), standard normal, for eq. 1
    mask: Tensor | None = None  # bool, True where masked; broadcasts to the tokens


class Output(NamedTuple):
    """The result of one forward pass."""

    loss: Tensor  # l1 + alpha * cmcl, eq. 5; float32
    l1: Tensor  # in the units of --l1-units
    cmcl: Tensor  # without alpha
    x_hat: Tensor  # (b, c, d, h, w), the disrupted volume
    x_rec: Tensor  # (b, c, d, h, w), the reconstructed volume
    z: Tensor  # z_i of eq. 3, of the samples of this rank

    @property
    def terms(self) -> dict[str, Tensor]:
        """What the log shows beside the loss, by name."""
        return {"l1": self.l1, "cmcl": self.cmcl}


# --- Table 5


def unchanged(x: Tensor, *unused: Any) -> Tensor:
    return x


def noise_and_coarse(x: Tensor, noise: Tensor, options: PretextConfig) -> Tensor:
    """Eq. 1, then eq. 2 of its result; or (--order sum) "the two perturbations" of x added."""
    if options.order == "sum":
        return coarse_alone(x, noise, options) + (noise_alone(x, noise, options) - x)
    return coarse_alone(noise_alone(x, noise, options), noise, options)


def noise_alone(x: Tensor, noise: Tensor, options: PretextConfig) -> Tensor:
    """Eq. 1."""
    return add_noise(x, noise, std=options.noise_std, mean=options.noise_mean)


def coarse_alone(x: Tensor, noise: Tensor | None, options: PretextConfig) -> Tensor:
    """Eq. 2, which is not random: the noise is not used."""
    return downsample(x, options.downsample_factor, options.downsample_mode)


def some_channels(tokens: Tensor, mask: Tensor, mask_token: None) -> Tensor:
    """Local masking: a share r of the c embedding channels becomes 0."""
    return local_mask(tokens, mask)


def some_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Masked image modelling: a share r of the tokens becomes a learned one (section 3.3)."""
    return token_mask(tokens, mask, mask_token)


# What happens to the volume, and what happens to its tokens. ("mae" is a row of Table 4 as well.)
METHODS: dict[str, tuple[Transform, Transform]] = {
    "dae": (noise_and_coarse, some_channels),
    "noise": (noise_alone, unchanged),
    "downsample": (coarse_alone, unchanged),
    "local_mask": (unchanged, some_channels),
    "mae": (unchanged, some_tokens),
}


# The options that each transform reads, and those that every row has.
READS: dict[Transform, tuple[str, ...]] = {
    unchanged: (),
    noise_and_coarse: ("noise_std", "noise_mean", "downsample_factor", "downsample_mode", "order"),
    noise_alone: ("noise_std", "noise_mean"),
    coarse_alone: ("downsample_factor", "downsample_mode"),
    some_channels: ("mask_ratio", "mask_scope", "mask_along"),
    some_tokens: ("mask_ratio", "mask_block"),
}
ALL_READ = ("recon", "skip", "l1_units", "alpha", "cmcl", "temperature", "z")


# --- the forms of x_rec


def standardised(x_hat: Tensor) -> Tensor:
    """Each channel of each crop at mean 0 and standard deviation 1."""
    return (x_hat - mean(x_hat)) / std(x_hat)


def rescaled(y: Tensor, x_hat: Tensor) -> Tensor:
    return std(x_hat) * y + mean(x_hat)


def added_to_x_hat(y: Tensor, x_hat: Tensor) -> Tensor:
    return std(x_hat) * y + x_hat


# --recon: how x_hat is normalised for the network, and how its output y becomes x_rec.
#
# Every path through the decoder ends in an instance norm, so the output alone (`plain`) cannot
# carry the mean and the scale of a crop; the other forms take them from x_hat.
RECON: dict[str, tuple[Transform, Transform]] = {
    "plain": (unchanged, unchanged),
    "scaled": (standardised, rescaled),
    "output": (unchanged, rescaled),
    "residual": (unchanged, added_to_x_hat),
}


# --- Figure 1


class Method(nn.Module):
    """A backbone, and what a method has learned beside it, which is saved apart."""

    terms: tuple[str, ...] = ()  # the names of what the log shows beside the loss

    def __init__(self, backbone: Backbone, options: PretextConfig) -> None:
        super().__init__()
        self.backbone: Any = backbone  # a Backbone and a Module
        self.options = options

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that the method has learned, without those of the backbone."""
        tensors = self.state_dict()
        return {name: tensors[name] for name in tensors if not name.startswith("backbone.")}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict({**state, **self.backbone.state_dict(prefix="backbone.")})

    def check_crop(self, crop: Sequence[int]) -> None:
        """Raises ValueError on a crop that the method cannot take. crop: voxels along d h w."""

    def to_optimise(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters that the optimiser gets, by name."""
        return self.named_parameters()

    def after_init(self) -> None:
        """The backbone has got the weights of --init: what was copied of it is copied again."""

    def after_step(self, progress: float) -> None:
        """The optimiser has moved the weights. progress: of the run, 0 in its first step."""


class Pretext(Method):
    """A backbone, and the disruptions that pre-train it.

    A method may have parameters of its own (a mask token), saved apart from the backbone's.
    Raises ValueError where the options contradict each other.
    """

    terms = ("l1", "cmcl")

    def __init__(
        self, backbone: Backbone, method: str = "dae", options: PretextConfig | None = None
    ) -> None:
        options = options or PretextConfig()
        check_options(options)
        super().__init__(backbone, options)

        self.disrupt, self.mask = METHODS[method]
        self.normalise, self.restore = RECON[options.recon]

        self.mask_token = None
        if self.mask is some_tokens:
            self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
            trunc_normal_(self.mask_token, std=0.02)

        # Where x_hat is the target, the skip at full resolution would hand it to the last layers.
        input_is_target = leaves_x(self.disrupt, options)
        zero_by_itself = options.skip == "auto" and input_is_target
        self.skip_is_zero = options.skip == "zeros" or zero_by_itself

        self.l1_in_crop_units = is_in_crop_units(options)

        if options.recon == "residual":
            if input_is_target:
                raise ValueError(
                    f"--recon residual: with --method {method} x_hat is the target; "
                    "take plain, scaled or output"
                )
            start_from_x_hat(backbone)

    def check_crop(self, crop: Sequence[int]) -> None:
        if self.mask is some_tokens:
            check_blocks(self, crop)

    def forward(self, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
        """Figure 1. x (b, c, d, h, w): clean crops; modality (b,), int64; drawn: from `draw`."""
        options = self.options

        x_hat = self.disrupt(x, drawn.noise, options)  # eq. 1 and 2: noise, then down and up
        image = self.normalise(x_hat)  # x_hat itself, except for --recon scaled

        tokens = self.backbone.tokenize(image)  # (b, c, d, h, w)
        tokens = self.mask(tokens, drawn.mask, self.mask_token)  # a share r of the channels is 0
        states = self.backbone.encode(tokens)  # of each stage; the last is the bottleneck

        skip = torch.zeros_like(image) if self.skip_is_zero else image  # at full resolution
        y = self.backbone.decode(states, skip).float()
        x_rec = self.restore(y, x_hat)  # y itself for --recon plain

        unit = std(x_hat) if self.l1_in_crop_units else None
        l1 = l1_of(x_rec, x, unit).mean()  # L_1

        # z_i of eq. 3, of all ranks; but the authors' form compares the samples of one rank, and
        # validation gives ranks different numbers of crops.
        z = embed(states[-1], options.z)
        own_z = z.detach()
        if self.training and options.cmcl != "ranks":
            z, modality = gather(z, modality)
        contrast = cmcl(z, modality, temperature=options.temperature, form=options.cmcl)  # eq. 3

        loss = l1 + options.alpha * contrast  # eq. 5; alpha times CE is eq. 4
        return Output(loss, l1.detach(), contrast.detach(), x_hat, x_rec, own_z)

    def draw(self, x: Tensor, seeds: Sequence[int]) -> Drawn:
        """Noise and mask for crops x (b, c, d, h, w), from one seed per sample.

        Not in `forward`, so that torch.compile sees nothing but tensors and makes one graph.
        """
        draw_for_volume = DRAWS.get(self.disrupt, draw_nothing)
        draw_for_tokens = DRAWS.get(self.mask, draw_nothing)

        # In this order: the noise and the mask of a sample come from the same generator.
        generators = sample_generators(seeds, x.device)
        noise = draw_for_volume(self, x, generators)
        mask = draw_for_tokens(self, x, generators)
        return Drawn(noise, mask)


def check_options(options: PretextConfig) -> None:
    """Raises ValueError where options mean nothing together."""
    if len(options.mask_ratio) > 2:
        raise ValueError("--mask-ratio: give one number, or the two ends of a range")
    if options.mask_along == "planes" and options.mask_scope == "token":
        raise ValueError("--mask-scope token: a plane has many tokens; take --mask-along channels")
    if options.cmcl == "softmax" and options.temperature <= 0:
        raise ValueError("--temperature: --cmcl softmax divides by it; take more than 0")
    if options.cmcl != "softmax" and abs(options.temperature) > 80:
        raise ValueError(
            f"--temperature {options.temperature:g}: float32 has no exp(t); the paper's is 0.07"
        )


def leaves_x(disrupt: Transform, options: PretextConfig) -> bool:
    """Whether x_hat is x: a method without a disruption of the volume, or one of strength 0."""
    silent = options.noise_std == 0 and options.noise_mean == 0
    as_fine = options.downsample_factor == 1
    nothing_is_done = {
        unchanged: True,
        noise_alone: silent,
        coarse_alone: as_fine,
        noise_and_coarse: silent and as_fine,
    }
    return nothing_is_done.get(disrupt, False)


def is_in_crop_units(options: PretextConfig) -> bool:
    """Whether --l1-units measures L1 in standard deviations of the crop.

    L1 in raw intensities, as the paper writes it, trains MR and neglects CT, whose values lie
    closer together; in units of the crop's standard deviation it weighs them alike.
    """
    by_itself = options.l1_units == "auto" and options.recon != "plain"
    return options.l1_units == "crop" or by_itself


def start_from_x_hat(backbone: Backbone) -> None:
    """For --recon residual: with a head of zeros x_rec is x_hat, and training begins from there."""
    for parameter in backbone.head.parameters():
        nn.init.zeros_(parameter)


def l1_of(x_rec: Tensor, x: Tensor, unit: Tensor | None = None) -> Tensor:
    """L_1 of eq. 5, mean over the voxels of each sample. (b, c, d, h, w) twice -> (b,), float32.

    unit: (b, c, 1, 1, 1), what counts as an error of 1; else errors are in intensities.
    """
    error = (x_rec.float() - x.float()).abs()
    if unit is not None:
        error = error / unit
    return reduce(error, "b c d h w -> b", "mean")


def mean(x: Tensor) -> Tensor:
    """The mean of each channel of each sample: (b, c, d, h, w) -> (b, c, 1, 1, 1)."""
    return reduce(x, "b c d h w -> b c 1 1 1", "mean")


def std(x: Tensor) -> Tensor:
    """The standard deviation, as `mean`; at least 0.01, for crops of nothing but air."""
    variance = reduce((x - mean(x)) ** 2, "b c d h w -> b c 1 1 1", "mean")
    return variance.sqrt().clamp(min=0.01)


# --- the random numbers of a method


def draw_nothing(net: Pretext, x: Tensor, generators: Sequence[Generator]) -> None:
    return None


def draw_voxel_noise(net: Pretext, x: Tensor, generators: Sequence[Generator]) -> Tensor:
    return draw_noise(x.shape[1:], generators)


def draw_channel_mask(net: Pretext, x: Tensor, generators: Sequence[Generator]) -> Tensor:
    return draw_channels(
        net.backbone.embed_dim,
        token_grid(net, x),
        generators,
        ratio=net.options.mask_ratio,
        scope=net.options.mask_scope,
        along=net.options.mask_along,
    )


def draw_cube_mask(net: Method, x: Tensor, generators: Sequence[Generator]) -> Tensor:
    ratio = net.options.mask_ratio
    return draw_cubes(token_grid(net, x), generators, ratio=ratio, block=block_of(net))


def token_grid(net: Method, x: Tensor) -> list[int]:
    return [n // net.backbone.stride for n in x.shape[2:]]


def block_of(net: Method) -> int:
    """The side of the cubes of --mask-block voxels, in tokens; at least one."""
    return max(1, net.options.mask_block // net.backbone.stride)


def check_blocks(net: Method, crop: Sequence[int]) -> None:
    """Raises ValueError where a crop has too few blocks for one to be masked."""
    stride = net.backbone.stride
    grid = [n // stride for n in crop]
    check_cubes(grid, ratio=net.options.mask_ratio, block=block_of(net), voxels=stride)


# What is drawn for a column of METHODS; nothing for those that are not here.
DRAWS: dict[Transform, Callable[[Pretext, Tensor, Sequence[Generator]], Tensor | None]] = {
    noise_and_coarse: draw_voxel_noise,
    noise_alone: draw_voxel_noise,
    some_channels: draw_channel_mask,
    some_tokens: draw_cube_mask,
}
