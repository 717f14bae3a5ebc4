"""dae/files.py: a file is whole or absent, and nothing is left beside it."""

import multiprocessing
import os
from pathlib import Path
from typing import NoReturn

import pytest

from dae import files
from dae.files import write_atomic, write_bytes


def half_then_error(path: Path) -> NoReturn:
    path.write_bytes(b"ha")
    raise OSError(28, "No space left on device")


def half_then_killed(path: Path) -> NoReturn:
    path.write_bytes(b"ha")
    os._exit(9)


def test_a_file_has_the_bytes_and_nothing_is_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_bytes(path, b"new")
    write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [False, True])
def test_an_error_leaves_the_file_as_it_was(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, half_then_error, durable=durable)
    assert list(tmp_path.iterdir()) == []

    write_atomic(path, lambda beside: beside.write_bytes(b"whole"), durable=durable)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, half_then_error, durable=durable)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_bytes(path, b"whole")
    process = multiprocessing.get_context("fork").Process(
        target=write_atomic, args=(path, half_then_killed)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert path.read_bytes() == b"whole"


def test_the_path_beside_is_in_the_same_folder_and_ends_as_the_file_does(tmp_path: Path) -> None:
    """By the ending nibabel compresses, and a rename is atomic only within one disk."""
    asked: list[Path] = []

    def write(beside: Path) -> None:
        asked.append(beside)
        beside.write_bytes(b"volume")

    path = tmp_path / "label.nii.gz"
    write_atomic(path, write)
    (beside,) = asked
    assert beside != path
    assert beside.parent == tmp_path
    assert beside.name.endswith(".nii.gz")
    assert beside.name.startswith(".")  # no pattern of volumes finds it


def test_what_is_durable_is_flushed_before_and_after_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    flushed: list[tuple[bool, bool]] = []

    def note(flushed_path: Path) -> None:
        flushed.append((flushed_path.is_dir(), path.exists()))

    monkeypatch.setattr(files, "flush", note)
    write_atomic(path, lambda beside: beside.write_bytes(b"x"), durable=True)
    assert flushed == [(False, False), (True, True)]  # the file, then the folder with its name

    flushed.clear()
    write_bytes(path, b"y")
    assert flushed == []
