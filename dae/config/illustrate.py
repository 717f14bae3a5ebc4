"""Command lines of dae.illustrate: one for each picture of the paper."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dae.config.command_line import DATA_ROOT, Size3, opt
from dae.config.pretrain import PretextConfig
from dae.config.shared import NetworkConfig, check_backbone_name


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """picture"""

    out: str = opt("runs/pictures", "folder that the picture is written into")


@dataclass(frozen=True, kw_only=True)
class CropConfig(PictureConfig):
    """crop"""

    image: tuple[str, ...] = opt((), "an image file, or one for each of its channels")
    modality: str = opt("", "modality of --image, as ct or t1")
    data: str = opt(
        "", "data list (JSON) or nnU-Net raw folder, in place of --image; neither: a phantom"
    )
    data_root: str = opt("", DATA_ROOT)
    case: str = opt(
        "", "which image of the list, by its file's name without .nii.gz; else the first held out"
    )
    crop: Size3 = opt((96, 96, 96), "voxels of the crop along d h w; sec. 3.2", low=1)
    centre: tuple[int, ...] = opt(
        (), "voxel of the crop's centre along d h w; none: the middle of the foreground", low=0
    )
    spacing: tuple[float, ...] = opt((), "resample to these mm along d h w; none: as the file is")
    ct_window: tuple[float, ...] = opt((-1000.0, 1000.0), "HU that become 0 and 1")
    mr_intensity: Literal["zscore", "nonzero", "percentile"] = opt(
        "zscore", "how MR is normalised, as in pre-training"
    )
    grey: tuple[float, ...] = opt(
        (), "normalised values drawn black and white; none: percentiles 1 and 99 of x"
    )
    seed: int = opt(0, "of the noise and the masks, and of weights that are not trained", low=0)

    # Names of the flags that are given; the values of others may come from a checkpoint.
    set_flags: tuple[str, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(CropConfig, NetworkConfig, PretextConfig):
    """Figure 1"""

    checkpoint: str = opt(
        "",
        "of train_pretrain.py: its network, method and options are shown, and x_rec; none: tokens "
        "of a network that is not trained",
    )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """masking, as in pre-training"""

    mask_scope: Literal["sample", "batch", "token"] = opt(
        "sample", "local masking draws a set of channels per sample, per batch or per token"
    )
    mask_along: Literal["channels", "planes"] = opt("channels", "what local masking zeroes, sec. 2")


@dataclass(frozen=True, kw_only=True)
class MaskingConfig(CropConfig, NetworkConfig, MaskConfig):
    """Figure 3"""

    mask_ratio: tuple[float, ...] = opt(
        (0.6,), "r, the share of channels, and of tokens; sec. 3.2", low=0, high=0.99
    )
    mask_block: int = opt(16, "side of the blocks of tokens that are masked, in voxels", low=1)


@dataclass(frozen=True, kw_only=True)
class DisruptionsConfig(CropConfig, NetworkConfig, MaskConfig):
    """Tables 8 to 10"""

    sigmas: tuple[float, ...] = opt((0.05, 0.1, 0.2), "noise levels; Table 8", low=0)
    epsilons: tuple[float, ...] = opt((2.0, 4.0, 8.0), "downsampling factors; Table 9", low=1)
    ratios: tuple[float, ...] = opt(
        (0.4, 0.6, 0.8), "shares of channels masked; Table 10 has 0.4", low=0, high=0.99
    )
    downsample_mode: Literal["trilinear", "nearest", "area"] = opt(
        "trilinear", "interpolation D of eq. 2, both ways"
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructionsConfig(CropConfig):
    """Figure 2"""

    checkpoint: tuple[str, ...] = opt((), "of train_pretrain.py, one for each column")
    names: tuple[str, ...] = opt((), "what to call each of them; none: its folder")
    backbone: str = opt("", "module:Class of their network, where it is your own (docs/porting.md)")

    def check(self) -> None:
        if self.backbone:
            check_backbone_name(self.backbone)


@dataclass(frozen=True, kw_only=True)
class SegmentationsConfig(PictureConfig):
    """Figure 4"""

    predictions: tuple[str, ...] = opt((), "folders of eval.py predict, one for each column")
    names: tuple[str, ...] = opt((), "what to call each of them; none: the folder that it is in")
    data: str = opt("", "data list (JSON) or nnU-Net raw folder, with labels; none: the phantoms")
    data_root: str = opt("", DATA_ROOT)
    case: tuple[str, ...] = opt(
        (), "which cases, by their images' names without .nii.gz; none: the first two"
    )


CONFIGS: dict[str, type[Any]] = {
    "pipeline": PipelineConfig,
    "reconstructions": ReconstructionsConfig,
    "masking": MaskingConfig,
    "segmentations": SegmentationsConfig,
    "disruptions": DisruptionsConfig,
}
