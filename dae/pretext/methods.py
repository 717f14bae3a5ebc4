"""METHODS: one function for each row of Table 5, over one shared signature; `dae` is the paper's.

Read `dae` beside section 2: its lines are the method. `Pretext` holds what a method needs beside the backbone, and its
`forward` is what DDP and torch.compile wrap: calling the backbone's own methods behind DDP would leave every rank with
gradients of its own, without an error.

Axis letters: b batch, c channels, d h w grid.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import reduce
from timm.layers import trunc_normal_
from torch import Tensor, nn

from dae.config.pretrain import PretextConfig
from dae.model import Backbone
from dae.pretext.contrast import cmcl, embed, gather
from dae.pretext.disrupt import (
    add_noise,
    downsample,
    draw_channels,
    draw_cubes,
    draw_noise,
    generators,
    local_mask,
    token_mask,
)


class Drawn(NamedTuple):
    """What is drawn for one forward pass; None where the method has no use for it."""

    noise: Tensor | None = None  # (b, c, d, h, w), standard normal, for eq. 1
    mask: Tensor | None = None  # bool, broadcasts to the tokens: channels zeroed, or tokens hidden


class Output(NamedTuple):
    """What one forward pass of a method gives."""

    loss: Tensor  # l1 + alpha * cmcl, eq. 5; float32
    l1: Tensor  # in the units of --l1-units
    cmcl: Tensor
    x_hat: Tensor  # (b, c, d, h, w), disrupted
    x_rec: Tensor  # (b, c, d, h, w), reconstructed


class Pretext(nn.Module):
    """A backbone and a method. Its own parameters (a mask token) are saved apart from the backbone's.

    Raises ValueError where the options contradict each other.
    """

    def __init__(
        self, backbone: Backbone, method: str = "dae", options: PretextConfig | None = None
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone  # a Backbone and a Module
        self.method, self.options = METHODS[method], options or PretextConfig()
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim)) if method == "mae" else None
        if self.mask_token is not None:
            trunc_normal_(self.mask_token, std=0.02)
        check_options(self.options)
        self.input_is_target = method in ("local_mask", "mae")
        if self.options.recon == "residual":
            if self.input_is_target:
                raise ValueError(
                    f"--recon residual: with --method {method} x_hat is the target; take plain or scaled"
                )
            for parameter in (
                backbone.head.parameters()
            ):  # x_rec starts as x_hat: training starts from doing nothing
                nn.init.zeros_(parameter)

    def draw(self, x: Tensor, seeds: Sequence[int]) -> Drawn:
        """Noise and mask for crops x (b, c, d, h, w), from one seed per sample.

        Apart from `forward`, so that torch.compile sees tensors only and makes one graph.
        """
        o, draw = self.options, generators(seeds, x.device)
        noise = draw_noise(x.shape[1:], draw) if self.method in (dae, noise_alone) else None

        grid = [n // self.backbone.stride for n in x.shape[2:]]
        mask = None
        if self.method in (dae, local_masking):
            mask = draw_channels(
                self.backbone.embed_dim,
                grid,
                draw,
                ratio=o.mask_ratio,
                scope=o.mask_scope,
                along=o.mask_along,
            )
        elif self.method is mae:
            block = max(1, o.mask_block // self.backbone.stride)
            mask = draw_cubes(grid, draw, ratio=o.mask_ratio, block=block)
        return Drawn(noise, mask)

    def forward(self, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
        """x (b, c, d, h, w) clean crops, modality (b,) int64, what `draw` gave for them."""
        return self.method(self, x, modality, drawn)

    def own_state(self) -> dict[str, Tensor]:
        """What the method has learned beside the backbone."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("backbone.")
        }

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict({**state, **self.backbone.state_dict(prefix="backbone.")})

    def shown(self, x_hat: Tensor) -> Tensor:
        """What the network is shown of x_hat: all of it, or (--recon scaled) each crop at mean 0 and std 1."""
        return (x_hat - mean(x_hat)) / std(x_hat) if self.options.recon == "scaled" else x_hat

    def decode(self, states: Sequence[Tensor], x_hat: Tensor) -> Tensor:
        """States -> x_rec in the intensities of x.

        Every path through the decoder ends in an instance norm, so its output alone (`plain`) cannot carry the mean
        and the scale of a crop; the other forms take them from x_hat.
        """
        blind = self.options.skip == "zeros" or (
            self.options.skip == "auto" and self.input_is_target
        )
        image = self.shown(x_hat)
        y = self.backbone.decode(states, torch.zeros_like(image) if blind else image).float()
        if self.options.recon == "plain":
            return y
        return std(x_hat) * y + (x_hat if self.options.recon == "residual" else mean(x_hat))

    def losses(
        self, x: Tensor, x_hat: Tensor, x_rec: Tensor, states: Sequence[Tensor], modality: Tensor
    ) -> Output:
        """L_pretrain = L_1 + alpha * CE(z_sim, z_label), eq. 4 and 5."""
        o = self.options
        l1 = l1_of(x_rec, x, unit=std(x_hat) if in_crop_units(o) else None).mean()
        z = embed(states[-1], o.z)
        # The authors' form sees one rank's batch; and validation gives ranks different numbers of crops.
        if self.training and o.cmcl != "ranks":
            z, modality = gather(z, modality)
        contrast = cmcl(z, modality, temperature=o.temperature, form=o.cmcl)
        return Output(l1 + o.alpha * contrast, l1.detach(), contrast.detach(), x_hat, x_rec)


def check_options(o: PretextConfig) -> None:
    """Raises ValueError where options mean nothing together."""
    if len(o.mask_ratio) > 2:
        raise ValueError("--mask-ratio: give one number, or the two ends of a range")
    if o.mask_along == "planes" and o.mask_scope == "token":
        raise ValueError("--mask-scope token: a plane has many tokens; take --mask-along channels")
    if o.cmcl == "softmax" and o.temperature <= 0:
        raise ValueError("--temperature: --cmcl softmax divides by it; take more than 0")
    if o.cmcl != "softmax" and abs(o.temperature) > 80:
        raise ValueError(
            f"--temperature {o.temperature:g}: float32 has no exp(t); the paper's is 0.07"
        )


def mean(x: Tensor) -> Tensor:
    """Of each sample and channel: (b, c, d, h, w) -> (b, c, 1, 1, 1)."""
    return reduce(x, "b c d h w -> b c 1 1 1", "mean")


def std(x: Tensor) -> Tensor:
    """As `mean`; at least 0.01, for crops of nothing but air."""
    return reduce((x - mean(x)) ** 2, "b c d h w -> b c 1 1 1", "mean").sqrt().clamp(min=0.01)


def l1_of(x_rec: Tensor, x: Tensor, unit: Tensor | None = None) -> Tensor:
    """L_1 of eq. 5, mean over voxels, in intensities or in multiples of `unit`. (b, c, d, h, w) twice -> (b,)."""
    error = (x_rec.float() - x.float()).abs()
    return reduce(error if unit is None else error / unit, "b c d h w -> b", "mean")


def in_crop_units(o: PretextConfig) -> bool:
    """Raw units train MR and neglect CT, whose values lie closer together; yet they are what the paper writes."""
    return o.l1_units == "crop" or (o.l1_units == "auto" and o.recon != "plain")


def disrupt(x: Tensor, noise: Tensor, o: PretextConfig) -> Tensor:
    """Eq. 1, then eq. 2 of its result; or (--order sum) the two perturbations of x added."""
    noisy = add_noise(x, noise, std=o.noise_std, mean=o.noise_mean)
    if o.order == "sum":
        return downsample(x, o.downsample_factor, o.downsample_mode) + (noisy - x)
    return downsample(noisy, o.downsample_factor, o.downsample_mode)


def dae(net: Pretext, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
    """Disruptive autoencoder: reconstruct the volume from noisy, coarse, locally masked tokens (section 2, Fig. 1)."""
    assert drawn.noise is not None and drawn.mask is not None
    x_hat = disrupt(x, drawn.noise, net.options)  # eq. 1, eq. 2: noise, then down and up again
    tokens = net.backbone.tokenize(net.shown(x_hat))  # (b, c, d, h, w)
    tokens = local_mask(tokens, drawn.mask)  # r c of the c embedding channels are zero
    states = net.backbone.encode(tokens)
    x_rec = net.decode(states, x_hat)
    return net.losses(x, x_hat, x_rec, states, modality)  # eq. 3-5


def noise_alone(net: Pretext, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
    """Table 5, "Noise": eq. 1 alone."""
    assert drawn.noise is not None
    x_hat = add_noise(x, drawn.noise, std=net.options.noise_std, mean=net.options.noise_mean)
    states = net.backbone.encode(net.backbone.tokenize(net.shown(x_hat)))
    return net.losses(x, x_hat, net.decode(states, x_hat), states, modality)


def downsampling(net: Pretext, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
    """Table 5, "Downsampling": eq. 2 alone."""
    x_hat = downsample(x, net.options.downsample_factor, net.options.downsample_mode)
    states = net.backbone.encode(net.backbone.tokenize(net.shown(x_hat)))
    return net.losses(x, x_hat, net.decode(states, x_hat), states, modality)


def local_masking(net: Pretext, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
    """Table 5, "Local Masking" alone. x_hat is the target here, so the full-resolution skip is fed zeros."""
    assert drawn.mask is not None
    tokens = local_mask(net.backbone.tokenize(net.shown(x)), drawn.mask)
    states = net.backbone.encode(tokens)
    return net.losses(x, x, net.decode(states, x), states, modality)


def mae(net: Pretext, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
    """Tables 4 and 5, "MAE": whole tokens give way to a learned one (section 3.3); the skip is fed zeros here too."""
    assert drawn.mask is not None and net.mask_token is not None
    tokens = token_mask(net.backbone.tokenize(net.shown(x)), drawn.mask, net.mask_token)
    states = net.backbone.encode(tokens)
    return net.losses(x, x, net.decode(states, x), states, modality)


METHODS: dict[str, Callable[[Pretext, Tensor, Tensor, Drawn], Output]] = {
    "dae": dae,
    "noise": noise_alone,
    "downsample": downsampling,
    "local_mask": local_masking,
    "mae": mae,
}
