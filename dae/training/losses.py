"""Losses of fine-tuning: Dice (section 2, "we use a Dice loss"), alone or with cross-entropy.

Both are means over samples, so that two ranks, or two micro-batches, train as one batch of all their samples. A voxel
of label -1 was not annotated and counts in neither. Axis letters: b batch, k classes, d h w grid.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) of softmax P and truth T, mean over what is in a sample, then over samples. float32.

    logits (b, k, d, h, w), label (b, d, h, w) int64. A class that a crop does not hold is left out: its term would be
    1 for the faintest probability, all but without a gradient, and only lift the loss.
    """
    known = rearrange(label >= 0, "b d h w -> b 1 d h w")
    p = logits.float().softmax(dim=1) * known
    t = (
        rearrange(F.one_hot(label.clamp(min=0), logits.shape[1]), "b d h w k -> b k d h w").float()
        * known
    )
    both = reduce(p * t, "b k d h w -> b k", "sum")
    sizes = reduce(p + t, "b k d h w -> b k", "sum")
    present = (reduce(t, "b k d h w -> b k", "sum") > 0).float()
    dice = (2 * both + SMOOTH) / (sizes + SMOOTH)
    return 1 - ((dice * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)).mean()


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over the annotated voxels of a sample, then over samples; 0 over none, where torch's own mean is nan."""
    each = reduce(
        F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="none"),
        "b d h w -> b",
        "sum",
    )
    return (each / reduce((label >= 0).float(), "b d h w -> b", "sum").clamp(min=1)).mean()


def dice_and_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """The authors' code's, with equal weights."""
    return dice_loss(logits, label) + cross_entropy(logits, label)


LOSSES = {"dice": dice_loss, "dice_ce": dice_and_cross_entropy}


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> list[float]:
    """Dice of each class but the background over the annotated part of one volume; nan where it is in neither."""
    prediction, label = prediction[label >= 0], label[label >= 0]
    both = torch.bincount(label[prediction == label], minlength=classes)
    sizes = torch.bincount(label, minlength=classes) + torch.bincount(prediction, minlength=classes)
    return (2 * both / sizes)[1:].tolist()
