"""Runs that are killed, cut, filled up and left alone: nothing is lost, and one line says why.

The slow form (`python -m pytest -m slow tests/runs/test_torture.py -s`) prints what it survived.
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.std
from conftest import ROOT, command, events, flags, refusal, torchrun, wait_for_step
from processes import Script, environment, run_ranks, run_script, start_ranks
from test_goldens import SMALL, monai_weights
from torch.utils.data import Dataset

import dae.training.reconstruction
import train_pretrain
import train_seg
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.config.shared import RunConfig
from dae.data import batches
from dae.data.batches import Address
from dae.errors import InputError
from dae.model import SwinUNETR
from dae.training.distributed import joined
from dae.training.log import read_log
from dae.weights import checkpoint
from dae.weights.foreign import read_weights

Config = Callable[..., PretrainConfig]
SegConfigs = Callable[..., SegConfig]

# Of the events of a log, what a clock says.
CLOCK = {"samples_per_s", "data_wait", "seconds"}

# What the script of a run is while its rank 0 tells in a file where it is. argv: the file, the
# script's name, its flags. Where a file FILE.pause holds two numbers, the validation of the first
# number is slow: for each crop, or batch of windows, the ranks sleep for as many seconds as the
# second number.
TELLING = """
import os, sys, time
from importlib import import_module
from pathlib import Path

import dae.training.reconstruction

from dae.config.command_line import from_command_line, run_or_explain
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig

told = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
script = import_module(sys.argv[2])
cls = SegConfig if sys.argv[2] == "train_seg" else PretrainConfig
entered = 0

def tell(where):
    global entered
    entered += 1
    if os.environ["RANK"] == "0":
        os.pwrite(told, f"{entered:6d} {where:10s}".encode(), 0)

def telling(where, work):
    def call(*arguments, **keys):
        tell(where)
        try:
            return work(*arguments, **keys)
        finally:
            tell("steps")
    return call

pause = Path(sys.argv[1] + ".pause")
slow, seconds = map(int, pause.read_text().split()) if pause.exists() else (-1, 0)
validations = 0

def counted(work):
    def call(*arguments):
        global validations
        validations += 1
        return work(*arguments)
    return call

def paused(work):
    def call(*arguments, **keys):
        if validations == slow:
            tell("pause")
            time.sleep(seconds)
        return work(*arguments, **keys)
    return call

if sys.argv[2] == "train_seg":
    script.predict = paused(script.predict)
else:
    dae.training.reconstruction.output_of = paused(dae.training.reconstruction.output_of)
script.validate = telling("validation", counted(script.validate))
script.save = telling("saving", script.save)
tell("start")
config = from_command_line(cls, prog="", description="", arguments=sys.argv[3:])
run_or_explain(lambda: script.main(config), f"{sys.argv[2]}.py")
"""


# --- killed at any moment


def where(folder: Path) -> tuple[int, str]:
    """How many times rank 0 has changed what it does, and what it does now."""
    try:
        entered, place = (folder / "where").read_text().split()
    except (OSError, ValueError):
        return 0, "start"
    return int(entered), place


# Seconds within which a run is ended after it has begun with something: as long as that takes, so
# that it is ended anywhere in it, or just after it.
WITHIN = {"saving": 0.03, "validation": 0.3, "steps": 0.1}

# By far the most are SIGKILL to both: where rank 1 alone is killed, rank 0 finishes what it writes.
WAYS = ("kill both", "kill both", "kill both", "kill both", "kill rank 1", "stop both")


def kill_somewhere(
    ranks: list[Script], folder: Path, *, target: str, way: str, rng: random.Random
) -> str:
    """At a random moment, soon after rank 0 has begun with `target`, end the ranks.

    Returns where rank 0 was then, or nothing where the run was over before.
    """
    visits = rng.randint(1, 2)
    delay = rng.uniform(0, WITHIN[target])

    before = 0
    while visits:
        entered, place = where(folder)
        if entered > before and place == target:
            before = entered
            visits -= 1
        if any(rank.poll() is not None for rank in ranks):
            return ""
        time.sleep(0.0005)
    time.sleep(delay)

    _, place = where(folder)
    number = signal.SIGKILL if way.startswith("kill") else signal.SIGTERM
    for rank in ranks[1:] if way == "kill rank 1" else ranks:
        os.killpg(rank.pid, number)
    if way == "kill both":
        _, place = where(folder)

    # Whatever is left of the run ends by itself, within a minute.
    each = [rank.done(timeout=60) for rank in ranks]
    codes = [done.returncode for done in each]
    if way.startswith("stop"):
        assert codes == [0, 0], each
    if way == "kill rank 1" and codes[0]:  # else it was in the last thing that it did
        said = [line for line in each[0].stderr.splitlines() if line.startswith("train_")]
        assert codes == [2, -signal.SIGKILL], each
        assert len(said) == 1 and "another rank has ended before this one" in said[0]
    return place


def telling_line(config: RunConfig, folder: Path) -> list[str]:
    """The command line of a run in a new folder, as `TELLING` runs it."""
    folder.mkdir()
    told = folder / "tell.py"
    told.write_text(TELLING)
    script = Path(command(config)[0]).stem
    return [str(told), str(folder / "where"), script, *flags(config)]


def survive(
    config: RunConfig, folder: Path, *, kills: int, seed: int
) -> tuple[Counter[str], dict[str, Any]]:
    """How and where the run was ended how often, and all that it has left at its end.

    A key is like "kill both in saving".

    config: its `out` is a name, below `folder`. It is given with `resume` each time.
    """
    line = telling_line(config, folder)
    rng = random.Random(seed)
    landed: Counter[str] = Counter()
    while landed.total() < kills:
        (folder / "where").unlink(missing_ok=True)
        ranks = start_ranks(line, line, cwd=folder)
        target = ("saving", "validation", "steps")[landed.total() % 3]
        way = WAYS[landed.total() // 3 % len(WAYS)]
        place = kill_somewhere(ranks, folder, target=target, way=way, rng=rng)
        for rank in ranks:
            rank.wait(timeout=60)
        assert place, f"the run was over after {dict(landed)}"
        landed[f"{way} in {place}"] += 1

    done = run_ranks(line, line, cwd=folder)
    assert done.returncode == 0, done.stderr
    return landed, left_by(folder / config.out)


def left_by(out: Path) -> dict[str, Any]:
    """The checkpoints and the log of a run, without what a clock says.

    Both runs of a test have the same flags, so the checkpoints are the same down to their bytes.
    """
    events = []
    for event in read_log(out / "log.jsonl"):
        if event["event"] in ("train", "validation"):
            events.append({key: event[key] for key in event.keys() - CLOCK})
    events.sort(key=lambda event: (event["event"], event["step"]))
    files = {path.name: checkpoint.load(path) for path in sorted(out.glob("*.pt"))}
    names = sorted(path.name for path in out.iterdir())
    return {"events": events, "files": files, "names": names}


def check_same(survived: dict[str, Any], whole: dict[str, Any]) -> None:
    """The same files, and in them the same numbers, bit for bit."""
    assert survived["names"] == whole["names"]
    assert survived["events"] == whole["events"]
    for name, content in whole["files"].items():
        assert bits_of(survived["files"][name]) == bits_of(content), name


def bits_of(content: Any) -> Any:
    """The same with the bytes of each tensor in place of the tensor."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {key: bits_of(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [bits_of(value) for value in content]
    return content


def in_words(landed: Counter[str]) -> str:
    """Only SIGKILL to both ranks counts as a kill of the run; the other ways are named apart."""
    lines = []
    for way, what in (
        ("kill both", "kills survived"),
        ("kill rank 1", "kills of rank 1 alone"),
        ("stop both", "SIGTERM"),
    ):
        places = [landed[f"{way} in {place}"] for place in ("steps", "validation", "saving")]
        steps, validation, saving = places
        lines.append(
            f"{what}: {sum(places)} (in steps {steps}, validation {validation}, saving {saving})"
        )
    return "\n".join(lines)


FORMS = [
    pytest.param(3, 18, id="short"),
    pytest.param(36, 400, id="long", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kills, steps", FORMS)
def test_pretraining_on_two_ranks_that_is_killed_anywhere_ends_in_the_same_bytes(
    tiny: Config, tmp_path: Path, kills: int, steps: int
) -> None:
    config = tiny(
        out="run", steps=steps, resume=True, save_every=2, validate_every=6, validate_crops=3
    )
    check_survival(config, tmp_path, kills=kills)


@pytest.mark.parametrize("kills, steps", FORMS)
def test_fine_tuning_on_two_ranks_that_is_killed_anywhere_ends_in_the_same_bytes(
    tiny_seg: SegConfigs, tmp_path: Path, kills: int, steps: int
) -> None:
    config = tiny_seg(out="run", steps=steps, resume=True, save_every=2, validate_every=6)
    check_survival(config, tmp_path, kills=kills)


def check_survival(config: RunConfig, tmp_path: Path, *, kills: int) -> None:
    landed, survived = survive(config, tmp_path / "killed", kills=kills, seed=kills)
    none, whole = survive(config, tmp_path / "whole", kills=0, seed=0)
    check_same(survived, whole)
    print(f"\n{in_words(landed)}")
    assert landed.total() == kills and not none
    for place in ("steps", "validation", "saving"):
        assert kills < 10 or landed[f"kill both in {place}"] > 3


# --- a study


@pytest.mark.slow
def test_a_study_of_the_real_commands_that_is_killed_at_random_ends_in_the_same_table(
    tmp_path: Path,
) -> None:
    """The runner alone, or with the command that it runs. test_study.py kills one of fakes."""
    network = {"feature_size": 12, "depths": [1, 1], "heads": [2, 4], "window": [4, 4, 4]}
    common = {"steps": 20, "save_every": 2, "workers": 0, "device": "cpu"}
    common["cache_dir"] = str(tmp_path / "cache")
    plan = {
        "name": "tiny",
        "data": {"phantoms": {"subjects": 2, "validation": 1, "test": 2, "size": [32, 32, 32]}},
        "pretrain": {**network, **common, "alpha": 0, "crop": [16, 16, 16], "recon": "residual"},
        "methods": {
            "dae": {"method": "dae"},
            "noise": {"method": "noise"},
        },
        "finetune": {**common, "batch_size": 2},
        "predict": {"device": "cpu"},
        "labels": [2],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    def start(out: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "dae.study", str(tmp_path / "plan.json"), "--out", out]
        return subprocess.Popen(line, cwd=ROOT, env=environment(), start_new_session=True)

    rng = random.Random(0)
    landed: Counter[str] = Counter()
    for number in range(8):
        process = start(str(tmp_path / "killed"))
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(5, 25))
        if process.poll() is not None:
            break
        newest = max((tmp_path / "killed").rglob("*.log"), key=lambda path: path.stat().st_mtime)
        landed[newest.stem] += 1
        if number % 2:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for out in ("killed", "whole"):
        assert start(str(tmp_path / out)).wait(timeout=3600) == 0
    print(f"\nkills of a study survived: {landed.total()} (in {dict(landed)})")
    assert landed.total() > 2
    for name in ("table.md", "table.csv", "cases.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- a disk that is full, read-only or too small

# A script with a small disk of its own: in a namespace that ends with it. argv: the folder where
# the disk is, its size in kB, "ro" or "rw", a folder whose files are on it from the start, kB that
# are left free of it, a folder for what is on it at the end; then the script and its flags.
SMALL_DISK = """
import ctypes, os, runpy, shutil, sys
from pathlib import Path

folder, size, mode, before, free, after, *line = sys.argv[1:]
system = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()

def mount(flags, options):
    done = system.mount(b"none", folder.encode(), b"tmpfs", flags, options.encode())
    assert done == 0, os.strerror(ctypes.get_errno())

assert system.unshare(0x10000000 | 0x00020000) == 0  # a user and a mount namespace
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
mount(0, f"size={size}k")
if before:
    shutil.copytree(before, folder, dirs_exist_ok=True)
disk = os.statvfs(folder)
filler = disk.f_bavail * disk.f_frsize - int(free) * 1024
if int(free) >= 0:
    Path(folder, "filler").write_bytes(bytes(filler))
if mode == "ro":
    mount(32 | 1, "")  # remount read-only

sys.argv = line
sys.path.insert(0, str(Path(line[0]).parent))
try:
    runpy.run_path(line[0], run_name="__main__")
finally:
    shutil.copytree(folder, after)
"""

NAMESPACES = subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="the system allows no namespaces")


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """Run a command that must end in one line: the line, and the files of its disk at the end.

    free: kB that are left on the disk; none: all that there is.
    """

    def run(
        folder: Path,
        *line: str | Path,
        size: int = 100_000,
        read_only: bool = False,
        before: Path | str = "",
        free: int = -1,
        code: int = 2,
    ) -> tuple[str, Path]:
        script = tmp_path / "small_disk.py"
        script.write_text(SMALL_DISK)
        folder.mkdir(exist_ok=True)
        after = tmp_path / "after"
        mode = "ro" if read_only else "rw"
        disk = map(str, (folder, size, mode, before, free, after))
        done = run_script(script, *disk, *line)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.strip().split("\n")[-1], after

    return run


OnSmallDisk = Callable[..., tuple[str, Path]]


def stopped_run(config: RunConfig, folder: Path) -> Path:
    """A run of two steps that has been stopped, to be resumed elsewhere."""
    before = replace(config, out=str(folder), stop_after=2)
    train_pretrain.main(before)
    return folder


def check_nothing_half_written(folder: Path) -> None:
    """No file beside another, whole checkpoints, and a log of whole lines but for the last."""
    assert not list(folder.rglob(".*"))
    for path in folder.glob("*.pt"):
        checkpoint.load(path)
    for line in (folder / "log.jsonl").read_text().splitlines()[:-1]:
        json.loads(line)
    json.loads((folder / "config.json").read_text())
    for path in folder.rglob("*.png"):
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


@needs_namespaces
@pytest.mark.parametrize(
    "name, free, options",
    [
        ("last.pt", 200, {"save_every": 3}),
        ("best.pt", 300, {"validate_every": 3}),
        ("step-3.pt", 200, {"keep_every": 3}),
        ("config.json", 0, {}),
        ("log.jsonl", 8, {}),
        ("figures/reconstruction.png", 24, {"validate_every": 3}),
    ],
)
def test_a_full_disk_ends_a_run_in_a_line_that_names_the_file_and_keeps_what_was_there(
    tiny: Config,
    tmp_path: Path,
    on_small_disk: OnSmallDisk,
    name: str,
    free: int,
    options: dict[str, Any],
) -> None:
    config = tiny(steps=400, save_every=400)
    before = stopped_run(config, tmp_path / "before")
    out = tmp_path / "disk"
    config = replace(config, out=str(out), resume=True, **options)
    line, after = on_small_disk(out, *command(config), before=before, free=free)
    assert line.startswith("train_pretrain.py: ") and f"{out / name}" in line
    assert "No space left" in line or "untouched" in line
    check_nothing_half_written(after)
    kept = checkpoint.load(after / "last.pt")
    assert kept["step"] == 2 or name == "log.jsonl"


@needs_namespaces
def test_a_full_disk_while_predicting_is_said_and_leaves_no_half_of_a_label_map(
    pretrained: Path, tmp_path: Path, on_small_disk: OnSmallDisk, tiny_seg: SegConfigs
) -> None:
    run = tiny_seg(out=str(tmp_path / "run"), steps=1)
    train_seg.main(run)
    out = tmp_path / "disk"
    line = [str(ROOT / "eval.py"), "predict", "--checkpoint", f"{run.out}/last.pt"]
    line += ["--data", run.data, "--split", "test", "--out", str(out), "--device", "cpu"]
    said, after = on_small_disk(out, *line, free=0)
    assert said.startswith("eval.py predict: ") and "No space left" in said and str(out) in said
    assert {path.name for path in after.iterdir()} == {"filler"}


@needs_namespaces
def test_a_full_disk_of_the_cache_is_said_and_leaves_no_half_of_a_volume(
    tiny: Config, tmp_path: Path, on_small_disk: OnSmallDisk
) -> None:
    cache = tmp_path / "cache"
    config = tiny(cache_dir=str(cache), out=str(tmp_path / "run"))
    for size in (40, 220):  # less than what the headers ask for, and a little more
        said, after = on_small_disk(cache, *command(config), size=size)
        assert said.startswith("train_pretrain.py: --cache-dir")
        assert not [path for path in after.iterdir() if path.name.startswith(".making")]
        assert not (tmp_path / "run/log.jsonl").exists()
        shutil.rmtree(after)


@needs_namespaces
def test_a_read_only_folder_is_said_and_a_read_only_cache_that_is_whole_is_enough(
    tiny: Config, tmp_path: Path, on_small_disk: OnSmallDisk
) -> None:
    out = tmp_path / "out"
    said, _ = on_small_disk(out, *command(tiny(out=str(out / "run"))), read_only=True)
    assert said.startswith(f"train_pretrain.py: --out {out / 'run'}: {out} is not a folder that")

    config = tiny(cache_dir=str(tmp_path / "cache"), steps=1)
    shutil.rmtree(tmp_path / "after")
    said, after = on_small_disk(tmp_path / "cache", *command(config), read_only=True)
    assert said.startswith("train_pretrain.py: --cache-dir") and not list(after.iterdir())

    shutil.rmtree(tmp_path / "after")
    whole = tiny(cache_dir=str(tmp_path / "whole"), out=str(tmp_path / "first"), steps=1)
    train_pretrain.main(whole)
    on_small_disk(
        tmp_path / "cache", *command(config), read_only=True, before=tmp_path / "whole", code=0
    )


@needs_namespaces
def test_shared_memory_that_is_too_small_for_a_batch_is_said(
    tiny: Config, on_small_disk: OnSmallDisk
) -> None:
    config = tiny(workers=2, batch_size=8, steps=100)
    said, _ = on_small_disk(Path("/dev/shm"), *command(config), size=64)
    assert "/dev/shm is full" in said and "--workers" in said


# --- weights of other programs


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A state dict of MONAI's: a file without our seal."""
    path = tmp_path / "monai.pt"
    torch.save(monai_weights(SwinUNETR(1, 2, **SMALL)), path)
    return path


@pytest.mark.parametrize("cases", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_weights_of_others_with_a_flipped_bit_are_refused_or_are_the_same(
    foreign: Path, tmp_path: Path, cases: int
) -> None:
    """A bit of the archive that says nothing of its content may be another one."""
    whole = foreign.read_bytes()
    intact = read_weights(foreign)
    path = tmp_path / "flipped.pt"
    rng = random.Random(0)
    refused = 0
    for _ in range(cases):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            weights = read_weights(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert bits_of(weights.tensors) == bits_of(intact.tensors)
            assert weights.plan == intact.plan
    print(f"\nbits flipped in weights of MONAI: {cases}, refused {refused}, the others equal")
    assert refused > 0.8 * cases


def test_a_flipped_bit_in_a_tensor_of_others_is_found(foreign: Path) -> None:
    """torch.load alone takes it."""
    tensors = read_weights(foreign).tensors
    largest = max(tensors.values(), key=torch.Tensor.numel)
    whole = foreign.read_bytes()
    place = whole.find(largest.contiguous().numpy().tobytes()[:64])
    assert place > 0
    damaged = bytearray(whole)
    damaged[place + 3] ^= 1
    foreign.write_bytes(damaged)
    torch.load(foreign, weights_only=True)
    assert "is damaged: the bytes are not those of its CRC" in refusal(read_weights, foreign)


@pytest.mark.parametrize("cases", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_weights_of_others_that_are_cut_are_refused(foreign: Path, cases: int) -> None:
    whole = foreign.read_bytes()
    rng = random.Random(0)
    lengths = [*range(len(whole) - 30, len(whole)), *rng.sample(range(len(whole)), cases)]
    for length in lengths:
        foreign.write_bytes(whole[:length])
        assert refusal(read_weights, foreign).startswith(f"{foreign}: ")
    print(f"\nweights of MONAI cut at {len(lengths)} lengths, none taken")


def test_from_the_shell_a_cut_checkpoint_is_one_line_and_stays_as_it_is(
    tiny: Config, tmp_path: Path
) -> None:
    config = tiny(steps=4, stop_after=2)
    train_pretrain.main(config)
    last = Path(config.out) / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    cut = last.read_bytes()
    for name, line in (
        (last, command(replace(config, resume=True))),
        (last, command(replace(config, init=str(last), out=str(tmp_path / "b")))),
    ):
        done = run_script(*line)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"train_pretrain.py: {name}: ")
    assert last.read_bytes() == cut and not (tmp_path / "b").exists()


# --- a stop signal during a validation that takes long


@pytest.mark.parametrize(
    "script, number, rank_0_alone",
    [
        pytest.param("pretrain", signal.SIGUSR1, True, marks=pytest.mark.slow),
        ("seg", signal.SIGTERM, False),
        pytest.param("pretrain", signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param("seg", signal.SIGUSR1, True, marks=pytest.mark.slow),
    ],
)
def test_a_validation_is_given_up_for_a_stop_signal_and_made_up_for_by_the_resumed_run(
    tiny: Config,
    tiny_seg: SegConfigs,
    tmp_path: Path,
    script: str,
    number: signal.Signals,
    rank_0_alone: bool,
) -> None:
    """torchrun ends a rank 30 seconds after SIGTERM. The rest of this validation takes longer.

    Of pre-training it is one in the middle of the run, of fine-tuning the one at its end.
    """
    config: RunConfig
    if script == "pretrain":
        config = tiny(out="run", steps=4, validate_every=2, validate_crops=30, resume=True)
        first = 2  # after that of step 0
    else:
        config = tiny_seg(out="run", steps=2, validate_every=2, overlap=0.8, resume=True)
        first = 1
    folder = tmp_path / "stopped"
    line = telling_line(config, folder)
    (folder / "where.pause").write_text(f"{first} 4")  # 60 s for the 15 crops of a rank

    ranks = start_ranks(line, line, cwd=folder)
    wait_until(lambda: where(folder)[1] == "pause", ranks)
    for rank in ranks[:1] if rank_0_alone else ranks:
        os.kill(rank.pid, number)
    asked = time.monotonic()
    each = [rank.done(timeout=60) for rank in ranks]
    assert time.monotonic() - asked < 30
    assert [done.returncode for done in each] == [0, 0], each
    assert f"stopped after step 2 of {config.steps}; the same command" in each[0].stderr
    saved = checkpoint.load(folder / "run/last.pt")
    assert saved["step"] == 2 and saved["unvalidated"]

    (folder / "where.pause").unlink()
    assert run_ranks(line, line, cwd=folder).returncode == 0
    _, whole = survive(config, tmp_path / "whole", kills=0, seed=0)
    check_same(left_by(folder / "run"), whole)


@pytest.mark.parametrize("script", ["pretrain", "seg"])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_validation_that_is_given_up_is_saved_as_such_and_made_up_for_once(
    tiny: Config,
    tiny_seg: SegConfigs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    at_the_end: bool,
) -> None:
    """In one process, asked by a signal to itself in the second crop or batch of windows."""
    common: dict[str, Any] = {"validate_every": 2, "save_every": 4, "resume": True}
    steps = 2 if at_the_end else 4
    straight: RunConfig
    main: Callable[[Any], object]
    if script == "pretrain":
        straight = tiny(out=str(tmp_path / "straight/run"), steps=steps, **common)
        main, target = train_pretrain.main, "dae.training.reconstruction.output_of"
        work = dae.training.reconstruction.output_of
        asked_at = 3 + 2  # after the three crops of step 0
    else:
        straight = tiny_seg(out=str(tmp_path / "straight/run"), steps=steps, **common)
        main, target = train_seg.main, "train_seg.predict"
        work = train_seg.predict
        asked_at = 2
    main(straight)

    calls = itertools.count(1)

    def asked_to_stop(*arguments: Any, **keys: Any) -> Any:
        if next(calls) == asked_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return work(*arguments, **keys)

    monkeypatch.setattr(target, asked_to_stop)
    broken = replace(straight, out=str(tmp_path / "broken/run"))
    main(broken)
    saved = checkpoint.load(Path(broken.out) / "last.pt")
    assert saved["step"] == 2 and saved["unvalidated"]
    assert events(broken, "end")[-1]["reason"] == "stopped"
    assert not [e for e in events(broken, "validation") if e["step"] == 2]
    assert next(calls) == asked_at + 1  # nothing was begun after it

    main(broken)
    for key in ("events", "names"):
        assert left_by(Path(broken.out))[key] == left_by(Path(straight.out))[key]
    for name in ("last.pt", "best.pt"):
        ends = [checkpoint.load(Path(run.out) / name) for run in (broken, straight)]
        for end in ends:
            end["config"].pop("out")
        assert bits_of(ends[0]) == bits_of(ends[1])

    main(broken)  # a finished run is validated once more, and is as it was
    assert not checkpoint.load(Path(broken.out) / "last.pt")["unvalidated"]


def wait_until(met: Callable[[], bool], ranks: list[Script]) -> None:
    """At most two minutes, while all ranks run."""
    end = time.monotonic() + 120
    while not met():
        assert time.monotonic() < end
        codes = [rank.poll() for rank in ranks]
        assert codes == [None] * len(ranks), ranks[0].done().stderr
        time.sleep(0.01)


# --- a rank, a process that reads ahead, and a clock


@pytest.mark.parametrize("launcher", ["two processes", "torchrun"])
def test_where_a_rank_is_killed_the_other_ends_with_one_line_within_a_minute(
    tiny: Config, tmp_path: Path, launcher: str
) -> None:
    config = tiny(steps=100_000, save_every=100_000, workers=1)
    line = command(config)
    if launcher == "torchrun":
        process = torchrun(*line, stderr=subprocess.PIPE)
        try:
            wait_for_step(config, 3, process)
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(ranks[-1]), signal.SIGKILL)
            told = process.communicate(timeout=60)[1]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 1
    else:
        first, second = start_ranks(line, line)
        wait_for_step(config, 3, first)
        os.kill(second.pid, signal.SIGKILL)  # its own process that reads ahead ends by itself
        done = first.done(timeout=60)
        second.wait(timeout=60)
        told = done.stderr
        assert done.returncode == 2 and "Traceback" not in told
    said = [line for line in told.splitlines() if line.startswith("train_pretrain.py: ")]
    assert len(said) == 1 and "another rank has ended before this one" in said[0], told[-3000:]


class Bad(Dataset[int]):
    """The fourth sample is never read."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, address: Address) -> int:
        if address[0] == 3:
            if self.how == "sleeps":
                time.sleep(10_000)
            if self.how == "is stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.how == "leaves":
                os._exit(0)
            if self.how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return address[0]


@pytest.mark.parametrize("how", ["sleeps", "is stopped", "leaves", "is killed"])
def test_a_process_that_reads_ahead_and_dies_or_hangs_is_one_line_in_a_stated_time(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(batches, "PATIENCE", 2)
    addresses = iter([[(step, 0)] for step in range(8)])
    seen: list[int] = []

    def read() -> None:
        with joined("cpu"):
            ahead = batches.loader(Bad(how), addresses, workers=2, pin=False, gather=list)
            with closing(ahead) as each:
                for (step,) in each:
                    seen.append(step)

    before = set(multiprocessing.active_children())
    started = time.monotonic()
    line = refusal(read)
    assert time.monotonic() - started < 30
    assert seen == list(range(len(seen))) and len(seen) <= 3
    words = "given nothing for 2 s" if how in ("sleeps", "is stopped") else "has died"
    assert words in line and "--resume" in line
    wait_until(lambda: set(multiprocessing.active_children()) == before, [])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_clock_that_jumps_by_a_day_changes_no_speed_and_no_time_left(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a machine finds its time server. Of what is shown nothing follows such a clock."""
    jumps = itertools.cycle([0, 86_400, -86_400])
    now = time.time
    for module in (time, tqdm.std):
        target = (module, "time")
        monkeypatch.setattr(*target, lambda: now() + next(jumps))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    config = tiny(steps=6, validate_every=3, save_every=2)
    train_pretrain.main(config)

    trained = events(config, "train")
    assert len(trained) == 6
    for event in trained:
        assert 0 < event["samples_per_s"] < 1e6 and 0 <= event["data_wait"] <= 1
    for event in events(config, "validation"):
        assert 0 < event["seconds"] < 600
    shown = terminal.getvalue()
    left = [int(seconds) for seconds in re.findall(r"(-?\d+) s left", shown)]
    assert left and min(left) >= 0 and max(left) < 600
    assert not re.search(r"-\d+[.:]\d|\binf|\bnan|\?|step/s|s/step|\d:\d\d", shown), shown


# --- another number of ranks


def on_ranks(config: PretrainConfig, world: int, *, until: int = 0) -> None:
    """The run goes on, on so many ranks, which share its global batch of 12."""
    now = replace(config, batch_size=12 // world, stop_after=until)
    done = run_ranks(*[command(now)] * world)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path, alike_to, share",  # of the rate, and of the weights
    [
        ((1, 2, 3, 4), 1e-3, 0.99),
        # From the first step on: rounding has longer to grow, see below. Of the weights .08 are
        # alike where the optimiser is not restored, .05 where the ranks do not average.
        pytest.param((4, 3, 1, 2), 0.1, 0.99, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_changes_its_ranks_ends_in_the_same_weights_but_for_rounding(
    tiny: Config, tmp_path: Path, path: tuple[int, ...], alike_to: float, share: float
) -> None:
    """With CMCL, which compares the 12 samples of all ranks with each other."""
    lr = 1e-3
    config = tiny(steps=8, lr=lr, warmup=0, alpha=1.0, resume=True, save_every=2)
    straight = replace(config, out=str(tmp_path / "straight"), batch_size=12)
    train_pretrain.main(straight)
    for number, world in enumerate(path, start=1):
        on_ranks(config, world, until=2 * number if number < len(path) else 0)
    assert [event["world"] for event in all_starts(config)] == list(path)

    # Ranks add the same gradients in another order: they differ by some 1e-7 of their size.
    for a, b in zip(events(straight, "train"), events(config, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]

    # Two things make more of that. AdamW divides a gradient by its own size, so where one is zero
    # but for rounding a weight may go either way: by the rate at most, in each step. And a value
    # that is zero but for rounding may be on either side of the bend of a leaky ReLU: in the
    # bottleneck, of 2^3 voxels, that is a hundredth of the gradient of a whole kernel.
    alike = []
    last = [checkpoint.load(Path(run.out) / "last.pt")["model"] for run in (straight, config)]
    for name, value in last[0].items():
        difference = (value - last[1][name]).abs().flatten()
        assert float(difference.max()) <= 2 * lr * 8, name
        alike.append(difference < alike_to * lr)
    assert torch.cat(alike).float().mean() > share


def all_starts(config: RunConfig) -> list[dict[str, Any]]:
    every = read_log(Path(config.out) / "log.jsonl")
    return [event for event in every if event["event"] in ("start", "resume")]
