"""eval.py predict on two ranks: they share the cases, and speak as one."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, environment, refusal
from processes import run_ranks
from test_eval import bytes_in, damaged, names_in, noise, weights

from dae.config.evaluate import PredictConfig
from dae.evaluation.written import Written
from dae.weights import checkpoint

evaluate = importlib.import_module("eval")


def two_ranks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [ROOT / "eval.py", "predict", *arguments]
    return run_ranks(line, line)


def errors_in(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of eval.py on stderr, without those of torchrun."""
    return [line for line in done.stderr.splitlines() if line.startswith("eval.py")]


def label_maps_in(folder: Path) -> dict[str, bytes]:
    return {name: made for name, made in bytes_in(folder).items() if name.endswith(".nii.gz")}


def test_two_ranks_make_the_files_of_one_each_once_and_say_what_one_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(tmp_path / "in")
    for n in range(3):
        noise(tmp_path / f"in/s{n}.nii.gz", n)
    path = weights(tmp_path / "w.pt")
    config = PredictConfig(
        checkpoint=(str(path),),
        images=(str(tmp_path / "in"),),
        out=str(tmp_path / "one"),
        device="cpu",
    )
    line = refusal(evaluate.predict, config)
    assert line.startswith("4 of 8 cases could not be predicted")

    flags = ("--checkpoint", path, "--images", tmp_path / "in", "--device", "cpu")
    done = two_ranks(*flags, "--out", tmp_path / "two")
    assert done.returncode != 0
    assert errors_in(done) == [f"eval.py predict: {line}"]
    of_one = capsys.readouterr().out
    assert f"4 label maps in {tmp_path / 'one'}" in of_one
    assert done.stdout == of_one.replace(str(tmp_path / "one"), str(tmp_path / "two"))

    assert label_maps_in(tmp_path / "two") == label_maps_in(tmp_path / "one")
    assert names_in(tmp_path / "two") == names_in(tmp_path / "one")
    marks = (tmp_path / "two/predicted.json").read_bytes()
    assert marks == (tmp_path / "one/predicted.json").read_bytes()
    written = [entry["file"] for entry in Written(tmp_path / "two").lines]
    assert sorted(set(written) - {"predicted.json"}) == sorted(label_maps_in(tmp_path / "two"))
    for name in label_maps_in(tmp_path / "two"):
        assert written.count(name) == 1


def test_two_ranks_go_on_where_one_was_stopped(tmp_path: Path) -> None:
    images = [noise(tmp_path / f"in/s{n}.nii.gz", n) for n in range(3)]
    path = weights(tmp_path / "w.pt")
    out = tmp_path / "out"
    evaluate.predict(
        PredictConfig(checkpoint=(str(path),), images=(str(images[0]),), out=str(out), device="cpu")
    )

    flags = ("--checkpoint", path, "--images", tmp_path / "in", "--device", "cpu")
    done = two_ranks(*flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"3 label maps in {out}, 1 of them from before"
    written = [entry["file"] for entry in Written(out).lines]
    for n in range(3):
        assert written.count(f"s{n}.nii.gz") == 1


def test_what_no_rank_can_do_is_said_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    image = noise(tmp_path / "in/s0.nii.gz")
    done = two_ranks("--checkpoint", "none.pt", "--images", image, "--out", tmp_path / "out")
    assert done.returncode != 0
    assert errors_in(done) == ["eval.py predict: none.pt: no such checkpoint"]
    assert not done.stdout
    assert not (tmp_path / "out").exists()


def test_what_one_rank_knows_of_trained_cases_is_not_lost_by_another(tmp_path: Path) -> None:
    """Both ranks have read the folder before either writes predicted.json."""
    config = PredictConfig()
    seen = {"fold": 0, "split_seed": 0, "held_out": []}
    records = []
    for _ in range(2):
        records.append(evaluate.Record(Written(tmp_path), config, seen, set(), is_shared=True))

    for record, name in zip(records, ("a", "b")):
        record.trained.add(name)
        record.predicted.append(name)
        record.write()
    records[0].write()
    assert json.loads((tmp_path / "predicted.json").read_text())["trained"] == ["a", "b"]


# --- memory

PEAK = """
import importlib
import resource
import sys

import torch

from dae.config.evaluate import PredictConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

evaluate = importlib.import_module("eval")
before = peak()
config = PredictConfig(checkpoint=tuple(sys.argv[1:]), device="cpu", amp="off")
evaluate.load_ensemble(config, torch.device("cpu"))
print(peak() - before)
"""


def test_twenty_checkpoints_take_the_memory_of_their_networks(tmp_path: Path) -> None:
    """In MB, at their peak. Here an optimiser is 100 MB, and a network 1."""
    path = weights(tmp_path / "w.pt")
    state: dict[str, Any] = checkpoint.load(path)
    state["optimizer"] = {"exp_avg": torch.ones(25_000_000)}
    checkpoint.save(path, state)

    arguments = [sys.executable, "-c", PEAK, *[str(path)] * 20]
    ran = subprocess.run(
        arguments, capture_output=True, text=True, env={**environment(), "PYTHONPATH": str(ROOT)}
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 80
