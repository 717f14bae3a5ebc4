"""A fine-tuned network as one graph, for programs that have torch and not this package.

docs/weights.md has the same lines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETWORK

from dae import check
from dae.config.segment import SegConfig
from dae.model import BACKBONES, SwinUNETR
from dae.weights.foreign import read_weights
from train_seg import main

SIZES: dict[str, dict[str, Any]] = {
    "swin_unetr": NETWORK,
    "unet": {"feature_size": 6, "depths": (1, 2, 1)},
    "vit_unetr": check.SMALL["vit_unetr"],
}


@torch.no_grad()
def exported(network: torch.nn.Module, size: int, folder: Path) -> torch.nn.Module:
    """The network, written to a file as a graph of any batch and read again."""
    crops = torch.zeros(2, 1, size, size, size)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network.eval(), (crops,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "network.pt2")
    return torch.export.load(folder / "network.pt2").module()


@torch.no_grad()
def check_outputs(graph: torch.nn.Module, network: torch.nn.Module, size: int) -> None:
    for batch in (1, 3):
        crops = torch.randn(batch, 1, size, size, size)
        # The graph adds the voxels of an instance norm in one piece (seen: 1e-6).
        assert torch.allclose(graph(crops), network(crops), atol=1e-5)


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_a_fine_tuned_network_is_exported_whole(
    tiny_seg: Callable[..., SegConfig], tmp_path: Path
) -> None:
    config = tiny_seg(steps=1)
    main(config)

    weights = read_weights(Path(config.out) / "last.pt")
    plan = weights.plan
    network = SwinUNETR(plan["in_channels"], plan["out_channels"], **plan["arguments"])
    network.load_state_dict(weights.tensors)
    check_outputs(exported(network, 16, tmp_path), network, 16)


@pytest.mark.filterwarnings("ignore:No complete tensor found")
@pytest.mark.parametrize("name", BACKBONES)
def test_each_backbone_is_one_graph_of_any_batch(name: str, tmp_path: Path) -> None:
    """Windows that are shifted and clipped too: 24 is no multiple of theirs."""
    torch.manual_seed(0)
    size = 24 if name == "swin_unetr" else 32
    options = {**SIZES[name]}
    if name == "swin_unetr":
        options |= {"depths": (2, 2), "window": (5, 5, 5)}
    network: Any = BACKBONES[name](1, 3, **options)
    check_outputs(exported(network, size, tmp_path), network, size)
