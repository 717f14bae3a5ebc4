"""dae/training/schedule.py: the warm-up cosine by its formula, and which parameters decay."""

import math

import pytest
from conftest import NETWORK

from dae.config.pretrain import PretextConfig
from dae.config.shared import OptimConfig
from dae.model import SwinUNETR
from dae.pretext.methods import Pretext
from dae.training.optim import Schedule, adamw, adamw_in_parts, fine_tuning_factors, warmup_steps


def test_the_rate_is_a_linear_warm_up_then_a_cosine_that_ends_at_its_minimum() -> None:
    config = OptimConfig(steps=1000, warmup=100, lr=4e-4, lr_min=1e-5)
    schedule = Schedule(config)
    for step in (0, 1, 50, 99):
        assert schedule.lr_at(step) == pytest.approx(4e-4 * (1 / 101 + (1 - 1 / 101) * step / 100))
    for step in (100, 101, 500, 999):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / 900))
        assert schedule.lr_at(step) == pytest.approx(1e-5 + (4e-4 - 1e-5) * cosine)


def test_the_first_step_moves_and_the_peak_is_reached() -> None:
    schedule = Schedule(OptimConfig())
    assert schedule.lr_at(0) > 0
    assert max(schedule.lr_at(step) for step in range(20_000)) == schedule.lr_at(500) == 4e-4
    assert schedule.lr_at(19_999) < 1e-8


def test_a_short_run_does_not_spend_itself_on_warming_up() -> None:
    config = OptimConfig(steps=20)
    assert warmup_steps(config) == 2
    assert Schedule(config).lr_at(2) == config.lr
    assert Schedule(OptimConfig(steps=1)).lr_at(0) == config.lr


def test_norms_biases_bias_tables_and_mask_tokens_do_not_decay() -> None:
    net = Pretext(SwinUNETR(1, 1, **NETWORK, stem="conv"), "mae", PretextConfig(method="mae"))
    optimizer = adamw(net.named_parameters(), OptimConfig(weight_decay=0.1))
    names = {id(p): name for name, p in net.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decays.keys() == set(names.values())
    free = ("norm", "bias", "bias_table", "mask_token")
    for name, decay in decays.items():
        spared = (
            any(part in name.split(".")[-1] for part in ("bias", "mask_token")) or ".norm" in name
        )
        assert decay == (0.0 if spared else 0.1), name
    assert all(any(word in name for name in decays) for word in free)


@pytest.mark.parametrize("kind", ["plain", "warmup", "frozen-encoder", "decoder-first"])
def test_fine_tuning_factors_stay_between_0_and_1_reach_1_and_end_near_0(kind: str) -> None:
    encoder, decoder = zip(*(fine_tuning_factors(kind, step, 100, 10) for step in range(100)))
    assert all(0 <= f <= 1 for f in (*encoder, *decoder))
    assert max(decoder) == 1 and decoder[-1] < 1e-2
    assert (max(encoder) == 0) == (kind == "frozen-encoder")


def test_warmup_and_plain_by_hand() -> None:
    assert fine_tuning_factors("plain", 0, 100, 10) == (1.0, 1.0)
    assert fine_tuning_factors("warmup", 4, 100, 10) == (5 / 11, 5 / 11)
    assert fine_tuning_factors("warmup", 55, 100, 10) == pytest.approx((0.5, 0.5))


def test_decoder_first_moves_the_encoder_only_after_a_tenth_and_warms_up_again() -> None:
    factors = [fine_tuning_factors("decoder-first", step, 100, 5) for step in range(100)]
    assert all(encoder == 0 for encoder, _ in factors[:10])
    assert max(decoder for _, decoder in factors[:10]) == 1
    assert factors[10] == (1 / 6, 1 / 6) and factors[15] == (1.0, 1.0)


def test_the_encoder_has_groups_of_its_own_with_the_same_rules_of_decay() -> None:
    network = SwinUNETR(1, 2, **NETWORK)
    optimizer = adamw_in_parts(network.named_parameters(), OptimConfig(weight_decay=0.1))
    names = {id(p): name for name, p in network.named_parameters()}
    for group in optimizer.param_groups:
        members = [names[id(p)] for p in group["params"]]
        assert all(name.startswith("encoder.") == (group["part"] == "encoder") for name in members)
    both = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    alone = adamw(network.named_parameters(), OptimConfig(weight_decay=0.1))
    assert both == {
        names[id(p)]: g["weight_decay"] for g in alone.param_groups for p in g["params"]
    }
