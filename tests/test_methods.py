"""dae/pretext/methods.py: forward, the rows of Table 5, and the forms of x_rec."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from conftest import NETWORK
from torch import Tensor, nn

from dae.config.command_line import parse
from dae.config.pretrain import PretextConfig, PretrainConfig
from dae.errors import InputError
from dae.model import SwinUNETR
from dae.model.swin import MERGE_ORDER, STEMS, ClippedBias, MergeOrder, Stem
from dae.pretext.baselines import BASELINES
from dae.pretext.contrast import FORMS
from dae.pretext.methods import ALL_READ, METHODS, READS, RECON, Output, Pretext, l1_of, std

X = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 - 1
MODALITY = torch.tensor([0, 1])
SEEDS = [11, 12]


def pretext(method: str = "dae", **options: Any) -> Pretext:
    torch.manual_seed(0)
    return Pretext(SwinUNETR(1, 1, **NETWORK), method, PretextConfig(method=method, **options))


def step(net: Pretext, x: Tensor = X, seeds: Sequence[int] = SEEDS) -> Output:
    return net(x, MODALITY, net.draw(x, seeds))  # type: ignore[no-any-return]


def roughness(x: Tensor) -> Tensor:
    """The mean difference of neighbours along the last axis."""
    return (x[..., 1:] - x[..., :-1]).abs().mean()


@pytest.mark.parametrize(
    "flag, names",
    [
        ("--method", [*METHODS, *BASELINES]),
        ("--recon", RECON),
        ("--cmcl", FORMS),
        ("--merge-order", MERGE_ORDER),
        ("--merge-order", get_args(MergeOrder)),
        ("--stem", STEMS),
        ("--stem", get_args(Stem)),
        ("--clipped-bias", get_args(ClippedBias)),
    ],
)
def test_the_command_line_offers_the_choices_that_the_method_and_the_network_know(
    flag: str, names: Sequence[str]
) -> None:
    """dae/config imports no torch, so it lists them once more."""
    for name in names:
        parse(PretrainConfig, [flag, name], prog="train_pretrain.py", description="")
    with pytest.raises(InputError) as error:
        parse(PretrainConfig, [flag, "unheard-of"], prog="train_pretrain.py", description="")
    _, offered = str(error.value).split("choose from ")
    assert offered.count(",") == len(names) - 1


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_parameter_that_should_have_one(method: str) -> None:
    """Where the full-resolution skip is zero its block has none, on purpose."""
    net = pretext(method, mask_block=8)
    step(net).loss.backward()

    without = set()
    image_block = set()
    for name, parameter in net.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            without.add(name)
        if name.startswith("backbone.image_block"):
            image_block.add(name)
    assert without == (image_block if method in ("local_mask", "mae") else set())


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
    net = pretext(method, noise_std=0.1)
    x_hat = step(net).x_hat
    with_other_seeds = step(net, seeds=[13, 14]).x_hat
    assert torch.equal(x_hat, with_other_seeds) != noisy
    assert bool(roughness(x_hat) < roughness(X) / 2) == coarse
    assert torch.equal(x_hat, X) == (not noisy and not coarse)


def tokens_before_and_after_masking(net: Pretext) -> tuple[Tensor, Tensor]:
    seen: dict[str, Tensor] = {}
    tokenize, encode = net.backbone.tokenize, net.backbone.encode

    def watched_tokenize(x: Tensor) -> Tensor:
        seen["before"] = tokenize(x)
        return seen["before"]

    def watched_encode(tokens: Tensor) -> list[Tensor]:
        seen["after"] = tokens
        return encode(tokens)  # type: ignore[no-any-return]

    net.backbone.tokenize = watched_tokenize
    net.backbone.encode = watched_encode
    step(net)
    return seen["before"], seen["after"]


@pytest.mark.parametrize("method", ["dae", "local_mask"])
def test_local_masking_zeroes_channels(method: str) -> None:
    _, after = tokens_before_and_after_masking(pretext(method, mask_ratio=(0.5,)))
    zero_channels = (after == 0).all(dim=(2, 3, 4)).sum(1)
    assert (zero_channels == NETWORK["feature_size"] // 2).all()


def test_mae_replaces_whole_tokens_by_the_learned_one() -> None:
    net = pretext("mae", mask_ratio=(0.5,), mask_block=8)
    before, after = tokens_before_and_after_masking(net)
    assert net.mask_token is not None
    replaced = (after == net.mask_token.reshape(1, -1, 1, 1, 1)).all(dim=1)
    assert replaced.float().mean() == 0.5
    assert torch.equal(after.movedim(1, -1)[~replaced], before.movedim(1, -1)[~replaced])


@pytest.mark.parametrize("method", ["noise", "downsample"])
def test_the_other_rows_mask_nothing(method: str) -> None:
    before, after = tokens_before_and_after_masking(pretext(method))
    assert torch.equal(before, after)


def test_order_sum_adds_the_noise_to_the_coarse_volume() -> None:
    quiet = step(pretext(noise_std=0.0)).x_hat
    added = step(pretext(noise_std=0.2, order="sum")).x_hat - quiet
    assert added.std().item() == pytest.approx(0.2, rel=0.03)
    chained = step(pretext(noise_std=0.2)).x_hat - quiet
    assert chained.std() < 0.12  # going down averages eight noisy voxels


# --- the forms of x_rec


def test_residual_starts_as_x_hat_and_its_head_learns() -> None:
    net = pretext(recon="residual")
    result = step(net)
    assert torch.equal(result.x_rec, result.x_hat)
    result.loss.backward()
    assert net.backbone.head.weight.grad.any()


@pytest.mark.parametrize("recon", ["plain", "scaled", "output", "residual"])
def test_only_plain_forgets_the_intensity_of_a_crop(recon: str) -> None:
    """`plain` knows a little: tokens of a patch stem know brightness. But it misses a scale."""
    net = pretext("dae", recon=recon, noise_std=0.0).eval()
    nn.init.normal_(net.backbone.head.weight)
    x_rec = step(net).x_rec
    brighter = step(net, 100 * X + 500).x_rec
    ratio = (brighter.std() / x_rec.std()).item()
    assert (50 < ratio < 200) == (recon != "plain")


def test_scaled_sees_each_crop_standardised_and_so_undoes_any_scaling_exactly() -> None:
    net = pretext("dae", recon="scaled", noise_std=0.0).eval()
    x_rec = step(net).x_rec
    brighter = step(net, 100 * X + 500).x_rec
    assert torch.allclose((brighter - 500) / 100, x_rec, atol=1e-3)


@pytest.mark.parametrize("method", ["local_mask", "mae"])
def test_residual_is_refused_where_x_hat_is_the_target(method: str) -> None:
    with pytest.raises(ValueError, match=f"residual.*{method}"):
        pretext(method, recon="residual")


@pytest.mark.parametrize(
    "method, strengths, is_zero",
    [
        ("noise", {"noise_std": 0.0}, True),
        ("noise", {"noise_std": 0.0, "noise_mean": 0.1}, False),
        ("downsample", {"downsample_factor": 1.0}, True),
        ("dae", {"downsample_factor": 1.0}, False),
        ("dae", {"noise_std": 0.0}, False),
        ("dae", {"noise_std": 0.0, "downsample_factor": 1.0}, True),
    ],
)
def test_a_disruption_of_no_strength_does_not_leak_the_target_either(
    method: str, strengths: dict[str, float], is_zero: bool
) -> None:
    net = pretext(method, **strengths)
    assert net.skip_is_zero == is_zero
    assert torch.equal(step(net).x_hat, X) == is_zero


@pytest.mark.parametrize("method", METHODS)
def test_the_options_of_a_row_are_those_that_it_reads(method: str) -> None:
    read: set[str] = set()

    class Watched(PretextConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    torch.manual_seed(0)
    net = Pretext(SwinUNETR(1, 1, **NETWORK), method, Watched(mask_block=8))
    when_built = {"recon", "skip", "l1_units"}
    assert when_built <= read
    read.clear()  # of some, the checks of every row have asked
    step(net)

    of_volume, of_tokens = METHODS[method]
    own = read & {field.name for field in fields(PretextConfig)}
    assert own | when_built == {*ALL_READ, *READS[of_volume], *READS[of_tokens]}


@pytest.mark.parametrize("skip, is_zero", [("auto", True), ("zeros", True), ("input", False)])
def test_the_full_resolution_skip_does_not_leak_the_target(skip: str, is_zero: bool) -> None:
    net = pretext("local_mask", skip=skip)
    images: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        images.append(inputs[0])

    net.backbone.image_block.register_forward_pre_hook(watch)
    step(net)
    assert (not images[0].any()) == is_zero


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


# --- the losses


def test_eq_5_is_l1_plus_alpha_times_cmcl() -> None:
    result = step(pretext(alpha=0.3))
    assert result.loss.item() == pytest.approx(result.l1.item() + 0.3 * result.cmcl.item())
    assert result.l1.item() == pytest.approx((result.x_rec - X).abs().mean().item(), rel=1e-6)


def test_crop_units_divide_the_error_by_the_std_of_x_hat() -> None:
    result = step(pretext(l1_units="crop", noise_std=0.0))
    error = (result.x_rec - X).abs().mean(dim=(1, 2, 3, 4))
    unit = result.x_hat.std(dim=(1, 2, 3, 4), correction=0)
    assert result.l1.item() == pytest.approx((error / unit).mean().item(), rel=1e-5)


def test_l1_is_the_mean_over_the_voxels_of_each_sample() -> None:
    x = torch.zeros(2, 1, 1, 1, 2)
    x_rec = torch.tensor([[1.0, 3.0], [0.0, -1.0]]).reshape(2, 1, 1, 1, 2)
    assert l1_of(x_rec, x).tolist() == [2.0, 0.5]


# --- options and parameters


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"mask_ratio": (0.1, 0.2, 0.3)}, "--mask-ratio"),
        ({"mask_along": "planes", "mask_scope": "token"}, "--mask-scope"),
        ({"cmcl": "softmax", "temperature": 0.0}, "--temperature"),
    ],
)
def test_options_that_mean_nothing_together_are_refused_by_flag(
    options: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ValueError, match=flag):
        pretext(**options)


def test_what_a_method_learned_beside_the_backbone_is_saved_apart_and_comes_back() -> None:
    net, other = pretext("mae"), pretext("mae")
    assert net.mask_token is not None and other.mask_token is not None
    nn.init.ones_(net.mask_token)
    assert list(net.own_state()) == ["mask_token"]
    other.load_own_state(net.own_state())
    assert torch.equal(other.mask_token, net.mask_token)
    assert pretext("dae").own_state() == {}
