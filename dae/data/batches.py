"""Batches by index: sample j of the global batch at step s is a function of (seed, s, j) alone.

So it is the same sample on any number of ranks and workers, and another one at every step. A
resumed run has nothing to restore: it goes on with the samples that an uninterrupted one would have
seen.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from multiprocessing import Pipe, active_children
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dae.config.command_line import Size3
from dae.config.segment import AugmentConfig
from dae.data.augment import (
    Augmentation,
    draw_augmentation,
    labelled_crop,
    moved,
    random_crop,
)
from dae.data.cache import Cached
from dae.data.sides import Flips
from dae.errors import InputError, one_line

# Random streams beside those of (seed, step, j). They end in no zero, which would change nothing.
VALIDATION = 2**32 - 1  # in place of a step: crops that never change
ORDER = 2**32 - 2  # in place of j: the order of an epoch

# Seconds without a batch after which the processes that read ahead are taken to hang. A disk that
# is merely slow takes seconds.
PATIENCE = 600

Address = tuple[int, int]  # (step, j)
Gather = Callable[[Any], Any]  # samples -> batch


class Batch(NamedTuple):
    """Samples of pre-training."""

    x: Tensor  # (b, c, d, h, w), clean; float16 or float32, see `exact_crop`
    modality: Tensor  # (b,), int64
    seeds: list[int]  # of each sample's disruption

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, its x in float32 from there on."""
        return Batch(
            self.x.to(device, non_blocking=True).float(),
            self.modality.to(device, non_blocking=True),
            self.seeds,
        )


class LabelledBatch(NamedTuple):
    """Samples of fine-tuning, flipped and turned; `augment` does the rest on their device."""

    x: Tensor  # (b, c, d, h, w); float16 or float32, see `exact_crop`
    label: Tensor  # (b, d, h, w), uint8, values of the label map
    drawn: list[Augmentation]

    def to(self, device: torch.device) -> "LabelledBatch":
        """The batch on another device, its x in float32 from there on."""
        return LabelledBatch(
            self.x.to(device, non_blocking=True).float(),
            self.label.to(device, non_blocking=True),
            self.drawn,
        )


# --- which volume ---------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def order(volumes: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """In each epoch every volume comes once, in an order that mixes modalities."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(volumes)


def volume_of(step: int, j: int, *, volumes: int, global_batch: int, seed: int) -> int:
    """The volume that sample j of the global batch at a step is cut from."""
    epoch, n = divmod(step * global_batch + j, volumes)
    return int(order(volumes, seed, epoch)[n])


def by_turns(modalities: Sequence[int]) -> list[int]:
    """Indices in such an order that the modalities take turns.

    The first of each modality, then the second of each, as long as there are any.
    """
    met: Counter[int] = Counter()
    turns = []
    for n, modality in enumerate(modalities):
        turns.append((met[modality], modality, n))
        met[modality] += 1

    return [n for _, _, n in sorted(turns)]


def spread_over_modalities(modalities: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the indices: the modalities take turns, each evenly over its own volumes."""
    # How many of each modality.
    shares = Counter(modalities[n] for n in by_turns(modalities)[:count])

    chosen: list[int] = []
    for modality, share in shares.items():
        own = [n for n, other in enumerate(modalities) if other == modality]
        for k in range(share):
            middle = (2 * k + 1) * len(own) // (2 * share)  # of the k-th of `share` equal parts
            chosen.append(own[middle])
    chosen.sort()

    turns = by_turns([modalities[n] for n in chosen])
    return [chosen[n] for n in turns]


def addresses(
    start: int, stop: int, *, batch_size: int, accumulate: int, rank: int, world: int
) -> Iterator[list[Address]]:
    """Micro-batch by micro-batch the (step, j) of one rank.

    The ranks' parts of a micro-batch follow each other, so that two ranks see what one sees with
    twice the batch.
    """
    for step in range(start, stop):
        for micro in range(accumulate):
            first = (micro * world + rank) * batch_size
            yield [(step, j) for j in range(first, first + batch_size)]


# --- samples --------------------------------------------------------------------------------------


class Crops(Dataset[tuple[Tensor, int, int]]):
    """Pre-training: (step, j) -> sample j of the global batch at that step."""

    def __init__(
        self,
        volumes: Sequence[Cached],
        modalities: Sequence[int],
        crop: Size3,
        *,
        seed: int,
        global_batch: int,
        foreground: float = 0.0,
    ) -> None:
        self.volumes = volumes
        self.modalities = modalities
        self.crop = crop
        self.seed = seed
        self.global_batch = global_batch
        self.foreground = foreground

    def __getitem__(self, address: Address) -> tuple[Tensor, int, int]:
        """x (c, d, h, w) as `exact_crop` gives it, its modality, and the seed of its disruption."""
        step, j = address
        index = volume_of(
            step, j, volumes=len(self.volumes), global_batch=self.global_batch, seed=self.seed
        )
        return self.sample(index, [self.seed, step, j], self.foreground)

    def fixed(self, n: int) -> tuple[Tensor, int, int]:
        """The n-th validation crop, of any seed: volumes in turn, always on foreground."""
        return self.sample(n % len(self.volumes), [0, VALIDATION, n], foreground=1.0)

    def sample(self, index: int, key: Sequence[int], foreground: float) -> tuple[Tensor, int, int]:
        """A crop of one volume, by the generator of this key."""
        rng = np.random.default_rng(key)
        x = random_crop(self.volumes[index], self.crop, rng, foreground=foreground)
        return torch.from_numpy(x), self.modalities[index], int(rng.integers(2**63))


class LabelledCrops(Dataset[tuple[Tensor, Tensor, Augmentation]]):
    """Fine-tuning: (step, j) -> a crop, its labels and what happens to them on the device.

    All of it is a function of (seed, step, j), too.
    """

    def __init__(
        self,
        volumes: Sequence[Cached],
        classes: Sequence[int],
        crop: Size3,
        *,
        seed: int,
        global_batch: int,
        positive: float,
        chances: AugmentConfig,
        flips: Flips,
        ignore: int | None = None,
    ) -> None:
        self.volumes = volumes
        self.classes = classes  # label values in order; a class is an index into them
        self.crop = crop
        self.seed = seed
        self.global_batch = global_batch
        self.positive = positive
        self.chances = chances
        self.flips = flips
        self.ignore = ignore

    def __getitem__(self, address: Address) -> tuple[Tensor, Tensor, Augmentation]:
        """x (c, d, h, w) and label (d, h, w) uint8, both flipped and turned; what `augment` does.

        x is as `exact_crop` gives it. Labels are values of the label map.
        """
        step, j = address
        index = volume_of(
            step, j, volumes=len(self.volumes), global_batch=self.global_batch, seed=self.seed
        )
        rng = np.random.default_rng([self.seed, step, j])

        x, label = labelled_crop(
            self.volumes[index], self.crop, rng, positive=self.positive, ignore=self.ignore
        )
        drawn = draw_augmentation(self.crop, rng, self.chances, flip_axes=self.flips.axes)
        x, label = moved(x, label, drawn, swap=self.flips.swap, swap_axes=self.flips.swap_axes)

        return torch.from_numpy(x), torch.from_numpy(label), drawn

    def class_table(self) -> Tensor:
        """The class index of every label value: (256,), int64; -1 where none was annotated."""
        values = np.arange(256, dtype=np.uint8)
        return torch.from_numpy(class_index(values, self.classes, self.ignore))


def class_index(
    label: NDArray[np.uint8], classes: Sequence[int], ignore: int | None = None
) -> NDArray[np.int64]:
    """Label values -> indices into the ordered `classes`, which a network is trained on.

    `ignore` -> -1.
    """
    index = np.searchsorted(np.asarray(classes), label)
    if ignore is None:
        return index
    return np.where(label == ignore, -1, index)


def collate(samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
    """Samples of `Crops` as a batch."""
    x, modality, seeds = zip(*samples)
    # Where one sample is float32, all become it.
    return Batch(torch.stack(x), torch.tensor(modality), list(seeds))


def collate_labelled(samples: Sequence[tuple[Tensor, Tensor, Augmentation]]) -> LabelledBatch:
    """Samples of `LabelledCrops` as a batch."""
    x, label, drawn = zip(*samples)
    return LabelledBatch(torch.stack(x), torch.stack(label), list(drawn))


# --- reading ahead --------------------------------------------------------------------------------


def loader(
    crops: Dataset[Any],
    addresses: Iterator[list[Address]],
    *,
    workers: int,
    pin: bool,
    gather: Gather = collate,
) -> Generator[Any, None, None]:
    """Batches in order, read ahead by `workers` processes, until it is closed.

    Raises InputError on a batch that cannot be read, and where none comes for PATIENCE seconds.
    """
    ahead: dict[str, Any] = {"prefetch_factor": 4, "timeout": PATIENCE} if workers else {}
    others = set(active_children())
    worker_end, run_end = Pipe(duplex=False)
    batches = iter(
        DataLoader(
            Reader(crops, gather),
            sampler=addresses,
            batch_size=None,  # an address is already one of a whole micro-batch
            collate_fn=as_it_is,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=partial(live_as_long_as_the_run, worker_end, run_end),
            generator=torch.Generator(),  # starting workers must not move the global one
            **ahead,
        )
    )

    readers = set(active_children()) - others

    # The pipe is closed before torch ends its workers: torch waits seconds for each one that hangs.
    with worker_end, run_end:
        while (batch := next_of(batches)) is not None:
            if isinstance(batch, Failure):
                break
            yield batch

    if isinstance(batch, Failure):
        del batches  # torch ends its workers, and watches them no more
        for reader in readers:
            reader.kill()  # one that is stopped, or waits for a dead disk, has not ended
        raise InputError(batch.reason)


def next_of(batches: Iterator[Any]) -> Any:
    """The next batch, None after the last one, and a `Failure` where none comes in time."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        return Failure(
            f"the processes that read ahead have given nothing for {PATIENCE} s: they hang, or the "
            "disk of --cache-dir does; go on with --resume"
        )


class Failure(NamedTuple):
    """In place of a batch: why it could not be read, in one line."""

    reason: str


class Reader(Dataset[Any]):
    """The addresses of a micro-batch -> the batch, or the reason why there is none.

    torch would lose a batch that does not fit into shared memory in the thread that sends it, and
    wait for it without end.
    """

    def __init__(self, crops: Dataset[Any], gather: Gather) -> None:
        self.crops = crops
        self.gather = gather

    def __getitem__(self, addresses: list[Address]) -> Any:
        try:
            batch = self.gather([self.crops[address] for address in addresses])
            if get_worker_info():
                move_to_shared_memory(batch)  # now, while a `Failure` can still be answered
            return batch
        except Exception as error:
            if os.environ.get("DAE_DEBUG") == "1":
                raise
            return Failure(why_unread(error))


def move_to_shared_memory(batch: Any) -> None:
    """The tensors of a batch, so that sending it copies nothing."""
    for value in batch:
        if isinstance(value, Tensor):
            value.share_memory_()


def as_it_is(batch: Any) -> Any:
    """The batch that `Reader` has gathered."""
    return batch


def why_unread(error: Exception) -> str:
    """In one line what is wrong, and what to do."""
    text = one_line(error, 300)

    if isinstance(error, InputError):
        return text

    if isinstance(error, OSError):
        return (
            f"{text}; the volumes in --cache-dir must stay there while a run reads them; "
            "go on with --resume"
        )

    if "shared memory" in text or "</torch_" in text:  # so torch names its files in /dev/shm
        return (
            f"/dev/shm is full ({text}); take fewer --workers (0 needs none of it), "
            "then go on with --resume"
        )

    return f"a crop could not be read ({type(error).__name__}: {text}); DAE_DEBUG=1 shows where"


def live_as_long_as_the_run(worker_end: Connection, run_end: Connection, worker: int) -> None:
    """A worker ends when its run does, and not before.

    A stop signal reaches the whole process group, and the run still needs its workers for the step
    it is in. So they ignore the signal. They end when the run closes its end of a pipe, or dies.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    run_end.close()  # this process's copy of it, which would keep the pipe open
    Thread(target=end_with, args=(worker_end,), daemon=True).start()


def end_with(worker_end: Connection) -> None:
    """Wait for the end of the run, leave torch the time to end its workers in order, then end."""
    with suppress(EOFError, OSError):
        worker_end.recv_bytes()
    time.sleep(2)
    os._exit(0)
