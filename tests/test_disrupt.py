"""dae/pretext/disrupt.py: equations by hand; shares, independence and repeatability of masks."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from dae.pretext import disrupt
from dae.pretext.disrupt import (
    check_cubes,
    downsample,
    draw_channels,
    draw_cubes,
    draw_noise,
    masked_share,
    random_order,
    sample_generators,
)


def generators(*seeds: int) -> list[Generator]:
    return sample_generators(seeds, torch.device("cpu"))


def line(values: Tensor) -> Tensor:
    """A volume that varies along its first axis alone: (n,) -> (1, 1, n, 8, 8)."""
    return values.reshape(1, 1, -1, 1, 1).expand(1, 1, len(values), 8, 8)


def along_first_axis(x: Tensor) -> Tensor:
    return x[0, 0, :, 0, 0]


def add_noise(x: Tensor, *seeds: int, std: float, mean: float = 0.0) -> Tensor:
    noise = draw_noise(x.shape[1:], generators(*seeds))
    return disrupt.add_noise(x, noise, std=std, mean=mean)


def local_mask(tokens: Tensor, *seeds: int, **options: Any) -> Tensor:
    mask = draw_channels(tokens.shape[1], tokens.shape[2:], generators(*seeds), **options)
    return disrupt.local_mask(tokens, mask)


# --- eq. 1


def test_eq_1_adds_noise_of_the_given_mean_and_standard_deviation() -> None:
    x = torch.full((2, 1, 40, 40, 40), 3.0)
    noise = add_noise(x, 1, 2, std=0.1, mean=0.5) - x
    assert noise.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert noise.std().item() == pytest.approx(0.1, rel=0.01)


def test_eq_1_leaves_the_clean_volume_as_it_is() -> None:
    x = torch.zeros(1, 1, 4, 4, 4)
    add_noise(x, 1, std=1.0)
    assert not x.any()


def test_a_sample_meets_the_same_noise_in_any_batch_and_another_sample_other_noise() -> None:
    x = torch.zeros(2, 1, 4, 4, 4)
    in_batch = add_noise(x, 5, 6, std=1.0)
    alone = add_noise(x[:1], 6, std=1.0)
    assert torch.equal(in_batch[1], alone[0])
    assert not torch.equal(in_batch[0], in_batch[1])


# --- eq. 2


def test_eq_2_by_hand_on_a_line_of_eight() -> None:
    """Factor 4 reads between voxels 1 and 2, and 5 and 6; the way up interpolates those means."""
    x = line(torch.tensor([0.0, 1, 3, 9, 9, 4, 6, 2]))
    low, high = 2.0, 5.0
    weights = torch.tensor([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1])
    by_hand = low + (high - low) * weights
    assert torch.allclose(downsample(x, 4)[0, 0, :, 3, 5], by_hand, atol=1e-6)


def test_eq_2_keeps_a_ramp_but_for_its_ends_and_the_grid_where_it_does_not_divide() -> None:
    ramp = torch.arange(30.0).reshape(1, 1, 30, 1, 1).expand(1, 1, 30, 10, 7)
    x_hat = downsample(ramp, 2)
    assert x_hat.shape == ramp.shape
    assert torch.allclose(x_hat[..., 1:-1, :, :], ramp[..., 1:-1, :, :], atol=1e-5)


@pytest.mark.parametrize(
    "mode, values, by_hand",
    [
        ("nearest", [0.0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 4, 4, 4, 4]),
        ("area", [0.0, 1, 3, 8, 9, 4, 6, 1], [3, 3, 3, 3, 5, 5, 5, 5]),
    ],
)
def test_other_modes_make_blocks_of_one_voxels_value_or_of_their_mean(
    mode: str, values: list[float], by_hand: list[float]
) -> None:
    x_hat = downsample(line(torch.tensor(values)), 4, mode)
    assert along_first_axis(x_hat).tolist() == by_hand


@pytest.mark.parametrize("mode", ["nearest", "area"])
@pytest.mark.parametrize(
    "n, factor, values", [(17, 3, 6), (16, 3, 5), (8, 4, 2), (2, 8, 1), (1, 4, 1)]
)
def test_the_coarse_grid_has_the_nearest_number_of_voxels_and_at_least_one(
    n: int, factor: float, values: int, mode: str
) -> None:
    x_hat = downsample(line(torch.arange(float(n))), factor, mode)
    assert len(along_first_axis(x_hat).unique()) == values


# --- masks


@pytest.mark.parametrize("dim", [0, 1])
def test_a_random_order_is_a_permutation_of_its_own_for_every_index_of_the_other_axis(
    dim: int,
) -> None:
    order = random_order((6, 6), dim, generators(1)[0])
    numbers = torch.arange(6)
    for permutation in order.movedim(dim, 1):
        assert torch.equal(permutation.sort().values, numbers)
    assert len(order.movedim(dim, 1).unique(dim=0)) > 1


@pytest.mark.parametrize("ratio, zeroed", [(0.6, 29), (0.4, 19), (0.0, 0), (0.99, 47)])
def test_masked_channels_are_zero_and_their_share_is_r(ratio: float, zeroed: int) -> None:
    """Of 48 channels r = 60 % is 28.8: 29, the nearest (the authors cut it to 28); never all."""
    tokens = torch.rand(3, 48, 2, 2, 2) + 1
    masked = local_mask(tokens, 1, 2, 3, ratio=(ratio,))
    zero_channels = (masked == 0).all(dim=(2, 3, 4))
    assert zero_channels.sum(1).tolist() == [zeroed] * 3
    assert torch.equal(masked[~zero_channels], tokens[~zero_channels])


def test_local_masking_draws_channels_for_each_sample_and_repeats_by_seed() -> None:
    masked = local_mask(torch.ones(3, 32, 2, 2, 2), 1, 2, 1, ratio=(0.5,))
    assert torch.equal(masked[0], masked[2])
    assert not torch.equal(masked[0], masked[1])


def test_scope_batch_takes_one_set_of_channels() -> None:
    masked = local_mask(torch.ones(2, 32, 3, 3, 3), 1, 2, ratio=(0.5,), scope="batch")
    assert torch.equal(masked[0], masked[1])


def test_scope_token_takes_a_set_of_channels_for_each_token() -> None:
    masked = local_mask(torch.ones(2, 32, 3, 3, 3), 1, 2, ratio=(0.5,), scope="token")
    assert ((masked == 0).sum(1) == 16).all()
    sets_of_channels = masked[0].flatten(1).T.unique(dim=0)
    assert len(sets_of_channels) == 27


def test_planes_are_masked_on_request_as_the_authors_layout_bug_does() -> None:
    masked = local_mask(torch.ones(2, 4, 10, 3, 3), 1, 2, ratio=(0.6,), along="planes")
    assert (masked == 0).all(dim=(1, 3, 4)).sum(1).tolist() == [6, 6]
    assert (masked != 0).all(dim=(1, 3, 4)).sum(1).tolist() == [4, 4]


def test_a_range_of_ratios_is_drawn_evenly_between_its_ends() -> None:
    shares = []
    for generator in generators(*range(400)):
        masked = masked_share((1000,), 0, (0.2, 0.6), generator)
        shares.append(masked.float().mean().item())
    assert 0.2 <= min(shares) < 0.22
    assert 0.58 < max(shares) <= 0.6
    assert sum(shares) / 400 == pytest.approx(0.4, abs=0.02)


def test_a_ratio_of_thousand_entries_is_exact() -> None:
    assert masked_share((1000,), 0, (0.6,), generators(1)[0]).sum() == 600


@pytest.mark.parametrize("grid", [(4, 4, 4), (8, 8, 8), (5, 9, 7), (2, 2, 16)])
@pytest.mark.parametrize("ratio", [(0.0,), (0.02,), (0.3,), (0.6,), (0.0, 0.6), (0.0, 0.04)])
@pytest.mark.parametrize("block", [1, 3, 4, 8])
def test_blocks_of_which_none_is_ever_masked_are_refused(
    grid: tuple[int, ...], ratio: tuple[float, ...], block: int
) -> None:
    most = (ratio[-1],)
    masks_some = bool(draw_cubes(grid, generators(1), ratio=most, block=block).any())
    if masks_some or ratio[-1] == 0:
        check_cubes(grid, ratio=ratio, block=block)
        return
    with pytest.raises(ValueError, match=f"^--mask-block {2 * block}: a crop of {2 * grid[0]} "):
        check_cubes(grid, ratio=ratio, block=block, voxels=2)


def test_gradients_flow_through_the_channels_that_are_left() -> None:
    tokens = torch.ones(1, 10, 2, 2, 2, requires_grad=True)
    masked = local_mask(tokens, 3, ratio=(0.6,))
    masked.sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad != 0, masked != 0)


@pytest.mark.parametrize("grid", [(6, 6, 6), (5, 4, 3)])
def test_token_masking_replaces_whole_tokens_in_cubes(grid: tuple[int, int, int]) -> None:
    mask = draw_cubes(grid, generators(1, 2), ratio=(0.5,), block=2)
    masked = disrupt.token_mask(torch.zeros(2, 2, *grid), mask, torch.tensor([7.0, 8.0]))
    replaced = masked[:, 0] == 7
    assert torch.equal(replaced, masked[:, 1] == 8)
    assert not torch.equal(replaced[0], replaced[1])

    corners = list(product(*(range(0, n, 2) for n in grid)))
    replaced_cubes = 0
    for d, h, w in corners:
        cube = replaced[0, d : d + 2, h : h + 2, w : w + 2]
        assert cube.all() or not cube.any()
        replaced_cubes += bool(cube.any())
    assert replaced_cubes == round(0.5 * len(corners))
