"""Weights of pre-training into a network with a new head, with a table of what was taken and what was not.

Nothing is taken silently in part: what should have matched and did not is an error, and that the values of the network
really changed is checked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dae.errors import InputError

PARTS = ("encoder", "decoder", "head")


@dataclass
class Report:
    """Names of tensors by what became of them."""

    kept: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)  # to another number of input channels
    new: list[str] = field(default_factory=list)  # the network's own, freshly drawn
    dropped: list[str] = field(default_factory=list)  # the file's, with no place here
    extra: Sequence[str] = ()  # what the file has beside its network, by its own names
    notes: Sequence[str] = ()  # what the file is and how it was read

    def __str__(self) -> str:
        """The notes, and a table with a line for each part of the network."""
        fates = {
            "kept": self.kept,
            "adapted": self.adapted,
            "new": self.new,
            "dropped": self.dropped,
        }
        lines = [
            *(f"  {note}" for note in self.notes),
            f"{'':10}{''.join(f'{fate:>9}' for fate in fates)}",
        ]
        for part in PARTS:
            counts = [sum(part_of(name) == part for name in names) for names in fates.values()]
            lines.append(f"  {part:8}{''.join(f'{count:9}' for count in counts)}")
        return "\n".join(lines + [f"  other   {len(self.extra):36}"] * bool(self.extra))


def part_of(name: str) -> str:
    """Which part of a network a tensor is of, by its name: what is not `encoder` or `head` decodes."""
    first = name.partition(".")[0]
    return first if first in ("encoder", "head") else "decoder"


def parts_to_transfer(asked: str, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """What --transfer encoder, decoder or both names, never the head. Raises InputError on a part that is not there."""
    there = {part_of(name) for name in weights}
    parts = ["encoder", "decoder"] if asked == "both" else [asked]
    if absent := [part for part in parts if part not in there]:
        raise InputError(
            f"--transfer {asked}: {path} has no {absent[0]}; take --transfer {min(there)}"
        )
    return parts


def parts_that_fit(network: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Every part that the file has, for more of the same training; the head where it is of the same task."""
    there, own = {part_of(name) for name in weights}, network.state_dict()
    same_task = all(
        w.shape == own[name].shape for name, w in weights.items() if part_of(name) == "head"
    )
    return [part for part in PARTS if part in there and (part != "head" or same_task)]


@torch.no_grad()
def transfer(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    parts: Sequence[str],
    path: Path,
    *,
    extra: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Copy the named parts (encoder, decoder, head) whole; `extra` and `notes` are for the report.

    Raises InputError if any tensor is missing or does not fit, or if all values were there before. On a network
    without values (device meta) it is a rehearsal.
    """
    report, own, changed = Report(extra=extra, notes=notes), network.state_dict(), False
    if missing := [name for name in own if part_of(name) in parts and name not in weights]:
        raise InputError(
            f"{path}: {len(missing)} tensors of the network are not in it, first {missing[0]}"
        )
    for name, value in own.items():
        if part_of(name) not in parts:
            report.new.append(name)
            continue
        given = fit_channels(weights[name], value)
        if given.shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(value.shape)} here"
            raise InputError(f"{path}: {name} does not fit ({shapes})")
        (report.kept if given is weights[name] else report.adapted).append(name)
        changed = changed or value.is_meta or not torch.equal(value.cpu(), given)
        value.copy_(given)
    report.dropped = [name for name in weights if name not in own or part_of(name) not in parts]
    if not changed:
        raise InputError(
            f"{path}: the network had these very values before; nothing was transferred"
        )
    return report


def fit_channels(given: Tensor, wanted: Tensor) -> Tensor:
    """A kernel of one input channel for N of them, at an N-th each; or one of N for one, their sum. Else as it is.

    Either way N equal channels give what one gave.
    """
    if given.ndim != 5 or given.shape[0] != wanted.shape[0] or given.shape[2:] != wanted.shape[2:]:
        return given
    there, here = given.shape[1], wanted.shape[1]
    if there == here or 1 not in (there, here):
        return given
    return given.expand(-1, here, -1, -1, -1) / here if there == 1 else given.sum(1, keepdim=True)
