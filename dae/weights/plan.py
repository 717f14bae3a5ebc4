"""The plan of weights: how their network is built and fed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dae.config.command_line import check_values, was_set, with_tuples
from dae.config.evaluate import PredictConfig
from dae.config.segment import SegConfig
from dae.config.shared import NetworkConfig
from dae.errors import InputError
from dae.model import BACKBONES, arguments_of, backbone_named

PLANNED = (
    "crop",
    "spacing",
    "ct_window",
    "mr_intensity",
)  # of a run, what its weights were trained with


def backbone_of(
    plan: Mapping[str, Any], config: NetworkConfig | PredictConfig, path: Path
) -> type[nn.Module]:
    """The class of a checkpoint's network. Code is imported where the command line names it, never because a file does.

    Ours come with the checkpoint. Raises InputError where --backbone says another, or the network is not ours and
    --backbone does not name it.
    """
    made, asked = plan["backbone"], config.backbone if was_set(config, "backbone") else ""
    if asked != made and (asked or made not in BACKBONES):
        remedy = "leave the flag out" if made in BACKBONES else f"name it: --backbone {made}"
        raise InputError(
            f"{f'--backbone {asked}: ' if asked else ''}{path} was made with {made}; {remedy}"
        )
    try:
        return backbone_named(made)
    except ValueError as error:
        raise InputError(str(error)) from error


def arguments_from(plan: Mapping[str, Any], config: NetworkConfig, path: Path) -> dict[str, Any]:
    """Constructor arguments of the weights' network. Raises InputError where a flag asks for another one."""
    arguments = with_tuples(plan["arguments"])
    for name, asked in arguments_of(backbone_of(plan, config, path), config).items():
        if (
            was_set(config, name)
            and asked != (made := arguments.get(name, asked))
            and name != "checkpointing"
        ):
            raise InputError(
                f"{flag(name, asked)}: {path} was made with {made}; leave the flag out"
            )
    return arguments | (
        {"checkpointing": config.checkpointing} if "checkpointing" in arguments else {}
    )


def with_plan(config: SegConfig, plan: Mapping[str, Any], path: Path) -> SegConfig:
    """The configuration with the network of the weights, and with their crop, spacing and intensities where no preset
    and no flag says otherwise. Raises InputError where one asks for another network.
    """
    network = {"backbone": plan["backbone"], **arguments_from(plan, config, path)}
    fed = {name: plan[name] for name in PLANNED if name in plan and not was_set(config, name)}
    config = replace(
        config, **with_tuples({**{k: v for k, v in network.items() if hasattr(config, k)}, **fed})
    )
    check_values(config)
    return config


def check_same_network(plan: Mapping[str, Any], config: NetworkConfig, path: Path) -> None:
    """Raises InputError, with the flags to add, where the weights were made with another network than the run's."""
    own = {"backbone": config.backbone, **arguments_of(backbone_named(config.backbone), config)}
    theirs = {"backbone": plan["backbone"], **plan["arguments"]}
    flags = [
        flag(name, value)
        for name, value in theirs.items()
        if json.loads(json.dumps(own.get(name))) != value
    ]
    if flags := [each for each in flags if "checkpointing" not in each]:
        raise InputError(f"--init {path}: its network is another; add {' '.join(flags)}")


def flag(name: str, value: Any) -> str:
    """An option as it stands on a command line."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
