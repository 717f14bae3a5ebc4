"""Any file of weights: its tensors by our names, and the plan of its network.

Nothing is read in part: a file that lacks a tensor of its network, or has one that is unknown or of
another shape, is refused. Only tensors, numbers, strings and containers of them are unpickled.
"""

import codecs
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dae.config.command_line import was_set
from dae.config.shared import NetworkConfig
from dae.errors import InputError, one_line
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
from dae.weights.plan import check_plan, flag, load_planned
from dae.weights.transfer import part_of, parts_in

# Options of the network that no tensor's name or shape tells, at the defaults of this package.
QUIRKS: dict[str, Any] = {"merge_order": "all", "clipped_bias": "rebuilt", "normalize_hidden": True}

Tensors = dict[str, Tensor]


class Weights(NamedTuple):
    """A file's tensors by our names, and what a user of them needs to know."""

    tensors: Tensors
    plan: dict[str, Any]  # as in our checkpoints: backbone, arguments, in_channels, ...
    notes: Sequence[str]  # what the file is and how it was read, a line each
    extra: Sequence[str] = ()  # names of its tensors that no network here has


def quirks_set(config: Any) -> dict[str, Any]:
    """The values of QUIRKS that the user has set."""
    return {name: getattr(config, name) for name in QUIRKS if was_set(config, name)}


# --- read


def read_weights(path: Path, quirks: Mapping[str, Any] | None = None) -> Weights:
    """Any file of weights, on the CPU.

    quirks: values of QUIRKS that the user has set; for a foreign file they go before what is known
    of its layout.
    Raises InputError where the file cannot be used whole.
    """
    if checkpoint.has_seal(path):
        return read_checkpoint(path, quirks or {})
    return read_foreign(path, quirks or {})


def read_checkpoint(path: Path, quirks: Mapping[str, Any]) -> Weights:
    """The weights of our own checkpoint. Raises InputError where `quirks` contradict its plan."""
    saved = load_planned(path)
    plan = saved["plan"]
    for name, value in quirks.items():
        if value != plan["arguments"].get(name, value):
            raise InputError(
                f"{flag(name, value)}: {path} was made with {plan['arguments'][name]}; "
                "leave the flag out"
            )

    step = ""
    if "step" in saved and "config" in saved:  # of a run, and not of `convert`
        step = f", step {saved['step']} of {saved['config'].get('steps')}"
    notes = [f"a checkpoint of this package ({plan['method']}{step})"]

    if plan["method"] == "scratch":
        notes.append("untrained, as the seed drew them")
    if plan.get("decoder") == "untrained":
        notes.append("its decoder is untrained: --transfer both takes it as it was drawn")

    # The method of a converted file is its layout, so that the layout's warning is not lost.
    layout = LAYOUTS.get(plan["method"])
    if layout and layout.warning:
        notes.append(f"warning: {layout.warning}")
    return Weights(saved["model"], plan, notes)


def read_foreign(path: Path, quirks: Mapping[str, Any]) -> Weights:
    """The weights of another program. Raises InputError."""
    content = load_tensors(path)
    # The seal is at the end of a file. Where the end is lost, the keys still show whose file it is.
    if "plan" in content and "format" in content:
        raise InputError(
            f"{path}: a checkpoint of this package without its checksum: damaged; copy it again"
        )
    key, tensors = find_state_dict(content)
    check_values_present(tensors, content, path)

    try:
        recognised = recognise(tensors)
        options, options_in_words = quirks_of(recognised, quirks)
        plan = plan_of_foreign(recognised, options)
        check_plan(plan, recognised.tensors, path)
        check_complete(recognised, plan)
    except ValueError as error:
        raise InputError(f"{path}: {one_line(error, 300)}") from error

    layout = LAYOUTS[recognised.layout]
    what = f"{layout.what}, under {key}" if key else layout.what
    notes = [what, options_in_words]
    if layout.warning:
        notes.append(f"warning: {layout.warning}")
    return Weights(recognised.tensors, plan, notes, recognised.extra)


def load_tensors(path: Path) -> dict[str, Any]:
    """The dictionary that torch.save wrote: tensors, numbers, strings and containers of them.

    Raises InputError on anything else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with torch.serialization.safe_globals(numpy_numbers()):
        try:
            check_parts(path)
            checkpoint.check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # of a dozen types, by what torch or zipfile cannot read
            raise InputError(f"{path}: {why_refused(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    checkpoint.check_tensors(content, path)
    return content


def check_parts(path: Path) -> None:
    """Raises InputError where a part of the archive that torch.save writes is damaged.

    In a zip archive each part, so each tensor, has a CRC-32, which torch.load does not compare. It
    finds every single bit that is flipped and every burst of up to 32; of all other damage it
    misses one in four thousand million. The files of torch before 1.6 are no archives.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(
            f"{path}: its part {damaged} is damaged: the bytes are not those of its CRC; copy it "
            "again, or save it again where torch wrote none (set_crc32_options)"
        )


def numpy_numbers() -> list[Any]:
    """The classes that a pickled np.float64 needs: many scripts save their best score as one."""
    scalar = np.float64().__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"}
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes, codecs.encode]


def why_refused(error: Exception) -> str:
    """In words, why torch did not load a file."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return (
            f"holds {code[1]}, which is code and not a tensor, and is not loaded; where you trust "
            "the file, torch.load it with weights_only=False and save its state dict alone"
        )
    message = " ".join(str(error).rpartition("error: ")[2].split())
    return f"not a whole file that torch.save has written ({message[:80] or type(error).__name__})"


# --- where the network is in a file


def find_state_dict(content: Mapping[Any, Any]) -> tuple[str, Tensors]:
    """The tensors of a network at any depth of a file, and their place: ("state_dict", {...}).

    If no dictionary has a network: the first that has tensors at all; ("", {}) if none has.
    """
    first_key = ""
    first_tensors: Tensors = {}
    for key, dictionary in dictionaries_in(content):
        tensors = {str(k): value for k, value in dictionary.items() if isinstance(value, Tensor)}
        if first_match(STEM, tensors) or first_match(OWN_STEM, tensors):
            return key, tensors
        if tensors and not first_tensors:
            first_key = key
            first_tensors = tensors
    return first_key, first_tensors


def dictionaries_in(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """A dictionary and all that are nested in it, each after the one it is in, with dotted keys.

    Each is given once, under its first key: a file may hold a dictionary that holds itself.
    """
    unread: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    seen = set[int]()
    while unread:
        key, dictionary = unread.pop()
        if id(dictionary) in seen:
            continue
        seen.add(id(dictionary))
        yield key, dictionary

        inner = []
        for name, value in dictionary.items():
            if isinstance(value, dict) and isinstance(name, str | int):
                inner.append((f"{key}.{str(name)[:100]}".lstrip("."), value))
        unread += reversed(inner)  # the first is read first


def check_values_present(tensors: Tensors, content: Mapping[Any, Any], path: Path) -> None:
    """Raises InputError where a file has no tensors, or one without values."""
    if not tensors:
        names = [key if isinstance(key, str) else type(key).__name__ for key in list(content)[:6]]
        keys = ", ".join(name[:40] for name in names) or "it is empty"
        raise InputError(f"{path}: holds no tensors ({keys})")
    for name, value in tensors.items():
        if value.is_meta:
            raise InputError(
                f"{path}: {name} has a shape and no values; save the network from a device "
                "that has them"
            )


# --- the plan of a foreign file


def quirks_of(recognised: Recognised, quirks: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The values of QUIRKS that hold for a file, and a line on them and on how they are known.

    quirks: those that the user has set.
    """
    options = {**QUIRKS, **LAYOUTS[recognised.layout].options}
    reason = "as such files have it"
    if recognised.layout == "monai":
        # MONAI 1.5 changed the order, and the names of the tensors do not tell the version.
        if reads_twice(recognised.tensors):
            options["merge_order"] = "legacy"
            reason = (
                "as its weights show; if MONAI 1.5 or later has tuned them, --merge-order monai"
            )
        else:
            options["merge_order"] = "monai"
            reason = (
                "as since MONAI 1.5; for files from before, --merge-order legacy, for mergingv2, "
                "--merge-order all"
            )

    options |= quirks
    if "merge_order" in quirks:
        reason = "as asked"

    hidden = "layer-normed" if options["normalize_hidden"] else "as they are"
    return options, (
        f"patch merging reads the octants in {options['merge_order']} order ({reason}), "
        f"clipped windows have a {options['clipped_bias']} bias, "
        f"the decoder is given hidden states {hidden}"
    )


def plan_of_foreign(recognised: Recognised, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a foreign file. Raises ValueError where its tensors do not tell the network."""
    arguments = {**arguments_of(SwinUNETR, NetworkConfig()), **options_of(recognised), **options}

    kernel = "proj" if arguments["stem"] == "patch" else "conv1"
    stem = recognised.tensors[f"encoder.stem.{kernel}.weight"]
    head = recognised.tensors.get("head.weight")
    if head is not None and head.ndim != 5:
        raise ValueError(f"its last layer is {tuple(head.shape)}, not a convolution's kernel")

    return {
        "backbone": "swin_unetr",
        "arguments": json.loads(json.dumps(arguments)),  # lists in place of tuples, as in our plans
        "in_channels": stem.shape[1],
        "out_channels": stem.shape[1] if head is None else len(head),
        "classes": {},
        "method": recognised.layout,
        **LAYOUTS[recognised.layout].plan,
    }


def check_complete(recognised: Recognised, plan: Mapping[str, Any]) -> None:
    """The file has every tensor of its network, in its shape, and no other.

    The decoder or the head may be missing as a whole. Raises ValueError.
    """
    expected = empty_network(plan).state_dict()
    tensors = recognised.tensors
    parts = parts_in(tensors)

    missing = [name for name in expected if part_of(name) in parts and name not in tensors]
    unknown = [*recognised.unknown, *(name for name in tensors if name not in expected)]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing, first {missing[0]}")
    if unknown:
        faults.append(f"{len(unknown)} tensors are unknown, first {unknown[0]}")
    if faults:
        raise ValueError(f"looks like {LAYOUTS[recognised.layout].what}, but {'; '.join(faults)}")

    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, its network has {tuple(expected[name].shape)}"
            )


def empty_network(plan: Mapping[str, Any]) -> SwinUNETR:
    """The plan's network without values, for its names and shapes."""
    with torch.device("meta"):
        return SwinUNETR(plan["in_channels"], plan["out_channels"], **plan["arguments"])


# --- to MONAI


def for_monai(weights: Weights) -> tuple[Tensors, list[str]]:
    """The state dict of MONAI's SwinUNETR, and a line on each point where MONAI computes otherwise.

    Raises ValueError where MONAI has no such network.
    """
    plan = weights.plan
    if plan["backbone"] != "swin_unetr":
        raise ValueError(f"is a {plan['backbone']}; only swin_unetr has a counterpart in MONAI")
    for name in empty_network(plan).state_dict():
        if name not in weights.tensors:
            raise ValueError(
                f"has no {part_of(name)}, and MONAI's network does not load without one"
            )

    arguments = plan["arguments"]
    order = arguments["merge_order"]
    tensors = weights.tensors
    notes = []
    if order == "legacy":
        # What is read twice cannot be put in another order; older MONAI reads as these weights do.
        notes.append("patch merging in legacy order: the same outputs only in MONAI before 1.5")
    else:
        tensors = reorder(tensors, order, "monai")
    if not arguments["normalize_hidden"]:
        notes.append(
            "give MONAI's network normalize=False in forward, or it norms the hidden states"
        )
    if arguments["clipped_bias"] == "rebuilt":
        notes.append(
            "MONAI reads another bias in windows that the grid clips: "
            "the same outputs only where none is"
        )

    d, h, w = arguments["window"]
    return to_monai(tensors, (d, h, w)), notes
