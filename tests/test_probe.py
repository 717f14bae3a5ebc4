"""dae/model/probe.py: a linear layer on the states of a frozen encoder, and nothing else."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETWORK
from scipy import ndimage
from torch import Tensor, nn

from dae.check import SMALL
from dae.model import BACKBONES
from dae.model.probe import Probe, Whiten, whitening

TINY: dict[str, dict[str, Any]] = {
    "swin_unetr": NETWORK,
    "unet": {"feature_size": 6, "depths": (1, 2, 1)},
    "vit_unetr": SMALL["vit_unetr"],
}
every = pytest.mark.parametrize("name", TINY)


def probe(name: str, *, channels: int = 1, classes: int = 3) -> tuple[Probe, Any]:
    torch.manual_seed(0)
    backbone = BACKBONES[name](channels, 1, **TINY[name])
    return Probe(backbone, channels, classes), backbone


def image(*size: int, channels: int = 1) -> Tensor:
    size = size or (16, 32, 16)
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def test_the_suite_knows_every_backbone() -> None:
    assert TINY.keys() == BACKBONES.keys()


@every
def test_it_is_one_linear_layer_on_all_states_upsampled_and_side_by_side(name: str) -> None:
    """By scipy's interpolation, in float64."""
    net, backbone = probe(name)
    net = net.double().eval()
    x = image().double()
    with torch.no_grad():
        states = backbone.encode(backbone.tokenize(x))

    side_by_side = []
    for state in states:
        mean = state.mean(dim=1, keepdim=True)
        variance = state.var(dim=1, keepdim=True, correction=0)
        values = ((state - mean) / (variance + 1e-5).sqrt()).numpy()
        zoom = (1, 1, *(n / m for n, m in zip(x.shape[2:], state.shape[2:])))
        side_by_side.append(ndimage.zoom(values, zoom, order=1, mode="nearest", grid_mode=True))
    channels = np.concatenate(side_by_side, axis=1)

    weight = torch.cat([layer.weight[:, :, 0, 0, 0] for layer in net.head], dim=1)
    wanted = np.einsum("b c d h w, k c -> b k d h w", channels, weight.detach().numpy())
    wanted += net.head[0].bias.detach().numpy()[:, None, None, None]
    assert net(x).shape == (2, 3, *x.shape[2:])
    np.testing.assert_allclose(net(x).detach().numpy(), wanted, atol=1e-10)


@every
def test_only_the_head_is_trained_and_the_decoder_is_no_part_of_it(name: str) -> None:
    net, backbone = probe(name)
    net.train()
    net(image()).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert key.startswith(("encoder.", "head.")), key
        assert (parameter.grad is not None) == key.startswith("head."), key
        assert parameter.requires_grad == key.startswith("head."), key
    encoder = {f"encoder.{key}" for key in backbone.encoder.state_dict()}
    assert encoder == {key for key in net.state_dict() if key.startswith("encoder.")}
    assert all(p.grad.abs().sum() > 0 for p in net.head.parameters() if p.grad is not None)


@every
def test_the_gradient_of_the_head_is_that_of_finite_differences(name: str) -> None:
    net, _ = probe(name, classes=1)
    net = net.double()
    x = image(16, 16, 32)[:1].double()
    weighted = torch.randn_like(net(x))
    (net(x) * weighted).sum().backward()
    net.eval()  # what the states were whitened by stays
    for layer in net.head:
        index = (0, 1, 0, 0, 0)
        values = []
        for change in (1e-4, -1e-4):
            with torch.no_grad():
                before = layer.weight[index].clone()
                layer.weight[index] += change
                values.append(float((net(x) * weighted).sum()))
                layer.weight[index] = before
        assert layer.weight.grad[index] == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5)


def some_states(n: int, *, seed: int = 2) -> Tensor:
    """Of 5 channels that depend on each other; nearly all of their variance is along one line."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 5, generator=rng) * torch.tensor([1, 0.3, 0.2, 0.03, 0.001])
    return 3 + torch.einsum(
        "k c, b c d h w -> b k d h w", mix, torch.randn(n, 5, 8, 9, 10, generator=rng)
    )


def test_states_are_whitened_over_all_that_was_trained_on() -> None:
    """In any batches, and afterwards always alike."""
    x = some_states(6)
    whole, halves = Whiten(5), Whiten(5)
    assert torch.equal(whole.eval()(x), x)

    y = whole.train()(x).double().numpy()
    covariance = np.cov(y.transpose(1, 0, 2, 3, 4).reshape(5, -1))
    # The last variance is a millionth of the first, and 1e-5 is added to all.
    np.testing.assert_allclose(covariance[:3, :3], np.eye(3), atol=0.05)
    assert abs(y.mean(axis=(0, 2, 3, 4))).max() < 1e-4

    halves.train()(x[:3])
    torch.testing.assert_close(halves(x[3:]), whole.eval()(x)[3:], atol=1e-3, rtol=0)
    torch.testing.assert_close(halves.eval()(x[:1]), whole(x)[:1], atol=1e-3, rtol=0)
    torch.testing.assert_close(halves.sums, whole.sums)


def test_whitening_is_what_the_textbook_says() -> None:
    """Solved by NumPy: W with W (C + share I) W^T = 1, lower triangular."""
    x = some_states(2)
    net = Whiten(5).train()
    net(x)

    positions = x.double().numpy().transpose(1, 0, 2, 3, 4).reshape(5, -1)
    covariance = np.cov(positions, ddof=0)
    share = 1 / positions.shape[1] + 1e-5
    regular = covariance + share * np.trace(covariance) / 5 * np.eye(5)

    mean, matrix = whitening(net.sums)
    np.testing.assert_allclose(mean.numpy(), positions.mean(axis=1))
    assert np.allclose(matrix, np.tril(matrix))
    np.testing.assert_allclose(matrix.numpy() @ regular @ matrix.numpy().T, np.eye(5), atol=1e-8)


def test_few_positions_are_not_taken_for_directions_without_variance() -> None:
    """Two positions of 20 channels: what they do not span is hardly made larger, not 300 times."""
    rng = torch.Generator().manual_seed(3)
    net = Whiten(20).train()
    net(torch.randn(1, 20, 2, 1, 1, generator=rng))
    other = torch.randn(1, 20, 30, 1, 1, generator=rng)
    assert 0.3 < net.eval()(other).std() < 3


def test_mixed_precision_does_not_blur_directions_of_little_variance() -> None:
    x = some_states(2)
    net = Whiten(5).train()
    wanted = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.eval()(x), wanted)


@every
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_probe_that_is_cast_whole_still_runs_on_one_crop(name: str, dtype: torch.dtype) -> None:
    """`to` casts the sums as well."""
    net, _ = probe(name)
    net = net.to(dtype).train()
    for x in (image(16, 16, 32)[:1], torch.zeros(1, 1, 16, 16, 32)):  # all alike: no variance
        y = net(x.to(dtype))
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("few", (False, True))
def test_a_head_is_trained_at_a_usual_rate_whatever_the_states_are_like(few: bool) -> None:
    """As the deep states of a Swin UNETR are: the channels differ by 1, the places by 0.005.

    Or (few) nearly all of the variance lies along a few directions, and what tells the label does
    not, as after pre-training.
    """
    rng = torch.Generator().manual_seed(3)
    label = torch.rand(1, 6, 6, 6, generator=rng) < 0.2
    state = torch.randn(1, 32, 1, 1, 1, generator=rng).expand(1, 32, 6, 6, 6).clone()
    state += 0.005 * torch.randn(1, 32, 6, 6, 6, generator=rng)
    state[:, 0] += 0.02 * label
    if few:
        large = torch.randn(1, 3, 6, 6, 6, generator=rng)
        state += torch.einsum(
            "k c, b c d h w -> b k d h w", torch.randn(32, 3, generator=rng), large
        )

    torch.manual_seed(0)
    net = nn.Sequential(Whiten(32), nn.Conv3d(32, 2, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(state), label.long()).backward()
        optimizer.step()
    found = net.eval()(state).argmax(dim=1).bool()
    assert 2 * (found & label).sum() / (found.sum() + label.sum()) > 0.9


class WithDropout(nn.Module):
    """A backbone of a user's, whose encoder computes otherwise while it is trained."""

    stride = 2
    divisor = 4
    embed_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(2, 4, 2, stride=2), nn.BatchNorm3d(4), nn.Dropout())
        self.head = nn.Conv3d(4, 1, 1)

    def tokenize(self, x: Tensor) -> Tensor:
        return self.encoder[0](x)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        return [self.encoder[1:](tokens)]


def test_the_encoder_is_frozen_where_it_has_a_dropout_and_a_batch_norm() -> None:
    net = Probe(WithDropout(), 2, 3)
    before = copy.deepcopy(net.state_dict())
    x = image(8, 8, 12, channels=2)
    net.eval()
    wanted = net(x)
    net.train()
    assert net.training and not net.encoder.training
    (state,) = net.states(x)
    values = net.head[0].whiten(state)
    torch.testing.assert_close(values.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, before[f"encoder.{name}"]), name

    fresh = Probe(net.backbone[0], 2, 3).eval()
    fresh.load_state_dict(before)
    assert torch.equal(fresh(x), wanted)


@every
def test_a_sample_does_not_depend_on_its_company_and_a_copy_is_whole(name: str) -> None:
    net, _ = probe(name, channels=2)
    x = image(channels=2)
    net.eval()
    torch.testing.assert_close(net(x)[:1], net(x[:1]), atol=1e-5, rtol=1e-5)

    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert other(x).abs().sum() > 0
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), other(x))


def test_it_is_built_on_the_device_meta_too() -> None:
    with torch.device("meta"):
        net = Probe(BACKBONES["swin_unetr"](1, 1, **NETWORK), 1, 3)
    assert [layer.in_channels for layer in net.head] == [8, 16, 32]


def test_it_is_built_on_a_backbone_of_float64_too() -> None:
    backbone = BACKBONES["swin_unetr"](2, 1, **NETWORK).double()
    net = Probe(backbone, 2, 3).double()
    assert net(torch.rand(1, 2, 16, 32, 16, dtype=torch.float64)).dtype == torch.float64
