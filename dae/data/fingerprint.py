"""What the volumes of a list have in common, and the flags that follow from it.

- `--spacing`: the median of each axis, as nnU-Net takes it.
- `--crop`: along each axis the largest multiple of 32 that a volume of median size has room for at
  that spacing, at least 32 and at most the paper's 96. 32 is what the default network divides by.
- `--ct-window`: the 0.5th and the 99.5th percentile of all labelled voxels of the training CTs, as
  nnU-Net clips them. Without labels there is nothing to go by, and none is suggested.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dae.data.cache import free_in, room_for
from dae.data.datalist import Item
from dae.data.examine import Examined
from dae.data.preprocess import Recipe
from dae.data.regions import Region, in_words

DIVISOR = 32  # of Swin UNETR with four stages
LARGEST = 96  # sec. 3.2
WINDOW = (0.5, 99.5)  # percentiles


def fingerprint(volumes: Sequence[Examined]) -> dict[str, Any]:
    """Spacing (mm), size (voxels) and intensities by modality, each as median and range."""
    by_modality: dict[str, list[Examined]] = {}
    for volume in volumes:
        if volume.channels:
            by_modality.setdefault(volume.item.modality_name, []).append(volume)

    found = {}
    for name, members in by_modality.items():
        found[name] = {
            "volumes": len(members),
            "spacing_mm": median_and_range([volume.spacing for volume in members]),
            "size": median_and_range([volume.size for volume in members]),
            "intensity": [intensity_of(members, c) for c in range(len(members[0].channels))],
        }
    return found


def intensity_of(volumes: Sequence[Examined], channel: int) -> dict[str, Any]:
    """Of one channel: the median and the range of percentiles over the volumes that have it."""
    values = [v.channels[channel].percentiles for v in volumes if channel < len(v.channels)]
    low, median, high = zip(*((p[1], p[4], p[-2]) for p in values))
    return {
        "p0.5": median_and_range(low),
        "p50": median_and_range(median),
        "p99.5": median_and_range(high),
    }


def classes_of(volumes: Sequence[Examined], names: Mapping[int, str]) -> dict[str, Any]:
    """Of each class: in how many volumes it is, and its size there in ml."""
    found = {}
    for label, name in names.items():
        sizes = [volume.labels[label] for volume in volumes if label in volume.labels]
        ml = median_and_range(sizes) if sizes else None
        found[str(label)] = {"name": name, "volumes": len(sizes), "ml": ml}
    return found


def regions_in(volumes: Sequence[Examined], regions: Sequence[Region]) -> dict[str, Any]:
    """As `classes_of`, of each region: the union of its labels."""
    found = {}
    for region in regions:
        sizes = []
        for volume in volumes:
            ml = [volume.labels[label] for label in region.labels if label in volume.labels]
            if ml:
                sizes.append(sum(ml))
        size = median_and_range(sizes) if sizes else None
        labels = in_words(region.labels)
        found[labels] = {"name": region.name, "volumes": len(sizes), "ml": size}
    return found


def median_and_range(values: Sequence[Any]) -> dict[str, Any]:
    """Of numbers, or of vectors along each axis."""
    table = np.asarray(values, dtype=np.float64)
    return {
        "median": np.median(table, axis=0).tolist(),
        "min": table.min(axis=0).tolist(),
        "max": table.max(axis=0).tolist(),
    }


def suggested(volumes: Sequence[Examined]) -> dict[str, Any]:
    """spacing (mm), crop (voxels) and ct_window (HU) by the volumes that train; {} for none."""
    readable = [volume for volume in volumes if volume.spacing]
    if not readable:
        return {}

    median = np.median([volume.spacing for volume in readable], axis=0)
    spacing = [float(f"{mm:.3g}") for mm in median]
    sizes = [np.multiply(v.size, v.spacing) / spacing for v in readable]
    room = np.median(sizes, axis=0) // DIVISOR * DIVISOR
    crop = np.clip(room, DIVISOR, LARGEST).astype(int).tolist()
    return {"spacing": spacing, "crop": crop, "ct_window": window_of(readable)}


def window_of(volumes: Sequence[Examined]) -> list[float] | None:
    """HU between which 99 % of the labelled voxels lie, every volume with at most 10,000."""
    values = []
    for volume in volumes:
        for channel in volume.channels:
            if channel.labelled is not None and len(channel.labelled):
                values.append(channel.labelled)
    if not values:
        return None
    low, high = np.percentile(np.concatenate(values), WINDOW).tolist()
    return [float(round(low)), float(round(high))]


def room_in_cache(items: Sequence[Item], spacing: Sequence[float], folder: Path) -> dict[str, int]:
    """Bytes that the prepared volumes take at this spacing, and that are free in the folder.

    Volumes that cannot be read count for nothing.
    """
    recipe = Recipe(spacing=tuple(spacing))
    needed = sum(room_for(item, recipe) for item in items)
    return {"bytes": needed, "free_bytes": free_in(folder)}
