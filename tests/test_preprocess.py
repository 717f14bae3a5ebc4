"""dae/data/preprocess.py: each intensity recipe against its closed form, resampling against a ramp and scipy."""

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dae.config.pretrain import PretrainConfig
from dae.data import nifti
from dae.data.augment import labelled_crop
from dae.data.cache import Cached, cached
from dae.data.datalist import Item, load
from dae.data.nifti import Volume, read
from dae.data.preprocess import (
    Recipe,
    normalise,
    percentile,
    prepare,
    resample,
    resample_labels,
    bright_voxels,
    labelled_voxels,
    window,
    zscore,
    zscore_of_nonzero,
)
from dae.demo.phantom import write_phantoms
from dae.errors import InputError

Saved = Callable[..., Item]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A file and the item that names it, and those of its label where there is one."""

    def save(
        data: np.ndarray,
        *intensity: str,
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        label: np.ndarray | None = None,
    ) -> Item:
        affine, of_label = np.diag([*spacing, 1.0]), None
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine), tmp_path / "a.nii")
        if label is not None:
            of_label = tmp_path / "label.nii"
            nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), of_label)
        return Item(
            (tmp_path / "a.nii",), ("any",) * len(intensity), intensity, "s", label=of_label
        )

    return save


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each warning is said once in a process; here, once in a test."""
    monkeypatch.setattr(nifti, "said", set())
    yield


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
def test_a_zscored_volume_has_mean_0_and_std_1_where_it_was_not_zero(
    normalise: Callable[..., np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(1e4, 3, (10, 11, 12)) * (rng.random((10, 11, 12)) > 0.4)).astype(np.float32)
    found = normalise(x)
    assert found.dtype == np.float32 and len(set(found[x == 0].tolist())) == 1
    assert found[x != 0].mean() == pytest.approx(0, abs=1e-5) and found[
        x != 0
    ].std() == pytest.approx(1, abs=1e-5)


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
    intensity: str, mr_intensity: str, expected: np.ndarray, saved: Saved
) -> None:
    recipe = Recipe(ct_window=(-200.0, 1600.0), mr_intensity=mr_intensity)
    assert np.array_equal(prepare(saved(X, intensity), recipe).data[0], expected)


def test_channels_are_normalised_one_by_one(saved: Saved) -> None:
    two = np.stack([X, 5 * X], axis=-1)
    assert np.allclose(
        prepare(saved(two, "mr"), Recipe()).data, zscore(X), atol=1e-5
    )  # one name for all of them
    found = prepare(saved(two, "window", "mr"), Recipe()).data
    assert np.array_equal(found[0], window(X, -1000, 1000)) and np.allclose(
        found[1], zscore(X), atol=1e-5
    )


def test_a_count_of_channels_that_is_not_the_lists_is_refused(saved: Saved) -> None:
    with pytest.raises(InputError, match=r"a\.nii: 2 channels, but the list names 3"):
        prepare(saved(np.stack([X, X], axis=-1), "mr", "mr", "mr"), Recipe())


def test_the_background_is_the_normalised_darkest_voxel_of_each_channel(saved: Saved) -> None:
    whole = X + 50  # nowhere zero
    channels = np.stack([2 * X - 1200, X, X, whole], axis=-1)
    found = prepare(saved(channels, "window", "zscore", "nonzero", "zscore"), Recipe()).background
    inside = X[X != 0]
    assert found[0] == 0  # air
    assert found[1] == pytest.approx(-inside.mean() / inside.std(), abs=1e-4)
    assert found[2] == 0  # the zeros, wherever 0 lies among the z-scores
    assert found[3] == pytest.approx((50 - whole.mean()) / whole.std(), abs=1e-4)


# --- what is not trained on


def body(size: int = 48) -> np.ndarray:
    """A torso in HU: air, fat, lungs, organs, bone, mixed at their edges and with the noise of a scan."""
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
    (-1000.0, 1000.0),
    (-175.0, 250.0),
    (-300.0, 500.0),
    (0.0, 80.0),
]  # the widest, organs, the demo's, a brain
NOT_HU = {
    "as DICOM stores it": BODY + 1024,
    "clipped at 0": np.maximum(BODY + 1000, 0),
    "unsigned": BODY + 32768,
    "intercept twice": BODY - 1024,
    "0 to 1": UNIT,
    "-1 to 1": 2 * UNIT - 1,
    "an MR": np.abs(1800 * UNIT),
}


def lost(item: Item, recipe: Recipe) -> str:
    """The one line, which names the file; and the same of an image that is predicted."""
    lines = []
    for prepared in (
        lambda: prepare(item, recipe),
        lambda: normalise(read(item.image[0]), item, recipe),
    ):
        with pytest.raises(InputError) as caught:
            prepared()
        lines.append(str(caught.value))
    assert (
        lines[0] == lines[1] and lines[0].startswith(f"{item.image[0]}: ") and "\n" not in lines[0]
    )
    return lines[0]


@pytest.mark.parametrize("values", NOT_HU.values(), ids=NOT_HU.keys())
def test_a_ct_that_is_not_in_hu_is_refused_by_name_in_every_window(
    values: np.ndarray, saved: Saved
) -> None:
    for limits in WINDOWS:
        line = lost(saved(values, "window"), Recipe(ct_window=limits))
        assert ("HU" in line) and f"values from {values.min():g} to {values.max():g}" in line


def with_metal(hu: np.ndarray) -> np.ndarray:
    """A hip implant of 30,000 HU over 4 % of the volume."""
    hu = hu.copy()
    hu[:16, 8:32, 8:24] = 30000
    return hu


def round_field(hu: np.ndarray) -> np.ndarray:
    """What lies outside the scanner's field of view, as some scanners write it."""
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
    values: np.ndarray, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    for limits in WINDOWS:
        prepare(saved(values, "window"), Recipe(ct_window=limits))
        prepare(saved(values, "window"), Recipe((1.5, 1.5, 2.0), limits, foreground_crop=True))
    assert capsys.readouterr().err == ""


def test_a_ct_of_8_bits_is_said(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """It could be a brain without its skull: nothing is negative in either, and all of it fits into the window."""
    prepare(saved(255 * UNIT, "window"), Recipe())
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "a.nii: a CT without air and fat (values from 0 to 255)" in said
    )


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
        for limits, how in zip(WINDOWS, ("zscore", "nonzero", "percentile", "zscore")):
            prepare(item, Recipe(ct_window=limits, mr_intensity=how))
    assert capsys.readouterr().err == ""
    template = Item((folder / "ct_head_scct/image.nii.gz",), ("ct",), ("window",), "s")
    assert "HU" in lost(template, Recipe())


@pytest.mark.parametrize("how", ["zscore", "nonzero"])
def test_one_hot_voxel_that_makes_all_others_one_grey_is_named(how: str, saved: Saved) -> None:
    """Beside 280 voxels of 100 to 900. The square root of their number bounds its own z-score."""
    hot = X.copy()
    for value, fine in ((5e3, True), (1e5, False), (1e30, False)):
        hot[3, 3, 3] = value
        item = saved(hot, "mr")
        if fine:
            prepare(item, Recipe(mr_intensity=how))
        else:
            assert f"alike beside values from 0 to {value:g}; clip" in lost(
                item, Recipe(mr_intensity=how)
            )
    many = np.tile(
        X, (4, 4, 4)
    )  # the percentile recipe looks at 99.9 % of these: 10 on either side are outside
    many[3, 3, 3] = 1e30
    found = prepare(saved(many, "mr"), Recipe(mr_intensity="percentile")).data
    assert len(np.unique(found)) > 200


def test_what_half_precision_does_not_hold_never_reaches_the_cache(
    saved: Saved, tmp_path: Path
) -> None:
    """1 with a noise of a millionth, on zeros: -10^6 z-scores."""
    faint = 1 + 1e-6 * (X - 500) / 230
    faint[0] = 0
    item = saved(faint, "mr")
    assert "more than half precision holds" in lost(item, Recipe())
    with pytest.raises(InputError, match=r"a\.nii: .*half precision"):
        cached(item, Recipe(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("how", ["zscore", "nonzero", "percentile", "window"])
def test_a_volume_that_vanishes_at_a_coarse_spacing_is_named(how: str, saved: Saved) -> None:
    """A few bright voxels between the new voxels' centres; what was left were zeros, and 0 / 0."""
    sparse = np.zeros((16, 16, 16))
    sparse[2, 2, 2], sparse[9, 9, 9] = 100, 50
    line = lost(saved(sparse, how), Recipe(spacing=(8.0, 8.0, 8.0)))
    assert "every voxel is 0 at 8 x 8 x 8 mm" in line and "--spacing" in line


def test_a_recipe_that_leaves_one_grey_level_is_named(saved: Saved) -> None:
    dim = np.where(X > 500, 0.2, 0.1)
    assert "--ct-window 200 300 leaves one grey level" in lost(
        saved(dim, "window"), Recipe(ct_window=(200.0, 300.0))
    )


def test_a_mask_among_the_images_of_few_values_is_taken_where_its_values_stay_apart(
    saved: Saved,
) -> None:
    prepared = prepare(saved(1000.0 * (X > 500) - 500, "window"), Recipe())
    assert np.unique(prepared.data).tolist() == [0.25, 0.75]


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
    assert np.allclose(found[0], expected, atol=1e-4) and np.allclose(
        found[1], -expected, atol=1e-4
    )


@pytest.mark.parametrize(
    "new, size", [((1, 1, 1), (6, 14, 24)), ((3, 3, 3), (2, 5, 8)), ((1, 2, 3.5), (6, 7, 7))]
)
def test_a_prepared_volume_has_the_spacing_asked_for(
    new: tuple[float, ...], size: tuple[int, ...], saved: Saved
) -> None:
    """Of 6 x 14 x 24 mm; sizes are rounded."""
    item = saved(X, "mr", spacing=(1.0, 2.0, 3.0))
    found = prepare(item, Recipe(spacing=new))
    assert found.data.shape == (1, *size) and found.spacing == new
    assert prepare(item, Recipe()).spacing == (1, 2, 3) and prepare(item, Recipe()).data.shape == (
        1,
        6,
        7,
        8,
    )


def test_normalisation_follows_resampling(saved: Saved) -> None:
    """The mean of two neighbours' z-scores has not the std 1 that the z-score of their mean has."""
    found = prepare(saved(X[1:5], "mr"), Recipe(spacing=(2.0, 2.0, 2.0))).data
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_a_spacing_that_asks_for_more_than_the_memory_holds_is_one_line(saved: Saved) -> None:
    line = lost(saved(X, "mr", spacing=(50.0, 50.0, 50.0)), Recipe(spacing=(0.01, 0.01, 0.01)))
    assert (
        "6 x 7 x 8 voxels of 50 x 50 x 50 mm would become 30000 x 35000 x 40000 (153 TiB)" in line
    )
    assert "--spacing" in line


def test_a_spacing_that_leaves_no_voxels_is_refused_by_the_files_name(saved: Saved) -> None:
    with pytest.raises(InputError, match=r"a\.nii.*spacing"):
        prepare(saved(X, "mr"), Recipe(spacing=(1.0, 1.0, 20.0)))


# --- labels beside their image


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
    factors = [m / n for n, m in zip(label.shape, shape)]
    one_hot = [np.equal(label, k).astype(np.float64) for k in range(label.max() + 1)]
    return np.stack(
        [ndimage.zoom(x, factors, order=1, mode="nearest", grid_mode=True) for x in one_hot]
    )


@pytest.mark.parametrize(
    "new", [(10, 12, 14), (5, 6, 7), (7, 5, 9), (20, 25, 27), (10, 12, 28), (1, 3, 2)], ids=str
)
def test_labels_are_the_likeliest_class_of_one_hot_maps_resampled_linearly(
    new: tuple[int, ...],
) -> None:
    """To even and odd sizes. Where two classes are equally likely either is right."""
    noise = ndimage.gaussian_filter(
        np.random.default_rng(0).normal(size=(5, 10, 12, 14)), (0, 1.5, 1.5, 1.5)
    )
    label = noise.argmax(0).astype(np.uint8)
    label[label == 3] = 200  # numbers need not follow each other
    found, expected = resample_labels(label, new), shares(label, new)
    assert found.shape == new and found.dtype == np.uint8
    taken = np.take_along_axis(expected, found[None].astype(np.int64), 0)[0]
    assert np.allclose(taken, expected.max(0), atol=1e-4)
    if new == label.shape:
        assert np.array_equal(found, label)


@pytest.mark.parametrize("old, new", RATIOS, ids=str)
def test_labels_lie_where_their_image_lies(
    old: tuple[float, ...], new: tuple[float, ...], saved: Saved
) -> None:
    """Balls as image and as label, prepared together: on average their centres agree to .03 of a new voxel.

    Nearest neighbour is a quarter of a voxel off where the new voxels are twice as large.
    """
    rng, off, grown = np.random.default_rng(0), [], []
    shape = [int(45 / mm) for mm in old]
    mm = np.stack(
        np.meshgrid(*[(np.arange(n) + 0.5) * size for n, size in zip(shape, old)], indexing="ij"),
        axis=-1,
    )
    for _ in range(16):
        ball = ((mm - rng.uniform(17, 28, 3)) ** 2).sum(-1) < rng.uniform(8, 14) ** 2
        found = prepare(
            saved(2000.0 * ball - 1000, "window", spacing=old, label=ball), Recipe(spacing=new)
        )
        assert found.label is not None and found.label.shape == found.data.shape[1:]
        off.append(
            np.array(ndimage.center_of_mass(found.label)) - ndimage.center_of_mass(found.data[0])
        )
        grown.append(found.label.sum() / found.data[0].sum())
    assert np.abs(np.mean(off, axis=0)).max() < 0.03
    assert np.mean(grown) == pytest.approx(1, abs=0.08)


def test_where_half_of_a_voxel_is_of_one_organ_both_get_as_many_voxels() -> None:
    """Faces in the middle of new voxels, along each axis: no organ grows, and none moves."""
    for axis in range(3):
        label = np.zeros((12, 12, 12), np.uint8)
        label[(slice(None),) * axis + (slice(3, 9),)] = 1
        label[(slice(None),) * axis + (slice(9, 12),)] = 2
        found = resample_labels(label, (6, 6, 6))
        planes = np.moveaxis(found, axis, 0)
        assert [int((planes[n] == 1).sum()) for n in range(6)] == [0, 18, 36, 36, 18, 0]
        assert (
            (planes[0] == 0).all()
            and (planes[5] == 2).all()
            and set(np.unique(planes[4])) == {1, 2}
        )


def test_an_organ_that_no_new_voxel_holds_is_said(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    label = np.zeros(X.shape, np.uint8)
    label[3:6, 3:6, 2:5], label[2, 2, 2] = 1, 7
    found = prepare(saved(X, "mr", label=label), Recipe(spacing=(3.0, 3.0, 3.0))).label
    assert set(np.unique(found)) == {0, 1}
    assert "label.nii: nothing is left of label 7 at 3 x 3 x 3 mm" in capsys.readouterr().err


def test_many_classes_take_no_more_memory_than_a_few_volumes() -> None:
    """One-hot maps of 60 classes would be 60 volumes of float32."""
    label = np.zeros((80, 80, 80), np.uint8)
    for n in range(60):
        corner = [(n % 4) * 20, (n // 4 % 4) * 20, (n // 16) * 20]
        label[
            corner[0] : corner[0] + 12, corner[1] : corner[1] + 12, corner[2] : corner[2] + 12
        ] = n + 1
    tracemalloc.start()
    found = resample_labels(label, (80, 80, 81))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(found)) == 61 and peak < 8 * 4 * found.size


# --- flags


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
    assert np.array_equal(bright_voxels(X), brighter)  # few enough: all of them
    assert np.array_equal(prepare(saved(X, "mr"), Recipe()).foreground, brighter)


def test_of_much_foreground_an_even_sample_is_kept() -> None:
    x = np.random.default_rng(2).normal(size=(30, 30, 30)).astype(np.float32)
    found = bright_voxels(x, count=2000)
    assert found.shape == (2000, 3) and len(np.unique(found, axis=0)) == 2000
    assert (x[tuple(found.T)] > x.mean()).all()
    assert (
        np.abs(found.mean(axis=0) - 14.5).max() < 4 * 30 / 12**0.5 / 2000**0.5
    )  # four standard errors
    assert np.array_equal(found, bright_voxels(x, count=2000))


def test_the_foreground_box_holds_what_is_bright_in_any_channel(saved: Saved) -> None:
    """Two spots, each in a channel of its own; the label and the second channel go with the first."""
    two = np.zeros((12, 13, 14, 2))
    two[3, 4, 5, 0], two[8, 9, 2, 1] = 10, 20
    two[3, 4, 6, 0], two[8, 10, 2, 1] = 30, 40
    label = np.arange(two[..., 0].size).reshape(two.shape[:3]) % 5
    found = prepare(saved(two, "percentile", label=label), Recipe(foreground_crop=True))
    box = (slice(3, 9), slice(4, 11), slice(2, 7))
    assert found.box == box and found.grid == (12, 13, 14) and found.data.shape == (2, 6, 7, 5)
    assert np.array_equal(found.label, label[box])
    assert (found.data[0] > 0).sum() == (found.data[1] > 0).sum() == 2


# --- voxels that crops are centred on


def organs() -> np.ndarray:
    """A large organ of 8,000 voxels, one of 600, one of 20, on background."""
    label = np.zeros((40, 41, 42), np.uint8)
    label[:20, :20, :20], label[30:, 30:36, 30:40], label[25, 1:6, 2:6] = 1, 5, 9
    return label


def test_of_each_class_512_evenly_drawn_voxels_are_kept_and_of_a_smaller_one_all(
    saved: Saved,
) -> None:
    label = organs()
    places = labelled_voxels(label)
    values = label[tuple(places.T)]
    assert dict(zip(*np.unique(values, return_counts=True))) == {
        1: 512,
        5: 512,
        9: 512,
    }  # and none of the background
    for value, distinct in ((1, 512), (5, 512), (9, 20)):
        of_it, times = np.unique(places[values == value], axis=0, return_counts=True)
        assert len(of_it) == distinct and times.max() - times.min() <= 1
    far = np.abs(places[values == 1].mean(axis=0) - 9.5).max()
    assert far < 4 * 20 / 12**0.5 / 512**0.5  # four standard errors
    assert np.array_equal(places, labelled_voxels(label)) and labelled_voxels(0 * label).shape == (
        0,
        3,
    )
    x = np.random.default_rng(0).uniform(size=label.shape)
    assert np.array_equal(prepare(saved(x, "mr", label=label), Recipe()).foreground, places)


def test_small_organs_are_met_as_often_as_large_ones(tmp_path: Path) -> None:
    """20 voxels or 8,000: a third of the positive crops is centred on each of three organs."""
    label = organs()
    for name, array in (("image", label[None].astype(np.float16)), ("label", label)):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "foreground.npy", labelled_voxels(label))
    volume, rng = (
        Cached(tmp_path, (1, *label.shape), (0.0,), (1.0, 1.0, 1.0)),
        np.random.default_rng(0),
    )
    centres = [
        int(labelled_crop(volume, (1, 1, 1), rng, positive=1.0)[1][0, 0, 0]) for _ in range(900)
    ]
    counts = dict(zip(*np.unique(centres, return_counts=True)))
    assert set(counts) == {1, 5, 9}
    assert all(
        abs(count - 300) < 4 * (900 * 2 / 9) ** 0.5 for count in counts.values()
    )  # four standard deviations
