"""dae/weights: every layout of Swin UNETR files loads whole, or is refused in one line."""

import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import ROOT, run_script
from test_goldens import GOLDENS, SMALL, monai_weights
from torch import Tensor
from torch.nn import functional as F

from dae.errors import InputError
from dae.model import MONAI, SwinUNETR, UNet
from dae.model.swin import MergeOrder, relative_position_index
from dae.weights import checkpoint
from dae.weights.__main__ import ConvertConfig, convert
from dae.weights.foreign import Weights, find_state_dict, for_monai, load_tensors, read_weights
from dae.weights.layouts import reads_twice, reorder, to_monai

Tensors = dict[str, Tensor]
TINY: dict[str, Any] = {**SMALL, "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "window": (2, 2, 2)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def key_list(name: str) -> Tensors:
    """A file of full size at random values: its names and shapes were read off the original."""
    index = relative_position_index((7, 7, 7), (7, 7, 7))
    tensors: Tensors = {}
    for line in (GOLDENS / f"keys_{name}.tsv").read_text().splitlines():
        key, shape = line.split("\t")
        if key.endswith("_index"):
            tensors[key] = index.clone()
        else:
            tensors[key] = torch.randn([int(size) for size in shape.split("x")])
    return tensors


def network(weights: Weights) -> SwinUNETR:
    """The plan's network with the file's tensors, strictly; parts that the file lacks are zeros."""
    plan = weights.plan
    with torch.device("meta"):
        model = SwinUNETR(plan["in_channels"], plan["out_channels"], **plan["arguments"])
    zeros = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(zeros | weights.tensors, strict=True, assign=True)
    return model.eval()


def noise(seed: int) -> Tensor:
    """The volume for which the goldens have MONAI's outputs."""
    x = np.random.default_rng(seed).standard_normal((1, 1, 64, 64, 64))
    return torch.from_numpy(x.astype(np.float32))


# --- the layouts, made from MONAI's


def small() -> Tensors:
    return monai_weights(SwinUNETR(1, 2, **SMALL))


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def without(part: str, tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if part not in name}


def encoder_of(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith("swinViT.")}


def as_pretraining(monai: Tensors, *, fc: bool = False) -> Tensors:
    """MONAI's tensors by the names of the authors' pre-training code, and what it adds."""
    named: Tensors = {
        "encoder.mask_token": torch.zeros(1, 1, 12),
        "encoder.norm.weight": torch.ones(192),
    }
    for name, value in monai.items():
        name = name.replace("swinViT.", "encoder.")
        name = name.replace(".0.blocks.", ".0.0.blocks.")
        name = name.replace(".0.downsample.", ".0.0.downsample.")
        if fc:
            name = name.replace("linear", "fc")
        named[name] = value
    return named


def as_swinvit(monai: Tensors) -> Tensors:
    """The encoder alone, as model_swinvit.pt has it, with the heads of its own tasks."""
    named: Tensors = {}
    for name, value in encoder_of(monai).items():
        name = name.removeprefix("swinViT.").replace("linear", "fc")
        named[f"module.{name}"] = value
    for head in ("norm", "convTrans3d", "rotation_head", "contrastive_head"):
        named[f"module.{head}.weight"] = torch.zeros(2)
        named[f"module.{head}.bias"] = torch.zeros(2)
    return named


def with_authors_stem(monai: Tensors) -> Tensors:
    """Two convolutions in place of the patches, and the unused ones of MONAI 0.8."""
    named = without("patch_embed", monai)
    proj = "swinViT.patch_embed.proj"
    named[f"{proj}.conv1.conv.weight"] = torch.randn(12, 1, 3, 3, 3)
    named[f"{proj}.conv2.conv.weight"] = torch.randn(12, 12, 3, 3, 3)
    for norm in ("norm1", "norm2"):
        named[f"{proj}.{norm}.weight"] = torch.ones(12)
        named[f"{proj}.{norm}.bias"] = torch.ones(12)
    named["encoder2.layer.conv3.conv.weight"] = torch.ones(12, 12, 1, 1, 1)
    named["encoder10.layer.conv3.conv.weight"] = torch.ones(192, 192, 1, 1, 1)
    return named


# --- at full size, from the key lists


@pytest.mark.parametrize(
    "name, layout, options",
    [
        (
            "monai_swin_unetr_f48",
            "monai",
            {"merge_order": "monai", "normalize_hidden": True, "stage_conv": False},
        ),
        (
            "monai_swin_unetr_v2_f48",
            "monai",
            {"merge_order": "monai", "normalize_hidden": True, "stage_conv": True},
        ),
        (
            "official_dae_pretrain_f48",
            "official",
            {"merge_order": "legacy", "normalize_hidden": False, "stem": "conv"},
        ),
    ],
)
def test_a_file_of_each_key_list_loads_whole_into_the_options_it_was_trained_with(
    name: str, layout: str, options: dict[str, Any], tmp_path: Path
) -> None:
    tensors = key_list(name)
    weights = read_weights(save(tmp_path / "file.pt", {"model": tensors, "epoch": 3}))

    assert weights.plan["method"] == layout
    expected = {"clipped_bias": "sliced", "feature_size": 48, "heads": [3, 6, 12, 24], **options}
    assert weights.plan["arguments"].items() >= expected.items()

    network(weights)
    assert len(weights.tensors) + len(weights.extra) == len(tensors)
    assert ("scrambled" in " ".join(weights.notes)) == (layout == "official")


# --- small, against MONAI's outputs


def unchanged(monai: Tensors) -> Tensors:
    return monai


def of_ddp(monai: Tensors) -> dict[str, Any]:
    return {"state_dict": with_prefix("module.", monai), "epoch": 7}


def under_backbone(monai: Tensors) -> dict[str, Any]:
    return {"state_dict": with_prefix("backbone.", monai)}


def with_underscore(monai: Tensors) -> Tensors:
    return {name.replace("swinViT", "swin_vit"): value for name, value in monai.items()}


def with_numpy_score(monai: Tensors) -> dict[str, Any]:
    return {"best_acc": np.float64(0.8), "state_dict": monai}


def of_pretraining(monai: Tensors) -> dict[str, Any]:
    return {"model": as_pretraining(monai), "optimizer": {}}


def of_pretraining_with_fc(monai: Tensors) -> dict[str, Any]:
    return {"model": as_pretraining(monai, fc=True)}


@pytest.mark.parametrize(
    "case, number, quirks, wrap",
    [
        ("merging_64", 0, {}, unchanged),
        ("merging_64", 0, {}, of_ddp),
        ("merging_64", 0, {}, under_backbone),
        ("merging_64", 0, {}, with_underscore),
        ("mergingv2_64", 2, {"merge_order": "all"}, unchanged),
        ("legacy_64", 3, {"merge_order": "legacy"}, with_numpy_score),
        ("nonorm_64", 4, {"merge_order": "monai"}, of_pretraining),
        ("nonorm_64", 4, {"merge_order": "monai"}, of_pretraining_with_fc),
        ("v2net_64", 5, {}, unchanged),
    ],
)
@torch.inference_mode()
def test_each_layout_gives_the_outputs_of_monai(
    case: str,
    number: int,
    quirks: dict[str, Any],
    wrap: Callable[[Tensors], dict[str, Any]],
    tmp_path: Path,
) -> None:
    golden = np.load(GOLDENS / "monai_swin_unetr_1.6.1.npz")[f"{case}/logits_stride4"]
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL, stage_conv=case == "v2net_64"))
    model = network(read_weights(save(tmp_path / "file.pt", wrap(tensors)), quirks))
    logits = model(noise(1000 + number))[..., ::4, ::4, ::4].numpy()
    assert np.abs(logits - golden).max() < 2e-4


@torch.inference_mode()
def test_the_encoder_of_model_swinvit_gives_the_bottleneck_of_legacy_monai(tmp_path: Path) -> None:
    golden = np.load(GOLDENS / "monai_swin_unetr_1.6.1.npz")["legacy_64/hidden4"]
    weights = read_weights(save(tmp_path / "model_swinvit.pt", {"state_dict": as_swinvit(small())}))
    assert all(name.startswith("encoder.") for name in weights.tensors)
    assert "rotation_head.bias" in weights.extra

    model = network(weights)
    bottleneck = model.encode(model.tokenize(noise(1003)))[-1].numpy()
    assert np.abs(bottleneck - golden).max() < 2e-4


# --- where the network is


def test_a_network_is_found_at_any_depth_and_with_anything_beside_it(tmp_path: Path) -> None:
    tensors = small()
    lightning = with_prefix("model.", tensors) | {"loss.weight": torch.ones(3)}
    numbers = {
        "best": np.float32(0.8),
        "step": np.int32(3),
        "name": np.str_("a"),
        "ok": np.bool_(True),
    }
    contents: list[dict[str, Any]] = [
        {"net": tensors},
        {"network_weights": tensors, **numbers},
        {"state_dict": {"model": tensors}},
        {"state_dict": {}, "model": tensors},
        {"state_dict": lightning},
        {"ema": {"student.x": tensors}},
    ]
    for content in contents:
        weights = read_weights(save(tmp_path / "w.pt", content))
        assert len(weights.tensors) == 151

    weights = read_weights(save(tmp_path / "w.pt", lightning))
    assert weights.extra[0] == "loss.weight"


def test_of_several_dictionaries_the_first_network_is_taken_and_else_the_first_tensors() -> None:
    one = {"a": torch.zeros(1)}
    net = {"swinViT.patch_embed.proj.weight": torch.zeros(1)}
    other_net = {"swinViT.patch_embed.proj.weight": torch.ones(1)}
    assert find_state_dict({"x": one, "y": {"z": net}, "w": other_net}) == ("y.z", net)
    assert find_state_dict({"x": {"u": one}, "y": {"b": torch.ones(1)}}) == ("x.u", one)
    assert find_state_dict({"x": {}, "epoch": 3}) == ("", {})


def test_self_supervised_heads_beside_the_encoder_are_left_out(tmp_path: Path) -> None:
    """A checkpoint of Swin UNETR's own pre-training script."""
    tensors = encoder_of(monai_weights(SwinUNETR(4, 3, **SMALL)))
    for head in ("rotation_head", "contrastive_head", "conv.0", "norm"):
        tensors[f"{head}.weight"] = torch.ones(2)
    weights = read_weights(save(tmp_path / "w.pt", {"state_dict": with_prefix("module.", tensors)}))
    assert weights.plan["in_channels"] == 4
    assert all(name.startswith("encoder.") for name in weights.tensors)


def test_four_channels_and_three_classes_are_read(tmp_path: Path) -> None:
    """A fine-tuned checkpoint of BraTS."""
    tensors = monai_weights(SwinUNETR(4, 3, **SMALL))
    weights = read_weights(save(tmp_path / "w.pt", {"state_dict": tensors, "epoch": 3}))
    assert weights.plan["in_channels"] == 4
    assert weights.plan["out_channels"] == 3


@pytest.mark.parametrize("window", [(2, 2, 3), (1, 2, 5), (4, 2, 3)])
def test_the_position_index_says_which_window_it_is(
    window: tuple[int, int, int], tmp_path: Path
) -> None:
    model = SwinUNETR(1, 2, **{**TINY, "window": window})
    weights = read_weights(save(tmp_path / "w.pt", to_monai(model.state_dict(), window)))
    assert tuple(weights.plan["arguments"]["window"]) == window
    network(weights)


def test_ssl_pretrained_weights_and_the_authors_files_are_told_apart(tmp_path: Path) -> None:
    ssl = as_pretraining(without("out.", monai_weights(SwinUNETR(1, 1, **SMALL))))
    weights = read_weights(save(tmp_path / "ssl.pth", {"model": ssl}))
    assert weights.plan["method"] == "ssl"
    assert weights.plan["arguments"]["stem"] == "patch"

    fine_tuned = with_prefix("module.", with_authors_stem(small()))
    weights = read_weights(save(tmp_path / "model.pt", {"state_dict": fine_tuned}))
    assert weights.plan["method"] == "official-seg"
    assert weights.plan["arguments"]["stem"] == "conv"
    assert weights.plan["arguments"]["normalize_hidden"]
    assert "encoder10.layer.conv3.conv.weight" in weights.extra


# --- the merging order, which no name and no shape tells


def trained(order: MergeOrder, steps: int = 25) -> SwinUNETR:
    """A tiny network that has briefly learned how bright each voxel of its bottleneck is."""
    torch.manual_seed(0)
    model = SwinUNETR(1, 1, **TINY, merge_order=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x = F.interpolate(torch.randn(4, 1, 8, 8, 16), (32, 32, 64), mode="trilinear")
        bottleneck = model.encode(model.tokenize(x))[-1]
        loss = (bottleneck[:, :1] - F.avg_pool3d(x, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("order", ["legacy", "monai", "all"])
def test_trained_weights_show_whether_merging_read_two_octants_twice(
    order: MergeOrder, tmp_path: Path
) -> None:
    model = trained(order)
    assert reads_twice(model.state_dict()) == (order == "legacy")

    # A file in MONAI's layout is taken for one of MONAI since 1.5, unless its weights show legacy.
    weights = read_weights(save(tmp_path / "w.pt", to_monai(model.state_dict())))
    expected = "legacy" if order == "legacy" else "monai"
    assert weights.plan["arguments"]["merge_order"] == expected


def test_weights_that_were_never_trained_show_nothing() -> None:
    for _ in range(20):
        untrained = SwinUNETR(1, 1, **TINY, merge_order="legacy")
        assert not reads_twice(untrained.state_dict())


# --- out again


def test_monai_to_ours_to_monai_is_the_identity(tmp_path: Path) -> None:
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL, stage_conv=True))
    back, notes = for_monai(read_weights(save(tmp_path / "w.pt", tensors)))
    assert not notes
    assert back.keys() == tensors.keys()
    for name, value in back.items():
        assert torch.equal(value, tensors[name])


@torch.inference_mode()
def test_reordered_columns_compute_the_same_in_the_other_order() -> None:
    torch.manual_seed(0)
    ours = SwinUNETR(1, 2, **TINY, merge_order="all").eval()
    theirs = SwinUNETR(1, 2, **TINY, merge_order="monai").eval()
    theirs.load_state_dict(reorder(ours.state_dict(), "all", "monai"))
    x = torch.randn(1, 1, 32, 32, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)

    again = reorder(theirs.state_dict(), "monai", "all")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, again[name])


def test_legacy_merging_is_not_written_in_another_order() -> None:
    model = SwinUNETR(1, 2, **TINY, merge_order="legacy")
    with pytest.raises(ValueError, match="twice"):
        reorder(model.state_dict(), "legacy", "monai")


@torch.inference_mode()
def test_a_real_monai_network_gives_the_same_logits_when_it_is_read(tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12).eval()
    ours = network(read_weights(save(tmp_path / "w.pt", theirs.state_dict())))
    x = torch.randn(1, 1, 64, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=2e-4)


@pytest.mark.parametrize("order", ["monai", "all"])
@torch.inference_mode()
def test_a_real_monai_network_gives_the_same_logits_with_our_weights(order: MergeOrder) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    ours = SwinUNETR(1, 3, **SMALL, merge_order=order, clipped_bias="sliced").eval()
    arguments = {
        **SMALL,
        "merge_order": order,
        "clipped_bias": "sliced",
        "normalize_hidden": True,
    }
    plan = {"backbone": "swin_unetr", "in_channels": 1, "out_channels": 3, "arguments": arguments}
    state_dict, _ = for_monai(Weights(ours.state_dict(), plan, []))

    theirs = nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12).eval()
    theirs.load_state_dict(state_dict, strict=True)
    x = torch.randn(1, 1, 64, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=2e-4)


# --- what is refused


def renamed(tensors: Tensors) -> Tensors:
    changed = dict(tensors)
    norm = "swinViT.layers2.0.blocks.0.norm1.weight"
    changed[norm.replace("norm1", "norm9")] = changed.pop(norm)
    return changed


def half_of(tensors: Tensors) -> Tensors:
    names = list(tensors)[: len(tensors) // 2]
    return {name: tensors[name] for name in names}


def with_one_outside(tensors: Tensors) -> Tensors:
    """All tensors behind DDP's prefix but those of the last decoder block."""
    changed = {}
    for name, value in tensors.items():
        prefix = "" if name.startswith("decoder1") else "module."
        changed[prefix + name] = value
    return changed


def without_values(tensors: Tensors) -> Tensors:
    return {name: value.to("meta") for name, value in tensors.items()}


def without_deep_stages(tensors: Tensors) -> Tensors:
    return without("layers3", without("layers4", as_swinvit(tensors)))


def without_a_block(tensors: Tensors) -> Tensors:
    return without("layers3.0.blocks.1", as_swinvit(tensors))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            renamed,
            r"1 tensors are missing, first encoder\.\S+\.norm1\.weight; 1 tensors are unknown",
        ),
        (half_of, "missing"),
        (partial(without, "layers3"), "is missing"),
        (
            without_deep_stages,
            r"has stages of \(2, 2\) blocks, and such files have \(2, 2, 2, 2\)",
        ),
        (without_a_block, r"stages of \(2, 2, 1, 2\)"),
        (with_one_outside, r"decoder1\.\S+ stands outside the prefix 'module\.'"),
        (
            partial(with_prefix, "module.module."),
            r"names begin with 'module\.module\.', a prefix that",
        ),
        (partial(with_prefix, "swinViT."), r"names begin with 'swinViT\.', a prefix that"),
        (without_values, "has a shape and no values"),
    ],
)
def test_a_network_that_is_not_whole_is_refused_in_one_line(
    spoil: Callable[[Tensors], Tensors], words: str, tmp_path: Path
) -> None:
    check_refused(save(tmp_path / "file.pt", spoil(small())), words)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        (
            "decoder3.conv_block.conv1.conv.weight",
            (24, 48, 3, 3, 1),
            r"up_blocks\.2\.block\.conv1\.weight is \(24, 48, 3, 3, 1\), its network has \(24, ",
        ),
        (
            "swinViT.layers3.0.downsample.reduction.weight",
            (96, 50),
            r"encoder\.stages\.2\.merge\.reduction\.weight is \(96, 50\)",
        ),
        ("out.conv.conv.weight", (), "its last layer is"),
        ("swinViT.patch_embed.proj.weight", (12,), "its stem, or the position bias"),
        ("swinViT.layers1.0.blocks.0.attn.relative_position_bias_table", (2197, 5), "heads"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_in_one_line(
    name: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    check_refused(save(tmp_path / "file.pt", small() | {name: torch.ones(shape)}), words)


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, r"holds no tensors \(it is empty\)"),
        ({"state_dict": {}}, r"holds no tensors \(state_dict\)"),
        ({"epoch": 3}, r"holds no tensors \(epoch\)"),
        ([torch.ones(1)], "holds a list"),
        ({"state_dict": {}, "make": subprocess.run}, r"holds \S+, which is code"),
        (
            {"conv1.weight": torch.zeros(3)},
            "no layout of a Swin UNETR has tensors of such names as conv1.weight",
        ),
        (
            UNet(1, 2, feature_size=4, depths=(1, 1)).state_dict(),
            "no layout of a Swin UNETR has tensors",
        ),
    ],
)
def test_a_file_without_a_swin_unetr_is_refused_in_one_line(
    content: Any, words: str, tmp_path: Path
) -> None:
    check_refused(save(tmp_path / "file.pt", content), words)


def check_refused(path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        read_weights(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"these are no weights\n", b"PK\x03\x04 cut"])
def test_what_torch_has_not_saved_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(InputError, match="not a whole file"):
        read_weights(tmp_path / "file.pt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_LZMA])
def test_a_directory_of_an_archive_with_any_bit_flipped_is_refused_in_one_line_or_read_as_it_was(
    compression: int, tmp_path: Path
) -> None:
    """By the bit, zipfile raises eight types of error, EOFError and LZMAError among them."""
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.arange(6.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
        directory = archive.fp.tell() if archive.fp else 0

    whole = path.read_bytes()
    for bit in range(8 * directory, 8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            content = load_tensors(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert torch.equal(content["weight"], torch.arange(6.0))


def test_a_damaged_checkpoint_of_ours_is_not_taken_for_a_file_of_others(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    state = {"model": {"head.weight": torch.zeros(1)}, "plan": {"method": "dae"}}
    checkpoint.save(path, state)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="checksum"):
        read_weights(path)

    torch.save({"format": 1, **state}, path)
    with pytest.raises(InputError, match="checksum"):
        read_weights(path)


# --- the command


def weights_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_script("-m", "dae.weights", *arguments, cwd=cwd)


def test_inspect_and_convert_answer_from_the_shell(tmp_path: Path) -> None:
    tensors = small()
    save(tmp_path / "theirs.pt", tensors)
    process = weights_command("inspect", "theirs.pt", cwd=tmp_path)
    assert process.returncode == 0
    for words in ("MONAI's SwinUNETR", "feature_size 12", "1 -> 2 channels"):
        assert words in process.stdout

    for to, source, out in (("dae", "theirs.pt", "ours.pt"), ("monai", "ours.pt", "back.pt")):
        process = weights_command("convert", source, "--to", to, "--out", out, cwd=tmp_path)
        assert process.returncode == 0
    plan = checkpoint.load(tmp_path / "ours.pt")["plan"]
    assert plan["arguments"].items() >= MONAI.items()

    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == tensors.keys()
    for name, value in back.items():
        assert torch.equal(value, tensors[name])


def test_a_spoilt_file_is_one_line_and_exit_code_2_for_the_command_and_for_training(
    tmp_path: Path,
) -> None:
    save(tmp_path / "w.pt", renamed(small()))
    script = str(ROOT / "train_seg.py")
    flags = ("--data", "list.json", "--pretrained", "w.pt", "--out", "run")
    for process in (
        weights_command("inspect", "w.pt", cwd=tmp_path),
        run_script(script, *flags, cwd=tmp_path),
    ):
        assert process.returncode == 2
        assert process.stdout == ""
        (line,) = process.stderr.splitlines()
        assert "w.pt: looks like MONAI's SwinUNETR, but 1 tensors" in line
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inspect", "none.pt"], "none.pt: no such file"),
        (["inspect"], "name a file"),
        (["show", "x"], "show: not a command"),
        (["convert", "x.pt", "--out", "x.pt"], "another than the one that is read"),
        (["convert", "x.pt"], "--out"),
        (["convert", "x.pt", "--to", "jax", "--out", "y"], "--to"),
        (["inspect", "x.pt", "--merge-order", "new"], "--merge-order"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    process = weights_command(*arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_help_answers_without_torch() -> None:
    begun = time.perf_counter()
    line = [sys.executable, "-X", "importtime", "-m", "dae.weights", "convert", "--help"]
    process = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - begun < 1.5
    assert "--to" in process.stdout
    assert "| torch" not in process.stderr


def test_a_converted_file_replaces_no_other(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.pt: is there already"):
        convert(tmp_path / "any.pt", ConvertConfig(out=str(tmp_path / "mine.pt")))
    assert (tmp_path / "mine.pt").read_text() == "mine"
