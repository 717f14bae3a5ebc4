"""Does this machine compute right gradients?  python -m dae.check

torch has had kernels whose outputs are right and whose gradients are wrong, for one layout, one
batch size or one device alone; a run on such a machine trains on garbage and says nothing. This
takes half a minute: run it once on a new machine or a new torch. It prints a line and ends with
exit code 0, or 1 if the gradients are wrong.

For each backbone, the gradient of a batch must be the mean of the gradients of its samples, taken
one by one, and the same in both memory layouts. In float64 on a CPU, float32 on a GPU; kernels of
half precision are not tried.
"""

import dae.quiet  # noqa: F401 - before torch

# isort: split
import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from dae.model import BACKBONES
from dae.training.kernels import set_layout

# Small, with padded, shifted and clipped windows.
SMALL: dict[str, dict[str, Any]] = {
    "swin_unetr": {"feature_size": 8, "depths": (2, 2), "heads": (2, 2), "window": (3, 3, 3)},
    "unet": {"feature_size": 8, "depths": (1, 2, 1)},
    "vit_unetr": {
        "feature_size": 4,
        "vit_channels": 24,
        "vit_depth": 3,
        "vit_heads": 2,
        "vit_patch": 8,
    },
}

# The largest relative difference. Seen: 3e-11 and less in float64; in float32 4e-3 on an H200 and
# 1e-2 on a CPU, for single small parameters, because rounding moves a few activations across the
# kink of leaky ReLU. A wrong kernel is off by 1 or more.
ALLOWED = {torch.float64: 1e-9, torch.float32: 5e-2}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dae.check", description=(__doc__ or "").strip()
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("python -m dae.check: --device cuda: torch finds no GPU here", file=sys.stderr)
        return 2
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    allowed = ALLOWED[dtype]

    # TF32 keeps 10 bits of a float32: its rounding would look like a wrong kernel.
    torch.backends.cudnn.allow_tf32 = False

    started = time.perf_counter()
    differences = {name: largest_difference(name, device, dtype) for name in BACKBONES}
    seconds = time.perf_counter() - started

    # NaN is not less than anything, and so not right.
    right = all(difference < allowed for difference in differences.values())

    verdict = "right" if right else "WRONG"
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    by_backbone = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
    print(
        f"gradients {verdict} on {device_name}, torch {torch.__version__}, {dtype}: "
        f"a batch against its samples differs by {by_backbone} (allowed {allowed:.0e}), "
        f"channels_last_3d and contiguous; {seconds:.0f} s"
    )
    return 0 if right else 1


def largest_difference(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Between the gradient of a batch of three, in two memory layouts, and the mean of its samples'
    gradients.

    Relative to the norm of a parameter's gradient; the largest over parameters and memory layouts.
    NaN if one of the differences is.
    """
    torch.manual_seed(0)
    network: Any = BACKBONES[name](1, 2, **SMALL[name]).to(device, dtype)
    size = [n * network.divisor for n in (1, 3, 2)]
    x = torch.randn(3, 1, *size, device=device, dtype=dtype)

    differences = []
    in_first_layout: dict[str, Tensor] = {}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        set_layout(network, layout)
        of_batch = gradients(network, x)
        of_samples = [gradients(network, x[n : n + 1]) for n in range(3)]

        for parameter, gradient in of_batch.items():
            mean = torch.stack([sample[parameter] for sample in of_samples]).mean(dim=0)
            first = in_first_layout.setdefault(parameter, gradient)
            for other in (mean, first):
                differences.append(float((gradient - other).norm() / gradient.norm()))

    # Python's max would pass over a NaN.
    return float(torch.tensor(differences).max())


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss that is a mean over samples, by name of the parameter."""
    network.zero_grad(set_to_none=True)
    network(x).square().mean().backward()

    by_name = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            by_name[name] = parameter.grad.clone()
    return by_name


if __name__ == "__main__":
    sys.exit(main())
