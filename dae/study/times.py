"""times.jsonl: how long each step took, and how long the rest will take by that."""

import json
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from dae.files import json_lines

# What a step's time depends on, from the closest measurement to the farthest.
LIKENESS = (
    ("step", "method", "tuning", "labels"),
    ("step", "tuning", "labels"),
    ("step", "labels"),
    ("step", "method"),
    ("step",),
)


def add_time(path: Path, entry: Mapping[str, Any]) -> None:
    """One line more. Several processes may add at once: a short line is written in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_times(path: Path) -> list[dict[str, Any]]:
    """The lines so far, without one that was cut short."""
    entries = []
    for entry in json_lines(path):
        seconds = entry.get("seconds")
        if isinstance(seconds, int | float) and 0 <= seconds < inf:
            entries.append(entry)
    return entries


def expected(times: Sequence[Mapping[str, Any]], **unit: Any) -> float | None:
    """Seconds of a step, by the median of those most like it; None where none was measured.

    unit: step, method, tuning and labels.
    """
    for keys in LIKENESS:
        alike = []
        for entry in times:
            if all(entry.get(key) == unit.get(key) for key in keys):
                alike.append(entry["seconds"])
        if alike:
            return median(alike)
    return None


def in_words(seconds: float | None) -> str:
    """45 -> "45 s", 600 -> "10 min", None -> "not measured yet"."""
    if seconds is None:
        return "not measured yet"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
