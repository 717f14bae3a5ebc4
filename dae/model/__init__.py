"""Backbones: the networks that DAE pre-trains. Each offers three methods and five attributes.

    tokenize(x)            (b, in_channels, D, H, W) -> (b, embed_dim, d, h, w), with d = D / stride
    encode(tokens)         (b, embed_dim, d, h, w) -> list of states; the last is the bottleneck
    decode(states, image)  states, (b, in_channels, D, H, W) -> (b, out_channels, D, H, W)

    stride     voxels of a token along each axis
    divisor    what each side of the input must be a multiple of
    embed_dim  channels of a token, which local masking zeroes
    encoder    the module whose weights tokenize and encode use: what --transfer encoder loads
    head       the last layer: zeroed for `--recon residual`, new for every task

A backbone is built as `Class(in_channels, out_channels, **options)`, with those options of the run
that its constructor names. To put the method on another network, write these and change nothing
else: docs/porting.md.
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
    """The three methods and five attributes as types; the top of this file describes them."""

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
    """The class that --backbone names: a key of BACKBONES, or module:Class.

    The module is an installed one, or a file in the folder where the command runs. Raises
    ValueError on a name that leads to no backbone.
    """
    if name in BACKBONES:
        return BACKBONES[name]

    # Python's path has the folder of the script, but not the one from which it is called.
    working_folder = str(Path.cwd())
    if working_folder not in sys.path:
        sys.path.append(working_folder)

    module_name, _, class_name = name.partition(":")
    try:
        backbone = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--backbone {name}: {error}") from error

    is_module = inspect.isclass(backbone) and issubclass(backbone, nn.Module)
    methods = ("tokenize", "encode", "decode", "forward")
    if not is_module or not all(hasattr(backbone, method) for method in methods):
        raise ValueError(
            f"--backbone {name}: must be an nn.Module class with "
            "tokenize, encode, decode and forward"
        )
    return backbone  # type: ignore[no-any-return]


def check_backbone(network: Any, name: str, crop: Sequence[int]) -> None:
    """Raises ValueError where a network lacks one of the five attributes, or the crop does not fit.

    name: of the network, as --backbone gives it. crop: voxels along d h w.
    """
    attributes = ("stride", "divisor", "embed_dim", "encoder", "head")
    missing = [attribute for attribute in attributes if not hasattr(network, attribute)]
    if missing:
        raise ValueError(
            f"--backbone {name}: the network has no {', '.join(missing)}; see docs/porting.md"
        )
    check_size(crop, network.divisor)


def arguments_of(backbone: type[nn.Module], options: object) -> dict[str, Any]:
    """The arguments of a backbone's constructor for which the run's options have a value."""
    names = inspect.signature(backbone).parameters
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
