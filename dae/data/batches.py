"""Index-addressed batches: sample j of the global batch at step s is a function of (seed, s, j) and nothing else.

So it is the same sample on any number of ranks and workers, another one at every step, and a resumed run needs to
restore nothing to go on with the samples that an uninterrupted one would have seen.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dae.config.command_line import Size3
from dae.config.segment import SegConfig
from dae.data.augment import augment, labelled_crop, random_crop
from dae.data.cache import Cached
from dae.data.sides import Flips
from dae.errors import InputError

# Streams of their own beside those of (seed, step, j); trailing zeros in a key would change nothing.
VALIDATION = 2**32 - 1  # in place of a step: crops that never change
ORDER = 2**32 - 2  # in place of j: the order of an epoch


Gather = Callable[[Any], Any]  # samples -> batch


class Batch(NamedTuple):
    x: Tensor  # (b, c, d, h, w), clean
    modality: Tensor  # (b,), int64
    seeds: list[int]  # of each sample's disruption

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.x.to(device, non_blocking=True),
            self.modality.to(device, non_blocking=True),
            self.seeds,
        )


@lru_cache(maxsize=4)
def order(volumes: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """In each epoch every volume comes once, in an order that mixes modalities."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(volumes)


def volume_of(step: int, j: int, *, volumes: int, global_batch: int, seed: int) -> int:
    """Which volume sample j of the global batch is drawn from at a step."""
    epoch, place = divmod(step * global_batch + j, volumes)
    return int(order(volumes, seed, epoch)[place])


class Crops(Dataset[tuple[Tensor, int, int]]):
    """Maps (step, j) to sample j of the global batch at that step."""

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
        self.volumes, self.modalities, self.crop, self.foreground = (
            volumes,
            modalities,
            crop,
            foreground,
        )
        self.seed, self.global_batch = seed, global_batch

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int, int]:
        """(x, modality, seed of the disruption)."""
        step, j = address
        index = volume_of(
            step, j, volumes=len(self.volumes), global_batch=self.global_batch, seed=self.seed
        )
        return self.draw(index, [self.seed, step, j], self.foreground)

    def fixed(self, n: int) -> tuple[Tensor, int, int]:
        """The n-th validation crop: volumes in turn, always on foreground, whatever the run's seed."""
        return self.draw(n % len(self.volumes), [0, VALIDATION, n], foreground=1.0)

    def draw(self, index: int, key: Sequence[int], foreground: float) -> tuple[Tensor, int, int]:
        rng = np.random.default_rng(key)
        x = random_crop(self.volumes[index], self.crop, rng, foreground=foreground)
        return torch.from_numpy(x), self.modalities[index], int(rng.integers(2**63))


def class_index(
    label: NDArray[np.uint8], classes: Sequence[int], ignore: int | None = None
) -> NDArray[np.int64]:
    """Label values -> their places in the ordered `classes`, which is what a network is trained on; `ignore` -> -1."""
    places = np.searchsorted(np.asarray(classes), label)
    return places if ignore is None else np.where(label == ignore, -1, places)


class LabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Maps (step, j) to an augmented crop and its labels, as places in `classes`: by (seed, step, j) alone, too."""

    def __init__(
        self,
        volumes: Sequence[Cached],
        classes: Sequence[int],
        config: SegConfig,
        *,
        global_batch: int,
        flips: Flips,
        ignore: int | None = None,
    ) -> None:
        self.volumes, self.classes, self.config, self.global_batch = (
            volumes,
            classes,
            config,
            global_batch,
        )
        self.flips, self.ignore = flips, ignore

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """x (c, d, h, w) float32, label (d, h, w) int64; -1 where there is none."""
        (step, j), config = address, self.config
        index = volume_of(
            step, j, volumes=len(self.volumes), global_batch=self.global_batch, seed=config.seed
        )
        rng = np.random.default_rng([config.seed, step, j])
        x, label = labelled_crop(
            self.volumes[index], config.crop, rng, positive=config.positive, ignore=self.ignore
        )
        x, label = augment(
            x,
            label,
            rng,
            config,
            flip_axes=self.flips.axes,
            swap=self.flips.swap,
            swap_axes=self.flips.swap_axes,
        )
        return torch.from_numpy(x), torch.from_numpy(class_index(label, self.classes, self.ignore))


def by_turns(modalities: Sequence[int]) -> list[int]:
    """Indices so ordered that the modalities take turns: the first of each, the second of each, ..."""
    earlier = [modalities[:n].count(modality) for n, modality in enumerate(modalities)]
    return sorted(range(len(modalities)), key=lambda n: (earlier[n], modalities[n]))


def spread(modalities: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the indices: the modalities take turns, and each one's lie evenly over its own."""
    shares = Counter(modalities[n] for n in by_turns(modalities)[:count])
    chosen: list[int] = []
    for modality, share in shares.items():
        own = [n for n, other in enumerate(modalities) if other == modality]
        chosen += [own[(2 * place + 1) * len(own) // (2 * share)] for place in range(share)]
    chosen.sort()
    return [chosen[n] for n in by_turns([modalities[n] for n in chosen])]


def addresses(
    start: int, stop: int, *, batch_size: int, accumulate: int, rank: int, world: int
) -> Iterator[list[tuple[int, int]]]:
    """Micro-batch by micro-batch the (step, j) of one rank.

    The ranks' parts of a micro-batch lie side by side, so that two ranks see what one sees with twice the batch.
    """
    for step in range(start, stop):
        for micro in range(accumulate):
            first = (micro * world + rank) * batch_size
            yield [(step, j) for j in range(first, first + batch_size)]


def collate(samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
    x, modality, seeds = zip(*samples)
    return Batch(torch.stack(x), torch.tensor(modality), list(seeds))


class Failure(NamedTuple):
    """In place of a batch: why it could not be read, in one line."""

    reason: str


class Reader(Dataset[Any]):
    """Maps the addresses of a micro-batch to the batch, or to the reason why there is none.

    A batch that does not fit into shared memory would otherwise be lost in the thread that sends it, and
    waited for without end.
    """

    def __init__(self, crops: Dataset[Any], gather: Gather) -> None:
        self.crops, self.gather = crops, gather

    def __getitem__(self, places: list[tuple[int, int]]) -> Any:
        try:
            batch = self.gather([self.crops[place] for place in places])
            # Into shared memory here, where an error can still be answered with.
            for value in batch if get_worker_info() else ():
                if isinstance(value, Tensor):
                    value.share_memory_()
            return batch
        except Exception as error:
            if os.environ.get("DAE_DEBUG") == "1":
                raise
            return Failure(why_unread(error))


def why_unread(error: Exception) -> str:
    """In one line what is wrong, and what to do."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError):
        return f"{text}; the volumes in --cache-dir must stay there while a run reads them; go on with --resume"
    if "shared memory" in text or "</torch_" in text:  # so torch names its files in /dev/shm
        return f"/dev/shm is full ({text}); take fewer --workers (0 needs none of it), then go on with --resume"
    return f"a crop could not be read ({type(error).__name__}: {text}); DAE_DEBUG=1 shows where"


def stay_with_the_run(run: Connection, ours: Connection, worker: int) -> None:
    """A worker ends when its run does, and not before.

    A stop signal reaches the whole process group, and the run still needs its workers for the step it
    is in. So they ignore it. They end when the run closes its end of a pipe, or dies. `ours` is a copy of
    that end.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ours.close()
    Thread(target=end_with, args=(run,), daemon=True).start()


def end_with(run: Connection) -> None:
    """Wait for the end of the run, leave torch the time to end its workers in order, then end anyhow."""
    with suppress(EOFError, OSError):
        run.recv_bytes()
    time.sleep(2)
    os._exit(0)


def as_it_is(batch: Any) -> Any:
    return batch


def loader(
    crops: Dataset[Any],
    places: Iterator[list[tuple[int, int]]],
    *,
    workers: int,
    pin: bool,
    gather: Gather = collate,
) -> Generator[Any, None, None]:
    """Batches in order, read ahead by `workers` processes, until it is closed.

    Raises InputError on a batch that cannot be read.
    """
    ahead: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    theirs, ours = Pipe(duplex=False)
    batches = iter(
        DataLoader(
            Reader(crops, gather),
            sampler=places,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=partial(stay_with_the_run, theirs, ours),
            generator=torch.Generator(),
            **ahead,  # its own: starting workers must not move the global one
        )
    )
    # The pipe is closed before torch ends its workers: torch waits seconds for each one that hangs.
    with theirs, ours:
        for batch in batches:
            if isinstance(batch, Failure):
                raise InputError(batch.reason)
            yield batch
