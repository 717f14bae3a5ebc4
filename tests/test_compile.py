"""--compile: a step is one graph of tensors, and its gradients are those of the eager step."""

from typing import Any

import pytest
import torch
from conftest import NETWORK
from torch import Tensor

from dae import check
from dae.config.pretrain import PretextConfig
from dae.model import BACKBONES
from dae.pretext.baselines import pretext_of

X = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
MODALITY = torch.tensor([0, 1])
SEEDS = [1, 2]
SMALL: dict[str, dict[str, Any]] = {
    # Windows that do not fill the grid, so that it is padded, rolled and clipped.
    "swin_unetr": {**NETWORK, "depths": (2, 1), "window": (3, 3, 3)},
    "unet": {"feature_size": 6, "depths": (1, 2, 1)},
    "vit_unetr": check.SMALL["vit_unetr"],
}

# Methods that do nothing which another one of the test below does not do too.
PARTS = ("noise", "downsample", "local_mask", "rotation")


def step_of(
    backbone: str, method: str, *, backend: str = "", recon: str = "plain"
) -> tuple[Tensor, Tensor]:
    """Loss and whole gradient, compiled where a backend is named. A graph break is an error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network: Any = BACKBONES[backbone](1, 1, **SMALL[backbone])
    net = pretext_of(network, PretextConfig(method=method, mask_block=8, recon=recon))

    run: Any = net
    if backend:
        run = torch.compile(net, backend=backend, fullgraph=True)
    loss = run(X, MODALITY, net.draw(X, SEEDS)).loss
    loss.backward()

    gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize(
    "backbone, method, recon",
    [
        ("swin_unetr", "dae", "plain"),
        ("swin_unetr", "dae", "residual"),
        ("swin_unetr", "mae", "plain"),
        ("swin_unetr", "contrastive", "plain"),
        ("swin_unetr", "swin_unetr", "plain"),
        ("swin_unetr", "smit", "plain"),
        *(pytest.param("swin_unetr", method, "plain", marks=pytest.mark.slow) for method in PARTS),
        ("unet", "dae", "scaled"),
        ("vit_unetr", "dae", "plain"),
    ],
)
def test_a_step_is_one_graph_and_gives_the_gradients_of_the_eager_one(
    backbone: str, method: str, recon: str
) -> None:
    """As traced, without the compiler's own kernels; attention is fused, not recomputed.

    Rounding moves a few activations across the kink of leaky ReLU: seen, 1e-4 of the whole norm.
    """
    loss, gradient = step_of(backbone, method, backend="eager", recon=recon)
    eager_loss, eager = step_of(backbone, method, recon=recon)
    assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-5)
    assert (gradient - eager).norm() < 1e-3 * eager.norm()


@pytest.mark.slow
def test_the_compilers_kernels_give_the_gradients_of_the_eager_step() -> None:
    loss, gradient = step_of("swin_unetr", "dae", backend="inductor")
    eager_loss, eager = step_of("swin_unetr", "dae")
    assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-4)
    assert (gradient - eager).norm() < 1e-3 * eager.norm()
