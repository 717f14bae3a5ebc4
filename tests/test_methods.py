"""dae/pretext/methods.py: the six lines, the rows of Table 5, and the forms of x_rec."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import NETWORK
from torch import Tensor

from dae.config.pretrain import PretextConfig
from dae.model import SwinUNETR
from dae.pretext.methods import METHODS, Output, Pretext, l1_of, std

X = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 - 1
MODALITY, SEEDS = torch.tensor([0, 1]), [11, 12]


def pretext(method: str = "dae", **options: Any) -> Pretext:
    torch.manual_seed(0)
    return Pretext(SwinUNETR(1, 1, **NETWORK), method, PretextConfig(method=method, **options))


def step(net: Pretext, x: Tensor = X, seeds: Sequence[int] = SEEDS) -> Output:
    return net(x, MODALITY, net.draw(x, seeds))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_parameter_that_should_have_one(method: str) -> None:
    """Where the full-resolution skip is fed zeros its block has none, by intent."""
    net = pretext(method, mask_block=8)
    step(net, X).loss.backward()
    without = {
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    blind = {n for n, _ in net.named_parameters() if n.startswith("backbone.image_block")}
    assert without == (blind if method in ("local_mask", "mae") else set())


@pytest.mark.parametrize(
    "method, noisy, coarse",
    [
        ("dae", True, True),
        ("noise", True, False),
        ("downsample", False, True),
        ("local_mask", False, False),
        ("mae", False, False),
    ],
)
def test_each_row_of_table_5_disrupts_what_it_is_named_for(
    method: str, noisy: bool, coarse: bool
) -> None:
    x_hat = step(pretext(method, noise_std=0.1), X).x_hat
    other = step(pretext(method, noise_std=0.1), X, [13, 14]).x_hat
    assert torch.equal(x_hat, other) != noisy
    smooth = (x_hat[..., 1:] - x_hat[..., :-1]).abs().mean() < (
        X[..., 1:] - X[..., :-1]
    ).abs().mean() / 2
    assert bool(smooth) == coarse
    assert torch.equal(x_hat, X) == (not noisy and not coarse)


def masked_tokens(net: Pretext) -> tuple[Tensor, Tensor]:
    """The tokens before and after masking, caught on their way."""
    caught: list[Tensor] = []
    tokenize, encode = net.backbone.tokenize, net.backbone.encode
    net.backbone.tokenize = lambda x: caught.append(tokenize(x)) or caught[-1]
    net.backbone.encode = lambda tokens: caught.append(tokens) or encode(tokens)
    step(net, X)
    return caught[0], caught[1]


def test_dae_and_local_mask_zero_channels_and_mae_replaces_tokens() -> None:
    for method in ("dae", "local_mask"):
        _, after = masked_tokens(pretext(method, mask_ratio=(0.5,)))
        assert ((after == 0).all(dim=(2, 3, 4)).sum(1) == NETWORK["feature_size"] // 2).all()
    net = pretext("mae", mask_ratio=(0.5,), mask_block=8)
    before, after = masked_tokens(net)
    assert net.mask_token is not None
    replaced = (after == net.mask_token.reshape(1, -1, 1, 1, 1)).all(dim=1)
    assert replaced.float().mean() == 0.5
    assert torch.equal(after.movedim(1, -1)[~replaced], before.movedim(1, -1)[~replaced])
    for method in ("noise", "downsample"):
        before, after = masked_tokens(pretext(method))
        assert torch.equal(before, after)


def test_order_sum_adds_the_noise_to_the_coarse_volume() -> None:
    quiet = step(pretext(noise_std=0.0), X).x_hat
    added = step(pretext(noise_std=0.2, order="sum"), X).x_hat - quiet
    assert added.std().item() == pytest.approx(0.2, rel=0.03)
    chained = step(pretext(noise_std=0.2), X).x_hat - quiet
    assert chained.std() < 0.12  # going down averages eight noisy voxels


def test_residual_starts_as_x_hat_and_its_head_learns() -> None:
    net = pretext(recon="residual")
    result = step(net, X)
    assert torch.equal(result.x_rec, result.x_hat)
    result.loss.backward()
    assert net.backbone.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "recon, follows", [("plain", False), ("scaled", True), ("output", True), ("residual", True)]
)
def test_only_plain_forgets_the_intensity_of_a_crop(recon: str, follows: bool) -> None:
    """With a patch stem the tokens know brightness, so `plain` is not blind in full; it fails to follow a scale."""
    net = pretext("dae", recon=recon, noise_std=0.0).eval()
    torch.nn.init.normal_(net.backbone.head.weight)
    x, brighter = step(net, X).x_rec, step(net, 100 * X + 500).x_rec
    ratio = (brighter.std() / x.std()).item()
    assert (50 < ratio < 200) == follows


def test_scaled_sees_each_crop_standardised_and_so_undoes_any_scaling_exactly() -> None:
    net = pretext("dae", recon="scaled", noise_std=0.0).eval()
    x, brighter = step(net, X).x_rec, step(net, 100 * X + 500).x_rec
    assert torch.allclose((brighter - 500) / 100, x, atol=1e-3)


@pytest.mark.parametrize("method", ["local_mask", "mae"])
def test_residual_is_refused_where_x_hat_is_the_target(method: str) -> None:
    with pytest.raises(ValueError, match=f"residual.*{method}"):
        pretext(method, recon="residual")


@pytest.mark.parametrize("skip, blind", [("auto", True), ("zeros", True), ("input", False)])
def test_the_full_resolution_skip_does_not_leak_the_target(skip: str, blind: bool) -> None:
    net = pretext("local_mask", skip=skip)
    seen: list[Tensor] = []
    net.backbone.image_block.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    step(net, X)
    assert (not seen[0].any()) == blind


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"mask_ratio": (0.1, 0.2, 0.3)}, "--mask-ratio"),
        ({"mask_along": "planes", "mask_scope": "token"}, "--mask-scope"),
        ({"cmcl": "softmax", "temperature": 0.0}, "--temperature"),
    ],
)
def test_options_that_mean_nothing_together_are_refused_by_flag(
    wrong: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        pretext(**wrong)


def test_eq_5_is_l1_plus_alpha_times_cmcl() -> None:
    result = step(pretext(alpha=0.3), X)
    assert result.loss.item() == pytest.approx(result.l1.item() + 0.3 * result.cmcl.item())
    assert result.l1.item() == pytest.approx((result.x_rec - X).abs().mean().item(), rel=1e-6)


def test_crop_units_divide_the_error_by_the_std_of_x_hat() -> None:
    net = pretext(l1_units="crop", noise_std=0.0)
    result = step(net, X)
    unit = result.x_hat.std(dim=(1, 2, 3, 4), correction=0)
    by_hand = ((result.x_rec - X).abs().mean(dim=(1, 2, 3, 4)) / unit).mean()
    assert result.l1.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_l1_is_the_mean_over_the_voxels_of_each_sample() -> None:
    a, b = (
        torch.zeros(2, 1, 1, 1, 2),
        torch.tensor([[1.0, 3.0], [0.0, -1.0]]).reshape(2, 1, 1, 1, 2),
    )
    assert l1_of(a, b).tolist() == [2.0, 0.5]


def test_what_a_method_learned_beside_the_backbone_is_saved_apart_and_comes_back() -> None:
    net, other = pretext("mae"), pretext("mae")
    assert net.mask_token is not None and other.mask_token is not None
    torch.nn.init.ones_(net.mask_token)
    assert list(net.own_state()) == ["mask_token"]
    other.load_own_state(net.own_state())
    assert torch.equal(other.mask_token, net.mask_token)
    assert pretext("dae").own_state() == {}


@pytest.mark.parametrize("recon", ["scaled", "output", "residual"])
def test_a_crop_of_nothing_but_air_is_scaled_by_a_hundredth_and_not_by_its_noise(
    recon: str,
) -> None:
    """Its own std is 0 or rounding; divided by that, one such crop would be the whole gradient."""
    air = torch.zeros_like(X)
    assert std(air).unique().tolist() == [pytest.approx(0.01)]
    assert std(air + 1e-6 * X).max().item() == pytest.approx(0.01)
    net = pretext(recon=recon, noise_std=0.0)
    result = step(net, air)
    result.loss.backward()
    assert result.loss.isfinite() and result.l1 < 10
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
