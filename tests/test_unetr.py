"""dae/model/unetr.py and conv.py: the three stages, the sizes they take, and what they refuse."""

from typing import Any

import pytest
import torch
from conftest import NETWORK
from torch import Tensor
from torch.nn import functional as F

from dae.model import SwinUNETR, check_size, conv
from dae.model.conv import InstanceNorm, ResidualBlock, convolve

pieces_of_a_map = pytest.mark.parametrize("at_once", [10, conv.AT_ONCE])  # many of them, and one


@pieces_of_a_map
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("trained", [False, True])
def test_instance_norm_is_torchs(
    trained: bool, layout: torch.memory_format, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "AT_ONCE", 7 * at_once)
    x = (torch.randn(2, 5, 4, 3, 6) + 3).contiguous(memory_format=layout).requires_grad_(trained)
    assert torch.allclose(InstanceNorm(5)(x), F.instance_norm(x), atol=1e-6)


@pieces_of_a_map
@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_of_instance_norm_is_that_of_finite_differences(
    batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "AT_ONCE", at_once)
    norm = InstanceNorm(2, affine=True).double()
    torch.nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    x = torch.randn(batch, 2, 2, 3, 2, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        assert torch.autograd.gradcheck(norm, x.contiguous(memory_format=layout).requires_grad_())


def test_the_norm_of_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    """To the last bit, so that ranks may share a batch in any way."""
    x = torch.randn(3, 5, 32, 32, 33)
    d_y = torch.randn_like(x)

    def norm_and_gradient(x: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        y = InstanceNorm(5)(x)
        return y, torch.autograd.grad(y, x, d_y)[0]

    y, d_x = norm_and_gradient(x, d_y)
    for n in range(3):
        y_alone, d_x_alone = norm_and_gradient(x[n : n + 1], d_y[n : n + 1])
        assert torch.equal(y_alone[0], y[n])
        assert torch.equal(d_x_alone[0], d_x[n])


@pytest.mark.parametrize("batch", [1, 2])
def test_weights_of_a_norm_are_trained_behind_layers_that_are_not(batch: int) -> None:
    """torch's own norm gives them wrong gradients at batch 1."""
    norm = InstanceNorm(4, affine=True).double()
    x = torch.randn(batch, 4, 3, 4, 5, dtype=torch.float64)
    gradient = torch.randn_like(x).contiguous(memory_format=torch.channels_last_3d)
    found = torch.autograd.grad(norm(x), list(norm.parameters()), gradient)

    standard = (x - x.mean((2, 3, 4), keepdim=True)) / (
        x.var((2, 3, 4), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    assert torch.allclose(found[0], (gradient * standard).sum((0, 2, 3, 4)))
    assert torch.allclose(found[1], gradient.sum((0, 2, 3, 4)))


def test_instance_norm_in_bf16_computes_in_float32() -> None:
    """Its mean over a crop of 32^3 voxels would be off by a percent of 30 in bf16."""
    x = torch.randn(1, 3, 32, 32, 32) + 30
    rounded = x.bfloat16().requires_grad_()
    y = InstanceNorm(3)(rounded)
    assert y.dtype == torch.bfloat16
    assert (y.float() - F.instance_norm(rounded.float())).abs().max() < 0.02  # y is below 5
    y.float().square().sum().backward()
    assert rounded.grad is not None and rounded.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("trained", [False, True])
def test_instance_norm_of_a_single_voxel_raises(trained: bool) -> None:
    with pytest.raises(ValueError):
        InstanceNorm(2)(torch.randn(1, 2, 1, 1, 1, requires_grad=trained))


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_one_voxel_is_torchs(bias: bool) -> None:
    """On a CPU it is computed as a linear layer."""
    conv = torch.nn.Conv3d(3, 5, 1, bias=bias).double()
    x = torch.randn(2, 3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        y = convolve(conv, x.contiguous(memory_format=layout))
        assert torch.allclose(y, conv(x))
        found = torch.autograd.grad(y.square().sum(), [x, conv.weight])
        expected = torch.autograd.grad(conv(x).square().sum(), [x, conv.weight])
        assert all(torch.allclose(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    "depths, heads", [((1, 1), (1, 2)), ((1, 1, 2), (1, 2, 2)), ((1, 1, 1, 1), (1, 2, 2, 4))]
)
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_number_of_stages_gives_its_states_and_an_output_on_the_grid_of_the_input(
    depths: tuple[int, ...], heads: tuple[int, ...], stem: Any
) -> None:
    model = SwinUNETR(2, 3, feature_size=4, depths=depths, heads=heads, window=(3, 3, 3), stem=stem)
    n = model.divisor
    x = torch.randn(1, 2, n, 2 * n, n)

    tokens = model.tokenize(x)
    states = model.encode(tokens)
    assert states[0].shape == tokens.shape
    assert len(states) == len(depths) + 1
    for stage, state in enumerate(states):
        side = n // 2 ** (stage + 1)
        assert state.shape == (1, 4 * 2**stage, side, 2 * side, side)

    y = model.decode(states, x)
    assert y.shape == (1, 3, n, 2 * n, n)
    assert torch.equal(model(x), y)


def test_tokens_stay_channels_last_from_the_stem_to_the_decoder() -> None:
    model = SwinUNETR(1, 1, **NETWORK)
    states = model.encode(model.tokenize(torch.randn(2, 1, 16, 16, 16)))
    assert all(s.is_contiguous(memory_format=torch.channels_last_3d) for s in states)


def test_gradients_reach_every_parameter() -> None:
    model = SwinUNETR(1, 2, **NETWORK, stage_conv=True)
    model(torch.randn(1, 1, 16, 16, 16)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_checkpointing_changes_no_gradient() -> None:
    ramp = torch.ones(1, 1, 16, 16, 16).cumsum(2)
    gradients: list[list[Tensor | None]] = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SwinUNETR(1, 1, **NETWORK, checkpointing=checkpointing)
        model(ramp).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])

    for kept, recomputed in zip(*gradients):
        assert kept is not None and recomputed is not None
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(
    "size, words",
    [
        ((90, 96, 96), "96 96 96 would fit"),
        ((32, 32, 32), "64 64 64 would fit"),
        ((96, 96, 0), "96 96 32 would fit"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(
    size: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32.*{words}"):
        check_size(size, 32)


def test_the_network_itself_refuses_such_a_size() -> None:
    with pytest.raises(ValueError, match="size 16 12 16 does not fit"):
        SwinUNETR(1, 1, **NETWORK)(torch.zeros(1, 1, 16, 12, 16))


@pytest.mark.parametrize(
    "wrong", [{"depths": (2,)}, {"heads": (3, 6)}, {"feature_size": 10}, {"window": (7, 7, 0)}]
)
def test_arguments_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stage|heads|window"):
        SwinUNETR(1, 1, **{"feature_size": 12, **wrong})


def test_bf16_gradients_of_a_bottleneck_two_voxels_deep_are_those_of_float32() -> None:
    """There a CPU kernel reads memory that was never written; the block avoids the kernel."""
    torch.manual_seed(0)
    block = ResidualBlock(16, 16)
    x = torch.randn(2, 16, 2, 4, 4)

    (exact,) = torch.autograd.grad(block(x).square().mean(), block.conv1.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = block(x).float().square().mean()
    (rough,) = torch.autograd.grad(loss, block.conv1.weight)
    assert torch.allclose(rough, exact, atol=0.05 * float(exact.abs().max()))
