"""What makes one network fast on each device: memory layout, kernel search, TF32.

Results depend on it in their last digits only. docs/performance.md has the measurements.
"""

import torch
from torch import nn


def choose_kernels(device: torch.device, *, tf32: bool) -> None:
    """Search for the fastest convolutions of a GPU, and set whether TF32 may be used.

    Both hold for the whole process. Crops have one size, so the search (some seconds) is done once.
    TF32 is for float32 alone, that is for --amp off: 10 bits of mantissa in place of 23.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32


def lay_out(network: nn.Module, device: torch.device, *, compiled: bool) -> None:
    """Kernels of 3D convolutions in the layout that is fastest in the whole network; in place.

    A compiled network on a GPU keeps channels_last_3d throughout. Without the compiler torch's
    instance norm makes everything contiguous, so the kernels are contiguous too (a step on an H100:
    87 ms against 110). On a CPU a network keeps the layout it was built with.
    """
    if device.type == "cuda":
        set_layout(network, torch.channels_last_3d if compiled else torch.contiguous_format)


def set_layout(network: nn.Module, layout: torch.memory_format) -> None:
    """All kernels of 3D convolutions in one memory layout; in place."""
    for weight in network.parameters():
        if weight.ndim == 5:
            # A clone, because a kernel of one channel counts as contiguous in both layouts. Without
            # the clone its convolution may give its output in the other layout.
            weight.data = weight.data.clone(memory_format=layout)


def adopt_layout(optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's moments in the layout of their parameters; in place.

    A run may be resumed with another --compile or --device than it was saved with, and a fused
    optimiser needs moments in the layout of their parameters.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def advice(amp: str, dtype: torch.dtype | None, device: torch.device, *, compiled: bool) -> str:
    """Flags that would make a run on this GPU faster, for the end of the start line; or nothing."""
    if device.type != "cuda":
        return ""
    text = ""
    if dtype is None and amp == "auto":
        text += "; this GPU has no bf16, so autocast is off: --amp fp16 would be faster"
    if not compiled:
        text += "; --compile takes minutes at the start and makes a step on a GPU 1.6 times as fast"
    return text
