"""dae/data/datasets.py: Table 1 adds up, and the rows agree with flags, presets and pages."""

import re
import shlex
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest

from dae.config.command_line import parse
from dae.config.lists import DataSetName, MakeListConfig
from dae.config.segment import BTCV, FETA
from dae.config.shared import DataConfig
from dae.data.datalist import MODALITIES, DataList, Item
from dae.data.datasets import DATASETS, TABLE_1
from dae.data.holdout import hold_out_fold, hold_out_share
from dae.data.patterns import expression_of, first_match
from dae.data.sides import choose_flips, likely_pairs

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "datasets.md").read_text()
COMMANDS = re.findall(r"python -m dae.data.make_list ([^`\n]+)", PAGE)

# A file of each data set as it is named where it is had, or by dcm2niix; whose it is.
NAMES: list[tuple[DataSetName, str, str]] = [
    ("brats21", "BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz", "BraTS2021_00000"),
    ("brats21", "BraTS2021_01666/BraTS2021_01666_flair.nii.gz", "BraTS2021_01666"),
    ("brats21", "BraTS-GLI-00005-001/BraTS-GLI-00005-001-t2f.nii.gz", "00005"),
    ("luna16", "subset0/1.3.6.1.4.1.14519.5.2.1.6279.6001.1543.nii.gz", None),
    ("luna16", "subset_9/1.3.6.1.4.1.14519.5.2.1.6279.6001.1543.nii.gz", None),
    ("covid19", "volume-covid19-A-0269.nii.gz", "0269"),
    ("covid19", "volume-covid19-A-0721_day008.nii.gz", "0721"),
    ("covid19", "volume-covid19-A-0318_1.nii.gz", "0318"),
    ("covid19", "volume-covid19-A-0011_ct.nii.gz", "0011"),
    ("hnscc", "HNSCC-01-0001/1.3.6.1.4.1.14519.5.2.1.1706.8040.1.nii.gz", "HNSCC-01-0001"),
    ("colon", "1.3.6.1.4.1.9328.50.4.0019/1.3.6.1.4.1.9328.50.4.7.nii.gz", None),
    ("lidc", "LIDC-IDRI-0078/1.3.6.1.4.1.14519.5.2.1.6279.6001.3_Eq_1.nii.gz", "LIDC-IDRI-0078"),
    ("btcv", "img/img0001.nii.gz", "0001"),
    ("feta", "sub-001/anat/sub-001_rec-mial_T2w.nii.gz", "sub-001"),
    ("feta", "sub-041/anat/sub-041_rec-irtk_T2w.nii.gz", "sub-041"),
]


def list_of(count: int) -> DataList:
    """A list of so many subjects, one image each."""
    items = [
        Item((Path(f"{n}.nii.gz"),), ("ct",), ("window",), subject=f"{n}") for n in range(count)
    ]
    return DataList(tuple(items), (), (), labels={})


def test_every_name_of_the_flag_has_a_row() -> None:
    assert list(DATASETS) == list(get_args(DataSetName))
    assert [*TABLE_1, "btcv", "feta"] == list(DATASETS)


def test_table_1_sums_to_10014_volumes_of_which_9513_train() -> None:
    rows = [DATASETS[name] for name in TABLE_1]
    assert sum(row.volumes for row in rows) == 10_014
    assert sum(row.training * len(row.modalities) for row in rows) == 9_513
    assert sum(row.validation * len(row.modalities) for row in rows) == 501


def test_the_10001_of_the_text_are_1310_brains_and_the_training_halves_of_the_ct_sets() -> None:
    """Sec. 3.1: "1,310 x 4, 2,018, 1,520 and 1,223 [...] 10001"; Table 1 has 1,251 brains."""
    chest = sum(DATASETS[name].training for name in ("luna16", "covid19", "lidc"))
    assert chest == 2_018
    assert DATASETS["colon"].training == 1_520
    assert DATASETS["hnscc"].training == 1_223
    assert 4 * 1_310 + 2_018 + 1_520 + 1_223 == 10_001
    assert DATASETS["brats21"].training + DATASETS["brats21"].validation == 1_251


@pytest.mark.parametrize("name", TABLE_1)
def test_five_percent_of_each_set_are_the_validation_of_table_1_but_for_one_colon(
    name: DataSetName,
) -> None:
    row = DATASETS[name]
    split = hold_out_share(list_of(row.training + row.validation))
    difference = len(split.validation) - row.validation
    assert difference == (1 if name == "colon" else 0)


@pytest.mark.parametrize("name", ["btcv", "feta"])
def test_a_fold_of_five_is_what_the_row_says(name: DataSetName) -> None:
    row = DATASETS[name]
    split = hold_out_fold(list_of(row.training + row.validation))
    assert (len(split.training), len(split.validation)) == (row.training, row.validation)


@pytest.mark.parametrize("name", TABLE_1)
def test_pre_training_prepares_the_sets_of_table_1_by_its_defaults(name: DataSetName) -> None:
    row, flags = DATASETS[name], DataConfig()
    assert row.spacing == flags.spacing
    assert row.ct_window == flags.ct_window
    assert row.mr_intensity == flags.mr_intensity


def test_the_presets_of_fine_tuning_prepare_as_the_rows_say() -> None:
    assert DATASETS["btcv"].spacing == BTCV["spacing"]
    assert DATASETS["btcv"].ct_window == BTCV["ct_window"]
    assert DATASETS["feta"].spacing == FETA["spacing"]
    assert DATASETS["feta"].mr_intensity == FETA["mr_intensity"]


@pytest.mark.parametrize("name", DATASETS)
def test_modalities_are_those_of_the_data_list(name: DataSetName) -> None:
    assert set(DATASETS[name].modalities) <= set(MODALITIES)


def test_btcv_has_the_13_organs_in_the_order_of_the_challenge() -> None:
    labels = DATASETS["btcv"].labels
    assert len(labels) == 14
    assert labels[1:4] == ("spleen", "right kidney", "left kidney")
    assert [labels.index(organ) for organ in ("liver", "aorta", "pancreas")] == [6, 8, 11]
    assert labels[12:] == ("right adrenal gland", "left adrenal gland")


def test_feta_has_7_tissues() -> None:
    labels = DATASETS["feta"].labels
    assert len(labels) == 8
    assert [labels.index(tissue) for tissue in ("grey matter", "ventricles")] == [2, 4]


@pytest.mark.parametrize("name", DATASETS)
def test_the_pairs_that_change_places_are_those_that_the_names_tell(name: DataSetName) -> None:
    row = DATASETS[name]
    classes = dict(enumerate(row.labels))
    organs = {label: organ for label, organ in classes.items() if label}
    assert list(row.swap) == likely_pairs(organs)
    assert choose_flips(classes, row.swap or None).axes == (0, 1, 2)


@pytest.mark.parametrize("name", DATASETS)
def test_tolerances_are_of_classes(name: DataSetName) -> None:
    row = DATASETS[name]
    assert {organ for organ, _ in row.tolerance_mm} <= set(row.labels[1:])
    assert len(dict(row.tolerance_mm)) == len(row.tolerance_mm)


@pytest.mark.parametrize("name, path, subject", NAMES)
def test_a_pattern_finds_the_patient_in_a_name_as_it_is_distributed(
    name: DataSetName, path: str, subject: str | None
) -> None:
    expected = subject
    if subject is None:  # an UID: of the file in LUNA16, of the folder elsewhere
        folder, file = path.split("/")
        expected = file.removesuffix(".nii.gz") if name == "luna16" else folder
    expressions = [expression_of(pattern) for pattern in DATASETS[name].patterns]
    words = first_match(path, expressions)
    assert words is not None
    assert words["subject"] == expected


def test_lung_masks_of_luna16_are_no_images() -> None:
    expressions = [expression_of(pattern) for pattern in DATASETS["luna16"].patterns]
    assert first_match("seg-lungs-LUNA16/1.3.6.1.4.1.14519.5.nii.gz", expressions) is None


@pytest.mark.parametrize("page", ["reproduce.md", "datasets.md"])
def test_the_pages_have_the_counts_of_the_rows(page: str) -> None:
    text = (DOCS / page).read_text()
    for name in TABLE_1:
        row = DATASETS[name]
        total = row.training + row.validation
        line = rf"^\| {row.title}\b.*\| {total} \| {row.training}, {row.validation} \|"
        assert re.search(line, text, flags=re.M), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_one(command: str) -> None:
    folder, *arguments = shlex.split(command)
    config = parse(MakeListConfig, arguments, prog="make_list", description="")
    assert config.out and not folder.startswith("-")


def test_the_page_has_a_command_and_the_source_of_every_set() -> None:
    named = re.findall(r"--dataset (\w+)", "\n".join(COMMANDS))
    assert set(named) == set(DATASETS)
    for row in DATASETS.values():
        assert row.source in PAGE


def test_mhd_becomes_nifti_on_the_same_grid_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    values = np.random.default_rng(0).integers(-1024, 3000, (4, 5, 6)).astype(np.int16)
    image = sitk.GetImageFromArray(values)  # (z, y, x)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-100.0, -150.5, -300.0))
    (tmp_path / "luna16/subset0").mkdir(parents=True)
    sitk.WriteImage(image, str(tmp_path / "luna16/subset0/1.3.6.1.mhd"))

    block = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    exec(block[1], {})

    written = nib.load("luna16-nifti/subset0/1.3.6.1.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), values.transpose(2, 1, 0))
    lps = np.array(image.TransformIndexToPhysicalPoint((1, 2, 3)))
    ras = (written.affine @ [1, 2, 3, 1])[:3]
    assert np.allclose(ras, lps * [-1, -1, 1], atol=1e-4)
