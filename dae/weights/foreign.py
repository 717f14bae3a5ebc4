"""Files of weights: what one is, its tensors by our names, and the plan of how its network is built and fed.

Nothing is read in part: a file that lacks a tensor of its network, or has one that is strange or misshapen, is refused.
Nothing but tensors, numbers, texts and containers of them is unpickled.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dae.config.command_line import was_set
from dae.config.shared import NetworkConfig
from dae.errors import InputError
from dae.model import SwinUNETR, arguments_of
from dae.weights import checkpoint
from dae.weights.layouts import (
    LAYOUTS,
    OWN_STEM,
    STEM,
    Recognised,
    first_match,
    options_of,
    reads_twice,
    recognise,
    reorder,
    to_monai,
)
from dae.weights.plan import flag
from dae.weights.transfer import part_of

QUIRKS: dict[str, Any] = {"merge_order": "all", "clipped_bias": "rebuilt", "normalize_hidden": True}


class Weights(NamedTuple):
    """A file's tensors by our names, and what a user of them needs to know."""

    tensors: dict[str, Tensor]
    plan: dict[
        str, Any
    ]  # as in our checkpoints: backbone, arguments, in_channels, ..., and what is known of the rest
    notes: Sequence[str]  # what the file is and how it was read, a line each
    extra: Sequence[str] = ()  # what it carries along that no network here has


def read(path: Path, asked: Mapping[str, Any] | None = None) -> Weights:
    """Any file of weights, on the CPU. Raises InputError, one line, on all that the head of this file says.

    asked: values of QUIRKS that hold for a file of others, whose tensors do not show them, in place of what is known.
    """
    asked = asked or {}
    if checkpoint.has_seal(path):
        return of_ours(checkpoint.load(path), asked, path)
    content = load_tensors(path)
    if "plan" in content and "format" in content:
        raise InputError(
            f"{path}: a checkpoint of this package without its checksum: damaged; copy it again"
        )
    key, tensors = state_dict_in(content)
    if not tensors:
        raise InputError(
            f"{path}: holds no tensors ({', '.join(map(str, list(content)[:6])) or 'it is empty'})"
        )
    if empty := [name for name, value in tensors.items() if value.is_meta]:
        raise InputError(
            f"{path}: {empty[0]} has a shape and no values; save the network from a device that has them"
        )
    try:
        found = recognise(tensors)
        options, how = quirks_of(found, asked)
        plan = plan_of(found, options)
        check_complete(found, plan)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    layout = LAYOUTS[found.layout]
    notes = [layout.what + (f", under {key}" if key else ""), how]
    if layout.warning:
        notes.append(f"warning: {layout.warning}")
    return Weights(found.tensors, plan, notes, found.extra)


def of_ours(saved: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> Weights:
    """A checkpoint of this package, perhaps converted from a file of others. Raises InputError on a contradiction."""
    plan = saved["plan"]
    for name, value in asked.items():
        if value != plan["arguments"].get(name, value):
            raise InputError(
                f"{flag(name, value)}: {path} was made with {plan['arguments'][name]}; leave the flag out"
            )
    layout = LAYOUTS.get(plan["method"])
    warnings = [f"warning: {layout.warning}"] if layout and layout.warning else []
    step = f", step {saved['step']} of {saved['config']['steps']}" if "step" in saved else ""
    return Weights(
        saved["model"], plan, [f"a checkpoint of this package ({plan['method']}{step})", *warnings]
    )


def state_dict_in(content: Mapping[Any, Any], key: str = "") -> tuple[str, dict[str, Tensor]]:
    """The tensors of a network, however deep they lie, and where: ("state_dict", {...}); else the first there are."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if first_match(STEM, tensors) or first_match(OWN_STEM, tensors):
        return key, tensors
    inner = [
        state_dict_in(value, f"{key}.{name}".lstrip("."))
        for name, value in content.items()
        if isinstance(value, dict)
    ]
    networks = [(k, t) for k, t in inner if first_match(STEM, t) or first_match(OWN_STEM, t)]
    return next(
        iter(networks),
        (key, tensors) if tensors else next((each for each in inner if each[1]), (key, {})),
    )


def load_tensors(path: Path) -> dict[str, Any]:
    """What torch.save wrote, if it is tensors, numbers, texts and containers of them. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with torch.serialization.safe_globals(numpy_numbers()):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has a dozen kinds of error for what it cannot read
            raise InputError(f"{path}: {why_refused(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def numpy_numbers() -> list[Any]:
    """What a pickled np.float64 is made by: training scripts save their best score as one beside the weights."""
    scalar = np.float64().__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDGSU"}
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds, codecs.encode]


def why_refused(error: Exception) -> str:
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"holds {named[1]}, which is code and not a tensor, and is not loaded; where you trust the file, "
            "torch.load it with weights_only=False and save its state dict alone"
        )
    why = " ".join(str(error).rpartition("error: ")[2].split())
    return f"not a whole file that torch.save has written ({why[:80] or type(error).__name__})"


def quirks_of(found: Recognised, asked: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Options that no tensor's name or shape tells, and in words where they come from."""
    known, why = LAYOUTS[found.layout].options, "as such files have it"
    options = {**QUIRKS, **known}
    if found.layout == "monai":
        shown = reads_twice(found.tensors)
        options["merge_order"] = "legacy" if shown else "monai"
        why = (
            "as its weights show"
            if shown
            else "as since MONAI 1.5; for files from before, --merge-order legacy"
        )
    options |= asked
    why = "as asked" if "merge_order" in asked else why
    hidden = "layer-normed" if options["normalize_hidden"] else "as they are"
    return options, (
        f"patch merging reads the octants in {options['merge_order']} order ({why}), clipped windows have a "
        f"{options['clipped_bias']} bias, the decoder is given hidden states {hidden}"
    )


def plan_of(found: Recognised, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a file that has none. Raises ValueError where shapes and names do not tell the network."""
    arguments = {**arguments_of(SwinUNETR, NetworkConfig()), **options_of(found), **options}
    stem = found.tensors[
        f"encoder.stem.{'proj' if arguments['stem'] == 'patch' else 'conv1'}.weight"
    ]
    head = found.tensors.get("head.weight")
    if head is not None and head.ndim != 5:
        raise ValueError(f"its last layer is {tuple(head.shape)}, not a convolution's kernel")
    return {
        "backbone": "swin_unetr",
        "arguments": json.loads(json.dumps(arguments)),
        "in_channels": stem.shape[1],
        "out_channels": stem.shape[1] if head is None else len(head),
        "classes": {},
        "method": found.layout,
        **LAYOUTS[found.layout].plan,
    }


def check_complete(found: Recognised, plan: Mapping[str, Any]) -> None:
    """Every tensor of the network is there, in its shape, and no other; a decoder or a head may be wholly missing.

    Raises ValueError.
    """
    expected = empty_network(plan).state_dict()
    parts = {part_of(name) for name in found.tensors}
    missing = [name for name in expected if part_of(name) in parts and name not in found.tensors]
    strange = [*found.unknown, *(name for name in found.tensors if name not in expected)]
    told = [
        f"{len(names)} tensors are {word}, first {names[0]}"
        for names, word in ((missing, "missing"), (strange, "unknown"))
        if names
    ]
    if told:
        raise ValueError(f"looks like {LAYOUTS[found.layout].what}, but {'; '.join(told)}")
    for name, value in found.tensors.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, its network has {tuple(expected[name].shape)}"
            )


def empty_network(plan: Mapping[str, Any]) -> SwinUNETR:
    """The plan's network without values, for its names and shapes."""
    with torch.device("meta"):
        return SwinUNETR(plan["in_channels"], plan["out_channels"], **plan["arguments"])


def for_monai(weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """MONAI's strict state dict of the same network, and what MONAI would compute otherwise. Raises ValueError."""
    arguments, notes = weights.plan["arguments"], list[str]()
    if weights.plan["backbone"] != "swin_unetr":
        raise ValueError(
            f"is a {weights.plan['backbone']}; only swin_unetr has a counterpart in MONAI"
        )
    if lost := next(
        (name for name in empty_network(weights.plan).state_dict() if name not in weights.tensors),
        "",
    ):
        raise ValueError(f"has no {part_of(lost)}, and MONAI's network does not load without one")
    order = arguments["merge_order"]
    tensors = weights.tensors if order == "legacy" else reorder(weights.tensors, order, "monai")
    if order == "legacy":
        notes.append("patch merging in legacy order: the same outputs only in MONAI before 1.5")
    if not arguments["normalize_hidden"]:
        notes.append(
            "give MONAI's network normalize=False in forward, or it norms the hidden states"
        )
    if arguments["clipped_bias"] == "rebuilt":
        notes.append(
            "MONAI reads another bias in windows that the grid clips: the same outputs only where none is"
        )
    d, h, w = arguments["window"]
    return to_monai(tensors, (d, h, w)), notes


def asked_quirks(config: Any) -> dict[str, Any]:
    """Those of QUIRKS that a run's flags were asked for."""
    return {name: getattr(config, name) for name in QUIRKS if was_set(config, name)}
