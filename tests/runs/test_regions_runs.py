"""Regions from a list to a table of scores: trained, predicted, scored, and refused in one line."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import NETWORK, events, refusal, same_weights

from dae.config.evaluate import CompareConfig, PredictConfig, ScoreConfig, TuneConfig
from dae.config.segment import SegConfig
from dae.data.datalist import load
from dae.data.regions import from_plan, to_plan
from dae.evaluation.cases import read_scores
from dae.model import SwinUNETR
from dae.training.losses import LOSSES
from dae.weights import checkpoint
from dae.weights.layouts import to_monai
from train_seg import flips_for, loss_of, main

evaluate = importlib.import_module("eval")

REGIONS = {"whole tumour": [1, 2, 3], "tumour core": [1, 3], "enhancing": [3]}
LABELS = {"background": 0, **REGIONS}
AFFINE = np.diag([1.0, 1.5, 1.25, 1.0])
GREYS = (100, 160, 220, 300)  # of the labels 0 to 3


def tumour(rng: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Balls within each other, as labels: 2 around 1 around 3."""
    axes = np.meshgrid(*map(np.arange, size), indexing="ij")
    centre = rng.uniform(7, 9, 3)
    radius = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre)))
    labels = np.zeros(size, np.uint8)
    for label, outer in ((2, 6.5), (1, 4.5), (3, 3.0)):
        labels[radius < outer] = label
    return labels


def case(folder: Path, name: str, rng: np.random.Generator) -> dict[str, str]:
    """An image in which each label has a grey of its own, and its entry in a list."""
    labels = tumour(rng, (18, 16, 17))
    image = np.choose(labels, GREYS) + rng.normal(0, 10, labels.shape)
    nib.save(nib.Nifti1Image(image.astype(np.float32), AFFINE), folder / f"{name}.nii")
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / f"{name}_seg.nii")
    files = {"image": f"{name}.nii", "label": f"{name}_seg.nii"}
    return {**files, "modality": "t1", "subject": name}


@pytest.fixture(scope="module")
def brats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of three cases to train on, one to validate on and one to test."""
    folder = tmp_path_factory.mktemp("brats")
    rng = np.random.default_rng(0)
    content = {
        "training": [case(folder, name, rng) for name in ("a", "b", "c")],
        "validation": [case(folder, "d", rng)],
        "test": [case(folder, "e", rng)],
        "labels": LABELS,
        "regions_class_order": [2, 1, 3],
    }
    (folder / "list.json").write_text(json.dumps(content))
    return folder / "list.json"


def config(data: Path, **more: Any) -> SegConfig:
    return SegConfig(
        **{
            "data": str(data),
            "from_scratch": True,
            "cache_dir": str(data.parent / "cache"),
            "crop": (16, 16, 16),
            **NETWORK,
            "lr": 1e-2,
            "batch_size": 1,
            "workers": 0,
            "device": "cpu",
            "amp": "off",
            "zoom": 0.0,
            "validate_every": 1000,
            "foreground_crop": False,
            **more,
        }
    )


def predicted_and_scored(run: Path, data: Path, out: Path, **more: Any) -> dict[str, float]:
    """The Dice of each region of the one case, through files."""
    predict(run, data, out / "predictions", **more)
    predictions = str(out / "predictions")
    split = more.get("split", "test")
    evaluate.score(
        ScoreConfig(predictions=predictions, data=str(data), split=split, out=str(out / "scores"))
    )
    return {row["name"]: row["dice"] for row in read_scores(out / "scores/scores.csv")}


@pytest.fixture(scope="module")
def learned(brats: Path) -> Path:
    """The folder of a run that has learned the regions."""
    out = brats.parent / "learned"
    main(config(brats, out=str(out), steps=60))
    return out


def changed(data: Path, name: str, **keys: Any) -> Path:
    """The list with other keys, beside it."""
    path = data.with_name(name)
    path.write_text(json.dumps({**json.loads(data.read_text()), **keys}))
    return path


def predict(run: Path, data: Path, out: Path, **more: Any) -> list[Path]:
    """The label maps of the cases in test."""
    flags = {"split": "test", "device": "cpu", "amp": "off", **more}
    checkpoints = flags.pop("checkpoint", (str(run / "last.pt"),))
    paths: list[Path] = evaluate.predict(
        PredictConfig(checkpoint=checkpoints, data=str(data), out=str(out), **flags)
    )
    return paths


# --- it learns


def test_nested_regions_are_learned_by_both_names_of_loss(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    untrained = tmp_path / "untrained"
    main(config(brats, out=str(untrained), steps=1, lr=1e-6))
    before = predicted_and_scored(untrained, brats, tmp_path / "before")
    after = predicted_and_scored(learned, brats, tmp_path / "after", tta=True)
    assert list(after) == ["whole tumour", "tumour core", "enhancing"]
    assert max(before.values()) < 0.6
    assert min(after.values()) > 0.85

    with_entropy = config(
        brats, out=str(tmp_path / "dice_ce"), steps=30, loss="dice_ce", batch_size=2
    )
    assert min(main(with_entropy)["dice_by_class"].values()) > 0.6


def test_a_case_that_is_predicted_and_scored_has_the_dice_that_training_saw(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    seen = events(config(brats, out=str(learned)), "validation")[-1]["dice_by_class"]
    assert min(seen.values()) > 0.5
    found = predicted_and_scored(learned, brats, tmp_path, split="validation")
    assert found == pytest.approx(seen, abs=5e-3)  # float16 in the cache


def test_a_label_map_holds_the_labels_of_the_order_on_the_grid_of_the_image(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    (path,) = predict(learned, brats, tmp_path / "p")
    written = nib.load(path)
    assert np.array_equal(written.affine, AFFINE) and written.shape == (18, 16, 17)
    values = np.asarray(written.dataobj)
    assert set(np.unique(values)) == {0, 1, 2, 3}

    truth = np.asarray(nib.load(brats.with_name("e_seg.nii")).dataobj)
    assert (values == truth).mean() > 0.97


def test_at_another_spacing_and_cut_to_the_foreground_regions_come_back_to_the_image(
    brats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    main(config(brats, out=str(out), steps=2, spacing=(1.4, 1.4, 1.4), foreground_crop=True))
    (path,) = predict(out, brats, tmp_path / "p", tta=True, ensemble="logits")
    assert nib.load(path).shape == (18, 16, 17)


# --- a checkpoint knows its regions


def test_a_checkpoint_has_regions_and_order_and_a_channel_for_each(
    brats: Path, learned: Path
) -> None:
    plan = checkpoint.load(learned / "last.pt")["plan"]
    assert plan["regions"] == REGIONS
    assert plan["regions_class_order"] == [2, 1, 3]
    assert plan["out_channels"] == 3
    assert list(plan["classes"]) == ["0", "1", "2", "3"]
    assert [region.written for region in from_plan(plan)] == [2, 1, 3]


def test_a_list_of_classes_takes_the_losses_and_the_plan_that_it_took_before(
    brats: Path, tmp_path: Path
) -> None:
    names = {"background": 0, "rim": 1, "oedema": 2, "enhancing": 3}
    data = changed(brats, "classes.json", labels=names)
    out = tmp_path / "run"
    main(config(data, out=str(out), steps=1))
    plan = checkpoint.load(out / "last.pt")["plan"]
    assert plan["out_channels"] == 4 and not {"regions", "regions_class_order"} & set(plan)
    assert loss_of(config(data), (), {}, ranks=None) is LOSSES["dice"]  # type: ignore[arg-type]

    # The two kinds of network make no ensemble, and none is for the other's list.
    line = refusal(predict, out, brats, tmp_path / "p")
    assert "has the regions whole tumour" in line and "no regions in the checkpoint" in line


def test_lists_of_other_regions_are_refused_and_one_without_labels_is_not(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    other = changed(brats, "other.json", labels={**LABELS, "enhancing": [1]})
    other = changed(other, "other.json", regions_class_order=[2, 3, 1])
    assert "other.json" in refusal(predict, learned, other, tmp_path / "p")
    named = changed(brats, "named.json", labels={"background": 0, "a": 1, "b": 2, "c": 3})
    assert "no regions there" in refusal(predict, learned, named, tmp_path / "p")
    assert not (tmp_path / "p").exists()

    silent = changed(brats, "silent.json", labels={})
    assert len(predict(learned, silent, tmp_path / "p")) == 1

    # Neither prediction nor scores go by the order of the list.
    content = json.loads(brats.read_text())
    del content["regions_class_order"]
    content["labels"] = dict(reversed(LABELS.items()))
    unordered = brats.with_name("unordered.json")
    unordered.write_text(json.dumps(content))
    dice = predicted_and_scored(learned, unordered, tmp_path / "q")
    assert list(dice) == ["enhancing", "tumour core", "whole tumour"]
    assert dice == predicted_and_scored(learned, brats, tmp_path / "r")


def test_an_ensemble_of_regions_and_of_another_order_is_refused(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    labels = {"background": 0, "whole tumour": [1, 2, 3], "enhancing": 3, "tumour core": [1]}
    data = changed(brats, "core.json", labels=labels, regions_class_order=[2, 3, 1])
    main(config(data, out=str(tmp_path / "run"), steps=1))
    both = (str(learned / "last.pt"), str(tmp_path / "run/last.pt"))
    assert "its regions differs" in refusal(predict, learned, brats, tmp_path, checkpoint=both)
    twice = (str(learned / "last.pt"), str(learned / "best.pt"))
    assert len(predict(learned, brats, tmp_path / "p", checkpoint=twice)) == 1


def test_an_ensemble_of_the_same_regions_in_two_orders_is_refused(brats: Path) -> None:
    """Both orders are right and have the same labels in "regions_class_order": [1, 1, 2]."""
    both: dict[str, Any] = {"background": 0, "both": [1, 2], "a": [1], "b": [2]}
    turned: dict[str, Any] = {"background": 0, "a": [1], "both": [1, 2], "b": [2]}
    plans = []
    for name, labels in (("both.json", both), ("turned.json", turned)):
        data = changed(brats, name, labels=labels, regions_class_order=[1, 1, 2])
        plans.append(to_plan(load(str(data)).regions))
    first, second = plans
    assert first == second  # as dicts

    flags = PredictConfig(checkpoint=("a.pt", "b.pt"))
    evaluate.check_agreement(first, first, "a.pt", flags)
    line = refusal(evaluate.check_agreement, second, first, "b.pt", flags)
    assert line.startswith("--checkpoint b.pt") and "another order than those of a.pt" in line


def test_a_head_of_regions_goes_on_with_the_same_regions_in_their_order_alone(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"from_scratch": False, "transfer": "all", "lr": 0.0, "steps": 1}
    still = config(brats, out=str(tmp_path / "still"), pretrained=f"{learned}/last.pt", **given)
    main(still)
    before = checkpoint.load(learned / "last.pt")["model"]
    assert same_weights(before, checkpoint.load(tmp_path / "still/last.pt")["model"])

    classes = changed(brats, "a.json", labels={"background": 0, "a": 1, "b": 2, "c": 3})
    of_classes = replace(still, data=str(classes), out=str(tmp_path / "other"))
    assert "no regions there" in refusal(main, of_classes)

    # Two regions that lie apart may come in either order, and are other channels then.
    apart = {"background": 0, "whole": [1, 2, 3], "core": [1], "enhancing": 3}
    turned = {"background": 0, "whole": [1, 2, 3], "enhancing": 3, "core": [1]}
    first = changed(brats, "apart.json", labels=apart, regions_class_order=[2, 1, 3])
    second = changed(brats, "turned.json", labels=turned, regions_class_order=[2, 3, 1])
    main(config(first, out=str(tmp_path / "apart"), steps=1))
    weights = str(tmp_path / "apart/last.pt")
    line = refusal(main, replace(of_classes, data=str(second), pretrained=weights))
    assert "in another order" in line and not (tmp_path / "other").exists()


def test_a_head_of_others_is_taken_for_the_regions_in_the_order_of_the_list(
    brats: Path, tmp_path: Path
) -> None:
    """As MONAI's networks for BraTS, whose files name neither classes nor regions."""
    torch.manual_seed(7)
    four_stages = {
        "depths": (1, 1, 1, 1),
        "heads": (1, 1, 1, 1),
        "feature_size": 12,
        "window": (7, 7, 7),
    }
    theirs = SwinUNETR(1, 3, **four_stages)
    torch.save({"state_dict": to_monai(theirs.state_dict())}, tmp_path / "theirs.pt")
    flags = {"out": str(tmp_path / "run"), "pretrained": str(tmp_path / "theirs.pt")}
    flags |= {**four_stages, "from_scratch": False, "transfer": "all", "crop": (64, 32, 32)}
    main(config(brats, **flags, lr=0.0, steps=1, batch_size=1))

    (start,) = events(SegConfig(out=flags["out"]), "start")
    assert start["weights"]["new"] == []
    order = "its outputs are taken for whole tumour, tumour core, enhancing, in this order"
    assert any(note.endswith(order) for note in start["notes"])

    two = changed(brats, "two.json", labels={"background": 0, "a": [1, 2, 3], "b": [2, 3]})
    flags["out"] = str(tmp_path / "other")
    line = refusal(main, config(changed(two, "two.json", regions_class_order=[1, 2]), **flags))
    assert "has 3 outputs, the list needs 2" in line and not (tmp_path / "other").exists()


def test_a_run_of_regions_resumes_bit_for_bit_and_not_with_other_regions(
    brats: Path, tmp_path: Path
) -> None:
    whole = config(brats, out=str(tmp_path / "whole"), steps=4)
    main(whole)
    main(config(brats, out=str(tmp_path / "two"), steps=4, stop_after=2))
    fewer = changed(brats, "fewer.json", labels={**LABELS, "tumour core": [1]})
    resumed = {"out": str(tmp_path / "two"), "steps": 4, "resume": True}
    assert "last.pt" in refusal(main, config(fewer, **resumed))
    main(config(brats, **resumed))
    a, b = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "two"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- what is for classes alone


def test_postprocessing_is_refused_in_one_line(brats: Path, learned: Path, tmp_path: Path) -> None:
    predict(learned, brats, tmp_path / "p")
    tune = TuneConfig(
        predictions=str(tmp_path / "p"), data=str(brats), split="test", out=str(tmp_path / "t")
    )
    assert "classes alone" in refusal(evaluate.tune, tune)

    (tmp_path / "steps.json").write_text(json.dumps({"1": [{"do": "fill_holes"}]}))
    line = refusal(
        predict, learned, brats, tmp_path / "q", postprocess=str(tmp_path / "steps.json")
    )
    assert "--postprocess" in line and "regions" in line


def test_left_and_right_are_flipped_by_the_names_of_all_regions(brats: Path) -> None:
    halves: dict[str, Any] = {"background": 0, "left lung": [1, 2], "right lung": [3, 4]}
    parts = {"apex": 1, "base": 2, "hilum": 3, "cyst": 4}
    sided = changed(
        brats, "sided.json", labels=halves | parts, regions_class_order=[1, 3, 1, 2, 3, 4]
    )
    merged = changed(brats, "merged.json", labels={"both": [1, 2]}, regions_class_order=[1])
    for data, axes in ((sided, (1, 2)), (merged, (0, 1, 2))):
        items = load(str(data))
        assert flips_for(items, items.labels, None, config(data, rotate=0.0)).axes == axes


def test_labels_that_change_places_must_leave_regions(brats: Path, tmp_path: Path) -> None:
    data = changed(brats, "swap.json", swap=[[1, 2]])
    line = refusal(main, config(data, out=str(tmp_path / "run"), steps=1))
    assert line.startswith(str(data)) and "'tumour core' into labels 2, 3" in line


def test_scores_of_regions_and_of_labels_are_not_compared(
    brats: Path, learned: Path, tmp_path: Path
) -> None:
    """The first region and the first label have the same number."""
    predicted_and_scored(learned, brats, tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/e.nii").write_bytes(brats.with_name("e_seg.nii").read_bytes())
    evaluate.score(
        ScoreConfig(
            predictions=str(tmp_path / "predictions"),
            labels=str(tmp_path / "labels"),
            out=str(tmp_path / "by_label"),
        )
    )
    both = CompareConfig(a=str(tmp_path / "scores"), b=str(tmp_path / "by_label"))
    assert "by classes" in refusal(evaluate.compare, both)
