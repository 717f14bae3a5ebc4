"""Whether the networks of a study can be built.

Flags that contradict each other would be found by the method that has them, hours after the study
has started. Here every network is built at the start, of shapes alone.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dae.config.command_line import was_set
from dae.errors import InputError
from dae.model import check_size
from dae.study.cells import Cell, Folders, cell_commands, pretrain_command
from dae.study.lists import config_of
from dae.study.plan import Plan
from dae.training.run import build_backbone


def check_networks(plan: Plan, folders: Folders, cells: Sequence[Cell]) -> None:
    """Raises InputError, in one line that names plan and method, before anything is trained."""
    asked = set[tuple[str, str]]()
    for cell in cells:
        if (cell.method, cell.tuning) in asked:
            continue
        asked.add((cell.method, cell.tuning))

        pretrain = config_of(pretrain_command(plan, folders, cell.pretraining))
        finetune = config_of(cell_commands(plan, folders, cell)[0])
        try:
            check_network(pretrain, finetune)
        except (InputError, ValueError) as error:
            raise InputError(f'plan "{plan.name}": method "{cell.method}": {error}') from error


def check_network(pretrain: Any, finetune: Any) -> None:
    """Raises InputError or ValueError where the network, or the crop of a step, is impossible."""
    with torch.device("meta"):
        network = build_backbone(pretrain, 1, 1)
    if was_set(finetune, "crop"):  # else it is that of pre-training
        check_size(finetune.crop, network.divisor)
