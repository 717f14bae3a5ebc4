"""The rows of the network: prediction, a training step, a whole step of pre-training."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dae.config.pretrain import PretextConfig
from dae.model import SwinUNETR
from dae.pretext.methods import Pretext
from dae.training.kernels import lay_out
from dae.training.precision import autocast

Run = Callable[[], object]
Candidates = dict[str, Run]


def forward(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Prediction: no gradients."""
    x = crops(options, device)

    def run_of(network: nn.Module) -> Run:
        network = network.to(device).eval()

        def run() -> None:
            with torch.no_grad(), autocast(dtype, device):
                network(x)

        return run

    channels = options.classes
    candidates = {"ours": run_of(ours(options, channels, device))}
    if options.compile:
        candidates["ours, compiled"] = run_of(ours(options, channels, device, compiled=True))
    if not options.no_monai:
        candidates["MONAI"] = run_of(monai(options, channels))
        candidates["MONAI, flash attention"] = run_of(
            monai(options, channels, use_flash_attention=True)
        )
    return candidates


def step(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Forward, L1, backward and AdamW."""
    x = crops(options, device)

    def run_of(network: nn.Module) -> Run:
        network = network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")

        def run() -> None:
            with autocast(dtype, device):
                y = network(x)
            (y.float() - x).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    candidates = {"ours": run_of(ours(options, 1, device))}
    if options.compile:
        candidates["ours, compiled"] = run_of(ours(options, 1, device, compiled=True))
    if not options.no_monai:
        candidates["MONAI"] = run_of(monai(options, 1))
        if options.compile:
            candidates["MONAI, compiled"] = run_of(compile_network(monai(options, 1)))
    return candidates


def pretext(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """A whole step of pre-training: draw, disrupt, reconstruct, contrast, clip, AdamW."""
    x = crops(options, device)
    modality = torch.arange(options.batch_size, device=device) % 2

    def run_of(*, compiled: bool) -> Run:
        backbone: Any = swin_unetr(options, 1, device, compiled=compiled)
        net = Pretext(backbone, "dae", PretextConfig()).to(device)
        network = compile_network(net) if compiled else net
        optimizer = torch.optim.AdamW(net.parameters(), fused=device.type == "cuda")

        def run() -> None:
            drawn = net.draw(x, range(options.batch_size))
            with autocast(dtype, device):
                loss = network(x, modality, drawn).loss
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    candidates = {"ours": run_of(compiled=False)}
    if options.compile:
        candidates["ours, compiled"] = run_of(compiled=True)
    return candidates


# --- the candidates


def crops(options: Any, device: torch.device) -> Tensor:
    return torch.randn(options.batch_size, 1, *[options.crop] * 3, device=device)


def ours(options: Any, channels: int, device: torch.device, *, compiled: bool = False) -> nn.Module:
    network = swin_unetr(options, channels, device, compiled=compiled)
    return compile_network(network) if compiled else network


def swin_unetr(options: Any, channels: int, device: torch.device, *, compiled: bool) -> nn.Module:
    """In the memory layout that is fast on the device, compiled or not."""
    window = (options.window, options.window, options.window)
    network = SwinUNETR(1, channels, feature_size=options.feature_size, window=window).to(device)
    lay_out(network, device, compiled=compiled)
    return network


def compile_network(network: nn.Module) -> nn.Module:
    return torch.compile(network)  # type: ignore[return-value]


def monai(options: Any, channels: int, **more: Any) -> nn.Module:
    try:
        from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
    except ImportError:
        sys.exit("MONAI is not installed: --no-monai, or pip install monai in another environment")
    return MonaiSwinUNETR(  # type: ignore[no-any-return]
        in_channels=1,
        out_channels=channels,
        feature_size=options.feature_size,
        window_size=options.window,
        **more,
    )
