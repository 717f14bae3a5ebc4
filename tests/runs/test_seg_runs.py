"""train_seg.py as a process: two ranks, signals, kills, the shell."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, events, interrupt, same_weights, train
from processes import run_ranks
from test_train_seg import Config, weights

from dae.config.segment import SegConfig
from dae.weights import checkpoint
from train_seg import main

Interruptible = tuple[SegConfig, dict[str, Any]]


RANKS = """
import sys
import torch
import train_seg
from dae.config.segment import SegConfig

def save(run, name, save=train_seg.save):
    save(run, name)
    torch.save(run.network.state_dict(), run.out / f"rank{run.ranks.rank}.pt")

train_seg.save = save
train_seg.main(SegConfig(**eval(sys.argv[1])))
"""


def test_two_ranks_train_as_one_process_with_twice_the_batch(
    tiny_seg: Config, tmp_path: Path
) -> None:
    """And end with the same weights, which each of them keeps in a file of its own."""
    one = tiny_seg(out=str(tmp_path / "one"), steps=10, batch_size=4, loss="dice_ce", lr=1e-3)
    two = replace(one, out=str(tmp_path / "two"), batch_size=2)
    main(one)
    (tmp_path / "ranks.py").write_text(RANKS)
    line = [tmp_path / "ranks.py", repr(vars(two))]
    done = run_ranks(line, line)
    assert done.returncode == 0, done.stderr
    for a, b in zip(events(one, "train"), events(two, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
    a, b = (events(config, "validation")[-1] for config in (one, two))
    assert a["cases"] == b["cases"] and a["dice"] == pytest.approx(b["dice"], abs=1e-2)
    first, second = (torch.load(Path(two.out) / f"rank{rank}.pt") for rank in range(2))
    assert same_weights(first, second) and same_weights(first, weights(two))


@pytest.fixture
def long(tiny_seg: Config, tmp_path: Path) -> Interruptible:
    """A run to be interrupted, and the weights at its end if it is not."""
    straight = tiny_seg(
        out=str(tmp_path / "straight"), steps=120, save_every=10, validate_every=50, workers=2
    )
    main(straight)
    return replace(straight, out=str(tmp_path / "broken"), resume=True), weights(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_cleanly(long: Interruptible, number: signal.Signals) -> None:
    config, at_the_end = long
    assert interrupt(config, number, after_step=12) == 0
    step = checkpoint.load(Path(config.out) / "last.pt")["step"]
    assert 12 <= step < 120 and step == events(config, "end")[-1]["step"]
    assert events(config, "end")[-1]["reason"] == "stopped"
    main(config)
    assert same_weights(weights(config), at_the_end)


def test_killed_at_any_moment_and_resumed_a_run_ends_with_the_same_weights(
    long: Interruptible,
) -> None:
    config, at_the_end = long
    for after_step in (3, 60):
        assert interrupt(config, signal.SIGKILL, after_step=after_step) == -signal.SIGKILL
    main(config)
    assert same_weights(weights(config), at_the_end)
    losses = {event["step"]: event["loss"] for event in events(config, "train")}
    straight = replace(config, out=str(Path(config.out).with_name("straight")))
    assert losses == {event["step"]: event["loss"] for event in events(straight, "train")}


def test_from_the_shell_bad_input_is_one_line_and_exit_code_2(tiny_seg: Config) -> None:
    for given, word in (({"pretrained": "none.pt"}, "none.pt"), ({"loss": "focal"}, "--loss")):
        done = train(tiny_seg(**given))
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("train_seg.py: ") and word in done.stderr
        assert not Path(tiny_seg().out).exists()


def test_help_answers_without_torch() -> None:
    line = [sys.executable, "-X", "importtime", str(ROOT / "train_seg.py"), "--help"]
    done = subprocess.run(line, capture_output=True, text=True)
    imported = {row.split("|")[-1].strip() for row in done.stderr.splitlines()}
    assert done.returncode == 0 and "--pretrained" in done.stdout
    assert "argparse" in imported and not imported & {"torch", "numpy", "timm", "nibabel"}
