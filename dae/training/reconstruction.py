"""Validation of pre-training: fixed crops, disrupted or seen in views as in every other run."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dae.data.batches import Batch, Crops, collate
from dae.figures import Triple, Views
from dae.pretext.baselines import AnyPretext, ViewsOutput
from dae.pretext.methods import Output, Pretext, l1_of
from dae.training.distributed import Ranks, StopSignal, all_or_none, gather_objects
from dae.training.precision import autocast


class Restored(NamedTuple):
    """One crop of a validation."""

    n: int  # which of the fixed crops
    errors: list[float]  # see l1_of_samples
    picture: Triple | None


class Compared(NamedTuple):
    """One crop of a validation of a baseline."""

    n: int  # which of the fixed crops
    terms: dict[str, float]
    h: Tensor | None  # (1, 2, e), the projections of its views
    picture: Views | None


C = TypeVar("C", Restored, Compared)


@torch.no_grad()
def reconstruct(
    pretext: Pretext,
    fixed: Crops,
    modalities: Sequence[str],
    *,
    count: int,
    dtype: torch.dtype | None,
    ranks: Ranks,
    signal: StopSignal,
) -> tuple[dict[str, Any], list[Triple]]:
    """Mean L1 over `count` fixed crops, and a picture of every modality.

    The ranks share the crops. Each crop is a batch of its own, so that the result does not depend
    on how many ranks there are. Raises Stopped, on all ranks, soon after a stop signal.
    """
    started = time.perf_counter()
    # The modalities of the fixed crops take turns: the first few crops are one of each.
    pictured = len(set(fixed.modalities))

    pretext.eval()
    own: list[Restored] = []
    with all_or_none():
        for n in range(ranks.rank, count, ranks.world):
            signal.check()
            batch, output = output_of(pretext, fixed, n, dtype=dtype, ranks=ranks)
            errors = l1_of_samples(batch, output)[0].tolist()
            picture = picture_of(batch, output, modalities) if n < pictured else None
            own.append(Restored(n, errors, picture))
    pretext.train()

    crops = of_all_ranks(own)
    metrics = by_modality([crop.errors for crop in crops], modalities)
    pictures = [crop.picture for crop in crops if crop.picture is not None]
    return {**metrics, "crops": len(crops), "seconds": time.perf_counter() - started}, pictures


@torch.no_grad()
def compare_views(
    pretext: AnyPretext,
    fixed: Crops,
    modalities: Sequence[str],
    *,
    count: int,
    dtype: torch.dtype | None,
    ranks: Ranks,
    signal: StopSignal,
) -> tuple[dict[str, Any], list[Views]]:
    """The terms of a baseline's loss over `count` fixed crops, and a picture of every modality.

    As in `reconstruct` each crop is a batch of its own. The contrast compares all crops together.
    Raises Stopped, on all ranks, soon after a stop signal.
    """
    started = time.perf_counter()
    pictured = len(set(fixed.modalities))

    pretext.eval()
    own: list[Compared] = []
    with all_or_none():
        for n in range(ranks.rank, count, ranks.world):
            signal.check()
            batch, output = output_of(pretext, fixed, n, dtype=dtype, ranks=ranks)
            terms = {name: float(value) for name, value in output.terms.items()}
            h = None if output.h is None else output.h.cpu()
            picture = views_of(batch, output, modalities) if n < pictured else None
            own.append(Compared(n, terms, h, picture))
    pretext.train()

    crops = of_all_ranks(own)
    means: dict[str, Any] = {}
    for name in pretext.terms:
        means[name] = sum(crop.terms[name] for crop in crops) / len(crops)

    projections = [crop.h for crop in crops if crop.h is not None]
    if projections:
        contrast, accuracy = pretext.contrast(torch.cat(projections))
        means["contrast"] = float(contrast)
        means["contrast_accuracy"] = float(accuracy)

    validation = {
        "loss": sum(means[name] for name in pretext.losses),
        **means,
        "chance": pretext.chance(len(crops)),
        "crops": len(crops),
        "seconds": time.perf_counter() - started,
    }
    pictures = [crop.picture for crop in crops if crop.picture is not None]
    return validation, pictures


def output_of(
    pretext: AnyPretext,
    fixed: Crops,
    n: int,
    *,
    dtype: torch.dtype | None,
    ranks: Ranks,
) -> tuple[Batch, Any]:
    """The n-th fixed crop as a batch of its own, and what the method makes of it."""
    batch = collate([fixed.fixed(n)]).to(ranks.device)
    drawn = pretext.draw(batch.x, batch.seeds)
    with autocast(dtype, ranks.device):
        return batch, pretext(batch.x, batch.modality, drawn)


def of_all_ranks(own: list[C]) -> list[C]:
    """The crops of all ranks, in their order."""
    crops: list[C] = []
    for of_rank in gather_objects(own):
        crops += of_rank
    return sorted(crops, key=lambda crop: crop.n)


def l1_of_samples(batch: Batch, output: Output) -> Tensor:
    """The modality, L1(x_rec, x) and L1(x_hat, x) of every sample: (b, 3), float32.

    Both L1 are in intensities as normalised.
    """
    l1 = l1_of(output.x_rec.detach(), batch.x)
    l1_input = l1_of(output.x_hat, batch.x)
    return torch.stack([batch.modality.float(), l1, l1_input], dim=-1)


def by_modality(rows: Sequence[Sequence[float]], modalities: Sequence[str]) -> dict[str, Any]:
    """Means over rows of `l1_of_samples`, all together and for each modality."""
    groups: dict[str, list[Sequence[float]]] = {}
    for row in rows:
        groups.setdefault(modalities[int(row[0])], []).append(row)
    names = sorted(groups)
    return {
        "l1": average(rows, 1),
        "l1_input": average(rows, 2),
        "l1_by_modality": {name: average(groups[name], 1) for name in names},
        "l1_input_by_modality": {name: average(groups[name], 2) for name in names},
    }


def average(rows: Sequence[Sequence[float]], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)


def picture_of(batch: Batch, output: Output, modalities: Sequence[str]) -> Triple:
    """The first sample of a batch: x, x_hat, x_rec, (c, d, h, w) each."""
    x, x_hat, x_rec = (t[0].float().cpu().numpy() for t in (batch.x, output.x_hat, output.x_rec))
    return Triple(modalities[int(batch.modality[0])], x, x_hat, x_rec)


def views_of(batch: Batch, output: ViewsOutput, modalities: Sequence[str]) -> Views:
    """The one sample of a batch: x, its views, and what was made of them."""
    panels = [("x", batch.x[0])]
    for n, view in enumerate(output.views, start=1):
        panels.append((f"view {n}", view))
    for n, x_rec in enumerate([] if output.x_rec is None else output.x_rec, start=1):
        panels.append((f"x_rec {n}", x_rec))

    pictures = [(name, volume.float().cpu().numpy()) for name, volume in panels]
    return Views(modalities[int(batch.modality[0])], pictures)
