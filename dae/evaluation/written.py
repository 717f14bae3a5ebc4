"""What eval.py wrote into a folder, and what it may write there.

A file is replaced only if this program wrote it and nobody has changed it since. Every folder that
eval.py writes into holds written.jsonl: a JSON object a line for every file, with its name, the
SHA-256 of its bytes, the time, and what it was made from. The line is written before the file takes
its name, so that a run that is cut short knows its own files.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from dae.errors import InputError
from dae.files import json_lines, write_atomic

LEDGER = "written.jsonl"


class Written:
    """The files of a folder that this program wrote. The folder is made with its first file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = read_lines(folder / LEDGER)

    def last(self, name: str) -> Mapping[str, Any]:
        """The line of the file as it was written last. Empty if it never was."""
        for line in reversed(self.lines):
            if line["file"] == name:
                return line
        return {}

    def is_whole(self, name: str) -> bool:
        """Whether the file is there as it was written last."""
        line = self.last(name)
        path = self.folder / name
        return bool(line) and path.is_file() and sha256_of([path]) == line["sha256"]

    def check(self, names: Iterable[str], inputs: Iterable[Path] = ()) -> None:
        """Raises InputError if these files would replace an input, or a file that is not this
        program's as it wrote it.
        """
        read = {identity_of(path) for path in inputs if path.exists()}
        for name in names:
            path = self.folder / name
            if path.exists():
                self.check_file(name, path, is_input=identity_of(path) in read)

    def check_file(self, name: str, path: Path, *, is_input: bool) -> None:
        """`check` of a file that is there."""
        where = f"--out {self.folder}: {path}"
        if is_input:
            raise InputError(f"{where} is an input and would be replaced; name another folder")

        # Any line of the file will do: a run that was cut short has noted what it did not write.
        hashes = [line["sha256"] for line in self.lines if line["file"] == name]
        remedy = "move it away, or name another folder"
        if not hashes:
            raise InputError(
                f"{where} is there already, and {LEDGER} does not list it as this program's; "
                f"{remedy}"
            )
        if not path.is_file() or sha256_of([path]) not in hashes:
            raise InputError(f"{where} was changed since it was written; {remedy}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this block no other process is in such a block for the folder, and what others
        have written so far is known.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ledger = self.folder / LEDGER
        with ledger.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed when the file is closed
            self.lines = read_lines(ledger)
            yield

    def write(self, name: str, make: Callable[[Path], object], **metadata: Any) -> Path:
        """Write a file atomically: `make` gets the path to write to, `metadata` goes into the line.

        Raises InputError as `check` does.
        """
        self.check([name])
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, partial(self.make_and_note, name, make, metadata))
        return path

    def make_and_note(
        self, name: str, make: Callable[[Path], object], metadata: dict[str, Any], path: Path
    ) -> None:
        """Make the file under a temporary path, and note what it holds before it gets its name."""
        make(path)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.note({"file": name, "sha256": sha256_of([path]), "time": now, **metadata})

    def note(self, line: dict[str, Any]) -> None:
        """Add a line to written.jsonl. Two processes may add lines to one file."""
        ledger = self.folder / LEDGER
        text = json.dumps(line) + "\n"
        if has_torn_end(ledger):
            text = "\n" + text

        with ledger.open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines.append(line)


def has_torn_end(ledger: Path) -> bool:
    """Whether a run was killed while it wrote the last line."""
    if not ledger.is_file():
        return False
    content = ledger.read_bytes()
    return len(content) > 0 and not content.endswith(b"\n")


def read_lines(ledger: Path) -> list[dict[str, Any]]:
    """The lines that are whole. Of a run that was killed the last one may not be."""
    lines = []
    for line in json_lines(ledger):
        if is_line(line):
            lines.append(line)
    return lines


def is_line(line: Mapping[str, Any]) -> bool:
    """Whether a line has what `write` notes, and of a label map what eval.py predict adds."""
    if not isinstance(line.get("file"), str) or not isinstance(line.get("sha256"), str):
        return False
    source = line.get("source", {})
    if not isinstance(line.get("settings", {}), dict) or not isinstance(source, dict):
        return False
    images = source.get("images", [""])
    return isinstance(images, list) and len(images) > 0


def check_apart(out: Path, inputs: Sequence[Path]) -> None:
    """Raises InputError if `out` is a folder of `inputs`: label maps among scans are easily taken
    for scans.
    """
    if not out.is_dir():
        return
    for path in inputs:
        if path.parent.is_dir() and identity_of(out) == identity_of(path.parent):
            raise InputError(
                f"--out {out}: is the folder of {path}, which is read; name another folder"
            )


def identity_of(path: Path) -> tuple[int, int]:
    """Device and inode: what two names of one file or folder share, links included."""
    status = path.stat()
    return status.st_dev, status.st_ino


def sha256_of(paths: Iterable[Path]) -> str:
    """Of the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
