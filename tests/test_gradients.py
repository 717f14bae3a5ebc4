"""The gradients that the loops train on are those of the loss they print, for every parameter.

torch has had kernels whose output is right and whose gradient is wrong for one layout, one batch
size or one device. So every backbone and the whole `Pretext` are compared, in float64, with three
others: their samples one by one, finite differences, and the same network in explicit formulas.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from dae import check
from dae.config.pretrain import PretextConfig
from dae.model import BACKBONES, swin
from dae.model.conv import InstanceNorm
from dae.pretext.baselines import pretext_of
from dae.pretext.methods import METHODS, Pretext
from dae.training.kernels import set_layout

Gradients = dict[str, Tensor]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
# Voxels along d h w: tokens that fill whole windows, and an odd number of them along every axis of
# the bottleneck, so that windows are padded, rolled and clipped.
GRIDS = {"even": (24, 24, 24), "odd": (8, 24, 16)}
# One sample is a case of its own: the loops see it with --batch-size 1, and in a last rank's share.
BATCHES = [1, 2, 3]

every = pytest.mark.parametrize("name", BACKBONES)


def network(
    name: str, *, layout: str = "channels_last", dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    torch.manual_seed(0)
    model = BACKBONES[name](1, 2, **{**check.SMALL[name], **more}).to(dtype)
    set_layout(model, LAYOUTS[layout])
    return model


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def crops(grid: str, batch: int) -> Tensor:
    return normal(1, batch, 1, *GRIDS[grid])


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A mean over samples in which every voxel of every channel has a weight of its own."""
    y = model(x)
    weight = normal(2, *y.shape[1:])
    return (y * weight.to(y.dtype)).mean() + y.square().mean()


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Gradients:
    model.zero_grad(set_to_none=True)
    loss().backward()
    by_name = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            by_name[name] = parameter.grad.clone()
    return by_name


def mean_of(samples: list[Gradients]) -> Gradients:
    mean = {}
    for name in samples[0]:
        mean[name] = torch.stack([sample[name] for sample in samples]).mean(dim=0)
    return mean


def largest_difference(found: Gradients, expected: Gradients) -> float:
    """Of any parameter's gradient, relative to its norm; those that are 0 are left out."""
    assert found.keys() == expected.keys()
    differences = []
    for name, gradient in expected.items():
        if gradient.any():
            differences.append(float((found[name] - gradient).norm() / gradient.norm()))
    return max(differences)


# --- (a) the samples one by one


@every
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_gradient_of_a_batch_is_the_mean_of_its_samples(
    name: str, grid: str, layout: str
) -> None:
    model = network(name, layout=layout)
    x = crops(grid, 3)
    of_samples = [gradients(model, partial(loss_of, model, sample[None])) for sample in x]
    for batch in BATCHES[1:]:
        of_batch = gradients(model, partial(loss_of, model, x[:batch]))
        assert largest_difference(of_batch, mean_of(of_samples[:batch])) < 1e-9, batch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recon", ["plain", "scaled"])
def test_the_gradient_of_a_pretext_is_the_mean_of_its_samples(method: str, recon: str) -> None:
    """Without CMCL, which is the one term that compares samples."""
    options = PretextConfig(method=method, mask_block=8, recon=recon, alpha=0.0)
    torch.manual_seed(0)
    backbone: Any = BACKBONES["swin_unetr"](1, 1, **check.SMALL["swin_unetr"])
    net = Pretext(backbone, method, options).double()
    x = crops("odd", 3)
    modality = torch.tensor([0, 1, 0])
    seeds = [5, 6, 7]

    def loss(part: slice) -> Tensor:
        drawn = net.draw(x[part], seeds[part])
        return net(x[part], modality[part], drawn).loss  # type: ignore[no-any-return]

    of_batch = gradients(net, partial(loss, slice(None)))
    of_samples = [gradients(net, partial(loss, slice(n, n + 1))) for n in range(3)]
    # The losses are float32 by design, so the gradients have its digits.
    assert largest_difference(of_batch, mean_of(of_samples)) < 1e-5


def pretext_in_float64(method: str) -> Any:
    torch.manual_seed(0)
    backbone: Any = BACKBONES["swin_unetr"](1, 1, **check.SMALL["swin_unetr"])
    return pretext_of(backbone, PretextConfig(method=method, mask_block=4)).double()


# L1 is float32 by design, so the gradients of smit have its digits.
@pytest.mark.parametrize("method, allowed", [("rotation", 1e-9), ("smit", 1e-5)])
def test_the_gradient_of_a_baseline_without_contrast_is_the_mean_of_its_samples(
    method: str, allowed: float
) -> None:
    net = pretext_in_float64(method)
    x = crops("even", 3)
    modality = torch.tensor([0, 1, 0])

    def loss(part: slice) -> Tensor:
        drawn = net.draw(x[part], [5, 6, 7][part])
        return net(x[part], modality[part], drawn).loss  # type: ignore[no-any-return]

    of_batch = gradients(net, partial(loss, slice(None)))
    of_samples = [gradients(net, partial(loss, slice(n, n + 1))) for n in range(3)]
    assert largest_difference(of_batch, mean_of(of_samples)) < allowed


@pytest.mark.parametrize("method", ["contrastive", "swin_unetr"])
def test_the_gradient_of_a_contrast_is_that_of_its_samples_one_by_one_and_a_double_loop(
    method: str,
) -> None:
    """Each sample goes through the network alone; only the projections meet, in explicit sums."""
    net = pretext_in_float64(method)
    x = crops("even", 3)
    modality = torch.tensor([0, 1, 0])
    seeds = [5, 6, 7]

    def of_batch() -> Tensor:
        return net(x, modality, net.draw(x, seeds)).loss  # type: ignore[no-any-return]

    def of_samples() -> Tensor:
        projections: list[Tensor] = []
        other_terms: list[Tensor] = []

        def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            projections.append(output)

        handle = net.project.register_forward_hook(watch)
        for n in range(3):
            drawn = net.draw(x[n : n + 1], seeds[n : n + 1])
            output = net(x[n : n + 1], modality[n : n + 1], drawn)
            other_terms.append(output.loss)  # NT-Xent of one sample is 0
        handle.remove()
        contrast = nt_xent_by_a_double_loop(torch.stack(projections), 0.5)
        return contrast + torch.stack(other_terms).mean()

    assert of_batch().item() == pytest.approx(of_samples().item(), abs=1e-5)
    # NT-Xent is float32 by design, so the gradients have its digits.
    assert largest_difference(gradients(net, of_batch), gradients(net, of_samples)) < 1e-4


def nt_xent_by_a_double_loop(h: Tensor, temperature: float) -> Tensor:
    """h (n, 2, e)."""
    views = [(n, v) for n in range(len(h)) for v in range(2)]
    total = torch.zeros((), dtype=h.dtype)
    for n, v in views:
        below = torch.zeros((), dtype=h.dtype)
        for m, u in views:
            if (m, u) != (n, v):
                cosine = (h[n, v] * h[m, u]).sum() / (h[n, v].norm() * h[m, u].norm())
                below = below + (cosine / temperature).exp()
        own = (h[n, v] * h[n, 1 - v]).sum() / (h[n, v].norm() * h[n, 1 - v].norm())
        total = total - own / temperature + below.log()
    return total / len(views)


# --- (b) finite differences


@every
@pytest.mark.parametrize("batch", BATCHES)
def test_the_gradient_of_every_parameter_is_that_of_finite_differences(
    name: str, batch: int
) -> None:
    model = network(name)
    x = crops("odd", batch)
    found = gradients(model, partial(loss_of, model, x))
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        # Half along the gradient, half at random: it neither vanishes nor misses what is beside it.
        gradient = found[parameter_name]
        aside = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction = gradient / gradient.norm() + aside / aside.norm()

        expected = float((gradient * direction).sum())
        slope = slope_along(direction, parameter, partial(loss_of, model, x))
        assert slope == pytest.approx(expected, rel=1e-3, abs=1e-8), parameter_name


@torch.no_grad()
def slope_along(direction: Tensor, parameter: Tensor, loss: Callable[[], Tensor]) -> float:
    step = 1e-7  # leaky ReLU has kinks: a larger step crosses more of them
    before = parameter.clone()
    parameter.copy_(before + step * direction)
    loss_after = loss()
    parameter.copy_(before - step * direction)
    loss_before = loss()
    parameter.copy_(before)
    return float(loss_after - loss_before) / (2 * step)


# --- (c) explicit formulas


def instance_norm(self: InstanceNorm, x: Tensor) -> Tensor:
    centred = x - reduce(x, "b c d h w -> b c 1 1 1", "mean")
    variance = reduce(centred**2, "b c d h w -> b c 1 1 1", "mean")
    y = centred / (variance + 1e-5).sqrt()
    if self.weight is None or self.bias is None:
        return y
    return y * rearrange(self.weight, "c -> c 1 1 1") + rearrange(self.bias, "c -> c 1 1 1")


def layer_norm(
    x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight + bias


def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return swin.attention_by_the_formula(q, k, v, torch.zeros((), dtype=q.dtype))


def recomputed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: Any, shift: Any) -> Tensor:
    nd, nh, nw = q.shape[1:4]
    grid = (nd * window[0], nh * window[1], nw * window[2])
    mask = swin.attention_mask(grid, window, shift, q.device)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None], float("-inf"))
        bias = rearrange(bias, "(nd nh nw) heads i j -> nd nh nw heads i j", nd=nd, nh=nh)
    return swin.attention_by_the_formula(q, k, v, bias)


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *_: Any
) -> Tensor:
    d, h, w = padding
    x = F.pad(x, (w, w, h, h, d, d))
    for axis in range(3):
        x = x.unfold(2 + axis, weight.shape[2 + axis], stride[axis])
    y = torch.einsum("bcdhwxyz,ocxyz->bodhw", x, weight)
    return y if bias is None else y + rearrange(bias, "c -> c 1 1 1")


def conv_transpose3d(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    """Of 2x2x2 kernels with stride 2, which do not overlap."""
    y = torch.einsum("bcdhw,coxyz->bodxhywz", x, weight)
    y = rearrange(y, "b o d x h y w z -> b o (d x) (h y) (w z)")
    return y if bias is None else y + rearrange(bias, "c -> c 1 1 1")


@every
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_gradient_is_that_of_the_same_network_in_explicit_formulas(
    name: str, batch: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(name, checkpointing=checkpointing)
    x = crops("odd", batch)
    found = gradients(model, partial(loss_of, model, x))

    plain = network(name, layout="contiguous")
    monkeypatch.setattr(InstanceNorm, "forward", instance_norm)
    monkeypatch.setattr(swin.RecomputedAttention, "apply", recomputed)
    monkeypatch.setattr(F, "layer_norm", layer_norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "conv3d", conv3d)
    monkeypatch.setattr(F, "conv_transpose3d", conv_transpose3d)
    expected = gradients(plain, partial(loss_of, plain, x))
    assert largest_difference(found, expected) < 1e-9


@every
@pytest.mark.parametrize("batch", BATCHES)
def test_float32_gradients_are_those_of_float64_to_three_digits(name: str, batch: int) -> None:
    """Seen: 3e-7 to 3e-4 of the whole gradient's norm, and up to 1e-2 of a single small
    parameter's.

    Rounding moves a few activations across the kink of leaky ReLU, each of which changes its
    gradient.
    """
    exact = network(name)
    rough = network(name, dtype=torch.float32)
    x = crops("even", batch)
    found = gradients(rough, partial(loss_of, rough, x.float()))
    expected = gradients(exact, partial(loss_of, exact, x))

    found = {name: gradient.double() for name, gradient in found.items()}
    assert largest_difference(found, expected) < 3e-2
    assert (whole(found) - whole(expected)).norm() < 1e-3 * whole(expected).norm()


def whole(by_name: Gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in by_name.values()])


# --- the command


def test_the_check_of_a_machine_says_in_one_line_that_gradients_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["check", "--device", "cpu"])
    assert check.main() == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("gradients right on CPU, torch ")


def test_the_check_of_a_machine_finds_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's own instance norm, without what this package does about its gradient at batch 1."""

    def torchs(self: InstanceNorm, x: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, self.weight, self.bias)

    monkeypatch.setattr("sys.argv", ["check", "--device", "cpu"])
    monkeypatch.setattr(InstanceNorm, "forward", torchs)
    wrong = torch_is_wrong_at_batch_1()
    assert check.main() == int(wrong)
    assert capsys.readouterr().out.startswith("gradients WRONG" if wrong else "gradients right")


def test_the_check_of_a_machine_finds_what_is_wrong_in_one_layout_for_every_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = check.gradients
    calls: list[int] = []

    def wrong_in_the_second_layout(model: nn.Module, x: Tensor) -> Gradients:
        calls.append(0)
        by_name = right(model, x)
        return {name: g * (1 if len(calls) <= 4 else 3) for name, g in by_name.items()}

    monkeypatch.setattr(check, "gradients", wrong_in_the_second_layout)
    cpu = torch.device("cpu")
    assert check.largest_difference("unet", cpu, torch.float64) > 0.1
    assert len(calls) == 8  # a batch and three samples in each layout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_of_a_gpu_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["check", "--device", "cuda"])
    assert check.main() == 2
    assert capsys.readouterr().err == (
        "python -m dae.check: --device cuda: torch finds no GPU here\n"
    )


def test_the_check_of_a_machine_takes_nan_for_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a bf16 kernel of torch 2.14 has made them; a comparison with NaN is never true."""
    right = check.gradients

    def with_nan(model: nn.Module, x: Tensor) -> Gradients:
        by_name = right(model, x)
        first = next(iter(by_name))
        return {**by_name, first: torch.full_like(by_name[first], torch.nan)}

    monkeypatch.setattr(check, "gradients", with_nan)
    monkeypatch.setattr("sys.argv", ["check", "--device", "cpu"])
    assert check.main() == 1
    assert capsys.readouterr().out.startswith("gradients WRONG")


def torch_is_wrong_at_batch_1() -> bool:
    """Whether this torch still has the fault; Standardise is without it."""
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(x).contiguous(memory_format=torch.channels_last_3d)
    (found,) = torch.autograd.grad(F.instance_norm(x), x, gradient)
    (expected,) = torch.autograd.grad(F.instance_norm(x), x, gradient.contiguous())
    return not torch.allclose(found, expected)
