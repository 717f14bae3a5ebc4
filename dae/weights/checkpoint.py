"""Checkpoints: all of a run in one file, which is replaced as a whole and refused when damaged.

A checkpoint is an ordinary torch file: a zip archive, which torch.load can read. But torch.load
does not notice a flipped bit. So a checkpoint has a seal, the SHA-256 of all the bytes before it,
in the comment field at the end of the archive. `load` compares the seal with the bytes.

The seal tells damage, and not who wrote the file: anybody can seal. So no code of a file is run,
and before torch reads it, `check_archive` compares what it claims to hold with its length.
"""

import hashlib
import os
import pickletools
import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from dae.errors import InputError, one_line
from dae.files import write_atomic

FORMAT = 1
MARK = b"sha256:"
SEAL_LENGTH = len(MARK) + 64  # bytes: the mark, and the digest in hexadecimal
CHUNK = 1 << 20  # bytes that are read at once

ZIP = b"PK\x03\x04"  # the first bytes of an archive
MOST_ENTRIES = 200_000  # of an archive; each tensor is one
FOLDER = 0x10  # bit of an archive's entry
LARGEST_PICKLE = 64 << 20  # bytes of what holds the tensors together

# What a file may name beside tensors. torch has more that runs no code, but makes an object of any
# size that the file asks for: a bytearray, or a tensor without values.
NAMES = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\._utils _rebuild_(meta_tensor_no_storage|qtensor)"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch(\.storage)? \w*Storage|torch\.nn\.parameter Parameter"
    r"|torch (Size|device|b?float\d+|double|half|u?int\d+|long|short|bool|complex\d+)"
    r"|torch\.serialization _get_layout"
    r"|_codecs encode|(builtins|__builtin__) (set|complex|dict|list|tuple|int|float|bool|str)"
    r"|numpy\S* \w+"
)


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
    except InputError:
        raise
    except Exception as error:  # torch raises a dozen types of error for a damaged file
        raise InputError(
            f"{path}: not a checkpoint that can be read ({one_line(error)})"
        ) from error

    if state is None:
        raise InputError(
            f"{path}: damaged or not one of ours: its checksum does not match its bytes"
        )
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, and no checkpoint")
    check_tensors(state, path)
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
        check_archive(path)
        file.seek(0)
        source = path if mapped else file  # torch maps only what has a path
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def load_weights(backbone: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """The weights of checkpoint `path` into their network. Raises InputError if they do not fit."""
    try:
        backbone.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # or values that are no tensors
        raise InputError(
            f"{path}: weights of another network, made with other flags ({one_line(error)})"
        ) from error


# --- what a stranger's file claims


def check_archive(path: Path) -> None:
    """Raises InputError where an archive claims more than its file holds, or is compressed.

    Where it cannot be read, what zipfile raises: eight types of error, by which byte is damaged.
    torch.save compresses nothing. Files of torch before 1.6 are no archives, and torch compares
    their claims itself.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        check_entries(entries, path)
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                check_names(archive.read(entry), path)


def check_entries(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Raises InputError for entries that torch.save does not write."""
    claimed = sum(entry.file_size for entry in entries)
    length = path.stat().st_size
    if claimed > length or len(entries) > MOST_ENTRIES:
        raise InputError(
            f"{path}: claims to hold {claimed} bytes in {len(entries)} entries, the file has "
            f"{length} bytes; it is damaged or made to fill the memory"
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{path}: is compressed, which torch.save never does; "
                "torch.load it where you trust it, and save it again"
            )
        if entry.external_attr & FOLDER:
            # torch reads nothing of it, and takes what was in the memory before for its tensor.
            raise InputError(
                f"{path}: its part {entry.filename} is marked as a folder; copy it again"
            )
        if entry.filename.endswith("data.pkl") and entry.file_size > LARGEST_PICKLE:
            raise InputError(f"{path}: has {entry.file_size} bytes beside its tensors; too many")


def check_names(pickled: bytes, path: Path) -> None:
    """Raises InputError for the name of a class or a function that no checkpoint needs."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
            module, _, name = str(argument).partition(" ")
            raise InputError(
                f"{path}: holds {module}.{name}, which is code and not a tensor, and is not "
                "loaded; where you trust the file, torch.load it with weights_only=False and save "
                "its state dict alone"
            )


def check_tensors(content: Any, path: Path) -> None:
    """Raises InputError for a tensor that has more values than the file, or is not a dense one."""
    for value in values_in(content):
        if not isinstance(value, Tensor) or value.is_meta:
            continue
        is_dense = value.layout is torch.strided and not value.is_quantized
        if not is_dense or value.nbytes > value.untyped_storage().nbytes():
            raise InputError(
                f"{path}: holds a tensor of {tuple(value.shape)} that is sparse, quantised or "
                "has fewer values in the file; save it as .contiguous()"
            )


def values_in(content: Any) -> Iterator[Any]:
    """All values in dictionaries, lists and tuples within each other, each container once."""
    unread = [content]
    seen = set[int]()
    while unread:
        value = unread.pop()
        yield value
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        unread += value.values() if isinstance(value, dict) else value


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
