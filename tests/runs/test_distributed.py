"""dae/training/distributed.py: a wrong launch, a lost rank and a lost worker are one line.

And stop signals.
"""

import os
import signal
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dae.errors import InputError
from dae.training import distributed
from dae.training.distributed import (
    LAUNCH,
    STOPS,
    Ranks,
    Stopped,
    StopSignal,
    joined,
    share,
    start,
)

WHOLE = {
    "LOCAL_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCH, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def refusal(device: str = "cpu") -> str:
    with pytest.raises(InputError) as error:
        start(device)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_half_a_launch_is_refused_by_what_is_there_and_what_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch(monkeypatch, LOCAL_RANK="0")
    assert refusal().startswith("LOCAL_RANK set and RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not")
    launch(monkeypatch, **WHOLE)
    monkeypatch.delenv("MASTER_PORT")
    assert "and MASTER_PORT not" in refusal()
    monkeypatch.delenv("LOCAL_RANK")
    launch(
        monkeypatch, WORLD_SIZE="4", MASTER_PORT="29511"
    )  # each of the four would be a run of its own
    assert "and LOCAL_RANK not" in refusal()
    launch(monkeypatch, WORLD_SIZE="1")  # as clusters set it for one process
    assert start("cpu").world == 1 and not dist.is_initialized()
    launch(monkeypatch, **WHOLE, RANK_IS="odd")
    monkeypatch.setenv("RANK", "first")
    assert "RANK first: not a number" in refusal()


def test_tasks_of_slurm_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch(monkeypatch, SLURM_STEP_NUM_TASKS="8")
    assert refusal().startswith("SLURM_STEP_NUM_TASKS 8: ") and "--out" in refusal()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    launch(monkeypatch, SLURM_NTASKS="8")  # a batch script, which is one process
    assert start("cpu").world == 1
    launch(monkeypatch, SLURM_STEP_NUM_TASKS="8", WORLD_SIZE="1")
    assert "8 runs" in refusal()


def test_torchrun_within_slurm_is_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, **WHOLE, SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(monkeypatch, MASTER_PORT=str(port))
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.world) == (0, 1) and dist.is_initialized()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "wrong", [{"MASTER_ADDR": "no-such-host.invalid"}, {"RANK": "1", "WORLD_SIZE": "2"}]
)
def test_ranks_that_do_not_meet_are_told_where(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]
) -> None:
    """No such host; or a host where nobody listens."""
    launch(monkeypatch, **{**WHOLE, **wrong})
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1))
    assert refusal().startswith(
        f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT 29511: the ranks do not meet"
    )


def test_a_rank_beyond_the_gpus_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, **{**WHOLE, "LOCAL_RANK": "2", "RANK": "2", "WORLD_SIZE": "4"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (
        "LOCAL_RANK 2: torch finds 2 GPUs here; start torchrun with --nproc_per_node=2"
        in refusal("auto")
    )


def test_what_ends_a_run_from_outside_is_one_line_and_an_error_of_its_own_is_not_hidden() -> None:
    for text, word in (
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            "a process that reads ahead has died",
        ),
        (
            "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1",
            "another rank has ended",
        ),
    ):
        with pytest.raises(InputError, match=word) as error, joined("cpu"):
            raise RuntimeError(text)
        assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), joined("cpu"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# --- work that ranks share


def test_each_number_is_on_one_rank_and_a_rank_that_asks_ahead_leaves_the_others_theirs() -> None:
    """As in prediction, where the next case is read while the network works on this one."""
    for count in range(9):
        store = dist.HashStore()
        cpu = torch.device("cpu")
        shares = [share(count, Ranks(rank, 3, cpu, store)) for rank in range(3)]
        taken: list[list[int]] = [[], [], []]
        for rank in (0, 0, 1, 2, 2, 1, 2, 2, 0, 1):  # rank 0 asks twice before the others begin
            number = next(shares[rank], None)
            if number is not None:
                taken[rank].append(number)

        assert sorted(taken[0] + taken[1] + taken[2]) == list(range(count))
        for rank in range(min(count, 3)):
            assert taken[rank][0] == rank


def test_ranks_that_torchrun_starts_again_share_all_of_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--max-restarts: the store is that of torchrun, and outlives its ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch(monkeypatch, **{**WHOLE, "MASTER_PORT": str(store.port)})
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for _ in range(2):
        with joined("cpu") as ranks:
            assert ranks.store is not None
            assert list(share(4, ranks)) == [0, 1, 2, 3]

            # Ranks that were asked to stop do not stop the ones after them.
            StopSignal(ranks.store).check()
            ranks.store.add(STOPS, 1)


# --- stop signals


def test_what_one_rank_was_asked_stops_every_rank_at_its_next_check() -> None:
    store = dist.HashStore()
    first, second = StopSignal(store), StopSignal(store)
    first.check()
    with second:
        os.kill(os.getpid(), signal.SIGTERM)
    for rank in (second, first, first):
        with pytest.raises(Stopped):
            rank.check()


def test_without_other_ranks_a_check_stops_by_its_own_signal() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with StopSignal() as stop:
            stop.check()
            os.kill(os.getpid(), number)
            with pytest.raises(Stopped):
                stop.check()


def test_a_second_sigint_stops_at_once_and_no_other_signal_does() -> None:
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_after_its_block_signals_do_what_they_did_before() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
