"""dae/data/leaks.py: nobody is on both sides of a split, and checkpoints know whom they saw."""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import events, refusal

from dae.config.evaluate import PredictConfig, ScoreConfig, TuneConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data import datalist, holdout, leaks
from dae.data.datalist import Content, DataList, Item
from dae.weights import checkpoint
from dae.weights.foreign import read_weights as read_weights
from train_pretrain import main as pretrain
from train_seg import main

evaluate = importlib.import_module("eval")
Config = Callable[..., SegConfig]
Entries = list[dict[str, Any]]


def item(image: str, subject: str | None = None, label: str | None = None) -> Item:
    named = subject is not None
    return Item(
        (Path(image),),
        ("t1",),
        ("mr",),
        subject or image,
        None,
        Path(label) if label else None,
        subject_named=named,
    )


def sides(training: list[Item], validation: list[Item], test: list[Item] | None = None) -> DataList:
    return DataList(tuple(training), tuple(validation), tuple(test or []), {})


def in_folds(entries: Entries) -> None:
    for n, entry in enumerate(entries):
        entry["fold"] = n


def without_subjects(entries: Entries) -> None:
    for entry in entries:
        del entry["subject"]


def unchanged(entries: Entries) -> None:
    pass


# --- both sides of a split


@pytest.mark.parametrize(
    "other, words",
    [
        (item("x/../a.nii", "s9"), "image a.nii is on both sides: a.nii is trained on, x/../a.nii"),
        (item("b.nii", "s1"), "subject s1 is on both sides: a.nii is trained on, b.nii"),
        (item("b.nii", "s9", "l.nii"), "label l.nii is on both sides: a.nii is trained on, b.nii"),
    ],
)
def test_an_image_a_subject_or_a_label_on_both_sides_is_refused_by_name(
    other: Item, words: str
) -> None:
    training = [item("a.nii", "s1", "l.nii")]
    validation = [item("c.nii", "s2")]
    line = refusal(leaks.check_sides, sides(training, [*validation, other]))
    assert words in line and "validated on" in line and "--allow-trained" in line

    tested = sides(training, validation, [other])
    leaks.check_sides(tested)  # pre-training tests nothing
    assert "tested on" in refusal(leaks.check_sides, tested, test=True)
    leaks.check_sides(sides(training, validation, [item("d.nii", "s3")]), test=True)


def test_a_copy_under_another_name_is_refused_by_both_names() -> None:
    items = [item("a.nii", "s1"), item("b.nii", "s2"), item("c.nii", "s3"), item("copy.nii", "s4")]
    contents = [Content((voxels,), "", (1.0,)) for voxels in "abcb"]
    line = refusal(leaks.check_voxels, items, contents, trained=2)
    assert "b.nii, trained on, and copy.nii, validated on, hold the same image" in line
    leaks.check_voxels(items[:3], contents[:3], trained=2)


def test_a_test_case_whose_subject_the_weights_know_by_name_alone_is_said_and_goes_on() -> None:
    """Of pre-training or of fine-tuning. A case that is known by its voxels is refused."""
    known = leaks.name_of("s1")
    in_files = replace(item("s1", "s1"), subject_named=False)  # a path that is no name of a patient
    tested = [item("a.nii", "s1"), item("b.nii", "s1"), item("c.nii", "s2"), in_files]
    hashes = [("a",), ("b",), ("c",), ("d",)]
    for plan in (
        {"pretrained_on": {"subjects": [known], "voxels": ["x"]}},
        {"seen": {"trained": [known], "voxels": ["x"]}},
    ):
        (line,) = leaks.check_tested(tested, hashes, plan, allow_leak=False)
        assert "trained on a subject s1" in line and "(1 such names)" in line
        assert leaks.check_tested(tested[2:], hashes[2:], plan, allow_leak=False) == []

    both = {"pretrained_on": {"subjects": [known], "voxels": ["a"]}}
    line = refusal(leaks.check_tested, tested[:1], hashes[:1], both, allow_leak=False)
    assert "1 of the test cases, as a.nii" in line and "--allow-leak" in line
    (line,) = leaks.check_tested(tested[:1], hashes[:1], both, allow_leak=True)
    assert "1 of the test cases, as a.nii" in line and "subject" not in line


@pytest.mark.parametrize(
    "trained, validated, alike",
    [
        ("BraTS/b1/BraTS_001_t1.nii.gz", "BraTS/b1/BraTS_001_flair.nii.gz", True),
        ("BraTS_001_t1ce.nii.gz", "BraTS_002_t1ce.nii.gz", False),
        ("p1/t1.nii.gz", "p1/T2.nii.gz", True),
        ("p1/t1.nii.gz", "p2/t1.nii.gz", False),
        ("sub-01_ses-1_T1w.nii.gz", "sub-01_ses-2_FLAIR.nii.gz", True),
        ("sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz", False),
        ("la_007_0000.nii.gz", "la_007_0001.nii.gz", True),
        ("pat 1_ses1_0000.nii.gz", "pat 1_ses2_0000.nii.gz", True),
        ("p7_visit-01_t1.nii.gz", "p7_visit-02_t1.nii.gz", True),
        ("heart_day1.nii.gz", "liver_day1.nii.gz", False),
        ("sub-FETA_000_0000.nii.gz", "sub-FETA_001_0000.nii.gz", False),
        ("liver_0001.nii.gz", "liver_0002.nii.gz", False),
        ("ct_train_1001.nii.gz", "mr_train_1001.nii.gz", False),  # two bodies of MM-WHS
    ],
)
def test_names_that_look_like_one_patient_on_both_sides_are_said(
    trained: str, validated: str, alike: bool
) -> None:
    line = leaks.doubts(sides([item("other.nii"), item(trained)], [item(validated)]), drawn=False)
    assert bool(line) == alike and "\n" not in line
    if alike:
        expected = f"{Path(trained).name} is trained on and {Path(validated).name} validated on"
        assert expected in line

    named = sides([item("other.nii", "o"), item(trained, "a")], [item(validated, "b")])
    assert not leaks.doubts(named, drawn=True)


def test_where_no_subject_is_known_a_drawn_split_says_so_once() -> None:
    unknown = sides([item("a.nii"), item("b.nii")], [item("c.nii")])
    line = leaks.doubts(unknown, drawn=True)
    assert 'no "subject"' in line and "a.nii and b.nii" in line and "\n" not in line
    assert leaks.doubts(unknown, drawn=False) == ""


# --- from a run to its scores


@pytest.fixture
def listed(pretrained: Path, tmp_path: Path) -> Callable[..., str]:
    """A list of five labelled torsos without a split of its own; `change` alters its entries."""
    (tmp_path / "phantoms").symlink_to(pretrained / "phantoms")  # a list does not leave its folder

    def write(
        change: Callable[[Entries], object] = unchanged,
        name: str = "all.json",
    ) -> str:
        content = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
        entries = content["training"] + content["validation"] + content["test"]
        for entry in entries:
            entry |= {key: str(tmp_path / "phantoms" / entry[key]) for key in ("image", "label")}
        change(entries)
        (tmp_path / name).write_text(json.dumps({"training": entries, "labels": content["labels"]}))
        return str(tmp_path / name)

    return write


def predicted(config: SegConfig, out: Path, **given: Any) -> list[str]:
    given = {
        "checkpoint": (f"{config.out}/last.pt",),
        "device": "cpu",
        "amp": "off",
        "out": str(out),
        **given,
    }
    return sorted(path.name.split(".")[0] for path in evaluate.predict(PredictConfig(**given)))


@pytest.mark.parametrize("change", [in_folds, unchanged], ids=["folds of the list", "drawn folds"])
def test_predictions_and_scores_are_of_the_fold_that_the_checkpoint_held_out(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path, change: Any
) -> None:
    """Before, both took fold 0, which the network of fold 1 was trained on."""
    data = listed(change)
    config = tiny_seg(data=data, fold=1, steps=1)
    main(config)
    held = {item.subject for item in holdout.hold_out_fold(datalist.load(data), fold=1).validation}
    assert len(held) == 1
    out = tmp_path / "p"
    assert set(predicted(config, out, data=data)) == held
    where: dict[str, Any] = {"predictions": str(out), "data": data}
    rows = evaluate.score(ScoreConfig(**where, out=str(tmp_path / "s")))
    assert rows["mean_of_cases"]["dice"]["n"] == 1
    evaluate.tune(TuneConfig(**where, out=str(tmp_path / "plan")))
    other_fold = ScoreConfig(**where, fold=0, out=str(out / "s"))
    assert "no label for case" in refusal(evaluate.score, other_fold)


def test_the_held_out_stay_held_out_when_the_list_grows_and_is_turned_around(
    tiny_seg: Config, listed: Callable[..., str], pretrained: Path, tmp_path: Path
) -> None:
    config = tiny_seg(data=listed(), fold=3, steps=1)
    main(config)
    held = predicted(config, tmp_path / "before", data=listed())

    def grow(entries: Entries) -> None:
        entries.reverse()
        for n in range(6):  # images of bodies that nobody has seen
            image = nib.load(entries[0]["image"])
            moved = np.roll(np.asarray(image.dataobj), n + 1, axis=2)
            nib.save(nib.Nifti1Image(moved, image.affine), tmp_path / f"new{n}.nii.gz")
            new = {
                "image": str(tmp_path / f"new{n}.nii.gz"),
                "label": entries[0]["label"],
                "subject": f"new{n}",
            }
            entries.append({**entries[0], **new})

    grown = listed(grow, "grown.json")
    assert predicted(config, tmp_path / "after", data=grown) == held
    summary = evaluate.score(
        ScoreConfig(predictions=str(tmp_path / "after"), data=grown, out=str(tmp_path / "s"))
    )
    assert summary["mean_of_cases"]["dice"]["n"] == len(held)


def test_cases_that_were_trained_on_are_refused_until_they_are_allowed(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path
) -> None:
    data = listed(in_folds)
    config = tiny_seg(data=data, fold=1, steps=1)
    main(config)
    out = tmp_path / "p"
    line = refusal(predicted, config, out, data=data, fold=0)
    assert "was trained on case ct_000;" in line and "--allow-trained" in line and not out.exists()
    line = refusal(predicted, config, out, data=data, split="training")
    assert "case ct_000 and 3 more" in line
    assert predicted(config, out, data=data, fold=0, allow_trained=True) == ["ct_000"]

    # What was allowed once is still known when it is scored, against the list or a folder of
    # labels, after other cases were predicted into the folder as well.
    assert predicted(config, out, data=data) == ["ct_001"]
    assert json.loads((out / leaks.PREDICTED).read_text())["trained"] == ["ct_000"]
    (out / "ct_001.nii.gz").unlink()
    labels = tmp_path / "labels"
    labels.mkdir()
    shutil.copy(
        json.loads(Path(data).read_text())["training"][0]["label"], labels / "ct_000.nii.gz"
    )
    for where in ({"data": data, "fold": 0}, {"labels": str(labels)}):
        flags: dict[str, Any] = {**where, "predictions": str(out), "out": str(tmp_path / "s")}
        assert "was trained on case ct_000" in refusal(evaluate.score, ScoreConfig(**flags))
        assert "was trained on case ct_000" in refusal(evaluate.tune, TuneConfig(**flags))
        evaluate.score(ScoreConfig(**flags, allow_trained=True))


def test_a_trained_image_is_known_by_its_voxels_whatever_its_name(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path
) -> None:
    data = listed(in_folds)
    config = tiny_seg(data=data, fold=1, steps=1)
    main(config)
    entry = json.loads(Path(data).read_text())["training"][2]
    image = nib.load(entry["image"])
    copy = nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32), image.affine)
    nib.save(copy, tmp_path / "anonymous.nii")
    other = tmp_path / "other.json"
    renamed = {**entry, "image": "anonymous.nii", "subject": "anonymous"}
    other.write_text(
        json.dumps({"training": [renamed], "test": [renamed], "labels": {"0": "background"}})
    )
    flags: dict[str, Any] = {"data": str(other), "split": "test"}
    line = refusal(predicted, config, tmp_path / "p", **flags)
    assert "was trained on case anonymous" in line
    assert predicted(config, tmp_path / "p", **flags, allow_trained=True) == ["anonymous"]

    # Single images are no split: they are predicted, and known as trained on when they are scored.
    assert predicted(config, tmp_path / "q", images=(str(tmp_path / "anonymous.nii"),)) == [
        "anonymous"
    ]
    assert json.loads((tmp_path / "q" / leaks.PREDICTED).read_text())["trained"] == ["anonymous"]


def test_a_trained_image_stays_known_when_prediction_stops_after_it(
    tiny_seg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark is written with the label map, and is there after a stop and after going on."""
    config = tiny_seg(steps=1)
    main(config)
    content = json.loads(Path(config.data).read_text())
    image, other = (
        str(Path(config.data).parent / entry["image"]) for entry in content["training"][:2]
    )
    common = {
        "checkpoint": (f"{config.out}/last.pt",),
        "device": "cpu",
        "amp": "off",
        "out": str(tmp_path / "p"),
    }
    predicted = evaluate.predict_image
    calls: list[Any] = []

    def stop_at_the_second(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predicted(*given)

    monkeypatch.setattr(evaluate, "predict_image", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate.predict(PredictConfig(images=(image, other), **common))
    name = Path(image).name.removesuffix(".nii.gz")
    assert json.loads((tmp_path / "p/predicted.json").read_text())["trained"] == [name]
    evaluate.predict(PredictConfig(images=(image, other), **common))
    assert name in json.loads((tmp_path / "p/predicted.json").read_text())["trained"]


def test_an_image_with_minus_zeros_is_the_image_with_zeros() -> None:
    """A slope below 0 makes them of the 0 of a stored integer."""
    x = np.random.default_rng(0).integers(-2, 3, (2, 3, 4, 5)).astype(np.float32)
    minus = np.where(x == 0, np.float32(-0.0), x)
    assert np.signbit(minus).sum() > np.signbit(x).sum()
    assert leaks.hashes_of(minus) == leaks.hashes_of(x)
    plain = [hashlib.sha256(b"((3, 4, 5), '<f4')" + y.tobytes()).hexdigest()[:20] for y in x]
    assert leaks.hashes_of(x) == tuple(plain)  # as checkpoints of before have them
    labels = x[0].astype(np.int16)
    assert leaks.hash_of(labels) != leaks.hash_of(labels + 1)


def test_checkpoints_of_several_folds_hold_out_what_none_of_them_has_seen(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path
) -> None:
    data = listed(in_folds)
    runs = [
        tiny_seg(data=data, fold=fold, steps=1, out=str(tmp_path / f"run{fold}")) for fold in (1, 2)
    ]
    for config in runs:
        main(config)
    both = tuple(f"{config.out}/last.pt" for config in runs)
    line = refusal(predicted, runs[0], tmp_path / "p", data=data, checkpoint=both)
    assert "was trained on case" in line


def test_weights_that_were_fine_tuned_before_still_know_whom_they_saw(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path
) -> None:
    data = listed(in_folds)
    first = tiny_seg(data=data, fold=1, steps=1)
    main(first)
    second = tiny_seg(
        data=data, fold=2, steps=1, pretrained=f"{first.out}/last.pt", out=str(tmp_path / "second")
    )
    main(second)
    told = [
        note
        for note in events(second, "start")[0]["notes"]
        if "the weights were trained on" in note
    ]
    assert len(told) == 1 and "ct_002" in told[0]
    line = refusal(predicted, second, tmp_path / "p", data=data)
    assert "was trained on case ct_002" in line
    assert line.startswith("--data")  # known by its subject, before anything is read

    scratch = replace(second, from_scratch=True, out=str(tmp_path / "scratch"))
    main(scratch)
    assert predicted(scratch, tmp_path / "q", data=data) == ["ct_002"]


def test_converted_weights_still_know_whom_they_saw(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path
) -> None:
    data = listed(in_folds)
    config = tiny_seg(data=data, fold=1, steps=1)
    main(config)
    whole = read_weights(Path(config.out) / "last.pt")
    checkpoint.save(tmp_path / "run" / "converted.pt", {"model": whole.tensors, "plan": whole.plan})
    given = {"checkpoint": (str(tmp_path / "run" / "converted.pt"),), "data": data}
    assert predicted(config, tmp_path / "p", **given) == ["ct_001"]
    line = refusal(predicted, config, tmp_path / "q", **given, fold=0)
    assert "was trained on" in line


def test_an_older_checkpoint_is_predicted_with_a_warning(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says its fold, and not whom it saw. The folds of a list without any were others then."""
    data = listed(in_folds)
    config = tiny_seg(data=data, fold=1, steps=1)
    main(config)
    path = Path(config.out) / "last.pt"
    state = checkpoint.load(path)
    del state["plan"]["seen"]
    checkpoint.save(path, state)
    capsys.readouterr()
    assert predicted(config, tmp_path / "p", data=data) == ["ct_001"]
    told = capsys.readouterr()
    assert (told.out + told.err).count("an older version wrote it") == 1
    line = refusal(predicted, config, tmp_path / "q", data=listed(name="drawn.json"))
    assert "drew the folds" in line and '"fold"' in line


# --- what a run refuses, and how it goes on


def test_a_run_refuses_who_is_on_both_sides_and_goes_on_where_that_is_meant(
    tiny_seg: Config,
    tiny: Callable[..., PretrainConfig],
    listed: Callable[..., str],
    tmp_path: Path,
) -> None:
    content = json.loads(Path(listed()).read_text())
    copy = tmp_path / "copy.nii.gz"
    shutil.copy(content["training"][0]["image"], copy)
    for other, word in (
        ({"subject": "new", "image": str(copy)}, "hold the same image"),
        ({}, "is on both sides"),
    ):
        content["validation"] = [
            {**content["training"][0], "label": content["training"][1]["label"], **other}
        ]
        content["training"] = content["training"][:1]
        path = tmp_path / "both.json"
        path.write_text(json.dumps(content | {"labels": {str(k): f"c{k}" for k in range(8)}}))
        assert word in refusal(main, tiny_seg(data=str(path), steps=1))
        assert word in refusal(pretrain, tiny(data=str(path), steps=1))
        assert not (tmp_path / "run").exists()
        content = json.loads(Path(listed()).read_text())
    main(tiny_seg(data=str(path), steps=1, allow_trained=True))


def test_a_fold_that_cannot_act_is_refused_by_both_scripts(
    tiny_seg: Config, tiny: Callable[..., PretrainConfig]
) -> None:
    """Both lists have a `validation`: five folds would be five copies of one run."""
    words = '--fold 3: cannot choose what is held out: the list has a "validation"'
    assert words in refusal(main, tiny_seg(fold=3))
    assert words in refusal(pretrain, tiny(fold=3))


def test_a_run_says_how_its_split_was_drawn_and_whom_it_may_have_on_both_sides(
    tiny_seg: Config, listed: Callable[..., str]
) -> None:
    config = tiny_seg(data=listed(without_subjects), steps=1)
    main(config)
    notes = events(config, "start")[0]["notes"]
    assert "fold 0 of 5 validates, drawn by --split-seed 0: 1 subject" in notes
    assert any('no "subject" in the list' in note for note in notes)


def test_a_run_is_not_resumed_with_a_label_corrected_at_equal_size_and_time(
    tiny_seg: Config, listed: Callable[..., str], tmp_path: Path
) -> None:
    def plain(entries: Entries) -> None:
        image = nib.load(entries[0]["label"])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), tmp_path / "label.nii")
        entries[0]["label"] = str(tmp_path / "label.nii")

    data = listed(plain)
    held = {item.subject for item in holdout.hold_out_fold(datalist.load(data)).validation}
    config = tiny_seg(
        data=data, stop_after=1, fold=1 if "ct_000" in held else 0
    )  # one that trains on the subject
    main(config)
    path = tmp_path / "label.nii"
    whole = path.read_bytes()
    stat = path.stat()
    path.write_bytes(whole[:400] + whole[400:].replace(b"\4", b"\5"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.read_bytes() != whole
    resumed = replace(config, resume=True, stop_after=0)
    assert "the data list is not what it was" in refusal(main, resumed)
    path.write_bytes(whole)
    main(resumed)


def test_a_run_is_not_resumed_with_a_list_in_another_order(
    tiny_seg: Config, listed: Callable[..., str], pretrained: Path, tmp_path: Path
) -> None:
    """Not even where names and sizes of the files are the same in both orders."""

    def alike(entries: Entries) -> None:
        for n, entry in enumerate(entries):
            folder = tmp_path / f"s{n}"
            folder.mkdir(exist_ok=True)
            for key in ("image", "label"):
                volume = nib.load(entry[key])
                nib.save(
                    nib.Nifti1Image(np.asarray(volume.dataobj), volume.affine),
                    folder / f"{key}.nii",
                )
                entry[key] = str(folder / f"{key}.nii")

    config = tiny_seg(data=listed(alike), stop_after=1)
    main(config)

    def turned(entries: Entries) -> None:
        alike(entries)
        entries.reverse()

    resumed = replace(config, resume=True, stop_after=0)
    other_order = replace(resumed, data=listed(turned))
    assert "the data list is not what it was" in refusal(main, other_order)
    main(replace(resumed, data=listed(alike)))


def test_a_run_of_an_older_version_goes_on_with_the_data_that_it_had(
    tiny_seg: Config, tmp_path: Path
) -> None:
    """Its fingerprint was of names and sizes."""
    config = tiny_seg(stop_after=1)
    main(config)
    path = Path(config.out) / "last.pt"
    state = checkpoint.load(path)
    assert state["data"].startswith(datalist.BY_VOXELS)
    items = datalist.load(config.data)
    for data in (items.fingerprint_by_size(labels=True), "0" * 20):
        old = {
            **state,
            "data": data,
            "plan": {key: v for key, v in state["plan"].items() if key != "seen"},
        }
        old["config"] = {
            key: value for key, value in old["config"].items() if key != "allow_trained"
        }
        checkpoint.save(path, old)
        resumed = replace(config, resume=True, stop_after=2)
        if data == "0" * 20:
            assert "older versions drew otherwise" in refusal(main, resumed)
        else:
            main(resumed)
