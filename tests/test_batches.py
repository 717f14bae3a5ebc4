"""dae/data/batches.py: sample j of a step is a function of (seed, step, j), however it is read."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dae.config.segment import AugmentConfig
from dae.data.augment import augment, crop
from dae.data.batches import (
    Batch,
    Crops,
    LabelledBatch,
    LabelledCrops,
    addresses,
    by_turns,
    class_index,
    collate,
    collate_labelled,
    loader,
    spread_over_modalities,
    why_unread,
)
from dae.data.cache import Cached
from dae.data.sides import Flips
from dae.errors import InputError

CROP = (3, 3, 3)
SIZE = (6, 7, 8)

Address = tuple[int, int]  # (step, j)
Sample = tuple[bytes, int, int]  # crop, modality, seed of the disruption


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Cached]:
    """Seven volumes of noise: no two crops are alike. Foreground is a single voxel."""
    volumes = []
    for n in range(7):
        folder = tmp_path_factory.mktemp("volume")
        rng = np.random.default_rng(n)
        np.save(folder / "image.npy", rng.normal(size=(1, *SIZE)).astype(np.float16))
        label = rng.choice(np.array([0, 2, 7, 9], np.uint8), SIZE)
        label[2, 3, 4] = 9
        np.save(folder / "label.npy", label)
        np.save(folder / "foreground.npy", np.array([[2, 3, 4]], dtype=np.int32))
        volumes.append(Cached(folder, (1, *SIZE), (0.0,), (1.0, 1.0, 1.0)))
    return volumes


def crops_of(
    volumes: list[Cached], *, seed: int = 0, global_batch: int = 4, foreground: float = 0.0
) -> Crops:
    """The modality of a sample is the number of its volume, so that it can be told."""
    modalities = range(len(volumes))
    return Crops(
        volumes, modalities, CROP, seed=seed, global_batch=global_batch, foreground=foreground
    )


def one_rank(steps: int, batch_size: int) -> Iterator[list[Address]]:
    """The addresses of a run on one rank without accumulation."""
    return addresses(0, steps, batch_size=batch_size, accumulate=1, rank=0, world=1)


def samples(batches: Iterator[Batch]) -> Iterator[Sample]:
    for batch in batches:
        for x, modality, seed in zip(batch.x, batch.modality.tolist(), batch.seeds):
            yield x.numpy().tobytes(), modality, seed


def run(
    volumes: list[Cached], *, steps: range = range(5), workers: int = 0, **layout: Any
) -> dict[Address, Sample]:
    """Every sample of a run, by its (step, j), over all ranks."""
    by_address: dict[Address, Sample] = {}
    for rank in range(layout["world"]):
        micro_batches = list(addresses(steps.start, steps.stop, rank=rank, **layout))
        batches = loader(crops_of(volumes), iter(micro_batches), workers=workers, pin=False)
        by_address |= dict(zip(chain(*micro_batches), samples(batches)))
    return by_address


# --- (seed, step, j) ------------------------------------------------------------------------------


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
    shared = run(
        volumes, workers=workers, world=world, batch_size=batch_size, accumulate=accumulate
    )
    assert len(alone) == 5 * 4
    assert shared == alone


@pytest.mark.parametrize(
    "world, batch_size, accumulate", [(1, 4, 1), (2, 2, 1), (3, 2, 2), (2, 1, 3)]
)
def test_the_parts_of_the_ranks_follow_each_other_and_cover_the_global_batch(
    world: int, batch_size: int, accumulate: int
) -> None:
    """A micro-batch of all ranks is that of one rank with a larger batch: CMCL is the same."""
    layout = {"batch_size": batch_size, "accumulate": accumulate, "world": world}
    of_ranks = [addresses(7, 9, rank=rank, **layout) for rank in range(world)]
    micro_batches = [list(chain(*parts)) for parts in zip(*of_ranks)]
    alone = addresses(7, 9, batch_size=batch_size * world, accumulate=accumulate, rank=0, world=1)
    assert micro_batches == list(alone)

    global_batch = world * batch_size * accumulate
    assert list(chain(*micro_batches)) == list(product((7, 8), range(global_batch)))


def test_every_step_every_j_and_every_seed_has_another_crop_and_disruption(
    volumes: list[Cached],
) -> None:
    """Of a single volume, so that only the crop can differ."""
    crops = crops_of(volumes[:1])
    other = crops_of(volumes[:1], seed=1)
    batch = list(product(range(6), range(4)))

    seeds = {crops[address][2] for address in batch}
    assert len(seeds) == 24
    assert not seeds & {other[address][2] for address in batch}

    distinct = {crops[address][0].numpy().tobytes() for address in batch}
    assert len(distinct) > 12  # of 120 possible crops


def test_a_sample_is_the_same_whenever_it_is_asked_for(volumes: list[Cached]) -> None:
    crops = crops_of(volumes)
    first = crops[9, 3]
    _ = crops[0, 0]
    _ = crops[9, 2]
    for again in (crops[9, 3], crops_of(volumes)[9, 3]):
        assert torch.equal(again[0], first[0])
        assert again[1:] == first[1:]


def test_every_epoch_sees_each_volume_once_in_an_order_of_its_own(volumes: list[Cached]) -> None:
    """Seven steps of three samples are three epochs of seven volumes, begun within a step."""
    batch = list(product(range(7), range(3)))
    crops = crops_of(volumes, global_batch=3)
    seen = [crops[address][1] for address in batch]
    epochs = [tuple(seen[n : n + 7]) for n in (0, 7, 14)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(7))
    assert len(set(epochs)) == 3

    other = crops_of(volumes, global_batch=3, seed=1)
    assert [other[address][1] for address in batch] != seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_samples_of_an_uninterrupted_one(
    workers: int, volumes: list[Cached]
) -> None:
    layout = {"world": 1, "batch_size": 2, "accumulate": 2}
    whole = run(volumes, steps=range(8), **layout)
    resumed = run(volumes, steps=range(3, 8), workers=workers, **layout)
    assert resumed == {address: sample for address, sample in whole.items() if address[0] >= 3}


def test_a_batch_travels_in_float16_with_int64_modalities_and_is_float32_on_its_device(
    volumes: list[Cached],
) -> None:
    (batch,) = loader(crops_of(volumes), one_rank(1, 4), workers=0, pin=False)
    assert (batch.x.shape, batch.x.dtype) == ((4, 1, *CROP), torch.float16)
    assert (batch.modality.shape, batch.modality.dtype) == ((4,), torch.int64)
    assert len(batch.seeds) == 4

    moved = batch.to(torch.device("cpu"))
    assert moved.x.dtype == torch.float32
    assert torch.equal(moved.x, batch.x.float())
    assert moved.seeds == batch.seeds


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1,), (0,)], ids=str)
def test_a_background_that_float16_does_not_hold_arrives_bit_for_bit(
    order: tuple[int, ...], volumes: list[Cached]
) -> None:
    """As the z-score of air. One sample of a batch shows it, and another one may not."""
    background = float(np.float32(-0.738214))
    volume = volumes[0]._replace(background=(background,))
    larger = Crops([volume], [0], (*SIZE[:2], 12), seed=0, global_batch=1)
    samples = [larger.fixed(0), (torch.zeros(1, 6, 7, 12, dtype=torch.float16), 0, 1)]

    batch = collate([samples[n] for n in order]).to(torch.device("cpu"))
    assert batch.x.dtype == torch.float32
    if 0 in order:
        expected = crop(volume.array(), (0, 0, -2), (6, 7, 12), [background])
        assert batch.x[order.index(0)].numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_does_not_move_the_global_generator(workers: int, volumes: list[Cached]) -> None:
    """A draw from it at the start of a run and another on resume would make two runs of one."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batches = list(loader(crops_of(volumes), one_rank(3, 2), workers=workers, pin=False))
    assert len(batches) == 3
    assert torch.equal(torch.get_rng_state(), before)


# --- labelled crops -------------------------------------------------------------------------------

EVERYTHING = AugmentConfig(flip=0.5, rotate=0.5, zoom=0.5, brightness=0.5, contrast=0.5, noise=0.5)
NOTHING = AugmentConfig(flip=0.0, rotate=0.0, zoom=0.0, brightness=0.0, contrast=0.0, noise=0.0)


def labelled(volumes: list[Cached], seed: int = 0, **options: Any) -> LabelledCrops:
    defaults: dict[str, Any] = {
        "global_batch": 2,
        "positive": 0.5,
        "chances": EVERYTHING,
        "flips": Flips((0, 1, 2), (), (), ""),
    }
    return LabelledCrops(volumes, [0, 2, 7, 9], CROP, seed=seed, **{**defaults, **options})


def labelled_run(
    crops: LabelledCrops, *, steps: range = range(6), workers: int = 0, **layout: Any
) -> dict[Address, tuple[bytes, bytes]]:
    """Every augmented sample and its labels, by its (step, j), over all ranks."""
    by_address: dict[Address, tuple[bytes, bytes]] = {}
    for rank in range(layout["world"]):
        micro_batches = list(addresses(steps.start, steps.stop, rank=rank, **layout))
        batches = loader(
            crops, iter(micro_batches), workers=workers, pin=False, gather=collate_labelled
        )
        for own, batch in zip(micro_batches, batches, strict=True):
            on_device = batch.to(torch.device("cpu"))
            x, label = augment(on_device.x, on_device.label, on_device.drawn)
            for n, address in enumerate(own):
                by_address[address] = (x[n].numpy().tobytes(), label[n].numpy().tobytes())
    return by_address


@pytest.mark.parametrize(
    "world, batch_size, accumulate, workers",
    [(2, 2, 1, 0), (4, 1, 1, 0), (1, 1, 4, 0), (1, 4, 1, 2), (2, 1, 2, 1)],
)
def test_an_augmented_sample_is_the_same_on_any_ranks_workers_and_micro_batches(
    world: int, batch_size: int, accumulate: int, workers: int, volumes: list[Cached]
) -> None:
    crops = labelled(volumes, global_batch=4)
    alone = labelled_run(crops, world=1, batch_size=4, accumulate=1)
    shared = labelled_run(
        crops, workers=workers, world=world, batch_size=batch_size, accumulate=accumulate
    )
    assert len(alone) == 6 * 4
    assert len({x for x, _ in alone.values()}) == 6 * 4
    assert shared == alone


def test_a_resumed_run_goes_on_with_the_augmented_samples_of_an_uninterrupted_one(
    volumes: list[Cached],
) -> None:
    crops = labelled(volumes)
    layout = {"world": 1, "batch_size": 2, "accumulate": 1}
    whole = labelled_run(crops, **layout)
    resumed = labelled_run(crops, steps=range(4, 6), workers=1, **layout)
    assert resumed == {address: sample for address, sample in whole.items() if address[0] >= 4}


def test_a_labelled_crop_and_its_augmentation_are_a_function_of_seed_step_and_j(
    volumes: list[Cached],
) -> None:
    batch = list(product(range(8), range(2)))
    crops = labelled(volumes[:1])
    first = [crops[address] for address in batch]
    again = [labelled(volumes[:1])[address] for address in reversed(batch)]
    for (x, label, drawn), (same_x, same_label, same_drawn) in zip(first, reversed(again)):
        assert torch.equal(x, same_x)
        assert torch.equal(label, same_label)
        assert drawn == same_drawn

    other = [labelled(volumes[:1], seed=1)[address] for address in batch]
    distinct = {(x.numpy().tobytes(), drawn) for x, _, drawn in first + other}
    assert len(distinct) == 32


def test_labels_are_class_indices_on_their_voxels_and_minus_one_where_none_was_annotated(
    volumes: list[Cached],
) -> None:
    """All crops are centred on the one foreground voxel, and nothing is augmented."""
    crops = labelled(volumes[:1], positive=1.0, chances=NOTHING, ignore=7)
    x, label, drawn = crops[3, 1]
    assert np.array_equal(x.numpy(), volumes[0].array()[:, 1:4, 2:5, 3:6])
    assert (x.dtype, label.dtype) == (torch.float16, torch.uint8)
    assert drawn == ((), 0, 1, 1, 0, 1, 0, 0)

    target = crops.class_table().take(label.long())
    assert target.dtype == torch.int64
    values = volumes[0].label()[1:4, 2:5, 3:6]
    for value, index in {0: 0, 2: 1, 7: -1, 9: 3}.items():
        assert value in values
        assert np.all(target.numpy()[values == value] == index)


def test_a_labelled_batch_travels_in_three_bytes_a_voxel(volumes: list[Cached]) -> None:
    crops = labelled(volumes)
    (batch,) = loader(crops, one_rank(1, 2), workers=1, pin=False, gather=collate_labelled)
    assert isinstance(batch, LabelledBatch)
    assert batch.x.nbytes + batch.label.nbytes == 3 * 2 * 27
    assert batch.x.is_shared() and batch.label.is_shared()
    assert batch.drawn == [crops[0, 0][2], crops[0, 1][2]]

    moved = batch.to(torch.device("cpu"))
    assert moved.x.dtype == torch.float32
    assert torch.equal(moved.x, batch.x.float())
    assert torch.equal(moved.label, batch.label)
    assert moved.drawn == batch.drawn


@pytest.mark.parametrize("ignore, crops", [(None, 1), (9, 2)])
def test_no_crop_is_centred_on_a_label_that_is_ignored(
    ignore: int | None, crops: int, volumes: list[Cached]
) -> None:
    """The one foreground voxel is a 9: where that is ignored, crops are anywhere."""
    one = labelled(volumes[:1], positive=1.0, chances=NOTHING, ignore=ignore)
    distinct = {one[step, 0][0].numpy().tobytes() for step in range(8)}
    assert min(len(distinct), 2) == crops


def test_a_value_that_is_ignored_may_be_among_the_classes_or_not() -> None:
    label = np.array([9, 2, 0, 7], np.uint8)
    assert class_index(label, [0, 2, 7, 9]).tolist() == [3, 1, 0, 2]
    assert class_index(label, [0, 2, 7, 9], ignore=7).tolist() == [3, 1, 0, -1]
    assert class_index(label, [0, 2, 7], ignore=9).tolist() == [-1, 1, 0, 2]


# --- what cannot be read --------------------------------------------------------------------------


def read_to_the_end(crops: Crops, answer: Connection, workers: int, batch_size: int) -> None:
    """Send the one line in which reading ends."""
    try:
        list(loader(crops, one_rank(50, batch_size), workers=workers, pin=False))
    except InputError as error:
        answer.send(str(error))


def failure(crops: Crops, *, workers: int, batch_size: int = 2) -> str:
    """The one line, from a process that must end with its workers: else the test would wait."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=read_to_the_end, args=(crops, theirs, workers, batch_size)
    )
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout=60), "still waiting for a batch"
        line = ours.recv()
        process.join(timeout=60)
        assert process.exitcode == 0, "its workers hold it"
    finally:
        process.kill()
    assert "\n" not in line
    return str(line)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_volume_that_is_gone_ends_the_batches_in_one_line(
    workers: int, volumes: list[Cached], tmp_path: Path
) -> None:
    """As where a cache is cleaned while a run reads it."""
    copies = [volume._replace(path=tmp_path / str(n)) for n, volume in enumerate(volumes)]
    for n in (0, 1, 2, 3, 4, 6):
        shutil.copytree(volumes[n].path, copies[n].path)
    line = failure(crops_of(copies), workers=workers)
    for part in (str(copies[5].path), "--cache-dir", "--resume"):
        assert part in line


def test_any_other_error_of_a_worker_is_named_too(volumes: list[Cached]) -> None:
    crops = crops_of([volume._replace(background=()) for volume in volumes])
    crops.crop = (9, 9, 9)  # larger than the volumes, so that background is needed
    assert "a crop could not be read (" in failure(crops, workers=1)


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert "(AssertionError: AssertionError)" in why_unread(AssertionError())


def test_a_batch_that_shared_memory_does_not_hold_ends_them_as_well(volumes: list[Cached]) -> None:
    """torch would lose the batch, and wait for it. A limit on files holds for /dev/shm, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        # A batch of 64 x 27 x 2 bytes.
        line = failure(crops_of(volumes, global_batch=64), workers=1, batch_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "/dev/shm" in line
    assert "--workers" in line


class Stuck(Crops):
    """Hangs at step 3, as a read from a file server that is gone."""

    def __getitem__(self, address: Address) -> tuple[torch.Tensor, int, int]:
        if address[0] == 3:
            time.sleep(1e6)
        return super().__getitem__(address)


def no_worker_is_left() -> bool:
    for process in multiprocessing.active_children():
        process.join(timeout=20)
    return not multiprocessing.active_children()


def test_workers_outlive_a_stop_signal_and_not_their_run(volumes: list[Cached]) -> None:
    """A scheduler signals the whole process group; the running step still needs its batches."""
    crops = Stuck(volumes, range(7), CROP, seed=0, global_batch=4)
    batches = loader(crops, one_rank(9, 4), workers=1, pin=False)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid

    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGUSR1)
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(islice(batches, 2))) == 2  # up to the step at which it hangs

    batches.close()
    ended = no_worker_is_left()
    worker.kill()
    assert ended


# --- validation -----------------------------------------------------------------------------------


def test_a_few_of_many_held_out_volumes_are_evenly_spread_over_each_modality() -> None:
    """16 of 500, whose list has its modalities in blocks of 300, 180 and 20."""
    modalities = [0] * 300 + [1] * 180 + [2] * 20
    chosen = spread_over_modalities(modalities, 16)
    assert len(set(chosen)) == 16
    assert [modalities[n] for n in chosen[:6]] == [0, 1, 2, 0, 1, 2]
    assert Counter(modalities[n] for n in chosen) == {0: 6, 1: 5, 2: 5}

    # The middles of six fiftieths of the first block, and of five parts of the second.
    assert sorted(n for n in chosen if n < 300) == [25, 75, 125, 175, 225, 275]
    assert sorted(n for n in chosen if 300 <= n < 480) == [318, 354, 390, 426, 462]


def test_where_few_are_held_out_all_are_taken_in_turn() -> None:
    modalities = [0, 0, 0, 1, 1, 2]
    assert spread_over_modalities(modalities, 16) == by_turns(modalities)
    assert spread_over_modalities([], 16) == []


@pytest.mark.parametrize(
    "modalities, turns",
    [
        ([0, 0, 0, 1, 1, 2], [0, 3, 5, 1, 4, 2]),
        ([2, 1, 0], [2, 1, 0]),
        ([1, 1, 1], [0, 1, 2]),
        ([], []),
    ],
)
def test_modalities_take_turns(modalities: list[int], turns: list[int]) -> None:
    """The first of each, in the order of the modalities, then the second of each, and so on."""
    assert by_turns(modalities) == turns


def test_fixed_crops_are_those_of_any_run(volumes: list[Cached]) -> None:
    crops = crops_of(volumes)
    other = crops_of(volumes, seed=5, global_batch=7, foreground=0.3)
    for n in range(10):
        assert torch.equal(crops.fixed(n)[0], other.fixed(n)[0])
        assert crops.fixed(n)[1:] == other.fixed(n)[1:]
    assert len({crops.fixed(n)[2] for n in range(10)}) == 10


def test_fixed_crops_take_the_volumes_in_turn_and_are_centred_on_foreground(
    volumes: list[Cached],
) -> None:
    crops = crops_of(volumes)
    assert [crops.fixed(n)[1] for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    x, _, _ = crops.fixed(2)
    assert np.array_equal(x.numpy(), volumes[2].array()[:, 1:4, 2:5, 3:6])  # around voxel 2 3 4
