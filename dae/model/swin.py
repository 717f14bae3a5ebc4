"""The 3D Swin encoder: attention inside windows, windows shifted in every second block, octants merged between stages.

Axis letters: b batch, c channels, d h w grid; i j tokens of one window; heads; e channels per head;
nd nh nw windows along each axis, wd wh ww the size of one; od oh ow the two halves of an octant.

Inside the encoder tokens are (b, d, h, w, c), so that the convolutions on either side see `channels_last_3d`
without a copy; at its borders they are (b, c, d, h, w). Functions on integers and tensors come first, modules after.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Literal, TypeVar, cast

import torch
from einops import rearrange
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dae.model.conv import InstanceNorm, ResidualBlock, activation

Size3 = tuple[int, int, int]
MergeOrder = Literal["all", "monai", "legacy"]
ClippedBias = Literal["rebuilt", "sliced"]
Stem = Literal["patch", "conv"]

Constant = TypeVar("Constant", Tensor, Tensor | None)

WINDOWS = "b (nd wd) (nh wh) (nw ww) c"
TOKENS = "b nd nh nw (wd wh ww) c"

# Octant number = 4 od + 2 oh + ow. The order is invisible in the weights' shapes: the wrong one loads and degrades.
MERGE_ORDER: dict[MergeOrder, tuple[int, ...]] = {
    "all": (0, 1, 2, 3, 4, 5, 6, 7),
    "monai": (0, 4, 2, 1, 6, 5, 3, 7),  # MONAI >= 1.5
    "legacy": (0, 4, 2, 1, 5, 2, 1, 7),  # the authors' code, MONAI 0.9 to 1.4: two octants twice, 3 and 6 never
}


def clip_window(grid: Size3, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """A window no larger than the grid, and no shift along an axis that one window covers: (window, shift)."""
    inside = tuple(min(n, w) for n, w in zip(grid, window))
    moved = tuple(0 if n <= w else s for n, w, s in zip(grid, window, shift))
    return cast(Size3, inside), cast(Size3, moved)


def constant(function: Callable[..., Constant]) -> Callable[..., Constant]:
    """Cache a tensor made of integers alone; it outlives the mode and the device in which it was first asked for."""

    @cache
    def made(*integers: object) -> Constant:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*integers)

    return made


@constant
def offsets(window: Size3, table_window: Size3) -> Tensor:
    """Row of the bias table for every pair of tokens of `window`: (i, j), int64.

    The table has a row for each offset between two tokens of `table_window`: prod(2 w - 1) of them.
    """
    axes = [torch.arange(n) for n in window]
    place = rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "axes d h w -> axes (d h w)")
    offset = rearrange(place, "axes i -> axes i 1") - rearrange(place, "axes j -> axes 1 j")
    row = torch.zeros_like(offset[0])
    for distance, size in zip(offset, table_window):
        row = row * (2 * size - 1) + distance + size - 1
    return row


@constant
def bias_rows(window: Size3, table_window: Size3, clipped_bias: ClippedBias) -> Tensor:
    """As `offsets`, with the choice for windows that the grid has clipped.

    `rebuilt` looks up the true offset of each pair. `sliced` cuts the corner out of the full window's index, as MONAI
    and the authors do: with 6 tokens of 7 along each axis, 98 % of the pairs then read another offset's row.
    """
    if clipped_bias == "rebuilt" or window == table_window:
        return offsets(window, table_window)
    n = window[0] * window[1] * window[2]
    return offsets(table_window, table_window)[:n, :n].contiguous()


@constant
def may_see(window: Size3, shift: Size3) -> Tensor | None:
    """Which token sees which in a window that the shift has wrapped, on the axes where `shift` is not 0: (i, j), bool.

    Along one axis such a window holds two kinds of token: those at home and those that came round from the other end,
    the last `shift` of them. Two tokens meet only if they are of one kind on every axis. None: all meet all.
    """
    if not any(shift):
        return None
    wrapped = [torch.arange(n) >= n - s for n, s in zip(window, shift)]
    kind = torch.stack(torch.meshgrid(*wrapped, indexing="ij"))
    kind = rearrange(kind, "axes wd wh ww -> (wd wh ww) axes")
    return (rearrange(kind, "i axes -> i 1 axes") == rearrange(kind, "j axes -> 1 j axes")).all(-1)


def wrapped_regions(shift: Size3) -> Iterator[tuple[tuple[slice, slice, slice], Size3]]:
    """Splits the (nd, nh, nw) windows by the axes along which they are the last ones: (slices, shift that wraps them).

    Only the last window along a shifted axis is wrapped, so at most eight patterns of mask exist, however many windows.
    """
    inner, last, whole = slice(None, -1), slice(-1, None), slice(None)
    choices = [((inner, 0), (last, s)) if s else ((whole, 0),) for s in shift]
    for picks in product(*choices):
        where, wraps = zip(*picks)
        yield cast(tuple[slice, slice, slice], where), cast(Size3, wraps)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias) v, unseen pairs left out. q, k, v (windows, heads, i, e), bias (heads, i, j)."""
    if visible is not None:
        bias = bias.masked_fill(~visible, float("-inf"))
    # Expanded over windows with stride 0. Four axes, no more: with five torch takes the explicit formula instead.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(*q.shape[:-2], -1, -1))


def attention_by_the_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor | None) -> Tensor:
    """The same as `attention`, as one would write it on paper; the tests hold the two together."""
    scores = torch.einsum("...ie,...je->...ij", q, k) * q.shape[-1] ** -0.5 + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("...ij,...je->...ie", scores.softmax(dim=-1), v)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window, with a learned bias per offset and head."""

    def __init__(self, channels: int, heads: int, window: Size3, clipped_bias: ClippedBias) -> None:
        super().__init__()
        self.heads, self.window, self.clipped_bias = heads, window, clipped_bias
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.bias_table = nn.Parameter(torch.zeros(rows, heads))
        trunc_normal_(self.bias_table, std=0.02)

    def bias(self, window: Size3) -> Tensor:
        """Bias of each pair of tokens of a window, perhaps a clipped one: (heads, i, j)."""
        rows = bias_rows(window, self.window, self.clipped_bias).to(self.bias_table.device)
        return rearrange(self.bias_table[rows], "i j heads -> heads i j")

    def forward(self, tokens: Tensor, window: Size3, shift: Size3) -> Tensor:
        """(b, nd, nh, nw, i, c), windows of a grid already rolled by `shift` -> the same shape."""
        q, k, v = rearrange(
            self.qkv(tokens), "b nd nh nw i (three heads e) -> three b nd nh nw heads i e", three=3, heads=self.heads
        )
        bias = self.bias(window)
        out = torch.empty_like(q)
        for (d, h, w), wraps in wrapped_regions(shift):
            mask = may_see(window, wraps)
            visible = None if mask is None else mask.to(q.device)
            part = [rearrange(t[:, d, h, w], "b nd nh nw heads i e -> (b nd nh nw) heads i e") for t in (q, k, v)]
            sizes = dict(zip(("b", "nd", "nh", "nw"), q[:, d, h, w].shape))
            seen = attention(part[0], part[1], part[2], bias, visible)
            out[:, d, h, w] = rearrange(seen, "(b nd nh nw) heads i e -> b nd nh nw heads i e", **sizes)
        return self.proj(rearrange(out, "b nd nh nw heads i e -> b nd nh nw i (heads e)"))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each behind a layer norm and beside a shortcut. (b, d, h, w, c) -> the same."""

    def __init__(
        self, channels: int, heads: int, *, window: Size3, shift: Size3, clipped_bias: ClippedBias = "rebuilt"
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window, clipped_bias)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def attend(self, x: Tensor) -> Tensor:
        """Pad to whole windows, roll, attend, and all of it back."""
        d, h, w = x.shape[1:4]
        window, shift = clip_window((d, h, w), self.window, self.shift)
        # Zeros at the far end, behind the norm; they are attended to, as in every published Swin UNETR.
        pad_d, pad_h, pad_w = (-n % size for n, size in zip((d, h, w), window))
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_d))
        x = torch.roll(x, [-s for s in shift], dims=(1, 2, 3))
        sizes = dict(zip(("wd", "wh", "ww"), window))
        tokens = rearrange(x, f"{WINDOWS} -> {TOKENS}", **sizes)
        tokens = self.attn(tokens, window, shift)
        x = rearrange(tokens, f"{TOKENS} -> {WINDOWS}", **sizes)
        return torch.roll(x, shift, dims=(1, 2, 3))[:, :d, :h, :w]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Half the grid, twice the channels: eight neighbours side by side, normed, mixed. (b, d, h, w, c)."""

    def __init__(self, channels: int, order: MergeOrder) -> None:
        super().__init__()
        self.order = MERGE_ORDER[order]
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        octants = rearrange(x, "b (d od) (h oh) (w ow) c -> b d h w (od oh ow) c", od=2, oh=2, ow=2)
        chosen = octants[..., self.order, :]
        return self.reduction(self.norm(rearrange(chosen, "b d h w octants c -> b d h w (octants c)")))


class Stage(nn.Module):
    """Blocks with the window in turn at home and shifted by half, then a merging. (b, d, h, w, c) -> half, twice."""

    def __init__(
        self, channels: int, depth: int, heads: int, *, window: Size3, merge_order: MergeOrder,
        clipped_bias: ClippedBias, conv: bool, checkpointing: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        half: Size3 = (window[0] // 2, window[1] // 2, window[2] // 2)
        self.checkpointing = checkpointing
        self.conv = ResidualBlock(channels, channels) if conv else None
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, window=window, shift=half if n % 2 else (0, 0, 0), clipped_bias=clipped_bias)
            for n in range(depth)
        )
        self.merge = PatchMerging(channels, merge_order)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = rearrange(self.conv(rearrange(x, "b d h w c -> b c d h w")), "b c d h w -> b d h w c")
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.merge(x)


class PatchStem(nn.Module):
    """Every 2x2x2 patch of voxels becomes one token. (b, c_in, D, H, W) -> (b, c, D/2, H/2, W/2)."""

    def __init__(self, c_in: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(c_in, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvStem(nn.Module):
    """The stem of the authors' code: two 3x3x3 convolutions, so that tokens overlap. Shapes as PatchStem."""

    def __init__(self, c_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(c_in, channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = InstanceNorm(channels, affine=True)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = InstanceNorm(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = activation(self.norm1(self.conv1(x)))
        return activation(self.norm2(self.conv2(x)))


class SwinEncoder(nn.Module):
    """Stem and stages. `tokenize` makes the tokens that DAE disrupts, `forward` turns tokens into hidden states."""

    def __init__(
        self, c_in: int, channels: int, *, depths: Sequence[int], heads: Sequence[int], window: Size3,
        merge_order: MergeOrder, clipped_bias: ClippedBias, normalize_hidden: bool, stem: Stem, stage_conv: bool,
        checkpointing: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize_hidden = normalize_hidden
        self.stem = PatchStem(c_in, channels) if stem == "patch" else ConvStem(c_in, channels)
        self.stages = nn.ModuleList(
            Stage(channels * 2**n, depth, head_count, window=window, merge_order=merge_order,
                  clipped_bias=clipped_bias, conv=stage_conv, checkpointing=checkpointing)
            for n, (depth, head_count) in enumerate(zip(depths, heads))
        )  # fmt: skip

    def tokenize(self, x: Tensor) -> Tensor:
        """(b, c_in, D, H, W) -> (b, c, D/2, H/2, W/2), channels last in memory."""
        return self.stem(x)

    def hidden(self, x: Tensor) -> Tensor:
        """What the decoder is given of the stream: layer-normed over channels without weights, or as it is."""
        if self.normalize_hidden:
            x = F.layer_norm(x, x.shape[-1:])
        return rearrange(x, "b d h w c -> b c d h w")

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(b, c, d, h, w) -> the tokens and every stage's output: (b, c 2^n, d/2^n, h/2^n, w/2^n) for n = 0, 1, ..."""
        x = rearrange(tokens, "b c d h w -> b d h w c")
        states = [self.hidden(x)]
        for stage in self.stages:
            x = stage(x)
            states.append(self.hidden(x))
        return states
