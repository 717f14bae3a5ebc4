"""UNETR (Hatamizadeh et al., WACV 2022): a vision transformer with a convolutional decoder.

All tokens attend to all; the grid stays that of the patches through every block. The decoder takes
the output of the transformer at equal parts of its depth, brings an earlier one to a finer grid,
and takes the image itself at full resolution.

Axis letters: b batch, c channels, D H W voxels, d h w patches.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from timm.layers import build_fourier_pos_embed
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from dae.model.conv import ResidualBlock, UpBlock, apply_block, check_size

# Side of a patch -> how often it halves, and so how many states the decoder takes.
LEVELS = {8: 3, 16: 4}


def position_embedding(
    grid: Sequence[int], channels: int, device: torch.device | None = None
) -> Tensor:
    """Sines and cosines of c / 6 frequencies for each axis, which tell where a token is.

    (d, h, w) -> (1, d h w, c), float32. UNETR learns a table for one grid; this serves every grid.
    """
    waves = build_fourier_pos_embed(
        list(grid), num_bands=channels // 6, in_pixels=False, device=device
    )
    return rearrange(waves, "waves d h w axes bands -> 1 (d h w) (axes waves bands)")


class ViTEncoder(nn.Module):
    """Patches, their positions, and a transformer that is read after equal parts of its depth."""

    def __init__(
        self, c_in: int, channels: int, *, depth: int, heads: int, patch: int, checkpointing: bool
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        levels = LEVELS[patch]
        self.state_after = [depth * (n + 1) // levels for n in range(levels)]  # 3, 6, 9, 12 of 12
        self.patches = nn.Conv3d(c_in, channels, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.blocks.apply(init_weights_vit_timm)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> one state of the same shape for each of LEVELS, the last one normed.

        Positions are added here, after masking: a masked token loses its content, not its position.
        """
        sizes = dict(zip("dhw", tokens.shape[-3:]))
        x = rearrange(tokens, "b c d h w -> b (d h w) c")
        x = x + position_embedding(tokens.shape[-3:], x.shape[-1], x.device)

        states = []
        for n, block in enumerate(self.blocks, start=1):
            x = apply_block(block, x, recompute=self.checkpointing and self.training)
            if n in self.state_after:
                states.append(x)

        # The last block is always among them.
        states[-1] = self.norm(x)
        return [rearrange(x, "b (d h w) c -> b c d h w", **sizes) for x in states]


class Upsample(nn.Sequential):
    """A state of the transformer, its grid doubled `times` times.

    (b, c_in, d, h, w) -> (b, c_out, d 2^times, h 2^times, w 2^times).
    """

    def __init__(self, c_in: int, c_out: int, times: int) -> None:
        super().__init__()
        self.append(nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False))
        for _ in range(times - 1):
            self.append(nn.ConvTranspose3d(c_out, c_out, 2, stride=2, bias=False))
            self.append(ResidualBlock(c_out, c_out))


class ViTUNETR(nn.Module):
    """UNETR: (b, in_channels, D, H, W) -> (b, out_channels, D, H, W), no activation at the end.

    feature_size: channels of the decoder at full resolution; doubled with every halving.
    vit_channels: channels of a token; a multiple of 6, for the positions, and of vit_heads.
    vit_depth, vit_heads: blocks of the transformer, attention heads of a block.
    vit_patch: voxels of a patch along each axis, 8 or 16.
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
        check_vit(vit_channels, vit_depth, vit_heads, vit_patch)
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

        # The name is that of the tensors in checkpoints.
        self.raises = nn.ModuleList()
        for n in range(1, levels):
            self.raises.append(Upsample(vit_channels, widths[n], times=levels - n))

        # From the patches up to full resolution.
        self.up_blocks = nn.ModuleList()
        for coarse, fine in pairwise([vit_channels, *reversed(widths)]):
            self.up_blocks.append(UpBlock(coarse, fine))

        self.head = nn.Conv3d(feature_size, out_channels, 1)

    def tokenize(self, x: Tensor) -> Tensor:
        """(b, in_channels, D, H, W) -> (b, vit_channels, D/patch, H/patch, W/patch).

        Raises ValueError on a size that is not whole patches.
        """
        check_size(x.shape[-3:], self.divisor)
        return self.encoder.patches(x)  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> states of the same shape; z3, z6, z9, z12 in UNETR's notation."""
        return self.encoder(tokens)  # type: ignore[no-any-return]

    def decode(self, states: Sequence[Tensor], image: Tensor) -> Tensor:
        """States from `encode` and the image at full resolution -> (b, out_channels, D, H, W)."""
        skips = [self.image_block(image)]
        for upsample, state in zip(self.raises, states):
            skips.append(upsample(state))

        y = states[-1]
        for up, skip in zip(self.up_blocks, reversed(skips)):
            y = up(y, skip)
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.tokenize(x)), x)


def check_vit(channels: int, depth: int, heads: int, patch: int) -> None:
    """Raises ValueError on arguments that make no network."""
    if patch not in LEVELS:
        raise ValueError(f"vit patch {patch}: take 8 or 16")
    if heads < 1 or channels < 1 or channels % heads or channels % 6:
        raise ValueError(
            f"vit channels {channels}: take a multiple of 6 (for the positions) "
            f"and of {heads} (heads)"
        )
    if depth < LEVELS[patch]:
        raise ValueError(
            f"vit depth {depth}: the decoder takes {LEVELS[patch]} states; "
            "give at least as many blocks"
        )
