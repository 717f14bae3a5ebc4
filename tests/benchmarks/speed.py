"""How fast this machine runs what is here, beside MONAI where that is installed. Prints a table.

    python tests/benchmarks/speed.py                             # what this machine has, GPU or CPU
    python tests/benchmarks/speed.py --only step --compile       # training steps, compiled too
    python tests/benchmarks/speed.py --crop 64 --feature-size 12 --batch-size 2 --amp off
    python tests/benchmarks/speed.py --only scores crops --no-monai

Inputs are random: no data is read. The candidates of a row take turns, so that other work of the
machine slows all of them alike; a row gives the median of each, its range, the peak of its memory,
and the ratio to the first. No timing is a test.

network.py has the rows of the network, volumes.py those of what is done with volumes around it.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Event, Thread

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import network
import volumes

from dae.training.kernels import choose_kernels
from dae.training.precision import autocast_type

Run = Callable[[], object]
Candidates = dict[str, Run]

ROWS = {
    "forward": network.forward,
    "step": network.step,
    "pretext": network.pretext,
    "window": volumes.window,
    "scores": volumes.scores,
    "crops": volumes.crops,
}


def main() -> None:
    options = command_line()
    device = torch.device(options.device)
    choose_kernels(device, tf32=options.tf32)
    dtype = autocast_type(options.amp, device)

    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else platform.processor()
    print(f"torch {torch.__version__}, {name or device.type}, {torch.get_num_threads()} threads")
    print(
        f"batch {options.batch_size} of {options.crop}^3, feature size {options.feature_size}, "
        f"autocast {dtype}; volumes of {options.volume}^3, {options.classes} classes\n"
    )
    print("| work | candidate | ms, median | range | peak GiB | against the first |")
    print("|---|---|---|---|---|---|")
    for row in options.only or ROWS:
        candidates = ROWS[row](options, device, dtype)
        print_row(row, candidates, rounds=options.rounds, device=device)


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--only", nargs="+", choices=list(ROWS), help="rows; all if not given")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    add("--tf32", action="store_true")
    add("--compile", action="store_true", help="compiled candidates too: minutes each")
    add("--no-monai", action="store_true")
    add("--feature-size", type=int, default=48)
    add("--window", type=int, default=7, help="of the attention, in tokens")
    add("--crop", type=int, default=96)
    add("--batch-size", type=int, default=2)
    add("--classes", type=int, default=14, help="with the background")
    add("--overlap", type=float, default=0.5, help="of the sliding windows")
    add("--volume", type=int, default=160, help="side of the volumes of the last three rows")
    add("--rounds", type=int, default=9)
    return parser.parse_args()


# --- measuring


def print_row(work: str, candidates: Candidates, *, rounds: int, device: torch.device) -> None:
    """Every candidate is warmed up, then they take turns, `rounds` times."""
    peaks = {name: warm_up(run, device) for name, run in candidates.items()}

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(milliseconds(run, device))

    medians = {name: median(measured) for name, measured in times.items()}
    first = next(iter(medians.values()))
    for name, measured in times.items():
        spread = f"{min(measured):.1f} to {max(measured):.1f}"
        ratio = medians[name] / first
        print(
            f"| {work} | {name} | {medians[name]:.1f} | {spread} | {peaks[name]} | {ratio:.2f} |",
            flush=True,
        )


def warm_up(run: Run, device: torch.device) -> str:
    """Returns the peak memory in GiB, beyond what was there before: of the process on a CPU."""
    if device.type != "cuda":
        return f"{peak_of_process(run) / 2**30:.2f}"

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


def peak_of_process(run: Run) -> int:
    """The most bytes of memory that the process had while this ran, beyond those before (Linux)."""
    before = resident_bytes()
    peak = before
    done = Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak - before


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def milliseconds(run: Run, device: torch.device) -> float:
    """Of one call, the work of the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
