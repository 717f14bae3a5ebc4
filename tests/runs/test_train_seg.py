"""train_seg.py and eval.py: from a pre-trained checkpoint to numbers, on tiny phantoms."""

import csv
import importlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import events, same_weights

import train_seg
from dae.config.evaluate import CompareConfig, PredictConfig, ScoreConfig, TuneConfig
from dae.config.segment import SegConfig
from dae.data import datalist, holdout
from dae.data.datalist import Item
from dae.demo.phantom import CT_LABELS
from dae.errors import InputError
from dae.model import SwinUNETR
from dae.training.distributed import Ranks, StopSignal
from dae.weights import checkpoint
from dae.weights.layouts import to_monai
from dae.weights.transfer import check_same_classes
from train_seg import main

evaluate = importlib.import_module("eval")
Config = Callable[..., SegConfig]


def weights(config: SegConfig, name: str = "last.pt") -> dict[str, Any]:
    return dict(checkpoint.load(Path(config.out) / name)["model"])


def losses(config: SegConfig) -> list[float]:
    return [event["loss"] for event in events(config, "train")]


def test_the_run_starts_from_the_pretrained_weights_and_says_so(
    tiny_seg: Config, pretrained: Path
) -> None:
    config = tiny_seg(lr=0.0)
    main(config)
    before = checkpoint.load(pretrained / "pre/last.pt")["model"]
    after = weights(config)
    assert all(bool((after[k] == before[k]).all()) for k in before if not k.startswith("head"))
    assert after["head.weight"].shape[0] == len(CT_LABELS)
    report = events(config, "start")[0]["weights"]
    assert (
        set(report["new"]) == set(report["dropped"]) == {"head.weight", "head.bias"}
        and not report["adapted"]
    )
    plan = checkpoint.load(Path(config.out) / "best.pt")["plan"]
    assert plan["classes"]["4"] == "liver" and plan["flip_axes"] == [
        2
    ]  # kidneys name a side, crops are turned


def with_swap(folder: Path, content: dict[str, Any]) -> None:
    content["swap"] = KIDNEYS


KIDNEYS = [[label for label, name in CT_LABELS.items() if "kidney" in name]]


@pytest.mark.parametrize(
    "given, change, axes, swap, words",
    [
        (
            {"rotate": 0.0},
            None,
            [1, 2],
            [],
            "left and right are not flipped, since 'right kidney' and 'left kidney'",
        ),
        (
            {"rotate": 0.0},
            with_swap,
            [0, 1, 2],
            KIDNEYS,
            "axes 0 (left-right), 1 (front-back), 2 (up-down)",
        ),
        ({"flip": 0.0}, with_swap, [], [], "no flips: --flip is 0"),
    ],
)
def test_the_start_line_and_the_plan_say_which_axes_are_flipped(
    tiny_seg: Config,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    change: Any,
    axes: list[int],
    swap: list[list[int]],
    words: str,
) -> None:
    data = {"data": broken_list(pretrained, tmp_path, change)} if change else {}
    config = tiny_seg(steps=1, **data, **given)
    main(config)
    assert words in capsys.readouterr().err
    plan = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    assert plan["flip_axes"] == axes and plan["swap"] == swap


def test_a_run_that_mirrored_its_sides_is_not_gone_on_with(tiny_seg: Config) -> None:
    """As runs of before did where no class was called left or right in so many words."""
    config = tiny_seg(stop_after=1, rotate=0.0)
    main(config)
    path = Path(config.out) / "last.pt"
    left = checkpoint.load(path)
    checkpoint.save(path, {**left, "plan": {**left["plan"], "flip_axes": [0, 1, 2]}})
    with pytest.raises(
        InputError,
        match=r"the run so far flipped left and right; .*'right kidney' and 'left kidney'",
    ):
        main(replace(config, stop_after=0, resume=True))


def test_files_of_others_are_fine_tuned_as_they_were_made(tiny_seg: Config, tmp_path: Path) -> None:
    """model_swinvit.pt holds an encoder alone, and is of the time before MONAI 1.5."""
    size: dict[str, Any] = {
        "feature_size": 4,
        "depths": (2, 2, 2, 2),
        "heads": (1, 1, 1, 1),
        "window": (2, 2, 2),
    }
    theirs = to_monai(SwinUNETR(1, 1, **size).state_dict())
    inside = {k.removeprefix("swinViT."): v for k, v in theirs.items() if k.startswith("swinViT.")}
    torch.save(
        {"state_dict": {f"module.{k.replace('linear', 'fc')}": v for k, v in inside.items()}},
        tmp_path / "w.pt",
    )
    given: dict[str, Any] = {
        "pretrained": str(tmp_path / "w.pt"),
        "crop": (32, 32, 64),
        "steps": 1,
        "batch_size": 1,
    }
    with pytest.raises(InputError, match="has no decoder; take --transfer encoder"):
        main(tiny_seg(**given))
    assert not Path(tiny_seg().out).exists()
    config = tiny_seg(**given, transfer="encoder", lr=0.0)
    main(config)
    begun = events(config, "start")[0]
    assert begun["config"]["merge_order"] == "legacy" and begun["config"]["feature_size"] == 4
    assert "legacy order (as such files have it)" in " ".join(begun["weights"]["notes"])
    (tmp_path / "w.pt").rename(tmp_path / "gone.pt")
    main(replace(config, resume=True))  # what was left knows its own network
    (tmp_path / "gone.pt").rename(tmp_path / "w.pt")
    saved = checkpoint.load(Path(config.out) / "last.pt")
    assert (
        saved["plan"]["arguments"].items()
        >= {"merge_order": "legacy", "clipped_bias": "sliced"}.items()
    )
    key = "encoder.stages.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(saved["model"][key], inside["layers1.0.blocks.0.mlp.linear1.weight"])
    other = tiny_seg(**given, transfer="encoder", merge_order="monai", out=str(tmp_path / "other"))
    main(other)
    assert (
        checkpoint.load(Path(other.out) / "last.pt")["plan"]["arguments"]["merge_order"] == "monai"
    )


def test_a_run_is_not_resumed_with_other_labels(
    tiny_seg: Config, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny_seg(stop_after=1)
    main(config)
    with pytest.raises(InputError, match="the data list is not what it was"):
        main(replace(config, resume=True, data=broken_list(pretrained, tmp_path, another_name)))


def test_from_scratch_is_the_same_run_without_the_weights(tiny_seg: Config, tmp_path: Path) -> None:
    with_weights = tiny_seg(lr=0.0)
    scratch = tiny_seg(lr=0.0, from_scratch=True, out=str(tmp_path / "scratch"))
    main(with_weights)
    main(scratch)
    pretrained_weights = weights(with_weights)
    new_weights = weights(scratch)
    assert pretrained_weights.keys() == new_weights.keys()
    assert not same_weights(pretrained_weights, new_weights)
    assert events(scratch, "start")[0]["weights"] == "from scratch"


def test_fine_tuned_weights_go_on_with_their_head(tiny_seg: Config, tmp_path: Path) -> None:
    first = tiny_seg(out=str(tmp_path / "first"))
    main(first)
    given: dict[str, Any] = {"pretrained": f"{first.out}/last.pt", "transfer": "all"}
    still = tiny_seg(**given, lr=0.0, steps=1)
    validation = main(still)
    assert same_weights(weights(first), weights(still))
    assert validation["dice"] == events(first, "validation")[-1]["dice"]
    assert events(still, "start")[0]["weights"]["new"] == []


def test_a_head_of_other_classes_or_of_pre_training_is_not_taken(
    tiny_seg: Config, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"pre/last\.pt is of pre-training.*--transfer both"):
        main(tiny_seg(transfer="all"))
    first = tiny_seg(out=str(tmp_path / "first"), steps=1)
    main(first)
    other = str(broken_list(pretrained, tmp_path, another_name))
    with pytest.raises(InputError, match=r"is of the classes 0 background.* the list has"):
        main(tiny_seg(pretrained=f"{first.out}/last.pt", transfer="all", data=other))
    assert not Path(tiny_seg().out).exists()


def test_a_head_whose_file_names_no_classes_is_taken_in_the_order_of_the_list(
    tmp_path: Path,
) -> None:
    plan = {"method": "monai", "classes": {}, "out_channels": 3}
    path = tmp_path / "w.pt"
    three = {0: "background", 1: "liver", 2: "spleen"}
    notes = check_same_classes(plan, three, path)
    assert "0 background, 1 liver, 2 spleen, in this order" in notes[0]
    with pytest.raises(InputError, match="has 3 outputs, the list needs 2"):
        check_same_classes(plan, {0: "background", 1: "liver"}, path)


@pytest.mark.parametrize("schedule", ["plain", "warmup", "frozen-encoder", "decoder-first"])
def test_each_schedule_moves_what_it_should(
    tiny_seg: Config, pretrained: Path, schedule: str
) -> None:
    config = tiny_seg(schedule=schedule, steps=30, stop_after=2)
    main(config)
    before = checkpoint.load(pretrained / "pre/last.pt")["model"]
    after = weights(config)
    moved = {
        k.split(".")[0]
        for k in before
        if not k.startswith("head") and bool((before[k] != after[k]).any())
    }
    assert "up_blocks" in moved
    assert ("encoder" in moved) == (schedule in ("plain", "warmup"))


def test_epochs_are_passes_over_the_training_volumes(tiny_seg: Config) -> None:
    """Three volumes, five epochs, four a step: 15 crops are 4 steps, not five of one each."""
    config = tiny_seg(steps=0, epochs=5, batch_size=4, stop_after=1)
    main(config)
    begun = events(config, "start")[0]
    assert begun["volumes"] == 3 and begun["config"]["steps"] == 4 == math.ceil(5 * 3 / 4)
    saved = checkpoint.load(Path(config.out) / "last.pt")
    checkpoint.save(
        Path(config.out) / "last.pt", {**saved, "config": {**saved["config"], "steps": 3}}
    )
    main(
        replace(config, stop_after=0, resume=True)
    )  # a run that was begun with another length keeps it
    assert checkpoint.load(Path(config.out) / "last.pt")["step"] == 3


def test_a_finished_run_goes_on_for_more_epochs(tiny_seg: Config) -> None:
    config = tiny_seg(steps=0, epochs=2)
    main(config)
    main(replace(config, epochs=4, resume=True))
    assert [event["step"] for event in events(config, "train")] == [1, 2, 3, 4, 5, 6]
    assert "3 steps before, 6 now" in " ".join(events(config, "resume")[0]["notes"])

    # A forgotten --epochs is the default of 600, which nobody has asked for.
    with pytest.raises(InputError, match=r"^--epochs 600: .* started with 4"):
        main(replace(config, epochs=600, resume=True))
    main(replace(config, steps=7, resume=True))
    assert checkpoint.load(Path(config.out) / "last.pt")["step"] == 7


def test_stop_after_means_the_same_step_however_often_it_is_passed(
    tiny_seg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_seg(steps=6, stop_after=2, resume=True)
    for _ in range(2):
        main(config)
        assert checkpoint.load(Path(config.out) / "last.pt")["step"] == 2
        assert "stopped after step 2 of 6, as --stop-after 2 says" in capsys.readouterr().err


def first_moments(config: SegConfig, part: str = "") -> float:
    """The norm of the gradient of the first step: AdamW's first moments are then 0.1 of it."""
    optimizer = checkpoint.load(Path(config.out) / "last.pt")["optimizer"]
    own = set[int]()
    for group in optimizer["param_groups"]:
        if part in group["part"]:
            own.update(group["params"])
    entries = [entry for n, entry in optimizer["state"].items() if n in own]
    return math.sqrt(sum(float((entry["exp_avg"] ** 2).sum()) for entry in entries)) / 0.1


def test_the_gradient_is_clipped_to_the_norm_that_is_asked_for(
    tiny_seg: Config, tmp_path: Path
) -> None:
    whole = tiny_seg(out=str(tmp_path / "whole"), steps=1, clip=0.0)
    main(whole)
    norm = events(whole, "train")[0]["grad_norm"]
    assert first_moments(whole) == pytest.approx(norm, rel=1e-4)
    for share in (0.3, 3.0):
        clipped = tiny_seg(out=str(tmp_path / str(share)), steps=1, clip=share * norm)
        main(clipped)
        assert events(clipped, "train")[0]["grad_norm"] == pytest.approx(
            norm, rel=1e-6
        )  # logged as it was
        assert first_moments(clipped) == pytest.approx(min(1.0, share) * norm, rel=1e-4)


@pytest.mark.parametrize("schedule", ["frozen-encoder", "decoder-first"])
def test_an_encoder_that_does_not_move_does_not_count_in_the_clipping(
    tiny_seg: Config, tmp_path: Path, schedule: str
) -> None:
    """The decoder's gradient is clipped as if it were alone. Another run tells its norm."""
    common: dict[str, Any] = {"steps": 40, "stop_after": 1}
    whole = tiny_seg(out=str(tmp_path / "whole"), schedule="plain", clip=0.0, **common)
    main(whole)
    encoder = first_moments(whole, "encoder")
    decoder = first_moments(whole, "decoder")
    assert encoder > 0.01 * decoder
    config = tiny_seg(schedule=schedule, clip=0.5 * decoder, log_every=1, **common)
    main(config)
    assert events(config, "train")[0]["grad_norm"] == pytest.approx(decoder, rel=1e-5)
    assert first_moments(config, "decoder") == pytest.approx(0.5 * decoder, rel=1e-4)
    assert first_moments(config, "encoder") == 0


def params_of(optimizer: dict[str, Any], part: str) -> list[Any]:
    """Parameters of an optimiser's groups, or their numbers in a saved one, in order."""
    found: list[Any] = []
    for group in optimizer["param_groups"]:
        if group["part"] == part:
            found += group["params"]
    return found


def test_a_frozen_encoder_has_no_gradients_and_a_run_of_before_goes_on(
    tiny_seg: Config, tmp_path: Path
) -> None:
    """Checkpoints of an older version hold moments of the encoder, which nothing reads."""
    config = tiny_seg(schedule="frozen-encoder", stop_after=2)
    ranks = Ranks(0, 1, torch.device("cpu"))
    run = train_seg.setup(replace(config, out=str(tmp_path / "other")), ranks)
    moving = {
        name.split(".")[0] for name, value in run.network.named_parameters() if value.requires_grad
    }
    assert "encoder" not in moving and {"head", "up_blocks"} <= moving

    # Nor does what is no parameter: a backbone of somebody's own may have batch norms and dropout.
    assert run.network.training and not run.network.encoder.training
    with StopSignal(ranks.store) as signal:
        train_seg.validate(run, signal)
    assert run.network.training and not run.network.encoder.training
    main(config)
    path = Path(config.out) / "last.pt"
    saved = checkpoint.load(path)
    numbers = params_of(saved["optimizer"], "encoder")
    assert not set(numbers) & set(saved["optimizer"]["state"])
    parameters = list(run.network.parameters())
    assert len(parameters) == len(numbers) + len(params_of(saved["optimizer"], "decoder"))

    of_encoder = params_of({"param_groups": run.optimizer.param_groups}, "encoder")
    for n, parameter in zip(numbers, of_encoder, strict=True):
        moments = {key: torch.ones_like(parameter.data) for key in ("exp_avg", "exp_avg_sq")}
        saved["optimizer"]["state"][n] = {"step": torch.tensor(2.0), **moments}
    checkpoint.save(path, saved)

    main(replace(config, stop_after=0, resume=True))
    after = weights(config)
    assert all(torch.equal(after[k], saved["model"][k]) for k in after if k.startswith("encoder."))
    assert not same_weights(after, saved["model"])


def test_the_rates_are_those_that_are_logged_down_to_the_last(tiny_seg: Config) -> None:
    config = tiny_seg(steps=5, schedule="plain", lr=1e-2)
    main(config)
    cosine = [0.5 * 1e-2 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [e["lr"] for e in events(config, "train")] == pytest.approx(cosine)
    assert [e["lr_encoder"] for e in events(config, "train")] == pytest.approx(cosine)
    groups = checkpoint.load(Path(config.out) / "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([cosine[-1]] * 4)


def test_the_seed_is_that_of_the_weights_too(tiny_seg: Config, tmp_path: Path) -> None:
    drawn = [
        tiny_seg(out=str(tmp_path / str(n)), seed=seed, lr=0.0, steps=1, from_scratch=True)
        for n, seed in enumerate((3, 3, 4))
    ]
    for config in drawn:
        main(config)
    first, again, other = map(weights, drawn)
    assert same_weights(first, again) and not torch.equal(
        first["head.weight"], other["head.weight"]
    )


def test_best_is_the_highest_dice_and_a_class_that_no_case_holds_is_none(
    tiny_seg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = iter([0.2, 0.6, math.nan, 0.4])
    monkeypatch.setattr(
        train_seg, "validate", lambda run, _: {"dice": next(dice), "dice_by_class": {}, "cases": 1}
    )
    config = tiny_seg(validate_every=1)
    main(config)
    best = checkpoint.load(Path(config.out) / "best.pt")
    assert (best["step"], best["best"]) == (2, 0.6)


def test_a_run_goes_on_with_other_factors_of_its_global_batch(
    tiny_seg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tiny_seg(out=str(tmp_path / "straight"), batch_size=4)
    broken = replace(straight, out=str(tmp_path / "broken"), stop_after=2)
    main(straight)
    main(broken)
    main(replace(broken, batch_size=2, accumulate=2, checkpointing=True, stop_after=0, resume=True))
    told = capsys.readouterr().err
    assert "goes on from step 2" in told and "1 ranks x batch 4 x 1 before, 1 x 2 x 2 now" in told
    assert losses(broken) == pytest.approx(losses(straight), abs=1e-5)
    with pytest.raises(
        InputError, match=r"^--batch-size 2 x --accumulate 1 x 1 ranks = 2 .* was started with 4"
    ):
        main(replace(broken, batch_size=2, resume=True))


def test_weights_say_their_step_and_those_of_standardised_crops_are_warned_of(
    tiny_seg: Config, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tiny_seg(steps=1))
    told = capsys.readouterr().err
    assert (
        "a checkpoint of this package (dae, step 2 of 2)" in told and "--recon scaled" not in told
    )
    saved = checkpoint.load(pretrained / "pre/last.pt")
    checkpoint.save(tmp_path / "scaled.pt", {**saved, "plan": {**saved["plan"], "recon": "scaled"}})
    scaled = tiny_seg(
        pretrained=str(tmp_path / "scaled.pt"), out=str(tmp_path / "scaled"), steps=2, stop_after=1
    )
    main(scaled)
    assert (
        capsys.readouterr().err.count("warning: the weights were pre-trained with --recon scaled")
        == 1
    )
    main(replace(scaled, resume=True, stop_after=0))
    assert "--recon scaled" not in capsys.readouterr().err
    main(replace(scaled, from_scratch=True, out=str(tmp_path / "scratch")))
    assert "--recon scaled" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "schedule, stop_after",
    [
        ("plain", 2),
        ("frozen-encoder", 2),
        ("probe", 2),
        ("decoder-first", 1),  # the encoder has not moved yet, and AdamW has nothing of it
        ("decoder-first", 2),
        ("decoder-first", 3),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny_seg: Config, tmp_path: Path, schedule: str, stop_after: int
) -> None:
    straight = tiny_seg(schedule=schedule)
    broken = replace(straight, out=str(tmp_path / "broken"), stop_after=stop_after)
    main(straight)
    main(broken)
    main(replace(broken, stop_after=0, resume=True))
    assert same_weights(weights(straight), weights(broken))


def test_folds_partition_the_subjects_and_small_label_fractions_lie_in_larger_ones(
    pretrained: Path,
) -> None:
    content = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    everyone = content["training"] + content["validation"] + content["test"]
    path = pretrained / "phantoms/all.json"
    path.write_text(json.dumps({"training": everyone, "labels": content["labels"]}))
    items = datalist.load(str(path))
    subjects = subjects_of(items.training)

    held_out: list[str] = []
    for fold in range(5):
        held_out += subjects_of(holdout.five_folds(items, fold=fold).validation)
    assert sorted(held_out) == sorted(subjects)

    small, middle, large = (
        set(subjects_of(holdout.fraction(items, share).training)) for share in (0.2, 0.6, 1.0)
    )
    assert (len(small), len(middle), len(large)) == (1, 3, 5)
    assert small < middle < large


def subjects_of(items: Sequence[Item]) -> list[str]:
    return [item.subject for item in items]


@pytest.mark.parametrize(
    "given, word",
    [
        ({"pretrained": "", "from_scratch": False}, "--pretrained"),
        ({"pretrained": "none.pt"}, "none.pt"),
        ({"feature_size": 24}, "--feature-size 24"),
        ({"crop": (16, 20, 16)}, "16 20 16"),
        ({"lr_min": 1e-5}, "--lr-min"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_seg: Config, given: dict[str, Any], word: str
) -> None:
    with pytest.raises(InputError) as error:
        main(tiny_seg(**given))
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not Path(tiny_seg().out).exists()


def test_a_volume_that_is_predicted_and_scored_has_the_dice_that_training_saw(
    tiny_seg: Config, tmp_path: Path
) -> None:
    """The same windows over the same foreground: files, grids and metrics change nothing."""
    config = tiny_seg(lr=1e-2, steps=20, loss="dice_ce")
    seen = main(config)
    last: dict[str, Any] = {"checkpoint": (f"{config.out}/last.pt",), "device": "cpu", "amp": "off"}
    cases: dict[str, Any] = {"data": config.data, "split": "validation"}
    evaluate.predict(PredictConfig(**last, **cases, out=str(tmp_path / "p")))
    summary = evaluate.score(
        ScoreConfig(**cases, predictions=str(tmp_path / "p"), out=str(tmp_path / "s"))
    )
    assert seen["dice"] > 0.01
    assert summary["mean_of_classes"]["dice"]["mean"] == pytest.approx(
        seen["dice"], abs=2e-3
    )  # float16 in the cache


def broken_list(
    pretrained: Path, tmp_path: Path, change: Callable[[Path, dict[str, Any]], None]
) -> str:
    content = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    for split in ("training", "validation", "test"):
        for entry in content[split]:
            entry |= {key: str(pretrained / "phantoms" / entry[key]) for key in ("image", "label")}
    change(tmp_path, content)
    (tmp_path / "list.json").write_text(json.dumps(content))
    return str(tmp_path / "list.json")


def save_label(path: Path, label: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(label, np.diag([1.5, 1.5, 1.5, 1])), path)
    return str(path)


def other_grid(folder: Path, content: dict[str, Any]) -> None:
    content["training"][0]["label"] = save_label(
        folder / "small.nii.gz", np.ones((9, 9, 9), dtype=np.uint8)
    )


def fractions(folder: Path, content: dict[str, Any]) -> None:
    content["training"][0]["label"] = save_label(
        folder / "soft.nii.gz", np.full((32, 32, 32), 0.5, dtype=np.float32)
    )


def four_axes(folder: Path, content: dict[str, Any]) -> None:
    content["training"][0]["label"] = save_label(
        folder / "four.nii.gz", np.ones((32, 32, 32, 2), dtype=np.uint8)
    )


def another_name(folder: Path, content: dict[str, Any]) -> None:
    content["labels"]["1"] = "milt"


def without_label(folder: Path, content: dict[str, Any]) -> None:
    del content["training"][0]["label"]


def fewer_classes(folder: Path, content: dict[str, Any]) -> None:
    content["labels"] = {"0": "background", "1": "spleen"}


def a_negative_class(folder: Path, content: dict[str, Any]) -> None:
    content["labels"] |= {"-1": "void"}


def a_class_too_many(folder: Path, content: dict[str, Any]) -> None:
    content["labels"] |= {"256": "thumb"}


@pytest.mark.parametrize(
    "change, word",
    [
        (a_negative_class, "none above 255"),
        (a_class_too_many, "none above 255"),
        (other_grid, "small.nii.gz: not on the grid"),
        (fractions, "soft.nii.gz: holds 0.5, but labels are whole numbers"),
        (four_axes, "four.nii.gz: labels of size"),
        (without_label, 'has no "label"'),
        (fewer_classes, "is not among the classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_file(
    tiny_seg: Config, pretrained: Path, tmp_path: Path, change: Any, word: str
) -> None:
    with pytest.raises(InputError, match=word):
        main(tiny_seg(data=broken_list(pretrained, tmp_path, change)))


def seven_is_ignored(folder: Path, content: dict[str, Any]) -> None:
    content["labels"]["7"] = "ignore"


def seven_is_200_and_ignored(folder: Path, content: dict[str, Any]) -> None:
    del content["labels"]["7"]
    content["labels"]["200"] = "ignore"
    for n, entry in enumerate(content["training"] + content["validation"]):
        label = nib.load(entry["label"])
        values = np.asarray(label.dataobj)
        changed = np.where(values == 7, 200, values).astype(np.uint8)
        path = folder / f"{n}.nii.gz"
        nib.save(nib.Nifti1Image(changed, label.affine, label.header), path)
        entry["label"] = str(path)


def test_what_was_not_annotated_is_no_class_and_changes_no_weight(
    tiny_seg: Config, pretrained: Path, tmp_path: Path
) -> None:
    """One list ignores label 7. Another one has 200 in the label files there, and ignores 200."""
    runs = []
    for name, change in (("a", seven_is_ignored), ("b", seven_is_200_and_ignored)):
        (tmp_path / name).mkdir()
        runs.append(
            tiny_seg(
                data=broken_list(pretrained, tmp_path / name, change),
                out=str(tmp_path / name / "run"),
                loss="dice_ce",
            )
        )
        main(runs[-1])
    plan = checkpoint.load(Path(runs[0].out) / "last.pt")["plan"]
    assert "7" not in plan["classes"] and plan["out_channels"] == len(CT_LABELS) - 1
    assert same_weights(*map(weights, runs))
    assert events(runs[0], "validation")[-1]["dice"] == events(runs[1], "validation")[-1]["dice"]


def test_predict_score_tune_and_compare_make_what_they_promise(
    tiny_seg: Config, tmp_path: Path
) -> None:
    config = tiny_seg(loss="dice_ce", lr=1e-2, steps=6)
    main(config)
    best = f"{config.out}/best.pt"
    common: dict[str, Any] = {"data": config.data, "split": "test"}
    written = evaluate.predict(
        PredictConfig(**common, checkpoint=(best,), out=str(tmp_path / "a"), device="cpu")
    )
    evaluate.predict(
        PredictConfig(
            **common, checkpoint=(best, best), tta=True, out=str(tmp_path / "b"), device="cpu"
        )
    )
    entry = json.loads(Path(config.data).read_text())["test"][0]
    image = nib.load(Path(config.data).parent / entry["image"])
    predicted = nib.load(written[0])
    assert written[0].name == entry["image"]
    assert predicted.shape == image.shape and np.allclose(predicted.affine, image.affine)
    assert set(np.unique(np.asarray(predicted.dataobj))) <= set(CT_LABELS)

    for name in "ab":
        evaluate.score(
            ScoreConfig(
                **common, predictions=str(tmp_path / name), out=str(tmp_path / f"scores_{name}")
            )
        )
    rows = list(csv.DictReader((tmp_path / "scores_a/scores.csv").open()))
    assert [row["name"] for row in rows] == [CT_LABELS[k] for k in range(1, 8)]
    assert {p.name for p in (tmp_path / "scores_a").iterdir()} >= {
        "scores.csv",
        "summary.json",
        "report.html",
    }
    evaluate.compare(
        CompareConfig(
            a=str(tmp_path / "scores_a"), b=str(tmp_path / "scores_b"), out=str(tmp_path / "c")
        )
    )
    assert list((tmp_path / "c").iterdir())
    evaluate.tune(TuneConfig(**common, predictions=str(tmp_path / "a"), out=str(tmp_path / "plan")))
    common |= {
        "checkpoint": (best,),
        "device": "cpu",
        "postprocess": str(tmp_path / "plan/postprocess.json"),
    }
    evaluate.predict(PredictConfig(**common, out=str(tmp_path / "d")))


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif(
    "DAE_REALDATA" not in os.environ, reason="DAE_REALDATA names no folder of real volumes"
)
def test_a_real_volume_is_learned_predicted_on_its_own_grid_and_scored(tmp_path: Path) -> None:
    """One CT, trained and validated on: no result, but every step from file to file works."""
    data = f"{os.environ['DAE_REALDATA']}/btcv_smoke.json"
    still: dict[str, Any] = dict.fromkeys(
        ("flip", "rotate", "zoom", "brightness", "contrast", "noise"), 0.0
    )
    config = SegConfig(
        data=data,
        from_scratch=True,
        out=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        crop=(48, 48, 48),
        ct_window=(-175.0, 250.0),
        feature_size=16,
        depths=(2, 2, 2),
        heads=(2, 4, 8),
        window=(4, 4, 4),
        steps=600,
        batch_size=2,
        lr=3e-3,
        warmup=20,
        loss="dice_ce",
        positive=0.9,
        validate_every=200,
        amp="off",
        allow_trained=True,
        **still,
    )
    assert main(config)["dice"] > 0.6
    given: dict[str, Any] = {"data": data, "allow_trained": True}
    folder = str(tmp_path / "predictions")
    evaluate.predict(PredictConfig(checkpoint=(f"{config.out}/best.pt",), out=folder, **given))
    summary = evaluate.score(ScoreConfig(predictions=folder, out=str(tmp_path / "scores"), **given))
    assert summary["mean_of_cases"]["dice"]["mean"] > 0.6
