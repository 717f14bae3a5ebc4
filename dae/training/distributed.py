"""Ranks: a run is one process or what torchrun starts; everything here also works unlaunched.

Also the stop signal, because all ranks must agree on the step at which they stop.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dae.config import InputError

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


def start(device: str) -> Ranks:
    """Join the process group if torchrun has set one up. gloo on CPUs, NCCL on GPUs. Raises InputError."""
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; take --device cpu")
    if "LOCAL_RANK" not in os.environ:
        return Ranks(0, 1, torch.device("cuda" if on_cuda else "cpu"))
    local = int(os.environ["LOCAL_RANK"])
    place = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=1))
    return Ranks(dist.get_rank(), dist.get_world_size(), place)


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
        broadcast_buffers=False,  # index tables, the same on every rank
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
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
