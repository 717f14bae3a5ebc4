"""Swin UNETR (Hatamizadeh et al. 2022), the backbone of all experiments in the paper (section 2).

Three visible stages, because DAE works between the first two:

    tokens = model.tokenize(x)          # (b, c, d, h, w)
    states = model.encode(tokens)       # the tokens and the output of each stage
    y = model.decode(states, x)         # x enters once more, as the skip at full resolution

Axis letters: b batch, c channels, d h w grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dae.model.conv import ResidualBlock, UpBlock, check_size
from dae.model.swin import ClippedBias, MergeOrder, Size3, Stem, SwinEncoder, SwinOptions

# Options for MONAI's outputs on MONAI's weights: SwinUNETR(1, 14, **MONAI).
MONAI: dict[str, Any] = {"merge_order": "monai", "clipped_bias": "sliced"}


class SwinUNETR(nn.Module):
    """3D Swin UNETR: (b, in_channels, D, H, W) -> (b, out_channels, D, H, W).

    No activation at the end.

    feature_size: channels of a token; doubled by every stage.
    depths, heads: blocks and attention heads of each stage, for 2 to 4 stages.
    window: tokens of a window along each axis.
    merge_order: order in which patch merging reads the eight octants; `monai` and `legacy` are for
        weights from elsewhere.
    clipped_bias: position bias of a window that the grid clips; `sliced` is for weights from
        elsewhere.
    normalize_hidden: layer norm (without weights) on the states that go to the decoder.
    stem: `patch`, a 2x2x2 convolution, or `conv`, the authors' two 3x3x3 convolutions.
    stage_conv: a residual convolution before each stage (SwinUNETR-V2).
    checkpointing: recompute the blocks in the backward pass; less memory, more time.
    """

    stride = 2  # voxels of a token along each axis

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Size3 = (7, 7, 7),
        merge_order: MergeOrder = "all",
        clipped_bias: ClippedBias = "rebuilt",
        normalize_hidden: bool = True,
        stem: Stem = "patch",
        stage_conv: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_swin_unetr(feature_size, depths, heads, window)
        options = SwinOptions(
            depths=depths,
            heads=heads,
            window=(window[0], window[1], window[2]),  # JSON gives a list
            merge_order=merge_order,
            clipped_bias=clipped_bias,
            normalize_hidden=normalize_hidden,
            stem=stem,
            stage_conv=stage_conv,
            checkpointing=checkpointing,
        )
        self.embed_dim = feature_size
        self.divisor = self.stride * 2 ** len(depths)
        self.encoder = SwinEncoder(in_channels, feature_size, options)

        # Channels of the states, from the tokens to the bottleneck. The last skip, the state before
        # the bottleneck, reaches the decoder without a block of its own.
        widths = [feature_size * 2**n for n in range(len(depths) + 1)]
        self.image_block = ResidualBlock(in_channels, feature_size)
        self.skip_blocks = nn.ModuleList(ResidualBlock(c, c) for c in widths[:-2])
        self.bottleneck = ResidualBlock(widths[-1], widths[-1])
        self.up_blocks = nn.ModuleList(UpBlock(2 * c, c) for c in reversed(widths[:-1]))
        self.image_up = UpBlock(feature_size, feature_size)
        self.head = nn.Conv3d(feature_size, out_channels, 1)

        # Kernels of 1x1x1 have the same layout either way.
        for weight in self.parameters():
            if weight.ndim == 5 and weight[0, 0].numel() > 1:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

    def tokenize(self, x: Tensor) -> Tensor:
        """(b, in_channels, D, H, W) -> (b, feature_size, D/2, H/2, W/2).

        Raises ValueError on a size that the stages cannot halve.
        """
        check_size(x.shape[-3:], self.divisor)
        return self.encoder.tokenize(x)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> [tokens, stage 1, ..., bottleneck].

        Each has half the grid and twice the channels of the one before.
        """
        return self.encoder(tokens)

    def decode(self, states: Sequence[Tensor], image: Tensor) -> Tensor:
        """States from `encode` and the image at full resolution -> (b, out_channels, D, H, W)."""
        skips = [block(state) for block, state in zip(self.skip_blocks, states)]
        skips.append(states[-2])

        y = self.bottleneck(states[-1])
        for up, skip in zip(self.up_blocks, reversed(skips)):
            y = up(y, skip)

        y = self.image_up(y, self.image_block(image))
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.tokenize(x)), x)


def check_swin_unetr(
    feature_size: int, depths: Sequence[int], heads: Sequence[int], window: Sequence[int]
) -> None:
    """Raises ValueError where the arguments of a network contradict each other."""
    if not 2 <= len(depths) <= 4 or len(heads) != len(depths):
        raise ValueError(
            f"depths {tuple(depths)} and heads {tuple(heads)}: "
            "give 2 to 4 stages, and heads for each"
        )
    for n, (depth, count) in enumerate(zip(depths, heads)):
        channels = feature_size * 2**n
        if depth < 1 or count < 1 or channels % count:
            raise ValueError(f"stage {n + 1}: {channels} channels do not split into {count} heads")
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window {tuple(window)}: give three sizes of at least 1")
