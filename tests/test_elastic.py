"""Another number of ranks, the same global batch: the same samples, none lost, none twice."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from torch.utils.data import Dataset

from dae.config.pretrain import PretrainConfig
from dae.data.batches import Address
from dae.training import resume
from dae.training.distributed import Ranks
from dae.training.run import read_ahead

STEPS = 6
Shape = tuple[int, int, int]  # ranks, --batch-size, --accumulate


class Echo(Dataset[Address]):
    """In place of crops: an address itself."""

    def __getitem__(self, address: Address) -> Address:
        return address


def shapes_of(samples: int) -> list[Shape]:
    """Every way to have so many samples a step."""
    numbers = range(1, samples + 1)
    every = itertools.product(numbers, numbers, numbers)
    return [shape for shape in every if shape[0] * shape[1] * shape[2] == samples]


def seen(shape: Shape, *, start: int, stop: int, workers: int = 0) -> list[list[Address]]:
    """What the loaders of all ranks yield from step `start` to before `stop`, step by step.

    Within a step: micro-batch by micro-batch, in each of them rank by rank.
    """
    world, batch_size, accumulate = shape
    config = PretrainConfig(
        steps=stop, batch_size=batch_size, accumulate=accumulate, workers=workers
    )
    cpu = torch.device("cpu")
    loaders: list[Any] = []
    for rank in range(world):
        loaders.append(read_ahead(Echo(), config, Ranks(rank, world, cpu), step=start, gather=list))

    steps = []
    for _ in range(start, stop):
        step: list[Address] = []
        for _ in range(accumulate):
            for loader in loaders:
                step += next(loader)
        steps.append(step)
    for loader in loaders:
        assert next(loader, None) is None  # and nothing after the last step
    return steps


def whole(samples: int) -> list[list[Address]]:
    return [[(step, j) for j in range(samples)] for step in range(STEPS)]


@pytest.mark.parametrize("samples", [1, 7, 12, 24])
def test_every_factorisation_of_a_global_batch_sees_the_same_samples_in_the_same_order(
    samples: int,
) -> None:
    for shape in shapes_of(samples):
        assert seen(shape, start=0, stop=STEPS) == whole(samples), shape


@pytest.mark.parametrize("samples", [12, 24])
def test_a_run_that_changes_its_ranks_at_any_step_loses_no_sample_and_sees_none_twice(
    samples: int,
) -> None:
    """Every factorisation before, every one after; those of 1, 2, 3 and 4 ranks in a row."""
    shapes = shapes_of(samples)
    for n, (before, after) in enumerate(itertools.product(shapes, shapes)):
        change = n % (STEPS + 1)
        steps = seen(before, start=0, stop=change) + seen(after, start=change, stop=STEPS)
        assert steps == whole(samples), (before, after)

    few = [shape for shape in shapes if shape[0] <= 4]
    by_ranks = [[shape for shape in few if shape[0] == world] for world in (4, 3, 1, 2)]
    for row in zip(*by_ranks):
        steps = []
        for start, shape in zip((0, 1, 3, 5), row):
            steps += seen(shape, start=start, stop=min(start + 2, STEPS) if start else 1)
        assert steps == whole(samples), row


def test_processes_that_read_ahead_change_nothing() -> None:
    assert seen((3, 2, 2), start=2, stop=STEPS, workers=2) == whole(12)[2:]


# --- a global batch that cannot be kept


def test_a_refusal_names_every_pair_of_flags_that_keeps_the_global_batch() -> None:
    for samples, world in ((12, 1), (12, 3), (24, 4)):
        saved = {"global_batch": samples}
        line = refusal(
            resume.check_same_batch,
            Path("last.pt"),
            saved,
            PretrainConfig(batch_size=5, accumulate=1),
            world=world,
        )
        assert "last.pt was started with" in line
        pairs = re.findall(r"\b(\d+) x (\d+)\b", line.partition("--accumulate is ")[2])
        named = [(world, int(batch), int(accumulate)) for batch, accumulate in pairs]
        assert sorted(named) == [shape for shape in shapes_of(samples) if shape[0] == world]
        for _, batch, accumulate in named:
            config = PretrainConfig(batch_size=batch, accumulate=accumulate)
            resume.check_same_batch(Path("last.pt"), saved, config, world=world)


def test_ranks_that_cannot_share_the_global_batch_are_told_how_many_can() -> None:
    config = PretrainConfig(batch_size=2, accumulate=1)
    saved = {"global_batch": 12}
    line = refusal(resume.check_same_batch, Path("last.pt"), saved, config, world=5)
    assert line.endswith("5 ranks cannot share 12 evenly; start 1 or 2 or 3 or 4 or 6 or 12 ranks")
