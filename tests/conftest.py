"""Tiny volumes and a tiny network: a run of some steps in about a second."""

import dae.quiet  # noqa: F401 - before torch

# isort: split
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from processes import ROOT, Script, environment, run_ranks, run_script

from dae.config.command_line import was_set
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.config.shared import RunConfig
from dae.demo.phantom import write_phantoms
from dae.errors import InputError
from dae.training.log import read_log

NETWORK: dict[str, Any] = {
    "feature_size": 8,
    "depths": (1, 1),
    "heads": (2, 2),
    "window": (2, 2, 2),
}
torch.set_num_threads(1)  # tiny tensors: threads only cost


def smooth_volume(
    rng: np.random.Generator, modality: str, size: tuple[int, int, int]
) -> np.ndarray:
    """Blocks of 6 voxels in HU or in arbitrary MR units."""
    if modality == "ct":
        coarse = rng.normal(0, 300, [-(-n // 6) for n in size])
    else:
        coarse = rng.uniform(100, 900, [5, 5, 5])
    fine = coarse.repeat(6, 0).repeat(6, 1).repeat(6, 2)
    return fine[: size[0], : size[1], : size[2]].astype(np.float32)


def write_entry(
    path: Path, modality: str, size: tuple[int, int, int], rng: np.random.Generator
) -> dict[str, str]:
    """A volume, and its entry in a data list."""
    spacing = np.diag([2.0, 1.5, 3.0, 1.0])
    nib.save(nib.Nifti1Image(smooth_volume(rng, modality, size), spacing), path)
    return {"image": path.name, "modality": modality, "subject": path.stem}


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data list of 5 + 3 volumes of three modalities; one is smaller than the crop."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)

    training = []
    for n, modality in enumerate(("ct", "t1", "t2", "ct", "t1")):
        size = (20, 24, 12 if n == 2 else 18)
        training.append(write_entry(folder / f"train{n}.nii", modality, size, rng))

    validation = []
    for n, modality in enumerate(("t1", "ct", "t2")):
        validation.append(write_entry(folder / f"held{n}.nii", modality, (18, 18, 18), rng))

    path = folder / "list.json"
    path.write_text(json.dumps({"training": training, "validation": validation}))
    return path


@pytest.fixture
def tiny(volumes: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Configurations of tiny runs; keyword arguments override."""

    def config(**given: Any) -> PretrainConfig:
        defaults: dict[str, Any] = {
            "data": str(volumes),
            "out": str(tmp_path / "run"),
            "cache_dir": str(volumes.parent / "cache"),
            "crop": (16, 16, 16),
            **NETWORK,
            "steps": 4,
            "lr": 1e-2,
            "workers": 0,
            "device": "cpu",
            "amp": "off",
            "log_every": 1,
            "validate_crops": 3,
            "validate_every": 1000,
        }
        return PretrainConfig(**{**defaults, **given})

    return config


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of 32^3, and a checkpoint pre-trained on them for two steps."""
    folder = tmp_path_factory.mktemp("seg")
    write_phantoms(folder / "phantoms", subjects=3, size=(32, 32, 32))
    from train_pretrain import main

    main(
        PretrainConfig(
            data=str(folder / "phantoms/pretrain.json"),
            out=str(folder / "pre"),
            cache_dir=str(folder / "cache"),
            crop=(16, 16, 16),
            **NETWORK,
            steps=2,
            workers=0,
            device="cpu",
            amp="off",
            validate_crops=1,
        )
    )
    return folder


@pytest.fixture
def tiny_seg(pretrained: Path, tmp_path: Path) -> Callable[..., SegConfig]:
    """Configurations of tiny fine-tuning runs; keyword arguments override."""

    def config(**given: Any) -> SegConfig:
        defaults: dict[str, Any] = {
            "data": str(pretrained / "phantoms/ct_seg.json"),
            "data_root": "/",  # lists that a test writes elsewhere name the phantoms
            "pretrained": str(pretrained / "pre/last.pt"),
            "out": str(tmp_path / "run"),
            "cache_dir": str(pretrained / "cache"),
            "crop": (16, 16, 16),
            "steps": 4,
            "batch_size": 2,
            "workers": 0,
            "device": "cpu",
            "amp": "off",
            "log_every": 1,
            "validate_every": 1000,
        }
        return SegConfig(**{**defaults, **given})

    return config


def events(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_log(Path(config.out) / "log.jsonl") if e["event"] == kind]


def refusal(call: Callable[..., object], *arguments: Any, **keys: Any) -> str:
    """The one line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flags(config: RunConfig) -> list[str]:
    """The command line that gives this configuration."""
    arguments: list[str] = []
    for name, value in vars(config).items():
        if not was_set(config, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            arguments += [f"--{flag}", *map(str, value)] if value else []
        elif value != "":
            arguments += [f"--{flag}", str(value)]
    return arguments


def train(config: RunConfig, *, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """train_pretrain.py or train_seg.py in a process of its own, or in one for each rank."""
    line = command(config)
    return run_ranks(*[line] * ranks) if ranks else run_script(*line)


def command(config: RunConfig) -> list[str]:
    """The script that runs this configuration, and its flags."""
    script = "train_seg.py" if isinstance(config, SegConfig) else "train_pretrain.py"
    return [str(ROOT / script), *flags(config)]


def torchrun(*line: str | Path, **keys: Any) -> subprocess.Popen[str]:
    """A script under torchrun itself, on two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launch, *map(str, line)], env=environment(), text=True, start_new_session=True, **keys
    )


def interrupt(
    config: RunConfig,
    number: signal.Signals,
    *,
    after_step: int,
    process: subprocess.Popen[str] | None = None,
) -> int:
    """Start a run, send a signal once it has logged a step, and give the exit code.

    process: of a run that has been started already.
    """
    running = process or Script(command(config))
    wait_for_step(config, after_step, running)
    os.killpg(running.pid, number)  # as schedulers do: the workers that read ahead are hit as well
    return running.wait(timeout=60)


def wait_for_step(config: RunConfig, step: int, process: subprocess.Popen[str] | Script) -> None:
    """Until the run has logged a step, or has ended."""
    path = Path(config.out) / "log.jsonl"
    while process.poll() is None and not (
        path.exists() and any(e.get("step", 0) >= step for e in read_log(path))
    ):
        time.sleep(0.05)


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
