"""dae/weights/plan.py: the network and the data options that come with weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import NETWORK

from dae.config.command_line import parse
from dae.config.segment import SegConfig
from dae.config.shared import NetworkConfig
from dae.errors import InputError
from dae.model import SwinUNETR, arguments_of
from dae.weights.plan import arguments_from, check_same_network, with_plan

PATH = Path("a/best.pt")
DATA_PLAN: dict[str, Any] = {
    "backbone": "swin_unetr",
    "arguments": {"depths": [1, 1]},
    "crop": [32, 48, 32],
    "spacing": [2.0, 2.0, 3.0],
    "ct_window": [-300.0, 500.0],
    "mr_intensity": "percentile",
}


def configured(*flags: str) -> SegConfig:
    return parse(SegConfig, flags, prog="", description="")


def network_plan(**options: Any) -> dict[str, Any]:
    arguments = arguments_of(SwinUNETR, NetworkConfig(**options))
    return {"backbone": "swin_unetr", "arguments": json.loads(json.dumps(arguments))}


def test_crop_spacing_and_intensities_are_the_weights_where_nothing_else_was_asked_for() -> None:
    config = with_plan(configured(), DATA_PLAN, PATH)
    assert config.depths == (1, 1)
    assert config.crop == (32, 48, 32)
    assert config.spacing == (2, 2, 3)
    assert config.ct_window == (-300, 500)
    assert config.mr_intensity == "percentile"


def test_a_preset_goes_before_the_plan() -> None:
    btcv = with_plan(configured("--preset", "btcv"), DATA_PLAN, PATH)
    assert btcv.ct_window == (-175, 250)
    assert btcv.mr_intensity == "percentile"  # the preset says nothing of it
    feta = with_plan(configured("--preset", "feta"), DATA_PLAN, PATH)
    assert feta.spacing == ()  # as the files are, says the preset


def test_a_flag_goes_before_the_plan_even_at_its_default() -> None:
    config = with_plan(configured("--crop", "96", "96", "96"), DATA_PLAN, PATH)
    assert config.crop == (96, 96, 96)


def test_continued_pretraining_names_the_flags_that_the_weights_need() -> None:
    plan = network_plan()
    check_same_network(plan, NetworkConfig(checkpointing=True), PATH)

    plan["arguments"]["merge_order"] = "legacy"
    plan["arguments"]["normalize_hidden"] = False
    plan["arguments"]["depths"] = [2, 2, 6, 2]
    words = r"add --depths 2 2 6 2 --merge-order legacy --no-normalize-hidden$"
    with pytest.raises(InputError, match=words):
        check_same_network(plan, NetworkConfig(), PATH)


def test_the_network_comes_with_the_checkpoint_and_a_contradicting_flag_is_refused() -> None:
    arguments = arguments_of(SwinUNETR, NetworkConfig(**NETWORK))
    plan = network_plan(**NETWORK)
    assert arguments_from(plan, NetworkConfig(), PATH) == arguments
    assert arguments_from(plan, NetworkConfig(**NETWORK), PATH) == arguments
    assert arguments_from(plan, NetworkConfig(checkpointing=True), PATH)["checkpointing"] is True
    with pytest.raises(InputError, match="--feature-size 24: "):
        arguments_from(plan, NetworkConfig(feature_size=24), PATH)
