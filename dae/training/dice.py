"""Losses of fine-tuning: Dice (section 2, "we use a Dice loss"), alone or with cross-entropy.

Axis letters: b batch, k classes, d h w grid.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) of softmax P and truth T, mean over what is in each sample. float32, a scalar.

    logits (b, k, d, h, w), label (b, d, h, w) int64. A class that a crop does not hold is left out: its term would be
    1 for the faintest probability, all but without a gradient, and only lift the loss.
    """
    p = logits.float().softmax(dim=1)
    t = rearrange(F.one_hot(label, logits.shape[1]), "b d h w k -> b k d h w").float()
    both = reduce(p * t, "b k d h w -> b k", "sum")
    sizes = reduce(p + t, "b k d h w -> b k", "sum")
    present = (reduce(t, "b k d h w -> b k", "sum") > 0).float()
    dice = (2 * both + SMOOTH) / (sizes + SMOOTH)
    return 1 - (dice * present).sum() / present.sum()


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label)


def dice_and_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """The authors' code's, with equal weights."""
    return dice_loss(logits, label) + cross_entropy(logits, label)


LOSSES = {"dice": dice_loss, "dice_ce": dice_and_cross_entropy}


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> list[float]:
    """Dice of each class but the background over one volume; nan where it is in neither."""
    both = torch.bincount(label[prediction == label].flatten(), minlength=classes)
    sizes = torch.bincount(label.flatten(), minlength=classes) + torch.bincount(prediction.flatten(), minlength=classes)
    return (2 * both / sizes)[1:].tolist()
