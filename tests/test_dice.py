"""dae/training/dice.py: the losses by hand."""

import math

import pytest
import torch

from dae.training.dice import LOSSES, dice_loss, dice_per_class


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


def test_dice_per_class_is_nan_where_a_class_is_in_neither() -> None:
    prediction, label = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 2]]])
    found = dice_per_class(prediction, label, 4)
    assert found[:2] == pytest.approx([2 / 3, 2 / 3])
    assert math.isnan(found[2])
