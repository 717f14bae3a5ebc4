"""Command lines of eval.py."""

from dataclasses import dataclass
from typing import Literal

from dae.config.command_line import DATA_ROOT, opt
from dae.config.shared import Amp, DeviceName, check_backbone_name

Policy = Literal["exclude", "diagonal"]

DefinitionName = Literal["default", "monai", "medpy"]

Ensemble = Literal["softmax", "logits"]

Examples = Literal["crops", "positions"]


# By command, what one that does not fit into memory is told.
NEEDS_LESS = {
    "predict": "take a smaller --batch, or --device cpu",
    "cka": "take fewer --crops, or --device cpu",
    "embed": "take --device cpu",
}


@dataclass(frozen=True, kw_only=True)
class CasesConfig:
    """cases"""

    data: str = opt("", "data list (JSON), or an nnU-Net raw folder")
    data_root: str = opt("", DATA_ROOT)
    split: Literal["training", "validation", "test"] = opt("validation", "which items of the list")
    fold: int | None = opt(
        None,
        "held-out fold, where the list has no validation; else the one that the checkpoint "
        "held out, or 0 where that is not known",
        low=0,
    )
    split_seed: int | None = opt(
        None,
        "seed of the five folds, where the list has neither folds nor validation; else "
        "the checkpoint's, or 0",
        low=0,
    )
    allow_trained: bool = opt(
        False, "predict, score, tune or compare on cases that the network was trained on"
    )
    out: str = opt("", "folder for what is made")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(CasesConfig):
    """prediction"""

    checkpoint: tuple[str, ...] = opt((), "checkpoints of train_seg.py; several are an ensemble")
    backbone: str = opt(
        "", "module:Class of the checkpoints' network, where it is your own (docs/porting.md)"
    )
    images: tuple[str, ...] = opt((), "image files or folders, in place of --data")
    modality: str = opt("", "modality of --images, if the checkpoint knows several")
    overlap: float = opt(0.5, "of the windows", low=0, high=0.9)
    tta: bool = opt(False, "average over the flips that the network was trained with")
    ensemble: Ensemble = opt("softmax", "what is averaged over checkpoints")
    postprocess: str = opt("", "plan of `eval.py tune`")
    batch: int = opt(4, "windows at once", low=1)
    device: DeviceName = opt("auto", "cpu, cuda, or auto")
    amp: Amp = opt("auto", "autocast, as in training")

    def check(self) -> None:
        if self.backbone:
            check_backbone_name(self.backbone)


@dataclass(frozen=True, kw_only=True)
class TruthsConfig(CasesConfig):
    """predictions against labels"""

    predictions: str = opt("", "folder of predicted label maps")
    labels: str = opt("", "folder of true label maps of the same names, in place of --data")
    ignore: int | None = opt(
        None,
        "label of what was not annotated and counts for nothing; else the one that the list "
        "names 'ignore'",
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(TruthsConfig):
    """scores"""

    tolerance: float = opt(
        1.0, "of NSD, in mm, for the classes that have none in the list's tolerance_mm", low=0
    )
    policy: Policy = opt(
        "exclude", "distances of a missed class: left out and counted, or the image's diagonal"
    )
    definition: DefinitionName = opt("default", "whose surfaces and percentiles")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TruthsConfig):
    """post-processing, chosen on validation cases"""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(CasesConfig):
    """features of volumes"""

    backbone: str = opt(
        "", "module:Class of the weights' network, where it is your own (docs/porting.md)"
    )
    modality: str = opt("", "modality of the items that do not name one, as ct or t1")
    seed: int = opt(0, "of the crops, which are all centred on foreground", low=0)
    cache_dir: str = opt("", "where prepared volumes are kept; else ~/.cache/dae")
    device: DeviceName = opt("auto", "cpu, cuda, or auto")

    def check(self) -> None:
        if self.backbone:
            check_backbone_name(self.backbone)


@dataclass(frozen=True, kw_only=True)
class CkaConfig(FeaturesConfig):
    """similarity of two networks, stage by stage (Table 7)"""

    before: str = opt("", "weights before fine-tuning: any that `dae.weights inspect` reads")
    after: str = opt("", "weights after it; they say how the volumes are prepared and cut")
    crops: int = opt(64, "of all volumes together, which take turns", low=4)
    examples: Examples = opt(
        "crops",
        "what the two networks are compared on: a crop, with all values of a state as its "
        "features, or each position of the state's grid, with its channels",
    )
    minibatch: int = opt(
        32,
        "crops whose features are in memory at once, for --examples crops; where there are more, "
        "the terms of CKA are averaged over minibatches of at least so many",
        low=4,
    )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(FeaturesConfig):
    """one vector a volume"""

    checkpoint: str = opt("", "pre-trained or fine-tuned: any that `dae.weights inspect` reads")
    crops: int = opt(8, "of each volume, whose features are averaged", low=1)


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

    scores: tuple[str, ...] = opt(
        (), "the scores.csv of each, or the folder that holds it; its name is the folder's"
    )
    out: str = opt("", "folder for folds.csv and folds.json; none: print only")
    seed: int = opt(0, "of the bootstrap", low=0)
