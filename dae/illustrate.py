"""The paper's pictures, of any volume.

python -m dae.illustrate pipeline          Figure 1: a crop, disrupted, masked, reconstructed
python -m dae.illustrate reconstructions   Figure 2: what several networks make of one crop
python -m dae.illustrate masking           Figure 3: local masking against token masking
python -m dae.illustrate segmentations     Figure 4: the truth and several predictions
python -m dae.illustrate disruptions       what sigma, epsilon and r of Tables 8 to 10 do

Without --image or --data it is a phantom. Add --help to a command for its flags.

The disruptions and masks are those of dae/pretext, by the seed of a sample as in training, so that
what is shown is what is trained.
"""

import sys
from typing import Any

from dae.config.command_line import from_command_line, run_or_explain
from dae.config.illustrate import CONFIGS
from dae.errors import InputError

PROG = "python -m dae.illustrate"


def read_command() -> tuple[str, Any]:
    """The picture and the flags of this process."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print((__doc__ or "").strip())
        sys.exit(0)
    if command not in CONFIGS:
        raise InputError(f"{command}: not a picture; take one of {', '.join(CONFIGS)}")
    config = from_command_line(
        CONFIGS[command], prog=f"{PROG} {command}", description=__doc__ or "", arguments=rest
    )
    return command, config


# The command line is read before torch is imported: --help, or a mistake, is answered at once.
if __name__ == "__main__":
    COMMAND, CONFIG = run_or_explain(read_command, PROG)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from dae import figures
from dae.config.command_line import value_if_set, was_set, with_tuples
from dae.config.illustrate import (
    CropConfig,
    DisruptionsConfig,
    MaskingConfig,
    PipelineConfig,
    ReconstructionsConfig,
    SegmentationsConfig,
)
from dae.config.pretrain import PretextConfig, PretrainConfig
from dae.config.shared import DataConfig, NetworkConfig
from dae.data import datalist, leaks
from dae.data.augment import corner_around, crop
from dae.data.cache import DTYPE
from dae.data.datalist import DataList, Item
from dae.data.listfile import Root
from dae.data.nifti import read_labels
from dae.data.preprocess import Recipe, by, prepare
from dae.demo.phantom import write_phantoms
from dae.evaluation import cases
from dae.evaluation.report import image_under
from dae.evaluation.statistics import spread
from dae.evaluation.written import Written
from dae.figures import (
    CaseShown,
    Display,
    Disruption,
    Picture,
    Reconstruction,
    Segmentation,
    Stages,
    Tokens,
)
from dae.model import arguments_of, backbone_named, check_backbone
from dae.pretext.methods import METHODS, Drawn, Pretext, coarse_alone, noise_alone, noise_and_coarse
from dae.training.resume import check_out_folder
from dae.weights import checkpoint
from dae.weights.plan import backbone_of, check_state

# Of the data, what must be one for all networks of a picture: else their L1 have other units.
RECIPE = ("spacing", "ct_window", "mr_intensity")

# --- the five pictures


def pipeline(config: PipelineConfig) -> Path:
    """Figure 1, of one crop: x, disrupted, as tokens, masked, and x_rec of a checkpoint."""
    written = picture_in(config.out, "pipeline.png")
    network = None
    if config.checkpoint:
        refuse_options(config)
        network = trained(config.checkpoint, config.backbone)
        config = replace(config, **recipe_of(config, [network]))

    x, display = crop_of(config)
    if network:
        pretext = network.pretext
        check_fits(network, x)
    else:
        pretext = pretext_of(untrained(config, x), config.method, options_of(config))
        display = of_untrained(display)
    stages = stages_of(pretext, x, config.seed, display, restore=network is not None)
    return written.write("pipeline.png", partial(figures.pipeline_sheet, stages=stages))


def reconstructions(config: ReconstructionsConfig) -> Path:
    """Figure 2: x_hat, x_rec and the error of several networks, of one crop."""
    if not config.checkpoint:
        raise InputError("--checkpoint: give the last.pt of one pre-training, or of several")
    written = picture_in(config.out, "reconstructions.png")
    names = names_of(config.names, config.checkpoint, "--checkpoint")
    networks = [trained(path, config.backbone) for path in config.checkpoint]
    config = replace(config, **recipe_of(config, networks))

    x, display = crop_of(config)
    columns = []
    for name, network in zip(names, networks):
        check_fits(network, x)
        columns.append(
            reconstruction_of(network.pretext, x, config.seed, f"{name}, {network.in_words}")
        )
    draw = partial(figures.reconstructions_sheet, display=display, x=as_picture(x), columns=columns)
    return written.write("reconstructions.png", draw)


def masking(config: MaskingConfig) -> Path:
    """Figure 3: the same share r of the channels, and of the tokens, of one crop."""
    written = picture_in(config.out, "masking.png")
    x, display = crop_of(config)
    backbone = untrained(config, x)
    tokens = backbone.tokenize(x)

    masked = []
    for method, title in (("local_mask", "local masking"), ("mae", "token masking (MAE)")):
        pretext = pretext_of(backbone, method, options_of(config))
        masked.append(masked_tokens(pretext, tokens, pretext.draw(x, [config.seed]), title))
    draw = partial(
        figures.masking_sheet,
        display=of_untrained(display),
        x=as_picture(x),
        tokens=as_picture(tokens),
        masked=masked,
    )
    return written.write("masking.png", draw)


def disruptions(config: DisruptionsConfig) -> Path:
    """What each strength of noise, downsampling and local masking does to one crop."""
    written = picture_in(config.out, "disruptions.png")
    x, display = crop_of(config)
    backbone = untrained(config, x)
    options = options_of(config)

    noise = pretext_of(backbone, "noise", options).draw(x, [config.seed]).noise
    assert noise is not None
    noisy = []
    for sigma in config.sigmas:
        x_hat = noise_alone(x, noise, replace(options, noise_std=sigma))
        noisy.append(Disruption(f"σ = {sigma:g}", as_picture(x_hat)))

    coarse = []
    for epsilon in config.epsilons:
        x_hat = coarse_alone(x, None, replace(options, downsample_factor=epsilon))
        coarse.append(Disruption(f"ε = {epsilon:g}", as_picture(x_hat)))

    tokens = backbone.tokenize(x)
    masked = []
    for ratio in config.ratios:
        pretext = pretext_of(backbone, "local_mask", replace(options, mask_ratio=(ratio,)))
        drawn = pretext.draw(x, [config.seed])
        masked.append(masked_tokens(pretext, tokens, drawn, f"r = {ratio:g}"))

    draw = partial(
        figures.disruption_sheet,
        display=of_untrained(display),
        x=as_picture(x),
        volumes={"noise, eq. 1": noisy, "downsampling, eq. 2": coarse},
        tokens=as_picture(tokens),
        masked=masked,
    )
    return written.write("disruptions.png", draw)


def segmentations(config: SegmentationsConfig) -> Path:
    """Figure 4: some cases in three planes, the truth beside what several folders hold."""
    written = picture_in(config.out, "segmentations.png")
    folders = [Path(name) for name in config.predictions]
    names = names_of(config.names, config.predictions, "--predictions")
    predicted = [cases.files_in(folder) for folder in folders]

    data = config.data or str(write_phantoms(phantoms_in(config.out)).ct_seg)
    # No intensity is read, so that a list that names no modality will do.
    items = datalist.load(data, root=config.data_root, modality="mr")
    classes = {label: name for label, name in items.labels.items() if label != 0}
    if not classes:
        raise InputError(f'{data}: "labels" names no class to draw')

    shown = []
    for case, item in chosen_cases(items, config, data, predicted).items():
        predictions = [(name, files[case]) for name, files in zip(names, predicted)]
        shown.append(case_shown(case, item, items, predictions))
    draw = partial(figures.segmentation_sheet, cases=shown, classes=classes)
    return written.write("segmentations.png", draw)


# --- what goes into a picture: the method on one crop


@torch.no_grad()
def stages_of(pretext: Pretext, x: Tensor, seed: int, display: Display, *, restore: bool) -> Stages:
    """A crop x (1, c, d, h, w) at each step of `Pretext.forward`; x_rec where `restore` says so."""
    options = pretext.options
    drawn = pretext.draw(x, [seed])
    x_hat = pretext.disrupt(x, drawn.noise, options)
    tokens = pretext.backbone.tokenize(pretext.normalise(x_hat))

    volumes = {"x": as_picture(x)}
    if drawn.noise is not None and pretext.disrupt is noise_and_coarse:
        noisy = noise_alone(x, drawn.noise, options)
        coarse = coarse_alone(x, None, options)
        volumes[f"noise alone, eq. 1\nσ = {options.noise_std:g}"] = as_picture(noisy)
        volumes[f"downsampling alone, eq. 2\nε = {options.downsample_factor:g}"] = as_picture(
            coarse
        )
    l1 = (x_hat - x).abs().mean()
    volumes[f"x_hat, what is tokenized\nL1(x_hat, x) {l1:.4f}"] = as_picture(x_hat)

    masked = None
    if drawn.mask is not None:
        masked = masked_tokens(pretext, tokens, drawn, "tokens given to the encoder")

    x_rec = None
    if restore:
        x_rec = as_picture(pretext(x, torch.zeros(1, dtype=torch.int64), drawn).x_rec)
    return Stages(display, volumes, as_picture(tokens), masked, as_picture(x), x_rec)


@torch.no_grad()
def masked_tokens(pretext: Pretext, tokens: Tensor, drawn: Drawn, title: str) -> Tokens:
    """The tokens (1, c, d, h, w) after the method's masking, and how many of what are masked."""
    assert drawn.mask is not None
    values = pretext.mask(tokens, drawn.mask, pretext.mask_token)
    mask = drawn.mask[0]

    # The axes along which the mask differs tell what it takes: channels, planes, tokens.
    channels, depth, *_ = mask.shape
    count = int(mask.sum())
    share = f"{mask.float().mean():.0%}"
    if mask.numel() == channels:
        what = f"{count} of {channels} channels are 0"
    elif mask.numel() == depth:
        what = f"{count} of {depth} planes are 0"
    elif channels == 1:
        what = f"{share} of tokens are the mask token"
    else:
        what = f"{share} of the channels of each token are 0"
    title += f"\n{what} (orange)"
    return Tokens(title, as_picture(values), mask.expand(tokens.shape[1:]).numpy())


@torch.no_grad()
def reconstruction_of(pretext: Pretext, x: Tensor, seed: int, name: str) -> Reconstruction:
    """What a network makes of a crop x (1, c, d, h, w)."""
    drawn = pretext.draw(x, [seed])
    output = pretext(x, torch.zeros(1, dtype=torch.int64), drawn)

    # Where whole tokens are masked, the network is not given x_hat but for the rest of them.
    hidden = None
    if drawn.mask is not None and drawn.mask.shape[1] == 1 and pretext.mask_token is not None:
        s = pretext.backbone.stride
        to_voxels = "1 1 d h w -> (d sd) (h sh) (w sw)"
        hidden = repeat(drawn.mask, to_voxels, sd=s, sh=s, sw=s).numpy()
    return Reconstruction(name, as_picture(output.x_hat), as_picture(output.x_rec), hidden)


def as_picture(x: Tensor) -> Picture:
    """(1, c, d, h, w) -> (c, d, h, w)."""
    picture: Picture = x.detach()[0].float().numpy()
    return picture


# --- the networks


class Network(NamedTuple):
    """What train_pretrain.py has trained."""

    path: str
    channels: int  # of its images
    pretext: Pretext
    config: PretrainConfig
    in_words: str


def trained(name: str, backbone_name: str) -> Network:
    """The network and the method of a checkpoint. Raises InputError where it is of another kind."""
    path = Path(name)
    saved = checkpoint.load(path)
    if "pretext" not in saved:
        raise InputError(
            f"--checkpoint {path}: not a checkpoint of train_pretrain.py, which reconstructs; "
            "give the last.pt of a pre-training"
        )
    check_state(saved, path)

    known = {field.name for field in fields(PretrainConfig)}
    values = {key: value for key, value in saved["config"].items() if key in known}
    config = PretrainConfig(**with_tuples(values))

    plan = saved["plan"]
    named = NetworkConfig(backbone=backbone_name or NetworkConfig().backbone)
    backbone = backbone_of(plan, named, path)
    network = backbone(plan["in_channels"], plan["out_channels"], **with_tuples(plan["arguments"]))

    # In this order: --recon residual starts from a head of zeros.
    pretext = pretext_of(network, config.method, config)
    checkpoint.load_weights(network, saved["model"], path)
    pretext.load_own_state(saved["pretext"])
    return Network(
        name, plan["in_channels"], pretext, config, f"{config.method} after {saved['step']} steps"
    )


def untrained(config: NetworkConfig, x: Tensor) -> Any:
    """A network of the flags for x (b, c, d, h, w), with weights as they are before the first step.

    Raises InputError where the flags contradict each other or the crop.
    """
    torch.manual_seed(getattr(config, "seed", 0))
    channels = x.shape[1]
    try:
        backbone = backbone_named(config.backbone)
        network: Any = backbone(channels, channels, **arguments_of(backbone, config))
        check_backbone(network, config.backbone, x.shape[2:])
    except ValueError as error:
        raise InputError(str(error)) from error
    return network.eval()


def pretext_of(backbone: Any, method: str, options: PretextConfig) -> Pretext:
    """A method on a network, as in evaluation.

    Raises InputError where it disrupts nothing, or where its options mean nothing.
    """
    if method not in METHODS:
        raise InputError(f"{method}: does not disrupt a volume; drawn are {', '.join(METHODS)}")
    try:
        return Pretext(backbone, method, options).eval()
    except ValueError as error:
        raise InputError(str(error)) from error


def of_untrained(display: Display) -> Display:
    """The same display, whose title says that the tokens are those of weights before training."""
    return display._replace(title=f"{display.title}\ntokens of a network before its first step")


def options_of(config: object) -> PretextConfig:
    """The options of pre-training that a picture has flags for; the others at their defaults."""
    names = [field.name for field in fields(PretextConfig) if hasattr(config, field.name)]
    return PretextConfig(**{name: getattr(config, name) for name in names})


def refuse_options(config: PipelineConfig) -> None:
    """Raises InputError where a flag contradicts the checkpoint, which has its own options."""
    for field in (*fields(PretextConfig), *fields(NetworkConfig)):
        if field.name != "backbone" and was_set(config, field.name):
            flag = field.name.replace("_", "-")
            raise InputError(f"--{flag}: not beside --checkpoint, which has its own; leave it out")


def check_fits(network: Network, x: Tensor) -> None:
    """Raises InputError where a trained network cannot be given this crop (1, c, d, h, w)."""
    if x.shape[1] != network.channels:
        raise InputError(
            f"--checkpoint {network.path}: of images of {network.channels} channels, "
            f"this one has {x.shape[1]}"
        )
    try:
        check_backbone(network.pretext.backbone, "of the checkpoint", x.shape[2:])
    except ValueError as error:
        raise InputError(f"--crop: {error}") from error


def recipe_of(config: CropConfig, networks: Sequence[Network]) -> dict[str, Any]:
    """Crop, spacing and intensities: those of the flags, else those that the networks agree on.

    Raises InputError where networks were fed differently: an L1 of 0.1 is then not the same error.
    """
    first = networks[0]
    recipe: dict[str, Any] = {"crop": value_if_set(config, "crop") or first.config.crop}
    for name in RECIPE:
        recipe[name] = getattr(first.config, name)
        if was_set(config, name):
            recipe[name] = getattr(config, name)
            continue
        for other in networks[1:]:
            value = getattr(other.config, name)
            if value != recipe[name]:
                raise InputError(
                    f"--checkpoint {other.path}: trained with {name} {value}, {first.path} with "
                    f"{recipe[name]}; --{name.replace('_', '-')} draws both with one"
                )
    return recipe


# --- the volume


def crop_of(config: CropConfig) -> tuple[Tensor, Display]:
    """The crop x (1, c, d, h, w), normalised as for the network, and how it is drawn.

    Raises InputError where there is no such image, or it cannot be used.
    """
    item = item_of(config)
    recipe = Recipe.of(
        DataConfig(
            spacing=config.spacing,
            ct_window=config.ct_window,
            mr_intensity=config.mr_intensity,
        )
    )
    volume = prepare(item, recipe)
    grid = volume.data.shape[1:]

    centre: Sequence[int] = config.centre
    if not centre:
        centre = np.median(volume.foreground, axis=0).astype(int).tolist()
    if len(centre) != 3 or any(voxel >= n for voxel, n in zip(centre, grid)):
        raise InputError(f"--centre: give three voxels along d h w, within {by(grid)}")
    corner = corner_around(centre, grid, config.crop)
    kept = volume.data.astype(DTYPE)  # as training reads it from its cache
    x = crop(kept, corner, config.crop, volume.background.tolist())

    if config.grey and (len(config.grey) != 2 or config.grey[0] >= config.grey[1]):
        raise InputError("--grey: give two values, that of black below that of white")
    low, high = config.grey or np.percentile(x[0], (1, 99)).tolist()
    mm = [round(size, 2) for size in volume.spacing]
    title = (
        f"{title_of(item)}, {item.modality_name}: crop of {by(config.crop)} voxels of {by(mm)} mm, "
        f"axial plane; black is {low:.2f}, white {high:.2f}"
    )
    return torch.from_numpy(x)[None], Display(title, (low, high), volume.spacing)


def item_of(config: CropConfig) -> Item:
    """The image of the flags: a file, one of a list, or a phantom. Raises InputError."""
    if config.image and config.data:
        raise InputError("--image: not beside --data; give one of them")
    if config.image and config.case:
        raise InputError("--case: not beside --image; it names an image of --data")
    if config.image:
        anywhere = Root(Path(), None)  # the user has named it
        head = datalist.head_of({}, Path("--image"), root=anywhere, modality=config.modality)
        return datalist.item_of({"image": list(config.image)}, "--image", head)

    data = config.data or str(write_phantoms(phantoms_in(config.out)).pretrain)
    items = datalist.load(data, root=config.data_root, modality=config.modality)
    named = by_name((*items.validation, *items.test, *items.training))
    case = config.case or next(iter(named))
    if case not in named:
        raise InputError(f"--case {case}: not in {data}; it has {', '.join(named)}")
    return named[case]


def by_name(items: Sequence[Item]) -> dict[str, Item]:
    """Items by the name that eval.py gives their case; one that is in two splits counts once."""
    by_image = {item.image[0]: item for item in reversed(items)}
    once = [item for item in items if by_image[item.image[0]] is item]
    return dict(zip(cases.case_names([item.image[0] for item in once]), once))


def title_of(item: Item) -> str:
    """The name of an image's file with its folder: many files are called image.nii.gz."""
    return "/".join(item.image[0].parts[-2:])


def phantoms_in(out: str) -> Path:
    return Path(out) / "phantoms"


def picture_in(out: str, name: str) -> Written:
    """The folder of the picture. Raises InputError where that would replace a file of another."""
    check_out_folder(Path(out), resume=True, may_replace=True)
    written = Written(Path(out))
    written.check([name])
    return written


# --- segmentations


def names_of(names: Sequence[str], paths: Sequence[str], flag: str) -> list[str]:
    """What to call each run: --names, else the folder of its file or of its predictions; that
    folder's own name as well where two would have one.

    Raises InputError where there are not as many names as runs.
    """
    if names and len(names) != len(paths):
        raise InputError(f"--names: {len(names)} for {len(paths)} of {flag}; give one for each")
    if names:
        return list(names)
    found = [Path(path).absolute().parent.name for path in paths]
    if len(set(found)) == len(found):
        return found
    return ["/".join(Path(path).absolute().parts[-2:]) for path in paths]


def chosen_cases(
    items: DataList,
    config: SegmentationsConfig,
    data: str,
    predicted: Sequence[Mapping[str, Path]],
) -> dict[str, Item]:
    """--case, or the first two that have a label and are in every folder. Raises InputError."""
    drawable = {}
    for case, item in by_name((*items.test, *items.validation, *items.training)).items():
        if item.label and all(case in files for files in predicted):
            drawable[case] = item

    names = config.case or list(drawable)[:2]
    for name in names:
        if name not in drawable:
            raise InputError(f"--case {name}: without a label in {data}, or without a prediction")
    if not names:
        raise InputError(f"--predictions: no case of {data} with a label is in every folder")
    return {name: drawable[name] for name in names}


def case_shown(
    case: str, item: Item, items: DataList, predictions: Sequence[tuple[str, Path]]
) -> CaseShown:
    """A case with its predictions, and the mean Dice of each over the classes."""
    assert item.label is not None
    truth = read_labels(item.label)
    image = image_under(item.image[0], truth)
    classes = {label: name for label, name in items.labels.items() if label != 0}

    shown = []
    for name, file in predictions:
        both = cases.read_case(file, item.label, classes, ignore=items.ignore)
        rows = cases.rows_of(
            both,
            item.label,
            classes,
            tolerance=1.0,
            definition="default",
            regions=items.regions,
        )
        dice = spread([row["dice"] for row in rows])["mean"]
        trained_on = case in leaks.read_predicted(file.parent).get("trained", ())
        label = f"{name} (trained on it)" if trained_on else name
        shown.append(Segmentation(label, both.prediction * both.annotated, dice))
    annotated = truth.labels * (truth.labels != items.ignore)
    return CaseShown(title_of(item), image, annotated, shown, truth.spacing)


COMMANDS: dict[str, Callable[[Any], Path]] = {
    "pipeline": pipeline,
    "reconstructions": reconstructions,
    "masking": masking,
    "segmentations": segmentations,
    "disruptions": disruptions,
}

if __name__ == "__main__":
    print(run_or_explain(lambda: COMMANDS[COMMAND](CONFIG), f"{PROG} {COMMAND}"))
