"""train_pretrain.py: the run folder, exact resume, refusals, and the network beside its input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import command, events, interrupt, same_weights, torchrun, train, wait_for_step
from processes import Script, run_script

import train_pretrain
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.demo.phantom import Lists
from dae.errors import InputError
from dae.pretext.methods import METHODS
from dae.training.distributed import Ranks
from dae.training.log import read_log
from dae.training.optim import learning_rate
from dae.training.run import with_phantoms
from dae.weights import checkpoint
from train_pretrain import main

Config = Callable[..., PretrainConfig]
Interruptible = tuple[PretrainConfig, dict[str, Any]]


def weights(folder: str | Path, name: str = "last.pt") -> dict[str, Any]:
    return dict(checkpoint.load(Path(folder) / name)["model"])


def losses(config: PretrainConfig) -> list[float]:
    return [event["loss"] for event in events(config, "train")]


def test_a_run_leaves_its_folder_as_promised(tiny: Config) -> None:
    config = tiny(steps=6, validate_every=3, keep_every=2)
    result = main(config)
    out = Path(config.out)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    pictures = {"figures/reconstruction.png", "figures/loss.png"}
    kept = {"step-2.pt", "step-4.pt", "step-6.pt"}
    assert files == {"config.json", "log.jsonl", "run.lock", "last.pt", "best.pt", *pictures, *kept}
    assert [e["step"] for e in events(config, "validation")] == [0, 3, 6]
    assert [e["step"] for e in events(config, "train")] == [1, 2, 3, 4, 5, 6]
    first = read_log(out / "log.jsonl")[0]
    assert first["event"] == "start" and first["torch"] == torch.__version__ and "git" in first
    names = {
        "loss",
        "l1",
        "cmcl",
        "lr",
        "grad_norm",
        "samples_per_s",
        "data_wait",
        "l1_by_modality",
    }
    assert names <= events(config, "train")[0].keys()
    assert events(config, "validation")[-1]["l1"] == result["l1"]
    assert (
        set(result["l1_by_modality"]) == set(result["l1_input_by_modality"]) == {"ct", "t1", "t2"}
    )
    assert json.loads((out / "config.json").read_text())["steps"] == 6


def test_the_checkpoint_holds_what_a_user_of_the_weights_needs(tiny: Config) -> None:
    config = tiny()
    main(config)
    saved = checkpoint.load(Path(config.out) / "last.pt")
    assert {
        "model",
        "pretext",
        "optimizer",
        "scaler",
        "step",
        "rng",
        "config",
        "plan",
    } <= saved.keys()
    plan = saved["plan"]
    assert (plan["backbone"], plan["in_channels"], plan["crop"]) == ("swin_unetr", 1, [16, 16, 16])
    assert plan["arguments"]["feature_size"] == 8 and plan["intensity"]["ct"] == ["window"]
    assert plan["modalities"] == ["ct", "t1", "t2"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_lowers_its_loss(tiny: Config, method: str) -> None:
    config = tiny(method=method, steps=25, mask_block=8, l1_units="crop", alpha=0.0)
    result = main(config)
    l1 = [event["l1"] for event in events(config, "train")]
    assert sum(l1[-5:]) < 0.9 * sum(l1[:5])
    assert (result["l1_input"] == 0) == (method in ("local_mask", "mae"))


@pytest.mark.parametrize("stop", [1, 3])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny: Config, tmp_path: Path, stop: int
) -> None:
    straight = tiny(out=str(tmp_path / "straight"), steps=5, recon="residual")
    broken = tiny(out=str(tmp_path / "broken"), steps=5, recon="residual", stop_after=stop)
    main(straight)
    main(broken)
    assert checkpoint.load(Path(broken.out) / "last.pt")["step"] == stop
    main(tiny(out=broken.out, steps=5, recon="residual", resume=True))
    a, b = (checkpoint.load(Path(c.out) / "last.pt") for c in (straight, broken))
    assert same_weights(a["model"], b["model"])
    for group_a, group_b in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(group_a[k], group_b[k]) for k in group_a)
    assert losses(straight) == losses(broken)


def test_workers_change_no_sample(tiny: Config, tmp_path: Path) -> None:
    runs = [tiny(out=str(tmp_path / str(workers)), workers=workers) for workers in (0, 2)]
    for config in runs:
        main(config)
    assert same_weights(weights(runs[0].out), weights(runs[1].out))


def test_accumulation_equals_a_larger_batch_but_for_the_contrast(
    tiny: Config, tmp_path: Path
) -> None:
    runs = [
        tiny(out=str(tmp_path / "a"), batch_size=4, alpha=0.0),
        tiny(out=str(tmp_path / "b"), batch_size=2, accumulate=2, alpha=0.0),
    ]
    for config in runs:
        main(config)
    for one, two in zip(*(events(config, "train") for config in runs)):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_resume_without_a_run_starts_one(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny(resume=True))
    assert "nothing to resume yet" in capsys.readouterr().err


def test_a_finished_run_resumed_changes_nothing(tiny: Config) -> None:
    config = tiny()
    main(config)
    before = weights(config.out)
    main(tiny(resume=True))
    assert same_weights(before, weights(config.out))


def test_a_finished_run_goes_on_as_a_longer_one(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 5 to 8 have the rates of eight steps, whether they are taken at once or not."""
    at_once = tiny(out=str(tmp_path / "once"))
    in_two = tiny(out=str(tmp_path / "two"))
    for config in (at_once, in_two):
        main(config)
    main(replace(at_once, steps=8, resume=True))
    assert "4 steps before, 8 now: from step 4 on" in capsys.readouterr().err
    main(replace(in_two, steps=8, resume=True, stop_after=6))
    main(replace(in_two, steps=8, resume=True))

    assert same_weights(weights(at_once.out), weights(in_two.out))
    rates = [event["lr"] for event in events(at_once, "train")]
    of_four = [learning_rate(step, at_once) for step in range(4)]
    of_eight = [learning_rate(step, replace(at_once, steps=8)) for step in range(4, 8)]
    assert rates == of_four + of_eight
    with pytest.raises(InputError, match=r"^--steps 4: "):
        main(replace(at_once, resume=True))


def test_a_longer_run_sees_the_samples_of_one_that_was_as_long_from_the_start(
    tiny: Config, tmp_path: Path
) -> None:
    """At a rate of 0 no weight moves, so that equal losses are of equal samples."""
    straight = tiny(out=str(tmp_path / "straight"), lr=0.0, steps=6)
    longer = tiny(out=str(tmp_path / "longer"), lr=0.0, steps=3)
    main(straight)
    main(longer)
    main(replace(longer, steps=6, resume=True))
    assert losses(straight) == losses(longer)


def test_resuming_another_configuration_is_refused_by_the_flags_name(tiny: Config) -> None:
    config = tiny()
    main(config)
    before = (Path(config.out) / "last.pt").read_bytes()
    for changed, flag in (
        ({"lr": 2e-2}, "--lr"),
        ({"crop": (16, 16, 24)}, "--crop"),
        ({"seed": 1}, "--seed"),
    ):
        with pytest.raises(InputError, match=f"^{flag} "):
            main(tiny(resume=True, **changed))
        assert (Path(config.out) / "last.pt").read_bytes() == before


def test_a_run_goes_on_with_other_factors_of_its_global_batch_and_in_other_ways_of_computing(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With alpha 0, since CMCL sees a micro-batch. With CMCL, that it compares others is said."""
    straight = tiny(out=str(tmp_path / "straight"), batch_size=4, steps=6, alpha=0.0)
    main(straight)
    for name, alpha, changed in (
        ("batch", 0.0, {"batch_size": 1, "accumulate": 4}),
        (
            "way",
            0.0,
            {
                "batch_size": 2,
                "accumulate": 2,
                "checkpointing": True,
                "workers": 1,
                "validate_crops": 1,
            },
        ),
        ("contrast", 0.05, {"batch_size": 2, "accumulate": 2}),
    ):
        broken = tiny(out=str(tmp_path / name), batch_size=4, steps=6, stop_after=3, alpha=alpha)
        main(broken)
        capsys.readouterr()
        main(replace(broken, stop_after=0, resume=True, **changed))
        told = capsys.readouterr().err
        assert "1 ranks x batch 4 x 1 before, 1 x" in told
        assert ("CMCL compared 4 samples with each other before, 2 now" in told) == (
            name == "contrast"
        )
        assert ("best.pt is chosen anew" in told) == (name == "way")
        if not alpha:
            assert losses(broken) == pytest.approx(losses(straight), abs=1e-5)
    with pytest.raises(
        InputError, match=r"^--batch-size 4 x --accumulate 2 x 1 ranks = 8 .* was started with 4"
    ):
        main(replace(broken, resume=True, accumulate=2))


def test_ranks_may_become_accumulation(tiny: Config, tmp_path: Path) -> None:
    """A run of two ranks that is stopped goes on with one: the same samples, the same losses."""
    straight = tiny(out=str(tmp_path / "straight"), batch_size=4, steps=6, alpha=0.0)
    broken = replace(straight, out=str(tmp_path / "broken"), batch_size=2, stop_after=3)
    main(straight)
    assert train(broken, ranks=2).returncode == 0
    main(replace(broken, accumulate=2, stop_after=0, resume=True))
    assert losses(broken) == pytest.approx(losses(straight), abs=1e-5)


def test_resuming_on_other_volumes_is_refused(tiny: Config, volumes: Path) -> None:
    config = tiny(stop_after=2)
    main(config)
    content = json.loads(volumes.read_text())
    other = volumes.with_name("fewer.json")
    other.write_text(json.dumps({**content, "training": content["training"][:-1]}))
    with pytest.raises(InputError, match="the data list is not what it was"):
        main(tiny(resume=True, data=str(other)))


def test_stop_after_means_the_same_step_however_often_it_is_passed(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is queued again has the same command line."""
    config = tiny(steps=6, stop_after=2, resume=True)
    for _ in range(2):
        main(config)
        assert checkpoint.load(Path(config.out) / "last.pt")["step"] == 2
        assert "stopped after step 2 of 6, as --stop-after 2 says" in capsys.readouterr().err
    main(replace(config, stop_after=5))
    main(config)  # and a run that is beyond it goes no further
    assert checkpoint.load(Path(config.out) / "last.pt")["step"] == 5
    assert [e["step"] for e in events(config, "train")] == [1, 2, 3, 4, 5]


# --- what a step does


def first_moments(folder: str | Path) -> float:
    """The norm of the gradient of the first step: AdamW's first moments are then 0.1 of it."""
    state = checkpoint.load(Path(folder) / "last.pt")["optimizer"]["state"].values()
    return math.sqrt(sum(float((entry["exp_avg"] ** 2).sum()) for entry in state)) / 0.1


def test_the_gradient_is_clipped_to_the_norm_that_is_asked_for(
    tiny: Config, tmp_path: Path
) -> None:
    whole = tiny(out=str(tmp_path / "whole"), steps=1, clip=0.0)
    main(whole)
    norm = events(whole, "train")[0]["grad_norm"]
    assert first_moments(whole.out) == pytest.approx(norm, rel=1e-4)
    for share in (0.3, 3.0):
        clipped = tiny(out=str(tmp_path / str(share)), steps=1, clip=share * norm)
        main(clipped)
        assert events(clipped, "train")[0]["grad_norm"] == pytest.approx(
            norm, rel=1e-6
        )  # logged as it was
        assert first_moments(clipped.out) == pytest.approx(min(1.0, share) * norm, rel=1e-4)


def test_the_rate_of_every_step_is_the_one_that_is_logged_down_to_the_last(tiny: Config) -> None:
    config = tiny(steps=5, warmup=0, lr=1e-2, lr_min=1e-3)
    main(config)
    cosine = [1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [e["lr"] for e in events(config, "train")] == pytest.approx(cosine)
    groups = checkpoint.load(Path(config.out) / "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([cosine[-1]] * 2)


def test_the_seed_is_that_of_the_weights_too(tiny: Config, tmp_path: Path) -> None:
    drawn = [
        tiny(out=str(tmp_path / str(n)), seed=seed, lr=0.0, steps=1)
        for n, seed in enumerate((3, 3, 4))
    ]
    for config in drawn:
        main(config)
    first, again, other = (weights(config.out) for config in drawn)
    assert same_weights(first, again)
    kernels = [name for name, value in first.items() if value.ndim == 5]
    assert kernels and not any(torch.equal(first[name], other[name]) for name in kernels)


def test_best_is_the_lowest_validation_of_a_trained_network(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before the first step does not count: it is of random weights."""
    lowest_second = iter([0.1, 0.5, 0.3, 0.4])
    validate = train_pretrain.validate
    monkeypatch.setattr(
        train_pretrain,
        "validate",
        lambda run, signal: {**validate(run, signal), "l1": next(lowest_second)},
    )
    config = tiny(steps=3, validate_every=1)
    main(config)
    best = checkpoint.load(Path(config.out) / "best.pt")
    assert (best["step"], best["best"]) == (2, 0.3)
    assert checkpoint.load(Path(config.out) / "last.pt")["best"] == 0.3


# --- what is said


@pytest.mark.parametrize(
    "given, word",
    [
        ({"batch_size": 1, "accumulate": 2}, "one sample in a micro-batch"),
        ({"modality": "t1"}, "volume is t1"),
        ({"batch_size": 1, "alpha": 0.0}, ""),
        ({}, ""),
    ],
)
def test_cmcl_with_nothing_to_compare_is_said_once_at_the_start(
    tiny: Config,
    volumes: Path,
    given: dict[str, Any],
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "modality" in given:
        content = json.loads(volumes.read_text())
        content["training"] = [entry for entry in content["training"] if entry["modality"] == "t1"]
        given = {"data": str(volumes.with_name("t1.json"))}
        Path(given["data"]).write_text(json.dumps(content))
    config = tiny(**given, steps=2, recon="residual")
    main(config)
    told = [e["text"] for e in events(config, "warning")]
    assert len(told) == bool(word) and capsys.readouterr().err.count("warning: CMCL") == bool(word)
    assert not word or (word in told[0] and "--alpha 0" in told[0])


def test_the_demos_earlier_run_is_started_over_with_a_word(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(data="", preset="demo")
    resumed = replace(config, resume=True)
    main_rank = Ranks(0, 1, torch.device("cpu"))
    other_rank = Ranks(1, 2, torch.device("cpu"))
    folder = Path(config.out)
    phantoms = folder / "phantoms"
    lists = Lists(phantoms / "pretrain.json", phantoms / "ct_seg.json", phantoms / "mr_seg.json")
    monkeypatch.setattr("dae.demo.write_phantoms", lambda folder: lists)
    (folder / "figures").mkdir(parents=True)

    for name in ("last.pt", "best.pt"):
        (folder / name).touch()
    with_phantoms(resumed, main_rank, phantoms)
    with_phantoms(config, other_rank, phantoms)  # rank 0 may have begun to write
    assert (folder / "last.pt").exists() and (folder / "best.pt").exists()
    assert capsys.readouterr().err == ""

    changed = with_phantoms(config, main_rank, phantoms)
    assert changed.data == str(phantoms / "pretrain.json")
    told = capsys.readouterr().err
    assert f"{folder}: the demo's earlier run is removed and started over" in told
    assert [path.name for path in folder.iterdir()] == ["figures"]


# --- held-out volumes


def test_only_the_held_out_volumes_that_are_validated_on_are_prepared(
    tiny: Config, volumes: Path, tmp_path: Path
) -> None:
    """Three are held out, one of each modality."""
    config = tiny(validate_crops=2, cache_dir=str(tmp_path / "cache"), steps=1)
    main(config)
    prepared = {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert prepared == {*(f"train{n}" for n in range(5)), "held1", "held0"}  # ct and t1
    assert set(events(config, "validation")[-1]["l1_by_modality"]) == {"ct", "t1"}


# --- a worker that fails


@pytest.mark.parametrize(
    "what, ranks", [("the cache goes", 0), ("the cache goes", 2), ("a worker is killed", 0)]
)
def test_a_run_whose_worker_fails_ends_in_a_line(
    tiny: Config, tmp_path: Path, what: str, ranks: int
) -> None:
    """Within the time that it is waited for; the other rank, which has lost its peer, too.

    torchrun ends the other rank, which on a busy machine has not always said its own line by then.
    """
    config = tiny(steps=100_000, workers=2, cache_dir=str(tmp_path / "cache"), save_every=100_000)
    line = command(config)
    process = torchrun(*line, stderr=subprocess.PIPE) if ranks else Script(line)
    try:
        wait_for_step(config, 3, process)
        if what == "the cache goes":
            shutil.rmtree(tmp_path / "cache")
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
        told = said_by(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = [line for line in told.splitlines() if line.startswith("train_pretrain.py: ")]
    assert process.poll() == (1 if ranks else 2) and 1 <= len(said) <= max(1, ranks), told[-3000:]
    word = "--cache-dir" if what == "the cache goes" else "a process that reads ahead has died"
    assert any(word in line for line in said)
    assert ranks or "Traceback" not in told


def said_by(process: subprocess.Popen[str] | Script) -> str:
    """Its stderr, when it has ended."""
    if isinstance(process, Script):
        return process.done(timeout=60).stderr
    return process.communicate(timeout=60)[1]


def test_a_folder_that_holds_a_run_is_not_written_over(tiny: Config) -> None:
    config = tiny()
    main(config)
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        main(config)


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(
    tiny: Config, tiny_seg: Callable[..., SegConfig]
) -> None:
    """And not for a moment longer, though its processes that read ahead outlive it."""
    config = tiny(steps=100_000, workers=2, save_every=5, resume=True)
    first = Script(command(config))
    wait_for_step(config, 6, first)
    log = Path(config.out) / "log.jsonl"
    written = (Path(config.out) / "config.json").read_bytes()

    for other in (replace(config, log_every=2), tiny_seg(out=config.out, resume=True)):
        done = train(other)
        assert done.returncode == 2 and "another run is writing into it" in done.stderr
    assert (Path(config.out) / "config.json").read_bytes() == written
    starts = [e for e in read_log(log) if e["event"] in ("start", "resume")]
    assert len(starts) == 1 and first.poll() is None

    os.kill(first.pid, signal.SIGKILL)  # that process alone, and not its group
    assert first.wait(10) == -signal.SIGKILL
    done = train(replace(config, stop_after=12))
    assert done.returncode == 0, done.stderr


def test_of_runs_that_start_in_one_folder_at_once_one_goes_on(tiny: Config) -> None:
    config = tiny(steps=400, stop_after=300)
    scripts = [Script(command(config)) for _ in range(3)]
    done = [script.done(60) for script in scripts]
    assert sorted(run.returncode for run in done) == [0, 2, 2]
    assert len(events(config, "start")) == 1


def test_labels_in_the_list_change_nothing(tiny: Config, volumes: Path, tmp_path: Path) -> None:
    content = json.loads(volumes.read_text())
    content["training"] = [{**entry, "label": "none.nii.gz"} for entry in content["training"]]
    labelled = volumes.with_name("labelled.json")
    labelled.write_text(json.dumps(content))
    plain = tiny(foreground=1.0)
    with_labels = tiny(foreground=1.0, data=str(labelled), out=str(tmp_path / "b"))
    main(plain)
    main(with_labels)
    assert same_weights(weights(plain.out), weights(with_labels.out))


def test_speed_and_pictures_are_right_after_a_resumption_at_an_odd_step(tiny: Config) -> None:
    config = tiny(steps=12, stop_after=3, log_every=4, validate_every=6)
    main(config)
    main(replace(config, stop_after=0, resume=True))
    assert [e["step"] for e in events(config, "train")] == [4, 8, 12]


def test_init_starts_from_given_weights(tiny: Config, tmp_path: Path) -> None:
    first = tiny(out=str(tmp_path / "first"))
    main(first)
    main(tiny(out=str(tmp_path / "second"), init=f"{first.out}/last.pt", lr=0.0))
    assert same_weights(weights(first.out), weights(tmp_path / "second"))
    with pytest.raises(InputError, match=r"its network is another; add --feature-size 8$"):
        main(tiny(out=str(tmp_path / "third"), init=f"{first.out}/last.pt", feature_size=4))


@pytest.mark.parametrize(
    "first, second, is_taken",
    [("plain", "output", True), ("residual", "residual", True), ("plain", "residual", False)],
)
def test_init_takes_a_head_of_the_same_task_alone(
    tiny: Config, tmp_path: Path, first: str, second: str, is_taken: bool
) -> None:
    """A residual network begins as x_hat; the head of another kind would end that."""
    before = tiny(out=str(tmp_path / "first"), recon=first)
    main(before)
    after = tiny(out=str(tmp_path / "second"), init=f"{before.out}/last.pt", recon=second, lr=0.0)
    main(after)
    heads = [weights(run.out)["head.weight"] for run in (before, after)]
    assert torch.equal(*heads) == is_taken
    assert bool(heads[1].any()) == is_taken


def test_init_takes_no_head_of_classes(tiny: Config, tmp_path: Path) -> None:
    before = tiny(out=str(tmp_path / "first"))
    main(before)
    saved = checkpoint.load(Path(before.out) / "last.pt")
    saved["plan"]["classes"] = {"0": "background", "1": "liver"}
    checkpoint.save(tmp_path / "tuned.pt", saved)
    main(tiny(out=str(tmp_path / "second"), init=str(tmp_path / "tuned.pt"), lr=0.0, seed=5))
    after = weights(tmp_path / "second")
    assert not torch.equal(after["head.weight"], saved["model"]["head.weight"])
    others = [name for name in after if not name.startswith("head.")]
    assert all(torch.equal(after[name], saved["model"][name]) for name in others)


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=10, save_every=1)
    monkeypatch.setattr(
        train_pretrain, "learning_rate", lambda step, config: 1e-2 if step < 3 else 1e30
    )
    with pytest.raises(InputError, match=r"step \d+: loss nan|gradient norm (nan|inf)"):
        main(config)
    saved = checkpoint.load(Path(config.out) / "last.pt")
    assert events(config, "end")[-1]["reason"] == "not finite"
    assert saved["step"] == events(config, "end")[-1]["step"]


@pytest.mark.parametrize("recon, warned", [("plain", True), ("residual", False)])
def test_the_log_says_once_that_the_network_does_not_beat_its_input(
    tiny: Config, capsys: pytest.CaptureFixture[str], recon: str, warned: bool
) -> None:
    config = tiny(steps=20, recon=recon, lr=1e-4)
    main(config)
    said = capsys.readouterr().err.count("does not beat its own input")
    assert said == len(events(config, "warning")) == int(warned)
    if warned:
        assert "--recon residual" in events(config, "warning")[0]["text"]


def write_mask(path: Path) -> Path:
    """A label map, where an image should be."""
    mask = np.zeros((18, 18, 18), dtype=np.uint8)
    mask[4:9] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), path)
    return path


def write_list(path: Path, **entry: str) -> str:
    """A data list with one training item, beside the validation items of the good list."""
    good = json.loads((path.parent / "list.json").read_text())
    path.write_text(json.dumps({"training": [entry], "validation": good["validation"]}))
    return str(path)


def write_text(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def bad_inputs(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What a user may get wrong: fields of the configuration, and a word of the answer."""
    mask = write_mask(folder / "mask.nii")
    prose = write_text(folder / "prose.json", "hello")
    empty = write_text(folder / "empty.json", '{"training": []}')
    missing = write_list(folder / "missing.json", image="gone.nii.gz", modality="ct")
    unnamed = write_list(folder / "unnamed.json", image="train0.nii")
    unknown = write_list(folder / "odd.json", image="train0.nii", modality="xray")
    masks = write_list(folder / "mask.json", image="mask.nii", modality="t1")
    return {
        "no list": ({"data": ""}, "--data"),
        "list not there": ({"data": str(folder / "none.json")}, "none.json"),
        "not JSON": ({"data": prose}, "prose.json"),
        "empty list": ({"data": empty}, "no training items"),
        "missing file": ({"data": missing}, "gone.nii.gz"),
        "no modality": ({"data": unnamed}, "--modality"),
        "unknown modality": ({"data": unknown}, "xray"),
        "size": ({"crop": (16, 20, 16)}, "16 20 16"),
        "fp16 on a CPU": ({"amp": "fp16"}, "--amp"),
        "cuda": ({"device": "cuda"}, "--device"),
        "temperature": ({"temperature": 800.0}, "--temperature 800"),
        "contradiction": ({"method": "mae", "recon": "residual"}, "--recon residual"),
        "init": ({"init": str(folder / "none.pt")}, "none.pt"),
        "window": ({"ct_window": (5.0, 1.0)}, "--ct-window"),
        "out": ({"out": str(mask / "run")}, "--out"),
        "labels as an image": ({"data": masks}, "mask.nii: every voxel that is"),
    }


def test_bad_input_is_one_line_that_names_it_and_leaves_nothing(
    tiny: Config, volumes: Path
) -> None:
    for name, (given, word) in bad_inputs(volumes.parent).items():
        if name == "cuda" and torch.cuda.is_available():
            continue
        config = tiny(**given)
        with pytest.raises(InputError) as error:
            main(config)
        assert word in str(error.value) and "\n" not in str(error.value), name
        assert name == "out" or not Path(config.out).exists(), name


def test_from_the_shell_bad_input_is_one_line_and_exit_code_2(tiny: Config) -> None:
    done = train(tiny(crop=(16, 20, 16)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "train_pretrain.py: size 16 20 16"
    )


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_the_checkpoint_before(
    tiny: Config, tmp_path: Path
) -> None:
    config = tiny(steps=400, save_every=400, stop_after=2)
    main(config)
    before = (Path(config.out) / "last.pt").read_bytes()
    limit = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    )
    start = "import runpy, sys; sys.argv = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = tmp_path / "limited.py"
    script.write_text(limit + start)
    done = run_script(script, *command(tiny(steps=400, save_every=400, stop_after=3, resume=True)))
    assert done.returncode == 2
    assert (
        done.stderr.strip().split("\n")[-1].startswith("train_pretrain.py: ")
        and "untouched" in done.stderr
    )
    assert (Path(config.out) / "last.pt").read_bytes() == before


@pytest.fixture
def long(tiny: Config, tmp_path: Path) -> Interruptible:
    """A run to be interrupted, and the weights at its end if it is not."""
    straight = tiny(out=str(tmp_path / "straight"), steps=200, save_every=10, workers=2)
    main(straight)
    return replace(straight, out=str(tmp_path / "broken"), resume=True), weights(straight.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_cleanly(
    long: tuple[PretrainConfig, dict[str, Any]], number: signal.Signals
) -> None:
    config, at_the_end = long
    assert interrupt(config, number, after_step=12) == 0
    step = checkpoint.load(Path(config.out) / "last.pt")["step"]
    assert 12 <= step < 200 and step == events(config, "end")[-1]["step"]
    main(config)
    assert same_weights(weights(config.out), at_the_end)


def test_killed_at_any_moment_and_resumed_a_run_ends_with_the_same_weights(
    long: Interruptible,
) -> None:
    config, at_the_end = long
    for after_step in (3, 37, 80):
        assert interrupt(config, signal.SIGKILL, after_step=after_step) == -signal.SIGKILL
    main(config)
    assert same_weights(weights(config.out), at_the_end)


@pytest.mark.slow
def test_the_demo_beats_its_input_in_every_modality_and_leaves_its_pictures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "train_pretrain.py"), "--preset", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = [e for e in read_log(tmp_path / "runs/demo/log.jsonl") if e["event"] == "validation"][-1]
    assert last["l1"] <= 0.8 * last["l1_input"]
    assert all(
        last["l1_by_modality"][kind] < l1 for kind, l1 in last["l1_input_by_modality"].items()
    )
    assert len(last["l1_by_modality"]) == 5


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif(
    "DAE_REALDATA" not in os.environ, reason="DAE_REALDATA names no folder of real volumes"
)
def test_on_real_volumes_it_beats_its_input(tmp_path: Path) -> None:
    result = main(
        PretrainConfig(
            data=f"{os.environ['DAE_REALDATA']}/pretrain.json",
            out=str(tmp_path / "run"),
            crop=(64, 64, 64),
            window=(4, 4, 4),
            feature_size=12,
            recon="residual",
            lr=1e-3,
            warmup=20,
            steps=300,
        )
    )
    assert result["l1"] < result["l1_input"]


def test_a_finished_run_that_is_resumed_with_other_crops_keeps_its_best(tiny: Config) -> None:
    config = tiny(steps=4, validate_every=1)
    main(config)
    best = (Path(config.out) / "best.pt").read_bytes()
    main(replace(config, resume=True, validate_crops=1))
    assert (Path(config.out) / "best.pt").read_bytes() == best
