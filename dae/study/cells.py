"""The cells of a study, in the order in which they are run, and the commands of each.

A cell is one fine-tuning run with what is made of it: its predictions and its scores. Its weights
come from a pre-training run that other cells share.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dae.config.command_line import parse
from dae.config.segment import SegConfig
from dae.config.shared import FREE_ON_RESUME
from dae.data.nnunet import splits_file
from dae.errors import InputError
from dae.study.plan import Flags, Labels, Plan, StepName, arguments

SCRIPTS = Path(__file__).resolve().parents[2]  # where the scripts are, beside dae/

# Flags that change no number, or only its last bits: a study may go on on another machine.
FREE = (FREE_ON_RESUME | {"batch"}) - {"preset", "batch_size", "accumulate", "allow_trained"}

# The files of a finished cell. The last one is written last, and says that all are there.
SCORES = "scores.csv"
SUMMARY = "summary.json"
MADE = "cell.json"
KEPT = (SCORES, SUMMARY, MADE)


@dataclass(frozen=True)
class Pretraining:
    """One run of train_pretrain.py."""

    name: str
    method: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run and its scores."""

    name: str
    method: str
    pretraining: Pretraining
    tuning: str  # name of the plan's tunings; "" where there is one without a name
    labels: Labels
    fold: int | None
    seed: int  # of fine-tuning
    factor: float  # of the learning rate


class Command(NamedTuple):
    """One step of a cell, or of a pre-training run."""

    step: StepName
    launcher: Sequence[str]  # the plan's words before the script; none: this Python
    script: str
    rest: list[str]

    @property
    def words(self) -> list[str]:
        """As it is run, from any folder."""
        launcher = self.launcher or (sys.executable,)
        return [*launcher, str(SCRIPTS / self.script), *self.rest]

    @property
    def text(self) -> str:
        """As it is typed, in the folder of the scripts."""
        launcher = self.launcher or ("python",)
        return shlex.join([*launcher, self.script, *self.rest])


class Folders(NamedTuple):
    """What lies where in the folder of a study.

    `cells` and times.jsonl are small, and meant to be kept and shared. `work` may be deleted.
    """

    out: Path

    @property
    def times(self) -> Path:
        return self.out / "times.jsonl"

    def kept(self, cell: Cell) -> Path:
        """Scores of a finished cell."""
        return self.out / "cells" / cell.name

    def work(self, cell: Cell) -> Path:
        """What a cell that is not finished has so far."""
        return self.out / "work" / "cells" / cell.name

    def pretraining(self, run: Pretraining) -> Path:
        return self.out / "work" / "pretrain" / run.name

    def phantoms(self) -> Path:
        return self.out / "work" / "phantoms"

    def log(self, name: str) -> Path:
        """What the commands of a cell or of a pre-training run have printed."""
        return self.out / "work" / "logs" / f"{name}.log"

    def lock(self, name: str) -> Path:
        return self.out / "work" / "locks" / f"{name}.lock"


# --- which cells there are


def cells_of(plan: Plan) -> list[Cell]:
    """All cells, those of the headline pair first, then method by method.

    The pair goes seed by seed, and within a seed by labels: a study that is cut short has both
    methods on the same labels.
    """
    cells: list[Cell] = []
    for method in plan.methods:
        cells += cells_of_method(plan, method)
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f'plan "{plan.name}": two cells have the name {name}')

    pair = [cell for cell in cells if cell.method in plan.headline]
    others = [cell for cell in cells if cell.method not in plan.headline]
    pair.sort(
        key=lambda cell: (
            max(cell.seed, cell.pretraining.seed),
            cell.pretraining.seed,
            plan.labels.index(cell.labels),
        )
    )
    return pair + others


def cells_of_method(plan: Plan, method: str) -> list[Cell]:
    """The cells of one method: seeds outside, then labels, tunings, folds and learning rates."""
    axes = product(
        seeds_of_method(plan, method),
        plan.labels_of(method),
        plan.tunings,
        plan.folds or (None,),
        plan.factors_of(method),
    )

    cells = []
    for (pretrain_seed, seed), labels, tuning, fold, factor in axes:
        parts = [method, tuning, labels_in_name(labels), f"p{pretrain_seed}", f"t{seed}"]
        if fold is not None:
            parts.append(f"fold{fold}")
        if factor != 1:
            parts.append(f"lr{factor:g}")
        cell = Cell(
            name="-".join(part for part in parts if part),
            method=method,
            pretraining=pretraining_of(plan, method, pretrain_seed),
            tuning=tuning,
            labels=labels,
            fold=fold,
            seed=seed,
            factor=factor,
        )
        cells.append(cell)
    return cells


def seeds_of_method(plan: Plan, method: str) -> list[tuple[int, int]]:
    """Pairs of a pre-training seed and a tuning seed: each with each, or tuning seed t with t."""
    pretrain = plan.seeds_of("pretrain", method)
    finetune = plan.seeds_of("finetune", method)
    if not plan.seeds.get("crossed", True):
        return [(seed % pretrain, seed) for seed in range(finetune)]
    return list(product(range(pretrain), range(finetune)))


def labels_in_name(labels: Labels) -> str:
    """5 -> n5, 0.2 -> share0.2, "all" -> all."""
    if labels == "all":
        return "all"
    return f"share{labels:g}" if labels < 1 else f"n{labels:g}"


def pretraining_of(plan: Plan, method: str, seed: int) -> Pretraining:
    """Methods that differ by their fine-tuning alone share the run of the first of them."""
    flags = plan.pretrain_flags(method)
    for first in plan.methods:
        if plan.pretrain_flags(first) == flags:
            return Pretraining(f"{first}-p{seed}", first, seed)
    raise AssertionError(method)  # the method itself is one of them


# --- the commands


def data_of(plan: Plan, folders: Folders) -> dict[str, str]:
    """The lists by what they are for: those of the plan, else those of its phantoms."""
    lists: dict[str, str] = {}
    if "phantoms" in plan.data:
        lists["pretrain"] = str(folders.phantoms() / "pretrain.json")
        lists["finetune"] = str(folders.phantoms() / "ct_seg.json")
    lists |= {name: path for name, path in plan.data.items() if name != "phantoms"}
    for name in ("pretrain", "finetune"):
        if name not in lists:
            raise InputError(f'plan "{plan.name}": no list to {name} on; give --data {name}=LIST')
    check_tested(plan, lists)
    return lists


def check_tested(plan: Plan, lists: Mapping[str, str]) -> None:
    """Raises InputError where the list to test on is that of fine-tuning, by its validation cases:
    the rate of scratch would be chosen on the very cases that are reported.
    """
    if "test" not in lists or plan.split != "validation":
        return
    if Path(lists["test"]).resolve() == Path(lists["finetune"]).resolve():
        raise InputError(
            f'plan "{plan.name}": "test": {lists["test"]} is the list of "finetune"; leave it out, '
            'or take "split": "test"'
        )


def pretrain_command(plan: Plan, folders: Folders, run: Pretraining) -> Command:
    """The command that makes the weights of a method and seed."""
    flags = {
        **plan.pretrain_flags(run.method),
        "data": data_of(plan, folders)["pretrain"],
        "seed": run.seed,
        "out": folders.pretraining(run),
        "resume": True,
    }
    return command(plan, "pretrain", ["train_pretrain.py"], flags)


def cell_commands(plan: Plan, folders: Folders, cell: Cell) -> list[Command]:
    """The three commands of a cell, in their order."""
    lists = data_of(plan, folders)
    work = folders.work(cell)

    finetune = {
        **tuned_flags(plan, cell),
        "data": lists["finetune"],
        "pretrained": folders.pretraining(cell.pretraining) / "last.pt",
        "seed": cell.seed,
        "out": work / "finetune",
        "resume": True,
    }
    # A fold of this list is held out; cases of another list have none.
    cases: dict[str, Any] = {"data": lists.get("test", lists["finetune"]), "split": plan.split}
    fold: dict[str, Any] = {}
    if cell.fold is not None and "test" not in lists:
        fold["fold"] = cell.fold
        if "split_seed" in finetune:
            fold["split_seed"] = finetune["split_seed"]
    predict = {
        **plan.predict,
        **cases,
        "checkpoint": work / "finetune" / plan.checkpoint,
        "out": work / "predictions",
    }
    score = {
        **plan.score,
        **cases,
        **fold,
        "predictions": work / "predictions",
        "out": work / "scores",
    }
    return [
        command(plan, "finetune", ["train_seg.py"], finetune),
        command(plan, "predict", ["eval.py", "predict"], predict),
        command(plan, "score", ["eval.py", "score"], score),
    ]


def tuned_flags(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Flags of train_seg.py that set this cell apart from others, without paths and seeds."""
    flags = plan.finetune_flags(cell.method, cell.tuning)
    if cell.factor != 1:
        config = parse(SegConfig, arguments(flags), prog="finetune", description="")
        flags["lr"] = float(f"{config.lr * cell.factor:.12g}")
    if cell.fold is not None:
        flags["fold"] = cell.fold
    if cell.labels != "all":
        if cell.labels < 1:
            flags["label_fraction"] = cell.labels
        else:
            flags["label_count"] = int(cell.labels)  # 2.0 is a whole number, too
    return flags


def command(plan: Plan, step: StepName, script: list[str], flags: Flags) -> Command:
    name, *words = script
    return Command(step, plan.launchers.get(step, ()), name, [*words, *arguments(flags)])


# --- was it made by this plan?


def pretraining_fingerprint(plan: Plan, folders: Folders, run: Pretraining) -> dict[str, Any]:
    """All that decides the weights of a run, but the versions of programs."""
    flags = deciding({**plan.pretrain_flags(run.method), "seed": run.seed})
    data = hash_of_list(Path(data_of(plan, folders)["pretrain"]))
    return as_json({"pretrain": flags, "pretrain_data": data})


def cell_fingerprint(plan: Plan, folders: Folders, cell: Cell) -> dict[str, Any]:
    """All that decides the scores of a cell, but the versions of programs."""
    lists = data_of(plan, folders)
    tuned = tuned_flags(plan, cell)
    finetune = deciding({**tuned, "seed": cell.seed})
    if plan.checkpoint == "best.pt" and "validate_every" in tuned:
        finetune["validate_every"] = tuned["validate_every"]  # says which ones it is chosen from
    content = {
        **pretraining_fingerprint(plan, folders, cell.pretraining),
        "finetune": finetune,
        "finetune_data": hash_of_list(Path(lists["finetune"])),
        "checkpoint": plan.checkpoint,
        "split": plan.split,
        "predict": deciding(plan.predict),
        "score": deciding(plan.score),
    }
    if "test" in lists:
        content["test_data"] = hash_of_list(Path(lists["test"]))
    return as_json(content)


def deciding(flags: Flags) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in FREE}


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    result: dict[str, Any] = json.loads(json.dumps(content))
    return result


def hash_of_list(path: Path) -> str:
    """Of the bytes of a list, wherever it lies; "" where it is not there.

    Of an nnU-Net folder it is of dataset.json, the splits, and the names of all volumes.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        splits = splits_file(path)
        volumes = sorted(file.relative_to(path).as_posix() for file in path.glob("*T[rs]/[!.]*"))
        digest.update(splits.read_bytes() if splits else b"")
        digest.update("\n".join(volumes).encode(errors="surrogateescape"))
        path = path / "dataset.json"
    if not path.is_file():
        return ""
    digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def difference(now: dict[str, Any], before: dict[str, Any]) -> str:
    """In words the first thing in which two fingerprints differ, or nothing."""
    for key in {**now, **before}:
        new = now.get(key)
        old = before.get(key)
        if key.endswith("_data") and "" in (new, old):
            continue  # a table can be made where the lists are not
        if isinstance(new, dict) and isinstance(old, dict) and new != old:
            inner = next(name for name in {**new, **old} if new.get(name) != old.get(name))
            return f"{key}: {inner} was {old.get(inner)}, and is {new.get(inner)}"
        if new != old:
            return f"{key} was {old}, and is {new}"
    return ""


def in_order(cells: Sequence[Cell], key: Callable[[Cell], Any]) -> list[Any]:
    """The different values of `key`, in the order of the cells."""
    return list(dict.fromkeys(key(cell) for cell in cells))
