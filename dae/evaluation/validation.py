"""Validation of fine-tuning: Dice over whole held-out volumes, as prepared, by sliding window."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dae.config.command_line import Size3
from dae.data.batches import class_index
from dae.data.cache import Cached
from dae.data.regions import Region, membership
from dae.evaluation.windows import decide_by, sliding_window
from dae.figures import Segmented
from dae.training.distributed import Ranks, all_or_none, gather_objects
from dae.training.losses import dice_per_class, dice_per_region

PICTURES = 3  # volumes to draw, of each rank


def dice_of_volumes(
    predict: Callable[[Tensor], Tensor],
    volumes: Sequence[Cached],
    classes: Mapping[int, str],
    *,
    window: Size3,
    overlap: float,
    ranks: Ranks,
    ignore: int | None = None,
    regions: Sequence[Region] = (),
) -> tuple[dict[str, Any], list[Segmented]]:
    """Mean Dice over cases for each class, then over classes; and the first volumes, to draw.

    The ranks share the volumes, and every rank gets the Dice of all of them. A voxel whose label is
    `ignore` counts for nothing. Where there are `regions`, they are scored in place of the classes,
    in the label map as it is written. Where `predict` raises Stopped on one rank, this does on all.
    """
    started = time.perf_counter()
    labels = list(classes)
    decide = decide_by(labels, regions)
    has_label = torch.from_numpy(membership(regions, labels))

    dice_of_case: dict[int, list[float]] = {}
    pictures: list[Segmented] = []
    with all_or_none():
        for n in range(ranks.rank, len(volumes), ranks.world):
            volume = volumes[n]
            image = volume.array().astype(np.float32)
            slabs = sliding_window(
                image,
                predict,
                window=window,
                classes=len(regions) or len(classes),
                overlap=overlap,
                device=ranks.device,
                background=volume.background,
                are_regions=bool(regions),
            )
            prediction = torch.cat([decide(slab).to(torch.uint8).cpu() for slab in slabs])
            label = torch.from_numpy(class_index(volume.label(), labels, ignore))
            if regions:
                dice_of_case[n] = dice_per_region(prediction, label, has_label)
            else:
                dice_of_case[n] = dice_per_class(prediction, label, len(classes))

            if len(pictures) < PICTURES:
                drawn_label = label.clamp(min=0).numpy()  # ignored, -1, is drawn as background
                pictures.append(
                    Segmented(volume.path.name, image[0], drawn_label, prediction.numpy())
                )

    # The order of the cases decides the last bit of a mean, and must not depend on the ranks.
    of_all_ranks: dict[int, list[float]] = {}
    for of_one_rank in gather_objects(dice_of_case):
        of_all_ranks |= of_one_rank
    cases = [of_all_ranks[n] for n in sorted(of_all_ranks)]

    names = list(classes.values())[1:]  # without the background
    if regions:
        names = [region.name for region in regions]
    means = []
    for k in range(len(names)):
        means.append(nan_mean([case[k] for case in cases]))

    metadata = {
        "dice": nan_mean(means),
        "dice_by_class": dict(zip(names, means)),
        "cases": len(cases),
        "seconds": time.perf_counter() - started,
    }
    return metadata, pictures


def nan_mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers: a class that no case holds has no Dice."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
