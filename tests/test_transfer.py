"""dae/training/transfer.py: what is taken, what is new, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETWORK

from dae.config.command_line import parse
from dae.config.segment import SegConfig
from dae.config.shared import NetworkConfig
from dae.errors import InputError
from dae.model import SwinUNETR, arguments_of
from dae.weights.plan import arguments_from, check_same_network, with_plan
from dae.weights.transfer import Report, parts_to_transfer, transfer

PATH = Path("a/best.pt")
BOTH = ("encoder", "decoder")


def networks(channels: int = 1) -> tuple[SwinUNETR, SwinUNETR]:
    torch.manual_seed(0)
    return SwinUNETR(1, 1, **NETWORK), SwinUNETR(channels, 4, **NETWORK)


@pytest.mark.parametrize("parts", ["encoder", "decoder", "both"])
def test_what_is_asked_for_is_taken_and_the_head_is_always_new(parts: str) -> None:
    given, network = networks()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    report = transfer(
        network, given.state_dict(), parts_to_transfer(parts, given.state_dict(), PATH), PATH
    )
    weights = given.state_dict()
    for name, value in network.state_dict().items():
        part = (
            "head"
            if name.startswith("head")
            else "encoder"
            if name.startswith("encoder")
            else "decoder"
        )
        taken = part == parts or (parts == "both" and part != "head")
        assert torch.equal(value, weights[name] if taken else before[name])
        assert (name in report.kept) == taken and (name in report.new) == (not taken)
    assert {"head.weight", "head.bias"} <= set(report.new) & set(report.dropped)
    assert str(report).split("\n")[0].split() == ["kept", "adapted", "new", "dropped"]
    assert str(report).split("\n")[-1].split() == ["head", "0", "0", "2", "2"]
    told = str(Report(kept=["head.x"], extra=["rotation_head.weight"], notes=["of MONAI"])).split(
        "\n"
    )
    assert told[0].strip() == "of MONAI" and told[-1].split() == ["other", "1"]


def test_a_missing_or_ill_fitting_tensor_is_refused_by_name() -> None:
    given, network = networks()
    weights = dict(given.state_dict())
    gone = weights.pop("encoder.stages.0.merge.norm.weight")
    with pytest.raises(
        InputError, match=r"1 tensors of the network are not in it, first encoder\.stages\.0\.merge"
    ):
        transfer(network, weights, BOTH, PATH)
    weights["encoder.stages.0.merge.norm.weight"] = gone[:-1]
    with pytest.raises(InputError, match="does not fit"):
        transfer(network, weights, BOTH, PATH)


def test_one_channel_spreads_over_several_and_equal_channels_give_what_one_gave() -> None:
    given, network = networks(channels=3)
    report = transfer(network, given.state_dict(), BOTH, PATH)
    assert {"encoder.stem.proj.weight", "image_block.conv1.weight"} <= set(report.adapted)
    x = torch.randn(1, 1, 16, 16, 16)
    one, several = (
        given.encode(given.tokenize(x)),
        network.encode(network.tokenize(x.expand(-1, 3, -1, -1, -1))),
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, several))


def test_several_channels_give_their_sum_to_one() -> None:
    network, given = networks(channels=3)
    report = transfer(network, given.state_dict(), BOTH, PATH)
    assert {"encoder.stem.proj.weight", "image_block.conv1.weight"} <= set(report.adapted)
    x = torch.randn(1, 1, 16, 16, 16)
    one, several = (
        network.encode(network.tokenize(x)),
        given.encode(given.tokenize(x.expand(-1, 3, -1, -1, -1))),
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, several))


def test_two_channels_do_not_fit_three() -> None:
    two, three = SwinUNETR(2, 1, **NETWORK), SwinUNETR(3, 1, **NETWORK)
    with pytest.raises(InputError, match=r"encoder\.stem\.proj\.weight does not fit"):
        transfer(three, two.state_dict(), BOTH, PATH)


def test_a_transfer_that_changes_nothing_and_a_part_that_is_not_there_are_refused() -> None:
    given, network = networks()
    transfer(network, given.state_dict(), BOTH, PATH)
    with pytest.raises(InputError, match="had these very values before"):
        transfer(network, given.state_dict(), BOTH, PATH)
    encoder = {k: v for k, v in given.state_dict().items() if k.startswith("encoder.")}
    with pytest.raises(
        InputError, match=r"--transfer both: a/best\.pt has no decoder; take --transfer encoder"
    ):
        parts_to_transfer("both", encoder, PATH)


def test_crop_spacing_and_intensities_are_the_weights_where_nothing_else_was_asked_for() -> None:
    plan = {
        "backbone": "swin_unetr",
        "arguments": {"depths": [1, 1]},
        "crop": [32, 48, 32],
        "spacing": [2.0, 2.0, 3.0],
        "ct_window": [-300.0, 500.0],
        "mr_intensity": "percentile",
    }
    bare, preset = (
        parse(SegConfig, argv, prog="", description="") for argv in ([], ["--preset", "btcv"])
    )
    flagged = parse(
        SegConfig, ["--crop", "96", "96", "96"], prog="", description=""
    )  # the default, but asked for
    assert with_plan(bare, plan, PATH).crop == (32, 48, 32) and with_plan(
        bare, plan, PATH
    ).spacing == (2, 2, 3)
    assert (
        with_plan(bare, plan, PATH).ct_window == (-300, 500)
        and with_plan(bare, plan, PATH).mr_intensity == "percentile"
    )
    assert (
        with_plan(preset, plan, PATH).ct_window == (-175, 250)
        and with_plan(preset, plan, PATH).mr_intensity == "percentile"
    )
    assert with_plan(flagged, plan, PATH).crop == (96, 96, 96)
    assert with_plan(bare, plan, PATH).depths == (1, 1)
    feta = parse(SegConfig, ["--preset", "feta"], prog="", description="")
    assert with_plan(feta, plan, PATH).spacing == ()  # as the files are, says the preset


def test_continued_pretraining_names_the_flags_that_the_weights_need() -> None:
    plan = {
        "backbone": "swin_unetr",
        "arguments": json.loads(json.dumps(arguments_of(SwinUNETR, NetworkConfig()))),
    }
    check_same_network(plan, NetworkConfig(checkpointing=True), PATH)
    plan["arguments"] |= {
        "merge_order": "legacy",
        "normalize_hidden": False,
        "depths": [2, 2, 6, 2],
    }
    with pytest.raises(
        InputError, match=r"add --depths 2 2 6 2 --merge-order legacy --no-normalize-hidden$"
    ):
        check_same_network(plan, NetworkConfig(), PATH)


def test_the_network_comes_with_the_checkpoint_and_a_contradicting_flag_is_refused() -> None:
    arguments: dict[str, Any] = arguments_of(SwinUNETR, NetworkConfig(**NETWORK))
    plan = {"backbone": "swin_unetr", "arguments": json.loads(json.dumps(arguments))}
    assert arguments_from(plan, NetworkConfig(), PATH) == arguments
    assert arguments_from(plan, NetworkConfig(**NETWORK), PATH) == arguments
    assert arguments_from(plan, NetworkConfig(checkpointing=True), PATH)["checkpointing"] is True
    with pytest.raises(InputError, match="--feature-size 24: "):
        arguments_from(plan, NetworkConfig(feature_size=24), PATH)
