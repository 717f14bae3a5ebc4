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

import torch
from torch import Tensor, nn

from dae.config.command_line import check_values, value_if_set, was_set, with_tuples
from dae.config.evaluate import FeaturesConfig, PredictConfig
from dae.config.segment import SegConfig
from dae.config.shared import NetworkConfig
from dae.data.listfile import check_name
from dae.data.regions import regions_of
from dae.errors import InputError, one_line
from dae.model import BACKBONES, arguments_of, backbone_named
from dae.model.probe import Probe
from dae.weights import checkpoint

# What a plan must have, and what it may have: name -> kind of its value.
REQUIRED = {
    "backbone": str,
    "arguments": dict,
    "in_channels": int,
    "out_channels": int,
    "classes": dict,
}
OPTIONAL = {
    "regions": dict,
    "regions_class_order": list,
    "method": str,
    "crop": list,
    "spacing": list,
    "modalities": list,
    "intensity": dict,
    "ct_window": list,
    "mr_intensity": str,
    "seen": dict,
    "pretrained_on": dict,
}
LARGEST = 1 << 16  # of the whole numbers of a plan: channels, voxels, blocks

# Options of the data that fine-tuning takes from the weights.
DATA_OPTIONS = ("crop", "spacing", "ct_window", "mr_intensity")


# --- is it a plan, of these weights?


def load_planned(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint of this package, as `checkpoint.load` gives it: its plan is that of its weights.

    Raises InputError where it has none, or another.
    """
    state = checkpoint.load(path, mapped=mapped)
    check_state(state, path)
    return state


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where a checkpoint is not what this package saves.

    A seal says nothing of who wrote a file.
    """
    plan = state.get("plan")
    weights = state.get("model")
    if not isinstance(plan, dict) or not isinstance(weights, dict):
        raise InputError(f"{path}: has no weights with a plan of their network; name another file")

    for name, kind in {"config": dict, "step": int, "global_batch": int, "threads": int}.items():
        if name in state and not isinstance(state[name], kind):
            raise InputError(f'{path}: "{name}" of its run is not of type {kind.__name__}')
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: its weights hold what is no tensor; name another file")
    check_plan(plan, weights, path)


def check_plan(plan: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError where a plan is none, or its network has not the shapes of these weights.

    So no network is built that is larger than the file.
    """
    for name, kind in {**REQUIRED, **OPTIONAL}.items():
        missing = name in REQUIRED and name not in plan
        if missing or not isinstance(plan.get(name, kind()), kind):
            raise InputError(f'{path}: "{name}" of its plan is not of type {kind.__name__}')
    for label, name in plan["classes"].items():
        if not isinstance(label, str) or not isinstance(name, str) or not label.isdecimal():
            raise InputError(f'{path}: "classes" of its plan are not names of labels')
        check_name(name, f"{path}: the class")
    check_regions(plan, path)
    check_options(plan, path)
    check_flips(plan, path)
    check_seen(plan, path)

    # A network of the user's own may take any arguments; only --backbone has it built.
    backbone = BACKBONES.get(plan["backbone"])
    if backbone is None:
        return
    check_numbers(plan, weights, path)
    try:
        shapes = shapes_of(backbone, plan)
    except Exception as error:  # a constructor raises anything for arguments that are not its own
        raise InputError(
            f"{path}: its plan is of no {plan['backbone']} ({type(error).__name__}: "
            f"{one_line(error)})"
        ) from error
    for name, value in weights.items():
        if name in shapes and value.shape != shapes[name]:
            raise InputError(
                f"{path}: {name} is {tuple(value.shape)}, its network has {tuple(shapes[name])}"
            )
    if not any(name in shapes for name in weights):
        raise InputError(f"{path}: has no tensor of the {plan['backbone']} that its plan names")


def check_regions(plan: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where regions are none that a list may have, or not of this network."""
    named = plan.get("regions", {})
    if not named:
        return
    for name, labels in named.items():
        if not isinstance(name, str) or not isinstance(labels, list):
            raise InputError(f'{path}: "regions" of its plan are not lists of labels by name')
        check_name(name, f"{path}: the region")

    regions = regions_of(list(named.items()), plan.get("regions_class_order", []), path)
    labels = {0}.union(*(region.labels for region in regions))
    if labels != {int(label) for label in plan["classes"]}:
        raise InputError(f'{path}: "regions" and "classes" of its plan have not the same labels')
    if len(regions) != plan["out_channels"]:
        raise InputError(
            f"{path}: its plan has {len(regions)} regions and {plan['out_channels']} outputs"
        )


def check_options(plan: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where the data cannot be prepared as a plan says."""
    modalities = plan.get("modalities", [])
    if not all(isinstance(name, str) for name in modalities):
        raise InputError(f'{path}: "modalities" of its plan are not names')
    for name, intensities in plan.get("intensity", {}).items():
        for text in (name, *as_list(intensities)):
            if not isinstance(text, str):
                raise InputError(f'{path}: "intensity" of its plan is no object of names')

    for name, lengths in (("crop", (0, 3)), ("spacing", (0, 3)), ("ct_window", (0, 2))):
        numbers = plan.get(name, [])
        if len(numbers) not in lengths or not all(map(is_number, numbers)):
            raise InputError(f'{path}: "{name}" of its plan are not {lengths[1]} numbers')


def check_flips(plan: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where axes are none of d h w, or labels that change places are no pairs."""
    for name in ("flip_axes", "swap_axes"):
        axes = plan.get(name, ())
        if not isinstance(axes, list | tuple) or not all(axis in (0, 1, 2) for axis in axes):
            raise InputError(f'{path}: "{name}" of its plan are not axes')
    swap = plan.get("swap", ())
    if not isinstance(swap, list | tuple) or not all(map(is_pair, swap)):
        raise InputError(f'{path}: "swap" of its plan are not pairs of labels')


def is_pair(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(type(label) is int for label in value)


def check_seen(plan: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where the hashes of subjects and voxels are not lists of texts."""
    for record in (plan.get("seen", {}), plan.get("pretrained_on", {})):
        for name in ("trained", "held_out", "voxels", "subjects"):
            hashes = record.get(name, [])
            if not isinstance(hashes, list) or not all(isinstance(text, str) for text in hashes):
                raise InputError(f'{path}: "{name}" of its plan is no list of hashes')
        for name in ("fold", "split_seed"):
            if type(record.get(name, 0)) is not int:
                raise InputError(f'{path}: "{name}" of its plan is no whole number')


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def check_numbers(plan: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError for a number that no network of these weights has.

    A network that is drawn has a module for each block: a file says how many by its tensors.
    """
    numbers = {"in_channels": plan["in_channels"], "out_channels": plan["out_channels"]}
    for name, value in {**plan["arguments"], **numbers}.items():
        most = len(weights) if "depth" in str(name) else LARGEST
        values = as_list(value)
        if len(values) > 64:
            raise InputError(f'{path}: "{name}" of its plan has {len(values)} values')
        for number in values:
            if isinstance(number, int | float) and not 0 <= number <= most:
                raise InputError(f'{path}: "{name}" of its plan is {number}; at most {most}')


def shapes_of(backbone: type[nn.Module], plan: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shapes of a plan's network, which is built without values."""
    # Nothing is drawn, but a constructor of timm may ask for random numbers.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network: nn.Module = backbone(
            plan["in_channels"], plan["out_channels"], **with_tuples(plan["arguments"])
        )
        if plan.get("probe"):
            network = Probe(network, plan["in_channels"], plan["out_channels"])
    return {name: value.shape for name, value in network.state_dict().items()}


# --- the network of a plan


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


def about_intensities(plan: Mapping[str, Any]) -> list[str]:
    """A warning, where an encoder that is fed the intensities as prepared has not seen such."""
    if plan.get("recon") != "scaled":
        return []
    warning = (
        "warning: the weights were pre-trained with --recon scaled, on crops at mean 0 and std 1; "
        "they are fed the intensities as prepared, which they have not seen"
    )
    return [warning]
