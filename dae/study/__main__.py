"""Run a study: methods by labels by folds by seeds, and the table that it ends in.

python -m dae.study PLAN.json --dry-run     the cells, their commands, and their time
python -m dae.study PLAN.json               run what is not there yet; again after any stop
python -m dae.study PLAN.json --only dae    run the cells of some of its methods alone
python -m dae.study PLAN.json --report      only the tables and the figure

PLAN is a file, or the name of a plan in dae/study/plans. The keys of a plan are listed at the top
of dae/study/plan.py. Several processes may run one study in one folder: none does what another is
doing.
"""

import signal
import sys
import time
from functools import partial
from pathlib import Path

from dae.config.command_line import parse, run_or_explain
from dae.config.study import StudyConfig
from dae.demo.__main__ import main as write_phantoms
from dae.errors import InputError, counted
from dae.study.cells import Folders, cell_commands, cells_of, data_of, pretrain_command
from dae.study.locks import locked
from dae.study.plan import Plan, phantoms_config, read_plan, with_data_root
from dae.study.runner import WAIT, Study, is_done, run_all, say, time_left, time_of_cell
from dae.study.table import check_tables, write_tables
from dae.study.times import in_words, read_times

PROG = "python -m dae.study"


def main() -> int:
    """The exit code: 2 where a cell could not be made."""
    name, config = read_command()
    plan = with_data_root(read_plan(name, config.data), config.data_root)
    folders = Folders(Path(config.out or f"runs/studies/{plan.name}"))
    cells = cells_of(plan)
    data_of(plan, folders)  # a list that no one names is missed before anything is made
    report = partial(write_tables, plan, folders, cells)
    check_only(plan, config)
    study = Study(plan, folders, cells, config.keep, report, only=config.only)

    if config.dry_run:
        print_cells(study)
        return 0
    check_tables(plan, folders)
    if config.report:
        report()
        say(str(folders.out / "table.md"))
        return 0

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        make_phantoms(plan, folders)
        failed = run_all(study)
    except (KeyboardInterrupt, SystemExit):
        say("stopped; the same command goes on")
        return 130
    report()
    say(f"{folders.out / 'table.md'} has the results")
    if failed:
        raise InputError(f"{counted(len(failed), 'failure')}: {'; '.join(failed)}")
    return 0


def read_command() -> tuple[str, StudyConfig]:
    """The plan and the flags of this process."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        rest = ["--help"]
    config = parse(StudyConfig, rest, prog=PROG, description=__doc__)
    return name, config


def check_only(plan: Plan, config: StudyConfig) -> None:
    """Raises InputError where --only names no method of the plan, or cannot act."""
    if config.only and config.report:
        raise InputError("--only: not beside --report, which shows all cells that are finished")
    for name in config.only:
        if name not in plan.methods:
            raise InputError(
                f'--only {name}: is no method of the plan "{plan.name}"; '
                f"there are {', '.join(plan.methods)}"
            )


def make_phantoms(plan: Plan, folders: Folders) -> None:
    """The synthetic volumes of a plan that asks for them, unless they are there."""
    if "phantoms" not in plan.data:
        return
    made = False
    while not made:
        with locked(folders.lock("phantoms")) as lock:
            if lock is not None:
                write_phantoms(folders.phantoms(), phantoms_config(plan))
                made = True
        if not made:
            time.sleep(WAIT)  # another process makes them


def print_cells(study: Study) -> None:
    """Each cell with its commands and its time, by what has been measured."""
    times = read_times(study.folders.times)
    study.remaining = [cell for cell in study.chosen if not is_done(study.folders, cell)]
    runs = set[str]()
    for cell in study.chosen:
        if cell not in study.remaining:
            print(f"{cell.name}: done")
            continue
        commands = cell_commands(study.plan, study.folders, cell)
        if cell.pretraining.name not in runs:
            commands.insert(0, pretrain_command(study.plan, study.folders, cell.pretraining))
        print(f"{cell.name}: {in_words(time_of_cell(study, times, cell, runs))}")
        for command in commands:
            print(f"    {command.text}")
    seconds = time_left(study, study.remaining)
    left = in_words(seconds) if seconds is None else f"{in_words(seconds)} for one runner"
    print(f"{counted(len(study.chosen), 'cell')}, {len(study.remaining)} to do, {left}")


if __name__ == "__main__":
    sys.exit(run_or_explain(main, PROG))
