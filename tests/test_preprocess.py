"""dae/data/preprocess.py: intensities against closed forms, resampling against a ramp and scipy."""

import os
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dae.config.pretrain import PretrainConfig
from dae.data import nifti
from dae.data.augment import labelled_crop
from dae.data.cache import Cached, cached
from dae.data.datalist import INTENSITIES, Item, load
from dae.data.nifti import Volume, read_image
from dae.data.preprocess import (
    NORMALISERS,
    Recipe,
    bright_voxels,
    labelled_voxels,
    normalise,
    percentile,
    prepare,
    resample,
    resample_labels,
    window,
    zscore,
    zscore_of_nonzero,
)
from dae.demo.phantom import write_phantoms
from dae.errors import InputError

Save = Callable[..., Item]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a file, and one of its label where there is one; the item that names them."""

    def save(
        data: np.ndarray,
        *intensity: str,
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        label: np.ndarray | None = None,
    ) -> Item:
        affine = np.diag([*spacing, 1.0])
        image_path = tmp_path / "a.nii"
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine), image_path)

        label_path = None
        if label is not None:
            label_path = tmp_path / "label.nii"
            nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), label_path)

        modalities = ("any",) * len(intensity)
        return Item((image_path,), modalities, intensity, "s", label=label_path)

    return save


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each warning is said once in a process; here, once in a test."""
    monkeypatch.setattr(nifti, "said", set())


# --- intensity ------------------------------------------------------------------------------------


def test_the_ct_window_goes_to_0_and_1_and_nothing_beyond() -> None:
    hu = np.array([-2000, -1000, -500, 0, 750, 1000, 3000], dtype=np.float32)
    assert window(hu, -1000, 1000).tolist() == [0, 0, 0.25, 0.5, 0.875, 1, 1]
    assert window(hu, 0, 1500).tolist() == [0, 0, 0, 0, 0.5, np.float32(2 / 3), 1]


def test_zscores_by_hand_take_mean_and_population_std_of_the_nonzero_voxels() -> None:
    """1 and 3 have mean 2 and std 1 (the sample's is 1.41). In the authors' code zeros stay 0."""
    x = np.array([0, 1, 3, 0], dtype=np.float32)
    assert zscore(x).tolist() == [-2, -1, 1, -2]
    assert zscore_of_nonzero(x).tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize("normaliser", [zscore, zscore_of_nonzero])
def test_a_zscored_volume_has_mean_0_and_std_1_where_it_was_not_zero(
    normaliser: Callable[[np.ndarray], np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 3, (10, 11, 12)) * (rng.random((10, 11, 12)) > 0.4)
    y = normaliser(x.astype(np.float32))
    assert y.dtype == np.float32
    assert y[x != 0].mean() == pytest.approx(0, abs=1e-5)
    assert y[x != 0].std() == pytest.approx(1, abs=1e-5)
    assert len(np.unique(y[x == 0])) == 1


def test_percentiles_by_hand() -> None:
    """Of 0, 1, ..., 2000 the 0.05th percentile is 1 and the 99.95th 1999."""
    x = np.random.default_rng(0).permutation(2001).astype(np.float32)
    y = percentile(x)
    assert np.allclose(y, np.clip((x - 1) / 1998, 0, 1), atol=1e-6)
    assert (y.min(), y.max()) == (0, 1)


X = np.random.default_rng(1).uniform(100, 900, (6, 7, 8)).astype(np.float32)
X[0] = 0


@pytest.mark.parametrize(
    "intensity, mr_intensity, expected",
    [
        ("window", "percentile", window(X, -200, 1600)),
        ("mr", "zscore", zscore(X)),
        ("mr", "nonzero", zscore_of_nonzero(X)),
        ("mr", "percentile", percentile(X)),
        ("zscore", "percentile", zscore(X)),
        ("nonzero", "zscore", zscore_of_nonzero(X)),
        ("percentile", "zscore", percentile(X)),
    ],
)
def test_the_item_says_how_and_the_recipe_what_mr_means(
    intensity: str, mr_intensity: str, expected: np.ndarray, save: Save
) -> None:
    recipe = Recipe(ct_window=(-200.0, 1600.0), mr_intensity=mr_intensity)
    assert np.array_equal(prepare(save(X, intensity), recipe).data[0], expected)


def test_channels_are_normalised_one_by_one(save: Save) -> None:
    two = np.stack([X, 5 * X], axis=-1)
    by_one_name = prepare(save(two, "mr"), Recipe()).data
    assert np.allclose(by_one_name, zscore(X), atol=1e-5)

    by_two_names = prepare(save(two, "window", "mr"), Recipe()).data
    assert np.array_equal(by_two_names[0], window(X, -1000, 1000))
    assert np.allclose(by_two_names[1], zscore(X), atol=1e-5)


def test_a_count_of_channels_that_is_not_the_lists_is_refused(save: Save) -> None:
    with pytest.raises(InputError, match=r"a\.nii: 2 channels, but the list names 3"):
        prepare(save(np.stack([X, X], axis=-1), "mr", "mr", "mr"), Recipe())


def test_the_background_is_the_normalised_darkest_voxel_of_each_channel(save: Save) -> None:
    whole = X + 50  # nowhere zero
    channels = np.stack([2 * X - 1200, X, X, whole], axis=-1)
    item = save(channels, "window", "zscore", "nonzero", "zscore")
    background = prepare(item, Recipe()).background

    inside = X[X != 0]
    assert background[0] == 0  # air
    assert background[1] == pytest.approx(-inside.mean() / inside.std(), abs=1e-4)
    assert background[2] == 0  # zeros stay 0, whatever the z-scores are
    assert background[3] == pytest.approx((50 - whole.mean()) / whole.std(), abs=1e-4)


# --- what is not trained on -----------------------------------------------------------------------


def body(size: int = 48) -> np.ndarray:
    """A torso in HU: air, fat, lungs, organs and bone, blurred at edges, with a scan's noise."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[(x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = -100
    hu[(x / 0.7) ** 2 + (y / 0.5) ** 2 < 1] = 40
    hu[((np.abs(x) - 0.35) / 0.25) ** 2 + (y / 0.35) ** 2 + ((z - 0.6) / 0.6) ** 2 < 1] = -850
    hu[x**2 + (y + 0.35) ** 2 < 0.02] = 700
    hu = ndimage.gaussian_filter(hu, 0.7) + np.random.default_rng(0).normal(0, 15, hu.shape)
    return np.clip(hu, -1024, 3071).astype(np.float32)


BODY = body()
UNIT = (BODY - BODY.min()) / (BODY.max() - BODY.min())
WINDOWS = [
    (-1000.0, 1000.0),  # the widest
    (-175.0, 250.0),  # organs
    (-300.0, 500.0),  # the demo's
    (0.0, 80.0),  # a brain
]
NOT_HU = {
    "as DICOM stores it": BODY + 1024,
    "clipped at 0": np.maximum(BODY + 1000, 0),
    "unsigned": BODY + 32768,
    "intercept twice": BODY - 1024,
    "0 to 1": UNIT,
    "-1 to 1": 2 * UNIT - 1,
    "an MR": np.abs(1800 * UNIT),
}


def refusal(item: Item, recipe: Recipe) -> str:
    """The one line, which names the file; it is the same for an image that is predicted."""
    with pytest.raises(InputError) as in_training:
        prepare(item, recipe)
    with pytest.raises(InputError) as in_prediction:
        normalise(read_image(item.image[0]), item, recipe)

    line = str(in_training.value)
    assert line == str(in_prediction.value)
    assert line.startswith(f"{item.image[0]}: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("values", NOT_HU.values(), ids=NOT_HU.keys())
def test_a_ct_that_is_not_in_hu_is_refused_by_name_in_every_window(
    values: np.ndarray, save: Save
) -> None:
    for limits in WINDOWS:
        line = refusal(save(values, "window"), Recipe(ct_window=limits))
        assert "HU" in line
        assert f"values from {values.min():g} to {values.max():g}" in line


def with_metal(hu: np.ndarray) -> np.ndarray:
    """A hip implant of 30,000 HU over 4 % of the volume."""
    hu = hu.copy()
    hu[:16, 8:32, 8:24] = 30000
    return hu


def round_field(hu: np.ndarray) -> np.ndarray:
    """Outside the scanner's field of view -3024, as some scanners write it."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in hu.shape[:2]], indexing="ij")
    return np.where((x**2 + y**2 > 1)[..., None], -3024, hu)


REAL = {
    "air, tissue and bone": BODY,
    "metal": with_metal(BODY),
    "a round field of view": round_field(BODY),
    "air all around": np.pad(BODY, 24, constant_values=-1000),
    "a crop of lung": BODY[28:44, 14:34, 26:48],
    "a crop of abdomen": BODY[8:40, 10:30, :12],
    "a crop of the spine": BODY[18:30, 10:22, :24],
}


@pytest.mark.parametrize("values", REAL.values(), ids=REAL.keys())
def test_a_ct_in_hu_is_taken_in_every_window_without_a_word(
    values: np.ndarray, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for limits in WINDOWS:
        prepare(save(values, "window"), Recipe(ct_window=limits))
        prepare(save(values, "window"), Recipe((1.5, 1.5, 2.0), limits, foreground_crop=True))
    assert capsys.readouterr().err == ""


def test_a_ct_of_8_bits_is_said(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    """It could be a brain without its skull: nothing is negative, and all of it fits the window."""
    prepare(save(255 * UNIT, "window"), Recipe())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a.nii: a CT without air and fat (values from 0 to 255)" in said


def test_phantoms_are_in_hu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantoms(tmp_path, subjects=3, size=(32, 32, 32))
    items = load(str(tmp_path / "pretrain.json"))
    for item in (*items.training, *items.validation):
        for limits in WINDOWS:
            prepare(item, Recipe(ct_window=limits))
    assert capsys.readouterr().err == ""


@pytest.mark.realdata
@pytest.mark.skipif(
    "DAE_REALDATA" not in os.environ, reason="DAE_REALDATA names no folder of real volumes"
)
def test_real_volumes_are_taken_in_every_window_and_a_template_that_is_not_in_hu_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(os.environ["DAE_REALDATA"])
    items = load(str(folder / "pretrain.json"))
    for item in (*items.training, *items.validation):
        for limits, intensity in zip(WINDOWS, ("zscore", "nonzero", "percentile", "zscore")):
            prepare(item, Recipe(ct_window=limits, mr_intensity=intensity))
    assert capsys.readouterr().err == ""
    template = Item((folder / "ct_head_scct/image.nii.gz",), ("ct",), ("window",), "s")
    assert "HU" in refusal(template, Recipe())


@pytest.mark.parametrize("intensity", ["zscore", "nonzero"])
def test_one_hot_voxel_that_makes_all_others_one_grey_is_named(intensity: str, save: Save) -> None:
    """Beside 280 voxels of 100 to 900. The square root of their number bounds its own z-score."""
    recipe = Recipe(mr_intensity=intensity)
    hot = X.copy()
    hot[3, 3, 3] = 5e3
    prepare(save(hot, "mr"), recipe)

    for value in (1e5, 1e30):
        hot[3, 3, 3] = value
        line = refusal(save(hot, "mr"), recipe)
        assert f"alike beside values from 0 to {value:g}; clip" in line


def test_percentiles_do_not_see_one_hot_voxel_of_many(save: Save) -> None:
    """They span 99.9 % of these voxels: 10 on either side are outside."""
    many = np.tile(X, (4, 4, 4))
    many[3, 3, 3] = 1e30
    data = prepare(save(many, "mr"), Recipe(mr_intensity="percentile")).data
    assert len(np.unique(data)) > 200


def test_what_half_precision_does_not_hold_never_reaches_the_cache(
    save: Save, tmp_path: Path
) -> None:
    """1 with a noise of a millionth, on zeros: -10^6 z-scores."""
    faint = 1 + 1e-6 * (X - 500) / 230
    faint[0] = 0
    item = save(faint, "mr")
    assert "more than half precision holds" in refusal(item, Recipe())
    with pytest.raises(InputError, match=r"a\.nii: .*half precision"):
        cached(item, Recipe(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("intensity", ["zscore", "nonzero", "percentile", "window"])
def test_a_volume_that_vanishes_at_a_coarse_spacing_is_named(intensity: str, save: Save) -> None:
    """A few bright voxels between the new voxels' centres, which see zeros alone."""
    sparse = np.zeros((16, 16, 16))
    sparse[2, 2, 2] = 100
    sparse[9, 9, 9] = 50
    line = refusal(save(sparse, intensity), Recipe(spacing=(8.0, 8.0, 8.0)))
    assert "every voxel is 0 at 8 x 8 x 8 mm" in line
    assert "--spacing" in line


def test_a_recipe_that_leaves_one_grey_level_is_named(save: Save) -> None:
    dim = np.where(X > 500, 0.2, 0.1)
    line = refusal(save(dim, "window"), Recipe(ct_window=(200.0, 300.0)))
    assert "--ct-window 200 300 leaves one grey level" in line


def test_a_mask_among_the_images_of_few_values_is_taken_where_its_values_stay_apart(
    save: Save,
) -> None:
    prepared = prepare(save(1000.0 * (X > 500) - 500, "window"), Recipe())
    assert np.unique(prepared.data).tolist() == [0.25, 0.75]


# --- spacing --------------------------------------------------------------------------------------


def centres(size: int, mm: float) -> np.ndarray:
    """Of the voxels of an axis, in mm from its outer face: (i + 1/2) spacings."""
    return (np.arange(size) + 0.5) * mm


def test_resampling_a_ramp_gives_the_ramp_at_the_new_voxel_centres() -> None:
    """Beyond the outermost old centres the value stays."""
    old = (2.0, 3.0, 1.0)
    new = (1.0, 4.5, 2.0)
    d, h, w = (centres(n, mm) for n, mm in zip((8, 6, 10), old))
    ramp = sum(np.meshgrid(3 * d, -2 * h, 7 * w, indexing="ij"))
    both = np.stack([ramp, -ramp]).astype(np.float32)
    resampled = resample(Volume(both, np.diag([*old, 1.0])), new)
    assert resampled.shape == (2, 16, 4, 5)  # 16, 18 and 10 mm

    new_d = np.clip(centres(16, new[0]), d[0], d[-1])
    new_h = np.clip(centres(4, new[1]), h[0], h[-1])
    new_w = np.clip(centres(5, new[2]), w[0], w[-1])
    expected = sum(np.meshgrid(3 * new_d, -2 * new_h, 7 * new_w, indexing="ij"))
    assert np.allclose(resampled[0], expected, atol=1e-4)
    assert np.allclose(resampled[1], -expected, atol=1e-4)


@pytest.mark.parametrize(
    "new, size", [((1, 1, 1), (6, 14, 24)), ((3, 3, 3), (2, 5, 8)), ((1, 2, 3.5), (6, 7, 7))]
)
def test_a_prepared_volume_has_the_spacing_asked_for(
    new: tuple[float, ...], size: tuple[int, ...], save: Save
) -> None:
    """Of 6 x 14 x 24 mm; sizes are rounded."""
    item = save(X, "mr", spacing=(1.0, 2.0, 3.0))
    resampled = prepare(item, Recipe(spacing=new))
    assert resampled.data.shape == (1, *size)
    assert resampled.spacing == new

    as_in_the_file = prepare(item, Recipe())
    assert as_in_the_file.data.shape == (1, 6, 7, 8)
    assert as_in_the_file.spacing == (1, 2, 3)


def test_normalisation_follows_resampling(save: Save) -> None:
    """The mean of two neighbours' z-scores has not the std 1 that the z-score of their mean has."""
    data = prepare(save(X[1:5], "mr"), Recipe(spacing=(2.0, 2.0, 2.0))).data
    assert data.mean() == pytest.approx(0, abs=1e-5)
    assert data.std() == pytest.approx(1, abs=1e-5)


def test_a_spacing_that_asks_for_more_than_the_memory_holds_is_one_line(save: Save) -> None:
    item = save(X, "mr", spacing=(50.0, 50.0, 50.0))
    line = refusal(item, Recipe(spacing=(0.01, 0.01, 0.01)))
    assert "--spacing" in line
    assert "6 x 7 x 8 voxels of 50 x 50 x 50 mm would become 30000 x 35000 x 40000" in line
    assert "(153 TiB)" in line


def test_a_spacing_that_leaves_no_voxels_is_refused_by_the_files_name(save: Save) -> None:
    with pytest.raises(InputError, match=r"a\.nii.*spacing"):
        prepare(save(X, "mr"), Recipe(spacing=(1.0, 1.0, 20.0)))


# --- labels beside their image --------------------------------------------------------------------

RATIOS = [
    ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
    ((0.75, 0.75, 0.75), (1.5, 1.5, 1.5)),
    ((0.5, 1.0, 1.5), (1.0, 1.5, 3.0)),
    ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
    ((0.8, 0.8, 3.0), (1.5, 1.5, 2.0)),
    ((1.0, 1.0, 1.0), (3.0, 1.0, 0.7)),
]


def shares(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Of each class in each new voxel, by scipy alone: (k, d, h, w)."""
    factors = [new / old for old, new in zip(label.shape, shape)]
    of_class = []
    for k in range(label.max() + 1):
        mask = np.equal(label, k).astype(np.float64)
        of_class.append(ndimage.zoom(mask, factors, order=1, mode="nearest", grid_mode=True))
    return np.stack(of_class)


@pytest.mark.parametrize(
    "new", [(10, 12, 14), (5, 6, 7), (7, 5, 9), (20, 25, 27), (10, 12, 28), (1, 3, 2)], ids=str
)
def test_labels_are_the_likeliest_class_of_one_hot_maps_resampled_linearly(
    new: tuple[int, ...],
) -> None:
    """To even and odd sizes. Where two classes are equally likely either is right."""
    noise = np.random.default_rng(0).normal(size=(5, 10, 12, 14))
    label = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5)).argmax(0).astype(np.uint8)
    label[label == 3] = 200  # numbers need not follow each other
    resampled = resample_labels(label, new)
    assert resampled.shape == new
    assert resampled.dtype == np.uint8

    expected = shares(label, new)
    index = resampled[None].astype(np.int64)
    share = np.take_along_axis(expected, index, axis=0)[0]
    assert np.allclose(share, expected.max(0), atol=1e-4)


def test_labels_of_the_same_grid_stay_as_they_are() -> None:
    label = np.random.default_rng(0).integers(0, 5, (6, 7, 8)).astype(np.uint8)
    assert np.array_equal(resample_labels(label, label.shape), label)


@pytest.mark.parametrize("old, new", RATIOS, ids=str)
def test_labels_lie_where_their_image_lies(
    old: tuple[float, ...], new: tuple[float, ...], save: Save
) -> None:
    """Balls as image and label, prepared together: their centres agree to .03 of a new voxel.

    That is on average. Nearest neighbour is a quarter of a voxel off where the new voxels are twice
    as large.
    """
    rng = np.random.default_rng(0)
    axes = [centres(int(45 / mm), mm) for mm in old]
    coordinates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    off = []
    grown = []
    for _ in range(16):
        middle = rng.uniform(17, 28, 3)
        radius = rng.uniform(8, 14)
        ball = ((coordinates - middle) ** 2).sum(-1) < radius**2
        item = save(2000.0 * ball - 1000, "window", spacing=old, label=ball)
        prepared = prepare(item, Recipe(spacing=new))

        label = prepared.label
        image = prepared.data[0]
        assert label is not None
        assert label.shape == image.shape
        centre = np.array(ndimage.center_of_mass(label))
        off.append(centre - ndimage.center_of_mass(image))
        grown.append(label.sum() / image.sum())
    assert np.abs(np.mean(off, axis=0)).max() < 0.03
    assert np.mean(grown) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_where_half_of_a_voxel_is_of_one_organ_both_get_as_many_voxels(axis: int) -> None:
    """Faces in the middle of new voxels: no organ grows, and none moves."""
    planes = np.zeros((12, 12, 12), np.uint8)
    planes[3:9] = 1
    planes[9:12] = 2
    label = np.moveaxis(planes, 0, axis)

    resampled = np.moveaxis(resample_labels(label, (6, 6, 6)), axis, 0)
    assert (resampled == 1).sum(axis=(1, 2)).tolist() == [0, 18, 36, 36, 18, 0]
    assert np.all(resampled[0] == 0)
    assert set(np.unique(resampled[4])) == {1, 2}
    assert np.all(resampled[5] == 2)


def test_an_organ_that_no_new_voxel_holds_is_said(
    save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    label = np.zeros(X.shape, np.uint8)
    label[3:6, 3:6, 2:5] = 1
    label[2, 2, 2] = 7
    resampled = prepare(save(X, "mr", label=label), Recipe(spacing=(3.0, 3.0, 3.0))).label
    assert set(np.unique(resampled)) == {0, 1}
    assert "label.nii: nothing is left of label 7 at 3 x 3 x 3 mm" in capsys.readouterr().err


def test_many_classes_take_no_more_memory_than_a_few_volumes() -> None:
    """One-hot maps of 60 classes would be 60 volumes of float32."""
    label = np.zeros((80, 80, 80), np.uint8)
    for n in range(60):
        d, h, w = np.unravel_index(n, (4, 4, 4))
        cube = label[20 * d : 20 * d + 12, 20 * h : 20 * h + 12, 20 * w : 20 * w + 12]
        cube[:] = n + 1

    tracemalloc.start()
    resampled = resample_labels(label, (80, 80, 81))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(resampled)) == 61
    assert peak < 8 * 4 * resampled.size


# --- flags ----------------------------------------------------------------------------------------


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


# --- foreground -----------------------------------------------------------------------------------


def test_foreground_is_brighter_than_the_mean(save: Save) -> None:
    brighter = np.argwhere(np.greater(X, X.mean()))
    assert np.array_equal(bright_voxels(X), brighter)  # few enough: all of them
    assert np.array_equal(prepare(save(X, "mr"), Recipe()).foreground, brighter)


def test_of_much_foreground_an_even_sample_is_kept() -> None:
    x = np.random.default_rng(2).normal(size=(30, 30, 30)).astype(np.float32)
    voxels = bright_voxels(x, count=2000)
    assert voxels.shape == (2000, 3)
    assert len(np.unique(voxels, axis=0)) == 2000
    assert np.all(x[tuple(voxels.T)] > x.mean())
    assert np.array_equal(voxels, bright_voxels(x, count=2000))

    standard_error = 30 / 12**0.5 / 2000**0.5
    assert np.abs(voxels.mean(axis=0) - 14.5).max() < 4 * standard_error


@pytest.mark.parametrize("intensity", ["zscore", "nonzero", "percentile", "minmax", "none"])
def test_the_foreground_box_holds_all_that_is_not_background(intensity: str, save: Save) -> None:
    """A head with a dark rim: the rim is darker than the background that `nonzero` makes grey."""
    grid = np.stack(np.meshgrid(*[np.arange(-16, 16)] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    noise = np.random.default_rng(0).uniform(0, 20, radius.shape)
    head = np.select([radius < 8, radius < 12], [300 + noise, 50 + noise])
    prepared = prepare(save(head, intensity), Recipe(foreground_crop=True))
    assert prepared.data.shape == (1, 23, 23, 23)  # from -11 to 11


def test_the_foreground_box_holds_what_is_bright_in_any_channel(save: Save) -> None:
    """Two spots, each in a channel of its own; label and channels are cut to one box."""
    two = np.zeros((12, 13, 14, 2))
    two[3, 4, 5, 0] = 10
    two[3, 4, 6, 0] = 30
    two[8, 9, 2, 1] = 20
    two[8, 10, 2, 1] = 40
    label = np.arange(12 * 13 * 14).reshape(12, 13, 14) % 5

    prepared = prepare(save(two, "percentile", label=label), Recipe(foreground_crop=True))
    box = (slice(3, 9), slice(4, 11), slice(2, 7))
    assert prepared.box == box
    assert prepared.grid == (12, 13, 14)
    assert prepared.data.shape == (2, 6, 7, 5)
    assert np.array_equal(prepared.label, label[box])
    for channel in prepared.data:
        assert (channel > 0).sum() == 2


# --- voxels that crops are centred on -------------------------------------------------------------


def organs() -> np.ndarray:
    """A large organ of 8,000 voxels, one of 600, one of 20, on background."""
    label = np.zeros((40, 41, 42), np.uint8)
    label[:20, :20, :20] = 1
    label[30:, 30:36, 30:40] = 5
    label[25, 1:6, 2:6] = 9
    return label


@pytest.mark.parametrize("value, distinct", [(1, 512), (5, 512), (9, 20)])
def test_of_each_class_512_evenly_drawn_voxels_are_kept_and_of_a_smaller_one_all(
    value: int, distinct: int
) -> None:
    label = organs()
    voxels = labelled_voxels(label)
    of_class = voxels[label[tuple(voxels.T)] == value]
    assert len(of_class) == 512

    different, times = np.unique(of_class, axis=0, return_counts=True)
    assert len(different) == distinct
    assert times.max() - times.min() <= 1


def test_the_voxels_of_a_class_are_drawn_from_all_of_it() -> None:
    label = organs()
    voxels = labelled_voxels(label)
    of_largest = voxels[label[tuple(voxels.T)] == 1]
    standard_error = 20 / 12**0.5 / 512**0.5
    assert np.abs(of_largest.mean(axis=0) - 9.5).max() < 4 * standard_error


def test_the_voxels_are_those_of_the_prepared_label_and_none_is_background(save: Save) -> None:
    label = organs()
    voxels = labelled_voxels(label)
    assert len(voxels) == 3 * 512
    x = np.random.default_rng(0).uniform(size=label.shape)
    assert np.array_equal(prepare(save(x, "mr", label=label), Recipe()).foreground, voxels)
    assert labelled_voxels(np.zeros_like(label)).shape == (0, 3)


def test_small_organs_are_met_as_often_as_large_ones(tmp_path: Path) -> None:
    """20 voxels or 8,000: a third of the positive crops is centred on each of three organs."""
    label = organs()
    np.save(tmp_path / "image.npy", label[None].astype(np.float16))
    np.save(tmp_path / "label.npy", label)
    np.save(tmp_path / "foreground.npy", labelled_voxels(label))
    volume = Cached(tmp_path, (1, *label.shape), (0.0,), (1.0, 1.0, 1.0))

    rng = np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for _ in range(900):
        _, centre = labelled_crop(volume, (1, 1, 1), rng, positive=1.0)
        counts[int(centre.item())] += 1
    assert set(counts) == {1, 5, 9}
    standard_deviation = (900 * 2 / 9) ** 0.5
    for count in counts.values():
        assert abs(count - 300) < 4 * standard_deviation


def test_a_list_may_name_each_way_of_normalising_and_no_other() -> None:
    assert sorted(INTENSITIES) == sorted({"window", "mr", *NORMALISERS})
