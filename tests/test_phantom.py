"""The synthetic bodies are anatomy enough to test on, and the lists say what their files are."""

import json
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, binary_fill_holes, distance_transform_edt, label

from dae import demo
from dae.demo import phantom, prepare_demo
from dae.demo.phantom import CT_LABELS, MR_LABELS, Lists, body_ct, head_mr, write_phantoms

Size = tuple[int, int, int]

TINY = (16, 16, 16)
SMALL = (48, 48, 48)
USUAL = (96, 96, 96)
CONTRASTS = ["t1", "t1ce", "t2", "flair"]
ORGAN = {name: value for value, name in [*CT_LABELS.items(), *MR_LABELS.items()]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, subjects=2, size=SMALL)
    return folder


def ct(number: int = 0, size: Size = SMALL) -> tuple[np.ndarray, np.ndarray]:
    return body_ct(np.random.default_rng([0, 0, number]), size=size)


def mr(number: int = 0, size: Size = SMALL) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return head_mr(np.random.default_rng([0, 1, number]), size=size)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read_list(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def middle_in_mm(file: Path, value: int) -> np.ndarray:
    """The middle of a label in the patient: mm to the right, to the front, to the head."""
    image = nib.load(file)
    voxels = np.argwhere(np.asarray(image.dataobj) == value)
    return nib.affines.apply_affine(image.affine, voxels.mean(axis=0))


def interrupt(*_: Any, **__: Any) -> NoReturn:
    raise InterruptedError


# --- torsos and heads -----------------------------------------------------------------------------


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
    assert list(images) == CONTRASTS
    assert {array.dtype for array in images.values()} == {np.dtype(np.float32)}


def test_subjects_differ() -> None:
    """Another anatomy, yet the same kind of body."""
    for body in (ct, mr):
        _, first = body(0)
        _, second = body(1)
        inside = (first > 0) | (second > 0)
        assert 0.05 < np.mean(first[inside] != second[inside]) < 0.6


def test_hu_of_air_fat_bone_are_plausible() -> None:
    image, organs = ct()
    assert abs(np.median(image[:, -2:]) + 1000) < 10  # in front of the patient
    assert 0.10 < np.mean((image > -160) & (image < -50)) < 0.50
    assert 0.02 < np.mean(image > 350) < 0.20
    assert 0.02 < np.mean((image > -900) & (image < -700)) < 0.20  # lung

    def mean_of(name: str) -> float:
        return float(image[organs == ORGAN[name]].mean())

    assert mean_of("liver") > 60
    assert mean_of("liver") < mean_of("spleen") + 20
    assert mean_of("spleen") + 20 < mean_of("right kidney")
    assert mean_of("right kidney") < mean_of("aorta") < 350


def test_noise_in_the_ct_is_about_fifteen_hu() -> None:
    image, organs = ct(size=USUAL)
    liver = binary_erosion(organs == ORGAN["liver"], iterations=3)
    both_in_liver = liver[:, :, 1:] & liver[:, :, :-1]
    between_neighbours = np.diff(image.astype(float), axis=2)[both_in_liver]
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
    images, _ = mr()
    brightest = sorted(np.percentile(image, 99.5) for image in images.values())
    assert brightest[0] > 300
    assert brightest[-1] < 1300
    assert np.diff(brightest).min() > 20


def test_contrasts_share_one_anatomy() -> None:
    images, tissues = mr()
    brain = tissues > 0
    for image in images.values():
        in_place = share_explained(image[brain], tissues[brain])
        assert in_place > 0.75
        for moved in (np.roll(tissues, 3, axis=1), np.roll(tissues, -3, axis=1)):
            assert in_place > share_explained(image[brain], moved[brain]) + 0.2


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
    _, organs = ct(size=USUAL)
    for name in ("liver", "spleen", "left kidney", "right kidney", "stomach", "aorta"):
        assert share_in_balls(organs == ORGAN[name]) > 0.75, name

    _, tissues = mr(size=USUAL)
    for name, value in ORGAN.items():
        if name in MR_LABELS.values() and name not in ("background", "oedema"):
            assert share_in_balls(tissues == value) > 0.75, name


def share_in_balls(region: np.ndarray) -> float:
    """How much of a region is covered by the balls, five voxels thick, that fit into it."""
    region = np.pad(region, 4, mode="edge")
    centres = distance_transform_edt(region) > 2.2
    covered = region & (distance_transform_edt(~centres) <= 2.2)
    return float(covered.sum() / region.sum())


# --- files ----------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, subjects=2, size=SMALL)
    assert contents(tmp_path) == contents(folder)


def test_more_subjects_leave_the_first_as_they_were(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, subjects=1, validation=1, test=0, size=SMALL)
    few = contents(tmp_path)
    many = contents(folder)
    volumes = [name for name in few if name.endswith(".nii.gz")]
    assert len(volumes) == 2 * 2 + 2 * 5
    for name in volumes:
        assert few[name] == many[name], name


def test_no_two_files_are_alike(folder: Path) -> None:
    files = contents(folder)
    assert len(files) == 4 * 2 + 4 * 5 + 3
    assert len(set(files.values())) == len(files)


def test_another_seed_gives_other_subjects(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=SMALL, seed=1)
    before = contents(folder)
    for name, content in contents(tmp_path).items():
        assert content != before[name], name


@pytest.mark.parametrize("number", range(4))
def test_the_liver_is_on_the_patients_right(folder: Path, number: int) -> None:
    file = folder / f"ct_{number:03d}_label.nii.gz"
    right = {name: middle_in_mm(file, ORGAN[name])[0] for name in CT_LABELS.values()}
    assert min(right["liver"], right["right kidney"]) > 5
    assert max(right["spleen"], right["stomach"], right["left kidney"]) < -5
    assert right["aorta"] < right["inferior vena cava"]


def test_the_head_is_upright_and_looks_ahead(folder: Path) -> None:
    image = nib.load(folder / "mr_000_t1.nii.gz")
    head = np.argwhere(np.asarray(image.dataobj) > 0)
    x, y, z = nib.affines.apply_affine(image.affine, head).T

    neck = np.sum(z < z.min() + 3)
    crown = np.sum(z > z.max() - 3)
    assert neck > 1.5 * crown

    ventricles = middle_in_mm(folder / "mr_000_label.nii.gz", ORGAN["ventricles"])
    assert ventricles[2] > z.mean()

    nose = y > y.max() - 3
    assert z[nose].mean() < z.mean()
    assert abs(x[nose].mean() - x.mean()) < 5


def test_a_head_is_stored_along_other_axes_but_is_the_same_head(folder: Path) -> None:
    stored = nib.load(folder / "mr_000_t2.nii.gz")
    torso = nib.load(folder / "ct_000.nii.gz")
    assert nib.aff2axcodes(stored.affine) == ("L", "P", "S")
    assert nib.aff2axcodes(torso.affine) == ("R", "A", "S")

    turned = nib.as_closest_canonical(stored)
    images, _ = mr(0)
    assert np.array_equal(turned.get_fdata(), images["t2"])
    assert np.allclose(turned.affine, torso.affine)  # the same voxels at the same coordinates
    assert np.allclose(torso.header.get_zooms(), phantom.SPACING)


@pytest.mark.parametrize(
    "name, splits",
    [
        ("pretrain", ["training", "validation"]),
        ("ct_seg", ["training", "validation", "test"]),
        ("mr_seg", ["training", "validation", "test"]),
    ],
)
def test_the_lists_name_files_that_exist_and_a_subject_in_one_split(
    name: str, splits: list[str], folder: Path
) -> None:
    content = read_list(folder, name)
    assert [key for key in content if key not in ("name", "labels")] == splits

    split_of: dict[str, str] = {}
    for split in splits:
        assert content[split]
        for case in content[split]:
            assert split_of.setdefault(case["subject"], split) == split
            images = [case["image"]] if isinstance(case["image"], str) else case["image"]
            for file in (*images, case["label"]):
                assert nib.load(folder / file).shape == SMALL


def test_the_pretraining_list_has_every_modality_by_itself(folder: Path) -> None:
    content = read_list(folder, "pretrain")
    for split, subjects in {"training": 2, "validation": 1}.items():
        modalities = [case["modality"] for case in content[split]]
        assert sorted(modalities) == sorted(subjects * ["ct", *CONTRASTS])
        assert len({case["image"] for case in content[split]}) == len(modalities)


def test_the_segmentation_lists_name_their_labels(folder: Path) -> None:
    for name, labels in {"ct_seg": CT_LABELS, "mr_seg": MR_LABELS}.items():
        content = read_list(folder, name)
        assert content["labels"] == {str(value): organ for value, organ in labels.items()}

    head = read_list(folder, "mr_seg")["training"][0]
    assert head["modality"] == CONTRASTS
    assert head["image"] == [f"mr_000_{contrast}.nii.gz" for contrast in CONTRASTS]


def test_what_is_there_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "body_ct", interrupt)
    write_phantoms(folder, subjects=2, size=SMALL)
    with pytest.raises(InterruptedError):
        write_phantoms(folder / "elsewhere", subjects=2, size=SMALL)


def test_a_run_cut_short_leaves_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=TINY)
    assert all(file.is_file() for file in lists)

    with monkeypatch.context() as broken, pytest.raises(InterruptedError):
        broken.setattr(phantom, "head_mr", interrupt)
        write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=TINY, seed=1)
    assert not any(file.exists() for file in lists)
    assert not list(tmp_path.glob(".*"))  # and nothing half-written

    write_phantoms(tmp_path, subjects=1, validation=0, test=0, size=TINY, seed=1)
    assert all(file.is_file() for file in lists)


# --- the demo -------------------------------------------------------------------------------------


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lists:
    """Those that the demo is told to have written, in the folder `phantoms`."""
    lists = Lists(*(tmp_path / "phantoms" / f"{name}.json" for name in Lists._fields))
    written = {tmp_path / "phantoms": lists}
    monkeypatch.setattr(demo, "write_phantoms", written.__getitem__)
    return lists


def test_the_demo_starts_over_with_a_word_where_an_earlier_run_left_results(
    lists: Lists, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("log.jsonl", "last.pt", "best.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert prepare_demo(tmp_path / "phantoms", tmp_path, start_over=True) == lists
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: the demo's earlier run is removed and started over")

    prepare_demo(tmp_path / "phantoms", tmp_path, start_over=True)
    assert capsys.readouterr().err == ""


def test_a_demo_that_goes_on_keeps_its_results(
    lists: Lists, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.pt").touch()
    assert prepare_demo(tmp_path / "phantoms", tmp_path, start_over=False) == lists
    assert (tmp_path / "last.pt").exists()
    assert capsys.readouterr().err == ""
