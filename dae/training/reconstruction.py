"""Validation by reconstruction: fixed crops with fixed disruptions, the same in every run and on any ranks."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dae.data.batches import Batch, Crops, collate
from dae.figures import Triple
from dae.pretext.methods import Output, Pretext, l1_of
from dae.training.distributed import Ranks, gather_objects
from dae.training.precision import autocast


@torch.no_grad()
def reconstruct(
    pretext: Pretext,
    fixed: Crops,
    kinds: Sequence[str],
    *,
    count: int,
    dtype: torch.dtype | None,
    ranks: Ranks,
) -> tuple[dict[str, Any], list[Triple]]:
    """Mean L1 over `count` fixed crops, one at a time and shared out over the ranks; a picture of each modality."""
    started = time.perf_counter()
    pretext.eval()
    found: list[tuple[int, list[float], Triple | None]] = []
    for n in range(ranks.rank, count, ranks.world):
        batch = collate([fixed.fixed(n)]).to(ranks.device)
        drawn = pretext.draw(batch.x, batch.seeds)
        with autocast(dtype, ranks.device):
            result = pretext(batch.x, batch.modality, drawn)
        shown = n < len(
            set(fixed.modalities)
        )  # the modalities take turns: the first few crops are one of each
        found.append(
            (n, errors(batch, result)[0].tolist(), triple(batch, result, kinds) if shown else None)
        )
    pretext.train()
    crops = sorted(
        (crop for part in gather_objects(found) for crop in part), key=lambda crop: crop[0]
    )
    facts = by_modality([row for _, row, _ in crops], kinds)
    pictures = [picture for _, _, picture in crops if picture is not None]
    return {**facts, "crops": len(crops), "seconds": time.perf_counter() - started}, pictures


def errors(batch: Batch, result: Output) -> Tensor:
    """Of each sample its modality, L1(x_rec, x) and L1(x_hat, x), in intensities as normalised: (b, 3), float32."""
    l1, l1_input = l1_of(result.x_rec.detach(), batch.x), l1_of(result.x_hat, batch.x)
    return torch.stack([batch.modality.float(), l1, l1_input], dim=-1)


def by_modality(rows: Sequence[Sequence[float]], kinds: Sequence[str]) -> dict[str, Any]:
    """Means over samples, all together and of each modality: the events' `l1`, `l1_input` and their breakdown."""
    groups: dict[str, list[Sequence[float]]] = {}
    for row in rows:
        groups.setdefault(kinds[int(row[0])], []).append(row)
    return {
        "l1": average(rows, 1),
        "l1_input": average(rows, 2),
        "l1_by_modality": {kind: average(groups[kind], 1) for kind in sorted(groups)},
        "l1_input_by_modality": {kind: average(groups[kind], 2) for kind in sorted(groups)},
    }


def average(rows: Sequence[Sequence[float]], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)


def triple(batch: Batch, result: Output, kinds: Sequence[str]) -> Triple:
    x, x_hat, x_rec = (t[0].float().cpu().numpy() for t in (batch.x, result.x_hat, result.x_rec))
    return Triple(kinds[int(batch.modality[0])], x, x_hat, x_rec)
