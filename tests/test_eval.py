"""eval.py on label maps made by hand: what is scored, by which numbers, and one line for what cannot be."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dae.config import InputError
from dae.config_seg import ScoreConfig, TuneConfig
from dae.evaluation.metrics import score_labels
from dae.evaluation.scoring import read_scores

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
