"""What a run leaves and shows: log.jsonl for machines, a progress line for people, and its speed.

log.jsonl has one JSON object per line. A killed run may leave half a line at its end, and steps
after its last checkpoint, which the resumed run takes again. `read_log` leaves out both.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dae.errors import InputError
from dae.files import json_lines


class Log:
    """log.jsonl and the progress line, on rank 0. On the other ranks it does nothing.

    held: the lock of the run's folder, which is freed when the log is closed.
    """

    def __init__(
        self, path: Path, *, steps: int, start: int, main: bool, held: int | None = None
    ) -> None:
        self.path = path
        self.held = held
        self.main = main
        self.bar: Any = None
        if not main:
            return

        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            self._append("\n")  # what a killed run left half-written stays a line of its own
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not sys.stderr.isatty(),
            # Without tqdm's own times, which follow a clock that may jump. Ours are in the postfix.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def event(self, event: str, **metadata: Any) -> None:
        """One line of log.jsonl. NaN and infinity, which JSON does not have, become null."""
        if self.main:
            self._append(json.dumps({"event": event, **finite(metadata)}, allow_nan=False) + "\n")

    def say(self, text: str) -> None:
        """A line for the reader, above the progress line."""
        if self.main:
            self.bar.write(text, file=sys.stderr)

    def warn(self, step: int, text: str) -> None:
        """An event, and a line for the reader."""
        self.event("warning", step=step, text=text)
        self.say(text)

    def progress(self, step: int, text: str) -> None:
        """Move the bar; where there is no terminal, print the line instead."""
        if not self.main:
            return
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"step {step}/{self.bar.total}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"{self.path}: could not be written ({error.strerror})") from error


def finite(value: Any) -> Any:
    """The same, with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Events of a log.jsonl, in order, as one run that was never stopped.

    A run that starts or is resumed at a step undoes the train and validation events of later steps:
    no checkpoint holds them. Of the events of one name and step, the last one counts.
    """
    events: dict[Any, dict[str, Any]] = {}
    for number, event in enumerate(json_lines(path)):
        name = event.get("event")
        if is_of_a_step(event):
            events[name, event["step"]] = event
            continue

        if name in ("start", "resume") and isinstance(event.get("step"), int):
            events = {key: e for key, e in events.items() if not is_undone(e, event["step"])}
        if isinstance(name, str):
            events[number] = event
    return list(events.values())


def is_of_a_step(event: Mapping[str, Any]) -> bool:
    """Whether a resumed run may log it again."""
    return event.get("event") in ("train", "validation") and isinstance(event.get("step"), int)


def is_undone(event: Mapping[str, Any], step: int) -> bool:
    """Whether a run that goes on from this step has not made what the event tells of."""
    return is_of_a_step(event) and int(event["step"]) > step


class Clock:
    """How fast a run trains, from one train event to the next.

    rate       samples per second, over all ranks
    data_wait  share of the time in which the network waits for the next batch
    left       time until the last step, in words
    """

    def __init__(self, *, step: int, steps: int, global_batch: int) -> None:
        self.logged = step  # the step of the last train event
        self.steps = steps
        self.global_batch = global_batch
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()
        self.waited = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of this block does not count: validation, saving."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time of this block counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, step: int) -> None:
        """Work out the three figures at a train event; `restart` begins the next stretch."""
        seconds = time.perf_counter() - self.since
        steps = step - self.logged
        self.logged = step
        self.rate = steps * self.global_batch / seconds
        self.data_wait = self.waited / seconds
        self.left = time_left((self.steps - step) * seconds / steps)


def time_left(seconds: float) -> str:
    minutes = seconds / 60
    hours = seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h"


def versions() -> dict[str, Any]:
    """What a run runs on, for the first event of its log."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": commit_of(Path(__file__).resolve().parents[2]),
        "command": sys.argv,
    }


def commit_of(root: Path) -> str | None:
    """The commit of the repository whose top folder is `root`; None where there is none.

    A repository further up does not count: a package that is installed within somebody's project
    is not at the commit of that project.
    """
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return None
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 2:
        return None

    top, commit = lines
    if Path(top).resolve() != root.resolve():
        return None
    return commit
