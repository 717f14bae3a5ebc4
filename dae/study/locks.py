"""One unit of work, one process: a lock that lives as long as anything works under it.

The kernel frees the lock (flock) when the last process that has the file open ends. The commands of
a unit inherit it, so it holds where the runner was killed and its command works on. Nothing is left
to clean up after a kill or a crash of the machine.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """The descriptor of the lock, to hand on to subprocesses; None where others hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)
