"""Whether the lists of a study have what its cells ask for.

The scripts refuse what their list does not have, but a fold or a number of labels that is not there
would be found out only after hours of pre-training. Here the lists are read at the start, by the
functions that the scripts read them with.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dae.config.command_line import parse, value_if_set
from dae.config.evaluate import PredictConfig
from dae.config.segment import SegConfig
from dae.data import holdout, leaks
from dae.data.datalist import DataList, Item
from dae.errors import InputError
from dae.evaluation.cases import check_task
from dae.study.cells import Cell, Command, Folders, cell_commands, data_of, pretrain_command
from dae.study.plan import CONFIGS, STEPS, Plan, StepName

# Flags that choose among the items of a list. Cells that differ by others alone are asked once.
CHOOSING = (
    *("data_root", "modality", "channels", "allow_trained"),
    *("fold", "split_seed", "label_fraction", "label_count"),
)


def check_lists(plan: Plan, folders: Folders, cells: Sequence[Cell]) -> None:
    """Raises InputError, in one line that names the plan and the cell, before anything is trained.

    Nothing but the lists is read, and no file may be missing: a damaged one is found later.
    """
    lists = data_of(plan, folders)
    check_lists_are_there(plan, lists)

    asked = set[tuple[Any, ...]]()
    for cell in cells:
        commands = [pretrain_command(plan, folders, cell.pretraining)]
        commands += cell_commands(plan, folders, cell)
        try:
            configs = {command.step: config_of(command) for command in commands}
            choices = tuple(choice_of(config) for config in configs.values())
            if choices not in asked:
                check_cell(configs)
            asked.add(choices)
        except InputError as error:
            raise InputError(f'plan "{plan.name}": {in_words(cell)}: {error}') from error


def check_lists_are_there(plan: Plan, lists: Mapping[str, str]) -> None:
    """Raises InputError where a list is missing."""
    for name, path in lists.items():
        if not Path(path).exists():
            raise InputError(
                f'plan "{plan.name}": {path}: there is no such list; '
                f"give --data {name}=LIST (a path is from the folder where the command runs)"
            )


def in_words(cell: Cell) -> str:
    """Like "dae, labels 5, fold 0"."""
    fold = "" if cell.fold is None else f", fold {cell.fold}"
    return f"{cell.method}, labels {cell.labels}{fold}"


def config_of(command: Command) -> Any:
    """The flags of a command as its script reads them. Raises InputError."""
    words = command.rest[1:] if command.script == "eval.py" else command.rest
    return parse(CONFIGS[command.step], words, prog=command.step, description="")


def choice_of(config: Any) -> tuple[Any, ...]:
    """Those of CHOOSING that a script has, and that are set."""
    return tuple(value_if_set(config, name) for name in CHOOSING if hasattr(config, name))


def check_cell(configs: Mapping[StepName, Any]) -> None:
    """Every list of a cell is read as the script of each step reads it. Raises InputError."""
    pretrain, finetune, predict = (configs[step] for step in STEPS[:3])
    with naming("pretrain", pretrain.data):
        images = holdout.read_for_pretraining(pretrain)
        check_files(images.training, labels=False)
    with naming("finetune", finetune.data):
        tuned = holdout.read_for_segmentation(finetune)
        check_files((*tuned.training, *tuned.validation), labels=True)
    with naming("predict", predict.data):
        check_scored(predict, tuned, seen_in_training(tuned, finetune))


def check_files(items: Sequence[Item], *, labels: bool) -> None:
    """Raises InputError where an image is missing, or with `labels` a label map."""
    for item in items:
        files = list(item.image)
        if labels and item.label is not None:
            files.append(item.label)
        for path in files:
            if not path.is_file():
                raise InputError(f"{path}: there is no such file")


@contextmanager
def naming(step: StepName, path: str) -> Iterator[None]:
    """An InputError of the block names the step, and its list as well."""
    try:
        yield
    except InputError as error:
        where = "" if path in str(error) else f" ({path})"
        raise InputError(f"{step}: {error}{where}") from error


def seen_in_training(tuned: DataList, config: SegConfig) -> leaks.Seen:
    """What the fine-tuned checkpoint will know of its training, without the voxels."""
    return leaks.seen_by(tuned, (), fold=config.fold, split_seed=config.split_seed)


def check_scored(config: PredictConfig, tuned: DataList, seen: leaks.Seen) -> None:
    """The cases that are predicted and scored: some, with labels, of the same task, and new.

    Raises InputError.
    """
    items, chosen = holdout.read_for_evaluation(config, config.modality, seen)
    classes = {str(label): name for label, name in tuned.labels.items()}
    check_task(items, classes, tuned.regions, config.data)

    known = sorted({item.modality_name for item in tuned.training})
    for item in chosen:
        if item.label is None:
            raise InputError(f'{item.image[0]}: has no "label" in {config.data}')
        if item.modality_name not in known:
            raise InputError(
                f"{item.image[0]}: modality {item.modality_name}, and networks are fine-tuned on "
                f"{', '.join(known)}"
            )
    check_files(chosen, labels=True)

    if not config.allow_trained:
        trained = [chosen[n].subject for n in leaks.trained_among(chosen, seen)]
        leaks.refuse_trained(trained, f"--data {config.data}", "predict")
