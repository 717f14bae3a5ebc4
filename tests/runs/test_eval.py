"""eval.py: what is scored and how, what is predicted, and one line for what cannot be."""

import csv
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import NETWORK, ROOT, refusal
from processes import run_script
from torch import Tensor

from dae.config.command_line import run_or_explain
from dae.config.evaluate import CompareConfig, FoldsConfig, PredictConfig, ScoreConfig, TuneConfig
from dae.data.datalist import Item
from dae.errors import InputError
from dae.evaluation.cases import COLUMNS, read_scores, write_scores
from dae.evaluation.metrics import score_labels
from dae.model import SwinUNETR
from dae.weights import checkpoint

evaluate = importlib.import_module("eval")

Answer = Callable[..., str]
Predict = Callable[..., list[Path]]
Scored = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]

SPACING = (3.0, 1.0, 2.0)
AFFINE = np.diag([*SPACING, 1.0])
NAMED = {"0": "background", "1": "liver", "2": "spleen"}


def blobs(seed: int) -> np.ndarray:
    """Boxes of labels 1, 2 and 9 on a background of zeros, some of them moved by the seed."""
    labels = np.zeros((14, 16, 18), np.uint8)
    labels[2 + seed : 7, 2:9, 3:12] = 1
    labels[8:13, 4 : 10 - seed, 2:9] = 2
    labels[4:10, 10:15, 10:16] = 9
    return labels


def predicted_blobs(n: int) -> np.ndarray:
    """Of case n: everything is a little off, and nothing is called 9."""
    prediction = blobs(1 + n)
    prediction[prediction == 9] = 1 + n
    return prediction


def saved(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def labels_in(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def write_list(path: Path, items: list[dict[str, str]], **more: Any) -> Path:
    path.write_text(json.dumps({"training": items, **more}))
    return path


def bytes_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "eval.py", *arguments)


# --- score


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    """Score two cases of a list, or of a folder of labels: the rows and summary.json."""
    items = []
    for n in range(2):
        saved(tmp_path / "labels" / f"s{n}.nii.gz", blobs(0))
        saved(tmp_path / "predictions" / f"s{n}.nii.gz", predicted_blobs(n))
        items.append({"image": f"s{n}.nii.gz", "label": f"labels/s{n}.nii.gz"})

    def score(
        content: dict[str, Any] | None = None, **flags: Any
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if content:
            path = write_list(tmp_path / "list.json", items, validation=items, **content)
            flags["data"] = str(path)
        else:
            flags["labels"] = str(tmp_path / "labels")
        out = tmp_path / "scores"
        predictions = str(tmp_path / "predictions")
        evaluate.score(ScoreConfig(predictions=predictions, out=str(out), **flags))
        return read_scores(out / "scores.csv"), json.loads((out / "summary.json").read_text())

    return score


def by_hand(ignore: int | None, names: dict[int, str], **how: Any) -> list[dict[str, Any]]:
    """The rows of the two cases by `score_labels`."""
    rows = []
    for n in range(2):
        truth = blobs(0)
        hidden = None if ignore is None else truth == ignore
        truth = np.where(truth == ignore, 0, truth)
        scores = score_labels(predicted_blobs(n), truth, SPACING, names, ignore=hidden, **how)
        rows += [{"case": f"s{n}", **row} for row in scores]
    return rows


@pytest.mark.parametrize(
    "content, flags",
    [
        ({"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 9}}, {}),
        ({"labels": NAMED}, {"ignore": 9}),
        ({"labels": {**NAMED, "9": "tumour"}}, {"ignore": 9}),
    ],
    ids=["list", "flag", "both"],
)
def test_an_ignored_region_counts_for_nothing_whoever_names_it(
    scored: Scored, content: dict[str, Any], flags: dict[str, Any]
) -> None:
    rows, summary = scored(content, **flags)
    assert rows == by_hand(9, {1: "liver", 2: "spleen"})
    assert summary["ignore"] == 9
    assert set(summary["classes"]) == {"1", "2"}


def test_labels_of_a_folder_may_be_ignored_as_well(scored: Scored) -> None:
    rows, _ = scored(ignore=9)
    assert rows == by_hand(9, {1: "1", 2: "2"})

    rows, summary = scored()
    assert [row["class"] for row in rows] == [1, 2, 9] * 2
    assert summary["ignore"] is None


def test_steps_are_tuned_without_what_is_ignored(scored: Scored, tmp_path: Path) -> None:
    scored({"labels": {**NAMED, "9": "ignore"}})
    common = {"predictions": str(tmp_path / "predictions"), "out": str(tmp_path / "steps")}
    of_list = evaluate.tune(TuneConfig(**common, data=str(tmp_path / "list.json")))
    of_folder = evaluate.tune(TuneConfig(**common, labels=str(tmp_path / "labels"), ignore=9))
    assert of_list == of_folder
    assert 9 not in of_list


def test_steps_are_not_chosen_on_what_has_gone_through_steps(
    scored: Scored, tmp_path: Path
) -> None:
    scored({"labels": {**NAMED, "9": "ignore"}})
    predictions = tmp_path / "predictions"
    config = TuneConfig(
        predictions=str(predictions),
        out=str(tmp_path / "steps"),
        labels=str(tmp_path / "labels"),
        ignore=9,
    )
    lines = predictions / "written.jsonl"
    line = {"file": "s0.nii.gz", "sha256": "0", "settings": {"postprocess": "a hash"}}
    lines.write_text(json.dumps(line) + "\n")
    assert "s0.nii.gz was predicted with --postprocess" in refusal(evaluate.tune, config)
    lines.write_text(json.dumps(line) + "\n" + json.dumps(line | {"settings": {}}) + "\n")
    evaluate.tune(config)  # it was predicted again, without


def test_pictures_of_cases_that_are_no_longer_the_worst_are_removed(
    scored: Scored, tmp_path: Path
) -> None:
    scored(ignore=9)
    figures = tmp_path / "scores/figures"
    old = figures / "worst-s1.png"
    assert old.exists()
    users = figures / "worst-of-all.png"
    users.write_bytes(b"the user's")
    (tmp_path / "predictions/s1.nii.gz").unlink()
    (tmp_path / "labels/s1.nii.gz").unlink()
    scored(ignore=9)
    assert not old.exists() and (figures / "worst-s0.png").exists() and users.exists()


def test_maps_of_one_slice_and_classes_with_dollars_are_scored_and_drawn(tmp_path: Path) -> None:
    labels = np.zeros((12, 12, 1), np.uint8)
    labels[3:8, 4:9] = 1
    for name in ("a.nii.gz", "labels/a.nii.gz", "predictions/a.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved(tmp_path / name, labels)
    items = [{"image": "a.nii.gz", "label": "labels/a.nii.gz"}]
    content = {"labels": {"background": 0, "$liver_$ $": 1}}
    data = write_list(tmp_path / "list.json", items, validation=items, **content)
    summary = evaluate.score(
        ScoreConfig(
            predictions=str(tmp_path / "predictions"), out=str(tmp_path / "out"), data=str(data)
        )
    )
    assert summary["mean_of_cases"]["dice"]["mean"] == 1
    assert (tmp_path / "out/figures/worst-a.png").exists()


@pytest.mark.parametrize(
    "of_list", [{"1": 3.0, "2": 0}, {"liver": 3.0, "spleen": 0.0}, {"2": 0, "liver": 3}], ids=str
)
def test_a_class_has_the_lists_tolerance_and_the_others_that_of_the_flag(
    scored: Scored, of_list: dict[str, float], tmp_path: Path
) -> None:
    names = {1: "liver", 2: "spleen", 9: "tumour"}
    tolerance = {1: 3.0, 2: 0.0, 9: 1.5}
    content = {"labels": {**NAMED, "9": "tumour"}, "tolerance_mm": of_list}
    rows, summary = scored(content, tolerance=1.5)
    assert rows == by_hand(None, names, tolerance=tolerance)
    assert summary["tolerance_mm"] == {"1": 3.0, "2": 0.0, "9": 1.5}
    page = (tmp_path / "scores/report.html").read_text()
    assert "within 0 (spleen), 1.5 (tumour), 3 (liver) mm" in page


def test_the_background_is_not_ignored_and_something_is_left_to_score(scored: Scored) -> None:
    with pytest.raises(InputError, match="--ignore 0: is the background"):
        scored({"labels": NAMED}, ignore=0)
    with pytest.raises(InputError, match="names no class to score"):
        scored({"labels": {"0": "background", "9": "ignore"}})


# --- folds


def scores_of(folder: Path, dice: dict[str, float]) -> Path:
    """A folder with a scores.csv of one class, by case."""
    others = dict.fromkeys(COLUMNS[5:], 1.0)
    rows = []
    for case, value in dice.items():
        row = {"case": case, "class": 1, "name": "liver", "status": "ok", "dice": value}
        rows.append({**row, **others})
    folder.mkdir(parents=True)
    write_scores(rows, folder / "scores.csv")
    return folder


def cells(line: str) -> list[str]:
    """Of a row of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_folds_are_put_together_from_the_shell(tmp_path: Path) -> None:
    """Means of folds .7, .5 and .6: their mean .6, std .1. The mean of the four cases is .625."""
    a = scores_of(tmp_path / "fold0/scores", {"s0": 0.6, "s1": 0.8})
    b = scores_of(tmp_path / "fold1/scores", {"s2": 0.5})
    c = scores_of(tmp_path / "last", {"s3": 0.6})
    done = shell("folds", a, b / "scores.csv", c, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr

    lines = done.stdout.splitlines()
    head = cells(lines[0])
    assert head[:4] == ["Dice", "fold0_scores", "fold1_scores", "last"]
    assert head[4:] == ["mean of folds", "std", "mean of cases", "95 %", "n"]
    liver = cells(lines[2])
    assert liver[:7] == ["liver", "0.700", "0.500", "0.600", "0.600", "0.100", "0.625"]
    assert liver[-1] == "4"

    table = json.loads((tmp_path / "out/folds.json").read_text())
    assert table[0]["folds"]["fold0_scores"] == {"mean": pytest.approx(0.7), "n": 2}
    with (tmp_path / "out/folds.csv").open() as file:
        metrics = [row["metric"] for row in csv.DictReader(file)]
    assert metrics == [row["metric"] for row in table]
    assert names_in(tmp_path / "out") == {"folds.json", "folds.csv", "written.jsonl"}


def test_folds_that_are_not_there_or_given_twice_are_one_line(tmp_path: Path) -> None:
    a = scores_of(tmp_path / "a", {"s0": 0.5})
    for scores, word in (
        ((), "no scores.csv there"),
        ((str(tmp_path),), f"{tmp_path}: no scores.csv"),
        ((str(a), str(a / "scores.csv")), f"{a}: its name is there twice"),
    ):
        with pytest.raises(InputError, match=word):
            evaluate.folds(FoldsConfig(scores=scores, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# --- what cannot be done


@pytest.fixture
def answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answer:
    """The one line with which a command line is refused, exit code 2. --out is new, and is not left
    behind.
    """

    def run(command: str, *arguments: str | Path) -> str:
        out = tmp_path / "out"
        line = ["eval.py", command, *map(str, arguments), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", line)
        _, config = run_or_explain(evaluate.read_command, "eval.py")
        with pytest.raises(SystemExit) as stopped:
            run_or_explain(lambda: evaluate.COMMANDS[command](config), f"eval.py {command}")

        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(f"eval.py {command}: ")
        assert not out.exists()
        return error

    return run


def listed(folder: Path) -> Path:
    """A list of two cases, with labels and predictions."""
    items = []
    for n in range(2):
        saved(folder / "labels" / f"s{n}.nii.gz", blobs(0))
        saved(folder / "predictions" / f"s{n}.nii.gz", blobs(1))
        items.append({"image": f"s{n}.nii.gz", "label": f"labels/s{n}.nii.gz"})
    labels = {**NAMED, "9": "tumour"}
    return write_list(folder / "list.json", items, validation=items, labels=labels)


MOVED = AFFINE.copy()
MOVED[0, 3] = 5
STRANGE = np.where(blobs(0) == 9, 77, blobs(0))
HALVED = (blobs(0) / 2).astype(np.float32)
DOUBLED = np.stack([blobs(0), blobs(0)], axis=-1)


@pytest.mark.parametrize("folder", ["labels", "predictions"])
@pytest.mark.parametrize(
    "labels, affine, word",
    [
        (blobs(0)[1:], AFFINE, "different grids: "),
        (blobs(0), MOVED, "corners lie up to 5 mm"),
        (STRANGE, AFFINE, "label 77 is not declared; declared are [0, 1, 2, 9]"),
        (HALVED, AFFINE, "holds 0.5, but labels are whole numbers"),
        (DOUBLED, AFFINE, "14 x 16 x 18 x 2; a label map has three"),
    ],
    ids=["cut", "moved", "strange", "halved", "doubled"],
)
def test_label_maps_that_do_not_fit_are_refused_by_file(
    answer: Answer, tmp_path: Path, folder: str, labels: np.ndarray, affine: np.ndarray, word: str
) -> None:
    data = listed(tmp_path)
    path = saved(tmp_path / folder / "s1.nii.gz", labels, affine)
    for command in ("score", "tune"):
        line = answer(command, "--predictions", tmp_path / "predictions", "--data", data)
        assert str(path) in line
        assert word in line


def test_files_that_do_not_belong_together_are_named(answer: Answer, tmp_path: Path) -> None:
    data = listed(tmp_path)
    predictions = tmp_path / "predictions"
    of_list = ("--predictions", predictions, "--data", data)
    of_folder = ("--predictions", predictions, "--labels", tmp_path / "labels")

    assert "--predictions (none)" in answer("score", "--data", data)
    nowhere = answer("score", "--predictions", "nowhere", "--data", data)
    assert "--predictions nowhere: no such folder" in nowhere
    assert "--data (none)" in answer("score", "--predictions", predictions)
    assert "--split test" in answer("score", *of_list, "--split", "test")

    (tmp_path / "empty").mkdir()
    empty = answer("score", "--predictions", tmp_path / "empty", "--data", data)
    assert "empty: holds no .nii" in empty

    (predictions / "s1.nii.gz").rename(predictions / "other.nii.gz")
    assert "no label for case other" in answer("score", *of_list)
    (predictions / "other.nii.gz").unlink()
    assert "no prediction for case s1" in answer("score", *of_list)

    saved(predictions / "s1.nii.gz", blobs(1))
    (tmp_path / "labels/s1.nii.gz").unlink()
    assert "labels/s1.nii.gz: no such file" in answer("score", *of_list)
    assert "no label for case s1" in answer("score", *of_folder)


def weights(path: Path, **other: Any) -> Path:
    """A checkpoint as train_seg.py leaves it, of a network that has learned nothing."""
    plan = {
        "backbone": "swin_unetr",
        "arguments": NETWORK,
        "in_channels": 1,
        "out_channels": 3,
        "crop": [16, 16, 16],
        "classes": {"0": "background", "1": "liver", "2": "spleen"},
        "spacing": [],
        "modalities": ["ct"],
        "intensity": {"ct": ["window"]},
        "ct_window": [-100.0, 300.0],
        "mr_intensity": "zscore",
        "flip_axes": [],
    }
    network = SwinUNETR(1, 3, **NETWORK)
    checkpoint.save(path, {"plan": {**plan, **other}, "model": network.state_dict()})
    return path


def test_what_cannot_be_predicted_is_one_line(answer: Answer, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 200, (16, 16, 16, 2)).astype(np.float32)
    two_channels = saved(tmp_path / "two/image.nii.gz", values)
    image = saved(tmp_path / "one/image.nii.gz", values[..., 0])
    good = weights(tmp_path / "good.pt")
    pretrained = weights(tmp_path / "pretrained.pt", classes={})
    prose = tmp_path / "prose.pt"
    prose.write_text("none" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()

    one = ("--images", image)
    ready = (*one, "--checkpoint", good)
    for arguments, word in [
        (one, "--checkpoint: give"),
        ((*one, "--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
        ((*one, "--checkpoint", prose), "prose.pt: damaged or not one of ours"),
        ((*one, "--checkpoint", pretrained), "pretrained.pt: names no classes"),
        ((*ready, pretrained), "pretrained.pt: its classes differs"),
        ((*ready, "--modality", "t1"), "--modality t1: the network knows ct"),
        ((*ready, "--postprocess", "none.json"), "none.json: not a post-processing"),
        ((*ready, "--device", "cpu", "--amp", "fp16"), "--amp"),
        (
            ("--images", two_channels, "--checkpoint", good),
            "two/image.nii.gz: 2 channels, the network takes 1",
        ),
        (("--images", "none.nii.gz", "--checkpoint", good), "none.nii.gz: no such file"),
        (("--images", empty, "--checkpoint", good), "empty: no .nii or .nii.gz files in it"),
        (("--checkpoint", good), "--data (none)"),
        (
            ("--checkpoint", good, "--data", listed(tmp_path), "--modality", "ct"),
            "s0.nii.gz: no such file",
        ),
    ]:
        assert word in answer("predict", *arguments), arguments

    out = tmp_path / "out"
    config = PredictConfig(
        images=(str(image),), checkpoint=(str(good),), out=str(out), device="cpu"
    )
    assert evaluate.predict(config) == [out / "image.nii.gz"]


def test_from_the_shell_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    where = ("--data", listed(tmp_path), "--out", tmp_path / "o")
    for arguments, word in [
        (("score", "--predictions", "nowhere", *where), "nowhere"),
        (("scoer",), "scoer: not a command"),
        (("score", "--predictoins", "x"), "--predictoins"),
        (("compare", "a"), "a: no scores.csv"),
        (("predict", "--overlap", "2"), "--overlap 2"),
    ]:
        done = shell(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("eval.py")
        assert word in done.stderr
        assert not done.stdout


# --- what is predicted


def noise(path: Path, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).normal(0, 200, (12, 14, 16)).astype(np.float32)
    return saved(path, values)


@pytest.fixture
def predict(tmp_path: Path) -> Predict:
    """Predict with an untrained network into tmp_path/out. Other arguments override."""

    def run(*images: Path, **arguments: Any) -> list[Path]:
        good = tmp_path / "good.pt"
        if "checkpoint" not in arguments and not good.exists():
            weights(good)
        common: dict[str, Any] = {
            "checkpoint": (str(good),),
            "out": str(tmp_path / "out"),
            "device": "cpu",
            "amp": "off",
            "images": tuple(map(str, images)),
        }
        return list(evaluate.predict(PredictConfig(**{**common, **arguments})))

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that a network was asked about, in order."""
    seen: list[Path] = []
    predicted = evaluate.predict_case

    def remember(model: Any, case: Any) -> Any:
        seen.append(case.item.image[0])
        return predicted(model, case)

    monkeypatch.setattr(evaluate, "predict_case", remember)
    return seen


def test_no_scan_and_no_label_is_ever_written_over(
    predict: Predict, asked: list[Path], tmp_path: Path
) -> None:
    """The folder of the scans, by a link as well. That of the labels. A folder with other people's
    label maps.
    """
    scans = tmp_path / "set/imagesTr"
    labels = tmp_path / "set/labelsTr"
    others = tmp_path / "set/others"
    items = []
    for n in range(2):
        noise(scans / f"s{n}.nii.gz", n)
        saved(labels / f"s{n}.nii.gz", blobs(0)[:12, :14, :16])
        image, label = f"imagesTr/s{n}.nii.gz", f"labelsTr/s{n}.nii.gz"
        items.append({"image": image, "label": label, "modality": "ct"})
    saved(others / "s1.nii.gz", blobs(0))
    data = write_list(tmp_path / "set/list.json", items, test=items, labels=NAMED)
    (tmp_path / "link").symlink_to(scans)
    before = bytes_in(tmp_path / "set")

    of_list = {"data": str(data), "split": "test"}
    for arguments, out, word in (
        ({"images": (str(scans),)}, scans, "is the folder of"),
        ({"images": (str(scans / "s0.nii.gz"),)}, tmp_path / "link", "is the folder of"),
        (of_list, scans, "is the folder of"),
        (of_list, labels, "is the folder of"),
        (of_list, others, "others/s1.nii.gz is there already"),
    ):
        with pytest.raises(InputError, match=word) as error:
            predict(out=str(out), **arguments)
        assert f"--out {out}: " in str(error.value)
    assert not asked
    assert bytes_in(tmp_path / "set") == before

    predict(**of_list, out=str(scans / "predictions"))  # a folder of its own
    assert bytes_in(tmp_path / "set").items() > before.items()


def test_a_prediction_corrected_by_hand_is_kept(predict: Predict, tmp_path: Path) -> None:
    image = noise(tmp_path / "in/s0.nii.gz")
    (path,) = predict(image)
    saved(path, np.ones((12, 14, 16), np.uint8))
    corrected = path.read_bytes()
    with pytest.raises(InputError, match=r"s0.nii.gz was changed since it was written"):
        predict(image)
    assert path.read_bytes() == corrected


def damaged(folder: Path) -> dict[str, str]:
    """A good file and four that cannot be used, and why."""
    good = noise(folder / "a.nii.gz")
    values = labels_in(good)
    (folder / "cut.nii.gz").write_bytes(good.read_bytes()[:-2000])
    saved(folder / "flat.nii.gz", np.zeros_like(values))
    saved(folder / "nan.nii.gz", np.where(values > 300, np.nan, values))
    saved(folder / "two.nii.gz", np.stack([values, values], axis=-1))
    return {
        "cut": "cut short or damaged",
        "flat": "every voxel is 0",
        "nan": "NaN or infinite",
        "two": "2 channels",
    }


def test_a_bad_file_does_not_keep_the_others_from_prediction(
    predict: Predict, tmp_path: Path
) -> None:
    reasons = damaged(tmp_path / "in")
    noise(tmp_path / "in/z.nii.gz", 1)
    with pytest.raises(InputError) as error:
        predict(tmp_path / "in")
    line = str(error.value)
    assert line.startswith("4 of 6 cases could not be predicted: ")
    assert "\n" not in line
    for name, reason in reasons.items():
        assert f"in/{name}.nii.gz: " in line
        assert reason in line
    label_maps = {"a.nii.gz", "z.nii.gz"}
    assert names_in(tmp_path / "out") == label_maps | {"predicted.json", "written.jsonl"}


def test_a_case_that_does_not_fit_into_memory_names_the_flags_that_need_less() -> None:
    item = Item((Path("large.nii"),), ("ct",), ("window",), "s1")
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")
    words = evaluate.failure_in_words(error, item)
    assert words.startswith("large.nii: out of memory (CUDA out of memory. Tried")
    assert "--batch" in words and "--device cpu" in words
    assert evaluate.failure_in_words(InputError("large.nii: cut short"), item) == (
        "large.nii: cut short"
    )


def test_an_item_without_its_file_does_not_keep_the_others_from_prediction(
    predict: Predict, tmp_path: Path
) -> None:
    items = [{"image": f"in/{name}.nii.gz", "modality": "ct"} for name in ("a", "lost", "z")]
    noise(tmp_path / "in/a.nii.gz")
    noise(tmp_path / "in/z.nii.gz", 1)
    data = write_list(tmp_path / "list.json", items, test=items)
    word = r"1 of 3 cases could not be predicted: .*in/lost.nii.gz: no such file"
    with pytest.raises(InputError, match=word):
        predict(data=str(data), split="test")
    assert {"a.nii.gz", "z.nii.gz"} < names_in(tmp_path / "out")


def test_from_the_shell_cases_that_failed_are_named_and_the_exit_code_is_2(tmp_path: Path) -> None:
    damaged(tmp_path / "in")
    model = ("--checkpoint", weights(tmp_path / "w.pt"), "--device", "cpu")
    done = shell("predict", *model, "--images", tmp_path / "in", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cut.nii.gz" in done.stderr
    assert f"1 label map in {tmp_path / 'o'}" in done.stdout
    assert (tmp_path / "o/a.nii.gz").is_file()


def test_finished_cases_are_not_predicted_again(
    predict: Predict, asked: list[Path], tmp_path: Path
) -> None:
    images = [noise(tmp_path / f"in/s{n}.nii.gz", n) for n in range(3)]
    label_maps = [tmp_path / f"out/s{n}.nii.gz" for n in range(3)]
    assert predict(*images[:2]) == label_maps[:2]
    assert predict(*images) == label_maps
    assert asked == images

    label_maps[1].unlink()
    noise(images[2], seed=9)  # the same file with other voxels
    predict(*images)
    assert asked[3:] == images[1:]

    (tmp_path / "in").rename(tmp_path / "moved")
    predict(*(tmp_path / f"moved/s{n}.nii.gz" for n in range(3)))
    assert len(asked) == 5

    first = json.loads((tmp_path / "out/written.jsonl").read_text().splitlines()[0])
    assert first["settings"]["overlap"] == 0.5
    assert first["source"]["images"] == [str(images[0])]


def test_predictions_of_other_settings_or_images_do_not_come_into_one_folder(
    predict: Predict, tmp_path: Path
) -> None:
    image = noise(tmp_path / "in/s0.nii.gz")
    another = noise(tmp_path / "in/s1.nii.gz", 1)
    predict(image)
    before = bytes_in(tmp_path / "out")
    (tmp_path / "steps.json").write_text("{}")

    other_settings: dict[str, Any] = {
        "checkpoint": (str(weights(tmp_path / "other.pt", flip_axes=[1, 2])),),
        "tta": True,
        "overlap": 0.25,
        "ensemble": "logits",
        "amp": "bf16",
        "postprocess": str(tmp_path / "steps.json"),
    }
    for flag, value in other_settings.items():
        for input_file in (image, another):
            with pytest.raises(InputError, match=f"s0.nii.gz was predicted with another --{flag} "):
                predict(input_file, **{flag: value})
    with pytest.raises(InputError, match=r"s0.nii.gz was predicted from .*in/s0.nii.gz"):
        predict(noise(tmp_path / "elsewhere/s0.nii.gz", 5))
    assert bytes_in(tmp_path / "out") == before

    predict(image, batch=1)  # how many windows go at once changes nothing


def test_hidden_files_are_no_images(predict: Predict, tmp_path: Path) -> None:
    noise(tmp_path / "in/S0.NII.GZ")
    (tmp_path / "in/._S0.NII.GZ").write_bytes(b"\0\5\26\7 Mac OS X")
    assert predict(tmp_path / "in") == [tmp_path / "out/S0.nii.gz"]


def test_a_network_meets_only_what_it_was_trained_on(
    predict: Predict, asked: list[Path], tmp_path: Path
) -> None:
    """The modality and its intensity, whether a list or a flag names them, of every member of an
    ensemble.
    """
    image = noise(tmp_path / "s0.nii.gz")
    mr = {"modalities": ["t1"], "intensity": {"t1": ["mr"]}}
    ct_network = str(weights(tmp_path / "ct.pt"))
    t1_network = str(weights(tmp_path / "t1.pt", **mr))

    def of_list(*checkpoints: str, modality: str, **entry: str) -> list[Path]:
        items = [{"image": "s0.nii.gz", **entry}]
        data = write_list(tmp_path / "list.json", items, test=items)
        return predict(
            checkpoint=checkpoints,
            data=str(data),
            split="test",
            modality=modality,
            out=str(tmp_path / f"out{len(asked)}"),
        )

    with pytest.raises(InputError, match=r"s0.nii.gz: modality t1: the network knows ct"):
        of_list(ct_network, modality="t1")
    with pytest.raises(InputError, match="modality mr: the network knows ct"):
        of_list(ct_network, modality="mr")
    with pytest.raises(InputError, match="modality ct: the network knows t1"):
        of_list(ct_network, t1_network, modality="ct")
    with pytest.raises(InputError, match=r"intensity percentile, but .* on ct by window"):
        of_list(ct_network, modality="ct", intensity="percentile")
    with pytest.raises(InputError, match="--modality t1: the network knows ct"):
        predict(image, checkpoint=(ct_network,), modality="t1")
    with pytest.raises(InputError, match="modality ct: the network knows t1"):
        predict(image, checkpoint=(ct_network, t1_network))
    assert not asked

    assert of_list(ct_network, modality="ct")
    assert of_list(t1_network, modality="t1")
    assert of_list(t1_network, modality="t1", intensity="zscore")  # what "mr" means in this plan


def test_a_list_that_gives_the_networks_labels_other_names_is_of_another_task(
    predict: Predict, tmp_path: Path
) -> None:
    """Else a kidney is scored as a tumour. Capitals are no difference, and neither are classes that
    only one of the two has.
    """
    noise(tmp_path / "s0.nii.gz")
    items = [{"image": "s0.nii.gz", "modality": "ct"}]

    def with_labels(labels: dict[str, str]) -> list[Path]:
        data = write_list(tmp_path / "list.json", items, test=items, labels=labels)
        return predict(data=str(data), split="test")

    word = r"list.json: label 1 is 'tumour' there and 'liver' in the checkpoint"
    with pytest.raises(InputError, match=word):
        with_labels({"0": "background", "1": "tumour", "2": "spleen"})
    assert not (tmp_path / "out").exists()
    assert with_labels({"0": "air", "1": "Liver", "3": "cyst"})


def test_a_postprocessing_of_a_class_that_the_network_has_not_is_refused(
    predict: Predict, tmp_path: Path
) -> None:
    (tmp_path / "steps.json").write_text('{"9": [{"do": "fill_holes"}]}')
    with pytest.raises(InputError, match=r"steps\.json: label 9 is no class of the checkpoint"):
        predict(noise(tmp_path / "s0.nii.gz"), postprocess=str(tmp_path / "steps.json"))


# --- test-time flips


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of each call of `sliding_window`."""
    calls: list[dict[str, Any]] = []
    sliding_window = evaluate.sliding_window

    def remember(*arguments: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return sliding_window(*arguments, **keywords)

    monkeypatch.setattr(evaluate, "sliding_window", remember)
    return calls


def test_test_time_flips_are_those_of_the_training(
    predict: Predict,
    windows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint of before names all axes whatever --flip was. Its configuration has --flip."""
    image = noise(tmp_path / "s0.nii.gz")
    state = checkpoint.load(weights(tmp_path / "flipped.pt", flip_axes=[0, 1, 2]))
    checkpoint.save(tmp_path / "still.pt", {**state, "config": {"flip": 0.0}})
    checkpoint.save(tmp_path / "often.pt", {**state, "config": {"flip": 0.5}})

    three_axes = "averaged over flips along axes 0 (left-right), 1 (front-back), 2 (up-down)"
    none = "--tta takes those of the training, which had none"
    for name, flips, words in [
        ("flipped", (0, 1, 2), three_axes),
        ("often", (0, 1, 2), three_axes),
        ("still", (), none),
    ]:
        path = str(tmp_path / f"{name}.pt")
        predict(image, checkpoint=(path,), tta=True, out=str(tmp_path / name))
        assert tuple(windows[-1]["flips"]) == flips
        assert words in capsys.readouterr().out

    both = (str(tmp_path / "often.pt"), str(tmp_path / "still.pt"))
    with pytest.raises(
        InputError, match=r"still.pt: its flip_axes differs from that of .*often.pt"
    ):
        predict(image, checkpoint=both)


def told_by_side(network: Any, dtype: Any, device: Any, x: Tensor) -> Tensor:
    """For a network: what is bright is the second class in the first half, else the third."""
    organ = (x[:, 0] > 0.5).float()
    first_half = (torch.arange(16) < 8).float()[:, None, None]
    return 9 * torch.stack([1 - organ, organ * first_half, organ * (1 - first_half)], dim=1)


def test_labels_that_swap_keep_their_side_under_test_time_flips(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two like organs, labels 3 and 7, and a network that tells them by their side alone."""
    truth = np.zeros((16, 16, 16), np.uint8)
    truth[2:6, 4:9, 5:9] = 3
    truth[10:14, 4:9, 5:9] = 7
    values = np.where(truth > 0, 300, -100).astype(np.float32)
    image = saved(tmp_path / "s0.nii.gz", values, np.eye(4))

    monkeypatch.setattr(evaluate, "forward", told_by_side)
    classes = {"0": "background", "3": "organ left", "7": "organ right"}
    plan = {"classes": classes, "flip_axes": [0, 1, 2]}
    with_swap = str(weights(tmp_path / "swap.pt", **plan, swap=[[3, 7]]))
    for tta in (False, True):
        (found,) = predict(image, checkpoint=(with_swap,), tta=tta, out=str(tmp_path / f"{tta}"))
        assert np.array_equal(labels_in(found), truth)

    without = str(weights(tmp_path / "other.pt", **plan, swap=[]))
    with pytest.raises(InputError, match=r"other.pt: its swap differs"):
        predict(image, checkpoint=(with_swap, without))


def test_a_network_of_before_that_mirrored_its_sides_is_named(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = noise(tmp_path / "s0.nii.gz")
    classes = {"0": "background", "1": "rkid", "2": "lkid"}
    plan = {"classes": classes, "flip_axes": [0, 1, 2]}
    predict(image, checkpoint=(str(weights(tmp_path / "old.pt", **plan)),))
    assert "'rkid' and 'lkid' may be taken for each other" in capsys.readouterr().out

    decided = weights(tmp_path / "new.pt", **plan, swap=[], flips='the list says "swap": []')
    predict(image, checkpoint=(str(decided),), out=str(tmp_path / "new"))
    assert "taken for each other" not in capsys.readouterr().out


def test_an_ensemble_holds_its_networks_and_nothing_else_of_its_checkpoints(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser is twice as large as the network, and twenty members have twenty."""
    path = weights(tmp_path / "w.pt")
    state = checkpoint.load(path)
    state["optimizer"] = {"exp_avg": torch.ones(7)}
    checkpoint.save(path, state)

    loaded: list[weakref.ref[Tensor]] = []
    load_checkpoint = checkpoint.load

    def alive() -> int:
        return sum(reference() is not None for reference in loaded)

    def load(path: Path, **how: Any) -> dict[str, Any]:
        assert alive() == 0  # one at a time
        state = load_checkpoint(path, **how)
        for tensor in (*state["model"].values(), state["optimizer"]["exp_avg"]):
            loaded.append(weakref.ref(tensor))
        return state

    def background(*arguments: Any) -> np.ndarray:
        return np.zeros((12, 14, 16), np.uint8)

    monkeypatch.setattr(checkpoint, "load", load)
    monkeypatch.setattr(evaluate, "predict_image", background)
    predict(noise(tmp_path / "s0.nii.gz"), checkpoint=(str(path),) * 3)
    assert len(loaded) > 30
    assert alive() == 0


# --- what the other commands write


@pytest.mark.parametrize(
    "command, name",
    [
        ("score", "scores.csv"),
        ("score", "summary.json"),
        ("score", "report.html"),
        ("score", "figures/worst-s1.png"),
        ("tune", "postprocess.json"),
        ("compare", "compare.csv"),
        ("folds", "folds.json"),
    ],
)
def test_no_command_replaces_a_file_that_is_not_its_own(
    command: str, name: str, scored: Scored, tmp_path: Path
) -> None:
    """And each may be run again over what it wrote itself."""
    scored()
    a = str(scores_of(tmp_path / "a", {"s0": 0.5, "s1": 0.6}))
    b = str(scores_of(tmp_path / "b", {"s0": 0.6, "s1": 0.7}))
    predictions = str(tmp_path / "predictions")
    labels = str(tmp_path / "labels")
    out = tmp_path / "new"
    config = {
        "score": ScoreConfig(predictions=predictions, labels=labels, out=str(out)),
        "tune": TuneConfig(predictions=predictions, labels=labels, out=str(out)),
        "compare": CompareConfig(a=a, b=b, out=str(out)),
        "folds": FoldsConfig(scores=(a, b), out=str(out)),
    }[command]

    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("of the user")
    with pytest.raises(InputError, match="is there already"):
        evaluate.COMMANDS[command](config)
    assert bytes_in(out) == {name: b"of the user"}

    (out / name).unlink()
    evaluate.COMMANDS[command](config)
    first = bytes_in(out)
    evaluate.COMMANDS[command](config)
    assert name in first
    assert bytes_in(out).keys() == first.keys()


def test_scores_made_in_another_way_are_not_compared(scored: Scored, tmp_path: Path) -> None:
    """Neither runs nor folds: by another tolerance, or against labels that were corrected since."""
    scored()
    (tmp_path / "scores").rename(tmp_path / "a")
    scored(tolerance=2.0)
    (tmp_path / "scores").rename(tmp_path / "tolerance")
    scored()
    (tmp_path / "scores").rename(tmp_path / "same")
    labels = blobs(0)
    labels[3, 3, 4] = 2
    saved(tmp_path / "labels/s1.nii.gz", labels)
    scored()
    (tmp_path / "scores").rename(tmp_path / "corrected")

    a = str(tmp_path / "a")
    for name, word in (
        ("tolerance", "different --tolerance"),
        ("corrected", "label maps of case s1"),
    ):
        other = str(tmp_path / name)
        with pytest.raises(InputError, match=word):
            evaluate.compare(CompareConfig(a=a, b=other))
        with pytest.raises(InputError, match=word):
            evaluate.folds(FoldsConfig(scores=(a, other)))
    assert evaluate.compare(CompareConfig(a=a, b=str(tmp_path / "same")))


def test_scores_without_a_summary_are_compared_with_one_line_of_warning(
    scored: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored()
    old = scores_of(tmp_path / "old", {"s0": 0.5, "s1": 0.6})
    capsys.readouterr()
    evaluate.compare(CompareConfig(a=str(tmp_path / "scores"), b=str(old)))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {old}: ")
    assert error.count("\n") == 1


# --- help


@pytest.mark.parametrize("command", ["", *evaluate.CONFIGS])
def test_help_answers_without_torch_in_half_a_second(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    line = [sys.executable, str(ROOT / "eval.py"), *arguments]
    seconds = []
    for _ in range(3):  # of processor time: a busy machine takes longer
        before = os.times()
        done = subprocess.run(line, capture_output=True, text=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # of child processes
        assert done.returncode == 0
        assert command in done.stdout
    assert min(seconds) < 0.5
