"""How fast the network is on this machine, beside MONAI's where that is installed. Prints a table.

    python tests/benchmarks/speed.py                             # what this machine has, GPU or CPU
    python tests/benchmarks/speed.py --only step --compile       # training steps, compiled too
    python tests/benchmarks/speed.py --crop 64 --feature-size 12 --batch-size 2 --amp off

Inputs are random: no data is read. The candidates of a row take turns, so that what else the machine
does strikes all alike; a row gives each one's median, its range, its peak memory on a GPU, and the
ratio to the first. No timing is a test.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from dae.config.pretrain import PretextConfig
from dae.model import SwinUNETR
from dae.pretext.methods import Pretext
from dae.training.kernels import choose_kernels, lay_out
from dae.training.precision import autocast, autocast_type

Candidates = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="+", choices=["forward", "step", "pretext"], help="rows; all if not given"
    )
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="compiled candidates too: minutes each"
    )
    parser.add_argument("--no-monai", action="store_true")
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--classes", type=int, default=14, help="channels of the output of row `forward`"
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    device = torch.device(options.device)
    choose_kernels(device, tf32=options.tf32)
    dtype = autocast_type(options.amp, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"torch {torch.__version__}, {name or device.type}, {torch.get_num_threads()} threads")
    print(
        f"batch {options.batch_size} of {options.crop}^3, feature size {options.feature_size}, autocast {dtype}\n"
    )
    print("| work | candidate | ms, median | range | peak GiB | against the first |")
    print("|---|---|---|---|---|---|")
    for row in options.only or ["forward", "step", "pretext"]:
        table(row, ROWS[row](options, device, dtype), options.rounds, device)


def forward(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Prediction: no gradients."""
    x = crops(options, device)

    def of(network: nn.Module) -> Callable[[], object]:
        network = network.to(device).eval()

        def run() -> None:
            with torch.no_grad(), autocast(dtype, device):
                network(x)

        return run

    found: Candidates = {"ours": of(ours(options, options.classes, device, compiled=False))}
    if options.compile:
        found["ours, compiled"] = of(
            torch.compile(ours(options, options.classes, device, compiled=True))
        )  # type: ignore[arg-type]
    if not options.no_monai:
        found["MONAI"] = of(monai(options, options.classes))
        found["MONAI, flash attention"] = of(
            monai(options, options.classes, use_flash_attention=True)
        )
    return found


def step(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Forward, L1, backward and AdamW."""
    x = crops(options, device)

    def of(network: nn.Module) -> Callable[[], object]:
        network = network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")

        def run() -> None:
            with autocast(dtype, device):
                y = network(x)
            (y.float() - x).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    found: Candidates = {"ours": of(ours(options, 1, device, compiled=False))}
    if options.compile:
        found["ours, compiled"] = of(torch.compile(ours(options, 1, device, compiled=True)))  # type: ignore[arg-type]
    if not options.no_monai:
        found["MONAI"] = of(monai(options, 1))
        if options.compile:
            found["MONAI, compiled"] = of(torch.compile(monai(options, 1)))  # type: ignore[arg-type]
    return found


def pretext(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """A whole step of pre-training: draw, disrupt, reconstruct, contrast, clip, AdamW."""
    x = crops(options, device)
    modality = torch.arange(options.batch_size, device=device) % 2

    def of(compiled: bool) -> Callable[[], object]:
        net = Pretext(ours(options, 1, device, compiled=compiled), "dae", PretextConfig()).to(
            device
        )  # type: ignore[arg-type]
        network = torch.compile(net) if compiled else net
        optimizer = torch.optim.AdamW(net.parameters(), fused=device.type == "cuda")

        def run() -> None:
            drawn = net.draw(x, range(options.batch_size))
            with autocast(dtype, device):
                loss = network(x, modality, drawn).loss
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    found: Candidates = {"ours": of(False)}
    if options.compile:
        found["ours, compiled"] = of(True)
    return found


ROWS = {"forward": forward, "step": step, "pretext": pretext}


def crops(options: Any, device: torch.device) -> Tensor:
    return torch.randn(options.batch_size, 1, *[options.crop] * 3, device=device)


def ours(options: Any, channels: int, device: torch.device, *, compiled: bool) -> nn.Module:
    window = (options.window, options.window, options.window)
    network = SwinUNETR(1, channels, feature_size=options.feature_size, window=window).to(device)
    lay_out(network, device, compiled=compiled)
    return network


def monai(options: Any, channels: int, **more: Any) -> nn.Module:
    try:
        from monai.networks.nets import SwinUNETR as Theirs
    except ImportError:
        sys.exit("MONAI is not installed: --no-monai, or pip install monai in another environment")
    return Theirs(  # type: ignore[no-any-return]
        in_channels=1,
        out_channels=channels,
        feature_size=options.feature_size,
        window_size=options.window,
        **more,
    )


def table(work: str, candidates: Candidates, rounds: int, device: torch.device) -> None:
    """Every candidate is warmed up, then each in turn, `rounds` times."""
    peaks: dict[str, float] = {}
    for name, run in candidates.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(3 if device.type == "cuda" else 1):
            run()
        if device.type == "cuda":
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(1e3 * seconds(run, device))

    first = median(next(iter(times.values())))
    for name, found in times.items():
        middle, peak = median(found), f"{peaks[name]:.2f}" if name in peaks else ""
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(
            f"| {work} | {name} | {middle:.1f} | {spread} | {peak} | {middle / first:.2f} |",
            flush=True,
        )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
