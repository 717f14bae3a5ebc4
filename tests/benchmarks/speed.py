"""How fast the network is on this machine, beside MONAI's where that is installed. Prints a table.

    python tests/benchmarks/speed.py                             # what this machine has, GPU or CPU
    python tests/benchmarks/speed.py --only step --compile       # training steps, compiled too
    python tests/benchmarks/speed.py --crop 64 --feature-size 12 --batch-size 2 --amp off

Inputs are random: no data is read. The candidates of a row take turns, so that other work of the
machine slows all of them alike; a row gives the median of each, its range, its peak memory on a
GPU, and the ratio to the first. No timing is a test.
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

Run = Callable[[], None]
Candidates = dict[str, Run]


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
        f"autocast {dtype}\n"
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
    add("--window", type=int, default=7)
    add("--crop", type=int, default=96)
    add("--batch-size", type=int, default=2)
    add("--classes", type=int, default=14, help="channels of the output of row `forward`")
    add("--rounds", type=int, default=9)
    return parser.parse_args()


# --- the rows


def forward(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Prediction: no gradients."""
    x = crops(options, device)

    def run_of(network: nn.Module) -> Run:
        network = network.to(device).eval()

        def run() -> None:
            with torch.no_grad(), autocast(dtype, device):
                network(x)

        return run

    channels = options.classes
    candidates = {"ours": run_of(ours(options, channels, device))}
    if options.compile:
        candidates["ours, compiled"] = run_of(ours(options, channels, device, compiled=True))
    if not options.no_monai:
        candidates["MONAI"] = run_of(monai(options, channels))
        candidates["MONAI, flash attention"] = run_of(
            monai(options, channels, use_flash_attention=True)
        )
    return candidates


def step(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Forward, L1, backward and AdamW."""
    x = crops(options, device)

    def run_of(network: nn.Module) -> Run:
        network = network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")

        def run() -> None:
            with autocast(dtype, device):
                y = network(x)
            (y.float() - x).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    candidates = {"ours": run_of(ours(options, 1, device))}
    if options.compile:
        candidates["ours, compiled"] = run_of(ours(options, 1, device, compiled=True))
    if not options.no_monai:
        candidates["MONAI"] = run_of(monai(options, 1))
        if options.compile:
            candidates["MONAI, compiled"] = run_of(compile_network(monai(options, 1)))
    return candidates


def pretext(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """A whole step of pre-training: draw, disrupt, reconstruct, contrast, clip, AdamW."""
    x = crops(options, device)
    modality = torch.arange(options.batch_size, device=device) % 2

    def run_of(*, compiled: bool) -> Run:
        backbone: Any = swin_unetr(options, 1, device, compiled=compiled)
        net = Pretext(backbone, "dae", PretextConfig()).to(device)
        network = compile_network(net) if compiled else net
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

    candidates = {"ours": run_of(compiled=False)}
    if options.compile:
        candidates["ours, compiled"] = run_of(compiled=True)
    return candidates


ROWS = {"forward": forward, "step": step, "pretext": pretext}


# --- the candidates


def crops(options: Any, device: torch.device) -> Tensor:
    return torch.randn(options.batch_size, 1, *[options.crop] * 3, device=device)


def ours(options: Any, channels: int, device: torch.device, *, compiled: bool = False) -> nn.Module:
    network = swin_unetr(options, channels, device, compiled=compiled)
    return compile_network(network) if compiled else network


def swin_unetr(options: Any, channels: int, device: torch.device, *, compiled: bool) -> nn.Module:
    """In the memory layout that is fast on the device, compiled or not."""
    window = (options.window, options.window, options.window)
    network = SwinUNETR(1, channels, feature_size=options.feature_size, window=window).to(device)
    lay_out(network, device, compiled=compiled)
    return network


def compile_network(network: nn.Module) -> nn.Module:
    return torch.compile(network)  # type: ignore[return-value]


def monai(options: Any, channels: int, **more: Any) -> nn.Module:
    try:
        from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
    except ImportError:
        sys.exit("MONAI is not installed: --no-monai, or pip install monai in another environment")
    return MonaiSwinUNETR(  # type: ignore[no-any-return]
        in_channels=1,
        out_channels=channels,
        feature_size=options.feature_size,
        window_size=options.window,
        **more,
    )


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
    """Returns the peak memory in GiB, beyond what was allocated before; nothing on a CPU."""
    if device.type != "cuda":
        run()
        return ""

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


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
