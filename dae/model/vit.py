"""UNETR (Hatamizadeh et al., WACV 2022): a plain vision transformer on timm's blocks, under a convolutional decoder.

All tokens attend to all; the grid stays that of the patches through every block. The decoder takes the stream at equal
shares of its depth, the earlier the finer a grid it is brought to, and the image itself at full resolution.

Axis letters: b batch, c channels, D H W voxels, d h w patches.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from timm.layers import build_fourier_pos_embed
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dae.model.conv import ResidualBlock, UpBlock, check_size

LEVELS = {
    8: 3,
    16: 4,
}  # patch -> how often its side halves, and so how many states the decoder takes


def position_embedding(
    grid: Sequence[int], channels: int, device: torch.device | None = None
) -> Tensor:
    """Where each token is: a third of the channels for each axis, sines and cosines of c / 6 frequencies.

    (d, h, w) -> (1, d h w, c), float32. UNETR learns a table for one grid; this serves every grid.
    """
    waves = build_fourier_pos_embed(
        list(grid), num_bands=channels // 6, in_pixels=False, device=device
    )
    return rearrange(waves, "waves d h w axes bands -> 1 (d h w) (axes waves bands)")


class ViTEncoder(nn.Module):
    """Patches, their positions, a transformer, and a look at its stream after each of `levels` equal parts."""

    def __init__(
        self, c_in: int, channels: int, *, depth: int, heads: int, patch: int, checkpointing: bool
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.taken = [
            depth * (n + 1) // LEVELS[patch] for n in range(LEVELS[patch])
        ]  # 3, 6, 9, 12 of 12
        self.patches = nn.Conv3d(c_in, channels, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.blocks.apply(init_weights_vit_timm)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> as many states of the same shape as the patch has levels, the last one normed.

        Positions are added here, after the masking: a masked token loses its content, not its position.
        """
        sizes = dict(zip("dhw", tokens.shape[-3:]))
        x = rearrange(tokens, "b c d h w -> b (d h w) c")
        x = x + position_embedding(tokens.shape[-3:], x.shape[-1], x.device)
        states = []
        for n, block in enumerate(self.blocks, start=1):
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.checkpointing and self.training
                else block(x)
            )
            if n in self.taken:
                states.append(x)
        states[-1] = self.norm(x)
        return [rearrange(x, "b (d h w) c -> b c d h w", **sizes) for x in states]


class Raise(nn.Sequential):
    """A hidden state brought to a finer grid, `times` doublings. (b, c_in, d, h, w) -> (b, c_out, d 2^times, ...)."""

    def __init__(self, c_in: int, c_out: int, times: int) -> None:
        layers: list[nn.Module] = [nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False)]
        for _ in range(times - 1):
            layers += [
                nn.ConvTranspose3d(c_out, c_out, 2, stride=2, bias=False),
                ResidualBlock(c_out, c_out),
            ]
        super().__init__(*layers)


class ViTUNETR(nn.Module):
    """UNETR: (b, in_channels, D, H, W) -> (b, out_channels, D, H, W), no activation at the end.

    feature_size: channels of the decoder at full resolution; doubled with every halving. UNETR's is 16.
    vit_channels, vit_depth, vit_heads: of the transformer. vit_patch: voxels of a patch along each axis, 8 or 16.
    checkpointing: recompute the transformer's blocks in the backward pass; less memory, more time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        feature_size: int = 16,
        vit_channels: int = 768,
        vit_depth: int = 12,
        vit_heads: int = 12,
        vit_patch: int = 16,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(vit_channels, vit_depth, vit_heads, vit_patch)
        self.stride = self.divisor = vit_patch
        self.embed_dim = vit_channels
        self.encoder = ViTEncoder(
            in_channels,
            vit_channels,
            depth=vit_depth,
            heads=vit_heads,
            patch=vit_patch,
            checkpointing=checkpointing,
        )
        levels = LEVELS[vit_patch]
        widths = [feature_size * 2**n for n in range(levels)]  # at full resolution, half of it, ...
        self.image_block = ResidualBlock(in_channels, feature_size)
        self.raises = nn.ModuleList(
            Raise(vit_channels, c, levels - n) for n, c in enumerate(widths[1:], start=1)
        )
        coarser = [vit_channels, *reversed(widths[1:])]
        self.up_blocks = nn.ModuleList(
            UpBlock(c, fine) for c, fine in zip(coarser, reversed(widths))
        )
        self.head = nn.Conv3d(feature_size, out_channels, 1)

    def tokenize(self, x: Tensor) -> Tensor:
        """(b, in_channels, D, H, W) -> (b, vit_channels, D/patch, H/patch, W/patch). Refuses broken patches."""
        check_size(x.shape[-3:], self.divisor)
        return self.encoder.patches(x)  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> states of the same shape: z3, z6, z9, z12 of 12 blocks and patches of 16."""
        return self.encoder(tokens)  # type: ignore[no-any-return]

    def decode(self, states: Sequence[Tensor], image: Tensor) -> Tensor:
        """States from `encode` and the image at full resolution -> (b, out_channels, D, H, W)."""
        skips = [self.image_block(image), *(up(state) for up, state in zip(self.raises, states))]
        y = states[-1]
        for up, skip in zip(self.up_blocks, reversed(skips)):
            y = up(y, skip)
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.tokenize(x)), x)


def check_arguments(channels: int, depth: int, heads: int, patch: int) -> None:
    if patch not in LEVELS:
        raise ValueError(f"vit patch {patch}: take 8 or 16")
    if heads < 1 or channels < 1 or channels % heads or channels % 6:
        raise ValueError(
            f"vit channels {channels}: take a multiple of 6 (for the positions) and of {heads} (heads)"
        )
    if depth < LEVELS[patch]:
        raise ValueError(
            f"vit depth {depth}: the decoder takes {LEVELS[patch]} states; give at least as many blocks"
        )
