"""dae/study: a study ends in the same table however it is stopped, and nothing is done twice."""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dae.errors import InputError
from dae.evaluation.cases import COLUMNS
from dae.evaluation.statistics import holm
from dae.study import runner
from dae.study.__main__ import main
from dae.study.cells import (
    Cell,
    Folders,
    cell_commands,
    cell_fingerprint,
    cells_of,
    cells_of_method,
    hash_of_list,
    pretrain_command,
)
from dae.study.locks import locked
from dae.study.plan import PLANS, Plan, arguments, read_plan
from dae.study.results import Entry, noise_of, percent, results_of
from dae.study.runner import Study, progress_in_words, run_all
from dae.study.table import page, write_tables
from dae.study.times import add_time, expected, read_times

ROOT = Path(__file__).parents[1]
FAKE = [sys.executable, "-I", "-S", str(ROOT / "tests" / "fake_scripts.py")]

PLAN: dict[str, Any] = {
    "name": "small",
    "data": {"pretrain": "pretrain.json", "finetune": "labelled.json"},
    "pretrain": {"steps": 3},
    "methods": {"mae": {"method": "mae"}, "dae": {"method": "dae"}},
    "finetune": {"steps": 3, "lr": 0.001},
    "labels": [2, "all"],
    "seeds": {"pretrain": {"default": 1, "dae": 2}, "finetune": 2},
    "launchers": dict.fromkeys(("pretrain", "finetune", "predict", "score"), FAKE),
}


def plan_file(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(PLAN | changes))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the fake commands say in ran.txt what they do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_COLUMNS", ",".join(COLUMNS))
    monkeypatch.setenv("FAKE_SLEEP", "0.005")
    monkeypatch.setattr(runner, "WAIT", 0.05)
    write_list(tmp_path / "pretrain.json", training=8, validation=1)
    write_list(tmp_path / "labelled.json")
    return tmp_path


def write_list(
    path: Path,
    *,
    training: int = 5,
    validation: int = 1,
    test: int = 6,
    folds: int = 0,
    **changes: Any,
) -> None:
    """A list with so many CT subjects in each split, whose files are empty."""
    content: dict[str, Any] = {"labels": {"0": "background", "1": "organ"}}
    for split, count in (("training", training), ("validation", validation), ("test", test)):
        content[split] = []
        for n in range(count):
            case = f"{path.stem}_{split}{n}"
            entry = {"image": f"{case}.nii.gz", "label": f"{case}_label.nii.gz", "modality": "ct"}
            content[split].append({**entry, "subject": case})
            for key in ("image", "label"):
                (path.parent / entry[key]).touch()
    for n, entry in enumerate(content["training"]):
        if folds:
            entry["fold"] = n % folds
    path.write_text(json.dumps(content | changes))


def study_in(out: Path, **changes: Any) -> Study:
    plan = read_plan(str(plan_file(Path.cwd(), **changes)))
    folders = Folders(out)
    cells = cells_of(plan)
    return Study(plan, folders, cells, keep=False, after_cell=lambda: None)


def report(study: Study) -> None:
    write_tables(study.plan, study.folders, study.cells)


def command_line(*words: str) -> int:
    """`python -m dae.study WORDS` in this process."""
    before = sys.argv
    sys.argv = ["study", *words]
    try:
        return main()
    finally:
        sys.argv = before


def ran(folder: Path, what: str = "end") -> Counter[str]:
    """How often each command has come to its end: "train_seg.py out/work/cells/..." -> number."""
    path = folder / "ran.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.removeprefix(f"{what} ") for line in lines if line.startswith(what))


def tables(out: Path) -> list[bytes]:
    report(study_in(out))
    return [(out / name).read_bytes() for name in ("table.md", "table.csv", "cases.csv")]


# --- plans


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        cells_of(read_plan(str(plan_file(folder, **changes))))
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": {}}, '"method" is not read; "methods" was probably meant'),
        ({"colour": 1}, '"colour" is not read'),
        ({"methods": {}}, '"methods" is missing'),
        ({"methods": {"a b": {}}}, "a name has letters"),
        ({"methods": {"dae": {"maskratio": 0.4}}}, '"dae": pretrain'),
        ({"methods": {"dae": {"seed": 1}}}, '"seed" is a flag that the study itself sets'),
        ({"methods": {"dae": {"finetune": {"lr": "fast"}}}}, '"dae": finetune'),
        ({"finetune": {"label_count": 3}}, '"label_count" is a flag that the study itself sets'),
        ({"finetune": ["lr"]}, '"finetune" is an object'),
        ({"predict": {"tat": True}}, '"predict"'),
        ({"score": {"policy": "diagonal"}}, '"policy" is a flag that the study itself sets'),
        ({"labels": [0]}, '"labels": 0'),
        ({"labels": [1.5]}, '"labels": 1.5'),
        ({"labels": ["most"]}, '"labels": most'),
        ({"labels": [2, 2]}, '"labels" has a value twice'),
        ({"labels": "all"}, '"labels" is a list'),
        ({"methods": {"mae": {"labels": "all"}}}, '"mae": "labels" is a list'),
        ({"methods": {"mae": {"labels": []}}}, '"mae": "labels" is empty'),
        ({"methods": {"mae": {"labels": [9]}}}, '"mae": "labels": 9 is none of'),
        ({"methods": {"mae": {"labels": ["all", "all"]}}}, '"mae": "labels" has a value twice'),
        ({"baseline": "scratch"}, '"scratch" is none of the methods'),
        ({"headline": ["dae", "x"]}, '"x" is none of the methods'),
        ({"checkpoint": "step-3.pt"}, "take last.pt or best.pt"),
        ({"split": "training"}, "take test or validation"),
        ({"folds": [0, 1]}, '"split" must be "validation"'),
        ({"seeds": {"dae": 3}}, '"dae" is not read'),
        ({"seeds": {"pretrain": {"dea": 3}}}, '"dea" is not read; there are default, mae'),
        ({"seeds": {"finetune": 0}}, "at least one"),
        ({"seeds": {"pretrain": 2, "finetune": 1, "crossed": False}}, "fewer tuning seeds"),
        ({"data": {"tests": "x"}}, '"tests" is not read; "test" was probably meant'),
        ({"data": {"phantoms": {"heds": 2}}}, '"phantoms": unrecognized arguments: --heds'),
        ({"launchers": {"train": []}}, '"train" is not read'),
        ({"name": "../a"}, '"name": "../a"'),
        ({"name": 5}, '"name" is a text'),
        ({"description": ["a"]}, '"description" is a text'),
        ({"methods": 5}, '"methods" is an object'),
        ({"methods": {"dae": {"finetune": 5}}}, '"dae": "finetune" is an object of flags'),
        ({"methods": {"..": {}}}, '"..": a name has letters'),
        ({"methods": {"dae": {"help": True}}}, '"help" is no flag of a plan'),
        ({"labels": [[2]]}, '"labels" is a list of values'),
        ({"labels": [float("inf")]}, '"labels": inf'),
        ({"folds": [-1], "split": "validation"}, '"folds": -1'),
        ({"folds": ["a"], "split": "validation"}, '"folds": a'),
        ({"folds": [], "split": "validation"}, '"folds" is empty'),
        ({"scratch_lr": ["fast"]}, '"scratch_lr": fast'),
        ({"scratch_lr": [0]}, '"scratch_lr": 0'),
        ({"headline": ["dae"]}, '"headline" is a list of two methods'),
        ({"seeds": {"pretrain": "two"}}, "pretrain: two: a whole number"),
        ({"seeds": {"finetune": {"dae": 1.5}}}, "finetune: 1.5: a whole number"),
        ({"seeds": {"crossed": "no"}}, '"crossed" is true or false'),
        ({"data": {"pretrain": 5}}, '"data": "pretrain" is the path of a list'),
        ({"data": {"phantoms": 5}}, '"data": "phantoms" is an object of flags'),
        ({"launchers": {"pretrain": "torchrun"}}, '"pretrain" is a list of words'),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_by_the_name_of_its_key(
    here: Path, changes: dict[str, Any], words: str
) -> None:
    line = refusal(here, **changes)
    assert words in line
    assert "plan.json" in line
    assert "\n" not in line


def test_a_plan_that_is_no_file_names_those_that_there_are() -> None:
    with pytest.raises(InputError, match="no plan of that name; there are"):
        read_plan("tabel4")


def test_a_list_of_the_command_line_comes_before_the_plans(here: Path) -> None:
    plan = read_plan(str(plan_file(here)), ["test=other.json", "finetune=mine.json"])
    assert plan.data == {
        "pretrain": "pretrain.json",
        "finetune": "mine.json",
        "test": "other.json",
    }
    with pytest.raises(InputError, match="--data tests=x"):
        read_plan(str(plan_file(here)), ["tests=x"])


def test_a_list_below_the_home_folder_counts_by_its_content(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    data = {"pretrain": "pretrain.json", "finetune": "~/labelled.json"}
    hashes = []
    for content in ("{}", '{"other": "list"}'):
        (here / "labelled.json").write_text(content)
        study = study_in(here / "out", data=data)
        made = cell_fingerprint(study.plan, study.folders, study.cells[0])
        hashes.append(made["finetune_data"])
    assert len(set(hashes)) == 2


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_every_plan_of_the_package_is_one_that_can_be_run(path: Path) -> None:
    plan = read_plan(path.stem, ["pretrain=a.json", "finetune=b.json"])
    assert plan.name == path.stem
    assert plan.description
    cells = cells_of(plan)
    assert plan.baseline in {cell.method for cell in cells}
    for cell in cells[:3]:
        cell_commands(plan, Folders(Path("out")), cell)


# --- cells and commands


def test_the_headline_pair_comes_first_seed_by_seed_and_label_by_label(here: Path) -> None:
    methods = {"noise": {"method": "noise"}, **PLAN["methods"]}
    plan = read_plan(str(plan_file(here, methods=methods, headline=["dae", "mae"])))
    names = [cell.name for cell in cells_of(plan)]
    assert names[:4] == ["mae-n2-p0-t0", "dae-n2-p0-t0", "mae-all-p0-t0", "dae-all-p0-t0"]
    assert all(name.startswith(("mae", "dae")) for name in names[:12])
    assert all(name.startswith("noise") for name in names[12:])
    assert len(names) == len(set(names)) == 16


def test_seeds_are_crossed_or_go_in_pairs(here: Path) -> None:
    seeds = {"pretrain": 2, "finetune": 3}
    crossed = read_plan(str(plan_file(here, seeds=seeds)))
    paired = read_plan(str(plan_file(here, seeds={**seeds, "crossed": False})))
    assert seeds_of(crossed) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert seeds_of(paired) == [(0, 0), (1, 1), (0, 2)]


def seeds_of(plan: Plan) -> list[tuple[int, int]]:
    cells = [cell for cell in cells_of(plan) if (cell.method, cell.labels) == ("mae", "all")]
    return [(cell.pretraining.seed, cell.seed) for cell in cells]


def test_methods_that_differ_by_their_fine_tuning_share_their_weights(here: Path) -> None:
    encoder = {"method": "dae", "finetune": {"transfer": "encoder"}}
    methods = {"dae": {"method": "dae"}, "encoder": encoder}
    plan = read_plan(str(plan_file(here, methods=methods, seeds={})))
    runs = {cell.method: cell.pretraining.name for cell in cells_of(plan)}
    assert runs == {"dae": "dae-p0", "encoder": "dae-p0"}


def commands_of(plan: Plan, name: str) -> dict[str, str]:
    """The text of each command of a cell."""
    cell = next(cell for cell in cells_of(plan) if cell.name == name)
    folders = Folders(Path("out"))
    commands = [pretrain_command(plan, folders, cell.pretraining)]
    commands += cell_commands(plan, folders, cell)
    return {command.step: command.text for command in commands}


def test_the_commands_of_a_cell_are_those_that_a_person_would_type(here: Path) -> None:
    changes: dict[str, Any] = {"launchers": {"pretrain": ["torchrun", "--nproc_per_node=8"]}}
    plan = read_plan(str(plan_file(here, **changes, predict={"tta": True})))
    assert commands_of(plan, "dae-n2-p1-t0") == {
        "pretrain": "torchrun --nproc_per_node=8 train_pretrain.py --steps 3 --method dae "
        "--data pretrain.json --seed 1 --out out/work/pretrain/dae-p1 --resume",
        "finetune": "python train_seg.py --steps 3 --lr 0.001 --label-count 2 "
        "--data labelled.json --pretrained out/work/pretrain/dae-p1/last.pt --seed 0 "
        "--out out/work/cells/dae-n2-p1-t0/finetune --resume",
        "predict": "python eval.py predict --tta --data labelled.json --split test "
        "--checkpoint out/work/cells/dae-n2-p1-t0/finetune/last.pt "
        "--out out/work/cells/dae-n2-p1-t0/predictions",
        "score": "python eval.py score --data labelled.json --split test "
        "--predictions out/work/cells/dae-n2-p1-t0/predictions "
        "--out out/work/cells/dae-n2-p1-t0/scores",
    }


def test_a_fold_is_held_out_and_scored_and_another_list_has_none(here: Path) -> None:
    folds = read_plan(str(plan_file(here, folds=[0, 3], split="validation", labels=[0.5])))
    commands = commands_of(folds, "dae-share0.5-p0-t1-fold3")
    assert "--label-fraction 0.5 " in commands["finetune"]
    assert "--fold 3 " in commands["finetune"]
    assert "--split validation --fold 3 " in commands["score"]
    assert "--fold" not in commands["predict"]  # the checkpoint knows whom it held out

    data = {**PLAN["data"], "test": "elsewhere.json"}
    elsewhere = read_plan(str(plan_file(here, folds=[0, 3], data=data)))
    commands = commands_of(elsewhere, "dae-all-p0-t1-fold3")
    assert "--fold 3 " in commands["finetune"]
    for step in ("predict", "score"):
        assert "--data elsewhere.json --split test " in commands[step]
        assert "--fold" not in commands[step]


def test_a_drawn_fold_is_scored_by_the_seed_that_drew_it(here: Path) -> None:
    changes: dict[str, Any] = {"finetune": {"split_seed": 7}, "split": "validation", "folds": [1]}
    plan = read_plan(str(plan_file(here, **changes)))
    commands = commands_of(plan, "dae-all-p0-t1-fold1")
    assert "--fold 1" in commands["finetune"] and "--split-seed 7 " in commands["finetune"]
    assert "--split validation --fold 1 --split-seed 7 " in commands["score"]


def test_a_list_that_is_tuned_on_is_not_tested_on_by_its_validation_cases(here: Path) -> None:
    """Scratch would choose its learning rate by the cases that are reported."""
    data = {**PLAN["data"], "test": "./labelled.json"}
    plan = read_plan(str(plan_file(here, data=data, split="validation")))
    with pytest.raises(InputError, match=r'"test": labelled.json is the list of "finetune"'):
        commands_of(plan, "dae-all-p0-t1")
    assert commands_of(read_plan(str(plan_file(here, data=data))), "dae-all-p0-t1")


def test_scratch_may_have_its_own_learning_rates(here: Path) -> None:
    methods = {"scratch": {"finetune": {"from_scratch": True}}, "dae": {"method": "dae"}}
    plan = read_plan(str(plan_file(here, methods=methods, scratch_lr=[1, 3])))
    assert "--lr 0.001 " in commands_of(plan, "scratch-all-p0-t0")["finetune"]
    assert "--lr 0.003 " in commands_of(plan, "scratch-all-p0-t0-lr3")["finetune"]
    assert not [cell for cell in cells_of(plan) if cell.method == "dae" and cell.factor != 1]

    # A rate that only the preset has is multiplied as well.
    preset = read_plan(
        str(plan_file(here, methods=methods, scratch_lr=[3], finetune={"preset": "btcv"}))
    )
    assert "--lr 0.0012 " in commands_of(preset, "scratch-all-p0-t0-lr3")["finetune"]


def test_a_method_with_a_learning_rate_of_its_own_has_no_other(here: Path) -> None:
    probe = {"method": "scratch", "finetune": {"schedule": "probe", "lr": 0.1}}
    changes = {"methods": {"scratch": {"method": "scratch"}, "probe": probe}, "labels": ["all"]}
    plan = read_plan(str(plan_file(here, scratch_lr=[1, 3], seeds={}, **changes)))
    factors = [(cell.method, cell.factor) for cell in cells_of(plan)]
    assert factors == [("scratch", 1), ("scratch", 3), ("probe", 1)]


def test_a_method_may_take_some_of_the_labels_alone(here: Path) -> None:
    methods = {
        "mae": {"method": "mae"},
        "long": {"method": "mae", "labels": ["all", 2], "finetune": {"steps": 9}},
    }
    plan = read_plan(str(plan_file(here, methods=methods, labels=[2, 3, "all"], seeds={})))
    assert [cell.labels for cell in cells_of_method(plan, "mae")] == [2, 3, "all"]
    assert [cell.labels for cell in cells_of_method(plan, "long")] == [2, "all"]  # in this order

    # "labels" is no flag of pre-training, so the two share their weights.
    assert {cell.pretraining.name for cell in cells_of(plan)} == {"mae-p0"}


def test_a_number_of_labels_is_typed_as_a_whole_number(here: Path) -> None:
    plan = read_plan(str(plan_file(here, labels=[2.0])))
    assert "--label-count 2 " in commands_of(plan, "mae-n2-p0-t0")["finetune"]


def test_flags_are_written_as_they_are_typed() -> None:
    flags = {"crop": [8, 8, 16], "tta": True, "foreground_crop": False, "lr": 1e-4, "amp": "off"}
    typed = "--crop 8 8 16 --tta --no-foreground-crop --lr 0.0001 --amp off"
    assert " ".join(arguments(flags)) == typed


# --- running


def test_a_study_runs_every_command_once_and_keeps_what_is_small(here: Path) -> None:
    out = here / "out"
    assert run_all(study_in(out)) == []
    steps = Counter(line.split()[0] for line in ran(here))
    assert steps == {"train_pretrain.py": 3, "train_seg.py": 12, "predict": 12, "score": 12}
    assert set(ran(here).values()) == {1}

    kept = out / "cells" / "dae-n2-p1-t0"
    assert {file.name for file in kept.iterdir()} == {"scores.csv", "summary.json", "cell.json"}
    made = json.loads((kept / "cell.json").read_text())
    assert len(made["commands"]) == 4
    assert (made["torch"], made["validation"]["cases"]) == ("fake", 1)
    assert list((out / "work" / "cells").iterdir()) == []  # weights and predictions are large
    assert (out / "work" / "pretrain" / "dae-p1" / "last.pt").is_file()

    before = ran(here)
    assert run_all(study_in(out)) == []
    assert ran(here) == before  # a second time there is nothing to do


def test_with_keep_the_weights_and_predictions_stay(here: Path) -> None:
    study = study_in(here / "out", labels=["all"])
    study.keep = True
    run_all(study)
    assert (here / "out/work/cells/dae-all-p0-t0/finetune/last.pt").is_file()
    assert (here / "out/work/cells/dae-all-p0-t0/predictions").is_dir()


def test_weights_that_are_gone_are_made_again_for_the_one_cell_that_lacks(here: Path) -> None:
    out = here / "out"
    run_all(study_in(out))
    before = tables(out)
    shutil.rmtree(out / "work")
    shutil.rmtree(out / "cells" / "dae-n2-p1-t0")
    (here / "ran.txt").unlink()

    run_all(study_in(out))
    assert [line.split()[0] for line in ran(here)] == [
        "train_pretrain.py",
        "train_seg.py",
        "predict",
        "score",
    ]
    assert tables(out) == before


def start(out: Path, **changes: Any) -> multiprocessing.Process:
    """The study in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=in_process, args=(out, changes))
    process.start()
    return process


def in_process(out: Path, changes: dict[str, Any]) -> None:
    os.setsid()  # so that the runner can be killed with its command, or without
    sys.exit(2 if run_all(study_in(out, **changes)) else 0)


def test_a_study_killed_ten_times_at_random_ends_in_the_same_tables(here: Path) -> None:
    run_all(study_in(here / "whole"))  # imports what the processes to be killed will have
    begun = time.perf_counter()
    run_all(study_in(here / "again"))
    seconds = time.perf_counter() - begun  # more on a busy machine

    rng = random.Random(0)
    out = here / "killed"
    alive = 0
    for number in range(10):
        process = start(out)
        time.sleep(rng.uniform(0.05, 0.3) * seconds)
        alive += process.is_alive()
        with_its_command = number % 2
        if process.is_alive() and with_its_command:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.is_alive():
            process.kill()
        process.join()
    assert alive > 3
    done = len(list((out / "cells").glob("*/cell.json")))

    assert run_all(study_in(out)) == []
    assert 0 < done <= 12
    assert tables(out) == tables(here / "whole")
    assert not ran(here, "clash")


def test_three_runners_at_once_do_no_command_twice_and_end_in_the_same_tables(here: Path) -> None:
    run_all(study_in(here / "whole"))
    (here / "ran.txt").unlink()

    processes = [start(here / "shared") for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(ran(here)) == 3 + 3 * 12
    assert set(ran(here).values()) == set(ran(here, "start").values()) == {1}
    assert not ran(here, "clash")
    assert tables(here / "shared") == tables(here / "whole")


def test_runners_are_killed_while_others_work_and_the_tables_stay_the_same(here: Path) -> None:
    run_all(study_in(here / "whole"))
    rng = random.Random(1)
    out = here / "shared"
    steady = start(out)
    for _ in range(5):
        process = start(out)
        time.sleep(rng.uniform(0.1, 0.4))
        process.kill()
        process.join()
    steady.join()
    assert steady.exitcode == 0
    assert tables(out) == tables(here / "whole")
    assert not ran(here, "clash")


def test_a_command_holds_the_lock_after_its_runner_was_killed(here: Path) -> None:
    path = here / "locks" / "a.lock"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path) as lock:
            assert lock is not None
            sleeper = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
            os.write(writer, str(sleeper.pid).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    sleeper_pid = int(os.read(reader, 20))
    with locked(path) as lock:
        assert lock is None

    os.kill(sleeper_pid, signal.SIGKILL)
    assert within(5, lambda: is_free(path))


def test_a_runner_waits_for_the_command_of_another_that_was_killed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one: dict[str, Any] = {"methods": {"dae": {}}, "labels": ["all"], "seeds": {}}
    monkeypatch.setenv("FAKE_SLEEP", "1.5")
    process = start(here / "out", **one)
    assert within(20, lambda: ran(here, "start"))
    process.kill()
    process.join()

    monkeypatch.setenv("FAKE_SLEEP", "0.005")
    assert run_all(study_in(here / "out", **one)) == []
    assert not ran(here, "clash")
    assert ran(here)[f"train_pretrain.py {here}/out/work/pretrain/dae-p0"] == 2


@pytest.mark.parametrize(
    "number, to_both", [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_to_the_runner_is_passed_on_and_the_command_saves_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, to_both: bool
) -> None:
    monkeypatch.setenv("FAKE_SLEEP", "60")
    command = [sys.executable, "-m", "dae.study", str(plan_file(here)), "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        assert within(60, lambda: ran(here, "start"))
        time.sleep(0.2)  # so that the command has its handlers
        if to_both:  # as the keyboard does
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert printed.endswith("stopped; the same command goes on\n")
    assert ran(here, "saved") == {"train_pretrain.py out/work/pretrain/mae-p0": 1}
    signals = Counter(line.split()[0] for line in ran(here, "signal"))
    assert signals == ({"SIGINT": 1, "SIGTERM": 1} if to_both else {"SIGTERM": 1})


def is_free(path: Path) -> bool:
    with locked(path) as lock:
        return lock is not None


def within(seconds: float, condition: Any) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# --- what goes wrong


def test_a_cell_that_fails_is_named_with_its_log_and_the_others_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "cells/dae-n2-p1-t0/finetune")
    plan = str(plan_file(here))
    with pytest.raises(InputError) as caught:
        command_line(plan, "--out", "out")
    line = str(caught.value)
    assert line.startswith("1 failure: dae-n2-p1-t0: finetune: exit code 2: train_seg.py: --lr: it")
    assert "out/work/logs/dae-n2-p1-t0.log" in line
    assert len(list((here / "out/cells").glob("*/cell.json"))) == 11
    assert "1 of 2 runs" not in (here / "out/table.md").read_text()
    assert "3 of 4 runs" in (here / "out/table.md").read_text()

    monkeypatch.delenv("FAKE_FAIL")
    assert command_line(plan, "--out", "out") == 0
    assert "of 4 runs" not in (here / "out/table.md").read_text()


def test_weights_that_cannot_be_made_fail_once_for_all_their_cells(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pretrain/dae-p1")
    with pytest.raises(InputError, match=r"^1 failure: dae-p1: pretrain: exit code 2"):
        command_line(str(plan_file(here)), "--out", "out")
    assert ran(here, "start")["train_pretrain.py out/work/pretrain/dae-p1"] == 1
    assert len(list((here / "out/cells").glob("*/cell.json"))) == 8


def test_a_launcher_that_is_not_there_is_an_error_of_one_line(here: Path) -> None:
    failed = run_all(study_in(here / "out", launchers={"pretrain": ["no-such-launcher"]}))
    assert set(failed) == {
        f"{run}: no-such-launcher: No such file or directory"
        for run in ("mae-p0", "dae-p0", "dae-p1")
    }


def test_a_cell_of_another_version_of_the_plan_is_named_and_not_mixed_in(here: Path) -> None:
    out = here / "out"
    run_all(study_in(out))
    other = study_in(out, finetune={"steps": 4, "lr": 0.001})
    with pytest.raises(InputError, match=r"another version of the plan .*steps was 3, and is 4"):
        run_all(other)
    report(other)
    text = (out / "table.md").read_text()
    assert "mae-n2-p0-t0 is left out: another version of the plan" in text
    assert not (out / "table.csv").read_text().count("0.")

    (here / "labelled.json").unlink()  # a report needs no lists
    report(study_in(out))
    assert "left out" not in (out / "table.md").read_text()
    write_list(here / "labelled.json", training=4)
    with pytest.raises(InputError, match="finetune_data was"):
        run_all(study_in(out))


def test_a_list_to_test_on_makes_another_version_of_the_plan(here: Path) -> None:
    out = here / "out"
    write_list(here / "elsewhere.json")
    other: dict[str, Any] = {"data": {**PLAN["data"], "test": "elsewhere.json"}}
    run_all(study_in(out))
    with pytest.raises(InputError, match=r"another version .*test_data was None"):
        run_all(study_in(out, **other))
    shutil.rmtree(out)
    run_all(study_in(out, **other))
    with pytest.raises(InputError, match=r"another version .*, and is None"):
        run_all(study_in(out))


def test_how_often_it_is_validated_counts_where_the_best_checkpoint_is_scored(here: Path) -> None:
    out = here / "out"
    often: dict[str, Any] = {"finetune": {**PLAN["finetune"], "validate_every": 1}}
    seldom: dict[str, Any] = {"finetune": {**PLAN["finetune"], "validate_every": 3}}
    run_all(study_in(out, **often))
    run_all(study_in(out, **seldom))  # the last checkpoint is the same

    best = {"checkpoint": "best.pt"}
    finished_study(here / "best", with_gains, **often, **best)
    with pytest.raises(InputError, match="validate_every was 1, and is 3"):
        run_all(study_in(here / "best", **seldom, **best))


@pytest.mark.parametrize("where", ["splits_final.json", "imagesTr/b_0000.nii.gz", "labelsTr/b.nii"])
def test_an_nnunet_folder_counts_with_its_splits_and_volumes(here: Path, where: str) -> None:
    folder = here / "Dataset001"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    (folder / "dataset.json").write_text("{}")
    before = hash_of_list(folder)
    (folder / "imagesTr/.DS_Store").write_text("of a Mac")
    assert before == hash_of_list(folder)
    (folder / where).write_text("[]")
    assert hash_of_list(folder) != before
    shutil.move(folder, here / "moved")
    assert hash_of_list(folder) == "" != hash_of_list(here / "moved")


def on_ranks(number: int, *steps: str) -> dict[str, Any]:
    """Launchers that start these steps on so many ranks."""
    launched = ["env", f"FAKE_RANKS={number}", *FAKE]
    return {"launchers": {**PLAN["launchers"], **dict.fromkeys(steps, launched)}}


@pytest.mark.parametrize(
    "step, gone", [("pretrain", "work/pretrain/dae-p0"), ("finetune", "work/cells/dae-n2-p0-t0")]
)
def test_a_study_that_goes_on_with_other_ranks_stops_and_is_not_mixed(
    here: Path, step: str, gone: str
) -> None:
    out = here / "out"
    two: dict[str, Any] = {"seeds": {}, **on_ranks(2, step)}
    four: dict[str, Any] = {"seeds": {}, **on_ranks(4, step)}
    first = {name: flags for name, flags in PLAN["methods"].items() if name == "mae"}
    run_all(study_in(out, methods=first, **two))
    made = json.loads((out / "cells/mae-n2-p0-t0/cell.json").read_text())
    assert made["batches"][step] == {"samples": 4, "ranks": 2}

    words = f"dae-n2-p0-t0 is of another recipe than mae-n2-p0-t0 .{step}: 8 samples a step on 4 "
    for _ in range(2):  # what was begun is not finished with the right launcher either
        with pytest.raises(InputError, match=f"{words}.*remove {out / gone} and launch"):
            run_all(study_in(out, **four))
    with pytest.raises(InputError, match=words):
        run_all(study_in(out, **two))
    assert not (out / "cells/dae-n2-p0-t0").exists()
    assert not ran(here)[f"predict {out}/work/cells/dae-n2-p0-t0/predictions"]

    shutil.rmtree(out / gone)
    assert run_all(study_in(out, **two)) == []


def test_methods_of_different_batches_a_rank_may_have_different_ranks(here: Path) -> None:
    methods = {"mae": {"batch_size": 4}, "dae": {"batch_size": 2}}
    plan: dict[str, Any] = {"methods": methods, "labels": ["all"], "seeds": {}}
    run_all(study_in(here / "out", **{**plan, "methods": {"mae": methods["mae"]}}))
    assert run_all(study_in(here / "out", **plan, **on_ranks(2, "pretrain"))) == []
    assert "another recipe" not in page_of(study_in(here / "out", **plan))


def test_weights_without_pretraining_are_the_same_on_any_ranks(here: Path) -> None:
    plan: dict[str, Any] = {"labels": ["all"], "seeds": {}}
    methods = {"scratch": {"method": "scratch"}, "dae": {"method": "dae"}}
    run_all(study_in(here / "out", **plan, methods={"dae": methods["dae"]}))
    two = on_ranks(2, "pretrain")
    assert run_all(study_in(here / "out", **plan, methods=methods, **two)) == []


def test_cells_of_different_ranks_are_told_in_the_table_and_old_ones_are_read(here: Path) -> None:
    out = here / "out"
    run_all(study_in(out, labels=["all"]))
    made = out / "cells/dae-all-p1-t1/cell.json"
    content = json.loads(made.read_text())
    content["batches"]["finetune"] = {"samples": 8, "ranks": 4}
    made.write_text(json.dumps(content))
    text = page_of(study_in(out, labels=["all"]))
    assert text.count("is of another recipe than") == 1
    assert (
        "- dae-all-p1-t1 is of another recipe than mae-all-p0-t0 (finetune: 8 samples a step on 4 "
        "ranks, not 2 on 1 rank)."
    ) in text

    del content["batches"]
    made.write_text(json.dumps(content))
    assert "another recipe" not in page_of(study_in(out, labels=["all"]))
    assert run_all(study_in(out, labels=["all"])) == []


def test_another_device_or_more_methods_and_labels_leave_finished_cells_as_they_are(
    here: Path,
) -> None:
    out = here / "out"
    run_all(study_in(out))
    (here / "ran.txt").unlink()
    methods = {**PLAN["methods"], "local": {"method": "local_mask"}}
    more: dict[str, Any] = {"methods": methods, "finetune": {**PLAN["finetune"], "device": "cpu"}}
    assert run_all(study_in(out, **more)) == []
    assert {line.split("/")[-2] for line in ran(here) if line.startswith("train_seg")} == {
        f"local-{labels}-p0-t{seed}" for labels in ("n2", "all") for seed in (0, 1)
    }


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"fingerprint": 5}'])
def test_a_cell_that_was_cut_short_is_named_with_what_to_do(here: Path, content: str) -> None:
    out = here / "out"
    run_all(study_in(out, labels=["all"]))
    (out / "cells/mae-all-p0-t0/cell.json").write_text(content)
    for again in (run_all, report):
        with pytest.raises(InputError, match=r"mae-all-p0-t0/cell\.json: .*; remove "):
            again(study_in(out, labels=["all"]))


def test_scores_that_lack_lines_are_not_a_table_of_fewer_cases(here: Path) -> None:
    out = here / "out"
    run_all(study_in(out, labels=["all"]))
    scores = out / "cells/mae-all-p0-t0/scores.csv"
    scores.write_text("\n".join(scores.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(InputError, match=r"mae-all-p0-t0/scores\.csv: .*; remove "):
        report(study_in(out, labels=["all"]))


def test_a_cell_whose_progress_was_cut_short_fails_and_the_others_go_on(here: Path) -> None:
    progress = here / "out/work/cells/mae-all-p0-t0/progress.json"
    progress.parent.mkdir(parents=True)
    progress.write_text('{"begun')
    failed = run_all(study_in(here / "out", labels=["all"]))
    assert len(failed) == 1
    assert failed[0].endswith(f"; remove {progress.parent}")
    assert len(list((here / "out/cells").glob("*/cell.json"))) == 5


def test_a_command_whose_folder_is_removed_fails_alone(here: Path) -> None:
    gone = here / "gone.sh"
    gone.write_text("rm -r out/work; exit 3")
    failed = run_all(study_in(here / "out", launchers={"pretrain": ["sh", str(gone)]}))
    assert len(failed) == 3
    assert all("exit code 3: its log is gone" in line for line in failed)


def test_a_list_that_is_missing_is_named_before_anything_is_made(here: Path) -> None:
    data = {**PLAN["data"], "test": "elsewhere.json"}
    with pytest.raises(InputError, match=r"elsewhere\.json: .*--data test=LIST"):
        run_all(study_in(here / "out", data=data))
    assert not ran(here, "start")


IN_FOLDS: dict[str, Any] = {"split": "validation", "folds": [0, 1]}


@pytest.mark.parametrize(
    "of_list, changes, words",
    [
        (
            {},
            {"labels": [2, 50]},
            (
                "mae, labels 50: finetune: --label-count 50: there are 5 subjects to train on "
                "(labelled.json)"
            ),
        ),
        (
            {"folds": 2, "validation": 0, "test": 0},
            {**IN_FOLDS, "folds": [0, 7]},
            (
                "mae, labels 2, fold 7: finetune: --fold 7: the list has the folds 0, 1 "
                "(labelled.json)"
            ),
        ),
        (  # one fold is held out, so that only some of the subjects are left to train on
            {"validation": 0, "test": 0},
            {**IN_FOLDS, "labels": [5]},
            "mae, labels 5, fold 0: finetune: --label-count 5: there are 4 subjects",
        ),
        (
            {},
            {**IN_FOLDS, "labels": ["all"]},
            (
                "mae, labels all, fold 0: finetune: --fold 0: cannot choose what is held out: "
                'the list has a "validation" of its own'
            ),
        ),
        (
            {"labels": {"0": "background"}},
            {},
            'mae, labels 2: finetune: labelled.json: "labels" must name the background',
        ),
        (
            {"test": 0},
            {},
            "mae, labels 2: predict: --split test: labelled.json has no such items",
        ),
        (
            {},
            {"methods": {"mae": {"method": "mae"}, "dae": {"fold": 3}}},
            "dae, labels 2: pretrain: --fold 3: cannot choose what is held out",
        ),
        (
            {},
            {
                "finetune": {"lr": 1e308},
                "methods": {"dae": {"method": "scratch"}},
                "scratch_lr": [1, 1000],
            },
            "dae, labels 2: --lr inf: must be a number",
        ),
    ],
)
def test_what_a_list_does_not_have_is_said_before_hours_of_training(
    here: Path, of_list: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    write_list(here / "labelled.json", **of_list)
    with pytest.raises(InputError) as caught:
        run_all(study_in(here / "out", **changes))
    assert str(caught.value).startswith(f'plan "small": {words}')
    assert "\n" not in str(caught.value)
    assert not ran(here, "start")


def without_labels(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["test"][3]["label"]
    path.write_text(json.dumps(content))


def with_a_subject_that_is_trained_on(path: Path) -> None:
    content = json.loads(path.read_text())
    content["test"][3]["subject"] = "labelled_training0"
    path.write_text(json.dumps(content))


def with_other_classes(path: Path) -> None:
    content = json.loads(path.read_text())
    content["labels"] = {"0": "background", "1": "tumour"}
    path.write_text(json.dumps(content))


def with_an_image_of_mr(path: Path) -> None:
    content = json.loads(path.read_text())
    content["test"][3]["modality"] = "t1"
    path.write_text(json.dumps(content))


def with_a_label_map_that_is_gone(path: Path) -> None:
    (path.parent / "elsewhere_test3_label.nii.gz").unlink()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (with_an_image_of_mr, "test3.nii.gz: modality t1, and networks are fine-tuned on ct"),
        (with_a_label_map_that_is_gone, "elsewhere_test3_label.nii.gz: there is no such file"),
        (without_labels, "elsewhere_test3.nii.gz: has no "),
        (with_other_classes, "label 1 is 'tumour' there and 'organ' in the checkpoint"),
        (with_a_subject_that_is_trained_on, "trained on case labelled_training0; predict what"),
    ],
)
def test_cases_that_could_not_be_scored_are_said_before_hours_of_training(
    here: Path, spoil: Callable[[Path], None], words: str
) -> None:
    data = {**PLAN["data"], "test": "elsewhere.json"}
    whole: dict[str, Any] = {"data": data, "labels": ["all"], "methods": {"dae": {}}, "seeds": {}}
    write_list(here / "elsewhere.json")
    assert run_all(study_in(here / "whole", **whole)) == []

    spoil(here / "elsewhere.json")
    (here / "ran.txt").unlink()
    with pytest.raises(InputError, match=f'^plan "small": dae, labels all: predict: .*{words}'):
        run_all(study_in(here / "out", **whole))
    assert not ran(here, "start")


def test_a_volume_of_pre_training_that_is_gone_is_said_at_the_start(here: Path) -> None:
    (here / "pretrain_training2.nii.gz").unlink()
    with pytest.raises(InputError, match=r"pretrain: .*training2\.nii\.gz: there is no such file"):
        run_all(study_in(here / "out"))
    (here / "pretrain_training3_label.nii.gz").unlink()  # labels are not looked at
    (here / "pretrain_training2.nii.gz").touch()
    assert run_all(study_in(here / "out")) == []


@pytest.mark.parametrize(
    "method, words",
    [
        ({"method": "mae", "heads": [3, 5, 12, 24]}, "do not split into 5 heads"),
        ({"method": "mae", "backbone": "nowhere:Net"}, "--backbone nowhere:Net"),
        ({"method": "mae", "crop": [24, 24, 20]}, "20"),
        ({"method": "mae", "finetune": {"crop": [24, 24, 20]}}, "20"),
    ],
)
def test_a_network_that_cannot_be_built_is_said_at_the_start(
    method: dict[str, Any], words: str, here: Path
) -> None:
    """It is that of the last method, which would be reached after all others."""
    methods = {"dae": {"method": "dae"}, "other": method}
    with pytest.raises(InputError, match=rf'^plan "small": method "other": .*{words}'):
        run_all(study_in(here / "out", methods=methods))
    assert not ran(here, "start")


def test_folds_and_numbers_that_a_list_has_are_run(here: Path) -> None:
    write_list(here / "labelled.json", validation=0, test=0)  # five folds are drawn
    plan: dict[str, Any] = {**IN_FOLDS, "labels": [4, 0.5], "methods": {"dae": {}}, "seeds": {}}
    assert run_all(study_in(here / "out", **plan)) == []
    assert len(list((here / "out/cells").glob("*/cell.json"))) == 4


@pytest.mark.parametrize("name", ["table.md", "cases.csv", "figure.png"])
def test_no_table_replaces_a_file_that_is_not_of_this_study(here: Path, name: str) -> None:
    plan = str(plan_file(here))
    (here / "out").mkdir()
    (here / "out" / name).write_text("mine")
    for words in ([], ["--report"]):
        with pytest.raises(InputError, match=f'{name}: .* not of the study "small"'):
            command_line(plan, "--out", "out", *words)
    assert (here / "out" / name).read_text() == "mine"
    assert not ran(here, "start")


def test_two_studies_in_one_folder_do_not_replace_each_others_tables(here: Path) -> None:
    command_line(str(plan_file(here, labels=["all"])), "--out", "out")
    other = {"name": "other", "methods": {"noise": {"method": "noise"}}, "seeds": {}}
    with pytest.raises(InputError, match='not of the study "other"'):
        command_line(str(plan_file(here, **other)), "--out", "out")
    command_line(str(plan_file(here, labels=["all"])), "--out", "out", "--report")


# --- time


def test_the_dry_run_prints_each_cell_with_its_commands_and_the_time_it_will_take(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(plan_file(here))
    assert command_line(plan, "--out", "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "mae-n2-p0-t0: not measured yet" in text
    assert text.count("train_pretrain.py") == 3
    assert text.splitlines()[-1] == "12 cells, 12 to do, not measured yet"
    assert not (here / "out").exists()

    seconds = {"pretrain": 3600.0, "finetune": 600.0, "predict": 60.0, "score": 60.0}
    for step, time_of_step in seconds.items():
        add_time(here / "out/times.jsonl", {"step": step, "seconds": time_of_step})
    command_line(plan, "--out", "out", "--dry-run")
    text = capsys.readouterr().out
    assert "mae-n2-p0-t0: 72 min" in text
    assert "mae-n2-p0-t1: 12 min" in text  # the weights are made once
    assert (
        text.splitlines()[-1] == "12 cells, 12 to do, 5.4 h for one runner"
    )  # 3 h and 12 times 12 min


def test_the_time_left_is_that_of_one_runner_and_leaves_out_what_others_have_done(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one: dict[str, Any] = {"methods": {"dae": {}, "mae": {"method": "mae"}}, "labels": ["all"]}
    study = study_in(here / "out", **one, seeds={})
    for step, seconds in (("pretrain", 300), ("finetune", 600), ("predict", 60), ("score", 60)):
        add_time(here / "out/times.jsonl", {"step": step, "seconds": seconds})
    study.remaining = list(study.cells)
    assert progress_in_words(study) == "0/2 done, 34 min left for one runner"

    run_all(study_in(here / "out", **{**one, "methods": {"dae": {}}}, seeds={}))
    (here / "out/times.jsonl").write_text("")
    for step, seconds in (("pretrain", 300), ("finetune", 600), ("predict", 60), ("score", 60)):
        add_time(here / "out/times.jsonl", {"step": step, "seconds": seconds})
    assert progress_in_words(study) == "1/2 done, 17 min left for one runner"


def test_a_part_of_a_study_is_run_by_the_names_of_its_methods(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(plan_file(here))
    assert command_line(plan, "--out", "out", "--dry-run", "--only", "mae") == 0
    assert "\n4 cells, 4 to do" in capsys.readouterr().out
    assert command_line(plan, "--out", "out", "--only", "mae") == 0
    assert "4 cells, 4 of them to do" in capsys.readouterr().out
    assert {path.name[:3] for path in (here / "out/cells").iterdir()} == {"mae"}
    assert "Not run yet: dae." in (here / "out/table.md").read_text()

    # The other part, whose tables have both.
    assert command_line(plan, "--out", "out", "--only", "dae") == 0
    assert len(list((here / "out/cells").iterdir())) == 12
    parts = tables(here / "out")
    assert b"of 4 runs" not in parts[0]
    run_all(study_in(here / "whole"))
    assert parts == tables(here / "whole")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "dae", "made"], "--only made: is no method of the plan .*; there are mae, dae"),
        (["--report", "--only", "dae"], "--only: not beside --report"),
    ],
)
def test_a_part_that_there_is_not_is_refused(here: Path, flags: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        command_line(str(plan_file(here)), "--out", "out", *flags)
    assert not (here / "out").exists()


def test_a_step_takes_as_long_as_those_that_are_most_like_it(here: Path) -> None:
    path = here / "times.jsonl"
    for labels, method, seconds in (("all", "dae", 90), (5, "dae", 10), (5, "mae", 20)):
        add_time(path, {"step": "finetune", "labels": labels, "method": method, "seconds": seconds})
    with path.open("a") as file:
        file.write('5\n[]\n{"step": "finetune"}\n')  # no lines of this program
        file.write('{"step": "finetune", "sec')  # killed while writing
    times = read_times(path)
    assert expected(times, step="finetune", labels=5, method="mae") == 20
    assert expected(times, step="finetune", labels=5, method="noise") == 15
    assert expected(times, step="finetune", labels=20, method="noise") == 20  # the median of all
    assert expected(times, step="pretrain", method="dae") is None


# --- results


def finished_study(out: Path, dice: Any, validation: Any = None, **changes: Any) -> Study:
    """A study whose cells have the Dice of dice(cell), one for each case, and nothing has run."""
    study = study_in(out, **changes)
    for cell in study.cells:
        values = dice(cell)
        if values is None:
            continue
        kept = study.folders.kept(cell)
        kept.mkdir(parents=True)
        lines = [",".join(COLUMNS)]
        first = 0 if cell.fold is None else 100 * cell.fold
        for number, value in enumerate(values):
            row = {"case": f"s{first + number}", "class": "1", "name": "organ", "status": "ok"}
            lines.append(",".join(row.get(column, str(value)) for column in COLUMNS))
        (kept / "scores.csv").write_text("\n".join(lines))
        (kept / "summary.json").write_text("{}")
        made = {
            "fingerprint": cell_fingerprint(study.plan, study.folders, cell),
            "validation": {"dice": validation(cell) if validation else 0.5, "best_dice": 0.9},
        }
        (kept / "cell.json").write_text(json.dumps(made))
    return study


def entries_in(study: Study) -> dict[tuple[str, Any], Entry]:
    results = results_of(study.plan, study.folders, study.cells)
    return {(entry.name, entry.labels): entry for entry in results.entries}


def page_of(study: Study) -> str:
    return page(study.plan, results_of(study.plan, study.folders, study.cells))


GAINS = np.array([0.05, 0.02, -0.01, 0.04, 0.03, 0.01])
BASE = np.array([0.5, 0.6, 0.7, 0.8, 0.55, 0.65])


def with_gains(cell: Cell) -> list[float]:
    """DAE gains on 2 labels, more with each seed of both kinds."""
    values = BASE + 0.1 * (cell.labels == "all") + 0.02 * cell.seed
    if cell.method == "dae":
        values = values + GAINS + 0.1 * cell.pretraining.seed
    return list(values)


def test_a_case_is_averaged_over_its_runs_before_methods_are_compared(here: Path) -> None:
    entries = entries_in(finished_study(here / "out", with_gains))
    mae = entries["mae", 2]
    dae = entries["dae", 2]
    assert (len(mae.runs), len(dae.runs)) == (2, 4)
    assert mae.means["dice"].n == dae.means["dice"].n == 6  # cases, not cases times seeds
    assert mae.means["dice"].mean == pytest.approx(BASE.mean() + 0.01)

    differences = GAINS + 0.05
    against = dae.against["dice"]
    test = stats.ttest_1samp(differences, 0)
    interval = test.confidence_interval(0.95)
    assert against["difference"] == pytest.approx(differences.mean())
    assert (against["low"], against["high"]) == pytest.approx((interval.low, interval.high))
    assert against["t_p"] == pytest.approx(test.pvalue)
    assert against["sign_flip_p"] == 2 / 2**6
    assert mae.against == {}


def test_methods_are_compared_on_the_tuning_seeds_that_both_have(here: Path) -> None:
    """DAE is better by GAINS in each seed; its only run so far is of a seed that scores low."""

    def so_far(cell: Cell) -> list[float] | None:
        if cell.method == "dae":
            return None if cell.seed else list(BASE + GAINS)
        return list(BASE + 0.2 * cell.seed)

    seeds = {"pretrain": 1, "finetune": 2}
    study = finished_study(here / "out", so_far, labels=["all"], seeds=seeds)
    against = entries_in(study)["dae", "all"].against["dice"]
    assert against["difference"] == pytest.approx(GAINS.mean())


def test_a_seed_that_one_method_has_not_run_in_a_fold_is_left_out_of_that_fold(here: Path) -> None:
    """DAE is better by GAINS in each seed and fold, and lacks the high seed of fold 0."""

    def so_far(cell: Cell) -> list[float] | None:
        if cell.method == "dae":
            lacks = (cell.fold, cell.seed) == (0, 1)
            return None if lacks else list(BASE + GAINS + 0.2 * cell.seed)
        return list(BASE + 0.2 * cell.seed)

    seeds = {"pretrain": 1, "finetune": 2}
    study = finished_study(here / "out", so_far, labels=["all"], seeds=seeds, **IN_FOLDS)
    against = entries_in(study)["dae", "all"].against["dice"]
    assert against["n"] == 2 * len(GAINS)
    assert against["difference"] == pytest.approx(GAINS.mean())


def test_p_is_corrected_for_the_number_of_methods_on_the_same_labels(here: Path) -> None:
    methods = {"mae": {}, **{f"m{n}": {"noise_std": n / 10} for n in (1, 2, 3)}}
    rng = np.random.default_rng(0)
    dice = {name: BASE + rng.normal(0.02, 0.03, 6) for name in methods}
    study = finished_study(
        here / "out", lambda cell: dice[cell.method], methods=methods, labels=["all"], seeds={}
    )
    entries = entries_in(study)
    rows = [entries[f"m{n}", "all"].against["dice"] for n in (1, 2, 3)]
    for p in ("t_p", "wilcoxon_p", "sign_flip_p"):
        assert [row[f"{p}_holm"] for row in rows] == holm([row[p] for row in rows])


def test_the_spread_between_seeds_is_told_by_kind_of_seed(here: Path) -> None:
    study = finished_study(here / "out", with_gains)
    entries = entries_in(study)
    dae = noise_of(study.plan, entries["dae", 2])
    means = [0.0, 0.02, 0.1, 0.12]  # two tuning seeds of two pre-training seeds
    assert dae.runs == pytest.approx(np.std(means, ddof=1))
    assert dae.tuning == pytest.approx(np.std([0, 0.02], ddof=1))
    assert dae.pretraining == pytest.approx(np.std([0.01, 0.11], ddof=1))
    assert isnan(noise_of(study.plan, entries["mae", 2]).pretraining)


def test_seeds_that_go_together_do_not_say_which_kind_makes_the_spread(here: Path) -> None:
    seeds = {"pretrain": {"default": 1, "dae": 2}, "finetune": 2, "crossed": False}
    study = finished_study(here / "out", with_gains, seeds=seeds)
    noise = noise_of(study.plan, entries_in(study)["dae", 2])
    assert noise.runs == pytest.approx(np.std([0.0, 0.12], ddof=1))
    assert isnan(noise.pretraining) and isnan(noise.tuning)

    # Two tuning seeds of mae have one pre-training run: its share of the spread is not known.
    assert "SD between seeds 0.0849 and 0.0141 (of one pre-training)" in page_of(study)


def test_a_score_that_one_method_alone_has_is_said_to_be_left_out(here: Path) -> None:
    def dice(cell: Cell) -> list[float]:
        return [float("nan"), *BASE[1:]] if cell.method == "mae" else list(BASE + GAINS)

    study = finished_study(here / "out", dice, labels=["all"], seeds={})
    dae = entries_in(study)["dae", "all"]
    assert (dae.means["dice"].n, dae.against["dice"]["n"]) == (6, 5)
    note = "dae on all labels: 1 Dice, of a class in a case of a run, are there for it or for mae "
    assert note in page_of(study)


def scored_again(study: Study, name: str, changes: dict[tuple[int, str], str]) -> None:
    """The scores of a cell with other values: (line, column) -> value; lines are copied first."""
    path = study.folders.kept(next(c for c in study.cells if c.name == name)) / "scores.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    for (number, column), value in changes.items():
        while len(lines) <= number:
            lines.append(list(lines[-1]))
        lines[number][COLUMNS.index(column)] = value
    path.write_text("\n".join(map(",".join, lines)))


def test_an_organ_that_one_seed_has_invented_counts_in_that_seed_alone(here: Path) -> None:
    """The truth has no organ 2: a seed that invents it has a Dice of 0 there, others have none."""
    study = finished_study(here / "out", lambda cell: [0.9], labels=["all"], seeds={"finetune": 2})
    for cell in study.cells:
        invented = (cell.method, cell.seed) == ("dae", 0)
        dice, status = ("0", "spurious") if invented else ("nan", "absent")
        scored_again(
            study, cell.name, {(2, "class"): "2", (2, "dice"): dice, (2, "status"): status}
        )
    entries = entries_in(study)
    assert entries["mae", "all"].means["dice"].mean == pytest.approx(0.9)
    dae = entries["dae", "all"]
    assert dae.means["dice"].mean == pytest.approx((0.9 / 2 + 0.9) / 2)
    assert dae.scores["dice"] == {"s0": pytest.approx(0.675)}
    # Against mae, which has no score of it, it is left out, and that is said.
    assert dae.against["dice"]["difference"] == pytest.approx(0)
    assert "dae on all labels: 1 Dice, of a class in a case of a run, are there" in page_of(study)


def test_seeds_that_both_invent_an_organ_do_not_hide_a_difference(here: Path) -> None:
    """Dice .9 against .5 of organ 1. Organ 2 is not there, and each invents it in another seed."""
    study = finished_study(
        here / "out",
        lambda cell: [0.9 if cell.method == "dae" else 0.5],
        labels=["all"],
        seeds={"finetune": 2},
    )
    for cell in study.cells:
        invented = cell.seed == (cell.method == "dae")
        dice, status = ("0", "spurious") if invented else ("nan", "absent")
        scored_again(
            study, cell.name, {(2, "class"): "2", (2, "dice"): dice, (2, "status"): status}
        )
    against = entries_in(study)["dae", "all"].against["dice"]
    assert against["difference"] == pytest.approx(0.4)


def test_cells_that_were_scored_against_other_label_maps_are_not_averaged(here: Path) -> None:
    study = finished_study(here / "out", with_gains, labels=["all"], **IN_FOLDS)
    for cell in study.cells:
        labels = {f"s{100 * (cell.fold or 0)}": f"hash of fold {cell.fold}"}
        summary = {"labels": labels, "diagonals_mm": dict.fromkeys(labels, 10.0)}
        (study.folders.kept(cell) / "summary.json").write_text(json.dumps(summary))
    page_of(study)

    # Two patients of one name in two folds.
    last = study.folders.kept(study.cells[-1]) / "summary.json"
    last.write_text(json.dumps({"labels": {"s0": "hash of fold 1"}}))
    words = f"{last.parent}: scored against another label map of case s0 than mae-all-p0-t0-fold0"
    with pytest.raises(InputError, match=words):
        page_of(study)
    # The same voxels in another size.
    terms = {"labels": {"s0": "hash of fold 0"}, "diagonals_mm": {"s0": 11.0}}
    last.write_text(json.dumps(terms))
    with pytest.raises(InputError, match="another label map of case s0"):
        page_of(study)
    for content in ("[", '{"labels": ["s0"]}'):
        last.write_text(content)
        with pytest.raises(InputError, match=r"summary.json: is not as it was written; remove"):
            page_of(study)


def test_runs_without_a_seed_in_common_are_compared_and_said_to_have_none(here: Path) -> None:
    def so_far(cell: Cell) -> list[float] | None:
        return list(BASE) if (cell.method == "mae") == (cell.seed == 0) else None

    seeds = {"pretrain": 1, "finetune": 2}
    study = finished_study(here / "out", so_far, labels=["all"], seeds=seeds)
    assert "- dae on all labels: no tuning seed is there for it and for mae yet" in page_of(study)
    whole = finished_study(here / "whole", with_gains, labels=["all"], seeds=seeds)
    assert "no tuning seed" not in page_of(whole)


def test_the_noise_of_one_method_stands_in_for_that_of_the_other(here: Path) -> None:
    """SD of mae over two runs .0141: a run of dae and one of mae may lie 2 * .0141 * sqrt(2)
    apart.
    """

    def dice(cell: Cell) -> list[float] | None:
        if cell.method == "dae":
            return None if cell.seed else list(BASE + 0.03)
        return list(BASE + 0.02 * cell.seed)

    study = finished_study(here / "out", dice, labels=["all"], seeds={"finetune": 2})
    assert "The data cannot tell them apart: seeds alone may make 0.0400." in page_of(study)


def test_crossed_seeds_count_as_the_fewer_of_their_two_kinds(here: Path) -> None:
    """Runs of one pre-training are alike, two pre-trainings lie .04 apart: four runs are two."""

    def dice(cell: Cell) -> list[float]:
        return list(BASE + 0.04 * cell.pretraining.seed + 0.01 * (cell.method == "dae"))

    seeds = {"pretrain": 2, "finetune": 2}
    study = finished_study(here / "out", dice, labels=["all"], seeds=seeds)
    sd = float(np.std([0, 0, 0.04, 0.04], ddof=1))
    assert f"seeds alone may make {2 * sd:.4f}." in page_of(study)


def test_cells_of_other_devices_are_told(here: Path) -> None:
    study = finished_study(here / "out", with_gains, labels=["all"])
    for n, cell in enumerate(study.cells):
        made = study.folders.kept(cell) / "cell.json"
        content = json.loads(made.read_text())
        made.write_text(json.dumps({**content, "device": "cuda:1" if n else "cpu"}))
    number = len(study.cells) - 1
    assert f"one kind of device (1 on cpu, {number} on cuda): --amp auto differs." in page_of(study)


def test_cases_whose_distance_lacks_an_organ_are_counted(here: Path) -> None:
    study = finished_study(here / "out", with_gains, labels=["all"])
    distance = COLUMNS.index("hd95")
    status = COLUMNS.index("status")
    # In both runs of mae the same case misses its organ, in one of them another one as well. A
    # class that neither map has is nobody's miss.
    for seed, case, what in (
        (0, 2, "missed"),
        (1, 2, "missed"),
        (1, 4, "spurious"),
        (1, 5, "absent"),
    ):
        scores = here / f"out/cells/mae-all-p0-t{seed}/scores.csv"
        lines = [line.split(",") for line in scores.read_text().splitlines()]
        lines[1 + case][distance] = "inf" if what != "absent" else "nan"
        lines[1 + case][status] = what
        scores.write_text("\n".join(map(",".join, lines)))
    report(study)
    with (here / "out/table.csv").open() as file:
        lacking = {
            (line["method"], line["metric"]): line["cases_lacking_an_organ"]
            for line in csv.DictReader(file)
        }
    assert lacking["mae", "hd95"] == "2"
    assert lacking["mae", "dice"] == lacking["dae", "hd95"] == "0"
    note = "Cases with such an organ in a run: mae 2 of 6."
    assert note in (here / "out/table.md").read_text()
    assert "such an organ" not in page_of(finished_study(here / "whole", with_gains))


def test_methods_without_a_case_in_common_are_not_said_to_have_one(here: Path) -> None:
    def dice(cell: Cell) -> list[float] | None:
        return list(BASE) if (cell.method == "mae") == (cell.fold == 0) else None

    data = {"pretrain": "pretrain.json", "finetune": "tune.json"}
    folds = {"folds": [0, 1], "split": "validation", "data": data}
    study = finished_study(here / "out", dice, labels=["all"], seeds={}, **folds)
    assert "over 0 cases" in page_of(study)
    assert "No case has scores of both." in page_of(study)
    assert "no tuning seed" not in page_of(study)


def test_the_table_names_its_lists_and_says_that_fewer_labels_are_the_same_ones(here: Path) -> None:
    data = {"pretrain": "pretrain.json", "finetune": "tune.json", "test": "elsewhere.json"}
    text = page_of(finished_study(here / "out", with_gains, data=data))
    assert "Pre-trained on pretrain.json, fine-tuned on tune.json." in text
    assert "on the test cases of elsewhere.json" in text
    assert "the same subjects in every run:" in text
    folds = page_of(finished_study(here / "folds", with_gains, **IN_FOLDS))
    assert "the same subjects in every run of one fold:" in folds
    alone = finished_study(here / "other", with_gains, labels=["all"])
    assert "the same subjects" not in page_of(alone)


@pytest.mark.parametrize(
    "gains, seed, words",
    [
        ([0.05, -0.05, 0.04, -0.03, 0.02, 0.0], 0.0, "cannot tell them apart: the interval"),
        # Two runs of each have an SD of seed / sqrt(2), and so have two means of two runs.
        (
            [0.05, 0.06, 0.04, 0.05, 0.06, 0.05],
            0.04,
            "cannot tell them apart: seeds alone may make",
        ),
        ([0.05, 0.06, 0.04, 0.05, 0.06, 0.05], 0.03, "larger than the 0.0424 that seeds alone may"),
    ],
)
def test_a_plain_sentence_says_whether_the_data_can_tell_two_methods_apart(
    here: Path, gains: list[float], seed: float, words: str
) -> None:
    def dice(cell: Cell) -> list[float]:
        gain = np.array(gains) if cell.method == "dae" else 0
        return list(BASE + seed * cell.seed + gain)

    study = finished_study(here / "out", dice, labels=["all"], seeds={"finetune": 2})
    assert f"dae against mae on all labels: difference {np.mean(gains):+.4f}" in page_of(study)
    assert words in page_of(study)


def test_the_table_says_how_often_a_method_is_above_when_cases_are_resampled(here: Path) -> None:
    gains = np.array([0.05, -0.05, 0.04, -0.03, 0.02, 0.01])

    def dice(cell: Cell) -> list[float]:
        return list(BASE + (gains if cell.method == "dae" else 0))

    study = finished_study(here / "out", dice, labels=["all"], seeds={})
    samples = np.array(list(product(gains, repeat=6)))  # every one there is
    share = (samples.mean(axis=1).round(12) > 0).mean()
    against = entries_in(study)["dae", "all"].against["dice"]
    assert against["share_better"] == pytest.approx(share, abs=0.02)

    lines = [line.split(" | ") for line in page_of(study).splitlines() if " | " in line]
    column = next(line.index("above mae") for line in lines if "above mae" in line)
    assert lines[-1][column].strip() == f"{100 * against['share_better']:.0f} %"
    assert "seeds are not resampled" in page_of(study)


@pytest.mark.parametrize(
    "share, words",
    [(0, "0 %"), (0.004, "<1 %"), (0.031, "3 %"), (0.996, ">99 %"), (1, "100 %"), (nan, "–")],
)
def test_a_share_is_rounded_to_none_or_all_only_where_it_is(share: float, words: str) -> None:
    assert percent(share) == words


def test_methods_without_a_run_have_no_row_and_are_named(here: Path) -> None:
    methods = {**PLAN["methods"], "noise": {"method": "noise"}}

    def dice(cell: Cell) -> list[float] | None:
        if cell.method == "noise" or (cell.method, cell.labels) == ("mae", 2):
            return None
        return list(BASE)

    text = page_of(finished_study(here / "out", dice, methods=methods))
    assert "Not run yet: noise." in text
    assert "| noise" not in text
    assert "- Nothing is compared on 2 labels: mae has no run there yet." in text


def test_one_run_each_does_not_say_how_much_seeds_differ(here: Path) -> None:
    study = finished_study(here / "out", with_gains, labels=["all"], seeds={})
    assert "how much seeds differ is not known from one run" in page_of(study)


def test_what_is_missing_is_said_and_few_cases_as_well(here: Path) -> None:
    def some(cell: Cell) -> list[float] | None:
        if cell.labels == 2:
            return None if cell.method == "dae" else [0.5, 0.6]
        return None if cell.seed else [0.5, 0.6, 0.7]

    text = page_of(finished_study(here / "out", some))
    assert ", 1 of 2 runs" in text
    assert ", 2 of 4 runs" in text
    assert "With 2 cases the least p of an exact test is 0.5." in text
    assert "With 3 cases the least p of an exact test is 0.25." in text


SCRATCH = {"scratch": {"finetune": {"from_scratch": True}}, "dae": {"method": "dae"}}


def test_the_rate_of_scratch_is_chosen_by_validation_cases_and_not_by_those_reported(
    here: Path,
) -> None:
    study = finished_study(
        here / "out",
        lambda cell: list(BASE + (0.1 if cell.factor == 1 else 0)),
        validation=lambda cell: 0.6 if cell.factor == 3 else 0.5,
        methods=SCRATCH,
        scratch_lr=[1, 3],
    )
    entry = entries_in(study)["scratch", 2]
    assert {run.cell.factor for run in entry.runs} == {3}  # though x1 has the better test cases
    assert entry.means["dice"].mean == pytest.approx(BASE.mean())
    line = "scratch on 2 labels: learning rate x3, chosen by the Dice of the validation cases"
    assert f"{line} (x1 0.5000, x3 0.6000)." in page_of(study)


def test_the_rate_of_a_fold_is_chosen_by_the_other_folds(here: Path) -> None:
    better = {0: 3, 1: 1, 2: 1}  # in each fold

    def dice(cell: Cell) -> list[float]:
        gain = 0.3 * (cell.fold == 0) + 0.1
        return [0.5 + gain * (cell.factor == better[cell.fold or 0])] * 2

    folds: dict[str, Any] = {"folds": [0, 1, 2], "split": "validation", "seeds": {}}
    study = finished_study(
        here / "out", dice, methods=SCRATCH, scratch_lr=[1, 3], labels=["all"], **folds
    )
    entry = entries_in(study)["scratch", "all"]
    assert {run.cell.fold: run.cell.factor for run in entry.runs} == {0: 1, 1: 3, 2: 3}
    assert "(fold 0 x1, fold 1 x3, fold 2 x3)" in page_of(study)


def test_without_other_cases_every_rate_has_its_row(here: Path) -> None:
    study = finished_study(
        here / "out",
        with_gains,
        methods=SCRATCH,
        scratch_lr=[1, 3],
        labels=["all"],
        split="validation",
    )
    assert {"scratch", "scratch, lr x3", "dae"} == {name for name, _ in entries_in(study)}
    assert "no learning rate is chosen" in page_of(study)


def test_without_a_validated_case_every_rate_has_its_row(here: Path) -> None:
    study = finished_study(
        here / "out", with_gains, methods=SCRATCH, scratch_lr=[1, 3], labels=["all"]
    )
    for made in (here / "out/cells").glob("*/cell.json"):
        content = json.loads(made.read_text())
        made.write_text(json.dumps({**content, "validation": {"best_dice": None}}))
    assert {"scratch", "scratch, lr x3", "dae"} == {name for name, _ in entries_in(study)}
    assert "no case was validated on" in page_of(study)


def test_a_selected_checkpoint_is_said_to_be_selected(here: Path) -> None:
    best: dict[str, Any] = {"checkpoint": "best.pt", "labels": ["all"]}
    study = finished_study(here / "out", with_gains, **best)
    assert "The checkpoint with the best validation Dice" in page_of(study)
    assert "selected on the very cases" not in page_of(study)
    reported = finished_study(here / "other", with_gains, **best, split="validation")
    assert "selected on the very cases that are reported" in page_of(reported)
    assert "The last checkpoint" in page_of(finished_study(here / "last", with_gains))


def test_every_case_is_in_a_csv_and_every_entry_and_metric_in_another(here: Path) -> None:
    study = finished_study(here / "out", with_gains)
    report(study)
    with (here / "out/cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    assert len(cases) == 2 * 2 * 6
    assert float(cases[0]["dice"]) == pytest.approx(BASE[0] + 0.01)
    with (here / "out/table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["metric"] for line in lines[:3]] == ["dice", "nsd", "hd95"]
    assert len(lines) == 2 * 2 * 3
    assert (here / "out/figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_is_a_table_of_dashes(here: Path) -> None:
    assert command_line(str(plan_file(here)), "--out", "out", "--report") == 0
    assert "Nothing can be compared yet." in (here / "out/table.md").read_text()
    assert not (here / "out/figure.png").exists()

    # What an older version of the plan has shown does not stand beside it.
    report(finished_study(here / "out", with_gains))
    assert (here / "out/figure.png").exists() and (here / "out/cases.csv").exists()
    report(study_in(here / "out", finetune={"steps": 9}))
    assert sorted(path.name for path in (here / "out").iterdir() if path.is_file()) == [
        "table.csv",
        "table.md",
    ]


# --- the real commands


@pytest.mark.slow
def test_a_study_of_the_real_commands_ends_in_a_table(tmp_path: Path) -> None:
    network = {"feature_size": 12, "depths": [1, 1], "heads": [2, 4], "window": [4, 4, 4]}
    common = {"steps": 3, "workers": 0, "device": "cpu", "cache_dir": str(tmp_path / "cache")}
    plan = {
        "name": "tiny",
        "data": {"phantoms": {"subjects": 2, "validation": 1, "test": 2, "size": [32, 32, 32]}},
        "pretrain": {**network, **common, "alpha": 0, "crop": [16, 16, 16], "recon": "residual"},
        "methods": SCRATCH,
        "finetune": {**common, "batch_size": 2},
        "predict": {"device": "cpu"},
        "labels": [2],
        "scratch_lr": [1, 3],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "dae.study", str(tmp_path / "plan.json")]
    command += ["--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
    text = (tmp_path / "out/table.md").read_text()
    assert "scratch on 2 labels: learning rate x" in text
    assert "| dae" in text
    made = json.loads((tmp_path / "out/cells/dae-n2-p0-t0/cell.json").read_text())
    assert made["validation"]["step"] == 3
