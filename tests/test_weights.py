"""dae/weights: every layout of Swin UNETR files loads whole into the right options, or is refused in one line."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from test_goldens import GOLDENS, SMALL, monai_weights
from torch import Tensor
from torch.nn import functional as F

from dae.errors import InputError
from dae.model import MONAI, SwinUNETR, UNet
from dae.model.swin import relative_position_index
from dae.weights import checkpoint
from dae.weights.__main__ import ConvertConfig, convert
from dae.weights.foreign import Weights, for_monai, read
from dae.weights.layouts import reads_twice, reorder, to_monai

Tensors = dict[str, Tensor]
TINY: dict[str, Any] = {**SMALL, "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "window": (2, 2, 2)}


def key_list(name: str) -> Tensors:
    """A file of full size at random values: its names and shapes were read off the original."""
    lines = (GOLDENS / f"keys_{name}.tsv").read_text().split("\n")
    shapes = {
        key: tuple(map(int, shape.split("x")))
        for key, shape in (line.split("\t") for line in lines if line)
    }
    index = relative_position_index((7, 7, 7), (7, 7, 7))
    return {k: index.clone() if k.endswith("_index") else torch.randn(s) for k, s in shapes.items()}


def network(weights: Weights) -> SwinUNETR:
    """The plan's network with the file's tensors, strictly; a head of zeros where the file has none."""
    plan = weights.plan
    with torch.device("meta"):
        model = SwinUNETR(plan["in_channels"], plan["out_channels"], **plan["arguments"])
    lacking = {
        k: torch.zeros(v.shape) for k, v in model.state_dict().items() if k not in weights.tensors
    }
    model.load_state_dict({**weights.tensors, **lacking}, strict=True, assign=True)
    return model.eval()


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def as_pretraining(monai: Tensors, *, fc: bool) -> Tensors:
    """MONAI's tensors by the names of the authors' pre-training code, with what it stores beside them."""
    named: Tensors = {
        "encoder.mask_token": torch.zeros(1, 1, 12),
        "encoder.norm.weight": torch.ones(192),
    }
    for key, value in monai.items():
        key = key.replace("swinViT.", "encoder.")
        key = key.replace(".0.blocks.", ".0.0.blocks.").replace(
            ".0.downsample.", ".0.0.downsample."
        )
        named[key.replace("linear", "fc") if fc else key] = value
    return named


def as_swinvit(monai: Tensors) -> Tensors:
    """The encoder alone, as model_swinvit.pt has it, with the heads of its own tasks."""
    inside = {k.removeprefix("swinViT."): v for k, v in monai.items() if k.startswith("swinViT.")}
    named = {f"module.{k.replace('linear', 'fc')}": v for k, v in inside.items()}
    heads = ("norm", "convTrans3d", "rotation_head", "contrastive_head")
    return named | {
        f"module.{head}.{kind}": torch.zeros(2) for head in heads for kind in ("weight", "bias")
    }


# --- at full size, from the key lists


@pytest.mark.parametrize(
    "name, layout, expected",
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
    name: str, layout: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    tensors = key_list(name)
    weights = read(saved(tmp_path / "file.pt", {"model": tensors, "epoch": 3}))
    arguments = weights.plan["arguments"]
    assert weights.plan["method"] == layout
    assert (
        arguments.items()
        >= {"clipped_bias": "sliced", "feature_size": 48, "heads": [3, 6, 12, 24]}.items()
    )
    assert arguments.items() >= expected.items()
    network(weights)  # strict: nothing is missing, nothing is over
    assert len(weights.tensors) + len(weights.extra) == len(tensors)
    assert ("scrambled" in " ".join(weights.notes)) == (layout == "official")


# --- small, against MONAI's outputs


@pytest.mark.parametrize(
    "case, k, asked, wrap",
    [
        ("merging_64", 0, {}, lambda t: t),
        (
            "merging_64",
            0,
            {},
            lambda t: {"state_dict": {f"module.{key}": v for key, v in t.items()}, "epoch": 7},
        ),
        (
            "merging_64",
            0,
            {},
            lambda t: {"state_dict": {f"backbone.{key}": v for key, v in t.items()}},
        ),
        (
            "merging_64",
            0,
            {},
            lambda t: {key.replace("swinViT", "swin_vit"): v for key, v in t.items()},
        ),
        ("mergingv2_64", 2, {"merge_order": "all"}, lambda t: t),
        (
            "legacy_64",
            3,
            {"merge_order": "legacy"},
            lambda t: {"state_dict": t, "best_acc": np.float64(0.8)},
        ),
        (
            "nonorm_64",
            4,
            {"merge_order": "monai"},
            lambda t: {"model": as_pretraining(t, fc=False), "optimizer": {}},
        ),
        ("nonorm_64", 4, {"merge_order": "monai"}, lambda t: {"model": as_pretraining(t, fc=True)}),
        ("v2net_64", 5, {}, lambda t: t),
    ],
)
@torch.inference_mode()
def test_each_layout_gives_the_outputs_of_monai(
    case: str, k: int, asked: dict[str, Any], wrap: Callable[[Tensors], Any], tmp_path: Path
) -> None:
    golden = np.load(GOLDENS / "monai_swin_unetr_1.6.1.npz")
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL, stage_conv=case == "v2net_64"))
    model = network(read(saved(tmp_path / "file.pt", wrap(tensors)), asked))
    x = torch.from_numpy(
        np.random.default_rng(1000 + k).standard_normal((1, 1, 64, 64, 64)).astype(np.float32)
    )
    difference = np.abs(
        model(x)[..., ::4, ::4, ::4].numpy() - golden[f"{case}/logits_stride4"]
    ).max()
    assert difference < 2e-4


@torch.inference_mode()
def test_the_encoder_of_model_swinvit_gives_the_bottleneck_of_legacy_monai(tmp_path: Path) -> None:
    golden = np.load(GOLDENS / "monai_swin_unetr_1.6.1.npz")
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL))
    weights = read(saved(tmp_path / "model_swinvit.pt", {"state_dict": as_swinvit(tensors)}))
    assert {name.partition(".")[0] for name in weights.tensors} == {"encoder"}
    assert "rotation_head.bias" in weights.extra
    model = network(weights)
    x = torch.from_numpy(
        np.random.default_rng(1003).standard_normal((1, 1, 64, 64, 64)).astype(np.float32)
    )
    bottleneck = model.encode(model.tokenize(x))[-1].numpy()
    assert np.abs(bottleneck - golden["legacy_64/hidden4"]).max() < 2e-4


def test_a_network_is_found_however_deep_it_lies_and_whatever_lies_beside_it(
    tmp_path: Path,
) -> None:
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL))
    lightning = {f"model.{k}": v for k, v in tensors.items()} | {"loss.weight": torch.ones(3)}
    numbers = {
        "best": np.float32(0.8),
        "step": np.int32(3),
        "name": np.str_("a"),
        "ok": np.bool_(True),
    }
    beside: list[Any] = [
        {"net": tensors},
        {"network_weights": tensors, **numbers},
        {"state_dict": {"model": tensors}},
        {"state_dict": {}, "model": tensors},
        {"state_dict": lightning},
        {"ema": {"student.x": tensors}},
    ]
    for content in beside:
        weights = read(saved(tmp_path / "w.pt", content))
        assert len(weights.tensors) == 151
    assert read(saved(tmp_path / "w.pt", lightning)).extra[0] == "loss.weight"


def test_self_supervised_heads_beside_the_encoder_and_four_channels_are_read(
    tmp_path: Path,
) -> None:
    """A checkpoint of Swin UNETR's own pre-training script; and a fine-tuned one of BraTS."""
    tensors = monai_weights(SwinUNETR(4, 3, **SMALL))
    encoder = {k: v for k, v in tensors.items() if k.startswith("swinViT.")}
    heads = {
        f"{head}.weight": torch.ones(2)
        for head in ("rotation_head", "contrastive_head", "conv.0", "norm")
    }
    weights = read(
        saved(
            tmp_path / "w.pt",
            {"state_dict": {f"module.{k}": v for k, v in (encoder | heads).items()}},
        )
    )
    assert weights.plan["in_channels"] == 4 and {k.split(".")[0] for k in weights.tensors} == {
        "encoder"
    }
    whole = read(saved(tmp_path / "w.pt", {"state_dict": tensors, "epoch": 3}))
    assert (whole.plan["in_channels"], whole.plan["out_channels"]) == (4, 3)


@pytest.mark.parametrize("window", [(2, 2, 3), (1, 2, 5), (4, 2, 3)])
def test_the_position_index_says_which_window_it_is(
    window: tuple[int, int, int], tmp_path: Path
) -> None:
    model = SwinUNETR(1, 2, **{**TINY, "window": window})
    weights = read(saved(tmp_path / "w.pt", to_monai(model.state_dict(), window)))
    assert tuple(weights.plan["arguments"]["window"]) == window
    network(weights)


def test_ssl_pretrained_weights_and_the_authors_files_are_told_apart(tmp_path: Path) -> None:
    tensors = monai_weights(SwinUNETR(1, 1, **SMALL))
    no_head = {
        k: v for k, v in as_pretraining(tensors, fc=False).items() if not k.startswith("out.")
    }
    ssl = read(saved(tmp_path / "ssl.pth", {"model": no_head}))
    assert (ssl.plan["method"], ssl.plan["arguments"]["stem"]) == ("ssl", "patch")
    stem = {
        f"swinViT.patch_embed.proj.conv{n}.conv.weight": torch.randn(
            12, 12 if n > 1 else 1, 3, 3, 3
        )
        for n in (1, 2)
    }
    stem |= {
        f"swinViT.patch_embed.proj.norm{n}.{kind}": torch.ones(12)
        for n in (1, 2)
        for kind in ("weight", "bias")
    }
    spare = {
        f"encoder{n}.layer.conv3.conv.weight": torch.ones(c, c, 1, 1, 1)
        for n, c in ((2, 12), (10, 192))
    }
    tuned = {k: v for k, v in tensors.items() if "patch_embed" not in k} | stem | spare
    seg = read(
        saved(tmp_path / "model.pt", {"state_dict": {f"module.{k}": v for k, v in tuned.items()}})
    )
    assert seg.plan["method"] == "official-seg" and seg.plan["arguments"]["normalize_hidden"]
    assert seg.plan["arguments"]["stem"] == "conv" and set(spare) <= set(seg.extra)


# --- the merging order, which no name and no shape tells


def trained(order: Any, steps: int = 25) -> SwinUNETR:
    """A tiny network whose encoder has learned for a moment how bright each of its bottleneck's voxels is."""
    torch.manual_seed(0)
    model = SwinUNETR(1, 1, **TINY, merge_order=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x = F.interpolate(torch.randn(4, 1, 8, 8, 16), (32, 32, 64), mode="trilinear")
        loss = (model.encode(model.tokenize(x))[-1][:, :1] - F.avg_pool3d(x, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("order", ["legacy", "monai", "all"])
def test_trained_weights_show_whether_merging_read_two_octants_twice(
    order: str, tmp_path: Path
) -> None:
    model = trained(order)
    assert reads_twice(model.state_dict()) == (order == "legacy")
    if order != "all":
        weights = read(saved(tmp_path / "w.pt", to_monai(model.state_dict())))
        assert weights.plan["arguments"]["merge_order"] == order


def test_weights_that_were_never_trained_show_nothing() -> None:
    assert not any(
        reads_twice(SwinUNETR(1, 1, **TINY, merge_order="legacy").state_dict()) for _ in range(20)
    )


# --- out again


def test_monai_to_ours_to_monai_is_the_identity(tmp_path: Path) -> None:
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL, stage_conv=True))
    back, notes = for_monai(read(saved(tmp_path / "w.pt", tensors)))
    assert back.keys() == tensors.keys() and not notes
    assert all(torch.equal(back[k], tensors[k]) for k in back)


@torch.inference_mode()
def test_reordered_columns_compute_the_same_in_the_other_order() -> None:
    torch.manual_seed(0)
    ours = SwinUNETR(1, 2, **TINY, merge_order="all").eval()
    theirs = SwinUNETR(1, 2, **TINY, merge_order="monai").eval()
    theirs.load_state_dict(reorder(ours.state_dict(), "all", "monai"))
    x = torch.randn(1, 1, 32, 32, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    again = reorder(theirs.state_dict(), "monai", "all")
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="twice"):
        reorder(ours.state_dict(), "legacy", "monai")


@pytest.mark.parametrize("order", ["monai", "all"])
@torch.inference_mode()
def test_a_real_monai_network_gives_the_same_logits_before_and_after(
    order: Any, tmp_path: Path
) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64, 64, 64)
    theirs = nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12).eval()
    ours = network(read(saved(tmp_path / "w.pt", theirs.state_dict())))
    assert torch.allclose(ours(x), theirs(x), atol=2e-4)
    mine = SwinUNETR(1, 3, **SMALL, merge_order=order, clipped_bias="sliced").eval()
    plan = {
        "backbone": "swin_unetr",
        "in_channels": 1,
        "out_channels": 3,
        "arguments": {
            **SMALL,
            "merge_order": order,
            "clipped_bias": "sliced",
            "normalize_hidden": True,
        },
    }
    theirs.load_state_dict(for_monai(Weights(mine.state_dict(), plan, []))[0], strict=True)
    assert torch.allclose(mine(x), theirs(x), atol=2e-4)


# --- what is refused


def renamed(tensors: Tensors) -> Any:
    return {
        k.replace("layers2.0.blocks.0.norm1.weight", "layers2.0.blocks.0.norm9.weight"): v
        for k, v in tensors.items()
    }


def misshapen(tensors: Tensors) -> Any:
    return tensors | {"decoder3.conv_block.conv1.conv.weight": torch.zeros(24, 48, 3, 3, 1)}


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            renamed,
            r"1 tensors are missing, first encoder\.stages\.1\.blocks\.0\.norm1\.weight; 1 tensors are unknown",
        ),
        (
            misshapen,
            r"up_blocks\.2\.block\.conv1\.weight is \(24, 48, 3, 3, 1\), its network has \(24, 48, 3, 3, 3\)",
        ),
        (
            lambda t: {f"module.module.{k}": v for k, v in t.items()},
            r"names begin with 'module\.module\.', a prefix that",
        ),
        (
            lambda t: {f"swinViT.{k}": v for k, v in t.items()},
            r"names begin with 'swinViT\.', a prefix that",
        ),
        (
            lambda t: {k if k.startswith("decoder1") else f"module.{k}": v for k, v in t.items()},
            r"decoder1\.\S+ stands outside the prefix 'module\.'",
        ),
        (lambda t: dict(list(t.items())[: len(t) // 2]), "missing"),
        (lambda t: {k: v for k, v in t.items() if "layers3" not in k}, "is missing"),
        (
            lambda t: {
                k: v for k, v in as_swinvit(t).items() if "layers3" not in k and "layers4" not in k
            },
            r"has stages of \(2, 2\) blocks, and such files have \(2, 2, 2, 2\)",
        ),
        (
            lambda t: {k: v for k, v in as_swinvit(t).items() if "layers3.0.blocks.1" not in k},
            r"stages of \(2, 2, 1, 2\)",
        ),
        (lambda t: {k: v.to("meta") for k, v in t.items()}, "has a shape and no values"),
        (lambda t: t | {"out.conv.conv.weight": torch.tensor(1.0)}, "its last layer is"),
        (
            lambda t: t | {"swinViT.patch_embed.proj.weight": torch.ones(12)},
            "its stem, or the position bias",
        ),
        (
            lambda t: (
                t
                | {
                    "swinViT.layers1.0.blocks.0.attn.relative_position_bias_table": torch.ones(
                        2197, 5
                    )
                }
            ),
            "heads",
        ),
        (
            lambda t: UNet(1, 2, feature_size=4, depths=(1, 1)).state_dict(),
            "no layout of a Swin UNETR",
        ),
        (lambda t: {}, "holds no tensors"),
        (lambda t: {"state_dict": {}}, "holds no tensors"),
        (lambda t: {"epoch": 3}, "holds no tensors"),
        (lambda t: list(t.values()), "holds a list"),
        (lambda t: {"state_dict": t, "make": subprocess.run}, r"holds \S+, which is code"),
        (
            lambda t: {"conv1.weight": torch.zeros(3)},
            "no layout of a Swin UNETR has tensors of such names as conv1.weight",
        ),
    ],
)
def test_what_is_not_whole_is_refused_in_one_line(
    spoil: Callable[[Tensors], Any], words: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "file.pt", spoil(monai_weights(SwinUNETR(1, 2, **SMALL))))
    with pytest.raises(InputError, match=words) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"these are no weights\n", b"PK\x03\x04 cut"])
def test_what_torch_has_not_saved_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(InputError, match="not a whole file"):
        read(tmp_path / "file.pt")


def test_a_damaged_checkpoint_of_ours_is_not_taken_for_a_file_of_others(tmp_path: Path) -> None:
    path, plan = tmp_path / "best.pt", {"method": "dae"}
    checkpoint.save(path, {"model": {"head.weight": torch.zeros(1)}, "plan": plan})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        read(path)
    torch.save({"format": 1, "plan": plan, "model": {"head.weight": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match="checksum"):
        read(path)


# --- the command


def weights_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dae.weights", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment())


def test_inspect_and_convert_answer_from_the_shell(tmp_path: Path) -> None:
    tensors = monai_weights(SwinUNETR(1, 2, **SMALL))
    saved(tmp_path / "theirs.pt", tensors)
    told = weights_command("inspect", "theirs.pt", cwd=tmp_path)
    assert told.returncode == 0
    assert (
        "MONAI's SwinUNETR" in told.stdout
        and "feature_size 12" in told.stdout
        and "1 -> 2 channels" in told.stdout
    )
    for to, source, out in (("dae", "theirs.pt", "ours.pt"), ("monai", "ours.pt", "back.pt")):
        assert (
            weights_command("convert", source, "--to", to, "--out", out, cwd=tmp_path).returncode
            == 0
        )
    assert checkpoint.load(tmp_path / "ours.pt")["plan"]["arguments"].items() >= MONAI.items()
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)


def test_a_spoilt_file_is_one_line_and_exit_code_2_for_the_command_and_for_training(
    tmp_path: Path,
) -> None:
    saved(tmp_path / "w.pt", renamed(monai_weights(SwinUNETR(1, 2, **SMALL))))
    train = [
        sys.executable,
        str(ROOT / "train_seg.py"),
        "--data",
        "list.json",
        "--pretrained",
        "w.pt",
        "--out",
        "run",
    ]
    for told in (
        weights_command("inspect", "w.pt", cwd=tmp_path),
        subprocess.run(train, capture_output=True, text=True, cwd=tmp_path, env=environment()),
    ):
        assert told.returncode == 2 and told.stdout == ""
        assert (
            len(told.stderr.splitlines()) == 1
            and "w.pt: looks like MONAI's SwinUNETR, but 1 tensors" in told.stderr
        )
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    "arguments, word",
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
    arguments: list[str], word: str, tmp_path: Path
) -> None:
    told = weights_command(*arguments, cwd=tmp_path)
    assert told.returncode == 2 and told.stdout == ""
    assert len(told.stderr.splitlines()) == 1 and word in told.stderr
    assert not list(tmp_path.iterdir())


def test_help_answers_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dae.weights", "convert", "--help"]
    begun = time.perf_counter()
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - begun < 1.5
    assert "--to" in told.stdout and "| torch" not in told.stderr


def test_a_converted_file_replaces_no_other(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.pt: is there already"):
        convert(tmp_path / "any.pt", ConvertConfig(out=str(tmp_path / "mine.pt")))
    assert (tmp_path / "mine.pt").read_text() == "mine"
