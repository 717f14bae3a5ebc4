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
from dae.model.probe import Probe

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
    net = net.double()
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
    assert torch.equal(net(x), wanted)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@every
def test_a_sample_does_not_depend_on_its_company_and_a_copy_is_whole(name: str) -> None:
    net, _ = probe(name, channels=2)
    x = image(channels=2)
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
