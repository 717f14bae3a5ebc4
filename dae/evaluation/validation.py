"""Validation of a segmentation: Dice over whole held-out volumes, as prepared, by sliding window."""

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
from dae.evaluation.windows import sliding_window
from dae.figures import Segmented
from dae.training.distributed import Ranks, gather_objects
from dae.training.losses import dice_per_class


def dice_of_volumes(
    predict: Callable[[Tensor], Tensor],
    volumes: Sequence[Cached],
    classes: Mapping[int, str],
    *,
    window: Size3,
    overlap: float,
    ranks: Ranks,
    ignore: int | None = None,
) -> tuple[dict[str, Any], list[Segmented]]:
    """Mean Dice over cases for each class, then over classes; and this rank's first volumes as pictures."""
    started, found, pictures = (
        time.perf_counter(),
        list[tuple[int, list[float]]](),
        list[Segmented](),
    )
    for n in range(ranks.rank, len(volumes), ranks.world):
        image = volumes[n].array().astype(np.float32)
        slabs = sliding_window(
            image,
            predict,
            window=window,
            classes=len(classes),
            overlap=overlap,
            device=ranks.device,
            background=volumes[n].background,
        )
        prediction = torch.cat([slab.max(0).indices.to(torch.uint8).cpu() for slab in slabs])
        label = torch.from_numpy(class_index(volumes[n].label(), list(classes), ignore))
        found.append((n, dice_per_class(prediction, label, len(classes))))
        if len(pictures) < 3:
            pictures.append(
                Segmented(
                    volumes[n].path.name, image[0], label.clamp(min=0).numpy(), prediction.numpy()
                )
            )
    cases = [
        dice
        for _, dice in sorted(
            (one for part in gather_objects(found) for one in part), key=lambda one: one[0]
        )
    ]
    means = [nan_mean([case[k] for case in cases]) for k in range(len(classes) - 1)]
    by_class = dict(zip(list(classes.values())[1:], means))
    seconds = time.perf_counter() - started
    return {
        "dice": nan_mean(means),
        "dice_by_class": by_class,
        "cases": len(cases),
        "seconds": seconds,
    }, pictures


def nan_mean(values: Sequence[float]) -> float:
    """Of those that are numbers: a class that no case holds has no Dice."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
