"""A plan: which methods are compared, on which labels, with which flags.

A plan is a JSON file. Every part of it is flags of the scripts, or says which values the study
gives to a flag:

    name        of the study
    data        lists: "pretrain", "finetune", and "test" where cases of another list are scored;
                or "phantoms", flags of python -m dae.demo, in place of the first two
    pretrain    flags of train_pretrain.py for all methods
    methods     name -> the flags that make it, in the order of priority; "finetune" among them
                holds flags of train_seg.py for this method alone, and "labels" those of the plan's
                labels that it is fine-tuned on, if not all
    finetune    flags of train_seg.py for all methods
    tunings     name -> flags of train_seg.py, where several ways of fine-tuning are compared
    labels      how many labelled subjects: whole numbers, shares below 1, or "all"; they nest
    folds       folds of the list of "finetune", or null: the list's own split
    seeds       {"pretrain": N, "finetune": N}, and {"default": 1, "dae": 3} in place of N;
                "crossed": false takes tuning seed t with pre-training seed t alone
    checkpoint  which one of fine-tuning is scored: "last.pt", or "best.pt"
    split       which cases are scored: "test" or "validation"
    predict     flags of eval.py predict
    score       flags of eval.py score
    baseline    the method that the others are compared with
    scratch_lr  factors of the learning rate that networks without pre-training may choose from,
                but for a method that names a rate of its own
    headline    the two methods whose cells come first
    launchers   step -> the words before a script, {"pretrain": ["torchrun", "--nproc_per_node=8"]}

Paths are relative to the folder where the command runs, as those of flags are.
"""

import math
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dae.config.command_line import parse
from dae.config.evaluate import PredictConfig, ScoreConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data.listfile import probably_meant, read_json
from dae.demo.__main__ import HardPhantomsConfig
from dae.errors import InputError, printable

PLANS = Path(__file__).parent / "plans"  # those that can be given by name

Flags = Mapping[str, Any]  # name of a flag, with underscores -> value
Labels = int | float | Literal["all"]
StepName = Literal["pretrain", "finetune", "predict", "score"]
Checkpoint = Literal["last.pt", "best.pt"]
Split = Literal["test", "validation"]
STEPS: tuple[StepName, ...] = get_args(StepName)

CONFIGS: dict[StepName, type] = {
    "pretrain": PretrainConfig,
    "finetune": SegConfig,
    "predict": PredictConfig,
    "score": ScoreConfig,
}
# Flags that the study itself sets in each step.
OWN: dict[StepName, tuple[str, ...]] = {
    "pretrain": ("data", "out", "resume", "seed", "stop_after", "dry_run"),
    "finetune": (
        *("data", "out", "resume", "seed", "stop_after", "dry_run"),
        *("pretrained", "fold", "label_fraction", "label_count"),
    ),
    "predict": ("data", "out", "checkpoint", "images", "split", "fold"),
    "score": ("data", "out", "predictions", "labels", "split", "fold", "split_seed", "policy"),
}
LISTS = ("pretrain", "finetune", "test")
# What a method has beside flags of train_pretrain.py.
BESIDE_FLAGS = ("finetune", "labels")
LONGEST_NAME = 100  # bytes: a folder has the names of a method and of a tuning, and some numbers
NAME = r"\w[\w.+]{0,99}"  # it becomes the name of a folder


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a plan file says; the words are those of the file."""

    name: str
    methods: Mapping[str, Flags]
    data: Mapping[str, Any]
    pretrain: Flags = field(default_factory=dict)
    finetune: Flags = field(default_factory=dict)
    tunings: Mapping[str, Flags] = field(default_factory=lambda: {"": {}})
    labels: tuple[Labels, ...] = ("all",)
    folds: tuple[int, ...] | None = None
    seeds: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint = "last.pt"
    split: Split = "test"
    predict: Flags = field(default_factory=dict)
    score: Flags = field(default_factory=dict)
    baseline: str = ""
    scratch_lr: tuple[float, ...] = (1,)
    headline: tuple[str, ...] = ()
    launchers: Mapping[str, list[str]] = field(default_factory=dict)
    description: str = ""

    def pretrain_flags(self, method: str) -> dict[str, Any]:
        """Flags of train_pretrain.py that make a method, without those that the study sets."""
        own = dict(self.methods[method])
        for name in BESIDE_FLAGS:
            own.pop(name, None)
        return {**self.pretrain, **own}

    def finetune_flags(self, method: str, tuning: str) -> dict[str, Any]:
        """Flags of train_seg.py for a method, without those that the study sets."""
        own = self.methods[method].get("finetune", {})
        return {**self.finetune, **self.tunings[tuning], **own}

    def labels_of(self, method: str) -> tuple[Labels, ...]:
        """The numbers of labels that a method is fine-tuned on, in the order of the plan."""
        own = self.methods[method].get("labels", self.labels)
        return tuple(labels for labels in self.labels if labels in own)

    def factors_of(self, method: str) -> tuple[float, ...]:
        """Factors of the learning rate of fine-tuning, which scratch may choose from."""
        rate_of_its_own = "lr" in self.methods[method].get("finetune", {})
        if rate_of_its_own or not self.is_scratch(method):
            return (1.0,)
        return self.scratch_lr

    def is_scratch(self, method: str) -> bool:
        """Whether the method's weights are untrained, so that it may choose a learning rate."""
        drawn_anew = self.methods[method].get("finetune", {}).get("from_scratch")
        return bool(drawn_anew) or self.pretrain_flags(method).get("method") == "scratch"

    def seeds_of(self, step: str, method: str) -> int:
        """How many seeds of pre-training, or of fine-tuning, a method has."""
        number = self.seeds.get(step, 1)
        if isinstance(number, Mapping):
            number = number.get(method, number.get("default", 1))
        return int(number)


def arguments(flags: Flags) -> list[str]:
    """Flags as they are typed: {"crop": [8, 8, 8], "tta": True} -> --crop 8 8 8 --tta."""
    words: list[str] = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


# --- from the file


def read_plan(name: str, lists: Collection[str] = ()) -> Plan:
    """The plan of a file, or of one of the names in `plans/`. Raises InputError.

    lists: as --data has them, "pretrain=LIST", in place of the plan's own.
    """
    path = Path(name)
    if not path.is_file():
        path = PLANS / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(plan.stem for plan in PLANS.glob("*.json")))
        raise InputError(f"{name}: no such file, and no plan of that name; there are {names}")

    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: a plan is an object, {{...}}")
    check_known(content, [f.name for f in fields(Plan)], f"{path}")
    for f in fields(Plan):
        required = f.default is MISSING and f.default_factory is MISSING
        if required and not content.get(f.name):
            raise InputError(f'{path}: "{f.name}" is missing')

    plan = Plan(**{key: as_tuple(value) for key, value in content.items()})
    check_shapes(plan, path)
    plan = replace(plan, data=with_lists(plan.data, lists))
    plan = replace(plan, baseline=plan.baseline or next(iter(plan.methods)))
    check_plan(plan, path)
    return plan


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def with_lists(data: Mapping[str, Any], lists: Collection[str]) -> dict[str, Any]:
    """The data of a plan, with the lists of --data in place of its own. Raises InputError."""
    result = dict(data)
    for entry in lists:
        name, _, path = entry.partition("=")
        if name not in LISTS or not path:
            raise InputError(f"--data {entry}: give it as {'=LIST, '.join(LISTS)}=LIST")
        result[name] = path
    for name in LISTS:
        if name in result:  # as the scripts read a path
            result[name] = str(Path(result[name]).expanduser())
    return result


def with_data_root(plan: Plan, data_root: str) -> Plan:
    """The plan with this --data-root in all steps whose flags do not name one."""
    if not data_root:
        return plan
    root = {"data_root": data_root}
    return replace(
        plan,
        pretrain=root | dict(plan.pretrain),
        finetune=root | dict(plan.finetune),
        predict=root | dict(plan.predict),
        score=root | dict(plan.score),
    )


def check_known(keys: Collection[str], known: Collection[str], where: str) -> None:
    """Raises InputError for a key that is not read, with the one that was probably meant."""
    for key in keys:
        if key in known:
            continue
        meant = probably_meant(key, dict.fromkeys(known, ""))
        remedy = f'"{meant}" was probably meant' if meant else f"there are {', '.join(known)}"
        raise InputError(f'{where}: "{key}" is not read; {remedy}')


# --- is it a plan that can be run?


def check_plan(plan: Plan, path: Path) -> None:
    """Raises InputError, naming the key, before anything runs."""
    check_known(plan.data, [*LISTS, "phantoms"], f'{path}: "data"')
    check_known(plan.launchers, STEPS, f'{path}: "launchers"')
    if not re.fullmatch(NAME, plan.name.replace("-", "_")):
        raise InputError(
            f'{path}: "name": "{printable(plan.name)}": letters, digits, "_", "-", "." and "+"'
        )
    for name in (plan.baseline, *plan.headline):
        if name not in plan.methods:
            raise InputError(f'{path}: "{name}" is none of the methods')

    check_choice(plan.checkpoint, get_args(Checkpoint), f'{path}: "checkpoint"')
    check_choice(plan.split, get_args(Split), f'{path}: "split"')
    check_names(plan.methods, path)
    check_names([name for name in plan.tunings if name], path)
    for labels in plan.labels:
        check_labels(labels, path)
    for method, flags in plan.methods.items():
        check_labels_of(plan, flags.get("labels", plan.labels), f'{path}: "{method}": "labels"')
    if plan.folds and plan.split == "test" and "test" not in plan.data:
        raise InputError(f'{path}: "folds" hold out what is scored: "split" must be "validation"')
    check_seeds(plan, path)
    check_flags(plan, path)


def check_names(names: Collection[str], path: Path) -> None:
    """Raises InputError for a name of no folder, and for two that some disks take for one."""
    first_of: dict[str, str] = {}
    for name in names:
        if not re.fullmatch(NAME, name) or len(name.encode()) > LONGEST_NAME:
            raise InputError(
                f'{path}: "{printable(name[:200])}": a name has letters, digits, "_", "." and "+", '
                f"at most {LONGEST_NAME} bytes"
            )
        folded = unicodedata.normalize("NFC", name).casefold()
        first = first_of.setdefault(folded, name)
        if first != name:
            raise InputError(
                f'{path}: "{name}" and "{first}" differ by capitals alone, and many disks take the '
                "two for one; rename one of them"
            )


def check_shapes(plan: Plan, path: Path) -> None:
    """Raises InputError where a key holds another kind of value than it should."""
    for key in ("name", "description", "baseline"):
        if not isinstance(getattr(plan, key), str):
            raise InputError(f'{path}: "{key}" is a text, "..."')
    objects = ("methods", "data", "pretrain", "finetune", "tunings", "seeds", "predict", "score")
    for key in (*objects, "launchers"):
        check_object(getattr(plan, key), f'{path}: "{key}"')
    for key in ("methods", "tunings"):
        for name, flags in getattr(plan, key).items():
            check_object(flags, f'{path}: "{key}": "{name}"', " of flags")
    for method, flags in plan.methods.items():
        check_object(flags.get("finetune", {}), f'{path}: "{method}": "finetune"', " of flags")
        check_list(flags.get("labels", plan.labels), f'{path}: "{method}": "labels"')

    check_lists(plan, path)
    for key in ("labels", "folds", "tunings", "scratch_lr"):
        if getattr(plan, key) is not None and not getattr(plan, key):
            raise InputError(f'{path}: "{key}" is empty; leave it out')
    if len(plan.headline) not in (0, 2):
        raise InputError(f'{path}: "headline" is a list of two methods')
    for name, value in plan.data.items():
        if name == "phantoms":
            check_object(value, f'{path}: "data": "phantoms"', " of flags")
        elif not isinstance(value, str) or not value:
            raise InputError(f'{path}: "data": "{name}" is the path of a list, "..."')
    for step, words in plan.launchers.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f'{path}: "launchers": "{step}" is a list of words, ["torchrun", ...]')


def check_lists(plan: Plan, path: Path) -> None:
    """Raises InputError where a list is none, or holds a value twice or of another kind."""
    for key in ("labels", "folds", "scratch_lr", "headline"):
        values = getattr(plan, key)
        if key == "folds" and values is None:
            continue
        check_list(values, f'{path}: "{key}"')

    for fold in plan.folds or ():
        if not is_whole(fold) or fold < 0:
            raise InputError(f'{path}: "folds": {fold}: folds are whole numbers from 0 on')
    for factor in plan.scratch_lr:
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not 0 < factor < math.inf:
            raise InputError(f'{path}: "scratch_lr": {factor}: factors are numbers above 0')


def check_list(values: Any, where: str) -> None:
    """Raises InputError for what is no list of different values."""
    if not isinstance(values, (list, tuple)):
        raise InputError(f"{where} is a list, [...]")
    if any(isinstance(value, (list, dict)) for value in values):
        raise InputError(f"{where} is a list of values, without lists and objects")
    if len(set(values)) < len(values):
        raise InputError(f"{where} has a value twice")


def check_object(value: Any, where: str, kind: str = "") -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is an object{kind}, {{...}}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(value: Any, choices: Collection[str], where: str) -> None:
    if value not in choices:
        raise InputError(f"{where}: {value} is not a choice; take {' or '.join(choices)}")


def check_labels(labels: Any, path: Path) -> None:
    """A whole number counts subjects, a number below 1 is a share of them."""
    if labels == "all":
        return
    is_number = isinstance(labels, (int, float)) and not isinstance(labels, bool)
    is_count = is_number and 1 <= labels < math.inf and labels == int(labels)
    if not is_count and not (is_number and 0 < labels < 1):
        raise InputError(
            f'{path}: "labels": {labels}: give a number of subjects, a share below 1, or "all"'
        )


def check_labels_of(plan: Plan, labels: Collection[Any], where: str) -> None:
    """A method takes some of the plan's labels: those are the columns of the table."""
    if not labels:
        raise InputError(f"{where} is empty; leave it out")
    for value in labels:
        if value not in plan.labels:
            raise InputError(f'{where}: {value} is none of the "labels" of the plan')


def check_seeds(plan: Plan, path: Path) -> None:
    where = f'{path}: "seeds"'
    check_known(plan.seeds, ["pretrain", "finetune", "crossed"], where)
    for step in ("pretrain", "finetune"):
        numbers = plan.seeds.get(step, 1)
        by_method = numbers if isinstance(numbers, Mapping) else {"default": numbers}
        check_known(by_method, ["default", *plan.methods], where)
        for number in by_method.values():
            if not is_whole(number) or number < 1:
                raise InputError(f"{where}: {step}: {number}: a whole number, at least one")
    if not isinstance(plan.seeds.get("crossed", True), bool):
        raise InputError(f'{where}: "crossed" is true or false')
    for method in plan.methods:
        few = plan.seeds_of("finetune", method) < plan.seeds_of("pretrain", method)
        if few and not plan.seeds.get("crossed", True):
            raise InputError(f"{where}: {method} has fewer tuning seeds than pre-training seeds")


def check_flags(plan: Plan, path: Path) -> None:
    """Every command line is read as the script itself will read it."""
    for method in plan.methods:
        where = f'{path}: method "{method}"'
        check_command("pretrain", plan.pretrain_flags(method), where)
        for tuning in plan.tunings:
            check_command("finetune", plan.finetune_flags(method, tuning), where)
    if "phantoms" in plan.data:
        try:
            phantoms_config(plan)
        except InputError as error:
            raise InputError(f'{path}: "phantoms": {error}') from error
    check_command("predict", plan.predict, f'{path}: "predict"')
    check_command("score", plan.score, f'{path}: "score"')


def check_command(step: StepName, flags: Flags, where: str) -> None:
    own = [name for name in flags if name in OWN[step]]
    if own:
        raise InputError(f'{where}: "{own[0]}" is a flag that the study itself sets')
    check_no_help(flags, where)
    try:
        parse(CONFIGS[step], arguments(flags), prog=step, description="")
    except InputError as error:
        raise InputError(f"{where}: {step}: {error}") from error


def check_no_help(flags: Flags, where: str) -> None:
    """The one flag that ends the process that reads it."""
    if "help" in flags:
        raise InputError(f'{where}: "help" is no flag of a plan')


def phantoms_config(plan: Plan) -> HardPhantomsConfig:
    """What `python -m dae.demo` makes of the plan's flags. Raises InputError."""
    check_no_help(plan.data["phantoms"], "flags")
    words = arguments(plan.data["phantoms"])
    return parse(HardPhantomsConfig, words, prog="phantoms", description="")
