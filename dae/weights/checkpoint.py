"""Checkpoints: all that a run is, in one file that is either whole or refused.

A checkpoint is an ordinary torch file. It is written beside its place, flushed and renamed over it, so that a killed
process or a full disk leaves the one before. A SHA-256 of all its bytes stands in the zip archive's own comment field:
torch.load reads the file as ever and would take a flipped bit without a word; `load` does not.
"""

import hashlib
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dae.config.command_line import to_json
from dae.config.shared import OptimConfig, RunConfig, differences
from dae.data.datalist import BY_VOXELS
from dae.errors import InputError

FORMAT = 1
MARK = b"sha256:"
COMMENT = len(MARK) + 64  # bytes at the end of the file


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them). Raises InputError on a full disk."""
    write(path, {"format": FORMAT, **state}, sealed=True)


def write(path: Path, content: dict[str, Any], *, sealed: bool) -> None:
    """A torch file that is whole or not there, with our checksum or, for others to read, without."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w+b") as file:
            torch.save(content, file)
            if sealed:
                _seal(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        aside.unlink(missing_ok=True)
        raise InputError(
            f"{path}: could not be written ({_line(error)}); the one before is untouched"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU. Runs no code from the file. Raises InputError on any damage."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with path.open("rb") as file:
            sealed = _is_sealed(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True) if sealed else None
    except Exception as error:  # torch has a dozen kinds of error for a damaged file
        raise InputError(f"{path}: not a checkpoint that can be read ({_line(error)})") from error
    if state is None:
        raise InputError(
            f"{path}: damaged or not one of ours: its checksum does not match its bytes"
        )
    if state.get("format") != FORMAT:
        raise InputError(
            f"{path}: written in format {state.get('format')}, this version reads {FORMAT}"
        )
    return dict(state)


# What a run writes into its folder, beside step-N.pt.
RUN_FILES = (
    "log.jsonl",
    "last.pt",
    "best.pt",
    "config.json",
    "figures/reconstruction.png",
    "figures/loss.png",
    "figures/overlay.png",
)


def check_out_folder(
    out: Path, *, resume: bool, free: bool = False, inputs: Sequence[str] = ()
) -> None:
    """The folder can be made, and nothing in it would be replaced but what a run has left that goes on.

    free: an earlier run may be written over. inputs: files that are read, which no run may replace.
    Raises InputError.
    """
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: {parent} is not a folder that can be written to")
    there = [name for name in RUN_FILES if (out / name).exists()]
    if there and not (resume or free):
        if there[0] in ("log.jsonl", "last.pt"):
            raise InputError(
                f"--out {out}: holds a run already; add --resume to go on with it, or name another folder"
            )
        raise InputError(
            f"--out {out}: holds {there[0]}, which a run would replace; name another folder"
        )
    for given in inputs:
        for name in there:
            if Path(given).is_file() and Path(given).samefile(out / name):
                raise InputError(
                    f"--out {out}: {given} is read and would be replaced; name another folder"
                )


def start_over(out: Path) -> None:
    """Remove the results of the demo's earlier run, and say so."""
    there = [out / name for name in ("log.jsonl", "last.pt", "best.pt") if (out / name).exists()]
    for path in there:
        path.unlink()
    if there:
        print(
            f"{out}: the demo's earlier run is removed and started over; --resume would go on",
            file=sys.stderr,
        )


def left_in(out: Path, *, resume: bool, script: str) -> dict[str, Any] | None:
    """What a run of `script` that is to be resumed has left, or None. Raises InputError on another script's."""
    path = out / "last.pt"
    if not resume or not path.is_file():
        return None
    saved = load(path)
    made_by = "train_seg.py" if saved["plan"]["classes"] else "train_pretrain.py"
    if made_by != script:
        raise InputError(f"{path}: is of a run of {made_by}; name another --out")
    return saved


def check_same_flags(path: Path, saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raises InputError, naming the flag, where what was left is of another run."""
    for name in differences(config, saved["config"]):
        flag, was, now = (
            f"--{name.replace('_', '-')}",
            saved["config"].get(name),
            to_json(config)[name],
        )
        raise InputError(
            f"{flag} {now}: the run of {path} was started with {was}; keep it, or name another --out"
        )


def check_same_batch(
    path: Path, saved: Mapping[str, Any], config: OptimConfig, *, world: int
) -> None:
    """Raises InputError where a step of the resumed run would see another number of samples.

    Its factors may change: sample j of step s is the same on any ranks and in any micro-batch.
    """
    was, now = saved["global_batch"], config.batch_size * config.accumulate * world
    if was != now:
        raise InputError(
            f"--batch-size {config.batch_size} x --accumulate {config.accumulate} x {world} ranks = {now} samples a "
            f"step: the run of {path} was started with {was}; choose factors whose product is {was}"
        )


def check_same_samples(
    path: Path, saved: Mapping[str, Any], facts: Mapping[str, Any], *, data_by_size: str = ""
) -> None:
    """Raises InputError where a resumed run would meet other volumes.

    `data_by_size` is the fingerprint of the data as older versions wrote it, for runs that they have left.
    """
    by_voxels = str(saved["data"]).startswith(BY_VOXELS)
    if saved["data"] == (facts["data"] if by_voxels else data_by_size):
        return
    older = "" if by_voxels else " or its split, which older versions drew otherwise,"
    raise InputError(
        f"{path}: the data list{older} is not what it was ({saved['data']}); the samples would be others"
    )


def what_differs(saved: Mapping[str, Any], config: OptimConfig, *, world: int) -> list[str]:
    """In words what has changed in a resumed run, of what may, and what follows from it."""
    then = saved["config"]
    batch, accumulate = then["batch_size"], then["accumulate"]
    ranks = saved["global_batch"] // (batch * accumulate)
    notes = []
    if (batch, accumulate, ranks) != (config.batch_size, config.accumulate, world):
        notes.append(
            f"{ranks} ranks x batch {batch} x {accumulate} before, {world} x {config.batch_size} x "
            f"{config.accumulate} now: the same samples, summed in another order"
        )
    if saved["threads"] != (threads := torch.get_num_threads()):
        notes.append(f"{saved['threads']} threads before, {threads} now: the last bits will differ")
    return notes


def load_weights(backbone: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: weights of another network, made with other flags ({_line(error)})"
        ) from error


def rng_state() -> dict[str, Any]:
    """Every global random state, in types that a safe load accepts."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state of others' code that may use it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *map(float, rest)],
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(place), int(has_gauss), gauss))  # noqa: NPY002
    random.setstate(state["python"])


def _seal(file: Any) -> None:
    """Turn the archive's empty comment into the digest of everything before it."""
    file.seek(-2, os.SEEK_END)  # the comment's length, the last field of a zip archive
    file.write(COMMENT.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(MARK + digest.encode())


def has_seal(path: Path) -> bool:
    """Whether a file claims to be one of ours, be it whole or damaged."""
    if not path.is_file() or path.stat().st_size < COMMENT:
        return False
    with path.open("rb") as file:
        file.seek(-COMMENT, os.SEEK_END)
        return file.read(len(MARK)) == MARK


def seal_of(path: Path) -> str:
    """The SHA-256 that stands in a checkpoint: two files with one seal are one checkpoint."""
    with path.open("rb") as file:
        file.seek(-COMMENT + len(MARK), os.SEEK_END)
        return file.read().decode()


def _is_sealed(file: Any) -> bool:
    size = file.seek(0, os.SEEK_END)
    if size < COMMENT:
        return False
    file.seek(size - COMMENT)
    comment = file.read(COMMENT)
    file.seek(0)
    digest, left = hashlib.sha256(), size - COMMENT
    while left and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
        left -= len(chunk)
    return bool(comment == MARK + digest.hexdigest().encode())


def _flush_folder(folder: Path) -> None:
    """A rename is only on the disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
