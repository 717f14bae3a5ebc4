"""Training at the edges of its numbers: nothing is nan, and what happens is defined.

A crop of one value, a batch of one sample or of one modality, a class that no crop holds, a
gradient far too large, and the scaler of fp16 after an overflow.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETWORK, events, same_weights
from torch import Tensor, nn
from torch.nn import functional as F

import train_pretrain
from dae.config.pretrain import PretextConfig, PretrainConfig
from dae.config.shared import OptimConfig
from dae.errors import InputError
from dae.model import SwinUNETR
from dae.pretext.baselines import BASELINES, pretext_of
from dae.pretext.contrast import FORMS, cmcl, embed
from dae.pretext.methods import METHODS
from dae.training.losses import LOSSES
from dae.training.optim import adamw
from dae.weights import checkpoint
from train_pretrain import build, main

Config = Callable[..., PretrainConfig]
TRAINED = [*METHODS, *(name for name in BASELINES if name != "scratch")]
CUBE = (16, 16, 16)


def check_finite_step(method: str, x: Tensor, modality: Tensor, **options: Any) -> None:
    """Loss and every gradient of a step are finite."""
    torch.manual_seed(0)
    given = PretextConfig(**{"method": method, "mask_block": 8, **options})
    pretext = pretext_of(SwinUNETR(1, 1, **NETWORK), given)
    drawn = pretext.draw(x, list(range(len(x))))
    output = pretext(x, modality, drawn)
    output.loss.backward()

    assert math.isfinite(output.loss.item())
    for name, parameter in pretext.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_crop_of_one_value_has_finite_gradients(method: str, value: float) -> None:
    """Air alone: no variance for a norm, and for --recon scaled no std."""
    check_finite_step(method, torch.full((2, 1, *CUBE), value), torch.tensor([0, 1]))


@pytest.mark.parametrize("recon", ["scaled", "output", "residual"])
def test_a_crop_of_one_value_is_restored_in_every_form(recon: str) -> None:
    check_finite_step("dae", torch.zeros(2, 1, *CUBE), torch.tensor([0, 1]), recon=recon)


@pytest.mark.parametrize("method", TRAINED)
def test_a_batch_of_one_sample_trains(method: str) -> None:
    check_finite_step(method, torch.rand(1, 1, *CUBE), torch.tensor([0]))


@pytest.mark.parametrize("form", ["bce", "softmax", "ranks"])
def test_a_batch_of_one_modality_trains_in_every_form_of_cmcl(form: str) -> None:
    check_finite_step("dae", torch.rand(3, 1, *CUBE), torch.tensor([1, 1, 1]), cmcl=form)


@pytest.mark.parametrize("form", FORMS)
def test_cmcl_of_one_sample_moves_nothing_and_of_one_modality_draws_features_together(
    form: str,
) -> None:
    torch.manual_seed(0)
    state = torch.randn(1, 8, 2, 2, 2, requires_grad=True)
    cmcl(embed(state, "mean"), torch.tensor([0]), form=form).backward()
    assert state.grad is not None and state.grad.abs().max() < 1e-6

    if form == "ranks":  # whose target is a column, and not a modality
        return
    raw = torch.randn(4, 8, requires_grad=True)
    cmcl(F.normalize(raw, dim=-1), torch.zeros(4, dtype=torch.int64), form=form).backward()
    assert raw.grad is not None
    before = F.normalize(raw.detach(), dim=-1)
    after = F.normalize(raw.detach() - 0.1 * raw.grad, dim=-1)
    assert (after @ after.T).sum() > (before @ before.T).sum()


# --- fine-tuning


@pytest.mark.parametrize("loss", LOSSES)
def test_a_crop_of_background_alone_makes_background_likelier(loss: str) -> None:
    logits = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
    LOSSES[loss](logits, torch.zeros(1, 4, 4, 4, dtype=torch.int64)).backward()
    gradient = logits.grad
    assert gradient is not None and gradient.isfinite().all()
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1:] > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_that_no_crop_holds_only_becomes_less_likely(loss: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 4, 4, 4, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 4, 4))  # of the classes 0 to 2; no voxel is of class 3
    LOSSES[loss](logits, label).backward()
    gradient = logits.grad
    assert gradient is not None and gradient.isfinite().all()
    assert gradient[:, 3].sum() > 0


# --- the optimiser


def test_a_gradient_a_billion_times_too_large_moves_no_weight_far() -> None:
    """Clipped to norm 1 it is one step of AdamW like the others.

    A weight moves by lr m / sqrt(v) at most. After k steps with gradients that are small beside
    that of the spike, m = (1 - .9) g and v = (1 - .999) g^2 in the limit, so that the step is at
    most .1 / sqrt(.001) = 3.2 times lr, but for the corrections of the first steps.
    """
    config = OptimConfig(lr=1e-3, weight_decay=0.0)
    network = nn.Linear(4, 4)
    optimizer = adamw(network.named_parameters(), config)
    for step in range(200):
        before = network.weight.detach().clone()
        scale = 1e9 if step == 150 else 1e-2
        for parameter in network.parameters():
            parameter.grad = scale * torch.randn_like(parameter)
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        moved = (network.weight.detach() - before).abs().max().item()
        assert moved < 3.3 * config.lr


# --- the scaler of fp16, with a scale of which float32 overflows too


SCALE = 2.0**127  # the largest power of two in float32
LOUD = 30.0  # alpha: gradients of about 30, so that some steps overflow


def with_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    monkeypatch.setattr(train_pretrain, "grad_scaler", lambda *_: scaler)


def weights_after(config: PretrainConfig) -> dict[str, Any]:
    return dict(checkpoint.load(Path(config.out) / "last.pt")["model"])


def test_after_an_overflow_the_scale_halves_until_steps_are_taken_again(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skipped step is logged, and AdamW has not counted it."""
    with_scale(monkeypatch, SCALE)
    config = tiny(steps=12, alpha=LOUD)
    main(config)
    norms = [event["grad_norm"] for event in events(config, "train")]
    skipped = [norm is None for norm in norms]  # not finite, which JSON has no number for
    assert skipped[0] and not skipped[-1]
    saved = checkpoint.load(Path(config.out) / "last.pt")
    assert saved["scaler"]["scale"] == SCALE / 2 ** sum(skipped)
    taken = next(iter(saved["optimizer"]["state"].values()))["step"].item()
    assert taken == 12 - sum(skipped)


def test_a_run_that_is_stopped_while_the_scale_falls_ends_with_the_same_bytes(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tiny(out=str(tmp_path / "straight"), steps=10, alpha=LOUD)
    with_scale(monkeypatch, SCALE)
    main(straight)
    with_scale(monkeypatch, SCALE)
    main(tiny(out=str(tmp_path / "broken"), steps=10, alpha=LOUD, stop_after=2))
    with_scale(monkeypatch, SCALE)  # replaced by the scale that was saved
    broken = tiny(out=str(tmp_path / "broken"), steps=10, alpha=LOUD, resume=True)
    main(broken)
    assert same_weights(weights_after(straight), weights_after(broken))


def test_gradients_that_stay_infinite_end_the_run_once_the_scale_is_below_1(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scale(monkeypatch, 4.0)
    monkeypatch.setattr(train_pretrain, "build", build_with_a_gradient_of_infinity)
    config = tiny(steps=20)
    with pytest.raises(InputError, match=r"^step 4: loss .* gradient norm (inf|nan)"):
        main(config)
    assert [event["step"] for event in events(config, "train")] == [1, 2, 3]


def build_with_a_gradient_of_infinity(*arguments: Any) -> Any:
    pretext, report = build(*arguments)
    first = next(parameter for parameter in pretext.parameters())
    first.register_hook(lambda gradient: gradient + math.inf)
    return pretext, report
