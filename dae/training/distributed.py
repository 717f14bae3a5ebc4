"""Ranks: a run is one process or what torchrun starts; everything here also works unlaunched.

Also the stop signal, because all ranks must agree on the step at which they stop.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dae.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among its peers, until the block ends.

    Raises InputError where the launch is wrong, where another rank has ended before this one, and where a
    process that reads ahead has died. torch has a traceback for each.
    """
    ranks = start(device)
    try:
        yield ranks
    except RuntimeError as error:
        if reason := reason_of(error):
            raise InputError(reason) from error
        raise
    finally:
        finish()


def reason_of(error: RuntimeError) -> str:
    """In one line what has ended a run from outside of this process; empty where nothing has."""
    text = " ".join(str(error).split())
    if "DataLoader worker" in text:
        return (
            f"a process that reads ahead has died ({text.partition('. ')[0][:120]}); out of memory, or /dev/shm is "
            "full? take fewer --workers, then go on with --resume"
        )
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"another rank has ended before this one ({text[:120]}); its own message says why"
    return ""


def start(device: str) -> Ranks:
    """Join the process group if torchrun has set one up. gloo on CPUs, NCCL on GPUs. Raises InputError."""
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; take --device cpu")
    if not is_launched():
        return Ranks(0, 1, torch.device("cuda" if on_cuda else "cpu"))
    local = int(os.environ["LOCAL_RANK"])
    if on_cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"LOCAL_RANK {local}: torch finds {torch.cuda.device_count()} GPUs here; start torchrun with "
            f"--nproc_per_node={torch.cuda.device_count()}, or take --device cpu"
        )
    place = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(place)
    meet("nccl" if on_cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), place)


MEETING = timedelta(minutes=10)  # a rank comes within minutes or not at all
# What torchrun tells each rank.
LAUNCH = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether a launcher has made this process one of its ranks. Raises InputError on half a launch."""
    there = [name for name in LAUNCH if os.environ.get(name)]
    # Clusters set RANK and WORLD_SIZE=1 for what they mean to be one process.
    if "LOCAL_RANK" not in there and os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        check_not_repeated()
        return False
    if absent := [name for name in LAUNCH if name not in there]:
        raise InputError(
            f"{', '.join(there)} set and {', '.join(absent)} not: half of a launcher's environment; start with "
            f"torchrun, or unset {' '.join(there)} for one process"
        )
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise InputError(f"{name} {os.environ[name]}: not a number; start with torchrun")
    return True


def check_not_repeated() -> None:
    """Raises InputError where srun starts several processes and none of them knows of the others.

    Each would be a whole run of its own, and all would write one --out.
    """
    tasks = os.environ.get(
        "SLURM_STEP_NUM_TASKS", "1"
    )  # of srun; a batch script has SLURM_NTASKS and is one process
    if tasks.isdecimal() and int(tasks) > 1:
        raise InputError(
            f"SLURM_STEP_NUM_TASKS {tasks}: {tasks} tasks of srun without torchrun would be {tasks} runs on one --out; "
            "start one torchrun a node (srun --ntasks-per-node=1 torchrun ...), or take srun --ntasks=1"
        )


def meet(backend: str) -> None:
    """Find the other ranks at MASTER_ADDR and MASTER_PORT. Raises InputError where they are not there."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, int(port))
        store, rank, world = next(iter(rendezvous("env://", timeout=MEETING)))
        # Once together, a rank may prepare volumes for long.
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=1)
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: the ranks do not meet there ({reason}); check torchrun's "
            "--rdzv-endpoint or --master-addr"
        ) from error


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def parallel(network: nn.Module, ranks: Ranks) -> nn.Module:
    """The network behind DDP, whose backward pass averages gradients over the ranks; alone as it is."""
    if ranks.world == 1:
        return network
    return DistributedDataParallel(
        network,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients lie in the buffers that travel: 250 MB less
    )


def mean_over_ranks(values: Tensor) -> list[float]:
    """Mean of a vector of numbers over the ranks: the one read of a step, which also waits for the device."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return [float(v) for v in values.tolist()]


def gather_objects(value: T) -> list[T]:
    """The value of each rank, in order, on every rank."""
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


class StopSignal:
    """Within its block SIGTERM and SIGINT ask for a stop after the running step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
