"""Outputs of MONAI 1.6.1 on weights that a recipe makes from the key names alone; MONAI itself is not needed."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


def recipe(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if "relative_position_bias_table" in key:
        r *= 0.5
    elif len(shape) >= 2:
        r /= np.sqrt(shape[0] if "transp_conv" in key else np.prod(shape[1:]))
    else:
        r = 1 + 0.1 * r if key.endswith("weight") else 0.1 * r
    return torch.from_numpy(r.astype(np.float32))


def monai_weights(model: SwinUNETR) -> dict[str, torch.Tensor]:
    """MONAI's state dict at recipe values: its names and shapes are ours, translated."""
    named = to_monai(model.state_dict())
    return {k: v if k.endswith("_index") else recipe(k, tuple(v.shape)) for k, v in named.items()}


def moments(x: torch.Tensor) -> list[float]:
    x = x.double()
    return [x.mean().item(), x.std().item(), x.abs().max().item()]


@pytest.mark.parametrize("k", range(len(CASES)), ids=[case[0] for case in CASES])
@torch.inference_mode()
def test_logits_and_hidden_states_equal_monai(k: int) -> None:
    name, options, c_in, c_out, size = CASES[k]
    golden = np.load(GOLDENS / "monai_swin_unetr_1.6.1.npz")
    model = SwinUNETR(c_in, c_out, **SMALL, **options).eval()
    model.load_state_dict(from_monai(monai_weights(model)), strict=True)
    x = torch.from_numpy(
        np.random.default_rng(1000 + k).standard_normal((1, c_in, *size)).astype(np.float32)
    )

    states = model.encode(model.tokenize(x))
    logits = model.decode(states, x)

    def difference(found: Any, key: str) -> float:
        return float(np.abs(np.asarray(found) - golden[f"{name}/{key}"]).max())

    assert difference(logits[..., ::4, ::4, ::4], "logits_stride4") < 2e-4
    assert difference(moments(logits), "logits_moments") < 2e-4
    assert difference(states[4], "hidden4") < 2e-4
    for n, state in enumerate(states):
        assert difference(moments(state), f"hidden{n}_moments") < 2e-4


@pytest.mark.parametrize("layout, stage_conv", [("f48", False), ("v2_f48", True)])
def test_our_names_translate_to_every_tensor_of_monai_and_back(
    layout: str, stage_conv: bool
) -> None:
    lines = (GOLDENS / f"keys_monai_swin_unetr_{layout}.tsv").read_text().split("\n")
    shapes = {
        k: tuple(map(int, s.split("x"))) for k, s in (line.split("\t") for line in lines if line)
    }
    with torch.device("meta"):
        ours = SwinUNETR(1, 14, stage_conv=stage_conv).state_dict()
    theirs = to_monai(ours)
    assert {k: tuple(v.shape) for k, v in theirs.items()} == shapes
    assert {k: v.shape for k, v in from_monai(theirs).items()} == {
        k: v.shape for k, v in ours.items()
    }


def test_to_monai_undoes_from_monai_key_by_key() -> None:
    w = monai_weights(SwinUNETR(1, 2, **SMALL, stage_conv=True))
    back = to_monai(from_monai(w))
    assert back.keys() == w.keys()
    assert all(torch.equal(back[k], w[k]) for k in w)


def test_to_monai_finds_a_cubic_window_by_itself_and_refuses_three_stages() -> None:
    small = SwinUNETR(1, 2, **{**SMALL, "window": (4, 4, 4)})
    assert to_monai(small.state_dict())[
        "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    ].shape == (64, 64)
    three = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1), heads=(3, 3, 3))
    with pytest.raises(ValueError, match="four stages"):
        to_monai(three.state_dict())


def test_a_foreign_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"swinViT\.layers7"):
        from_monai({"swinViT.layers7.0.blocks.0.norm1.weight": torch.zeros(1)})
