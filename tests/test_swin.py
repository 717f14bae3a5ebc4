"""dae/model/swin.py: windows, masks, bias, attention, merging, against brute force and timm."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from dae.model import swin
from dae.model.swin import (
    MERGE_ORDER,
    ClippedBias,
    MergeOrder,
    PatchMerging,
    RecomputedAttention,
    Size3,
    SwinBlock,
    SwinOptions,
    WindowAttention,
    attention_by_the_formula,
    attention_mask,
    fit_window,
    fused_attention,
    relative_position_index,
    window_merge,
    window_partition,
)

CPU = torch.device("cpu")
OPTIONS = SwinOptions(
    depths=(2, 2),
    heads=(2, 2),
    window=(3, 5, 3),
    merge_order="all",
    clipped_bias="rebuilt",
    normalize_hidden=True,
    stem="patch",
    stage_conv=False,
    checkpointing=False,
)


def positions(window: Size3) -> list[tuple[int, ...]]:
    """(d, h, w) of every token of a window, in order."""
    return list(product(*(range(n) for n in window)))


# --- windows


def test_windows_hold_neighbours_and_go_back_to_their_grid() -> None:
    x = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (6, 4, 8)), indexing="ij"), dim=-1)
    windows = window_partition(x[None], (3, 2, 4))
    assert windows.shape == (1, 2, 2, 2, 24, 3)
    assert windows[0, 1, 0, 1].tolist() == [
        [3 + d, 0 + h, 4 + w] for d, h, w in positions((3, 2, 4))
    ]
    assert torch.equal(window_merge(windows, (3, 2, 4)), x[None])


def test_a_window_is_no_larger_than_the_grid_and_does_not_shift_where_it_covers_it() -> None:
    assert fit_window((6, 7, 20), (7, 7, 7), (3, 3, 3)) == ((6, 7, 7), (0, 0, 3))


@pytest.mark.parametrize("shift", [(1, 0, 2), (1, 2, 2), (0, 0, 1), (0, 0, 0)])
def test_the_mask_separates_the_tokens_that_the_roll_brought_together(shift: Size3) -> None:
    """Brute force: roll the positions of all tokens, compare them inside each window."""
    grid, window = (6, 4, 8), (3, 2, 4)
    position = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    rolled = torch.roll(position, [-s for s in shift], dims=(1, 2, 3))
    pattern = "axes (nd wd) (nh wh) (nw ww) -> (nd nh nw) (wd wh ww) axes"
    windows = rearrange(rolled, pattern, wd=window[0], wh=window[1], ww=window[2])

    # Neighbours in the volume span less than a window; tokens that came round are a grid away.
    distance = (windows[:, :, None] - windows[:, None]).abs()
    expected = (distance < torch.tensor(window)).all(-1)

    mask = attention_mask(grid, window, shift, CPU)
    if mask is None:
        assert expected.all()
    else:
        assert torch.equal(mask, expected)


# --- bias


def rows_read(clipped_bias: ClippedBias, clipped: Size3, window: Size3) -> Tensor:
    """Which row of the table each pair of a clipped window reads: the table holds row numbers."""
    options = replace(OPTIONS, window=window, clipped_bias=clipped_bias)
    attention = WindowAttention(4, 1, options)
    attention.bias_table.data = torch.arange(float(len(attention.bias_table)))[:, None]
    return attention.bias(clipped)[0].long()


@pytest.mark.parametrize(
    "clipped, window",
    [
        ((2, 3, 4), (2, 3, 4)),
        ((2, 3, 2), (4, 3, 2)),
        ((4, 1, 2), (4, 3, 2)),
        ((1, 1, 1), (4, 3, 2)),
    ],
)
def test_each_pair_of_tokens_reads_the_row_of_its_own_offset(clipped: Size3, window: Size3) -> None:
    rows = rows_read("rebuilt", clipped, window)
    all_offsets = list(product(*(range(1 - w, w) for w in window)))
    for (i, a), (j, b) in product(enumerate(positions(clipped)), repeat=2):
        assert all_offsets[rows[i, j]] == tuple(p - q for p, q in zip(a, b))


def test_sliced_bias_of_a_clipped_window_reads_other_rows_than_the_true_offsets() -> None:
    """The quirk of the published weights at 96^3: 98 % of the pairs of a 6^3 window."""
    sliced = rows_read("sliced", (6, 6, 6), (7, 7, 7))
    wrong = sliced != rows_read("rebuilt", (6, 6, 6), (7, 7, 7))
    assert torch.equal(sliced, relative_position_index((7, 7, 7), (7, 7, 7))[:216, :216])
    assert 0.975 < wrong.float().mean() < 0.985


def test_bias_tables_start_small() -> None:
    """A std of .02, cut at twice that in units of 1 as timm has it: no offset is preferred."""
    table = WindowAttention(8, 2, replace(OPTIONS, window=(5, 5, 5))).bias_table
    assert float(table.detach().std()) == pytest.approx(0.02, rel=0.1)


# --- attention

WINDOW: Size3 = (3, 2, 3)
SHIFTS: list[tuple[Size3, Size3]] = [
    ((2, 2, 2), (0, 0, 0)),  # nothing rolled
    ((2, 3, 2), (1, 1, 1)),  # all axes, so eight masks
    ((1, 2, 3), (0, 1, 1)),  # an axis that one window covers
    ((1, 1, 2), (0, 0, 1)),
]


def attention_inputs(batch: int, windows: Size3, *, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of windows of 18 tokens, two heads of four channels; and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, *windows, 2, 18, 4)] * 3 + [(2, 18, 18)]
    inputs = []
    for shape in shapes:
        t = torch.randn(shape, generator=generator, dtype=dtype)
        inputs.append(t.requires_grad_())
    return inputs


def recomputed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Size3) -> Tensor:
    """The path of a CPU."""
    return RecomputedAttention.apply(q, k, v, bias, WINDOW, shift)  # type: ignore[no-any-return]


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Size3) -> Tensor:
    """The path of a GPU, on this CPU."""
    return fused_attention(q, k, v, bias, WINDOW, shift)


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Size3) -> Tensor:
    """Every window with its own mask, written out."""
    nd, nh, nw = q.shape[1:4]
    mask = attention_mask((nd * 3, nh * 2, nw * 3), WINDOW, shift, CPU)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None], float("-inf"))
        bias = rearrange(bias, "(nd nh nw) heads i j -> nd nh nw heads i j", nd=nd, nh=nh)
    return attention_by_the_formula(q, k, v, bias)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("windows, shift", SHIFTS)
@pytest.mark.parametrize("path", [recomputed, fused])
def test_both_paths_of_attention_and_their_gradients_equal_the_formula(
    path: Any, windows: Size3, shift: Size3, batch: int
) -> None:
    inputs = attention_inputs(batch, windows, dtype=torch.float64)
    out = path(*inputs, shift)
    expected = by_the_formula(*inputs, shift)
    assert torch.allclose(out, expected, atol=1e-12)

    d_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, d_out)
    expected_gradients = torch.autograd.grad(expected, inputs, d_out)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert torch.allclose(gradient, expected_gradient, atol=1e-12)


@pytest.mark.parametrize("windows, shift", SHIFTS)
def test_windows_attend_a_few_at_a_time_as_they_do_together(
    windows: Size3, shift: Size3, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = attention_inputs(5, windows, dtype=torch.float32)
    together = recomputed(*inputs, shift)
    bias = inputs[3]
    monkeypatch.setattr(swin, "BIASES_AT_ONCE", 2 * bias.numel())
    assert torch.equal(recomputed(*inputs, shift), together)


@pytest.mark.parametrize("windows, shift", SHIFTS[:2])
def test_the_recomputed_gradient_is_that_of_finite_differences(
    windows: Size3, shift: Size3
) -> None:
    inputs = attention_inputs(1, windows, dtype=torch.float64)
    assert torch.autograd.gradcheck(recomputed, (*inputs, shift), fast_mode=True)


def test_attention_that_is_recomputed_keeps_no_scores_for_the_backward_pass() -> None:
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    def unpack(t: Tensor) -> Tensor:
        return t

    inputs = attention_inputs(2, (2, 2, 2), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        recomputed(*inputs, (1, 1, 1))
    windows, heads, tokens = 16, 2, 18
    assert max(sizes) == inputs[0].numel() < windows * heads * tokens * tokens


def test_bf16_attention_is_that_of_float32_within_its_digits() -> None:
    exact = attention_inputs(2, (2, 2, 2), dtype=torch.float32)
    rough = [t.detach().bfloat16().requires_grad_() for t in exact]
    out = recomputed(*rough, (1, 1, 1))
    expected = recomputed(*exact, (1, 1, 1))
    assert (out - expected).norm() < 0.01 * expected.norm()

    gradients = torch.autograd.grad(out.float().square().sum(), rough)
    expected_gradients = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert (gradient - expected_gradient).norm() < 0.02 * expected_gradient.norm()


def test_a_gpus_kernel_is_given_rows_of_a_multiple_of_eight_without_a_copy_for_every_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch's CUDA kernels ask for: the last stride 1, the others multiples of 8."""
    biases: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*qkv: Tensor, attn_mask: Tensor) -> Tensor:
        biases.append(attn_mask)
        return attend(*qkv, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for windows, shift in SHIFTS[:2]:
        fused(*attention_inputs(2, windows, dtype=torch.float32), shift)

    assert len(biases) == 2
    for bias in biases:
        assert bias.stride(-1) == 1 and bias.stride(-2) == 24 and bias.stride(0) == 0
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


# --- blocks


def block(channels: int = 8, window: Size3 = (3, 5, 3), shift: Size3 = (1, 0, 1)) -> SwinBlock:
    return SwinBlock(channels, 2, shift, replace(OPTIONS, window=window))


def test_a_block_is_its_parameters_alone_so_that_it_may_be_built_without_values() -> None:
    torch.manual_seed(0)
    full = block()
    with torch.device("meta"):
        empty = block()
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(1, 6, 5, 6, 8)
    assert not list(full.buffers())
    assert torch.equal(empty(x), full(x))


def test_a_block_trains_after_it_has_predicted() -> None:
    model = block()
    x = torch.randn(1, 6, 5, 6, 8)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_a_block_on_a_volume_of_depth_one_equals_timms_2d_block(shift: int) -> None:
    torch.manual_seed(0)
    theirs = SwinTransformerBlock(16, (8, 12), num_heads=2, window_size=4, shift_size=shift).eval()
    nn.init.normal_(theirs.attn.relative_position_bias_table)

    ours = block(16, window=(1, 4, 4), shift=(0, shift, shift)).eval()
    state = {}
    for name, value in theirs.state_dict().items():
        if "index" not in name and "mask" not in name:
            state[name.replace("relative_position_bias_table", "bias_table")] = value
    ours.load_state_dict(state)

    x = torch.randn(2, 8, 12, 16)
    assert torch.allclose(ours(x[:, None])[:, 0], theirs(x), atol=1e-5)


# --- merging


@pytest.mark.parametrize("order", MERGE_ORDER)
def test_merging_reads_the_octants_in_the_order_it_is_named_for(order: MergeOrder) -> None:
    merge = PatchMerging(1, order)
    merge.norm = nn.Identity()  # type: ignore[assignment]
    merge.reduction = nn.Identity()  # type: ignore[assignment]
    octants = torch.arange(8.0).reshape(1, 2, 2, 2, 1)  # voxel (od, oh, ow) holds 4 od + 2 oh + ow
    assert merge(octants).flatten().tolist() == list(MERGE_ORDER[order])


def test_legacy_merging_never_reads_two_octants() -> None:
    assert set(range(8)) - set(MERGE_ORDER["legacy"]) == {3, 6}
