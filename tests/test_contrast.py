"""dae/pretext/contrast.py: eq. 3 and 4 against a double loop; across ranks in test_two_ranks.py."""

import math

import pytest
import torch
from torch import Tensor

from dae.pretext.contrast import cmcl, effective_rank, embed, nt_xent

MODALITY = torch.tensor([0, 2, 0, 1, 2])
STATE = torch.randn(5, 6, 2, 3, 2, generator=torch.Generator().manual_seed(0))


def cosine(a: Tensor, b: Tensor) -> float:
    product = sum(x * y for x, y in zip(a.tolist(), b.tolist()))
    return product / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))


def test_the_feature_is_the_mean_over_space_at_length_one() -> None:
    means = STATE.reshape(5, 6, 12).mean(-1)
    assert torch.allclose(embed(STATE), means / means.norm(dim=1, keepdim=True), atol=1e-6)


def test_the_flat_feature_of_the_authors_keeps_every_value() -> None:
    assert torch.equal(embed(STATE, "flat"), STATE.reshape(5, 72))


def test_eq_3_and_4_by_a_double_loop() -> None:
    z = embed(STATE)
    total = 0.0
    for i in range(5):
        for j in range(5):
            z_sim = cosine(z[i], z[j]) * math.exp(0.07)
            p = 1 / (1 + math.exp(-z_sim))
            total -= math.log(p if MODALITY[i] == MODALITY[j] else 1 - p)
    assert cmcl(z, MODALITY, temperature=0.07).item() == pytest.approx(total / 25, abs=1e-6)


def test_softmax_form_by_a_double_loop() -> None:
    z = embed(STATE)
    total = 0.0
    for i in range(5):
        scores = [cosine(z[i], z[j]) / 0.07 for j in range(5)]
        log_sum = math.log(sum(math.exp(score) for score in scores))
        positives = [j for j in range(5) if MODALITY[i] == MODALITY[j]]
        total -= sum(scores[j] - log_sum for j in positives) / len(positives)
    loss = cmcl(z, MODALITY, temperature=0.07, form="softmax")
    assert loss.item() == pytest.approx(total / 5, abs=1e-5)


@pytest.mark.parametrize("pair, columns", [((1, 1), (0, 0)), ((0, 1), (0, 1)), ((4, 2), (1, 0))])
def test_the_authors_form_takes_class_ranks_for_columns(
    pair: tuple[int, int], columns: tuple[int, int]
) -> None:
    """For (flair, t2) it asks each sample to look like the other: a finding about their code."""
    z = torch.randn(2, 4)
    logits = (z @ z.T) * math.exp(0.5)
    by_hand = -sum(logits[i].log_softmax(0)[columns[i]] for i in range(2)) / 2
    loss = cmcl(z, torch.tensor(pair), temperature=0.5, form="ranks")
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("form", ["bce", "softmax"])
def test_the_loss_falls_when_modalities_part(form: str) -> None:
    modality = torch.tensor([0, 0, 1, 1])
    separated = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    mixed = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    assert cmcl(separated, modality, form=form) < cmcl(mixed, modality, form=form)


def test_it_is_computed_in_float32_under_autocast() -> None:
    state = STATE.bfloat16()
    exact = cmcl(embed(state.float()), MODALITY)
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(state).dtype == torch.float32
        assert torch.equal(cmcl(embed(state), MODALITY), exact)


# --- NT-Xent


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_nt_xent_by_a_double_loop(samples: int) -> None:
    """Eq. 1 of Chen et al. 2020: -log of the share of the other view among all but itself."""
    h = torch.randn(samples, 2, 7, generator=torch.Generator().manual_seed(samples))
    views = [(n, v) for n in range(samples) for v in range(2)]
    total, found = 0.0, 0
    for n, v in views:
        others = [other for other in views if other != (n, v)]
        scores = {(m, u): math.exp(cosine(h[n, v], h[m, u]) / 0.5) for m, u in others}
        total -= math.log(scores[n, 1 - v] / sum(scores.values()))
        found += max(scores, key=lambda other: scores[other]) == (n, 1 - v)
    loss, accuracy = nt_xent(h, 0.5)
    assert loss.item() == pytest.approx(total / (2 * samples), abs=1e-5)
    assert accuracy.item() == pytest.approx(found / (2 * samples))


def test_nt_xent_of_one_sample_is_0_and_moves_nothing() -> None:
    h = torch.randn(1, 2, 7, requires_grad=True)
    loss, accuracy = nt_xent(h, 0.5)
    loss.backward()
    assert (loss.item(), accuracy.item()) == (0, 1)
    assert h.grad is not None and not h.grad.any()


def test_nt_xent_falls_when_the_views_of_a_sample_meet_and_is_that_of_chance_when_all_do() -> None:
    apart = torch.eye(4).reshape(2, 2, 4)
    met = torch.eye(4)[[0, 0, 1, 1]].reshape(2, 2, 4)
    collapsed = torch.ones(2, 2, 4)
    assert nt_xent(met, 0.5)[0] < nt_xent(apart, 0.5)[0]
    assert nt_xent(collapsed, 0.5)[0].item() == pytest.approx(math.log(3), abs=1e-6)


def test_nt_xent_is_computed_in_float32_under_autocast() -> None:
    h = torch.randn(3, 2, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = nt_xent(h, 0.5)
    assert torch.equal(loss, nt_xent(h.float(), 0.5)[0])


# --- the effective rank


def test_the_effective_rank_of_orthogonal_features_is_their_number_and_of_equal_ones_1() -> None:
    assert effective_rank(torch.eye(5, 8)) == pytest.approx(5)
    assert effective_rank(torch.ones(6, 8)) == pytest.approx(1)


def test_the_effective_rank_by_hand() -> None:
    """Singular values 3 and 1: shares 3/4 and 1/4. A rotation and the order change nothing."""
    z = torch.diag(torch.tensor([3.0, 1.0]))
    by_hand = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(z) == pytest.approx(by_hand)
    turned = z @ torch.linalg.qr(torch.randn(2, 2)).Q
    assert effective_rank(turned.flip(0)) == pytest.approx(by_hand)


def test_the_effective_rank_is_at_most_the_number_of_samples() -> None:
    z = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert 3 < effective_rank(z) <= 4 and effective_rank(z[:1]) == pytest.approx(1)
