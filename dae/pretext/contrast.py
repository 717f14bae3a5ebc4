"""Cross-modal contrastive learning, eq. 3 and 4: features of one modality together, of two apart.

Axis letters: b batch, c channels, d h w grid, n samples of the batch over all ranks.
All of it in float32, whatever autocast says: similarities of bf16 features lose the digits that separate modalities.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F


def embed(state: Tensor, z: str = "pooled") -> Tensor:
    """z_i of eq. 3 from the bottleneck state. (b, c, d, h, w) -> (b, c), of length 1.

    The paper says "cosine similarity" and no more. `flat` is the authors': every value, (b, c d h w), not normalised.
    """
    if z == "flat":
        return rearrange(state.float(), "b c d h w -> b (c d h w)")
    return F.normalize(reduce(state.float(), "b c d h w -> b c", "mean"), dim=-1)


class GatherWithGradient(torch.autograd.Function):
    """The tensors of all ranks, one below the other. A gather without gradient gives the right loss and, over W ranks,
    1/W of its gradient: every rank's loss depends on every rank's features, so backward sums over the ranks.
    """

    @staticmethod
    def forward(context: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        everyone = gradients[0].clone()
        dist.all_reduce(everyone)
        return everyone.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """The features (with gradient) and modalities of all ranks, in the order of the ranks: (n, c), (n,)."""
    if not (dist.is_available() and dist.is_initialized()):
        return z, modality
    features: Tensor = GatherWithGradient.apply(z)
    return features, GatherWithGradient.apply(modality)


def similarity(z: Tensor, temperature: float) -> Tensor:
    """z_sim = z z^T exp(t), eq. 3: (n, n). With t = 0.07 the factor is 1.07, not 1 / 0.07."""
    with torch.autocast(z.device.type, enabled=False):
        return z @ rearrange(z, "n c -> c n") * math.exp(temperature)


def same_modality(modality: Tensor) -> Tensor:
    """z_label of eq. 4: 1 where two samples (or a sample and itself) share their modality, else 0. (n,) -> (n, n)."""
    return (rearrange(modality, "n -> n 1") == rearrange(modality, "m -> 1 m")).float()


def cmcl(z: Tensor, modality: Tensor, *, temperature: float = 0.07, form: str = "bce") -> Tensor:
    """CE(z_sim, z_label) of eq. 4, without its alpha. z (n, c) and modality (n,), of all ranks -> a scalar.

    bce      binary cross-entropy of the label matrix, mean over its n x n entries. z_sim is symmetric, so "across
             each axis" is the same number twice.
    softmax  each row's positives share its probability, similarities divided by t; rows and columns averaged.
    ranks    the authors': cross-entropy with the rank of a sample's modality among those present as its *column*.
    """
    z_sim, z_label = similarity(z, temperature), same_modality(modality)
    if form == "bce":
        return F.binary_cross_entropy_with_logits(z_sim, z_label)
    if form == "softmax":
        logits = similarity(z, 0.0) / temperature
        share = z_label / z_label.sum(1, keepdim=True)
    else:
        logits, share = z_sim, torch.unique(modality, return_inverse=True)[1]
    return (
        F.cross_entropy(logits, share) + F.cross_entropy(rearrange(logits, "n m -> m n"), share)
    ) / 2
