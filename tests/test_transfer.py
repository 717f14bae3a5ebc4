"""dae/training/transfer.py: what is taken, what is new, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETWORK

from dae.config import InputError, NetworkConfig
from dae.model import SwinUNETR, arguments_of
from dae.training.transfer import arguments_from, parts_to_transfer, transfer

PATH = Path("a/best.pt")
BOTH = ("encoder", "decoder")


def networks(channels: int = 1) -> tuple[SwinUNETR, SwinUNETR]:
    torch.manual_seed(0)
    return SwinUNETR(1, 1, **NETWORK), SwinUNETR(channels, 4, **NETWORK)


@pytest.mark.parametrize("parts", ["encoder", "decoder", "both"])
def test_what_is_asked_for_is_taken_and_the_head_is_always_new(parts: str) -> None:
    given, network = networks()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    report = transfer(network, given.state_dict(), parts_to_transfer(parts, given.state_dict(), PATH), PATH)
    weights = given.state_dict()
    for name, value in network.state_dict().items():
        part = "head" if name.startswith("head") else "encoder" if name.startswith("encoder") else "decoder"
        taken = part == parts or (parts == "both" and part != "head")
        assert torch.equal(value, weights[name] if taken else before[name])
        assert (name in report.kept) == taken and (name in report.new) == (not taken)
    assert {"head.weight", "head.bias"} <= set(report.new) & set(report.dropped)
    assert str(report).split("\n")[0].split() == ["kept", "adapted", "new", "dropped"]
    assert str(report).split("\n")[-1].split() == ["head", "0", "0", "2", "2"]


def test_a_missing_or_ill_fitting_tensor_is_refused_by_name() -> None:
    given, network = networks()
    weights = dict(given.state_dict())
    gone = weights.pop("encoder.stages.0.merge.norm.weight")
    with pytest.raises(InputError, match=r"1 tensors of the network are not in it, first encoder\.stages\.0\.merge"):
        transfer(network, weights, BOTH, PATH)
    weights["encoder.stages.0.merge.norm.weight"] = gone[:-1]
    with pytest.raises(InputError, match="does not fit"):
        transfer(network, weights, BOTH, PATH)


def test_one_channel_spreads_over_several_and_equal_channels_give_what_one_gave() -> None:
    given, network = networks(channels=3)
    report = transfer(network, given.state_dict(), BOTH, PATH)
    assert {"encoder.stem.proj.weight", "image_block.conv1.weight"} <= set(report.adapted)
    x = torch.randn(1, 1, 16, 16, 16)
    one, several = given.encode(given.tokenize(x)), network.encode(network.tokenize(x.expand(-1, 3, -1, -1, -1)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, several))


def test_the_network_comes_with_the_checkpoint_and_a_contradicting_flag_is_refused() -> None:
    arguments: dict[str, Any] = arguments_of(SwinUNETR, NetworkConfig(**NETWORK))
    plan = {"backbone": "swin_unetr", "arguments": json.loads(json.dumps(arguments))}
    assert arguments_from(plan, NetworkConfig(), PATH) == arguments
    assert arguments_from(plan, NetworkConfig(**NETWORK), PATH) == arguments
    assert arguments_from(plan, NetworkConfig(checkpointing=True), PATH)["checkpointing"] is True
    with pytest.raises(InputError, match="--feature-size 24: "):
        arguments_from(plan, NetworkConfig(feature_size=24), PATH)
