"""dae/data/batches.py: sample j of step s is a function of (seed, s, j), on any number of ranks and workers."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dae.data.batches import Batch, Crops, addresses, by_turns, loader, spread
from dae.data.cache import Cached
from dae.errors import InputError

CROP = (3, 3, 3)
Sample = tuple[bytes, int, int]  # crop, modality, seed of the disruption


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Cached]:
    """Seven volumes of noise: no two crops are alike. Foreground is a single voxel."""
    made = []
    for n in range(7):
        folder = tmp_path_factory.mktemp("volume")
        np.save(
            folder / "image.npy",
            np.random.default_rng(n).normal(size=(1, 6, 7, 8)).astype(np.float16),
        )
        np.save(folder / "foreground.npy", np.array([[2, 3, 4]], dtype=np.int32))
        made.append(Cached(folder, (1, 6, 7, 8), (0.0,), (1.0, 1.0, 1.0)))
    return made


def make(
    volumes: list[Cached], *, seed: int = 0, global_batch: int = 4, foreground: float = 0.0
) -> Crops:
    """The modality of a sample is the number of its volume, so that it can be told."""
    return Crops(
        volumes,
        range(len(volumes)),
        CROP,
        seed=seed,
        global_batch=global_batch,
        foreground=foreground,
    )


def samples(batches: Iterator[Batch]) -> Iterator[Sample]:
    for batch in batches:
        yield from (
            (x.numpy().tobytes(), m, s)
            for x, m, s in zip(batch.x, batch.modality.tolist(), batch.seeds)
        )


def run(
    volumes: list[Cached], *, steps: range = range(5), workers: int = 0, **layout: Any
) -> dict[Any, Sample]:
    """Every sample of a run, by its (step, j), over all ranks."""
    found: dict[Any, Sample] = {}
    for rank in range(layout["world"]):
        places = list(addresses(steps.start, steps.stop, rank=rank, **layout))
        batches = loader(make(volumes), iter(places), workers=workers, pin=False)
        found |= dict(zip([place for batch in places for place in batch], samples(batches)))
    return found


@pytest.mark.parametrize(
    "world, batch_size, accumulate, workers",
    [
        (2, 2, 1, 0),
        (4, 1, 1, 0),
        (1, 2, 2, 0),
        (2, 1, 2, 0),
        (1, 1, 4, 0),
        (1, 4, 1, 2),
        (2, 2, 1, 2),
    ],
)
def test_samples_are_the_same_on_any_ranks_workers_and_micro_batches(
    world: int, batch_size: int, accumulate: int, workers: int, volumes: list[Cached]
) -> None:
    alone = run(volumes, world=1, batch_size=4, accumulate=1)
    found = run(volumes, workers=workers, world=world, batch_size=batch_size, accumulate=accumulate)
    assert sorted(alone) == [(step, j) for step in range(5) for j in range(4)]
    assert found == alone


@pytest.mark.parametrize(
    "world, batch_size, accumulate", [(1, 4, 1), (2, 2, 1), (3, 2, 2), (2, 1, 3)]
)
def test_ranks_take_parts_side_by_side_that_cover_the_global_batch(
    world: int, batch_size: int, accumulate: int
) -> None:
    """So one micro-batch of all ranks is that of one rank with a larger batch: CMCL sees the same samples."""
    layout = {"batch_size": batch_size, "accumulate": accumulate, "world": world}
    parts = [list(addresses(7, 9, rank=rank, **layout)) for rank in range(world)]
    micro_batches = [[*chain(*side_by_side)] for side_by_side in zip(*parts)]
    assert micro_batches == list(
        addresses(7, 9, batch_size=batch_size * world, accumulate=accumulate, rank=0, world=1)
    )
    size = world * batch_size * accumulate
    assert [*chain(*micro_batches)] == [(step, j) for step in (7, 8) for j in range(size)]


def test_every_step_every_place_and_every_seed_has_another_crop_and_disruption(
    volumes: list[Cached],
) -> None:
    one = make(volumes[:1])  # of a single volume, so that only the crop can differ
    found = [one[step, j] for step in range(6) for j in range(4)]
    assert len({seed for _, _, seed in found}) == 24
    assert len({x.numpy().tobytes() for x, _, _ in found}) > 12  # of 120 possible crops
    other = make(volumes[:1], seed=1)
    assert not {other[step, j][2] for step in range(6) for j in range(4)} & {
        seed for _, _, seed in found
    }


def test_a_sample_is_the_same_whenever_it_is_asked_for(volumes: list[Cached]) -> None:
    crops, again = make(volumes), make(volumes)
    late = crops[9, 3]
    crops[0, 0], crops[9, 2]
    for sample in (crops[9, 3], again[9, 3]):
        assert torch.equal(sample[0], late[0]) and sample[1:] == late[1:]


def test_every_epoch_sees_each_volume_once_in_an_order_of_its_own(volumes: list[Cached]) -> None:
    """Seven steps of three samples are three epochs of seven volumes; epochs begin within a step."""
    crops = make(volumes, global_batch=3)
    seen = [crops[step, j][1] for step in range(7) for j in range(3)]
    epochs = [seen[n : n + 7] for n in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = make(volumes, global_batch=3, seed=1)
    assert [other[step, j][1] for step in range(7) for j in range(3)] != seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_samples_of_an_uninterrupted_one(
    workers: int, volumes: list[Cached]
) -> None:
    layout = {"world": 1, "batch_size": 2, "accumulate": 2}
    whole = run(volumes, steps=range(8), **layout)
    resumed = run(volumes, steps=range(3, 8), workers=workers, **layout)
    assert resumed == {(step, j): sample for (step, j), sample in whole.items() if step >= 3}


def test_a_batch_is_stacked_in_float32_with_int64_modalities(volumes: list[Cached]) -> None:
    places = addresses(0, 1, batch_size=4, accumulate=1, rank=0, world=1)
    (batch,) = loader(make(volumes), places, workers=0, pin=False)
    assert (batch.x.shape, batch.x.dtype) == ((4, 1, *CROP), torch.float32)
    assert (batch.modality.shape, batch.modality.dtype, len(batch.seeds)) == ((4,), torch.int64, 4)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.x, batch.x) and moved.seeds == batch.seeds


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_does_not_move_the_global_generator(workers: int, volumes: list[Cached]) -> None:
    """A draw from it at the start of a run and another on resume would make two runs of one."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    places = addresses(0, 3, batch_size=2, accumulate=1, rank=0, world=1)
    assert len(list(islice(loader(make(volumes), places, workers=workers, pin=False), 3))) == 3
    assert torch.equal(torch.get_rng_state(), before)


# --- what cannot be read


def failure(crops: Any, *, workers: int, batch_size: int = 2) -> str:
    """The one line in which reading ends, in a process that must end, too: with its workers, or it would wait."""

    def read(answer: Any) -> None:
        places = addresses(0, 50, batch_size=batch_size, accumulate=1, rank=0, world=1)
        try:
            list(loader(crops, places, workers=workers, pin=False))
        except InputError as error:
            answer.send(str(error))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=read, args=(theirs,))
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout=60), "still waiting for a batch"
        told = ours.recv()
        process.join(timeout=60)
        assert process.exitcode == 0, "its workers hold it"
    finally:
        process.kill()
    assert "\n" not in told
    return str(told)


def no_worker_is_left() -> bool:
    for process in multiprocessing.active_children():
        process.join(timeout=20)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_volume_that_is_gone_ends_the_batches_in_one_line(
    workers: int, volumes: list[Cached], tmp_path: Path
) -> None:
    """As where a cache is cleaned while a run reads it."""
    copies = [volume._replace(path=tmp_path / str(n)) for n, volume in enumerate(volumes)]
    for n in (0, 1, 2, 3, 4, 6):
        shutil.copytree(volumes[n].path, copies[n].path)
    told = failure(make(copies), workers=workers)
    assert str(copies[5].path) in told and "--cache-dir" in told and "--resume" in told


def test_any_other_error_of_a_worker_is_named_too(volumes: list[Cached]) -> None:
    crops = make([volume._replace(background=()) for volume in volumes])
    crops.crop = (9, 9, 9)  # larger than the volumes, so that background is needed
    assert "a crop could not be read (" in failure(crops, workers=1)


def test_a_batch_that_shared_memory_does_not_hold_ends_them_as_well(volumes: list[Cached]) -> None:
    """torch would lose the batch, and wait for it. A limit on files holds for /dev/shm, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        told = failure(
            make(volumes, global_batch=64), workers=1, batch_size=64
        )  # 64 x 27 x 4 bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "/dev/shm" in told and "--workers" in told


class Stuck(Crops):
    """Hangs at step 3, as a read from a file server that is gone."""

    def __getitem__(self, address: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        if address[0] == 3:
            time.sleep(1e6)
        return super().__getitem__(address)


def test_workers_outlive_a_stop_signal_and_not_their_run(volumes: list[Cached]) -> None:
    """A scheduler signals the whole process group; the step that is running still needs its batches."""
    crops = Stuck(volumes, range(7), CROP, seed=0, global_batch=4)
    batches = loader(
        crops, addresses(0, 9, batch_size=4, accumulate=1, rank=0, world=1), workers=1, pin=False
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    assert len(list(islice(batches, 2))) == 2  # up to where it hangs
    batches.close()
    left = no_worker_is_left()
    worker.kill()
    assert left


# --- validation


def test_a_few_of_many_held_out_volumes_lie_evenly_over_each_modality() -> None:
    """16 of 500, whose list has its modalities in blocks of 300, 180 and 20."""
    kinds = [0] * 300 + [1] * 180 + [2] * 20
    chosen = spread(kinds, 16)
    assert [kinds[n] for n in chosen[:6]] == [0, 1, 2, 0, 1, 2] and len(set(chosen)) == 16
    assert Counter(kinds[n] for n in chosen) == {0: 6, 1: 5, 2: 5}
    assert sorted(n for n in chosen if kinds[n] == 0) == [
        25,
        75,
        125,
        175,
        225,
        275,
    ]  # the middles of six fiftieths
    assert sorted(n for n in chosen if kinds[n] == 1) == [
        300 + 18,
        300 + 54,
        300 + 90,
        300 + 126,
        300 + 162,
    ]


def test_where_few_are_held_out_all_are_taken_in_turn() -> None:
    kinds = [0, 0, 0, 1, 1, 2]
    assert spread(kinds, 16) == by_turns(kinds) and spread([], 16) == []


def test_fixed_crops_are_those_of_any_run(volumes: list[Cached]) -> None:
    one, other = make(volumes), make(volumes, seed=5, global_batch=7, foreground=0.3)
    for n in range(10):
        assert (
            torch.equal(one.fixed(n)[0], other.fixed(n)[0])
            and one.fixed(n)[1:] == other.fixed(n)[1:]
        )
    assert len({one.fixed(n)[2] for n in range(10)}) == 10


def test_fixed_crops_take_the_volumes_in_turn_and_lie_on_foreground(volumes: list[Cached]) -> None:
    crops = make(volumes)
    assert [crops.fixed(n)[1] for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    x, _, _ = crops.fixed(2)
    assert np.array_equal(x.numpy(), volumes[2].array()[:, 1:4, 2:5, 3:6])  # around voxel 2 3 4


@pytest.mark.parametrize(
    "kinds, turns",
    [
        ([0, 0, 0, 1, 1, 2], [0, 3, 5, 1, 4, 2]),
        ([2, 1, 0], [2, 1, 0]),
        ([1, 1, 1], [0, 1, 2]),
        ([], []),
    ],
)
def test_modalities_take_turns(kinds: list[int], turns: list[int]) -> None:
    """The first of each, in the order of the modalities, then the second of each, as long as there are any."""
    assert by_turns(kinds) == turns
