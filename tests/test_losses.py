"""dae/training/losses.py: the losses by hand."""

import math
from collections.abc import Callable

import pytest
import torch

from dae.training.losses import LOSSES, cross_entropy, dice_loss, dice_per_class

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def one_hot_logits(label: torch.Tensor, classes: int, sure: float = 50.0) -> torch.Tensor:
    return sure * torch.nn.functional.one_hot(label, classes).movedim(-1, 1).float()


def test_a_sure_and_right_prediction_has_no_loss() -> None:
    label = torch.randint(0, 3, (2, 4, 4, 4))
    assert dice_loss(one_hot_logits(label, 3), label).item() == pytest.approx(0, abs=1e-6)


def test_dice_by_hand_on_four_voxels() -> None:
    """P = (.5, .5) everywhere, truth two voxels of each class: 2 * 1 / (2 + 2) = .5 for both."""
    label = torch.tensor([0, 0, 1, 1]).reshape(1, 1, 2, 2)
    assert dice_loss(torch.zeros(1, 2, 1, 2, 2), label).item() == pytest.approx(0.5, abs=1e-5)


def test_a_class_that_is_not_in_the_crop_counts_for_nothing() -> None:
    label = torch.tensor([0, 0, 1, 1]).reshape(1, 1, 2, 2)
    logits = torch.zeros(1, 3, 1, 2, 2)
    logits[:, 2] = -50
    assert dice_loss(logits, label).item() == pytest.approx(0.5, abs=1e-5)


def test_each_sample_has_its_own_dice() -> None:
    label = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]).long()
    right_and_wrong = one_hot_logits(torch.zeros_like(label), 2)
    assert dice_loss(right_and_wrong, label).item() == pytest.approx(0.5, abs=1e-4)


def test_dice_ce_adds_the_mean_negative_log_probability() -> None:
    label = torch.tensor([0, 0, 1, 1]).reshape(1, 1, 2, 2)
    loss = LOSSES["dice_ce"](torch.zeros(1, 2, 1, 2, 2), label)
    assert loss.item() == pytest.approx(0.5 + math.log(2), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_was_not_annotated_counts_for_nothing_as_if_it_had_been_cut_away(loss: Loss) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 6, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 4, 6))
    label[..., 4:] = -1
    whole = loss(logits, label)
    cut = loss(logits[..., :4], label[..., :4])
    assert whole.item() == pytest.approx(cut.item(), abs=1e-6)

    whole.backward()
    assert logits.grad is not None
    assert logits.grad[..., :4].all() and not logits.grad[..., 4:].any()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_batch_without_any_annotation_moves_nothing(loss: Loss) -> None:
    logits = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    loss(logits, torch.full((1, 2, 2, 2), -1)).backward()
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("classes", [2, 5])
def test_cross_entropy_of_a_batch_annotated_throughout_is_torchs_own(classes: int) -> None:
    logits = torch.randn(2, classes, 5, 6, 7)
    label = torch.randint(0, classes, (2, 5, 6, 7))
    expected = torch.nn.functional.cross_entropy(logits, label).item()
    assert cross_entropy(logits, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_is_the_mean_over_samples_whatever_classes_and_voxels_each_has(loss: Loss) -> None:
    """So ranks and micro-batches, which average, train as one batch.

    One sample holds three classes, the other one holds one.
    """
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 6)
    label = torch.randint(0, 3, (2, 4, 4, 6))
    label[1] = 0
    label[1, 1:] = -1
    first = loss(logits[:1], label[:1]).item()
    second = loss(logits[1:], label[1:]).item()
    assert loss(logits, label).item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_dice_per_class_leaves_out_what_was_not_annotated() -> None:
    prediction = torch.tensor([[[0, 1, 1, 2, 2]]])
    label = torch.tensor([[[0, 1, 2, 2, -1]]])
    assert dice_per_class(prediction, label, 3) == pytest.approx([2 / 3, 2 / 3])


def test_dice_per_class_is_nan_where_a_class_is_in_neither() -> None:
    prediction = torch.tensor([[[0, 1, 1, 2]]])
    label = torch.tensor([[[0, 1, 2, 2]]])
    dice = dice_per_class(prediction, label, 4)
    assert dice[:2] == pytest.approx([2 / 3, 2 / 3])
    assert math.isnan(dice[2])
