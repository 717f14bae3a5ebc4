"""The 3D Swin encoder (Liu et al. 2021): attention inside windows, shifted in every second block.

Axis letters: b batch, c channels, d h w grid; i j tokens of one window; heads; e channels per head;
nd nh nw windows along each axis, wd wh ww the size of one; od oh ow the two halves of an octant.

Inside the encoder tokens are (b, d, h, w, c), so that the convolutions on either side see
`channels_last_3d` without a copy; at its borders they are (b, c, d, h, w). Functions of integers
and tensors come first, modules after.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

import torch
from einops import rearrange, reduce
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from dae.model.conv import InstanceNorm, ResidualBlock, activation, apply_block

Size3 = tuple[int, int, int]
MergeOrder = Literal["all", "monai", "legacy"]
ClippedBias = Literal["rebuilt", "sliced"]
Stem = Literal["patch", "conv"]


@dataclass(frozen=True, kw_only=True)
class SwinOptions:
    """How an encoder is built; every module below takes from it what it needs."""

    depths: Sequence[int]  # blocks of each stage
    heads: Sequence[int]  # attention heads of each stage
    window: Size3  # tokens of a window along each axis
    merge_order: MergeOrder  # in which patch merging reads the eight octants
    clipped_bias: ClippedBias  # position bias of a window that the grid clips
    normalize_hidden: bool  # layer norm, without weights, on the states that go to the decoder
    stem: Stem  # a 2x2x2 convolution, or the authors' two 3x3x3 convolutions
    stage_conv: bool  # a residual convolution before each stage (SwinUNETR-V2)
    checkpointing: bool  # recompute the blocks in the backward pass


# Octant number = 4 od + 2 oh + ow. The shapes of the weights do not show the order: weights made
# for another one load without an error, and the network is worse.
MERGE_ORDER: dict[MergeOrder, tuple[int, ...]] = {
    "all": (0, 1, 2, 3, 4, 5, 6, 7),
    # MONAI >= 1.5
    "monai": (0, 4, 2, 1, 6, 5, 3, 7),
    # The authors' code, MONAI 0.9 to 1.4: octants 1 and 2 twice, 3 and 6 never.
    "legacy": (0, 4, 2, 1, 5, 2, 1, 7),
}


# --- windows

GRID = "b (nd wd) (nh wh) (nw ww) c"
WINDOWS = "b nd nh nw (wd wh ww) c"


def window_partition(x: Tensor, window: Size3) -> Tensor:
    """(b, d, h, w, c) -> (b, nd, nh, nw, i, c)."""
    wd, wh, ww = window
    return rearrange(x, f"{GRID} -> {WINDOWS}", wd=wd, wh=wh, ww=ww)


def window_merge(windows: Tensor, window: Size3) -> Tensor:
    """(b, nd, nh, nw, i, c) -> (b, d, h, w, c): the inverse of `window_partition`."""
    wd, wh, ww = window
    return rearrange(windows, f"{WINDOWS} -> {GRID}", wd=wd, wh=wh, ww=ww)


def fit_window(grid: Size3, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """A window no larger than the grid, and no shift along an axis that one window covers.

    Returns (window, shift).
    """
    clipped = tuple(min(n, w) for n, w in zip(grid, window))
    still = tuple(0 if n <= w else s for n, w, s in zip(grid, window, shift))
    return cast(Size3, clipped), cast(Size3, still)


def relative_position_index(
    window: Size3, table_window: Size3, device: torch.device | None = None
) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (i, j), int64.

    The table has a row for each offset between two tokens of `table_window`: prod(2 w - 1) of them.
    Made on the device in every forward pass: a table from the host would have to be waited for, and
    one kept in the module would be lost where a network is built without values (device meta).
    """
    axes = [torch.arange(n, device=device) for n in window]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    position = rearrange(position, "axes wd wh ww -> axes (wd wh ww)")
    offset = rearrange(position, "axes i -> axes i 1") - rearrange(position, "axes j -> axes 1 j")

    # The three offsets as the digits of one number; along an axis of w tokens there are 2 w - 1.
    row = torch.zeros_like(offset[0])
    for offset_along_axis, size in zip(offset, table_window):
        row = row * (2 * size - 1) + offset_along_axis + size - 1
    return row


def attention_mask(grid: Size3, window: Size3, shift: Size3, device: torch.device) -> Tensor | None:
    """Which tokens see each other in every window of a rolled grid: (windows, i, j), bool.

    Rolling by `shift` brings the first tokens of an axis round to its far end, where they share a
    window with tokens that are not their neighbours. Two tokens of a window see each other if,
    along every axis, both came round or both did not. None where nothing is rolled: all see all.

    grid: tokens along each axis, whole windows of them.
    """
    if not any(shift):
        return None

    alike = []
    for n, size, s in zip(grid, window, shift):
        # As integers: the compiler of torch 2.11 cannot compare two tensors of bool.
        came_round = (torch.arange(n, device=device) >= n - s).int()
        came_round = rearrange(came_round, "(windows tokens) -> windows tokens", tokens=size)

        token_i = rearrange(came_round, "windows i -> windows i 1")
        token_j = rearrange(came_round, "windows j -> windows 1 j")
        alike.append(token_i == token_j)

    along_d = rearrange(alike[0], "nd wd vd -> nd 1 1 wd 1 1 vd 1 1")
    along_h = rearrange(alike[1], "nh wh vh -> 1 nh 1 1 wh 1 1 vh 1")
    along_w = rearrange(alike[2], "nw ww vw -> 1 1 nw 1 1 ww 1 1 vw")
    visible = along_d & along_h & along_w
    return rearrange(visible, "nd nh nw wd wh ww vd vh vw -> (nd nh nw) (wd wh ww) (vd vh vw)")


# --- attention, three times: in a formula, in one kernel for a GPU, and recomputed for a CPU

PER_HEAD = "b nd nh nw heads i e"
ALL_WINDOWS = "(b nd nh nw) heads i e"


def attention_by_the_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias) v. q, k, v (..., heads, i, e), bias (..., heads, i, j).

    Scores and their softmax in float32 at least.
    """
    scores = torch.einsum("...ie,...je->...ij", q, k) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) + bias
    return torch.einsum("...ij,...je->...ie", scores.softmax(dim=-1).to(v.dtype), v)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: Size3, shift: Size3
) -> Tensor:
    """The formula in one kernel that keeps no scores, gradients included: for a GPU.

    q, k, v (b, nd, nh, nw, heads, i, e), bias (heads, i, j) -> as q.

    On an H100 (torch 2.11, bf16, 686 windows of 343 tokens, 3 heads, forward and backward) this
    takes 3.4 ms, the formula 5.2, a backward recomputed by the formula 5.4. The gradient of the
    bias keeps cuDNN's kernel out of training, as it should: with a mask that needs no gradient and
    windows of 4^3 its bf16 gradients have been seen to be NaN in torch >= 2.11 (pytorch issue
    196678).
    """
    b, nd, nh, nw, heads, n, _ = q.shape
    grid = (nd * window[0], nh * window[1], nw * window[2])
    mask = attention_mask(grid, window, shift, q.device)

    # Rows of a multiple of 8 numbers, each following the last in memory: a fused kernel takes no
    # other bias, and would copy it whole for every window.
    padding = (0, -n % 8)
    bias = F.pad(bias, padding).contiguous()

    if mask is None:
        # One bias for all windows, expanded without a copy.
        folded = ALL_WINDOWS
        bias = bias[..., :n].expand(b * nd * nh * nw, -1, -1, -1)
    else:
        # A bias for each window, the same for every sample.
        folded = "b (nd nh nw heads) i e"
        visible = rearrange(F.pad(mask, padding), "windows i j -> windows 1 i j")
        bias = torch.where(visible, bias, float("-inf"))
        bias = rearrange(bias, "windows heads i j -> (windows heads) i j")
        bias = bias[..., :n].expand(b, -1, -1, -1)

    q, k, v = (rearrange(t, f"{PER_HEAD} -> {folded}") for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return rearrange(out, f"{folded} -> {PER_HEAD}", b=b, nd=nd, nh=nh, nw=nw, heads=heads)


# torch's fused kernel copies the bias for every window that it is given. This many numbers at once:
# 16 MB in float32, where all windows of the first stage would be 484 MB at 96^3.
BIASES_AT_ONCE = 2**22


class RecomputedAttention(torch.autograd.Function):
    """The formula for a CPU: forward by a fused kernel, backward recomputed.

    torch's fused CPU kernel has no gradient for a learned bias and would fall back to the formula,
    which keeps (windows, heads, i, j) scores for the backward pass: 3 to 4 GB at 96^3. Here only
    q, k, v, bias and output are kept. Exact and deterministic.
    """

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: Size3, shift: Size3
    ) -> Tensor:
        """q, k, v (b, nd, nh, nw, heads, i, e), bias (heads, i, j) -> as q."""
        # torch chooses the kernel by what requires a gradient, even where none is computed.
        q, k, v, bias = (t.detach() for t in (q, k, v, bias))
        out = torch.empty_like(q)

        biases = masked_biases(bias, window, shift)
        windows_at_once = max(1, BIASES_AT_ONCE // bias.numel())
        for region, masked_bias in zip(regions_of_one_mask(shift), biases):
            folded = (fold_windows(t[:, *region]) for t in (q, k, v))
            parts = []
            for q_w, k_w, v_w in zip(*(t.split(windows_at_once) for t in folded)):
                # A bias of four axes: with five torch takes the formula instead.
                bias_w = masked_bias.expand(len(q_w), -1, -1, -1)
                parts.append(F.scaled_dot_product_attention(q_w, k_w, v_w, attn_mask=bias_w))

            out[:, *region] = unfold_windows(torch.cat(parts), q[:, *region].shape)

        context.save_for_backward(q, k, v, bias, out)
        context.window, context.shift = window, shift
        return out

    @staticmethod
    def backward(context: Any, d_out: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, bias, out = context.saved_tensors
        at_least_float32 = torch.promote_types(bias.dtype, torch.float32)
        d_q, d_k, d_v = (torch.empty_like(t) for t in (q, k, v))
        d_bias = torch.zeros_like(bias, dtype=at_least_float32)

        biases = masked_biases(bias.to(at_least_float32), context.window, context.shift)
        for region, masked_bias in zip(regions_of_one_mask(context.shift), biases):
            parts = [fold_windows(t[:, *region]) for t in (q, k, v, out, d_out)]
            d_q_part, d_k_part, d_v_part, d_bias_part = formula_backward(*parts, bias=masked_bias)

            shape = q[:, *region].shape
            d_q[:, *region] = unfold_windows(d_q_part, shape)
            d_k[:, *region] = unfold_windows(d_k_part, shape)
            d_v[:, *region] = unfold_windows(d_v_part, shape)
            d_bias += d_bias_part

        # Window and shift have no gradient.
        return d_q, d_k, d_v, d_bias.to(bias.dtype), None, None


def regions_of_one_mask(shift: Size3) -> Iterator[tuple[slice, slice, slice]]:
    """Splits the (nd, nh, nw) windows of a grid rolled by `shift` into parts of one mask each.

    Only the last window along a shifted axis holds tokens that came round, so there are at most
    eight masks, however many windows; in the order of those of a grid of two windows along each
    such axis.
    """
    whole, inner, last = slice(None), slice(None, -1), slice(-1, None)
    along_d, along_h, along_w = ((inner, last) if s else (whole,) for s in shift)
    return product(along_d, along_h, along_w)


def masked_biases(bias: Tensor, window: Size3, shift: Size3) -> list[Tensor]:
    """The bias with unseen pairs at -inf, for each of `regions_of_one_mask`: (heads, i, j) each."""
    small_grid = tuple(w * 2 if s else w for w, s in zip(window, shift))
    masks = attention_mask(cast(Size3, small_grid), window, shift, bias.device)
    if masks is None:
        return [bias]
    return [bias.masked_fill(~mask, float("-inf")) for mask in masks]


def fold_windows(t: Tensor) -> Tensor:
    """All windows of all samples along one axis."""
    return rearrange(t, f"{PER_HEAD} -> {ALL_WINDOWS}")


def unfold_windows(t: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `fold_windows`; shape: of its argument."""
    b, nd, nh, nw = shape[:4]
    return rearrange(t, f"{ALL_WINDOWS} -> {PER_HEAD}", b=b, nd=nd, nh=nh, nw=nw)


def formula_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, *, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_by_the_formula`, of q, k, v and the bias.

    q, k, v, out, d_out (windows, heads, i, e), bias (heads, i, j) -> as q, k, v, bias.

    A few windows at a time, so that their scores, half a million numbers, stay in a core's cache;
    in the type of the bias, float32 at least.

    With S = q k^T / sqrt(e) + bias, P = softmax(S) and out = P v, and dX the gradient of X:

        dv = P^T dout     dP = dout v^T     dS = P (dP - sum_j P dP)     sum_j P dP = sum_e out dout
        dbias = dS        dq = dS k / sqrt(e)        dk = dS^T q / sqrt(e)
    """
    heads, n, _ = bias.shape
    windows_at_once = max(1, 2**19 // (heads * n * n))
    scale = q.shape[-1] ** -0.5

    d_q, d_k, d_v = (torch.empty_like(t, dtype=bias.dtype) for t in (q, k, v))
    d_bias = torch.zeros_like(bias)

    for first in range(0, len(q), windows_at_once):
        some = slice(first, first + windows_at_once)
        q_w, k_w, v_w, out_w, d_out_w = (t[some].to(bias.dtype) for t in (q, k, v, out, d_out))
        q_w = q_w * scale

        # P once more, and dv.
        scores = torch.einsum("whie,whje->whij", q_w, k_w)
        scores += bias
        p = scores.softmax(dim=-1)
        d_v[some] = torch.einsum("whij,whie->whje", p, d_out_w)

        # dS, in the memory of dP.
        d_p = torch.einsum("whie,whje->whij", d_out_w, v_w)
        d_p -= reduce(out_w * d_out_w, "w heads i e -> w heads i 1", "sum")
        d_scores = d_p.mul_(p)

        # The bias is shared, so its gradient is the sum over the windows.
        for d_scores_of_window in d_scores:
            d_bias += d_scores_of_window

        d_q[some] = torch.einsum("whij,whje->whie", d_scores, k_w) * scale
        d_k[some] = torch.einsum("whij,whie->whje", d_scores, q_w)

    return d_q, d_k, d_v, d_bias


# --- modules


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of a window, with a learned bias for each offset."""

    def __init__(self, channels: int, heads: int, options: SwinOptions) -> None:
        super().__init__()
        self.heads = heads
        self.options = options
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

        wd, wh, ww = options.window
        offsets = (2 * wd - 1) * (2 * wh - 1) * (2 * ww - 1)
        self.bias_table = nn.Parameter(torch.zeros(offsets, heads))
        trunc_normal_(self.bias_table, std=0.02)

    def bias(self, window: Size3) -> Tensor:
        """Bias of each pair of tokens of a window, which the grid may have clipped: (heads, i, j).

        `rebuilt` looks up the true offset of each pair. `sliced` takes the first rows and columns
        of the whole window's index, as MONAI and the authors do: with 6 tokens of 7 along each
        axis, 98 % of the pairs then read another offset's row.
        """
        device = self.bias_table.device
        whole = self.options.window
        if self.options.clipped_bias == "rebuilt":
            index = relative_position_index(window, whole, device)
        else:
            n = window[0] * window[1] * window[2]
            index = relative_position_index(whole, whole, device)[:n, :n]
        return rearrange(self.bias_table[index], "i j heads -> heads i j")

    def forward(self, tokens: Tensor, window: Size3, shift: Size3) -> Tensor:
        """(b, nd, nh, nw, i, c), windows of a grid already rolled by `shift` -> the same shape."""
        split = f"b nd nh nw i (three heads e) -> three {PER_HEAD}"
        q, k, v = rearrange(self.qkv(tokens), split, three=3, heads=self.heads)
        bias = self.bias(window).to(q.dtype)

        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            out = RecomputedAttention.apply(q, k, v, bias, window, shift)
        else:
            out = fused_attention(q, k, v, bias, window, shift)

        return self.proj(rearrange(out, f"{PER_HEAD} -> b nd nh nw i (heads e)"))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each after a layer norm and beside a shortcut.

    (b, d, h, w, c) -> the same shape.
    """

    def __init__(self, channels: int, heads: int, shift: Size3, options: SwinOptions) -> None:
        super().__init__()
        self.window = options.window
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, options)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def attend(self, x: Tensor) -> Tensor:
        """Pad to whole windows, roll, attend, and undo both."""
        d, h, w = x.shape[1:4]
        window, shift = fit_window((d, h, w), self.window, self.shift)

        # Zeros at the far end, after the norm; attended to, as in every published Swin UNETR.
        pad_d, pad_h, pad_w = (-n % size for n, size in zip((d, h, w), window))
        if pad_d or pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_d))
        if any(shift):
            x = torch.roll(x, [-s for s in shift], dims=(1, 2, 3))

        tokens = window_partition(x, window)
        tokens = self.attn(tokens, window, shift)
        x = window_merge(tokens, window)

        if any(shift):
            x = torch.roll(x, shift, dims=(1, 2, 3))
        return x[:, :d, :h, :w]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Half the grid, twice the channels: eight neighbours side by side, normed, mixed.

    (b, d, h, w, c) -> (b, d/2, h/2, w/2, 2c).
    """

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
    """Blocks, every second one with its windows shifted by half of their size, then a merging.

    (b, d, h, w, c) -> (b, d/2, h/2, w/2, 2c).
    """

    def __init__(self, channels: int, depth: int, heads: int, options: SwinOptions) -> None:
        super().__init__()
        self.checkpointing = options.checkpointing
        self.conv = ResidualBlock(channels, channels) if options.stage_conv else None

        wd, wh, ww = options.window
        half = (wd // 2, wh // 2, ww // 2)
        self.blocks = nn.ModuleList()
        for n in range(depth):
            shift = half if n % 2 else (0, 0, 0)
            self.blocks.append(SwinBlock(channels, heads, shift, options))

        self.merge = PatchMerging(channels, options.merge_order)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = rearrange(x, "b d h w c -> b c d h w")
            x = rearrange(self.conv(x), "b c d h w -> b d h w c")
        for block in self.blocks:
            x = apply_block(block, x, recompute=self.checkpointing and self.training)
        return self.merge(x)


class PatchStem(nn.Module):
    """Every 2x2x2 patch of voxels becomes one token.

    (b, c_in, D, H, W) -> (b, c, D/2, H/2, W/2).
    """

    def __init__(self, c_in: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(c_in, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvStem(nn.Module):
    """The stem of the authors' code: two 3x3x3 convolutions, so that tokens overlap.

    Shapes as PatchStem.
    """

    def __init__(self, c_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(c_in, channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = InstanceNorm(channels, affine=True)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = InstanceNorm(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = activation(self.norm1(self.conv1(x)))
        return activation(self.norm2(self.conv2(x)))


STEMS: dict[Stem, type[nn.Module]] = {"patch": PatchStem, "conv": ConvStem}


class SwinEncoder(nn.Module):
    """Stem and stages. `tokenize` makes the tokens that DAE disrupts, `forward` encodes them."""

    def __init__(self, c_in: int, channels: int, options: SwinOptions) -> None:
        super().__init__()
        self.normalize_hidden = options.normalize_hidden
        self.stem = STEMS[options.stem](c_in, channels)
        self.stages = nn.ModuleList()
        for n, (depth, heads) in enumerate(zip(options.depths, options.heads)):
            self.stages.append(Stage(channels * 2**n, depth, heads, options))

    def tokenize(self, x: Tensor) -> Tensor:
        """(b, c_in, D, H, W) -> (b, c, D/2, H/2, W/2), channels last in memory."""
        return self.stem(x)

    def to_decoder(self, x: Tensor) -> Tensor:
        """A state as the decoder takes it: (b, d, h, w, c) -> (b, c, d, h, w)."""
        if self.normalize_hidden:
            x = F.layer_norm(x, x.shape[-1:])
        return rearrange(x, "b d h w c -> b c d h w")

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """The tokens and the output of every stage.

        (b, c, d, h, w) -> (b, c 2^n, d/2^n, h/2^n, w/2^n) for n = 0, 1, ...
        """
        x = rearrange(tokens, "b c d h w -> b d h w c")
        states = [self.to_decoder(x)]
        for stage in self.stages:
            x = stage(x)
            states.append(self.to_decoder(x))
        return states
