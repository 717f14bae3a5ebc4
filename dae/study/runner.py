"""Run the cells that are not there yet: pre-train, fine-tune, predict, score.

A cell that is killed goes on where it was: the scripts resume, and finished steps are noted in
progress.json. A cell is done when its cell.json is there, which is written after its scores.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dae.errors import InputError, counted, printable
from dae.evaluation.report import are_terms
from dae.evaluation.written import sha256_of
from dae.files import from_json, json_lines, write_bytes
from dae.study.cells import (
    KEPT,
    MADE,
    SCORES,
    SUMMARY,
    Cell,
    Command,
    Folders,
    Pretraining,
    cell_commands,
    cell_fingerprint,
    difference,
    pretrain_command,
    pretraining_fingerprint,
)
from dae.study.lists import check_lists
from dae.study.locks import locked
from dae.study.plan import Plan
from dae.study.times import add_time, expected, in_words, read_times

WAIT = 2.0  # seconds between looks at what other processes work on
TRAINING = ("pretrain", "finetune")

Batches = Mapping[str, Mapping[str, int]]  # step -> samples of a step, and ranks

# Of a run's first event, what tells where a cell was made.
VERSIONS = ("torch", "numpy", "python", "platform", "threads", "gpu", "device", "git")


class CommandFailed(Exception):
    """A command of a cell did not end well. One line for the user."""


@dataclass
class Study:
    """What the runner works with. `failed` and `remaining` change."""

    plan: Plan
    folders: Folders
    cells: list[Cell]
    keep: bool
    after_cell: Callable[[], object]  # rewrites the tables
    only: Collection[str] = ()  # methods whose cells are run; none: all
    failed: dict[str, str] = field(default_factory=dict)  # name of a unit -> what was wrong
    remaining: list[Cell] = field(default_factory=list)

    @property
    def chosen(self) -> list[Cell]:
        """The cells that this runner is to do, finished or not."""
        return [cell for cell in self.cells if not self.only or cell.method in self.only]


class Unit(NamedTuple):
    """What the steps of one cell, or of one pre-training run, share."""

    name: str
    folder: Path  # with a run in it, or in its folder finetune
    fingerprint: dict[str, Any]
    about: dict[str, Any]  # method, tuning, labels: for times.jsonl


def run_all(study: Study) -> list[str]:
    """Every cell once. Returns what failed, a line each; other cells go on. Cells whose weights
    could not be made fail for one reason.

    Where other processes work on all that is left, wait for them: they may fail, or be killed.
    """
    check_made_by_this_plan(study)
    study.remaining = [cell for cell in study.chosen if not is_done(study.folders, cell)]
    say(f"{counted(len(study.chosen), 'cell')}, {len(study.remaining)} of them to do")
    if study.remaining:
        check_lists(study.plan, study.folders, study.remaining)
        # Imported here: it brings timm along, and --report need not wait for it.
        from dae.study.networks import check_networks

        check_networks(study.plan, study.folders, study.remaining)

    waiting = False
    while study.remaining:
        worked = False
        for cell in list(study.remaining):
            worked |= try_cell(study, cell)
        if study.remaining and not worked:
            if not waiting:
                say(f"waiting for other processes, {counted(len(study.remaining), 'cell')} left")
            time.sleep(WAIT)
        waiting = not worked
    return list(dict.fromkeys(study.failed.values()))


def try_cell(study: Study, cell: Cell) -> bool:
    """Do the cell, unless it is done, or another process is at it. Returns whether it was done."""
    folders = study.folders
    try:
        with locked(folders.lock(cell.name)) as lock:
            if lock is None:
                return False
            # Only now: another process may have finished it while this one looked elsewhere.
            if is_done(folders, cell):
                study.remaining.remove(cell)
                return False
            if not pretrained(study, cell.pretraining):
                return False
            do_cell(study, cell, lock)
    except CommandFailed as error:
        study.remaining.remove(cell)
        if str(error) not in study.failed.values():
            say(str(error))
        study.failed[cell.name] = str(error)
        return True
    study.remaining.remove(cell)
    study.after_cell()
    return True


def pretrained(study: Study, run: Pretraining) -> bool:
    """Whether the weights are there, or could be made now; False where others are at it.

    Raises CommandFailed where they cannot be made.
    """
    folders = study.folders
    if run.name in study.failed:
        raise CommandFailed(study.failed[run.name])

    with locked(folders.lock(run.name)) as lock:
        if lock is None:
            return False
        unit = Unit(
            run.name,
            folders.pretraining(run),
            pretraining_fingerprint(study.plan, folders, run),
            {"method": run.method},
        )
        progress = progress_of(unit)
        if "pretrain" in progress["seconds"] and (unit.folder / "last.pt").is_file():
            return True
        command = pretrain_command(study.plan, folders, run)
        try:
            do_step(study, unit, command, progress, lock)
        except CommandFailed as error:
            say(str(error))
            study.failed[run.name] = str(error)
            raise
    return True


def do_cell(study: Study, cell: Cell, lock: int) -> None:
    """The steps of a cell that are not done, then its scores into the folder of results."""
    folders = study.folders
    unit = Unit(
        cell.name,
        folders.work(cell),
        cell_fingerprint(study.plan, folders, cell),
        {"method": cell.method, "tuning": cell.tuning, "labels": cell.labels},
    )
    progress = progress_of(unit)
    commands = cell_commands(study.plan, folders, cell)
    for command in commands:
        check_batches(study, cell)  # before each step, so that as little as can be is done in vain
        if command.step not in progress["seconds"]:
            do_step(study, unit, command, progress, lock)

    kept = folders.kept(cell)
    kept.mkdir(parents=True, exist_ok=True)
    scores = unit.folder / "scores" / SCORES
    for name in (SCORES, SUMMARY):
        write_bytes(kept / name, (unit.folder / "scores" / name).read_bytes())
    content = {
        "cell": cell.name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": progress["seconds"],
        "validation": last_validation(unit.folder / "finetune" / "log.jsonl"),
        **versions_of(unit.folder / "finetune" / "log.jsonl"),
        "batches": batches_of(study.plan, folders, cell),
        "commands": [
            pretrain_command(study.plan, folders, cell.pretraining).text,
            *(command.text for command in commands),
        ],
        "scores_sha256": sha256_of([scores]),
        "fingerprint": unit.fingerprint,
    }
    write_bytes(kept / MADE, (json.dumps(content, indent=1) + "\n").encode())
    if not study.keep:
        shutil.rmtree(unit.folder)


def do_step(
    study: Study, unit: Unit, command: Command, progress: dict[str, Any], lock: int
) -> None:
    """Run one command to its end and note that it is done. Raises CommandFailed.

    progress.json changes with it. The command holds the lock as well.
    """
    step = command.step
    interrupted = step in progress["begun"]
    progress["begun"] = sorted({*progress["begun"], step})
    note_progress(unit, progress)
    say(f"[{progress_in_words(study)}] {unit.name}: {step}")

    log = study.folders.log(unit.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise CommandFailed(f"{unit.name}: {command.words[0]}: {error.strerror}") from error
        try:
            code = process.wait()
        except (KeyboardInterrupt, SystemExit):
            # It saves, and ends. The keyboard has interrupted the command as well, and this is
            # SIGTERM: a second SIGINT would end a training run before it has saved.
            process.terminate()
            process.wait()
            raise
    seconds = time.perf_counter() - start

    run = unit.folder / "finetune" if step == "finetune" else unit.folder
    if code or (step in TRAINING and not has_finished(run / "log.jsonl")):
        reason = f"exit code {code}" if code else "stopped before its end"
        raise CommandFailed(f"{unit.name}: {step}: {reason}: {last_line(log)} (see {log})")
    progress["seconds"][step] = round(seconds, 1)
    note_progress(unit, progress)
    if not interrupted:  # of a step that was killed, this is only the rest
        entry = {"step": step, **unit.about, "unit": unit.name, "seconds": round(seconds, 1)}
        add_time(study.folders.times, entry)


# --- what is there


def is_done(folders: Folders, cell: Cell) -> bool:
    """Whether the scores of a cell are there, whole."""
    return all((folders.kept(cell) / name).is_file() for name in KEPT)


def check_made_by_this_plan(study: Study) -> None:
    """Raises InputError where a finished cell was made by another version of the plan."""
    others = other_versions(study.plan, study.folders, study.cells)
    if others:
        name, how = next(iter(others.items()))
        more = f", and {counted(len(others) - 1, 'cell')} more" if len(others) > 1 else ""
        raise InputError(
            f"{study.folders.out}: cell {name} was made by another version of the plan ({how})"
            f"{more}; give another --out, or remove what is of the other version"
        )


def other_versions(plan: Plan, folders: Folders, cells: Sequence[Cell]) -> dict[str, str]:
    """Finished cells that another version of the plan has made, and what was different."""
    others = {}
    for cell in cells:
        if not is_done(folders, cell):
            continue
        made = made_of(folders, cell)
        how = difference(cell_fingerprint(plan, folders, cell), made["fingerprint"])
        if how:
            others[cell.name] = how
    return others


def batches_of(plan: Plan, folders: Folders, cell: Cell) -> Batches:
    """By step, the samples of a step and the ranks of the training runs that have started."""
    runs = {"finetune": folders.work(cell) / "finetune"}
    if not plan.is_scratch(cell.method):  # untrained weights are the same on any ranks
        runs["pretrain"] = folders.pretraining(cell.pretraining)
    batches = {}
    for step, folder in runs.items():
        start = start_of(folder / "log.jsonl")
        if "global_batch" in start and "world" in start:
            batches[step] = {"samples": start["global_batch"], "ranks": start["world"]}
    return batches


def other_batch(own: Batches, other: Batches) -> str:
    """In words, what differs where two cells were launched on different numbers of ranks.

    The flags of a plan say how many samples a rank has, its launchers how many ranks there are, and
    only both together what is trained. Methods of different samples a rank may well have different
    numbers of ranks. Cells of older versions say nothing of it.
    """
    for step in sorted(own.keys() & other.keys()):
        a, b = own[step], other[step]
        same_flags = a["samples"] * b["ranks"] == b["samples"] * a["ranks"]
        if same_flags and a != b:
            return (
                f"{step}: {a['samples']} samples a step on {counted(a['ranks'], 'rank')}, not "
                f"{b['samples']} on {counted(b['ranks'], 'rank')}"
            )
    return ""


def check_batches(study: Study, cell: Cell) -> None:
    """Raises InputError where a finished cell was trained on another number of ranks.

    It ends the study: cells that follow would be trained in vain as well.
    """
    folders = study.folders
    own = batches_of(study.plan, folders, cell)
    for other in study.cells:
        if not is_done(folders, other):
            continue
        how = other_batch(own, made_of(folders, other).get("batches", {}))
        if how:
            run = folders.work(cell)
            if how.startswith("pretrain"):
                run = folders.pretraining(cell.pretraining)
            raise InputError(
                f"{cell.name} is of another recipe than {other.name} ({how}); remove {run} and "
                'launch it on as many ranks ("launchers"), or give another --out'
            )


def made_of(folders: Folders, cell: Cell) -> dict[str, Any]:
    """What cell.json says of a finished cell, in which "fingerprint" and "validation" are objects.

    Raises InputError where it, or the scores beside it, are not as they were written: scores that
    are cut short between two lines would be a table of fewer cases.
    """
    kept = folders.kept(cell)
    made = read_object(kept / MADE, ("fingerprint", "validation"))
    if made is None:
        raise damaged(kept / MADE)
    if made.get("scores_sha256") not in (None, sha256_of([kept / SCORES])):
        raise damaged(kept / SCORES)
    return made


def summary_of(folders: Folders, cell: Cell) -> dict[str, Any]:
    """What summary.json says of a finished cell. Raises InputError where it is not as written."""
    path = folders.kept(cell) / SUMMARY
    summary = read_object(path, ())
    if summary is None or not are_terms(summary):
        raise damaged(path)
    return summary


def damaged(path: Path) -> InputError:
    """For a file of a finished cell."""
    return InputError(
        f"{path}: is not as it was written; remove {path.parent}, and the cell is run again"
    )


def read_object(path: Path, keys: Sequence[str]) -> dict[str, Any] | None:
    """The object of a JSON file in which these keys hold objects; None where it has none."""
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # cut short, or no text
        return None
    is_whole = isinstance(content, dict) and all(isinstance(content.get(k), dict) for k in keys)
    return content if is_whole else None


def progress_of(unit: Unit) -> dict[str, Any]:
    """What is done of a unit.

    Raises CommandFailed where another version of the plan began it, or the file is damaged.
    """
    path = unit.folder / "progress.json"
    if not path.is_file():
        return {"begun": [], "seconds": {}, "fingerprint": unit.fingerprint}
    progress = read_object(path, ("seconds", "fingerprint"))
    if progress is None or not isinstance(progress.get("begun"), list):
        raise CommandFailed(f"{unit.name}: {path}: is not as it was written; remove {unit.folder}")
    how = difference(unit.fingerprint, progress["fingerprint"])
    if how:
        raise CommandFailed(
            f"{unit.name}: begun by another version of the plan ({printable(how)}); "
            f"remove {unit.folder}"
        )
    return progress


def note_progress(unit: Unit, progress: Mapping[str, Any]) -> None:
    unit.folder.mkdir(parents=True, exist_ok=True)
    write_bytes(unit.folder / "progress.json", json.dumps(progress, indent=1).encode())


# --- what a run says of itself


def events_of(log: Path) -> list[dict[str, Any]]:
    """The events of a log.jsonl, without a line that was cut short."""
    return [event for event in json_lines(log) if isinstance(event.get("event"), str)]


def has_finished(log: Path) -> bool:
    """Whether a run has come to its last step: a signal also ends it with exit code 0."""
    events = events_of(log)
    return bool(events) and events[-1].get("reason") == "finished"


def last_validation(log: Path) -> dict[str, Any]:
    """Step, Dice and number of cases of the last validation, and the best Dice of all."""
    found: dict[str, Any] = {}
    best = None
    for event in events_of(log):
        if event["event"] != "validation":
            continue
        found = {key: event.get(key) for key in ("step", "dice", "cases")}
        if isinstance(event.get("dice"), int | float):
            best = max(best or 0.0, event["dice"])
    return {**found, "best_dice": best}


def start_of(log: Path) -> dict[str, Any]:
    """The event that a run last started with, or nothing."""
    starts = [event for event in events_of(log) if event["event"] in ("start", "resume")]
    return starts[-1] if starts else {}


def versions_of(log: Path) -> dict[str, Any]:
    """Versions and machine of a run, where it has started."""
    start = start_of(log)
    return {key: start.get(key) for key in VERSIONS} if start else {}


def last_line(log: Path) -> str:
    """The last line that a command has printed, at most 300 characters of it."""
    if not log.is_file():  # someone has removed the folder meanwhile
        return "its log is gone"
    lines = log.read_text(errors="replace").split("\n")
    printed = [line.strip() for line in lines if line.strip()]
    return printed[-1][-300:] if printed else "it printed nothing"


# --- time


def progress_in_words(study: Study) -> str:
    """Like "3/12 done, 40 min left for one runner".

    What other runners have finished counts as done. How many work along is not asked: they come and
    go, so the time is said for one.
    """
    done = [cell for cell in study.chosen if is_done(study.folders, cell)]
    left = [cell for cell in study.remaining if cell not in done]
    seconds = time_left(study, left)
    time = "time left is not measured yet"
    if seconds is not None:
        time = f"{in_words(seconds)} left for one runner"
    return f"{len(done)}/{len(study.chosen)} done, {time}"


def time_left(study: Study, cells: Sequence[Cell]) -> float | None:
    """Seconds of all these cells, one after the other; None where nothing was measured."""
    times = read_times(study.folders.times)
    total = 0.0
    counted_runs = set[str]()
    for cell in cells:
        seconds = time_of_cell(study, times, cell, counted_runs)
        if seconds is None:
            return None
        total += seconds
    return total


def time_of_cell(
    study: Study, times: Sequence[Mapping[str, Any]], cell: Cell, runs: set[str]
) -> float | None:
    """Seconds that a cell will take, with its weights where they are neither there nor in `runs`.

    Its pre-training run joins `runs`.
    """
    folder = study.folders.pretraining(cell.pretraining)
    steps = ["finetune", "predict", "score"]
    if cell.pretraining.name not in runs and not has_finished(folder / "log.jsonl"):
        steps.insert(0, "pretrain")
    runs.add(cell.pretraining.name)

    total = 0.0
    for step in steps:
        method = cell.pretraining.method if step == "pretrain" else cell.method
        unit = {"method": method, "tuning": cell.tuning, "labels": cell.labels}
        seconds = expected(times, step=step, **unit)
        if seconds is None:
            return None
        total += seconds
    return total


def say(text: str) -> None:
    print(text, flush=True)
