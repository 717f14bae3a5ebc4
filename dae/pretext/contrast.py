"""Cross-modal contrastive learning (CMCL), eq. 3 and 4; and NT-Xent, of Table 4's baselines.

Features of the same modality become similar, features of two modalities become dissimilar.
Everything here is float32, also under autocast: in bf16 the similarities lose the digits that
separate the modalities.

Axis letters: b batch, c channels, d h w grid, n (and m) the samples of all ranks.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F


def embed(state: Tensor, z: str = "pooled") -> Tensor:
    """z_i of eq. 3: the feature of each sample, from the bottleneck state (b, c, d, h, w).

    pooled  the mean over space, at length 1 ("cosine similarity"): (b, c)
    flat    the authors' code: every value, not normalised: (b, c d h w)
    """
    state = state.float()
    if z == "flat":
        return rearrange(state, "b c d h w -> b (c d h w)")
    return F.normalize(reduce(state, "b c d h w -> b c", "mean"), dim=-1)


def cmcl(z: Tensor, modality: Tensor, *, temperature: float = 0.07, form: str = "bce") -> Tensor:
    """CE(z_sim, z_label) of eq. 4, without its alpha: a scalar.

    z (n, c) and modality (n,) are those of all ranks; form is a key of FORMS; temperature is t.
    One sample alone moves no feature. Of one modality alone, `bce` and `softmax` draw all features
    together, since there is nothing to tell them from.
    """
    return FORMS[form](z, modality, temperature)


def binary_cross_entropy(z: Tensor, modality: Tensor, temperature: float) -> Tensor:
    """Eq. 4 as written: the binary cross-entropy of the label matrix, mean over n x n entries.

    "Across each axis" changes nothing: z_sim is symmetric, so both axes give the same number.
    """
    z_sim = similarity(z, temperature)
    z_label = same_modality(modality)
    return F.binary_cross_entropy_with_logits(z_sim, z_label)


def softmax(z: Tensor, modality: Tensor, temperature: float) -> Tensor:
    """Similarities divided by t; the positives of a row share its probability evenly."""
    logits = inner_products(z) / temperature
    z_label = same_modality(modality)
    shares = z_label / z_label.sum(1, keepdim=True)
    return cross_entropy_along_both_axes(logits, shares)


def ranks(z: Tensor, modality: Tensor, temperature: float) -> Tensor:
    """The authors' code: cross-entropy with a *column* as the target of each sample.

    It is the rank of the sample's modality among those present.
    """
    z_sim = similarity(z, temperature)
    _, columns = torch.unique(modality, return_inverse=True)
    return cross_entropy_along_both_axes(z_sim, columns)


FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "bce": binary_cross_entropy,
    "softmax": softmax,
    "ranks": ranks,
}


def similarity(z: Tensor, temperature: float) -> Tensor:
    """z_sim = z z^T exp(t), eq. 3: (n, n). With t = 0.07 the factor is 1.07, not 1 / 0.07."""
    return inner_products(z) * math.exp(temperature)


def inner_products(z: Tensor) -> Tensor:
    """z z^T: (n, c) -> (n, n). Cosines where z has length 1."""
    with torch.autocast(z.device.type, enabled=False):
        return z @ rearrange(z, "n c -> c n")


def same_modality(modality: Tensor) -> Tensor:
    """z_label of eq. 4: 1 where two samples share their modality, else 0. (n,) -> (n, n).

    A sample shares it with itself, so the diagonal is 1.
    """
    return (rearrange(modality, "n -> n 1") == rearrange(modality, "m -> 1 m")).float()


def cross_entropy_along_both_axes(logits: Tensor, target: Tensor) -> Tensor:
    """The mean of the cross-entropy of rows and of columns.

    logits (n, m); target: a column for each row (n,), or shares of probability (n, m).
    """
    of_rows = F.cross_entropy(logits, target)
    of_columns = F.cross_entropy(rearrange(logits, "n m -> m n"), target)
    return (of_rows + of_columns) / 2


# --- Table 4


def nt_xent(h: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent, eq. 1 of Chen et al. 2020: each view is to find the other view of its own sample.

    h (n, 2, e): the projections of both views of the samples of all ranks. Returns the mean over
    all 2n views, and the share of them whose nearest view is the right one; 1 / (2n - 1) by chance.
    """
    n = len(h)
    z = F.normalize(rearrange(h.float(), "n v e -> (v n) e"), dim=-1)

    # A view is not compared with itself.
    itself = torch.eye(2 * n, dtype=torch.bool, device=h.device)
    logits = (inner_products(z) / temperature).masked_fill(itself, float("-inf"))

    # The other view of view i lies n further on, or n back.
    other = torch.arange(2 * n, device=h.device).roll(n)
    found = logits.argmax(dim=1) == other
    return F.cross_entropy(logits, other), found.float().mean()


# --- has it collapsed?


def effective_rank(z: Tensor) -> float:
    """Roy & Vetterli 2007: exp of the entropy of the singular values of z (n, c), of sum 1.

    Between 1, where all samples have one feature, and the smaller of n and c. The features are not
    centred, as in that work: centred, a collapsed z would be rounding alone, which has a high rank.
    """
    values = torch.linalg.svdvals(z.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


# --- over several ranks


def gather(z: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """The features (with gradient) and modalities of all ranks, in order of rank: (n, c), (n,)."""
    return gather_one(z), gather_one(modality)


def gather_one(z: Tensor) -> Tensor:
    """The rows of all ranks, in order of rank, with gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return z
    rows: Tensor = GatherWithGradient.apply(z)
    return rows


class GatherWithGradient(torch.autograd.Function):
    """The tensors of all ranks, concatenated along the batch.

    A gather without gradient gives the right loss and, over W ranks, 1/W of its gradient: the loss
    of every rank depends on the features of every rank, so backward sums over the ranks.
    """

    @staticmethod
    def forward(context: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]
