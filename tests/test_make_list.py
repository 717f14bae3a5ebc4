"""make_list.py, patterns.py: a folder becomes a list, and nobody is merged or split."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import refusal

from dae.config.lists import MakeListConfig
from dae.data import make_list
from dae.data.datalist import load
from dae.data.datasets import DATASETS
from dae.data.holdout import for_pretraining
from dae.data.make_list import main
from dae.data.patterns import closest, expression_of, files_in, first_match
from dae.data.preprocess import Recipe, prepare

ROOT = Path(__file__).parents[1]
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001"
Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The command on a folder of empty files of these names; returns the list as a run reads it."""

    def make(folder: str, *files: str, out: str = "list.json", **flags: Any) -> Any:
        touch(tmp_path / folder, *files)
        return main(tmp_path / folder, MakeListConfig(out=str(tmp_path / out), **flags))

    return make


def touch(folder: Path, *files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def brats(*cases: int, contrasts: str = "t1 t1ce t2 flair seg") -> list[str]:
    names = []
    for case in cases:
        subject = f"BraTS2021_{case:05d}"
        names += [f"{subject}/{subject}_{contrast}.nii.gz" for contrast in contrasts.split()]
    return names


def subjects(items: Any) -> list[str]:
    return sorted({item.subject for item in items.training})


def words(pattern: str, path: str) -> dict[str, str] | None:
    return first_match(path, [expression_of(pattern)])


# --- patterns


def test_a_word_stands_for_text_and_the_same_word_for_the_same_text() -> None:
    pattern = "{subject}/{subject}_{modality}.nii.gz"
    assert words(pattern, "p1/p1_t2.nii.gz") == {"subject": "p1", "modality": "t2"}
    assert words(pattern, "p1/p2_t2.nii.gz") is None


def test_a_subject_may_contain_what_stands_between_words() -> None:
    assert words("{subject}_{modality}.nii.gz", "BraTS2021_00000_t1ce.nii.gz") == {
        "subject": "BraTS2021_00000",
        "modality": "t1ce",
    }


def test_a_word_is_as_short_as_it_can_be_and_never_more_than_one_folder() -> None:
    assert words("{subject}_{scan}.nii", "a_b_c.nii") == {"subject": "a", "scan": "b_c"}
    assert words("{subject}.nii", "a/b.nii") is None
    assert words("{subject}.nii", ".nii") is None


@pytest.mark.parametrize(
    "name", ["T1Gd", "t1gd", "T1CE", "t1c", "T1w", "t1n", "FLAIR", "t2f", "T2star", "CT"]
)
def test_modalities_are_known_as_people_write_them(name: str) -> None:
    assert words("{subject}-{modality}.nii", f"s-{name}.nii") == {"subject": "s", "modality": name}


@pytest.mark.parametrize("name", ["seg", "t1x", "adc", ""])
def test_what_is_no_modality_is_not_taken_for_one(name: str) -> None:
    assert words("{subject}-{modality}.nii", f"s-{name}.nii") is None


@pytest.mark.parametrize("subject", ["a.b", "(1)", "x+y", "Jürgen 2", "a[0]", "$1", "a-b_c"])
def test_odd_names_are_text_and_no_expression(make: Make, subject: str) -> None:
    items = make("d [v1.0]", f"{subject}.CT.nii.gz", pattern=("{subject}.{modality}.nii.gz",))
    assert subjects(items) == [subject]
    assert items.training[0].image[0].is_file()


def test_text_of_a_pattern_is_no_expression() -> None:
    assert words("v1.0+{subject}.nii", "v1.0+a.nii") == {"subject": "a"}
    assert words("v1.0+{subject}.nii", "v1x00a.nii") is None
    assert words("{subject}.nii", "axnii") is None


# --- what is in the list


def test_brats_has_four_contrasts_of_each_patient_and_no_label_among_them(make: Make) -> None:
    items = make("brats", *brats(0, 2, 3), dataset="brats21")
    assert len(items.training) == 12
    assert subjects(items) == [f"brats21/BraTS2021_{n:05d}" for n in (0, 2, 3)]
    assert items.modalities() == ["t1", "t1ce", "t2", "flair"]


def test_the_command_says_what_was_read_and_left_out(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    names = brats(0, 2, contrasts="t1 T1Gd seg")
    make("b", *names, "readme.txt", "._x.nii.gz", ".git/config", dataset="brats21")
    said = capsys.readouterr().out
    assert "4 images of 2 subjects (t1 2, t1ce 2)" in said
    assert "T1Gd is read as t1ce" in said
    assert "left out, files that fit no pattern: 3, as BraTS2021_00000/BraTS2021_00000_seg" in said
    assert "the paper has 1251 of each modality" in said
    assert "subjects as brats21/BraTS2021_00000" in said
    assert "1 of 2 subjects validate" in said


def test_five_percent_of_1251_patients_are_the_63_of_table_1_in_all_four_contrasts(
    make: Make,
) -> None:
    items = make("b", *brats(*range(1251), contrasts="t1 t1ce t2 flair"), dataset="brats21")
    split = for_pretraining(items, fold=None, split_seed=None, allow_trained=False)
    row = DATASETS["brats21"]
    assert len(split.validation) == 4 * row.validation
    assert len(split.training) == 4 * row.training
    held = {item.subject for item in split.validation}
    assert not held & {item.subject for item in split.training}


def test_paths_are_relative_to_the_list_so_the_two_can_move_together(
    make: Make, tmp_path: Path
) -> None:
    make("a/images", "s1.nii", out="a/lists/ct.json", pattern=("{subject}.nii",), modality="ct")
    (tmp_path / "a").rename(tmp_path / "b")
    items = load(str(tmp_path / "b/lists/ct.json"), root="/")
    assert items.training[0].image[0].is_file()
    assert not Path(
        json.loads((tmp_path / "b/lists/ct.json").read_text())["training"][0]["image"]
    ).is_absolute()


def test_links_are_followed_and_circles_end(make: Make, tmp_path: Path) -> None:
    touch(tmp_path / "far/away", "s1.nii")
    folder = tmp_path / "near"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "far/away")
    (tmp_path / "far/away/back").symlink_to(folder)
    lists = tmp_path / "lists"
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    lists.symlink_to(tmp_path / "elsewhere/deep")

    items = make("near", out="lists/l.json", pattern=("linked/{subject}.nii",), modality="ct")
    assert [item.image[0].is_file() for item in items.training] == [True]
    assert files_in(folder) == ["linked/s1.nii"]


def test_a_folder_behind_a_link_and_back_is_found(tmp_path: Path) -> None:
    touch(tmp_path / "far/data", "s1.nii")
    (tmp_path / "far/deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far/deep")
    flags: dict[str, Any] = {"pattern": ("{subject}.nii",), "modality": "ct"}
    config = MakeListConfig(out=str(tmp_path / "l.json"), **flags)
    items = main(tmp_path / "link/../data", config)
    assert items is not None and items.training[0].image[0].is_file()


def test_a_scan_that_dcm2niix_corrected_is_there_once(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"p1/1.2.3{end}.nii.gz" for end in ("", "_Eq_1")]
    names += [f"p2/1.2.4{end}.nii.gz" for end in ("", "_Tilt_1", "_Tilt_Eq_1")]
    names += ["p3/1.2.5.nii.gz"]
    items = make("h", *names, dataset="hnscc")
    assert [item.image[0].name for item in items.training] == [
        "1.2.3_Eq_1.nii.gz",
        "1.2.4_Tilt_1.nii.gz",
        "1.2.4_Tilt_Eq_1.nii.gz",
        "1.2.5.nii.gz",
    ]
    assert "also written corrected: 2, as p1/1.2.3.nii.gz" in capsys.readouterr().out


def test_the_first_pattern_that_fits_holds(make: Make) -> None:
    names = ["0007", "0721_day008", "0721_day011", "0318_1"]
    items = make("c", *(f"volume-covid19-A-{n}.nii.gz" for n in names), dataset="covid19")
    assert len(items.training) == 4
    assert subjects(items) == ["covid19/0007", "covid19/0318", "covid19/0721"]


def test_a_list_of_real_volumes_can_be_prepared(make: Make, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    noise = np.random.default_rng(0).normal(0, 300, (9, 7, 5)).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, np.eye(4)), tmp_path / "v/img0001.nii.gz")
    items = make("v", pattern=("img{subject}.nii.gz",), modality="CT")
    assert prepare(items.training[0], Recipe()).data.shape == (1, 9, 7, 5)


# --- labels


def btcv(*cases: int, labelled: bool = True) -> list[str]:
    names = [f"img/img{case:04d}.nii.gz" for case in cases]
    return names + [f"label/label{case:04d}.nii.gz" for case in cases if labelled]


def test_btcv_has_labels_classes_pairs_and_tolerances(make: Make) -> None:
    items = make("t", *btcv(1, 2), dataset="btcv")
    assert [item.label.name for item in items.training] == [
        "label0001.nii.gz",
        "label0002.nii.gz",
    ]
    assert items.labels[6] == "liver"
    assert items.swap == ((2, 3), (12, 13))
    assert items.tolerance[6] == 5.0 and 10 not in items.tolerance


def test_cases_without_labels_are_added_to_test(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make("train", *btcv(1, 2), dataset="btcv")
    items = make("test", *btcv(61, labelled=False), dataset="btcv", part="test", add=True)
    assert [item.subject for item in items.test] == ["btcv/0061"]
    assert len(items.training) == 2
    assert "without a label: 1 image, as img/img0061" in capsys.readouterr().out


def test_a_label_follows_every_word_of_its_image(make: Make) -> None:
    names = []
    for subject, reconstruction in (("sub-001", "mial"), ("sub-041", "irtk")):
        stem = f"{subject}/anat/{subject}_rec-{reconstruction}"
        names += [f"{stem}_T2w.nii.gz", f"{stem}_dseg.nii.gz"]
    items = make("feta", *names, dataset="feta")
    assert [item.label.name for item in items.training] == [
        "sub-001_rec-mial_dseg.nii.gz",
        "sub-041_rec-irtk_dseg.nii.gz",
    ]
    assert items.modalities() == ["t2"] and len(items.labels) == 8


def test_a_pattern_of_your_own_does_without_the_label_of_the_data_set(make: Make) -> None:
    names = ("sub-001_T2w.nii.gz", "sub-001_dseg.nii.gz")
    flags: dict[str, Any] = {"dataset": "feta", "pattern": ("{subject}_T2w.nii.gz",)}
    assert make("f", *names, **flags).training[0].label is None
    items = make("f", *names, out="l.json", label="{subject}_dseg.nii.gz", **flags)
    assert items.training[0].label.name == "sub-001_dseg.nii.gz"


def test_a_wide_pattern_does_not_take_labels_for_images(make: Make) -> None:
    names = ["a_ct.nii.gz", "a_seg.nii.gz", "b_ct.nii.gz", "b_seg.nii.gz"]
    items = make(
        "w", *names, pattern=("{subject}_{any}.nii.gz",), label="{subject}_seg.nii.gz",
        modality="ct",
    )  # fmt: skip
    assert [item.image[0].name for item in items.training] == ["a_ct.nii.gz", "b_ct.nii.gz"]


def test_images_that_look_like_labels_are_named(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make("w", "a_ct.nii", "a_seg.nii", pattern=("{subject}_{any}.nii",), modality="ct")
    assert "warning: 1 image may be labels, as a_seg.nii" in capsys.readouterr().out


def test_classes_of_two_data_sets_are_refused(make: Make, tmp_path: Path) -> None:
    make("t", *btcv(1), dataset="btcv")
    before = (tmp_path / "list.json").read_bytes()
    stem = "sub-001/anat/sub-001_rec-mial"
    names = (f"{stem}_T2w.nii.gz", f"{stem}_dseg.nii.gz")
    assert "other classes than FeTA" in refusal(make, "f", *names, dataset="feta", add=True)
    assert (tmp_path / "list.json").read_bytes() == before


# --- whose an image is


def test_alike_names_of_hnscc_and_colon_are_two_patients(make: Make) -> None:
    pattern = ("images/img_{subject}.nii.gz",)
    names = ("images/img_19.nii.gz", "images/img_731.nii.gz")
    make("hnscc", *names, dataset="hnscc", pattern=pattern)
    items = make("colon", *names, dataset="colon", pattern=pattern, add=True)
    assert subjects(items) == ["colon/19", "colon/731", "hnscc/19", "hnscc/731"]


def luna_and_lidc(tmp_path: Path) -> str:
    """Tables as TCIA writes them: series 1 is of patient 7, 2 and 3 are of patient 8."""
    lines = ["Series UID,Collection,Subject ID,Modality"]
    lines += [f"{UID}.{n},LIDC-IDRI,LIDC-IDRI-{p:04d},CT" for n, p in ((1, 7), (2, 8), (3, 8))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    return str(tmp_path / "metadata.csv")


LUNA = (f"subset0/{UID}.1.nii.gz", f"subset4/{UID}.2.nii.gz")
LIDC = (f"LIDC-IDRI-0007/{UID}.1_Eq_1.nii.gz", f"LIDC-IDRI-0008/{UID}.3.nii.gz")


@pytest.mark.parametrize("luna_first", [True, False])
def test_a_patient_of_luna16_is_the_one_of_lidc(
    make: Make, tmp_path: Path, luna_first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    table = luna_and_lidc(tmp_path)
    calls = [
        lambda: make("luna", *LUNA, dataset="luna16", subjects=table, add=True),
        lambda: make("lidc", *LIDC, dataset="lidc", add=True),
    ]
    for call in calls if luna_first else reversed(calls):
        items = call()
    assert len(items.training) == 4
    assert subjects(items) == ["lidc/LIDC-IDRI-0007", "lidc/LIDC-IDRI-0008"]
    assert "1 scan there twice" in capsys.readouterr().out


@pytest.mark.parametrize("luna_first", [True, False])
def test_luna16_by_series_and_lidc_by_patient_are_refused_together(
    make: Make, luna_first: bool
) -> None:
    calls: list[tuple[Any, ...]] = [("luna", *LUNA), ("lidc", *LIDC)]
    names = ["luna16", "lidc"]
    order = (0, 1) if luna_first else (1, 0)
    make(*calls[order[0]], dataset=names[order[0]])
    line = refusal(make, *calls[order[1]], dataset=names[order[1]], add=True)
    assert "--subjects metadata.csv" in line


def test_luna16_alone_takes_each_series_for_a_patient(make: Make) -> None:
    assert subjects(make("luna", *LUNA, dataset="luna16")) == [f"lidc/{UID}.1", f"lidc/{UID}.2"]


def test_one_scan_under_two_subjects_is_warned_of(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make("luna", *LUNA, dataset="luna16", patients="other")
    make("lidc", *LIDC, dataset="lidc", add=True)
    assert "warning: 1 file hold a scan" in capsys.readouterr().out


def test_a_table_that_lacks_a_name_or_has_two_for_one_is_refused(
    make: Make, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    flags = {"pattern": ("{subject}.nii",), "modality": "ct", "subjects": str(table)}

    table.write_text("name,subject\na,p1\n")
    assert "no line for b" in refusal(make, "d", "a.nii", "b.nii", **flags)

    table.write_text("name,subject\na,p1\na,p2\nb,p2\n")
    assert "a must have one subject" in refusal(make, "d", **flags)

    table.write_text("name,subject\na,\nb,p2\n")
    assert "a must have one subject" in refusal(make, "d", **flags)

    table.write_text("file,patient\na,p1\n")
    assert '"name" and "subject"' in refusal(make, "d", **flags)

    table.write_bytes(b"\xff\xfe")
    assert "not a CSV file" in refusal(make, "d", **flags)
    assert not (tmp_path / "list.json").exists()


def test_a_table_joins_what_names_keep_apart(make: Make, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,subject\na,p1\nb,p1\n")
    items = make(
        "d", "a.nii", "b.nii", pattern=("{subject}.nii",), modality="ct",
        subjects=str(tmp_path / "t.csv"),
    )  # fmt: skip
    assert subjects(items) == ["p1"]


def test_alike_subjects_of_two_calls_are_refused_unless_a_word_says_whose_they_are(
    make: Make, tmp_path: Path
) -> None:
    flags = {"pattern": ("{subject}.nii",), "modality": "ct"}
    make("a", "01.nii", "02.nii", **flags)
    before = (tmp_path / "list.json").read_bytes()
    assert "subject 02 is in" in refusal(make, "b", "02.nii", "03.nii", add=True, **flags)
    assert (tmp_path / "list.json").read_bytes() == before

    apart = make("b", patients="b", add=True, **flags)
    assert subjects(apart) == ["01", "02", "b/02", "b/03"]

    # The same folder with another pattern is no other case.
    touch(tmp_path / "a", "site/02.nii")
    other = {"pattern": ("site/{subject}.nii",), "modality": "ct", "add": True}
    assert "subject 02 is in" in refusal(make, "a", **other)

    make("a", out="joined.json", patients="x", **flags)
    joined = make("b", out="joined.json", patients="x", add=True, **flags)
    assert subjects(joined) == ["x/01", "x/02", "x/03"]
    assert len(joined.training) == 4


def test_one_subject_in_two_folders_of_one_call_is_warned_of(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("siteA/01.nii", "siteB/01.nii")
    make("d", *names, pattern=("{site}/{subject}.nii",), modality="ct")
    assert "warning: subject 01 is in two folders, siteA/01.nii and" in capsys.readouterr().out

    names = ("sub-01/ses-1/x.nii", "sub-01/ses-2/x.nii")
    make("e", *names, out="e.json", pattern=("{subject}/{visit}/x.nii",), modality="ct")
    assert "warning" not in capsys.readouterr().out


# --- what is refused, and what is never written over


def test_a_pattern_that_fits_nothing_is_one_line_with_the_closest_path(
    make: Make, tmp_path: Path
) -> None:
    names = ["readme.txt", *(f"img/img{n:04d}.nii.gz" for n in range(50))]
    line = refusal(make, "d", *names, pattern=("imgs/{subject}.nii.gz",), modality="ct")
    assert "--pattern imgs/{subject}.nii.gz" in line
    assert "fits none of 51 files" in line and "the closest is img/img0000.nii.gz" in line
    assert not (tmp_path / "list.json").exists()


def test_a_given_pattern_that_fits_nothing_is_refused_beside_one_that_does(make: Make) -> None:
    patterns = ("{subject}_t1.nii", "{subject}_t2.ni.nii")
    line = refusal(make, "d", "a_t1.nii", "a_t2.nii", pattern=patterns, modality="mr")
    assert "{subject}_t2.ni.nii" in line


def test_of_the_patterns_of_a_data_set_one_is_enough(make: Make) -> None:
    names = [f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{c}.nii.gz" for c in ("t1n", "t2w")]
    assert subjects(make("g", *names, dataset="brats21")) == ["brats21/00000"]


def test_an_empty_folder_and_a_missing_one_are_refused(make: Make, tmp_path: Path) -> None:
    assert "fits none of 0 files" in refusal(make, "empty", dataset="btcv")
    config = MakeListConfig(out=str(tmp_path / "l.json"), dataset="btcv")
    assert "no such folder" in refusal(main, tmp_path / "nowhere", config)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"pattern": ("{subject}.mhd",)}, "docs/datasets.md"),
        ({"pattern": ("{subject}",)}, "images are NIfTI"),
        ({"pattern": ("{patient}.nii",)}, "has no {subject}"),
        ({"pattern": ("{subject}.nii",)}, "--modality"),
        ({"pattern": ("{subject}.nii",), "modality": "xray"}, "xray"),
        ({}, "--pattern"),
        ({"pattern": ("{subject}.nii",), "modality": "ct", "label": "{case}.nii"}, "{case}"),
        ({"pattern": ("{subject}.nii",), "modality": "ct", "label": "{subject}_l.nii"}, "a_l.nii"),
        ({"pattern": ("{subject}.nii",), "modality": "ct", "subjects": "none.csv"}, "none.csv"),
        ({"pattern": ("{subject}.nii",), "modality": "ct", "out": ""}, "--out"),
        ({"pattern": ("{subject}.nii",), "modality": "ct", "out": "."}, "--out"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, flags: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "d", "a.nii")
    monkeypatch.chdir(tmp_path)
    line = refusal(main, Path("d"), MakeListConfig(**{"out": "l.json", **flags}))
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_list_is_not_written_over(make: Make, tmp_path: Path) -> None:
    flags = {"pattern": ("{subject}.nii",), "modality": "ct"}
    make("d", "a.nii", **flags)
    assert "--add adds to it" in refusal(make, "d", **flags)

    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"training": []}')
    assert "has not written it" in refusal(make, "d", out="foreign.json", add=True, **flags)
    foreign.write_text("not json")
    assert "not a JSON" in refusal(make, "d", out="foreign.json", add=True, **flags)
    assert foreign.read_text() == "not json"


@pytest.mark.parametrize("parts", [{"training": {}}, {"training": [], "test": 5}, {"test": ["a"]}])
def test_a_list_that_was_damaged_by_hand_is_refused_by_its_part(
    make: Make, tmp_path: Path, parts: dict[str, Any]
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({"sources": [], **parts}))
    before = damaged.read_text()
    flags = {"pattern": ("{subject}_t1.nii.gz",), "modality": "t1", "add": True}
    line = refusal(make, "d", "a_t1.nii.gz", out="damaged.json", **flags)
    assert "is no list of items" in line
    assert damaged.read_text() == before


def test_the_same_call_again_adds_only_what_is_new(make: Make, tmp_path: Path) -> None:
    make("b", *brats(0), dataset="brats21", add=True)
    first = (tmp_path / "list.json").read_bytes()
    make("b", dataset="brats21", add=True)
    assert (tmp_path / "list.json").read_bytes() == first
    items = make("b", *brats(1), dataset="brats21", add=True)
    assert len(items.training) == 8


def test_a_full_disk_leaves_the_list_as_it_was(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(text: str, path: Path) -> None:
        path.write_text(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    make("b", *brats(0), dataset="brats21")
    before = (tmp_path / "list.json").read_bytes()
    monkeypatch.setattr(make_list, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        make("b", *brats(1), dataset="brats21", add=True)
    assert (tmp_path / "list.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "list.json"]


def test_what_a_person_added_to_the_list_stays(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    make("b", *brats(0), dataset="brats21")
    content = json.loads(path.read_text())
    content["licence"] = "ask them"
    content["training"][0]["fold"] = 2
    for item in content["training"]:
        item["fold"] = 2
    path.write_text(json.dumps(content))
    items = make("b", *brats(1), dataset="brats21", add=True)
    assert json.loads(path.read_text())["licence"] == "ask them"
    assert [item.fold for item in items.training] == [2] * 4 + [None] * 4


def test_a_list_that_was_spoilt_by_hand_is_refused_and_stays(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    make("b", *brats(0), dataset="brats21")
    spoilt = path.read_text().replace('"subject"', '"patient_id"')
    path.write_text(spoilt)
    assert "patient_id" in refusal(make, "b", *brats(1), dataset="brats21", add=True)
    assert path.read_text() == spoilt


def test_all_of_table_1_fits_into_one_list(make: Make, tmp_path: Path) -> None:
    table = luna_and_lidc(tmp_path)
    make("brats", *brats(0, 1), dataset="brats21", add=True)
    make("luna", *LUNA, dataset="luna16", subjects=table, add=True)
    make("covid", "volume-covid19-A-0007.nii.gz", dataset="covid19", add=True)
    make("hnscc", "HNSCC-01-0001/1.2.nii.gz", dataset="hnscc", add=True)
    make("colon", "1.3.6.1.4.1.9328.50.4.0019/1.3.nii.gz", dataset="colon", add=True)
    items = make("lidc", *LIDC, dataset="lidc", add=True)
    assert len(items.training) == 8 + 2 + 1 + 1 + 1 + 2
    assert items.modalities() == ["ct", "t1", "t1ce", "t2", "flair"]
    split = for_pretraining(items, fold=None, split_seed=3, allow_trained=False)
    assert split.validation


def test_closest_of_no_file_is_nothing() -> None:
    assert closest("{subject}.nii", []) == ""


# --- the command line


def test_the_command_ends_with_0_or_with_2_and_one_line(tmp_path: Path) -> None:
    touch(tmp_path / "d", "a_T1w.nii.gz", "b_t1.nii.gz")
    command = [sys.executable, "-m", "dae.data.make_list"]
    flags = [str(tmp_path / "d"), "--pattern", "{subject}_{modality}.nii.gz"]
    flags += ["--out", str(tmp_path / "l.json")]

    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 images of 2 subjects (t1 2)" in done.stdout

    for arguments, said in (
        (flags, "is there already"),
        (flags[1:], "name the folder first"),
        ([flags[0], "--dataset", "brats22"], "brats22"),
    ):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr and done.stderr.count("\n") == 1
