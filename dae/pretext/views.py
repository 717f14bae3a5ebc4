"""Views: what the baselines of Table 4 do to a crop before the network sees it.

Both views of a sample are made from one crop by that sample's own generator, so they are the same
in any batch and on any number of ranks. As in disrupt.py chance comes first: each `draw_` function
takes one generator per sample, and the rest are pure functions of tensors.

Axis letters: b batch, c channels, d h w grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Generator, Tensor
from torch.nn import functional as F

# Chen et al. 2020, App. A, in three dimensions: a part of 8 to 100 % of the crop, at the size of
# the crop again. Their colours become brightness and contrast, and their blur becomes noise.
SMALLEST_PART = 0.08  # of the volume
BRIGHTNESS = 0.4  # at most, in standard deviations of the crop, up or down
CONTRAST = 0.4  # at most, a share of the contrast, more or less
NOISE = 0.1  # in standard deviations of the crop

# Turns by k times 90 degrees in a plane of two axes; the place in the list is the class. d h w are
# the axes of a volume that lies as in RAS, so the plane of d and h is axial.
AXIAL, CORONAL, SAGITTAL = (2, 3), (2, 4), (3, 4)
Turn = tuple[int, tuple[int, int]]
TURNS: dict[str, list[Turn]] = {
    # 4 classes about the long axis of the body: Tang et al. 2022.
    "axial": [(0, AXIAL), (1, AXIAL), (2, AXIAL), (3, AXIAL)],
    # 10 classes about three axes: Taleb et al. 2020.
    "all": [
        (0, AXIAL),
        *((k, AXIAL) for k in (1, 2, 3)),
        *((k, CORONAL) for k in (1, 2, 3)),
        *((k, SAGITTAL) for k in (1, 2, 3)),
    ],
}


# --- augmentation: part of the crop, flips, brightness, contrast, noise


class Augmentation(NamedTuple):
    """The random numbers of one view of each sample."""

    share: Tensor  # (b,), of the volume that the part has
    position: Tensor  # (b, 3), 0 to 1 along d h w: where the part is, from one end to the other
    flip: Tensor  # (b, 3), bool
    brightness: Tensor  # (b,), -1 to 1
    contrast: Tensor  # (b,), -1 to 1
    noise: Tensor  # (b, c, d, h, w), standard normal


def draw_augmentation(shape: Sequence[int], generators: Sequence[Generator]) -> Augmentation:
    """For crops of shape (c, d, h, w); one generator per sample."""
    even = torch.stack([torch.rand(9, generator=g, device=g.device) for g in generators])
    noise = torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in generators])
    return Augmentation(
        share=SMALLEST_PART + (1 - SMALLEST_PART) * even[:, 0],
        position=even[:, 1:4],
        flip=even[:, 4:7] < 0.5,
        brightness=2 * even[:, 7] - 1,
        contrast=2 * even[:, 8] - 1,
        noise=noise,
    )


def augment(x: Tensor, drawn: Augmentation) -> Tensor:
    """(b, c, d, h, w) -> one view of each sample, of the same shape."""
    part = resized_part(x, drawn.share, drawn.position, drawn.flip)

    mean = reduce(part, "b c d h w -> b c 1 1 1", "mean")
    std = reduce((part - mean) ** 2, "b c d h w -> b c 1 1 1", "mean").sqrt()
    contrast = 1 + CONTRAST * rearrange(drawn.contrast, "b -> b 1 1 1 1")
    brightness = BRIGHTNESS * rearrange(drawn.brightness, "b -> b 1 1 1 1")

    return mean + contrast * (part - mean) + std * (brightness + NOISE * drawn.noise)


def resized_part(x: Tensor, share: Tensor, position: Tensor, flip: Tensor) -> Tensor:
    """A part of each crop, with the crop's own proportions, flipped and at the crop's size.

    Trilinear, on the same voxel centres as `F.interpolate` with align_corners=False.
    """
    # On an axis the crop reaches from -1 to 1, and the part from centre - side to centre + side.
    side = rearrange(share ** (1 / 3), "b -> b 1")
    centre = (2 * position - 1) * (1 - side)
    scale = torch.where(flip, -side, side)

    # torch names the axes of a grid from the last to the first: w, h, d.
    affine = torch.cat([torch.diag_embed(scale.flip(1)), centre.flip(1)[:, :, None]], dim=2)
    grid = F.affine_grid(affine.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


# --- rotation by multiples of 90 degrees


def draw_turns(classes: int, generators: Sequence[Generator]) -> Tensor:
    """The class of each sample's turn, 0 to classes - 1, all alike: (b,), int64."""
    drawn = [torch.randint(classes, (), generator=g, device=g.device) for g in generators]
    return torch.stack(drawn)


def turn(x: Tensor, target: Tensor, turns: Sequence[Turn]) -> Tensor:
    """Each sample turned as its class says: (b, c, d, h, w), (b,) -> the same shape.

    All turns are made and one is taken, so that nothing waits for the value of `target`.
    """
    target = rearrange(target, "b -> b 1 1 1 1")
    turned = x
    for n, (k, plane) in enumerate(turns):
        turned = torch.where(target == n, torch.rot90(x, k, plane), turned)
    return turned


def check_turns(crop: Sequence[int], turns: Sequence[Turn]) -> None:
    """Raises ValueError where a turned crop would have another shape. crop: voxels along d h w."""
    for _, (one, other) in turns:
        if crop[one - 2] != crop[other - 2]:
            size = " ".join(map(str, crop))
            raise ValueError(
                f"--crop {size}: turned by 90 degrees it would have another shape; "
                "take sides that are equal in the plane of the turn"
            )


# --- cut-outs


def cut_out(x: Tensor, mask: Tensor) -> Tensor:
    """0 where the mask, bool, is True. It broadcasts to x (b, c, d, h, w); see `draw_cubes`."""
    return x.masked_fill(mask, 0.0)


# --- pairs


def stack_views(first: Tensor, second: Tensor) -> Tensor:
    """Two views of each sample as one batch, the first views before the second: (2b, ...)."""
    return torch.cat([first, second])


def pairs(features: Tensor) -> Tensor:
    """The features (2b, c) of stacked views, by sample: (b, 2, c)."""
    return rearrange(features, "(v b) c -> b v c", v=2)


def both(x: Tensor) -> Tensor:
    """Each crop twice, in the order of `stack_views`: (b, ...) -> (2b, ...)."""
    return repeat(x, "b ... -> (v b) ...", v=2)
