"""dae/evaluation/written.py: a file is replaced by the program that wrote it, as it wrote it."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from dae.errors import InputError
from dae.evaluation.written import LEDGER, Written, check_apart


def makes(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def test_what_was_written_is_noted_with_the_hash_of_its_bytes_and_found_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    written = Written(folder)
    written.check(["a.txt"])
    assert not folder.exists()  # nothing is made before the first file

    assert written.write("a.txt", makes("one"), settings={"overlap": 0.5}) == folder / "a.txt"
    line = json.loads((folder / LEDGER).read_text())
    assert line["file"] == "a.txt"
    assert line["sha256"] == hashlib.sha256(b"one").hexdigest()
    assert line["settings"] == {"overlap": 0.5}

    again = Written(folder)
    assert again.last("a.txt") == line
    assert again.is_whole("a.txt")
    assert not again.is_whole("b.txt")

    again.write("a.txt", makes("two"))
    assert (folder / "a.txt").read_text() == "two"
    assert Written(folder).is_whole("a.txt")
    assert {path.name for path in folder.iterdir()} == {"a.txt", LEDGER}


def test_a_file_of_somebody_else_or_changed_by_somebody_is_not_replaced(tmp_path: Path) -> None:
    written = Written(tmp_path)
    (tmp_path / "mine.txt").write_text("of the user")
    written.write("ours.txt", makes("one"))
    (tmp_path / "ours.txt").write_text("corrected by hand")
    (tmp_path / "folder").mkdir()

    for name, word in (
        ("mine.txt", "not list"),
        ("ours.txt", "was changed since it was written"),
        ("folder", "not list"),
    ):
        with pytest.raises(InputError, match=word) as error:
            written.check([name])
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=word):
            written.write(name, makes("x"))

    assert (tmp_path / "mine.txt").read_text() == "of the user"
    assert (tmp_path / "ours.txt").read_text() == "corrected by hand"


def test_an_input_is_not_replaced_by_whatever_name_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    scan = tmp_path / "in/scan.txt"
    scan.write_text("voxels")
    Written(tmp_path / "out").write("other.txt", makes("x"))
    os.link(scan, tmp_path / "out/hard.txt")
    (tmp_path / "out/soft.txt").symlink_to(scan)
    (tmp_path / "same").symlink_to(tmp_path / "in")

    for path in ("out/hard.txt", "out/soft.txt", "in/scan.txt", "same/scan.txt"):
        folder, name = path.split("/")
        with pytest.raises(InputError, match="is an input"):
            Written(tmp_path / folder).check([name], [scan])

    for folder in ("in", "same"):
        with pytest.raises(InputError, match=r"is the folder of .*scan\.txt"):
            check_apart(tmp_path / folder, [scan])
    check_apart(tmp_path / "out", [scan])
    check_apart(tmp_path / "new", [scan])


def test_a_run_that_fails_in_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.write("a.txt", makes("one"))

    def stop(path: Path) -> NoReturn:
        path.write_text("half a fi")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        written.write("a.txt", stop)
    assert (tmp_path / "a.txt").read_text() == "one"
    assert Written(tmp_path).is_whole("a.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", LEDGER}


def test_a_run_that_is_cut_short_before_a_file_has_its_name_knows_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(tmp_path)
    written.write("a.txt", makes("one"))

    def interrupt(path: Path, target: Path) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupt)
        written.write("a.txt", makes("two"))  # noted, but not under its name
    again = Written(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "one"
    assert not again.is_whole("a.txt")

    again.write("a.txt", makes("two"))
    assert Written(tmp_path).is_whole("a.txt")


def test_a_run_that_is_cut_short_in_a_line_costs_no_other_line(tmp_path: Path) -> None:
    Written(tmp_path).write("a.txt", makes("one"))
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"file": "b.txt", "sha')

    Written(tmp_path).write("b.txt", makes("two"))
    assert Written(tmp_path).is_whole("a.txt")
    assert Written(tmp_path).is_whole("b.txt")


def test_two_runs_may_write_into_one_folder(tmp_path: Path) -> None:
    one = Written(tmp_path)
    other = Written(tmp_path)
    one.write("a.txt", makes("a"))
    other.write("b.txt", makes("b"))
    one.write("c.txt", makes("c"))
    assert all(Written(tmp_path).is_whole(name) for name in ("a.txt", "b.txt", "c.txt"))


def test_a_list_of_nonsense_is_no_list(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text('[]\n{"file": "a.txt"}\nnull\nnot json\n')
    (tmp_path / "a.txt").write_text("of the user")
    with pytest.raises(InputError, match="does not list it"):
        Written(tmp_path).check(["a.txt"])
