"""The folder of a run, and what a resumed run must have in common with the run it continues."""

import fcntl
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dae.config.command_line import of_preset, to_json, was_set
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.config.shared import OptimConfig, differences
from dae.data.datalist import BY_VOXELS
from dae.errors import InputError
from dae.weights import checkpoint
from dae.weights.plan import check_state

Config = PretrainConfig | SegConfig

# What a run writes into its folder, in addition to step-N.pt.
RUN_FILES = (
    "log.jsonl",
    "last.pt",
    "best.pt",
    "config.json",
    "figures/reconstruction.png",
    "figures/loss.png",
    "figures/overlay.png",
)

# Held by the process that writes into the folder; the file stays there.
LOCK = "run.lock"

# The files that show that a run was here, and not only a user's file of the name of one of a run's.
# The lock is the first file that a run makes.
SIGNS_OF_A_RUN = ("log.jsonl", "last.pt", LOCK)

# Flags that say how long a run is. It may become longer.
LENGTH = ("steps", "epochs")


# --- the folder


def check_out_folder(
    out: Path, *, resume: bool, may_replace: bool = False, inputs: Sequence[str] = ()
) -> None:
    """The folder can be made, and a run in it replaces only the files of the run it continues.

    may_replace: an earlier run may be replaced.
    inputs: files that the run reads, which no run may replace.
    Raises InputError.
    """
    # --out may be some levels below what exists so far.
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--out {out}: {existing} is not a folder that can be written to")

    present = [name for name in RUN_FILES if (out / name).exists()]
    is_run = any((out / name).exists() for name in SIGNS_OF_A_RUN)
    if present and is_run and not resume and not may_replace:
        raise InputError(
            f"--out {out}: holds a run already; add --resume to go on with it, "
            "or name another folder"
        )
    if present and not is_run and not may_replace:
        raise InputError(
            f"--out {out}: holds {present[0]}, which a run would replace; name another folder"
        )

    for path in inputs:
        if not Path(path).is_file():
            continue
        for name in present:
            if Path(path).samefile(out / name):
                raise InputError(
                    f"--out {out}: {path} is read and would be replaced; name another folder"
                )


def check_free(out: Path) -> None:
    """Raises InputError where a run is at work in the folder. A process that holds it must not ask:
    to close any descriptor of the file frees the lock.
    """
    if (out / LOCK).exists():
        os.close(lock(out, fcntl.LOCK_SH))


def hold(out: Path) -> int:
    """Keep other runs out of the folder while this process lives. Raises InputError if one is in.

    It is a lock of the process itself (POSIX), which those that it starts do not share. So it is
    gone with a killed run, even where a process that reads ahead lives some seconds longer.
    -> the descriptor of its file, which frees the lock when it is closed.
    """
    return lock(out, fcntl.LOCK_EX)


def lock(out: Path, kind: int) -> int:
    """The lock of a folder, alone (LOCK_EX) or beside others that look (LOCK_SH)."""
    try:
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:  # a folder, or a file of another user's
        raise InputError(
            f"--out {out}: {LOCK} could not be opened ({error.strerror}); make it a file that you "
            "may write, or name another folder"
        ) from error
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise InputError(
            f"--out {out}: another run is writing into it; wait for its end, or name another folder"
        ) from error
    except OSError:
        pass  # a file system without locks
    return descriptor


def saved_run(out: Path, *, resume: bool, script: str) -> dict[str, Any] | None:
    """The last checkpoint of the run of `script` that is to be resumed, or None.

    Raises InputError where the run was another script's.
    """
    path = out / "last.pt"
    if not resume or not path.is_file():
        return None

    saved = checkpoint.load(path)
    if "step" not in saved:  # as `python -m dae.weights convert` writes it
        raise InputError(f"{path}: holds weights and no run; name another --out")
    plan = saved.get("plan")
    classes = plan.get("classes") if isinstance(plan, dict) else None
    written_by = "train_seg.py" if classes else "train_pretrain.py"
    if written_by != script:
        raise InputError(f"{path}: is of a run of {written_by}; name another --out")
    check_state(saved, path)
    return saved


# --- the same run?


def check_same_flags(path: Path, saved: Mapping[str, Any], config: Config) -> None:
    """Raises InputError, with the flag's name, where the checkpoint `path` is of another run."""
    changed = differences(config, saved["config"])
    # A length that was only forgotten, so that it is the preset's or the default, makes no run
    # longer.
    if is_longer(saved, config) and asks_for_length(config):
        changed = [name for name in changed if name not in LENGTH]
    if not changed:
        return

    flag = f"--{changed[0].replace('_', '-')}"
    before = saved["config"].get(changed[0])
    now = to_json(config)[changed[0]]
    raise InputError(
        f"{flag} {now}: the run of {path} was started with {before}; keep it, or name another --out"
    )


def is_longer(saved: Mapping[str, Any], config: OptimConfig) -> bool:
    """Whether a resumed run is to have more steps than it was started with.

    It goes on as the longer run from where it is: the rate of every step is a function of the step
    and of the number of steps, and a sample does not depend on the length of its run. `config` has
    the number of steps that --epochs gives.
    """
    return config.steps > int(saved["config"]["steps"])


def asks_for_length(config: Config) -> bool:
    """Whether it was asked for a number of steps or epochs, by more than the name of a preset."""
    if not set(LENGTH).isdisjoint(config.set_flags):
        return True
    return set(LENGTH).isdisjoint(of_preset(config)) and was_set(config, "steps")


def check_same_batch(
    path: Path, saved: Mapping[str, Any], config: OptimConfig, *, world: int
) -> None:
    """Raises InputError where a step of the resumed run would see another number of samples.

    The factors of that number may change: sample j of step s is the same on any number of ranks and
    in a micro-batch of any size.
    """
    before = saved["global_batch"]
    now = config.batch_size * config.accumulate * world
    if before != now:
        raise InputError(
            f"--batch-size {config.batch_size} x --accumulate {config.accumulate} x {world} ranks "
            f"= {now} samples a step: the run of {path} was started with {before}; "
            f"{how_to_keep(before, world)}"
        )


def how_to_keep(samples: int, world: int) -> str:
    """In words: the flags that give so many samples a step on `world` ranks.

    Where the ranks cannot share them evenly: the numbers of ranks that can.
    """
    if samples % world:
        divisors = [str(ranks) for ranks in range(1, samples + 1) if samples % ranks == 0]
        return f"{world} ranks cannot share {samples} evenly; start {' or '.join(divisors)} ranks"

    of_rank = samples // world
    factors = []
    for accumulate in range(1, of_rank + 1):
        if of_rank % accumulate == 0:
            factors.append(f"{of_rank // accumulate} x {accumulate}")
    return f"for {world} ranks --batch-size x --accumulate is {' or '.join(factors)}"


def check_same_samples(
    path: Path, saved: Mapping[str, Any], metadata: Mapping[str, Any], *, data_by_size: str = ""
) -> None:
    """Raises InputError where a resumed run would see other volumes.

    metadata: of the run now; its `data` is the fingerprint of the volumes, by their voxels.
    data_by_size: the fingerprint as older versions wrote it, for runs that they started.
    """
    by_voxels = str(saved["data"]).startswith(BY_VOXELS)
    data = metadata["data"] if by_voxels else data_by_size
    if saved["data"] == data:
        return

    older = "" if by_voxels else " or its split, which older versions drew otherwise,"
    raise InputError(
        f"{path}: the data list{older} is not what it was ({saved['data']}); "
        "the samples would be others"
    )


def changes_in_words(saved: Mapping[str, Any], config: OptimConfig, *, world: int) -> list[str]:
    """A line for each thing that may change in a resumed run and did, with the consequence."""
    notes = []

    batch = saved["config"]["batch_size"]
    accumulate = saved["config"]["accumulate"]
    ranks = saved["global_batch"] // (batch * accumulate)
    if (batch, accumulate, ranks) != (config.batch_size, config.accumulate, world):
        notes.append(
            f"{ranks} ranks x batch {batch} x {accumulate} before, {world} x {config.batch_size} x "
            f"{config.accumulate} now: the same samples, summed in another order"
        )

    if is_longer(saved, config):
        notes.append(
            f"{saved['config']['steps']} steps before, {config.steps} now: from step "
            f"{saved['step']} on the learning rate is that of the longer run"
        )

    threads = torch.get_num_threads()
    if saved["threads"] != threads:
        notes.append(f"{saved['threads']} threads before, {threads} now: the last bits will differ")

    return notes
