"""dae/illustrate.py: a picture shows the tensors of the method, on one plane and one scale."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from torch import Tensor

from dae import figures, illustrate
from dae.config.command_line import parse
from dae.config.illustrate import (
    CONFIGS,
    CropConfig,
    DisruptionsConfig,
    MaskingConfig,
    PipelineConfig,
    ReconstructionsConfig,
    SegmentationsConfig,
)
from dae.config.pretrain import PretextConfig, PretrainConfig
from dae.data import datalist
from dae.figures import Display, Tokens, montage
from dae.pretext.methods import METHODS, Pretext
from dae.weights import checkpoint
from tests.conftest import NETWORK, ROOT, refusal
from train_pretrain import main

pytestmark = pytest.mark.filterwarnings("error")

DISPLAY = Display("a crop", (0.0, 1.0))
SMALL: dict[str, Any] = {"crop": (16, 16, 16), **NETWORK}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are made."""
    made: list[Any] = []
    new_figure = figures.new_figure

    def remembered(*size: float, **options: Any) -> Any:
        made.append(new_figure(*size, **options))
        return made[-1]

    monkeypatch.setattr(figures, "new_figure", remembered)
    return made


def network(method: str = "dae", **options: Any) -> Pretext:
    torch.manual_seed(0)
    config = PretrainConfig(method=method, **SMALL, **options)
    x = torch.zeros(1, 1, *config.crop)
    return illustrate.pretext_of(illustrate.untrained(config, x), method, config)


def a_crop() -> Tensor:
    return torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(3))


def titles(figure: Any) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def arrays(ax: Any) -> list[Any]:
    return [image.get_array() for image in ax.images]


# --- Figure 1


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()  # as the figure is drawn: the norm then has another kernel than in training
def test_the_tokens_that_are_shown_are_those_that_forward_reconstructs_from(method: str) -> None:
    pretext = network(method, recon="output")
    x = a_crop()
    stages = illustrate.stages_of(pretext, x, 7, DISPLAY, restore=True)
    drawn = pretext.draw(x, [7])
    output = pretext(x, torch.zeros(1, dtype=torch.int64), drawn)

    shown = stages.masked.values if stages.masked else stages.tokens
    x_hat = torch.from_numpy(list(stages.volumes.values())[-1])[None]
    skip = torch.zeros_like(x_hat) if pretext.skip_is_zero else x_hat
    states = pretext.backbone.encode(torch.from_numpy(shown)[None])
    by_hand = pretext.restore(pretext.backbone.decode(states, skip), x_hat)
    assert torch.equal(x_hat, output.x_hat)
    assert torch.equal(by_hand, output.x_rec)
    assert stages.x_rec is not None and torch.equal(torch.from_numpy(stages.x_rec), by_hand[0])


def test_noise_and_downsampling_are_shown_alone_and_in_their_order() -> None:
    x = a_crop()
    stages = illustrate.stages_of(network(), x, 7, DISPLAY, restore=False)
    shown, noisy, coarse, x_hat = (torch.from_numpy(v)[None] for v in stages.volumes.values())

    noise = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(7))
    resize = torch.nn.functional.interpolate
    by_hand = resize(resize(noisy, (4, 4, 4), mode="trilinear"), (16, 16, 16), mode="trilinear")
    assert torch.equal(shown, x)
    assert torch.allclose(noisy, x + 0.1 * noise)
    assert torch.allclose(x_hat, by_hand)
    assert not torch.allclose(coarse, x_hat)
    assert stages.x_rec is None


@pytest.mark.parametrize("method", ["dae", "noise", "mae"])
def test_figure_1_has_a_panel_for_each_thing_that_the_method_does(
    tmp_path: Path, drawn: list[Any], method: str
) -> None:
    x = a_crop()
    for restore in (False, True):
        stages = illustrate.stages_of(network(method), x, 0, DISPLAY, restore=restore)
        figures.pipeline_sheet(tmp_path / "sheet.png", stages)
    without, with_x_rec = ([t.split("\n")[0] for t in titles(figure)] for figure in drawn)

    volumes = ["x", "x_hat, what is tokenized"]
    if method == "dae":
        volumes[1:1] = ["noise alone, eq. 1", "downsampling alone, eq. 2"]
    tokens = ["tokens of x_hat:"]
    if method != "noise":
        tokens.append("tokens given to the encoder")
    assert without == volumes + tokens
    assert with_x_rec[:-1] == [*volumes, *tokens, "x_rec"]
    assert with_x_rec[-1].startswith("|x_rec - x|")

    *_, x_rec, error = drawn[1].axes
    (value,) = (float(word) for word in x_rec.get_title().split()[-1:])
    assert value == pytest.approx(np.abs(stages.x_rec - x[0].numpy()).mean(), abs=1e-4)
    expected = figures.plane(np.abs(stages.x_rec - x[0].numpy())[0], axis=2, index=8)
    assert np.array_equal(arrays(error)[0], expected)


# --- Figure 3


def test_local_masking_takes_whole_channels_and_mae_whole_tokens() -> None:
    x = a_crop()
    options = {"mask_ratio": (0.5,), "mask_block": 4}
    local, mae = network("local_mask", **options), network("mae", **options)
    tokens = local.backbone.tokenize(x)
    channels = illustrate.masked_tokens(local, tokens, local.draw(x, [0]), "local")
    blocks = illustrate.masked_tokens(mae, tokens, mae.draw(x, [0]), "mae")

    assert channels.title == "local\n4 of 8 channels are 0 (orange)"
    assert blocks.title == "mae\n50% of tokens are the mask token (orange)"
    before = tokens[0].detach().numpy()
    assert mae.mask_token is not None
    replaced = {
        "local": np.zeros_like(before),
        "mae": np.broadcast_to(mae.mask_token.detach().numpy()[:, None, None, None], before.shape),
    }
    for panel, name in ((channels, "local"), (blocks, "mae")):
        assert np.array_equal(panel.values[panel.mask], replaced[name][panel.mask])
        assert np.array_equal(panel.values[~panel.mask], before[~panel.mask])
    assert {float(channel.mean()) for channel in channels.mask} == {0.0, 1.0}
    assert (blocks.mask == blocks.mask[:1]).all() and blocks.mask.mean() == 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mask_along": "planes"}, "5 of 8 planes are 0"),
        ({"mask_scope": "token"}, "62% of the channels of each token are 0"),
    ],
)
def test_what_is_masked_is_said_in_words(options: dict[str, Any], words: str) -> None:
    pretext = network("local_mask", **options)
    x = a_crop()
    panel = illustrate.masked_tokens(
        pretext, pretext.backbone.tokenize(x), pretext.draw(x, [0]), "local"
    )
    assert panel.title == f"local\n{words} (orange)"


def test_the_line_of_tokens_runs_as_the_picture_beside_it(tmp_path: Path, drawn: list[Any]) -> None:
    """The first token along d is drawn last, since `plane` turns an axial plane."""
    x = np.zeros((1, 8, 8, 8), np.float32)
    tokens = np.zeros((3, 4, 4, 4), np.float32)
    tokens[:, 0, 2, 2] = 1.0  # on the line through the middle
    tokens[:, 1, 0, 2] = 1.0  # beside it
    mask = np.zeros(tokens.shape, bool)
    mask[1] = True
    figures.masking_sheet(
        tmp_path / "m.png",
        display=DISPLAY,
        x=x,
        tokens=tokens,
        masked=[Tokens("masked", tokens, mask)],
    )

    before, after = drawn[0].axes[1], drawn[0].axes[3]
    (line,) = arrays(before)
    assert line.shape == (3, 4)
    assert (line[:, 3] > line[:, 0]).all() and (line[:, :3] == line[0, 0]).all()
    (masked,) = arrays(after)
    assert np.ma.getmaskarray(masked).all(axis=1).tolist() == [False, True, False]
    (box,) = drawn[0].axes[0].patches
    assert (box.get_y(), box.get_height()) == (3.5, 2)


@pytest.mark.parametrize("width", [5.8, 20.0])
def test_a_title_is_no_wider_than_its_figure(width: float) -> None:
    figure = figures.new_figure(width, 3)
    figures.entitle(figure, "phantoms/ct_003.nii.gz, ct: crop of 48 x 48 x 48 voxels, " * 3)
    title = figure.texts[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert 0.5 * width < title.width / figure.dpi < width


def test_tiles_are_in_reading_order_with_white_between_them() -> None:
    planes = [np.full((2, 3), n / 10) for n in range(5)]
    sheet = montage(planes)
    assert sheet.shape == (2 * 2 + figures.GAP, 3 * 3 + 2 * figures.GAP)
    top, bottom = sheet[-2:], sheet[:2]
    assert [top[0, 5 * n] for n in range(3)] == [0.0, 0.1, 0.2]
    assert [bottom[0, 5 * n] for n in range(3)] == [0.3, 0.4, 1.0]
    assert (sheet[2:4] == 1).all() and (sheet[:, 3:5] == 1).all()
    assert montage(planes, wide=5.0).shape[0] == 2


# --- Tables 8 to 10


def test_each_strength_has_its_own_picture_and_l1(
    pretrained: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    config = DisruptionsConfig(
        data=str(pretrained / "phantoms/pretrain.json"), out=str(tmp_path), **SMALL
    )
    illustrate.disruptions(config)
    x = illustrate.crop_of(config)[0][0].numpy()

    axes = np.array(drawn[0].axes).reshape(3, 4)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    for ax, sigma in zip(axes[0, 1:], (0.05, 0.1, 0.2)):
        expected = x + np.float32(sigma) * noise
        assert np.allclose(arrays(ax)[0], figures.plane(expected[0], axis=2, index=8))
        assert ax.get_title() == f"σ = {sigma:g}\nL1(x_hat, x) {np.abs(expected - x).mean():.4f}"
    assert [t.split("\n")[0] for t in titles(drawn[0])[5:8]] == ["ε = 2", "ε = 4", "ε = 8"]
    masked = [np.ma.getmaskarray(arrays(ax)[0]) for ax in axes[2]]
    assert [mask.sum() // 64 for mask in masked] == [0, 3, 5, 6]  # tiles of 8 x 8 tokens
    assert (masked[1] <= masked[2]).all()  # the same channels first
    scales = {image.get_clim() for ax in axes[:2].flat for image in ax.images}
    assert len(scales) == 1


# --- Figure 2


def another_of(pretrained: Path, name: str, **flags: Any) -> Path:
    """A checkpoint of other flags beside that of `pretrained`."""
    out = pretrained / name
    main(
        PretrainConfig(
            data=str(pretrained / "phantoms/pretrain.json"),
            out=str(out),
            cache_dir=str(pretrained / "cache"),
            **SMALL,
            **flags,
            workers=0,
            device="cpu",
            amp="off",
            validate_crops=1,
        )
    )
    return out / "last.pt"


@pytest.fixture(scope="module")
def mae(pretrained: Path) -> Path:
    """A checkpoint of masked image modelling beside that of `pretrained`."""
    return another_of(pretrained, "mae", method="mae", mask_block=4, steps=1)


@pytest.mark.parametrize("recon", ["plain", "residual"])
def test_a_picture_is_made_with_the_weights_of_the_checkpoint(pretrained: Path, recon: Any) -> None:
    """A residual network begins with a head of zeros: the picture needs the one it has learned."""
    path = another_of(pretrained, f"of_{recon}", recon=recon, steps=2)
    saved = checkpoint.load(path)["model"]
    drawn = illustrate.trained(str(path), "").pretext.backbone.state_dict()
    assert drawn.keys() == saved.keys()
    assert all(torch.equal(drawn[name], saved[name]) for name in saved)
    assert any(saved[name].any() for name in saved if name.startswith("head."))


@torch.no_grad()
def test_a_column_is_what_the_checkpoint_makes_of_the_crop(
    pretrained: Path, mae: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    config = ReconstructionsConfig(
        data=str(pretrained / "phantoms/pretrain.json"),
        checkpoint=(str(pretrained / "pre/last.pt"), str(mae)),
        out=str(tmp_path),
    )
    illustrate.reconstructions(config)
    x, _ = illustrate.crop_of(replace(config, crop=(16, 16, 16)))
    axes = np.array(drawn[0].axes).reshape(3, 3)

    for column, path in enumerate(config.checkpoint, start=1):
        pretext = illustrate.trained(path, "").pretext
        output = pretext(x, torch.zeros(1, dtype=torch.int64), pretext.draw(x, [0]))
        for row, expected in enumerate((output.x_hat, output.x_rec, (output.x_rec - x).abs())):
            volume = expected[0, 0].detach().numpy()
            shown = arrays(axes[row, column])[0]
            assert np.array_equal(shown, figures.plane(volume, axis=2, index=8))
        l1 = float((output.x_rec - x).detach().abs().mean())
        assert axes[1, column].get_title() == f"x_rec   L1(x_rec, x) {l1:.4f}"

    assert axes[0, 1].get_title().startswith("pre, dae after 2 steps\nx_hat   L1(x_hat, x)")
    assert axes[0, 2].get_title().startswith("mae, mae after 1 steps\nx_hat is x")
    hidden = arrays(axes[0, 2])[1]
    mask = pretext.draw(x, [0]).mask
    assert mask is not None
    in_voxels = np.kron(mask[0, 0].numpy(), np.ones((2, 2, 2), bool))
    covered = ~np.ma.getmaskarray(hidden)
    assert np.array_equal(covered, figures.plane(in_voxels, axis=2, index=8))


def test_networks_that_were_fed_differently_are_not_compared_unless_a_flag_decides(
    pretrained: Path, mae: Path, tmp_path: Path
) -> None:
    first = illustrate.trained(str(mae), "")
    other = first._replace(path="other.pt", config=replace(first.config, ct_window=(-175.0, 250.0)))
    config = ReconstructionsConfig(data="list.json")
    line = refusal(illustrate.recipe_of, config, [first, other])
    assert "other.pt" in line and "--ct-window" in line
    forced = replace(config, ct_window=(-100.0, 100.0))
    assert illustrate.recipe_of(forced, [first, other])["ct_window"] == (-100.0, 100.0)
    assert illustrate.recipe_of(config, [first, first])["crop"] == (16, 16, 16)

    # A flag that is given counts, even where it is the default.
    line = ["--crop", "96", "96", "96"]
    asked = parse(ReconstructionsConfig, line, prog="", description="")
    assert illustrate.recipe_of(asked, [first, first])["crop"] == (96, 96, 96)


# --- Figure 4


@pytest.fixture
def predictions(pretrained: Path, tmp_path: Path) -> Path:
    """Two folders of predictions: the truth, and the truth moved by two voxels."""
    content = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    for item in (*content["test"], *content["validation"]):
        label = nib.load(pretrained / "phantoms" / item["label"])
        for name, shift in (("right", 0), ("moved", 2)):
            values = np.roll(np.asarray(label.dataobj), shift, axis=0)
            path = tmp_path / name / "predictions" / Path(item["image"]).name
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, label.affine), path)
    return tmp_path


def test_truth_and_predictions_are_on_one_plane_with_the_dice_of_the_case(
    pretrained: Path, predictions: Path, drawn: list[Any]
) -> None:
    config = SegmentationsConfig(
        data=str(pretrained / "phantoms/ct_seg.json"),
        predictions=(f"{predictions}/right/predictions", f"{predictions}/moved/predictions"),
        names=("all right", "moved"),
        out=str(predictions / "out"),
    )
    illustrate.segmentations(config)
    content = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    label = nib.load(pretrained / "phantoms" / content["test"][0]["label"])
    truth = np.asarray(label.dataobj)
    moved = np.roll(truth, 2, axis=0)

    by_class = []
    for value in range(1, truth.max() + 1):
        a, b = truth == value, moved == value
        if (a | b).any():
            by_class.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    axes = np.array(drawn[0].axes[:9]).reshape(3, 3)
    assert [ax.get_title() for ax in axes[0]] == [
        "truth",
        "all right\nDice 1.000",
        f"moved\nDice {np.mean(by_class):.3f}",
    ]

    most = [int((truth > 0).sum(axis=tuple({0, 1, 2} - {axis})).max()) for axis in (2, 1, 0)]
    for row, voxels in zip(axes, most):
        labels = [arrays(ax)[1] for ax in row]
        assert labels[0].count() == voxels  # the plane with the most labelled voxels
        assert np.ma.allequal(labels[0], labels[1]) and not np.ma.allequal(labels[0], labels[2])
        assert not row[0].collections and row[1].collections  # the truth as a line over both
        assert len({ax.images[1].get_clim() for ax in row}) == 1
    assert len(drawn[0].axes) == 18  # two cases


def test_the_truth_alone_is_drawn_without_predictions(
    pretrained: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    shutil.copytree(pretrained / "phantoms", tmp_path / "data")
    config = SegmentationsConfig(data=str(tmp_path / "data/ct_seg.json"), out=str(tmp_path / "o"))
    illustrate.segmentations(config)
    assert len(drawn[0].axes) == 6


def test_a_case_that_the_network_was_trained_on_is_named_as_one(
    pretrained: Path, predictions: Path, drawn: list[Any]
) -> None:
    folder = predictions / "right/predictions"
    content = json.loads((pretrained / "phantoms/ct_seg.json").read_text())
    case = Path(content["test"][0]["image"]).name.removesuffix(".nii.gz")
    (folder / "predicted.json").write_text(json.dumps({"trained": [case]}))
    config = SegmentationsConfig(
        data=str(pretrained / "phantoms/ct_seg.json"),
        predictions=(str(folder),),
        case=(case,),
        out=str(predictions / "out"),
    )
    illustrate.segmentations(config)
    assert "right (trained on it)\nDice 1.000" in titles(drawn[0])


# --- the command


CALLS: dict[str, Callable[[Path], Any]] = {
    "pipeline": lambda folder: PipelineConfig(
        data=str(folder / "phantoms/pretrain.json"), checkpoint=str(folder / "pre/last.pt")
    ),
    "reconstructions": lambda folder: ReconstructionsConfig(
        data=str(folder / "phantoms/pretrain.json"), checkpoint=(str(folder / "pre/last.pt"),)
    ),
    "masking": lambda folder: MaskingConfig(
        image=(str(folder / "phantoms/ct_000.nii.gz"),), modality="CT", mask_block=4, **SMALL
    ),
    "segmentations": lambda folder: SegmentationsConfig(data=str(folder / "phantoms/ct_seg.json")),
    "disruptions": lambda folder: DisruptionsConfig(
        data=str(folder / "phantoms/pretrain.json"), **SMALL
    ),
}


@pytest.mark.parametrize("picture", CONFIGS)
def test_each_command_writes_a_picture_that_can_be_seen(
    pretrained: Path, tmp_path: Path, picture: str
) -> None:
    config = replace(CALLS[picture](pretrained), out=str(tmp_path / "out"))
    path = illustrate.COMMANDS[picture](config)
    assert path == tmp_path / "out" / f"{picture}.png"
    pixels = np.asarray(imread(path))
    height, width, _ = pixels.shape
    assert 400 < width < 2500 and 400 < height < 2500
    assert pixels[..., :3].std() > 0.05
    assert (pixels[2, 2, :3] == 1).all()  # on a light ground

    again = illustrate.COMMANDS[picture](config)  # its own picture may be replaced
    path.write_bytes(b"another's")
    assert "was changed" in refusal(illustrate.COMMANDS[picture], config)
    assert again.read_bytes() == b"another's"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": "x.json", "image": ("a.nii",)}, "--image: not beside --data"),
        ({"image": ("a.nii",)}, "--modality"),
        ({"case": "nobody"}, "--case nobody: not in"),
        ({"centre": (1, 2)}, "--centre: give three"),
        ({"centre": (1, 2, 99)}, "--centre: give three"),
        ({"grey": (1.0,)}, "--grey: give two"),
        ({"grey": (1.0, 0.0)}, "--grey: give two values, that of black below"),
        ({"image": ("a.nii",), "case": "a"}, "--case: not beside --image"),
        ({"crop": (15, 16, 16)}, "does not fit the network"),
        ({"method": "nothing"}, "nothing: does not disrupt"),
        ({"temperature": 90.0}, "--temperature"),
        ({"checkpoint": "CHECKPOINT", "mask_ratio": (0.2,)}, "--mask-ratio: not beside"),
        ({"checkpoint": "CHECKPOINT", "crop": (15, 16, 16)}, "--crop: size 15"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    pretrained: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    small = {} if "checkpoint" in change else SMALL
    given = {**small, **change}
    if "image" not in change:
        given["data"] = str(pretrained / "phantoms/pretrain.json")
    if given.get("checkpoint") == "CHECKPOINT":
        given["checkpoint"] = str(pretrained / "pre/last.pt")
    config = PipelineConfig(out=str(tmp_path / "out"), **given)
    assert words in refusal(illustrate.pipeline, config)
    assert not (tmp_path / "out").exists()


def test_without_data_it_is_a_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def small_phantoms(folder: Path) -> Any:
        asked.append(folder)
        return illustrate_phantoms(folder, subjects=1, size=(24, 24, 24))

    illustrate_phantoms = illustrate.write_phantoms
    monkeypatch.setattr(illustrate, "write_phantoms", small_phantoms)
    x, display = illustrate.crop_of(CropConfig(out=str(tmp_path), crop=(16, 16, 16)))
    assert asked == [tmp_path / "phantoms"]
    assert x.shape == (1, 1, 16, 16, 16)
    assert "phantoms/" in display.title and "16 x 16 x 16" in display.title


def test_a_crop_is_what_training_reads(pretrained: Path) -> None:
    """The values are those of the cache, which has half precision."""
    config = CropConfig(
        image=(str(pretrained / "phantoms/ct_000.nii.gz"),),
        modality="ct",
        crop=(8, 8, 8),
        centre=(12, 14, 16),
    )
    x, _ = illustrate.crop_of(config)
    hu = nib.as_closest_canonical(nib.load(config.image[0])).get_fdata()[8:16, 10:18, 12:20]
    expected = np.clip((hu + 1000) / 2000, 0, 1).astype(np.float16)
    assert np.array_equal(x[0, 0].numpy(), expected.astype(np.float32))


def test_a_checkpoint_of_fine_tuning_is_refused_by_name(tmp_path: Path) -> None:
    from dae.weights import checkpoint

    checkpoint.save(tmp_path / "seg.pt", {"model": {}, "plan": {}})
    assert "not a checkpoint of train_pretrain.py" in refusal(
        illustrate.trained, str(tmp_path / "seg.pt"), ""
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"case": ("nobody",)}, "--case nobody: without a label"),
        ({"predictions": ("nowhere",)}, "nowhere: no such folder"),
        ({"names": ("a", "b")}, "--names: 2 for 0"),
        ({"data": "pretrain.json"}, "names no class"),
    ],
)
def test_segmentations_that_cannot_be_drawn_are_refused_in_one_line(
    pretrained: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = pretrained / "phantoms" / change.get("data", "ct_seg.json")
    config = SegmentationsConfig(out=str(tmp_path / "out"), **{**change, "data": str(data)})
    assert words in refusal(illustrate.segmentations, config)
    assert not (tmp_path / "out").exists()


def test_two_folders_beside_each_other_are_two_columns(
    pretrained: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    data = pretrained / "phantoms/ct_seg.json"
    for name in ("first", "second"):
        (tmp_path / "run" / name).mkdir(parents=True)
        for case in illustrate.by_name(datalist.load(str(data), modality="mr").test).values():
            assert case.label is not None
            shutil.copy(case.label, tmp_path / "run" / name / case.image[0].name)
    folders = (str(tmp_path / "run/first"), str(tmp_path / "run/second"))
    config = SegmentationsConfig(data=str(data), predictions=folders, out=str(tmp_path / "out"))
    illustrate.segmentations(config)
    illustrate.segmentations(replace(config, names=("alike", "alike")))
    shown = [[t for t in titles(figure) if "Dice" in t] for figure in drawn]
    assert {t.split("\n")[0] for t in shown[0]} == {"run/first", "run/second"}
    assert len(shown[1]) == len(shown[0])


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--help"], 0, "Figure 3"),
        (["figure7"], 2, "figure7: not a picture"),
        (["masking", "--mask-ratio", "2"], 2, "--mask-ratio 2"),
    ],
)
def test_the_command_line_answers_at_once(arguments: list[str], code: int, words: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "dae.illustrate", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == code
    assert words in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


def test_a_picture_has_the_flags_of_pre_training_under_their_names() -> None:
    options = illustrate.options_of(MaskingConfig(mask_ratio=(0.3,), mask_block=8))
    assert options == PretextConfig(mask_ratio=(0.3,), mask_block=8)
    default = PretextConfig()
    for config in (MaskingConfig(), DisruptionsConfig(), PipelineConfig()):
        assert illustrate.options_of(config) == default


def test_the_crop_is_around_the_foreground_unless_a_voxel_is_named(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(1, 1.1, (30, 30, 30)).astype(np.float32)
    values[20:26, 4:10, 14:20] += 50  # the only bright voxels: their middle is 22 or 23, 6, 16
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    config = CropConfig(image=(str(tmp_path / "a.nii"),), modality="t1", crop=(6, 6, 6))

    found, _ = illustrate.crop_of(config)
    elsewhere, _ = illustrate.crop_of(replace(config, centre=(5, 20, 5)))
    assert (found > 0).float().mean() > 0.5
    assert (elsewhere < 0).all()
