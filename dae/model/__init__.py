"""Backbones: what DAE pre-trains. Each offers three methods and five facts, and nothing else is asked of it.

    tokenize(x)            (b, in_channels, D, H, W) -> (b, embed_dim, d, h, w), with d = D / stride
    encode(tokens)         (b, embed_dim, d, h, w) -> list of states, the last one the bottleneck (b, c, ...)
    decode(states, image)  states, (b, in_channels, D, H, W) -> (b, out_channels, D, H, W)

    stride     voxels of a token along each axis
    divisor    what each side of the input must be a multiple of
    embed_dim  channels of a token, which local masking zeroes
    encoder    the module whose weights tokenize and encode use: what a transfer of the encoder takes
    head       the last layer: zeroed for `--recon residual`, new for every task

It is built as `Class(in_channels, out_channels, **options)`, with those of the run's options that its constructor
names. A reader who wants the method on another network writes these and changes nothing else: docs/porting.md.
"""

import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dae.model.conv import check_size
from dae.model.unet import UNet
from dae.model.unetr import MONAI, SwinUNETR
from dae.model.vit import ViTUNETR

__all__ = [
    "BACKBONES",
    "MONAI",
    "Backbone",
    "SwinUNETR",
    "UNet",
    "ViTUNETR",
    "arguments_of",
    "backbone_named",
    "check_backbone",
    "check_size",
]


@runtime_checkable
class Backbone(Protocol):
    stride: int
    divisor: int
    embed_dim: int
    encoder: Any
    head: Any

    def tokenize(self, x: Tensor) -> Tensor: ...
    def encode(self, tokens: Tensor) -> list[Tensor]: ...
    def decode(self, states: Sequence[Tensor], image: Tensor) -> Tensor: ...


BACKBONES: dict[str, type[nn.Module]] = {
    "swin_unetr": SwinUNETR,
    "unet": UNet,
    "vit_unetr": ViTUNETR,
}


def backbone_named(name: str) -> type[nn.Module]:
    """The class that --backbone names: ours, or module:Class from the folder where the command runs, or installed.

    Raises ValueError on a name that leads to no backbone.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    module, _, cls = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(
            str(Path.cwd())
        )  # a script's own folder is there, the one it is called from is not
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--backbone {name}: {error}") from error
    methods = all(hasattr(found, method) for method in ("tokenize", "encode", "decode", "forward"))
    if not (methods and inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(
            f"--backbone {name}: must be an nn.Module class with tokenize, encode, decode and forward"
        )
    return found


def check_backbone(network: Any, name: str, crop: Sequence[int]) -> None:
    """Raises ValueError where a network that --backbone named lacks one of the five facts, or the crop does not fit."""
    facts = ("stride", "divisor", "embed_dim", "encoder", "head")
    if lacking := [fact for fact in facts if not hasattr(network, fact)]:
        raise ValueError(
            f"--backbone {name}: the network has no {', '.join(lacking)}; see docs/porting.md"
        )
    check_size(crop, network.divisor)


def arguments_of(backbone: type[nn.Module], options: object) -> dict[str, Any]:
    """The keyword arguments of a backbone's constructor that the run's options have a value for."""
    names = inspect.signature(backbone).parameters
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
