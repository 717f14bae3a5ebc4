"""Predict, score, tune and compare segmentations, put folds together, and look at features.

python eval.py predict --checkpoint runs/seg/best.pt --data list.json --split test --out predictions
python eval.py predict --checkpoint fold*/best.pt --images scan.nii folder --tta --out predictions
python eval.py score   --predictions predictions --data list.json --split test --out scores
python eval.py tune    --predictions predictions --data list.json --split validation --out plan
python eval.py compare scores_a scores_b --out comparison
python eval.py folds   fold*/scores --out folds
python eval.py cka     runs/pre/last.pt runs/seg/last.pt --data list.json --out cka
python eval.py embed   --checkpoint runs/pre/last.pt --data list.json --out features

Each command has its own --help.
"""

import sys
from collections.abc import Sequence

import dae.quiet  # noqa: F401 - before torch
from dae.config.command_line import from_command_line, is_out_of_memory, run_or_explain
from dae.config.evaluate import (
    CkaConfig,
    CompareConfig,
    EmbedConfig,
    FoldsConfig,
    PredictConfig,
    ScoreConfig,
    TuneConfig,
)
from dae.errors import InputError, counted, one_line

CONFIGS = {
    "predict": PredictConfig,
    "score": ScoreConfig,
    "tune": TuneConfig,
    "compare": CompareConfig,
    "folds": FoldsConfig,
    "cka": CkaConfig,
    "embed": EmbedConfig,
}
# Flags whose names may be left out: `compare a b` is `compare --a a --b b`.
POSITIONAL = {
    "compare": ("--a", "--b"),
    "folds": ("--scores",),
    "cka": ("--before", "--after"),
}


def read_command() -> tuple[str, object]:
    """The command and its configuration, from this process's arguments."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)

    command = arguments[0]
    if command not in CONFIGS:
        raise InputError(f"{command}: not a command; take one of {', '.join(CONFIGS)}")
    config: object = from_command_line(
        CONFIGS[command],
        prog=f"eval.py {command}",
        description=__doc__,
        arguments=with_names(arguments[1:], POSITIONAL.get(command, ())),
    )
    return command, config


def with_names(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments, with the name of a flag before each of the first ones that have none."""
    named = list(arguments)
    for n, name in enumerate(names):
        position = 2 * n  # after the names and values of the flags before
        if position < len(named) and not named[position].startswith("-"):
            named.insert(position, name)
    return named


# The command line is read before torch is imported: --help and mistakes need not wait for it.
if __name__ == "__main__":
    COMMAND, CONFIG = run_or_explain(read_command, "eval.py")

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dae.config.evaluate import NEEDS_LESS, CasesConfig, FeaturesConfig, TruthsConfig
from dae.data import datalist, holdout, leaks
from dae.data.cache import Cached, default_folder, prepare_all
from dae.data.datalist import DataList, Item
from dae.data.nifti import Volume, read_channels
from dae.data.preprocess import Prepared, Recipe, normalise
from dae.data.regions import Region, from_plan, mirrored, numbered
from dae.data.sides import AXES, flips_of, likely_pairs, pairs_in_words
from dae.evaluation import cases, features, postprocess, report, statistics
from dae.evaluation.ahead import one_ahead
from dae.evaluation.cka import as_markdown, cka_of_stages
from dae.evaluation.metrics import Labels
from dae.evaluation.native_grid import label_map, paste, save_like
from dae.evaluation.windows import Predict, decide_by, sliding_window
from dae.evaluation.written import Written, check_apart, sha256_of
from dae.figures import cka_chart, embedding_chart
from dae.training import resume
from dae.training.distributed import (
    PREDICTING,
    Ranks,
    gather_objects,
    in_one_voice,
    joined,
    share,
    spoken_by_main,
    start,
)
from dae.training.kernels import choose_kernels, lay_out
from dae.training.precision import autocast, autocast_type
from dae.weights import checkpoint, foreign
from dae.weights.plan import about_intensities, load_planned, network_of_plan

# --- the commands


def predict(config: PredictConfig) -> list[Path]:
    """One label map for each image, on the image's own grid, as <case>.nii.gz. Returns their paths.

    Cases that are in --out already, of the same checkpoints, settings and images, are not predicted
    again. A case that cannot be predicted does not keep the others from it: InputError at the end
    names all such cases. Where torchrun has started several ranks, they share the cases, and rank 0
    speaks and returns for all of them.
    """
    with joined(config.device, patience=PREDICTING) as ranks, spoken_by_main(ranks):
        # All ranks look at the folder before any of them writes into it.
        job = in_one_voice(ranks, partial(plan_prediction, config, ranks))
        return carry_out(job, ranks)


def score(config: ScoreConfig) -> dict[str, Any]:
    """scores.csv, summary.json, figures/ and report.html: predictions against labels, each pair on
    the label's own grid. Returns the summary.
    """
    written = Written(output_folder(config))
    truths = truths_of(config)
    # Before hours of scoring: results can be written, and replace nothing that is read.
    inputs = [Path(config.data), *truths.images.values()]
    for pair in truths.pairs:
        inputs += [pair.prediction, pair.label]
    written.check(("scores.csv", "summary.json", "report.html", "figures/distribution.png"), inputs)

    tolerance = tolerance_by_class(config, truths)
    rows, diagonals, labels = cases.score(
        truths.pairs,
        truths.classes,
        tolerance=tolerance,
        definition=config.definition,
        ignore=truths.ignore,
        regions=truths.regions,
    )
    summary = statistics.summarise(
        rows,
        policy=config.policy,
        diagonals=diagonals,
        tolerance=tolerance,
        definition=config.definition,
        ignore=truths.ignore,
    )
    summary["labels"] = labels
    if truths.regions:
        summary["regions"] = {region.name: list(region.labels) for region in truths.regions}
    pictures = report.figures(
        rows,
        truths.pairs,
        images=truths.images,
        ignore=truths.ignore,
        drawn=list(truths.classes),
    )

    # Which cases are the worst, and have a picture, is known only now.
    written.check(f"figures/{name}.png" for name in pictures)
    written.write("scores.csv", partial(cases.write_scores, rows))
    written.write("summary.json", partial(report.write_summary, summary))
    for name, picture in pictures.items():
        written.write(f"figures/{name}.png", partial(Path.write_bytes, data=picture))
    page = written.write("report.html", partial(report.write_page, rows, summary, pictures))
    remove_old_pictures(written, pictures)

    dice = summary["mean_of_cases"]["dice"]
    scored = counted(len(truths.regions), "region")
    if not truths.regions:
        scored = "1 class" if len(truths.classes) == 1 else f"{len(truths.classes)} classes"
    print(f"mean Dice {dice['mean']:.4f} over {counted(dice['n'], 'case')}, {scored}; see {page}")
    return summary


def remove_old_pictures(written: Written, pictures: Collection[str]) -> None:
    """Other cases were the worst when the folder was scored before."""
    for path in (written.folder / "figures").glob("worst-*.png"):
        if path.stem not in pictures and written.is_whole(f"figures/{path.name}"):
            path.unlink()


def tune(config: TuneConfig) -> postprocess.Steps:
    """postprocess.json: the steps of each class that raise the Dice of validation cases."""
    written = Written(output_folder(config))
    truths = truths_of(config)
    if truths.regions:
        raise InputError(
            f"--data {config.data}: has regions; post-processing is chosen for classes alone"
        )
    written.check(["postprocess.json"], [Path(config.data)])
    check_not_processed(Path(config.predictions))

    # All cases at once: every step is tried on all of them.
    validation_cases = []
    for pair in truths.pairs:
        case = cases.read_case(pair.prediction, pair.label, truths.classes, ignore=truths.ignore)
        validation_cases.append(case)
    steps, table = postprocess.choose(validation_cases, truths.classes)

    written.write("postprocess.json", partial(postprocess.save_steps, steps))
    print(postprocess.as_text(table))
    return steps


def check_not_processed(predictions: Path) -> None:
    """Raises InputError where label maps went through steps already: they would help no more, and
    be left out of the new ones.
    """
    written = Written(predictions)
    for file in sorted({line["file"] for line in written.lines}):
        if written.last(file).get("settings", {}).get("postprocess"):
            raise InputError(
                f"--predictions {predictions}: {file} was predicted with --postprocess; predict "
                "without it to choose steps"
            )


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Paired tests of two sets of scores, per class and overall: printed, and written to --out."""
    file_a = scores_file(config.a)
    file_b = scores_file(config.b)
    written = tables_in(config.out, "compare")

    # Scores of different definitions, tolerances or labels are not compared.
    terms = [(config.a, report.terms_of(file_a)), (config.b, report.terms_of(file_b))]
    warn(report.check_terms(terms))
    warn(report.about_policy(terms))
    runs = [(config.a, cases.read_scores(file_a)), (config.b, cases.read_scores(file_b))]
    report.check_classes(runs)
    (_, rows_a), (_, rows_b) = runs
    lines = statistics.compare(rows_a, rows_b, seed=config.seed)

    if written:
        write_tables(written, lines, "compare")
    print(report.comparison_text(lines, a=config.a, b=config.b))
    return lines


def folds(config: FoldsConfig) -> list[dict[str, Any]]:
    """One table over folds, or over seeds: printed, and written to --out."""
    # Each run is called by the folder of its scores.
    files = [scores_file(name) for name in config.scores or ("",)]
    names = cases.case_names([file.absolute().parent for file in files])
    written = tables_in(config.out, "folds")

    terms = [(name, report.terms_of(file)) for name, file in zip(names, files)]
    warn(report.check_terms(terms))
    warn(report.about_policy(terms))
    runs = [(name, cases.read_scores(file)) for name, file in zip(names, files)]
    report.check_classes(runs)
    lines = statistics.fold_table(runs, seed=config.seed)

    if written:
        write_tables(written, lines, "folds")
    print(report.fold_text(lines))
    return lines


def cka(config: CkaConfig) -> list[dict[str, Any]]:
    """cka.csv, cka.md and figures/cka.png: how alike the states of two networks are (Table 7).
    Returns the rows of the table.
    """
    written = Written(output_folder(config))
    device = start(config.device).device
    choose_kernels(device, tf32=False)

    # Both networks are built as the one after fine-tuning.
    path_before = weights_file(config.before, "--before")
    path_after = weights_file(config.after, "--after")
    before = foreign.read_weights(path_before)
    after = foreign.read_weights(path_after)
    features.check_same_network(before, after, config)
    warn_of_intensities(before, config.before)
    warn_of_intensities(after, config.after)
    network_before = features.encoder_of(before, path_before, config, device, plan=after.plan)
    network_after = features.encoder_of(after, path_after, config, device)

    written.check(("cka.csv", "cka.md", "figures/cka.png"), [Path(config.data)])
    sources = volumes_of(config, after.plan)
    crops = features.fixed_crops(sources.volumes, after.plan)
    rows = cka_of_stages(
        features.states_of_both(network_before, network_after, crops, config), config
    )

    table = as_markdown(rows)
    picture = cka_chart([row["cka"] for row in rows], f"{config.before}\nand {config.after}")
    written.write("cka.csv", partial(report.write_table, rows))
    written.write("cka.md", partial(Path.write_bytes, data=table.encode()))
    written.write("figures/cka.png", partial(Path.write_bytes, data=picture))
    print(table, end="")
    return rows


def warn_of_intensities(weights: foreign.Weights, name: str) -> None:
    for warning in about_intensities(weights.plan):
        print(f"{name}: {warning}")


def embed(config: EmbedConfig) -> dict[str, Any]:
    """features.npz, embedding.json and figures/embedding.png: a vector for each volume. Returns
    what embedding.json says.
    """
    written = Written(output_folder(config))
    device = start(config.device).device
    choose_kernels(device, tf32=False)

    path = weights_file(config.checkpoint, "--checkpoint")
    weights = foreign.read_weights(path)
    network = features.encoder_of(weights, path, config, device)
    warn_of_intensities(weights, config.checkpoint)

    names = ("features.npz", "embedding.json", "figures/embedding.png")
    written.check(names, [Path(config.data)])
    sources = volumes_of(config, weights.plan)
    crops = features.fixed_crops(sources.volumes, weights.plan)
    vectors = []
    for n in tqdm(range(len(sources.volumes)), "volumes", disable=not sys.stderr.isatty()):
        vectors.append(features.vector_of(network, crops, n, config))

    modalities = [item.modality_name for item in sources.items]
    subjects = [item.subject for item in sources.items]
    summary = features.summary_of(np.stack(vectors), modalities, subjects)
    line = features.in_words(summary)
    points, shares = features.principal_plane(features.unit(np.stack(vectors)))
    picture = embedding_chart(points, shares, modalities, config.checkpoint)

    save_vectors = partial(
        features.write_vectors,
        features=np.stack(vectors),
        case=sources.names,
        modality=modalities,
        subject=subjects,
    )
    written.write("features.npz", save_vectors)
    written.write("embedding.json", partial(report.write_summary, summary))
    written.write("figures/embedding.png", partial(Path.write_bytes, data=picture))
    print(line)
    return summary


# --- predict: the networks


@dataclass(frozen=True)
class Model:
    """All that makes a label map of an image."""

    config: PredictConfig
    plan: Mapping[str, Any]  # of the checkpoints: how the networks were built and trained
    predictors: Sequence[Predict]  # the networks
    steps: postprocess.Steps  # of --postprocess
    settings: Mapping[str, Any]  # all of these in short, for written.jsonl
    device: torch.device


# What all checkpoints of an ensemble must agree on.
SHARED = (
    "classes",
    "regions",
    "regions_class_order",
    "in_channels",
    "spacing",
    "crop",
    "ct_window",
    "mr_intensity",
    "foreground_crop",
    "flip_axes",
    "swap",
    "swap_axes",
)
# What prediction has no use for. A checkpoint is three times as large as its network.
LARGE = ("model", "optimizer", "scaler", "rng")


def load_ensemble(
    config: PredictConfig, device: torch.device
) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """What each checkpoint says of itself, and its network. Raises InputError where they cannot
    predict together.
    """
    saved: list[dict[str, Any]] = []
    networks: list[nn.Module] = []
    for name in config.checkpoint:
        first = saved[0]["plan"] if saved else None
        state, network = load_member(name, first, config, device)
        saved.append(state)
        networks.append(network)

    if not saved:
        raise InputError("--checkpoint: give the best.pt of a fine-tuning run, or several")
    return saved, networks


def load_member(
    name: str, first: Mapping[str, Any] | None, config: PredictConfig, device: torch.device
) -> tuple[dict[str, Any], nn.Module]:
    """A checkpoint without what is LARGE in it, and its network. `first` is the plan that it must
    agree with.
    """
    state = load_planned(Path(name), mapped=True)
    plan = trained_plan(state)
    if first is None and not plan["classes"]:
        raise InputError(f"--checkpoint {name}: names no classes; fine-tune it with train_seg.py")
    if first is not None:
        check_agreement(plan, first, name, config)

    # The state goes when this function returns: twenty members would hold twenty optimisers.
    network = network_of(plan, state["model"], device, config, name)
    metadata = {key: value for key, value in state.items() if key not in LARGE}
    return metadata | {"plan": plan}, network


def trained_plan(state: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a checkpoint. Older ones have some of it in the run's configuration."""
    config = state.get("config", {})
    plan = {
        "foreground_crop": config.get("foreground_crop", False),
        "flip_axes": (),  # a pre-trained network has none, and is refused
        **state["plan"],
    }
    flips = flips_of(plan, config)
    return plan | {"flip_axes": flips.axes, "swap": flips.swap, "swap_axes": flips.swap_axes}


def check_agreement(
    plan: Mapping[str, Any], first: Mapping[str, Any], name: str, config: PredictConfig
) -> None:
    """Raises InputError where a checkpoint was trained otherwise than the first of its ensemble."""
    for key in SHARED:
        if plan.get(key) != first.get(key):
            raise InputError(
                f"--checkpoint {name}: its {key} differs from that of {config.checkpoint[0]}"
            )
    # Equal dicts may be in two orders, and the channels of a network are in that of its regions.
    if list(plan.get("regions", ())) != list(first.get("regions", ())):
        raise InputError(
            f"--checkpoint {name}: its regions are in another order than those of "
            f"{config.checkpoint[0]}"
        )


def network_of(
    plan: Mapping[str, Any],
    weights: Mapping[str, Any],
    device: torch.device,
    config: PredictConfig,
    name: str,
) -> nn.Module:
    """The network of a checkpoint, ready to predict. Raises InputError where it cannot be built."""
    path = Path(name)
    network = network_of_plan(plan, config, path)
    checkpoint.load_weights(network, weights, path)
    network = network.to(device).eval()
    lay_out(network, device, compiled=False)
    return network


def model_of(
    config: PredictConfig,
    plan: Mapping[str, Any],
    networks: Sequence[nn.Module],
    device: torch.device,
) -> Model:
    """The networks with what the flags say of --amp and --postprocess. Raises InputError."""
    dtype = autocast_type(config.amp, device)  # as in training, unless --amp says otherwise
    return Model(
        config=config,
        plan=plan,
        predictors=[partial(forward, network, dtype, device) for network in networks],
        steps=postprocessing_of(config, plan),
        settings=settings_of(config, dtype),
        device=device,
    )


def forward(
    network: nn.Module, dtype: torch.dtype | None, device: torch.device, x: Tensor
) -> Tensor:
    """The network's output in its autocast type."""
    with autocast(dtype, device):
        return network(x)  # type: ignore[no-any-return]


def postprocessing_of(config: PredictConfig, plan: Mapping[str, Any]) -> postprocess.Steps:
    """The steps of --postprocess, if any. Raises InputError on a label that the network has not."""
    if not config.postprocess:
        return {}
    if plan.get("regions"):
        raise InputError(
            f"--postprocess {config.postprocess}: is for classes, and the checkpoint has regions"
        )
    steps = postprocess.load_steps(Path(config.postprocess))
    for label in steps:
        if str(label) not in plan["classes"]:
            raise InputError(
                f"--postprocess {config.postprocess}: label {label} is no class of the checkpoint"
            )
    return steps


def settings_of(config: PredictConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """All that decides a label map beside its image, by flag."""
    steps_hash = sha256_of([Path(config.postprocess)])[:16] if config.postprocess else ""
    return {
        "checkpoint": [checkpoint.seal_of(Path(name))[:16] for name in config.checkpoint],
        "tta": config.tta,
        "overlap": config.overlap,
        "ensemble": config.ensemble,
        "amp": str(dtype),
        "postprocess": steps_hash,
    }


def averaging(config: PredictConfig, plan: Mapping[str, Any]) -> str:
    """In words: which flips --tta averages over, and what was wrong with those of the training."""
    names = {int(label): name for label, name in plan["classes"].items()}  # JSON has text
    doubt = doubt_about_sides(plan, names)
    if not config.tta:
        return f"no flips{doubt}"
    if not plan["flip_axes"]:
        return "no flips: --tta takes those of the training, which had none"

    axes = ", ".join(f"{axis} ({AXES[axis]})" for axis in plan["flip_axes"])
    swap = f", {pairs_in_words(plan['swap'], names)} change places" if plan["swap"] else ""
    return f"averaged over flips along axes {axes}{swap}{doubt}"


def doubt_about_sides(plan: Mapping[str, Any], names: Mapping[int, str]) -> str:
    """A warning, or nothing, on a network that was trained with left-right flips but no `swap`.

    Newer training does that only where it is safe, and says in the plan's "flips" why.
    """
    if plan["swap"] or "flips" in plan or 0 not in plan["flip_axes"]:
        return ""
    pairs = likely_pairs(names)
    if not pairs:
        return ""
    alike = pairs_in_words(pairs, names)
    return f"; trained with left-right flips, so {alike} may be taken for each other"


# --- predict: the images


def items_to_predict(
    config: PredictConfig, plan: Mapping[str, Any], seen: leaks.Seen, unknown: Sequence[str]
) -> tuple[Sequence[Item], list[str]]:
    """The images of --images, or the items of --split of the list, and the case of each. Raises
    InputError.
    """
    if config.images:
        images = images_of(config, plan)
        return images, cases.case_names([item.image[0] for item in images])
    items, chosen = cases_of(config, config.modality, seen, unknown)
    cases.check_task(items, plan["classes"], from_plan(plan), config.data)
    return chosen, cases.names_in_list(items, chosen)


def images_of(config: PredictConfig, plan: Mapping[str, Any]) -> list[Item]:
    """Single files and folders of them, without labels, as items of the checkpoint's modality."""
    modality = config.modality
    if not modality and len(plan["modalities"]) == 1:
        modality = plan["modalities"][0]
    intensity = known_intensity(modality, plan, f"--modality {modality or '(none)'}")

    files: list[Path] = []
    for name in config.images:
        path = Path(name)
        if not path.exists():
            raise InputError(f"--images {path}: no such file")
        inside = cases.volumes_in(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"--images {path}: no .nii or .nii.gz files in it")
        files += inside

    channels = tuple(modality.split("+"))
    return [Item((file,), channels, intensity, file.name) for file in files]


def cases_of(
    config: CasesConfig, modality: str, seen: leaks.Seen, unknown: Sequence[str] = ()
) -> tuple[DataList, Sequence[Item]]:
    """As `holdout.read_for_evaluation`; what it decides for the user is printed."""
    items, chosen = holdout.read_for_evaluation(config, modality, seen, unknown)
    if config.split == "validation" and items.notes:
        print("; ".join(items.notes))
    return items, chosen


def check_intensity(item: Item, plans: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError unless every network was trained on the item's modality, normalised as the
    item is.
    """
    file = item.image[0]
    modality = item.modality_name
    for plan in plans:
        known = known_intensity(modality, plan, f"{file}: modality {modality}")
        of_item = intensity_in_words(item.intensity, plan)
        of_training = intensity_in_words(known, plan)
        if of_item != of_training:
            raise InputError(
                f"{file}: intensity {of_item}, but the network was trained on {modality} by "
                f"{of_training}; change it in the list"
            )


def known_intensity(modality: str, plan: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """How the network's training normalised a modality. Raises InputError on an unknown one."""
    known = plan["intensity"]
    if modality not in known:
        raise InputError(f"{where}: the network knows {', '.join(known)}; name the images' own")
    return tuple(known[modality])


def intensity_in_words(intensity: Sequence[str], plan: Mapping[str, Any]) -> str:
    """One normalisation for each channel. "mr" stands for the one that the run chose for MR."""
    return "+".join(plan["mr_intensity"] if how == "mr" else how for how in intensity)


def trained_cases(
    config: PredictConfig,
    items: Sequence[Item],
    names: Sequence[str],
    seen: leaks.Seen,
    unknown: Sequence[str],
) -> set[str]:
    """Cases whose subject the networks were trained on. Raises InputError where there are some and
    --allow-trained is not set.
    """
    if unknown:
        print(
            f"warning: {unknown[0]}: an older version wrote it, "
            "which does not say whom it was trained on"
        )
    # A file has no subject. Its voxels are looked at when it is read.
    if config.images:
        return set()

    trained = [names[n] for n in leaks.trained_among(items, seen)]
    if not config.allow_trained:
        leaks.refuse_trained(trained, f"--data {config.data}", "predict")
    return set(trained)


# --- predict: the output folder


def check_targets(written: Written, items: Mapping[str, Item], settings: Mapping[str, Any]) -> None:
    """Raises InputError where label maps would replace inputs, or come into one folder with
    those of other settings or images.
    """
    # Label maps in the folder of the scans would be taken for scans by the next command.
    inputs: list[Path] = []
    for item in items.values():
        inputs += item.image
        if item.label:
            inputs.append(item.label)
    check_apart(written.folder, inputs)
    written.check((f"{name}.nii.gz" for name in items), inputs)

    # All label maps that are there, those of other cases as well.
    predicted_before = {line["file"] for line in written.lines if "settings" in line}
    for file in sorted(predicted_before):
        if "settings" in written.last(file) and (written.folder / file).exists():
            case = cases.case_name(Path(file))
            check_label_map(written, file, items.get(case), settings)


def check_label_map(
    written: Written, file: str, item: Item | None, settings: Mapping[str, Any]
) -> None:
    """Raises InputError if a label map in the folder was made with other settings, or from another
    image than the item of that name.
    """
    line = written.last(file)
    where = f"--out {written.folder}: {file}"
    for flag, value in settings.items():
        before = line["settings"].get(flag)
        if before != value:
            raise InputError(
                f"{where} was predicted with another --{flag} ({before}); name another folder"
            )
    source = line.get("source", {})
    if item and is_another_image(item, source):
        before = source.get("images", ["another image"])[0]
        raise InputError(f"{where} was predicted from {before}; name another folder")


def is_another_image(item: Item, source: Mapping[str, Any]) -> bool:
    """Whether an item has other files than a label map was made from, with other bytes in them."""
    # A file that has changed since is the same image: it is predicted again.
    if [str(path.absolute()) for path in item.image] == source.get("images"):
        return False
    if not all(path.is_file() for path in item.image):
        return True
    same_bytes: bool = sha256_of(item.image) == source.get("sha256")
    return not same_bytes


@dataclass
class Record:
    """predicted.json beside the label maps: which cases the networks were trained on."""

    written: Written
    config: PredictConfig
    seen: leaks.Seen  # whom the networks were trained on
    trained: set[str]  # cases known so far, grows with each that is found
    predicted: list[str] = field(default_factory=list)  # cases, by this process
    is_shared: bool = False  # other ranks write it, too
    unlabelled: leaks.Seen = field(default_factory=dict)  # what they have seen without a label

    def write(self) -> None:
        """Add what is known to what the file says of other cases."""
        with self.written.alone() if self.is_shared else nullcontext():
            make = partial(
                leaks.write_predicted,
                seen=self.seen,
                before=leaks.read_predicted(self.written.folder),
                split="" if self.config.images else self.config.split,
                cases=self.predicted,
                trained=sorted(self.trained),
            )
            self.written.write(leaks.PREDICTED, make)


# --- predict: case by case


S = TypeVar("S", bound="Case")
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """An image that is to be predicted."""

    number: int  # among all cases
    item: Item
    name: str

    @property
    def file(self) -> str:
        """The name of its label map."""
        return f"{self.name}.nii.gz"


@dataclass(frozen=True)
class Ready(Case):
    """A case as the network takes it."""

    source: Mapping[str, Any]  # what its label map is made from
    trained: bool  # the networks were trained on these very voxels
    pretrained: bool  # they have seen them without a label
    prepared: Prepared
    shape: tuple[int, ...]  # (d, h, w) of the image's own grid
    spacing: tuple[float, float, float]  # mm, of that grid


@dataclass(frozen=True)
class Predicted(Case):
    """A case as the network has labelled it."""

    source: Mapping[str, Any]
    trained: bool
    pretrained: bool
    labels: Labels  # (d, h, w), on the image's own grid
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Outcome:
    """What became of a case: a label map, or a reason why there is none."""

    number: int  # of the case
    kept: bool = False  # the label map is there from an earlier run
    trained: bool = False  # the networks were trained on it
    pretrained: bool = False  # they have seen it without a label
    failed: str = ""


@dataclass(frozen=True)
class Job:
    """All that `predict` is to do."""

    cases: Sequence[Case]
    model: Model
    record: Record


def plan_prediction(config: PredictConfig, ranks: Ranks) -> Job:
    """What `predict` will do. Raises InputError where it cannot be done. Writes nothing."""
    out = output_folder(config)
    if config.images and config.data:
        raise InputError("--images: not beside --data; give one of them")
    device = ranks.device
    choose_kernels(device, tf32=False)

    # The networks: what they were trained with, and whom they were trained on.
    saved, networks = load_ensemble(config, device)
    model = model_of(config, saved[0]["plan"], networks, device)
    seen, unknown = leaks.seen_of(saved, config.checkpoint)

    # The images: whether these networks can predict them, and may.
    items, names = items_to_predict(config, model.plan, seen, unknown)
    for item in items:
        check_intensity(item, [state["plan"] for state in saved])
    leaks.read_predicted(out)  # found damaged now, and not after hours of prediction
    trained = trained_cases(config, items, names, seen, unknown)

    # The folder: label maps replace nothing there, and all of them are made in one way.
    written = Written(out)
    check_targets(written, dict(zip(names, items)), model.settings)
    written.check([leaks.PREDICTED])
    unlabelled = leaks.seen_unlabelled([state["plan"] for state in saved])
    record = Record(
        written, config, seen, trained, is_shared=ranks.world > 1, unlabelled=unlabelled
    )
    print(
        f"{counted(len(items), 'image')}, {counted(len(networks), 'checkpoint')}, "
        f"{averaging(config, model.plan)}"
    )
    all_cases = [Case(n, item, name) for n, (item, name) in enumerate(zip(items, names))]
    return Job(all_cases, model, record)


def carry_out(job: Job, ranks: Ranks) -> list[Path]:
    """Predict all cases, and say what became of them. Raises InputError that names the failed."""
    own = predict_cases(job, ranks)
    for outcome in own:
        if outcome.trained:
            job.record.trained.add(job.cases[outcome.number].name)
    if any(not outcome.failed for outcome in own):
        job.record.write()

    # What became of all cases, in the order of the cases.
    outcomes: list[Outcome] = []
    trained: set[str] = set()
    for of_rank, trained_of_rank in gather_objects((own, job.record.trained)):
        outcomes += of_rank
        trained |= trained_of_rank
    outcomes.sort(key=lambda outcome: outcome.number)
    if not ranks.is_main:
        return []

    label_maps: list[Path] = []
    failed: list[str] = []
    for outcome in outcomes:
        if outcome.failed:
            failed.append(outcome.failed)
        else:
            label_maps.append(job.record.written.folder / job.cases[outcome.number].file)

    kept = sum(outcome.kept for outcome in outcomes)
    from_before = f", {kept} of them from before" if kept else ""
    folder = job.record.written.folder
    print(f"{counted(len(label_maps), 'label map')} in {folder}{from_before}")
    if job.model.config.images:
        warn(about_trained(trained))
    pretrained = [job.cases[outcome.number].name for outcome in outcomes if outcome.pretrained]
    warn(about_pretrained(pretrained))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(job.cases)} cases could not be predicted: {'; '.join(failed)}"
        )
    return label_maps


def predict_cases(job: Job, ranks: Ranks) -> list[Outcome]:
    """Label maps of this rank's share of the cases. One that cannot be predicted does not keep the
    others from it.

    While the network works on one case, the next is read and the last is written.
    """
    count = len(job.cases)
    own_cases = (job.cases[number] for number in share(count, ranks))
    ready = one_ahead(partial(attempt, partial(read_case, job)), own_cases)
    predicted = map(partial(attempt, partial(predict_case, job.model)), ready)
    outcomes = one_ahead(partial(attempt, partial(write_case, job)), predicted)

    done: list[Outcome] = []
    is_quiet = not (ranks.is_main and sys.stderr.isatty())
    with tqdm(total=count, desc="predicting", disable=is_quiet) as bar:
        for outcome in outcomes:
            done.append(outcome)
            bar.update(outcome.number + 1 - bar.n)  # other ranks work on those before it
    return done


def attempt(stage: Callable[[S], T], case: S | Outcome) -> T | Outcome:
    """A stage of a case, unless an earlier one has ended it. What fails here ends it, too."""
    if isinstance(case, Outcome):
        return case
    try:
        return stage(case)
    # An image, or its size, may be wrong and the next one right. A full disk stays full, and
    # its OSError ends the run.
    except (InputError, ValueError, RuntimeError, MemoryError) as error:
        if os.environ.get("DAE_DEBUG") == "1":
            raise
        return Outcome(case.number, failed=failure_in_words(error, case.item))


def read_case(job: Job, case: Case) -> Ready | Outcome:
    """Read and prepare an image, unless its label map is there already."""
    written = job.record.written
    source = source_of(case.item)
    # A run that was stopped goes on where it was.
    if is_finished(written, case.file, source):
        line = written.last(case.file)
        trained = bool(line.get("trained"))
        pretrained = bool(line.get("pretrained"))
        return Outcome(case.number, kept=True, trained=trained, pretrained=pretrained)

    # Its subject or its path may be new, and its voxels those of a training image.
    volume = read_channels(case.item.image)
    config = job.model.config
    hashes = leaks.hashes_of(volume.data)
    trained = leaks.is_among(hashes, job.record.seen)
    if trained and not config.images and not config.allow_trained:
        leaks.refuse_trained([case.name], str(case.item.image[0]), "predict")

    return Ready(
        **vars(case),
        source=source,
        trained=trained or case.name in job.record.trained,
        pretrained=leaks.is_among(hashes, job.record.unlabelled),
        prepared=prepare_image(case.item, volume, job.model.plan),
        shape=volume.data.shape[1:],
        spacing=volume.spacing,
    )


def prepare_image(item: Item, volume: Volume, plan: Mapping[str, Any]) -> Prepared:
    """A volume as the network of a plan takes it. Raises InputError."""
    recipe = Recipe(
        tuple(plan["spacing"]),
        tuple(plan["ct_window"]),
        plan["mr_intensity"],
        plan["foreground_crop"],
    )
    prepared = normalise(volume, item, recipe)
    if len(prepared.data) != plan["in_channels"]:
        raise InputError(
            f"{item.image[0]}: {len(prepared.data)} channels, "
            f"the network takes {plan['in_channels']}"
        )
    return prepared


def predict_case(model: Model, case: Ready) -> Predicted:
    """A case with its label map, and without its image."""
    labels = predict_image(case.prepared, case.shape, model)
    return Predicted(
        case.number,
        case.item,
        case.name,
        source=case.source,
        trained=case.trained,
        pretrained=case.pretrained,
        labels=labels,
        spacing=case.spacing,
    )


def predict_image(prepared: Prepared, shape: Sequence[int], model: Model) -> Labels:
    """The label map of an image, on the image's own grid `shape` (d, h, w). Raises InputError."""
    plan = model.plan
    # The network knows a class by its index, the file by its label.
    classes = [int(label) for label in plan["classes"]]
    regions = from_plan(plan)
    swap = [(classes.index(a), classes.index(b)) for a, b in plan["swap"]]
    if regions:
        swap = mirrored(regions, plan["swap"], "--checkpoint")
    slabs = sliding_window(
        prepared.data,
        model.predictors,
        window=tuple(plan["crop"]),
        classes=len(regions) or len(classes),
        overlap=model.config.overlap,
        batch=model.config.batch,
        device=model.device,
        background=prepared.background.tolist(),
        flips=plan["flip_axes"] if model.config.tta else (),
        combine=model.config.ensemble,
        swap=swap,
        swap_axes=plan["swap_axes"],
        are_regions=bool(regions),
    )
    # With --foreground-crop only the box of the patient was predicted.
    if prepared.box:
        slabs = paste(slabs, prepared.box, prepared.grid, are_regions=bool(regions))

    class_index = label_map(slabs, prepared.grid, shape, decide_by(classes, regions))
    labels: Labels = np.array(classes, dtype=np.uint8)[class_index]
    return labels


def write_case(job: Job, case: Predicted) -> Outcome:
    """Write <name>.nii.gz, and note what it was made from."""
    record = job.record
    labels = postprocess.apply(case.labels, job.model.steps, case.spacing)
    record.written.write(
        case.file,
        partial(save_like, case.item.image[0], labels),
        settings=job.model.settings,
        source=case.source,
        trained=case.trained,
        pretrained=case.pretrained,
    )
    record.predicted.append(case.name)

    # At once: a run that is stopped must not leave a trained case unmarked.
    if case.trained:
        record.trained.add(case.name)
        record.write()
    return Outcome(case.number, trained=case.trained, pretrained=case.pretrained)


def source_of(item: Item) -> dict[str, Any]:
    """What a label map is made from. Raises InputError where a file is not there."""
    for path in item.image:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    return {
        "images": [str(path.absolute()) for path in item.image],
        "sha256": sha256_of(item.image),
        "modality": item.modality_name,
        "intensity": list(item.intensity),
    }


def is_finished(written: Written, file: str, source: Mapping[str, Any]) -> bool:
    """Whether a label map of this very image is there, whatever the path to the image."""
    made_from = written.last(file).get("source", {})
    for key in ("sha256", "modality", "intensity"):
        if made_from.get(key) != source[key]:
            return False
    return written.is_whole(file)


def failure_in_words(error: Exception, item: Item) -> str:
    """Why a case could not be predicted, on one line that names its file."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        reason = f"out of memory ({one_line(error)}); {NEEDS_LESS['predict']}"
    file = str(item.image[0])
    return reason if file in reason else f"{file}: {reason}"


def about_trained(trained: set[str]) -> str:
    """A warning, or nothing, on images that the networks were trained on."""
    if not trained:
        return ""
    return (
        f"warning: the network was trained on {counted(len(trained), 'image')} of these, "
        f"as {min(trained)}; score refuses them"
    )


def about_pretrained(names: Sequence[str]) -> str:
    """A warning, or nothing, on images that pre-training saw."""
    if not names:
        return ""
    return (
        f"warning: the network was pre-trained on {counted(len(names), 'image')} of these, "
        f"as {names[0]}, without their labels: their scores may flatter"
    )


# --- score and tune: predictions and labels


class Truths(NamedTuple):
    """What predictions are scored against."""

    classes: dict[int, str]  # without the background and what is ignored
    pairs: list[cases.Pair]
    images: dict[str, Path]  # by case, where known
    tolerance: dict[int, float]  # of NSD in mm, for classes to which the list gives one
    ignore: int | None
    regions: tuple[Region, ...] = ()  # which are scored in place of the classes


def truths_of(config: TruthsConfig) -> Truths:
    """The files of every case, of a list or of two folders, and the classes. Raises InputError."""
    if not config.predictions or not Path(config.predictions).is_dir():
        raise InputError(f"--predictions {config.predictions or '(none)'}: no such folder")
    if config.ignore == 0:
        raise InputError(
            "--ignore 0: is the background; a label of what was not annotated is another number"
        )
    if config.labels and config.data:
        raise InputError(
            "--labels: not beside --data, whose list names the labels; give one of them"
        )

    record = leaks.read_predicted(Path(config.predictions))
    truths = truths_of_folder(config) if config.labels else truths_of_list(config, record)

    if not config.allow_trained:
        known = record.get("trained", ())
        trained = [pair.case for pair in truths.pairs if pair.case in known]
        leaks.refuse_trained(trained, f"--predictions {config.predictions}", "score")
    if not truths.classes:
        raise InputError(
            f"{config.labels or config.data}: names no class to score but background "
            "and what is ignored"
        )
    return truths


def truths_of_folder(config: TruthsConfig) -> Truths:
    """Label maps of the same names as the predictions. Every label in them is a class."""
    pairs = cases.pair(Path(config.predictions), Path(config.labels))
    names = cases.classes_in(pair.label for pair in pairs)
    return Truths(scored(names, config.ignore), pairs, {}, {}, config.ignore)


def truths_of_list(config: TruthsConfig, record: leaks.Seen) -> Truths:
    """The labels of --split of the list. `record` is what predict left beside the predictions."""
    # Scoring reads no intensity, so that a list that names no modality will do.
    items, chosen = cases_of(config, "mr", record)
    names = cases.names_in_list(items, chosen)
    labels = [(case, item.label) for case, item in zip(names, chosen)]
    pairs = cases.pair(Path(config.predictions), labels)

    images = {case: item.image[0] for case, item in zip(names, chosen)}
    ignore = items.ignore if config.ignore is None else config.ignore
    classes = scored(items.labels, ignore)
    return Truths(classes, pairs, images, items.tolerance, ignore, items.regions)


def scored(names: Mapping[int, str], ignore: int | None) -> dict[int, str]:
    """The classes that count: all but the background and what is ignored."""
    return {label: name for label, name in names.items() if label not in (0, ignore)}


def tolerance_by_class(config: ScoreConfig, truths: Truths) -> float | dict[int, float]:
    """Of NSD in mm: --tolerance, or one for each class where the list has some of its own."""
    if not truths.tolerance:
        return config.tolerance
    names = numbered(truths.regions) or truths.classes
    return {label: truths.tolerance.get(label, config.tolerance) for label in names}


# --- compare and folds: tables


def scores_file(name: str) -> Path:
    """The scores.csv, or that in a folder. Raises InputError where it is not there."""
    path = Path(name)
    if path.is_dir():
        path = path / "scores.csv"
    if not name or not path.is_file():
        raise InputError(f"{name or '(none)'}: no scores.csv there; eval.py score writes one")
    return path


def tables_in(out: str, name: str) -> Written | None:
    """The folder for the tables of `compare` and `folds`. None where they are only printed."""
    if not out:
        return None
    resume.check_out_folder(Path(out), resume=True)
    written = Written(Path(out))
    written.check((f"{name}.csv", f"{name}.json"))
    return written


def write_tables(written: Written, lines: Sequence[dict[str, Any]], name: str) -> None:
    written.write(f"{name}.csv", partial(report.write_table, lines))
    written.write(f"{name}.json", partial(report.write_lines, lines))


# --- cka and embed: the volumes


class Sources(NamedTuple):
    """Volumes whose features are looked at, as the network takes them."""

    items: Sequence[Item]
    names: Sequence[str]
    volumes: Sequence[Cached]


def weights_file(name: str, flag: str) -> Path:
    """Raises InputError where no file is named."""
    if not name:
        raise InputError(f"{flag}: name a file of weights")
    return Path(name)


def volumes_of(config: FeaturesConfig, plan: Mapping[str, Any]) -> Sources:
    """The volumes of --split, prepared as the plan says.

    Raises InputError where one cannot be used, and where the network was trained on one that
    --allow-trained does not allow.
    """
    chosen = chosen_for_features(config, plan)
    items = features.items_for(chosen, plan)
    names = features.names_of(items)
    warn(about_modalities(items, plan))

    # Whom the network was trained on, by name and then by voxels. Pre-training does not tell.
    seen = plan.get("seen", {})
    where = f"--data {config.data}"
    doing = "look at the features of"
    if not config.allow_trained:
        trained = [names[n] for n in leaks.trained_among(items, seen)]
        leaks.refuse_trained(trained, where, doing)

    folder = Path(config.cache_dir or default_folder()).expanduser()
    volumes = prepare_all(items, features.recipe_of(plan), folder, quiet=not sys.stderr.isatty())
    if volumes[0].shape[0] != plan["in_channels"]:
        raise InputError(
            f"{items[0].image[0]}: {volumes[0].shape[0]} channels, "
            f"the network takes {plan['in_channels']}"
        )
    if not config.allow_trained:
        known = set(seen.get("voxels", ()))
        same = [name for name, volume in zip(names, volumes) if known & set(volume.content.image)]
        leaks.refuse_trained(same, where, doing)
    return Sources(items, names, volumes)


def chosen_for_features(config: FeaturesConfig, plan: Mapping[str, Any]) -> Sequence[Item]:
    """The items of --split. `validation` is what training held out, as far as it is known."""
    if plan["classes"] or config.split != "validation":
        return cases_of(config, config.modality, plan.get("seen", {}))[1]

    # Pre-training holds out 5 % where the list does not say who is held out.
    items = datalist.load(config.data, root=config.data_root, modality=config.modality)
    items = holdout.hold_out_share(items, fold=config.fold, split_seed=config.split_seed)
    warn("; ".join(items.notes))
    return items.validation


def about_modalities(items: Sequence[Item], plan: Mapping[str, Any]) -> str:
    """A warning, or nothing, on modalities that the network was not trained on."""
    known = plan.get("modalities")
    unknown = sorted({item.modality_name for item in items}.difference(known or ()))
    if not known or not unknown:
        return ""
    return f"warning: the network was trained on {', '.join(known)}, not on {', '.join(unknown)}"


# --- all commands


def output_folder(config: CasesConfig) -> Path:
    """Where results go. Raises InputError where they cannot.

    The folder is made with its first file, so that a command that is refused leaves nothing behind.
    """
    if not config.out:
        raise InputError("--out: name a folder for what is made")
    resume.check_out_folder(Path(config.out), resume=True)
    return Path(config.out)


def warn(warning: str) -> None:
    """Print a warning, if there is one."""
    if warning:
        print(warning, file=sys.stderr)


COMMANDS: dict[str, Callable[[Any], object]] = {
    "predict": predict,
    "score": score,
    "tune": tune,
    "compare": compare,
    "folds": folds,
    "cka": cka,
    "embed": embed,
}

if __name__ == "__main__":
    run_or_explain(
        lambda: COMMANDS[COMMAND](CONFIG),
        f"eval.py {COMMAND}",
        needs_less=NEEDS_LESS.get(COMMAND, ""),
    )
