"""Data lists: which volumes there are, what each is, and which are held out.

A list is a JSON file, Decathlon style, with paths relative to its own folder:

    {"training": [{"image": "a.nii.gz", "modality": "ct", "subject": "s1", "label": "b.nii.gz", "fold": 0}, ...],
     "validation": [...], "test": [...], "labels": {"0": "background", "1": "spleen"}, "modalities": {"pet": "zscore"}}

An image may be a list of files, its channels. `modality` is required: nothing is guessed from a path. A label by the
name "ignore" is no class: it marks what was not annotated. `tolerance_mm` gives classes, by number or by name, their
own tolerance of NSD: {"1": 2.0, "liver": 3.0}. Instead of a list an nnU-Net raw folder (nnunet.py) may be given.

Keys that are about something else are left alone; one that is almost ours is refused (listfile.py). Who is held out is
drawn by a hash of the subject's name, so that neither the order of the list nor a subject that joins it turns the
folds over.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from dae.data import nnunet
from dae.data.listfile import (
    ITEM_KEYS,
    LIST_KEYS,
    MISPLACED_IN_ITEM,
    MISPLACED_IN_LIST,
    check_keys,
    in_order,
    plain,
    read_json,
    several,
)
from dae.data.nnunet import Split
from dae.errors import InputError

# Each modality and the way its intensities are normalised (preprocess.py); a list may declare others.
# The first five stand in the order of the authors' class labels, which --cmcl ranks depends on.
MODALITIES = {
    "ct": "window",
    "t1": "mr",
    "t1ce": "mr",
    "t2": "mr",
    "flair": "mr",
    "t2s": "mr",
    "pd": "mr",
    "mr": "mr",
}

ALIASES = {
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t1w": "t1",
    "t2w": "t2",
    "t2*": "t2s",
    "t2f": "flair",
    "mri": "mr",
}

INTENSITIES = ("window", "mr", "zscore", "nonzero", "percentile", "zscore_all", "minmax", "none")

BY_VOXELS = (
    "voxels "  # begins a fingerprint of contents; those of older versions were of names and sizes
)


class Content(NamedTuple):
    """What the files of an item hold, as hashes of their voxels (`leaks.hash_of`)."""

    image: tuple[str, ...]  # one for each channel
    label: str  # empty where there is none
    spacing: tuple[float, ...]  # mm, of the file


@dataclass(frozen=True)
class Item:
    """One image of the list."""

    image: tuple[Path, ...]  # one file, or one per channel
    modality: tuple[str, ...]  # of the whole image, or of each channel
    intensity: tuple[str, ...]  # as modality
    subject: str
    fold: int | None = None
    label: Path | None = None
    channel: tuple[int, int] | None = (
        None  # which of how many of the file's, where the item is one alone
    )
    subject_named: bool = True  # by the list; else the image is taken for a subject of its own

    @property
    def modality_name(self) -> str:
        """The modality as one name, which CMCL compares."""
        return "+".join(self.modality)


@dataclass(frozen=True)
class DataList:
    training: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    labels: dict[int, str]
    swap: tuple[tuple[int, int], ...] | None = (
        None  # labels that change places in a left-right flip; None: not said
    )
    tolerance: dict[int, float] = field(
        default_factory=dict
    )  # of NSD in mm, of classes with their own
    ignore: int | None = None  # the label of what was not annotated, which is not among `labels`
    regions: tuple[
        str, ...
    ] = ()  # names of several labels at once, which pre-training need not know
    splits: tuple[Split, ...] = ()  # of nnU-Net's splits_final.json: subjects of each fold
    notes: tuple[str, ...] = field(
        default=(), compare=False
    )  # what was decided about the list, for the user

    def fingerprint(
        self,
        training: Sequence[Content],
        validation: Sequence[Content] = (),
        *,
        labels: bool = False,
    ) -> str:
        """Of what is trained and validated on and in which order, wherever the files lie and whatever their names.

        `training` and `validation` are what was found in the files, in the order in which it is used.
        """
        how = [
            [(item.modality, item.intensity) for item in split]
            for split in (self.training, self.validation)
        ]
        content: list[Any] = [how, training, validation]
        if labels:
            content += [sorted(self.labels.items()), self.swap or (), self.ignore]
        return BY_VOXELS + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]

    def fingerprint_by_size(self, *, labels: bool = False) -> str:
        """As older versions wrote it, by names and sizes of files: to go on with a run of theirs."""

        def facts(paths: Sequence[Path]) -> list[Any]:
            return [[path.name, path.stat().st_size if path.is_file() else 0] for path in paths]

        used = (*self.training, *self.validation)
        content: list[Any] = [[facts(item.image), item.modality, item.intensity] for item in used]
        if labels:
            content += [facts([item.label]) for item in used if item.label]
            content += [sorted(self.labels.items()), self.swap or (), self.ignore]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]

    def modalities(self) -> list[str]:
        """Every modality of the list: the known ones in their fixed order, then others by name."""
        known = {name: n for n, name in enumerate(MODALITIES)}
        found = {item.modality_name for item in (*self.training, *self.validation)}
        return sorted(found, key=lambda kind: (known.get(kind, len(known)), kind))


def load(data: str, *, root: str = "", modality: str = "") -> DataList:
    """Read a list or an nnU-Net raw folder. `modality` is for items that do not name one. Raises InputError."""
    path = Path(data).expanduser()
    if not data or not path.exists():
        raise InputError(
            f"--data {data or '(none)'}: no such file; give a data list (JSON) or an nnU-Net raw folder"
        )
    content = nnunet.content_of(path) if path.is_dir() else _json(path)
    folder = Path(root).expanduser() if root else (path if path.is_dir() else path.parent)
    declared = {
        **MODALITIES,
        **{str(k).lower(): str(v) for k, v in _object(content, "modalities", path).items()},
    }
    usual = [modality] if modality else in_order(content.get("modality"))
    if wrong := sorted(set(declared.values()) - set(INTENSITIES)):
        raise InputError(f"{path}: intensity {wrong[0]!r} is not one of {', '.join(INTENSITIES)}")

    def items_of(name: str) -> tuple[Item, ...]:
        entries = _entries(content, name, path)
        items = [
            _item(entry, f"{path}: {name}[{n}]", folder, usual, declared)
            for n, entry in enumerate(entries)
        ]
        _check_files_once(items, f"{path}: {name}")
        return tuple(items)

    training, validation, test = items_of("training"), items_of("validation"), items_of("test")
    if not training:
        raise InputError(f"{path}: no training items")
    _check_one_fold(training, path)

    labels, regions = _labels(_object(content, "labels", path), path)
    ignore = next((label for label, name in labels.items() if name == "ignore"), None)
    labels = {label: name for label, name in labels.items() if label != ignore}
    items = DataList(
        training,
        validation,
        test,
        labels=labels,
        swap=_pairs(content["swap"], labels, path) if "swap" in content else None,
        tolerance=_tolerance(_object(content, "tolerance_mm", path), labels, path),
        ignore=ignore,
        regions=regions,
        splits=nnunet.splits_of(path) if path.is_dir() else (),
    )
    _check_splits(items, path)
    return items


def check_labels(items: DataList, data: str) -> None:
    """Raises InputError unless there are classes, and a label for everything that is trained or validated on."""
    for item in (*items.training, *items.validation):
        if item.label is None:
            raise InputError(f'{item.image[0]}: has no "label" in {data}')
    if items.regions:
        raise InputError(
            f'{data}: "labels" gives {items.regions[0]!r} no number of its own; name single labels'
        )
    if len(items.labels) < 2 or min(items.labels) != 0 or max(items.labels) > 255:
        raise InputError(
            f'{data}: "labels" must name the background, 0, and at least one class, none above 255'
        )


def _json(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: a data list is an object with a "training" list in it')
    check_keys(content, LIST_KEYS, str(path), MISPLACED_IN_LIST)
    return content


def _entries(content: Mapping[str, Any], name: str, path: Path) -> Sequence[Any]:
    entries = content.get(name, [])
    if not isinstance(entries, list):
        raise InputError(f'{path}: "{name}" must be a list')
    return entries


def _object(content: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    value = content.get(name, {})
    if not isinstance(value, dict):
        raise InputError(f'{path}: "{name}" must be an object')
    return value


def _item(
    entry: Any, where: str, folder: Path, usual: list[str], declared: Mapping[str, str]
) -> Item:
    if isinstance(entry, str):
        entry = {"image": entry}
    if isinstance(entry, dict):
        check_keys(entry, ITEM_KEYS, where, MISPLACED_IN_ITEM)
    if not isinstance(entry, dict) or not entry.get("image"):
        raise InputError(f'{where}: has no "image"')
    files = several(entry["image"])
    image = tuple(folder / Path(file).expanduser() for file in files)
    named = several(entry.get("modality")) or usual
    if not named:
        raise InputError(
            f'{where} ({image[0].name}): no "modality"; name it in the list, or all at once by --modality'
        )
    names = [name.lower() for name in named]
    kinds = tuple(name if name in declared else ALIASES.get(name, name) for name in names)
    if unknown := [kind for kind in kinds if kind not in declared]:
        raise InputError(
            f"{where}: unknown modality {unknown[0]!r}; known: {', '.join(declared)}; the list may declare others: "
            f'"modalities": {{"{unknown[0]}": "zscore"}}'
        )
    intensity = tuple(several(entry.get("intensity") or [declared[kind] for kind in kinds]))
    if wrong := [name for name in intensity if name not in INTENSITIES]:
        raise InputError(f"{where}: intensity {wrong[0]!r} is not one of {', '.join(INTENSITIES)}")
    label, fold = entry.get("label"), entry.get("fold")
    if not (fold is None or type(fold) is int):
        raise InputError(f"{where}: fold {fold!r} is not a whole number")
    if not (label is None or isinstance(label, str)):
        raise InputError(f"{where}: label {label!r} is not the name of a file")
    named_subject = entry.get("subject")
    subject = str(files[0] if named_subject is None else named_subject)
    return Item(
        image,
        kinds,
        intensity,
        subject,
        fold,
        folder / label if label else None,
        subject_named=named_subject is not None,
    )


def _check_files_once(items: Sequence[Item], where: str) -> None:
    """Raises InputError where a file is the image, or a channel, of two items of one split, or twice of one."""
    seen: dict[str, int] = {}
    for n, item in enumerate(items):
        for file in item.image:
            first = seen.setdefault(os.path.normpath(file), n)
            if first != n or item.image.count(file) > 1:
                raise InputError(
                    f"{where}[{first}] and [{n}] are the same file {file}; remove one of them"
                )


def _check_one_fold(items: Sequence[Item], path: Path) -> None:
    """Raises InputError where items of one subject have different folds."""
    first: dict[str, Item] = {}
    for item in items:
        other = first.setdefault(item.subject, item)
        if other.fold != item.fold:
            raise InputError(
                f"{path}: subject {item.subject} is in two folds: {other.image[0].name} in {_fold_in_words(other)}, "
                f"{item.image[0].name} in {_fold_in_words(item)}; give all its items one fold"
            )


def _fold_in_words(item: Item) -> str:
    return "none" if item.fold is None else f"fold {item.fold}"


def _check_splits(items: DataList, path: Path) -> None:
    """Raises InputError where splits_final.json names a case that the folder does not have."""
    subjects = {item.subject for item in items.training}
    for n, sides in enumerate(items.splits):
        if unknown := sorted(frozenset().union(*sides) - subjects):
            raise InputError(
                f"{path}: splits_final.json, fold {n}: case {unknown[0]} is not in imagesTr"
            )


def _labels(labels: Mapping[str, Any], path: Path) -> tuple[dict[int, str], tuple[str, ...]]:
    """{"1": "spleen"} as in Decathlon lists, or {"spleen": 1} as in nnU-Net's; and names that have no one number."""
    pairs = [(k, v) if _is_whole(k) else (v, k) for k, v in labels.items()]
    regions = tuple(str(name) for number, name in pairs if not _is_whole(number))
    named = [(int(number), str(name)) for number, name in pairs if _is_whole(number)]
    for label, name in named:
        if plain(name) in ("ignore", "ignored", "ignorelabel", "ignoreindex") and name != "ignore":
            raise InputError(
                f'{path}: "labels" calls {label} "{name}", which would be a class; "ignore" was probably meant: write '
                "it so, or rename the class"
            )
        if twice := [other for number, other in named if number == label and other != name]:
            raise InputError(
                f'{path}: "labels" has two names for {label}: "{name}" and "{twice[0]}"; keep one'
            )
    repeated = [name for name, times in Counter(name for _, name in named).items() if times > 1]
    if repeated:
        numbers = [label for label, name in named if name == repeated[0]]
        raise InputError(
            f'{path}: "labels" gives the name "{repeated[0]}" to {numbers[0]} and {numbers[1]}; scores are told apart '
            "by name: give each its own"
        )
    return dict(named), regions


def _tolerance(given: Mapping[str, Any], labels: Mapping[int, str], path: Path) -> dict[int, float]:
    numbers = {name: label for label, name in labels.items()} | {
        str(label): label for label in labels
    }
    for key, mm in given.items():
        if not numbers.get(key):
            raise InputError(
                f'{path}: "tolerance_mm" names {key!r}, which is no class of its "labels"'
            )
        if not isinstance(mm, int | float) or not 0 <= mm < inf:
            raise InputError(
                f'{path}: "tolerance_mm" of {key!r} is {mm!r}; it must be 0 mm or more'
            )
    return {numbers[key]: float(mm) for key, mm in given.items()}


def _pairs(swap: Any, labels: Mapping[int, str], path: Path) -> tuple[tuple[int, int], ...]:
    try:
        pairs = tuple((int(a), int(b)) for a, b in swap)
    except (TypeError, ValueError) as error:
        raise InputError(
            f'{path}: "swap" must be a list of pairs of labels, as [[2, 3]]'
        ) from error
    for label, times in Counter(label for pair in pairs for label in pair).items():
        if labels and (label not in labels or label == 0):
            raise InputError(f'{path}: "swap" names {label}, which is no class of its "labels"')
        if times > 1:
            raise InputError(
                f'{path}: "swap" has {label} in two places; a label changes places with one other'
            )
    return pairs


def _is_whole(value: Any) -> bool:
    return re.fullmatch(r"-?\d+", str(value)) is not None
