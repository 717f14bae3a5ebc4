"""The synthetic bodies are anatomy enough to test on, and their files are what the lists say they are."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, binary_fill_holes, distance_transform_edt, label

from dae.demo import phantom
from dae.demo.phantom import CT_LABELS, MR_LABELS, body_ct, head_mr, write_phantoms

SMALL = (48, 48, 48)
CONTRASTS = ["t1", "t1ce", "t2", "flair"]
ORGAN = {name: value for labels in (CT_LABELS, MR_LABELS) for value, name in labels.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("phantoms")
    write_phantoms(made, subjects=2, size=SMALL)
    return made


def ct(number: int = 0, size: tuple[int, int, int] = SMALL) -> tuple[np.ndarray, np.ndarray]:
    return body_ct(np.random.default_rng([0, 0, number]), size=size)


def mr(
    number: int = 0, size: tuple[int, int, int] = SMALL
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return head_mr(np.random.default_rng([0, 1, number]), size=size)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def middle_in_mm(file: Path, value: int) -> np.ndarray:
    """Where a label lies in the patient: mm to the right, to the front, to the head."""
    image = nib.load(file)
    voxels = np.argwhere(np.asarray(image.dataobj) == value)
    return nib.affines.apply_affine(image.affine, voxels.mean(axis=0))


# --- torsos and heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6))
def test_every_label_is_present(number: int) -> None:
    assert set(np.unique(ct(number)[1])) == set(CT_LABELS)
    assert set(np.unique(mr(number)[1])) == set(MR_LABELS)


def test_images_have_the_size_asked_for_on_every_axis() -> None:
    size = (32, 40, 48)
    image, organs = ct(size=size)
    images, tissues = mr(size=size)
    assert {array.shape for array in (image, organs, tissues, *images.values())} == {size}
    assert (image.dtype, organs.dtype, tissues.dtype) == (np.int16, np.uint8, np.uint8)
    assert list(images) == CONTRASTS and {array.dtype for array in images.values()} == {
        np.dtype(np.float32)
    }


def test_subjects_differ() -> None:
    for draw in (ct, mr):
        (_, first), (_, second) = draw(0), draw(1)
        inside = (first > 0) | (second > 0)
        assert (
            0.05 < np.mean(first[inside] != second[inside]) < 0.6
        )  # another anatomy, yet the same kind of body


def test_hu_of_air_fat_bone_are_plausible() -> None:
    image, organs = ct()
    assert abs(np.median(image[:, -2:]) + 1000) < 10  # in front of the patient
    assert 0.10 < np.mean((image > -160) & (image < -50)) < 0.50
    assert 0.02 < np.mean(image > 350) < 0.20
    assert 0.02 < np.mean((image > -900) & (image < -700)) < 0.20  # lung
    means = {
        name: image[organs == ORGAN[name]].mean()
        for name in ("liver", "spleen", "right kidney", "aorta")
    }
    assert 60 < means["liver"] < means["spleen"] + 20 < means["right kidney"] < means["aorta"] < 350


def test_noise_in_the_ct_is_about_fifteen_hu() -> None:
    image, organs = ct(size=(96, 96, 96))
    liver = binary_erosion(organs == ORGAN["liver"], iterations=3)
    between_neighbours = np.diff(image.astype(float), axis=2)[liver[:, :, 1:] & liver[:, :, :-1]]
    assert 10 < between_neighbours.std() / np.sqrt(2) < 20


def test_outside_the_head_is_exactly_zero() -> None:
    images, _ = mr()
    heads = [image != 0 for image in images.values()]
    for head in heads:
        assert np.array_equal(head, heads[0])
        assert np.array_equal(binary_fill_holes(head), head)  # nothing within the head is zero
        assert label(head)[1] == 1  # no speck beside it
    assert 0.3 < heads[0].mean() < 0.8


def test_each_contrast_has_a_scale_of_its_own() -> None:
    brightest = [np.percentile(image, 99.5) for image in mr()[0].values()]
    assert all(300 < value < 1300 for value in brightest)
    assert min(abs(a - b) for i, a in enumerate(brightest) for b in brightest[:i]) > 20


def test_contrasts_share_one_anatomy() -> None:
    images, tissues = mr()
    brain = tissues > 0
    for image in images.values():
        explained = [
            share_explained(image[brain], np.roll(tissues, by, axis=1)[brain]) for by in (0, 3, -3)
        ]
        assert explained[0] > 0.75
        assert (
            explained[0] > max(explained[1:]) + 0.2
        )  # moved by three voxels the labels no longer fit


def share_explained(values: np.ndarray, groups: np.ndarray) -> float:
    """How much of the values' variance is that between the means of their groups."""
    residual = values.astype(float)
    for group in np.unique(groups):
        residual[groups == group] -= residual[groups == group].mean()
    return float(1 - residual.var() / values.var())


@pytest.mark.parametrize("number", range(3))
def test_the_lesion_takes_up_contrast_agent_and_the_oedema_shines_in_flair_and_t2(
    number: int,
) -> None:
    images, tissues = mr(number)

    def against_white(contrast: str, name: str) -> float:
        image = images[contrast]
        return image[tissues == ORGAN[name]].mean() / image[tissues == ORGAN["white matter"]].mean()

    assert against_white("t1ce", "lesion") > 1.4 * against_white("t1", "lesion")
    assert against_white("flair", "oedema") > 1.3
    assert against_white("t2", "oedema") > 1.3


def test_most_of_every_large_structure_is_five_voxels_thick() -> None:
    size = (96, 96, 96)
    torso = {"liver", "spleen", "left kidney", "right kidney", "stomach", "aorta"}
    brain = {
        "cerebrospinal fluid",
        "grey matter",
        "white matter",
        "ventricles",
        "deep grey",
        "lesion",
    }
    for labels, names in ((ct(size=size)[1], torso), (mr(size=size)[1], brain)):
        for name in names:
            region = np.pad(labels == ORGAN[name], 4, mode="edge")
            cores = (
                distance_transform_edt(region) > 2.2
            )  # centres of the balls of five voxels that fit into it
            covered = region & (distance_transform_edt(~cores) <= 2.2)
            assert covered.sum() > 0.75 * region.sum(), name


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, subjects=2, size=SMALL)
    assert contents(tmp_path) == contents(folder)


def test_more_subjects_leave_the_first_as_they_were(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, subjects=1, validation=1, test=0, size=SMALL)
    few, many = contents(tmp_path), contents(folder)
    volumes = [name for name in few if name.endswith(".nii.gz")]
    assert len(volumes) == 2 * 2 + 2 * 5
    assert all(few[name] == many[name] for name in volumes)


def test_no_two_files_are_alike(folder: Path) -> None:
    assert len(set(contents(folder).values())) == len(contents(folder)) == 4 * 2 + 4 * 5 + 3


def test_another_seed_gives_other_subjects(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=SMALL, seed=1)
    assert all(content != contents(folder)[name] for name, content in contents(tmp_path).items())


@pytest.mark.parametrize("number", range(4))
def test_the_liver_lies_on_the_patients_right(folder: Path, number: int) -> None:
    file = folder / f"ct_{number:03d}_label.nii.gz"
    right = {name: middle_in_mm(file, ORGAN[name])[0] for name in CT_LABELS.values()}
    assert min(right["liver"], right["right kidney"]) > 5
    assert max(right["spleen"], right["stomach"], right["left kidney"]) < -5
    assert right["aorta"] < right["inferior vena cava"]


def test_the_head_is_upright_and_looks_ahead(folder: Path) -> None:
    image = nib.load(folder / "mr_000_t1.nii.gz")
    head = np.argwhere(np.asarray(image.dataobj) > 0)
    places = nib.affines.apply_affine(image.affine, head)
    x, y, z = places.T
    assert np.sum(z < z.min() + 3) > 1.5 * np.sum(
        z > z.max() - 3
    )  # the neck is wider than the crown
    assert middle_in_mm(folder / "mr_000_label.nii.gz", ORGAN["ventricles"])[2] > z.mean()
    nose = y > y.max() - 3
    assert z[nose].mean() < z.mean()
    assert abs(x[nose].mean() - x.mean()) < 5


def test_a_head_is_stored_along_other_axes_but_is_the_same_head(folder: Path) -> None:
    stored, torso = nib.load(folder / "mr_000_t2.nii.gz"), nib.load(folder / "ct_000.nii.gz")
    assert nib.aff2axcodes(stored.affine) == ("L", "P", "S")
    assert nib.aff2axcodes(torso.affine) == ("R", "A", "S")
    turned = nib.as_closest_canonical(stored)
    assert np.array_equal(turned.get_fdata(), mr(0)[0]["t2"])
    assert np.allclose(turned.affine, torso.affine)  # the same voxels in the same places
    assert np.allclose(torso.header.get_zooms(), phantom.SPACING)


def test_the_lists_name_files_that_exist(folder: Path) -> None:
    for name, splits in {"pretrain": 2, "ct_seg": 3, "mr_seg": 3}.items():
        found = read(folder, name)
        cases = {
            split: found[split] for split in ("training", "validation", "test") if split in found
        }
        assert len(cases) == splits and all(cases.values())
        subjects = [{case["subject"] for case in split} for split in cases.values()]
        assert sum(map(len, subjects)) == len(set().union(*subjects))  # no subject is in two splits
        for case in (case for split in cases.values() for case in split):
            images = [case["image"]] if isinstance(case["image"], str) else case["image"]
            shapes = {nib.load(folder / file).shape for file in (*images, case["label"])}
            assert shapes == {SMALL}


def test_the_pretraining_list_has_every_modality_by_itself(folder: Path) -> None:
    found = read(folder, "pretrain")
    for split, subjects in {"training": 2, "validation": 1}.items():
        modalities = [case["modality"] for case in found[split]]
        assert sorted(modalities) == sorted(subjects * ["ct", *CONTRASTS])
        assert len({case["image"] for case in found[split]}) == len(modalities)


def test_the_segmentation_lists_name_their_labels(folder: Path) -> None:
    for name, labels in {"ct_seg": CT_LABELS, "mr_seg": MR_LABELS}.items():
        found = read(folder, name)
        assert found["labels"] == {str(value): organ for value, organ in labels.items()}
    head = read(folder, "mr_seg")["training"][0]
    assert head["modality"] == CONTRASTS
    assert head["image"] == [f"mr_000_{contrast}.nii.gz" for contrast in CONTRASTS]


def test_what_is_there_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "body_ct", refuse)
    write_phantoms(folder, subjects=2, size=SMALL)
    with pytest.raises(InterruptedError):
        write_phantoms(folder / "elsewhere", subjects=2, size=SMALL)


def test_a_run_cut_short_leaves_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=(16, 16, 16))
    assert all(file.is_file() for file in lists)
    with monkeypatch.context() as broken, pytest.raises(InterruptedError):
        broken.setattr(phantom, "head_mr", refuse)
        write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=(16, 16, 16), seed=1)
    assert not any(file.exists() for file in lists)
    assert not list(tmp_path.glob("*.part"))
    write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=(16, 16, 16), seed=1)
    assert all(file.is_file() for file in lists)


def refuse(*_: Any, **__: Any) -> None:
    raise InterruptedError
