"""Atomic files: whole or absent, whenever the process is killed and however full the disk is.

And JSON that may be anything: all that is wrong with it is a ValueError.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Call `write` with a path beside `path`, then give what it has written the name `path`.

    The path beside ends as `path` does, for libraries that choose a format by the ending. `durable`
    waits until the file is on the disk, so that it also survives a loss of power; such a file has
    one writer at a time. Raises OSError that names `path`, or what else `write` raises; then `path`
    is as it was before.
    """
    # A killed process leaves the file beside. That of a checkpoint is large: under one fixed name
    # the next save replaces it. Other files may have several writers, each with a name of its own.
    beside = path.with_name(f".{path.name}" if durable else f".{os.getpid()}.{path.name}")
    try:
        write(beside)
        if durable:
            flush(beside)

        beside.replace(path)
        if durable:
            flush(path.parent)  # the new name is on the disk only once its folder is
    except OSError as error:
        # A full disk names no file, and other errors name the one beside.
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """A file of these bytes, by `write_atomic`."""
    write_atomic(path, lambda beside: beside.write_bytes(content))


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- JSON


def from_json(text: str, **options: Any) -> Any:
    """What json.loads gives, or a ValueError, also for brackets in a hundred thousand brackets."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("brackets within too many brackets") from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line; none where there is no file.

    Lines that are no object are left out: a process that is killed leaves half a line.
    """
    if not path.is_file():
        return []

    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = from_json(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines
