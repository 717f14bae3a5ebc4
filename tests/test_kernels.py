"""dae/training/kernels.py: a layout changes no number, and a resumed run may have another."""

from copy import deepcopy

import pytest
import torch
from conftest import NETWORK
from torch import Tensor

from dae.config.shared import OptimConfig
from dae.model import SwinUNETR
from dae.training.kernels import adopt_layout, advice, set_layout
from dae.training.optim import adamw

X = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
GPU = torch.device("cuda")


def network() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(1, 1, **NETWORK)


def step(model: SwinUNETR, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = model(X).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_layout_is_that_of_every_kernel_and_changes_no_output(
    layout: torch.memory_format,
) -> None:
    model = network()
    other = network()
    set_layout(other, layout)
    assert all(p.is_contiguous(memory_format=layout) for p in other.parameters() if p.ndim == 5)
    assert torch.allclose(model(X), other(X), atol=1e-5)


def test_kernels_of_one_channel_have_the_strides_of_the_layout_too() -> None:
    """They count as contiguous either way, but a convolution looks at their strides."""
    model = network()
    set_layout(model, torch.channels_last_3d)
    kernel = model.image_block.conv1.weight
    assert kernel.shape[1] == 1 and kernel.stride() == (27, 1, 9, 3, 1)


def test_a_resumed_optimizer_takes_on_the_layout_of_its_parameters_and_goes_on_alike() -> None:
    model = network()
    set_layout(model, torch.contiguous_format)
    optimizer = adamw(model.named_parameters(), OptimConfig())
    step(model, optimizer)

    resumed = network()
    resumed.load_state_dict(model.state_dict())
    set_layout(resumed, torch.channels_last_3d)
    again = adamw(resumed.named_parameters(), OptimConfig())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    adopt_layout(again)
    assert all(state["exp_avg"].stride() == p.stride() for p, state in again.state.items())

    for a, b in zip(model.parameters(), resumed.parameters()):
        a.grad = torch.randn(a.shape)
        b.grad = torch.empty_like(b).copy_(a.grad)
    optimizer.step()
    again.step()
    for a, b in zip(model.parameters(), resumed.parameters()):
        assert torch.allclose(a, b, atol=1e-7)


def test_what_would_be_faster_on_a_gpu_is_said_and_nothing_on_a_cpu() -> None:
    assert advice("auto", None, CPU, compiled=False) == ""
    assert advice("auto", torch.bfloat16, GPU, compiled=True) == ""
    assert "--amp fp16" in advice("auto", None, GPU, compiled=True)
    assert "--amp" not in advice("off", None, GPU, compiled=True)
    assert "--compile" in advice("auto", torch.bfloat16, GPU, compiled=False)
