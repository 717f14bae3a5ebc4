"""Predict, score, tune and compare segmentations, and put folds together.

python eval.py predict --checkpoint runs/seg/best.pt --data list.json --split test --out predictions
python eval.py predict --checkpoint fold*/best.pt --images scan.nii.gz folder --tta --out predictions
python eval.py score   --predictions predictions --data list.json --split test --out scores
python eval.py tune    --predictions predictions --data list.json --split validation --out plan
python eval.py compare scores_a scores_b --out comparison
python eval.py folds   fold*/scores --out folds

Each command has its own --help.
"""

import sys

from dae.config.command_line import from_command_line, run_or_explain, with_tuples
from dae.config.evaluate import CompareConfig, FoldsConfig, PredictConfig, ScoreConfig, TuneConfig
from dae.errors import InputError

# What all checkpoints of an ensemble must agree on.
SHARED = (
    "classes",
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
# What prediction has no use for, and what is large: a checkpoint has three times the size of its network.
LARGE = ("model", "optimizer", "scaler", "rng")
CONFIGS = {
    "predict": PredictConfig,
    "score": ScoreConfig,
    "tune": TuneConfig,
    "compare": CompareConfig,
    "folds": FoldsConfig,
}


def read_command() -> tuple[str, object]:
    """The command and its configuration, from this process's arguments; without torch."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    command, *rest = arguments
    if command not in CONFIGS:
        raise InputError(f"{command}: not a command; take one of {', '.join(CONFIGS)}")
    for flag, at in {"compare": (("--a", 0), ("--b", 2)), "folds": (("--scores", 0),)}.get(
        command, ()
    ):
        if len(rest) > at and not rest[at].startswith("-"):
            rest.insert(at, flag)
    return command, from_command_line(
        CONFIGS[command], prog=f"eval.py {command}", description=__doc__, arguments=rest
    )


if __name__ == "__main__":
    COMMAND: list[tuple[str, object]] = []
    run_or_explain(lambda: COMMAND.append(read_command()), "eval.py")

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dae.config.evaluate import CasesConfig, TruthsConfig
from dae.data import datalist, holdout, leaks
from dae.data.datalist import DataList, Item
from dae.data.nifti import Volume, read_channels
from dae.data.preprocess import Recipe, normalise
from dae.data.sides import AXES, flips_of, in_words, likely_pairs
from dae.evaluation import cases as scoring
from dae.evaluation import postprocess, report, statistics
from dae.evaluation.metrics import Labels
from dae.evaluation.native_grid import in_place, label_map, save_like
from dae.evaluation.windows import sliding_window
from dae.evaluation.written import Written, check_apart, sha256_of
from dae.training.distributed import start
from dae.training.kernels import choose_kernels, lay_out
from dae.training.precision import autocast, autocast_type
from dae.weights import checkpoint
from dae.weights.plan import backbone_of


def predict(config: PredictConfig) -> list[Path]:
    """One label map for each image, on the image's own grid, as <case>.nii.gz. Returns their paths.

    Cases that are in --out already, of the same checkpoints, settings and images, are not predicted again. A case that
    cannot be predicted does not keep the others from it. Raises InputError at the end, which names all such cases.
    """
    out = folder(config)
    if config.images and config.data:
        raise InputError("--images: not beside --data; give one of them")
    device = start(config.device).device
    choose_kernels(device, tf32=False)
    saved, networks = members_of(config, device)
    plan = saved[0]["plan"]
    dtype = autocast_type(config.amp, device)
    steps = postprocess.load(Path(config.postprocess)) if config.postprocess else {}
    if strange := [label for label in steps if str(label) not in plan["classes"]]:
        raise InputError(
            f"--postprocess {config.postprocess}: label {strange[0]} is no class of the checkpoint"
        )
    seen, unknown = leaks.seen_of(saved, config.checkpoint)
    if config.images:
        items: Sequence[Item] = images_of(config, plan)
    else:
        listed, items = cases_of(config, config.modality, seen, unknown)
        check_classes(listed.labels, plan, config.data)
    for item in items:
        check_intensity(item, [state["plan"] for state in saved])
    names = scoring.case_names([item.image[0] for item in items])
    before = leaks.read_record(out)  # that it can be added to is known before anything is predicted
    trained = known_cases(config, items, names, seen, unknown)
    written, settings = Written(out), settings_of(config, dtype)
    check_targets(written, dict(zip(names, items)), settings)
    written.check([leaks.RECORD])
    print(
        f"{counted(items, 'image')}, {counted(networks, 'checkpoint')}, {averaging(config, plan)}"
    )

    recipe = Recipe(
        tuple(plan["spacing"]),
        tuple(plan["ct_window"]),
        plan["mr_intensity"],
        plan["foreground_crop"],
    )
    predictors = [predictor(network, dtype, device) for network in networks]

    def keep_record() -> None:
        split = "" if config.images else config.split
        make = partial(
            leaks.write_record,
            seen=seen,
            before=before,
            split=split,
            cases=now,
            trained=sorted(trained),
        )
        written.write(leaks.RECORD, make)

    made, now, kept, failed = list[Path](), list[str](), 0, list[str]()
    for item, name in tqdm(list(zip(items, names)), "predicting", disable=not sys.stderr.isatty()):
        file = f"{name}.nii.gz"
        try:
            source = source_of(item)
            if is_finished(written, file, source):
                kept += 1
                if written.last(file).get("trained"):
                    trained.add(name)
            else:
                volume = read_channels(item.image)
                if leaks.is_trained(volume.data, seen):
                    if not config.images and not config.allow_trained:
                        leaks.refuse_trained([name], str(item.image[0]), "predict")
                    trained.add(name)
                labels = predicted(item, volume, predictors, plan, recipe, config, device, steps)
                facts = {"settings": settings, "source": source, "trained": name in trained}
                written.write(file, partial(save_like, item.image[0], labels), **facts)
                now.append(name)
                if name in trained:
                    keep_record()  # at once: a run that is stopped must not leave a trained case unmarked
            made.append(out / file)
        # What is wrong with one image, or with its size, is not wrong with the next; a full disk is.
        except (InputError, ValueError, RuntimeError, MemoryError) as error:
            if os.environ.get("DAE_DEBUG") == "1":
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            failed.append(reason if str(item.image[0]) in reason else f"{item.image[0]}: {reason}")
    print(f"{counted(made, 'label map')} in {out}" + f", {kept} of them from before" * (kept > 0))
    if made:
        keep_record()
    if known := sorted(trained) if config.images else []:
        say(
            f"warning: the network was trained on {counted(known, 'image')} of these, as {known[0]}; score refuses them"
        )
    if failed:
        raise InputError(
            f"{len(failed)} of {len(items)} cases could not be predicted: {'; '.join(failed)}"
        )
    return made


def score(config: ScoreConfig) -> dict[str, Any]:
    """scores.csv, summary.json, figures/ and report.html, of predictions against labels on the labels' own grids."""
    written = Written(folder(config))
    classes, pairs, images, by_class, ignore = truths_of(config)
    inputs = [path for pair in pairs for path in (pair.prediction, pair.label)] + [
        *images.values(),
        Path(config.data),
    ]
    written.check(("scores.csv", "summary.json", "report.html", "figures/distribution.png"), inputs)
    tolerance = (
        {label: by_class.get(label, config.tolerance) for label in classes}
        if by_class
        else config.tolerance
    )
    how: dict[str, Any] = {
        "tolerance": tolerance,
        "definition": config.definition,
        "ignore": ignore,
    }
    rows, diagonals, labels = scoring.score(pairs, classes, **how)
    summary = statistics.summarise(rows, policy=config.policy, diagonals=diagonals, **how) | {
        "labels": labels
    }
    pictures = report.figures(rows, pairs, images=images, ignore=ignore)
    written.check(f"figures/{name}.png" for name in pictures)
    written.write("scores.csv", partial(scoring.write_scores, rows))
    written.write("summary.json", partial(report.write_summary, summary))
    for name, picture in pictures.items():
        written.write(f"figures/{name}.png", partial(Path.write_bytes, data=picture))
    page = written.write("report.html", partial(report.write_page, rows, summary, pictures))
    dice = summary["mean_of_cases"]["dice"]
    cases = f"{dice['n']} case{'s' * (dice['n'] != 1)}"
    print(f"mean Dice {dice['mean']:.4f} over {cases}, {len(classes)} classes; see {page}")
    return summary


def tune(config: TuneConfig) -> postprocess.Plan:
    """postprocess.json: for each class the steps that raise the Dice of validation cases, and no others."""
    written = Written(folder(config))
    classes, pairs, _, _, ignore = truths_of(config)
    written.check(["postprocess.json"], [Path(config.data)])
    cases = [
        scoring.read_case(pair.prediction, pair.label, classes, ignore=ignore) for pair in pairs
    ]
    plan, table = postprocess.choose(cases, classes)
    written.write("postprocess.json", partial(postprocess.save, plan))
    print(postprocess.as_text(table))
    return plan


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Paired tests of two sets of scores, per class and overall; printed, and written where --out says."""
    files = [scores_file(name) for name in (config.a, config.b)]
    written = tables_in(config.out, "compare")
    say(
        report.check_terms(
            [(name, report.terms_of(file)) for name, file in zip((config.a, config.b), files)]
        )
    )
    a, b = (scoring.read_scores(file) for file in files)
    found = statistics.compare(a, b, seed=config.seed)
    if written:
        write_tables(written, found, "compare")
    print(report.comparison_text(found, a=config.a, b=config.b))
    return found


def folds(config: FoldsConfig) -> list[dict[str, Any]]:
    """A table over folds, or over seeds: printed, and written where --out says."""
    files = [scores_file(name) for name in config.scores or ("",)]
    names = scoring.case_names([file.absolute().parent for file in files])
    written = tables_in(config.out, "folds")
    say(report.check_terms([(name, report.terms_of(file)) for name, file in zip(names, files)]))
    runs = [(name, scoring.read_scores(file)) for name, file in zip(names, files)]
    table = statistics.fold_table(runs, seed=config.seed)
    if written:
        write_tables(written, table, "folds")
    print(report.fold_text(table))
    return table


# --- what the commands are made of


def folder(config: CasesConfig) -> Path:
    """Where results go, if they can. It is made with its first file: what is refused leaves nothing behind."""
    if not config.out:
        raise InputError("--out: name a folder for what is made")
    checkpoint.check_out_folder(Path(config.out), resume=True)
    return Path(config.out)


def tables_in(out: str, name: str) -> Written | None:
    """Where the tables of `compare` and `folds` go, if they are written at all."""
    if not out:
        return None
    checkpoint.check_out_folder(Path(out), resume=True)
    written = Written(Path(out))
    written.check((f"{name}.csv", f"{name}.json"))
    return written


def write_tables(written: Written, lines: Sequence[dict[str, Any]], name: str) -> None:
    written.write(f"{name}.csv", partial(report.write_table, lines))
    written.write(f"{name}.json", partial(report.write_lines, lines))


def say(warning: str) -> None:
    if warning:
        print(warning, file=sys.stderr)


def counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


# --- predict: checkpoints


def members_of(
    config: PredictConfig, device: torch.device
) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """What each checkpoint says of itself, and its network. Raises InputError where they make no ensemble."""
    saved, networks = list[dict[str, Any]](), list[nn.Module]()
    for name in config.checkpoint:
        state, network = member(name, saved[0]["plan"] if saved else None, config, device)
        saved.append(state)
        networks.append(network)
    if not saved:
        raise InputError("--checkpoint: give the best.pt of a fine-tuning run, or several")
    return saved, networks


def member(
    name: str, first: Mapping[str, Any] | None, config: PredictConfig, device: torch.device
) -> tuple[dict[str, Any], nn.Module]:
    """A checkpoint without what is LARGE in it, and its network. `first` is the plan that it must agree with."""
    state = checkpoint.load(Path(name))
    if first is None and not state["plan"]["classes"]:
        raise InputError(f"--checkpoint {name}: names no classes; fine-tune it with train_seg.py")
    plan = trained_plan(state)
    for fact in SHARED:
        if first is not None and plan.get(fact) != first.get(fact):
            raise InputError(
                f"--checkpoint {name}: its {fact} differs from that of {config.checkpoint[0]}"
            )
    network = network_of(plan, state["model"], device, config, name)
    return {key: value for key, value in state.items() if key not in LARGE} | {
        "plan": plan
    }, network


def trained_plan(state: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a checkpoint, with what older ones leave to its configuration."""
    plan, config = dict(state["plan"]), state.get("config", {})
    plan.setdefault("flip_axes", ())
    flips = flips_of(plan, config)
    cut = plan.get("foreground_crop", config.get("foreground_crop", False))
    return plan | {
        "foreground_crop": cut,
        "flip_axes": flips.axes,
        "swap": flips.swap,
        "swap_axes": flips.swap_axes,
    }


def network_of(
    plan: Mapping[str, Any],
    weights: Mapping[str, Any],
    device: torch.device,
    config: PredictConfig,
    name: str,
) -> nn.Module:
    path = Path(name)
    try:
        network = backbone_of(plan, config, path)(
            plan["in_channels"], plan["out_channels"], **with_tuples(plan["arguments"])
        )
    except TypeError as error:  # a network of the user's own, changed since
        raise InputError(
            f"{path}: {plan['backbone']} does not take its options any more ({error})"
        ) from error
    checkpoint.load_weights(network, weights, path)
    network = network.to(device).eval()
    lay_out(network, device, compiled=False)
    return network


def averaging(config: PredictConfig, plan: Mapping[str, Any]) -> str:
    """Which flips --tta averages over, and what is known to be wrong with the network's own, in words."""
    names = {int(label): name for label, name in plan["classes"].items()}
    mixed = (
        [] if plan["swap"] or "flips" in plan or 0 not in plan["flip_axes"] else likely_pairs(names)
    )
    doubt = (
        f"; trained with left-right flips, so {in_words(mixed, names)} may be taken for each other"
        if mixed
        else ""
    )
    if not config.tta:
        return f"no flips{doubt}"
    if not plan["flip_axes"]:
        return "no flips: --tta takes those of the training, which had none"
    axes = ", ".join(f"{axis} ({AXES[axis]})" for axis in plan["flip_axes"])
    exchange = f", {in_words(plan['swap'], names)} change places" if plan["swap"] else ""
    return f"averaged over flips along axes {axes}{exchange}{doubt}"


def predictor(
    network: nn.Module, dtype: torch.dtype | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with autocast(dtype, device):
            return network(x)  # type: ignore[no-any-return]

    return forward


def cases_of(
    config: CasesConfig, modality: str, seen: leaks.Seen, unknown: Sequence[str] = ()
) -> tuple[DataList, Sequence[Item]]:
    """The list, and its items of --split; `validation` is what the fine-tuning run held out, as far as it is `seen`.

    `unknown` are checkpoints of older versions, which drew five folds otherwise. Raises InputError.
    """
    items = datalist.load(config.data, root=config.data_root, modality=modality)
    if config.split == "validation":
        items = holdout.for_evaluation(
            items,
            config.data,
            seen,
            fold=config.fold,
            split_seed=config.split_seed,
            older=unknown,
            allow_trained=config.allow_trained,
        )
        if items.notes:
            print("; ".join(items.notes))
    chosen: Sequence[Item] = getattr(items, config.split)
    if not chosen:
        raise InputError(f"--split {config.split}: {config.data} has no such items")
    return items, chosen


def known_cases(
    config: PredictConfig,
    items: Sequence[Item],
    names: Sequence[str],
    seen: leaks.Seen,
    unknown: Sequence[str],
) -> set[str]:
    """Cases whose subject the checkpoints were trained on; refused without --allow-trained. Raises InputError."""
    if unknown:
        print(
            f"warning: {unknown[0]}: an older version wrote it, which does not say whom it was trained on"
        )
    if config.images:
        return set()  # a file has no subject; its voxels are looked at
    trained = [names[n] for n in leaks.trained_among(items, seen)]
    if not config.allow_trained:
        leaks.refuse_trained(trained, f"--data {config.data}", "predict")
    return set(trained)


# --- predict: images


def images_of(config: PredictConfig, plan: Mapping[str, Any]) -> list[Item]:
    """Single files and folders of them, without labels, as items of the checkpoint's modality."""
    kinds = plan["modalities"]
    kind = config.modality or (kinds[0] if len(kinds) == 1 else "")
    intensity = known_intensity(kind, plan, f"--modality {kind or '(none)'}")
    found: list[Path] = []
    for name in config.images:
        path = Path(name)
        if not path.exists():
            raise InputError(f"--images {path}: no such file")
        inside = scoring.volumes_in(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"--images {path}: no .nii or .nii.gz files in it")
        found += inside
    return [Item((path,), tuple(kind.split("+")), intensity, path.name) for path in found]


def known_intensity(kind: str, plan: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """How the network's training normalised a modality. Raises InputError on one that it never met."""
    known = plan["intensity"]
    if kind not in known:
        raise InputError(f"{where}: the network knows {', '.join(known)}; name the images' own")
    return tuple(known[kind])


def check_classes(labels: Mapping[int, str], plan: Mapping[str, Any], data: str) -> None:
    """Raises InputError where the list gives a label of the checkpoint another name: it is another task's."""
    for label, name in labels.items():
        known = plan["classes"].get(str(label), name)
        if label != 0 and known.casefold() != name.casefold():
            raise InputError(
                f"--data {data}: label {label} is {name!r} there and {known!r} in the checkpoint"
            )


def check_intensity(item: Item, plans: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError unless every network has met the item's modality, normalised as the item is."""
    for plan in plans:
        known = known_intensity(
            item.modality_name, plan, f"{item.image[0]}: modality {item.modality_name}"
        )
        names = {"mr": plan["mr_intensity"]}
        here = "+".join(names.get(how, how) for how in item.intensity)
        there = "+".join(names.get(how, how) for how in known)
        if here != there:
            raise InputError(
                f"{item.image[0]}: intensity {here}, but the network was trained on {item.modality_name} by {there}; "
                "change it in the list"
            )


def source_of(item: Item) -> dict[str, Any]:
    """What a label map was made from. Raises InputError where a file is not there."""
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
    """Whether a label map of this very image is there. Where the image lies does not matter."""
    then = written.last(file).get("source", {})
    same = all(then.get(fact) == source[fact] for fact in ("sha256", "modality", "intensity"))
    return same and written.is_whole(file)


def settings_of(config: PredictConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """All that decides a label map beside its image, by flag."""
    return {
        "checkpoint": [checkpoint.seal_of(Path(name))[:16] for name in config.checkpoint],
        "tta": config.tta,
        "overlap": config.overlap,
        "ensemble": config.ensemble,
        "amp": str(dtype),
        "postprocess": sha256_of([Path(config.postprocess)])[:16] if config.postprocess else "",
    }


def check_targets(written: Written, items: Mapping[str, Item], settings: Mapping[str, Any]) -> None:
    """Raises InputError where label maps would replace inputs, or lie among those of other settings or images."""
    inputs = [path for item in items.values() for path in item.image]
    inputs += [item.label for item in items.values() if item.label]
    check_apart(written.folder, inputs)
    written.check((f"{name}.nii.gz" for name in items), inputs)

    for file in sorted({line["file"] for line in written.lines if "settings" in line}):
        if not (written.folder / file).exists():
            continue
        then, where = written.last(file), f"--out {written.folder}: {file}"
        for flag, value in settings.items():
            if then["settings"].get(flag) != value:
                was = then["settings"].get(flag)
                raise InputError(
                    f"{where} was predicted with another --{flag} ({was}); name another folder"
                )
        item, source = items.get(scoring.case_name(Path(file))), then["source"]
        if item and is_another_image(item, source):
            raise InputError(
                f"{where} was predicted from {source['images'][0]}; name another folder"
            )


def is_another_image(item: Item, source: Mapping[str, Any]) -> bool:
    """Whether an item has other files than a label map was made from, and they hold other bytes as well."""
    if [str(path.absolute()) for path in item.image] == source["images"]:
        return False  # a file that has changed in its place is predicted again
    return (
        not all(path.is_file() for path in item.image) or sha256_of(item.image) != source["sha256"]
    )


def predicted(
    item: Item,
    volume: Volume,
    predictors: Sequence[Callable[[Tensor], Tensor]],
    plan: Mapping[str, Any],
    recipe: Recipe,
    config: PredictConfig,
    device: torch.device,
    steps: postprocess.Plan,
) -> Labels:
    """The label map of one image (d, h, w), on the image's own grid. Raises InputError."""
    prepared = normalise(volume, item, recipe)
    if len(prepared.data) != plan["in_channels"]:
        raise InputError(
            f"{item.image[0]}: {len(prepared.data)} channels, the network takes {plan['in_channels']}"
        )
    classes = [int(label) for label in plan["classes"]]
    slabs = sliding_window(
        prepared.data,
        predictors,
        window=tuple(plan["crop"]),
        classes=len(classes),
        overlap=config.overlap,
        batch=config.batch,
        device=device,
        background=prepared.background.tolist(),
        flips=plan["flip_axes"] if config.tta else (),
        combine=config.ensemble,
        swap=[(classes.index(a), classes.index(b)) for a, b in plan["swap"]],
        swap_axes=plan["swap_axes"],
    )
    slabs = in_place(slabs, prepared.box, prepared.grid) if prepared.box else slabs
    places = label_map(slabs, prepared.grid, volume.data.shape[1:])
    labels: Labels = np.array(classes, dtype=np.uint8)[places]
    return postprocess.apply(labels, steps, volume.spacing) if steps else labels


# --- score and tune: predictions and labels


class Truths(NamedTuple):
    """What predictions are scored against."""

    classes: dict[int, str]  # without the background and what is ignored
    pairs: list[scoring.Pair]
    images: dict[str, Path]  # by case, where known
    tolerance: dict[int, float]  # of NSD in mm, where the list says so
    ignore: int | None


def truths_of(config: TruthsConfig) -> Truths:
    """The files of every case and what they hold, of a list or of two folders. Raises InputError."""
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
    record = leaks.read_record(Path(config.predictions))
    if config.labels:
        pairs, images = (
            scoring.pair(Path(config.predictions), Path(config.labels)),
            dict[str, Path](),
        )
        tolerance, ignore = dict[int, float](), config.ignore
        named = scoring.classes_in(pair.label for pair in pairs)
    else:
        items, cases = cases_of(
            config, "mr", record
        )  # scoring reads no intensity; a list that names no modality will do
        names = scoring.case_names([item.image[0] for item in cases])
        pairs = scoring.pair(
            Path(config.predictions), [(name, item.label) for name, item in zip(names, cases)]
        )
        images = {name: item.image[0] for name, item in zip(names, cases)}
        named, tolerance = items.labels, items.tolerance
        ignore = items.ignore if config.ignore is None else config.ignore
    if not config.allow_trained:
        trained = [pair.case for pair in pairs if pair.case in record.get("trained", ())]
        leaks.refuse_trained(trained, f"--predictions {config.predictions}", "score")
    classes = {label: name for label, name in named.items() if label not in (0, ignore)}
    if not classes:
        raise InputError(
            f"{config.labels or config.data}: names no class to score but background and what is ignored"
        )
    return Truths(classes, pairs, images, tolerance, ignore)


def scores_file(name: str) -> Path:
    path = Path(name)
    path = path / "scores.csv" if path.is_dir() else path
    if not name or not path.is_file():
        raise InputError(f"{name or '(none)'}: no scores.csv there; eval.py score writes one")
    return path


COMMANDS: dict[str, Callable[[Any], object]] = {
    "predict": predict,
    "score": score,
    "tune": tune,
    "compare": compare,
    "folds": folds,
}

if __name__ == "__main__":
    run_or_explain(lambda: COMMANDS[COMMAND[0][0]](COMMAND[0][1]), f"eval.py {COMMAND[0][0]}")
