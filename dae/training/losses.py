"""Losses of fine-tuning: Dice (section 2, "we use a Dice loss"), alone or with cross-entropy.

Both are means over samples, so that two ranks, or two micro-batches, train as one batch of all
their samples. A voxel of label -1 was not annotated and counts in neither. Axis letters: b batch, k
classes, d h w grid.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) of softmax P and truth T. float32.

    logits (b, k, d, h, w), label (b, d, h, w) int64 -> (). The mean over the classes in a sample,
    then over samples. A class that a crop does not hold is left out: its term would be 1 for the
    faintest probability and have almost no gradient.
    """
    known = rearrange(label >= 0, "b d h w -> b 1 d h w")
    p = logits.float().softmax(dim=1) * known
    one_hot = F.one_hot(label.clamp(min=0), logits.shape[1])
    t = rearrange(one_hot, "b d h w k -> b k d h w").float() * known

    both = reduce(p * t, "b k d h w -> b k", "sum")
    sizes = reduce(p + t, "b k d h w -> b k", "sum")
    dice = (2 * both + SMOOTH) / (sizes + SMOOTH)

    present = (reduce(t, "b k d h w -> b k", "sum") > 0).float()
    mean_of_present = (dice * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return 1 - mean_of_present.mean()


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over the annotated voxels of a sample, then over samples. Shapes as in `dice_loss`.

    A sample without any has 0, where torch's own mean is nan.
    """
    of_voxels = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="none")
    total = reduce(of_voxels, "b d h w -> b", "sum")
    annotated = reduce((label >= 0).float(), "b d h w -> b", "sum")
    return (total / annotated.clamp(min=1)).mean()


def dice_and_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """The loss of the authors' code, with equal weights."""
    return dice_loss(logits, label) + cross_entropy(logits, label)


LOSSES = {"dice": dice_loss, "dice_ce": dice_and_cross_entropy}


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> list[float]:
    """Dice of every class but the background over the annotated part of one volume.

    prediction and label (d, h, w) int64. nan for a class that is in neither.
    """
    annotated = label >= 0
    prediction = prediction[annotated]
    label = label[annotated]

    both = torch.bincount(label[prediction == label], minlength=classes)
    in_label = torch.bincount(label, minlength=classes)
    in_prediction = torch.bincount(prediction, minlength=classes)
    dice: list[float] = (2 * both / (in_label + in_prediction)).tolist()
    return dice[1:]
