"""dae/data/datalist.py: the lists people have load as they are, and who is held out is a matter of subjects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dae.config import InputError
from dae.data.datalist import DataList, check_labels, five_folds, hold_out, load

Load = Callable[..., DataList]


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """Write a list and load it."""

    def write_and_load(content: object, **keys: str) -> DataList:
        (tmp_path / "list.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return load(str(tmp_path / "list.json"), **keys)

    return write_and_load


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def entries(count: int, *, images: int = 1, **keys: Any) -> list[dict[str, Any]]:
    """Some subjects with one or several images each."""
    return [
        {"image": f"s{n}_{k}.nii.gz", "modality": "ct", "subject": f"s{n}", **keys}
        for n in range(count) for k in range(images)
    ]  # fmt: skip


# --- what loads


def test_a_decathlon_style_list_loads_with_paths_from_its_own_folder(loaded: Load, tmp_path: Path) -> None:
    items = loaded({
        "name": "Spleen", "numTraining": 1, "labels": {"0": "background", "1": "spleen"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz", "modality": "CT", "subject": 7}],
        "validation": [{"image": "/elsewhere/b.nii.gz", "modality": "ct", "fold": 1}],
        "test": [{"image": "c.nii.gz", "modality": "t2"}],
    })  # fmt: skip
    (a,), (b,), (c,) = items.training, items.validation, items.test
    assert (a.image, a.label) == ((tmp_path / "imagesTr/a.nii.gz",), tmp_path / "labelsTr/a.nii.gz")
    assert (a.modality, a.intensity, a.kind, a.subject, a.fold) == (("ct",), ("window",), "ct", "7", None)
    assert (b.image, b.fold, b.label) == ((Path("/elsewhere/b.nii.gz"),), 1, None)
    assert (c.kind, c.intensity) == ("t2", ("mr",))
    assert items.labels == {0: "background", 1: "spleen"}


@pytest.mark.parametrize("labels, ignored", [
    ({"background": 0, "liver": 1, "ignore": 2}, 2), ({"0": "background", "1": "liver", "255": "ignore"}, 255),
    ({"background": 0, "liver": 1, "ignore": -1}, -1), ({"0": "background", "1": "liver"}, None),
])  # fmt: skip
def test_a_label_by_the_name_ignore_is_no_class(loaded: Load, labels: dict[str, Any], ignored: int | None) -> None:
    items = loaded({"training": entries(5), "labels": labels})
    assert items.labels == {0: "background", 1: "liver"} and items.ignore == ignored
    assert hold_out(items).ignore == five_folds(items, fold=0).ignore == ignored


@pytest.mark.parametrize("tolerance, word", [
    ({"kidney": 1.0}, "'kidney', which is no class"), ({"0": 1.0}, "'0', which is no class"),
    ({"liver": -1}, "'liver' is -1"), ({"liver": "two"}, "'two'; it must be 0 mm or more"),
    ([1.0], "must be an object"),
])  # fmt: skip
def test_a_tolerance_of_no_class_or_that_is_none_is_refused(loaded: Load, tolerance: Any, word: str) -> None:
    labels = {"background": 0, "liver": 1}
    found = refusal(lambda: loaded({"training": entries(1), "labels": labels, "tolerance_mm": tolerance}))
    assert word in found and "tolerance_mm" in found and "list.json" in found


def test_paths_start_from_data_root_where_it_is_given(loaded: Load) -> None:
    items = loaded({"training": entries(1)}, root="/data")
    assert items.training[0].image == (Path("/data/s0_0.nii.gz"),)


def test_bare_file_names_are_items_once_the_modality_is_named(loaded: Load, tmp_path: Path) -> None:
    items = loaded({"training": ["a.nii.gz", "b.nii.gz"]}, modality="ct")
    assert [(item.image, item.kind) for item in items.training] == [
        ((tmp_path / "a.nii.gz",), "ct"), ((tmp_path / "b.nii.gz",), "ct")
    ]  # fmt: skip


def test_an_item_keeps_its_own_modality_when_others_are_named_for(loaded: Load) -> None:
    items = loaded({"training": [{"image": "a", "modality": "t2"}, "b"]}, modality="ct")
    assert [item.kind for item in items.training] == ["t2", "ct"]


def test_a_decathlon_list_may_say_the_modality_once_for_all(loaded: Load) -> None:
    """The Decathlon's own dataset.json names each channel at the top, and not in its items."""
    training = [{"image": "a.nii.gz"}]
    one = loaded({"training": training, "modality": {"0": "MRI"}})
    assert one.training[0].modality == ("mr",)
    four = loaded({"training": training, "modality": {"1": "T1w", "0": "FLAIR", "2": "t1gd", "3": "T2w"}})
    assert four.training[0].modality == ("flair", "t1", "t1ce", "t2")


@pytest.mark.parametrize(
    "written, known",
    [
        ("CT", "ct"), ("T1w", "t1"), ("T1Gd", "t1ce"), ("t1c", "t1ce"), ("T2W", "t2"), ("FLAIR", "flair"),
        ("T2F", "flair"), ("T2*", "t2s"), ("PD", "pd"), ("MRI", "mr"),
    ],
)  # fmt: skip
def test_usual_spellings_are_known(written: str, known: str, loaded: Load) -> None:
    assert loaded({"training": [{"image": "a", "modality": written}]}).training[0].modality == (known,)


def test_a_list_may_declare_a_modality_and_an_item_its_intensity(loaded: Load) -> None:
    content = {"modalities": {"PET": "percentile"}, "training": [
        {"image": "a", "modality": "pet"}, {"image": "b", "modality": "ct", "intensity": "zscore"}]}  # fmt: skip
    assert [item.intensity for item in loaded(content).training] == [("percentile",), ("zscore",)]


def test_a_list_of_files_is_one_image_of_as_many_channels(loaded: Load, tmp_path: Path) -> None:
    names = ["t1", "t1gd", "t2", "flair"]
    item = loaded({"training": [{"image": [f"{name}.nii" for name in names], "modality": names}]}).training[0]
    assert item.image == tuple(tmp_path / f"{name}.nii" for name in names)
    assert (item.kind, item.intensity) == ("t1+t1ce+t2+flair", ("mr",) * 4)


def test_an_nnunet_raw_folder_loads_by_its_path(tmp_path: Path) -> None:
    names = ("b_0000", "b_0001", "a_1_0000", "a_1_0001")
    for file in (*(f"imagesTr/{name}.nii.gz" for name in names), "imagesTr/notes.txt", "labelsTr/a_1.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "dataset.json").write_text(json.dumps({
        "channel_names": {"1": "T2w", "0": "CT"}, "file_ending": ".nii.gz",
        "labels": {"background": 0, "liver": 2, "spleen": 1},
    }))  # fmt: skip
    items = load(str(tmp_path))
    a, b = items.training
    assert [item.subject for item in (a, b)] == ["a_1", "b"]
    assert a.image == (tmp_path / "imagesTr/a_1_0000.nii.gz", tmp_path / "imagesTr/a_1_0001.nii.gz")
    assert (a.modality, a.label, b.label) == (("ct", "t2"), tmp_path / "labelsTr/a_1.nii.gz", None)
    assert items.labels == {0: "background", 1: "spleen", 2: "liver"}


def test_modalities_stand_in_the_authors_order_then_by_name(loaded: Load) -> None:
    """--cmcl ranks counts classes as the authors' code does: CT, T1, T1ce, T2, FLAIR."""
    written = ["xa", "flair", "pet", "t2", "t1ce", "t1", "ct"]
    training = [{"image": name, "modality": name} for name in written]
    items = loaded({"training": training, "modalities": {"pet": "zscore", "xa": "window"}})
    assert items.kinds() == ["ct", "t1", "t1ce", "t2", "flair", "pet", "xa"]


# --- what is refused


@pytest.mark.parametrize(
    "content, said",
    [
        ({"training": ["a.nii.gz"]}, ["training[0]", "a.nii.gz", "--modality"]),
        ({"training": [{"image": "a", "modality": "xray"}]}, ["'xray'", '"modalities": {"xray": "zscore"}']),
        ({"training": []}, ["no training items"]),
        ({"validation": entries(1)}, ["no training items"]),
        ({"training": [{"modality": "ct"}]}, ["training[0]", '"image"']),
        ({"training": entries(1), "validation": [7]}, ["validation[0]"]),
        ({"training": {"image": "a"}}, ["training"]),
        ({"training": entries(1, intensity="log")}, ["'log'", "percentile"]),
        ({"training": entries(1), "modalities": {"pet": "log"}}, ["'log'"]),
        ({"training": entries(1), "modalities": ["pet"]}, ["modalities"]),
        ({"training": entries(1), "labels": ["background", "spleen"]}, ["labels"]),
        ({"training": entries(1, fold="first")}, ["training[0]", "fold"]),
        (entries(1), ["object"]),
        ('{"training": [', ["not a JSON"]),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_used_is_refused_in_one_line(
    content: object, said: list[str], loaded: Load, tmp_path: Path
) -> None:
    line = refusal(lambda: loaded(content))
    assert line.startswith(str(tmp_path / "list.json"))
    assert all(words in line for words in said)


def test_regions_of_several_labels_are_refused_and_not_dropped(loaded: Load) -> None:
    labels = {"background": 0, "whole tumor": [1, 2, 3]}
    items = loaded({"training": entries(2, label="l.nii.gz"), "labels": labels})  # pre-training has no use for them
    assert "'whole tumor'" in refusal(lambda: check_labels(items, "list.json"))


def test_a_path_that_leads_to_no_list_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "--data" in refusal(lambda: load(""))
    assert "nowhere.json" in refusal(lambda: load(str(tmp_path / "nowhere.json")))
    assert "dataset.json" in refusal(lambda: load(str(tmp_path)))
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b\x08\x00")
    assert "not a JSON" in refusal(lambda: load(str(tmp_path / "a.nii.gz")))


def test_a_folder_whose_files_do_not_count_channels_is_refused(tmp_path: Path) -> None:
    """Without _0000 the number that tells the cases apart would be taken for a channel's."""
    (tmp_path / "imagesTr").mkdir()
    for n in range(12):
        (tmp_path / f"imagesTr/spleen_{n}.nii.gz").touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}}))
    assert "_0000" in refusal(lambda: load(str(tmp_path)))


# --- who is held out


def test_a_validation_split_of_the_list_wins_over_folds(loaded: Load) -> None:
    items = loaded({"training": entries(4, fold=0), "validation": entries(1)})
    assert hold_out(items, fold=0) == items


def test_the_items_of_the_fold_are_held_out(loaded: Load) -> None:
    content = {"training": [*entries(2, fold=0), *entries(3, fold=1), *entries(1)], "test": entries(1)}
    items = loaded(content)
    split = hold_out(items, fold=1)
    assert split.validation == items.training[2:5]
    assert split.training == items.training[:2] + items.training[5:]
    assert (split.test, split.labels) == (items.test, items.labels)
    assert "--fold 2" in refusal(lambda: hold_out(items, fold=2))


@pytest.mark.parametrize("subjects, held", [(2, 1), (10, 1), (20, 1), (40, 2), (100, 5)])
def test_else_five_percent_of_the_subjects_with_all_their_images(subjects: int, held: int, loaded: Load) -> None:
    """Table 1: a 95-5 split."""
    items = loaded({"training": entries(subjects, images=3)})
    split = hold_out(items)
    kept, away = ({item.subject for item in part} for part in (split.training, split.validation))
    assert len(away) == held and not kept & away
    assert set(split.training) | set(split.validation) == set(items.training)
    assert len(split.validation) == 3 * held


def test_the_split_repeats_follows_its_seed_and_not_the_order_of_the_list(loaded: Load) -> None:
    items, turned = loaded({"training": entries(100)}), loaded({"training": entries(100)[::-1]})
    assert hold_out(items) == hold_out(items, split_seed=0)
    assert set(hold_out(items).validation) == set(hold_out(turned).validation)
    assert len({hold_out(items, split_seed=seed).validation for seed in range(5)}) == 5


def test_a_single_subject_leaves_nothing_to_validate_on(loaded: Load) -> None:
    assert "validation" in refusal(lambda: hold_out(loaded({"training": entries(1, images=3)})))


def test_files_of_one_name_in_different_folders_are_different_subjects(loaded: Load) -> None:
    items = loaded({"training": [{"image": f"s{n}/t1.nii.gz", "modality": "t1"} for n in range(10)]})
    assert len(hold_out(items).validation) == 1


# --- which data it is


def test_the_fingerprint_is_that_of_the_list_and_not_of_its_place(loaded: Load) -> None:
    folders = [f"s{n}/t1_{n}.nii.gz" for n in range(3)]
    content = [{"image": image, "modality": "t1"} for image in folders]
    here, there = loaded({"training": content}), loaded({"training": content}, root="/elsewhere")
    assert here.fingerprint() == there.fingerprint()
    other = [content[:2], content[::-1], [*content[:2], {**content[2], "modality": "t2"}]]
    prints = [here.fingerprint(), *(loaded({"training": changed}).fingerprint() for changed in other)]
    assert len(set(prints)) == 4  # a volume less, another order, another modality
