"""An nnU-Net raw folder as the content of a data list.

It holds dataset.json, imagesTr, labelsTr, imagesTs and perhaps splits_final.json. What nnU-Net
says by file names is said in words here: a case is a subject, channels are files that end in _0000,
_0001 and so on, and the name of a channel is its modality or says how it is normalised.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dae.data.listfile import LIST_KEYS, channel_names, check_keys, read_json, same_name
from dae.errors import InputError, counted

# Names of channels that mean a normalisation, in small letters, and its name in a list.
NORMALISATIONS = {
    "nonorm": "none",
    "zscore": "zscore_all",
    "rescale_to_0_1": "minmax",
    "rescale_0_to_1": "minmax",
}

# Keys of dataset.json that mean what they mean in a list, and those that only nnU-Net has.
SHARED_KEYS = ("labels", "regions_class_order", "swap", "tolerance_mm")
NNUNET_KEYS = ("channel_names", "file_ending", "overwrite_image_reader_writer")

Split = tuple[frozenset[str], frozenset[str]]  # cases to train on, cases to validate on


def content_of(folder: Path) -> dict[str, Any]:
    """The list that the folder stands for: its training is imagesTr, its test imagesTs, if any.

    Raises InputError where the folder is no such folder, or a file of it does not fit.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: a folder must be an nnU-Net raw one, with dataset.json and imagesTr in it"
        )
    dataset = read_json(path)
    if not isinstance(dataset, dict):
        raise InputError(f"{path}: must be an object, with channel_names and labels in it")
    check_keys(dataset, LIST_KEYS | dict.fromkeys(NNUNET_KEYS, ""), str(path))

    ending = str(dataset.get("file_ending", ".nii.gz"))
    if ending and not ending.startswith("."):
        ending = f".{ending}"
    if not re.fullmatch(r"[\w.+-]*", ending):  # it becomes part of a pattern of paths
        raise InputError(f'{path}: "file_ending" {ascii(ending)[:40]}: give it as ".nii.gz"')
    channels = channel_names(dataset.get("channel_names") or dataset.get("modality"))

    # What is no object here is refused as the "modalities" of any list.
    modalities = dataset.get("modalities", {})
    if isinstance(modalities, dict):
        modalities = NORMALISATIONS | modalities

    content = {key: dataset[key] for key in SHARED_KEYS if key in dataset}
    content["modalities"] = modalities
    content["training"] = cases_in(folder, "imagesTr", "labelsTr", channels=channels, ending=ending)
    content["test"] = cases_in(folder, "imagesTs", "labelsTs", channels=channels, ending=ending)
    return content


def cases_in(
    folder: Path, images: str, labels: str, *, channels: list[str], ending: str
) -> list[dict[str, Any]]:
    """The cases of one folder of images, in order of name; with a label where there is one."""
    entries: list[dict[str, Any]] = []
    for case, files in files_by_case(folder, images, ending).items():
        if channels and len(files) != len(channels):
            raise InputError(
                f"{folder / images}: case {case} has {counted(len(files), 'file')}, and "
                f"dataset.json names {counted(len(channels), 'channel')}"
            )
        entry = {"image": files, "modality": channels, "subject": case}
        label = f"{labels}/{case}{ending}"
        if (folder / label).is_file():
            entry["label"] = label
        entries.append(entry)
    return entries


def files_by_case(folder: Path, images: str, ending: str) -> dict[str, list[str]]:
    """The channels of each case, in order. Raises InputError where one is not there."""
    by_case: dict[str, dict[int, str]] = {}
    for file in sorted((folder / images).glob("*")):
        if file.name.startswith("."):
            continue  # a Mac leaves "._name" beside the files that it copies
        if not file.name.endswith(ending):
            check_ending(file, ending)
            continue
        match = re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(ending))
        if not match:
            raise InputError(
                f"{file}: nnU-Net's images end in _0000{ending}; "
                "for other folders write a data list"
            )
        channels = by_case.setdefault(match[1], {})
        channels[int(match[2])] = f"{images}/{file.name}"

    for case, channels in by_case.items():
        for number in range(len(channels)):
            if number not in channels:
                raise InputError(
                    f"{folder / images}: case {case} has no channel _{number:04d}{ending}; "
                    "copy it there"
                )
    return {case: list(channels.values()) for case, channels in by_case.items()}


def check_ending(file: Path, ending: str) -> None:
    """Raises InputError for a volume whose ending differs by capitals: it would be left out."""
    if file.name.lower().endswith(ending.lower()):
        raise InputError(f"{file}: ends in other capitals than {ending}; rename it")


def splits_of(folder: Path) -> tuple[Split, ...]:
    """The pair of cases of each fold, by splits_final.json; none where there is no such file.

    It is looked for in the folder, where nnU-Net keeps it, and beside the folder. Raises InputError
    where the file does not hold what nnU-Net writes.
    """
    path = splits_file(folder)
    if path is None:
        return ()
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(
            f'{path}: must be a list of folds, each {{"train": [cases], "val": [cases]}}'
        )
    return tuple(split_of(fold, f"{path}: fold {n}") for n, fold in enumerate(content))


def splits_file(folder: Path) -> Path | None:
    absolute = folder.absolute()  # a relative path need not have the parents
    preprocessed = absolute.parent.parent / "nnUNet_preprocessed" / absolute.name
    for candidate in (folder, preprocessed, absolute.parent):
        path = candidate / "splits_final.json"
        if path.is_file():
            return path
    return None


def split_of(fold: Any, where: str) -> Split:
    """The cases of one fold. Raises InputError where a case is on both sides."""
    sides = fold if isinstance(fold, Mapping) else {}
    train = sides.get("train")
    val = sides.get("val")
    if not isinstance(train, list) or not isinstance(val, list):
        raise InputError(f'{where}: must have the lists "train" and "val"')

    trained = frozenset(same_name(str(case)) for case in train)
    validated = frozenset(same_name(str(case)) for case in val)
    both = sorted(trained & validated)
    if both:
        raise InputError(
            f"{where}: case {both[0]} is in both train and val; remove it from one of them"
        )
    return trained, validated
