"""dae/weights/transfer.py: what is transferred, what is new, what is refused."""

from pathlib import Path

import pytest
import torch
from conftest import NETWORK
from torch import Tensor

from dae.errors import InputError
from dae.model import SwinUNETR
from dae.weights.transfer import Report, parts_that_fit, parts_to_transfer, transfer

PATH = Path("a/best.pt")
BOTH = ("encoder", "decoder")
INPUT_KERNELS = {"encoder.stem.proj.weight", "image_block.conv1.weight"}


def pretrained() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(1, 1, **NETWORK)


def network_for_four_classes(channels: int = 1) -> SwinUNETR:
    torch.manual_seed(1)
    return SwinUNETR(channels, 4, **NETWORK)


def states(network: SwinUNETR, x: Tensor) -> list[Tensor]:
    return network.encode(network.tokenize(x))


@pytest.mark.parametrize("parts", ["encoder", "decoder", "both"])
def test_what_is_asked_for_is_taken_and_the_head_is_always_new(parts: str) -> None:
    weights = pretrained().state_dict()
    network = network_for_four_classes()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = transfer(network, weights, parts_to_transfer(parts, weights, PATH), PATH)

    for name, value in network.state_dict().items():
        is_head = name.startswith("head.")
        part = "encoder" if name.startswith("encoder.") else "decoder"
        transferred = not is_head and parts in (part, "both")
        assert torch.equal(value, weights[name] if transferred else before[name])
        assert (name in report.kept) == transferred
        assert (name in report.new) == (not transferred)
    assert {"head.weight", "head.bias"} <= set(report.new) & set(report.dropped)


def test_the_report_is_a_table_of_parts_with_notes_above_and_foreign_tensors_below() -> None:
    report = Report(
        kept=["encoder.a", "up_blocks.b", "encoder.c"],
        new=["head.weight"],
        dropped=["head.weight", "head.bias"],
        extra=["rotation_head.weight"],
        notes=["of MONAI"],
    )
    rows = [line.split() for line in str(report).split("\n")]
    assert rows == [
        ["of", "MONAI"],
        ["kept", "adapted", "new", "dropped"],
        ["encoder", "2", "0", "0", "0"],
        ["decoder", "1", "0", "0", "0"],
        ["head", "0", "0", "1", "2"],
        ["other", "1"],
    ]


def test_a_missing_or_ill_fitting_tensor_is_refused_by_name() -> None:
    name = "encoder.stages.0.merge.norm.weight"
    weights = dict(pretrained().state_dict())
    value = weights.pop(name)
    words = r"1 tensors of the network are not in it, first encoder\.stages\.0\.merge"
    with pytest.raises(InputError, match=words):
        transfer(network_for_four_classes(), weights, BOTH, PATH)

    weights[name] = value[:-1]
    with pytest.raises(InputError, match=r"encoder\.stages\.0\.merge\.norm\.weight does not fit"):
        transfer(network_for_four_classes(), weights, BOTH, PATH)


def test_one_channel_spreads_over_several_and_equal_channels_give_what_one_gave() -> None:
    one = pretrained()
    three = network_for_four_classes(channels=3)
    report = transfer(three, one.state_dict(), BOTH, PATH)
    assert set(report.adapted) >= INPUT_KERNELS

    x = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(states(one, x), states(three, x.expand(-1, 3, -1, -1, -1))):
        assert torch.allclose(a, b, atol=1e-5)


def test_several_channels_give_their_sum_to_one() -> None:
    one = pretrained()
    three = network_for_four_classes(channels=3)
    report = transfer(one, three.state_dict(), BOTH, PATH)
    assert set(report.adapted) >= INPUT_KERNELS

    x = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(states(one, x), states(three, x.expand(-1, 3, -1, -1, -1))):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 2), (3, 4)])
def test_equal_channels_give_the_same_through_any_other_number_of_them(
    before: int, after: int
) -> None:
    weights = SwinUNETR(before, 1, **NETWORK)
    network = network_for_four_classes(channels=after)
    report = transfer(network, weights.state_dict(), BOTH, PATH)
    assert set(report.adapted) >= INPUT_KERNELS

    x = torch.randn(1, 1, 16, 16, 16)
    there = states(weights, x.expand(-1, before, -1, -1, -1))
    here = states(network, x.expand(-1, after, -1, -1, -1))
    for a, b in zip(there, here):
        assert torch.allclose(a, b, atol=1e-5)


def test_as_many_channels_are_copied_in_their_order() -> None:
    weights = SwinUNETR(3, 1, **NETWORK).state_dict()
    network = network_for_four_classes(channels=3)
    report = transfer(network, weights, BOTH, PATH)
    assert not report.adapted
    for name in INPUT_KERNELS:
        assert torch.equal(network.state_dict()[name], weights[name])


def test_a_network_of_other_features_is_refused_and_nothing_is_added_up() -> None:
    wider = SwinUNETR(1, 1, **{**NETWORK, "feature_size": 16})
    with pytest.raises(InputError, match=r"does not fit"):
        transfer(network_for_four_classes(), wider.state_dict(), BOTH, PATH)


def test_a_transfer_that_changes_nothing_is_refused() -> None:
    weights = pretrained().state_dict()
    network = network_for_four_classes()
    transfer(network, weights, BOTH, PATH)
    with pytest.raises(InputError, match="had these very values before"):
        transfer(network, weights, BOTH, PATH)


def test_a_part_that_the_weights_do_not_have_is_refused() -> None:
    weights = pretrained().state_dict()
    encoder = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    words = r"--transfer both: a/best\.pt has no decoder; take --transfer encoder"
    with pytest.raises(InputError, match=words):
        parts_to_transfer("both", encoder, PATH)


def test_the_head_is_transferred_for_the_same_task_alone() -> None:
    weights = pretrained().state_dict()
    assert parts_that_fit(pretrained(), weights) == ["encoder", "decoder", "head"]
    assert parts_that_fit(network_for_four_classes(), weights) == ["encoder", "decoder"]
