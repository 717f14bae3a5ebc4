"""Backbones: what DAE pre-trains. Each offers three methods and four facts, and nothing else is asked of it.

    tokenize(x)            (b, in_channels, D, H, W) -> (b, embed_dim, d, h, w), with d = D / stride
    encode(tokens)         (b, embed_dim, d, h, w) -> list of states, the last one the bottleneck (b, c, ...)
    decode(states, image)  states, (b, in_channels, D, H, W) -> (b, out_channels, D, H, W)

    stride     voxels of a token along each axis
    divisor    what each side of the input must be a multiple of
    embed_dim  channels of a token, which local masking zeroes
    head       the last layer: zeroed for `--recon residual`, new for every task

A reader who wants the method on another network writes these and changes nothing else.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dae.model.unetr import MONAI, SwinUNETR

__all__ = ["BACKBONES", "MONAI", "Backbone", "SwinUNETR"]


@runtime_checkable
class Backbone(Protocol):
    stride: int
    divisor: int
    embed_dim: int
    head: Any

    def tokenize(self, x: Tensor) -> Tensor: ...
    def encode(self, tokens: Tensor) -> list[Tensor]: ...
    def decode(self, states: Sequence[Tensor], image: Tensor) -> Tensor: ...


BACKBONES: dict[str, type[nn.Module]] = {"swin_unetr": SwinUNETR}


def arguments_of(backbone: type[nn.Module], options: object) -> dict[str, Any]:
    """The keyword arguments of a backbone's constructor that the run's options have a value for."""
    names = inspect.signature(backbone).parameters
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
