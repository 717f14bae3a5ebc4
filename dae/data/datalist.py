"""Data lists: which volumes there are, what each is, and which are held out.

A list is a JSON file, Decathlon style, with paths relative to its own folder, which they do not
leave unless --data-root says so:

    {"training": [{"image": "a.nii.gz", "modality": "ct", "subject": "s1", "label": "b.nii.gz",
                   "fold": 0}, ...],
     "validation": [...], "test": [...],
     "labels": {"0": "background", "1": "spleen"},
     "modalities": {"pet": "zscore"}}

An image may be a list of files, its channels. `modality` is required: nothing is guessed from a
path. A label by the name "ignore" is no class: it marks what was not annotated. Where a name in
"labels" has a list of labels, the task is one of regions (regions.py). `tolerance_mm` gives
classes, by number or by name, their own tolerance of NSD: {"1": 2.0, "liver": 3.0}. An nnU-Net raw
folder (nnunet.py) may be given instead of a list.

Keys that are about something else are left alone; one that is almost a known one is refused
(listfile.py).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from dae.data import nnunet
from dae.data.listfile import (
    ITEM_KEYS,
    LIST_KEYS,
    MISPLACED_IN_ITEM,
    MISPLACED_IN_LIST,
    Root,
    at_home,
    channel_names,
    check_keys,
    check_name,
    path_of,
    plain,
    read_json,
    root_of,
    same_name,
    strings,
)
from dae.data.nnunet import Split
from dae.data.regions import (
    Region,
    check_order,
    mirrored,
    names_of_labels,
    numbered,
    regions_of,
)
from dae.errors import InputError

# Each modality and the way its intensities are normalised (preprocess.py); a list may declare
# others. The first five are in the order of the authors' class labels, on which --cmcl ranks
# depends.
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

# How intensities are normalised: `preprocess.NORMALISERS`, and two that flags decide (--ct-window,
# --mr-intensity).
INTENSITIES = ("window", "mr", "zscore", "nonzero", "percentile", "zscore_all", "minmax", "none")

# How people write the name of the label that is no class.
IGNORE = ("ignore", "ignored", "ignorelabel", "ignoreindex")

# A fingerprint of contents begins so; those of older versions were of names and sizes of files.
BY_VOXELS = "voxels "


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

    # Where the item is a single channel: which of how many channels of the file.
    channel: tuple[int, int] | None = None

    # Whether the list names the subject; else the image is taken for a subject of its own.
    subject_named: bool = True

    @property
    def modality_name(self) -> str:
        """The modality as one name, which CMCL compares."""
        return "+".join(self.modality)


@dataclass(frozen=True)
class DataList:
    """The items of a list, and what it says of labels."""

    training: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    labels: dict[int, str]

    # Labels that change places in a left-right flip; None where the list does not say.
    swap: tuple[tuple[int, int], ...] | None = None

    # Tolerance of NSD in mm, of classes that have their own.
    tolerance: dict[int, float] = field(default_factory=dict)

    # The label of what was not annotated, which is not among `labels`.
    ignore: int | None = None

    # Unions of labels, in place of classes. `labels` then names each label by its last region.
    regions: tuple[Region, ...] = ()

    # Names without a label, which pre-training need not know.
    unnumbered: tuple[str, ...] = ()

    # Of nnU-Net's splits_final.json: the subjects of each fold.
    splits: tuple[Split, ...] = ()

    # Of an nnU-Net folder: each case is a subject, and a patient may have several cases.
    names_cases: bool = False

    # What was decided about the list, for the user.
    notes: tuple[str, ...] = field(default=(), compare=False)

    def fingerprint(
        self,
        training: Sequence[Content],
        validation: Sequence[Content] = (),
        *,
        labels: bool = False,
    ) -> str:
        """Of what is trained and validated on, in order, whatever the files' folders and names.

        `training` and `validation` are what the files hold, in the order in which they are used.
        """
        intensities = [intensities_of(self.training), intensities_of(self.validation)]
        content: list[Any] = [intensities, training, validation]
        if labels:
            content += [sorted(self.labels.items()), self.swap or (), self.ignore]
        if labels and self.regions:
            content.append(self.regions)
        return BY_VOXELS + short_hash(content)

    def fingerprint_by_size(self, *, labels: bool = False) -> str:
        """As older versions wrote it, by names and sizes of files: to resume a run of theirs."""
        items = (*self.training, *self.validation)
        content: list[Any] = []
        for item in items:
            content.append([names_and_sizes(item.image), item.modality, item.intensity])
        if labels:
            content += [names_and_sizes([item.label]) for item in items if item.label]
            content += [sorted(self.labels.items()), self.swap or (), self.ignore]
        return short_hash(content)

    def modalities(self) -> list[str]:
        """Every modality of the list: the known ones in their fixed order, then others by name."""
        names = {item.modality_name for item in (*self.training, *self.validation)}
        known = [name for name in MODALITIES if name in names]
        return known + sorted(names.difference(MODALITIES))


def intensities_of(items: Sequence[Item]) -> list[Any]:
    return [(item.modality, item.intensity) for item in items]


def names_and_sizes(paths: Sequence[Path]) -> list[Any]:
    """The name and the size in bytes of each file; 0 where there is none."""
    described = []
    for path in paths:
        size = path.stat().st_size if path.is_file() else 0
        described.append([path.name, size])
    return described


def short_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


# --- channels as items


def split_channels(items: DataList) -> DataList:
    """Each channel of every image as an item of its own.

    It is for pre-training on single channels of what is fine-tuned on all of them. A file of
    several channels is split where the list names a modality for each of them.
    """
    return replace(
        items,
        training=channels_of(items.training),
        validation=channels_of(items.validation),
        test=channels_of(items.test),
    )


def channels_of(items: Sequence[Item]) -> tuple[Item, ...]:
    channels: list[Item] = []
    for item in items:
        channels += channels_of_item(item)
    return tuple(channels)


def channels_of_item(item: Item) -> list[Item]:
    """One item for each file of the image, or for each channel of its only file."""
    in_one_file = len(item.image) == 1
    count = max(len(item.image), len(item.modality))
    files = item.image * count if in_one_file else item.image

    channels = []
    for n, file in enumerate(files):
        single = replace(
            item,
            image=(file,),
            # One modality, or intensity, may be that of all channels.
            modality=(item.modality[n % len(item.modality)],),
            intensity=(item.intensity[n % len(item.intensity)],),
            channel=(n, count) if in_one_file else (0, 1),
        )
        channels.append(single)
    return channels


# --- a list is read


class Head(NamedTuple):
    """What a list says for all of its items."""

    root: Root  # of their paths
    modality: list[str]  # of items that do not name their own
    intensities: dict[str, str]  # of every modality that may be named


def load(data: str, *, root: str = "", modality: str = "") -> DataList:
    """Read a list or an nnU-Net raw folder. Raises InputError.

    `root` is the folder that paths start from and do not leave, if not the list's own; "/" lets
    them lead anywhere. `modality` is for items that do not name one.
    """
    path = at_home(data, "--data")
    if not data or not path.exists():
        raise InputError(
            f"--data {data or '(none)'}: no such file; "
            "give a data list (JSON) or an nnU-Net raw folder"
        )
    is_nnunet = path.is_dir()
    content = nnunet.content_of(path) if is_nnunet else content_of_list(path)

    # The files of a raw folder are those that lie in it, wherever the paths of lists start.
    own = Root(path, path) if is_nnunet else root_of(root, path.parent)
    head = head_of(content, path, root=own, modality=modality)

    training = items_of(content, "training", path, head)
    validation = items_of(content, "validation", path, head)
    test = items_of(content, "test", path, head)
    if not training:
        raise InputError(f"{path}: no training items")
    check_one_fold(training, path)

    # A label by the name "ignore" marks what was not annotated, and is no class.
    entries = entries_of(object_in(content, "labels", path))
    names = labels_of(entries, path)
    labels = {label: name for label, name in names.items() if name != "ignore"}
    ignored = [label for label, name in names.items() if name == "ignore"]

    # Where a name has a list of labels, all names but the background's are of regions.
    regions: tuple[Region, ...] = ()
    unnumbered = tuple(name for name, value in entries if not is_whole(value))
    if any(isinstance(value, list) for _, value in entries):
        regions = regions_of(entries, content.get("regions_class_order"), path)
        background = {label: name for label, name in labels.items() if label == 0}
        labels = background | names_of_labels(regions)
        unnumbered = ()

    swap = pairs_of(content["swap"], labels, path) if "swap" in content else None
    tolerances = object_in(content, "tolerance_mm", path)
    tolerance = tolerance_of(tolerances, labels, path, regions=numbered(regions))

    # nnU-Net has the folds in a file of their own, and not at the items.
    splits = nnunet.splits_of(path) if is_nnunet else ()
    check_splits(splits, training, path)
    return DataList(
        training,
        validation,
        test,
        labels=labels,
        swap=swap,
        tolerance=tolerance,
        ignore=ignored[0] if ignored else None,
        regions=regions,
        unnumbered=unnumbered,
        splits=splits,
        names_cases=is_nnunet,
    )


def check_all_labelled(items: DataList, data: str) -> None:
    """Raises InputError unless there are classes, and a label for every item but those to test."""
    for item in (*items.training, *items.validation):
        if item.label is None:
            raise InputError(f'{item.image[0]}: has no "label" in {data}')

    if items.unnumbered:
        raise InputError(
            f'{data}: "labels" gives {items.unnumbered[0]!r} no number of its own; '
            "name single labels, or lists of them"
        )
    check_order(items.regions, data)
    mirrored(items.regions, items.swap or (), data)  # a flip turns every region into one
    if len(items.labels) < 2 or min(items.labels) != 0 or max(items.labels) > 255:
        raise InputError(
            f'{data}: "labels" must name the background, 0, and at least one class, none above 255'
        )


def check_channel_order(items: DataList) -> None:
    """Raises InputError where two images have the same channels in another order: a network takes
    the first channel of each for the same contrast.
    """
    first_with: dict[tuple[str, ...], Item] = {}
    for item in (*items.training, *items.validation):
        first = first_with.setdefault(tuple(sorted(item.modality)), item)
        if first.modality != item.modality:
            raise InputError(
                f"{item.image[0]}: its channels are {', '.join(item.modality)}, and those of "
                f"{first.image[0]} {', '.join(first.modality)}; name all in one order"
            )


def content_of_list(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: a data list is an object with a "training" list in it')
    check_keys(content, LIST_KEYS, str(path), MISPLACED_IN_LIST)
    return content


def head_of(content: Mapping[str, Any], path: Path, *, root: Root, modality: str) -> Head:
    # Declared modalities come after the known ones, and may normalise a known one differently.
    intensities = dict(MODALITIES)
    for name, intensity in object_in(content, "modalities", path).items():
        check_name(name, f"{path}: the modality")
        intensities[str(name).lower()] = str(intensity)

    unknown = sorted(set(intensities.values()) - set(INTENSITIES))
    if unknown:
        raise InputError(f"{path}: {unknown_intensity(unknown[0])}")

    usual = [modality] if modality else channel_names(content.get("modality"))
    return Head(root, usual, intensities)


def object_in(content: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    value = content.get(name, {})
    if not isinstance(value, dict):
        raise InputError(f'{path}: "{name}" must be an object')
    return value


def unknown_intensity(name: str) -> str:
    return f"intensity {name!r} is not one of {', '.join(INTENSITIES)}"


# --- items


def items_of(content: Mapping[str, Any], name: str, path: Path, head: Head) -> tuple[Item, ...]:
    """The items of "training", "validation" or "test"."""
    entries = content.get(name, [])
    if not isinstance(entries, list):
        raise InputError(f'{path}: "{name}" must be a list')

    items = [item_of(entry, f"{path}: {name}[{n}]", head) for n, entry in enumerate(entries)]
    check_files_once(items, f"{path}: {name}")
    return tuple(items)


def item_of(entry: Any, where: str, head: Head) -> Item:
    if isinstance(entry, str):
        entry = {"image": entry}  # a bare name of a file
    if isinstance(entry, dict):
        check_keys(entry, ITEM_KEYS, where, MISPLACED_IN_ITEM)
    if not isinstance(entry, dict) or not entry.get("image"):
        raise InputError(f'{where}: has no "image"')

    # One file, or a list of them: the channels.
    files = strings(entry["image"])
    check_texts(entry["image"], f"{where}: image")
    image = tuple(path_of(file, head.root, where) for file in files)
    named = strings(entry.get("modality")) or head.modality
    if not named:
        raise InputError(
            f'{where} ({image[0].name}): no "modality"; '
            "name it in the list, or all at once by --modality"
        )

    modality = modality_of(named, where, head)
    intensity = intensity_of(entry.get("intensity"), modality, where, head)

    fold = entry.get("fold")
    if not (fold is None or type(fold) is int):
        raise InputError(f"{where}: fold {fold!r} is not a whole number")
    label = entry.get("label")
    if not (label is None or isinstance(label, str)):
        raise InputError(f"{where}: label {label!r} is not the name of a file")
    label_file = path_of(label, head.root, where) if label else None

    # Without a name each image is taken for a subject of its own.
    is_named = entry.get("subject") is not None
    return Item(
        image,
        modality,
        intensity,
        subject=subject_of(entry["subject"], where) if is_named else files[0],
        fold=fold,
        label=label_file,
        subject_named=is_named,
    )


def subject_of(value: Any, where: str) -> str:
    """The name of a subject. Raises InputError for what is none.

    A space at its end, or another way to store an umlaut, does not make another patient.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{where}: subject {value!r} is not a name; leave it out, or write a text")
    check_name(str(value), f"{where}: the subject")
    name = same_name(str(value))
    if not name:
        raise InputError(f"{where}: the subject is empty; leave it out, or name it")
    return name


def check_texts(value: Any, where: str) -> None:
    """Raises InputError for what is neither a text nor a list of texts."""
    values = value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str) or not one:
            raise InputError(f"{where}: {str(one)[:40]!r} is not the name of a file")


def modality_of(named: Sequence[str], where: str, head: Head) -> tuple[str, ...]:
    """The modalities in our names, T1w as t1. Raises InputError for an unknown one."""
    # A name that the list declares is never an alias.
    names = []
    for name in map(str.lower, named):
        names.append(name if name in head.intensities else ALIASES.get(name, name))

    for name in names:
        if name not in head.intensities:
            raise InputError(
                f"{where}: unknown modality {name!r}; known: {', '.join(head.intensities)}; "
                f'the list may declare others: "modalities": {{"{name}": "zscore"}}'
            )
    return tuple(names)


def intensity_of(named: Any, modality: Sequence[str], where: str, head: Head) -> tuple[str, ...]:
    """The intensities that the item names, else those of its modalities."""
    if not named:
        return tuple(head.intensities[name] for name in modality)

    intensity = strings(named)
    for name in intensity:
        if name not in INTENSITIES:
            raise InputError(f"{where}: {unknown_intensity(name)}")
    return tuple(intensity)


def check_files_once(items: Sequence[Item], where: str) -> None:
    """Raises InputError where a file is there twice in one split, as an image or as a channel."""
    first_with: dict[str, int] = {}
    for n, item in enumerate(items):
        for file in item.image:
            first = first_with.setdefault(os.path.normpath(file), n)
            # With another item, or as two channels of this one.
            if first != n or item.image.count(file) > 1:
                raise InputError(
                    f"{where}[{first}] and [{n}] are the same file {file}; remove one of them"
                )


def check_one_fold(items: Sequence[Item], path: Path) -> None:
    """Raises InputError where items of one subject have different folds."""
    first_of: dict[str, Item] = {}
    for item in items:
        first = first_of.setdefault(item.subject, item)
        if first.fold != item.fold:
            raise InputError(
                f"{path}: subject {item.subject} is in two folds: "
                f"{first.image[0].name} in {fold_in_words(first)}, "
                f"{item.image[0].name} in {fold_in_words(item)}; give all its items one fold"
            )


def fold_in_words(item: Item) -> str:
    return "none" if item.fold is None else f"fold {item.fold}"


def check_splits(splits: Sequence[Split], training: Sequence[Item], path: Path) -> None:
    """Raises InputError where splits_final.json names a case that the folder does not have."""
    subjects = {item.subject for item in training}
    for n, (train, val) in enumerate(splits):
        unknown = sorted((train | val) - subjects)
        if unknown:
            raise InputError(
                f"{path}: splits_final.json, fold {n}: case {unknown[0]} is not in imagesTr"
            )


# --- labels


def entries_of(labels: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and value of each label; the value is an int where it is a whole number.

    {"1": "spleen"} as in Decathlon lists, or {"spleen": 1} as in nnU-Net's.
    """
    entries: list[tuple[str, Any]] = []
    for key, value in labels.items():
        # Whichever of the two is the number: the key in Decathlon lists, the value in nnU-Net's.
        # A list is that of a region, whose name may be a number as well.
        is_decathlon = is_whole(key) and not isinstance(value, list)
        number, name = (key, value) if is_decathlon else (value, key)
        entries.append((str(name), int(number) if is_whole(number) else number))
    return entries


def labels_of(entries: Sequence[tuple[str, Any]], path: Path) -> dict[int, str]:
    """The name of each label that has one of its own. Raises InputError on two names of one."""
    named = [(value, name) for name, value in entries if is_whole(value)]
    for name, value in entries:
        check_label_name(value, name, named, path)
    check_names_once(named, path)
    return dict(named)


def check_label_name(label: Any, name: str, named: Sequence[tuple[int, str]], path: Path) -> None:
    """Raises InputError for a name that was meant to be "ignore", and two names of one label."""
    check_name(name, f'{path}: "labels": the name')
    if plain(name) in IGNORE and name != "ignore":
        raise InputError(
            f'{path}: "labels" calls {label} "{name}", which would be a class; '
            '"ignore" was probably meant: write it so, or rename the class'
        )
    for number, other in named:
        if number == label and other != name:
            raise InputError(
                f'{path}: "labels" has two names for {label}: "{name}" and "{other}"; keep one'
            )


def check_names_once(named: Sequence[tuple[int, str]], path: Path) -> None:
    """Raises InputError where two labels have one name."""
    times = Counter(name for _, name in named)
    for repeated in times:
        if times[repeated] > 1:
            numbers = [label for label, name in named if name == repeated]
            raise InputError(
                f'{path}: "labels" gives the name "{repeated}" to {numbers[0]} and {numbers[1]}; '
                "scores are told apart by name: give each its own"
            )


def tolerance_of(
    written: Mapping[str, Any],
    labels: Mapping[int, str],
    path: Path,
    *,
    regions: Mapping[int, str] = {},
) -> dict[int, float]:
    """Tolerances in mm by label, of an object that names classes by number or by name.

    Where there are `regions`, by the number of a region, of an object that has their names.
    """
    # A class may be named as it is, or by its number as JSON has it, in quotes.
    by_name = {name: label for label, name in labels.items()}
    by_number = {str(label): label for label in labels}
    numbers = by_name | by_number
    if regions:
        numbers = {name: number for number, name in regions.items()}

    tolerance = {}
    for key, mm in written.items():
        if not numbers.get(key):  # unknown, or 0, the background
            raise InputError(
                f'{path}: "tolerance_mm" names {key!r}, which is no class of its "labels"'
            )
        if not isinstance(mm, int | float) or not 0 <= mm < inf:
            raise InputError(
                f'{path}: "tolerance_mm" of {key!r} is {mm!r}; it must be 0 mm or more'
            )
        tolerance[numbers[key]] = float(mm)
    return tolerance


def pairs_of(swap: Any, labels: Mapping[int, str], path: Path) -> tuple[tuple[int, int], ...]:
    """The pairs of labels that change places. Raises InputError where they are no such pairs."""
    try:
        pairs = tuple((int(a), int(b)) for a, b in swap)
    except (TypeError, ValueError, OverflowError) as error:  # or infinity
        raise InputError(
            f'{path}: "swap" must be a list of pairs of labels, as [[2, 3]]'
        ) from error

    # A list without labels may still be pre-trained on: then any label may be named.
    for label, times in Counter(chain.from_iterable(pairs)).items():
        if labels and (label not in labels or label == 0):
            raise InputError(f'{path}: "swap" names {label}, which is no class of its "labels"')
        if times > 1:
            raise InputError(
                f'{path}: "swap" has {label} in two places; a label changes places with one other'
            )
    return pairs


def is_whole(value: Any) -> bool:
    # No label has more digits, and Python reads no number of thousands of them.
    return re.fullmatch(r"-?\d{1,18}", str(value)) is not None
