"""dae/training/optim.py: the learning rate by its formula, and which parameters decay."""

import math

import pytest
import torch
from conftest import NETWORK

from dae.config.pretrain import PretextConfig
from dae.config.shared import OptimConfig
from dae.model import SwinUNETR
from dae.pretext.methods import Pretext
from dae.training.optim import (
    adamw,
    adamw_in_parts,
    due,
    fine_tuning_factors,
    learning_rate,
    warmup_steps,
)

SCHEDULES = ["plain", "warmup", "frozen-encoder", "decoder-first", "probe"]


def decay_by_name(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decays = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decays[names[id(parameter)]] = group["weight_decay"]
    return decays


def test_something_is_due_every_so_many_steps_and_at_the_last() -> None:
    assert [step for step in range(11) if due(step, 4, 10)] == [0, 4, 8, 10]
    assert [step for step in range(41) if due(step, 0, 40)] == list(range(0, 41, 4))
    assert [step for step in range(41) if due(step, 0, 40, most=3)] == [*range(0, 40, 3), 40]
    assert [step for step in range(4) if due(step, 0, 3)] == [0, 1, 2, 3]


# --- the rate of pre-training


def test_the_rate_is_a_linear_warm_up_then_a_cosine_that_ends_at_its_minimum() -> None:
    config = OptimConfig(steps=1000, warmup=100, lr=4e-4, lr_min=1e-5)
    for step in (0, 1, 50, 99):
        line = 4e-4 * (1 / 101 + (1 - 1 / 101) * step / 100)
        assert learning_rate(step, config) == pytest.approx(line)
    for step in (100, 101, 500, 999):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / 900))
        assert learning_rate(step, config) == pytest.approx(1e-5 + (4e-4 - 1e-5) * cosine)


def test_the_first_step_moves_and_the_peak_is_reached() -> None:
    config = OptimConfig()
    rates = [learning_rate(step, config) for step in range(config.steps)]
    assert rates[0] > 0
    assert max(rates) == rates[500] == 4e-4
    assert rates[-1] < 1e-8


def test_a_short_run_does_not_spend_itself_on_warming_up() -> None:
    config = OptimConfig(steps=20)
    assert warmup_steps(config) == 2
    assert learning_rate(2, config) == config.lr
    assert learning_rate(0, OptimConfig(steps=1)) == config.lr


# --- the rates of fine-tuning


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fine_tuning_factors_stay_between_0_and_1_reach_1_and_end_near_0(schedule: str) -> None:
    factors = [fine_tuning_factors(schedule, step, 100, 10) for step in range(100)]
    encoder, decoder = zip(*factors)
    assert all(0 <= factor <= 1 for factor in (*encoder, *decoder))
    assert max(decoder) == 1 and decoder[-1] < 1e-2
    assert (max(encoder) == 0) == (schedule in ("frozen-encoder", "probe"))


def test_warmup_and_plain_by_hand() -> None:
    assert fine_tuning_factors("plain", 0, 100, 10) == (1.0, 1.0)
    assert fine_tuning_factors("warmup", 4, 100, 10) == (5 / 11, 5 / 11)
    assert fine_tuning_factors("warmup", 55, 100, 10) == pytest.approx((0.5, 0.5))


def test_decoder_first_moves_the_encoder_only_after_a_tenth_and_warms_up_again() -> None:
    factors = [fine_tuning_factors("decoder-first", step, 100, 5) for step in range(100)]
    assert all(encoder == 0 for encoder, _ in factors[:10])
    assert max(decoder for _, decoder in factors[:10]) == 1
    assert factors[10] == (1 / 6, 1 / 6)
    assert factors[15] == (1.0, 1.0)


# --- which parameters decay


def test_norms_biases_bias_tables_and_mask_tokens_do_not_decay() -> None:
    network = Pretext(SwinUNETR(1, 1, **NETWORK, stem="conv"), "mae", PretextConfig(method="mae"))
    optimizer = adamw(network.named_parameters(), OptimConfig(weight_decay=0.1))
    decays = decay_by_name(network, optimizer)
    assert decays.keys() == dict(network.named_parameters()).keys()
    for name, decay in decays.items():
        last = name.split(".")[-1]
        is_spared = "bias" in last or "mask_token" in last or ".norm" in name
        assert decay == (0.0 if is_spared else 0.1), name
    for word in ("norm", "bias", "bias_table", "mask_token"):
        assert any(word in name for name in decays)


def test_the_encoder_has_groups_of_its_own_with_the_same_rules_of_decay() -> None:
    network = SwinUNETR(1, 2, **NETWORK)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    optimizer = adamw_in_parts(network.named_parameters(), OptimConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            of_encoder = names[id(parameter)].startswith("encoder.")
            assert group["part"] == ("encoder" if of_encoder else "decoder")

    whole = adamw(network.named_parameters(), OptimConfig(weight_decay=0.1))
    assert decay_by_name(network, optimizer) == decay_by_name(network, whole)


def test_checkpoints_number_the_same_parameters_whatever_decays_and_whatever_is_frozen() -> None:
    """A resumed optimiser finds its moments by these numbers."""
    network = SwinUNETR(1, 2, **NETWORK)
    numbered = []
    for weight_decay, trained in ((0.1, True), (0.0, True), (0.1, False)):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(trained or not name.startswith("encoder."))
        config = OptimConfig(weight_decay=weight_decay)
        groups = adamw_in_parts(network.named_parameters(), config).param_groups
        numbered.append([list(map(id, group["params"])) for group in groups])
    assert numbered[0] == numbered[1] == numbered[2]
    assert len(numbered[0]) == 4
