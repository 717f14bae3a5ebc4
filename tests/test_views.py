"""dae/pretext/views.py: parts, flips, turns and cut-outs against NumPy, SciPy and cases by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Generator, Tensor

from dae.pretext.disrupt import sample_generators
from dae.pretext.views import (
    TURNS,
    Augmentation,
    augment,
    both,
    check_turns,
    cut_out,
    draw_augmentation,
    draw_turns,
    pairs,
    resized_part,
    stack_views,
    turn,
)

SHAPE = (3, 2, 6, 7, 9)  # b c d h w, odd sizes
X = torch.randn(SHAPE, generator=Generator().manual_seed(0))
CUBES = torch.randn(4, 1, 5, 5, 5, generator=Generator().manual_seed(1))
CPU = torch.device("cpu")


def nothing(batch: int = 3) -> Augmentation:
    """The whole crop as it is."""
    zeros = torch.zeros(batch)
    return Augmentation(
        share=torch.ones(batch),
        position=torch.full((batch, 3), 0.5),
        flip=torch.zeros(batch, 3, dtype=torch.bool),
        brightness=zeros,
        contrast=zeros,
        noise=torch.zeros(SHAPE[:1] + SHAPE[1:])[:batch],
    )


# --- augmentation


def test_an_augmentation_of_nothing_is_the_crop() -> None:
    assert torch.allclose(augment(X, nothing()), X, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_is_along_its_own_axis(axis: int) -> None:
    flip = torch.zeros(3, 3, dtype=torch.bool)
    flip[:, axis] = True
    flipped = augment(X, nothing()._replace(flip=flip))
    assert torch.allclose(flipped, X.flip(axis + 2), atol=1e-5)


def test_a_part_is_what_scipy_reads_at_its_place() -> None:
    """Voxel i of n is at (i + 1/2) / n of the part; the part starts at position x (1 - side)."""
    share = torch.tensor([0.125, 0.3, 0.9])
    position = torch.tensor([[0.0, 1.0, 0.3], [0.5, 0.2, 1.0], [0.9, 0.0, 0.0]])
    flip = torch.tensor([[False] * 3, [True, False, True], [False, True, False]])
    found = resized_part(X, share, position, flip)
    for n in range(3):
        side = float(share[n]) ** (1 / 3)
        axes = []
        for axis, size in enumerate(SHAPE[2:]):
            along = (np.arange(size) + 0.5) / size
            if flip[n, axis]:
                along = 1 - along
            start = float(position[n, axis]) * (1 - side)
            axes.append((start + along * side) * size - 0.5)
        grid = np.meshgrid(*axes, indexing="ij")
        for c in range(2):
            expected = map_coordinates(X[n, c].double().numpy(), grid, order=1, mode="nearest")
            assert np.allclose(found[n, c], expected, atol=1e-4)


def test_brightness_and_contrast_are_in_units_of_the_part_by_hand() -> None:
    """Half of the largest contrast is a fifth more; the brightness adds .4 standard deviations."""
    drawn = nothing()._replace(contrast=torch.full((3,), 0.5), brightness=torch.ones(3))
    seen = augment(X, drawn)
    for n in range(3):
        for c in range(2):
            x = X[n, c].double()
            mean, std = x.mean(), x.std(correction=0)
            assert torch.allclose(
                seen[n, c].double(), mean + 1.2 * (x - mean) + 0.4 * std, atol=1e-4
            )


def test_noise_has_a_tenth_of_the_crops_standard_deviation() -> None:
    noise = torch.randn(SHAPE, generator=Generator().manual_seed(3))
    added = augment(5 * X, nothing()._replace(noise=noise)) - 5 * X
    unit = (5 * X).std(dim=(2, 3, 4), correction=0)[:, :, None, None, None]
    assert torch.allclose(added, 0.1 * unit * noise, atol=1e-4)


def test_parts_have_8_to_100_percent_of_the_volume_and_flips_are_even() -> None:
    drawn = draw_augmentation((1, 1, 1, 1), sample_generators(range(2000), CPU))
    assert 0.08 <= float(drawn.share.min()) < 0.1 and 0.98 < float(drawn.share.max()) <= 1
    assert float(drawn.share.mean()) == pytest.approx(0.54, abs=0.02)
    assert drawn.flip.float().mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.05)
    assert float(drawn.contrast.min()) < -0.98 and float(drawn.brightness.max()) > 0.98


def test_what_is_drawn_for_a_sample_is_its_own_seeds_alone() -> None:
    together = draw_augmentation((1, 4, 4, 4), sample_generators([5, 6, 7], CPU))
    alone = draw_augmentation((1, 4, 4, 4), sample_generators([6], CPU))
    for value, own in zip(together, alone):
        assert torch.equal(value[1:2], own)


# --- turns


@pytest.mark.parametrize("name", TURNS)
def test_a_turn_is_numpys_by_its_class(name: str) -> None:
    turns = TURNS[name]
    for n, (k, plane) in enumerate(turns):
        turned = turn(CUBES, torch.full((4,), n), turns)
        assert np.array_equal(turned, np.rot90(CUBES.numpy(), k, plane))


def test_each_sample_is_turned_by_its_own_class() -> None:
    turned = turn(CUBES, torch.tensor([3, 0, 2, 1]), TURNS["axial"])
    for sample, before, k in zip(turned, CUBES, (3, 0, 2, 1)):
        assert torch.equal(sample, torch.rot90(before, k, (1, 2)))


def test_an_axial_turn_leaves_every_axial_plane_where_it_is() -> None:
    """By hand: a point at d 0, h 1, w 4 goes to d 3, h 0 at the same height."""
    point = torch.zeros(1, 1, 5, 5, 5)
    point[0, 0, 0, 1, 4] = 1
    turned = turn(point, torch.tensor([1]), TURNS["axial"])
    assert turned.nonzero().tolist() == [[0, 0, 3, 0, 4]]


@pytest.mark.parametrize("name, classes", [("axial", 4), ("all", 10)])
def test_no_two_classes_are_the_same_turn(name: str, classes: int) -> None:
    """A class that is another one's turn could not be told from it."""
    seen = [turn(CUBES[:1], torch.tensor([n]), TURNS[name]) for n in range(len(TURNS[name]))]
    different = {tuple(view.flatten().tolist()) for view in seen}
    assert len(seen) == len(different) == classes


def test_all_classes_are_drawn_alike() -> None:
    drawn = draw_turns(4, sample_generators(range(2000), CPU))
    assert torch.bincount(drawn).tolist() == pytest.approx([500] * 4, abs=70)


@pytest.mark.parametrize(
    "crop, name, fits",
    [
        ((8, 8, 16), "axial", True),
        ((8, 16, 8), "axial", False),
        ((8, 8, 16), "all", False),
        ((8, 8, 8), "all", True),
    ],
)
def test_a_crop_must_keep_its_shape_when_it_is_turned(
    crop: tuple[int, ...], name: str, fits: bool
) -> None:
    if fits:
        check_turns(crop, TURNS[name])
        return
    with pytest.raises(ValueError, match="--crop " + " ".join(map(str, crop))):
        check_turns(crop, TURNS[name])


# --- cut-outs and pairs


def test_what_is_cut_out_is_0_and_the_rest_is_untouched() -> None:
    mask = torch.zeros(3, 1, *SHAPE[2:], dtype=torch.bool)
    mask[1, 0, :3, 2:4, 5] = True
    seen = cut_out(X, mask)
    holes = mask.expand_as(X)
    assert not seen[holes].any() and torch.equal(seen[~holes], X[~holes])


def test_pairs_join_the_two_views_of_each_sample() -> None:
    features = torch.arange(12.0).reshape(6, 2)  # first views 0 1 2, second views 3 4 5
    joined: Tensor = pairs(features)
    assert joined.tolist() == [[[n * 2, n * 2 + 1], [n * 2 + 6, n * 2 + 7]] for n in range(3)]
    assert torch.equal(both(X), stack_views(X, X))
