"""Command line of train_seg.py."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dae.config.command_line import Presets, opt
from dae.config.shared import DataConfig, NetworkConfig, OptimConfig, RunConfig
from dae.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """what is fine-tuned"""

    pretrained: str = opt(
        "",
        "weights of train_pretrain.py, or any others that `python -m dae.weights inspect` reads; "
        "network, crop, spacing and intensities come with them where no flag differs",
    )
    transfer: Literal["encoder", "decoder", "both", "all"] = opt(
        "both",
        "what is taken of it; both: encoder and decoder, under a new head, sec. 3.2; all: with the "
        "head, to go on with fine-tuned weights on other volumes of the same classes",
    )
    from_scratch: bool = opt(
        False, "the same run without the weights: the network of --pretrained, newly drawn"
    )
    allow_leak: bool = opt(
        False,
        "fine-tune weights that were pre-trained on test cases of the list; the log and the "
        "checkpoint say so",
    )
    schedule: Literal["warmup", "plain", "frozen-encoder", "decoder-first", "probe"] = opt(
        "warmup",
        "learning rates over the run: warm-up then cosine, cosine alone, the encoder never "
        "moved, or the decoder alone for the first tenth; probe: a linear layer on the states of "
        "the encoder in place of a decoder, and the encoder never moved (take a --lr near 0.1)",
    )
    loss: Literal["dice", "dice_ce"] = opt(
        "dice",
        "sec. 2: 'we use a Dice loss'; the authors' code adds cross-entropy; of regions each is a "
        "task of its own, inside and outside, and cross-entropy is binary",
    )


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """labelled data"""

    label_fraction: float = opt(
        1.0,
        "share of the training subjects; smaller shares lie within larger ones; Table 3",
        low=0,
        high=1,
    )
    label_count: int = opt(
        0,
        "number of training subjects, in place of a share; fewer lie within more, and within "
        "shares; 0: as --label-fraction says",
        low=0,
    )
    foreground_crop: bool = opt(
        True, "cut volumes to the box of what is not background, before training"
    )
    positive: float = opt(
        0.5, "share of the crops that are centred on a labelled voxel", low=0, high=1
    )

    def check(self) -> None:
        """Raises InputError where two flags say how many subjects train."""
        if self.label_count and self.label_fraction != 1:
            raise InputError(f"--label-count {self.label_count}: not beside --label-fraction")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """augmentation (sec. 3.2: noise, contrast, zoom, flips); each figure a chance per sample"""

    flip: float = opt(
        0.2,
        "along each axis; left and right only where the list says which labels 'swap', or no two "
        "classes can be a pair",
        low=0,
        high=1,
    )
    rotate: float = opt(0.2, "by 90, 180 or 270 degrees in the axial plane", low=0, high=1)
    zoom: float = opt(0.2, "by 0.9 to 1.1", low=0, high=1)
    brightness: float = opt(0.1, "scale by 0.9 to 1.1 and shift by up to 0.1", low=0, high=1)
    contrast: float = opt(0.1, "gamma of 0.7 to 1.5", low=0, high=1)
    noise: float = opt(0.1, "Gaussian, std up to 0.1", low=0, high=1)


# Sec. 3.1 and 3.2. Spacing, window and crops are those of the authors' code: the text has none.
BTCV: dict[str, Any] = {
    "spacing": (1.5, 1.5, 2.0),
    "ct_window": (-175.0, 250.0),
    "crop": (96, 96, 96),
    "epochs": 600,
    "lr": 4e-4,
    "batch_size": 4,
}

# Sec. 3.1 and 3.2: intensities to [0, 1], flips on all axes, noise.
FETA: dict[str, Any] = {
    "spacing": (),
    "mr_intensity": "percentile",
    "crop": (96, 96, 96),
    "epochs": 600,
    "lr": 4e-4,
    "batch_size": 4,
    "rotate": 0.0,
    "zoom": 0.0,
    "contrast": 0.0,
}

# 1000 epochs, 50 of them warm-up, each 24 volumes in 6 steps.
OFFICIAL_BTCV: dict[str, Any] = {
    **BTCV,
    "steps": 6000,
    "lr": 8e-4,
    "warmup": 300,
    "loss": "dice_ce",
    "zoom": 0.0,
    "contrast": 0.0,
    "noise": 0.0,
}

# Phantoms, with the weights that the demo of pre-training leaves: minutes on two CPU cores.
DEMO: dict[str, Any] = {
    "out": "runs/demo_seg",
    "pretrained": "runs/demo/last.pt",
    "steps": 300,
    "batch_size": 2,
    "lr": 3e-3,
    "warmup": 20,
    "amp": "off",
    "validate_every": 50,
    "workers": 1,
    "device": "cpu",
    "loss": "dice_ce",
    "flip": 0.2,
    "rotate": 0.0,
    "zoom": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class SegConfig(
    RunConfig, OptimConfig, NetworkConfig, AugmentConfig, LabelConfig, TransferConfig, DataConfig
):
    """length and validation"""

    preset: str = opt(
        "",
        "btcv, feta: the text; official-btcv: the authors' code; "
        "demo: phantoms on a CPU, in minutes",
    )
    out: str = opt("runs/seg", "run folder: config.json, log.jsonl, last.pt, best.pt, figures/")
    split_seed: int = opt(
        0,
        "seed of the five folds, where the list has neither folds nor validation, and of "
        "--label-fraction and --label-count",
        low=0,
    )
    epochs: int = opt(600, "passes over the training volumes, where --steps is 0; sec. 3.2", low=1)
    steps: int = opt(0, "optimiser steps; 0: as --epochs says", low=0)
    batch_size: int = opt(4, "samples per rank and micro-batch; sec. 3.2", low=1)
    overlap: float = opt(0.5, "of the windows of a validation", low=0, high=0.9)

    # A flag of the user's goes before the other one of a preset.
    in_place_of: ClassVar[dict[str, str]] = {"epochs": "steps"}
    presets: ClassVar[Presets] = {
        "btcv": BTCV,
        "feta": FETA,
        "official-btcv": OFFICIAL_BTCV,
        "demo": DEMO,
    }
