"""Data lists: which volumes there are, what each is, and which are held out.

A list is a JSON file, Decathlon style, with paths relative to its own folder:

    {"training": [{"image": "a.nii.gz", "modality": "ct", "subject": "s1", "label": "b.nii.gz", "fold": 0}, ...],
     "validation": [...], "test": [...], "labels": {"0": "background", "1": "spleen"}, "modalities": {"pet": "zscore"}}

An image may be a list of files, its channels. `modality` is required: nothing is guessed from a path. A label by the
name "ignore" is no class: it marks what was not annotated. `tolerance_mm` gives classes, by number or by name, their
own tolerance of NSD: {"1": 2.0, "liver": 3.0}. Instead of a list an nnU-Net raw folder (dataset.json, imagesTr) may be
given. Keys that are not known are left alone.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from dae.config import InputError

# Each modality and the way its intensities are normalised (preprocess.py); a list may declare others.
# The first five stand in the order of the authors' class labels, which --cmcl ranks depends on.
MODALITIES = {"ct": "window", "t1": "mr", "t1ce": "mr", "t2": "mr", "flair": "mr", "t2s": "mr", "pd": "mr", "mr": "mr"}
ALIASES = {"t1c": "t1ce", "t1gd": "t1ce", "t1w": "t1", "t2w": "t2", "t2*": "t2s", "t2f": "flair", "mri": "mr"}
INTENSITIES = ("window", "mr", "zscore", "nonzero", "percentile")


@dataclass(frozen=True)
class Item:
    """One image of the list."""

    image: tuple[Path, ...]  # one file, or one per channel
    modality: tuple[str, ...]  # of the whole image, or of each channel
    intensity: tuple[str, ...]  # as modality
    subject: str
    fold: int | None = None
    label: Path | None = None
    channel: tuple[int, int] | None = None  # which of how many of the file's, where the item is one alone

    @property
    def kind(self) -> str:
        """The modality as one name, which CMCL compares."""
        return "+".join(self.modality)


@dataclass(frozen=True)
class DataList:
    training: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    labels: dict[int, str]
    swap: tuple[tuple[int, int], ...] | None = None  # labels that change places in a left-right flip; None: not said
    tolerance: dict[int, float] = field(default_factory=dict)  # of NSD in mm, of classes with their own
    ignore: int | None = None  # the label of what was not annotated, which is not among `labels`
    regions: tuple[str, ...] = ()  # names of several labels at once, which pre-training need not know

    def fingerprint(self, *, labels: bool = False) -> str:
        """Of what is trained and validated on and in which order, wherever the list's folder lies."""

        def facts(paths: Sequence[Path]) -> list[Any]:
            return [[path.name, path.stat().st_size if path.is_file() else 0] for path in paths]

        used = (*self.training, *self.validation)
        content: list[Any] = [[facts(item.image), item.modality, item.intensity] for item in used]
        if labels:
            content += [facts([item.label]) for item in used if item.label]
            content += [sorted(self.labels.items()), self.swap or (), self.ignore]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]

    def kinds(self) -> list[str]:
        """Every modality of the list: the known ones in their fixed order, then others by name."""
        known = {name: n for n, name in enumerate(MODALITIES)}
        found = {item.kind for item in (*self.training, *self.validation)}
        return sorted(found, key=lambda kind: (known.get(kind, len(known)), kind))


def load(data: str, *, root: str = "", modality: str = "") -> DataList:
    """Read a list or an nnU-Net raw folder. `modality` is for items that do not name one. Raises InputError."""
    path = Path(data).expanduser()
    if not data or not path.exists():
        raise InputError(f"--data {data or '(none)'}: no such file; give a data list (JSON) or an nnU-Net raw folder")
    content = _from_nnunet(path) if path.is_dir() else _json(path)
    folder = Path(root).expanduser() if root else (path if path.is_dir() else path.parent)
    declared = {**MODALITIES, **{str(k).lower(): str(v) for k, v in _object(content, "modalities", path).items()}}
    usual = [modality] if modality else _in_order(content.get("modality"))
    if wrong := sorted(set(declared.values()) - set(INTENSITIES)):
        raise InputError(f"{path}: intensity {wrong[0]!r} is not one of {', '.join(INTENSITIES)}")
    splits = {
        name: tuple(_item(entry, f"{path}: {name}[{n}]", folder, usual, declared) for n, entry in enumerate(entries))
        for name, entries in ((name, _entries(content, name, path)) for name in ("training", "validation", "test"))
    }
    if not splits["training"]:
        raise InputError(f"{path}: no training items")
    labels, regions = _labels(_object(content, "labels", path))
    ignore = next((label for label, name in labels.items() if name == "ignore"), None)
    labels = {label: name for label, name in labels.items() if label != ignore}
    return DataList(**splits, labels=labels, swap=_pairs(content["swap"], path) if "swap" in content else None,
                    tolerance=_tolerance(_object(content, "tolerance_mm", path), labels, path),
                    ignore=ignore, regions=regions)  # fmt: skip


def channels_apart(items: DataList) -> DataList:
    """Each channel of every image as an item of its own: to pre-train on single channels of what is fine-tuned on all.

    A file of several channels is taken apart where the list names a modality for each of them.
    """

    def apart(item: Item) -> list[Item]:
        n = max(len(item.image), len(item.modality))
        kinds = item.modality if len(item.modality) == n else item.modality * n
        intensities = item.intensity if len(item.intensity) == n else item.intensity * n
        places = (
            [(item.image[0], (k, n)) for k in range(n)] if len(item.image) == 1 else [(f, (0, 1)) for f in item.image]
        )
        return [replace(item, image=(file,), modality=(kind,), intensity=(intensity,), channel=place)
                for (file, place), kind, intensity in zip(places, kinds, intensities)]  # fmt: skip

    training, validation, test = (
        tuple(one for item in split for one in apart(item)) for split in (items.training, items.validation, items.test)
    )
    return replace(items, training=training, validation=validation, test=test)


def hold_out(items: DataList, *, fold: int = 0, split_seed: int = 0) -> DataList:
    """Choose what validates: the list's `validation`; else the items of `fold`; else 5 % of the subjects (Table 1).

    Raises InputError where nothing would be left on one side.
    """
    if items.validation:
        return items
    if any(item.fold is not None for item in items.training):
        held = {n for n, item in enumerate(items.training) if item.fold == fold}
        reason = f"--fold {fold}"
    else:
        subjects = sorted({item.subject for item in items.training})
        chosen = np.random.default_rng(split_seed).permutation(len(subjects))[: max(1, round(0.05 * len(subjects)))]
        names = {subjects[n] for n in chosen}
        held = {n for n, item in enumerate(items.training) if item.subject in names}
        reason = "one subject"
    if not held or len(held) == len(items.training):
        raise InputError(f"--data: {reason} leaves nothing to train or to validate on; name a validation split")
    training = tuple(item for n, item in enumerate(items.training) if n not in held)
    return replace(items, training=training, validation=tuple(items.training[n] for n in sorted(held)))


def check_labels(items: DataList, data: str) -> None:
    """Raises InputError unless there are classes, and a label for everything that is trained or validated on."""
    for item in (*items.training, *items.validation):
        if item.label is None:
            raise InputError(f'{item.image[0]}: has no "label" in {data}')
    if items.regions:
        raise InputError(f'{data}: "labels" gives {items.regions[0]!r} no number of its own; name single labels')
    if len(items.labels) < 2 or min(items.labels) != 0 or max(items.labels) > 255:
        raise InputError(f'{data}: "labels" must name the background, 0, and at least one class, none above 255')


def fraction(items: DataList, share: float, *, split_seed: int = 0) -> DataList:
    """A share of the training subjects, at least one; smaller shares lie within larger ones of the same seed."""
    subjects = sorted({item.subject for item in items.training})
    order = np.random.default_rng([split_seed, 1]).permutation(len(subjects))
    kept = {subjects[n] for n in order[: max(1, round(share * len(subjects)))]}
    return replace(items, training=tuple(item for item in items.training if item.subject in kept))


def five_folds(items: DataList, *, fold: int, split_seed: int = 0) -> DataList:
    """Fold `fold` of five by subject: what a list without folds and validation is split into. Raises InputError."""
    subjects = sorted({item.subject for item in items.training})
    order = np.random.default_rng(split_seed).permutation(len(subjects))
    number = {subjects[n]: place % 5 for place, n in enumerate(order)}
    folded = tuple(replace(item, fold=number[item.subject]) for item in items.training)
    return hold_out(replace(items, training=folded), fold=fold)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON data list ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f'{path}: a data list is an object with a "training" list in it')
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


def _in_order(channels: Any) -> list[str]:
    """{"1": "T2", "0": "FLAIR"}, as Decathlon and nnU-Net name the channels of all their images -> ["FLAIR", "T2"]."""
    if not isinstance(channels, dict):
        return _several(channels)
    return [str(channels[key]) for key in sorted(channels, key=lambda key: int(key) if str(key).isdigit() else 0)]


def _item(entry: Any, where: str, folder: Path, usual: list[str], declared: Mapping[str, str]) -> Item:
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, dict) or not entry.get("image"):
        raise InputError(f'{where}: has no "image"')
    files = _several(entry["image"])
    image = tuple(folder / Path(file).expanduser() for file in files)
    named = _several(entry.get("modality")) or usual
    if not named:
        raise InputError(f'{where} ({image[0].name}): no "modality"; name it in the list, or all at once by --modality')
    names = [name.lower() for name in named]
    kinds = tuple(name if name in declared else ALIASES.get(name, name) for name in names)
    if unknown := [kind for kind in kinds if kind not in declared]:
        raise InputError(
            f"{where}: unknown modality {unknown[0]!r}; known: {', '.join(declared)}; the list may declare others: "
            f'"modalities": {{"{unknown[0]}": "zscore"}}'
        )
    intensity = tuple(_several(entry.get("intensity") or [declared[kind] for kind in kinds]))
    if wrong := [name for name in intensity if name not in INTENSITIES]:
        raise InputError(f"{where}: intensity {wrong[0]!r} is not one of {', '.join(INTENSITIES)}")
    label, fold = entry.get("label"), entry.get("fold")
    if not (fold is None or isinstance(fold, int)):
        raise InputError(f"{where}: fold {fold!r} is not a whole number")
    if not (label is None or isinstance(label, str)):
        raise InputError(f"{where}: label {label!r} is not the name of a file")
    subject = str(entry.get("subject", files[0]))  # without a name, each image is a subject of its own
    return Item(image, kinds, intensity, subject, fold, folder / label if label else None)


def _several(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)] if value else []


def _labels(labels: Mapping[str, Any]) -> tuple[dict[int, str], tuple[str, ...]]:
    """{"1": "spleen"} as in Decathlon lists, or {"spleen": 1} as in nnU-Net's; and names that have no one number."""
    pairs = [(k, v) if _is_whole(k) else (v, k) for k, v in labels.items()]
    regions = tuple(str(name) for number, name in pairs if not _is_whole(number))
    return {int(number): str(name) for number, name in pairs if _is_whole(number)}, regions


def _tolerance(given: Mapping[str, Any], labels: Mapping[int, str], path: Path) -> dict[int, float]:
    numbers = {name: label for label, name in labels.items()} | {str(label): label for label in labels}
    for key, mm in given.items():
        if not numbers.get(key):
            raise InputError(f'{path}: "tolerance_mm" names {key!r}, which is no class of its "labels"')
        if not isinstance(mm, int | float) or not 0 <= mm < inf:
            raise InputError(f'{path}: "tolerance_mm" of {key!r} is {mm!r}; it must be 0 mm or more')
    return {numbers[key]: float(mm) for key, mm in given.items()}


def _pairs(swap: Any, path: Path) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(a), int(b)) for a, b in swap)
    except (TypeError, ValueError) as error:
        raise InputError(f'{path}: "swap" must be a list of pairs of labels, as [[2, 3]]') from error


def _is_whole(value: Any) -> bool:
    return re.fullmatch(r"-?\d+", str(value)) is not None


def _from_nnunet(folder: Path) -> Mapping[str, Any]:
    """dataset.json and imagesTr of an nnU-Net raw folder as the content of a list; channel names are modalities."""
    if not (folder / "dataset.json").is_file():
        raise InputError(f"{folder}: a folder must be an nnU-Net raw one, with dataset.json and imagesTr in it")
    dataset = _json(folder / "dataset.json")
    ending = str(dataset.get("file_ending", ".nii.gz"))
    modality = _in_order(dataset.get("channel_names") or dataset.get("modality"))
    cases: dict[str, list[str]] = {}
    for file in sorted((folder / "imagesTr").glob(f"*{ending}")):
        named = re.fullmatch(r"(.+)_\d{4}", file.name.removesuffix(ending))
        if not named:
            raise InputError(f"{file}: nnU-Net's images end in _0000{ending}; for other folders write a data list")
        cases.setdefault(named[1], []).append(f"imagesTr/{file.name}")
    training = [_nnunet_case(folder, case, files, modality, ending) for case, files in cases.items()]
    ours = {key: dataset[key] for key in ("labels", "modalities", "swap", "tolerance_mm") if key in dataset}
    return {"training": training, **ours}


def _nnunet_case(folder: Path, case: str, files: list[str], modality: list[str], ending: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"image": files, "modality": modality, "subject": case}
    label = f"labelsTr/{case}{ending}"
    return {**entry, "label": label} if (folder / label).is_file() else entry
