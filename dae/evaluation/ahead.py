"""Work on the next case while the program is still busy with this one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def one_ahead(work: Callable[[A], B], inputs: Iterable[A]) -> Iterator[B]:
    """`work` of each input, in their order, in one thread of its own.

    It works on the next input while the caller uses this result. Where taking an input is itself
    work, that goes on meanwhile, too. There are never more than two results or inputs at once.

    What `work` or `inputs` raise is raised here, after the work that has begun is done.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        running: Future[B] | None = None
        for one in inputs:
            following = thread.submit(work, one)
            if running is not None:
                yield running.result()
            running = following

        if running is not None:
            yield running.result()
