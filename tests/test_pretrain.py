"""train_pretrain.py: the run folder, exact resume, refusals, and the network against its own input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import command, environment, events, interrupt, same_weights, train

from dae.config import InputError, PretrainConfig
from dae.pretext.methods import METHODS
from dae.training import checkpoint
from dae.training.log import read
from train_pretrain import main

Config = Callable[..., PretrainConfig]
Interruptible = tuple[PretrainConfig, dict[str, Any]]


def weights(folder: str | Path, name: str = "last.pt") -> dict[str, Any]:
    return dict(checkpoint.load(Path(folder) / name)["model"])


def test_a_run_leaves_its_folder_as_promised(tiny: Config) -> None:
    config = tiny(steps=6, validate_every=3, keep_every=2)
    result = main(config)
    out = Path(config.out)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    pictures = {"figures/reconstruction.png", "figures/loss.png"}
    kept = {"step-2.pt", "step-4.pt", "step-6.pt"}
    assert files == {"config.json", "log.jsonl", "last.pt", "best.pt", *pictures, *kept}
    assert [e["step"] for e in events(config, "validation")] == [0, 3, 6]
    assert [e["step"] for e in events(config, "train")] == [1, 2, 3, 4, 5, 6]
    first = read(out / "log.jsonl")[0]
    assert first["event"] == "start" and first["torch"] == torch.__version__ and "git" in first
    names = {"loss", "l1", "cmcl", "lr", "grad_norm", "samples_per_s", "data_wait", "l1_by_modality"}
    assert names <= events(config, "train")[0].keys()
    assert events(config, "validation")[-1]["l1"] == result["l1"]
    assert set(result["l1_by_modality"]) == set(result["l1_input_by_modality"]) == {"ct", "t1", "t2"}
    assert json.loads((out / "config.json").read_text())["steps"] == 6


def test_the_checkpoint_holds_what_a_user_of_the_weights_needs(tiny: Config) -> None:
    config = tiny()
    main(config)
    saved = checkpoint.load(Path(config.out) / "last.pt")
    assert {"model", "pretext", "optimizer", "scaler", "step", "rng", "config", "plan"} <= saved.keys()
    plan = saved["plan"]
    assert (plan["backbone"], plan["in_channels"], plan["crop"]) == ("swin_unetr", 1, [16, 16, 16])
    assert plan["arguments"]["feature_size"] == 8 and plan["intensity"]["ct"] == ["window"]
    assert plan["modalities"] == ["ct", "t1", "t2"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_lowers_its_loss(tiny: Config, method: str) -> None:
    config = tiny(method=method, steps=25, mask_block=8, l1_units="crop", alpha=0.0)
    result = main(config)
    losses = [e["l1"] for e in events(config, "train")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert (result["l1_input"] == 0) == (method in ("local_mask", "mae"))


@pytest.mark.parametrize("stop", [1, 3])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tiny: Config, tmp_path: Path, stop: int) -> None:
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
    assert [e["loss"] for e in events(straight, "train")] == [e["loss"] for e in events(broken, "train")]


def test_workers_change_no_sample(tiny: Config, tmp_path: Path) -> None:
    runs = [tiny(out=str(tmp_path / str(workers)), workers=workers) for workers in (0, 2)]
    for config in runs:
        main(config)
    assert same_weights(weights(runs[0].out), weights(runs[1].out))


def test_accumulation_equals_a_larger_batch_but_for_the_contrast(tiny: Config, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "changed, flag", [({"lr": 2e-2}, "--lr"), ({"crop": (16, 16, 24)}, "--crop"), ({"seed": 1}, "--seed")]
)
def test_resuming_another_configuration_is_refused_by_the_flags_name(
    tiny: Config, changed: dict[str, Any], flag: str
) -> None:
    config = tiny()
    main(config)
    before = (Path(config.out) / "last.pt").read_bytes()
    with pytest.raises(InputError, match=f"^{flag} "):
        main(tiny(resume=True, **changed))
    assert (Path(config.out) / "last.pt").read_bytes() == before


def test_resuming_on_other_volumes_or_another_batch_is_refused(tiny: Config, volumes: Path) -> None:
    config = tiny(stop_after=2)
    main(config)
    content = json.loads(volumes.read_text())
    other = volumes.with_name("fewer.json")
    other.write_text(json.dumps({**content, "training": content["training"][:-1]}))
    saved = Path(config.out) / "last.pt"
    with pytest.raises(InputError, match="the data list is not what it was"):
        main(tiny(resume=True, data=str(other)))
    checkpoint.save(saved, {**checkpoint.load(saved), "global_batch": 16})
    with pytest.raises(InputError, match="--batch-size"):
        main(tiny(resume=True))


def test_a_folder_that_holds_a_run_is_not_written_over(tiny: Config) -> None:
    config = tiny()
    main(config)
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        main(config)


def test_labels_in_the_list_change_nothing(tiny: Config, volumes: Path, tmp_path: Path) -> None:
    content = json.loads(volumes.read_text())
    content["training"] = [{**entry, "label": "none.nii.gz"} for entry in content["training"]]
    labelled = volumes.with_name("labelled.json")
    labelled.write_text(json.dumps(content))
    plain, with_labels = tiny(foreground=1.0), tiny(foreground=1.0, data=str(labelled), out=str(tmp_path / "b"))
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


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=10, save_every=1)
    monkeypatch.setattr("train_pretrain.Schedule.lr_at", lambda self, step: 1e-2 if step < 3 else 1e30)
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


def volumes_file(folder: Path) -> Path:
    """A file, where a folder should be; and a mask among the images."""
    mask = np.zeros((18, 18, 18), dtype=np.uint8)
    mask[4:9] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "mask.nii")
    return folder / "mask.nii"


def bad_inputs(folder: Path, good: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """What a user may get wrong: fields of the configuration, and a word of the answer."""

    def listed(name: str, content: Any) -> dict[str, Any]:
        path = folder / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return {"data": str(path)}

    def items(**entry: str) -> dict[str, Any]:
        return {"training": [entry], "validation": good["validation"]}

    return {
        "no list": ({"data": ""}, "--data"),
        "list not there": ({"data": str(folder / "none.json")}, "none.json"),
        "not JSON": (listed("prose", "hello"), "prose.json"),
        "empty list": (listed("empty", {"training": []}), "no training items"),
        "missing file": (listed("missing", items(image="gone.nii.gz", modality="ct")), "gone.nii.gz"),
        "no modality": (listed("unnamed", items(image="train0.nii")), "--modality"),
        "unknown modality": (listed("odd", items(image="train0.nii", modality="xray")), "xray"),
        "size": ({"crop": (16, 20, 16)}, "16 20 16"),
        "fp16 on a CPU": ({"amp": "fp16"}, "--amp"),
        "cuda": ({"device": "cuda"}, "--device"),
        "contradiction": ({"method": "mae", "recon": "residual"}, "--recon residual"),
        "init": ({"init": str(folder / "none.pt")}, "none.pt"),
        "window": ({"ct_window": (5.0, 1.0)}, "--ct-window"),
        "out": ({"out": str(volumes_file(folder) / "run")}, "--out"),
        "labels as an image": (listed("mask", items(image="mask.nii", modality="t1")), "mask.nii: every voxel that is"),
    }


NAMES = (
    "no list", "list not there", "not JSON", "empty list", "missing file", "no modality", "unknown modality",
    "size", "fp16 on a CPU", "cuda", "contradiction", "init", "window", "out", "labels as an image",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line_that_names_it_and_leaves_nothing(tiny: Config, volumes: Path, name: str) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    given, word = bad_inputs(volumes.parent, json.loads(volumes.read_text()))[name]
    config = tiny(**given)
    with pytest.raises(InputError) as error:
        main(config)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert name == "out" or not Path(config.out).exists()


def test_from_the_shell_bad_input_is_one_line_and_exit_code_2(tiny: Config) -> None:
    done = train(tiny(crop=(16, 20, 16)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train_pretrain.py: size 16 20 16")


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_the_checkpoint_before(tiny: Config) -> None:
    config = tiny(steps=400, save_every=400, stop_after=2)
    main(config)
    before = (Path(config.out) / "last.pt").read_bytes()
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    script = limit + "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    line = command(tiny(steps=400, save_every=400, stop_after=3, resume=True))
    done = subprocess.run([line[0], "-c", script, *line[1:]], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.strip().split("\n")[-1].startswith("train_pretrain.py: ") and "untouched" in done.stderr
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
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(Path(__file__).parents[1] / "train_pretrain.py"), "--preset", "demo"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = [e for e in read(tmp_path / "runs/demo/log.jsonl") if e["event"] == "validation"][-1]
    assert last["l1"] <= 0.8 * last["l1_input"]
    assert all(last["l1_by_modality"][kind] < l1 for kind, l1 in last["l1_input_by_modality"].items())
    assert len(last["l1_by_modality"]) == 5 and time.perf_counter() - started < 240


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif("DAE_REALDATA" not in os.environ, reason="DAE_REALDATA names no folder of real volumes")
def test_on_real_volumes_it_beats_its_input(tmp_path: Path) -> None:
    result = main(PretrainConfig(
        data=f"{os.environ['DAE_REALDATA']}/pretrain.json", out=str(tmp_path / "run"), crop=(64, 64, 64),
        window=(4, 4, 4), feature_size=12, recon="residual", lr=1e-3, warmup=20, steps=300,
    ))  # fmt: skip
    assert result["l1"] < result["l1_input"]
