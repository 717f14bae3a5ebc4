"""Features of volumes: the states of an encoder on fixed crops, and what they tell of volumes.

The crops are a function of (seed, number) and the volume alone, and always centred on foreground.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dae.config.command_line import with_tuples
from dae.config.evaluate import CkaConfig, EmbedConfig, FeaturesConfig
from dae.config.shared import DataConfig
from dae.data import datalist
from dae.data.batches import VALIDATION, Crops
from dae.data.cache import Cached
from dae.data.datalist import Item
from dae.data.preprocess import Recipe
from dae.errors import InputError, counted
from dae.evaluation import cases
from dae.pretext.contrast import effective_rank
from dae.training.kernels import lay_out
from dae.weights.foreign import Weights
from dae.weights.plan import DATA_OPTIONS, flag, network_of_plan
from dae.weights.transfer import transfer

Array = NDArray[np.float64]

# What two networks that are compared need not have in common. Checkpointing changes no value. With
# one network's layer norm on the states of both, no difference is due to the norm.
FREE = ("checkpointing", "normalize_hidden")


# --- the network


def encoder_of(
    weights: Weights,
    path: Path,
    config: FeaturesConfig,
    device: torch.device,
    *,
    plan: Mapping[str, Any] | None = None,
) -> Any:
    """The network of any file of weights, for `states_of`; its decoder and head have no weights.

    plan: of another network, to build this one as that one is. Raises InputError where the weights
    have no whole encoder.
    """
    built_as = {**(plan or weights.plan)}
    built_as.pop("probe", None)  # a probe has the encoder of its backbone
    network: Any = network_of_plan(built_as, config, path)

    # One that was trained on another number of channels is adapted as fine-tuning adapts it.
    transfer(network, weights.tensors, ["encoder"], path)
    network = network.to(device).eval()
    lay_out(network, device, compiled=False)
    return network


def check_same_network(before: Weights, after: Weights, config: CkaConfig) -> None:
    """Raises InputError where two files are of networks that cannot be compared."""
    options = {"backbone": after.plan["backbone"], **after.plan["arguments"]}
    options_before = {"backbone": before.plan["backbone"], **before.plan["arguments"]}
    for name, value in options.items():
        other = options_before.get(name, value)
        if name not in FREE and other != value:
            raise InputError(
                f"{config.before}: made with {flag(name, other)}, {config.after} with "
                f"{flag(name, value)}; compare two files of one network"
            )


@torch.no_grad()
def states_of(network: Any, x: Tensor) -> list[Tensor]:
    """One crop (c, d, h, w) -> the states of the encoder, (c, d, h, w) each, float32, on the CPU.

    A crop is a batch of its own, so that a state does not depend on its company.
    """
    device = next(network.parameters()).device
    states = network.encode(network.tokenize(x[None].to(device)))
    return [state[0].float().cpu() for state in states]


# --- the volumes


def data_options(plan: Mapping[str, Any]) -> DataConfig:
    """How the plan's network is fed. What a foreign file does not tell is at its default."""
    known = {name: plan[name] for name in DATA_OPTIONS if name in plan}
    return DataConfig(**with_tuples(known))


def recipe_of(plan: Mapping[str, Any]) -> Recipe:
    """How volumes are prepared for the plan's network."""
    return Recipe.of(data_options(plan), foreground_crop=plan.get("foreground_crop", False))


def items_for(items: Sequence[Item], plan: Mapping[str, Any]) -> list[Item]:
    """The items as the network takes them, without labels: no crop depends on where an organ is.

    Each channel is an item of its own where the network takes one, as in pre-training.
    """
    plain = [replace(item, label=None) for item in items]
    if plan["in_channels"] == 1:
        return list(datalist.channels_of(plain))
    return plain


def names_of(items: Sequence[Item]) -> list[str]:
    """A name for each item. The channels of one file are told apart by their modality."""
    files = list(dict.fromkeys(item.image[0] for item in items))
    name_of_file = dict(zip(files, cases.case_names(files)))

    names = []
    for item in items:
        name = name_of_file[item.image[0]]
        if item.channel and item.channel[1] > 1:
            name = f"{name}_{item.modality_name}"
        names.append(name)
    return names


def fixed_crops(volumes: Sequence[Cached], plan: Mapping[str, Any]) -> Crops:
    """For `crop_of`."""
    crop = data_options(plan).crop
    return Crops(volumes, [0] * len(volumes), crop, seed=0, global_batch=1)


def crop_of(crops: Crops, volume: int, number: int, seed: int) -> Tensor:
    """Crop `number` of a volume, (c, d, h, w).

    It does not change when other volumes join. (Of seed 0 it is the crop of this number that
    validates pre-training, where that is cut from this volume.)
    """
    x, _, _ = crops.sample(volume, [seed, VALIDATION, number], foreground=1.0)
    return x.float()


def states_of_both(
    before: Any, after: Any, crops: Crops, config: CkaConfig
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The states of both networks on each of --crops crops; the volumes take turns."""
    for number in tqdm(range(config.crops), "crops", disable=not sys.stderr.isatty()):
        x = crop_of(crops, number % len(crops.volumes), number, config.seed)
        yield states_of(before, x), states_of(after, x)


def vector_of(network: Any, crops: Crops, volume: int, config: EmbedConfig) -> Array:
    """The bottleneck's mean over space and over --crops crops of one volume: (c,), float64.

    Of each crop it is z of eq. 3 before z is scaled to length 1.
    """
    means = []
    for number in range(config.crops):
        bottleneck = states_of(network, crop_of(crops, volume, number, config.seed))[-1]
        means.append(reduce(bottleneck.double(), "c d h w -> c", "mean"))
    return torch.stack(means).mean(dim=0).numpy()


def write_vectors(path: Path, *, features: Array, **names: Sequence[str]) -> None:
    """An .npz of the vectors (n, c) and, by their order, of what each is of; without pickles."""
    arrays: dict[str, Any] = {"features": features}
    for key, values in names.items():
        arrays[key] = np.array(values, dtype=np.str_)
    np.savez(path, **arrays)


# --- what the vectors of many volumes tell


def summary_of(
    vectors: Array, modalities: Sequence[str], subjects: Sequence[str]
) -> dict[str, Any]:
    """Effective rank and nearest neighbours of vectors (n, c)."""
    z = unit(vectors)
    return {
        "volumes": len(z),
        "channels": z.shape[1],
        "effective_rank": effective_rank(torch.from_numpy(z)),
        "nearest_neighbour": nearest_neighbours(z, modalities, subjects)._asdict(),
    }


def in_words(summary: Mapping[str, Any]) -> str:
    """A summary in one line."""
    nearest = summary["nearest_neighbour"]
    text = (
        f"effective rank {summary['effective_rank']:.1f} of {counted(summary['volumes'], 'volume')}"
    )
    if not nearest["n"]:
        return f"{text}; no modality is that of two subjects, so neighbours tell nothing"
    return (
        f"{text}; the nearest neighbour has the same modality for {nearest['accuracy']:.0%} "
        f"of {nearest['n']}, by chance for {nearest['chance']:.0%}"
    )


def unit(features: NDArray[Any]) -> Array:
    """Each row at length 1, as CMCL compares them: (n, c) -> (n, c)."""
    rows = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, np.finfo(np.float64).tiny)


def principal_plane(features: Array) -> tuple[Array, Array]:
    """The first two principal components: (n, c) -> (n, 2), and their shares of the variance (2,).

    Zeros where there are fewer. The sign of each is such that its largest value is positive.
    """
    u, values, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    points = np.zeros((len(features), 2))
    shares = np.zeros(2)
    for k in range(min(2, len(values))):
        column = u[:, k] * values[k]
        sign = np.sign(column[np.abs(column).argmax()])
        points[:, k] = sign * column
        shares[k] = values[k] ** 2 / max((values**2).sum(), np.finfo(np.float64).tiny)
    return points, shares


class Neighbours(NamedTuple):
    """How often the volume that is most alike has the same modality."""

    accuracy: float  # nan where n is 0
    chance: float  # of a volume that is drawn from the same ones
    n: int  # volumes with another subject of their modality


def nearest_neighbours(z: Array, modalities: Sequence[str], subjects: Sequence[str]) -> Neighbours:
    """For every row of z (n, c), at length 1, that of another subject with the highest cosine.

    A volume is left out where no other subject has its modality: its neighbour cannot be right.
    """
    similarity = z @ z.T
    modality = np.array(modalities)
    subject = np.array(subjects)

    right = []
    chances = []
    for n in range(len(z)):
        others = np.flatnonzero(subject != subject[n])
        is_same = modality[others] == modality[n]
        if not is_same.any():
            continue
        right.append(bool(is_same[similarity[n, others].argmax()]))
        chances.append(float(is_same.mean()))

    if not right:
        return Neighbours(math.nan, math.nan, 0)
    return Neighbours(sum(right) / len(right), sum(chances) / len(chances), len(right))
