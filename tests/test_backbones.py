"""dae/model: one suite that every backbone passes, that of docs/porting.md too.

The networks are tiny. The tests of single ports are at the end.
"""

import csv
import importlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETWORK, same_weights
from test_porting import block
from torch import Tensor, nn

from dae import check
from dae.config.command_line import check_values
from dae.config.evaluate import PredictConfig, ScoreConfig
from dae.config.pretrain import PretextConfig, PretrainConfig
from dae.config.segment import SegConfig
from dae.config.shared import NetworkConfig
from dae.demo.phantom import write_phantoms
from dae.errors import InputError
from dae.model import BACKBONES, Backbone, UNet, ViTUNETR, arguments_of, backbone_named
from dae.model.conv import InstanceNorm
from dae.model.vit import ViTEncoder, position_embedding
from dae.pretext.methods import METHODS, Output, Pretext
from dae.weights import checkpoint
from dae.weights.plan import backbone_of
from train_pretrain import main as pretrain
from train_seg import main as fine_tune

evaluate = importlib.import_module("eval")
MINE = "mynet:MyNet"
TINY: dict[str, dict[str, Any]] = {
    "swin_unetr": NETWORK,
    "unet": {"feature_size": 6, "depths": (1, 2, 1)},
    "vit_unetr": check.SMALL["vit_unetr"],
    MINE: {"feature_size": 6},
}
every = pytest.mark.parametrize("name", TINY)
WITHOUT_IMAGE = "unet"  # its decoder does not use the image


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """They take two thirds of a tiny run's time, and other tests hold them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reconstruction_sheet", "loss_curve"):
            patch.setattr(f"train_pretrain.{name}", lambda *_: None)
        for name in ("overlay_sheet", "seg_curve"):
            patch.setattr(f"train_seg.{name}", lambda *_: None)
        patch.setattr(evaluate.report, "figures", lambda *_, **__: defaultdict(bytes))
        yield


@pytest.fixture(scope="module", autouse=True)
def mynet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's network, where --backbone mynet:MyNet finds it."""
    folder = tmp_path_factory.mktemp("mynet")
    (folder / "mynet.py").write_text(block("python"))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("mynet", None)


def network(name: str, c_in: int = 1, c_out: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return backbone_named(name)(c_in, c_out, **{**TINY[name], **options})


def crops(
    *, batch: int = 2, channels: int = 1, size: tuple[int, ...] = (16, 16, 16), seed: int = 0
) -> Tensor:
    """Rough at the scale of a voxel and at that of a patch."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, *(n // 4 for n in size), generator=generator)
    fine = torch.randn(batch, channels, *size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="trilinear") + 0.3 * fine


def step(net: Pretext, x: Tensor) -> Output:
    result = net(x, torch.tensor([0, 1]), net.draw(x, [1, 2]))
    assert isinstance(result, Output)
    return result


def reached(model: nn.Module) -> set[str]:
    """The parameters with a gradient that is finite and not zero."""
    names = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and 0 < parameter.grad.abs().sum() < math.inf:
            names.add(name)
    return names


def parameters(model: nn.Module, *, encoder: bool | None = None) -> set[str]:
    """The names of all parameters, or of those in the encoder or outside of it."""
    names = set()
    for name, _ in model.named_parameters():
        if encoder is None or encoder == name.startswith("encoder."):
            names.add(name)
    return names


# --- the three methods and five attributes


def test_the_suite_knows_every_backbone() -> None:
    assert set(TINY) == {*BACKBONES, MINE}


@every
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_shapes_are_as_promised_on_a_grid_of_three_different_sides(
    name: str, channels: int
) -> None:
    model = network(name, channels, 3)
    assert isinstance(model, Backbone)
    size = (2 * model.divisor, model.divisor, 3 * model.divisor)
    x = crops(batch=1, channels=channels, size=size)
    tokens = model.tokenize(x)
    assert tokens.shape == (1, model.embed_dim, *(n // model.stride for n in size))

    states = model.encode(tokens)
    assert len(states) > 1
    assert all(state.ndim == 5 and len(state) == 1 for state in states)
    voxels = [state[0, 0].numel() for state in states]
    assert voxels[-1] == min(voxels)  # the bottleneck is the last

    y = model.decode(states, x)
    assert y.shape == (1, 3, *size)
    assert torch.equal(model(x), y)


@every
def test_tokenize_and_encode_use_the_weights_called_encoder_and_decode_uses_the_others(
    name: str,
) -> None:
    model = network(name)
    x = crops(batch=1)
    states = model.encode(model.tokenize(x))
    sum(state.square().mean() for state in states).backward()
    assert reached(model) == parameters(model, encoder=True)

    model.zero_grad(set_to_none=True)
    model.decode([state.detach() for state in states], x).square().mean().backward()
    assert reached(model) == parameters(model, encoder=False)


@every
def test_the_options_of_the_command_line_reach_the_constructor(name: str) -> None:
    config = NetworkConfig(backbone=name, **TINY[name])
    assert TINY[name].items() <= arguments_of(backbone_named(name), config).items()


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    model = network(name)
    n = model.divisor
    with pytest.raises(ValueError, match=f"multiple of {n}"):
        model.tokenize(torch.zeros(1, 1, 2 * n, 2 * n, 2 * n - 1))
    with pytest.raises(ValueError, match="would fit"):
        model.tokenize(torch.zeros(1, 1, n, n, n))  # one voxel at the bottleneck


# --- as the method uses them


@every
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(name: str) -> None:
    net = Pretext(network(name), "dae")
    step(net, crops()).loss.backward()
    assert reached(net) == parameters(net)


@every
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("z", ["pooled", "flat"])
def test_every_method_gives_a_finite_loss_and_gradient(name: str, method: str, z: str) -> None:
    net = Pretext(network(name), method, PretextConfig(method=method, mask_block=8, z=z))
    result = step(net, crops())
    result.loss.backward()
    assert result.loss.isfinite()
    assert result.x_rec.shape == (2, 1, 16, 16, 16)

    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@every
def test_masked_channels_reach_encode_as_zeros_and_pass_no_gradient_back(name: str) -> None:
    net = Pretext(network(name), "dae")
    tokenize, encode = net.backbone.tokenize, net.backbone.encode
    seen: dict[str, Tensor] = {}

    def watched_tokenize(x: Tensor) -> Tensor:
        seen["before masking"] = tokenize(x)
        seen["before masking"].retain_grad()
        return seen["before masking"]

    def watched_encode(tokens: Tensor) -> list[Tensor]:
        seen["after masking"] = tokens
        return encode(tokens)  # type: ignore[no-any-return]

    net.backbone.tokenize = watched_tokenize
    net.backbone.encode = watched_encode
    step(net, crops()).loss.backward()

    masked = (seen["after masking"] == 0).all(dim=(2, 3, 4))
    assert masked.sum(dim=1).tolist() == [round(0.6 * net.backbone.embed_dim)] * 2
    gradient = seen["before masking"].grad
    assert gradient is not None
    assert not gradient[masked].any()
    assert (gradient[~masked] != 0).any(dim=(1, 2, 3)).all()


@every
def test_without_its_tokens_a_network_knows_nothing_of_the_volume_but_the_image_it_is_given(
    name: str,
) -> None:
    model = network(name)
    image = crops(seed=9)
    outputs = []
    for seed in (1, 2):
        tokens = model.tokenize(crops(seed=seed))
        outputs.append(model.decode(model.encode(torch.zeros_like(tokens)), image))
    assert torch.equal(*outputs)


@every
@pytest.mark.parametrize("method", ["local_mask", "mae"])
@pytest.mark.parametrize("skip", ["auto", "input"])
def test_the_full_resolution_skip_does_not_leak_the_target(
    name: str, method: str, skip: str
) -> None:
    """Without gradients through the tokens, x_rec depends on the target with --skip input alone."""
    net = Pretext(network(name), method, PretextConfig(method=method, mask_block=8, skip=skip))
    encode = net.backbone.encode
    net.backbone.encode = lambda tokens: encode(tokens.detach())
    x = crops().requires_grad_()
    (gradient,) = torch.autograd.grad(step(net, x).x_rec.square().sum(), x, allow_unused=True)
    leaks = gradient is not None and bool(gradient.any())
    assert leaks == (skip == "input" and name != WITHOUT_IMAGE)


@every
def test_residual_starts_as_x_hat(name: str) -> None:
    result = step(Pretext(network(name), "dae", PretextConfig(recon="residual")), crops())
    assert torch.equal(result.x_rec, result.x_hat)


@every
def test_bf16_is_float32_within_its_rounding(name: str) -> None:
    """bf16 keeps 8 bits: a layer rounds by up to 2^-8 = 0.4 %, a dozen by about four times that.

    Measured over three volumes each: 0.9 to 1.3 % of the output's std. 3 % leaves room for the
    kernels of other CPUs.
    """
    model = network(name).eval()
    x = crops()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x)
    assert (rough.float() - exact).square().mean().sqrt() < 0.03 * exact.std()


@pytest.mark.parametrize("name", BACKBONES)
def test_checkpointing_recomputes_the_blocks_and_changes_no_gradient(name: str) -> None:
    kept, calls = gradients_and_calls(name, checkpointing=False)
    recomputed, calls_with_checkpointing = gradients_and_calls(name, checkpointing=True)
    assert set(calls.values()) == {1}
    assert set(calls_with_checkpointing.values()) == {2}
    assert same_weights(kept, recomputed)


def gradients_and_calls(name: str, *, checkpointing: bool) -> tuple[dict[str, Any], Counter[str]]:
    """Gradients by parameter, and how often each block of the encoder has run."""
    model = network(name, checkpointing=checkpointing)
    calls: Counter[str] = Counter()
    for module_name, module in model.encoder.named_modules():
        if type(module).__name__ in ("SwinBlock", "ResidualUnit", "Block"):
            module.register_forward_pre_hook(lambda *_, key=module_name: calls.update([key]))
    model(crops()).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters()}, calls


# --- as the scripts use them


@every
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    name: str, tiny: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    options = {"backbone": name, **TINY[name]}
    whole = replace(tiny(out=str(tmp_path / "a"), steps=3, recon="residual"), **options)
    stopped = replace(whole, out=str(tmp_path / "b"), stop_after=1)
    for config in (whole, stopped, replace(stopped, stop_after=0, resume=True)):
        pretrain(config)

    a = checkpoint.load(tmp_path / "a/last.pt")
    b = checkpoint.load(tmp_path / "b/last.pt")
    assert a["step"] == b["step"] == 3
    assert same_weights(a["model"], b["model"])
    states_of_b = b["optimizer"]["state"]
    for parameter, state in a["optimizer"]["state"].items():
        assert same_weights(state, states_of_b[parameter])


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    write_phantoms(folder / "phantoms", subjects=1, size=(32, 32, 32))
    return folder


@pytest.fixture(scope="module")
def pretrained(phantoms: Path, mynet: None) -> Callable[[str], Path]:
    """The checkpoint of two steps of pre-training with a backbone."""

    def checkpoint_of(name: str) -> Path:
        out = phantoms / name.replace(":", "_")
        if not out.exists():
            pretrain(
                PretrainConfig(
                    data=str(phantoms / "phantoms/pretrain.json"),
                    out=str(out),
                    cache_dir=str(phantoms / "cache"),
                    crop=(16, 16, 16),
                    backbone=name,
                    **TINY[name],
                    steps=2,
                    workers=0,
                    device="cpu",
                    amp="off",
                    validate_crops=1,
                )
            )
        return out / "last.pt"

    return checkpoint_of


def fine_tuning(phantoms: Path, weights: Path, out: Path, **options: Any) -> SegConfig:
    return SegConfig(
        data=str(phantoms / "phantoms/ct_seg.json"),
        pretrained=str(weights),
        out=str(out),
        overlap=0.0,
        cache_dir=str(phantoms / "cache"),
        crop=(16, 16, 16),
        steps=2,
        batch_size=2,
        workers=0,
        device="cpu",
        amp="off",
        **options,
    )


def named(name: str) -> dict[str, str]:
    """The checkpoint decides for a backbone of this repository; another one must be named."""
    return {"backbone": name} if name == MINE else {}


@every
@pytest.mark.parametrize("parts", ["encoder", "both"])
def test_what_is_pretrained_is_fine_tuned(
    name: str, parts: str, phantoms: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    config = fine_tuning(
        phantoms, pretrained(name), tmp_path, transfer=parts, lr=0.0, **named(name)
    )
    fine_tune(config)
    before = checkpoint.load(pretrained(name))["model"]
    after = checkpoint.load(tmp_path / "best.pt")["model"]

    transferred = {n for n in before if torch.equal(before[n], after[n])}
    encoder = {n for n in before if n.startswith("encoder.")}
    head = {n for n in before if n.startswith("head.")}
    decoder = set(before) - encoder - head
    kernels_of_decoder = {n for n in decoder if before[n].ndim == 5}
    assert transferred >= encoder
    assert "head.weight" not in transferred
    if parts == "both":
        assert transferred >= decoder
    else:
        assert not transferred & kernels_of_decoder


@every
def test_and_predicts_and_is_scored(
    name: str, phantoms: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    fine_tune(fine_tuning(phantoms, pretrained(name), tmp_path / "seg", lr=1e-2, **named(name)))
    common: dict[str, Any] = {"data": str(phantoms / "phantoms/ct_seg.json"), "split": "test"}
    evaluate.predict(
        PredictConfig(
            **common,
            checkpoint=(str(tmp_path / "seg/best.pt"),),
            out=str(tmp_path / "a"),
            overlap=0.0,
            device="cpu",
            amp="off",
            **named(name),
        )
    )
    evaluate.score(
        ScoreConfig(**common, predictions=str(tmp_path / "a"), out=str(tmp_path / "scores"))
    )
    rows = list(csv.DictReader((tmp_path / "scores/scores.csv").open()))
    assert len(rows) == 7
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)


# --- mistakes


@pytest.mark.parametrize(
    "code, name, words",
    [
        ("", "unett", "unett: take swin_unetr, unet, vit_unetr, or your own as module:Class"),
        ("", "nomodule:Net", "--backbone nomodule:Net: No module named 'nomodule'"),
        (
            "",
            "theirs:Nothing",
            "--backbone theirs:Nothing: module 'theirs' has no attribute 'Nothing'",
        ),
        (
            "class Net: pass",
            "theirs:Net",
            "must be an nn.Module class with tokenize, encode, decode and forward",
        ),
        ("Net = 3", "theirs:Net", "must be an nn.Module class"),
        (
            "from torch import nn\nclass Net(nn.Module): pass",
            "theirs:Net",
            "must be an nn.Module class with tokenize",
        ),
        (
            (
                "from mynet import MyNet\nclass Net(MyNet):\n def __init__(self, *c):\n"
                "  super().__init__(*c)\n  del self.head"
            ),
            "theirs:Net",
            "--backbone theirs:Net: the network has no head; see docs/porting.md",
        ),
    ],
)
def test_a_name_that_leads_to_no_backbone_is_one_line(
    code: str,
    name: str,
    words: str,
    tiny: Callable[..., PretrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "theirs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    with pytest.raises(InputError) as error:
        check_values(tiny(backbone=name))
        pretrain(tiny(backbone=name))
    assert words in str(error.value) and "\n" not in str(error.value)
    sys.modules.pop("theirs", None)


def test_code_is_never_imported_because_a_checkpoint_says_so(
    phantoms: Path,
    pretrained: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = checkpoint.load(pretrained(MINE))
    state = {**saved, "plan": {**saved["plan"], "backbone": "trap:Net"}}
    checkpoint.save(tmp_path / "trap.pt", state)
    (tmp_path / "trap.py").write_text("raise SystemExit('the checkpoint has run code')")
    monkeypatch.chdir(tmp_path)

    line = r"trap\.pt was made with trap:Net; name it: --backbone trap:Net$"
    with pytest.raises(InputError, match=line):
        fine_tune(fine_tuning(phantoms, tmp_path / "trap.pt", tmp_path / "run"))
    with pytest.raises(InputError, match=line):
        evaluate.network_of(
            state["plan"], state["model"], torch.device("cpu"), PredictConfig(), "trap.pt"
        )
    assert "trap" not in sys.modules
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "made, asked, words",
    [
        (
            "unet",
            "swin_unetr",
            "--backbone swin_unetr: a.pt was made with unet; leave the flag out",
        ),
        ("unet", MINE, f"--backbone {MINE}: a.pt was made with unet; leave the flag out"),
        (MINE, "unet", f"--backbone unet: a.pt was made with {MINE}; name it: --backbone {MINE}"),
        ("gone:Net", "gone:Net", "--backbone gone:Net: No module named 'gone'"),
    ],
)
def test_a_backbone_that_contradicts_the_checkpoint_is_refused(
    made: str, asked: str, words: str
) -> None:
    for config in (NetworkConfig, SegConfig, PredictConfig):
        given = {"set_flags": ("backbone",)} if config is SegConfig else {}
        if asked == "swin_unetr" and config is NetworkConfig:
            continue  # the default: without `set_flags` it was not asked for
        with pytest.raises(InputError) as error:
            backbone_of({"backbone": made}, config(backbone=asked, **given), Path("a.pt"))
        assert str(error.value) == words


def test_of_ours_the_checkpoint_decides() -> None:
    for config in (
        SegConfig(),
        SegConfig(backbone="unet", set_flags=("backbone",)),
        PredictConfig(backbone="unet"),
    ):
        assert backbone_of({"backbone": "unet"}, config, Path("a.pt")) is UNet


# --- the U-Net


def test_the_u_net_has_as_many_parameters_as_counted_by_hand_and_as_published_for_resenc_l() -> (
    None
):
    """102 M is nnU-Net's ResEnc L at six stages, with biases and with more heads in the decoder."""
    widths, depths = (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)

    def unit(c_in: int, c_out: int) -> int:
        mixed = c_in * c_out + 2 * c_out if c_in != c_out else 0
        return 27 * c_in * c_out + 27 * c_out**2 + 4 * c_out + mixed

    stem = 27 * 32 + 2 * 32
    firsts = sum(unit(a, b) for a, b in zip((32, *widths), widths))
    others = sum((depth - 1) * unit(c, c) for c, depth in zip(widths, depths))
    ups = sum(8 * b * a + 27 * 2 * a * a + 2 * a for a, b in pairwise(widths))
    with torch.device("meta"):
        counted = sum(p.numel() for p in UNet(1, 1).parameters())
    assert counted == stem + firsts + others + ups + 33
    assert round(counted / 1e6) == 102


def test_the_u_net_s_bottleneck_sees_as_far_as_its_kernels_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stem 3, first block 7, strided block 9 and at twice the step 13, third block 21.

    Without norms, which see all.
    """
    monkeypatch.setattr(InstanceNorm, "forward", lambda self, x: x)
    model = UNet(1, 1, feature_size=4, depths=(1, 2))
    x = torch.randn(1, 1, 32, 32, 32, requires_grad=True)
    model.encode(model.tokenize(x))[-1][0, 0, 8, 8, 8].backward()
    assert x.grad is not None
    seen = x.grad[0, 0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [21, 21, 21]


def test_the_u_net_takes_two_to_seven_stages_and_stays_within_320_channels() -> None:
    for stages in range(2, 8):
        with torch.device("meta"):
            model = UNet(1, 1, feature_size=32, depths=(1,) * stages)
            assert model.divisor == 2 ** (stages - 1)
            assert model.encoder.stages[-1][0].conv2.weight.shape[0] == min(320, 32 * model.divisor)


def test_the_u_net_does_not_use_the_image() -> None:
    model = network("unet")
    states = model.encode(model.tokenize(crops()))
    with_one_image = model.decode(states, crops(seed=1))
    assert torch.equal(with_one_image, model.decode(states, crops(seed=2)))


@pytest.mark.parametrize(
    "wrong", [{"depths": (2,)}, {"depths": (1,) * 8}, {"depths": (1, 0)}, {"feature_size": 400}]
)
def test_the_u_net_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stages|feature size"):
        UNet(1, 1, **wrong)


# --- UNETR


def test_unetr_has_the_published_number_of_parameters() -> None:
    """92.58 M (Table 4 of the paper) with learned positions, here fixed; and as counted by hand."""
    c, f = 768, 16
    block_parameters = 3 * c * c + c * c + c + 8 * c * c + 5 * c + 4 * c
    transformer = 12 * block_parameters + (16**3 * c + c) + 2 * c

    def residual(a: int, b: int) -> int:
        return 27 * a * b + 27 * b * b + (a * b if a != b else 0)

    upsampling = 0
    for width, more_doublings in ((2 * f, 2), (4 * f, 1), (8 * f, 0)):
        upsampling += 8 * c * width
        upsampling += more_doublings * (8 * width**2 + residual(width, width))

    ups = 0
    for coarse, fine in pairwise((c, 8 * f, 4 * f, 2 * f, f)):
        ups += 8 * coarse * fine + residual(2 * fine, fine)

    with torch.device("meta"):
        counted = sum(p.numel() for p in ViTUNETR(1, 14).parameters())
    assert counted == transformer + upsampling + ups + residual(1, f) + 14 * f + 14
    assert abs(counted / 92.58e6 - 1) < 0.001


@pytest.mark.parametrize("patch, blocks", [(8, [4, 8, 12]), (16, [3, 6, 9, 12])])
def test_the_states_are_those_after_each_third_or_quarter_of_the_blocks(
    patch: int, blocks: list[int]
) -> None:
    with torch.device("meta"):
        encoder = ViTEncoder(1, 24, depth=12, heads=2, patch=patch, checkpointing=False)
    assert encoder.state_after == blocks


@pytest.mark.parametrize("patch", [8, 16])
def test_the_transformer_is_torch_s_own_on_the_same_weights(patch: int) -> None:
    model = network("vit_unetr", vit_patch=patch, vit_depth=4).eval()
    tokens = model.tokenize(crops(batch=1, size=(2 * patch, patch, 2 * patch)))
    x = tokens.flatten(2).transpose(1, 2) + position_embedding(tokens.shape[-3:], 24)
    expected = []
    for n, timm_block in enumerate(model.encoder.blocks, start=1):
        x = torch_layer(timm_block).train()(x)
        if n in model.encoder.state_after:
            expected.append(x)
    expected[-1] = nn.functional.layer_norm(x, (24,))

    states = [state.flatten(2).transpose(1, 2) for state in model.encode(tokens)]
    assert len(states) == len(expected)
    for state, by_torch in zip(states, expected):
        assert torch.allclose(state, by_torch, atol=1e-5)


def torch_layer(timm_block: nn.Module) -> nn.Module:
    """torch's own transformer layer with the weights of a timm block."""
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    weights = timm_block.state_dict()
    weights["attn.qkv.bias"] = torch.zeros(72)

    state = {}
    for torch_name, timm_name in names.items():
        for part in ("weight", "bias"):
            state[torch_name + part] = weights[timm_name + part]

    eps = float(timm_block.norm1.eps)  # type: ignore[union-attr, arg-type]
    layer = nn.TransformerEncoderLayer(
        24, 2, 96, 0.0, "gelu", eps, batch_first=True, norm_first=True
    )
    layer.load_state_dict(state)
    return layer


def test_a_token_is_made_of_its_patch_and_every_state_of_all_patches() -> None:
    model = network("vit_unetr").eval()
    x = crops(batch=1, size=(16, 16, 24)).requires_grad_()
    tokens = model.tokenize(x)
    (gradient,) = torch.autograd.grad(tokens[0, :, 1, 0, 2].sum(), x, retain_graph=True)
    voxels = gradient[0, 0].nonzero()
    assert voxels.amin(0).tolist() == [8, 0, 16]
    assert voxels.amax(0).tolist() == [15, 7, 23]
    (gradient,) = torch.autograd.grad(model.encode(tokens)[0][0, 0, 0, 0, 0], x)
    assert bool((gradient != 0).all())


def test_every_position_has_an_embedding_of_its_own_the_same_in_every_grid() -> None:
    embedding = position_embedding((5, 4, 6), 24)
    in_other_grid = position_embedding((3, 7, 5), 24)
    assert embedding.shape == (1, 120, 24)
    assert torch.pdist(embedding[0]).min() > 0.1

    d, h, w = 2, 1, 3
    at_token = embedding[0, (d * 4 + h) * 6 + w]
    assert torch.equal(at_token, in_other_grid[0, (d * 7 + h) * 5 + w])


def test_an_embedding_is_sines_and_cosines_of_d_then_h_then_w() -> None:
    by_hand = []
    for n, wave, k in product((2, 1, 3), (math.sin, math.cos), (0, 1)):
        by_hand.append(wave(n / 100**k))
    assert torch.allclose(position_embedding((3, 2, 4), 12)[0, -1], torch.tensor(by_hand))


@pytest.mark.parametrize(
    "wrong", [{"vit_patch": 4}, {"vit_heads": 5}, {"vit_channels": 28}, {"vit_depth": 2}]
)
def test_unetr_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"vit (patch|channels|depth)"):
        network("vit_unetr", **wrong)
