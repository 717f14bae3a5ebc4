"""Command line of train_pretrain.py."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dae.config.command_line import Presets, opt
from dae.config.shared import DataConfig, NetworkConfig, OptimConfig, RunConfig

Method = Literal[
    "dae",
    "noise",
    "downsample",
    "local_mask",
    "mae",
    "scratch",
    "contrastive",
    "rotation",
    "swin_unetr",
    "smit",
]


@dataclass(frozen=True, kw_only=True)
class PretextConfig:
    """disruption and losses"""

    method: Method = opt(
        "dae",
        "dae: noise, downsampling, local masking; noise, downsample, local_mask, mae: rows of "
        "Table 5; contrastive, rotation, swin_unetr, mae: rows of Table 4, the first three without "
        "CMCL; scratch: untrained weights, no step is taken; Table 4 and sec. 3.3; smit: a row "
        "beyond the paper, masking with self-distillation (Jiang et al. 2022), without CMCL",
    )
    noise_mean: float = opt(0.0, "mu of eq. 1")
    noise_std: float = opt(
        0.1, "sigma of eq. 1, a standard deviation; sec. 3.2 (App. G calls it a variance)", low=0
    )
    downsample_factor: float = opt(4.0, "epsilon of eq. 2; sec. 3.2", low=1)
    downsample_mode: Literal["trilinear", "nearest", "area"] = opt(
        "trilinear", "interpolation D of eq. 2, both ways; the authors' code: nearest"
    )
    order: Literal["chain", "sum"] = opt(
        "chain", "chain: noise, then down and up; sum: D(x) + noise (sec. 2, 'add the two')"
    )
    mask_ratio: tuple[float, ...] = opt(
        (0.6,),
        "r, share of channels (mae, smit: of tokens) masked; two numbers: drawn "
        "between them; sec. 3.2 (App. G.3: 0.4 alone)",
        low=0,
        high=0.99,
    )
    mask_scope: Literal["sample", "batch", "token"] = opt(
        "sample", "local masking draws a set of channels per sample, per batch or per token"
    )
    mask_along: Literal["channels", "planes"] = opt(
        "channels", "what local masking zeroes, sec. 2; planes: what the authors' layout bug zeroes"
    )
    mask_block: int = opt(
        16, "side of the masked blocks of mae and smit, and of swin_unetr's cut-outs, voxels", low=1
    )
    recon: Literal["plain", "scaled", "output", "residual"] = opt(
        "plain",
        "x_rec is the output as it is (sec. 2); rescaled by x_hat's mean and std, which also "
        "standardise the input (scaled) or do not (output); or added to x_hat (residual)",
    )
    skip: Literal["auto", "input", "zeros"] = opt(
        "auto",
        "what the skip at full resolution sees; auto: x_hat, or zeros where x_hat is the target",
    )
    l1_units: Literal["auto", "raw", "crop"] = opt(
        "auto", "L1 trains in raw intensities or in units of the crop's std; auto: raw for plain"
    )
    alpha: float = opt(
        0.05,
        "weight of CMCL, eq. 4; 0 takes it out of the loss; contrastive, rotation, swin_unetr and "
        "smit have none; sec. 2",
        low=0,
    )
    cmcl: Literal["bce", "softmax", "ranks"] = opt(
        "bce",
        "binary cross-entropy on the label matrix (eq. 3-4), softmax over positives, or class "
        "ranks as columns (the authors' code)",
    )
    temperature: float = opt(
        0.07, "t of eq. 3: similarities times exp(t); for softmax divided by t; sec. 2"
    )
    z: Literal["pooled", "flat"] = opt(
        "pooled",
        "feature of eq. 3: bottleneck, mean over space, L2-normalised; flat: the authors' code",
    )
    nt_xent_temperature: float = opt(
        0.5,
        "temperature of contrastive and swin_unetr, which divides; 0.5 as in Tang et al. 2022; "
        "Table 4",
        low=0.001,
    )
    rotations: Literal["axial", "all"] = opt(
        "axial",
        "turns by 90 degrees of rotation and swin_unetr: 4 classes about the long axis of the body "
        "(Tang et al. 2022), or 10 about all three (Taleb et al. 2020); Table 4",
    )
    cutout_ratio: float = opt(
        0.3,
        "share of the voxels that swin_unetr cuts out; Tang et al. 2022; Table 4",
        low=0,
        high=0.9,
    )
    distil_weight: float = opt(
        0.1,
        "weight of each of smit's two distillations; its L1 has 1; of our choice, so that the "
        "three are of one size; beyond the paper",
        low=0,
    )
    distil_momentum: float = opt(
        0.996,
        "momentum of smit's teacher in the first step, which goes to 1 along a cosine; Caron et "
        "al. 2021; beyond the paper",
        low=0,
        high=1,
    )
    distil_temperature: float = opt(
        0.04,
        "temperature that sharpens smit's teacher; the student has 0.1; Caron et al. 2021; beyond "
        "the paper",
        low=0.001,
    )


# The defaults are the numbers of the paper's text.
PAPER: dict[str, Any] = {}

# What the authors' code does otherwise: docs/paper-vs-code.md.
OFFICIAL: dict[str, Any] = {
    "noise_std": 0.1**0.5,
    "mask_ratio": (28 / 48,),
    "downsample_mode": "nearest",
    "mask_scope": "batch",
    "mask_along": "planes",
    "mr_intensity": "nonzero",
    "skip": "input",
    "alpha": 0.03,
    "temperature": 0.5,
    "cmcl": "ranks",
    "z": "flat",
    "stem": "conv",
    "merge_order": "legacy",
    "clipped_bias": "sliced",
    "normalize_hidden": False,
    "steps": 595_000,
    "lr": 1e-4,
    "lr_min": 1e-5,
    "weight_decay": 0.05,
    "warmup": 2_380,
    "amp": "off",
}

# Phantoms, a small network and few steps: minutes on two CPU cores.
DEMO: dict[str, Any] = {
    "out": "runs/demo",
    "crop": (48, 48, 48),
    "feature_size": 16,
    "depths": (2, 2, 2),
    "heads": (2, 4, 8),
    "window": (4, 4, 4),
    "recon": "residual",
    "foreground": 0.5,
    "ct_window": (-300.0, 500.0),
    "steps": 250,
    "warmup": 20,
    "lr": 3e-3,
    "amp": "off",
    "validate_every": 50,
    "workers": 1,
    "device": "cpu",
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig, OptimConfig, NetworkConfig, PretextConfig, DataConfig):
    """pre-training"""

    init: str = opt(
        "", "start from these weights (continued pre-training): any that dae.weights reads, whole"
    )
    foreground: float = opt(
        0.0, "share of the crops that are centred on foreground; else anywhere", low=0, high=1
    )
    validate_crops: int = opt(
        16, "fixed crops to validate on, spread over the held-out volumes", low=1
    )
    channels: Literal["together", "apart"] = opt(
        "together", "all of an image are seen at once, or each apart, as a volume of its own"
    )

    presets: ClassVar[Presets] = {"paper": PAPER, "official": OFFICIAL, "demo": DEMO}
