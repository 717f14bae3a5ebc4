"""dae/pretext/disrupt.py: each equation against a case worked out by hand; shares, independence, repeatability."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dae.pretext import disrupt
from dae.pretext.disrupt import (
    downsample,
    draw_channels,
    draw_cubes,
    draw_noise,
    generators,
    masked_share,
)

CPU = torch.device("cpu")


def draw(*seeds: int) -> list[torch.Generator]:
    return generators(seeds, CPU)


def add_noise(x: Tensor, draw: list[torch.Generator], **options: float) -> Tensor:
    return disrupt.add_noise(x, draw_noise(x.shape[1:], draw), **options)  # type: ignore[arg-type]


def local_mask(tokens: Tensor, draw: list[torch.Generator], **options: Any) -> Tensor:
    return disrupt.local_mask(
        tokens, draw_channels(tokens.shape[1], tokens.shape[2:], draw, **options)
    )


def test_eq_1_adds_noise_of_the_given_mean_and_standard_deviation() -> None:
    x = torch.full((2, 1, 40, 40, 40), 3.0)
    noise = add_noise(x, draw(1, 2), std=0.1, mean=0.5) - x
    assert noise.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert noise.std().item() == pytest.approx(0.1, rel=0.01)


def test_eq_1_leaves_the_clean_volume_as_it_is() -> None:
    x = torch.zeros(1, 1, 4, 4, 4)
    add_noise(x, draw(1), std=1.0)
    assert not x.any()


def test_a_sample_meets_the_same_noise_in_any_batch_and_another_sample_other_noise() -> None:
    x = torch.zeros(2, 1, 4, 4, 4)
    together, alone = add_noise(x, draw(5, 6), std=1.0), add_noise(x[:1], draw(6), std=1.0)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_eq_2_by_hand_on_a_line_of_eight() -> None:
    """Factor 4 reads between voxels 1 and 2, and 5 and 6; the way up interpolates between those two means."""
    line = torch.tensor([0.0, 1, 3, 9, 9, 4, 6, 2])
    x = line.reshape(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    low, high = 2.0, 5.0
    weights = torch.tensor([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1])
    by_hand = low + (high - low) * weights
    assert torch.allclose(downsample(x, 4)[0, 0, :, 3, 5], by_hand, atol=1e-6)


def test_eq_2_keeps_a_ramp_but_for_its_ends_and_the_grid_where_it_does_not_divide() -> None:
    ramp = torch.arange(30.0).reshape(1, 1, 30, 1, 1).expand(1, 1, 30, 10, 7)
    found = downsample(ramp, 2)
    assert found.shape == ramp.shape
    assert torch.allclose(found[..., 1:-1, :, :], ramp[..., 1:-1, :, :], atol=1e-5)


def test_nearest_downsampling_makes_blocks_of_one_voxels_value() -> None:
    x = torch.arange(8.0).reshape(1, 1, 8, 1, 1).expand(1, 1, 8, 4, 4)
    assert downsample(x, 4, "nearest")[0, 0, :, 0, 0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4]


def test_area_downsampling_makes_blocks_of_their_mean() -> None:
    x = torch.tensor([0.0, 1, 3, 8, 9, 4, 6, 1]).reshape(1, 1, 8, 1, 1).expand(1, 1, 8, 4, 4)
    assert downsample(x, 4, "area")[0, 0, :, 0, 0].tolist() == [3, 3, 3, 3, 5, 5, 5, 5]


@pytest.mark.parametrize(
    "n, factor, values", [(17, 3, 6), (16, 3, 5), (8, 4, 2), (2, 8, 1), (1, 4, 1)]
)
def test_the_coarse_grid_has_the_nearest_number_of_voxels_and_at_least_one(
    n: int, factor: float, values: int
) -> None:
    x = torch.arange(float(n)).reshape(1, 1, n, 1, 1).expand(1, 1, n, 8, 8)
    for mode in ("nearest", "area"):
        assert len(downsample(x, factor, mode)[0, 0, :, 0, 0].unique()) == values


@pytest.mark.parametrize("ratio, zeroed", [(0.6, 29), (0.4, 19), (0.0, 0), (0.99, 47)])
def test_masked_channels_are_zero_and_their_share_is_r(ratio: float, zeroed: int) -> None:
    """Of 48 channels r = 60 % is 28.8: 29, the nearest (the authors cut it to 28); never all of them."""
    tokens = torch.rand(3, 48, 2, 2, 2) + 1
    masked = local_mask(tokens, draw(1, 2, 3), ratio=(ratio,))
    dark = (masked == 0).all(dim=(2, 3, 4))
    assert dark.sum(1).tolist() == [zeroed] * 3
    assert torch.equal(masked[~dark], tokens[~dark])


def test_local_masking_draws_channels_for_each_sample_and_repeats_by_seed() -> None:
    tokens = torch.ones(3, 32, 2, 2, 2)
    masked = local_mask(tokens, draw(1, 2, 1), ratio=(0.5,))
    assert torch.equal(masked[0], masked[2])
    assert not torch.equal(masked[0], masked[1])


def test_scope_batch_takes_one_set_and_scope_token_one_for_each_token() -> None:
    tokens = torch.ones(2, 32, 3, 3, 3)
    batch = local_mask(tokens, draw(1, 2), ratio=(0.5,), scope="batch")
    assert torch.equal(batch[0], batch[1])
    token = local_mask(tokens, draw(1, 2), ratio=(0.5,), scope="token")
    assert ((token == 0).sum(1) == 16).all()
    assert len({tuple(t.tolist()) for t in token[0].flatten(1).T}) == 27


def test_planes_are_masked_on_request_as_the_authors_layout_bug_does() -> None:
    masked = local_mask(torch.ones(2, 4, 10, 3, 3), draw(1, 2), ratio=(0.6,), along="planes")
    dark = (masked == 0).all(dim=(1, 3, 4))
    assert dark.sum(1).tolist() == [6, 6]
    assert (masked != 0).any(dim=(1, 3, 4)).sum(1).tolist() == [4, 4]


def test_a_range_of_ratios_is_drawn_evenly_between_its_ends() -> None:
    masked = [masked_share((1000,), 0, (0.2, 0.6), g).float().mean() for g in draw(*range(400))]
    drawn = torch.stack(masked)
    assert 0.2 <= drawn.min() < 0.22 and 0.58 < drawn.max() <= 0.6
    assert drawn.mean().item() == pytest.approx(0.4, abs=0.02)
    assert masked_share((1000,), 0, (0.6,), draw(1)[0]).sum() == 600


def test_gradients_flow_through_the_channels_that_are_left() -> None:
    tokens = torch.ones(1, 10, 2, 2, 2, requires_grad=True)
    masked = local_mask(tokens, draw(3), ratio=(0.6,))
    masked.sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad != 0, masked != 0)


@pytest.mark.parametrize("grid", [(6, 6, 6), (5, 4, 3)])
def test_token_masking_replaces_whole_tokens_in_cubes(grid: tuple[int, int, int]) -> None:
    mask_token = torch.tensor([7.0, 8.0])
    cubes = draw_cubes(grid, draw(1, 2), ratio=(0.5,), block=2)
    masked = disrupt.token_mask(torch.zeros(2, 2, *grid), cubes, mask_token)
    hidden = masked[:, 0] == 7
    assert torch.equal(hidden, masked[:, 1] == 8)
    corners = list(product(*(range(0, n, 2) for n in grid)))
    cubes = [hidden[0, d : d + 2, h : h + 2, w : w + 2] for d, h, w in corners]
    assert all(cube.all() or not cube.any() for cube in cubes)
    assert sum(bool(cube.any()) for cube in cubes) == round(0.5 * len(corners))
    assert not torch.equal(hidden[0], hidden[1])
