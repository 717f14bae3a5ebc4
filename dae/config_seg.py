"""Command lines of segmentation: fine-tuning, prediction, scoring, comparison, post-processing; and their recipes."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from dae.config import DataConfig, NetworkConfig, OptimConfig, Presets, RunConfig, opt

Policy = Literal["exclude", "diagonal"]
DefinitionName = Literal["default", "monai", "medpy", "surface-distance"]
Ensemble = Literal["softmax", "logits"]


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """what is fine-tuned"""

    pretrained: str = opt("", "weights of train_pretrain.py, or any others that `python -m dae.weights inspect` reads; "
                          "network, crop, spacing and intensities come with them where no flag differs")  # fmt: skip
    transfer: str = opt("both", "what is taken of it; the head is always new; sec. 3.2",
                        choices=("encoder", "decoder", "both"))  # fmt: skip
    from_scratch: bool = opt(False, "the same run without the weights: the network of --pretrained, newly drawn")
    schedule: str = opt("warmup", "learning rates over the run: warm-up then cosine, cosine alone, the encoder never "
                        "moved, or the decoder alone for the first tenth",
                        choices=("warmup", "plain", "frozen-encoder", "decoder-first"))  # fmt: skip
    loss: str = opt("dice", "sec. 2: 'we use a Dice loss'; the authors' code adds cross-entropy",
                    choices=("dice", "dice_ce"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """labelled data"""

    label_fraction: float = opt(1.0, "share of the training subjects; smaller shares lie within larger ones; Table 3",
                                low=0, high=1)  # fmt: skip
    foreground_crop: bool = opt(True, "cut volumes to what is brighter than the background, before training")
    positive: float = opt(0.5, "share of the crops that are centred on a labelled voxel", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """augmentation (sec. 3.2: noise, contrast, zoom, flips); each figure a chance per sample"""

    flip: float = opt(0.2, "along each axis; left and right only where the list says which labels 'swap', or no two "
                      "classes can be a pair", low=0, high=1)  # fmt: skip
    rotate: float = opt(0.2, "by 90, 180 or 270 degrees in the axial plane", low=0, high=1)
    zoom: float = opt(0.2, "by 0.9 to 1.1", low=0, high=1)
    brightness: float = opt(0.1, "scale by 0.9 to 1.1 and shift by up to 0.1", low=0, high=1)
    contrast: float = opt(0.1, "gamma of 0.7 to 1.5", low=0, high=1)
    noise: float = opt(0.1, "Gaussian, std up to 0.1", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class SegConfig(RunConfig, OptimConfig, NetworkConfig, AugmentConfig, LabelConfig, TransferConfig, DataConfig):
    """length and validation"""

    preset: str = opt("", "btcv, feta: the text; official-btcv: the authors' code; demo: phantoms on a CPU, in minutes")
    out: str = opt("runs/seg", "run folder: config.json, log.jsonl, last.pt, best.pt, figures/")
    split_seed: int = opt(0, "seed of the five folds, where the list has neither folds nor validation, and of "
                          "--label-fraction", low=0)  # fmt: skip
    epochs: int = opt(600, "passes over the training volumes, where --steps is 0; sec. 3.2", low=1)
    steps: int = opt(0, "optimiser steps; 0: as --epochs says", low=0)
    batch_size: int = opt(4, "samples per rank and micro-batch; sec. 3.2", low=1)
    overlap: float = opt(0.5, "of the windows of a validation", low=0, high=0.9)

    presets: ClassVar[Presets] = {}


BTCV: dict[str, Any] = {  # sec. 3.1 and 3.2; spacing, window and crops are the authors' code's, the text has none
    "spacing": (1.5, 1.5, 2.0), "ct_window": (-175.0, 250.0), "crop": (96, 96, 96), "epochs": 600, "lr": 4e-4,
    "batch_size": 4,
}  # fmt: skip
FETA: dict[str, Any] = {  # sec. 3.1 and 3.2: intensities to [0, 1], flips on all axes, noise
    "spacing": (), "mr_intensity": "percentile", "crop": (96, 96, 96), "epochs": 600, "lr": 4e-4, "batch_size": 4,
    "rotate": 0.0, "zoom": 0.0, "contrast": 0.0,
}  # fmt: skip
OFFICIAL_BTCV: dict[str, Any] = BTCV | {  # 1000 epochs, 50 of them warm-up, each 24 volumes in 6 steps
    "steps": 6000, "lr": 8e-4, "warmup": 300, "loss": "dice_ce", "zoom": 0.0, "contrast": 0.0, "noise": 0.0,
}  # fmt: skip
DEMO: dict[str, Any] = {
    "out": "runs/demo_seg", "pretrained": "runs/demo/last.pt", "steps": 300, "batch_size": 2,
    "lr": 3e-3, "warmup": 20, "amp": "off", "validate_every": 50, "workers": 1, "device": "cpu", "loss": "dice_ce",
    "flip": 0.2, "rotate": 0.0, "zoom": 0.1,
}  # fmt: skip
SegConfig.presets.update({"btcv": BTCV, "feta": FETA, "official-btcv": OFFICIAL_BTCV, "demo": DEMO})


@dataclass(frozen=True, kw_only=True)
class CasesConfig:
    """cases"""

    data: str = opt("", "data list (JSON), or an nnU-Net raw folder")
    data_root: str = opt("", "folder that the list's paths start from; else the list's own")
    split: str = opt("validation", "which items of the list", choices=("training", "validation", "test"))
    fold: int | None = opt(None, "held-out fold, where the list has no validation; else the one that the checkpoint "
                           "held out, or 0 where that is not known", low=0)  # fmt: skip
    split_seed: int | None = opt(None, "seed of the five folds, where the list has neither folds nor validation; else "
                                 "the checkpoint's, or 0", low=0)  # fmt: skip
    allow_trained: bool = opt(False, "predict, score or tune on cases that the network was trained on")
    out: str = opt("", "folder for what is made")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(CasesConfig):
    """prediction"""

    checkpoint: tuple[str, ...] = opt((), "checkpoints of train_seg.py; several are an ensemble")
    backbone: str = opt("", "module:Class of the checkpoints' network, where it is your own (docs/porting.md)")
    images: tuple[str, ...] = opt((), "image files or folders, in place of --data")
    modality: str = opt("", "modality of --images, if the checkpoint knows several")
    overlap: float = opt(0.5, "of the windows", low=0, high=0.9)
    tta: bool = opt(False, "average over the flips that the network was trained with")
    ensemble: Ensemble = opt("softmax", "what is averaged over checkpoints", choices=("softmax", "logits"))
    postprocess: str = opt("", "plan of `eval.py tune`")
    batch: int = opt(4, "windows at once", low=1)
    device: str = opt("auto", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))
    amp: str = opt("auto", "autocast, as in training", choices=("auto", "bf16", "fp16", "off"))


@dataclass(frozen=True, kw_only=True)
class TruthsConfig(CasesConfig):
    """predictions against labels"""

    predictions: str = opt("", "folder of predicted label maps")
    labels: str = opt("", "folder of true label maps of the same names, in place of --data")
    ignore: int | None = opt(None, "label of what was not annotated and counts for nothing; else the one that the list "
                             "names 'ignore'")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(TruthsConfig):
    """scores"""

    tolerance: float = opt(1.0, "of NSD, in mm, for the classes that have none in the list's tolerance_mm", low=0)
    policy: Policy = opt("exclude", "distances of a missed class: left out and counted, or the image's diagonal",
                      choices=get_args(Policy))  # fmt: skip
    definition: DefinitionName = opt("default", "whose surfaces and percentiles", choices=get_args(DefinitionName))


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TruthsConfig):
    """post-processing, chosen on validation cases"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """comparison"""

    a: str = opt("", "scores.csv, or the folder that holds it")
    b: str = opt("", "scores.csv, or the folder that holds it")
    out: str = opt("", "folder for compare.csv and compare.json; none: print only")
    seed: int = opt(0, "of the bootstrap", low=0)


@dataclass(frozen=True, kw_only=True)
class FoldsConfig:
    """folds or seeds"""

    scores: tuple[str, ...] = opt((), "the scores.csv of each, or the folder that holds it; its name is the folder's")
    out: str = opt("", "folder for folds.csv and folds.json; none: print only")
    seed: int = opt(0, "of the bootstrap", low=0)
