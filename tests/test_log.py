"""dae/training/log.py: strict JSON lines that survive a kill, and sentences."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from dae.errors import InputError
from dae.training.log import Log, commit_of, in_words, read, time_left


def record(path: Path) -> Log:
    return Log(path, steps=10, start=0, main=True)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = record(tmp_path / "log.jsonl")
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
    log = record(path)
    log.event("start", step=0)
    for step in (1, 2):
        log.event("train", step=step, loss=float(step))
    with path.open("a") as file:
        file.write('{"event": "train", "step": 3, "lo')
    resumed = record(path)
    resumed.event("resume", step=1)
    resumed.event("train", step=2, loss=5.0)
    events = read(path)
    assert [e["event"] for e in events] == ["start", "train", "train", "resume"]
    assert [e.get("loss") for e in events] == [None, 1.0, 5.0, None]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", steps=1, start=0, main=False)
    log.event("start", step=0)
    log.say("hello")
    log.progress(1, "")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_validation_is_said_beside_the_loss_of_doing_nothing() -> None:
    facts = {
        "l1": 0.05,
        "l1_input": 0.1,
        "l1_by_modality": {"ct": 0.05},
        "l1_input_by_modality": {"ct": 0.1},
    }
    words = in_words(facts)
    assert (
        "0.0500, 0.500 of doing nothing (L1(x_hat, x) = 0.1000)" in words
        and "ct 0.0500/0.1000" in words
    )
    assert "doing nothing" not in in_words({**facts, "l1_input": 0.0})


def test_time_left_is_said_in_the_unit_that_fits() -> None:
    assert [time_left(s) for s in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]


def test_a_stop_at_a_loss_that_is_not_finite_names_the_checkpoint_only_where_there_is_one(
    tmp_path: Path,
) -> None:
    log = record(tmp_path / "log.jsonl")
    with pytest.raises(
        InputError,
        match=r"^step 1: loss nan, .* before the step, no checkpoint had been saved yet; try",
    ):
        log.stop_before_the_step(0, math.nan, 1.0)
    (tmp_path / "last.pt").touch()
    with pytest.raises(InputError, match=r"last\.pt is from before it; try"):
        log.stop_before_the_step(7, math.nan, 1.0)


def test_the_commit_is_that_of_the_projects_own_repository_and_of_no_other(tmp_path: Path) -> None:
    """As installed in an environment within somebody's own project, it is not at that project's commit."""
    project, installed = tmp_path / "project", tmp_path / "project/venv/site-packages"
    installed.mkdir(parents=True)
    assert commit_of(project) is None and commit_of(tmp_path / "gone") is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=project, capture_output=True, text=True, check=True
        ).stdout

    git("init", "--quiet")
    assert commit_of(project) is None  # nothing committed yet
    git("commit", "--quiet", "--allow-empty", "-m", "first")
    assert commit_of(project) == git("rev-parse", "HEAD").strip()
    assert commit_of(installed) is None
