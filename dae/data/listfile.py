"""A JSON file that a person wrote: read as it is, and refused where a part of it would be passed over in silence.

A data list decides who is trained on. A key that is written a little differently, or twice, would change that without
an error, so both are refused by name. Keys that are about something else (`description`, `licence`) are left alone.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dae.errors import InputError

# For each of our keys, what people write for it. Capitals, underscores and small slips need no entry.
LIST_KEYS: dict[str, tuple[str, ...]] = {
    "training": (
        "train",
        "tr",
        "trainset",
        "trainingset",
        "traindata",
        "trainingdata",
        "trainfiles",
    ),
    "validation": (
        "val",
        "valid",
        "validate",
        "validating",
        "dev",
        "valset",
        "validset",
        "validationset",
        "valdata",
        "validationdata",
        "valfiles",
    ),
    "test": ("testing", "ts", "testset", "testdata", "testfiles"),
    "labels": ("label", "labelnames", "classes", "classnames"),
    "modality": ("channelnames",),
    "modalities": (),
    "swap": ("swaps", "swaplabels", "swappairs"),
    "tolerance_mm": ("tolerance", "tolerances", "tolerancesmm", "nsdtolerance"),
}
ITEM_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("img", "imgs", "imagepath", "imagefile", "imagefiles"),
    "label": ("lbl", "labelpath", "labelfile"),
    "modality": ("modalities",),
    "intensity": ("intensities", "normalization", "normalisation"),
    "subject": (
        "subjectid",
        "subj",
        "sub",
        "patient",
        "patientid",
        "pid",
        "participant",
        "participantid",
    ),
    "fold": ("foldid", "foldnumber", "cvfold"),
}
# Keys that are understood, but stand in another place: key -> where they belong.
MISPLACED_IN_LIST = {
    **dict.fromkeys(
        ("ignore", "ignored", "ignorelabel", "ignoreindex"), '"labels", as {"255": "ignore"}'
    ),
    **dict.fromkeys(
        ("subject", "subjects", "fold", "folds", "intensity", "image"), "the items of the list"
    ),
}
MISPLACED_IN_ITEM = dict.fromkeys(
    ("split", "partition"), '"training", "validation" and "test", or "fold"'
)
COUNTS = (
    "numTraining",
    "numTest",
    "numValidation",
)  # of Decathlon lists: near to our keys, but not meant for them
CLOSE = 0.85  # of difflib's ratio: one slip in a word of five letters and more


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte-order mark.

    Raises InputError where the file is no JSON, or has a key twice in one object.
    """

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise InputError(
                    f'{path}: the key "{key}" is there twice in one object; keep one of them'
                )
            content[key] = value
        return content

    try:
        return json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repetition
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON data list ({error})") from error


def check_keys(
    keys: Collection[str],
    ours: Mapping[str, Sequence[str]],
    where: str,
    misplaced: Mapping[str, str] | None = None,
) -> None:
    """Raises InputError for a key that is not ours but was probably meant to be; names both."""
    for key in keys:
        if key in ours or key in COUNTS:
            continue
        if place := (misplaced or {}).get(plain(key)):
            raise InputError(f'{where}: "{key}" is not read here; it belongs into {place}')
        meant = meant_by(key, ours)
        # Where the right key is there too, the other one may well be about something else.
        if meant and (meant not in keys or plain(meant) == plain(key)):
            raise InputError(
                f'{where}: "{key}" is not read; "{meant}" was probably meant: rename it, or remove it'
            )


def meant_by(key: str, ours: Mapping[str, Sequence[str]]) -> str | None:
    """Which of our keys is written like this one, or None."""
    word = plain(key)
    known = {plain(name): name for name in ours}
    others = {other: name for name, written in ours.items() for other in written}
    if word in known or word in others:
        return known.get(word) or others[word]
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=CLOSE)
    return known[near[0]] if near else None


def several(value: Any) -> list[str]:
    """ "ct" -> ["ct"], and a list as it is; nothing -> []."""
    if isinstance(value, list):
        return [str(one) for one in value]
    return [str(value)] if value else []


def in_order(channels: Any) -> list[str]:
    """{"1": "T2", "0": "FLAIR"}, as Decathlon and nnU-Net name the channels of all their images -> ["FLAIR", "T2"]."""
    if not isinstance(channels, dict):
        return several(channels)
    return [
        str(channels[key])
        for key in sorted(channels, key=lambda key: int(key) if str(key).isdigit() else 0)
    ]


def plain(key: str) -> str:
    """Letters and digits alone, in small letters: "Patient_ID" -> "patientid"."""
    return re.sub(r"[^a-z0-9]", "", key.lower())
