"""eval.py on label maps made by hand: what is scored, by which numbers, and one line for what cannot be."""

import csv
import importlib
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import NETWORK, ROOT, environment
from torch import Tensor

from dae.errors import InputError
from dae.config.command_line import run_or_explain
from dae.config.evaluate import CompareConfig, FoldsConfig, PredictConfig, ScoreConfig, TuneConfig
from dae.evaluation.metrics import score_labels
from dae.evaluation.cases import COLUMNS, read_scores, write_scores
from dae.model import SwinUNETR
from dae.weights import checkpoint

evaluate = importlib.import_module("eval")
SPACING = (3.0, 1.0, 2.0)
Scored = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]


def blobs(seed: int) -> np.ndarray:
    """Boxes of labels 1, 2 and 9 on a background of zeros, some of them moved by the seed."""
    labels = np.zeros((14, 16, 18), np.uint8)
    labels[2 + seed : 7, 2:9, 3:12] = 1
    labels[8:13, 4 : 10 - seed, 2:9] = 2
    labels[4:10, 10:15, 10:16] = 9
    return labels


def saved(path: Path, labels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([*SPACING, 1.0]) if affine is None else affine), path)
    return path


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    """Score two cases of a list, or of a folder of labels; the rows and summary.json."""
    for n in range(2):
        truth, prediction = blobs(0), blobs(1 + n)
        prediction[prediction == 9] = 1 + n
        saved(tmp_path / "labels" / f"s{n}.nii.gz", truth)
        saved(tmp_path / "predictions" / f"s{n}.nii.gz", prediction)

    def score(content: dict[str, Any] | None = None, **given: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if content:
            items = [{"image": f"s{n}.nii.gz", "label": f"labels/s{n}.nii.gz"} for n in range(2)]
            (tmp_path / "list.json").write_text(json.dumps({"training": items, "validation": items, **content}))
        where = {"data": str(tmp_path / "list.json")} if content else {"labels": str(tmp_path / "labels")}
        out = tmp_path / "scores"
        evaluate.score(ScoreConfig(predictions=str(tmp_path / "predictions"), out=str(out), **where, **given))
        return read_scores(out / "scores.csv"), json.loads((out / "summary.json").read_text())

    return score


def by_hand(ignore: int | None, names: dict[int, str], **how: Any) -> list[dict[str, Any]]:
    rows = []
    for n in range(2):
        truth, prediction = blobs(0), blobs(1 + n)
        prediction[prediction == 9] = 1 + n
        hidden = None if ignore is None else truth == ignore
        truth = np.where(truth == ignore, 0, truth)
        scores = score_labels(prediction, truth, SPACING, names, ignore=hidden, **how)
        rows += [{"case": f"s{n}", **row} for row in scores]
    return rows


NAMED = {"0": "background", "1": "liver", "2": "spleen"}


@pytest.mark.parametrize("content, given", [
    ({"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 9}}, {}),
    ({"labels": NAMED}, {"ignore": 9}), ({"labels": {**NAMED, "9": "tumour"}}, {"ignore": 9}),
])
def test_an_ignored_region_counts_for_nothing_whoever_names_it(
    scored: Scored, content: dict[str, Any], given: dict[str, Any]
) -> None:
    rows, summary = scored(content, **given)
    assert rows == by_hand(9, {1: "liver", 2: "spleen"})
    assert summary["ignore"] == 9 and set(summary["classes"]) == {"1", "2"}


def test_labels_of_a_folder_may_be_ignored_as_well(scored: Scored) -> None:
    assert scored(ignore=9)[0] == by_hand(9, {1: "1", 2: "2"})
    rows, summary = scored()
    assert [row["class"] for row in rows] == [1, 2, 9] * 2 and summary["ignore"] is None


def test_a_plan_is_tuned_without_what_is_ignored(scored: Scored, tmp_path: Path) -> None:
    scored({"labels": {**NAMED, "9": "ignore"}})
    common = {"predictions": str(tmp_path / "predictions"), "out": str(tmp_path / "plan")}
    evaluate.tune(TuneConfig(**common, data=str(tmp_path / "list.json")))
    evaluate.tune(TuneConfig(**common, labels=str(tmp_path / "labels"), ignore=9))


@pytest.mark.parametrize("of_list", [{"1": 3.0, "2": 0}, {"liver": 3.0, "spleen": 0.0}, {"2": 0, "liver": 3}])
def test_a_class_has_the_lists_tolerance_and_the_others_that_of_the_flag(
    scored: Scored, of_list: dict[str, float], tmp_path: Path
) -> None:
    content = {"labels": {**NAMED, "9": "tumour"}, "tolerance_mm": of_list}
    rows, summary = scored(content, tolerance=1.5)
    assert rows == by_hand(None, {1: "liver", 2: "spleen", 9: "tumour"}, tolerance={1: 3.0, 2: 0.0, 9: 1.5})
    assert summary["tolerance_mm"] == {"1": 3.0, "2": 0.0, "9": 1.5}
    assert "within 0 (spleen), 1.5 (tumour), 3 (liver) mm" in (tmp_path / "scores/report.html").read_text()


def test_the_background_is_not_ignored_and_something_is_left_to_score(scored: Scored) -> None:
    with pytest.raises(InputError, match="--ignore 0: is the background"):
        scored({"labels": NAMED}, ignore=0)
    with pytest.raises(InputError, match="names no class to score"):
        scored({"labels": {"0": "background", "9": "ignore"}})


# --- folds


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment())


def fold(folder: Path, dice: dict[str, float]) -> Path:
    """A folder with a scores.csv of one class, by case."""
    rest = dict.fromkeys(COLUMNS[5:], 1.0)
    folder.mkdir(parents=True)
    write_scores([{"case": case, "class": 1, "name": "liver", "status": "ok", "dice": value, **rest}
                  for case, value in dice.items()], folder / "scores.csv")
    return folder


def test_folds_are_put_together_from_the_shell(tmp_path: Path) -> None:
    """Means of folds .7, .5 and .6: their mean .6, std .1; the mean of the four cases .625."""
    a = fold(tmp_path / "fold0/scores", {"s0": 0.6, "s1": 0.8})
    b = fold(tmp_path / "fold1/scores", {"s2": 0.5})
    c = fold(tmp_path / "last", {"s3": 0.6})
    done = shell("folds", a, b / "scores.csv", c, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    head, _, line, *_ = ([cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines())
    assert head[:4] == ["Dice", "fold0_scores", "fold1_scores", "last"]
    assert head[4:] == ["mean of folds", "std", "mean of cases", "95 %", "n"]
    assert line[:7] == ["liver", "0.700", "0.500", "0.600", "0.600", "0.100", "0.625"] and line[-1] == "4"
    table = json.loads((tmp_path / "out/folds.json").read_text())
    assert table[0]["folds"]["fold0_scores"] == {"mean": pytest.approx(0.7), "n": 2}
    with (tmp_path / "out/folds.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)] == [line["metric"] for line in table]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"folds.json", "folds.csv", "written.jsonl"}


def test_folds_that_are_not_there_or_given_twice_are_one_line(tmp_path: Path) -> None:
    a = fold(tmp_path / "a", {"s0": 0.5})
    for scores, word in (((), "no scores.csv there"), ((str(tmp_path),), f"{tmp_path}: no scores.csv"),
                         ((str(a), str(a / "scores.csv")), f"{a}: its name is there twice")):
        with pytest.raises(InputError, match=word):
            evaluate.folds(FoldsConfig(scores=scores, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# --- what cannot be done


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a command line is refused, exit code 2; --out is new, and is not left behind."""

    def run(command: str, *arguments: str | Path) -> str:
        out, chosen = tmp_path / "out", []
        monkeypatch.setattr(sys, "argv", ["eval.py", command, *map(str, arguments), "--out", str(out)])
        run_or_explain(lambda: chosen.append(evaluate.read_command()), "eval.py")
        with pytest.raises(SystemExit) as stopped:
            run_or_explain(lambda: evaluate.COMMANDS[chosen[0][0]](chosen[0][1]), f"eval.py {command}")
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and line.count("\n") == 1 and line.startswith(f"eval.py {command}: ")
        assert not out.exists()
        return line

    return run


def cut(labels: np.ndarray) -> np.ndarray:
    return labels[1:]


def as_it_is(labels: np.ndarray) -> np.ndarray:
    return labels


def with_a_strange_label(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == 9, 77, labels)


def halved(labels: np.ndarray) -> np.ndarray:
    return (labels / 2).astype(np.float32)


def twice(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels, labels], axis=-1)


MOVED = np.diag([*SPACING, 1.0])
MOVED[0, 3] = 5


def listed(folder: Path) -> Path:
    """A list of two cases, with labels and predictions."""
    for n in range(2):
        saved(folder / "labels" / f"s{n}.nii.gz", blobs(0))
        saved(folder / "predictions" / f"s{n}.nii.gz", blobs(1))
    items = [{"image": f"s{n}.nii.gz", "label": f"labels/s{n}.nii.gz"} for n in range(2)]
    content = {"training": items, "validation": items, "labels": {**NAMED, "9": "tumour"}}
    (folder / "list.json").write_text(json.dumps(content))
    return folder / "list.json"


@pytest.mark.parametrize("folder", ["labels", "predictions"])
@pytest.mark.parametrize("change, affine, word", [
    (cut, None, "different grids: "), (as_it_is, MOVED, "corners lie up to 5 mm"),
    (with_a_strange_label, None, "label 77 is not declared; declared are [0, 1, 2, 9]"),
    (halved, None, "holds 0.5, but labels are whole numbers"), (twice, None, "14 x 16 x 18 x 2; a label map has three"),
])
def test_label_maps_that_do_not_fit_are_refused_by_file(
    answer: Callable[..., str], tmp_path: Path, folder: str, change: Callable[[np.ndarray], np.ndarray],
    affine: np.ndarray | None, word: str,
) -> None:
    data = listed(tmp_path)
    path = saved(tmp_path / folder / "s1.nii.gz", change(blobs(0)), affine)
    for command in ("score", "tune"):
        line = answer(command, "--predictions", tmp_path / "predictions", "--data", data)
        assert str(path) in line and word in line


def test_files_that_do_not_belong_together_are_named(answer: Callable[..., str], tmp_path: Path) -> None:
    data, predictions = listed(tmp_path), tmp_path / "predictions"
    assert "--predictions (none)" in answer("score", "--data", data)
    assert "--predictions nowhere: no such folder" in answer("score", "--predictions", "nowhere", "--data", data)
    assert "--data (none)" in answer("score", "--predictions", predictions)
    assert "--split test" in answer("score", "--predictions", predictions, "--data", data, "--split", "test")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no .nii" in answer("score", "--predictions", tmp_path / "empty", "--data", data)
    (predictions / "s1.nii.gz").rename(predictions / "other.nii.gz")
    assert "no label for case other" in answer("score", "--predictions", predictions, "--data", data)
    (predictions / "other.nii.gz").unlink()
    assert "no prediction for case s1" in answer("score", "--predictions", predictions, "--data", data)
    saved(predictions / "s1.nii.gz", blobs(1))
    (tmp_path / "labels/s1.nii.gz").unlink()
    assert "labels/s1.nii.gz: no such file" in answer("score", "--predictions", predictions, "--data", data)
    assert "no label for case s1" in answer("score", "--predictions", predictions, "--labels", tmp_path / "labels")


def weights(path: Path, **other: Any) -> Path:
    """A checkpoint as train_seg.py leaves it, of a network that has learned nothing."""
    plan = {
        "backbone": "swin_unetr", "arguments": NETWORK, "in_channels": 1, "out_channels": 3, "crop": [16, 16, 16],
        "classes": {"0": "background", "1": "liver", "2": "spleen"}, "spacing": [], "modalities": ["ct"],
        "intensity": {"ct": ["window"]}, "ct_window": [-100.0, 300.0], "mr_intensity": "zscore", "flip_axes": [],
    }
    checkpoint.save(path, {"plan": {**plan, **other}, "model": SwinUNETR(1, 3, **NETWORK).state_dict()})
    return path


def test_what_cannot_be_predicted_is_one_line(answer: Callable[..., str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 200, (16, 16, 16, 2)).astype(np.float32)
    two = saved(tmp_path / "two/image.nii.gz", noise)
    one = saved(tmp_path / "one/image.nii.gz", noise[..., 0])
    good, pretrained = weights(tmp_path / "good.pt"), weights(tmp_path / "pretrained.pt", classes={})
    (tmp_path / "prose.pt").write_text("none" * 100)
    (tmp_path / "empty").mkdir()
    for given, word in [
        (("--images", one), "--checkpoint: give"),
        (("--images", one, "--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
        (("--images", one, "--checkpoint", tmp_path / "prose.pt"), "prose.pt: damaged or not one of ours"),
        (("--images", one, "--checkpoint", pretrained), "pretrained.pt: names no classes"),
        (("--images", one, "--checkpoint", good, pretrained), "pretrained.pt: its classes differs"),
        (("--images", two, "--checkpoint", good), "two/image.nii.gz: 2 channels, the network takes 1"),
        (("--images", "none.nii.gz", "--checkpoint", good), "none.nii.gz: no such file"),
        (("--images", tmp_path / "empty", "--checkpoint", good), "empty: no .nii or .nii.gz files in it"),
        (("--images", one, "--checkpoint", good, "--modality", "t1"), "--modality t1: the network knows ct"),
        (("--images", one, "--checkpoint", good, "--postprocess", "none.json"), "none.json: not a post-processing"),
        (("--images", one, "--checkpoint", good, "--device", "cpu", "--amp", "fp16"), "--amp"),
        (("--checkpoint", good), "--data (none)"),
        (("--checkpoint", good, "--data", listed(tmp_path), "--modality", "ct"), "s0.nii.gz: no such file"),
    ]:
        assert word in answer("predict", *given), given
    config = PredictConfig(images=(str(one),), checkpoint=(str(good),), out=str(tmp_path / "out"), device="cpu")
    assert evaluate.predict(config) == [tmp_path / "out/image.nii.gz"]


def test_from_the_shell_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    data = listed(tmp_path)
    for line, word in [
        (("score", "--predictions", "nowhere", "--data", data, "--out", tmp_path / "o"), "nowhere"),
        (("scoer",), "scoer: not a command"), (("score", "--predictoins", "x"), "--predictoins"),
        (("compare", "a"), "a: no scores.csv"), (("predict", "--overlap", "2"), "--overlap 2"),
    ]:
        done = shell(*line)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr, done.stderr
        assert done.stderr.startswith("eval.py") and not done.stdout


# --- what is predicted


def noise(path: Path, seed: int = 0, **change: Any) -> Path:
    values = np.random.default_rng(seed).normal(0, 200, (12, 14, 16)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([*SPACING, 1.0])), path)
    return path


@pytest.fixture
def predict(tmp_path: Path) -> Callable[..., list[Path]]:
    """Predict with a checkpoint of an untrained network into tmp_path/out; other arguments override."""

    def run(*images: Path, **given: Any) -> list[Path]:
        if "checkpoint" not in given and not (tmp_path / "good.pt").exists():
            weights(tmp_path / "good.pt")
        common: dict[str, Any] = {"checkpoint": (str(tmp_path / "good.pt"),), "out": str(tmp_path / "out")}
        common |= {"device": "cpu", "amp": "off", "images": tuple(map(str, images))}
        return list(evaluate.predict(PredictConfig(**{**common, **given})))

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that a network was asked about, in order."""
    seen: list[Path] = []

    def predicted(item: Any, *given: Any, now: Any = evaluate.predicted) -> Any:
        seen.append(item.image[0])
        return now(item, *given)

    monkeypatch.setattr(evaluate, "predicted", predicted)
    return seen


Predict = Callable[..., list[Path]]


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_no_scan_and_no_label_is_ever_written_over(predict: Predict, asked: list[Path], tmp_path: Path) -> None:
    """The folder of the scans, by a link as well; that of the labels; a folder with other people's label maps."""
    scans, labels = tmp_path / "set/imagesTr", tmp_path / "set/labelsTr"
    items = []
    for n in range(2):
        noise(scans / f"s{n}.nii.gz", n)
        saved(labels / f"s{n}.nii.gz", blobs(0)[:12, :14, :16])
        saved(tmp_path / "set/others/s1.nii.gz", blobs(0))
        items.append({"image": f"imagesTr/s{n}.nii.gz", "label": f"labelsTr/s{n}.nii.gz", "modality": "ct"})
    (tmp_path / "set/list.json").write_text(json.dumps({"training": items, "test": items, "labels": NAMED}))
    (tmp_path / "link").symlink_to(scans)
    before = bytes_in(tmp_path / "set")
    data = {"data": str(tmp_path / "set/list.json"), "split": "test"}
    for given, out, word in (
        ({"images": (str(scans),)}, scans, "is the folder of"),
        ({"images": (str(scans / "s0.nii.gz"),)}, tmp_path / "link", "is the folder of"),
        (data, scans, "is the folder of"), (data, labels, "is the folder of"),
        (data, tmp_path / "set/others", "others/s1.nii.gz is there already"),
    ):
        with pytest.raises(InputError, match=word) as error:
            predict(out=str(out), **given)
        assert f"--out {out}: " in str(error.value)
    assert not asked and bytes_in(tmp_path / "set") == before
    predict(**data, out=str(tmp_path / "set/imagesTr/predictions"))  # a folder of its own
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
    """Four files that cannot be used, and why."""
    whole = noise(folder / "a.nii.gz")
    values = np.asarray(nib.load(whole).dataobj)
    (folder / "cut.nii.gz").write_bytes(whole.read_bytes()[:-2000])
    saved(folder / "flat.nii.gz", np.zeros_like(values))
    saved(folder / "nan.nii.gz", np.where(values > 300, np.nan, values))
    saved(folder / "two.nii.gz", np.stack([values, values], axis=-1))
    return {"cut": "cut short or damaged", "flat": "every voxel is 0", "nan": "NaN or infinite", "two": "2 channels"}


def test_a_bad_file_does_not_keep_the_others_from_prediction(predict: Predict, tmp_path: Path) -> None:
    reasons = damaged(tmp_path / "in")
    noise(tmp_path / "in/z.nii.gz", 1)
    with pytest.raises(InputError) as error:
        predict(tmp_path / "in")
    line = str(error.value)
    assert line.startswith("4 of 6 cases could not be predicted: ") and "\n" not in line
    assert all(f"in/{name}.nii.gz: " in line and reason in line for name, reason in reasons.items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a.nii.gz", "z.nii.gz", "predicted.json", "written.jsonl",
    }
    (tmp_path / "in/two.nii.gz").unlink()
    items = [{"image": f"in/{name}.nii.gz", "modality": "ct"} for name in ("a", "lost", "z")]
    (tmp_path / "list.json").write_text(json.dumps({"training": items, "test": items}))
    with pytest.raises(InputError, match=r"1 of 3 cases could not be predicted: .*in/lost.nii.gz: no such file"):
        predict(data=str(tmp_path / "list.json"), split="test", out=str(tmp_path / "listed"))
    assert (tmp_path / "listed/a.nii.gz").is_file() and (tmp_path / "listed/z.nii.gz").is_file()


def test_from_the_shell_cases_that_failed_are_named_and_the_exit_code_is_2(tmp_path: Path) -> None:
    damaged(tmp_path / "in")
    line = ("predict", "--checkpoint", weights(tmp_path / "w.pt"), "--images", tmp_path / "in", "--out", tmp_path / "o")
    done = shell(*line, "--device", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cut.nii.gz" in done.stderr
    assert f"1 label map in {tmp_path / 'o'}" in done.stdout and (tmp_path / "o/a.nii.gz").is_file()


def test_finished_cases_are_not_predicted_again(predict: Predict, asked: list[Path], tmp_path: Path) -> None:
    images = [noise(tmp_path / f"in/s{n}.nii.gz", n) for n in range(3)]
    assert predict(*images[:2]) == [tmp_path / "out/s0.nii.gz", tmp_path / "out/s1.nii.gz"]
    assert predict(*images) == [tmp_path / f"out/s{n}.nii.gz" for n in range(3)]
    assert asked == images
    (tmp_path / "out/s1.nii.gz").unlink()
    noise(images[2], seed=9)  # the same file with other voxels
    predict(*images)
    assert asked[3:] == images[1:]
    (tmp_path / "in").rename(tmp_path / "moved")
    predict(*(tmp_path / f"moved/s{n}.nii.gz" for n in range(3)))
    assert len(asked) == 5
    lines = [json.loads(line) for line in (tmp_path / "out/written.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["overlap"] == 0.5 and lines[0]["source"]["images"] == [str(images[0])]


def test_predictions_of_other_settings_or_images_do_not_come_into_one_folder(predict: Predict, tmp_path: Path) -> None:
    image = noise(tmp_path / "in/s0.nii.gz")
    predict(image)
    before = bytes_in(tmp_path / "out")
    (tmp_path / "steps.json").write_text("{}")
    other = str(weights(tmp_path / "other.pt", flip_axes=[1, 2]))
    for given, flag in [
        ({"checkpoint": (other,)}, "checkpoint"), ({"tta": True}, "tta"), ({"overlap": 0.25}, "overlap"),
        ({"ensemble": "logits"}, "ensemble"), ({"amp": "bf16"}, "amp"),
    ]:
        with pytest.raises(InputError, match=f"s0.nii.gz was predicted with another --{flag} "):
            predict(image, **given)
        with pytest.raises(InputError, match=f"another --{flag} "):
            predict(noise(tmp_path / "in/s1.nii.gz", 1), **given)
    with pytest.raises(InputError, match=r"s0.nii.gz was predicted from .*in/s0.nii.gz"):
        predict(noise(tmp_path / "elsewhere/s0.nii.gz", 5))
    assert bytes_in(tmp_path / "out") == before
    predict(image, batch=1)  # how many windows go at once changes nothing


def test_hidden_files_are_no_images(predict: Predict, tmp_path: Path) -> None:
    noise(tmp_path / "in/S0.NII.GZ")
    (tmp_path / "in/._S0.NII.GZ").write_bytes(b"\0\5\26\7 Mac OS X")
    assert predict(tmp_path / "in") == [tmp_path / "out/S0.nii.gz"]


def test_a_network_meets_only_what_it_was_trained_on(predict: Predict, asked: list[Path], tmp_path: Path) -> None:
    """The modality and its intensity, whether a list or a flag names them, of every member of an ensemble."""
    image = noise(tmp_path / "s0.nii.gz")
    mr = {"modalities": ["t1"], "intensity": {"t1": ["mr"]}}
    ct, t1 = str(weights(tmp_path / "ct.pt")), str(weights(tmp_path / "t1.pt", **mr))

    def of_list(*checkpoints: str, modality: str = "", **entry: str) -> list[Path]:
        items = [{"image": "s0.nii.gz", **entry}]
        (tmp_path / "list.json").write_text(json.dumps({"training": items, "test": items}))
        where = {"data": str(tmp_path / "list.json"), "split": "test", "modality": modality}
        return predict(checkpoint=checkpoints, out=str(tmp_path / f"out{len(asked)}"), **where)

    for call, word in [
        (lambda: of_list(ct, modality="t1"), "s0.nii.gz: modality t1: the network knows ct"),
        (lambda: of_list(ct, modality="mr"), "modality mr: the network knows ct"),
        (lambda: predict(image, checkpoint=(ct,), modality="t1"), "--modality t1: the network knows ct"),
        (lambda: of_list(ct, t1, modality="ct"), "modality ct: the network knows t1"),
        (lambda: predict(image, checkpoint=(ct, t1)), "modality ct: the network knows t1"),
        (lambda: of_list(ct, modality="ct", intensity="percentile"), "intensity percentile, but .* on ct by window"),
    ]:
        with pytest.raises(InputError, match=word):
            call()
    assert not asked
    assert of_list(ct, modality="ct") and of_list(t1, modality="t1")
    assert of_list(t1, modality="t1", intensity="zscore")  # what "mr" means in this plan


def test_a_list_that_gives_the_networks_labels_other_names_is_of_another_task(predict: Predict, tmp_path: Path) -> None:
    """Else a kidney is scored as a tumour. Capitals are no difference, and classes of one side alone are none."""
    noise(tmp_path / "s0.nii.gz")
    items = [{"image": "s0.nii.gz", "modality": "ct"}]

    def of(labels: dict[str, str], out: str) -> list[Path]:
        (tmp_path / "list.json").write_text(json.dumps({"training": items, "test": items, "labels": labels}))
        return predict(data=str(tmp_path / "list.json"), split="test", out=str(tmp_path / out))

    with pytest.raises(InputError, match=r"list.json: label 1 is 'tumour' there and 'liver' in the checkpoint"):
        of({"0": "background", "1": "tumour", "2": "spleen"}, "other")
    assert not (tmp_path / "other").exists()
    assert of({"0": "air", "1": "Liver", "3": "cyst"}, "same")


def test_a_postprocessing_of_a_class_that_the_network_has_not_is_refused(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"9": [{"do": "fill_holes"}]}')
    with pytest.raises(InputError, match=r"steps\.json: label 9 is no class of the checkpoint"):
        predict(noise(tmp_path / "s0.nii.gz"), postprocess=str(tmp_path / "steps.json"))


# --- test-time flips


def flipped(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `sliding_window` was asked for."""
    seen: list[dict[str, Any]] = []

    def asked(*given: Any, now: Any = evaluate.sliding_window, **how: Any) -> Any:
        seen.append(how)
        return now(*given, **how)

    monkeypatch.setattr(evaluate, "sliding_window", asked)
    return seen


def test_test_time_flips_are_those_of_the_training(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of before names all axes whatever --flip was; its configuration says that it was 0."""
    image, seen = noise(tmp_path / "s0.nii.gz"), flipped(monkeypatch)
    all_axes = weights(tmp_path / "flipped.pt", flip_axes=[0, 1, 2])
    state = checkpoint.load(all_axes)
    checkpoint.save(tmp_path / "still.pt", {**state, "config": {"flip": 0.0}})
    checkpoint.save(tmp_path / "often.pt", {**state, "config": {"flip": 0.5}})
    for name, expected, words in [
        ("flipped", (0, 1, 2), "averaged over flips along axes 0 (left-right), 1 (front-back), 2 (up-down)"),
        ("still", (), "--tta takes those of the training, which had none"), ("often", (0, 1, 2), "averaged over"),
    ]:
        predict(image, checkpoint=(str(tmp_path / f"{name}.pt"),), tta=True, out=str(tmp_path / name))
        assert tuple(seen[-1]["flips"]) == expected and words in capsys.readouterr().out
    with pytest.raises(InputError, match=r"still.pt: its flip_axes differs from that of .*often.pt"):
        predict(image, checkpoint=(str(tmp_path / "often.pt"), str(tmp_path / "still.pt")))


def test_labels_that_swap_keep_their_side_under_test_time_flips(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two like organs, labels 3 and 7, and a network that tells them by their side alone."""
    values, truth = np.full((16, 16, 16), -100, np.float32), np.zeros((16, 16, 16), np.uint8)
    truth[2:6, 4:9, 5:9], truth[10:14, 4:9, 5:9] = 3, 7
    values[truth > 0] = 300
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "s0.nii.gz")

    def sided(x: Tensor) -> Tensor:
        organ = (x[:, 0] > 0.5).float()
        first = (torch.arange(16) < 8).float()[:, None, None]
        return 9 * torch.stack([1 - organ, organ * first, organ * (1 - first)], dim=1)

    monkeypatch.setattr(evaluate, "predictor", lambda *_: sided)
    classes = {"0": "background", "3": "organ left", "7": "organ right"}
    swap = {"classes": classes, "flip_axes": [0, 1, 2], "swap": [[3, 7]]}
    path = str(weights(tmp_path / "swap.pt", **swap))
    for tta in (False, True):
        (found,) = predict(tmp_path / "s0.nii.gz", checkpoint=(path,), tta=tta, out=str(tmp_path / f"{tta}"))
        assert np.array_equal(np.asarray(nib.load(found).dataobj), truth)
    other = str(weights(tmp_path / "other.pt", **{**swap, "swap": []}))
    with pytest.raises(InputError, match=r"other.pt: its swap differs"):
        predict(tmp_path / "s0.nii.gz", checkpoint=(path, other))


def test_a_network_of_before_that_mirrored_its_sides_is_named(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = {"classes": {"0": "background", "1": "rkid", "2": "lkid"}, "flip_axes": [0, 1, 2]}
    image = noise(tmp_path / "s0.nii.gz")
    predict(image, checkpoint=(str(weights(tmp_path / "old.pt", **mixed)),))
    assert "'rkid' and 'lkid' may be taken for each other" in capsys.readouterr().out
    decided = weights(tmp_path / "new.pt", **mixed, swap=[], flips='the list says "swap": []')
    predict(image, checkpoint=(str(decided),), out=str(tmp_path / "new"))
    assert "taken for each other" not in capsys.readouterr().out


def test_an_ensemble_holds_its_networks_and_nothing_else_of_its_checkpoints(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser is twice as large as the network; twenty members have twenty."""
    path = weights(tmp_path / "w.pt")
    state = checkpoint.load(path)
    state["optimizer"] = {"exp_avg": torch.ones(7)}
    checkpoint.save(path, state)
    alive: list[weakref.ref[Tensor]] = []

    def load(path: Path, now: Any = checkpoint.load) -> dict[str, Any]:
        assert sum(reference() is not None for reference in alive) == 0  # one at a time
        state = dict(now(path))
        alive.extend(weakref.ref(tensor) for tensor in (*state["model"].values(), state["optimizer"]["exp_avg"]))
        return state

    monkeypatch.setattr(checkpoint, "load", load)
    monkeypatch.setattr(evaluate, "predicted", lambda item, *_: np.zeros((12, 14, 16), np.uint8))
    predict(noise(tmp_path / "s0.nii.gz"), checkpoint=(str(path),) * 3)
    assert len(alive) > 30 and all(reference() is None for reference in alive)


# --- what the other commands write


def test_no_command_replaces_a_file_that_is_not_its_own(scored: Scored, tmp_path: Path) -> None:
    """And each may be run again over what it wrote itself."""
    scored()
    where = {"predictions": str(tmp_path / "predictions"), "labels": str(tmp_path / "labels")}
    a, b = fold(tmp_path / "a", {"s0": 0.5, "s1": 0.6}), fold(tmp_path / "b", {"s0": 0.6, "s1": 0.7})
    for name, call in [
        ("scores.csv", lambda out: evaluate.score(ScoreConfig(**where, out=out))),
        ("summary.json", lambda out: evaluate.score(ScoreConfig(**where, out=out))),
        ("report.html", lambda out: evaluate.score(ScoreConfig(**where, out=out))),
        ("figures/worst-s1.png", lambda out: evaluate.score(ScoreConfig(**where, out=out))),
        ("postprocess.json", lambda out: evaluate.tune(TuneConfig(**where, out=out))),
        ("compare.csv", lambda out: evaluate.compare(CompareConfig(a=str(a), b=str(b), out=out))),
        ("folds.json", lambda out: evaluate.folds(FoldsConfig(scores=(str(a), str(b)), out=out))),
    ]:
        out = tmp_path / f"{name}-out"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("of the user")
        with pytest.raises(InputError, match="is there already"):
            call(str(out))
        assert bytes_in(out) == {name: b"of the user"}
        (out / name).unlink()
        call(str(out))
        first = bytes_in(out)
        call(str(out))
        assert bytes_in(out).keys() == first.keys() and name in first


def test_scores_made_in_another_way_are_not_compared(scored: Scored, tmp_path: Path) -> None:
    """Neither two runs nor folds: by another tolerance, or against labels that have been corrected since."""
    scored()
    (tmp_path / "scores").rename(tmp_path / "a")
    scored(tolerance=2.0)
    (tmp_path / "scores").rename(tmp_path / "b")
    scored()
    (tmp_path / "scores").rename(tmp_path / "same")
    labels = blobs(0)
    labels[3, 3, 4] = 2
    saved(tmp_path / "labels/s1.nii.gz", labels)
    scored()
    a = str(tmp_path / "a")
    for name, word in (("b", "different --tolerance"), ("scores", "label maps of case s1")):
        with pytest.raises(InputError, match=word):
            evaluate.compare(CompareConfig(a=a, b=str(tmp_path / name)))
        with pytest.raises(InputError, match=word):
            evaluate.folds(FoldsConfig(scores=(a, str(tmp_path / name))))
    assert evaluate.compare(CompareConfig(a=a, b=str(tmp_path / "same")))


def test_scores_without_a_summary_are_compared_with_one_line_of_warning(
    scored: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored()
    (tmp_path / "scores").rename(tmp_path / "a")
    old = fold(tmp_path / "old", {"s0": 0.5, "s1": 0.6})
    capsys.readouterr()
    evaluate.compare(CompareConfig(a=str(tmp_path / "a"), b=str(old)))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {old}: ") and error.count("\n") == 1


# --- help


@pytest.mark.parametrize("command", ["", *evaluate.CONFIGS])
def test_help_answers_without_torch_in_half_a_second(command: str) -> None:
    seconds = []
    for _ in range(3):  # the best of them: the machine may be busy
        started = time.perf_counter()
        done = shell(*([command] if command else []), "--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and command in done.stdout
    assert min(seconds) < 0.5
