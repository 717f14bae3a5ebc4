"""dae/training/resume.py: what a run may write over, and whether it is the same run."""

import errno
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETWORK

from dae.config.command_line import parse, to_json
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.config.shared import OptimConfig
from dae.errors import InputError
from dae.model import SwinUNETR
from dae.training import resume
from dae.weights import checkpoint

BATCH = OptimConfig(batch_size=4, accumulate=2)


def saved_on_two_ranks() -> dict[str, Any]:
    return {"global_batch": 16, "config": to_json(BATCH), "threads": torch.get_num_threads()}


def test_the_factors_of_a_global_batch_may_change_and_a_change_is_said() -> None:
    saved = saved_on_two_ranks()
    for batch_size, accumulate, world in ((2, 8, 1), (16, 1, 1), (1, 1, 16)):
        now = OptimConfig(batch_size=batch_size, accumulate=accumulate)
        resume.check_same_batch(Path("last.pt"), saved, now, world=world)
        (note,) = resume.changes_in_words(saved, now, world=world)
        assert note.startswith("2 ranks x batch 4 x 2 before")

    resume.check_same_batch(Path("last.pt"), saved, BATCH, world=2)
    assert resume.changes_in_words(saved, BATCH, world=2) == []


def test_the_product_of_the_factors_may_not_change() -> None:
    words = r"^--batch-size 4 x --accumulate 2 x 1 ranks = 8 samples .* started with 16"
    with pytest.raises(InputError, match=words):
        resume.check_same_batch(Path("last.pt"), saved_on_two_ranks(), BATCH, world=1)


def test_a_run_may_become_longer_which_is_said_and_not_shorter() -> None:
    short = PretrainConfig(steps=100)
    saved = {**saved_on_two_ranks(), "global_batch": 4, "config": to_json(short), "step": 100}
    path = Path("last.pt")

    longer = replace(short, steps=300)
    resume.check_same_flags(path, saved, longer)
    (note,) = resume.changes_in_words(saved, longer, world=2)
    assert note.startswith("100 steps before, 300 now: from step 100 on")

    with pytest.raises(InputError, match=r"^--steps 50: .* started with 100"):
        resume.check_same_flags(path, saved, replace(short, steps=50))
    with pytest.raises(InputError, match=r"^--lr 1\.0"):
        resume.check_same_flags(path, saved, replace(longer, lr=1.0))


def test_a_run_becomes_longer_only_where_a_flag_says_so() -> None:
    """--resume without the --steps of the start would else go on to the 20,000 of the default."""
    saved = {**saved_on_two_ranks(), "config": to_json(PretrainConfig(steps=100)), "step": 100}
    with pytest.raises(InputError, match=r"^--steps 20000: .* started with 100"):
        resume.check_same_flags(Path("last.pt"), saved, PretrainConfig())
    said = PretrainConfig(set_flags=("steps",))
    resume.check_same_flags(Path("last.pt"), saved, said)


@pytest.mark.parametrize("cls", [PretrainConfig, SegConfig])
def test_a_preset_makes_no_run_longer_until_a_flag_does(
    cls: type[PretrainConfig | SegConfig],
) -> None:
    """A demo that was started with --steps 50 is not as long as the preset once it is resumed."""
    of = partial(parse, cls, prog="x", description="")
    started = of(["--preset", "demo", "--steps", "50"])
    saved = {**saved_on_two_ranks(), "config": to_json(started), "step": 50}
    path = Path("last.pt")

    resumed = of(["--preset", "demo", "--resume"])
    assert resumed.steps > 50
    with pytest.raises(InputError, match=rf"^--steps {resumed.steps}: .* started with 50"):
        resume.check_same_flags(path, saved, resumed)

    for flags in (["--steps", str(resumed.steps)], ["--steps", "60"]):
        resume.check_same_flags(path, saved, of(["--preset", "demo", "--resume", *flags]))


def test_epochs_of_a_preset_make_no_run_longer() -> None:
    """The steps of --epochs stand in the configuration by the time it is compared."""
    started = SegConfig(preset="btcv", epochs=5, steps=50)
    saved = {**saved_on_two_ranks(), "config": to_json(started), "step": 50}
    forgotten = SegConfig(preset="btcv", epochs=600, steps=6000)
    with pytest.raises(InputError, match=r"^--steps 6000: .* started with 50"):
        resume.check_same_flags(Path("last.pt"), saved, forgotten)
    resume.check_same_flags(Path("last.pt"), saved, replace(forgotten, set_flags=("epochs",)))


def test_another_number_of_threads_is_said() -> None:
    saved = saved_on_two_ranks() | {"threads": torch.get_num_threads() + 1}
    (note,) = resume.changes_in_words(saved, BATCH, world=2)
    assert note.endswith("the last bits will differ")


@pytest.mark.parametrize("name", ["best.pt", "config.json", "figures/loss.png"])
def test_a_file_that_is_not_a_runs_is_not_replaced_by_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for goes_on in (False, True):
        with pytest.raises(InputError, match=f"holds {name}, which a run would replace"):
            resume.check_out_folder(tmp_path, resume=goes_on)

    # Beside a lock they are a run's: a killed one may have no log yet.
    (tmp_path / "run.lock").touch()
    resume.check_out_folder(tmp_path, resume=True)


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(InputError, match=r"run\.lock could not be opened \(Is a directory\)"):
        resume.check_free(tmp_path)


def test_a_file_system_without_locks_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    os.close(resume.hold(tmp_path))
    resume.check_free(tmp_path)


def test_a_file_that_a_run_reads_is_not_replaced_by_it_even_when_it_goes_on(tmp_path: Path) -> None:
    """Weights or a data list in the run folder, under a name of the run's own, or a link to one."""
    (tmp_path / "config.json").write_text("a data list")
    (tmp_path / "link.json").symlink_to(tmp_path / "config.json")
    (tmp_path / "log.jsonl").touch()
    for name in ("config.json", "link.json"):
        inputs = ("", str(tmp_path / name))
        with pytest.raises(InputError, match=f"{name} is read and would be replaced"):
            resume.check_out_folder(tmp_path, resume=True, inputs=inputs)


@pytest.mark.parametrize(
    "classes, script, other",
    [
        ({}, "train_pretrain.py", "train_seg.py"),
        ({"0": "background"}, "train_seg.py", "train_pretrain.py"),
    ],
)
def test_a_run_of_the_other_script_is_named_when_it_is_resumed(
    classes: dict[str, str], script: str, other: str, tmp_path: Path
) -> None:
    network = SwinUNETR(1, 1, **NETWORK)
    plan = {"backbone": "swin_unetr", "arguments": json.loads(json.dumps(NETWORK))}
    plan |= {"in_channels": 1, "out_channels": 1, "classes": classes}
    state = {"plan": plan, "model": network.state_dict(), "step": 3}
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(InputError, match=f"is of a run of {script}; name another --out"):
        resume.saved_run(tmp_path, resume=True, script=other)
    assert resume.saved_run(tmp_path, resume=True, script=script) is not None


def test_a_file_of_weights_alone_is_no_run(tmp_path: Path) -> None:
    """As `python -m dae.weights convert` may have written it to last.pt."""
    checkpoint.save(tmp_path / "last.pt", {"plan": {"classes": {}}, "model": {}})
    with pytest.raises(InputError, match=r"last\.pt: holds weights and no run; name another --out"):
        resume.saved_run(tmp_path, resume=True, script="train_pretrain.py")
