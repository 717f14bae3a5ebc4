"""Losses of fine-tuning: Dice (section 2, "we use a Dice loss"), alone or with cross-entropy.

Both are means over samples, so that two ranks, or two micro-batches, train as one batch of all
their samples. A voxel of label -1 was not annotated and counts in neither. Axis letters: b batch, k
classes or regions, d h w grid.

Regions overlap, so they are no classes of one softmax. Each is a task of two classes of its own,
outside and inside, and its loss is that of two classes (`loss_of_regions`).
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


# --- regions


def loss_of_regions(name: str, logits: Tensor, label: Tensor, membership: Tensor) -> Tensor:
    """The loss of this name for regions, each with a sigmoid of its own; the mean over them.

    logits (b, k, d, h, w) of k regions, label (b, d, h, w) int64 and membership (k, labels) as in
    `region_targets` -> (). With x the logit of a region, softmax of (0, x) is 1 - sigmoid of x and
    sigmoid of x. So `dice` is the Dice of the inside and of the outside of each region, background
    included as for classes, and `dice_ce` adds binary cross-entropy.

    Isensee et al. 2021 train BraTS's regions by Dice of the inside and binary cross-entropy. The
    outside is there for `dice` alone: of a crop without any region nothing else would tell the
    network that what it predicts there is wrong.
    """
    inside = region_targets(label, membership)
    x = rearrange(logits, "b k d h w -> (b k) 1 d h w")
    outside_and_inside = torch.cat([torch.zeros_like(x), x], dim=1)
    return LOSSES[name](outside_and_inside, rearrange(inside, "b k d h w -> (b k) d h w"))


def region_targets(label: Tensor, membership: Tensor) -> Tensor:
    """What lies in each region: 1 inside, 0 outside, -1 where nothing was annotated. int64.

    label (b, d, h, w) int64, an index among the labels, or -1. membership (k, labels) bool: whether
    a region has a label. -> (b, k, d, h, w).
    """
    inside = membership[:, label.clamp(min=0)].long()
    unknown = rearrange(label < 0, "b d h w -> b 1 d h w")
    return rearrange(inside, "k b d h w -> b k d h w").masked_fill(unknown, -1)


# --- scores of a validation


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


def dice_per_region(prediction: Tensor, label: Tensor, membership: Tensor) -> list[float]:
    """Dice of every region over the annotated part of one volume.

    prediction and label (d, h, w) int64, indices among the labels; membership (k, labels) bool. nan
    for a region that is in neither.
    """
    annotated = label >= 0
    dice: list[float] = []
    for has_label in membership:
        predicted = has_label[prediction[annotated].long()]
        true = has_label[label[annotated]]
        both = (predicted & true).sum()
        dice.append((2 * both / (predicted.sum() + true.sum())).item())
    return dice
