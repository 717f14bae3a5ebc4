"""dae/model/swin.py: windows, masks, bias, attention and merging, against brute force and timm's 2D block."""

from itertools import product
from typing import Any

import pytest
import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from dae.model.swin import (
    MERGE_ORDER,
    PatchMerging,
    RecomputedAttention,
    Size3,
    SwinBlock,
    WindowAttention,
    attention_by_the_formula,
    attention_mask,
    clip_window,
    fused_attention,
    relative_position_index,
)

CPU = torch.device("cpu")


def test_a_window_is_no_larger_than_the_grid_and_does_not_shift_where_it_covers_it() -> None:
    assert clip_window((6, 7, 20), (7, 7, 7), (3, 3, 3)) == ((6, 7, 7), (0, 0, 3))


def test_each_pair_of_tokens_reads_the_row_of_its_own_offset() -> None:
    window = (2, 3, 4)
    places = list(product(*map(range, window)))
    rows = relative_position_index(window, window)
    all_offsets = list(product(*(range(1 - w, w) for w in window)))
    for (i, a), (j, b) in product(enumerate(places), repeat=2):
        assert all_offsets[rows[i, j]] == tuple(p - q for p, q in zip(a, b))


def rows_read(clipped_bias: Any, clipped: Size3, window: Size3) -> Tensor:
    """Which row of the table each pair of a clipped window reads: a table that holds its own row numbers."""
    attention = WindowAttention(4, 1, window, clipped_bias)
    attention.bias_table.data = torch.arange(float(len(attention.bias_table)))[:, None]
    return attention.bias(clipped)[0].long()


@pytest.mark.parametrize("clipped", [(2, 3, 2), (4, 1, 2), (1, 1, 1)])
def test_each_pair_of_a_clipped_window_reads_the_row_of_its_own_offset(clipped: Size3) -> None:
    window = (4, 3, 2)
    rows = rows_read("rebuilt", clipped, window)
    places = list(product(*map(range, clipped)))
    all_offsets = list(product(*(range(1 - w, w) for w in window)))
    for (i, a), (j, b) in product(enumerate(places), repeat=2):
        assert all_offsets[rows[i, j]] == tuple(p - q for p, q in zip(a, b))


def test_sliced_bias_of_a_clipped_window_reads_other_rows_than_the_true_offsets() -> None:
    """The quirk of the published weights at 96^3: 98 % of the pairs of a 6^3 window."""
    sliced = rows_read("sliced", (6, 6, 6), (7, 7, 7))
    wrong = sliced != rows_read("rebuilt", (6, 6, 6), (7, 7, 7))
    assert torch.equal(sliced, relative_position_index((7, 7, 7), (7, 7, 7))[:216, :216])
    assert 0.975 < wrong.float().mean() < 0.985


def test_bias_tables_start_small() -> None:
    """A std of .02, cut at twice that in units of 1 as timm has it: no offset is preferred at the start."""
    table = WindowAttention(8, 2, (5, 5, 5), "rebuilt").bias_table
    assert float(table.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("shift", [(1, 0, 2), (1, 2, 2), (0, 0, 1), (0, 0, 0)])
def test_the_mask_separates_the_tokens_that_the_roll_brought_together(shift: Size3) -> None:
    """Brute force: roll the places of all tokens, compare them inside each window."""
    grid, window = (6, 4, 8), (3, 2, 4)
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    rolled = torch.roll(place, [-s for s in shift], dims=(1, 2, 3))
    pattern = "axes (nd wd) (nh wh) (nw ww) -> (nd nh nw) (wd wh ww) axes"
    windows = rearrange(rolled, pattern, wd=window[0], wh=window[1], ww=window[2])

    mask = attention_mask(grid, window, shift, CPU)
    for number, tokens in enumerate(windows):
        # Neighbours in the volume span less than a window; tokens that came round are a whole grid apart.
        apart = (tokens[:, None] - tokens[None]).abs() >= torch.tensor(window)
        together = ~apart.any(-1)
        assert torch.equal(together, torch.ones_like(together) if mask is None else mask[number])


SHIFTS = [
    ((2, 2, 2), (0, 0, 0)),  # nothing rolled
    ((2, 3, 2), (1, 1, 1)),  # all axes, so eight masks
    ((1, 2, 3), (0, 1, 1)),  # an axis that one window covers
    ((1, 1, 2), (0, 0, 1)),
]


def attention_inputs(batch: int, windows: Size3, *, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of windows of 3 x 2 x 3 tokens, two heads of four channels; and a bias."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *windows, 2, 18, 4)
    made = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
    made.append(torch.randn(2, 18, 18, generator=generator, dtype=dtype))
    return [t.requires_grad_() for t in made]


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Size3) -> Tensor:
    """Every window with its own mask, written out."""
    windows, window = (q.shape[1], q.shape[2], q.shape[3]), (3, 2, 3)
    grid = (windows[0] * 3, windows[1] * 2, windows[2] * 3)
    mask = attention_mask(grid, window, shift, CPU)
    flat = "b nd nh nw heads i e -> b (nd nh nw) heads i e"
    q, k, v = (rearrange(t, flat) for t in (q, k, v))
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None], float("-inf"))
    out = attention_by_the_formula(q, k, v, bias)
    back = "b (nd nh nw) heads i e -> b nd nh nw heads i e"
    return rearrange(out, back, nd=windows[0], nh=windows[1])


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Size3) -> Tensor:
    """The path of a GPU, on this CPU."""
    nd, nh, nw = q.shape[1:4]
    mask = attention_mask((nd * 3, nh * 2, nw * 3), (3, 2, 3), shift, CPU)
    q, k, v = (rearrange(t, "b nd nh nw heads i e -> b (nd nh nw) heads i e") for t in (q, k, v))
    out = fused_attention(q, k, v, bias, mask)
    return rearrange(out, "b (nd nh nw) heads i e -> b nd nh nw heads i e", nd=nd, nh=nh)


def recomputed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Size3) -> Tensor:
    """The path of a CPU."""
    return RecomputedAttention.apply(q, k, v, bias, (3, 2, 3), shift)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("windows, shift", SHIFTS)
@pytest.mark.parametrize("path", [recomputed, fused])
def test_both_paths_of_attention_and_their_gradients_equal_the_formula(
    path: Any, windows: Size3, shift: Size3, batch: int
) -> None:
    inputs = attention_inputs(batch, windows, dtype=torch.float64)
    found, expected = path(*inputs, shift), by_the_formula(*inputs, shift)
    assert torch.allclose(found, expected, atol=1e-12)
    gradient = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
    )
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("windows, shift", SHIFTS[:2])
def test_the_recomputed_gradient_is_that_of_finite_differences(
    windows: Size3, shift: Size3
) -> None:
    inputs = attention_inputs(1, windows, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: recomputed(*t, shift), inputs, fast_mode=True)


def test_attention_that_is_recomputed_keeps_no_scores_for_the_backward_pass() -> None:
    kept: list[int] = []
    inputs = attention_inputs(2, (2, 2, 2), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        recomputed(*inputs, (1, 1, 1))
    assert max(kept) == inputs[0].numel() < 16 * 2 * 18 * 18


def test_bf16_attention_is_that_of_float32_within_its_digits() -> None:
    exact = attention_inputs(2, (2, 2, 2), dtype=torch.float32)
    rough = [t.detach().bfloat16().requires_grad_() for t in exact]
    found, expected = recomputed(*rough, (1, 1, 1)), recomputed(*exact, (1, 1, 1))
    assert (found - expected).norm() < 0.01 * expected.norm()
    gradients = torch.autograd.grad(found.float().square().sum(), rough)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), exact)):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_gpus_kernel_is_given_rows_of_a_multiple_of_eight_without_a_copy_for_every_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch's CUDA kernels ask for: the last stride 1, the others multiples of 8; else the formula."""
    given: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_and_tell(*qkv: Tensor, attn_mask: Tensor) -> Tensor:
        given.append(attn_mask)
        return attend(*qkv, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_and_tell)
    for windows, shift in SHIFTS[:2]:
        fused(*attention_inputs(2, windows, dtype=torch.float32), shift)
    for bias in given:
        assert bias.stride(-1) == 1 and bias.stride(-2) == 24 and bias.stride(0) == 0
        assert all(step % 8 == 0 for step in bias.stride()[:-1])


def test_a_block_is_its_parameters_alone_so_that_it_may_be_built_without_values() -> None:
    torch.manual_seed(0)
    block, x = SwinBlock(8, 2, window=(3, 5, 3), shift=(1, 0, 1)), torch.randn(1, 6, 5, 6, 8)
    with torch.device("meta"):
        empty = SwinBlock(8, 2, window=(3, 5, 3), shift=(1, 0, 1))
    empty.load_state_dict(block.state_dict(), assign=True)
    assert not list(block.buffers()) and torch.equal(empty(x), block(x))


def test_a_block_trains_after_it_has_predicted() -> None:
    block = SwinBlock(8, 2, window=(3, 5, 3), shift=(1, 0, 1))
    x = torch.randn(1, 6, 5, 6, 8)
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()


@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_a_block_on_a_volume_of_depth_one_equals_timms_2d_block(shift: int) -> None:
    torch.manual_seed(0)
    theirs = SwinTransformerBlock(16, (8, 12), num_heads=2, window_size=4, shift_size=shift).eval()
    torch.nn.init.normal_(theirs.attn.relative_position_bias_table)
    ours = SwinBlock(16, 2, window=(1, 4, 4), shift=(0, shift, shift)).eval()
    state = {k: v for k, v in theirs.state_dict().items() if "index" not in k and "mask" not in k}
    ours.load_state_dict(
        {k.replace("relative_position_bias_table", "bias_table"): v for k, v in state.items()}
    )
    x = torch.randn(2, 8, 12, 16)
    assert torch.allclose(ours(x[:, None])[:, 0], theirs(x), atol=1e-5)


@pytest.mark.parametrize("order", ["all", "monai", "legacy"])
def test_merging_reads_the_octants_in_the_order_it_is_named_for(order: str) -> None:
    merge = PatchMerging(1, order)  # type: ignore[arg-type]
    torch.nn.init.eye_(merge.reduction.weight)
    merge.norm = torch.nn.Identity()  # type: ignore[assignment]
    octants = torch.arange(8.0).reshape(1, 2, 2, 2, 1)  # voxel (od, oh, ow) holds 4 od + 2 oh + ow
    assert merge(octants).flatten().tolist() == list(MERGE_ORDER[order][:2])  # type: ignore[index]


def test_legacy_merging_never_reads_two_octants() -> None:
    assert set(range(8)) - set(MERGE_ORDER["legacy"]) == {3, 6}
