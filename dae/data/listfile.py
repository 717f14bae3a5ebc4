"""A JSON file that a person wrote: read as it is, or refused, but no part is silently ignored.

A data list decides who is trained on. A key that is written a little differently, or twice, would
change that without an error, so both are refused by name. Keys that are about something else
(`description`, `licence`) are left alone.

The person may be a stranger. So a file has a largest size, a name is one line of text, and a path
stays in the folder of the list unless `--data-root` says more.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dae.errors import InputError, one_line
from dae.files import from_json

# For each known key, what people write for it, as `plain` has it.
# Capitals, underscores and small slips need no entry.
LIST_KEYS = {
    "training": "train tr trainset trainingset traindata trainingdata trainfiles",
    "validation": "val valid validate validating dev valset validset validationset valdata "
    "validationdata valfiles",
    "test": "testing ts testset testdata testfiles",
    "labels": "label labelnames classes classnames",
    "regions_class_order": "regionsorder regionorder classorder regionclassorder",
    "modality": "channelnames",
    "modalities": "",
    "swap": "swaps swaplabels swappairs",
    "tolerance_mm": "tolerance tolerances tolerancesmm nsdtolerance",
}
ITEM_KEYS = {
    "image": "img imgs imagepath imagefile imagefiles",
    "label": "lbl labelpath labelfile",
    "modality": "modalities",
    "intensity": "intensities normalization normalisation",
    "subject": "subjectid subj sub patient patientid pid participant participantid",
    "fold": "foldid foldnumber cvfold",
}

# Keys that are understood, but belong to another part of the list: key -> that part.
AS_LABEL = '"labels", as {"255": "ignore"}'
AS_ITEM = "the items of the list"
AS_SPLIT = '"training", "validation" and "test", or "fold"'
MISPLACED_IN_LIST = {
    "ignore": AS_LABEL,
    "ignored": AS_LABEL,
    "ignorelabel": AS_LABEL,
    "ignoreindex": AS_LABEL,
    "subject": AS_ITEM,
    "subjects": AS_ITEM,
    "fold": AS_ITEM,
    "folds": AS_ITEM,
    "intensity": AS_ITEM,
    "image": AS_ITEM,
}
MISPLACED_IN_ITEM = {"split": AS_SPLIT, "partition": AS_SPLIT}

# Keys of Decathlon lists that are close to known ones, but not meant for them.
COUNTS = ("numTraining", "numTest", "numValidation")

CLOSE = 0.85  # of difflib's ratio: one slip in a word of five letters and more

# Bytes of a JSON file. A list of 100,000 volumes has a third of it. Objects in memory are up to 30
# times as large as their text.
LARGEST = 64 << 20

# Kinds of characters that no name has: control characters, halves of a character that is cut in
# two (surrogates), separators of lines and of paragraphs.
NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")
LONGEST = 255  # bytes of a file's name, on nearly all disks


# --- the file


def read_json(path: Path, kind: str = "a JSON data list") -> Any:
    """The content of a JSON file in UTF-8, with or without a byte-order mark; `kind` is in words.

    Raises InputError where the file is no JSON, is too large, or has a key twice in one object.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: not {kind} (no such file)")
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(f"{path}: has {size} bytes; JSON of more than {LARGEST} is not read")
        text = path.read_text(encoding="utf-8-sig")
        return from_json(text, object_pairs_hook=partial(object_of_unique_keys, path))
    except (OSError, ValueError) as error:  # no UTF-8, or no JSON
        raise InputError(f"{path}: not {kind} ({one_line(error)})") from error


# --- names and paths


class Root(NamedTuple):
    """Where the paths of a list start, and the folder that none of them leaves."""

    start: Path
    bound: Path | None  # None: any path is allowed


def root_of(data_root: str, own: Path) -> Root:
    """Of `--data-root`: none is the list's own folder; / allows all paths, and moves none."""
    if not data_root:
        return Root(own, own)
    folder = at_home(data_root, "--data-root")
    if os.path.normpath(folder) == os.sep:
        return Root(own, None)
    return Root(folder, folder)


def path_of(name: str, root: Root, where: str) -> Path:
    """The file of a list by its name in the list. Raises InputError where it may not lead there."""
    check_name(name, f"{where}: the path")
    path = root.start / at_home(name, where)
    for part in path.parts:
        if len(os.fsencode(part)) > LONGEST:
            raise InputError(f"{where}: the path {name[:40]}... has a name of over {LONGEST} bytes")

    if root.bound is not None and not lies_within(path, root.bound):
        raise InputError(
            f"{where}: {name} lies outside {root.bound.absolute()}; if the list may read there, "
            "add --data-root / (any path, from where it starts now), or --data-root FOLDER (its "
            "paths start from FOLDER and stay in it)"
        )
    return path


def at_home(name: str, where: str) -> Path:
    """A path with the folder that a ~ at its start stands for. Raises InputError without one."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{where}: {name}: there is no such user") from error


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a path stays in a folder.

    A link in the folder may lead anywhere: whoever made the folder put it there, and many data sets
    are folders of links. But after a link ".." is not the folder that the path names.
    """
    # The folder may be written with the links above it, or without.
    real = os.path.realpath(folder)
    plain = os.path.normpath(path.absolute())
    if not is_below(plain, os.path.normpath(folder.absolute())) and not is_below(plain, real):
        return False
    # The user's own ".." in --data or --data-root is not of the list.
    beyond = path.relative_to(folder) if path.is_relative_to(folder) else path
    return ".." not in beyond.parts or is_below(os.path.realpath(path), real)


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def check_name(name: str, what: str) -> None:
    """Raises InputError where a name is not one line of text."""
    for character in name:
        if unicodedata.category(character) in NOT_IN_NAMES:
            raise InputError(
                f"{what} {name[:100]!a} has the character {character!a}; "
                "names are one line of text: rename it"
            )


def same_name(name: str) -> str:
    """A name as it is compared: without spaces around it, and with one code for an umlaut."""
    return unicodedata.normalize("NFC", name).strip()


def object_of_unique_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys and values of one object in the file. Python itself keeps the last of equal keys."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise InputError(
                f'{path}: the key "{key}" is there twice in one object; keep one of them'
            )
        content[key] = value
    return content


def check_keys(
    keys: Collection[str],
    known: Mapping[str, str],
    where: str,
    misplaced: Mapping[str, str] | None = None,
) -> None:
    """Raises InputError for an unknown key that was probably meant as a known one; names both."""
    for key in keys:
        if key in known or key in COUNTS:
            continue

        part = (misplaced or {}).get(plain(key))
        if part:
            raise InputError(f'{where}: "{key}" is not read here; it belongs into {part}')

        # Where the known key is there too, the other one may well be about something else,
        # unless they differ by capitals and underscores alone.
        meant = probably_meant(key, known)
        if meant and (meant not in keys or plain(meant) == plain(key)):
            raise InputError(
                f'{where}: "{key}" is not read; "{meant}" was probably meant: '
                "rename it, or remove it"
            )


def probably_meant(key: str, known: Mapping[str, str]) -> str | None:
    """The known key that is written like this one, or None."""
    word = plain(key)
    names = {plain(name): name for name in known}
    if word in names:
        return names[word]

    for name, variants in known.items():
        if word in variants.split():
            return name

    close = difflib.get_close_matches(word, list(names), n=1, cutoff=CLOSE)
    return names[close[0]] if close else None


def plain(key: str) -> str:
    """Letters and digits alone, in small letters: "Patient_ID" -> "patientid"."""
    return re.sub(r"[^a-z0-9]", "", key.lower())


def strings(value: Any) -> list[str]:
    """One value or a list of them as strings: "ct" -> ["ct"], None -> []."""
    if isinstance(value, list):
        return [str(element) for element in value]
    return [str(value)] if value else []


def channel_names(channels: Any) -> list[str]:
    """The names of channels in their order, by number or as a list.

    {"1": "T2", "0": "FLAIR"} -> ["FLAIR", "T2"], as Decathlon and nnU-Net name the channels of all
    their images.
    """
    if not isinstance(channels, dict):
        return strings(channels)
    return [str(channels[key]) for key in sorted(channels, key=channel_number)]


def channel_number(key: str) -> int:
    return int(key) if str(key).isdigit() else 0
