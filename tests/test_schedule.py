"""dae/training/schedule.py: the warm-up cosine by its formula, and which parameters decay."""

import math

import pytest
from conftest import NETWORK

from dae.config import OptimConfig, PretextConfig
from dae.model import SwinUNETR
from dae.pretext.methods import Pretext
from dae.training.schedule import Schedule, adamw, warmup_steps


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
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    free = ("norm", "bias", "bias_table", "mask_token")
    for name, decay in decays.items():
        spared = any(part in name.split(".")[-1] for part in ("bias", "mask_token")) or ".norm" in name
        assert decay == (0.0 if spared else 0.1), name
    assert all(any(word in name for name in decays) for word in free)
