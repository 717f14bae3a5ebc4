"""Predict, score, tune and compare segmentations.

python eval.py predict --checkpoint runs/seg/best.pt --data list.json --split test --out predictions
python eval.py predict --checkpoint fold*/best.pt --images scan.nii.gz folder --tta --out predictions
python eval.py score   --predictions predictions --data list.json --split test --out scores
python eval.py tune    --predictions predictions --data list.json --split validation --out plan
python eval.py compare scores_a scores_b --out comparison

Each command has its own --help.
"""

import sys

from dae.config import InputError, from_command_line, run_or_explain
from dae.config_seg import CompareConfig, PredictConfig, ScoreConfig, TuneConfig

CONFIGS = {"predict": PredictConfig, "score": ScoreConfig, "tune": TuneConfig, "compare": CompareConfig}


def read_command() -> tuple[str, object]:
    """The command and its configuration, from this process's arguments; without torch."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    command, *rest = arguments
    if command not in CONFIGS:
        raise InputError(f"{command}: not a command; take one of {', '.join(CONFIGS)}")
    if command == "compare" and len(rest) > 1 and not rest[0].startswith("-") and not rest[1].startswith("-"):
        rest = ["--a", rest[0], "--b", rest[1], *rest[2:]]
    return command, from_command_line(CONFIGS[command], prog=f"eval.py {command}", description=__doc__, arguments=rest)


if __name__ == "__main__":
    COMMAND: list[tuple[str, object]] = []
    run_or_explain(lambda: COMMAND.append(read_command()), "eval.py")

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dae.config_seg import CasesConfig
from dae.data import datalist
from dae.data.datalist import DataList, Item
from dae.data.nifti import read_channels
from dae.data.preprocess import Recipe, normalise
from dae.evaluation import postprocess, report, scoring, statistics
from dae.evaluation.inference import label_map, save_like, sliding_window
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
    items = images_of(config, plan) if config.images else cases_of(config, config.modality)[1]
    names = scoring.case_names([item.image[0] for item in items])
    recipe = Recipe(tuple(plan["spacing"]), tuple(plan["ct_window"]), plan["mr_intensity"])
    classes = np.array([int(label) for label in plan["classes"]], dtype=np.uint8)
    written = []
    for item, name in tqdm(list(zip(items, names)), "predicting", disable=not sys.stderr.isatty()):
        volume = read_channels(item.image)
        prepared = normalise(volume, item, recipe)
        if len(prepared.data) != plan["in_channels"]:
            raise InputError(f"{item.image[0]}: {len(prepared.data)} channels, the network takes {plan['in_channels']}")
        slabs = sliding_window(
            prepared.data, [predictor(network, dtype, device) for network in networks], window=tuple(plan["crop"]),
            classes=len(classes), overlap=config.overlap, batch=config.batch, device=device,
            background=prepared.background.tolist(), flips=plan["flip_axes"] if config.tta else (),
            combine=config.ensemble,
        )  # fmt: skip
        labels: Labels = classes[label_map(slabs, prepared.data.shape[1:], volume.data.shape[1:])]
        labels = postprocess.apply(labels, steps, volume.spacing) if steps else labels
        save_like(item.image[0], labels, out / f"{name}.nii.gz")
        written.append(out / f"{name}.nii.gz")
    print(f"{len(written)} label maps in {out}")
    return written


def score(config: ScoreConfig) -> dict[str, Any]:
    """scores.csv, summary.json, figures/ and report.html, of predictions against labels on the labels' own grids."""
    out = folder(config)
    classes, pairs, images = truths_of(config)
    rows, diagonals = scoring.score(pairs, classes, tolerance=config.tolerance, definition=config.definition)
    summary = statistics.summarise(
        rows, policy=config.policy, diagonals=diagonals, definition=config.definition, tolerance=config.tolerance
    )  # fmt: skip
    scoring.write_scores(rows, out / "scores.csv")
    report.write_summary(summary, out / "summary.json")
    pictures = report.figures(rows, pairs, out / "figures", images=images)
    report.write_page(rows, summary, pictures, out / "report.html")
    dice = summary["mean_of_cases"]["dice"]
    print(f"mean Dice {dice['mean']:.4f} over {dice['n']} cases, {len(classes)} classes; see {out / 'report.html'}")
    return summary


def tune(config: TuneConfig) -> postprocess.Plan:
    """postprocess.json: for each class the steps that raise the Dice of validation cases, and no others."""
    out = folder(config)
    classes, pairs, _ = truths_of(config)
    cases = [scoring.read_case(pair.prediction, pair.label, classes) for pair in pairs]
    plan, table = postprocess.choose(cases, classes)
    postprocess.save(plan, out / "postprocess.json")
    print(postprocess.as_text(table))
    return plan


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Paired tests of two sets of scores, per class and overall; printed, and written where --out says."""
    a, b = (scoring.read_scores(scores_file(name)) for name in (config.a, config.b))
    found = statistics.compare(a, b, seed=config.seed)
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        report.write_comparison(found, Path(config.out))
    print(report.comparison_text(found, a=config.a, b=config.b))
    return found


# --- what the commands are made of


def folder(config: CasesConfig) -> Path:
    if not config.out:
        raise InputError("--out: name a folder for what is made")
    path = Path(config.out)
    path.mkdir(parents=True, exist_ok=True)
    return path


def one_plan(saved: Sequence[Mapping[str, Any]], config: PredictConfig) -> dict[str, Any]:
    """The plan that all checkpoints of an ensemble share. Raises InputError where they do not."""
    first = saved[0]["plan"]
    if not first["classes"]:
        raise InputError(f"--checkpoint {config.checkpoint[0]}: was pre-trained, not fine-tuned; it has no classes")
    for name, state in zip(config.checkpoint, saved):
        for fact in ("classes", "in_channels", "spacing", "crop", "ct_window", "mr_intensity", "flip_axes"):
            if state["plan"][fact] != first[fact]:
                raise InputError(f"--checkpoint {name}: its {fact} differs from that of {config.checkpoint[0]}")
    return dict(first)


def network_of(state: Mapping[str, Any], device: torch.device, config: PredictConfig, name: str) -> nn.Module:
    plan = state["plan"]
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in plan["arguments"].items()}
    network = backbone_of(plan, config, Path(name))(plan["in_channels"], plan["out_channels"], **arguments)
    network.load_state_dict(state["model"])
    return network.to(device).eval()


def predictor(network: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with autocast(dtype, device):
            return network(x)  # type: ignore[no-any-return]

    return forward


def cases_of(config: CasesConfig, modality: str) -> tuple[DataList, Sequence[Item]]:
    """The list, and its items of --split; `validation` is what a fine-tuning run of that fold held out."""
    items = datalist.load(config.data, root=config.data_root, modality=modality)
    if config.split == "validation" and not items.validation:
        folded = any(item.fold is not None for item in items.training)
        split = datalist.hold_out if folded else datalist.five_folds
        items = split(items, fold=config.fold, split_seed=config.split_seed)
    chosen: Sequence[Item] = getattr(items, config.split)
    if not chosen:
        raise InputError(f"--split {config.split}: {config.data} has no such items")
    return items, chosen


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


def truths_of(
    config: ScoreConfig | TuneConfig,
) -> tuple[dict[int, str], list[scoring.Pair], dict[str, Path]]:
    """Classes without the background, the files of every case, and the image of a case where known."""
    if not config.predictions or not Path(config.predictions).is_dir():
        raise InputError(f"--predictions {config.predictions or '(none)'}: no such folder")
    labels = getattr(config, "labels", "")
    if labels:
        pairs = scoring.pair(Path(config.predictions), Path(labels))
        return scoring.classes_in(pair.label for pair in pairs), pairs, {}
    items, cases = cases_of(config, "mr")  # scoring reads no intensity; a list that names no modality will do
    names = scoring.case_names([item.image[0] for item in cases])
    pairs = scoring.pair(Path(config.predictions), [(name, item.label) for name, item in zip(names, cases)])
    classes = {label: name for label, name in items.labels.items() if label}
    return classes, pairs, {name: item.image[0] for name, item in zip(names, cases)}


def scores_file(name: str) -> Path:
    path = Path(name)
    path = path / "scores.csv" if path.is_dir() else path
    if not name or not path.is_file():
        raise InputError(f"{name or '(none)'}: no scores.csv there; eval.py score writes one")
    return path


COMMANDS: dict[str, Callable[[Any], object]] = {"predict": predict, "score": score, "tune": tune, "compare": compare}

if __name__ == "__main__":
    run_or_explain(lambda: COMMANDS[COMMAND[0][0]](COMMAND[0][1]), f"eval.py {COMMAND[0][0]}")
