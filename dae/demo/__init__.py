"""The demo: synthetic CT and MR bodies, to try everything without data."""

import sys
from pathlib import Path

from dae.demo.phantom import Lists, write_phantoms

RESULTS = ("log.jsonl", "last.pt", "best.pt")  # of a run


def prepare_demo(phantoms: Path, out: Path, *, start_over: bool) -> Lists:
    """The demo's data lists, made in the folder `phantoms` where they are not there yet.

    `start_over` removes what the demo's earlier run has left in `out`, and says so.
    """
    if start_over:
        remove_results(out)
    return write_phantoms(phantoms)


def remove_results(out: Path) -> None:
    """Remove the results of the demo's earlier run, and say so."""
    results = [out / name for name in RESULTS if (out / name).exists()]
    for path in results:
        path.unlink()

    if results:
        print(
            f"{out}: the demo's earlier run is removed and started over; --resume would go on",
            file=sys.stderr,
        )
