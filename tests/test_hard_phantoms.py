"""The hard phantoms: brightness does not tell organs apart, and the lists keep the test apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter

from dae.demo import hard
from dae.demo.anatomy import CT_TISSUES
from dae.demo.hard import (
    CLAIMED,
    GRAIN_OF,
    GRAINS,
    LABELS,
    file_names,
    grain,
    hard_ct,
    hard_mr,
    label_of,
    write_hard_phantoms,
)
from dae.demo.phantom import body_ct, write_phantoms
from dae.errors import InputError

SIZE = (48, 48, 48)
TINY = (16, 16, 16)

Make = Callable[..., tuple[np.ndarray, np.ndarray]]


def body(make: Make, number: int) -> tuple[np.ndarray, np.ndarray]:
    return make(np.random.default_rng([0, 2, number]), size=SIZE)


def dice_by_brightness(make: Make, *, known: int = 6, unknown: int = 2) -> float:
    """Mean Dice of the best guess from a voxel's brightness alone (Bayes' rule by histograms)."""
    edges = np.arange(-1100, 1000, 10)
    counts = np.zeros((len(edges) + 1, body(make, 0)[1].max() + 1))
    for number in range(known):
        image, label = body(make, number)
        np.add.at(counts, (np.digitize(image, edges).ravel(), label.ravel()), 1)
    likelihood = counts / counts.sum(axis=0)

    scores = []
    for number in range(known, known + unknown):
        image, label = body(make, number)
        guess = likelihood[np.digitize(image, edges)].argmax(axis=-1)
        for organ in range(1, label.max() + 1):
            both = np.sum((guess == organ) & (label == organ))
            scores.append(2 * both / (np.sum(guess == organ) + np.sum(label == organ)))
    return float(np.mean(scores))


def test_brightness_alone_finds_organs_of_the_demo_and_hardly_any_of_these() -> None:
    assert dice_by_brightness(body_ct) > 0.3
    assert dice_by_brightness(hard_ct) < 0.1


def roughness(image: np.ndarray, organ: np.ndarray) -> float:
    """How far neighbours within an organ differ, by its spread. Medians: a cyst hardly counts."""
    inner = binary_erosion(organ, iterations=2)
    both = inner[:, :, 1:] & inner[:, :, :-1]
    values = image.astype(float)
    steps = np.abs(np.diff(values, axis=2))[both]
    deviations = np.abs(values - np.median(values[inner]))[inner]
    return float(np.median(steps) / np.median(deviations))


def test_the_grain_tells_the_liver_from_the_spleen() -> None:
    labels = {name: number for number, name in LABELS.items()}
    for number in range(2):
        image, label = hard_ct(np.random.default_rng([0, 2, number]), size=(96, 96, 96))
        of_liver, of_spleen = (roughness(image, label == labels[o]) for o in ("liver", "spleen"))
        assert of_liver > 1.1 * of_spleen


@pytest.mark.parametrize("sigma", GRAINS.values())
def test_a_grain_has_mean_0_and_std_1_and_no_slow_part(sigma: tuple[float, float, float]) -> None:
    field = grain(np.random.default_rng(0), SIZE, sigma)
    assert abs(field.mean()) < 0.05
    assert field.std() == pytest.approx(1, abs=1e-3)
    assert gaussian_filter(field, 6).std() < 0.05


def test_a_grain_is_drawn_out_along_its_own_axis() -> None:
    for axis, name in enumerate("dhw"):
        field = grain(np.random.default_rng(0), SIZE, GRAINS[name])
        steps = [np.abs(np.diff(field, axis=a)).mean() for a in range(3)]
        assert np.argmin(steps) == axis


def test_what_is_no_organ_shares_the_grain_of_organs() -> None:
    organs = {name for name in GRAIN_OF if label_of(name)}
    of_organs = {GRAIN_OF[name] for name in GRAIN_OF if name in organs}
    of_others = {GRAIN_OF[name] for name in GRAIN_OF if name not in organs}
    assert {"fine", "coarse"} <= of_organs & of_others


def test_bodies_have_every_label_and_differ_by_seed() -> None:
    first, second = (body(hard_ct, number) for number in (0, 1))
    assert set(np.unique(first[1])) == set(LABELS)
    assert not np.array_equal(first[0], second[0])
    again = body(hard_ct, 0)
    assert np.array_equal(first[0], again[0])
    assert first[0].dtype == np.int16


def test_heads_have_four_contrasts_and_zero_outside() -> None:
    images = hard_mr(np.random.default_rng(0), size=(32, 40, 48))
    assert list(images) == ["t1", "t1ce", "t2", "flair"]
    for image in images.values():
        assert image.shape == (32, 40, 48)
        assert image[0, 0, 0] == 0
        assert image.max() > 100


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, **changes: Any) -> dict[str, Any]:
    counts = {"subjects": 2, "validation": 1, "test": 2, "unlabelled": 1, "heads": 10, **changes}
    lists = write_hard_phantoms(folder, size=TINY, **counts)
    return {name: json.loads(path.read_text()) for name, path in lists._asdict().items()}


def subjects_of(content: dict[str, Any], split: str) -> set[str]:
    return {entry["subject"] for entry in content[split]}


def test_no_torso_of_the_test_is_in_the_pretraining_list(tmp_path: Path) -> None:
    lists = write(tmp_path)
    seen = subjects_of(lists["pretrain"], "training") | subjects_of(lists["pretrain"], "validation")
    tested = subjects_of(lists["ct_seg"], "test")
    assert len(tested) == 2
    assert not tested & seen
    assert subjects_of(lists["ct_seg"], "training") <= seen


def test_no_subject_is_in_two_splits_and_every_file_exists(tmp_path: Path) -> None:
    for content in write(tmp_path).values():
        split_of: dict[str, str] = {}
        for split in ("training", "validation", "test"):
            for entry in content.get(split, []):
                assert split_of.setdefault(entry["subject"], split) == split
                assert nib.load(tmp_path / entry["image"]).shape == TINY


def test_more_subjects_leave_the_test_as_it_was(tmp_path: Path) -> None:
    few = write(tmp_path / "few")
    many = write(tmp_path / "many", subjects=4, unlabelled=0)
    assert few["ct_seg"]["test"] == many["ct_seg"]["test"]
    for entry in few["ct_seg"]["test"]:
        one, other = (tmp_path / name / entry["image"] for name in ("few", "many"))
        assert one.read_bytes() == other.read_bytes()


def test_organs_are_those_of_the_demo_and_the_kidneys_are_one() -> None:
    for tissue, (label, _) in CT_TISSUES.items():
        assert (label_of(tissue) > 0) == (label > 0)
    assert label_of("right kidney") == label_of("left kidney") == 2
    assert label_of("spleen") == 1


@pytest.mark.parametrize("content", ['{"training": []}', '{"name": "mine"}', "[]", "no JSON"])
def test_a_list_that_is_not_of_phantoms_is_not_replaced(tmp_path: Path, content: str) -> None:
    mine = tmp_path / "ct_seg.json"
    mine.write_text(content)
    for make in (write_hard_phantoms, write_phantoms):
        with pytest.raises(InputError, match=r"ct_seg\.json: .*name another folder"):
            make(tmp_path, subjects=1, validation=0, test=0, size=TINY)
    assert mine.read_text() == content
    assert list(tmp_path.iterdir()) == [mine]


FEW: dict[str, Any] = {"subjects": 1, "validation": 0, "test": 1, "unlabelled": 0, "heads": 1}


@pytest.mark.parametrize("name", ["ct_001.nii.gz", "ct_000_label.nii.gz", "mr_000_t1ce.nii.gz"])
def test_a_volume_of_the_user_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=f"{name}: is there already, and no list of phantoms"):
        write(tmp_path, **FEW)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_other_files_of_the_user_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "ct_002.nii.gz").write_bytes(b"mine")
    write(tmp_path, **FEW)
    assert (tmp_path / "ct_002.nii.gz").read_bytes() == b"mine"
    with pytest.raises(InputError, match=r"ct_002\.nii\.gz"):
        write(tmp_path, **{**FEW, "subjects": 2})
    write(tmp_path, **FEW)  # what was there before is as it was


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CLAIMED}


@pytest.mark.parametrize("before", [None, {**FEW, "subjects": 3}])
def test_phantoms_that_were_cut_short_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any] | None
) -> None:
    write(tmp_path / "whole", **FEW)
    if before:
        write(tmp_path / "cut", **before, seed=1)  # other phantoms, which may be replaced

    with monkeypatch.context() as patch:
        patch.setattr(hard, "write_head", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "cut", **FEW)
    assert (tmp_path / "cut/ct_001.nii.gz").exists()
    assert not (tmp_path / "cut/ct_seg.json").exists()

    write(tmp_path / "cut", **FEW)
    whole = files_in(tmp_path / "whole")
    assert {name: files_in(tmp_path / "cut")[name] for name in whole} == whole
    if before:
        write(tmp_path / "cut", **before)  # what no list names any more is still known


def stop(*args: Any, **flags: Any) -> None:
    raise KeyboardInterrupt


def test_phantoms_of_an_older_version_are_known_by_their_lists(tmp_path: Path) -> None:
    write(tmp_path, **FEW)
    (tmp_path / CLAIMED).unlink()
    write(tmp_path, **{**FEW, "heads": 2})


def test_every_file_that_is_written_was_claimed(tmp_path: Path) -> None:
    write(tmp_path, **FEW)
    volumes = {path.name for path in tmp_path.glob("*.nii.gz")}
    assert volumes == set(json.loads((tmp_path / CLAIMED).read_text())) == set(file_names(2, 1))
