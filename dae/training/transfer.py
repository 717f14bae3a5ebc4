"""Weights of pre-training into a network with a new head, with a table of what was taken and what was not.

Nothing is taken silently in part: what should have matched and did not is an error, and that the values of the network
really changed is checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dae.config import InputError, NetworkConfig, asked_for
from dae.config_seg import PredictConfig
from dae.model import BACKBONES, arguments_of, backbone_named


@dataclass
class Report:
    """Names of tensors by what became of them."""

    kept: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)  # one input channel repeated over several
    new: list[str] = field(default_factory=list)  # the network's own, freshly drawn
    dropped: list[str] = field(default_factory=list)  # the checkpoint's, with no place here

    def __str__(self) -> str:
        heads = {name.split(".")[0] for name in self.new}
        return (
            f"{len(self.kept)} tensors kept, {len(self.adapted)} adapted to the channels, {len(self.new)} new "
            f"({', '.join(sorted(heads))}), {len(self.dropped)} dropped"
        )


def backbone_of(plan: Mapping[str, Any], config: NetworkConfig | PredictConfig, path: Path) -> type[nn.Module]:
    """The class of a checkpoint's network. Code is imported where the command line names it, never because a file does.

    Ours come with the checkpoint. Raises InputError where --backbone says another, or the network is not ours and
    --backbone does not name it.
    """
    made, asked = plan["backbone"], config.backbone if asked_for(config, "backbone") else ""
    if asked != made and (asked or made not in BACKBONES):
        remedy = "leave the flag out" if made in BACKBONES else f"name it: --backbone {made}"
        raise InputError(f"{f'--backbone {asked}: ' if asked else ''}{path} was made with {made}; {remedy}")
    try:
        return backbone_named(made)
    except ValueError as error:
        raise InputError(str(error)) from error


def arguments_from(plan: Mapping[str, Any], config: NetworkConfig, path: Path) -> dict[str, Any]:
    """Constructor arguments of the checkpoint's network. Raises InputError where a flag asks for another one."""
    backbone, defaults = backbone_of(plan, config, path), NetworkConfig()
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in plan["arguments"].items()}
    for name, asked in arguments_of(backbone, config).items():
        if asked not in (getattr(defaults, name, None), arguments[name]) and name != "checkpointing":
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {asked}: {path} was made with {arguments[name]}; leave the flag out")
    return arguments | ({"checkpointing": config.checkpointing} if "checkpointing" in arguments else {})


def belongs(name: str, parts: str) -> bool:
    """Whether a tensor is of the encoder, of the decoder, or of either (`both`); the head is of neither."""
    part = "head" if name.startswith("head.") else "encoder" if name.startswith("encoder.") else "decoder"
    return part == parts or (parts == "both" and part != "head")


@torch.no_grad()
def transfer(network: nn.Module, weights: Mapping[str, Tensor], parts: str, path: Path) -> Report:
    """Copy what `parts` (encoder, decoder, both) names. Raises InputError if any of it is missing or does not fit."""
    report, own = Report(), network.state_dict()
    missing = [name for name in own if belongs(name, parts) and name not in weights]
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors of the {parts} are not in it, first {missing[0]}")
    for name, value in own.items():
        if not belongs(name, parts):
            report.new.append(name)
            continue
        given = fit_channels(weights[name], value)
        if given.shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(value.shape)} here"
            raise InputError(f"{path}: {name} does not fit ({shapes})")
        (report.kept if given is weights[name] else report.adapted).append(name)
        value.copy_(given)
    report.dropped = [name for name in weights if name not in own or not belongs(name, parts)]
    return report


def fit_channels(given: Tensor, wanted: Tensor) -> Tensor:
    """A kernel of one input channel, repeated for N at an N-th each: N equal channels give what one gave."""
    n = wanted.shape[1] if wanted.ndim == 5 else 1
    if given.ndim != 5 or given.shape[1] != 1 or n == 1 or given.shape[0] != wanted.shape[0]:
        return given
    return given.expand(-1, n, -1, -1, -1) / n
