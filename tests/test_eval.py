"""eval.py on label maps made by hand: what is scored, by which numbers, and one line for what cannot be."""

import csv
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import NETWORK, ROOT, environment

from dae.config import InputError, run_or_explain
from dae.config_seg import FoldsConfig, PredictConfig, ScoreConfig, TuneConfig
from dae.evaluation.metrics import score_labels
from dae.evaluation.scoring import COLUMNS, read_scores, write_scores
from dae.model import SwinUNETR
from dae.training import checkpoint

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
])  # fmt: skip
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
                  for case, value in dice.items()], folder / "scores.csv")  # fmt: skip
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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"folds.json", "folds.csv"}


def test_folds_that_are_not_there_or_given_twice_are_one_line(tmp_path: Path) -> None:
    a = fold(tmp_path / "a", {"s0": 0.5})
    for scores, word in (((), "no scores.csv there"), ((str(tmp_path),), f"{tmp_path}: no scores.csv"),
                         ((str(a), str(a / "scores.csv")), f"{a}: its name is there twice")):  # fmt: skip
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
])  # fmt: skip
def test_label_maps_that_do_not_fit_are_refused_by_file(
    answer: Callable[..., str], tmp_path: Path, folder: str, change: Callable[[np.ndarray], np.ndarray],
    affine: np.ndarray | None, word: str,
) -> None:  # fmt: skip
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
    }  # fmt: skip
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
    ]:  # fmt: skip
        done = shell(*line)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr, done.stderr
        assert done.stderr.startswith("eval.py") and not done.stdout


@pytest.mark.parametrize("command", ["", *evaluate.CONFIGS])
def test_help_answers_without_torch_in_half_a_second(command: str) -> None:
    seconds = []
    for _ in range(3):  # the best of them: the machine may be busy
        started = time.perf_counter()
        done = shell(*([command] if command else []), "--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and command in done.stdout
    assert min(seconds) < 0.5
