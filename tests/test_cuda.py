"""What only a GPU can show: kernels chosen, waits, gradients against a CPU in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dae import check
from dae.config.pretrain import PretextConfig
from dae.data.augment import Augmentation, augment
from dae.data.batches import LabelledBatch
from dae.model import SwinUNETR
from dae.pretext.methods import METHODS, Pretext
from dae.training.kernels import lay_out

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU = torch.device("cuda")
# Padded grids and shifted windows in the first stage, a clipped window in the last.
NETWORK: dict[str, Any] = {
    "feature_size": 16,
    "depths": (2, 2),
    "heads": (1, 2),
    "window": (3, 3, 3),
}
MODALITY = torch.tensor([0, 1])


def pretext(method: str = "dae", *, compiled: bool = False, **network: Any) -> Pretext:
    torch.manual_seed(0)
    options = PretextConfig(method=method, mask_block=8)
    net = Pretext(SwinUNETR(1, 1, **{**NETWORK, **network}), method, options).to(GPU)
    lay_out(net, GPU, compiled=compiled)
    return net


def crops(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 16, 24, 16, generator=torch.Generator().manual_seed(1)).to(GPU)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float32])
def test_training_takes_a_fused_kernel_in_every_block(
    amp: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_fused = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        params = torch.backends.cuda.SDPAParams(q, k, v, attn_mask, 0.0, False, False)
        is_fused.append(torch.backends.cuda.can_use_efficient_attention(params, debug=True))
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = SwinUNETR(1, 1, **NETWORK).to(GPU)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp is torch.bfloat16):
        model(crops())
    assert is_fused == [True] * 4


@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_gpu(method: str) -> None:
    net = pretext(method)
    x = crops()
    modality = MODALITY.to(GPU)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def step() -> None:
        drawn = net.draw(x, [1, 2])
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(x, modality, drawn).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHANGES = {"zoom": 0.93, "scale": 1.1, "shift": 0.05, "gamma": 0.8}


def labelled_batch(drawn: list[Augmentation]) -> LabelledBatch:
    """In pinned memory, as the loader of a run on a GPU gives it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(len(drawn), 2, 17, 24, 16, generator=generator).half()
    label = torch.randint(0, 256, (len(drawn), 17, 24, 16), generator=generator)
    return LabelledBatch(x.pin_memory(), label.byte().pin_memory(), drawn)


def test_augmentation_never_waits_for_the_gpu() -> None:
    batch = labelled_batch([Augmentation(**CHANGES, noise=0.1, seed=3), Augmentation()])
    class_table = torch.arange(256).to(GPU)

    def prepare() -> None:
        x, label, drawn = batch.to(GPU)
        _, label = augment(x, label, drawn)
        class_table.take(label.long())

    prepare()  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepare()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_augmentation_but_its_noise_is_that_of_a_cpu() -> None:
    """Values from 0 to 1 in float32, of which a GPU rounds a few operations in another way."""
    batch = labelled_batch([Augmentation(**CHANGES), Augmentation(), Augmentation(zoom=1.1)])
    x, label = augment(*batch.to(GPU))
    on_cpu, label_on_cpu = augment(*batch.to(torch.device("cpu")))
    assert (x.cpu() - on_cpu).abs().max() < 1e-5
    assert torch.equal(x[1].cpu(), on_cpu[1])
    assert torch.equal(label.cpu(), label_on_cpu)


def test_noise_on_a_gpu_is_that_of_its_seed_alone() -> None:
    noisy = [Augmentation(noise=0.1, seed=seed) for seed in (3, 4)]
    before = torch.cuda.get_rng_state()
    together, _ = augment(*labelled_batch(noisy).to(GPU))
    alone, _ = augment(*labelled_batch(noisy[:1]).to(GPU))
    assert torch.equal(together[0], alone[0])
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_in_float32_are_those_of_a_cpu_in_float64(batch: int) -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    on_cpu = SwinUNETR(1, 1, **NETWORK).double()
    torch.manual_seed(0)
    on_gpu = SwinUNETR(1, 1, **NETWORK).to(GPU)
    lay_out(on_gpu, GPU, compiled=False)

    x = crops(batch)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (on_cpu(x.cpu().double()) * weight).sum().backward()
    (on_gpu(x) * weight.to(GPU)).sum().backward()

    for (name, a), b in zip(on_gpu.named_parameters(), on_cpu.parameters()):
        assert a.grad is not None and b.grad is not None
        difference = (a.grad.cpu().double() - b.grad).norm() / b.grad.norm()
        assert difference < check.ALLOWED[torch.float32], (name, float(difference))


def test_bf16_gradients_of_windows_of_64_tokens_are_finite() -> None:
    """cuDNN's kernel, which has NaN there (pytorch issue 196678), takes no bias with a gradient."""
    net = pretext(window=(4, 4, 4))
    x = crops()
    drawn = net.draw(x, [1, 2])
    with torch.autocast("cuda", torch.bfloat16):
        loss = net(x, MODALITY.to(GPU), drawn).loss
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.slow
def test_compiled_is_one_graph_and_gives_the_same_gradients() -> None:
    """As test_compile.py on a CPU; what it allows is explained there."""
    losses: list[float] = []
    gradients: list[Tensor] = []
    x = crops()
    for compiled in (False, True):
        net = pretext(compiled=compiled)
        run = torch.compile(net, fullgraph=True) if compiled else net
        loss = run(x, MODALITY.to(GPU), net.draw(x, [1, 2])).loss
        loss.backward()
        losses.append(loss.item())
        parts = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_the_check_of_a_machine_finds_its_gradients_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["check", "--device", "cuda"])
    assert check.main() == 0, capsys.readouterr().out
