"""Checkpoints: all of a run in one file, which is replaced as a whole and refused when damaged.

A checkpoint is an ordinary torch file: a zip archive, which torch.load can read. But torch.load
does not notice a flipped bit. So a checkpoint has a seal, the SHA-256 of all the bytes before it,
in the comment field at the end of the archive. `load` compares the seal with the bytes.
"""

import hashlib
import os
import random
from collections.abc import Mapping
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from dae.errors import InputError, one_line
from dae.files import write_atomic

FORMAT = 1
MARK = b"sha256:"
SEAL_LENGTH = len(MARK) + 64  # bytes: the mark, and the digest in hexadecimal
CHUNK = 1 << 20  # bytes that are read at once


# --- save and load


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`: tensors, numbers, strings, and lists and dicts of them.

    Raises InputError on a full disk.
    """
    write(path, {"format": FORMAT, **state}, sealed=True)


def write(path: Path, content: dict[str, Any], *, sealed: bool) -> None:
    """An atomic torch file: with our seal, or without it, for other programs.

    Raises InputError where it cannot be written. The file that was there before is then untouched.
    """
    try:
        write_atomic(
            path, lambda beside: write_torch_file(beside, content, sealed=sealed), durable=True
        )
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(
            f"{path}: could not be written ({one_line(error)}); the one before is untouched"
        ) from error


def write_torch_file(path: Path, content: dict[str, Any], *, sealed: bool) -> None:
    with path.open("w+b") as file:
        # Given a path, torch would write the file's name into the archive.
        torch.save(content, file)
        if sealed:
            seal(file)


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU. Runs no code from the file.

    Tensors that are `mapped` stay in the file until they are used: whoever needs the weights alone
    then never holds the optimiser, which is twice as large. Raises InputError on any damage.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")

    try:
        state = load_if_intact(path, mapped=mapped)
    except Exception as error:  # torch raises a dozen types of error for a damaged file
        raise InputError(
            f"{path}: not a checkpoint that can be read ({one_line(error)})"
        ) from error

    if state is None:
        raise InputError(
            f"{path}: damaged or not one of ours: its checksum does not match its bytes"
        )
    if state.get("format") != FORMAT:
        raise InputError(
            f"{path}: written in format {state.get('format')}, this version reads {FORMAT}"
        )
    return dict(state)


def load_if_intact(path: Path, *, mapped: bool) -> Any:
    """The content of a torch file whose seal matches its bytes, else None."""
    with path.open("rb") as file:
        if not seal_matches(file):
            return None
        file.seek(0)
        source = path if mapped else file  # torch maps only what has a path
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def load_weights(backbone: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """The weights of checkpoint `path` into their network. Raises InputError if they do not fit."""
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: weights of another network, made with other flags ({one_line(error)})"
        ) from error


# --- the seal


def seal(file: BufferedRandom) -> None:
    """Turn the empty comment of a zip archive into the digest of everything before it."""
    # The last two bytes of an archive are the length of its comment, which follows them.
    file.seek(-2, os.SEEK_END)
    file.write(SEAL_LENGTH.to_bytes(2, "little"))

    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()

    file.seek(0, os.SEEK_END)
    file.write(MARK + digest.encode())


def has_seal(path: Path) -> bool:
    """Whether a file ends as our checkpoints do, intact or damaged."""
    if not path.is_file() or path.stat().st_size < SEAL_LENGTH:
        return False
    with path.open("rb") as file:
        file.seek(-SEAL_LENGTH, os.SEEK_END)
        return file.read(len(MARK)) == MARK


def seal_of(path: Path) -> str:
    """The SHA-256 in a checkpoint's seal: two files with the same seal are the same checkpoint."""
    with path.open("rb") as file:
        file.seek(len(MARK) - SEAL_LENGTH, os.SEEK_END)
        return file.read().decode()


def seal_matches(file: IO[bytes]) -> bool:
    """Whether a file has a seal, and the bytes before the seal are those that were sealed."""
    size = file.seek(0, os.SEEK_END)
    if size < SEAL_LENGTH:
        return False
    file.seek(size - SEAL_LENGTH)
    sealed = file.read(SEAL_LENGTH)

    file.seek(0)
    digest = hashlib.sha256()
    unread = size - SEAL_LENGTH
    while unread > 0:
        chunk = file.read(min(unread, CHUNK))
        if not chunk:
            break  # the file was cut while it was read
        digest.update(chunk)
        unread -= len(chunk)
    return sealed == MARK + digest.hexdigest().encode()


# --- random states


def seed_rng(seed: int) -> None:
    """Every global random state, so that the same command writes the same checkpoint."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """Every global random state, in types that a safe load accepts."""
    # Nothing here draws from numpy's global generator; the code of others may.
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002

    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(algorithm),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            float(position),
            float(has_gauss),
            float(gauss),
        ],
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put every global random state back where `rng_state` found it."""
    torch.set_rng_state(state["torch"])

    # On a machine with another number of GPUs, their states stay as they are.
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((algorithm, words, int(position), int(has_gauss), gauss))  # noqa: NPY002

    random.setstate(state["python"])
