"""dae/data/listfile.py: what a person wrote is read as it is, and no part is silently ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from dae.data.datalist import load

ITEM: dict[str, Any] = {"image": "a.nii.gz", "modality": "ct", "subject": "s1"}


def listed(folder: Path, content: object) -> str:
    (folder / "list.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / "list.json")


def refusal_of(folder: Path, content: object) -> str:
    line = refusal(load, listed(folder, content))
    assert "list.json" in line
    return line


OF_THE_LIST = {
    "training": ("train", "Training", "traning", "training_set"),
    "validation": ("val", "valid", "Validation", "validaton", "validations", "dev"),
    "test": ("testing", "tests", "Test"),
    "labels": ("Labels", "label"),
    "swap": ("swaps", "Swap"),
    "tolerance_mm": ("tolerance", "tolerance-mm"),
    "modality": ("Modality", "channel_names"),
}
OF_AN_ITEM = {
    "subject": ("patient_id", "patientID", "Subject", "subject_id", "subjects", "participant_id"),
    "fold": ("Fold", "folds", "cv_fold"),
    "label": ("Label", "labels", "label_path"),
    "image": ("images", "Image", "image_path"),
    "modality": ("Modality", "modalities"),
    "intensity": ("normalization", "Intensity"),
}


@pytest.mark.parametrize("meant", OF_THE_LIST)
def test_a_key_of_the_list_that_is_almost_ours_is_refused_with_what_was_meant(
    tmp_path: Path, meant: str
) -> None:
    """A list whose `val` is passed over trains on another split than it says."""
    for written in OF_THE_LIST[meant]:
        content = {written: [ITEM]} if meant == "training" else {"training": [ITEM], written: []}
        assert f'"{written}" is not read; "{meant}" was probably meant' in refusal_of(
            tmp_path, content
        )


@pytest.mark.parametrize("meant", OF_AN_ITEM)
def test_a_key_of_an_item_that_is_almost_ours_is_refused_with_what_was_meant(
    tmp_path: Path, meant: str
) -> None:
    for written in OF_AN_ITEM[meant]:
        item = {key: value for key, value in ITEM.items() if key != meant} | {written: "x"}
        line = refusal_of(tmp_path, {"training": [{"image": "b", "modality": "ct"}, item]})
        assert f'training[1]: "{written}" is not read; "{meant}" was probably meant' in line


def test_a_key_in_the_wrong_place_is_refused_with_the_right_one(tmp_path: Path) -> None:
    assert '"labels", as {"255": "ignore"}' in refusal_of(
        tmp_path, {"training": [ITEM], "ignore_index": 255}
    )
    assert '"folds" is not read here; it belongs into the items' in refusal_of(
        tmp_path, {"training": [ITEM], "folds": 5}
    )
    assert '"split" is not read here' in refusal_of(
        tmp_path, {"training": [{**ITEM, "split": "val"}]}
    )


def test_keys_about_something_else_stay_silent(tmp_path: Path) -> None:
    """Those of the Decathlon's and of MONAI's lists, and what people note of their patients."""
    head = dict.fromkeys(
        ("name", "description", "reference", "licence", "license", "release", "tensorImageSize"),
        "x",
    )
    head |= dict.fromkeys(
        ("numTraining", "numTest", "numValidation", "dataset", "note", "author"), "x"
    )
    item = ITEM | dict.fromkeys(
        ("age", "site", "image_id", "label_id", "case", "id", "weight", "brain_mask"), "x"
    )
    assert len(load(listed(tmp_path, {**head, "training": [item]})).training) == 1
    beside = {
        **ITEM,
        "label": "l.nii.gz",
        "labels": ["liver"],
    }  # with the right key there, the other is its own
    assert load(listed(tmp_path, {"training": [beside]})).training[0].label == tmp_path / "l.nii.gz"


def test_a_key_that_is_there_twice_is_refused_by_name(tmp_path: Path) -> None:
    """json.loads keeps the last one and says nothing."""
    item = json.dumps(ITEM)
    assert 'the key "training" is there twice' in refusal_of(
        tmp_path, f'{{"training": [{item}], "training": [{item}]}}'
    )
    labels = '{"1": "liver", "1": "spleen"}'
    assert 'the key "1" is there twice' in refusal_of(
        tmp_path, f'{{"training": [{item}], "labels": {labels}}}'
    )


def test_a_byte_order_mark_and_any_language_are_read(tmp_path: Path) -> None:
    content = json.dumps({"training": [{**ITEM, "image": "Schädel 头.nii.gz"}]}, ensure_ascii=False)
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load(str(tmp_path / "list.json")).training[0].image == (tmp_path / "Schädel 头.nii.gz",)
    (tmp_path / "list.json").write_bytes(content.encode("utf-16"))
    assert "list.json: not a JSON data list" in refusal(load, str(tmp_path / "list.json"))
