"""dae/data/preprocess.py: each intensity recipe against its closed form, resampling against a ramp."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dae.config import InputError, PretrainConfig
from dae.data.datalist import Item
from dae.data.nifti import Volume
from dae.data.preprocess import (
    Recipe,
    percentile,
    prepare,
    resample,
    some_foreground,
    window,
    zscore,
    zscore_of_nonzero,
)

Saved = Callable[..., Item]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A file and the item that names it."""

    def save(data: np.ndarray, *intensity: str, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Item:
        nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([*spacing, 1.0])), tmp_path / "a.nii")
        return Item((tmp_path / "a.nii",), ("any",) * len(intensity), intensity, "s")

    return save


# --- intensity


def test_the_ct_window_goes_to_0_and_1_and_nothing_beyond() -> None:
    hu = np.array([-2000, -1000, -500, 0, 750, 1000, 3000], dtype=np.float32)
    assert window(hu, -1000, 1000).tolist() == [0, 0, 0.25, 0.5, 0.875, 1, 1]
    assert window(hu, 0, 1500).tolist() == [0, 0, 0, 0, 0.5, np.float32(2 / 3), 1]


def test_zscores_by_hand_take_mean_and_population_std_of_the_nonzero_voxels() -> None:
    """1 and 3 have mean 2 and std 1 (the sample's would be 1.41). The authors' code lets zeros stay 0."""
    x = np.array([0, 1, 3, 0], dtype=np.float32)
    assert zscore(x).tolist() == [-2, -1, 1, -2]
    assert zscore_of_nonzero(x).tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize("normalise", [zscore, zscore_of_nonzero])
def test_a_zscored_volume_has_mean_0_and_std_1_where_it_was_not_zero(normalise: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(1e4, 3, (10, 11, 12)) * (rng.random((10, 11, 12)) > 0.4)).astype(np.float32)
    found = normalise(x)
    assert found.dtype == np.float32 and len(set(found[x == 0].tolist())) == 1
    assert found[x != 0].mean() == pytest.approx(0, abs=1e-5) and found[x != 0].std() == pytest.approx(1, abs=1e-5)


def test_percentiles_by_hand() -> None:
    """Of 0, 1, ..., 2000 the 0.05th percentile is 1 and the 99.95th 1999."""
    x = np.random.default_rng(0).permutation(2001).astype(np.float32)
    assert np.allclose(percentile(x), np.clip((x - 1) / 1998, 0, 1), atol=1e-6)
    assert (percentile(x).min(), percentile(x).max()) == (0, 1)


X = np.random.default_rng(1).uniform(100, 900, (6, 7, 8)).astype(np.float32)
X[0] = 0


@pytest.mark.parametrize(
    "intensity, mr_intensity, expected",
    [
        ("window", "percentile", window(X, -200, 600)),
        ("mr", "zscore", zscore(X)), ("mr", "nonzero", zscore_of_nonzero(X)), ("mr", "percentile", percentile(X)),
        ("zscore", "percentile", zscore(X)), ("nonzero", "zscore", zscore_of_nonzero(X)),
        ("percentile", "zscore", percentile(X)),
    ],
)  # fmt: skip
def test_the_item_says_how_and_the_recipe_what_mr_means(
    intensity: str, mr_intensity: str, expected: np.ndarray, saved: Saved
) -> None:
    recipe = Recipe(ct_window=(-200.0, 600.0), mr_intensity=mr_intensity)
    assert np.array_equal(prepare(saved(X, intensity), recipe).data[0], expected)


def test_channels_are_normalised_one_by_one(saved: Saved) -> None:
    two = np.stack([X, 5 * X], axis=-1)
    assert np.allclose(prepare(saved(two, "mr"), Recipe()).data, zscore(X), atol=1e-5)  # one name for all of them
    found = prepare(saved(two, "window", "mr"), Recipe()).data
    assert np.array_equal(found[0], window(X, -1000, 1000)) and np.allclose(found[1], zscore(X), atol=1e-5)


def test_a_count_of_channels_that_is_not_the_lists_is_refused(saved: Saved) -> None:
    with pytest.raises(InputError, match=r"a\.nii: 2 channels, but the list names 3"):
        prepare(saved(np.stack([X, X], axis=-1), "mr", "mr", "mr"), Recipe())


def test_the_background_is_the_normalised_darkest_voxel_of_each_channel(saved: Saved) -> None:
    whole = X + 50  # nowhere zero
    channels = np.stack([X - 1200, X, X, whole], axis=-1)
    found = prepare(saved(channels, "window", "zscore", "nonzero", "zscore"), Recipe()).background
    inside = X[X != 0]
    assert found[0] == 0  # air
    assert found[1] == pytest.approx(-inside.mean() / inside.std(), abs=1e-4)
    assert found[2] == 0  # the zeros, wherever 0 lies among the z-scores
    assert found[3] == pytest.approx((50 - whole.mean()) / whole.std(), abs=1e-4)


# --- spacing


def test_resampling_a_ramp_gives_the_ramp_at_the_new_voxel_centres() -> None:
    """Centres lie at (i + 1/2) spacings from the outer face; beyond the outermost old centres the value stays."""
    old, sizes, new = (2.0, 3.0, 1.0), (8, 6, 10), (1.0, 4.5, 2.0)
    places = [(np.arange(n) + 0.5) * step for n, step in zip(sizes, old)]
    ramp = sum(np.meshgrid(3 * places[0], -2 * places[1], 7 * places[2], indexing="ij"))
    found = resample(Volume(np.stack([ramp, -ramp]).astype(np.float32), np.diag([*old, 1.0])), new)

    assert found.shape == (2, 16, 4, 5)  # 16, 18 and 10 mm
    asked = [(np.arange(n) + 0.5) * step for n, step in zip(found.shape[1:], new)]
    held = [np.clip(at, place[0], place[-1]) for at, place in zip(asked, places)]
    expected = sum(np.meshgrid(3 * held[0], -2 * held[1], 7 * held[2], indexing="ij"))
    assert np.allclose(found[0], expected, atol=1e-4) and np.allclose(found[1], -expected, atol=1e-4)


@pytest.mark.parametrize("new, size", [((1, 1, 1), (6, 14, 24)), ((3, 3, 3), (2, 5, 8)), ((1, 2, 3.5), (6, 7, 7))])
def test_a_prepared_volume_has_the_spacing_asked_for(
    new: tuple[float, ...], size: tuple[int, ...], saved: Saved
) -> None:
    """Of 6 x 14 x 24 mm; sizes are rounded."""
    item = saved(X, "mr", spacing=(1.0, 2.0, 3.0))
    found = prepare(item, Recipe(spacing=new))
    assert found.data.shape == (1, *size) and found.spacing == new
    assert prepare(item, Recipe()).spacing == (1, 2, 3) and prepare(item, Recipe()).data.shape == (1, 6, 7, 8)


def test_normalisation_follows_resampling(saved: Saved) -> None:
    """The mean of two neighbours' z-scores has not the std 1 that the z-score of their mean has."""
    found = prepare(saved(X[1:5], "mr"), Recipe(spacing=(2.0, 2.0, 2.0))).data
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_a_spacing_that_leaves_no_voxels_is_refused_by_the_files_name(saved: Saved) -> None:
    with pytest.raises(InputError, match=r"a\.nii.*spacing"):
        prepare(saved(X, "mr"), Recipe(spacing=(1.0, 1.0, 20.0)))


@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -2.0)])
def test_a_spacing_that_is_none_is_refused_by_its_flag(values: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="--spacing"):
        Recipe.of(PretrainConfig(spacing=values))


@pytest.mark.parametrize("values", [(1.0,), (400.0, -160.0), (5.0, 5.0), (-160.0, 0.0, 240.0)])
def test_a_window_that_is_none_is_refused_by_its_flag(values: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="--ct-window"):
        Recipe.of(PretrainConfig(ct_window=values))


def test_the_recipe_is_that_of_the_flags() -> None:
    config = PretrainConfig(spacing=(1, 1, 2), ct_window=(-160, 240), mr_intensity="percentile")
    assert Recipe.of(config) == Recipe((1, 1, 2), (-160, 240), "percentile")


# --- foreground


def test_foreground_is_brighter_than_the_mean(saved: Saved) -> None:
    brighter = np.argwhere(np.greater(X, X.mean()))
    assert np.array_equal(some_foreground(X), brighter)  # few enough: all of them
    assert np.array_equal(prepare(saved(X, "mr"), Recipe()).foreground, brighter)


def test_of_much_foreground_an_even_sample_is_kept() -> None:
    x = np.random.default_rng(2).normal(size=(30, 30, 30)).astype(np.float32)
    found = some_foreground(x, count=2000)
    assert found.shape == (2000, 3) and len(np.unique(found, axis=0)) == 2000
    assert (x[tuple(found.T)] > x.mean()).all()
    assert np.abs(found.mean(axis=0) - 14.5).max() < 4 * 30 / 12**0.5 / 2000**0.5  # four standard errors
    assert np.array_equal(found, some_foreground(x, count=2000))
