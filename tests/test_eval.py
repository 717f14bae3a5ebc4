"""eval.py on label maps made by hand: what is scored, by which numbers, and one line for what cannot be."""

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, environment

from dae.config import InputError
from dae.config_seg import FoldsConfig, ScoreConfig, TuneConfig
from dae.evaluation.metrics import score_labels
from dae.evaluation.scoring import COLUMNS, read_scores, write_scores

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
                         ((str(a), str(a / "scores.csv")), f"{a}: named twice")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            evaluate.folds(FoldsConfig(scores=scores, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
