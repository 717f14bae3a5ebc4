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

from dae.config import InputError, from_command_line, run_or_explain, with_tuples
from dae.config_seg import CompareConfig, FoldsConfig, PredictConfig, ScoreConfig, TuneConfig

# What all checkpoints of an ensemble must agree on.
SHARED = ("classes", "in_channels", "spacing", "crop", "ct_window", "mr_intensity", "foreground_crop", "flip_axes")
CONFIGS = {
    "predict": PredictConfig, "score": ScoreConfig, "tune": TuneConfig, "compare": CompareConfig, "folds": FoldsConfig,
}  # fmt: skip


def read_command() -> tuple[str, object]:
    """The command and its configuration, from this process's arguments; without torch."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    command, *rest = arguments
    if command not in CONFIGS:
        raise InputError(f"{command}: not a command; take one of {', '.join(CONFIGS)}")
    for flag, at in {"compare": (("--a", 0), ("--b", 2)), "folds": (("--scores", 0),)}.get(command, ()):
        if len(rest) > at and not rest[at].startswith("-"):
            rest.insert(at, flag)
    return command, from_command_line(CONFIGS[command], prog=f"eval.py {command}", description=__doc__, arguments=rest)


if __name__ == "__main__":
    COMMAND: list[tuple[str, object]] = []
    run_or_explain(lambda: COMMAND.append(read_command()), "eval.py")

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dae.config_seg import CasesConfig, TruthsConfig
from dae.data import datalist, leaks
from dae.data.datalist import DataList, Item
from dae.data.nifti import read_channels
from dae.data.preprocess import Recipe, normalise
from dae.evaluation import postprocess, report, scoring, statistics
from dae.evaluation.inference import in_place, label_map, save_like, sliding_window
from dae.evaluation.metrics import Labels
from dae.training import checkpoint
from dae.training.distributed import start
from dae.training.precision import autocast, autocast_type
from dae.training.transfer import backbone_of


def predict(config: PredictConfig) -> list[Path]:
    """One label map for each image, on the image's own grid, as <case>.nii.gz. Returns their paths."""
    out = folder(config)
    device = start(config.device).device
    saved = [checkpoint.load(Path(name)) for name in config.checkpoint]
    if not saved:
        raise InputError("--checkpoint: give the best.pt of a fine-tuning run, or several")
    plan = one_plan(saved, config)
    networks = [network_of(state, device, config, name) for state, name in zip(saved, config.checkpoint)]
    dtype = autocast_type(config.amp, device)
    steps = postprocess.load(Path(config.postprocess)) if config.postprocess else {}
    if config.images and config.data:
        raise InputError("--images: not beside --data; give one of them")
    seen, unknown = leaks.seen_of(saved, config.checkpoint)
    items = images_of(config, plan) if config.images else cases_of(config, config.modality, seen, unknown)[1]
    if lost := [path for item in items for path in item.image if not path.is_file()]:
        raise InputError(f"{lost[0]}: no such file")
    names = scoring.case_names([item.image[0] for item in items])
    trained = known_cases(config, items, names, seen, unknown)
    cut = plan.get(
        "foreground_crop", saved[0].get("config", {}).get("foreground_crop", False)
    )  # older plans are silent
    recipe = Recipe(tuple(plan["spacing"]), tuple(plan["ct_window"]), plan["mr_intensity"], cut)
    classes = np.array([int(label) for label in plan["classes"]], dtype=np.uint8)
    written = []
    for item, name in tqdm(list(zip(items, names)), "predicting", disable=not sys.stderr.isatty()):
        volume = read_channels(item.image)
        if leaks.is_trained(volume.data, seen):
            if not config.images and not config.allow_trained:
                leaks.refuse_trained([name], str(item.image[0]), "predict")
            trained.add(name)
        prepared = normalise(volume, item, recipe)
        if len(prepared.data) != plan["in_channels"]:
            raise InputError(f"{item.image[0]}: {len(prepared.data)} channels, the network takes {plan['in_channels']}")
        slabs = sliding_window(
            prepared.data, [predictor(network, dtype, device) for network in networks], window=tuple(plan["crop"]),
            classes=len(classes), overlap=config.overlap, batch=config.batch, device=device,
            background=prepared.background.tolist(), flips=plan["flip_axes"] if config.tta else (),
            combine=config.ensemble,
        )  # fmt: skip
        slabs = in_place(slabs, prepared.box, prepared.grid) if prepared.box else slabs
        labels: Labels = classes[label_map(slabs, prepared.grid, volume.data.shape[1:])]
        labels = postprocess.apply(labels, steps, volume.spacing) if steps else labels
        save_like(item.image[0], labels, made(out) / f"{name}.nii.gz")
        written.append(out / f"{name}.nii.gz")
    leaks.write_record(out, seen, split="" if config.images else config.split, cases=names, trained=sorted(trained))
    print(f"{len(written)} label maps in {out}")
    return written


def score(config: ScoreConfig) -> dict[str, Any]:
    """scores.csv, summary.json, figures/ and report.html, of predictions against labels on the labels' own grids."""
    out = folder(config)
    classes, pairs, images, by_class, ignore = truths_of(config)
    tolerance = {label: by_class.get(label, config.tolerance) for label in classes} if by_class else config.tolerance
    how: dict[str, Any] = {"tolerance": tolerance, "definition": config.definition, "ignore": ignore}
    rows, diagonals = scoring.score(pairs, classes, **how)
    summary = statistics.summarise(rows, policy=config.policy, diagonals=diagonals, **how)
    scoring.write_scores(rows, made(out) / "scores.csv")
    report.write_summary(summary, out / "summary.json")
    pictures = report.figures(rows, pairs, out / "figures", images=images, ignore=ignore)
    report.write_page(rows, summary, pictures, out / "report.html")
    dice = summary["mean_of_cases"]["dice"]
    cases = f"{dice['n']} case{'s' * (dice['n'] != 1)}"
    print(f"mean Dice {dice['mean']:.4f} over {cases}, {len(classes)} classes; see {out / 'report.html'}")
    return summary


def tune(config: TuneConfig) -> postprocess.Plan:
    """postprocess.json: for each class the steps that raise the Dice of validation cases, and no others."""
    out = folder(config)
    classes, pairs, _, _, ignore = truths_of(config)
    cases = [scoring.read_case(pair.prediction, pair.label, classes, ignore=ignore) for pair in pairs]
    plan, table = postprocess.choose(cases, classes)
    postprocess.save(plan, made(out) / "postprocess.json")
    print(postprocess.as_text(table))
    return plan


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Paired tests of two sets of scores, per class and overall; printed, and written where --out says."""
    a, b = (scoring.read_scores(scores_file(name)) for name in (config.a, config.b))
    found = statistics.compare(a, b, seed=config.seed)
    if config.out:
        report.write_comparison(found, made(Path(config.out)))
    print(report.comparison_text(found, a=config.a, b=config.b))
    return found


def folds(config: FoldsConfig) -> list[dict[str, Any]]:
    """A table over folds, or over seeds: printed, and written where --out says."""
    files = [scores_file(name) for name in config.scores or ("",)]
    names = scoring.case_names([file.absolute().parent for file in files])
    table = statistics.fold_table([(name, scoring.read_scores(file)) for name, file in zip(names, files)],
                                  seed=config.seed)  # fmt: skip
    if config.out:
        report.write_comparison(table, made(Path(config.out)), "folds")
    print(report.fold_text(table))
    return table


# --- what the commands are made of


def folder(config: CasesConfig) -> Path:
    """Where results go, if they can. It is `made` when the first is there: what is refused leaves nothing behind."""
    if not config.out:
        raise InputError("--out: name a folder for what is made")
    checkpoint.check_out_folder(Path(config.out), resume=True)
    return Path(config.out)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def one_plan(saved: Sequence[Mapping[str, Any]], config: PredictConfig) -> dict[str, Any]:
    """The plan that all checkpoints of an ensemble share. Raises InputError where they do not."""
    first = saved[0]["plan"]
    if not first["classes"]:
        raise InputError(f"--checkpoint {config.checkpoint[0]}: names no classes; fine-tune it with train_seg.py")
    for name, state in zip(config.checkpoint, saved):
        for fact in SHARED:
            if state["plan"].get(fact) != first.get(fact):
                raise InputError(f"--checkpoint {name}: its {fact} differs from that of {config.checkpoint[0]}")
    return dict(first)


def network_of(state: Mapping[str, Any], device: torch.device, config: PredictConfig, name: str) -> nn.Module:
    plan, path = state["plan"], Path(name)
    try:
        network = backbone_of(plan, config, path)(
            plan["in_channels"], plan["out_channels"], **with_tuples(plan["arguments"])
        )
    except TypeError as error:  # a network of the user's own, changed since
        raise InputError(f"{path}: {plan['backbone']} does not take its options any more ({error})") from error
    checkpoint.load_weights(network, state["model"], path)
    return network.to(device).eval()


def predictor(network: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Callable[[Tensor], Tensor]:
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
        drawn = not items.validation and not datalist.has_folds(items)
        if drawn and unknown and config.fold is None and not config.allow_trained:
            raise InputError(
                f"--checkpoint {unknown[0]}: an older version wrote it, and drew the folds of {config.data} otherwise; "
                'write "fold" into the list, or name another --split'
            )
        items = leaks.held_out(items, seen, fold=config.fold, split_seed=config.split_seed)
        if items.notes:
            print("; ".join(items.notes))
    chosen: Sequence[Item] = getattr(items, config.split)
    if not chosen:
        raise InputError(f"--split {config.split}: {config.data} has no such items")
    return items, chosen


def known_cases(
    config: PredictConfig, items: Sequence[Item], names: Sequence[str], seen: leaks.Seen, unknown: Sequence[str]
) -> set[str]:
    """Cases whose subject the checkpoints were trained on; refused without --allow-trained. Raises InputError."""
    leaks.read_record(Path(config.out))  # that it can be added to is known before anything is predicted
    if unknown:
        print(f"warning: {unknown[0]}: an older version wrote it, which does not say whom it was trained on")
    if config.images:
        return set()  # a file has no subject; its voxels are looked at
    trained = [names[n] for n in leaks.trained_among(items, seen)]
    if not config.allow_trained:
        leaks.refuse_trained(trained, f"--data {config.data}", "predict")
    return set(trained)


def images_of(config: PredictConfig, plan: Mapping[str, Any]) -> list[Item]:
    """Single files and folders of them, without labels, as items of the checkpoint's modality."""
    kinds = plan["modalities"]
    kind = config.modality or (kinds[0] if len(kinds) == 1 else "")
    if kind not in plan["intensity"]:
        raise InputError(f"--modality {kind or '(none)'}: the network knows {', '.join(kinds)}; name the images' own")
    found: list[Path] = []
    for name in config.images:
        path = Path(name)
        inside = sorted(p for p in path.glob("*") if p.name.endswith((".nii", ".nii.gz"))) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"--images {path}: no .nii or .nii.gz files in it")
        found += inside
    return [Item((path,), tuple(kind.split("+")), tuple(plan["intensity"][kind]), path.name) for path in found]


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
        raise InputError("--ignore 0: is the background; a label of what was not annotated is another number")
    if config.labels and config.data:
        raise InputError("--labels: not beside --data, whose list names the labels; give one of them")
    record = leaks.read_record(Path(config.predictions))
    if config.labels:
        pairs, images = scoring.pair(Path(config.predictions), Path(config.labels)), dict[str, Path]()
        tolerance, ignore = dict[int, float](), config.ignore
        named = scoring.classes_in(pair.label for pair in pairs)
    else:
        items, cases = cases_of(
            config, "mr", record
        )  # scoring reads no intensity; a list that names no modality will do
        names = scoring.case_names([item.image[0] for item in cases])
        pairs = scoring.pair(Path(config.predictions), [(name, item.label) for name, item in zip(names, cases)])
        images = {name: item.image[0] for name, item in zip(names, cases)}
        named, tolerance = items.labels, items.tolerance
        ignore = items.ignore if config.ignore is None else config.ignore
    if not config.allow_trained:
        trained = [pair.case for pair in pairs if pair.case in record.get("trained", ())]
        leaks.refuse_trained(trained, f"--predictions {config.predictions}", "score")
    classes = {label: name for label, name in named.items() if label not in (0, ignore)}
    if not classes:
        raise InputError(f"{config.labels or config.data}: names no class to score but background and what is ignored")
    return Truths(classes, pairs, images, tolerance, ignore)


def scores_file(name: str) -> Path:
    path = Path(name)
    path = path / "scores.csv" if path.is_dir() else path
    if not name or not path.is_file():
        raise InputError(f"{name or '(none)'}: no scores.csv there; eval.py score writes one")
    return path


COMMANDS: dict[str, Callable[[Any], object]] = {
    "predict": predict, "score": score, "tune": tune, "compare": compare, "folds": folds,
}  # fmt: skip

if __name__ == "__main__":
    run_or_explain(lambda: COMMANDS[COMMAND[0][0]](COMMAND[0][1]), f"eval.py {COMMAND[0][0]}")
