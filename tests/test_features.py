"""dae/evaluation/features.py: crops by address, and what vectors tell, by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETWORK, refusal
from torch.nn import functional as F

from dae.config.evaluate import CkaConfig, EmbedConfig
from dae.config.pretrain import PretrainConfig
from dae.data import datalist
from dae.data.batches import Crops
from dae.data.cache import prepare_all
from dae.data.datalist import Item
from dae.data.preprocess import Recipe
from dae.evaluation import features
from dae.evaluation.features import nearest_neighbours, principal_plane, unit
from dae.model import SwinUNETR
from dae.pretext.contrast import embed
from dae.weights.foreign import Weights

CPU = torch.device("cpu")


# --- what vectors tell


def test_the_plane_is_that_of_the_largest_eigenvectors_of_the_covariance() -> None:
    rows = np.random.default_rng(1).normal(size=(30, 6)) * np.arange(1, 7) + 5
    points, shares = principal_plane(rows)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    projected = (rows - rows.mean(axis=0)) @ vectors[:, [-1, -2]]
    for k in range(2):
        assert abs(np.corrcoef(points[:, k], projected[:, k])[0, 1]) == pytest.approx(1)
        assert points[np.abs(points[:, k]).argmax(), k] > 0
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[[-1, -2]])
    np.testing.assert_allclose(shares, values[[-1, -2]] / values.sum())


def test_one_volume_and_equal_volumes_are_a_point() -> None:
    for rows in (np.ones((1, 4)), np.ones((3, 1)), np.ones((5, 4))):
        points, shares = principal_plane(rows)
        assert points.shape == (len(rows), 2) and not points.any() and not shares.any()


def test_neighbours_are_of_other_subjects_and_the_right_ones_can_be_right() -> None:
    angles = np.deg2rad([0, 1, 2, 90, 91, 45])
    z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    modalities = ["ct", "t1", "ct", "t1", "t1", "pd"]
    subjects = ["a", "a", "b", "c", "d", "e"]
    # 0: b, ct. 1: b, which is ct, wrong. 2: a's t1 at 1 degree, wrong. 3, 4: each other.
    # The only pd cannot be right, and is left out.
    result = nearest_neighbours(z, modalities, subjects)
    assert result == pytest.approx((3 / 5, (1 / 4 + 2 / 4 + 1 / 5 + 2 / 5 + 2 / 5) / 5, 5))


def test_where_no_two_subjects_share_a_modality_neighbours_tell_nothing() -> None:
    result = nearest_neighbours(np.eye(3), ["ct", "ct", "t1"], ["a", "a", "b"])
    assert result.n == 0 and math.isnan(result.accuracy)
    summary = features.summary_of(np.eye(3), ["ct", "ct", "t1"], ["a", "a", "b"])
    assert "neighbours tell nothing" in features.in_words(summary)


def test_lengths_do_not_matter_and_zeros_stay() -> None:
    np.testing.assert_allclose(unit(np.array([[3, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])


# --- crops and states


@pytest.fixture
def volumes_of_list(volumes: Path) -> list[Any]:
    items = datalist.load(str(volumes))
    return prepare_all([*items.training], Recipe(), volumes.parent / "cache")


def plan(**more: Any) -> dict[str, Any]:
    return {
        "backbone": "swin_unetr",
        "arguments": {**NETWORK},
        "in_channels": 1,
        "out_channels": 1,
        "crop": [16, 16, 16],
        "classes": {},
        **more,
    }


def test_a_crop_is_by_seed_number_and_volume_whoever_else_is_in_the_list(
    volumes_of_list: list[Any],
) -> None:
    all_of_them = features.fixed_crops(volumes_of_list, plan())
    alone = features.fixed_crops(volumes_of_list[3:4], plan())
    x = features.crop_of(all_of_them, 3, 5, seed=1)
    assert torch.equal(x, features.crop_of(alone, 0, 5, seed=1))
    assert not torch.equal(x, features.crop_of(alone, 0, 6, seed=1))
    assert not torch.equal(x, features.crop_of(alone, 0, 5, seed=2))


def test_at_seed_0_the_crops_are_those_that_validate_pre_training(
    volumes_of_list: list[Any],
) -> None:
    crops = features.fixed_crops(volumes_of_list, plan())
    validation = Crops(volumes_of_list, [0] * 5, (16, 16, 16), seed=4, global_batch=2)
    for n in range(7):
        fixed = validation.fixed(n)[0].float()
        assert torch.equal(features.crop_of(crops, n % 5, n, seed=0), fixed)


def test_a_vector_is_the_mean_of_z_before_it_is_scaled(volumes_of_list: list[Any]) -> None:
    torch.manual_seed(0)
    network = SwinUNETR(1, 1, **NETWORK).eval()
    crops = features.fixed_crops(volumes_of_list, plan())
    vector = features.vector_of(network, crops, 2, EmbedConfig(crops=1, seed=3))

    x = features.crop_of(crops, 2, 0, seed=3)
    with torch.no_grad():
        z = embed(network.encode(network.tokenize(x[None]))[-1])[0]
    scaled = F.normalize(torch.from_numpy(vector), dim=0)
    np.testing.assert_allclose(scaled, z, atol=1e-6)

    three = features.vector_of(network, crops, 2, EmbedConfig(crops=3, seed=3))
    single = []
    for number in range(3):
        state = features.states_of(network, features.crop_of(crops, 2, number, seed=3))[-1]
        single.append(state.mean(dim=(1, 2, 3)).numpy())
    np.testing.assert_allclose(three, np.mean(single, axis=0), atol=1e-6)


def test_what_a_file_does_not_tell_of_its_data_is_at_its_default() -> None:
    assert features.recipe_of({}) == Recipe()
    told = {"spacing": [1.0, 1.0, 2.0], "ct_window": [-175.0, 250.0], "foreground_crop": True}
    assert features.recipe_of(told) == Recipe((1, 1, 2), (-175, 250), "zscore", True)


# --- items


def item(*files: str, modality: tuple[str, ...] = ("t1",), **more: Any) -> Item:
    return Item(tuple(map(Path, files)), modality, ("mr",) * len(modality), "s", **more)


def test_a_network_of_one_channel_is_given_each_channel_by_itself_and_no_labels() -> None:
    two = item("a/x.nii", modality=("t1", "flair"), label=Path("a/label.nii"))
    single = features.items_for([two], {"in_channels": 1})
    assert [i.modality_name for i in single] == ["t1", "flair"]
    assert features.names_of(single) == ["x_t1", "x_flair"]
    assert features.items_for([two], {"in_channels": 2})[0].label is None


def test_names_are_told_apart_by_their_folders() -> None:
    assert features.names_of([item("p/s1/t1.nii.gz"), item("p/s2/t1.nii.gz")]) == ["s1_t1", "s2_t1"]


# --- networks


def weights_of(network: Any, **more: Any) -> Weights:
    return Weights(network.state_dict(), plan(**more), [])


def test_the_encoder_of_any_weights_is_taken_and_adapted_to_the_channels_of_the_other() -> None:
    torch.manual_seed(0)
    network = SwinUNETR(1, 1, **NETWORK).eval()
    weights = weights_of(network)
    x = torch.randn(1, 16, 16, 16)
    wanted = features.states_of(network, x)

    probed = weights_of(network, probe=True, out_channels=7)
    encoder = {name: value for name, value in weights.tensors.items() if "encoder" in name}
    for file in (weights, probed, weights._replace(tensors=encoder)):
        taken = features.encoder_of(file, Path("a.pt"), EmbedConfig(), CPU)
        for state, other in zip(features.states_of(taken, x), wanted):
            assert torch.equal(state, other)

    # Three equal channels are what one channel was.
    three = features.encoder_of(
        weights, Path("a.pt"), EmbedConfig(), CPU, plan=plan(in_channels=3, out_channels=2)
    )
    for state, other in zip(features.states_of(three, x.expand(3, -1, -1, -1)), wanted):
        torch.testing.assert_close(state, other, atol=1e-4, rtol=1e-4)


def test_the_layer_norm_of_one_side_holds_for_both_and_nothing_else_may_differ(
    tiny: Callable[..., PretrainConfig],
) -> None:
    network = SwinUNETR(1, 1, **NETWORK)
    config = CkaConfig(before="a.pt", after="b.pt")
    after = weights_of(network)
    without_norm = weights_of(network, arguments={**NETWORK, "normalize_hidden": False})
    features.check_same_network(without_norm, after, config)

    x = torch.randn(1, 16, 16, 16)
    raw = features.encoder_of(without_norm, Path("a.pt"), config, CPU)
    normed = features.encoder_of(without_norm, Path("a.pt"), config, CPU, plan=after.plan)
    assert features.states_of(raw, x)[1].std(dim=0).sub(1).abs().max() > 0.05
    for state in features.states_of(normed, x):
        assert state.mean(dim=0).abs().max() < 1e-5

    other = weights_of(network, arguments={**NETWORK, "depths": (2, 1)})
    reason = refusal(features.check_same_network, other, after, config)
    assert "a.pt" in reason and "--depths 2 1" in reason and "--depths 1 1" in reason
    reason = refusal(
        features.check_same_network, after._replace(plan=plan(backbone="unet")), after, config
    )
    assert "--backbone unet" in reason
