"""dae/pretext/baselines.py: views, targets, losses and gradients of the other rows of Table 4."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETWORK
from torch import Tensor
from torch.nn import functional as F

from dae import check
from dae.config.pretrain import PretextConfig
from dae.model import BACKBONES, SwinUNETR
from dae.pretext.baselines import BASELINES, ViewsOutput, bottleneck_channels, pretext_of
from dae.pretext.methods import METHODS, Pretext

TRAINED = [name for name in BASELINES if name != "scratch"]
SEEDS = [11, 12, 13]
MODALITY = torch.tensor([0, 1, 0])

every = pytest.mark.parametrize("method", TRAINED)


def crops(batch: int = 3, side: int = 16) -> Tensor:
    """Slopes along d and h, so that a turn can be seen, and noise, so that samples differ."""
    slope = torch.linspace(0, 2, side)
    noise = torch.rand(batch, 1, side, side, side, generator=torch.Generator().manual_seed(0))
    return noise + slope[:, None, None] + 0.3 * slope[None, :, None]


def pretext(method: str, backbone: str = "swin_unetr", **options: Any) -> Any:
    torch.manual_seed(0)
    network: Any = SwinUNETR(1, 1, **NETWORK)
    if backbone != "swin_unetr":
        network = BACKBONES[backbone](1, 1, **check.SMALL[backbone])
    return pretext_of(network, PretextConfig(method=method, **{"mask_block": 4, **options}))


def step(net: Any, x: Tensor, seeds: list[int] = SEEDS) -> ViewsOutput:
    return net(x, MODALITY[: len(x)], net.draw(x, seeds))  # type: ignore[no-any-return]


# --- what all have in common


@every
def test_its_loss_falls(method: str) -> None:
    """On four crops that it learns by heart, always in the same views."""
    net = pretext(method)
    x = crops(4)
    drawn = net.draw(x, [1, 2, 3, 4])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = net(x, torch.zeros(4), drawn)
        losses.append(output.loss.item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("method", [name for name in TRAINED if name != "smit"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_reach_the_encoder_the_heads_and_for_inpainting_the_decoder(
    method: str, backbone: str
) -> None:
    net = pretext(method, backbone)
    step(net, crops(side=24)).loss.backward()
    for name, parameter in net.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        of_decoder = name.startswith("backbone.") and not name.startswith("backbone.encoder.")
        assert reached == (not of_decoder or method == "swin_unetr"), name
        assert parameter.requires_grad == reached, name


@every
@pytest.mark.parametrize("batch", [1, 2])
def test_the_views_of_a_sample_do_not_depend_on_its_batch(method: str, batch: int) -> None:
    net = pretext(method)
    x = crops()
    together = step(net, x).views
    part = slice(3 - batch, 3)
    alone = step(net, x[part], SEEDS[part]).views
    per_sample = together.reshape(-1, *x.shape)[:, part]
    assert torch.allclose(per_sample.reshape(alone.shape), alone, atol=1e-6)


@every
def test_other_seeds_give_other_views_and_the_same_seeds_the_same(method: str) -> None:
    net = pretext(method)
    x = crops()
    assert torch.equal(step(net, x).views, step(net, x).views)
    assert not torch.equal(step(net, x).views, step(net, x, [21, 22, 23]).views)


@every
def test_the_loss_is_the_sum_of_its_terms_and_all_of_them_are_named(method: str) -> None:
    net = pretext(method)
    output = step(net, crops())
    assert tuple(output.terms) == net.terms
    total = sum(output.terms[name] for name in net.losses)
    assert output.loss.item() == pytest.approx(float(total), rel=1e-6)
    assert output.z.shape == (3, 16 * 2) and not output.z.requires_grad


@every
@pytest.mark.parametrize("backbone", BACKBONES)
def test_its_heads_are_saved_apart_from_the_backbone_and_come_back(
    method: str, backbone: str
) -> None:
    net, other = pretext(method, backbone), pretext(method, backbone)
    own = net.own_state()
    assert own and not any(name.startswith("backbone.") for name in own)
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    other.load_own_state(own)
    assert all(torch.equal(other.own_state()[name], own[name]) for name in own)


@every
def test_losses_are_float32_under_autocast(method: str) -> None:
    net = pretext(method)
    with torch.autocast("cpu", torch.bfloat16):
        output = step(net, crops())
    assert output.loss.dtype == torch.float32
    assert output.h is None or output.h.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in output.terms.values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_width_of_the_bottleneck_is_that_of_the_deepest_state(backbone: str) -> None:
    network: Any = BACKBONES[backbone](1, 1, **check.SMALL[backbone])
    before = torch.get_rng_state()
    channels = bottleneck_channels(network)
    states = network.encode(network.tokenize(torch.zeros(1, 1, 24, 24, 24)))
    assert channels == states[-1].shape[1]
    assert torch.equal(before, torch.get_rng_state())  # a rehearsal moves no seed


def test_the_encoder_of_a_seed_is_the_same_for_every_method() -> None:
    """Heads are drawn after the backbone."""
    of_dae = pretext("dae").backbone.state_dict()
    for method in BASELINES:
        own = pretext(method).backbone.state_dict()
        assert all(torch.equal(own[name], of_dae[name]) for name in of_dae), method


@pytest.mark.parametrize("method", [*METHODS, *BASELINES])
def test_a_method_is_built_by_its_name(method: str) -> None:
    net = pretext(method)
    assert type(net) is BASELINES.get(method, Pretext)


# --- contrastive


def test_both_views_of_contrastive_are_of_one_crop_and_differ() -> None:
    """On constant crops, of a constant each, a view tells which crop it is of."""
    net = pretext("contrastive")
    x = torch.tensor([1.0, 5.0, 9.0]).reshape(3, 1, 1, 1, 1).expand(3, 1, 16, 16, 16)
    views = step(net, x).views
    assert views.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1, 5, 9, 1, 5, 9], abs=1e-4)
    first, second = step(net, crops()).views.chunk(2)
    assert (first - second).abs().mean() > 0.01


def test_contrastive_projects_the_mean_over_space_of_the_bottleneck() -> None:
    net = pretext("contrastive").eval()
    output = step(net, crops())
    state = net.backbone.encode(net.backbone.tokenize(output.views))[-1]
    pooled = state.mean(dim=(2, 3, 4))
    h = net.project[2](F.relu(net.project[0](pooled)))
    assert output.h is not None
    assert torch.allclose(output.h, torch.stack([h[:3], h[3:]], dim=1), atol=1e-5)


# --- rotation


def test_rotation_sees_the_crop_turned_by_its_class_and_is_to_say_which() -> None:
    net = pretext("rotation")
    x = crops()
    target = torch.tensor([2, 0, 3])
    output = net(x, MODALITY, target)
    for n, k in enumerate(target.tolist()):
        assert np.array_equal(output.views[n], np.rot90(x[n].numpy(), k, (1, 2)))

    state = net.backbone.encode(net.backbone.tokenize(output.views))[-1]
    logits = net.classify(state.mean(dim=(2, 3, 4))).log_softmax(-1)
    by_hand = -sum(logits[n, k] for n, k in enumerate(target.tolist())) / 3
    assert output.loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    right = sum(int(logits[n].argmax() == k) for n, k in enumerate(target.tolist())) / 3
    assert output.terms["rotation_accuracy"].item() == pytest.approx(right)


@pytest.mark.parametrize("rotations, classes", [("axial", 4), ("all", 10)])
def test_rotation_has_a_logit_for_each_class(rotations: str, classes: int) -> None:
    net = pretext("rotation", rotations=rotations)
    assert net.classify.out_features == classes
    assert net.chance(8) == {"rotation_accuracy": 1 / classes}


def test_a_classifier_that_always_says_0_is_right_where_the_class_is_0() -> None:
    net = pretext("rotation")
    with torch.no_grad():
        net.classify.weight.zero_()
        net.classify.bias.copy_(torch.tensor([5.0, 0, 0, 0]))
    output = net(crops(), MODALITY, torch.tensor([0, 1, 0]))
    assert output.terms["rotation_accuracy"].item() == pytest.approx(2 / 3)


# --- swin_unetr


def test_swin_unetr_restores_the_turned_crop_from_one_with_cut_outs() -> None:
    net = pretext("swin_unetr")
    # Around 0: of a crop that is brighter everywhere, L1 would be the same however it is turned.
    x = crops() - 1.6
    first, second = net.draw(x, SEEDS)
    output = net(x, MODALITY, (first, second))
    assert output.x_rec is not None

    errors = []
    for v, cut in enumerate((first, second)):
        for n in range(3):
            whole = np.rot90(x[n].numpy(), int(cut.target[n]), (1, 2))
            seen = np.where(cut.mask[n].numpy(), 0.0, whole)
            assert np.array_equal(output.views[3 * v + n], seen)
            errors.append(np.abs(output.x_rec[3 * v + n].numpy() - whole).mean())
    assert output.terms["l1"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert output.terms["l1_input"].item() > 0


def test_swin_unetr_cuts_30_percent_of_the_voxels_out_of_each_view() -> None:
    """19 of 64 cubes of 4^3 voxels, other ones in the other view."""
    net = pretext("swin_unetr")
    first, second = net.draw(crops(), SEEDS)
    for cut in (first, second):
        shares = cut.mask.float().mean(dim=(1, 2, 3, 4))
        assert shares.tolist() == [19 / 64] * 3
    assert not torch.equal(first.mask, second.mask)
    assert not torch.equal(first.mask[0], first.mask[1])


def test_swin_unetr_asks_both_views_for_their_turn() -> None:
    net = pretext("swin_unetr")
    x = crops()
    first, second = net.draw(x, SEEDS)
    output = net(x, MODALITY, (first, second))
    state = net.backbone.encode(net.backbone.tokenize(output.views))[-1]
    logits = net.classify(state.mean(dim=(2, 3, 4)))
    targets = torch.cat([first.target, second.target])
    expected = F.cross_entropy(logits, targets).item()
    assert output.terms["rotation"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("recon", ["plain", "scaled", "output", "residual"])
def test_swin_unetr_knows_the_forms_of_x_rec(recon: str) -> None:
    net = pretext("swin_unetr", recon=recon)
    output = step(net, crops())
    assert output.x_rec is not None and output.loss.isfinite()
    starts_as_input = torch.equal(output.x_rec, output.views)
    assert starts_as_input == (recon == "residual")
    if starts_as_input:
        assert output.terms["l1"].item() == pytest.approx(output.terms["l1_input"].item())
