"""dae/training/losses.py: the losses by hand."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from dae.training.losses import (
    LOSSES,
    cross_entropy,
    dice_loss,
    dice_per_class,
    dice_per_region,
    loss_of_regions,
    region_targets,
)

# Whole tumour, core and enhancing of BraTS: which of the labels 0, 1, 2, 3 each has.
BRATS = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)

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


# --- regions


def by_hand(name: str, logits: np.ndarray, label: np.ndarray) -> float:
    """Voxel by voxel in float64: the mean over samples and regions of BRATS."""
    losses = []
    for b, k in product(range(len(logits)), range(3)):
        p_in, p_out, in_truth, out_truth = [], [], [], []
        negative_log = []
        for x, value in zip(logits[b, k].flat, label[b].flat):
            if value < 0:
                continue
            p = 1 / (1 + math.exp(-x))
            inside = bool(BRATS[k, value])
            p_in.append(p)
            p_out.append(1 - p)
            in_truth.append(inside)
            out_truth.append(not inside)
            negative_log.append(-math.log(p if inside else 1 - p))

        dice = []
        for p, t in ((p_in, in_truth), (p_out, out_truth)):
            if any(t):
                both = float(np.dot(p, t))
                dice.append((2 * both + 1e-5) / (sum(p) + sum(t) + 1e-5))
        loss = 1 - np.mean(dice)
        if name == "dice_ce":
            loss += np.mean(negative_log)
        losses.append(loss)
    return float(np.mean(losses))


def a_batch(samples: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three regions and labels of which some are not annotated; the last has no 3."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(samples, 3, 3, 4, 5, generator=generator)
    label = torch.randint(-1, 4, (samples, 3, 4, 5), generator=generator)
    label[-1][label[-1] == 3] = 0
    return logits, label


def test_region_targets_voxel_by_voxel() -> None:
    _, label = a_batch()
    targets = region_targets(label, BRATS)
    assert targets.shape == (2, 3, 3, 4, 5)
    for b, d, h, w in product(range(2), range(3), range(4), range(5)):
        value = int(label[b, d, h, w])
        expected = [-1, -1, -1] if value < 0 else BRATS[:, value].long().tolist()
        assert targets[b, :, d, h, w].tolist() == expected


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("samples", [1, 2])
def test_the_loss_of_regions_by_hand(name: str, samples: int) -> None:
    logits, label = a_batch(samples)
    expected = by_hand(name, logits.double().numpy(), label.numpy())
    assert loss_of_regions(name, logits, label, BRATS).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_its_gradient_is_that_of_finite_differences(name: str) -> None:
    logits, label = a_batch()
    logits.requires_grad_(True)
    loss_of_regions(name, logits, label, BRATS).backward()
    assert logits.grad is not None

    x = logits.detach().double().numpy()
    step = 1e-5
    for index in ((0, 0, 0, 1, 2), (0, 1, 2, 3, 4), (1, 2, 1, 1, 1), (1, 0, 2, 0, 3)):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        slope = by_hand(name, above, label.numpy()) - by_hand(name, below, label.numpy())
        assert logits.grad[index].item() == pytest.approx(slope / (2 * step), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_one_region_is_a_task_of_two_classes(name: str) -> None:
    logits, label = a_batch()
    x = logits[:, :1]
    two = torch.cat([torch.zeros_like(x), x], dim=1)
    as_classes = LOSSES[name](two, torch.where(label > 0, 1, label))
    as_region = loss_of_regions(name, x, label, BRATS[:1])
    assert as_region.item() == pytest.approx(as_classes.item(), abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_a_crop_without_any_region_lowers_what_is_predicted_there(name: str) -> None:
    """Dice of the inside alone would have no gradient there."""
    logits = torch.zeros(1, 3, 2, 2, 2, requires_grad=True)
    loss_of_regions(name, logits, torch.zeros(1, 2, 2, 2, dtype=torch.int64), BRATS).backward()
    assert logits.grad is not None and (logits.grad > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_regions_that_were_not_annotated_count_for_nothing(name: str) -> None:
    loss: Loss = partial(loss_of_regions, name, membership=BRATS)
    logits, label = a_batch()
    logits.requires_grad_(True)
    label[..., 3:] = -1
    cut = loss(logits[..., :3], label[..., :3])
    whole = loss(logits, label)
    assert whole.item() == pytest.approx(cut.item(), abs=1e-6)

    whole.backward()
    assert logits.grad is not None and not logits.grad[..., 3:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_samples_of_regions_average(name: str) -> None:
    logits, label = a_batch()
    loss: Loss = partial(loss_of_regions, name, membership=BRATS)
    apart = [loss(logits[n : n + 1], label[n : n + 1]).item() for n in range(2)]
    assert loss(logits, label).item() == pytest.approx(sum(apart) / 2, abs=1e-6)


def test_dice_per_region_is_that_of_unions_of_labels() -> None:
    prediction = torch.tensor([[[1, 1, 2, 0, 0, 1]]], dtype=torch.uint8)
    label = torch.tensor([[[1, 2, 2, 2, 0, -1]]])
    dice = dice_per_region(prediction, label, BRATS)
    assert dice[:2] == pytest.approx([2 * 3 / (3 + 4), 2 * 1 / (2 + 1)])
    assert math.isnan(dice[2])
