"""The 3D Swin encoder: attention inside windows, windows shifted in every second block, octants merged between stages.

Axis letters: b batch, c channels, d h w grid; i j tokens of one window; heads; e channels per head;
nd nh nw windows along each axis, wd wh ww the size of one; od oh ow the two halves of an octant.

Inside the encoder tokens are (b, d, h, w, c), so that the convolutions on either side see `channels_last_3d`
without a copy; at its borders they are (b, c, d, h, w). Functions on integers and tensors come first, modules after.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, cast

import torch
from einops import rearrange, reduce
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dae.model.conv import InstanceNorm, ResidualBlock, activation

Size3 = tuple[int, int, int]
MergeOrder = Literal["all", "monai", "legacy"]
ClippedBias = Literal["rebuilt", "sliced"]
Stem = Literal["patch", "conv"]

WINDOWS = "b (nd wd) (nh wh) (nw ww) c"
TOKENS = "b nd nh nw (wd wh ww) c"
FOLDED = "b nd nh nw heads i e -> (b nd nh nw) heads i e"
UNFOLDED = "(b nd nh nw) heads i e -> b nd nh nw heads i e"

# Octant number = 4 od + 2 oh + ow. The order is invisible in the weights' shapes: the wrong one loads and degrades.
MERGE_ORDER: dict[MergeOrder, tuple[int, ...]] = {
    "all": (0, 1, 2, 3, 4, 5, 6, 7),
    "monai": (0, 4, 2, 1, 6, 5, 3, 7),  # MONAI >= 1.5
    "legacy": (
        0,
        4,
        2,
        1,
        5,
        2,
        1,
        7,
    ),  # the authors' code, MONAI 0.9 to 1.4: two octants twice, 3 and 6 never
}


def clip_window(grid: Size3, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """A window no larger than the grid, and no shift along an axis that one window covers: (window, shift)."""
    inside = tuple(min(n, w) for n, w in zip(grid, window))
    moved = tuple(0 if n <= w else s for n, w, s in zip(grid, window, shift))
    return cast(Size3, inside), cast(Size3, moved)


def relative_position_index(
    window: Size3, table_window: Size3, device: torch.device | None = None
) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (i, j), int64.

    The table has a row for each offset between two tokens of `table_window`: prod(2 w - 1) of them.
    Made on the device in every forward pass: a table from the host would have to be waited for, and
    one kept in the module would be lost where a network is built without values (device meta).
    """
    axes = [torch.arange(n, device=device) for n in window]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    place = rearrange(place, "axes wd wh ww -> axes (wd wh ww)")
    offsets = rearrange(place, "axes i -> axes i 1") - rearrange(place, "axes j -> axes 1 j")

    row = torch.zeros_like(offsets[0])
    for offset, size in zip(offsets, table_window):
        row = row * (2 * size - 1) + offset + size - 1
    return row


def attention_mask(grid: Size3, window: Size3, shift: Size3, device: torch.device) -> Tensor | None:
    """Which tokens see each other in every window of a rolled grid: (windows, i, j), bool.

    Rolling by `shift` brings the first tokens of an axis round to its far end, where they share a
    window with tokens that are not their neighbours. Two tokens of a window see each other if, along
    every axis, both came round or both did not. None where nothing is rolled: all see all.

    grid: tokens along each axis, whole windows of them.
    """
    if not any(shift):
        return None

    alike = []
    for n, size, s in zip(grid, window, shift):
        # As integers: the compiler of torch 2.11 cannot compare two tensors of bool.
        came_round = (torch.arange(n, device=device) >= n - s).int()
        came_round = rearrange(came_round, "(windows tokens) -> windows tokens", tokens=size)
        one = rearrange(came_round, "windows i -> windows i 1")
        other = rearrange(came_round, "windows j -> windows 1 j")
        alike.append(one == other)

    along_d = rearrange(alike[0], "nd wd vd -> nd 1 1 wd 1 1 vd 1 1")
    along_h = rearrange(alike[1], "nh wh vh -> 1 nh 1 1 wh 1 1 vh 1")
    along_w = rearrange(alike[2], "nw ww vw -> 1 1 nw 1 1 ww 1 1 vw")
    visible = along_d & along_h & along_w
    return rearrange(visible, "nd nh nw wd wh ww vd vh vw -> (nd nh nw) (wd wh ww) (vd vh vw)")


def attention_by_the_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias) v. q, k, v (..., heads, i, e), bias (..., heads, i, j).

    Scores and their softmax in float32 at least.
    """
    scores = torch.einsum("...ie,...je->...ij", q, k) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) + bias
    return torch.einsum("...ij,...je->...ie", scores.softmax(dim=-1).to(v.dtype), v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The formula in one kernel that keeps no scores, gradients included: for a GPU.

    q, k, v (b, windows, heads, i, e), bias (heads, i, j), mask (windows, i, j) -> as q.

    On an H100 (torch 2.11, bf16, 686 windows of 343 tokens, 3 heads, forward and backward) this
    takes 3.4 ms, the formula 5.2, a backward recomputed by the formula 5.4. The gradient of the bias
    keeps cuDNN's kernel out of training, as it should: with a mask that needs no gradient and windows
    of 4^3 its bf16 gradients have been seen to be NaN in torch >= 2.11 (pytorch issue 196678).
    """
    b, windows, _, n, _ = q.shape

    # Rows of a multiple of 8 numbers, each following the last in memory: a fused kernel takes no other
    # bias, and would copy it whole for every window.
    bias = F.pad(bias.to(q.dtype), (0, -n % 8)).contiguous()

    if mask is None:  # one bias for all windows, expanded without a copy
        folded = "b windows heads i e -> (b windows) heads i e"
        bias = bias[..., :n].expand(b * windows, -1, -1, -1)
    else:  # a bias for each window, the same for every sample
        folded = "b windows heads i e -> b (windows heads) i e"
        visible = rearrange(F.pad(mask, (0, -n % 8)), "windows i j -> windows 1 i j")
        bias = torch.where(visible, bias, float("-inf"))
        bias = rearrange(bias, "windows heads i j -> (windows heads) i j")
        bias = bias[..., :n].expand(b, -1, -1, -1)

    q, k, v = (rearrange(t, folded) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    given, kept = folded.split(" -> ")
    return rearrange(out, f"{kept} -> {given}", b=b, windows=windows)


def regions_of_one_mask(shift: Size3) -> Iterator[tuple[slice, slice, slice]]:
    """Splits the (nd, nh, nw) windows of a grid rolled by `shift` into parts of one mask each.

    Only the last window along a shifted axis holds tokens that came round, so there are at most eight
    masks, however many windows; in the order of those of a grid of two windows along each such axis.
    """
    inner, last, whole = slice(None, -1), slice(-1, None), slice(None)
    along_d, along_h, along_w = ((inner, last) if s else (whole,) for s in shift)
    return product(along_d, along_h, along_w)


def masked_biases(bias: Tensor, window: Size3, shift: Size3) -> list[Tensor]:
    """The bias with unseen pairs at -inf, for each of `regions_of_one_mask`: (heads, i, j) each."""
    two_windows = cast(Size3, tuple(w * 2 if s else w for w, s in zip(window, shift)))
    masks = attention_mask(two_windows, window, shift, bias.device)
    if masks is None:
        return [bias]
    return [bias.masked_fill(~mask, float("-inf")) for mask in masks]


class RecomputedAttention(torch.autograd.Function):
    """The formula for a CPU: forward by a fused kernel, backward recomputed a few windows at a time.

    torch's fused CPU kernel has no gradient for a learned bias and would fall back to the formula,
    which keeps (windows, heads, i, j) scores for the backward pass: 3 to 4 GB at 96^3. Here only q, k,
    v, bias and output are kept. Exact and deterministic.
    """

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: Size3, shift: Size3
    ) -> Tensor:
        """q, k, v (b, nd, nh, nw, heads, i, e), bias (heads, i, j) -> as q."""
        # Detached: torch chooses the kernel by what requires a gradient, also where none is computed.
        q, k, v, bias = (t.detach() for t in (q, k, v, bias))
        out = torch.empty_like(q)
        for (d, h, w), seen in zip(regions_of_one_mask(shift), masked_biases(bias, window, shift)):
            b, nd, nh, nw = q[:, d, h, w].shape[:4]
            here = [rearrange(t[:, d, h, w], FOLDED) for t in (q, k, v)]
            # Four axes, no more: with five torch takes the formula instead.
            seen = seen.expand(b * nd * nh * nw, -1, -1, -1)
            part = F.scaled_dot_product_attention(here[0], here[1], here[2], attn_mask=seen)
            out[:, d, h, w] = rearrange(part, UNFOLDED, b=b, nd=nd, nh=nh, nw=nw)

        context.save_for_backward(q, k, v, bias, out)
        context.window, context.shift = window, shift
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, bias, out = context.saved_tensors
        window, shift = context.window, context.shift
        of_q, of_k, of_v = (torch.empty_like(t) for t in (q, k, v))
        of_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))

        biases = masked_biases(bias.to(of_bias.dtype), window, shift)
        for (d, h, w), seen in zip(regions_of_one_mask(shift), biases):
            b, nd, nh, nw = q[:, d, h, w].shape[:4]
            here = [rearrange(t[:, d, h, w], FOLDED) for t in (q, k, v, out, gradient)]
            parts = formula_backward(here[0], here[1], here[2], seen, here[3], here[4])
            for whole, part in zip((of_q, of_k, of_v), parts):
                whole[:, d, h, w] = rearrange(part, UNFOLDED, b=b, nd=nd, nh=nh, nw=nw)
            of_bias += parts[3]
        return of_q, of_k, of_v, of_bias.to(bias.dtype), None, None


def formula_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `attention_by_the_formula`: of q, k, v (windows, heads, i, e), bias (heads, i, j).

    A few windows at a time, so that their scores, half a million numbers, stay in a core's cache; in
    the type of the bias, float32 at least.

    With S = q k^T / sqrt(e) + bias, P = softmax(S) and out = P v, and dX the gradient of X:

        dv = P^T dout     dP = dout v^T     dS = P (dP - sum_j P dP)     sum_j P dP = sum_e out dout
        dbias = dS        dq = dS k / sqrt(e)        dk = dS^T q / sqrt(e)
    """
    heads, n, _ = bias.shape
    at_once = max(1, 2**19 // (heads * n * n))
    of_q, of_k, of_v = (torch.empty_like(t, dtype=bias.dtype) for t in (q, k, v))
    of_bias = torch.zeros_like(bias)

    for first in range(0, len(q), at_once):
        here = slice(first, first + at_once)
        q_w, k_w, v_w, out_w, of_out = (t[here].to(bias.dtype) for t in (q, k, v, out, gradient))
        q_w = q_w * q.shape[-1] ** -0.5

        scores = torch.einsum("whie,whje->whij", q_w, k_w)
        scores += bias
        p = scores.softmax(dim=-1)
        of_v[here] = torch.einsum("whij,whie->whje", p, of_out)

        of_p = torch.einsum("whie,whje->whij", of_out, v_w)
        of_p -= reduce(out_w * of_out, "w heads i e -> w heads i 1", "sum")
        of_scores = of_p.mul_(p)
        for of_one_window in of_scores:
            of_bias += of_one_window
        of_q[here] = torch.einsum("whij,whje->whie", of_scores, k_w) * q.shape[-1] ** -0.5
        of_k[here] = torch.einsum("whij,whie->whje", of_scores, q_w)
    return of_q, of_k, of_v, of_bias


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
        """Bias of each pair of tokens of a window, which the grid may have clipped: (heads, i, j).

        `rebuilt` looks up the true offset of each pair. `sliced` takes the first rows and columns of
        the whole window's index, as MONAI and the authors do: with 6 tokens of 7 along each axis,
        98 % of the pairs then read another offset's row.
        """
        device = self.bias_table.device
        if self.clipped_bias == "rebuilt":
            index = relative_position_index(window, self.window, device)
        else:
            n = window[0] * window[1] * window[2]
            index = relative_position_index(self.window, self.window, device)[:n, :n]
        return rearrange(self.bias_table[index], "i j heads -> heads i j")

    def forward(self, tokens: Tensor, window: Size3, shift: Size3) -> Tensor:
        """(b, nd, nh, nw, i, c), windows of a grid already rolled by `shift` -> the same shape."""
        nd, nh, nw = tokens.shape[1:4]
        split = "b nd nh nw i (three heads e) -> three b nd nh nw heads i e"
        q, k, v = rearrange(self.qkv(tokens), split, three=3, heads=self.heads)
        bias = self.bias(window)

        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            out = RecomputedAttention.apply(q, k, v, bias.to(q.dtype), window, shift)
        else:
            grid = (nd * window[0], nh * window[1], nw * window[2])
            mask = attention_mask(grid, window, shift, tokens.device)
            flat = "b nd nh nw heads i e -> b (nd nh nw) heads i e"
            q, k, v = (rearrange(t, flat) for t in (q, k, v))
            out = fused_attention(q, k, v, bias, mask)
            out = rearrange(out, "b (nd nh nw) heads i e -> b nd nh nw heads i e", nd=nd, nh=nh)

        return self.proj(rearrange(out, "b nd nh nw heads i e -> b nd nh nw i (heads e)"))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each behind a layer norm and beside a shortcut. (b, d, h, w, c) -> the same."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        window: Size3,
        shift: Size3,
        clipped_bias: ClippedBias = "rebuilt",
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
        if pad_d or pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_d))
        if any(shift):
            x = torch.roll(x, [-s for s in shift], dims=(1, 2, 3))
        sizes = dict(zip(("wd", "wh", "ww"), window))
        tokens = rearrange(x, f"{WINDOWS} -> {TOKENS}", **sizes)
        tokens = self.attn(tokens, window, shift)
        x = rearrange(tokens, f"{TOKENS} -> {WINDOWS}", **sizes)
        if any(shift):
            x = torch.roll(x, shift, dims=(1, 2, 3))
        return x[:, :d, :h, :w]

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
        octants = rearrange(x, "b (d od) (h oh) (w ow) c -> (od oh ow) b d h w c", od=2, oh=2, ow=2)
        side_by_side = torch.cat([octants[n] for n in self.order], dim=-1)
        return self.reduction(self.norm(side_by_side))


class Stage(nn.Module):
    """Blocks with the window in turn at home and shifted by half, then a merging. (b, d, h, w, c) -> half, twice."""

    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        *,
        window: Size3,
        merge_order: MergeOrder,
        clipped_bias: ClippedBias,
        conv: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        half: Size3 = (window[0] // 2, window[1] // 2, window[2] // 2)
        self.checkpointing = checkpointing
        self.conv = ResidualBlock(channels, channels) if conv else None
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels,
                heads,
                window=window,
                shift=half if n % 2 else (0, 0, 0),
                clipped_bias=clipped_bias,
            )
            for n in range(depth)
        )
        self.merge = PatchMerging(channels, merge_order)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = rearrange(
                self.conv(rearrange(x, "b d h w c -> b c d h w")), "b c d h w -> b d h w c"
            )
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.checkpointing and self.training
                else block(x)
            )
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
        self,
        c_in: int,
        channels: int,
        *,
        depths: Sequence[int],
        heads: Sequence[int],
        window: Size3,
        merge_order: MergeOrder,
        clipped_bias: ClippedBias,
        normalize_hidden: bool,
        stem: Stem,
        stage_conv: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.normalize_hidden = normalize_hidden
        self.stem = PatchStem(c_in, channels) if stem == "patch" else ConvStem(c_in, channels)
        self.stages = nn.ModuleList(
            Stage(
                channels * 2**n,
                depth,
                head_count,
                window=window,
                merge_order=merge_order,
                clipped_bias=clipped_bias,
                conv=stage_conv,
                checkpointing=checkpointing,
            )
            for n, (depth, head_count) in enumerate(zip(depths, heads))
        )

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
