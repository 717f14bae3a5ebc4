"""Weights of pre-training into a network with a new head, with a report on every tensor.

Nothing is left out silently. A tensor that should fit and does not is an error, and so is a
transfer after which no value of the network has changed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from dae.config.pretrain import Method
from dae.data.regions import Region
from dae.errors import InputError

PARTS = ("encoder", "decoder", "head")


@dataclass
class Report:
    """Names of tensors by what became of them."""

    kept: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)  # to another number of input channels
    new: list[str] = field(default_factory=list)  # of the network, at their random initial values
    dropped: list[str] = field(default_factory=list)  # of the file, and not transferred
    extra: Sequence[str] = ()  # of the file, and of no network here, by the file's names
    notes: Sequence[str] = ()  # what the file is and how it was read

    def __str__(self) -> str:
        """The notes, and a table with a line for each part of the network."""
        columns = {
            "kept": self.kept,
            "adapted": self.adapted,
            "new": self.new,
            "dropped": self.dropped,
        }
        lines = [f"  {note}" for note in self.notes]

        header = " " * 10
        for title in columns:
            header += f"{title:>9}"
        lines.append(header)

        for part in PARTS:
            row = f"  {part:8}"
            for names in columns.values():
                row += f"{count_of(part, names):9}"
            lines.append(row)

        if self.extra:
            lines.append(f"  other   {len(self.extra):36}")
        return "\n".join(lines)


def part_of(name: str) -> str:
    """The part of a network that a tensor belongs to, by the tensor's name."""
    first = name.partition(".")[0]
    if first in ("encoder", "head"):
        return first
    return "decoder"


def parts_in(names: Iterable[str]) -> set[str]:
    return {part_of(name) for name in names}


def count_of(part: str, names: Iterable[str]) -> int:
    return sum(part_of(name) == part for name in names)


# --- which parts


def parts_to_transfer(choice: str, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """The parts that --transfer encoder, decoder, both or all names; the head in `all` alone.

    Raises InputError on a part that the weights do not have.
    """
    present = parts_in(weights)
    parts = {"both": ["encoder", "decoder"], "all": list(PARTS)}.get(choice, [choice])
    for part in parts:
        if part not in present:
            raise InputError(
                f"--transfer {choice}: {path} has no {part}; take --transfer {min(present)}"
            )
    return parts


def check_same_classes(
    weights: Mapping[str, Any],
    classes: Mapping[int, str],
    path: Path,
    *,
    regions: Sequence[Region] = (),
) -> list[str]:
    """For --transfer all: the head is of the classes of the list, or of its regions if it has any.

    weights: their plan. Returns what the user should know of the head. Raises InputError.
    """
    take_both = "take --transfer both"
    if weights["method"] in get_args(Method):
        raise InputError(f"--transfer all: {path} is of pre-training, without classes; {take_both}")

    listed = {str(label): name for label, name in classes.items()}
    known = weights["classes"]
    if known and known != listed:
        raise InputError(
            f"--transfer all: {path} is of the classes {in_words(known)}, "
            f"the list has {in_words(listed)}; {take_both}"
        )
    outputs = len(regions) or len(classes)
    if weights["out_channels"] != outputs:
        raise InputError(
            f"--transfer all: {path} has {weights['out_channels']} outputs, "
            f"the list needs {outputs}; {take_both}"
        )
    if known:
        return []
    meant = ", ".join(region.name for region in regions) or in_words(listed)
    return [f"{path} names no classes: its outputs are taken for {meant}, in this order"]


def in_words(classes: Mapping[str, str]) -> str:
    """{"0": "background", "1": "liver"} -> "0 background, 1 liver"."""
    return ", ".join(f"{label} {name}" for label, name in classes.items())


def parts_that_fit(network: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Every part that the weights have, to continue the same training.

    The head is among them where it has the network's shape, so that it is of the same task.
    """
    present = parts_in(weights)
    if not head_fits(network, weights):
        present.discard("head")
    return [part for part in PARTS if part in present]


def head_fits(network: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    own = network.state_dict()
    for name, value in weights.items():
        # The head of a probe has other tensors.
        if part_of(name) == "head" and (name not in own or value.shape != own[name].shape):
            return False
    return True


# --- the transfer


@torch.no_grad()
def transfer(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    parts: Sequence[str],
    path: Path,
    *,
    extra: Sequence[str] = (),
    notes: Sequence[str] = (),
    may_be_equal: bool = False,
) -> Report:
    """Copy the named parts (encoder, decoder, head), each of them whole, into the network.

    path: of the weights, for error messages.
    extra, notes: for the report.
    may_be_equal: the network may have these values already: untrained weights of its own seed.
    On a network without values (device meta) it is a rehearsal: all checks, and nothing is copied.

    Raises InputError if a tensor is missing or does not fit, or if nothing in the network changed.
    """
    own = network.state_dict()
    missing = [name for name in own if part_of(name) in parts and name not in weights]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors of the network are not in it, first {missing[0]}"
        )

    # `own` shares its values with the network: what is copied into it is in the network.
    report = Report(extra=extra, notes=notes)
    changed = False
    for name, value in own.items():
        if part_of(name) not in parts:
            report.new.append(name)
            continue

        fitted = fit_channels(weights[name], value)
        if fitted.shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(value.shape)} here"
            raise InputError(f"{path}: {name} does not fit ({shapes})")

        if fitted is weights[name]:  # fit_channels had nothing to change
            report.kept.append(name)
        else:
            report.adapted.append(name)

        # A tensor on the device meta has no values that could be compared.
        changed = changed or value.is_meta or not torch.equal(value.cpu(), fitted)
        value.copy_(fitted)

    for name in weights:
        if name not in own or part_of(name) not in parts:
            report.dropped.append(name)

    if not changed and not may_be_equal:
        raise InputError(
            f"{path}: the network had these very values before; nothing was transferred"
        )
    return report


def fit_channels(kernel: Tensor, wanted: Tensor) -> Tensor:
    """A convolution's kernel (c_out, c_in, d, h, w) for as many input channels as `wanted` has.

    The kernels of the channels are added up, and each of the M new ones gets an M-th of the sum. So
    M equal channels give what N channels equal to them gave, and which contrast a channel showed is
    forgotten. Any other tensor, and a kernel of as many channels, is returned as it is.

    The rest of the network is built as the weights say: what reads the image is all that can have
    another number of input channels.
    """
    if kernel.ndim != 5 or wanted.ndim != 5:
        return kernel
    if kernel.shape[0] != wanted.shape[0] or kernel.shape[2:] != wanted.shape[2:]:
        return kernel

    before = kernel.shape[1]
    after = wanted.shape[1]
    if before == after:
        return kernel
    total = reduce(kernel, "c_out c_in d h w -> c_out 1 d h w", "sum")
    return repeat(total, "c_out 1 d h w -> c_out m d h w", m=after) / after
