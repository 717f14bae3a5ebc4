"""The plan of weights: how their network is built, and how its input was prepared.

A plan is in every checkpoint: `backbone` and its constructor's `arguments`, the numbers of
channels, the `classes`, and the crop, spacing and intensities of training. One with a `probe` is of
the backbone's encoder and a linear head (dae/model/probe.py).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dae.config.command_line import check_values, value_if_set, was_set, with_tuples
from dae.config.evaluate import FeaturesConfig, PredictConfig
from dae.config.segment import SegConfig
from dae.config.shared import NetworkConfig
from dae.errors import InputError
from dae.model import BACKBONES, arguments_of, backbone_named
from dae.model.probe import Probe

# Options of the data that fine-tuning takes from the weights.
DATA_OPTIONS = ("crop", "spacing", "ct_window", "mr_intensity")


def backbone_of(
    plan: Mapping[str, Any], config: NetworkConfig | PredictConfig | FeaturesConfig, path: Path
) -> type[nn.Module]:
    """The class of a checkpoint's network.

    A backbone of this package is built as the plan says. The code of another one is imported only
    where the command line names it, never because a file does.

    Raises InputError where --backbone names another backbone, or is missing.
    """
    planned = plan["backbone"]
    own = planned in BACKBONES
    named = value_if_set(config, "backbone") or ""

    contradicts = named != "" and named != planned
    unnamed = named == "" and not own
    if contradicts or unnamed:
        prefix = f"--backbone {named}: " if named else ""
        remedy = "leave the flag out" if own else f"name it: --backbone {planned}"
        raise InputError(f"{prefix}{path} was made with {planned}; {remedy}")

    try:
        return backbone_named(planned)
    except ValueError as error:
        raise InputError(str(error)) from error


def network_of_plan(
    plan: Mapping[str, Any], config: PredictConfig | FeaturesConfig, path: Path
) -> nn.Module:
    """The network of a checkpoint, newly drawn. Raises InputError where it cannot be built."""
    backbone = backbone_of(plan, config, path)
    try:
        network = backbone(
            plan["in_channels"], plan["out_channels"], **with_tuples(plan["arguments"])
        )
    except TypeError as error:  # a network of the user's own, changed since
        raise InputError(
            f"{path}: {plan['backbone']} does not take its options any more ({error})"
        ) from error

    if plan.get("probe"):
        return Probe(network, plan["in_channels"], plan["out_channels"])
    return network


def arguments_from(plan: Mapping[str, Any], config: NetworkConfig, path: Path) -> dict[str, Any]:
    """Constructor arguments of the weights' network. Raises InputError where a flag differs."""
    backbone = backbone_of(plan, config, path)
    arguments = with_tuples(plan["arguments"])

    for name, value in arguments_of(backbone, config).items():
        if name == "checkpointing" or not was_set(config, name):
            continue
        planned = arguments.get(name, value)
        if value != planned:
            raise InputError(
                f"{flag(name, value)}: {path} was made with {planned}; leave the flag out"
            )

    # Checkpointing is no property of the weights: it trades memory for time.
    if "checkpointing" in arguments:
        arguments["checkpointing"] = config.checkpointing
    return arguments


def with_plan(config: SegConfig, plan: Mapping[str, Any], path: Path) -> SegConfig:
    """The configuration with the network, crop, spacing and intensities of the weights.

    For crop, spacing and intensities, presets and flags go before the plan.
    Raises InputError where one of them asks for another network.
    """
    network = {"backbone": plan["backbone"], **arguments_from(plan, config, path)}
    changes = {name: value for name, value in network.items() if hasattr(config, name)}
    for name in DATA_OPTIONS:
        if name in plan and not was_set(config, name):
            changes[name] = plan[name]

    config = replace(config, **with_tuples(changes))
    check_values(config)
    return config


def check_same_network(plan: Mapping[str, Any], config: NetworkConfig, path: Path) -> None:
    """Raises InputError, with the flags to add, where the weights are of another network."""
    backbone = backbone_named(config.backbone)
    own = {"backbone": config.backbone, **arguments_of(backbone, config)}
    planned = {"backbone": plan["backbone"], **plan["arguments"]}

    flags = []
    for name, value in planned.items():
        as_json = json.loads(json.dumps(own.get(name)))  # a plan has lists in place of tuples
        if name != "checkpointing" and as_json != value:
            flags.append(flag(name, value))
    if flags:
        raise InputError(f"--init {path}: its network is another; add {' '.join(flags)}")


def flag(name: str, value: Any) -> str:
    """An option as on a command line: ("merge_order", "all") -> "--merge-order all"."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return f"--{dashed} {value}"
