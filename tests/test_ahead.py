"""dae/evaluation/ahead.py: work on the next input while this result is used, one and no more."""

import threading
import time
from collections.abc import Iterator

import pytest

from dae.evaluation.ahead import one_ahead

PATIENCE = 10.0  # seconds after which a test that waits for a thread has failed


def test_every_input_is_worked_on_once_and_in_order() -> None:
    for count in (0, 1, 2, 7):
        assert list(one_ahead(lambda n: n * n, range(count))) == [n * n for n in range(count)]


def test_the_next_input_is_worked_on_while_this_result_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def work(n: int) -> int:
        begun[n].set()
        return n

    for n in one_ahead(work, range(3)):
        if n < 2:
            assert begun[n + 1].wait(PATIENCE)


def test_no_more_than_one_is_ahead() -> None:
    begun: list[int] = []

    def work(n: int) -> int:
        begun.append(n)
        return n

    for n in one_ahead(work, range(6)):
        time.sleep(0.02)  # time enough for a thread that would run away
        assert max(begun) <= n + 1


def test_an_input_that_takes_long_is_made_while_the_last_one_is_worked_on() -> None:
    worked = [threading.Event() for _ in range(2)]

    def inputs() -> Iterator[int]:
        yield 0
        assert worked[0].wait(PATIENCE)  # for ever, if the work began only after all inputs
        yield 1

    def work(n: int) -> int:
        worked[n].set()
        return n

    assert list(one_ahead(work, inputs())) == [0, 1]


def test_what_the_work_raises_comes_after_the_results_before_it() -> None:
    def work(n: int) -> int:
        if n == 2:
            raise OSError("disk full")
        return n

    results = one_ahead(work, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk full"):
        next(results)


def test_work_that_has_begun_is_done_before_an_error_of_the_inputs_is_raised() -> None:
    done: list[int] = []

    def inputs() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    def work(n: int) -> None:
        time.sleep(0.05)
        done.append(n)

    with pytest.raises(KeyboardInterrupt):
        list(one_ahead(work, inputs()))
    assert done == [0]
