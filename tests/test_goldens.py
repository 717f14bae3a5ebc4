"""Outputs of MONAI 1.6.1 on weights that a recipe makes from the key names alone, without MONAI."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same_weights
from torch import Tensor

from dae.model import MONAI, SwinUNETR
from dae.weights.layouts import from_monai, to_monai

GOLDENS = Path(__file__).parent / "goldens"
SMALL: dict[str, Any] = {
    "feature_size": 12,
    "depths": (2, 2, 2, 2),
    "heads": (3, 6, 12, 24),
    "window": (7, 7, 7),
}
V2 = {"merge_order": "all", "clipped_bias": "sliced"}
LEGACY = {"merge_order": "legacy", "clipped_bias": "sliced"}
CASES: list[tuple[str, dict[str, Any], int, int, tuple[int, int, int]]] = [
    ("merging_64", MONAI, 1, 2, (64, 64, 64)),
    ("merging_96x64x32", MONAI, 1, 2, (96, 64, 32)),
    ("mergingv2_64", V2, 1, 2, (64, 64, 64)),
    ("legacy_64", LEGACY, 1, 2, (64, 64, 64)),
    ("nonorm_64", MONAI | {"normalize_hidden": False}, 1, 2, (64, 64, 64)),
    ("v2net_64", MONAI | {"stage_conv": True}, 1, 2, (64, 64, 64)),
    ("fourchannel_64", MONAI, 4, 3, (64, 64, 64)),
]


def normal(seed: int, shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def recipe(key: str, shape: tuple[int, ...]) -> Tensor:
    values = normal(zlib.crc32(key.encode()), shape)
    if "relative_position_bias_table" in key:
        values *= 0.5
    elif len(shape) >= 2:
        fan_in = shape[0] if "transp_conv" in key else np.prod(shape[1:])
        values /= np.sqrt(fan_in)
    elif key.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values = 0.1 * values
    return torch.from_numpy(values.astype(np.float32))


def monai_weights(model: SwinUNETR) -> dict[str, Tensor]:
    """MONAI's state dict at recipe values: its names and shapes are this model's, translated."""
    weights = to_monai(model.state_dict())
    for key, value in weights.items():
        if not key.endswith("_index"):
            weights[key] = recipe(key, tuple(value.shape))
    return weights


def moments(x: Tensor) -> list[float]:
    x = x.double()
    return [x.mean().item(), x.std().item(), x.abs().max().item()]


def difference(values: Any, golden: np.ndarray) -> float:
    return float(np.abs(np.asarray(values) - golden).max())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
@torch.inference_mode()
def test_logits_and_hidden_states_equal_monai(number: int) -> None:
    name, options, c_in, c_out, size = CASES[number]
    model = SwinUNETR(c_in, c_out, **SMALL, **options).eval()
    model.load_state_dict(from_monai(monai_weights(model)), strict=True)

    x = torch.from_numpy(normal(1000 + number, (1, c_in, *size)).astype(np.float32))
    states = model.encode(model.tokenize(x))
    logits = model.decode(states, x)

    goldens = np.load(GOLDENS / "monai_swin_unetr_1.6.1.npz")
    assert difference(logits[..., ::4, ::4, ::4], goldens[f"{name}/logits_stride4"]) < 2e-4
    assert difference(moments(logits), goldens[f"{name}/logits_moments"]) < 2e-4
    assert difference(states[4], goldens[f"{name}/hidden4"]) < 2e-4
    for n, state in enumerate(states):
        assert difference(moments(state), goldens[f"{name}/hidden{n}_moments"]) < 2e-4


def listed_shapes(layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of MONAI's tensors, as its own network gives them."""
    shapes = {}
    for line in (GOLDENS / f"keys_monai_swin_unetr_{layout}.tsv").read_text().splitlines():
        name, shape = line.split("\t")
        shapes[name] = tuple(int(n) for n in shape.split("x"))
    return shapes


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("layout, stage_conv", [("f48", False), ("v2_f48", True)])
def test_our_names_translate_to_every_tensor_of_monai_and_back(
    layout: str, stage_conv: bool
) -> None:
    with torch.device("meta"):
        ours = SwinUNETR(1, 14, stage_conv=stage_conv).state_dict()
    theirs = to_monai(ours)
    assert shapes_of(theirs) == listed_shapes(layout)
    assert shapes_of(from_monai(theirs)) == shapes_of(ours)


def test_to_monai_undoes_from_monai_key_by_key() -> None:
    weights = monai_weights(SwinUNETR(1, 2, **SMALL, stage_conv=True))
    assert same_weights(to_monai(from_monai(weights)), weights)


def test_to_monai_finds_a_cubic_window_by_itself_and_refuses_three_stages() -> None:
    small = SwinUNETR(1, 2, **{**SMALL, "window": (4, 4, 4)})
    index = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    assert to_monai(small.state_dict())[index].shape == (64, 64)

    three = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1), heads=(3, 3, 3))
    with pytest.raises(ValueError, match="four stages"):
        to_monai(three.state_dict())


def test_a_foreign_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"swinViT\.layers7"):
        from_monai({"swinViT.layers7.0.blocks.0.norm1.weight": torch.zeros(1)})
