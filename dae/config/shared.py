"""Options that pre-training and fine-tuning have in common."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dae.config.command_line import DATA_ROOT, Size3, opt, to_json
from dae.errors import InputError

BackboneName = Literal["swin_unetr", "unet", "vit_unetr"]
BACKBONE_NAMES = get_args(BackboneName)

Amp = Literal["auto", "bf16", "fp16", "off"]
DeviceName = Literal["auto", "cpu", "cuda"]


# What a training step that does not fit into memory is told.
NEEDS_LESS = (
    "take --checkpointing, a smaller --batch-size with more --accumulate, or a smaller --crop"
)


def check_backbone_name(name: str) -> None:
    """Raises InputError where the backbone is neither one of ours nor module:Class."""
    if name in BACKBONE_NAMES:
        return
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        names = ", ".join(BACKBONE_NAMES)
        raise InputError(f"--backbone {name}: take {names}, or your own as module:Class")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """network"""

    backbone: str = opt(
        "swin_unetr",
        f"{', '.join(BACKBONE_NAMES)}, or your own as module:Class from the folder where "
        "the command runs (docs/porting.md); sec. 2, 'Network and Training'",
    )
    feature_size: int = opt(
        48, "channels of a token; vit: of the decoder at full resolution", low=1
    )
    depths: tuple[int, ...] = opt(
        (2, 2, 2, 2), "blocks of each stage; 2 to 4 stages, unet: 2 to 7", low=1
    )
    heads: tuple[int, ...] = opt((3, 6, 12, 24), "attention heads of each stage", low=1)
    window: Size3 = opt((7, 7, 7), "tokens of an attention window along d h w", low=1)
    stem: Literal["patch", "conv"] = opt(
        "patch", "2x2x2 patches, or the authors' two 3x3x3 convolutions"
    )
    merge_order: Literal["all", "monai", "legacy"] = opt("all", "octants that patch merging reads")
    clipped_bias: Literal["rebuilt", "sliced"] = opt(
        "rebuilt", "position bias of a window that the grid clips"
    )
    normalize_hidden: bool = opt(True, "layer norm on the states that go to the decoder")
    stage_conv: bool = opt(False, "a residual convolution before each stage (SwinUNETR-V2)")
    vit_channels: int = opt(
        768, "vit: channels of a token; a multiple of 6 and of the heads", low=1
    )
    vit_depth: int = opt(12, "vit: blocks of the transformer", low=1)
    vit_heads: int = opt(12, "vit: attention heads of each block", low=1)
    vit_patch: int = opt(16, "vit: voxels of a patch along each axis, 8 or 16", low=1)
    checkpointing: bool = opt(
        False, "recompute the blocks in the backward pass: less memory, more time"
    )

    def check(self) -> None:
        check_backbone_name(self.backbone)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """data"""

    data: str = opt("", "data list (JSON), or an nnU-Net raw folder")
    data_root: str = opt("", DATA_ROOT)
    modality: str = opt("", "modality of the items that do not name one, as ct or t1")
    fold: int = opt(0, "held-out fold, where the list has folds and no validation", low=0)
    split_seed: int = opt(
        0,
        "seed of the 5 %% of subjects held out, where the list has neither folds nor validation",
        low=0,
    )
    allow_trained: bool = opt(
        False,
        "validate on images or subjects that are trained on too: to see whether a network "
        "learns them by heart",
    )
    crop: Size3 = opt((96, 96, 96), "voxels of a crop along d h w; sec. 3.2", low=1)
    spacing: tuple[float, ...] = opt((), "resample to these mm along d h w; none: as the files are")
    ct_window: tuple[float, ...] = opt((-1000.0, 1000.0), "HU that become 0 and 1")
    mr_intensity: Literal["zscore", "nonzero", "percentile"] = opt(
        "zscore",
        "MR: z-score by the nonzero voxels; nonzero: zeros stay 0, as in the authors' "
        "code; percentile: 0.05 and 99.95 to [0, 1]",
    )
    cache_dir: str = opt(
        "", "where prepared volumes are kept, shared by all ranks and runs; else ~/.cache/dae"
    )
    workers: int = opt(2, "processes that read ahead, per rank", low=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """optimisation"""

    steps: int = opt(20_000, "optimiser steps; sec. 3.2", low=1)
    batch_size: int = opt(2, "samples per rank and micro-batch; sec. 3.2", low=1)
    accumulate: int = opt(
        1, "micro-batches per step; CMCL sees one micro-batch over all ranks", low=1
    )
    lr: float = opt(4e-4, "peak learning rate of AdamW; sec. 3.2", low=0)
    lr_min: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    weight_decay: float = opt(
        1e-5, "of matrices and kernels, not of norms, biases and bias tables; sec. 3.2", low=0
    )
    warmup: int = opt(500, "steps of linear warm-up; sec. 3.2; at most a tenth of --steps", low=0)
    clip: float = opt(1.0, "largest norm of the gradient; 0 turns it off", low=0)
    amp: Amp = opt("auto", "autocast; auto: bf16 where the device is fast at it, else off")
    tf32: bool = opt(
        False, "float32 products on a GPU with 10 bits of mantissa, for --amp off: faster"
    )
    seed: int = opt(0, "seed of the weights and of every sample", low=0)

    def check(self) -> None:
        """Raises InputError where the learning rate would climb."""
        if self.lr_min > self.lr:
            raise InputError(
                f"--lr-min {self.lr_min:g}: above --lr {self.lr:g}, so the rate would climb"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """run"""

    preset: str = opt(
        "", "paper: the text; official: the authors' code; demo: phantoms on a CPU, in minutes"
    )
    out: str = opt(
        "runs/pretrain", "run folder: config.json, log.jsonl, last.pt, best.pt, figures/"
    )
    resume: bool = opt(False, "continue the run in --out, or start it where there is none yet")
    stop_after: int = opt(
        0,
        "save and stop after this step; --resume without this flag goes on; 0: run to --steps",
        low=0,
    )
    log_every: int = opt(10, "steps between train events in log.jsonl", low=1)
    validate_every: int = opt(0, "steps between validations; 0: a tenth of --steps", low=0)
    save_every: int = opt(0, "steps between checkpoints; 0: a tenth of --steps, at most 500", low=0)
    keep_every: int = opt(0, "also keep step-N.pt every so many steps; 0: none", low=0)
    device: DeviceName = opt("auto", "cpu, cuda, or auto")
    compile: bool = opt(False, "torch.compile the network: minutes at the start, faster steps")
    dry_run: bool = opt(False, "print the resolved configuration and stop")

    # Names that a flag has set; it has no flag of its own. See command_line.py, was_set.
    set_flags: tuple[str, ...] = field(default=(), compare=False, repr=False)


# What may differ between a run and its resumption, since no weight depends on it but for its last
# bits. The product of --batch-size, --accumulate and ranks must not change: see
# training/resume.py, check_same_batch.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "resume",
        "stop_after",
        "log_every",
        "validate_every",
        "save_every",
        "keep_every",
        "workers",
        "cache_dir",
        "dry_run",
        "data",
        "data_root",
        "preset",
        "allow_trained",
        "batch_size",
        "accumulate",
        "checkpointing",
        "compile",
        "device",
        "validate_crops",
    }
)


def differences(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Flags whose value is not the saved one, of those that a resumed run may not change.

    saved: the configuration as a checkpoint holds it. An older version may not have known a flag;
    then its run was at the flag's default.
    """
    now = _as_saved(config)
    defaults = _as_saved(type(config)())
    fixed = [name for name in now if name not in FREE_ON_RESUME]
    return [name for name in fixed if now[name] != saved.get(name, defaults[name])]


def _as_saved(config: RunConfig) -> dict[str, Any]:
    """With the types that come back from a JSON file."""
    values: dict[str, Any] = json.loads(json.dumps(to_json(config)))
    return values
