"""dae/data/nnunet.py: an nnU-Net raw folder means here what it means there."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import refusal

from dae.data.datalist import DataList, load
from dae.data.holdout import for_segmentation, hold_out_fold, hold_out_share
from dae.data.preprocess import Recipe, prepare

LABELS = {"background": 0, "liver": 2, "spleen": 1}
Folder = Callable[..., Path]


@pytest.fixture
def raw(tmp_path: Path) -> Folder:
    """A raw folder of empty files: cases to train on, with labels, and more of dataset.json."""

    def make(
        *cases: str,
        files: tuple[str, ...] = (),
        channels: tuple[str, ...] = ("CT",),
        **content: Any,
    ) -> Path:
        folder = tmp_path / "nnUNet_raw" / "Dataset007_Body"
        names = {str(k): name for k, name in enumerate(channels)}
        written = list(files)
        for case in cases:
            written.append(f"labelsTr/{case}.nii.gz")
            written += [f"imagesTr/{case}_{k:04d}.nii.gz" for k in range(len(channels))]

        for file in written:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        (folder / "dataset.json").write_text(
            json.dumps({"channel_names": names, "labels": LABELS, **content})
        )
        return folder

    return make


def subjects(items: Any) -> list[str]:
    return [item.subject for item in items]


def test_a_raw_folder_loads_by_its_path(raw: Folder) -> None:
    folder = raw(
        "b", "a_1", channels=("CT", "T2w"), files=("imagesTr/notes.txt",), file_ending=".nii.gz"
    )
    (folder / "labelsTr/b.nii.gz").unlink()
    items = load(str(folder))
    a, b = items.training
    assert subjects((a, b)) == ["a_1", "b"]
    assert a.image == (folder / "imagesTr/a_1_0000.nii.gz", folder / "imagesTr/a_1_0001.nii.gz")
    assert (a.modality, a.label, b.label) == (("ct", "t2"), folder / "labelsTr/a_1.nii.gz", None)
    assert items.labels == {0: "background", 1: "spleen", 2: "liver"}
    assert items.test == () and items.splits == ()


def test_a_data_root_is_of_lists_and_moves_no_raw_folder(raw: Folder, tmp_path: Path) -> None:
    """A check of a list and a raw folder has one flag for both."""
    folder = raw("a")
    for root in (str(tmp_path), "/", "nowhere"):
        assert load(str(folder), root=root) == load(str(folder))


def test_visits_of_one_patient_that_a_drawn_split_divides_are_said(raw: Folder) -> None:
    cases = [f"pat_{n}_ses{k}" for n in range(6) for k in (1, 2)]
    flags: dict[str, Any] = {"split_seed": None, "allow_trained": False}
    items = load(str(raw(*cases)))
    split = for_segmentation(items, "raw", fold=0, label_fraction=1.0, **flags)
    assert "one patient?" in split.notes[-1] and "_ses1_0000" in split.notes[-1]


def test_a_split_names_a_case_however_its_umlauts_are_stored(raw: Folder) -> None:
    folder = raw(unicodedata.normalize("NFD", "Müller"), "b")
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["b"], "val": ["Müller"]}]))
    assert subjects(hold_out_fold(load(str(folder)), fold=0).validation) == ["Müller"]


def test_files_that_do_not_fit_dataset_json_are_refused_by_name(raw: Folder) -> None:
    folder = raw("a", files=("imagesTr/b_0000.NII.GZ",))
    assert "b_0000.NII.GZ: ends in other capitals than .nii.gz" in refusal(load, str(folder))
    (folder / "imagesTr/b_0000.NII.GZ").unlink()
    assert subjects(load(str(raw(file_ending="nii.gz"))).training) == ["a"]
    (folder / "imagesTr/a_0001.nii.gz").touch()
    line = refusal(load, str(folder))
    assert "case a has 2 files, and dataset.json names 1 channel" in line


def test_hidden_files_are_no_volumes(raw: Folder) -> None:
    """A Mac leaves "._name" beside each file that it copies to another disk."""
    folder = raw(
        "c0",
        "c1",
        files=("imagesTr/._c0_0000.nii.gz", "imagesTr/.DS_Store", "labelsTr/._c0.nii.gz"),
    )
    assert subjects(load(str(folder)).training) == ["c0", "c1"]


def test_images_to_test_are_the_test_split(raw: Folder) -> None:
    folder = raw(
        "c0", files=("imagesTs/t0_0000.nii.gz", "imagesTs/t1_0000.nii.gz", "labelsTs/t1.nii.gz")
    )
    items = load(str(folder))
    assert subjects(items.training) == ["c0"] and subjects(items.test) == ["t0", "t1"]
    assert [item.label for item in items.test] == [None, folder / "labelsTs/t1.nii.gz"]
    assert items.test[0].modality == ("ct",)


@pytest.mark.parametrize(
    "place", ["nnUNet_raw/Dataset007_Body", "nnUNet_raw", "nnUNet_preprocessed/Dataset007_Body"]
)
def test_the_folds_are_those_of_splits_final(raw: Folder, tmp_path: Path, place: str) -> None:
    """In the folder, beside it, or where nnU-Net keeps it; also where they are no partition."""
    folder = raw("a", "b", "c", "d")
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "d"], "val": ["b", "a"]}]
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "splits_final.json").write_text(json.dumps(folds))
    items = load(str(folder))
    for choose in (hold_out_share, hold_out_fold):
        first = choose(items)
        assert subjects(first.training) == ["a", "b"]
        assert subjects(first.validation) == ["c"]
        assert "1 case in neither train nor val of it left out, as d" in first.notes[0]

        second = choose(items, fold=1)
        assert subjects(second.training) == ["c", "d"]
        assert subjects(second.validation) == ["a", "b"]

        line = refusal(choose, items, fold=2)
        assert "--fold 2: splits_final.json has the folds 0 to 1" in line
        assert "--split-seed 1" in refusal(choose, items, split_seed=1)


@pytest.mark.parametrize(
    "folds, words",
    [
        ([{"train": ["a", "x"], "val": ["b"]}], "fold 0: case x is not in imagesTr"),
        ([{"train": ["a", "b"], "val": ["b"]}], "fold 0: case b is in both train and val"),
        ([{"train": ["a"]}], 'the lists "train" and "val"'),
        ({"train": [], "val": []}, "must be a list of folds"),
    ],
)
def test_splits_that_do_not_fit_are_refused_by_name(raw: Folder, folds: Any, words: str) -> None:
    folder = raw("a", "b")
    (folder / "splits_final.json").write_text(json.dumps(folds))
    line = refusal(load, str(folder))
    assert words in line and "splits_final.json" in line


def test_files_that_do_not_count_their_channels_are_refused(raw: Folder) -> None:
    """Without _0000 the number that tells the cases apart would be taken for a channel's."""
    folder = raw(files=tuple(f"imagesTr/spleen_{n}.nii.gz" for n in range(12)))
    assert "_0000" in refusal(load, str(folder))


def test_a_channel_that_is_not_there_is_named(raw: Folder) -> None:
    """Else the third channel would be taken for the second."""
    folder = raw("a", files=("imagesTr/b_0000.nii.gz", "imagesTr/b_0002.nii.gz"))
    assert "case b has no channel _0001.nii.gz" in refusal(load, str(folder))


def test_a_folder_that_is_none_and_keys_that_are_almost_ours_are_refused(
    raw: Folder, tmp_path: Path
) -> None:
    assert "dataset.json" in refusal(load, str(tmp_path))
    line = refusal(load, str(raw("a", tolerance={"liver": 2})))
    assert '"tolerance" is not read; "tolerance_mm" was probably meant' in line
    old = {
        "name": "Spleen",
        "numTraining": 1,
        "training": ["x"],
        "test": [],
        "regions_class_order": [1],
    }
    assert len(load(str(raw("a", **old))).training) == 1  # nnU-Net's first version had a list in it


def prepared(folder: Path, values: np.ndarray, channel: str) -> np.ndarray:
    nib.save(nib.Nifti1Image(values, np.eye(4)), folder / "imagesTr/a_0000.nii.gz")
    items: DataList = load(str(folder))
    assert items.training[0].modality == (channel.lower(),)
    return prepare(replace(items.training[0], label=None), Recipe(mr_intensity="percentile")).data[
        0
    ]


def test_channel_names_that_are_normalisations_mean_what_they_mean_there(raw: Folder) -> None:
    """nnU-Net: as it is; (x - mean) / std by every voxel, zeros too; (x - min) / (max - min)."""
    x = np.random.default_rng(0).gamma(2.0, 300.0, (5, 6, 7)).astype(np.float32)
    x[:3] = 0
    wide = x.astype(np.float64)
    for name, expected in (
        ("noNorm", wide),
        ("zscore", (wide - wide.mean()) / wide.std()),
        ("ZScore", (wide - wide.mean()) / wide.std()),
        ("rescale_to_0_1", (wide - wide.min()) / np.ptp(wide)),
        ("rescale_0_to_1", (wide - wide.min()) / np.ptp(wide)),
    ):
        found = prepared(raw("a", labels={}, channels=(name,)), x, name)
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5), name
