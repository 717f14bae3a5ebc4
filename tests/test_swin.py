"""dae/model/swin.py: windows, masks, bias and merging, against brute force and against timm's 2D block."""

from itertools import product

import pytest
import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformerBlock

from dae.model.swin import (
    MERGE_ORDER,
    PatchMerging,
    SwinBlock,
    attention,
    attention_by_the_formula,
    bias_rows,
    clip_window,
    may_see,
    offsets,
    wrapped_regions,
)


def test_a_window_is_no_larger_than_the_grid_and_does_not_shift_where_it_covers_it() -> None:
    assert clip_window((6, 7, 20), (7, 7, 7), (3, 3, 3)) == ((6, 7, 7), (0, 0, 3))


def test_each_pair_of_tokens_reads_the_row_of_its_own_offset() -> None:
    window, table = (2, 3, 2), (4, 3, 2)
    places = list(product(*map(range, window)))
    rows = offsets(window, table)
    all_offsets = list(product(*(range(1 - w, w) for w in table)))
    for (i, a), (j, b) in product(enumerate(places), repeat=2):
        assert all_offsets[rows[i, j]] == tuple(p - q for p, q in zip(a, b))


def test_sliced_bias_of_a_clipped_window_reads_other_rows_than_the_true_offsets() -> None:
    """The quirk of the published weights at 96^3: 98 % of the pairs of a 6^3 window."""
    wrong = bias_rows((6, 6, 6), (7, 7, 7), "sliced") != bias_rows((6, 6, 6), (7, 7, 7), "rebuilt")
    assert 0.975 < wrong.float().mean() < 0.985


def test_the_shift_mask_separates_the_tokens_that_the_roll_brought_together() -> None:
    """Brute force: label the regions of an unrolled grid, roll the labels, compare inside each window."""
    grid, window, shift = (6, 4, 8), (3, 4, 4), (1, 0, 2)
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    rolled = torch.roll(place, [-s for s in shift], dims=(1, 2, 3))
    windows = rearrange(
        rolled, "axes (nd wd) (nh wh) (nw ww) -> nd nh nw (wd wh ww) axes", wd=window[0], wh=window[1], ww=window[2]
    )
    for (d, h, w), wraps in wrapped_regions(shift):
        mask = may_see(window, wraps)
        for tokens in windows[d, h, w].reshape(-1, *windows.shape[-2:]):
            # Neighbours in the volume span less than a window; wrapped ones are a whole grid apart.
            apart = (tokens[:, None] - tokens[None]).abs() >= torch.tensor(window)
            together = ~apart.any(-1)
            assert torch.equal(together, torch.ones_like(together) if mask is None else mask)


def test_every_window_belongs_to_exactly_one_region() -> None:
    seen = torch.zeros(3, 4, 2, dtype=torch.int64)
    for (d, h, w), _ in wrapped_regions((1, 0, 2)):
        seen[d, h, w] += 1
    assert (seen == 1).all()


def test_fused_attention_equals_the_formula() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 24, 2, 12, 8)
    bias = torch.randn(2, 12, 12)
    for mask in (None, may_see((3, 2, 2), (1, 0, 1))):
        found = attention(q, k, v, bias, mask)
        assert torch.allclose(found, attention_by_the_formula(q, k, v, bias, mask), atol=1e-5)


def test_cached_indices_serve_training_whatever_mode_first_asked_for_them() -> None:
    block = SwinBlock(8, 2, window=(3, 5, 3), shift=(1, 0, 1))  # a window of this test alone
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
    ours.load_state_dict({k.replace("relative_position_bias_table", "bias_table"): v for k, v in state.items()})
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
