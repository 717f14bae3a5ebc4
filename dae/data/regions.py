"""Regions: unions of labels that may overlap, as those of BraTS.

A list of regions, as nnU-Net has it:

    "labels": {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [1, 3], "enhancing": 3},
    "regions_class_order": [2, 1, 3]

A network of regions has one channel for each, in the order of the list, and none for the
background: region-based training, Isensee et al. 2021 (nnU-Net for Brain Tumor Segmentation). Its
prediction is written as one label map. Region after region, each voxel that is predicted as the
region gets the label of "regions_class_order" at its place, over what was written before.

That is only right if no region is lost on the way, which is checked here.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dae.errors import InputError

LARGEST = 255  # label maps are uint8


class Region(NamedTuple):
    """A union of labels with a name of its own."""

    name: str
    labels: tuple[int, ...]  # ascending; never the background

    # The label that its voxels get in a label map; 0 where the list has no "regions_class_order".
    written: int = 0


# --- read and checked


def regions_of(
    entries: Sequence[tuple[str, Any]], order: Any, path: Path | str
) -> tuple[Region, ...]:
    """The regions of a list, from name and value of each entry of its "labels".

    A value is a label or a list of labels. The background, 0, and "ignore" are no regions. `order`
    is the list's "regions_class_order", or None: scores do not need it, and pre-training does not.
    Raises InputError on regions that are no regions, and on an order that loses labels.
    """
    regions: list[Region] = []
    ignored: set[int] = set()
    for name, value in entries:
        if name == "ignore":
            ignored.add(single_label(value, path))
        elif type(value) is not int or value != 0:
            regions.append(Region(name, labels_in(name, value, path)))

    check_unions(regions, ignored, path)
    if order is None:
        return tuple(regions)

    regions = with_order(regions, order, path)
    check_round_trip(regions, path)
    return tuple(regions)


def single_label(value: Any, path: Path | str) -> int:
    if type(value) is not int:
        raise InputError(f'{path}: "labels" gives "ignore" {value!r}; it must be one label')
    return value


def labels_in(name: str, value: Any, path: Path | str) -> tuple[int, ...]:
    """The labels of a region, ascending. Raises InputError where there are none, or no labels."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f'{path}: "labels" gives {name!r} no label; a region has one or more')

    for label in values:
        if type(label) is not int or not 1 <= label <= LARGEST:
            raise InputError(
                f'{path}: "labels" gives {name!r} {label!r}; the labels of a region are '
                f"whole numbers from 1 to {LARGEST}"
            )
    return tuple(sorted(set(values)))


def check_unions(regions: Sequence[Region], ignored: set[int], path: Path | str) -> None:
    """Raises InputError on two regions of one name or of the same labels, and on `ignored` ones."""
    for a, b in combinations(regions, 2):
        if a.labels == b.labels:
            raise InputError(
                f'{path}: "labels" has two names for one region, {a.name!r} and {b.name!r} '
                f"({in_words(a.labels)}); keep one"
            )
        if a.name == b.name:
            raise InputError(
                f'{path}: "labels" gives the name {a.name!r} to two regions; '
                "scores are told apart by name: give each its own"
            )

    for region in regions:
        both = ignored.intersection(region.labels)
        if both:
            raise InputError(
                f'{path}: "labels" calls {min(both)} "ignore" and has it in {region.name!r}'
            )


def with_order(regions: Sequence[Region], order: Any, path: Path | str) -> list[Region]:
    """The regions with the labels that they are written as. Raises InputError on another order."""
    where = f'{path}: "regions_class_order"'
    if not isinstance(order, list) or len(order) != len(regions):
        count = len(order) if isinstance(order, list) else repr(order)
        names = ", ".join(region.name for region in regions)
        raise InputError(
            f"{where} must have {len(regions)} labels, one for each of {names}; it has {count}"
        )

    ordered = []
    for region, label in zip(regions, order):
        if type(label) is not int or label not in region.labels:
            raise InputError(
                f"{where} writes {region.name!r} as {label!r}, which is none of its labels "
                f"({in_words(region.labels)})"
            )
        ordered.append(region._replace(written=label))
    return ordered


def check_round_trip(regions: Sequence[Region], path: Path | str) -> None:
    """Raises InputError unless every label is written as a label of the same regions.

    A label is written as the last of its regions says. Of {"thing": [1, 2]} both labels may be
    written as 1.
    """
    written = {label: region.written for region in regions for label in region.labels}
    for label, becomes in sorted(written.items()):
        its_regions = [region.name for region in regions if label in region.labels]
        if its_regions != [region.name for region in regions if becomes in region.labels]:
            raise InputError(
                f'{path}: "regions_class_order" does not give the regions back: label {label} '
                f"would become {becomes}, as the last of its regions is {its_regions[-1]!r}, and "
                f"{becomes} is not in the same regions; name larger regions first, and write each "
                "as a label that is in no later one"
            )


def check_order(regions: Sequence[Region], data: str) -> None:
    """Raises InputError where the list does not say how its regions become a label map."""
    if regions and not regions[0].written:
        names = ", ".join(region.name for region in regions)
        raise InputError(
            f'{data}: "labels" has regions and the list no "regions_class_order"; add one label '
            f"for each of {names}, which its voxels get in a predicted label map"
        )


def check_same(own: Sequence[Region], known: Sequence[Region], data: str) -> None:
    """Raises InputError where the regions of a list are not those of a network. Order is no matter.

    own: of the list `data`. known: of the network; none where it has classes.
    """
    # Pairs and no dict: two names may be one but for capitals.
    ours = sorted((region.name.casefold(), region.labels) for region in own)
    theirs = sorted((region.name.casefold(), region.labels) for region in known)
    if ours != theirs:
        raise InputError(
            f"--data {data}: has {all_in_words(own)} there and {all_in_words(known)} in the "
            "checkpoint"
        )


def in_words(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels))


def all_in_words(regions: Sequence[Region]) -> str:
    """Like "the regions whole (1, 2) and core (1)"."""
    if not regions:
        return "no regions"
    named = [f"{region.name} ({in_words(region.labels)})" for region in regions]
    return f"the regions {', '.join(named)}"


# --- names


def names_of_labels(regions: Sequence[Region]) -> dict[int, str]:
    """A name for each label, ascending: that of the last of its regions.

    In BraTS 2 is "whole tumour", 1 "tumour core" and 3 "enhancing". So a label map that is drawn
    with these names shows each region less those within it.
    """
    names: dict[int, str] = {}
    for region in regions:
        names |= dict.fromkeys(region.labels, region.name)
    return dict(sorted(names.items()))


def numbered(regions: Sequence[Region]) -> dict[int, str]:
    """The name of each region by its number, from 1 on, which is its class in a table of scores."""
    return {n: region.name for n, region in enumerate(regions, start=1)}


# --- in a checkpoint


def to_plan(regions: Sequence[Region]) -> dict[str, Any]:
    """The keys of a plan, as the list has them; none where there are no regions."""
    if not regions:
        return {}
    return {
        "regions": {region.name: list(region.labels) for region in regions},
        "regions_class_order": [region.written for region in regions],
    }


def from_plan(plan: Mapping[str, Any]) -> tuple[Region, ...]:
    """The regions of a network, in the order of its channels; none where it has classes."""
    regions = plan.get("regions") or {}
    order = plan.get("regions_class_order") or []
    named = zip(regions.items(), order, strict=True)
    return tuple(Region(name, tuple(labels), written) for (name, labels), written in named)


# --- from label maps to regions and back


def membership(regions: Sequence[Region], labels: Sequence[int]) -> NDArray[np.bool_]:
    """Whether a region has a label: (regions, labels)."""
    return np.array([np.isin(labels, region.labels) for region in regions], dtype=bool)


def write_regions(inside: Tensor, written: Sequence[int]) -> Tensor:
    """Bool (regions, *grid) -> uint8 (*grid): what is `written` for each, later over earlier."""
    labels = torch.zeros(inside.shape[1:], dtype=torch.uint8, device=inside.device)
    for region, label in zip(inside, written):
        labels[region] = label
    return labels


def mirrored(
    regions: Sequence[Region], swap: Sequence[tuple[int, int]], where: str
) -> list[tuple[int, int]]:
    """The pairs of regions, by index, that change places where labels do.

    Raises InputError, which begins with `where`, if that makes something that is no region.
    """
    partner = {label: label for region in regions for label in region.labels}
    for a, b in swap:
        partner[a], partner[b] = b, a

    unions = [set(region.labels) for region in regions]
    pairs = []
    for n, region in enumerate(regions):
        image = {partner[label] for label in region.labels}
        if image not in unions:
            raise InputError(
                f'{where}: "swap" turns {region.name!r} into labels {in_words(sorted(image))}, '
                "which are no region; a flip needs both of a pair to be regions"
            )
        other = unions.index(image)
        if n < other:
            pairs.append((n, other))
    return pairs
