"""What eval.py wrote into a folder, and what it may write there.

A file is replaced only if this program wrote it and nobody has changed it since. Every folder that eval.py writes into
holds written.jsonl: an object a line for every file, with its name, the SHA-256 of its bytes, the time, and what it was
made from. The line is written before the file takes its name, so that a run that is cut short knows its own files.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dae.errors import InputError

LEDGER = "written.jsonl"


class Written:
    """The files of a folder that this program wrote. The folder is made with its first file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = read_lines(folder / LEDGER)

    def last(self, name: str) -> Mapping[str, Any]:
        """What was noted when the file was written last; nothing if it never was."""
        return next((line for line in reversed(self.lines) if line["file"] == name), {})

    def is_whole(self, name: str) -> bool:
        """Whether the file is there as it was written last."""
        path = self.folder / name
        return (
            bool(self.last(name))
            and path.is_file()
            and sha256_of([path]) == self.last(name)["sha256"]
        )

    def check(self, names: Iterable[str], inputs: Iterable[Path] = ()) -> None:
        """Raises InputError if these files would replace an input, or what is not this program's."""
        read = {place_of(path): path for path in inputs if path.exists()}
        elsewhere = "move it away, or name another folder"
        for name in names:
            path = self.folder / name
            if not path.exists():
                continue
            where = f"--out {self.folder}: {path}"
            if place_of(path) in read:
                raise InputError(f"{where} is an input and would be replaced; name another folder")
            known = [line["sha256"] for line in self.lines if line["file"] == name]
            if not known:
                raise InputError(
                    f"{where} is there already, and {LEDGER} does not list it as this program's; {elsewhere}"
                )
            if not path.is_file() or sha256_of([path]) not in known:
                raise InputError(f"{where} was changed since it was written; {elsewhere}")

    def write(self, name: str, make: Callable[[Path], object], **facts: Any) -> Path:
        """Have `make` write the file whole, under a name of its own until it is; `facts` go into its line.

        Raises InputError as `check` does.
        """
        self.check([name])
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(
            f".{os.getpid()}.{path.name}"
        )  # with the ending, by which nibabel chooses the format
        try:
            make(aside)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.note({"file": name, "sha256": sha256_of([aside]), "time": now, **facts})
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    def note(self, line: dict[str, Any]) -> None:
        """Add a line at the end. Two processes may add lines to one file."""
        ledger = self.folder / LEDGER
        torn = (
            ledger.is_file()
            and not ledger.read_bytes().endswith(b"\n")
            and ledger.stat().st_size > 0
        )
        with ledger.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")
        self.lines.append(line)


def read_lines(ledger: Path) -> list[dict[str, Any]]:
    """The lines that are whole: of a run that was killed the last one may not be."""
    found = []
    for text in (
        ledger.read_text(encoding="utf-8", errors="replace").splitlines()
        if ledger.is_file()
        else ()
    ):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and {"file", "sha256"} <= line.keys():
            found.append(line)
    return found


def check_apart(out: Path, inputs: Sequence[Path]) -> None:
    """Raises InputError if `out` is a folder of `inputs`: what is written beside scans is soon taken for one."""
    for path in inputs:
        if out.is_dir() and path.parent.is_dir() and place_of(out) == place_of(path.parent):
            raise InputError(
                f"--out {out}: is the folder of {path}, which is read; name another folder"
            )


def place_of(path: Path) -> tuple[int, int]:
    """What two names of one file or folder have in common, by whatever links."""
    found = path.stat()
    return found.st_dev, found.st_ino


def sha256_of(paths: Iterable[Path]) -> str:
    """Of the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
