"""dae/training/log.py: strict JSON lines that survive a kill, sentences, and the clock."""

import json
import math
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dae.errors import InputError
from dae.training.log import Clock, Log, commit_of, read_log, time_left
from dae.training.run import check_finite
from train_pretrain import in_words

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def log_at(path: Path, *, main: bool = True) -> Log:
    return Log(path, steps=10, start=0, main=main)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = log_at(tmp_path / "log.jsonl")
    log.event("train", step=1, loss=math.nan, l1_by_modality={"ct": math.inf}, lr=0.5)
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line) == {
        "event": "train",
        "step": 1,
        "loss": None,
        "l1_by_modality": {"ct": None},
        "lr": 0.5,
    }


def test_a_torn_line_is_left_out_and_of_repeated_steps_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = log_at(path)
    log.event("start", step=0)
    for step in (1, 2):
        log.event("train", step=step, loss=float(step))
    with path.open("a") as file:
        file.write('{"event": "train", "step": 3, "lo')

    resumed = log_at(path)
    resumed.event("resume", step=1)
    resumed.event("train", step=2, loss=5.0)
    events = read_log(path)
    assert [e["event"] for e in events] == ["start", "train", "resume", "train"]
    assert [e.get("loss") for e in events] == [None, 1.0, None, 5.0]


def test_steps_that_no_checkpoint_holds_are_undone_by_the_run_that_goes_on(tmp_path: Path) -> None:
    """As after a kill, and a resumed run that logs more rarely, or other flags from the start."""
    path = tmp_path / "log.jsonl"
    log = log_at(path)

    def run(begins: str, step: int, *steps: int) -> list[tuple[str, int]]:
        log.event(begins, step=step)
        for trained in steps:
            log.event("train", step=trained)
        log.event("validation", step=steps[-1])
        return [(event["event"], event["step"]) for event in read_log(path)]

    run("start", 0, 1, 2, 3, 4)
    assert run("resume", 2, 6) == [
        ("start", 0),
        ("train", 1),
        ("train", 2),
        ("resume", 2),
        ("train", 6),
        ("validation", 6),
    ]
    begun_anew = run("start", 0, 1)
    assert begun_anew[-3:] == [("start", 0), ("train", 1), ("validation", 1)]
    assert all(event in ("start", "resume") for event, _ in begun_anew[:-2])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = log_at(tmp_path / "log.jsonl", main=False)
    log.event("start", step=0)
    log.say("hello")
    log.progress(1, "")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_validation_is_said_beside_the_loss_of_doing_nothing() -> None:
    validation = {
        "l1": 0.05,
        "l1_input": 0.1,
        "l1_by_modality": {"ct": 0.05},
        "l1_input_by_modality": {"ct": 0.1},
    }
    words = in_words(validation)
    assert "0.0500, 0.500 of doing nothing (L1(x_hat, x) = 0.1000)" in words
    assert "ct 0.0500/0.1000" in words
    assert "doing nothing" not in in_words({**validation, "l1_input": 0.0})


def test_time_left_is_said_in_the_unit_that_fits() -> None:
    assert [time_left(s) for s in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]


def test_the_clock_counts_neither_pauses_nor_the_steps_before_the_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(step=5, steps=25, global_batch=4)
    with clock.paused():
        now += 50
    with clock.waiting():
        now += 2
    now += 6
    clock.read(9)
    assert clock.rate == 4 * 4 / 8
    assert clock.data_wait == 2 / 8
    assert clock.left == "32 s"  # 16 steps of 2 seconds

    clock.restart()
    now += 4
    clock.read(10)
    assert (clock.rate, clock.data_wait, clock.left) == (1.0, 0.0, "60 s")


def test_a_stop_at_a_loss_that_is_not_finite_names_the_checkpoint_only_where_there_is_one(
    tmp_path: Path,
) -> None:
    log = log_at(tmp_path / "log.jsonl")
    check_finite(log, 0, 1.0, 1.0, NO_SCALER)
    alone = r"^step 1: loss nan, .* before the step, no checkpoint had been saved yet; try"
    with pytest.raises(InputError, match=alone):
        check_finite(log, 0, math.nan, 1.0, NO_SCALER)

    (tmp_path / "last.pt").touch()
    with pytest.raises(InputError, match=r"last\.pt is from before it; try"):
        check_finite(log, 7, 1.0, math.inf, NO_SCALER)


def test_the_commit_is_that_of_the_projects_own_repository_and_of_no_other(tmp_path: Path) -> None:
    """As installed within somebody's own project, it is not at that project's commit."""
    project = tmp_path / "project"
    installed = project / "venv/site-packages"
    installed.mkdir(parents=True)
    assert commit_of(project) is None
    assert commit_of(tmp_path / "gone") is None

    git(project, "init", "--quiet")
    assert commit_of(project) is None  # nothing committed yet
    git(project, "commit", "--quiet", "--allow-empty", "-m", "first")
    assert commit_of(project) == git(project, "rev-parse", "HEAD").strip()
    assert commit_of(installed) is None


def git(folder: Path, *arguments: str) -> str:
    line = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout
