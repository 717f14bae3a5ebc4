"""Ranks: a run is one process, or several that torchrun starts. All functions work in either case.

Also the stop signal, because all ranks must agree on the step at which they stop.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dae.errors import InputError, one_line

T = TypeVar("T")

MEETING = timedelta(minutes=10)  # a rank starts within minutes or not at all
PREPARING = timedelta(hours=1)  # once they have met, one rank may prepare volumes for long
PREDICTING = timedelta(days=7)  # one rank may be at a large volume long after the others are done

# Numbers in the store.
SHARED = "shared"  # how many numbers `share` has handed out
STOPS = "stops"  # above 0 once a rank was asked to stop, see `StopSignal.check`

# What torchrun sets for each rank.
LAUNCH = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device
    store: Store | None = None  # numbers by name that all ranks read and write

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# --- start and end


@contextmanager
def joined(device: str, *, patience: timedelta = PREPARING) -> Iterator[Ranks]:
    """This process among those of the run, until the block ends. They wait for each other for
    `patience`.

    Raises InputError where the launch is wrong, where another rank has ended before this one, and
    where a process that reads ahead has died. torch has a traceback for each of them.
    """
    ranks = start(device, patience=patience)
    try:
        yield ranks
    except RuntimeError as error:
        reason = reason_of(error)
        if reason:
            raise InputError(reason) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def reason_of(error: RuntimeError) -> str:
    """In one line what has ended a run from outside of this process; empty where nothing has."""
    text = " ".join(str(error).split())
    if "DataLoader worker" in text:
        first_sentence = text.partition(". ")[0]
        return (
            f"a process that reads ahead has died ({first_sentence[:120]}); out of memory, or "
            "/dev/shm is full? take fewer --workers, then go on with --resume"
        )
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"another rank has ended before this one ({text[:120]}); its own message says why"
    return ""


def start(device: str, *, patience: timedelta = PREPARING) -> Ranks:
    """Join the process group if torchrun has set one up: gloo on CPUs, NCCL on GPUs.

    Raises InputError.
    """
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; take --device cpu")
    if not is_launched():
        return Ranks(0, 1, torch.device("cuda" if on_cuda else "cpu"))

    own = torch.device("cpu")
    if on_cuda:
        own = torch.device("cuda", local_gpu())
        torch.cuda.set_device(own)
    store = meet("nccl" if on_cuda else "gloo", patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), own, store)


def local_gpu() -> int:
    """The number of this rank's GPU. Raises InputError where the machine has fewer."""
    local = int(os.environ["LOCAL_RANK"])
    count = torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"LOCAL_RANK {local}: torch finds {count} GPUs here; start torchrun with "
            f"--nproc_per_node={count}, or take --device cpu"
        )
    return local


def is_launched() -> bool:
    """Whether a launcher has made this process one of its ranks.

    Raises InputError where only a part of a launcher's variables is set.
    """
    present = [name for name in LAUNCH if os.environ.get(name)]
    absent = [name for name in LAUNCH if name not in present]

    # Clusters set RANK, and WORLD_SIZE to 1, for what they mean to be one process.
    if "LOCAL_RANK" in absent and os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        check_not_repeated()
        return False

    if absent:
        raise InputError(
            f"{', '.join(present)} set and {', '.join(absent)} not: half of a launcher's "
            f"environment; start with torchrun, or unset {' '.join(present)} for one process"
        )
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise InputError(f"{name} {os.environ[name]}: not a number; start with torchrun")
    return True


def check_not_repeated() -> None:
    """Raises InputError where srun starts several processes and none of them knows of the others.

    Each would be a whole run of its own, and all would write to one --out.
    """
    # srun sets this for its tasks. A batch script has SLURM_NTASKS instead, and is one process.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        raise InputError(
            f"SLURM_STEP_NUM_TASKS {tasks}: {tasks} tasks of srun without torchrun would be "
            f"{tasks} runs on one --out; start one torchrun a node (srun --ntasks-per-node=1 "
            "torchrun ...), or take srun --ntasks=1"
        )


def meet(backend: str, patience: timedelta) -> Store:
    """Find the other ranks at MASTER_ADDR and MASTER_PORT: the store that all of them share.

    Raises InputError where none answers.
    """
    address = os.environ["MASTER_ADDR"]
    port = os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, int(port))
        store, rank, world = next(iter(rendezvous("env://", timeout=MEETING)))
        # With --max-restarts torchrun starts the ranks again, on the store of those that ended.
        if rank == 0:
            store.set(SHARED, "0")
            store.set(STOPS, "0")
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: the ranks do not meet there "
            f"({one_line(error)}); check torchrun's --rdzv-endpoint or --master-addr"
        ) from error
    return store


# --- in a step


def parallel(network: nn.Module, ranks: Ranks) -> nn.Module:
    """The network in DDP, whose backward pass averages gradients over the ranks."""
    if ranks.world == 1:
        return network
    return DistributedDataParallel(
        network,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients are in the buffers that are sent: 250 MB less
    )


def sync_at_last(network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """For each micro-batch of a step: the ranks average their gradients in the last one only."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return nullcontext()


def mean_over_ranks(values: Tensor) -> list[float]:
    """Mean of a vector of numbers over the ranks. It waits for the device: call it once a step."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return [float(value) for value in values.tolist()]


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Rank 0 does the work, then the others do, and find it done."""
    if ranks.is_main:
        result = work()
    if dist.is_initialized():
        dist.barrier()
    return result if ranks.is_main else work()


def share(count: int, ranks: Ranks) -> Iterator[int]:
    """The numbers below `count`, each on one rank: first that of the rank, and whenever it asks
    again the next one that nobody has.

    So the ranks end at about the same time, however long the work on each number takes. A rank that
    asks ahead of its work does not take the first one of another. It can be called once a run,
    after an exchange between the ranks.
    """
    if ranks.store is None:
        yield from range(count)
        return

    number = ranks.rank
    while number < count:
        yield number
        number = ranks.world + ranks.store.add(SHARED, 1) - 1


@contextmanager
def all_or_none() -> Iterator[None]:
    """Each rank does its share of some work in this block. Where one gives it up, all do.

    Raises Stopped on every rank once any has raised it.
    """
    given_up = False
    try:
        yield
    except Stopped:
        given_up = True
    if any(gather_objects(given_up)):
        raise Stopped


def spoken_by_main(ranks: Ranks) -> AbstractContextManager[Any]:
    """Within this block what ranks other than 0 print is not shown. Their errors are."""
    return redirect_stdout(sys.stdout if ranks.is_main else None)


def in_one_voice(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns on this rank, once every rank has done it.

    Where some rank cannot do it, rank 0 raises an InputError with the first reason. The other ranks
    end without a word, and with exit code 0: torchrun kills all ranks once one has failed, and
    rank 0 has yet to speak.
    """
    if ranks.world == 1:
        return work()

    reason = ""
    try:
        result = work()
    except (InputError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__

    reasons = [of_rank for of_rank in gather_objects(reason) if of_rank]
    if not reasons:
        return result
    if ranks.is_main:
        raise InputError(reasons[0])
    sys.exit(0)


class Stopped(Exception):
    """A stop signal has come in the middle of work that can be done again."""


class StopSignal:
    """Within its block SIGTERM, SIGUSR1 and SIGINT ask for a stop after the running step.

    A second SIGINT stops at once. store: of the ranks, see `Ranks`.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.asked = False
        self.store = store

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Between two parts of long work: raises Stopped where any rank was asked to stop.

        The ranks tell each other through the store. They cannot exchange tensors here, since each
        is at a place of its own. The block of the work is `all_or_none`.
        """
        asked = self.asked
        if self.store is not None:
            asked = self.store.add(STOPS, int(asked)) > 0
        if asked:
            raise Stopped

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
